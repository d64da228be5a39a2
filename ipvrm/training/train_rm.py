"""`ipvrm train-rm`: a reward model from outcome labels (stage A). Read it top to bottom.

The starting model is the reference; its log-probabilities are computed once, stored in the run folder, and
the model is trained in its place, so one model is in memory. One update: the optimizer batch is split into
micro-batches of similar length over all ranks, each loss is divided by the denominator of the whole
optimizer batch, gradients add up, and the learning rate takes one step. The order of the data is a pure
function of (seed, epoch).
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ipvrm.data.batches import collate, epoch_order, microbatches_for_rank
from ipvrm.data.chat import Chat, parse_template_kwargs
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import read_rows
from ipvrm.errors import IpvrmError
from ipvrm.losses.metrics import Metrics, MetricSums, paired, stacked
from ipvrm.losses.objectives import METRICS
from ipvrm.models.causal_lm import (
    ResponseLogprobs,
    disable_dropout,
    load_model,
    load_tokenizer,
    max_positions,
    memory_estimate,
    save_model,
    template_hash,
    weights_hash,
)
from ipvrm.models.reference import REFERENCE_FILE, data_hash, not_finite, reference_logprobs, split_packed
from ipvrm.models.reward_model import CONFIG_NAME, RewardModelInfo, reference_entries, write_info
from ipvrm.progress import Interrupt, Progress, peak_memory
from ipvrm.run_folder import (
    manifest,
    move_into,
    remove_leftovers,
    same_run,
    save_folder,
    settings_of,
    versions,
    write_json,
    write_text,
)
from ipvrm.training import checkpoint
from ipvrm.training.checkpoint import interrupted
from ipvrm.training.optimizer import NotFinite, adamw, data_parallel_accelerator, learning_rate_factor, update
from ipvrm.training.reward_config import RewardConfig, objective_of, resolve


@dataclass(frozen=True)
class TrainResult:
    """What `train_reward_model` returns; `metrics` is what results.json holds."""

    output_dir: Path
    metrics: dict[str, Any]
    steps: int
    seconds: float


def train_reward_model(config: RewardConfig, progress: bool = True) -> TrainResult:
    """Trains a reward model and writes its run folder; under `accelerate launch` on every rank.

    Args:
        progress: show the progress bar and the data counts.

    Raises:
        IpvrmError: anything the user can act on, before the first update where possible.
        TrainingInterrupted: SIGINT or SIGTERM; a checkpoint has been written.
    """
    return _Run(resolve(config), progress).train()


class _Run:
    """One training run; the methods are in the order in which they happen."""

    def __init__(self, config: RewardConfig, progress: bool):
        self.output = Path(config.output_dir)
        self.accelerator = data_parallel_accelerator(
            "train-rm", use_cpu=config.use_cpu, mixed_precision=config.mixed_precision
        )
        if config.gradient_accumulation_steps is not None:
            rows = config.per_device_train_batch_size * self.accelerator.num_processes
            config = replace(config, global_batch_size=rows * config.gradient_accumulation_steps)
        self.config = config
        self.main = self.accelerator.is_main_process
        self.progress = Progress(enabled=progress and self.main)
        self.device = self.accelerator.device
        self.resumed = checkpoint.resumed_from(self.output, config.resume_from_checkpoint, CONFIG_NAME)
        self.reference_name = config.reference or config.model
        if self.output.resolve() in (Path(config.model).resolve(), Path(self.reference_name).resolve()):
            raise IpvrmError(
                f"--output_dir {self.output} is the starting model or the reference; it would be overwritten"
            )
        self.objective = objective_of(config)
        self.tokenizer = load_tokenizer(config.model)
        self.template_hash = template_hash(self.tokenizer)
        self.chat = Chat(self.tokenizer, parse_template_kwargs(config.chat_template_kwargs))
        self.data = self._read(config.train_data)
        self.eval_data = None if config.eval_data is None else self._read(config.eval_data)
        self.updates_per_epoch = -(-len(self.data.responses) // config.global_batch_size)
        self.total_steps = config.max_steps or max(1, round(config.num_train_epochs * self.updates_per_epoch))

    # ------------------------------------------------------------------------------------------- before

    def _read(self, path: str) -> "_Rows":
        rows, bad = read_rows(path, self.config.on_bad_row)
        data = tokenize(
            rows,
            self.chat,
            max_length=self.config.max_length,
            max_positions=max_positions(self.config.model),
            on_long=self.config.on_long,
            on_bad_row=self.config.on_bad_row,
        )
        data = replace(data, bad=[*bad, *data.bad])
        data.counts.update(rows=len(rows) + len(bad), bad=len(data.bad))
        for item in data.bad[:10]:
            self.progress.note(f"skipped {item}")
        self.progress.note(
            f"{path}: " + ", ".join(f"{value:,} {name}" for name, value in data.counts.items())
        )
        if not data.responses:
            raise IpvrmError(
                f"{path}: no row is left ({data.counts}); raise --max_length or look at the data"
            )
        if not data.counts["right"] or not data.counts["wrong"]:
            self.progress.note(
                f"{path}: all outcomes are the same; such a reward model learns only a constant"
            )
        return _Rows(data.responses, data.counts, [len(r.input_ids) for r in data.responses])

    def _fingerprint(self) -> dict[str, Any]:
        """What decides the weights of the run; compared on resume."""
        return settings_of(self.config) | {
            "start_hash": self.reference_hash
            if self.config.reference is None
            else weights_hash(self.config.model),
            "reference_hash": self.reference_hash,
            "data_hash": data_hash(self.data.responses),
        }

    def train(self) -> TrainResult:
        config = self.config
        if config.dry_run:
            return self._dry_run()
        self.reference_hash = weights_hash(self.reference_name)
        fingerprint = self._fingerprint()
        state = None if self.resumed is None else checkpoint.load_state(self.resumed)
        if state is not None:
            same_run(state["fingerprint"], fingerprint, str(self.resumed), checkpoint.WORDS)
        self.start = 0 if state is None else int(state["step"])
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            write_text(self.output / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
            seeds = {"seed": config.seed}
            write_json(
                self.output / "manifest.json", manifest(seeds=seeds, ranks=self.accelerator.num_processes)
            )

        torch.manual_seed(config.seed)
        model = load_model(self.resumed or config.model, torch.float32)
        disable_dropout(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        model.train()
        module = ResponseLogprobs(model)
        optimizer = adamw(module, config.learning_rate, config, self.device)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.fingerprint = fingerprint
        self._prepare_reference()
        if state is not None and self.resumed is not None:
            checkpoint.load_optimizer(self.resumed, self.module, self.optimizer.optimizer, state["optimizer"])
            checkpoint.restore_rng_state(self.resumed, self.accelerator.process_index)
        return self._loop()

    def _prepare_reference(self) -> None:
        """Reference log-probabilities of all response tokens, computed before anything has been trained."""
        sets = [self.data] if self.eval_data is None else [self.data, self.eval_data]
        packed = reference_logprobs(
            [rows.responses for rows in sets],
            self.output / REFERENCE_FILE,
            self.accelerator,
            reference_name=self.reference_name,
            reference_hash=self.reference_hash,
            module=self.module if self.start == 0 and self.config.reference is None else None,
            max_rows=self.config.per_device_train_batch_size,
            progress=self.progress,
        )
        for rows, values in zip(sets, packed, strict=True):
            rows.reference = split_packed(values, rows.responses)

    # --------------------------------------------------------------------------------------------- loop

    def _loop(self) -> TrainResult:
        config = self.config
        self.log = None
        if self.main:
            self.log = checkpoint.open_log(self.output, self.start, resumed=self.resumed is not None)
        self.started = time.perf_counter()
        self.tokens = 0
        self.epoch, self.order = -1, list[int]()
        pending = MetricSums()
        if self.resumed is not None:
            pending.add(checkpoint.load_state(self.resumed)["pending"])
        validation: dict[str, float] = {}
        if self.start == 0:
            validation = self._validate()
            if validation:
                self._record({"step": 0, **validation})
        with Interrupt() as interrupt, self.progress.bar("train-rm", self.total_steps, self.start) as bar:
            for step in range(self.start, self.total_steps):
                sums, grad_norm, stop = self._update(step, interrupt)
                pending.add(sums)
                done = step + 1
                last = done == self.total_steps
                validate = last or (config.eval_steps is not None and done % config.eval_steps == 0)
                speed = self.tokens / self._seconds()
                means = pending.means()
                shown = {name: means[name] for name in ("loss", "prefix_accuracy")}
                bar(done, **shown, tokens_per_second=speed)
                if validate or done % config.logging_steps == 0:
                    validation = self._validate() if validate else {}
                    self._record(
                        {
                            "step": done,
                            "epoch": done / self.updates_per_epoch,
                            **means,
                            "learning_rate": self.optimizer.param_groups[0]["lr"],
                            "grad_norm": grad_norm,
                            "tokens_per_second": speed,
                            "peak_memory_bytes": peak_memory(self.device),
                            **validation,
                        }
                    )
                    pending = MetricSums()
                if not last and (stop or (config.save_steps and done % config.save_steps == 0)):
                    folder = self._save_checkpoint(done, pending)
                    if stop:
                        raise interrupted(folder, done, self.total_steps, interrupt.signal)
            # there is no checkpoint of the last update: a signal must not end the process before the model is
            # written
            return self._finish(means, validation)

    def _update(self, step: int, interrupt: Interrupt) -> tuple[dict[str, tuple[float, float]], float, bool]:
        """One optimizer update: metric sums and gradient norm over all ranks, and whether one is to stop."""
        config, data = self.config, self.data
        epoch, position = divmod(step, self.updates_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(len(data.responses), config.seed, epoch)
        indices = self.order[position * config.global_batch_size : (position + 1) * config.global_batch_size]
        denominator = self.objective.denominator([data.responses[i].length for i in indices])

        def loss_and_sums(micro: list[int]) -> tuple[Tensor, Tensor]:
            loss, metrics = self._loss(data, micro or indices[:1], denominator)
            return loss, stacked(metrics, METRICS)

        share = self._microbatches(indices, data)
        try:
            values, grad_norm = update(
                self.accelerator,
                self.module,
                self.optimizer,
                share,
                loss_and_sums,
                learning_rate=config.learning_rate * learning_rate_factor(step, self.total_steps, config),
                max_grad_norm=config.max_grad_norm,
            )
        except NotFinite as error:
            raise self._diverged(step + 1, error, self._not_finite(share, indices, data)) from error
        self.tokens += sum(data.lengths[i] for i in indices)
        return paired(values, METRICS), grad_norm, interrupt.asked(self.accelerator)

    def _microbatches(self, indices: Sequence[int], data: "_Rows") -> list[list[int]]:
        return microbatches_for_rank(
            indices,
            data.lengths,
            max_rows=self.config.per_device_train_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _loss(self, data: "_Rows", indices: list[int], denominator: float) -> tuple[Tensor, Metrics]:
        batch = collate([data.responses[i] for i in indices]).to(self.device)
        log_ratio = self.module(batch) - torch.cat([data.reference[i] for i in indices]).to(self.device)
        return self.objective(log_ratio, batch.cu_seqlens, batch.outcome, denominator)

    @torch.no_grad()
    def _not_finite(self, share: list[list[int]], indices: Sequence[int], data: "_Rows") -> str | None:
        """The row of these whose log-probability under the model is not finite, in words; on all ranks."""
        from accelerate.utils import gather_object

        found = []
        for micro in share:
            chosen = [data.responses[i] for i in micro or indices[:1]]  # all ranks take part in it
            logprobs = self.module(collate(chosen).to(self.device))
            found.append(not_finite(logprobs, chosen) if micro else None)
        return next((place for place in gather_object(found) if place is not None), None)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Metrics of the validation set: sums over all micro-batches and ranks, then one division."""
        data = self.eval_data
        if data is None:
            return {}
        sums = torch.zeros(2 * len(METRICS), dtype=torch.float64)
        share = self._microbatches(range(len(data.responses)), data)
        for micro in share:
            _, metrics = self._loss(data, micro or [0], 1.0)
            if micro:
                sums += stacked(metrics, METRICS).double().cpu()
        total = MetricSums()
        values = self.accelerator.reduce(sums.to(self.device, torch.float32), "sum").tolist()
        total.add(paired(values, METRICS))
        if not math.isfinite(values[0]):
            place = self._not_finite(share, [0], data)
            raise IpvrmError(f"validation loss {values[0]}" + (f": {place}" if place else ""))
        return total.means("eval_")

    # -------------------------------------------------------------------------------------------- files

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _record(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)
            self.progress.logged(record, self.total_steps)

    def _info(self, folder: Path) -> RewardModelInfo:
        assert self.config.beta is not None
        return RewardModelInfo(
            objective=self.config.objective,
            beta=self.config.beta,
            margin=self.config.margin,
            **reference_entries(self.reference_name, folder, self.reference_hash),
            template_hash=self.template_hash,
            versions=versions(),
            chat_template_kwargs=self.chat.kwargs,
        )

    def _write_model(self, folder: Path, final_place: Path) -> None:
        save_model(self.accelerator.unwrap_model(self.module).model, folder)
        self.tokenizer.save_pretrained(folder)
        write_info(folder, self._info(final_place))

    def _save_checkpoint(self, step: int, pending: MetricSums) -> Path:
        from accelerate.utils import gather_object

        rng = gather_object([checkpoint.rng_state(self.accelerator.process_index)])
        path = self.output / f"{checkpoint.PREFIX}{step}"
        if self.main:
            with save_folder(path) as folder:
                self._write_model(folder, path)
                scalars = checkpoint.save_optimizer(folder, self.module, self.optimizer.optimizer)
                state = {
                    "step": step,
                    "total_steps": self.total_steps,
                    "fingerprint": self.fingerprint,
                    "pending": pending.values,
                    "optimizer": scalars,
                }
                checkpoint.save_state(folder, state, rng)
            checkpoint.remove_old_checkpoints(self.output, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def _finish(self, trained: dict[str, float], validation: dict[str, float]) -> TrainResult:
        seconds = self._seconds()
        metrics = {
            "objective": self.config.objective,
            "steps": self.total_steps,
            "epochs": self.total_steps / self.updates_per_epoch,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "train": trained,
            "eval": validation,
            "data": self.data.counts,
            "eval_data": None if self.eval_data is None else self.eval_data.counts,
        }
        if self.main and self.log is not None:
            self.log.close()
            finished = self.output / ".finished.tmp"
            with save_folder(finished) as folder:
                self._write_model(folder, self.output)
                write_json(folder / "results.json", metrics)
            move_into(finished, self.output, last=CONFIG_NAME)
        self.accelerator.wait_for_everyone()
        return TrainResult(self.output, metrics, self.total_steps, seconds)

    def _diverged(self, step: int, error: NotFinite, place: str | None) -> IpvrmError:
        return IpvrmError(
            f"update {step}: {error}{f' ({place})' if place else ''}; stopped before the weights took it; "
            f"{checkpoint.newest_in_words(self.output)}. "
            "Lower --learning_rate or --max_grad_norm, or look at the rows of this batch"
        )

    def _dry_run(self) -> TrainResult:
        """Prints the resolved config, the data counts and a memory estimate."""
        config = self.config
        memory = memory_estimate(
            config.model,
            rows=config.per_device_train_batch_size,
            length=max(len(r.input_ids) for r in self.data.responses),
            mixed_precision=config.mixed_precision,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        metrics = {
            "config": asdict(config),
            "data": self.data.counts,
            "steps": self.total_steps,
            "memory_estimate": memory,
        }
        if self.main:
            print(yaml.safe_dump(metrics, sort_keys=False), end="")
        return TrainResult(self.output, metrics, 0, 0.0)


@dataclass
class _Rows:
    """A data set as the loop needs it."""

    responses: list[Response]
    counts: dict[str, int]
    lengths: list[int]  # tokens of prompt and response
    reference: list[Tensor] = field(default_factory=list)  # (T_b,) fp32 on the CPU


def main(config: RewardConfig) -> None:
    """Console entry."""
    result = train_reward_model(config)
    if result.steps and int(os.environ.get("RANK", "0")) == 0:
        print(f"{result.output_dir}: {result.steps} updates in {result.seconds:.1f} s")
