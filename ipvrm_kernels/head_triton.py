"""The head's tile driver in Triton: one pass over the vocabulary that leaves statistics instead of logits.

Every program computes tiles of z (BLOCK_N rows x BLOCK_V columns, fp32) and folds each into a running (max,
sum exp(z - max), sum (z - max) exp(z - max)) of its rows, written once per split of TILES_PER_SPLIT tiles
and merged in a fixed order by a second kernel. The difference is taken before the scale of exp2: scaling z
first would save one multiplication and cost the digits of lse that p near 1 needs. Splits depend on V
alone, so a row's result depends neither on N nor on its position. Where candidates are wanted the maximum
of every GROUP columns is stored as well. Logits of given ids come from a gather-dot: the diagonal of a
small tile of gathered rows, wasteful but far below the matmul, and accumulated by the same instructions in
the same order as the tiles behind lse.

Operands come through tensor descriptors (TMA) on compute capability 9 and up, through pointers elsewhere or
where a row is not 16-byte aligned. Descriptors pad with zeros: the vocabulary's tail is masked to -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backend, tuned
from .head import Transform

# tiles between two writes of the statistics; with BLOCK_V it fixes the splits
TILES_PER_SPLIT = 2 if backend.INTERPRETED else 4
GROUP = 32  # columns that share one stored maximum
ROWS_IN_L2 = 16 << 20  # bytes of hidden that one sweep over the vocabulary works on
# (row, id) pairs of one gather-dot, the diagonal of a small tile
BLOCK_IDS = 128 if backend.INTERPRETED else 64
DEFAULT_WORKSPACE = 1 << 30


class Config(NamedTuple):
    """Tile shape and pipeline of the kernels that multiply."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


# (architecture, kind of operands): half, a half hidden state with an fp32 weight, fp32 without tensor cores.
# Chosen from the compiler's report (no spills, within shared memory), not yet timed; what a sweep on a GPU
# has measured stands in tuned.json. A plain table, so that no call ever autotunes.
CONFIGS: dict[tuple[str, str], Config] = {
    ("sm_90", "half"): Config(128, 256, 64, 8, 3),
    ("sm_90", "master"): Config(128, 128, 64, 8, 3),
    ("sm_90", "fp32"): Config(64, 64, 32, 8, 3, 2),
    ("sm_100", "half"): Config(128, 128, 64, 8, 4),
    ("sm_100", "master"): Config(128, 128, 64, 8, 3),
    ("sm_100", "fp32"): Config(64, 64, 32, 8, 3, 2),
    ("sm_80", "half"): Config(128, 128, 32, 8, 4),
    ("sm_80", "master"): Config(128, 64, 32, 8, 3),
    ("sm_80", "fp32"): Config(64, 64, 32, 8, 3, 2),
    ("interpreter", "half"): Config(128, 128, 16, 4, 1),
    ("interpreter", "fp32"): Config(128, 128, 16, 4, 1),
}
tuned.overlay(CONFIGS)


@triton.jit
def _load_tile(x, row, column, num_rows, num_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
    """Tile (ROWS, COLUMNS) of x (num_rows, num_columns) at (row, column), zero outside."""
    if TMA:
        tile = x.load([row, column])  # (ROWS, COLUMNS)
    else:
        rows = row + tl.arange(0, ROWS)  # (ROWS,)
        columns = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]  # (ROWS, COLUMNS)
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]  # (ROWS, COLUMNS)
        tile = tl.load(x + offsets, mask=inside, other=0.0)  # (ROWS, COLUMNS)
    return tile


