"""distrl_loss: the two-branch clipped policy loss from log-probs, its metrics and gradients in one pass.

    loss = sum_n w_n l(y_n) + alpha sum_n u_n sum_k pi_old(c_nk) l(c_nk)                       Eq. 11, 12, 14

l is the clipped surrogate; w and u are the factors of a row's losses: 1 / (T_b B) for sequence_mean, 1 / N
for token_mean, 1 / sum pi_old for old_prob_mean, or the caller's denominators in place of B, N and the sum.
Eager PyTorch makes about sixty small ops of it. Here every element is read once and an unused one costs a
comparison; sums of blocks are added in a fixed order, in fp64. A pi_old below the smallest normal number
counts as 0; a NaN old log-prob of a used element makes the loss NaN.

An unused element is known by its old log-prob of -inf. `linear_distrl_loss` evaluates the same objective,
block by block, on log-probs that it forms itself.

Shapes: logprobs (N,), candidate_logprobs (N, K), cu_seqlens (B+1,). In the kernels logprobs and dlogprobs are
(n, 1 + K), the sampled token first; the rest as in `LossInputs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .clipped_surrogate import (  # the formula; no launch is shared
    check_clips,
    clip_bounds,
    clip_numbers,
    clipped_surrogate_reference,
    native_clips,
)
from .inputs import check_tensors, checked_number
from .packing import check_cu_seqlens, check_cu_seqlens_shape, check_finite, lengths
from .registration import Number, register

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from .clipped_surrogate import surrogate

REDUCTIONS = ("sequence_mean", "token_mean")
CANDIDATE_REDUCTIONS = (*REDUCTIONS, "old_prob_mean")  # index = csrc/token_math.h's Reduction
DISTRL_METRICS = (  # order: csrc/token_math.h's finish_objective
    "token_clip_fraction",  # of the sampled tokens, those whose clipped branch is strictly larger
    "token_dual_clip_fraction",
    "token_kl",  # mean of old - new
    "candidate_clip_fraction",  # of the used candidates
    "candidate_dual_clip_fraction",
    "candidate_kl",  # mean over used candidates of pi_old * (old - new)
    "candidates_per_row",
    "candidate_mass",  # sum of pi_old over a row's candidates, mean over rows
)
SUMS = 11  # per branch loss, clipped, dual clipped, kl, used; then the mass: csrc/token_math.h's ObjectiveSum
BLOCK_ROWS = 256  # on the CPU
BLOCK = 1024  # elements of a Triton program


class DistRLLoss(NamedTuple):
    """loss (), differentiable; token_loss (), candidate_loss (), detached; metrics {name: (sum, count)},
    detached.
    """

    loss: Tensor
    token_loss: Tensor
    candidate_loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(NamedTuple):
    """The scalar options of the loss; clips = (low, high) of tokens, then of candidates."""

    alpha: float
    clips: Sequence[float]
    dual_clip: float | None
    reduction: str
    candidate_reduction: str


class LossInputs(NamedTuple):
    """What the loss is evaluated on, contiguous, floats in fp32 (fp64)."""

    old_logprobs: Tensor  # (N,) -inf unused
    old_candidate_logprobs: Tensor  # (N, K) -inf unused
    advantages: Tensor  # (N,)
    candidate_advantages: Tensor  # (N, K)
    cu_seqlens: Tensor  # (B+1,)
    token_denominator: Tensor | None  # ()
    candidate_denominator: Tensor | None  # ()

    def rows(self, r0: int, r1: int) -> LossInputs:
        """Rows r0 .. r1, with the edges and denominators of the whole batch."""
        return self._replace(**{name: getattr(self, name)[r0:r1] for name in self._fields[:4]})


class Divisors(NamedTuple):
    """What the factors of the two branches are divided by, for the whole batch at any rows."""

    tokens: float | Tensor
    candidates: float | Tensor


def check_denominator(op: str, name: str, value: float) -> None:
    """Raise ValueError, as `op`, unless finite and > 0; a candidate_denominator may be 0, see check_batch."""
    least = ">" if name == "token_denominator" else ">="
    if not 0 <= value < math.inf or (least == ">" and value == 0):
        raise ValueError(f"{op}: {name} must be finite and {least} 0, got {value}")


def check_batch(op: str, batch: LossInputs) -> None:
    """Raise ValueError, as `op`, for values that do not fit: edges, denominators; it reads them."""
    check_cu_seqlens(op, batch.cu_seqlens, batch.old_logprobs.shape[0])
    for name in ("token_denominator", "candidate_denominator"):
        denominator = getattr(batch, name)
        if denominator is not None:
            check_denominator(op, name, float(denominator))
    if batch.candidate_denominator is not None and float(batch.candidate_denominator) == 0:
        used = int((batch.old_candidate_logprobs != -math.inf).sum())
        if used:
            raise ValueError(
                f"{op}: candidate_denominator must be > 0 where there are candidates, got 0 with {used}"
            )


def denominator_tensor(op: str, name: str, given: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A denominator as a 0-d tensor beside `like`; a number is checked here, a tensor's value by the op."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        if given.dim() != 0:
            raise ValueError(f"{op}: {name} must be a number or 0-d, got shape {tuple(given.shape)}")
        return given.detach().to(like.device, like.dtype)
    number = checked_number(op, name, given)
    if isinstance(number, Tensor):  # compiled: as with a tensor given
        return number.to(like.device, like.dtype)
    check_denominator(op, name, number)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def checked_floats(
    op: str, like: Tensor, dtype: torch.dtype, of_tokens: torch.Size, of_candidates: torch.Size,
    **tensors: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The tensors, detached, in `dtype`. Raise ValueError, as `op`, unless they are floats of these shapes
    (one whose name holds "candidate" of the latter) on the device of `like`."""
    check_tensors(op, **tensors)
    for name, x in tensors.items():
        shape = tuple(of_candidates if "candidate" in name else of_tokens)
        if x.shape != shape or not x.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be floating point of shape {shape}, got {tuple(x.shape)} {x.dtype}"
            )
        if x.device != like.device:
            raise ValueError(f"{op}: {name} is on {x.device}, the others on {like.device}")
    return [x.detach().to(dtype) for x in tensors.values()]


