"""Every private name of PyTorch that this package uses, and what for. pyproject.toml bounds torch from above
because of this file alone; tests/kernels/test_torch_private.py says which name another torch has changed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

try:
    # Whether anything but autograd comes between a call and an op: jit tracing, a transform of torch.func
    # (its level or None), TorchDispatchMode, TorchFunctionMode.
    tracing_state = torch._C._get_tracing_state
    transform_level = torch._C._functorch.maybe_current_level
    num_dispatch_modes = torch._C._len_torch_dispatch_stack
    num_function_modes = torch._C._len_torch_function_stack

    # Who takes an interest in a tensor, as a set of keys with raw_repr().
    dispatch_keys = torch._C._dispatch_keys
    DispatchKeySet = torch._C.DispatchKeySet
    DispatchKey = torch._C.DispatchKey

    # A kernel below autograd, as torch.library's own formulas enter it; whether a backward keeps its graph.
    BelowAutograd = torch._C._AutoDispatchBelowAutograd
    retains_graph = torch._C._autograd._get_current_graph_task_keep_graph

    # What wraps a tensor under torch.func, and what is in it.
    is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
    is_gradtrackingtensor = torch._C._functorch.is_gradtrackingtensor
    get_unwrapped = torch._C._functorch.get_unwrapped
    is_batchedtensor = torch._C._functorch.is_batchedtensor
    is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor

    # The level of forward-mode differentiation, below 0 where there is none: read anew at every call.
    forward_ad._current_level  # noqa: B018
except AttributeError as error:
    raise ImportError(
        f"ipvrm_kernels/torch_private.py: torch {torch.__version__} has changed: {error}; install a torch "
        "within the bounds of ipvrm's requirements"
    ) from error


def forward_level() -> int:
    return int(forward_ad._current_level)


def linear_onednn(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """a (M, K) @ weight (N, K).T by oneDNN, whatever library torch.mm takes. Only where `has_onednn()`."""
    return torch.ops.mkldnn._linear_pointwise.default(a, weight, None, "none", [], "")


def has_onednn() -> bool:
    """Whether this build has the op of `linear_onednn`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


# oneDNN's product of blocks of bf16 matrices with fp32 sums, and what ends its use of the processor: brgemm
# and brgemm_release of ATen/native/CPUBlas.h, exported to C++ alone. A mangled name holds the types of the
# arguments, so that one with others is not found.
BRGEMM = (
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    "_ZN2at6native7cpublas14brgemm_releaseEb",
)


@cache
def brgemm_addresses() -> tuple[int, ...]:
    """Addresses of `BRGEMM` in this PyTorch; none where it does not export them."""
    try:
        exported = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return tuple(ctypes.cast(exported[name], ctypes.c_void_p).value or 0 for name in BRGEMM)
    except (OSError, AttributeError):
        return ()
