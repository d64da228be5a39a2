"""The one timing protocol of every benchmark: correctness first, warm-up, interleaved contenders, median
and p20/p80.

GPU rounds are timed with CUDA events after a 256 MiB write that flushes L2; CPU rounds with perf_counter.
Peak memory is what a contender allocates above its inputs, outputs included: CUDA's own count, and on
the CPU the running sum of the allocations that the profiler records.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One row group: contenders that do the same work at one shape. The first contender is the yardstick."""

    op: str
    shape: str
    contenders: dict[str, Callable[[], Any]]
    # given every contender's result by name, before any timing; raises AssertionError if they disagree
    check: Callable[[Mapping[str, Any]], None]
    flops: float = 0.0  # of the yardstick, 0 where it is not a matmul
    num_bytes: float = 0.0  # least traffic of the op, 0 where that is not the point
    min_rounds: int = 5
    absent: Mapping[str, str] = field(default_factory=dict)  # contenders that cannot run here, and why


@dataclass(frozen=True)
class Row:
    """One contender at one shape: milliseconds, MiB above inputs, `ratio` = its median / the yardstick's."""

    op: str
    shape: str
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    peak_mib: float | None
    tflops: float | None
    gb_per_s: float | None
    rounds: int
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, device: str, seconds: float = 3.0, max_rounds: int = 200) -> list[Row]:
    """Time every contender of `case` in turn for about `seconds`, after its check (which may raise)."""
    contenders = dict(case.contenders)
    errors = dict(case.absent)
    results, peaks = {}, {}
    for name in list(contenders):  # a contender that cannot run is a row that says so
        try:
            contenders[name]()  # compiles and allocates what later calls reuse
            results[name], peaks[name] = _with_peak_mib(contenders[name], device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del contenders[name]
    case.check(results)
    results.clear()
    flush = torch.empty(64 * 2**20, dtype=torch.float32, device=device) if device == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    stop = time.perf_counter() + seconds
    while contenders and len(next(iter(times.values()))) < max_rounds:
        for name, run in contenders.items():
            times[name].append(_once(run, flush))
        if time.perf_counter() > stop and len(next(iter(times.values()))) >= case.min_rounds:
            break
    yardstick = next(iter(case.contenders))
    base = statistics.median(times[yardstick]) if yardstick in times else float("nan")
    rows = []
    for name in contenders:
        ordered = sorted(times[name])
        median = statistics.median(ordered)
        rows.append(
            Row(
                case.op, case.shape, name, median, ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5],
                median / base, peaks[name],
                case.flops / median / 1e9 if case.flops and name == yardstick else None,
                case.num_bytes / median / 1e6 if case.num_bytes else None,
                len(ordered),
            )
        )  # fmt: skip
    nan = float("nan")
    for name, reason in errors.items():
        rows.append(Row(case.op, case.shape, name, nan, nan, nan, nan, None, None, None, 0, reason))
    return rows


def _once(run: Callable[[], Any], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    flush.zero_()
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def _with_peak_mib(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
    alive = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return result, peak / 2**20


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError if the largest difference exceeds `tolerance` times the largest expected value."""
    if not got.numel():
        return
    scale = expected.abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), (
        f"{name}: error {error:.2e} at scale {scale:.2e}, {tolerance=}"
    )


def markdown(rows: Iterable[Row]) -> str:
    """The rows as one Markdown table, in the order measured."""
    lines = [
        "| op | shape | contender | median ms | p20 | p80 | x yardstick | peak MiB | TFLOP/s | GB/s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for row in rows:
        if row.error:
            lines.append(f"| {row.op} | {row.shape} | {row.contender} | {row.error} | | | | | | |")
            continue
        lines.append(
            f"| {row.op} | {row.shape} | {row.contender} | {row.median_ms:.3f} "
            f"| {row.p20_ms:.3f} | {row.p80_ms:.3f} | {row.ratio:.3f} | {cell(row.peak_mib, 0)} "
            f"| {cell(row.tflops, 2)} | {cell(row.gb_per_s, 1)} |"
        )
    return "\n".join(lines)
