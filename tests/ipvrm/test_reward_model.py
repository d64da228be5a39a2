"""Scores against the definitions, and the reference that travels with a reward model."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import ruled_out, sharp, write_jsonl
from served import FakeServer

from ipvrm import IpvrmError, RewardModel
from ipvrm.cli import main
from ipvrm.data.responses import Response
from ipvrm.data.steps import render_steps
from ipvrm.models.reward_model import read_info, write_info
from ipvrm.models.server import Server
from ipvrm.training.reward_config import RewardConfig
from ipvrm.training.train_rm import train_reward_model

HUB_NAMES = ("reference", "reference_given")
PROBLEM, STEPS = "What is 1 + 2?", ["carry 0.", "carry 1 and more.", "Answer: 3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder, rollouts):
    """A parent folder with a base model and a run trained from it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder, home / "base")
    config = RewardConfig(
        model=str(home / "base"),
        train_data=str(rollouts),
        output_dir=str(home / "runs" / "rm"),
        learning_rate=3e-3,
        beta=2.0,
        margin=1.0,
        max_steps=3,
        use_cpu=True,
    )
    train_reward_model(config, progress=False)
    return home


@pytest.fixture(scope="module")
def reward_model(home):
    return RewardModel.from_pretrained(home / "runs" / "rm", device="cpu")


