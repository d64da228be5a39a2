"""The demo's pictures, which need `ipvrm[plot]`: one wrong trace, token by token, under both reward models,
and the policies' accuracy over their steps."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipvrm.demo.arithmetic import STEP_SEPARATOR
from ipvrm.demo.settings import ALGORITHMS, NAMES
from ipvrm.run_folder import replacing

MISSING = (
    "no pictures: matplotlib is not installed; pip install 'ipvrm[plot]' and run the demo again for "
    "trace.png and policies.png"
)
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
CURVE, WRONG = "#2f5d8a", "#c0392b"
UP, DOWN = "#5b9bd5", "#e07b53"


def draw_trace(path: Path, trace: dict[str, Any], choices: Sequence[dict[str, Any]]) -> Path | None:
    """Prefix value (curve) and TD (bars) at every token of a trace; its first wrong step is marked.

    Args:
        trace: `problem`, `steps`, `label` and per model `log_ratio` (T,), a token a character, and `flagged`.
        choices: objective, beta of the models.

    Returns:
        `path`, or None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    characters = [*STEP_SEPARATOR.join(trace["steps"]), "end"]
    betas = {choice["objective"]: choice["beta"] for choice in choices}
    models = {name: model for name, model in trace["models"].items() if name in betas}
    height = 1.35 + 3.5 * len(models)
    figure = Figure(figsize=(13, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(
        len(models), 1, left=0.07, right=0.985, top=1 - 1.3 / height, bottom=0.45 / height, hspace=0.36
    )
    bounds = _bounds(trace["steps"])
    for row, (name, model) in enumerate(models.items()):
        inner = outer[row].subgridspec(2, 1, height_ratios=[1.5, 1], hspace=0.1)
        top, bottom = figure.add_subplot(inner[0]), figure.add_subplot(inner[1])
        td = [betas[name] * ratio for ratio in model["log_ratio"]]
        value = list(itertools.accumulate(td))
        for axes in (top, bottom):
            _frame(axes, bounds, trace["label"], len(td))
        top.plot(range(len(value)), value, color=CURVE, linewidth=1.8, marker="o", markersize=3.2, zorder=3)
        bottom.bar(range(len(td)), td, color=[UP if part >= 0 else DOWN for part in td], width=0.72, zorder=3)
        top.set_ylabel("prefix value $V_t$", color=INK, fontsize=9)
        bottom.set_ylabel("TD", color=INK, fontsize=9)
        for axes in (top, bottom):
            axes.yaxis.set_label_coords(-0.047, 0.5)
        flagged = "no step" if model["flagged"] < 0 else f"step {model['flagged'] + 1}"
        title = f"{NAMES[name]} (beta {betas[name]:g}) flags {flagged}"
        top.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=20)
        _name_steps(top, bounds, trace["label"])
        _name_tokens(bottom, characters, bounds, trace["label"])
    first = (
        f"its first wrong step is step {trace['label'] + 1}" if trace["label"] >= 0 else "every step is right"
    )
    figure.text(0.07, 1 - 0.3 / height, trace["problem"], fontfamily="monospace", fontsize=13, color=INK)
    subtitle = f"one answer of the base model, token by token; {first}"
    figure.text(0.07, 1 - 0.52 / height, subtitle, fontsize=9.5, color=MUTED)
    return _save(figure, path)


def draw_policies(path: Path, policies: dict[str, Any]) -> Path | None:
    """Held-out accuracy over the steps, a panel per algorithm; bands are 95 % intervals.

    Args:
        policies: what `ipvrm.demo.policies.compare` returns.

    Returns:
        `path`, or None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    algorithms = policies["algorithms"]
    figure = Figure(figsize=(4.1 * len(algorithms), 4.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(algorithms), sharex=True, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.62 / figure.get_figwidth(), right=0.985, top=0.76, bottom=0.13, wspace=0.08)
    for axes, (name, found) in zip(panels, algorithms.items(), strict=True):
        for other, model in algorithms.items():
            if other != name:
                axes.plot(*_means(model["curve"]), color=MUTED, linewidth=1, alpha=0.55, zorder=2)
        steps, means = _means(found["curve"])
        low, high = zip(*([100 * x for x in point["interval"]] for point in found["curve"]), strict=True)
        axes.fill_between(steps, low, high, color=UP, alpha=0.25, linewidth=0, zorder=1)
        if policies["seeds"] > 1:
            for accuracies in found["by_seed"]:
                axes.plot(
                    steps, [100 * a for a in accuracies], color=CURVE, linewidth=0.8, alpha=0.6, zorder=3
                )
        axes.plot(steps, means, color=CURVE, linewidth=2.2, marker="o", markersize=4, zorder=4)
        axes.axhline(means[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        gain = found["gain"]
        low, high = gain["interval"]
        axes.set_title(ALGORITHMS[name], loc="left", fontsize=11, color=INK, fontweight="bold", pad=20)
        text = f"gain {100 * gain['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        axes.annotate(
            text,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=9,
            color=MUTED,
        )
        axes.set_xticks(steps)
        axes.set_xlabel("step", color=INK, fontsize=9)
        axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    panels[0].set_ylabel("right answers, %", color=INK, fontsize=9)
    seeds = policies["seeds"]
    left = 0.62 / figure.get_figwidth()
    figure.text(left, 0.94, "Held-out accuracy of the policies", fontsize=13, color=INK)
    subtitle = f"{policies['problems']:,} problems, one response each; band: 95 % interval over problems"
    subtitle += f" and {seeds} seeds, thin lines: one seed each" if seeds > 1 else ", one seed"
    figure.text(left, 0.895, f"{subtitle}; grey: the other algorithms", fontsize=9.5, color=MUTED)
    return _save(figure, path)


def _means(curve: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps and accuracies in %."""
    return [point["step"] for point in curve], [100 * point["mean"] for point in curve]


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _bounds(steps: Sequence[str]) -> list[tuple[float, float]]:
    """Left and right edge of each step on the token axis, its separator included."""
    bounds, start = [], 0
    for i, step in enumerate(steps):
        end = start + len(step) + (len(STEP_SEPARATOR) if i + 1 < len(steps) else 0)
        bounds.append((start - 0.5, end - 0.5))
        start = end
    return bounds


def _frame(axes: Any, bounds: list[tuple[float, float]], label: int, length: int) -> None:
    axes.set_xlim(-0.9, length - 0.1)
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=2)
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for start, _ in bounds[1:]:
        axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    if label >= 0:
        axes.axvspan(*bounds[label], color=WRONG, alpha=0.09, linewidth=0, zorder=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(GRID)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=MUTED)


def _name_steps(axes: Any, bounds: list[tuple[float, float]], label: int) -> None:
    """`step k` over each step, the first wrong one named so."""
    for i, (start, end) in enumerate(bounds):
        axes.annotate(
            f"step {i + 1}: wrong" if i == label else f"step {i + 1}",
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=WRONG if i == label else MUTED,
            fontweight="bold" if i == label else "normal",
        )


def _name_tokens(axes: Any, characters: list[str], bounds: list[tuple[float, float]], label: int) -> None:
    """The tokens below the axis, those of the first wrong step in red."""
    size = 10 if len(characters) <= 48 else 8.5
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xticks(range(len(characters)), characters, fontfamily="monospace", fontsize=size, color=INK)
    for position, text in enumerate(axes.get_xticklabels()):
        if label >= 0 and bounds[label][0] < position < bounds[label][1]:
            text.set_color(WRONG)
