"""`ipvrm eval policy`: avg@k and pass@k by hand, end to end, presets."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.evaluate import policy
from ipvrm.evaluate.policy import Judged, PolicyEvalConfig, evaluate, sampling_of, summarise

CONFIG = PolicyEvalConfig("m", "d", "o", num_generations=4, k=(1, 2, 4), bootstrap_resamples=50)


def test_metrics_by_hand():
    """Against drawing every subset: problems of 4 and 3 judged responses, one without any."""
    problems = {"a": {1: Judged(4, 1), 2: Judged(3, 3), 3: Judged(0, 0)}, "b": {4: Judged(4, 0)}}
    counts = {name: Counter(responses=1, truncated=0, failed=0) for name in problems}
    found = summarise(CONFIG, problems, counts)
    a = found["sources"]["a"]["metrics"]
    assert (a["avg@4"]["value"], a["avg@4"]["problems"]) == (pytest.approx((1 / 4 + 1) / 2), 2)
    one_of_four = [max(s) for s in itertools.combinations([1, 0, 0, 0], 2)]
    assert a["pass@2"]["value"] == pytest.approx((np.mean(one_of_four) + 1) / 2)
    assert a["pass@1"]["value"] == a["avg@4"]["value"]
    assert (a["pass@4"]["value"], a["pass@4"]["problems"]) == (1.0, 1)  # only one has four verdicts
    assert found["sources"]["b"]["metrics"]["pass@4"]["value"] == 0.0
    assert found["mean"]["pass@4"] == 0.5 and found["mean"]["avg@4"] == pytest.approx(0.3125)
    assert 0 <= a["avg@4"]["low"] <= a["avg@4"]["value"] <= a["avg@4"]["high"] <= 1


def test_a_source_without_verdicts_has_no_value():
    found = summarise(CONFIG, {"a": {1: Judged(0, 0)}}, {"a": Counter()})
    assert found["sources"]["a"]["metrics"]["avg@4"] == {
        "problems": 0,
        "value": None,
        "low": None,
        "high": None,
    }
    assert found["mean"]["avg@4"] is None


def test_one_problem_has_no_interval(capsys):
    """As a text and in the table; two have one."""
    problems = {"one": {1: Judged(4, 1), 2: Judged(0, 0)}, "two": {3: Judged(4, 1), 4: Judged(4, 1)}}
    counts = {name: Counter(responses=8, truncated=0, failed=0) for name in problems}
    found = summarise(CONFIG, problems, counts)
    one, two = (source["metrics"]["avg@4"] for source in found["sources"].values())
    assert one == {"problems": 1, "value": 0.25, "low": None, "high": None}
    assert two == {"problems": 2, "value": 0.25, "low": 0.25, "high": 0.25}
    assert found["sources"]["one"]["metrics"]["pass@4"]["low"] is None and found["mean"]["avg@4"] == 0.25
    policy._print(found | {"unusable": [], "left_out": []})
    rows = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    assert ["one", "2", "0", "0", "25.0", "25.0"] in rows
    assert ["two", "2", "0", "0", "25.0", "(25.0-25.0)"] in rows


def test_what_became_of_the_responses(tmp_path):
    """Failed: no label."""
    rollouts = write_jsonl(
        tmp_path / "rollouts.jsonl",
        [
            {"row": 7, "sample": i, "data_source": "a", "truncated": i == 2, "response": text}
            for i, text in enumerate(["1", " ", "3", "4"])
        ],
    )
    labelled = write_jsonl(
        tmp_path / "labelled.jsonl",
        [{"row": row, "label": label} for row, label in ((1, 1), (2, 0), (3, 0))],
    )
    found, counts = policy._judged(str(rollouts), str(labelled))
    assert found == {"a": {7: Judged(3, 1)}}
    assert counts == {"a": {"responses": 4, "truncated": 1, "failed": 1}}


def test_presets():
    paper, release = (sampling_of(replace(CONFIG, preset=name)) for name in ("paper", "release"))
    assert paper == {"temperature": 0.6, "top_p": 0.95, "top_k": 0}
    assert release == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert sampling_of(replace(CONFIG, preset="release", top_k=3))["top_k"] == 3


@pytest.mark.parametrize("k", [(), (0,), (5,)])
def test_k_must_be_drawable(k):
    with pytest.raises(IpvrmError, match="--k must lie between 1 and --num_generations 4"):
        evaluate(replace(CONFIG, k=k))


def test_rows_without_responses_are_never_solved_and_those_without_a_truth_left_out(tmp_path):
    """Each in its own source where it can be read; a row with neither is left out."""
    half = "\ud83d"
    given = [
        {"prompt": "1?", "data_source": "a", "answer": "1"},
        {"prompt": None, "data_source": "a", "reward_model": {"ground_truth": "2"}},
        {"prompt": half, "data_source": "b", "answer": 3},
        {"prompt": "4?", "data_source": "a"},
        {"prompt": "5?", "data_source": 5, "answer": "5"},
        {"prompt": None, "data_source": "a", "answer": "nan"},
        ["p"],
        {"prompt": "8?", "data_source": "a", "answer": [8]},
        {"prompt": "beyond the limit", "data_source": "c", "answer": "9"},
    ]
    data = write_jsonl(tmp_path / "data.jsonl", given)
    with open(data, "r+", encoding="utf-8") as file:
        lines = file.read().splitlines()
        file.seek(0)
        file.write("\n".join([*lines[:8], "{", *lines[8:]]) + "\n")
    rollouts = write_jsonl(
        tmp_path / "rollouts.jsonl", [{"row": 1, "answer": "1"}, {"row": 4, "answer": None}]
    )
    config = replace(CONFIG, data=str(data), limit=9)
    problems, counts = {"a": {1: Judged(4, 2), 4: Judged(1, 0)}}, {"a": Counter(responses=8)}
    unusable = [f"{data}:{row}: x:{row}: y" for row in (2, 3, 5, 6, 7, 8, 9, 66)]
    never, left_out = policy._add_missed(config, str(rollouts), unusable, problems, counts)
    assert never == [unusable[i] for i in (0, 1, 2, 7)]
    assert left_out == [f"{data}:4: no ground truth", *unusable[3:7]]
    assert problems == {
        "a": {1: Judged(4, 2), 2: Judged(4, 0), 4: Judged(0, 0)},
        "b": {3: Judged(4, 0)}, "": {5: Judged(4, 0)},
    }  # fmt: skip
    found = summarise(config, problems, counts)["sources"]
    assert found["a"]["metrics"]["avg@4"]["value"] == pytest.approx(0.5 / 2)
    assert found["a"]["problems"] == 3 and found["a"]["metrics"]["avg@4"]["problems"] == 2
    assert found["b"]["metrics"]["pass@4"]["value"] == 0.0


@pytest.mark.slow
def test_end_to_end(tiny_folder, tmp_path, capsys):
    """Sampled, judged and counted; the same command again samples nothing."""
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "data_source": "ab"[i % 2]} for i in range(3)]
    rows += [{"prompt": None, "answer": "5", "data_source": "b"}, {"prompt": "x", "data_source": "b"}]
    config = PolicyEvalConfig(
        str(tiny_folder),
        str(write_jsonl(tmp_path / "p.jsonl", rows)),
        str(tmp_path / "out"),
        num_generations=2,
        k=(1, 2),
        max_new_tokens=4,
        verifier="string",
        verifier_workers=1,
        bootstrap_resamples=20,
        use_cpu=True,
    )
    results = evaluate(config)
    shown = capsys.readouterr().out
    assert "mean of the sources" in shown
    assert "1 rows cannot be asked; they count as never solved:\n" in shown
    assert "1 rows have no ground truth that can be read; they are left out:\n" in shown
    assert [reason.partition(".jsonl:")[2] for reason in (*results["unusable"], *results["left_out"])] == [
        "4: needs `prompt`; the columns are prompt, answer, data_source", "5: no ground truth",
    ]  # fmt: skip
    assert {name: (s["problems"], s["responses"]) for name, s in results["sources"].items()} == {
        "a": (2, 4), "b": (3, 4),
    }  # fmt: skip
    assert [s["failed"] for s in results["sources"].values()] == [0, 2]
    assert results["sources"]["b"]["metrics"]["avg@2"]["problems"] == 2
    assert results["sources"]["a"]["metrics"]["pass@2"]["problems"] == 2
    written = tmp_path / "out" / "rollouts.parquet"
    before = written.stat().st_mtime_ns
    again = evaluate(config, progress=False)
    assert again["sources"] == results["sources"] and written.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "results.json").read_text())["mean"] == results["mean"]