def full_logits_log_ratio(reward_model, ids, start):
    """(T,) from the two models' own logits."""
    ids = torch.tensor([ids])
    parts = []
    for model in (reward_model.model, reward_model.reference):
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        parts.append(logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return parts[0] - parts[1]


def test_score_against_full_logits(reward_model):
    score = reward_model.score(PROBLEM, STEPS)
    tokenizer = reward_model.tokenizer
    prompt = f"<|im_start|>user\n{PROBLEM}<|im_end|>\n<|im_start|>assistant\n"
    texts = ["Step 1: carry 0.\n\n", "Step 2: carry 1 and more.\n\n", "Step 3: Answer: 3"]
    whole = tokenizer(prompt + "".join(texts) + "<|im_end|>", return_offsets_mapping=True)
    start = len(tokenizer(prompt).input_ids)
    log_ratio = full_logits_log_ratio(reward_model, whole.input_ids, start)
    value = 2.0 * log_ratio.cumsum(0)
    torch.testing.assert_close(score.prefix_values, value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score.td, 2.0 * log_ratio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        score.mean_values, value / torch.arange(1, len(value) + 1), rtol=1e-4, atol=1e-4
    )
    # A token belongs to the step in which its last character lies; the end-of-turn token to none.
    sums, lasts, end = [], [], len(prompt)
    ends = [end for _, end in whole.offset_mapping[start:-1]]
    for text in texts:
        begin, end = end, end + len(text)
        inside = [t for t, last in enumerate(ends) if begin < last <= end]
        sums.append(2.0 * log_ratio[inside].sum())
        lasts.append(inside[-1])
    torch.testing.assert_close(score.step_scores, torch.stack(sums), rtol=1e-4, atol=1e-4)
    assert score.step_ends.tolist() == lasts
    below = [i for i, s in enumerate(sums) if s < 0]
    assert score.first_error == (below[0] if below else -1)


def one_token(reward_model, text):
    (token,) = reward_model.tokenizer(text, add_special_tokens=False).input_ids
    return token


@pytest.mark.parametrize("by", [("model",), ("reference",), ("model", "reference")])
def test_an_infinite_log_ratio_is_refused_with_its_solution_and_token(reward_model, monkeypatch, by):
    """It was a score of infinity, or of no number: a step that no threshold flags, `first_error` -1."""
    token = one_token(reward_model, "9")
    ruled_out(monkeypatch, token, by)
    place = (
        rf"item:2: the log-probability under the {by[0]} of response token \d+ of \d+ \(id {token}\) is -inf"
    )
    items = [(PROBLEM, STEPS), (PROBLEM, ["carry 0.", "Answer: 9"])]
    with pytest.raises(IpvrmError, match=place):
        reward_model.score_many(items)
    with pytest.raises(IpvrmError, match=place.replace("item:2", "item:1")):
        reward_model.score(*items[1], min_prob=None)
    assert reward_model.score(*items[0]).td.isfinite().all()


def test_an_infinite_log_ratio_of_a_candidate_is_refused(reward_model, monkeypatch):
    import ipvrm.models.reward_model as module

    real = module._with_candidates

    def patched(*arguments):
        *others, own, ref = real(*arguments)
        return *others, own - torch.inf, ref

    monkeypatch.setattr(module, "_with_candidates", patched)
    models = [sharp(copy.deepcopy(m)) for m in (reward_model.model, reward_model.reference)]
    with pytest.raises(
        IpvrmError, match=r"item:1: .* a candidate in the place of response token \d+ of .* -inf"
    ):
        RewardModel(*models, reward_model.tokenizer, reward_model.info).score(PROBLEM, STEPS, min_prob=0.02)


def test_an_infinite_reward_without_a_reference_is_refused(tiny_folder, monkeypatch):
    endo_rm = RewardModel.from_causal_lm(tiny_folder, device="cpu")
    monkeypatch.setattr(
        "ipvrm.models.reward_model.endo_rewards",
        lambda model, batch, *_: torch.full((len(batch.token_ids),), torch.nan),
    )
    with pytest.raises(IpvrmError, match=r"item:1: the reward of response token 1 of \d+ \(id \d+\) is nan"):
        endo_rm.score(PROBLEM, STEPS)


SPLIT = ["漢字 and 😀😀.", "Ünï\r\ncode\tmore <b>.", "שלום"]  # over a byte-level BPE of 320 tokens


def test_score_says_what_each_token_is(reward_model):
    score = reward_model.score(PROBLEM, SPLIT)
    rendered, ends = render_steps(SPLIT)
    assert "".join(score.tokens[:-1]) == rendered and score.tokens[-1] == "<|im_end|>"
    assert score.tokens.count("") > 10  # characters that are split over tokens
    assert reward_model.tokenizer.decode(score.token_ids[:-1]) == rendered
    at, steps = 0, []
    for piece, step in zip(score.tokens[:-1], score.steps_of_token.tolist(), strict=False):
        at += len(piece)
        steps.append(step)
        if piece:
            assert step == next(k for k, end in enumerate(ends) if at <= end)
    assert steps == sorted(steps) and score.steps_of_token[-1] == -1
    torch.testing.assert_close(score.td, 2.0 * (score.logprobs - score.ref_logprobs))
    assert score.candidates is None and score.candidate_td is None


def test_candidates_against_dense_logits(reward_model):
    """The set {p >= 0.02} of the reference and its TD, from the models' own logits."""
    models = [sharp(copy.deepcopy(m)) for m in (reward_model.model, reward_model.reference)]
    reward_model = RewardModel(*models, reward_model.tokenizer, reward_model.info)
    plain, score = (reward_model.score(PROBLEM, STEPS, min_prob=m) for m in (None, 0.02))
    torch.testing.assert_close(score.td, plain.td)
    prompt = reward_model.chat.prompt_ids(PROBLEM)
    ids = torch.tensor([[*prompt, *score.token_ids]])
    with torch.no_grad():
        model, reference = (
            m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for m in (reward_model.model, reward_model.reference)
        )
    several = 0
    for t in range(len(score.td)):
        kept = score.candidates.ids[t] >= 0
        found, want = score.candidates.ids[t][kept], (reference[t].exp() >= 0.02).nonzero()[:, 0]
        assert sorted(found.tolist()) == want.tolist()
        td = 2.0 * (model[t] - reference[t])[found]
        torch.testing.assert_close(score.candidate_td[t][kept], td, rtol=1e-3, atol=1e-3)
        assert not score.candidate_td[t][~kept].any()
        several += len(found) > 1
    assert several
    columns = score.by_token()
    assert {len(column) for column in columns.values()} == {len(score.td)}
    assert len(columns["candidates"][0]) == int((score.candidates.ids[0] >= 0).sum())
    first = next(found for found in columns["candidates"] if found)
    assert set(first[0]) == {"id", "ref_logprob", "td"}
    response = Response((*prompt, *score.token_ids), len(prompt))
    ids = score.candidates.ids  # given, and fewer for another response of the same batch
    again, fewer = reward_model.token_logprobs([response, response], 1000, [ids, ids[:, :1]])
    torch.testing.assert_close(again.candidates.td(2.0), score.candidate_td)
    torch.testing.assert_close(fewer.candidates.td(2.0)[:, :1], score.candidate_td[:, :1])


def test_rules_and_threshold(reward_model):
    prefix = reward_model.score(PROBLEM, STEPS, rule="prefix")
    torch.testing.assert_close(
        prefix.step_scores, prefix.prefix_values[prefix.step_ends], rtol=1e-5, atol=1e-5
    )
    mean = reward_model.score(PROBLEM, STEPS, rule="mean")
    torch.testing.assert_close(mean.step_scores, mean.mean_values[mean.step_ends], rtol=1e-5, atol=1e-5)
    assert reward_model.score(PROBLEM, STEPS, threshold=0.0).first_error == -1
    assert reward_model.score(PROBLEM, STEPS, threshold=1.0).first_error == 0


def test_score_many_keeps_the_order_and_ignores_the_batching(reward_model):
    items = [(PROBLEM, STEPS[:n]) for n in (1, 3, 2, 3, 1)]
    for budget in (1, 120, 10_000):
        for (problem, steps), score in zip(
            items, reward_model.score_many(items, batch_tokens=budget), strict=True
        ):
            alone = reward_model.score(problem, steps)
            torch.testing.assert_close(score.prefix_values, alone.prefix_values, rtol=1e-4, atol=1e-5)
            assert len(score.step_scores) == len(steps)


def test_token_log_ratios(reward_model):
    responses = [Response(tuple(range(5, 5 + n)), 3, 1) for n in (4, 30, 11)]
    for response, got in zip(
        responses, reward_model.token_log_ratios(responses, batch_tokens=40), strict=True
    ):
        want = full_logits_log_ratio(reward_model, list(response.input_ids), 3)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert reward_model.token_log_ratios([]) == []


def test_save_and_load_round_trip(reward_model, home, tmp_path):
    reward_model.save_pretrained(home / "elsewhere" / "copy")
    again = RewardModel.from_pretrained(home / "elsewhere" / "copy", device="cpu")
    assert again.info.reference == "../../base"
    a, b = reward_model.score(PROBLEM, STEPS), again.score(PROBLEM, STEPS)
    assert torch.equal(a.prefix_values, b.prefix_values)


def test_a_failed_save_leaves_what_was_there(reward_model, home, monkeypatch):
    folder = home / "elsewhere" / "kept"
    reward_model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not [name for name in before if name.startswith(".")]

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("ipvrm.models.reward_model.write_info", fails)
    with pytest.raises(IpvrmError, match="cannot be written: no space left on device"):
        reward_model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_reference_from_the_hub_keeps_its_name(home, tmp_path, monkeypatch):
    shutil.copytree(home / "runs" / "rm", tmp_path / "rm")
    path = tmp_path / "rm" / "ipvrm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(HUB_NAMES, "someone/base")))
    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        return str(home / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)  # "rm/<reference>" looks like a Hub name
    RewardModel.from_pretrained("rm", device="cpu").save_pretrained("copy")
    stored = json.loads((tmp_path / "copy" / "ipvrm_config.json").read_text())
    assert [stored[name] for name in HUB_NAMES] == ["someone/base"] * 2
    path.write_text(json.dumps(stored | dict.fromkeys(HUB_NAMES, "base-of-someone")))
    RewardModel.from_pretrained("rm", device="cpu")
    assert set(asked) == {"someone/base", "base-of-someone"}


def test_the_reference_survives_moving_the_parent(home, tmp_path, reward_model):
    moved = tmp_path / "moved"
    shutil.copytree(home, moved)
    base = home / "base"
    base.rename(home / "hidden")  # only the relative path can find it now
    try:
        again = RewardModel.from_pretrained(moved / "runs" / "rm", device="cpu")
        assert torch.equal(again.score(PROBLEM, STEPS).td, reward_model.score(PROBLEM, STEPS).td)
        (moved / "base").rename(tmp_path / "base_of_another_name")
        with pytest.raises(IpvrmError, match=r"was not found; tried .*base \(not there\).*reference="):
            RewardModel.from_pretrained(moved / "runs" / "rm", device="cpu")
        RewardModel.from_pretrained(moved / "runs" / "rm", tmp_path / "base_of_another_name", device="cpu")
    finally:
        (home / "hidden").rename(base)


def test_another_reference_is_refused(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    run = tmp_path / "home" / "runs" / "rm"
    with pytest.raises(IpvrmError, match="other weights or config"):
        RewardModel.from_pretrained(run, reference=run, device="cpu")


def test_another_template_is_refused(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    run = tmp_path / "home" / "runs" / "rm"
    template = run / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human") + " ")
    with pytest.raises(IpvrmError, match="chat template is not the one"):
        RewardModel.from_pretrained(run, device="cpu")


def test_folders_that_are_no_reward_model(home, tmp_path):
    with pytest.raises(IpvrmError, match=r"no ipvrm_config.json"):
        RewardModel.from_pretrained(home / "base")
    shutil.copytree(home / "runs" / "rm", tmp_path / "rm")
    path = tmp_path / "rm" / "ipvrm_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in stored.items() if k != "beta"}))
    with pytest.raises(IpvrmError, match="entries are missing: beta"):
        RewardModel.from_pretrained(tmp_path / "rm")
    path.write_text(json.dumps(stored | {"beta": -1}))
    with pytest.raises(IpvrmError, match="beta must be a positive number"):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_models_over_different_vocabularies_are_refused(reward_model):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = Qwen3ForCausalLM(Qwen3Config(vocab_size=77, num_key_value_heads=1, head_dim=8, **sizes))
    with pytest.raises(IpvrmError, match=r"share one vocabulary; they have \d+ and 77"):
        RewardModel(reward_model.model, other, reward_model.tokenizer, reward_model.info)


# -------------------------------------------------------------------------------------------------- servers


@pytest.fixture
def served(home, tokenizer):
    """The reward model and its reference behind two servers, and the flags that name them."""
    with FakeServer(home / "runs" / "rm", tokenizer) as own, FakeServer(home / "base", tokenizer) as base:
        yield own, base, ["--engine", own.url, "--reference_engine", base.url]


def test_two_servers_give_the_log_ratios_of_the_models_in_memory(home, served, reward_model):
    own, base, _ = served
    servers = RewardModel.from_pretrained(home / "runs" / "rm", servers=(own.url, base.url))
    items = [(PROBLEM, STEPS), ("What is 9?", STEPS[:1])]
    for got, want in zip(servers.score_many(items), reward_model.score_many(items), strict=True):
        torch.testing.assert_close(got.td, want.td, rtol=0, atol=1e-5)
        assert torch.equal(got.step_ends, want.step_ends) and want.td.abs().max() > 1e-3
    assert {body["prompt_logprobs"] for _, body in own.asked if body} == {0}
    assert servers.max_positions == own.max_model_len - 1  # the server makes one token behind the sequence
    with pytest.raises(IpvrmError, match="cannot be saved; copy its folder"):
        servers.save_pretrained(home / "copy")


def test_servers_in_the_wrong_order_or_at_another_temperature_are_refused(home, served, reward_model):
    own, base, _ = served
    with pytest.raises(IpvrmError, match=r"serves .*base, not .*rm"):
        RewardModel.from_pretrained(home / "runs" / "rm", servers=(base.url, own.url))
    info = replace(reward_model.info, temperature=0.7)
    one = Server(own.url, home / "runs" / "rm")
    with pytest.raises(IpvrmError, match="at temperature 1, and this reward model was trained at 0.7"):
        RewardModel(one, one, reward_model.tokenizer, info)
    with pytest.raises(IpvrmError, match="must both be served, or neither"):
        RewardModel(one, reward_model.reference, reward_model.tokenizer, reward_model.info)


def test_score_command_with_servers_that_die(home, served, problems, tmp_path, capsys, monkeypatch):
    """A failed server is no bad row, not even under `skip`; the same command goes on."""
    monkeypatch.setattr("ipvrm.evaluate.score.CHUNK", 3)
    problems.write_text("\n".join(problems.read_text().splitlines()[:7]))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert score_command(home, problems, whole) == 0
    own, _, flags = served
    flags = ["score", "--model", home / "runs" / "rm", "--input", problems, "--output", output, *flags]
    flags = [*map(str, flags), "--on_bad_row", "skip"]
    own.fault = lambda path, body: 503 if len(own.asked) > 5 else None
    assert main(flags) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"ipvrm score: {own.url}/completions: HTTP 503: status 503 it is"
    )
    own.fault = None
    assert main(flags) == 0
    for got, want in zip(*(p.read_text().splitlines() for p in (output, whole)), strict=True):
        got, want = json.loads(got), json.loads(want)
        assert got["step_scores"] == pytest.approx(want["step_scores"], abs=1e-4)
        assert got["line"] == want["line"]
    assert main([*flags[:-4], "--on_bad_row", "skip"]) == 2
    assert "a server of both, or of neither" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- ipvrm score


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    records = [{"id": f"p{n}", "problem": f"What is {n}?", "steps": STEPS[: 1 + n % 3]} for n in range(70)]
    write_jsonl(path, records)
    return path


def score_command(home, source, output, *flags):
    arguments = ["--model", home / "runs" / "rm", "--input", source, "--output", output, "--use_cpu", *flags]
    return main(["score", *map(str, arguments)])


def test_score_command(home, problems, tmp_path, reward_model):
    output = tmp_path / "out" / "scores.jsonl"
    assert score_command(home, problems, output) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["line"], r["id"]) for r in records] == [(n + 1, f"p{n}") for n in range(70)]
    want = reward_model.score("What is 2?", STEPS)
    assert records[2]["step_scores"] == pytest.approx(want.step_scores.tolist(), rel=1e-4, abs=1e-5)
    assert records[2]["first_error"] == want.first_error
    assert sorted(p.name for p in output.parent.iterdir()) == ["scores.jsonl", "scores.jsonl.summary.json"]
    summary = json.loads((output.parent / "scores.jsonl.summary.json").read_text())
    assert (summary["scored"], summary["bad"]) == (70, 0)
    assert summary["reward_model"]["reference_hash"] == reward_model.info.reference_hash
    assert "td" not in records[2]
    assert score_command(home, problems, tmp_path / "t.jsonl", "--per_token", "--min_prob", "0.02") == 0
    record = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[2])
    assert record["td"] == pytest.approx(want.td.tolist(), rel=1e-3, abs=1e-5)
    assert record["tokens"] == list(want.tokens) and record["steps"] == want.steps_of_token.tolist()
    assert len(record["candidates"]) == len(record["td"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--threshold", "2"], "--threshold must lie in"),
        (["--step_format", "{step"], "is not a format string"),
        (["--step_format", "Step {i}"], "step_format must contain {step}"),
        (["--min_prob", "0.1"], "--min_prob needs --per_token"),
    ],
)
def test_score_command_refuses_settings_before_it_starts(home, problems, tmp_path, capsys, flags, reason):
    output = tmp_path / "scores.jsonl"
    assert score_command(home, problems, output, "--on_bad_row", "skip", *flags) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*scores*"))


