"""linear_logprobs: log-probs of K tokens per row, log-sum-exp and entropy from hidden states, without logits.

With a = h.w_v + b_v:  z_v = softcap(a * logit_scale) / temperature,  softcap(x) = c * tanh(x / c);
lse = log sum_v exp z_v,  log p_v = z_v - lse,  H = -sum_v p_v log p_v.

Backward, with upstream g_k of log p_{id_k}, g_lse, g_H, and G = sum_k g_k - g_lse:

    dL/da_v = [-p_v * (G + g_H * (log p_v + H)) + sum_k g_k 1(v = id_k)] * dz_v/da_v
    dhidden = da @ weight,  dweight = da.T @ hidden,  dbias = sum over rows of da

The dense and the sparse part are rounded together: with p near 1 they nearly cancel. With a frozen head
and no gradient through the entropy, dhidden = -G * E + sum_k g_k z'(id_k) w_{id_k}, where E = sum_v p_v
z'_v w_v (N, D) is formed in the forward, so that the backward never touches the vocabulary. Where a
gradient of the entropy arrives after all, the backward recomputes the logits: four matmuls, not two.

Shapes: hidden (N, D), weight (V, D), bias (V,), ids (N, K). Fast because z is read while a tile of it is in
cache; only the reference below holds an (N, V) tensor.
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
    check_ids,
    check_row_ids,
    check_workspace,
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
from .head.blocks import saved_columns
from .registration import Number, register

if backend.HAS_TRITON:
    from .head import triton_backward, triton_forward, triton_ids, triton_saved

NOTHING, FROZEN, TRAINED = "nothing", "frozen", "trained"  # the backward that follows a forward


class LinearLogprobs(NamedTuple):
    """logprobs shaped like ids, lse (N,), entropy (N,) or None; fp32, in nats; fp64 for fp64 inputs."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform,
    return_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition: (logprobs (N, K), lse (N,), entropy (N,) or empty); differentiable, holds (N, V)."""
    z = transformed_logits(hidden, weight, bias, transform)
    log_p = torch.log_softmax(z, 1)
    entropy = -times_log(log_p.exp(), log_p).sum(1) if return_entropy else z.new_empty(0)
    return select_ids(log_p, ids), torch.logsumexp(z, 1), entropy


def _torch_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    return_entropy: bool, follows: str, max_workspace_bytes: int | None, deterministic: bool, may_save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    check_workspace(
        "linear_logprobs", max_workspace_bytes, hidden.shape[0], weight.shape[0], out_dtype(hidden)
    )
    logprobs, lse, entropy = linear_logprobs_reference(hidden, weight, ids, bias, transform, return_entropy)
    saved = []
    if follows == FROZEN:
        z = transformed_logits(hidden, weight, bias, transform)
        p = torch.exp(z - lse[:, None]) * transform_derivative(z, transform)
        saved.append(head_gradients(p, hidden, weight, bias, transform.dtype, (True, False, False))[0])
    return logprobs, lse, entropy, saved


def _torch_saved(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, follows: str,
    max_workspace_bytes: int | None, may_save: bool,
) -> Sequence[tuple[int, ...]]:  # fmt: skip
    """A frozen head's expectation."""
    return (tuple(hidden.shape),) if follows == FROZEN else ()


