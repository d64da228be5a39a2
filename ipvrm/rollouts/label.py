"""`ipvrm label`: outcome labels for rollouts, as the reward-model data that `ipvrm train-rm` reads."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipvrm.data.rows import COLUMNS as CONVERSATION_COLUMNS
from ipvrm.data.rows import (
    TURNS,
    BadRow,
    OnBadRow,
    Sampled,
    Turns,
    data_source,
    ground_truth,
    records,
    report_bad_rows,
    sampled,
    truncated,
    turns,
)
from ipvrm.errors import IpvrmError
from ipvrm.progress import Progress
from ipvrm.rollouts.verify import OUTCOMES, TIMEOUT_SECONDS, Outcome, Verdict, VerifierPool
from ipvrm.run_folder import manifest, summary_path, write_json, write_table

COLUMNS = (*CONVERSATION_COLUMNS, "answer", "reward_model", "data_source", "sample")
LISTED_FAILURES = 20
KEPT: tuple[Outcome, ...] = ("right", "wrong", "no_answer")
# Why a row gets no label, besides the outcomes of a verifier.
SKIPPED = ("missing_ground_truth", "truncated", "empty")
MEANING = {
    "right": "label 1",
    "wrong": "label 0",
    "no_answer": "label 0: no final answer in the response",
    "timeout": "dropped: no verdict by the deadline",
    "crash": "dropped: the verifier's process died",
    "error": "dropped: the verifier raised an exception",
    "unreadable_ground_truth": "dropped: the verifier cannot read the ground truth",
    "missing_ground_truth": "dropped: the row has none",
    "truncated": "dropped: cut off before its end of turn",
    "empty": "dropped: a response without text",
}


@dataclass(frozen=True)
class LabelConfig:
    """Outcome labels for rollouts: 1 where the final answer is right, 0 where it is wrong or missing.

    In: `prompt` and `response`, or `conversation`; the ground truth in `answer` or
    `reward_model.ground_truth`; `truncated` and `data_source` where known (what `ipvrm rollout` writes).
    Out: `prompt`, `response`, `label` and more, for `ipvrm train-rm`; OUTPUT.summary.json
    counts what became of every row.
    Answers are checked in worker processes with a hard deadline. What times out or crashes is counted and
    left out, never labelled 0.
    """

    input: str
    """.parquet, .jsonl or .json file of rollouts."""
    output: str
    """.parquet or .jsonl file to write; it appears when all rows are labelled."""
    verifier: str = "math"
    """math (math-verify's equivalence; plain numbers by value), string (the final answer, character by
    character; plain numbers by value) or module:function, called with (response, answer), that returns True,
    False or None (no answer). math and string look behind the thinking for the last box that is not empty,
    and of a worked solution as ground truth take what follows its ####. Ground truths that they cannot read
    are left out, counted and named, never labelled 0."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """Hard deadline of one answer: the process is killed, and the row counted and left out."""
    num_workers: int | None = None
    """Verifier processes. Default: one per available core."""
    keep_truncated: bool = False
    """Label responses that were cut off like all others, in place of leaving them out."""
    on_bad_row: OnBadRow = "error"
    """Rows that cannot be used: stop and list them, or skip."""


@dataclass(frozen=True)
class _Rollout:
    row: int
    turns: Turns
    answer: str | None
    data_source: str | None
    sample: int | None
    truncated: bool
    sampled: Sampled | None


def _read(path: Path) -> tuple[list[_Rollout], list[BadRow]]:
    rollouts, bad = [], []
    for number, record in records(path, COLUMNS, TURNS):
        try:
            answer, source, cut = ground_truth(record), data_source(record), truncated(record)
            found, ids = turns(record), sampled(record)
            rollouts.append(_Rollout(number, found, answer, source, record.get("sample"), cut, ids))
        except ValueError as error:
            bad.append(BadRow(str(path), number, str(error)))
    return rollouts, bad


def _skip_reason(rollout: _Rollout, keep_truncated: bool) -> str | None:
    if rollout.answer is None:
        return "missing_ground_truth"
    if rollout.truncated and not keep_truncated:
        return "truncated"
    return None if rollout.turns.response.strip() else "empty"


def label_file(config: LabelConfig, progress: bool = True) -> dict[str, Any]:
    """Labels `config.input` into `config.output`, in the input's order, and returns the summary.

    Raises:
        IpvrmError: unreadable input, bad rows under `on_bad_row="error"`, a verifier that cannot be had, or
            not one row that gets a label.
    """
    shown = Progress(enabled=progress)
    output = Path(config.output)
    if output.suffix not in (".parquet", ".jsonl"):
        raise IpvrmError(f"--output {output}: must end in .parquet or .jsonl")
    with VerifierPool(config.verifier, config.num_workers, config.timeout_seconds) as pool:
        rollouts, bad = _read(Path(config.input))
        report_bad_rows(bad, config.on_bad_row, total=len(rollouts) + len(bad))
        for row in bad:
            shown.note(f"skipped {row}")
        if not rollouts:
            raise IpvrmError(f"--input {config.input}: no usable row ({len(bad)} bad)")
        skipped = [_skip_reason(rollout, config.keep_truncated) for rollout in rollouts]
        asked = [r for r, reason in zip(rollouts, skipped, strict=True) if reason is None]
        started = time.monotonic()
        with shown.bar("verify", len(asked)) as update:
            verdicts = pool.judge([(r.turns.response, r.answer or "") for r in asked], update)
        seconds = time.monotonic() - started
    summary = {
        **_counts(asked, verdicts, Counter(reason for reason in skipped if reason), len(bad)),
        "verifier": config.verifier,
        "timeout_seconds": config.timeout_seconds,
        "num_workers": pool.num_workers,
        "seconds": round(seconds, 2),
        "manifest": manifest(config=asdict(config)),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(asked, verdicts)
    summary_path(output).unlink(missing_ok=True)  # it must never stand beside another run's rows
    if rows:
        write_table(output, rows)
    write_json(summary_path(output), summary)
    if not rows:
        found = ", ".join(f"{count} {name}" for name, count in summary["counts"].items() if count)
        raise IpvrmError(f"{config.input}: no row gets a label ({found}); see {summary_path(output)}")
    return summary


def _counts(
    asked: Sequence[_Rollout], verdicts: Sequence[Verdict], skipped: Counter[str], bad: int
) -> dict[str, Any]:
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    counts = {name: outcomes[name] for name in OUTCOMES} | {name: skipped[name] for name in SKIPPED}
    counts["bad"] = bad
    by_prompt: dict[str, set[int]] = {}
    by_source: dict[str, Counter[Outcome]] = {}
    failures: list[dict[str, Any]] = []
    for rollout, verdict in zip(asked, verdicts, strict=True):
        by_source.setdefault(rollout.data_source or "", Counter())[verdict.outcome] += 1
        if verdict.label is not None:
            by_prompt.setdefault(json.dumps(rollout.turns.prompt), set()).add(verdict.label)
        elif len(failures) < LISTED_FAILURES:
            failures.append({"row": rollout.row, "outcome": verdict.outcome, "detail": verdict.detail})
    unanimous = Counter(next(iter(labels)) for labels in by_prompt.values() if len(labels) == 1)
    return {
        "rows": sum(counts.values()),
        "labelled": sum(counts[name] for name in KEPT),
        "accuracy": _accuracy(outcomes),
        "counts": counts,
        "prompts": {
            "labelled": len(by_prompt),
            "mixed": len(by_prompt) - unanimous.total(),
            "all_right": unanimous[1],
            "all_wrong": unanimous[0],
        },
        "by_data_source": {
            name: {"labelled": sum(found[kept] for kept in KEPT), "accuracy": _accuracy(found)}
            for name, found in sorted(by_source.items())
        },
        "failures": failures,
    }


def _accuracy(outcomes: Counter[Outcome]) -> float | None:
    labelled = sum(outcomes[kept] for kept in KEPT)
    return outcomes["right"] / labelled if labelled else None


def _rows(asked: Sequence[_Rollout], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows with a label. Where any prompt is messages all are: a text is the user's message.

    An answer that has more than content (reasoning, tool calls) is kept whole, as a `conversation`.
    """
    chat = any(not isinstance(rollout.turns.prompt, str) for rollout in asked)
    rows = []
    for rollout, verdict in zip(asked, verdicts, strict=True):
        if verdict.label is None:
            continue
        found, prompt = rollout.turns, rollout.turns.prompt
        if chat and isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        row: dict[str, Any] = {"row": rollout.row, "prompt": prompt if isinstance(prompt, str) else [*prompt]}
        row |= {name: getattr(rollout, name) for name in ("answer", "data_source", "sample", "truncated")}
        row |= {"response": found.response, "label": verdict.label, "extracted": verdict.extracted}
        if found.message is not None:
            row["conversation"] = [*prompt, found.message]
        if found.tools is not None:
            row["tools"] = json.dumps(found.tools)
        if rollout.sampled is not None:
            row |= asdict(rollout.sampled)
        rows.append(row)
    return rows


def main(config: LabelConfig) -> None:
    """Console entry: labels and says what became of the rows."""
    summary = label_file(config)
    for name, count in summary["counts"].items():
        if count or name in KEPT:
            print(f"{count:>8}  {name.replace('_', ' '):<24}{MEANING.get(name, 'skipped: not a usable row')}")
    prompts = summary["prompts"]
    print(
        f"{config.output}: {summary['labelled']} of {summary['rows']} rows labelled, "
        f"{summary['accuracy']:.1%} right; {prompts['labelled']} prompts: {prompts['mixed']} mixed, "
        f"{prompts['all_right']} all right, {prompts['all_wrong']} all wrong"
    )
