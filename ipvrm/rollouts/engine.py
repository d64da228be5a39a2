"""What samples responses: an `Engine` turns prompts' token ids into generated token ids.

`TransformersEngine` does it with the library's `generate` and a KV cache. Each response has a seed of its
own, and its tokens are drawn by inverting the cumulative distribution at numbers that depend on that seed and
the position alone. So a response does not depend on what else is in its batch or on the order of the batches,
up to the rounding of the forward pass, whose sums depend on the shape of the batch.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ipvrm.data.batches import length_sorted_microbatches
from ipvrm.data.chat import end_of_turn_id
from ipvrm.errors import IpvrmError, reading
from ipvrm.models.causal_lm import load_config, local_folder
from ipvrm.models.folder import AGAIN


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; top_p 1 and top_k 0 leave all tokens in."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise IpvrmError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise IpvrmError(f"temperature must be finite and not negative; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise IpvrmError(f"top_p must lie in (0, 1]; got {self.top_p}")
        if self.top_k < 0:
            raise IpvrmError(f"top_k must not be negative (0: no limit); got {self.top_k}")


class Engine(Protocol):
    """What generates. One response per prompt: for n of a prompt it is given n times, with n seeds."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Generated token ids behind each prompt's; the last is a stop token unless it was cut off."""


class TransformersEngine:
    """`generate` of a causal LM, in batches of prompts of similar length, padded on the left.

    The model is put in eval mode for the call. Its own generation config is not used: sampling is what
    `Sampling` says. Adapters that live inside the model's layers (LoRA) take part.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        stop_ids: tokens that end a response.
        batch_size: most responses generated at a time.
    """

    def __init__(self, model: nn.Module, stop_ids: Iterable[int], batch_size: int = 64):
        if batch_size < 1:
            raise IpvrmError(f"batch_size must be at least 1; got {batch_size}")
        self.model: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        self.stop_ids = frozenset(stop_ids)
        self.batch_size = batch_size

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Raises IpvrmError for a prompt without tokens and for a model whose logits are not numbers."""
        if any(not prompt for prompt in prompts) or len(prompts) != len(seeds):
            raise IpvrmError("rollout: every prompt needs at least one token, and a seed")
        found: list[list[int]] = [[] for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        with _own_settings(self.model):
            for indices in length_sorted_microbatches(lengths, max_rows=self.batch_size):
                batch = [prompts[i] for i in indices]
                generated = self._generate(batch, sampling, [seeds[i] for i in indices])
                for index, ids in zip(indices, generated.tolist(), strict=True):
                    found[index] = cut(ids, self.stop_ids)
        return found

    def _generate(self, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int]) -> Tensor:
        """(B, new tokens) int64; behind a row's stop token lies padding."""
        from transformers import GenerationConfig
        from transformers.generation import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        device = self.model.get_input_embeddings().weight.device
        width = max(map(len, prompts))
        pad = min(self.stop_ids)  # masked on the left, cut off on the right
        padded = [[pad] * (width - len(p)) + list(p) for p in prompts]
        input_ids = torch.tensor(padded, device=device)  # (B, T)
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]  # (B, T)
        processors = LogitsProcessorList()
        draw = None
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            draw = _Draw(seeds, sampling.max_new_tokens, width, device)
            processors.append(draw)
        settings = GenerationConfig(
            do_sample=False,  # `draw` has already left one token
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=pad,
            use_cache=True,
        )
        output = self.model.generate(
            input_ids, attention_mask=mask.long(), generation_config=settings, logits_processor=processors
        )
        if draw is not None and not bool(draw.finite):
            raise IpvrmError(
                f"{type(self.model).__name__}: its logits are not numbers (NaN); nothing to sample"
            )
        return cast(Tensor, output[:, width:])


class _Draw:
    """Logits processor: leaves each row the one token that its own random number picks.

    The number is a multiple of 2^-24 below 1, so its product with the last entry of the fp32 cumulative
    distribution (about 1) rounds to less than that entry: a token of probability 0 is never picked.
    """

    def __init__(self, seeds: Sequence[int], max_new_tokens: int, width: int, device: torch.device):
        raw = np.stack([np.random.PCG64(seed).random_raw(max_new_tokens) >> 40 for seed in seeds])
        numbers = (raw.T * 2.0**-24).astype(np.float32)
        self.numbers = torch.from_numpy(numbers).to(device)  # (max_new_tokens, B)
        self.width = width
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.softmax(-1).cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]  # (B, 1)
        self.finite &= total.isfinite().all()  # looked at when all is generated: no device sync per token
        picked = torch.searchsorted(
            cumulative, self.numbers[input_ids.shape[1] - self.width, :, None] * total, right=True
        )
        picked.clamp_(max=scores.shape[1] - 1)  # of NaN rows
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Eval mode, and an empty generation config: `generate` fills in what a call leaves out from the
    model's, a repetition penalty for example."""
    from transformers import GenerationConfig

    training, stored = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
        model.train(training)


def cut(ids: Sequence[int], stops: Container[int]) -> list[int]:
    """`ids` up to the first stop token and with it; all of them where there is none."""
    stop = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[: stop + 1])


def stop_ids(model: nn.Module | str, tokenizer: Any) -> set[int]:
    """Tokens that end a response: the chat template's end of turn and what the model's generation config
    and tokenizer name; `model` may be a folder or Hub name, of which no weights are loaded."""
    ids = {end_of_turn_id(tokenizer)}
    stored = (
        _generation_config(model) if isinstance(model, str) else getattr(model, "generation_config", None)
    )
    for named in (stored, tokenizer):
        value = getattr(named, "eos_token_id", None)
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return {int(i) for i in ids}


def _generation_config(name: str) -> Any:
    """What a loaded model has as `generation_config`."""
    from transformers import GenerationConfig

    folder = local_folder(name)
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(load_config(folder))
    with reading(path, "not a readable generation config", AGAIN):
        return GenerationConfig.from_pretrained(folder)


def response_seed(seed: int, row: int, sample: int) -> int:
    """The seed of one response: a function of the run's, the prompt's row and the sample's number."""
    return int(np.random.SeedSequence([seed, row, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))
