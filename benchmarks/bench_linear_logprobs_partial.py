"""linear_logprobs_partial on one shard of half the vocabulary, forward + backward, against the shard's bare
matmul and eager PyTorch on its full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact, gradient_tolerance
from benchmarks.suite.heads import K, Shape, inputs, matmuls, shapes
from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.roofline import expected
from benchmarks.suite.sequences import kernels
from ipvrm_kernels import linear_logprobs_partial
from ipvrm_kernels.linear_logprobs_partial import Partial

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

    def ours(impl: str) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            partial = linear_logprobs_partial(hidden, weight, ids, vocab_start=0, impl=impl)
            return *gradients(partial[1:]), *(x.detach() for x in partial)

        return step

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
        exact = Exact(hidden, weight)
        z_ids = exact.log_p.gather(1, ids[exact.rows]) + exact.lse[:, None]
        right = eager(wide=True)  # where eager rounds its logits it is not exact itself
        for name in implementations:
            *found, top, sumexp, sum_z_exp, id_logits = results[name]
            check_partial(exact, name, Partial(top, sumexp, sum_z_exp, id_logits), z_ids)
            for what, mine, theirs in zip(("dhidden", "dweight"), found, right, strict=True):
                assert_close(f"{name} {what}", mine, theirs, gradient_tolerance(shape.dtype))

    title = f"{shape} K={K} forward+backward, one shard"
    return Case(
        OP, title, contenders, check, shape.flops, 3 * shape.flops, axes=shape.axes,
        expected=expected("trainable", shape, implementations, device),
    )  # fmt: skip


def check_partial(exact: Exact, name: str, out: Partial, z_ids: Tensor) -> None:
    """Every field of a shard's result, by what the shard alone would give; z_ids (R, K) on exact.rows."""
    log_sum = out.sumexp.double().log()
    exact.compare(f"{name} max and sumexp", out.max.double() + log_sum, exact.lse)
    entropy = log_sum - out.sum_z_exp.double() / out.sumexp.double()
    exact.compare(f"{name} sum_z_exp", entropy, exact.entropy, exact.entropy_allowed)
    exact.compare(f"{name} max", out.max, (exact.log_p + exact.lse[:, None]).amax(1))
    exact.compare(f"{name} id_logits", out.id_logits, z_ids)
