"""The fp32 matmuls of the CPU head ops: by the BLAS behind torch.mm, or by oneDNN where that BLAS is slow.

MKL takes its AVX-512 kernels on Intel processors only and AVX2 on all others: half of what an AMD Zen 5 can
do. oneDNN, which PyTorch's x86 builds bring along, goes by the instructions: twice as fast there, at about
twice the rounding error, since it sums the products of a logit in longer chains
(benchmarks/studies/cpu_matmul.py).

PyTorch reaches oneDNN for dense fp32 by the op that Inductor compiles `linear` to; it takes no `out`, so a
product passes through a tensor of its own, which `transient_bytes` lets the plans count.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from .. import backend

NAMES = ("blas", "onednn")
VARIABLE = "IPVRM_CPU_MATMUL"  # one of NAMES, to overrule the choice
# what oneDNN packs into, per thread: bytes for each term of the sums, up to so many terms, and some more
PACKED_PER_TERM, PACKED_TERMS, PACKED_BESIDES = 256, 1024, 2048


@cache
def why_not(name: str) -> str | None:
    """None if the matmuls can be done by `name` here, else the reason in words."""
    if name == "blas":
        return None
    if name not in NAMES:
        return f"no such library; the names are {', '.join(NAMES)}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of PyTorch has no oneDNN for dense matrices"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"its gain is AVX-512; PyTorch uses {capability} here"


@cache
def _choose(asked: str) -> str:
    if not asked:
        slow = torch.backends.mkl.is_available() and not backend.IS_INTEL  # MKL, which stays with AVX2
        return "onednn" if slow and why_not("onednn") is None else "blas"
    reason = why_not(asked)
    if reason is not None:
        raise ValueError(f"{VARIABLE}={asked} cannot run here: {reason}")
    return asked


def library() -> str:
    """Whose matmul runs: "blas" | "onednn". torch.backends.mkldnn.enabled = False turns the second off.

    Raises: ValueError if the environment variable IPVRM_CPU_MATMUL names one that cannot run here.
    """
    name = _choose(os.environ.get(VARIABLE, ""))
    return name if torch.backends.mkldnn.enabled else "blas"


def reason() -> str:
    """Why `library` says what it says, in words."""
    if os.environ.get(VARIABLE):
        return f"{VARIABLE} asks for it"
    if library() == "onednn":
        return f"it uses AVX-512, which MKL keeps to Intel's processors; {VARIABLE}=blas overrules"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return why_not("onednn") or f"PyTorch's BLAS uses AVX-512 here itself; {VARIABLE}=onednn overrules"


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out (M, N) = a (M, K) @ b (K, N), or out += it; fp32, for any strides."""
    if library() == "blas":
        torch.addmm(out, a, b, beta=int(add), out=out)
        return
    product = torch.ops.mkldnn._linear_pointwise.default(a, b.T, None, "none", [], "")
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def turned(tile: Tensor, room: Tensor) -> Tensor:
    """tile (R, C), contiguous, transposed as `multiply` reads it fastest; room: from `room_to_turn`."""
    if library() == "blas":
        return tile.T
    out = room[: tile.numel()].view(tile.shape[1], tile.shape[0])
    backend.native_call("transpose_cpu", tile, *tile.shape, out)
    return out


def room_to_turn(elements: int) -> Tensor:
    """The `room` of `turned` for tiles of up to so many elements."""
    return torch.empty(elements if library() == "onednn" else 0)


def transient_bytes(R: int, C: int, D: int, gradients: bool) -> int:
    """Memory that the matmuls of one tile (R, C) of h.w take besides their operands, at most.

    gradients: those that add to (R, D) and (C, D) too, with the `room` of `turned`.
    """
    if library() == "blas":
        return 0
    terms = min(max(C, D, R if gradients else 0), PACKED_TERMS)
    packed = torch.get_num_threads() * (PACKED_PER_TERM * terms + PACKED_BESIDES)
    return packed + 4 * (R * C + (R + C) * max(C, D) if gradients else R * C)
