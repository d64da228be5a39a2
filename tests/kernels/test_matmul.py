"""The CPU head ops' matmuls: each library's results, who is chosen, and how much memory a product takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ipvrm_kernels import backend, linear_distrl_loss, linear_logprobs
from ipvrm_kernels.head import blocks, cpu, matmul

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

pytestmark = pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built")


@pytest.fixture
def fresh(monkeypatch):
    """Choices made under this test's circumstances are forgotten before and after it."""
    for cached in (matmul.why_not, matmul._asked):
        cached.cache_clear()
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    yield monkeypatch
    for cached in (matmul.why_not, matmul._asked):
        cached.cache_clear()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [128, 129])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (1, 64, 33), (37, 5, 1), (130, 257, 65), (64, 1024, 100)])
def test_multiply(library, M, K, N, rows, add):
    """Operands and results of every layout that the tile driver passes: rows of more, transposed, sliced."""
    for a in (torch.randn(M, K), torch.randn(K, M).T, torch.randn(M + 3, 2 * K)[3:, :K]):
        for b in (torch.randn(K, N), torch.randn(N, K).T, torch.randn(N, K + 8)[:, 8:].T):
            start = torch.randn(M + 2, N)
            out = start.clone()[1:-1]
            if not add:
                out.fill_(float("nan"))
            matmul.multiply(out, a, b, rows=rows, add=add)
            exact = a.double() @ b.double() + (start[1:-1].double() if add else 0)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-6 * K)


@pytest.mark.parametrize("shape", [(1, 1), (64, 5), (17, 33), (1024, 100), (384, 1024)], ids=str)
def test_transposed(library, shape):
    tile = torch.randn(shape)
    buffer = matmul.transpose_buffer(tile.numel() + 3)
    out = matmul.transposed(tile, buffer)
    assert torch.equal(out, tile.T)
    assert out.is_contiguous() or library == "blas" or not matmul.suits(len(tile))


@pytest.fixture
def zen_5(fresh):
    """A machine that would choose oneDNN, as far as this build of PyTorch has it."""
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fresh.setattr(torch.backends.mkl, "is_available", lambda: True)
    fresh.setattr(backend, "AMD_FAMILY", 0x1A)
    if matmul.why_not("onednn") is not None:
        pytest.skip(matmul.why_not("onednn"))
    assert matmul.library() == "onednn"
    return fresh


def test_a_machine_without_avx512_keeps_blas(fresh):
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    fresh.setattr(backend, "AMD_FAMILY", 0x1A)
    assert matmul.library() == "blas"
    fresh.setenv(matmul.VARIABLE, "onednn")
    with pytest.raises(ValueError, match="IPVRM_CPU_MATMUL=onednn cannot run here: .*AVX2"):
        matmul.library()
    assert matmul.describe_cpu_matmul().startswith("none: IPVRM_CPU_MATMUL=onednn cannot run here")


@pytest.mark.parametrize("zen, simd", [(3, "AVX2"), (4, "AVX512")])
def test_a_zen_3_or_4_names_the_measurement_that_keeps_its_blas(fresh, zen, simd):
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: simd)
    fresh.setattr(torch.backends.mkl, "is_available", lambda: True)
    fresh.setattr(backend, "AMD_FAMILY", 0x19)
    said = matmul.describe_cpu_matmul()
    assert said.startswith(f"blas: as measured on AMD Zen {zen} (cpu_matmul-amd-zen-{zen}.json)")


@pytest.mark.parametrize("family", [0, 0x17])
def test_other_processors_keep_blas_until_asked(zen_5, family):
    zen_5.setattr(backend, "AMD_FAMILY", family)
    assert matmul.library() == "blas"
    zen_5.setenv(matmul.VARIABLE, "onednn")
    assert matmul.library() == "onednn" and "asks for it" in matmul.describe_cpu_matmul()


