"""`ipvrm eval bon`: Best-of-N of labelled rollouts with a reward model; and `rerank`, the same for new ones.

Of each problem all M responses are scored once. What is reported for every N is the exact mean over all
subsets of N of them (`ipvrm.evaluate.best_of_n`), with intervals over problems; a problem with fewer than N
responses is left out at that N and counted. A response that is longer than allowed, or that cannot be scored,
is picked last. A row that cannot be used (no label, no response, ...) counts as a wrong response to its
prompt, picked last and without a vote; one without a prompt is of no problem. All are named with the reason.
Answers vote by what `ipvrm label` extracted: numbers by value, everything else by its text.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ipvrm.data.chat import given_template_kwargs
from ipvrm.data.files import check_values, chunked, file_hash, records
from ipvrm.data.responses import NOTED, Response, tokenize
from ipvrm.data.rows import (
    COLUMNS,
    TURNS,
    BadRow,
    Message,
    Row,
    as_object,
    data_source,
    listed,
    prompt_of,
    row_of,
    turns,
)
from ipvrm.data.steps import STEP_SEPARATOR, step_of_token
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.best_of_n import PICKS, Samples, best_of_n, response_scores
from ipvrm.evaluate.scoring import one_by_one
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress, portion
from ipvrm.rollouts.final_answer import as_number
from ipvrm.run_folder import (
    FREE,
    JsonlFile,
    begin_or_go_on,
    finished_lines,
    manifest,
    remove_leftovers,
    settings_of,
    write_json,
)

CHUNK = 64  # most responses scored, and kept, at a time
WORDS = {
    "data_hash": "the data",
    "model_hash": "the reward model",
    "reference_hash": "the reference",
    "template_hash": "the chat template",
}
OWN_COLUMNS = ("data_source", "extracted")


@dataclass(frozen=True)
class BonConfig:
    """Best-of-N accuracy of labelled rollouts, what `ipvrm label` writes; one response to a problem a row.

    Beside it: one sample, majority vote and pass@N. The same command goes on where it stopped.
    """

    model: str = field(metadata=FREE)
    """Run folder of the reward model."""
    data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of rollouts with `label`; those to one prompt are of one problem,
    `extracted` is what they vote for, `data_source` says which problems are reported together."""
    output_dir: str = field(metadata=FREE)
    """Folder for results.json and scores.jsonl."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reference model is now, if it has moved."""
    objective: Literal["endo_rm"] | None = None
    """endo_rm: --model is any causal LM, whose own logits are the reward. Default: what its folder says."""
    chat_template_kwargs: str | None = field(default=None, metadata=FREE)
    """Variables of the chat template as a JSON object, of endo_rm. Default: none; a reward model has those
    that it was trained with, and others are refused."""
    n: tuple[int, ...] = field(default=(4, 16, 64), metadata=FREE)
    """How many responses there are to pick from."""
    step_separator: str = STEP_SEPARATOR
    """What stands between two steps of a response, for `mean` and `min`."""
    max_length: int | None = 8192
    """Most tokens of prompt and response; a longer one is picked last. None for no limit."""
    batch_tokens: int = field(default=BATCH_TOKENS, metadata=FREE)
    """Most tokens of a padded forward."""
    bootstrap_resamples: int = field(default=2000, metadata=FREE)
    """Resamples of the problems for the intervals."""
    seed: int = field(default=0, metadata=FREE)
    """Of the bootstrap."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Score on the CPU although there is an accelerator."""


class Ranked(NamedTuple):
    """`place` of a sample in the list that was given, from 0, and its score."""

    place: int
    score: float


def rerank(
    reward_model: RewardModel,
    prompt: str | Sequence[Message],
    samples: Sequence[str],
    *,
    by: str = "final",
    step_separator: str = STEP_SEPARATOR,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Ranked]:
    """The responses to one prompt, the best first; equal scores in the order given.

    Args:
        prompt: text or messages. samples: their texts, each ended.
        by: final (V_T / T) | sum (V_T) | mean | min (of the step scores), see `ipvrm.evaluate.best_of_n`.

    Raises:
        IpvrmError: an unknown `by`, or a sample that cannot be scored; the message holds its number from 1.
    """
    if by not in PICKS:
        raise IpvrmError(f"rerank: by must be one of {', '.join(PICKS)}; got {by!r}")
    asked = prompt if isinstance(prompt, str) else tuple(prompt)
    rows = [Row(f"sample:{number}", asked, text) for number, text in enumerate(samples, 1)]
    scores = _scores(reward_model, rows, step_separator, None, batch_tokens)
    ranked = [Ranked(i, s[by]) for i, s in enumerate(scores) if s is not None]  # no limit: all
    return sorted(ranked, key=lambda r: -r.score)


