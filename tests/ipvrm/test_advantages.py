"""Advantages: by hand, against plain Python in fp64, independent of order and of the split over ranks."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import edges

import ipvrm
from ipvrm import (
    AdvantageConfig,
    IpvrmError,
    distrl_advantages,
    gae,
    online_balance,
    outcome_advantages,
    temporal_difference,
    whiten,
)
from ipvrm.losses import advantages, prompt_groups
from ipvrm_kernels import segment_scan

PAPER, RELEASE = AdvantageConfig.preset("paper"), AdvantageConfig.preset("release")
CONFIGS = {
    "paper": PAPER,
    "release": RELEASE,
    "discounted": replace(PAPER, discount=0.99, lam=0.9, gae_coef=0.3),
    "mixed": replace(RELEASE, gae_moments="group", lam=0.5),
    "not whitened": replace(RELEASE, whiten=False),
}


class Rollouts:
    """A random rollout batch: ragged, prompts in any order, empty and one-token responses, unanimous prompts,
    prompts of a single rollout and of none."""

    def __init__(self, seed=0, B=40, G=9, K=4, longest=50):
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(1, longest, B)
        self.lengths[rng.permutation(B)[:8]] = [0, 0, 1, 1, 1, 2, 2, 0]
        self.group = torch.tensor([*rng.integers(0, G - 2, B - 1), G - 2])  # the last but one has one rollout
        self.num_groups = G
        self.outcome = torch.tensor(rng.integers(0, 2, B), dtype=torch.float32)
        self.outcome[self.group == 0], self.outcome[self.group == 1] = 0.0, 1.0
        self.cu_seqlens = edges(self.lengths)
        N = int(self.cu_seqlens[-1])
        self.td = torch.tensor(rng.normal(0.3, 2.0, N), dtype=torch.float32)
        self.candidate_td = torch.tensor(rng.normal(0, 2.0, (N, K)), dtype=torch.float32)
        self.candidate_td[torch.tensor(rng.random((N, K)) < 0.5)] = 0.0
        last = self.cu_seqlens[1:][self.cu_seqlens.diff() > 0].long() - 1
        self.td[last], self.candidate_td[last] = 0.0, 0.0

    def arguments(self):
        return (self.td, self.candidate_td, self.outcome, self.cu_seqlens, self.group, self.num_groups)

    def selected(self, sequences):
        """The same batch with these sequences only, in this order; also the rows of their tokens."""
        rows = torch.cat(
            [torch.arange(self.cu_seqlens[b], self.cu_seqlens[b + 1]) for b in sequences]
            + [torch.empty(0, dtype=torch.int64)]
        ).long()
        index = torch.as_tensor(np.asarray(sequences, dtype=np.int64))
        cu_seqlens = edges(self.lengths[np.asarray(sequences, dtype=np.int64)])
        arguments = (
            self.td[rows], self.candidate_td[rows], self.outcome[index], cu_seqlens, self.group[index],
            self.num_groups,
        )  # fmt: skip
        return arguments, rows, index


def oracle(td, candidate_td, outcome, cu_seqlens, group, num_groups, config):
    """The definition in fp64, one token after the other; shares nothing with the package."""
    td, candidate_td, outcome = (x.double().numpy() for x in (td, candidate_td, outcome))
    group, cu = group.tolist(), cu_seqlens.tolist()
    sequences = [range(a, b) for a, b in zip(cu[:-1], cu[1:], strict=True)]
    values = []
    for rows in sequences:
        value = 0.0
        for t in rows:
            value += td[t]
            values.append(value)

    def divisor(std):
        return std + 1e-6 if config.std_floor == "add" else max(std, 1e-6)

    sigma = np.std(values) if values else 0.0
    scaled = td / divisor(sigma)
    x = np.zeros_like(td)
    for prompt in range(num_groups):
        rows = [t for b, rows in enumerate(sequences) if group[b] == prompt for t in rows]
        if rows and config.gae_moments == "group":
            x[rows] = (scaled[rows] - scaled[rows].mean()) / divisor(scaled[rows].std())
        elif rows:
            x[rows] = scaled[rows] - scaled.mean()
    scan = np.zeros_like(td)
    for rows in sequences:
        carry = 0.0
        for t in reversed(rows):
            carry = x[t] + config.discount * config.lam * carry
            scan[t] = carry
    if config.whiten and len(scan) > 1:
        scan = (scan - scan.mean()) / np.sqrt(scan.var(ddof=1) + 1e-8)
    first = np.zeros(len(sequences))
    for b in range(len(sequences)):
        own = outcome[[i for i in range(len(sequences)) if group[i] == group[b]]]
        first[b] = (outcome[b] - own.mean()) / divisor(own.std())
    result = np.zeros_like(td)
    for b, rows in enumerate(sequences):
        for t in rows:
            result[t] = first[b] + config.gae_coef * scan[t]
    return result, candidate_td / divisor(sigma), first, scan, np.asarray(sigma)


def assert_like(got, expected, rtol=1e-5):
    """Each field within rtol of its largest value."""
    for name, mine, truth in zip(advantages.Advantages._fields, got, expected, strict=True):
        truth = torch.as_tensor(truth, dtype=torch.float64)
        scale = truth.abs().max().item() if truth.numel() else 0.0
        torch.testing.assert_close(
            mine.double(), truth, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# ----------------------------------------------------------------------------------------- worked by hand

# one prompt, two rollouts of two tokens, td 1, 0 and 3, 0: values 1 1 3 3, mean 2, sigma_V 1
BY_HAND = (
    torch.tensor([1.0, 0, 3, 0]),
    torch.tensor([[2.0, 0], [0, 0], [1, -1], [0, 0]]),
    torch.tensor([1.0, 0]),
    torch.tensor([0, 2, 4], dtype=torch.int32),
    torch.tensor([0, 0]),
    1,
)


def test_paper_by_hand():
    got = distrl_advantages(*BY_HAND)
    # td~ 1 0 3 0 has mean 1 and variance (0 + 1 + 4 + 1) / 4 = 1.5; x = 0 -1 2 -1 over sqrt(1.5)
    u = 1 / math.sqrt(1.5)
    scan = [-0.95 * u, -u, 2 * u - 0.95 * u, -u]
    assert got.gae.tolist() == pytest.approx(scan, rel=1e-5)
    assert got.outcome_advantages.tolist() == pytest.approx([1, -1], rel=1e-5)  # mu and s are 1/2
    assert got.advantages.tolist() == pytest.approx(
        [1 + scan[0], 1 + scan[1], -1 + scan[2], -1 + scan[3]], rel=1e-5
    )
    assert got.candidate_advantages.flatten().tolist() == pytest.approx([2, 0, 0, 0, 1, -1, 0, 0], rel=1e-5)
    assert got.value_std.item() == 1.0


def test_release_by_hand():
    got = distrl_advantages(*BY_HAND, config=RELEASE)
    # centred by the batch mean 1, over sigma_V 1: 0 -1 2 -1; lambda 1: -1 -1 1 -1; mean -1/2, var 3/4 * 4/3
    assert got.gae.tolist() == pytest.approx([-0.5, -0.5, 1.5, -0.5], rel=1e-5)
    assert got.advantages.tolist() == pytest.approx([0.975, 0.975, -0.925, -1.025], rel=1e-5)
    assert got.candidate_advantages.flatten().tolist() == pytest.approx([2, 0, 0, 0, 1, -1, 0, 0], rel=1e-5)


def test_presets():
    assert AdvantageConfig() == PAPER
    assert (PAPER.discount, PAPER.lam, PAPER.gae_coef) == (1.0, 0.95, 1.0)
    assert (RELEASE.discount, RELEASE.lam, RELEASE.gae_coef) == (1.0, 1.0, 0.05)


def test_temporal_difference_by_hand():
    new, old = torch.tensor([-1.0, -2.0, -3.0, -0.5]), torch.tensor([-1.5, -1.0, -9.0, -0.25])
    cu = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert temporal_difference(new, old, cu, beta=10.0).tolist() == [5.0, -10.0, 0.0, 0.0]
    assert temporal_difference(new[:, None], old[:, None], cu, beta=0.5).tolist() == [
        [0.25],
        [-0.5],
        [0],
        [0],
    ]


def test_whiten_and_gae_by_hand():
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert whiten(torch.tensor([4.0])).tolist() == [0.0] and whiten(torch.empty(0)).shape == (0,)
    scan = gae(torch.ones(4), torch.tensor([0, 3, 4], dtype=torch.int32), discount=0.5, lam=1.0)
    assert scan.tolist() == [1.75, 1.5, 1.0, 1.0]


# ------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_random_batch(config, seed):
    rollouts = Rollouts(seed)
    got = distrl_advantages(*rollouts.arguments(), config=config)
    assert_like(got, oracle(*rollouts.arguments(), config))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in got)


@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_fp64(config):
    td, candidate_td, *rest = Rollouts().arguments()
    arguments = (td.double(), candidate_td.double(), *rest)
    got = distrl_advantages(*arguments, config=config)
    assert_like(got, oracle(*arguments, config), rtol=1e-12)
    assert all(x.dtype == torch.float64 for x in got)


@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
@pytest.mark.parametrize(
    ("lengths", "group"),
    [
        ([1, 1, 1], [0, 0, 1]),  # last tokens alone: td 0 everywhere
        ([5], [0]),  # one rollout
        ([2, 7, 1], [2, 0, 1]),  # a prompt each
        ([0, 3, 0, 0, 4, 0], [0, 0, 1, 1, 2, 2]),
        ([0, 0], [0, 1]),
        ([], []),
        ([3000, 1, 2], [0, 0, 0]),
    ],
    ids=str,
)
def test_degenerate_batches(config, lengths, group):
    torch.manual_seed(0)
    N, cu_seqlens = sum(lengths), edges(lengths)
    td, candidate_td = torch.randn(N), torch.randn(N, 3)
    last = cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1
    td[last], candidate_td[last] = 0.0, 0.0
    outcome = torch.arange(len(lengths)).remainder(2).float()
    arguments = (td, candidate_td, outcome, cu_seqlens, torch.tensor(group, dtype=torch.int64), 3)
    got = distrl_advantages(*arguments, config=config)
    assert_like(got, oracle(*arguments, config))
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("floor", ["add", "clamp"])
def test_agreeing_outcomes_give_exactly_nothing(floor):
    """Also for numbers of rollouts whose share is no binary fraction."""
    for n in (1, 3, 7, 16):
        for value in (0.0, 1.0):
            got = outcome_advantages(
                torch.full((n,), value), torch.zeros(n, dtype=torch.int64), 1, std_floor=floor
            )
            assert got.tolist() == [0.0] * n


@pytest.mark.parametrize("rank_of", ["token", "candidates"])
def test_unused_slots_stay_out(rank_of):
    """Whatever stands at an unused element (old log-prob -inf) or at a last token, td is 0 there."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, -1.0, math.nan])
    old = torch.tensor([-math.inf, -math.inf, -math.inf, -2.0, -1.0])
    cu = torch.tensor([0, 5], dtype=torch.int32)
    if rank_of == "candidates":
        bad, old = bad[:, None].expand(5, 3), old[:, None].expand(5, 3)
    td = temporal_difference(bad, old, cu, beta=2.0)
    assert td.reshape(5, -1)[:, 0].tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]


