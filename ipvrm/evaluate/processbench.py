"""`ipvrm eval processbench`: find the first wrong step of a solution.

Every solution is scored once, with all four rules. Two threshold protocols are reported, always labelled:

    transfer   chosen on one subset (gsm8k) and reused on every subset: the benchmark's own protocol
    oracle     the best threshold of each subset, chosen on its own labels: what the released script prints
    release    the same on that script's own grid of thresholds and with its scales, to stand beside it

Besides, the calibration of sigmoid(mean_value) at the end of a solution against its outcome (whether its
final answer is right where the item says so, else whether all steps are), left out under the objectives whose
mean value is no log-odds of it; and F1 by what wrote the solutions.

A solution of more than `max_length` tokens is not cut and not left out: it counts as missed under every
threshold, and the number of such solutions is printed and stored. So does an item that cannot be used at all
(no steps, a label that is none of them, a text that is no Unicode or that the chat template rewrites, a score
that is no number); each is named with the reason. Where not even its label is known, it is missed in both
halves of F1. Scores are kept in the output folder part by part, so an interrupted run goes on where it
stopped.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ipvrm.data.chat import given_template_kwargs
from ipvrm.data.files import check_values, chunked, file_hash, finite, hub_data_set, records
from ipvrm.data.files import kind_of as kind_of_file
from ipvrm.data.rows import as_object, listed
from ipvrm.data.steps import RULES, STEP_FORMAT, STEP_SEPARATOR, check_step_format
from ipvrm.errors import IpvrmError, reading
from ipvrm.evaluate.calibration import calibration
from ipvrm.evaluate.processbench_tables import (
    PROTOCOLS,
    calibration_table,
    f1_tables,
    generator_table,
    release_table,
)
from ipvrm.evaluate.thresholds import (
    f1_of_hits,
    f1_report,
    finite_or_none,
    hits,
    predict,
    released_grid,
    score_threshold,
    sweep,
    trivial_baselines,
)
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL, kind_of, served_pair
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress, portion
from ipvrm.run_folder import (
    FREE,
    begin_or_go_on,
    manifest,
    remove_leftovers,
    settings_of,
    write_json,
    write_table,
)

WORDS = {
    "model": "the model",
    "reference": "the reference",
    "template": "the chat template",
    "data": "the data",
}
NO_LOG_ODDS = ("q_rm", "endo_rm")  # their mean value is no log-odds of the outcome
STEPWISE = ("prompt", "completions", "labels")
PART_ITEMS = 50  # solutions per part file: what an interruption can lose


@dataclass(frozen=True)
class EvalConfig:
    """First-error F1 of a reward model on ProcessBench files."""

    model: str = field(metadata=FREE)
    """Run folder of the reward model."""
    data: tuple[str, ...] = field(metadata=FREE)
    """ProcessBench files (problem, steps, label in a JSON list, JSON lines or parquet), or one folder of all;
    a file's name is the subset's. TRL's stepwise format is read too (prompt, completions, labels)."""
    output_dir: str = field(metadata=FREE)
    """Folder for results.json, items-<subset>.parquet and the scores."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reference model is now, if it has moved."""
    objective: Literal["endo_rm"] | None = None
    """endo_rm: --model is any causal LM, whose own logits are the reward. Default: what its folder says."""
    chat_template_kwargs: str | None = field(default=None, metadata=FREE)
    """Variables of the chat template as a JSON object, of endo_rm. Default: none; a reward model has those
    that it was trained with, and others are refused."""
    transfer_from: str = field(default="gsm8k", metadata=FREE)
    """Subset whose best threshold the `transfer` protocol uses everywhere."""
    step_format: str = STEP_FORMAT
    """How a step is written; {i} is its number from 1, {step} its text."""
    step_separator: str = STEP_SEPARATOR
    """What stands between two steps."""
    max_length: int | None = 8192
    """Most tokens of prompt and solution; longer ones count as missed. None for no limit."""
    batch_tokens: int = field(default=8192, metadata=FREE)
    """Most tokens of a padded forward."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """transformers, or the address of a server of `model` that gives prompt_logprobs, such as vLLM's
    http://localhost:8000/v1."""
    reference_engine: str = field(default=LOCAL, metadata=FREE)
    """The same of a server of its reference; both are served, or neither."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of their answers."""
    limit: int | None = field(default=None, metadata=FREE)
    """Only the first so many solutions of each subset, for a quick look."""
    bootstrap_resamples: int = field(default=2000, metadata=FREE)
    """Resamples of the solutions for the intervals."""
    seed: int = field(default=0, metadata=FREE)
    """Seed of the bootstrap."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Score on the CPU although there is an accelerator."""


