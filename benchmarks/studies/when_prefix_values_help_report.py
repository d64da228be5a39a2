"""Results of `when_prefix_values_help`: estimates over base models, tables, one picture, one paragraph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies import when_prefix_values_help as study
from benchmarks.studies.spread import (
    Statistic,
    Weights,
    difference,
    estimate,
    f1_statistic,
    mean_statistic,
    table,
    traces,
)
from benchmarks.studies.when_prefix_values_help import (
    BASE,
    BEST,
    CELLS,
    COMMAND,
    ENDO,
    MODELS,
    SEEDS,
    TRIES,
    Cell,
    Unit,
    units_of,
)
from ipvrm.demo.arithmetic import TRAINING_FORMAT
from ipvrm.reproduce.tables.report import SUM_SCORES
from ipvrm.run_folder import read_json, replacing, write_json, write_text

SHOWN = (*(name for objective, tries in TRIES.items() for name in (*tries, BEST[objective])), ENDO)
PAPER = {objective: next(iter(tries)) for objective, tries in TRIES.items()}
LEADS = (  # like with like: the best of as many tries, or the paper's beta and margin
    *((BEST["ipvrm"], rival) for rival in (BEST["implicit_prm"], BEST["q_rm"], ENDO)),
    *((PAPER["ipvrm"], rival) for rival in (PAPER["implicit_prm"], PAPER["q_rm"])),
)
WITHOUT = ("one sample", "majority vote", "pass@N")
MEASURES = {"f1": "first-error F1", "best_of_n": "Best-of-16"}
OF_TEXT = (*BEST.values(), *PAPER.values(), ENDO)  # set beside what needs no reward model
NEEDS_NO_MODEL = {"f1": ("best_constant",), "best_of_n": ("one sample", "majority vote")}
CAUTION = (
    "**What this does not show.** The seven tokens behind a character are certain, so their log-ratio cannot "
    "rise above 0 and they dilute a mean over tokens; the tokens of a longer text in words would not be like "
    "that. At 8x no base model samples: it reads what the one at 1x wrote. Three base models of a third of "
    "a million parameters are few: an interval, which redraws base models and their traces or problems, is "
    "rough, and of as many intervals some miss by chance. Best-of-16 is of 64 problems a base model with 16 "
    "responses each, so of one choice a problem. A reward model is trained once, so how much "
    "another seed of its own would change is in the spread over base models and not told apart from it. "
    "Three tries are a small grid, over beta and margin and over nothing else; EndoRM has "
    "one. The reward models see each of 4,096 responses once and the demo's see them three times, so what "
    "more training would change is open, and the numbers stand beside no table of the demo or of the paper."
)
Run = dict[str, Any]  # of one base model: `erroneous`, and its `units` by cell
Files = Mapping[Unit, dict[str, Any]]


def by_base_model(files: Files) -> list[Run]:
    """A run for each base model that has a cell with all its reward models; the best of an objective's tries,
    by validation F1, stands beside them under a name of its own."""
    runs: list[Run] = []
    for seed in SEEDS:
        units = {}
        for cell in CELLS:
            of_cell = {unit.model: files[unit] for unit in units_of(seed, cell) if unit in files}
            if len(of_cell) < len(MODELS):
                continue
            models = {name: unit["result"] for name, unit in of_cell.items()}
            chosen = {
                BEST[objective]: max(tries, key=lambda n: max(models[n]["validation_f1"].values()))
                for objective, tries in TRIES.items()
            }
            best = {name: models[of] for name, of in chosen.items()}
            base = files[Unit(seed, cell.length)]
            units[cell] = {
                "seed": seed,
                "erroneous": base["erroneous"],
                "baselines": base["baselines"],
                "reward_models": models | best,
                "chosen": chosen,
            }
        if units:
            runs.append({"erroneous": next(iter(units.values()))["erroneous"], "units": units})
    return runs


def in_cell(cell: Cell, of: Statistic) -> Statistic:
    """A statistic of a unit as one of a run."""

    def found(run: Run, weights: Weights | None) -> float:
        return of(run["units"][cell], weights)

    return found


def best_of_statistic(name: str) -> Statistic:
    """Share of right answers of a reward model, or of a way to choose `WITHOUT` one."""

    def values(unit: dict[str, Any]) -> NDArray[np.float64]:
        model = unit["reward_models"][ENDO if name in WITHOUT else name]
        (found,) = model["without_a_model" if name in WITHOUT else "best_of_n"].values()
        pick = "sum" if model["choice"]["objective"] in SUM_SCORES else "final"
        return np.asarray(found[name if name in WITHOUT else pick], float)

    return mean_statistic(values)


def without_a_model(what: str, name: str) -> Statistic:
    """What `NEEDS_NO_MODEL` names."""

    def constant(unit: dict[str, Any], weights: Weights | None) -> float:
        return float(unit["baselines"][name])

    return constant if what == "f1" else best_of_statistic(name)


def problems(run: Run) -> int:
    unit = next(iter(run["units"].values()))
    (found,) = unit["reward_models"][ENDO]["without_a_model"].values()
    return len(found["one sample"])


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Estimates over base models: of every cell, of IPVRM's lead in it, and of what length and wrong labels
    do to that lead; all paired by trace or problem. Cells may lack base models."""

    def f1(cell: Cell, name: str) -> Statistic:
        return in_cell(cell, f1_statistic(name, TRAINING_FORMAT.name))

    def best_of(cell: Cell, name: str) -> Statistic:
        return in_cell(cell, best_of_statistic(name))

    measured: Mapping[str, Any] = {"f1": (traces, f1), "best_of_n": (problems, best_of)}
    found: dict[str, Any] = {"cells": {}, "changes": {}}
    for cell in CELLS:
        here = [run for run in runs if cell in run["units"]]
        if not here:
            continue
        units = [run["units"][cell] for run in here]
        of_cell: dict[str, Any] = {"length": cell.length, "wrong": cell.wrong}
        of_cell["seeds"] = [unit["seed"] for unit in units]
        for what, (size, of) in measured.items():
            names = SHOWN if what == "f1" else (*SHOWN, *WITHOUT)
            of_cell[what] = {name: estimate(here, size, of(cell, name)) for name in names}
            of_cell[f"{what}_lead"] = {
                f"{ours} less {rival}": estimate(here, size, difference(of(cell, ours), of(cell, rival)))
                for ours, rival in LEADS
            }
            of_cell[f"{what}_over"] = {
                f"{name} less {rival}": estimate(
                    here, size, difference(of(cell, name), in_cell(cell, without_a_model(what, rival)))
                )
                for rival in NEEDS_NO_MODEL[what]
                for name in OF_TEXT
            }
        of_cell["baselines"] = {
            name: float(np.mean([unit["baselines"][name] for unit in units]))
            for name in units[0]["baselines"]
        }
        of_cell["chosen"] = {name: [unit["chosen"][name] for unit in units] for name in units[0]["chosen"]}
        found["cells"][cell.name] = of_cell
    for first in CELLS:
        for second in CELLS:
            longer = first.wrong == second.wrong and (first.length, second.length) == ("1x", "8x")
            worse = first.length == second.length and first.wrong < second.wrong
            both = [run for run in runs if first in run["units"] and second in run["units"]]
            if both and (longer or worse):
                found["changes"][f"{first.name} to {second.name}"] = {
                    what: {
                        f"{ours} less {rival}": estimate(
                            both,
                            size,
                            difference(
                                difference(of(second, ours), of(second, rival)),
                                difference(of(first, ours), of(first, rival)),
                            ),
                        )
                        for ours, rival in LEADS
                    }
                    for what, (size, of) in measured.items()
                }
    return found