def _scores(
    reward_model: RewardModel,
    rows: Sequence[Row],
    step_separator: str,
    max_length: int | None,
    batch_tokens: int,
    skipped: list[BadRow] | None = None,
    noted: dict[str, list[str]] | None = None,
) -> list[dict[str, float] | None]:
    """Of every row the scores by `PICKS`; None for one that is too long, or is put into `skipped`.

    `noted` gets the sources of the rows behind each of the counts `NOTED`.
    """
    found = tokenize(
        rows,
        reward_model.chat,
        max_length=max_length,
        max_positions=reward_model.max_positions,
        vocab_size=reward_model.vocab_size,
        on_bad_row="error" if skipped is None else "skip",
        with_offsets=True,
    )
    if skipped is not None:
        skipped += found.bad
    if noted is not None:
        noted |= found.noted
    place = {row.source: i for i, row in enumerate(rows)}

    def log_ratios(part: Sequence[Response]) -> list[Tensor]:
        return reward_model.token_log_ratios(part, batch_tokens)

    rewards: Sequence[Tensor | str] = (
        log_ratios(found.responses) if skipped is None else one_by_one(log_ratios, found.responses)
    )
    result: list[dict[str, float] | None] = [None] * len(rows)
    info = reward_model.info
    for response, log_ratio in zip(found.responses, rewards, strict=True):
        if isinstance(log_ratio, str):
            assert skipped is not None
            file, _, number = response.source.rpartition(":")
            skipped.append(BadRow(file, int(number), log_ratio.removeprefix(f"{response.source}: ")))
            continue
        index = place[response.source]
        ends = _step_ends(rows[index].response, step_separator)
        of_token = step_of_token(response.offsets or (), ends)
        result[index] = response_scores(log_ratio, of_token, info.beta, len(ends), info.discount)
    return result


def _step_ends(text: str, separator: str) -> list[int]:
    """Exclusive character ends of the steps, the separator behind each included; at least one step.

    What is blank between two separators is no step but part of the one before it, or of the first.
    """
    ends: list[int] = []
    at, blank = 0, False
    parts = text.split(separator) if separator else [text]
    for number, part in enumerate(parts, 1):
        at += len(part) + (len(separator) if number < len(parts) else 0)
        if ends and (blank or not part.strip()):
            ends[-1] = at
            blank = blank and not part.strip()
        else:
            ends.append(at)
            blank = not part.strip()
    return ends


# ------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class _Rollout:
    """A row of the data. `row` is None where it cannot be used, `unusable` then the reason; `problem` is None
    where not even its prompt is known."""

    number: int  # over all shards, from 1
    place: str  # file:row
    problem: str | None
    source: str = ""
    row: Row | None = None
    extracted: str | None = None
    unusable: str | None = None


def evaluate(config: BonConfig, progress: bool = True) -> dict[str, Any]:
    """Scores what is not scored yet, prints the tables and writes results.json, which it returns.

    Raises:
        IpvrmError: settings out of range, unreadable data or model, no usable row, no problem with enough
            responses, or an output folder with scores made under other settings.
    """
    given = {name: getattr(config, name) for name in ("max_length", "batch_tokens", "bootstrap_resamples")}
    for name, value in [*given.items(), *(("n", n) for n in config.n)]:
        if value is not None and value < 1:
            raise IpvrmError(f"--{name} must be at least 1; got {value}")
    with locked(config.output_dir, folder=True):
        return _evaluate(config, progress)


