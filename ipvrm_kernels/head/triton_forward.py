"""The head's tile driver in Triton: one pass over the vocabulary that leaves statistics instead of logits.

Every program computes tiles of z (BLOCK_N rows x BLOCK_V columns, fp32) and leaves of each the (max,
sum exp(z - max), sum (z - max) exp(z - max)) of its rows, merged in a fixed order by a second kernel: 8 or
12 bytes for BLOCK_V logits, and no value carried from tile to tile (Triton 3.6 cannot flatten a loop that
carries one). The difference is taken before the scale of exp2: scaling z first would save one
multiplication and cost the digits of lse that p near 1 needs. Where z grows with h.w + b no logit is formed:
maxima and differences are those of h.w + b, exp2 takes all scales as one factor, and a row's results are
scaled. Columns beyond V are masked in the last tiles alone. Tiles depend on V alone, so a row's result
depends neither on N nor on its position. Where candidates are wanted the maximum of every GROUP columns is
saved as well; where gradients or an expectation follow, unnormalised probabilities (triton_saved.py).
Logits of given ids come from a gather-dot: the diagonal of a small tile of gathered rows, wasteful but far
below the matmul, and accumulated by the same instructions in the same order as the tiles behind lse.

Deterministic, always: no atomics, and statistics and logits of ids of a row are bitwise the same whatever N,
its position, its neighbours and the workspace. Gradients end in the vendor's matmul: bitwise the same from
run to run at equal shapes, but its order of summation may change with N.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .triton_tiles import (
    DEFAULT_WORKSPACE,
    Operands,
    _load_tile,
    _tile_position,
    _transform,
    described,
    increases,
    num_programs,
    num_splits,
    operands,
    refuse_workspace,
    scalar_bytes,
    tile_arguments,
    transform_arguments,
)

__all__ = ["DEFAULT_WORKSPACE", "GROUP", "id_logits", "operands", "stats", "stats_rows"]  # for op files

GROUP = 32  # columns that share one saved maximum
# (row, id) pairs of one gather-dot, the diagonal of a small tile
BLOCK_IDS = 128 if backend.INTERPRETED else 64
# largest power of e by which a saved value may exceed 1; sums of those stay far inside fp32 and bf16
MAX_LIFT = 30.0


@triton.jit
def _halves(x, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The left and the right half of x (BLOCK_N, BLOCK_V); a thread holds both, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def _row_sums(e, below, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PRODUCT: tl.constexpr):
    """Sums over the rows of e (BLOCK_N, BLOCK_V) and, if PRODUCT, of e * below.

    Four quarters first: products become multiply-adds whatever order a Triton version's reduction has, and
    fewer registers are alive at once.
    """
    left, right = _halves(e, BLOCK_N, BLOCK_V)  # (BLOCK_N, BLOCK_V/2) each
    e0, e1 = _halves(left, BLOCK_N, BLOCK_V // 2)  # (BLOCK_N, BLOCK_V/4) each
    e2, e3 = _halves(right, BLOCK_N, BLOCK_V // 2)  # (BLOCK_N, BLOCK_V/4) each
    total = tl.sum((e0 + e1) + (e2 + e3), 1)  # (BLOCK_N,)
    product = total  # (BLOCK_N,) not used
    if PRODUCT:
        left, right = _halves(below, BLOCK_N, BLOCK_V)  # (BLOCK_N, BLOCK_V/2) each
        b0, b1 = _halves(left, BLOCK_N, BLOCK_V // 2)  # (BLOCK_N, BLOCK_V/4) each
        b2, b3 = _halves(right, BLOCK_N, BLOCK_V // 2)  # (BLOCK_N, BLOCK_V/4) each
        products = tl.fma(b3, e3, tl.fma(b2, e2, tl.fma(b1, e1, b0 * e0)))  # (BLOCK_N, BLOCK_V/4)
        product = tl.sum(products, 1)  # (BLOCK_N,)
    return total, product


@triton.jit(do_not_specialize=["N"])  # else compiled for seconds again at N = 1, and at multiples of 16
def _head_stats_kernel(
    hidden,  # (N, D) descriptor or pointer
    weight,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,)
    top_ptr,  # (S, N)
    sumexp_ptr,  # (S, N)
    sum_z_exp_ptr,  # (S, N)
    group_max_ptr,  # (N, num_groups)
    ref_ptr,  # (N,)
    saved,  # (N, C) descriptor or pointer, see `Saved`
    N, D, V, C, hidden_stride, weight_stride, num_groups,  # scalars
    scale, cap, factor,  # scalars, see _transform
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, RAW: tl.constexpr, ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr, SAVE: tl.constexpr, MAX_LIFT: tl.constexpr, GROUP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    unit = 1.0  # scalar, z = a * unit below
    if RAW:
        unit = factor
    steep = unit * 1.4426950408889634  # scalar, of exp2
    tl.assume(D > 0)  # else a second epilogue is compiled, for tiles of zeros
    for item in tl.range(tl.program_id(0), row_blocks * splits, tl.num_programs(0), flatten=FLATTEN):
        row_block, split = _tile_position(item, row_blocks, splits, ROW_GROUP)
        row, column = row_block * BLOCK_N, split * BLOCK_V
        a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)  # (BLOCK_N, BLOCK_V)
        for k in tl.range(0, D, BLOCK_D):
            h = _load_tile(hidden, row, k, N, D, hidden_stride, BLOCK_N, BLOCK_D, TMA)  # (BLOCK_N, BLOCK_D)
            w = _load_tile(
                weight, column, k, V, D, weight_stride, BLOCK_V, BLOCK_D, TMA
            )  # (BLOCK_V, BLOCK_D)
            w = w.to(h.dtype)  # (BLOCK_V, BLOCK_D) masters round to the operands' dtype
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)  # (BLOCK_N, BLOCK_D), (BLOCK_V, BLOCK_D)
            a = tl.dot(h, w.T, a, input_precision="ieee")  # (BLOCK_N, BLOCK_V)
        columns = column + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)  # (BLOCK_V,)
            a += bias[None, :]
        bend = 1.0  # like a if HAS_SOFTCAP
        if not RAW:  # else maxima and differences are those of a, and each row's results are scaled
            a, bend = _transform(a, scale, cap, factor, HAS_SOFTCAP)  # (BLOCK_N, BLOCK_V)
        if FLATTEN:  # without a branch, in which the matmul would be waited for: that serialises every wgmma
            a = tl.where((columns < V)[None, :], a, -float("inf"))  # (BLOCK_N, BLOCK_V)
        elif column + BLOCK_V > V:
            # compared group by group: offsets of BLOCK_V columns would wait in registers
            left = V - column - GROUP * tl.arange(0, BLOCK_V // GROUP)  # (BLOCK_V/GROUP,) columns
            present = tl.arange(0, GROUP)[None, :] < left[:, None]  # (BLOCK_V/GROUP, GROUP)
            present = tl.reshape(present, (1, BLOCK_V))  # (1, BLOCK_V)
            most = tl.max(tl.where(present, a, -float("inf")), 1)  # (BLOCK_N,)
            # so far below that exp is 0, yet finite: 0 * -inf would spoil the entropy
            padding = most - tl.maximum(tl.abs(most), 1e4 / unit)  # (BLOCK_N,)
            a = tl.where(present, a, padding[:, None])  # (BLOCK_N, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        if GROUPS:
            grouped = tl.reshape(a, (BLOCK_N, BLOCK_V // GROUP, GROUP))  # (BLOCK_N, BLOCK_V/GROUP, GROUP)
            group_max = tl.max(grouped, 2)  # (BLOCK_N, BLOCK_V/GROUP)
            groups = column // GROUP + tl.arange(0, BLOCK_V // GROUP)  # (BLOCK_V/GROUP,)
            inside = (rows < N)[:, None] & (groups < num_groups)[None, :]  # (BLOCK_N, BLOCK_V/GROUP)
            where = rows.to(tl.int64)[:, None] * num_groups + groups[None, :]  # (BLOCK_N, BLOCK_V/GROUP)
            tl.store(group_max_ptr + where, group_max * unit, mask=inside)
            top = tl.max(group_max, 1)  # (BLOCK_N,)
        else:
            top = tl.max(a, 1)  # (BLOCK_N,)
        shift = tl.where(top == -float("inf"), 0.0, top)  # (BLOCK_N,) rows of -inf alone have sums of 0
        below = a - shift[:, None]  # (BLOCK_N, BLOCK_V) a difference first, then its scale
        if HAS_BIAS or FLATTEN:
            # -inf masks a token: 0 * finite in the entropy, and NaN passes
            below = tl.maximum(below, -1e4 / unit, propagate_nan=tl.PropagateNan.ALL)  # (BLOCK_N, BLOCK_V)
        e = tl.exp2(below * steep)  # (BLOCK_N, BLOCK_V)
        sumexp, sum_below_exp = _row_sums(e, below, BLOCK_N, BLOCK_V, ENTROPY)  # (BLOCK_N,) each
        out = split.to(tl.int64) * N + rows  # (BLOCK_N,)
        tl.store(top_ptr + out, top * unit, mask=rows < N)
        tl.store(sumexp_ptr + out, sumexp, mask=rows < N)
        if ENTROPY:
            tl.store(sum_z_exp_ptr + out, sum_below_exp * unit, mask=rows < N)
        if SAVE:
            ref = tl.load(ref_ptr + rows, mask=rows < N, other=0.0)  # (BLOCK_N,)
            lift = tl.exp(tl.minimum(shift * unit - ref, MAX_LIFT))  # (BLOCK_N,) one exp for each is enough
            e = e * lift[:, None] * bend  # (BLOCK_N, BLOCK_V)
            if TMA:
                saved.store([row, column], e.to(saved.dtype))
            else:
                where = rows.to(tl.int64)[:, None] * C + columns[None, :]  # (BLOCK_N, BLOCK_V)
                tl.store(saved + where, e.to(saved.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _merge_stats_kernel(
    top_ptr,  # (S, N)
    sumexp_ptr,  # (S, N)
    sum_z_exp_ptr,  # (S, N)
    merged_top_ptr,  # (N,)
    merged_sumexp_ptr,  # (N,)
    merged_sum_z_exp_ptr,  # (N,)
    N, S,  # scalars
    ENTROPY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    merged_top = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # (BLOCK_N,)
    for first in range(0, S, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)  # (BLOCK_S,)
        inside = (splits < S)[:, None] & (rows < N)[None, :]  # (BLOCK_S, BLOCK_N)
        where = splits.to(tl.int64)[:, None] * N + rows[None, :]  # (BLOCK_S, BLOCK_N)
        top = tl.load(top_ptr + where, mask=inside, other=-float("inf"))  # (BLOCK_S, BLOCK_N)
        merged_top = tl.maximum(merged_top, tl.max(top, 0))  # (BLOCK_N,)
    merged_sumexp = tl.zeros((BLOCK_N,), tl.float32)  # (BLOCK_N,)
    merged_sum_z_exp = tl.zeros((BLOCK_N,), tl.float32)  # (BLOCK_N,)
    for first in range(0, S, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)  # (BLOCK_S,)
        inside = (splits < S)[:, None] & (rows < N)[None, :]  # (BLOCK_S, BLOCK_N)
        where = splits.to(tl.int64)[:, None] * N + rows[None, :]  # (BLOCK_S, BLOCK_N)
        top = tl.load(top_ptr + where, mask=inside, other=-float("inf"))  # (BLOCK_S, BLOCK_N)
        sumexp = tl.load(sumexp_ptr + where, mask=inside, other=0.0)  # (BLOCK_S, BLOCK_N)
        drop = tl.where(top == -float("inf"), 0.0, top - merged_top[None, :])  # (BLOCK_S, BLOCK_N)
        factor = tl.exp(drop)  # (BLOCK_S, BLOCK_N)
        merged_sumexp += tl.sum(sumexp * factor, 0)
        if ENTROPY:
            sum_z_exp = tl.load(sum_z_exp_ptr + where, mask=inside, other=0.0)  # (BLOCK_S, BLOCK_N)
            sum_z_exp = tl.where(sumexp == 0, 0.0, sum_z_exp)  # (BLOCK_S, BLOCK_N) -inf * 0 in rows of -inf
            merged_sum_z_exp += tl.sum((sum_z_exp + drop * sumexp) * factor, 0)
    tl.store(merged_top_ptr + rows, merged_top, mask=rows < N)
    tl.store(merged_sumexp_ptr + rows, merged_sumexp, mask=rows < N)
    if ENTROPY:
        tl.store(merged_sum_z_exp_ptr + rows, merged_sum_z_exp, mask=rows < N)


@triton.jit(do_not_specialize=["num_ids"])
def _id_logits_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    ids_ptr,  # (N * K,)
    z_ptr,  # (N * K,)
    num_ids, K, D, V, hidden_stride, weight_stride,  # scalars
    scale, cap, factor,  # scalars, see _transform
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    slots = tl.program_id(0).to(tl.int64) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)  # (BLOCK_IDS,)
    ids = tl.load(ids_ptr + slots, mask=slots < num_ids, other=-1).to(tl.int64)  # (BLOCK_IDS,)
    owned = (ids >= 0) & (ids < V)  # (BLOCK_IDS,)
    a = tl.zeros((BLOCK_IDS,), tl.float32)  # (BLOCK_IDS,)
    if tl.max(owned.to(tl.int32), 0) > 0:  # unused slots are many and read nothing
        ids = tl.where(owned, ids, 0)  # (BLOCK_IDS,)
        rows = slots // K  # (BLOCK_IDS,)
        products = tl.zeros((BLOCK_IDS, BLOCK_IDS), tl.float32)  # (BLOCK_IDS, BLOCK_IDS)
        for k in tl.range(0, D, BLOCK_D):
            columns = k + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
            inside = owned[:, None] & (columns < D)[None, :]  # (BLOCK_IDS, BLOCK_D)
            from_hidden = rows[:, None] * hidden_stride + columns[None, :]  # (BLOCK_IDS, BLOCK_D)
            from_weight = ids[:, None] * weight_stride + columns[None, :]  # (BLOCK_IDS, BLOCK_D)
            h = tl.load(hidden_ptr + from_hidden, mask=inside, other=0.0)  # (BLOCK_IDS, BLOCK_D)
            w = tl.load(weight_ptr + from_weight, mask=inside, other=0.0).to(h.dtype)  # (BLOCK_IDS, BLOCK_D)
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)  # (BLOCK_IDS, BLOCK_D) each
            products = tl.dot(h, w.T, products, input_precision="ieee")  # (BLOCK_IDS, BLOCK_IDS)
        each = tl.arange(0, BLOCK_IDS)  # (BLOCK_IDS,)
        a = tl.sum(tl.where(each[:, None] == each[None, :], products, 0.0), 1)  # (BLOCK_IDS,) the diagonal
        if HAS_BIAS:
            a += tl.load(bias_ptr + ids, mask=owned, other=0.0).to(tl.float32)
    z, _ = _transform(a, scale, cap, factor, HAS_SOFTCAP)  # (BLOCK_IDS,)
    tl.store(z_ptr + slots, tl.where(owned, z, -float("inf")), mask=slots < num_ids)


class Saved(NamedTuple):
    """exp(z - ref) * softcap's derivative, in the operands' dtype, and its reference."""

    ref: Tensor  # (N,) finite; a value is capped where its tile's maximum exceeds ref by more than MAX_LIFT
    values: Tensor  # (N, C), C = `padded_columns`


class Stats(NamedTuple):
    """Per row of z: max (N,), sum exp(z - max) (N,), sum (z - max) exp(z - max) (N,)."""

    top: Tensor
    sumexp: Tensor
    sum_z_exp: Tensor

    def lse(self) -> Tensor:
        """(N,) natural log-sum-exp."""
        return self.top + self.sumexp.log()

    def lse_remainder(self, lse: Tensor) -> Tensor:
        """(N,) what fp32 cut off lse; at |lse| ~ 100 it would scale a row's probabilities by 1 + 4e-6."""
        log_sum = self.sumexp.log()
        added = lse - self.top
        low = (self.top - (lse - added)) + (log_sum - added)
        return torch.where(lse.isfinite(), low, 0.0)

    def entropy(self) -> Tensor:
        """(N,) in nats."""
        return self.sumexp.log() - self.sum_z_exp / self.sumexp

    def logprobs(self, z: Tensor) -> Tensor:
        """(N, K) natural log-probs <= 0 from z (N, K): differences first, so that they keep their digits.

        -inf stays -inf: no token has no log-prob in a row of NaN either.
        """
        logprobs = (z - self.top[:, None] - self.sumexp.log()[:, None]).clamp(max=0)
        return logprobs.masked_fill_(z == -math.inf, -math.inf)


