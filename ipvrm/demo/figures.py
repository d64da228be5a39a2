"""The demo's picture: one wrong trace, token by token, under both reward models; needs `ipvrm[plot]`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipvrm.demo.arithmetic import STEP_SEPARATOR
from ipvrm.demo.settings import NAMES

MISSING = (
    "no picture: matplotlib is not installed; pip install 'ipvrm[plot]' and run the demo again for trace.png"
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
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
