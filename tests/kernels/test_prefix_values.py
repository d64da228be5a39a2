"""prefix_values against fp64 plain PyTorch on each sequence alone, every gradient, its errors."""

import math

import pytest
import torch
from oracles import edges

from ipvrm_kernels import backend, prefix_values
from ipvrm_kernels.prefix_values import prefix_values_reference

OP = "prefix_values"
LENGTHS = (
    [0], [1], [5, 0, 1, 63, 2], [15, 16, 17, 64, 65, 0, 1], [1023, 1025, 1024], [4500],
)  # fmt: skip
NAMES = ("value", "mean_value", "prob", "td")


def oracle(log_ratio, lengths, beta):
    """(4, N): every sequence by itself, torch.cumsum, any float dtype, differentiable."""
    pieces = []
    for row in log_ratio.split(lengths):
        value = beta * row.cumsum(0)
        mean = value / torch.arange(1, len(row) + 1, dtype=row.dtype)
        pieces.append(torch.stack([value, mean, mean.sigmoid(), beta * row]))
    return torch.cat(pieces, dim=1) if pieces else log_ratio.new_zeros(4, 0)


def assert_as_good_as_torch(got, plain, exact, scale):
    """err(op) <= 2 err(plain PyTorch, fp32) + 8 eps scale, as maxima over the tensor."""
    if not exact.numel():
        return
    error = (got.double().cpu() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * scale
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:7]))
@pytest.mark.parametrize("level", [0.05, 3.0])
def test_values_and_gradients(impl, device, lengths, level, poisoned):
    N = sum(lengths)
    x = level * torch.randn(N)
    upstream = torch.randn(4, N)
    runs = {}
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        values = oracle(leaf, lengths, 10.0)
        (gradient,) = torch.autograd.grad((values * upstream.to(dtype)).sum(), leaf)
        runs[dtype] = values.detach(), gradient
    leaf = x.to(device, copy=True).requires_grad_()
    out = prefix_values(leaf, edges(lengths, device), impl=impl)
    sum((a * b).sum() for a, b in zip(out, upstream.to(device), strict=True)).backward()
    for i, name in enumerate(NAMES):
        got = getattr(out, name)
        assert got.shape == (N,) and got.dtype == torch.float32
        exact = runs[torch.float64][0][i]
        scale = exact.abs().max().item() if N else 0.0
        assert_as_good_as_torch(got.detach(), runs[torch.float32][0][i], exact, max(scale, 1.0))
    exact = runs[torch.float64][1]
    scale = exact.abs().max().item() if N else 0.0
    assert_as_good_as_torch(leaf.grad, runs[torch.float32][1], exact, scale)


@pytest.mark.skipif(not backend.HAS_CPP, reason="the extension ipvrm_kernels._C is not built")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_sequence_is_cut_into_pieces(threads, poisoned):
    """Above 8192 tokens (no table of 1/t) and cut among three threads: as near to fp64 as PyTorch is."""
    lengths = [50, 40_000, 3, 1030, 9001] + [3] * 700 + [0, 70] + [40] * 30
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_values_and_gradients("cpp", "cpu", lengths, 0.05, None)
        for used in NAMES:
            test_unused_outputs_have_no_gradient("cpp", "cpu", used, [20_000, 3])
    finally:
        torch.set_num_threads(before)


def test_no_sequences(impl, device):
    x = torch.zeros(0, device=device, requires_grad=True)
    sum(part.sum() for part in prefix_values(x, edges([], device), impl=impl)).backward()
    assert x.grad.shape == (0,)


def test_hand_worked(impl, device):
    # beta 2: values 2*.5 = 1, 2*(.5-1.5) = -2; means 1, -1; td 1, -3. Then a sequence of one: value = td = 4.
    out = prefix_values(
        torch.tensor([0.5, -1.5, 2.0], device=device), edges([2, 1], device), beta=2.0, impl=impl
    )
    assert out.value.tolist() == [1.0, -2.0, 4.0]
    assert out.mean_value.tolist() == [1.0, -1.0, 4.0]
    assert out.td.tolist() == [1.0, -3.0, 4.0]
    expected = [1 / (1 + math.exp(-v)) for v in (1.0, -1.0, 4.0)]
    torch.testing.assert_close(out.prob.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("used", NAMES)
@pytest.mark.parametrize("lengths", [[3, 1030]], ids=str)
def test_unused_outputs_have_no_gradient(impl, device, used, lengths):
    x = 0.1 * torch.randn(sum(lengths))
    leaf = x.to(device, copy=True).requires_grad_()
    getattr(prefix_values(leaf, edges(lengths, device), impl=impl), used).square().sum().backward()
    plain = x.double().requires_grad_()
    oracle(plain, lengths, 10.0)[NAMES.index(used)].square().sum().backward()
    scale = plain.grad.abs().max().item()
    torch.testing.assert_close(leaf.grad.double().cpu(), plain.grad, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_saturated_sigmoid_is_finite(impl, device, level):
    x = torch.full((4,), level, device=device, requires_grad=True)
    out = prefix_values(x, edges([4], device), impl=impl)
    assert out.prob.tolist() == [1.0 if level > 0 else pytest.approx(0.0, abs=1e-37)] * 4
    out.prob.sum().backward()
    assert x.grad.abs().max() <= 1e-30


def test_unchecked_edges_stay_in_bounds(impl, device, unchecked):
    """On a GPU nobody checks the edges: kernels hold them to 0 .. N, and what lies behind is untouched."""
    buffers, tokens, cu, touched, guard = unchecked
    leaf = tokens.requires_grad_()
    results = prefix_values(leaf, cu, impl=impl)
    torch.autograd.grad(results, leaf, [torch.ones_like(tokens)] * 4)
    assert len(buffers) == 5
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()
        inside = buffer[guard:-guard].cpu()
        assert (inside[~touched] == 7).all() and inside.isfinite().all()


def test_reference_gradcheck():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu = edges([1, 0, 5, 3])
    torch.autograd.gradcheck(lambda x: prefix_values_reference(x, cu, 2.0), x)
    torch.autograd.gradcheck(lambda x: tuple(prefix_values(x, cu, 2.0)), x)


def test_second_backward_is_refused():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(prefix_values(x, edges([3])).prob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="prefix_values"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(log_ratio=torch.zeros(2, 2)),
            r"prefix_values: log_ratio must be \(N,\) floating point, got \(2, 2\)",
        ),
        (dict(log_ratio=torch.zeros(4).int()), "floating point, got .* torch.int32"),
        (dict(cu_seqlens=edges([5])), "prefix_values: cu_seqlens must rise from 0 to N=4"),
        (dict(cu_seqlens=edges([4]).long()), "must be .* int32"),
        (dict(beta=float("inf")), "prefix_values: beta must be finite, got inf"),
        (dict(impl="cuda"), "cannot run here"),
    ],
)
def test_errors(change, message):
    args = dict(log_ratio=torch.zeros(4), cu_seqlens=edges([4])) | change
    with pytest.raises(ValueError, match=message):
        prefix_values(**args)


@pytest.mark.slow
def test_opcheck(impl, device):
    cu = edges([3, 4], device)
    x = torch.randn(7, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.ipvrm.prefix_values, (x, cu, 0.0, torch.tensor(2.0), impl))


def test_compile(impl, device):
    cu = edges([3, 4], device)
    x = torch.randn(7, device=device, requires_grad=True)

    def function(x):
        out = prefix_values(x, cu, impl=impl)
        return out.prob.sum() + out.td.square().sum()

    (gradient,) = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x)
    (expected,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(gradient, expected)