def test_nan_is_not_hidden():
    td = temporal_difference(
        torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([0, 2], dtype=torch.int32)
    )
    assert td.isnan().tolist() == [True, False]


def test_values_far_from_zero_do_not_cancel():
    """A first td of 1e4 lifts all values of both rollouts; their std is still 0.5 of one step."""
    td = torch.tensor([1e4, 1.0, 0.0, 1e4, 1.0, 0.0])
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    arguments = (td, torch.zeros(6, 1), torch.tensor([1.0, 0.0]), cu, torch.tensor([0, 0]), 1)
    got = distrl_advantages(*arguments)
    assert got.value_std.item() == pytest.approx(math.sqrt(2 / 9), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "config", [PAPER, pytest.param(RELEASE, marks=pytest.mark.full)], ids=["paper", "release"]
)
def test_compiles_whole(config, dynamic):
    """Values and prompts are checked in eager mode only, so that nothing breaks the graph."""
    torch.compiler.reset()
    batch = Rollouts()
    compiled = torch.compile(distrl_advantages, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = (batch.td, batch.candidate_td, batch.outcome, batch.cu_seqlens, batch.group, batch.num_groups)
    expected = distrl_advantages(*arguments, config=config)
    for mine, theirs in zip(compiled(*arguments, config=config), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    compiled = torch.compile(temporal_difference, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    rm, old = -torch.rand(2, *batch.candidate_td.shape)
    for beta in (10.0, 0.5):
        got = compiled(rm, old, batch.cu_seqlens, beta=beta)
        torch.testing.assert_close(got, temporal_difference(rm, old, batch.cu_seqlens, beta=beta))


def test_no_gradient():
    td = BY_HAND[0].clone().requires_grad_()
    assert not any(x.requires_grad for x in distrl_advantages(td, *BY_HAND[1:]))
    new = torch.randn(2, requires_grad=True)
    assert not temporal_difference(new, new, torch.tensor([0, 2], dtype=torch.int32)).requires_grad


# --------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_order_of_sequences_does_not_matter(config):
    rollouts = Rollouts(3)
    whole = distrl_advantages(*rollouts.arguments(), config=config)
    order = np.random.default_rng(0).permutation(len(rollouts.lengths))
    arguments, rows, index = rollouts.selected(order)
    got = distrl_advantages(*arguments, config=config)
    by = (rows, rows, index, rows)
    assert_like(got, (*(field[i] for field, i in zip(whole[:4], by, strict=True)), whole.value_std), 1e-6)


def test_the_same_bits_every_time():
    arguments = Rollouts(3).arguments()
    first, second = distrl_advantages(*arguments), distrl_advantages(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Ranks:
    """`world_size` threads whose `reduce` is an all-reduce in fp32 that overwrites its argument."""

    def __init__(self, world_size):
        self.tensors = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)

    def reduce(self, rank):
        def run(tensor):
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.tensors).sum(0)
            self.barrier.wait()
            return tensor.copy_(total)

        return run

    def run(self, function):
        results, errors = [None] * len(self.tensors), []

        def work(rank):
            try:
                results[rank] = function(rank, self.reduce(rank))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.tensors))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return results


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sizes", [(20, 20), (3, 37), (0, 40)], ids=str)
def test_ranks_together_are_one_batch(config, sizes):
    """Prompts spread over both ranks, and a rank without a sequence."""
    rollouts = Rollouts(5)
    whole = distrl_advantages(*rollouts.arguments(), config=config)
    order = np.random.default_rng(1).permutation(sum(sizes))
    parts = [rollouts.selected(order[: sizes[0]]), rollouts.selected(order[sizes[0] :])]
    results = Ranks(2).run(
        lambda rank, reduce: distrl_advantages(*parts[rank][0], config=config, reduce=reduce)
    )
    for got, (_, rows, index) in zip(results, parts, strict=True):
        by = (rows, rows, index, rows)
        expected = [field[i] for field, i in zip(whole[:4], by, strict=True)]
        for mine, truth, field in zip(got, expected, whole, strict=False):
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=2e-6 * field.abs().max().item())
        torch.testing.assert_close(got.value_std, whole.value_std)


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_ranks_balance_as_one_batch(preset):
    rollouts = Rollouts(6)
    config = ipvrm.BalanceConfig.preset(preset)
    whole = online_balance(rollouts.outcome, rollouts.group, rollouts.num_groups, config=config)
    halves = [torch.arange(0, 40, 2), torch.arange(1, 40, 2)]
    results = Ranks(2).run(
        lambda rank, reduce: online_balance(
            rollouts.outcome[halves[rank]], rollouts.group[halves[rank]], rollouts.num_groups,
            config=config, reduce=reduce,
        )
    )  # fmt: skip
    for got, index in zip(results, halves, strict=True):
        assert torch.equal(got.weight, whole.weight[index]) and torch.equal(got.margin, whole.margin[index])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_device_sync(config):
    """On the meta device nothing has a value, so whatever would wait for one raises."""
    *tensors, num_groups = Rollouts().arguments()
    got = distrl_advantages(*(x.to("meta") for x in tensors), num_groups, config=config)
    assert got.advantages.shape == tensors[0].shape and got.candidate_advantages.shape == tensors[1].shape
    old = tensors[1].to("meta")
    assert temporal_difference(old, old, tensors[3].to("meta")).shape == old.shape


