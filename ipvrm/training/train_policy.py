"""`ipvrm train-policy`: DistRL and its baselines (stage B). Read it top to bottom.

One step, `_Run._step`: responses are sampled and verified, prompts whose outcomes differ are kept; one pass
of the policy gives behaviour log-probs, entropy and exact candidates; the reward model learns from the labels
(before or after it scores) and gives its log-probs of the same tokens; advantages are formed once; then the
policy is updated in minibatches. Every loss is divided by the denominator of its whole minibatch, so that the
update does not depend on micro-batches, packing or ranks. Ranks share the work and hold the same rollouts.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from ipvrm.data.batches import Batch, epoch_order
from ipvrm.data.rows import BadRow, read_prompts
from ipvrm.errors import IpvrmError
from ipvrm.losses.advantages import distrl_advantages, outcome_advantages, temporal_difference
from ipvrm.losses.baselines import per_token, prime_advantages, spro_advantages
from ipvrm.losses.metrics import MetricSums, auc, paired, stacked
from ipvrm.models.causal_lm import (
    disable_dropout,
    load_model,
    load_tokenizer,
    max_positions,
    memory_estimate,
    response_logprobs,
    save_model,
    weights_hash,
)
from ipvrm.progress import Interrupt, Progress, peak_memory
from ipvrm.rollouts.answers import Question, as_questions
from ipvrm.rollouts.engine import TransformersEngine, stop_ids
from ipvrm.rollouts.verify import VerifierPool
from ipvrm.run_folder import (
    manifest,
    move_into,
    remove_leftovers,
    same_run,
    save_folder,
    settings_of,
    write_json,
    write_text,
)
from ipvrm.training import checkpoint
from ipvrm.training.checkpoint import interrupted
from ipvrm.training.online_reward import FOLDER, OnlineReward
from ipvrm.training.optimizer import NotFinite, adamw, data_parallel_accelerator, learning_rate_factor, update
from ipvrm.training.policy_config import Method, PolicyConfig, resolve
from ipvrm.training.policy_model import PolicyLoss, add_adapters, behaviour, merged
from ipvrm.training.policy_rollouts import Collector, Rollouts, Unanimous, questions_hash
from ipvrm_kernels import DISTRL_METRICS, prefix_values

ADAPTER = "adapter"
LOSSES = ("policy_loss", "token_loss", "candidate_loss")


@dataclass(frozen=True)
class PolicyResult:
    """What `train_policy` returns; `metrics` is what results.json holds."""

    output_dir: Path
    metrics: dict[str, Any]
    steps: int
    seconds: float


def train_policy(config: PolicyConfig, progress: bool = True) -> PolicyResult:
    """Trains a policy and writes its run folder; under `accelerate launch` on every rank.

    What fails after the first step is raised once the steps before it are in a checkpoint, where the weights
    are still theirs, and every rank is known to have failed alike.

    Raises:
        IpvrmError: anything the user can act on, before the first step where possible.
        TrainingInterrupted: SIGINT or SIGTERM; a checkpoint has been written.
    """
    return _Run(*resolve(config), progress).train()


class _Run:
    """One training run; the methods are in the order in which they happen."""

    def __init__(self, config: PolicyConfig, method: Method, progress: bool):
        self.config, self.method = config, method
        self.output = Path(config.output_dir)
        self.accelerator = data_parallel_accelerator(
            "train-policy", use_cpu=config.use_cpu, mixed_precision=config.mixed_precision
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.progress = Progress(enabled=progress and self.main)
        for given in filter(None, (config.model, config.reward_model)):
            if self.output.resolve() == Path(given).resolve():
                raise IpvrmError(f"--output_dir {self.output} is a starting model; it would be overwritten")
        self.resumed = checkpoint.resumed_from(self.output, config.resume_from_checkpoint, "results.json")
        self.tokenizer = load_tokenizer(config.model)
        self.reward = None
        if config.reward_model is not None:
            self.reward = OnlineReward(config, method.balance, self.tokenizer, self.accelerator)
        self.seconds: dict[str, float] = {}
        self.moved: set[str] = set()  # the models that have learnt from a step that is not finished

    # ------------------------------------------------------------------------------------------- before

    def train(self) -> PolicyResult:
        config = self.config
        # under LoRA a checkpoint's weights are merged ones; its adapters belong on the starting weights
        from_checkpoint = self.resumed is not None and config.lora_r is None
        model = load_model(cast(Path, self.resumed) if from_checkpoint else config.model, torch.float32)
        context = max_positions(model)
        questions, bad = self._questions(config.train_data, context)
        self.counts: dict[str, int] = {"prompts": len(questions), "bad": len(bad)}
        self.progress.note(f"{config.train_data}: {len(questions):,} prompts, {len(bad)} bad")
        eval_questions = None
        if config.eval_data is not None:
            eval_questions, _ = self._questions(config.eval_data, context)
        if config.dry_run:
            return self._dry_run(max(len(q.ids) for q in questions) + config.max_new_tokens)
        fingerprint = settings_of(config) | {
            "start_hash": weights_hash(config.model),
            "data_hash": questions_hash(questions),
            **({} if self.reward is None else self.reward.fingerprint()),
        }
        state = None if self.resumed is None else checkpoint.load_state(self.resumed)
        if state is not None:
            same_run(state["fingerprint"], fingerprint, str(self.resumed), checkpoint.WORDS)
        self.fingerprint = fingerprint
        self.start = 0 if state is None else int(state["step"])
        self.place = 0 if state is None else int(state["place"])
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            write_text(self.output / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
            record = manifest(seeds={"seed": config.seed}, ranks=self.accelerator.num_processes)
            write_json(self.output / "manifest.json", record)

        torch.manual_seed(config.seed)
        disable_dropout(model)
        if config.lora_r is not None:
            model = add_adapters(model, config, None if self.resumed is None else self.resumed / ADAPTER)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        model.train()
        assert config.learning_rate is not None and config.temperature is not None
        module = PolicyLoss(model, self.method.loss, config.temperature)
        optimizer = adamw(module, config.learning_rate, config, self.device)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.policy = self.accelerator.unwrap_model(self.module).model
        self.start_policy: nn.Module | None = None
        if config.algorithm == "spro":
            self.start_policy = load_model(config.model, torch.float32, self.device)
        if self.reward is not None:
            self.reward.load(self.resumed, None if state is None else state["reward_optimizer"])
        if state is not None and self.resumed is not None:
            checkpoint.load_optimizer(self.resumed, self.module, self.optimizer.optimizer, state["optimizer"])
            checkpoint.restore_rng_state(self.resumed, self.accelerator.process_index)
        self._watch("the policy", self.optimizer.optimizer)
        if self.reward is not None and self.reward.trained:
            self._watch("the reward model", self.reward.optimizer.optimizer)
        stops = stop_ids(self.policy, self.tokenizer)
        engine = TransformersEngine(self.policy, stops, config.per_device_eval_batch_size)
        with VerifierPool(config.verifier, config.verifier_workers, config.verifier_timeout) as pool:
            parts = (engine, stops, self.tokenizer, pool, self.accelerator)
            self.collector = Collector(questions, config, *parts)
            self.evaluator = None if eval_questions is None else Collector(eval_questions, config, *parts)
            return self._loop()

    def _questions(self, path: str, context: int | None) -> tuple[list[Question], list[BadRow]]:
        prompts, bad = read_prompts(path, self.config.on_bad_row)
        return as_questions(prompts, bad, path, self.tokenizer, self.config, context)

    # --------------------------------------------------------------------------------------------- loop

    def _loop(self) -> PolicyResult:
        config = self.config
        self.log = None
        if self.main:
            self.log = checkpoint.open_log(self.output, self.start, resumed=self.resumed is not None)
        started = time.perf_counter()
        record: dict[str, Any] = {}
        evaluated: dict[str, float] = {}
        # at the end too: there may be a checkpoint of the last step because its evaluation has failed
        if self.start in (0, config.max_steps) and self.evaluator is not None:
            evaluated = self.evaluator.accuracy()
            record = {"step": self.start, **evaluated}
            self._record(record)
        with Interrupt() as interrupt, self.progress.bar("train-policy", config.max_steps, self.start) as bar:
            for step in range(self.start, config.max_steps):
                done, last = step + 1, step + 1 == config.max_steps
                with self._kept_on_failure(step):
                    record = self._step(step)
                if self.evaluator is not None and (
                    last or (config.eval_steps is not None and done % config.eval_steps == 0)
                ):
                    with self._kept_on_failure(done, record):
                        evaluated = self.evaluator.accuracy()
                    record |= evaluated
                shown = ("policy_loss", "rollout_accuracy", "tokens_per_second")
                bar(done, **{name: record[name] for name in shown})
                self._record(record)
                stop = interrupt.asked(self.accelerator)
                if not last and (stop or (config.save_steps and done % config.save_steps == 0)):
                    folder = self._save_checkpoint(done)
                    if stop:
                        raise interrupted(folder, done, config.max_steps, interrupt.signal)
            # there is no checkpoint of the last step: a signal must not end the process before the models are
            # written
            return self._finish(record, evaluated, time.perf_counter() - started)

    def _step(self, step: int) -> dict[str, Any]:
        """One rollout batch: collect, measure, score, learn. Returns its record."""
        config, reward, before = self.config, self.reward, time.perf_counter()
        self.seconds = {}
        factor = learning_rate_factor(step, config.max_steps, config)
        rollouts, place, collected = self.collector.collect(self.place)
        with self._timed("behaviour"):
            self._behaviour(rollouts)
        record: dict[str, Any] = {
            "step": step + 1,
            "algorithm": config.algorithm,
            "prompts_seen": place,
            **collected,
            "entropy": float(rollouts.entropy.mean()),
        }
        try:
            if reward is not None:
                with self._timed("reward"):
                    record |= self._reward(reward, rollouts, step, factor)
            elif config.algorithm == "spro":
                self._spro(rollouts)
            else:
                floor = self.method.advantages.std_floor
                of_response = outcome_advantages(
                    rollouts.outcome, rollouts.group, rollouts.num_groups, std_floor=floor
                )
                rollouts.advantages = per_token(of_response, rollouts.cu_seqlens)
            if not bool(
                rollouts.advantages.isfinite().all() & rollouts.candidate_advantages.isfinite().all()
            ):
                raise NotFinite("an advantage is not a number")
            with self._timed("update"):
                record |= self._update(rollouts, step, factor)
        except NotFinite as error:
            raise NotFinite(
                f"step {step + 1}: {error}; stopped before any weight took it. Lower --learning_rate, "
                "--rm_learning_rate or --max_grad_norm, or look at the prompts of this step"
            ) from error
        self.place = place
        self.moved.clear()
        seconds = time.perf_counter() - before
        record |= self.seconds | {"seconds": seconds, "tokens_per_second": collected["tokens"] / seconds}
        return record | {"peak_memory_bytes": peak_memory(self.device)}

    def _behaviour(self, rollouts: Rollouts) -> None:
        """Log-probs of the policy that sampled, its entropy and its candidates: one pass over all tokens."""
        config = self.config

        def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, ...]:
            return behaviour(self.policy, batch, self.method.candidates, config.temperature)

        sampled, entropy, ids, logprobs = rollouts.forward(
            forward, config.per_device_train_batch_size, self.accelerator
        )
        rollouts.old_logprobs, rollouts.entropy = sampled, entropy
        rollouts.candidate_ids, rollouts.old_candidate_logprobs = ids, logprobs
        rollouts.candidate_advantages = torch.zeros_like(logprobs)

    def _reward(self, reward: OnlineReward, rollouts: Rollouts, step: int, factor: float) -> dict[str, Any]:
        """Scores and online update of the reward model, in the order asked for, and the advantages."""
        config, record = self.config, dict[str, Any]()
        reference, candidate_reference = reward.reference_logprobs(rollouts)
        batches = self._minibatches(len(rollouts.responses), step, 0)

        def learn() -> Tensor:
            sums, grad_norm, finals = reward.update(rollouts, reference, batches, factor)
            total = MetricSums()
            total.add(sums)
            record.update(total.means("rm_") | {"rm_grad_norm": grad_norm})
            return finals

        finals = learn() if config.rm_update == "before" else None
        scored, candidate_scored = reward.score(rollouts)
        values = prefix_values(scored - reference, rollouts.cu_seqlens, beta=reward.info.beta)
        after = values.mean_value[rollouts.cu_seqlens[1:].long() - 1]
        if config.rm_update == "after":
            learn()
        # rm_auc, rm_accuracy: before any update from these rollouts, and so under `before` of the first
        # minibatch alone, since later ones hold responses to prompts that were learnt from; rm_scored_auc:
        # as it scored them all.
        unseen = rollouts.outcome if finals is None else rollouts.outcome[batches[0]]
        finals, right = after if finals is None else finals, rollouts.outcome == 1
        record |= {
            "rm_auc": auc(finals.cpu(), unseen.cpu()),
            "rm_accuracy": float(((finals > 0) == (unseen == 1)).float().mean()),
            "rm_auc_responses": len(unseen),
            "rm_scored_auc": auc(after.cpu(), rollouts.outcome.cpu()),
            "value_right": float(after[right].mean()),
            "value_wrong": float(after[~right].mean()),
            "value_mean": float(values.value.mean()),
        }
        edges, beta = rollouts.cu_seqlens, reward.info.beta
        if config.algorithm == "prime":
            rewards = beta * (scored - reference)
            rollouts.advantages = prime_advantages(
                rewards, rollouts.outcome, edges, rollouts.group, rollouts.num_groups
            )
            return record
        td = temporal_difference(scored, reference, edges, beta=beta)
        candidate_td = temporal_difference(candidate_scored, candidate_reference, edges, beta=beta)
        found = distrl_advantages(
            td,
            candidate_td,
            rollouts.outcome,
            edges,
            rollouts.group,
            rollouts.num_groups,
            config=self.method.advantages,
        )
        rollouts.advantages, rollouts.candidate_advantages = found.advantages, found.candidate_advantages
        record |= {"value_std": float(found.value_std), "gae_std": float(found.gae.std(correction=0))}
        return record

    def _spro(self, rollouts: Rollouts) -> None:
        start, config = cast(nn.Module, self.start_policy), self.config
        assert config.spro_beta is not None

        def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, ...]:
            return (response_logprobs(start, batch, config.temperature),)

        (reference,) = rollouts.forward(forward, config.per_device_train_batch_size, self.accelerator)
        of_token = spro_advantages(
            rollouts.old_logprobs - reference,
            rollouts.outcome,
            rollouts.cu_seqlens,
            rollouts.group,
            rollouts.num_groups,
            beta=config.spro_beta,
            std_floor=self.method.advantages.std_floor,
        )
        rollouts.advantages = of_token

    def _minibatches(self, size: int, step: int, epoch: int) -> list[list[int]]:
        """All responses in a random order, split evenly, so that no update is made of a small rest."""
        count = -(-size // self.config.minibatch_size)
        order = epoch_order(size, self.config.seed, step * self.config.num_epochs + epoch)
        return [order[i * size // count : (i + 1) * size // count] for i in range(count)]

    def _update(self, rollouts: Rollouts, step: int, factor: float) -> dict[str, float]:
        """`num_epochs` passes of clipped updates over the rollouts, each divided by its minibatch's sizes."""
        config, options = self.config, self.method.loss
        assert config.learning_rate is not None
        total, grad_norm, updates = MetricSums(), 0.0, 0
        for epoch in range(config.num_epochs):
            for minibatch in self._minibatches(len(rollouts.responses), step, epoch):
                divisors = (
                    rollouts.denominator(minibatch, options.reduction),
                    rollouts.denominator(minibatch, options.candidate_reduction),
                )

                def loss_and_sums(
                    micro: list[int], minibatch: list[int] = minibatch, divisors: tuple[Any, Any] = divisors
                ) -> tuple[Tensor, Tensor]:
                    chosen = micro or minibatch[:1]
                    found = self.module(rollouts.batch(chosen), rollouts.targets(chosen), *divisors)
                    losses = torch.stack([found.loss.detach(), found.token_loss, found.candidate_loss])
                    return found.loss, torch.cat([losses, stacked(found.metrics, DISTRL_METRICS)])

                values, grad_norm = update(
                    self.accelerator,
                    self.module,
                    self.optimizer,
                    rollouts.microbatches(minibatch, config.per_device_train_batch_size, self.accelerator),
                    loss_and_sums,
                    learning_rate=config.learning_rate * factor,
                    max_grad_norm=config.max_grad_norm,
                )
                losses = dict(zip(LOSSES, values[: len(LOSSES)], strict=True))
                total.add({name: (value, 1.0) for name, value in losses.items()})
                total.add(paired(values[len(LOSSES) :], DISTRL_METRICS))
                updates += 1
        numbers = {"updates": updates, "grad_norm": grad_norm, "learning_rate": config.learning_rate * factor}
        return total.means() | numbers

    # -------------------------------------------------------------------------------------------- files

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"seconds_{name}"] = time.perf_counter() - started

    def _record(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)
            self.progress.logged(record, self.config.max_steps)

    def _watch(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Every update that `optimizer` makes from now on is noted in `moved`."""
        optimizer.register_step_post_hook(lambda *_: self.moved.add(name))

    @contextmanager
    def _kept_on_failure(self, done: int, unlogged: dict[str, Any] | None = None) -> Iterator[None]:
        """Saves the `done` finished steps when something goes wrong inside, and says so.

        Args:
            unlogged: the record of the last of them where the log does not have it yet.
        """
        try:
            yield
        except Exception as error:
            if not done:  # nothing to lose
                raise
            if isinstance(error, Unanimous):
                self.place = error.place  # what resumes goes on behind these prompts
            if unlogged is not None:
                self._record(unlogged)
            kept = self._keep(done, error)
            if isinstance(error, IpvrmError):
                raise IpvrmError(f"{error}. {kept}") from error
            if self.main:
                print(f"\n{kept}", file=sys.stderr, flush=True)
            raise

    def _keep(self, done: int, error: Exception) -> str:
        """Saves the `done` finished steps if it can after `error`; what came of it, in words."""
        alike = self.accelerator.num_processes == 1 or isinstance(error, (Unanimous, NotFinite))
        if self.moved:
            why = f"{' and '.join(sorted(self.moved))} had learnt from step {done + 1} already"
        elif not alike:  # a save needs all ranks, and the others may wait for this one elsewhere
            why = "it is not known that all ranks have failed alike"
        else:
            try:
                return f"The run so far: {self._save_checkpoint(done)}"
            except Exception as second:
                why = f"saving failed too ({second})"
        lost = done - checkpoint.newest_step(self.output)
        return (
            f"Not saved: {why}; {checkpoint.newest_in_words(self.output)}, steps lost before this one: {lost}"
        )

    def _write_policy(self, folder: Path) -> None:
        """A model folder; under LoRA the merged weights, and the adapters beside them."""
        save_model(merged(self.policy), folder)
        if self.config.lora_r is not None:
            save_model(self.policy, folder / ADAPTER)
        self.tokenizer.save_pretrained(folder)

    def _save_checkpoint(self, step: int) -> Path:
        from accelerate.utils import gather_object

        rng = gather_object([checkpoint.rng_state(self.accelerator.process_index)])
        path = self.output / f"{checkpoint.PREFIX}{step}"
        if self.main:
            with save_folder(path) as folder:
                self._write_policy(folder)
                scalars = checkpoint.save_optimizer(folder, self.module, self.optimizer.optimizer)
                reward = None
                if self.reward is not None:
                    reward = self.reward.save_checkpoint(folder / FOLDER, folder, path / FOLDER)
                state = {
                    "step": step,
                    "place": self.place,
                    "fingerprint": self.fingerprint,
                    "optimizer": scalars,
                    "reward_optimizer": reward,
                }
                checkpoint.save_state(folder, state, rng)
            checkpoint.remove_old_checkpoints(self.output, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def _finish(self, last: dict[str, Any], evaluated: dict[str, float], seconds: float) -> PolicyResult:
        config = self.config
        metrics = {
            "algorithm": config.algorithm,
            "preset": config.preset,
            "rm_update": config.rm_update,
            "steps": config.max_steps,
            "prompts_seen": self.place,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "last": last,
            "eval": evaluated,
            "data": self.counts,
        }
        if self.main and self.log is not None:
            self.log.close()
            with save_folder(self.output / ".finished.tmp") as folder:
                self._write_policy(folder)
                write_json(folder / "results.json", metrics)
                if self.reward is not None:
                    with save_folder(self.output / FOLDER) as beside:
                        self.reward.write(beside, folder, self.output / FOLDER)
            move_into(self.output / ".finished.tmp", self.output, last="results.json")
        self.accelerator.wait_for_everyone()
        return PolicyResult(self.output, metrics, config.max_steps, seconds)

    def _dry_run(self, length: int) -> PolicyResult:
        """Prints the resolved config, the data counts and a memory estimate of each trained model."""
        config = self.config
        trained = {"policy": config.model}
        if self.reward is not None and self.reward.trained:
            trained["reward_model"] = str(self.reward.folder)
        estimates = {
            name: memory_estimate(
                folder,
                rows=config.per_device_train_batch_size,
                length=length,
                mixed_precision=config.mixed_precision,
                gradient_checkpointing=config.gradient_checkpointing,
            )
            for name, folder in trained.items()
        }
        metrics = {"config": asdict(config), "data": self.counts, "memory_estimate": estimates}
        if self.main:
            print(yaml.safe_dump(metrics, sort_keys=False), end="")
        return PolicyResult(self.output, metrics, 0, 0.0)


def main(config: PolicyConfig) -> None:
    """Console entry."""
    result = train_policy(config)
    if result.steps and int(os.environ.get("RANK", "0")) == 0:
        print(f"{result.output_dir}: {result.steps} steps in {result.seconds:.1f} s")
