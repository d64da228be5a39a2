"""What `ipvrm demo fig6` prints and writes: the table, the picture, and what they show; and Figure 6 as
the paper has it."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipvrm.demo.figures import GRID, INK, MUTED
from ipvrm.run_folder import replacing, write_json, write_text

MISSING = "no picture: matplotlib is not installed; pip install 'ipvrm[plot]' and run it again for fig6.png"
COLOURS = {"frozen": "#7b8794", "naive": "#c0392b", "DLW": "#d99a2b", "ADB": "#2f8a57", "both": "#2f5d8a"}
MARKERS = {"frozen": "s", "naive": "v", "DLW": "^", "ADB": "D", "both": "o"}
NORMAL_95 = 1.96  # standard errors to each side
APART = 0.22  # steps between the points of two variants, so that their intervals are seen
SHOWN_FROM = 3.0  # standard errors
HEADER = ["", "accuracy", "gain", "AUC of V", "AUC - frozen", "V acc.", "V gap"]


def write_report(output: Path, results: dict[str, Any], show: bool = True) -> dict[str, Any]:
    """Writes results.json, report.md and fig6.png (with matplotlib); prints the table where `show`.

    Returns:
        `results` with `conclusions` and `picture` added.
    """
    picture = draw(output / "fig6.png", results["variants"])
    results = results | {
        "conclusions": list(conclusions(results)),
        "picture": None if picture is None else picture.name,
    }
    write_json(output / "results.json", results)
    rows = list(_rows(results["summary"]))
    lines = [
        "# Figure 6: the reward model's online update",
        "",
        title(results),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" + "|--:" * (len(HEADER) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        legend(results),
        "",
        *(f"- {text}" for text in results["conclusions"]),
        "",
        f"![held-out accuracy and AUC over steps]({picture.name})" if picture else MISSING,
        "",
    ]
    write_text(output / "report.md", "\n".join(lines))
    if show:
        _print(output, results, rows, picture)
    return results


def problem_error(accuracy: float, problems: int) -> float:
    """Standard error of a share of right answers that comes of the problems drawn."""
    return math.sqrt(accuracy * (1 - accuracy) / problems)


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 of a single value)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))


def accuracy_points(runs: Sequence[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, accuracy, half of its 95 % interval) of one variant's seeds: of the problems drawn and of the
    seeds together, as in the table."""
    points = []
    for at in zip(*(run["held_out"] for run in runs), strict=True):
        mean, between_seeds = mean_with_error([one["accuracy"] for one in at])
        error = math.hypot(problem_error(mean, at[0]["responses"]), between_seeds)
        points.append((at[0]["step"], mean, NORMAL_95 * error))
    return points


def with_error(value: tuple[float, float], sign: str = "") -> str:
    return f"{value[0]:{sign}.3f} ± {value[1]:.3f}"


