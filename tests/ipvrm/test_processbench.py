"""`ipvrm eval processbench` on small files and a random model: protocols, long items, resuming, errors."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from runs import interrupted_at, ruled_out

from ipvrm import IpvrmError
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row
from ipvrm.data.steps import RULES
from ipvrm.demo.base_model import make_model, make_tokenizer
from ipvrm.evaluate import processbench
from ipvrm.evaluate.processbench import EvalConfig, evaluate, read_items
from ipvrm.evaluate.processbench_tables import f1_tables
from ipvrm.evaluate.scoring import score_solutions
from ipvrm.evaluate.thresholds import f1_of_hits, hits, sweep
from ipvrm.models.causal_lm import save_model, template_hash, weights_hash
from ipvrm.models.reward_model import RewardModel, RewardModelInfo, write_info

DATA = Path(os.environ.get("IPVRM_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random reward model over the demo's characters; (its folder, the model)."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name, seed in (("reference", 0), ("model", 1)):
        save_model(make_model(tokenizer, 32, 2, seed), folder / name)
        tokenizer.save_pretrained(folder / name)
    info = RewardModelInfo(
        "ipvrm",
        10.0,
        5.0,
        "../reference",
        str(folder / "reference"),
        weights_hash(folder / "reference"),
        template_hash(tokenizer),
        {},
    )
    write_info(folder / "model", info)
    return folder / "model"


def write_subset(path, count, seed):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i in range(count):
        num_steps = int(torch.randint(1, 6, (1,), generator=generator))
        numbers = torch.randint(10, 99, (num_steps, 2), generator=generator).tolist()
        label = int(torch.randint(-1, num_steps, (1,), generator=generator)) if i > 1 else i - 1
        steps = [f"{a}+{b}={a + b}" for a, b in numbers]
        items.append({"id": f"{path.stem}-{i}", "problem": f"{i}+1", "steps": steps, "label": label})
    path.write_text(json.dumps(items))
    return items


@pytest.fixture
def config(run_folder, tmp_path):
    write_subset(tmp_path / "gsm8k.json", 30, 0)
    write_subset(tmp_path / "math.json", 24, 1)
    return EvalConfig(
        model=str(run_folder),
        data=(str(tmp_path / "gsm8k.json"), str(tmp_path / "math.json")),
        output_dir=str(tmp_path / "out"),
        step_format="{step}",
        step_separator="; ",
        bootstrap_resamples=200,
    )


def test_scores_are_sums_of_log_ratios_over_the_characters_of_a_step(run_folder):
    """One token per character here, so steps can be cut by hand."""
    reward_model = RewardModel.from_pretrained(run_folder)
    steps = ["12+3=15", "1+1=2", "9"]
    scored = score_solutions(reward_model, [("7+7", steps)], step_format="{step}", step_separator="; ")[0]
    response = tokenize(
        [Row("a:1", "7+7", "12+3=15; 1+1=2; 9")], reward_model.tokenizer, max_length=None
    ).responses[0]
    td = 10.0 * reward_model.token_log_ratios([response])[0].double()
    assert len(td) == 18 and scored.num_tokens == 18 + 5  # end of turn; <user> 7 + 7 <assistant>
    expected = [td[:9].sum(), td[9:16].sum(), td[16:17].sum()]
    assert scored.by_rule["step"] == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert scored.by_rule["mean"][1] == pytest.approx(float(td[:16].mean()), abs=1e-6)
    assert scored.by_rule["prefix"][2] == pytest.approx(float(td[:17].sum()), abs=1e-6)


def test_scores_do_not_depend_on_the_batch(run_folder):
    reward_model = RewardModel.from_pretrained(run_folder)
    items = [("7+7", ["1+1=2"] * n) for n in (5, 1, 3)]
    together = score_solutions(reward_model, items)
    for item, scores in zip(items, together, strict=True):
        alone = score_solutions(reward_model, [item])[0]
        assert scores.by_rule["step"] == pytest.approx(alone.by_rule["step"], abs=1e-4)
        assert scores.num_steps == len(item[1])


def test_both_protocols_and_the_files(config, capsys):
    results = evaluate(config)
    shown = capsys.readouterr().out
    assert "transfer: threshold chosen on gsm8k" in shown and "F1 oracle" in shown and "always_none" in shown
    assert "math: 24 solutions" in shown and "…" not in shown  # fits 80 columns
    out = Path(config.output_dir)
    assert json.loads((out / "results.json").read_text())["subsets"] == results["subsets"]
    items = {name: read_items(f"{out.parent}/{name}.json") for name in ("gsm8k", "math")}
    stored = {name: pq.read_table(out / f"items-{name}.parquet").to_pylist() for name in items}
    for rule in RULES:
        chosen, _ = sweep([r[rule] for r in stored["gsm8k"]], [i.label for i in items["gsm8k"]])
        for name in items:
            labels, scores = [i.label for i in items[name]], [r[rule] for r in stored[name]]
            best, f1 = sweep(scores, labels)
            entries = results["subsets"][name]["rules"][rule]
            assert entries["oracle"]["f1"] == pytest.approx(f1.f1)
            assert entries["transfer"]["tau"] == chosen.tau  # gsm8k's, on every subset
            at_chosen = f1_of_hits(hits(scores, labels, chosen.score), labels)
            assert entries["transfer"]["f1"] == pytest.approx(at_chosen.f1)
            assert entries["transfer"]["f1"] <= entries["oracle"]["f1"] + 1e-12
            assert entries["oracle"]["f1_interval"][0] <= f1.f1 <= entries["oracle"]["f1_interval"][1]
            for protocol in ("transfer", "oracle"):  # the parquet's predictions give the table's accuracy
                right = [r[f"{rule}_{protocol}"] == r["label"] for r in stored[name] if r["label"] == -1]
                assert sum(right) / len(right) == pytest.approx(entries[protocol]["accuracy_correct"])
    mean = results["mean_f1"]["step"]["oracle"]
    assert mean == pytest.approx(
        sum(s["rules"]["step"]["oracle"]["f1"] for s in results["subsets"].values()) / 2
    )


@pytest.mark.slow
def test_long_solutions_count_as_missed_and_are_reported(config):
    whole = evaluate(config, progress=False)
    short = dataclasses.replace(config, max_length=40, output_dir=config.output_dir + "-short")
    results = evaluate(short, progress=False)
    rows = pq.read_table(Path(short.output_dir) / "items-math.parquet").to_pylist()
    lost = [row for row in rows if row["step"] is None]
    assert 0 < len(lost) < len(rows) == results["subsets"]["math"]["items"] == 24
    assert results["subsets"]["math"]["too_long"] == len(lost)
    assert any(f"{len(lost)} of 24 solutions have more than 40 tokens" in note for note in results["notes"])
    assert all(row["step_oracle"] is None for row in lost)
    assert whole["subsets"]["math"]["too_long"] == 0
    entry = results["subsets"]["math"]["rules"]["step"]["oracle"]
    right = sum(row["step_oracle"] == -1 for row in rows if row["label"] == -1)
    assert entry["accuracy_correct"] == pytest.approx(right / results["subsets"]["math"]["correct"])


@pytest.mark.slow
def test_unusable_items_count_as_missed_and_are_named(config, capsys):
    """Half a surrogate pair, and a solution that the template refuses: the others' scores do not change."""
    path = Path(config.data[1])
    plain = evaluate(dataclasses.replace(config, output_dir=config.output_dir + "-plain"), progress=False)
    items = json.loads(path.read_text())
    items[3]["steps"][0] += "\ud83d"
    items[11]["problem"] = "\ud83d" + items[11]["problem"]
    path.write_text(json.dumps(items))
    results = evaluate(config, progress=True)
    subset = results["subsets"]["math"]
    assert [(e["item"], e["id"]) for e in subset["unusable"]] == [(4, "math-3"), (12, "math-11")]
    assert subset["too_long"] == 0
    note = next(
        note for note in results["notes"] if note.startswith("math: 2 of 24 solutions cannot be scored")
    )
    assert "\n  math-3: text that is not Unicode: half a surrogate pair (\\ud83d)" in note
    assert "math-11: text that is not Unicode" in " ".join(capsys.readouterr().out.split())
    rows = pq.read_table(Path(config.output_dir) / "items-math.parquet").to_pylist()
    assert [row["id"] for row in rows if row["unusable"]] == ["math-3", "math-11"]
    assert all(row["step"] is None and row["step_oracle"] is None for row in rows if row["unusable"])
    before = pq.read_table(Path(config.output_dir + "-plain") / "items-math.parquet").to_pylist()
    kept = [i for i, row in enumerate(rows) if not row["unusable"]]
    assert all(rows[i]["prefix"] == pytest.approx(before[i]["prefix"], abs=1e-4) for i in kept)
    entry = subset["rules"]["step"]["oracle"]
    right = sum(row["step_oracle"] == -1 for row in rows if row["label"] == -1)
    assert entry["accuracy_correct"] == pytest.approx(right / subset["correct"])
    assert plain["subsets"]["math"]["unusable"] == []


