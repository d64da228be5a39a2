"""The C++ head ops: scratch memory, rows that cost nothing, full candidate buffers, tile edges, faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ipvrm_kernels import (
    backend,
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
)
from ipvrm_kernels.head import Transform, blocks, cpu, matmul
from ipvrm_kernels.linear_logprobs import FROZEN
from ipvrm_kernels.linear_logprobs import IMPLS as linear_logprobs_impls

MIB = 2**20
PLAIN = Transform(1.0, None, 1.0, torch.float32)
pytestmark = [
    pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built"),
    pytest.mark.usefixtures("library"),
]


@pytest.fixture
def peak_bytes(peak_of):
    """(peak of the CPU allocator above the start while a function runs, bytes of the tensors it returns)."""

    def peak_bytes(run):
        peak, out = peak_of(run)
        assert peak > 0, "the profiler recorded no allocation"
        return peak, sum(x.nbytes for x in out if x is not None)

    return peak_bytes


class Matmuls(TorchDispatchMode):
    """Counts the multiply-adds of every matmul."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        if func.overloadpacket == torch.ops.mkldnn._linear_pointwise:
            a, b = args[:2]
            self.total += a.shape[0] * a.shape[1] * b.shape[0]
        return func(*args, **(kwargs or {}))


def case(N, D=32, V=16_000, K=4, dtype=torch.float32):
    hidden = torch.randn(N, D).to(dtype)
    weight = (torch.randn(V, D) / D**0.5 * 3).to(dtype)
    return hidden, weight, torch.randint(0, V, (N, K))


def run_op(name, hidden, weight, ids, **options):
    """Every tensor that one step with the op leaves behind: outputs and gradients."""
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(name not in ("frozen", "forward"))
    leaves = [hidden, weight] if weight.requires_grad else [hidden]
    if name == "candidates":
        return tuple(linear_candidates(hidden, weight, sampled=ids[:, 0], return_entropy=True, impl="cpp"))
    if name == "distrl":
        N, K = ids.shape
        old, advantages = (torch.full((N, K), x, dtype=torch.float32) for x in (-3.0, 1.0))
        out = linear_distrl_loss(
            hidden, weight, ids[:, 0], ids, old[:, 0], old, advantages[:, 0], advantages,
            torch.tensor([0, N]).int(), clip_low=0.99, clip_high=50.0, impl="cpp", **options,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, leaves)
    if name == "forward":
        with torch.no_grad():
            return tuple(linear_logprobs(hidden, weight, ids, return_entropy=True, impl="cpp", **options))
    logprobs = linear_logprobs(hidden, weight, ids, impl="cpp", **options).logprobs
    return (logprobs, *torch.autograd.grad(logprobs.sum(), leaves))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "candidates", "trainable", "frozen", "distrl"])
def test_scratch_memory_is_flat_in_rows(name, dtype, peak_bytes):
    """At most 64 MiB above outputs, gradients and one fp32 (N, D); an (N, V) tensor would be 92 MiB."""
    scratch = []
    for N in (1500, 3000):
        inputs = case(N, dtype=dtype)
        peak, kept = peak_bytes(lambda inputs=inputs: run_op(name, *inputs))
        kept += 4 * inputs[0].numel()
        if name == "distrl" and dtype != torch.float32:  # its gradients are formed in fp32, then cast
            kept += 4 * inputs[1].numel()
        scratch.append(peak - kept)
    assert scratch[1] <= 64 * MIB, scratch
    assert scratch[1] - scratch[0] <= 200 * 1500  # at most 200 bytes a row: ids, log-probs


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 256])
def test_a_fused_loss_holds_dweight_once(D, peak_bytes):
    """Forward and backward peak at most 64 MiB above .grad and one (N, D), flat in N; the backward allocates
    nothing, where a second (V, D) would be 4 or 16 MiB."""
    scratch = []
    for N in (1500, 3000):
        hidden, weight, ids = case(N, D)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        old, advantages, cu = torch.full(ids.shape, -3.0), torch.ones(ids.shape), torch.tensor([0, N]).int()

        def loss(leaves=leaves, ids=ids, old=old, advantages=advantages, cu=cu):
            return linear_distrl_loss(
                *leaves, ids[:, 0], ids, old[:, 0], old, advantages[:, 0], advantages, cu,
                clip_low=0.99, clip_high=50.0, impl="cpp",
            ).loss  # fmt: skip

        def step(loss=loss, leaves=leaves):
            loss().backward()
            return [x.grad for x in leaves]

        peak, gradients = peak_bytes(step)
        assert gradients == 4 * (hidden.numel() + weight.numel())
        scratch.append(peak - gradients)
        assert scratch[-1] <= 64 * MIB + 4 * hidden.numel()
        for x in leaves:
            x.grad = None
        formed = loss()
        peak, _ = peak_bytes(
            lambda formed=formed, leaves=leaves: (formed.backward(), *(x.grad for x in leaves))
        )
        assert peak <= 2**16
    assert scratch[1] - scratch[0] <= 200 * 1500 + 4 * 1500 * D