class Options(NamedTuple):
    """What an op takes of `Objective`, in its order."""

    alpha: Number
    clip_low: Number
    clip_high: Number
    candidate_clip_low: Number
    candidate_clip_high: Number
    dual_clip: Number | None
    reduction: str
    candidate_reduction: str


def checked_options(
    op: str, alpha: float | Tensor, clip_low: float | Tensor, clip_high: float | Tensor,
    candidate_clip_low: float | Tensor | None, candidate_clip_high: float | Tensor | None,
    dual_clip: float | Tensor | None, reduction: str, candidate_reduction: str | None,
) -> Options:  # fmt: skip
    """The options as the public functions take them, with what None stands for. Raise ValueError, as `op`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    candidate_reduction = reduction if candidate_reduction is None else candidate_reduction
    if candidate_reduction not in CANDIDATE_REDUCTIONS:
        raise ValueError(
            f"{op}: candidate_reduction must be None or one of {', '.join(CANDIDATE_REDUCTIONS)}, got "
            f"{candidate_reduction!r}"
        )
    low, high, dual = clip_numbers(op, clip_low, clip_high, dual_clip)
    candidate_low, candidate_high = low, high
    if candidate_clip_low is not None:
        candidate_low = checked_number(op, "candidate_clip_low", candidate_clip_low)
    if candidate_clip_high is not None:
        candidate_high = checked_number(op, "candidate_clip_high", candidate_clip_high)
    return Options(
        checked_number(op, "alpha", alpha), low, high, candidate_low, candidate_high, dual, reduction,
        candidate_reduction,
    )  # fmt: skip


def checked_objective(
    op: str, alpha: float, clip_low: float, clip_high: float, candidate_clip_low: float,
    candidate_clip_high: float, dual_clip: float | None, reduction: str, candidate_reduction: str,
) -> Objective:  # fmt: skip
    """Raise ValueError, as `op`, for numbers out of range."""
    check_finite(op, "alpha", alpha)
    check_clips(op, clip_low, clip_high, dual_clip)
    check_clips(op, candidate_clip_low, candidate_clip_high, dual_clip, "candidate_")
    clips = (clip_low, clip_high, candidate_clip_low, candidate_clip_high)
    return Objective(alpha, clips, dual_clip, reduction, candidate_reduction)


def named_metrics(metrics: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (sum, count)} of (len(DISTRL_METRICS), 2)."""
    pairs = metrics.detach().unbind()
    return {name: (pair[0], pair[1]) for name, pair in zip(DISTRL_METRICS, pairs, strict=True)}