@triton.jit
def _tanh(x):
    """tanh to a few ulp: its odd series near 0, where the quotient would cancel; shape of x."""
    square = x * x  # like x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * 1.4426950408889634))  # like x
    quotient = (1 - e) / (1 + e)  # like x
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _transform(a, scale, cap, factor, HAS_SOFTCAP: tl.constexpr):
    """(z, dz/da / constant slope) from a = h.w + b; factor folds the scales, cap is softcap's."""
    slope = 1.0  # like a if HAS_SOFTCAP
    if HAS_SOFTCAP:
        t = _tanh(a * scale / cap)  # like a
        z = t * factor  # like a
        slope = (1 - t) * (1 + t)  # like a
    else:
        z = a * factor  # like a
    return z, slope


@triton.jit
def _tile_position(item, row_blocks, num_columns, ROW_GROUP: tl.constexpr):
    """(row block, column block) of item: all row blocks of a group, then the next column, then the group."""
    group = item // (ROW_GROUP * num_columns)
    first = group * ROW_GROUP
    size = tl.minimum(row_blocks - first, ROW_GROUP)
    within = item - first * num_columns
    return first + within % size, within // size


@triton.jit
def _head_stats_kernel(
    hidden,  # (N, D) descriptor or pointer
    weight,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,)
    top_ptr,  # (S, N)
    sumexp_ptr,  # (S, N)
    sum_z_exp_ptr,  # (S, N)
    group_max_ptr,  # (N, num_groups)
    N, D, V, hidden_stride, weight_stride, num_groups,  # scalars
    scale, cap, factor,  # scalars, see _transform
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, GROUPS: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, BLOCK_V * TILES_PER_SPLIT)
    first, step = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(row_blocks * splits - first, step) * TILES_PER_SPLIT  # of this program
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # (BLOCK_N,) running maximum of z
    sumexp = tl.zeros((BLOCK_N,), tl.float32)  # (BLOCK_N,)
    sum_z_exp = tl.zeros((BLOCK_N,), tl.float32)  # (BLOCK_N,)
    for tile in tl.range(0, tiles, flatten=FLATTEN):
        item = first + (tile // TILES_PER_SPLIT) * step
        row_block, split = _tile_position(item, row_blocks, splits, ROW_GROUP)
        row = row_block * BLOCK_N
        column = (split * TILES_PER_SPLIT + tile % TILES_PER_SPLIT) * BLOCK_V
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
        z, _ = _transform(a, scale, cap, factor, HAS_SOFTCAP)  # (BLOCK_N, BLOCK_V)
        z = tl.where((columns < V)[None, :], z, -float("inf"))  # (BLOCK_N, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        if GROUPS:
            grouped = tl.reshape(z, (BLOCK_N, BLOCK_V // GROUP, GROUP))  # (BLOCK_N, BLOCK_V/GROUP, GROUP)
            group_max = tl.max(grouped, 2)  # (BLOCK_N, BLOCK_V/GROUP)
            groups = column // GROUP + tl.arange(0, BLOCK_V // GROUP)  # (BLOCK_V/GROUP,)
            inside = (rows < N)[:, None] & (groups < num_groups)[None, :]  # (BLOCK_N, BLOCK_V/GROUP)
            where = rows.to(tl.int64)[:, None] * num_groups + groups[None, :]  # (BLOCK_N, BLOCK_V/GROUP)
            tl.store(group_max_ptr + where, group_max, mask=inside)
            tile_top = tl.max(group_max, 1)  # (BLOCK_N,)
        else:
            tile_top = tl.max(z, 1)  # (BLOCK_N,)
        fresh = tile % TILES_PER_SPLIT == 0  # a new split starts
        old = tl.where(fresh, -float("inf"), top)  # (BLOCK_N,)
        top = tl.maximum(old, tile_top)  # (BLOCK_N,)
        shift = tl.where(top == -float("inf"), 0.0, top)  # (BLOCK_N,) rows of -inf alone have sums of 0
        e = tl.exp(z - shift[:, None])  # (BLOCK_N, BLOCK_V)
        decay = tl.exp(old - shift)  # (BLOCK_N,)
        if ENTROPY:
            drop = tl.where(old == -float("inf"), 0.0, old - shift)  # (BLOCK_N,)
            z_exp = tl.sum(tl.where(e > 0, (z - shift[:, None]) * e, 0.0), 1)  # (BLOCK_N,)
            kept = tl.where(fresh, 0.0, (sum_z_exp + drop * sumexp) * decay)  # (BLOCK_N,)
            sum_z_exp = kept + z_exp  # (BLOCK_N,)
        sumexp = tl.where(fresh, 0.0, sumexp * decay) + tl.sum(e, 1)  # (BLOCK_N,)
        if tile % TILES_PER_SPLIT == TILES_PER_SPLIT - 1:
            out = split.to(tl.int64) * N + rows  # (BLOCK_N,)
            tl.store(top_ptr + out, top, mask=rows < N)
            tl.store(sumexp_ptr + out, sumexp, mask=rows < N)
            if ENTROPY:
                tl.store(sum_z_exp_ptr + out, sum_z_exp, mask=rows < N)


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
    splits = tl.arange(0, BLOCK_S)  # (BLOCK_S,)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    inside = (splits < S)[:, None] & (rows < N)[None, :]  # (BLOCK_S, BLOCK_N)
    where = splits.to(tl.int64)[:, None] * N + rows[None, :]  # (BLOCK_S, BLOCK_N)
    top = tl.load(top_ptr + where, mask=inside, other=-float("inf"))  # (BLOCK_S, BLOCK_N)
    sumexp = tl.load(sumexp_ptr + where, mask=inside, other=0.0)  # (BLOCK_S, BLOCK_N)
    merged_top = tl.max(top, 0)  # (BLOCK_N,)
    drop = tl.where(top == -float("inf"), 0.0, top - merged_top[None, :])  # (BLOCK_S, BLOCK_N)
    factor = tl.exp(drop)  # (BLOCK_S, BLOCK_N)
    tl.store(merged_top_ptr + rows, merged_top, mask=rows < N)
    tl.store(merged_sumexp_ptr + rows, tl.sum(sumexp * factor, 0), mask=rows < N)
    if ENTROPY:
        sum_z_exp = tl.load(sum_z_exp_ptr + where, mask=inside, other=0.0)  # (BLOCK_S, BLOCK_N)
        merged = tl.sum((sum_z_exp + drop * sumexp) * factor, 0)  # (BLOCK_N,)
        tl.store(merged_sum_z_exp_ptr + rows, merged, mask=rows < N)


@triton.jit
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


class Operands(NamedTuple):
    """What every head kernel multiplies: unit inner strides, hidden of the operands' dtype."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), of hidden's dtype or converted tile by tile
    bias: Tensor | None  # (V,)
    transform: Transform
    config: Config
    tma: bool
    programs: int


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
        """(N, K) natural log-probs <= 0 from z (N, K): differences first, so that they keep their digits."""
        return (z - self.top[:, None] - self.sumexp.log()[:, None]).clamp(max=0)


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, limit: int = DEFAULT_WORKSPACE
) -> Operands:
    """Round hidden, and the weight where its copy fits in half of `limit` bytes, and look up the tiles."""
    device, dtype = hidden.device, transform.dtype
    hidden = unit_rows(hidden.to(dtype))
    fits = device.type == "cpu" or weight.numel() * dtype.itemsize <= limit // 2
    weight = unit_rows(weight.to(dtype) if weight.dtype != dtype and fits else weight)
    kind = "fp32" if dtype == torch.float32 else "half" if weight.dtype == dtype else "master"
    if device.type == "cpu":
        architecture, tma, programs = "interpreter", True, 3  # several items for each program
    else:
        major = torch.cuda.get_device_capability(device)[0]
        architecture = "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"
        tma, programs = major >= 9, torch.cuda.get_device_properties(device).multi_processor_count
    config = CONFIGS[architecture, kind]
    tma = tma and all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (hidden, weight)
    )
    bias = None if bias is None else bias.contiguous()
    return Operands(hidden, weight, bias, transform, config, tma, programs * config.programs_per_sm)


def unit_rows(x: Tensor) -> Tensor:
    """x (rows, columns) with rows that lie contiguous, copied only if they do not."""
    return x if x.stride(1) == 1 and (x.shape[0] < 2 or x.stride(0) >= x.shape[1]) else x.contiguous()


def described(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A descriptor of tiles (rows, columns) of x, or x itself for pointers."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]) if tma else x


def transform_arguments(transform: Transform) -> tuple[float, float, float]:
    """(scale, cap, factor) of `_transform`."""
    if transform.softcap is None:
        return 1.0, 1.0, transform.scale / transform.temperature
    return transform.scale, transform.softcap, transform.softcap / transform.temperature


def num_splits(V: int, config: Config) -> int:
    """S, a function of V and the table alone."""
    return -(-V // (config.BLOCK_V * TILES_PER_SPLIT))


def tile_arguments(ops: Operands) -> dict[str, Any]:
    """The keyword arguments that the kernels with tiles share."""
    config = ops.config
    row_bytes = config.BLOCK_N * ops.hidden.shape[1] * ops.hidden.element_size()
    return dict(
        BLOCK_N=config.BLOCK_N, BLOCK_V=config.BLOCK_V, BLOCK_D=config.BLOCK_D, TMA=ops.tma,
        ROW_GROUP=triton.next_power_of_2(max(1, ROWS_IN_L2 // row_bytes)), UPCAST=backend.INTERPRETED,
        FLATTEN=ops.tma,  # one pipeline across tiles; with pointers its addresses spill
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def stats(ops: Operands, entropy: bool, group_max: Tensor | None = None) -> Stats:
    """One pass over the vocabulary; fills group_max (N, ceil(V / GROUP)) with maxima of z if given."""
    (N, D), V, config = ops.hidden.shape, ops.weight.shape[0], ops.config
    S = num_splits(V, config)
    partial = torch.empty((3 if entropy else 2, S, N), dtype=torch.float32, device=ops.hidden.device)
    merged = torch.empty((3 if entropy else 2, N), dtype=torch.float32, device=ops.hidden.device)
    third = (lambda x: x[2]) if entropy else (lambda x: x[0])  # never written without entropy
    if N:
        items = triton.cdiv(N, config.BLOCK_N) * S
        _head_stats_kernel[(min(ops.programs, items),)](
            described(ops.hidden, config.BLOCK_N, config.BLOCK_D, ops.tma),
            described(ops.weight, config.BLOCK_V, config.BLOCK_D, ops.tma),
            partial if ops.bias is None else ops.bias, partial[0], partial[1], third(partial),
            partial if group_max is None else group_max,
            N, D, V, ops.hidden.stride(0), ops.weight.stride(0),
            0 if group_max is None else group_max.shape[1], *transform_arguments(ops.transform),
            HAS_BIAS=ops.bias is not None,
            HAS_SOFTCAP=ops.transform.softcap is not None, ENTROPY=entropy, GROUPS=group_max is not None,
            TILES_PER_SPLIT=TILES_PER_SPLIT, GROUP=GROUP, **tile_arguments(ops),
        )  # fmt: skip
        BLOCK_S = triton.next_power_of_2(S)
        rows = max(1, min(16, 2048 // BLOCK_S))
        _merge_stats_kernel[(triton.cdiv(N, rows),)](
            partial[0], partial[1], third(partial), merged[0], merged[1], third(merged), N, S,
            ENTROPY=entropy, BLOCK_S=BLOCK_S, BLOCK_N=rows,
        )  # fmt: skip
    return Stats(merged[0], merged[1], third(merged))


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
            UPCAST=backend.INTERPRETED, num_warps=4, num_stages=3,
        )  # fmt: skip
    return z
