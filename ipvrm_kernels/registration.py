"""register: a torch.library op, at a fraction of what `torch.library.custom_op` costs per call.

The sequence ops are small enough for dispatch to be most of their time. Forward and backward of a 64-token
`prefix_value_loss` on the CPU, torch 2.13: 270 us by the decorator, 174 us through `Library.define`
with `torch.library.register_autograd`, 131 us like this. The decorator adds a check on every call that
no output shares memory with an input or another output: functions registered here must see to it.
`register_autograd` adds a generic autograd.Function; here it is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ipvrm", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd  # what torch.library's own formula enters


def register(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `function` as torch.ops.ipvrm.<its name without the underscore> and return that op.

    function: its annotations are the op's schema; no defaults, returns new tensors, mutates nothing.
    fake: the same signature, empty outputs. backward(ctx, *grads), setup_context(ctx, inputs, output): as for
    an autograd.Function.
    """
    name = function.__name__.removeprefix("_")
    _LIBRARY.define(
        name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
    )
    op: Callable[..., Any] = getattr(torch.ops.ipvrm, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with _below_autograd():
                output = op(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)
        with _below_autograd():
            return op(*inputs)

    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"ipvrm::{name}", fake, lib=_LIBRARY)
    return op


def is_last_backward(*tensors: torch.Tensor) -> bool:
    """Whether this call's graph is freed after this backward, with nothing tracing or differentiating it."""
    plain = all(type(x) is torch.Tensor for x in tensors)  # not fake or functional
    traced = torch.compiler.is_compiling() or not plain
    transformed = torch._C._functorch.maybe_current_level() is not None  # torch.func: may come back here
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph or create_graph
    return not traced and not transformed and not kept


def is_batched(x: torch.Tensor) -> bool:
    """Whether x stands for several: under torch.func.vmap, or in the older form behind is_grads_batched."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)
