"""What a first run must bring home: `python -m benchmarks.gpu.headline [--json F]`.

The forward pass (lse, sampled log-prob, entropy) against cuBLAS at D = 1024 and 4096, once with the tiles in
use and once with each configuration of the sweep, and the Gluon study beside them; then the device time of
every kernel of the head's ops, with what the model of benchmarks/suite/roofline.py expects of it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_linear_logprobs import check_forward
from benchmarks.gpu import sweep
from benchmarks.suite import roofline
from benchmarks.suite.exact import Exact
from benchmarks.suite.heads import Shape, inputs, shapes
from benchmarks.suite.machine import describe
from benchmarks.suite.measure import Case
from benchmarks.suite.sequences import edges
from benchmarks.suite.session import GO_ON, Session, run_main
from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs
from ipvrm_kernels.head.triton_tiles import CONFIGS, Config

SECONDS = 6.0  # of rounds a shape, for all configurations
PROFILED = 3  # calls
KIND = "half"


def configurations() -> list[Config]:
    """The tiles in use, then those that the sweep tries for the forward."""
    return sweep.choices("forward", sweep.architecture(), KIND, sweep.gpu_at_hand())


def label(config: Config) -> str:
    """triton 128x256x64 8 warps 3 stages, then what is not the usual: programs on an SM, one pipeline."""
    tiles = "x".join(str(size) for size in config[:3])
    beside = f" {config.programs_per_sm} a SM" if config.programs_per_sm > 1 else ""
    flattened = " flattened" if config.flatten else ""
    return f"triton {tiles} {config.num_warps} warps {config.num_stages} stages{beside}{flattened}"


def forward(hidden: Tensor, weight: Tensor, sampled: Tensor, config: Config) -> Any:
    """The op with these tiles."""
    key = (sweep.architecture(), KIND)
    before, CONFIGS[key] = CONFIGS[key], config
    try:
        return linear_logprobs(hidden, weight, sampled, return_entropy=True, impl="triton")
    finally:
        CONFIGS[key] = before


def gluon_forward() -> tuple[Callable[[Tensor, Tensor, Tensor], Any] | None, str]:
    """The study's forward, or None and why it cannot run here."""
    if sweep.architecture() != "sm_90":
        return None, "the Gluon study is for compute capability 9.0 alone"
    try:
        from benchmarks.gpu import gluon_study
    except ImportError as error:
        return None, f"this version of Triton has another Gluon: {error}"
    return gluon_study.forward, ""


def case(shape: Shape, device: str, configs: list[Config]) -> Case:
    hidden, weight, ids = inputs(shape, device)
    sampled = ids[:, 0].contiguous()

    def ours(config: Config) -> Callable[[], Any]:
        return lambda: forward(hidden, weight, sampled, config)

    contenders: dict[str, Callable[[], Any]] = {"matmul": lambda: hidden @ weight.T}
    contenders |= {label(config): ours(config) for config in configs}
    absent = {}
    gluon, reason = gluon_forward()
    if gluon is None:
        absent["gluon"] = reason
    else:
        contenders["gluon"] = lambda: gluon(hidden, weight, sampled)

    def check(results: Mapping[str, Any]) -> None:
        exact = Exact(hidden, weight)
        log_p = exact.log_p.gather(1, sampled[exact.rows, None])[:, 0]
        for name, result in results.items():
            if name != "matmul":
                check_forward(exact, name, result, log_p)

    beside = {"gluon", *(label(config) for config in configs if config.programs_per_sm > 1)}
    modelled = roofline.expected("forward", shape, list(contenders), device, beside)
    return Case(
        "headline", f"{shape} lse + sampled + entropy", contenders, check, shape.flops, shape.flops,
        absent=absent, axes=shape.axes, expected=modelled,
    )  # fmt: skip


