"""What the head's Triton kernels share: tile shapes, operands, the logit transform, workspace arithmetic.

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

from .. import backend
from . import Transform, tuned

ROWS_IN_L2 = 16 << 20  # bytes of hidden that one sweep over the vocabulary works on
DEFAULT_WORKSPACE = 1 << 30


class Config(NamedTuple):
    """Tile shape and pipeline of the kernels that multiply."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    flatten: bool = False  # one pipeline across tiles, for several instructions more a logit
    softcap_V: int | None = None  # BLOCK_V with a softcap, whose tanh takes registers, if not the same

    def of(self, softcap: float | None) -> Config:
        """The same with BLOCK_V for this softcap."""
        if softcap is None or self.softcap_V is None:
            return self
        return self._replace(BLOCK_V=self.softcap_V)


KERNELS = ("forward", "groups", "saved", "dz")  # that multiply
# (architecture, kind of operands): half, a half hidden state with an fp32 weight, fp32 without tensor cores.
# Chosen from the compiler's report (no spills, within shared memory), not yet timed; what a sweep on a GPU
# has measured stands in tuned.json. A plain table, so that no call ever autotunes.
CONFIGS: dict[tuple[str, str], Config] = {
    ("sm_90", "half"): Config(128, 256, 64, 8, 4, softcap_V=128),
    ("sm_90", "master"): Config(128, 128, 64, 8, 3),
    ("sm_90", "fp32"): Config(64, 64, 32, 8, 3),
    ("sm_100", "half"): Config(128, 128, 64, 8, 4),
    ("sm_100", "master"): Config(128, 128, 64, 8, 3),
    ("sm_100", "fp32"): Config(64, 64, 32, 8, 3),
    ("sm_80", "half"): Config(128, 128, 32, 8, 4, softcap_V=64),
    ("sm_80", "master"): Config(128, 64, 32, 8, 3),
    ("sm_80", "fp32"): Config(64, 64, 16, 8, 3),
    ("interpreter", "half"): Config(128, 128, 16, 4, 1),
    ("interpreter", "fp32"): Config(128, 128, 16, 4, 1),
}
# (architecture, kind, kernel): fields in which a kernel departs from its row. Never BLOCK_V: forward, groups
# and saved leave the same statistics, bit by bit, because their tiles are the same columns.
DEPARTURES: dict[tuple[str, str, str], dict[str, Any]] = {
    ("sm_90", "half", "saved"): dict(num_stages=3),  # their result passes through shared memory
    ("sm_90", "half", "dz"): dict(num_stages=3),
    ("sm_80", "fp32", "saved"): dict(num_stages=2),  # three spill on sm_120
}
tuned.overlay(CONFIGS, DEPARTURES)


def config_of(architecture: str, kind: str, kernel: str) -> Config:
    """The configuration of one of KERNELS, without a softcap."""
    return CONFIGS[architecture, kind]._replace(**DEPARTURES.get((architecture, kind, kernel), {}))


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
    """(z, dz/da / gain) from a = h.w + b; factor folds the scales, cap is softcap's."""
    derivative = 1.0  # like a if HAS_SOFTCAP
    if HAS_SOFTCAP:
        t = _tanh(a * scale / cap)  # like a
        z = t * factor  # like a
        derivative = (1 - t) * (1 + t)  # like a
    else:
        z = a * factor  # like a
    return z, derivative


@triton.jit
def _tile_position(item, row_blocks, num_columns, ROW_GROUP: tl.constexpr):
    """(row block, column block) of item: all row blocks of a group, then the next column, then the group."""
    group = item // (ROW_GROUP * num_columns)
    first = group * ROW_GROUP
    size = tl.minimum(row_blocks - first, ROW_GROUP)
    within = item - first * num_columns
    return first + within % size, within // size


