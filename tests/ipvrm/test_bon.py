"""`ipvrm eval bon` and `rerank`: scores by hand, every subset by enumeration, resuming, what is left out."""

import itertools
import json
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import interrupted_at, write_jsonl

import ipvrm
from ipvrm import IpvrmError, RewardModel
from ipvrm.data.chat import tokenizer_hash
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row, read_rows
from ipvrm.evaluate import bon
from ipvrm.evaluate.bon import BonConfig, evaluate
from ipvrm.models import reward_model as reward_module

TEXTS = ["carry 1.\n\nAnswer: 3", "Answer: 4", "carry 0.\n\n\n\nAnswer: 3.0", "no"]


@pytest.fixture(scope="module")
def reward_model(tiny_folder):
    return RewardModel.from_causal_lm(tiny_folder, device="cpu")


@pytest.fixture
def config(tiny_folder, tmp_path):
    """Three problems of four responses, one of two; EndoRM, which needs no training."""
    rows = [
        {"prompt": f"What is {k} + 2?", "response": text, "label": label, "extracted": vote}
        for k in range(4)
        for text, label, vote in zip(TEXTS, (k != 1, 0, k == 0, 0), ("3", "4", "3.0", None), strict=True)
    ][:-2]
    rows = [row | {"row": number} for number, row in enumerate(rows, 1)]  # as label numbers them
    data = write_jsonl(tmp_path / "labelled.jsonl", rows)
    return BonConfig(
        model=str(tiny_folder),
        data=str(data),
        output_dir=str(tmp_path / "out"),
        objective="endo_rm",
        n=(1, 2, 3),
        bootstrap_resamples=50,
        use_cpu=True,
    )


def nans(length):
    return torch.full((length,), float("nan"))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_step_ends():
    assert bon._step_ends("ab\n\ncd", "\n\n") == [4, 6]
    assert bon._step_ends("ab", "\n\n") == [2]
    assert bon._step_ends("ab\n\n", "\n\n") == [4]  # nothing behind it: no step of its own
    assert bon._step_ends("ab", "") == [2]
    assert bon._step_ends("\n\nab\n\n \n\ncd\n\n", "\n\n") == [9, 13]  # blank ones are no steps


def test_scores_by_hand(reward_model):
    row = Row("a:1", "What is 1 + 2?", TEXTS[0])
    (scores,) = bon._scores(reward_model, [row], "\n\n", None, 8192)
    (response,) = tokenize([row], reward_model.chat, max_length=None, with_offsets=True).responses
    r = reward_model.token_log_ratios([response])[0].double().numpy()
    boundary = len("carry 1.\n\n")
    step = np.array([-1 if end < 0 else int(end > boundary) for _, end in response.offsets])
    value = float((r * 0.95 ** np.arange(len(r))).sum())
    of_step = [float((r[step == k] * 0.95 ** np.arange((step == k).sum())).sum()) for k in (0, 1)]
    want = {"final": value / len(r), "sum": value, "mean": np.mean(of_step), "min": min(of_step)}
    assert scores == pytest.approx(want, rel=1e-6)


def test_rerank(reward_model):
    ranked = ipvrm.rerank(reward_model, "What is 1 + 2?", TEXTS, by="sum")
    rows = [Row(f"a:{i}", "What is 1 + 2?", text) for i, text in enumerate(TEXTS)]
    scores = [s["sum"] for s in bon._scores(reward_model, rows, "\n\n", None, 8192)]
    assert [r.place for r in ranked] == sorted(range(4), key=lambda i: -scores[i])
    assert [r.score for r in ranked] == pytest.approx(sorted(scores, reverse=True))
    twice = ipvrm.rerank(reward_model, "q", ["same", "same"])
    assert [r.place for r in twice] == [0, 1]
    with pytest.raises(IpvrmError, match="by must be one of final, sum, mean, min; got 'best'"):
        ipvrm.rerank(reward_model, "q", TEXTS, by="best")


