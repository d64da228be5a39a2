"""linear_candidates (with lse, sampled log-prob and entropy) against eager log-softmax + top-k and the bare
matmul, on rows with 1.33 candidates of p >= 0.1 each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.heads import Shape, calibrated, inputs, shapes
from benchmarks.measure import Case
from benchmarks.sequences import kernels
from ipvrm_kernels import linear_candidates

OP = "linear_candidates"
SLOTS = 10  # floor(1 / 0.1)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield _case(shape, device)


def _case(shape: Shape, device: str) -> Case:
    hidden, weight, ids = inputs(shape, device)
    hidden, sampled = calibrated(hidden, weight), ids[:, 0].contiguous()

    def eager() -> Any:
        log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
        return log_p.topk(SLOTS, 1), log_p.gather(1, sampled[:, None]), -(log_p.exp() * log_p).sum(1)

    def ours(impl: str) -> Callable[[], Any]:
        return lambda: linear_candidates(hidden, weight, sampled=sampled, return_entropy=True, impl=impl)

    implementations = kernels(OP, device)
    contenders = {
        "matmul": lambda: hidden @ weight.T,
        **{name: ours(name) for name in implementations},
        "eager log_softmax + topk": eager,
    }

    def check(results: Mapping[str, Any]) -> None:
        p = torch.softmax(hidden.float() @ weight.float().T, dim=1)
        clear = ((p - 0.1).abs() > 1e-4).all(1)
        for name in implementations:
            found = torch.zeros_like(p, dtype=torch.int32)
            found.scatter_add_(1, results[name].ids.clamp(min=0), (results[name].ids >= 0).int())
            assert ((found == (p >= 0.1)).all(1) | ~clear).all(), f"{name}: not the exact set"

    mean = linear_candidates(hidden[:512], weight).counts.float().mean().item()
    return Case(OP, f"{shape}, {mean:.2f} candidates a row", contenders, check, shape.flops)
