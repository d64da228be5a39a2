"""(B, T, D) in place of (N, D): the head ops take leading dimensions and give them back; empty ones too."""

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
D, V, K = 8, 33, 3
SHAPES = [(2, 5), (2, 1, 3), (0, 4), (3, 0)]


def case(rows, device):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*rows, D, generator=g), torch.randn(V, D, generator=g)
    ids = torch.randint(-1, V, (*rows, K), generator=g)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), ids.to(device)


def flat(x, rows):
    return x.reshape(rows.numel(), *x.shape[len(rows) :])


def both(call, inputs, rows):
    """Outputs and gradients of `call` at inputs as they are and flattened."""
    results = []
    for change in (lambda x: x, lambda x: flat(x, rows)):
        hidden, weight, *rest = inputs
        out = [x for x in call(change(hidden), weight, *(change(x) for x in rest)) if x is not None]
        up = torch.Generator().manual_seed(1)
        score = sum(
            (
                torch.randn(x.numel(), generator=up).to(x.device)
                * torch.where(x.isfinite(), x, 0.0).flatten()
            ).sum()
            for x in out
            if x.requires_grad
        )
        gradients = torch.autograd.grad(score, (hidden, weight)) if isinstance(score, torch.Tensor) else ()
        results.append(([x.detach() for x in out], gradients))
    (mine, my_gradients), (theirs, their_gradients) = results
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == (*rows, *b.shape[1:]) or a.dim() == 0
        torch.testing.assert_close(flat(a, rows) if a.dim() else a, b, rtol=0, atol=0)
    for a, b in zip(my_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return my_gradients


@pytest.fixture(params=SHAPES, ids=str)
def rows(request):
    return torch.Size(request.param)


@pytest.mark.parametrize("per_row", [True, False], ids=["one id", "K ids"])
def test_linear_logprobs(impl, device, rows, per_row):
    hidden, weight, ids = case(rows, device)
    ids = ids[..., 0] if per_row else ids

    def call(hidden, weight, ids):
        out = linear_logprobs(hidden, weight, ids, return_entropy=True, fill_value=0.0, impl=impl)
        assert out.logprobs.shape == ids.shape
        return out

    gradients = both(call, (hidden, weight, ids), rows)
    assert gradients[0].shape == hidden.shape and bool(gradients[1].any()) == (rows.numel() > 0)


def test_linear_candidates(impl, device, rows):
    hidden, weight, ids = case(rows, device)

    def call(hidden, weight, sampled):
        return linear_candidates(
            hidden, weight, min_prob=0.05, sampled=sampled, return_entropy=True, impl=impl
        )

    both(call, (hidden, weight, ids[..., 0]), rows)


def test_shards(impl, device, rows):
    hidden, weight, ids = case(rows, device)

    def call(hidden, weight, ids):
        cuts = ((0, 20), (20, 20), (20, V))
        parts = [linear_logprobs_partial(hidden, weight[a:b], ids, vocab_start=a, impl=impl) for a, b in cuts]
        return merge_partials(parts, return_entropy=True)

    both(call, (hidden, weight, ids), rows)
    both(call, (hidden, weight, ids[..., 0]), rows)


def test_linear_distrl_loss(impl, device, rows):
    hidden, weight, ids = case(rows, device)
    N = rows.numel()
    cu_seqlens = torch.tensor([0, N // 2, N], dtype=torch.int32, device=device)
    floats = [torch.randn(ids.shape, device=device) for _ in range(2)]
    old = [-3 - x.abs() for x in floats]

    def call(hidden, weight, ids, old, old_candidates, advantages, candidate_advantages):
        found = linear_distrl_loss(
            hidden, weight, ids[..., 0], ids, old, old_candidates, advantages, candidate_advantages,
            cu_seqlens, impl=impl,
        )  # fmt: skip
        return found[:3]

    tensors = (old[0][..., 0], old[1], floats[0][..., 0], floats[1])
    both(call, (hidden, weight, ids, *tensors), rows)


def test_a_frozen_head_and_what_is_not_contiguous(impl, device):
    hidden, weight, ids = case((2, 5), device)
    turned = torch.randn(5, 2, D, device=device).transpose(0, 1).requires_grad_()
    weight = weight.detach()

    def call(hidden, weight, ids):
        return linear_logprobs(hidden, weight, ids, impl=impl).logprobs

    found = []
    for x in (turned, turned.detach().contiguous().requires_grad_()):
        out = call(x, weight, ids)
        found.append((out, torch.autograd.grad(torch.where(ids >= 0, out, 0.0).sum(), x)[0]))
    torch.testing.assert_close(*(x[0] for x in found))
    torch.testing.assert_close(*(x[1] for x in found))


@pytest.mark.slow
def test_compile(impl, device):
    hidden, weight, ids = case((2, 5), device)

    def loss(hidden, weight):
        out = linear_logprobs(hidden, weight, ids, fill_value=0.0, impl=impl)
        chosen = linear_candidates(hidden, weight, top_k=2, impl=impl)
        return out.logprobs.sum() + out.lse.sum() + chosen.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, loss))
    torch.testing.assert_close(mine, theirs)


def test_shapes_that_do_not_fit():
    hidden, weight, ids = torch.zeros(2, 5, D), torch.zeros(V, D), torch.zeros(2, 5, dtype=torch.long)
    words = r"ids must be \(B, T\) or \(B, T, K\) with leading dimensions of hidden \(2, 5\), got "
    for wrong in (ids[0], ids.T, ids[:1], ids[..., None, None]):
        with pytest.raises(ValueError, match=words):
            linear_logprobs(hidden, weight, wrong)
    with pytest.raises(
        ValueError, match=r"hidden must be \(N, D\) or \(B, T, D\) and weight \(V, D\), got \(8,\)"
    ):
        linear_logprobs(hidden[0, 0], weight, ids[0, 0])
