"""Advantages of DistRL (stage B): pure functions from temporal differences and outcomes to what the policy
loss multiplies with. Nothing here has a gradient, and nothing waits for the device; values of CPU tensors are
checked, except in code that torch.compile traces.

    td_t        = beta * (log pi_phi - log pi_old); 0 at a last token, which carries the outcome       Eq. 10
    value_t     = sum_{i<=t} td_i, so that value_T = value_{T-1};  sigma_V = its std over the batch
    td~         = td / (sigma_V + eps), of sampled tokens and of candidates                            Eq. 25
    x_t         = (td~_t - mean) / (std + eps), moments over all tokens of the prompt's rollouts       Eq. 27
    gae_t       = x_t + discount * lam * gae_{t+1}                                                     Eq. 8
    advantage_t = (r - mu) / (s + eps) + gae_coef * gae_t, moments over the prompt's rollouts          Eq. 13

Moments are population moments, in two passes so that nothing cancels. Shapes: N response tokens of B packed
sequences, edges in `cu_seqlens` (B + 1,) int32; K candidates; G prompts, `group` (B,) says whose rollout a
sequence is. Floats are fp32 (fp64 in, fp64 out). `reduce` joins the batches of all ranks to one
(`ipvrm.losses.prompt_groups`).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ipvrm.errors import IpvrmError
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.losses.prompt_groups import (
    PromptGroups,
    Reduce,
    batch_moments,
    check_edges,
    check_like,
    checked_outcome,
    described,
    moments,
    one_rank,
    segment_sums,
    wide,
)
from ipvrm_kernels import segment_scan

EPS = 1e-6
StdFloor = Literal["add", "clamp"]


@dataclass(frozen=True)
class AdvantageConfig:
    """How advantages are formed. The defaults are the preset `paper`."""

    discount: float = 1.0
    lam: float = 0.95
    gae_coef: float = 1.0
    """Weight of GAE beside the outcome (Eq. 13)."""
    gae_moments: Literal["group", "batch"] = "group"
    """What td~ is centred with before the scan: group, the mean and std of the prompt's tokens (Eq. 27, 28);
    batch, the mean of all tokens alone."""
    whiten: bool = False
    """Whether GAE is whitened over the batch, with the n/(n-1) variance."""
    std_floor: StdFloor = "add"
    """How a std becomes a divisor: std + 1e-6, or max(std, 1e-6)."""

    def __post_init__(self) -> None:
        for name in ("discount", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise IpvrmError(f"AdvantageConfig: {name} must lie in [0, 1]; got {getattr(self, name)}")
        if not math.isfinite(self.gae_coef):
            raise IpvrmError(f"AdvantageConfig: gae_coef must be finite; got {self.gae_coef}")
        for name, offered in (("gae_moments", ("group", "batch")), ("std_floor", ("add", "clamp"))):
            if getattr(self, name) not in offered:
                raise IpvrmError(
                    f"AdvantageConfig: {name} must be {' or '.join(offered)}; got {getattr(self, name)!r}"
                )

    @classmethod
    def preset(cls, name: Preset) -> "AdvantageConfig":
        """`paper`, or `release`: what the released code does."""
        return by_preset(
            name,
            paper=cls(),
            release=cls(lam=1.0, gae_coef=0.05, gae_moments="batch", whiten=True, std_floor="clamp"),
        )


class Advantages(NamedTuple):
    """Results of `distrl_advantages`, detached; advantages is outcome_advantages + gae_coef * gae."""

    advantages: Tensor  # (N,) for the sampled tokens, Eq. 13
    candidate_advantages: Tensor  # (N, K) td~ of the candidates, Eq. 25
    outcome_advantages: Tensor  # (B,)
    gae: Tensor  # (N,) as it enters the sum: whitened if the config says so
    value_std: Tensor  # () sigma_V, without the floor


# ---------------------------------------------------------------------------------- temporal differences


@torch.no_grad()
def temporal_difference(
    rm_logprobs: Tensor, old_logprobs: Tensor, cu_seqlens: Tensor, *, beta: float = 10.0
) -> Tensor:
    """td = beta * (log pi_phi - log pi_old) (Eq. 10), of the sampled tokens or of the candidates.

    0 at each sequence's last token and at unused elements (old log-prob -inf), whatever else is there.

    Args:
        rm_logprobs: (N,) or (N, K) float, nats, at the rollout temperature, under the reward model.
        old_logprobs: the same shape, under the behaviour policy (another reference where a baseline has one).
        cu_seqlens: (B + 1,) int32.
        beta: finite scale of the reward.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, beta, or edges that do not rise from 0 to N.
    """
    op = "temporal_difference"
    if rm_logprobs.dim() not in (1, 2) or not rm_logprobs.is_floating_point():
        raise ValueError(
            f"{op}: rm_logprobs must be (N,) or (N, K) floating point, got {described(rm_logprobs)}"
        )
    check_like(op, "old_logprobs", old_logprobs, rm_logprobs, rm_logprobs.shape)
    if not -math.inf < beta < math.inf:  # a comparison, which torch.compile can trace of a symbolic number
        raise ValueError(f"{op}: beta must be finite, got {beta}")
    counted = old_logprobs != -math.inf
    ends = last_tokens(op, cu_seqlens, rm_logprobs)
    counted &= ~(ends if counted.dim() == 1 else ends[:, None])
    return torch.where(counted, beta * (wide(rm_logprobs) - wide(old_logprobs)), 0.0)


def last_tokens(op: str, cu_seqlens: Tensor, packed: Tensor) -> Tensor:
    """(N,) bool, the last token of each sequence of `packed` (N, ...). Raises ValueError on bad edges."""
    check_edges(op, cu_seqlens, packed)
    starts = torch.zeros(packed.shape[0] + 1, dtype=torch.bool, device=packed.device)
    # an empty sequence marks the edge of its neighbour again
    return starts.index_fill_(0, cu_seqlens[1:].long(), True)[1:]


# -------------------------------------------------------------------------------------------- advantages


@torch.no_grad()
def gae(td: Tensor, cu_seqlens: Tensor, *, discount: float = 1.0, lam: float = 0.95) -> Tensor:
    """sum_{i>=t} (discount * lam)^(i - t) td_i in each sequence (Eq. 8): (N,) fp32 from td (N,).

    Raises:
        ValueError: from `ipvrm_kernels.segment_scan`.
    """
    return segment_scan(td, cu_seqlens, discount * lam, reverse=True)


@torch.no_grad()
def whiten(x: Tensor, reduce: Reduce | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all elements of x (N,) and all ranks, var with n/(n-1)."""
    size, mean, std = batch_moments(wide(x), reduce or one_rank)
    variance = std.square() * size / (size - 1).clamp(min=1)
    return (x - mean) / (variance + 1e-8).sqrt()


