"""A table: rows over units, our number beside the paper's, as Markdown, JSON and on the screen.

All numbers are in percent but those of section 4.3.3, as in the paper. A cell without a number says so by a
dash; where ours is lower than the paper's it has an arrow, and the difference is listed below the table.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ipvrm.reproduce.fig6_report import MISSING, draw_training
from ipvrm.reproduce.tables.experiments import MARGINS, UPDATES, Scale, margin_unit
from ipvrm.reproduce.tables.paper import AVERAGE, BENCHMARKS, COLUMNS, PAPER
from ipvrm.reproduce.tables.plan import UNITS
from ipvrm.run_folder import manifest, read_json, read_json_lines, write_json, write_text

REWARD_ROWS = {
    "Q-RM": "q_rm",
    "EndoRM": "endo_rm",
    "DPO-RM": "dpo",
    "Implicit PRM": "implicit_prm",
    "IPVRM": "ipvrm",
}
POLICY_ROWS = {
    "SFT": "sft",
    "PRIME": "prime",
    "SPRO": "spro",
    "Reinforce w/ Q-RM": "reinforce_qrm",
    "GRPO w/ VR": "grpo",
    "GRPO w/ DPO-RM": "grpo_prm-dpo",
    "DistRL w/ DPO-RM": "distrl-dpo",
    "GRPO w/ Implicit PRM": "grpo_prm-implicit_prm",
    "DistRL w/ Implicit PRM": "distrl-implicit_prm",
    "GRPO w/ IPVRM": "grpo_prm-ipvrm",
    "DistRL w/ IPVRM": "distrl-ipvrm",
}
UPDATE_ROWS = {"Implicit PRM, naive": "distrl-implicit_prm"} | {
    row: unit for row, (unit, _) in UPDATES.items()
}
CURVES = dict(zip(COLUMNS["fig6"][-2:], ("rollout_accuracy", "rm_accuracy"), strict=True))
LAST_STEPS = 10  # of a policy's training, over which the curves' numbers are means
SUM_SCORES = ("endo_rm", "dpo", "implicit_prm")  # of what they train, or are, the score is a sum over tokens
F1 = ("step", "oracle")  # the paper's score (Eq. 31); the threshold as its released script takes it


class Number(NamedTuple):
    """A value and its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


Numbers = dict[str, Number]  # by column
Read = Callable[[Path, Scale, str], Numbers]  # output folder, scale, row


class Table(NamedTuple):
    title: str
    rows: dict[str, tuple[str, ...]]
    """By label the units whose results it shows."""
    read: Read
    note: str
    digits: int = 1
    picture: Callable[[Path], Path | None] | None = None
    """Drawn of the units in a folder into it; None without matplotlib."""


def _is_done(output: Path, unit: str) -> bool:
    done = output / UNITS / f"{unit}.json"
    return done.exists() and read_json(done)["seconds"] is not None


def _results(output: Path, unit: str) -> dict[str, Any] | None:
    """results.json of a unit that is done."""
    if not _is_done(output, unit):
        return None
    found: dict[str, Any] = read_json(output / unit / "results.json")
    return found


def _percent(value: float | None, low: float | None, high: float | None) -> Number | None:
    if value is None:
        return None
    return Number(100 * value, low if low is None else 100 * low, high if high is None else 100 * high)


def _with_average(found: Mapping[str, Number | None], columns: tuple[str, ...]) -> Numbers:
    """What there is, and the mean over `columns` where all are there."""
    numbers = {name: number for name, number in found.items() if number is not None}
    if all(name in numbers for name in columns):
        numbers[AVERAGE] = Number(sum(numbers[name].value for name in columns) / len(columns))
    return numbers


