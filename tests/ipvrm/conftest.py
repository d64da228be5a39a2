"""A tiny Qwen3 with its tokenizer, made once for the whole session, and rollouts to train on."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from ipvrm.models.tiny_model import TinyModelConfig, make_tiny_model
from ipvrm.training import optimizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # models this small are fastest so, above all beside other processes


def make_rollouts(path: Path, count: int, seed: int = 0) -> Path:
    """JSONL chat rows: sums whose label says whether the answer is right."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            a, b, label = rng.randint(1, 99), rng.randint(1, 99), number % 2
            answer = a + b if label else a + b + rng.choice([-1, 1])
            steps = " ".join(f"Step {i}: carry {rng.randint(0, 9)}." for i in range(rng.randint(0, 4)))
            messages = [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"{steps} Answer: {answer}".strip()},
            ]
            file.write(json.dumps({"conversation": messages, "label": label}) + "\n")
    return path


@pytest.fixture
def linear_adam(monkeypatch):
    """Adam's step is proportional to the gradient, so that two ways to form it, which differ by rounding,
    give nearly the same weights; else rounding decides the sign near 0. For commands: `LINEAR_IPVRM`."""
    monkeypatch.setattr(optimizer, "EPSILON", 1.0)


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory):
    """44 rows: not a multiple of any batch size used."""
    return make_rollouts(tmp_path_factory.mktemp("rollouts") / "train.jsonl", 44)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, rollouts):
    """Folder of a random two-layer Qwen3 with 320 tokens and a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = TinyModelConfig(str(folder), (str(rollouts),), vocab_size=320, num_key_value_heads=1, **sizes)
    return make_tiny_model(config)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from ipvrm.models.causal_lm import load_tokenizer

    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def encoded(request, tokenizer):
    """The module's PROMPTS as ids."""
    from ipvrm.data.chat import encode_prompt

    return [encode_prompt(prompt, tokenizer) for prompt in request.module.PROMPTS]


@pytest.fixture(scope="module")
def stops(model, tokenizer):
    """The ids that end a response of the module's model."""
    from ipvrm.rollouts.engine import stop_ids

    return stop_ids(model, tokenizer)


@pytest.fixture(scope="session")
def data_dir():
    """The real data, or a skip with the reason."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("IPVRM_DATA_DIR", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set IPVRM_DATA_DIR")
    return folder
