"""segment_scan: GAE's reverse scan over packed sequences, against the padded loop over time that trainers
use."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, runnable
from ipvrm_kernels import segment_scan, unpack

OP = "segment_scan"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for B, T in ((256, 512), (16, 4096)) if quick else ((256, 2048), (10_000, 25), (4, 32_768)):
        cu = edges([T] * B, device)
        x = torch.randn(B * T, device=device)
        padded = unpack(x, cu, T)

        def loop(padded: torch.Tensor = padded, T: int = T) -> torch.Tensor:
            carry, columns = torch.zeros_like(padded[:, 0]), []
            for t in reversed(range(T)):
                carry = padded[:, t] + 0.95 * carry
                columns.append(carry)
            return torch.stack(columns[::-1], dim=1)

        contenders = {"padded loop": loop}
        for impl in runnable(OP, device):
            contenders[impl] = lambda impl=impl, x=x, cu=cu: segment_scan(x, cu, 0.95, True, impl=impl)

        def check(contenders: dict = contenders, loop=loop) -> None:
            expected = loop().reshape(-1)
            for name, run in contenders.items():
                assert_close(name, run().reshape(-1), expected, 1e-5)

        yield Case(OP, f"B={B} T={T} reverse decay=0.95", contenders, check, num_bytes=8 * B * T)
