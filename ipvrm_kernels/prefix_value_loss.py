"""prefix_value_loss: the IPVRM objective at every prefix of every packed sequence, one scan each way.

    loss_b  = w_b * sum_t omega_t softplus(margin_b - s_b mean_value_t) / sum_t omega_t             Eq. 9
    omega_t = 1 (uniform) | t/T (late, Eq. 17) | 1 - t/T (early, Eq. 18; 1 where T = 1)
    mean_value_t = beta / t * sum_{i<=t} log_ratio_i (Eq. 5),   s_b = 2 outcome_b - 1

d loss / d log_ratio_j = beta * sum_{t>=j} dvalue_t with dvalue_t = d loss / d value_t, a reverse scan. On a
GPU the forward emits dvalue and the backward scans it; on the CPU the forward does both while a sequence is
in cache. Eager PyTorch pads to (B, T) and passes over it ten times.

Shapes: log_ratio (N,), cu_seqlens (B+1,) int32, outcome, margin, weight (B,), loss ().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .inputs import checked_number
from .packing import check_cu_seqlens, check_finite, checked_tokens, lengths, positions, segment_ids
from .registration import Number, is_batched, is_last_backward, register
from .segment_scan import segment_scan_reference  # what a running sum means; no kernel is shared

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from .packing import sequence_rows

OP = "prefix_value_loss"
BLOCK_T = 1024
WEIGHTINGS = ("uniform", "late", "early")  # index = csrc/token_math.h's Weighting
REDUCTIONS = ("sequence_mean", "token_mean")


def prefix_weights(cu_seqlens: Tensor, N: int, weighting: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """omega (N,) of Eq. 9, 17 or 18 and its sum over each sequence (B,), 0 for an empty one."""
    T = lengths(cu_seqlens).to(dtype)  # (B,)
    sums = prefix_weight_sums(T, weighting)
    if weighting == "uniform":
        return torch.ones(N, dtype=dtype, device=cu_seqlens.device), sums
    segment = segment_ids(cu_seqlens, N)
    fraction = positions(cu_seqlens, N, dtype) / T[segment]  # (N,) t/T
    return fraction if weighting == "late" else torch.where((T > 1)[segment], 1 - fraction, 1.0), sums


def prefix_weight_sums(T: Tensor, weighting: str) -> Tensor:
    """sum_t omega_t of sequences of T (B,) tokens, a float tensor; 0 for an empty one."""
    if weighting == "uniform":
        return T
    if weighting == "late":
        return torch.where(T > 0, (T + 1) / 2, 0.0)
    return torch.where(T > 1, (T - 1) / 2, T)


def prefix_value_loss_reference(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor, weight: Tensor,
    beta: float, weighting: str, per_sequence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums (B,2), dvalue (N,)) in plain PyTorch; sums differentiable, dvalue = d sum_b sums[b,0] / d value.

    sums[b] = [w_b sum_t omega_t loss_t, sum_t omega_t], both divided by the latter if `per_sequence`.
    """
    N = log_ratio.shape[0]
    segment = segment_ids(cu_seqlens, N)
    t = positions(cu_seqlens, N, log_ratio.dtype)  # (N,)
    mean_value = beta * segment_scan_reference(log_ratio, cu_seqlens) / t  # (N,)
    omega, omega_sum = prefix_weights(cu_seqlens, N, weighting, log_ratio.dtype)
    sign = (2 * outcome - 1)[segment]  # (N,)
    z = margin[segment] - sign * mean_value  # (N,)
    scale = torch.where(omega_sum > 0, weight / omega_sum, 0.0) if per_sequence else weight  # (B,)
    per_token = scale[segment] * omega * _softplus(z)  # (N,)
    running = F.pad(
        segment_scan_reference(per_token, cu_seqlens), (1, 0)
    )  # (N+1,) tree sums, unlike index_add's
    total = torch.where(omega_sum > 0, running[cu_seqlens[1:].long()], 0.0)  # (B,)
    dvalue = -scale[segment] * omega * sign * torch.sigmoid(z) / t
    counted = (omega_sum > 0).to(omega_sum.dtype) if per_sequence else omega_sum
    return torch.stack([total, counted], dim=1), dvalue.detach()


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(
        z, threshold=200.0
    )  # the default threshold drops exp(-z) above 20, 2e-9 that fp64 can see


