"""Causal language models: hidden states, head, log-probabilities, fingerprints.

The transformer body runs on right-padded sequences; only the states that predict response tokens reach the
head, packed (N, D), through `ipvrm_kernels.linear_logprobs`. The body runs without an attention mask: under
a causal model real tokens never see the padding behind them, so the states at `Batch.positions` are the same
and the attention kernels faster.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch
from ipvrm.errors import IpvrmError, reading
from ipvrm.models.folder import AGAIN, WEIGHTS, local_folder, refuse_adapter, weight_files, weights_hash

__all__ = [
    "CandidateLogprobs",
    "Head",
    "ResponseLogprobs",
    "candidate_logprobs",
    "check_head",
    "disable_dropout",
    "fewest_devices",
    "head",
    "head_module",
    "hidden_states",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "least_positions",
    "max_positions",
    "memory_estimate",
    "relative_to",
    "response_logprobs",
    "save_model",
    "template_hash",
    "vocab_size",
    "weights_hash",
]

# Config entries that scale the logits, with the power in which they enter. Granite divides by
# `logits_scaling` and HyperCLOVA X multiplies by it, so `check_head` compares with the model's own logits.
LOGIT_SCALES = {"logit_scale": 1, "logits_scaling": -1, "output_multiplier": 1, "lm_head_multiplier": 1}
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
# A config may name code in its own folder or on the Hub. None of it is run, and nobody is asked on stdin.
SAFE = {"trust_remote_code": False}
NO_CODE = f"{AGAIN}; where it needs Python code of its own (auto_map), ipvrm does not run it"
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
VALUE_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "RewardModel")


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)); `weight` (V, D), `bias` (V,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def transform(self) -> dict[str, Any]:
        """Keyword arguments of the head ops besides `weight`."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def load_model(
    name: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    *,
    attn_implementation: str | None = None,
) -> nn.Module:
    """A causal language model from a folder or Hub name, safetensors only, in eval mode, its head checked.

    Args:
        dtype: of the weights; "auto" keeps the stored one.

    Raises:
        IpvrmError: not a causal LM, no safetensors weights, or a head that `check_head` refuses.
    """
    from transformers import AutoModelForCausalLM

    folder = local_folder(name)
    config = load_config(folder)
    for architecture in config.architectures or []:
        if architecture.endswith(VALUE_HEADS):
            raise IpvrmError(
                f"{name}: {architecture} has a value head and no vocabulary head; the objectives ipvrm, "
                "implicit_prm and dpo are defined on log-probabilities, and q_rm makes a head of its own, so "
                "start from a causal LM"
            )
    weight_files(folder)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with reading(name, "transformers cannot load it as a causal LM", AGAIN), _no_progress_bars():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, **SAFE, **options
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise IpvrmError(
            f"{name}: {len(missing)} weights are missing and would be random, the first is {missing[0]}; "
            "is this the folder of a causal LM?"
        )
    if device is not None:
        model.to(device)
    model.eval()
    check_head(model)
    return cast(nn.Module, model)


def load_config(name: str | Path) -> Any:
    """The transformers config of a model folder or Hub name.

    Raises:
        IpvrmError: none that can be read, or one that wants code or weights from elsewhere.
    """
    from transformers import AutoConfig

    folder = local_folder(name)
    refuse_adapter(folder)
    with reading(folder / "config.json", "not a readable model config", AGAIN):
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        raise IpvrmError(f"{folder / 'config.json'}: must hold an object; {AGAIN}")
    for entry, value in _entries(stored):
        if entry == "transformers_weights" or (entry in ATTENTION and "/" in str(value)):
            raise IpvrmError(
                f"{folder / 'config.json'}: {entry} names {value!r}; weights are read from {WEIGHTS} or the "
                "shards of its index alone, and kernels of the Hub are never run. Take the entry out"
            )
    with reading(folder / "config.json", "transformers cannot read the model config", NO_CODE):
        return AutoConfig.from_pretrained(folder, **SAFE)


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry of a config, those of its parts too."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _entries(value)


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Writes a model folder, safetensors only."""
    with _no_progress_bars():
        cast(Any, model).save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences transformers' bars for loading and writing shards, which would tear ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder or Hub name.

    Raises:
        IpvrmError: there is none, or it has ids for which the model beside it has no embedding.
    """
    from transformers import AutoTokenizer

    folder = local_folder(name)
    rows = vocab_size(folder)
    with reading(name, "no tokenizer can be loaded", NO_CODE):
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise IpvrmError(
            f"{name}: the tokenizer has ids up to {largest} ({token!r}), the model {rows} rows; resize the "
            "embeddings (model.resize_token_embeddings) or take the model's own tokenizer"
        )
    return tokenizer


def vocab_size(model: str | Path) -> int:
    """How many token ids the model of a folder or Hub name has: rows of its embeddings and of its head."""
    return int(load_config(model).get_text_config().vocab_size)


