"""Packed sequences: B sequences laid end to end in N rows; `cu_seqlens` (B+1,) int32 holds their edges.

Sequence b owns rows cu_seqlens[b] : cu_seqlens[b+1]; it may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import backend
from .inputs import NO_TENSORS, check_tensors

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def sequence_rows(cu_seqlens_ptr, sequence, N):
        # int64 first row and end of the sequence, within 0 .. N whatever an unchecked cu_seqlens holds
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), N)
        return start, tl.maximum(tl.minimum(end, N), start)


def pack(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `padded` where `mask` is true, in order, and their sequence edges.

    Args: padded (B, T, ...) any dtype; mask (B, T), bool or 0/1.
    Returns: packed (N, ...) of padded's dtype, cu_seqlens (B+1,) int32. Differentiable in `padded`.
    Raises: ValueError if the first two sizes of `padded` are not the shape of `mask`.
    """
    check_tensors("pack", padded=padded, mask=mask)
    if mask.dim() != 2 or padded.shape[:2] != mask.shape:
        raise ValueError(
            f"pack: padded must be (B, T, ...) and mask (B, T), got {tuple(padded.shape)} "
            f"and {tuple(mask.shape)}"
        )
    keep = mask.bool()
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = keep.sum(1).cumsum(0)
    return padded[keep], cu_seqlens


def unpack(packed: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """The inverse of `pack` for right-padded masks: zeros after each sequence's end.

    Args: packed (N, ...); cu_seqlens (B+1,) int32; length, the padded T, at least the longest sequence.
    Returns: (B, length, ...) of packed's dtype. Differentiable in `packed`.
    Raises: ValueError if cu_seqlens does not describe N rows or a sequence is longer than `length` (values
    are read on the CPU, and on a GPU under `set_checks(True)`).
    """
    check_tensors("unpack", packed=packed)
    check_cu_seqlens_shape("unpack", cu_seqlens, packed)
    N, B = packed.shape[0], cu_seqlens.shape[0] - 1
    if backend.checks_values(cu_seqlens):
        check_cu_seqlens("unpack", cu_seqlens, N)
        longest = int(lengths(cu_seqlens).max()) if B else 0
        if longest > length:
            raise ValueError(f"unpack: length must be at least the longest sequence, {longest}, got {length}")
    segment = segment_ids(cu_seqlens, N)
    column = torch.arange(N, device=packed.device) - cu_seqlens.long()[segment]
    flat = packed.new_zeros((B * length, *packed.shape[1:]))
    return flat.index_put((segment * length + column,), packed).unflatten(0, (B, length))


def lengths(cu_seqlens: Tensor) -> Tensor:
    """(B,) int64 sequence lengths."""
    return cu_seqlens.long().diff()


def segment_ids(cu_seqlens: Tensor, N: int) -> Tensor:
    """(N,) int64: the sequence that owns each packed row (empty sequences own none)."""
    sequences = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, lengths(cu_seqlens), output_size=N)  # the size given: no sync


def positions(cu_seqlens: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """(N,) position t = 1..T of each packed row within its sequence."""
    first = cu_seqlens.long()[segment_ids(cu_seqlens, N)]
    return (torch.arange(1, N + 1, device=cu_seqlens.device) - first).to(dtype)


def _check_edges_kind(op: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{op}: cu_seqlens must be (B+1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "pack() makes one, .to(torch.int32) converts one"
        )


def check_cu_seqlens_shape(op: str, cu_seqlens: Tensor, packed: Tensor) -> None:
    """Raise ValueError unless cu_seqlens is (B+1,) int32 on the device of `packed`."""
    check_tensors(op, cu_seqlens=cu_seqlens)
    _check_edges(op, cu_seqlens, packed)


def _check_edges(op: str, cu_seqlens: Tensor, packed: Tensor) -> None:
    _check_edges_kind(op, cu_seqlens)
    if cu_seqlens.device != packed.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, the packed tensor on {packed.device}")


def checked_tokens(
    op: str,
    name: str,
    tokens: Tensor,
    cu_seqlens: Tensor,
    optional: Mapping[str, Any] = NO_TENSORS,
    **required: Any,
) -> Tensor:
    """`tokens` (N,) in the dtype the sequence ops compute in: fp32, or fp64 as given.

    optional, required: the op's other tensors, which `check_tensors` looks at in the same pass.

    Raises: ValueError unless it is (N,) floating point and cu_seqlens is (B+1,) int32 on its device; what
    `check_tensors` raises.
    """
    check_tensors(op, optional, **{name: tokens, "cu_seqlens": cu_seqlens}, **required)
    if tokens.dim() != 1 or not tokens.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be (N,) floating point, got {tuple(tokens.shape)} {tokens.dtype}"
        )
    _check_edges(op, cu_seqlens, tokens)
    return tokens if tokens.dtype in (torch.float32, torch.float64) else tokens.float()


def check_finite(op: str, name: str, value: float) -> None:
    """Raise ValueError unless `value` is finite."""
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_edge_values(op: str, cu_seqlens: Tensor, N: int) -> None:
    """`check_cu_seqlens` where `checks_values` allows: of an implementation whose kernel does not look."""
    if backend.checks_values(cu_seqlens):
        check_cu_seqlens(op, cu_seqlens, N)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, N: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to N. Reads values: see `checks_values`."""
    _check_edges_kind(op, cu_seqlens)
    B = cu_seqlens.shape[0] - 1
    native = backend.HAS_CPP and cu_seqlens.device.type == "cpu" and cu_seqlens.is_contiguous()
    if native and backend.native_call("edges_rise_cpu", cu_seqlens, B, N):
        return  # in one call instead of six of torch; those below find the words
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != N or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to N={N} without decreasing, got {cu_seqlens.tolist()[:8]}"
            f"{'...' if cu_seqlens.numel() > 8 else ''} (last {last})"
        )
