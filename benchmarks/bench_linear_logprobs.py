"""linear_logprobs against the bare `hidden @ weight.T`, log-softmax of full logits (eager, compiled, in the
released slices of 64 rows) and the peers installed.

Forward: lse, log-prob of one token per row, entropy; where a contender gives the log-prob alone, beside ours
without entropy. Forward + backward: log-probs of K tokens per row; the peers know one token a row only, so
their rows stand beside ours at one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import Shape, inputs, more_shapes, shapes
from benchmarks.measure import Case, assert_close
from benchmarks.peers import OneToken, compiled, one_token, sliced_logprobs
from benchmarks.sequences import kernels
from ipvrm_kernels import linear_logprobs

OP = "linear_logprobs"
ALONE = ", log-prob alone"
LARGEST_TRAINED = 1 << 30  # bytes of weight up to which a CPU run takes its gradient, by every contender


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """log_softmax of full logits, as trainers write it."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    return log_p.gather(1, ids), -(log_p.exp() * log_p).sum(1) if entropy else log_p


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield forward_case(shape, device)
        for frozen in (False, True):
            peers_too = quick or not frozen or device == "cuda"  # half a minute a round for them at full size
            yield step_case(shape, device, frozen, peers_too, with_compile=not (quick and frozen))


def full_cases(device: str) -> Iterator[Case]:
    for shape in more_shapes(device):
        large = device == "cpu" and shape.V * shape.D * shape.dtype.itemsize > LARGEST_TRAINED
        if shape.K not in (1, 5, 10):
            yield forward_case(shape, device)
        yield step_case(shape, device, frozen=large, with_peers=device == "cuda")


def forward_case(shape: Shape, device: str) -> Case:
    hidden, weight, ids = inputs(shape, device)
    sampled = ids[:, 0].contiguous()
    peers, absent = one_token(device)
    compiled_eager = compiled(eager)

    def ours(impl: str, entropy: bool) -> Callable[[], Any]:
        return lambda: linear_logprobs(hidden, weight, sampled, return_entropy=entropy, impl=impl)

    def peer(function: OneToken) -> Callable[[], Any]:
        return torch.no_grad()(lambda: function(hidden, weight, sampled))

    implementations = kernels(OP, device)
    contenders: dict[str, Callable[[], Any]] = {
        "matmul": lambda: hidden @ weight.T,
        **{name: ours(name, True) for name in implementations},
        "eager log_softmax": lambda: eager(hidden, weight, sampled[:, None], True),
        "torch.compile of eager": lambda: compiled_eager(hidden, weight, sampled[:, None], True),
        **{f"{name}{ALONE}": ours(name, False) for name in implementations},
        f"released 64-row slices{ALONE}": lambda: sliced_logprobs(hidden @ weight.T, sampled[:, None]),
        **{f"{name}{ALONE}": peer(function) for name, function in peers.items()},
    }

    def check(results: Mapping[str, Any]) -> None:
        log_p, entropy = eager(hidden.float(), weight.float(), sampled[:, None], True)
        for name in implementations:
            assert_close(f"{name} log-probs", results[name].logprobs, log_p[:, 0], 1e-3)
            assert_close(f"{name} entropy", results[name].entropy, entropy, 1e-3)
        for name in peers:
            if f"{name}{ALONE}" in results:
                assert_close(name, results[f"{name}{ALONE}"], -log_p.sum(), 1e-2)

    title = f"{shape} lse + sampled + entropy"
    late = {f"{name}{ALONE}": reason for name, reason in absent.items()}
    return Case(OP, title, contenders, check, shape.flops, absent=late, axes=shape.axes)


def step_case(
    shape: Shape, device: str, frozen: bool, with_peers: bool = True, with_compile: bool = True
) -> Case:
    """with_compile: false spares the seconds that torch.compile takes before its first call."""
    hidden, weight, ids = inputs(shape, device)
    sampled, upstream = ids[:, 0].contiguous(), torch.randn(ids.shape, device=device)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(not frozen))[: 1 if frozen else 2]
    peers, absent = one_token(device) if with_peers else ({}, {})

    def ours(impl: str, ids: Tensor, upstream: Tensor) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            out = linear_logprobs(hidden, weight, ids, impl=impl)
            return torch.autograd.grad(out.logprobs, leaves, upstream)

        return run

    def peer(function: OneToken) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(hidden, weight, sampled), leaves)

    def full_logits(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(hidden, weight, ids, False)[0], leaves, upstream)

    def released() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sliced_logprobs(hidden @ weight.T, ids), leaves, upstream)

    minus_one = -torch.ones_like(sampled, dtype=torch.float32)
    implementations = kernels(OP, device)
    one_id = {f"{name}, one id": ours(name, sampled, minus_one) for name in implementations}
    contenders: dict[str, Callable[[], Any]] = {
        "matmul": lambda: hidden.detach() @ weight.detach().T,
        **{name: ours(name, ids, upstream) for name in implementations},
        "eager log_softmax": full_logits(eager),
    }
    if with_compile:
        contenders["torch.compile of eager"] = full_logits(compiled(eager))
    if with_peers:
        contenders |= {
            "released 64-row slices": released,
            **one_id,
            **{f"{name}, one id": peer(function) for name, function in peers.items()},
        }

    def check(results: Mapping[str, Any]) -> None:
        tolerance = 2e-2 if shape.dtype == torch.bfloat16 else 1e-4
        for name, gradients in results.items():
            if name == "matmul":
                continue
            expected = results[next(iter(one_id)) if name.endswith("one id") else "eager log_softmax"]
            for mine, theirs in zip(gradients, expected, strict=True):
                assert_close(name, mine, theirs, tolerance)

    kind = "frozen" if frozen else "trainable"
    title = f"{shape} K={shape.K} forward+backward {kind} head"
    late = {f"{name}, one id": reason for name, reason in absent.items()}
    return Case(OP, title, contenders, check, shape.flops, absent=late, axes=shape.axes)
