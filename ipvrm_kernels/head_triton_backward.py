"""Gradients of the head ops in Triton: the vocabulary in chunks, logits recomputed tile by tile.

For each chunk of columns: a kernel multiplies a tile again and turns it, still in registers, into the dense
part of da = dL/d(h.w + b), stored once in the operands' dtype; the N * K entries at ids are overwritten
from fp32 (dense and sparse part are rounded together); then dhidden += da @ weight and dweight = da.T @
hidden by the vendor's matmul with fp32 results. dweight of a chunk is complete, so it is written once, and
no (V, D) fp32 buffer exists.

Frozen head: E' = sum over v not in ids of p_v z'_v w_v is formed in the forward by the same kernels
(upstream -1, the ids zeroed), and dhidden = -G E' + sum_k (g_k - G p_k) z'_k w_k over distinct ids, in
fp32.

fp16 operands: da is scaled by a power of two, so that the largest upstream gradient is near 1, and scaled
back in fp32. fp32 operands: the vendor's matmul follows torch.backends.cuda.matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend
from .head_triton import (
    Operands,
    _load_tile,
    _tile_position,
    _transform,
    described,
    tile_arguments,
    transform_arguments,
)


@triton.jit
def _head_dz_kernel(
    hidden,  # (N, D) descriptor or pointer
    weight,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,)
    lse_ptr,  # (N,)
    remainder_ptr,  # (N,) of lse
    total_ptr,  # (N,) G
    dentropy_ptr,  # (N,)
    entropy_ptr,  # (N,)
    da,  # (N, C) descriptor or pointer
    N, D, V, start, C, hidden_stride, weight_stride,  # scalars; columns start .. start + C
    scale, cap, factor, slope,  # scalars, see _transform; slope = logit_scale / temperature
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(N, BLOCK_N), C // BLOCK_V
    for item in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN):
        row_block, column_block = _tile_position(item, row_blocks, column_blocks, ROW_GROUP)
        row, column = row_block * BLOCK_N, start + column_block * BLOCK_V
        a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)  # (BLOCK_N, BLOCK_V)
        for k in tl.range(0, D, BLOCK_D):
            h = _load_tile(hidden, row, k, N, D, hidden_stride, BLOCK_N, BLOCK_D, TMA)  # (BLOCK_N, BLOCK_D)
            w = _load_tile(
                weight, column, k, V, D, weight_stride, BLOCK_V, BLOCK_D, TMA
            )  # (BLOCK_V, BLOCK_D)
            w = w.to(h.dtype)  # (BLOCK_V, BLOCK_D)
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)  # (BLOCK_N, BLOCK_D), (BLOCK_V, BLOCK_D)
            a = tl.dot(h, w.T, a, input_precision="ieee")  # (BLOCK_N, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        columns = column + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)  # (BLOCK_V,)
            a += bias[None, :]
        z, bend = _transform(a, scale, cap, factor, HAS_SOFTCAP)  # (BLOCK_N, BLOCK_V)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        total = tl.load(total_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        remainder = tl.load(remainder_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        log_p = tl.minimum(z - lse[:, None] - remainder[:, None], 0.0)  # (BLOCK_N, BLOCK_V)
        p = tl.exp(log_p)  # (BLOCK_N, BLOCK_V)
        if ENTROPY:
            dentropy = tl.load(dentropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
            entropy = tl.load(entropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
            surprise = log_p + entropy[:, None]  # (BLOCK_N, BLOCK_V)
            surprise = tl.where(p > 0, surprise, 0.0)  # (BLOCK_N, BLOCK_V)
            upstream = total[:, None] + dentropy[:, None] * surprise  # (BLOCK_N, BLOCK_V)
            dense = -p * upstream * slope  # (BLOCK_N, BLOCK_V)
        else:
            dense = p * (total * -slope)[:, None]  # (BLOCK_N, BLOCK_V)
        dense = dense * bend  # (BLOCK_N, BLOCK_V)
        if TMA:
            da.store([row, column - start], dense.to(da.dtype))
        else:
            where = rows.to(tl.int64)[:, None] * C + (columns - start)[None, :]  # (BLOCK_N, BLOCK_V)
            tl.store(da + where, dense.to(da.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _id_gradients_kernel(
    ids_ptr,  # (N, K)
    logprobs_ptr,  # (N, K)
    g_ptr,  # (N, K) upstream of the log-probs
    lse_ptr,  # (N,)
    dlse_ptr,  # (N,)
    dentropy_ptr,  # (N,)
    entropy_ptr,  # (N,)
    out_ptr,  # (N, K) da at ids, duplicates summed
    N, K, V, cap, slope,  # scalars; cap = softcap / temperature
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
    da = (g * one_minus_p - p * rest) * slope  # (BLOCK_N, BLOCK_K) = (g - p G') slope
    if HAS_SOFTCAP:
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        t = tl.where(p > 0, log_p + lse[:, None], 0.0) / cap  # (BLOCK_N, BLOCK_K)
        da *= (1 - t) * (1 + t)
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


@triton.jit
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
    d = -total[:, None] * tl.load(expectation_ptr + where, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
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


class Upstream(NamedTuple):
    """Gradients that reach the op's outputs; zeros at slots that hold no token."""

    logprobs: Tensor  # (N, K)
    total: Tensor  # (N,) G = sum_k g_k - g_lse
    lse: Tensor  # (N,)
    entropy: Tensor | None  # (N,)


