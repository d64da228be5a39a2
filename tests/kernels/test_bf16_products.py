"""bf16 products on the CPU: packing and blocking around oneDNN's kernel, who is chosen, seeded faults.

The ops' own tests run them in every regime where this machine has the instructions.
"""

import ctypes
import json
import mmap
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ipvrm_kernels import backend, linear_candidates, linear_logprobs, torch_private
from ipvrm_kernels.head import blocks, matmul, products
from ipvrm_kernels.head.products import Bf16Products

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MISSING = matmul.why_not_bf16()
MIB = 2**20

here = pytest.mark.skipif(MISSING is not None, reason=f"bf16 products: {MISSING}")


@pytest.fixture
def fresh(monkeypatch):
    """Choices made under this test's circumstances are forgotten before and after it."""
    matmul.why_not_bf16.cache_clear()
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    yield monkeypatch
    matmul.why_not_bf16.cache_clear()


def operands(R, C, D, hidden=torch.bfloat16, weight=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(R, D, generator=g).to(hidden), torch.randn(C, D, generator=g).to(weight)


def products_of(h, w, blocks_of_rows=1, blocks_of_columns=1):
    """(z, to_rows, to_columns) of these operands and a drawn tile, in blocks; sums start from ones."""
    (R, D), C = h.shape, len(w)
    tile = torch.randn(R, C, generator=torch.Generator().manual_seed(1))
    z = torch.full((R, C), float("nan"))
    to_rows, to_columns = torch.ones(R, D), torch.ones(C, D)
    rows, columns = -(-R // blocks_of_rows), -(-C // blocks_of_columns)
    ours = Bf16Products(h, w, rows)
    for c0, c1 in blocks.blocks(C, columns):
        ours.take_columns(c0, c1)
        for r0, r1 in blocks.blocks(R, rows):
            ours.take_rows(r0, r1)
            part = torch.full((r1 - r0, c1 - c0), float("nan"))
            ours.logits(part)
            z[r0:r1, c0:c1] = part
            a = tile[r0:r1, c0:c1].contiguous()
            ours.add(a, to_rows[r0:r1], to_columns[c0:c1])
    return z, to_rows, to_columns, tile


def check(h, w, **how):
    """Within fp32 sums of the exact products of the operands as bf16 has them, a tile's gradient included."""
    z, to_rows, to_columns, tile = products_of(h, w, **how)
    exact_h, exact_w, exact_a = (x.bfloat16().double() for x in (h, w, tile))
    for mine, truth, terms in (
        (z, exact_h @ exact_w.T, h.shape[1]),
        (to_rows, 1 + exact_a @ exact_w, len(w)),
        (to_columns, 1 + exact_a.T @ exact_h, len(h)),
    ):
        bound = 4 * torch.finfo(torch.float32).eps * terms**0.5 * truth.abs().max().clamp(min=1)
        assert (mine.double() - truth).abs().max() <= bound
    return z


# (R, C, D): tails of panels, pairs and heights; more terms than a block of sums has, in each of the products
SHAPES = [
    (1, 1, 1), (3, 2, 1), (64, 64, 64), (70, 65, 130), (127, 130, 33), (1, 1000, 7), (33, 63, 2051),
    (70, 130, 1100), (1090, 70, 66), (66, 1100, 70),
]  # fmt: skip


@here
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32], ids=str)
def test_shapes(shape, hidden, weight, poisoned):
    check(*operands(*shape, hidden, weight))


@here
@pytest.mark.parametrize("D", [1024, 4096])
def test_sums_are_as_exact_as_fp32_s(D):
    """Within 5e-7 of the largest logit, which one chain over all terms is not."""
    h, w = operands(128, 512, D)
    ours, z = Bf16Products(h, w, 128), torch.empty(128, 512)
    ours.take_rows(0, 128)
    ours.take_columns(0, 512)
    ours.logits(z)
    exact = h.double() @ w.double().T
    assert (z.double() - exact).abs().max() <= 5e-7 * exact.abs().max()