class Operands(NamedTuple):
    """What every head kernel multiplies: unit inner strides, hidden of the operands' dtype."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), of hidden's dtype or converted tile by tile
    bias: Tensor | None  # (V,)
    transform: Transform
    row: tuple[str, str]  # of CONFIGS
    config: Config  # of this row, for the softcap
    tma: bool
    programs: int  # a kernel launches programs_per_sm times as many
    copied: int  # bytes that hidden, weight and bias take above the op's inputs

    def of_rows(self, hidden: Tensor) -> Operands:
        """The same head for other rows, of the operands' dtype."""
        return self._replace(hidden=hidden, tma=self.tma and _aligned(hidden))

    def of_kernel(self, kernel: str) -> Config:
        """The configuration of one of KERNELS."""
        return self.config._replace(**DEPARTURES.get((*self.row, kernel), {}))


def tiles_of(major: int) -> str:
    """The architecture in CONFIGS of compute capability `major`."""
    if major >= 12:  # 99 KB of shared memory a block and mma as on 8.x, where 10 has 227 KB
        return "sm_80"
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, limit: int = DEFAULT_WORKSPACE
) -> Operands:
    """Round hidden, and the weight where its copy fits in half of `limit` bytes, and look up the tiles."""
    device, dtype, given = hidden.device, transform.dtype, (hidden, weight, bias)
    hidden = unit_rows(hidden.to(dtype))
    fits = device.type == "cpu" or weight.numel() * dtype.itemsize <= limit // 2
    weight = unit_rows(weight.to(dtype) if weight.dtype != dtype and fits else weight)
    kind = "fp32" if dtype == torch.float32 else "half" if weight.dtype == dtype else "master"
    tma = _aligned(hidden) and _aligned(weight)
    if device.type == "cpu":
        architecture, programs = "interpreter", 3  # several items for each program
    else:
        major = torch.cuda.get_device_capability(device)[0]
        tma = tma and major >= 9
        architecture = tiles_of(major if tma else 8)  # wider ones spill the addresses of pointers
        programs = torch.cuda.get_device_properties(device).multi_processor_count
    config = CONFIGS[architecture, kind].of(transform.softcap)
    bias = None if bias is None else bias.contiguous()
    copied = sum(
        x.numel() * x.element_size() for x, y in zip((hidden, weight, bias), given, strict=True)
        if x is not None and x is not y
    )  # fmt: skip
    return Operands(hidden, weight, bias, transform, (architecture, kind), config, tma, programs, copied)


def _aligned(x: Tensor) -> bool:
    """Whether a tensor descriptor can address x: rows on 16-byte boundaries."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


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


def increases(transform: Transform) -> bool:
    """Whether z is h.w + b times a factor > 0."""
    return transform.softcap is None and transform.scale / transform.temperature > 0


def num_splits(ops: Operands) -> int:
    """S, tiles of the vocabulary: a function of V and the table alone."""
    return -(-ops.weight.shape[0] // ops.config.BLOCK_V)


def padded_columns(ops: Operands) -> int:
    """C, the vocabulary in whole tiles."""
    return num_splits(ops) * ops.config.BLOCK_V


def scalar_bytes(K: int) -> int:
    """Bytes of one row's temporaries of shape (K,) and () while log-probs and their gradients are formed."""
    return 4 * (12 * K + 24)


def refuse_workspace(op: str, least: int, limit: int) -> None:
    """Raise ValueError if `limit` is below the least that works."""
    if limit < least:
        raise ValueError(
            f"{op}: max_workspace_bytes must be at least {least} for impl='triton' with these shapes, got"
            f" {limit}; pass fewer rows at a time or raise it"
        )


def num_programs(ops: Operands, config: Config, tiles: int) -> int:
    """Programs that work through this many tiles."""
    return min(ops.programs * config.programs_per_sm, tiles)


def tile_arguments(ops: Operands, config: Config) -> dict[str, Any]:
    """The keyword arguments that the kernels with tiles share."""
    row_bytes = config.BLOCK_N * ops.hidden.shape[1] * ops.hidden.element_size()
    return dict(
        BLOCK_N=config.BLOCK_N, BLOCK_V=config.BLOCK_V, BLOCK_D=config.BLOCK_D, TMA=ops.tma,
        ROW_GROUP=triton.next_power_of_2(max(1, ROWS_IN_L2 // row_bytes)), UPCAST=backend.INTERPRETED,
        FLATTEN=config.flatten and ops.tma,  # with pointers its addresses spill
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
