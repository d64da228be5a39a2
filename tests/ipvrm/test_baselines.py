"""PRIME and SPRO against loops over padded rows, written from their formulas, and worked cases."""

import pytest
import torch
from oracles import edges

from ipvrm.losses.baselines import (
    per_token,
    prime_advantages,
    reinforce_qrm_advantages,
    spro_advantages,
)


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), generator=generator), edges(lengths)


OUTCOME = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
GROUP = torch.tensor([1, 0, 1, 0, 1])  # in any order
LENGTHS = [3, 5, 1, 2, 4]


def test_reinforce_with_q_rm_by_hand():
    """1, 2, 6: mean 3, population std sqrt(14 / 3); divided, not centred."""
    found = reinforce_qrm_advantages(torch.tensor([1.0, 2.0, 6.0]))
    assert found.tolist() == pytest.approx([x / (14 / 3) ** 0.5 for x in (1, 2, 6)], rel=1e-5)
    assert reinforce_qrm_advantages(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_prime_is_leave_one_out_on_both_rewards_then_whitened(batch_norm):
    rewards, edges = batch(LENGTHS)
    rows = [row.clone() for row in rewards.split(LENGTHS)]
    for row in rows:
        row[-1] = 0.0
    if batch_norm:
        largest = max(float(row[t:].sum().abs()) for row in rows for t in range(len(row)))
        rows = [row / (largest + 1e-6) for row in rows]
    returns = []
    for b, row in enumerate(rows):
        others = [k for k in range(5) if GROUP[k] == GROUP[b] and k != b]
        n = len(others) + 1
        means = [rows[k].mean() for k in (*others, b)]
        process = row * n / (n - 1) - sum(means) / (n - 1)
        outcome = OUTCOME[b] - torch.stack([OUTCOME[k] for k in others]).mean()
        assert outcome == pytest.approx(
            float(OUTCOME[b] * n / (n - 1) - sum(OUTCOME[k] for k in (*others, b)) / (n - 1))
        )
        process[-1] += outcome
        returns.append(process.flip(0).cumsum(0).flip(0))
    whole = torch.cat(returns)
    want = (whole - whole.mean()) / (whole.var(correction=1) + 1e-8).sqrt()
    got = prime_advantages(rewards, OUTCOME, edges, GROUP, 2, batch_norm=batch_norm)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prime_by_hand():
    """Two responses of one prompt: r = (2, 1, 9) right, (1, 9) wrong. The 9s count nothing; the largest
    return is 3, so r = (2/3, 1/3, 0), (1/3, 0) with means 1/3 and 1/6, process = 2 r - 1/2, outcome 1 and -1.
    Rewards (5/6, 1/6, 1/2), (1/6, -3/2); returns (3/2, 2/3, 1/2), (-4/3, -3/2), whitened over the five."""
    edges = torch.tensor([0, 3, 5], dtype=torch.int32)
    got = prime_advantages(
        torch.tensor([2.0, 1.0, 9.0, 1.0, 9.0]), torch.tensor([1.0, 0.0]), edges, torch.tensor([0, 0]), 1
    )
    returns = torch.tensor([3 / 2, 2 / 3, 1 / 2, -4 / 3, -3 / 2])
    want = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prime_does_not_depend_on_the_scale_of_its_rewards():
    """Under batch_norm beta says nothing: process and outcome keep their weights."""
    rewards, edges = batch(LENGTHS)
    got = [prime_advantages(scale * rewards, OUTCOME, edges, GROUP, 2) for scale in (1.0, 100.0)]
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("floor", ["add", "clamp"])
def test_spro_takes_the_mean_of_those_that_are_alive(floor):
    log_ratio, edges = batch(LENGTHS, seed=1)
    rows = [(0.5 * row).cumsum(0) for row in log_ratio.split(LENGTHS)]
    want = []
    for b, row in enumerate(rows):
        members = [k for k in range(5) if GROUP[k] == GROUP[b]]
        outcomes = torch.stack([OUTCOME[k] for k in members])
        std = outcomes.std(correction=0)
        first = (OUTCOME[b] - outcomes.mean()) / (std + 1e-6 if floor == "add" else std.clamp(min=1e-6))
        for t, cumulative in enumerate(row):
            alive = torch.stack([rows[k][t] for k in members if len(rows[k]) > t])
            want.append(cumulative - alive.mean() + first)
    got = spro_advantages(log_ratio, OUTCOME, edges, GROUP, 2, beta=0.5, std_floor=floor)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)


def test_spro_starts_as_grpo():
    """The policy that samples first is the starting policy: its own process reward is 0."""
    edges = torch.tensor([0, 3, 5], dtype=torch.int32)
    outcome, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    got = spro_advantages(torch.zeros(5), outcome, edges, group, 1, beta=0.05)
    torch.testing.assert_close(got, torch.tensor([1.0, 1, 1, -1, -1]), rtol=1e-5, atol=1e-5)


def test_per_token():
    edges = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert per_token(torch.tensor([1, 2, 3]), edges).tolist() == [1, 1, 3, 3, 3]
