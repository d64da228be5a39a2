"""One reward-model training step, end to end: model forward, IPVRM loss, backward, at 8 x 2048 (GPU) or
8 x 256 (CPU) tokens.

Before: the model's own full logits, `log_softmax`, padded Eq. 9 in eager PyTorch, as reward-model trainers
write it. As released: the same with log_softmax over 64 rows at a time, which keeps every slice for the
backward. After: what `ipvrm train-rm` runs. The yardstick is the first; MiB are above weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, assert_close
from ipvrm.data import Response, collate
from ipvrm.model import response_logprobs
from ipvrm.objectives import ipvrm_loss

OP = "reward_step"
PROMPT = 16  # tokens of every prompt
SLICE = 64


def qwen3(device: str, quick: bool) -> Any:
    """Random weights: Qwen3-0.6B's architecture on a GPU (bf16), four layers of half its width on a CPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip
    if quick:
        sizes |= dict(vocab_size=8192, hidden_size=256, intermediate_size=768)
    if device == "cuda":
        sizes = dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, use_cache=False, **sizes))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).train()


def cases(device: str, quick: bool) -> Iterator[Case]:
    model = qwen3(device, quick)
    B, T = (8, 2048) if device == "cuda" else (8, 256)
    lengths = torch.linspace(T // 4, T, B).long().tolist()  # of prompt and response; ragged, as rollouts are
    vocabulary = model.config.vocab_size
    rows = [
        Response(tuple(torch.randint(3, vocabulary, (n,)).tolist()), PROMPT, b % 2)
        for b, n in enumerate(lengths)
    ]
    batch = collate(rows).to(device)
    N = len(batch.token_ids)
    reference = response_logprobs(model, batch).detach() + 0.02 * torch.randn(N, device=device)
    parameters = list(model.parameters())
    width = batch.input_ids.shape[1]
    mask = torch.zeros(B, width, device=device)
    mask.view(-1)[batch.positions] = 1
    padded = torch.zeros(B, width, device=device)
    padded.view(-1)[batch.positions] = reference

    def before(slice_rows: int | None) -> tuple[Tensor, ...]:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
        targets = batch.input_ids[:, 1:].reshape(-1, 1)
        flat = logits.reshape(-1, vocabulary)
        size = slice_rows or len(flat)
        parts = zip(flat.split(size), targets.split(size), strict=True)
        logprobs = torch.cat([F.log_softmax(z, 1).gather(1, t) for z, t in parts]).view(B, -1)
        keep = mask[:, :-1]
        mean = 10.0 * ((logprobs - padded[:, :-1]) * keep).cumsum(1) / keep.cumsum(1).clamp(min=1)
        per_token = F.softplus(5.0 - (2 * batch.outcome - 1)[:, None] * mean) * keep
        loss = (per_token.sum(1) / keep.sum(1)).mean()
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def after() -> tuple[Tensor, ...]:
        log_ratio = response_logprobs(model, batch) - reference
        loss, _ = ipvrm_loss(log_ratio, batch.cu_seqlens, batch.outcome)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def check(results: Mapping[str, Any]) -> None:
        for name, (loss, *gradients) in results.items():
            expected, *others = results["full logits, eager"]
            assert_close(f"{name} loss", loss, expected, 1e-2 if device == "cuda" else 1e-5)
            if device != "cuda":  # bf16 logits of the eager paths are the less accurate ones
                for mine, theirs in zip(gradients, others, strict=True):
                    assert_close(f"{name} gradient", mine, theirs, 1e-3)

    contenders = {
        "full logits, eager": lambda: before(None),
        "full logits, 64-row slices": lambda: before(SLICE),
        "ipvrm": after,
    }
    layers, D = model.config.num_hidden_layers, model.config.hidden_size
    shape = f"{B} sequences, {N} response tokens, {layers} layers D={D} V={vocabulary}"
    yield Case(OP, shape, contenders, check)