def test_score_command_reads_a_line_separator_inside_a_text(home, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"problem": "a\u2028b", "steps": ["c\x85d"]}\n', encoding="utf-8")
    assert score_command(home, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_score_command_names_bad_lines(home, problems, tmp_path, capsys):
    lines = problems.read_text().splitlines()
    lines[1:1] = ['{"problem": "p"', '{"problem": "p", "steps": []}', '{"steps": ["a"]}', '["a"]']
    problems.write_text("\n".join(lines))
    output = tmp_path / "scores.jsonl"
    assert score_command(home, problems, output) == 2
    error = capsys.readouterr().err
    for line, reason in (
        (2, "not valid JSON: "),
        (3, "`steps` must be"),
        (4, "`problem` must be"),
        (5, "must be an object"),
    ):
        assert f"{problems}:{line}: {reason}" in error
    assert "Traceback" not in error and not output.exists()
    assert score_command(home, problems, output, "--on_bad_row", "skip") == 0
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, *range(6, 75)]
    assert f"skipped {problems}:3:" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["memory", "server"])
def test_score_command_names_the_line_of_an_infinite_log_ratio(
    home, problems, tmp_path, capsys, monkeypatch, reward_model, served, by
):
    """It was a traceback of the writer, without a line."""
    lines = problems.read_text().splitlines()[:3]
    lines[1] = json.dumps({"problem": PROBLEM, "steps": ["carry 0.", "Answer: 9"]})
    problems.write_text("\n".join(lines))
    token, flags = one_token(reward_model, "9"), []
    if by == "memory":
        ruled_out(monkeypatch, token)
    else:
        own, _, flags = served

        def clamped(choice):
            of_prompt = zip(choice["prompt_token_ids"], choice["prompt_logprobs"], strict=True)
            return [{str(i): {"logprob": -9999.0}} if i == token and at else at for i, at in of_prompt]

        own.fault = lambda path, body: lambda choice: choice | {"prompt_logprobs": clamped(choice)}
    output = tmp_path / "scores.jsonl"
    command = ["score", "--model", home / "runs" / "rm", "--input", problems, "--output", output, *flags]
    command = [*map(str, command), *(["--use_cpu"] if by == "memory" else [])]
    reason = f"{problems}:2: the log-probability under the model of response token"
    assert main(command) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error and not output.exists()
    assert main([*command, "--on_bad_row", "skip"]) == 0
    assert f"skipped {reason}" in capsys.readouterr().err
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 3]


