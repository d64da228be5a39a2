"""The users' guide's list of what no preset reproduces: its numbers are those of the results file, and
that is what the study finds."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import release_differences as study

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "ipvrm" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found():
    return json.loads(study.RESULTS.read_text(encoding="utf-8"))


def said(found):
    """The sentences of the guide's table that hold a number."""
    think, micro, lr = found["think_tokens"], found["micro_batches"], found["schedule"]
    steps, grid, rows = found["step_boundaries"], found["thresholds"], found["over_long"]
    share, others, distance = (
        think[name]["median"]
        for name in (
            "share_of_tokens",
            "share_of_squared_gradient_on_the_others",
            "gradient_distance_on_shared_tokens",
        )
    )
    front, behind = ([*map(int, think[name])] for name in ("tokens_in_front", "tokens_behind"))
    assert len(front) == len(behind) == 1
    inner = {int(k): v for k, v in steps["tokens_behind_inner"].items()}
    assert set(inner) == {1, 2}
    lost, heads = grid["f1_points_lost"], found["value_heads"]
    return [
        f"begins with the {front[0]} tokens",
        f"is taken over micro-batches of {study.MICRO}, then averaged",
        f"the cosine is run through {study.ACCUMULATION} times as fast",
        f"offline rows above {study.MAX_LENGTH:,} tokens",
        f"{front[0] + behind[0]} tokens, {100 * share:.1f} % of a response's (median)",
        f"{100 * others:.0f} % of the squared gradient",
        f"the gradient at the others is {100 * distance:.0f} % off",
        f"log-probs {100 * micro['gradient_distance']['median']:.0f} % off (median of {study.DRAWS} draws of "
        f"{micro['minibatch']:,} responses)",
        f"the learning rate is {100 * lr['mean_distance']:.0f} % off on average, peaks {lr['peaks']} times "
        f"and ends at {lr['last']['once_per_micro_batch']:.2f} of its peak",
        f"{rows['prompt_cut']} + {rows['prompt_lost']} of {rows['rows']:,} rows (prompt cut + lost)",
        f"of {steps['inner_steps']:,} inner step ends, {100 * inner[2] / steps['inner_steps']:.0f} % lie two",
        f"F1 {lost['mean']:.1f} points lower on average, at most {lost['max']:.1f} ({grid['item_sets']} sets",
        f"in the released rollouts all {found['selected']['half_right']} prompts are half right, half wrong",
        f"at most {found['offline_gradient']['distance']:.0e} of it off".replace("e-0", "e-"),
        f"{found['time_outs']['above_one_second']} of {found['time_outs']['responses']} boxed responses take "
        "more than 1 s of CPU time",
        f"first gradient is {100 * heads['gradient_distance']['median']:.0f} % off (median of the "
        f"{heads['pairs']} shortest pairs)",
        f"the values it learns there correlate by {heads['value_correlation']:.2f} with",
        f"the {think['rows']:,} rollouts and {steps['solutions']:,} ProcessBench solutions",
    ]


def test_the_guide_says_what_the_file_says(found):
    missing = [sentence for sentence in said(found) if sentence not in GUIDE]
    assert not missing
    parts = [part["machine"] for part in found.values() if "machine" in part]
    assert not any(machine["modified"] for machine in [found["machine"], *parts])
    assert found["selected"]["half_right"] == found["selected"]["prompts"]


def test_what_needs_no_data_is_found_again(found):
    """The schedule to the last digit; the grid on the golden files that are in the repository."""
    assert study.schedule() == found["schedule"]
    files = sorted(study.GOLDEN.glob("processbench_*.json"))
    again = study.thresholds(files)
    assert again.pop("f1_points_lost") == pytest.approx(found["thresholds"]["f1_points_lost"])
    assert again == {k: v for k, v in found["thresholds"].items() if k != "f1_points_lost"}


def test_micro_batches_of_equal_lengths_make_no_difference():
    labels = [0, 1, 1, 0]
    assert study.micro_batches([7, 7, 7, 7], labels)["gradient_distance"]["p95"] < 1e-12
    # lengths of 1 and 3 in pairs of a mean of 2: of 8 draws the sums vary by sqrt(8) * 1, of a mean of 16
    apart = study.micro_batches([1, 3, 1, 3], labels)["gradient_distance"]["median"]
    assert apart == pytest.approx(8**0.5 / 16, rel=0.1)


def test_the_gradient_at_the_start():
    """All log-ratios 0: beta / 2 of the mean over t >= j of 1 / t, towards the label."""
    got = study.start_gradient(3, 1)
    want = [-5 * (1 + 1 / 2 + 1 / 3) / 3, -5 * (1 / 2 + 1 / 3) / 3, -5 / 3 / 3]
    assert got.tolist() == pytest.approx(want, rel=1e-5)
    assert study.start_gradient(3, 0).tolist() == pytest.approx([-x for x in want], rel=1e-5)


def test_values_of_states():
    """Two responses of two tokens whose states are scalars: the head of one step is the difference of the
    mean states before the tokens."""
    before, after = ([torch.tensor([[x], [y]], dtype=torch.float64) for x, y in of] for of in (
        ((1.0, 2.0), (0.0, 1.0)),
        ((2.0, 5.0), (1.0, 0.0)),
    ))  # fmt: skip
    found = study.value_heads([((before[0], after[0]), (before[1], after[1]))])
    assert found["gradient_distance"]["median"] == pytest.approx((3.5 - 0.5 - 1) / 3)
    moved = torch.tensor([1.0, 3, 1, -1]).std() / torch.tensor([1.0, 2, 0, 1]).std()
    assert found["value_distance"] == pytest.approx(float(moved)) and found["tokens"] == 4
    same = study.value_heads([((before[0], before[0]), (before[1], before[1]))])
    assert same["gradient_distance"]["p95"] == same["value_distance"] == 0
    assert same["value_correlation"] == pytest.approx(1)


def test_the_shortest_pairs():
    def response(prompt, length, label):
        return study.Response((prompt, *range(length)), 1, label)

    long, short, wrong = response(7, 3, 1), response(7, 2, 1), response(7, 4, 0)
    assert study.shortest_pairs([long, wrong, short, response(8, 1, 1)]) == [(short, wrong)]
    first = response(9, 1, 1), response(9, 1, 0)
    assert study.shortest_pairs([long, wrong, *first]) == [first, (long, wrong)]
