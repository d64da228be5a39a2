"""prefix_value_loss against fp64 plain PyTorch on padded rows, its gradient, golden vectors, its errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, RELEASES, edges

from ipvrm_kernels import backend, pack, prefix_value_loss, prefix_values, unpack
from ipvrm_kernels.prefix_value_loss import IMPLS, prefix_value_loss_reference

OP = "prefix_value_loss"
LENGTHS = (
    [0], [1], [2, 1], [5, 0, 1, 63, 2], [15, 16, 17, 64, 65, 0, 1], [1023, 1025, 1024], [4500, 7],
)  # fmt: skip


def oracle(log_ratio, lengths, outcome, beta, margin, weight, weighting, reduction, denominator=None):
    """Eq. 9, 17, 18 one sequence at a time, in log_ratio's dtype."""
    losses, omegas = [], []
    for b, row in enumerate(log_ratio.split(lengths)):
        T = len(row)
        t = torch.arange(1, T + 1, dtype=row.dtype)
        mean = beta * row.cumsum(0) / t
        omega = {"uniform": torch.ones_like(t), "late": t / max(T, 1), "early": 1 - t / max(T, 1)}[weighting]
        if weighting == "early" and T == 1:
            omega = torch.ones_like(t)
        sign = 1.0 if outcome[b] == 1 else -1.0
        loss = weight[b] * (omega * F.softplus(margin[b] - sign * mean, threshold=300)).sum()
        losses.append(loss / omega.sum() if reduction == "sequence_mean" and T else loss)
        omegas.append(omega.sum())
    if denominator is None:
        denominator = len(lengths) if reduction == "sequence_mean" else torch.stack(omegas).sum()
    total = torch.stack(losses).sum()
    return total / denominator if denominator > 0 else total * 0


def case(lengths, seed=0, level=0.3):
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    return dict(
        log_ratio=level * torch.randn(sum(lengths), generator=generator),
        outcome=torch.randint(0, 2, (B,), generator=generator),
        margin=5 * torch.rand(B, generator=generator),
        weight=0.5 + torch.rand(B, generator=generator),
    )


def value_and_gradient(function, log_ratio, dtype, device="cpu"):
    leaf = log_ratio.to(device, dtype, copy=True).requires_grad_()
    loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach().double().cpu(), gradient.double().cpu()


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:7]))
@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_value_and_gradient(impl, device, lengths, weighting, reduction, poisoned):
    inputs = case(lengths)
    log_ratio = inputs.pop("log_ratio")

    def plain(x):
        return oracle(x, lengths, beta=10.0, weighting=weighting, reduction=reduction, **inputs)

    def ours(x):
        on_device = {key: value.to(device) for key, value in inputs.items()}
        return prefix_value_loss(
            x, edges(lengths, device), **on_device, prefix_weighting=weighting, reduction=reduction, impl=impl
        )

    exact = value_and_gradient(plain, log_ratio, torch.float64)
    single = value_and_gradient(plain, log_ratio, torch.float32)
    got = value_and_gradient(ours, log_ratio, torch.float32, device)
    for mine, theirs, truth in zip(got, single, exact, strict=True):
        if truth.numel():
            scale = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + scale


