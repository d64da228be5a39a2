"""linear_logprobs_partial: what one shard of a vocabulary-parallel head knows of a row, and how shards merge.

With z the transformed logits of the shard's columns (see `linear_logprobs`) and m = max z, per row

    max = m,   sumexp = sum exp(z - m),   sum_z_exp = sum (z - m) exp(z - m),   id_logits = z[id] or -inf

and over the shards, each rescaled to the common maximum M by c = exp(m - M):

    S = sum of c sumexp,   R = sum of c (sum_z_exp + (m - M) sumexp)
    lse = M + log S,   log p = z - lse,   entropy = log S - R / S

Maxima are constants (their gradients cancel), so a shard's backward needs nothing from the others but the
upstream gradients of its own sums. Shapes: hidden (N, D), weight (V_shard, D), ids (N,) or (N, K), sums (N,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .head import (
    INSTEAD,
    TAKES_HEAD,
    TRAINABLE,
    Transform,
    add_at_ids,
    cast_gradients,
    check_row_ids,
    checked_transform,
    cpu,
    fake_gradients,
    flat_rows,
    head_gradients,
    in_rows,
    matmul_flops,
    out_dtype,
    prepare,
    select_ids,
    times_log,
    transform_derivative,
    transformed_logits,
)
from .linear_logprobs import LinearLogprobs
from .registration import Number, register

if backend.HAS_TRITON:
    from .head import triton_backward, triton_forward, triton_ids

OP = "linear_logprobs_partial"


class Partial(NamedTuple):
    """One shard's max (N,), sumexp (N,), sum_z_exp (N,) and id_logits like ids, as defined above; fp32
    (fp64).
    """

    max: Tensor
    sumexp: Tensor
    sum_z_exp: Tensor
    id_logits: Tensor


def linear_logprobs_partial_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max, sumexp, sum_z_exp, id_logits) in plain PyTorch; ids (N, K) count from the shard's first
    column.
    """
    z = transformed_logits(hidden, weight, bias, transform)
    top = z.amax(1)
    shifted = z - _finite(top)[:, None]
    e = shifted.exp()
    return top, e.sum(1), times_log(e, shifted).sum(1), select_ids(z, ids)


