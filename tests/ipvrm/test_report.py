"""`ipvrm report`, the model card, and what trackers are sent."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from runs import fake_tensorboard, write_jsonl

from ipvrm import IpvrmError, RewardConfig, train_reward_model
from ipvrm.cli import main
from ipvrm.models.card import write_card
from ipvrm.view.report import ReportConfig, report
from ipvrm.view.runs import find_runs


def make_run(folder, records, *, done=True, **settings):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **settings}))
    write_jsonl(folder / "metrics.jsonl", records)
    if done:
        (folder / "results.json").write_text(json.dumps({"steps": 3, "seconds": 12.0}))
    return folder


def records(*losses, start=1):
    return [
        {"step": n, "loss": loss, "note": "text", "seconds_total": 2.0 * n}
        for n, loss in enumerate(losses, start)
    ]


@pytest.fixture
def runs(tmp_path):
    home = tmp_path / "runs"
    make_run(home / "a", records(3.0, 2.0, 1.0), seed=0, beta=10.0, model="m")
    make_run(home / "b", records(3.5, math.nan, 1.5), seed=1, beta=10.0, model="m")
    going = records(4.0)
    going[0]["extra"] = 7.0
    make_run(home / "deep" / "c", [*going, '{"step": 2, "lo'], done=False, seed=0, beta=0.05, model="m")
    (home / "a" / "checkpoint-2").mkdir()
    write_jsonl(home / "a" / "checkpoint-2" / "metrics.jsonl", records(9.0))  # no run of its own
    entry = {"f1": 0.5, "f1_interval": [0.4, 0.6], "accuracy_erroneous": 0.45, "accuracy_correct": 0.5625}
    rules = {"step": {"transfer": None, "oracle": entry}}
    (home / "a" / "pb").mkdir()
    (home / "a" / "pb" / "results.json").write_text(json.dumps({"subsets": {"gsm8k": {"rules": rules}}}))
    return home


@pytest.mark.slow
def test_report_of_several_runs(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stem = tmp_path / "out" / "r"
    assert main(["report", str(runs), "--output", str(stem)]) == 0
    page = (tmp_path / "out" / "r.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert [(r["name"], r["state"]) for r in data["runs"]] == [
        ("a", "finished"), ("b", "finished"), ("deep/c", "not finished"),
    ]  # fmt: skip
    assert data["groups"] == [[0, 1]]  # c has another beta
    assert [m["name"] for m in data["metrics"]] == ["loss", "extra"]
    lines = data["metrics"][0]["lines"]
    assert [line["value"] for line in lines] == [[3, 2, 1], [3.5, None, 1.5], [4]]
    assert lines[0]["step"] == [1, 2, 3] and lines[0]["seconds"] == [2, 4, 6]
    assert [line["run"] for line in data["metrics"][1]["lines"]] == [2]
    tables = {table["name"]: table for table in data["tables"]}
    assert tables["settings"]["rows"] == [["beta", "10.0", "10.0", "0.05"], ["seed", "0", "1", "0"]]
    (row,) = tables["evaluations"]["rows"]
    assert row == ["pb", "gsm8k", "step", "-", "-", "50.0 (40.0-60.0)", "45.0/56.2"]
    rows = list(csv.reader((tmp_path / "out" / "r-metrics.csv").open()))
    assert ["loss", "b", "2", "4.0", ""] in rows and len(rows) == 1 + 7 + 1
    assert next(csv.reader((tmp_path / "out" / "r-runs.csv").open()))[:4] == [
        "run",
        "state",
        "steps",
        "seconds",
    ]
    written = (tmp_path / "out" / "r.md").read_text()
    assert "## Settings that differ" in written and "| beta | 10.0 | 10.0 | 0.05 |" in written
    assert (tmp_path / "out" / "r.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "50.0 (40.0-60.0)" in printed and "3 runs, 2 metrics" in printed


REAL_INPUT = Path(__file__).parents[2] / "benchmarks" / "results" / "real_input"


@pytest.mark.slow
@pytest.mark.skipif(not REAL_INPUT.exists(), reason="no checkout with results beside the tests")
def test_report_of_this_repositorys_real_input(tmp_path, capsys):
    assert main(["report", str(REAL_INPUT), "--output", str(tmp_path / "r")]) == 0
    written, page = ((tmp_path / f"r.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    stored = json.loads((REAL_INPUT / "pb" / "results.json").read_text())["subsets"]["math"]["rules"]["mean"]
    assert f"| pb | math | mean | {100 * stored['transfer']['f1']:.1f} (" in written
    assert "| rm | finished | 17 |" in written and "| smollm2/rm | " in written
    assert "not defined" not in written and "2 runs, " in capsys.readouterr().out
    assert str(REAL_INPUT) not in page


@pytest.mark.skipif(not REAL_INPUT.exists(), reason="no checkout with results beside the tests")
def test_inspect_of_the_real_input_needs_the_weights_that_are_not_kept(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"problem": "p", "steps": ["a"], "label": -1}])
    command = ["inspect", "--input", str(source), "--output", str(tmp_path / "x.html")]
    assert main([*command, "--model", str(REAL_INPUT / "rm")]) == 2
    assert "no ipvrm_config.json; this is not a folder that `ipvrm train-rm`" in capsys.readouterr().err


def test_an_undefined_f1_is_explained(tmp_path):
    entry = {"f1": None, "f1_interval": [None, None], "accuracy_erroneous": None, "accuracy_correct": 1.0}
    (tmp_path / "pb").mkdir()
    stored = {"subsets": {"x": {"rules": {"step": {"oracle": entry}}}}}
    (tmp_path / "pb" / "results.json").write_text(json.dumps(stored))
    assert main(["report", str(tmp_path / "pb"), "--output", str(tmp_path / "r")]) == 0
    written = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "F1 -: not defined, as no solution is right or none wrong." in written


@pytest.mark.slow
def test_a_resumed_run_counts_its_time_on(tmp_path):
    lines = [
        *records(1.0, 1.0),
        *({"step": n, "loss": 1.0, "seconds_total": s} for n, s in ((3, 1.0), (4, 5.0))),
    ]
    make_run(tmp_path / "a", lines)
    (metric,) = report(ReportConfig((str(tmp_path / "a"),), str(tmp_path / "r")))["metrics"]
    assert metric["lines"][0]["seconds"] == [2, 4, 5, 9]


def test_folders_without_runs_are_refused(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    for folders, reason in (
        ((str(tmp_path / "no"),), "no such folder"),
        ((str(runs), str(tmp_path / "empty")), "empty: neither metrics.jsonl of a run nor"),
    ):
        with pytest.raises(IpvrmError, match=reason):
            find_runs(folders)
    with pytest.raises(IpvrmError, match="name at least one"):
        report(ReportConfig(()))


# ----------------------------------------------------------------------------------------- cards and trackers


def config(tiny_folder, rollouts, output, **changes):
    return RewardConfig(
        model=str(tiny_folder),
        train_data=str(rollouts),
        output_dir=str(output),
        max_steps=2,
        use_cpu=True,
        **changes,
    )


@pytest.mark.slow
def test_a_run_sends_its_log_to_a_tracker_and_writes_a_card(tiny_folder, rollouts, tmp_path, monkeypatch):
    from accelerate import tracking

    with pytest.raises(IpvrmError, match="the package trackio is not installed here; pip install trackio"):
        monkeypatch.setattr(tracking, "_available_trackers", [])
        train_reward_model(
            config(tiny_folder, rollouts, tmp_path / "no", report_to="trackio"), progress=False
        )
    logged = fake_tensorboard(monkeypatch)
    output = tmp_path / "rm"
    train_reward_model(config(tiny_folder, rollouts, output, report_to="tensorboard"), progress=False)
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and log[1]["seconds_total"] >= log[0]["seconds_total"] > 0
    sent = {entry[0::2]: entry[1] for entry in logged if len(entry) == 3}
    assert sent["loss", 2] == log[1]["loss"] and ("grad_norm", 1) in sent
    assert logged[0] == ("folder", str(output / "ipvrm")) and logged[-1] == "closed"
    assert dict(logged[1:2])["settings"]["beta"] == 10.0

    card = (output / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    about = yaml.safe_load(header)
    assert about == {
        "library_name": "transformers",
        "tags": ["ipvrm", "reward-model", "process-reward-model", "arxiv:2604.13197"],
    }  # the base is a folder, which is no name of the Hub
    for row in (
        "| objective | ipvrm |",
        "| beta | 10 |",
        "| margin | 5 |",
        "| rows | 44 |",
        "| base | tiny |",
    ):
        assert row in text
    assert f"| loss | {log[1]['loss']:.4g} |" in text and "| train data | train.jsonl |" in text
    assert str(tmp_path) not in card and str(tiny_folder.parent) not in card


def test_a_card_names_a_base_of_the_hub(tmp_path):
    about = {"name": "N", "summary": "S", "usage": "U", "tags": ("t",)}
    write_card(
        tmp_path,
        base="Qwen/Qwen3-0.6B",
        settings={"a": 0.5, "b": None, "c": [1]},
        metrics={"x": math.nan},
        **about,
    )
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Qwen/Qwen3-0.6B"
    assert "| a | 0.5 |" in text and "| b |" not in text and "| c |" not in text and "Metrics" not in text
