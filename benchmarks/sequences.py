"""What the benchmarks of the sequence ops share: packed edges, the implementations that can run, one
training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ipvrm_kernels
from ipvrm_kernels.backend import why_not


def edges(lengths: list[int], device: str) -> Tensor:
    """(B+1,) int32 cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def runnable(op: str, device: str) -> list[str]:
    """The implementations of `op` that run on `device` here."""
    return [name for name in ipvrm_kernels.OPS[op] if why_not(name, device) is None]


def kernels(op: str, device: str) -> list[str]:
    """`runnable` without the reference, whose place in a benchmark eager PyTorch takes."""
    return [name for name in runnable(op, device) if name != "torch"]


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that runs `function` on x and takes its gradient: (loss, dx)."""
    leaf = x.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return run
