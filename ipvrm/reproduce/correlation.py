"""How two columns go together, with intervals over groups: linear and rank correlation.

Observations come in groups (branches of a prefix, prefixes of a prompt). `centred` takes the mean of its
group off every value; `bootstrap` draws whole groups with replacement, since observations of one group are
not independent. What is undefined (a constant column) is nan.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipvrm.evaluate.thresholds import Interval, percentile_interval

Column = NDArray[np.float64]


def pearson(x: Column, y: Column) -> float:
    """Linear correlation of x (n,) and y (n,)."""
    if len(x) < 2:
        return math.nan
    a, b = x - x.mean(), y - y.mean()
    # a constant column leaves rounding behind: it is compared with the size of its values
    if np.abs(a).max() <= 1e-12 * np.abs(x).max() or np.abs(b).max() <= 1e-12 * np.abs(y).max():
        return math.nan
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def ranks(x: Column) -> Column:
    """Ranks from 1, those of equal values averaged, (n,)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(x: Column, y: Column) -> float:
    """Linear correlation of the ranks of x (n,) and y (n,)."""
    return pearson(ranks(x), ranks(y))


def partial(correlation: Callable[[Column, Column], float], x: Column, y: Column, given: Column) -> float:
    """Correlation of x and y beyond what `given` says of both; all (n,)."""
    xy, xz, yz = correlation(x, y), correlation(x, given), correlation(y, given)
    rest = (1 - xz * xz) * (1 - yz * yz)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-12 else math.nan  # nan compares false


def less(correlation: Callable[[Column, Column], float], x: Column, y: Column, other: Column) -> float:
    """By how much x goes with y better than `other` does, (n,) each: bootstrapped, a paired comparison."""
    return correlation(x, y) - correlation(other, y)


def centred(values: Column, group: NDArray[np.int64]) -> Column:
    """`values` (n,) less the mean of those of the same group; `group` (n,) holds numbers from 0.

    Rounded to 1e-12 of the largest value: equal differences would else be ranked by the means' rounding.
    """
    if not len(values):
        return values
    means = np.bincount(group, weights=values) / np.maximum(np.bincount(group), 1)
    unit = max(float(np.abs(values).max()), 1e-300) * 1e-12
    return np.round((values - means[group]) / unit) * unit


def bootstrap(
    statistic: Callable[..., float | None],
    columns: Sequence[Column],
    group: NDArray[Any],
    resamples: int,
    seed: int,
) -> Interval:
    """95 % percentile interval of `statistic(*columns)` (None or nan: undefined), whole groups drawn with
    replacement.

    Args:
        columns: (n,) each. group: (n,) equal for observations that are drawn together.
    """
    names, inverse = np.unique(group, return_inverse=True)
    if not len(names):
        return Interval(math.nan, math.nan)
    members = np.split(np.argsort(inverse, kind="stable"), np.bincount(inverse).cumsum()[:-1])
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    found = np.empty(resamples)
    for i, drawn in enumerate(draws):
        rows = np.concatenate([members[g] for g in drawn])
        value = statistic(*(column[rows] for column in columns))
        found[i] = math.nan if value is None else value
    return percentile_interval(found)
