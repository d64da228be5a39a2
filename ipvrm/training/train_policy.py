"""`ipvrm train-policy`: DistRL and its baselines (stage B). Read it top to bottom.

One step, `_Trainer._step`: responses are sampled and verified, prompts whose outcomes differ are kept; one
pass of the policy gives behaviour log-probs, entropy and exact candidates (--offline reads all of that from
files that `ipvrm rollout` and `ipvrm label` wrote); the reward model learns from the
labels (before or after it scores) and gives its log-probs of the same tokens; advantages are formed once;
then the policy is updated in minibatches. Every loss is divided by the denominator of its whole minibatch, so
that the update does not depend on micro-batches, packing or ranks. Ranks share the work and hold the same
rollouts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch, epoch_order
from ipvrm.data.chat import parse_template_kwargs
from ipvrm.data.rows import BadRow, read_prompts
from ipvrm.errors import IpvrmError
from ipvrm.losses.advantages import distrl_advantages, outcome_advantages, temporal_difference
from ipvrm.losses.baselines import (
    per_token,
    prime_advantages,
    reinforce_qrm_advantages,
    spro_advantages,
)
from ipvrm.losses.metrics import MetricSums, auc, paired, stacked
from ipvrm.losses.objectives import dpo_pairs
from ipvrm.models.behaviour import behaviour, other_variables
from ipvrm.models.card import write_policy_card
from ipvrm.models.causal_lm import (
    least_positions,
    load_model,
    load_tokenizer,
    max_positions,
    memory_estimate,
    response_logprobs,
    weights_hash,
)
from ipvrm.models.server import LOCAL, Server, kind_of
from ipvrm.output.progress import peak_memory
from ipvrm.rollouts.answers import Question, as_questions
from ipvrm.rollouts.engine import Engine, TransformersEngine, stop_ids
from ipvrm.rollouts.verify import VerifierPool
from ipvrm.run_folder import settings_of
from ipvrm.training import checkpoint
from ipvrm.training.adapters import model_in_training, save_trained
from ipvrm.training.flags import filled
from ipvrm.training.online_reward import FOLDER, OnlineReward, RewardInputs
from ipvrm.training.optimizer import NotFinite, adamw, data_parallel_accelerator, learning_rate_factor, update
from ipvrm.training.policy_config import Method, PolicyConfig, resolve
from ipvrm.training.policy_engine import PolicyServer
from ipvrm.training.policy_model import PolicyLoss
from ipvrm.training.policy_rollouts import Collector, Rollouts, Unanimous, questions_hash
from ipvrm.training.q_values import QValues
from ipvrm.training.run import RESULTS, Run, TrainResult, held, report, with_template_kwargs
from ipvrm.training.stored_rollouts import StoredRollouts
from ipvrm_kernels import DISTRL_METRICS, prefix_values

LOSSES = ("policy_loss", "token_loss", "candidate_loss")


def train_policy(config: PolicyConfig, progress: bool = True) -> TrainResult:
    """Trains a policy and writes its run folder; under `accelerate launch` on every rank.

    What fails after the first step is raised once the steps before it are in a checkpoint, where the weights
    are still theirs, and every rank is known to have failed alike.

    Raises:
        IpvrmError: anything the user can act on, before the first step where possible.
        TrainingInterrupted: a signal, in a command (`ipvrm.cli.main`); a checkpoint has been written.
    """
    config, method = resolve(config)
    config = with_template_kwargs(config)
    accelerator = data_parallel_accelerator(
        "train-policy",
        use_cpu=config.use_cpu,
        mixed_precision=filled(config.mixed_precision),
        report_to=config.report_to,
        output_dir=config.output_dir,
    )
    models = [name for name in (config.model, config.reward_model) if name is not None]
    with held(config):
        run = Run("train-policy", config, accelerator, starts_from=models, mark=RESULTS, progress=progress)
        inputs = _Inputs(config, method, run)
        if config.dry_run:
            return inputs.dry_run()
        run.begin(config.max_steps, inputs.fingerprint())
        if run.finished:
            return run.result()
        with VerifierPool(config.verifier, config.verifier_workers, config.verifier_timeout) as pool:
            return _Trainer(inputs, pool).train()


class _Inputs:
    """What a run is about: prompts and the reward model's kind, read and checked before any weights are."""

    def __init__(self, config: PolicyConfig, method: Method, run: Run):
        self.config, self.method, self.run = config, method, run
        self.tokenizer = load_tokenizer(config.model)
        self.context = max_positions(config.model)
        self.stored: StoredRollouts | None = None
        if config.offline:
            limit = least_positions(self.context, config.reward_model)
            self.stored = StoredRollouts(config, self.tokenizer, method.candidates, limit)
        scored = self.stored is not None and self.stored.scored
        self.reward: RewardInputs | None = None
        self.q_values: QValues | None = None
        if config.algorithm == "reinforce_qrm":
            self.q_values = QValues(config, self.tokenizer)
        elif config.reward_model is not None:
            self.reward = RewardInputs(config, method.balance, self.tokenizer, scored)
        reads = self.reward or self.q_values
        self.context = least_positions(self.context, *(() if reads is None else reads.folders))
        if self.stored and self.context is not None and self.stored.longest > self.context:
            raise IpvrmError(
                f"{config.train_data}: its longest row has {self.stored.longest} tokens, more than the "
                f"{self.context} positions of the models in use; leave such rows out"
            )
        self.server: Server | None = None
        if config.engine != LOCAL and not (config.dry_run or run.finished):
            size = config.per_device_eval_batch_size
            self.server = Server(config.engine, config.model, config.engine_timeout, size)
            self.context = least_positions(self.context, self.server.max_positions)
        self.questions: list[Question] = []
        if self.stored is not None:
            self.counts = self.stored.counts
        else:
            self.questions, bad = self._read(config.train_data)
            self.counts = {"prompts": len(self.questions), "bad": len(bad)}
        self.eval_questions = None if config.eval_data is None else self._read(config.eval_data)[0]
        if reads is not None and self.questions:
            given = parse_template_kwargs(config.chat_template_kwargs)
            if said := other_variables(reads.folder, reads.info, given):
                run.progress.note(said)
        counts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        run.progress.note(f"{config.train_data}: {counts}")
        if scored:
            run.progress.note(f"it holds the log-probs of {config.reward_model}, whose weights are not read")
        elif self.counts.get("rm_scored"):
            run.progress.note(f"some rows lack the log-probs of {config.reward_model}: it scores them all")

    def _read(self, path: str) -> tuple[list[Question], list[BadRow]]:
        prompts, bad = read_prompts(path, self.config.on_bad_row)
        return as_questions(prompts, bad, path, self.tokenizer, self.config, self.context)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        data = questions_hash(self.questions) if self.stored is None else self.stored.fingerprint()
        hashes = {"start_hash": weights_hash(self.config.model), "data_hash": data}
        scores = self.reward or self.q_values
        reward = {} if scores is None else scores.fingerprint()
        return settings_of(self.config) | kind_of(self.config.engine) | hashes | reward

    def dry_run(self) -> TrainResult:
        """Prints the resolved config, the data counts and a memory estimate of each trained model."""
        config = self.config
        trained = {"policy": config.model}
        if self.reward is not None and self.reward.trained:
            trained["reward_model"] = str(self.reward.folder)
        ranks = {"policy": config.lora_r or 0, "reward_model": config.rm_lora_r or 0}
        length = (
            max(len(q.ids) for q in self.questions) + config.max_new_tokens
            if self.stored is None
            else self.stored.longest
        )
        estimates = {
            name: memory_estimate(
                folder,
                rows=config.per_device_train_batch_size,
                length=length,
                mixed_precision=filled(config.mixed_precision),
                gradient_checkpointing=config.gradient_checkpointing,
                lora_r=ranks[name],
            )
            for name, folder in trained.items()
        }
        return self.run.dry_run({"data": self.counts, "memory_estimate": estimates})


