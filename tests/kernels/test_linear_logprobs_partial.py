"""Vocabulary shards merged equal the whole head: values, gradients, empty and masked shards, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_head

from ipvrm_kernels import backend, linear_logprobs, linear_logprobs_partial, merge_partials
from ipvrm_kernels.linear_logprobs_partial import IMPLS

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


def random_case(N=12, D=5, V=23, seed=0, level=1.0, shift=0.0, dtype=torch.float32):
    """(hidden, weight, bias), ids with -1."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g) * level, torch.randn(V, D, generator=g) / D**0.5
    variables = (hidden, weight, torch.randn(V, generator=g) + shift)
    return [x.to(dtype) for x in variables], torch.randint(-1, V, (N, 3), generator=g)


def outputs_and_gradients(function, variables, ids, wide=None, device="cpu"):
    """[logprobs, lse, entropy, dhidden, dweight, dbias] in fp64, under random upstream gradients.

    In `wide`, gradients are rounded to the variables' dtype; not in fp64, the truth.
    """
    exact = torch.float64 if wide == torch.float64 else None
    required = [x.to(device, exact, copy=True).requires_grad_() for x in variables]
    out = function(*(x if wide is None else x.to(wide) for x in required), ids.to(device))[:3]
    g = torch.Generator().manual_seed(7)
    up = [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in out]
    up[0] = torch.where(ids.to(device) >= 0, up[0], math.nan if wide is None else 0.0)
    return [x.detach().double().cpu() for x in (*out, *torch.autograd.grad(out, required, up))]


def check(impl, device, variables, ids, cuts, **options):
    """err(shards) <= 2 err(plain PyTorch, fp32, same inputs) + 8 eps max|z|, for outputs and every gradient.

    In bf16 or fp16 every shard's dhidden is rounded, and their sum again; Triton rounds da to the operands'
    dtype for the tensor cores, as plain PyTorch in it does.
    """

    def ours(*inputs):
        return merged(*inputs, cuts, impl=impl, **options)

    def plain(*inputs):
        return naive_head(*inputs, **options)

    dtype = variables[0].dtype
    exact = outputs_and_gradients(plain, variables, ids, torch.float64)
    single = outputs_and_gradients(plain, variables, ids, torch.float32)
    if impl == "triton" and dtype != torch.float32:
        single[3:] = outputs_and_gradients(plain, variables, ids, dtype)[3:]
    got = outputs_and_gradients(ours, variables, ids, None, device)
    z = naive_head(*(x.double() for x in variables), ids, **options)[3]
    largest = max(1.0, z.abs().max().item() if z.numel() else 0.0)
    assert (got[0] <= 0).all() and torch.equal(got[0].isinf(), exact[0].isinf())
    for i, (mine, theirs, truth) in enumerate(zip(got, single, exact, strict=True)):
        mine, theirs, truth = (torch.where(truth.isinf(), 0.0, x) for x in (mine, theirs, truth))
        if truth.numel():
            slack = 8 * torch.finfo(torch.float32).eps * largest
            if i == 3 and dtype != torch.float32:
                slack += len(cuts) * torch.finfo(dtype).eps * truth.abs().max().item()
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + slack


