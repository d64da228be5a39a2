"""The life of a training run, the same for reward model and policy: its folder, log, checkpoints and end.

A trainer takes its steps inside `Run.loop`; what its folders hold, it writes itself (`Trained`).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml

from ipvrm.data.chat import preset_template_kwargs
from ipvrm.errors import FailedAlike, IpvrmError
from ipvrm.models.causal_lm import load_tokenizer
from ipvrm.output.locks import locked
from ipvrm.output.progress import Interrupt, Progress
from ipvrm.run_folder import (
    CPU_MATMUL,
    JsonlLog,
    cpu_matmul,
    manifest,
    move_into,
    other_matmul,
    read_json,
    remove_leftovers,
    same_run,
    save_folder,
    write_json,
    write_text,
)
from ipvrm.training import checkpoint
from ipvrm.training.flags import filled

Config = TypeVar("Config", bound=Any)
MANIFEST, RESULTS = "manifest.json", "results.json"


class RunSettings(Protocol):
    """The flags of a training script that its run depends on."""

    @property
    def output_dir(self) -> str: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def save_steps(self) -> int: ...
    @property
    def save_total_limit(self) -> int: ...
    @property
    def resume_from_checkpoint(self) -> str | None: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def report_to(self) -> str | None: ...


class Trained(Protocol):
    """What is being trained, as files."""

    def gather(self) -> None:
        """On every rank, before the main one writes: brings together what lies in shards."""

    def write_model(self, folder: Path, place: Path) -> None:
        """Writes the model folder to `folder`, which will be at `place`."""

    def write_state(self, folder: Path) -> dict[str, Any]:
        """Writes the rest of a checkpoint, tensors as files; returns the entries of `trainer_state.json`."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run returns; `metrics` is what results.json holds."""

    output_dir: Path
    metrics: dict[str, Any]
    steps: int
    seconds: float


def held(config: RunSettings) -> AbstractContextManager[None]:
    """The lock of the output folder, for the whole of a run; a dry run writes nothing and needs none."""
    return nullcontext() if config.dry_run else locked(config.output_dir, folder=True)