@pytest.mark.parametrize("limit", [1 * MIB, 3 * MIB])
@pytest.mark.parametrize("name", ["forward", "trainable", "frozen", "distrl"])
def test_workspace_is_honoured(name, limit, peak_bytes):
    inputs = case(700, V=3000)
    bound = dict(max_workspace_bytes=limit)
    expected = run_op(name, *inputs)
    run_op(name, *inputs, **bound)
    peak, kept = peak_bytes(lambda: run_op(name, *inputs, **bound))
    kept += 4 * inputs[0].numel() + 200 * 700  # one fp32 (N, D) accumulator, and what is held for each row
    assert peak - kept <= limit
    for mine, theirs in zip(run_op(name, *inputs, **bound), expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "trainable", "frozen", "distrl"])
def test_too_small_a_workspace_is_refused_with_the_least_that_works(name, dtype):
    inputs = case(70, V=300, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"max_workspace_bytes must be at least \d+ for impl='cpp'"
    ) as caught:
        run_op(name, *inputs, max_workspace_bytes=100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    run_op(name, *inputs, max_workspace_bytes=least)
    with pytest.raises(ValueError, match=f"at least {least} "):
        run_op(name, *inputs, max_workspace_bytes=least - 1)


@pytest.mark.parametrize("name", ["trainable", "distrl"])
def test_without_a_backward_the_forward_s_own_least_is_enough(name):
    inputs, least = case(70, V=300, dtype=torch.bfloat16), []  # whose dweight is formed in a chunk of fp32
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="at least") as caught:
            run_op("forward" if name == "trainable" and not grad else name, *inputs, max_workspace_bytes=100)
        least.append(int(str(caught.value).split("at least ")[1].split()[0]))
    assert least[0] < least[1]


def test_rows_without_gradient_cost_nothing():
    """Gradients of the other rows alone, in as many multiply-adds."""
    hidden, weight, ids = case(300, D=16, V=500)
    upstream = torch.randn(ids.shape)
    upstream[torch.randperm(300)[:180]] = 0
    rows = (upstream != 0).any(1)

    def gradients(hidden, ids, upstream):
        result = cpu.forward("op", hidden, weight, None, ids, PLAIN)
        up = cpu.row_gradients(upstream, None, None, ids, 500, result.lse, result.lse_low, result.entropy)
        with Matmuls() as counted:
            out = cpu.backward("op", up, hidden, weight, None, PLAIN, (True, True, True))
        return counted.total, out

    total, (dhidden, dweight, dbias) = gradients(hidden, ids, upstream)
    total_alone, alone = gradients(hidden[rows], ids[rows], upstream[rows])
    assert total == total_alone == 3 * 120 * 16 * 500
    assert (dhidden[~rows] == 0).all()
    torch.testing.assert_close(dhidden[rows], alone[0])
    torch.testing.assert_close(dweight, alone[1])
    torch.testing.assert_close(dbias, alone[2])
    nothing, zeros = gradients(hidden, ids, torch.zeros_like(upstream))
    assert nothing == 0 and all((x == 0).all() for x in zeros)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_frozen_head_costs_two_matmuls(softcap, entropy, monkeypatch):
    """Logits, and the expectation behind dhidden; the backward adds only what depends on the ids, N K D."""
    monkeypatch.setattr(blocks, "ROWS", 48)  # several blocks of rows and of columns
    monkeypatch.setattr(blocks, "COLUMNS", 128)
    hidden, weight, ids = case(100, D=16, V=500)
    transform, upstream = PLAIN._replace(softcap=softcap), torch.randn(ids.shape)
    impl = linear_logprobs_impls["cpp"]
    with Matmuls() as counted:
        *outputs, saved = impl.forward(
            hidden, weight, None, ids, transform, entropy, FROZEN, None, False, False
        )
        dhidden = impl.backward(upstream, None, None, hidden, weight, None, ids, *outputs, saved, transform,
                                FROZEN, (True, False, False), None, False)[0]  # fmt: skip
    assert counted.total == 2 * 100 * 16 * 500
    leaf = hidden.double().requires_grad_()
    exact = linear_logprobs(leaf, weight.double(), ids, softcap=softcap).logprobs
    (truth,) = torch.autograd.grad((exact * upstream).sum(), leaf)
    torch.testing.assert_close(dhidden.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, True, False), (True, False, False), (False, True, False)], ids=str)
