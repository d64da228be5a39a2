"""Nothing of a row is lost on the way to its tokens, and they are the sampled ones: templates that drop,
think, strip and call tools; the real tokenizers where they are at hand."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.data.chat import (
    Chat,
    encode_prompt,
    parse_template_kwargs,
    preset_template_kwargs,
    reads,
    tokenizer_hash,
)
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row, Sampled, read_prompts, read_rows
from ipvrm.data.steps import STEP_FORMAT
from ipvrm.evaluate import bon
from ipvrm.evaluate.bon import BonConfig
from ipvrm.models.causal_lm import template_hash, vocab_size
from ipvrm.models.reward_model import RewardModel, RewardModelInfo, reference_entries, write_info
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.run_folder import versions
from ipvrm.training.optimizer import data_parallel_accelerator
from ipvrm.training.policy_config import PolicyConfig, resolve
from ipvrm.training.reward_config import RewardConfig
from ipvrm.training.run import Run, with_template_kwargs
from ipvrm.training.train_policy import _Inputs
from ipvrm.training.train_rm import train_reward_model

# The traits of Qwen3's template: calls and tools are written, thinking only in the last answer, roles known.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role in ('user', 'system', 'assistant') %}<|im_start|>{{ m.role }}
{% if loop.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') if not loop.last else m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
GOOD = {"prompt": "a", "response": "b", "label": 1}
USER = {"role": "user", "content": "Add 17 and 25."}
ANSWER = {"role": "assistant", "content": "42"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "gauge", "arguments": {"station": "Koro"}}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "3.2 m", "tool_call_id": "c1"}


@pytest.fixture
def chat(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return Chat(other)


def rows_of(tmp_path, *records, suffix=".jsonl"):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        write_jsonl(path, records)
    return read_rows(path, "skip")


# Two conversations that differ in one thing alone: other tokens, or a bad row with the reason.
OTHER_CALL, OTHER_NAME = (
    json.loads(json.dumps(CALL).replace(*pair)) for pair in (("Koro", "Oka"), ("gauge", "level"))
)


def thinking(text, **answer):
    return {"role": "assistant", "content": "42", "reasoning_content": text} | answer


def written_as(role, text):
    return [{"role": role, "content": text}, USER, ANSWER]


PAIRS = {
    "a call's arguments": ([USER, CALL, RESULT, ANSWER], [USER, OTHER_CALL, RESULT, ANSWER]),
    "a call's name": ([USER, CALL, RESULT, ANSWER], [USER, OTHER_NAME, RESULT, ANSWER]),
    "a call in the answer": ([USER, CALL], [USER, OTHER_CALL]),
    "reasoning of the answer": ([USER, thinking("17 + 25")], [USER, thinking("25 + 17")]),
    "thoughts of an earlier answer": (
        [USER, thinking("a"), USER, ANSWER],
        [USER, thinking("b"), USER, ANSWER],
    ),
    "thoughts within an earlier answer": (
        [USER, ANSWER | {"content": "<think>a</think>42"}, USER, ANSWER],
        [USER, ANSWER | {"content": "<think>b</think>42"}, USER, ANSWER],
    ),
    "a developer message": (written_as("developer", "One number."), written_as("developer", "At length.")),
    "a role in another case": (written_as("System", "One number."), written_as("System", "At length.")),
    "a text that the next message holds": (written_as("critic", "17"), written_as("critic", "25")),
    "a text that the markup holds": (written_as("critic", "user"), written_as("critic", "start")),
    "a speaker's name": ([USER | {"name": "Ada"}, ANSWER], [USER | {"name": "Bob"}, ANSWER]),
    "a key that nobody knows": ([USER | {"mood": "kind"}, ANSWER], [USER | {"mood": "harsh"}, ANSWER]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("what", PAIRS)
def test_no_part_of_a_message_is_lost_in_silence(chat, tmp_path, what, suffix):
    rows, bad = rows_of(tmp_path, *({"conversation": c, "label": 1} for c in PAIRS[what]), suffix=suffix)
    found = tokenize(rows, chat, max_length=None, on_bad_row="skip")
    refused = [*bad, *found.bad]
    if refused:
        assert len(refused) == 2 and all("does not write" in b.reason for b in refused), refused
    else:
        first, second = found.responses
        assert first.input_ids != second.input_ids
    written = ("call", "reasoning of the answer")
    assert bool(refused) != any(word in what for word in written), [b.reason for b in refused]


@pytest.mark.parametrize(
    "column", [{"system": "One number."}, {"tools": [{"type": "function", "function": {"name": "gauge"}}]}]
)
@pytest.mark.parametrize(
    "record", [{"conversation": [USER, ANSWER]}, {"prompt": USER["content"], "response": "42"}]
)
def test_columns_beside_the_messages_reach_the_template(chat, tmp_path, column, record):
    rows, bad = rows_of(tmp_path, record | column | {"label": 1}, record | {"label": 1})
    given, plain = tokenize(rows, chat, max_length=None).responses
    text = chat.tokenizer.decode(given.input_ids)
    assert not bad and given.input_ids != plain.input_ids and ("One number." in text or "gauge" in text)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": USER["content"]} | column))
    assert encode_prompt(read_prompts(path)[0][0], chat.tokenizer) == list(
        given.input_ids[: given.prompt_length]
    )


CONTENT = USER["content"]
MORE_TO_READ = {
    "functions": [{"name": "gauge"}],
    "documents": [{"title": "a", "text": "b"}],
    "system_prompt": "One number.",
    "history": [["a", "b"]],
    "reasoning_content": "17 + 25",
    "thinking": "17 + 25",
    "tool_calls": CALL["tool_calls"],
    "chat_template_kwargs": {"enable_thinking": False},
    "images": ["a.png"],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", MORE_TO_READ)
@pytest.mark.parametrize(
    "record", [{"conversation": [USER, ANSWER]}, {"prompt": CONTENT, "response": "42"}], ids=["chat", "text"]
)
def test_a_column_that_the_model_should_see_is_never_left_out_in_silence(tmp_path, record, column, suffix):
    """One row has something in it, one nothing, one not even the column."""
    value = MORE_TO_READ[column]
    empty = value and type(value)()
    records = [
        record | {"label": 1, column: value},
        record | {"label": 1, column: empty},
        record | {"label": 1},
    ]
    rows, bad = rows_of(tmp_path, *records, suffix=suffix)
    assert [row.source.rpartition(":")[2] for row in rows] == ["2", "3"]
    assert [b.row for b in bad] == [1] and f"`{column}` is not read" in bad[0].reason
    if "prompt" in record:
        prompts, bad = read_prompts(tmp_path / f"rows{suffix}", "skip")
        assert [prompt.row for prompt in prompts] == [2, 3] and [b.row for b in bad] == [1]


@pytest.mark.parametrize(
    ("beside", "what"),
    [
        ({"prompt": "Add 1 and 2."}, "prompt"),
        ({"prompt": [USER, ANSWER, USER]}, "prompt"),
        ({"response": "43"}, "response"),
        ({"prompt": CONTENT, "response": "42 "}, "response"),
        ({"prompt": CONTENT, "response": "42"}, None),
        ({"prompt": [USER]}, None),
    ],
)
def test_a_conversation_and_a_prompt_that_differ(tmp_path, beside, what):
    rows, bad = rows_of(tmp_path, {"conversation": [USER, ANSWER], "label": 1} | beside, GOOD)
    assert len(rows) == (1 if what else 2)
    assert [b.reason for b in bad] == (
        [f"`{what}` and `conversation` differ; leave one of them out"] if what else []
    )


def test_two_system_messages_are_refused(tmp_path):
    conversation = [{"role": "system", "content": "a"}, USER, ANSWER]
    _, bad = rows_of(tmp_path, {"conversation": conversation, "system": "b", "label": 1}, GOOD)
    assert "`system` column and a system message" in bad[0].reason


def test_a_structured_answer_continues_the_prompt_or_is_refused(chat, tmp_path):
    conversation = [USER, thinking("17 + 25")]
    rows, _ = rows_of(tmp_path, {"conversation": conversation, "label": 1})
    response = tokenize(rows, chat, max_length=None).responses[0]
    text = chat.tokenizer.decode(response.input_ids[response.prompt_length :])
    assert text == "<think>\n17 + 25\n</think>\n\n42<|im_end|>"
    closed = Chat(chat.tokenizer, {"enable_thinking": False})
    with pytest.raises(
        IpvrmError, match="writes the prompt differently when this answer follows.*chat_template_kwargs"
    ):
        tokenize(rows, closed, max_length=None)


def test_template_variables(chat):
    prompt = chat.tokenizer.decode(Chat(chat.tokenizer, {"enable_thinking": False}).prompt_ids("a"))
    assert prompt.endswith("<think>\n\n</think>\n\n") and prompt != chat.tokenizer.decode(
        chat.prompt_ids("a")
    )
    with pytest.raises(IpvrmError, match="does not read 'enable_thinkng'"):
        Chat(chat.tokenizer, {"enable_thinkng": False})
    assert parse_template_kwargs('{"a": [1]}') == {"a": [1]} and parse_template_kwargs(None) == {}
    for text in ("{", "[1]"):
        with pytest.raises(IpvrmError, match="--chat_template_kwargs"):
            parse_template_kwargs(text)


# ------------------------------------------------------------------------------------------- the sampled ids


def sampled_row(chat, text="Answer: 3", ended=True, ids=None, prompt_ids=None, digest=None):
    ids = chat.encode([text])["input_ids"][0] if ids is None else ids
    ids = [*ids, chat.end_of_turn] if ended else ids
    prompt_ids = chat.prompt_ids("What is 1 + 2?") if prompt_ids is None else prompt_ids
    stored = Sampled(tuple(prompt_ids), tuple(ids), digest or tokenizer_hash(chat.tokenizer))
    return Row("f:1", "What is 1 + 2?", text, 1, ended=ended, sampled=stored)


@pytest.mark.parametrize("ended", [True, False])
def test_stored_ids_are_used_to_the_last_one_and_counted_where_the_text_encodes_otherwise(chat, ended):
    text = "Answer: 3"
    letters = [chat.encode([c])["input_ids"][0] for c in text]
    ids = [i for parts in letters for i in parts]
    assert ids != chat.encode([text])["input_ids"][0]
    found = tokenize([sampled_row(chat, text, ended, ids)], chat, max_length=None, with_offsets=True)
    response = found.responses[0]
    assert list(response.input_ids[response.prompt_length :]) == ids + [chat.end_of_turn] * ended
    assert found.counts["other_tokens_than_sampled"] == 1
    assert response.offsets[: len(ids)] == tuple((i, i + 1) for i in range(len(text)))
    same = tokenize([sampled_row(chat, text, ended)], chat, max_length=None)
    assert same.counts["other_tokens_than_sampled"] == 0


def test_stored_ids_that_say_something_else_are_a_bad_row(chat):
    other = chat.encode(["Answer: 4"])["input_ids"][0]
    for row in (
        sampled_row(chat, ids=other),
        sampled_row(chat, prompt_ids=chat.prompt_ids("What is 7 + 2?")),
        sampled_row(chat, ids=[10**9]),
    ):
        with pytest.raises(
            IpvrmError, match="f:1: (response_ids|prompt_ids|ids) .*(another text|does not have)"
        ):
            tokenize([row], chat, max_length=None)


def test_a_stored_prompt_that_the_template_does_not_write_here_is_taken_and_counted(chat):
    """Sampled behind the empty think block of other variables, or on another day."""
    without = Chat(chat.tokenizer, {"enable_thinking": False})
    thinking, plain = sampled_row(without, prompt_ids=without.prompt_ids("What is 1 + 2?")), sampled_row(chat)
    for here, count in ((without, 1), (chat, 1)):
        found = tokenize([thinking, plain], here, max_length=None)
        assert found.counts["other_prompts_than_rendered"] == count
        for response, row in zip(found.responses, (thinking, plain), strict=True):
            assert response.input_ids == (*row.sampled.prompt_ids, *row.sampled.response_ids)
            assert response.prompt_length == len(row.sampled.prompt_ids)
    assert found.noted["other_prompts_than_rendered"] == [thinking.source]
    assert tokenize([plain], chat, max_length=None).counts["other_prompts_than_rendered"] == 0


@pytest.mark.parametrize("command", ["train-rm", "eval bon"])
def test_rollouts_of_other_template_variables_are_said(chat, thinker, tmp_path, capsys, command):
    ids = chat.encode(["Answer: 3"])["input_ids"][0]
    stored = {
        "prompt_ids": list(Chat(chat.tokenizer, {"enable_thinking": False}).prompt_ids("What is 1 + 2?")),
        "response_ids": [*ids, chat.end_of_turn],
        "tokenizer_hash": tokenizer_hash(chat.tokenizer),
    }
    rows = [{"prompt": "What is 1 + 2?", "response": "Answer: 3", "label": i % 2} | stored for i in range(4)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    flags = {
        "train-rm": ["train-rm", "--model", str(thinker), "--train_data", data],
        "eval bon": f"eval bon --model {thinker} --data {data} --objective endo_rm --n 2".split(),
    }[command]
    flags += ["--use_cpu"] + ["--max_steps", "1"] * (command == "train-rm")
    for given, said in (([], True), (["--chat_template_kwargs", WITHOUT_THINKING], False)):
        assert main([*flags, *given, "--output_dir", str(tmp_path / str(said))]) == 0
        shown = " ".join("".join(capsys.readouterr()).split())
        assert ("sampled behind another prompt than the chat template writes here" in shown) == said


NOBODYS = 999_999  # decodes to no text at all


@pytest.mark.parametrize("where", ["prompt_ids", "in the middle", "at the end", "at the end of a cut one"])
def test_a_stored_id_beyond_the_model_is_a_bad_row(chat, tiny_folder, where):
    ids = chat.encode(["Answer: 3"])["input_ids"][0]
    beyond = {
        "prompt_ids": {"prompt_ids": [*chat.prompt_ids("What is 1 + 2?"), NOBODYS]},
        "in the middle": {"ids": [*ids[:1], NOBODYS, *ids[1:]]},
        "at the end": {"ids": [*ids, NOBODYS]},
        "at the end of a cut one": {"ids": [*ids, NOBODYS], "ended": False},
    }[where]
    rows = [sampled_row(chat), sampled_row(chat, **beyond)]
    assert tokenize(rows, chat, max_length=None).counts["used"] == 2, "the texts are the same"
    rows_of_model = vocab_size(tiny_folder)
    found = tokenize(rows, chat, max_length=None, vocab_size=rows_of_model, on_bad_row="skip")
    assert found.counts["used"] == 1
    name = "prompt_ids" if where == "prompt_ids" else "response_ids"
    assert f"{name} hold {NOBODYS}, and the model has the ids below {rows_of_model}" in found.bad[0].reason
    exact = max(max(beyond.get("prompt_ids", [0])), max(beyond.get("ids", [0])))
    for size, used in ((exact + 1, 2), (exact, 1)):
        limited = tokenize(rows, chat, max_length=None, vocab_size=size, on_bad_row="skip")
        assert limited.counts["used"] == used


def test_ids_of_another_tokenizer_are_counted_and_the_text_is_encoded(chat):
    row = sampled_row(chat, ids=[1, 2, 3], digest="0" * 16)
    found = tokenize([row], chat, max_length=None)
    plain = tokenize([Row("f:1", row.prompt, row.response, 1)], chat, max_length=None)
    assert found.responses == plain.responses and found.counts["ids_of_another_tokenizer"] == 1


def test_incomplete_ids_are_a_bad_row(tmp_path):
    wrong = {"prompt_ids": [1], "response_ids": ["x"], "tokenizer_hash": "0"}
    _, bad = rows_of(tmp_path, GOOD, GOOD | {"prompt_ids": [1]}, GOOD | wrong)
    assert ["belong together" in bad[0].reason, "must be a list of token ids" in bad[1].reason] == [
        True,
        True,
    ]


# ---------------------------------------------------------------------------------- from rollout to score


WITHOUT_THINKING = '{"enable_thinking": false}'


def chain(folder, chat, tmp_path, thinking, max_new_tokens):
    """rollout -> label -> train-rm -> score on the model and the tokenizer of `folder`: all use the sampled
    ids to the last one, of ended responses and truncated ones. Returns how many texts score also judged."""
    prompts = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    rolled, labelled = tmp_path / "rolled.parquet", tmp_path / "labelled.parquet"
    roll_out(
        RolloutConfig(
            str(folder), str(tmp_path / "prompts.jsonl"), str(rolled), num_generations=8,
            max_new_tokens=max_new_tokens, chat_template_kwargs=thinking, use_cpu=True,
        ),
        progress=False,
    )  # fmt: skip
    raw = pyarrow.parquet.read_table(rolled).to_pylist()
    assert {row["truncated"] for row in raw} == {True, False}, "the test needs responses of both kinds"
    label_file(LabelConfig(str(rolled), str(labelled), verifier="string", keep_all=True), progress=False)
    rows, bad = read_rows(labelled)
    found = tokenize(rows, Chat(chat.tokenizer, parse_template_kwargs(thinking)), max_length=None)
    kept = [row for row in raw if row["response"].strip()]
    assert not bad and len(found.responses) == len(kept) > 20
    for row, response in zip(kept, found.responses, strict=True):
        assert response.input_ids == (*row["prompt_ids"], *row["response_ids"])
        assert response.prompt_length == len(row["prompt_ids"])
        assert (response.input_ids[-1] == chat.end_of_turn) != row["truncated"]
    if thinking:
        assert chat.tokenizer.decode(raw[0]["prompt_ids"]).endswith("<think>\n\n</think>\n\n")

    config = RewardConfig(
        str(folder),
        str(labelled),
        str(tmp_path / "rm"),
        max_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        chat_template_kwargs=thinking,
    )
    counts = train_reward_model(config, progress=False).metrics["data"]
    assert counts["used"] == len(kept)
    assert counts["response_tokens"] == sum(len(row["response_ids"]) for row in kept)
    model = RewardModel.from_pretrained(tmp_path / "rm", device="cpu")
    assert model.info.chat_template_kwargs == parse_template_kwargs(thinking)
    # `eval bon` reads the ids: it scores the tokens of the training in every row
    judged = bon.evaluate(
        BonConfig(str(tmp_path / "rm"), str(labelled), str(tmp_path / "bon"), n=(2,), use_cpu=True),
        progress=False,
    )
    assert (
        not judged["unusable"]
        and judged["other_tokens_than_sampled"] == found.counts["other_tokens_than_sampled"]
    )
    lines = [json.loads(s) for s in (tmp_path / "bon" / "scores.jsonl").read_text().splitlines()]
    for line, log_ratio in zip(lines, model.token_log_ratios(found.responses), strict=True):
        assert line["sum"] == pytest.approx(model.info.beta * float(log_ratio.sum()), abs=1e-3)
        assert line["final"] == pytest.approx(model.info.beta * float(log_ratio.mean()), abs=1e-4)
    # `score` is given texts: of those that encode to what was sampled it scores the tokens of the training
    own = [
        (row, response)
        for row, response in zip(kept, found.responses, strict=True)
        if not row["truncated"]
        and [*chat.encode([row["response"]])["input_ids"][0], chat.end_of_turn] == row["response_ids"]
    ]
    trained = model.token_log_ratios([response for _, response in own])
    scored = model.solution_log_ratios(
        [(row["prompt"], [row["response"]]) for row, _ in own], step_format="{step}"
    )
    for of_training, of_score in zip(trained, scored, strict=True):
        assert of_training.abs().max() > 1e-6
        assert torch.allclose(of_score.log_ratio, of_training, rtol=0, atol=1e-5)
    assert model.chat.prompt_ids(prompts[0]["prompt"]) == tuple(raw[0]["prompt_ids"])
    return len(own)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [None, WITHOUT_THINKING])
def test_the_sampled_ids_reach_training_to_the_last_one(tiny_folder, chat, tmp_path, thinking):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    chat.tokenizer.save_pretrained(folder)
    chain(folder, chat, tmp_path, thinking, max_new_tokens=60)


def test_the_preset_release_answers_without_thinking_where_the_template_can(chat, tokenizer, tiny_folder):
    """train-rm and train-policy alike; what is given wins; a template without the variable gets none."""
    assert preset_template_kwargs(None, "release", chat.tokenizer) == WITHOUT_THINKING
    assert preset_template_kwargs(None, "paper", chat.tokenizer) is None
    assert preset_template_kwargs("{}", "release", chat.tokenizer) == "{}"
    assert preset_template_kwargs(None, "release", tokenizer) is None


@pytest.mark.slow
def test_it_reaches_both_trainers(chat, tiny_folder, rollouts, tmp_path):
    folder = tmp_path / "thinks"
    shutil.copytree(tiny_folder, folder)
    chat.tokenizer.save_pretrained(folder)
    small = {"max_steps": 1, "use_cpu": True, "mixed_precision": "no"}
    thinking = "<think>\n\n</think>\n\n"
    for name, changes, end in (
        ("paper", {}, "assistant\n"),
        ("release", {"preset": "release"}, thinking),
        ("given", {"preset": "release", "chat_template_kwargs": "{}"}, "assistant\n"),
    ):
        config = RewardConfig(str(folder), str(rollouts), str(tmp_path / name), **small, **changes)
        train_reward_model(config, progress=False)
        model = RewardModel.from_pretrained(tmp_path / name, device="cpu")
        assert chat.tokenizer.decode(model.chat.prompt_ids("a")).endswith(end), name
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "a", "answer": "1"}\n')
        policy = PolicyConfig(str(folder), str(prompts), str(tmp_path / "p"), "grpo", use_cpu=True, **changes)
        policy, method = resolve(policy)
        policy, accelerator = (
            with_template_kwargs(policy),
            data_parallel_accelerator("", use_cpu=True, mixed_precision="no"),
        )
        run = Run("test", policy, accelerator, starts_from=[], mark="x", progress=False)
        (question,) = _Inputs(policy, method, run).questions
        assert chat.tokenizer.decode(question.ids).endswith(end), name


JUDGING = ("score", "inspect", "eval processbench", "eval bon")


def judging(command, model, folder, *flags):
    """Exit code of a command that scores one sum (`eval bon`: two responses) with `model`."""
    write_jsonl(folder / "steps.jsonl", [{"problem": "What is 1 + 2?", "steps": ["3"], "label": -1}])
    rows = [{"prompt": "What is 1 + 2?", "response": str(r), "label": int(r == 3)} for r in (3, 4)]
    write_jsonl(folder / "rows.jsonl", rows)
    place = {"score": "out.jsonl", "inspect": "out.html"}.get(command, "out")
    data = "rows.jsonl" if command == "eval bon" else "steps.jsonl"
    given = ("--input", "--output") if command in ("score", "inspect") else ("--data", "--output_dir")
    arguments = [*command.split(), "--model", str(model), given[0], str(folder / data)]
    arguments += [given[1], str(folder / place)] + ["--n", "2"] * (command == "eval bon")
    arguments += ["--pick", "first"] * (command == "inspect")
    return main([*arguments, *flags])


def read_score(command, folder):
    """The first score that `judging` has written."""
    if command == "eval processbench":
        return pyarrow.parquet.read_table(folder / "out" / "items-steps.parquet").to_pylist()[0]["step"][0]
    file = folder / ("out.jsonl" if command == "score" else "out/scores.jsonl")
    line = json.loads(file.read_text().splitlines()[0])
    return line["step_scores"][0] if command == "score" else line["sum"]


@pytest.fixture
def thinker(chat, tiny_folder, tmp_path):
    """The tiny model with the template that thinks, and as a reward model trained without thinking."""
    folder = tmp_path / "thinker"
    shutil.copytree(tiny_folder, folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", [name for name in JUDGING if name != "inspect"])
def test_endo_rm_takes_template_variables(chat, thinker, tmp_path, command):
    for flags, kwargs in ((), {}), (("--chat_template_kwargs", WITHOUT_THINKING), {"enable_thinking": False}):
        folder = tmp_path / str(len(flags))
        folder.mkdir()
        assert judging(command, thinker, folder, "--objective", "endo_rm", *flags) == 0
        rm = RewardModel.from_causal_lm(thinker, device="cpu", chat_template_kwargs=kwargs)
        scored = rm.score("What is 1 + 2?", ["3"], step_format="{step}" if "bon" in command else STEP_FORMAT)
        expected = float(scored.prefix_values[-1]) if "bon" in command else float(scored.step_scores[0])
        assert read_score(command, folder) == pytest.approx(expected, rel=1e-5)
    assert read_score(command, tmp_path / "0") != pytest.approx(read_score(command, tmp_path / "2"), rel=1e-3)


@pytest.mark.parametrize("command", JUDGING)
def test_a_reward_model_takes_no_other_template_variables_than_its_own(
    chat, thinker, tmp_path, command, capsys
):
    info = RewardModelInfo(
        "ipvrm", 10.0, 5.0, template_hash=template_hash(chat.tokenizer), versions=versions(),
        chat_template_kwargs={"enable_thinking": False}, **reference_entries(thinker, thinker),
    )  # fmt: skip
    write_info(thinker, info)
    for given in ("{}", '{"enable_thinking": true}'):
        assert judging(command, thinker, tmp_path, "--chat_template_kwargs", given) == 2
        assert (
            "was trained with --chat_template_kwargs '{\"enable_thinking\": false}'"
            in capsys.readouterr().err
        )
    assert judging(command, thinker, tmp_path, "--chat_template_kwargs", WITHOUT_THINKING) == 0


# ------------------------------------------------------------------------------------------ real tokenizers


@pytest.fixture(params=["qwen3", "gemma3", "smollm2"])
def real(request):
    """A folder of IPVRM_TOKENIZERS, see CONTRIBUTING.md, or a skip with the reason."""
    folder = Path(os.environ.get("IPVRM_TOKENIZERS", "")) / request.param
    if "IPVRM_TOKENIZERS" not in os.environ or not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer {request.param} in IPVRM_TOKENIZERS; CONTRIBUTING.md says how to get it")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


END = {"qwen3": "<|im_end|>", "gemma3": "<end_of_turn>", "smollm2": "<|im_end|>"}
TEXTS = (
    "17 + 25 = 42. So \\boxed{42}",
    "<think>\nadd\n</think>\n\n\\boxed{42}",
    "  naïve π≈3 \U0001f600\n\n",
    " ",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_real_templates_keep_to_what_was_sampled(real, request, text, ended):
    prompt = [{"role": "user", "content": "Add 17 and 25."}]
    row = Row("a:1", tuple(prompt), text, 1, ended=ended)
    response = tokenize([row], real, max_length=None, with_offsets=True).responses[0]
    rendered = real.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    sampled = real(text, add_special_tokens=False)["input_ids"]
    end = real.convert_tokens_to_ids(END[request.node.callspec.params["real"]])
    assert response.input_ids == (
        *real(rendered, add_special_tokens=False)["input_ids"],
        *sampled,
        *[end] * ended,
    )
    assert len(response.offsets) == response.length == len(sampled) + ended
    assert real.decode(response.input_ids[response.prompt_length :][: len(sampled)]) == text


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [None, WITHOUT_THINKING])
def test_real_templates_from_rollout_to_score(real, tmp_path, thinking):
    """With a random model over the tokenizer's whole vocabulary, which ends about every tenth token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if thinking and not reads(real, "enable_thinking"):
        pytest.skip("this chat template knows no thinking")
    chat, size = Chat(real), 16
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(real), hidden_size=size, intermediate_size=32, num_hidden_layers=1, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight += 1  # every hidden state is then nearly (1, ..., 1)
        model.lm_head.weight[chat.end_of_turn] = (math.log(len(real)) - 2) / size
    model.save_pretrained(tmp_path / "model")
    real.save_pretrained(tmp_path / "model")
    assert chain(tmp_path / "model", chat, tmp_path, thinking, max_new_tokens=12) > 0
