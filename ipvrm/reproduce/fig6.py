"""`ipvrm demo fig6`: five ways to update the reward model while the policy learns (Figure 6), on the demo's
arithmetic task and a CPU.

    frozen   no update          naive   the margin loss (Eq. 9) on the rollouts' labels
    DLW      dynamic loss weighting          ADB   adaptive difficulty boundary (Eq. 15)          both

All variants start from the same policy and the same IPVRM, and train by DistRL on the same prompts with the
same random numbers; only `--rm_update`, `--dlw` and `--adb` differ. At every step the reward model is
measured on new rollouts before it learns from any of them: where it is updated, on those of the step's first
minibatch; frozen, on all.

A finished variant is kept and reused. On the paper's models and data the five are a table of
`ipvrm reproduce fig6`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ipvrm.demo.arithmetic import Problem, make_problems
from ipvrm.demo.base_model import MAX_NEW_TOKENS
from ipvrm.demo.run import STAGE_FILE, Stages, prepare, train_choice
from ipvrm.demo.settings import BUDGETS, CHOICES, FULL
from ipvrm.errors import IpvrmError, reading
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.reproduce.fig6_report import mean_with_error, problem_error, write_report
from ipvrm.run_folder import (
    manifest,
    read_json,
    read_json_lines,
    remove_leftovers,
    same_run,
    settings_of,
    write_table,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"rm_update": "frozen"},
    "naive": {"dlw": False, "adb": False},
    "DLW": {"dlw": True, "adb": False},
    "ADB": {"dlw": False, "adb": True},
    "both": {"dlw": True, "adb": True},
}
# Of a step's record: what is kept of it in results.json.
OF_REWARD_MODEL = (
    "rm_auc",
    "rm_accuracy",
    "rm_auc_responses",
    "rm_scored_auc",
    "value_right",
    "value_wrong",
    "value_mean",
    "value_std",
    "rm_loss",
    "rm_grad_norm",
)
# Of the runs' keys: one that logged rm_auc over several states of the reward model is not reused.
MEASURED = "rm_auc before any update from the step's rollouts"
OF_POLICY = ("rollout_accuracy", "responses_trained", "entropy", "seconds")


@dataclass(frozen=True)
class Fig6Config:
    """Figure 6 on the demo's task: DistRL with its reward model frozen, updated plainly, with DLW, with ADB
    and with both.

    Some minutes on two CPU cores. With the paper's models and data it is `ipvrm reproduce fig6 --scale full`.
    """

    demo: str = "runs/demo"
    """Output folder of `ipvrm demo`; what it lacks of base model, rollouts and IPVRM is made there."""
    output_dir: str = "runs/fig6"
    """Folder for results.json, report.md, fig6.png and the runs; finished ones are reused."""
    seeds: tuple[int, ...] = (0,)
    """One run of every variant for each."""


@dataclass(frozen=True)
class Scale:
    """How much of everything; the settings of the task are the demo's."""

    steps: int
    """Rollout batches."""
    minibatch_size: int
    """Responses per update of policy and reward model."""
    prompts: int
    """Prompts per step."""
    num_generations: int
    held_out: int
    """Problems that accuracy is measured on, one response each at temperature 1."""
    eval_steps: int
    learning_rate: float
    gae_coef: float


# Minibatch, learning rate and gae_coef are those of the demo's policies, chosen on another base model and
# other problems, and not for the reward model.
SCALE = Scale(
    steps=16,
    minibatch_size=64,
    prompts=32,
    num_generations=8,
    held_out=1024,
    eval_steps=4,
    learning_rate=2e-4,
    gae_coef=0.1,
)
HELD_OUT_SEED = 600  # of the held-out problems, the same for every seed of the runs


