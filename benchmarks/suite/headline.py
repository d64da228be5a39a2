"""What opens the results page, from measured rows: time against scratch memory of every contender at the
shape that the targets are for, one table of ten lines, and what is lost in them. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.suite.measure import ACCURACY, LESS_WORK, Row, is_ours
from benchmarks.suite.tables import cell, error, verdicts

SIZE = "N=2048 D=1024 V=32000 float32"
FORWARD = f"{SIZE} lse + sampled + entropy"
BACKWARD = f"{SIZE} K=8 forward+backward trainable head"
BY = ", by "  # ends the name of ours with the matmul library that is not the default here: "cpp, by blas"
LIBRARIES = {"blas": "MKL", "onednn": "oneDNN"}  # of PyTorch's x86 builds
MOST_NAMED = 3  # lost cases in one sentence, the worst first; the file's chapter lists them all
MORE, FEWER, APART = "¹", "²", "³"


class Shown(NamedTuple):
    """One panel: contenders of a case of linear_logprobs by the label they get."""

    title: str
    shape: str
    ours: str  # the one of ours that is compared
    labels: Mapping[str, str]
    like: str  # the case of studies.cpu_matmul that stands for `ours` by the other library


SHOWN = (
    Shown(
        "Log-prob of the sampled token, forward",
        FORWARD,
        "cpp, log-prob alone",
        {
            "cpp, log-prob alone": "ours",
            "F.linear_cross_entropy, log-prob alone": "torch F.linear_cross_entropy",
            "released 64-row slices, log-prob alone": "64-row slices (released code)",
            "cut-cross-entropy torch_compile, log-prob alone": "cut-cross-entropy (torch_compile)",
            "TRL chunked log-prob, log-prob alone": "TRL, chunked",
            "eager log_softmax": f"eager log_softmax {MORE}",
            "torch.compile of eager": f"torch.compile {MORE}",
        },
        "linear_candidates",
    ),
    Shown(
        "The same, forward + backward, trainable head",
        BACKWARD,
        "cpp",
        {
            "cpp": "ours",
            "cpp logits kept": "ours, logits kept",
            "F.linear_cross_entropy, one id": f"torch F.linear_cross_entropy {FEWER}",
            "cut-cross-entropy torch_compile, one id": f"cut-cross-entropy (torch_compile) {FEWER}",
            "TRL chunked log-prob, one id": f"TRL, chunked {FEWER}",
            "eager log_softmax": "eager log_softmax",
            "torch.compile of eager": "torch.compile",
            "released 64-row slices": "64-row slices (released code)",
        },
        "trainable head",
    ),
)
NOTES = {
    MORE: "also the entropy",
    FEWER: "one token a row, the others 8",
    APART: "from a run of its own (cpu_matmul; the forward: of linear_candidates)",
}


class Point(NamedTuple):
    """One contender: time as a multiple of the yardstick's, scratch in MiB."""

    label: str
    ratio: float
    scratch_mib: float
    ours: bool
    elsewhere: bool = False  # ours by the other matmul library


class Panel(NamedTuple):
    title: str
    points: list[Point]
    ours: Point

    @property
    def others(self) -> list[Point]:
        return [point for point in self.points if not point.ours]


def panels(rows: Iterable[Row], study: Sequence[Mapping[str, Any]] = ()) -> list[Panel]:
    """Those of SHOWN that were measured, with us and somebody else in them.

    study: the times of `studies.cpu_matmul` on this processor, for ours by the other library where the rows
    themselves have none.
    """
    measured = [row for row in rows if row.op == "linear_logprobs" and not row.error]
    found = []
    for title, shape, ours, labels, like in SHOWN:
        case = {row.contender: row for row in measured if row.shape == shape and row.scratch_mib is not None}
        points = [_point(label, case[name]) for name, label in labels.items() if name in case]
        if ours not in case or all(point.ours for point in points):
            continue
        mine = _point(labels[ours], case[ours])
        found.append(Panel(title, points + _elsewhere(case, ours, study, like), mine))
    return found


def points(rows: Iterable[Row]) -> list[Point]:
    """All of the panels that the rows alone have."""
    return [point for panel in panels(rows) for point in panel.points]


def _point(label: str, row: Row) -> Point:
    return Point(label, row.ratio, row.scratch_mib or 0.0, is_ours(row.contender))


