"""What the end-to-end benchmarks share: a Qwen3 with random weights, a ragged batch, and rows like a trained
model's."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.suite.heads import CANDIDATES_PER_ROW, measured
from ipvrm.data.batches import Batch, collate
from ipvrm.data.responses import Response
from ipvrm.models.causal_lm import head, hidden_states

PROMPT = 16  # tokens of every prompt
SEQUENCES = 8


def qwen3(device: str, quick: bool) -> Any:
    """Random weights: Qwen3-0.6B's architecture on a GPU (bf16), four layers of half its width on a CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = dict(vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip
    if quick:
        sizes |= dict(vocab_size=8192, hidden_size=256, intermediate_size=768)
    if device == "cuda":
        sizes = dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip
    config = Qwen3Config(tie_word_embeddings=True, use_cache=False, **sizes)
    with torch.device(device):  # a CPU takes many seconds to draw 0.6 B normal numbers
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
    return model.to(device).train()


def ragged_batch(device: str, vocabulary: int, quick: bool) -> Batch:
    """SEQUENCES of a quarter of T to T tokens, evenly spread, as rollouts: T = 2048 (GPU), 256 or 128 (CPU).

    On a GPU 10,237 tokens in all.
    """
    T = 2048 if device == "cuda" else 128 if quick else 256
    lengths = torch.linspace(T // 4, T, SEQUENCES).long().tolist()  # of prompt and response
    rows = [
        Response(tuple(torch.randint(3, vocabulary, (n,)).tolist()), PROMPT, b % 2)
        for b, n in enumerate(lengths)
    ]
    return collate(rows).to(device)


def title(model: Any, batch: Batch) -> str:
    """Sizes of a step."""
    layers, D, V = model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size
    return (
        f"{len(batch.outcome)} sequences, {len(batch.token_ids)} response tokens, {layers} layers D={D} V={V}"
    )


@torch.no_grad()
def sharpen(model: Any, batch: Batch) -> tuple[float, float, float]:
    """Scale the model's final norm until its rows have about CANDIDATES_PER_ROW tokens of p >= 0.1.

    Returns what `heads.measured` then finds: candidates a row, the mass they hold, entropy. Random weights
    spread the rest of the mass as they will, so the mass stays below a trained model's.
    """
    hidden, weight = hidden_states(model, batch).float(), head(model).weight.float()
    scales = [1.15**step for step in range(40)]
    found = {scale: measured(hidden * scale, weight, rows=256) for scale in scales}
    best = min(scales, key=lambda scale: abs(found[scale][0] - CANDIDATES_PER_ROW) - 0.2 * found[scale][1])
    model.model.norm.weight.mul_(best)
    return found[best]