def upstream_gradients(
    ids: Tensor, V: int, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> Upstream:
    """Absent gradients are zeros; NaN at unused slots never enters a sum."""
    owned = (ids >= 0) & (ids < V)
    g = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    if dlogprobs is not None:
        g = torch.where(owned, dlogprobs, 0.0)
    dlse = g.new_zeros(g.shape[0]) if dlse is None else dlse.contiguous()
    return Upstream(
        g.contiguous(), g.sum(1) - dlse, dlse, None if dentropy is None else dentropy.contiguous()
    )


def id_gradients(
    ops: Operands, ids: Tensor, logprobs: Tensor, lse: Tensor, entropy: Tensor, up: Upstream, distinct: bool
) -> Tensor:
    """da (N, K) at ids, duplicates summed (and zero but for the first of them if `distinct`)."""
    N, K = ids.shape
    values, transform = torch.empty(ids.shape, dtype=torch.float32, device=ids.device), ops.transform
    if ids.numel():
        BLOCK_K = min(128, triton.next_power_of_2(K))
        BLOCK_N = (16384 if backend.INTERPRETED else 1024) // BLOCK_K
        _id_gradients_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))](
            ids, logprobs, up.logprobs, lse, up.lse, up.total if up.entropy is None else up.entropy, entropy,
            values, N, K, ops.weight.shape[0], (transform.softcap or 1.0) / transform.temperature,
            transform.scale / transform.temperature, HAS_SOFTCAP=transform.softcap is not None,
            ENTROPY=up.entropy is not None, DISTINCT=distinct,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    return values


def chunk_columns(op: str, ops: Operands, needs: Sequence[bool], limit: int, explicit: bool) -> int:
    """C, the columns of one chunk, so that scratch memory stays within `limit` bytes."""
    (N, D), V, step = ops.hidden.shape, ops.weight.shape[0], ops.config.BLOCK_V
    size, cast = ops.hidden.element_size(), ops.weight.dtype != ops.hidden.dtype
    fixed = N * D * 4 if needs[0] else 0  # a chunk's dhidden
    column = N * size + (D * 4 if needs[1] else 0) + (D * size if cast else 0)
    if explicit and fixed + step * column > limit:
        raise ValueError(
            f"{op}: max_workspace_bytes must be at least {fixed + step * column} for impl='triton' with these"
            f" shapes, got {limit}; pass fewer rows at a time or raise it"
        )
    whole = -(-V // step) * step
    return max(step, min(whole, (limit - fixed) // column // step * step))


def dense_chunks(
    op: str, ops: Operands, ids: Tensor, values: Tensor | None,
    lse: Tensor, remainder: Tensor, entropy: Tensor, up: Upstream,
    needs: Sequence[bool], limit: int, explicit: bool, visit: Callable[[int, int, Tensor], None],
) -> None:  # fmt: skip
    """Call visit(start, end, da (N, end - start)) for each chunk; da at ids from values, 0 if None."""
    (N, D), V, K = ops.hidden.shape, ops.weight.shape[0], ids.shape[1]
    C = chunk_columns(op, ops, needs, limit, explicit)
    config, transform = ops.config, ops.transform
    da = torch.empty((N, C), dtype=ops.hidden.dtype, device=ops.hidden.device)
    for start in range(0, V if N else 0, C):
        end = min(start + C, V)
        items = triton.cdiv(N, config.BLOCK_N) * (C // config.BLOCK_V)
        _head_dz_kernel[(min(ops.programs, items),)](
            described(ops.hidden, config.BLOCK_N, config.BLOCK_D, ops.tma),
            described(ops.weight, config.BLOCK_V, config.BLOCK_D, ops.tma),
            lse if ops.bias is None else ops.bias, lse, remainder, up.total,
            up.total if up.entropy is None else up.entropy, entropy,
            described(da, config.BLOCK_N, config.BLOCK_V, ops.tma),
            N, D, V, start, C, ops.hidden.stride(0), ops.weight.stride(0),
            *transform_arguments(transform), transform.scale / transform.temperature,
            HAS_BIAS=ops.bias is not None, HAS_SOFTCAP=transform.softcap is not None,
            ENTROPY=up.entropy is not None, **tile_arguments(ops),
        )  # fmt: skip
        if K:
            block = 8192 if backend.INTERPRETED else 256
            _patch_kernel[(triton.cdiv(N * K, block),)](
                ids, lse if values is None else values, da, N * K, K, start, end, C,
                ZERO=values is None, BLOCK=block,
            )  # fmt: skip
        visit(start, end, da[:, : end - start])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of one dtype, rounded nowhere."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def expectation(
    ops: Operands, ids: Tensor, lse: Tensor, remainder: Tensor, limit: int, explicit: bool
) -> Tensor:
    """E' (N, D) fp32 of a frozen head."""
    result = torch.zeros(ops.hidden.shape, dtype=torch.float32, device=ops.hidden.device)
    up = Upstream(lse, torch.full_like(lse, -1), lse, None)

    def visit(start: int, end: int, da: Tensor) -> None:
        result.add_(matmul(da, ops.weight[start:end].to(da.dtype)))

    dense_chunks(
        "linear_logprobs",
        ops,
        ids,
        None,
        lse,
        remainder,
        lse,
        up,
        (True, False, False),
        limit,
        explicit,
        visit,
    )
    return result


def frozen_dhidden(
    ops: Operands, ids: Tensor, logprobs: Tensor, lse: Tensor, up: Upstream, expected: Tensor
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


def gradients(
    op: str, ops: Operands, weight_dtype: torch.dtype, ids: Tensor, logprobs: Tensor, lse: Tensor,
    remainder: Tensor, entropy: Tensor, up: Upstream, needs: Sequence[bool], limit: int, explicit: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden fp32, dweight in weight_dtype, dbias fp32), 0 elements if not needed."""
    (N, D), V = ops.hidden.shape, ops.weight.shape[0]
    scale = None
    if ops.hidden.dtype == torch.float16 and N:
        most = up.logprobs.abs().sum(1) + up.total.abs()
        most = most.amax() if up.entropy is None else torch.maximum(most.amax(), up.entropy.abs().amax())
        scale = torch.where(most > 0, torch.exp2(-torch.log2(most).ceil()), 1.0)  # () stays on the device
        dentropy = None if up.entropy is None else up.entropy * scale
        up = Upstream(up.logprobs * scale, up.total * scale, up.lse * scale, dentropy)
    values = id_gradients(ops, ids, logprobs, lse, entropy, up, distinct=False)

    def new(need: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape if need else (0,), dtype=dtype, device=ops.hidden.device)

    dhidden, dbias = new(needs[0], torch.float32, N, D), new(needs[2], torch.float32, V)
    dweight = new(needs[1], weight_dtype, V if N == 0 else 0, D)
    if needs[1] and N:
        dweight = torch.empty((V, D), dtype=weight_dtype, device=ops.hidden.device)

    def visit(start: int, end: int, da: Tensor) -> None:
        if needs[0]:
            dhidden.add_(matmul(da, ops.weight[start:end].to(da.dtype)))
        if needs[1]:
            part = matmul(da.T, ops.hidden)
            dweight[start:end] = part if scale is None else part / scale
        if needs[2]:
            part = da.sum(0, dtype=torch.float64).float()  # N terms that cancel; reads bound it, not adds
            dbias[start:end] = part if scale is None else part / scale

    dense_chunks(op, ops, ids, values, lse, remainder, entropy, up, needs, limit, explicit, visit)
    if scale is not None and needs[0]:
        dhidden /= scale
    return dhidden, dweight, dbias
