"""The head ops at the heads of real models: `python -m benchmarks.gpu.model_heads [--json F]`.

First every op at the shape of D = 4096 that has targets, with the peers (a quick run of the ops' benchmarks
has D = 1024); then linear_logprobs at each shape that a full run adds (every model, N = 64 and 65,536, odd N
and V) once, forward and backward, beside the bare matmul and eager. K in {1, 5, 10} and 65,536 rows of the
smallest model are points of bench_scaling. Last, liger's chunked GRPO loss. Nothing of ours or of eager is
compiled by torch.compile, whose seconds go to the ops' benchmarks. The file is rewritten after every case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench_linear_candidates import candidates_case
from benchmarks.bench_linear_distrl_loss import RolloutRows, loss_case
from benchmarks.bench_linear_logprobs import forward_case, step_case
from benchmarks.suite.heads import K as MANY
from benchmarks.suite.heads import Shape, more_shapes, shapes
from benchmarks.suite.machine import describe
from benchmarks.suite.measure import Case
from benchmarks.suite.session import GO_ON, Session, run_main

SECONDS = 1.0  # of rounds a case, beyond the least number of rounds
COMPILED = "torch.compile of eager"


def added(device: str) -> list[Shape]:
    """Those of a full run's shapes that no other part of the report measures, the cheapest first."""
    smallest = shapes(device, quick=True)[0].model
    found = [s for s in more_shapes(device) if s.K == MANY and (s.model != smallest or s.N < 65_536)]
    return sorted(found, key=lambda shape: shape.flops)


def cases(device: str) -> Iterator[Case]:
    large = shapes(device, quick=False)[-1]
    forward = forward_case(large, device)
    kept = {name: run for name, run in forward.contenders.items() if name != COMPILED}
    yield replace(forward, contenders=kept)
    del forward, kept  # their tensors, while the next case is measured
    for frozen in (False, True):
        yield step_case(large, device, frozen, with_compile=False)
    yield candidates_case(large, device, with_compile=False)
    for frozen in (False, True):
        yield loss_case(
            RolloutRows.calibrated(large, device, frozen), device, with_grpo=False, with_compile=False
        )
    for shape in added(device):
        yield step_case(shape, device, frozen=False, with_peers=False, with_compile=False)
    second = added(device)[-2:][0]  # liger's loss compiles itself and takes long to, so it comes last
    yield loss_case(
        RolloutRows.calibrated(second, device, frozen=False),
        device,
        with_grpo=device == "cuda",
        with_compile=False,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="rows with machine, versions, commit, command")
    parser.add_argument(GO_ON, action="store_true", help="what a CUDA error has left of the run in --json F")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("model_heads: no GPU that torch can see; nothing was measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    session = Session(describe(), options.json, options.go_on)
    for case in cases("cuda"):
        for row in session.measure(case, "cuda", SECONDS):
            print(f"{row.shape}: {row.contender} {row.error or f'{row.median_ms:.3f} ms'}", flush=True)
        del case  # the next one is built while this name would still hold its tensors
    session.close()
    return 1 if session.problems else 0


if __name__ == "__main__":
    run_main(main)