def _torch_backward(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    logprobs: Tensor, lse: Tensor, entropy: Tensor, saved: Sequence[Tensor], transform: Transform,
    follows: str, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, V = hidden.shape[0], weight.shape[0]
    check_workspace("linear_logprobs", max_workspace_bytes, N, V, lse.dtype)
    owned = (ids >= 0) & (ids < V)
    g = torch.zeros_like(logprobs) if dlogprobs is None else torch.where(owned, dlogprobs, 0.0)
    total = g.sum(1, keepdim=True)  # (N, 1) G
    if dlse is not None:
        total = total - dlse[:, None]

    if follows == FROZEN and dentropy is None:
        rows = weight[torch.where(owned, ids, 0)].to(transform.dtype).to(lse.dtype)  # (N, K, D)
        dz_da = transform_derivative(torch.where(owned, logprobs + lse[:, None], 0.0), transform)
        dhidden = ((g * dz_da)[:, :, None] * rows).sum(1) - total * saved[0]
        return dhidden, lse.new_empty(0), lse.new_empty(0)

    z = transformed_logits(hidden, weight, bias, transform)
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    da = -p * total
    if dentropy is not None:
        da -= dentropy[:, None] * (times_log(p, log_p) + p * entropy[:, None])
    add_at_ids(da, ids, g)
    da *= transform_derivative(z, transform)
    return head_gradients(da, hidden, weight, bias, transform.dtype, needs)


def _cpp_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    return_entropy: bool, follows: str, max_workspace_bytes: int | None, deterministic: bool, may_save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    columns = _saved_columns(hidden, weight, ids, transform.dtype, follows, max_workspace_bytes, may_save)
    result = cpu.forward(
        "linear_logprobs", hidden, weight, bias, ids, transform, entropy=return_entropy,
        expectation=follows == FROZEN, backward_follows=follows != NOTHING, num_saved=columns,
        limit=max_workspace_bytes, deterministic=deterministic,
    )  # fmt: skip
    saved = [result.expectation] if follows == FROZEN else [result.lse_low, result.saved_z]
    return result.logprobs, result.lse, result.entropy, saved


def _saved_columns(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, follows: str,
    max_workspace_bytes: int | None, may_save: bool,
) -> int:  # fmt: skip
    if not may_save or follows != TRAINED:
        return 0
    return saved_columns("linear_logprobs", hidden, weight, dtype, max_workspace_bytes, 4 * ids.shape[1])


def _cpp_saved(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, follows: str,
    max_workspace_bytes: int | None, may_save: bool,
) -> Sequence[tuple[int, ...]]:  # fmt: skip
    """A frozen head's expectation; else what rounding lse to fp32 lost, and z of the saved columns."""
    if follows == FROZEN:
        return (tuple(hidden.shape),)
    N = hidden.shape[0]
    columns = _saved_columns(hidden, weight, ids, dtype, follows, max_workspace_bytes, may_save)
    return (N,), (N * columns,)


def _cpp_backward(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    logprobs: Tensor, lse: Tensor, entropy: Tensor, saved: Sequence[Tensor], transform: Transform,
    follows: str, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse_low, saved_z = (None, None) if follows == FROZEN else saved
    if saved_z is not None and not saved_z.numel():
        saved_z = None
    up = cpu.row_gradients(dlogprobs, dlse, dentropy, ids, weight.shape[0], lse, lse_low, entropy)
    if follows == FROZEN and dentropy is None:
        dhidden = cpu.frozen_backward(up, weight, logprobs, saved[0], transform, max_workspace_bytes)
        return dhidden, lse.new_empty(0), lse.new_empty(0)
    return cpu.backward(
        "linear_logprobs", up, hidden, weight, bias, transform, needs, saved_z=saved_z,
        limit=max_workspace_bytes if saved_z is None else None, deterministic=deterministic,
    )  # fmt: skip


def _triton_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    return_entropy: bool, follows: str, max_workspace_bytes: int | None, deterministic: bool, may_save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Two matmuls for a frozen head where its probabilities fit the workspace, else three, else one."""
    limit, explicit = max_workspace_bytes or triton_forward.DEFAULT_WORKSPACE, max_workspace_bytes is not None
    ids = ids.contiguous()
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform, limit)
        if follows == FROZEN:
            R = triton_saved.saved_rows(ops, ids.shape[1], return_entropy, False, limit)
            if R:
                found = triton_saved.saved_expectation(ops, ids, return_entropy, R)
                logprobs, lse, entropy, expectation = found
                return logprobs, lse, entropy, [expectation]
        at_once = triton_forward.stats_rows(
            "linear_logprobs", ops, ids.shape[1], return_entropy, limit, explicit
        )
        stats = triton_forward.stats(ops, return_entropy, rows_at_once=at_once)
        logprobs, lse = stats.logprobs(triton_forward.id_logits(ops, ids)), stats.lse()
        saved = stats.lse_remainder(lse)
        if follows == FROZEN:
            saved = triton_backward.expectation(ops, ids, lse, saved, limit, explicit)
    return logprobs, lse, stats.entropy() if return_entropy else lse.new_empty(0), [saved]


def _triton_saved(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, follows: str,
    max_workspace_bytes: int | None, may_save: bool,
) -> Sequence[tuple[int, ...]]:  # fmt: skip
    """A frozen head's expectation, else what rounding lse to fp32 lost."""
    return (tuple(hidden.shape if follows == FROZEN else hidden.shape[:1]),)


def _triton_backward(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    logprobs: Tensor, lse: Tensor, entropy: Tensor, saved: Sequence[Tensor], transform: Transform,
    follows: str, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    limit = max_workspace_bytes or triton_forward.DEFAULT_WORKSPACE
    ids = ids.contiguous()
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform, limit)
        up = triton_ids.output_gradients(ids, weight.shape[0], dlogprobs, dlse, dentropy)
        if follows == FROZEN and dentropy is None:
            dhidden = triton_ids.frozen_dhidden(ops, ids, logprobs, lse, up, saved[0])
            return dhidden, lse.new_empty(0), lse.new_empty(0)
        return triton_backward.gradients(
            "linear_logprobs", ops, weight.dtype, ids, logprobs, lse,
            torch.zeros_like(lse) if follows == FROZEN else saved[0], entropy, up, needs, limit,
            max_workspace_bytes is not None,
        )  # fmt: skip


# saved(hidden, weight, ids, dtype, follows, max_workspace_bytes, may_save)
IMPLS = {
    "triton": backend.Impl(_triton_forward, _triton_backward, _triton_saved),
    "cpp": backend.Impl(_cpp_forward, _cpp_backward, _cpp_saved),
    "torch": backend.Impl(_torch_forward, _torch_backward, _torch_saved),
}


def _bwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needs)


def _bwd_flops(
    dentropy: Sequence[int] | None, hidden: Sequence[int], weight: Sequence[int], follows: str,
    needs: Sequence[bool],
) -> int:  # fmt: skip
    """The logits again, then a matmul for each gradient; not deducted: z that were saved, rows left out."""
    if follows == FROZEN and dentropy is None:
        return 0
    return matmul_flops(hidden, weight, 1 + sum(needs[:2]))


TAKES_BWD = {
    **TAKES_HEAD, "dlogprobs": "float N K", "dlse": "float N", "dentropy": "float N", "ids": "ids N K",
    "logprobs": "float N K", "lse": "float N", "entropy": "float N if dentropy",
}  # fmt: skip


def _bwd_saved(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, follows: str,
    max_workspace_bytes: int | None, impl: str,
) -> list[Sequence[tuple[int, ...]]]:  # fmt: skip
    given = (hidden, weight, ids, dtype, follows, max_workspace_bytes)
    return [IMPLS[impl].saved(*given, may_save) for may_save in (False, True)]


@register(
    fake=_bwd_fake, gradient_of="linear_logprobs", instead=INSTEAD, flops=_bwd_flops, takes=TAKES_BWD,
    saved=_bwd_saved,
)  # fmt: skip
def _linear_logprobs_bwd(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    logprobs: Tensor, lse: Tensor, entropy: Tensor,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype, follows: str,
    needs: list[bool], max_workspace_bytes: int | None, deterministic: bool, impl: str, saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transform = checked_transform("linear_logprobs", scale, softcap, temperature, dtype)
    gradients = IMPLS[impl].backward(
        dlogprobs, dlse, dentropy, hidden, weight, bias, ids, logprobs, lse, entropy, saved, transform,
        follows, needs, max_workspace_bytes, deterministic,
    )  # fmt: skip
    return cast_gradients(gradients, (hidden, weight, bias), needs)


def _fake(
    hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, return_entropy: bool, follows: str,
    max_workspace_bytes: int | None, may_save: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    lse = hidden.new_empty(hidden.shape[0], dtype=out_dtype(hidden))
    entropy = lse.new_empty(lse.shape if return_entropy else 0)
    shapes = IMPLS[impl].saved(hidden, weight, ids, dtype, follows, max_workspace_bytes, may_save)
    return lse.new_empty(ids.shape), lse, entropy, [lse.new_empty(shape) for shape in shapes]


def _backward(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    logprobs: Tensor, lse: Tensor, entropy: Tensor, saved: list[Tensor],
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype,
    return_entropy: bool, follows: str, max_workspace_bytes: int | None, deterministic: bool, impl: str,
    needs: dict[str, bool],
) -> dict[str, Tensor]:  # fmt: skip
    gradients = _linear_logprobs_bwd(
        dlogprobs, dlse, dentropy if return_entropy else None, hidden, weight, bias, ids,
        logprobs, lse, entropy, scale, softcap, temperature, dtype, follows, [needs[x] for x in TRAINABLE],
        max_workspace_bytes, deterministic, impl, saved,
    )  # fmt: skip
    return dict(zip(TRAINABLE, gradients, strict=True))


def _flops(hidden: Sequence[int], weight: Sequence[int], follows: str) -> int:
    return matmul_flops(hidden, weight, 2 if follows == FROZEN else 1)


TAKES = {**TAKES_HEAD, "ids": "ids N K"}


@register(
    fake=_fake, returns=(*LinearLogprobs._fields, "saved"), backward=_backward, flops=_flops, takes=TAKES
)
def _linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype,
    return_entropy: bool, follows: str, max_workspace_bytes: int | None, deterministic: bool, may_save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """follows: the backward there will be, NOTHING, FROZEN (head, gradient of hidden alone) or TRAINED.
    may_save: z may be saved for it, where max_workspace_bytes allows.
    """
    if backend.checks_values(ids):
        check_ids("linear_logprobs", "ids", ids, weight.shape[0])
    transform = checked_transform("linear_logprobs", scale, softcap, temperature, dtype)
    return IMPLS[impl].forward(
        hidden, weight, bias, ids, transform, return_entropy, follows, max_workspace_bytes, deterministic,
        may_save,
    )  # fmt: skip


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    fill_value: float = -math.inf,
    return_entropy: bool = False,
    max_workspace_bytes: int | None = None,
    deterministic: bool = False,
    impl: str | None = None,
) -> LinearLogprobs:
    """Log-probs of given tokens, log-sum-exp and entropy of softmax over z, from hidden states.

    Equal to: z = (hidden @ weight.T + bias) * logit_scale; z = softcap * tanh(z / softcap) if softcap;
    z /= temperature; log_softmax(z)[ids], logsumexp(z), entropy(softmax(z)); in nats.

    Args:
        hidden: (N, D) fp32, bf16, fp16 or fp64, or with more leading dimensions, (B, T, D), which then stand
            in the place of N in ids and in all results.
        weight: (V, D) of hidden's dtype, or fp32 (masters) with bf16/fp16 hidden; under autocast any of
            these. The matmul's operands are rounded to autocast's dtype if enabled, else to hidden's; sums
            are fp32 or better.
        ids: (N,) or (N, K) int64 or int32 below V. Any negative id (-1, -100) is "no token": log-prob
            `fill_value`, no gradient. Duplicates add their gradients. An id from V on, where that is not
            checked, is a token of probability 0: log-prob -inf whatever `fill_value`, no gradient.
        bias: (V,) of weight's dtype or fp32, added in fp32.
        logit_scale, softcap, temperature: see above, in this order; finite, the latter two > 0.
        fill_value: the log-prob of no token; 0.0 keeps `(logprobs * mask).sum()` finite. The losses know an
            absent token by a log-prob of -inf, so a filled one is no old log-prob.
        return_entropy: whether to compute the entropy.
        max_workspace_bytes: upper limit of scratch memory; refused with the least that works (impl="torch"
            holds (N, V) tensors). On the CPU what exceeds 64 MiB saves z in fp32 for the backward of a
            trainable head: with 4 N V bytes more it takes three matmuls instead of four (not under
            torch.compile, nor if deterministic). That part is held until the backward, once for each graph.
        deterministic: bitwise the same result for a row whatever N and its neighbours. impl="torch" is
            repeatable run to run, but its vendor matmul may sum in another order at another N; so are the
            gradients of impl="triton", whose outputs hold the guarantee with or without this option.
        impl: None | "torch" | "cpp" | "triton", see `backends()`.

    Returns: LinearLogprobs, fp32 (fp64 for fp64 inputs), log-probs <= 0. All three are differentiable once in
    hidden, weight and bias; gradients come in each input's own dtype from fp32 accumulators.
    A row whose hidden holds a NaN says so: its log-probs (not those of no token), lse, entropy and dhidden
    are NaN, and so is dweight where it has an upstream gradient; the other rows are as ever.
    Raises: ValueError on wrong shapes, dtypes, devices, scalars, impl, ids from V on (checked on the
    CPU, and on a GPU under `set_checks(True)`), a DTensor or an empty (sharded) weight. RuntimeError on
    double backward.
    """
    op = "linear_logprobs"
    numbers = prepare(op, hidden, weight, bias, logit_scale, softcap, temperature, max_workspace_bytes)
    check_row_ids(op, "ids", ids, hidden, (1, 2))
    rows, given = hidden.shape[:-1], ids
    hidden, ids = flat_rows(hidden, rows), flat_rows(ids, rows)
    impl = backend.choose(op, IMPLS, impl, hidden)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    follows = NOTHING
    if torch.is_grad_enabled() and (trained or hidden.requires_grad):
        follows = TRAINED if trained else FROZEN
    may_save = not deterministic and not torch.compiler.is_compiling()
    logprobs, lse, entropy, _ = _linear_logprobs(
        hidden, weight, bias, ids.long()[:, None] if ids.dim() == 1 else ids.long(),
        *numbers, bool(return_entropy), follows, max_workspace_bytes, bool(deterministic), may_save, impl,
    )  # fmt: skip
    logprobs = in_rows(logprobs[:, 0] if ids.dim() == 1 else logprobs, rows)
    if fill_value != -math.inf:
        logprobs = logprobs.masked_fill(given < 0, fill_value)
    return LinearLogprobs(logprobs, in_rows(lse, rows), in_rows(entropy, rows) if return_entropy else None)