def bon(output: Path, scale: Scale, model: str) -> Numbers:
    """Best-of-N of a reward model by benchmark and N, and the mean over both."""
    results, found = _results(output, f"bon-{model}"), dict[str, Number | None]()
    pick = "sum" if model in SUM_SCORES else "final"
    for benchmark in ("MATH-500", "Minerva"):
        entry = (results or {"sources": {}})["sources"].get(scale.benchmarks[benchmark], {"rows": []})
        for row in entry["rows"]:
            if row["method"] == pick:
                found[f"{benchmark} @{row['n']}"] = _percent(row["accuracy"], *row["interval"])
    return _with_average(found, COLUMNS["table1"][:-1])


def fewer_problems(output: Path, unit: str) -> list[str]:
    """Where the Best-of-N of a `unit` is of fewer problems than it has, in words; of another unit nothing."""
    results = _results(output, unit) if unit.startswith("bon-") else None
    return [
        f"{unit}, {source or 'data'} @{row['n']}: {row['num_problems']} of {entry['problems']} problems; the "
        "others have fewer responses with a verdict"
        for source, entry in (results or {"sources": {}})["sources"].items()
        for row in entry["rows"]
        if row["method"] == "one_sample" and row["num_problems"] < entry["problems"]
    ]


def processbench(output: Path, scale: Scale, model: str) -> Numbers:
    """First-error F1 of a reward model by subset, and the mean."""
    results, found = _results(output, f"pb-{model}"), dict[str, Number | None]()
    for column, name in scale.subsets.items():
        subset = (results or {"subsets": {}})["subsets"].get(name)
        entry = subset and subset["rules"][F1[0]][F1[1]]
        if entry:
            found[column] = _percent(entry["f1"], *entry["f1_interval"])
    return _with_average(found, tuple(scale.subsets))


def policy(output: Path, scale: Scale, name: str) -> Numbers:
    """avg@8 of a policy by benchmark, and the mean."""
    results, found = _results(output, f"eval-{name}"), dict[str, Number | None]()
    for column, source in scale.benchmarks.items():
        if results is not None and source in results["sources"]:
            metric = results["sources"][source]["metrics"][f"avg@{scale.eval_samples}"]
            found[column] = _percent(metric["value"], metric["low"], metric["high"])
    return _with_average(found, BENCHMARKS)


def curves(output: Path, name: str) -> dict[str, list[float]]:
    """Right rollouts and right verdicts of the reward model in percent, by step of a policy that is done."""
    if not _is_done(output, f"policy-{name}"):
        return {}
    steps = [r for r in read_json_lines(output / f"policy-{name}" / "metrics.jsonl") if r["step"] > 0]
    return {column: [100 * r[key] for r in steps] for column, key in CURVES.items()}


def update(output: Path, scale: Scale, name: str) -> Numbers:
    """avg@8 of a policy, and where its training's curves end."""
    ends = {column: Number(fmean(points[-LAST_STEPS:])) for column, points in curves(output, name).items()}
    return policy(output, scale, name) | ends


def draw_updates(output: Path) -> Path | None:
    """The two panels of Figure 6, of the policies that are done."""
    return draw_training(
        output / "fig6.png", {row: curves(output, unit) for row, (unit, _) in UPDATES.items()}
    )


def margin(output: Path, scale: Scale, row: str) -> Numbers:
    """The two averages of an IPVRM."""
    model = margin_unit(row).removeprefix("rm-")
    averages = (bon(output, scale, model).get(AVERAGE), processbench(output, scale, model).get(AVERAGE))
    return {n: a for n, a in zip(COLUMNS["table10"], averages, strict=True) if a is not None}


def td(output: Path, scale: Scale, row: str) -> Numbers:
    """The two numbers of section 4.3.3, with one completion a branch."""
    results = _results(output, "td")
    if results is None:
        return {}
    entries = [results["paper"][name] for name in ("td_pearson", "abs_value_auc")]
    pairs = zip(COLUMNS["sec433"], entries, strict=True)
    return {name: Number(e["value"], e["low"], e["high"]) for name, e in pairs if e["value"] is not None}


