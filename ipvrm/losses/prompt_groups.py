"""Sums and moments over a batch and over the rollouts of each prompt, on one rank or on all.

N tokens of B packed sequences, `cu_seqlens` (B + 1,) int32; `group` (B,) int says which of G prompts a
sequence answers, in any order. `reduce` joins ranks: it is given a tensor and returns its sum over all ranks
(which may be that tensor, overwritten). Then `group` numbers the prompts of all ranks alike, so that a
prompt's rollouts may lie on several. Every rank makes the same calls, whatever its data.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_kernels import check_cu_seqlens, check_cu_seqlens_shape, checks_values, segment_scan

Reduce = Callable[[Tensor], Tensor]


def one_rank(sums: Tensor) -> Tensor:
    """The `reduce` of a single rank."""
    return sums


def segment_sums(x: Tensor, edges: Tensor) -> Tensor:
    """(B,) sums of the packed x (N,), in one order; index_add on a GPU adds in any."""
    if not x.shape[0]:
        return x.new_zeros(edges.shape[0] - 1)
    last = (edges[1:].long() - 1).clamp(min=0)
    return torch.where(edges.diff() > 0, segment_scan(x, edges)[last], 0.0)


class PromptGroups:
    """The rollouts of each prompt, seen as packed sequences of rollouts.

    Raises:
        ValueError: as `op`, a group outside [0, num_groups).
    """

    def __init__(self, op: str, group: Tensor, num_groups: int):
        if checks_values(group) and bool(((group < 0) | (group >= num_groups)).any()):
            wrong = group[(group < 0) | (group >= num_groups)]
            raise ValueError(
                f"{op}: group must lie in [0, num_groups = {num_groups}), got {wrong[:4].tolist()}"
            )
        self.index = group.long()  # (B,)
        self.order = torch.argsort(self.index, stable=True)  # (B,)
        numbers = torch.arange(num_groups + 1, device=group.device)
        self.edges = torch.searchsorted(self.index[self.order], numbers).to(torch.int32)  # (G + 1,)

    def sums(self, x: Tensor) -> Tensor:
        """(B,) to (G,)."""
        return segment_sums(x[self.order], self.edges)

    def spread(self, x: Tensor) -> Tensor:
        """(G,) to (B,)."""
        return x[self.index]


class Moments(NamedTuple):
    """Of each set: its size over all ranks, mean and population std (0 for an empty set)."""

    size: Tensor
    mean: Tensor
    std: Tensor


def moments(
    x: Tensor,
    size: Tensor,
    sums: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    reduce: Reduce,
) -> Moments:
    """Moments of sets of elements of x, the mean first, so that nothing cancels.

    Args:
        size: of each set on this rank.
        sums: adds elements up over each set.
        spread: gives each element what its set has.
    """
    total, size = reduce(torch.stack([sums(x), size])).unbind()
    divisor = size.clamp(min=1)
    mean = total / divisor
    squares = reduce(sums((x - spread(mean)).square()))
    return Moments(size, mean, (squares / divisor).sqrt())


def batch_moments(x: Tensor, reduce: Reduce) -> Moments:
    """Moments () of all elements of x (N,)."""
    return moments(x, x.new_full((), x.shape[0]), torch.sum, one_rank, reduce)


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def described(x: Tensor) -> str:
    """For error messages."""
    return f"{tuple(x.shape)} {x.dtype}"


def check_like(op: str, name: str, x: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError, as `op`, unless x is floating point of this shape on the device of `like`."""
    if x.shape != shape or not x.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point of shape {tuple(shape)}, got {described(x)}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, the others on {like.device}")


def check_edges(op: str, cu_seqlens: Tensor, packed: Tensor) -> None:
    """Raises ValueError, as `op`, unless cu_seqlens is (B + 1,) int32 and rises from 0 to N.

    Its values are read on the CPU, and under `set_checks(True)`; not while torch.compile traces.
    """
    check_cu_seqlens_shape(op, cu_seqlens, packed)
    if checks_values(cu_seqlens):
        check_cu_seqlens(op, cu_seqlens, packed.shape[0])


def checked_outcome(op: str, outcome: Tensor, group: Tensor) -> Tensor:
    """outcome (B,) as floats.

    Raises:
        ValueError: as `op`, unless it is (B,) of 0 and 1 beside group (B,), integers on the same device.
    """
    if outcome.dim() != 1:
        raise ValueError(f"{op}: outcome must be (B,), got {described(outcome)}")
    if group.shape != outcome.shape or group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(
            f"{op}: group must be integers of shape {tuple(outcome.shape)}, got {described(group)}"
        )
    if group.device != outcome.device:
        raise ValueError(f"{op}: group is on {group.device}, outcome on {outcome.device}")
    outcome = wide(outcome)
    if checks_values(outcome) and not bool(((outcome == 0) | (outcome == 1)).all()):
        wrong = outcome[(outcome != 0) & (outcome != 1)]
        raise ValueError(f"{op}: outcome must be 0 or 1, got {wrong[:4].tolist()}")
    return outcome
