"""Gradients of the head ops in Triton by recomputation: the vocabulary in chunks, logits again tile by tile.

For each chunk of columns: a kernel multiplies a tile again and turns it, still in registers, into the dense
part of da = dL/d(h.w + b), saved once in the operands' dtype; the N * K entries at ids are overwritten
from fp32 (dense and sparse part are rounded together); then dhidden += da @ weight and dweight = da.T @
hidden by the vendor's matmul with fp32 results. dweight of a chunk is complete, so it is written once, and
no (V, D) fp32 buffer exists.

Rows without upstream gradient (prompts, padding, clipped tokens) go last, by a stable partition on the
device: the kernel reads the number of the others from memory, so nothing waits for the host, multiplies
only their tiles, and the rest of da is zeroed once for all chunks.

fp16 operands: da is scaled by a power of two, so that the largest finite upstream gradient is near 1, and
scaled back in fp32. fp32 operands: the vendor's matmul follows torch.backends.cuda.matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .triton_ids import OutputGradients, active_first, id_gradients, patch
from .triton_tiles import (
    Config,
    Operands,
    _load_tile,
    _tile_position,
    _transform,
    described,
    num_programs,
    refuse_workspace,
    scalar_bytes,
    tile_arguments,
    transform_arguments,
)

PRODUCT_ROWS = 4096  # of a product that is added where addmm cannot


@triton.jit(do_not_specialize=["N"])
def _head_dz_kernel(
    hidden,  # (N, D) descriptor or pointer
    weight,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,)
    lse_ptr,  # (N,)
    remainder_ptr,  # (N,) of lse
    total_ptr,  # (N,) G
    dentropy_ptr,  # (N,)
    entropy_ptr,  # (N,)
    count_ptr,  # () rows to compute, the first of N
    target_ptr,  # (N,) rows of da to write them to, if SCATTER
    da,  # (N, C) descriptor or pointer
    N, D, V, start, C, hidden_stride, weight_stride,  # scalars; columns start .. start + C
    scale, cap, factor, gain,  # scalars, see _transform; gain = logit_scale / temperature
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SCATTER: tl.constexpr,
    ROW_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    row_blocks, column_blocks = tl.cdiv(count, BLOCK_N), C // BLOCK_V
    tl.assume(D > 0)
    for item in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN):
        row_block, column_block = _tile_position(item, row_blocks, column_blocks, ROW_GROUP)
        row, at = row_block * BLOCK_N, column_block * BLOCK_V
        column = start + at
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
        local = at + tl.arange(0, BLOCK_V)  # (BLOCK_V,) in da, known to be aligned, which `start` is not
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)  # (BLOCK_V,)
            a += bias[None, :]
        z, bend = _transform(a, scale, cap, factor, HAS_SOFTCAP)  # (BLOCK_N, BLOCK_V)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        total = tl.load(total_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        remainder = tl.load(remainder_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
        above = z - lse[:, None]  # (BLOCK_N, BLOCK_V)
        if ENTROPY:
            log_p = tl.minimum(above - remainder[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
            p = tl.exp2(log_p * 1.4426950408889634)  # (BLOCK_N, BLOCK_V)
            dentropy = tl.load(dentropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
            entropy = tl.load(entropy_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
            surprise = log_p + entropy[:, None]  # (BLOCK_N, BLOCK_V)
            surprise = tl.where(p > 0, surprise, 0.0)  # (BLOCK_N, BLOCK_V)
            dense = -p * (total[:, None] + dentropy[:, None] * surprise) * gain  # (BLOCK_N, BLOCK_V)
        else:
            log2_p = tl.fma(above, 1.4426950408889634, (remainder * -1.4426950408889634)[:, None])
            p = tl.exp2(tl.minimum(log2_p, 0.0, propagate_nan=tl.PropagateNan.ALL))  # (BLOCK_N, BLOCK_V)
            dense = p * (total * -gain)[:, None]  # (BLOCK_N, BLOCK_V)
        dense = dense * bend  # (BLOCK_N, BLOCK_V)
        if FLATTEN or row + BLOCK_N > count:  # see _head_stats_kernel on branches
            dense = tl.where((rows < count)[:, None], dense, 0.0)  # (BLOCK_N, BLOCK_V) whatever a row holds
        if SCATTER:
            targets = tl.load(target_ptr + rows, mask=rows < count, other=0)  # (BLOCK_N,)
            where = targets[:, None] * C + local[None, :]  # (BLOCK_N, BLOCK_V)
            tl.store(da + where, dense.to(da.dtype.element_ty), mask=(rows < count)[:, None])
        elif TMA:
            da.store([row, at], dense.to(da.dtype))
        else:
            where = rows.to(tl.int64)[:, None] * C + local[None, :]  # (BLOCK_N, BLOCK_V)
            tl.store(da + where, dense.to(da.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _zero_rows_kernel(
    x_ptr,  # (N, C)
    flags_ptr,  # (N,) rows to zero are not 0
    C,  # scalar
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags_ptr + row) != 0:
        for first in range(0, C, BLOCK):
            columns = first + tl.arange(0, BLOCK)  # (BLOCK,)
            zeros = tl.zeros((BLOCK,), x_ptr.dtype.element_ty)  # (BLOCK,)
            tl.store(x_ptr + row * C + columns, zeros, mask=columns < C)


@triton.jit
def _gather_rows_kernel(
    x_ptr,  # (N, D)
    order_ptr,  # (N,)
    count_ptr,  # () rows to copy, the first of N
    out_ptr,  # (N, D)
    D, stride,  # scalars; stride of x
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count_ptr):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        values = tl.load(x_ptr + tl.load(order_ptr + row) * stride + columns, mask=columns < D)  # (BLOCK,)
        tl.store(out_ptr + row * D + columns, values, mask=columns < D)


@triton.jit(do_not_specialize=["N"])
def _column_sums_kernel(
    x_ptr,  # (N, C)
    factor_ptr,  # (N,)
    out_ptr,  # (num_columns,), added to
    N, C, num_columns,  # scalars
    HAS_FACTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    total = tl.zeros((BLOCK_C,), tl.float64)  # (BLOCK_C,) N terms that cancel; reads bound it, not adds
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        inside = (rows < N)[:, None] & (columns < num_columns)[None, :]  # (BLOCK_N, BLOCK_C)
        where = rows.to(tl.int64)[:, None] * C + columns[None, :]  # (BLOCK_N, BLOCK_C)
        x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_C)
        if HAS_FACTOR:
            x *= tl.load(factor_ptr + rows, mask=rows < N, other=0.0)[:, None]
        total += tl.sum(x, 0).to(tl.float64)
    owned = columns < num_columns  # (BLOCK_C,)
    before = tl.load(out_ptr + columns, mask=owned, other=0.0)  # (BLOCK_C,)
    tl.store(out_ptr + columns, (before + total).to(tl.float32), mask=owned)


def zero_rows(x: Tensor, flags: Tensor) -> None:
    """x (N, C) = 0 in rows whose flag (N,) is set; the others are not touched."""
    if len(x):
        _zero_rows_kernel[(len(x),)](x, flags, x.stride(0), BLOCK=4096)


def gather_rows(x: Tensor, order: Tensor, count: Tensor, out: Tensor) -> None:
    """out (N, D) [i] = x[order[i]] for i < count (); the other rows are neither read nor written."""
    N, D = out.shape
    if N:
        BLOCK = 4096 if backend.INTERPRETED else 1024
        _gather_rows_kernel[(N, triton.cdiv(D, BLOCK))](x, order, count, out, D, x.stride(0), BLOCK=BLOCK)


def add_column_sums(out: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
    """out (C,) += sum_n factor[n] * x[n, :] for x (N, C), in fp64 from row to row."""
    BLOCK_N, BLOCK_C = (256, 1024) if backend.INTERPRETED else (32, 128)
    _column_sums_kernel[(triton.cdiv(len(out), BLOCK_C),)](
        x, out if factor is None else factor, out, len(x), x.stride(0), len(out),
        HAS_FACTOR=factor is not None, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
    )  # fmt: skip


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch's addmm takes a half product and an fp32 addend (2.9 refuses it)."""
    half, wide = torch.zeros(8, 8, dtype=torch.bfloat16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(wide, half, half, out_dtype=torch.float32, out=wide)
    except RuntimeError:
        return False
    return True


def add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool = False) -> None:
    """out (rows, columns) fp32 += a @ b, or = if fresh, from operands of one dtype, rounded nowhere."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        out.addmm_(a.float(), b.float(), beta=0 if fresh else 1)
    elif fresh:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _adds_to_fp32(a.device):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:  # a part of the rows at a time, so that the product stays in L2
        for first in range(0, len(out), PRODUCT_ROWS):
            rows = slice(first, first + PRODUCT_ROWS)
            out[rows] += torch.mm(a[rows], b, out_dtype=torch.float32)


def chunk_columns(
    op: str, ops: Operands, K: int, weight_dtype: torch.dtype, needs: Sequence[bool], gathered: bool,
    limit: int, explicit: bool,
) -> int:  # fmt: skip
    """C, the columns of one chunk, so that scratch memory stays within `limit` bytes.

    That is what exists besides the inputs, the outputs of a forward, and the gradients, in fp32 but for
    dweight.
    """
    (N, D), V, step = ops.hidden.shape, ops.weight.shape[0], ops.config.BLOCK_V
    size, cast = ops.hidden.element_size(), ops.weight.dtype != ops.hidden.dtype
    fixed = ops.copied + N * scalar_bytes(K)
    narrow = needs[1] and weight_dtype != torch.float32  # a chunk's dweight before it is rounded
    column = max(1, N) * size + 4 * D * narrow + D * size * cast
    scattered = fixed + 4 * N * D if gathered and needs[0] else 0  # dhidden again, in the rows' order
    fixed += N * D * size if gathered else 0
    if explicit:
        refuse_workspace(op, max(fixed + step * column, scattered), limit)
    whole = -(-V // step) * step
    return max(step, min(whole, (limit - fixed) // column // step * step))


class Rows(NamedTuple):
    """Per-row inputs of da, in the order of ops.hidden; the first `num_active` have a gradient."""

    ids: Tensor  # (N, K)
    values: Tensor | None  # (N, K) da at ids, None for zeros
    lse: Tensor  # (N,)
    remainder: Tensor  # (N,) of lse
    entropy: Tensor  # (N,)
    total: Tensor  # (N,) G
    dentropy: Tensor | None  # (N,)
    num_active: Tensor  # () int32


def scatter_config(config: Config) -> Config:
    """Narrower tiles: scattered rows take an address for each element, and this launch is rare and short."""
    return config._replace(BLOCK_V=min(64, config.BLOCK_V))


def launch_dz(
    ops: Operands, rows: Rows, da: Tensor, start: int, gain: float, target: Tensor | None = None
) -> None:
    """Dense da (N, C) of columns start .. start + C, in row n, or in row target[n] of da."""
    (N, D), V, C, config = ops.hidden.shape, ops.weight.shape[0], da.shape[1], ops.of_kernel("dz")
    if target is not None:
        config = scatter_config(config)
    items, transform = triton.cdiv(N, config.BLOCK_N) * (C // config.BLOCK_V), ops.transform
    _head_dz_kernel[(num_programs(ops, config, items),)](
        described(ops.hidden, config.BLOCK_N, config.BLOCK_D, ops.tma),
        described(ops.weight, config.BLOCK_V, config.BLOCK_D, ops.tma),
        rows.lse if ops.bias is None else ops.bias, rows.lse, rows.remainder, rows.total,
        rows.total if rows.dentropy is None else rows.dentropy, rows.entropy, rows.num_active,
        rows.num_active if target is None else target,
        described(da, config.BLOCK_N, config.BLOCK_V, ops.tma and target is None),
        N, D, V, start, C, ops.hidden.stride(0), ops.weight.stride(0),
        *transform_arguments(transform), gain,
        HAS_BIAS=ops.bias is not None, HAS_SOFTCAP=transform.softcap is not None,
        ENTROPY=rows.dentropy is not None, SCATTER=target is not None,
        **tile_arguments(ops, config),
    )  # fmt: skip


def dense_chunks(ops: Operands, rows: Rows, C: int, visit: Callable[[int, int, Tensor], None]) -> None:
    """Call visit(start, end, da (N, end - start)) for each chunk of C columns."""
    N, V, transform = ops.hidden.shape[0], ops.weight.shape[0], ops.transform
    da = torch.empty((N, C), dtype=ops.hidden.dtype, device=ops.hidden.device)
    zero_rows(da, torch.arange(N, device=da.device) >= rows.num_active)  # once: no chunk writes there
    for start in range(0, V if N else 0, C):
        end = min(start + C, V)
        launch_dz(ops, rows, da, start, transform.scale / transform.temperature)
        patch(rows.values, rows.ids, da, start, end)
        visit(start, end, da[:, : end - start])


def expectation(
    ops: Operands, ids: Tensor, lse: Tensor, remainder: Tensor, limit: int, explicit: bool
) -> Tensor:
    """E' (N, D) fp32 of a frozen head, by recomputation."""
    (N, D), K = ops.hidden.shape, ids.shape[1]
    needs = (True, False, False)
    C = chunk_columns("linear_logprobs", ops, K, torch.float32, needs, False, limit, explicit)
    result = torch.empty((N, D), dtype=torch.float32, device=ops.hidden.device)
    count = torch.full((), N, dtype=torch.int32, device=lse.device)

    def visit(start: int, end: int, da: Tensor) -> None:
        add_product(result, da, ops.weight[start:end].to(da.dtype), fresh=start == 0)

    dense_chunks(ops, Rows(ids, None, lse, remainder, lse, torch.full_like(lse, -1), None, count), C, visit)
    return result