class Evaluated(NamedTuple):
    """Of some rows; over blocks of rows the first four add up."""

    loss: Tensor  # ()
    token_loss: Tensor  # ()
    candidate_loss: Tensor  # ()
    metrics: Tensor  # (len(DISTRL_METRICS), 2)
    dlogprobs: Tensor  # (n, 1 + K), of loss


def batch_divisors(batch: LossInputs, objective: Objective) -> Divisors:
    """The caller's denominators or, where there are none, the batch's own B, N or sum of pi_old. No sync."""
    N, B = batch.old_logprobs.shape[0], batch.cu_seqlens.shape[0] - 1
    counts: dict[str, float | Tensor] = {"sequence_mean": float(max(B, 1)), "token_mean": float(max(N, 1))}
    if objective.candidate_reduction == "old_prob_mean" and batch.candidate_denominator is None:
        counts["old_prob_mean"] = old_probs(batch).sum()
    tokens, candidates = batch.token_denominator, batch.candidate_denominator
    return Divisors(
        counts[objective.reduction] if tokens is None else tokens,
        counts[objective.candidate_reduction] if candidates is None else candidates,
    )


def old_probs(batch: LossInputs) -> Tensor:
    """(N, K) pi_old, 0 at unused slots."""
    return normal_probs(batch.old_candidate_logprobs)


def normal_probs(logprobs: Tensor) -> Tensor:
    """exp, but 0 below the smallest normal number: there a ratio exp(new - old) may be infinite."""
    prob = logprobs.exp()
    return torch.where(prob < torch.finfo(prob.dtype).tiny, 0.0, prob)  # NaN stays NaN


def row_weights(
    batch: LossInputs, reduction: str, divisor: float | Tensor, row0: int, like: Tensor
) -> Tensor:
    """(n,) the factor of each row's loss in its branch; row0: the first row's place in the whole batch."""
    n = batch.old_logprobs.shape[0]
    if reduction == "old_prob_mean":
        total = torch.as_tensor(divisor, dtype=like.dtype, device=like.device)
        return torch.where(total != 0, 1 / total, 0.0).expand(n)
    if reduction == "token_mean":
        return like.new_ones(n) / divisor
    at = torch.arange(row0, row0 + n, dtype=torch.int32, device=like.device)
    segment = torch.searchsorted(batch.cu_seqlens, at, right=True) - 1
    return 1 / lengths(batch.cu_seqlens).to(like.dtype)[segment] / divisor


def branch_weights(
    batch: LossInputs, objective: Objective, divisors: Divisors, row0: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,), (n, K) the factors of every element's loss in its branch: reduction, and pi_old of candidates."""
    old_prob = old_probs(batch)
    rows = row_weights(batch, objective.candidate_reduction, divisors.candidates, row0, like)
    return (
        row_weights(batch, objective.reduction, divisors.tokens, row0, like),
        torch.where(old_prob != 0, old_prob * rows[:, None], 0.0),
    )


def distrl_objective_reference(
    logprobs: Tensor, batch: LossInputs, objective: Objective, divisors: Divisors, row0: int = 0
) -> Evaluated:
    """In plain PyTorch; loss is differentiable as well. batch: the rows of logprobs, the first being row0."""
    clips, dual_clip = objective.clips, objective.dual_clip
    new, new_candidates = logprobs[:, 0], logprobs[:, 1:]
    old, old_candidates = batch.old_logprobs, batch.old_candidate_logprobs
    old_prob = old_probs(batch)  # (n, K), 0 at unused slots
    weight, candidate_weight = branch_weights(batch, objective, divisors, row0, logprobs)

    loss, clipped, dual, derivative = clipped_surrogate_reference(
        new, old, batch.advantages, clips[0], clips[1], dual_clip
    )
    candidate_loss, candidate_clipped, candidate_dual, candidate_derivative = clipped_surrogate_reference(
        new_candidates, old_candidates, batch.candidate_advantages, clips[2], clips[3], dual_clip
    )
    counts = candidate_weight != 0  # a pi_old of 0 must not meet its infinite rho; a NaN comes through
    candidate_loss = torch.where(counts, candidate_weight * candidate_loss, 0.0)
    candidate_derivative = torch.where(counts, candidate_weight * candidate_derivative, 0.0)
    token_total, candidate_total = (weight * loss).sum(), candidate_loss.sum()

    used, used_candidates = old != -math.inf, old_candidates != -math.inf
    num_tokens, num_candidates = used.sum(), used_candidates.sum()
    num_rows = torch.full_like(num_tokens, len(logprobs))
    kl = torch.where(used, old - new, 0.0).sum()
    candidate_kl = torch.where(old_prob != 0, old_prob * (old_candidates - new_candidates), 0.0).sum()
    pairs = (
        (clipped.sum(), num_tokens), (dual.sum(), num_tokens), (kl, num_tokens),
        (candidate_clipped.sum(), num_candidates), (candidate_dual.sum(), num_candidates),
        (candidate_kl, num_candidates), (num_candidates, num_rows), (old_prob.sum(), num_rows),
    )  # fmt: skip
    return Evaluated(
        token_total + objective.alpha * candidate_total, token_total, candidate_total,
        torch.stack([torch.stack([x.to(logprobs.dtype) for x in pair]) for pair in pairs]),
        torch.cat([(weight * derivative)[:, None], objective.alpha * candidate_derivative], 1),
    )  # fmt: skip


