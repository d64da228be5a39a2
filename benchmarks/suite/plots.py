"""PNG plots of measured rows (extra `plot`): bars of the ratio to the yardstick, and time and memory over
N, V, K and T.

Colours are Okabe and Ito's, told apart by the colour-blind; ours are blue with a bold name or a thick line,
and every case that we lose says so above its bars.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ImportError as error:
    raise SystemExit("plots need matplotlib: pip install 'ipvrm[plot]'") from error

from benchmarks.suite.measure import ACCURACY, LESS_WORK, Row, is_ours
from benchmarks.suite.tables import Growth, by_case, conditions, growth, milliseconds, verdicts
from ipvrm.run_folder import replacing

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e7eb"
OURS = ("#0072B2", "#56B4E9", "#3a4cc0")  # cpp or cuda, triton, ipvrm
YARDSTICK = "#8a949e"
FAMILIES = {"eager": "#E69F00", "padded": "#E69F00", "torch.compile": "#D55E00", "released": "#009E73"}
OTHERS = ("#CC79A7", "#b5a400", "#8c510a", "#7f3c8d", "#a6761d", "#4d4d4d")
LOST, WON = "#D55E00", "#00694d"
MARKERS = "osD^vP*X"
AXES = dict(N="N, rows", V="V, vocabulary size", K="K, token ids a row", T="T, tokens a sequence")


def draw(rows: Sequence[Row], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write one PNG of bars an op and one of each family of curves into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(rows)
    written = []
    single = [row for row in rows if not row.curve]
    for op in dict.fromkeys(row.op for row in single):
        figure = bars([row for row in single if row.op == op], op, machine, colours)
        if figure is not None:
            written.append(_save(figure, folder / f"ratio-{op}.png"))
    judged = [row for row in single if ACCURACY in row.shape and row.fp64_error]
    if judged:
        written.append(_save(accuracy(judged, machine), folder / "accuracy.png"))
    curves: dict[str, list[Growth]] = defaultdict(list)
    for fit in growth(rows):
        curves[fit.axis].append(fit)
    for axis, fits in curves.items():
        written.append(_save(lines(fits, axis, machine, colours), folder / f"growth-{axis}.png"))
    return written


def accuracy(rows: Sequence[Row], machine: Mapping[str, Any]) -> Figure:
    """The largest error of a log-prob against fp64: a line of dots for each contender, one dot a case."""
    cases = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    total = 2.1 + 0.34 * len(names) + 0.22 * len(cases)
    figure = Figure(figsize=(11, total), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    _heading(figure, total, "error of a log-prob against fp64, in nats (left is better)", machine)
    axes = figure.add_axes((0.29, (0.7 + 0.22 * len(cases)) / total, 0.68, 0.34 * len(names) / total))
    for number, shape in enumerate(cases):
        here = [row for row in rows if row.shape == shape]
        axes.scatter(
            [row.fp64_error for row in here], [len(names) - 1 - names.index(row.contender) for row in here],
            marker=MARKERS[number % len(MARKERS)], s=42, zorder=3, color=OTHERS[number % len(OTHERS)],
            label=_wrapped(shape, 100),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names[::-1], fontsize=8.5)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if is_ours(label.get_text()) else "normal")
    _frame(axes, "x")
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED)
    figure.legend(loc="lower left", bbox_to_anchor=(0.02, 0.01), fontsize=7.5, frameon=False)
    return figure


def bars(
    rows: Sequence[Row], op: str, machine: Mapping[str, Any], colours: Mapping[str, str]
) -> Figure | None:
    """Horizontal bars of each case's contenders, time as a multiple of the yardstick's on a log axis."""
    cases = {shape: case for (_, shape), case in by_case(rows).items() if any(not r.error for r in case)}
    if not cases:
        return None
    limit = max(row.ratio for row in rows if not row.error) * 2.2
    least = min(row.ratio for row in rows if not row.error) / 1.4
    heights = [0.62 + 0.27 * len(case) for case in cases.values()]
    total = 1.25 + sum(heights) + 0.5 * len(cases)
    figure = Figure(figsize=(11, total), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    _heading(figure, total, f"{op}: time relative to the yardstick (shorter is faster)", machine)
    grid = figure.add_gridspec(
        len(cases), 1, height_ratios=heights, left=0.29, right=0.97,
        top=1 - 1.2 / total, bottom=0.5 / total, hspace=0.95 * len(cases) / sum(heights),
    )  # fmt: skip
    results = defaultdict(list)
    for verdict in verdicts(rows):
        results[verdict.shape].append(verdict)
    for place, (shape, case) in enumerate(cases.items()):
        axes = figure.add_subplot(grid[place])
        positions = range(len(case))[::-1]
        for y, row in zip(positions, case, strict=True):
            if row.error:
                axes.text(
                    least * 1.03, y, row.error[:110], va="center", fontsize=7.5, color=MUTED, style="italic"
                )
                continue
            axes.barh(y, row.ratio - least, left=least, height=0.72, color=colours[row.contender], zorder=3)
            memory = "" if row.peak_mib is None else f", {row.peak_mib:,.0f} MiB"
            rate = "" if row.tokens_per_s is None else f", {row.tokens_per_s:,.0f} tokens/s"
            text = f"{row.ratio:.2f}  ({milliseconds(row.median_ms)} ms{rate}{memory})"
            weight = "bold" if is_ours(row.contender) else "normal"
            axes.annotate(
                text, (row.ratio, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
                fontweight=weight, zorder=6, bbox=dict(facecolor="white", edgecolor="none", pad=0.6),
            )  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=5)
        axes.set_yticks(list(positions), [row.contender for row in case], fontsize=8.5)
        for label, row in zip(axes.get_yticklabels(), case, strict=True):
            label.set_color(MUTED if row.error else INK)
            label.set_fontweight("bold" if is_ours(row.contender) else "normal")
        _frame(axes, "x")
        axes.set_xscale("log")
        axes.set_xlim(least, limit)
        _log_ticks(axes.xaxis)
        axes.set_ylim(-0.8, len(case) - 0.3)
        axes.tick_params(axis="x", labelsize=8, colors=MUTED)
        title = _wrapped(shape, 66 if results[shape] else 100)  # the verdicts stand to its right
        axes.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold", x=-0.36, pad=6)
        for offset, verdict in enumerate(results[shape]):
            colour = dict(won=WON, lost=LOST, level=MUTED)[verdict.outcome]
            axes.text(
                1, 1.02, str(verdict) + "\n" * offset, transform=axes.transAxes, ha="right", va="bottom",
                fontsize=8, color=colour, fontweight="bold" if verdict.outcome == "lost" else "normal",
            )  # fmt: skip
        if place == len(cases) - 1:
            axes.set_xlabel(
                "median time / median time of the first contender, log scale", fontsize=9, color=INK
            )
    return figure


def lines(
    fits: Sequence[Growth], axis: str, machine: Mapping[str, Any], colours: Mapping[str, str]
) -> Figure:
    """Time and memory over one size, a row of two panels for each op and series."""
    groups: dict[tuple[str, str], list[Growth]] = defaultdict(list)
    for fit in fits:
        groups[fit.op, fit.series].append(fit)
    total = 1.1 + 3.3 * len(groups)
    figure = Figure(figsize=(11, total), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    _heading(figure, total, f"time and memory over {AXES.get(axis, axis)}", machine)
    grid = figure.add_gridspec(
        len(groups),
        2,
        left=0.075,
        right=0.98,
        top=1 - 1.3 / total,
        bottom=0.55 / total,
        hspace=0.5,
        wspace=0.2,
    )
    for place, ((op, series), group) in enumerate(groups.items()):
        for side, unit in enumerate(("time, ms", "peak memory above inputs, MiB")):
            axes = figure.add_subplot(grid[place, side])
            for order, fit in enumerate(group):
                ours = is_ours(fit.contender)
                power = (fit.exponent, fit.memory_exponent)[side]
                xs, ys = [p[0] for p in fit.points], [max(p[1 + side], 0.01) for p in fit.points]
                axes.plot(
                    xs, ys, color=colours[fit.contender], marker=MARKERS[order % len(MARKERS)], markersize=5,
                    linewidth=2.4 if ours else 1.5, zorder=4 if ours else 3,
                    linestyle="--" if fit.contender in LESS_WORK else "-",
                    label=f"{fit.contender}  ~ {axis}$^{{{power:.2f}}}$",
                )  # fmt: skip
            _frame(axes, "both")
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = [point[0] for point in max(group, key=lambda fit: len(fit.points)).points]
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(labelsize=8, colors=MUTED)
            _log_ticks(axes.yaxis)
            axes.set_xlabel(AXES.get(axis, axis), fontsize=9, color=INK)
            axes.set_ylabel(unit, fontsize=9, color=INK)
            axes.legend(fontsize=8, frameon=False, loc="best")
            if side == 0:
                axes.set_title(
                    f"{op.partition(' over ')[0]}: {series}",
                    loc="left",
                    fontsize=9,
                    fontweight="bold",
                    color=INK,
                )
    return figure


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """One colour a contender, the same in every plot: a variant has the colour of what it is a variant of."""
    chosen: dict[str, str] = {}
    for row in rows:
        name = row.contender.partition(", ")[0]
        if name in chosen:
            continue
        if is_ours(name):
            chosen[name] = OURS[dict(triton=1, ipvrm=2).get(name, 0)]
        elif name in LESS_WORK:
            chosen[name] = YARDSTICK
        else:
            others = {c for c in chosen.values() if c in OTHERS}
            chosen[name] = FAMILIES.get(name.split()[0]) or OTHERS[len(others) % len(OTHERS)]
    return {row.contender: chosen[row.contender.partition(", ")[0]] for row in rows}


def _heading(figure: Any, total: float, title: str, machine: Mapping[str, Any]) -> None:
    figure.text(0.02, 1 - 0.3 / total, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(
        0.02,
        1 - 0.62 / total,
        _wrapped(f"{conditions(machine)}. Blue: this package.", 160),
        fontsize=7.5,
        color=MUTED,
        va="center",
    )


def _frame(axes: Any, grid: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(True, axis=grid, which="major", color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def _log_ticks(axis: Any) -> None:
    """1, 2 and 5 of every decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def _wrapped(text: str, width: int = 100) -> str:
    """Broken at spaces into lines of at most `width`."""
    return "\n".join(textwrap.wrap(text, width))


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
