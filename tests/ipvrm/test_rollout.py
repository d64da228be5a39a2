"""Sampling: batched equals single, seeds, truncation, what a killed run leaves, bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import interrupted_at, write_jsonl

from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.data.chat import encode_prompt
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row, read_prompts
from ipvrm.models.causal_lm import load_model
from ipvrm.rollouts.engine import (
    Sampling,
    TransformersEngine,
    _Draw,
    response_seed,
    stop_ids,
)
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.run_folder import summary_path

FLAGS = ("model", "input", "output", "num_generations", "max_new_tokens", "per_device_eval_batch_size")
PROMPTS = [
    "What is 1 + 2?",
    "What is 73 + 19?",
    "x",
    "Add the numbers 5, 6, 7 and 8, and say what comes out.",
]


@pytest.fixture(scope="module")
def model(tiny_folder):
    """Weights ten times as large as a fresh model's: what it says then depends on its prompt."""
    model = load_model(tiny_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": text, "answer": number, "data_source": "sums"}) + "\n"
            for number, text in enumerate(PROMPTS)
        )
    )
    return path


def config(tiny_folder, prompts_file, tmp_path, **settings):
    defaults = {"num_generations": 3, "max_new_tokens": 12, "use_cpu": True}
    return RolloutConfig(
        str(tiny_folder), str(prompts_file), str(tmp_path / "out.parquet"), **(defaults | settings)
    )


def read(path):
    return pq.read_table(path).to_pylist()


# --------------------------------------------------------------------------------------------------- engine


