"""`ipvrm reproduce NAMES`: what a scale starts from, the plan, its estimate, the runs and the tables."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.reproduce.tables.experiments import OPEN, Scale, experiments, full, smoke
from ipvrm.reproduce.tables.plan import UNITS, Unit, command_line, needed, run_plan
from ipvrm.reproduce.tables.report import TABLES, write_table_of
from ipvrm.run_folder import remove_leftovers

ALL = "all"
BILLIONS = {"qwen3-0.6b": 0.6, "qwen3-8b": 8.0, "llama3.2-1b": 1.0, "llama3.2-3b": 3.0}  # by their names
HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
# What the estimate assumes.
TOKENS = 500  # a response: the release's have a median of 1,355 characters
TRAIN_RATE, SAMPLE_RATE = 2e14, 4e12  # FLOP/s of a large GPU; sampling waits for memory
SMOKE_WARNING = (
    "SMOKE: no reproduction. Every run is of the demo's arithmetic task and its tiny model; the columns are "
    "parts of that task, margins 0, 1 and 2 stand for 0, 5 and 10. It shows that the runs work, and nothing "
    "about the paper's numbers."
)
FULL_WARNING = "Our run of the paper's settings, one seed."


@dataclass(frozen=True)
class ReproduceConfig:
    """The paper's tables: every run behind them, and our numbers beside the paper's.

    --scale smoke wires every run on the demo's task. --scale full prints the commands, with the paper's
    models and data, and an estimate, then runs them in this process. What tables share is run once. The same
    command goes on where it stopped; a unit whose printed command was given by hand (on more devices, or with
    a server) is found finished. fig6 is Table 8, with both panels of Figure 6 as fig6.png; at the
    size of the demo's task that is `ipvrm demo fig6`.
    """

    names: Annotated[
        tuple[Literal["table1", "table2", "table5", "table6", "table10", "fig6", "sec433", "all"], ...],
        tyro.conf.Positional,
    ]
    """Tables, or all of them."""
    scale: Literal["smoke", "full"] = "smoke"
    """smoke: the demo's task on a CPU, no reproduction. full: the paper's models and data."""
    base_model: Literal["qwen3-0.6b", "qwen3-8b", "llama3.2-1b", "llama3.2-3b"] = "qwen3-0.6b"
    """Whose numbers of the paper stand beside ours."""
    model: str | None = None
    """full: its SFT model, a folder or a Hub name."""
    prompts: str = "PRIME-RL/Eurus-2-RL-Data"
    """full: prompts of the reward models and policies; a file, folder or data set of the Hub."""
    problems: str | None = None
    """full: the evaluation problems, eval_policy/data/val.parquet of the released code."""
    processbench: str | None = None
    """full: a folder of gsm8k.json, math.json, olympiadbench.json and omnimath.json."""
    output_dir: str = "runs/reproduce"
    """Folder of the units and, for each table, NAME.md and NAME.json."""
    dry_run: bool = False
    """Print the plan, and stop."""


def reproduce(config: ReproduceConfig, progress: bool = True, scale: Scale | None = None) -> dict[str, Any]:
    """Prints the plan, runs what is not done and writes the tables.

    Args:
        scale: other sizes than those of `config.scale`.

    Returns:
        {table: what its JSON holds}; empty after a dry run.

    Raises:
        IpvrmError: no table named, inputs of `full` missing, units that were asked for otherwise before; or,
            once the tables are written, units that failed.
        TrainingInterrupted: a signal, in a command.
    """
    if not config.names:
        raise IpvrmError(f"name a table: {', '.join(TABLES)}, or {ALL}")
    names = [name for name in TABLES if name in config.names or ALL in config.names]
    scale = scale or (smoke() if config.scale == "smoke" else _full(config))
    units = needed(
        experiments(scale), [unit for n in names for used in TABLES[n].rows.values() for unit in used]
    )
    output, shown = Path(config.output_dir), Progress(enabled=progress)
    if progress and (config.scale == "full" or config.dry_run):
        _print_plan(units, output, config)
    if config.dry_run:
        return {}
    warning = FULL_WARNING if config.scale == "full" else SMOKE_WARNING
    with locked(output, folder=True):
        for folder in (output, output / UNITS):
            remove_leftovers(folder)
        shown.note(warning)
        failed = run_plan(units, output, shown)
        written = {
            name: write_table_of(name, output, scale, config.base_model, warning, failed, progress)
            for name in names
        }
    if failed:
        reasons = "; ".join(f"{unit} ({why})" for unit, why in failed.items())
        raise IpvrmError(
            f"{len(failed)} of {len(units)} units are not done, their cells are empty: {reasons}"
        )
    return written


def _full(config: ReproduceConfig) -> Scale:
    sft = resources.files("ipvrm.reproduce") / "sft.yaml"
    needs = {
        "model": f"trained by `trl sft --config {sft} --model_name_or_path {HUB[config.base_model]}`",
        "problems": "eval_policy/data/val.parquet of the released code",
        "processbench": "the folder process_bench/data of the released code",
    }
    missing = [f"--{name}: {what}" for name, what in needs.items() if getattr(config, name) is None]
    if missing:
        raise IpvrmError(f"--scale full needs {'; '.join(missing)}")
    return full(str(config.model), config.prompts, str(config.problems), str(config.processbench))


def hours(unit: Unit, billions: float) -> float:
    """2 FLOP a parameter and token, at the assumed rates; a backward counts two passes."""
    flops = 2e9 * billions * TOKENS
    return flops * (unit.sampled / SAMPLE_RATE + unit.passes / TRAIN_RATE) / 3600


def _print_plan(units: list[Unit], output: Path, config: ReproduceConfig) -> None:
    print(f"plan: {len(units)} units")
    for unit in units:
        line = command_line(unit, units, output)
        spent = hours(unit, BILLIONS[config.base_model])
        print(f"{spent:8.1f} h  {line}" if config.scale == "full" else line)
    if config.scale == "full":
        total = sum(hours(unit, BILLIONS[config.base_model]) for unit in units)
        print(
            f"{total:8.1f} h  in all on one GPU: an estimate from {TOKENS} tokens a response, "
            f"{TRAIN_RATE / 1e12:g} TFLOP/s in training and scoring and {SAMPLE_RATE / 1e12:g} in sampling; "
            "nothing of it was measured. Verifying is not in it."
        )
        print(OPEN)


def main(config: ReproduceConfig) -> None:
    """Console entry."""
    reproduce(config)
    if not config.dry_run:
        print(f"everything is in {config.output_dir}")
