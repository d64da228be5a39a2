"""Steps of a solution: how they are written, which token belongs to which, and the score of each.

A solution is a list of S steps, written as one text that the model reads as the assistant's turn. Scores come
from the T per-token log-ratios l_t of one forward (V_t = beta * sum_{i<=t} l_i, the value after token t):

    step        sum of beta * l_t over the tokens of the step                       Eq. 31, the main tables
    prefix      V at the last token of the step                                     Eq. 30
    mean        V_t / t at the last token of the step, t counted from 1 within the response
    mean_diff   mean of beta * l_t over the tokens of the step: the difference of V across the step,
                divided by its length (the released script's definition, not a difference of two means)

A token belongs to the step in which it **ends**, that is, to the step of its last character; the separator
behind a step is part of that step. Tokens that end in no step (the end-of-turn token, a template's preamble)
belong to none: they count in V and in t, and in no step's sum. A step without a token of its own has nothing
to be judged by: `step` and `mean_diff` are 0 there, `prefix` and `mean` carry on from the step before.
"""

import math
from collections.abc import Sequence
from string import Formatter

import torch
from torch import Tensor

from ipvrm.errors import IpvrmError

RULES = ("step", "prefix", "mean", "mean_diff")
STEP_FORMAT = "Step {i}: {step}"
STEP_SEPARATOR = "\n\n"


def render_steps(
    steps: Sequence[str], step_format: str = STEP_FORMAT, step_separator: str = STEP_SEPARATOR
) -> tuple[str, list[int]]:
    """Write steps as one text.

    Args:
        steps: S step texts.
        step_format: how one step is written; `{i}` is its number counted from 1, `{step}` its text.
        step_separator: what stands between two steps (not behind the last).

    Returns:
        (text, ends): `ends[k]` is the exclusive character position where step k ends, its trailing separator
        included, so `ends[-1] == len(text)`.

    Raises:
        IpvrmError: no steps, or a format that `check_step_format` refuses.
    """
    if len(steps) == 0:
        raise IpvrmError("render_steps: a solution must have at least one step; got an empty list")
    check_step_format(step_format)
    text, ends = "", []
    for i, step in enumerate(steps):
        text += step_format.format(i=i + 1, step=step)
        if i + 1 < len(steps):
            text += step_separator
        ends.append(len(text))
    return text, ends


