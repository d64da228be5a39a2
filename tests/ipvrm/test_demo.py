"""`ipvrm demo` in miniature: every stage is real, but responses come from the noise model of the task."""

import dataclasses
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from browser import CHROMIUM, Chromium
from safetensors.torch import load_file

from benchmarks.faults.toy import MINI, noisy_engine, noisy_samples
from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.demo import evaluation, policies, rollouts, run
from ipvrm.demo.arithmetic import Problem, answer_of, first_wrong_step, noisy_solution
from ipvrm.demo.figures import draw_policies, draw_trace
from ipvrm.demo.report import _facts, conclusions
from ipvrm.demo.rollouts import read_rollouts
from ipvrm.demo.run import run_demo
from ipvrm.demo.settings import ALGORITHMS, CHOICES, Choice, DemoConfig, PolicySettings
from ipvrm.evaluate.thresholds import f1_of_hits, hits, predict, sweep
from ipvrm.reproduce import fig6
from ipvrm.rollouts.engine import TransformersEngine
from ipvrm.training import train_policy as policy_training
from ipvrm.training.checkpoint import TrainingInterrupted, interrupted
from ipvrm.view.page import rounded


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output folder, results) of a finished run."""
    output = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "sample", noisy_samples)
        patch.setattr(TransformersEngine, "__call__", noisy_engine)
        yield output, run_demo(DemoConfig(str(output)), progress=False, sizes=MINI)


@pytest.fixture
def again(demo, monkeypatch):
    """Runs the demo again in the finished folder; what it trains is listed."""
    from ipvrm.training import train_rm

    trained = []
    original = train_rm.train_reward_model

    def counting(config, progress=True):
        trained.append(config.objective)
        return original(config, progress)

    def counting_policies(config, progress=True):
        trained.append(f"{config.algorithm} {config.seed}")
        return policy_training.train_policy(config, progress)

    monkeypatch.setattr(train_rm, "train_reward_model", counting, raising=False)
    monkeypatch.setattr(policies, "train_policy", counting_policies)
    monkeypatch.setattr(rollouts, "sample", noisy_samples)
    monkeypatch.setattr(TransformersEngine, "__call__", noisy_engine)

    def rerun(seeds=1, **options):
        trained.clear()
        config = DemoConfig(str(demo[0]), policy_seeds=seeds)
        return run_demo(config, progress=False, sizes=MINI, **options), list(trained)

    return rerun


@pytest.mark.slow
def test_writes_everything_it_promises(demo):
    output, results = demo
    names = {path.name for path in output.iterdir()}
    assert names >= {"results.json", "steps.csv", "best_of_n.csv", "trace.png", "policies.png", "report.md"}
    assert not [path for path in output.rglob("*.tmp")]
    assert json.loads((output / "results.json").read_text())["models"] == results["models"]
    assert (output / "trace.png").read_bytes().startswith(b"\x89PNG")
    report = (output / "report.md").read_text()
    assert all(sentence in report for sentence in results["conclusions"])
    reward_models = {"base", "rollouts", "reward-ipvrm", "reward-implicit_prm", "evaluation"}
    of_policies = {"policy-start", "policy-grpo", "policy-grpo_prm", "policy-distrl"}
    assert set(results["stages"]) == reward_models | of_policies
    header, *rows = (output / "steps.csv").read_text().splitlines()
    assert header.startswith("model,format,rule,chosen_rule,protocol,tau,f1,low,high")
    assert len(rows) == 2 * 3 * 4 * 2  # models, formats, rules, protocols


@pytest.mark.slow
def test_training_data_holds_outcome_labels_only(demo):
    rows = pq.read_table(demo[0] / "rollouts" / "train.parquet").to_pylist()
    assert set(rows[0]) == {"prompt", "response", "label"}
    assert len(rows) == 48 * 4 - 1 and {row["label"] for row in rows} == {0, 1}
    assert demo[1]["rollouts"]["train"]["dropped_unfinished_or_empty"] == 1
    assert all(row["label"] == (answer_of(row["response"]) == eval(row["prompt"])) for row in rows)
    found = [
        read_rollouts(demo[0] / "rollouts" / f"{name}.jsonl") for name in ("validation", "test", "best_of_n")
    ]
    held_out = [problem.text for part in found for problem, _ in part]
    assert not {row["prompt"] for row in rows} & set(held_out) and len(set(held_out)) == 48 + 64 + 8


@pytest.mark.slow
def test_table_follows_from_the_stored_scores(demo):
    """F1 again from test_scores.jsonl, labels from the verifier, thresholds from the validation traces."""
    output, results = demo
    rows = [
        json.loads(line) for line in (output / "evaluation" / "test_scores.jsonl").read_text().splitlines()
    ]
    problems = [problem for problem, _ in read_rollouts(output / "rollouts" / "test.jsonl")]
    labels = [first_wrong_step(p, row["steps"]) for p, row in zip(problems, rows, strict=True)]
    assert labels == [row["label"] for row in rows] and -1 in labels
    for name, model in results["models"].items():
        for written, rules in model["formats"].items():
            for rule, entries in rules.items():
                scores = [row["scores"][name][written][rule] for row in rows]
                chosen = model["validation"][rule]
                assert entries["transfer"]["tau"] == chosen["tau"]  # one threshold for all formats
                score = score_threshold_of(chosen)
                assert entries["transfer"]["f1"] == pytest.approx(
                    f1_of_hits(hits(scores, labels, score), labels).f1
                )
                assert entries["oracle"]["f1"] == pytest.approx(sweep(scores, labels)[1].f1)
        # a shifted format is another text for the model, so other scores
        by_format = [[row["scores"][name][w]["step"] for row in rows] for w in model["formats"]]
        assert by_format[0] != by_format[1] != by_format[2] != by_format[0]


@pytest.mark.slow
def test_best_of_n_holds_both_models_and_the_votes(demo):
    rows = demo[1]["best_of_n"]
    methods = {row["method"] for row in rows}
    picks = {f"{c.objective}:{pick}" for c in CHOICES for pick in ("final", "sum", "mean", "min")}
    assert methods == picks | {"one_sample", "majority_vote", "pass_at_n"}
    accuracy = {(row["method"], row["n"]): row["accuracy"] for row in rows}
    for method in methods:
        assert accuracy[method, 4] <= accuracy["pass_at_n", 4] + 1e-12
        low, high = next(row["interval"] for row in rows if row["method"] == method and row["n"] == 4)
        assert low <= accuracy[method, 4] <= high


@pytest.mark.slow
def test_finished_stages_are_reused(demo, again):
    output, results = demo
    before = (output / "evaluation" / "evaluation.json").stat().st_mtime_ns
    repeated, trained = again()
    assert trained == []
    assert (output / "evaluation" / "evaluation.json").stat().st_mtime_ns == before
    assert repeated["models"] == results["models"] and repeated["conclusions"] == results["conclusions"]
    assert repeated["policies"] == results["policies"]


@pytest.mark.slow
def test_interrupted_stage_starts_afresh_and_gives_the_same_numbers(demo, again):
    output, results = demo
    (output / "reward-ipvrm" / "stage.json").unlink()  # as after a kill in the middle of the training
    (output / "reward-ipvrm" / "model.safetensors").write_bytes(b"half a file")
    repeated, trained = again()
    assert trained == ["ipvrm"]  # the same settings give the same model: what follows from it is kept
    assert repeated["models"] == results["models"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward-ipvrm", "policy-grpo"])
def test_an_interruption_says_what_the_same_command_will_do(demo, tmp_path, monkeypatch, stage):
    from ipvrm.training import train_rm

    output = tmp_path / "run"
    shutil.copytree(demo[0], output)
    (output / stage / "stage.json").unlink()

    def stops(config, progress=True):
        raise interrupted(Path(config.output_dir) / "checkpoint-1", 1, 2, signal.SIGTERM)

    monkeypatch.setattr(train_rm, "train_reward_model", stops, raising=False)
    monkeypatch.setattr(policies, "train_policy", stops)
    with pytest.raises(TrainingInterrupted, match=f"{stage}: stopped; the same command reuses") as caught:
        run_demo(DemoConfig(str(output)), progress=False, sizes=MINI)
    assert "--" not in str(caught.value) and caught.value.exit_code == 143


@pytest.mark.full
def test_another_choice_repeats_only_what_depends_on_it(demo, again):
    other = (dataclasses.replace(CHOICES[0], margin=0.5), CHOICES[1])
    repeated, trained = again(choices=other)
    assert trained == ["ipvrm", "grpo_prm 0", "distrl 0"]
    ours, theirs = repeated["models"], demo[1]["models"]
    assert ours["ipvrm"]["formats"] != theirs["ipvrm"]["formats"]
    assert ours["implicit_prm"]["formats"] == theirs["implicit_prm"]["formats"]
    again()  # the module's other tests find the folder as it was


@pytest.fixture(scope="module")
def looked_at(demo, tmp_path_factory):
    """(the page of both reward models' mistakes, its data, the report of the folder), by the two commands."""
    output, folder = demo[0], tmp_path_factory.mktemp("looked_at")
    mistakes, report = folder / "mistakes.html", folder / "report.html"
    command = ["inspect", "--input", str(output / "evaluation" / "test_scores.jsonl"), "--json", "--use_cpu"]
    command += ["--model", *(str(output / f"reward-{choice.objective}") for choice in CHOICES), "--k", "5"]
    command += ["--step_format", "{step}", "--step_separator", ";", "--output", str(mistakes)]
    assert main(command) == 0
    assert main(["report", str(output), "--output", str(folder / "report")]) == 0
    return mistakes, json.loads(mistakes.with_suffix(".json").read_text()), report


@pytest.mark.slow
def test_inspect_shows_the_demos_test_traces(demo, looked_at):
    """Scores, thresholds and labels are those that the evaluation has stored."""
    (output, results), (page, data, _) = demo, looked_at
    stored = (output / "evaluation" / "test_scores.jsonl").read_text().splitlines()
    validation = {}
    for choice, model in zip(CHOICES, data["models"], strict=True):
        about = results["models"][choice.objective]
        validation[choice.objective] = threshold = score_threshold_of(about["validation"][about["rule"]])
        assert [model["name"], model["rule"]] == [f"reward-{choice.objective}", about["rule"]]
        assert model["threshold_from"] == "evaluation/evaluation.json"
        assert model["threshold"] == rounded(threshold)
    assert 1 <= len(data["traces"]) <= 5
    for trace in data["traces"]:
        row, (text,) = json.loads(stored[int(trace["id"]) - 1]), trace["texts"]
        assert [trace["problem"], trace["label"]] == [row["problem"], row["label"]]
        pieces = [data["vocabulary"][i] for i in text["ids"]]
        assert "".join(pieces[: text["ends"][-1] + 1]) == ";".join(row["steps"])
        for choice, found in zip(CHOICES, trace["models"], strict=True):
            rule = results["models"][choice.objective]["rule"]
            scores = row["scores"][choice.objective]["training format"][rule]
            assert found["scores"] == pytest.approx(scores, rel=6e-3, abs=1e-5)
            assert found["first_error"] == predict(scores, validation[choice.objective])
        assert trace["models"][0]["first_error"] != trace["label"]  # a mistake of the first model
    assert '"reward-ipvrm"' in page.read_text(encoding="utf-8")


def score_threshold_of(chosen):
    return chosen["score"] if chosen["score"] is not None else math.inf * (chosen["tau"] - 0.5)


@pytest.mark.slow
def test_report_of_the_demos_folder(demo, looked_at):
    """Its trainings with their curves, and its evaluation with the numbers that the demo prints."""
    results, report = demo[1], looked_at[2]
    text = re.search(r'id="data">(.*?)</script>', report.read_text(encoding="utf-8"), re.DOTALL)
    data = json.loads(text[1])
    trained = {f"reward-{choice.objective}" for choice in CHOICES} | {f"policy-{name}" for name in ALGORITHMS}
    assert trained <= {run["name"].split("/")[0] for run in data["runs"]}
    assert {"loss", "rollout_accuracy"} <= {metric["name"] for metric in data["metrics"]}
    rows = {tuple(row[1:3]): row for t in data["tables"] if t["name"] == "evaluations" for row in t["rows"]}
    assert len(rows) == 2 * 3 * 4  # models, formats, rules
    for (place, rule), row in rows.items():
        objective, written = place.split(", ")
        f1 = results["models"][objective]["formats"][written][rule]["transfer"]["f1"]
        assert row[3].split(" ")[0] == f"{100 * f1:.1f}"


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (IPVRM_CHROMIUM names one)")
def test_the_pages_of_the_demos_folder_open_in_a_browser(looked_at, tmp_path):
    mistakes, data, report = looked_at
    with Chromium(tmp_path / "browser") as browser:
        for width in (1280, 390):
            tab = browser.open(mistakes.as_uri(), width, 844)
            assert tab("document.documentElement.scrollWidth") <= width and not tab.heard()
            assert tab.count("#pick") == 1 and tab("$('pick').length") == len(data["traces"])
            assert "A reward-ipvrm flags" in " ".join(tab.text("#sentence").split())
            tab.close()
            tab = browser.open(report.as_uri(), width, 844)
            assert tab("document.documentElement.scrollWidth") <= width and not tab.heard()
            assert tab("$('title').textContent").endswith(" runs")
            assert tab("[...document.querySelectorAll('#charts figure path')].length") > 0
            numbers = "e => e.querySelectorAll('[x=\"46\"]').length"  # beside a curve; one is no scale
            assert min(tab(f"[...document.querySelectorAll('#charts svg')].map({numbers})")) >= 2
            tab.close()


@pytest.mark.slow
def test_without_matplotlib_the_demo_says_how_to_get_the_picture(demo, again, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (demo[0] / "trace.png").unlink()
    results, _ = again()
    assert results["pictures"] == []
    assert "pip install 'ipvrm[plot]'" in (demo[0] / "report.md").read_text()
    monkeypatch.undo()


@pytest.mark.slow
def test_screen_shows_tables_and_conclusions(demo, again, capsys):
    run_demo(DemoConfig(str(demo[0])), progress=True, sizes=MINI)
    shown = capsys.readouterr()
    for text in (
        "First-error F1",
        "space before =",
        "best constant",
        "majority vote",
        "pass@N",
        "time: base",
    ):
        assert text in shown.out
    assert "…" not in shown.out  # nothing is cut at 80 columns
    assert "reward-ipvrm: done before" in shown.err


@pytest.mark.slow
def test_its_trainings_say_how_far_they_are_and_what_multiplied(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TransformersEngine, "__call__", noisy_engine)
    output = tmp_path / "run"
    shutil.copytree(demo[0], output)
    for stage in ("reward-ipvrm", "policy-grpo"):
        (output / stage / "stage.json").unlink()
    monkeypatch.setattr("ipvrm_kernels.describe_cpu_matmul", lambda: "another: FAKE")
    results = run_demo(DemoConfig(str(output)), progress=True, sizes=MINI)
    said = capsys.readouterr().err
    for loop in ("train-rm", "train-policy", "outcomes"):
        assert re.search(rf"^{loop} (\d+)/\1  [\d.e-]+/s", said, re.MULTILINE), said
    assert "the CPU matmuls of rollouts were by" in " ".join(said.split())
    assert (
        results["manifest"]["cpu_matmul"] == results["stages"]["policy-grpo"]["cpu_matmul"] == "another: FAKE"
    )
    assert results["stages"]["rollouts"]["cpu_matmul"] != "another: FAKE"


@pytest.mark.slow
def test_a_base_model_that_never_errs_is_refused(tmp_path, monkeypatch):
    def right(model, tokenizer, problems, *, per_problem, seed, on_batch):
        rng = Random(seed)
        return [[noisy_solution(p, 0.0, rng) for _ in range(per_problem)] for p in problems]

    monkeypatch.setattr(rollouts, "sample", right)
    sizes = dataclasses.replace(MINI, base_max_steps=1, train_problems=4, validation_traces=4, test_traces=4)
    with pytest.raises(IpvrmError, match="0 of the 4 validation traces hold a mistake"):
        run_demo(DemoConfig(str(tmp_path / "demo")), progress=False, sizes=sizes)


# ------------------------------------------------------------------------------------------- closing text


def compared(grpo, distrl, before=None):
    """How policies compare whose outcomes after one step are these, by seed."""
    runs = {"grpo": [{"1": list(x)} for x in grpo], "distrl": [{"1": list(x)} for x in distrl]}
    found = policies.compare(before or [0] * len(grpo[0]), runs, resamples=400, seed=0)
    return found | {"settings": dataclasses.asdict(MINI.policies)}


def results_with(f1, intervals, difference, interval):
    """Results of two models in one format, by hand."""
    models = {
        name: {
            "rule": "step",
            "formats": {"here": {"step": {"transfer": {"f1": value, "f1_interval": list(around)}}}},
        }
        for name, value, around in zip(("ipvrm", "implicit_prm"), f1, intervals, strict=True)
    }
    best_of_n = [
        {"method": method, "n": 4, "accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]}
        for method, accuracy in
        (("majority_vote", 0.6), ("ipvrm:final", 0.63), ("implicit_prm:sum", 0.8))
    ]  # fmt: skip
    return {
        "models": models,
        "differences": {"here": {"f1": difference, "interval": interval}},
        "baselines": {"best_constant": {"f1": 0.3}, "one": {"f1": None}},
        "best_of_n": best_of_n,
        "policies": compared([[0] * 30], [[0] * 30]),
        "manifest": {"processor": "Some CPU, AVX2"},
    }


def test_conclusions_name_a_winner_only_where_the_interval_does():
    args = ([0.8, 0.7], [(0.75, 0.85), (0.25, 0.8)], 0.1)
    ahead = " ".join(conclusions(results_with(*args, [0.05, 0.15])))
    assert (
        "IPVRM minus Implicit PRM on the same traces +10.0 (+5.0 to +15.0), so IPVRM is ahead here" in ahead
    )
    assert "another base model on another kind of processor (here Some CPU, AVX2)" in ahead
    open_ = " ".join(conclusions(results_with(*args, [-0.05, 0.15])))
    assert "no difference shown" in open_ and "so IPVRM is ahead" not in open_
    behind = " ".join(conclusions(results_with(*args, [-0.15, -0.05])))
    assert "so Implicit PRM is ahead here" in behind
    # 0.25 is not above the best constant's 0.3
    assert "IPVRM: F1 above the best answer without a model (30.0) in 'here'." in ahead
    assert "not shown to be above it in 'here'" in ahead
    assert "Best of 4 picked by IPVRM (final): 63.0, majority vote 60.0; the intervals overlap" in ahead
    assert (
        "Implicit PRM (sum): 80.0, majority vote 60.0; the intervals do not overlap, the reward model"
        in ahead
    )


def test_policies_are_called_better_only_where_the_numbers_say_so():
    before = [1, 0] * 50
    results = results_with([0.8, 0.7], [(0.75, 0.85), (0.25, 0.8)], 0.1, [0.05, 0.15])
    better = [1] * 40 + [1, 0] * 30  # 20 of 100 problems more
    text = "\n".join(conclusions(results | {"policies": compared([before], [better], before)}))
    assert "GRPO: 50.0 to 50.0 right, +0.0 (+0.0 to +0.0) points on the same problems" in text
    assert "0.0 standard errors: a gain of more than three is not shown" in text
    assert (
        "DistRL + IPVRM: 50.0 to 70.0 right, +20.0 (" in text and "standard errors, more than three." in text
    )
    assert "DistRL + IPVRM minus GRPO on the same problems: +20.0" in text
    assert "so DistRL + IPVRM is ahead here with this seed" in text
    worse = "\n".join(conclusions(results | {"policies": compared([better], [before], before)}))
    assert "so GRPO is ahead here" in worse
    other = [1] * 42 + [1, 0] * 28 + [0, 0]  # 21 of 100 gained, 1 lost: next to nothing between the two
    open_ = "\n".join(conclusions(results | {"policies": compared([better], [other], before)}))
    assert (
        "the interval holds 0, a difference is not shown" in open_
        and "ahead here" not in open_.split("\n")[-2]
    )


# ------------------------------------------------------------------------------------------------- policies


@pytest.mark.slow
def test_policies_train_on_the_same_prompts_and_are_measured_on_others(demo):
    output, results = demo
    train, held_out = (
        [json.loads(line) for line in (output / "policy-start" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert all(row["answer"] == str(eval(row["prompt"])) for row in train + held_out)
    labelled = {row["prompt"] for row in pq.read_table(output / "rollouts" / "train.parquet").to_pylist()}
    assert {row["prompt"] for row in train} == labelled
    used = [read_rollouts(output / "rollouts" / f"{n}.jsonl") for n in ("validation", "test", "best_of_n")]
    used = {problem.text for part in used for problem, _ in part} | labelled
    assert len(held_out) == 24 and not {row["prompt"] for row in held_out} & used
    found = results["policies"]
    assert list(found["algorithms"]) == list(ALGORITHMS)
    assert {log["responses"] for logs in found["logs"].values() for log in logs} == {2 * 4 * 4}
    for algorithm, model in found["algorithms"].items():
        stored = policies.read_outcomes(output / f"policy-{algorithm}")
        accuracies = [sum(stored[str(step)]) / 24 for step in (1, 2)]
        assert [point["mean"] for point in model["curve"][1:]] == pytest.approx(accuracies)
        assert model["gain"]["mean"] == pytest.approx(accuracies[-1] - found["start"]["mean"])
        assert not list((output / f"policy-{algorithm}").glob("checkpoint-*"))
    # the engine of this test answers by problem and seed alone, so no policy differs from the base model
    assert all(d["mean"] == 0 and d["interval"] == [0, 0] for d in found["differences"])
    report = (output / "report.md").read_text()
    assert "| DistRL + IPVRM minus GRPO |" in report and "a difference is not shown" in report
    assert "a gain of more than three is not shown" in report


@pytest.mark.slow
def test_more_seeds_train_only_what_is_not_there(demo, again):
    results, trained = again(seeds=2)
    assert trained == [f"{algorithm} 1" for algorithm in ALGORITHMS]
    assert results["policies"]["seeds"] == 2 and "2 seeds" in (demo[0] / "report.md").read_text()
    assert [len(m["by_seed"]) for m in results["policies"]["algorithms"].values()] == [2, 2, 2]


def test_intervals_come_from_problems_and_seeds():
    """Against the textbook: independent problems, one seed; seeds that differ in nothing but their mean."""
    rng = np.random.default_rng(0)
    gain = rng.integers(-1, 2, 400).astype(float)
    one = policies.Resampling(1, 400, 4000, 0)
    assert one.estimate(gain[None])["standard_error"] == pytest.approx(gain.std() / 20, rel=0.05)
    assert one.estimate(gain) == one.estimate(gain[None])
    around = 1.96 * gain.std() / 20
    expected = (gain.mean() - around, gain.mean() + around)
    assert one.estimate(gain)["interval"] == pytest.approx(expected, abs=0.01)
    three = policies.Resampling(3, 400, 4000, 0)
    seeds = np.repeat([[0.1], [0.2], [0.6]], 400, axis=1)
    assert three.estimate(seeds)["mean"] == pytest.approx(0.3)
    assert three.estimate(seeds)["standard_error"] == pytest.approx(
        seeds[:, 0].std(ddof=1) / 3**0.5, rel=0.05
    )


@pytest.mark.slow
def test_curve_of_one_and_of_three_seeds(tmp_path):
    for seeds in (1, 3):
        rng = np.random.default_rng(seeds)
        outcomes = rng.integers(0, 2, (2, seeds, 50)).tolist()
        path = draw_policies(tmp_path / f"{seeds}.png", compared(*outcomes))
        assert path is not None and path.stat().st_size > 10_000


def test_no_policy_seed_is_refused(tmp_path):
    with pytest.raises(IpvrmError, match="policy_seeds must be at least 1; got 0"):
        run_demo(DemoConfig(str(tmp_path / "demo"), policy_seeds=0), progress=False, sizes=MINI)


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.slow
def test_picture_of_any_trace(tmp_path):
    steps = ["10+10=20", "20+10=31"]
    for label, flagged in ((-1, -1), (1, 0)):
        trace = {
            "problem": "10+10+10",
            "steps": steps,
            "label": label,
            "models": {"ipvrm": {"log_ratio": [0.1] * 18, "flagged": flagged}},
        }
        path = draw_trace(tmp_path / f"{label}.png", trace, [dataclasses.asdict(CHOICES[0])])
        assert path is not None and path.stat().st_size > 10_000


@pytest.mark.slow
def test_trace_of_the_picture_is_chosen_by_position(demo):
    trace = json.loads((demo[0] / "evaluation" / "trace.json").read_text())
    traces, lost = evaluation.read_traces(demo[0] / "rollouts" / "test.jsonl")
    fitting = [i for i, t in enumerate(traces) if len(t.steps) >= 4 and 1 <= t.label <= len(t.steps) - 2]
    assert trace["index"] == fitting[0] and lost == 0
    assert len(trace["models"]["ipvrm"]["log_ratio"]) == len(";".join(trace["steps"])) + 1


def test_traces_leave_out_what_never_ended(tmp_path):
    path = tmp_path / "x.jsonl"
    row = dataclasses.asdict(Problem(10, (10,))) | {"responses": ["10+10=20", None, ""]}
    path.write_text(json.dumps(row) + "\n")
    traces, lost = evaluation.read_traces(path)
    assert [t.label for t in traces] == [-1] and lost == 2


SELECTION = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_selection.json"


@pytest.mark.skipif(not SELECTION.exists(), reason="no checkout with benchmarks/results beside the tests")
def test_hyperparameters_are_the_ones_that_were_selected():
    """Those in use, unless another's lead over them was told apart from nothing."""
    for choice in CHOICES:
        found = json.loads(SELECTION.read_text())["objectives"][choice.objective]
        assert Choice(**found["in_use"]) == Choice(**found["chosen"]) == choice
        lead, low, high = found["lead"]
        by_choice = {Choice(**(t["choice"] | {"rule": ""})): t for t in found["tried"]}
        kept = by_choice[dataclasses.replace(choice, rule="")]["rules"][choice.rule]["f1"]
        assert lead == max(t["validation_f1"] for t in found["tried"]) - kept and low <= lead <= high
        assert low <= 0, "another candidate is ahead beyond chance: it has to be put into CHOICES"


POLICIES = SELECTION.with_name("demo_policies.json")


@pytest.mark.skipif(not POLICIES.exists(), reason="no checkout with benchmarks/results beside the tests")
def test_settings_of_the_policies_are_the_selected_ones():
    found = json.loads(POLICIES.read_text())
    assert PolicySettings(**found["chosen"]) == run.FULL.policies
    least = [min(gain["in_standard_errors"] for gain in tried["gains"].values()) for tried in found["tried"]]
    best = found["tried"][least.index(max(least))]["settings"]
    assert best | {"points": run.FULL.policies.points} == found["chosen"]


@pytest.mark.parametrize("multiple", [1, 10])
def test_a_quick_run_says_that_it_is_one(demo, multiple):
    """Its task is another, and so may be who is ahead."""
    sizes = {**demo[1]["sizes"], "multiple_of": multiple}
    said = [fact for fact in _facts({**demo[1], "sizes": sizes}) if "quick run" in fact]
    assert said == [
        "a quick run: an easier task (multiples of 10) and little data; who is ahead in it says nothing"
    ] * (multiple == 10)


def test_default_folder_and_quick_sizes():
    assert DemoConfig().output_dir == "runs/demo" and DemoConfig().seed == 0
    assert run.QUICK.test_traces < run.FULL.test_traces


@pytest.mark.full
def test_figure_6_of_a_finished_demo(demo, tmp_path, monkeypatch):
    """One step of the five updates by the real trainer, from the reward model of the demo."""
    monkeypatch.setattr(TransformersEngine, "__call__", noisy_engine)
    scale = fig6.Scale(
        steps=1, minibatch_size=16, prompts=8, num_generations=4, held_out=8, eval_steps=1,
        learning_rate=2e-4, gae_coef=0.1,
    )  # fmt: skip
    config = fig6.Fig6Config(demo=str(demo[0]), output_dir=str(tmp_path / "fig6"))
    results = fig6.reproduce(config, progress=False, scale=scale)
    runs = {name: results["variants"][name]["seeds"]["0"] for name in fig6.VARIANTS}
    for curves in runs.values():
        assert [(point["step"], point["responses"]) for point in curves["held_out"]] == [(0, 8), (1, 8)]
        assert curves["step"] == [1] and 0 <= curves["policy"]["rollout_accuracy"][0] <= 1
    assert "rm_loss" not in runs["frozen"]["reward_model"]
    losses = {runs[name]["reward_model"]["rm_loss"][0] for name in fig6.VARIANTS if name != "frozen"}
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    start = load_file(demo[0] / "reward-ipvrm" / "model.safetensors")
    ends = [load_file(tmp_path / "fig6" / f"{n}-0" / "reward_model" / "model.safetensors") for n in runs]
    same = [all(torch.equal(start[key], end[key]) for key in start) for end in ends]
    assert same == [True, False, False, False, False]  # frozen alone
    assert (tmp_path / "fig6" / "report.md").exists()
