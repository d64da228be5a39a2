"""distrl_loss forward + backward from log-probs, against the eager composition, compiled and not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import forward_backward, runnable
from ipvrm_kernels import distrl_loss

OP = "distrl_loss"
LOW, HIGH, ALPHA = 0.2, 0.28, 0.1


def cases(device: str, quick: bool) -> Iterator[Case]:
    for N, B, K, used in ((2048, 8, 10, 0.133), (2048, 8, 8, 1.0), (65_536, 128, 10, 0.133)):
        if quick and N > 2048:
            continue
        g = torch.Generator().manual_seed(0)
        old = -3 * torch.rand(N, 1 + K, generator=g)
        new = old + 0.3 * torch.randn(N, 1 + K, generator=g)
        for bound in (1 - LOW, 1 + HIGH):  # no rho that rounding puts on either side of a clip
            new = torch.where(((new - old).exp() - bound).abs() < 1e-5, old, new)
        unused = torch.rand(N, K, generator=g) >= used
        old[:, 1:] = old[:, 1:].masked_fill(unused, -torch.inf)
        advantages = torch.randn(N, 1 + K, generator=g)
        cu_seqlens = torch.arange(0, N + 1, N // B, dtype=torch.int32)
        new, old, advantages, cu_seqlens = (x.to(device) for x in (new, old, advantages, cu_seqlens))
        weight = 1 / (N // B * B)  # sequences of one length: sequence_mean

        def eager(new: Tensor, old=old, advantages=advantages, weight=weight) -> Tensor:
            kept = old > -torch.inf
            rho = torch.where(kept, new - torch.where(kept, old, 0.0), 0.0).exp()
            loss = -torch.minimum(rho * advantages, rho.clamp(1 - LOW, 1 + HIGH) * advantages)
            candidates = torch.where(kept, old.exp() * loss, 0.0)[:, 1:].sum()
            return weight * (loss[:, 0].sum() + ALPHA * candidates)

        contenders = {
            "eager": forward_backward(eager, new),
            "torch.compile of eager": forward_backward(torch.compile(eager), new),
        }
        for impl in runnable(OP, device):

            def ours(new: Tensor, impl=impl, old=old, advantages=advantages, cu=cu_seqlens) -> Tensor:
                parts = (old[:, 0], old[:, 1:], advantages[:, 0], advantages[:, 1:])
                return distrl_loss(new[:, 0], new[:, 1:], *parts, cu, alpha=ALPHA, impl=impl).loss

            contenders[impl] = forward_backward(ours, new)

        def check(results: Mapping[str, Any]) -> None:
            loss, gradient = results["eager"]
            for name, (got_loss, got_gradient) in results.items():
                assert_close(name, got_loss, loss, 1e-4)  # a sum that cancels
                assert_close(name, got_gradient, gradient, 1e-5)

        # forward: three reads, one write (the gradient for upstream 1); backward: one read, one write
        shape = f"N={N} K={K}, {used:.0%} of the candidates used, forward+backward"
        yield Case(OP, shape, contenders, check, num_bytes=24 * N * (1 + K))