@here
@pytest.mark.parametrize("parts", [(3, 1), (1, 3), (4, 5)], ids=str)
def test_blocks(parts):
    check(*operands(150, 200, 97), blocks_of_rows=parts[0], blocks_of_columns=parts[1])


@here
def test_layouts():
    """Rows of more, transposed, expanded: what the kernel cannot read as it is, is copied."""
    R, C, D = 40, 70, 34
    h, w = operands(R, C, D)
    expected = check(h, w)
    wide = torch.full((R, 2 * D + 1), float("nan"), dtype=torch.bfloat16)
    wide[:, D + 1 :] = h
    for hidden in (wide[:, D + 1 :], h.T.contiguous().T, torch.stack([h, h], 2)[:, :, 1]):
        for weight in (w.T.contiguous().T, torch.cat([w, w], 1)[:, D:]):
            assert torch.equal(check(hidden, weight), expected)
    check(h[:1].expand(R, D), w)


@here
def test_a_selection_of_rows():
    """As a scalar loss takes the rows that have a gradient, with rows of zeros behind; twice."""
    h, w = operands(50, 30, 17)
    ours = Bf16Products(h, w, 25)
    ours.take_columns(0, 30)
    for r0, r1 in ((0, 25), (25, 50)):
        index = torch.tensor([1, 7, 20])
        ours.take_rows(r0, r1)
        ours.select(index, 5)
        a, dw = torch.randn(5, 30), torch.zeros(30, 17)
        ours.add(a, None, dw)
        exact = a[:3].bfloat16().double().T @ h[r0:r1][index].double()
        torch.testing.assert_close(dw.double(), exact, rtol=1e-6, atol=1e-6)
    ours.take_rows(0, 25, torch.arange(49, -1, -1))  # and as the backward gathers them
    z = torch.empty(25, 30)
    ours.logits(z)
    torch.testing.assert_close(z.double(), h.flip(0)[:25].double() @ w.double().T, rtol=1e-6, atol=1e-6)


@here
def test_a_row_is_the_same_whatever_surrounds_it():
    """Bitwise: a row's logits do not depend on N, its position, the tiles or the threads."""
    h, w = operands(300, 1500, 1031, seed=3)
    ids, upstream = torch.randint(0, 1500, (300, 2)), torch.randn(300, 2)

    def step(rows):
        leaf = h[rows].requires_grad_()
        out = linear_logprobs(leaf, w.requires_grad_(), ids[rows], impl="cpp")
        return out.logprobs, out.lse, torch.autograd.grad(out.logprobs, leaf, upstream[rows])[0]

    whole = step(list(range(300)))
    before = torch.get_num_threads()
    for rows in ([0], [299], [5, 6, 7], list(range(100, 231)), [7] * 64):
        torch.set_num_threads(1 + len(rows) % 2)
        part = step(rows)
        torch.set_num_threads(before)
        assert all(torch.equal(mine, theirs[rows]) for mine, theirs in zip(part, whole, strict=True))


@here
def test_results_repeat_bitwise():
    h, w = (x.requires_grad_() for x in operands(200, 900, 64))
    ids = torch.randint(0, 900, (200, 3))

    def step():
        out = linear_logprobs(h, w, ids, impl="cpp").logprobs
        return (out, *torch.autograd.grad(out.sum(), (h, w)))

    for mine, again in zip(step(), step(), strict=True):
        assert torch.equal(mine, again)


@here
@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_confident_row_of_a_frozen_head(softcap, temperature):
    """1 - p of the likeliest token is no difference of rounded numbers: dhidden has bf16's error alone."""
    N, V, D = 20, 300, 16
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g)
    ids = torch.randint(0, V, (N,), generator=g)
    hidden = 4.5 * weight[ids] / weight[ids].norm(dim=1, keepdim=True)  # p up to 0.9999999, with softcap 0.9
    hidden, weight = hidden.bfloat16(), weight.bfloat16()

    def gradient(h, w, impl):
        out = linear_logprobs(h, w, ids, impl=impl, softcap=softcap, temperature=temperature)
        return torch.autograd.grad(out.logprobs.sum(), h)[0]

    mine = gradient(hidden.requires_grad_(), weight, "cpp").double()
    exact = gradient(hidden.detach().double().requires_grad_(), weight.double(), "torch")
    assert ((mine - exact).norm(dim=1) <= 2**-6 * exact.norm(dim=1) + 1e-6).all()


