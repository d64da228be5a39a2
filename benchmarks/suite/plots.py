"""PNG plots of measured rows (extra `plot`): time against scratch memory at one shape, the ratio to the
yardstick of every case, one dot a contender, and time and memory over N, V, K and T.

Colours are Okabe and Ito's, told apart by the colour-blind; ours are blue with a bold name or a thick line,
and every case that we lose says so.
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
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise SystemExit("plots need matplotlib: pip install 'ipvrm[plot]'") from error

from benchmarks.suite.headline import LIBRARIES, Panel, lost, notes, panels, title, where
from benchmarks.suite.measure import ACCURACY, LESS_WORK, Row, is_ours
from benchmarks.suite.tables import Growth, Verdict, by_case, conditions, growth, verdicts
from ipvrm.run_folder import replacing

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e7eb"
OURS = ("#0072B2", "#56B4E9", "#3a4cc0")  # cpp or cuda, triton, ipvrm
YARDSTICK = "#8a949e"
FAMILIES = {"eager": "#E69F00", "padded": "#E69F00", "torch.compile": "#D55E00", "released": "#009E73"}
OTHERS = ("#CC79A7", "#b5a400", "#8c510a", "#7f3c8d", "#a6761d", "#4d4d4d")
LOST, WON = "#D55E00", "#00694d"
MARKERS = "osD^vP*X"
SHAPES = "sD^vPX<>"  # of the others' dots
TALLEST = 1800  # pixels of a picture: about two screens
AXES = dict(N="N, rows", V="V, vocabulary size", K="K, token ids a row", T="T, tokens a sequence")


def draw(
    rows: Sequence[Row], machine: Mapping[str, Any], folder: Path, study: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write the headline, one PNG of dots an op and one of each family of curves into `folder`; returns their
    paths. study: see `headline.panels`."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(rows)
    written = []
    if found := panels(rows, study):
        written.append(_save(headline(found, rows, machine), folder / "headline.png"))
    single = [row for row in rows if not row.curve]
    for op in dict.fromkeys(row.op for row in single):
        figure = dots([row for row in single if row.op == op], op, machine, colours)
        if figure is not None:
            written.append(_save(figure, folder / f"dots-{op}.png"))
    judged = [row for row in single if ACCURACY in row.shape and row.fp64_error]
    if judged:
        written.append(_save(accuracy(judged, machine), folder / "accuracy.png"))
    curves: dict[str, list[Growth]] = defaultdict(list)
    fits = growth(rows)
    beside = {(f.op, f.series) for f in fits if not is_ours(f.contender) and f.contender not in LESS_WORK}
    for fit in fits:  # a panel that would show us alone is none
        if (fit.op, fit.series) in beside:
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
    _heading(figure, total, "error of a log-prob against fp64, in nats (left is better)", machine, "Bold")
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


def headline(found: Sequence[Panel], rows: Sequence[Row], machine: Mapping[str, Any]) -> Figure:
    """Time against scratch memory, a panel a case, one dot a contender; what is lost is said below."""
    foot = _wrapped(f"Lost: {'; '.join(lost(found, rows)) or 'nothing'}.", 175)
    under = 0.95 + 0.17 * (foot.count("\n") + 1)
    total = 1.25 + 4.3 + under
    figure = Figure(figsize=(12.5, total), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    sizes = "2,048 tokens, hidden 1,024, vocabulary 32,000, fp32"
    figure.text(0.06, 1 - 0.36 / total, _capital(title(found)), fontsize=14.5, fontweight="bold", color=INK)
    figure.text(0.06, 1 - 0.64 / total, f"{sizes}. {where(machine)}.", fontsize=9, color=MUTED)
    if any(point.elsewhere for panel in found for point in panel.points):
        own = LIBRARIES.get(str(machine.get("cpu_matmul")), "the library chosen for this processor")
        text = (
            f"Filled: our matmuls by {own}, as chosen for this processor; hollow: by PyTorch's other library."
        )
        figure.text(0.06, 1 - 0.86 / total, text, fontsize=9, color=MUTED)
    top = 2 * max(point.scratch_mib for panel in found for point in panel.points)
    grid = figure.add_gridspec(
        1, len(found), left=0.06, right=0.985, top=1 - 1.25 / total, bottom=under / total, wspace=0.05
    )
    for place, panel in enumerate(found):
        axes = figure.add_subplot(grid[place])
        axes.set_yscale("log")
        axes.set_ylim(1.5, top)
        axes.set_xlim(0, 1.22 * max(point.ratio for point in panel.points))
        axes.set_yticks([y for y in (4, 16, 64, 256, 1024, 4096) if y < top])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        _frame(axes, "both")
        axes.tick_params(labelsize=9, colors=MUTED, length=0, labelleft=not place)
        axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)
        axes.set_xlabel("time, x the bare hidden @ weight.T of the case", fontsize=9.5, color=INK)
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.text(1, 1.55, " bare matmul", color=MUTED, fontsize=8, va="bottom")
        for point in panel.points:
            x, y = point.ratio, max(point.scratch_mib, 1.6)
            colour = OURS[0] if point.ours else YARDSTICK
            face = "white" if point.elsewhere else colour
            axes.plot(
                x, y, "o", markersize=12 if point.ours else 8, markerfacecolor=face, markeredgecolor=colour,
                markeredgewidth=1.8, zorder=4,
            )  # fmt: skip
            if point.elsewhere:
                ours = panel.ours
                axes.plot([x, ours.ratio], [y, ours.scratch_mib], ":", color=OURS[0], linewidth=1, zorder=2)
        if not place:
            axes.set_ylabel("scratch memory, MiB (log scale)", fontsize=9.5, color=INK)
            axes.annotate(
                "better", (0.02, 0.03), (0.09, 0.12), xycoords="axes fraction", color=MUTED, fontsize=9,
                arrowprops=dict(arrowstyle="->", color=MUTED),
            )  # fmt: skip
        _label(figure, axes, panel)
    figure.text(0.06, (under - 0.72) / total, notes(found), fontsize=8.5, color=MUTED)
    figure.text(0.06, 0.1 / total, foot, fontsize=8.5, color=LOST if "Lost: nothing" not in foot else MUTED)
    return figure


def _label(figure: Figure, axes: Any, panel: Panel) -> None:
    """A label beside every dot, where it covers neither dots nor other labels: ours first, then bottom up."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    places = [axes.transData.transform((p.ratio, max(p.scratch_mib, 1.6))) for p in panel.points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in places]
    frame = axes.get_window_extent(renderer)
    order = sorted(range(len(places)), key=lambda n: (not panel.points[n].ours, panel.points[n].scratch_mib))
    for number in order:
        point = panel.points[number]
        tries = [(dx, dy, "left") for dy in (0, 8, -8, 15, -15, 24, -24) for dx in (10,)]
        tries += [(-10, dy, "right") for dy in (0, 8, -8, 15, -15)] + [(0, 16, "center"), (0, -16, "center")]
        best = None
        for dx, dy, side in tries:
            text = axes.annotate(
                f"{point.label}  {point.ratio:.2f}x", (point.ratio, max(point.scratch_mib, 1.6)), (dx, dy),
                textcoords="offset points", ha=side, va="center", fontsize=8.8, zorder=5,
                color=OURS[0] if point.ours else INK, fontweight="bold" if point.ours else "normal",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            covered = sum(box.overlaps(other) for other in taken) + 3 * (not inside)
            if best is None or covered < best[0]:
                if best:
                    best[1].remove()
                best = (covered, text, box)
            else:
                text.remove()
            if not covered:
                break
        assert best is not None
        taken.append(best[2])


def dots(
    rows: Sequence[Row], op: str, machine: Mapping[str, Any], colours: Mapping[str, str]
) -> Figure | None:
    """Time as a multiple of the yardstick's on a log axis: a line for each case and variant, one dot a
    contender, and in words how far ours is from the fastest other one; at most TALLEST pixels high.
    """
    cases = {shape: [r for r in case if not r.error] for (_, shape), case in by_case(rows).items()}
    cases = {shape: case for shape, case in cases.items() if any(is_ours(r.contender) for r in case) or case}
    if not cases:
        return None
    results = {(v.shape, v.ours.partition(", ")[2]): v for v in verdicts(rows)}
    plan: list[tuple[float, str, str, list[Row]]] = []  # (height, text, shape, dots); a heading has none
    for shape, case in cases.items():
        text = _wrapped(shape, 100)
        plan.append((0.1 + 0.17 * (1 + text.count("\n")), text, shape, []))
        variants: dict[str, list[Row]] = defaultdict(list)
        for row in case:
            if row.contender not in LESS_WORK:
                variants[row.contender.partition(", ")[2]].append(row)
        plan += [(0.23, variant, shape, group) for variant, group in variants.items()]
    names = list(dict.fromkeys(r.contender.partition(", ")[0] for _, _, _, group in plan for r in group))
    look = _looks(names, colours)
    columns = 5
    above = 1.0 + 0.2 * -(-len(names) // columns)
    height = sum(part[0] for part in plan)
    total = above + height + 0.55
    dpi = min(110, int(TALLEST / total))
    figure = Figure(figsize=(12.5, total), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    title = f"{op}: time relative to the yardstick (left is faster)"
    _heading(figure, total, title, machine, "Large dots" if any(map(is_ours, names)) else "All dots")
    axes = figure.add_axes((0.17, 0.55 / total, 0.55, height / total))
    shown = [r.ratio for _, _, _, group in plan for r in group]
    axes.set_xscale("log")
    axes.set_xlim(min(*shown, 1) / 1.25, max(*shown, 1) * 1.25)
    axes.set_ylim(0, height)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    _frame(axes, "x")
    _log_ticks(axes.xaxis)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8, colors=MUTED)
    axes.set_xlabel(
        "median time / that of the yardstick: the bare matmul, or else the first (log)", fontsize=8.5
    )
    beside = axes.get_yaxis_transform()
    at = height
    for part, text, shape, group in plan:
        at -= part
        middle = at + part / 2
        if not group:
            axes.text(
                -0.29, at + 0.04, text, transform=beside, fontsize=8.5, fontweight="bold", color=INK,
                zorder=3, bbox=dict(facecolor="white", edgecolor="none", pad=1),
            )  # fmt: skip
            continue
        axes.text(-0.01, middle, text, transform=beside, ha="right", va="center", fontsize=8, color=MUTED)
        axes.axhline(middle, color=GRID, linewidth=0.7, zorder=1)
        for row in sorted(group, key=lambda r: is_ours(r.contender)):
            name = row.contender.partition(", ")[0]
            axes.plot(row.ratio, middle, zorder=5 if is_ours(name) else 4, **look[name])
        verdict = results.get((shape, text))
        if verdict is not None:
            colour = dict(won=WON, lost=LOST, level=MUTED)[verdict.outcome]
            axes.text(
                1.01, middle, _short(verdict), transform=beside, va="center", fontsize=7.5, color=colour,
                fontweight="bold" if verdict.outcome == "lost" else "normal",
            )  # fmt: skip
    handles = [Line2D([], [], label=name, **look[name]) for name in names]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.72 / total), ncols=columns,
        fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def _looks(names: Sequence[str], colours: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How each contender's dots are drawn: ours large, the second and fourth of them hollow."""
    ours, others = ([n for n in names if is_ours(n) == mine] for mine in (True, False))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        colour = next(colours[key] for key in colours if key.partition(", ")[0] == name)
        looks: dict[str, Any] = dict(linestyle="", color=colour, markersize=7, markeredgewidth=0.6)
        if name in ours:
            place = ours.index(name)
            face = "white" if place % 2 else colour
            looks |= dict(marker="oDh"[place // 2 % 3], markersize=9, markerfacecolor=face)
            looks |= dict(markeredgecolor=colour, markeredgewidth=1.8)
        else:
            looks |= dict(marker=SHAPES[others.index(name) % len(SHAPES)], markeredgecolor="white")
        found[name] = looks
    return found


def _short(verdict: Verdict) -> str:
    """A verdict beside its line: who, and by how much."""
    other = verdict.other.partition(", ")[0]
    text = str(verdict).partition(":")[0]
    if verdict.outcome == "level":
        return f"level with {other}"
    factor = max(verdict.factor, 1 / verdict.factor)
    return f"{text}: {factor:.2f}x {'faster' if verdict.outcome == 'won' else 'slower'} than {other}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def lines(
    fits: Sequence[Growth], axis: str, machine: Mapping[str, Any], colours: Mapping[str, str]
) -> Figure:
    """Time and memory over one size, a row of two panels for each op and series."""
    groups: dict[tuple[str, str], list[Growth]] = defaultdict(list)
    for fit in fits:
        groups[fit.op, fit.series].append(fit)
    total = 1.1 + 3.3 * len(groups)
    figure = Figure(figsize=(11, total), dpi=min(130, int(TALLEST / total)), facecolor="white")
    FigureCanvasAgg(figure)
    _heading(figure, total, f"time and memory over {AXES.get(axis, axis)}", machine, "Thick lines")
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
            low, high = axes.get_ylim()  # on a log axis; room for the legend above the lines
            axes.set_ylim(low, high * (high / low) ** (0.12 * len(group)))
            axes.legend(fontsize=8, frameon=False, loc="upper left")
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


def _heading(figure: Any, total: float, title: str, machine: Mapping[str, Any], ours: str) -> None:
    """The title and what was measured on; `ours` says how this package is drawn."""
    figure.text(0.02, 1 - 0.3 / total, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(
        0.02,
        1 - 0.62 / total,
        _wrapped(f"{conditions(machine)}. {ours}: this package.", 160),
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
