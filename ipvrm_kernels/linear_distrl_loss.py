"""linear_distrl_loss: the two-branch clipped policy loss from hidden states, gradients included, no logits.

    l(c)         = the clipped surrogate of log pi(c | s_t) = log_softmax(z_t)[c], see `clipped_surrogate`
    L_token      = (1/B) sum_b 1/T_b sum_t l(y_t)                                                     Eq. 12
    L_candidates = (1/B) sum_b 1/T_b sum_t sum_{c in C_t} pi_old(c | s_t) l(c)                        Eq. 11
    loss         = L_token + alpha * L_candidates                                                     Eq. 14

Other reductions: token_mean divides by the number of tokens, old_prob_mean (candidates) by the sum of pi_old.

The loss is a scalar whose gradient by every log-prob is known as soon as the log-probs are, so the forward
forms dhidden, dweight and dbias (for upstream 1, as fp32 accumulators) and the backward scales them: in
place, once; compiled or with create_graph, into copies. Three matmuls where a block's logits fit the
workspace, two for a frozen head. Sampled token and candidates share one pass over the vocabulary; unused
slots (-1) cost nothing.

Shapes: hidden (N, D), weight (V, D), token_ids (N,), candidate_ids (N, K), cu_seqlens (B+1,).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backend
from .distrl_loss import (
    DISTRL_METRICS,
    EVALUATE,
    DistRLLoss,
    LossInputs,
    Objective,
    batch_divisors,
    check_batch,
    checked_floats,
    checked_objective,
    checked_options,
    denominator_tensor,
    named_metrics,
)
from .head import (
    INSTEAD,
    TAKES_HEAD,
    TRAINABLE,
    Transform,
    cast_gradients,
    check_ids,
    check_row_ids,
    check_workspace,
    checked_transform,
    cpu,
    fake_gradients,
    flat_rows,
    matmul_flops,
    out_dtype,
    prepare,
)
from .linear_logprobs import IMPLS as LOGPROB_IMPLS
from .linear_logprobs import NOTHING
from .packing import check_cu_seqlens_shape
from .registration import Number, is_batched, is_last_backward, register

if backend.HAS_TRITON:
    from .head import triton_forward, triton_saved

OP = "linear_distrl_loss"


def _torch_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, batch: LossInputs, transform: Transform,
    objective: Objective, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_workspace(OP, max_workspace_bytes, hidden.shape[0], weight.shape[0], out_dtype(hidden))
    head = LOGPROB_IMPLS["torch"]
    logprobs, lse, entropy, _ = head.forward(
        hidden, weight, bias, ids, transform, False, NOTHING, None, deterministic, False
    )
    divisors = batch_divisors(batch, objective)
    *outputs, dlogprobs = EVALUATE["torch"](logprobs, batch, objective, divisors)
    gradients = [lse.new_empty(0) for _ in needs]
    if any(needs):
        gradients = head.backward(
            dlogprobs, None, None, hidden, weight, bias, ids, logprobs, lse, entropy, (), transform,
            NOTHING, needs, None, deterministic,
        )  # fmt: skip
    return *outputs, *gradients


def _by_rows(
    impl: str, batch: LossInputs, objective: Objective
) -> tuple[list[Tensor], Callable[[int, int, Tensor], Tensor]]:
    """(running loss, token_loss, candidate_loss, metrics in fp64; dloss_dlogprobs).

    dloss_dlogprobs(r0, r1, logprobs (r1 - r0, 1 + K)) evaluates these rows and adds to the sums.
    """
    divisors = batch_divisors(batch, objective)
    shapes: tuple[tuple[int, ...], ...] = ((), (), (), (len(DISTRL_METRICS), 2))
    sums = [batch.old_logprobs.new_zeros(shape, dtype=torch.float64) for shape in shapes]

    def dloss_dlogprobs(r0: int, r1: int, logprobs: Tensor) -> Tensor:
        *added, dlogprobs = EVALUATE[impl](logprobs, batch.rows(r0, r1), objective, divisors, r0)
        for total, x in zip(sums, added, strict=True):
            total += x
        return dlogprobs

    return sums, dloss_dlogprobs


def _cpp_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, batch: LossInputs, transform: Transform,
    objective: Objective, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sums, dloss_dlogprobs = _by_rows("cpp", batch, objective)
    gradients = cpu.fused_gradients(
        OP, hidden, weight, bias, ids, transform, dloss_dlogprobs, needs,
        limit=max_workspace_bytes, deterministic=deterministic,
    )  # fmt: skip
    return *(total.float() for total in sums), *gradients


def _triton_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, batch: LossInputs, transform: Transform,
    objective: Objective, needs: Sequence[bool], max_workspace_bytes: int | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Three matmuls, two for a frozen head, where probabilities fit the workspace; else one more."""
    limit, explicit = max_workspace_bytes or triton_forward.DEFAULT_WORKSPACE, max_workspace_bytes is not None
    sums, dloss_dlogprobs = _by_rows("triton", batch, objective)
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform, limit)
        gradients = triton_saved.fused_gradients(OP, ops, ids, dloss_dlogprobs, needs, limit, explicit)
    return *(total.float() for total in sums), *gradients