def _torch_loss_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None, margin_value: float, divisor: float, beta: float, weighting: str,
    per_sequence: bool, count: bool, needs_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    _check_loss_values(cu_seqlens, log_ratio.shape[0], outcome, margin, weight, denominator)
    margin = torch.full_like(outcome, margin_value) if margin is None else margin
    weight = torch.ones_like(outcome) if weight is None else weight
    sums, dvalue = prefix_value_loss_reference(
        log_ratio, cu_seqlens, outcome, margin, weight, beta, weighting, per_sequence
    )
    scale = 1 / (divisor if denominator is None else denominator)
    loss = scale * sums[:, 0].sum()
    saved = [scale * dvalue] if needs_gradient else []
    if not count:
        return loss, saved
    counted = sums[:, 1].sum()
    return loss / counted, [*saved, counted] if needs_gradient else []


def _torch_loss_bwd(dloss: Tensor, saved: Sequence[Tensor], cu_seqlens: Tensor, beta: float) -> Tensor:
    return beta * _scale(dloss, saved) * segment_scan_reference(saved[0], cu_seqlens, reverse=True)


def _scanned_saved(N: int, count: bool, needs_gradient: bool) -> Sequence[tuple[int, ...]]:
    """dvalue, but for the sum of omega, which only the edges tell: that is `counted`, after it."""
    if not needs_gradient:
        return ()
    return ((N,), ()) if count else ((N,),)