def test_a_fused_loss_costs_three_matmuls_and_clipped_rows_one(needs, monkeypatch):
    monkeypatch.setattr(blocks, "WORKSPACE", 8 * MIB)  # several blocks of rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # each packs, on a machine with many
    hidden, weight, ids = case(3000, D=16, V=700)
    upstream = torch.randn(ids.shape)
    upstream[::3] = 0
    seen = []

    def dloss_dlogprobs(r0, r1, logprobs):
        seen.append((r0, r1))
        return upstream[r0:r1]

    with Matmuls() as counted:
        got = cpu.fused_gradients("op", hidden, weight, None, ids, PLAIN, dloss_dlogprobs, needs)
    assert len(seen) > 1 and seen[0][0] == 0 and seen[-1][1] == 3000
    rows = 0  # of the others of a block as many as fill up oneDNN's sizes
    for r0, r1 in seen:
        rows += matmul.padded_rows(int((upstream[r0:r1] != 0).any(1).sum()), r1 - r0, torch.float32)
    assert rows < 2300 and counted.total == (3000 + sum(needs) * rows) * 16 * 700
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logprobs = linear_logprobs(*leaves, ids).logprobs
    expected = torch.autograd.grad((logprobs * upstream).sum(), leaves)
    for mine, theirs, need in zip(got, expected, needs, strict=False):
        if need:
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_gradients_without_workspace_to_save_z(dtype, monkeypatch):
    """The recompute path gives the same fp32 gradients, tiny ones of fp16 weights included."""
    hidden, weight, ids = case(50, D=16, V=300, dtype=dtype)
    transform = PLAIN._replace(dtype=dtype)

    def gradients():
        return cpu.fused_gradients(
            "op",
            hidden,
            weight,
            None,
            ids,
            transform,
            lambda r0, r1, x: torch.full_like(x, 1e-9),
            (True, True, False),
        )

    kept = gradients()
    monkeypatch.setattr(cpu, "saved_rows", lambda *_: 0)
    for mine, theirs in zip(gradients(), kept, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-15)


def test_deterministic_rows_do_not_depend_on_their_neighbours():
    hidden, weight, _ = case(200, D=24, V=131)
    ids = torch.randint(0, 131, (200, 2))

    def both(rows):
        leaf = hidden[rows].detach().requires_grad_()
        out = linear_logprobs(leaf, weight.requires_grad_(), ids[rows], deterministic=True, impl="cpp")
        return out.logprobs.detach(), *torch.autograd.grad(out.logprobs.sum(), leaf)

    whole, part = both(slice(0, 200)), both(slice(150, 157))
    for all_rows, few in zip(whole, part, strict=True):
        assert torch.equal(all_rows[150:157], few)


@pytest.mark.parametrize(("min_prob", "top_k"), [(0.1, None), (0.02, 3), (None, 1), (None, 5), (None, 200)])
@pytest.mark.parametrize("step", [0.3, 0.0, -0.3], ids=["rising", "tied", "falling"])
def test_full_candidate_buffers(min_prob, top_k, step, monkeypatch):
    """Rising logits emit candidates in every tile, more than a buffer holds: pruned, and still exact."""
    monkeypatch.setattr(blocks, "COLUMNS", 16)
    V = 900
    z = torch.arange(V, dtype=torch.float32)[:, None] * step
    rule = cpu.CandidateRule(head_cpu_slots(min_prob, top_k), 0.0)
    if step > 0 and min_prob is not None:  # emissions, had nothing been pruned
        running = torch.stack([z[: c + 16, 0].logsumexp(0) for c in range(0, V, 16)]).repeat_interleave(16)[
            :V
        ]
        assert (z[:, 0] > running + math.log(min_prob)).sum() > 2 * rule.capacity
    one = torch.ones(3, 1)
    mine = linear_candidates(one, z, min_prob=min_prob, top_k=top_k, impl="cpp")
    theirs = linear_candidates(one, z, min_prob=min_prob, top_k=top_k, impl="torch")
    assert torch.equal(mine.ids, theirs.ids) and torch.equal(mine.counts, theirs.counts)
    torch.testing.assert_close(mine.logprobs, theirs.logprobs)