def _saved(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> Sequence[tuple[int, ...]]:
    """The gradients for an upstream of 1, fp32; 0 elements where not needed."""
    inputs = (hidden, weight, bias)
    return [tuple(x.shape) if need and x is not None else (0,) for x, need in zip(inputs, needs, strict=True)]


def _scaled(dloss: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    return [gradient * dloss for gradient in saved]


def _scaled_in_place(dloss: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.mul_(dloss) for gradient in saved]  # a copy would be a second fp32 dweight


# forward -> (loss, token_loss, candidate_loss, metrics, *saved); both backwards (dloss, saved)
IMPLS = {
    "triton": backend.Impl(_triton_forward, _scaled, _saved, _scaled_in_place),
    "cpp": backend.Impl(_cpp_forward, _scaled, _saved, _scaled_in_place),
    "torch": backend.Impl(_torch_forward, _scaled, _saved, _scaled_in_place),
}


def _bwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needs)


TAKES_BWD = {"dloss": "float", **TAKES_HEAD}


def _bwd_saved(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Sequence[tuple[int, ...]]]:
    """What is not needed now may have been formed all the same."""
    ways = itertools.product(*((True,) if need else (False, True) for need in needs))
    return [_saved(hidden, weight, bias, formed) for formed in ways]


@register(fake=_bwd_fake, gradient_of=OP, instead=INSTEAD, takes=TAKES_BWD, saved=_bwd_saved)
def _linear_distrl_loss_bwd(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], impl: str,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients times dloss, cast once; out of place, for compiled graphs and retained graphs."""
    return cast_gradients(IMPLS[impl].backward(dloss, saved), (hidden, weight, bias), needs)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, form: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=out_dtype(hidden))

    saved = [new(*shape) for shape in IMPLS[impl].saved(hidden, weight, bias, form)]
    return new(), new(), new(), new(len(DISTRL_METRICS), 2), saved


def _backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str, saved: list[Tensor],
    needs: dict[str, bool],
) -> dict[str, Tensor]:  # fmt: skip
    wanted, last_backward = [needs[x] for x in TRAINABLE], IMPLS[impl].last_backward
    if is_batched(dloss):  # in place a gradient would be scaled by all
        if torch.is_grad_enabled():
            raise RuntimeError(f"{OP}: batched gradients (vmap, is_grads_batched) with create_graph=True are "
                               "not supported; loop over the upstream gradients")  # fmt: skip
        gradients = cast_gradients(IMPLS[impl].backward(dloss, saved), (hidden, weight, bias), wanted)
    elif last_backward is not None and is_last_backward(dloss, *saved):
        gradients = cast_gradients(last_backward(dloss, saved), (hidden, weight, bias), wanted)
    else:
        gradients = _linear_distrl_loss_bwd(dloss, hidden, weight, bias, wanted, impl, saved)
    return dict(zip(TRAINABLE, gradients, strict=True))


def _flops(hidden: Sequence[int], weight: Sequence[int], form: Sequence[bool]) -> int:
    """Gradients are formed in the forward, from z that are saved: no logits again."""
    return matmul_flops(hidden, weight, 1 + sum(form[:2]))


TAKES = {
    **TAKES_HEAD, "token_ids": "ids N", "candidate_ids": "ids N K",
    "old_logprobs": "float N", "old_candidate_logprobs": "float N K", "advantages": "float N",
    "candidate_advantages": "float N K", "cu_seqlens": "edges B+1", "token_denominator": "float",
    "candidate_denominator": "float",
}  # fmt: skip


@register(fake=_fake, returns=(*DistRLLoss._fields, "saved"), backward=_backward, flops=_flops, takes=TAKES)
def _linear_distrl_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, candidate_ids: Tensor,
    old_logprobs: Tensor, old_candidate_logprobs: Tensor, advantages: Tensor, candidate_advantages: Tensor,
    cu_seqlens: Tensor, token_denominator: Tensor | None, candidate_denominator: Tensor | None,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype,
    alpha: Number, clip_low: Number, clip_high: Number, candidate_clip_low: Number,
    candidate_clip_high: Number, dual_clip: Number | None, reduction: str, candidate_reduction: str,
    form: list[bool], max_workspace_bytes: int | None, deterministic: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """form: which of the gradients by hidden, weight and bias are formed."""
    transform = checked_transform(OP, scale, softcap, temperature, dtype)
    objective = checked_objective(
        OP, alpha, clip_low, clip_high, candidate_clip_low, candidate_clip_high, dual_clip, reduction,
        candidate_reduction,
    )  # fmt: skip
    old_logprobs = old_logprobs.masked_fill(token_ids < 0, -math.inf)  # the objective's one mark of no token
    old_candidate_logprobs = old_candidate_logprobs.masked_fill(candidate_ids < 0, -math.inf)
    tensors = (
        old_logprobs, old_candidate_logprobs, advantages, candidate_advantages, cu_seqlens,
        token_denominator, candidate_denominator,
    )  # fmt: skip
    batch = LossInputs._make(None if x is None else x.contiguous() for x in tensors)
    if backend.checks_values(hidden):
        check_ids(OP, "token_ids", token_ids, weight.shape[0])
        check_ids(OP, "candidate_ids", candidate_ids, weight.shape[0])
        check_batch(OP, batch)
    ids = torch.cat([token_ids[:, None], candidate_ids], 1)  # (N, 1 + K)
    loss, token_loss, candidate_loss, metrics, *saved = IMPLS[impl].forward(
        hidden, weight, bias, ids, batch, transform, objective, form, max_workspace_bytes, deterministic
    )  # fmt: skip
    return loss, token_loss, candidate_loss, metrics, saved


def linear_distrl_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    candidate_ids: Tensor,
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
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    max_workspace_bytes: int | None = None,
    deterministic: bool = False,
    impl: str | None = None,
) -> DistRLLoss:
    """The DistRL policy loss L_token + alpha * L_candidates (Eq. 11, 12, 14) from hidden states.

    Equal to: linear_logprobs of token_ids and candidate_ids, clipped_surrogate of each branch, candidates
        weighted by pi_old = exp(old_candidate_logprobs), reduced as below.

    Args:
        hidden, weight, bias, logit_scale, softcap, temperature, max_workspace_bytes, deterministic: as in
            `linear_logprobs`.
        token_ids: (N,) int64 or int32 below V, the sampled tokens. Any negative id is "no token". One from V
            on, where that is not checked, is a token of probability 0: no gradient, and an infinite KL.
        candidate_ids: (N, K) likewise; unused slots -1. Duplicates add their gradients.
        old_logprobs, old_candidate_logprobs: (N,), (N, K) float, under the behaviour policy; -inf marks an
            unused element, which adds no loss, gradient or count. No gradient.
        advantages, candidate_advantages: (N,), (N, K) float. No gradient.
        cu_seqlens: (B+1,) int32 sequence edges, from 0 to N; an empty sequence counts in B and adds 0. With
            more leading dimensions, (B, T, D), of the rows of all per-row inputs laid end to end.
        alpha: finite weight of the candidate branch.
        clip_low, clip_high, dual_clip: as in `clipped_surrogate`; candidate_clip_low, candidate_clip_high
            default to clip_low, clip_high.
        reduction: "sequence_mean" (1/B sum_b 1/T_b sum_t) | "token_mean" (1/N sum_t).
        candidate_reduction: None (as reduction) | "sequence_mean" | "token_mean" | "old_prob_mean" (sum /
            sum of pi_old).
        token_denominator, candidate_denominator: number or 0-d tensor replacing the divisor computed from
            this call (B, N or the sum of pi_old), so that the losses of micro-batches add up to the whole
            batch's.
        impl: None | "torch" | "cpp" | "triton", see `backends()`.

    A row none of whose elements has a gradient (unused, clipped, A = 0) gets an exact 0 in dhidden and adds
        nothing to dweight and dbias. On the CPU such rows are left out of both gradient matmuls (with oneDNN,
        zeros fill the others up to a multiple of 128); on Triton these two, the vendor's, still cover all
        rows of a block, since a count would need a sync.

    Returns: DistRLLoss, fp32 (fp64 for fp64 hidden). Only `loss` is differentiable (once, in hidden, weight
        and bias); token_loss, candidate_loss and metrics are detached. metrics maps the names in
        `DISTRL_METRICS` to (sum, count). A backward that frees the graph scales the formed gradients in
        place; with retain_graph=True it scales copies, a second (V, D) fp32 tensor for a trainable head; so
        it does per entry of a batch of upstream gradients (is_grads_batched, vmap), which excludes
        create_graph=True.
        A used row whose hidden holds a NaN makes the losses, the KL metrics, its dhidden and dweight NaN.
    Raises: ValueError as `linear_logprobs`, and on wrong shapes, options, denominators, or cu_seqlens that do
        not rise from 0 to N. RuntimeError on double backward.
    """
    numbers = prepare(OP, hidden, weight, bias, logit_scale, softcap, temperature, max_workspace_bytes)
    check_row_ids(OP, "token_ids", token_ids, hidden, (1,))
    check_row_ids(OP, "candidate_ids", candidate_ids, hidden, (2,))
    check_cu_seqlens_shape(OP, cu_seqlens, hidden)
    floats = checked_floats(
        OP, hidden, out_dtype(hidden), token_ids.shape, candidate_ids.shape, old_logprobs=old_logprobs,
        old_candidate_logprobs=old_candidate_logprobs, advantages=advantages,
        candidate_advantages=candidate_advantages,
    )  # fmt: skip
    options = checked_options(
        OP, alpha, clip_low, clip_high, candidate_clip_low, candidate_clip_high, dual_clip, reduction,
        candidate_reduction,
    )  # fmt: skip
    denominators = [
        denominator_tensor(OP, "token_denominator", token_denominator, floats[0]),
        denominator_tensor(OP, "candidate_denominator", candidate_denominator, floats[0]),
    ]
    rows = hidden.shape[:-1]
    hidden = flat_rows(hidden, rows)
    token_ids, candidate_ids, *floats = (flat_rows(x, rows) for x in (token_ids, candidate_ids, *floats))
    tracked = torch.is_grad_enabled()
    loss, token_loss, candidate_loss, metrics, _ = _linear_distrl_loss(
        hidden, weight, bias, token_ids.long(), candidate_ids.long(), *floats, cu_seqlens, *denominators,
        *numbers, *options,
        [tracked and x is not None and x.requires_grad for x in (hidden, weight, bias)],
        max_workspace_bytes, bool(deterministic), backend.choose(OP, IMPLS, impl, hidden),
    )  # fmt: skip
    return DistRLLoss(loss, token_loss, candidate_loss, named_metrics(metrics))
