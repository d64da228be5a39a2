"""Saved probabilities of the Triton head: hard references, cancelling and absent gradients, row blocks."""

import importlib
import math

import pytest
import torch

from ipvrm_kernels import backend, linear_logprobs
from ipvrm_kernels.head import Transform

OP = "linear_distrl_loss"  # the tests below ask for impl="triton" and skip every other
pytestmark = pytest.mark.usefixtures("only_triton")

if backend.HAS_TRITON:
    triton_forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    saved = importlib.import_module("ipvrm_kernels.head.triton_saved")


def case(N=40, D=24, V=300, K=3, level=1.0, seed=0, dtype=torch.float32):
    """(hidden, weight, bias, ids, g): ids with duplicates and -1, g the gradient of their log-probs."""
    r = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=r) * level
    weight, bias = torch.randn(V, D, generator=r) / D**0.5, torch.randn(V, generator=r)
    ids = torch.randint(-1, V, (N, K), generator=r)
    ids[::2, 1], ids[:, 0] = ids[::2, 0], ids[:, 0].clamp(min=0)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids, torch.randn(N, K, generator=r)


def fused(inputs, device, softcap=None, limit=1 << 30, needs=(True, True, True), master=False):
    """[logprobs, dhidden, dweight, dbias] on the CPU and the row blocks, as if a loss had the gradient g.

    master: as where no rounded copy of the weight fits.
    """
    hidden, weight, bias, ids, g = (x.to(device) for x in inputs)
    seen = torch.full(g.shape, math.nan, device=device)
    called = []

    def given(r0, r1, logprobs):
        seen[r0:r1] = logprobs
        called.append((r0, r1))
        return torch.where(ids[r0:r1] >= 0, g[r0:r1], math.nan)  # NaN at unused slots may not leak

    transform = Transform(1.3, softcap, 0.8, hidden.dtype)
    ops = triton_forward.operands(hidden, weight, bias, transform, limit)
    ops = ops._replace(weight=weight) if master else ops
    found = saved.fused_gradients(OP, ops, ids, given, needs, limit, False)
    return [x.cpu() for x in (seen, *found)], called


def reference(inputs, dtype, softcap=None):
    """The same from materialised logits in `dtype`, operands as given."""
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    z = (hidden @ weight.T + bias) * 1.3
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.8
    log_p = torch.log_softmax(z, 1)
    owned = inputs[3] >= 0
    picked = torch.where(owned, log_p.gather(1, inputs[3].clamp(min=0)), -math.inf)
    loss = (torch.where(owned, picked, 0.0) * inputs[4]).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    return [picked.detach(), *gradients], z.detach().abs().max().item()


def check(inputs, device, **options):
    """err(op) <= 2 err(plain PyTorch in the operands' dtype) + 8 eps max|z|, for log-probs and gradients."""
    softcap = options.get("softcap")
    exact, largest = reference(inputs, torch.float64, softcap)
    plain, _ = reference(inputs, torch.float32, softcap)
    if inputs[0].dtype == torch.bfloat16:
        plain[1:] = reference(inputs, torch.bfloat16, softcap)[0][1:]  # its da is rounded to bf16 as well
    got, _ = fused(inputs, device, **options)
    slack = 8 * torch.finfo(torch.float32).eps * max(1.0, largest)
    for mine, theirs, truth in zip(got, plain, exact, strict=True):
        mine, theirs, truth = (torch.where(truth.isinf(), 0.0, x.double()) for x in (mine, theirs, truth))
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + slack
    return got


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(impl, device, dtype, softcap, poisoned):
    check(case(N=150, level=3.0, dtype=dtype), device, softcap=softcap)


@pytest.mark.parametrize("level", [1e4, 40.0, 0.0])
def test_hard_rows(impl, device, level):
    check(case(level=level), device)


@pytest.mark.parametrize("far", [[], [3, 7]])
def test_only_far_rows_are_moved(impl, device, far):
    """Where no row is far nothing is: neither copies of rows nor values."""
    hidden, weight = torch.randn(10, 24, device=device), torch.randn(200, 24, device=device)
    ops = triton_forward.operands(hidden, weight, None, Transform(1.0, None, 1.0, torch.float32))
    values = torch.empty(10, saved.padded_columns(ops), device=device)
    s, kept = saved.saved_stats(ops, hidden.new_empty(10, 0), False, values)
    kept.ref[far] -= 50.0
    before, scratch = values.clone(), torch.full_like(hidden, 7.0)
    ref = saved.rewrite_far_rows(ops, kept, s.top, None, scratch)
    assert torch.equal(scratch[: len(far)], hidden[far]) and (scratch[len(far) :] == 7.0).all()
    moved = (values != before).any(1).nonzero()[:, 0].tolist()
    assert moved == far and torch.equal(ref[far], s.top[far])


