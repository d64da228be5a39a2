"""benchmarks/results/README.md from the JSON files beside it: `python -m benchmarks.render [--results DIR]`.

Every number in it comes from a file in that folder. Files of `benchmarks.run` have rows, those of
`benchmarks.gpu_report` parts; others are left alone. `--plots` draws the pictures again too (extra `plot`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import headline
from benchmarks.suite.headline import LIBRARIES
from benchmarks.suite.heads import with_todays_target
from benchmarks.suite.machine import ROOT
from benchmarks.suite.measure import ACCURACY, LESS_WORK, MATMUL, MATMUL_ONEDNN, Row, is_ours, yardsticks_of
from benchmarks.suite.session import write_text
from benchmarks.suite.tables import (
    Verdict,
    aims,
    by_case,
    by_variant,
    cell,
    conditions,
    error,
    growth,
    markdown,
    markdown_growth,
    milliseconds,
    verdicts,
)
from ipvrm_kernels.head.matmul import MEASURED

RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = """# Benchmark results

Written by `python -m benchmarks.render` from the JSON files in this folder; do not edit.
"""
HOW = """## How it is measured

Each file holds machine, versions, commit and command. The CPU files are made by

```bash
python -m benchmarks.run --full --results benchmarks/results && python -m benchmarks.render
```

on each kind of processor, whose rows stay when another kind is measured (killed, a run goes on with --go-on),
and a GPU's by `python -m benchmarks.gpu_report && python -m benchmarks.render`. Every contender's result is
checked before anything is timed; then contenders take turns, and the median, the 20th and the 80th percentile
of their times are kept; memory is the peak above inputs, scratch that less what is returned. Ratios are to
the bare matmul, the faster one where a file has both, by PyTorch's BLAS and by the oneDNN it brings along, in
the same rounds (a file with BLAS alone says so), or else to the first contender of a case. Targets are those
of today. Ours (`cpp`, `cuda`, `triton`, `ipvrm`) are judged against the fastest other contender that does the
same work, and the faster one is bold; the bare matmul does less and is never judged. What stands behind a
comma is a variant: compared with the same variant only; "by blas" and "by onednn" are ours by the matmul
library that is not the default on that processor. TFLOP/s count the matmuls that an op cannot do without (one
forward, two backward, one of them for a frozen head). The error against fp64 is the largest on 128 rows: of
log-probs in nats, of gradients of hidden relative to the largest.
"""
READING = """Times are multiples of the yardstick's, in brackets MiB of scratch memory; the fastest of a line
is bold. Plain PyTorch is `log_softmax` of all logits, or (s) of 64 rows at a time, as the method's released
code does, where that is faster; "padded eager" where sequences are padded."""
UNMODELLED = """Empty: no model, which `_column_sums_kernel` (the gradient of a bias) and "other"
(what PyTorch launches besides matmuls) lack, and of the benchmarks the steps of training."""
OTHER_PAGES = {
    "demo": "what `ipvrm demo` shows",
    "demo_spread": "the demo over several base models",
    "real_input": "real rollouts and ProcessBench through the whole path",
    "objectives_learn": "which objectives and algorithms learn on the demo's task",
    "td_study": "whether a token's TD foretells the outcome",
    "fig6_smoke": "the five online updates of Figure 6",
    "reproduce_smoke": "all tables of the paper at the smallest scale, which is no reproduction",
    "trl_updates": "updates beside TRL's own",
    "rollout_and_label": "rollouts and labels: counts, times, agreement",
    "label_truths": "how often labels are right",
    "when_prefix_values_help": "reward models by length of response and share of wrong labels",
    "faults": "kills, disks, hostile files and the rest, and what was lost",
    "kernels": "modelled times of the GPU kernels",
}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results files in `folder` by name, in that order; `study` in them are the times of
    studies.cpu_matmul on the same kind of processor, where ours ran by the library chosen for it."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "machine" in content and {"rows", "parts"} & content.keys():
            chosen = (content["machine"].get("processor"), content["machine"].get("cpu_matmul"))
            studies = (
                folder / one.file for one in MEASURED.values() if (one.processor, one.library) == chosen
            )
            content["study"] = [t for path in studies if path.exists() for t in _read(path)["times"]]
            files[path.name] = content
    return files


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def pictures(folder: Path, name: str) -> list[str]:
    """Those of the results file `name` in `folder`, as paths from there."""
    plots = folder / "plots" / Path(name).stem
    return [path.relative_to(folder).as_posix() for path in sorted(plots.glob("*.png"))]


def page_of(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """`page` with the pictures that are in `folder`, and the folders there that have a page."""
    others = [path.parent.name for path in sorted(folder.glob("*/README.md"))]
    return page(files, {name: pictures(folder, name) for name in files}, others)


def page(
    files: Mapping[str, Mapping[str, Any]], plots: Mapping[str, Sequence[str]], others: Sequence[str] = ()
) -> str:
    """The README: what a reader looks for, then a chapter a file with its pictures `plots`; `others` are
    folders beside the files that have a page of their own."""
    chapters = [INTRODUCTION, *_opening(files, plots)]
    if others:
        links = [f"- [{name}]({name}/README.md): {OTHER_PAGES.get(name, name)}" for name in others]
        chapters.append("\n".join(["Other results:", "", *links, ""]))
    for name, content in files.items():
        title, shown = f"## [{name}]({name})\n", plots.get(name, ())
        if "parts" in content:
            chapters.append(f"{title}\n{gpu_page(content, level='###')}")
        else:
            rows = _rows(content)
            slow = _slow_yardstick(content["machine"], rows, content.get("study", ()))
            chapters.append(f"{title}\n{_measured(content['machine'], rows, shown, slow)}")
    return "\n".join([*chapters, HOW])


def opened_with(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first file that has measured what the page's picture shows, ours by both matmul libraries in the
    same rounds if any file has that."""
    shown = [name for name, of in files.items() if headline.panels(_rows(of), of.get("study", ()))]
    both = [name for name in shown if any(point.elsewhere for point in headline.points(_rows(files[name])))]
    return next(iter([*both, *shown]), None)