def _elsewhere(
    case: Mapping[str, Row], ours: str, study: Sequence[Mapping[str, Any]], like: str
) -> list[Point]:
    """Ours by the library that is not the default: in the same rounds, or as far from ours as in `study`."""
    for name, row in case.items():
        start, by, library = name.rpartition(BY)
        if by and start == ours:
            label = f"ours by {LIBRARIES.get(library, library)}"
            return [Point(label, row.ratio, row.scratch_mib or 0.0, True, True)]
    times = {row["contender"]: row for row in study if like in row["shape"] and row["op"] == "op"}
    if not times.keys() >= LIBRARIES.keys():
        return []
    blas, onednn = times["blas"], times["onednn"]
    ratio = case[ours].ratio * blas["median_ms"] / onednn["median_ms"]
    return [Point(f"ours by {LIBRARIES['blas']} {APART}", ratio, blas["scratch_mib"], True, True)]


def title(found: Sequence[Panel]) -> str:
    """How much faster than the fastest other contender, in how much memory."""
    times = sorted(min(point.ratio for point in panel.others) / panel.ours.ratio for panel in found)
    scratch = sorted(panel.ours.scratch_mib for panel in found)
    speed, memory = (
        f"{low} to {high}" if low != high else low
        for low, high in (
            (f"{times[0]:.1f}", f"{times[-1]:.1f}"),
            (f"{scratch[0]:,.0f}", f"{scratch[-1]:,.0f}"),
        )
    )
    return f"{speed} times the speed of the fastest alternative, in {memory} MiB of scratch memory"


def lost(found: Sequence[Panel], rows: Iterable[Row]) -> list[str]:
    """In words: who needs less memory or time than we do, in the left and right panel, and in how many of all
    cases."""
    said = []
    for place, panel in zip(("left", "right"), found, strict=False):
        for other in panel.others:
            if other.scratch_mib < panel.ours.scratch_mib:
                sizes = f"{other.scratch_mib:,.0f} against {panel.ours.scratch_mib:,.0f} MiB"
                said.append(f"memory to {_plain(other.label)} ({place}: {sizes})")
            if other.ratio < panel.ours.ratio:
                said.append(f"time to {_plain(other.label)} ({place})")
        for mine in (point for point in panel.points if point.elsewhere):
            faster = [_plain(other.label) for other in panel.others if other.ratio < mine.ratio]
            if faster:
                library = _plain(mine.label).removeprefix("ours ")
                said.append(f"{library} also time, {mine.ratio:.2f}x, to {', '.join(faster)} ({place})")
    judged = verdicts(rows)
    slower = sorted((v for v in judged if v.outcome == "lost"), key=lambda v: v.factor)
    if slower:
        named = "; ".join(f"{v.op}, {v.shape}: {1 / v.factor:.2f}x" for v in slower[:MOST_NAMED])
        worst = "the worst: " if len(slower) > MOST_NAMED else ""
        said.append(f"time in {len(slower)} of {len(judged)} cases ({worst}{named})")
    return said


def _plain(label: str) -> str:
    return label.rstrip(" " + "".join(NOTES))


def where(machine: Mapping[str, Any]) -> str:
    """The machine in one short line; `tables.conditions` has all of it."""
    measured = f"torch {machine['versions'].get('torch')}, {machine['date'][:10]}"
    if machine["device"] != "CPU":
        return f"{machine['device']}, {measured}"
    kind = f", {machine['processor']}" if machine.get("processor") else ""
    return f"{machine['cpu']}{kind}, {machine['simd']}, {machine['threads']} cores, {measured}"


def accuracy(rows: Iterable[Row], machine: Mapping[str, Any]) -> str:
    """How far a log-prob is from fp64, ours and the others', in one sentence; "" where nobody's was measured.

    Of ours the worst implementation, of each contender the worst case of that dtype.
    """
    worst: dict[str, dict[str, float]] = {"bfloat16": {}, "float32": {}}
    for row in rows:
        if ACCURACY in row.shape and row.fp64_error is not None and row.contender not in LESS_WORK:
            found = next(found for dtype, found in worst.items() if dtype in row.shape.split())
            found[row.contender] = max(row.fp64_error, found.get(row.contender, 0.0))
    said = []
    for name, found in zip(("bf16", "fp32"), worst.values(), strict=True):
        ours = [value for contender, value in found.items() if is_ours(contender)]
        others = sorted((value, contender) for contender, value in found.items() if not is_ours(contender))
        if ours and others:
            told = ", ".join(f"{contender} {error(value)}" for value, contender in others)
            said.append(f"**{error(max(ours))}** of {name} inputs ({told})")
    if not said:
        return ""
    return (
        f"A log-prob is off by at most {' and '.join(said)}, in nats against fp64, on rows like a trained "
        f"model's and on peaked ones ({where(machine)})."
    )


