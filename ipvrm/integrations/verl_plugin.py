"""Importing this registers ipvrm with verl: the entry point of the group `verl.plugins`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.reward_score import default_compute_score

from ipvrm.data.responses import Response
from ipvrm.errors import IpvrmError
from ipvrm.integrations import verl as ours
from ipvrm.losses.advantages import AdvantageConfig
from ipvrm.losses.presets import Preset
from ipvrm.models.reward_model import RewardModel


def _estimator(preset: Preset) -> Any:
    """verl's `algorithm.gamma` and `algorithm.lam` are the discount and lambda; the rest is the preset's."""

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any = None,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        if index is None or config is None:
            raise IpvrmError(
                "adv_estimator ipvrm: verl must give the prompts' uid and the algorithm's config"
            )
        settings = replace(AdvantageConfig.preset(preset), discount=config.gamma, lam=config.lam)
        found = ours.advantages(token_level_rewards, response_mask, index, config=settings)
        return found, found

    return estimate


for _name, _preset in ours.ESTIMATORS.items():
    register_adv_est(_name)(_estimator(_preset))


@register_policy_loss(ours.NAME)
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's clipped loss by `clipped_surrogate`, averaged as `loss_agg_mode` says."""
    loss, metrics = ours.policy_loss(log_prob, old_log_prob, advantages, response_mask, config)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    mean = agg_loss(
        loss_mat=loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    return mean, metrics


@register(ours.NAME)
class DenseRewardManager(RewardManagerBase):
    """Per token beta * (log pi_phi - log pi_ref) of a served reward model; at the last token the outcome."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ):
        super().__init__(config, tokenizer, compute_score)
        self.outcome = compute_score or default_compute_score
        given = dict(config.reward.get("reward_kwargs", {}).get("ipvrm") or {})
        missing = {"reward_model", "engine", "reference_engine"} - set(given)
        if missing:
            raise IpvrmError(f"reward.reward_kwargs.ipvrm: {', '.join(sorted(missing))} must be given")
        servers = (given["engine"], given["reference_engine"])
        self.reward_model = RewardModel.from_pretrained(given["reward_model"], servers=servers)
        if self.reward_model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise IpvrmError(f"{given['reward_model']}: its tokenizer is not the policy's")

    async def run_single(self, data: Any) -> dict[str, Any]:
        """`reward_score` is the list of a response's token rewards."""
        item = data[-1:][0]
        prompts, responses, mask = (item.batch[name] for name in ("prompts", "responses", "attention_mask"))
        prompt = prompts[mask[: len(prompts)].bool()].tolist()
        response = responses[: int(mask[len(prompts) :].sum())].tolist()
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        about = item.non_tensor_batch

        def score() -> tuple[float, list[float]]:
            found = self.outcome(
                data_source=about["data_source"],
                solution_str=text,
                ground_truth=about["reward_model"]["ground_truth"],
                extra_info=about.get("extra_info", {}),
            )
            outcome = float(found["score"] if isinstance(found, dict) else found)
            if outcome not in (0.0, 1.0):
                raise IpvrmError(
                    f"reward manager ipvrm: an outcome must be 0 or 1; the function gave {found!r}"
                )
            (log_ratio,) = self.reward_model.token_log_ratios([Response((*prompt, *response), len(prompt))])
            return outcome, (self.reward_model.info.beta * log_ratio).tolist()

        outcome, rewards = await self.loop.run_in_executor(None, score)
        return {"reward_score": [*rewards[:-1], outcome], "reward_extra_info": {"acc": outcome}}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[list[float]]) -> Tensor:
        """(B, T) fp32 of the lists, padded with 0 to the width of the responses."""
        responses = data.batch["responses"]
        found = torch.zeros_like(responses, dtype=torch.float32)
        padded = pad_sequence([torch.tensor(row, dtype=torch.float32) for row in scores], batch_first=True)
        found[:, : padded.shape[1]] = padded.to(found.device)
        return found
