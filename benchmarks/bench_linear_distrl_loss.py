"""linear_distrl_loss forward + backward against its eager composition on full logits, and what unused
candidate slots cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import CANDIDATES_PER_ROW, K, Shape, inputs, shapes
from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, kernels
from ipvrm_kernels import linear_distrl_loss, linear_logprobs

OP = "linear_distrl_loss"


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        for frozen in (False, True):
            yield _step(shape, device, frozen)
    yield _slots(shapes(device, quick)[0], device)


class Batch:
    """A rollout of eight sequences with `num_slots` candidates a row, the policy a little off the old one."""

    def __init__(self, shape: Shape, device: str, num_slots: int, frozen: bool) -> None:
        self.hidden, self.weight, _ = inputs(shape, device)
        self.ids = torch.randint(0, shape.V, (shape.N, 1 + num_slots), device=device)
        with torch.no_grad():
            now = linear_logprobs(self.hidden, self.weight, self.ids).logprobs
        self.old = now + 0.2 * torch.randn_like(now)
        self.advantages = torch.randn_like(now)
        self.cu_seqlens = edges([shape.N // 8] * 8, device)
        self.leaves = (self.hidden.requires_grad_(), self.weight.requires_grad_(not frozen))[: 2 - frozen]

    def fused(
        self, impl: str | None, candidate_ids: Tensor | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        ids, old, advantages = (x[:, 1:] for x in (self.ids, self.old, self.advantages))
        ids = ids if candidate_ids is None else candidate_ids
        old, advantages = old[:, : ids.shape[1]], advantages[:, : ids.shape[1]]

        def run() -> tuple[Tensor, ...]:
            out = linear_distrl_loss(
                self.hidden, self.weight, self.ids[:, 0], ids, self.old[:, 0], old,
                self.advantages[:, 0], advantages, self.cu_seqlens, impl=impl,
            )  # fmt: skip
            return torch.autograd.grad(out.loss, self.leaves)

        return run

    def eager(self) -> tuple[Tensor, ...]:
        log_p = torch.log_softmax((self.hidden @ self.weight.T).float(), dim=1)
        ratio = (log_p.gather(1, self.ids) - self.old).exp()
        loss = -torch.minimum(ratio * self.advantages, ratio.clamp(0.8, 1.28) * self.advantages)
        total = (loss[:, 0] + 0.1 * (self.old[:, 1:].exp() * loss[:, 1:]).sum(1)).mean()
        return torch.autograd.grad(total, self.leaves)


def _step(shape: Shape, device: str, frozen: bool) -> Case:
    batch = Batch(shape, device, K, frozen)
    implementations = kernels(OP, device)
    contenders = {
        "matmul": lambda: batch.hidden.detach() @ batch.weight.detach().T,
        **{name: batch.fused(name) for name in implementations},
        "eager composition": batch.eager,
    }

    def check(results: Mapping[str, Any]) -> None:
        for name in implementations:
            for mine, theirs in zip(results[name], results["eager composition"], strict=True):
                assert_close(f"{name} gradient", mine.float(), theirs.float(), 2e-2)

    kind = "frozen" if frozen else "trainable"
    return Case(OP, f"{shape} K={K} forward+backward {kind} head", contenders, check, shape.flops)


def _slots(shape: Shape, device: str) -> Case:
    """K = 10 slots of which CANDIDATES_PER_ROW are used on average, against K = 2 that hold the same ones."""
    batch = Batch(shape, device, 10, False)
    used = 1 + (torch.rand(shape.N, 1, device=device) < CANDIDATES_PER_ROW - 1).long()
    ten = torch.where(torch.arange(10, device=device) < used, batch.ids[:, 1:], -1)
    contenders = {"K=2": batch.fused(None, ten[:, :2]), "K=10": batch.fused(None, ten)}

    def check(results: Mapping[str, Any]) -> None:
        for mine, theirs in zip(results["K=10"], results["K=2"], strict=True):
            assert_close("gradient", mine, theirs, 1e-4)

    title = f"{shape} {used.float().mean().item():.2f} candidates a row, unused slots"
    return Case(OP, title, contenders, check)