NO_ITEM = "\ud800 is no JSON"
UNUSABLE = [  # (what is changed in item i, the reason, its label as far as it is known)
    ({"steps": []}, "`steps` must be a list of texts; got []", True),
    ({"steps": None}, "`steps` must be a list of texts; got None", True),
    ({"steps": ["a", None]}, "`steps` must be a list of texts; got ['a', None]", True),
    ({"steps": "1+1=2"}, "`steps` must be a list of texts; got '1+1=2'", True),
    ({"problem": 7}, "`problem` must be text; got 7", True),
    ({"problem": "\ud83d"}, "text that is not Unicode: half a surrogate pair (\\ud83d)", True),
    ({"id": "\ud83d"}, "text that is not Unicode: half a surrogate pair (\\ud83d)", True),
    ({"id": math.inf}, "`id` holds NaN or an infinity, which JSON does not have", True),
    ({"generator": ["b"]}, "`generator` must be text; got ['b']", True),
    ({"final_answer_correct": "yes"}, "`final_answer_correct` must be true or false; got 'yes'", True),
    ({"label": 99}, "steps, counted from 0; got 99", True),
    ({"label": None}, "steps, counted from 0; got None", False),
    ({"label": math.nan}, "steps, counted from 0; got nan", False),
    ({"label": "0"}, "steps, counted from 0; got '0'", False),
    ({"label": True}, "steps, counted from 0; got True", False),
    ({"label": 0.5}, "steps, counted from 0; got 0.5", False),
    ({"label": -2}, "steps, counted from 0; got -2", False),
    (["p"], "must be an object with named columns; got list", False),
    (NO_ITEM, "not valid JSON", False),
]