def test_hand_worked(impl, device):
    # beta 2, margin 1. Row 1, r=1: means 2*.5 = 1, 2*(.5-.5)/2 = 0: softplus(0), softplus(1).
    # Row 2, r=0: mean 2*1 = 2: softplus(1+2). Mean over two rows; the first is its own mean.
    def softplus(z):
        return math.log1p(math.exp(z))

    x = torch.tensor([0.5, -0.5, 1.0], device=device)
    loss = prefix_value_loss(
        x, edges([2, 1], device), torch.tensor([1, 0], device=device), beta=2.0, margin=1.0, impl=impl
    )
    expected = ((softplus(0) + softplus(1)) / 2 + softplus(3)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    late = prefix_value_loss(
        x, edges([2, 1], device), torch.tensor([1, 0], device=device),
        beta=2.0, margin=1.0, prefix_weighting="late", reduction="token_mean", impl=impl,
    )  # fmt: skip
    # weights 1/2, 1 and 1
    assert late.item() == pytest.approx((0.5 * softplus(0) + softplus(1) + softplus(3)) / 2.5, rel=1e-6)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_micro_batches_add_up(impl, device, reduction):
    lengths = [7, 0, 40, 1, 300]
    inputs = case(lengths)
    cu, x = edges(lengths), inputs["log_ratio"]
    keywords = dict(prefix_weighting="late", reduction=reduction, impl=impl)

    def part(first, last, denominator):
        rows = slice(int(cu[first]), int(cu[last]))
        leaf = x[rows].to(device, copy=True).requires_grad_()
        loss = prefix_value_loss(
            leaf, (cu[first : last + 1] - cu[first]).to(device), inputs["outcome"][first:last].to(device),
            margin=inputs["margin"][first:last].to(device), weight=inputs["weight"][first:last].to(device),
            denominator=denominator, **keywords,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach().cpu(), gradient.cpu()

    divisor = 5.0 if reduction == "sequence_mean" else sum((T + 1) / 2 for T in lengths if T)
    whole_loss, whole_gradient = part(0, 5, None)
    parts = [part(0, 2, divisor), part(2, 3, torch.tensor(divisor)), part(3, 5, divisor)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole_gradient)


@pytest.mark.parametrize("level", [1e4, -1e4, 40.0, -40.0])
def test_extreme_ratios(impl, device, level):
    """softplus neither overflows nor loses its small tail: at z = -400 the loss is 0, at z = 1e5 it is z."""
    x = torch.full((6,), level / 10, device=device, requires_grad=True)
    loss = prefix_value_loss(x, edges([6], device), torch.ones(1, device=device), margin=0.0, impl=impl)
    expected = F.softplus(torch.tensor(-level, dtype=torch.float64), threshold=1000).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-37)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_empty_batch_is_zero_with_gradient(impl, device, lengths, reduction):
    x = torch.zeros(0, device=device, requires_grad=True)
    outcome = torch.ones(len(lengths), device=device)
    loss = prefix_value_loss(x, edges(lengths, device), outcome, reduction=reduction, impl=impl)
    assert loss.item() == 0.0
    loss.backward()
    assert x.grad.shape == (0,)


def test_gradient_is_weighted_by_upstream(impl, device):
    inputs = case([5, 9])
    x = inputs["log_ratio"].to(device)

    def gradient(factor):
        leaf = x.clone().requires_grad_()
        loss = prefix_value_loss(leaf, edges([5, 9], device), inputs["outcome"].to(device), impl=impl)
        (factor * loss).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(-3.0), -3.0 * gradient(1.0))


def test_reference_gradcheck():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    lengths = [1, 0, 5, 3]
    inputs = {key: value.double() for key, value in case(lengths).items() if key != "log_ratio"}
    for weighting in ("uniform", "late", "early"):
        for per_sequence in (True, False):

            def sums(x, weighting=weighting, per_sequence=per_sequence):
                return prefix_value_loss_reference(
                    x, edges(lengths), *inputs.values(), 2.0, weighting, per_sequence
                )[0]

            torch.autograd.gradcheck(sums, x)
            reduction = "sequence_mean" if per_sequence else "token_mean"
            torch.autograd.gradcheck(
                lambda x, w=weighting, r=reduction: prefix_value_loss(
                    x, edges(lengths), **inputs, beta=2.0, prefix_weighting=w, reduction=r
                ),
                x,
            )


@pytest.mark.parametrize("retain", [None, False])
def test_second_backward_is_refused(impl, device, retain):
    """retain_graph=False frees the graph, and the gradient in it, but is still being differentiated."""
    x = torch.randn(3, device=device, requires_grad=True)
    loss = prefix_value_loss(x, edges([3], device), torch.ones(1, device=device), impl=impl)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=retain)
    with pytest.raises(RuntimeError, match="prefix_value_loss: .* cannot be differentiated"):
        torch.autograd.grad((gradient * x).sum(), x)


def test_without_gradient_no_token_of_it_is_saved(impl, device, peak_of):
    x = torch.randn(20_000, device=device)
    cu, outcome = edges([7, 19_000, 993], device), torch.tensor([1.0, 0.0, 1.0], device=device)
    expected = prefix_value_loss(x.clone().requires_grad_(), cu, outcome, impl=impl).detach()

    def run():
        return (prefix_value_loss(x, cu, outcome, impl=impl),)

    torch.testing.assert_close(run()[0], expected, rtol=0, atol=0)
    if impl == "cpp":
        assert peak_of(run)[0] < 1000
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert not prefix_value_loss(leaf, cu, outcome, impl=impl).requires_grad