def max_positions(model: nn.Module | str | Path) -> int | None:
    """How many positions a model has, as its config says (with YaRN, what it stretches them to); None where
    it names no limit."""
    if isinstance(model, str | Path):
        config = load_config(model).get_text_config()
    else:
        config = cast(Any, model).config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if stated is None or not factor or not original:
        return stated
    return max(int(stated), int(factor * original))


def least_positions(*models: nn.Module | str | Path | int | None) -> int | None:
    """The fewest positions of models that read the same tokens (`max_positions`), or of limits already known;
    None where none names one."""
    limits = (m if m is None or isinstance(m, int) else max_positions(m) for m in models)
    return min((n for n in limits if n is not None), default=None)


def transformer_body(model: Any) -> Callable[..., Any]:
    """The transformer without its head, called as the model is.

    Raises:
        IpvrmError: it is not told from the model.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    body = decoder if decoder is not None and decoder is not model else model.base_model
    if body is model:
        raise IpvrmError(f"{type(model).__name__}: its transformer body cannot be told from its head")
    return cast(Callable[..., Any], body)


def hidden_states(model: nn.Module, batch: Batch, positions: Tensor | None = None) -> Tensor:
    """(N, D): the final hidden state that predicts each response token of `batch`. The head is not called.

    Args:
        positions: int64, other places in the flattened (B * T).
    """
    states = transformer_body(model)(
        input_ids=batch.input_ids, use_cache=False
    ).last_hidden_state  # (B, T, D)
    return states.flatten(0, 1).index_select(0, batch.positions if positions is None else positions)


def head_module(model: nn.Module) -> Any:
    """The vocabulary head of a causal LM, whose logits are a matmul with its floating-point `weight`.

    Raises:
        IpvrmError: there is none, or an adapter on it, or a weight that is quantised.
    """
    module = cast(Any, model).get_output_embeddings()
    name = type(model).__name__
    if module is None:
        raise IpvrmError(f"{name}: no vocabulary head; it must be a causal LM")
    if hasattr(module, "base_layer") or hasattr(module, "lora_A") or hasattr(module, "modules_to_save"):
        raise IpvrmError(
            f"{name}: the head carries an adapter ({type(module).__name__}), which a matmul with its "
            "weight would ignore; merge it (model.merge_and_unload()) or leave the head out of target_modules"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise IpvrmError(
            f"{name}: the head ({type(module).__name__}) has no floating-point weight; "
            "a quantised head is not supported"
        )
    return module


def head(model: nn.Module) -> Head:
    """The vocabulary head of a causal LM, tied or not, with its logit transform.

    Raises:
        IpvrmError: an adapter on the head, or a weight that is quantised, sharded (DTensor) or empty (meta,
            ZeRO-3).
    """
    module, name = head_module(model), type(model).__name__
    weight, bias = module.weight, getattr(module, "bias", None)
    if type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor":
        raise IpvrmError(
            f"{name}: the head's weight is sharded (DTensor); gather it first "
            "or leave the head out of the sharding plan"
        )
    if weight.is_meta or weight.numel() == 0 or weight.ndim != 2:
        raise IpvrmError(
            f"{name}: the head's weight is empty here ({tuple(weight.shape)} on {weight.device}); "
            "gather it first (deepspeed.zero.GatheredParameters, or load without device_map='meta')"
        )
    config = cast(Any, model).config.get_text_config()
    scale = 1.0
    for entry, power in LOGIT_SCALES.items():
        value = getattr(config, entry, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            multiplies = entry == "logits_scaling" and config.model_type.startswith(
                MULTIPLIES_BY_LOGITS_SCALING
            )
            scale *= float(value) ** (1 if multiplies else power)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, scale, float(softcap) if softcap else None)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compares `head` with the model's own logits on two tokens: an unknown logit transform is refused.

    Raises:
        IpvrmError: the two differ, or any reason of `head`.
    """
    parts = head(model)
    config = cast(Any, model).config.get_text_config()
    ids = torch.tensor([[1 % config.vocab_size, 2 % config.vocab_size]], device=parts.weight.device)
    own = cast(Any, model)(input_ids=ids, use_cache=False).logits[0].float()  # (2, V)
    if not bool(own.isfinite().all()):
        raise IpvrmError(f"{type(model).__name__}: its logits are not numbers; the weights are damaged")
    states = transformer_body(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = nn.functional.linear(states, parts.weight, parts.bias).float() * parts.logit_scale  # (2, V)
    if parts.softcap is not None:
        ours = parts.softcap * torch.tanh(ours / parts.softcap)
    allowed = 0.02 if parts.weight.dtype != torch.float32 else 1e-4  # logits of bf16 models come back in bf16
    if own.shape != ours.shape or not torch.allclose(
        own, ours, rtol=allowed, atol=allowed * float(own.abs().max())
    ):
        raise IpvrmError(
            f"{type(model).__name__}: its logits are not softcap(scale * (hidden @ head.T + bias)) "
            f"with scale {parts.logit_scale:g} and softcap {parts.softcap}; "
            "it transforms them in a way that ipvrm does not know"
        )


def response_logprobs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(N,) fp32: log pi(y_t | x, y_<t) of every response token at `temperature`, packed as in `batch`."""
    from ipvrm_kernels import linear_logprobs

    parts = head(model)
    result = linear_logprobs(
        hidden_states(model, batch),
        parts.weight,
        batch.token_ids,
        temperature=temperature,
        **parts.transform(),
    )
    return result.logprobs


class CandidateLogprobs(NamedTuple):
    """Of N response tokens, and of K others in the place of each; fp32."""

    logprobs: Tensor  # (N,)
    ids: Tensor  # (N, K) int64, -1 at an unused slot
    candidate_logprobs: Tensor  # (N, K), -inf there


def candidate_logprobs(
    model: nn.Module, batch: Batch, wanted: float | Tensor, temperature: float = 1.0
) -> CandidateLogprobs:
    """`response_logprobs`, and from the same forward those of other tokens in the place of each.

    Args:
        wanted: either all with p >= this under the model, best first; or their ids (N, K) int64, -1 for none.
    """
    from ipvrm_kernels import linear_candidates, linear_logprobs

    parts = head(model)
    states = hidden_states(model, batch)
    options = {"temperature": temperature, **parts.transform()}
    if isinstance(wanted, Tensor):
        ids = torch.cat([batch.token_ids[:, None], wanted], 1)  # (N, 1 + K)
        logprobs = linear_logprobs(states, parts.weight, ids, **options).logprobs  # (N, 1 + K)
        return CandidateLogprobs(logprobs[:, 0], wanted, logprobs[:, 1:])
    found = linear_candidates(states, parts.weight, min_prob=wanted, sampled=batch.token_ids, **options)
    assert found.sampled_logprobs is not None
    return CandidateLogprobs(found.sampled_logprobs, found.ids, found.logprobs)


class ResponseLogprobs(nn.Module):
    """`response_logprobs` as a module: a distributed wrapper sees body and head in one forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        return response_logprobs(self.model, batch, temperature)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of the modules to 0: dropout would make the log-ratios noise."""
    for module in model.modules():
        for name in ("p",) if isinstance(module, nn.Dropout) else ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def memory_estimate(
    name: str | Path,
    *,
    rows: int,
    length: int,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    lora_r: int = 0,
    shards: int = 1,
) -> dict[str, int]:
    """Rough bytes per device that training takes, without loading any weights.

    They are fp32 weights, gradients and Adam's two moments of what is trained (all, or adapters of rank
    `lora_r` on the linear layers), and the activations of a micro-batch of `rows` sequences of `length`
    tokens. Under FSDP2 over `shards` devices the former are divided by them, and what is whole for a time is
    added: weights and gradients of embeddings, head and two layers, in the dtype of the forward.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **SAFE)
    parameters = trained = sum(p.numel() for p in model.parameters())
    if lora_r:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        own = model.get_output_embeddings()
        trained = sum(lora_r * (m.in_features + m.out_features) for m in layers if m is not own)
        parameters += trained
    text = config.get_text_config()
    width = 2 if mixed_precision == "bf16" else 4
    kept = 1 if gradient_checkpointing else 16  # hidden-sized tensors per layer that wait for the backward
    activations = rows * length * text.num_hidden_layers * text.hidden_size * width * kept
    states, gathered = 4 * parameters + 12 * trained, 0
    if shards > 1:
        ends = {m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        outside = sum(p.numel() for p in ends)
        layer = (parameters - outside) // text.num_hidden_layers
        states, gathered = -(-states // shards), 2 * width * (outside + 2 * layer)
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "weights_gradients_adam_bytes": states,
        "gathered_bytes": gathered,
        "activation_bytes": activations,
        "total_bytes": states + gathered + activations,
    }


def fewest_devices(one: dict[str, int], two: dict[str, int], device_bytes: float) -> int | None:
    """Fewest devices of `device_bytes` over which training fits, None where no number helps.

    Args:
        one, two: `memory_estimate` of a run with 1 and with 2 shards.

    A tenth of a device is left to CUDA, to buffers of communication and to what the allocator cannot use.
    """
    available = 0.9 * device_bytes
    if one["total_bytes"] <= available:
        return 1
    available -= two["gathered_bytes"] + two["activation_bytes"]
    return None if available <= 0 else math.ceil(one["weights_gradients_adam_bytes"] / available)


# -------------------------------------------------------------------------------------------- fingerprints


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template (of the empty text where there is none)."""
    template = tokenizer.chat_template or ""
    if not isinstance(template, str):  # several named templates
        template = json.dumps(template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()


def relative_to(path: str | Path, folder: str | Path) -> str:
    """`path` as seen from `folder`, so that both can move together."""
    return os.path.relpath(Path(path).resolve(), Path(folder).resolve()).replace(os.sep, "/")
