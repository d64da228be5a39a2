"""What people use instead: the log-prob of one token per row from hidden states by each package that has one,
liger's chunked GRPO loss, and the slices of 64 rows of the method's released formulation.

Every peer is called as its own documentation calls it, and is skipped with a reason where it is not installed
or does not run on the device.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (hidden (N, D), weight (V, D), target (N,)) -> the sum of -log p(target)
OneToken = Callable[[Tensor, Tensor, Tensor], Tensor]
# the same -> log p(target) (N,), entropy (N,)
WithEntropy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (hidden (B, T, D), weight (V, D), ids (B, T), old log-probs (B, T), advantages (B,)) -> the scalar loss
# the same -> log p(target) (N,), with gradients
OneLogprob = Callable[[Tensor, Tensor, Tensor], Tensor]
# (hidden (N, D), weight (V, D), ids (K,) of every row) -> their log-probs (N, K), with gradients
SharedIds = Callable[[Tensor, Tensor, Tensor], Tensor]
GrpoLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
PACKAGES = dict(
    cut_cross_entropy="cut-cross-entropy", trl="trl", liger_kernel="liger-kernel", quack="quack-kernels"
)
TRL_CHUNK = 32_768  # columns of the vocabulary at a time, as TRL's trainers pass


def one_token(device: str) -> tuple[dict[str, OneToken], dict[str, str]]:
    """(peers by name, reasons of those that are absent by name)."""
    found, absent = logprobs(device)

    def total(function: OneLogprob) -> OneToken:
        return lambda hidden, weight, target: -function(hidden, weight, target).sum()

    sums = {name: total(function) for name, function in found.items()}
    return {name: SUMMED[name]() if name in SUMMED else own for name, own in sums.items()}, absent


def logprobs(device: str) -> tuple[dict[str, OneLogprob], dict[str, str]]:
    """The same peers, where they give the log-prob of each row: (by name, reasons of the absent by name)."""
    peers: dict[str, OneLogprob] = {}
    absent: dict[str, str] = {}

    def offer(name: str, module: str, make: Callable[[], OneLogprob], runs: bool = True) -> None:
        if importlib.util.find_spec(module) is None:
            absent[name] = _not_installed(module)
        elif not runs:
            absent[name] = f"does not run on {device}"
        else:
            try:
                peers[name] = make()
            except ImportError as error:  # installed without what it needs
                absent[name] = f"cannot be imported: {error}"

    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["F.linear_cross_entropy"] = _negative(partial(_torch_chunked, reduction="none"))
    else:
        absent["F.linear_cross_entropy"] = f"not in torch {torch.__version__}"
    on_gpu, cce = device == "cuda", "cut_cross_entropy"
    offer("cut-cross-entropy torch_compile", cce, lambda: _cut_cross_entropy("torch_compile"))
    offer("cut-cross-entropy cce", cce, lambda: _cut_cross_entropy("cce"), on_gpu)
    offer("TRL chunked log-prob", "trl", _trl)
    offer("liger fused linear CE", "liger_kernel", _liger, on_gpu)
    offer("quack linear CE", "quack", _quack, on_gpu)
    return peers, absent


def shared_ids() -> tuple[SharedIds | None, str]:
    """(liger's log-probs of the same ids in every row, "") or (None, why it is absent)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None, _not_installed("liger_kernel")
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as function,
        )
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    if "selected_token_ids" not in inspect.signature(function.apply).parameters:
        return None, "this liger-kernel has no selected_token_ids: pip install 'liger-kernel>=0.8.5'"

    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        target = ids[:1].expand(len(hidden)).contiguous()
        return function.apply(hidden, weight, target, selected_token_ids=ids)[-1]

    return run, ""


def with_entropy() -> tuple[WithEntropy | None, str]:
    """(TRL's chunked log-prob and entropy, "") or (None, why it is absent)."""
    if importlib.util.find_spec("trl") is None:
        return None, _not_installed("trl")
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        )
        return outputs[0], outputs[1]

    return run, ""


def grpo_loss(device: str) -> tuple[GrpoLoss | None, str]:
    """(liger's chunked GRPO loss, "") or (None, why it is absent)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None, _not_installed("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="grpo", use_ref_model=False
    )

    def run(hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        mask = torch.ones_like(old)
        return loss(hidden, weight, ids, mask, advantages, old_per_token_logps=old)[0]

    return run, ""


def sliced_log_softmax(logits: Tensor, rows: int = 64) -> Tensor:
    """(N, V) log-probs from full logits, 64 rows at a time, as the method was released."""
    return torch.cat([torch.log_softmax(part.float(), 1) for part in logits.split(rows)])


def sliced_logprobs(logits: Tensor, ids: Tensor, rows: int = 64) -> Tensor:
    """(N, K) log-probs of ids from full logits, 64 rows at a time, as the method was released."""
    parts = zip(logits.split(rows), ids.split(rows), strict=True)
    return torch.cat([torch.log_softmax(z.float(), 1).gather(1, i) for z, i in parts])


def _not_installed(module: str) -> str:
    return f"not installed: pip install {PACKAGES[module]}"


def _torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


def _negative(function: Callable[..., Tensor]) -> OneLogprob:
    """Log-probs from a cross entropy of each row."""
    return lambda hidden, weight, target: -function(hidden, weight, target)


def _cut_cross_entropy(impl: str, reduction: str = "none") -> OneLogprob:
    from cut_cross_entropy import linear_cross_entropy

    return _negative(partial(linear_cross_entropy, reduction=reduction, impl=impl))


def _trl() -> OneLogprob:
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return run


def _liger(reduction: str = "none") -> OneLogprob:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _negative(partial(liger_fused_linear_cross_entropy, reduction=reduction))


def _quack(reduction: str = "none") -> OneLogprob:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _negative(partial(chunked_linear_cross_entropy, reduction=reduction))


def _summed(make: Callable[..., OneLogprob], *arguments: str) -> Callable[[], OneToken]:
    return lambda: _negative(make(*arguments, reduction="sum"))


# the peers that have a kernel for the sum, whose gradient they may form in their forward
SUMMED: dict[str, Callable[[], OneToken]] = {
    "F.linear_cross_entropy": lambda: _torch_chunked,
    "cut-cross-entropy torch_compile": _summed(_cut_cross_entropy, "torch_compile"),
    "cut-cross-entropy cce": _summed(_cut_cross_entropy, "cce"),
    "liger fused linear CE": _summed(_liger),
    "quack linear CE": _summed(_quack),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, compiled on first use and apart from what was compiled before it."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