def check_step_format(step_format: str) -> None:
    """Raises IpvrmError for a format that cannot be filled, lacks `{step}`, or has fields besides `{i}`."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(step_format) if name is not None}
        if fields <= {"i", "step"}:
            step_format.format(i=1, step="")
    except ValueError as error:
        raise IpvrmError(f"step_format {step_format!r} is not a format string: {error}") from error
    if "step" not in fields or not fields <= {"i", "step"}:
        raise IpvrmError(
            "step_format must contain {step} and may contain {i}, nothing else; "
            f"got {step_format!r} with the fields {sorted(fields)}"
        )


def step_of_token(offsets: Sequence[tuple[int, int]], ends: Sequence[int]) -> Tensor:
    """The step in which each token ends.

    Args:
        offsets: T character ranges (start, end exclusive) within the text of `render_steps`; (-1, -1) for a
            token outside the text, such as the end-of-turn token.
        ends: S exclusive character ends, ascending, as `render_steps` returns them.

    Returns:
        (T,) int64: index of the step that holds the token's last character, -1 for tokens outside every step.
        A token of no characters counts as ending where the character before it ends.
    """
    end_of_token = torch.tensor([end for _, end in offsets], dtype=torch.int64)  # (T,)
    boundaries = torch.tensor(list(ends), dtype=torch.int64)  # (S,)
    last_character = (end_of_token - 1).clamp_min(0)  # (T,)
    step = torch.searchsorted(boundaries, last_character, right=True)  # (T,)
    outside = (end_of_token < 0) | (step == len(boundaries))
    return torch.where(outside, -1, step)


def token_pieces(text: str, offsets: Sequence[tuple[int, int]], outside: Sequence[str]) -> tuple[str, ...]:
    """What each token stands for; those of the text joined are the text.

    A character that is split over tokens belongs to the last of them: the others have the piece "".

    Args:
        text: of `render_steps`.
        offsets: as in `step_of_token`.
        outside: T texts, read where a token is outside the text.
    """
    inside = [t for t, (_, end) in enumerate(offsets) if end >= 0]
    pieces, at = list(outside), 0
    for t, behind in zip(inside, [*inside[1:], None], strict=True):
        end = len(text) if behind is None else min(offsets[t][1], max(at, offsets[behind][0]))
        pieces[t], at = text[at:end], max(at, end)
    return tuple(pieces)


def step_ends(steps_of_token: Tensor, num_steps: int) -> Tensor:
    """Token position of the last token of every step.

    Args:
        steps_of_token: (T,) int64 from `step_of_token`.
        num_steps: S.

    Returns:
        (S,) int64: index of the step's last token within the response; a step without tokens repeats the one
        before it, and -1 stands where no token has come yet.
    """
    last = torch.full((num_steps,), -1, dtype=torch.int64)
    positions = torch.arange(len(steps_of_token))
    inside = steps_of_token >= 0
    last.scatter_reduce_(0, steps_of_token[inside], positions[inside], reduce="amax")
    return last.cummax(0).values if num_steps else last


def step_scores(
    log_ratio: Tensor,
    steps_of_token: Tensor,
    beta: float,
    rule: str = "step",
    num_steps: int | None = None,
    discount: float = 1.0,
) -> Tensor:
    """Score of every step under one of the four `RULES` (see the module docstring).

    Args:
        log_ratio: (T,) floating, l_t = log pi_phi - log pi_ref of the response tokens, in nats.
        steps_of_token: (T,) int64 from `step_of_token`.
        beta: scale of the value.
        rule: step | prefix | mean | mean_diff.
        num_steps: S; None takes the highest step that has a token.
        discount: of a token for each one before it, within its step (step, mean_diff) or within the response
            (prefix, mean).

    Returns:
        (S,) of `log_ratio`'s dtype, on the CPU; summed in fp64.

    Raises:
        ValueError: unknown rule, or shapes that differ.
    """
    if rule not in RULES:
        raise ValueError(f"step_scores: rule must be one of {', '.join(RULES)}; got {rule!r}")
    if log_ratio.ndim != 1 or log_ratio.shape != steps_of_token.shape:
        raise ValueError(
            "step_scores: log_ratio and steps_of_token must be (T,) alike; "
            f"got {tuple(log_ratio.shape)} and {tuple(steps_of_token.shape)}"
        )
    steps_of_token = steps_of_token.cpu()
    if num_steps is None:
        num_steps = int(steps_of_token.max()) + 1 if len(steps_of_token) else 0
    td = beta * log_ratio.detach().cpu().double()  # (T,)
    inside = steps_of_token >= 0  # (T,)
    if discount != 1:
        td = td * discount ** _tokens_before(steps_of_token, within_step=rule in ("step", "mean_diff"))
    if rule in ("step", "mean_diff"):
        scores = torch.zeros(num_steps, dtype=torch.float64)  # (S,)
        scores.index_add_(0, steps_of_token[inside], td[inside])
        if rule == "mean_diff":
            scores /= torch.bincount(steps_of_token[inside], minlength=num_steps).clamp_min(1)
        return scores.to(log_ratio.dtype)
    ends = step_ends(steps_of_token, num_steps)  # (S,)
    value = torch.cat([td.new_zeros(1), td.cumsum(0)])  # (T + 1,), V_0 = 0
    scores = value[ends + 1]
    if rule == "mean":
        scores = scores / (ends + 1).clamp_min(1)
    return scores.to(log_ratio.dtype)


def _tokens_before(steps_of_token: Tensor, within_step: bool) -> Tensor:
    """(T,) int64: how many tokens of the response, or of the token's own step, are before each."""
    positions = torch.arange(len(steps_of_token))
    if not within_step:
        return positions
    step = steps_of_token + 1  # (T,), tokens outside every step together
    first = torch.full((int(step.max()) + 1,), len(step)).scatter_reduce_(0, step, positions, reduce="amin")
    return positions - first[step]


def logit(threshold: float) -> float:
    """The score whose sigmoid is `threshold`; -inf at 0 and +inf at 1.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"logit: a threshold must lie in [0, 1]; got {threshold!r}")
    if threshold == 0.0:
        return -math.inf
    return math.inf if threshold == 1.0 else math.log(threshold) - math.log1p(-threshold)


def first_error(scores: Tensor | Sequence[float], threshold: float = 0.5) -> int:
    """First step whose sigmoid(score) lies below `threshold`, else -1.

    Compared as score < logit(threshold) in fp64: large scores still differ where their sigmoids do not.

    Raises:
        ValueError: a score that is not a number, or a threshold outside [0, 1].
    """
    of_steps = torch.as_tensor(scores, dtype=torch.float64)
    if bool(of_steps.isnan().any()):
        raise ValueError(f"first_error: scores must be numbers; got {of_steps.tolist()}")
    below = of_steps < logit(threshold)
    return int(below.int().argmax()) if bool(below.any()) else -1
