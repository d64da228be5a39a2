"""register: a torch.library op whose rules get its inputs by name, cheap to call.

The sequence ops are small enough for dispatch to be most of their time. Forward and backward of a 64-token
`segment_scan` on the CPU, torch 2.13, side by side: by `torch.library.custom_op` 1, through `Library.define`
with `torch.library.register_autograd` 0.87, like this 0.59 (467, 408 and 278 us of a core of a busy machine,
273, 238 and 146 at best). custom_op adds a check on every
call that no output shares memory with an input or another output: functions registered here must see to it.
`register_autograd` adds a generic autograd.Function; here it is written out.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import NATIVE_DEVICE, is_reference, trusts_edges
from .inputs import NO_TRANSFORM
from .torch_private import (
    BelowAutograd,
    DispatchKey,
    DispatchKeySet,
    dispatch_keys,
    is_batchedtensor,
    is_legacy_batchedtensor,
    num_dispatch_modes,
    num_function_modes,
    retains_graph,
    tracing_state,
    transform_level,
)

_LIBRARY = torch.library.Library("ipvrm", "FRAGMENT")
_TENSORS = (Tensor, torch.nn.Parameter)  # plain ones; their subclasses have a say of their own
MOST_LISTED = 3  # tensors in a list input
Number = Annotated[float, "or a 0-d tensor on the CPU: a value that varies, and that no graph holds"]
_NUMBERS = (Number, Number | None)
_NUMBER_TYPES = frozenset((float, int, type(None)))  # isinstance(1.0, Tensor) costs three times this lookup


def _plain_keys() -> set[int]:
    """Key sets of tensors that nothing but autograd and autocast takes an interest in: not batched, lazily
    negated, zero, functional or meta. The second of a device is of tensors made in inference mode."""
    of, keys = DispatchKeySet, DispatchKey
    found = set()
    for device in ("CPU", "CUDA"):
        inference = of(getattr(keys, device)) | of(getattr(keys, f"Autocast{device}"))
        found.add((inference | of(keys.ADInplaceOrView) | of(getattr(keys, f"Autograd{device}"))).raw_repr())
        found.add(inference.raw_repr())
    return found


_PLAIN_KEYS = _plain_keys()


def register(
    *,
    fake: Callable[..., Any],
    returns: Sequence[str] = (),
    backward: Callable[..., Mapping[str, Tensor | None]] | None = None,
    gradient_of: str = "",
    instead: str = "",
    flops: Callable[..., int] | None = None,
    takes: Mapping[str, str] | None = None,
    saved: Callable[..., Sequence[Sequence[tuple[int, ...]]]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes torch.ops.ipvrm.<its name without the underscore>, and what to call.

    That is the op, or where only autograd would see the call, the function under an autograd.Function, and
    profilers do not show the op's name then. Calls are positional. The function's annotations are the op's
    schema: no defaults, returns new tensors, mutates nothing. The last input and the last output may be a
    list[Tensor]; such an output has no gradient. A `Number` comes as a float to the function, and to fake and
    backward as it was given.

    fake, backward: ask for what they need by the names of their parameters; fake for inputs, and returns
        empty outputs. backward for inputs, outputs (as named in `returns`), d<output>, the upstream gradient
        or None, and `needs`, {input: whether its gradient is wanted}; it returns {input: gradient}. Exactly
        what it asks for is saved. Not called where every upstream gradient is None. An output whose d<output>
        it does not ask for is not differentiable.
    gradient_of: the op whose gradient this function is; to differentiate it again raises RuntimeError, which
        names what to use `instead`.
    flops: what torch.utils.flop_counter counts, from inputs by name, tensors as their shapes.
    takes: {tensor input: kind and shape}, as "float N K+1" (`KINDS`): what a native implementation reads;
        "float N if x": 0 elements do where x is None. The public function sees to it; torch.ops.ipvrm, which
        anybody can call, raises ValueError otherwise, because an address with another dtype or size behind it
        is read past its end.
    saved: from inputs by name the shapes that the tensors in the input `saved` may have, one list of shapes
        for each way in which the forward can have saved; other ones are refused as in `takes`, whatever impl.
    Without backward and gradient_of, inputs have to be detached.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.removeprefix("_")
        hints = get_type_hints(function, include_extras=True)
        kinds = {x: hints[x] for x in inspect.signature(function).parameters}
        flat_kinds, flatten, gather = _flattening(name, kinds)
        _LIBRARY.define(name + _schema(flat_kinds, hints["return"]), tags=(torch.Tag.pt2_compliant_tag,))
        op: Callable[..., Any] = getattr(torch.ops.ipvrm, name).default

        numbers = _positions_of_numbers(kinds)
        names = [*kinds]
        pick_asked = _picker([names.index(x) for x in _parameters(name, "fake", fake, names)])

        check = _input_check(name, kinds, takes or {}, saved)

        def kernel(*flat: Any) -> Any:
            inputs = gather(flat)
            check(inputs)
            for i in numbers:
                if isinstance(inputs[i], Tensor):
                    inputs[i] = inputs[i].item()
            return function(*inputs)

        def fake_by_name(*flat: Any) -> Any:
            return fake(*pick_asked(gather(flat)))

        def dispatch(*inputs: Any) -> Any:
            return op(*flatten(inputs))

        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ipvrm::{name}", fake_by_name, lib=_LIBRARY)
        if flops is not None:
            _count_flops(name, flops, names, gather)
        if backward is None and not gradient_of:
            return _without_gradient(function, dispatch, numbers, _positions_of_tensors(kinds))
        rule = backward or _refusal(gradient_of, instead)
        formula, call = _differentiable(name, function, dispatch, kinds, hints["return"], returns, rule)

        def autograd_kernel(*flat: Any) -> Any:
            tensors = (x for x in flat if isinstance(x, Tensor))
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                if transform_level() is not None:  # compiled, or called as torch.ops.ipvrm: see check_tensors
                    raise RuntimeError(f"{name}: {NO_TRANSFORM}")
                return formula(*gather(flat))
            with BelowAutograd():
                return op(*flat)

        _LIBRARY.impl(name, autograd_kernel, "Autograd")
        return call

    return decorate


# What the kernels read, by the words of `takes`.
KINDS = {
    "float": (torch.float32,),
    "head": (torch.float32, torch.bfloat16, torch.float16),
    "edges": (torch.int32,),
    "ids": (torch.int64,),
}


def _input_check(
    op: str,
    kinds: Mapping[str, Any],
    takes: Mapping[str, str],
    saved: Callable[..., Sequence[Sequence[tuple[int, ...]]]] | None,
) -> Callable[[list[Any]], None]:
    """A function that refuses inputs which the addresses of a native implementation must not point to, and
    makes the others contiguous, in place, but for the operands of matmuls."""
    if not takes:
        return lambda inputs: None
    names = [*kinds]
    unknown = [name for name in takes if name not in names]
    if unknown:
        raise TypeError(f"{op}: takes names {', '.join(unknown)}; there is {', '.join(names)}")
    if (saved is None) == ("saved" in names):
        raise TypeError(f"{op}: an input called saved needs the shapes it may have, and nothing else does")
    parsed = [(names.index(name), name, *_spec(text)) for name, text in takes.items()]
    required = [(names.index(name), name) for name in takes if kinds[name] is Tensor]
    where, gradient = names.index("impl"), op.endswith("_bwd")
    edges = [at for at, _, kind, *_ in parsed if kind == "edges" and gradient]
    rows = [at for at, name in required for i, *_, shape, _ in parsed if i == at and shape[:1] == (("N", 0),)]
    pick_asked = _picker([names.index(x) for x in _parameters(op, "saved", saved, names)] if saved else [])

    def check(inputs: list[Any]) -> None:
        impl = inputs[where]
        for at, name in required:
            if inputs[at] is None:  # the dispatcher lets it pass
                raise ValueError(f"torch.ops.ipvrm.{op}: {name} must be a tensor, got None")
        if not is_reference(impl):
            sizes: dict[str, Any] = {}
            for at, name, kind, shape, condition in parsed:
                x = inputs[at]
                if x is None or (condition and inputs[names.index(condition)] is None and not x.numel()):
                    continue
                _check_native(op, impl, name, x, kind, shape, sizes)
                if kind != "head":
                    inputs[at] = x.contiguous()
        if edges and trusts_edges(impl) and inputs[edges[0]].device.type == "cpu":
            _check_edges(op, names[edges[0]], inputs[edges[0]], inputs[rows[0]].shape[0])
        if saved is not None:
            at = names.index("saved")
            like = next(inputs[i] for i, _, kind, *_ in parsed if kind == "float" and inputs[i] is not None)
            _check_saved(op, inputs[at], like, saved(*pick_asked(inputs)))
            inputs[at] = [x.contiguous() for x in inputs[at]]

    return check


def _check_saved(
    op: str, given: Sequence[Tensor], like: Tensor, allowed: Sequence[Sequence[tuple[int, ...]]]
) -> None:
    found = [tuple(x.shape) for x in given]
    alike = all(x.dtype == like.dtype and x.device == like.device for x in given)
    if alike and any(found == [*map(tuple, shapes)] for shapes in allowed):
        return
    ways = " or ".join(str([*map(tuple, shapes)]) for shapes in dict.fromkeys(map(tuple, allowed)))
    raise ValueError(
        f"torch.ops.ipvrm.{op}: saved must be what the forward has saved, {like.dtype} on {like.device} of "
        f"shapes {ways}, got {[(str(x.dtype), str(x.device), tuple(x.shape)) for x in given]}; call "
        f"ipvrm_kernels.{op.removesuffix('_bwd')} and let autograd keep them"
    )


def _check_edges(op: str, name: str, edges: Tensor, N: int) -> None:
    """A forward checks the values of its edges itself; a gradient, called from there, has no need to."""
    values = edges.tolist()
    if not values or values[0] != 0 or values[-1] != N or values != sorted(values):
        raise ValueError(
            f"torch.ops.ipvrm.{op}: {name} must rise from 0 to N={N}, got {values[:8]}; call "
            f"ipvrm_kernels.{op.removesuffix('_bwd')}, which checks and converts"
        )


def _spec(text: str) -> tuple[str, Any, str]:
    """`float N K+1 if x` as its kind, ((N, 0), (K, 1)) and "x"; `float =` (the shape of the other such
    inputs) gives "=" for the shape."""
    text, _, condition = text.partition(" if ")
    kind, *dims = text.split()
    if dims == ["="]:
        return kind, "=", condition
    return kind, tuple((d.partition("+")[0], int(d.partition("+")[2] or 0)) for d in dims), condition


def _check_native(
    op: str, impl: str, name: str, x: Tensor, kind: str, shape: Any, sizes: dict[str, Any]
) -> None:
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in KINDS[kind])
    problem = None
    if x.dtype not in KINDS[kind]:
        problem = f"{words}, got {x.dtype}"
    elif x.device.type != (device := NATIVE_DEVICE.get(impl, x.device.type)):
        problem = f"on {device}, got {x.device}"
    elif shape == "=":
        if sizes.setdefault("=", x.shape) != x.shape:
            problem = f"{tuple(sizes['='])} as the others, got {tuple(x.shape)}"
    else:
        fits = x.dim() == len(shape) and all(
            sizes.setdefault(letter, x.shape[i] - more) == x.shape[i] - more
            for i, (letter, more) in enumerate(shape)
        )
        if not fits:
            dims = ", ".join(f"{letter}+{more}" if more else letter for letter, more in shape)
            known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
            problem = f"({dims}) with {known or 'no size'}, got {tuple(x.shape)}"
    if problem is not None:
        public = op.removesuffix("_bwd")
        raise ValueError(
            f"torch.ops.ipvrm.{op}: {name} must be {problem} for impl={impl!r}; call ipvrm_kernels.{public}, "
            "which checks and converts"
        )


def _count_flops(
    op: str, flops: Callable[..., int], names: Sequence[str], gather: Callable[[Sequence[Any]], list[Any]]
) -> None:
    pick_asked = _picker([names.index(x) for x in _parameters(op, "flops", flops, names)])

    def formula(*flat: Any, **_: Any) -> int:
        return flops(*pick_asked(gather(flat)))

    register_flop_formula(getattr(torch.ops.ipvrm, op))(formula)


def _positions_of_tensors(kinds: Mapping[str, Any]) -> list[int]:
    return [i for i, kind in enumerate(kinds.values()) if kind in (Tensor, Tensor | None)]


def _positions_of_numbers(kinds: Mapping[str, Any]) -> list[int]:
    return [i for i, kind in enumerate(kinds.values()) if kind in _NUMBERS]


def _flattening(
    op: str, kinds: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[Sequence[Any]], list[Any]], Callable[[Sequence[Any]], list[Any]]]:
    """(the schema's inputs, inputs -> what the op takes, and back).

    A Number becomes a float and an optional tensor, of which one counts. A list[Tensor] at the end becomes
    MOST_LISTED optional tensors: a list in its schema would cost the op PyTorch's fallback for batched ones.
    """
    listed = [x for x, kind in kinds.items() if kind == list[Tensor]]
    if listed and listed != [*kinds][-1:]:
        raise TypeError(f"{op}: only the last input may be a list[Tensor], got {', '.join(listed)}")
    forms = ["number" if k in _NUMBERS else "list" if k == list[Tensor] else "" for k in kinds.values()]
    flat: dict[str, Any] = {}
    for (x, kind), form in zip(kinds.items(), forms, strict=True):
        if form == "number":
            flat |= {x: float if kind == Number else float | None, f"{x}_tensor": Tensor | None}
        elif form == "list":
            flat |= {f"{x}_{i}": Tensor | None for i in range(MOST_LISTED)}
        else:
            flat[x] = kind

    def flatten(inputs: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for x, form in zip(inputs, forms, strict=True):
            if form == "number":
                found += (0.0, x) if isinstance(x, Tensor) else (x, None)
            elif form == "list":
                found += [*x, *(None,) * (MOST_LISTED - len(x))]
            else:
                found.append(x)
        return found

    def gather(inputs: Sequence[Any]) -> list[Any]:
        left, found = iter(inputs), list[Any]()
        for form in forms:
            if form == "number":
                number, tensor = next(left), next(left)
                found.append(number if tensor is None else tensor)
            elif form == "list":
                found.append([x for x in left if x is not None])
            else:
                found.append(next(left))
        return found

    return flat, flatten, gather


def _schema(kinds: Mapping[str, Any], returned: Any) -> str:
    def stand_in() -> None: ...

    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    inputs = [inspect.Parameter(x, place, annotation=kind) for x, kind in kinds.items()]
    stand_in.__signature__ = inspect.Signature(inputs, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(stand_in, mutates_args=())


def _refusal(op: str, instead: str) -> Callable[..., Any]:
    def refuse() -> None:
        raise RuntimeError(
            f"{op}: double backward is not supported; its gradient cannot be differentiated. Where a second "
            f"derivative is needed, use {instead}"
        )

    return refuse


def _parameters(op: str, what: str, rule: Callable[..., Any], known: Sequence[str]) -> list[str]:
    """The names of the rule's parameters; TypeError unless all are known."""
    asked = list(inspect.signature(rule).parameters)
    unknown = [x for x in asked if x not in known]
    if unknown:
        raise TypeError(f"{op}: its {what} asks for {', '.join(unknown)}; there is {', '.join(known)}")
    return asked


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """From a sequence the tuple of its items at these positions, at C's speed."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    if not positions:
        return lambda items: ()
    (position,) = positions
    return lambda items: (items[position],)


def _without_gradient(
    function: Callable[..., Any],
    dispatch: Callable[..., Any],
    numbers: Sequence[int],
    tensors_at: Sequence[int],
) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        plain = _only_autograd() and all(inputs[i] is None or _is_plain(inputs[i]) for i in tensors_at)
        plain = plain and all(type(inputs[i]) in _NUMBER_TYPES for i in numbers)
        return function(*inputs) if plain else dispatch(*inputs)

    return call


def _differentiable(
    name: str,
    function: Callable[..., Any],
    dispatch: Callable[..., Any],
    kinds: Mapping[str, Any],
    returned: Any,
    returns: Sequence[str],
    backward: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(the op below autograd under an autograd.Function, what to call in the op's place)."""
    outputs = (returned,) if returned is Tensor else get_args(returned)
    if list[Tensor] in outputs[:-1]:
        raise TypeError(f"{name}: only the last output may be a list[Tensor], got {returned}")
    if returns and len(returns) != len(outputs):
        raise TypeError(f"{name}: returns must name its {len(outputs)} outputs, got {', '.join(returns)}")
    if returns and "needs" in kinds:
        raise TypeError(f"{name}: no input may be called needs, which is a name of register's")
    index = {x: i for i, x in enumerate(kinds)}
    kind_of = {**kinds, **dict(zip(returns, outputs, strict=False))}
    upstream = [f"d{x}" if kind_of[x] is Tensor else "" for x in returns]
    asked = _parameters(name, "backward", backward, [*kind_of, *filter(None, upstream), "needs"])
    tensors = [x for x in asked if kind_of.get(x) in (Tensor, Tensor | None)]
    lists = [x for x in asked if kind_of.get(x) == list[Tensor]]
    plain = [x for x in asked if x in kinds and x not in tensors and x not in lists]
    # a gradient names no outputs, and all of them lead to the refusal
    constant = [i for i, x in enumerate(upstream) if x and x not in asked]
    pick_constant, pick_plain = _picker(constant), _picker([index[x] for x in plain])
    pick_saved = _picker([[*kinds, *returns].index(x) for x in tensors])
    pool = [*tensors, *plain, *(upstream or [""]), *(lists or [""]), "needs"]
    pick_asked = _picker([pool.index(x) for x in asked])
    numbers = _positions_of_numbers(kinds)
    tensors_at = _positions_of_tensors(kinds)
    num_tensors, wants_needs, single = len(tensors), "needs" in asked, returned is Tensor
    nothing = (None,) * len(kinds)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        if single:
            output = (output,)
        ctx.set_materialize_grads(False)
        if constant:
            ctx.mark_non_differentiable(*pick_constant(output))
        ctx.plain = pick_plain(inputs)
        ctx.save_for_backward(*pick_saved((*inputs, *output)), *(output[-1] if lists else ()))

    def backward_by_name(ctx: Any, *grads: Tensor | None) -> Any:
        for grad in grads:
            if grad is not None:
                break
        else:
            return nothing
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        pool = (
            *saved[:num_tensors], *ctx.plain, *grads, list(saved[num_tensors:]),
            dict(zip(kinds, needs, strict=True)) if wants_needs else None,
        )  # fmt: skip
        gradients = list(nothing)
        for x, gradient in backward(*pick_asked(pool)).items():
            if needs[index[x]]:
                gradients[index[x]] = gradient
        return tuple(gradients)

    def formula(run: Callable[..., Any]) -> type[torch.autograd.Function]:
        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = run(*inputs)
                save(ctx, inputs, output)
                return output

        Differentiable.backward = staticmethod(backward_by_name)  # type: ignore[method-assign]
        return Differentiable

    def below_autograd(*inputs: Any) -> Any:
        with BelowAutograd():
            return dispatch(*inputs)

    # of Function.apply what is left without torch.func's transforms, and `call` has seen that there are none
    direct = super(torch.autograd.Function, formula(function)).apply  # type: ignore[misc]

    def call(*inputs: Any) -> Any:
        if not _only_autograd():
            return dispatch(*inputs)
        for i in numbers:
            if type(inputs[i]) not in _NUMBER_TYPES:  # a 0-d tensor
                return dispatch(*inputs)
        requires_grad = False
        for i in tensors_at:
            if (x := inputs[i]) is not None:
                if type(x) not in _TENSORS or dispatch_keys(x).raw_repr() not in _PLAIN_KEYS:  # _is_plain(x)
                    return dispatch(*inputs)
                requires_grad |= x.requires_grad
        return direct(*inputs) if requires_grad and torch.is_grad_enabled() else function(*inputs)

    return formula(below_autograd).apply, call


def _is_plain(x: Tensor) -> bool:
    """Whether nothing but autograd and autocast takes an interest in x."""
    return type(x) in _TENSORS and dispatch_keys(x).raw_repr() in _PLAIN_KEYS


def _only_autograd() -> bool:
    """Whether nothing but autograd comes between a plain tensor and an op: no tracing, mode or transform."""
    return not (
        torch.compiler.is_compiling()
        or tracing_state() is not None
        or transform_level() is not None
        or num_dispatch_modes()
        or num_function_modes()
    )


def is_last_backward(*tensors: Tensor) -> bool:
    """Whether this backward call's graph is freed after it, with nothing tracing or differentiating it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # the latter: create_graph
        return False
    if retains_graph() or transform_level() is not None:  # retain_graph; torch.func may come back here
        return False
    return all(type(x) is Tensor for x in tensors)  # not fake or functional


def is_batched(x: Tensor) -> bool:
    """Whether x stands for several: under torch.func.vmap, or in the older form behind is_grads_batched."""
    return is_batchedtensor(x) or is_legacy_batchedtensor(x)
