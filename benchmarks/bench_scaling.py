"""How time and memory grow: the head over N, V and K, the scans over the sequence length to 32,768 tokens.

Each curve is a series of cases that differ in one size; the exponents are fitted over all its points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_linear_candidates import check_candidates
from benchmarks.bench_linear_logprobs import check_forward, step_case
from benchmarks.bench_segment_scan import LONGEST_LOOP
from benchmarks.suite.exact import Exact
from benchmarks.suite.heads import GROWTH_TARGET, Shape, inputs
from benchmarks.suite.measure import START, Case, Target, assert_close
from benchmarks.suite.roofline import expected
from benchmarks.suite.sequences import edges, forward_backward, kernels
from ipvrm_kernels import linear_candidates, linear_logprobs, prefix_value_loss, prefix_values, segment_scan

OP = "scaling"
LENGTHS = (512, 2048, 8192, 32_768)
SEQUENCES = 4
GROWING = {  # as the roofline calls them
    "forward": "forward",
    "forward + candidates": "candidates",
    "forward+backward, trainable head": "trainable",
    "forward+backward, frozen head": "frozen",
}


def cases(device: str, quick: bool) -> Iterator[Case]:
    small, dtype = device == "cpu", torch.float32 if device == "cpu" else torch.bfloat16
    base = base_shape(device, quick)
    rows = (256, 1024, 4096, 16_384) if small else (1024, 8192, 65_536)
    columns = (2048, 8192, 32_768, 131_072) if small else (32_000, 64_000, 128_256, 256_000)
    few = 3 if quick and small else None  # a GPU's quick look spends less time on each point alone
    for N in rows[:few]:
        yield head_case(base._replace(N=N), device, "N")
    for V in columns[:few]:
        yield head_case(base._replace(V=V), device, "V")
    for ids in (1, 2, 5, 10):
        yield head_case(base._replace(K=ids), device, "K")
    for make in (scan_case, values_case, loss_case):
        for T in LENGTHS[:few]:
            yield make(T, device)
    target = Shape(2048, 1024, 32_000 if small else 151_936, dtype)
    if quick and small:
        target = Shape(256, 128, 4096, dtype)
    for kind in GROWING:
        for N in (target.N, 23 * target.N // 8, 8 * target.N):
            with_target = target.N == 2048 and N == 8 * target.N
            yield target_case(target._replace(N=N), device, kind, with_target)


def full_cases(device: str) -> Iterator[Case]:
    """The ends of the curve over N; on a GPU 65,536 rows are in `cases`."""
    for N in (64, 65_536) if device == "cpu" else (64,):
        yield head_case(base_shape(device, quick=False)._replace(N=N), device, "N")


def base_shape(device: str, quick: bool) -> Shape:
    """What stays of the head's curves when one size grows."""
    if device == "cuda":
        return Shape(8192, 1024, 151_936, torch.bfloat16)
    return Shape(256, 128, 4096, torch.float32) if quick else Shape(512, 256, 8192, torch.float32)


def head_case(shape: Shape, device: str, axis: str) -> Case:
    """Forward + backward, trainable: the bare matmul, ours, eager."""
    case = step_case(shape, device, frozen=False, with_peers=False, with_compile=False)
    fixed = " ".join(f"{letter}={size}" for letter, size in shape.axes.items() if letter != axis)
    series = f"{fixed} log-probs forward+backward"
    return replace(case, op=f"linear_logprobs over {axis}", curve=axis, series=series)