def notes(found: Sequence[Panel]) -> str:
    """The footnotes that the labels ask for."""
    labels = "".join(point.label for panel in found for point in panel.points)
    return "   ".join(f"{sign} {text}" for sign, text in NOTES.items() if sign in labels)


class Line(NamedTuple):
    """A line of the table: contenders of one variant of one case."""

    label: str
    op: str
    shape: str  # how that of the case begins
    variant: str = ""


LINES = (
    Line("log-prob of the sampled token, log-sum-exp, entropy", "linear_logprobs", FORWARD),
    Line("log-prob alone", "linear_logprobs", FORWARD, "log-prob alone"),
    Line(
        "log-prob, log-sum-exp, entropy, all tokens of p >= 0.1", "linear_candidates", f"{SIZE}, calibrated"
    ),
    Line(
        "log-probs of 8 tokens a row, gradient of hidden",
        "linear_logprobs",
        BACKWARD.replace("trainable", "frozen"),
    ),
    Line("log-probs of 8 tokens a row, gradients of hidden and weight", "linear_logprobs", BACKWARD),
    Line(
        "log-prob of one token a row, gradients of hidden and weight", "linear_logprobs", BACKWARD, "one id"
    ),
    Line(
        "DistRL's loss, 8 candidates a row, gradients of hidden and weight",
        "linear_distrl_loss",
        f"{SIZE} K=8, random",
    ),
    Line("prefix-value loss, 256 x 2,048 tokens, gradients", "prefix_value_loss", "B=256 T=2048 "),
    Line("a reward-model training step", "reward_step", "8 sequences"),
    Line("a DistRL policy update", "distrl_step", "8 sequences"),
)


def table(rows: Sequence[Row]) -> str:
    """LINES that were measured, "" without any: multiples of the yardstick's time, scratch in brackets."""
    lines = [
        "| | yardstick | ours | plain PyTorch | `torch.compile` of it | other packages |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for label, op, shape, variant in LINES:
        case = [row for row in rows if row.op == op and row.shape.startswith(shape) and not row.error]
        if not case:
            continue
        bases = [row for row in case if row.contender in LESS_WORK] or case[:1]
        base = min(bases, key=lambda row: row.median_ms)
        mine = [row for row in case if _variant(row) == variant and row.contender not in LESS_WORK]
        best = min(mine, key=lambda row: row.ratio)
        cells: dict[str, list[tuple[float, str]]] = {}
        for row in mine:
            column, name = _column(row.contender)
            number = f"**{row.ratio:.2f}**" if row is best else f"{row.ratio:.2f}"
            text = f"{name} {number} ({cell(row.scratch_mib, 0)})".strip()
            cells.setdefault(column, []).append((row.ratio, text))
        plain = [min(cells["plain"])] if "plain" in cells else []
        told = [cells.get("ours", []), plain, cells.get("compiled", []), cells.get("packages", [])]
        texts = [", ".join(text for _, text in of) for of in told]
        lines.append(f"| {label} | {base.contender} {base.median_ms:,.4g} ms | {' | '.join(texts)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _variant(row: Row) -> str:
    """What stands behind the comma, without the matmul library."""
    before, by, _ = row.contender.rpartition(BY)
    return (before if by else row.contender).partition(", ")[2]


def _column(contender: str) -> tuple[str, str]:
    """(column, what to call it there)."""
    name, _, variant = contender.partition(", ")
    first, _, rest = name.partition(" ")
    if is_ours(name):
        by = f", {variant}".rpartition(BY)
        return "ours", f"{rest} by {LIBRARIES.get(by[2], by[2])}".strip() if by[1] else rest
    if name.startswith("released"):
        return "plain", "s"
    if rest.startswith("with "):  # a whole step by a package's log-prob
        return "packages", rest.removeprefix("with ")
    if first in ("eager", "padded"):
        return "plain", ""
    return ("compiled", "") if first == "torch.compile" else ("packages", name)
