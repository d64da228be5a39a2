"""First-error F1: the exact threshold sweep, intervals over items, and what no model is needed for.

An item has S step scores and a label, the index of its first wrong step or -1. At threshold tau the predicted
first error is the first step with sigmoid(score) < tau, else -1; an item is hit when that equals the label.

    F1 = harmonic mean of (share of erroneous items hit, share of correct items hit)

The prediction changes only where the threshold passes a score, and an item is hit on one interval (low, high]
of thresholds: a correct item up to its lowest score, an item with first error k from just above score k up to
the lowest score before k (empty if that is not larger). Sorting the S scores of all items and adding up the
interval ends gives the F1 of **every** possible threshold in O(S log S). Scores are compared as scores, in
fp64: sigmoids that have saturated to 1 would make different scores equal.

Ties: of several thresholds with the same best F1 the lowest is taken, the one that flags fewest steps.
Between two neighbouring scores every threshold predicts the same; the one reported lies halfway between them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[NDArray[np.floating] | Sequence[float] | None]


class Interval(NamedTuple):
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


class FirstErrorF1(NamedTuple):
    """Shares in [0, 1]; nan where a class has no item."""

    f1: float
    accuracy_erroneous: float
    accuracy_correct: float


class Threshold(NamedTuple):
    """`tau` = sigmoid(`score`); `score` is what decides (-inf flags nothing, +inf flags every first step)."""

    tau: float
    score: float

    @classmethod
    def at(cls, score: float) -> "Threshold":
        exp = math.exp(-abs(score))
        return cls(float(1 / (1 + exp) if score >= 0 else exp / (1 + exp)), float(score))


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 when both are 0, nan when either is nan."""
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def _checked(
    scores: Scores, labels: Sequence[int]
) -> tuple[list[NDArray[np.float64] | None], NDArray[np.int64]]:
    if len(scores) != len(labels):
        raise ValueError(
            f"first-error F1: one label per item; got {len(scores)} items and {len(labels)} labels"
        )
    checked = [None if s is None else np.asarray(s, dtype=np.float64) for s in scores]
    for i, (item, label) in enumerate(zip(checked, labels, strict=True)):
        if item is None:
            continue
        if item.ndim != 1 or np.isnan(item).any():
            raise ValueError(
                f"first-error F1: step scores must be (S,) numbers; item {i} has {item.tolist()}"
            )
        if not -1 <= label < len(item):
            raise ValueError(f"first-error F1: item {i} has label {label} and {len(item)} steps")
    return checked, np.asarray(labels, dtype=np.int64)


def hits(scores: Scores, labels: Sequence[int], threshold_score: float) -> NDArray[np.bool_]:
    """Which items have their first error (or its absence) predicted exactly.

    Args:
        scores: per item (S,) step scores, or None for an item without scores, which is never hit.
        labels: index of the first wrong step, -1 for none.
        threshold_score: a step is flagged when its score is below this.

    Returns:
        (items,) bool.
    """
    checked, label_array = _checked(scores, labels)
    predictions = [None if s is None else predict(s, threshold_score) for s in checked]
    return np.array(
        [p is not None and p == k for p, k in zip(predictions, label_array, strict=True)], dtype=bool
    )


def predict(scores: NDArray[np.floating] | Sequence[float], threshold_score: float) -> int:
    """Index of the first score below `threshold_score`, else -1."""
    below = np.asarray(scores, dtype=np.float64) < threshold_score
    return int(below.argmax()) if below.any() else -1


def f1_of_hits(hit: NDArray[np.bool_], labels: Sequence[int]) -> FirstErrorF1:
    """F1 and its two halves from hits (items,) and labels."""
    wrong = np.asarray(labels) >= 0
    accuracy_erroneous = float(hit[wrong].mean()) if wrong.any() else math.nan
    accuracy_correct = float(hit[~wrong].mean()) if (~wrong).any() else math.nan
    return FirstErrorF1(
        harmonic_mean(accuracy_erroneous, accuracy_correct), accuracy_erroneous, accuracy_correct
    )


