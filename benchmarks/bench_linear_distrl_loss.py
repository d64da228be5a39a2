"""linear_distrl_loss forward + backward against its composition on full logits (eager, compiled, in the
released slices of 64 rows) and liger's chunked GRPO loss (sampled tokens only, so beside ours without
candidates); and what unused candidate slots cost.

Calibrated rows: ten slots, of which 1.33 are used on average, as `linear_candidates` returns them. Random
rows: K slots, all used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact
from benchmarks.suite.heads import (
    Shape,
    by_the_other,
    calibrated,
    inputs,
    matmuls,
    more_shapes,
    shapes,
    targets,
)
from benchmarks.suite.measure import LESS_WORK, Case, assert_close, is_ours
from benchmarks.suite.peers import compiled, grpo_loss, sliced_logprobs
from benchmarks.suite.roofline import expected
from benchmarks.suite.sequences import edges, kernels
from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs

OP = "linear_distrl_loss"
SEQUENCES = 8
ALPHA, LOW, HIGH = 0.1, 0.2, 0.28


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        for frozen in (False, True):
            batch = RolloutRows.calibrated(shape, device, frozen)
            with_grpo = device == "cuda" and not (quick or frozen)  # on a CPU it takes minutes at this size
            yield loss_case(batch, device, with_grpo, with_compile=not (quick and frozen))
    first = shapes(device, quick)[0]
    for shape in {shape.dtype: shape for shape in reversed(shapes(device, quick))}.values():
        batch = RolloutRows.random(shape, device, frozen=False)
        yield loss_case(batch, device, with_grpo=False, with_compile=not quick)
    if kernels(OP, device):
        yield slots_case(first, device)


def full_cases(device: str) -> Iterator[Case]:
    for shape in more_shapes(device):
        if shape.K in (1, 5, 10):
            yield loss_case(
                RolloutRows.random(shape, device, frozen=False), device, False, with_compile=False
            )
    real = next(more_shapes(device))
    yield loss_case(RolloutRows.calibrated(real, device, frozen=False), device, with_grpo=True)


class RolloutRows:
    """A rollout of eight sequences, the policy a little off the old one."""

    def __init__(
        self, shape: Shape, title: str, frozen: bool, hidden: Tensor, weight: Tensor, sampled: Tensor,
        candidate_ids: Tensor,
    ) -> None:  # fmt: skip
        N = shape.N - shape.N % SEQUENCES
        self.shape = shape = shape._replace(N=N)
        kind = "frozen" if frozen else "trainable"
        self.title, self.frozen = f"{shape} {title}, forward+backward {kind} head", frozen
        self.ids = torch.cat([sampled[:N, None], candidate_ids[:N]], 1)
        with torch.no_grad():
            now = linear_logprobs(hidden[:N], weight, self.ids).logprobs
        self.old = now + 0.2 * torch.randn_like(now)  # -inf stays where a slot is unused
        for bound in (1 - LOW, 1 + HIGH):  # no ratio that rounding puts on either side of a clip
            self.old = torch.where(((now - self.old).exp() - bound).abs() < 1e-3, now, self.old)
        self.advantages = torch.randn_like(now)
        self.cu_seqlens = edges([N // SEQUENCES] * SEQUENCES, str(hidden.device))
        self.hidden = hidden[:N].clone().requires_grad_()
        self.weight = weight.detach().requires_grad_(not frozen)
        self.leaves = (self.hidden, self.weight)[: 2 - frozen]

    @classmethod
    def calibrated(cls, shape: Shape, device: str, frozen: bool) -> RolloutRows:
        rows = calibrated(shape, device)
        ids = linear_candidates(rows.hidden, rows.weight).ids
        title = f"K={ids.shape[1]}, {rows}"
        return cls(shape._replace(K=ids.shape[1]), title, frozen, rows.hidden, rows.weight, rows.sampled, ids)

    @classmethod
    def random(cls, shape: Shape, device: str, frozen: bool) -> RolloutRows:
        hidden, weight, ids = inputs(shape, device)
        sampled = torch.randint(0, shape.V, (shape.N,), device=device)
        return cls(shape, f"K={shape.K}, random: all used", frozen, hidden, weight, sampled, ids)

    def fused(self, impl: str | None, slots: int | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """Ours on the first `slots` candidate slots (default: all)."""
        last = None if slots is None else 1 + slots
        ids, old, advantages = (x[:, 1:last] for x in (self.ids, self.old, self.advantages))

        def run() -> tuple[Tensor, ...]:
            out = linear_distrl_loss(
                self.hidden, self.weight, self.ids[:, 0], ids, self.old[:, 0], old,
                self.advantages[:, 0], advantages, self.cu_seqlens, impl=impl,
            )  # fmt: skip
            return torch.autograd.grad(out.loss, self.leaves)

        return run

    def sampled_only(self, impl: str) -> Callable[[], tuple[Tensor, ...]]:
        """Ours without candidates, one advantage a sequence, as GRPO has it."""
        N = self.shape.N
        none = self.old.new_zeros(N, 0)
        advantages = self.sequence_advantages().repeat_interleave(N // SEQUENCES)

        def run() -> tuple[Tensor, ...]:
            out = linear_distrl_loss(
                self.hidden, self.weight, self.ids[:, 0], self.ids[:, :0], self.old[:, 0], none,
                advantages, none, self.cu_seqlens, impl=impl,
            )  # fmt: skip
            return torch.autograd.grad(out.loss, self.leaves)

        return run

    def dlogprobs(self, exact: Exact, sampled_only: bool) -> Tensor:
        """(N, 1 + K) fp64 d loss / d log-probs at the ids, Eq. 11 and 12 and their means; 0 where unused."""
        N = self.shape.N
        used, advantages = self.ids >= 0, self.advantages.double()
        if sampled_only:
            used = used & (torch.arange(self.ids.shape[1], device=used.device) == 0)
            advantages = self.sequence_advantages().repeat_interleave(N // SEQUENCES)[:, None].double()
        old = self.old.masked_fill(~used, 0).double()
        ratio = (exact.logprobs_of_all(self.ids.clamp(min=0)) - old).exp()
        clipped = torch.where(advantages > 0, ratio > 1 + HIGH, ratio < 1 - LOW)
        weight = ALPHA * old.exp()
        weight[:, 0] = 1
        return torch.where(used & ~clipped, -advantages * ratio * weight / N, 0)

    def sequence_advantages(self) -> Tensor:
        return self.advantages[:: self.shape.N // SEQUENCES, 0].contiguous()

    def composition(self, logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        """The loss on full logits, with the K + 1 log-probs from `logprobs(hidden, weight, ids)`."""
        used = self.ids >= 0
        ids, old = self.ids.clamp(min=0), self.old.masked_fill(~used, 0)
        weight = torch.where(used, old.exp(), 0)

        def run() -> tuple[Tensor, ...]:
            ratio = (logprobs(self.hidden, self.weight, ids) - old).exp()
            a = self.advantages
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
            total = (loss[:, 0] + ALPHA * (weight[:, 1:] * loss[:, 1:]).sum(1)).mean()
            return torch.autograd.grad(total, self.leaves)

        return run


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), dim=1).gather(1, ids)


def loss_case(batch: RolloutRows, device: str, with_grpo: bool, with_compile: bool = True) -> Case:
    shape, implementations = batch.shape, kernels(OP, device)
    own = {name: batch.fused(name) for name in implementations}
    contenders: dict[str, Callable[[], Any]] = {
        **matmuls(batch.hidden, batch.weight),
        **own,
        **by_the_other(own, shape, device),
        "eager composition": batch.composition(eager),
        "released 64-row slices": batch.composition(lambda h, w, ids: sliced_logprobs(h @ w.T, ids)),
    }
    if with_compile:
        contenders["torch.compile of eager"] = batch.composition(compiled(eager))
    absent = {}
    sampled_only = {f"{name}, sampled only": batch.sampled_only(name) for name in implementations}
    if with_grpo:
        grpo, reason = grpo_loss(device)
        contenders |= sampled_only
        if grpo is None:
            absent["liger chunked GRPO, sampled only"] = reason
        else:
            ids, old = (x[:, 0].reshape(SEQUENCES, -1) for x in (batch.ids, batch.old))
            advantages = batch.sequence_advantages()
            hidden = batch.hidden.view(SEQUENCES, -1, shape.D)

            def liger() -> tuple[Tensor, ...]:
                return torch.autograd.grad(
                    grpo(batch.hidden.view_as(hidden), batch.weight, ids, old, advantages), batch.leaves
                )

            contenders["liger chunked GRPO, sampled only"] = liger

    def judged(name: str) -> bool:
        """Half precision rounds the others' logits, and with them ratios across the clips: not theirs."""
        return is_ours(name) or (shape.dtype == torch.float32 and name not in LESS_WORK)

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(batch.hidden, batch.weight)
        ids = batch.ids.clamp(min=0)
        upstream = {only: batch.dlogprobs(exact, only) for only in (False, True)}
        for name, gradients in results.items():
            if judged(name):
                exact.compare_gradients(name, gradients, ids, upstream["sampled only" in name])

    def errors(results: Mapping[str, Any]) -> Mapping[str, float]:
        """Of the gradient of hidden."""
        exact, ids = Exact(batch.hidden, batch.weight), batch.ids.clamp(min=0)
        right = {only: exact.dhidden(ids, batch.dlogprobs(exact, only)) for only in (False, True)}
        return {
            name: exact.relative_error(gradients[0], right["sampled only" in name])
            for name, gradients in results.items()
            if judged(name)
        }

    aims = {} if batch.frozen else targets("distrl_loss", shape, implementations, device)
    work = (2 if batch.frozen else 3) * shape.flops
    return Case(
        OP, batch.title, contenders, check, shape.flops, work, absent=absent, axes=shape.axes, targets=aims,
        expected=expected("frozen" if batch.frozen else "distrl_loss", shape, implementations, device),
        errors=errors,
    )  # fmt: skip


def slots_case(shape: Shape, device: str) -> Case:
    """Ten slots of which two at most are used, against the K = 2 that hold the same candidates."""
    batch = RolloutRows.calibrated(shape, device, frozen=False)
    batch.ids[:, 3:] = -1
    batch.old[:, 3:] = -torch.inf
    name = kernels(OP, device)[0]
    two, ten = f"{name} K=2", f"{name} K=10"
    contenders = {two: batch.fused(name, 2), ten: batch.fused(name)}

    def check(results: Mapping[str, Any]) -> None:
        for mine, theirs in zip(results[ten], results[two], strict=True):
            assert_close("gradient", mine, theirs, 1e-4)

    used = (batch.ids[:, 1:] >= 0).sum(1).float().mean().item()
    title = f"{batch.shape}, {used:.2f} candidates a row, unused slots"
    return Case(OP, title, contenders, check, min_rounds=5, axes=batch.shape.axes)
