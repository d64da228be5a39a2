"""Run folders as `ipvrm report` reads them: settings, logged metrics, evaluations; a run may still be going.

    {"schema": "ipvrm-report/1", "ipvrm", "command", "date",
     "runs": [{"name", "state", "steps", "seconds"}],
     "groups": [[run, ...]]: runs that differ in nothing but the seed, two or more,
     "tables": [{"name", "title", "head": [...], "rows": [[...]], "note"}],
     "metrics": [{"name", "lines": [{"run", "step": [...], "seconds": [...], "value": [...]}]}]}

A value that is missing or not finite is null, where the line has a gap.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ipvrm.errors import IpvrmError, reading
from ipvrm.run_folder import read_json
from ipvrm.view.page import rounded

SCHEMA = "ipvrm-report/1"
LOG, CONFIG, RESULTS, DEMO = "metrics.jsonl", "config.yaml", "results.json", "evaluation.json"
DEEPEST = 3  # folders below a given one in which runs are looked for
X = ("step", "seconds_total")
# What a reader looks at first; everything else follows in the order of the logs.
FIRST = (
    "loss", "prefix_accuracy", "outcome_accuracy",
    "eval_loss", "eval_prefix_accuracy", "eval_outcome_accuracy",
    "rollout_accuracy", "eval_accuracy", "rm_auc", "policy_loss", "entropy", "grad_norm", "learning_rate",
)  # fmt: skip
PLACES = (
    "output_dir",
    "model",
    "train_data",
    "eval_data",
    "reward_model",
    "reference",
    "resume_from_checkpoint",
)


@dataclass
class Run:
    """A folder with a log; `records` are its lines, `results` what it wrote at its end."""

    folder: Path
    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    results: dict[str, Any] | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> str:
        return "finished" if self.results is not None else "not finished"


def find_runs(folders: Sequence[str]) -> tuple[list[Run], list[Path]]:
    """The runs in the folders, and the files of evaluations beside or in them.

    Raises:
        IpvrmError: a folder that is not there, or one without a run or an evaluation in it.
    """
    logs: dict[Path, None] = {}
    evaluations: dict[Path, None] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise IpvrmError(f"{given}: no such folder; name run folders, or folders of runs")
        inside = [*_walk(given, DEEPEST)]
        logs |= dict.fromkeys(folder for folder in inside if (folder / LOG).is_file())
        found = [folder / name for folder in inside for name in (RESULTS, DEMO) if (folder / name).is_file()]
        evaluations |= dict.fromkeys(path for path in found if _is_evaluation(read_json(path)))
        if not any(path.is_relative_to(given) for path in (*logs, *evaluations)):
            raise IpvrmError(f"{given}: neither {LOG} of a run nor results of an evaluation in it")
    names = _names([*logs, *(path.parent for path in evaluations)])
    runs = [_read_run(folder, name) for folder, name in zip(logs, names, strict=False)]
    return runs, [*evaluations]


def _walk(folder: Path, deep: int) -> Iterator[Path]:
    yield folder
    for inner in sorted(folder.iterdir()) if deep else ():
        if inner.is_dir() and not inner.name.startswith((".", "checkpoint-")):
            yield from _walk(inner, deep - 1)


def _names(folders: Sequence[Path]) -> list[str]:
    """Paths below what all of them share."""
    whole = [folder.resolve() for folder in folders]
    shared = 0
    parents = [path.parent.parts for path in whole]
    while parents and all(len(p) > shared and p[shared] == parents[0][shared] for p in parents):
        shared += 1
    return ["/".join(path.parts[shared:]) for path in whole]


def _read_run(folder: Path, name: str) -> Run:
    settings: Any = {}
    if (path := folder / CONFIG).is_file():
        with reading(path, "not valid YAML", "copy the run again"):
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    records = []
    with reading(folder / LOG, "cannot be read", "copy the run again"):
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the line that a run is writing at this moment
        records.append(record)
    done = (folder / RESULTS).is_file()
    return Run(
        folder,
        name,
        settings if isinstance(settings, dict) else {},
        records,
        read_json(folder / RESULTS) if done else None,
    )


# -------------------------------------------------------------------------------------------------- the block


def data_block(runs: Sequence[Run], evaluations: Sequence[Path], **about: Any) -> dict[str, Any]:
    """What the page shows (see the module docstring); `about` are further entries of it."""
    tables = [_runs_table(runs), _settings_table(runs), *_evaluation_tables(evaluations)]
    return {
        "schema": SCHEMA,
        **about,
        "runs": [
            {"name": run.name, "state": run.state, "steps": _last(run, "step"), "seconds": _elapsed(run)}
            for run in runs
        ],
        "groups": groups(runs),
        "tables": [table for table in tables if table["rows"]],
        "metrics": metrics(runs),
    }


def metrics(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every logged number by its name, with a line for each run that has it; constant counts are kept too."""
    names = dict.fromkeys(
        name
        for run in runs
        for record in run.records
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in X
    )
    ordered = [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]
    found = []
    for name in ordered:
        lines = []
        for number, run in enumerate(runs):
            seconds = _seconds(run)
            kept = [i for i, record in enumerate(run.records) if name in record]
            values = [_number(run.records[i][name]) for i in kept]
            if any(value is not None for value in values):
                lines.append(
                    {
                        "run": number,
                        "step": [run.records[i]["step"] for i in kept],
                        "seconds": [seconds[i] for i in kept],
                        "value": values,
                    }
                )
        if lines:
            found.append({"name": name, "lines": lines})
    return found


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short == int(short) else short