@pytest.mark.parametrize(("level", "options"), [(10.0, {}), (3.0, OPTIONS)], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_never_round_logits(impl, device, dtype, level, options):
    """The log-probs, lse and entropy of two uneven shards are fp32's although |z| reaches 30."""
    variables, ids = random_case(N=40, D=24, V=131, level=level, dtype=dtype)
    check(impl, device, variables, ids, [50], **options)


def test_all_negative_logits(impl, device):
    """A padded column of 0, or a maximum that began at 0, would hold all the probability or none."""
    check(impl, device, *random_case(shift=-60.0), [7, 8])


@settings(max_examples=3 if backend.INTERPRETED else 30, deadline=None)  # the interpreter is slow
@given(
    N=st.integers(0, 20), D=st.integers(1, 20), V=st.integers(1, 150), level=st.floats(0.01, 30),
    shift=st.floats(-50, 50), seed=st.integers(0, 2**31), places=st.lists(st.integers(1, 149), max_size=3),
)  # fmt: skip
def test_any_shards(impl, device, N, D, V, level, shift, seed, places):
    variables, ids = random_case(N, D, V, seed, level, shift)
    check(impl, device, variables, ids, sorted({place for place in places if place < V}))


def faulty(fault, launchers):
    """A launcher pair with one classic mistake."""

    def forward(hidden, weight, bias, *rest):
        if fault == "dropped tail mask":
            weight = torch.nn.functional.pad(weight, (0, 0, 0, 13))
            bias = torch.nn.functional.pad(bias, (0, 13))
        top, *sums = launchers.forward(hidden, weight, bias, *rest)
        return top.clamp(min=0) if fault == "maxima merged with 0" else top, *sums

    def backward(dsumexp, dsum_z_exp, did_logits, *rest):
        if fault == "upstream gradient of row 0":
            dsumexp = dsumexp[:1].expand_as(dsumexp)
        if fault == "dropped entropy gradient":
            dsum_z_exp = None
        if fault == "dropped sparse patch":
            did_logits = None
        return launchers.backward(dsumexp, dsum_z_exp, did_logits, *rest)

    return launchers._replace(forward=forward, backward=backward)


@pytest.mark.parametrize(
    "fault",
    ["dropped tail mask", "maxima merged with 0", "upstream gradient of row 0", "dropped entropy gradient",
     "dropped sparse patch"],
)  # fmt: skip
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    inputs = random_case(shift=-8.0)
    check(impl, device, *inputs, [9])
    monkeypatch.setitem(IMPLS, impl, faulty(fault, IMPLS[impl]))
    with pytest.raises(AssertionError):
        check(impl, device, *inputs, [9])


def test_autocast_rounds_operands_only(impl, device):
    variables, ids = random_case(N=40, D=24, V=131, level=10.0)
    hidden, weight, bias = (x.to(device).requires_grad_() for x in variables)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = merged(hidden, weight, bias, ids.to(device), [50], impl=impl)
        gradients = torch.autograd.grad(out.lse.sum(), (hidden, weight, bias))
    rounded = [x.bfloat16() for x in variables[:2]]
    exact = naive_head(*(x.double() for x in (*rounded, variables[2])), ids)
    for mine, truth in zip(out, exact, strict=False):
        torch.testing.assert_close(mine.double().cpu(), truth, rtol=1e-5, atol=1e-5)
    z = (rounded[0] @ rounded[1].T).float() + variables[2]
    assert (out.lse.cpu() - z.logsumexp(1)).abs().max() > 1e-3
    assert {x.dtype for x in (*out, *gradients)} == {torch.float32}


def test_non_contiguous_inputs(impl, device):
    """A strided hidden state, bias and ids, columns of a transposed weight: values and gradients."""
    variables, ids = random_case()
    variables = [x.to(device) for x in (*variables, ids)]

    def spaced(x):
        return torch.stack([torch.zeros_like(x), x], -1)[..., 1]

    def found(hidden, weight, bias, ids):
        required = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        out = merged(*required, ids, [9], impl=impl)
        return [*out, *torch.autograd.grad(loss(out, ids), required)]

    hidden, weight, bias, ids = variables
    strided = (spaced(hidden), weight.T.contiguous().T, spaced(bias), spaced(ids))
    assert not any(x.is_contiguous() for x in strided)
    for mine, theirs in zip(found(*strided), found(*variables), strict=True):
        torch.testing.assert_close(mine, theirs)


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


def test_an_empty_shard_adds_nothing(impl, device):
    """The neutral element of the merge, at every place of a head; its own gradients are zeros, not absent."""
    variables, ids = inputs(dtype=torch.float32, device=device)
    hidden, weight, bias = variables
    for at in (0, 5, len(weight)):
        shard = linear_logprobs_partial(
            hidden, weight[at:at], ids, vocab_start=at, bias=bias[at:at], impl=impl, **OPTIONS
        )
        assert bool((shard.max == -math.inf).all() and (shard.id_logits == -math.inf).all())
        assert not shard.sumexp.any() and not shard.sum_z_exp.any() and shard.id_logits.shape == ids.shape
        score = shard.sumexp.sum() + shard.sum_z_exp.sum()
        for gradient, x in zip(torch.autograd.grad(score, variables), variables, strict=True):
            assert gradient.shape == x.shape and not gradient.any()
        parts = merged(*variables, ids, sorted({0, at, 7}), impl=impl, **OPTIONS)
        whole = merged(*variables, ids, [], impl=impl, **OPTIONS)
        for mine, theirs in zip(parts, whole, strict=True):
            torch.testing.assert_close(mine, theirs)
        mine, theirs = (torch.autograd.grad(loss(out, ids), variables) for out in (parts, whole))
        torch.testing.assert_close(mine, theirs)


def test_an_empty_shard_compiles_and_checks(impl, device):
    (hidden, weight, bias), ids = inputs(dtype=torch.float32, device=device)
    weight, bias = weight.detach()[:0].requires_grad_(), bias.detach()[:0].requires_grad_()
    arguments = (hidden, weight, bias, ids, 1.0, None, 4.0, 0.7, None, torch.float32, impl)
    torch.library.opcheck(torch.ops.ipvrm.linear_logprobs_partial, arguments)


def test_gradcheck():
    variables, ids = inputs(N=4, D=3, V=7)

    def function(hidden, weight, bias):
        out = merged(hidden, weight, bias, ids, [3], **OPTIONS)
        return torch.where(ids >= 0, out.logprobs, 0.0), out.lse, out.entropy

    torch.autograd.gradcheck(function, variables)


@pytest.mark.slow
def test_opcheck(impl, device):
    (hidden, weight, bias), ids = inputs(dtype=torch.float32, device=device)
    arguments = (hidden, weight, bias, ids, 1.0, None, 4.0, 0.7, None, torch.float32, impl)
    torch.library.opcheck(torch.ops.ipvrm.linear_logprobs_partial, arguments)


@pytest.mark.slow
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
        linear_logprobs_partial(hidden, weight[:0].flatten(), ids, vocab_start=0)  # as ZeRO-3 leaves it
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
