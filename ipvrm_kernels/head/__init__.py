"""The language-model head as the head ops see it: logit transform, dtype rule, reference pieces, validation.

z = softcap((hidden @ weight.T + bias) * logit_scale) / temperature,  softcap(x) = c * tanh(x / c).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import check_tensors, checked_number
from ..packing import check_finite
from ..registration import Number

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES_AND_FP32 = FLOATS[:3]
TRAINABLE = ("hidden", "weight", "bias")  # inputs with a gradient; `needs` lists them in this order


MOST_WORKSPACE = 2**62  # bytes: what fits the ops' int64 with room for a factor of two
TAKES_HEAD = {"hidden": "head N D", "weight": "head V D", "bias": "head V"}  # see `registration.register`


class Transform(NamedTuple):
    """From h.w + b to z: * scale, softcap, / temperature; the matmul's operands are rounded to `dtype`."""

    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype


def transformed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """(N, V) logits z in fp32 (fp64 for fp64), whatever the inputs and any enclosing autocast region."""
    wide = out_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(transform.dtype).to(wide) @ weight.to(transform.dtype).to(wide).T
    if bias is not None:
        z = z + bias.to(wide)
    z = z * transform.scale
    if transform.softcap is not None:
        z = torch.tanh(z / transform.softcap) * transform.softcap
    return z / transform.temperature


def transform_derivative(z: Tensor, transform: Transform) -> Tensor | float:
    """dz/d(h.w + b), from z."""
    gain = transform.scale / transform.temperature
    if transform.softcap is None:
        return gain
    t = z * (transform.temperature / transform.softcap)
    return (1 - t) * (1 + t) * gain


def select_ids(values: Tensor, ids: Tensor) -> Tensor:
    """values (N, V) at ids (N, K); -inf where an id is -1 or out of range."""
    owned = (ids >= 0) & (ids < values.shape[1])
    return values.gather(1, torch.where(owned, ids, 0)).masked_fill(~owned, -math.inf)


def times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """p * log_p with 0 * -inf = 0; NaN stays NaN."""
    return torch.where(p == 0, 0.0, p * log_p)


def add_at_ids(da: Tensor, ids: Tensor, values: Tensor) -> None:
    """da[n, ids[n, k]] += values[n, k] in place; column by column, so duplicates add up in a fixed order."""
    owned = (ids >= 0) & (ids < da.shape[1])
    safe, values = (
        torch.where(owned, ids, 0),
        torch.where(owned, values, 0.0),
    )  # selected before anything is summed
    for k in range(ids.shape[1]):
        column = safe[:, k : k + 1]
        da.scatter_(1, column, da.gather(1, column) + values[:, k : k + 1])


def head_gradients(
    da: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) in fp32 (fp64) from da = dL/d(h.w + b) (N, V); 0 elements if not needed."""
    absent, wide = da.new_empty(0), da.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        return (
            da @ weight.to(dtype).to(wide) if needs[0] else absent,
            da.T @ hidden.to(dtype).to(wide) if needs[1] else absent.clone(),
            da.sum(0) if needs[2] else absent.clone(),
        )


def check_workspace(op: str, max_workspace_bytes: int | None, N: int, V: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless the reference, which materialises logits, fits: four (N, V) buffers."""
    least = 4 * N * V * dtype.itemsize
    if max_workspace_bytes is not None and max_workspace_bytes < least:
        raise ValueError(
            f"{op}: max_workspace_bytes must be at least {least} for impl='torch', which materialises logits,"
            f" got {max_workspace_bytes}; pass fewer rows at a time or raise it"
        )


def prepare(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    logit_scale: float | Tensor, softcap: float | None, temperature: float | Tensor,
    max_workspace_bytes: int | None = None, may_be_empty: bool = False,
) -> tuple[Number, float | None, Number, torch.dtype]:  # fmt: skip
    """Validate what every head op takes and return what its transform is made of, see `checked_transform`.

    may_be_empty: weight may be the (0, D) of a shard without tokens.
    The matmul's dtype is autocast's where autocast is enabled for the device, else hidden's; fp64 stays fp64.
    """
    check_tensors(op, {"bias": bias}, hidden=hidden, weight=weight)
    if weight.numel() == 0 and not (may_be_empty and weight.dim() == 2):
        raise ValueError(
            f"{op}: weight is empty, shape {tuple(weight.shape)}; gather a sharded parameter (ZeRO-3, FSDP) "
            "first, e.g. deepspeed.zero.GatheredParameters or FullyShardedDataParallel.summon_full_params"
        )
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden must be (N, D) or (B, T, D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be (V,) with V={weight.shape[0]}, got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}, hidden on {hidden.device}")
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    _check_dtypes(op, hidden, weight, bias, autocast)
    if max_workspace_bytes is not None and not 0 < max_workspace_bytes <= MOST_WORKSPACE:
        raise ValueError(
            f"{op}: max_workspace_bytes must be None or in 1 .. {MOST_WORKSPACE}, got {max_workspace_bytes}"
        )
    rounds = autocast and hidden.dtype != torch.float64
    return (
        checked_number(op, "logit_scale", logit_scale), None if softcap is None else float(softcap),
        checked_number(op, "temperature", temperature),
        torch.get_autocast_dtype(kind) if rounds else hidden.dtype,
    )  # fmt: skip