def _files(data: Sequence[str]) -> list[str]:
    """A file, or folder of shards, per subset; of one folder alone what is in it, in order of the names."""
    if len(data) != 1 or not Path(data[0]).is_dir():
        return list(data)
    inside = sorted(p for p in Path(data[0]).iterdir() if not p.name.startswith((".", "_")))
    found = [str(path) for path in inside if path.is_dir() or kind_of_file(path)]
    if not found:
        raise IpvrmError(f"--data {data[0]}: a folder without files of items; name one that holds subsets")
    return found


def _subset(path: str) -> str:
    """`gsm8k` of `gsm8k.json`, `gsm8k.jsonl.gz`, the folder `gsm8k` or the Hub's `org/name:gsm8k`."""
    asked = hub_data_set(path)
    if asked is not None and asked[1] is not None:
        return asked[1]
    return Path(path).name.partition(".")[0]


@dataclass(frozen=True)
class Item:
    """One ProcessBench solution; `label` is the index of its first wrong step, -1 for none.

    `right` says whether its outcome is right, `generator` what wrote it, None where nothing says so.
    `unusable` is why it cannot be scored; its label is then None where it has none.
    """

    name: str
    problem: str
    steps: tuple[str, ...]
    label: int | None
    right: bool
    generator: str | None = None
    unusable: str | None = None


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Reads a ProcessBench file: a JSON list, or whatever `ipvrm.data.files` reads.

    Raises:
        IpvrmError: not such a file, or one without a single usable item.
    """
    columns = ("id", "problem", "steps", "label", *STEPWISE, "generator", "final_answer_correct")
    found = records(path, columns, (columns[1:4], STEPWISE), check=False)
    items = [_item(index, value) for _, _, index, value in islice(found, limit)]
    if all(item.unusable for item in items):
        first = f"; item 1: {items[0].unusable}" if items else ""
        raise IpvrmError(f"{path}: must hold items of problem, steps, label; it holds no usable one{first}")
    return items


def _item(number: int, value: Any) -> Item:
    """The item of a record, or the unusable one in its place; `number` from 1 is its name if it has none."""
    record = value if isinstance(value, dict) else {}
    name, label, generator = str(number), None, None
    try:
        record = as_object(value)
        check_values(record.get("id"))
        given = finite(record.get("id"), "id")
        name = str(number if given is None else given)
        check_values([record.get(key) for key in ("problem", "steps", "generator", *STEPWISE[:2])])
        generator = finite(record.get("generator"), "generator")
        if generator is not None and not isinstance(generator, str):
            generator = None
            raise ValueError(f"`generator` must be text; got {record['generator']!r:.40}")
        if all(record.get(key) is not None for key in STEPWISE) and record.get("steps") is None:
            record = _of_stepwise(record)
        label = _label(record.get("label"))
        problem, steps = record.get("problem"), record.get("steps")
        if not isinstance(problem, str) or not problem:
            raise ValueError(f"`problem` must be text; got {problem!r:.40}")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
            raise ValueError(f"`steps` must be a list of texts; got {steps!r:.40}")
        if label is None or label >= len(steps):
            raise ValueError(
                f"`label` must be -1 or one of its {len(steps)} steps, counted from 0; "
                f"got {record.get('label')!r:.40}"
            )
        right = finite(record.get("final_answer_correct"), "final_answer_correct")
        if right is not None and not isinstance(right, bool):
            raise ValueError(f"`final_answer_correct` must be true or false; got {right!r:.40}")
    except ValueError as error:
        label = _label(record.get("label")) if label is None else label
        return Item(name, "", (), label, False, generator, str(error))
    return Item(name, problem, tuple(steps), label, label == -1 if right is None else right, generator)


def _label(value: Any) -> int | None:
    """-1 or a step's index; None where it is neither. 2.0 of a float column is 2."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    return int(value) if whole and value >= -1 else None


def _of_stepwise(record: dict[str, Any]) -> dict[str, Any]:
    """TRL's stepwise format: a step each in `completions`, whether it is right in `labels` (or 1 and 0)."""
    labels, steps = record["labels"], record["completions"]
    sound = isinstance(labels, list) and isinstance(steps, list) and len(labels) == len(steps)
    if not sound or not all(isinstance(right, int) and right in (0, 1) for right in labels):
        raise ValueError(
            f"`labels` must hold true or false (or 1 or 0) for each of `completions`; got {labels!r:.40}"
        )
    first = labels.index(False) if False in labels else -1
    return {**record, "problem": record["prompt"], "steps": steps, "label": first}


