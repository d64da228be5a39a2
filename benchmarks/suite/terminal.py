"""What `ipvrm bench` shows: a progress line while it measures, a table for each case, wins and losses at the
end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import ipvrm.output.progress
from benchmarks.suite.measure import START, Case, Row, is_ours
from benchmarks.suite.tables import aims, cell, conditions, error, growth, milliseconds, verdicts

COLOURS = dict(won="green", lost="bold red", level="yellow")
AIM_COLOURS = dict(met="green", MISSED="bold red", unknown="yellow")
PIPED_WIDTH = 170  # a file has no width of its own
BAR = 24  # characters of a ratio of one or more, at most


class Screen:
    """Tables on stdout, progress on stderr."""

    def __init__(self, machine: Mapping[str, Any], ops: Sequence[str], mode: str) -> None:
        self.out = Console()
        if not self.out.is_terminal:
            self.out = Console(width=PIPED_WIDTH)
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=len(ops))
        self.lines = ipvrm.output.progress.Progress(not self.progress.console.is_terminal)
        self.ops, self.done, self.open = len(ops), 0, ExitStack()
        self.out.print(f"[bold]ipvrm bench[/] ({mode}) on {escape(conditions(machine))}", soft_wrap=True)

    def __enter__(self) -> Screen:
        if self.lines.enabled:
            self.moved = self.open.enter_context(self.lines.bar("benchmarks", self.ops))
        else:
            self.open.enter_context(self.progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def note(self, text: str) -> None:
        self.out.print(escape(text), style="dim", soft_wrap=True)

    def problem(self, text: str) -> None:
        self.out.print(escape(text), style="bold red", soft_wrap=True)

    def measuring(self, name: str, case: Case) -> None:
        self.progress.update(self.task, description=escape(f"{name}: {case.shape}"[:90]))

    def finished(self, name: str) -> None:
        self.done += 1
        self.progress.advance(self.task)
        if self.lines.enabled:
            self.moved(self.done)

    def measured(self, rows: Sequence[Row]) -> None:
        """One case's table, its verdicts and, where they need no other case, its targets below."""
        self.out.print(case_table(rows))
        for verdict in verdicts(rows):
            self.out.print(f"  {escape(str(verdict))}", style=COLOURS[verdict.outcome])
        for aim in aims(rows):
            if aim.target.other != START:
                self.out.print(f"  {escape(str(aim))}", style=AIM_COLOURS[aim.outcome])
        self.out.print()

    def summary(self, rows: Sequence[Row]) -> None:
        """Growth along the curves, every verdict, losses first, then every target."""
        fits = growth(rows)
        if fits:
            table = Table(
                "op", "along", "contender", "over", "time ~", "memory ~", "scratch MiB", title="growth",
                box=box.SIMPLE,
            )  # fmt: skip
            for fit in fits:
                ends = f"{fit.axis} {fit.points[0][0]:,} to {fit.points[-1][0]:,}"
                powers = (f"{fit.axis}^{power:.2f}" for power in (fit.exponent, fit.memory_exponent))
                style = "bold" if is_ours(fit.contender) else ""
                scratch = "{:,.1f} to {:,.1f}".format(*fit.scratch) if fit.scratch else ""
                table.add_row(fit.op, fit.series, fit.contender, ends, *powers, scratch, style=style)
            self.out.print(table)
        found = sorted(verdicts(rows), key=lambda v: v.factor)
        if found:
            counts = {name: sum(v.outcome == name for v in found) for name in COLOURS}
            title = (
                ", ".join(f"{count} {name}" for name, count in counts.items())
                + "; ours against the best other"
            )
            table = Table("op", "case", "result", title=title, box=box.SIMPLE)
            for verdict in found:
                text = Text(str(verdict), style=COLOURS[verdict.outcome])
                table.add_row(verdict.op, escape(verdict.shape), text)
            self.out.print(table)
        asked = aims(rows)
        if asked:
            counts = {name: sum(a.outcome == name for a in asked) for name in AIM_COLOURS}
            title = "targets: " + ", ".join(f"{count} {name}" for name, count in counts.items())
            table = Table("op", "case", "result", title=title, box=box.SIMPLE)
            for aim in asked:
                table.add_row(aim.op, escape(aim.shape), Text(str(aim), style=AIM_COLOURS[aim.outcome]))
            self.out.print(table)
        unchecked = sum(bool(row.note) for row in rows)
        if unchecked:
            self.out.print(f"{unchecked} rows could not be checked", style="bold red")


def case_table(rows: Sequence[Row]) -> Table:
    """Contenders of one case with a bar of their ratio to the yardstick."""
    first = rows[0]
    table = Table(
        title=escape(f"{first.op}: {first.shape}"), title_justify="left", box=box.SIMPLE, title_style="bold"
    )
    table.add_column("contender", no_wrap=True)
    columns = _columns(rows)
    judged = any(row.fp64_error is not None for row in rows)
    accuracy = ["fp64 error"] if judged else []
    for name in ("ms", "p20", "p80", "ratio", *accuracy, *(name for name, _, _ in columns)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=BAR)
    longest = max((row.ratio for row in rows if not row.error), default=1.0)
    for row in rows:
        style = "bold cyan" if is_ours(row.contender) else ""
        if row.error:
            table.add_row(row.contender, *[""] * (4 + len(accuracy) + len(columns)), "", style="dim")
            continue
        bar = "█" * max(1, round(BAR * row.ratio / max(longest, 1.0)))
        told = [milliseconds(t) for t in (row.median_ms, row.p20_ms, row.p80_ms)] + [f"{row.ratio:.3f}"]
        told += [error(row.fp64_error)] if judged else []
        told += [cell(getattr(row, field), digits) for _, field, digits in columns]
        table.add_row(row.contender, *told, bar, style=style)
    failed = [f"{row.contender}: {row.error}" for row in rows if row.error]
    failed += list(dict.fromkeys(row.note for row in rows if row.note))
    if failed:
        table.caption = Text("\n".join(failed), style="dim red", justify="left")
        table.caption_justify = "left"
    return table


def _columns(rows: Iterable[Row]) -> list[tuple[str, str, int]]:
    """(heading, field, digits) of what at least one row has."""
    columns = [
        ("peak MiB", "peak_mib", 1),
        ("scratch MiB", "scratch_mib", 1),
        ("TFLOP/s", "tflops", 3),
        ("GB/s", "gb_per_s", 1),
        ("tokens/s", "tokens_per_s", 0),
    ]
    return [c for c in columns if any(getattr(row, c[1]) is not None for row in rows)]