def _evaluate(config: BonConfig, progress: bool) -> dict[str, Any]:
    shown, output = Progress(enabled=progress), Path(config.output_dir)
    rollouts = _read(config)
    device = "cpu" if config.use_cpu else None
    reward_model = RewardModel.from_pretrained(
        config.model,
        config.reference,
        device,
        objective=config.objective,
        chat_template_kwargs=given_template_kwargs(config.chat_template_kwargs),
    )
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    settings, note = _settings(config, reward_model), shown.note if reward_model.on_cpu else None
    begin_or_go_on(output / "settings.json", settings, f"what is in {output}", WORDS, note)
    file = output / "scores.jsonl"
    _score(config, reward_model, rollouts, file, shown)
    scored = {line["line"]: line for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    results = {
        **summarise(config, rollouts, scored),
        "reward_model": asdict(reward_model.info),
        "manifest": manifest(seeds={"seed": config.seed}, config=asdict(config)),
    }
    write_json(output / "results.json", results)
    if progress:
        _print(results)
    return results


def _read(config: BonConfig) -> list[_Rollout]:
    columns = (*COLUMNS, *OWN_COLUMNS)
    found = [
        _rollout(index, f"{file}:{number}", value)
        for file, number, index, value in records(config.data, columns, TURNS, check=False)
    ]
    if all(rollout.unusable for rollout in found):
        first = f"; {found[0].place}: {found[0].unusable}" if found else ""
        raise IpvrmError(f"--data {config.data}: no usable row{first}")
    return found


def _rollout(index: int, place: str, value: Any) -> _Rollout:
    try:
        record = as_object(value)
        check_values(record)
        row = row_of(place, record)
        extracted = record.get("extracted")
        if extracted is not None and not isinstance(extracted, str):
            raise ValueError(f"extracted must be a text; got {extracted!r:.40}")
        return _Rollout(index, place, _key(row.prompt), data_source(record) or "", row, extracted)
    except ValueError as error:
        return _Rollout(index, place, *_problem_of(value), unusable=str(error))


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _problem_of(value: Any) -> tuple[str | None, str]:
    """The problem of a row that cannot be used, None where it is not known; and its data source."""
    problem, source = None, ""
    for read in (lambda: turns(value).prompt, lambda: prompt_of(as_object(value))):
        with suppress(ValueError, RecursionError):
            problem = _key(read()) if problem is None else problem
    with suppress(ValueError):
        source = data_source(as_object(value)) or ""
    return problem, source


def _settings(config: BonConfig, reward_model: RewardModel) -> dict[str, Any]:
    """What decides the scores."""
    info = reward_model.info
    return settings_of(config) | {
        "data_hash": file_hash(config.data),
        "model_hash": info.weights_hash,
        "reference_hash": info.reference_hash,
        "template_hash": info.template_hash,
        "chat_template_kwargs": info.chat_template_kwargs,
        "beta": info.beta,
    }


def _score(
    config: BonConfig, reward_model: RewardModel, rollouts: list[_Rollout], file: Path, shown: Progress
) -> None:
    """Appends a line per rollout to `file`: its scores, or why it has none."""
    done, last = finished_lines(file)
    if done:
        shown.note(f"going on behind {done} of {len(rollouts)} responses")
    remaining: Iterator[_Rollout] = (r for r in rollouts if r.number > last)
    with JsonlFile(file) as opened, shown.bar("score", len(rollouts), done) as update:
        for chunk in chunked(remaining, portion(len(rollouts), CHUNK)):
            skipped: list[BadRow] = []
            noted: dict[str, list[str]] = {}
            rows = [r.row for r in chunk if r.row is not None]
            limits = config.max_length, config.batch_tokens
            found = _scores(reward_model, rows, config.step_separator, *limits, skipped, noted)
            scores = dict(zip((row.source for row in rows), found, strict=True))
            reasons = {f"{row.file}:{row.row}": row.reason for row in skipped}
            lines = []
            for rollout in chunk:
                unusable = rollout.unusable or reasons.get(rollout.place)
                line: dict[str, Any] = {"line": rollout.number, "unusable": unusable}
                line |= scores.get(rollout.place) or dict.fromkeys(PICKS)
                line |= {name: rollout.place in noted[name] for name in NOTED}
                lines.append(line)
            opened.write(*lines)
            update(done := done + len(chunk))


def summarise(
    config: BonConfig, rollouts: Sequence[_Rollout], scored: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy by source, method and N, with counts of what is missing; `scored` by the rollout's number."""
    notes, refused = [], [r for r in rollouts if scored[r.number]["unusable"] is not None]
    if len(refused) == len(rollouts):
        first = scored[refused[0].number]["unusable"]
        raise IpvrmError(f"--data {config.data}: no response can be scored; {refused[0].place}: {first}")
    if refused:
        nowhere = sum(r.problem is None for r in refused)
        lines = [f"{r.place}: {scored[r.number]['unusable']}" for r in refused]
        notes.append(
            f"{len(refused)} of {len(rollouts)} responses cannot be used; they are picked last"
            + (f", but {nowhere} without a prompt, which are of no problem" if nowhere else "")
            + f":\n{listed(lines, len(lines))}"
        )
    counts = {name: sum(bool(scored[r.number].get(name)) for r in rollouts) for name in NOTED}
    notes += [f"{n} of {len(rollouts)} responses {NOTED[name]}" for name, n in counts.items() if n]
    by_source: dict[str, dict[str, list[_Rollout]]] = {}
    for rollout in rollouts:
        if rollout.problem is not None:
            by_source.setdefault(rollout.source, {}).setdefault(rollout.problem, []).append(rollout)
    sources: dict[str, Any] = {}
    for source, problems in by_source.items():
        samples = [_samples(members, scored) for members in problems.values()]
        votes = any(r.extracted is not None for members in problems.values() for r in members)
        rows = []
        for n in config.n:
            enough = [s for s in samples if len(s.correct) >= n]
            if len(enough) < len(samples):
                notes.append(
                    f"{source} N = {n}: ".lstrip()
                    + f"{len(samples) - len(enough)} of {len(samples)} problems "
                    "have fewer responses and are left out, so this N is of other problems than a smaller one"
                )
            if enough:
                rows += best_of_n(enough, [n], config.bootstrap_resamples, config.seed)
        if not votes:
            notes.append(f"{source or 'data'}: no `extracted`, so there is no majority vote")
        sources[source] = {
            "problems": len(problems),
            "responses": sum(map(len, problems.values())),
            "rows": [
                asdict(row) | {"interval": list(row.interval) if row.num_problems > 1 else [None, None]}
                for row in rows
                if votes or row.method != "majority_vote"
            ],
        }
    if not any(entry["rows"] for entry in sources.values()):
        most = max(len(m) for problems in by_source.values() for m in problems.values())
        raise IpvrmError(
            f"--n {' '.join(map(str, config.n))}: no problem has so many responses (at most {most}); sample "
            "more, or name a smaller N"
        )
    unscored = sum(scored[r.number]["final"] is None for r in rollouts)
    return {
        "sources": sources,
        "too_long": unscored - len(refused),
        "unusable": {r.place: scored[r.number]["unusable"] for r in refused},
        **counts,
        "notes": notes,
    }


def _samples(members: Sequence[_Rollout], scored: dict[int, dict[str, Any]]) -> Samples:
    lines = [scored[r.number] for r in members]
    scores = {pick: [-math.inf if line[pick] is None else line[pick] for line in lines] for pick in PICKS}
    return Samples(
        [_vote(r.extracted) for r in members],
        [r.row is not None and r.row.label == 1 for r in members],
        scores,
    )


def _vote(extracted: str | None) -> Any:
    """What an answer votes for: its value where it is a number, else its text; None does not vote."""
    if extracted is None:
        return None
    number = as_number(extracted)
    return "".join(extracted.split()) if number is None else number


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for source, found in results["sources"].items():
        title = (
            f"{source + ': ' if source else ''}{found['problems']} problems, {found['responses']} responses"
        )
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("picked by", no_wrap=True)
        sizes = list(dict.fromkeys(row["n"] for row in found["rows"]))
        for n in sizes:
            table.add_column(f"N = {n}", justify="right", no_wrap=True)
        cells: dict[str, dict[int, str]] = {}
        for row in found["rows"]:
            low, high = row["interval"]
            shown = " (one problem)" if low is None else f" ({100 * low:.1f}-{100 * high:.1f})"
            cells.setdefault(row["method"], {})[row["n"]] = f"{100 * row['accuracy']:.1f}{shown}"
        for method, of_n in cells.items():
            table.add_row(method.replace("_", " "), *(of_n.get(n, "-") for n in sizes))
        table.caption = "Right answers in %, 95 % interval over problems."
        table.caption_justify = "left"
        console.print(table)
    if results["too_long"]:
        console.print(f"{results['too_long']} responses are too long and picked last", markup=False)
    for note in results["notes"]:
        console.print(note, markup=False)


def main(config: BonConfig) -> None:
    """Console entry."""
    evaluate(config)
    print(f"everything is in {config.output_dir}")