def _policy_rows(table: str) -> dict[str, tuple[str, ...]]:
    rows = PAPER[table]["qwen3-0.6b"]
    return {row: (f"eval-{POLICY_ROWS[row]}",) for row in rows}


AVG8 = "avg@8 in %, temperature 0.6, top-p 0.95. AIME: 2022 to 2024 in the paper, 2024 in its release's file."
TABLES = {
    "table1": Table(
        "Table 1: Best-of-N of the reward models",
        {row: (f"bon-{model}",) for row, model in REWARD_ROWS.items()},
        lambda output, scale, row: bon(output, scale, REWARD_ROWS[row]),
        "Right answers in %, exact over subsets of the samples. Picked by what the objective trains: the "
        "mean value (IPVRM, Q-RM) or the sum (the others); the paper does not say by what.",
    ),
    "table2": Table(
        "Table 2: first-error F1 on ProcessBench",
        {row: (f"pb-{model}",) for row, model in REWARD_ROWS.items()},
        lambda output, scale, row: processbench(output, scale, REWARD_ROWS[row]),
        "F1 in %: a step's own tokens (Eq. 31), the best threshold of each subset (oracle), as the released "
        "script prints it; results.json of a unit has the transferred threshold beside it.",
    ),
    "table5": Table(
        "Table 5: policies",
        _policy_rows("table5"),
        lambda output, scale, row: policy(output, scale, POLICY_ROWS[row]),
        AVG8,
    ),
    "table6": Table(
        "Table 6: reward models under GRPO and DistRL",
        _policy_rows("table6"),
        lambda output, scale, row: policy(output, scale, POLICY_ROWS[row]),
        AVG8,
    ),
    "table10": Table(
        "Table 10: the margin of IPVRM",
        {
            row: tuple(f"{kind}-{margin_unit(row).removeprefix('rm-')}" for kind in ("bon", "pb"))
            for row in MARGINS
        },
        margin,
        "The averages of Tables 1 and 2.",
    ),
    "fig6": Table(
        "Figure 6 and Table 8: the reward model's online update under DistRL",
        {row: (f"eval-{unit}",) for row, unit in UPDATE_ROWS.items()},
        lambda output, scale, row: update(output, scale, UPDATE_ROWS[row]),
        f"{AVG8} rollouts, RM acc.: right rollouts, and right verdicts of the reward model on them before it "
        f"has learnt from any of the step, in %, means of the last {LAST_STEPS} steps. The paper has the "
        "benchmarks for Qwen3-0.6B (Table 8) and the curves for Llama3.2-1B (Figure 6, read off its lines). "
        "both is the run of Tables 5 and 6; the paper's Table 8 has another one.",
        picture=draw_updates,
    ),
    "sec433": Table(
        "Section 4.3.3: does the one-step TD foretell the outcome?",
        {"one-step TD": ("td",)},
        td,
        "Of the five likeliest tokens those with p >= 1/128, the least that can be asked for (the paper: all "
        "five): at most 2,500 branches under --scale full, one completion each.",
        digits=4,
    ),
}