def target_case(shape: Shape, device: str, kind: str, with_target: bool) -> Case:
    """A point of the growth over N that has a target: ours alone, at full size it takes minutes."""
    hidden, weight, ids = inputs(shape, device)
    sampled, upstream = ids[:, 0].contiguous(), torch.randn(ids.shape, device=device)
    leaves = (hidden, weight)[: 1 if kind.endswith("frozen head") else 2]
    if "backward" in kind:
        for leaf in leaves:
            leaf.requires_grad_()

    def forward(impl: str) -> Any:
        return linear_logprobs(hidden, weight, sampled, return_entropy=True, impl=impl)

    def candidates(impl: str) -> Any:
        return linear_candidates(hidden, weight, sampled=sampled, return_entropy=True, impl=impl)

    def step(impl: str) -> Any:
        return torch.autograd.grad(linear_logprobs(hidden, weight, ids, impl=impl).logprobs, leaves, upstream)

    op = "linear_candidates" if kind == "forward + candidates" else "linear_logprobs"
    run = step if "backward" in kind else candidates if op == "linear_candidates" else forward

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        for name, out in results.items():
            if run is step:
                exact.compare_gradients(name, out, ids, upstream)
            elif run is candidates:
                check_candidates(exact, name, out, sampled)
            else:
                check_forward(exact, name, out, exact.log_p.gather(1, sampled[exact.rows, None])[:, 0])

    names = kernels(op, device)
    return Case(
        f"{op} over N", f"{shape} K={shape.K}, {kind}", {name: lambda name=name: run(name) for name in names},
        check, min_rounds=3, axes=shape.axes, curve="N", series=f"D={shape.D} V={shape.V} K={shape.K} {kind}",
        targets=dict.fromkeys(names, Target(GROWTH_TARGET, START)) if with_target else {},
        expected=expected(GROWING[kind], shape, names, device),
    )  # fmt: skip


def scan_case(T: int, device: str) -> Case:
    """On a GPU the loop takes a second beyond LONGEST_LOOP steps: then the reference stands in its place."""
    cu, x = _packed(T, device)

    def loop() -> Tensor:
        padded = x.view(SEQUENCES, T)
        carry, columns = torch.zeros_like(padded[:, 0]), []
        for t in reversed(range(T)):
            carry = padded[:, t] + 0.95 * carry
            columns.append(carry)
        return torch.stack(columns[::-1], dim=1)

    ours = {
        impl: lambda impl=impl: segment_scan(x, cu, 0.95, True, impl=impl)
        for impl in kernels("segment_scan", device)
    }

    def reference() -> Tensor:
        return segment_scan(x, cu, 0.95, True, impl="torch")

    looped = device == "cpu" or T <= LONGEST_LOOP
    first = {"padded loop": loop} if looped else {"torch": reference}
    return _case("segment_scan", T, {**first, **ours}, 8)


def values_case(T: int, device: str) -> Case:
    cu, x = _packed(T, device)
    count = torch.arange(1, T + 1, device=device, dtype=torch.float32)

    def eager() -> tuple[Tensor, ...]:
        value = 10.0 * x.view(SEQUENCES, T).cumsum(1)
        mean = value / count
        return value, mean, mean.sigmoid(), 10.0 * x

    ours = {
        impl: lambda impl=impl: prefix_values(x, cu, impl=impl) for impl in kernels("prefix_values", device)
    }
    return _case("prefix_values", T, {"padded eager": eager, **ours}, 20)


def loss_case(T: int, device: str) -> Case:
    cu, x = _packed(T, device)
    outcome = (torch.arange(SEQUENCES, device=device) % 2).float()
    count = torch.arange(1, T + 1, device=device, dtype=torch.float32)

    def eager(x: Tensor) -> Tensor:
        mean = 10.0 * x.view(SEQUENCES, T).cumsum(1) / count
        return F.softplus(5.0 - (2 * outcome - 1)[:, None] * mean).mean()

    ours = {
        impl: forward_backward(lambda x, impl=impl: prefix_value_loss(x, cu, outcome, impl=impl), x)
        for impl in kernels("prefix_value_loss", device)
    }
    return _case("prefix_value_loss", T, {"padded eager": forward_backward(eager, x), **ours}, 16)


def _packed(T: int, device: str) -> tuple[Tensor, Tensor]:
    return edges([T] * SEQUENCES, device), 0.05 * torch.randn(SEQUENCES * T, device=device)


def _case(op: str, T: int, contenders: dict[str, Callable[[], Any]], bytes_per_token: int) -> Case:
    def check(results: Mapping[str, Any]) -> None:
        expected = next(iter(results.values()))
        for name, result in results.items():
            pairs = [(result, expected)] if isinstance(result, Tensor) else zip(result, expected, strict=True)
            for got, wanted in pairs:
                assert_close(name, got.reshape(-1), wanted.reshape(-1), 1e-4)

    return Case(
        f"{op} over T", f"B={SEQUENCES} T={T}", contenders, check, num_bytes=bytes_per_token * SEQUENCES * T,
        axes=dict(B=SEQUENCES, T=T), curve="T", series=f"B={SEQUENCES}",
    )  # fmt: skip
