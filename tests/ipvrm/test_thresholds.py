"""The exact sweep against trying every threshold, the golden vectors, intervals and baselines."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, PROCESSBENCH
from runs import released_scores

from ipvrm.data.steps import first_error
from ipvrm.evaluate.thresholds import (
    Interval,
    Threshold,
    bootstrap_difference,
    bootstrap_f1,
    f1_of_hits,
    f1_report,
    hits,
    percentile_interval,
    predict,
    score_threshold,
    sweep,
    trivial_baselines,
)


def f1_at(scores, labels, threshold_score):
    """The definition, one item at a time."""
    correct = [predict(s, threshold_score) == -1 for s, k in zip(scores, labels, strict=True) if k == -1]
    erroneous = [predict(s, threshold_score) == k for s, k in zip(scores, labels, strict=True) if k != -1]
    a, b = sum(correct) / len(correct), sum(erroneous) / len(erroneous)
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def every_threshold(scores):
    distinct = sorted({float(x) for s in scores for x in s})
    return [-math.inf, *distinct, math.inf]


@st.composite
def items(draw):
    # few distinct values, so that ties within and between items are the rule
    value = st.integers(-3, 3).map(lambda x: x / 2)
    scores = draw(st.lists(st.lists(value, min_size=1, max_size=5), min_size=2, max_size=8))
    labels = [draw(st.integers(-1, len(s) - 1)) for s in scores]
    labels[0], labels[1] = -1, draw(st.integers(0, len(scores[1]) - 1))
    return scores, labels


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(items())
def test_sweep_equals_trying_every_threshold(case):
    scores, labels = case
    threshold, best = sweep(scores, labels)
    brute = [f1_at(scores, labels, t) for t in every_threshold(scores)]
    assert best.f1 == pytest.approx(max(brute), abs=1e-12)
    # the threshold returned really has that F1, and no lower one reaches it
    assert f1_at(scores, labels, threshold.score) == pytest.approx(best.f1, abs=1e-12)
    lower = [f for t, f in zip(every_threshold(scores), brute, strict=True) if t <= threshold.score - 0.25]
    assert all(f < best.f1 - 1e-12 for f in lower) or best.f1 == 0.0


def test_sweep_at_scale_matches_brute_force_on_continuous_scores():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=rng.integers(1, 9)).astype(np.float32) for _ in range(60)]
    labels = [int(rng.integers(-1, len(s))) for s in scores]
    threshold, best = sweep(scores, labels)
    assert best.f1 == pytest.approx(max(f1_at(scores, labels, t) for t in every_threshold(scores)), abs=1e-12)
    assert f1_of_hits(hits(scores, labels, threshold.score), labels) == pytest.approx(best, abs=1e-12)


def test_sweep_by_hand():
    # correct item hit for t <= 1; first error 1 hit for -2 < t <= 0; so (-2, 0] hits both, its middle is -1
    threshold, best = sweep([[2.0, 1.0], [0.0, -2.0]], [-1, 1])
    assert best == (1.0, 1.0, 1.0)
    assert threshold.score == -1.0 and threshold.tau == pytest.approx(1 / (1 + math.e))


def test_sweep_separates_scores_whose_sigmoids_are_equal():
    threshold, best = sweep([[100.0], [90.0]], [-1, 0])
    assert best.f1 == 1.0 and threshold.score == 95.0


def test_sweep_between_neighbouring_doubles_keeps_its_f1():
    low, high = 1.0, float(np.nextafter(1.0, 2.0))
    threshold, best = sweep([[high], [low]], [-1, 0])
    assert best.f1 == 1.0 and f1_at([[high], [low]], [-1, 0], threshold.score) == 1.0


def test_all_scores_equal_can_only_flag_all_or_nothing():
    _, best = sweep([[0.0, 0.0], [0.0, 0.0]], [-1, 0])
    assert best.f1 == 0.0


def test_an_item_without_scores_is_always_wrong():
    scores, labels = [[1.0], None, [-1.0], None], [-1, -1, 0, 0]
    threshold, best = sweep(scores, labels)
    assert best == (0.5, 0.5, 0.5)
    assert hits(scores, labels, threshold.score).tolist() == [True, False, True, False]


def test_errors_name_the_item():
    with pytest.raises(ValueError, match="item 1 has label 2 and 1 steps"):
        sweep([[0.0], [0.0]], [-1, 2])
    with pytest.raises(ValueError, match="item 0 has"):
        sweep([[math.nan], [0.0]], [-1, 0])
    with pytest.raises(ValueError, match="got 0 erroneous and 1 correct"):
        sweep([[0.0]], [-1])
    with pytest.raises(ValueError, match="2 items and 1 labels"):
        hits([[0.0], [0.0]], [-1], 0.0)


def test_predictions_agree_with_the_probability_form():
    scores = [0.3, -0.2, -1.0]
    for tau in (0.1, 0.4, 0.5, 0.9):
        assert predict(scores, math.log(tau / (1 - tau))) == first_error(scores, tau)


def test_threshold_holds_the_sigmoid_without_overflow():
    assert Threshold.at(0.0).tau == 0.5
    assert (Threshold.at(-math.inf).tau, Threshold.at(math.inf).tau) == (0.0, 1.0)
    assert 0 < Threshold.at(-700.0).tau < 1e-300


@pytest.mark.skipif(not PROCESSBENCH, reason=f"no processbench_*.json in {GOLDEN}")
@pytest.mark.parametrize("path", PROCESSBENCH, ids=lambda p: p.stem)
def test_golden_processbench(path):
    data = json.loads(path.read_text())
    labels = [item["label"] for item in data["items"]]
    assert data["expected"]
    for rule, expected in data["expected"].items():
        scores = [released_scores(item)[rule] for item in data["items"]]
        tau = expected["threshold"]
        hit = hits(scores, labels, math.log(tau / (1 - tau)))
        assert f1_of_hits(hit, labels).f1 == pytest.approx(expected["f1"], abs=1e-9), rule
        threshold, best = sweep(scores, labels)
        assert best.f1 >= expected["f1"] - 1e-12, rule
        assert f1_of_hits(hits(scores, labels, threshold.score), labels).f1 == pytest.approx(best.f1), rule


def test_bootstrap_covers_the_estimate_and_shrinks_with_items():
    rng = np.random.default_rng(1)
    labels = np.where(rng.random(400) < 0.5, -1, 0)
    hit = rng.random(400) < 0.7
    f1 = f1_of_hits(hit, labels).f1
    small = bootstrap_f1(hit[:100], labels[:100])
    large = bootstrap_f1(hit, labels)
    assert large.low < f1 < large.high
    # half of four times the items
    assert (large.high - large.low) == pytest.approx((small.high - small.low) / 2, rel=0.3)
    assert bootstrap_f1(hit, labels, seed=3) == bootstrap_f1(hit, labels, seed=3)


def test_bootstrap_spread_matches_redrawing_items_one_by_one():
    rng = np.random.default_rng(2)
    labels = np.where(rng.random(80) < 0.4, -1, 0)
    hit = rng.random(80) < 0.6
    redrawn = []
    for _ in range(2000):
        index = rng.integers(0, 80, 80)
        redrawn.append(f1_of_hits(hit[index], labels[index]).f1)
    expected = percentile_interval(np.array(redrawn))
    assert bootstrap_f1(hit, labels) == pytest.approx(expected, abs=0.02)


def test_paired_difference_matches_redrawing_items_one_by_one():
    rng = np.random.default_rng(4)
    labels = np.where(rng.random(120) < 0.4, -1, 0)
    hit_a = rng.random(120) < 0.7
    hit_b = np.where(rng.random(120) < 0.8, hit_a, rng.random(120) < 0.3)  # largely the same items
    redrawn = []
    for _ in range(2000):
        index = rng.integers(0, 120, 120)
        pair = [f1_of_hits(hit[index], labels[index]).f1 for hit in (hit_a, hit_b)]
        redrawn.append(pair[0] - pair[1])
    expected = percentile_interval(np.array(redrawn))
    assert bootstrap_difference(hit_a, hit_b, labels) == pytest.approx(expected, abs=0.02)
    assert bootstrap_difference(hit_a, hit_a, labels) == (0.0, 0.0)


def test_report_survives_json():
    report = f1_report([[1.0], [0.0]], [-1, -1], Threshold.at(-math.inf), resamples=10)
    assert report["f1"] is None and report["accuracy_correct"] == 1.0 and report["score_threshold"] is None
    assert score_threshold(json.loads(json.dumps(report, allow_nan=False))) == -math.inf


def test_intervals_overlap():
    assert Interval(0.0, 0.5).overlaps(Interval(0.5, 1.0))
    assert not Interval(0.0, 0.4).overlaps(Interval(0.5, 1.0))


def test_trivial_baselines_by_hand():
    # erroneous labels 1, 1, 0 on 3 steps; one correct of 1 step
    baselines = trivial_baselines([1, 1, 0, -1], [3, 3, 3, 1])
    assert baselines["always_none"] == (0.0, 0.0, 1.0)
    assert baselines["random_step"] == pytest.approx((2 * 0.25 * 0.5 / 0.75, 0.25, 0.5))
    q = 2 / 3
    grid = [2 * p * (1 - p) * q / (p + (1 - p) * q) for p in np.linspace(0.001, 0.999, 999)]
    assert baselines["best_constant"].f1 == pytest.approx(max(grid), abs=1e-5)
    assert baselines["best_constant"].f1 == pytest.approx(2 * q / (1 + math.sqrt(q)) ** 2)