# ------------------------------------------------------------------------------------------- seeded faults


def one_pass(x, size, sums, spread, reduce):
    total, squares, size = sums(x), sums(x.square()), size
    mean = total / size.clamp(min=1)
    variance = squares / size.clamp(min=1) - mean.square()
    return prompt_groups.Moments(size, mean, variance.clamp(min=0).sqrt())


def test_one_pass_moments_would_fail(monkeypatch):
    monkeypatch.setattr(prompt_groups, "moments", one_pass)
    with pytest.raises(AssertionError):
        test_values_far_from_zero_do_not_cancel()


def sample_moments(*arguments):
    size, mean, std = prompt_groups.moments(*arguments)
    return prompt_groups.Moments(size, mean, std * (size / (size - 1).clamp(min=1)).sqrt())


def test_sample_moments_would_fail(monkeypatch):
    monkeypatch.setattr(advantages, "moments", sample_moments)
    with pytest.raises(AssertionError):
        test_paper_by_hand()
    with pytest.raises(AssertionError):
        test_random_batch(PAPER, 0)


def test_a_scan_from_the_wrong_end_would_fail(monkeypatch):
    monkeypatch.setattr(advantages, "segment_scan", lambda x, cu, *_, **__: segment_scan(x, cu))
    with pytest.raises(AssertionError):
        test_paper_by_hand()


