"""Ids from V on: refused where values are read, else a token of probability 0, in every op that takes ids."""

import math

import pytest
import torch
import torch.distributed as dist
from oracles import naive_head

from ipvrm_kernels import (
    backend,
    distrl_loss,
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    linear_logprobs_partial,
    set_checks,
    vocab_parallel,
    vocab_parallel_candidates,
    vocab_parallel_logprobs,
)

OP = "linear_logprobs"  # every head op has its implementations
N, D, V, K = 6, 4, 70, 3
FAR = 2**40


@pytest.fixture
def case(device):
    """(hidden, weight, ids (N, K): some no token, some from V on)."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    ids = torch.randint(V, (N, K), generator=g)
    ids[0, 0], ids[2, 0], ids[1, 0], ids[1, 1], ids[3], ids[5, 2] = -1, -100, V, V + 3, FAR, -100
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), ids.to(device)


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def checked(request, device, monkeypatch):
    """Whether values are read; on the CPU they always are, and a GPU's default is put in its place."""
    previous = set_checks(request.param)
    if not request.param and device == "cpu":
        for module in (backend, vocab_parallel):
            monkeypatch.setattr(module, "checks_values", lambda tensor: False)
    yield request.param
    set_checks(previous)


@pytest.fixture
def group(device):
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def definition(case):
    """(log-probs (N, K), z of the ids (N, K)) in fp64, -inf where there is no such token; leaves."""
    hidden, weight = (x.detach().double().requires_grad_() for x in case[:2])
    ids = torch.where(case[2] < V, case[2], -1)
    logprobs, _, _, z = naive_head(hidden, weight, None, ids)
    return logprobs, torch.where(ids >= 0, z.gather(1, ids.clamp(min=0)), -math.inf), (hidden, weight)


def same(found, leaves, exact, exact_leaves, no_token):
    """Values and gradients; an upstream of NaN at what is no token stays out of them."""
    torch.testing.assert_close(found, exact.float())
    upstream = torch.linspace(-1, 2, found.numel(), device=found.device).view(found.shape)
    upstream = upstream.masked_fill(no_token, math.nan)
    gradients = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(exact, exact_leaves, upstream.double())
    torch.testing.assert_close(gradients, tuple(x.float() for x in wanted))


def refused(op, name, call, most=FAR):
    words = rf"^{op}: {name} must be below V={V}, negative for no token, got (values )?up to {most}$"
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "vocab_parallel"])
def test_logprobs(impl, device, case, checked, group, sharded):
    """-inf whatever fill_value, which is for negative ids."""
    hidden, weight, ids = case
    op = "vocab_parallel_logprobs" if sharded else "linear_logprobs"

    def call():
        if sharded:
            options = dict(vocab_start=0, group=group, fill_value=0.5, impl=impl)
            return vocab_parallel_logprobs(hidden, weight, ids, **options).logprobs
        return linear_logprobs(hidden, weight, ids, fill_value=0.5, impl=impl).logprobs

    if checked:
        return refused(op, "ids", call)
    logprobs, _, leaves = definition(case)
    same(call(), case[:2], logprobs.masked_fill(ids < 0, 0.5), leaves, (ids < 0) | (ids >= V))


def test_a_frozen_head(impl, device, case, checked):
    hidden, weight, ids = case

    def call():
        return linear_logprobs(hidden, weight.detach(), ids, impl=impl).logprobs

    if checked:
        return refused("linear_logprobs", "ids", call)
    logprobs, _, leaves = definition(case)
    same(call(), (hidden,), logprobs, leaves[:1], (ids < 0) | (ids >= V))


def test_partials_own_none_of_them(impl, device, case, checked):
    """Never refused: another shard may own them."""
    hidden, weight, ids = case
    found = linear_logprobs_partial(hidden, weight, ids, vocab_start=0, impl=impl).id_logits
    _, z, leaves = definition(case)
    same(found, case[:2], z, leaves, (ids < 0) | (ids >= V))


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "vocab_parallel"])
def test_sampled_of_candidates(impl, device, case, checked, group, sharded):
    hidden, weight, ids = case
    op = "vocab_parallel_candidates" if sharded else "linear_candidates"

    def call(sampled):
        if sharded:
            options = dict(vocab_start=0, group=group, sampled=sampled, impl=impl)
            return vocab_parallel_candidates(hidden, weight, **options)
        return linear_candidates(hidden, weight, sampled=sampled, impl=impl)

    if checked:
        return refused(op, "sampled", lambda: call(ids[:, 0]))
    found, others = call(ids[:, 0]), call(torch.where(ids[:, 0] < V, ids[:, 0], -1))
    torch.testing.assert_close(found.sampled_logprobs, definition(case)[0][:, 0].float())
    for mine, theirs in zip(found[:4], others[:4], strict=True):  # nothing else heard of them
        assert torch.equal(mine, theirs)


def test_linear_distrl_loss(impl, device, case, checked):
    """A ratio of 0 to the old probability, and an infinite KL that says so."""
    hidden, weight, ids = case
    g = torch.Generator().manual_seed(1)
    old = (-3 + torch.rand(N, K, generator=g)).to(device)
    advantages = torch.randn(N, K, generator=g).to(device)
    cu_seqlens = torch.tensor([0, 2, N], dtype=torch.int32, device=device)
    rest = (old[:, 0], old, advantages[:, 0], advantages, cu_seqlens)
    if checked:
        fine = ids.clamp(max=V - 1)
        for name, both in (("token_ids", (ids[:, 0], fine)), ("candidate_ids", (fine[:, 0], ids))):
            refused("linear_distrl_loss", name, lambda both=both: linear_distrl_loss(
                hidden, weight, *both, *rest, impl=impl
            ))  # fmt: skip
        return
    found = linear_distrl_loss(hidden, weight, ids[:, 0], ids, *rest, impl=impl)
    logprobs, _, leaves = definition(case)
    marked = [x.double() for x in (old.masked_fill(ids < 0, -math.inf), advantages)]
    exact = distrl_loss(
        logprobs[:, 0], logprobs, marked[0][:, 0], marked[0], marked[1][:, 0], marked[1], cu_seqlens
    )
    for name in found.metrics:
        torch.testing.assert_close(found.metrics[name], tuple(x.float() for x in exact.metrics[name]))
    assert found.metrics["token_kl"][0] == found.metrics["candidate_kl"][0] == math.inf
    torch.testing.assert_close(found[1:3], tuple(x.float() for x in exact[1:3]))
    same(found.loss, case[:2], exact.loss, leaves, torch.zeros((), dtype=torch.bool, device=device))
