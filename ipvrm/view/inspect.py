"""`ipvrm inspect`: scored solutions as one self-contained HTML page: what the models say of every token."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ipvrm.data.chat import given_template_kwargs, tokenizer_hash
from ipvrm.data.rows import OnBadRow
from ipvrm.data.steps import RULES, STEP_FORMAT, STEP_SEPARATOR, check_step_format
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.thresholds import score_threshold
from ipvrm.models.causal_lm import least_positions
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel, RewardModelInfo, read_info
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.run_folder import installed_version, read_json, remove_leftovers_of, write_json, write_text
from ipvrm.view.page import page
from ipvrm.view.traces import (
    MIN_PROB,
    Item,
    Judge,
    Policy,
    Reading,
    ask_policy,
    data_block,
    pick,
    read_all,
    read_board,
    read_items,
    shrink,
)

NO_EVALUATION = "logit 0: no evaluation of this model was found (--threshold_from)"
RULE = "step"


@dataclass(frozen=True)
class InspectConfig:
    """Traces as one HTML page: the text with TD as colour, prefix values, flagged and labelled steps.

    In: what `ipvrm score` takes, `label` (first wrong step, -1 for none) optional; ProcessBench files; or the
    JSONL of the released code's logging board, for which no --model is given.
    """

    input: str
    """.jsonl, .json or .parquet file of problems and steps."""
    output: str
    """HTML file to write."""
    model: tuple[str, ...] = ()
    """Run folders of one reward model, or of two to be compared."""
    reference: str | None = None
    """Where the models' reference is now, if it has moved."""
    policy: str | None = None
    """Whose candidates are shown, a model folder. Default: the reference of the first reward model."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object. Default: those that the models were trained with;
    others are refused."""
    pick: Literal["mistakes", "drop", "disagreement", "first"] = "mistakes"
    """Which traces: the most confident mistakes of the first model (needs labels), the largest drops of its
    value, where two models flag different steps, or the first of the file."""
    k: int = 20
    """How many of them."""
    limit: int | None = None
    """Only the first so many solutions of the file are scored."""
    rule: Literal["step", "prefix", "mean", "mean_diff"] | None = None
    """What the score of a step is. Default: that of the evaluation where it names one, else step."""
    threshold_from: tuple[str, ...] = ()
    """results.json of `ipvrm eval processbench` (or the demo's evaluation.json) whose threshold is taken.
    Default: the one in a folder of the run; without one, logit 0."""
    step_format: str = STEP_FORMAT
    """How a step is written; {i} is its number from 1, {step} its text."""
    step_separator: str = STEP_SEPARATOR
    """What stands between two steps."""
    max_size: float = 5.0
    """Most megabytes of data; candidates whose TD differ least are left out first, and counted."""
    json: bool = False
    """Also write the data alone, as .json beside the page."""
    batch_tokens: int = BATCH_TOKENS
    """Most tokens of a padded forward."""
    on_bad_row: OnBadRow = "error"
    """Lines that cannot be read or scored: stop and list them, or skip."""
    use_cpu: bool = False
    """Score on the CPU although there is an accelerator."""