def test_upstream_of_the_gradient_is_not_lost():
    """d (c * loss) / d x with c a function of x: the first derivative takes both paths."""
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: prefix_value_loss(x, edges([3]), torch.ones(1)) * x.sum(), x)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=6),
    weighting=st.sampled_from(["uniform", "late", "early"]),
    reduction=st.sampled_from(["sequence_mean", "token_mean"]),
    beta=st.floats(0.01, 50),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, weighting, reduction, beta, seed):
    inputs = case(lengths, seed)
    log_ratio = inputs.pop("log_ratio")
    exact = oracle(log_ratio.double(), lengths, beta=beta, weighting=weighting, reduction=reduction, **inputs)
    got = prefix_value_loss(
        log_ratio, edges(lengths), **inputs, beta=beta, prefix_weighting=weighting, reduction=reduction
    )
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("edge", [64, 512, 1024])
def test_seeded_fault_dropped_carry_is_caught(edge):
    """A scan that forgets its carry where a block of the C++ kernel ends misses the bound."""
    lengths = [2 * edge]
    inputs = case(lengths)
    x = inputs["log_ratio"] + 0.2
    keywords = dict(outcome=inputs["outcome"], margin=inputs["margin"], weight=inputs["weight"])

    def right(x):
        return prefix_value_loss(x, edges(lengths), **keywords)

    def broken(x):
        halves = {key: value.repeat(2) for key, value in keywords.items()}
        return prefix_value_loss(x, edges([edge, edge]), **halves)

    exact = value_and_gradient(
        lambda x: oracle(x, lengths, beta=10.0, weighting="uniform", reduction="sequence_mean", **keywords),
        x, torch.float64,
    )  # fmt: skip
    for function, passes in ((right, True), (broken, False)):
        for got, truth in zip(value_and_gradient(function, x, torch.float32), exact, strict=True):
            assert ((got - truth).abs().max() <= 1e-5 * truth.abs().max()) == passes


@pytest.mark.slow
@pytest.mark.skipif(not backend.HAS_CPP, reason="the extension ipvrm_kernels._C is not built")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
def test_a_long_sequence_is_cut_into_pieces(threads, weighting, poisoned):
    """40,000 and 70,000 tokens: by one thread whole, by three in pieces; both as near to fp64 as PyTorch.

    The short ones fill several blocks that they share.
    """
    lengths = [50, 70_000, 3, 1030, 40_000] + [3] * 700 + [0, 70] + [40] * 30
    inputs = case(lengths, level=0.05)
    log_ratio = inputs.pop("log_ratio") + 0.01
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = value_and_gradient(
            lambda x: prefix_value_loss(
                x, edges(lengths), **inputs, prefix_weighting=weighting, impl="cpp"
            ),
            log_ratio, torch.float32,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)

    def plain(x):
        return oracle(x, lengths, beta=10.0, weighting=weighting, reduction="sequence_mean", **inputs)

    exact = value_and_gradient(plain, log_ratio, torch.float64)
    single = value_and_gradient(plain, log_ratio, torch.float32)
    for mine, theirs, truth in zip(got, single, exact, strict=True):
        scale = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + scale
    if weighting != "early":  # whose omega goes to 0 as 1 - t/T: no relative accuracy in fp32
        # each token of the gradient on its own scale: the small ones at the end are not lost in large sums
        assert ((got[1] - exact[1]) / exact[1]).abs().max() < 2e-6


