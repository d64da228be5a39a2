"""The one timing protocol of every benchmark: correctness first, warm-up, interleaved contenders, median
and p20/p80.

GPU rounds are timed with CUDA events after a 256 MiB write that flushes L2; CPU rounds with perf_counter.
Peak memory is what a contender allocates above its inputs, outputs included: CUDA's own count, and on
the CPU the running sum of the allocations that the profiler records. Scratch is that less the tensors
returned.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

WRONG = "WRONG RESULT"  # how the error of a row begins whose case failed its check
UNCHECKED = "unchecked"  # how the note of a row begins whose case could not be checked
MATMUL, MATMUL_ONEDNN = "matmul", "matmul by oneDNN"
LESS_WORK = (MATMUL, MATMUL_ONEDNN)  # yardsticks that never win or lose against the op
START = "the curve's start"
ACCURACY = "accuracy of a log-prob"  # what the shape of a case says that is about errors against fp64
OURS = ("cpp", "cuda", "triton", "ipvrm")  # first words of the contenders that this package stands for


def is_ours(contender: str) -> bool:
    """Whether a contender is one of this package's fast implementations."""
    return contender.replace(",", " ").split()[0] in OURS


class DeadContext(Exception):
    """A CUDA error, after which nothing runs in this process; `contender` caused it, "" if nobody knows."""

    def __init__(self, contender: str, reason: str) -> None:
        super().__init__(reason)
        self.contender = contender


@dataclass(frozen=True)
class Target:
    """A contender is to take at most `limit` times what the contender `other` takes, or, with START, itself
    at the first point of its curve; and at most `memory` times its peak MiB, where that is asked."""

    limit: float
    other: str = "matmul"
    memory: float | None = None

    def __str__(self) -> str:
        other = self.other.partition(", ")[0]
        text = f"<= {float(self.limit)} {other}" if self.limit >= 1 else f">= {1 / self.limit:g}x {other}"
        return text if self.memory is None else f"{text}, memory <= {self.memory:g}"


@dataclass(frozen=True)
class Case:
    """One row group: contenders that do the same work at one shape. The yardstick is the faster of the bare
    matmuls (LESS_WORK), or else the first contender.

    A contender called "name, variant" is compared with those of the same variant only.
    """

    op: str
    shape: str
    contenders: dict[str, Callable[[], Any]]
    # given every result by name (none of a contender that failed), before any timing; raises AssertionError
    # if one is wrong, with that contender's name first, anything else if that cannot be told
    check: Callable[[Mapping[str, Any]], None]
    flops: float = 0.0  # of the yardstick, 0 where it is not a matmul
    work: float = 0.0  # FLOPs of the matmuls that the op cannot do without, for all other contenders
    num_bytes: float = 0.0  # least traffic of the op, 0 where that is not the point
    min_rounds: int = 3
    absent: Mapping[str, str] = field(default_factory=dict)  # contenders that cannot run here, and why
    axes: Mapping[str, int] = field(default_factory=dict)  # sizes by letter: N, D, V, K, B, T
    curve: str = ""  # the letter of `axes` that grows over the cases of this op and `series`
    series: str = ""  # what stays the same along the curve
    tokens: int = 0  # tokens that one call works through, 0 where that is not the point
    targets: Mapping[str, Target] = field(default_factory=dict)  # by contender
    expected: Mapping[str, float] = field(default_factory=dict)  # modelled ms by contender (roofline.py)
    # the largest error against fp64 by contender, given what `check` is given: of log-probs in nats, of
    # gradients of hidden relative to the largest number
    errors: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one shape: milliseconds, MiB above inputs, `ratio` = its median / the yardstick's.

    scratch_mib: MiB above inputs and returned tensors. target: what ratio to the contender target_of is
    asked; target_memory: the same of peak_mib. expected_ms: what the model of the GPU says.
    fp64_error: see Case.errors.
    """

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
    axes: Mapping[str, int] = field(default_factory=dict)
    curve: str = ""
    series: str = ""
    tokens_per_s: float | None = None
    scratch_mib: float | None = None
    note: str = ""
    target: float | None = None
    target_of: str = ""
    target_memory: float | None = None
    expected_ms: float | None = None
    fp64_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None in its place."""
        plain = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in plain.items()}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Row:
        """The inverse of `as_dict`."""
        times = ("median_ms", "p20_ms", "p80_ms", "ratio")
        return Row(**{k: math.nan if v is None and k in times else v for k, v in plain.items()})


