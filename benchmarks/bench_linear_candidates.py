"""linear_candidates (with lse, sampled log-prob and entropy) against the bare matmul and log-softmax + top-k
of full logits (eager, compiled, in the released slices of 64 rows, these without entropy): on rows with 1.33
candidates of p >= 0.1 each, and on plain random ones, which have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import (
    MIN_PROB,
    SLOTS,
    Calibrated,
    Shape,
    calibrated,
    inputs,
    measured,
    more_shapes,
    shapes,
)
from benchmarks.measure import Case
from benchmarks.peers import compiled, sliced_log_softmax
from benchmarks.sequences import kernels
from ipvrm_kernels import linear_candidates

OP = "linear_candidates"
RELEASED_TOP = 5


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield candidates_case(shape, device)
    yield candidates_case(shapes(device, quick)[0], device, random=True, with_compile=not quick)


def full_cases(device: str) -> Iterator[Case]:
    for shape in more_shapes(device):
        if shape.K not in (1, 5, 10):  # the op has no K of its own
            yield candidates_case(shape, device)


def eager(hidden: Tensor, weight: Tensor, sampled: Tensor) -> tuple[Tensor, ...]:
    """log_softmax of full logits, its best SLOTS, the sampled token and the entropy."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    best = log_p.topk(SLOTS, 1)
    return best.values, best.indices, log_p.gather(1, sampled[:, None]), -(log_p.exp() * log_p).sum(1)


def candidates_case(shape: Shape, device: str, random: bool = False, with_compile: bool = True) -> Case:
    if random:
        hidden, weight, ids = inputs(shape, device)
        mean, mass, entropy = measured(hidden, weight)
        rows = Calibrated(hidden, weight, ids[:, 0].contiguous(), mean, mass, entropy)
        kind = f"random: {mean:.2f} candidates a row, entropy {entropy:.2f}"
    else:
        rows = calibrated(shape, device)
        kind = str(rows)
    hidden, weight, sampled = rows.hidden, rows.weight, rows.sampled

    def released() -> Any:
        log_p = sliced_log_softmax(hidden @ weight.T)
        return log_p.topk(RELEASED_TOP, 1), log_p.gather(1, sampled[:, None])

    def ours(impl: str, entropy: bool) -> Callable[[], Any]:
        return lambda: linear_candidates(hidden, weight, sampled=sampled, return_entropy=entropy, impl=impl)

    implementations = kernels(OP, device)
    contenders: dict[str, Callable[[], Any]] = {
        "matmul": lambda: hidden @ weight.T,
        **{name: ours(name, True) for name in implementations},
        "eager log_softmax + topk": lambda: eager(hidden, weight, sampled),
        **{f"{name}, no entropy": ours(name, False) for name in implementations},
        f"released 64-row slices + top {RELEASED_TOP}, no entropy": released,
    }

    if with_compile:
        compiled_eager = compiled(eager)
        contenders["torch.compile of eager"] = lambda: compiled_eager(hidden, weight, sampled)

    def check(results: Mapping[str, Any]) -> None:
        for first in range(0, shape.N, 1024):
            part = slice(first, first + 1024)
            p = torch.softmax(hidden[part].float() @ weight.float().T, dim=1)
            clear = ((p - MIN_PROB).abs() > 1e-4).all(1)
            for name in implementations:
                ids = results[name].ids[part]
                found = torch.zeros_like(p, dtype=torch.int32)
                found.scatter_add_(1, ids.clamp(min=0), (ids >= 0).int())
                assert ((found == (p >= MIN_PROB)).all(1) | ~clear).all(), f"{name}: not the exact set"

    return Case(OP, f"{shape}, {kind}", contenders, check, shape.flops, axes={**shape.axes, "K": SLOTS})
