"""segment_scan: y_t = x_t + decay * y_{t-1} within each packed sequence;
reverse: y_t = x_t + decay * y_{t+1}.

decay = 1 is the running sum behind the prefix value (Eq. 5); reversed with discount * lam it is GAE (Eq. 8).
The gradient of a scan is the same scan run from the other end: dx = segment_scan(dy, reverse=not reverse).

Shapes: x (N,), cu_seqlens (B+1,) int32, y (N,). One program per sequence, blocks joined by a carry, one read
and one write per token: eager PyTorch needs a padded copy and, for decay != 1, a Python loop over time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .inputs import checked_number
from .packing import check_cu_seqlens, check_edge_values, check_finite, checked_tokens, segment_ids
from .registration import Number, register

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from .packing import sequence_rows

OP = "segment_scan"


def segment_scan_reference(
    x: Tensor, cu_seqlens: Tensor, decay: float = 1.0, reverse: bool = False
) -> Tensor:
    """The definition in plain PyTorch, by doubling: after step s every y_t holds its sum's last 2s terms.

    log2(longest sequence) elementwise passes on the CPU, log2(N) elsewhere (asking for the longest would
    synchronise); no padding, differentiable by autograd, any float dtype.
    """
    N = x.shape[0]
    rows = torch.arange(N, device=x.device)
    segment = segment_ids(cu_seqlens, N)
    edges = cu_seqlens.long()
    reach = edges[segment + 1] - 1 - rows if reverse else rows - edges[segment]  # (N,) terms before this one
    longest = N if x.device.type != "cpu" else int(reach.max()) + 1 if N else 0
    y, step = x, 1
    while step < longest:
        zeros = y.new_zeros(step)
        shifted = torch.cat([y[step:], zeros]) if reverse else torch.cat([zeros, y[:-step]])
        y = y + torch.where(reach >= step, shifted, 0.0) * decay**step
        step *= 2
    return y


def _torch(x: Tensor, cu_seqlens: Tensor, decay: float, reverse: bool) -> Tensor:
    check_edge_values(OP, cu_seqlens, x.shape[0])
    y = segment_scan_reference(x, cu_seqlens, decay, reverse)
    return y.clone() if y is x else y  # nothing to add: the op returns new memory


if backend.HAS_TRITON:

    @triton.jit
    def _decayed_sum(decay_left, sum_left, decay_right, sum_right):
        return decay_left * decay_right, sum_right + decay_right * sum_left

    @triton.jit(do_not_specialize=["N"])
    def _segment_scan_kernel(
        x_ptr,  # (N,)
        cu_seqlens_ptr,  # (B+1,)
        y_ptr,  # (N,)
        N,  # scalar
        decay_high,  # scalar
        decay_low,  # scalar, the rest of it in double: a decay of 0.999 in fp32 puts sums 1e-5 off
        DECAYED: tl.constexpr,
        REVERSE: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        start, end = sequence_rows(cu_seqlens_ptr, sequence, N)
        offsets = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        carry = tl.sum(tl.zeros((1,), tl.float64 if DECAYED else tl.float32))
        for block in range(start, end, BLOCK_T):
            t = block - start + offsets  # (BLOCK_T,) position counted from the end the scan begins at
            rows = end - 1 - t if REVERSE else start + t  # (BLOCK_T,)
            valid = t < end - start  # (BLOCK_T,)
            x = tl.load(x_ptr + rows, mask=valid, other=0.0)  # (BLOCK_T,)
            if DECAYED:
                decays = tl.zeros((BLOCK_T,), tl.float64) + decay_high + decay_low  # (BLOCK_T,)
                powers, sums = tl.associative_scan((decays, x.to(tl.float64)), 0, _decayed_sum)
                y = sums + powers * carry  # (BLOCK_T,)
                carry = tl.sum(tl.where(offsets == BLOCK_T - 1, y, 0.0))
            else:
                y = tl.cumsum(x, 0) + carry  # (BLOCK_T,)
                carry += tl.sum(x, 0)
            tl.store(y_ptr + rows, y.to(tl.float32), mask=valid)


def _triton(x: Tensor, cu_seqlens: Tensor, decay: float, reverse: bool) -> Tensor:
    check_edge_values(OP, cu_seqlens, x.shape[0])
    y = torch.empty_like(x)
    if x.shape[0]:
        high = torch.tensor(decay, dtype=torch.float32).item()
        with torch.cuda.device_of(x):
            _segment_scan_kernel[(cu_seqlens.shape[0] - 1,)](
                x, cu_seqlens, y, x.shape[0], high, decay - high,
                DECAYED=decay != 1, REVERSE=reverse, BLOCK_T=1024,
            )  # fmt: skip
    return y


def _cuda(x: Tensor, cu_seqlens: Tensor, decay: float, reverse: bool) -> Tensor:
    check_edge_values(OP, cu_seqlens, x.shape[0])
    y = torch.empty_like(x)
    B, N = cu_seqlens.shape[0] - 1, x.shape[0]
    backend.native_call("segment_scan_cuda", x, cu_seqlens, y, B, N, decay, reverse)
    return y


def _cpp(x: Tensor, cu_seqlens: Tensor, decay: float, reverse: bool) -> Tensor:
    y = torch.empty_like(x)
    B, N = cu_seqlens.shape[0] - 1, x.shape[0]
    if not backend.native_call("segment_scan_cpu", x, cu_seqlens, y, B, N, decay, reverse):
        check_cu_seqlens(OP, cu_seqlens, N)  # the kernel looks at the edges, the words are found here
        raise AssertionError("segment_scan: refused by the kernel for no reason that Python can see")
    return y


IMPLS = {
    "cuda": backend.Impl(_cuda),
    "triton": backend.Impl(_triton),
    "cpp": backend.Impl(_cpp),
    "torch": backend.Impl(_torch),
}


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(dy: Tensor, cu_seqlens: Tensor, decay: Number, reverse: bool, impl: str) -> dict[str, Tensor]:
    return {"x": _segment_scan(dy, cu_seqlens, decay, not reverse, impl)}


TAKES = {"x": "float N", "cu_seqlens": "edges B+1"}


@register(fake=_fake, returns=("y",), backward=_backward, takes=TAKES)
def _segment_scan(x: Tensor, cu_seqlens: Tensor, decay: Number, reverse: bool, impl: str) -> Tensor:
    check_finite(OP, "decay", decay)
    if abs(decay) > 1:
        raise ValueError(f"segment_scan: decay must be within -1 .. 1, got {decay}")
    return IMPLS[impl].forward(x.contiguous(), cu_seqlens.contiguous(), decay, reverse)


def segment_scan(
    x: Tensor, cu_seqlens: Tensor, decay: float | Tensor = 1.0, reverse: bool = False, impl: str | None = None
) -> Tensor:
    """Decayed running sum in each packed sequence: y_t = x_t + decay * y_{t-1} (reverse: y_{t+1}); Eq. 5, 8.

    Args:
        x: (N,) float; fp32, bf16, fp16 (summed in fp32) or fp64.
        cu_seqlens: (B+1,) int32 sequence edges, from 0 to N; empty sequences are allowed.
        decay: factor per step, within -1 .. 1, beyond which long sequences overflow; discount * lam for GAE.
            A number, or a 0-d CPU tensor, whose value no compiled graph holds.
        reverse: run from each sequence's end.
        impl: None | "torch" | "cpp" | "triton" | "cuda", see `backends()`.

    Returns: (N,) fp32 (fp64 for fp64 input). Differentiable in x, any number of times.
    Raises: ValueError on a wrong shape, dtype, device, decay or impl, or if cu_seqlens does not rise to N.
    """
    x = checked_tokens(OP, "x", x, cu_seqlens)
    decay = checked_number(OP, "decay", decay)
    return _segment_scan(x, cu_seqlens, decay, bool(reverse), backend.choose(OP, IMPLS, impl, x))