if backend.HAS_TRITON:
    TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

    @triton.jit
    def _inverse_length(
        row,  # (BLOCK,) int64
        cu_seqlens_ptr,  # (B+1,)
        B,  # scalar
        num_halvings,  # scalar: B.bit_length()
    ):
        """(BLOCK,) 1 / tokens of the sequence that owns each row."""
        low = tl.zeros_like(row)  # (BLOCK,) cu_seqlens[low] <= row < cu_seqlens[high]
        high = low + B  # (BLOCK,)
        for _ in range(num_halvings):
            middle = (low + high) // 2  # (BLOCK,)
            left = tl.load(cu_seqlens_ptr + middle) <= row  # (BLOCK,)
            low = tl.where(left, middle, low)  # (BLOCK,)
            high = tl.where(left, high, middle)  # (BLOCK,)
        first = tl.load(cu_seqlens_ptr + low).to(tl.int64)  # (BLOCK,) as wide as unchecked edges
        last = tl.load(cu_seqlens_ptr + tl.minimum(low + 1, B)).to(tl.int64)  # (BLOCK,)
        return 1.0 / (last - first).to(tl.float32)

    @triton.jit
    def _pick(
        x,  # (16,)
        i,  # scalar
    ):
        return tl.sum(tl.where(tl.arange(0, 16) == i, x, 0.0), 0)

    @triton.jit(do_not_specialize=["B", "num_halvings", "row0", "num_rows"])
    def _distrl_objective_kernel(
        logprobs_ptr,  # (n, 1 + K)
        old_logprobs_ptr,  # (n,)
        old_candidate_logprobs_ptr,  # (n, K)
        advantages_ptr,  # (n,)
        candidate_advantages_ptr,  # (n, K)
        cu_seqlens_ptr,  # (B+1,)
        token_divisor_ptr,  # () or unread
        candidate_divisor_ptr,  # () or unread
        dlogprobs_ptr,  # (n, 1 + K)
        partial_ptr,  # (num_blocks, 16)
        B,  # scalars from here on
        num_halvings,
        row0,
        num_rows,
        K,
        token_divisor,
        candidate_divisor,
        token_low,
        token_high,
        candidate_low,
        candidate_high,
        dual,
        alpha,
        TOKEN_REDUCTION: tl.constexpr,
        CANDIDATE_REDUCTION: tl.constexpr,
        TOKEN_POINTER: tl.constexpr,
        CANDIDATE_POINTER: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if TOKEN_POINTER:
            token_divisor = tl.load(token_divisor_ptr)
        if CANDIDATE_POINTER:
            candidate_divisor = tl.load(candidate_divisor_ptr)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) in (n, 1 + K)
        row = at // (K + 1)  # (BLOCK,)
        k = at - row * (K + 1) - 1  # (BLOCK,) -1: the sampled token
        valid = row < num_rows  # (BLOCK,)
        is_token = valid & (k < 0)  # (BLOCK,)
        is_candidate = valid & (k >= 0)  # (BLOCK,)
        slot = row * K + k  # (BLOCK,) in (n, K)
        none = float("-inf")
        token_old = tl.load(old_logprobs_ptr + row, mask=is_token, other=none)  # (BLOCK,)
        candidate_old = tl.load(old_candidate_logprobs_ptr + slot, mask=is_candidate, other=none)  # (BLOCK,)
        old = tl.where(is_token, token_old, candidate_old)  # (BLOCK,) -inf: unused
        used_token = is_token & (old != none)  # (BLOCK,)
        used_candidate = is_candidate & (old != none)  # (BLOCK,)
        token_advantage = tl.load(advantages_ptr + row, mask=used_token, other=0.0)  # (BLOCK,)
        advantage = tl.load(candidate_advantages_ptr + slot, mask=used_candidate, other=0.0)  # (BLOCK,)
        advantage = tl.where(used_token, token_advantage, advantage)  # (BLOCK,)
        new = tl.load(logprobs_ptr + at, mask=used_token | used_candidate, other=0.0)  # (BLOCK,)

        low = tl.where(is_token, token_low, candidate_low)  # (BLOCK,)
        high = tl.where(is_token, token_high, candidate_high)  # (BLOCK,)
        loss, derivative, clipped, dual_clipped = surrogate(
            new, old, advantage, low, high, dual
        )  # (BLOCK,) each
        prob = tl.where(used_candidate, tl.exp(old), 0.0)  # (BLOCK,)
        prob = tl.where(prob < TINY, 0.0, prob)  # (BLOCK,) there rho may be infinite; NaN stays NaN
        prob = tl.where(used_token, 1.0, prob)  # (BLOCK,)
        inverse_length = 1.0
        if TOKEN_REDUCTION == "sequence_mean" or CANDIDATE_REDUCTION == "sequence_mean":
            inverse_length = _inverse_length(row0 + row, cu_seqlens_ptr, B, num_halvings)  # (BLOCK,)
        token_factor = 1.0 / token_divisor
        if TOKEN_REDUCTION == "sequence_mean":
            token_factor = inverse_length / token_divisor  # (BLOCK,)
        candidate_factor = 1.0 / candidate_divisor
        if CANDIDATE_REDUCTION == "sequence_mean":
            candidate_factor = inverse_length / candidate_divisor  # (BLOCK,)
        if CANDIDATE_REDUCTION == "old_prob_mean":
            candidate_factor = tl.where(candidate_divisor == 0.0, 0.0, candidate_factor)
        weight = prob * tl.where(is_token, token_factor, candidate_factor)  # (BLOCK,)
        counts = (prob != 0.0) & (weight != 0.0)  # (BLOCK,) NaN counts; 0 must not meet its infinite rho
        loss = tl.where(counts, weight * loss, 0.0)  # (BLOCK,)
        derivative = tl.where(counts, weight * derivative, 0.0)  # (BLOCK,)
        kl = tl.where(prob != 0.0, prob * (old - new), 0.0)  # (BLOCK,)
        tl.store(dlogprobs_ptr + at, tl.where(used_candidate, alpha * derivative, derivative), mask=valid)

        sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 16
        tl.store(sums_ptr + 0, tl.sum(tl.where(used_token, loss, 0.0), 0))
        tl.store(sums_ptr + 1, tl.sum((used_token & clipped).to(tl.float32), 0))
        tl.store(sums_ptr + 2, tl.sum((used_token & dual_clipped).to(tl.float32), 0))
        tl.store(sums_ptr + 3, tl.sum(tl.where(used_token, kl, 0.0), 0))
        tl.store(sums_ptr + 4, tl.sum(used_token.to(tl.float32), 0))
        tl.store(sums_ptr + 5, tl.sum(tl.where(used_candidate, loss, 0.0), 0))
        tl.store(sums_ptr + 6, tl.sum((used_candidate & clipped).to(tl.float32), 0))
        tl.store(sums_ptr + 7, tl.sum((used_candidate & dual_clipped).to(tl.float32), 0))
        tl.store(sums_ptr + 8, tl.sum(tl.where(used_candidate, kl, 0.0), 0))
        tl.store(sums_ptr + 9, tl.sum(used_candidate.to(tl.float32), 0))
        tl.store(sums_ptr + 10, tl.sum(tl.where(used_candidate, prob, 0.0), 0))

    @triton.jit(do_not_specialize=["num_blocks", "num_rows"])
    def _finish_objective_kernel(
        partial_ptr,  # (num_blocks, 16)
        loss_ptr,  # ()
        token_loss_ptr,  # ()
        candidate_loss_ptr,  # ()
        metrics_ptr,  # (8, 2)
        num_blocks,  # scalar
        num_rows,  # scalar
        alpha,  # scalar
        BLOCK: tl.constexpr,
    ):
        column = tl.arange(0, 16)  # (16,)
        total = tl.zeros((BLOCK, 16), tl.float64)  # (BLOCK, 16)
        for first in range(0, num_blocks, BLOCK):
            block = first + tl.arange(0, BLOCK)  # (BLOCK,)
            mask = (block < num_blocks)[:, None] & (column < 11)[None, :]  # (BLOCK, 16)
            total += tl.load(partial_ptr + block[:, None] * 16 + column[None, :], mask=mask, other=0.0)
        sums = tl.sum(total, 0)  # (16,)
        token_loss, candidate_loss = _pick(sums, 0), _pick(sums, 5)
        tl.store(loss_ptr, token_loss + alpha * candidate_loss)
        tl.store(token_loss_ptr, token_loss)
        tl.store(candidate_loss_ptr, candidate_loss)
        num_tokens, num_candidates = _pick(sums, 4), _pick(sums, 9)
        for i in tl.static_range(3):
            tl.store(metrics_ptr + 2 * i, _pick(sums, 1 + i))
            tl.store(metrics_ptr + 2 * i + 1, num_tokens)
            tl.store(metrics_ptr + 2 * i + 6, _pick(sums, 6 + i))
            tl.store(metrics_ptr + 2 * i + 7, num_candidates)
        tl.store(metrics_ptr + 12, num_candidates)
        tl.store(metrics_ptr + 13, num_rows)
        tl.store(metrics_ptr + 14, _pick(sums, 10))
        tl.store(metrics_ptr + 15, num_rows)


