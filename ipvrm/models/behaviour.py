"""What the policy that sampled responses knows of their tokens: log-probs, entropy and candidates; and which
reward model's log-probs of the same tokens can be compared with them, and what it says of their prompts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch
from ipvrm.errors import IpvrmError
from ipvrm.losses.policy_loss import CandidateConfig, select_candidates
from ipvrm.models.causal_lm import head, hidden_states, template_hash, vocab_size
from ipvrm.models.reward_model import RewardModelInfo
from ipvrm_kernels import linear_logprobs

LOG_RATIOS = ("ipvrm", "implicit_prm", "dpo")  # objectives whose value is a sum of them


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


def check_log_ratios(folder: Path, info: RewardModelInfo, needs: str) -> None:
    """Raises IpvrmError unless the value of the reward model in `folder` is a sum of log-ratios; `needs` is
    what asks for one."""
    if info.objective not in LOG_RATIOS:
        raise IpvrmError(
            f"{folder}: objective {info.objective!r} gives no log-ratio of a model and its reference; "
            f"{needs} needs one ({', '.join(LOG_RATIOS)})"
        )


def check_same_tokens(
    folder: Path, info: RewardModelInfo, tokenizer: Any, policy_tokenizer: Any, policy_head_size: int
) -> None:
    """Raises IpvrmError unless reward model and policy mean the same text by the same tokens."""
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        raise IpvrmError(
            f"{folder}: its tokenizer is not the policy's: the same text would be other tokens, and "
            "the log-probs of policy and reward model could not be compared"
        )
    if (found := template_hash(policy_tokenizer)) != info.template_hash:
        raise IpvrmError(
            f"{folder}: it was trained with another chat template (sha256 {info.template_hash[:12]}) "
            f"than the "
            f"policy's ({found[:12]}); use one template for both"
        )
    if (own := vocab_size(folder)) != policy_head_size:
        raise IpvrmError(
            f"{folder}: its head has {own} tokens, the policy's {policy_head_size}; their probabilities "
            "are over different sets"
        )


def other_variables(folder: Path, info: RewardModelInfo, given: Mapping[str, Any]) -> str | None:
    """A line for the user where prompts are written with other variables of the chat template than the reward
    model in `folder` was trained with; None where they are the same."""
    if dict(given) == info.chat_template_kwargs:
        return None
    own, these = json.dumps(info.chat_template_kwargs), json.dumps(dict(given))
    return (
        f"{folder}: trained with --chat_template_kwargs '{own}', and these prompts are written with '{these}'"
        ": it may never have seen such prompts"
    )
