"""linear_logprobs against the bare `hidden @ weight.T`, log-softmax of full logits (eager, compiled, in the
released slices of 64 rows) and the peers installed.

Forward: lse, log-prob of one token per row, entropy; where a contender gives the log-prob alone, beside ours
without entropy. Forward + backward: log-probs of K tokens per row; the peers know one token a row only, so
their rows stand beside ours at one token. Peers that return a scalar can form its gradient in their forward:
beside them stand linear_logprobs, whose gradient per token comes later, and our scalar loss of one token a
row, linear_distrl_loss without candidates. "logits kept": with a workspace that holds them, on the CPU.
"by blas", "by onednn": ours by the matmul library that is not the default on this processor.
"shared ids": the same K in every row, which is what liger's selected_token_ids can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact
from benchmarks.suite.heads import (
    SAVED_TARGETS,
    Calibrated,
    Shape,
    by_the_other,
    inputs,
    matmuls,
    more_shapes,
    shapes,
    targets,
)
from benchmarks.suite.measure import ACCURACY, LESS_WORK, Case, Target, assert_close, is_ours
from benchmarks.suite.peers import (
    OneLogprob,
    OneToken,
    compiled,
    logprobs,
    one_token,
    shared_ids,
    sliced_logprobs,
    with_entropy,
)
from benchmarks.suite.roofline import expected
from benchmarks.suite.sequences import edges, kernels
from ipvrm_kernels import linear_distrl_loss, linear_logprobs
from ipvrm_kernels.head.blocks import WORKSPACE
from ipvrm_kernels.linear_logprobs import LinearLogprobs

OP = "linear_logprobs"
SCALAR_OP = "linear_distrl_loss"
ALONE = ", log-prob alone"
CHUNKED = "F.linear_cross_entropy"  # the peer that a target names
TRL, LIGER = "TRL chunked log-prob", "liger fused linear CE"  # the same on a GPU
TRL_ENTROPY = "TRL chunked log-prob + entropy"
SHARED, LIGER_SHARED = ", shared ids", "liger selected_token_ids"
ROUNDED = 0.5  # by which a log-prob from logits of 32 in bf16 may be off, and still be meant
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
    trl, no_trl = with_entropy()
    compiled_eager = compiled(eager)

    def ours(impl: str, entropy: bool) -> Callable[[], Any]:
        return lambda: linear_logprobs(hidden, weight, sampled, return_entropy=entropy, impl=impl)

    def peer(function: OneToken) -> Callable[[], Any]:
        return torch.no_grad()(lambda: function(hidden, weight, sampled))

    implementations = kernels(OP, device)
    own = {name: ours(name, True) for name in implementations}
    own_alone = {f"{name}{ALONE}": ours(name, False) for name in implementations}
    contenders: dict[str, Callable[[], Any]] = {
        **matmuls(hidden, weight),
        **own,
        "eager log_softmax": lambda: eager(hidden, weight, sampled[:, None], True),
        "torch.compile of eager": lambda: compiled_eager(hidden, weight, sampled[:, None], True),
        **({TRL_ENTROPY: torch.no_grad()(lambda: trl(hidden, weight, sampled))} if trl else {}),
        **own_alone,
        **by_the_other(own | own_alone, shape, device),
        f"released 64-row slices{ALONE}": lambda: sliced_logprobs(hidden @ weight.T, sampled[:, None]),
        **{f"{name}{ALONE}": peer(function) for name, function in peers.items()},
    }

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        log_p = exact.log_p.gather(1, sampled[exact.rows, None])[:, 0]
        mine = [name for name in results if is_ours(name)]
        for name in mine:
            check_forward(exact, name, results[name], log_p)
        if TRL_ENTROPY in results:
            for got, right in zip(results[TRL_ENTROPY], (log_p, exact.entropy), strict=True):
                assert_close(TRL_ENTROPY, got[exact.rows], right, 1e-2)
        total = -results[mine[0]].logprobs.sum()  # of rows that are known to be right, as the peers sum them
        allowed = 1e-2 if shape.dtype == torch.float32 else 3e-2  # whose logits and sum are rounded
        for name in (f"{name}{ALONE}" for name in peers):
            if name in results:
                assert_close(name, results[name], total, allowed)

    def errors(results: Mapping[str, Any]) -> Mapping[str, float]:
        exact = Exact(hidden, weight)
        log_p = exact.log_p.gather(1, sampled[exact.rows, None])[:, 0]
        found = {}
        for name, result in results.items():
            a_sum = isinstance(result, Tensor) and not result.dim()  # over the rows: no error of its own
            if name not in LESS_WORK and not a_sum:
                given = result if isinstance(result, Tensor) else result[0]
                found[name] = exact.error(given.view(shape.N), log_p)
        return found

    title = f"{shape} lse + sampled + entropy"
    late = {f"{name}{ALONE}": reason for name, reason in absent.items()}
    late |= {} if trl else {TRL_ENTROPY: no_trl}
    aims = targets("forward", shape, implementations, device)
    if aims and device == "cpu":
        aims |= {f"{name}{ALONE}": Target(1 / 3, f"{CHUNKED}{ALONE}") for name in implementations}
    elif aims:
        aims |= {f"{name}{ALONE}": Target(1 / 3, f"{TRL}{ALONE}") for name in implementations}
    return Case(
        OP, title, contenders, check, shape.flops, shape.flops, absent=late, axes=shape.axes, targets=aims,
        expected=expected("forward", shape, implementations, device), errors=errors,
    )  # fmt: skip


def check_forward(exact: Exact, name: str, out: LinearLogprobs, log_p: Tensor) -> None:
    """log-probs, with log_p those expected on exact.rows, lse and, where it is there, entropy."""
    exact.compare(f"{name} log-probs", out.logprobs, log_p)
    exact.compare(f"{name} lse", out.lse, exact.lse)
    if out.entropy is not None:
        exact.compare(f"{name} entropy", out.entropy, exact.entropy, exact.entropy_allowed)


def accuracy_case(shape: Shape, rows: Calibrated, device: str) -> Case:
    """The log-prob of one token a row, of calibrated or peaked rows: what of it is right, against fp64.

    Liger's selected_token_ids are the same in every row: there it is that of the first row's token, as much
    work as one of each row's own.
    """
    hidden, weight, sampled = rows.hidden, rows.weight, rows.sampled
    peers, absent = logprobs(device)
    liger_shared, no_shared = shared_ids()
    implementations = kernels(OP, device)
    functions: dict[str, OneLogprob] = {
        **{
            name: lambda h, w, target, name=name: linear_logprobs(h, w, target, impl=name).logprobs
            for name in implementations
        },
        "eager log_softmax": lambda h, w, target: eager(h, w, target[:, None], False)[0][:, 0],
        "released 64-row slices": lambda h, w, target: sliced_logprobs(h @ w.T, target[:, None])[:, 0],
        **peers,
    }
    if liger_shared is None:
        absent[LIGER_SHARED] = no_shared
    else:
        functions[LIGER_SHARED] = lambda h, w, target: liger_shared(h, w, target[:1])[:, 0]

    def call(function: OneLogprob) -> Callable[[], Any]:
        return torch.no_grad()(lambda: function(hidden, weight, sampled))

    def expected_of(exact: Exact, name: str) -> Tensor:
        ids = sampled[:1].expand(shape.N) if name == LIGER_SHARED else sampled
        return exact.log_p.gather(1, ids[exact.rows, None])[:, 0]

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        for name in functions.keys() & results.keys():  # others' logits may be rounded to half precision
            allowed = None if is_ours(name) else ROUNDED
            exact.compare(f"{name} log-probs", results[name], expected_of(exact, name), allowed)

    def errors(results: Mapping[str, Any]) -> Mapping[str, float]:
        exact = Exact(hidden, weight)
        judged = functions.keys() & results.keys()
        return {name: exact.error(results[name], expected_of(exact, name)) for name in judged}

    contenders = {
        **matmuls(hidden, weight),
        **{n: call(function) for n, function in functions.items()},
    }
    return Case(
        OP, f"{shape} {ACCURACY}, {rows}", contenders, check, shape.flops, shape.flops,
        absent=absent, axes=shape.axes, errors=errors,
    )  # fmt: skip


def step_case(
    shape: Shape, device: str, frozen: bool, with_peers: bool = True, with_compile: bool = True
) -> Case:
    """with_compile: false spares the seconds that torch.compile takes before its first call."""
    hidden, weight, ids = inputs(shape, device)
    sampled, upstream = ids[:, 0].contiguous(), torch.randn(ids.shape, device=device)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(not frozen))[: 1 if frozen else 2]
    peers, absent = one_token(device) if with_peers else ({}, {})

    def ours(impl: str, ids: Tensor, upstream: Tensor, workspace: int | None = None) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            out = linear_logprobs(hidden, weight, ids, max_workspace_bytes=workspace, impl=impl)
            return torch.autograd.grad(out.logprobs, leaves, upstream)

        return run

    def peer(function: OneToken) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(hidden, weight, sampled), leaves)

    def full_logits(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(hidden, weight, ids, False)[0], leaves, upstream)

    def released() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sliced_logprobs(hidden @ weight.T, ids), leaves, upstream)

    def scalar_loss(impl: str, workspace: int | None = None) -> Callable[[], Any]:
        with torch.no_grad():
            old = linear_logprobs(hidden, weight, sampled).logprobs
        none, ones = old.new_empty(len(old), 0), torch.ones_like(old)  # ratio 1: d loss / d log-prob = -1
        edge, no_ids = edges([len(old)], device), ids[:, :0]

        def run() -> tuple[Tensor, ...]:
            out = linear_distrl_loss(
                hidden, weight, sampled, no_ids, old, none, ones, none, edge,
                reduction="token_mean", token_denominator=1.0, max_workspace_bytes=workspace, impl=impl,
            )  # fmt: skip
            return torch.autograd.grad(out.loss, leaves)

        return run

    minus_one = -torch.ones_like(sampled, dtype=torch.float32)
    shared = ids[0].contiguous()  # (K,) the same of every row
    all_shared = shared.expand(ids.shape).contiguous()
    liger_shared, no_shared = shared_ids() if with_peers else (None, "")

    def run_shared() -> tuple[Tensor, ...]:
        assert liger_shared is not None
        return torch.autograd.grad(liger_shared(hidden, weight, shared), leaves, upstream)

    implementations = kernels(OP, device)
    one_id = {f"{name}, one id": ours(name, sampled, minus_one) for name in implementations}
    workspace = WORKSPACE + 4 * shape.N * shape.V
    saving = implementations if device == "cpu" and not frozen else []
    own = {name: ours(name, ids, upstream) for name in implementations}
    saved = {f"{name} logits kept, one id": ours(name, sampled, minus_one, workspace) for name in saving}
    scalar = {f"{name} linear_distrl_loss, one id": (name, None) for name in kernels(SCALAR_OP, device)}
    scalar |= {f"{name} linear_distrl_loss logits kept, one id": (name, workspace) for name in saving}
    contenders: dict[str, Callable[[], Any]] = {
        **matmuls(hidden, weight),
        **own,
        **by_the_other(own, shape, device),
        **{f"{name} logits kept": ours(name, ids, upstream, workspace) for name in saving},
        "eager log_softmax": full_logits(eager),
    }
    if with_compile:
        contenders["torch.compile of eager"] = full_logits(compiled(eager))
    contenders["released 64-row slices"] = released
    if with_peers:
        contenders |= {
            **one_id,
            **saved,
            **{label: scalar_loss(*options) for label, options in scalar.items()},
            **{f"{name}, one id": peer(function) for name, function in peers.items()},
            **{f"{name}{SHARED}": ours(name, all_shared, upstream) for name in implementations},
            **({f"{LIGER_SHARED}{SHARED}": run_shared} if liger_shared else {}),
        }

    def asked(name: str) -> tuple[Tensor, Tensor]:
        """(ids, upstream) of a contender."""
        if name.endswith("one id"):
            return sampled[:, None], minus_one[:, None]
        return (all_shared if name.endswith(SHARED) else ids), upstream

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        first_of_ours = next(iter(one_id))
        for name, gradients in results.items():
            if name in LESS_WORK:
                continue
            other = results.get("eager log_softmax")
            if name.endswith("one id"):  # the peers' dweight in full against ours
                other = results.get(first_of_ours) if name != first_of_ours else None
            elif name.endswith(SHARED):
                other = None
            exact.compare_gradients(name, gradients, *asked(name), other)

    def errors(results: Mapping[str, Any]) -> Mapping[str, float]:
        exact, right = Exact(hidden, weight), {}
        for name in results:
            variant = name.partition(", ")[2]
            if variant not in right:
                right[variant] = exact.dhidden(*asked(name))
        return {
            name: exact.relative_error(gradients[0], right[name.partition(", ")[2]])
            for name, gradients in results.items()
            if name not in LESS_WORK
        }

    kind = "frozen" if frozen else "trainable"
    title = f"{shape} K={shape.K} forward+backward {kind} head"
    late = {f"{name}, one id": reason for name, reason in absent.items()}
    late |= {f"{LIGER_SHARED}{SHARED}": no_shared} if no_shared else {}
    aims = targets(kind, shape, implementations, device)
    if aims and device == "cpu":
        aims |= {f"{name} logits kept": Target(SAVED_TARGETS[shape.dtype]) for name in saving}
    if aims and peers and device == "cpu":
        aims |= {name: Target(1 / 2, f"{CHUNKED}, one id") for name in (*one_id, *saved, *scalar)}
    elif aims and with_peers:  # log-probs beside log-probs, a scalar loss beside a scalar loss
        aims |= {name: Target(1 / 3, f"{TRL}, one id") for name in one_id}
        aims |= {name: Target(1 / 3, f"{LIGER}, one id") for name in scalar}
    work = (2 if frozen else 3) * shape.flops
    return Case(
        OP, title, contenders, check, shape.flops, work, absent=late, axes=shape.axes, targets=aims,
        expected=expected(kind, shape, implementations, device), errors=errors,
    )  # fmt: skip