def gradients(
    op: str, ops: Operands, weight_dtype: torch.dtype, ids: Tensor, logprobs: Tensor, lse: Tensor,
    remainder: Tensor, entropy: Tensor, up: OutputGradients, needs: Sequence[bool], limit: int,
    explicit: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden fp32, dweight in weight_dtype, dbias fp32), 0 elements if not needed."""
    scale = None
    if ops.hidden.dtype == torch.float16 and len(lse):
        most = up.dlogprobs.abs().sum(1) + up.total.abs()
        most = most if up.dentropy is None else torch.maximum(most, up.dentropy.abs())
        most = torch.where(most.isfinite(), most, 0.0).amax()  # inf and NaN stay in their own rows
        scale = torch.where(most > 0, torch.exp2(-torch.log2(most).ceil()), 1.0)  # () stays on the device
        dentropy = None if up.dentropy is None else up.dentropy * scale
        up = OutputGradients(up.dlogprobs * scale, up.total * scale, up.dlse * scale, dentropy)
    C = chunk_columns(op, ops, ids.shape[1], weight_dtype, needs, True, limit, explicit)
    order, count = active_first(up)
    values = id_gradients(ops, ids, logprobs, lse, entropy, up, distinct=False)

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, order)

    rows = Rows(
        take(ids), take(values), take(lse), take(remainder), take(lse if up.dentropy is None else entropy),
        take(up.total), None if up.dentropy is None else take(up.dentropy), count,
    )  # fmt: skip
    hidden = take(ops.hidden)
    zero_rows(hidden, torch.arange(len(order), device=order.device) >= count)  # 0 * NaN would reach dweight
    dhidden, dweight, dbias = _sorted_gradients(ops.of_rows(hidden), rows, C, weight_dtype, needs, scale)
    if needs[0]:
        dhidden = torch.empty_like(dhidden).index_copy_(0, order, dhidden)
    return dhidden, dweight, dbias


def _sorted_gradients(
    ops: Operands, rows: Rows, C: int, weight_dtype: torch.dtype, needs: Sequence[bool], scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows in the order of `active_first`; da holds `scale` times theirs."""
    (N, D), V = ops.hidden.shape, ops.weight.shape[0]

    def new(need: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        make = torch.empty if N else torch.zeros
        return make(shape if need else (0,), dtype=dtype, device=ops.hidden.device)

    dhidden, dweight = new(needs[0], torch.float32, N, D), new(needs[1], weight_dtype, V, D)
    dbias = new(needs[2], torch.float32, V).zero_()

    def visit(start: int, end: int, da: Tensor) -> None:
        if needs[0]:
            add_product(dhidden, da, ops.weight[start:end].to(da.dtype), fresh=start == 0)
        if needs[1]:
            target = part = dweight[start:end]
            if weight_dtype != torch.float32:
                part = torch.empty(target.shape, dtype=torch.float32, device=target.device)
            add_product(part, da.T, ops.hidden, fresh=True)
            if scale is not None:
                part /= scale
            if part is not target:
                target.copy_(part)
        if needs[2]:
            add_column_sums(dbias[start:end], da)

    dense_chunks(ops, rows, C, visit)
    if scale is not None:
        dhidden, dbias = dhidden.div_(scale), dbias.div_(scale)
    return dhidden, dweight, dbias
