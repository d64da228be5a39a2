"""linear_logprobs against the bare `hidden @ weight.T`, eager PyTorch on full logits and the peers installed.

Forward: lse, log-prob of one token per row, entropy. Forward + backward: log-probs of K tokens per row; the
peers know one token a row only, so their rows stand beside ours at one token and at K. Growth: the same work
for 8 times the rows, as a multiple of the smaller batch's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import K, Shape, inputs, shapes
from benchmarks.measure import Case, assert_close
from benchmarks.peers import OneToken, one_token
from benchmarks.sequences import kernels
from ipvrm_kernels import linear_logprobs

OP = "linear_logprobs"
GROWTH = 8


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """log_softmax of full logits, as trainers write it."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    return log_p.gather(1, ids), -(log_p.exp() * log_p).sum(1) if entropy else log_p


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield _forward(shape, device)
        for frozen in (False, True):
            yield _step(shape, device, frozen)
    for frozen in (False, True):
        yield _growth(shapes(device, quick)[0], device, frozen)


def _forward(shape: Shape, device: str) -> Case:
    hidden, weight, ids = inputs(shape, device)
    sampled = ids[:, 0].contiguous()
    peers, absent = one_token(device)

    def ours(impl: str) -> Callable[[], Any]:
        return lambda: linear_logprobs(hidden, weight, sampled, return_entropy=True, impl=impl)

    def peer(function: OneToken) -> Callable[[], Any]:
        return torch.no_grad()(lambda: function(hidden, weight, sampled))

    implementations = kernels(OP, device)
    contenders: dict[str, Callable[[], Any]] = {
        "matmul": lambda: hidden @ weight.T,
        **{name: ours(name) for name in implementations},
        "eager log_softmax": lambda: eager(hidden, weight, sampled[:, None], True),
        **{name: peer(function) for name, function in peers.items()},
    }

    def check(results: Mapping[str, Any]) -> None:
        log_p, entropy = eager(hidden.float(), weight.float(), sampled[:, None], True)
        for name in implementations:
            assert_close(f"{name} log-probs", results[name].logprobs, log_p[:, 0], 1e-3)
            assert_close(f"{name} entropy", results[name].entropy, entropy, 1e-3)
        for name in peers.keys() & results.keys():
            assert_close(name, results[name], -log_p.sum(), 1e-2)

    return Case(OP, f"{shape} lse + sampled + entropy", contenders, check, shape.flops, absent=absent)


def _step(shape: Shape, device: str, frozen: bool) -> Case:
    hidden, weight, ids = inputs(shape, device)
    sampled, upstream = ids[:, 0].contiguous(), torch.randn(ids.shape, device=device)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(not frozen))[: 1 if frozen else 2]
    peers, absent = one_token(device)

    def ours(impl: str, ids: Tensor, upstream: Tensor) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            out = linear_logprobs(hidden, weight, ids, impl=impl)
            return torch.autograd.grad(out.logprobs, leaves, upstream)

        return run

    def peer(function: OneToken) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(hidden, weight, sampled), leaves)

    def eager_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(eager(hidden, weight, ids, False)[0], leaves, upstream)

    minus_one = -torch.ones_like(sampled, dtype=torch.float32)
    implementations = kernels(OP, device)
    one_id = {f"{name}, one id": ours(name, sampled, minus_one) for name in implementations}
    contenders: dict[str, Callable[[], Any]] = {
        "matmul": lambda: hidden.detach() @ weight.detach().T,
        **{name: ours(name, ids, upstream) for name in implementations},
        "eager log_softmax": eager_step,
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
    title = f"{shape} K={K} forward+backward {kind} head"
    late = {f"{name}, one id": reason for name, reason in absent.items()}
    return Case(OP, title, contenders, check, shape.flops, absent=late)


def _growth(shape: Shape, device: str, frozen: bool) -> Case:
    """The default implementation at N and GROWTH * N rows; the first row's memory must be the last's."""
    contenders: dict[str, Callable[[], Any]] = {}
    large = shape._replace(N=GROWTH * shape.N)
    hidden, weight, ids = inputs(large, device)
    upstream = torch.randn(ids.shape, device=device)
    weight.requires_grad_(not frozen)
    for N in (shape.N, large.N):
        rows = hidden[:N].clone().requires_grad_()
        leaves = (rows,) if frozen else (rows, weight)

        def run(rows: Tensor = rows, leaves: tuple[Tensor, ...] = leaves, N: int = N) -> tuple[Tensor, ...]:
            out = linear_logprobs(rows, weight, ids[:N])
            return torch.autograd.grad(out.logprobs, leaves, upstream[:N])

        contenders[f"N={N}"] = run

    def check(results: Mapping[str, Any]) -> None:
        small, big = (results[name][0] for name in contenders)
        assert_close("rows of the larger batch", big[: shape.N], small, 1e-4)

    kind = "frozen" if frozen else "trainable"
    title = f"D={shape.D} V={shape.V} K={K} growth with N, {kind} head"
    return Case(OP, title, contenders, check, min_rounds=3)
