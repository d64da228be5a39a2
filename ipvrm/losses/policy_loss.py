"""The two-branch policy loss of DistRL (stage B): its settings, its candidates, and the loss on log-probs.

    L_token      = - mean_b 1/T_b sum_t min(rho A, clip(rho, 1 - lo, 1 + hi) A)                        Eq. 12
    L_candidates = - mean_b 1/T_b sum_t sum_{c in C_t} pi_old(c) min(rho_c td~_c, clip(rho_c) td~_c)   Eq. 11
    L            = L_token + alpha * L_candidates                                                      Eq. 14

From hidden states the loss is `linear_distrl_loss(..., **PolicyLossConfig.preset(name).options())`, which
never forms logits; `distrl_loss` is the same function of log-probs that one already has. Shapes: N response
tokens of B packed sequences, edges in `cu_seqlens` (B + 1,) int32; K candidates, unused slots id -1 and
log-prob -inf.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ipvrm.losses.advantages import last_tokens
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.losses.prompt_groups import check_edges, check_like, described
from ipvrm_kernels import Candidates, DistRLLoss, clipped_surrogate, linear_candidates
from ipvrm_kernels.backend import checks_values
from ipvrm_kernels.distrl_objective import METRICS, check_candidates, check_denominator, normal_probs

REDUCTIONS = ("sequence_mean", "token_mean")


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of `distrl_loss` and, under the same names, of `linear_distrl_loss`. Defaults: `paper`."""

    alpha: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.28
    candidate_clip_low: float = 0.2
    candidate_clip_high: float = 0.28
    dual_clip: float | None = None
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    candidate_reduction: Literal["sequence_mean", "token_mean", "old_prob_mean"] = "sequence_mean"

    @classmethod
    def preset(cls, name: Preset) -> "PolicyLossConfig":
        """`paper`, or `release`: what the released code does."""
        return by_preset(
            name,
            paper=cls(),
            release=cls(
                candidate_clip_high=0.2,
                dual_clip=3.0,
                reduction="token_mean",
                candidate_reduction="old_prob_mean",
            ),
        )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_distrl_loss`."""
        return asdict(self)


def distrl_loss(
    logprobs: Tensor,
    candidate_logprobs: Tensor,
    old_logprobs: Tensor,
    old_candidate_logprobs: Tensor,
    advantages: Tensor,
    candidate_advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    config: PolicyLossConfig = PolicyLossConfig(),
    token_denominator: float | Tensor | None = None,
    candidate_denominator: float | Tensor | None = None,
) -> DistRLLoss:
    """The loss of `linear_distrl_loss` from log-probs: the same value, branches, metrics and gradients.

    Args:
        logprobs: (N,) float, nats, of the sampled tokens under the policy, with gradient.
        candidate_logprobs: (N, K) likewise, of the candidates.
        old_logprobs, old_candidate_logprobs: (N,), (N, K) under the behaviour policy; -inf marks an unused
            element, which adds no loss, gradient or count.
        advantages, candidate_advantages: (N,), (N, K), see `ipvrm.losses.advantages.distrl_advantages`.
        cu_seqlens: (B + 1,) int32; an empty sequence counts in B and adds 0.
        config: `PolicyLossConfig.preset("paper" | "release")`, or one's own.
        token_denominator, candidate_denominator: replace the divisor computed from this call (B, N or the sum
            of pi_old), so that the losses of micro-batches add up to the whole batch's.

    Returns:
        DistRLLoss(loss, token_loss, candidate_loss, metrics) of 0-d fp32 tensors (fp64 for fp64 log-probs);
        only `loss` has a gradient, in both log-probs, once. metrics: {name: (sum, count)}.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, clips or denominators out
            of range, or edges that do not rise from 0 to N. Values of tensors are checked on the CPU, and
            under `set_checks(True)`; not while torch.compile traces.
    """
    op = "distrl_loss"
    if logprobs.dim() != 1 or candidate_logprobs.dim() != 2:
        raise ValueError(
            f"{op}: logprobs must be (N,) and candidate_logprobs (N, K), got {described(logprobs)} and "
            f"{described(candidate_logprobs)}"
        )
    N, K = logprobs.shape[0], candidate_logprobs.shape[-1]
    for name, x, shape in (
        ("logprobs", logprobs, (N,)),
        ("candidate_logprobs", candidate_logprobs, (N, K)),
        ("old_logprobs", old_logprobs, (N,)),
        ("old_candidate_logprobs", old_candidate_logprobs, (N, K)),
        ("advantages", advantages, (N,)),
        ("candidate_advantages", candidate_advantages, (N, K)),
    ):
        check_like(op, name, x, logprobs, shape)
    check_edges(op, cu_seqlens, logprobs)
    for name, given, offered in (
        ("reduction", config.reduction, REDUCTIONS),
        ("candidate_reduction", config.candidate_reduction, (*REDUCTIONS, "old_prob_mean")),
    ):
        if given not in offered:
            raise ValueError(f"{op}: {name} must be one of {', '.join(offered)}, got {given!r}")
    _check_denominator(op, "token_denominator", token_denominator, logprobs)
    _check_denominator(op, "candidate_denominator", candidate_denominator, logprobs)
    if candidate_denominator is not None and checks_values(logprobs):
        check_candidates(op, float(candidate_denominator), old_candidate_logprobs != -math.inf)

    token = clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    like = token.loss
    old = old_candidate_logprobs.detach().to(like.dtype)
    old_prob = normal_probs(old)  # (N, K), 0 at unused slots and where it underflows
    counts = old_prob != 0  # elsewhere rho may be infinite: clipped counts, but neither loss nor gradient
    candidates = clipped_surrogate(
        torch.where(counts, candidate_logprobs, candidate_logprobs.detach()),
        old,
        candidate_advantages,
        clip_low=config.candidate_clip_low,
        clip_high=config.candidate_clip_high,
        dual_clip=config.dual_clip,
    )
    with torch.no_grad():
        weight = _row_weights(config.reduction, cu_seqlens, like, token_denominator)
        if config.candidate_reduction == "old_prob_mean":
            divisor = torch.as_tensor(
                old_prob.sum() if candidate_denominator is None else candidate_denominator,
                dtype=like.dtype,
                device=like.device,
            )
            candidate_weight = old_prob * torch.where(divisor != 0, 1 / divisor, 0.0)
        else:
            rows = _row_weights(config.candidate_reduction, cu_seqlens, like, candidate_denominator)
            candidate_weight = old_prob * rows[:, None]
        counts = counts & (candidate_weight != 0)  # NaN counts
    token_loss = (weight * token.loss).sum()
    candidate_loss = torch.where(counts, candidate_weight * candidates.loss, 0.0).sum()
    loss = token_loss + config.alpha * candidate_loss
    with torch.no_grad():
        new, new_candidates = logprobs.to(like.dtype), candidate_logprobs.to(like.dtype)
        used, used_candidates = old_logprobs != -math.inf, old != -math.inf
        num_tokens, num_candidates = used.sum(), used_candidates.sum()
        num_rows = torch.full_like(num_tokens, N)
        pairs = (
            (token.clipped.sum(), num_tokens),
            (token.dual_clipped.sum(), num_tokens),
            (torch.where(used, old_logprobs.to(like.dtype) - new, 0.0).sum(), num_tokens),
            (candidates.clipped.sum(), num_candidates),
            (candidates.dual_clipped.sum(), num_candidates),
            (torch.where(old_prob != 0, old_prob * (old - new_candidates), 0.0).sum(), num_candidates),
            (num_candidates, num_rows),
            (old_prob.sum(), num_rows),
        )
        metrics = {
            name: (total.to(like.dtype), count.to(like.dtype))
            for name, (total, count) in zip(METRICS, pairs, strict=True)
        }
    return DistRLLoss(loss, token_loss.detach(), candidate_loss.detach(), metrics)


def _row_weights(
    reduction: str, cu_seqlens: Tensor, like: Tensor, denominator: float | Tensor | None
) -> Tensor:
    """(N,) the factor of each row's loss."""
    N, lengths = like.shape[0], cu_seqlens.diff()
    if reduction == "sequence_mean":
        weight = (1 / lengths.to(like.dtype)).repeat_interleave(lengths, output_size=N)
        own = lengths.shape[0]
    else:
        weight, own = torch.ones_like(like), N
    return weight / (max(own, 1) if denominator is None else denominator)


def _check_denominator(op: str, name: str, given: float | Tensor | None, like: Tensor) -> None:
    if isinstance(given, Tensor):
        if given.dim():
            raise ValueError(f"{op}: {name} must be a number or 0-d, got shape {tuple(given.shape)}")
        if not checks_values(like):
            return
    if given is not None:
        check_denominator(op, name, float(given))


# -------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class CandidateConfig:
    """Which tokens the candidate branch asks, by their probability under the behaviour policy. Defaults:
    `paper`."""

    min_prob: float = 0.1
    """P_min: all tokens with p >= P_min."""
    top_k: int | None = None
    """At most the K best of them; None for all, which are at most floor(1 / P_min)."""
    strict: bool = False
    """p > P_min in place of p >= P_min."""
    keep_sampled: bool = False
    """Whether the sampled token stands in column 0, whatever its probability."""

    @classmethod
    def preset(cls, name: Preset) -> "CandidateConfig":
        """`paper`, or `release`: what the released code does."""
        return by_preset(name, paper=cls(), release=cls(top_k=5, strict=True, keep_sampled=True))


@torch.no_grad()
def select_candidates(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    config: CandidateConfig = CandidateConfig(),
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    deterministic: bool = False,
    impl: str | None = None,
) -> Candidates:
    """Candidates of every response token under the behaviour policy, and what the same pass knows of it.

    The last response token has none: it carries the outcome.

    Args:
        hidden: (N, D) states of the behaviour policy that predict the response tokens. weight: (V, D).
        token_ids: (N,) int64 or int32, the sampled tokens. cu_seqlens: (B + 1,) int32.
        config: `CandidateConfig.preset("paper" | "release")`, or one's own.
        temperature: of the rollout.
        return_entropy, bias, logit_scale, softcap, deterministic, impl: as in `linear_candidates`.

    Returns:
        Candidates(ids (N, K), logprobs (N, K), counts (N,), lse, entropy, sampled_logprobs (N,)), detached;
        unused slots -1 and -inf. `sampled_logprobs` and `logprobs` are the old log-probs of the policy loss.

    Raises:
        ValueError: from `linear_candidates`, and on edges that do not rise from 0 to N.
    """
    found = linear_candidates(
        hidden,
        weight,
        min_prob=config.min_prob if config.top_k is None else None,
        top_k=config.top_k,
        sampled=token_ids,
        return_entropy=return_entropy,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        deterministic=deterministic,
        impl=impl,
    )
    ids, logprobs = found.ids, found.logprobs
    if config.keep_sampled:
        assert found.sampled_logprobs is not None
        ids, logprobs = force_sampled(ids, logprobs, token_ids, found.sampled_logprobs)
    kept = candidate_mask(logprobs, cu_seqlens, config)
    return found._replace(
        ids=ids.masked_fill(~kept, -1), logprobs=logprobs.masked_fill(~kept, -math.inf), counts=kept.sum(1)
    )


@torch.no_grad()
def force_sampled(
    ids: Tensor, logprobs: Tensor, sampled: Tensor, sampled_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """The sampled token in column 0 of its row of top-K ids.

    It changes places with the best token if it is among the K; otherwise it enters column 0, the others move
    one column to the right and the last drops out.

    Args:
        ids, logprobs: (N, K), sorted by log-prob. sampled, sampled_logprobs: (N,).

    Returns:
        (ids, logprobs), each (N, K).

    Raises:
        ValueError: shapes that do not fit, or K = 0.
    """
    op = "force_sampled"
    if ids.dim() != 2 or not ids.shape[1] or logprobs.shape != ids.shape:
        raise ValueError(
            f"{op}: ids and logprobs must be (N, K), K >= 1, got {tuple(ids.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    for name, x in (("sampled", sampled), ("sampled_logprobs", sampled_logprobs)):
        if x.shape != ids.shape[:1]:
            raise ValueError(f"{op}: {name} must be ({ids.shape[0]},), got {tuple(x.shape)}")
    same = ids == sampled[:, None]  # (N, K)
    among = same.any(1, keepdim=True)

    def arranged(columns: Tensor, first: Tensor) -> Tensor:
        others = torch.where(among, torch.where(same, columns[:, :1], columns)[:, 1:], columns[:, :-1])
        return torch.cat([first[:, None].to(columns.dtype), others], 1)

    return arranged(ids, sampled), arranged(logprobs, sampled_logprobs)


@torch.no_grad()
def candidate_mask(
    logprobs: Tensor, cu_seqlens: Tensor, config: CandidateConfig = CandidateConfig()
) -> Tensor:
    """Which slots of log-probs (N, K) under the behaviour policy hold a candidate: (N, K) bool.

    p >= P_min (p > P_min if `strict`), and column 0 if `keep_sampled`; never a slot of log-prob -inf, and
    never one of a sequence's last token.

    Raises:
        ValueError: logprobs that are not (N, K) floating point, P_min outside (0, 1], or edges that do not
            rise from 0 to N.
    """
    op = "candidate_mask"
    if logprobs.dim() != 2 or not logprobs.is_floating_point():
        raise ValueError(f"{op}: logprobs must be (N, K) floating point, got {described(logprobs)}")
    if not 0 < config.min_prob <= 1:
        raise ValueError(f"{op}: min_prob must lie in (0, 1], got {config.min_prob}")
    low = math.log(config.min_prob)
    kept = logprobs > low if config.strict else logprobs >= low
    if config.keep_sampled:
        kept[:, :1] = logprobs[:, :1] != -math.inf
    return kept & ~last_tokens(op, cu_seqlens, logprobs)[:, None]
