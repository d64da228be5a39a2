"""DistRL in TRL's GRPOTrainer: dense advantages from a reward model, and the candidates' branch of the loss.

    advantage_t = TRL's outcome term + gae_coef * gae_t                    (Eq. 8, 27-29; moments of `ipvrm`)
    L           = TRL's token branch + alpha * L_candidates                (Eq. 11, divided by what loss_type
    divides by)

Everything else is TRL's: generation, rewards, the token branch with all its options, logging, checkpoints.
Three methods are extended (`_generate_and_score_completions`, `_get_per_token_logps_and_entropies`,
`_compute_loss`), and `_calculate_rewards` is listened to; the forward of policy, reference and reward model
is `ipvrm.patch_head`'s, so that one pass gives old log-probs and candidates. Candidates travel as padded (B,
T, K), since TRL shuffles and splits tensors along their first dimension. Both branches clip at `epsilon` and
`epsilon_high`.

One rule for what TRL multiplies the token branch with: vLLM's importance weights multiply the candidates of
the same position too, since they correct for where the prefix was sampled. `top_entropy_quantile`, `delta`,
the KL term and the entropy bonus act on the token branch alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ipvrm.errors import IpvrmError
from ipvrm.integrations.reward_functions import prefix_value_reward, verifier_reward
from ipvrm.integrations.trl_reward_model import PrefixRewardModel
from ipvrm.losses.advantages import AdvantageConfig, distrl_advantages, last_tokens, temporal_difference
from ipvrm.models.card import write_policy_card
from ipvrm.models.causal_lm import head
from ipvrm.models.patch_head import patch_head
from ipvrm.training.online_reward import FOLDER
from ipvrm_kernels import clipped_surrogate, pack, unpack

try:
    from transformers.integrations import is_deepspeed_zero3_enabled
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(f"ipvrm.integrations.trl needs TRL: pip install 'ipvrm[trl]' ({error})") from error

__all__ = ["DistRLConfig", "DistRLTrainer", "prefix_value_reward", "verifier_reward"]
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")


@dataclass
class DistRLConfig(GRPOConfig):
    """GRPOConfig with the settings of DistRL. With alpha and gae_coef 0 the trainer is GRPOTrainer."""

    alpha: float = field(default=0.1, metadata={"help": "Weight of the candidates' branch (Eq. 14)."})
    gae_coef: float = field(default=1.0, metadata={"help": "Weight of GAE beside the outcome (Eq. 13)."})
    discount: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    min_prob: float = field(
        default=0.1, metadata={"help": "P_min: candidates are all tokens with p >= P_min."}
    )
    group_std: Literal["sample", "population"] = field(
        default="sample",
        metadata={
            "help": "Divisor of the outcome term: TRL's sample std + 1e-4, or the paper's population "
            "std + 1e-6."
        },
    )
    rm_update: Literal["frozen", "before", "after"] = field(
        default="frozen",
        metadata={
            "help": "Whether the reward model learns from each generation batch, before or after it "
            "scores it."
        },
    )
    rm_learning_rate: float = field(default=2e-6, metadata={"help": "Of the online update, constant."})
    rm_margin: float | None = field(
        default=None, metadata={"help": "Of the online update; default the model's own."}
    )
    dlw: bool | None = field(
        default=None,
        metadata={"help": "Dynamic loss weighting of an ipvrm model's online update; default true."},
    )
    adb: bool | None = field(
        default=None,
        metadata={"help": "Adaptive difficulty boundary of the same (Eq. 15); default true."},
    )


class DistRLTrainer(GRPOTrainer):
    """GRPOTrainer whose tokens and candidates have advantages of their own from a reward model of `ipvrm
    train-rm`.

    Args:
        reward_model: folder of the reward model, on the policy's tokenizer and chat template: of objective
            ipvrm or implicit_prm, or, frozen, dpo. Its log-probs are taken at the rollout temperature, its
            reference is the policy that sampled. Updated online (`rm_update`) it needs rewards of 0 and 1,
            and is saved in `reward_model/` beside the policy with the policy it learnt from.
        args: a DistRLConfig. All other arguments are GRPOTrainer's.

    Raises:
        IpvrmError: what the candidates' branch has no definition for or was not tried with, each with its
            reason.
    """

    def __init__(self, *positional: Any, reward_model: str | Path | None = None, **named: Any):
        super().__init__(*positional, **named)
        args = self.args
        if not isinstance(args, DistRLConfig):
            raise IpvrmError(f"DistRLTrainer: args must be a DistRLConfig; got {type(args).__name__}")
        self._refuse_unknown()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head_size = head(base).weight.shape[0]
        patch_head(self.model)
        if self.ref_model is not None:
            patch_head(self.ref_model)
        self._dense = bool(args.alpha or args.gae_coef)
        if self._dense == (reward_model is None):
            raise IpvrmError(
                "DistRLTrainer: alpha and gae_coef weigh what a reward model says; give reward_model "
                "and one of the two"
            )
        self.prefix_rewards: PrefixRewardModel | None = None
        if reward_model is not None:
            self.prefix_rewards = PrefixRewardModel(
                reward_model, self.processing_class, head_size, self.accelerator, self.model.dtype,
                template_kwargs=self.chat_template_kwargs, online=args.rm_update != "frozen",
                learning_rate=args.rm_learning_rate, margin=args.rm_margin, dlw=args.dlw, adb=args.adb,
            )  # fmt: skip
        self._passes: list[Any] | None = None  # of the policy over a generation batch, while it is made
        self._rewards = torch.empty(0)  # (B,) of all ranks, NaN where nobody could judge
        self._candidates: Tensor | None = None  # (B, T, K) while a loss is computed
        self._candidate_logprobs: Tensor | None = None  # (B, T, K) of that loss's forward

    def _refuse_unknown(self) -> None:
        args = self.args
        reasons = {
            f"loss_type {self.loss_type!r} has no clipped ratio for the candidates' branch to share; "
            f"take one of {', '.join(LOSS_TYPES)}": self.loss_type not in LOSS_TYPES,
            "importance_sampling_level must be 'token': a candidate has no ratio of a sequence": (
                self.importance_sampling_level != "token"
            ),
            "multimodal models are not supported: text alone reaches the reward model": self._is_vlm,
            "ZeRO-3 was not tested: the head's weight is empty outside its own forward": (
                is_deepspeed_zero3_enabled()
            ),
            "off_policy_mask_threshold would drop a sequence's tokens and keep its candidates": (
                args.off_policy_mask_threshold is not None
            ),
            "cast_lm_head_to_fp32 is unused: logits are never rounded here": args.cast_lm_head_to_fp32,
            "group_std='population' replaces the std of one group of one reward (scale_rewards 'group', "
            "multi_objective_aggregation 'sum_then_normalize')": (
                args.group_std == "population"
                and (
                    self.scale_rewards != "group" or self.multi_objective_aggregation != "sum_then_normalize"
                )
            ),
            "beta needs a reference model, which TRL shards before its head can be patched: under FSDP take "
            "beta=0": (self.ref_model is not None and self.is_fsdp_enabled),
            "an online reward model lies whole on every device, which FSDP was not tested with": (
                args.rm_update != "frozen" and self.is_fsdp_enabled
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise IpvrmError(f"DistRLTrainer: {reason}")

    # ------------------------------------------------------------------------------------ after the rollout

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # (B of all ranks, functions)
        unknown = rewards.isnan().all(1)
        self._rewards = (rewards * self.reward_weights.to(rewards)).nansum(1).masked_fill(unknown, torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._passes = []
        try:
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if self.args.group_std == "population":
                out["advantages"] = self._of_this_rank(self._population_advantages())
            if self._dense:
                self._add_dense_advantages(out)
        finally:
            self._passes = None
        return out

    def _per_prompt(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _of_this_rank(self, of_all: Tensor) -> Tensor:
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _population_advantages(self) -> Tensor:
        """(B of all ranks,) (r - mu) / (s + 1e-6), population moments over the rollouts that could be
        judged."""
        rewards = self._rewards.view(-1, self._per_prompt())
        centred = rewards - rewards.nanmean(1, keepdim=True)
        std = centred.square().nanmean(1, keepdim=True).sqrt()
        return (centred / (std + 1e-6)).nan_to_num(0.0).flatten()

    @torch.no_grad()
    def _add_dense_advantages(self, out: dict[str, Any]) -> None:
        args, rm, passes = self.args, self.prefix_rewards, self._passes
        assert rm is not None and passes is not None
        T = out["completion_ids"].shape[1]
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
        mask = self._loss_mask(out).bool()  # (B, T)
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        if out.get("old_per_token_logps") is None:  # then no pass has been made of the policy as it sampled
            passes.clear()
            self._get_per_token_logps_and_entropies(self.model, ids, attention, T, size)
        old, candidate_ids, old_candidates = passes[0]
        inputs = [
            {"input_ids": i, "attention_mask": a, "labels": labelled(i, a, T)}
            for i, a in zip(ids.split(size), attention.split(size), strict=True)
        ]
        B, world = len(ids), self.accelerator.num_processes
        group = (
            self.accelerator.process_index * B + torch.arange(B, device=ids.device)
        ) // self._per_prompt()
        num_groups = B * world // self._per_prompt()

        def learn() -> None:
            with torch.enable_grad():
                loss = rm.update(
                    inputs, old, mask, self._of_this_rank(self._rewards), group, num_groups, self._sum,
                    temperature=self.temperature, max_grad_norm=args.max_grad_norm,
                    policy=self.accelerator.unwrap_model(self.model),
                )  # fmt: skip
            self._note("reward_model_loss", loss)

        if args.rm_update == "before" and self.model.training:
            learn()
        rm_logprobs, rm_candidates = rm.logprobs(inputs, candidate_ids, self.temperature)
        if args.rm_update == "after" and self.model.training:
            learn()

        packed, cu_seqlens = pack(old, mask)  # (N,), (B + 1,)

        def rows(padded: Tensor) -> Tensor:
            return pack(padded, mask)[0]

        td = temporal_difference(rows(rm_logprobs), packed, cu_seqlens, beta=rm.info.beta)
        candidate_td = temporal_difference(
            rows(rm_candidates), rows(old_candidates), cu_seqlens, beta=rm.info.beta
        )
        found = distrl_advantages(
            td, candidate_td, torch.zeros(B, device=ids.device), cu_seqlens, group, num_groups,
            config=AdvantageConfig(discount=args.discount, lam=args.lam), reduce=self._sum,
        )  # fmt: skip
        out["advantages"] = out["advantages"][:, None] + args.gae_coef * unpack(found.gae, cu_seqlens, T)
        last = unpack(last_tokens("DistRLTrainer", cu_seqlens, packed).to(packed.dtype), cu_seqlens, T).bool()
        unused = (last | ~mask)[..., None]  # the last token carries the outcome and has no candidates
        out["candidate_ids"] = candidate_ids.masked_fill(unused, -1)  # (B, T, K)
        out["old_candidate_logps"] = old_candidates.masked_fill(unused, -torch.inf)
        out["candidate_advantages"] = unpack(found.candidate_advantages, cu_seqlens, T)
        self._note("candidates_per_token", float((out["candidate_ids"] >= 0).sum() / mask.sum().clamp(min=1)))
        self._note("value_std", float(found.value_std))

    def _sum(self, x: Tensor) -> Tensor:
        """Over all ranks."""
        return x if self.accelerator.num_processes == 1 else self.accelerator.reduce(x, "sum")

    def _note(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][f"distrl/{name}"].append(value)

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    # ------------------------------------------------------------------------------------------ the update

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False, compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """TRL's, by the patched head; what else the same pass tells of candidates is kept."""
        if given := [name for name, value in multimodal.items() if value is not None]:
            raise IpvrmError(f"DistRLTrainer: {', '.join(given)}: multimodal inputs are not supported")
        size, T = batch_size or len(input_ids), logits_to_keep
        options: dict[str, Any] = {"temperature": self.temperature, "return_entropy": compute_entropy}
        searched = self._passes is not None and model is self.model
        if searched:
            options["min_prob"] = self.args.min_prob
        elif compute_aux_loss:
            options["output_router_logits"] = True
        before = input_ids.shape[1] - 1 - T
        parts = []
        for start in range(0, len(input_ids), size):
            here = slice(start, start + size)
            if self._candidates is not None:
                ids = self._candidates[here]
                options["candidate_ids"] = torch.nn.functional.pad(ids, (0, 0, before, 0), value=-1)
            labels = labelled(input_ids[here], attention_mask[here], T)
            with self.accelerator.autocast():
                parts.append(
                    model(
                        input_ids=input_ids[here],
                        attention_mask=attention_mask[here],
                        labels=labels,
                        **options,
                    )
                )

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name)[:, -T:] for part in parts])

        logprobs = joined("logprobs")
        if searched:
            assert self._passes is not None
            self._passes.append((logprobs, joined("candidate_ids"), joined("candidate_logprobs")))
        if self._candidates is not None:
            self._candidate_logprobs = joined("candidate_logprobs")
        return (
            logprobs,
            joined("entropy") if compute_entropy else None,
            torch.stack([part.aux_loss for part in parts]).mean() if compute_aux_loss else None,
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.args.alpha:
            return super()._compute_loss(model, inputs)
        self._candidates = inputs["candidate_ids"]
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
            logprobs = self._candidate_logprobs
        finally:
            self._candidates = self._candidate_logprobs = None
        assert logprobs is not None
        old = inputs["old_candidate_logps"]
        of_element = clipped_surrogate(
            logprobs,
            old,
            inputs["candidate_advantages"],
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        ).loss
        of_token = (old.exp() * of_element).sum(-1)  # (B, T) sum over c of pi_old(c) l(c)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            of_token = of_token * inputs["importance_sampling_ratio"]
        branch = (of_token * self._row_weights(self._loss_mask(inputs), inputs)).sum()
        self._note("candidate_loss", float(branch.detach()))
        return loss + self.args.alpha * branch

    def _row_weights(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, T): by what loss_type divides the token branch, so that both branches stay in proportion."""
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.loss_type == "grpo":
            return mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / len(mask) / accumulated
        if self.loss_type == "bnpo":
            return mask / mask.sum().clamp(min=1.0) / accumulated
        if self.loss_type == "dr_grpo":
            return mask / (len(mask) * self.max_completion_length) / accumulated
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return mask / (
            tokens * accumulated / self.args.steps_per_generation if self.model.training else tokens
        )

    # ----------------------------------------------------------------------------------------------- files

    def train(self, resume_from_checkpoint: Any = None, **named: Any) -> Any:
        """GRPOTrainer's.

        Raises:
            IpvrmError: a resumed run with an online reward model, whose optimizer no checkpoint of TRL holds.
        """
        if resume_from_checkpoint and self.args.rm_update != "frozen":
            raise IpvrmError(
                "DistRLTrainer: a run with an online reward model is not resumed; start it again"
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """GRPOTrainer's, a model card, and an online reward model in `reward_model/` beside it once it has
        learnt."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder, rm = Path(output_dir or self.args.output_dir), self.prefix_rewards
        saved = rm is not None and bool(rm.behaviour)
        data = {"prompts": len(self.train_dataset)} if hasattr(self.train_dataset, "__len__") else {}
        log = self.state.log_history
        metrics: dict[str, Any] = next((line for line in reversed(log) if "loss" in line), {})
        self._write_card(folder, saved, data, metrics)
        if saved:
            assert rm is not None
            own = {k: v for k, v in metrics.items() if k in ("step", "reward") or k.startswith("distrl/")}
            policy = self.accelerator.unwrap_model(self.model)
            rm.save(folder / FOLDER, policy, self.temperature, data, own)

    def _write_card(
        self, folder: Path, with_reward_model: bool, data: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        args, rm = self.args, self.prefix_rewards
        names = ["learning_rate", "num_generations", "temperature", "loss_type"]
        names += ["alpha", "gae_coef", "rm_update"] if self._dense else []
        settings = {name: getattr(args, name) for name in names}
        if rm is not None:
            settings |= {"reward_model": str(rm.folder), "objective": rm.info.objective, "beta": rm.info.beta}
        write_policy_card(
            folder,
            algorithm="distrl" if self._dense else "grpo",
            with_reward_model=with_reward_model,
            base=self.model.config._name_or_path or None,
            settings=settings,
            data=data,
            metrics=metrics,
        )


def labelled(ids: Tensor, attention: Tensor, kept: int) -> Tensor:
    """Labels (B, S) of the last `kept` positions of ids that are no padding, else -100."""
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-kept] = -100
    return labels
