"""The entries of da = dL/d(h.w + b) at given ids in Triton, in fp32, and a frozen head's dhidden from them.

At an id, dense and sparse part are added before anything is rounded: da = (g (1 - p) - p (G - g)) z', with g
the sum over the slots of the same id and G - g summed directly, since near p = 1 the two nearly cancel.

Frozen head: with E' = sum over v not in ids of p_v z'_v w_v formed in the forward (triton_saved.py, or
triton_backward.py), dhidden = -G E' + sum_k (g_k - G p_k) z'_k w_k over distinct ids, in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .triton_tiles import Operands


@triton.jit(do_not_specialize=["N"])
def _id_gradients_kernel(
    ids_ptr,  # (N, K)
    logprobs_ptr,  # (N, K)
    g_ptr,  # (N, K) upstream of the log-probs
    lse_ptr,  # (N,)
    dlse_ptr,  # (N,)
    dentropy_ptr,  # (N,)
    entropy_ptr,  # (N,)
    out_ptr,  # (N, K) da at ids, duplicates summed
    N, K, V, cap, gain,  # scalars; cap = softcap / temperature
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, DISTINCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    slots = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    inside = (rows < N)[:, None] & (slots < K)[None, :]  # (BLOCK_N, BLOCK_K)
    where = rows[:, None] * K + slots[None, :]  # (BLOCK_N, BLOCK_K)
    ids = tl.load(ids_ptr + where, mask=inside, other=-1)  # (BLOCK_N, BLOCK_K)
    owned = (ids >= 0) & (ids < V)  # (BLOCK_N, BLOCK_K)
    log_p = tl.load(logprobs_ptr + where, mask=owned, other=-float("inf"))  # (BLOCK_N, BLOCK_K)
    g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # (BLOCK_N, BLOCK_K) sum over the slots of the same id
    dlse = tl.load(dlse_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
    rest = g - dlse[:, None]  # (BLOCK_N, BLOCK_K) G - g, summed directly
    earlier = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)  # (BLOCK_N, BLOCK_K) of them, before this one
    for k in range(0, K):
        id = tl.load(ids_ptr + rows * K + k, mask=rows < N, other=-1)  # (BLOCK_N,)
        g_k = tl.load(g_ptr + rows * K + k, mask=rows < N, other=0.0)  # (BLOCK_N,)
        same = owned & (ids == id[:, None])  # (BLOCK_N, BLOCK_K)
        g += tl.where(same, g_k[:, None], 0.0)  # selected before it is summed
        rest += tl.where(same, 0.0, g_k[:, None])
        earlier += (same & (slots > k)[None, :]).to(tl.int32)
    p = tl.exp(log_p)  # (BLOCK_N, BLOCK_K)
    small = -log_p * (1 + log_p / 2 * (1 + log_p / 3 * (1 + log_p / 4)))  # (BLOCK_N, BLOCK_K)
    one_minus_p = tl.where(log_p > -0.02, small, 1 - p)  # (BLOCK_N, BLOCK_K) keeps its digits as p nears 1
    if ENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        dentropy = tl.load(dentropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        surprise = tl.where(p > 0, log_p + entropy[:, None], 0.0)  # (BLOCK_N, BLOCK_K)
        rest += dentropy[:, None] * surprise
    da = (g * one_minus_p - p * rest) * gain  # (BLOCK_N, BLOCK_K) = (g - p G') gain
    if HAS_SOFTCAP:
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        t = tl.where(p > 0, log_p + lse[:, None], 0.0) / cap  # (BLOCK_N, BLOCK_K)
        da *= (1 - t) * (1 + t)
    da = tl.where((g == 0) & (rest == 0), 0.0, da)  # (BLOCK_N, BLOCK_K) whatever the row holds
    if DISTINCT:
        owned = owned & (earlier == 0)  # (BLOCK_N, BLOCK_K)
    tl.store(out_ptr + where, tl.where(owned, da, 0.0), mask=inside)


@triton.jit
def _patch_kernel(
    ids_ptr,  # (N * K,)
    values_ptr,  # (N * K,)
    da_ptr,  # (N, C)
    num_ids, K, start, end, C,  # scalars; columns start .. end of the vocabulary
    ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    ids = tl.load(ids_ptr + slots, mask=slots < num_ids, other=-1)  # (BLOCK,)
    inside = (ids >= start) & (ids < end)  # (BLOCK,)
    values = tl.zeros((BLOCK,), tl.float32)  # (BLOCK,)
    if not ZERO:
        values = tl.load(values_ptr + slots, mask=inside, other=0.0)  # (BLOCK,)
    where = slots // K * C + tl.where(inside, ids - start, 0)  # (BLOCK,)
    tl.store(da_ptr + where, values.to(da_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _id_rows_kernel(
    expectation_ptr,  # (N, D)
    total_ptr,  # (N,) G
    weight_ptr,  # (V, D)
    ids_ptr,  # (N, K)
    values_ptr,  # (N, K)
    dhidden_ptr,  # (N, D)
    N, K, D, V, weight_stride,  # scalars
    ROUND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    inside = (rows < N)[:, None] & (columns < D)[None, :]  # (BLOCK_N, BLOCK_D)
    where = rows[:, None] * D + columns[None, :]  # (BLOCK_N, BLOCK_D)
    total = tl.load(total_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
    inside_used = inside & (total != 0)[:, None]  # (BLOCK_N, BLOCK_D) no gradient: exactly 0
    d = -total[:, None] * tl.load(expectation_ptr + where, mask=inside_used, other=0.0)  # (BLOCK_N, BLOCK_D)
    for k in range(0, K):
        ids = tl.load(ids_ptr + rows * K + k, mask=rows < N, other=-1)  # (BLOCK_N,)
        owned = (ids >= 0) & (ids < V)  # (BLOCK_N,)
        values = tl.load(values_ptr + rows * K + k, mask=owned, other=0.0)  # (BLOCK_N,)
        from_weight = (
            tl.where(owned, ids, 0)[:, None] * weight_stride + columns[None, :]
        )  # (BLOCK_N, BLOCK_D)
        w = tl.load(weight_ptr + from_weight, mask=inside & owned[:, None], other=0.0)  # (BLOCK_N, BLOCK_D)
        d += values[:, None] * w.to(ROUND).to(tl.float32)
    tl.store(dhidden_ptr + where, d, mask=inside)


class OutputGradients(NamedTuple):
    """Gradients that reach the op's outputs; zeros at slots that hold no token."""

    dlogprobs: Tensor  # (N, K)
    total: Tensor  # (N,) G = sum_k g_k - g_lse
    dlse: Tensor  # (N,)
    dentropy: Tensor | None  # (N,)


