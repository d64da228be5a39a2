"""FlopCounterMode counts the head ops by their matmuls of (N, D) and (V, D), forward and backward."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ipvrm_kernels import (
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    linear_logprobs_partial,
)

OP = "linear_logprobs"
N, D, V, K = 6, 5, 11, 3
MATMUL = 2 * N * D * V


def flops(call, *leaves):
    """(forward, with the backward) in matmuls."""
    with FlopCounterMode(display=False) as forward:
        call()
    with FlopCounterMode(display=False) as both:
        torch.autograd.grad(call(), leaves)
    return forward.get_total_flops() / MATMUL, both.get_total_flops() / MATMUL


def case(device):
    hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
    return hidden, weight, torch.randint(V, (N, K), device=device)


def test_linear_logprobs(impl, device):
    hidden, weight, ids = case(device)
    eager_h, eager_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert flops(lambda: (eager_h @ eager_w.T).sum(), eager_h, eager_w) == (1, 3)

    def call(entropy=False):
        out = linear_logprobs(hidden, weight, ids, return_entropy=True, impl=impl)
        return out.entropy.sum() if entropy else out.logprobs.sum()

    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == MATMUL
    assert {str(x) for x in counter.get_flop_counts()["Global"]} == {"ipvrm.linear_logprobs"}
    hidden.requires_grad_()
    assert flops(call, hidden) == (2, 2)  # a frozen head: its expectation, and a backward without vocabulary
    assert flops(lambda: call(entropy=True), hidden) == (2, 4)
    weight.requires_grad_()
    assert flops(call, hidden, weight) == (1, 4)  # the logits a second time, and a matmul for each gradient
    hidden = hidden.detach()
    assert flops(call, weight) == (1, 3)


def test_linear_candidates(impl, device):
    hidden, weight, _ = case(device)
    with FlopCounterMode(display=False) as counter:
        linear_candidates(hidden[None], weight, impl=impl)
    assert counter.get_total_flops() == MATMUL


def test_linear_logprobs_partial(impl, device):
    hidden, weight, ids = case(device)
    hidden.requires_grad_(), weight.requires_grad_()

    def call():
        return linear_logprobs_partial(hidden, weight, ids, vocab_start=0, impl=impl).sumexp.sum()

    assert flops(call, hidden, weight) == (1, 4)
    assert flops(call, hidden) == (1, 4)  # an op is told of both, whatever autograd.grad is asked for
    weight.requires_grad_(False)
    assert flops(call, hidden) == (1, 3)


def test_linear_distrl_loss(impl, device):
    hidden, weight, ids = case(device)
    old, candidates = torch.full((N,), -2.0, device=device), torch.full((N, K), -2.0, device=device)
    cu_seqlens = torch.tensor([0, N], dtype=torch.int32, device=device)

    def call():
        return linear_distrl_loss(
            hidden, weight, ids[:, 0], ids, old, candidates, old, candidates, cu_seqlens, impl=impl
        ).loss

    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == MATMUL
    hidden.requires_grad_()
    assert flops(call, hidden) == (2, 2)
    weight.requires_grad_()
    assert flops(call, hidden, weight) == (3, 3)