def test_a_group_sum_in_the_order_given_would_fail(monkeypatch):
    """Rollouts of a prompt need not be neighbours."""
    plain = prompt_groups.PromptGroups.__init__

    def init(self, *arguments):
        plain(self, *arguments)
        self.order = torch.arange(len(self.order))

    monkeypatch.setattr(prompt_groups.PromptGroups, "__init__", init)
    with pytest.raises(AssertionError):
        test_random_batch(PAPER, 0)


def test_a_kept_last_token_would_fail(monkeypatch):
    monkeypatch.setattr(
        advantages, "last_tokens", lambda op, cu, packed: torch.zeros(len(packed), dtype=torch.bool)
    )
    with pytest.raises(AssertionError):
        test_temporal_difference_by_hand()


def test_local_moments_would_fail(monkeypatch):
    monkeypatch.setattr(
        advantages, "batch_moments", lambda x, _: prompt_groups.batch_moments(x, prompt_groups.one_rank)
    )
    with pytest.raises(AssertionError):
        test_ranks_together_are_one_batch(PAPER, (20, 20))


# -------------------------------------------------------------------------------------------------- errors

TD, CANDIDATE_TD, OUTCOME, CU_SEQLENS, GROUP, _ = BY_HAND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(td=torch.zeros(4, 1)), r"td must be \(N,\) floating point, got \(4, 1\) torch.float32"),
        (dict(td=TD.long()), r"td must be \(N,\) floating point, got \(4,\) torch.int64"),
        (dict(candidate_td=TD), r"candidate_td must be \(N, K\), got \(4,\)"),
        (
            dict(candidate_td=torch.zeros(3, 2)),
            r"candidate_td must be floating point of shape \(4, 2\), got \(3, 2\) torch.float32",
        ),
        (dict(candidate_td=CANDIDATE_TD.to("meta")), "candidate_td is on meta, the others on cpu"),
        (dict(outcome=OUTCOME[:, None]), r"outcome must be \(B,\), got \(2, 1\)"),
        (dict(outcome=OUTCOME + 0.5), r"outcome must be 0 or 1, got \[1.5, 0.5\]"),
        (dict(outcome=OUTCOME * math.nan), r"outcome must be 0 or 1, got \[nan, nan\]"),
        (
            dict(outcome=torch.zeros(3), group=torch.zeros(3, dtype=torch.int64)),
            r"outcome must be \(2,\), one per sequence, on cpu, got \(3,\) on cpu",
        ),
        (dict(group=OUTCOME), r"group must be integers of shape \(2,\), got \(2,\) torch.float32"),
        (dict(group=OUTCOME.bool()), r"group must be integers of shape \(2,\), got \(2,\) torch.bool"),
        (dict(group=GROUP[:1]), r"group must be integers of shape \(2,\), got \(1,\) torch.int64"),
        (dict(group=GROUP.to("meta")), "group is on meta, outcome on cpu"),
        (dict(group=GROUP + 1), r"group must lie in \[0, num_groups = 1\), got \[1, 1\]"),
        (dict(group=GROUP - 1), r"group must lie in \[0, num_groups = 1\), got \[-1, -1\]"),
        (dict(cu_seqlens=CU_SEQLENS.long()), r"cu_seqlens must be \(B\+1,\) int32"),
    ],
)
def test_errors(change, message):
    arguments = dict(
        td=TD, candidate_td=CANDIDATE_TD, outcome=OUTCOME, cu_seqlens=CU_SEQLENS, group=GROUP, num_groups=1
    )
    with pytest.raises(ValueError, match="distrl_advantages: " + message):
        distrl_advantages(**(arguments | change))


