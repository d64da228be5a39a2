"""prefix_value_loss forward + backward against the padded eager composition of Eq. 9: end to end through
autograd, the same with an upstream gradient other than 1 ("scaled", as under gradient accumulation), and as
"raw" the kernels alone, without autograd: cpp is one call, whose gradient a backward with upstream 1 returns.
In ragged batches (T=1..) eager pays for its padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite.measure import Case, Target, assert_close
from benchmarks.suite.sequences import Sequences, batches, forward_backward, kernels, runnable
from ipvrm_kernels import prefix_value_loss
from ipvrm_kernels.backend import is_reference
from ipvrm_kernels.prefix_value_loss import IMPLS

OP = "prefix_value_loss"
BETA, MARGIN = 10.0, 5.0
MICROSECONDS = 30  # of both raw calls together on a GPU, launches not counted: stated, not judged


def cases(device: str, quick: bool) -> Iterator[Case]:
    for batch in batches(device, quick, level=0.05):
        eager = _eager(batch)
        contenders = {
            "padded eager": forward_backward(eager, batch.padded),
            "padded eager, scaled": forward_backward(_scaled(eager), batch.padded),
        }
        for impl in runnable(OP, device):
            ours = _ours(batch, impl)
            contenders[impl] = forward_backward(ours, batch.packed)
            contenders[f"{impl}, scaled"] = forward_backward(_scaled(ours), batch.packed)
            if not is_reference(impl):
                contenders[f"{impl}, raw"] = _raw(batch, impl)

        def check(results: Mapping[str, Any], batch: Sequences = batch) -> None:
            for name, (got_loss, got_gradient) in results.items():
                loss, gradient = results["padded eager, scaled" if "scaled" in name else "padded eager"]
                assert_close(name, got_loss, loss, 1e-5)
                if not name.startswith("padded eager"):
                    assert_close(name, got_gradient, batch.pack(gradient), 1e-4)

        num_bytes = 16 * batch.packed.shape[0]
        aims = {}
        if device == "cpu" and batch.name == "B=256 T=2048":
            for impl in kernels(OP, device):
                aims[impl], aims[f"{impl}, raw"] = (Target(1 / factor, "padded eager") for factor in (4, 8))
        title = f"{batch.name} forward+backward"
        if device == "cuda" and batch.name == "B=256 T=2048":
            title += f", target raw <= {MICROSECONDS} us of device time"
        yield Case(OP, title, contenders, check, num_bytes=num_bytes, targets=aims)


def _eager(batch: Sequences) -> Callable[[Tensor], Tensor]:
    def run(padded: Tensor) -> Tensor:
        mask = batch.mask
        mean = BETA * (padded * mask).cumsum(1) / mask.cumsum(1)
        per_token = F.softplus(MARGIN - (2 * batch.outcome - 1)[:, None] * mean) * mask
        return (per_token.sum(1) / mask.sum(1)).mean()

    return run


def _ours(batch: Sequences, impl: str) -> Callable[[Tensor], Tensor]:
    def run(packed: Tensor) -> Tensor:
        return prefix_value_loss(packed, batch.cu_seqlens, batch.outcome, beta=BETA, margin=MARGIN, impl=impl)

    return run


def _scaled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x) / 4


def _raw(batch: Sequences, impl: str) -> Callable[[], tuple[Tensor, Tensor]]:
    entry = IMPLS[impl]
    one = torch.ones((), device=batch.packed.device)
    numbers = (None, None, None, MARGIN, batch.outcome.shape[0], BETA, "uniform", True, False, True)

    def run() -> tuple[Tensor, Tensor]:
        loss, saved = entry.forward(batch.packed, batch.cu_seqlens, batch.outcome, *numbers)
        if entry.last_backward is not None:
            return loss, entry.last_backward(one, saved)
        return loss, entry.backward(one, saved, batch.cu_seqlens, BETA)

    return run
