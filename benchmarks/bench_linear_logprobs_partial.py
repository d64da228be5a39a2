"""linear_logprobs_partial on one shard of half the vocabulary, forward + backward, against the shard's bare
matmul and eager PyTorch on its full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.heads import K, Shape, inputs, matmuls, shapes
from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import kernels
from ipvrm_kernels import linear_logprobs_partial

OP = "linear_logprobs_partial"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield step_case(shape._replace(V=shape.V // 2), device)


def step_case(shape: Shape, device: str) -> Case:
    hidden, weight, ids = inputs(shape, device)
    upstream = [torch.randn(size, device=device) for size in (shape.N, shape.N, ids.shape)]
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def gradients(sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sums, leaves, upstream)

    def ours(impl: str) -> Callable[[], Any]:
        return lambda: gradients(linear_logprobs_partial(hidden, weight, ids, vocab_start=0, impl=impl)[1:])

    def eager(wide: bool = False) -> tuple[Tensor, ...]:
        z = hidden.float() @ weight.float().T if wide else (hidden @ weight.T).float()
        shifted = z - z.detach().amax(1, keepdim=True)
        e = shifted.exp()
        return gradients((e.sum(1), (shifted * e).sum(1), z.gather(1, ids)))

    implementations = kernels(OP, device)
    contenders = {
        **matmuls(hidden, weight),
        **{name: ours(name) for name in implementations},
        "eager": eager,
    }

    def check(results: Mapping[str, Any]) -> None:
        tolerance = 2e-2 if shape.dtype == torch.bfloat16 else 1e-4
        expected = eager(wide=True)  # where eager rounds its logits it is not exact itself
        for name in implementations:
            for mine, theirs in zip(results[name], expected, strict=True):
                assert_close(f"{name} gradient", mine, theirs, tolerance)

    title = f"{shape} K={K} forward+backward, one shard"
    return Case(OP, title, contenders, check, shape.flops, 3 * shape.flops, axes=shape.axes)