def profiled(shape: Shape, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(a kind of roofline.kernels, the call) of each op of the head."""
    hidden, weight, ids = inputs(shape, device)
    sampled, upstream = ids[:, 0].contiguous(), torch.randn(ids.shape, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    yield (
        "forward",
        lambda: linear_logprobs(
            hidden.detach(), weight.detach(), sampled, return_entropy=True, impl="triton"
        ),
    )
    yield (
        "candidates",
        lambda: linear_candidates(
            hidden.detach(), weight.detach(), sampled=sampled, return_entropy=True, impl="triton"
        ),
    )
    for kind, head in (("trainable", weight), ("frozen", weight.detach())):
        leaves = (hidden, head) if head.requires_grad else (hidden,)
        yield (
            kind,
            lambda head=head, leaves=leaves: torch.autograd.grad(
                linear_logprobs(hidden, head, ids, impl="triton").logprobs, leaves, upstream
            ),
        )
    old, row = torch.full_like(upstream, -8.0), torch.randn(shape.N, device=device)
    yield "distrl_loss", lambda: torch.autograd.grad(
        linear_distrl_loss(
            hidden, weight, sampled, ids[:, 1:], old[:, 0], old[:, 1:], row, upstream[:, 1:],
            edges([shape.N], device), impl="triton",
        ).loss, (hidden, weight),
    )  # fmt: skip


def profile(run: Callable[[], Any]) -> Iterable[Any]:
    """The profiler's averages of PROFILED calls, after one that warms up."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    return recorded.key_averages()


def kernel_rows(
    kind: str, shape: Shape, averages: Iterable[Any], gpu: roofline.Rates | None
) -> list[dict[str, Any]]:
    """{op, shape, kernel, calls, ms, expected_ms} of one call; the vendor's matmuls together as "matmul"."""
    times: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in averages:
        ms = event.self_device_time_total / 1e3 / PROFILED
        if ms > 0:
            name = event.key if event.key.startswith("_") else "matmul" if is_matmul(event.key) else "other"
            times[name][0] += event.count / PROFILED
            times[name][1] += ms
    modelled = roofline.kernels(kind, shape, gpu) if gpu else {}
    found = [
        dict(op=kind, shape=str(shape), kernel=name, calls=calls, ms=ms, expected_ms=modelled.get(name))
        for name, (calls, ms) in times.items()
    ]
    return sorted(found, key=lambda row: -row["ms"])


def is_matmul(kernel: str) -> bool:
    """Whether a kernel's name is one of the vendor's matmuls."""
    return any(word in kernel.lower() for word in ("gemm", "nvjet", "cutlass", "cublas", "xmma"))


def num_compiled() -> int:
    """How many forwards `compile_one` knows: one of each configuration, and the study's where it runs."""
    return len(configurations()) + (gluon_forward()[0] is not None)


def compile_one(index: int) -> int:
    """Fill Triton's cache for one of them: rows and columns as divisible as the timed ones."""
    configs, (gluon, _) = configurations(), gluon_forward()
    shape = shapes("cuda", quick=True)[0]._replace(N=sweep.COMPILE_ROWS)
    hidden, weight, ids = inputs(shape, "cuda")
    sampled = ids[:, 0].contiguous()
    if index < len(configs):
        forward(hidden, weight, sampled, configs[index])
    elif gluon is not None:
        gluon(hidden, weight, sampled)
    torch.cuda.synchronize()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, metavar="F", help="rows and kernels with machine, commit, command"
    )
    parser.add_argument("--compile", type=int, metavar="I", help=argparse.SUPPRESS)
    parser.add_argument(GO_ON, action="store_true", help="what a CUDA error has left of the run in --json F")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("headline: no GPU that torch can see; nothing was measured", file=sys.stderr)
        return 2
    if options.compile is not None:
        return compile_one(options.compile)
    torch.manual_seed(0)
    machine = describe()
    session = Session(machine, options.json, options.go_on)
    both = shapes("cuda", quick=False)
    for shape in both:
        for row in session.measure(case(shape, "cuda", configurations()), "cuda", SECONDS):
            expected = f", expected {row.expected_ms:.3f}" if row.expected_ms else ""
            told = row.error or f"{row.median_ms:.3f} ms, {row.ratio:.3f} x matmul{expected}"
            print(f"D={shape.D} {row.contender}: {told}", flush=True)
    gpu = roofline.rates(machine["device"])
    for shape in both:
        for kind, run in profiled(shape, "cuda"):
            name = f"kernels of {kind}, {shape}"
            if name in session.broken or any(
                (one["op"], one["shape"]) == (kind, str(shape)) for one in session.kernels
            ):
                continue
            try:
                found = kernel_rows(kind, shape, profile(run), gpu)
            except Exception as error:  # the next op may still run
                print(session.cannot_go_on(name, error, "cuda"), flush=True)
                continue
            session.kernels += found
            session.write()
            for one in found:
                expected = one["expected_ms"]
                told = "" if expected is None else f", expected {expected:.3f}"
                print(f"D={shape.D} {kind} {one['kernel']}: {one['ms']:.3f} ms{told}", flush=True)
    session.close()
    return 1 if session.problems else 0


if __name__ == "__main__":
    run_main(main)
