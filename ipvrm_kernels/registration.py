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
_TENSORS = (torch.Tensor, torch.nn.Parameter)  # plain ones; their subclasses have a say of their own
_tracing_state = torch._C._get_tracing_state
_transform_level = torch._C._functorch.maybe_current_level
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_dispatch_keys = torch._C._dispatch_keys
_below_autograd = torch._C._AutoDispatchBelowAutograd  # what torch.library's own formula enters


def _plain_keys() -> set[int]:
    """Key sets of tensors that nothing but autograd and autocast takes an interest in: not batched, lazily
    negated, zero, functional or meta. The second of a device is of tensors made in inference mode."""
    of, keys = torch._C.DispatchKeySet, torch._C.DispatchKey
    found = set()
    for device in ("CPU", "CUDA"):
        inference = of(getattr(keys, device)) | of(getattr(keys, f"Autocast{device}"))
        found.add((inference | of(keys.ADInplaceOrView) | of(getattr(keys, f"Autograd{device}"))).raw_repr())
        found.add(inference.raw_repr())
    return found


_PLAIN_KEYS = _plain_keys()


def register(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `function` as torch.ops.ipvrm.<its name without the underscore>; returns what to call.

    That is the op, or where only autograd would see the call, `function` under an autograd.Function, and
    profilers do not show the op's name then.
    function: its annotations are the op's schema; no defaults, returns new tensors, mutates nothing.
    fake: the same signature, empty outputs. backward(ctx, *grads), setup_context(ctx, inputs, output): as for
    an autograd.Function.
    """
    name = function.__name__.removeprefix("_")
    _LIBRARY.define(
        name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
    )
    op: Callable[..., Any] = getattr(torch.ops.ipvrm, name).default

    def differentiable(run: Callable[..., Any]) -> type[torch.autograd.Function]:
        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = run(*inputs)
                if setup_context is not None:
                    setup_context(ctx, inputs, output)
                return output

        Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
        return Differentiable

    def below_autograd(*inputs: Any) -> Any:
        with _below_autograd():
            return op(*inputs)

    dispatched, direct = differentiable(below_autograd), differentiable(function)

    def autograd_kernel(*inputs: Any) -> Any:
        tensors = (x for x in inputs if isinstance(x, torch.Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return dispatched.apply(*inputs)
        return below_autograd(*inputs)

    def call(*inputs: Any) -> Any:
        if not _only_autograd():
            return op(*inputs)
        requires_grad = False
        for x in inputs:
            if isinstance(x, torch.Tensor):
                if type(x) not in _TENSORS or _dispatch_keys(x).raw_repr() not in _PLAIN_KEYS:
                    return op(*inputs)
                requires_grad |= x.requires_grad
        return direct.apply(*inputs) if requires_grad and torch.is_grad_enabled() else function(*inputs)

    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd_kernel, "Autograd")
    torch.library.register_fake(f"ipvrm::{name}", fake, lib=_LIBRARY)
    return call


def _only_autograd() -> bool:
    """Whether nothing but autograd comes between a plain tensor and an op: no tracing, mode or transform."""
    return not (
        torch.compiler.is_compiling()
        or _tracing_state() is not None
        or _transform_level() is not None
        or _num_dispatch_modes()
        or _num_function_modes()
    )


def is_last_backward(*tensors: torch.Tensor) -> bool:
    """Whether this backward call's graph is freed after it, with nothing tracing or differentiating it."""
    plain = all(type(x) is torch.Tensor for x in tensors)  # not fake or functional
    traced = torch.compiler.is_compiling() or not plain
    transformed = _transform_level() is not None  # torch.func: may come back here
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph, create_graph's default too
    return not traced and not transformed and not kept and not torch.is_grad_enabled()  # create_graph


def is_batched(x: torch.Tensor) -> bool:
    """Whether x stands for several: under torch.func.vmap, or in the older form behind is_grads_batched."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)
