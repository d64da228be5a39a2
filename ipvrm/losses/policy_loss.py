"""The two-branch policy loss of DistRL (stage B): its settings and its candidates.

    L_token      = - mean_b 1/T_b sum_t min(rho A, clip(rho, 1 - lo, 1 + hi) A)                        Eq. 12
    L_candidates = - mean_b 1/T_b sum_t sum_{c in C_t} pi_old(c) min(rho_c td~_c, clip(rho_c) td~_c)   Eq. 11
    L            = L_token + alpha * L_candidates                                                      Eq. 14

The loss itself is an op of `ipvrm_kernels`: `linear_distrl_loss` from hidden states, `distrl_loss` from
log-probs that one has already, each with `**PolicyLossConfig.preset(name).options()`. Shapes: N response
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
from ipvrm.losses.prompt_groups import described
from ipvrm_kernels import Candidates, linear_candidates


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of the ops `distrl_loss` and `linear_distrl_loss`, under their names. Defaults: `paper`."""

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
        """Keyword arguments of the two ops."""
        return asdict(self)


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