def reproduce(config: Fig6Config, progress: bool = True, scale: Scale = SCALE) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes results.json, report.md and fig6.png.

    Args:
        scale: how much of everything.

    Returns:
        What results.json holds.

    Raises:
        IpvrmError: seeds that are none, negative or repeated, or a demo that has not
            finished and is not one of the full size.
        TrainingInterrupted: a signal during a run, in a command.
    """
    if not config.seeds or min(config.seeds) < 0 or len(set(config.seeds)) < len(config.seeds):
        raise IpvrmError(f"--seeds must be different numbers from 0 on; got {config.seeds}")
    with locked(config.output_dir, folder=True):
        return _reproduce(config, progress, scale)


def _reproduce(config: Fig6Config, progress: bool, sizes: Scale) -> dict[str, Any]:
    from ipvrm.training.train_policy import train_policy

    shown = Progress(enabled=progress)
    demo, output = Path(config.demo), Path(config.output_dir)
    remove_leftovers(output)
    made_from = _demo(demo, shown)
    stages = Stages(output, shown)
    inputs = {"demo": made_from["key"], "held_out": sizes.held_out, "held_out_seed": HELD_OUT_SEED}
    stages.folder(
        "problems", inputs, lambda folder: write_problems(folder, demo, sizes.held_out, HELD_OUT_SEED)
    )
    runs: dict[str, dict[str, Any]] = {}
    for seed in config.seeds:
        for variant, switches in VARIANTS.items():
            name = f"{variant}-{seed}"
            settings = _settings(sizes, seed) | switches
            if switches.get("rm_update") != "frozen":
                settings |= {"rm_lora_r": 0, "rm_minibatch_size": sizes.minibatch_size}
            policy = _policy_config(demo, output, name, settings)
            train = partial(train_policy, policy, progress=shown.enabled)
            stages.in_place(name, settings | {"measured": MEASURED}, train, after=["problems"])
            runs.setdefault(variant, {})[str(seed)] = _curves(output / name)
    results = {
        "config": asdict(config),
        "scale": asdict(sizes),
        "demo": made_from,
        "variants": {name: {"switches": VARIANTS[name], "seeds": by_seed} for name, by_seed in runs.items()},
        "summary": summary(runs),
        "seconds": {name: stage["seconds"] for name, stage in stages.done.items()},
        "manifest": manifest(seeds={f"run {i}": seed for i, seed in enumerate(config.seeds, 1)}),
    }
    return write_report(output, results, show=progress)


# ------------------------------------------------------------------------------------------------- inputs


def _demo(demo: Path, shown: Progress) -> dict[str, Any]:
    """What the IPVRM of the demo's folder was made from. Of a demo that has not finished, what is missing of
    base model, rollouts and IPVRM is made as `ipvrm demo` makes it.

    Raises:
        IpvrmError: an unfinished demo of other sizes or another seed: its stages would be replaced.
    """
    choice = CHOICES[0]
    reward = f"reward-{choice.objective}"
    if (demo / "results.json").exists():
        shown.note(f"{demo}: a finished demo")
    else:
        with locked(demo, folder=True):  # `ipvrm demo` may be at work there
            _refuse_another(demo)
            stages = Stages(demo, shown, BUDGETS)
            prepare(stages, FULL, seed=0)
            train_choice(stages, reward, choice, seed=0)
    stored = {name: read_json(demo / name / STAGE_FILE) for name in ("base", "rollouts", reward)}
    return {
        "key": stored[reward]["key"],
        "seed": stored["base"]["settings"]["seed"],
        "multiple_of": stored["base"]["settings"]["multiple_of"],
        "reward_model": {n: stored[reward]["settings"][n] for n in ("objective", "beta", "margin")},
    }


def _refuse_another(demo: Path) -> None:
    wanted = settings_of(FULL) | {"seed": 0}
    for name in ("base", "rollouts"):
        file = demo / name / STAGE_FILE
        stored = read_json(file)["settings"] if file.exists() else {}
        what = f"--demo {demo}: an unfinished demo, to be finished by the command that started it: it"
        same_run(stored, {key: wanted.get(key) for key in stored}, what)


def write_problems(folder: Path, demo: Path, held_out: int, seed: int) -> None:
    """train.jsonl, the problems that the reward model's data answered, and held_out.jsonl, other ones."""
    import pyarrow.parquet as pq

    path = demo / "rollouts" / "train.parquet"
    with reading(path, "cannot be read", "delete its folder, and `ipvrm demo` makes it again"):
        prompts = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()
    train = [_problem(text) for text in dict.fromkeys(prompts)]
    multiple_of = read_json(demo / "base" / STAGE_FILE)["settings"]["multiple_of"]
    others = make_problems(held_out, Random(seed), frozenset(train), multiple_of)
    for name, problems in (("train", train), ("held_out", others)):
        rows = [{"prompt": p.text, "answer": str(p.answer)} for p in problems]
        write_table(folder / f"{name}.jsonl", rows)


def _problem(text: str) -> Problem:
    """The problem that `text` (47+25-13) writes."""
    start, *changes = map(int, re.findall(r"[+-]?\d+", text))
    return Problem(start, tuple(changes))