def cells(name: str, output: Path, scale: Scale, base_model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{row: {column: {value, low, high, paper, difference}}}; null where there is none."""
    table, published = TABLES[name], PAPER[name].get(base_model, {})
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table.rows:
        ours, theirs = table.read(output, scale, row), published.get(row)
        found[row] = {}
        for i, column in enumerate(COLUMNS[name]):
            number = ours.get(column)
            paper = None if theirs is None else theirs[i]
            found[row][column] = {
                **(dict.fromkeys(Number._fields) if number is None else number._asdict()),
                "paper": paper,
                "difference": None if number is None or paper is None else number.value - paper,
            }
    return found


def write_table_of(
    name: str,
    output: Path,
    scale: Scale,
    base_model: str,
    warning: str,
    failed: Mapping[str, str],
    show: bool = True,
) -> dict[str, Any]:
    """Writes NAME.json and NAME.md, prints the table where `show`, and returns what NAME.json holds.

    Args:
        warning: what the numbers are no evidence of. failed: {unit: why it is not done}.
    """
    table, found = TABLES[name], cells(name, output, scale, base_model)
    lower = [
        {"row": row, "column": column, **cell}
        for row, columns in found.items()
        for column, cell in columns.items()
        if cell["difference"] is not None and cell["difference"] < 0
    ]
    compared = sum(c["difference"] is not None for columns in found.values() for c in columns.values())
    units = sorted({unit for units in table.rows.values() for unit in units})
    left_out = [f"{unit}: {failed[unit]}" for unit in units if unit in failed]
    left_out += [text for unit in units for text in fewer_problems(output, unit)]
    if base_model not in PAPER[name]:
        left_out.append(f"the paper has no such table for {base_model}")
    picture = None if table.picture is None else table.picture(output)
    if table.picture is not None and picture is None:
        left_out.append(MISSING)
    results = {
        "table": name,
        "title": table.title,
        "base_model": base_model,
        "warning": warning,
        "rows": found,
        "compared": compared,
        "lower_than_the_paper": lower,
        "left_out": left_out,
        "note": table.note,
        "picture": None if picture is None else picture.name,
        "manifest": manifest(),
    }
    write_json(output / f"{name}.json", results)
    write_text(output / f"{name}.md", _markdown(results, table.digits))
    if show:
        _print(results, table.digits)
    return results


def _lines(results: dict[str, Any], digits: int) -> list[list[str]]:
    lines = []
    for row, columns in results["rows"].items():
        ours, paper = [row, "here"], ["", "paper"]
        for cell in columns.values():
            arrow = " ↓" if cell["difference"] is not None and cell["difference"] < 0 else ""
            ours.append("-" if cell["value"] is None else f"{cell['value']:.{digits}f}{arrow}")
            paper.append("-" if cell["paper"] is None else f"{cell['paper']:.{digits}f}")
        lines += [ours, paper]
    return lines


def _sentences(results: dict[str, Any], digits: int) -> list[str]:
    lower = results["lower_than_the_paper"]
    worst = sorted(lower, key=lambda c: c["difference"])
    listed = "; ".join(
        f"{c['row']}, {c['column']}: {c['value']:.{digits}f} for {c['paper']:.{digits}f}" for c in worst
    )
    said = f"Lower than the paper (↓) in {len(lower)} of {results['compared']} cells"
    return [results["note"], f"{said}: {listed}." if lower else f"{said}.", *results["left_out"]]


def _markdown(results: dict[str, Any], digits: int) -> str:
    columns = list(next(iter(results["rows"].values())))
    lines = [
        f"# {results['title']}",
        "",
        f"**{results['warning']}** The paper's numbers are those of {results['base_model']} "
        "(arXiv 2604.13197v2).",
        "",
        f"| | | {' | '.join(columns)} |",
        f"|---|---|{'--:|' * len(columns)}",
        *(f"| {' | '.join(line)} |" for line in _lines(results, digits)),
        "",
        *(f"- {sentence}" for sentence in _sentences(results, digits)),
        "",
        *([f"![{results['title']}]({results['picture']})", ""] if results["picture"] else []),
    ]
    return "\n".join(lines)


def _print(results: dict[str, Any], digits: int) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console(highlight=False)
    shown = Shown(title=results["title"], title_justify="left", title_style="bold")
    shown.box, shown.padding = None, (0, 1, 0, 0)
    for i, column in enumerate(("", "", *next(iter(results["rows"].values())))):
        shown.add_column(column, justify="right" if i > 1 else "left")
    for line in _lines(results, digits):
        shown.add_row(*line)
    console.print(shown)
    console.print(results["warning"], markup=False, style="bold")
    for sentence in (results["note"], *results["left_out"]):
        console.print(sentence, markup=False, style="dim")
    lower = len(results["lower_than_the_paper"])
    console.print(f"lower than the paper (↓): {lower} of {results['compared']} cells\n", markup=False)
