"""linear_logprobs against the bare `hidden @ weight.T`, eager PyTorch on full logits and torch's chunked op.

Forward: lse, log-prob of one token per row, entropy. Forward + backward: log-probs of K tokens per row;
linear_cross_entropy knows one token only, so its rows stand beside ours at one token and at K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.heads import K, inputs, shapes
from benchmarks.measure import Case, assert_close
from benchmarks.sequences import runnable
from ipvrm_kernels import linear_logprobs


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """torch's chunked linear_cross_entropy, in torch releases that have it."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """log_softmax of full logits, as trainers write it."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    return log_p.gather(1, ids), -(log_p.exp() * log_p).sum(1) if entropy else log_p


def cases(device: str, quick: bool) -> Iterator[Case]:
    has_chunked = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    for shape in shapes(device, quick):
        hidden, weight, ids = inputs(shape, device)
        sampled = ids[:, 0].contiguous()

        def matmul(hidden: Tensor = hidden, weight: Tensor = weight) -> Tensor:
            return hidden @ weight.T

        ours = {name: _forward(hidden, weight, sampled, name) for name in runnable("linear_logprobs", device)}
        contenders: dict[str, Callable[[], Any]] = {"matmul": matmul, **ours}
        contenders["eager log_softmax"] = torch.no_grad()(
            lambda hidden=hidden, weight=weight, one=sampled[:, None]: eager(hidden, weight, one, True)
        )
        if has_chunked:
            contenders["F.linear_cross_entropy"] = torch.no_grad()(
                lambda hidden=hidden, weight=weight, t=sampled: chunked_cross_entropy(hidden, weight, t)
            )

        def check_values(ours=ours, hidden=hidden, weight=weight, sampled=sampled) -> None:
            expected = eager(hidden[:64].float(), weight.float(), sampled[:64, None], True)
            for name, run in ours.items():
                out = run()
                assert_close(f"{name} log-probs", out.logprobs[:64], expected[0][:, 0], 1e-3)
                assert_close(f"{name} entropy", out.entropy[:64], expected[1], 1e-3)

        yield Case(
            "linear_logprobs", f"{shape} lse + sampled + entropy", contenders, check_values, shape.flops
        )

        for frozen in (False, True):
            leaves = [hidden.detach().requires_grad_()]
            head = weight.detach().requires_grad_(not frozen)
            leaves += [] if frozen else [head]
            upstream = torch.randn(ids.shape, device=device)
            steps = {
                name: _step(leaves, head, ids, upstream, name) for name in runnable("linear_logprobs", device)
            }
            contenders = {"matmul": matmul, **steps}

            def eager_step(leaves=tuple(leaves), head=head, ids=ids, upstream=upstream):
                return torch.autograd.grad((eager(leaves[0], head, ids, False)[0] * upstream).sum(), leaves)

            contenders["eager log_softmax"] = eager_step
            if has_chunked:
                contenders["F.linear_cross_entropy, one id"] = (
                    lambda leaves=tuple(leaves), head=head, t=sampled: torch.autograd.grad(
                        chunked_cross_entropy(leaves[0], head, t), leaves
                    )
                )

            def check_gradients(
                steps=steps, hidden=hidden, weight=weight, ids=ids, upstream=upstream
            ) -> None:
                leaf = hidden[:16].detach().float().requires_grad_()
                logp = eager(leaf, weight.float(), ids[:16], False)[0]
                (expected,) = torch.autograd.grad((logp * upstream[:16]).sum(), leaf)
                for name, step in steps.items():
                    tolerance = 2e-2 if hidden.dtype == torch.bfloat16 else 1e-4
                    assert_close(f"{name} d hidden", step()[0][:16].float(), expected, tolerance)

            kind = "frozen" if frozen else "trainable"
            name = f"{shape} K={K} forward+backward {kind} head"
            yield Case("linear_logprobs", name, contenders, check_gradients, shape.flops)


def _forward(hidden: Tensor, weight: Tensor, sampled: Tensor, impl: str) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return linear_logprobs(hidden, weight, sampled, return_entropy=True, impl=impl)

    return run


def _step(
    leaves: list[Tensor], head: Tensor, ids: Tensor, upstream: Tensor, impl: str
) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        out = linear_logprobs(leaves[0], head, ids, impl=impl)
        return torch.autograd.grad((out.logprobs * upstream).sum(), leaves)

    return run