def evaluate(config: EvalConfig, progress: bool = True) -> dict[str, Any]:
    """Scores every solution, prints the table, writes results.json and the per-item parquet files.

    Returns:
        What results.json holds.

    Raises:
        IpvrmError: unreadable data or model, a bad step format, or an output folder with scores made under
            other settings.
    """
    check_step_format(config.step_format)
    for name in ("max_length", "batch_tokens", "limit", "bootstrap_resamples"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise IpvrmError(f"--{name} must be at least 1; got {value}")
    _servers(config)
    files = _files(config.data)
    subsets = {_subset(path): read_items(path, config.limit) for path in files}
    if len(subsets) != len(files) or not subsets:
        raise IpvrmError(f"--data: every subset needs a file of its own name; got {', '.join(files)}")
    shown = Progress(enabled=progress)
    with locked(config.output_dir, folder=True):
        return _evaluate(config, subsets, shown, progress)


def _servers(config: EvalConfig) -> tuple[str, ...]:
    return served_pair(config.engine, config.reference_engine, config.engine_timeout, use_cpu=config.use_cpu)


def _evaluate(
    config: EvalConfig, subsets: dict[str, list[Item]], shown: Any, progress: bool
) -> dict[str, Any]:
    from ipvrm.models.reward_model import RewardModel

    reward_model = RewardModel.from_pretrained(
        config.model,
        config.reference,
        "cpu" if config.use_cpu else None,
        servers=_servers(config),
        timeout=config.engine_timeout,
        objective=config.objective,
        chat_template_kwargs=given_template_kwargs(config.chat_template_kwargs),
    )
    output = Path(config.output_dir)
    remove_leftovers(output)
    key = _model_key(config, reward_model.info)
    scored = {
        name: _scores(config, reward_model, key, path, items, shown)
        for path, (name, items) in zip(_files(config.data), subsets.items(), strict=True)
    }
    results = summarise(config, subsets, scored, reward_model.info)
    for name, items in subsets.items():
        _write_items(output / f"items-{name}.parquet", items, scored[name], results["subsets"][name]["rules"])
    results = {
        "config": asdict(config),
        "reward_model": asdict(reward_model.info),
        **results,
        "manifest": manifest(seeds={"bootstrap": config.seed}),
    }
    write_json(output / "results.json", results)
    if progress:
        from rich.console import Console

        others = (release_table(results), calibration_table(results), generator_table(results))
        for table in (*f1_tables(results), *others):
            if table is not None:
                Console().print(table)
        for note in results["notes"]:
            Console().print(note, markup=False)
        Console().print(f"written to {output}", markup=False)
    return results


# ------------------------------------------------------------------------------------------------- scores


def _scores(
    config: EvalConfig,
    reward_model: Any,
    model_key: dict[str, Any],
    path: str,
    items: Sequence[Item],
    shown: Any,
) -> list[dict[str, Any]]:
    """Per item: `num_tokens` and one list of scores per rule, all None where it is too long, or where it is
    `unusable` for the reason that stands there."""
    name = _subset(path)
    folder = Path(config.output_dir) / "scores" / name
    folder.mkdir(parents=True, exist_ok=True)
    key = model_key | {"data": file_hash(path)}
    note = shown.note if reward_model.on_cpu else None
    begin_or_go_on(folder / "key.json", key, f"what is in {folder}", WORDS, note)
    remove_leftovers(folder)
    rows: list[dict[str, Any]] = []
    with shown.bar(f"scoring {name}", len(items)) as update:
        for chunk in chunked(items, PART_ITEMS):
            start = len(rows)
            part = folder / f"part-{start:06d}-{len(chunk)}.parquet"
            if (stored := _read_part(part, len(chunk), shown)) is not None:
                rows += stored
            else:
                for few in chunked(chunk, portion(len(items), PART_ITEMS)):
                    rows += _score_chunk(config, reward_model, few)
                    update(len(rows))
                _write_parquet(part, rows[start:])
            update(len(rows))
    if all(row["unusable"] for row in rows):
        raise IpvrmError(f"{path}: no solution can be scored; {items[0].name}: {rows[0]['unusable']}")
    return rows


def _score_chunk(config: EvalConfig, reward_model: Any, chunk: Sequence[Item]) -> list[dict[str, Any]]:
    from ipvrm.evaluate.scoring import SolutionScores, one_by_one, score_solutions

    def score(part: Sequence[Item]) -> list[Any]:
        return score_solutions(
            reward_model,
            [(item.problem, item.steps) for item in part],
            step_format=config.step_format,
            step_separator=config.step_separator,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
        )

    usable = [item for item in chunk if item.unusable is None]
    of_usable = iter(one_by_one(score, usable))
    new: list[dict[str, Any]] = []
    for item in chunk:
        found = item.unusable or next(of_usable)
        if isinstance(found, SolutionScores):
            new.append({"num_tokens": found.num_tokens} | found.by_rule | {"unusable": None})
        else:
            new.append({"num_tokens": None} | dict.fromkeys(RULES) | {"unusable": found})
    return new


def _model_key(config: EvalConfig, info: Any) -> dict[str, Any]:
    """What stored scores depend on, besides the data."""
    return {
        "model": info.weights_hash,
        "reference": info.reference_hash,
        "beta": info.beta,
        "template": info.template_hash,
        "chat_template_kwargs": info.chat_template_kwargs,
        **settings_of(config),
        **kind_of(config.engine),
    }


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Columns typed by their names, so that a file of nothing but nulls reads like any other."""
    import pyarrow as pa

    types = {"index": pa.int64(), "label": pa.int64(), "num_steps": pa.int64(), "num_tokens": pa.int64()}
    types |= {"id": pa.string(), "unusable": pa.string()} | {rule: pa.list_(pa.float64()) for rule in RULES}
    schema = pa.schema([(name, types.get(name, pa.int64())) for name in rows[0]])
    write_table(path, rows, schema)


def _read_part(path: Path, count: int, shown: Any) -> list[dict[str, Any]] | None:
    """The rows of a finished part; None where there is none, or only half of one, which is said."""
    import pyarrow.parquet

    if not path.exists():
        return None
    try:
        with reading(path, "not a readable part", "it is made again"):
            rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        if len(rows) != count or set(rows[0]) != {"num_tokens", *RULES, "unusable"}:
            raise IpvrmError(f"{path}: not {count} scored solutions; it is made again")
    except IpvrmError as error:
        shown.note(str(error))
        return None
    return rows


def _write_items(
    path: Path, items: Sequence[Item], scored: list[dict[str, Any]], rules: dict[str, dict[str, Any]]
) -> None:
    """One row per item: its scores, and what each rule predicts under each protocol (null: not scored)."""
    rows = []
    for index, (item, scores) in enumerate(zip(items, scored, strict=True)):
        row: dict[str, Any] = {
            "index": index,
            "id": item.name,
            "label": item.label,
            "num_steps": len(item.steps),
        }
        row |= scores
        for rule in RULES:
            for protocol in PROTOCOLS:
                entry, values = rules[rule][protocol], scores[rule]
                known = entry is not None and values is not None
                row[f"{rule}_{protocol}"] = predict(values, score_threshold(entry)) if known else None
        rows.append(row)
    _write_parquet(path, rows)


# ------------------------------------------------------------------------------------------------ numbers


def summarise(
    config: EvalConfig,
    subsets: dict[str, list[Item]],
    scored: dict[str, list[dict[str, Any]]],
    info: Any,
) -> dict[str, Any]:
    """F1 of every subset, rule and protocol, the trivial baselines, and notes on what is missing."""
    labels = {name: [item.label for item in items] for name, items in subsets.items()}
    notes: list[str] = []
    both: dict[str, bool] = {}
    for name, answers in labels.items():
        both[name] = -1 in answers and any(k is not None and k >= 0 for k in answers)
        if not both[name]:
            notes.append(f"{name}: all of its solutions are of one kind, so F1 is undefined")
    chooser = config.transfer_from if both.get(config.transfer_from, False) else None
    if chooser is None:
        notes.append(
            f"transfer: no usable subset {config.transfer_from!r} to choose a threshold on among "
            f"{', '.join(subsets)} (--transfer_from names another)"
        )
    calibrated = info.objective not in NO_LOG_ODDS
    if not calibrated:
        notes.append(f"no calibration: the mean value under {info.objective} is no log-odds of the outcome")
    results: dict[str, Any] = {}
    for name, items in subsets.items():
        refused = [
            {"item": number, "id": item.name, "reason": scores["unusable"]}
            for number, (item, scores) in enumerate(zip(items, scored[name], strict=True), 1)
            if scores["unusable"] is not None
        ]
        too_long = sum(scores["step"] is None for scores in scored[name]) - len(refused)
        if refused:
            lines = [f"{entry['id']}: {entry['reason']}" for entry in refused]
            notes.append(
                f"{name}: {len(refused)} of {len(items)} solutions cannot be scored; they count as missed:\n"
                + listed(lines, len(lines))
            )
        if too_long:
            notes.append(
                f"{name}: {too_long} of {len(items)} solutions have more than {config.max_length} tokens; "
                "they count as missed (--max_length)"
            )
        rules: dict[str, Any] = {}
        for rule in RULES:
            rules[rule] = dict.fromkeys((*PROTOCOLS, "release"))
            if not both[name]:
                continue
            own = values, known = _with_labels(items, scored[name], rule)
            rules[rule]["release"] = _on_released_grid(rule, values, known, info.beta)
            chosen_on = {"oracle": own}
            if chooser is not None:
                chosen_on["transfer"] = _with_labels(subsets[chooser], scored[chooser], rule)
            for protocol, pair in chosen_on.items():
                threshold, _ = sweep(*pair)
                rules[rule][protocol] = f1_report(
                    values, known, threshold, config.bootstrap_resamples, config.seed
                )
        sound = [item for item in items if item.unusable is None]
        baselines = trivial_baselines(
            [item.label for item in sound if item.label is not None], [len(item.steps) for item in sound]
        )
        results[name] = {
            "items": len(items),
            **_counts(labels[name]),
            "too_long": too_long,
            "unusable": refused,
            "rules": rules,
            "calibration": _calibration(items, scored[name]) if calibrated else None,
            "generators": _by_generator(items, scored[name], rules),
            "baselines": {key: finite_or_none(value._asdict()) for key, value in baselines.items()},
        }
    mean: dict[str, Any] = {}
    if len(subsets) > 1 and all(both.values()):
        for rule in RULES:
            entries = [[r["rules"][rule][protocol] for r in results.values()] for protocol in PROTOCOLS]
            mean[rule] = {
                protocol: None if None in found else float(np.mean([entry["f1"] for entry in found]))
                for protocol, found in zip(PROTOCOLS, entries, strict=True)
            }
    return {"transfer_from": chooser, "subsets": results, "mean_f1": mean, "notes": notes}


def _with_labels(
    items: Sequence[Item], scored: Sequence[dict[str, Any]], rule: str
) -> tuple[list[Any], list[int]]:
    """Scores and labels, by which F1 is defined; where no label is known, a miss in either half."""
    values: list[Any] = []
    labels: list[int] = []
    for item, scores in zip(items, scored, strict=True):
        possible = [-1, 0] if item.label is None else [item.label]
        values += [scores[rule]] * len(possible)
        labels += possible
    return values, labels


def _counts(labels: Sequence[int | None]) -> dict[str, int]:
    unlabelled, correct = labels.count(None), labels.count(-1)
    return {
        "erroneous": len(labels) - unlabelled - correct,
        "correct": correct,
        "unlabelled": unlabelled,
    }


def _on_released_grid(rule: str, values: Sequence[Any], labels: Sequence[int], beta: float) -> dict[str, Any]:
    """The script divides the two length-normalised scores by sqrt(beta) before their sigmoid."""
    scale = math.sqrt(beta) if rule in ("mean", "mean_diff") else 1.0
    tau, f1 = released_grid([v and [x / scale for x in v] for v in values], labels)
    return finite_or_none({"tau": tau} | f1._asdict())


def _calibration(items: Sequence[Item], scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [
        (0.5 * (1 + math.tanh(scores["mean"][-1] / 2)), int(item.right))  # the sigmoid, without overflow
        for item, scores in zip(items, scored, strict=True)
        if scores["mean"] is not None
    ]
    return calibration([p for p, _ in pairs], [r for _, r in pairs])


def _by_generator(
    items: Sequence[Item], scored: Sequence[dict[str, Any]], rules: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Of each generator its counts and F1 by rule and protocol, at the thresholds of the subset."""
    found: dict[str, Any] = {}
    for generator in sorted({item.generator for item in items if item.generator is not None}):
        chosen = [i for i, item in enumerate(items) if item.generator == generator]
        entry: dict[str, Any] = _counts([items[i].label for i in chosen])
        for rule in RULES:
            scores, labels = _with_labels([items[i] for i in chosen], [scored[i] for i in chosen], rule)
            at = {p: rules[rule][p] for p in PROTOCOLS}
            f1 = {
                p: None if e is None else f1_of_hits(hits(scores, labels, score_threshold(e)), labels).f1
                for p, e in at.items()
            }
            entry[rule] = finite_or_none(f1)
        found[generator] = entry
    return found
