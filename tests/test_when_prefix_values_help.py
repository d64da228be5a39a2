"""The study "When do prefix values help?" (benchmarks/studies/when_prefix_values_help.py)."""

import hashlib
import re
from random import Random
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.studies import when_prefix_values_help as study
from benchmarks.studies import when_prefix_values_help_report as report
from ipvrm.data.steps import render_steps, step_of_token
from ipvrm.demo import rollouts
from ipvrm.demo.arithmetic import STEP_SEPARATOR, TRAINING_FORMAT, make_problem, noisy_solution
from ipvrm.demo.base_model import LEARNT_OVER, make_tokenizer, prompt_text, train_base
from ipvrm.demo.settings import Sizes
from ipvrm.models import reference
from ipvrm.run_folder import read_json, write_json

MINI = Sizes(
    hidden_size=32,
    num_layers=1,
    base_max_steps=4,
    base_batch=4,
    train_problems=8,
    validation_traces=24,
    test_traces=24,
    best_of_problems=4,
    best_of_samples=4,
    best_of_n=(2, 4),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The one of 1x, and the one of 8x as it is read from a model's folder."""
    from transformers import AutoTokenizer

    long = make_tokenizer()
    study.lengthen(long)
    long.save_pretrained(folder := tmp_path_factory.mktemp("long"))
    return make_tokenizer(), AutoTokenizer.from_pretrained(folder)


def test_the_long_tokenizer_makes_eight_tokens_of_one_and_says_the_same(tokenizers):
    short, long = tokenizers
    for seed in range(20):
        problem = make_problem(Random(seed))
        response = noisy_solution(problem, 0.3, Random(seed))
        ids = long(response, add_special_tokens=False)["input_ids"]
        once = short(response, add_special_tokens=False)["input_ids"]
        assert ids[::8] == once and len(ids) == 8 * len(once)
        filler = [ids[i : i + 7] for i in range(1, len(ids), 8)]
        assert filler == [long.convert_tokens_to_ids([*study.FILLER])] * len(once)
        prompt = prompt_text(problem)
        assert len(long(prompt, add_special_tokens=False)["input_ids"]) == 2 + 8 * len(problem.text)


def test_the_long_tokenizer_keeps_the_ids_of_the_short_one(tokenizers):
    short, long = (tokenizer.get_vocab() for tokenizer in tokenizers)
    assert {token: long[token] for token in short} == short
    assert sorted(long.values()) == list(range(len(short) + 7))


def test_a_long_step_has_eight_times_the_tokens_of_the_short_one(tokenizers):
    steps = ["47+25=72", "72-13=59"]
    text, ends = render_steps(steps, "{step}", STEP_SEPARATOR)
    counts = []
    for tokenizer in tokenizers:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        counts.append(torch.bincount(step_of_token(offsets, ends)))
    assert counts[1].tolist() == (8 * counts[0]).tolist() == [8 * 9, 8 * 8]


class Constant(torch.nn.Module):
    """A model whose loss is always 0.1 nats a token."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, **inputs):
        return SimpleNamespace(loss=0.1 + 0 * self.layer(self.embedding.weight).sum())


def test_a_base_model_has_learnt_by_its_loss_per_character(tokenizers):
    """0.1 nats a character are few enough, and the rate falls early; 0.8 are not."""
    steps = [
        train_base(Constant(), tokenizer, max_steps=100, batch_size=1, multiple_of=1, seed=0)[0]
        for tokenizer in tokenizers
    ]
    assert steps[0] == LEARNT_OVER + 100 // 5 + 1 and steps[1] > 95


def test_every_objective_has_as_many_tries_and_the_first_is_the_papers():
    assert {len(tries) for tries in study.TRIES.values()} == {3}
    first = {objective: next(iter(tries.values())) for objective, tries in study.TRIES.items()}
    assert {objective: (c.beta, c.margin) for objective, c in first.items()} == {
        "ipvrm": (10, 5), "implicit_prm": (0.05, None), "q_rm": (0.2, 2)
    }  # fmt: skip
    for objective, tries in study.TRIES.items():
        assert {choice.objective for choice in tries.values()} == {objective}


@pytest.mark.parametrize(("per_cent", "count"), [(0, 0), (10, 41), (50, 204)])
def test_a_share_of_the_labels_is_flipped_and_no_more(per_cent, count):
    labels = [i % 3 % 2 for i in range(407)]
    given = list(labels)
    found = study.flipped(labels, per_cent, seed=3)
    assert labels == given and {*found} == {0, 1}
    assert sum(a != b for a, b in zip(labels, found, strict=True)) == count
    assert found == study.flipped(labels, per_cent, seed=3)
    assert per_cent == 0 or found != study.flipped(labels, per_cent, seed=4)


def noisy_samples(model, tokenizer, problems, *, per_problem, seed, on_batch):
    """What a base model that has learnt the task might answer."""
    rng = Random(seed)
    return [[noisy_solution(p, 0.15, rng) for _ in range(per_problem)] for p in problems]


def test_the_units_are_one_model_each_and_stand_behind_their_base_models():
    names = [unit.name for unit in study.UNITS]
    assert len({*names}) == len(names) == 2 * 3 + 4 * 3 * 10
    for number, unit in enumerate(study.UNITS):
        assert {base.name for base in unit.bases} <= {*names[:number]}
    assert study.Unit(2, "8x", 10, "ipvrm (10, 5)").name == "seed2-8x-10-ipvrm-10-5"
    assert [b.name for b in study.Unit(2, "8x", 10, study.ENDO).bases] == ["seed2-1x-base", "seed2-8x-base"]
    assert study.SIZES.train_problems * study.SIZES.rollouts_per_problem == 4096


@pytest.mark.full
def test_two_cells_of_a_base_model_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "sample", noisy_samples)
    monkeypatch.setattr(study, "LEARNT", 1e9)
    computed = []

    def counted(*arguments):
        computed.append(arguments)
        return logprobs(*arguments)

    logprobs = reference._logprobs
    monkeypatch.setattr(reference, "_logprobs", counted)
    cells = study.CELLS[0], study.CELLS[3]
    short, long = (study.units_of(0, cell) for cell in cells)
    work, output = tmp_path / "seed0", tmp_path / "output"
    study.run_units(short, tmp_path, output, MINI)
    before = {p: hashlib.sha256(p.read_bytes()).digest() for p in (work / "rollouts").iterdir()}
    kill_at = "reward-4"

    def killed(stages, name, *arguments, **options):
        if name == kill_at:
            raise KeyboardInterrupt
        return train_choice(stages, name, *arguments, **options)

    train_choice = study.train_choice
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "train_choice", killed)
        study.run_units([*short, *long], tmp_path, output, MINI)
    done = {"seed0-1x-base", "seed0-8x-base"} | {unit.name for unit in (*short, *long[:4])}
    assert {path.stem for path in (output / "units").iterdir()} == done
    kept = (output / "units" / f"{long[3].name}.json").stat().st_mtime_ns
    study.run_units([*short, *long], tmp_path, output, MINI)  # goes on where it was killed
    assert (output / "units" / f"{long[3].name}.json").stat().st_mtime_ns == kept
    for path, digest in before.items():  # what is evaluated on, and its labels, is nobody's to change
        assert hashlib.sha256(path.read_bytes()).digest() == digest
    trained = [pq.read_table(work / c.name / "rollouts" / "train.parquet").to_pylist() for c in cells]
    flips = [a["label"] != b["label"] for a, b in zip(*trained, strict=True)]
    assert sum(flips) == round(len(flips) / 10)
    assert [row["response"] for row in trained[0]] == [row["response"] for row in trained[1]]
    assert len(computed) == len(cells)  # the reference's log-probs, once for all reward models of a cell
    for c in cells:
        found = sorted((work / c.name).glob(f"reward-*/{reference.REFERENCE_FILE}"))
        assert [path.parent.name for path in found] == [f"reward-{i}" for i in range(6)]
    lengths = [
        read_json(work / c.name / "reward-0" / "results.json")["data"]["response_tokens"] for c in cells
    ]
    assert lengths[1] - len(trained[0]) == 8 * (lengths[0] - len(trained[0]))  # but for the end of each
    files = {unit: read_json(output / "units" / f"{unit.name}.json") for unit in (*short, *long)}
    for unit, found in files.items():
        assert found["model"] == unit.model and found["manifest"]["seeds"] == {"demo": 0}
        assert found["manifest"]["processor"] and len(found["stage_seconds"]) == 2 - (
            unit.model == study.ENDO
        )
    bases = {unit: read_json(output / "units" / f"{unit.name}.json") for unit in (long[0].bases)}
    assert [found["learnt"] for found in bases.values()] == [True, True]
    (run,) = report.by_base_model(files | bases)
    assert list(run["units"]) == [*cells]
    for of_cell in run["units"].values():
        models = of_cell["reward_models"]
        assert {*models} == {*report.SHOWN}
        for objective, tries in study.TRIES.items():
            f1 = {name: max(models[name]["validation_f1"].values()) for name in tries}
            assert f1[of_cell["chosen"][study.BEST[objective]]] == max(f1.values())
    page = (output / "README.md").read_text()
    assert "104 of 126 units are missing" in page and f"## {cells[1]}" in page
    assert (output / "when_prefix_values_help.png").stat().st_size > 5000


def test_a_base_model_that_has_not_learnt_the_task_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    """Made by hand: 0.1 nats a character at 1x, which is enough; 0.1 a token at 8x, which is not, for one of
    two base models."""

    def prepare(stages, sizes, seed):
        for name in ("base", "rollouts"):
            (stages.output / name).mkdir(exist_ok=True)
            stages.done[name] = {"key": name, "seconds": 0.0}
        write_json(stages.output / "base" / "base.json", {"steps": 7, "loss": 0.1})
        write_json(stages.output / "rollouts" / "counts.json", {})

    def train_long_base(folder, short, sizes, seed, progress):
        write_json(folder / "base.json", {"steps": 7, "loss": 0.1 if seed == 0 else 0.01})

    monkeypatch.setattr(study, "prepare", prepare)
    monkeypatch.setattr(study, "train_long_base", train_long_base)
    traces = [SimpleNamespace(label=label, steps=["47+25=72"]) for label in (0, -1)]
    monkeypatch.setattr(study, "read_traces", lambda path: (traces, []))
    of_model = {"result": {}, "stage_seconds": {}}
    monkeypatch.setattr(study, "of_model", lambda *_: of_model)
    units = [study.Unit(seed, length, 0, study.ENDO) for length in ("1x", "8x") for seed in (0, 2)]
    study.run_units(units, tmp_path / "work", tmp_path / "out", MINI)
    found = {path.stem: read_json(path) for path in (tmp_path / "out" / "units").iterdir()}
    assert {*found} == {
        "seed0-1x-base", "seed2-1x-base", "seed0-8x-base", "seed2-8x-base",
        "seed0-1x-0-endo_rm", "seed2-1x-0-endo_rm", "seed2-8x-0-endo_rm",
    }  # fmt: skip
    learnt = {name: unit["learnt"] for name, unit in found.items() if name.endswith("base")}
    assert [name for name, has in learnt.items() if not has] == ["seed0-8x-base"]
    assert found["seed0-8x-base"]["base"] == {"steps": 7, "loss": 0.1, "nats_a_character": pytest.approx(0.8)}


# ----------------------------------------------------------------------------------------------- the report


LAST = {study.BEST[objective]: list(tries)[-1] for objective, tries in study.TRIES.items()}
OURS = {LAST[study.BEST["ipvrm"]], report.PAPER["ipvrm"]}


def made_up(seed, cell, f1, traces=200):
    """The files of a cell, in which the reward models find a share `f1[name]` (default a half) of everything;
    of every objective the last try is the best."""
    rng = Random(f"{seed} {cell}")
    models = {}
    for name in (*study.CHOICES, study.ENDO):
        share = f1.get(name, 0.5)
        hit = [int(rng.random() < share) for _ in range(traces)]
        own, other = [[float(rng.random() < p) for _ in range(traces)] for p in (share, 0.0)]
        objective = name.split(" ")[0]
        summed = objective in ("implicit_prm", "endo_rm")
        models[name] = {
            "choice": {"objective": objective},
            "validation_f1": {"step": float(name in LAST.values())},
            "formats": {TRAINING_FORMAT.name: {"hit": hit}},
            "best_of_n": {"16": {"sum": own if summed else other, "final": other if summed else own}},
            "without_a_model": {"16": {way: [0.5] * traces for way in report.WITHOUT}},
        }
    common = {
        "stage_seconds": {},
        "machine": {"threads": 2, "load": 0},
        "manifest": {"commit": "abc", "processor": "none"},
    }
    base = common | {
        "base": {"nats_a_character": 0.08, "steps": 10},
        "learnt": True,
        "erroneous": [i % 2 for i in range(traces)],
        "baselines": {"best_constant": 0.2},
    }
    units = study.units_of(seed, cell)
    found = dict.fromkeys((*units[0].bases, study.Unit(seed, cell.length)), base)
    return found | {unit: common | {"result": models[unit.model]} for unit in units}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("benchmarks.studies.spread.RESAMPLES", 50)


def told(f1_of_cell):
    files = {}
    for seed in (0, 2, 3):
        for cell, f1 in f1_of_cell.items():
            files |= made_up(seed, cell, f1)
    return report.paragraph(report.summarise(report.by_base_model(files)))


@pytest.mark.slow
def test_the_paragraph_says_what_the_numbers_say():
    short, long = study.CELLS[0], study.CELLS[2]
    high, low = dict.fromkeys(OURS, 0.95), dict.fromkeys(OURS, 0.05)
    text = told({short: high, long: low})
    for measure in ("first-error F1", "Best-of-16"):
        assert f"In {measure}, ipvrm (best of 3) less implicit_prm (best of 3) is above 0 at 1x-0, " in text
    assert text.count("is above 0 at 1x-0, below 0 at 8x-0") == 10
    assert "10 of 10 changes of a lead" in text
    assert "ipvrm (best of 3) less endo_rm in first-error F1, from 1x-0 to 8x-0, by -" in text
    same = told({short: {}, long: {}})
    assert same.count("is not told apart from 0 at 1x-0, 8x-0") >= 8  # of 10, each of them by chance
    alone = told({short: high})
    assert "changes" not in alone and "8x" not in alone
    need = "which needs no reward model"
    both = "ipvrm (best of 3), ipvrm (10, 5)"
    assert f"In first-error F1 against best_constant, {need}: above it ipvrm (best of 3), " in alone
    for rival in ("one sample", "majority vote"):
        assert re.search(rf"against {rival}, {need}: above it ipvrm .best of 3., .*below it none; ", alone)
    assert f"against one sample, {need}: above it none; below it {both}; not" in told({short: low})
    assert f"against one sample, {need}: above it ipvrm (best of 3) (at 1x-0)" in text


@pytest.mark.slow
def test_the_report_is_of_the_cells_that_are_complete_and_names_what_is_not(tmp_path):
    short, long = study.CELLS[0], study.CELLS[2]
    report.write_results(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "units").mkdir()
    files = made_up(0, short, {}) | made_up(2, short, {}) | made_up(0, long, {})
    files[study.Unit(2, "8x")] = files[study.Unit(2, "1x")] | {
        "learnt": False, "base": {"nats_a_character": 0.8, "steps": 10},
    }  # fmt: skip
    files |= dict([*made_up(3, short, {}).items()][:5])  # not complete
    for unit, found in files.items():
        write_json(tmp_path / "units" / f"{unit.name}.json", found)
    report.write_results(tmp_path)
    page = (tmp_path / "README.md").read_text()
    missing = [u.name for u in study.UNITS if u not in files and not (u.seed == 2 and u.length == "8x")]
    assert f"{len(missing)} of 126 units are missing, the first of them {missing[0]}." in page
    assert "**Left out:** seed2-8x-base has 0.80 nats a character after 10 updates, more than 0.14" in page
    assert f"## {short}\n\nBase models 0, 2." in page and f"## {long}\n\nBase models 0." in page
    assert report.CAUTION in page
    summary = read_json(tmp_path / "summary.json")
    assert summary["cells"].keys() == {"1x-0", "8x-0"} and summary["missing"] == missing
    assert len(summary["cells"]["1x-0"]["f1"]["q_rm (best of 3)"]["by_model"]) == 2
    assert len(summary["changes"]["1x-0 to 8x-0"]["f1"]["ipvrm (best of 3) less endo_rm"]["by_model"]) == 1


def test_the_lead_is_paired_by_trace():
    """Two reward models with the same hits have a lead of 0, and an interval of no width."""
    cell, ours, rival = study.CELLS[0], study.BEST["ipvrm"], study.BEST["q_rm"]
    files = {}
    for seed in (0, 2, 3):
        files |= made_up(seed, cell, {})
        of = {unit.model: files[unit]["result"] for unit in study.units_of(seed, cell)}
        of[LAST[rival]]["formats"] = of[LAST[ours]]["formats"]
    of_cell = report.summarise(report.by_base_model(files))["cells"]["1x-0"]
    assert of_cell["f1_lead"][f"{ours} less {rival}"]["interval"] == [0.0, 0.0]
    wide = of_cell["f1"][rival]["interval"]
    assert wide[1] - wide[0] > 0.01


# ------------------------------------------------------------------------------------- what is committed


def test_the_committed_units_are_complete_and_each_took_less_than_forty_minutes():
    summary = read_json(study.RESULTS / "summary.json")
    assert summary["missing"] == [] and summary["not_learnt"] == []
    for unit in study.UNITS:
        found = read_json(study.RESULTS / "units" / f"{unit.name}.json")
        assert 0 < sum(found["stage_seconds"].values()) < 2400, unit.name
        assert found["model"] == unit.model and found["manifest"]["commit"]
    assert len([*(study.RESULTS / "units").iterdir()]) == len(study.UNITS)


def test_the_committed_summary_is_of_the_committed_units():
    """Means by base model, without the resampling."""
    summary = read_json(study.RESULTS / "summary.json")
    files = {unit: read_json(study.RESULTS / "units" / f"{unit.name}.json") for unit in study.UNITS}
    runs = report.by_base_model(files)
    assert len(runs) == len(study.SEEDS)
    for cell in study.CELLS:
        of_cell = summary["cells"][cell.name]
        for name in report.SHOWN:
            f1 = [report.f1_statistic(name, TRAINING_FORMAT.name)(run["units"][cell], None) for run in runs]
            assert of_cell["f1"][name]["by_model"] == pytest.approx(f1)
            picked = [report.best_of_statistic(name)(run["units"][cell], None) for run in runs]
            assert of_cell["best_of_n"][name]["by_model"] == pytest.approx(picked)