def damage(path, first=4):
    """Items from `first` on made unusable, as JSON lines at a new path; (that, what was written there)."""
    items = json.loads(path.read_text())
    lines = [json.dumps(item) for item in items]
    for i, (change, *_) in enumerate(UNUSABLE, first):
        if isinstance(change, dict):
            lines[i] = json.dumps(items[i] | change)
        else:
            lines[i] = change.encode("utf-8", "replace").decode() if change is NO_ITEM else json.dumps(change)
    target = path.with_suffix(".jsonl")
    target.write_text("\n".join(lines) + "\n")
    return target, items


def in_parts_of_8(monkeypatch):
    """Each scored at once."""
    monkeypatch.setattr(processbench, "PART_ITEMS", 8)
    monkeypatch.setattr(processbench, "portion", lambda total, most: most)


def test_one_unusable_item_of_any_kind_counts_as_missed(config, monkeypatch, capsys):
    """F1 by hand from the predictions of the others; also behind an interruption among the bad ones."""
    from ipvrm.evaluate import scoring

    in_parts_of_8(monkeypatch)
    path, items = damage(Path(config.data[0]))
    config = dataclasses.replace(config, data=(str(path), config.data[1]))
    calls = interrupted_at(monkeypatch, scoring, "score_solutions", 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, progress=False)
    results = evaluate(config)
    assert calls[:2] == [4, 0] and len(list(Path(config.output_dir).glob("scores/gsm8k/*.parquet"))) == 4
    subset, shown = results["subsets"]["gsm8k"], " ".join(capsys.readouterr().out.split())
    assert len(subset["unusable"]) == len(UNUSABLE) and subset["items"] == len(items) == 30
    for entry, (number, (change, reason, _)) in zip(subset["unusable"], enumerate(UNUSABLE, 5), strict=True):
        named = isinstance(change, dict) and "id" not in change
        assert entry["item"] == number and entry["id"] == (f"gsm8k-{number - 1}" if named else str(number))
        assert reason in entry["reason"]
    assert "19 of 30 solutions cannot be scored; they count as missed: gsm8k-4: `steps` must" in shown
    assert "... and 9 more" in shown and "8 without a label" in shown
    rows = pq.read_table(Path(config.output_dir) / "items-gsm8k.parquet").to_pylist()
    labels = [item["label"] for item in items]
    halves = {-1: [], 0: []}  # of the correct, of the erroneous: whether each is found
    for i, row in enumerate(rows):
        bad = UNUSABLE[i - 4] if 4 <= i < 4 + len(UNUSABLE) else None
        if bad is None:
            halves[min(labels[i], 0)].append(row["step_oracle"] == labels[i])
        else:
            assert row["step_oracle"] is None and row["unusable"]
            of = [0] if bad[0] == {"label": 99} else [min(labels[i], 0)] if bad[2] else [-1, 0]
            for half in of:
                halves[half].append(False)
    correct, erroneous = (sum(found) / len(found) for found in halves.values())
    entry = subset["rules"]["step"]["oracle"]
    assert entry["accuracy_correct"] == pytest.approx(correct)
    assert entry["accuracy_erroneous"] == pytest.approx(erroneous)
    assert entry["f1"] == pytest.approx(2 * correct * erroneous / (correct + erroneous))
    assert (subset["correct"], subset["erroneous"], subset["unlabelled"]) == (
        len(halves[-1]) - 8, len(halves[0]) - 8, 8,
    )  # fmt: skip
    assert results["transfer_from"] == "gsm8k" and results["subsets"]["math"]["unusable"] == []