def far_case(jump, V=700):
    """Odd rows' best token is the last of the vocabulary, `jump` above the first tile and the ids."""
    hidden, weight, bias, ids, g = case(V=V)
    hidden[:, 0], weight[:, 0] = torch.arange(40) % 2, 0.0
    weight[V - 1] = 0.0
    weight[V - 1, 0] = jump
    return hidden, weight, bias, ids.clamp(max=V - 2), g


@pytest.mark.parametrize("jump", [15.0, 35.0, 200.0, 1e4])
def test_a_reference_far_below_the_maximum(impl, device, jump):
    inputs = far_case(jump)
    check(inputs, device)
    hidden, weight, bias, ids, g = (x.to(device) for x in inputs)
    required = hidden.clone().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    frozen = linear_logprobs(required, weight, ids, bias=bias, impl=impl)
    truth = linear_logprobs(exact, weight.double(), ids, bias=bias.double(), impl="torch")
    for out in (frozen, truth):
        (torch.where(ids >= 0, out.logprobs, 0.0) * g).sum().add(out.lse.sum()).backward()
    torch.testing.assert_close(required.grad.double(), exact.grad, rtol=1e-5, atol=1e-5 * max(1, jump / 10))


@pytest.mark.parametrize(
    "fault", ["far rows not written again", "ids not patched", "sparse rows not cleared"]
)
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    inputs = far_case(200.0)
    inputs[4][7:9] = torch.tensor([1.0, -1.0, 0.0])
    inputs[3][7:9] = torch.tensor([0, 1, -1])
    check(inputs, device)
    if fault == "far rows not written again":
        monkeypatch.setattr(saved, "rewrite_far_rows", lambda ops, kept, *_: kept.ref)
    if fault == "ids not patched":
        monkeypatch.setattr(saved, "patch", lambda *_: None)
    if fault == "sparse rows not cleared":
        monkeypatch.setattr(saved, "zero_rows", lambda *_: None)
    with pytest.raises(AssertionError):
        check(inputs, device)


@pytest.mark.parametrize("rest", [0.0, 1e-30, 1e-18, 1e-12, 1e-4])
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_gradients_that_cancel_in_sum(impl, device, rest, size):
    """G = `rest` while single gradients are near 1: what is divided by r must neither overflow nor vanish."""
    hidden, weight, bias, ids, g = case()
    ids[:, :3] = torch.tensor([3, 250, 77])
    g[:, 0], g[:, 1], g[:, 2] = size, -size, rest * size
    g[1::2] = 0
    got = check((hidden, weight, bias, ids, g), device)
    exact, _ = reference((hidden, weight, bias, ids, g), torch.float64)
    for mine, truth in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5 * size)
    assert (got[1][1::2] == 0).all()


def test_rows_without_a_gradient_add_exactly_nothing(impl, device):
    """Whatever they hold: NaN, or logits that overflow."""
    hidden, weight, bias, ids, g = case()
    idle = torch.arange(40) % 3 == 0
    g[idle] = 0
    clean = fused((hidden, weight, bias, ids, g), device)[0]
    dirty = hidden.clone()
    dirty[0], dirty[3], dirty[6] = math.nan, 3e38, math.inf
    got = fused((dirty, weight, bias, ids, g), device)[0]
    assert (got[1][idle] == 0).all()
    assert torch.equal(got[1][~idle], clean[1][~idle])
    assert torch.equal(got[2], clean[2]) and torch.equal(got[3], clean[3])
    nothing = fused((dirty, weight, bias, ids, torch.zeros_like(g)), device)[0]
    assert all((x == 0).all() for x in nothing[1:])


