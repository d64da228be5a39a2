"""prefix_values: value, length-normalised value, sigmoid and TD of every prefix, in one pass.

    value_t      = beta * sum_{i<=t} log_ratio_i        Eq. 5, the value after token t, t = 1..T
    mean_value_t = value_t / t
    prob_t       = sigmoid(mean_value_t)
    td_t         = beta * log_ratio_t                   Eq. 10

With upstream gradients dvalue, dmean, dprob, dtd the gradient is one reverse scan:
    d log_ratio_j = beta * (dtd_j + sum_{t>=j} (dvalue_t + dmean_t / t + dprob_t prob_t (1 - prob_t) / t)).

Shapes: log_ratio and every result (N,), cu_seqlens (B+1,) int32. One program per sequence reads each token
once and keeps the running sum in a register; eager PyTorch pads to (B, T) and passes over it line by line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .inputs import checked_number
from .packing import check_cu_seqlens, check_edge_values, check_finite, checked_tokens, positions
from .registration import Number, register
from .segment_scan import segment_scan_reference  # what a running sum means; no kernel is shared

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from .packing import sequence_rows

OP = "prefix_values"
BLOCK_T = 1024


class PrefixValues(NamedTuple):
    """Per-token results of `prefix_values`, each (N,) fp32 (fp64 for fp64 input)."""

    value: Tensor
    mean_value: Tensor
    prob: Tensor
    td: Tensor


def prefix_values_reference(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, mean_value, prob, td) in plain PyTorch, differentiable by autograd."""
    value = beta * segment_scan_reference(log_ratio, cu_seqlens)
    mean_value = value / positions(cu_seqlens, log_ratio.shape[0], log_ratio.dtype)
    return value, mean_value, torch.sigmoid(mean_value), beta * log_ratio


def _torch_values_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_edge_values(OP, cu_seqlens, log_ratio.shape[0])
    return prefix_values_reference(log_ratio, cu_seqlens, beta)


def _torch_values_bwd(
    dvalue: Tensor | None, dmean_value: Tensor | None, dprob: Tensor | None, dtd: Tensor | None,
    prob: Tensor, cu_seqlens: Tensor, beta: float,
) -> Tensor:  # fmt: skip
    t = positions(cu_seqlens, prob.shape[0], prob.dtype)
    all_dvalue = torch.zeros_like(prob)  # (N,) by value_t, also through mean_value_t and prob_t
    if dmean_value is not None:
        all_dvalue = all_dvalue + dmean_value / t
    if dprob is not None:
        all_dvalue = all_dvalue + dprob * prob * (1 - prob) / t
    if dvalue is not None:
        all_dvalue = all_dvalue + dvalue
    total = segment_scan_reference(all_dvalue, cu_seqlens, reverse=True)
    return beta * (total if dtd is None else total + dtd)