def test_the_example_of_the_guide(reward_model, tmp_path, monkeypatch):
    guide = Path(__file__).parents[2] / "ipvrm" / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda folder: {"runs/rm": reward_model}[folder])
    names = {"problem": "What is 1 + 2?", "steps": ["carry 1.", "Answer: 3"], "responses": TEXTS}
    exec(code, names)
    assert names["best"] == ipvrm.rerank(reward_model, names["problem"], TEXTS)[0].place
    assert len(names["out"].step_scores) == 2 and len(names["out"].td) == len(names["out"].prefix_values)
    for attribute in re.findall(r"[\s,]\.(\w+)", code):
        assert hasattr(names["out"], attribute), attribute


def test_a_response_without_text_is_one_of_its_problem(config, capsys):
    """As `label --keep_all` keeps it: wrong, and without a vote."""
    rows = read_jsonl(config.data)
    rows[8] |= {"response": "", "label": 0, "extracted": None}
    write_jsonl(Path(config.data), rows)
    results = evaluate(replace(config, n=(2, 4)))
    capsys.readouterr()
    of_n = {(r["method"], r["n"]): r for r in results["sources"][""]["rows"]}
    assert {n: of_n["sum", n]["num_problems"] for n in (2, 4)} == {2: 4, 4: 3}  # one has two responses
    assert of_n["pass_at_n", 4]["accuracy"] == pytest.approx(1 / 3)
    assert [*results["unusable"].values()] == ["the response is empty"]


def test_one_problem_has_no_interval(config, capsys):
    write_jsonl(Path(config.data), read_jsonl(config.data)[:4])
    found = evaluate(replace(config, n=(4,)))["sources"][""]["rows"]
    assert {tuple(row["interval"]) for row in found} == {(None, None)}
    shown = capsys.readouterr().out
    assert "100.0 (one problem)" in shown and "(100.0-100.0)" not in shown


def test_every_subset(config, capsys):
    """Accuracies against drawing every subset of the stored scores; votes for 3 and 3.0 are one."""
    results = evaluate(config)
    shown = capsys.readouterr().out
    assert "majority vote" in shown and "N = 3: 1 of 4 problems have fewer responses" in shown
    lines = read_jsonl(f"{config.output_dir}/scores.jsonl")
    rows = read_jsonl(config.data)
    problems = [[i for i, row in enumerate(rows) if row["prompt"] == f"What is {k} + 2?"] for k in range(4)]
    for found in results["sources"][""]["rows"]:
        per_problem = []
        for members in (m for m in problems if len(m) >= found["n"]):
            outcomes = []
            for subset in itertools.combinations(members, found["n"]):
                right = [rows[i]["label"] for i in subset]
                if found["method"] == "pass_at_n":
                    outcomes.append(max(right))
                elif found["method"] == "one_sample":
                    outcomes.append(np.mean([rows[i]["label"] for i in members]))
                elif found["method"] == "majority_vote":
                    votes = [Decimal(rows[i]["extracted"]) for i in subset if rows[i]["extracted"]]
                    most = max((votes.count(v) for v in votes), default=0)
                    winners = {v for v in votes if votes.count(v) == most}
                    truths = {Decimal(rows[i]["extracted"]) for i in members if rows[i]["label"]}
                    outcomes.append(np.mean([v in truths for v in winners]) if winners else 0.0)
                else:
                    best = max(subset, key=lambda i: lines[i][found["method"]])
                    outcomes.append(rows[best]["label"])
            per_problem.append(np.mean(outcomes))
        assert found["num_problems"] == len(per_problem)
        assert found["accuracy"] == pytest.approx(np.mean(per_problem)), found


