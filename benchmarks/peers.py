"""The packages people use instead: the log-prob of one token per row from hidden states, by each of them.

Every peer is called as its own documentation calls it, and is skipped with a reason where it is not installed
or does not run on the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (hidden (N, D), weight (V, D), target (N,)) -> the sum of -log p(target)
OneToken = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_CHUNK = 32_768  # columns of the vocabulary at a time, as TRL's trainers pass


def one_token(device: str) -> tuple[dict[str, OneToken], dict[str, str]]:
    """(peers by name, reasons of those that are absent by name)."""
    peers: dict[str, OneToken] = {}
    absent: dict[str, str] = {}

    def offer(name: str, module: str, make: Callable[[], OneToken], runs: bool = True) -> None:
        if importlib.util.find_spec(module) is None:
            absent[name] = f"not installed: pip install {module.replace('_', '-')}"
        elif runs:
            peers[name] = make()
        else:
            absent[name] = f"does not run on {device}"

    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["F.linear_cross_entropy"] = _torch_chunked
    else:
        absent["F.linear_cross_entropy"] = f"not in torch {torch.__version__}"
    offer("cut-cross-entropy torch_compile", "cut_cross_entropy", lambda: _cut_cross_entropy("torch_compile"))
    on_gpu = device == "cuda"
    offer("cut-cross-entropy cce", "cut_cross_entropy", lambda: _cut_cross_entropy("cce"), on_gpu)
    offer("TRL chunked log-prob", "trl", _trl)
    offer("liger fused linear CE", "liger_kernel", _liger, on_gpu)
    return peers, absent


def _torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)


def _cut_cross_entropy(impl: str) -> OneToken:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: linear_cross_entropy(
        hidden, weight, target, reduction="sum", impl=impl
    )


def _trl() -> OneToken:
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        )
        return -outputs[0].sum()

    return run


def _liger() -> OneToken:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, target: liger_fused_linear_cross_entropy(
        hidden, weight, target, reduction="sum"
    )
