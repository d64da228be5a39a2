"""`ipvrm score`: JSONL of problem and steps in, JSONL of step scores out, in the same order."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ipvrm.data.chat import given_template_kwargs
from ipvrm.data.files import chunked, file_hash, finite, records
from ipvrm.data.rows import BadRow, BadRows, OnBadRow, as_object, report_bad_rows
from ipvrm.data.steps import STEP_FORMAT, STEP_SEPARATOR, check_step_format
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.scoring import one_by_one
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel, Score
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL, kind_of, served_pair
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress, portion
from ipvrm.run_folder import (
    FREE,
    JsonlFile,
    begin_or_go_on,
    finished_lines,
    manifest,
    partial_folder,
    publish,
    remove_partial_folder,
    settings_of,
    summary_path,
    write_json,
)

WORDS = {
    "input_hash": "the input",
    "model_hash": "the reward model",
    "reference_hash": "the reference",
    "template_hash": "the chat template",
}
COLUMNS = ("id", "problem", "steps")
CHUNK = 64  # most solutions scored, and written, at a time


@dataclass(frozen=True)
class ScoreConfig:
    """Step scores of solutions.

    In: one {"problem": text, "steps": [text, ...]} a line, `id` optional.
    Out: one {"line", "id", "step_scores", "step_ends", "value", "mean_value", "first_error"} a line; with
    --per_token also "tokens", "token_ids", "steps", "td", "logprobs" and "ref_logprobs", a value a token.
    OUTPUT.summary.json has the counts, the reward model and what is needed to repeat the run.
    An interrupted run goes on where it stopped.
    """

    model: str = field(metadata=FREE)
    """Run folder of the reward model."""
    input: str = field(metadata=FREE)
    """.jsonl, .json or .parquet file of problems and steps."""
    output: str = field(metadata=FREE)
    """JSONL file to write; it appears when all lines are scored."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reference model is now, if it has moved."""
    objective: Literal["endo_rm"] | None = None
    """endo_rm: --model is any causal LM, whose own logits are the reward. Default: what its folder says.
    endo_rm discounts a token's TD from the response's first token on, in a step score (step, mean_diff) from
    the step's, so TD does not add up to the later step scores; a = 1 and discount = 0.95, others in Python:
    RewardModel.from_causal_lm(scale=, discount=)."""
    chat_template_kwargs: str | None = field(default=None, metadata=FREE)
    """Variables of the chat template as a JSON object, of endo_rm. Default: none; a reward model has those
    that it was trained with, and others are refused."""
    rule: Literal["step", "prefix", "mean", "mean_diff"] = "step"
    """What the score of a step is (Eq. 31, Eq. 30, mean_value at its end, its mean TD)."""
    threshold: float = 0.5
    """first_error is the first step with sigmoid(score) below it."""
    step_format: str = STEP_FORMAT
    """How a step is written; {i} is its number from 1, {step} its text."""
    step_separator: str = STEP_SEPARATOR
    """What stands between two steps."""
    per_token: bool = False
    """Also what is known of every response token: its text, id, step (from 0, -1 outside), TD, log-probs."""
    min_prob: float | None = None
    """With --per_token: the candidates of each token too, all with p >= this under the reference, with TD."""
    batch_tokens: int = field(default=BATCH_TOKENS, metadata=FREE)
    """Most tokens of a padded forward."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """transformers, or the address of a server of `model` that gives prompt_logprobs, such as vLLM's
    http://localhost:8000/v1."""
    reference_engine: str = field(default=LOCAL, metadata=FREE)
    """The same of a server of its reference; both are served, or neither."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of their answers."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Lines that cannot be scored: stop and list them, or skip."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Score on the CPU although there is an accelerator."""


@dataclass(frozen=True)
class _Item:
    line: int
    file: str
    row: int
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
    if _servers(config) and config.min_prob is not None:
        raise IpvrmError("--min_prob needs both models in memory; leave it out with --engine")
    if config.min_prob is not None and not (config.per_token and 1 / 128 <= config.min_prob <= 1.0):
        raise IpvrmError(f"--min_prob needs --per_token and must lie in [1/128, 1]; got {config.min_prob}")
    shown = Progress(enabled=progress)
    with locked(config.output):
        return _score_file(config, shown)


def _score_file(config: ScoreConfig, shown: Progress) -> int:
    total, total_bad = _check_input(config, shown)
    servers = _servers(config)
    device = "cpu" if config.use_cpu else None
    reward_model = RewardModel.from_pretrained(
        config.model,
        config.reference,
        device,
        servers=servers,
        timeout=config.engine_timeout,
        objective=config.objective,
        chat_template_kwargs=given_template_kwargs(config.chat_template_kwargs),
    )
    output = Path(config.output)
    folder = partial_folder(output)
    what = f"the unfinished work in {folder} (delete it to start afresh)"
    note = shown.note if reward_model.on_cpu else None
    begin_or_go_on(folder / "settings.json", _settings(config, reward_model), what, WORDS, note)
    partial = folder / "scores.jsonl"
    written, done = finished_lines(partial)
    if done:
        shown.note(f"going on behind line {done}")
    if config.on_bad_row == "error":
        _check_tokens(config, reward_model, _remaining(config, done), total)
    remaining = _remaining(config, done)
    passed = written
    with JsonlFile(partial) as file, shown.bar("score", total, passed) as update:
        for chunk in chunked(remaining, portion(total, CHUNK)):
            scores, refused = _score(config, reward_model, chunk)
            report_bad_rows(refused, config.on_bad_row, total=total)
            for row in refused:
                shown.note(f"skipped {row}")
            file.write(*(_record(item, score, config.per_token) for item, score in scores))
            written += len(scores)
            passed += len(chunk)
            update(passed)
    summary = {
        "scored": written,
        "bad": total_bad + total - written,
        "reward_model": asdict(reward_model.info),
        "manifest": manifest(config=asdict(config)),
    }
    summary_path(output).unlink(missing_ok=True)  # it must never stand beside another run's rows
    publish(partial, output)
    write_json(summary_path(output), summary)
    remove_partial_folder(output)
    return written