def _seconds(run: Run) -> list[float | None]:
    """Seconds since the first start; a resumed run counts on from where it stopped."""
    found: list[float | None] = []
    before = last = 0.0
    for record in run.records:
        value = _number(record.get("seconds_total"))
        if value is None:
            found.append(None)
            continue
        if value < last:
            before += last
        last = value
        found.append(round(before + value, 2))
    return found


def _elapsed(run: Run) -> float | None:
    """Seconds of the whole run, as far as it has come."""
    known = [value for value in _seconds(run) if value is not None]
    return known[-1] if known else _number((run.results or {}).get("seconds"))


def _last(run: Run, name: str) -> Any:
    return next((record[name] for record in reversed(run.records) if name in record), None)


def groups(runs: Sequence[Run]) -> list[list[int]]:
    """Runs whose settings differ in nothing but the seed and places, two or more."""
    found: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        kept = {k: v for k, v in run.settings.items() if k != "seed" and k not in PLACES}
        if kept:
            found.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(number)
    several = [members for members in found.values() if len(members) > 1]
    return [m for m in several if len({runs[i].settings.get("seed") for i in m}) == len(m)]


# ------------------------------------------------------------------------------------------------ the tables


def _runs_table(runs: Sequence[Run]) -> dict[str, Any]:
    names = [name for name in FIRST if any(name in record for run in runs for record in run.records)]
    rows = []
    for run in runs:
        own = [run.name, run.state, _last(run, "step"), _elapsed(run)]
        rows.append([_cell(x) for x in own + [_last(run, name) for name in names]])
    head = ["run", "state", "steps", "seconds", *names]
    return {"name": "runs", "title": "Runs, last logged values", "head": head, "rows": rows, "note": ""}


def _settings_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Only the settings that differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "output_dir")
    rows = []
    for name in names:
        values = [_setting(run.settings[name]) if name in run.settings else "" for run in runs]
        if len(set(values) - {""}) > 1:  # a run of another command does not have it
            rows.append([name, *values])
    return {
        "name": "settings",
        "title": "Settings that differ",
        "head": ["setting", *(run.name for run in runs)],
        "rows": rows,
        "note": "",
    }


def _setting(value: Any) -> str:
    """A setting in words; of a path its last two parts."""
    if value is None:
        return "none"
    if isinstance(value, str) and value.startswith("/"):
        return "/".join(Path(value).parts[-2:])
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_evaluation(stored: Any) -> bool:
    return isinstance(stored, dict) and (
        isinstance(stored.get("subsets"), dict)
        or (
            isinstance(stored.get("models"), dict)
            and isinstance(stored.get("test"), dict)
            and "stages" not in stored
        )
    )


def _evaluation_tables(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """First-error F1 with its interval: of `ipvrm eval processbench`, and of the demo."""
    rows = []
    for path, name in zip(paths, _names([path.parent for path in paths]), strict=True):
        stored = read_json(path)
        for subset, by_rule in _entries(stored):
            for rule, entry in by_rule.items():
                transfer, oracle = (entry.get(protocol) for protocol in ("transfer", "oracle"))
                rows.append(
                    [name, subset, rule, _f1(transfer), _halves(transfer), _f1(oracle), _halves(oracle)]
                )
    return [
        {
            "name": "evaluations",
            "title": "First-error F1 in %, with the 95 % interval over solutions",
            "head": [
                "evaluation",
                "subset",
                "score",
                "F1 transfer",
                "wrong/right",
                "F1 oracle",
                "wrong/right",
            ],
            "rows": rows,
            "note": "transfer: the threshold was chosen on other solutions; oracle: the best of the subset."
            + " F1 -: not defined, as no solution is right or none wrong."
            * any(row[5] == "-" for row in rows),
        }
    ]


def _entries(stored: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if "subsets" in stored:
        for subset, found in stored["subsets"].items():
            yield subset, found["rules"]
    else:
        for objective, found in stored["models"].items():
            for written, by_rule in found["formats"].items():
                yield f"{objective}, {written}", by_rule


def _f1(entry: dict[str, Any] | None) -> str:
    if not entry or entry.get("f1") is None:
        return "-"
    low, high = entry["f1_interval"]
    interval = "" if low is None or high is None else f" ({100 * low:.1f}-{100 * high:.1f})"
    return f"{100 * entry['f1']:.1f}{interval}"


def _halves(entry: dict[str, Any] | None) -> str:
    if not entry:
        return "-"
    parts = (entry.get("accuracy_erroneous"), entry.get("accuracy_correct"))
    return "/".join("-" if part is None else f"{100 * part:.1f}" for part in parts)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        short = rounded(value)
        return "-" if short is None else f"{short:,}" if abs(short) >= 1000 else str(short)
    return str(value)