def hit_interval(scores: NDArray[np.float64], label: int) -> tuple[float, float]:
    """(low, high] of the score thresholds that hit this item; low >= high where none does."""
    if label == -1:
        return -math.inf, float(scores.min(initial=math.inf))
    return float(scores[label]), float(scores[:label].min(initial=math.inf))


def sweep(scores: Scores, labels: Sequence[int]) -> tuple[Threshold, FirstErrorF1]:
    """The threshold with the best F1 among all thresholds, and that F1 (see the module docstring).

    Raises:
        ValueError: labels that do not fit, scores that are not numbers, or a class without items.
    """
    checked, label_array = _checked(scores, labels)
    num_erroneous, num_correct = int((label_array >= 0).sum()), int((label_array < 0).sum())
    if num_erroneous == 0 or num_correct == 0:
        raise ValueError(
            "threshold sweep: needs items with and without an error; "
            f"got {num_erroneous} erroneous and {num_correct} correct"
        )
    scored = [(s, k) for s, k in zip(checked, label_array, strict=True) if s is not None]
    distinct = np.unique(np.concatenate([np.zeros(0)] + [s for s, _ in scored]))  # (U,) ascending
    # gap g holds the thresholds in (distinct[g - 1], distinct[g]], with -inf and +inf outside: U + 1 gaps
    steps = np.zeros((2, len(distinct) + 2), dtype=np.int64)  # changes of the hit count, row 1 erroneous
    for item, label in scored:
        low, high = hit_interval(item, int(label))
        if low < high:
            steps[int(label >= 0), np.searchsorted(distinct, low, side="right")] += 1
            steps[int(label >= 0), np.searchsorted(distinct, high, side="left") + 1] -= 1
    correct, erroneous = steps.cumsum(1)[:, :-1] / np.array([[num_correct], [num_erroneous]])  # (U + 1,) each
    f1 = 2 * correct * erroneous / np.maximum(correct + erroneous, 1e-300)
    gap = int(f1.argmax())  # the first, so the lowest, of the best
    if gap == 0:
        score = -math.inf
    elif gap == len(distinct):
        score = math.inf
    else:
        low, high = distinct[gap - 1], distinct[gap]
        middle = low / 2 + high / 2
        score = middle if low < middle <= high else high
    return Threshold.at(score), FirstErrorF1(float(f1[gap]), float(erroneous[gap]), float(correct[gap]))


RELEASED_GRID = np.linspace(-1, 1, 1000)  # of the released script; half of it no probability reaches


def released_grid(scores: Scores, labels: Sequence[int]) -> tuple[float, FirstErrorF1]:
    """The best of the released script's thresholds, the lowest of several, and its F1.

    Args:
        scores, labels: as in `hits`; with the script's own scales of the scores.
    """
    checked, label_array = _checked(scores, labels)
    with np.errstate(divide="ignore"):
        grid = np.where(
            RELEASED_GRID > 0, np.log(RELEASED_GRID.clip(0)) - np.log1p(-RELEASED_GRID), -math.inf
        )
    never = (math.inf, -math.inf)
    low, high = np.array(
        [never if s is None else hit_interval(s, int(k)) for s, k in zip(checked, label_array, strict=True)]
    ).T[..., None]  # (items, 1) each
    hit = (low < grid) & (grid <= high)  # (items, grid)
    found = [f1_of_hits(column, labels) for column in hit.T]
    best = int(np.argmax([f1.f1 for f1 in found]))
    return float(RELEASED_GRID[best]), found[best]


