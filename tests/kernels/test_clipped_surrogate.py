"""clipped_surrogate: the four regions by hand, gradients, unused elements, golden policy losses, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, RELEASES, surrogate

from ipvrm_kernels import clipped_surrogate
from ipvrm_kernels.clipped_surrogate import IMPLS, clipped_surrogate_reference

OP = "clipped_surrogate"


def run(new, old, advantage, impl, device, **options):
    """(loss, gradient under a random upstream divided by it, clipped, dual_clipped), fp64 on the CPU."""
    leaf = new.to(device, copy=True).requires_grad_()
    out = clipped_surrogate(leaf, old.to(device), advantage.to(device), impl=impl, **options)
    upstream = torch.rand(new.shape, dtype=out.loss.dtype) + 0.5
    (gradient,) = torch.autograd.grad(out.loss, leaf, upstream.to(device))
    return (
        out.loss.detach().double().cpu(),
        gradient.double().cpu() / upstream.double(),
        *(x.cpu() for x in out[1:]),
    )


# rho = exp(new - old) is set by new = log rho, old = 0; clip 0.2 / 0.28, dual clip 3
REGIONS = [
    # rho, A, loss, derivative, clipped, dual
    (1.0, 2.0, -2.0, -2.0, False, False),  # inside: -A rho
    (1.5, 2.0, -2.56, 0.0, True, False),  # above, A > 0: -A * 1.28
    (0.5, 2.0, -1.0, -1.0, False, False),  # below, A > 0: the unclipped branch is larger
    (1.5, -2.0, 3.0, 3.0, False, False),  # above, A < 0: the unclipped branch is larger
    (0.5, -2.0, 1.6, 0.0, True, False),  # below, A < 0: -A * 0.8
    (4.0, -2.0, 6.0, 0.0, False, True),  # far above, A < 0: at most -3 A
    (4.0, 0.0, 0.0, 0.0, False, False),  # nothing to say
    (0.0, 2.0, 0.0, 0.0, False, False),  # new log-prob -inf: rho 0
    (0.0, -2.0, 1.6, 0.0, True, False),
]


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_regions(impl, device, region):
    rho, advantage, *expected = region
    new = torch.tensor([rho]).log()
    got = run(new, torch.zeros(1), torch.tensor([advantage]), impl, device, dual_clip=3.0)
    assert [x.item() for x in got] == pytest.approx(expected, rel=1e-6)


def test_no_dual_clip_by_default(impl, device):
    loss, derivative, _, dual = run(
        torch.tensor([4.0]).log(), torch.zeros(1), torch.tensor([-2.0]), impl, device
    )
    assert (loss.item(), derivative.item(), dual.item()) == (pytest.approx(8.0), pytest.approx(8.0), False)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.floats(-3, 3)), max_size=20
    ),
    low=st.floats(0, 1), high=st.floats(0, 2), dual=st.none() | st.floats(1.01, 10),
)  # fmt: skip
def test_any_element(rows, low, high, dual):
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    expected = torch.tensor(
        [surrogate(*row, low, high, dual) for row in table.tolist()], dtype=torch.float64
    ).reshape(-1, 4)
    got = run(*table.unbind(1), "torch", "cpu", clip_low=low, clip_high=high, dual_clip=dual)
    for mine, truth in zip(got, expected.unbind(1), strict=True):
        torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (4099,), (7, 10), (3, 0), (2, 3, 5)], ids=str)
def test_shapes_and_dtypes(impl, device, dtype, shape, poisoned):
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("fp64 runs in the reference")
    new, old, advantage = (
        -torch.rand(shape).to(dtype),
        -torch.rand(shape).to(dtype),
        torch.randn(shape).to(dtype),
    )
    got = run(new, old, advantage, impl, device, dual_clip=1.5)
    rows = zip(*(x.double().flatten().tolist() for x in (new, old, advantage)), strict=True)
    expected = torch.tensor([surrogate(*row, 0.2, 0.28, 1.5) for row in rows], dtype=torch.float64).reshape(
        *shape, 4
    )
    tolerance = (
        1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
    )  # of the gradient
    assert torch.equal(got[2], expected[..., 2].bool()) and torch.equal(got[3], expected[..., 3].bool())
    torch.testing.assert_close(got[0], expected[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[..., 1], rtol=tolerance, atol=1e-6)
    leaf = new.to(device).requires_grad_()
    out = clipped_surrogate(leaf, old.to(device), advantage.to(device), impl=impl)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.loss.sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.shape == shape


def test_unused_elements(impl, device):
    """Old log-prob -inf: loss 0, gradient 0, clipped False, whatever the other inputs and the upstream."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 5.0])
    new = bad.clone().to(device).requires_grad_()
    old = torch.full((5,), -math.inf, device=device)
    out = clipped_surrogate(new, old, bad.flip(0).to(device), dual_clip=2.0, impl=impl)
    assert out.loss.tolist() == [0.0] * 5
    assert not out.clipped.any() and not out.dual_clipped.any()
    out.loss.backward(torch.full_like(out.loss, math.nan))
    assert new.grad.tolist() == [0.0] * 5