def _settings(sizes: Scale, seed: int) -> dict[str, Any]:
    """What all variants share of `PolicyConfig`, besides folders."""
    return {
        "algorithm": "distrl",
        "gae_coef": sizes.gae_coef,
        "num_generations": sizes.num_generations,
        "rollout_prompts": sizes.prompts,
        "train_prompts": sizes.prompts,
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_steps": sizes.steps,
        "minibatch_size": sizes.minibatch_size,
        "learning_rate": sizes.learning_rate,
        "lora_r": 0,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 512,
        "verifier": "ipvrm.demo.arithmetic:right_answer",
        "verifier_workers": 1,
        "eval_steps": sizes.eval_steps,
        "eval_temperature": 1.0,
        "eval_top_p": 1.0,
        "save_steps": 0,
        "seed": seed,
        "use_cpu": True,
    }


def _policy_config(demo: Path, output: Path, name: str, settings: dict[str, Any]) -> Any:
    from ipvrm.training.policy_config import PolicyConfig

    return PolicyConfig(
        model=str(demo / "base"),
        reward_model=str(demo / f"reward-{CHOICES[0].objective}"),
        train_data=str(output / "problems" / "train.jsonl"),
        eval_data=str(output / "problems" / "held_out.jsonl"),
        output_dir=str(output / name),
        **settings,
    )


# ------------------------------------------------------------------------------------------------ numbers


def _curves(run: Path) -> dict[str, Any]:
    """From the metrics of a run: held-out accuracy by step, and what each step says of reward model and
    policy."""
    records = read_json_lines(run / "metrics.jsonl")
    steps = [r for r in records if r["step"] > 0]
    evaluated = [r for r in records if "eval_accuracy" in r]
    return {
        "held_out": [
            {"step": r["step"], "accuracy": r["eval_accuracy"], "responses": int(r["eval_responses"])}
            for r in evaluated
        ],
        "step": [r["step"] for r in steps],
        "reward_model": {n: [r[n] for r in steps] for n in OF_REWARD_MODEL if n in steps[0]},
        "policy": {n: [r[n] for r in steps] for n in OF_POLICY},
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per variant (value, standard error) of the numbers in the table.

    Errors of accuracies are those of the problems drawn, sqrt(p (1 - p) / n), which more seeds on the same
    problems do not lessen; with several seeds, together with that of the mean over seeds. The gain takes
    start and end for independent, though they share their problems: too large rather than too small.

    AUC and accuracy of the reward model: means over the steps of all seeds in which they are defined,
    `auc_gain` the mean difference to `frozen` at the same step and seed, from the second step on (in the
    first all reward models are the same).

    Args:
        runs: by variant and seed, what `_curves` returns.
    """
    table = {}
    for name, by_seed in runs.items():
        first, last = ([run["held_out"][i] for run in by_seed.values()] for i in (0, -1))
        ends = [e["accuracy"] for e in last]
        end, between_seeds = mean_with_error(ends)
        start = first[0]["accuracy"]  # of one and the same policy
        errors = [problem_error(p, first[0]["responses"]) for p in (start, end)]
        table[name] = {
            "start": (start, errors[0]),
            "end": (end, math.hypot(errors[1], between_seeds)),
            "gain": (end - start, math.hypot(*errors, between_seeds)),
            "auc": mean_with_error(
                [x for run in by_seed.values() for x in run["reward_model"]["rm_auc"] if x is not None]
            ),
            "rm_accuracy": mean_with_error(
                [x for run in by_seed.values() for x in run["reward_model"]["rm_accuracy"]]
            ),
            "value_gap": mean_with_error([x for run in by_seed.values() for x in _gaps(run["reward_model"])]),
            "auc_gain": mean_with_error(_differences(by_seed, runs["frozen"], "rm_auc")),
            "rm_accuracy_gain": mean_with_error(_differences(by_seed, runs["frozen"], "rm_accuracy")),
        }
    return table


def _defined(values: Iterable[float | None]) -> list[float]:
    return [x for x in values if x is not None]


def _gaps(reward_model: dict[str, list[float]]) -> list[float]:
    """Mean final value of right responses less that of wrong ones, by step."""
    pairs = zip(reward_model["value_right"], reward_model["value_wrong"], strict=True)
    return [right - wrong for right, wrong in pairs]


def _differences(by_seed: dict[str, Any], frozen: dict[str, Any], name: str) -> list[float]:
    found = []
    for seed, run in by_seed.items():
        pairs = zip(run["reward_model"][name], frozen[seed]["reward_model"][name], strict=True)
        found += [own - other for own, other in list(pairs)[1:] if own is not None and other is not None]
    return found or [0.0]


def main(config: Fig6Config) -> None:
    """Console entry."""
    reproduce(config)