def _rows(summary: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    for name, s in summary.items():
        own = name == "frozen"
        yield [
            name,
            with_error(s["end"]),
            with_error(s["gain"], "+"),
            with_error(s["auc"]),
            "" if own else with_error(s["auc_gain"], "+"),
            f"{s['rm_accuracy'][0]:.3f}",
            f"{s['value_gap'][0]:.2f}",
        ]


def title(results: dict[str, Any]) -> str:
    """The sizes in a line."""
    scale, seeds = results["scale"], results["config"]["seeds"]
    start = results["summary"]["frozen"]["start"]
    return (
        f"DistRL, {scale['steps']} steps of {scale['prompts']} prompts x {scale['num_generations']} "
        f"responses, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; "
        f"accuracy on {scale['held_out']} held-out problems, {with_error(start)} before."
    )


def legend(results: dict[str, Any]) -> str:
    """What the columns are."""
    one = len(results["config"]["seeds"]) == 1
    accuracy = (
        "that of the problems drawn, and not of the training run"
        if one
        else "that of the problems drawn and of the seeds together"
    )
    return (
        "± is a standard error. Accuracy: at the last step; its error is "
        f"{accuracy}. The same problems are asked before and after and of every variant; the errors of a "
        "gain and of a difference take them as drawn anew, so they are too large. AUC and accuracy of V: "
        "does the mean value at the end of a response tell right from wrong ones, before the reward model "
        "has learnt from any rollout of the step; means over steps. "
        f"Where it is updated that is the step's first minibatch, {_responses(results, 'both')} responses "
        f"on average; frozen, all {_responses(results, 'frozen')}. At the first step all are one model, and "
        "their AUC differs by that choice alone. AUC - frozen: mean difference at the same step, from the "
        "second on; steps of one run are not independent, so its error is too small for a claim about other "
        "runs. V gap: mean value of right responses less that of wrong, as the policy got them, so after the "
        "step's updates."
    )


def _responses(results: dict[str, Any], variant: str) -> str:
    runs = results["variants"][variant]["seeds"].values()
    counts = [count for run in runs for count in run["reward_model"]["rm_auc_responses"]]
    return f"{sum(counts) / len(counts):.0f}"


def conclusions(results: dict[str, Any]) -> Iterator[str]:
    """Sentences that the numbers bear out, and what they do not show."""
    summary = results["summary"]
    scored = {n: s["gain"][0] / max(s["gain"][1], 1e-9) for n, s in summary.items()}
    above = [n for n, ratio in scored.items() if ratio > SHOWN_FROM]
    yield f"Held-out accuracy rose by more than {SHOWN_FROM:g} standard errors with: {_listed(above)}."
    ends = {n: s["end"] for n, s in summary.items()}
    best, worst = max(ends, key=lambda n: ends[n][0]), min(ends, key=lambda n: ends[n][0])
    gap, error = ends[best][0] - ends[worst][0], (ends[best][1] ** 2 + ends[worst][1] ** 2) ** 0.5
    verdict = "a difference is shown" if gap > SHOWN_FROM * error else "no difference is shown"
    yield (
        f"At the end {best} is highest ({ends[best][0]:.3f}) and {worst} lowest ({ends[worst][0]:.3f}), "
        f"{gap:.3f} ± {error:.3f} apart: {verdict}."
    )
    for name, s in summary.items():
        if name == "frozen":
            continue
        mean, error = s["auc_gain"]
        ahead = f"{name} is {'ahead' if mean > 0 else 'behind'} here"
        verdict = ahead if abs(mean) > SHOWN_FROM * error else "no difference shown"
        yield f"AUC of the reward model, {name} less frozen: {mean:+.3f} ± {error:.3f}, {verdict}."
    seeds = len(results["config"]["seeds"])
    yield (
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'} of a small arithmetic task, "
        f"{results['scale']['steps']} steps: this exercises the five switches side by side. What the paper's "
        "Figure 6 shows on mathematics is not tested by it."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none of the variants"


def draw(path: Path, variants: dict[str, Any]) -> Path | None:
    """Held-out accuracy over steps with 95 % intervals, one line a variant, side by side; beside it, where
    the runs have one, the AUC of the reward model on new rollouts with its intervals over seeds.

    Returns:
        `path`, or None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    runs_of = {name: list(variant["seeds"].values()) for name, variant in variants.items()}
    with_auc = all("rm_auc" in run["reward_model"] for runs in runs_of.values() for run in runs)
    figure = Figure(figsize=(13 if with_auc else 8.5, 4.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, 1 + with_auc, squeeze=False)[0])
    seeds = len(next(iter(runs_of.values())))
    for place, (name, runs) in enumerate(runs_of.items()):
        steps, means, halves = zip(*accuracy_points(runs), strict=True)
        shift = APART * (place - (len(runs_of) - 1) / 2)
        panels[0].errorbar(
            [step + shift for step in steps], means, halves, color=COLOURS[name], marker=MARKERS[name],
            markersize=5, linewidth=1.2, elinewidth=1.4, capsize=2.5, label=name,
        )  # fmt: skip
        if not with_auc:
            continue
        auc = zip(*(run["reward_model"]["rm_auc"] for run in runs), strict=True)
        defined = [[x for x in values if x is not None] for values in auc]  # one list a step
        found = [mean_with_error(values) if values else (math.nan, math.nan) for values in defined]
        at, lines = runs[0]["step"], [mean for mean, _ in found]
        panels[1].plot(at, lines, color=COLOURS[name], marker=MARKERS[name], markersize=4.5, linewidth=1.6)
        if seeds > 1:
            low, high = ([m + sign * NORMAL_95 * e for m, e in found] for sign in (-1, 1))
            panels[1].fill_between(at, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
    panels[0].set_xticks(steps)
    count = f"{seeds} seeds" if seeds > 1 else "1 seed: of the problems alone"
    titles = [f"held-out accuracy of the policy, 95 % intervals ({count})"]
    titles += ["AUC of the reward model on new rollouts" + ", 95 % over seeds" * (seeds > 1)]
    _finish(figure, panels, titles[: len(panels)], path)
    return path


def draw_training(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Path | None:
    """Figure 6 as the paper has it: right rollouts, and right verdicts of the reward model, over steps.

    Args:
        curves: by variant two columns of percents by step; none of one that is not there.

    Returns:
        `path`, or None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(13, 4.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, 2))
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
    for name, columns in curves.items():
        for axes, points in zip(panels, columns.values(), strict=False):
            style = {"color": COLOURS[name], "marker": MARKERS[name], "label": name}
            axes.plot(range(1, len(points) + 1), points, markersize=4, linewidth=1.4, **style)
    titles = ["right rollouts in %", "right verdicts of the reward model on new rollouts in %"]
    _finish(figure, panels, titles, path)
    return path


def _finish(figure: Any, panels: Sequence[Any], titles: Sequence[str], path: Path) -> None:
    """What both pictures share, and the file."""
    for axes, text in zip(panels, titles, strict=True):
        axes.set_title(text, loc="left", fontsize=10.5, color=INK)
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(GRID)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _print(output: Path, results: dict[str, Any], rows: list[list[str]], picture: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=title(results), title_justify="left", title_style="bold")
    table.box, table.padding = None, (0, 1, 0, 0)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
    console.print(legend(results), markup=False, style="dim")
    console.print()
    for text in results["conclusions"]:
        console.print(f"- {text}", markup=False)
    seconds = sum(results["seconds"].values())
    console.print(f"\ntime of the runs: {seconds:.0f} s", markup=False)
    console.print(f"picture: {picture}" if picture else MISSING, markup=False, soft_wrap=True)
    console.print(f"everything is in {output}", markup=False, soft_wrap=True)
