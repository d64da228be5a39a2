"""One policy step behind the rollouts, end to end: behaviour pass, reward-model update and score, policy
update, on 8 sequences of up to 2048 (GPU) or 256 (CPU) tokens, a quarter of that at least; on the CPU also at
the scale of `ipvrm demo`.

The yardstick is GRPO with the same reward model, without candidates; DistRL adds the exact candidates of the
behaviour pass, their log-probs under the reward model and their branch of the loss. GRPO alone has no reward
model. The temperature is chosen so that a token has 1.33 candidates on average. MiB are above weights.

The target is after the paper's Table 13: DistRL takes at most 1.15 times the time and 1.05 times the memory
of `grpo_prm`. Rollouts, their verification and the weights, alike in both, are left out here, so it is harder
to meet than in a whole step.

    python -m benchmarks.run --op policy_step --full --device cpu
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact, ExactStep, eager_logprobs, exact_logprobs
from benchmarks.suite.measure import Case, Target, assert_close
from benchmarks.suite.models import PROMPT, qwen3, ragged_batch, title
from ipvrm.data.batches import Batch, collate
from ipvrm.data.responses import Response
from ipvrm.demo.base_model import make_model, make_tokenizer
from ipvrm.demo.settings import FULL
from ipvrm.losses.advantages import distrl_advantages, outcome_advantages, temporal_difference
from ipvrm.losses.baselines import per_token
from ipvrm.losses.objectives import ipvrm_loss
from ipvrm.losses.policy_loss import CandidateConfig, PolicyLossConfig
from ipvrm.models.behaviour import behaviour
from ipvrm.models.causal_lm import candidate_logprobs, head, hidden_states, response_logprobs
from ipvrm.training.policy_model import PolicyLoss
from ipvrm.training.policy_rollouts import Targets
from ipvrm_kernels import linear_candidates

OP = "policy_step"
CANDIDATES = 1.33  # per token, the paper's Table 11
TABLE_13 = Target(1.15, "grpo_prm", memory=1.05)
DEMO_SEQUENCES = 64  # a micro-batch of the demo's policies
MIN_ROUNDS = 5  # a ratio close to its limit wants more than three


def cases(device: str, quick: bool) -> Iterator[Case]:
    policy, reward = qwen3(device, quick), qwen3(device, quick)
    batch = ragged_batch(device, policy.config.vocab_size, quick)
    yield case(policy, reward, batch, device, with_target=not quick)
    if device == "cpu":
        yield case(*demo_scale(), device, with_target=True)


def demo_scale() -> tuple[Any, Any, Batch]:
    """The demo's model, twice, and a micro-batch of its answers' lengths; random weights and tokens."""
    tokenizer = make_tokenizer()
    policy, reward = (make_model(tokenizer, FULL.hidden_size, FULL.num_layers, seed) for seed in (0, 1))
    lengths = torch.linspace(26, 54, DEMO_SEQUENCES).long().tolist()  # of three to six steps
    rows = [
        Response(tuple(torch.randint(3, len(tokenizer), (PROMPT + n,)).tolist()), PROMPT, b % 2)
        for b, n in enumerate(lengths)
    ]
    return policy.train(), reward.train(), collate(rows)


def case(policy: Any, reward: Any, batch: Batch, device: str, *, with_target: bool) -> Case:
    """The three steps with these models; their results agree where they do the same."""
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
            sampled, _, others = candidate_logprobs(reward, batch, old.candidate_ids, temperature)
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
        return *updated(targets, alpha), loss.detach(), *reward_gradients

    def exact_reward_step(logprobs: Callable[..., Tensor]) -> ExactStep:
        """Eq. 9 with log-probs of the behaviour policy and the reward model from full logits."""
        ids = batch.token_ids[:, None]
        with torch.no_grad():
            old = logprobs(hidden_states(policy, batch), head(policy).weight, ids, temperature)
        new = logprobs(hidden_states(reward, batch), head(reward).weight, ids, temperature)
        leaves = [x.detach()[:, 0].requires_grad_() for x in (old, new)]
        loss = ipvrm_loss(leaves[1] - leaves[0], batch.cu_seqlens, batch.outcome)[0]
        slopes = torch.autograd.grad(loss, leaves)
        gradients = torch.autograd.grad(new, list(reward.parameters()), slopes[1][:, None])
        return ExactStep(loss.detach(), gradients, torch.stack([s.abs().sum() for s in slopes]).sum())

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
        exact, plain = exact_reward_step(exact_logprobs), exact_reward_step(eager_logprobs)
        off = max(Exact(hidden_states(m, batch), head(m).weight).allowed for m in (policy, reward))
        for name in ("grpo_prm", "distrl"):
            got = results[name][-1 - len(exact.gradients) :]
            exact.compare(f"{name} reward", got, (plain.loss, *plain.gradients), off / temperature)

    contenders = {
        "grpo_prm": lambda: scored(None, 0.0),
        "distrl": lambda: scored(CandidateConfig(), 0.1),
        "grpo": outcome_alone,
    }
    aims = {"distrl": TABLE_13} if with_target else {}
    return Case(OP, title(policy, batch), contenders, check, min_rounds=MIN_ROUNDS, targets=aims)


@torch.no_grad()
def calibrated(policy: Any, batch: Batch) -> float:
    """The temperature at which one of the first 256 tokens has about `CANDIDATES` candidates.

    Random weights are flat at 1, where there is none; colder, the count rises to a peak and falls to one.
    Rows beyond the peak are like a trained model's: most have one candidate, some two or more.
    """
    hidden, parts = hidden_states(policy, batch)[:256], head(policy)
    grid = torch.logspace(0, -4, 10 if hidden.is_cuda else 41).tolist()  # seconds of a GPU are dear
    found = (
        linear_candidates(hidden, parts.weight, min_prob=0.1, temperature=t, **parts.transform())
        for t in grid
    )
    counts = [float((candidates.ids >= 0).sum(1).float().mean()) for candidates in found]
    colder = range(counts.index(max(counts)), len(grid))
    return grid[min(colder, key=lambda i: abs(counts[i] - CANDIDATES))]
