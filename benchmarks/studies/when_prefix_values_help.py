"""When do prefix values help? The demo's task at two lengths of response and with wrong labels.

    python -m benchmarks.studies.when_prefix_values_help [--work_dir DIR]

A cell is a length and a share of wrong labels. At 1x a character is a token, as in the demo; at 8x the
tokenizer puts seven more tokens behind every character, always the same, so that the same text has eight
times as many tokens and says no more. The two lengths of a base model share its rollouts, which the one of 1x
samples. The one of 8x is that one trained on, its positions divided by eight (arXiv 2306.15595), until its
loss per character is as low as at 1x it had to be; one that does not get there is named, and has no reward
models. Of the training labels a share is turned round, the same ones at both lengths and for every reward
model; validation and test keep their own.

In every cell of a base model IPVRM, Implicit PRM and Q-RM have three tries each, the first of which has the
paper's beta and margin; EndoRM, which is not trained, has one. Step score and threshold of each, and the best
of the three, have the highest first-error F1 on the validation traces; test traces choose nothing. Best-of-16
picks by what the objective trains: the sum of EndoRM and Implicit PRM, the mean of the others. Q-RM learns
from all pairs of a right and a wrong response to a problem. A reward model sees 4,096 rollouts once, sixteen
(of Q-RM pairs) an update; the demo's see as many three times, which at 8x and nine reward models would take
most of a day.

A unit is one reward model in one cell of a base model, or a base model at one length: a file of its own in
benchmarks/results/when_prefix_values_help/units; its models are in --work_dir. A rerun makes what is missing,
also of a unit that was interrupted. Tables, picture and text are made again whenever a cell of a base model
is complete, of the cells that are.
"""

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.studies.spread import reward_model_results
from benchmarks.suite.machine import describe
from ipvrm.demo.arithmetic import TRAINING_FORMAT
from ipvrm.demo.base_model import CHARACTERS, LEARNT
from ipvrm.demo.evaluation import read_traces
from ipvrm.demo.run import Stages, fit_base, prepare, train_choice
from ipvrm.demo.settings import FULL, Choice, Sizes
from ipvrm.evaluate.thresholds import trivial_baselines
from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model
from ipvrm.models.reference import REFERENCE_FILE
from ipvrm.models.reward_model import RewardModel
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.run_folder import manifest, read_json, write_json, write_table

RESULTS = Path(__file__).parent.parent / "results" / "when_prefix_values_help"
COMMAND = "python -m benchmarks.studies.when_prefix_values_help"
SEEDS = (0, 2, 3)  # the demo's settings were chosen on seed 1
FILLER = "abcdefg"
LENGTHS = {"1x": 1, "8x": 1 + len(FILLER)}  # tokens a character
MAX_LENGTH = 1024  # tokens; no row is longer: a problem has 20 characters, a response ends within 72
# Two idle cores, estimated from measured updates: at 1x a minute a unit, at 8x 7 minutes, and up to 20 for a
# base model of 8x; in all eight hours, of which seven at 8x.
SIZES = replace(FULL, test_traces=512, best_of_problems=64)
EPOCHS, BATCH = 1, 16
OPTIONS = {  # small micro-batches, which are padded less
    "max_length": MAX_LENGTH,
    "global_batch_size": BATCH,
    "per_device_train_batch_size": 4,
}
TRIES = {
    "ipvrm": {
        "ipvrm (10, 5)": Choice("ipvrm", 10.0, 5.0, 3e-4, EPOCHS, rule=""),
        "ipvrm (50, 1)": Choice("ipvrm", 50.0, 1.0, 3e-4, EPOCHS, rule=""),
        "ipvrm (400, 1)": Choice("ipvrm", 400.0, 1.0, 3e-4, EPOCHS, rule=""),  # 50 for each of eight tokens
    },
    "implicit_prm": {
        "implicit_prm (0.05)": Choice("implicit_prm", 0.05, None, 1e-3, EPOCHS, rule=""),
        "implicit_prm (0.3)": Choice("implicit_prm", 0.3, None, 1e-3, EPOCHS, rule=""),
        "implicit_prm (1)": Choice("implicit_prm", 1.0, None, 1e-3, EPOCHS, rule=""),
    },
    "q_rm": {  # at the paper's beta its loss is as good as linear at this size, and no pair is ever done with
        "q_rm (0.2, 2)": Choice("q_rm", 0.2, 2.0, 1e-3, EPOCHS, rule=""),
        "q_rm (1, 0)": Choice("q_rm", 1.0, 0.0, 1e-3, EPOCHS, rule=""),
        "q_rm (5, 0)": Choice("q_rm", 5.0, 0.0, 1e-3, EPOCHS, rule=""),
    },
}
CHOICES = {name: choice for tries in TRIES.values() for name, choice in tries.items()}
BEST = {objective: f"{objective} (best of {len(tries)})" for objective, tries in TRIES.items()}
ENDO = "endo_rm"
MODELS = (*CHOICES, ENDO)
BASE = "base"


