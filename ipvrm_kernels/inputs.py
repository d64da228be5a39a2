"""What every public op takes: plain tensors, and numbers that may vary from call to call. The words of a
refusal stand here, once for all ops.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .torch_private import (
    forward_level,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    transform_level,
)

NO_TRANSFORM = (
    "torch.func transforms that differentiate (grad, vjp, jacrev, vmap of grad) are not supported; use "
    "torch.autograd.grad or .backward(), is_grads_batched=True for many upstream gradients"
)
NO_TENSORS: Mapping[str, Any] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def check_tensors(op: str, optional: Mapping[str, Any] = NO_TENSORS, /, **required: Any) -> None:
    """Raise unless all are tensors that the ops can compute with; those in `optional` may be None.

    Raises: ValueError for what is no tensor or a DTensor. RuntimeError where torch.func or forward mode would
    differentiate: the ops have reverse-mode formulas only, and PyTorch would take a missing one for 0.
    """
    for name, x in optional.items():
        if x is not None:
            required[name] = x
    for name, x in required.items():
        if type(x) not in _PLAIN:
            _refuse_type(op, name, x)
    if torch.compiler.is_compiling():
        return
    if transform_level() is not None and any(_is_tracked(x) for x in required.values()):
        raise RuntimeError(f"{op}: {NO_TRANSFORM}")
    if forward_level() >= 0:
        for x in required.values():
            if forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{op}: forward-mode differentiation (torch.func.jvp, dual tensors) is not supported; "
                    "use reverse mode, or plain PyTorch on materialised logits"
                )


def _refuse_type(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{op}: {name} must be a torch.Tensor, got {'None' if x is None else type(x).__name__}; "
            "torch.as_tensor converts arrays and lists"
        )
    if hasattr(x, "device_mesh"):
        raise ValueError(
            f"{op}: {name} must be a plain tensor, got a DTensor; of a vocabulary-parallel head pass "
            f"{name}.to_local() to vocab_parallel_logprobs or vocab_parallel_candidates; else unshard it: "
            f"gathered_weight(head) of a head under FSDP2, {name}.full_tensor() of anything else"
        )


def _is_tracked(x: Tensor) -> bool:
    """Whether a transform of torch.func differentiates with respect to x, at any level."""
    while is_functorch_wrapped_tensor(x):
        if is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = get_unwrapped(x)
    return False


def checked_number(op: str, name: str, value: float | Tensor) -> Any:
    """`value` as a float; in compiled code, whose graph a float would be a part of, as a 0-d fp64 tensor.

    Raises: ValueError unless it is a number or a 0-d fp32 or fp64 tensor on the CPU without gradient. Whether
    its value fits is for the op to check, which runs untraced.
    """
    if type(value) is float and not torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        if (
            value.dim() != 0
            or value.device.type != "cpu"
            or value.dtype not in (torch.float32, torch.float64)
            or value.requires_grad
        ):
            raise ValueError(
                f"{op}: {name} must be a number, or a 0-d fp32 or fp64 tensor on the CPU without gradient, "
                f"got shape {tuple(value.shape)}, {value.dtype}, {value.device}, requires_grad="
                f"{value.requires_grad}"
            )
        if torch.compiler.is_compiling() or type(value) not in _PLAIN:
            return value
        return value.item()
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64) * value  # of all ways the one in which it stays symbolic
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)