def _opening(files: Mapping[str, Mapping[str, Any]], plots: Mapping[str, Sequence[str]]) -> list[str]:
    """The picture, what is lost in it, and the table, of the file that is `opened_with`; errors against fp64
    of the first that has those."""
    name, found = opened_with(files), []
    if name is not None:
        rows, content = _rows(files[name]), files[name]
        panels = headline.panels(rows, content.get("study", ()))
        title = headline.title(panels)
        drawn = [plot for plot in plots.get(name, ()) if Path(plot).name == "headline.png"]
        found = [f"![{title}]({plot})\n" for plot in drawn]
        said = headline.lost(panels, rows)
        found += [f"**Lost**: {'; '.join(said) or 'nothing'}.\n"]
        found += [
            f"{READING} All of {name}, {headline.where(content['machine'])}.\n",
            headline.table(rows) + "\n",
        ]
    order = sorted(files, key=lambda file: file != name)  # the same file first
    lines = (headline.accuracy(_rows(files[file]), files[file]["machine"]) for file in order)
    found += [f"{line}\n" for line in [next(filter(None, lines), "")] if line]
    if files and not any("parts" in content for content in files.values()):
        found.append("No GPU has run this yet.\n")
    return found


def gpu_page(content: Mapping[str, Any], level: str = "#") -> str:
    """A GPU report: parts, the sweep, counters, then what was measured."""
    machine, parts = content["machine"], content["parts"]
    lines = [
        f"{level} {machine['device']}, {machine['date']}", "",
        f"`{machine['command']}`", "",
        "| part | status | seconds |", "|---|---|--:|",
        *(f"| {name} | {_status(part)} | {part['seconds']} |" for name, part in parts.items()), "",
    ]  # fmt: skip
    for part in parts.values():
        if part.get("tests"):
            lines += [_tests(part["tests"]), ""]
        if part.get("check"):
            lines += [_check(part["check"]), ""]
        if part.get("kernels"):
            lines += [_kernels(part["kernels"]), ""]
        if part.get("sweep"):
            lines += [_sweep(part["sweep"]), ""]
        if part.get("counters"):
            lines += [_counters(part["counters"]), ""]
    return "\n".join(lines) + "\n" + _measured(machine, _rows(content))


def _status(part: Mapping[str, Any]) -> str:
    count = part.get("reruns", 0)
    reruns = f", a fresh process after each of {count} CUDA errors" if count else ""
    probe = f"; then the probe: {part['probe']}" if "probe" in part else ""
    return f"{part['status']}{reruns}{probe}"


def _check(found: Mapping[str, Any]) -> str:
    """The verdicts of `python -m ipvrm_kernels`."""
    return "\n".join(f"- {line}" for line in found["verdicts"])


def _kernels(found: Sequence[Mapping[str, Any]]) -> str:
    """Device times of the head's kernels beside those modelled (benchmarks/suite/roofline.py)."""
    names = ("op", "shape", "kernel", "calls", "ms", "expected ms", "measured / expected")
    lines = [f"| {' | '.join(names)} |", "|---|---|---|--:|--:|--:|--:|"]
    for one in found:
        expected = one["expected_ms"]
        told = [milliseconds(expected), f"{one['ms'] / expected:.2f}"] if expected else ["", ""]
        cells = [
            one["op"],
            one["shape"],
            one["kernel"],
            f"{one['calls']:.0f}",
            milliseconds(one["ms"]),
            *told,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", UNMODELLED])


def _tests(found: Mapping[str, Any]) -> str:
    counts = [
        f"{impl}: " + ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(by.items()))
        for impl, by in found["counts"].items()
    ]
    failed = [f"- {name}" for name in found["failed"]]
    return "\n".join([f"Tests by implementation: {'; '.join(counts)}.", *(["", *failed] if failed else [])])