class _Trainer:
    """The models and their steps; the methods are in the order in which they happen."""

    def __init__(self, inputs: _Inputs, pool: VerifierPool):
        self.inputs, self.run, self.config, self.method = inputs, inputs.run, inputs.config, inputs.method
        config, run = self.config, self.run
        self.accelerator = run.accelerator

        model = model_in_training(config, run.resumed, run.progress.note)
        assert config.learning_rate is not None and config.temperature is not None
        ratio = config.algorithm != "reinforce_qrm"
        module = PolicyLoss(model, self.method.loss, config.temperature, ratio)
        optimizer = adamw(module, config.learning_rate, config, run.device)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.policy = self.accelerator.unwrap_model(self.module).model
        self.start_policy: nn.Module | None = None
        if config.algorithm == "spro":
            self.start_policy = load_model(config.model, torch.float32, run.device)
        self.reward = None
        if inputs.reward is not None:
            scalars = None if run.state is None else run.state["reward_optimizer"]
            self.reward = OnlineReward(inputs.reward, run.accelerator, run.resumed, scalars)
        run.restore(self.module, self.optimizer)
        run.watch("the policy", self.optimizer)
        if self.reward is not None and self.reward.trained:
            run.watch("the reward model", self.reward.optimizer)
        stops = stop_ids(self.policy, inputs.tokenizer)
        engine: Engine = TransformersEngine(self.policy, stops, config.per_device_eval_batch_size)
        self.server: PolicyServer | None = None
        if inputs.server is not None:
            engine = self.server = PolicyServer(inputs.server, self.policy, stops, run)
        parts = (engine, stops, inputs.tokenizer, pool, self.accelerator)
        self.collector = None if inputs.stored else Collector(inputs.questions, config, *parts)
        self.evaluator: Collector | None = None
        if inputs.eval_questions is not None:
            self.evaluator = Collector(inputs.eval_questions, config, *parts)
        self.place = 0 if run.state is None else int(run.state["place"])  # prompts behind this one are done
        self.seconds: dict[str, float] = {}

    def train(self) -> TrainResult:
        """All steps, with log, evaluation and checkpoints."""
        config, run = self.config, self.run
        record: dict[str, Any] = {}
        evaluated: dict[str, float] = {}
        with run.loop() as bar:
            # at the end too: there may be a checkpoint of the last step because its evaluation has failed
            if run.start in (0, config.max_steps) and self.evaluator is not None:
                evaluated = self._evaluate(self.evaluator)
                record = {"step": run.start, **evaluated}
                run.record(record)
            for step in range(run.start, config.max_steps):
                done = step + 1
                with run.kept_on_failure(step, self):
                    record = self._step(step)
                if self.evaluator is not None and run.evaluates(done, config.eval_steps):
                    with run.kept_on_failure(done, self, record):
                        evaluated = self._evaluate(self.evaluator)
                    record |= evaluated
                bar(
                    done,
                    **{
                        name: record[name]
                        for name in ("policy_loss", "rollout_accuracy", "tokens_per_second")
                    },
                )
                run.record(record)
                run.after_step(done, self)
            if self.server is not None:
                self.server.close()
            return self._finish(record, evaluated)

    def _serve(self) -> None:
        """A server that samples gets the policy of now."""
        if self.server is not None:
            self.server.refresh()

    def _evaluate(self, evaluator: Collector) -> dict[str, float]:
        self._serve()
        return evaluator.accuracy()

    def _step(self, step: int) -> dict[str, Any]:
        """One rollout batch: collect, measure, score, learn. Returns its record."""
        config, reward, before = self.config, self.reward, time.perf_counter()
        self.seconds = {}
        factor = learning_rate_factor(step, config.max_steps, config)
        rollouts, place, collected = self._collect()
        record: dict[str, Any] = {
            "step": step + 1,
            "algorithm": config.algorithm,
            "prompts_seen": place,
            **collected,
        }
        if self.server is not None:
            record["engine_gap"] = self.server.check(rollouts.responses)
        try:
            if rollouts.not_finite(rollouts.old_logprobs, rollouts.old_candidate_logprobs) is not None:
                raise NotFinite("the policy's log-probs are not numbers")  # clipping would hide it
            if reward is not None:
                with self._timed("reward"):
                    record |= self._reward(reward, rollouts, step, factor)
            elif config.algorithm == "spro":
                self._spro(rollouts)
            elif self.inputs.q_values is not None:
                with self._timed("reward"):
                    record |= self._q_values(self.inputs.q_values, rollouts)
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
            fault = self._not_finite(rollouts)
            where = f" ({fault})" if fault else ""
            raise NotFinite(
                f"step {step + 1}: {error}{where}; stopped before any weight took it. Lower --learning_rate, "
                "--rm_learning_rate or --max_grad_norm, or look at the prompts of this step"
            ) from error
        self.place = place
        self.run.moved.clear()
        if self.server is not None:
            self.server.current = False
        seconds = time.perf_counter() - before
        record |= self.seconds | {"seconds": seconds, "tokens_per_second": collected["tokens"] / seconds}
        return record | {"peak_memory_bytes": peak_memory(self.run.device)}

    def _collect(self) -> tuple[Rollouts, int, dict[str, float]]:
        """Rollouts with what the policy that sampled knows of them, the place of the next prompt, numbers."""
        if self.collector is None:
            return cast(StoredRollouts, self.inputs.stored).collect(self.place, self.run.device)
        try:
            self._serve()
            rollouts, place, collected = self.collector.collect(self.place)
        except Unanimous as error:
            self.place = error.place  # what resumes goes on behind these prompts
            raise
        with self._timed("behaviour"):
            self._behaviour(rollouts)
        return rollouts, place, collected | {"entropy": float(rollouts.entropy.mean())}

    def _not_finite(self, rollouts: Rollouts) -> str | None:
        """Whose log-prob of which response is not finite, in words; on all ranks."""
        reward, rows = self.reward, self.config.per_device_train_batch_size

        def of(model: nn.Module) -> list[Tensor]:
            def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, ...]:
                return (response_logprobs(model, batch, self.config.temperature),)

            return rollouts.forward(forward, rows, self.accelerator)

        found: dict[str, Callable[[], Sequence[Tensor]]] = {
            "under the policy that sampled": lambda: (rollouts.old_logprobs, rollouts.old_candidate_logprobs)
        }
        if reward is not None:
            found["under the reference"] = lambda: reward.reference_logprobs(rollouts)
            found["under the reward model"] = lambda: reward.logprobs(rollouts)
        if self.start_policy is not None:
            found["under the starting policy"] = lambda: of(cast(nn.Module, self.start_policy))
        found["under the policy"] = lambda: of(self.policy)
        for whose, logprobs in found.items():
            if (fault := rollouts.not_finite(*logprobs())) is not None:
                return f"{whose}, {fault}"
        return None

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
        size = config.rm_minibatch_size or len(rollouts.responses)
        if reward.objective.pairwise:
            pairs = dpo_pairs(rollouts.outcome.tolist(), rollouts.group.tolist()).tolist()
            halves = self._minibatches(len(pairs), max(1, size // 2), step)
            batches = [[i for pair in half for i in pairs[pair]] for half in halves]
        else:
            batches = self._minibatches(len(rollouts.responses), size, step)

        def learn() -> Tensor:
            sums, grad_norm, finals = reward.update(rollouts, reference, batches, factor)
            reward.learnt_from(self.policy)
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
            "rm_score": float(after.mean()) / reward.info.beta,  # Eq. 19, of Table 7
            "value_right": float(after[right].mean()),
            "value_right_count": int(right.sum()),
            "value_wrong": float(after[~right].mean()),
            "value_wrong_count": int((~right).sum()),
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

    def _q_values(self, q_values: QValues, rollouts: Rollouts) -> dict[str, Any]:
        """The advantages of `reinforce_qrm`, and how its scores tell the outcomes apart."""
        scores = q_values.score(rollouts, self.accelerator)
        rollouts.advantages = reinforce_qrm_advantages(scores)
        means = prefix_values(scores, rollouts.cu_seqlens, beta=q_values.info.beta).mean_value
        final = means[rollouts.cu_seqlens[1:].long() - 1]
        return {
            "rm_auc": auc(final.cpu(), rollouts.outcome.cpu()),
            "q_mean": float(scores.mean()),
            "q_std": float(scores.std(correction=0)),
        }

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

    def _minibatches(self, size: int, most: int, step: int) -> list[list[int]]:
        """All responses in a random order, split evenly, so that no update is made of a small rest."""
        count = -(-size // most)
        order = epoch_order(size, self.config.seed, step)
        return [order[i * size // count : (i + 1) * size // count] for i in range(count)]

    def _update(self, rollouts: Rollouts, step: int, factor: float) -> dict[str, float]:
        """One pass of clipped updates over the rollouts, each divided by its minibatch's sizes."""
        config, options = self.config, self.method.loss
        assert config.learning_rate is not None
        total, grad_norm, updates = MetricSums(), 0.0, 0
        size = filled(config.minibatch_size)
        for minibatch in self._minibatches(len(rollouts.responses), size, step):
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

    def gather(self) -> None:
        """Every rank has all of it."""

    def write_model(self, folder: Path, place: Path) -> None:
        """The policy, under LoRA the merged weights with the adapters in a folder, and the reward model where
        the run has its weights."""
        save_trained(self.policy, folder)
        self.inputs.tokenizer.save_pretrained(folder)
        data = {"train data": self.config.train_data, **self.inputs.counts}
        metrics = {name: value for name, value in self.run.last.items() if name != "algorithm"}
        self._write_card(folder, data, metrics)
        if self.reward is not None and not self.reward.inputs.scored:
            (folder / FOLDER).mkdir()
            own = {name: value for name, value in metrics.items() if name == "step" or name.startswith("rm_")}
            self.reward.write_model(folder / FOLDER, self.policy, place / FOLDER, data, own)

    def _write_card(self, folder: Path, data: dict[str, Any], metrics: dict[str, Any]) -> None:
        config = self.config
        names = (
            "preset",
            "reward_model",
            "lora_r",
            "learning_rate",
            "num_generations",
            "temperature",
            "alpha",
        )
        settings = {name: getattr(config, name) for name in names}
        if self.reward is not None:
            info = self.reward.info
            settings |= {"objective": info.objective, "beta": info.beta, "margin": info.margin}
        write_policy_card(
            folder,
            algorithm=config.algorithm,
            with_reward_model=self.reward is not None and not self.reward.inputs.scored,
            base=config.model,
            settings=settings,
            data=data,
            metrics=metrics,
        )

    def write_state(self, folder: Path) -> dict[str, Any]:
        """The optimizers, and the place in the prompts."""
        reward = None
        if self.reward is not None and self.reward.trained:
            optimizer = self.reward.optimizer.optimizer
            reward = checkpoint.save_optimizer(
                folder / FOLDER, checkpoint.optimizer_state(self.reward.module, optimizer)
            )
        return {
            "place": self.place,
            "optimizer": checkpoint.save_optimizer(
                folder, checkpoint.optimizer_state(self.module, self.optimizer.optimizer)
            ),
            "reward_optimizer": reward,
        }

    def _finish(self, last: dict[str, Any], evaluated: dict[str, float]) -> TrainResult:
        config = self.config
        metrics = {
            "algorithm": config.algorithm,
            "preset": config.preset,
            "rm_update": config.rm_update,
            "steps": config.max_steps,
            "prompts_seen": self.place,
            "seconds": self.run.seconds(),
            "peak_memory_bytes": peak_memory(self.run.device),
            "last": last,
            "eval": evaluated,
            "data": self.inputs.counts,
        }
        return self.run.finish(metrics, self)


def main(config: PolicyConfig) -> None:
    """Console entry."""
    report(train_policy(config))
