"""The world of the trials: a policy that writes a digit from 0 to 3, a semicolon and another digit, its
reward models, and data. Right is a first digit 3."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from ipvrm import RewardConfig, train_reward_model
from ipvrm.demo.base_model import make_model, make_tokenizer
from ipvrm.models.causal_lm import save_model

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
