"""FSDP2 of a training script: weights, gradients and Adam's moments of a model lie in shards on all ranks.

`fully_shard` of torch, on the layers one by one and on the rest (embeddings, last norm, head) as the root,
whose parameters are whole for the length of its forward; so the head needs no gathering of its own. The same
code runs on GPUs and, for its tests, on CPU processes: accelerate's FSDP flag is for GPUs alone, and on CPUs
silently runs DDP.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ipvrm.errors import IpvrmError


def fully_sharded(module: nn.Module, accelerator: Any) -> nn.Module:
    """Shards `module`, which holds a Hugging Face causal LM in `.model`, in place over all ranks; returns it.

    Raises:
        IpvrmError: a single process, or a model whose layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if accelerator.num_processes == 1:
        raise IpvrmError(
            "--fsdp shards a model over several processes; start them with `accelerate launch` or torchrun"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = cast(Any, module).model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    layers = [m for m in base.modules() if type(m).__name__ in names]
    if not layers:
        raise IpvrmError(
            f"--fsdp: the layers of {type(base).__name__} are not known (_no_split_modules is empty)"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """All weights on the main rank's CPU, {} on the others; all ranks take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)