def test_a_measured_processor_names_its_measurement(zen_5):
    assert "AMD Zen 5 (cpu_matmul-amd-zen-5.json)" in matmul.describe_cpu_matmul()
    zen_5.setenv(matmul.VARIABLE, "blas")
    assert matmul.library() == "blas" and "asks for it" in matmul.describe_cpu_matmul()
    zen_5.delenv(matmul.VARIABLE)
    zen_5.setattr(matmul, "has_onednn", lambda: False)
    matmul.why_not.cache_clear()
    assert matmul.describe_cpu_matmul().startswith("blas: this build of PyTorch has no oneDNN")


@pytest.mark.parametrize("entry", matmul.MEASURED.values(), ids=lambda entry: entry.processor)
def test_each_entry_s_measurement_says_the_same(entry):
    """On that processor; oneDNN only where it takes clearly less time for a step's products."""
    file = RESULTS / entry.file
    if not RESULTS.is_dir():
        pytest.skip("no checkout with benchmarks/ beside the tests")
    found = json.loads(file.read_text())
    assert found["machine"]["processor"] == entry.processor
    times = {
        name: sum(
            row["median_ms"] for row in found["times"] if (row["op"], row["contender"]) == ("tile", name)
        )
        for name in matmul.NAMES
    }
    assert times["blas"] > 0 and (
        "onednn" if times["onednn"] <= matmul.WORTH * times["blas"] else "blas"
    ) == (entry.library)


def test_pytorch_s_switch_is_heeded(zen_5):
    zen_5.setenv(matmul.VARIABLE, "onednn")
    with torch.backends.mkldnn.flags(enabled=False):
        assert matmul.library() == "blas" and "mkldnn.enabled" in matmul.describe_cpu_matmul()


def test_an_unknown_library_is_refused(fresh):
    fresh.setenv(matmul.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="IPVRM_CPU_MATMUL=mkl cannot run here: .*blas, onednn"):
        matmul.library()


@pytest.mark.parametrize("D", [1024, 4096, 8192])
@pytest.mark.parametrize("threads", [1, 16, 60, 61, 256])
def test_tiles_stay_large_on_machines_with_many_cores(zen_5, threads, D):
    """Of the default workspace, and 64 MiB when asked for: packing takes memory for each thread."""
    zen_5.setattr(torch, "get_num_threads", lambda: threads)
    hidden, weight = torch.empty(2048, D), torch.empty(32_000, D)
    for gradients in (False, True):
        plan = blocks.make_plan("op", hidden, weight, torch.float32, None, False, N=2048, gradients=gradients)
        assert plan.rows * plan.columns >= 256 * 512
        asked = blocks.make_plan(
            "op", hidden, weight, torch.float32, blocks.WORKSPACE, False, N=2048, gradients=gradients
        )
        assert asked.rows * asked.columns >= plan.rows * plan.columns
    if D == 1024:  # a trainable scalar loss keeps its three matmuls
        assert blocks.saved_rows(2048, hidden, weight, torch.float32, None) >= cpu.LEAST_SAVED[True]


