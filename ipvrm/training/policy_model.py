"""The policy's loss as a module."""

from torch import Tensor, nn

from ipvrm.data.batches import Batch
from ipvrm.losses.policy_loss import PolicyLossConfig
from ipvrm.models.causal_lm import head, hidden_states, response_logprobs
from ipvrm.training.policy_rollouts import Targets
from ipvrm_kernels import DistRLLoss, distrl_loss, linear_distrl_loss


class PolicyLoss(nn.Module):
    """`linear_distrl_loss` of a micro-batch: a distributed wrapper sees body and head in one forward.

    Args:
        ratio: False for REINFORCE: the policy is compared with itself, so that the ratio is 1 whatever the
            policy that sampled, nothing is clipped, and the gradient is that of - A log pi. No candidates.
    """

    def __init__(self, model: nn.Module, config: PolicyLossConfig, temperature: float, ratio: bool = True):
        super().__init__()
        self.model = model
        self.config = config
        self.temperature = temperature
        self.ratio = ratio

    def forward(
        self,
        batch: Batch,
        targets: Targets,
        token_denominator: float,
        candidate_denominator: float | Tensor,
    ) -> DistRLLoss:
        """The share of this micro-batch in the loss of a minibatch with these denominators."""
        if not self.ratio:
            logprobs = response_logprobs(self.model, batch, self.temperature)
            return distrl_loss(
                logprobs,
                targets.old_candidate_logprobs,
                logprobs.detach(),
                targets.old_candidate_logprobs,
                targets.advantages,
                targets.candidate_advantages,
                batch.cu_seqlens,
                token_denominator=token_denominator,
                candidate_denominator=candidate_denominator,
                **self.config.options(),
            )
        parts = head(self.model)
        return linear_distrl_loss(
            hidden_states(self.model, batch),
            parts.weight,
            batch.token_ids,
            targets.candidate_ids,
            targets.old_logprobs,
            targets.old_candidate_logprobs,
            targets.advantages,
            targets.candidate_advantages,
            batch.cu_seqlens,
            token_denominator=token_denominator,
            candidate_denominator=candidate_denominator,
            temperature=self.temperature,
            **self.config.options(),
            **parts.transform(),
        )