def test_row_blocks_and_recomputation_agree(impl, device, monkeypatch):
    """One block, two, and none (logits recomputed): the rule depends on dtype and workspace alone."""
    monkeypatch.setattr(saved, "LEAST_ROWS", (128, 128))  # a GPU's are more than this batch has
    inputs = case(N=150, V=900)
    whole, calls = fused(inputs, device)
    assert calls == [(0, 150)]
    hidden, weight, bias, ids, _ = (x.to(device) for x in inputs)
    ops = triton_forward.operands(hidden, weight, bias, Transform(1.0, None, 1.0, torch.float32))
    fixed, row = saved.saved_bytes(ops, 3, False)
    assert saved.saved_rows(ops, 3, False, True, fixed + 150 * row) == 150
    assert saved.saved_rows(ops, 3, False, True, fixed + 128 * row) == 128
    assert saved.saved_rows(ops, 3, False, True, fixed + 127 * row) == 0
    half = ops._replace(hidden=ops.hidden.half())
    assert saved.saved_rows(half, 3, False, True, 1 << 30) == 0
    for limit, blocks in ((fixed + 149 * row, [(0, 128), (128, 150)]), (fixed + 127 * row, [(0, 150)])):
        part, calls = fused(inputs, device, limit=limit)
        assert calls == blocks
        for mine, theirs in zip(part, whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(part[0], whole[0])


@pytest.mark.parametrize("limit", [1 << 30, 1], ids=["saved", "recomputed"])
def test_fp32_master_of_which_no_copy_fits(impl, device, limit, monkeypatch):
    """The weight is rounded tile by tile and part by part: the same as from a rounded copy, in fp32.

    Its values are bf16's own, since the interpreter truncates where a GPU rounds.
    """
    monkeypatch.setattr(saved, "CAST_BYTES", 0)
    hidden, weight, bias, ids, g = case(V=900)
    weight = weight.bfloat16().float()
    inputs = (hidden.bfloat16(), weight, bias, ids, g)
    copied = fused(inputs, device, limit=limit)[0]
    for mine, theirs in zip(fused(inputs, device, limit=limit, master=True)[0], copied, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    exact, _ = reference((hidden.bfloat16(), weight.bfloat16(), bias, ids, g), torch.float64)
    for mine, truth in zip(copied[1:], exact[1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=2**-7 * truth.abs().max().item())


def test_products_are_fp32_under_autocast(impl, device):
    """The gradients of a fused loss are formed in its forward, where autocast may be on."""
    inputs = case()
    whole = fused(inputs, device)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        got = fused(inputs, device)[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, whole, strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_needed(impl, device, needs):
    inputs = case()
    whole, got = fused(inputs, device)[0], fused(inputs, device, needs=needs)[0]
    for mine, theirs, need in zip(got[1:], whole[1:], needs, strict=True):
        assert torch.equal(mine, theirs) if need else mine.numel() == 0


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_frozen_head_in_row_blocks(impl, device, softcap, entropy):
    """Two blocks and recomputation give what one block gives; log-probs, lse and entropy bitwise."""
    hidden, weight, bias, ids, g = (x.to(device) for x in case(N=150, V=900, level=3.0))

    def run(limit):
        state = hidden.clone().requires_grad_()
        out = linear_logprobs(state, weight, ids, bias=bias, softcap=softcap, return_entropy=entropy,
                              max_workspace_bytes=limit, impl=impl)  # fmt: skip
        (torch.where(ids >= 0, out.logprobs, 0.0) * g).sum().add(out.lse.sin().sum()).backward()
        return [x.detach() for x in out if x is not None], state.grad

    ops = triton_forward.operands(hidden, weight, bias, Transform(1.0, softcap, 1.0, torch.float32))
    fixed, row = saved.saved_bytes(ops, 3, entropy)
    (outputs, gradient), least = run(None), saved.LEAST_ROWS[False]
    for limit in (fixed + 149 * row, fixed + (least - 1) * row):
        again, same = run(limit)
        assert all(torch.equal(x, y) for x, y in zip(again, outputs, strict=True))
        torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_accounting_is_close_to_what_is_allocated(impl, device, entropy, peak_of):
    """`saved_bytes` bounds what a frozen head's forward allocates besides its outputs, within a quarter."""
    hidden, weight, bias, ids, _ = (x.to(device) for x in case(N=150, V=1000))
    ops = triton_forward.operands(hidden, weight, bias, Transform(1.0, None, 1.0, torch.float32))
    fixed, row = saved.saved_bytes(ops, 3, entropy)
    blocks = 0 if device == "cpu" else 512 * 64  # a GPU's allocator rounds each tensor up
    for R in (150, 128):
        peak, kept = peak_of(lambda R=R: saved.saved_expectation(ops, ids, entropy, R))
        scratch = peak - sum(x.numel() * x.element_size() for x in kept)
        assert 0.75 * (fixed + R * row) <= scratch <= fixed + R * row + blocks


def test_a_frozen_head_costs_two_matmuls(impl, device, monkeypatch):
    """One of all logits (and of the first tile's again, for the references), one into the expectation."""
    counted = []
    for name in ("stats", "add_product", "launch_dz"):
        real = getattr(saved, name)

        def spied(*inputs, name=name, real=real, **options):
            counted.append((name, inputs))
            return real(*inputs, **options)

        monkeypatch.setattr(saved, name, spied)
    again = importlib.import_module("ipvrm_kernels.head.triton_backward")
    for name in ("expectation", "gradients"):  # that form the logits again
        monkeypatch.setattr(again, name, lambda *_, name=name: pytest.fail(name))
    hidden, weight, bias, ids, g = (x.to(device) for x in case(N=150, V=900))
    N, D, V = 150, 24, 900
    leaf = hidden.requires_grad_()
    out = linear_logprobs(leaf, weight, ids, bias=bias, impl=impl)
    torch.autograd.grad((torch.where(ids >= 0, out.logprobs, 0.0) * g).sum(), leaf)
    passes = [inputs[0] for name, inputs in counted if name == "stats"]
    assert [ops.hidden.shape[0] for ops in passes] == [N, N]
    assert [ops.weight.shape[0] for ops in passes] == [passes[0].config.BLOCK_V, V]
    products = [(x[1].shape, x[2].shape) for name, x in counted if name == "add_product"]
    assert products == [((N, V), (V, D))]
    assert all(inputs[1].num_active == 0 for name, inputs in counted if name == "launch_dz")
