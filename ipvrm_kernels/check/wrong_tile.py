"""The Triton head's pipeline over several tiles a program, which a few hundred rows never fill: every number
of every tile, not what a row's statistics make of them.

The package's grid, whose programs work through many tiles each, against one program for each tile: one that
is read too early, left out or written twice differs in its bits. And maxima of groups, partial sums, saved
values and dz against an fp32 matmul, for what both grids would do wrong.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..head import Transform
from .judge import Judge

REPEATS = 20  # on a GPU: a race shows now and then
MATMUL = 2.0**-20  # of the sum of the sizes of an fp32 sum of products, added in another order
BF16 = 2.0**-7 if backend.INTERPRETED else 2.0**-8  # of a number; the interpreter truncates, a GPU rounds


class Tiles(NamedTuple):
    """A batch of many tiles."""

    ops: Any  # triton_tiles.Operands
    z: Tensor  # (N, V) fp32
    ref: Tensor  # (N,) of the saved values
    total: Tensor  # (N,) G
    off: float  # by which a logit may differ from z


def draw(device: str) -> Tiles:
    forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    N, D, V = (1000, 1032, 40_011) if device == "cuda" else (160, 40, 896)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    hidden, weight = normal(N, D).bfloat16(), (normal(V, D) * 2 * D**-0.5).bfloat16()
    ops = forward.operands(hidden, weight, None, Transform(1.0, None, 1.0, torch.bfloat16))
    if device == "cpu":  # a last tile of which half is padding
        ops = ops._replace(config=ops.config._replace(BLOCK_V=256))
    h, w = hidden.float(), weight.float()
    z = h @ w.T
    off = MATMUL * float((h.abs() @ w.abs().T).max())
    return Tiles(ops, z, z[:, : ops.config.BLOCK_V].amax(1), normal(N), off)


def computed(tiles: Tiles, programs: int) -> dict[str, Tensor]:
    """{name: every number} of the forward, with maxima of groups, with saved values, and of dz."""
    forward, backward, driver = (
        importlib.import_module(f"ipvrm_kernels.head.triton_{name}")
        for name in ("forward", "backward", "tiles")
    )
    ops = tiles.ops._replace(programs=programs)
    (N, V), S, C, device = tiles.z.shape, forward.num_splits(ops), driver.padded_columns(ops), tiles.z.device

    def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    groups, merged = nan(N, -(-V // forward.GROUP)), nan(3, N)
    partial, partial_saved = nan(3, S, N), nan(3, S, N)
    values, dz = nan(N, C, dtype=torch.bfloat16), nan(N, C, dtype=torch.bfloat16)
    forward._partial_stats(ops, partial, merged, groups, None)
    forward._partial_stats(ops, partial_saved, merged, None, forward.Saved(tiles.ref, values))
    lse, zero = torch.logsumexp(tiles.z, 1), torch.zeros(N, device=device)
    count = torch.full((), N, dtype=torch.int32, device=device)
    ids = torch.empty(N, 0, dtype=torch.int64, device=device)
    rows = backward.Rows(ids, None, lse, zero, zero, tiles.total, None, count)
    middle = S // 2 * ops.config.BLOCK_V
    first, second = nan(N, middle, dtype=torch.bfloat16), nan(N, C - middle, dtype=torch.bfloat16)
    backward.launch_dz(ops, rows, first, 0, 1.0)
    backward.launch_dz(ops, rows, second, middle, 1.0)
    dz[:, :middle], dz[:, middle:] = first, second
    found = {"maxima of groups": groups, "partial sums": partial}
    return found | {"partial sums beside saved values": partial_saved, "saved values": values, "dz": dz}


def counts(ops: Any) -> dict[str, int]:
    """{kernel: its tiles}; a kernel may have rows of its own."""
    driver = importlib.import_module("ipvrm_kernels.head.triton_tiles")
    rows, columns = ops.hidden.shape[0], driver.num_splits(ops)
    return {kernel: -(-rows // ops.of_kernel(kernel).BLOCK_N) * columns for kernel in driver.KERNELS}


def wrong_tile(judge: Judge, device: str) -> None:
    tiles = draw(device)
    ops, num_tiles = tiles.ops, counts(tiles.ops)
    for kernel, whole in num_tiles.items():
        programs = ops.programs * ops.of_kernel(kernel).programs_per_sm
        assert programs < whole, f"some program of {kernel} has to work through several tiles"
    each = computed(tiles, max(num_tiles.values()))
    none = torch.zeros((), dtype=torch.int64, device=device)
    differ = dict.fromkeys(each, none)
    for _ in range(REPEATS if device == "cuda" else 1):
        for name, got in computed(tiles, ops.programs).items():
            bits = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
            differ[name] = differ[name] + (got.view(bits) != each[name].view(bits)).sum()
    for name, count in differ.items():
        judge.equal(f"bits of {name}", count, none)
    _against_a_matmul(judge, tiles, each)


def _against_a_matmul(judge: Judge, tiles: Tiles, got: dict[str, Tensor]) -> None:
    """Every number against the fp32 matmul's logits z."""
    forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    groups, off, (N, V) = got["maxima of groups"], tiles.off, tiles.z.shape
    S, C = got["partial sums"].shape[1], got["dz"].shape[1]
    z = tiles.z.double()
    padded = torch.nn.functional.pad(z, (0, C - V), value=-torch.inf)
    of_groups = padded.view(N, -1, forward.GROUP).amax(2)
    judge.within("maxima of groups", groups, of_groups[:, : groups.shape[1]], off)
    tile = padded.view(N, S, -1).transpose(0, 1)  # (S, N, BLOCK_V)
    top = tile.amax(2)
    below = tile - top[..., None]
    e = below.exp()
    lse = top + e.sum(2).log()
    mean = torch.where(e > 0, below * e, 0.0).sum(2) / e.sum(2)
    for name in ("partial sums", "partial sums beside saved values"):
        tops, sumexp, sum_z_exp = got[name].double()
        judge.within(f"{name}, maxima", tops, top, off)
        judge.within(f"{name}, of exp", tops + sumexp.log(), lse, off)
        judge.within(f"{name}, of z exp", sum_z_exp / sumexp, mean, 8 * off)  # 8 > its derivative in z
    relative = BF16 + 4 * off
    values = (z - tiles.ref[:, None].double()).exp()
    judge.within("saved values", got["saved values"][:, :V] / values, torch.ones_like(values), relative)
    dz = -tiles.total[:, None].double() * (z - torch.logsumexp(z, 1, keepdim=True)).exp()
    judge.within("dz", got["dz"][:, :V] / dz, torch.ones_like(dz), relative)


def applies(device: str) -> bool:
    return backend.why_not("triton", device) is None
