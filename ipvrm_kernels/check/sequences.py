"""The ops on packed sequences against their formulas in fp64, sequence by sequence on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_kernels

from .judge import Judge

LENGTHS = (1, 0, 700, 5000, 33, 2)  # an empty sequence and one longer than any block
DECAY, BETA, MARGIN = 0.95, 10.0, 5.0
ALPHA, LOW, HIGH = 0.1, 0.2, 0.28
TOLERANCE = 3e-6  # of the largest number; 2e-7 was found on a CPU


class Loss(NamedTuple):
    """The two-branch loss of N rows: what the old policy leaves to it, and its value in fp64."""

    shift: Tensor  # (N, 1 + K) old log-prob minus the present one
    absent: Tensor  # (N, K) bool
    advantages: Tensor  # (N, 1 + K)
    cu_seqlens: Tensor  # (B+1,) int32

    @classmethod
    def draw(cls, N: int, K: int, device: str, absent: Tensor) -> Loss:
        generator = torch.Generator().manual_seed(1)
        shift = 0.2 * torch.randn(N, 1 + K, generator=generator)
        for bound in (1 - LOW, 1 + HIGH):  # no ratio that rounding puts on either side of a clip
            shift = torch.where(((-shift).exp() - bound).abs() < 0.02, 0.0, shift)
        advantages = torch.randn(N, 1 + K, generator=generator)
        cuts = torch.tensor([0, min(1, N), N // 3, N // 3, N], dtype=torch.int32)  # an empty sequence
        return cls(*(x.to(device) for x in (shift, absent, advantages, cuts)))

    def arguments(self, logprobs: Tensor) -> tuple[Tensor, ...]:
        """The last five arguments of the ops, as fp32, for present log-probs (N, 1 + K)."""
        old, candidates = self._old(logprobs)
        first, others = self.advantages[:, 0].contiguous(), self.advantages[:, 1:].contiguous()
        return old.float(), candidates.float(), first, others, self.cu_seqlens

    def _old(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        old = (logprobs + self.shift).float()
        return old[:, 0].contiguous(), old[:, 1:].masked_fill(self.absent, -math.inf).contiguous()

    def value_and_gradient(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, its gradient (N, 1 + K)) in fp64: Eq. 11, 12, 14, means of sequences."""
        used = F.pad(~self.absent, (1, 0), value=True)
        old = torch.cat([x.view(len(logprobs), -1) for x in self._old(logprobs)], 1)
        now = logprobs.double().masked_fill(~used, 0).requires_grad_()
        old = old.masked_fill(~used, 0).double()
        ratio, a = (now - old).exp(), self.advantages.double()
        each = torch.where(used, -torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a), 0)
        per_row = each[:, 0] + ALPHA * (old[:, 1:].exp() * each[:, 1:]).sum(1)
        lengths = self.cu_seqlens.diff().long()
        share = (1 / (lengths * len(lengths))).repeat_interleave(lengths)
        loss = (per_row * share).sum()
        return loss.detach(), torch.autograd.grad(loss, now)[0]


class Given(NamedTuple):
    x: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,) int32
    outcome: Tensor  # (B,)
    upstream: Tensor  # (4, N)


def draw(device: str) -> Given:
    generator = torch.Generator().manual_seed(2)
    N = sum(LENGTHS)
    x = 0.1 * torch.randn(N, generator=generator)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    outcome = (torch.arange(len(LENGTHS)) % 2).float()
    return Given(*(t.to(device) for t in (x, edges, outcome, torch.randn(4, N, generator=generator))))