def test_overflowing_ratio(impl, device):
    """rho = exp(200) = inf: A > 0 is clipped, A = 0 silent, A < 0 needs the dual clip."""
    new, old = torch.zeros(3), torch.full((3,), -200.0)
    loss, derivative, clipped, dual = run(
        new, old, torch.tensor([1.0, 0.0, -1.0]), impl, device, dual_clip=3.0
    )
    assert loss.tolist() == pytest.approx([-1.28, 0.0, 3.0])
    assert derivative.tolist() == [0.0, 0.0, 0.0]
    assert clipped.tolist() == [True, False, False] and dual.tolist() == [False, False, True]


def test_ratio_to_an_ulp_at_any_size(impl, device):
    """loss = rho (A = -1, nothing clips) from the least to the greatest finite exp, its edges, inf and 0."""
    x = torch.linspace(-87.0, 88.5, 40_001)
    ones = torch.ones_like(x)
    rho, derivative, clipped, _ = run(x, 0 * x, -ones, impl, device, clip_low=1.0)
    exact = x.double().exp()
    bound = 1.1 * 2.0**-23  # measured 0.71 (cpp), 0.53 (torch)
    if impl == "triton":  # NumPy's is good to 2.6; the GPU's exp2 takes a rounded product of x
        bound = 2.6 * 2.0**-23 + x.abs().double() * 2.0**-24
    assert ((rho - exact).abs() <= bound * exact).all()
    assert not clipped.any()
    small = x < 88  # run() multiplied the gradient by an upstream of up to 1.5 and divided it again
    torch.testing.assert_close(derivative[small], rho[small], rtol=1e-6, atol=0)
    edges = torch.tensor([-math.inf, -1e30, -104.5, -100.0, -88.0, 0.0, 88.72, 88.73, 1e30, math.inf])
    rho = run(edges, torch.zeros(10), -torch.ones(10), impl, device, clip_low=1.0)[0]
    torch.testing.assert_close(rho, edges.exp().double(), rtol=1e-5, atol=2.0**-126)


@pytest.mark.parametrize("count", [4095, 4097, 70_001])
def test_many_elements(impl, device, count, poisoned):
    """Every block and thread, a tail that fills no vector, and no element misplaced: the oracle in fp64."""
    new, old = -3 * torch.rand(2, count)
    for bound in (0.8, 1.28, 1.5):  # no rho that rounding puts on either side of a clip
        new = torch.where(((new - old).exp() - bound).abs() < 1e-5, old, new)
    advantage = torch.randn(count)
    old[::5], advantage[::7] = -math.inf, 0.0
    got = run(new, old, advantage, impl, device, dual_clip=1.5)
    loss, clipped, dual, derivative = clipped_surrogate_reference(
        new.double(), old.double(), advantage.double(), 0.2, 0.28, 1.5
    )
    for mine, truth in zip(got, (loss, derivative, clipped, dual), strict=True):
        torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-5, atol=0)


def test_nan_is_not_hidden(impl, device):
    new = torch.tensor([math.nan, -1.0, -1.0, -1.0])
    old = torch.tensor([-1.0, math.nan, -1.0, -1.0])
    advantage = torch.tensor([1.0, 1.0, math.nan, 1.0])
    loss = run(new, old, advantage, impl, device)[0]
    assert loss.isnan().tolist() == [True, True, True, False]


def test_gradcheck():
    new = -torch.rand(40, dtype=torch.float64) * 2
    old = -torch.rand(40, dtype=torch.float64) * 2
    old[::9] = -math.inf
    advantage = torch.randn(40, dtype=torch.float64)
    for dual in (None, 1.5):
        for function in (
            lambda x, d=dual: clipped_surrogate(x, old, advantage, dual_clip=d).loss,
            lambda x, d=dual: clipped_surrogate_reference(x, old, advantage, 0.2, 0.28, d)[0],
        ):
            torch.autograd.gradcheck(function, new.clone().requires_grad_())


def test_inputs_without_gradient(impl, device):
    old, advantage = (torch.randn(4, device=device, requires_grad=True) for _ in range(2))
    assert not clipped_surrogate(torch.randn(4, device=device), old, advantage, impl=impl).loss.requires_grad
    new = torch.randn(4, device=device, requires_grad=True)
    clipped_surrogate(new, old, advantage, impl=impl).loss.sum().backward()
    assert old.grad is None and advantage.grad is None and new.grad is not None


def test_seeded_faults_are_caught(impl, device, monkeypatch):
    """A dual clip applied to A > 0 and a gradient that ignores the upstream both fail the region tests."""
    real = IMPLS[impl]
    monkeypatch.setitem(IMPLS, impl, real._replace(backward=lambda dloss, derivative: derivative.clone()))
    with pytest.raises(AssertionError):
        test_regions(impl, device, REGIONS[0])

    def swapped(new, old, advantage, *rest):
        return real.forward(new, old, -advantage, *rest)

    monkeypatch.setitem(IMPLS, impl, real._replace(forward=swapped))
    with pytest.raises(AssertionError):
        test_regions(impl, device, REGIONS[5])


