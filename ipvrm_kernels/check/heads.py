"""The ops of the LM head on a few hundred rows, half of them flat and half peaked, against fp64.

Expected values come from two passes over the vocabulary in blocks, so that no (N, V) and no second weight is
held. log-probs and lse may be off by twice the error of PyTorch's own fp32 logits and 8 eps max |z|: at
V = 151,936 some 2e-5, where one tile of 256 columns left out is 2e-3. Gradients of the weight are compared
on every VOCABULARY_STEP-th row, each relative to its own largest number, so that every tile has some.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ipvrm_kernels

from ..backend import is_reference
from . import sequences
from .judge import Judge

BLOCK = 8192  # rows of weight in fp64 at a time
REFERENCE_ROWS = 64  # whose logits PyTorch holds at a time
VOCABULARY_STEP = 29  # prime to every tile's size
LEVEL = 2.0  # standard deviation of a flat row's logits
MIN_PROB = 0.1
BORDER = 1e-4  # of p from MIN_PROB, within which rounding may decide
# of gradients, relative; in half precision they are rounded to it
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Head(NamedTuple):
    """Sizes of a head and its softcap."""

    D: int
    V: int
    softcap: float | None = None

    def __str__(self) -> str:
        return f"D={self.D} V={self.V}" + (f" softcap={self.softcap:g}" if self.softcap else "")


class Given(NamedTuple):
    """A batch of N rows and what is asked of it."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    softcap: float | None
    ids: Tensor  # (N, K), an absent and a repeated one among them
    upstream: Tensor  # (N, K) of the log-probs
    entropy_upstream: Tensor  # (N,)
    loss: sequences.Loss  # of the first ids as the sampled token, of the others as candidates

    @property
    def options(self) -> dict[str, Any]:
        return dict(softcap=self.softcap)


