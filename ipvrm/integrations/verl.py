"""verl 0.9.1 with ipvrm's advantages, clipped loss and dense rewards: what its plugin registers.

    algorithm.adv_estimator=ipvrm, or ipvrm_release       `advantages`: outcome and GAE of the TD (Eq. 13)
    actor_rollout_ref.actor.policy_loss.loss_mode=ipvrm   `policy_loss`: `clipped_surrogate` (Eq. 12)
    reward.reward_manager.name=ipvrm                      of each token beta * (log pi_phi - log pi_ref), of
                                                          the last one the outcome
    reward.reward_kwargs.ipvrm                            its reward_model (a folder), engine and
                                                          reference_engine (two servers)

verl imports the plugin (`verl_plugin`, entry point group `verl.plugins`) by itself, and hides why where it
cannot: `require()` in the launcher, or `ipvrm env`, says so. verl keeps rewards of tokens where it assembles
them for a batch, which it does with a colocated reward model (`reward.reward_model.enable=True`, no
`enable_resource_pool`) and a `reward.custom_reward_function`, of which the outcome then comes; its agent
loops otherwise take one number a response, and fail on a list.

The candidates' branch (Eq. 11) needs hidden states and is not here. Its hooks in verl: an engine, subclass of
`FSDPEngineWithLMHead` under `EngineRegistry.register(model_type="language_model", backend=[...], device=...,
vendor="ipvrm")`, whose `prepare_model_outputs` would give candidates and their log-probs; and a trainer,
subclass of `PPOTrainerSync` under `register_trainer`, which would keep them beside `old_log_probs`.

Nothing here has trained a model.
"""

import importlib
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipvrm.errors import IpvrmError, cause
from ipvrm.losses.advantages import AdvantageConfig, distrl_advantages, last_tokens
from ipvrm.losses.presets import Preset
from ipvrm_kernels import clipped_surrogate

PLUGIN = "ipvrm.integrations.verl_plugin"
VERSION = "0.9.1"
ESTIMATORS: dict[str, Preset] = {"ipvrm": "paper", "ipvrm_release": "release"}
NAME = "ipvrm"  # of the policy loss and of the reward manager


@torch.no_grad()
def advantages(rewards: Tensor, mask: Tensor, prompts: Any, *, config: AdvantageConfig) -> Tensor:
    """`distrl_advantages` of padded rewards: (B, T) fp32, 0 where `mask` is.

    Args:
        rewards: (B, T) float, the TD of each token, and at a response's last token its outcome, 0 or 1.
        mask: (B, T), not 0 at response tokens. prompts: (B,) of any kind, alike for responses to one prompt.

    Raises:
        ValueError: from `distrl_advantages`; an outcome other than 0 and 1 where the rewards hold a KL term.
    """
    counted = mask.bool()
    lengths = counted.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = rewards[counted].float()  # (N,)
    ends = last_tokens("advantages", cu_seqlens, packed)
    outcome = torch.zeros(len(rewards), device=rewards.device)
    outcome[lengths > 0] = packed[ends]
    names, group = np.unique(np.asarray(prompts).astype(str), return_inverse=True)
    found = distrl_advantages(
        packed.masked_fill(ends, 0.0),
        packed.new_empty(len(packed), 0),
        outcome,
        cu_seqlens,
        torch.from_numpy(group).to(rewards.device),
        len(names),
        config=config,
    )
    return torch.zeros_like(rewards, dtype=torch.float32).masked_scatter(counted, found.advantages)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, config: Any
) -> tuple[Tensor, dict[str, float]]:
    """The loss of each token (B, T) fp32, and verl's metrics of it.

    Args:
        config: verl's of the actor: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c.
    """
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    found = clipped_surrogate(
        log_probs,
        old_log_probs,
        advantages,
        clip_low=low,
        clip_high=high,
        dual_clip=config.get("clip_ratio_c"),
    )
    weight = mask.float() / mask.sum().clamp(min=1)

    def mean(x: Tensor) -> float:
        return float((x.detach().float() * weight).sum())

    return found.loss, {
        "actor/pg_clipfrac": mean(found.clipped),
        "actor/ppo_kl": mean(old_log_probs - log_probs),
        "actor/pg_clipfrac_lower": mean(found.dual_clipped),
    }


def require() -> None:
    """Raises IpvrmError, with the reason, unless verl is here and has what its plugin registers."""
    if (state := plugin_state()) != "registered":
        raise IpvrmError(f"verl: {state}")


def plugin_state() -> str:
    """`registered`, or in words why verl does not have what its plugin registers."""
    from ipvrm.run_folder import installed_version

    if (version := installed_version("verl")) == "absent":
        return "not installed"
    try:
        importlib.import_module("verl")
    except Exception as error:
        return f"verl {version} cannot be imported: {cause(error)}"
    if PLUGIN not in sys.modules:  # verl has hidden why
        try:
            importlib.import_module(PLUGIN)
        except Exception as error:
            return f"the plugin cannot be imported with verl {version} (made for {VERSION}): {cause(error)}"
        return (
            "verl did not load the plugin: VERL_USE_EXTERNAL_PLUGINS must be auto or name ipvrm, and ipvrm "
            "must be installed (pip install), not only on the path"
        )
    return "registered"