def _servers(config: ScoreConfig) -> tuple[str, ...]:
    return served_pair(config.engine, config.reference_engine, config.engine_timeout, use_cpu=config.use_cpu)


def _check_input(config: ScoreConfig, shown: Progress) -> tuple[int, int]:
    """Number of usable lines, and of others. All are read, and none is kept, before anything is loaded."""
    usable, bad = 0, BadRows()
    for item in _read(config.input):
        if isinstance(item, _Item):
            usable += 1
            continue
        bad.add(item)
        if config.on_bad_row == "skip":
            shown.note(f"skipped {item}")
    bad.report(config.on_bad_row, total=usable + bad.count)
    if not usable:
        raise IpvrmError(
            f"--input {config.input}: no usable line ({bad.count} bad)"
            + (f"; the first: {bad.first[0]}" if bad.count else "")
        )
    return usable, bad.count


def _read(path: str | Path) -> Iterator[_Item | BadRow]:
    """Every line of the input, one at a time: what is to be scored, or why it cannot be."""
    for file, row, index, value in records(path, COLUMNS, (("problem", "steps"),)):
        try:
            record = as_object(value)
            problem, steps = record.get("problem"), record.get("steps")
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError(f"`problem` must be a text; got {problem!r:.40}")
            if (
                not isinstance(steps, list)
                or not steps
                or not all(isinstance(s, str) and s.strip() for s in steps)
            ):
                raise ValueError(f"`steps` must be a list of texts, none empty; got {steps!r:.40}")
            yield _Item(index, file, row, finite(record.get("id"), "id"), problem, steps)
        except ValueError as error:
            yield BadRow(file, row, str(error))


def _remaining(config: ScoreConfig, done: int) -> Iterator[_Item]:
    """The usable lines behind line `done`."""
    return (item for item in _read(config.input) if isinstance(item, _Item) and item.line > done)


def _check_tokens(config: ScoreConfig, reward_model: RewardModel, items: Iterator[_Item], total: int) -> None:
    """Raises IpvrmError, before anything is scored, for what the template or the positions refuse."""

    def tokens(part: Sequence[_Item]) -> Sequence[Any]:
        texts = [(item.problem, item.steps) for item in part]
        return reward_model.solutions(
            texts, step_format=config.step_format, step_separator=config.step_separator
        )

    bad = BadRows()
    for chunk in chunked(items, CHUNK):
        for item, found in zip(chunk, one_by_one(tokens, chunk), strict=True):
            if isinstance(found, str):
                bad.add(BadRow(item.file, item.row, found))
    bad.report(config.on_bad_row, total=total)


def _score(
    config: ScoreConfig, reward_model: RewardModel, chunk: list[_Item]
) -> tuple[list[tuple[_Item, Score]], list[BadRow]]:
    """Scores of a chunk; one that the model's template refuses is found by scoring them one by one."""
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("step_format", "step_separator", "rule", "threshold", "batch_tokens", "min_prob")
    }

    def score(part: Sequence[_Item]) -> list[Score]:
        return reward_model.score_many([(item.problem, item.steps) for item in part], **options)

    found, refused = [], []
    for item, scored in zip(chunk, one_by_one(score, chunk), strict=True):
        if isinstance(scored, str):
            refused.append(BadRow(item.file, item.row, scored))
        else:
            found.append((item, scored))
    return found, refused


def _record(item: _Item, score: Score, per_token: bool) -> dict[str, Any]:
    return {
        "line": item.line,
        "id": item.id,
        "step_scores": score.step_scores.tolist(),
        "step_ends": score.step_ends.tolist(),
        "value": float(score.prefix_values[-1]),
        "mean_value": float(score.mean_values[-1]),
        "first_error": score.first_error,
        **(score.by_token() if per_token else {}),
    }


def _settings(config: ScoreConfig, reward_model: RewardModel) -> dict[str, Any]:
    """What decides the scores: an interrupted run goes on only with the same."""
    info = reward_model.info
    return (
        settings_of(config)
        | kind_of(config.engine)
        | {
            "input_hash": file_hash(config.input),
            "model_hash": info.weights_hash,
            "reference_hash": info.reference_hash,
            "template_hash": info.template_hash,
            "chat_template_kwargs": info.chat_template_kwargs,
            "objective": info.objective,
            "beta": info.beta,
        }
    )


def main(config: ScoreConfig) -> None:
    """Console entry."""
    print(f"{config.output}: {score_file(config)} solutions scored")