def test_it_goes_on(config, monkeypatch):
    whole = evaluate(replace(config, output_dir=config.output_dir + "-whole"), progress=False)
    scored, real = [], bon._scores

    def interrupted(model, rows, *rest):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(rows))
        return real(model, rows, *rest)

    monkeypatch.setattr(bon, "_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, progress=False)
    scored.clear()
    monkeypatch.setattr(bon, "_scores", lambda *a: scored.append(len(a[1])) or real(*a))
    assert evaluate(config, progress=False)["sources"] == whole["sources"]
    assert sum(scored) == 12  # of 14, 2 were there
    with pytest.raises(IpvrmError, match="changed: step_separator"):
        evaluate(replace(config, step_separator=" "), progress=False)


def test_what_is_too_long_is_picked_last(config, reward_model):
    rows, _ = read_rows(config.data)
    lengths = [len(r.input_ids) for r in tokenize(rows, reward_model.chat, max_length=None).responses]
    most = sorted(lengths)[len(lengths) // 2]
    results = evaluate(replace(config, max_length=most), progress=False)
    lines = read_jsonl(f"{config.output_dir}/scores.jsonl")
    assert [line["final"] is None for line in lines] == [length > most for length in lengths]
    assert results["too_long"] == sum(length > most for length in lengths) > 0


UNUSABLE = [  # (what is changed in a row, the reason, whether its problem is known)
    ({"label": None}, "label is missing", True),
    ({"label": 2}, "label must be 0 or 1", True),
    ({"label": float("nan")}, "label must be 0 or 1", True),
    ({"response": None}, "the response must be text", True),
    ({"response": " "}, "the response is empty", True),
    ({"response": "\ud83d"}, "half a surrogate pair", True),
    ({"extracted": 3}, "extracted must be a text", True),
    ({"truncated": "no"}, "truncated must be true or false", True),
    ({"data_source": 3}, "data_source must be a text", True),
    ({"prompt": None}, "needs `conversation`, or `prompt` and `response`", False),
    ({"prompt": [{"role": 1}]}, "must have text `role` and `content`", False),
    ([1], "must be an object with named columns", False),
]


@pytest.mark.parametrize("pieces", [64, 2])
def test_one_unusable_row_of_any_kind_is_picked_last(config, monkeypatch, capsys, pieces):
    """Each is a wrong response to problem 0; with `pieces` of 2 the run is interrupted among them."""
    rows = read_jsonl(config.data)
    bad = [
        ({**rows[0], "label": 1} | change) if isinstance(change, dict) else change for change, *_ in UNUSABLE
    ]
    write_jsonl(Path(config.data), [*rows[:3], *bad, *rows[3:]])
    monkeypatch.setattr(bon, "CHUNK", pieces)
    if pieces == 2:
        calls = interrupted_at(monkeypatch, bon, "_scores", 4)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, progress=False)
        assert calls == [2, 1, 0, 0]
    results = evaluate(replace(config, n=(2, 13)))
    note, shown = results["notes"][0], " ".join(capsys.readouterr().out.split())
    assert f"{len(bad)} of {len(bad) + len(rows)} responses cannot be used; they are picked last" in note
    assert "but 3 without a prompt, which are of no problem" in note and note.split(":")[0] in shown
    for number, (_, reason, _) in enumerate(UNUSABLE, 4):
        assert reason in results["unusable"][f"{config.data}:{number}"]
    assert len(results["unusable"]) == len(bad) and results["too_long"] == 0
    (source,) = results["sources"].values()
    assert source["problems"] == 4 and source["responses"] == len(rows) + len(bad) - 3
    lines = {line["line"]: line for line in read_jsonl(f"{config.output_dir}/scores.jsonl")}
    assert len(lines) == len(rows) + len(bad)
    members = [1, 2, 3, *range(4, 4 + len(bad) - 3), 4 + len(bad)]  # of problem 0
    scores = [lines[n]["final"] for n in members]
    assert [s is None for s in scores] == [False] * 3 + [True] * 9 + [False]
    subsets = list(itertools.combinations(range(13), 2))
    right = [i == 0 or i == 2 for i in range(13)]
    picked = [max(s, key=lambda i: -np.inf if scores[i] is None else scores[i]) for s in subsets]
    of_bad = [all(scores[i] is None for i in s) for s in subsets]
    alone = np.mean([0.0 if none else right[i] for i, none in zip(picked, of_bad, strict=True)])
    (found,) = (r for r in source["rows"] if r["method"] == "final" and r["n"] == 13)
    assert found["num_problems"] == 1  # the best of all 13 is problem 0's alone
    by_problem = bon._samples(
        [r for r in bon._read(config) if r.problem == bon._key("What is 0 + 2?")], lines
    )
    assert bon.best_of_n([by_problem], [2], 10, 0)[1].accuracy == pytest.approx(alone)


def test_a_response_whose_reward_is_no_number_is_named_and_picked_last(config, reward_model, monkeypatch):
    """The others of its chunk keep their scores."""
    whole = evaluate(replace(config, output_dir=config.output_dir + "-whole"), progress=False)
    scores = read_jsonl(f"{config.output_dir}-whole/scores.jsonl")
    real = reward_module.endo_rewards
    *_, no = reward_model.tokenizer("no", add_special_tokens=False)["input_ids"]  # no other text has it

    def patched(model, batch, *rest):
        return real(model, batch, *rest).masked_fill(batch.token_ids == no, torch.inf)

    monkeypatch.setattr(reward_module, "endo_rewards", patched)
    results = evaluate(config, progress=False)
    of_no = [n for n, row in enumerate(read_jsonl(config.data), 1) if row["response"] == "no"]
    assert [*results["unusable"]] == [f"{config.data}:{n}" for n in of_no] and not whole["unusable"]
    assert {*results["unusable"].values()} == {
        f"the reward of response token 2 of 3 (id {no}) is inf; a score of it means nothing"
    }
    for found, want in zip(read_jsonl(f"{config.output_dir}/scores.jsonl"), scores, strict=True):
        assert found["final"] == (None if found["line"] in of_no else pytest.approx(want["final"], rel=1e-4))
    with pytest.raises(IpvrmError, match="^sample:2: the reward of response token 2 of 3"):
        ipvrm.rerank(reward_model, "q", ["yes", "no"])


def test_other_tokens_than_the_texts_are_counted_and_said(config, reward_model, monkeypatch, capsys):
    """Also of a run that was interrupted behind them."""
    chat, rows = reward_model.chat, read_jsonl(config.data)
    for row, digest in ((rows[0], tokenizer_hash(chat.tokenizer)), (rows[1], "0" * 16)):
        letters = [i for c in row["response"] for i in chat.encode([c])["input_ids"][0]]
        row |= {"response_ids": [*letters, chat.end_of_turn], "tokenizer_hash": digest}
        row |= {"prompt_ids": list(chat.prompt_ids(row["prompt"]))}
    write_jsonl(Path(config.data), rows)
    monkeypatch.setattr(bon, "CHUNK", 4)
    with monkeypatch.context() as patch:
        interrupted_at(patch, bon, "_scores", 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, progress=False)
    results = evaluate(config)
    assert (results["other_tokens_than_sampled"], results["ids_of_another_tokenizer"]) == (1, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 14 responses were sampled as other tokens than their text encodes to" in shown
    assert "1 of 14 responses have ids of another tokenizer; their text is encoded" in shown


def test_without_a_usable_row_it_is_one_line(config, monkeypatch):
    rows = read_jsonl(config.data)
    with monkeypatch.context() as patch:
        patch.setattr(
            "ipvrm.models.reward_model.endo_rewards", lambda model, batch, *_: nans(len(batch.token_ids))
        )
        with pytest.raises(
            IpvrmError, match="no response can be scored; .*labelled.jsonl:1: the reward of .* is nan"
        ):
            evaluate(config, progress=False)
    write_jsonl(Path(config.data), [row | {"label": None} for row in rows])
    with pytest.raises(IpvrmError, match="no usable row; .*labelled.jsonl:1: label is missing") as caught:
        evaluate(replace(config, output_dir=config.output_dir + "-b"), progress=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": (64,)}, "no problem has so many responses .at most 4."),
        ({"n": (0,)}, "--n must be at least 1; got 0"),
        ({"objective": None}, "no ipvrm_config.json; .* --objective endo_rm of"),
        ({"reference": "x"}, "no reference"),
    ],
)
def test_refusals(config, changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        evaluate(replace(config, **changes), progress=False)


def test_sources_and_no_votes(config, tmp_path):
    rows = read_jsonl(config.data)
    for row in rows:
        row |= {"data_source": "ab"[int(row["prompt"][8]) % 2], "extracted": None}
    write_jsonl(tmp_path / "labelled.jsonl", rows)
    results = evaluate(replace(config, n=(2,)), progress=False)
    assert {name: found["problems"] for name, found in results["sources"].items()} == {"a": 2, "b": 2}
    assert "majority_vote" not in {row["method"] for row in results["sources"]["a"]["rows"]}
    assert any("no majority vote" in note for note in results["notes"])