if backend.HAS_TRITON:

    @triton.jit(do_not_specialize=["N"])
    def _prefix_values_fwd_kernel(
        log_ratio_ptr,  # (N,)
        cu_seqlens_ptr,  # (B+1,)
        value_ptr,  # (N,)
        mean_value_ptr,  # (N,)
        prob_ptr,  # (N,)
        td_ptr,  # (N,)
        N,  # scalar
        beta,  # scalar
        BLOCK_T: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        start, end = sequence_rows(cu_seqlens_ptr, sequence, N)
        offsets = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        carry = 0.0
        for block in range(start, end, BLOCK_T):
            rows = block + offsets  # (BLOCK_T,)
            valid = rows < end  # (BLOCK_T,)
            log_ratio = tl.load(log_ratio_ptr + rows, mask=valid, other=0.0)  # (BLOCK_T,)
            value = beta * (tl.cumsum(log_ratio, 0) + carry)  # (BLOCK_T,)
            mean_value = value / (rows - start + 1).to(tl.float32)  # (BLOCK_T,)
            tl.store(value_ptr + rows, value, mask=valid)
            tl.store(mean_value_ptr + rows, mean_value, mask=valid)
            tl.store(prob_ptr + rows, tl.sigmoid(mean_value), mask=valid)
            tl.store(td_ptr + rows, beta * log_ratio, mask=valid)
            carry += tl.sum(log_ratio, 0)

    @triton.jit(do_not_specialize=["N"])
    def _prefix_values_bwd_kernel(
        dvalue_ptr,  # (N,)
        dmean_value_ptr,  # (N,)
        dprob_ptr,  # (N,)
        dtd_ptr,  # (N,)
        prob_ptr,  # (N,)
        cu_seqlens_ptr,  # (B+1,)
        dlog_ratio_ptr,  # (N,)
        N,  # scalar
        beta,  # scalar
        HAS_DVALUE: tl.constexpr,
        HAS_DMEAN: tl.constexpr,
        HAS_DPROB: tl.constexpr,
        HAS_DTD: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        start, end = sequence_rows(cu_seqlens_ptr, sequence, N)
        offsets = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        carry = 0.0
        for block in range(start, end, BLOCK_T):
            rows = end - 1 - (block - start + offsets)  # (BLOCK_T,) from the last token back
            valid = rows >= start  # (BLOCK_T,)
            t = tl.maximum(rows - start + 1, 1).to(tl.float32)  # (BLOCK_T,)
            all_dvalue = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,)
            if HAS_DVALUE:
                all_dvalue += tl.load(dvalue_ptr + rows, mask=valid, other=0.0)
            if HAS_DMEAN:
                all_dvalue += tl.load(dmean_value_ptr + rows, mask=valid, other=0.0) / t
            if HAS_DPROB:
                prob = tl.load(prob_ptr + rows, mask=valid, other=0.0)  # (BLOCK_T,)
                all_dvalue += tl.load(dprob_ptr + rows, mask=valid, other=0.0) * prob * (1.0 - prob) / t
            total = tl.cumsum(all_dvalue, 0) + carry  # (BLOCK_T,)
            if HAS_DTD:
                total += tl.load(dtd_ptr + rows, mask=valid, other=0.0)
            tl.store(dlog_ratio_ptr + rows, beta * total, mask=valid)
            carry += tl.sum(all_dvalue, 0)


def _four_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)


def _triton_values_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_edge_values(OP, cu_seqlens, log_ratio.shape[0])
    value, mean_value, prob, td = _four_like(log_ratio)
    if log_ratio.shape[0]:
        grid = (cu_seqlens.shape[0] - 1,)
        with torch.cuda.device_of(log_ratio):
            _prefix_values_fwd_kernel[grid](
                log_ratio, cu_seqlens, value, mean_value, prob, td, log_ratio.shape[0], beta, BLOCK_T=BLOCK_T
            )
    return value, mean_value, prob, td


def _triton_values_bwd(
    dvalue: Tensor | None, dmean_value: Tensor | None, dprob: Tensor | None, dtd: Tensor | None,
    prob: Tensor, cu_seqlens: Tensor, beta: float,
) -> Tensor:  # fmt: skip
    dlog_ratio = torch.empty_like(prob)
    grads = (dvalue, dmean_value, dprob, dtd)
    if prob.shape[0]:
        with torch.cuda.device_of(prob):
            _prefix_values_bwd_kernel[(cu_seqlens.shape[0] - 1,)](
                *(prob if grad is None else grad for grad in grads), prob, cu_seqlens, dlog_ratio,
                prob.shape[0], beta, *(grad is not None for grad in grads), BLOCK_T=BLOCK_T,
            )  # fmt: skip
    return dlog_ratio


def _cuda_values_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = cu_seqlens.shape[0] - 1, log_ratio.shape[0]
    check_edge_values(OP, cu_seqlens, N)
    outputs = _four_like(log_ratio)
    backend.native_call("prefix_values_fwd_cuda", log_ratio, cu_seqlens, *outputs, B, N, beta)
    return outputs


