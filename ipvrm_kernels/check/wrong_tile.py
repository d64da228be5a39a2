"""The Triton head's pipeline over several tiles a program, which a few hundred rows never fill.

The package's grid, whose programs work through many tiles each, against one program for each tile: a tile
that is read too early, left out or written twice differs in its bits. And the maxima of all groups of columns
against an fp32 matmul, for what both grids would do wrong. The tests do the same to every number of a tile
(tests/kernels/test_wrong_tile.py).
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import backend
from ..head import Transform
from .judge import Judge

REPEATS = 20  # on a GPU: a race shows now and then
MATMUL = 2.0**-20  # of the sum of the sizes of an fp32 sum of products, added in another order


def wrong_tile(judge: Judge, device: str) -> None:
    forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    N, D, V = (1000, 1032, 40_011) if device == "cuda" else (160, 40, 896)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, device=device, generator=generator).bfloat16()
    weight = (torch.randn(V, D, device=device, generator=generator) * 2 * D**-0.5).bfloat16()
    ops = forward.operands(hidden, weight, None, Transform(1.0, None, 1.0, torch.bfloat16))
    tiles = -(-N // ops.config.BLOCK_N) * -(-V // ops.config.BLOCK_V)
    assert ops.programs < tiles, "some program has to work through several tiles"

    def computed(programs: int) -> tuple[Tensor, ...]:
        groups = torch.full((N, -(-V // forward.GROUP)), float("nan"), device=device)
        found = forward.stats(ops._replace(programs=programs), True, groups)
        return groups, *found

    each = computed(tiles)
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(REPEATS if device == "cuda" else 1):
        for got, expected in zip(computed(ops.programs), each, strict=True):
            differ += (got.view(torch.int32) != expected.view(torch.int32)).sum()
    judge.equal("bits of tiles", differ, torch.zeros_like(differ))
    off = MATMUL * float((hidden.float().abs() @ weight.float().abs().T).max())
    z = hidden.float() @ weight.float().T
    padded = torch.nn.functional.pad(z, (0, -V % forward.GROUP), value=-torch.inf)
    judge.within("maxima of groups", each[0], padded.view(N, -1, forward.GROUP).amax(2), off)
    lse = each[1].double() + each[2].double().log()
    judge.within("lse of tiles", lse, torch.logsumexp(z.double(), 1), off)


def applies(device: str) -> bool:
    return backend.why_not("triton", device) is None