def _rows(content: Mapping[str, Any]) -> list[Row]:
    plain = content.get("rows") or [
        r for part in content.get("parts", {}).values() for r in part.get("rows", [])
    ]
    return [with_todays_target(Row.from_dict(row)) for row in plain]


def _slow_yardstick(
    machine: Mapping[str, Any], rows: Sequence[Row], study: Sequence[Mapping[str, Any]]
) -> str:
    """What to know of a file whose yardstick is the BLAS alone where ours run by oneDNN; "" of others."""
    names = {row.contender for row in rows}
    if machine.get("cpu_matmul") != "onednn" or MATMUL not in names or MATMUL_ONEDNN in names:
        return ""
    blas, onednn = LIBRARIES["blas"], LIBRARIES["onednn"]
    text = f"**Of an older commit**: its `{MATMUL}` is by PyTorch's {blas} alone, ours run by {onednn}"
    tiles = [row for row in study if row["op"] == "tile" and row["shape"].endswith("h w.T")]
    largest = {row["contender"]: row for row in reversed(tiles)}  # the first that the study timed
    larger = "larger"
    if largest.keys() >= LIBRARIES.keys():
        share = largest["onednn"]["median_ms"] / largest["blas"]["median_ms"]
        text += (
            f", which took {share:.2f} of its time for {largest['blas']['shape'].partition(' z =')[0]} here"
        )
        larger = f"about {1 / share:.1f} times as large"
    return f"{text}. Beside the faster of the two, today's yardstick, ratios would be {larger}."


def _measured(
    machine: Mapping[str, Any], rows: Sequence[Row], plots: Sequence[str] = (), warning: str = ""
) -> str:
    seconds = f", {machine['seconds']} s" if "seconds" in machine else ""
    load = f", load {machine['load']} before it" if "load" in machine else ""
    lines = [f"{conditions(machine)}{load}{seconds}.", "", f"`{machine['command']}`", ""]
    lines += [warning, ""] if warning else []
    if not rows:
        return "\n".join([*lines, "No rows.", ""])
    found = verdicts(rows)
    lines += [_summary(found), ""]
    lost = sorted((v for v in found if v.outcome == "lost"), key=lambda v: v.factor)
    if lost:
        lines += ["Lost:", "", *(f"- {v.op}, {v.shape}: {str(v).partition(': ')[2]}" for v in lost), ""]
    by_name = {Path(plot).stem: plot for plot in plots}
    by_name.pop("headline", None)
    single = [row for row in rows if not row.curve]
    for op in dict.fromkeys(row.op for row in single):
        here = [row for row in single if row.op == op]
        number, judged = len(by_case(here)), verdicts(here)
        outcome = _summary(judged) if judged else "Nobody else does the same."
        text = f"{op}: {number} case{'s' * (number > 1)}. {outcome}"
        lines += _folded(text, [_picture(by_name, f"dots-{op}"), _ratios(here)])
    accuracy = _accuracy(rows)
    if accuracy:
        lines += [accuracy, "", _picture(by_name, "accuracy"), ""]
    asked = aims(rows)
    if asked:
        counts = ", ".join(
            f"{number} {outcome}"
            for outcome in ("met", "MISSED", "unknown")
            if (number := sum(aim.outcome == outcome for aim in asked))
        )
        missed = [f"- {aim.op}, {aim.shape}: {aim}" for aim in asked if aim.outcome == "MISSED"]
        lines += [f"Targets: {counts}.", "", *missed, ""] if missed else []
        told = "\n".join(f"- {aim.op}, {aim.shape}: {aim}" for aim in asked)
        lines += _folded(f"Targets: {counts}", [told])
    fits = growth(rows)
    if fits:
        drawn = [_picture(by_name, name) for name in sorted(by_name) if name.startswith("growth-")]
        lines += _folded("Time and memory as one size grows", [*drawn, markdown_growth(fits)])
    rest = [_picture(by_name, name) for name in sorted(by_name)]
    return "\n".join([*lines, *rest, *_folded("Every row", [markdown(rows)])])


def _folded(title: str, parts: Sequence[str]) -> list[str]:
    """Lines of a section that a click opens."""
    shown = [line for part in parts if part for line in (part, "")]
    return [f"<details><summary>{title}</summary>", "", *shown, "</details>", ""]


