"""What the benchmarks of the sequence ops share: batches packed and padded, the implementations that can run,
one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import ipvrm_kernels
from ipvrm_kernels import unpack
from ipvrm_kernels.backend import is_reference, why_not

# (B, T, ragged): every sequence T long, or lengths uniform in 1..T
FULL = (
    (256, 2048, False), (256, 2048, True), (10_000, 25, False), (10_000, 50, True),
    (4, 32_768, False), (4, 32_768, True), (1, 32_768, False),
)  # fmt: skip
QUICK = ((256, 512, False), (256, 512, True))


@dataclass(frozen=True)
class Sequences:
    """One batch both ways: `packed` for the ops, `padded` with its `mask` for eager compositions."""

    name: str
    cu_seqlens: Tensor  # (B+1,) int32
    packed: Tensor  # (N,)
    padded: Tensor  # (B, T), 0 beyond a sequence's end
    mask: Tensor  # (B, T) 0. or 1.
    outcome: Tensor  # (B,) 0. or 1.

    def pack(self, padded: Tensor) -> Tensor:
        """(N,) the tokens of a (B, T) result, to compare it with a packed one."""
        return padded[self.mask.bool()]


def batches(device: str, quick: bool, level: float) -> Iterator[Sequences]:
    """The shapes of the sequence ops' benchmarks, with normal tokens of standard deviation `level`."""
    for B, T, ragged in QUICK if quick else FULL:
        lengths = torch.randint(1, T + 1, (B,)) if ragged else torch.full((B,), T)
        cu_seqlens = edges(lengths.tolist(), device)
        packed = level * torch.randn(int(lengths.sum()), device=device)
        yield Sequences(
            name=f"B={B} T={'1..' if ragged else ''}{T}",
            cu_seqlens=cu_seqlens,
            packed=packed,
            padded=unpack(packed, cu_seqlens, T),
            mask=(torch.arange(T) < lengths[:, None]).float().to(device),
            outcome=(torch.arange(B, device=device) % 2).float(),
        )


def edges(lengths: list[int], device: str) -> Tensor:
    """(B+1,) int32 cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def runnable(op: str, device: str) -> list[str]:
    """The implementations of `op` that run on `device` here."""
    return [name for name in ipvrm_kernels.OPS[op] if why_not(name, device) is None]


def kernels(op: str, device: str) -> list[str]:
    """`runnable` without the reference, whose place in a benchmark eager PyTorch takes."""
    return [name for name in runnable(op, device) if not is_reference(name)]


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that runs `function` on x and takes its gradient: (loss, dx)."""
    leaf = x.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return run
