"""One policy step behind the rollouts, end to end: behaviour pass, reward-model update and score, policy
update, at 8 x 2048 (GPU) or 8 x 256 (CPU) tokens.

The yardstick is GRPO with the same reward model, without candidates; DistRL adds the exact candidates of the
behaviour pass, their log-probs under the reward model and their branch of the loss. GRPO alone has no reward
model. The temperature is chosen so that a token has 1.33 candidates on average. MiB are above weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.models import qwen3, ragged_batch, title
from ipvrm.advantages import distrl_advantages, outcome_advantages, temporal_difference
from ipvrm.model import response_logprobs
from ipvrm.objectives import ipvrm_loss
from ipvrm.policy_loss import CandidateConfig, PolicyLossConfig
from ipvrm.training.baselines import per_token
from ipvrm.training.online_reward import token_and_candidate_logprobs
from ipvrm.training.policy_model import PolicyLoss, behaviour
from ipvrm.training.policy_rollouts import Targets

OP = "policy_step"
CANDIDATES = 1.33  # per token, the paper's Table 11


def cases(device: str, quick: bool) -> Iterator[Case]:
    policy, reward = qwen3(device, quick), qwen3(device, quick)
    batch = ragged_batch(device, policy.config.vocab_size, quick)
    B = len(batch.outcome)
    group = torch.arange(B, device=device) // 4
    temperature = calibrated(policy, batch)

    def scored(candidates: CandidateConfig | None, alpha: float) -> tuple[Tensor, ...]:
        old = behaviour(policy, batch, candidates, temperature)
        loss = ipvrm_loss(
            response_logprobs(reward, batch, temperature) - old.logprobs, batch.cu_seqlens, batch.outcome
        )[0]
        reward_gradients = torch.autograd.grad(loss, list(reward.parameters()))
        with torch.no_grad():
            sampled, others = token_and_candidate_logprobs(reward, batch, old.candidate_ids, temperature)
        found = distrl_advantages(
            temporal_difference(sampled, old.logprobs, batch.cu_seqlens),
            temporal_difference(others, old.candidate_logprobs, batch.cu_seqlens),
            batch.outcome,
            batch.cu_seqlens,
            group,
            B // 4,
        )
        targets = Targets(
            old.candidate_ids,
            old.logprobs,
            old.candidate_logprobs,
            found.advantages,
            found.candidate_advantages,
        )
        return *updated(targets, alpha), *reward_gradients

    def updated(targets: Targets, alpha: float) -> tuple[Tensor, ...]:
        module = PolicyLoss(policy, PolicyLossConfig(alpha=alpha), temperature)
        found = module(batch, targets, float(B), float(B))
        return found.token_loss, *torch.autograd.grad(found.loss, list(policy.parameters()))

    def outcome_alone() -> tuple[Tensor, ...]:
        old = behaviour(policy, batch, None, temperature)
        advantages = per_token(outcome_advantages(batch.outcome, group, B // 4), batch.cu_seqlens)
        none = old.candidate_logprobs
        return updated(Targets(old.candidate_ids, old.logprobs, none, advantages, none), 0.0)

    def check(results: Mapping[str, Any]) -> None:
        expected, mine = results["grpo_prm"], results["distrl"]
        assert_close("token loss", mine[0], expected[0], 1e-2 if device == "cuda" else 1e-4)
        assert_close("reward gradient", mine[-1], expected[-1], 1e-2 if device == "cuda" else 1e-4)

    contenders = {
        "grpo_prm": lambda: scored(None, 0.0),
        "distrl": lambda: scored(CandidateConfig(), 0.1),
        "grpo": outcome_alone,
    }
    yield Case(OP, title(policy, batch), contenders, check)


def calibrated(policy: Any, batch: Any) -> float:
    """The temperature at which a token has about `CANDIDATES` candidates.

    Random weights are flat at 1, where there is none; colder, the count rises to a peak and falls to one.
    Rows beyond the peak are like a trained model's: most have one candidate, some two or more.
    """
    grid = torch.logspace(0, -4, 41).tolist()
    counts = [
        float((behaviour(policy, batch, CandidateConfig(), t).candidate_ids >= 0).sum(1).float().mean())
        for t in grid
    ]
    colder = range(counts.index(max(counts)), len(grid))
    return grid[min(colder, key=lambda i: abs(counts[i] - CANDIDATES))]
