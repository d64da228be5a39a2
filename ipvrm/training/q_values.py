"""The Q-RM of a policy run: token scores of the rollouts, from a value head that is not trained here."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipvrm.data.batches import Batch
from ipvrm.errors import IpvrmError
from ipvrm.models.causal_lm import load_model, load_tokenizer, local_folder
from ipvrm.models.reward_model import check_own_weights, read_info
from ipvrm.models.token_rewards import TokenValues, load_value_head
from ipvrm.training.optimizer import NotFinite
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.policy_rollouts import Rollouts


class QValues:
    """The reward model of `reinforce_qrm`: read and checked before any work, its weights when it is asked.

    Raises:
        IpvrmError: no Q-RM, or one with another tokenizer.
    """

    def __init__(self, config: PolicyConfig, policy_tokenizer: Any):
        assert config.reward_model is not None
        self.config = config
        self.folder = local_folder(config.reward_model)
        self.info = read_info(self.folder)
        if self.info.objective != "q_rm":
            raise IpvrmError(
                f"{self.folder}: objective {self.info.objective!r} gives no token scores of a value head; "
                "algorithm 'reinforce_qrm' needs a q_rm reward model"
            )
        if load_tokenizer(self.folder).get_vocab() != policy_tokenizer.get_vocab():
            raise IpvrmError(
                f"{self.folder}: its tokenizer is not the policy's: the same text would be other tokens"
            )
        check_own_weights(self.folder, self.info)
        self.module: TokenValues | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of the models that read the rollouts."""
        return (self.folder,)

    def fingerprint(self) -> dict[str, str]:
        """What decides the scores besides the settings."""
        return {"reward_model_hash": self.info.weights_hash}

    def score(self, rollouts: Rollouts, accelerator: Any) -> Tensor:
        """(N,) fp32: Z_t of every response token.

        Raises:
            NotFinite: they are not numbers.
        """
        if self.module is None:
            model = load_model(self.folder, torch.float32, accelerator.device)
            self.module = TokenValues(model, load_value_head(self.folder, model)).eval()
        module = self.module

        def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, ...]:
            return (module(batch),)

        (found,) = rollouts.forward(forward, self.config.per_device_train_batch_size, accelerator)
        if rollouts.not_finite(found) is not None:
            raise NotFinite("the reward model's token scores are not numbers")
        return found