@here
def test_threads_and_forks():
    """From several threads at once and in a forked child, where oneDNN has made its kernels before."""
    h, w = operands(130, 200, 66)
    expected = check(h, w)
    results = []
    threads = [threading.Thread(target=lambda: results.append(products_of(h, w)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(z, expected) for z in results)

    def child(queue):
        torch.set_num_threads(1)  # an OpenMP team does not survive a fork
        queue.put(torch.equal(products_of(h, w)[0], expected))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0


@here
@pytest.mark.parametrize("shape", [(64, 64, 64), (129, 777, 999), (1000, 1024, 1024)], ids=str)
@pytest.mark.parametrize("copied", [False, True])
def test_the_plan_counts_what_is_held(shape, copied, peak_of):
    R, C, D = shape
    h, w = operands(R, C, D)
    if copied:
        h, w = h.T.contiguous().T, w.T.contiguous().T
    index = torch.arange(R) if copied else None

    def run():
        ours = Bf16Products(h, w, R)
        ours.take_columns(0, C)
        ours.take_rows(0, R, index)
        ours.logits(z)
        ours.add(tile, to_rows, to_columns)
        return torch.empty(1)

    z, tile, to_rows, to_columns = torch.empty(R, C), torch.randn(R, C), torch.zeros(R, D), torch.zeros(C, D)
    peak, _ = peak_of(run)
    counted = blocks.bf16_bytes(R, C, h, w, gathers=copied, gradients=True)
    assert 0.9 * counted <= peak <= counted + 4096


@here
def test_few_kernels_whatever_the_batch():
    """oneDNN makes and keeps one for every shape, stride and sum; a training run has a new N at every step,
    and of the rows that have a gradient another number still."""
    seen = set()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6, ctypes.c_bool, *[ctypes.c_void_p] * 3, ctypes.c_bool)

    @kind
    def record(m, n, k, lda, ldb, ldc, add, a, b, c, interleaved):
        seen.add((m, n, k, lda, ldb, ldc, add))

    released = ctypes.CFUNCTYPE(None, ctypes.c_bool)(lambda interleaved: None)
    addresses = (ctypes.cast(f, ctypes.c_void_p).value for f in (record, released))
    kernel = backend.native_struct("Brgemm", **dict(zip(("multiply", "release"), addresses, strict=True)))
    w = torch.randn(256, 64).bfloat16()
    for N in range(1, 1025, 5):
        ours = Bf16Products(torch.randn(N, 64).bfloat16(), w, N)
        ours._kernel = kernel
        ours.take_rows(0, N)
        ours.take_columns(0, 256)
        ours.logits(torch.zeros(N, 256))
        for first in (True, False):
            ours.add(torch.zeros(N, 256), torch.zeros(N, 64), torch.zeros(256, 64), first_rows=first)
    # logits and to_rows: heights of powers of two; to_columns: 21 numbers of rows, in one part or two, which
    # are overwritten or added
    assert len(seen) <= 7 + 7 + 3 * 21
    assert {key[0] for key in seen} == {2**i for i in range(7)}


@here
@pytest.mark.parametrize("fault", ["stale panels", "a pair swapped", "one row off", "an odd term left"])
def test_a_seeded_fault_in_the_packing_is_caught(fault, monkeypatch):
    h, w = operands(100, 150, 65)
    how = dict(blocks_of_rows=2, blocks_of_columns=2)
    check(h, w, **how)
    real = products.native_call
    packed = {}  # what is in a buffer

    def faulty(name, *args):
        args = list(args)
        if name == "pack_panels_cpu":
            first = packed.setdefault(args[7].data_ptr(), args[0].data_ptr())
            if fault == "stale panels" and first != args[0].data_ptr():
                return
            if fault == "one row off":
                args[0] = torch.roll(args[0], 1, 0)
        real(name, *args)
        if name == "pack_panels_cpu" and fault == "a pair swapped":
            args[7][:2] = args[7][:2].flip(0)
        if name == "pack_panels_cpu" and fault == "an odd term left" and args[5]:
            args[7][64 * 64 + 1] = 1.0  # the second of the last pair, of column 0

    monkeypatch.setattr(products, "native_call", faulty)
    if fault == "an odd term left":  # which zeros in h hide, unless they are lost too
        real_take = Bf16Products.take_rows
        monkeypatch.setattr(
            Bf16Products, "take_rows", lambda self, *a: (real_take(self, *a), self.h[:, 65:].fill_(1.0))[0]
        )
    with pytest.raises(AssertionError):
        check(h, w, **how)


@here
def test_what_the_kernel_throws_is_raised():
    """PyTorch refuses where its switch is off; from a team of threads that would end the process."""
    h, w = operands(256, 256, 64)
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(RuntimeError, match="Brgemm"):
        products_of(h, w)
    check(h, w)


@here
def test_bf16_alone_is_multiplied_as_it_is(fresh):
    assert matmul.library(torch.bfloat16) == "brgemm"
    assert matmul.library() == matmul.library(torch.float16) in matmul.NAMES
    said = matmul.describe_cpu_matmul()
    amx = "AMX, where it may, or " if backend._C.has_amx else ""
    assert f"; bf16 brgemm: oneDNN's kernel by {amx}AVX512-BF16, " in said
    fresh.setenv(matmul.VARIABLE, "blas")
    assert matmul.library(torch.bfloat16) == "blas"
    assert matmul.describe_cpu_matmul().endswith("bf16 upcast for blas: IPVRM_CPU_MATMUL is set")
    fresh.delenv(matmul.VARIABLE)
    with torch.backends.mkldnn.flags(enabled=False):
        assert matmul.library(torch.bfloat16) == "blas"
        assert "bf16 upcast for blas: torch.backends.mkldnn.enabled is False" in matmul.describe_cpu_matmul()


def test_a_machine_without_the_instructions_says_so(fresh):
    class Other:
        has_bf16_products, has_amx = False, False

    fresh.setattr(backend, "_C", Other)
    assert "has no AVX512-BF16" in matmul.why_not_bf16()
    assert matmul.library(torch.bfloat16) in matmul.NAMES
    assert "bf16 upcast for " in matmul.describe_cpu_matmul()


@here
def test_a_pytorch_without_the_kernel_says_so(fresh):
    fresh.setattr(matmul, "brgemm_addresses", tuple)
    assert matmul.why_not_bf16() == "this build of PyTorch does not export oneDNN's kernel"
    look = torch_private.brgemm_addresses.__wrapped__
    assert len(look()) == 2
    fresh.setattr(torch_private, "BRGEMM", ("_Zno_such_name", "_Znor_this"))
    assert look() == ()
    fresh.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    assert look() == ()


@here
@pytest.mark.parametrize("fault", ["it refuses", "it is wrong"])
def test_a_kernel_that_fails_its_first_product_is_not_used(fault, fresh):
    real = backend.native_call

    def call(name, *args):
        if name == "multiply_panels_cpu" and fault == "it refuses":
            raise RuntimeError("no such kernel")
        real(name, *args)
        if name == "multiply_panels_cpu":
            ctypes.cast(args[-2], ctypes.POINTER(ctypes.c_float))[0] += 1

    fresh.setattr(backend, "native_call", call)
    said = {"it refuses": "refuses: no such kernel", "it is wrong": "is wrong about whole numbers"}[fault]
    assert said in matmul.why_not_bf16()
    assert matmul.library(torch.bfloat16) in matmul.NAMES


@pytest.mark.parametrize("entry", matmul.MEASURED_BF16.values(), ids=lambda entry: entry.processor)
def test_each_entry_s_measurement_says_the_same(entry):
    """On that processor upcast operands take at least half as long again, in every case."""
    if not RESULTS.is_dir():
        pytest.skip("no checkout with benchmarks/ beside the tests")
    found = json.loads((RESULTS / entry.file).read_text())
    assert found["machine"]["processor"] == entry.processor and entry.library == matmul.BRGEMM
    times = {}
    for row in found["rows"]:
        if "bfloat16" in row["shape"]:
            times.setdefault((row["op"], row["shape"]), {})[row["contender"]] = row["median_ms"]
    upcast = f", by {found['machine']['cpu_matmul']}"
    pairs = [
        (of[name.removesuffix(upcast)], time)
        for of in times.values()
        for name, time in of.items()
        if name.endswith(upcast)
    ]
    assert len(pairs) >= 6
    assert all(1.5 * own <= upcast for own, upcast in pairs), pairs


@here
@pytest.mark.parametrize(
    "before",
    [
        "torch.set_default_dtype(torch.float64)", "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta')", "FakeTensorMode().__enter__()",
    ],
)  # fmt: skip
def test_the_first_question_is_asked_under_any_mode(before):
    """In a process of its own: the answer is kept."""
    code = f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from ipvrm_kernels.head import matmul
{before}
assert matmul.library(torch.bfloat16) == "brgemm", matmul.why_not_bf16()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@here
def test_pages_behind_the_operands_are_not_touched():
    """Sources and targets end at a page that may not be read or written, whatever their tails are."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)

    def at_the_end(count, dtype):
        """`count` numbers that end where a page begins that nobody may touch."""
        size = -(-count * dtype.itemsize // page) * page
        memory = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + size), page, 0) == 0
        kept.append(memory)
        offset = size - count * dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)

    kept = []
    for rows, cols in ((1, 1), (1, 33), (33, 65), (17, 31), (2, 64)):
        high = blocks.padded_terms(rows)
        for dtype in (torch.bfloat16, torch.float32):
            x = at_the_end(rows * cols, dtype).copy_(torch.randn(rows * cols)).view(rows, cols)
            for transpose, terms in ((True, cols + cols % 2), (False, high)):
                out = at_the_end(matmul.panel_elements(terms, rows if transpose else cols), torch.bfloat16)
                wide = dtype == torch.float32
                backend.native_call("pack_panels_cpu", x, wide, rows, cols, cols, transpose, terms, out)
        tile = at_the_end(rows * cols, torch.float32).copy_(torch.randn(rows * cols)).view(rows, cols)
        out = at_the_end(rows * (cols + cols % 2), torch.bfloat16)
        out_t = at_the_end(cols * high, torch.bfloat16)
        backend.native_call("round_tile_cpu", tile, rows, cols, out, out_t, high)
        assert torch.equal(out_t.view(cols, high)[:, :rows], tile.T.bfloat16())
        assert (out_t.view(cols, high)[:, rows:] == 0).all()


@here
def test_no_terms_are_a_sum_of_zero():
    out = torch.full((2, 3), float("nan"))
    nothing = torch.empty(0, dtype=torch.bfloat16)
    backend.native_call("multiply_panels_cpu", matmul.brgemm(), nothing, 0, nothing, 2, 3, 0, out, False)
    assert (out == 0).all()


@here
def test_candidates_are_those_of_upcast_operands(fresh):
    h, w = operands(300, 2000, 96, seed=5)
    mine = linear_candidates(h, w, impl="cpp")
    fresh.setenv(matmul.VARIABLE, "blas")
    theirs = linear_candidates(h, w, impl="cpp")
    assert torch.equal(mine.counts, theirs.counts) and torch.equal(mine.ids, theirs.ids)
    torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
