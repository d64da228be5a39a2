"""`ipvrm eval policy`: avg@k and pass@k of a policy on problems with known answers, by source.

Responses are sampled as `ipvrm rollout` does it and judged as `ipvrm label` does it, in files of their own in
the output folder, so that either goes on where it stopped. Of a problem with n judged responses, c of them
right,

    avg@n = c / n                   pass@k = 1 - C(n - c, k) / C(n, k)      (unbiased, arXiv 2107.03374)

each a mean over problems, with intervals over problems where there are two or more. A response that is cut
off is judged by what there is of it, and one without text or without an answer is wrong; what the verifier
fails on is neither right nor wrong, but counted and left out. A row without a ground truth says nothing of a
policy: it is named and left out. One with a truth that cannot be asked (no prompt, one that the template
refuses or that is too long) is a problem that was never solved, and is named with the reason. `mean` is over
the sources, as in the paper's tables.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ipvrm.data.chat import preset_template_kwargs
from ipvrm.data.files import records
from ipvrm.data.rows import as_object, ground_truth, listed
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.best_of_n import pass_at_n
from ipvrm.evaluate.thresholds import finite_or_none, percentile_interval
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.models.causal_lm import load_tokenizer
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL
from ipvrm.output.locks import locked
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.rollouts.verify import TIMEOUT_SECONDS
from ipvrm.run_folder import FREE, manifest, remove_leftovers, write_json

ROLLOUTS, LABELLED = "rollouts.parquet", "labelled.parquet"


@dataclass(frozen=True)
class PolicyEvalConfig:
    """Accuracy of a policy: avg@k and pass@k by source.

    --preset paper samples at temperature 0.6 and top-p 0.95; release at 0.7, top-p 0.8 and top-k 20, without
    thinking. Flags that are given win over both.
    """

    model: str = field(metadata=FREE)
    """Policy: a folder or a Hub name."""
    data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `prompt` and `answer` (or `reward_model.ground_truth`); `data_source` says
    which are reported together."""
    output_dir: str = field(metadata=FREE)
    """Folder for results.json, rollouts.parquet and labelled.parquet."""
    preset: Preset = "paper"
    """paper, or release: what the released command samples with."""
    num_generations: int = 8
    """Responses per problem."""
    k: tuple[int, ...] = field(default=(1, 4, 8), metadata=FREE)
    """Of pass@k."""
    temperature: float | None = None
    """Default: 0.6; release: 0.7. 0 takes the likeliest token, for one response per problem."""
    top_p: float | None = None
    """Default: 0.95; release: 0.8."""
    top_k: int | None = None
    """Only so many of the likeliest tokens, 0 for no limit. Default: 0; release: 20."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object. Default: none; release: '{"enable_thinking": false}'
    where the template reads it."""
    max_new_tokens: int = 2048
    """Most tokens of a response; one that has not ended by then is judged by what there is of it."""
    seed: int = 42
    limit: int | None = None
    """Only the first so many rows."""
    verifier: str = "math"
    """math, string or module:function, as in `ipvrm label`."""
    verifier_timeout: float = field(default=TIMEOUT_SECONDS, metadata=FREE)
    """Hard deadline of one answer, in seconds; what fails is counted and left out."""
    verifier_workers: int | None = field(default=None, metadata=FREE)
    """Processes. Default: one per available core."""
    per_device_eval_batch_size: int = field(default=64, metadata=FREE)
    """Most responses generated at a time."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """transformers, or the address of a server of `model`, as in `ipvrm rollout`."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of its answers."""
    bf16: bool = False
    """Weights and cache in bf16, in place of fp32."""
    bootstrap_resamples: int = field(default=2000, metadata=FREE)
    """Resamples of the problems for the intervals."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Generate on the CPU although there is an accelerator."""


class Judged(NamedTuple):
    """The judged responses to one problem: how many, and how many are right."""

    judged: int
    right: int


