"""clipped_surrogate forward + backward through autograd, against the eager composition of trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import forward_backward, runnable
from ipvrm_kernels import clipped_surrogate

OP = "clipped_surrogate"
LOW, HIGH = 0.2, 0.28


def cases(device: str, quick: bool) -> Iterator[Case]:
    for count in (2048 * 9, 1_000_000):  # K = 8 candidates and the sampled token of 2048 rows; a long rollout
        old = -3 * torch.rand(count, device=device)
        x = old + 0.3 * torch.randn(count, device=device)
        for bound in (1 - LOW, 1 + HIGH):  # no rho that rounding puts on either side of a clip
            x = torch.where(((x - old).exp() - bound).abs() < 1e-5, old, x)
        advantages = torch.randn(count, device=device)
        upstream = torch.rand(count, device=device)  # the reduction's weights

        def eager(x: Tensor, old=old, a=advantages, upstream=upstream) -> Tensor:
            rho = torch.exp(x - old)
            loss = -torch.minimum(rho * a, rho.clamp(1 - LOW, 1 + HIGH) * a)
            return loss @ upstream

        contenders = {"eager": forward_backward(eager, x)}
        for impl in runnable(OP, device):

            def ours(x: Tensor, impl=impl, old=old, a=advantages, upstream=upstream) -> Tensor:
                out = clipped_surrogate(x, old, a, clip_low=LOW, clip_high=HIGH, impl=impl)
                return out.loss @ upstream

            contenders[impl] = forward_backward(ours, x)

        def check(results: Mapping[str, Any]) -> None:
            loss, gradient = results["eager"]
            for name, (got_loss, got_gradient) in results.items():
                assert_close(name, got_loss, loss, 1e-4)  # a sum that cancels
                assert_close(name, got_gradient, gradient, 1e-5)

        # forward: three reads, loss, derivative and two flags; backward: two reads, one write
        yield Case(OP, f"N={count} forward+backward", contenders, check, num_bytes=34 * count)