def inspect(config: InspectConfig, progress: bool = True) -> dict[str, Any]:
    """Writes the page and returns its data (`ipvrm.view.traces`).

    Raises:
        IpvrmError: settings out of range, unreadable input or model, bad lines, or nothing to show.
    """
    check_step_format(config.step_format)
    output = Path(config.output)
    if config.k < 1 or (config.limit is not None and config.limit < 1) or config.max_size <= 0:
        raise IpvrmError("--k, --limit and --max_size must be positive")
    if output.suffix != ".html":
        raise IpvrmError(f"--output {output}: must end in .html")
    shown = Progress(enabled=progress)
    with locked(output):
        remove_leftovers_of(output, output.with_suffix(".json"))
        items, boards = read_items(config.input, config.limit, config.on_bad_row)
        if boards:
            if config.model:
                raise IpvrmError(
                    f"--input {config.input}: a logging board has its numbers; leave --model out"
                )
            items, of_board, judge = read_board(boards)
            readings, judges = [of_board], [judge]
        else:
            if len(config.model) not in (1, 2):
                raise IpvrmError(f"--model takes one or two run folders; got {len(config.model)}")
            items, readings, judges = _read(config, items, shown)
        picked = pick(config.pick, config.k, items, readings, judges)
        data = data_block(
            picked,
            items,
            readings,
            judges,
            ipvrm=installed_version("ipvrm"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            date=time.strftime("%Y-%m-%d"),
            min_prob=MIN_PROB,
        )
        if dropped := shrink(data, int(config.max_size * 1e6)):
            shown.note(f"the candidates of {dropped} tokens are left out to stay under --max_size")
        data["dropped_candidates"] = dropped
        write_text(output, page("trace", data))
        if config.json:
            write_json(output.with_suffix(".json"), data)
    return data


def _read(
    config: InspectConfig, items: Sequence[Item], shown: Progress
) -> tuple[list[Item], list[list[Reading]], list[Judge]]:
    """What every model says of the solutions that all of them can read; one model is in memory at a time."""
    judges = [_judge(config, number) for number in range(len(config.model))]
    written = {"step_format": config.step_format, "step_separator": config.step_separator}
    device = "cpu" if config.use_cpu else torch.accelerator.current_accelerator() or "cpu"
    policy: Policy | None = None
    found: list[list[Reading | str]] = []
    for folder, judge in zip(config.model, judges, strict=True):
        model = RewardModel.from_pretrained(
            folder,
            config.reference,
            device,
            chat_template_kwargs=given_template_kwargs(config.chat_template_kwargs),
        )
        if config.policy is not None:  # it reads the same tokens
            model.max_positions = least_positions(model.max_positions, config.policy)
        if config.policy is not None and policy is None:
            policy = ask_policy(
                config.policy, model, items, device, batch_tokens=config.batch_tokens, **written
            )
        readings: list[Reading | str] = []
        with shown.bar(judge.name, len(items)) as update:
            for reading in read_all(model, judge, items, policy, batch_tokens=config.batch_tokens, **written):
                readings.append(reading)
                update(len(readings))
        found.append(readings)
        if policy is None:  # the candidates of the first model's reference are the second's too
            known = [r if not isinstance(r, str) else None for r in readings]
            policy = Policy(
                [np.zeros(0) if r is None else r.prob for r in known],
                [{} if r is None else r.choices for r in known],
                tokenizer_hash(model.tokenizer),
            )
        del model  # else the next pair would be loaded beside it
    kept = []
    for number, (item, *of_item) in enumerate(zip(items, *found, strict=True)):
        reason = next((reading for reading in of_item if isinstance(reading, str)), None)
        if reason is None:
            kept.append(number)
        elif config.on_bad_row == "error":
            raise IpvrmError(f"--input {config.input}: {item.id}: {reason} (--on_bad_row skip leaves it out)")
        else:
            shown.note(f"skipped {item.id}: {reason}")
    whole = [[reading for i in kept if not isinstance(reading := of_model[i], str)] for of_model in found]
    return [items[i] for i in kept], whole, judges


# ------------------------------------------------------------------------------------------------ thresholds


def _judge(config: InspectConfig, number: int) -> Judge:
    """The model of that number as the page names it, with its threshold."""
    folder = Path(config.model[number])
    info = read_info(folder)
    names = [Path(other).resolve().name for other in config.model]
    name = names[number] if names.count(names[number]) == 1 else "/".join(folder.resolve().parts[-2:])
    given = [Path(file) for file in config.threshold_from]
    beside = [*sorted(folder.glob("*/results.json")), folder.parent / "evaluation" / "evaluation.json"]
    for file in given or [f for f in beside if f.is_file()]:
        if (found := threshold_in(file, info, config.rule)) is not None:
            rule, threshold = found
            place = file.resolve().relative_to(folder.resolve().parent) if not given else file
            return Judge(name, info.objective, info.beta, rule, threshold, str(place))
    if given:
        raise IpvrmError(
            f"--threshold_from {', '.join(config.threshold_from)}: none holds a threshold of {folder} "
            f"under the rule {config.rule or RULE}; run `ipvrm eval processbench` on it or leave the flag out"
        )
    return Judge(name, info.objective, info.beta, config.rule or RULE, 0.0, NO_EVALUATION)


def threshold_in(file: Path, info: RewardModelInfo, rule: str | None) -> tuple[str, float] | None:
    """(rule, threshold) that an evaluation in `file` has chosen for this reward model; None for another file.

    It knows the model by the hash of its weights (`ipvrm eval processbench`) or by its objective (the demo).
    """
    stored = read_json(file)
    if not isinstance(stored, dict):
        return None
    if isinstance(models := stored.get("models"), dict) and info.objective in models:
        rule = rule or models[info.objective]["rule"]
        entry = models[info.objective]["validation"][rule]
        return rule, score_threshold({"tau": entry["tau"], "score_threshold": entry["score"]})
    rule = rule or RULE
    assert rule in RULES
    if (
        isinstance(about := stored.get("reward_model"), dict)
        and about.get("weights_hash") == info.weights_hash
    ):
        for subset in stored["subsets"].values():
            if (entry := subset["rules"][rule]["transfer"]) is not None:
                return rule, score_threshold(entry)
    return None


def main(config: InspectConfig) -> None:
    """Console entry."""
    data = inspect(config)
    size = Path(config.output).stat().st_size
    print(f"{config.output}: {len(data['traces'])} traces, {size / 1e6:.2f} MB")
