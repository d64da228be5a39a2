"""Which implementation of an op runs, and in words why another cannot.

One ordered table (`DEFAULT_ORDER`) and one function (`choose`). `impl=None` takes the first entry of the
device's row that the op has and this installation can run; a named `impl` runs or raises with the reason, and
never falls back. IPVRM_WITHOUT=IMPL or OP:IMPL, read at import, leaves that out of the defaults.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFAULT_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")}
IMPL_NAMES = ("torch", "cpp", "triton", "cuda")
NATIVE_DEVICE = {"cpp": "cpu", "cuda": "cuda"}  # where the tensors lie of what takes addresses

WITHOUT = "IPVRM_WITHOUT"  # environment variable: what the defaults leave out
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as Triton itself read it, at import
HAS_TRITON: bool = importlib.util.find_spec("triton") is not None

_C: ModuleType | None = None
_EXTENSION_ERROR = ""
try:
    _C = importlib.import_module("ipvrm_kernels._C")
except ImportError as error:  # not built, built for another Python, or its OpenMP runtime is not there
    _EXTENSION_ERROR = str(error)
    if "libgomp" in _EXTENSION_ERROR:
        _EXTENSION_ERROR += (
            "; torch's Linux wheels bring this OpenMP runtime, and with another torch the system must "
            "(apt-get install libgomp1, dnf install libgomp)"
        )

HAS_CPP = _C is not None
HAS_CUDA = _C is not None and bool(_C.has_cuda)
AMD_FAMILY: int = getattr(_C, "amd_family", 0)  # of the processor; 0: not AMD's

_NUMBERS = frozenset((bool, int, float))  # isinstance(5, Tensor) costs 0.2 us, three times a lookup here
_checks = False


def _left_out(text: str) -> frozenset[str]:
    """The entries of IPVRM_WITHOUT: `IMPL`, or `OP:IMPL` for one op."""
    entries = frozenset(entry.strip() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if entry.rpartition(":")[2] not in IMPL_NAMES:
            raise ValueError(
                f"{WITHOUT} must hold IMPL or OP:IMPL, separated by commas, with IMPL one of "
                f"{', '.join(IMPL_NAMES)}; got {entry!r}"
            )
    return entries


_without = _left_out(os.environ.get(WITHOUT, ""))  # at import: an op's choice must not change in a process


def set_checks(enabled: bool) -> bool:
    """Switch value checks on GPU tensors on or off (default off: they synchronise); the CPU always checks.

    Returns the previous setting.
    """
    global _checks
    previous, _checks = _checks, bool(enabled)
    return previous


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read to validate them; never while torch.compile traces.

    A traced check would break the graph. The ops check inside their implementations, which run untraced, so
    compiled code loses only the checks that functions composed of ops make themselves.
    """
    return (_checks or tensor.is_cpu) and not torch.compiler.is_compiling()


def native_struct(name: str, **fields: Any) -> Any:
    """The extension's struct `name` with these fields: tensors as addresses, structs by value, the rest 0.

    It keeps alive what its addresses point into, and a struct that it is a field of keeps it.
    """
    assert _C is not None
    struct = getattr(_C, name)()
    for field, value in fields.items():
        if value is not None:
            setattr(struct, field, value if type(value) in _NUMBERS else _plain(value))
    struct.alive = fields
    return struct


def _plain(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def native_call(name: str, *args: Any) -> Any:
    """Call `name` of the extension: tensors as addresses, None as 0, then the thread count or CUDA stream.

    Structs are from `native_struct`. Returns what it returns. Only called after `choose` has said that the
    extension can run.
    """
    assert _C is not None
    plain = [arg if type(arg) in _NUMBERS else 0 if arg is None else _plain(arg) for arg in args]
    if name.endswith("_cpu"):
        return getattr(_C, name)(*plain, torch.get_num_threads())
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device):
        return getattr(_C, name)(*plain, torch.cuda.current_stream().cuda_stream)


def _nothing(*_: Any) -> Sequence[tuple[int, ...]]:
    return ()


def _no_backward(*_: Any) -> Any:
    raise AssertionError("this implementation has no backward of its own")


class Impl(NamedTuple):
    """One implementation of an op, an entry of its table IMPLS; what its functions take, the op file says.

    The op hands `saved` from forward to backward unread: it belongs to the implementation.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] = _no_backward  # left out if there is no gradient, or the op forms it
    saved: Callable[..., Sequence[tuple[int, ...]]] = _nothing  # shapes of the tensors forward saves
    last_backward: Callable[..., Any] | None = None  # in place of backward where it may use up `saved`


def is_reference(impl: str) -> bool:
    """Whether `impl` is the op's definition in PyTorch, which reads no memory by its address."""
    return impl == "torch"