def evaluate(config: PolicyEvalConfig, progress: bool = True) -> dict[str, Any]:
    """Samples and judges what is missing, prints the table and writes results.json, which it returns.

    Raises:
        IpvrmError: settings out of range, or from `roll_out` and `label_file`.
    """
    if min(config.k, default=0) < 1 or max(config.k) > config.num_generations:
        raise IpvrmError(
            f"--k must lie between 1 and --num_generations {config.num_generations}; got {config.k}"
        )
    if config.bootstrap_resamples < 1:
        raise IpvrmError(f"--bootstrap_resamples must be at least 1; got {config.bootstrap_resamples}")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir, folder=True):
        return _evaluate(config, progress)


def sampling_of(config: PolicyEvalConfig) -> dict[str, Any]:
    """Temperature, top_p and top_k: as given, else of the preset."""
    presets = {"temperature": (0.6, 0.7), "top_p": (0.95, 0.8), "top_k": (0, 20)}
    found = {}
    for name, (paper, release) in presets.items():
        given = getattr(config, name)
        found[name] = by_preset(config.preset, paper=paper, release=release) if given is None else given
    return found


def _evaluate(config: PolicyEvalConfig, progress: bool) -> dict[str, Any]:
    output = Path(config.output_dir)
    remove_leftovers(output)
    kwargs = config.chat_template_kwargs
    if kwargs is None and config.preset == "release":
        kwargs = preset_template_kwargs(None, config.preset, load_tokenizer(config.model))
    sampling = sampling_of(config)
    rollout = RolloutConfig(
        model=config.model,
        input=config.data,
        output=str(output / ROLLOUTS),
        num_generations=config.num_generations,
        chat_template_kwargs=kwargs,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        limit=config.limit,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        engine=config.engine,
        engine_timeout=config.engine_timeout,
        bf16=config.bf16,
        on_bad_row="skip",
        use_cpu=config.use_cpu,
        **sampling,
    )
    sampled = roll_out(rollout, progress)
    label = LabelConfig(
        input=rollout.output,
        output=str(output / LABELLED),
        verifier=config.verifier,
        timeout_seconds=config.verifier_timeout,
        num_workers=config.verifier_workers,
        keep_all=True,
    )
    labelled = label_file(label, progress)
    problems, counts = _judged(rollout.output, label.output)
    never, left_out = _add_missed(config, rollout.output, sampled["unusable"], problems, counts)
    results = {
        **summarise(config, problems, counts),
        "unusable": never,
        "left_out": left_out,
        "sampling": sampling,
        "counts": {**labelled["counts"], "bad": sampled["bad"]},
        "manifest": manifest(seeds={"seed": config.seed}, config=asdict(config)),
    }
    write_json(output / "results.json", results)
    if progress:
        _print(results)
    return results


def _judged(rollouts: str, labelled: str) -> tuple[dict[str, dict[int, Judged]], dict[str, Counter[str]]]:
    """By source, the problems and what became of the responses."""
    labels = {r["row"]: r["label"] for *_, r in records(labelled, ("row", "label"))}  # row: of the rollouts
    columns = ("row", "data_source", "truncated")
    found: dict[str, dict[int, Judged]] = {}
    counts: dict[str, Counter[str]] = {}
    for _, _, number, record in records(rollouts, columns):
        source = record["data_source"] or ""
        label = labels.get(number)
        became = counts.setdefault(source, Counter(responses=0, truncated=0, failed=0))
        became.update(responses=1, truncated=int(record["truncated"]), failed=int(label is None))
        problems = found.setdefault(source, {})
        old = problems.setdefault(record["row"], Judged(0, 0))
        if label is not None:
            problems[record["row"]] = Judged(old.judged + 1, old.right + label)
    return found, counts


