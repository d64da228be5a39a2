"""The demo's policies: GRPO, GRPO + IPVRM and DistRL + IPVRM from the base model, at equal rollouts.

All train on the problems of the reward models' rollouts, with the same prompts in the same order, the same
number of responses and the same random numbers. They are measured on other problems at temperature 1, one
response each, whose random numbers too are the same for every policy: differences are paired by problem.

Intervals and standard errors redraw problems and, where there are several, the seeds of the runs together:
a bootstrap with one draw fewer than there are, whose variance is that of the mean and not (S - 1) / S of it,
which is a third less with three seeds (Rao and Wu 1988). The base model and the reward model at the start are
one each; their seeds are not redrawn.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ipvrm.data.chat import Chat
from ipvrm.data.rows import Prompt
from ipvrm.demo.arithmetic import Problem, make_problems
from ipvrm.demo.base_model import MAX_NEW_TOKENS
from ipvrm.demo.rollouts import problems_of_parts
from ipvrm.demo.settings import PolicySettings, Sizes
from ipvrm.evaluate.thresholds import percentile_interval
from ipvrm.models.causal_lm import load_model, load_tokenizer
from ipvrm.output.progress import Progress
from ipvrm.rollouts.answers import Question, judge, sample
from ipvrm.rollouts.engine import Sampling, TransformersEngine, stop_ids
from ipvrm.rollouts.verify import load_verifier
from ipvrm.run_folder import read_json, read_json_lines, remove_folder, write_json, write_table
from ipvrm.training.checkpoint import checkpoints
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.train_policy import train_policy

OUTCOMES = "held_out.json"
VERIFIER = "ipvrm.demo.arithmetic:right_answer"
PARTS = ("rollout", "verify", "behaviour", "reward", "update")


def write_start(folder: Path, base: Path, sizes: Sizes, seed: int) -> None:
    """train.jsonl, the problems of train.parquet; held_out.jsonl, problems that no part of the rollouts has;
    and the base model's outcomes on the latter."""
    parts = problems_of_parts(sizes, seed)
    used = frozenset(problem for part in parts.values() for problem in part)
    held_out = make_problems(sizes.policies.held_out, Random(seed + 300), used, sizes.multiple_of)
    for name, problems in (("train", parts["train"]), ("held_out", held_out)):
        rows = [{"prompt": p.text, "answer": str(p.answer)} for p in problems]
        write_table(folder / f"{name}.jsonl", rows)
    write_json(folder / OUTCOMES, {"0": outcomes(base, held_out)})


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file that `write_start` wrote."""
    return [parse_problem(row["prompt"]) for row in read_json_lines(path)]


def parse_problem(text: str) -> Problem:
    """`47+25-13` as a problem."""
    start, *changes = text.replace("-", "+-").split("+")
    return Problem(int(start), tuple(map(int, changes)))


def outcomes(model_folder: Path, problems: Sequence[Problem]) -> list[int]:
    """Whether a model's one response to each problem is right (1) or not (0); without an end it is not."""
    model, tokenizer = load_model(model_folder, torch.float32), load_tokenizer(model_folder)
    stops = stop_ids(model, tokenizer)
    prompts = [Prompt(row, p.text, str(p.answer)) for row, p in enumerate(problems, 1)]
    chat = Chat(tokenizer)
    questions = [Question(prompt, chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    jobs = [(question, number, 0) for number, question in enumerate(questions)]
    engine = TransformersEngine(model, stops, batch_size=512)
    responses = sample(engine, jobs, Sampling(MAX_NEW_TOKENS), seed=0)
    verify = load_verifier(VERIFIER)
    verdicts = judge(
        list(zip(responses, questions, strict=True)),
        stops,
        tokenizer,
        lambda pairs: [verify(text, answer) for text, answer in pairs],
    )
    return [int(verdict is not None and verdict.label == 1) for verdict in verdicts]


def policy_config(
    output: Path, folder: Path, algorithm: str, settings: PolicySettings, seed: int
) -> PolicyConfig:
    """The run of `algorithm` in `folder`, from what lies in the demo's `output` folder."""
    scored = algorithm != "grpo"
    return PolicyConfig(
        model=str(output / "base"),
        train_data=str(output / "policy-start" / "train.jsonl"),
        output_dir=str(folder),
        algorithm=algorithm,
        reward_model=str(output / "reward-ipvrm") if scored else None,
        gae_coef=settings.gae_coef if scored else None,
        num_generations=settings.responses,
        rollout_prompts=settings.prompts,
        train_prompts=settings.prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        max_steps=settings.steps,
        minibatch_size=settings.minibatch_size,
        rm_minibatch_size=settings.minibatch_size if scored else None,
        learning_rate=settings.learning_rate,
        lora_r=0,
        rm_lora_r=0 if scored else None,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        verifier=VERIFIER,
        verifier_workers=1,
        save_steps=max(1, settings.steps // settings.points),
        save_total_limit=settings.steps,
        seed=seed,
        use_cpu=True,
    )


def train(config: PolicyConfig, problems: Sequence[Problem], progress: bool) -> None:
    """Trains, then measures every saved policy and deletes the checkpoints: OUTCOMES is {step: outcomes}."""
    folder = train_policy(config, progress=progress).output_dir
    found = {}
    for saved in Progress(progress).track(checkpoints(folder), "outcomes"):
        found[saved.name.rpartition("-")[2]] = outcomes(saved, problems)
        remove_folder(saved)
    write_json(folder / OUTCOMES, found | {str(config.max_steps): outcomes(folder, problems)})


# ------------------------------------------------------------------------------------------------ comparing


class Resampling:
    """Means of (S, P) tables, seeds by problems, under one set of redrawn seeds and problems."""

    def __init__(self, num_seeds: int, num_problems: int, resamples: int, seed: int):
        rng = np.random.default_rng(seed)
        self.seeds = _shares(rng, num_seeds, resamples)  # (R, S)
        self.problems = _shares(rng, num_problems, resamples)  # (R, P)

    def estimate(self, table: NDArray[np.floating]) -> dict[str, Any]:
        """Mean of a (S, P) or (P,) table, its 95 % interval and its standard error."""
        by_problem = self.seeds @ table if table.ndim == 2 else table  # (R, P) or (P,)
        means = (by_problem * self.problems).sum(1)
        return {
            "mean": float(table.mean()),
            "interval": list(percentile_interval(means)),
            "standard_error": float(means.std()),
        }


def _shares(rng: np.random.Generator, count: int, resamples: int) -> NDArray[np.float64]:
    """(R, count): the weight of each in the mean of a resample."""
    draws = max(1, count - 1)
    return rng.multinomial(draws, np.full(count, 1 / count), size=resamples) / draws


def compare(
    start: Sequence[int], runs: Mapping[str, Sequence[Mapping[str, Sequence[int]]]], resamples: int, seed: int
) -> dict[str, Any]:
    """Accuracy of each algorithm over the steps, its gain over the start, and differences at the end.

    Args:
        start: outcome of the base model on each problem.
        runs: by algorithm, of each seed {step: outcome on each problem}.
        resamples, seed: of the intervals.
    """
    before = np.asarray(start, float)  # (P,)
    num_seeds = len(next(iter(runs.values())))
    draws = Resampling(num_seeds, len(before), resamples, seed)
    ends: dict[str, NDArray[np.floating]] = {}
    found: dict[str, Any] = {}
    for algorithm, by_seed in runs.items():
        curve = [{"step": 0, **draws.estimate(before)}]
        for step in sorted(map(int, by_seed[0])):
            ends[algorithm] = np.asarray([run[str(step)] for run in by_seed], float)  # (S, P)
            curve.append({"step": step, **draws.estimate(ends[algorithm])})
        gain = draws.estimate(ends[algorithm] - before)
        found[algorithm] = {
            "curve": curve,
            "by_seed": [
                [float(before.mean()), *(float(np.mean(run[str(point["step"])])) for point in curve[1:])]
                for run in by_seed
            ],
            "gain": gain | {"in_standard_errors": gain["mean"] / max(gain["standard_error"], 1e-12)},
        }
    names = list(runs)
    pairs = [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
    differences = [{"of": [a, b], **draws.estimate(ends[a] - ends[b])} for a, b in pairs]
    return {
        "problems": len(before),
        "seeds": num_seeds,
        "start": draws.estimate(before),
        "algorithms": found,
        "differences": differences,
    }


def run_log(folder: Path) -> dict[str, Any]:
    """What a run cost (medians over its steps) and what its log says of each step."""
    steps = read_json_lines(folder / "metrics.jsonl")
    return {
        "responses": sum(step["responses"] for step in steps),
        "step_seconds": statistics.median(step["seconds"] for step in steps),
        "seconds": {p: statistics.median(step.get(f"seconds_{p}", 0.0) for step in steps) for p in PARTS},
        "entropy": [step["entropy"] for step in steps],
        "rm_auc": [step["rm_auc"] for step in steps if "rm_auc" in step],
    }


def read_outcomes(folder: Path) -> dict[str, list[int]]:
    """{step: outcome on each held-out problem} of a stage."""
    found: dict[str, list[int]] = read_json(folder / OUTCOMES)
    return found
