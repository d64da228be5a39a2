"""`ipvrm report`: runs and their evaluations as one HTML page, as tables, and as a picture."""

import csv
import io
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked
from ipvrm.run_folder import installed_version, remove_leftovers_of, replacing, write_text
from ipvrm.view.page import page
from ipvrm.view.runs import data_block, find_runs

PICTURED = 8  # metrics in the PNG
WIDEST = 10  # columns of a table on the terminal


@dataclass(frozen=True)
class ReportConfig:
    """Runs over each other: curves, evaluations with intervals, and only the settings that differ.

    Writes OUTPUT.html, OUTPUT.md, a CSV for each table (OUTPUT-runs.csv ...) with all logged values in
    OUTPUT-metrics.csv, and with matplotlib OUTPUT.png; prints the tables. A run that is still going is read.
    """

    dirs: Positional[tuple[str, ...]]
    """Run folders, or folders that hold some."""
    output: str = "report"
    """Where the files go, without an ending."""


def report(config: ReportConfig) -> dict[str, Any]:
    """Writes the files of `config.output` and returns the page's data (`ipvrm.view.runs`).

    Raises:
        IpvrmError: no folder given, one that is not there, or one without a run or an evaluation.
    """
    if not config.dirs:
        raise IpvrmError("report: name at least one run folder")
    runs, evaluations = find_runs(config.dirs)
    data = data_block(
        runs,
        evaluations,
        ipvrm=installed_version("ipvrm"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
    )
    stem = config.output.removesuffix(".html")
    texts = {f"{stem}.html": page("report", data), f"{stem}.md": markdown(data)}
    texts |= {f"{stem}-{t['name']}.csv": _csv([t["head"], *t["rows"]]) for t in data["tables"]}
    if data["metrics"]:
        values = [["metric", "run", "step", "seconds", "value"], *_values(data)]
        texts[f"{stem}-metrics.csv"] = _csv(values)
    picture = Path(f"{stem}.png")
    with locked(f"{stem}.html"):
        remove_leftovers_of(*map(Path, texts), picture)
        for path, text in texts.items():
            write_text(path, text)
        if data["metrics"]:
            _picture(picture, data)
    return data


def markdown(data: dict[str, Any]) -> str:
    """The tables of a report."""
    parts = []
    for table in data["tables"]:
        rows = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
        lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        note = [table["note"], ""] if table["note"] else []
        parts += [f"## {table['title']}", "", *lines, "", *note]
    return "\n".join(parts)


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _values(data: dict[str, Any]) -> list[list[Any]]:
    return [
        [metric["name"], data["runs"][line["run"]]["name"], step, seconds, value]
        for metric in data["metrics"]
        for line in metric["lines"]
        for step, seconds, value in zip(line["step"], line["seconds"], line["value"], strict=True)
    ]


def _picture(path: Path, data: dict[str, Any]) -> None:
    """The first metrics as small charts; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'ipvrm[plot]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = data["metrics"][:PICTURED]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6 * columns, 2.6 * rows + 0.5), squeeze=False)
    for axis, metric in zip(axes.flat, shown, strict=False):
        for line in metric["lines"]:
            values = [float("nan") if value is None else value for value in line["value"]]
            name = data["runs"][line["run"]]["name"]
            axis.plot(
                line["step"],
                values,
                label=name,
                color=f"C{line['run']}",
                marker="." if len(values) < 9 else "",
            )
        axis.set_title(metric["name"], fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def main(config: ReportConfig) -> None:
    """Console entry."""
    from rich.console import Console
    from rich.table import Table

    data = report(config)
    console = Console()
    for table in data["tables"]:
        shown = Table(title=table["title"], title_justify="left", box=None, padding=(0, 2, 0, 0))
        for i, name in enumerate(table["head"][:WIDEST]):
            shown.add_column(name, justify="left" if not i else "right", overflow="fold")
        for row in table["rows"]:
            shown.add_row(*map(str, row[:WIDEST]))
        console.print(shown)
        if table["note"]:
            console.print(table["note"], markup=False)
    stem = config.output.removesuffix(".html")
    runs, metrics = len(data["runs"]), len(data["metrics"])
    print(f"{stem}.html: {runs} run{'s' * (runs != 1)}, {metrics} metrics")
