"""linear_candidates (with lse, sampled log-prob and entropy) against eager log-softmax + top-k and the bare
matmul, on rows with 1.33 candidates of p >= 0.1 each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import calibrated, inputs, shapes
from benchmarks.measure import Case
from benchmarks.sequences import runnable
from ipvrm_kernels import linear_candidates

SLOTS = 10  # floor(1 / 0.1)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        hidden, weight, ids = inputs(shape, device)
        hidden, sampled = calibrated(hidden, weight), ids[:, 0].contiguous()

        def matmul(hidden: Tensor = hidden, weight: Tensor = weight) -> Tensor:
            return hidden @ weight.T

        def eager(hidden: Tensor = hidden, weight: Tensor = weight, sampled: Tensor = sampled) -> Any:
            log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
            entropy = -(log_p.exp() * log_p).sum(1)
            return log_p.topk(SLOTS, 1), log_p.gather(1, sampled[:, None]), entropy

        ours = {
            impl: lambda impl=impl, hidden=hidden, weight=weight, sampled=sampled: linear_candidates(
                hidden, weight, sampled=sampled, return_entropy=True, impl=impl
            )
            for impl in runnable("linear_candidates", device)
        }

        def check(ours=ours, hidden=hidden, weight=weight) -> None:
            log_p = torch.log_softmax(hidden[:64].float() @ weight.float().T, dim=1)
            clear = ((log_p.exp() - 0.1).abs() > 1e-4).all(1)
            for name, run in ours.items():
                out = run()
                found = torch.zeros_like(log_p, dtype=torch.bool)
                found.scatter_(1, out.ids[:64].clamp(min=0), out.ids[:64] >= 0)
                exact = torch.where(out.counts[:64] > 0, (found == (log_p.exp() >= 0.1)).all(1), True)
                assert exact[clear].all(), f"{name}: not the exact set"

        mean = next(iter(ours.values()))().counts.float().mean().item()
        name = f"{shape}, {mean:.2f} candidates a row"
        contenders = {"matmul": matmul, **ours, "eager log_softmax + topk": eager}
        yield Case("linear_candidates", name, contenders, check, shape.flops)
