"""linear_logprobs against log_softmax on materialised logits: values, gradients, hard rows, seeded faults."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_head

from ipvrm_kernels import backend, linear_logprobs
from ipvrm_kernels.head import matmul
from ipvrm_kernels.linear_logprobs import IMPLS

OP = "linear_logprobs"
OPTIONS = dict(bias=True, logit_scale=1.7, softcap=4.0, temperature=0.6)
PAIRS = [dict(pair) for pair in itertools.combinations(OPTIONS.items(), 2)]


def case(N=40, D=24, V=131, K=3, seed=0, level=1.0, shift=None, dtype=torch.float32, weight_dtype=None):
    """Random rows; ids hold duplicates and -1."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g) * level
    weight = torch.randn(V, D, generator=g) / D**0.5
    bias = torch.randn(V, generator=g) if shift is None else torch.full((V,), float(shift))
    ids = torch.randint(-1, V, (N, K), generator=g)
    if K > 1:
        ids[::2, 1] = ids[::2, 0]
    weight_dtype = weight_dtype or dtype
    return dict(hidden=hidden.to(dtype), weight=weight.to(weight_dtype), bias=bias.to(weight_dtype), ids=ids)


def leaves(inputs, wide, device="cpu", frozen=()):
    """Detached copies that require gradients, widened before use if `wide` is a dtype."""
    own = {
        name: inputs[name].to(device, copy=True).requires_grad_(name not in frozen)
        for name in ("hidden", "weight", "bias")
        if inputs[name] is not None
    }
    own.setdefault("bias", None)
    used = {k: v if wide is None or v is None else v.to(wide) for k, v in own.items()}
    return [v for v in own.values() if v is not None and v.requires_grad], used


def results(function, inputs, wide=None, device="cpu", frozen=(), upstream=True):
    """[logprobs, lse, entropy, gradients...] in fp64 on the CPU, under random upstream gradients."""
    required, used = leaves(inputs, wide, device, frozen)
    ids = inputs["ids"].to(device)
    logprobs, lse, entropy = function(used["hidden"], used["weight"], used["bias"], ids)[:3]
    g = torch.Generator().manual_seed(7)
    up = [torch.randn(x.shape, generator=g) for x in (logprobs, lse, entropy)]
    up[0] = torch.where(inputs["ids"] >= 0, up[0], math.nan if wide is None else 0.0)  # NaN at unused slots
    outputs = [logprobs, lse, entropy][: 3 if upstream else 2]
    pairs = [(x, u.to(x.device, x.dtype)) for x, u in zip(outputs, up, strict=False)]
    gradients = torch.autograd.grad([x for x, _ in pairs], required, [u for _, u in pairs])
    assert all(d.dtype == x.dtype for d, x in zip(gradients, required, strict=True))
    return [x.detach().double().cpu() for x in (logprobs, lse, entropy, *gradients)]


def check(inputs, impl, device, frozen=(), upstream=True, **options):
    """err(op) <= 2 err(plain PyTorch, fp32, same inputs) + 8 eps max|z|, for outputs and every gradient."""
    inputs = inputs if options.pop("bias", False) else {**inputs, "bias": None}

    def ours(hidden, weight, bias, ids):
        got = linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl, **options)
        assert {x.dtype for x in got} == {torch.float32}
        return got

    def plain(hidden, weight, bias, ids):
        return naive_head(hidden, weight, bias, ids, **options)

    exact = results(plain, inputs, torch.float64, frozen=frozen, upstream=upstream)
    single = results(plain, inputs, torch.float32, frozen=frozen, upstream=upstream)
    half = inputs["hidden"].dtype
    tensor_cores = impl == "triton" and half in (torch.bfloat16, torch.float16)
    if tensor_cores or (impl == "cpp" and matmul.library(half) == matmul.BRGEMM):
        # da is rounded once to the operands' dtype, which they multiply: so is plain PyTorch's
        single[3:] = results(plain, inputs, half, frozen=frozen, upstream=upstream)[3:]
    got = results(ours, inputs, None, device, frozen=frozen, upstream=upstream)
    doubles = [None if inputs[k] is None else inputs[k].double() for k in ("hidden", "weight", "bias")]
    z = naive_head(*doubles, inputs["ids"], **options)[3]
    # at least 1: at V = 1, |z| = 0.1 a gradient was one ulp of its upstream (1.2) off, plain's exact
    slack = 8 * torch.finfo(torch.float32).eps * max(1.0, z.abs().max().item() if z.numel() else 0.0)
    assert (got[0] <= 0).all()
    assert torch.equal(got[0].isinf(), exact[0].isinf())
    for mine, theirs, truth in zip(got, single, exact, strict=True):
        mine, theirs, truth = (torch.where(truth.isinf(), 0.0, x) for x in (mine, theirs, truth))
        if truth.numel():  # at V = 1, N = 1000 the sum that dbias is was one ulp of 59 off, plain's exact
            ulp = torch.finfo(torch.float32).eps * truth.abs().max() if truth.numel() == 1 else 0.0
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + max(slack, ulp)


