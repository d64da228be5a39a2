"""A study: the head's forward with specialised warps, in Gluon (which ships with Triton), for sm_90 and bf16.

One warp loads: a tile of 128 rows and 256 columns comes in steps of BLOCK_D through STAGES stages of shared
memory, by TMA. Two warpgroups multiply 64 of its rows each with the same 256 columns and reduce their logits
by functions of the Triton kernel, so partial statistics, their merge and what follows are the package's:

    loader:     wait for empty[s] -> expect bytes, load h (2, 64, BLOCK_D) and w (256, BLOCK_D) -> ready[s]
    warpgroup:  wait for ready[s] -> wgmma -> one step later arrive at empty[s]; after D reduce and store

The loader never waits for a reduction, and a warpgroup that is steps ahead, STAGES at most, reduces while the
other one multiplies. How far they drift apart no compiler shows. They share each weight tile, since taking
turns at tiles of their own would read 80 KB from L2 for the arithmetic that takes 48 KB here.

It enters the package only if it wins on hardware: benchmarks/gpu/headline.py times it beside the Triton
kernels. No GPU has run it yet. tests/kernels/test_gluon.py compiles it and reads the machine code, and runs
these functions on the CPU, where barriers, copies and matmuls finish as late as the hardware may let them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ipvrm_kernels.head import Transform, triton_forward
from ipvrm_kernels.head.triton_forward import _row_sums
from ipvrm_kernels.head.triton_tiles import Config, _tile_position, tile_arguments
from ipvrm_kernels.linear_logprobs import LinearLogprobs

CONFIG = Config(128, 256, 64, num_warps=4, num_stages=4)  # warps of one warpgroup
REGISTERS = (240, 24)  # of a thread of the second warpgroup and of the loader; the first gets the rest
MAX_REGISTERS = 168  # of a thread, before 3 x 128 threads share them out anew
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as this version names it


@gluon.jit
def _load(
    hidden,  # (N, D) descriptor
    weight,  # (V, D) descriptor
    shared,  # h (2 * STAGES, ROWS, BLOCK_D), w (STAGES, BLOCK_V, BLOCK_D), barriers (STAGES, 1): ready, empty
    sizes,  # N, D, V
    ROW_GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_N // 2
    h_tiles, w_tiles, ready, empty = shared
    N, D, V = sizes
    row_blocks, splits = gl.cdiv(N, BLOCK_N), gl.cdiv(V, BLOCK_V)
    step = 0  # of all tiles
    for item in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        row_block, split = _tile_position(item, row_blocks, splits, ROW_GROUP)
        row, column = row_block * BLOCK_N, split * BLOCK_V
        for k in range(0, D, BLOCK_D):
            stage = step % STAGES
            full = ready.index(stage)  # (1,)
            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)  # of a new barrier, phase 1 is over
            mbarrier.expect(full, 2 * hidden.block_type.nbytes + weight.block_type.nbytes)
            _copy(weight, [column, k], full, w_tiles.index(stage))
            _copy(hidden, [row, k], full, h_tiles.index(2 * stage))
            _copy(hidden, [row + ROWS, k], full, h_tiles.index(2 * stage + 1))
            step += 1


@gluon.jit
def _multiply(
    half: gl.constexpr,  # 0 or 1, of a tile's rows
    shared,  # h (2 * STAGES, ROWS, BLOCK_D), w (STAGES, BLOCK_V, BLOCK_D), barriers (STAGES, 1): ready, empty
    partial,  # pointers: top, sum exp, sum z exp, (S, N) each
    sizes,  # N, D, V
    unit,  # scalar, z = h.w * unit
    ROW_GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    of_columns: gl.constexpr = gl.SliceLayout(0, layout)
    h_tiles, w_tiles, ready, empty = shared
    top_ptr, sumexp_ptr, sum_z_exp_ptr = partial
    N, D, V = sizes
    row_blocks, splits = gl.cdiv(N, BLOCK_N), gl.cdiv(V, BLOCK_V)
    steep = unit * 1.4426950408889634  # scalar, of exp2
    step = 0  # of all tiles
    for item in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        row_block, split = _tile_position(item, row_blocks, splits, ROW_GROUP)
        column = split * BLOCK_V
        a = gl.zeros((ROWS, BLOCK_V), gl.float32, layout)  # (ROWS, BLOCK_V)
        for k in range(0, D, BLOCK_D):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            h = h_tiles.index(2 * stage + half)  # (ROWS, BLOCK_D)
            w = w_tiles.index(stage)  # (BLOCK_V, BLOCK_D)
            a = warpgroup_mma(h, w.permute((1, 0)), a, is_async=True)  # (ROWS, BLOCK_V)
            a = warpgroup_mma_wait(num_outstanding=1, deps=(a,))  # (ROWS, BLOCK_V) the step before is done
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        a = warpgroup_mma_wait(num_outstanding=0, deps=(a,))  # (ROWS, BLOCK_V)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if column + BLOCK_V > V:
            present = (column + gl.arange(0, BLOCK_V, of_columns) < V)[None, :]  # (1, BLOCK_V)
            most = gl.max(gl.where(present, a, -float("inf")), 1)  # (ROWS,)
            # so far below that exp is 0, yet finite: 0 * -inf would spoil the entropy
            padding = most - gl.maximum(gl.abs(most), 1e4 / unit)  # (ROWS,)
            a = gl.where(present, a, padding[:, None])  # (ROWS, BLOCK_V)
        top = gl.max(a, 1)  # (ROWS,)
        shift = gl.where(top == -float("inf"), 0.0, top)  # (ROWS,) rows of -inf alone have sums of 0
        below = a - shift[:, None]  # (ROWS, BLOCK_V) a difference first, then its scale
        e = gl.exp2(below * steep)  # (ROWS, BLOCK_V)
        sumexp, sum_below_exp = _row_sums(e, below, ROWS, BLOCK_V, True)  # (ROWS,) each
        rows = row_block * BLOCK_N + half * ROWS + gl.arange(0, ROWS, of_rows)  # (ROWS,)
        out = gl.cast(split, gl.int64) * N + rows  # (ROWS,)
        gl.store(top_ptr + out, top * unit, mask=rows < N)
        gl.store(sumexp_ptr + out, gl.convert_layout(sumexp, of_rows), mask=rows < N)
        gl.store(sum_z_exp_ptr + out, gl.convert_layout(sum_below_exp, of_rows) * unit, mask=rows < N)


@gluon.jit
def _gluon_stats_kernel(
    hidden,  # (N, D) descriptor
    weight,  # (V, D) descriptor
    top_ptr,  # (S, N)
    sumexp_ptr,  # (S, N)
    sum_z_exp_ptr,  # (S, N)
    N, D, V, unit,  # scalars
    ROW_GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS_OF_SECOND: gl.constexpr, REGISTERS_OF_LOADER: gl.constexpr,
):  # fmt: skip
    h_tiles = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, BLOCK_N // 2, BLOCK_D], hidden.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_D], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # warpgroups
    shared = (h_tiles, w_tiles, ready, empty)
    partial = (top_ptr, sumexp_ptr, sum_z_exp_ptr)
    sizes = (N, D, V)
    gl.warp_specialize(
        [
            (_multiply, (0, shared, partial, sizes, unit, ROW_GROUP, BLOCK_N, BLOCK_V, BLOCK_D, STAGES)),
            (_multiply, (1, shared, partial, sizes, unit, ROW_GROUP, BLOCK_N, BLOCK_V, BLOCK_D, STAGES)),
            (_load, (hidden, weight, shared, sizes, ROW_GROUP, BLOCK_N, BLOCK_V, BLOCK_D, STAGES)),
        ],
        [4, 1],
        [REGISTERS_OF_SECOND, REGISTERS_OF_LOADER],
    )


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles (rows, BLOCK_D) of x (num_rows, D)."""
    return TensorDescriptor.from_tensor(x, [rows, CONFIG.BLOCK_D], shared_layout(rows))


