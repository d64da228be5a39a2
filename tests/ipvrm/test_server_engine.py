"""Engines behind a server: the local engine's ids and log-probs over HTTP, and how that fails."""

import dataclasses
import json
import math
import threading
import time

import pyarrow.parquet as pq
import pytest
import torch
from runs import write_jsonl
from served import FakeServer, scaled

from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.data.responses import Response
from ipvrm.data.rows import BEHAVIOUR
from ipvrm.evaluate.policy import PolicyEvalConfig, evaluate
from ipvrm.models.causal_lm import load_model, save_model
from ipvrm.models.server import Server
from ipvrm.rollouts.engine import Sampling, TransformersEngine, response_seed, stop_ids
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.rollouts.server_engine import ServerEngine
from ipvrm_kernels import linear_candidates

PROMPTS = [
    "What is 1 + 2?",
    "What is 73 + 19?",
    "x",
    "Add the numbers 5, 6, 7 and 8, and say what comes out.",
]


@pytest.fixture(scope="module")
def sharp(tmp_path_factory, tiny_folder, tokenizer):
    """A folder whose model says different things to different prompts."""
    folder = tmp_path_factory.mktemp("served") / "sharp"
    save_model(scaled(tiny_folder), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(sharp, tokenizer):
    with FakeServer(sharp, tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def model(sharp):
    return load_model(sharp)


def engine_of(server, sharp, stops, **options):
    return ServerEngine(Server(server.url, sharp, **options), stops)


SAMPLINGS = [Sampling(16), Sampling(16, 0.0), Sampling(16, 0.7, 0.9), Sampling(16, 1.3, 1.0, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ids_are_the_local_engine_s(server, sharp, stops, model, encoded, sampling):
    pairs = [(prompt, response_seed(1, row, k)) for row, prompt in enumerate(encoded) for k in range(2)]
    prompts, seeds = map(list, zip(*pairs, strict=True))
    stops = stops | {TransformersEngine(model, stops)(prompts[:1], sampling, seeds[:1])[0][5]}
    local = TransformersEngine(model, stops)(prompts, sampling, seeds)
    assert engine_of(server, sharp, stops)(prompts, sampling, seeds) == local
    assert len(local[0]) <= 6 and 16 in map(len, local), "the test needs responses of both kinds"
    bodies = [body for path, body in server.asked if path.endswith("/completions")]
    assert sorted(body["seed"] for body in bodies) == sorted(seeds)
    for body in bodies:  # nothing is left to the defaults of the model's generation config
        assert body["n"] == 1 and body["return_token_ids"] and body["stop_token_ids"] == sorted(stops)
        given = {"top_p": sampling.top_p, "top_k": sampling.top_k, "temperature": sampling.temperature}
        neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert {**given, **neutral}.items() <= body.items()


def test_stop_ids_need_no_weights(sharp, model, tokenizer, tmp_path):
    assert stop_ids(str(sharp), tokenizer) == stop_ids(model, tokenizer)
    stored = json.loads((sharp / "generation_config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((sharp / name).read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(stored | {"eos_token_id": [5, 7]}))
    assert stop_ids(str(tmp_path), tokenizer) >= {5, 7}
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids(str(tmp_path), tokenizer) == stop_ids(model, tokenizer)


def test_log_probs_are_the_models(server, sharp, stops, model, encoded):
    ids = TransformersEngine(model, stops)(encoded, Sampling(8), [1, 2, 3, 4])
    responses = [Response((*p, *r), len(p)) for p, r in zip(encoded, ids, strict=True)]
    found = Server(server.url, sharp).logprobs(responses)
    for response, row in zip(responses, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([response.input_ids])).logits[0].log_softmax(-1)
        taken = logprobs[:-1].gather(1, torch.tensor(response.input_ids)[1:, None])[:, 0]
        torch.testing.assert_close(row, taken[response.prompt_length - 1 :], rtol=0, atol=1e-5)
    assert engine_of(server, sharp, stops).gap(responses, model) < 1e-5
    assert engine_of(server, sharp, stops).gap(responses, scaled(sharp, 1.2)) > 0.1


# ----------------------------------------------------------------------------------------------- candidates


def candidates_of(model, prompt, ids, temperature, min_prob):
    with torch.no_grad():
        states = model.model(torch.tensor([[*prompt, *ids]])).last_hidden_state[0, len(prompt) - 1 : -1]
    return linear_candidates(
        states, model.lm_head.weight, min_prob=min_prob, temperature=temperature, sampled=torch.tensor(ids)
    )


@pytest.mark.parametrize(
    ("mode", "temperature", "min_prob"),
    [("raw_logprobs", 1.0, 0.1), ("processed_logprobs", 0.5, 0.1), ("processed_logprobs", 0.7, 0.05)],
)
def test_candidates_are_linear_candidates(
    sharp, tokenizer, stops, model, encoded, mode, temperature, min_prob
):
    with FakeServer(sharp, tokenizer, mode=mode) as server:
        found = engine_of(server, sharp, stops).with_candidates(
            encoded, Sampling(12, temperature), [1, 2, 3, 4], min_prob=min_prob
        )
        asked = [body for _, body in server.asked if body and body.get("max_tokens") == 12]
    assert {body["logprobs"] for body in asked} == {round(1 / min_prob)}
    counts = []
    for prompt, sampled in zip(encoded, found, strict=True):
        wanted = candidates_of(model, prompt, sampled.ids, temperature, min_prob)
        assert torch.equal(sampled.candidate_ids, wanted.ids)
        torch.testing.assert_close(sampled.candidate_logprobs, wanted.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(sampled.logprobs, wanted.sampled_logprobs, rtol=0, atol=1e-5)
        counts += wanted.counts.tolist()
    assert max(counts) > 1, "the test needs more than one candidate somewhere"


@pytest.mark.parametrize(
    ("mode", "sampling", "min_prob", "reason"),
    [
        ("raw_logprobs", Sampling(4, 0.7), 0.1, "from before temperature 0.7.* processed_logprobs"),
        ("processed_logprobs", Sampling(4, 1.0, 0.9), 0.1, "need top_p 1 and top_k 0.*got 0.9 and 0"),
        ("processed_logprobs", Sampling(4, 1.0, 1.0, 5), 0.1, "got 1.0 and 5"),
        ("processed_logprobs", Sampling(4, 0.0), 0.1, "temperature above 0"),
        ("raw_logits", Sampling(4), 0.1, "add up to more than 1.*--logprobs-mode raw_logits"),
        ("raw_logprobs", Sampling(4), 0.001, "min_prob must lie in"),
    ],
)  # fmt: skip
def test_candidates_that_are_not_those_of_the_sampling_distribution_are_refused(
    sharp, tokenizer, stops, encoded, mode, sampling, min_prob, reason
):
    with FakeServer(sharp, tokenizer, mode=mode) as server, pytest.raises(IpvrmError, match=reason):
        engine_of(server, sharp, stops).with_candidates(encoded, sampling, [1, 2, 3, 4], min_prob=min_prob)


# --------------------------------------------------------------------------------------------------- faults


def without(name):
    return lambda choice: {key: value for key, value in choice.items() if key != name}


def changed(**values):
    return lambda choice: choice | {k: v(choice) if callable(v) else v for k, v in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "HTTP 500: status 500 it is"),
        (("sleep", 1.0), r"no answer within 0.3 s \(--engine_timeout\)"),
        ("die", "Remote end closed connection|reset by peer"),
        ("half", "half an answer"),
        ("words", "half an answer, no JSON"),
        (without("token_ids"), "no token_ids; it must be a server that answers with token ids"),
        (changed(token_ids=["a"]), "no token_ids"),
        (without("prompt_token_ids"), "no prompt_token_ids"),
        (changed(prompt_token_ids=lambda c: [0, *c["prompt_token_ids"]]), "has changed the prompt, of .* to"),
        (changed(finish_reason="abort"), r"half an answer, \d+ of 16 tokens \(abort\)"),
        (changed(finish_reason="length", token_ids=[3, 4]), r"half an answer, 2 of 16 tokens \(length\)"),
        (changed(finish_reason="stop", token_ids=[3, 4]), r"end with the first of the stop tokens .*\[4\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,  # alike in every worker
)
def test_a_bad_answer_is_one_line(server, sharp, stops, encoded, fault, reason):
    engine = engine_of(server, sharp, stops, timeout=0.3 if isinstance(fault, tuple) else 600.0)
    server.fault = lambda path, body: fault if body.get("seed") == 2 else None
    with pytest.raises(IpvrmError, match=reason) as caught:
        engine(encoded, Sampling(16), [1, 2, 3, 4])
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    server.fault = None
    patient = engine_of(server, sharp, stops)
    assert len(patient(encoded, Sampling(16), [1, 2, 3, 4])) == 4  # the server has not been hurt


def test_a_stop_token_in_the_middle_is_refused(server, sharp, stops, encoded):
    end = min(stops)
    server.fault = lambda path, body: changed(finish_reason="stop", token_ids=[3, end, 4, end])
    with pytest.raises(IpvrmError, match="must end with the first of the stop tokens"):
        engine_of(server, sharp, stops)(encoded[:1], Sampling(16), [1])


def all_of(entry, choice):
    return [entry] * len(choice["prompt_logprobs"])


RULED_OUT = {str(token): {"logprob": -9999.0} for token in range(320)}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (without("prompt_logprobs"), "no prompt_logprobs of each"),
        (changed(prompt_logprobs=lambda c: c["prompt_logprobs"][:-1]), "no prompt_logprobs of each"),
        (changed(prompt_logprobs=lambda c: all_of({"1": {"logprob": 0}}, c)), "lacks its own"),
    ],
)  # fmt: skip
def test_log_probs_that_are_not_there(server, sharp, encoded, fault, reason):
    server.fault = lambda path, body: fault
    response = Response((*encoded[0], 3, 4), len(encoded[0]))
    with pytest.raises(IpvrmError, match=reason):
        Server(server.url, sharp).logprobs([response])


def test_a_token_that_the_server_rules_out_has_log_prob_minus_infinity(server, sharp, encoded):
    """vLLM writes it as -9999, since JSON has no infinity; who takes ratios of it refuses them."""
    server.fault = lambda path, body: changed(prompt_logprobs=lambda c: all_of(RULED_OUT, c))
    (found,) = Server(server.url, sharp).logprobs([Response((*encoded[0], 3, 4), len(encoded[0]))])
    assert found.tolist() == [-math.inf] * 2


def test_the_first_failure_ends_the_others(server, sharp, stops, encoded):
    """A failed request does not wait for a slow one: its connection is cut."""
    server.fault = lambda path, body: 500 if body["seed"] == 4 else ("sleep", 60.0)
    engine = engine_of(server, sharp, stops)
    started = time.monotonic()
    with pytest.raises(IpvrmError, match="HTTP 500"):
        engine(encoded, Sampling(4), [1, 2, 3, 4])
    assert time.monotonic() - started < 30


def test_at_most_so_many_requests_at_a_time(server, sharp, stops, encoded):
    running, most, lock, pair = [0], [0], threading.Lock(), threading.Barrier(2, timeout=120)

    def fault(path, body):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        pair.wait()
        with lock:
            running[0] -= 1

    server.fault = fault
    engine_of(server, sharp, stops, concurrency=2)(encoded * 2, Sampling(2), list(range(8)))
    assert most[0] == 2


def test_another_model_is_refused(sharp, tiny_folder, tokenizer, tmp_path):
    with FakeServer(tiny_folder, tokenizer) as server:
        with pytest.raises(IpvrmError, match=r"serves .*tiny, not .*sharp; .*--served-model-name sharp"):
            Server(server.url, sharp)
        server.name = "sharp"  # --served-model-name: the user says that it is
        assert Server(server.url, sharp).name == "sharp"
        server.name, server.adapters["sharp"] = "tiny", ("/x", None)  # an adapter of that name is no model
        with pytest.raises(IpvrmError, match="serves tiny, sharp, not"):
            Server(server.url, sharp)
        server.models = lambda: {"detail": "not found"}
        with pytest.raises(IpvrmError, match="names no models"):
            Server(server.url, sharp)


def test_an_answer_of_another_model_is_refused(server, sharp, stops, encoded):
    engine = engine_of(server, sharp, stops)

    def another(path, body):
        body["model"] = server.name = "other"

    server.fault = another
    with pytest.raises(IpvrmError, match="answers for 'other', asked for '.*sharp'"):
        engine(encoded[:1], Sampling(2), [1])


def test_the_key_goes_along(server, sharp, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Server(server.url, sharp)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    Server(server.url, sharp)
    assert server.keys == [None, "Bearer sesame"]


# -------------------------------------------------------------------------------------------------- rollout


@pytest.fixture
def prompts_file(tmp_path):
    rows = [{"prompt": text, "answer": number} for number, text in enumerate(PROMPTS)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def config(sharp, prompts_file, tmp_path, **settings):
    given = {"num_generations": 3, "max_new_tokens": 12, "output": str(tmp_path / "out.jsonl")} | settings
    return RolloutConfig(str(sharp), str(prompts_file), **given)


@pytest.mark.slow
def test_rollout_is_the_local_engine_s(server, sharp, prompts_file, tmp_path):
    local = config(sharp, prompts_file, tmp_path, use_cpu=True)
    roll_out(local, progress=False)
    over = config(sharp, prompts_file, tmp_path, engine=server.url, output=str(tmp_path / "b.jsonl"))
    summary = roll_out(over, progress=False)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert summary["device"] == f"{server.url} ({sharp})"


@pytest.mark.slow
def test_eval_policy_is_the_local_engine_s(server, sharp, prompts_file, tmp_path):
    given = PolicyEvalConfig(
        str(sharp), str(prompts_file), str(tmp_path / "local"), num_generations=2, k=(1, 2),
        max_new_tokens=8, verifier="string", verifier_workers=1, bootstrap_resamples=20, use_cpu=True,
    )  # fmt: skip
    local = evaluate(given, progress=False)
    over = dataclasses.replace(given, engine=server.url, use_cpu=False, output_dir=str(tmp_path / "served"))
    served = evaluate(over, progress=False)
    assert sum(body is not None for _, body in server.asked) == 2 * len(PROMPTS)
    assert served["sources"] == local["sources"] and served["counts"] == local["counts"]
    ids = [
        pq.read_table(tmp_path / name / "rollouts.parquet")["response_ids"].to_pylist()
        for name in ("local", "served")
    ]
    assert ids[0] == ids[1] and len({*map(tuple, ids[0])}) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "temperature"), [("raw_logprobs", 1.0), ("processed_logprobs", 0.8), ("raw_logprobs", 0.8)]
)
def test_stored_log_probs_and_candidates_are_the_local_engine_s(
    sharp, tokenizer, prompts_file, tmp_path, mode, temperature
):
    """What `rollout --min_prob` writes for `train-policy --offline`; refused where the server's log-probs are
    of another temperature."""
    given = config(sharp, prompts_file, tmp_path, temperature=temperature, min_prob=0.03, use_cpu=True)
    with FakeServer(sharp, tokenizer, mode=mode) as server:
        over = dataclasses.replace(given, engine=server.url, use_cpu=False, output=str(tmp_path / "b.jsonl"))
        if (mode, temperature) == ("raw_logprobs", 0.8):
            with pytest.raises(IpvrmError, match="from before temperature 0.8"):
                roll_out(over, progress=False)
            return
        roll_out(over, progress=False)
    roll_out(given, progress=False)
    local, served = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "b.jsonl")
    )
    several, floats = 0, ("old_logprobs", "old_candidate_logprobs")
    for a, b in zip(local, served, strict=True):
        assert a.keys() == b.keys() >= {*BEHAVIOUR}
        assert {k: v for k, v in a.items() if k not in floats} == {
            k: v for k, v in b.items() if k not in floats
        }
        assert b["old_logprobs"] == pytest.approx(a["old_logprobs"], abs=1e-5)
        for mine, theirs in zip(b["old_candidate_logprobs"], a["old_candidate_logprobs"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        several += sum(len(ids) > 1 for ids in b["candidate_ids"])
    assert several > 3


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(sharp, tokenizer, prompts_file, tmp_path, capsys):
    """One line, exit 2, what was finished kept; after a restart, on another port, the same command's file."""
    whole = config(sharp, prompts_file, tmp_path, use_cpu=True)
    roll_out(whole, progress=False)
    output = tmp_path / "b.jsonl"
    flags = ["rollout", "--model", str(sharp), "--input", str(prompts_file), "--output", str(output)]
    flags += ["--num_generations", "3", "--max_new_tokens", "12", "--per_device_eval_batch_size", "4"]
    with FakeServer(sharp, tokenizer) as server:
        server.fault = lambda path, body: "die" if len(server.asked) > 6 else None
        assert main([*flags, "--engine", server.url]) == 2
        first = server.url
    (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("ipvrm rollout: ")]  # a dying
    assert said.startswith(f"ipvrm rollout: {first}/completions: ") and "same command" in said  # server talks
    assert main([*flags, "--engine", first]) == 2 and "refused" in capsys.readouterr().err  # nobody is there
    with FakeServer(sharp, tokenizer) as server:
        assert main([*flags, "--engine", server.url]) == 0
        assert sum(body is not None for _, body in server.asked) == 8  # four were kept
    assert output.read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_an_unfinished_rollout_does_not_change_its_engine(server, sharp, prompts_file, tmp_path):
    settings = config(sharp, prompts_file, tmp_path, engine=server.url, per_device_eval_batch_size=4)
    server.fault = lambda path, body: "die" if len(server.asked) > 6 else None
    with pytest.raises(IpvrmError):
        roll_out(settings, progress=False)
    with pytest.raises(IpvrmError, match=r"changed: engine \('a server' then, None now\)"):
        roll_out(dataclasses.replace(settings, engine="transformers"), progress=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine": "vllm"}, "--engine 'vllm': not an address; it must be transformers, or the address"),
        ({"engine": "http://localhost:port/v1"}, "--engine 'http://localhost:port/v1': not an address"),
        ({"engine_timeout": 3.0}, "--engine_timeout belongs to the --engine of a server"),
        ({"engine": "http://127.0.0.1:9/v1", "engine_timeout": math.inf}, "must be positive and finite"),
        ({"engine": "http://127.0.0.1:9/v1", "bf16": True}, "--bf16 has no effect on --engine"),
        ({"engine": "http://127.0.0.1:9/v1", "use_cpu": True}, "--use_cpu has no effect on --engine"),
        ({"engine": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1/models: Connection refused"),
    ],
)
def test_settings_that_cannot_be(sharp, prompts_file, tmp_path, settings, reason):
    with pytest.raises(IpvrmError, match=reason):
        roll_out(config(sharp, prompts_file, tmp_path, **settings), progress=False)


def test_a_prompt_must_fit_the_server(server, sharp, prompts_file, tmp_path):
    server.max_model_len = 30
    with pytest.raises(
        IpvrmError, match=r"tokens and 12 new ones .* are more than the 30 positions of the models in use"
    ):
        roll_out(config(sharp, prompts_file, tmp_path, engine=server.url), progress=False)
