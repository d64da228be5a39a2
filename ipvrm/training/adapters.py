"""LoRA adapters of a model in training, and what is saved of them: the merged model, the adapter beside it.

The merged model is what every other command reads; the adapter is what a resumed run goes on with, on the
starting weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipvrm.errors import IpvrmError
from ipvrm.models.causal_lm import disable_dropout, head, load_model, save_model
from ipvrm.training.flags import filled

ADAPTER = "adapter"
ALL_LINEAR = ("all-linear",)


def add_adapters(
    model: nn.Module,
    r: int,
    *,
    alpha: float,
    target_modules: Sequence[str] = ALL_LINEAR,
    saved: Path | None = None,
) -> nn.Module:
    """`model` with LoRA adapters of rank `r`, which alone are trainable and do nothing yet.

    Args:
        alpha: the adapters' output is scaled by alpha / r.
        target_modules: names of the layers that get one; `all-linear` is every one but the head.
        saved: what `save_trained` wrote of them, to go on with; the other settings are read there.

    Raises:
        IpvrmError: no such layers, an adapter on the head, or none in `saved`.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if saved is not None:
        weights = saved / ADAPTER / "adapter_model.safetensors"
        if not weights.is_file():  # PEFT would look for a pickle
            raise IpvrmError(f"{weights}: no such file; copy the checkpoint again")
        return cast(nn.Module, PeftModel.from_pretrained(model, saved / ADAPTER, is_trainable=True))
    names = tuple(target_modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        target_modules=names[0] if names == ALL_LINEAR else list(names),
    )
    try:
        adapted = get_peft_model(cast(Any, model), settings)
    except ValueError as error:
        raise IpvrmError(f"--lora_target_modules {' '.join(names)}: {error}") from error
    head(adapted)  # refuses an adapter there
    return cast(nn.Module, adapted)


def recompute_activations(model: nn.Module) -> None:
    """Turns gradient checkpointing on, in the form that adapters on a frozen model need: of a reentrant one,
    the default before transformers 5, no gradient comes back."""
    cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is one that `add_adapters` returned."""
    return hasattr(model, "merge_and_unload")


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes a model folder; of a model with adapters the merged weights, and the adapters in ADAPTER."""
    save_merged(model, folder)
    if has_adapters(model):
        save_model(model, folder / ADAPTER)


def save_merged(model: nn.Module, folder: Path) -> None:
    """Writes a model folder; of a model with adapters the merged weights."""
    whole = cast(Any, copy.deepcopy(model)).merge_and_unload() if has_adapters(model) else model
    save_model(whole, folder)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of what is trained of `model`: all of it, or its adapters."""
    named = model.named_parameters()
    return {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` has these weights inside (`trained_weights`), and its own again afterwards, to the bit."""
    own = trained_weights(model)
    _set(model, weights)
    try:
        yield
    finally:
        _set(model, own)


@torch.no_grad()
def _set(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def adapter_entries(base: str | Path, base_hash: str, r: int, alpha: float | None) -> dict[str, Any] | None:
    """What `ipvrm_config.json` says of an adapter on the weights of `base`; None for rank 0."""
    if not r:
        return None
    return {"folder": ADAPTER, "lora_r": r, "lora_alpha": alpha, "base": str(base), "base_hash": base_hash}


def model_in_training(config: Any, resumed: Path | None, note: Callable[[str], None]) -> nn.Module:
    """The fp32 model that a run of train-rm or train-policy starts from, or goes on with.

    Without dropout, under LoRA with its adapters, in training mode; torch's generators are seeded before
    anything random is made.

    Args:
        config: complete. resumed: the checkpoint. note: says on the screen what will be saved.

    Raises:
        IpvrmError: as `add_adapters`.
    """
    # under LoRA a checkpoint's weights are merged ones; its adapters belong on the starting weights
    model = load_model(config.model if resumed is None or config.lora_r else resumed, torch.float32)
    torch.manual_seed(filled(config.seed))
    disable_dropout(model)
    if config.lora_r:
        note(
            f"LoRA of rank {config.lora_r} on {config.model}: saved are the merged weights, which every "
            f"command reads, and the adapter alone in {ADAPTER}/"
        )
        alpha, names = filled(config.lora_alpha), config.lora_target_modules
        model = add_adapters(model, config.lora_r, alpha=alpha, target_modules=names, saved=resumed)
    if config.gradient_checkpointing:
        recompute_activations(model)
    model.train()
    return model
