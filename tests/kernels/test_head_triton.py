"""The Triton head driver where it could go wrong: groups, splits, chunks, neighbours, refused workspaces."""

import importlib
import math
import re

import pytest
import torch

from ipvrm_kernels import backend, linear_candidates, linear_distrl_loss, linear_logprobs

OP = "linear_logprobs"  # the tests below ask for impl="triton" and skip every other
pytestmark = pytest.mark.usefixtures("only_triton")


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


@pytest.mark.parametrize("ones", ["N", "D", "V", "K", "NDVK"])
def test_sizes_of_1(impl, device, ones):
    """Also the strides of rows, where D is 1; compiled, they are constants (test_ahead_of_time.py)."""
    sizes = dict(N=5, D=6, V=40, K=3)
    N, D, V, K = (1 if name in ones else size for name, size in sizes.items())
    hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
    ids = torch.randint(V, (N, K), device=device)
    upstream, old = torch.randn(N, K, device=device), torch.full((N, K), -1.0, device=device)
    edges = torch.tensor([0, N], dtype=torch.int32, device=device)

    def logprobs(hidden, weight, impl):
        out = linear_logprobs(hidden, weight, ids, return_entropy=True, impl=impl)
        return (out.logprobs * upstream).sum() + (out.lse + 2 * out.entropy).sum()

    def loss(hidden, weight, impl):
        return linear_distrl_loss(
            hidden, weight, ids[:, 0], ids, old[:, 0], old, upstream[:, 0], upstream, edges, impl=impl
        ).loss

    for function in (logprobs, loss):
        got, right = (gradients(function, hidden, weight, impl=name) for name in (impl, "torch"))
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    got, right = (linear_candidates(hidden, weight, sampled=ids[:, 0], impl=name) for name in (impl, "torch"))
    assert torch.equal(got.ids, right.ids)
    torch.testing.assert_close(got.logprobs, right.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("N", [0, 1, 63])
def test_more_slots_than_groups_or_tokens(impl, device, N):
    hidden, weight = torch.randn(N, 8, device=device), torch.randn(45, 8, device=device)
    out = linear_candidates(hidden, weight, min_prob=None, top_k=50, impl=impl)
    reference = linear_candidates(hidden, weight, min_prob=None, top_k=50, impl="torch")
    assert torch.equal(out.counts, torch.full((N,), 45, device=device))
    assert torch.equal(out.ids.sort(1).values, reference.ids.sort(1).values)
    torch.testing.assert_close(out.logprobs, reference.logprobs, rtol=0, atol=1e-5)


def test_more_slots_than_a_row_can_be_picked_from(impl, device):
    """Plain top-k beyond 512 of V > 16384 is refused; where min_prob bounds the set, top_k is free."""
    hidden, weight = torch.randn(2, 4, device=device), torch.randn(16385, 4, device=device)
    message = (
        "linear_candidates: top_k must be at most 512 for impl='triton' and V > 16384 without min_prob, got"
        " top_k=513 and V=16385; pass a smaller top_k or impl='torch'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_candidates(hidden, weight, min_prob=None, top_k=513, impl=impl)
    rules = dict(min_prob=0.02, top_k=600), dict(min_prob=None, top_k=512)
    for rule in rules[: 1 if backend.INTERPRETED else 2]:  # slow
        out = linear_candidates(3 * hidden, weight, impl=impl, **rule)
        reference = linear_candidates(3 * hidden, weight, impl="torch", **rule)
        assert torch.equal(out.counts, reference.counts)
        torch.testing.assert_close(out.logprobs, reference.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "row"), [(8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (11, "sm_100"), (12, "sm_80")]
)
def test_tiles_of_a_compute_capability(impl, device, capability, row):
    """12.x has 99 KB of shared memory a block, for which 10.x's tiles are too large."""
    assert importlib.import_module("ipvrm_kernels.head.triton_tiles").tiles_of(capability) == row


def test_a_row_is_the_same_whatever_surrounds_it(impl, device, same_dot_for_every_row):
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


def test_candidates_have_the_logprobs_of_linear_logprobs(impl, device, same_dot_for_every_row):
    """The first PPO ratio is exactly 1: the same gather-dot and the same lse in both ops."""
    hidden, weight = 3 * torch.randn(40, 24, device=device), torch.randn(300, 24, device=device)
    out = linear_candidates(hidden, weight, impl=impl)
    again = linear_logprobs(hidden, weight, out.ids, impl=impl)
    assert torch.equal(again.logprobs, out.logprobs) and torch.equal(again.lse, out.lse)


def gradients(function, *variables, **options):
    required = [x.clone().requires_grad_() for x in variables]
    return torch.autograd.grad(function(*required, **options), required)


def least_workspace(run):
    """The least limit that `run(limit)` accepts, by its own messages; a byte less is refused."""
    least = 1
    while True:
        try:
            run(least)
        except ValueError as error:
            message = re.fullmatch(r"linear_\w+: max_workspace_bytes must be at least (\d+) .* got (\d+);.*",
                                   str(error))  # fmt: skip
            assert message and int(message[2]) == least < int(message[1])
            least = int(message[1])
        else:
            break
    with pytest.raises(ValueError, match=f"at least {least} .* got {least - 1}"):
        run(least - 1)
    return least


def num_bytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def policy_loss(hidden, weight, bias, ids, limit, impl):
    """linear_distrl_loss of which every sampled token has a gradient."""
    N, device = ids.shape[0], ids.device
    cu_seqlens = torch.tensor([0, N], dtype=torch.int32, device=device)
    old = [-20 * torch.ones(ids[:, 0].shape, device=device), -torch.ones(ids[:, 1:].shape, device=device)]
    up = [torch.full(x.shape, -1.0, device=device) for x in old]
    return linear_distrl_loss(
        hidden, weight, ids[:, 0], ids[:, 1:], *old, *up, cu_seqlens, bias=bias, dual_clip=None,
        max_workspace_bytes=limit, impl=impl,
    ).loss  # fmt: skip


@pytest.mark.parametrize("path", ["forward", "frozen", "trainable", "policy", "frozen policy"])
def test_workspace_is_honoured_or_refused_with_the_least_that_works(impl, device, path, peak_of):
    """Allocations above inputs, outputs, gradients and one fp32 (N, D) stay within the limit, least and up,
    and the results are those without a limit."""
    N, D, V = 150, 32, 700
    hidden, weight, bias = (torch.randn(shape, device=device) for shape in ((N, D), (V, D), (V,)))
    ids = torch.randint(0, V, (N, 3), device=device)
    trained = path in ("trainable", "policy")

    def run(limit):
        grad = path != "forward"
        h = hidden.detach().requires_grad_(grad)
        w, b = (x.detach().requires_grad_(trained) for x in (weight, bias))
        if "policy" in path:
            loss = policy_loss(h, w, b, ids, limit, impl)
        else:
            out = linear_logprobs(
                h, w, ids, bias=b, return_entropy=True, max_workspace_bytes=limit, impl=impl
            )
            if not grad:
                return list(out)
            loss = out.logprobs.sum() + out.lse.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, (h, w, b) if trained else (h,))]

    whole = run(None)
    least = least_workspace(run)
    for limit in (least, least * 100):
        peak, found = peak_of(lambda limit=limit: run(limit))
        for mine, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()))
        outputs = 4 * N * (3 + 2) * (path != "forward")  # log-probs, lse, entropy wait for the backward
        kept = num_bytes(*found) * (1 + ("policy" in path)) + outputs + 4 * N * D * (path != "forward")
        own = 4 * N * 8 + 4 * N * D  # the loss of this test itself
        blocks = 0 if device == "cpu" else 512 * 64  # a GPU's allocator rounds each tensor up
        assert peak <= limit + kept + own + blocks