def _torch_backward(
    dsumexp: Tensor | None, dsum_z_exp: Tensor | None, did_logits: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, top: Tensor, transform: Transform,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z = transformed_logits(hidden, weight, bias, transform)
    shifted = z - _finite(top)[:, None]
    e, da = shifted.exp(), torch.zeros_like(z)
    if dsumexp is not None:
        da += dsumexp[:, None] * e
    if dsum_z_exp is not None:
        da += dsum_z_exp[:, None] * (e + times_log(e, shifted))
    if did_logits is not None:
        add_at_ids(da, ids, did_logits)
    da *= transform_derivative(z, transform)
    return head_gradients(da, hidden, weight, bias, transform.dtype, needs)


def _neutral(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a shard without tokens adds to the others: nothing."""
    nothing = hidden.new_full((len(hidden),), -math.inf, dtype=out_dtype(hidden))
    zeros = torch.zeros_like(nothing)
    return nothing, zeros, zeros.clone(), nothing.new_full(ids.shape, -math.inf)


def _zero_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    return [
        hidden.new_zeros(x.shape if need and x is not None else 0, dtype=out_dtype(hidden))
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]


def _finite(top: Tensor) -> Tensor:
    """The maximum to subtract: 0 for a row of -inf, whose exp is then 0."""
    return torch.where(top == -math.inf, 0.0, top)


def _triton_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform)
        stats = triton_forward.stats(ops, True)
        top, sumexp, sum_z_exp = (x.clone() for x in stats)  # outputs of an op may not share memory
        z = triton_forward.id_logits(ops, ids.contiguous())
        # gather-dot and tile may round apart, and a log-prob is never above 0; NaN in max leaves -inf alone
        return top, sumexp, sum_z_exp, torch.where(z > top[:, None], top[:, None], z)


def _triton_backward(
    dsumexp: Tensor | None, dsum_z_exp: Tensor | None, did_logits: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, top: Tensor, transform: Transform,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """linear_logprobs with max in place of lse: da = e (dsumexp + dsum_z_exp (1 + z - max)) + ids."""
    V, ids = weight.shape[0], ids.contiguous()
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform)
        top = _finite(top)
        total = torch.zeros_like(top)  # the G of `linear_logprobs`, for da = -e (G + g_H (z - max)) + sparse
        for d in (dsumexp, dsum_z_exp):
            total = total if d is None else total - d
        up = triton_ids.output_gradients(ids, V, did_logits, None, None)
        dentropy = None if dsum_z_exp is None else -dsum_z_exp
        up = up._replace(total=total, dlse=up.total - total, dentropy=dentropy)
        zeros, limit = torch.zeros_like(top), triton_forward.DEFAULT_WORKSPACE
        shifted = triton_forward.id_logits(ops, ids) - top[:, None]
        return triton_backward.gradients(
            OP, ops, weight.dtype, ids, shifted.clamp(max=0), top, zeros, zeros, up, needs, limit, False
        )


def _cpp_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.partial_sums(OP, hidden, weight, bias, ids, transform)


def _cpp_backward(
    dsumexp: Tensor | None, dsum_z_exp: Tensor | None, did_logits: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, top: Tensor, transform: Transform,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """linear_logprobs with max in place of lse, as in `_triton_backward`."""
    top = _finite(top)
    zeros = torch.zeros_like(top)
    dentropy = None if dsum_z_exp is None else -dsum_z_exp
    up = cpu.row_gradients(did_logits, dsumexp, dentropy, ids, weight.shape[0], top, None, zeros)
    up.total.zero_()  # in place: the native struct holds its address
    for d in (dsumexp, dsum_z_exp):
        if d is not None:
            up.total.sub_(d)
    return cpu.backward(OP, up, hidden, weight, bias, transform, needs)


IMPLS = {
    "triton": backend.Impl(_triton_forward, _triton_backward),
    "cpp": backend.Impl(_cpp_forward, _cpp_backward),
    "torch": backend.Impl(linear_logprobs_partial_reference, _torch_backward),
}


def _bwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needs)


def _bwd_flops(hidden: Sequence[int], weight: Sequence[int], needs: Sequence[bool]) -> int:
    return matmul_flops(hidden, weight, 1 + sum(needs[:2]))


TAKES_BWD = {
    **TAKES_HEAD, "dsumexp": "float N", "dsum_z_exp": "float N", "did_logits": "float N K", "ids": "ids N K",
    "top": "float N",
}  # fmt: skip


@register(fake=_bwd_fake, gradient_of=OP, instead=INSTEAD, flops=_bwd_flops, takes=TAKES_BWD)
def _linear_logprobs_partial_bwd(
    dsumexp: Tensor | None, dsum_z_exp: Tensor | None, did_logits: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, top: Tensor,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype, needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not len(weight):
        return cast_gradients(_zero_gradients(hidden, weight, bias, needs), (hidden, weight, bias), needs)
    transform = checked_transform(OP, scale, softcap, temperature, dtype)
    gradients = IMPLS[impl].backward(
        dsumexp, dsum_z_exp, did_logits, hidden, weight, bias, ids, top, transform, needs
    )
    return cast_gradients(gradients, (hidden, weight, bias), needs)


def _fake(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=out_dtype(hidden))

    N = hidden.shape[0]
    return new(N), new(N), new(N), new(*ids.shape)


def _backward(
    dsumexp: Tensor | None, dsum_z_exp: Tensor | None, did_logits: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, max: Tensor,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype, needs: dict[str, bool],
    impl: str,
) -> dict[str, Tensor]:  # fmt: skip
    gradients = _linear_logprobs_partial_bwd(
        dsumexp, dsum_z_exp, did_logits, hidden, weight, bias, ids, max,
        scale, softcap, temperature, dtype, [needs[x] for x in TRAINABLE], impl,
    )  # fmt: skip
    return dict(zip(TRAINABLE, gradients, strict=True))


def _flops(hidden: Sequence[int], weight: Sequence[int]) -> int:
    return matmul_flops(hidden, weight, 1)


TAKES = {**TAKES_HEAD, "ids": "ids N K"}


@register(fake=_fake, returns=Partial._fields, backward=_backward, flops=_flops, takes=TAKES)
def _linear_logprobs_partial(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    transform = checked_transform(OP, scale, softcap, temperature, dtype)
    if not len(weight):
        return _neutral(hidden, ids)
    return IMPLS[impl].forward(hidden, weight, bias, ids, transform)


def linear_logprobs_partial(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    vocab_start: int,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    impl: str | None = None,
) -> Partial:
    """The statistics of one vocabulary shard, to be joined by `merge_partials`.

    Args:
        hidden, bias, logit_scale, softcap, temperature: as in `linear_logprobs`; bias (V_shard,).
        weight: (V_shard, D), rows vocab_start .. vocab_start + V_shard of the head; V_shard may be 0.
        ids: (N,) or (N, K), as in `linear_logprobs`, ids into the whole vocabulary; a negative one, or one
            that no shard owns, is "no token".
        vocab_start: the id of weight's first row.
        impl: None | "torch" | "cpp" | "triton", see `backends()`.

    Returns: Partial, fp32 (fp64 for fp64 inputs). sumexp, sum_z_exp and id_logits are differentiable once in
        hidden, weight and bias; max is a constant, whose gradient cancels in the merge. An empty shard's are
        -inf, 0, 0 and -inf, to which `merge_partials` adds the others. A row whose hidden holds a NaN has NaN
        sums, which the merge hands on; its max is NaN or -inf.
    Raises: ValueError as `linear_logprobs`, except that ids are not checked (others own them).
    RuntimeError on double backward.
    """
    numbers = prepare(OP, hidden, weight, bias, logit_scale, softcap, temperature, may_be_empty=True)
    check_row_ids(OP, "ids", ids, hidden, (1, 2))
    if vocab_start < 0:
        raise ValueError(f"{OP}: vocab_start must be >= 0, got {vocab_start}")
    rows = hidden.shape[:-1]
    hidden, ids = flat_rows(hidden, rows), flat_rows(ids, rows)
    local = ids.long()[:, None] if ids.dim() == 1 else ids.long()
    owned = (local >= vocab_start) & (local < vocab_start + weight.shape[0])
    local = torch.where(owned, local - vocab_start, -1)
    impl = backend.choose(OP, IMPLS, impl, hidden)
    top, sumexp, sum_z_exp, id_logits = _linear_logprobs_partial(hidden, weight, bias, local, *numbers, impl)
    id_logits = id_logits[:, 0] if ids.dim() == 1 else id_logits
    return Partial(*(in_rows(x, rows) for x in (top, sumexp, sum_z_exp, id_logits)))


def merge_partials(partials: Sequence[Partial], *, return_entropy: bool = False) -> LinearLogprobs:
    """Join the shards of a vocabulary, in the order given, to what `linear_logprobs` returns for the whole
    head.

    Args: partials of disjoint shards that cover the vocabulary, equal shapes. Vocabulary parallel: all-gather
        every rank's, put one's own (with its graph) back in its place, and all-reduce the gradient of hidden;
        the others' values need no graph, since each rank's backward reaches its own shard.
    Returns: LinearLogprobs; differentiable in the partials' sumexp, sum_z_exp and id_logits.
    Raises: ValueError on an empty sequence or differing shapes.
    """
    if not partials:
        raise ValueError("merge_partials: partials must hold at least one shard, got none")
    shapes = {(tuple(p.max.shape), tuple(p.id_logits.shape)) for p in partials}
    if len(shapes) > 1:
        raise ValueError(f"merge_partials: all shards must have the same rows and ids, got {sorted(shapes)}")
    maxima = torch.stack([p.max for p in partials]).detach()  # (shards, N)
    top = maxima.amax(0)
    shift = torch.where(maxima == -math.inf, 0.0, maxima - top)  # a shard of -inf logits has sums of 0
    factor = shift.exp()
    sumexp = torch.stack([p.sumexp for p in partials])
    total = (sumexp * factor).sum(0)
    log_total = total.log()
    id_logits = torch.stack([p.id_logits for p in partials]).amax(0)
    trailing = (...,) if id_logits.dim() == top.dim() else (..., None)
    found = id_logits != -math.inf  # selected before it is summed: a NaN upstream of an unused slot stays out
    logprobs = torch.where(found, id_logits - top[trailing] - log_total[trailing], -math.inf)
    entropy = None
    if return_entropy:
        sum_z_exp = torch.stack([p.sum_z_exp for p in partials])
        entropy = log_total - ((sum_z_exp + shift * sumexp) * factor).sum(0) / total
    return LinearLogprobs(logprobs, top + log_total, entropy)
