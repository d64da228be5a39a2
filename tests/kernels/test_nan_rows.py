"""A row whose hidden holds a NaN says so in its results, as the docstrings state, and in no other row's."""

import math

import pytest
import torch

from ipvrm_kernels import (
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    linear_logprobs_partial,
    merge_partials,
)

OP = "linear_logprobs"  # every head op has its implementations
N, D, V, K, BAD = 9, 6, 70, 3, 4


@pytest.fixture
def case(device):
    """(hidden with a NaN in row BAD, weight, ids of which one is no token in every row)."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    ids = torch.randint(V, (N, K), generator=g)
    ids[:, 2] = -1
    hidden[BAD, 2] = math.nan
    return hidden.to(device), weight.to(device), ids.to(device)


def only_bad_is_nan(x):
    """x (N, ...): NaN in all of row BAD and nowhere else."""
    bad = torch.arange(N, device=x.device) == BAD
    assert bool(x[bad].isnan().all()) and not bool(x[~bad].isnan().any())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_linear_logprobs(impl, device, case, frozen):
    hidden, weight, ids = case
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    out = linear_logprobs(hidden, weight, ids, return_entropy=not frozen, impl=impl)
    only_bad_is_nan(out.logprobs[:, :2])
    only_bad_is_nan(out.lse)
    assert bool((out.logprobs[:, 2] == -math.inf).all())
    if not frozen:
        only_bad_is_nan(out.entropy)
    wanted = (hidden,) if frozen else (hidden, weight)
    dhidden, *rest = torch.autograd.grad(out.logprobs[:, :2].sum(), wanted, retain_graph=True)
    only_bad_is_nan(dhidden)
    assert all(bool(x.isnan().all()) for x in rest)


def test_without_an_upstream_gradient_the_row_stays_out(impl, device, case):
    """Masked before it is summed, as a trainer masks padding: then nothing of it reaches the head."""
    hidden, weight, ids = case
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.where((torch.arange(N, device=device) == BAD)[:, None], -1, ids)
    out = linear_logprobs(hidden, weight, ids, fill_value=0.0, impl=impl).logprobs
    assert bool(out.isfinite().all()) and not out[BAD].any()


def test_linear_candidates(impl, device, case):
    hidden, weight, ids = case
    for options in (dict(min_prob=0.05), dict(min_prob=None, top_k=4), dict(top_k=4)):
        out = linear_candidates(hidden, weight, sampled=ids[:, 0], return_entropy=True, impl=impl, **options)
        for x in (out.lse, out.entropy, out.sampled_logprobs):
            only_bad_is_nan(x)
        assert int(out.counts[BAD]) == 0 and bool((out.ids[BAD] == -1).all())
        assert bool((out.logprobs[BAD] == -math.inf).all()) and not bool(out.logprobs.isnan().any())
        others = torch.arange(N, device=device) != BAD
        clean = linear_candidates(hidden[others], weight, impl=impl, **options)
        assert torch.equal(out.ids[others], clean.ids)


def test_shards(impl, device, case):
    hidden, weight, ids = case
    parts = [
        linear_logprobs_partial(hidden, weight[a:b], ids, vocab_start=a, impl=impl)
        for a, b in ((0, 30), (30, V), (V, V))
    ]
    for part in parts[:2]:
        only_bad_is_nan(part.sumexp)
        only_bad_is_nan(part.sum_z_exp)
    out = merge_partials(parts, return_entropy=True)
    only_bad_is_nan(out.lse)
    only_bad_is_nan(out.entropy)
    only_bad_is_nan(out.logprobs[:, :2])


def test_linear_distrl_loss(impl, device, case):
    hidden, weight, ids = case
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    old = torch.full((N, K), -2.0, device=device)
    cu_seqlens = torch.tensor([0, 2, N], dtype=torch.int32, device=device)
    out = linear_distrl_loss(
        hidden, weight, ids[:, 0], ids, old[:, 0], old, old[:, 0], old, cu_seqlens, impl=impl
    )
    names = ("token_kl", "candidate_kl")
    for x in (out.loss, out.token_loss, out.candidate_loss, *(out.metrics[name][0] for name in names)):
        assert bool(x.isnan())
    dhidden, dweight = torch.autograd.grad(out.loss, (hidden, weight))
    only_bad_is_nan(dhidden)
    assert bool(dweight.isnan().all())
