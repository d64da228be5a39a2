"""`ipvrm train-rm`: a reward model from outcome labels (stage A). Read it top to bottom.

The starting model is the reference; its log-probabilities are computed once, stored in the run folder, and
the model is trained in its place, so one model is in memory (a Q-RM has no reference, and a value head). One
update: the optimizer batch, of responses or of pairs, is split into micro-batches of similar length over all
ranks, each loss is divided by the denominator of the whole optimizer batch, gradients add up, and the
learning rate takes one step. The order of the data is a pure function of (seed, epoch).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import collate, epoch_order, microbatches_for_rank
from ipvrm.data.chat import Chat, parse_template_kwargs
from ipvrm.data.preference import Pairs, pairs_of
from ipvrm.data.responses import NOTED, Response, tokenize
from ipvrm.data.rows import read_rows
from ipvrm.errors import IpvrmError
from ipvrm.losses.metrics import Metrics, MetricSums, paired, stacked
from ipvrm.models.causal_lm import (
    ResponseLogprobs,
    fewest_devices,
    least_positions,
    load_model,
    load_tokenizer,
    local_folder,
    memory_estimate,
    template_hash,
    vocab_size,
    weights_hash,
)
from ipvrm.models.reference import REFERENCE_FILE, data_hash, not_finite, reference_logprobs, split_packed
from ipvrm.models.reward_model import CONFIG_NAME, RewardModelInfo, reference_entries, write_info
from ipvrm.models.token_rewards import (
    TokenValues,
    has_value_head,
    load_value_head,
    new_value_head,
    save_value_head,
)
from ipvrm.output.progress import peak_memory
from ipvrm.run_folder import settings_of, versions
from ipvrm.training import checkpoint
from ipvrm.training.adapters import adapter_entries, add_adapters, model_in_training, save_trained
from ipvrm.training.flags import filled
from ipvrm.training.fully_sharded import fully_sharded, whole_weights
from ipvrm.training.optimizer import NotFinite, adamw, data_parallel_accelerator, learning_rate_factor, update
from ipvrm.training.reward_config import RewardConfig, objective_of, resolve
from ipvrm.training.run import Run, TrainResult, held, report, with_template_kwargs

DEVICES_GB = (24, 48, 80, 141)  # memory of the devices that a dry run looks at


def train_reward_model(config: RewardConfig, progress: bool = True) -> TrainResult:
    """Trains a reward model and writes its run folder; under `accelerate launch` on every rank.

    Args:
        progress: show the progress bar and the data counts.

    Raises:
        IpvrmError: anything the user can act on, before the first update where possible.
        TrainingInterrupted: a signal, in a command (`ipvrm.cli.main`); a checkpoint has been written.
    """
    config = with_template_kwargs(resolve(config))
    accelerator = data_parallel_accelerator(
        "train-rm",
        use_cpu=config.use_cpu,
        mixed_precision=filled(config.mixed_precision),
        report_to=config.report_to,
        output_dir=config.output_dir,
    )
    if config.gradient_accumulation_steps is not None:
        rows = _items_per_forward(config) * accelerator.num_processes
        config = replace(config, global_batch_size=rows * config.gradient_accumulation_steps)
    models = [config.model, config.reference or config.model]
    with held(config):
        run = Run("train-rm", config, accelerator, starts_from=models, mark=CONFIG_NAME, progress=progress)
        inputs = _Inputs(config, run)
        if config.dry_run:
            return inputs.dry_run()
        run.begin(inputs.total_steps, inputs.fingerprint())
        return run.result() if run.finished else _Trainer(inputs).train()


def _items_per_forward(config: RewardConfig) -> int:
    """Most responses of a micro-batch, or pairs of them."""
    rows = config.per_device_train_batch_size
    return max(1, rows // 2) if objective_of(config).pairwise else rows


class _Inputs:
    """What a run is about: rows as tokens, read and checked before any weights are."""

    def __init__(self, config: RewardConfig, run: Run):
        self.config, self.run = config, run
        self.objective = objective_of(config)
        self.reference_name = config.reference or config.model
        if has_value_head(local_folder(config.model)) and config.objective != "q_rm":
            raise IpvrmError(
                f"{config.model}: it has a value head, and {config.objective} has no place for one: its "
                "value is a sum of log-ratios of the vocabulary head (Eq. 5), so the value head would be "
                "dropped. Start from a causal LM, or take --objective q_rm"
            )
        sizes = vocab_size(config.model), vocab_size(self.reference_name)
        if len({*sizes}) > 1:
            raise IpvrmError(
                "--model and --reference must share one vocabulary; "
                f"they have {sizes[0]} and {sizes[1]} tokens"
            )
        self.tokenizer = load_tokenizer(config.model)
        self.chat = Chat(self.tokenizer, parse_template_kwargs(config.chat_template_kwargs))
        self.data = self._read(config.train_data)
        self.eval_data = None if config.eval_data is None else self._read(config.eval_data)
        self.updates_per_epoch = -(-len(self.data.items) // config.global_batch_size)
        epochs = filled(config.num_train_epochs)
        self.total_steps = config.max_steps or max(1, round(epochs * self.updates_per_epoch))

    def _read(self, path: str) -> "_Rows":
        rows, bad = read_rows(path, self.config.on_bad_row)
        data = tokenize(
            rows,
            self.chat,
            max_length=self.config.max_length,
            max_positions=least_positions(self.config.model, self.reference_name),
            vocab_size=vocab_size(self.config.model),
            on_long=self.config.on_long,
            on_bad_row=self.config.on_bad_row,
        )
        data = replace(data, bad=[*bad, *data.bad])
        data.counts.update(rows=len(rows) + len(bad), bad=len(data.bad))
        for item in data.bad[:10]:
            self.run.progress.note(f"skipped {item}")
        self.run.progress.note(
            f"{path}: " + ", ".join(f"{value:,} {name}" for name, value in data.counts.items())
        )
        for name, said in NOTED.items():
            if data.counts[name]:
                self.run.progress.note(f"{path}: {data.counts[name]} of {len(rows)} responses {said}")
        if not data.responses:
            raise IpvrmError(
                f"{path}: no row is left ({data.counts}); raise --max_length or look at the data"
            )
        if self.objective.pairwise:
            paired = len({row.source for row in rows}) < len(rows)
            return self._pairs(path, data.responses, data.counts, paired)
        if not data.counts["right"] or not data.counts["wrong"]:
            self.run.progress.note(
                f"{path}: all outcomes are the same; such a reward model learns only a constant"
            )
        return _Rows(data.responses, data.counts, [(i,) for i in range(len(data.responses))])

    def _pairs(self, path: str, responses: list[Response], counts: dict[str, int], paired: bool) -> "_Rows":
        """Pairs of responses to a prompt, known by its tokens; `paired`: the two of a record."""
        config = self.config
        groups = [r.source if paired else r.input_ids[: r.prompt_length] for r in responses]
        how: Pairs = "all" if paired else filled(config.pairs)
        pairs, of_groups = pairs_of(groups, [r.label == 1 for r in responses], how, filled(config.seed))
        self.run.progress.note(f"{path}: " + ", ".join(f"{n:,} {name}" for name, n in of_groups.items()))
        if not pairs:
            raise IpvrmError(
                f"{path}: no prompt has both a right and a wrong response ({of_groups}), so there is nothing "
                f"that {config.objective} can compare; sample more responses per prompt"
            )
        used = sorted({i for pair in pairs for i in pair})
        place = {i: k for k, i in enumerate(used)}
        items: list[tuple[int, ...]] = [(place[chosen], place[rejected]) for chosen, rejected in pairs]
        return _Rows([responses[i] for i in used], counts | of_groups, items)

    @cached_property
    def reference_hash(self) -> str:
        return weights_hash(self.reference_name)

    @cached_property
    def start_hash(self) -> str:
        return self.reference_hash if self.config.reference is None else weights_hash(self.config.model)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        return settings_of(self.config) | {
            "start_hash": self.start_hash,
            "reference_hash": self.reference_hash,
            "data_hash": data_hash(self.data.of(range(len(self.data.items)))),
        }

    def dry_run(self) -> TrainResult:
        """Prints the resolved config, the data counts and a memory estimate."""
        config = self.config
        memory_of = partial(
            memory_estimate,
            config.model,
            rows=config.per_device_train_batch_size,
            length=max(len(r.input_ids) for r in self.data.responses),
            mixed_precision=filled(config.mixed_precision),
            gradient_checkpointing=config.gradient_checkpointing,
            lora_r=config.lora_r,
        )
        one, two = memory_of(), memory_of(shards=2)
        shards = self.run.accelerator.num_processes if config.fsdp else 1
        fits = {f"{size} GB": self._fits(fewest_devices(one, two, size * 1e9)) for size in DEVICES_GB}
        return self.run.dry_run(
            {
                "data": self.data.counts,
                "steps": self.total_steps,
                "memory_estimate": one if shards == 1 else memory_of(shards=shards),
                "fits": fits,
            }
        )

    def _fits(self, devices: int | None) -> str:
        if devices == 1:
            return "yes"
        if devices is None or self.config.objective == "q_rm":  # which --fsdp does not take
            return "no"
        return f"with --fsdp, on {devices} or more"


class _Trainer:
    """The model and its updates; the methods are in the order in which they happen."""

    def __init__(self, inputs: _Inputs):
        self.inputs, self.run, self.config = inputs, inputs.run, inputs.config
        config, run = self.config, self.run
        self.accelerator, self.device = run.accelerator, run.device
        self.data, self.eval_data = inputs.data, inputs.eval_data
        self.objective = inputs.objective
        model = model_in_training(config, run.resumed, run.progress.note)
        module: nn.Module = ResponseLogprobs(model)
        if config.objective == "q_rm":
            folder = run.resumed or local_folder(config.model)
            head = load_value_head(folder, model) if has_value_head(folder) else new_value_head(model)
            module = TokenValues(model, head)
        self.whole: tuple[dict[str, Any], dict[str, Any]] = {}, {}  # weights and optimizer, see `gather`
        if config.fsdp:
            if config.objective == "q_rm":
                raise IpvrmError(
                    "--fsdp: a value head (q_rm) was not tested in shards; leave one of them out"
                )
            module = fully_sharded(module, self.accelerator)
        optimizer = adamw(module, config.learning_rate, config, self.device)
        if config.fsdp:
            self.module, self.optimizer = module, self.accelerator.prepare(optimizer)
        else:
            self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self._prepare_reference()
        run.restore(self.module, self.optimizer)
        run.watch("the model", self.optimizer)
        self.pending = MetricSums()  # of the updates that the log does not have yet
        if run.state is not None:
            self.pending.add(run.state["pending"])
        self.tokens = 0  # since the loop was entered
        self.epoch, self.order = -1, list[int]()

    def _prepare_reference(self) -> None:
        """Reference log-probabilities of all response tokens, computed before anything has been trained."""
        if self.config.objective == "q_rm":  # its values are compared with none
            return
        sets = [self.data] if self.eval_data is None else [self.data, self.eval_data]
        packed = reference_logprobs(
            [rows.responses for rows in sets],
            self.run.output / REFERENCE_FILE,
            self.accelerator,
            reference_name=self.inputs.reference_name,
            reference_hash=self.inputs.reference_hash,
            module=self.module if self.run.start == 0 and self.config.reference is None else None,
            max_rows=self.config.per_device_train_batch_size,
            progress=self.run.progress,
        )
        for rows, values in zip(sets, packed, strict=True):
            rows.reference = split_packed(values, rows.responses)

    # --------------------------------------------------------------------------------------------- loop

    def train(self) -> TrainResult:
        """All updates, with log, validation and checkpoints."""
        config, run, total = self.config, self.run, self.inputs.total_steps
        validation: dict[str, float] = {}
        means: dict[str, float] = {}
        with run.loop() as bar:
            if run.start == 0:
                validation = self._validate()
                if validation:
                    run.record({"step": 0, **validation})
            for step in range(run.start, total):
                done = step + 1
                with run.kept_on_failure(step, self):
                    sums, grad_norm = self._update(step)
                run.moved.clear()
                self.pending.add(sums)
                means, speed = self.pending.means(), self.tokens / run.seconds()
                shown = {name: means[name] for name in self.objective.metrics[:2]}
                bar(done, **shown, tokens_per_second=speed)
                validate = run.evaluates(done, config.eval_steps)
                if validate or done % config.logging_steps == 0:
                    record = {
                        "step": done,
                        "epoch": done / self.inputs.updates_per_epoch,
                        **means,
                        "learning_rate": self.optimizer.param_groups[0]["lr"],
                        "grad_norm": grad_norm,
                        "tokens_per_second": speed,
                        "peak_memory_bytes": peak_memory(self.device),
                    }
                    self.pending = MetricSums()
                    if validate:
                        with run.kept_on_failure(done, self, record):
                            validation = self._validate()
                        record |= validation
                    run.record(record)
                run.after_step(done, self)
            return self._finish(means, validation)

    def _update(self, step: int) -> tuple[dict[str, tuple[float, float]], float]:
        """One optimizer update: metric sums and gradient norm over all ranks."""
        config, data, total = self.config, self.data, self.inputs.total_steps
        epoch, position = divmod(step, self.inputs.updates_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(len(data.items), filled(config.seed), epoch)
        indices = self.order[position * config.global_batch_size : (position + 1) * config.global_batch_size]
        denominator = self.objective.denominator([r.length for r in data.of(indices)])

        def loss_and_sums(micro: list[int]) -> tuple[Tensor, Tensor]:
            loss, metrics = self._loss(data, micro or indices[:1], denominator)
            return loss, stacked(metrics, self.objective.metrics)

        share = self._microbatches(indices, data)
        try:
            values, grad_norm = update(
                self.accelerator,
                self.module,
                self.optimizer,
                share,
                loss_and_sums,
                learning_rate=config.learning_rate * learning_rate_factor(step, total, config),
                max_grad_norm=config.max_grad_norm,
            )
        except NotFinite as error:
            place = self._not_finite(share, indices, data)
            where = f" ({place})" if place else ""
            raise NotFinite(
                f"update {step + 1}: {error}{where}; stopped before the weights took it. "
                "Lower --learning_rate or --max_grad_norm, or look at the rows of this batch"
            ) from error
        self.tokens += sum(data.lengths[i] for i in indices)
        return paired(values, self.objective.metrics), grad_norm

    def _microbatches(self, indices: Sequence[int], data: "_Rows") -> list[list[int]]:
        return microbatches_for_rank(
            indices,
            data.lengths,
            max_rows=_items_per_forward(self.config),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _loss(self, data: "_Rows", indices: list[int], denominator: float) -> tuple[Tensor, Metrics]:
        batch = collate(data.of(indices)).to(self.device)
        log_ratio = self.module(batch)
        if data.reference:
            log_ratio = log_ratio - torch.cat([data.reference[i] for i in data.rows(indices)]).to(self.device)
        return self.objective(log_ratio, batch.cu_seqlens, batch.outcome, denominator)

    @torch.no_grad()
    def _not_finite(self, share: list[list[int]], indices: Sequence[int], data: "_Rows") -> str | None:
        """The row of these whose log-probability under the model is not finite, in words; on all ranks."""
        from accelerate.utils import gather_object

        found = []
        for micro in share:
            chosen = data.of(micro or indices[:1])  # all ranks take part in it
            logprobs = self.module(collate(chosen).to(self.device))
            found.append(not_finite(logprobs, chosen) if micro else None)
        return next((place for place in gather_object(found) if place is not None), None)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Metrics of the validation set: sums over all micro-batches and ranks, then one division."""
        data = self.eval_data
        if data is None:
            return {}
        sums = torch.zeros(2 * len(self.objective.metrics), dtype=torch.float64)
        share = self._microbatches(range(len(data.items)), data)
        for micro in share:
            _, metrics = self._loss(data, micro or [0], 1.0)
            if micro:
                sums += stacked(metrics, self.objective.metrics).double().cpu()
        total = MetricSums()
        values = self.accelerator.reduce(sums.to(self.device, torch.float32), "sum").tolist()
        total.add(paired(values, self.objective.metrics))
        if not math.isfinite(values[0]):
            place = self._not_finite(share, [0], data)
            raise NotFinite(f"validation loss {values[0]}" + (f": {place}" if place else ""))
        return total.means("eval_")

    # -------------------------------------------------------------------------------------------- files

    def gather(self) -> None:
        """Brings the shards together on the main rank."""
        if self.config.fsdp:
            state = checkpoint.optimizer_state(self.module, self.optimizer.optimizer)
            self.whole = whole_weights(self.module), state

    def _plain_model(self) -> torch.nn.Module:
        """What is trained, as a model that lies whole on this rank; under FSDP2 a new one on the CPU."""
        config = self.config
        if not config.fsdp:
            return cast(torch.nn.Module, self.accelerator.unwrap_model(self.module).model)
        model = load_model(config.model, torch.float32)
        if config.lora_r:
            alpha, names = filled(config.lora_alpha), config.lora_target_modules
            model = add_adapters(model, config.lora_r, alpha=alpha, target_modules=names)
        ResponseLogprobs(model).load_state_dict(self.whole[0])
        return model

    def write_model(self, folder: Path, place: Path) -> None:
        """The model folder that `RewardModel.from_pretrained` reads."""
        config = self.config
        assert config.beta is not None
        save_trained(self._plain_model(), folder)
        reference: dict[str, Any] = dict.fromkeys(("reference", "reference_given", "reference_hash"), "")
        if config.objective == "q_rm":
            save_value_head(self.accelerator.unwrap_model(self.module).value_head, folder)
        else:
            reference = reference_entries(self.inputs.reference_name, place, self.inputs.reference_hash)
        self.inputs.tokenizer.save_pretrained(folder)
        info = RewardModelInfo(
            objective=config.objective,
            beta=config.beta,
            margin=config.margin,
            **reference,
            template_hash=template_hash(self.inputs.tokenizer),
            versions=versions(),
            chat_template_kwargs=self.inputs.chat.kwargs,
            adapter=adapter_entries(config.model, self.inputs.start_hash, config.lora_r, config.lora_alpha),
        )
        data = {"train data": config.train_data, **self.data.counts}
        write_info(folder, info, data, self.run.last)

    def write_state(self, folder: Path) -> dict[str, Any]:
        """The optimizer and the unlogged metrics."""
        return {
            "total_steps": self.inputs.total_steps,
            "pending": self.pending.values,
            "optimizer": checkpoint.save_optimizer(
                folder, self.whole[1] or checkpoint.optimizer_state(self.module, self.optimizer.optimizer)
            ),
        }

    def _finish(self, trained: dict[str, float], validation: dict[str, float]) -> TrainResult:
        seconds, total = self.run.seconds(), self.inputs.total_steps
        metrics = {
            "objective": self.config.objective,
            "steps": total,
            "epochs": total / self.inputs.updates_per_epoch,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "train": trained,
            "eval": validation,
            "data": self.data.counts,
            "eval_data": None if self.eval_data is None else self.eval_data.counts,
        }
        return self.run.finish(metrics, self)


@dataclass
class _Rows:
    """A data set as the loop needs it: items of one response each, or of two that are compared."""

    responses: list[Response]
    counts: dict[str, int]
    items: list[tuple[int, ...]]  # places in `responses`; of a pair first the chosen
    reference: list[Tensor] = field(default_factory=list)  # (T_b,) fp32 on the CPU; of a Q-RM none

    def __post_init__(self) -> None:
        self.lengths = [sum(len(self.responses[i].input_ids) for i in item) for item in self.items]

    def rows(self, indices: Iterable[int]) -> list[int]:
        """The places of the responses of these items, in turn."""
        return [i for index in indices for i in self.items[index]]

    def of(self, indices: Iterable[int]) -> list[Response]:
        """The responses of these items, in turn."""
        return [self.responses[i] for i in self.rows(indices)]


def main(config: RewardConfig) -> None:
    """Console entry."""
    report(train_reward_model(config))