def checked_transform(
    op: str, scale: float, softcap: float | None, temperature: float, dtype: torch.dtype
) -> Transform:
    """The transform of what `prepare` returned, as an op gets it. Raise ValueError, as `op`."""
    check_finite(op, "logit_scale", scale)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be finite and > 0, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
    return Transform(scale, softcap, temperature, dtype)


def _check_dtypes(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    if hidden.dtype not in FLOATS:
        raise ValueError(f"{op}: hidden must be fp32, bf16, fp16 or fp64, got {hidden.dtype}")
    if hidden.dtype == torch.float64:
        allowed: tuple[torch.dtype, ...] = (torch.float64,)
    else:
        allowed = HALVES_AND_FP32 if autocast else (hidden.dtype, torch.float32)
    if weight.dtype not in allowed:
        raise ValueError(
            f"{op}: weight must be of hidden's dtype {hidden.dtype} or an fp32 master of it, got "
            f"{weight.dtype}; cast one of them"
        )
    if bias is not None and bias.dtype not in (*allowed, weight.dtype):
        raise ValueError(f"{op}: bias must be of weight's dtype {weight.dtype} or fp32, got {bias.dtype}")


def check_row_ids(op: str, name: str, ids: Tensor, hidden: Tensor, dims: tuple[int, ...]) -> None:
    """Raise ValueError unless ids are int64 or int32, (N,) or (N, K) as `dims` allows, on hidden's device;
    hidden's leading dimensions in place of N.
    """
    check_tensors(op, **{name: ids})
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    rows = hidden.shape[:-1]
    if ids.dim() - len(rows) + 1 not in dims or ids.shape[: len(rows)] != rows:
        N = "N" if len(rows) == 1 else "B, T" if len(rows) == 2 else "..."
        shapes = " or ".join({1: f"({N},)" if N == "N" else f"({N})", 2: f"({N}, K)"}[d] for d in dims)
        sizes = f"N={rows[0]}" if N == "N" else f"leading dimensions of hidden {tuple(rows)}"
        raise ValueError(f"{op}: {name} must be {shapes} with {sizes}, got {tuple(ids.shape)}")
    if ids.device != hidden.device:
        raise ValueError(f"{op}: {name} is on {ids.device}, hidden on {hidden.device}")


def flat_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x (*rows, ...) as (N, ...)."""
    return x if len(rows) == 1 else x.flatten(0, len(rows) - 1)


def in_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """The way back: x (N, ...) as (*rows, ...)."""
    return x if len(rows) == 1 else x.unflatten(0, rows)


def matmul_flops(hidden: Sequence[int], weight: Sequence[int], count: int) -> int:
    """What FlopCounterMode counts for `count` matmuls of hidden (N, D) and weight (V, D), given as shapes."""
    return 2 * count * hidden[0] * hidden[1] * weight[0]


def out_dtype(hidden: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_ids(op: str, name: str, ids: Tensor, V: int) -> None:
    """Raise ValueError for ids from V on. Reads values: call it only where `checks_values` allows."""
    if ids.numel() and int(ids.max()) >= V:
        raise ValueError(
            f"{op}: {name} must be below V={V}, negative for no token, got values up to {int(ids.max())}"
        )


def cast_gradients(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 accumulators to each input's own dtype, once."""
    dhidden, dweight, dbias = (
        d.to(x.dtype) if need and x is not None else d
        for d, x, need in zip(gradients, inputs, needs, strict=True)
    )
    return dhidden, dweight, dbias


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what `cast_gradients` returns."""
    dhidden, dweight, dbias = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0, dtype=out_dtype(hidden))
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return dhidden, dweight, dbias


INSTEAD = "torch.log_softmax on materialised logits"  # where a second derivative is needed
