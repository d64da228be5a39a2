"""gathered_weight: the whole weight of a vocabulary head that FSDP2 (`fully_shard`) has sharded, with its
gradient.

Inside the forward of the unit that holds a head its weight is an ordinary tensor, since FSDP2 gathers a
unit's parameters before its forward: so it is for a head in the root group. A head that is a unit of its own
is gathered around its own forward alone, which an op on (hidden, weight) never calls; outside it the weight
is a DTensor, a shard of the rows. `DTensor.full_tensor()` gathers it, but its backward takes the gradient
for the same on every rank and keeps one rank's; data-parallel ranks hold different rows of the batch, and
FSDP2 gives every parameter the average over them. That average is what this backward takes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import is_available

OP = "gathered_weight"


def gathered_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (V, D), bias (V,) or None) of a head, whole on every rank, for the ops that take them.

    Plain parameters are returned as they are. All ranks of the head's mesh must call it alike, and run the
    backward alike; the gradient that reaches the sharded parameter is averaged over the ranks, as FSDP2's own
    are, once for every backward: `set_requires_gradient_sync(False)` does not defer it, nor
    `set_gradient_divide_factor` change it. The gathered weight lives as long as the graph that holds it:
    until the backward of `linear_logprobs`, which forms the logits again, and of `linear_distrl_loss`, which
    does not read it. A tied head is sharded together with its embedding (`fully_shard([embedding, head])`),
    not alone: a parameter belongs to one unit.

    Args:
        module: the head (`model.get_output_embeddings()`), with `weight` and perhaps `bias`.

    Raises:
        ValueError: the weight is a DTensor, but `module` is no FSDP2 unit (`fully_shard(module)`): a
            tensor-parallel shard, whose ranks hold the same rows of the batch, or a parameter of an outer
            unit outside its forward.
    """
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return _whole(module, weight), None if bias is None else _whole(module, bias)


def _whole(module: nn.Module, parameter: Tensor) -> Tensor:
    if not is_available():
        return parameter
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    if not isinstance(module, FSDPModule):
        raise ValueError(
            f"{OP}: a DTensor must belong to an FSDP2 unit of its own (fully_shard(head)), got "
            f"{type(module).__name__} with placements {parameter.placements}; inside the forward of the "
            "unit that holds it the weight is whole, and a tensor-parallel head belongs to "
            "vocab_parallel_logprobs"
        )
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
