"""segment_scan: GAE's reverse scan over packed sequences, against the padded loop over time that trainers
use. On a GPU the loop takes a second beyond LONGEST_LOOP steps, and the reference stands in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import Sequences, batches, kernels, runnable
from ipvrm_kernels import segment_scan

OP = "segment_scan"
LONGEST_LOOP = 4096  # steps of a Python loop over time on a GPU, where each is two launches


def cases(device: str, quick: bool) -> Iterator[Case]:
    for batch in batches(device, quick, level=1.0):

        def loop(padded: torch.Tensor = batch.padded) -> torch.Tensor:
            carry, columns = torch.zeros_like(padded[:, 0]), []
            for t in reversed(range(padded.shape[1])):
                carry = padded[:, t] + 0.95 * carry
                columns.append(carry)
            return torch.stack(columns[::-1], dim=1)

        looped = device == "cpu" or batch.padded.shape[1] <= LONGEST_LOOP
        contenders = {"padded loop": loop} if looped else {}
        implementations = runnable(OP, device)
        for impl in implementations if looped else ["torch", *kernels(OP, device)]:
            contenders[impl] = lambda impl=impl, b=batch: segment_scan(
                b.packed, b.cu_seqlens, 0.95, True, impl=impl
            )

        def check(results: Mapping[str, Any], batch: Sequences = batch, looped: bool = looped) -> None:
            expected = batch.pack(results["padded loop"]) if looped else results["torch"]
            for name, result in results.items():
                if name != "padded loop":
                    assert_close(name, result, expected, 1e-5)

        num_bytes = 8 * batch.packed.shape[0]
        yield Case(OP, f"{batch.name} reverse decay=0.95", contenders, check, num_bytes=num_bytes)
