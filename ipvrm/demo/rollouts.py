"""Rollouts of the demo's base model: training data with outcome labels, and what is held out."""

import itertools
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch

from ipvrm.demo.arithmetic import STEP_SEPARATOR, Problem, answer_of, first_wrong_step, make_problems
from ipvrm.demo.base_model import sample
from ipvrm.demo.settings import Sizes
from ipvrm.output.progress import Progress
from ipvrm.run_folder import read_json_lines, write_json, write_table


def problems_of_parts(sizes: Sizes, seed: int) -> dict[str, list[Problem]]:
    """The problems of every part of the rollouts; no problem is in two of them."""
    plan = {
        "train": sizes.train_problems,
        "validation": sizes.validation_traces,
        "test": sizes.test_traces,
        "best_of_n": sizes.best_of_problems,
    }
    problems = make_problems(sum(plan.values()), Random(seed + 1), multiple_of=sizes.multiple_of)
    ends = list(itertools.accumulate(plan.values()))
    return {name: problems[end - count : end] for (name, count), end in zip(plan.items(), ends, strict=True)}


def roll_out(folder: Path, base: Path, sizes: Sizes, seed: int, progress: Progress) -> None:
    """train.parquet with outcome labels; validation, test and best_of_n as JSONL of (problem, responses)."""
    from ipvrm.models.causal_lm import load_model, load_tokenizer

    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    problems = problems_of_parts(sizes, seed)
    per_problem = {"train": sizes.rollouts_per_problem, "best_of_n": sizes.best_of_samples}
    total = sum(len(taken) * per_problem.get(name, 1) for name, taken in problems.items())
    counts: dict[str, Any] = {}
    with progress.bar("rollouts", total) as update:
        done = 0
        for number, (name, taken) in enumerate(problems.items()):
            each = per_problem.get(name, 1)

            def advance(added: int) -> None:
                nonlocal done
                done += added
                update(done)

            responses = sample(
                model, tokenizer, taken, per_problem=each, seed=1000 * seed + number, on_batch=advance
            )
            counts[name] = _count(taken, responses)
            if name == "train":
                rows = [
                    {"prompt": p.text, "response": r, "label": int(answer_of(r) == p.answer)}
                    for p, found in zip(taken, responses, strict=True)
                    for r in found
                    if r
                ]
                write_table(folder / "train.parquet", rows)
                continue
            pairs = zip(taken, responses, strict=True)
            write_table(folder / f"{name}.jsonl", [asdict(p) | {"responses": found} for p, found in pairs])
    write_json(folder / "counts.json", counts)


def _count(problems: list[Problem], responses: list[list[str | None]]) -> dict[str, int | float]:
    pairs = [(p, r) for p, found in zip(problems, responses, strict=True) for r in found]
    ended = [(p, r) for p, r in pairs if r]
    return {
        "responses": len(pairs),
        "dropped_unfinished_or_empty": len(pairs) - len(ended),
        "right_answer": sum(answer_of(r) == p.answer for p, r in ended),
        "all_steps_right": sum(first_wrong_step(p, r.split(STEP_SEPARATOR)) == -1 for p, r in ended),
    }


def read_rollouts(path: Path) -> list[tuple[Problem, list[str | None]]]:
    """(problem, responses) of a JSONL file of the rollouts stage; None for a response that never ended."""
    rows = read_json_lines(path)
    return [(Problem(row["start"], tuple(row["changes"])), row["responses"]) for row in rows]