def _scale(dloss: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """() what the reverse scan of saved dvalue is multiplied by, besides beta."""
    return dloss / saved[1] if len(saved) == 2 else dloss


if backend.HAS_TRITON:

    @triton.jit
    def _log1p_unit(u):
        # log(1 + u) for u in [0, 1] as 2 atanh(u / (2 + u)): tl.log(1 + u) loses u below 6e-8
        s = u / (2.0 + u)
        q = s * s
        p = 6.6666667e-2 * q + 7.6923077e-2
        p = p * q + 9.0909091e-2
        p = p * q + 1.11111111e-1
        p = p * q + 1.42857143e-1
        p = p * q + 0.2
        p = p * q + 3.33333333e-1
        return 2.0 * (s + s * q * p)

    @triton.jit(do_not_specialize=["N"])
    def _prefix_value_loss_fwd_kernel(
        log_ratio_ptr,  # (N,)
        cu_seqlens_ptr,  # (B+1,)
        outcome_ptr,  # (B,)
        margin_ptr,  # (B,)
        weight_ptr,  # (B,)
        denominator_ptr,  # ()
        sums_ptr,  # (B,), with COUNT (2, B): of omega, of the loss
        dvalue_ptr,  # (N,)
        margin_value,  # scalar
        inverse_divisor,  # scalar
        N,  # scalar
        beta,  # scalar
        WEIGHTING: tl.constexpr,
        PER_SEQUENCE: tl.constexpr,
        COUNT: tl.constexpr,
        HAS_MARGIN: tl.constexpr,
        HAS_WEIGHT: tl.constexpr,
        HAS_DENOMINATOR: tl.constexpr,
        NEEDS_GRADIENT: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        start, end = sequence_rows(cu_seqlens_ptr, sequence, N)
        length = (end - start).to(tl.float32)
        omega_sum = length
        if WEIGHTING == "late":
            omega_sum = tl.where(end > start, 0.5 * (length + 1.0), 0.0)
        if WEIGHTING == "early":
            omega_sum = tl.where(length > 1.0, 0.5 * (length - 1.0), length)
        sign = 2.0 * tl.load(outcome_ptr + sequence) - 1.0
        margin = margin_value
        if HAS_MARGIN:
            margin = tl.load(margin_ptr + sequence)
        scale = inverse_divisor
        if HAS_DENOMINATOR:
            scale = 1.0 / tl.load(denominator_ptr)
        if HAS_WEIGHT:
            scale = scale * tl.load(weight_ptr + sequence)
        if PER_SEQUENCE:
            scale = scale / tl.maximum(omega_sum, 0.5)  # 0.5: the least sum of a sequence that has tokens
        offsets = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        carry = 0.0
        loss = 0.0
        for block in range(start, end, BLOCK_T):
            rows = block + offsets  # (BLOCK_T,)
            valid = rows < end  # (BLOCK_T,)
            log_ratio = tl.load(log_ratio_ptr + rows, mask=valid, other=0.0)  # (BLOCK_T,)
            t = (rows - start + 1).to(tl.float32)  # (BLOCK_T,)
            z = margin - sign * beta * (tl.cumsum(log_ratio, 0) + carry) / t  # (BLOCK_T,)
            e = tl.exp(-tl.abs(z))  # (BLOCK_T,)
            omega = tl.full((BLOCK_T,), 1.0, tl.float32)
            if WEIGHTING == "late":
                omega = t / length
            if WEIGHTING == "early":
                omega = tl.where(length > 1.0, 1.0 - t / length, 1.0)
            per_token = omega * (tl.maximum(z, 0.0) + _log1p_unit(e))  # (BLOCK_T,)
            loss += tl.sum(tl.where(valid, per_token, 0.0), 0)
            if NEEDS_GRADIENT:
                sigmoid = tl.where(z < 0.0, e, 1.0) / (1.0 + e)  # (BLOCK_T,)
                tl.store(dvalue_ptr + rows, -scale * omega * sign * sigmoid / t, mask=valid)
            carry += tl.sum(log_ratio, 0)
        into = sums_ptr + sequence
        if COUNT:
            tl.store(into, omega_sum)
            into += tl.num_programs(0)
        tl.store(into, scale * loss)

    @triton.jit(do_not_specialize=["N"])
    def _prefix_value_loss_bwd_kernel(
        dvalue_ptr,  # (N,)
        cu_seqlens_ptr,  # (B+1,)
        scale_ptr,  # ()
        dlog_ratio_ptr,  # (N,)
        N,  # scalar
        beta,  # scalar
        BLOCK_T: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        start, end = sequence_rows(cu_seqlens_ptr, sequence, N)
        factor = beta * tl.load(scale_ptr)
        offsets = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        carry = 0.0
        for block in range(start, end, BLOCK_T):
            rows = end - 1 - (block - start + offsets)  # (BLOCK_T,) from the last token back
            valid = rows >= start  # (BLOCK_T,)
            dvalue = tl.load(dvalue_ptr + rows, mask=valid, other=0.0)  # (BLOCK_T,)
            tl.store(dlog_ratio_ptr + rows, factor * (tl.cumsum(dvalue, 0) + carry), mask=valid)
            carry += tl.sum(dvalue, 0)


def _gpu_outputs(
    log_ratio: Tensor, B: int, count: bool, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """What a GPU kernel fills: sums as `_finished` takes them, dvalue (N,) or None."""
    sums = log_ratio.new_empty((2, B) if count else B)
    return sums, torch.empty_like(log_ratio) if needs_gradient else None


def _finished(sums: Tensor, dvalue: Tensor | None, count: bool) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of a GPU kernel's sums (B,), or (2, B) of omega and of the loss: in this order, since
    `counted` has to start its memory, as the fake's does.
    """
    saved = [] if dvalue is None else [dvalue]
    if not count:
        return sums.sum(), saved
    totals = sums.sum(1)
    return totals[1] / totals[0], [*saved, totals[0]] if saved else []


def _triton_loss_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None, margin_value: float, divisor: float, beta: float, weighting: str,
    per_sequence: bool, count: bool, needs_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    _check_loss_values(cu_seqlens, log_ratio.shape[0], outcome, margin, weight, denominator)
    B = cu_seqlens.shape[0] - 1
    sums, dvalue = _gpu_outputs(log_ratio, B, count, needs_gradient)
    given = (margin, weight, denominator)
    with torch.cuda.device_of(log_ratio):
        _prefix_value_loss_fwd_kernel[(B,)](
            log_ratio, cu_seqlens, outcome, *(outcome if x is None else x for x in given), sums,
            log_ratio if dvalue is None else dvalue, margin_value, 1 / divisor, log_ratio.shape[0], beta,
            WEIGHTING=weighting, PER_SEQUENCE=per_sequence, COUNT=count, HAS_MARGIN=margin is not None,
            HAS_WEIGHT=weight is not None, HAS_DENOMINATOR=denominator is not None,
            NEEDS_GRADIENT=needs_gradient, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return _finished(sums, dvalue, count)


def _triton_loss_bwd(dloss: Tensor, saved: Sequence[Tensor], cu_seqlens: Tensor, beta: float) -> Tensor:
    dvalue, dlog_ratio = saved[0], torch.empty_like(saved[0])
    if dvalue.shape[0]:
        grid, scale = (cu_seqlens.shape[0] - 1,), _scale(dloss, saved)
        with torch.cuda.device_of(dvalue):
            _prefix_value_loss_bwd_kernel[grid](
                dvalue, cu_seqlens, scale, dlog_ratio, dvalue.shape[0], beta, BLOCK_T=BLOCK_T
            )
    return dlog_ratio


def _loss_terms(
    outcome: Tensor, margin: Tensor | None, weight: Tensor | None, denominator: Tensor | None,
    margin_value: float, divisor: float, weighting: str, per_sequence: bool,
) -> Any:  # fmt: skip
    """csrc's LossTerms."""
    return backend.native_struct(
        "LossTerms", outcome=outcome, margin=margin, weight=weight, denominator=denominator,
        margin_value=margin_value, inverse_divisor=1 / divisor, weighting=WEIGHTINGS.index(weighting),
        per_sequence=per_sequence,
    )  # fmt: skip


def _cpp_loss_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None, margin_value: float, divisor: float, beta: float, weighting: str,
    per_sequence: bool, count: bool, needs_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    B, N = cu_seqlens.shape[0] - 1, log_ratio.shape[0]
    loss, gradient = log_ratio.new_empty(()), log_ratio.new_empty(N) if needs_gradient else None
    valid = backend.native_call(
        "prefix_value_loss_fwd_cpu", log_ratio, cu_seqlens,
        _loss_terms(outcome, margin, weight, denominator, margin_value, divisor, weighting, per_sequence),
        loss, gradient, B, N, beta, count,
    )  # fmt: skip
    if not valid:  # which is cheap to know on the way; the words are found here
        _check_loss_values(cu_seqlens, N, outcome, margin, weight, denominator)
        raise AssertionError("prefix_value_loss: refused by the kernel for no reason that Python can see")
    return loss, [] if gradient is None else [gradient]


def _cpp_saved(N: int, count: bool, needs_gradient: bool) -> Sequence[tuple[int, ...]]:
    """The gradient of log_ratio itself."""
    return ((N,),) if needs_gradient else ()


def _cpp_loss_bwd(dloss: Tensor, saved: Sequence[Tensor], cu_seqlens: Tensor, beta: float) -> Tensor:
    return saved[0] * dloss


def _cpp_last_bwd(dloss: Tensor, saved: Sequence[Tensor]) -> Tensor:
    return saved[0] if dloss.item() == 1 else saved[0].mul_(dloss)


def _cuda_loss_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None, margin_value: float, divisor: float, beta: float, weighting: str,
    per_sequence: bool, count: bool, needs_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    _check_loss_values(cu_seqlens, log_ratio.shape[0], outcome, margin, weight, denominator)
    B = cu_seqlens.shape[0] - 1
    sums, dvalue = _gpu_outputs(log_ratio, B, count, needs_gradient)
    backend.native_call(
        "prefix_value_loss_fwd_cuda", log_ratio, cu_seqlens,
        _loss_terms(outcome, margin, weight, denominator, margin_value, divisor, weighting, per_sequence),
        sums[1] if count else sums, sums[0] if count else None, dvalue,
        B, log_ratio.shape[0], beta,
    )  # fmt: skip
    return _finished(sums, dvalue, count)


def _cuda_loss_bwd(dloss: Tensor, saved: Sequence[Tensor], cu_seqlens: Tensor, beta: float) -> Tensor:
    dvalue, dlog_ratio, scale = saved[0], torch.empty_like(saved[0]), _scale(dloss, saved)
    B, N = cu_seqlens.shape[0] - 1, dvalue.shape[0]
    backend.native_call("prefix_value_loss_bwd_cuda", dvalue, cu_seqlens, scale, dlog_ratio, B, N, beta)
    return dlog_ratio


# backward(dloss, saved, cu_seqlens, beta), last_backward(dloss, saved), saved(N, count, needs_gradient). cpp
# forms the gradient in the forward, while a sequence is in cache; on a GPU the scan back is a kernel anyhow
IMPLS = {
    "cuda": backend.Impl(_cuda_loss_fwd, _cuda_loss_bwd, _scanned_saved),
    "triton": backend.Impl(_triton_loss_fwd, _triton_loss_bwd, _scanned_saved),
    "cpp": backend.Impl(_cpp_loss_fwd, _cpp_loss_bwd, _cpp_saved, _cpp_last_bwd),
    "torch": backend.Impl(_torch_loss_fwd, _torch_loss_bwd, _scanned_saved),
}


def _bwd_fake(log_ratio: Tensor) -> Tensor:
    return torch.empty_like(log_ratio, memory_format=torch.contiguous_format)


TAKES_BWD = {"dloss": "float", "log_ratio": "float N", "cu_seqlens": "edges B+1"}


def _bwd_saved(log_ratio: Tensor, impl: str) -> list[Sequence[tuple[int, ...]]]:
    return [IMPLS[impl].saved(log_ratio.shape[0], count, True) for count in (False, True)]


@register(
    fake=_bwd_fake, gradient_of=OP, instead="a loss built from segment_scan and softplus", takes=TAKES_BWD,
    saved=_bwd_saved,
)  # fmt: skip
def _prefix_value_loss_bwd(
    dloss: Tensor, log_ratio: Tensor, cu_seqlens: Tensor, beta: Number, impl: str, saved: list[Tensor]
) -> Tensor:  # log_ratio only tells autograd what the gradient depends on
    return IMPLS[impl].backward(dloss.contiguous(), saved, cu_seqlens.contiguous(), beta)


def _counts(denominator: Tensor | None, divisor: float, per_sequence: bool) -> bool:
    """Whether the loss is divided by the sum of omega, which only the edges tell."""
    return denominator is None and divisor == 0 and not per_sequence


def _fake(
    log_ratio: Tensor, denominator: Tensor | None, divisor: float, per_sequence: bool, needs_gradient: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    count = _counts(denominator, divisor, per_sequence)
    shapes = IMPLS[impl].saved(log_ratio.shape[0], count, needs_gradient)
    return log_ratio.new_empty(()), [log_ratio.new_empty(shape) for shape in shapes]


def _backward(
    dloss: Tensor, log_ratio: Tensor, cu_seqlens: Tensor, beta: Number, impl: str, saved: list[Tensor]
) -> dict[str, Tensor]:
    last_backward = IMPLS[impl].last_backward
    if last_backward is not None and not is_batched(dloss) and is_last_backward(dloss, *saved):
        return {"log_ratio": last_backward(dloss, saved)}
    return {"log_ratio": _prefix_value_loss_bwd(dloss, log_ratio, cu_seqlens, beta, impl, saved)}


TAKES = {
    "log_ratio": "float N", "cu_seqlens": "edges B+1", "outcome": "float B", "margin": "float B",
    "weight": "float B", "denominator": "float",
}  # fmt: skip


@register(fake=_fake, returns=("loss", "saved"), backward=_backward, takes=TAKES)
def _prefix_value_loss(
    log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None, margin_value: float, divisor: float, beta: Number, weighting: str,
    per_sequence: bool, needs_gradient: bool, impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """margin None: margin_value for all; weight None: 1; denominator None: divisor, or where that is 0, B or
    the sum of omega.
    """
    check_finite(OP, "beta", beta)
    N = log_ratio.shape[0]
    log_ratio, cu_seqlens, outcome = log_ratio.contiguous(), cu_seqlens.contiguous(), outcome.contiguous()
    margin = None if margin is None else margin.contiguous()
    weight = None if weight is None else weight.contiguous()
    count = _counts(denominator, divisor, per_sequence)
    if N == 0:
        _check_loss_values(cu_seqlens, N, outcome, margin, weight, denominator)
        shapes = IMPLS[impl].saved(N, count, needs_gradient)
        return log_ratio.new_zeros(()), [log_ratio.new_ones(shape) for shape in shapes]
    own = float(cu_seqlens.shape[0] - 1) if per_sequence else 1.0  # an empty sequence counts and adds 0
    return IMPLS[impl].forward(
        log_ratio, cu_seqlens, outcome, margin, weight, denominator,
        margin_value, divisor or own, beta, weighting, per_sequence, count, needs_gradient,
    )  # fmt: skip


def _check_loss_values(
    cu_seqlens: Tensor, N: int, outcome: Tensor, margin: Tensor | None, weight: Tensor | None,
    denominator: Tensor | None,
) -> None:  # fmt: skip
    if not backend.checks_values(outcome):
        return
    check_cu_seqlens(OP, cu_seqlens, N)
    if not bool(((outcome == 0) | (outcome == 1)).all()):
        wrong = outcome[(outcome != 0) & (outcome != 1)]
        raise ValueError(f"{OP}: outcome must be 0 or 1, got {wrong[:4].tolist()}")
    for name, values in (("margin", margin), ("weight", weight)):
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"{OP}: {name} must be finite, got {values[~values.isfinite()][:4].tolist()}")
    if denominator is not None and not bool((denominator > 0) & denominator.isfinite()):
        raise ValueError(f"{OP}: denominator must be positive and finite, got {denominator.item()}")


def _per_sequence(name: str, given: Any, B: int, log_ratio: Tensor) -> Tensor:
    if given.dim() == 0:
        return log_ratio.new_ones(B) * given.detach()
    if given.shape != (B,) or given.device != log_ratio.device:
        raise ValueError(
            f"{OP}: {name} must be ({B},) on {log_ratio.device}, got {tuple(given.shape)} on {given.device}"
        )
    plain = given.dtype == log_ratio.dtype and not given.requires_grad
    return given if plain else given.detach().to(log_ratio.dtype)


def prefix_value_loss(
    log_ratio: Tensor,
    cu_seqlens: Tensor,
    outcome: Tensor,
    *,
    beta: float | Tensor = 10.0,
    margin: float | Tensor = 5.0,
    weight: Tensor | None = None,
    prefix_weighting: str = "uniform",
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The IPVRM objective: the margin loss of the length-normalised value at every prefix (Eq. 9, 17, 18).

        sequence_mean: (1/B) sum_b w_b sum_t omega_t softplus(margin_b - s_b mean_value_t) / sum_t omega_t
        token_mean:    sum_b w_b sum_t omega_t softplus(...) / sum_b sum_t omega_t

    Args:
        log_ratio: (N,) float, log pi_phi - log pi_ref of each response token, natural log.
        cu_seqlens: (B+1,) int32 sequence edges, from 0 to N; an empty sequence counts in B and adds 0.
        outcome: (B,) 0 or 1 in any dtype, the label of the whole response.
        beta: finite scale of the implicit reward; may be a 0-d CPU tensor.
        margin: finite, one for all (a number or 0-d tensor) or (B,) (Eq. 15).
        weight: (B,) finite loss weights, default 1.
        prefix_weighting: "uniform" | "late" | "early".
        reduction: "sequence_mean" | "token_mean".
        denominator: positive; replaces B, or the sum of omega, so that micro-batches add up.
        impl: None | "torch" | "cpp" | "triton" | "cuda", see `backends()`.

    Returns: 0-d fp32 (fp64 for fp64 input) loss, 0 for an empty batch. Differentiable in log_ratio, once.
    Raises: ValueError on a wrong shape, dtype, device, option or value.
    """
    log_ratio = checked_tokens(OP, "log_ratio", log_ratio, cu_seqlens, {"weight": weight}, outcome=outcome)
    beta = checked_number(OP, "beta", beta)
    B = cu_seqlens.shape[0] - 1
    if prefix_weighting not in WEIGHTINGS:
        raise ValueError(
            f"{OP}: prefix_weighting must be one of {', '.join(WEIGHTINGS)}, got {prefix_weighting!r}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    limits = torch.finfo(log_ratio.dtype)  # of the arithmetic: 1e39 is not finite in fp32
    margin_value, margins = 0.0, None
    if not isinstance(margin, Tensor):
        margin = checked_number(OP, "margin", margin)  # a tensor in compiled code
    if type(margin) is float:
        check_finite(OP, "margin", margin)
        if abs(margin) > limits.max:
            raise ValueError(f"{OP}: margin must be finite in {log_ratio.dtype}, got {margin}")
        margin_value = margin
    else:
        margins = _per_sequence("margin", margin, B, log_ratio)

    if outcome.dim() != 1:
        raise ValueError(f"{OP}: outcome must be a tensor of shape ({B},), got {tuple(outcome.shape)}")
    divisor = 0.0
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = checked_number(OP, "denominator", denominator)
    if denominator is not None and not isinstance(denominator, Tensor):
        if not limits.tiny <= denominator <= limits.max:
            raise ValueError(f"{OP}: denominator must be positive and finite, got {denominator}")
        divisor, denominator = denominator, None
    if denominator is not None:
        if denominator.dim() != 0:
            raise ValueError(
                f"{OP}: denominator must be a number or 0-d, got shape {tuple(denominator.shape)}"
            )
        denominator = denominator.detach().to(log_ratio.device, log_ratio.dtype)
    needs_gradient = torch.is_grad_enabled() and log_ratio.requires_grad
    loss, _ = _prefix_value_loss(
        log_ratio, cu_seqlens, _per_sequence("outcome", outcome, B, log_ratio), margins,
        None if weight is None else _per_sequence("weight", weight, B, log_ratio), denominator, margin_value,
        divisor,
        beta, prefix_weighting, reduction == "sequence_mean", needs_gradient,
        backend.choose(OP, IMPLS, impl, log_ratio),
    )  # fmt: skip
    return loss