@pytest.mark.slow
def test_a_float_label_a_missing_id_and_two_of_one_name(config):
    """What pandas makes of a column with a gap is read; two unusable items of one name are two."""
    path = Path(config.data[1])
    items = json.loads(path.read_text())
    plain = evaluate(dataclasses.replace(config, output_dir=config.output_dir + "-plain"), progress=False)
    for item in items:
        item["label"] = float(item["label"])
    items[5]["id"] = math.nan
    path.write_text(json.dumps(items))
    results = evaluate(config, progress=False)
    assert results["subsets"]["math"]["rules"] == plain["subsets"]["math"]["rules"]
    assert pq.read_table(Path(config.output_dir) / "items-math.parquet")["id"][5].as_py() == "6"
    items[7] |= {"id": "math-9", "steps": []}
    items[9]["steps"] = []
    path.write_text(json.dumps(items))
    results = evaluate(dataclasses.replace(config, output_dir=config.output_dir + "-two"), progress=False)
    subset = results["subsets"]["math"]
    assert [entry["id"] for entry in subset["unusable"]] == ["math-9"] * 2 and subset["too_long"] == 0


@pytest.mark.slow
def test_scores_that_are_no_numbers(config, monkeypatch):
    """Of one item: missed. Of all: a broken model, which is one line."""
    path, tokenizer = Path(config.data[1]), make_tokenizer()
    items = json.loads(path.read_text())
    items[3]["steps"][0] += "-"  # no other has it
    path.write_text(json.dumps(items))
    with monkeypatch.context() as patch:
        ruled_out(patch, tokenizer.convert_tokens_to_ids("-"))
        results = evaluate(config, progress=False)
    (unusable,) = results["subsets"]["math"]["unusable"]
    assert (unusable["item"], unusable["id"]) == (4, "math-3")
    assert unusable["reason"].startswith("the log-probability under the model of response token ")
    ruled_out(monkeypatch, tokenizer.eos_token_id, ("model", "reference"))
    with pytest.raises(
        IpvrmError, match=r"math.json: no solution can be scored; math-0: the log-prob.* is -inf"
    ):
        evaluate(
            dataclasses.replace(config, data=config.data[1:], output_dir=config.output_dir + "-b"),
            progress=False,
        )


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_half_written_part_heals(config, monkeypatch, damage):
    in_parts_of_8(monkeypatch)
    first = evaluate(config, progress=False)
    parts = sorted(Path(config.output_dir).glob("scores/math/part-*.parquet"))
    whole = parts[1].read_bytes()
    if damage == "other":
        pq.write_table(pq.read_table(parts[1]).slice(0, 3), parts[1])
    else:
        parts[1].write_bytes(whole[: len(whole) // 2] if damage == "half" else b"")
    from ipvrm.evaluate import scoring

    original, calls = scoring.score_solutions, []
    monkeypatch.setattr(
        scoring, "score_solutions", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k)
    )
    again = evaluate(config, progress=False)
    assert calls == [8]
    assert again["subsets"] == first["subsets"] and pq.read_table(parts[1]).num_rows == 8


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lines", "gz", "folder", "parquet"])
def test_every_form_of_the_benchmark_scores_alike(config, tmp_path, form):
    import gzip

    whole = evaluate(config, progress=False)
    data = []
    for path in map(Path, config.data):
        items = json.loads(path.read_text())
        lines = "".join(json.dumps(item) + "\n" for item in items)
        folder = tmp_path / form
        folder.mkdir(exist_ok=True)
        if form == "lines":
            target = folder / f"{path.stem}.jsonl"
            target.write_text(lines)
        elif form == "gz":
            target = folder / f"{path.stem}.jsonl.gz"
            target.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode()))
        elif form == "parquet":
            target = folder / f"{path.stem}.parquet"
            pq.write_table(pyarrow.Table.from_pylist(items), target)
        else:
            target = folder / path.stem
            target.mkdir()
            (target / "a.json").write_text(json.dumps(items[:5]))
            (target / "b.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items[5:]))
        data.append(str(target))
    found = evaluate(
        dataclasses.replace(config, data=tuple(data), output_dir=config.output_dir + form), progress=False
    )
    assert found["subsets"] == whole["subsets"]


@pytest.mark.slow
def test_interrupted_run_keeps_its_scores(config, monkeypatch):
    in_parts_of_8(monkeypatch)
    from ipvrm.evaluate import scoring

    calls = interrupted_at(monkeypatch, scoring, "score_solutions", 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, progress=False)
    resumed = evaluate(config, progress=False)
    assert calls == [8, 8, 8, 8, 6, 8, 8, 8]  # two parts kept; the third again, then the rest
    afresh = evaluate(dataclasses.replace(config, output_dir=config.output_dir + "-afresh"), progress=False)
    assert resumed["subsets"] == afresh["subsets"]
    assert not list(Path(config.output_dir).rglob("*.tmp"))


def test_stored_scores_of_other_settings_are_refused(config):
    evaluate(config, progress=False)
    with pytest.raises(IpvrmError, match=r"step_separator \('; ' then, ' ;' now\).*choose another output"):
        evaluate(dataclasses.replace(config, step_separator=" ;"), progress=False)


def test_a_bad_step_format_leaves_the_output_folder_free(config):
    with pytest.raises(IpvrmError, match="step_format"):
        evaluate(dataclasses.replace(config, step_format="{step"), progress=False)
    evaluate(config, progress=False)


@pytest.mark.parametrize("name", ["max_length", "batch_tokens", "limit", "bootstrap_resamples"])
def test_sizes_below_one_are_refused(config, name):
    with pytest.raises(IpvrmError, match=f"--{name} must be at least 1; got 0"):
        evaluate(dataclasses.replace(config, **{name: 0}), progress=False)


def test_use_cpu_scores_there_although_there_is_an_accelerator(config, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: asked.append(1))
    config = dataclasses.replace(config, data=config.data[:1], limit=4, use_cpu=True)
    evaluate(config, progress=False)
    assert not asked
    served = dict.fromkeys(("engine", "reference_engine"), "http://127.0.0.1:9/v1")
    with pytest.raises(IpvrmError, match="--use_cpu has no effect on --engine"):
        evaluate(dataclasses.replace(config, **served), progress=False)


def test_without_the_transfer_subset_the_table_says_so(config):
    results = evaluate(dataclasses.replace(config, data=config.data[1:]), progress=False)
    assert results["subsets"]["math"]["rules"]["step"]["transfer"] is None
    assert results["subsets"]["math"]["rules"]["step"]["oracle"]["f1"] > 0
    assert any("no usable subset 'gsm8k'" in note for note in results["notes"])
    assert [table.row_count for table in f1_tables(results)] == [7]


@pytest.mark.slow
def test_a_folder_is_all_its_subsets(config, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for path in map(Path, config.data):
        path.rename(folder / path.name)
    results = evaluate(dataclasses.replace(config, data=(str(folder),)), progress=False)
    assert list(results["subsets"]) == ["gsm8k", "math"] and results["transfer_from"] == "gsm8k"


def test_a_subset_of_the_hub_is_named_after_its_split(config, tmp_path, monkeypatch):
    """The threshold is transferred from its gsm8k, and its math is not its omnimath."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in map(Path, config.data):
        path.rename(folder / path.name)
    (folder / "omnimath.json").write_bytes((folder / "math.json").read_bytes())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    given = ("someone/bench:gsm8k", "someone/bench:math")
    results = evaluate(dataclasses.replace(config, data=given), progress=False)
    assert list(results["subsets"]) == ["gsm8k", "math"] and results["transfer_from"] == "gsm8k"
    assert [subset["items"] for subset in results["subsets"].values()] == [30, 24]


@pytest.mark.slow
def test_generators_calibration_and_the_released_grid(config, run_folder, capsys):
    """Each against its definition, from the scores in the parquet file."""
    path = Path(config.data[0])
    items = json.loads(path.read_text())
    for i, item in enumerate(items):
        item |= {"generator": "ab"[i % 2], "final_answer_correct": i % 3 == 0}
    path.write_text(json.dumps(items))
    results = evaluate(config)
    shown = capsys.readouterr().out
    assert "Calibration of sigmoid" in shown and "By generator" in shown and "release: the best of" in shown
    rows = pq.read_table(Path(config.output_dir) / "items-gsm8k.parquet").to_pylist()
    subset, labels = results["subsets"]["gsm8k"], [row["label"] for row in rows]

    odd = subset["generators"]["b"]
    assert odd["erroneous"] + odd["correct"] == 15 and results["subsets"]["math"]["generators"] == {}
    for protocol in ("transfer", "oracle"):
        hit = [row[f"mean_{protocol}"] == row["label"] for row in rows]
        of_odd = f1_of_hits(np.array(hit[1::2]), labels[1::2]).f1
        assert odd["mean"][protocol] == pytest.approx(of_odd)

    p = [1 / (1 + math.exp(-row["mean"][-1])) for row in rows]
    brier = np.mean([(x - (i % 3 == 0)) ** 2 for i, x in enumerate(p)])
    assert subset["calibration"]["brier"] == pytest.approx(brier) and subset["calibration"]["count"] == 30
    assert subset["calibration"]["outcome"] == pytest.approx(1 / 3)
    of_math = results["subsets"]["math"]["calibration"]["outcome"]  # without the field: all steps right
    assert of_math == pytest.approx(results["subsets"]["math"]["correct"] / 24)

    for rule, scale in (("step", 1.0), ("mean", math.sqrt(10.0))):
        best = (-1.0, None)
        for tau in np.linspace(-1, 1, 1000):  # the script's own loop
            found = [
                next((k for k, x in enumerate(row[rule]) if 1 / (1 + math.exp(-x / scale)) < tau), -1)
                for row in rows
            ]
            f1 = f1_of_hits(np.array(found) == labels, labels).f1
            best = max(best, (f1, -tau))
        assert subset["rules"][rule]["release"]["f1"] == pytest.approx(best[0])
        assert subset["rules"][rule]["release"]["tau"] == pytest.approx(-best[1])


def test_no_calibration_where_the_mean_value_is_no_log_odds(config, run_folder, capsys):
    """EndoRM end to end; Q-RM and the others from the scores of that."""
    config = dataclasses.replace(config, limit=6, objective="endo_rm", use_cpu=True)
    results = evaluate(config)
    shown = " ".join(capsys.readouterr().out.split())
    reason = "no calibration: the mean value under {} is no log-odds of the outcome"
    assert reason.format("endo_rm") in shown and "Calibration of sigmoid" not in shown
    stored = json.loads((Path(config.output_dir) / "results.json").read_text())["subsets"]
    assert [subset["calibration"] for subset in stored.values()] == [None, None]
    assert results["subsets"]["gsm8k"]["rules"]["mean"]["oracle"]["f1"] >= 0
    items = {"gsm8k": read_items(config.data[0], 6)}
    scored = {"gsm8k": pq.read_table(Path(config.output_dir) / "items-gsm8k.parquet").to_pylist()}
    info = RewardModel.from_pretrained(run_folder, device="cpu").info
    for objective in ("q_rm", "dpo", "implicit_prm", "ipvrm"):
        found = processbench.summarise(config, items, scored, dataclasses.replace(info, objective=objective))
        left_out = found["subsets"]["gsm8k"]["calibration"] is None
        assert left_out == (objective == "q_rm") == (reason.format(objective) in found["notes"])


def test_trls_stepwise_format(tmp_path):
    """`prompt`, `completions` (a step each), `labels` (whether it is right)."""
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, False, True]},
        {"prompt": "p", "completions": ["a"], "labels": [True]},
    ]
    path = tmp_path / "stepwise.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(i.problem, i.steps, i.label, i.right) for i in read_items(path)] == [
        ("p", ("a", "b", "c"), 1, False), ("p", ("a",), -1, True),
    ]  # fmt: skip
    whole = read_items(path)
    numbers = [row | {"labels": [int(right) for right in row["labels"]]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in numbers))
    assert read_items(path) == whole
    pq.write_table(pyarrow.Table.from_pylist(numbers), tmp_path / "stepwise.parquet")
    assert read_items(tmp_path / "stepwise.parquet") == whole


@pytest.mark.parametrize(
    "labels", [[True], [True, 2], [1, -1], [1, 0.0], [1, "0"], [True, None], [1, math.nan], 1, "10"]
)
def test_other_labels_of_steps_are_refused(tmp_path, labels):
    rows = [{"prompt": "p", "completions": ["a"], "labels": [True]}]
    rows.append({"prompt": "p", "completions": ["a", "b"], "labels": labels})
    path = tmp_path / "stepwise.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = read_items(path)[1]
    assert bad.label is None and "`labels` must hold true or false (or 1 or 0) for each" in bad.unusable


def test_a_subset_of_one_kind_has_no_f1(config, tmp_path):
    items = [item | {"label": -1} for item in json.loads((tmp_path / "math.json").read_text())]
    (tmp_path / "math.json").write_text(json.dumps(items))
    results = evaluate(dataclasses.replace(config, limit=5), progress=False)
    assert results["subsets"]["math"]["rules"]["prefix"] == dict.fromkeys(("transfer", "oracle", "release"))
    assert results["subsets"]["math"]["baselines"]["random_step"]["f1"] is None
    assert results["subsets"]["gsm8k"]["items"] == 5
    assert any("math: all of its solutions are of one kind" in note for note in results["notes"])


@pytest.mark.parametrize("items", [[], [{"problem": "p", "steps": [], "label": -1}], [["p"], {"id": 1}]])
def test_a_file_without_a_usable_item_is_one_line(tmp_path, items):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(items))
    with pytest.raises(IpvrmError, match=r"bad.json: must hold items of problem, steps, label") as caught:
        read_items(path)
    assert len(str(caught.value).splitlines()) == 1 and (not items or "item 1: " in str(caught.value))


@pytest.mark.skipif(not (DATA / "processbench").is_dir(), reason=f"no processbench folder in {DATA}")
def test_real_files_are_read_whole():
    items = {name: read_items(DATA / "processbench" / f"{name}.json") for name in ("gsm8k", "math")}
    assert {name: len(found) for name, found in items.items()} == {"gsm8k": 400, "math": 1000}
    assert sum(item.label == -1 for item in items["gsm8k"]) == 193
    assert sum(item.label == -1 for item in items["math"]) == 406


def test_what_a_killed_run_has_left_is_deleted(config):
    for name in (".items-gsm8k.parquet.9.tmp", ".results.json.9.tmp"):
        (Path(config.output_dir)).mkdir(exist_ok=True)
        (Path(config.output_dir) / name).touch()
    evaluate(config, progress=False)
    assert not list(Path(config.output_dir).rglob(".*"))