def test_score_command_goes_on_where_it_stopped(home, problems, tmp_path, monkeypatch):
    import ipvrm.evaluate.score as score

    whole, output = tmp_path / "whole.jsonl", tmp_path / "scores.jsonl"
    assert score_command(home, problems, whole) == 0
    counted = []
    real = score._score

    def dies_in_the_second_chunk(config, reward_model, chunk):
        counted.append(len(chunk))
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(config, reward_model, chunk)

    monkeypatch.setattr(score, "_score", dies_in_the_second_chunk)
    assert score_command(home, problems, output) == 130
    partial = tmp_path / ".scores.jsonl.partial" / "scores.jsonl"
    with open(partial, "a") as file:
        file.write('{"line": 8, "torn')
    assert not output.exists()
    assert score_command(home, problems, output) == 0
    assert counted == [7, 7] + [7] * 9  # of 70, 7 were there
    assert output.read_text() == whole.read_text()


def test_score_command_refuses_to_go_on_otherwise(home, problems, tmp_path, monkeypatch):
    import ipvrm.evaluate.score as score

    shutil.copytree(home / "runs" / "rm", tmp_path / "rm")
    reference = str(home / "base")
    config = score.ScoreConfig(
        str(tmp_path / "rm"), str(problems), str(tmp_path / "out.jsonl"), reference, use_cpu=True
    )

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "_score", dies)
        with pytest.raises(KeyboardInterrupt):
            score.score_file(config, progress=False)
    with pytest.raises(IpvrmError, match=r"threshold \(0.5 then, 0.25 now\)"):
        score.score_file(replace(config, threshold=0.25), progress=False)
    weights = (tmp_path / "rm" / "model.safetensors").read_bytes()
    shutil.copy(home / "base" / "model.safetensors", tmp_path / "rm" / "model.safetensors")
    with pytest.raises(IpvrmError, match="not those that ipvrm_config.json was written for"):
        score.score_file(config, progress=False)
    info = read_info(tmp_path / "rm")
    write_info(tmp_path / "rm", info)
    with pytest.raises(IpvrmError, match="changed: the reward model"):
        score.score_file(config, progress=False)
    (tmp_path / "rm" / "model.safetensors").write_bytes(weights)
    write_info(tmp_path / "rm", info)
    assert score.score_file(replace(config, batch_tokens=512), progress=False) == 70
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_on_real_rows(data_dir, tmp_path, tiny_folder):
    """The real path on 32 rows: train-rm on rollouts, then ProcessBench; near chance, every file there."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(data_dir / "rm" / "qwen3_0.6b_pointwise.parquet")
    pyarrow.parquet.write_table(rows.slice(0, 32), tmp_path / "rows.parquet")
    items = json.loads((data_dir / "processbench" / "gsm8k.json").read_text())[:32]
    (tmp_path / "gsm8k.json").write_text(json.dumps(items))
    train = [
        "--model",
        tiny_folder,
        "--train_data",
        tmp_path / "rows.parquet",
        "--output_dir",
        tmp_path / "rm",
    ]
    train += [
        "--max_length",
        900,
        "--on_long",
        "truncate",
        "--global_batch_size",
        16,
        "--learning_rate",
        1e-3,
    ]
    assert main(["train-rm", *map(str, train), "--use_cpu"]) == 0
    counts = json.loads((tmp_path / "rm" / "results.json").read_text())["data"]
    assert counts["rows"] == counts["used"] == 32
    evaluate = [
        "--model",
        tmp_path / "rm",
        "--data",
        tmp_path / "gsm8k.json",
        "--output_dir",
        tmp_path / "eval",
    ]
    assert main(["eval", "processbench", *map(str, evaluate)]) == 0
    assert "gsm8k" in json.loads((tmp_path / "eval" / "results.json").read_text())["subsets"]
    assert Path(tmp_path / "eval" / "items-gsm8k.parquet").is_file()
