"""prefix_values: value, mean, sigmoid and TD in one pass, against the padded eager composition (forward
only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import Sequences, batches, runnable
from ipvrm_kernels import prefix_values

OP = "prefix_values"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for batch in batches(device, quick, level=0.05):

        def eager(batch: Sequences = batch) -> tuple[torch.Tensor, ...]:
            value = 10.0 * (batch.padded * batch.mask).cumsum(1)
            mean = value / batch.mask.cumsum(1)
            return value, mean, mean.sigmoid(), 10.0 * batch.padded * batch.mask

        contenders = {"padded eager": eager}
        for impl in runnable(OP, device):
            contenders[impl] = lambda impl=impl, b=batch: prefix_values(b.packed, b.cu_seqlens, impl=impl)

        def check(results: Mapping[str, Any], batch: Sequences = batch) -> None:
            for name, values in results.items():
                if name != "padded eager":
                    for got, expected in zip(values, results["padded eager"], strict=True):
                        assert_close(name, got, batch.pack(expected), 1e-5)

        yield Case(OP, batch.name, contenders, check, num_bytes=20 * batch.packed.shape[0])