def draw(head: Head, rows: int, device: str, dtype: torch.dtype) -> Given:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    N, D, V = rows, head.D, head.V
    if V * D <= 1 << 24:
        weight = normal(V, D)
    else:  # drawn where it is needed: a CPU takes many seconds for it
        weight = torch.randn(V, D, device=device, generator=torch.Generator(device).manual_seed(0))
    weight = (weight * LEVEL * D**-0.5).to(dtype)
    ids = torch.randint(0, V, (N, 4), generator=generator).to(device)
    peaks = ids[:, :2]
    top = math.log(V) + LEVEL**2 / 2  # about lse of a flat row
    if head.softcap is not None:
        top = min(top, 0.9 * head.softcap)
    height = top - 2 + 4 * torch.rand(N, 2, generator=generator).to(device)
    height[N // 2 :] = 0  # flat rows
    rows_of_peaks = weight[peaks].float()  # (N, 2, D)
    lift = height[..., None] * rows_of_peaks / rows_of_peaks.square().sum(2, keepdim=True)
    hidden = (normal(N, D) + lift.sum(1)).to(dtype)
    ids[::7, 3] = -1
    ids[1::5, 2] = ids[1::5, 0]
    loss = sequences.Loss.draw(N, ids.shape[1] - 1, device, ids[:, 1:] < 0)
    return Given(hidden, weight, head.softcap, ids, normal(N, 4), 0.1 * normal(N), loss)


class Gradients(NamedTuple):
    """In fp64; a floor is what log-probs within `Exact.allowed` may move a row whose gradient cancels."""

    hidden: Tensor  # (N, D)
    hidden_floor: Tensor  # (N,)
    weight: Tensor  # (R, D), on `Exact.tokens`
    weight_floor: Tensor  # (R,)


class Exact:
    """In fp64: lse, entropy (N,), logprobs (N, K), candidates, gradients; and the errors that are allowed."""

    def __init__(self, given: Given) -> None:
        self.given = given
        hidden, ids = given.hidden.double(), given.ids
        parts, means, off, largest = [], [], 0.0, 0.0
        z_ids = torch.full(ids.shape, -math.inf, dtype=torch.float64, device=ids.device)
        for start, z, _ in self._logits():
            block = given.weight[start : start + z.shape[1]]
            rounded = self._capped(fp32_logits(given.hidden, block))
            off, largest = max(off, float((rounded - z).abs().max())), max(largest, float(z.abs().max()))
            parts.append(torch.logsumexp(z, 1))
            means.append((torch.softmax(z, 1) * z).sum(1))
            inside = (ids >= start) & (ids < start + z.shape[1])
            z_ids = torch.where(inside, z.gather(1, (ids - start).clamp(0, z.shape[1] - 1)), z_ids)
        lses = torch.stack(parts)  # (blocks, N)
        self.lse = torch.logsumexp(lses, 0)
        self.entropy = self.lse - ((lses - self.lse).exp() * torch.stack(means)).sum(0)
        self.logprobs = z_ids - self.lse[:, None]
        self.allowed = 2 * off + 8 * torch.finfo(torch.float32).eps * largest
        self.reference_error = self._of_log_softmax()
        self.loss, upstream = given.loss.value_and_gradient(self.logprobs)
        self._gradients(hidden, upstream)

    def _capped(self, z: Tensor) -> Tensor:
        cap = self.given.softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def _of_log_softmax(self) -> float:
        """The largest error at the ids of PyTorch's log_softmax, which adds V numbers in fp32."""
        largest, given = 0.0, self.given
        for start in range(0, len(given.ids), REFERENCE_ROWS):
            rows = slice(start, start + REFERENCE_ROWS)
            log_p = torch.log_softmax(self._capped(fp32_logits(given.hidden[rows], given.weight)), 1)
            error = (log_p.gather(1, given.ids[rows].clamp(min=0)) - self.logprobs[rows]).abs()
            largest = max(largest, float(error[given.ids[rows] >= 0].max()))
        return largest

    def of(self, impl: str) -> Exact:
        """The same; the reference, which calls log_softmax, is allowed twice that one's error as well."""
        if not is_reference(impl):
            return self
        loose = copy.copy(self)
        loose.allowed = self.allowed + 2 * self.reference_error
        loose.entropy_allowed = self.entropy_allowed * loose.allowed / self.allowed
        return loose

    def _logits(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first id, z (N, block), weight (block, D)) in fp64 of each block of the vocabulary."""
        hidden, start = self.given.hidden.double(), 0
        for block in self.given.weight.split(BLOCK):
            wide = block.double()
            yield start, self._capped(hidden @ wide.T), wide
            start += len(block)

    def _gradients(self, hidden: Tensor, loss_upstream: Tensor) -> None:
        """The second pass: what needs the lse."""
        given, cap = self.given, self.given.softcap
        V, device = len(given.weight), hidden.device
        asked = given.ids[given.ids >= 0].flatten()
        self.tokens = torch.cat([torch.arange(3, V, VOCABULARY_STEP, device=device), asked]).unique()
        branches = {
            "logprobs": (given.upstream.double(), given.entropy_upstream.double()),
            "loss": (loss_upstream, torch.zeros_like(self.lse)),
        }
        dhidden = {name: torch.zeros_like(hidden) for name in branches}
        dweight: dict[str, list[Tensor]] = {name: [] for name in branches}
        floors: dict[str, list[Tensor]] = {name: [] for name in branches}
        sizes = {
            name: torch.where(given.ids >= 0, g, 0).abs().sum(1) + g_entropy.abs() * (1 + self.entropy)
            for name, (g, g_entropy) in branches.items()
        }  # (N,)
        reach = hidden.abs().amax(1)  # (N,)
        sensitivity = torch.zeros_like(self.lse)
        pairs, self.border = [], torch.zeros(len(hidden), dtype=torch.bool, device=device)
        used = given.ids >= 0
        for start, z, weight in self._logits():
            log_p = z - self.lse[:, None]
            p = log_p.exp()
            centred = log_p + self.entropy[:, None]
            sensitivity += (p * centred.abs()).sum(1)
            row, column = (p >= MIN_PROB).nonzero(as_tuple=True)
            pairs.append(torch.stack([row, column + start], 1))
            self.border |= ((p - MIN_PROB).abs() < BORDER).any(1)
            inside = used & (given.ids >= start) & (given.ids < start + z.shape[1])
            at = torch.where(inside, given.ids - start, 0)
            here = self.tokens[(self.tokens >= start) & (self.tokens < start + z.shape[1])] - start
            for name, (g, g_entropy) in branches.items():
                g = torch.where(used, g, 0)
                dz = -p * (g.sum(1, keepdim=True) + g_entropy[:, None] * centred)
                dz.scatter_add_(1, at, torch.where(inside, g, 0))
                if cap is not None:
                    dz *= 1 - (z / cap) ** 2
                dhidden[name] += dz @ weight
                dweight[name].append(dz[:, here].T @ hidden)
                floors[name].append(p[:, here].T @ (sizes[name] * reach))
        self.candidates = torch.cat(pairs)  # (C, 2) of (row, id)
        self.entropy_allowed = self.allowed * (1 + float(sensitivity.max()))
        widest, off = float(given.weight.abs().max()), 2 * self.allowed
        self.gradients = {
            name: Gradients(
                dhidden[name],
                off * widest * sizes[name],
                torch.cat(dweight[name]),
                off * torch.cat(floors[name]),
            )
            for name in branches
        }

    def judge_gradients(self, judge: Judge, name: str, hidden: Tensor, weight: Tensor) -> None:
        expected, allowed = self.gradients[name], TOLERANCE[self.given.hidden.dtype]
        judge.rows_within("gradient of hidden", hidden, expected.hidden, allowed, expected.hidden_floor)
        judge.rows_within(
            "gradient of weight", weight[self.tokens], expected.weight, allowed, expected.weight_floor
        )


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, V) never rounded below fp32, as PyTorch multiplies operands of this dtype."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def leaves(given: Given) -> tuple[Tensor, Tensor]:
    return given.hidden.detach().requires_grad_(), given.weight.detach().requires_grad_()


def linear_logprobs(judge: Judge, given: Given, exact: Exact, impl: str) -> None:
    hidden, weight = leaves(given)
    out = ipvrm_kernels.linear_logprobs(
        hidden, weight, given.ids, return_entropy=True, impl=impl, **given.options
    )
    _statistics(judge, given, exact, out, hidden, weight)
    if not is_reference(impl):
        _same_rows(judge, given, impl)


def _statistics(
    judge: Judge, given: Given, exact: Exact, out: ipvrm_kernels.LinearLogprobs, *inputs: Tensor
) -> None:
    """Log-probs, lse, entropy, and the gradients of the first and the last."""
    assert out.entropy is not None
    judge.within("log-probs", out.logprobs, exact.logprobs, exact.allowed)
    judge.within("lse", out.lse, exact.lse, exact.allowed)
    judge.within("entropy", out.entropy, exact.entropy, exact.entropy_allowed)
    upstream = (given.upstream, given.entropy_upstream)
    exact.judge_gradients(
        judge, "logprobs", *torch.autograd.grad((out.logprobs, out.entropy), inputs, upstream)
    )


def _same_rows(judge: Judge, given: Given, impl: str) -> None:
    """A row is the same to the last bit whatever its place and its neighbours: other tiles hold it then."""

    def forward(rows: Tensor) -> ipvrm_kernels.LinearLogprobs:
        return ipvrm_kernels.linear_logprobs(
            given.hidden[rows], given.weight, given.ids[rows], return_entropy=True, deterministic=True,
            impl=impl, **given.options,
        )  # fmt: skip

    rows = torch.arange(len(given.hidden), device=given.hidden.device)
    first, some = forward(rows), rows[1:].flip(0)
    for name, got, expected in zip(first._fields, forward(some), first, strict=True):
        assert got is not None and expected is not None
        judge.equal(f"{name} of rows in another order", got, expected[some])


def linear_logprobs_partial(judge: Judge, given: Given, exact: Exact, impl: str) -> None:
    """Two shards of unequal size, merged."""
    hidden, weight = leaves(given)
    cut = len(weight) // 2 + 1
    shards = [
        ipvrm_kernels.linear_logprobs_partial(
            hidden, part, given.ids, vocab_start=start, impl=impl, **given.options
        )
        for part, start in ((weight[:cut], 0), (weight[cut:], cut))
    ]
    out = ipvrm_kernels.merge_partials(shards, return_entropy=True)
    _statistics(judge, given, exact, out, hidden, weight)


def linear_candidates(judge: Judge, given: Given, exact: Exact, impl: str) -> None:
    sampled = given.ids[:, 0].contiguous()
    out = ipvrm_kernels.linear_candidates(
        given.hidden, given.weight, min_prob=MIN_PROB, sampled=sampled, return_entropy=True, impl=impl,
        **given.options,
    )  # fmt: skip
    used = out.ids >= 0
    judge.equal("counts", out.counts.long(), used.sum(1))
    row, slot = used.nonzero(as_tuple=True)
    found = {(int(r), int(i)) for r, i in zip(row, out.ids[row, slot], strict=True)}
    wanted = {(int(r), int(i)) for r, i in exact.candidates}
    border = set(exact.border.nonzero()[:, 0].tolist())
    differ = [pair for pair in found ^ wanted if pair[0] not in border]
    judge.equal("candidates", torch.tensor(len(differ)), torch.tensor(0))
    weight = given.weight[out.ids[row, slot]].double()
    z = exact._capped((given.hidden[row].double() * weight).sum(1))
    judge.within("log-probs", out.logprobs[row, slot], z - exact.lse[row], exact.allowed)
    judge.equal("order", out.logprobs, out.logprobs.sort(1, descending=True).values)
    judge.within("lse", out.lse, exact.lse, exact.allowed)
    assert out.entropy is not None and out.sampled_logprobs is not None
    judge.within("entropy", out.entropy, exact.entropy, exact.entropy_allowed)
    judge.within("sampled log-probs", out.sampled_logprobs, exact.logprobs[:, 0], exact.allowed)


def linear_distrl_loss(judge: Judge, given: Given, exact: Exact, impl: str) -> None:
    hidden, weight = leaves(given)
    loss = given.loss
    out = ipvrm_kernels.linear_distrl_loss(
        hidden, weight, given.ids[:, 0].contiguous(), given.ids[:, 1:].contiguous(),
        *loss.arguments(exact.logprobs), impl=impl, **given.options,
    )  # fmt: skip
    # a log-prob that is off moves the loss by at most the sum of |its derivatives|
    moved = float(exact.given.loss.value_and_gradient(exact.logprobs)[1].abs().sum())
    allowed = 2 * exact.allowed * moved + 1e-5 * abs(float(exact.loss))
    judge.within("loss", out.loss, exact.loss, allowed)
    exact.judge_gradients(judge, "loss", *torch.autograd.grad(out.loss, (hidden, weight)))


CHECKS: dict[str, Callable[..., None]] = {
    "linear_logprobs": linear_logprobs,
    "linear_logprobs_partial": linear_logprobs_partial,
    "linear_candidates": linear_candidates,
    "linear_distrl_loss": linear_distrl_loss,
}


def timed(op: str, given: Given, exact: Exact, impl: str) -> dict[str, Callable[[], object]]:
    """The calls of `op` whose time is compared with the bare matmul's."""
    hidden, weight = leaves(given)
    plain = (given.hidden, given.weight)
    ids, sampled = given.ids, given.ids[:, 0].contiguous()
    options = dict(given.options, impl=impl)
    if op == "linear_logprobs":
        return {
            "forward": lambda: ipvrm_kernels.linear_logprobs(*plain, sampled, **options),
            "forward + backward": lambda: torch.autograd.grad(
                ipvrm_kernels.linear_logprobs(hidden, weight, ids, **options).logprobs, (hidden, weight),
                given.upstream,
            ),
        }  # fmt: skip
    if op == "linear_candidates":
        return {"forward": lambda: ipvrm_kernels.linear_candidates(*plain, sampled=sampled, **options)}
    if op == "linear_distrl_loss":
        arguments = (sampled, ids[:, 1:].contiguous(), *given.loss.arguments(exact.logprobs))
        return {
            "forward + backward": lambda: torch.autograd.grad(
                ipvrm_kernels.linear_distrl_loss(hidden, weight, *arguments, **options).loss, (hidden, weight)
            )
        }
    if op == "linear_logprobs_partial":  # a shard that is the whole vocabulary
        return {
            "forward": lambda: ipvrm_kernels.linear_logprobs_partial(*plain, ids, vocab_start=0, **options)
        }
    raise KeyError(op)