@dataclass(frozen=True)
class Cell:
    """A length, one of `LENGTHS`, and how many per cent of the training labels are wrong."""

    length: str
    wrong: int

    @property
    def name(self) -> str:
        return f"{self.length}-{self.wrong}"

    def __str__(self) -> str:
        return f"{self.length}, {self.wrong} % wrong labels"


CELLS = tuple(Cell(length, wrong) for length in LENGTHS for wrong in (0, 10))


@dataclass(frozen=True)
class Unit:
    """One of `MODELS` in a cell of a base model, trained and evaluated; or, as `BASE`, that base model at a
    length, and at 1x what it wrote."""

    seed: int
    length: str
    wrong: int | None = None
    model: str = BASE

    @property
    def name(self) -> str:
        model = re.sub(r"[^\w.]+", "-", self.model).strip("-")
        wrong = () if self.wrong is None else (str(self.wrong),)
        return "-".join((f"seed{self.seed}", self.length, *wrong, model))

    @property
    def bases(self) -> "list[Unit]":
        """The base models that it needs, that of 1x first."""
        needed = [Unit(self.seed, length) for length in dict.fromkeys(("1x", self.length))]
        return [base for base in needed if base != self]


def units_of(seed: int, cell: Cell) -> list[Unit]:
    """All reward models of a cell of a base model."""
    return [Unit(seed, cell.length, cell.wrong, model) for model in MODELS]


UNITS = tuple(
    unit
    for length in LENGTHS
    for unit in (
        *(Unit(seed, length) for seed in SEEDS),
        *(u for cell in CELLS if cell.length == length for seed in SEEDS for u in units_of(seed, cell)),
    )
)


# ------------------------------------------------------------------------------------- base model and labels


def lengthen(tokenizer: Any) -> None:
    """Gives `tokenizer` seven more tokens, whose ids come last, and has it put them behind every character.

    Their offsets are the character's, so steps are found as before.
    """
    from tokenizers import normalizers

    tokenizer.add_tokens(list(FILLER))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(character, character + FILLER) for character in CHARACTERS]
    )


def train_long_base(folder: Path, short: Path, sizes: Sizes, seed: int, progress: Progress) -> None:
    """The base model at 8x into `folder`, from the one at 1x."""
    import torch

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(short)
    lengthen(tokenizer)
    model: Any = load_model(short, torch.float32)
    # small new rows: 2.7 nats a character after 50 updates; rows like the others, the default: 15
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = MAX_LENGTH
    model.config.rope_parameters |= {"rope_type": "linear", "factor": float(LENGTHS["8x"])}
    save_model(model, folder)
    model = load_model(folder, torch.float32)  # with the positions of its new configuration
    fit_base(folder, model, tokenizer, sizes, seed, progress, "base model, 8x")


def flipped(labels: Sequence[int], per_cent: int, seed: int) -> list[int]:
    """`labels` (0 or 1) with `per_cent` of them turned round, rounded to whole ones and drawn with `seed`."""
    found = np.asarray(labels)
    count = round(len(found) * per_cent / 100)
    drawn = np.random.default_rng([seed, 10]).permutation(len(found))[:count]
    found[drawn] = 1 - found[drawn]
    return found.tolist()


def write_training_data(folder: Path, rollouts: Path, wrong: int, seed: int) -> None:
    """train.parquet of `rollouts` with `wrong` per cent of the labels turned round, into `folder`."""
    rows = pq.read_table(rollouts / "train.parquet").to_pylist()
    labels = flipped([row["label"] for row in rows], wrong, seed)
    changed = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    write_table(folder / "train.parquet", changed)


# ------------------------------------------------------------------------------------------------- measuring


def measure(work: Path, unit: Unit, sizes: Sizes, commit: str | None) -> dict[str, Any]:
    """Everything of one unit; its base model has a folder in `work`."""
    started = time.perf_counter()
    work = work / f"seed{unit.seed}"
    work.mkdir(parents=True, exist_ok=True)
    shared = Stages(work, Progress())
    prepare(shared, sizes, unit.seed)
    base = "base"
    if unit.length != "1x":
        base = f"base-{unit.length}"
        shared.folder(
            base,
            {"max_steps": sizes.base_max_steps, "seed": unit.seed},
            lambda folder: train_long_base(folder, work / "base", sizes, unit.seed, shared.progress),
            after=["base"],
        )
    found = of_base(shared, base, unit) if unit.model == BASE else of_model(shared, base, unit, sizes)
    return {
        "unit": unit.name,
        **asdict(unit),
        "sizes": asdict(sizes),
        **found,
        "seconds_of_this_run": time.perf_counter() - started,
        "machine": describe() | {"command": COMMAND},  # wherever its models lie
        "manifest": manifest(COMMAND, seeds={"demo": unit.seed}) | {"commit": commit},
    }


