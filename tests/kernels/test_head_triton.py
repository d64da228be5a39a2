"""The Triton head driver where it could go wrong: groups, splits, chunks, neighbours, refused workspaces."""

import math
import re

import pytest
import torch

from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs

OP = "linear_logprobs"  # the tests below ask for impl="triton" and skip every other


@pytest.fixture(autouse=True)
def _only_triton(request):
    if request.getfixturevalue("impl") != "triton":
        pytest.skip("the driver of impl='triton' alone")


def one_hot_head(logits, device):
    """hidden (N, N), weight (V, N) whose logits are exactly `logits` (N, V)."""
    return torch.eye(logits.shape[0], device=device), logits.T.contiguous().to(device)


@pytest.mark.parametrize("V", [7, 33, 301, 2049])
@pytest.mark.parametrize("rule", [(0.05, None), (0.05, 4), (None, 12)], ids=str)
def test_candidates_crowded_in_a_group_and_tied_across_groups(impl, device, V, rule):
    """Row 0: the best tokens all in one group; row 1: equal maxima in every group; row 2: one candidate at
    V - 1 behind a padded tail; row 3: flat. The sets, their order and their ties are exact."""
    logits = torch.full((4, V), -30.0)
    first = max(0, min(V, 64) - 10)
    logits[0, first : first + 10] = torch.arange(10.0).mul(0.01)[: V - first]
    logits[1, ::32] = 2.0
    logits[1, 5::64] = 2.0
    logits[2, V - 1] = 1.0
    logits[3] = -80.0  # a zero in the padded tail would win
    hidden, weight = one_hot_head(logits, device)
    out = linear_candidates(hidden, weight, min_prob=rule[0], top_k=rule[1], impl=impl)
    reference = linear_candidates(hidden, weight, min_prob=rule[0], top_k=rule[1], impl="torch")
    assert torch.equal(out.ids, reference.ids)
    assert torch.equal(out.counts, reference.counts)
    torch.testing.assert_close(out.logprobs, reference.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("N", [0, 1, 63])
def test_more_slots_than_groups_or_tokens(impl, device, N):
    hidden, weight = torch.randn(N, 8, device=device), torch.randn(45, 8, device=device)
    out = linear_candidates(hidden, weight, min_prob=None, top_k=50, impl=impl)
    reference = linear_candidates(hidden, weight, min_prob=None, top_k=50, impl="torch")
    assert torch.equal(out.counts, torch.full((N,), 45, device=device))
    assert torch.equal(out.ids.sort(1).values, reference.ids.sort(1).values)
    torch.testing.assert_close(out.logprobs, reference.logprobs, rtol=0, atol=1e-5)


def test_a_row_is_the_same_whatever_surrounds_it(impl, device):
    """Bitwise, at another N, another position in the tile, and among other neighbours; every output."""
    hidden, weight = torch.randn(150, 24, device=device), torch.randn(700, 24, device=device)
    ids = torch.randint(0, 700, (150, 2), device=device)
    options = dict(return_entropy=True, deterministic=True, impl=impl)
    whole = linear_logprobs(hidden, weight, ids, **options)
    sets = linear_candidates(hidden, weight, sampled=ids[:, 0], **options)
    for rows in (slice(140, 141), slice(3, 70), torch.arange(149, 130, -1, device=device)):
        part = linear_logprobs(hidden[rows], weight, ids[rows], **options)
        assert all(torch.equal(x, y[rows]) for x, y in zip(part, whole, strict=True))
        part = linear_candidates(hidden[rows], weight, sampled=ids[rows][:, 0], **options)
        assert all(torch.equal(x, y[rows]) for x, y in zip(part, sets, strict=True))


def test_candidates_have_the_logprobs_of_linear_logprobs(impl, device):
    """The first PPO ratio is exactly 1: the same gather-dot and the same lse in both ops."""
    hidden, weight = 3 * torch.randn(40, 24, device=device), torch.randn(300, 24, device=device)
    out = linear_candidates(hidden, weight, impl=impl)
    again = linear_logprobs(hidden, weight, out.ids, impl=impl)
    assert torch.equal(again.logprobs, out.logprobs) and torch.equal(again.lse, out.lse)


def gradients(function, *variables, **options):
    required = [x.clone().requires_grad_() for x in variables]
    return torch.autograd.grad(function(*required, **options), required)


def test_workspace_is_honoured_or_refused_with_the_least_that_works(impl, device):
    """One chunk of the vocabulary or many give the same gradients; a byte less than the least is refused."""
    hidden, weight = torch.randn(70, 24, device=device), torch.randn(900, 24, device=device)
    ids = torch.randint(-1, 900, (70, 3), device=device)
    used = ids >= 0

    def loss(hidden, weight, limit=None):
        out = linear_logprobs(hidden, weight, ids, max_workspace_bytes=limit, impl=impl)
        return torch.where(used, out.logprobs, 0.0).sum() + out.lse.square().sum()

    with pytest.raises(ValueError, match="linear_logprobs: max_workspace_bytes must be at least") as caught:
        gradients(loss, hidden, weight, limit=1000)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    with pytest.raises(ValueError, match=f"at least {least} "):
        gradients(loss, hidden, weight, limit=least - 1)
    whole = gradients(loss, hidden, weight)
    for mine, theirs in zip(gradients(loss, hidden, weight, limit=least), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    cu_seqlens = torch.tensor([0, 70], dtype=torch.int32, device=device)
    old = [-torch.ones(shape, device=device) for shape in (70, (70, 2), 70, (70, 2))]
    arguments = (ids[:, 0], ids[:, 1:], *old)
    with pytest.raises(ValueError, match="linear_distrl_loss: max_workspace_bytes must be at least"):
        linear_distrl_loss(hidden, weight.clone().requires_grad_(), *arguments, cu_seqlens,
                           max_workspace_bytes=1000, impl=impl)  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_frozen_head_keeps_its_digits_where_p_is_near_1(impl, device, softcap):
    """Dense and sparse part nearly cancel: the ids' own terms never pass through the rounded expectation."""
    hidden = torch.randn(40, 24, device=device)
    weight = torch.randn(90, 24, device=device)
    best = (hidden @ weight.T).argmax(1)
    ids = torch.stack([best, torch.roll(best, 1), best], 1)  # a duplicate as well

    def loss(hidden, wide=torch.float32, **options):
        head = weight.to(wide)
        out = linear_logprobs(hidden * 4, head, ids, softcap=softcap, temperature=0.5, **options)
        return (out.logprobs * torch.tensor([1.0, 0.01, 0.5], device=device)).sum()

    (mine,) = gradients(loss, hidden, impl=impl)
    (exact,) = gradients(loss, hidden.double(), wide=torch.float64, impl="torch")
    (plain,) = gradients(loss, hidden, impl="torch")
    slack = 8 * torch.finfo(torch.float32).eps * 100
    assert (mine - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack
    assert not math.isnan(mine.sum().item())
