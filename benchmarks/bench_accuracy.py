"""How far the log-prob of one token a row is from fp64: ours and every contender, in fp32 and bf16, on rows
like a trained model's and on peaked ones. What `torch.compile` makes of eager rounds as eager does."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench_linear_logprobs import accuracy_case
from benchmarks.suite.heads import accuracy_shapes, calibrated, peaked
from benchmarks.suite.measure import Case


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in accuracy_shapes(device, quick):
        for make in (calibrated, peaked):
            yield accuracy_case(shape, make(shape, device), device)
