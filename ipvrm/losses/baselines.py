"""Advantages of the algorithms that DistRL is compared with, each (N,) of the sampled tokens, detached.

N response tokens of B packed sequences, edges in `cu_seqlens` (B + 1,) int32; G prompts, `group` (B,) says
whose rollout a sequence is; `outcome` (B,) is 0 or 1. GRPO's own advantage, and the first term of several
others, is `outcome_advantages`; Eq. 13, of `grpo_prm` and `distrl`, is `distrl_advantages`.
"""

import torch
from torch import Tensor

from ipvrm.losses.advantages import EPS, StdFloor, gae, outcome_advantages, whiten
from ipvrm.losses.prompt_groups import PromptGroups, segment_sums
from ipvrm_kernels import segment_scan


def per_token(of_sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) to (N,): what a sequence has, at each of its tokens."""
    return of_sequence.repeat_interleave(cu_seqlens.diff(), output_size=int(cu_seqlens[-1]))


@torch.no_grad()
def prime_advantages(
    rewards: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    batch_norm: bool = True,
) -> Tensor:
    """PRIME (arXiv 2502.01456, Eq. 5, and its released code): whitened returns of two leave-one-out rewards.

        r_T <- 0                                                          the last token has the outcome
        r_t <- r_t / (max_{b,t} |sum_{i>=t} r_{b,i}| + 1e-6)       with batch_norm, over the whole batch
        process_t = n/(n-1) * r_t - 1/(n-1) * sum_k mean_t r_{k,t}        over the n rollouts k of the prompt
        outcome   = n/(n-1) * o   - 1/(n-1) * sum_k o_k                   at the last token
        return_t  = sum_{i>=t} (process_i + outcome_i),    advantage = whiten(return) over all tokens

    Each is the reward minus the mean of the other rollouts, scaled so that the own one takes part.

    Args:
        rewards: (N,) r_t = beta * log-ratio of the implicit reward model, at every token.
        batch_norm: PRIME's and verl's `batch_norm`, their default; the paper does not name it, nor that the
            last token has no process reward. On several ranks they take the largest return of each rank,
            this function that of what it is given, which is the whole batch.
    """
    last_token = cu_seqlens[1:].long() - 1
    rewards = rewards.index_fill(0, last_token, 0.0)
    if batch_norm and len(rewards):
        rewards = rewards / (gae(rewards, cu_seqlens, lam=1.0).abs().max() + 1e-6)
    groups = PromptGroups("prime_advantages", group, num_groups)
    lengths = cu_seqlens.diff()
    n = groups.spread(groups.sums(torch.ones_like(outcome)))  # (B,)
    others = (n - 1).clamp(min=1)
    means = segment_sums(rewards, cu_seqlens) / lengths.clamp(min=1)  # (B,)
    baseline = groups.spread(groups.sums(means)) / others
    process = per_token(n / others, cu_seqlens) * rewards - per_token(baseline, cu_seqlens)
    last = outcome * n / others - groups.spread(groups.sums(outcome)) / others
    process[last_token] += last
    return whiten(gae(process, cu_seqlens, lam=1.0))


@torch.no_grad()
def reinforce_qrm_advantages(token_values: Tensor) -> Tensor:
    """REINFORCE with Q-RM: Z_t / (std of Z over all tokens of the rollout batch + eps), not centred, as in
    Q-RM's released code (Chen et al., ICML 2025).

    Args:
        token_values: (N,) of the value head, see `ipvrm.models.token_rewards`.
    """
    return token_values / (token_values.std(correction=0) + EPS)


@torch.no_grad()
def spro_advantages(
    log_ratio: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    beta: float,
    std_floor: StdFloor = "add",
) -> Tensor:
    """SPRO (arXiv 2507.01551, Eq. 11 and 12): masked step advantage of the policy's own process reward, and
    the outcome.

        R_{k,t} = beta * sum_{i<=t} log pi_old / pi_ref        MSA_{k,t} = R_{k,t} - mean of R_{j,t} over the
        rollouts j of the prompt that reach token t            advantage = MSA + (o - mu) / (s + eps)

    The paper's R also holds V(s_0), the same for all rollouts of a prompt: it cancels in MSA.

    Args:
        log_ratio: (N,) of the sampled tokens, policy against the starting policy.
    """
    cumulative = segment_scan(beta * log_ratio, cu_seqlens)  # (N,)
    first = cu_seqlens[:-1].long()
    step = torch.arange(len(log_ratio), device=log_ratio.device) - per_token(first, cu_seqlens)
    longest = int(cu_seqlens.diff().max())
    cell = per_token(group.long(), cu_seqlens) * longest + step  # (N,) one per prompt and position
    alive = PromptGroups("spro_advantages", cell, num_groups * longest)
    mean = alive.sums(cumulative) / alive.sums(torch.ones_like(cumulative)).clamp(min=1)
    outcomes = outcome_advantages(outcome, group, num_groups, std_floor=std_floor)
    return cumulative - alive.spread(mean) + per_token(outcomes, cu_seqlens)
