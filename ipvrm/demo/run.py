"""`ipvrm demo`: a base model from scratch, its rollouts, two reward models, three policies; all on a CPU.

Stages, each a folder that is written whole and reused as long as its settings stay the same:

    base            a small Qwen3 trained on noisy arithmetic chains
    rollouts        its answers at temperature 1: training data with outcome labels, and held-out traces
    reward-*        an IPVRM and an Implicit PRM, trained by `train_reward_model` on the outcome labels only
    evaluation      first-error F1 in the training format and in shifted ones, Best-of-N
    policy-start    the policies' problems, and what the base model answers to the held-out ones
    policy-*        GRPO, GRPO + IPVRM and DistRL + IPVRM by `train_policy`, at equal rollouts; with
                    --policy_seeds above 1 also policy-*-1 and so on

and a report of tables, picture and text, all computed from their numbers. The reward models' hyperparameters
were chosen once, on validation traces in the training format and with another seed, by
`python -m benchmarks.studies.select_demo_hyperparameters` (benchmarks/results/demo_selection.json); those
of the policies on other problems and another base model, by `python -m benchmarks.studies.demo_policies`
(benchmarks/results/demo_policies.json).
Thresholds are chosen in each run, on its validation traces in the training format, and never on test traces.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipvrm.demo.base_model import make_model, make_tokenizer, train_base
from ipvrm.demo.rollouts import roll_out
from ipvrm.demo.settings import (
    ALGORITHMS,
    BUDGETS,
    CHOICES,
    FULL,
    QUICK,
    Choice,
    DemoConfig,
    PolicySettings,
    Sizes,
)
from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.run_folder import (
    CPU_MATMUL,
    cpu_matmul,
    manifest,
    other_matmul,
    read_json,
    remove_folder,
    remove_leftovers,
    reusable,
    save_folder,
    write_json,
)
from ipvrm.training.checkpoint import TrainingInterrupted

STAGE_FILE = "stage.json"


def run_demo(
    config: DemoConfig,
    progress: bool = True,
    sizes: Sizes | None = None,
    choices: tuple[Choice, ...] = CHOICES,
) -> dict[str, Any]:
    """Runs the stages that are not there yet, prints tables and text, and writes results.json and report.md.

    Args:
        config: where, how large, which seed.
        progress: show progress and results.
        sizes: other sizes than those of `config.quick`.
        choices: hyperparameters of the reward models.

    Returns:
        What results.json holds.

    Raises:
        IpvrmError: no policy seed, or a task that this model cannot learn.
        TrainingInterrupted: a signal while a reward model or a policy was trained, in a command.
    """
    if config.policy_seeds < 1:
        raise IpvrmError(f"demo: policy_seeds must be at least 1; got {config.policy_seeds}")
    with locked(config.output_dir, folder=True):
        return _run_demo(config, progress, sizes or (QUICK if config.quick else FULL), choices)


def _run_demo(
    config: DemoConfig, progress: bool, sizes: Sizes, choices: tuple[Choice, ...]
) -> dict[str, Any]:
    from ipvrm.demo.evaluation import evaluate_models
    from ipvrm.demo.report import write_report

    output = Path(config.output_dir)
    remove_leftovers(output)
    budgets = BUDGETS if sizes == FULL else {}
    stages = Stages(output, Progress(enabled=progress), budgets)
    prepare(stages, sizes, config.seed)
    for choice in choices:
        train_choice(stages, f"reward-{choice.objective}", choice, config.seed)
    evaluation = {"choices": [asdict(c) for c in choices], "resamples": sizes.bootstrap_resamples}
    stages.folder(
        "evaluation",
        evaluation | {"best_of_n": sizes.best_of_n, "seed": config.seed},
        lambda folder: evaluate_models(folder, output, choices, sizes, config.seed, stages.progress),
        after=["rollouts", *(f"reward-{c.objective}" for c in choices)],
    )
    policies = train_policies(stages, sizes, config.seed, config.policy_seeds)
    results = {
        "config": asdict(config),
        "sizes": asdict(sizes),
        "choices": [asdict(choice) for choice in choices],
        "base": read_json(output / "base" / "base.json"),
        "rollouts": read_json(output / "rollouts" / "counts.json"),
        **read_json(output / "evaluation" / "evaluation.json"),
        "policies": policies,
        "stages": stages.done,
        "budgets": budgets,
        "manifest": manifest(seeds={"demo": config.seed}),
    }
    return write_report(output, results, show=progress)


def prepare(stages: "Stages", sizes: Sizes, seed: int) -> None:
    """The stages that need no reward model: base model and rollouts."""
    names = ("multiple_of", "hidden_size", "num_layers", "base_max_steps", "base_batch")
    base = {name: getattr(sizes, name) for name in names}
    stages.folder(
        "base",
        base | {"seed": seed},
        lambda folder: _train_base(folder, sizes, seed, stages.progress),
    )
    counted = {name: value for name, value in asdict(sizes).items() if name not in base}
    del counted["bootstrap_resamples"], counted["best_of_n"], counted["policies"]
    stages.folder(
        "rollouts",
        counted | {"seed": seed},
        lambda folder: roll_out(folder, stages.output / "base", sizes, seed, stages.progress),
        after=["base"],
    )


def train_choice(
    stages: "Stages", name: str, choice: Choice, seed: int, like: str | None = None, **options: Any
) -> None:
    """A reward model from the outcome labels of the rollouts, into the folder `name`.

    Args:
        like: a folder of another one whose reference log-probs, of the same rollouts, are used again.
        options: of `RewardConfig`, in place of the demo's.
    """
    from ipvrm.models.reference import REFERENCE_FILE
    from ipvrm.training.reward_config import RewardConfig
    from ipvrm.training.train_rm import train_reward_model

    config = RewardConfig(
        model=str(stages.output / "base"),
        train_data=str(stages.output / "rollouts" / "train.parquet"),
        output_dir=str(stages.output / name),
        objective=choice.objective,
        beta=choice.beta,
        margin=choice.margin,
        learning_rate=choice.learning_rate,
        num_train_epochs=choice.num_train_epochs,
        warmup_ratio=0.05,
        global_batch_size=64,
        per_device_train_batch_size=32,
        max_length=256,
        logging_steps=4,
        save_steps=0,
        seed=seed,
        use_cpu=True,
    )
    config = replace(config, **options)

    def make() -> None:
        if like is not None:  # read only where data, reference and precision are the same
            (folder := stages.output / name).mkdir()
            shutil.copyfile(stages.output / like / REFERENCE_FILE, folder / REFERENCE_FILE)
        train_reward_model(config, progress=stages.progress.enabled)

    stages.in_place(name, _settings(config), make, after=["rollouts"])


def train_policies(stages: "Stages", sizes: Sizes, seed: int, num_seeds: int) -> dict[str, Any]:
    """Every algorithm from the base model, with the seeds from `seed` upwards, and how they compare."""
    from ipvrm.demo.policies import compare, read_outcomes, run_log

    prepare_policies(stages, sizes, seed)
    folders: dict[str, list[Path]] = {algorithm: [] for algorithm in ALGORITHMS}
    for number in range(num_seeds):
        for algorithm in ALGORITHMS:
            name = f"policy-{algorithm}" + (f"-{number}" if number else "")
            train_algorithm(stages, name, algorithm, sizes.policies, seed + number)
            folders[algorithm].append(stages.output / name)
    runs = {algorithm: [read_outcomes(f) for f in found] for algorithm, found in folders.items()}
    start = read_outcomes(stages.output / "policy-start")["0"]
    compared = compare(start, runs, sizes.bootstrap_resamples, seed)
    logs = {algorithm: [run_log(f) for f in found] for algorithm, found in folders.items()}
    return {"settings": asdict(sizes.policies), **compared, "logs": logs}


def prepare_policies(stages: "Stages", sizes: Sizes, seed: int) -> None:
    """The problems of the policies, and the outcomes of the base model."""
    from ipvrm.demo.policies import write_start

    stages.folder(
        "policy-start",
        {"held_out": sizes.policies.held_out, "seed": seed},
        lambda folder: write_start(folder, stages.output / "base", sizes, seed),
        after=["rollouts"],
    )


def train_algorithm(stages: "Stages", name: str, algorithm: str, settings: PolicySettings, seed: int) -> None:
    """A policy of `algorithm` into the folder `name`, measured on the held-out problems."""
    from ipvrm.demo.policies import policy_config, read_problems, train

    start = stages.output / "policy-start"
    config = policy_config(stages.output, stages.output / name, algorithm, settings, seed)
    stages.in_place(
        name,
        _settings(config),
        lambda: train(config, read_problems(start / "held_out.jsonl"), stages.progress.enabled),
        after=["policy-start"] + ["reward-ipvrm"] * (config.reward_model is not None),
    )


def _settings(config: Any) -> dict[str, Any]:
    """All fields but the paths, whose contents the stages before decide.

    More than `settings_of`: how often is logged and measured is free on resume, but a stage's log and curve
    are among its results.
    """
    paths = ("model", "reward_model", "train_data", "output_dir")
    return {name: value for name, value in asdict(config).items() if name not in paths}


class Stages:
    """Finished parts of the output folder, and what each was made from."""

    def __init__(self, output: Path, progress: Progress, budgets: dict[str, float] | None = None):
        self.output = output
        self.progress = progress
        self.budgets = budgets or {}
        self.done: dict[str, dict[str, Any]] = {}

    def folder(
        self, name: str, settings: dict[str, Any], make: Callable[[Path], Any], after: list[str] | None = None
    ) -> None:
        """Makes the folder `name` by `make(temporary folder)` unless it is there, of the same settings."""
        key = self._key(name, settings, after or [])
        if self._is_done(name, key, settings):
            return
        started = time.perf_counter()
        with save_folder(self.output / name) as temporary:
            make(temporary)
            self._finish(name, key, settings, started, temporary)

    def in_place(
        self, name: str, settings: dict[str, Any], make: Callable[[], Any], after: list[str] | None = None
    ) -> None:
        """The same for a stage that writes its own folder; what an interrupted one left is removed first.

        Raises:
            TrainingInterrupted: with what the same command will do; `make`'s message names flags of its own.
        """
        key = self._key(name, settings, after or [])
        if self._is_done(name, key, settings):
            return
        if (self.output / name).exists():
            remove_folder(self.output / name)
        started = time.perf_counter()
        try:
            make()
        except TrainingInterrupted as error:
            message = f"{name}: stopped; the same command reuses what is finished and starts {name} afresh"
            raise TrainingInterrupted(message, error.checkpoint, error.exit_code) from error
        self._finish(name, key, settings, started, self.output / name)

    def _key(self, name: str, settings: dict[str, Any], after: list[str]) -> str:
        before = [self.done[stage]["key"] for stage in after]
        made_from = {"stage": name, "settings": settings, "after": before}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def _is_done(self, name: str, key: str, settings: dict[str, Any]) -> bool:
        file = self.output / name / STAGE_FILE
        if file.exists():
            stored = read_json(file)
            if stored["key"] == key:
                self.done[name] = stored
                self.progress.note(f"{name}: done before ({stored['seconds']:.0f} s)")
                if other := other_matmul(stored.get(CPU_MATMUL), name):
                    self.progress.note(other)
                return True
            if reusable(stored["settings"], settings, name, self.progress.note):
                self.progress.note(f"{name}: made again; changed: a stage before it")
        budget = f" (budget {self.budgets[name]:g} s)" if name in self.budgets else ""
        self.progress.note(f"{name}{budget} ...")
        return False

    def _finish(self, name: str, key: str, settings: dict[str, Any], started: float, folder: Path) -> None:
        seconds = round(time.perf_counter() - started, 2)
        self.done[name] = {
            "key": key, "seconds": seconds, "settings": settings, CPU_MATMUL: cpu_matmul(),
        }  # fmt: skip
        write_json(folder / STAGE_FILE, self.done[name])
        self.progress.note(f"{name}: {seconds:.0f} s")


def _train_base(folder: Path, sizes: Sizes, seed: int, progress: Progress) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, sizes.hidden_size, sizes.num_layers, seed)
    fit_base(folder, model, tokenizer, sizes, seed, progress, "base model")


def fit_base(
    folder: Path, model: Any, tokenizer: Any, sizes: Sizes, seed: int, progress: Progress, what: str
) -> None:
    """Trains a base model and saves it with its tokenizer and base.json; `what` names the progress bar."""
    from ipvrm.models.causal_lm import save_model

    with progress.bar(what, sizes.base_max_steps) as update:
        steps, loss = train_base(
            model,
            tokenizer,
            max_steps=sizes.base_max_steps,
            batch_size=sizes.base_batch,
            multiple_of=sizes.multiple_of,
            seed=seed,
            on_step=lambda step, loss: update(step, loss=loss),
        )
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    write_json(folder / "base.json", {"parameters": parameters, "steps": steps, "loss": loss})
