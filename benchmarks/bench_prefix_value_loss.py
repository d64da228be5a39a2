"""prefix_value_loss forward + backward, end to end through autograd, against the padded eager composition
of Eq. 9."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, forward_backward, runnable
from ipvrm_kernels import prefix_value_loss

OP = "prefix_value_loss"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for B, T in ((256, 512),) if quick else ((256, 2048), (10_000, 25), (4, 32_768)):
        cu = edges([T] * B, device)
        x = 0.05 * torch.randn(B * T, device=device)
        outcome = (torch.arange(B, device=device) % 2).float()
        mask = torch.ones(B, T, device=device)

        def eager(x: torch.Tensor, mask=mask, outcome=outcome, B: int = B, T: int = T) -> torch.Tensor:
            mean = 10.0 * (x.view(B, T) * mask).cumsum(1) / mask.cumsum(1)
            per_token = F.softplus(5.0 - (2 * outcome - 1)[:, None] * mean) * mask
            return (per_token.sum(1) / mask.sum(1)).mean()

        contenders = {"padded eager": forward_backward(eager, x)}
        for impl in runnable(OP, device):

            def ours(x: torch.Tensor, impl: str = impl, cu=cu, outcome=outcome) -> torch.Tensor:
                return prefix_value_loss(x, cu, outcome, impl=impl)

            contenders[impl] = forward_backward(ours, x)

        def check(contenders: dict = contenders) -> None:
            loss, gradient = contenders["padded eager"]()
            for name, run in contenders.items():
                got_loss, got_gradient = run()
                assert_close(name, got_loss, loss, 1e-5)
                assert_close(name, got_gradient, gradient, 1e-4)

        yield Case(OP, f"B={B} T={T} forward+backward", contenders, check, num_bytes=16 * B * T)
