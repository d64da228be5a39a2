"""The regression gate of CI: `python -m benchmarks.gate [--write]`, about fifteen seconds.

Small fixed shapes, one thread, ours against the bare matmul and against eager PyTorch. A ratio that is more
than TOLERANCE worse than the committed one (benchmarks/gate.json) in two measurements fails, so that a slow
change cannot land unseen. `--write` commits to the ratios measured now: after a speed-up, or a slow-down that
is meant, named in the commit. Ratios carry over between machines of one CPU model, instruction set and
library of matmuls only: on another one FOREIGN times the committed ratio is allowed. Results are checked
before anything is timed.

What makes it stable on a loaded machine: CPU time of this process instead of wall time (others' time slices
do not count), contenders interleaved, the least of several calls a block (a call whose caches others swept is
not the least), the median over blocks, and logits of 2 MiB, which stay in a core's share of the cache: with
twice as many rows eager PyTorch's own time varied by 1.7 between runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_linear_candidates,
    bench_linear_distrl_loss,
    bench_linear_logprobs,
    bench_prefix_value_loss,
    bench_segment_scan,
)
from benchmarks.suite.heads import Shape
from benchmarks.suite.machine import describe
from benchmarks.suite.measure import Case
from benchmarks.suite.session import write_json
from ipvrm_kernels.backend import HAS_CPP

COMMITTED = Path(__file__).with_name("gate.json")
SHAPE = Shape(128, 256, 4096, torch.float32)  # a matmul of a few milliseconds on one core
OURS = "cpp"
TOLERANCE = 1.25
FOREIGN = 2.5  # on another CPU: only what is broken outright shows
BLOCKS, CALLS = 5, 8

SAME = ("cpu", "simd", "cpu_matmul")  # what machines whose ratios carry over have in common
Ratios = dict[str, dict[str, float]]  # what is measured: {what it is compared with: ours / that}


def cases() -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    """(name, case, the contenders to compare ours with)."""
    logprobs, distrl = bench_linear_logprobs, bench_linear_distrl_loss
    yield "linear_logprobs forward", logprobs.forward_case(SHAPE, "cpu"), ("matmul", "eager log_softmax")
    for frozen in (False, True):
        name = f"linear_logprobs forward + backward, {'frozen' if frozen else 'trainable'} head"
        yield (
            name,
            logprobs.step_case(SHAPE, "cpu", frozen, with_peers=False, with_compile=False),
            ("matmul", "eager log_softmax"),
        )
    candidates = bench_linear_candidates.candidates_case(SHAPE, "cpu")
    yield "linear_candidates", candidates, ("matmul", "eager log_softmax + topk")
    loss = distrl.loss_case(
        distrl.RolloutRows.calibrated(SHAPE, "cpu", frozen=False), "cpu", with_grpo=False, with_compile=False
    )
    yield "linear_distrl_loss forward + backward", loss, ("matmul", "eager composition")
    for module in (bench_segment_scan, bench_prefix_value_loss):
        case = next(iter(module.cases("cpu", True)))
        yield case.op, case, (next(iter(case.contenders)),)


def checked(case: Case, names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """The contenders called `names`, after the case's check of their results."""
    chosen = {name: case.contenders[name] for name in names}
    case.check({name: run() for name, run in chosen.items()})
    return chosen


def ratios(
    contenders: Mapping[str, Callable[[], Any]], ours: str, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """CPU time of `ours` over each other contender's: the median over blocks of the ratio of least times."""
    for run in contenders.values():
        run()
    blocks: dict[str, list[float]] = {name: [] for name in contenders if name != ours}
    for _ in range(BLOCKS):
        least = dict.fromkeys(contenders, math.inf)
        for _ in range(CALLS):
            for name, run in contenders.items():
                start = clock()
                run()
                least[name] = min(least[name], clock() - start)
        for name, found in blocks.items():
            found.append(least[ours] / least[name])
    return {name: statistics.median(found) for name, found in blocks.items()}


def measure_all(only: set[str] | None = None) -> Ratios:
    """The ratios of every case, or of those named."""
    measured = {}
    for name, case, others in cases():
        if only is None or name in only:
            measured[name] = ratios(checked(case, (*others, OURS)), OURS)
    return measured


def worse(measured: Ratios, committed: Ratios, tolerance: float = TOLERANCE) -> list[str]:
    """One line for each ratio beyond `tolerance`, and for each one that has no committed figure."""
    lines = []
    for name, found in measured.items():
        for other, ratio in found.items():
            allowed = committed.get(name, {}).get(other)
            if allowed is None:
                lines.append(f"{name} / {other}: {ratio:.2f}, no committed figure: run with --write")
            elif ratio > tolerance * allowed:
                lines.append(f"{name} / {other}: {ratio:.2f}, committed {allowed:.2f}")
    return lines


def judge(
    measure: Callable[[set[str] | None], Ratios], committed: Ratios, tolerance: float = TOLERANCE
) -> tuple[Ratios, list[str]]:
    """(measured, what is worse); what is beyond the tolerance is measured again, and the lower counts."""
    measured = dict(measure(None))
    again = {name for name, found in measured.items() if worse({name: found}, committed, tolerance)}
    if again:
        for name, found in measure(again).items():
            measured[name] = {other: min(ratio, measured[name][other]) for other, ratio in found.items()}
    return measured, worse(measured, committed, tolerance)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="commit to the ratios measured now")
    options = parser.parse_args(arguments)
    if not HAS_CPP:
        print("gate: the C++ extension is not built: pip install -e . with a compiler", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.monotonic()
    if options.write:
        write_json(COMMITTED, dict(machine=describe(), ratios=_rounded(measure_all())))
        print(f"written: {COMMITTED}")
        return 0
    committed = json.loads(COMMITTED.read_text())
    here, there = ({key: machine.get(key) for key in SAME} for machine in (describe(), committed["machine"]))
    tolerance = TOLERANCE if here == there else FOREIGN
    measured, lines = judge(measure_all, committed["ratios"], tolerance)
    for name, found in measured.items():
        for other, ratio in found.items():
            allowed = committed["ratios"].get(name, {}).get(other, math.nan)
            print(f"{ratio:7.3f}  committed {allowed:7.3f}  {name} / {other}")
    if here != there:
        print(f"gate: the committed ratios are of {there}, this machine is {here}: judged at {FOREIGN} x")
    seconds = time.monotonic() - start
    print(f"gate: {len(lines)} worse than {tolerance} x the committed ratio, {seconds:.0f} s")
    for line in lines:
        print(f"SLOWER: {line}", file=sys.stderr)
    return 1 if lines else 0


def _rounded(found: Ratios) -> Ratios:
    return {name: {k: round(v, 4) for k, v in part.items()} for name, part in found.items()}


if __name__ == "__main__":
    sys.exit(main())
