"""What the policy that sampled responses knows of their tokens: log-probs, entropy and candidates."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch
from ipvrm.losses.policy_loss import CandidateConfig, select_candidates
from ipvrm.models.causal_lm import head, hidden_states
from ipvrm_kernels import linear_logprobs


class Behaviour(NamedTuple):
    """Of n response tokens under the policy that sampled them; K = 0 without candidates."""

    logprobs: Tensor  # (n,) fp32, of the sampled tokens
    entropy: Tensor  # (n,) nats
    candidate_ids: Tensor  # (n, K) int64, -1 at unused slots
    candidate_logprobs: Tensor  # (n, K), -inf there


@torch.no_grad()
def behaviour(
    policy: nn.Module, batch: Batch, candidates: CandidateConfig | None, temperature: float
) -> Behaviour:
    """Log-probs, entropy and candidates of every response token, in one pass over the vocabulary."""
    parts, hidden = head(policy), hidden_states(policy, batch)
    options: dict[str, Any] = {"return_entropy": True, "temperature": temperature, **parts.transform()}
    if candidates is None:
        found = linear_logprobs(hidden, parts.weight, batch.token_ids, **options)
        none = batch.token_ids.new_empty(len(hidden), 0)
        return Behaviour(
            found.logprobs, cast(Tensor, found.entropy), none, found.logprobs.new_empty(none.shape)
        )
    chosen = select_candidates(
        hidden, parts.weight, batch.token_ids, batch.cu_seqlens, config=candidates, **options
    )
    sampled, entropy = cast(Tensor, chosen.sampled_logprobs), cast(Tensor, chosen.entropy)
    return Behaviour(sampled, entropy, chosen.ids, chosen.logprobs)