def test_rows_without_a_gradient_are_left_out(impl, device, same_dot_for_every_row):
    """They may hold NaN: their dhidden is exactly 0, and the others' gradients are those without them."""
    hidden, weight = torch.randn(150, 24, device=device), torch.randn(300, 24, device=device)
    ids, bias = torch.randint(0, 300, (150, 2), device=device), torch.randn(300, device=device)
    idle = torch.arange(150, device=device) % 5 < 3
    hidden[::10] = math.nan

    def run(rows):
        variables = [x.detach().clone().requires_grad_() for x in (hidden[rows], weight, bias)]
        out = linear_logprobs(variables[0], variables[1], ids[rows], bias=variables[2], return_entropy=True,
                              impl=impl)  # fmt: skip
        keep = ~idle[rows]
        up = [torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x.detach().sin(), 0.0) for x in out]
        return torch.autograd.grad(out, variables, up)

    whole, part = run(slice(None)), run(~idle)
    assert (whole[0][idle] == 0).all() and all(x.isfinite().all() for x in whole)
    torch.testing.assert_close(whole[0][~idle], part[0], rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(whole[1:], part[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    idle[:] = True
    assert all((x == 0).all() for x in run(slice(None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output", ["logprobs", "lse", "entropy"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_upstream_gradient_that_is_not_finite_stays_in_its_row(impl, device, dtype, output, broken):
    """fp16 scales da by the largest upstream gradient of all rows: of the finite ones alone."""
    hidden = torch.randn(20, 16, device=device).to(dtype)
    weight = torch.randn(90, 16, device=device).to(dtype)
    ids = torch.randint(0, 90, (20, 2), device=device)

    def dhidden(spoil):
        variables = [x.clone().requires_grad_() for x in (hidden, weight)]  # trainable: by recomputation
        out = linear_logprobs(*variables, ids, return_entropy=True, impl=impl)
        up = [1e-3 * x.detach().sin() for x in out]
        if spoil:
            up[out._fields.index(output)][5] = broken
        return torch.autograd.grad(out, variables, up)[0]

    clean, spoilt = dhidden(False), dhidden(True)
    others = torch.arange(20, device=device) != 5
    assert not spoilt[5].isfinite().all()
    torch.testing.assert_close(spoilt[others], clean[others])


def test_only_row_blocks_with_a_gradient_are_multiplied(impl, device, monkeypatch):
    """30 of 400 rows have one: da of the first block of rows is computed, the rest of it is zeroed once."""
    backward = importlib.import_module("ipvrm_kernels.head.triton_backward")
    seen, real = [], backward.launch_dz

    def spied(ops, rows, da, *rest):
        marked = da.fill_(7.0) if not seen else da
        real(ops, rows, marked, *rest)
        written = (da != 7).any(1).nonzero()[:, 0].tolist()
        seen.append((int(rows.num_active), written, list(range(ops.config.BLOCK_N))))

    monkeypatch.setattr(backward, "launch_dz", spied)
    hidden, weight = torch.randn(400, 24, device=device), torch.randn(300, 24, device=device)
    ids = torch.randint(0, 300, (400, 1), device=device)
    keep = torch.randperm(400, device=device) < 30
    gradients(lambda h, w: linear_logprobs(h, w, ids, impl=impl).logprobs[keep].sum(), hidden, weight)
    num_active, written, first_block = seen[0]
    assert num_active == 30 and written == first_block


def test_gradients_repeat_bitwise(impl, device):
    """Run to run at equal shapes, and log-probs whatever the workspace; the vendor's matmul may sum in
    another order at another N."""
    hidden, weight = torch.randn(150, 24, device=device), torch.randn(900, 24, device=device)
    ids = torch.randint(-1, 900, (150, 3), device=device)

    def run(trained, limit=None):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        out = linear_logprobs(h, w, ids, deterministic=True, max_workspace_bytes=limit, impl=impl)
        loss = torch.where(ids >= 0, out.logprobs, 0.0).sum() + out.lse.sum()
        found = torch.autograd.grad(loss, (h, w) if trained else h)
        return [out.logprobs.detach(), out.lse.detach()], found

    for trained in (False, True):
        (outputs, first), (again, second) = run(trained), run(trained)
        assert all(
            torch.equal(x, y) for x, y in zip(outputs + list(first), again + list(second), strict=True)
        )
        small, _ = run(trained, 600_000)
        assert all(torch.equal(x, y) for x, y in zip(outputs, small, strict=True))


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
