"""prefix_values: value, mean, sigmoid and TD in one pass, against the padded eager composition (forward
only)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, runnable
from ipvrm_kernels import prefix_values

OP = "prefix_values"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for B, T in ((256, 512),) if quick else ((256, 2048), (4, 32_768)):
        cu = edges([T] * B, device)
        x = 0.05 * torch.randn(B * T, device=device)
        padded, mask = x.view(B, T), torch.ones(B, T, device=device)

        def eager(padded: torch.Tensor = padded, mask: torch.Tensor = mask) -> tuple[torch.Tensor, ...]:
            value = 10.0 * (padded * mask).cumsum(1)
            mean = value / mask.cumsum(1)
            return value, mean, mean.sigmoid(), 10.0 * padded * mask

        contenders = {"padded eager": eager}
        for impl in runnable(OP, device):
            contenders[impl] = lambda impl=impl, x=x, cu=cu: prefix_values(x, cu, impl=impl)

        def check(contenders: dict = contenders, eager=eager) -> None:
            for name, run in contenders.items():
                for got, expected in zip(run(), eager(), strict=True):
                    assert_close(name, got.reshape(-1), expected.reshape(-1), 1e-5)

        yield Case(OP, f"B={B} T={T}", contenders, check, num_bytes=20 * B * T)
