"""Step boundaries and the four step scores, against hand-worked cases."""

import math

import pytest
import torch

from ipvrm import IpvrmError
from ipvrm.data.steps import (
    RULES,
    first_error,
    logit,
    render_steps,
    step_ends,
    step_of_token,
    step_scores,
    token_pieces,
)


def test_render_numbers_steps_from_one_and_counts_the_separator_in():
    text, ends = render_steps(["ab", "c"])
    assert text == "Step 1: ab\n\nStep 2: c"
    assert ends == [12, 21] and text[: ends[0]] == "Step 1: ab\n\n"


def test_render_keeps_braces_of_the_step_text():
    assert render_steps(["\\frac{1}{2}"], "{step}", "") == ("\\frac{1}{2}", [11])


@pytest.mark.parametrize("step_format", ["Step {i}", "{step} {n}", "{} {step}"])
def test_render_refuses_formats_that_lose_the_step(step_format):
    with pytest.raises(IpvrmError, match="step_format must contain"):
        render_steps(["a"], step_format)


@pytest.mark.parametrize("step_format", ["{step", "{step:d}", "{step!x}"])
def test_render_refuses_formats_that_cannot_be_filled(step_format):
    with pytest.raises(IpvrmError, match="is not a format string"):
        render_steps(["a"], step_format)


def test_render_refuses_no_steps():
    with pytest.raises(IpvrmError, match="at least one step"):
        render_steps([])


def test_a_token_belongs_to_the_step_in_which_it_ends():
    # steps "aa;" and "bb": the token (2, 4) is ";b" and ends in the second step; (1, 3) ends on the separator
    ends = [3, 5]
    offsets = [(0, 1), (1, 3), (2, 4), (4, 5), (-1, -1)]
    assert step_of_token(offsets, ends).tolist() == [0, 0, 1, 1, -1]


def test_token_that_starts_the_next_step_is_not_pulled_back():
    # the released code ends a step two tokens inside the next one
    assert step_of_token([(0, 3), (3, 4), (4, 5)], [3, 5]).tolist() == [0, 1, 1]


def test_tokens_of_no_characters_and_outside_the_text():
    assert step_of_token([(0, 0), (3, 3), (5, 6)], [3, 5]).tolist() == [0, 0, -1]


def test_last_token_of_each_step():
    steps = torch.tensor([-1, 0, 0, 2, -1])
    assert step_ends(steps, 4).tolist() == [2, 2, 3, 3]
    assert step_ends(torch.tensor([-1, 1]), 2).tolist() == [-1, 1]


def test_four_rules_by_hand():
    # beta 2; l = .5 | -1 .25 | 1, and an end-of-turn token of 7 that no step may count
    log_ratio = torch.tensor([0.5, -1.0, 0.25, 1.0, 7.0])
    steps = torch.tensor([0, 1, 1, 2, -1])
    got = {rule: step_scores(log_ratio, steps, 2.0, rule).tolist() for rule in RULES}
    assert got["step"] == [1.0, -1.5, 2.0]
    assert got["prefix"] == [1.0, -0.5, 1.5]  # V after tokens 1, 3, 4
    assert got["mean"] == pytest.approx([1.0, -0.5 / 3, 1.5 / 4])
    assert got["mean_diff"] == [1.0, -1.5 / 2, 2.0]  # per token of the step


def test_preamble_counts_in_the_value_and_in_no_step():
    log_ratio, steps = torch.tensor([3.0, 1.0]), torch.tensor([-1, 0])
    assert step_scores(log_ratio, steps, 1.0, "step").tolist() == [1.0]
    assert step_scores(log_ratio, steps, 1.0, "prefix").tolist() == [4.0]
    assert step_scores(log_ratio, steps, 1.0, "mean").tolist() == [2.0]


def test_a_step_without_tokens_is_neutral():
    log_ratio, steps = torch.tensor([1.0, 2.0]), torch.tensor([0, 2])
    assert step_scores(log_ratio, steps, 1.0, "step", num_steps=4).tolist() == [1.0, 0.0, 2.0, 0.0]
    assert step_scores(log_ratio, steps, 1.0, "prefix", num_steps=4).tolist() == [1.0, 1.0, 3.0, 3.0]
    assert step_scores(log_ratio, steps, 1.0, "mean_diff", num_steps=4).tolist() == [1.0, 0.0, 2.0, 0.0]


def test_rules_are_consistent_on_random_input():
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(50, generator=generator, dtype=torch.float64)
    steps = torch.sort(torch.randint(0, 6, (50,), generator=generator)).values
    scores = {rule: step_scores(log_ratio, steps, 3.0, rule, num_steps=6) for rule in RULES}
    torch.testing.assert_close(scores["step"].cumsum(0), scores["prefix"])
    torch.testing.assert_close(scores["mean_diff"] * torch.bincount(steps, minlength=6), scores["step"])
    torch.testing.assert_close(scores["mean"] * (step_ends(steps, 6) + 1), scores["prefix"])
    assert scores["step"].dtype == torch.float64


def test_step_scores_say_what_is_wrong():
    with pytest.raises(ValueError, match="one of step, prefix, mean, mean_diff; got 'sum'"):
        step_scores(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 1.0, "sum")
    with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\)"):
        step_scores(torch.zeros(2), torch.zeros(1, dtype=torch.int64), 1.0)


def test_first_error_is_strict_and_first():
    assert first_error([1.0, 0.0, -1.0, -2.0], 0.5) == 2  # sigmoid(0) = 0.5 is not below 0.5
    assert first_error([1.0, 0.0], 0.5) == -1
    assert first_error([-800.0], 0.0) == -1 and first_error([100.0, 200.0], 1.0) == 0
    assert first_error([]) == -1
    assert first_error([1.0, -math.inf]) == 1 and first_error([math.inf]) == -1
    with pytest.raises(ValueError, match=r"scores must be numbers; got \[1.0, nan\]"):
        first_error([1.0, math.nan])


def test_logit_inverts_the_sigmoid():
    assert logit(1 / (1 + math.exp(-1.25))) == pytest.approx(1.25)
    with pytest.raises(ValueError, match="lie in"):
        logit(1.5)


def test_token_pieces_join_to_the_text_and_a_split_character_belongs_to_the_last():
    text, end = "né 漢\r\n.", (-1, -1)
    offsets = [
        (0, 2),
        (1, 2),
        (2, 4),
        (3, 4),
        (3, 4),
        (4, 6),
        (6, 6),
        (6, 7),
        end,
    ]  # é and 漢 in 2 and 3 parts
    pieces = token_pieces(text, offsets, ["?"] * 8 + ["<end>"])
    assert pieces == ("n", "é", " ", "", "漢", "\r\n", "", ".", "<end>")
    trimmed = [(0, 1), (2, 3), (5, 6)]  # a tokenizer whose offsets leave blanks out
    assert token_pieces("a b  c ", trimmed, [""] * 3) == ("a", " b", "  c ")
    assert token_pieces("a", [end, (0, 1)], ["<s>", "?"]) == ("<s>", "a")