Z = torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(old_logprobs=torch.zeros(3)),
            r"old_logprobs must have the shape of logprobs, \(4,\), got \(3,\)",
        ),
        (
            dict(advantages=torch.zeros(4, 1)),
            r"advantages must have the shape of logprobs, \(4,\), got \(4, 1\)",
        ),
        (dict(advantages=Z.to("meta")), "advantages is on meta, logprobs on cpu"),
        (dict(logprobs=Z.long()), "logprobs must be floating point, got torch.int64"),
        (dict(advantages=Z.long()), "advantages must be floating point, got torch.int64"),
        (dict(clip_low=1.1), r"clip_low must lie in \[0, 1\], got 1.1"),
        (dict(clip_low=math.nan), r"clip_low must lie in \[0, 1\], got nan"),
        (dict(clip_high=-0.1), "clip_high must be finite and >= 0, got -0.1"),
        (dict(dual_clip=1.0), "dual_clip must be None or finite and > 1, got 1.0"),
        (dict(impl="blas"), "impl='blas' cannot run here"),
    ],
)
def test_errors(change, message):
    arguments = dict(logprobs=Z, old_logprobs=Z, advantages=Z) | change
    tensors = [arguments.pop(name) for name in ("logprobs", "old_logprobs", "advantages")]
    with pytest.raises(ValueError, match="clipped_surrogate: " + message):
        clipped_surrogate(*tensors, **arguments)


def test_double_backward_is_refused(impl, device):
    new = torch.randn(4, device=device, requires_grad=True)
    loss = clipped_surrogate(new, Z.to(device), torch.ones(4, device=device), impl=impl).loss.sum()
    (gradient,) = torch.autograd.grad(loss, new, create_graph=True)
    with pytest.raises(RuntimeError, match="clipped_surrogate: double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.slow
def test_opcheck(impl, device):
    new = torch.randn(6, 2, device=device, requires_grad=True)
    old, advantage = torch.randn(2, 6, 2, device=device)
    for clips in ((0.2, None, 0.28, None, None, None), (0.2, None, 0.0, torch.tensor(0.28), 3.0, None)):
        torch.library.opcheck(torch.ops.ipvrm.clipped_surrogate, (new, old, advantage, *clips, impl))
    torch.library.opcheck(
        torch.ops.ipvrm.clipped_surrogate_bwd, (old, new.detach(), impl, advantage, None, None)
    )


def test_compile(impl, device):
    new = torch.randn(6, 2, device=device, requires_grad=True)
    old, advantage = torch.randn(2, 6, 2, device=device)

    def loss(new):
        return clipped_surrogate(new, old, advantage, dual_clip=3.0, impl=impl).loss.sum() * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(new), new) for f in (compiled, loss))
    torch.testing.assert_close(mine, theirs)


def test_golden_files_exist():
    assert RELEASES, f"no release_*.npz in {GOLDEN}; set IPVRM_GOLDEN_DIR"


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_golden_policy_loss(impl, device, path):
    """pg_loss + 0.1 * topk_pg_loss, its statistics and gradients; README's definitions, release options."""
    arrays = np.load(path)
    golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    mask, kept = golden["mask"], golden["candidate_mask"]
    old = golden["old_logp"]
    new = golden["new_token_logp"].to(device).requires_grad_()
    new_candidates = golden["new_logp"].to(device).requires_grad_()
    token_old = old[..., 0].masked_fill(~mask, -math.inf).to(device)
    old_candidates = old.masked_fill(~kept, -math.inf).to(device)
    old_prob = old_candidates.exp()
    token = clipped_surrogate(new, token_old, golden["advantages_g1_l1"].to(device), dual_clip=3.0, impl=impl)
    candidates = clipped_surrogate(
        new_candidates, old_candidates, golden["scaled_candidate_td"].to(device),
        clip_high=0.2, dual_clip=3.0, impl=impl,
    )  # fmt: skip
    token_loss = token.loss.sum() / mask.sum()
    candidate_loss = (old_prob * candidates.loss).sum() / old_prob.sum()
    (token_loss + 0.1 * candidate_loss).backward()
    on_cpu = (new.detach().cpu(), new_candidates.detach().cpu())
    got = {
        "pg_loss": token_loss,
        "topk_pg_loss": candidate_loss,
        "pg_clipfrac": token.clipped.sum() / mask.sum(),
        "topk_clipfrac": candidates.clipped.sum() / kept.sum(),
        "ppo_kl": (old[..., 0] - on_cpu[0])[mask].mean(),
        "topk_kl": (old.exp() * (old - on_cpu[1]))[kept].mean(),
        "grad_token": new.grad,
        "grad_candidates": new_candidates.grad,
    }
    for key, value in got.items():
        expected = golden[f"policy_{key}"]
        scale = 1e-6 * expected.abs().max().item() if expected.dim() else 0.0
        atol = scale or 1e-5 * 2e-2  # scalar losses are sums that cancel
        torch.testing.assert_close(
            value.detach().cpu(), expected, rtol=1e-5, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )
