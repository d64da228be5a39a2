"""The world of the trials: a policy that writes a digit from 0 to 3, a semicolon and another digit, its
reward models, and data. Right is a first digit 3. And the demo in miniature: every stage is real, but
responses come from the noise model of its task; a model that is trained for a second would never answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from ipvrm import RewardConfig, train_reward_model
from ipvrm.demo.arithmetic import noisy_solution
from ipvrm.demo.base_model import SPECIAL, make_model, make_tokenizer
from ipvrm.demo.policies import parse_problem
from ipvrm.demo.settings import PolicySettings, Sizes
from ipvrm.models.causal_lm import save_model

MINI = Sizes(
    hidden_size=32,
    num_layers=2,
    base_max_steps=20,
    base_batch=8,
    train_problems=48,
    rollouts_per_problem=4,
    validation_traces=48,
    test_traces=64,
    best_of_problems=8,
    best_of_samples=4,
    best_of_n=(2, 4),
    bootstrap_resamples=100,
    policies=PolicySettings(steps=2, prompts=4, responses=4, minibatch_size=16, held_out=24, points=2),
)

VERIFIERS = """
import os
import time
from pathlib import Path

BROKEN = Path(__file__).with_name("broken")
if BROKEN.exists():
    raise RuntimeError("no longer to be imported")

def first(response, answer):
    if BROKEN.exists():
        os._exit(1)
    return response.split(";")[0] == answer

def never(response, answer):
    return False

def breaks(response, answer):
    if response.startswith("2"):
        raise RuntimeError("no idea")
    return response.startswith("3")

def hangs_or_dies(response, answer):
    if response.startswith("2"):
        time.sleep(60)
    if response.startswith("1"):
        os._exit(3)
    return response.startswith("3")
"""


def make_toy(folder: Path, objectives: tuple[str, ...] = ("ipvrm", "implicit_prm")) -> Path:
    """Fills `folder` with the policy `sft`, a reward model of each objective under its name, `prompts.jsonl`,
    `labelled.jsonl` and the module `toy_verifiers`; returns it."""
    (folder / "toy_verifiers.py").write_text(VERIFIERS)
    rng, tokenizer = random.Random(0), make_tokenizer()
    model = make_model(tokenizer, 32, 2, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    answers = []
    for _ in range(60):
        pairs = [
            (f"<|user|>{rng.randint(10, 99)}<|assistant|>", f"{rng.randint(0, 3)};{rng.randint(0, 9)}<|end|>")
            for _ in range(32)
        ]
        ids = torch.tensor(tokenizer([a + b for a, b in pairs], add_special_tokens=False).input_ids)
        labels = ids.clone()
        labels[:, :4] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        answers += [(a[8:10], b.removesuffix("<|end|>")) for a, b in pairs]
    save_model(model, folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": str(n), "answer": "3"} for n in range(10, 58)])
    write_jsonl(
        folder / "labelled.jsonl",
        [{"prompt": p, "response": r, "label": int(r[0] == "3")} for p, r in answers[:128]],
    )
    for objective in objectives:
        train_reward_model(
            RewardConfig(
                str(folder / "sft"),
                str(folder / "labelled.jsonl"),
                str(folder / objective),
                objective=objective,
                margin=1.0 if objective == "ipvrm" else None,
                learning_rate=3e-3,
                num_train_epochs=2,
                per_device_train_batch_size=64,
                use_cpu=True,
            ),
            progress=False,
        )
    return folder


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def noisy_samples(
    model: Any, tokenizer: Any, problems: Any, *, per_problem: int, seed: int, on_batch: Any = lambda count: 0
) -> list[list[str | None]]:
    """Answers to the demo's problems, right about half of the time; one never ends."""
    rng = random.Random(seed)
    on_batch(len(problems) * per_problem)
    found: list[list[str | None]] = [
        [noisy_solution(p, 0.15, rng) for _ in range(per_problem)] for p in problems
    ]
    found[0][0] = None if per_problem > 1 else found[0][0]
    return found


def noisy_engine(engine: Any, prompts: Any, sampling: Any, seeds: Any) -> list[list[int]]:
    """The same for the demo's policies."""
    tokenizer, found = make_tokenizer(), []
    for ids, seed in zip(prompts, seeds, strict=True):
        text = tokenizer.decode(ids).removeprefix(SPECIAL["user"]).removesuffix(SPECIAL["assistant"])
        solution = noisy_solution(parse_problem(text), 0.15, random.Random(seed))
        found.append(tokenizer(solution + SPECIAL["end"], add_special_tokens=False)["input_ids"])
    return found