def bootstrap_f1(
    hit: NDArray[np.bool_], labels: Sequence[int], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of F1 over items drawn with replacement, at one threshold.

    It says how much the F1 of this threshold moves with the items, not what choosing the threshold adds.
    """
    wrong = np.asarray(labels) >= 0
    cells = np.array([(hit & wrong).sum(), (~hit & wrong).sum(), (hit & ~wrong).sum(), (~hit & ~wrong).sum()])
    if cells.sum() == 0:
        return Interval(math.nan, math.nan)
    # a resample is known by how many items fall into each of the four cells
    draws = np.random.default_rng(seed).multinomial(int(cells.sum()), cells / cells.sum(), size=resamples)
    with np.errstate(invalid="ignore"):
        erroneous = draws[:, 0] / draws[:, :2].sum(1)
        correct = draws[:, 2] / draws[:, 2:].sum(1)
    f1 = 2 * erroneous * correct / np.maximum(erroneous + correct, 1e-300)
    return percentile_interval(f1, level)


def bootstrap_difference(
    hit_a: NDArray[np.bool_],
    hit_b: NDArray[np.bool_],
    labels: Sequence[int],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of F1(a) - F1(b) on the same items, redrawn together."""
    wrong = np.asarray(labels) >= 0
    kind = 4 * wrong + 2 * np.asarray(hit_a) + np.asarray(hit_b)  # eight kinds of item
    cells = np.bincount(kind, minlength=8)
    draws = np.random.default_rng(seed).multinomial(len(kind), cells / max(1, len(kind)), size=resamples)
    with np.errstate(invalid="ignore"):
        f1 = []
        for columns in ((2, 3), (1, 3)):  # of right items, where a hits; where b hits
            correct = draws[:, columns].sum(1) / draws[:, :4].sum(1)
            erroneous = draws[:, [4 + c for c in columns]].sum(1) / draws[:, 4:].sum(1)
            f1.append(2 * erroneous * correct / np.maximum(erroneous + correct, 1e-300))
    return percentile_interval(f1[0] - f1[1], level)


def percentile_interval(values: NDArray[np.floating], level: float = 0.95) -> Interval:
    """Percentile interval of resampled values; nan (undefined in that resample) is left out."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def trivial_baselines(labels: Sequence[int], num_steps: Sequence[int]) -> dict[str, FirstErrorF1]:
    """What answers that never look at the solution reach, in expectation (no sampling).

    always_none      answer -1: every correct item, no erroneous one, so F1 0 (as for any single fixed answer)
    random_step      one of the S + 1 possible answers, all equally likely
    best_constant    -1 with probability p, else one fixed step k; k and p are the best for these very labels:
                     with q = share of erroneous items whose first error is k, p = sqrt(q) / (1 + sqrt(q))
    """
    label_array, lengths = np.asarray(labels), np.asarray(num_steps)
    wrong = label_array >= 0
    chance = 1 / (lengths + 1)
    erroneous = float(chance[wrong].mean()) if wrong.any() else math.nan
    correct = float(chance[~wrong].mean()) if (~wrong).any() else math.nan
    share = float(np.bincount(label_array[wrong]).max() / wrong.sum()) if wrong.any() else math.nan
    p = math.sqrt(share) / (1 + math.sqrt(share)) if wrong.any() else math.nan
    best_correct = p if (~wrong).any() else math.nan
    return {
        "always_none": FirstErrorF1(harmonic_mean(0.0 * share, 1.0), 0.0 * share, 1.0),
        "random_step": FirstErrorF1(harmonic_mean(erroneous, correct), erroneous, correct),
        "best_constant": FirstErrorF1(
            harmonic_mean((1 - p) * share, best_correct), (1 - p) * share, best_correct
        ),
    }


def f1_report(
    scores: Scores, labels: Sequence[int], threshold: Threshold, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """One rule at one threshold, for results.json: tau, score_threshold, F1, its halves, its interval."""
    hit = hits(scores, labels, threshold.score)
    interval = bootstrap_f1(hit, labels, resamples, seed)
    f1 = f1_of_hits(hit, labels)._asdict()
    at = {"tau": threshold.tau, "score_threshold": threshold.score}
    return finite_or_none(at | f1) | {"f1_interval": list(finite_or_none(interval._asdict()).values())}


def score_threshold(report: Mapping[str, Any]) -> float:
    """The score threshold of an `f1_report`; an infinite one is null there, beside a tau of 0 or 1."""
    stored = report["score_threshold"]
    return float(stored) if stored is not None else (-math.inf if report["tau"] == 0.0 else math.inf)


def finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan and no infinity: null stands for both."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
