"""What studies over several base models share: results of one reward model, and intervals over base models.

The result of a base model is a dictionary with `erroneous` (a 0 or 1 a test trace) and `reward_models`, by
name what `reward_model_results` returns.

Intervals redraw base models and, within each, traces or problems together: 95 %, one draw of models fewer
than there are (Rao and Wu 1988).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipvrm.data.steps import RULES
from ipvrm.demo.arithmetic import Format, answer_of
from ipvrm.demo.evaluation import pick_scores, read_traces, score_traces
from ipvrm.demo.rollouts import read_rollouts
from ipvrm.demo.settings import Choice
from ipvrm.evaluate.best_of_n import PICKS, Samples, expected_pick, majority_vote, pass_at_n
from ipvrm.evaluate.thresholds import f1_of_hits, harmonic_mean, hits, percentile_interval, sweep
from ipvrm.models.reward_model import RewardModel

RESAMPLES = 2000


def reward_model_results(
    model: RewardModel, rollouts: Path, choice: Choice, formats: Sequence[Format], n_values: Sequence[int]
) -> dict[str, Any]:
    """F1 by format at the rule and threshold that the validation traces choose, and Best-of-N.

    Args:
        rollouts: the folder with the traces and the responses of Best-of-N.
        formats: of the test traces; the others are in the training format.
    """
    validation, _ = read_traces(rollouts / "validation.jsonl")
    test, _ = read_traces(rollouts / "test.jsonl")
    found = score_traces(model, validation)
    swept = {rule: sweep([s.by_rule[rule] for s in found], [t.label for t in validation]) for rule in RULES}
    rule = max(RULES, key=lambda r: swept[r][1].f1)
    labels = [trace.label for trace in test]
    by_format = {}
    for written in formats:
        scores = [s.by_rule[rule] for s in score_traces(model, test, written)]
        hit = hits(scores, labels, swept[rule][0].score)
        by_format[written.name] = {"f1": f1_of_hits(hit, labels).f1, "hit": [int(h) for h in hit]}
    problems = []
    for (problem, responses), scores in zip(
        read_rollouts(rollouts / "best_of_n.jsonl"),
        pick_scores(model, rollouts / "best_of_n.jsonl"),
        strict=True,
    ):
        answers = [answer_of(r) if r else None for r in responses]
        problems.append(Samples(answers, [a == problem.answer for a in answers], scores))
    picked = {
        str(n): {pick: [expected_pick(p.scores[pick], p.correct, n) for p in problems] for pick in PICKS}
        for n in n_values
    }
    other = {
        str(n): {
            "majority vote": [majority_vote(p.answers, p.correct, n) for p in problems],
            "pass@N": [pass_at_n(p.correct, n) for p in problems],
            "one sample": [pass_at_n(p.correct, 1) for p in problems],
        }
        for n in n_values
    }
    return {
        "choice": asdict(choice) | {"rule": rule},
        "validation_f1": {r: swept[r][1].f1 for r in RULES},
        "formats": by_format,
        "best_of_n": picked,
        "without_a_model": other,
    }


Weights = NDArray[np.float64]  # (n,) of a resample, sum 1
Statistic = Callable[[dict[str, Any], Weights | None], float]


def estimate(
    runs: Sequence[dict[str, Any]], size: Callable[[dict[str, Any]], int], of: Statistic
) -> dict[str, Any]:
    """Mean over base models of a statistic, each one's value, and an interval over both levels."""
    rng = np.random.default_rng(0)
    values = [of(run, None) for run in runs]
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, len(runs), max(1, len(runs) - 1))
        weights = [rng.multinomial(size(runs[d]), np.full(size(runs[d]), 1 / size(runs[d]))) for d in drawn]
        means[i] = np.mean([of(runs[d], w / w.sum()) for d, w in zip(drawn, weights, strict=True)])
    return {
        "mean": statistics.fmean(values),
        "by_model": values,
        "interval": list(percentile_interval(means)),
    }


def f1_statistic(name: str, written: str) -> Statistic:
    def of(run: dict[str, Any], weights: Weights | None) -> float:
        hit = np.asarray(run["reward_models"][name]["formats"][written]["hit"], float)
        wrong = np.asarray(run["erroneous"], bool)
        w = np.full(len(hit), 1 / len(hit)) if weights is None else weights
        parts = [float((hit * w)[part].sum() / max(w[part].sum(), 1e-12)) for part in (wrong, ~wrong)]
        return harmonic_mean(*parts)

    return of


def mean_statistic(values: Callable[[dict[str, Any]], Sequence[float]]) -> Statistic:
    def of(run: dict[str, Any], weights: Weights | None) -> float:
        found = np.asarray(values(run), float)
        return float(found.mean() if weights is None else (found * weights).sum())

    return of


def difference(a: Statistic, b: Statistic) -> Statistic:
    return lambda run, weights: a(run, weights) - b(run, weights)


def traces(run: dict[str, Any]) -> int:
    """How many test traces a base model's results are of."""
    return len(run["erroneous"])


def table(head: str, rows: dict[str, Any], sign: str = "") -> list[str]:
    """Markdown of what `estimate` returns by name, in %."""

    def cell(entry: dict[str, Any]) -> str:
        low, high = (100 * x for x in entry["interval"])
        each = " / ".join(format(100 * x, f"{sign}.1f") for x in entry["by_model"])
        return f"{format(100 * entry['mean'], f'{sign}.1f')} ({low:{sign}.1f} to {high:{sign}.1f}) | {each}"

    return [f"| {head} | mean and 95 % interval | each base model |", "|---|--:|--:|"] + [
        f"| {name} | {cell(entry)} |" for name, entry in rows.items()
    ]