def by_hand(model, prompt, stops, count):
    """Greedy decoding without cache, padding or `generate`."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


@pytest.mark.slow
def test_batched_greedy_decoding_is_single_greedy_decoding(model, encoded, stops):
    """Left padding, positions and cache: prompts of 8 to 60 tokens side by side, against no padding."""
    greedy = Sampling(20, temperature=0)
    alone = [by_hand(model, prompt, stops, 20) for prompt in encoded]
    assert len({len(prompt) for prompt in encoded}) == 4
    assert len(set(map(tuple, alone))) == 4  # so a row taken for another one would show
    for size in (1, 3, 64):
        assert TransformersEngine(model, stops, size)(encoded, greedy, [0] * 4) == alone


def test_a_padding_that_is_not_masked_would_be_found(model, encoded, stops, monkeypatch):
    """A seeded fault: the same comparison without the attention mask."""
    alone = [by_hand(model, prompt, stops, 20) for prompt in encoded]
    original = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda ids, attention_mask, **rest: original(
            ids, attention_mask=torch.ones_like(attention_mask), **rest
        ),
    )
    assert TransformersEngine(model, stops)(encoded, Sampling(20, temperature=0), [0] * 4) != alone


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, 0.7, 0.9), Sampling(16, 1.3, 1.0, 5)])
def test_a_response_depends_on_its_seed_alone(model, encoded, stops, sampling):
    """Not on the batch size, nor on the order, nor on what else is sampled, nor on the global generator."""
    engine = TransformersEngine(model, stops, 64)
    pairs = [(prompt, response_seed(1, row, k)) for row, prompt in enumerate(encoded) for k in range(3)]
    prompts, seeds = map(list, zip(*pairs, strict=True))
    responses = engine(prompts, sampling, seeds)
    assert len(set(map(tuple, responses))) == 12
    torch.manual_seed(5)
    assert TransformersEngine(model, stops, 5)(prompts, sampling, seeds) == responses
    assert engine(prompts[::-1], sampling, seeds[::-1]) == responses[::-1]
    assert engine(prompts[4:5], sampling, seeds[4:5]) == responses[4:5]
    assert engine(prompts, sampling, [seed + 1 for seed in seeds]) != responses


def test_tokens_come_with_the_model_s_probabilities(model, tokenizer, stops):
    """First tokens of 4,000 samples against softmax(logits / T), after top-k: chi-squared."""
    prompt = encode_prompt("x", tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1] / 4.0
    expected = logits.topk(6)
    wanted = dict(zip(expected.indices.tolist(), expected.values.softmax(0).tolist(), strict=True))
    count = 4000
    engine = TransformersEngine(model, stops, count)
    seeds = [response_seed(0, 0, k) for k in range(count)]
    found = Counter(ids[0] for ids in engine([prompt] * count, Sampling(1, 4.0, 1.0, 6), seeds))
    assert set(found) <= set(wanted) and min(wanted.values()) > 0.01
    squares = sum((found[i] - count * p) ** 2 / (count * p) for i, p in wanted.items())
    assert squares < 20.5  # 5 degrees of freedom, p = 0.001; the seeds are fixed


def test_top_p_leaves_the_nucleus(model, tokenizer, stops):
    prompt = encode_prompt("x", tokenizer)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(0)
    ordered = probabilities.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.6).sum()) + 1].tolist())
    seeds = [response_seed(0, 0, k) for k in range(500)]
    found = TransformersEngine(model, stops, 500)([prompt] * 500, Sampling(1, 1.0, 0.6), seeds)
    assert {ids[0] for ids in found} == nucleus and 1 < len(nucleus) < 100


def test_a_token_of_probability_zero_is_never_drawn():
    """At both ends of the range of the numbers, with masked tokens at both ends of the vocabulary."""
    draw = _Draw([1, 2], 1, 3, torch.device("cpu"))
    scores = torch.full((2, 1000), -torch.inf)
    scores[:, 400:600] = torch.randn(2, 200)
    for number in (0.0, 2.0**-24, 1 - 2.0**-24):
        draw.numbers.fill_(number)
        picked = draw(torch.zeros(2, 3, dtype=torch.long), scores).argmax(-1)
        assert ((picked >= 400) & (picked < 600)).all(), number
    assert bool(draw.finite)


def test_nan_logits_are_an_error(tiny_folder, encoded, stops):
    broken = load_model(tiny_folder)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(IpvrmError, match="not numbers"):
        TransformersEngine(broken, stops)(encoded, Sampling(4), [1, 2, 3, 4])


def test_the_model_s_own_generation_config_does_not_leak_in(model, encoded, stops):
    """A repetition penalty in it would make the samples off-policy; it and the mode are as before after."""
    from transformers import GenerationConfig

    engine, sampling = TransformersEngine(model, stops), Sampling(16)
    plain = engine(encoded, sampling, [1, 2, 3, 4])
    stored, model.generation_config = model.generation_config, GenerationConfig(repetition_penalty=9.0)
    model.generation_config.top_k = 1
    model.train()
    try:
        assert engine(encoded, sampling, [1, 2, 3, 4]) == plain
        assert model.generation_config.repetition_penalty == 9.0 and model.training
    finally:
        model.generation_config = stored
        model.eval()


def test_responses_end_with_the_first_stop_token(model, encoded, stops):
    whole = TransformersEngine(model, stops)(encoded, Sampling(12), [1, 2, 3, 4])
    extra = whole[0][3]
    cut = TransformersEngine(model, {*stops, extra}, 64)(encoded, Sampling(12), [1, 2, 3, 4])
    for before, after in zip(whole, cut, strict=True):
        end = before.index(extra) + 1 if extra in before else len(before)
        assert after == before[:end]
    assert len(cut[0]) <= 4 and cut[0][-1] == extra


def test_stop_tokens_are_those_of_template_tokenizer_and_generation_config(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(model, tokenizer) == {end}
    stored, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [end, 0]
    try:
        assert stop_ids(model, tokenizer) == {end, 0}
    finally:
        model.generation_config.eos_token_id = stored


def test_lora_takes_part_and_the_peft_model_stays_as_it_was(tiny_folder, encoded, stops):
    peft = pytest.importorskip("peft")
    base = load_model(tiny_folder)
    plain = TransformersEngine(base, stops)(encoded, Sampling(8), [1, 2, 3, 4])
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    engine = TransformersEngine(wrapped, stops)
    assert engine(encoded, Sampling(8), [1, 2, 3, 4]) == plain  # B starts at 0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=3.0)
    assert engine(encoded, Sampling(8), [1, 2, 3, 4]) != plain
    assert wrapped.generation_config.eos_token_id == base.generation_config.eos_token_id is not None


def test_prompt_tokens_are_those_a_reward_model_is_trained_on(tokenizer):
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"})
    for prompt in ("What is 1 + 1?", messages):
        trained_on = tokenize([Row("f:1", prompt, "3")], tokenizer, max_length=None).responses[0]
        assert encode_prompt(prompt, tokenizer) == list(trained_on.input_ids[: trained_on.prompt_length])


def test_prompts_without_a_chat_template(tiny_folder):
    from ipvrm.models.causal_lm import load_tokenizer

    plain = load_tokenizer(tiny_folder)
    plain.chat_template = None
    assert plain.decode(encode_prompt("1 + 1 =", plain)) == "1 + 1 ="
    plain.add_bos_token = True
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template"):
        encode_prompt([{"role": "user", "content": "a"}], plain)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be finite and not negative; got -1"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature must be finite"),
        ({"max_new_tokens": 1, "top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0"),
        ({"max_new_tokens": 1, "top_k": -2}, r"top_k must not be negative \(0: no limit\); got -2"),
    ],
)
def test_settings_out_of_range(settings, reason):
    with pytest.raises(IpvrmError, match=reason):
        Sampling(**settings)


def test_what_the_engine_refuses(model, stops):
    with pytest.raises(IpvrmError, match="at least one token, and a seed"):
        TransformersEngine(model, stops)([[1], []], Sampling(1), [1, 2])
    with pytest.raises(IpvrmError, match="at least one token, and a seed"):
        TransformersEngine(model, stops)([[1]], Sampling(1), [1, 2])
    with pytest.raises(IpvrmError, match="batch_size must be at least 1; got 0"):
        TransformersEngine(model, stops, 0)
    assert TransformersEngine(model, stops)([], Sampling(1), []) == []


# -------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_rows_carry_what_they_came_with(tiny_folder, prompts_file, tmp_path, tokenizer):
    settings = config(tiny_folder, prompts_file, tmp_path, max_new_tokens=200, temperature=1.0)
    summary = roll_out(settings, progress=False)
    rows = read(settings.output)
    assert [(row["row"], row["sample"]) for row in rows] == [(r, k) for r in (1, 2, 3, 4) for k in range(3)]
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": PROMPTS[row["row"] - 1]}]
        assert (row["answer"], row["data_source"]) == (str(row["row"] - 1), "sums")
        assert row["prompt_tokens"] == len(encode_prompt(row["prompt"], tokenizer))
        assert row["truncated"] == (row["response_tokens"] == 200)
        assert "<|im_end|>" not in row["response"]
    truncated = sum(row["truncated"] for row in rows)
    assert 0 < truncated < 12, "the test needs responses of both kinds"
    assert (summary["truncated"], summary["responses"], summary["prompts"]) == (truncated, 12, 4)
    assert summary["response_tokens"] == sum(row["response_tokens"] for row in rows)
    assert json.loads(summary_path(settings.output).read_text()) == summary
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.jsonl",
        "out.parquet",
        "out.parquet.summary.json",
    }


def changed(settings, **changes):
    return dataclasses.replace(settings, **changes)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_rows(tiny_folder, prompts_file, tmp_path):
    """In batches of any size, in either format, for the first rows alone; another seed gives others."""
    settings = config(tiny_folder, prompts_file, tmp_path)
    roll_out(settings, progress=False)
    first = read(settings.output)
    single = changed(settings, output=str(tmp_path / "b.jsonl"), per_device_eval_batch_size=1)
    roll_out(single, progress=False)
    assert [json.loads(line) for line in Path(single.output).read_text().splitlines()] == first
    limited = changed(settings, output=str(tmp_path / "c.parquet"), limit=2)
    roll_out(limited, progress=False)
    assert read(limited.output) == first[:6]
    other = changed(settings, output=str(tmp_path / "d.parquet"), seed=1)
    roll_out(other, progress=False)
    assert [row["response"] for row in read(other.output)] != [row["response"] for row in first]


def test_bf16(tiny_folder, prompts_file, tmp_path):
    settings = config(tiny_folder, prompts_file, tmp_path, bf16=True)
    assert roll_out(settings, progress=False)["responses"] == 12
    again = changed(settings, output=str(tmp_path / "b.parquet"))
    roll_out(again, progress=False)
    assert read(again.output) == read(settings.output)


def test_finished_work_is_not_done_again(tiny_folder, prompts_file, tmp_path, monkeypatch):
    settings = config(tiny_folder, prompts_file, tmp_path)
    summary = roll_out(settings, progress=False)
    before = Path(settings.output).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "__call__", None)
        assert roll_out(settings, progress=False) == summary
    assert Path(settings.output).read_bytes() == before
    prompts_file.write_text(prompts_file.read_text().replace("73", "74"))
    assert roll_out(settings, progress=False)["key"] != summary["key"]
    assert "74 + 19" in read(settings.output)[3]["prompt"][0]["content"]


@pytest.mark.full
def test_killed_run_goes_on_to_the_same_file(tiny_folder, prompts_file, tmp_path):
    """SIGKILL after the second batch; the rest is not generated twice; bytes equal an uninterrupted run's."""
    settings = config(
        tiny_folder,
        prompts_file,
        tmp_path,
        num_generations=6,
        max_new_tokens=150,
        per_device_eval_batch_size=2,
    )
    command = [sys.executable, "-m", "ipvrm", "rollout", "--use_cpu", *arguments_of(settings)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    shards = []
    while len(shards) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
        shards = list(tmp_path.glob(".out.parquet.partial/[0-9]*.json"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(settings.output).exists()
    folder = shards[0].parent
    (folder / ".00000009.json.1.tmp").write_text("{torn")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.json")}
    assert len(kept) < 12

    calls = []
    original = TransformersEngine.__call__

    def counting(self, prompts, sampling, seeds):
        calls.append(len(prompts))
        return original(self, prompts, sampling, seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "__call__", counting)
        roll_out(settings, progress=False)
    assert sum(calls) == 24 - 2 * len(kept)
    assert not folder.exists()
    whole = changed(settings, output=str(tmp_path / "whole.parquet"))
    roll_out(whole, progress=False)
    assert Path(settings.output).read_bytes() == Path(whole.output).read_bytes()


def test_ctrl_c_says_what_is_kept(tiny_folder, prompts_file, tmp_path, monkeypatch, capsys):
    settings = config(tiny_folder, prompts_file, tmp_path, per_device_eval_batch_size=5)
    original, calls = TransformersEngine.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "__call__", interrupted)
        assert main(["rollout", "--use_cpu", *arguments_of(settings)]) == 130
    assert "5 of 12 responses are kept; the same command goes on" in capsys.readouterr().err
    assert main(["rollout", "--use_cpu", *arguments_of(settings)]) == 0
    captured = capsys.readouterr()
    assert "going on behind 5 of 12 responses" in captured.err
    assert "12 responses to 4 prompts" in captured.out


@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_half_written_shard_heals(tiny_folder, prompts_file, tmp_path, monkeypatch, capsys, damage):
    settings = config(
        tiny_folder, prompts_file, tmp_path, num_generations=2, max_new_tokens=4, per_device_eval_batch_size=2
    )
    whole = changed(settings, output=str(tmp_path / "whole.parquet"))
    roll_out(whole, progress=False)
    calls = interrupted_at(monkeypatch, TransformersEngine, "__call__", 4)
    with pytest.raises(KeyboardInterrupt):
        roll_out(settings, progress=False)
    path = tmp_path / ".out.parquet.partial" / "00000001.json"
    text = path.read_text()
    path.write_text({"half": text[: len(text) // 2], "empty": "", "other": "[]"}[damage])
    calls.clear()
    roll_out(settings)
    assert sum(calls) == 8 - 4  # of three shards one is made again, and the fourth is made
    notes = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert len(notes) == 1 and notes[0].startswith(str(path))
    assert Path(settings.output).read_bytes() == Path(whole.output).read_bytes()


def arguments_of(settings):
    return [part for name in FLAGS for part in (f"--{name}", str(getattr(settings, name)))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_generations": 0}, "num_generations must be at least 1; got 0"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"seed": -1}, "seed must not be negative; got -1"),
        ({"temperature": 0.0}, "num_generations must be 1, got 3"),
        ({"output": "x.csv"}, "--output x.csv: must end in .parquet or .jsonl"),
        ({"input": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"model": "/absent"}, "/absent: not a model folder"),
        (
            {"max_new_tokens": 8190},
            r"prompts.jsonl:1: its \d+ tokens and 8190 new ones \(--max_new_tokens\) are more than .* 8192",
        ),
    ],
)
def test_settings_that_cannot_be(tiny_folder, prompts_file, tmp_path, changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        roll_out(changed(config(tiny_folder, prompts_file, tmp_path), **changes), progress=False)


# --------------------------------------------------------------------------------------------------- prompts

USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object with named columns; got list"),
        ('{"question": "a"}', "needs `prompt`; the columns are question"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": []}', "prompt must be a list of messages"),
        ('{"prompt": [{"role": "user"}]}', r"prompt\[0\] must have text `role` and `content`"),
        (
            json.dumps({"prompt": [*USER, {"role": "assistant", "content": "b"}]}),
            "ends with an assistant's message",
        ),
        ('{"prompt": "a", "answer": [1]}', "ground truth must be a text or a number"),
        ('{"prompt": "a", "data_source": 1}', "data_source must be a text; got 1"),
    ],
)
def test_bad_prompts_are_listed_or_skipped(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{line}\n{{"prompt": "What is 1 + 1?"}}\n')
    with pytest.raises(IpvrmError, match=r"1 of 2 rows are bad(.|\n)*prompts.jsonl:1: .*" + reason):
        read_prompts(path)
    prompts, bad = read_prompts(path, "skip")
    assert [prompt.row for prompt in prompts] == [2] and [row.row for row in bad] == [1]
    path.write_text(line)
    with pytest.raises(IpvrmError, match="no usable row"):
        read_prompts(path, "skip")


def test_where_the_ground_truth_may_stand(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "a", "answer": 42, "reward_model": {"ground_truth": "1"}},
        {"prompt": USER, "reward_model": {"ground_truth": " 1.5 "}, "data_source": "s"},
        {"prompt": "a", "answer": "", "reward_model": None},
        {"prompt": "a"},
    ]
    write_jsonl(path, rows)
    prompts, _ = read_prompts(path)
    assert [prompt.answer for prompt in prompts] == ["42", "1.5", None, None]
    assert prompts[1].prompt == tuple(USER) and prompts[1].data_source == "s"
    assert [prompt.row for prompt in read_prompts(path, limit=2)[0]] == [1, 2]


def test_parquet_of_prompts(tmp_path, data_dir):
    prompts, bad = read_prompts(data_dir / "policy_eval.parquet")
    assert len(prompts) == 1620 and not bad and all(prompt.answer for prompt in prompts)
    assert Counter(prompt.data_source for prompt in prompts)["math-500"] == 500
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"question": ["a"]}), path)
    with pytest.raises(IpvrmError, match="needs a column `prompt`; its columns are question"):
        read_prompts(path)


def test_what_the_writer_cannot_take_shows_before_the_work(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ipvrm.rollouts.rollout._engine", lambda *a: pytest.fail("a model was loaded"))
    messages = [{"role": "user", "content": "q", "extra": extra} for extra in (1, "a")]
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": [message]} for message in messages])
    settings = config(tiny_folder, tmp_path / "in.jsonl", tmp_path)
    with pytest.raises(IpvrmError, match=r"a column has values of several types.*write .jsonl"):
        roll_out(settings, progress=False)


def test_skipped_rows_keep_the_others_responses(tiny_folder, prompts_file, tmp_path):
    """The seed goes with the row's number in the file, not with its rank among the usable ones."""
    settings = config(tiny_folder, prompts_file, tmp_path)
    roll_out(settings, progress=False)
    lines = prompts_file.read_text().splitlines()
    prompts_file.write_text("\n".join(["{", *lines[1:]]))
    skipping = changed(settings, output=str(tmp_path / "b.parquet"), on_bad_row="skip")
    summary = roll_out(skipping, progress=False)
    assert read(skipping.output) == read(settings.output)[3:]
    assert (summary["prompts_in"], summary["bad"], summary["prompts"]) == (4, 1, 3)