@pytest.mark.slow
@pytest.mark.skipif(not backend.HAS_CPP, reason="the extension ipvrm_kernels._C is not built")
def test_softplus_and_sigmoid_keep_relative_accuracy():
    """One-token sequences with x = 0: the loss of each is softplus(margin), its gradient -sigmoid(margin)."""
    z = torch.cat([torch.linspace(-86.9, 86.9, 20_001), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 1e4, 3e38])])
    forward = IMPLS["cpp"].forward
    one, zero = torch.ones(1), torch.zeros(1)

    def at(z):
        tail = (None, None, z, 1.0, 1.0, "uniform", True, False, True)
        loss, (gradient,) = forward(zero, edges([1]), one, None, *tail)
        return loss.item(), gradient.item()

    loss, gradient = torch.tensor([at(margin) for margin in z.tolist()], dtype=torch.float64).T
    exact = F.softplus(z.double(), threshold=1000)
    ulp = torch.finfo(torch.float32).eps
    assert ((loss - exact) / exact).abs().max() < 4 * ulp
    assert ((gradient + torch.sigmoid(z.double())) / torch.sigmoid(z.double())).abs().max() < 4 * ulp
    # below -87 both are held at a normal number instead of going on into denormals
    assert all(loss < 2e-38 and abs(gradient) < 2e-38 for loss, gradient in map(at, (-88.0, -1e4, -3e38)))


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("denominator", [None, 3.0])
def test_a_number_is_the_tensor_of_it(impl, device, reduction, denominator):
    """Numbers are arguments of the kernel, tensors pointers: margin, weight and denominator either way."""
    inputs = case([5, 0, 1, 90, 1500])
    cu = edges([5, 0, 1, 90, 1500], device)
    outcome, ones = inputs["outcome"].to(device), torch.ones(5, device=device)
    results = []
    for margin, weight, divisor in ((2.5, None, denominator), (2.5 * ones, ones, denominator)):
        tensor = divisor if divisor is None or weight is None else torch.tensor(divisor, device=device)
        leaf = inputs["log_ratio"].to(device, copy=True).requires_grad_()
        loss = prefix_value_loss(
            leaf, cu, outcome, margin=margin, weight=weight, denominator=tensor, reduction=reduction,
            prefix_weighting="late", impl=impl,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("lengths", [[9, 20, 9], [1500, 1500, 1500]], ids=str)
def test_a_bad_token_stays_where_it_is(impl, device, value, lengths):
    """Its own sequence's gradient and the loss show it; its neighbours' gradients do not change."""
    inputs = {key: tensor.to(device) for key, tensor in case(lengths).items()}
    x = inputs.pop("log_ratio")
    bad = x.clone()
    bad[lengths[0] + 4] = value
    gradients = []
    for tokens in (x, bad):
        leaf = tokens.clone().requires_grad_()
        loss = prefix_value_loss(leaf, edges(lengths, device), **inputs, impl=impl)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert math.isnan(loss.item()) == math.isnan(value) or math.isinf(loss.item())
    for rows in (slice(0, lengths[0]), slice(lengths[0] + lengths[1], None)):
        torch.testing.assert_close(gradients[1][rows], gradients[0][rows], rtol=0, atol=0)


def test_unchecked_edges_stay_in_bounds(impl, device, unchecked):
    """On a GPU nobody checks the edges: kernels hold them to 0 .. N, and what lies behind is untouched."""
    buffers, tokens, cu, touched, guard = unchecked
    leaf = tokens.requires_grad_()
    loss = prefix_value_loss(leaf, cu, torch.ones(2, device=device), impl=impl)
    assert loss.isfinite()
    loss.backward()
    assert len(buffers) >= 2
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()
        inside = buffer[guard:-guard].cpu()
        assert (inside[~touched] == 7).all() and inside.isfinite().all()


def test_the_backward_can_run_twice(impl, device):
    inputs = {key: value.to(device) for key, value in case([5, 90]).items()}
    leaf = inputs.pop("log_ratio").requires_grad_()
    loss = prefix_value_loss(leaf, edges([5, 90], device), **inputs, impl=impl)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(second, kept, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_outcome_dtypes(impl, device, dtype):
    x = torch.randn(5, device=device)
    outcome = torch.tensor([1, 0], device=device)
    cu = edges([2, 3], device)
    plain = prefix_value_loss(x, cu, outcome, impl=impl)
    torch.testing.assert_close(prefix_value_loss(x, cu, outcome.to(dtype), impl=impl), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(log_ratio=torch.zeros(4, 1)), r"prefix_value_loss: log_ratio must be \(N,\)"),
        (dict(log_ratio=torch.zeros(4).long()), "floating point, got .* torch.int64"),
        (dict(cu_seqlens=edges([1, 1])), r"must rise from 0 to N=4 without decreasing, got \[0, 1, 2\]"),
        (dict(outcome=torch.ones(3)), r"outcome must be \(2,\) on cpu, got \(3,\)"),
        (dict(outcome=1.0), r"outcome must be a torch.Tensor, got float"),
        (dict(outcome=torch.tensor([1, 2])), r"outcome must be 0 or 1, got \[2.0\]"),
        (dict(outcome=torch.tensor([0.5, 1.0]).half()), r"outcome must be 0 or 1, got \[0.5\]"),
        (dict(outcome=torch.tensor([float("nan"), 1.0])), "outcome must be 0 or 1"),
        (dict(margin=float("nan")), "margin must be finite, got nan"),
        (dict(margin=torch.tensor([1.0, float("inf")])), r"margin must be finite, got \[inf\]"),
        (dict(margin=torch.ones(3)), r"margin must be \(2,\)"),
        (dict(weight=torch.ones(1, 2)), r"weight must be \(2,\)"),
        (dict(weight=torch.tensor([1.0, float("nan")])), r"weight must be finite, got \[nan\]"),
        (dict(beta=float("nan")), "beta must be finite, got nan"),
        (dict(prefix_weighting="last"), "prefix_weighting must be one of uniform, late, early, got 'last'"),
        (dict(reduction="mean"), "reduction must be one of sequence_mean, token_mean, got 'mean'"),
        (dict(margin=1e39), "margin must be finite in torch.float32, got 1e\\+39"),
        (dict(denominator=1e-50), "denominator must be positive and finite, got 1e-50"),
        (dict(denominator=0.0), "denominator must be positive and finite, got 0.0"),
        (dict(denominator=torch.tensor(-1.0)), "denominator must be positive and finite, got -1.0"),
        (dict(denominator=torch.ones(1)), r"denominator must be a number or 0-d, got shape \(1,\)"),
        (dict(impl="cuda"), "prefix_value_loss: impl='cuda' cannot run here"),
    ],
)
def test_errors(change, message):
    args = dict(log_ratio=torch.zeros(4), cu_seqlens=edges([1, 3]), outcome=torch.tensor([1, 0])) | change
    with pytest.raises(ValueError, match=message):
        prefix_value_loss(args.pop("log_ratio"), args.pop("cu_seqlens"), args.pop("outcome"), **args)