@pytest.mark.parametrize("N", [0, 1, 63, 1000])
@pytest.mark.parametrize("V", [1, 50, 257, 1030])
def test_shapes(impl, device, N, V, poisoned):
    N = min(N, 150) if backend.INTERPRETED else N  # slow; two blocks of rows show as much
    check(case(N=N, V=V), impl, device, bias=True)


@pytest.mark.parametrize("K", [0, 1, 20])
def test_number_of_ids(impl, device, K):
    check(case(K=K), impl, device)


@pytest.mark.parametrize("options", PAIRS, ids=lambda o: "-".join(o))
def test_option_pairs(impl, device, options):
    check(case(level=3.0), impl, device, **options)


@pytest.mark.parametrize("level", [1.0, 1e4, 40.0], ids=["ordinary", "logits-1e4", "one-token-near-1"])
@pytest.mark.parametrize("shift", [0.0, -60.0], ids=["centred", "all-negative"])
def test_hard_rows(impl, device, level, shift):
    check(case(level=level, shift=shift), impl, device, bias=True)


def test_flat_rows_and_ties(impl, device):
    inputs = case(V=64)
    inputs["hidden"][:10] = 0
    inputs["weight"][1::2] = inputs["weight"][::2]
    check(inputs, impl, device)
    flat = linear_logprobs(torch.zeros(2, 4, device=device), torch.ones(64, 4, device=device),
                           torch.tensor([0, 63], device=device), return_entropy=True, impl=impl)  # fmt: skip
    torch.testing.assert_close(flat.logprobs.cpu(), torch.full((2,), -math.log(64)))
    torch.testing.assert_close(flat.entropy.cpu(), torch.full((2,), math.log(64)))


