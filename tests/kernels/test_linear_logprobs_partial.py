"""Vocabulary shards merged equal the whole head: values, gradients, empty and masked shards, errors."""

import math

import pytest
import torch

from ipvrm_kernels import backend, linear_logprobs, linear_logprobs_partial, merge_partials

if backend.HAS_TRITON:
    from ipvrm_kernels.head import triton_forward

OP = "linear_logprobs_partial"
OPTIONS = dict(logit_scale=1.7, softcap=4.0, temperature=0.6)


def inputs(N=12, D=5, V=23, dtype=torch.float64, device="cpu"):
    hidden = torch.randn(N, D, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, device=device, requires_grad=True)
    return (hidden, weight, bias), torch.randint(-1, V, (N, 3), device=device)


def merged(hidden, weight, bias, ids, cuts, **options):
    shards = [
        linear_logprobs_partial(hidden, weight[a:b], ids, vocab_start=a, bias=bias[a:b], **options)
        for a, b in zip([0, *cuts], [*cuts, weight.shape[0]], strict=True)
    ]
    return merge_partials(shards, return_entropy=True)


def loss(out, ids):
    """Distinct weights for every output, and NaN at the slots that hold no token."""
    mark = torch.where(ids >= 0, torch.arange(1.0, ids.shape[1] + 1, device=ids.device), math.nan)
    out.logprobs.register_hook(lambda g: g * mark)
    picked = torch.where(out.logprobs > -math.inf, out.logprobs, 0.0)
    return picked.sum() + 0.3 * out.lse.square().sum() - 2 * out.entropy.sum()


@pytest.mark.parametrize("cuts", [[], [1], [7, 8], [5, 11, 22]], ids=str)
def test_shards_equal_the_whole(impl, device, cuts):
    variables, ids = inputs(dtype=torch.float64 if impl == "torch" else torch.float32, device=device)
    hidden, weight, bias = variables
    parts = merged(hidden, weight, bias, ids, cuts, impl=impl, **OPTIONS)
    whole = linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, **OPTIONS)
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs)
    mine, theirs = (torch.autograd.grad(loss(out, ids), variables) for out in (parts, whole))
    torch.testing.assert_close(mine, theirs)


def test_hand_worked(impl, device):
    # h = 1, z = (0, log 2 | log 5). Shard 0: max log 2, sumexp 1/2 + 1, sum_z_exp (0 - log 2) / 2.
    weight = torch.tensor([[1.0], [2.0], [5.0]], device=device).log()
    ones = torch.ones(1, 1, device=device)
    ids = torch.tensor([2], device=device)
    first = linear_logprobs_partial(ones, weight[:2], ids, vocab_start=0, impl=impl)
    second = linear_logprobs_partial(ones, weight[2:], ids, vocab_start=2, impl=impl)
    expected = [math.log(2), 1.5, -math.log(2) / 2, -math.inf]
    assert [x.item() for x in first] == pytest.approx(expected)
    assert [x.item() for x in second] == pytest.approx([math.log(5), 1.0, 0.0, math.log(5)])
    out = merge_partials([first, second])
    assert out.logprobs.item() == pytest.approx(math.log(5 / 8))
    assert out.lse.item() == pytest.approx(math.log(8))
    assert out.entropy is None


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_far_apart_maxima(impl, device, level):
    """A shard that is 1e4 below the other adds nothing, without overflow; log-probs stay <= 0."""
    weight = torch.cat([torch.zeros(4, 1), torch.full((4, 1), level)]).to(device)
    ids = torch.tensor([[0, 7]], device=device)
    bias = torch.zeros(8, device=device)
    out = merged(torch.ones(1, 1, device=device), weight, bias, ids, [4], impl=impl)
    assert (out.logprobs <= 0).all() and out.logprobs.isfinite().all()
    assert out.lse.item() == pytest.approx(max(level, 0) + math.log(4), rel=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(4), rel=1e-5)


def test_id_logits_never_exceed_the_maximum(impl, device, monkeypatch):
    """Even where they were summed in another order than the tiles behind it: log-probs stay <= 0."""
    if impl == "triton":
        real = triton_forward.id_logits
        monkeypatch.setattr(triton_forward, "id_logits", lambda *inputs: real(*inputs) * (1 + 1e-6))
    hidden, weight = 40 * torch.randn(30, 16, device=device), torch.randn(90, 16, device=device)
    z = hidden @ weight.T
    ids = torch.stack([z.argmax(1), torch.full_like(z.argmax(1), -1)], 1)
    shards = [
        linear_logprobs_partial(hidden, weight[a:b], ids, vocab_start=a, impl=impl)
        for a, b in ((0, 50), (50, 90))
    ]
    for shard in shards:
        assert (shard.id_logits <= shard.max[:, None]).all() and (shard.id_logits[:, 1] == -math.inf).all()
    assert (merge_partials(shards).logprobs <= 0).all()


def test_shard_of_masked_tokens(impl, device):
    """A shard whose every logit is -inf has probability 0 and finite gradients."""
    (hidden, weight, bias), ids = inputs(dtype=torch.float32, device=device)
    bias = bias.detach().clone()
    bias[:6] = -math.inf
    out = merged(hidden, weight, bias, ids.clamp(min=6), [6], impl=impl)
    whole = linear_logprobs(hidden, weight, ids.clamp(min=6), bias=bias, return_entropy=True)
    torch.testing.assert_close(out.entropy, whole.entropy)
    gradients = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))
    assert all(d.isfinite().all() for d in gradients)


def test_gradcheck():
    variables, ids = inputs(N=4, D=3, V=7)

    def function(hidden, weight, bias):
        out = merged(hidden, weight, bias, ids, [3], **OPTIONS)
        return torch.where(ids >= 0, out.logprobs, 0.0), out.lse, out.entropy

    torch.autograd.gradcheck(function, variables)


def test_opcheck(impl, device):
    (hidden, weight, bias), ids = inputs(dtype=torch.float32, device=device)
    arguments = (hidden, weight, bias, ids, 1.0, 4.0, 0.7, torch.float32, impl)
    torch.library.opcheck(torch.ops.ipvrm.linear_logprobs_partial_fwd, arguments)


def test_compile(impl, device):
    (hidden, weight, bias), ids = inputs(dtype=torch.float32, device=device)

    def total(hidden):
        return merged(hidden, weight, bias, ids, [9], impl=impl).lse.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(hidden), hidden) for f in (compiled, total))
    torch.testing.assert_close(mine, theirs)


def test_errors():
    hidden, weight, ids = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="linear_logprobs_partial: vocab_start must be >= 0, got -1"):
        linear_logprobs_partial(hidden, weight, ids, vocab_start=-1)
    with pytest.raises(ValueError, match="linear_logprobs_partial: weight is empty"):
        linear_logprobs_partial(hidden, weight[:0], ids, vocab_start=0)
    with pytest.raises(ValueError, match="merge_partials: partials must hold at least one shard, got none"):
        merge_partials([])
    one, two = (linear_logprobs_partial(hidden[:n], weight, ids[:n], vocab_start=0) for n in (4, 3))
    with pytest.raises(ValueError, match=r"merge_partials: all shards must have the same rows and ids"):
        merge_partials([one, two])
    hidden = hidden.requires_grad_()
    sums = linear_logprobs_partial(hidden, weight, ids, vocab_start=0).sumexp.sum()
    (gradient,) = torch.autograd.grad(sums, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs_partial: double backward is not supported"):
        gradient.sum().backward()
