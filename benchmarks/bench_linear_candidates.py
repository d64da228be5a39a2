"""linear_candidates (with lse, sampled log-prob and entropy) against the bare matmul and log-softmax + top-k
of full logits (eager, compiled, in the released slices of 64 rows, these without entropy): on rows with 1.33
candidates of p >= 0.1 each, and on plain random ones, which have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact
from benchmarks.suite.heads import (
    MIN_PROB,
    SLOTS,
    Calibrated,
    Shape,
    by_the_other,
    calibrated,
    inputs,
    matmuls,
    measured,
    more_shapes,
    shapes,
    targets,
)
from benchmarks.suite.measure import LESS_WORK, Case, assert_within
from benchmarks.suite.peers import compiled, sliced_log_softmax
from benchmarks.suite.roofline import expected
from benchmarks.suite.sequences import kernels
from ipvrm_kernels import linear_candidates
from ipvrm_kernels.linear_candidates import Candidates

OP = "linear_candidates"
RELEASED_TOP = 5


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in shapes(device, quick):
        yield candidates_case(shape, device)
    yield candidates_case(shapes(device, quick)[0], device, random=True, with_compile=not quick)


def full_cases(device: str) -> Iterator[Case]:
    for shape in more_shapes(device):
        if shape.K not in (1, 5, 10):  # the op has no K of its own
            yield candidates_case(shape, device)


def eager(hidden: Tensor, weight: Tensor, sampled: Tensor) -> tuple[Tensor, ...]:
    """log_softmax of full logits, its best SLOTS, the sampled token and the entropy."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    best = log_p.topk(SLOTS, 1)
    return best.values, best.indices, log_p.gather(1, sampled[:, None]), -(log_p.exp() * log_p).sum(1)


def candidates_case(shape: Shape, device: str, random: bool = False, with_compile: bool = True) -> Case:
    if random:
        hidden, weight, ids = inputs(shape, device)
        mean, mass, entropy = measured(hidden, weight)
        rows = Calibrated(hidden, weight, ids[:, 0].contiguous(), mean, mass, entropy)
        kind = f"random: {mean:.2f} candidates a row, entropy {entropy:.2f}"
    else:
        rows = calibrated(shape, device)
        kind = str(rows)
    hidden, weight, sampled = rows.hidden, rows.weight, rows.sampled

    def released() -> Any:
        log_p = sliced_log_softmax(hidden @ weight.T)
        return log_p.topk(RELEASED_TOP, 1), log_p.gather(1, sampled[:, None])

    def ours(impl: str, entropy: bool) -> Callable[[], Any]:
        return lambda: linear_candidates(hidden, weight, sampled=sampled, return_entropy=entropy, impl=impl)

    implementations = kernels(OP, device)
    full = {name: ours(name, True) for name in implementations}
    others_of_ours = by_the_other(full, shape, device)
    contenders: dict[str, Callable[[], Any]] = {
        **matmuls(hidden, weight),
        **full,
        **others_of_ours,
        "eager log_softmax + topk": lambda: eager(hidden, weight, sampled),
        **{f"{name}, no entropy": ours(name, False) for name in implementations},
        f"released 64-row slices + top {RELEASED_TOP}, no entropy": released,
    }

    if with_compile:
        compiled_eager = compiled(eager)
        contenders["torch.compile of eager"] = lambda: compiled_eager(hidden, weight, sampled)

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        for name in own:
            if name in results:
                check_candidates(exact, name, results[name], sampled)

    def errors(results: Mapping[str, Any]) -> Mapping[str, float]:
        """Of the sampled token's log-prob."""
        exact = Exact(hidden, weight)
        right = exact.log_p.gather(1, sampled[exact.rows, None])[:, 0]
        found = {}
        for name, result in results.items():
            if name not in LESS_WORK:
                given = result.sampled_logprobs if name in own else result[1 if "no entropy" in name else 2]
                found[name] = exact.error(given.view(shape.N), right)
        return found

    own = [n for name in implementations for n in (name, f"{name}, no entropy")] + [*others_of_ours]
    aims = {} if random else targets("candidates", shape, implementations, device)
    return Case(
        OP, f"{shape}, {kind}", contenders, check, shape.flops, shape.flops,
        axes={**shape.axes, "K": SLOTS}, targets=aims,
        expected=expected("candidates", shape, implementations, device), errors=errors,
    )  # fmt: skip


def check_candidates(exact: Exact, name: str, out: Candidates, sampled: Tensor) -> None:
    """The set (of rows without a token within 1e-4 of MIN_PROB), counts, log-probs, lse, entropy, sampled."""
    p, ids, got = exact.log_p.exp(), out.ids[exact.rows], out.logprobs[exact.rows]
    used = ids >= 0
    clear = ((p - MIN_PROB).abs() > 1e-4).all(1)
    found = torch.zeros_like(p, dtype=torch.int32)
    found.scatter_add_(1, ids.clamp(min=0), used.int())
    assert ((found == (p >= MIN_PROB)).all(1) | ~clear).all(), f"{name}: not the exact set"
    assert (out.counts[exact.rows] == used.sum(1)).all(), f"{name}: counts"
    assert (got[~used] == -torch.inf).all() and (got[:, :-1] >= got[:, 1:]).all(), f"{name}: not sorted"
    right = exact.log_p.gather(1, ids.clamp(min=0))
    assert_within(f"{name} log-probs", got[used], right[used], exact.allowed)
    exact.compare(f"{name} lse", out.lse, exact.lse)
    log_p = exact.log_p.gather(1, sampled[exact.rows, None])[:, 0]
    exact.compare(f"{name} sampled log-probs", out.sampled_logprobs, log_p)
    if out.entropy is not None:
        exact.compare(f"{name} entropy", out.entropy, exact.entropy, exact.entropy_allowed)