@pytest.mark.parametrize(
    "frozen", [("weight", "bias"), ("hidden",), ("bias",), ("hidden", "bias")], ids=lambda f: "-".join(f)
)
@pytest.mark.parametrize("upstream", [True, False], ids=["entropy-gradient", "no-entropy-gradient"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_frozen_inputs(impl, device, frozen, upstream, softcap):
    check(case(level=3.0), impl, device, frozen=frozen, upstream=upstream, bias=True, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_never_round_logits(impl, device, dtype):
    """The bound is fp32's although |z| reaches 30, where a bf16 logit is off by 0.06."""
    check(case(level=10.0, dtype=dtype), impl, device, bias=True)


def test_fp32_master_weight(impl, device):
    """Operands round to hidden's bf16, results do not; dweight is fp32 and not on bf16's grid."""
    inputs = case(dtype=torch.bfloat16, weight_dtype=torch.float32)
    required, used = leaves(inputs, None, device)
    out = linear_logprobs(
        used["hidden"], used["weight"], inputs["ids"].to(device), bias=used["bias"], impl=impl
    )
    rounded = [used["hidden"].float(), used["weight"].bfloat16().float(), used["bias"]]
    torch.testing.assert_close(out.lse, naive_head(*rounded, inputs["ids"].to(device))[1])
    _, dweight, dbias = torch.autograd.grad(out.lse.sum(), required)
    assert dweight.dtype == dbias.dtype == torch.float32
    assert not torch.equal(dweight, dweight.bfloat16().float())


def test_non_contiguous_and_tied(impl, device):
    """A strided hidden state, a transposed weight that is also the embedding, ids with a stride."""
    inputs = case(N=20, D=24, V=50)
    table = inputs["weight"].T.contiguous().to(device).T.requires_grad_()
    hidden = torch.stack([inputs["hidden"]] * 2, 2).to(device)[:, :, 1]
    ids = torch.stack([inputs["ids"].clamp(min=0)] * 2, 2).to(device)[:, :, 0]

    def loss(function):
        state = hidden + table[ids[:, 0]]
        return function(state).sum()

    (mine,) = torch.autograd.grad(loss(lambda h: linear_logprobs(h, table, ids, impl=impl).logprobs), table)
    (theirs,) = torch.autograd.grad(loss(lambda h: naive_head(h, table, None, ids)[0]), table)
    torch.testing.assert_close(mine, theirs)


def test_hand_worked(impl, device):
    # h = 1, z = (log 1, log 2, log 5): p = 1/8, 2/8, 5/8, lse = log 8, d log p_2 / dz = (-1/8, -2/8, 3/8)
    logits = torch.tensor([1.0, 2.0, 5.0]).log()
    weight = logits[:, None].to(device).requires_grad_()
    out = linear_logprobs(torch.ones(1, 1, device=device), weight, torch.tensor([2], device=device),
                          return_entropy=True, impl=impl)  # fmt: skip
    assert out.logprobs.tolist() == pytest.approx([math.log(5 / 8)])
    assert out.lse.tolist() == pytest.approx([math.log(8)])
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert out.entropy.tolist() == pytest.approx([entropy])
    out.logprobs.sum().backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([-1 / 8, -2 / 8, 3 / 8])


def test_masked_vocabulary(impl, device):
    """A bias of -inf removes a token: probability 0, no NaN in the entropy or any gradient."""
    inputs = case(V=9, K=1)
    inputs["bias"][4] = -math.inf
    required, used = leaves(inputs, None, device)
    ids = torch.zeros(40, dtype=torch.long, device=device)
    out = linear_logprobs(
        used["hidden"], used["weight"], ids, bias=used["bias"], return_entropy=True, impl=impl
    )
    gradients = torch.autograd.grad((out.logprobs + out.entropy).sum(), required)
    assert out.entropy.isfinite().all() and all(d.isfinite().all() for d in gradients)
    assert gradients[2][4] == 0


def test_row_does_not_depend_on_its_neighbours(impl, device):
    inputs = case(N=64)
    hidden, weight, ids = (inputs[k].to(device) for k in ("hidden", "weight", "ids"))
    whole = linear_logprobs(hidden, weight, ids, deterministic=True, impl=impl)
    part = linear_logprobs(hidden[7:9], weight, ids[7:9], deterministic=True, impl=impl)
    exact = dict(rtol=0, atol=0) if impl != "torch" else dict(rtol=0, atol=1e-5)  # a vendor matmul may differ
    torch.testing.assert_close(part.lse, whole.lse[7:9], **exact)
    again = linear_logprobs(hidden, weight, ids, deterministic=True, impl=impl)
    assert torch.equal(again.logprobs, whole.logprobs)


def faulty(name, launchers):
    """A launcher pair with one classic mistake."""

    def forward(hidden, weight, bias, *rest):  # a padded vocabulary tail of zero logits that nobody masked
        weight = torch.nn.functional.pad(weight, (0, 0, 0, 13))
        return launchers.forward(hidden, weight, torch.nn.functional.pad(bias, (0, 13)), *rest)

    def backward(dlogprobs, dlse, dentropy, *rest):
        if name == "dropped entropy gradient":
            dentropy = None
        if name == "upstream gradient of row 0":
            dlse = dlse[:1].expand_as(dlse)
        if name == "dropped sparse patch":  # G without the sum over ids
            g = torch.where(rest[3] >= 0, dlogprobs, 0.0)
            dlogprobs, dlse = None, dlse - g.sum(1)
        return launchers.backward(dlogprobs, dlse, dentropy, *rest)

    return launchers._replace(
        **{"forward": forward} if name == "dropped tail mask" else {"backward": backward}
    )


@pytest.mark.parametrize(
    "fault",
    ["dropped tail mask", "dropped entropy gradient", "upstream gradient of row 0", "dropped sparse patch"],
)
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    inputs = case(shift=-8.0)
    check(inputs, impl, device, bias=True)
    monkeypatch.setitem(IMPLS, impl, faulty(fault, IMPLS[impl]))
    with pytest.raises(AssertionError):
        check(inputs, impl, device, bias=True)


@pytest.mark.parametrize("options", [{}, *PAIRS, OPTIONS], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trainable", "frozen"])
def test_gradcheck(options, frozen):
    inputs = case(N=4, D=3, V=7, dtype=torch.float64, level=2.0)
    options = dict(options)
    bias = inputs["bias"] if options.pop("bias", False) else None
    fixed = [inputs["hidden"], inputs["weight"], bias]
    trained = [i for i, x in enumerate(fixed) if x is not None and not (frozen and i)]

    def function(entropy, *changed):
        arguments = list(fixed)
        for i, x in zip(trained, changed, strict=True):
            arguments[i] = x
        out = linear_logprobs(
            *arguments[:2], inputs["ids"], bias=arguments[2], return_entropy=entropy, **options
        )
        picked = torch.where(inputs["ids"] >= 0, out.logprobs, 0.0)
        return (picked, out.lse, out.entropy) if entropy else (picked, out.lse)

    for entropy in (False, True):
        variables = [fixed[i].clone().requires_grad_() for i in trained]
        torch.autograd.gradcheck(lambda *x, e=entropy: function(e, *x), variables)


@settings(max_examples=5 if backend.INTERPRETED else 30, deadline=None)  # the interpreter is slow
@given(
    N=st.integers(0, 20 if backend.INTERPRETED else 40), D=st.integers(1, 40),
    V=st.integers(1, 200 if backend.INTERPRETED else 300), K=st.integers(0, 6),
    level=st.floats(0.01, 30), shift=st.floats(-50, 50), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(impl, device, N, D, V, K, level, shift, seed):
    check(case(N, D, V, K, seed, level, shift), impl, device, bias=True)
