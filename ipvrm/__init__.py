"""Implicit prefix-value reward models (arXiv 2604.13197), trained from outcome labels, to score steps.

`import ipvrm` is cheap: the public names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["IpvrmError", "RewardConfig", "RewardModel", "__version__", "train_reward_model"]

if TYPE_CHECKING:
    from ipvrm.reward_model import RewardModel
    from ipvrm.train_rm import RewardConfig, train_reward_model

_HOME = {
    "RewardModel": "ipvrm.reward_model",
    "RewardConfig": "ipvrm.train_rm",
    "train_reward_model": "ipvrm.train_rm",
}


class IpvrmError(ValueError):
    """Something the user can act on. The command line prints its message on its own and exits with 2."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ipvrm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
