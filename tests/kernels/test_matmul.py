"""The CPU head ops' matmuls: each library's results, who is chosen, and how much memory a product takes."""

import pytest
import torch

from ipvrm_kernels import backend
from ipvrm_kernels.head import matmul

pytestmark = pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built")


@pytest.fixture
def fresh(monkeypatch):
    """Choices made under this test's circumstances are forgotten before and after it."""
    for cached in (matmul.why_not, matmul._choose):
        cached.cache_clear()
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    yield monkeypatch
    for cached in (matmul.why_not, matmul._choose):
        cached.cache_clear()


@pytest.fixture(params=matmul.NAMES)
def library(request, monkeypatch):
    reason = matmul.why_not(request.param)
    if reason is not None:
        pytest.skip(f"matmuls by {request.param}: {reason}")
    monkeypatch.setenv(matmul.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (1, 64, 33), (37, 5, 1), (130, 257, 65), (64, 1024, 100)])
def test_multiply(library, M, K, N, add):
    """Operands and results of every layout that the tile driver passes: rows of more, transposed, sliced."""
    for a in (torch.randn(M, K), torch.randn(K, M).T, torch.randn(M + 3, 2 * K)[3:, :K]):
        for b in (torch.randn(K, N), torch.randn(N, K).T, torch.randn(N, K + 8)[:, 8:].T):
            start = torch.randn(M + 2, N)
            out = start.clone()[1:-1]
            if not add:
                out.fill_(float("nan"))
            matmul.multiply(out, a, b, add=add)
            exact = a.double() @ b.double() + (start[1:-1].double() if add else 0)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-6 * K)


@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (17, 33), (1024, 100), (405, 1024)], ids=str)
def test_turned(library, shape):
    tile = torch.randn(shape)
    room = matmul.room_to_turn(tile.numel() + 3)
    out = matmul.turned(tile, room)
    assert torch.equal(out, tile.T)
    assert out.is_contiguous() or library == "blas"


def test_a_machine_without_avx512_keeps_blas(fresh):
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert matmul.library() == "blas" and "AVX2" in matmul.reason()
    fresh.setenv(matmul.VARIABLE, "onednn")
    with pytest.raises(ValueError, match="IPVRM_CPU_MATMUL=onednn cannot run here: .*AVX2"):
        matmul.library()


@pytest.mark.parametrize("intel, expected", [(True, "blas"), (False, "onednn")])
def test_the_processor_decides(fresh, intel, expected):
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fresh.setattr(backend, "IS_INTEL", intel)
    if matmul.why_not("onednn") is not None:
        pytest.skip(matmul.why_not("onednn"))
    assert matmul.library() == expected
    fresh.setenv(matmul.VARIABLE, "onednn")
    assert matmul.library() == "onednn" and "asks for it" in matmul.reason()


def test_pytorch_s_switch_is_heeded(library):
    with torch.backends.mkldnn.flags(enabled=False):
        assert matmul.library() == "blas"


def test_an_unknown_library_is_refused(fresh):
    fresh.setenv(matmul.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="IPVRM_CPU_MATMUL=mkl cannot run here: .*blas, onednn"):
        matmul.library()


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    "R, C, D",
    [(16, 16, 32), (1, 1024, 1024), (128, 512, 256), (1024, 777, 1000), (1024, 1024, 1024), (64, 1024, 4096)],
)
def test_transient_bytes_is_no_less_than_what_is_taken(library, R, C, D, threads, peak_of):
    h, w, tile = torch.randn(R, D), torch.randn(C, D), torch.randn(R, C)
    z, dh, dw = torch.empty(R, C), torch.zeros(R, D), torch.zeros(C, D)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak, _ = peak_of(lambda: (matmul.multiply(z, h, w.T), torch.empty(1))[1])
        assert peak - 4 <= matmul.transient_bytes(R, C, D, gradients=False)

        def gradients():
            room = matmul.room_to_turn(tile.numel())
            matmul.multiply(dh, tile, w, add=True)
            matmul.multiply(dw, matmul.turned(tile, room), h, add=True)
            return torch.empty(1)

        peak, _ = peak_of(gradients)
        assert peak - 4 <= matmul.transient_bytes(R, C, D, gradients=True)
    finally:
        torch.set_num_threads(before)