def _empty(logprobs: Tensor) -> Evaluated:
    new = logprobs.new_empty
    return Evaluated(new(()), new(()), new(()), new(len(DISTRL_METRICS), 2), torch.empty_like(logprobs))


def _triton(
    logprobs: Tensor, batch: LossInputs, objective: Objective, divisors: Divisors, row0: int = 0
) -> Evaluated:
    out, (n, columns), B = _empty(logprobs), logprobs.shape, batch.cu_seqlens.shape[0] - 1
    num_blocks = triton.cdiv(n * columns, BLOCK)
    partial = logprobs.new_empty(num_blocks, 16)
    pointers = [x if isinstance(x, Tensor) else None for x in divisors]
    numbers = [0.0 if isinstance(x, Tensor) else x for x in divisors]
    low, high, candidate_low, candidate_high = objective.clips
    bounds = clip_bounds(low, high, objective.dual_clip)
    candidate_bounds = clip_bounds(candidate_low, candidate_high, objective.dual_clip)
    with torch.cuda.device_of(logprobs):
        if num_blocks:
            _distrl_objective_kernel[(num_blocks,)](
                logprobs, *batch[:5], *(partial if x is None else x for x in pointers), out.dlogprobs,
                partial, B, B.bit_length(), row0, n, columns - 1, *numbers, *bounds[:2], *candidate_bounds,
                objective.alpha,
                TOKEN_REDUCTION=objective.reduction, CANDIDATE_REDUCTION=objective.candidate_reduction,
                TOKEN_POINTER=pointers[0] is not None, CANDIDATE_POINTER=pointers[1] is not None, BLOCK=BLOCK,
            )  # fmt: skip
        _finish_objective_kernel[(1,)](partial, *out[:4], num_blocks, n, objective.alpha, BLOCK=128)
    return out


