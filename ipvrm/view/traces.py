"""Solutions as reward models read them, token by token: what `ipvrm inspect` writes into its page.

    {"schema": "ipvrm-inspect/1", "ipvrm": version, "command", "date", "min_prob", "vocabulary": [piece, ...],
     "models": [{"name", "objective", "beta", "rule", "threshold" (logit), "flags" ("none" or "all"
                 where the threshold is -inf or inf, which no JSON holds; else null), "threshold_from",
                 "scale", "tokens": which of a trace's texts is its}],
     "traces": [{"id", "problem", "label" (null unknown, -1 none), "picked_for",
       "texts": [{"ids": [vocabulary index], "ends": [last token of each step], "prob": [policy's p]}],
       "models": [{"td": [per token], "scores": [per step], "first_error"}],
       "candidates": {position: [[vocabulary index], [p], [TD of A], [TD of B]]},
       "dropped": [position whose candidates were left out for size]}]}

V is the running sum of TD. Numbers have three significant digits; null stands for what is not finite. `scale`
is the 98th percentile of |TD| over all traces that the model has scored, not only those that are shown.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ipvrm.data.batches import collate, length_sorted_microbatches
from ipvrm.data.chat import tokenizer_hash
from ipvrm.data.files import chunked, records
from ipvrm.data.responses import Response
from ipvrm.data.rows import BadRow, BadRows, OnBadRow, as_object
from ipvrm.data.steps import STEP_SEPARATOR, step_ends, step_scores
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.scoring import one_by_one
from ipvrm.evaluate.thresholds import predict
from ipvrm.models.causal_lm import candidate_logprobs, load_model, load_tokenizer
from ipvrm.models.reward_model import RewardModel, Solution, TokenLogprobs
from ipvrm.view.page import block, rounded

SCHEMA = "ipvrm-inspect/1"
MIN_PROB = 0.1  # P_min of the paper
QUANTILE = 0.98
CHUNK = 32  # solutions read at a time
BOARD = "response_tokens"  # a record with this column is one of the released code's logging board
BOARD_CANDIDATES, CANDIDATE_COLUMNS = 5, ("tokens", "policy_logp", "advs")


@dataclass(frozen=True)
class Item:
    """One solution; `label` is the index of its first wrong step, -1 for none, None where nobody knows."""

    id: str
    problem: str
    steps: tuple[str, ...]
    label: int | None


@dataclass(frozen=True)
class Judge:
    """A model as the page names it; `threshold` on the score of a step, a logit."""

    name: str
    objective: str
    beta: float
    rule: str
    threshold: float
    threshold_from: str


@dataclass(frozen=True)
class Choice:
    """Tokens that the policy might have taken at one position, the taken one among them."""

    ids: list[int]
    pieces: list[str]
    prob: list[float]


@dataclass
class Reading:
    """What one model says of one solution of T tokens and S steps."""

    pieces: tuple[str, ...]  # T
    ends: list[int]  # S, last token of each step
    prob: NDArray[np.floating]  # (T,), of the policy
    td: NDArray[np.floating]  # (T,)
    scores: NDArray[np.floating]  # (S,)
    first_error: int
    choices: dict[int, Choice] = field(default_factory=dict)
    choices_td: dict[int, list[float]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- the input


def read_items(
    path: str | Path, limit: int | None, on_bad_row: OnBadRow
) -> tuple[list[Item], list[dict[str, Any]]]:
    """(solutions, records of the released code's logging board); a file holds the one or the other.

    Raises:
        IpvrmError: bad lines under `on_bad_row="error"`, no usable line, or lines of both kinds.
    """
    items: list[Item] = []
    boards: list[dict[str, Any]] = []
    bad = BadRows()
    for file, row, index, value in islice(records(path, None), limit):
        try:
            record = as_object(value)
            if BOARD in record:
                boards.append(_checked_board(record))
            else:
                items.append(_item(record, index))
        except ValueError as error:
            bad.add(BadRow(file, row, str(error)))
    bad.report(on_bad_row, total=len(items) + len(boards) + bad.count)
    if bool(items) == bool(boards):
        what = "lines with steps and lines of a logging board; split them" if items else "no usable line"
        raise IpvrmError(f"--input {path}: {what}")
    return items, boards


def _item(record: dict[str, Any], index: int) -> Item:
    problem, steps, label = (record.get(key) for key in ("problem", "steps", "label"))
    if not isinstance(problem, str) or not problem:
        raise ValueError(f"`problem` must be a text; got {problem!r:.40}")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"`steps` must be a list of texts; got {steps!r:.40}")
    known = isinstance(label, int) and not isinstance(label, bool) and -1 <= label < len(steps)
    if label is not None and not known:
        raise ValueError(
            f"`label` must be -1, one of the {len(steps)} steps counted from 0, or absent; got {label!r:.40}"
        )
    return Item(str(record.get("id", index)), problem, tuple(steps), label)


# ------------------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class Policy:
    """Where candidates come from: the p of each taken token and the choices of each solution."""

    prob: list[NDArray[np.floating]]
    choices: list[dict[int, Choice]]
    tokenizer_hash: str

    def reads(self, i: int, solution: Solution, key: str) -> bool:
        """Whether the tokens of solution `i`, made by the tokenizer of that hash, are the policy's."""
        return self.tokenizer_hash == key and len(self.prob[i]) == solution.response.length


def read_all(
    model: RewardModel,
    judge: Judge,
    items: Sequence[Item],
    policy: Policy | None,
    *,
    step_format: str,
    step_separator: str,
    batch_tokens: int,
) -> Iterator[Reading | str]:
    """What `model` says of every solution, in order; a text in place of one that it cannot read: the reason.

    Args:
        policy: whose candidates are looked at where it has the model's tokens; None for the reference's.
    """
    key = tokenizer_hash(model.tokenizer)
    done = 0
    for chunk in chunked(items, CHUNK):
        pairs = [(item.problem, list(item.steps)) for item in chunk]

        def tokens(part: Sequence[tuple[str, list[str]]]) -> list[Solution]:
            found = model.solutions(part, step_format=step_format, step_separator=step_separator)
            return [solution for solution in found if solution is not None]  # no length limit: all

        solutions = one_by_one(tokens, pairs)
        whole = [(done + i, s) for i, s in enumerate(solutions) if not isinstance(s, str)]
        given = [policy is not None and policy.reads(i, s, key) for i, s in whole]
        wanted = [
            None if policy is None else _dense(policy.choices[i] if same else {}, s.response.length)
            for (i, s), same in zip(whole, given, strict=True)
        ]

        def logprobs(part: Sequence[tuple[Response, Tensor | None]]) -> list[TokenLogprobs]:
            ids = [ids for _, ids in part if ids is not None]
            return model.token_logprobs([response for response, _ in part], batch_tokens, ids or MIN_PROB)

        asked = [(s.response, ids) for (_, s), ids in zip(whole, wanted, strict=True)]
        readings: dict[int, Reading | str] = {}
        of_asked = one_by_one(logprobs, asked)
        for (i, solution), same, found in zip(whole, given, of_asked, strict=True):
            if isinstance(found, str):
                readings[i] = found
                continue
            prob, choices = found.ref_logprobs.exp().numpy(), dict[int, Choice]()
            if policy is None:
                assert found.candidates is not None
                choices = choices_of(
                    found.ref_logprobs,
                    found.candidates.ids,
                    found.candidates.ref_logprobs,
                    solution,
                    model.tokenizer,
                )
            elif same:
                prob, choices = policy.prob[i], policy.choices[i]
            readings[i] = _reading(judge, solution, found, prob, choices)
        for i, made in enumerate(solutions, done):
            yield made if isinstance(made, str) else readings[i]
        done += len(chunk)


def _reading(
    judge: Judge,
    solution: Solution,
    found: TokenLogprobs,
    prob: NDArray[np.floating],
    choices: dict[int, Choice],
) -> Reading:
    log_ratio = (found.logprobs - found.ref_logprobs).double()
    scores = step_scores(
        log_ratio, solution.steps_of_token, judge.beta, judge.rule, solution.num_steps
    ).numpy()
    td = (judge.beta * log_ratio).numpy()
    assert found.candidates is not None
    of_others = found.candidates.td(judge.beta)
    choices_td = {}
    for t, choice in choices.items():
        known = dict(zip(found.candidates.ids[t].tolist(), of_others[t].tolist(), strict=True))
        known[solution.token_ids[t]] = float(td[t])
        choices_td[t] = [known[token] for token in choice.ids]
    ends = step_ends(solution.steps_of_token, solution.num_steps).tolist()
    first_error = predict(scores, judge.threshold)
    return Reading(solution.tokens, ends, prob, td, scores, first_error, choices, choices_td)


def choices_of(
    of_taken: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    solution: Solution,
    tokenizer: Any,
) -> dict[int, Choice]:
    """The positions where there was another choice than the taken token: all candidates, and the taken one.

    Args:
        of_taken: (T,) log-prob of the taken tokens. ids, logprobs: (T, K) of the candidates, -1 for none.
    """
    found, token_ids, pieces = {}, solution.token_ids, solution.tokens
    for t, (row, values, taken) in enumerate(
        zip(ids.tolist(), logprobs.exp().tolist(), token_ids, strict=True)
    ):
        pairs = [(token, p) for token, p in zip(row, values, strict=True) if token >= 0]
        if taken not in row:
            pairs.append((taken, float(of_taken[t].exp())))
        if len(pairs) > 1:
            texts = [pieces[t] if token == taken else piece_of(tokenizer, token) for token, _ in pairs]
            found[t] = Choice([token for token, _ in pairs], texts, [p for _, p in pairs])
    return found


def piece_of(tokenizer: Any, token_id: int) -> str:
    """What a token stands for on its own; its name in the vocabulary where that is no text."""
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if "\ufffd" in text or not text:
        return name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def _dense(choices: dict[int, Choice], length: int) -> Tensor:
    """(T, K) int64, -1 for none."""
    widest = max((len(choice.ids) for choice in choices.values()), default=1)
    ids = torch.full((length, widest), -1, dtype=torch.int64)
    for t, choice in choices.items():
        ids[t, : len(choice.ids)] = torch.tensor(choice.ids)
    return ids


@torch.no_grad()
def ask_policy(
    folder: str,
    model: RewardModel,
    items: Sequence[Item],
    device: Any,
    *,
    step_format: str,
    step_separator: str,
    batch_tokens: int,
) -> Policy:
    """Candidates of another policy than the reference; it reads the tokens that `model` reads.

    Raises:
        IpvrmError: a policy with another vocabulary.
    """
    tokenizer = load_tokenizer(folder)
    key = tokenizer_hash(model.tokenizer)
    if tokenizer_hash(tokenizer) != key:
        raise IpvrmError(
            f"--policy {folder}: its vocabulary is not the reward model's, so its candidates are other "
            "tokens; name a policy with the same tokenizer, or leave --policy out"
        )
    policy = load_model(folder, torch.float32, device)
    pairs = [(item.problem, list(item.steps)) for item in items]
    probs: list[NDArray[np.floating]] = [np.zeros(0)] * len(items)
    choices: list[dict[int, Choice]] = [{} for _ in items]

    def tokens(part: Sequence[tuple[str, list[str]]]) -> list[Solution]:
        found = model.solutions(part, step_format=step_format, step_separator=step_separator)
        return [s for s in found if s is not None]  # no length limit: all

    solutions = {i: s for i, s in enumerate(one_by_one(tokens, pairs)) if not isinstance(s, str)}
    numbers = [*solutions]
    responses: list[Response] = [s.response for s in solutions.values()]
    for indices in length_sorted_microbatches([len(r.input_ids) for r in responses], max_tokens=batch_tokens):
        batch = collate([responses[i] for i in indices]).to(next(policy.parameters()).device)
        found = candidate_logprobs(policy, batch, MIN_PROB, model.info.temperature)
        sizes = [responses[i].length for i in indices]
        for i, taken, ids, logprobs in zip(indices, *(x.cpu().split(sizes) for x in found), strict=True):
            solution = solutions[numbers[i]]
            probs[numbers[i]] = taken.exp().numpy()
            choices[numbers[i]] = choices_of(taken, ids, logprobs, solution, tokenizer)
    return Policy(probs, choices, key)


# --------------------------------------------------------------------------------------------------- picking


def pick(
    how: str, k: int, items: Sequence[Item], readings: Sequence[Sequence[Reading]], judges: Sequence[Judge]
) -> list[tuple[int, str]]:
    """(position, why) of the `k` traces to be shown, the most telling first.

    `mistakes`: where the first model's verdict is not the label, by how far the step that decides lies on the
    wrong side of the threshold. `drop`: the lowest TD. `disagreement`: where two models flag different steps,
    by how far apart their scores are there, each in its own 98th percentile. `first`: the order of the file.

    Raises:
        IpvrmError: nothing to show.
    """
    first, threshold = readings[0], judges[0].threshold
    found: list[tuple[float, int, str]] = []
    if how == "first":
        found = [(0.0, i, "") for i in range(len(items))]
    elif how == "drop":
        for i, reading in enumerate(first):
            td = reading.td[np.isfinite(reading.td)]
            if len(td) and td.min() < 0:
                found.append((float(-td.min()), i, f"drop {td.min():.3g}"))
    elif how == "mistakes":
        for i, (item, reading) in enumerate(zip(items, first, strict=True)):
            label, flagged = item.label, reading.first_error
            if label is None or flagged == label:
                continue
            early = flagged >= 0 and (label < 0 or flagged < label)
            by = threshold - reading.scores[flagged] if early else reading.scores[label] - threshold
            found.append((float(by), i, "false alarm" if label < 0 else "early" if early else "missed"))
    else:
        if len(readings) < 2:
            raise IpvrmError("--pick disagreement needs two models (--model A B)")
        margins = [[r.scores - j.threshold for r in rs] for rs, j in zip(readings, judges, strict=True)]
        spread = [spread_of(of_model) for of_model in margins]
        for i, (a, b) in enumerate(zip(*readings, strict=True)):
            if a.first_error != b.first_error:
                steps = [step for step in (a.first_error, b.first_error) if step >= 0]
                apart = [abs(margins[0][i][k] / spread[0] - margins[1][i][k] / spread[1]) for k in steps]
                found.append((float(max(apart)), i, "disagreement"))
    if not found:
        raise IpvrmError(f"--pick {how}: none of the {len(items)} traces is one; try --pick drop or first")
    ranked = sorted(found, key=lambda entry: (-entry[0], entry[1]))[:k]
    return [(i, why) for _, i, why in ranked]


def spread_of(values: Sequence[NDArray[np.floating]]) -> float:
    """The 98th percentile of |x| over all that are finite; 0 where there are none."""
    whole = np.abs(np.concatenate([np.zeros(0), *values]))
    whole = whole[np.isfinite(whole)]
    return float(np.quantile(whole, QUANTILE)) if len(whole) else 0.0


# ------------------------------------------------------------------------------------------------- the block


class Vocabulary:
    """Pieces by the order of their first appearance."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def __call__(self, piece: str) -> int:
        return self.number.setdefault(piece, len(self.number))


def data_block(
    picked: Sequence[tuple[int, str]],
    items: Sequence[Item],
    readings: Sequence[Sequence[Reading]],
    judges: Sequence[Judge],
    **about: Any,
) -> dict[str, Any]:
    """The data of the page (see the module docstring); `about` are further entries of it."""
    vocabulary = Vocabulary()
    shared = all(
        a.pieces == b.pieces and a.ends == b.ends for a, b in zip(readings[0], readings[-1], strict=True)
    )
    traces = []
    for i, why in picked:
        of_models = [model[i] for model in readings]
        texts = [
            {"ids": [vocabulary(p) for p in r.pieces], "ends": r.ends, "prob": [rounded(p) for p in r.prob]}
            for r in (of_models[:1] if shared else of_models)
        ]
        candidates = {}
        for t, choice in of_models[0].choices.items():
            td = [r.choices_td.get(t, [float("nan")] * len(choice.ids)) for r in of_models]
            numbers = [[rounded(x) for x in column] for column in (choice.prob, *td)]
            candidates[str(t)] = [[vocabulary(p) for p in choice.pieces], *numbers]
        traces.append(
            {
                "id": items[i].id,
                "problem": items[i].problem,
                "label": items[i].label,
                "picked_for": why,
                "texts": texts,
                "models": [
                    {
                        "td": [rounded(x) for x in r.td],
                        "scores": [rounded(x) for x in r.scores],
                        "first_error": r.first_error,
                    }
                    for r in of_models
                ],
                "candidates": candidates,
                "dropped": [],
            }
        )
    models = [
        {
            **vars(judge),
            "threshold": rounded(judge.threshold),
            "flags": {-math.inf: "none", math.inf: "all"}.get(judge.threshold),
            "scale": rounded(spread_of([r.td for r in of_model])),
            "tokens": 0 if shared else number,
        }
        for number, (judge, of_model) in enumerate(zip(judges, readings, strict=True))
    ]
    return {"schema": SCHEMA, **about, "vocabulary": [*vocabulary.number], "models": models, "traces": traces}


def shrink(data: dict[str, Any], limit: int) -> int:
    """Leaves out the candidates whose TD differ least until the block has at most `limit` bytes, and names
    their positions in `dropped`.

    Returns:
        How many positions have lost theirs.
    """
    excess = len(block(data).encode()) - limit
    entries = []
    for number, trace in enumerate(data["traces"]):
        for t, (_, _, td, *_) in trace["candidates"].items():
            known = [x for x in td if x is not None]
            entries.append((max(known, default=0) - min(known, default=0), number, t))
    dropped = 0
    for _, number, t in sorted(entries):
        if excess <= 0:
            break
        trace = data["traces"][number]
        excess -= len(json.dumps({t: trace["candidates"].pop(t)}, separators=(",", ":"))) - 1
        excess += len(t) + 1
        trace["dropped"].append(int(t))
        dropped += 1
    return dropped


# ------------------------------------------------------------------------- the released code's logging board


def _checked_board(record: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError unless the columns of a record have one entry of their kind a token."""
    size = len(record[BOARD]) if isinstance(record[BOARD], list) else 0
    if not size or not all(isinstance(piece, str) for piece in record[BOARD]):
        raise ValueError(f"`{BOARD}` must be a list of texts, none is missing; got {record[BOARD]!r:.40}")
    of_candidates = [f"top{k}_{column}" for k in range(BOARD_CANDIDATES) for column in CANDIDATE_COLUMNS]
    for name in ("logprobs", "ref_logprobs", "values", "value", "step_rewards", *of_candidates):
        if name not in record:
            continue
        kind, what = (str, "text") if name.endswith("_tokens") else (int | float, "number")
        column = record[name]
        whole = isinstance(column, list) and len(column) == size
        if not whole or not all(isinstance(x, kind) and not isinstance(x, bool) for x in column):
            raise ValueError(f"`{name}` must hold a {what} for each of the {size} tokens; got {column!r:.40}")
    if _board_td(record) is None:
        raise ValueError("needs `values` (or `step_rewards`), or `logprobs` with `ref_logprobs`")
    return record


def _board_td(record: dict[str, Any]) -> NDArray[np.floating] | None:
    for name in ("values", "value", "step_rewards"):
        if name in record:
            return np.array(record[name], dtype=np.float64)
    if "logprobs" in record and "ref_logprobs" in record:
        return np.array(record["logprobs"], dtype=np.float64) - np.array(record["ref_logprobs"])
    return None


def read_board(records: Sequence[dict[str, Any]]) -> tuple[list[Item], list[Reading], Judge]:
    """A board's records as solutions: the token rewards are the TD, a blank line ends a step, no labels."""
    items, readings = [], []
    for number, record in enumerate(records, 1):
        pieces = tuple(record[BOARD])
        steps, step, text = [], 0, ""
        for piece in pieces:
            step += text.endswith(STEP_SEPARATOR) and bool(piece)
            text = "" if text.endswith(STEP_SEPARATOR) and piece else text
            text += piece
            steps.append(step)
        td = _board_td(record)
        assert td is not None
        of_token = torch.tensor(steps)
        scores = step_scores(torch.from_numpy(td), of_token, 1.0, "step", step + 1).numpy()
        prob = np.exp(np.array(record.get("logprobs", [np.nan] * len(pieces)), dtype=np.float64))
        reading = Reading(
            pieces, step_ends(of_token, step + 1).tolist(), prob, td, scores, predict(scores, 0.0)
        )
        for t, piece in enumerate(pieces):
            columns: list[list[Any]] = [
                [record[f"top{k}_{column}"][t] for column in CANDIDATE_COLUMNS]
                for k in range(BOARD_CANDIDATES)
                if all(f"top{k}_{column}" in record for column in CANDIDATE_COLUMNS)
            ]
            columns = [c for c in columns if np.exp(c[1]) >= MIN_PROB]
            if not any(c[0] == piece for c in columns):
                columns.append([piece, np.log(prob[t]) if prob[t] > 0 else -np.inf, td[t]])
            if len(columns) > 1:
                reading.choices[t] = Choice(
                    [*range(len(columns))], [c[0] for c in columns], [float(np.exp(c[1])) for c in columns]
                )
                reading.choices_td[t] = [float(c[2]) for c in columns]
        name = f"{record.get('step', '')}-{number}" if "step" in record else str(number)
        items.append(Item(name, str(record.get("prompt", "")), tuple(map(str, range(step + 1))), None))
        readings.append(reading)
    judge = Judge("logged", "logged token rewards", 1.0, "step", 0.0, "logit 0: a board holds no evaluation")
    return items, readings, judge