def test_edges_that_do_not_rise():
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N=4"):
        distrl_advantages(TD, CANDIDATE_TD, OUTCOME, torch.tensor([0, 3, 2], dtype=torch.int32), GROUP, 1)
    with pytest.raises(ValueError, match="temporal_difference: cu_seqlens must rise from 0 to N=4"):
        temporal_difference(TD, TD, torch.tensor([0, 3], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rm_logprobs=TD.long()), r"rm_logprobs must be \(N,\) or \(N, K\) floating point, got \(4,\)"),
        (dict(rm_logprobs=TD[None, None]), r"rm_logprobs must be \(N,\) or \(N, K\) .* got \(1, 1, 4\)"),
        (dict(old_logprobs=CANDIDATE_TD), r"old_logprobs must be floating point of shape \(4,\), got \(4, 2"),
        (dict(old_logprobs=TD.to("meta")), "old_logprobs is on meta, the others on cpu"),
        (dict(beta=math.inf), "beta must be finite, got inf"),
        (dict(cu_seqlens=CU_SEQLENS.to("meta")), "cu_seqlens is on meta, the packed tensor on cpu"),
    ],
)  # fmt: skip
def test_temporal_difference_errors(change, message):
    arguments = dict(rm_logprobs=TD, old_logprobs=TD, cu_seqlens=CU_SEQLENS)
    with pytest.raises(ValueError, match="temporal_difference: " + message):
        temporal_difference(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(discount=1.5), r"discount must lie in \[0, 1\]; got 1.5"),
        (dict(lam=math.nan), r"lam must lie in \[0, 1\]; got nan"),
        (dict(gae_coef=math.inf), "gae_coef must be finite; got inf"),
        (dict(gae_moments="prompt"), "gae_moments must be group or batch; got 'prompt'"),
        (dict(std_floor="max"), "std_floor must be add or clamp; got 'max'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(IpvrmError, match="AdvantageConfig: " + message):
        AdvantageConfig(**change)


def test_unknown_preset():
    with pytest.raises(IpvrmError, match="preset must be 'paper' or 'release'; got 'verl'"):
        AdvantageConfig.preset("verl")
