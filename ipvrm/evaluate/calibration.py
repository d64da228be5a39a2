"""Calibration of a probability against outcomes: reliability, expected calibration error, Brier score.

Brier = mean (p - r)^2           ECE = sum_b n_b / n |mean p - mean r| over the bins b of equal width
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def calibration(probabilities: Sequence[float], outcomes: Sequence[int], bins: int = 10) -> dict[str, Any]:
    """Of n predictions, for results.json.

    Args:
        probabilities: (n,) in [0, 1]. outcomes: (n,) 0 or 1.
        bins: of equal width over [0, 1]; a probability on an edge belongs to the bin above it, 1 to the last.

    Returns: `count`, `outcome` (the share of right ones), `probability` (the mean), `brier`, `ece`, and in
        `reliability` for every bin that is not empty `low`, `high`, `count`, `probability`, `outcome`. The
        means are None where n = 0.

    Raises:
        ValueError: differing lengths, or a value out of range.
    """
    p, r = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if p.shape != r.shape or p.ndim != 1:
        raise ValueError(f"calibration: one outcome per probability; got {p.shape} and {r.shape}")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(r, (0, 1)).all():
        raise ValueError("calibration: probabilities must lie in [0, 1] and outcomes be 0 or 1")
    if not len(p):
        return {
            "count": 0,
            "outcome": None,
            "probability": None,
            "brier": None,
            "ece": None,
            "reliability": [],
        }
    of_bin = np.minimum((p * bins).astype(np.int64), bins - 1)
    reliability = [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int((of_bin == b).sum()),
            "probability": float(p[of_bin == b].mean()),
            "outcome": float(r[of_bin == b].mean()),
        }
        for b in sorted(set(of_bin.tolist()))
    ]
    return {
        "count": len(p),
        "outcome": float(r.mean()),
        "probability": float(p.mean()),
        "brier": float(((p - r) ** 2).mean()),
        "ece": sum(b["count"] * abs(b["probability"] - b["outcome"]) for b in reliability) / len(p),
        "reliability": reliability,
    }