def test_onednn_never_takes_its_slow_reference(library):
    """The op in a process of its own, whose oneDNN says which kernel each product ran."""
    if library != "onednn":
        pytest.skip("it is oneDNN's own record")
    code = """
import torch
from ipvrm_kernels import linear_logprobs
torch.manual_seed(0)
weight, ids = torch.randn(2300, 32), torch.randint(0, 2300, (130, 2))
for w in (weight, weight.T.contiguous().T, torch.randn(2300, 40)[:, 8:]):
    hidden = torch.randn(130, 32)
    for h in (hidden, torch.randn(130, 48)[:, 16:], hidden.T.contiguous().T, hidden[:1].expand(130, 32)):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        out = linear_logprobs(*leaves, ids, impl="cpp")
        torch.autograd.grad(out.logprobs.sum() + out.lse.sum(), leaves)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = [line.split(",")[6] for line in run.stdout.splitlines() if ",primitive,exec," in line]
    assert kernels and not [name for name in kernels if name.startswith("ref")], set(kernels)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    "R, C, D",
    [
        (16, 16, 32), (1, 1024, 1024), (128, 512, 256), (1024, 777, 1000), (1024, 1024, 1024),
        (64, 1024, 4096), (512, 512, 8192),
    ],
)  # fmt: skip
def test_transient_bytes_is_no_less_than_what_is_taken(library, R, C, D, threads, peak_of):
    rows = R if R < matmul.LEAST else matmul.GRANULE  # as oneDNN sees them, if it does
    h, w, tile = torch.randn(R, D), torch.randn(C, D), torch.randn(R, C)
    z, dh, dw = torch.empty(R, C), torch.zeros(R, D), torch.zeros(C, D)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak, _ = peak_of(lambda: (matmul.multiply(z, h, w.T, rows=rows), torch.empty(1))[1])
        assert peak - 4 <= matmul.transient_bytes(R, C, D, gradients=False)

        def gradients():
            buffer = matmul.transpose_buffer(tile.numel())
            matmul.multiply(dh, tile, w, rows=rows, add=True)
            matmul.multiply(dw, matmul.transposed(tile, buffer), h, rows=rows, add=True)
            return torch.empty(1)

        peak, _ = peak_of(gradients)
        assert peak - 4 <= matmul.transient_bytes(R, C, D, gradients=True)
    finally:
        torch.set_num_threads(before)


def test_few_shapes_whatever_the_batch(library):
    """oneDNN keeps a kernel for every shape it has seen, and a training run has a new N at every step."""
    if library != "onednn":
        pytest.skip("it is about oneDNN's kernels")
    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket == torch.ops.mkldnn._linear_pointwise:
                seen.add((*args[0].shape, *args[1].shape))
            return func(*args, **(kwargs or {}))

    weight, old = torch.randn(1500, 16).requires_grad_(), torch.full((5000,), -7.0)
    for N in (*range(1, 300, 7), 1023, 1024, 1025, 1500, 2047, 3000, 4321):
        hidden, ids = torch.randn(N, 16, requires_grad=True), torch.randint(0, 1500, (N,))
        advantages = torch.randn(N)
        with Shapes():
            logprobs = linear_logprobs(hidden, weight, ids, impl="cpp").logprobs
            torch.autograd.grad((logprobs * (advantages > 0)).sum(), (hidden, weight))
            none = torch.empty(N, 0)
            loss = linear_distrl_loss(
                hidden, weight, ids, none.long(), old[:N], none, advantages, none, torch.tensor([0, N]).int(),
                impl="cpp",
            ).loss  # fmt: skip
            torch.autograd.grad(loss, (hidden, weight))
    rows = {64, *range(128, 1025, 128)}
    for M, K, *_ in seen:
        assert M in rows or K in rows, (M, K)
    assert len(seen) <= 2 * 3 * len(rows)  # two widths of tiles, three products


@pytest.mark.parametrize("D, V", [(1024, 32_000), (1024, 151_936), (4096, 128_256), (64, 500)])
def test_a_scalar_loss_keeps_its_logits_in_fast_blocks(zen_5, D, V):
    zen_5.setattr(torch, "get_num_threads", lambda: 2)
    weight = torch.empty(V, D)
    for N in (1, 63, 64, 100, 129, 200, 300, 2048, 5000):
        R = blocks.saved_rows(N, torch.empty(N, D), weight, torch.float32, None)
        assert R == N or R < matmul.LEAST or matmul.suits(R)
        sizes = [stop - start for start, stop in blocks.row_blocks(N, R, torch.float32)] if R else []
        assert sum(sizes) == (N if R else 0)
        assert sum(not matmul.suits(size) for size in sizes) <= (1 if R >= matmul.GRANULE else len(sizes))


def test_padding_of_active_rows(zen_5):
    sizes = {(1, 64): 1, (40, 63): 40, (63, 64): 64, (40, 128): 64, (65, 128): 128, (65, 100): 65}
    sizes[200, 384] = 256
    assert {key: matmul.padded_rows(*key, torch.float32) for key in sizes} == sizes


def test_too_many_threads_are_refused_when_asked_for(zen_5):
    zen_5.setattr(torch, "get_num_threads", lambda: 61)
    assert matmul.library() == "blas" and "61 threads" in matmul.describe_cpu_matmul()
    zen_5.setenv(matmul.VARIABLE, "onednn")
    with pytest.raises(ValueError, match="61 threads"):
        matmul.library()
