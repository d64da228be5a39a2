"""`ipvrm label`: outcome labels for rollouts, as the reward-model data that `ipvrm train-rm` reads."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from ipvrm.data.files import chunked, file_hash, finite, records
from ipvrm.data.rows import (
    BEHAVIOUR,
    SCORED,
    TURNS,
    BadRow,
    BadRows,
    OnBadRow,
    Sampled,
    Turns,
    as_object,
    data_source,
    ground_truth,
    sampled,
    truncated,
    turns,
)
from ipvrm.data.rows import COLUMNS as CONVERSATION_COLUMNS
from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.rollouts.verify import MEMORY_GB, OUTCOMES, TIMEOUT_SECONDS, Outcome, Verdict, VerifierPool
from ipvrm.run_folder import (
    FREE,
    JsonlFile,
    begin_or_go_on,
    finished_lines,
    manifest,
    partial_folder,
    remove_partial_folder,
    settings_of,
    summary_path,
    table_schema,
    write_json,
    write_table,
)

COLUMNS = (*CONVERSATION_COLUMNS, "answer", "reward_model", "data_source", "sample", *BEHAVIOUR, *SCORED)
CHUNK = 1024  # answers verified, and kept, at a time
LISTED_FAILURES = 20
ANY_VERDICT = Verdict("right", "1")
KEPT: tuple[Outcome, ...] = ("right", "wrong", "no_answer")
# Why a row gets no label, besides the outcomes of a verifier.
SKIPPED = ("missing_ground_truth", "truncated", "empty")
MEANING = {
    "right": "label 1",
    "wrong": "label 0",
    "no_answer": "label 0: no final answer in the response",
    "timeout": "dropped: no verdict by the deadline",
    "crash": "dropped: the verifier's process died",
    "error": "dropped: the verifier raised an exception, or the response is too long for it",
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
    left out, never labelled 0. An interrupted run goes on where it stopped.
    """

    input: str = field(metadata=FREE)
    """.parquet, .jsonl or .json file of rollouts."""
    output: str = field(metadata=FREE)
    """.parquet or .jsonl file to write; it appears when all rows are labelled."""
    verifier: str = "math"
    """math (math-verify's equivalence; plain numbers by value), string (the final answer, character by
    character; plain numbers by value) or module:function, called with (response, answer), that returns True,
    False or None (no answer). math and string look behind the thinking for the last box that is not empty,
    and of a worked solution as ground truth take what follows its ####. Ground truths that they cannot read
    are left out, counted and named, never labelled 0. math is as lenient as its library: `9 %`, `9 furlongs`
    and `x = 9` count as 9, a box of `2, 1` as `1, 2`. And it is as strict: in
    `9 m/s` and `9°` the unit is part of the quantity, in `9\\text{ m/s}` and `9^\\circ` it is not."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """Hard deadline of one answer: the process is killed, and the row counted and left out."""
    memory_gb: float = field(default=MEMORY_GB, metadata=FREE)
    """Most memory of a verifier's process (Linux); what needs more is counted as an error and left out."""
    num_workers: int | None = field(default=None, metadata=FREE)
    """Verifier processes. Default: one per available core."""
    keep_all: bool = False
    """Label responses that were cut off or have no text like all others, in place of leaving them out: what
    `eval bon` wants, whose problems must not lose the samples that failed."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
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
    known: dict[str, Any]  # the columns `BEHAVIOUR` and `SCORED` that the row has


def _read(path: str | Path) -> Iterator[_Rollout | BadRow]:
    for file, number, index, value in records(path, COLUMNS, TURNS):
        try:
            record = as_object(value)
            sample = record.get("sample")
            if sample is not None and type(sample) is not int:
                raise ValueError(f"sample must be a whole number; got {sample!r:.40}")
            answer, source, cut = ground_truth(record), data_source(record), truncated(record)
            kept = [name for name in (*BEHAVIOUR, *SCORED) if record.get(name) is not None]
            known = {name: finite(record[name], name) for name in kept}
            yield _Rollout(index, turns(record), answer, source, sample, cut, sampled(record), known)
        except ValueError as error:
            yield BadRow(file, number, str(error))


def _skip_reason(rollout: _Rollout, keep_all: bool) -> str | None:
    if rollout.answer is None:
        return "missing_ground_truth"
    if keep_all:
        return None
    if rollout.truncated:
        return "truncated"
    return None if rollout.turns.response.strip() else "empty"


def label_file(config: LabelConfig, progress: bool = True) -> dict[str, Any]:
    """Labels `config.input` into `config.output`, in the input's order, and returns the summary.

    The input is read as a stream, several times: to check it, to verify its answers, to write them with
    their labels. What is kept meanwhile are the verdicts, in a folder beside the output, so that an
    interrupted run goes on.

    Raises:
        IpvrmError: unreadable input, bad rows under `on_bad_row="error"`, a verifier that cannot be had, or
            not one row that gets a label.
    """
    shown = Progress(enabled=progress)
    output = Path(config.output)
    if output.suffix not in (".parquet", ".jsonl"):
        raise IpvrmError(f"--output {output}: must end in .parquet or .jsonl")
    with (
        VerifierPool(config.verifier, config.num_workers, config.timeout_seconds, config.memory_gb) as pool,
        locked(output),
    ):
        return _label_file(config, output, pool, shown)


def _label_file(config: LabelConfig, output: Path, pool: VerifierPool, shown: Progress) -> dict[str, Any]:
    checked = _Checked(config, shown)
    # What the writer cannot take must show before the work; a label of any kind stands in for the verdicts.
    schema = table_schema(_rows(checked, repeat(ANY_VERDICT))) if output.suffix == ".parquet" else None
    folder = partial_folder(output)
    settings = settings_of(config) | {"input_hash": file_hash(config.input)}
    what = f"the unfinished work in {folder} (delete it to start afresh)"
    begin_or_go_on(folder / "settings.json", settings, what, {"input_hash": "the input"})
    verdicts = folder / "verdicts.jsonl"
    done, _ = finished_lines(verdicts)
    if done:
        shown.note(f"going on behind {done} of {checked.asked} answers")
    started = time.monotonic()
    with JsonlFile(verdicts) as file, shown.bar("verify", checked.asked, done) as update:
        for chunk in chunked(islice(checked.rollouts(), done, None), CHUNK):
            pairs = [(rollout.turns.response, rollout.answer or "") for rollout in chunk]
            judged = pool.judge(pairs, partial(_moved, update, done))
            found = [_of_text(r, v) for r, v in zip(chunk, judged, strict=True)]
            file.write(*({"line": r.row} | asdict(v) for r, v in zip(chunk, found, strict=True)))
            done += len(chunk)
    seconds = time.monotonic() - started
    counts = _Counts()
    for rollout, verdict in zip(checked.rollouts(), _stored(verdicts), strict=True):
        counts.add(rollout, verdict)
    summary = {
        **counts.summary(checked.skipped, checked.bad.count),
        "verifier": config.verifier,
        "timeout_seconds": config.timeout_seconds,
        "memory_gb": config.memory_gb,
        "num_workers": pool.num_workers,
        "seconds": round(seconds, 2),
        "manifest": manifest(config=asdict(config)),
    }
    summary_path(output).unlink(missing_ok=True)  # it must never stand beside another run's rows
    if summary["labelled"]:
        write_table(output, _rows(checked, _stored(verdicts)), schema)
    write_json(summary_path(output), summary)
    remove_partial_folder(output)
    if not summary["labelled"]:
        found_counts = ", ".join(f"{count} {name}" for name, count in summary["counts"].items() if count)
        raise IpvrmError(f"{config.input}: no row gets a label ({found_counts}); see {summary_path(output)}")
    return summary


def _of_text(rollout: _Rollout, verdict: Verdict) -> Verdict:
    """A response without text is no answer, whatever a verifier makes of it."""
    readable = verdict.outcome != "unreadable_ground_truth"
    return Verdict("no_answer") if readable and not rollout.turns.response.strip() else verdict


def _moved(update: Callable[[int], None], before: int, done: int) -> None:
    update(before + done)


class _Checked:
    """The input, read once to its end: how many answers are asked, and what becomes of the other rows."""

    def __init__(self, config: LabelConfig, shown: Progress):
        self.config = config
        self.asked = 0
        self.chat = False  # whether a prompt is messages
        self.skipped: Counter[str] = Counter()
        self.bad = BadRows()
        for rollout in _read(config.input):
            if isinstance(rollout, BadRow):
                self.bad.add(rollout)
                if config.on_bad_row == "skip":
                    shown.note(f"skipped {rollout}")
            elif reason := _skip_reason(rollout, config.keep_all):
                self.skipped[reason] += 1
            else:
                self.asked += 1
                self.chat |= not isinstance(rollout.turns.prompt, str)
        usable = self.asked + self.skipped.total()
        self.bad.report(config.on_bad_row, total=usable + self.bad.count)
        if not usable:
            raise IpvrmError(f"--input {config.input}: no usable row ({self.bad.count} bad)")

    def rollouts(self) -> Iterator[_Rollout]:
        """Those whose answers are asked, in order, read anew."""
        for rollout in _read(self.config.input):
            if isinstance(rollout, _Rollout) and not _skip_reason(rollout, self.config.keep_all):
                yield rollout


def _stored(path: Path) -> Iterator[Verdict]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            stored = json.loads(line)
            del stored["line"]
            yield Verdict(**stored)


class _Counts:
    """What became of the answers; of a prompt only a hash is kept."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.by_source: dict[str, Counter[Outcome]] = {}
        self.by_prompt: dict[int, int] = {}  # hash -> bit 0: a wrong answer, bit 1: a right one
        self.failures: list[dict[str, Any]] = []

    def add(self, rollout: _Rollout, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        self.by_source.setdefault(rollout.data_source or "", Counter())[verdict.outcome] += 1
        if verdict.label is not None:
            key = hash(json.dumps(rollout.turns.prompt))
            self.by_prompt[key] = self.by_prompt.get(key, 0) | 1 << verdict.label
        elif len(self.failures) < LISTED_FAILURES:
            self.failures.append({"row": rollout.row, "outcome": verdict.outcome, "detail": verdict.detail})

    def summary(self, skipped: Counter[str], bad: int) -> dict[str, Any]:
        counts = {name: self.outcomes[name] for name in OUTCOMES} | {name: skipped[name] for name in SKIPPED}
        counts["bad"] = bad
        kinds = Counter(self.by_prompt.values())
        return {
            "rows": sum(counts.values()),
            "labelled": sum(counts[name] for name in KEPT),
            "accuracy": _accuracy(self.outcomes),
            "counts": counts,
            "prompts": {
                "labelled": len(self.by_prompt),
                "mixed": kinds[3],
                "all_right": kinds[2],
                "all_wrong": kinds[1],
            },
            "by_data_source": {
                name: {"labelled": sum(found[kept] for kept in KEPT), "accuracy": _accuracy(found)}
                for name, found in sorted(self.by_source.items())
            },
            "failures": self.failures,
        }


def _accuracy(outcomes: Counter[Outcome]) -> float | None:
    labelled = sum(outcomes[kept] for kept in KEPT)
    return outcomes["right"] / labelled if labelled else None


def _rows(checked: _Checked, verdicts: Iterable[Verdict]) -> Iterator[dict[str, Any]]:
    """Rows with a label. Where any prompt is messages all are: a text is the user's message.

    An answer that has more than content (reasoning, tool calls) is kept whole, as a `conversation`.
    """
    for rollout, verdict in zip(checked.rollouts(), verdicts, strict=False):
        if verdict.label is None:
            continue
        found, prompt = rollout.turns, rollout.turns.prompt
        if checked.chat and isinstance(prompt, str):
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
        yield row | rollout.known


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
