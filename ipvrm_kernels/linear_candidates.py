"""linear_candidates: every token with p >= min_prob, exactly, from hidden states, without logits.

C_n = {v : log p_v >= log min_prob} (P_min of Eq. 11), the best top_k of them if both are given, or the
plain top_k. At most floor(1 / min_prob) tokens can qualify, so K is static and the result exact. Sorted by
log-prob descending, ties to the lower id; unused slots hold id -1 and log-prob -inf.

Shapes: hidden (N, D), weight (V, D), result (N, K). Fast because a partial log-sum-exp already bounds the
threshold from below, so that few columns are ever looked at twice; only the reference below sorts an (N,
V) tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, head_cpu
from .head import (
    Transform,
    check_ids,
    check_row_ids,
    out_dtype,
    prepare,
    select_ids,
    times_log,
    transformed_logits,
)


class Candidates(NamedTuple):
    """ids (N, K) int64, logprobs (N, K), counts (N,) int64 used slots, lse (N,), entropy (N,) or None,
    sampled_logprobs (N,) or None; fp32 (fp64 for fp64 inputs), nats."""

    ids: Tensor
    logprobs: Tensor
    counts: Tensor
    lse: Tensor
    entropy: Tensor | None
    sampled_logprobs: Tensor | None


def linear_candidates_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids, logprobs, counts, lse, entropy, sampled_logprobs) in plain PyTorch: a stable sort of each row."""
    z = transformed_logits(hidden, weight, bias, transform)
    log_p = torch.log_softmax(z, 1)
    best, order = torch.sort(log_p, dim=1, descending=True, stable=True)  # stable: ties to the lower id
    best, order = best[:, :K], order[:, :K]
    kept = best > -math.inf if min_prob is None else best >= math.log(min_prob)
    missing = K - best.shape[1]  # top_k > V
    ids = torch.nn.functional.pad(torch.where(kept, order, -1), (0, missing), value=-1)
    logprobs = torch.nn.functional.pad(torch.where(kept, best, -math.inf), (0, missing), value=-math.inf)
    absent = z.new_empty(0)
    return (
        ids, logprobs, kept.sum(1), torch.logsumexp(z, 1),
        -times_log(log_p.exp(), log_p).sum(1) if return_entropy else absent,
        absent.clone() if sampled is None else select_ids(log_p, sampled[:, None])[:, 0],
    )  # fmt: skip


def _cpp_candidates(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact {p >= min_prob}; a plain top-k picks by z, so tokens whose z differ by less than a log-prob's
    rounding come best first rather than by id."""
    if min_prob is None:
        rule = head_cpu.Candidates(min(K, weight.shape[0]), -math.inf)
    else:
        rule = head_cpu.Candidates(num_slots("linear_candidates", min_prob, None), math.log(min_prob))
    ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64) if sampled is None else sampled[:, None]
    result = head_cpu.forward(
        "linear_candidates", hidden, weight, bias, ids, transform, entropy=return_entropy, candidates=rule,
        slots=K, deterministic=deterministic,
    )  # fmt: skip
    sampled_logprobs = result.lse.new_empty(0) if sampled is None else result.logprobs.view(-1)
    return (
        result.candidate_ids, result.candidate_logprobs, result.counts, result.lse, result.entropy,
        sampled_logprobs,
    )  # fmt: skip


IMPLS = {"cpp": _cpp_candidates, "torch": linear_candidates_reference}


@torch.library.custom_op("ipvrm::linear_candidates", mutates_args=())
def _candidates_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None,
    scale: float, softcap: float | None, temperature: float, dtype: torch.dtype,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if sampled is not None and backend.checks_values(sampled):
        check_ids("linear_candidates", "sampled", sampled, weight.shape[0])
    transform = Transform(scale, softcap, temperature, dtype)
    return IMPLS[impl](hidden, weight, bias, sampled, transform, min_prob, K, return_entropy, deterministic)


@_candidates_op.register_fake
def _(hidden, weight, bias, sampled, scale, softcap, temperature, dtype, min_prob, K, return_entropy,
      deterministic, impl):  # fmt: skip
    N = hidden.shape[0]
    lse = hidden.new_empty(N, dtype=out_dtype(hidden))
    return (
        lse.new_empty((N, K), dtype=torch.int64), lse.new_empty(N, K), lse.new_empty(N, dtype=torch.int64),
        lse, lse.new_empty(N if return_entropy else 0), lse.new_empty(0 if sampled is None else N),
    )  # fmt: skip


def num_slots(op: str, min_prob: float | None, top_k: int | None) -> int:
    """K: top_k, else floor(1 / min_prob + 1e-4), which no row can exceed."""
    if min_prob is None and top_k is None:
        raise ValueError(f"{op}: give min_prob, top_k or both, got neither")
    if min_prob is not None and not 1 / 128 <= min_prob <= 1:
        raise ValueError(
            f"{op}: min_prob must lie in [1/128, 1], got {min_prob}; for a fixed number of tokens pass "
            "min_prob=None and top_k"
        )
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"{op}: top_k must be an integer >= 1, got {top_k!r}")
        return top_k
    assert min_prob is not None
    return math.floor(1 / min_prob + 1e-4)


def linear_candidates(
    hidden: Tensor,
    weight: Tensor,
    *,
    min_prob: float | None = 0.1,
    top_k: int | None = None,
    sampled: Tensor | None = None,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    deterministic: bool = False,
    impl: str | None = None,
) -> Candidates:
    """The exact candidate set {p >= min_prob} of each row of softmax(z), z as in `linear_logprobs`; no
    gradient.

    Args:
        hidden, weight, bias, logit_scale, softcap, temperature, deterministic: as in `linear_logprobs`.
        min_prob: P_min in [1/128, 1]; None for plain top-k.
        top_k: number of slots K; with min_prob the best top_k of the set. Default K: floor(1/min_prob +
            1e-4).
        sampled: (N,) int64 or int32 in [-1, V), the sampled tokens, whose log-probs come out of the same
            pass.
        return_entropy: whether to compute the entropy.
        impl: None | "torch" | "cpp" | "triton" | "cuda", see `backends()`.

    Returns: Candidates, detached; sorted by log-prob descending, ties to the lower id; unused slots -1 and
    -inf.
    Raises: ValueError as `linear_logprobs`, and on min_prob or top_k out of range or both None.
    """
    op = "linear_candidates"
    transform = prepare(op, hidden, weight, bias, logit_scale, softcap, temperature)
    K = num_slots(op, min_prob, top_k)
    if sampled is not None:
        check_row_ids(op, "sampled", sampled, hidden, (1,))
    ids, logprobs, counts, lse, entropy, sampled_logprobs = _candidates_op(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        None if sampled is None else sampled.long(), *transform,
        None if min_prob is None else float(min_prob), K, bool(return_entropy), bool(deterministic),
        backend.choose(op, IMPLS, impl, hidden),
    )  # fmt: skip
    return Candidates(
        ids, logprobs, counts, lse,
        entropy if return_entropy else None, sampled_logprobs if sampled is not None else None,
    )  # fmt: skip