def output_gradients(
    ids: Tensor, V: int, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> OutputGradients:
    """Absent gradients are zeros; NaN at unused slots never enters a sum."""
    owned = (ids >= 0) & (ids < V)
    g = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    if dlogprobs is not None:
        g = torch.where(owned, dlogprobs, 0.0)
    dlse = g.new_zeros(g.shape[0]) if dlse is None else dlse.contiguous()
    return OutputGradients(
        g.contiguous(), g.sum(1) - dlse, dlse, None if dentropy is None else dentropy.contiguous()
    )


def id_gradients(
    ops: Operands,
    ids: Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    up: OutputGradients,
    distinct: bool,
) -> Tensor:
    """da (N, K) at ids, duplicates summed (and zero but for the first of them if `distinct`)."""
    N, K = ids.shape
    values, transform = torch.empty(ids.shape, dtype=torch.float32, device=ids.device), ops.transform
    if ids.numel():
        BLOCK_K = min(128, triton.next_power_of_2(K))
        BLOCK_N = (16384 if backend.INTERPRETED else 1024) // BLOCK_K
        _id_gradients_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))](
            ids, logprobs, up.dlogprobs, lse, up.dlse, up.total if up.dentropy is None else up.dentropy,
            entropy, values, N, K, ops.weight.shape[0], (transform.softcap or 1.0) / transform.temperature,
            transform.scale / transform.temperature, HAS_SOFTCAP=transform.softcap is not None,
            ENTROPY=up.dentropy is not None, DISTINCT=distinct,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    return values


def active_first(up: OutputGradients) -> tuple[Tensor, Tensor]:
    """(order (N,) of the rows, those with a gradient first and otherwise as they were, their number ())."""
    active = (up.dlogprobs != 0).any(1) | (up.total != 0)
    if up.dentropy is not None:
        active |= up.dentropy != 0
    return torch.sort((~active).to(torch.int8), stable=True)[1], active.sum(dtype=torch.int32)


def patch(values: Tensor | None, ids: Tensor, out: Tensor, start: int, end: int) -> None:
    """out (N, >= end - start)[n, ids[n, k] - start] = values[n, k], or 0, where start <= id < end."""
    N, K = ids.shape
    if ids.numel():
        block = 8192 if backend.INTERPRETED else 256
        _patch_kernel[(triton.cdiv(N * K, block),)](
            ids, out if values is None else values, out, N * K, K, start, end, out.stride(0),
            ZERO=values is None, BLOCK=block,
        )  # fmt: skip


def frozen_dhidden(
    ops: Operands, ids: Tensor, logprobs: Tensor, lse: Tensor, up: OutputGradients, expected: Tensor
) -> Tensor:
    """dhidden (N, D) fp32 from E' and the weight's rows at ids."""
    (N, D), (V, K) = ops.hidden.shape, (ops.weight.shape[0], ids.shape[1])
    values = id_gradients(ops, ids, logprobs, lse, lse, up, distinct=True)
    dhidden = torch.empty_like(expected)
    if N:
        BLOCK_N, BLOCK_D = (512, 32) if backend.INTERPRETED else (8, 256)
        _id_rows_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(D, BLOCK_D))](
            expected, up.total, ops.weight, ids, values, dhidden, N, K, D, V, ops.weight.stride(0),
            ROUND={torch.float32: tl.float32, torch.float16: tl.float16}.get(ops.hidden.dtype, tl.bfloat16),
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return dhidden