def _add_missed(
    config: PolicyEvalConfig,
    rollouts: str,
    unusable: Sequence[str],
    problems: dict[str, dict[int, Judged]],
    counts: dict[str, Counter[str]],
) -> tuple[list[str], list[str]]:
    """Adds the rows that have a truth and no responses as problems never solved; those without a truth get no
    value.

    Returns: of `unusable`, the rows without responses and why, those never solved; and the rows left out.
    """
    truths = {record["row"]: record["answer"] for *_, record in records(rollouts, ("row", "answer"))}
    never, left_out = list(unusable), list[str]()
    rows = records(config.data, ("prompt", "data_source", "answer", "reward_model"), check=False)
    for file, row, number, record in islice(rows, config.limit):
        if truths.get(number) is not None:
            continue
        source = record.get("data_source") if isinstance(record, dict) else None
        source = source if isinstance(source, str) else ""
        if number in truths:
            problems[source][number] = Judged(0, 0)
            left_out.append(f"{config.data}:{number}: no ground truth")
        elif _truth(record) is None:
            place = (f"{file}:{row}: ", f"{config.data}:{number}: ")
            left_out += [reason for reason in never if reason.startswith(place)]
            never = [reason for reason in never if not reason.startswith(place)]
        else:
            counts.setdefault(source, Counter(responses=0, truncated=0, failed=0))
            problems.setdefault(source, {})[number] = Judged(config.num_generations, 0)
    return never, left_out


def _truth(record: Any) -> str | None:
    """None also for one that is neither a text nor a number, and of a row that is no record."""
    try:
        return ground_truth(as_object(record))
    except ValueError:
        return None


def summarise(
    config: PolicyEvalConfig,
    problems: Mapping[str, Mapping[int, Judged]],
    counts: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """avg@n and pass@k of every source with intervals, and their means over the sources.

    Args:
        problems: by source and row. counts: by source, for the table.
    """
    names = [f"avg@{config.num_generations}", *(f"pass@{k}" for k in config.k)]
    sources: dict[str, Any] = {}
    for source, of_source in problems.items():
        values: dict[str, list[float]] = {
            names[0]: [p.right / p.judged for p in of_source.values() if p.judged]
        }
        for k in config.k:
            values[f"pass@{k}"] = [
                pass_at_n([i < p.right for i in range(p.judged)], k)
                for p in of_source.values()
                if p.judged >= k
            ]
        sources[source] = {
            "problems": len(of_source),
            **dict(counts[source]),
            "metrics": {name: _mean(values[name], config) for name in names},
        }
    means = {}
    for name in names:
        of_sources = [entry["metrics"][name]["value"] for entry in sources.values()]
        means[name] = None if None in of_sources else float(np.mean(of_sources))
    return {"sources": sources, "mean": means}


def _mean(values: Sequence[float], config: PolicyEvalConfig) -> dict[str, Any]:
    """`problems` that have a value, their mean and its interval; null where there is none, and no interval
    where there is one problem alone."""
    if len(values) < 2:
        value = values[0] if values else None
        return {"problems": len(values), "value": value, "low": None, "high": None}
    rng = np.random.default_rng(config.seed)
    draws = rng.integers(0, len(values), (config.bootstrap_resamples, len(values)))
    interval = percentile_interval(np.array(values)[draws].mean(1))
    return {"problems": len(values)} | finite_or_none(
        {"value": math.fsum(values) / len(values), **interval._asdict()}
    )


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(results["mean"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(("source", "problems", "cut off", "failed", *names)):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for source, entry in results["sources"].items():
        cells = []
        for name in names:
            m = entry["metrics"][name]
            shown = "-" if m["value"] is None else f"{100 * m['value']:.1f}"
            if m["low"] is not None and name == names[0]:
                shown += f" ({100 * m['low']:.1f}-{100 * m['high']:.1f})"
            cells.append(shown)
        numbers = (str(entry[key]) for key in ("problems", "truncated", "failed"))
        table.add_row(source or "all", *numbers, *cells)
    if len(results["sources"]) > 1:
        means = ("-" if value is None else f"{100 * value:.1f}" for value in results["mean"].values())
        table.add_row("mean of the sources", "", "", "", *means)
    table.caption = "Right answers in %, 95 % interval over problems; cut off and failed count responses."
    table.caption_justify = "left"
    console = Console(highlight=False)
    console.print(table)
    for key, became in (
        ("unusable", "rows cannot be asked; they count as never solved"),
        ("left_out", "rows have no ground truth that can be read; they are left out"),
    ):
        if rows := results[key]:
            console.print(f"{len(rows)} {became}:\n" + listed(rows, len(rows)), markup=False)


def main(config: PolicyEvalConfig) -> None:
    """Console entry."""
    evaluate(config)
    print(f"everything is in {config.output_dir}")
