"""Implicit prefix-value reward models (arXiv 2604.13197): training from outcome labels, scoring of steps, and
the pure functions of distribution-level RL with them.

`import ipvrm` is cheap: the public names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AdvantageConfig",
    "Advantages",
    "Balance",
    "BalanceConfig",
    "CandidateConfig",
    "IpvrmError",
    "PolicyConfig",
    "PolicyLossConfig",
    "RewardConfig",
    "RewardModel",
    "__version__",
    "candidate_mask",
    "distrl_advantages",
    "distrl_loss",
    "dpo_loss",
    "dpo_pairs",
    "force_sampled",
    "gae",
    "implicit_prm_loss",
    "ipvrm_loss",
    "online_balance",
    "outcome_advantages",
    "select_candidates",
    "temporal_difference",
    "train_policy",
    "train_reward_model",
    "whiten",
]

if TYPE_CHECKING:
    from ipvrm.advantages import (
        AdvantageConfig,
        Advantages,
        distrl_advantages,
        gae,
        outcome_advantages,
        temporal_difference,
        whiten,
    )
    from ipvrm.objectives import (
        Balance,
        BalanceConfig,
        dpo_loss,
        dpo_pairs,
        implicit_prm_loss,
        ipvrm_loss,
        online_balance,
    )
    from ipvrm.policy_loss import (
        CandidateConfig,
        PolicyLossConfig,
        candidate_mask,
        distrl_loss,
        force_sampled,
        select_candidates,
    )
    from ipvrm.reward_model import RewardModel
    from ipvrm.training.policy_config import PolicyConfig
    from ipvrm.training.train_policy import train_policy
    from ipvrm.training.train_rm import RewardConfig, train_reward_model

_HOME = {
    "AdvantageConfig": "ipvrm.advantages",
    "Advantages": "ipvrm.advantages",
    "distrl_advantages": "ipvrm.advantages",
    "gae": "ipvrm.advantages",
    "outcome_advantages": "ipvrm.advantages",
    "temporal_difference": "ipvrm.advantages",
    "whiten": "ipvrm.advantages",
    "Balance": "ipvrm.objectives",
    "BalanceConfig": "ipvrm.objectives",
    "dpo_loss": "ipvrm.objectives",
    "dpo_pairs": "ipvrm.objectives",
    "implicit_prm_loss": "ipvrm.objectives",
    "ipvrm_loss": "ipvrm.objectives",
    "online_balance": "ipvrm.objectives",
    "PolicyConfig": "ipvrm.training.policy_config",
    "CandidateConfig": "ipvrm.policy_loss",
    "PolicyLossConfig": "ipvrm.policy_loss",
    "candidate_mask": "ipvrm.policy_loss",
    "force_sampled": "ipvrm.policy_loss",
    "distrl_loss": "ipvrm.policy_loss",
    "select_candidates": "ipvrm.policy_loss",
    "RewardModel": "ipvrm.reward_model",
    "train_policy": "ipvrm.training.train_policy",
    "RewardConfig": "ipvrm.training.train_rm",
    "train_reward_model": "ipvrm.training.train_rm",
}


class IpvrmError(ValueError):
    """Something the user can act on. The command line prints its message on its own and exits with 2."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ipvrm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