def _picture(left: dict[str, str], name: str) -> str:
    """The picture of that name, which is then no longer left."""
    plot = left.pop(name, None)
    return f"![{name}]({plot})\n" if plot else ""


def _summary(found: Sequence[Verdict]) -> str:
    counts = {name: sum(v.outcome == name for v in found) for name in ("won", "lost", "level")}
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"Against the fastest other contender: {text}."


def _ratios(rows: Sequence[Row]) -> str:
    """A line for each case that lies on no curve and each variant of it: ours and the fastest other one, as
    ratios to the yardstick.
    """
    lines = ["| op | case | yardstick | ours | fastest other |", "|---|---|--:|--:|--:|"]
    for (op, shape), case in by_case(row for row in rows if not row.curve).items():
        timed = {row.contender: row for row in case if not row.error}
        bases = [timed[name] for name in yardsticks_of(row.contender for row in case) if name in timed]
        bases.sort(key=lambda row: row.median_ms)
        text = "; ".join(f"{row.contender} {milliseconds(row.median_ms)} ms" for row in bases)
        for ours, other in by_variant(case):
            cells = [f"{ours.ratio:.2f} {ours.contender}{_memory(ours)}"]
            cells.append("" if other is None else f"{other.ratio:.2f} {other.contender}{_memory(other)}")
            faster = 0 if other is None or ours.median_ms <= other.median_ms else 1
            number, _, rest = cells[faster].partition(" ")
            cells[faster] = f"**{number}** {rest}"
            lines.append(f"| {op} | {shape} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(rows: Sequence[Row]) -> str:
    """Errors of log-probs against fp64, a line a contender, a column a case; "" without such cases."""
    judged = [row for row in rows if ACCURACY in row.shape]
    if not judged:
        return ""
    cases = list(dict.fromkeys(row.shape for row in judged))
    names = [name for name in dict.fromkeys(row.contender for row in judged) if name not in LESS_WORK]
    found = {(row.contender, row.shape): row for row in judged}
    kinds = ["".join(part.partition(":")[0] for part in case.split(f"{ACCURACY}, ")) for case in cases]
    lines = [f"| error of a log-prob, nats | {' | '.join(kinds)} |", "|---|" + "--:|" * len(cases)]
    for name in names:
        told = [found.get((name, case)) for case in cases]
        cells = ["" if row is None else error(row.fp64_error) for row in told]
        if any(cells):
            lines.append(f"| {f'**{name}**' if is_ours(name) else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory(row: Row) -> str:
    rate = f", {cell(row.tokens_per_s, 0)} tokens/s" if row.tokens_per_s else ""
    scratch = "" if row.scratch_mib is None else f", {cell(row.scratch_mib, 0)} scratch"
    return f" ({cell(row.peak_mib, 0)} MiB{scratch}{rate})"


def _sweep(sweep: Mapping[str, Any]) -> str:
    tried = [one for one in sweep["tried"] if one["ms"] is not None]
    lines = [
        f"Sweep of the Triton head's tiles, {sweep['architecture']} {sweep['kind']}, {sweep['shape']}: "
        f"{len(sweep['tried'])} configurations, {len(tried)} ran.", "",
        "| kernel | configuration | ms |", "|---|---|--:|",
    ]  # fmt: skip
    for one in sorted(tried, key=lambda one: one["ms"]):
        marks = [name for name in ("start", "winner") if one["config"] == sweep[name][one["kernel"]]]
        text = " ".join(f"{key}={value}" for key, value in one["config"].items())
        lines.append(
            f"| {one['kernel']} | {text}{' (' + ', '.join(marks) + ')' if marks else ''} | {one['ms']:.3f} |"
        )
    return "\n".join(lines)


def _counters(launches: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(key for launch in launches for key in launch if key not in ("kernel", "grid")))
    lines = ["| kernel | grid | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    for launch in launches:
        cells = [launch["kernel"], launch["grid"], *(launch.get(name, "") for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def redraw(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """The pictures of every file that has some; those that are no longer drawn are removed."""
    from benchmarks.suite import plots

    for name, content in files.items():
        place = folder / "plots" / Path(name).stem
        if place.exists():
            drawn = plots.draw(_rows(content), content["machine"], place, content["study"])
            for path in {*place.glob("*.png")} - {*drawn}:
                path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--plots", action="store_true", help="draw the pictures again first")
    options = parser.parse_args(arguments)
    folder = options.results
    files = load(folder)
    if options.plots:
        redraw(folder, files)
    write_text(folder / "README.md", page_of(folder, files))
    print(f"written: {folder / 'README.md'} from {', '.join(files) or 'no files'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
