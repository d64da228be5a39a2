"""Implicit prefix-value reward models (arXiv 2604.13197): training from outcome labels, scoring of steps, and
the pure functions of distribution-level RL with them.

`import ipvrm` is cheap: the public names below load their module on first use.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "ipvrm.errors": ("IpvrmError",),
    "ipvrm.evaluate.bon": ("rerank",),
    "ipvrm.losses.advantages": (
        "AdvantageConfig", "Advantages", "distrl_advantages", "gae", "outcome_advantages",
        "temporal_difference", "whiten",
    ),
    "ipvrm.losses.objectives": (
        "Balance", "BalanceConfig", "dpo_loss", "dpo_pairs", "implicit_prm_loss", "ipvrm_loss",
        "online_balance",
    ),
    "ipvrm.losses.policy_loss": (
        "CandidateConfig", "PolicyLossConfig", "candidate_mask", "force_sampled", "select_candidates",
    ),
    "ipvrm.models.patch_head": ("patch_head", "unpatch_head"),
    "ipvrm.models.reward_model": ("RewardModel",),
    "ipvrm.training.policy_config": ("PolicyConfig",),
    "ipvrm.training.reward_config": ("RewardConfig",),
    "ipvrm.training.train_policy": ("train_policy",),
    "ipvrm.training.train_rm": ("train_reward_model",),
    "ipvrm_kernels": ("__version__",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ipvrm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