@torch.no_grad()
def outcome_advantages(
    outcome: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    std_floor: StdFloor = "add",
    reduce: Reduce | None = None,
) -> Tensor:
    """(r - mu) / (s + eps) within the rollouts of each prompt, population moments: the first term of Eq. 13.

    Args:
        outcome: (B,) 0 or 1. group: (B,) int, the prompt of each rollout. num_groups: G.
        std_floor: the divisor is s + 1e-6 (add) or max(s, 1e-6) (clamp).
        reduce: sums over ranks, see `ipvrm.losses.prompt_groups`.

    Returns:
        (B,) fp32; 0 where a prompt's outcomes agree, and for a single rollout.

    Raises:
        ValueError: shapes, dtypes, an outcome other than 0 and 1, or a group outside [0, G).
    """
    op = "outcome_advantages"
    outcome = checked_outcome(op, outcome, group)
    return _outcome_term(outcome, PromptGroups(op, group, num_groups), std_floor, reduce or one_rank)


def _outcome_term(outcome: Tensor, groups: PromptGroups, std_floor: StdFloor, reduce: Reduce) -> Tensor:
    num_rollouts = groups.sums(torch.ones_like(outcome))
    of_prompt = moments(outcome, num_rollouts, groups.sums, groups.spread, reduce)
    return (outcome - groups.spread(of_prompt.mean)) / _divisor(groups.spread(of_prompt.std), std_floor)


@torch.no_grad()
def distrl_advantages(
    td: Tensor,
    candidate_td: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    config: AdvantageConfig = AdvantageConfig(),
    reduce: Reduce | None = None,
) -> Advantages:
    """Advantages of a filtered rollout batch, once before it is split into minibatches (Eq. 13, 25, 27-29).

    Args:
        td: (N,) float from `temporal_difference`, 0 at last tokens.
        candidate_td: (N, K) likewise, 0 at unused slots.
        outcome: (B,) 0 or 1. cu_seqlens: (B + 1,) int32; an empty sequence counts as a rollout of its prompt.
        group: (B,) int, the prompt of each sequence, in any order. num_groups: G, over all ranks.
        config: `AdvantageConfig.preset("paper" | "release")`, or one's own.
        reduce: sums over ranks, see `ipvrm.losses.prompt_groups`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an outcome other than 0 and 1, a group outside
            [0, G), or edges that do not rise from 0 to N.
    """
    op = "distrl_advantages"
    if td.dim() != 1 or not td.is_floating_point():
        raise ValueError(f"{op}: td must be (N,) floating point, got {described(td)}")
    check_edges(op, cu_seqlens, td)
    N, B = td.shape[0], cu_seqlens.shape[0] - 1
    if candidate_td.dim() != 2:
        raise ValueError(f"{op}: candidate_td must be (N, K), got {described(candidate_td)}")
    check_like(op, "candidate_td", candidate_td, td, (N, candidate_td.shape[1]))
    outcome = checked_outcome(op, outcome, group)
    if outcome.shape != (B,) or outcome.device != td.device:
        raise ValueError(
            f"{op}: outcome must be ({B},), one per sequence, on {td.device}, got {tuple(outcome.shape)} on "
            f"{outcome.device}"
        )
    reduce = reduce or one_rank
    td, candidate_td = wide(td), wide(candidate_td)

    value_std = batch_moments(segment_scan(td, cu_seqlens), reduce).std
    scale = _divisor(value_std, config.std_floor)
    scaled = td / scale
    groups, lengths = PromptGroups(op, group, num_groups), cu_seqlens.diff()
    if config.gae_moments == "group":

        def per_token(of_group: Tensor) -> Tensor:
            return groups.spread(of_group).repeat_interleave(lengths, output_size=N)

        def sums(of_token: Tensor) -> Tensor:
            return groups.sums(segment_sums(of_token, cu_seqlens))

        of_prompt = moments(scaled, groups.sums(lengths.to(td.dtype)), sums, per_token, reduce)
        x = (scaled - per_token(of_prompt.mean)) / per_token(_divisor(of_prompt.std, config.std_floor))
    else:
        x = scaled - batch_moments(scaled, reduce).mean
    advantage = gae(x, cu_seqlens, discount=config.discount, lam=config.lam)
    if config.whiten:
        advantage = whiten(advantage, reduce)
    first = _outcome_term(outcome.to(td.dtype), groups, config.std_floor, reduce)
    of_token = first.repeat_interleave(lengths, output_size=N)
    return Advantages(
        of_token + config.gae_coef * advantage, candidate_td / scale, first, advantage, value_std
    )


def _divisor(std: Tensor, floor: StdFloor) -> Tensor:
    return std + EPS if floor == "add" else std.clamp(min=EPS)