def of_base(shared: Stages, base: str, unit: Unit) -> dict[str, Any]:
    """A base model, whether it has learnt the task, and the traces of its seed."""
    work, found = shared.output, read_json(shared.output / base / "base.json")
    nats = LENGTHS[unit.length] * found["loss"]
    stages = {name: stage["seconds"] for name, stage in shared.done.items()}
    own = stages if unit.length == "1x" else {base: stages[base]}
    test, _ = read_traces(work / "rollouts" / "test.jsonl")
    labels = [trace.label for trace in test]
    baselines = trivial_baselines(labels, [len(trace.steps) for trace in test])
    return {
        "base": found | {"nats_a_character": nats},
        "learnt": nats <= LEARNT,
        "rollouts": read_json(work / "rollouts" / "counts.json"),
        "erroneous": [int(label >= 0) for label in labels],
        "baselines": {name: value.f1 for name, value in baselines.items()},
        "stage_seconds": own,
    }


def of_model(shared: Stages, base: str, unit: Unit, sizes: Sizes) -> dict[str, Any]:
    """A reward model of the cell, and its results."""
    assert unit.wrong is not None
    work, seed, cell = shared.output, unit.seed, Cell(unit.length, unit.wrong)
    stages = Stages(work / cell.name, shared.progress)
    stages.folder(
        "base",
        {"copy": shared.done[base]["key"]},
        lambda folder: shutil.copytree(work / base, folder, dirs_exist_ok=True),
    )
    stages.folder(
        "rollouts",
        {"from": shared.done["rollouts"]["key"], "wrong": cell.wrong, "seed": seed},
        lambda folder: write_training_data(folder, work / "rollouts", cell.wrong, seed),
        after=["base"],
    )
    name = "base"
    choice = Choice(ENDO, 1.0, None, 0.0, 0, rule="")
    if unit.model != ENDO:
        name, choice = f"reward-{MODELS.index(unit.model)}", CHOICES[unit.model]
        options = OPTIONS | ({"pairs": "all"} if choice.objective == "q_rm" else {})
        train_choice(stages, name, choice, seed, reference_like(stages, name, choice), **options)
    result = results_of(stages, name, choice, work, sizes)
    own = {n: stage["seconds"] for n, stage in stages.done.items() if n not in ("base", "rollouts")}
    return {"result": result, "stage_seconds": own}


def reference_like(stages: Stages, name: str, choice: Choice) -> str | None:
    """A trained reward model of the cell with reference log-probs, which the one in `name` needs too."""
    if choice.objective == "q_rm":
        return None
    others = (f"reward-{number}" for number in range(len(CHOICES)))
    return next((o for o in others if o != name and (stages.output / o / REFERENCE_FILE).exists()), None)


def results_of(stages: Stages, name: str, choice: Choice, work: Path, sizes: Sizes) -> dict[str, Any]:
    """F1 and Best-of-N of the model in the stage `name`, as a stage of its own."""
    made = f"results-{choice.objective if choice.objective == ENDO else name.removeprefix('reward-')}"

    def make(folder: Path) -> None:
        read = RewardModel.from_causal_lm if choice.objective == ENDO else RewardModel.from_pretrained
        model = read(stages.output / name, device="cpu")
        ways = [max(sizes.best_of_n)]
        results = reward_model_results(model, work / "rollouts", choice, [TRAINING_FORMAT], ways)
        write_json(folder / "results.json", results)

    settings = {"choice": asdict(choice), "n": max(sizes.best_of_n)}
    stages.folder(made, settings, make, after=[name, "rollouts"])
    return read_json(stages.output / made / "results.json")


def run_units(units: Sequence[Unit], work: Path, output: Path, sizes: Sizes) -> None:
    """Measures those of these units, and the base models that they need, that have no file in `output` yet;
    those of a base model that has not learnt the task are left out."""
    from benchmarks.studies.when_prefix_values_help_report import write_results

    commit = manifest()["commit"]  # before the first result: a written one is a change of the checkout
    folder = output / "units"
    folder.mkdir(parents=True, exist_ok=True)
    asked = list(dict.fromkeys(needed for unit in units for needed in (*unit.bases, unit)))
    with locked(work, folder=True):
        for number, unit in enumerate(asked, 1):
            if (folder / f"{unit.name}.json").exists():
                continue
            if lost := [base for base in unit.bases if not has_learnt(output, base)]:
                print(f"{unit.name}: left out, {lost[0].name} has not learnt the task", flush=True)
                continue
            print(f"{number}/{len(asked)} {unit.name}", flush=True)
            write_json(folder / f"{unit.name}.json", measure(work, unit, sizes, commit))
            if unit.wrong is not None:
                of_cell = units_of(unit.seed, Cell(unit.length, unit.wrong))
                if all((folder / f"{u.name}.json").exists() for u in of_cell):
                    write_results(output)
    write_results(output)


def has_learnt(output: Path, base: Unit) -> bool:
    """Whether the file of a base model says so; one that needs another which has not has no file."""
    file = output / "units" / f"{base.name}.json"
    return file.exists() and bool(read_json(file)["learnt"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", default="runs/when_prefix_values_help", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="folder of the results")
    arguments = parser.parse_args()
    run_units(UNITS, Path(arguments.work_dir), Path(arguments.output), SIZES)


if __name__ == "__main__":
    main()
