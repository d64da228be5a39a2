"""Every op once, forward and backward: `python -m benchmarks.gpu.small [--target | --sequences]`, for tools
that watch it.

Small odd shapes for compute-sanitizer, which slows a kernel a hundredfold; with --sequences the ops on packed
sequences alone; with --target the head alone at the shape that has targets, for the profiler's counters. Each
op is named when it has run; no implementation to run is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import ipvrm_kernels
from benchmarks.suite.heads import GPU_DEFAULT, MODELS, Shape, inputs
from benchmarks.suite.sequences import edges, kernels

SMALL = Shape(131, 64, 1003, torch.bfloat16, 3)


def head(shape: Shape, device: str, impl: str) -> None:
    """The head ops that multiply, with every gradient."""
    hidden, weight, ids = inputs(shape, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = ipvrm_kernels.linear_logprobs(hidden, weight, ids, return_entropy=True, impl=impl)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    ran("linear_logprobs", impl, device)
    found = ipvrm_kernels.linear_candidates(
        3 * hidden.detach(), weight.detach(), sampled=ids[:, 0].contiguous(), impl=impl
    )
    ran("linear_candidates", impl, device)
    row = torch.randn(shape.N, device=device)
    loss = ipvrm_kernels.linear_distrl_loss(
        hidden, weight, ids[:, 0], found.ids, row, found.logprobs, row,
        torch.randn_like(found.logprobs), edges([shape.N], device), impl=impl,
    )  # fmt: skip
    loss.loss.backward()
    ran("linear_distrl_loss", impl, device)


def partial(device: str, impl: str) -> None:
    hidden, weight, ids = inputs(SMALL, device)
    hidden.requires_grad_()
    part = ipvrm_kernels.linear_logprobs_partial(hidden, weight, ids, vocab_start=0, impl=impl)
    part.sumexp.sum().backward()
    ran("linear_logprobs_partial", impl, device)


def sequences(device: str) -> None:
    """The ops on packed sequences, an empty and a long one among them."""
    lengths = [1, 0, 700, 5000]
    cu, x = edges(lengths, device), torch.randn(sum(lengths), device=device, requires_grad=True)
    fixed = x.detach()
    outcome = (torch.arange(len(lengths), device=device) % 2).float()
    calls: dict[str, Callable[[str], Tensor]] = {
        "segment_scan": lambda impl: ipvrm_kernels.segment_scan(x, cu, 0.95, True, impl=impl),
        "prefix_values": lambda impl: torch.cat(ipvrm_kernels.prefix_values(x, cu, impl=impl)),
        "prefix_value_loss": lambda impl: ipvrm_kernels.prefix_value_loss(x, cu, outcome, impl=impl),
        "clipped_surrogate": lambda impl: ipvrm_kernels.clipped_surrogate(x, fixed, fixed, impl=impl)[0],
        "distrl_loss": lambda impl: (
            ipvrm_kernels.distrl_loss(
                x, x[:, None], fixed, fixed[:, None], fixed, fixed[:, None], cu, impl=impl
            ).loss
        ),
    }
    for op, call in calls.items():
        for impl in implementations(op, device):
            call(impl).sum().backward()
            ran(op, impl, device)


def implementations(op: str, device: str) -> list[str]:
    """`kernels`, of which there must be one."""
    found = kernels(op, device)
    if not found:
        raise RuntimeError(f"{op}: no implementation runs on {device} here\n{ipvrm_kernels.backends()}")
    return found


def ran(op: str, impl: str, device: str) -> None:
    """Say that an op has run to its end."""
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{op} {impl}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--target", action="store_true", help="the head at the shape with targets")
    only.add_argument("--sequences", action="store_true", help="the ops on packed sequences")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    device = options.device
    if options.target:
        name, N, ids = GPU_DEFAULT[0]
        model = MODELS[name]
        head(Shape(N, model.D, model.V, torch.bfloat16, ids), device, "triton")
    else:
        for impl in [] if options.sequences else implementations("linear_logprobs", device):
            head(SMALL, device, impl)
            partial(device, impl)
        sequences(device)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