def head_cpu_slots(min_prob, top_k):
    return top_k if min_prob is None else math.floor(1 / min_prob + 1e-4)


def errors(inputs, upstream, impl, dtype, **options):
    """Log-probs, lse, entropy and gradients, all in fp64."""
    hidden, weight, bias, ids, frozen = inputs
    leaves = [x.to(dtype) if dtype else x.clone() for x in (hidden, weight, bias)]
    trained = [x.requires_grad_() for x in leaves[: 1 if frozen else 3]]
    out = linear_logprobs(*leaves[:2], ids, bias=leaves[2], return_entropy=True, impl=impl, **options)
    picked = torch.where(ids >= 0, out.logprobs, 0.0)
    outputs = [picked, out.lse, out.entropy][: 2 if frozen else 3]
    found = torch.autograd.grad(
        outputs, trained, [u.to(x.dtype) for u, x in zip(upstream, outputs, strict=False)]
    )
    return [x.detach().double() for x in (*outputs, *found)]


def check_tiles(N, D, V, K, seed, level, rows, columns, dtype=torch.float32, frozen=False, **options):
    """The bound of test_linear_logprobs.py with tiles far smaller than the batch: every edge is crossed."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, D, generator=g) * level).to(dtype)
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    bias, ids = torch.randn(V, generator=g), torch.randint(-1, V, (N, K), generator=g)
    upstream = [torch.randn(s, generator=g) for s in ((N, K), (N,), (N,))]
    inputs = (hidden, weight, bias, ids, frozen)
    exact = errors(inputs, upstream, "torch", torch.float64, **options)
    plain = errors(inputs, upstream, "torch", torch.float32, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "ROWS", rows)
        patch.setattr(blocks, "COLUMNS", columns)
        mine = errors(inputs, upstream, "cpp", None, **options)
    top = (exact[1].abs().max().item() if N else 0.0) + 8 * level
    for x, y, truth in zip(mine, plain, exact, strict=True):
        if truth.numel():
            # a gradient in a narrow dtype is rounded once to it
            narrow = torch.finfo(dtype).eps * truth.abs().max() if dtype != torch.float32 else 0.0
            slack = 8 * torch.finfo(torch.float32).eps * max(1.0, top)
            assert (x - truth).abs().max() <= 2 * (y - truth).abs().max() + slack + narrow


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 70), D=st.integers(1, 20), V=st.integers(1, 150), K=st.integers(0, 5),
    level=st.floats(0.01, 20), seed=st.integers(0, 2**31), rows=st.sampled_from((16, 24, 1024)),
    columns=st.sampled_from((16, 33, 1024)), frozen=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    softcap=st.none() | st.floats(1.0, 30.0), temperature=st.floats(0.5, 2.0),
)  # fmt: skip
def test_any_tiles(N, D, V, K, seed, level, rows, columns, dtype, frozen, softcap, temperature):
    check_tiles(
        N, D, V, K, seed, level, rows, columns, dtype, frozen, softcap=softcap, temperature=temperature
    )


@pytest.mark.parametrize("fault", ["tail tile lost", "ids one column off", "upstream of the first rows"])
def test_seeded_faults_are_caught(fault, monkeypatch):
    arguments = (50, 8, 75, 3, 0, 2.0, 16, 32)
    check_tiles(*arguments)
    real = cpu.native_call

    def faulty(name, *args):
        args = list(args)
        if fault == "tail tile lost" and name == "head_forward_tile_cpu" and args[1] < 32:
            return
        if fault == "ids one column off" and name == "head_forward_tile_cpu":
            args[2] -= 1
        if fault == "upstream of the first rows" and name == "head_backward_tile_cpu":
            args[5] = 0
        real(name, *args)

    monkeypatch.setattr(cpu, "native_call", faulty)
    with pytest.raises(AssertionError):
        check_tiles(*arguments)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_a_frozen_backward_honours_the_workspace_it_gathers_in(dtypes, peak_bytes):
    """The ids' rows of the weight are gathered a few at a time; a narrow bias is widened chunk by chunk."""
    N, D, V, K, limit = 300, 256, 3000, 8, 600_000
    hidden, weight = torch.randn(N, D).to(dtypes[0]), torch.randn(V, D).to(dtypes[1])
    bias, ids = torch.randn(V).to(dtypes[0]), torch.randint(0, V, (N, K))
    leaf = hidden.requires_grad_()

    def run():
        out = linear_logprobs(leaf, weight, ids, bias=bias, max_workspace_bytes=limit, impl="cpp")
        return (out.logprobs, out.lse, *torch.autograd.grad(out.logprobs.sum(), leaf))

    run()
    peak, kept = peak_bytes(run)
    # the saved expectation, dhidden in fp32 and its cast, and what is held for each row and id
    assert peak - kept <= limit + 2 * 4 * N * D + 60 * N * K


