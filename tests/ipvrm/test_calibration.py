"""Calibration by hand."""

import pytest

from ipvrm.evaluate.calibration import calibration


def test_by_hand():
    # quarters: .1 and .2 (one right), .5 (right; an edge belongs to the bin above), .9 and 1 (one right)
    found = calibration([0.1, 0.2, 0.5, 0.9, 1.0], [0, 1, 1, 0, 1], bins=4)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.25 + 0.81 + 0.0) / 5)
    assert [(b["low"], b["count"]) for b in found["reliability"]] == [(0.0, 2), (0.5, 1), (0.75, 2)]
    assert [b["outcome"] for b in found["reliability"]] == [0.5, 1.0, 0.5]
    assert found["ece"] == pytest.approx((2 * abs(0.15 - 0.5) + 1 * 0.5 + 2 * abs(0.95 - 0.5)) / 5)
    assert (found["count"], found["outcome"]) == (5, 0.6) and found["probability"] == pytest.approx(0.54)


def test_a_perfect_and_an_empty_one():
    assert calibration([0.0, 1.0, 1.0], [0, 1, 1])["ece"] == calibration([0.0, 1.0], [0, 1])["brier"] == 0.0
    assert calibration([], []) | {"reliability": 0} == {
        "count": 0, "outcome": None, "probability": None, "brier": None, "ece": None, "reliability": 0,
    }  # fmt: skip


def test_errors():
    with pytest.raises(ValueError, match="one outcome per probability"):
        calibration([0.5], [])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        calibration([1.5], [1])
    with pytest.raises(ValueError, match="outcomes be 0 or 1"):
        calibration([0.5], [2])
