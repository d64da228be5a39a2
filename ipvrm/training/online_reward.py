"""The reward model of a policy run: scores rollouts, learns from them, is saved with what it learnt against.

    l_t = log pi_phi - log pi_ref of the sampled tokens, at the rollout temperature

with pi_ref the behaviour policy, which costs nothing (Appendix B), or the model that the reward model was
trained against (`td_reference` sft, Table 9). The same reference serves the scores and the online update.
Where stored rollouts hold log pi_phi, only what the reward model's folder says of it is read.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch, microbatches_for_rank
from ipvrm.data.chat import parse_template_kwargs
from ipvrm.errors import IpvrmError
from ipvrm.losses.metrics import paired, stacked
from ipvrm.losses.objectives import Balance, BalanceConfig, Objective, online_balance
from ipvrm.models.behaviour import check_log_ratios, check_same_tokens
from ipvrm.models.causal_lm import (
    ResponseLogprobs,
    candidate_logprobs,
    disable_dropout,
    load_model,
    load_tokenizer,
    local_folder,
    vocab_size,
    weights_hash,
)
from ipvrm.models.reward_model import (
    RewardModelInfo,
    check_own_weights,
    find_reference,
    read_info,
    reference_entries,
    write_info,
)
from ipvrm.run_folder import versions
from ipvrm.training import checkpoint
from ipvrm.training.adapters import (
    adapter_entries,
    add_adapters,
    recompute_activations,
    save_merged,
    save_trained,
    trained_weights,
    with_weights,
)
from ipvrm.training.flags import filled
from ipvrm.training.optimizer import NotFinite, adamw, update
from ipvrm.training.policy_config import PolicyConfig, reads_reference
from ipvrm.training.policy_rollouts import Rollouts
from ipvrm_kernels import prefix_values

FOLDER = "reward_model"
REFERENCE = "reference"
RELEASE_MARGIN = 5.0  # of the released code's online update; offline it has none


class RewardInputs:
    """What a run's reward model is: all but its weights, read and checked before any work.

    Args:
        balance: of the online update.
        scored: the rollouts hold its log-probs, so that its weights are not read.

    Raises:
        IpvrmError: no reward model, one of another kind, or with another tokenizer or chat template; or a
            --reference that nothing reads.
    """

    def __init__(
        self, config: PolicyConfig, balance: BalanceConfig, policy_tokenizer: Any, scored: bool = False
    ):
        assert config.reward_model is not None
        self.config = config
        self.folder = local_folder(config.reward_model)
        self.info = read_info(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.trained, self.scored = config.rm_update != "frozen", scored
        check_log_ratios(self.folder, self.info, f"algorithm {config.algorithm!r}")
        objective = self.info.objective
        if objective != "ipvrm" and (config.dlw or config.adb or config.rm_margin is not None):
            raise IpvrmError(
                f"{self.folder}: objective {objective!r} has neither margin nor weights, so --dlw, --adb and "
                "--rm_margin are unused"
            )
        self.balance = balance
        margin = RELEASE_MARGIN if config.preset == "release" else self.info.margin
        margin = margin if config.rm_margin is None else config.rm_margin
        self.objective = Objective(objective, self.info.beta, margin or 0.0)
        check_same_tokens(self.folder, self.info, self.tokenizer, policy_tokenizer, vocab_size(config.model))
        self.reference_folder: Path | None = None
        if reads_reference(config) and (config.td_reference == "sft" or not scored):
            self.reference_folder = find_reference(self.folder, self.info, config.reference)
        elif config.reference is not None:
            raise IpvrmError(
                f"{config.train_data} holds the reward model's log-probs: nothing reads --reference; leave "
                "it out, or add --td_reference sft"
            )
        if not scored:
            check_own_weights(self.folder, self.info)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of the models that read the rollouts: its own and, under `td_reference` sft, its reference's."""
        of_reference = self.reference_folder if self.config.td_reference == "sft" else None
        return (self.folder,) if of_reference is None else (self.folder, of_reference)

    def fingerprint(self) -> dict[str, str]:
        """What decides the scores besides the settings."""
        return {"reward_model_hash": self.info.weights_hash, "reference_hash": self.info.reference_hash}


