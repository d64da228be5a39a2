"""What measured rows say: who won by how much, how time and memory grow, and tables of both."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.suite.measure import LESS_WORK, MATMUL, START, Row, Target, is_ours

LEVEL = 0.03  # medians this close are a draw


class Verdict(NamedTuple):
    """Our fastest contender of one case and variant against the fastest other one."""

    op: str
    shape: str
    ours: str
    other: str
    factor: float  # time of the other / ours: above 1 we are faster
    unchecked: bool = False  # whether a result could not be checked

    @property
    def outcome(self) -> str:
        return "level" if abs(self.factor - 1) <= LEVEL else "won" if self.factor > 1 else "lost"

    def __str__(self) -> str:
        end = " (unchecked)" if self.unchecked else ""
        if self.outcome == "level":
            return f"level: {self.ours} and {self.other}{end}"
        if self.outcome == "won":
            return f"won: {self.ours} {self.factor:.2f}x faster than {self.other}{end}"
        return f"LOST: {self.ours} {1 / self.factor:.2f}x slower than {self.other}{end}"


class Aim(NamedTuple):
    """A target of one of our contenders and what was measured: `what` / that of what it is compared with."""

    op: str
    shape: str
    ours: str
    target: Target
    ratio: float  # NaN where the other one was not measured
    what: str = "time"

    @property
    def outcome(self) -> str:
        return "unknown" if math.isnan(self.ratio) else "met" if self.ratio <= self.target.limit else "MISSED"

    def __str__(self) -> str:
        measured = f"{self.ratio:.2f}" if self.target.limit >= 1 else f"{1 / self.ratio:.2f}x"
        of = "" if self.what == "time" else f" {self.what}"
        return f"{self.outcome}: {self.ours} {measured}{of}, target {self.target}"


class Growth(NamedTuple):
    """time ~ x ** exponent and memory ~ x ** memory_exponent along one curve, by least squares in logs."""

    op: str
    series: str
    axis: str
    contender: str
    points: list[tuple[int, float, float]]  # (x, ms, MiB), x rising
    exponent: float
    memory_exponent: float
    scratch: tuple[float, float] | None = None  # MiB at the ends


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (op, shape), in the order measured."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.op, row.shape].append(row)
    return dict(cases)


def by_variant(case: Iterable[Row]) -> list[tuple[Row, Row | None]]:
    """(our fastest, the fastest other or None) of each variant of one case that we ran."""
    variants: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for row in case:
        if not row.error and row.contender not in LESS_WORK:
            variants[row.contender.partition(", ")[2]][is_ours(row.contender)].append(row)
    return [
        (min(ours, key=_median), min(others, key=_median, default=None))
        for others, ours in variants.values()
        if ours
    ]


def _median(row: Row) -> float:
    return row.median_ms


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """One for each case and variant that both we and somebody else ran."""
    found = []
    for (op, shape), case in by_case(rows).items():
        for mine, best in by_variant(case):
            if best is not None:
                factor = best.median_ms / mine.median_ms
                unchecked = bool(mine.note or best.note)
                found.append(Verdict(op, shape, mine.contender, best.contender, factor, unchecked))
    return found


def aims(rows: Sequence[Row]) -> list[Aim]:
    """One for each row with a target; what failed is unknown."""
    found = []
    for row in rows:
        if row.target is None:
            continue
        if row.target_of == START:
            curve = [r for r in rows if (r.op, r.series, r.contender) == (row.op, row.series, row.contender)]
            other = min(curve, key=lambda r: r.axes[row.curve])
        else:
            names = LESS_WORK if row.target_of == MATMUL else (row.target_of,)
            case = [r for r in rows if (r.op, r.shape) == (row.op, row.shape) and r.contender in names]
            other = min((r for r in case if not r.error), key=_median, default=None)
        known = other is not None and not (row.error or row.note or other.error)
        ratio = row.median_ms / other.median_ms if other is not None and known else math.nan
        found.append(Aim(row.op, row.shape, row.contender, Target(row.target, row.target_of), ratio))
        if row.target_memory is not None:
            peaks = (row.peak_mib, other.peak_mib) if other is not None and known else (None, None)
            ratio = peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else math.nan
            target = Target(row.target_memory, row.target_of)
            found.append(Aim(row.op, row.shape, row.contender, target, ratio, "of the peak memory"))
    return found


def growth_exponent(points: Sequence[tuple[float, float]]) -> float:
    """The exponent p of the best fit y = c * x ** p, least squares in logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth(rows: Iterable[Row]) -> list[Growth]:
    """A fit for every contender with at least three points on a curve."""
    curves: dict[tuple[str, str, str, str], list[tuple[int, float, float]]] = defaultdict(list)
    scratch: dict[tuple[str, str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.curve and not row.error:
            point = (row.axes[row.curve], row.median_ms, row.peak_mib or 0.0)
            key = row.op, row.series, row.curve, row.contender
            curves[key].append(point)
            if row.scratch_mib is not None:
                scratch[key][point[0]] = row.scratch_mib
    fits = []
    for key, points in curves.items():
        points.sort()
        if len(points) < 3:
            continue
        memory = [(x, max(mib, 2**-10)) for x, _, mib in points]
        ends = [scratch[key].get(points[i][0]) for i in (0, -1)]
        known = (ends[0], ends[1]) if ends[0] is not None and ends[1] is not None else None
        time, peak = growth_exponent([(x, ms) for x, ms, _ in points]), growth_exponent(memory)
        fits.append(Growth(*key, points, time, peak, known))
    return fits


def cell(value: float | None, digits: int = 2) -> str:
    """A number for a table, empty where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def error(value: float | None) -> str:
    """Two significant digits of an error against fp64, empty where there is none."""
    return "" if value is None else f"{value:.1e}"


def milliseconds(value: float) -> str:
    """Three significant digits, whatever the size."""
    return cell(value, max(0, 2 - math.floor(math.log10(value)) if value < 1e3 else 0))


def markdown(rows: Iterable[Row]) -> str:
    """The rows as one Markdown table, in the order measured."""
    rows = list(rows)
    tokens = any(row.tokens_per_s for row in rows)
    scratch = any(row.scratch_mib is not None for row in rows)  # files of before have none
    modelled = any(row.expected_ms for row in rows)
    judged = any(row.fp64_error is not None for row in rows)
    names = [
        "op", "shape", "contender", "median ms", *(["expected ms"] if modelled else []), "p20", "p80",
        "x yardstick", *(["error against fp64"] if judged else []), "peak MiB",
        *(["scratch MiB"] if scratch else []), "TFLOP/s", "GB/s", *(["tokens/s"] if tokens else []),
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---|---|---|" + "--:|" * (len(names) - 3)]
    for row in rows:
        start = f"| {row.op} | {row.shape} | {row.contender} "
        if row.error:
            lines.append(start + f"| {row.error.replace('|', '/')} |" + " |" * (len(names) - 4))
            continue
        name = f"**{row.contender}**" if is_ours(row.contender) else row.contender
        if row.note:
            name += f" ({row.note.replace('|', '/')})"
        cells = [
            row.op, row.shape, name, milliseconds(row.median_ms),
            *([milliseconds(row.expected_ms) if row.expected_ms else ""] if modelled else []),
            milliseconds(row.p20_ms),
            milliseconds(row.p80_ms), cell(row.ratio, 3), *([error(row.fp64_error)] if judged else []),
            cell(row.peak_mib, 1),
            *([cell(row.scratch_mib, 1)] if scratch else []), cell(row.tflops),
            cell(row.gb_per_s, 1), *([cell(row.tokens_per_s, 0)] if tokens else []),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_growth(fits: Iterable[Growth]) -> str:
    """The fits as a Markdown table: exponents, and the ends of each curve."""
    fits = list(fits)
    scratch = any(fit.scratch for fit in fits)
    head = "| op | along | contender | over | time ~ | memory ~ | ms at the ends | MiB at the ends |"
    lines = [
        head + (" scratch MiB at the ends |" if scratch else ""),
        "|---|---|---|---|--:|--:|--:|--:|" + ("--:|" if scratch else ""),
    ]
    for fit in fits:
        (x0, ms0, mib0), (x1, ms1, mib1) = fit.points[0], fit.points[-1]
        name = f"**{fit.contender}**" if is_ours(fit.contender) else fit.contender
        lines.append(
            f"| {fit.op} | {fit.series} | {name} | {fit.axis} {x0:,} to {x1:,} "
            f"| {fit.axis}^{fit.exponent:.2f} | {fit.axis}^{fit.memory_exponent:.2f} "
            f"| {milliseconds(ms0)} to {milliseconds(ms1)} | {mib0:,.1f} to {mib1:,.1f} |"
        )
        if scratch:
            lines[-1] += " {:,.1f} to {:,.1f} |".format(*fit.scratch) if fit.scratch else " |"
    return "\n".join(lines)


def conditions(machine: Mapping[str, Any]) -> str:
    """One line: device, threads, versions, commit, date."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["device"]
    if where == "CPU":
        kind = f", {machine['processor']}" if "processor" in machine else ""
        where = f"{machine['cpu']}{kind}, {machine['simd']}, "
        where += f"{machine['threads']} of {machine['cores']} cores"
        if "cpu_matmul" in machine:
            where += f", our matmuls by {machine['cpu_matmul']}"
    modified = " (modified)" if machine["modified"] else ""
    return f"{where}; {versions}; commit {machine['commit']}{modified}; {machine['date']}"


def as_csv(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """The rows as CSV below `# key: value` lines of the machine; sizes are columns of their own."""
    out = io.StringIO()
    for key, value in machine.items():
        out.write(f"# {key}: {value}\n")
    letters = sorted({letter for row in rows for letter in row.axes})
    fields = [name for name in Row.__dataclass_fields__ if name != "axes"]
    writer = csv.DictWriter(out, [*fields, *letters], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = row.as_dict()
        writer.writerow({**plain.pop("axes"), **plain})
    return out.getvalue()
