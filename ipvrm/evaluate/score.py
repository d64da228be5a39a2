"""`ipvrm score`: JSONL of problem and steps in, JSONL of step scores out, in the same order."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ipvrm.data.rows import BadRow, OnBadRow, report_bad_rows
from ipvrm.errors import IpvrmError
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel, Score
from ipvrm.progress import Progress
from ipvrm.run_folder import FREE, begin_or_go_on, publish, remove_leftovers, settings_of, write_text
from ipvrm.steps import STEP_FORMAT, STEP_SEPARATOR, check_step_format

WORDS = {
    "input_hash": "the input",
    "model_hash": "the reward model",
    "reference_hash": "the reference",
    "template_hash": "the chat template",
}
CHUNK = 64  # solutions scored, and written, at a time


@dataclass(frozen=True)
class ScoreConfig:
    """Step scores of solutions.

    In: one {"problem": text, "steps": [text, ...]} a line, `id` optional.
    Out: one {"line", "id", "step_scores", "step_ends", "value", "mean_value", "first_error"} a line.
    An interrupted run goes on where it stopped.
    """

    model: str = field(metadata=FREE)
    """Run folder of the reward model."""
    input: str = field(metadata=FREE)
    """JSONL file of problems and steps."""
    output: str = field(metadata=FREE)
    """JSONL file to write; it appears when all lines are scored."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reference model is now, if it has moved."""
    rule: Literal["step", "prefix", "mean", "mean_diff"] = "step"
    """What the score of a step is (Eq. 31, Eq. 30, mean_value at its end, its mean TD)."""
    threshold: float = 0.5
    """first_error is the first step with sigmoid(score) below it."""
    step_format: str = STEP_FORMAT
    """How a step is written; {i} is its number from 1, {step} its text."""
    step_separator: str = STEP_SEPARATOR
    """What stands between two steps."""
    batch_tokens: int = field(default=BATCH_TOKENS, metadata=FREE)
    """Most tokens of a padded forward."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Lines that cannot be scored: stop and list them, or skip."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Score on the CPU although there is an accelerator."""


@dataclass(frozen=True)
class _Item:
    line: int
    id: Any
    problem: str
    steps: list[str]


def score_file(config: ScoreConfig, progress: bool = True) -> int:
    """Scores `config.input` into `config.output` and returns the number of lines written.

    Raises:
        IpvrmError: settings out of range, unreadable input, a reward model that cannot be loaded, or bad
            lines under `on_bad_row="error"`.
    """
    check_step_format(config.step_format)
    if not 0.0 <= config.threshold <= 1.0:
        raise IpvrmError(f"--threshold must lie in [0, 1]; got {config.threshold}")
    shown = Progress(enabled=progress)
    source = Path(config.input)
    items, bad = _read(source)
    report_bad_rows(bad, config.on_bad_row, total=len(items) + len(bad))
    for row in bad:
        shown.note(f"skipped {row}")
    reward_model = RewardModel.from_pretrained(
        config.model, config.reference, "cpu" if config.use_cpu else None
    )

    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.partial")
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    what = f"the unfinished work in {folder} (delete it to start afresh)"
    begin_or_go_on(folder / "settings.json", _settings(config, reward_model), what, WORDS)
    partial = folder / "scores.jsonl"
    written = _finished(partial)
    done = written[-1] if written else 0
    if done:
        shown.note(f"going on behind line {done}")
    remaining = [item for item in items if item.line > done]
    with open(partial, "a", encoding="utf-8") as file:
        chunks = [remaining[i : i + CHUNK] for i in range(0, len(remaining), CHUNK)]
        for chunk in shown.track(chunks, "score"):
            scores, refused = _score(config, reward_model, chunk)
            report_bad_rows(refused, config.on_bad_row, total=len(items))
            for row in refused:
                shown.note(f"skipped {row}")
            for item, score in scores:
                file.write(json.dumps(_record(item, score)) + "\n")
            file.flush()
            written += [item.line for item, _ in scores]
    publish(partial, output)
    shutil.rmtree(folder)
    return len(written)


def _read(path: Path) -> tuple[list[_Item], list[BadRow]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut texts at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise IpvrmError(f"--input {path}: cannot be read: {error}") from error
    items, bad = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"must be an object; got {type(record).__name__}")
            problem, steps = record.get("problem"), record.get("steps")
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError(f"`problem` must be a text; got {problem!r:.40}")
            if (
                not isinstance(steps, list)
                or not steps
                or not all(isinstance(s, str) and s.strip() for s in steps)
            ):
                raise ValueError(f"`steps` must be a list of texts, none empty; got {steps!r:.40}")
            items.append(_Item(number, record.get("id"), problem, steps))
        except ValueError as error:
            reason = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            bad.append(BadRow(str(path), number, reason))
    if not items:
        raise IpvrmError(
            f"--input {path}: no usable line ({len(bad)} bad)" + (f"; the first: {bad[0]}" if bad else "")
        )
    return items, bad


def _score(
    config: ScoreConfig, reward_model: RewardModel, chunk: list[_Item]
) -> tuple[list[tuple[_Item, Score]], list[BadRow]]:
    """Scores of a chunk; one that the model's template refuses is found by scoring them one by one."""
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("step_format", "step_separator", "rule", "threshold", "batch_tokens")
    }
    try:
        scores = reward_model.score_many([(item.problem, item.steps) for item in chunk], **options)
        return list(zip(chunk, scores, strict=True)), []
    except IpvrmError:
        found, refused = [], []
        for item in chunk:
            try:
                found.append((item, reward_model.score(item.problem, item.steps, **options)))
            except IpvrmError as error:
                reason = str(error).rpartition("item:1: ")[2]
                refused.append(BadRow(config.input, item.line, reason))
        return found, refused


def _record(item: _Item, score: Score) -> dict[str, Any]:
    return {
        "line": item.line,
        "id": item.id,
        "step_scores": score.step_scores.tolist(),
        "step_ends": score.step_ends.tolist(),
        "value": float(score.prefix_values[-1]),
        "mean_value": float(score.mean_values[-1]),
        "first_error": score.first_error,
    }


def _settings(config: ScoreConfig, reward_model: RewardModel) -> dict[str, Any]:
    """What decides the scores: an interrupted run goes on only with the same."""
    info = reward_model.info
    return settings_of(config) | {
        "input_hash": hashlib.sha256(Path(config.input).read_bytes()).hexdigest(),
        "model_hash": info.weights_hash,
        "reference_hash": info.reference_hash,
        "template_hash": info.template_hash,
        "objective": info.objective,
        "beta": info.beta,
    }


def _finished(partial: Path) -> list[int]:
    """Line numbers that an interrupted run has written; a torn last line is cut off the file."""
    if not partial.is_file():
        return []
    whole = partial.read_text(encoding="utf-8").split("\n")[:-1]
    write_text(partial, "".join(line + "\n" for line in whole))
    return [json.loads(line)["line"] for line in whole]


def main(config: ScoreConfig) -> None:
    """Console entry."""
    print(f"{config.output}: {score_file(config)} solutions scored")
