"""Who multiplies for the CPU head ops: in fp32 the BLAS behind torch.mm, or oneDNN where that BLAS is slow.

bf16 is multiplied by oneDNN's kernel (products.py) wherever the processor has AVX512-BF16 or AMX, which do
twice the fp32 units' work or more, and the kernel is right about whole numbers; else it is upcast for fp32's
library. `MEASURED` says which that is, by kind of processor, and names the measurement that says so; other
processors keep the BLAS, and nothing is timed at run time. An AMD Zen 5 has full-width AVX-512, and PyTorch's
MKL does not use it. oneDNN, which PyTorch's x86 builds bring along, does: on two cores of an EPYC it takes
half the time, at 1.4 to 2.7 times MKL's rounding error, since it sums the products of a logit in longer
chains; that is within the ops' tolerance. On a Zen 3, which has AVX2 alone, MKL is no slower on tiles and
more exact; on a Zen 4, whose AVX-512 is half as wide, its tiles take 5 % more time, and it stays for being
more exact. The library decides the plan too: blocks of equal rows for the BLAS, of suitable ones for oneDNN.

PyTorch reaches oneDNN for dense fp32 by the op that Inductor compiles `linear` to; it takes no `out`, so a
product passes through a tensor of its own, which `transient_bytes` lets the plans count. oneDNN has no fast
kernel for operands that are not dense, and it makes and keeps one for every shape, megabytes each where sizes
are odd: it gets blocks of GRANULE rows and multiples of it (or 64), and the BLAS what is left of a batch.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import backend
from ..torch_private import brgemm_addresses, has_onednn, linear_onednn

NAMES = ("blas", "onednn")
VARIABLE = "IPVRM_CPU_MATMUL"  # one of NAMES, to overrule the choice, in bf16 too
BRGEMM = "brgemm"  # of bf16 operands alone
# what oneDNN packs into, per thread whatever the tile: bytes a term of the sums, up to so many, and more
PACKED_PER_TERM, PACKED_TERMS, PACKED_BESIDES = 256, 1024, 2048
GRANULE, LEAST = 128, 64  # rows: multiples of the first, or the second
MOST_THREADS = 60  # beyond them packing would take more than about a quarter of the default workspace


class Measured(NamedTuple):
    """The library for one kind of processor."""

    processor: str
    library: str
    file: str  # of benchmarks/results: by benchmarks.studies.cpu_matmul, bf16's by benchmarks.run


# by the family of AMD's processor and PyTorch's SIMD capability, which tells a Zen 4 from a Zen 3
MEASURED = {
    (0x1A, "AVX512"): Measured("AMD Zen 5", "onednn", "cpu_matmul-amd-zen-5.json"),
    (0x19, "AVX2"): Measured("AMD Zen 3", "blas", "cpu_matmul-amd-zen-3.json"),
    (0x19, "AVX512"): Measured("AMD Zen 4", "blas", "cpu_matmul-amd-zen-4.json"),
}
WORTH = 0.9  # x the BLAS's time that oneDNN must not exceed to be chosen, since its sums are less exact


# oneDNN's kernel against upcast operands; the same two keys
MEASURED_BF16 = {(0x19, "AVX512"): Measured("AMD Zen 4", BRGEMM, "cpu-amd-zen-4.json")}


@cache
def why_not(name: str) -> str | None:
    """None if the matmuls can be done by `name` here, else the reason in words."""
    if name == "blas":
        return None
    if name not in NAMES:
        return f"no such library; the names are {', '.join(NAMES)}"
    if not torch.backends.mkldnn.is_available() or not has_onednn():
        return "this build of PyTorch has no oneDNN for dense matrices"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"its gain is AVX-512; PyTorch uses {capability} here"


@cache
def _asked(name: str) -> str:
    reason = why_not(name)
    if reason is not None:
        raise ValueError(f"{VARIABLE}={name} cannot run here: {reason}")
    return name


def _choice() -> tuple[str, str]:
    """(library, why)."""
    asked = os.environ.get(VARIABLE, "")
    if not torch.backends.mkldnn.enabled:
        return "blas", "torch.backends.mkldnn.enabled is False"
    threads = torch.get_num_threads()
    crowd = ""
    if threads > MOST_THREADS:
        crowd = f"of {threads} threads, more than {MOST_THREADS}, oneDNN would pack into too much memory"
    if asked:
        if _asked(asked) == "onednn" and crowd:
            raise ValueError(f"{VARIABLE}={asked} cannot run here: {crowd}")
        return asked, f"{VARIABLE} asks for it"
    found = MEASURED.get((backend.AMD_FAMILY, torch.backends.cpu.get_cpu_capability()))
    if found is None or not torch.backends.mkl.is_available():
        return "blas", f"no other is known to be faster on this processor; {VARIABLE}=onednn tries one"
    missing = why_not(found.library) or (crowd if found.library == "onednn" else "")
    if missing:
        return "blas", missing
    return found.library, f"as measured on {found.processor} ({found.file}); {VARIABLE} overrules"


def brgemm() -> Any:
    """csrc's Brgemm: the addresses of oneDNN's kernel."""
    multiply, release = brgemm_addresses()
    return backend.native_struct("Brgemm", multiply=multiply, release=release)


# (M, N, K): panels that are full and not, blocks of rows of every height, more terms than a block of sums has
PROBED = ((127, 70, 130), (64, 128, 1100), (1, 1, 2))


@cache
def why_not_bf16() -> str | None:
    """None if oneDNN's bf16 kernel runs here and is right, else the reason in words."""
    if backend._C is None or not backend._C.has_bf16_products:
        return "this processor, or this build of the extension, has no AVX512-BF16"
    if not brgemm_addresses():
        return "this build of PyTorch does not export oneDNN's kernel"
    try:
        right = all(_right_about_whole_numbers(*sizes) for sizes in PROBED)
    except RuntimeError as error:
        return f"oneDNN's kernel refuses: {error}"
    return None if right else "oneDNN's kernel is wrong about whole numbers"


