"""clipped_surrogate: the clipped policy-gradient loss per element (PPO; Eq. 11, 12), optional dual clip.

    rho  = exp(logprobs - old_logprobs)
    loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high));  where A < 0 also min(loss, -dual_clip A)
    d loss / d logprobs = -A rho where neither clip binds, else 0

An element whose old log-prob is -inf is unused, and one with A = 0 has nothing to say: loss 0, gradient 0,
clipped False; their inputs are replaced before the exp. Elementwise, any shape: the forward reads three
tensors once and emits the derivative, the backward is one product; eager PyTorch makes about twelve passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .inputs import check_tensors, checked_number
from .registration import Number, register

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

BLOCK = 1024


class ClippedSurrogate(NamedTuple):
    """loss (to be minimised; fp32, fp64 for fp64); clipped: the clipped branch is strictly larger;
    dual_clipped: A < 0 and the dual clip binds (both bool). Each shaped like logprobs."""

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def clipped_surrogate_reference(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
    clip_low: float, clip_high: float, dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, clipped, dual_clipped, derivative by logprobs) in plain PyTorch; loss is differentiable."""
    counted = (old_logprobs != -math.inf) & (advantages != 0)
    advantages = torch.where(counted, advantages, 0.0)
    rho = torch.where(counted, logprobs - old_logprobs, 0.0).exp()
    unclipped = -advantages * rho
    bounded = -advantages * rho.clamp(1 - clip_low, 1 + clip_high)
    loss, clipped = torch.maximum(unclipped, bounded), bounded > unclipped
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual_clipped, ceiling, loss)
    return loss, clipped, dual_clipped, torch.where(clipped | dual_clipped, 0.0, unclipped).detach()


def _torch_backward(dloss: Tensor, derivative: Tensor) -> Tensor:
    return torch.where(
        derivative != 0, dloss * derivative, 0.0
    )  # selects: a NaN upstream of an unused element stays out