def trusts_edges(impl: str) -> bool:
    """Whether `impl` crashes or reads astray where the edges of sequences are wrong; the kernels written for
    GPUs hold them to 0..N."""
    return impl in ("cpp", "torch")


def why_not(impl: str, device_type: str) -> str | None:
    """None if `impl` can run on a device of this type here, else the reason in words."""
    if impl == "torch":
        return None
    if impl == "cpp":
        if not HAS_CPP:
            return (
                f"the extension ipvrm_kernels._C cannot be imported ({_EXTENSION_ERROR}); in a checkout run "
                "`pip install -e .` with a C++17 compiler on PATH"
            )
        return None if device_type == "cpu" else f"it runs on CPU tensors, not on {device_type}"
    if impl == "triton":
        if not HAS_TRITON:
            return "the package triton is not installed"
        if device_type == "cuda":
            return "TRITON_INTERPRET=1 is set; unset it to compile for the GPU" if INTERPRETED else None
        if device_type == "cpu":
            return (
                None
                if INTERPRETED
                else "CPU tensors need TRITON_INTERPRET=1 set before import (interpreter, slow)"
            )
        return f"it runs on CUDA tensors, not on {device_type}"
    if impl == "cuda":
        if not HAS_CPP:
            return f"the extension ipvrm_kernels._C cannot be imported ({_EXTENSION_ERROR})"
        if not HAS_CUDA:
            return "the extension holds no CUDA kernels; a build with IPVRM_CUDA=1 says why"
        return None if device_type == "cuda" else f"it runs on CUDA tensors, not on {device_type}"
    return f"no such implementation; the names are {', '.join(IMPL_NAMES)}"


def choose(op: str, impls: Mapping[str, Impl], impl: str | None, tensor: Tensor) -> str:
    """Name of the implementation of `op` that runs for `tensor`'s device and dtype.

    Raises ValueError with the reason if a named `impl` cannot run. fp64 runs in the reference only (`torch`).
    """
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the latter costs 0.5 us
    double = tensor.dtype == torch.float64
    if impl is None:
        return "torch" if double else _default(op, impls, device_type)
    if impl in IMPL_NAMES and impl not in impls:
        raise ValueError(f"{op}: impl={impl!r} does not exist for this op; it has {', '.join(impls)}")
    reason = why_not(impl, device_type)
    if reason is None and double and impl != "torch":
        reason = "it computes in fp32; fp64 inputs need impl='torch'"
    if reason is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run here: {reason}")
    return impl


class Backends(dict[str, dict[str, dict[str, str]]]):
    """{device type: {op: {impl: "default" | "available" | reason it cannot run}}}; prints as a table."""

    def __str__(self) -> str:
        lines = []
        for device_type, ops in self.items():
            lines.append(f"{device_type} tensors")
            width = max(len(op) for op in ops)
            reasons: dict[str, str] = {}
            for op, impls in ops.items():
                cells = []
                for name in IMPL_NAMES:
                    state = impls[name]
                    mark = {"default": "default", "available": "yes", "not written": "-"}.get(state, "no")
                    if mark == "no":
                        reasons[name] = state
                    cells.append(f"{name} {mark}".ljust(15))
                lines.append(f"  {op.ljust(width)}  {' '.join(cells)}".rstrip())
            lines += [f"  {name}: no, because {reason}" for name, reason in reasons.items()]
        return "\n".join(lines)


def table(ops: Mapping[str, Mapping[str, Impl]]) -> Backends:
    """The state of every implementation of every op, for CPU tensors and, on a machine with one, a GPU."""
    result = Backends()
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows: dict[str, dict[str, str]] = {}
        for op, impls in ops.items():
            default = _default(op, impls, device_type)
            rows[op] = {}
            for name in IMPL_NAMES:
                if name not in impls:
                    rows[op][name] = "not written"
                else:
                    rows[op][name] = why_not(name, device_type) or (
                        "default" if name == default else "available"
                    )
        result[device_type] = rows
    return result


def _default(op: str, impls: Mapping[str, Impl], device_type: str) -> str:
    for name in DEFAULT_ORDER.get(device_type, ()):
        if name not in impls or why_not(name, device_type) is not None:
            continue
        if not _without or not {name, f"{op}:{name}"} & _without:
            return name
    return "torch"
