"""Best-of-N: pick one of N sampled responses with a reward model; majority vote and pass@N beside it.

Each problem has M >= N sampled responses. What is reported is the expectation over all subsets of N of them,
without replacement, so that no response is favoured by its place in the file:

    pick by score   With the M responses sorted by score, the one of rank j (0 = best) is picked by
                    C(M-1-j, N-1) of the C(M, N) subsets; equal scores share their ranks evenly.
    pass@N          1 - C(M-c, N) / C(M, N) with c right answers among the M.
    majority vote   The subsets in which the most frequent answers have v votes, w of them tied, are counted
                    for every v and w; tied answers share the win evenly, and a response without an answer
                    has no vote.

All of it is exact: subsets are counted in whole numbers, and none is drawn.

Responses are scored by the value at the end or by their step scores (`PICKS`):

    final   V_T / T, the mean value after the last token       sum   V_T
    mean    mean of the step scores (rule `step`)              min   lowest step score
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ipvrm.data.steps import step_scores
from ipvrm.evaluate.thresholds import Interval, percentile_interval

PICKS = ("final", "sum", "mean", "min")


@dataclass(frozen=True)
class Samples:
    """M responses to one problem: answers (None = none found), which are right, and (M,) scores by name."""

    answers: Sequence[Hashable | None]
    correct: Sequence[bool]
    scores: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class BestOfN:
    """Accuracy in [0, 1] of one way to choose, with its interval over problems."""

    method: str
    n: int
    accuracy: float
    interval: Interval
    num_problems: int


def response_scores(
    log_ratio: Tensor, steps_of_token: Tensor, beta: float, num_steps: int, discount: float = 1.0
) -> dict[str, float]:
    """The four scores of one response.

    Args:
        log_ratio: (T,) floating, log pi_phi - log pi_ref of its tokens, the end-of-turn token included.
        steps_of_token: (T,) int64 from `ipvrm.data.steps.step_of_token`.
        beta: scale of the value.
        num_steps: S >= 1.
        discount: as in `ipvrm.data.steps.step_scores`.

    Raises:
        ValueError: no token or no step.
    """
    if len(log_ratio) == 0 or num_steps < 1:
        raise ValueError(
            f"response_scores: needs tokens and steps; got {len(log_ratio)} tokens and {num_steps} steps"
        )
    weights = discount ** torch.arange(len(log_ratio), dtype=torch.float64)  # (T,)
    value = beta * float((log_ratio.double() * weights).sum())
    steps = step_scores(log_ratio.double(), steps_of_token, beta, "step", num_steps, discount)  # (S,)
    return {
        "final": value / len(log_ratio),
        "sum": value,
        "mean": float(steps.mean()),
        "min": float(steps.min()),
    }


def expected_pick(scores: Sequence[float], correct: Sequence[bool], n: int) -> float:
    """Chance that the best-scored of n random responses is right (exact; see the module docstring)."""
    m = _check_n(len(scores), n)
    score_array = np.asarray(scores, dtype=np.float64)
    if np.isnan(score_array).any():
        raise ValueError("best-of-N: scores must be numbers; got nan")
    total, rank = 0.0, 0
    for group in sorted(set(score_array.tolist()), reverse=True):
        tied = score_array == group
        size = int(tied.sum())
        weight = sum(math.comb(m - 1 - j, n - 1) for j in range(rank, rank + size))
        total += weight / math.comb(m, n) * float(np.asarray(correct)[tied].mean())
        rank += size
    return total


def pass_at_n(correct: Sequence[bool], n: int) -> float:
    """Chance that n random responses hold a right one (exact)."""
    m = _check_n(len(correct), n)
    return 1.0 - math.comb(m - sum(map(bool, correct)), n) / math.comb(m, n)


def majority_vote(answers: Sequence[Hashable | None], correct: Sequence[bool], n: int) -> float:
    """Chance that the most frequent answer of n random responses is right (exact).

    Of subsets in which no answer has more than v votes, answers with fewer than v responses are free, so
    they and the responses without an answer count together; the others are added one by one.
    """
    m = _check_n(len(answers), n)
    right = {answer for answer, ok in zip(answers, correct, strict=True) if ok}
    counts = Counter(answer for answer in answers if answer is not None)
    total = Fraction(0)
    for v in range(1, min(n, max(counts.values(), default=0)) + 1):
        able = {answer: count for answer, count in counts.items() if count >= v}
        rest = m - sum(able.values())
        # (responses taken, answers with v votes): ways, and the right ones among these answers over all ways
        found = {(0, 0): (1, 0)}
        for answer, count in able.items():
            before, found = found, {}
            for (taken, tied), (ways, hits) in before.items():
                for votes in range(min(v, n - taken) + 1):
                    wins, each = votes == v, math.comb(count, votes)
                    key = taken + votes, tied + wins
                    more, extra = found.get(key, (0, 0))
                    own = hits + ways * (wins and answer in right)
                    found[key] = more + ways * each, extra + own * each
        for (taken, tied), (_, hits) in found.items():
            if tied:
                total += Fraction(hits * math.comb(rest, n - taken), tied)
    return float(total / math.comb(m, n))


def best_of_n(
    problems: Sequence[Samples], n_values: Sequence[int], resamples: int = 2000, seed: int = 0
) -> list[BestOfN]:
    """Accuracy of every way to choose at every N, with 95 % percentile intervals over problems.

    Returns:
        Rows in the order single sample, scores as named by the problems, majority vote, pass@N, for each N.

    Raises:
        ValueError: no problems, problems with different score names, or an N above a problem's samples.
    """
    if not problems:
        raise ValueError("best-of-N: needs at least one problem")
    names = list(problems[0].scores)
    if any(list(p.scores) != names for p in problems):
        raise ValueError("best-of-N: every problem must carry the same scores")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(problems), (resamples, len(problems)))

    def row(method: str, n: int, per_problem: list[float]) -> BestOfN:
        values = np.array(per_problem)
        interval = percentile_interval(values[draws].mean(1))
        return BestOfN(method, n, float(values.mean()), interval, len(problems))

    rows = []
    for n in n_values:
        rows.append(row("one_sample", n, [float(np.mean(p.correct)) for p in problems]))
        for name in names:
            rows.append(row(name, n, [expected_pick(p.scores[name], p.correct, n) for p in problems]))
        rows.append(row("majority_vote", n, [majority_vote(p.answers, p.correct, n) for p in problems]))
        rows.append(row("pass_at_n", n, [pass_at_n(p.correct, n) for p in problems]))
    return rows


def _check_n(m: int, n: int) -> int:
    if not 1 <= n <= m:
        raise ValueError(
            f"best-of-N: N must lie between 1 and the number of samples; got N={n} of {m} samples"
        )
    return m
