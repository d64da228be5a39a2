"""segment_scan against a Python loop in fp64, its gradient, its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import edges

from ipvrm_kernels import backend, segment_scan
from ipvrm_kernels.segment_scan import segment_scan_reference

OP = "segment_scan"
LENGTHS = (
    [], [0], [1], [0, 1, 0], [5, 0, 1, 63, 2], [15, 16, 17, 64, 65, 0, 1], [1024, 1025, 1023], [5000, 3],
)  # fmt: skip


def loop(x, lengths, decay, reverse):
    """The definition, one token at a time, in Python floats."""
    out, start = [], 0
    for T in lengths:
        row, carry = [], 0.0
        tokens = x[start : start + T].double().tolist()
        for value in reversed(tokens) if reverse else tokens:
            carry = value + decay * carry
            row.append(carry)
        out += reversed(row) if reverse else row
        start += T
    return torch.tensor(out, dtype=torch.float64)


def bound(x, lengths, decay):
    """fp32 rounding of a sum of |x|: generous in the length, far below any real mistake."""
    scale = loop(x.abs().cpu(), lengths, abs(decay), False).max().item() if x.numel() else 0.0
    return 16 * torch.finfo(torch.float32).eps * max(scale, 1e-30)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:7]))
@pytest.mark.parametrize(
    ("decay", "reverse"), [(1.0, False), (1.0, True), (0.95, False), (0.5, True), (0.0, True)]
)
def test_matches_loop(impl, device, lengths, decay, reverse, poisoned):
    x = torch.randn(sum(lengths), device=device)
    y = segment_scan(x, edges(lengths, device), decay, reverse, impl=impl)
    assert y.dtype == torch.float32 and y.shape == x.shape
    expected = loop(x.cpu(), lengths, decay, reverse)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=bound(x, lengths, decay))


def test_hand_worked(impl, device):
    # forward, decay 1/2: [1, 2+.5, 4+1.25 | 8]   reverse: [1+2, 2+2, 4 | 8]
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
    assert segment_scan(x, edges([3, 1], device), 0.5, impl=impl).tolist() == [1.0, 2.5, 5.25, 8.0]
    assert segment_scan(x, edges([3, 1], device), 0.5, True, impl=impl).tolist() == [3.0, 4.0, 4.0, 8.0]


def test_gradient_is_the_transposed_scan(impl, device):
    lengths = [700, 0, 1, 1300]
    x = torch.randn(sum(lengths), device=device, requires_grad=True)
    upstream = torch.randn(sum(lengths), device=device)
    (segment_scan(x, edges(lengths, device), 0.9, impl=impl) * upstream).sum().backward()
    expected = loop(upstream.cpu(), lengths, 0.9, True)
    torch.testing.assert_close(x.grad.double().cpu(), expected, rtol=0, atol=bound(upstream, lengths, 0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_fp32(impl, device, dtype):
    x = torch.full((4096,), 0.1, dtype=dtype, device=device, requires_grad=True)
    y = segment_scan(x, edges([4096], device), impl=impl)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[-1].item(), 4096 * x[0].item(), rtol=1e-5, atol=0)
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_accepts_non_contiguous_input(impl, device):
    x = torch.randn(40, 3, device=device)[:, 1]
    torch.testing.assert_close(
        segment_scan(x, edges([13, 27], device), impl=impl),
        segment_scan(x.contiguous(), edges([13, 27], device), impl="torch"),
    )


def test_long_sequence_keeps_fp32_accuracy(impl, device):
    x = torch.full((40_000,), 1e-3, device=device)
    y = segment_scan(x, edges([40_000], device), impl=impl)
    # one fp32 accumulator ends 2.6e-4 low; blocks of 1024 summed in order, 8e-6 (both measured)
    torch.testing.assert_close(y[-1].item(), 40_000 * x[0].item(), rtol=2e-5, atol=0)


@pytest.mark.skipif(not backend.HAS_CPP, reason="the extension ipvrm_kernels._C is not built")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_sequence_is_cut_into_pieces(threads, reverse, poisoned):
    """Same-signed tokens, so that sums grow to 1e6 times a token: 2 ulp of each sum, whole or in pieces."""
    lengths = [50, 40_000, 3, 1030, 200_000] + [3] * 700 + [0, 70] + [40] * 30
    x = 0.5 + torch.rand(sum(lengths))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = segment_scan(x, edges(lengths), reverse=reverse, impl="cpp").double()
    finally:
        torch.set_num_threads(before)
    exact = torch.cat(
        [row.flip(0).cumsum(0).flip(0) if reverse else row.cumsum(0) for row in x.double().split(lengths)]
    )
    assert ((y - exact) / exact).abs().max() < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [0.999, 0.9999, -0.999])
def test_a_decay_near_one_keeps_its_digits(impl, device, decay, reverse):
    """A decay of 0.999 in fp32 puts every sum 1e-5 off; in double only sums are rounded, in cpp once."""
    N = 4_096 if backend.INTERPRETED else 32_768  # slow
    x = 0.5 + torch.rand(N, device=device)
    y = segment_scan(x, edges([N], device), decay, reverse, impl=impl).double().cpu()
    exact = loop(x.cpu(), [N], decay, reverse)
    scale = exact.abs() if decay > 0 else exact.abs().max()  # alternating sums cancel
    error = ((y - exact) / scale).abs().max()
    assert error < (1e-7 if impl == "cpp" else 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_bad_token_leaves_those_before_it(impl, device, value, decay):
    x = torch.ones(2100, device=device)
    x[1100] = value
    y = segment_scan(x, edges([2100], device), decay, impl=impl)
    clean = segment_scan(torch.ones_like(x), edges([2100], device), decay, impl=impl)
    torch.testing.assert_close(y[:1100], clean[:1100], rtol=1e-6, atol=0)
    assert not y[1100:].isfinite().any()


def test_nan_stays_in_its_sequence(impl, device):
    x = torch.ones(9, device=device)
    x[1] = float("nan")
    y = segment_scan(x, edges([3, 6], device), impl=impl)
    assert y[3:].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_unchecked_edges_stay_in_bounds(impl, device, unchecked):
    """On a GPU nobody checks the edges: kernels hold them to 0 .. N, and what lies behind is untouched."""
    buffers, tokens, cu, touched, guard = unchecked
    for reverse in (False, True):
        segment_scan(tokens, cu, 0.5, reverse, impl=impl)
    assert len(buffers) == 2
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()
        inside = buffer[guard:-guard].cpu()
        assert (inside[~touched] == 7).all() and inside.isfinite().all()


def test_reference_gradcheck():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu = edges([1, 0, 5, 3])
    for reverse in (False, True):
        torch.autograd.gradcheck(lambda x, r=reverse: segment_scan_reference(x, cu, 0.7, r), x)
        torch.autograd.gradcheck(lambda x, r=reverse: segment_scan(x, cu, 0.7, r), x)
        torch.autograd.gradgradcheck(lambda x, r=reverse: segment_scan(x, cu, 0.7, r), x)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=8),
    decay=st.floats(-1, 1),
    reverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, decay, reverse, seed):
    x = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    expected = loop(x, lengths, decay, reverse)
    for impl in (None, "torch"):
        y = segment_scan(x, edges(lengths), decay, reverse, impl=impl).double()
        torch.testing.assert_close(y, expected, rtol=0, atol=bound(x, lengths, decay))


@pytest.mark.parametrize("edge", [64, 1024])
def test_seeded_fault_carry_reset_is_caught(edge):
    """A scan that forgets its carry at a block edge must fail the comparison the tests above make."""
    lengths = [edge + 1]
    x = torch.randn(edge + 1)
    broken = torch.cat([segment_scan(x[:edge], edges([edge])), x[edge:]])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            broken.double(), loop(x, lengths, 1.0, False), rtol=0, atol=bound(x, lengths, 1.0)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 2)), r"segment_scan: x must be \(N,\) floating point, got \(2, 2\)"),
        (dict(x=torch.zeros(4, dtype=torch.long)), "x must be .* floating point, got .* torch.int64"),
        (
            dict(cu_seqlens=torch.tensor([0, 4])),
            r"cu_seqlens must be \(B\+1,\) int32, got \(2,\) torch.int64",
        ),
        (dict(cu_seqlens=edges([4])[None]), r"cu_seqlens must be \(B\+1,\) int32"),
        (dict(cu_seqlens=edges([5])), "must rise from 0 to N=4"),
        (
            dict(cu_seqlens=torch.tensor([0, 3, 1, 4], dtype=torch.int32)),
            r"without decreasing, got \[0, 3, 1, 4\]",
        ),
        (dict(cu_seqlens=torch.tensor([1, 4], dtype=torch.int32)), "must rise from 0"),
        (dict(cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")), "cu_seqlens is on meta"),
        (dict(decay=float("nan")), "decay must be finite, got nan"),
        (dict(decay=1.001), r"segment_scan: decay must be within -1 .. 1, got 1.001"),
        (dict(decay=-1e200, impl="torch"), r"decay must be within -1 .. 1, got -1e\+200"),
        (dict(impl="fast"), "no such implementation; the names are torch, cpp, triton, cuda"),
        (dict(impl="cuda"), "impl='cuda' cannot run here"),
    ],
)
def test_errors(change, message):
    args = dict(x=torch.zeros(4), cu_seqlens=edges([4])) | change
    with pytest.raises(ValueError, match=message):
        segment_scan(args.pop("x"), args.pop("cu_seqlens"), **args)


def test_fp64_needs_the_reference():
    assert segment_scan(torch.zeros(1).double(), edges([1])).dtype == torch.float64
    with pytest.raises(ValueError, match="fp64 inputs need impl='torch'"):
        segment_scan(torch.zeros(1).double(), edges([1]), impl="cpp")


@pytest.mark.slow
def test_opcheck(impl, device):
    cu = edges([3, 4], device)
    x = torch.randn(7, device=device, requires_grad=True)
    for decay in ((0.9, None), (0.0, torch.tensor(0.9))):  # a number goes in as a float or as a tensor
        torch.library.opcheck(torch.ops.ipvrm.segment_scan, (x, cu, *decay, False, impl))


def test_compile(impl, device):
    cu = edges([3, 4], device)
    x = torch.randn(7, device=device, requires_grad=True)
    compiled = torch.compile(
        lambda x: segment_scan(x, cu, 0.9, impl=impl).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(segment_scan(x, cu, 0.9, impl=impl).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