def partial_bytes(ops: Operands, entropy: bool) -> int:
    """Bytes that the statistics of one row take before they are merged."""
    return 4 * (3 if entropy else 2) * num_splits(ops)


def stats_rows(op: str, ops: Operands, K: int, entropy: bool, limit: int, explicit: bool) -> int:
    """Rows whose statistics may wait for their merge at once; a forward then stays within `limit` bytes."""
    N, block = ops.hidden.shape[0], ops.config.BLOCK_N
    fixed, row = ops.copied + N * scalar_bytes(K), partial_bytes(ops, entropy)
    if explicit:
        refuse_workspace(op, fixed + min(N, block) * row, limit)
    return max(block, (limit - fixed) // row // block * block)


def stats(
    ops: Operands, entropy: bool, group_max: Tensor | None = None, saved: Saved | None = None,
    rows_at_once: int | None = None,
) -> Stats:  # fmt: skip
    """One pass over the vocabulary.

    Fills group_max (N, ceil(V / GROUP)) with maxima of z, or saved.values, if given; both need all rows at
    once.
    """
    N, device = ops.hidden.shape[0], ops.hidden.device
    merged = torch.empty((3 if entropy else 2, N), dtype=torch.float32, device=device)
    step = min(N, rows_at_once or N)
    partial = torch.empty((len(merged), num_splits(ops), step), dtype=torch.float32, device=device)
    for r0 in range(0, N, max(1, step)):
        rows = ops if step == N else ops.of_rows(ops.hidden[r0 : r0 + step])
        _partial_stats(rows, partial, merged[:, r0 : r0 + step], group_max, saved)
    return Stats(merged[0], merged[1], merged[-1])


def _partial_stats(
    ops: Operands, partial: Tensor, merged: Tensor, group_max: Tensor | None, saved: Saved | None
) -> None:
    """The same for rows whose partial statistics (2 or 3, S, >= rows) fit."""
    (N, D), V, S = ops.hidden.shape, ops.weight.shape[0], num_splits(ops)
    config = ops.of_kernel("groups" if group_max is not None else "forward" if saved is None else "saved")
    entropy = len(merged) == 3
    first, second, third = (partial[i].view(-1) for i in (0, 1, -1))  # third is not written without entropy
    _head_stats_kernel[(num_programs(ops, config, triton.cdiv(N, config.BLOCK_N) * S),)](
        described(ops.hidden, config.BLOCK_N, config.BLOCK_D, ops.tma),
        described(ops.weight, config.BLOCK_V, config.BLOCK_D, ops.tma),
        partial if ops.bias is None else ops.bias, first, second, third,
        partial if group_max is None else group_max,
        partial if saved is None else saved.ref,
        partial if saved is None else described(saved.values, config.BLOCK_N, config.BLOCK_V, ops.tma),
        N, D, V, 0 if saved is None else saved.values.stride(0), ops.hidden.stride(0), ops.weight.stride(0),
        0 if group_max is None else group_max.shape[1], *transform_arguments(ops.transform),
        HAS_BIAS=ops.bias is not None, HAS_SOFTCAP=ops.transform.softcap is not None,
        RAW=increases(ops.transform), ENTROPY=entropy, GROUPS=group_max is not None,
        SAVE=saved is not None, MAX_LIFT=MAX_LIFT, GROUP=GROUP,
        **tile_arguments(ops, config),
    )  # fmt: skip
    merge_stats(partial, merged)


def merge_stats(partial: Tensor, merged: Tensor) -> None:
    """Partial statistics (2 or 3, S, >= N), those of N rows side by side in each, into merged (2 or 3, N)."""
    S, N = partial.shape[1], merged.shape[1]
    first, second, third = (partial[i].view(-1) for i in (0, 1, -1))  # third is not read without entropy
    BLOCK_N = 128 if backend.INTERPRETED else 8
    _merge_stats_kernel[(triton.cdiv(N, BLOCK_N),)](
        first, second, third, merged[0], merged[1], merged[-1], N, S,
        ENTROPY=len(merged) == 3, BLOCK_S=min(256, triton.next_power_of_2(S)), BLOCK_N=BLOCK_N,
    )  # fmt: skip


def id_warps(dtype: torch.dtype) -> int:
    """Warps of one gather-dot; fp32 runs without tensor cores and would spill with four."""
    return 8 if dtype == torch.float32 else 4


def id_logits(ops: Operands, ids: Tensor) -> Tensor:
    """z (N, K) at contiguous ids (N, K); -inf where an id is -1 or out of range."""
    D, (V, K) = ops.hidden.shape[1], (ops.weight.shape[0], ids.shape[1])
    z = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    if ids.numel():
        _id_logits_kernel[(triton.cdiv(ids.numel(), BLOCK_IDS),)](
            ops.hidden, ops.weight, ops.weight if ops.bias is None else ops.bias, ids, z,
            ids.numel(), K, D, V, ops.hidden.stride(0), ops.weight.stride(0),
            *transform_arguments(ops.transform),
            HAS_BIAS=ops.bias is not None, HAS_SOFTCAP=ops.transform.softcap is not None,
            BLOCK_IDS=BLOCK_IDS, BLOCK_D=ops.config.BLOCK_D,
            UPCAST=backend.INTERPRETED, num_warps=id_warps(ops.hidden.dtype), num_stages=3,
        )  # fmt: skip
    return z
