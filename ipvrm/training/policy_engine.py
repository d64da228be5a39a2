"""A server that samples from a policy in training: it is given the adapters before it samples.

vLLM takes them with `/v1/load_lora_adapter` (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora,
--max-lora-rank) from a folder that it can read. Full fine-tuning has no such call.
"""

import shutil
import uuid
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ipvrm.data.responses import Response
from ipvrm.errors import FailedAlike, IpvrmError
from ipvrm.models.causal_lm import save_model
from ipvrm.models.server import Server
from ipvrm.rollouts.engine import Sampling
from ipvrm.rollouts.server_engine import ServerEngine
from ipvrm.run_folder import save_folder
from ipvrm.training.run import Run

CHECKED = 8  # responses of a step whose log-probs are compared
MOST_APART = 0.2  # nats per token, mean: bf16 against fp32 leaves hundredths, another model tenths or more


class PolicyServer:
    """`Engine` of a policy with adapters. Every rank has one, and all of them sample with the same adapters.

    `current` says whether the server has the policy's weights of now.
    """

    def __init__(self, server: Server, policy: nn.Module, stop_ids: Collection[int], run: Run):
        self.engine = ServerEngine(server, stop_ids)
        self.policy, self.run, self.folder = policy, run, run.output / "engine"
        self.current = False

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Raises IpvrmError as `ServerEngine`, on the rank that it happens to."""
        return self.engine(prompts, sampling, seeds)

    def refresh(self) -> None:
        """Gives the server the policy's adapters, if it does not have them; by the first rank, for all.

        Raises:
            FailedAlike: the server did not take them.
        """
        from accelerate.utils import broadcast_object_list

        if self.current:
            return
        before, name = self.engine.adapter, f"ipvrm-{uuid.uuid4().hex[:12]}"
        failed: str | None = None
        if self.run.main:
            if before is None:
                shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
            try:
                with save_folder(self.folder / name) as temporary:
                    save_model(self.policy, temporary)
                self.engine.server.load_adapter(name, self.folder / name)
            except IpvrmError as error:
                failed = str(error)
            else:
                self._forget(before)
        said: list[Any] = [name, failed]
        if self.run.accelerator.num_processes > 1:
            broadcast_object_list(said)
        if said[1] is not None:
            raise FailedAlike(said[1])
        self.engine.adapter, self.current = said[0], True

    def check(self, responses: Sequence[Response]) -> float:
        """Mean distance in nats between the server's log-probs and the policy's, at temperature 1.

        Raises:
            FailedAlike: it is so large that the server samples from something else.
        """
        accelerator = self.run.accelerator
        failed: str | None = None
        gap = torch.zeros((), device=accelerator.device)
        try:
            with accelerator.autocast():
                gap += self.engine.gap(responses[:CHECKED], self.policy)
        except IpvrmError as error:
            gap, failed = gap + torch.inf, str(error)
        mean = float(accelerator.reduce(gap, "mean"))
        if mean <= MOST_APART:
            return mean
        url = self.engine.server.url
        raise FailedAlike(
            failed
            or f"{url}: its log-probs are {mean:.3g} nats a token from the policy's, of which at most "
            f"{MOST_APART} can be rounding: it serves other weights than --model, or not its adapters"
        )

    def close(self) -> None:
        """Frees the adapters' place on the server and on disk."""
        if self.run.main:
            self._forget(self.engine.adapter)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self, name: str | None) -> None:
        if name is not None:
            self.engine.server.unload_adapter(name)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # until now it may have read it again
