"""What a run logs of its losses: (sum, count) pairs that micro-batches and ranks add up, and AUC."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]


def stacked(metrics: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """(2 M,) sum and count of each of M metrics in turn, so that they add up as one tensor."""
    return torch.stack([value for name in names for value in metrics[name]])


def paired(values: Sequence[float], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The (sum, count) pairs of what `stacked` gave."""
    return dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))


class MetricSums:
    """Sums and counts of several updates, as plain numbers."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, pairs: Mapping[str, Sequence[float]]) -> None:
        """Adds (sum, count) pairs."""
        for name, (total, count) in pairs.items():
            old = self.values.get(name, [0.0, 0.0])
            self.values[name] = [old[0] + total, old[1] + count]

    def means(self, prefix: str = "") -> dict[str, float]:
        """sum / count of each metric; 0 where nothing was counted. Means over a class of responses
        (`value_right`) come with their `_count`, since a batch may have few of it, or none."""
        found = {}
        for name, (total, count) in self.values.items():
            found[prefix + name] = total / max(count, 1.0)
            if name.startswith("value_"):
                found[f"{prefix}{name}_count"] = count
        return found


def auc(scores: ArrayLike, outcome: ArrayLike) -> float | None:
    """Probability that a right observation scores above a wrong one, ties counted half.

    Args:
        scores: (n,) numbers. outcome: (n,) 1 (right) or 0 (wrong). Arrays, or tensors on the CPU.

    Returns: None where it is undefined: no right observation, or no wrong one.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(outcome) == 1
    above, wrong = values[right], np.sort(values[~right])
    if not len(above) or not len(wrong):
        return None
    below = np.searchsorted(wrong, above) + np.searchsorted(wrong, above, side="right")
    return float(below.sum()) / 2 / len(above) / len(wrong)