def _right_about_whole_numbers(M: int, N: int, K: int) -> bool:
    """Whose sums are exact in fp32. No tensors: the first call may be under a mode that makes them fake."""
    a, b = (np.arange(rows * (K + 2)).reshape(rows, -1) * 7 % 17 - 8 for rows in (M, N))  # rows of more
    a16, b16 = ((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    out, panels = np.ones((M, N), np.float32), np.empty(panel_elements(K, N), np.uint16)
    address = [x.ctypes.data for x in (b16, panels, a16, out)]
    backend.native_call("pack_panels_cpu", address[0], False, N, K, K + 2, True, K, address[1])
    for add in (True, False):
        backend.native_call(
            "multiply_panels_cpu", brgemm(), address[2], K + 2, address[1], M, N, K, address[3], add
        )
        if not np.array_equal(out, a[:, :K] @ b[:, :K].T + add):
            return False
    return True


def panel_elements(K: int, N: int) -> int:
    """bf16 numbers of a right operand (K, N), K even, in csrc's panels of 64 columns."""
    return K * (-(-N // 64) * 64)


def _why_upcast() -> str | None:
    """None if bf16 is multiplied as it is now, else the reason in words."""
    if os.environ.get(VARIABLE, ""):
        return f"{VARIABLE} is set"
    return why_not_bf16() if torch.backends.mkldnn.enabled else "torch.backends.mkldnn.enabled is False"


def _describe_bf16() -> str:
    """`BRGEMM`, or what multiplies the upcast operands, and why."""
    reason = _why_upcast()
    if reason is not None:
        return f"upcast for {library()}: {reason}"
    amx = backend._C is not None and backend._C.has_amx
    instructions = "AMX, where it may, or AVX512-BF16" if amx else "AVX512-BF16"
    found = MEASURED_BF16.get((backend.AMD_FAMILY, torch.backends.cpu.get_cpu_capability()))
    measured = f"measured on {found.processor} ({found.file})" if found else "not measured on this processor"
    return f"{BRGEMM}: oneDNN's kernel by {instructions}, {measured}; {VARIABLE}=blas turns it off"


def library(dtype: torch.dtype = torch.float32) -> str:
    """Whose matmul multiplies operands of `dtype`: "blas" | "onednn", both in fp32, or `BRGEMM` in bf16.

    torch.backends.mkldnn.enabled = False turns the latter two off.
    Raises: ValueError if the environment variable IPVRM_CPU_MATMUL names one that cannot run here.
    """
    if dtype == torch.bfloat16 and _why_upcast() is None:
        return BRGEMM
    return _choice()[0]


def describe_cpu_matmul() -> str:
    """`library` of fp32 and bf16 and why, in words; what is wrong with IPVRM_CPU_MATMUL, if it is."""
    try:
        return "{}: {}; bf16 {}".format(*_choice(), _describe_bf16())
    except ValueError as error:
        return f"none: {error}"


def suits(rows: int) -> bool:
    """Whether oneDNN may see a matmul over so many rows of the batch: there are few such numbers."""
    return rows % GRANULE == 0 or rows == LEAST


def whole_rows(rows: int, dtype: torch.dtype) -> int:
    """So many of `rows` as one matmul over them should take: all, or the largest number that suits."""
    if library(dtype) != "onednn" or rows < LEAST:
        return rows
    return rows - rows % GRANULE if rows >= GRANULE else LEAST


def padded_rows(rows: int, most: int, dtype: torch.dtype) -> int:
    """`rows` and as many rows of zeros as make the matmul fast, up to `most` in all and as many as `rows`."""
    if library(dtype) != "onednn":
        return rows
    suiting = LEAST if rows <= LEAST else -(-rows // GRANULE) * GRANULE
    return suiting if suiting <= min(most, 2 * rows) else rows


def multiply(out: Tensor, a: Tensor, b: Tensor, *, rows: int, add: bool = False) -> None:
    """out (M, N) = a (M, K) @ b (K, N), or out += it; fp32, for any strides. rows: M or K, the batch's."""
    dense = a.is_contiguous() and (b.is_contiguous() or b.T.is_contiguous())
    if not dense or not suits(rows) or library() == "blas":
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    product = linear_onednn(a, b.T)
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def transposed(tile: Tensor, buffer: Tensor) -> Tensor:
    """tile (R, C), contiguous, transposed as `multiply` reads it fastest; buffer: from `transpose_buffer`."""
    if buffer.numel() == 0 or not suits(len(tile)):
        return tile.T
    out = buffer[: tile.numel()].view(tile.shape[1], tile.shape[0])
    backend.native_call("transpose_cpu", tile, *tile.shape, out)
    return out


def transpose_buffer(elements: int) -> Tensor:
    """The `buffer` of `transposed` for tiles of up to so many elements; none where a view does."""
    return empty(elements if library() == "onednn" else 0)


def empty(*size: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty on the CPU, whatever a program has made torch's defaults: native code writes into it."""
    return torch.empty(*size, dtype=dtype, device="cpu")


def zeros(*size: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of torch.zeros."""
    return torch.zeros(*size, dtype=dtype, device="cpu")


def transient_bytes(R: int, C: int, D: int, gradients: bool) -> int:
    """Memory that the matmuls of one tile (R, C) of h.w take besides their operands, at most.

    gradients: those that add to (R, D) and (C, D) too, with the `buffer` of `transposed`.
    """
    if library() == "blas":
        return 0
    buffer = 4 * R * C if gradients else 0
    if R < LEAST:  # oneDNN does not see it
        return buffer
    terms = min(max(C, D, R if gradients else 0), PACKED_TERMS)
    packed = torch.get_num_threads() * (PACKED_PER_TERM * terms + PACKED_BESIDES)
    return packed + buffer + 4 * (max(R * C, R * D, C * D) if gradients else R * C)  # one product at a time
