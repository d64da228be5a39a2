"""linear_distrl_loss forward + backward, trainable head, against its eager composition on full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.heads import K, inputs, shapes
from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, runnable
from ipvrm_kernels import linear_distrl_loss, linear_logprobs

OP = "linear_distrl_loss"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        hidden, weight, ids = inputs(shape, device)
        sampled, N = ids[:, 0].contiguous(), shape.N
        with torch.no_grad():
            old = linear_logprobs(hidden, weight, torch.cat([sampled[:, None], ids], 1)).logprobs
        advantages, candidate_advantages = (
            torch.randn(N, device=device),
            torch.randn(ids.shape, device=device),
        )
        cu = edges([N // 8] * 8, device)
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())

        def matmul(hidden: Tensor = hidden, weight: Tensor = weight) -> Tensor:
            return hidden @ weight.T

        def fused(impl: str, leaves=leaves, sampled=sampled, ids=ids, old=old, a=advantages,
                  ca=candidate_advantages, cu=cu) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
            def run() -> tuple[Tensor, ...]:
                out = linear_distrl_loss(*leaves, sampled, ids, old[:, 0], old[:, 1:], a, ca, cu, impl=impl)
                return torch.autograd.grad(out.loss, leaves)

            return run

        def eager(leaves=leaves, sampled=sampled, ids=ids, old=old, a=advantages, ca=candidate_advantages):
            log_p = torch.log_softmax((leaves[0] @ leaves[1].T).float(), dim=1)
            new = log_p.gather(1, torch.cat([sampled[:, None], ids], 1))
            ratio = (new - old).exp()
            adv = torch.cat([a[:, None], ca], 1)
            loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
            total = (loss[:, 0] + 0.1 * (old[:, 1:].exp() * loss[:, 1:]).sum(1)).mean()
            return torch.autograd.grad(total, leaves)

        ours = {impl: fused(impl) for impl in runnable(OP, device)}

        def check(ours=ours, eager=eager) -> None:
            expected = eager()
            for name, run in ours.items():
                for mine, theirs in zip(run(), expected, strict=True):
                    assert_close(f"{name} gradient", mine.float(), theirs.float(), 2e-2)

        contenders = {"matmul": matmul, **ours, "eager composition": eager}
        yield Case(OP, f"{shape} K={K} forward+backward trainable head", contenders, check, shape.flops)