def by_sequence(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function of each sequence of x (N,), packed again."""
    return torch.cat([function(part) for part in x.split(LENGTHS)])


def scan(x: Tensor, reverse: bool) -> Tensor:
    """(T,) y_t = x_t + decay * y_(t-1), or from the end; x in fp64 on the CPU."""
    found, carry = [], 0.0
    for value in reversed(x.tolist()) if reverse else x.tolist():
        carry = value + DECAY * carry
        found.append(carry)
    return torch.tensor(found[::-1] if reverse else found, dtype=x.dtype)


def values(x: Tensor) -> tuple[Tensor, ...]:
    """value, mean_value, prob and td (N,) (Eq. 5, 10)."""
    value = BETA * by_sequence(x, lambda part: part.cumsum(0))
    mean = value / by_sequence(x, lambda part: torch.arange(1, len(part) + 1, dtype=x.dtype))
    return value, mean, mean.sigmoid(), BETA * x


def value_loss(x: Tensor, outcome: Tensor) -> Tensor:
    """() the margin loss, mean over prefixes and sequences (Eq. 9)."""
    sign = (2 * outcome - 1).repeat_interleave(torch.tensor(LENGTHS))
    each = F.softplus(MARGIN - sign * values(x)[1])
    return torch.stack([part.mean() for part in each.split(LENGTHS) if len(part)]).sum() / len(LENGTHS)


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Eq. 11 of each element."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)


def segment_scan(judge: Judge, given: Given, impl: str) -> None:
    for reverse, name in ((False, "forward"), (True, "reverse")):
        x, upstream = given.x.clone().requires_grad_(), given.upstream[0]
        y = ipvrm_kernels.segment_scan(x, given.cu_seqlens, DECAY, reverse, impl=impl)
        expected = by_sequence(given.x.double().cpu(), partial(scan, reverse=reverse))
        judge.within(name, y, expected, TOLERANCE * float(expected.abs().max()))
        (gradient,) = torch.autograd.grad(y, x, upstream)  # the scan from the other end
        expected = by_sequence(upstream.double().cpu(), partial(scan, reverse=not reverse))
        judge.within(f"gradient of {name}", gradient, expected, TOLERANCE * float(expected.abs().max()))


def prefix_values(judge: Judge, given: Given, impl: str) -> None:
    op = partial(ipvrm_kernels.prefix_values, cu_seqlens=given.cu_seqlens, beta=BETA, impl=impl)
    _compare(judge, "values", given, op, values)


def prefix_value_loss(judge: Judge, given: Given, impl: str) -> None:
    op = partial(
        ipvrm_kernels.prefix_value_loss, cu_seqlens=given.cu_seqlens, outcome=given.outcome, beta=BETA,
        margin=MARGIN, impl=impl,
    )  # fmt: skip
    _compare(judge, "loss", given, op, partial(value_loss, outcome=given.outcome.cpu().double()))


def clipped_surrogate(judge: Judge, given: Given, impl: str) -> None:
    old, advantages = given.upstream[2] * 0.3, given.upstream[3]
    for bound in (1 - LOW, 1 + HIGH):
        old = torch.where(((given.x - old).exp() - bound).abs() < 0.02, given.x, old)

    def op(x: Tensor) -> tuple[Tensor, ...]:
        return (
            ipvrm_kernels.clipped_surrogate(x, old, advantages, clip_low=LOW, clip_high=HIGH, impl=impl).loss,
        )

    wide = old.double().cpu(), advantages.double().cpu()
    _compare(judge, "loss", given, op, lambda x: (surrogate(x, *wide),))


def distrl_loss(judge: Judge, given: Given, impl: str) -> None:
    N, K = len(given.x), 3
    absent = torch.arange(N * K, device=given.x.device).view(N, K) % 7 > 1
    loss = Loss.draw(N, K, str(given.x.device), absent)
    logprobs = (given.x[:, None] - torch.arange(1, 2 + K, device=given.x.device)).requires_grad_()
    out = ipvrm_kernels.distrl_loss(
        logprobs[:, 0], logprobs[:, 1:], *loss.arguments(logprobs.detach()),
        alpha=ALPHA, clip_low=LOW, clip_high=HIGH, impl=impl,
    )  # fmt: skip
    expected, gradient = loss.value_and_gradient(logprobs.detach())
    judge.within("loss", out.loss, expected, TOLERANCE * max(1.0, abs(float(expected))))
    (got,) = torch.autograd.grad(out.loss, logprobs)
    judge.within("gradient", got, gradient, TOLERANCE * float(gradient.abs().max()))


def _compare(
    judge: Judge, what: str, given: Given, op: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    formula: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
) -> None:  # fmt: skip
    """Results, and the gradient of x under given.upstream, of `op` against `formula` in fp64 on the CPU."""
    x, wide = given.x.clone().requires_grad_(), given.x.double().cpu().requires_grad_()
    got, expected = ((y,) if isinstance(y, Tensor) else tuple(y) for y in (op(x), formula(wide)))
    upstream = [g if y.dim() else g[0] for y, g in zip(expected, given.upstream, strict=False)]
    for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
        name = what if len(got) == 1 else f"{what} {number}"
        right = right.detach()
        judge.within(name, mine, right, TOLERANCE * max(float(right.abs().max()), 1e-30))
    (mine,) = torch.autograd.grad(got, x, upstream)
    (right,) = torch.autograd.grad(expected, wide, [g.double().cpu() for g in upstream])
    judge.within(f"gradient of {what}", mine, right, TOLERANCE * float(right.abs().max()))


CHECKS: dict[str, Callable[..., None]] = {
    "segment_scan": segment_scan,
    "prefix_values": prefix_values,
    "prefix_value_loss": prefix_value_loss,
    "clipped_surrogate": clipped_surrogate,
    "distrl_loss": distrl_loss,
}