def shared_layout(rows: int) -> Any:
    """How tiles (rows, BLOCK_D) of bf16 lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, CONFIG.BLOCK_D], gl.bfloat16)


def constexprs(row_group: int) -> dict[str, int]:
    """What `_gluon_stats_kernel` is compiled for."""
    return dict(
        ROW_GROUP=row_group, BLOCK_N=CONFIG.BLOCK_N, BLOCK_V=CONFIG.BLOCK_V, BLOCK_D=CONFIG.BLOCK_D,
        STAGES=CONFIG.num_stages, REGISTERS_OF_SECOND=REGISTERS[0], REGISTERS_OF_LOADER=REGISTERS[1],
    )  # fmt: skip


def options() -> dict[str, Any]:
    """How it is compiled."""
    return dict(num_warps=CONFIG.num_warps, maxnreg=MAX_REGISTERS, enable_fp_fusion=True)


def stats(ops: triton_forward.Operands, partial: Tensor) -> triton_forward.Stats:
    """`triton_forward.stats` with the entropy, by these warps; partial (3, S, N) fp32 is filled."""
    (N, D), V, S = ops.hidden.shape, ops.weight.shape[0], partial.shape[1]
    merged = torch.empty(3, N, dtype=torch.float32, device=partial.device)
    programs = min(ops.programs, -(-N // CONFIG.BLOCK_N) * S)
    _gluon_stats_kernel[(programs,)](
        described(ops.hidden, CONFIG.BLOCK_N // 2), described(ops.weight, CONFIG.BLOCK_V),
        partial[0], partial[1], partial[2], N, D, V, ops.transform.scale / ops.transform.temperature,
        **constexprs(tile_arguments(ops, CONFIG)["ROW_GROUP"]), **options(),
    )  # fmt: skip
    triton_forward.merge_stats(partial, merged)
    return triton_forward.Stats(*merged)


def forward(hidden: Tensor, weight: Tensor, sampled: Tensor) -> LinearLogprobs:
    """`linear_logprobs(hidden, weight, sampled, return_entropy=True)` without gradients.

    hidden (N, D) and weight (V, D) bf16 on a GPU of compute capability 9.0, D a multiple of 8; sampled (N,).
    """
    ops = triton_forward.operands(hidden, weight, None, Transform(1.0, None, 1.0, torch.bfloat16))
    if hidden.dtype != torch.bfloat16 or ops.row != ("sm_90", "half"):
        raise ValueError(
            "gluon_study: hidden and weight must be bf16 on a GPU of compute capability 9.0, and D a multiple"
            f" of 8, got {hidden.dtype} and {weight.dtype}, D={hidden.shape[1]}, on {hidden.device}"
        )
    ops = ops._replace(config=CONFIG)
    partial = torch.empty(3, triton_forward.num_splits(ops), len(hidden), device=hidden.device)
    found = stats(ops, partial)
    logprobs = found.logprobs(triton_forward.id_logits(ops, sampled[:, None].contiguous()))
    return LinearLogprobs(logprobs[:, 0], found.lse(), found.entropy())