def _cpp_values_fwd(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = cu_seqlens.shape[0] - 1, log_ratio.shape[0]
    outputs = _four_like(log_ratio)
    if not backend.native_call("prefix_values_fwd_cpu", log_ratio, cu_seqlens, *outputs, B, N, beta):
        check_cu_seqlens(OP, cu_seqlens, N)  # the kernel looks at the edges, the words are found here
        raise AssertionError("prefix_values: refused by the kernel for no reason that Python can see")
    return outputs


def _native_values_bwd(device: str) -> Any:
    def run(
        dvalue: Tensor | None, dmean_value: Tensor | None, dprob: Tensor | None, dtd: Tensor | None,
        prob: Tensor, cu_seqlens: Tensor, beta: float,
    ) -> Tensor:  # fmt: skip
        dlog_ratio = torch.empty_like(prob)
        backend.native_call(
            f"prefix_values_bwd_{device}",
            backend.native_struct(
                "PrefixValueGradients", dvalue=dvalue, dmean_value=dmean_value, dprob=dprob, dtd=dtd
            ),
            prob, cu_seqlens, dlog_ratio, cu_seqlens.shape[0] - 1, prob.shape[0], beta,
        )  # fmt: skip
        return dlog_ratio

    return run


IMPLS = {
    "cuda": backend.Impl(_cuda_values_fwd, _native_values_bwd("cuda")),
    "triton": backend.Impl(_triton_values_fwd, _triton_values_bwd),
    "cpp": backend.Impl(_cpp_values_fwd, _native_values_bwd("cpu")),
    "torch": backend.Impl(_torch_values_fwd, _torch_values_bwd),
}


def _bwd_fake(prob: Tensor) -> Tensor:
    return torch.empty_like(prob)


TAKES_BWD = dict.fromkeys(("dvalue", "dmean_value", "dprob", "dtd", "prob"), "float N") | {
    "cu_seqlens": "edges B+1"
}


@register(
    fake=_bwd_fake, gradient_of="prefix_values", instead="values built from segment_scan", takes=TAKES_BWD
)
def _prefix_values_bwd(
    dvalue: Tensor | None, dmean_value: Tensor | None, dprob: Tensor | None, dtd: Tensor | None,
    prob: Tensor, cu_seqlens: Tensor, beta: Number, impl: str,
) -> Tensor:  # fmt: skip
    grads = [None if grad is None else grad.contiguous() for grad in (dvalue, dmean_value, dprob, dtd)]
    return IMPLS[impl].backward(*grads, prob, cu_seqlens.contiguous(), beta)


def _fake(log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = log_ratio.shape[0]
    return log_ratio.new_empty(N), log_ratio.new_empty(N), log_ratio.new_empty(N), log_ratio.new_empty(N)


def _backward(
    dvalue: Tensor | None, dmean_value: Tensor | None, dprob: Tensor | None, dtd: Tensor | None,
    prob: Tensor, cu_seqlens: Tensor, beta: Number, impl: str,
) -> dict[str, Tensor]:  # fmt: skip
    return {"log_ratio": _prefix_values_bwd(dvalue, dmean_value, dprob, dtd, prob, cu_seqlens, beta, impl)}


TAKES = {"log_ratio": "float N", "cu_seqlens": "edges B+1"}


@register(fake=_fake, returns=PrefixValues._fields, backward=_backward, takes=TAKES)
def _prefix_values(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: Number, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_finite(OP, "beta", beta)
    return IMPLS[impl].forward(log_ratio.contiguous(), cu_seqlens.contiguous(), beta)


def prefix_values(
    log_ratio: Tensor, cu_seqlens: Tensor, beta: float | Tensor = 10.0, impl: str | None = None
) -> PrefixValues:
    """Value, length-normalised value, sigmoid and TD of every prefix in one pass (Eq. 5, 10).

    Args:
        log_ratio: (N,) float, log pi_phi - log pi_ref of each response token, natural log.
        cu_seqlens: (B+1,) int32 sequence edges, from 0 to N.
        beta: finite scale of the implicit reward; may be a 0-d CPU tensor.
        impl: None | "torch" | "cpp" | "triton" | "cuda", see `backends()`.

    Returns: PrefixValues(value, mean_value, prob, td), each (N,) fp32 (fp64 for fp64 input): the value after
        token t, that divided by t, its sigmoid, and beta * log_ratio. All differentiable in log_ratio, once.
    Raises: ValueError on a wrong shape, dtype, device, impl, beta, or cu_seqlens.
    """
    log_ratio = checked_tokens(OP, "log_ratio", log_ratio, cu_seqlens)
    beta = checked_number(OP, "beta", beta)
    chosen = backend.choose(OP, IMPLS, impl, log_ratio)
    return PrefixValues(*_prefix_values(log_ratio, cu_seqlens, beta, chosen))