class OnlineReward:
    """The reward model of a run on every rank; `reference` is a model only under `td_reference` sft, and the
    reward model itself is none where the rollouts hold its log-probs (`inputs.scored`).

    Args:
        resumed, scalars: the checkpoint that weights and optimizer come from, where the run goes on.
    """

    def __init__(
        self,
        inputs: RewardInputs,
        accelerator: Any,
        resumed: Path | None = None,
        scalars: dict[str, Any] | None = None,
    ):
        self.inputs, self.config, self.accelerator = inputs, inputs.config, accelerator
        self.info, self.objective, self.trained = inputs.info, inputs.objective, inputs.trained
        self.behaviour: Mapping[str, Tensor] | Path = {}  # see `learnt_from`; of a checkpoint, its folder
        self.reference: nn.Module | None = None
        if self.config.td_reference == "sft":
            assert inputs.reference_folder is not None
            self.reference = load_model(inputs.reference_folder, torch.float32, self.accelerator.device)
        if resumed is not None and self.trained and self.reference is None:
            self.behaviour = resumed / FOLDER / REFERENCE
        if inputs.scored:
            return
        # a checkpoint's weights are merged ones; its adapters belong on the starting weights
        merged = resumed is None or bool(self.config.rm_lora_r)
        model = load_model(inputs.folder if merged else cast(Path, resumed) / FOLDER, torch.float32)
        disable_dropout(model)
        model.train(self.trained).requires_grad_(self.trained)
        if self.config.rm_lora_r:
            r, saved = self.config.rm_lora_r, None if resumed is None else resumed / FOLDER
            names = self.config.lora_target_modules
            model = add_adapters(model, r, alpha=float(r), target_modules=names, saved=saved)
        if self.config.gradient_checkpointing and self.trained:
            recompute_activations(model)
        if not self.trained:
            self.module: nn.Module = ResponseLogprobs(model.to(self.accelerator.device))
            return
        module = ResponseLogprobs(model)
        settings = replace(self.config, weight_decay=self.config.rm_weight_decay)
        rate = filled(self.config.rm_learning_rate)
        optimizer = adamw(module, rate, settings, self.accelerator.device)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        if resumed is not None and scalars is not None:
            checkpoint.load_optimizer(resumed / FOLDER, self.module, self.optimizer.optimizer, scalars)

    @property
    def model(self) -> nn.Module:
        """The causal LM itself."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.module).model)

    def _logprobs(self, model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """(N,) and (N, K) of all rollouts under `model`."""
        temperature = self.config.temperature

        def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
            found = candidate_logprobs(model, batch, rollouts.candidate_ids[tokens], temperature)
            return found.logprobs, found.candidate_logprobs

        rows = self.config.per_device_train_batch_size
        sampled, candidates = rollouts.forward(forward, rows, self.accelerator)
        return sampled, candidates

    def score(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampled tokens (N,) and the candidates (N, K) under the reward model.

        Raises:
            NotFinite: they are not numbers.
        """
        sampled, candidates = self.logprobs(rollouts)
        if rollouts.not_finite(sampled, candidates) is not None:
            raise NotFinite("the reward model's log-probs are not numbers")
        return sampled, candidates

    def logprobs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """What `score` returns, whatever it is."""
        if self.inputs.scored:
            return rollouts.rm_logprobs, rollouts.rm_candidate_logprobs
        return self._logprobs(self.model, rollouts)

    def reference_logprobs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """The same under the reference: for the behaviour policy, what is there already."""
        if self.reference is None:
            return rollouts.old_logprobs, rollouts.old_candidate_logprobs
        return self._logprobs(self.reference, rollouts)

    def update(
        self, rollouts: Rollouts, reference: Tensor, minibatches: list[list[int]], factor: float
    ) -> tuple[dict[str, tuple[float, float]], float, Tensor]:
        """Learns from the labels of `rollouts`, one update per minibatch.

        Args:
            minibatches: of responses; of an objective that compares, pairs end to end, first the right.
            reference: (N,) log-probs of the sampled tokens under the reference.
            factor: of the schedule, on the learning rate.

        Returns:
            Metrics as (sum, count), the last gradient norm, and the final mean values of the first minibatch
            (M,): the only ones that no update from these rollouts has changed.

        Raises:
            NotFinite: from `ipvrm.training.optimizer.update`.
        """
        balance: Balance | None = None
        if self.objective.name == "ipvrm":
            balance = online_balance(
                rollouts.outcome,
                rollouts.group,
                rollouts.num_groups,
                margin=self.objective.margin,
                config=self.inputs.balance,
            )
        first = minibatches[0]
        finals = torch.zeros_like(rollouts.outcome)
        totals: dict[str, tuple[float, float]] = {}
        grad_norm = 0.0
        for minibatch in minibatches:
            denominator = self.objective.denominator([rollouts.lengths[i] for i in minibatch])
            width = 2 if self.objective.pairwise else 1
            items = [minibatch[i : i + width] for i in range(0, len(minibatch), width)]

            def loss_and_sums(
                micro: list[int],
                minibatch: list[int] = minibatch,
                items: list[list[int]] = items,
                denominator: float = denominator,
            ) -> tuple[Tensor, Tensor]:
                chosen = [i for item in micro or [0] for i in items[item]]
                batch, tokens = rollouts.batch(chosen), rollouts.tokens_of(chosen)
                log_ratio = self.module(batch, self.config.temperature) - reference[tokens]
                rows = torch.tensor(chosen, device=tokens.device)
                of_rows = None if balance is None else Balance(balance.weight[rows], balance.margin[rows])
                loss, metrics = self.objective(
                    log_ratio, batch.cu_seqlens, batch.outcome, denominator, of_rows
                )
                if micro and minibatch is first:
                    values = prefix_values(log_ratio.detach(), batch.cu_seqlens, beta=self.info.beta)
                    finals[rows] = values.mean_value[batch.cu_seqlens[1:].long() - 1]
                return loss, stacked(metrics, self.objective.metrics)

            values, grad_norm = update(
                self.accelerator,
                self.module,
                self.optimizer,
                microbatches_for_rank(
                    range(len(items)),
                    [sum(len(rollouts.responses[i].input_ids) for i in item) for item in items],
                    max_rows=max(1, self.config.per_device_train_batch_size // width),
                    rank=self.accelerator.process_index,
                    world_size=self.accelerator.num_processes,
                ),
                loss_and_sums,
                learning_rate=filled(self.config.rm_learning_rate) * factor,
                max_grad_norm=filled(self.config.rm_max_grad_norm),
            )
            for name, (total, count) in paired(values, self.objective.metrics).items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + total, old[1] + count)
        return totals, grad_norm, self.accelerator.reduce(finals, "sum")[first]

    # ---------------------------------------------------------------------------------------------- files

    def learnt_from(self, policy: nn.Module) -> None:
        """Keeps a copy of the policy whose rollouts the last update was made of and compared with.

        It is one step behind the policy that is saved, which has moved since. On the main rank alone, in its
        memory: what is trained of the policy (under LoRA the adapters).
        """
        if self.reference is None and self.accelerator.is_main_process:
            self.behaviour = trained_weights(policy)

    def write_model(
        self,
        folder: Path,
        policy: nn.Module,
        final_place: Path,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """The model folder that `RewardModel.from_pretrained` reads, which then scores what was trained.

        Its reference is what it was updated against: the one that it came with, or the behaviour policy of
        the last step, written into `folder`; and its log-probs are taken at the rollouts' temperature.

        Args:
            folder: where to write. policy: the run's, which lends its shape. final_place: where `folder` will
                be. data, metrics: of the run, for the model card.
        """
        save_trained(self.model, folder)
        if self.inputs.reference_folder is not None:
            entries = reference_entries(self.inputs.reference_folder, final_place, self.info.reference_hash)
        else:
            own = folder / REFERENCE
            if isinstance(self.behaviour, Path):
                shutil.copytree(self.behaviour, own)
            else:
                with with_weights(policy, self.behaviour):
                    save_merged(policy, own)
            entries = {
                "reference": REFERENCE,
                "reference_given": str(final_place / REFERENCE),
                "reference_hash": weights_hash(own),
            }
        self.inputs.tokenizer.save_pretrained(folder)
        info = RewardModelInfo(
            objective=self.info.objective,
            beta=self.info.beta,
            margin=self.objective.margin
            if self.trained and self.info.margin is not None
            else self.info.margin,
            template_hash=self.info.template_hash,
            versions=versions(),
            chat_template_kwargs=parse_template_kwargs(self.config.chat_template_kwargs)
            if self.trained
            else self.info.chat_template_kwargs,
            temperature=self.config.temperature if self.trained else self.info.temperature,
            adapter=self._adapter(),
            **entries,
        )
        write_info(folder, info, data, metrics)

    def _adapter(self) -> dict[str, Any] | None:
        r = self.config.rm_lora_r
        return (
            adapter_entries(self.inputs.folder, weights_hash(self.inputs.folder), r, float(r)) if r else None
        )
