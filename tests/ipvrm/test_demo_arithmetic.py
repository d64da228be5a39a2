"""The demo's task: solutions are what they claim to be, and the verifier sees every kind of mistake."""

from random import Random

import pytest

from ipvrm.demo.arithmetic import (
    HIGHEST,
    LOWEST,
    SHIFTED_FORMATS,
    TRAINING_FORMAT,
    Problem,
    answer_of,
    first_wrong_step,
    make_problems,
    noisy_solution,
)

PROBLEM = Problem(47, (25, -13, 20))  # 47+25=72;72-13=59;59+20=79


def test_problem_text_and_answer():
    assert PROBLEM.text == "47+25-13+20" and PROBLEM.answer == 79


def test_noiseless_solutions_are_right_and_two_digit():
    rng = Random(0)
    for problem in make_problems(200, rng):
        response = noisy_solution(problem, 0.0, rng)
        steps = response.split(";")
        assert 3 <= len(steps) <= 6
        assert first_wrong_step(problem, steps) == -1 and answer_of(response) == problem.answer
        assert all(len(step) == 8 for step in steps)  # dd+dd=dd
        assert all(LOWEST <= int(step[-2:]) <= HIGHEST for step in steps)


def test_noise_corrupts_the_share_asked_for_and_keeps_two_digits():
    rng = Random(1)
    wrong = total = 0
    for problem in make_problems(2000, rng):
        for step in noisy_solution(problem, 0.08, rng).split(";"):
            assert len(step) == 8
            total += 1
            wrong += eval(step[:5]) != int(step[-2:])
    assert 0.07 < wrong / total < 0.085  # a few steps have no slip left


def test_first_wrong_step_on_noisy_solutions_agrees_with_the_arithmetic():
    rng = Random(2)
    seen = set()
    for problem in make_problems(500, rng):
        steps = noisy_solution(problem, 0.2, rng).split(";")
        bad = [i for i, step in enumerate(steps) if eval(step[:5]) != int(step[-2:])]
        assert first_wrong_step(problem, steps) == (bad[0] if bad else -1)
        seen.add(bad[0] if bad else -1)
    assert seen >= {-1, 0, 1, 2, 3}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("47+25=72;72-13=59;59+20=79", -1),
        ("47+25=73;73-13=60;60+20=80", 0),
        ("47+25=72;72-13=59;58+20=78", 2),  # goes on from another number
        ("47+25=72;72+13=85;85+20=105", 1),  # another operation
        ("47+25=72;72-13=59", 1),  # stops early
        ("47+25=72;72-13=59;59+20=79;79+10=89", 3),  # one too many
        ("47+25=72;7213=59;59+20=79", 1),  # not a step
        ("", 0),
    ],
)
def test_first_wrong_step(response, expected):
    assert first_wrong_step(PROBLEM, response.split(";")) == expected


def test_answer_is_the_last_number():
    assert answer_of("47+25=72;72-13=-59") == -59
    assert answer_of("47+25=72;") is None and answer_of("") is None and answer_of("47+25=72;9") is None


def test_formats_change_the_writing_only():
    steps = ["47+25=72", "72-13=59"]
    written = [f.separator.join(f.write(steps)) for f in (TRAINING_FORMAT, *SHIFTED_FORMATS)]
    assert written == ["47+25=72;72-13=59", "47+25 =72;72-13 =59", "47+25=72; 72-13=59"]


def test_problems_are_distinct_seeded_and_exclude():
    first = make_problems(100, Random(5))
    assert len(set(first)) == 100 and first == make_problems(100, Random(5))
    assert not set(make_problems(100, Random(5), frozenset(first))) & set(first)