@pytest.mark.slow
def test_opcheck(impl, device):
    cu = edges([3, 4], device)
    x = torch.randn(7, device=device, requires_grad=True)
    outcome = torch.tensor([1.0, 0.0], device=device)
    ones = torch.ones(2, device=device)
    for tensors, beta, per_sequence in (
        ((ones, ones, ones[0].clone()), (2.0, None), True),
        ((None, None, None), (0.0, torch.tensor(2.0)), False),
    ):
        arguments = (x, cu, outcome, *tensors, 1.0, 0.0, *beta, "late", per_sequence, True, impl)
        torch.library.opcheck(torch.ops.ipvrm.prefix_value_loss, arguments)


def test_compile(impl, device):
    cu, outcome = edges([3, 4], device), torch.tensor([1.0, 0.0], device=device)
    x = torch.randn(7, device=device, requires_grad=True)
    compiled = torch.compile(
        lambda x: prefix_value_loss(x, cu, outcome, impl=impl) * 2, fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(prefix_value_loss(x, cu, outcome, impl=impl) * 2, x)
    torch.testing.assert_close(gradient, expected)


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
def golden(request):
    arrays = np.load(request.param)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_golden_files_exist():
    assert RELEASES, f"no release_*.npz in {GOLDEN}; set IPVRM_GOLDEN_DIR"


@pytest.mark.parametrize("kind", ["scalar", "tensor"])
def test_golden_online_loss(impl, device, golden, kind):
    packed, cu = pack(golden["log_ratio"], golden["mask"])
    leaf = packed.to(device).requires_grad_()
    margin = 5.0 if kind == "scalar" else golden["margin"].to(device)
    loss = prefix_value_loss(
        leaf, cu.to(device), golden["outcome"].to(device),
        margin=margin, weight=golden["weight"].to(device), impl=impl,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.cpu(), golden[f"ipvrm_{kind}_loss"].to(loss.dtype), rtol=1e-5, atol=0)
    gradient = unpack(leaf.grad.cpu(), cu, golden["mask"].shape[1])
    expected = golden[f"ipvrm_{kind}_grad"]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("margin", [0, 5])
def test_golden_offline_loss(impl, device, golden, margin):
    packed, cu = pack(golden["log_ratio"], golden["mask"])
    loss = prefix_value_loss(
        packed.to(device), cu.to(device), golden["outcome"].to(device),
        margin=float(margin), reduction="token_mean", impl=impl,
    )  # fmt: skip
    expected = golden[f"offline_token_mean_loss_m{margin}"]
    torch.testing.assert_close(loss.cpu(), expected.to(loss.dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["value", "mean_value"])
def test_golden_offline_values(golden, name):
    packed, cu = pack(golden["log_ratio"], golden["mask"])
    got = unpack(getattr(prefix_values(packed, cu), name), cu, golden["mask"].shape[1])
    expected = golden["offline_prefix_values" if name == "value" else "offline_mean_values"]
    valid = golden["mask"].bool()
    scale = 1e-5 * expected[valid].abs().max().item()
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-5, atol=scale)
