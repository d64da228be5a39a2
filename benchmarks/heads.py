"""What the benchmarks of the head ops share: the shapes they are judged at and inputs like a model's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

K = 8  # ids per row where gradients are taken
CANDIDATES_PER_ROW = 1.33  # mean number of tokens with p >= 0.1 that the candidate benchmark is calibrated to


class Shape(NamedTuple):
    N: int
    D: int
    V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.N} D={self.D} V={self.V} {str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> float:
        return 2.0 * self.N * self.D * self.V


def shapes(device: str, quick: bool) -> list[Shape]:
    """The shapes with targets, and a small one for a quick look."""
    if device == "cuda":
        wide = [Shape(8192, D, 151_936, torch.bfloat16) for D in (1024, 4096)]
        return wide[:1] if quick else wide
    return [Shape(512, 512, 8192, torch.float32)] if quick else [Shape(2048, 1024, 32_000, torch.float32)]


def inputs(shape: Shape, device: str, level: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) whose logits have standard deviation `level`, ids (N, K)."""
    hidden = torch.randn(shape.N, shape.D, device=device).to(shape.dtype)
    weight = (torch.randn(shape.V, shape.D, device=device) * shape.D**-0.5 * level).to(shape.dtype)
    return hidden, weight, torch.randint(0, shape.V, (shape.N, K), device=device)


def calibrated(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden scaled so that 128 of its rows have about CANDIDATES_PER_ROW tokens of p >= 0.1 on average."""
    z = hidden[:128].float() @ weight.float().T
    best, chosen = float("inf"), 1.0
    for step in range(60):
        scale = 0.5 * 1.05**step
        mean = (torch.softmax(z * scale, 1) >= 0.1).sum(1).float().mean().item()
        if abs(mean - CANDIDATES_PER_ROW) < best:
            best, chosen = abs(mean - CANDIDATES_PER_ROW), scale
    return (hidden.float() * chosen).to(hidden.dtype)