def side(entry: Mapping[str, Any]) -> int:
    """1 where an interval lies above 0, -1 below, 0 where it holds it."""
    low, high = entry["interval"]
    return int(low > 0) - int(high < 0)


def by_side(cells: Mapping[str, Any], leads: str, lead: str) -> dict[int, list[str]]:
    """{`side` of a lead: the cells in which it is so}."""
    found: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, of_cell in cells.items():
        found[side(of_cell[leads][lead])].append(name)
    return found


def paragraph(summary: Mapping[str, Any]) -> str:
    """What the numbers show, in words: nothing here is known before them."""
    cells, sentences = summary["cells"], []
    words = {1: "above 0", -1: "below 0", 0: "not told apart from 0"}
    for what, rival in ((what, rival) for what, rivals in NEEDS_NO_MODEL.items() for rival in rivals):
        listed: dict[int, list[str]] = {way: [] for way in words}
        for name in OF_TEXT:
            for way, at in by_side(cells, f"{what}_over", f"{name} less {rival}").items():
                if at:
                    listed[way].append(name if len(at) == len(cells) else f"{name} (at {', '.join(at)})")
        above, below, neither = (", ".join(listed[way]) or "none" for way in words)
        sentences.append(
            f"In {MEASURES[what]} against {rival}, which needs no reward model: above it {above}; "
            f"below it {below}; not told apart {neither}."
        )
    for what, measure in MEASURES.items():
        leads = []
        for lead in (f"{ours} less {rival}" for ours, rival in LEADS):
            found = by_side(cells, f"{what}_lead", lead)
            shown = (f"{words[way]} at {', '.join(at)}" for way, at in found.items() if at)
            leads.append(f"{lead} is {', '.join(shown)}")
        sentences.append(f"In {measure}, {'; '.join(leads)}.")
    moved = {
        f"{lead} in {MEASURES[what]}, from {name}": entry
        for name, change in summary["changes"].items()
        for what, by_lead in change.items()
        for lead, entry in by_lead.items()
    }
    if moved:
        told = [
            f"{text}, by {100 * entry['mean']:+.1f} points" for text, entry in moved.items() if side(entry)
        ]
        sentences.append(
            f"{len(told)} of {len(moved)} changes of a lead with the length or with wrong labels are told "
            f"apart from 0{': ' if told else ''}{'; '.join(told)}."
        )
    return " ".join(sentences)