def measure(case: Case, device: str, seconds: float = 3.0, max_rounds: int = 200) -> list[Row]:
    """Time every contender of `case` in turn, after its check.

    Rounds go on for about `seconds`: after min_rounds a contender leaves that has used its share of them;
    the yardsticks stay to the last, so that every round has them.
    A contender that cannot run is a row with the reason, and so is a peer whose result is wrong; where one of
    ours is wrong, or nobody can be blamed, every row of the case says so. A case whose check itself cannot
    run keeps its times, with a note. Raises DeadContext after a CUDA error, which no contender survives.
    """
    contenders = dict(case.contenders)
    errors = dict(case.absent)
    results, peaks, scratch = {}, {}, {}
    note = ""
    for name in list(contenders):
        try:
            contenders[name]()  # compiles and allocates what later calls reuse
            results[name], peaks[name] = _with_peak_mib(contenders[name], device)
            scratch[name] = max(peaks[name] - returned_mib(results[name]), 0.0)
        except Exception as error:  # a peer may raise anything
            raise_if_dead(device, name, error)
            errors[name] = _reason(error)
            del contenders[name]
    while True:
        try:
            case.check(results)
            break
        except AssertionError as error:
            text = str(error).partition("\n")[0]
            reason = f"{WRONG}: {text or 'its check failed'}"
            wrong = max((name for name in results if text.startswith(name)), key=len, default="")
            if not wrong or is_ours(wrong) or wrong == next(iter(case.contenders)):
                return [failed(case, name, errors.get(name, reason)) for name in case.contenders]
            errors[wrong] = reason
            del results[wrong], contenders[wrong]
        except Exception as error:  # a contender it needs is gone, or there is no memory for it
            raise_if_dead(device, "", error)
            note = f"{UNCHECKED}: {_reason(error)}"
            break
    accuracy: Mapping[str, float] = {}
    if case.errors is not None:
        try:
            accuracy = case.errors(results)
        except Exception as error:  # no memory for it: the times are still good
            raise_if_dead(device, "", error)
            note = note or f"its error is not known: {_reason(error)}"
    results.clear()
    flush = torch.empty(64 * 2**20, dtype=torch.float32, device=device) if device == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    yardsticks = yardsticks_of(case.contenders)
    share = seconds * 1e3 / max(len(contenders), 1)
    for rounds in range(max_rounds):
        taking = {n for n in contenders if rounds < case.min_rounds or sum(times[n]) < share}
        if not taking:
            break
        for name, run in list(contenders.items()):
            if name not in taking and name not in yardsticks:
                continue
            try:
                times[name].append(once(run, flush))
            except Exception as error:  # it ran before: no memory for it beside what others have kept
                raise_if_dead(device, name, error)
                errors[name] = _reason(error)
                del contenders[name], times[name]
    bases = [statistics.median(times[name]) for name in yardsticks if name in times]
    base = min(bases, default=math.nan)
    rows = []
    for name in contenders:
        ordered = sorted(times[name])
        median = statistics.median(ordered)
        target = case.targets.get(name)
        flops = case.flops if name in yardsticks else case.work
        rows.append(
            Row(
                case.op, case.shape, name, median, ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5],
                median / base, peaks[name],
                flops / median / 1e9 if flops else None,
                case.num_bytes / median / 1e6 if case.num_bytes else None,
                len(ordered), axes=dict(case.axes), curve=case.curve, series=case.series,
                tokens_per_s=case.tokens / median * 1e3 if case.tokens else None,
                scratch_mib=scratch[name], note=note,
                target=target.limit if target else None, target_of=target.other if target else "",
                target_memory=target.memory if target else None, expected_ms=case.expected.get(name),
                fp64_error=accuracy.get(name),
            )
        )  # fmt: skip
    return rows + [failed(case, name, reason) for name, reason in errors.items()]


def yardsticks_of(contenders: Iterable[str]) -> tuple[str, ...]:
    """The bare matmuls among a case's contenders, or else the first one; the fastest is the yardstick."""
    names = tuple(contenders)
    return tuple(name for name in names if name in LESS_WORK) or names[:1]


def raise_if_dead(device: str, contender: str, error: Exception) -> None:
    """Raise DeadContext if the GPU no longer answers after `error`: a CUDA error stays with the process."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise DeadContext(contender, _reason(error)) from error


def failed(case: Case, name: str, reason: str) -> Row:
    """The row of a contender without times."""
    nan = math.nan
    return Row(
        case.op, case.shape, name, nan, nan, nan, nan, None, None, None, 0, reason,
        axes=dict(case.axes), curve=case.curve, series=case.series,
    )  # fmt: skip


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def returned_mib(result: Any) -> float:
    """MiB of the storages of the tensors in nested tuples, lists and dicts, each once."""
    storages: dict[int, int] = {}
    left = [result]
    while left:
        part = left.pop()
        if isinstance(part, torch.Tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, Mapping):
            left.extend(part.values())
        elif isinstance(part, tuple | list):
            left.extend(part)
    return sum(storages.values()) / 2**20


def once(run: Callable[[], Any], flush: torch.Tensor | None) -> float:
    """Milliseconds of one call: CUDA events after a write over `flush`, which empties L2; else wall time."""
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


def assert_within(name: str, got: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Raise AssertionError if any number is more than `allowed` from what is expected, or NaN."""
    error = (got.double() - expected.double()).abs()
    assert bool((error <= allowed).all()), f"{name}: error {error.max().item():.2e}, {allowed=:.2e}"