class Run:
    """One training run on every rank. Its methods are in the order in which a trainer calls them.

    Args:
        command: its name on the screen. config: of the script, complete.
        starts_from: the model folders that it reads. mark: the file that a finished run's folder holds.

    Raises:
        IpvrmError: the output would overwrite a model, or holds a run that this one does not go on with.
    """

    def __init__(
        self,
        command: str,
        config: RunSettings,
        accelerator: Any,
        *,
        starts_from: Sequence[str],
        mark: str,
        progress: bool,
    ):
        self.command, self.config, self.accelerator, self.mark = command, config, accelerator, mark
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.progress = Progress(enabled=progress and self.main)
        self.output = Path(config.output_dir)
        for given in starts_from:
            if self.output.resolve() == Path(given).resolve():
                raise IpvrmError(
                    f"--output_dir {self.output} is a model that the run starts from; it would be overwritten"
                )
        finished = (self.output / mark).exists() and (self.output / RESULTS).exists()
        self.finished = finished and config.resume_from_checkpoint == checkpoint.AUTO
        self.resumed: Path | None = None
        if not self.finished:  # else its checkpoints do not matter
            self.resumed = checkpoint.resumed_from(
                self.output, config.resume_from_checkpoint, mark, self.progress.note
            )
        self.state = None if self.resumed is None else checkpoint.load_state(self.resumed)
        self.last: dict[str, Any] = {}  # the newest record of the log
        self.start = 0 if self.state is None else int(self.state["step"])
        self.total = 0
        self.moved: set[str] = set()  # the models that have learnt from a step that is not finished
        self._fingerprint: dict[str, Any] = {}
        self._log: JsonlLog | None = None
        self._interrupt = Interrupt()
        self._started = 0.0

    def dry_run(self, metrics: dict[str, Any]) -> TrainResult:
        """Prints the settings and `metrics` instead of a run."""
        metrics = {"config": asdict(self.config), **metrics}  # type: ignore[call-overload]
        if self.main:
            print(yaml.safe_dump(metrics, sort_keys=False), end="")
        return TrainResult(self.output, metrics, 0, 0.0)

    def begin(self, total: int, fingerprint: dict[str, Any]) -> None:
        """Prepares the folder for `total` steps.

        Args:
            fingerprint: what decides the weights of the run; on resume it is the checkpoint's.

        Raises:
            IpvrmError: the checkpoint is of another run; each changed setting is named.
        """
        stored = None if self.state is None else self.state["fingerprint"]
        if self.finished:  # its checkpoints may be gone
            stored = read_json(self.output / MANIFEST)["fingerprint"]
        if stored is not None:
            same_run(stored, fingerprint, str(self.resumed or self.output), checkpoint.WORDS)
        self.total, self._fingerprint = total, fingerprint
        changed = self.state and other_matmul(self.state.get(CPU_MATMUL), str(self.resumed))
        if changed and self.accelerator.device.type == "cpu":
            self.progress.note(changed)
        if self.finished:
            self.progress.note(f"{self.output}: finished already")
        elif self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            settings = asdict(self.config)  # type: ignore[call-overload]
            write_text(self.output / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            record = manifest(
                seeds={"seed": filled(self.config.seed)},
                ranks=self.accelerator.num_processes,
                fingerprint=fingerprint,
            )
            write_json(self.output / MANIFEST, record)

    def result(self) -> TrainResult:
        """Of the finished run that lies there already."""
        metrics = read_json(self.output / RESULTS)
        return TrainResult(self.output, metrics, metrics["steps"], metrics["seconds"])

    def restore(self, module: torch.nn.Module, optimizer: Any) -> None:
        """Optimizer and generators of the checkpoint, where there is one; the arguments are prepared ones."""
        if self.state is not None and self.resumed is not None:
            checkpoint.load_optimizer(self.resumed, module, optimizer.optimizer, self.state["optimizer"])
            checkpoint.restore_rng_state(self.resumed, self.accelerator.process_index)

    def watch(self, name: str, optimizer: Any) -> None:
        """Every update that the prepared `optimizer` makes from now on is noted in `moved`."""
        optimizer.optimizer.register_step_post_hook(lambda *_: self.moved.add(name))

    @contextmanager
    def loop(self) -> Iterator[Callable[..., None]]:
        """Yields what moves the progress bar. Inside, a signal is noted; `after_step` obeys it.

        There is no checkpoint of the last step, and a signal must not end the process before the models are
        written: `finish` belongs inside.
        """
        if self.main:
            resumed = self.resumed is not None
            self._log = checkpoint.open_log(self.output, self.start, resumed, self.progress.note)
        self._started = time.perf_counter()
        tracked = bool(self.accelerator.log_with)
        if tracked:
            settings = asdict(self.config)  # type: ignore[call-overload]
            self.accelerator.init_trackers("ipvrm", {k: _plain(v) for k, v in settings.items()})
        try:
            with self._interrupt, self.progress.bar(self.command, self.total, self.start) as bar:
                yield bar
        finally:
            if tracked:
                self.accelerator.end_training()

    def seconds(self) -> float:
        """Since the loop was entered."""
        return time.perf_counter() - self._started

    def evaluates(self, done: int, every: int | None) -> bool:
        """Whether an evaluation follows step `done`: every so many steps where given, and the last."""
        return done == self.total or (every is not None and done % every == 0)

    def record(self, record: dict[str, Any]) -> None:
        """A line of the log."""
        self.last = record
        if self._log is not None:
            self._log.write(record | {"seconds_total": round(self.seconds(), 3)})
            if self.accelerator.log_with:
                numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
                self.accelerator.log(numbers, step=record["step"])
            evaluated = [f"{name} {value:.4g}" for name, value in record.items() if name.startswith("eval_")]
            if evaluated:
                self.progress.note(f"update {record['step']}: " + "  ".join(evaluated))

    @contextmanager
    def kept_on_failure(
        self, done: int, trained: Trained, unlogged: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Saves the `done` finished steps when something goes wrong inside, and says so.

        Args:
            unlogged: the record of the last of them where the log does not have it yet.
        """
        try:
            yield
        except Exception as error:
            if not done:  # nothing to lose
                raise
            if unlogged is not None:
                self.record(unlogged)
            kept = self._keep(done, trained, error)
            if isinstance(error, IpvrmError):
                raise IpvrmError(f"{error}. {kept}") from error
            if self.main:
                print(f"\n{kept}", file=sys.stderr, flush=True)
            raise

    def _keep(self, done: int, trained: Trained, error: Exception) -> str:
        """Saves the `done` finished steps if it can after `error`; what came of it, in words."""
        if self.moved:
            why = f"{' and '.join(sorted(self.moved))} had learnt from step {done + 1} already"
        elif self.accelerator.num_processes > 1 and not isinstance(error, FailedAlike):
            # a save needs all ranks, and the others may wait for this one elsewhere
            why = "it is not known that all ranks have failed alike"
        else:
            try:
                return f"The run so far: {self.save(done, trained)}"
            except Exception as second:
                why = f"saving failed too ({second})"
        lost = done - checkpoint.newest_step(self.output)
        return (
            f"Not saved: {why}; {checkpoint.newest_in_words(self.output)}, steps lost before this one: {lost}"
        )

    def after_step(self, done: int, trained: Trained) -> None:
        """Saves a checkpoint of `done` steps where one is due; the last step has none, `finish` follows.

        Raises:
            TrainingInterrupted: a signal has asked a rank to stop.
        """
        if done == self.total:
            return
        stop = self._interrupt.asked(self.accelerator)
        if stop or (self.config.save_steps and done % self.config.save_steps == 0):
            folder = self.save(done, trained)
            if stop:
                raise checkpoint.interrupted(folder, done, self.total, self._interrupt.signal)

    def save(self, step: int, trained: Trained) -> Path:
        """Writes the checkpoint of `step`; all ranks take part."""
        from accelerate.utils import gather_object

        rng = gather_object([checkpoint.rng_state(self.accelerator.process_index)])
        path = self.output / f"{checkpoint.PREFIX}{step}"
        trained.gather()
        if self.main:
            with save_folder(path) as folder:
                trained.write_model(folder, path)
                state = {
                    "step": step,
                    "fingerprint": self._fingerprint,
                    CPU_MATMUL: cpu_matmul(),
                    **trained.write_state(folder),
                }
                checkpoint.save_state(folder, state, rng)
            checkpoint.remove_old_checkpoints(self.output, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def finish(self, metrics: dict[str, Any], trained: Trained) -> TrainResult:
        """Writes the models and results.json (`metrics`, with `seconds`), the mark of a finished run last."""
        trained.gather()
        if self.main and self._log is not None:
            self._log.close()
            finished = self.output / ".finished.tmp"
            with save_folder(finished) as folder:
                trained.write_model(folder, self.output)
                write_json(folder / RESULTS, metrics)
            move_into(finished, self.output, last=self.mark)
        self.accelerator.wait_for_everyone()
        return TrainResult(self.output, metrics, self.total, metrics["seconds"])


def _plain(value: Any) -> bool | str | float | int:
    """What every tracker takes as a setting."""
    return value if isinstance(value, bool | str | float | int) else str(value)


def with_template_kwargs(config: Config) -> Config:
    """The config of a training script with the chat settings of its preset, where it has any and none are
    given; these depend on the model's template."""
    if config.preset == "paper" or config.chat_template_kwargs is not None:
        return config
    kwargs = preset_template_kwargs(None, config.preset, load_tokenizer(config.model))
    return replace(config, chat_template_kwargs=kwargs)


def report(result: TrainResult) -> None:
    """The last line of a training command."""
    if result.steps and int(os.environ.get("RANK", "0")) == 0:
        print(f"{result.output_dir}: {result.steps} updates in {result.seconds:.1f} s")