def page(files: Files, summary: Mapping[str, Any]) -> str:
    """Tables, picture and text as Markdown."""
    head, *explained = (study.__doc__ or "").strip().split("\n\n")
    lines = [f"# {head}", "", f"`{COMMAND}`; all numbers in %. Intervals are of 95 %.", ""]
    if missing := summary["missing"]:
        lines += [
            f"**Not finished:** {len(missing)} of {len(study.UNITS)} units are missing, the first of them "
            f"{missing[0]}. A cell says which base models it is of; with one, its interval is over traces or "
            "problems alone.",
            "",
        ]
    for base in summary["not_learnt"]:
        of = next(found for unit, found in files.items() if unit.name == base)["base"]
        lines += [
            f"**Left out:** {base} has {of['nats_a_character']:.2f} nats a character after {of['steps']} "
            f"updates, more than {study.LEARNT}: it has not learnt the task, and no reward model could.",
            "",
        ]
    lines += [
        *(part.replace("\n", " ") + "\n" for part in explained[1:]),
        "![First-error F1 and Best-of-16 by cell](when_prefix_values_help.png)",
        "",
        paragraph(summary),
        "",
        CAUTION,
    ]
    for of_cell in summary["cells"].values():
        constant = ", ".join(f"{name} {100 * value:.1f}" for name, value in of_cell["baselines"].items())
        chosen = "; ".join(f"{name}: {', '.join(tries)}" for name, tries in of_cell["chosen"].items())
        lines += [
            "",
            f"## {Cell(of_cell['length'], of_cell['wrong'])}",
            "",
            f"Base models {', '.join(map(str, of_cell['seeds']))}. {chosen}. F1 without a model: {constant}.",
        ]
        for what, words in MEASURES.items():
            lines += ["", *table(words, of_cell[what])]
            for of, kind in (("lead", "lead in"), ("over", "against no reward model:")):
                lines += ["", *table(f"{kind} {words}", of_cell[f"{what}_{of}"], "+")]
    for name, change in summary["changes"].items():
        lines += ["", f"## From {name}: change of the leads"]
        for what, by_lead in change.items():
            lines += ["", *table(MEASURES[what], by_lead, "+")]
    lines += ["", "## Units", ""]
    for unit, found in files.items():
        told = ""
        if unit.model == BASE:
            of = found["base"]
            told = f"{of['nats_a_character']:.3f} nats a character after {of['steps']} updates; "
        lines.append(
            f"- {unit.name}: {told}{sum(found['stage_seconds'].values()):.0f} s of stages on "
            f"{found['manifest']['processor']}, {found['machine']['threads']} threads, load "
            f"{found['machine']['load']}, commit {found['manifest']['commit']}"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, summary: Mapping[str, Any]) -> None:
    """A column a cell, F1 above and Best-of-16 below: mean, interval and each base model."""
    from benchmarks.suite.plots import FAMILIES, GRID, INK, MUTED, OURS, Figure, FigureCanvasAgg

    cells = summary["cells"]
    figure = Figure(figsize=(2.4 + 3.1 * len(cells), 8.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(cells), sharex="row", sharey=True, squeeze=False)
    for column, of_cell in enumerate(cells.values()):
        for row, (what, words) in enumerate(MEASURES.items()):
            axes = panels[row][column]
            for place, name in enumerate(SHOWN):
                entry, y = of_cell[what][name], -place
                colour = OURS[0] if name.startswith("ipvrm") else FAMILIES["eager"]
                axes.plot([100 * x for x in entry["interval"]], [y, y], color=colour, linewidth=2.2, zorder=2)
                models = [100 * x for x in entry["by_model"]]
                axes.scatter(models, [y] * len(models), s=9, color=INK, alpha=0.55, linewidth=0, zorder=3)
                axes.scatter([100 * entry["mean"]], [y], s=34, color=colour, zorder=4)
            if what == "best_of_n":
                for name, style in (("one sample", ":"), ("majority vote", "--")):
                    x = 100 * of_cell[what][name]["mean"]
                    axes.axvline(x, color=MUTED, linewidth=1, linestyle=style, zorder=1, label=name)
            else:
                title = f"{Cell(of_cell['length'], of_cell['wrong'])}\n"
                title += f"{len(of_cell['seeds'])} of {len(study.SEEDS)} base models"
                axes.set_title(title, fontsize=10, color=INK)
            axes.set_xlabel(f"{words}, %", fontsize=9, color=INK)
            axes.set_yticks([-place for place in range(len(SHOWN))], SHOWN, fontsize=9)
            axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
            axes.set_axisbelow(True)
            for edge in ("top", "right", "left"):
                axes.spines[edge].set_visible(False)
            axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    panels[1][-1].legend(fontsize=8, edgecolor="none", framealpha=1, loc="upper right")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write_results(output: Path) -> None:
    """Summary, page and picture of the cells that are complete."""
    paths = {unit: output / "units" / f"{unit.name}.json" for unit in study.UNITS}
    files = {unit: read_json(path) for unit, path in paths.items() if path.exists()}
    lost = [unit for unit, found in files.items() if unit.model == BASE and not found["learnt"]]
    missing = [u for u in study.UNITS if u not in files and not any(base in lost for base in u.bases)]
    runs = by_base_model(files)
    if not runs:
        return
    names = {"missing": [unit.name for unit in missing], "not_learnt": [unit.name for unit in lost]}
    summary = summarise(runs) | names
    write_json(output / "summary.json", summary)
    draw(output / "when_prefix_values_help.png", summary)
    write_text(output / "README.md", page(files, summary))
