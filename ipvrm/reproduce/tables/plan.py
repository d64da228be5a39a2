"""A plan: a list of units, each a named command with its settings; run in order, kept unit by unit.

A unit is one of our commands (or one of the steps of `inputs.py`) as a function, in this process. What it
needs of other units stands in its settings as an `Output`. Under `units/` in the output folder a file of each
says what it was asked for and, once it is done, how long it took: the same plan goes on behind what is done,
and a changed one is refused. An unfinished unit is given its command again, which goes on by itself. One that
fails is named, those that need it are left out, and the others run.
"""

import json
import shlex
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ipvrm.errors import IpvrmError
from ipvrm.output.progress import Progress
from ipvrm.run_folder import read_json, same_run, write_json
from ipvrm.training.checkpoint import TrainingInterrupted


class Step(NamedTuple):
    """`module` holds the dataclass `config` and the function `run(config, progress)`."""

    module: str
    config: str
    run: str
    writes_file: bool = False  # `output`, a .parquet file; else `output_dir`


UNITS = "units"  # folder of what each was asked for
INPUTS = "ipvrm.reproduce.tables.inputs"
STEPS = {
    "rollout": Step("ipvrm.rollouts.rollout", "RolloutConfig", "roll_out", writes_file=True),
    "label": Step("ipvrm.rollouts.label", "LabelConfig", "label_file", writes_file=True),
    "train-rm": Step("ipvrm.training.train_rm", "RewardConfig", "train_reward_model"),
    "train-policy": Step("ipvrm.training.train_policy", "PolicyConfig", "train_policy"),
    "eval processbench": Step("ipvrm.evaluate.processbench", "EvalConfig", "evaluate"),
    "eval bon": Step("ipvrm.evaluate.bon", "BonConfig", "evaluate"),
    "eval policy": Step("ipvrm.evaluate.policy", "PolicyEvalConfig", "evaluate"),
    "eval td": Step("ipvrm.reproduce.td_study", "TdConfig", "study"),
    # no commands of `ipvrm`
    "demo task": Step(INPUTS, "TaskConfig", "make_task"),
    "one pair a prompt": Step(INPUTS, "PairsConfig", "keep_pairs", writes_file=True),
    "problems of": Step(INPUTS, "ProblemsConfig", "keep_problems", writes_file=True),
}


@dataclass(frozen=True)
class Output:
    """What another unit writes: its file or folder, or `name` inside that folder."""

    unit: str
    name: str = ""

    def __str__(self) -> str:
        return f"<{self.unit}>" + (f"/{self.name}" if self.name else "")


@dataclass(frozen=True)
class Unit:
    """`settings` are those of the command's dataclass, the output excepted. `sampled` responses are generated
    and `passes` go through the model once (a backward counts two): what the estimate of time rests on."""

    name: str
    command: str
    settings: dict[str, Any]
    sampled: float = 0
    passes: float = 0

    @property
    def after(self) -> list[str]:
        """The units that its settings name."""
        values = [v for s in self.settings.values() for v in (s if isinstance(s, tuple) else (s,))]
        return [value.unit for value in values if isinstance(value, Output)]


def needed(units: Sequence[Unit], names: Iterable[str]) -> list[Unit]:
    """The units of `names` and all that these need, in the order of `units`, which is one that can be run."""
    by_name = {unit.name: unit for unit in units}
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].after
    return [unit for unit in units if unit.name in wanted]


def place(units: Sequence[Unit], output: Path, name: str) -> Path:
    """Where the unit `name` writes."""
    (unit,) = (unit for unit in units if unit.name == name)
    return output / (f"{name}.parquet" if STEPS[unit.command].writes_file else name)


def config_of(unit: Unit, units: Sequence[Unit], output: Path) -> Any:
    """The dataclass of its command."""
    step = STEPS[unit.command]
    config_class = getattr(import_module(step.module), step.config)

    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        return str(place(units, output, value.unit) / value.name) if isinstance(value, Output) else value

    settings = {name: resolved(value) for name, value in unit.settings.items()}
    settings["output" if step.writes_file else "output_dir"] = str(place(units, output, unit.name))
    if "resume_from_checkpoint" in {field.name for field in fields(config_class)}:
        settings["resume_from_checkpoint"] = "auto"
    return config_class(**settings)


def command_line(unit: Unit, units: Sequence[Unit], output: Path) -> str:
    """The unit as it could be given by hand; steps that are no commands look alike, in brackets."""
    config = config_of(unit, units, output)
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if field.type is bool:
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
            continue
        words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    line = f"{unit.command} {shlex.join(words)}"
    return f"({line})" if STEPS[unit.command].module == INPUTS else f"ipvrm {line}"


def run_plan(units: Sequence[Unit], output: Path, shown: Progress) -> dict[str, str]:
    """Runs what is not done yet.

    Returns:
        {unit: why it failed or was left out}.

    Raises:
        IpvrmError: a unit that was asked for with other settings before.
        TrainingInterrupted: a signal, in a command.
    """
    failed: dict[str, str] = {}
    for number, unit in enumerate(units, 1):
        label = f"{number}/{len(units)} {unit.name}"
        asked = json.loads(json.dumps({"command": unit.command, **unit.settings}, default=str))
        if lost := [name for name in unit.after if name in failed]:
            failed[unit.name] = f"left out: it needs {lost[0]}"
            shown.note(f"{label}: {failed[unit.name]}")
            continue
        file = output / UNITS / f"{unit.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = read_json(file) if file.exists() else None
        if stored is not None:
            same_run(stored["asked"], asked, f"{unit.name} in {output}")
            if stored["seconds"] is not None:
                shown.note(f"{label}: done before ({stored['seconds']:.0f} s)")
                continue
        else:
            write_json(file, {"asked": asked, "seconds": None})
        shown.note(f"{label}: {unit.command} ...")
        step, started = STEPS[unit.command], time.perf_counter()
        try:
            getattr(import_module(step.module), step.run)(config_of(unit, units, output), shown.enabled)
        except TrainingInterrupted as error:
            message = f"{unit.name}: stopped; the same command goes on"
            raise TrainingInterrupted(message, error.checkpoint, error.exit_code) from error
        except Exception as error:  # of any kind, as out of memory: one unit is not the others' end
            known = isinstance(error, IpvrmError)
            failed[unit.name] = str(error) if known else f"{type(error).__name__}: {error}"
            shown.note(f"{label}: FAILED: {failed[unit.name]}")
            if not known:
                traceback.print_exc()
            continue
        write_json(file, {"asked": asked, "seconds": round(time.perf_counter() - started, 2)})
    return failed