DEFAULT_WORKSPACE = 64 * MIB  # what a workspace has to exceed before logits are saved


@pytest.mark.parametrize("columns", [1024, 2048, 2300])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, dict(softcap=4.0, temperature=0.7, logit_scale=1.5)),
        (torch.bfloat16, {}),
    ],
    ids=["fp32", "capped", "bf16"],
)
def test_a_larger_workspace_saves_logits_and_changes_nothing(columns, dtype, options):
    """Of all columns or of whole blocks of them; with rows that have no gradient, twice through one graph."""
    N, D, V, K = 600, 24, 2300, 3
    hidden, weight, ids = case(N, D, V, K, dtype)
    bias, upstream = torch.randn(V), torch.randn(N, K)
    upstream[::4] = 0
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    workspace = DEFAULT_WORKSPACE + 4 * N * columns + 100

    def step(limit, rows=upstream):
        more = dict(options, max_workspace_bytes=limit, impl="cpp")
        out = linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, **more)
        outputs = (out.logprobs, out.lse, out.entropy)
        given = (rows, rows[:, 0].contiguous(), rows[:, 1].contiguous())
        first = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
        return first, torch.autograd.grad(outputs, leaves, given)

    kept, again = step(workspace)
    expected, _ = step(None)
    for mine, theirs, second in zip(kept, expected, again, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(mine, second)
    all_rows = torch.randn(N, K)
    for mine, theirs in zip(step(workspace, all_rows)[0], step(None, all_rows)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-2)


def test_saved_logits_are_not_formed_again():
    N, D, V = 700, 16, 2300
    hidden, weight, ids = case(N, D, V)
    for columns in (0, 1024, V):
        with Matmuls() as counted:
            result = cpu.forward("op", hidden, weight, None, ids, PLAIN, num_saved=columns)
            up = cpu.row_gradients(
                torch.randn(ids.shape), None, None, ids, V, result.lse, result.lse_low, result.entropy
            )
            saved_z = result.saved_z if columns else None
            cpu.backward("op", up, hidden, weight, None, PLAIN, (True, True, False), saved_z=saved_z)
        assert counted.total == N * D * (4 * V - columns)


def test_logits_are_saved_only_where_they_can_be():
    N, V = 300, 4000
    hidden, weight, ids = case(N, 16, V)
    hidden.requires_grad_()

    def held(trained, **options):
        w = weight.detach().requires_grad_(trained)
        out = linear_logprobs(hidden, w, ids, impl="cpp", **options)
        return sum(x.numel() for x in out.logprobs.grad_fn.saved_tensors if x is not None) >= N * V

    workspace = dict(max_workspace_bytes=DEFAULT_WORKSPACE + 4 * N * V)
    assert held(True, **workspace)
    assert (
        not held(True)
        and not held(True, max_workspace_bytes=DEFAULT_WORKSPACE)
        and not held(False, **workspace)
    )
    assert not held(True, deterministic=True, **workspace)
    with torch.no_grad():
        assert linear_logprobs(hidden, weight, ids, impl="cpp", **workspace).logprobs.grad_fn is None


def test_rows_without_gradient_are_zero_whatever_their_states(monkeypatch):
    """NaN and inf in padding states, frozen head: LoRA on rows that nobody asked anything of."""
    hidden, weight, ids = case(8, D=16, V=50)
    hidden[3], hidden[5] = math.nan, math.inf
    upstream = torch.ones(ids.shape)
    upstream[3] = upstream[5] = 0
    for options in ({}, dict(softcap=3.0)):
        leaf = hidden.detach().requires_grad_()
        out = linear_logprobs(leaf, weight, ids, impl="cpp", **options)
        (gradient,) = torch.autograd.grad(out.logprobs, leaf, upstream)
        assert (gradient[[3, 5]] == 0).all() and gradient.isfinite().all()
        assert (gradient[[0, 7]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "candidates", "trainable", "frozen", "distrl"])
def test_torch_s_default_dtype_changes_nothing(name, dtype):
    """The native code's own memory is fp32 whatever a program has made the default."""
    inputs = case(60, D=16, V=200)
    expected = run_op(name, *inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = run_op(name, *inputs)
    finally:
        torch.set_default_dtype(before)
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