if backend.HAS_TRITON:

    @triton.jit
    def surrogate(
        logprobs,  # (BLOCK,)
        old_logprobs,  # (BLOCK,)
        advantages,  # (BLOCK,)
        low,  # scalar, 1 - clip_low
        high,  # scalar, 1 + clip_high
        dual,  # scalar, inf: no dual clip
    ):
        """loss, derivative, clipped, dual_clipped, each (BLOCK,); tl.maximum would lose a NaN."""
        counted = (old_logprobs != float("-inf")) & (advantages != 0.0)  # (BLOCK,)
        a = tl.where(counted, -advantages, 0.0)  # (BLOCK,)
        rho = tl.exp(tl.where(counted, logprobs - old_logprobs, 0.0))  # (BLOCK,)
        within = tl.where(rho < low, low, tl.where(rho > high, high, rho))  # (BLOCK,)
        unclipped = a * rho  # (BLOCK,)
        bounded = a * within  # (BLOCK,)
        clipped = bounded > unclipped  # (BLOCK,)
        loss = tl.where(clipped, bounded, unclipped)  # (BLOCK,)
        ceiling = tl.where(a > 0.0, a * dual, float("inf"))  # (BLOCK,)
        dual_clipped = loss > ceiling  # (BLOCK,)
        derivative = tl.where(clipped | dual_clipped, 0.0, unclipped)  # (BLOCK,)
        return tl.where(dual_clipped, ceiling, loss), derivative, clipped, dual_clipped

    @triton.jit
    def _clipped_surrogate_fwd_kernel(
        logprobs_ptr,  # (count,)
        old_logprobs_ptr,  # (count,)
        advantages_ptr,  # (count,)
        loss_ptr,  # (count,)
        clipped_ptr,  # (count,) bool
        dual_clipped_ptr,  # (count,) bool
        derivative_ptr,  # (count,)
        count,  # scalar
        low,  # scalar
        high,  # scalar
        dual,  # scalar
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        valid = at < count  # (BLOCK,)
        logprobs = tl.load(logprobs_ptr + at, mask=valid, other=0.0)  # (BLOCK,)
        old_logprobs = tl.load(old_logprobs_ptr + at, mask=valid, other=0.0)  # (BLOCK,)
        advantages = tl.load(advantages_ptr + at, mask=valid, other=0.0)  # (BLOCK,)
        loss, derivative, clipped, dual_clipped = surrogate(
            logprobs, old_logprobs, advantages, low, high, dual
        )
        tl.store(loss_ptr + at, loss, mask=valid)
        tl.store(clipped_ptr + at, clipped, mask=valid)
        tl.store(dual_clipped_ptr + at, dual_clipped, mask=valid)
        tl.store(derivative_ptr + at, derivative, mask=valid)

    @triton.jit
    def _clipped_surrogate_bwd_kernel(
        dloss_ptr,  # (count,)
        derivative_ptr,  # (count,)
        dlogprobs_ptr,  # (count,)
        count,  # scalar
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        valid = at < count  # (BLOCK,)
        dloss = tl.load(dloss_ptr + at, mask=valid, other=0.0)  # (BLOCK,)
        derivative = tl.load(derivative_ptr + at, mask=valid, other=0.0)  # (BLOCK,)
        tl.store(dlogprobs_ptr + at, tl.where(derivative != 0.0, dloss * derivative, 0.0), mask=valid)


def clip_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> tuple[float, float, float]:
    """The interval of rho, and the multiple of |A| that bounds a loss with A < 0."""
    return 1 - clip_low, 1 + clip_high, math.inf if dual_clip is None else dual_clip


def native_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> Any:
    """csrc's Clips."""
    low, high, dual = clip_bounds(clip_low, clip_high, dual_clip)
    return backend.native_struct("Clips", low=low, high=high, dual=dual)


def _empty_outputs(logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clipped, dual_clipped = (torch.empty_like(logprobs, dtype=torch.bool) for _ in range(2))
    return torch.empty_like(logprobs), clipped, dual_clipped, torch.empty_like(logprobs)


def _triton_forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
    clip_low: float, clip_high: float, dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs, count = _empty_outputs(logprobs), logprobs.numel()
    if count:
        with torch.cuda.device_of(logprobs):
            _clipped_surrogate_fwd_kernel[(triton.cdiv(count, BLOCK),)](
                logprobs, old_logprobs, advantages, *outputs, count,
                *clip_bounds(clip_low, clip_high, dual_clip), BLOCK=BLOCK,
            )  # fmt: skip
    return outputs


def _triton_backward(dloss: Tensor, derivative: Tensor) -> Tensor:
    dlogprobs, count = torch.empty_like(derivative), derivative.numel()
    if count:
        with torch.cuda.device_of(derivative):
            _clipped_surrogate_bwd_kernel[(triton.cdiv(count, BLOCK),)](
                dloss, derivative, dlogprobs, count, BLOCK=BLOCK
            )
    return dlogprobs


def _native_forward(device: str) -> Any:
    def run(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
        clip_low: float, clip_high: float, dual_clip: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        outputs = _empty_outputs(logprobs)
        backend.native_call(
            f"clipped_surrogate_fwd_{device}", logprobs, old_logprobs, advantages, logprobs.numel(),
            native_clips(clip_low, clip_high, dual_clip), *outputs,
        )  # fmt: skip
        return outputs

    return run


def _native_backward(device: str) -> Any:
    def run(dloss: Tensor, derivative: Tensor) -> Tensor:
        dlogprobs = torch.empty_like(derivative)
        backend.native_call(
            f"clipped_surrogate_bwd_{device}", dloss, derivative, dlogprobs, derivative.numel()
        )
        return dlogprobs

    return run


def _saved(shape: Sequence[int]) -> Sequence[tuple[int, ...]]:
    """The derivative of every element."""
    return (tuple(shape),)


# forward -> (loss, clipped, dual_clipped, derivative); backward(dloss, derivative)
IMPLS = {
    "cuda": backend.Impl(_native_forward("cuda"), _native_backward("cuda"), _saved),
    "triton": backend.Impl(_triton_forward, _triton_backward, _saved),
    "cpp": backend.Impl(_native_forward("cpu"), _native_backward("cpu"), _saved),
    "torch": backend.Impl(clipped_surrogate_reference, _torch_backward, _saved),
}


def _bwd_fake(logprobs: Tensor) -> Tensor:
    return torch.empty_like(logprobs, memory_format=torch.contiguous_format)


TAKES_BWD = {"dloss": "float =", "logprobs": "float ="}


def _bwd_saved(logprobs: Tensor, impl: str) -> list[Sequence[tuple[int, ...]]]:
    return [IMPLS[impl].saved(logprobs.shape)]


@register(
    fake=_bwd_fake, gradient_of="clipped_surrogate", instead="torch.clamp and torch.maximum",
    takes=TAKES_BWD, saved=_bwd_saved,
)  # fmt: skip
def _clipped_surrogate_bwd(dloss: Tensor, logprobs: Tensor, impl: str, saved: list[Tensor]) -> Tensor:
    """logprobs only tells autograd what the gradient depends on."""
    return IMPLS[impl].backward(dloss.contiguous(), *saved)


def _fake(logprobs: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return logprobs.new_empty(shape, dtype=dtype)

    shape, dtype = logprobs.shape, logprobs.dtype
    saved = [new(x, dtype) for x in IMPLS[impl].saved(shape)]
    return new(shape, dtype), new(shape, torch.bool), new(shape, torch.bool), saved


def _backward(dloss: Tensor, logprobs: Tensor, impl: str, saved: list[Tensor]) -> dict[str, Tensor]:
    return {"logprobs": _clipped_surrogate_bwd(dloss, logprobs, impl, saved)}


TAKES = dict.fromkeys(("logprobs", "old_logprobs", "advantages"), "float =")


@register(fake=_fake, returns=(*ClippedSurrogate._fields, "saved"), backward=_backward, takes=TAKES)
def _clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
    clip_low: Number, clip_high: Number, dual_clip: Number | None, impl: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    check_clips("clipped_surrogate", clip_low, clip_high, dual_clip)
    loss, clipped, dual_clipped, *saved = IMPLS[impl].forward(
        logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous(),
        clip_low, clip_high, dual_clip,
    )  # fmt: skip
    return loss, clipped, dual_clipped, saved


def clip_numbers(
    op: str, clip_low: float | Tensor, clip_high: float | Tensor, dual_clip: float | Tensor | None
) -> tuple[Number, Number, Number | None]:
    """The clips as the public functions take them, each as `checked_number` has it."""
    return (
        checked_number(op, "clip_low", clip_low), checked_number(op, "clip_high", clip_high),
        None if dual_clip is None else checked_number(op, "dual_clip", dual_clip),
    )  # fmt: skip


def check_clips(
    op: str, clip_low: float, clip_high: float, dual_clip: float | None, prefix: str = ""
) -> None:
    """Raise ValueError unless 0 <= clip_low <= 1, 0 <= clip_high and dual_clip > 1, all finite."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"{op}: {prefix}clip_low must lie in [0, 1], got {clip_low}")
    if not 0 <= clip_high < math.inf:
        raise ValueError(f"{op}: {prefix}clip_high must be finite and >= 0, got {clip_high}")
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(f"{op}: dual_clip must be None or finite and > 1, got {dual_clip}")


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.28,
    dual_clip: float | Tensor | None = None,
    impl: str | None = None,
) -> ClippedSurrogate:
    """Clipped surrogate loss per element, max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)); Eq. 11, 12.

    Args:
        logprobs: any shape, float; log-probs under the policy, natural log. -inf gives rho = 0.
        old_logprobs: same shape; under the behaviour policy, -inf marks an unused element. No gradient.
        advantages: same shape. No gradient.
        clip_low: in [0, 1]; clip_high: >= 0.
        dual_clip: None, or > 1: where A < 0 the loss is at most -dual_clip * A. Each clip may be a 0-d CPU
            tensor.
        impl: None | "torch" | "cpp" | "triton" | "cuda", see `backends()`.

    Returns: ClippedSurrogate of fp32 loss (fp64 for fp64 logprobs). Differentiable once in logprobs.
    Raises: ValueError on differing shapes or devices, non-float inputs, clips out of range, impl.
    RuntimeError on double backward.
    """
    op = "clipped_surrogate"
    check_tensors(op, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    for name, x in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        if x.shape != logprobs.shape:
            raise ValueError(
                f"{op}: {name} must have the shape of logprobs, {tuple(logprobs.shape)}, got {tuple(x.shape)}"
            )
        if x.device != logprobs.device:
            raise ValueError(f"{op}: {name} is on {x.device}, logprobs on {logprobs.device}")
    for name, x in (("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages)):
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    loss, clipped, dual_clipped, _ = _clipped_surrogate(
        logprobs.to(dtype), old_logprobs.detach().to(dtype), advantages.detach().to(dtype),
        *clip_numbers(op, clip_low, clip_high, dual_clip),
        backend.choose(op, IMPLS, impl, logprobs),
    )  # fmt: skip
    return ClippedSurrogate(loss, clipped, dual_clipped)
