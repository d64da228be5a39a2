"""torch.compile(fullgraph=True) of whole loss functions: values and gradients are those of eager mode."""

import pytest
import torch
from oracles import edges

from ipvrm_kernels import (
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    prefix_value_loss,
    prefix_values,
    segment_scan,
)

D, V = 16, 97


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    cu_seqlens = edges(lengths)
    hidden = torch.randn(N, D, generator=g).requires_grad_()
    return hidden, torch.randint(0, V, (N,), generator=g), cu_seqlens


def weight_of(seed=9):
    return torch.randn(V, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def reward_model_loss(hidden, weight, ids, cu_seqlens, reference, outcome):
    """Stage A: log-probs, prefix values as a metric, the margin loss, an entropy bonus."""
    out = linear_logprobs(hidden, weight, ids, return_entropy=True)
    log_ratio = out.logprobs - reference
    values = prefix_values(log_ratio, cu_seqlens)
    loss = prefix_value_loss(log_ratio, cu_seqlens, outcome, prefix_weighting="late")
    return loss - 0.01 * out.entropy.mean() + 0.1 * values.prob.mean(), values.mean_value.detach()


def policy_loss(hidden, weight, ids, cu_seqlens, reference, outcome):
    """Stage B: candidates of the behaviour policy, GAE of a TD signal, the two-branch loss."""
    behaviour = linear_candidates(hidden.detach() * 0.9, weight, min_prob=0.05, sampled=ids)
    td = 0.5 * (behaviour.sampled_logprobs - reference)
    advantages = segment_scan(td, cu_seqlens, 0.95, reverse=True)
    candidate_td = torch.where(behaviour.ids >= 0, 0.5 * behaviour.logprobs, 0.0)
    out = linear_distrl_loss(
        hidden, weight, ids, behaviour.ids, behaviour.sampled_logprobs, behaviour.logprobs,
        advantages, candidate_td, cu_seqlens, alpha=0.3, dual_clip=3.0,
    )  # fmt: skip
    total, count = out.metrics["candidates_per_row"]
    return out.loss + 0 * outcome.sum(), total / count


@pytest.mark.slow
@pytest.mark.parametrize("loss", [reward_model_loss, policy_loss])
def test_a_whole_loss_compiles(loss):
    """Two batches of different sizes, so that a graph with a dynamic N is exercised too."""
    compiled = torch.compile(loss, fullgraph=True)
    for lengths in ((5, 1, 9), (3, 20, 4, 11)):
        hidden, ids, cu_seqlens = batch(lengths)
        weight, outcome = weight_of(), (torch.arange(len(lengths)) % 2).float()
        reference = torch.linspace(-4, -1, len(ids))
        results = []
        for function in (compiled, loss):
            value, metric = function(hidden, weight, ids, cu_seqlens, reference, outcome)
            results.append([value, metric, *torch.autograd.grad(value, (hidden, weight))])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_numbers_that_vary_and_dynamic_shapes_keep_the_graph_whole():
    """A temperature schedule and `dynamic=True` make numbers symbolic; validation must take them."""
    hidden, ids, cu_seqlens = batch((5, 1, 9))
    weight, outcome = weight_of(), torch.tensor([0.0, 1.0, 1.0])

    def loss(hidden, number):
        logprobs = linear_logprobs(hidden, weight, ids, temperature=number, logit_scale=1 + number).logprobs
        old = logprobs.detach()[:, None]
        policy = linear_distrl_loss(
            hidden, weight, ids, ids[:, None], old[:, 0], old, old[:, 0], old, cu_seqlens,
            alpha=number, clip_low=number, dual_clip=1 + number, token_denominator=number,
        )  # fmt: skip
        return policy.loss + prefix_value_loss(logprobs, cu_seqlens, outcome, beta=number, margin=number)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for number in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(hidden, number), loss(hidden, number))
