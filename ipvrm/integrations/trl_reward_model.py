"""The reward model beside a TRL trainer: loaded and compared with the policy, asked, updated online, saved.

It lies whole on every device, frozen in the policy's dtype or updated in fp32; ranks add their gradients.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipvrm.data.chat import Chat
from ipvrm.errors import IpvrmError
from ipvrm.losses.objectives import PAIRWISE, Balance, BalanceConfig, Objective, online_balance
from ipvrm.losses.prompt_groups import Reduce
from ipvrm.models.behaviour import check_log_ratios, check_same_tokens, other_variables
from ipvrm.models.causal_lm import (
    disable_dropout,
    load_model,
    load_tokenizer,
    local_folder,
    max_positions,
    save_model,
    weights_hash,
)
from ipvrm.models.patch_head import patch_head
from ipvrm.models.reward_model import check_own_weights, read_info, write_info
from ipvrm.run_folder import save_folder, versions
from ipvrm.training.adapters import save_merged, trained_weights, with_weights
from ipvrm.training.online_reward import REFERENCE
from ipvrm.training.optimizer import NotFinite
from ipvrm_kernels import pack


class PrefixRewardModel:
    """A reward model's folder next to a policy with `tokenizer` and a head of `head_size` tokens.

    Args:
        online: whether it learns; then `update` and `save` are for it.
        template_kwargs: variables of the chat template that the policy's prompts are written with; other ones
            than its own are warned of.
        margin, dlw, adb: of the online update of an ipvrm model; None for the margin that it was trained
            with, and for True.

    Raises:
        IpvrmError: another tokenizer, template or head than the policy's, an objective without log-ratios,
            online one that compares responses, or settings that this model does not read; when called, more
            tokens than it has positions.
    """

    def __init__(
        self, folder: str | Path, tokenizer: Any, head_size: int, accelerator: Any, dtype: torch.dtype, *,
        template_kwargs: Mapping[str, Any], online: bool, learning_rate: float, margin: float | None = None,
        dlw: bool | None = None, adb: bool | None = None,
    ):  # fmt: skip
        self.folder, self.accelerator = local_folder(folder), accelerator
        self.info, self.tokenizer = read_info(self.folder), load_tokenizer(self.folder)
        check_own_weights(self.folder, self.info)
        self._check_objective(online, {"rm_margin": margin, "dlw": dlw, "adb": adb})
        self.balance = BalanceConfig(dlw=dlw is not False, adb=adb is not False)
        check_same_tokens(self.folder, self.info, self.tokenizer, tokenizer, head_size)
        self.template_kwargs = dict(template_kwargs)
        if online:
            Chat(self.tokenizer, self.template_kwargs)  # what it is saved with is what it reads
        if said := other_variables(self.folder, self.info, template_kwargs):
            warnings.warn(said, stacklevel=3)
        self.max_positions = max_positions(self.folder)
        own_margin = self.info.margin if margin is None else margin
        self.objective = Objective(self.info.objective, self.info.beta, own_margin or 0.0)
        self.model: Any = load_model(self.folder, torch.float32 if online else dtype, accelerator.device)
        disable_dropout(self.model)
        self.model.requires_grad_(online)
        patch_head(self.model)
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0) if online else None
        )
        self.behaviour: dict[str, Tensor] = {}  # the policy that the last update was compared with

    def _check_objective(self, online: bool, settings: dict[str, Any]) -> None:
        check_log_ratios(self.folder, self.info, "DistRLTrainer")
        objective = self.info.objective
        if online and objective in PAIRWISE:
            raise IpvrmError(
                f"{self.folder}: objective {objective!r} learns from pairs of a right and a wrong response, "
                "which DistRLTrainer does not make; give rm_update='frozen', or use `ipvrm train-policy`"
            )
        given = [name for name, value in settings.items() if value is not None]
        if given and not (online and objective == "ipvrm"):
            raise IpvrmError(
                f"{self.folder}: {', '.join(given)}: of the online update of an ipvrm model alone; this one "
                f"is {objective!r}, {'updated online' if online else 'frozen'}, so leave them out"
            )

    def _check_positions(self, inputs: list[dict[str, Tensor]]) -> None:
        length = max(x["input_ids"].shape[1] for x in inputs)
        if self.max_positions is not None and length > self.max_positions:
            raise IpvrmError(
                f"{self.folder}: the longest prompt and the longest response have {length} tokens together, "
                f"more than the {self.max_positions} positions of the reward model; leave out longer prompts "
                "or take a smaller max_completion_length"
            )

    @torch.no_grad()
    def logprobs(
        self, inputs: list[dict[str, Tensor]], candidate_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(B, T) of the labelled tokens and (B, T, K) of candidate_ids (B, T, K); the last T positions of
        `inputs`, micro-batches of input_ids, attention_mask and labels."""
        T, found = candidate_ids.shape[1], []
        self._check_positions(inputs)
        for x, ids in zip(inputs, candidate_ids.split([len(x["labels"]) for x in inputs]), strict=True):
            ids = torch.nn.functional.pad(ids, (0, 0, x["labels"].shape[1] - 1 - T, 0), value=-1)
            with self.accelerator.autocast():
                out = self.model(**x, candidate_ids=ids, temperature=temperature)
            found.append((out.logprobs[:, -T:], out.candidate_logprobs[:, -T:]))
        logprobs, candidates = (torch.cat(part) for part in zip(*found, strict=True))
        return logprobs, candidates

    def update(
        self, inputs: list[dict[str, Tensor]], old_logprobs: Tensor, mask: Tensor, outcome: Tensor, group:
            Tensor,
        num_groups: int, reduce: Reduce, *, temperature: float, max_grad_norm: float, policy: Any,
    ) -> float:  # fmt: skip
        """One update from the outcomes of a generation batch, the loss a mean over all ranks; returns that
        loss.

        Args:
            old_logprobs, mask: (B, T) under the policy, which is the reference; a row without tokens is left
                out.
            outcome: (B,) 0, 1, or NaN for a row that nobody could judge, which is left out.
            group: (B,) the prompt of each row, num_groups over all ranks.

        Raises:
            IpvrmError: another outcome, or too many tokens. NotFinite: before the weights take it.
        """
        assert self.optimizer is not None
        self._check_positions(inputs)
        judged = mask.any(1) & ~outcome.isnan()
        if bool((judged & (outcome != 0) & (outcome != 1)).any()):
            raise IpvrmError(
                "DistRLTrainer: an online reward model learns from rewards of 0 and 1, got "
                f"{outcome[judged].unique()[:4].tolist()}; give such a reward function, or rm_update='frozen'"
            )
        rows = judged.nonzero()[:, 0]
        balance = None
        if self.objective.name == "ipvrm":
            margin = self.objective.margin
            few = online_balance(
                outcome[rows], group[rows], num_groups, margin=margin, config=self.balance, reduce=reduce
            )
            balance = Balance(*(torch.zeros_like(outcome).index_copy(0, rows, x.to(outcome)) for x in few))
        lengths = self.accelerator.gather(mask.sum(1) * judged)
        denominator = self.objective.denominator([int(n) for n in lengths.tolist() if n])
        total, start = torch.zeros((), device=mask.device), 0
        for x in inputs:
            here = slice(start, start := start + len(x["labels"]))
            kept = judged[here]
            with self.accelerator.autocast():
                out = self.model(**x, temperature=temperature)
            logprobs = out.logprobs[:, -mask.shape[1] :]
            log_ratio, cu_seqlens = pack((logprobs - old_logprobs[here])[kept], mask[here][kept])
            of_rows = None if balance is None else Balance(*(b[here][kept] for b in balance))
            if len(log_ratio):
                loss, _ = self.objective(log_ratio, cu_seqlens, outcome[here][kept], denominator, of_rows)
                loss.backward()
                total += loss.detach()
        for parameter in self.model.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(gradient)
        loss_sum = float(reduce(total))
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm or torch.inf))
        if not torch.isfinite(torch.tensor([loss_sum, norm])).all():
            raise NotFinite(f"DistRLTrainer: the reward model's loss is {loss_sum}, its gradient norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.is_main_process:
            self.behaviour = trained_weights(policy)
        return loss_sum

    def save(
        self,
        folder: Path,
        policy: Any,
        temperature: float,
        data: Mapping[str, Any],
        metrics: Mapping[str, Any],
    ) -> None:
        """The folder that `RewardModel.from_pretrained` reads; its reference is the policy that it last
        learnt from; `data` and `metrics` of the run stand in its card."""
        with save_folder(folder) as temporary:
            save_model(self.model, temporary)
            self.tokenizer.save_pretrained(temporary)
            with with_weights(policy, self.behaviour):
                save_merged(policy, temporary / REFERENCE)
            info = replace(
                self.info, reference=REFERENCE, reference_given=str(folder / REFERENCE),
                reference_hash=weights_hash(temporary / REFERENCE), versions=versions(),
                temperature=temperature, chat_template_kwargs=self.template_kwargs, adapter=None,
                margin=None if self.info.margin is None else self.objective.margin,
            )  # fmt: skip
            write_info(temporary, info, data, metrics)