def _cpp(
    logprobs: Tensor, batch: LossInputs, objective: Objective, divisors: Divisors, row0: int = 0
) -> Evaluated:
    out = _empty(logprobs)
    num_blocks = -(-len(logprobs) // BLOCK_ROWS)
    partial = torch.empty((num_blocks, SUMS), dtype=torch.float64)
    struct, clips, dual_clip = backend.native_struct, objective.clips, objective.dual_clip
    rows = struct(
        "PolicyRows", logprobs=logprobs, B=batch.cu_seqlens.shape[0] - 1, row0=row0,
        n=len(logprobs), K=logprobs.shape[1] - 1, **dict(zip(batch._fields[:5], batch[:5], strict=True)),
    )  # fmt: skip
    branches = [
        struct(
            "Branch", reduction=CANDIDATE_REDUCTIONS.index(kind), divisor=float(divisor),
            clips=native_clips(low, high, dual_clip),
        )
        for kind, divisor, low, high in (
            (objective.reduction, divisors.tokens, clips[0], clips[1]),
            (objective.candidate_reduction, divisors.candidates, clips[2], clips[3]),
        )
    ]  # fmt: skip
    outputs = struct("ObjectiveOutputs", **out._asdict())
    backend.native_call(
        "distrl_objective_cpu", rows, *branches, objective.alpha, outputs, partial, BLOCK_ROWS
    )
    return out


# each evaluates some rows: (logprobs, their batch, objective, the whole batch's divisors, row0)
EVALUATE = {"triton": _triton, "cpp": _cpp, "torch": distrl_objective_reference}


# ------------------------------------------------------------------------------------------- the op

OP = "distrl_loss"
INSTEAD = "eager PyTorch on the log-probs"


def _forward_of(impl: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(logprobs: Tensor, batch: LossInputs, objective: Objective) -> tuple[Tensor, ...]:
        return tuple(EVALUATE[impl](logprobs, batch, objective, batch_divisors(batch, objective)))

    return run


def _scaled(dloss: Tensor, saved: Sequence[Tensor]) -> Tensor:
    return dloss * saved[0]


def _saved(logprobs: Tensor) -> Sequence[tuple[int, ...]]:
    """dlogprobs for an upstream of 1."""
    return [tuple(logprobs.shape)]


# forward -> (loss, token_loss, candidate_loss, metrics, *saved); backward(dloss, saved) -> (N, 1 + K)
IMPLS = {impl: backend.Impl(_forward_of(impl), _scaled, _saved) for impl in EVALUATE}


TAKES_BWD = {"dloss": "float", "logprobs": "float N K+1"}


def _bwd_fake(logprobs: Tensor) -> Tensor:
    return torch.empty_like(logprobs, memory_format=torch.contiguous_format)


def _bwd_saved(logprobs: Tensor, impl: str) -> list[Sequence[tuple[int, ...]]]:
    return [IMPLS[impl].saved(logprobs)]


@register(fake=_bwd_fake, gradient_of=OP, instead=INSTEAD, takes=TAKES_BWD, saved=_bwd_saved)
def _distrl_loss_bwd(dloss: Tensor, logprobs: Tensor, impl: str, saved: list[Tensor]) -> Tensor:
    """logprobs only tells autograd what the gradient depends on."""
    return IMPLS[impl].backward(dloss, saved)


def _fake(logprobs: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    new = logprobs.new_empty
    saved = [new(shape) for shape in IMPLS[impl].saved(logprobs)]
    return new(()), new(()), new(()), new(len(DISTRL_METRICS), 2), saved


def _backward(dloss: Tensor, logprobs: Tensor, impl: str, saved: list[Tensor]) -> dict[str, Tensor]:
    return {"logprobs": _distrl_loss_bwd(dloss, logprobs, impl, saved)}


TAKES = {
    "logprobs": "float N K+1", "old_logprobs": "float N", "old_candidate_logprobs": "float N K",
    "advantages": "float N",
    "candidate_advantages": "float N K", "cu_seqlens": "edges B+1", "token_denominator": "float",
    "candidate_denominator": "float",
}  # fmt: skip


@register(fake=_fake, returns=(*DistRLLoss._fields, "saved"), backward=_backward, takes=TAKES)
def _distrl_loss(
    logprobs: Tensor, old_logprobs: Tensor, old_candidate_logprobs: Tensor, advantages: Tensor,
    candidate_advantages: Tensor, cu_seqlens: Tensor, token_denominator: Tensor | None,
    candidate_denominator: Tensor | None, alpha: Number, clip_low: Number,
    clip_high: Number, candidate_clip_low: Number, candidate_clip_high: Number, dual_clip: Number | None,
    reduction: str, candidate_reduction: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """logprobs: (N, 1 + K), the sampled token first."""
    tensors = (
        old_logprobs, old_candidate_logprobs, advantages, candidate_advantages, cu_seqlens,
        token_denominator, candidate_denominator,
    )  # fmt: skip
    batch = LossInputs._make(None if x is None else x.contiguous() for x in tensors)
    if backend.checks_values(logprobs):
        check_batch(OP, batch)
    objective = checked_objective(
        OP,
        alpha, clip_low, clip_high, candidate_clip_low, candidate_clip_high, dual_clip, reduction,
        candidate_reduction,
    )  # fmt: skip
    loss, token_loss, candidate_loss, metrics, *saved = IMPLS[impl].forward(
        logprobs.contiguous(), batch, objective
    )
    return loss, token_loss, candidate_loss, metrics, saved


def distrl_loss(
    logprobs: Tensor,
    candidate_logprobs: Tensor,
    old_logprobs: Tensor,
    old_candidate_logprobs: Tensor,
    advantages: Tensor,
    candidate_advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.28,
    candidate_clip_low: float | Tensor | None = None,
    candidate_clip_high: float | Tensor | None = None,
    dual_clip: float | Tensor | None = None,
    reduction: str = "sequence_mean",
    candidate_reduction: str | None = None,
    token_denominator: float | Tensor | None = None,
    candidate_denominator: float | Tensor | None = None,
    impl: str | None = None,
) -> DistRLLoss:
    """The DistRL policy loss L_token + alpha * L_candidates (Eq. 11, 12, 14) from log-probs.

    Equal to: clipped_surrogate of each branch, candidates weighted by pi_old = exp(old_candidate_logprobs),
        reduced as below; the same as `linear_distrl_loss` on the log-probs of its tokens.

    Args:
        logprobs: (N,) float, nats, of the sampled tokens under the policy.
        candidate_logprobs: (N, K) likewise, of the candidates.
        old_logprobs, old_candidate_logprobs: (N,), (N, K) float, under the behaviour policy; -inf marks an
            unused element, which adds no loss, gradient or count, whatever its new log-prob. No gradient.
        advantages, candidate_advantages: (N,), (N, K) float. No gradient.
        cu_seqlens: (B+1,) int32 sequence edges, from 0 to N; an empty sequence counts in B and adds 0.
        alpha, clip_low, clip_high, candidate_clip_low, candidate_clip_high, dual_clip, reduction,
            candidate_reduction, token_denominator, candidate_denominator: as in `linear_distrl_loss`.
        impl: None | "torch" | "cpp" | "triton", see `backends()`.

    Returns: DistRLLoss, fp32 (fp64 where logprobs or candidate_logprobs are). Only `loss` is differentiable,
        once, in logprobs and candidate_logprobs.
    Raises: ValueError on wrong shapes, dtypes, devices, options, denominators, or cu_seqlens that do not rise
        from 0 to N (values of GPU tensors under `set_checks(True)`). RuntimeError on double backward.
    """
    check_tensors(OP, logprobs=logprobs, candidate_logprobs=candidate_logprobs)
    if logprobs.dim() != 1 or candidate_logprobs.dim() != 2 or len(candidate_logprobs) != len(logprobs):
        raise ValueError(
            f"{OP}: logprobs must be (N,) and candidate_logprobs (N, K), got {tuple(logprobs.shape)} and "
            f"{tuple(candidate_logprobs.shape)}"
        )
    for name, x in (("logprobs", logprobs), ("candidate_logprobs", candidate_logprobs)):
        if not x.is_floating_point() or x.device != logprobs.device:
            raise ValueError(
                f"{OP}: {name} must be floating point on one device, got {x.dtype} on {x.device}"
            )
    check_cu_seqlens_shape(OP, cu_seqlens, logprobs)
    wide = torch.float64 if torch.float64 in (logprobs.dtype, candidate_logprobs.dtype) else torch.float32
    floats = checked_floats(
        OP, logprobs, wide, logprobs.shape, candidate_logprobs.shape, old_logprobs=old_logprobs,
        old_candidate_logprobs=old_candidate_logprobs, advantages=advantages,
        candidate_advantages=candidate_advantages,
    )  # fmt: skip
    options = checked_options(
        OP, alpha, clip_low, clip_high, candidate_clip_low, candidate_clip_high, dual_clip, reduction,
        candidate_reduction,
    )  # fmt: skip
    columns = torch.cat([logprobs.to(wide)[:, None], candidate_logprobs.to(wide)], 1)  # (N, 1 + K)
    loss, token_loss, candidate_loss, metrics, _ = _distrl_loss(
        columns, *floats, cu_seqlens,
        denominator_tensor(OP, "token_denominator", token_denominator, floats[0]),
        denominator_tensor(OP, "candidate_denominator", candidate_denominator, floats[0]),
        *options, backend.choose(OP, IMPLS, impl, columns),
    )  # fmt: skip
    return DistRLLoss(loss, token_loss, candidate_loss, named_metrics(metrics))
