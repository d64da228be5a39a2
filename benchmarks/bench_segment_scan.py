"""segment_scan: GAE's reverse scan over packed sequences, against the padded loop over time that trainers
use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import Batch, batches, runnable
from ipvrm_kernels import segment_scan

OP = "segment_scan"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for batch in batches(device, quick, level=1.0):

        def loop(padded: torch.Tensor = batch.padded) -> torch.Tensor:
            carry, columns = torch.zeros_like(padded[:, 0]), []
            for t in reversed(range(padded.shape[1])):
                carry = padded[:, t] + 0.95 * carry
                columns.append(carry)
            return torch.stack(columns[::-1], dim=1)

        contenders = {"padded loop": loop}
        for impl in runnable(OP, device):
            contenders[impl] = lambda impl=impl, b=batch: segment_scan(
                b.packed, b.cu_seqlens, 0.95, True, impl=impl
            )

        def check(results: Mapping[str, Any], batch: Batch = batch) -> None:
            expected = batch.pack(results["padded loop"])
            for name, result in results.items():
                if name != "padded loop":
                    assert_close(name, result, expected, 1e-5)

        num_bytes = 8 * batch.packed.shape[0]
        yield Case(OP, f"{batch.name} reverse decay=0.95", contenders, check, num_bytes=num_bytes)
