"""Best-of-N against enumerating every subset."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from ipvrm.evaluate.best_of_n import (
    Samples,
    best_of_n,
    expected_pick,
    majority_vote,
    pass_at_n,
    response_scores,
)


def random_problem(rng, m, levels):
    scores = rng.integers(0, levels, m).astype(float)
    correct = rng.random(m) < 0.4
    return scores, correct


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_pick_equals_enumeration(levels, n):
    rng = np.random.default_rng(n * levels)
    scores, correct = random_problem(rng, 7, levels)
    expected = []
    for subset in itertools.combinations(range(7), n):
        best = max(scores[list(subset)])
        expected.append(np.mean([correct[i] for i in subset if scores[i] == best]))
    assert expected_pick(scores, correct, n) == pytest.approx(np.mean(expected), abs=1e-12)


def test_pick_prefers_the_higher_score():
    assert expected_pick([0.0, 1.0], [False, True], 2) == 1.0
    assert expected_pick([0.0, 1.0], [True, False], 2) == 0.0
    assert expected_pick([-math.inf, 1.0], [False, True], 2) == 1.0


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_n_equals_enumeration(n):
    correct = [True, False, False, True, False]
    subsets = list(itertools.combinations(range(5), n))
    assert pass_at_n(correct, n) == pytest.approx(np.mean([any(correct[i] for i in s) for s in subsets]))


def test_majority_vote_by_hand():
    # of the three pairs only (7, 7) decides; the two ties are right half of the time
    assert majority_vote([7, 7, 8], [True, True, False], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_vote([7, 7, 8], [True, True, False], 3) == 1.0
    assert majority_vote([7, 8, 8], [True, False, False], 3) == 0.0


def test_responses_without_an_answer_do_not_vote():
    assert majority_vote([None, None, 3], [False, False, True], 3) == 1.0
    assert majority_vote([None, None], [False, False], 2) == 0.0


@pytest.mark.parametrize("seed", range(12))
def test_majority_vote_equals_enumeration(seed):
    """Few answers and many, with ties; some responses have none, and several answers are right."""
    rng = np.random.default_rng(seed)
    m, kinds = int(rng.integers(5, 11)), int(rng.integers(1, 7))
    answers = [None if a == kinds else int(a) for a in rng.integers(0, kinds + 1, m)]
    correct = [a is not None and a % 3 == 0 for a in answers]
    for n in range(1, m + 1):
        expected = []
        for subset in itertools.combinations(answers, n):
            votes = Counter(a for a in subset if a is not None)
            winners = [a for a in votes if votes[a] == max(votes.values())]
            expected.append(np.mean([a % 3 == 0 for a in winners]) if winners else 0.0)
        assert majority_vote(answers, correct, n) == pytest.approx(np.mean(expected), abs=1e-12)


def test_majority_vote_of_as_many_as_the_paper_samples():
    """No subset of C(64, 4) or C(64, 16) is drawn: the same in any order, and one half where right and wrong
    answers are alike."""
    answers = [*[1] * 20, *[2] * 20, *[3] * 8, *[4] * 8, *range(10, 18)]
    correct = [a in (1, 3) or a % 2 == 0 and a >= 10 for a in answers]
    for n in (4, 16):
        found = majority_vote(answers, correct, n)
        assert found == majority_vote(answers[::-1], correct[::-1], n) == 0.5
    # one of the four right among four different answers wins a quarter, two or more of them all
    ways = 4 * math.comb(60, 3) / 4 + math.comb(4, 2) * math.comb(60, 2) + 4 * 60 + 1
    found = majority_vote([0] * 4 + list(range(1, 61)), [True] * 4 + [False] * 60, 4)
    assert found == pytest.approx(ways / math.comb(64, 4), abs=1e-15)


def test_scores_of_a_response():
    # two steps of scores 1 and -3 and an end-of-turn token of .5 (beta 2)
    scores = response_scores(torch.tensor([0.5, -1.0, -0.5, 0.25]), torch.tensor([0, 1, 1, -1]), 2.0, 2)
    assert scores == {"final": -1.5 / 4, "sum": -1.5, "mean": -1.0, "min": -3.0}
    with pytest.raises(ValueError, match="0 tokens"):
        response_scores(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0, 1)


def test_table_of_methods():
    problems = [
        Samples(answers=[1, 2], correct=[True, False], scores={"good": [1.0, 0.0], "bad": [0.0, 1.0]}),
        Samples(answers=[5, 5], correct=[False, False], scores={"good": [1.0, 0.0], "bad": [0.0, 1.0]}),
    ]
    rows = {(r.method, r.n): r for r in best_of_n(problems, [1, 2])}
    assert [r.method for r in best_of_n(problems, [1])] == [
        "one_sample", "good", "bad", "majority_vote", "pass_at_n",
    ]  # fmt: skip
    assert {m: rows[m, 2].accuracy for m, n in rows if n == 2} == {
        "one_sample": 0.25, "good": 0.5, "bad": 0.0, "majority_vote": 0.25, "pass_at_n": 0.5,
    }  # fmt: skip
    assert all(rows[m, 1].accuracy == 0.25 for m, n in rows if n == 1)
    assert rows["good", 2].interval == (0.0, 1.0) and rows["good", 2].num_problems == 2


def test_interval_has_the_width_of_the_binomial():
    rng = np.random.default_rng(0)
    problems = [Samples([1], [bool(rng.random() < 0.5)], {"s": [0.0]}) for _ in range(400)]
    row = best_of_n(problems, [1])[0]
    width = row.interval.high - row.interval.low
    assert width == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)
    assert row.interval.low < row.accuracy < row.interval.high


def test_more_than_there_is_cannot_be_drawn():
    with pytest.raises(ValueError, match="got N=3 of 2 samples"):
        pass_at_n([True, False], 3)
    with pytest.raises(ValueError, match="same scores"):
        best_of_n([Samples([1], [True], {"a": [0.0]}), Samples([1], [True], {"b": [0.0]})], [1])
    with pytest.raises(ValueError, match="nan"):
        expected_pick([math.nan], [True], 1)
