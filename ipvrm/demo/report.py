"""The demo's tables, report and closing text: all of it computed from results, nothing claimed beforehand."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipvrm.demo.figures import MISSING, draw_policies, draw_trace
from ipvrm.demo.settings import ALGORITHMS, FULL, NAMES
from ipvrm.evaluate.thresholds import Interval
from ipvrm.run_folder import read_json, write_json, write_text

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
SHOWN_FROM = 3.0  # standard errors of a gain
OWN_PICK = {"ipvrm": "final", "implicit_prm": "sum"}  # the quantity each objective trains


def write_report(output: Path, results: dict[str, Any], show: bool = True) -> dict[str, Any]:
    """Writes results.json, steps.csv, best_of_n.csv, report.md and, with matplotlib, the pictures trace.png
    and policies.png; prints them.

    Returns:
        `results` with `conclusions` and `pictures` added.
    """
    trace = read_json(output / "evaluation" / "trace.json")
    drawn = (
        draw_trace(output / "trace.png", trace, results["choices"]),
        draw_policies(output / "policies.png", results["policies"]),
    )
    pictures = [picture for picture in drawn if picture]
    results = results | {"conclusions": list(conclusions(results)), "pictures": list(map(str, pictures))}
    write_json(output / "results.json", results)
    write_text(output / "steps.csv", _csv(*_all_rules(results)))
    policies = results["policies"]
    tables = [_steps_table(results), _best_of_n_table(results)]
    tables += [policies_table(policies), _differences_table(policies)]
    write_text(output / "best_of_n.csv", _csv(*_best_of_n_rows(results)))
    write_text(output / "report.md", _markdown(results, tables, trace, pictures))
    if show:
        _print(output, results, tables, pictures)
    return results


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def with_interval(value: float | None, interval: list[float]) -> str:
    return f"{percent(value)} ({percent(interval[0])}-{percent(interval[1])})"


def points(estimate: dict[str, Any]) -> str:
    """A difference in percentage points, with its interval."""
    low, high = estimate["interval"]
    return f"{100 * estimate['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


# -------------------------------------------------------------------------------------------------- tables


def _steps_table(results: dict[str, Any]) -> Table:
    formats = list(next(iter(results["models"].values()))["formats"])
    test = results["test"]
    title = (
        f"First-error F1 in % (95 % interval), {test['traces']} held-out traces, {test['erroneous']} wrong"
    )
    rows = []
    for name, model in results["models"].items():
        rule = model["rule"]
        for protocol, label in (("transfer", NAMES[name]), ("oracle", "  best threshold")):
            entries = [model["formats"][written][rule][protocol] for written in formats]
            rows.append([label, *(with_interval(e["f1"], e["f1_interval"]) for e in entries)])
    for name, value in results["baselines"].items():
        rows.append([name.replace("_", " "), *[percent(value["f1"])] * len(formats)])
    return title, ["", *formats], rows


def _best_of_n_table(results: dict[str, Any]) -> Table:
    rows = results["best_of_n"]
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    cells = {(row["method"], row["n"]): with_interval(row["accuracy"], row["interval"]) for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    body = [[_method(method), *(cells[method, n] for n in sizes)] for method in methods]
    title = f"Right answers in % (95 % interval), one picked of N, {rows[0]['num_problems']} problems"
    return title, ["", *(f"N = {n}" for n in sizes)], body


def policies_table(policies: dict[str, Any]) -> Table:
    settings, start = policies["settings"], policies["start"]
    rows = [["base model", with_interval(start["mean"], start["interval"]), "", ""]]
    for name, found in policies["algorithms"].items():
        end, gain = found["curve"][-1], found["gain"]
        accuracy = with_interval(end["mean"], end["interval"])
        rows.append([ALGORITHMS[name], accuracy, points(gain), f"{gain['in_standard_errors']:.1f}"])
    title = (
        f"Right answers in % (95 % interval), {policies['problems']} held-out problems, "
        f"{settings['steps']} steps of {settings['prompts']} x {settings['responses']} responses, "
        f"{_seeds(policies)}"
    )
    return title, ["", "accuracy", "gain", "in std. errors"], rows


def _differences_table(policies: dict[str, Any]) -> Table:
    rows = []
    for difference in policies["differences"]:
        a, b = (ALGORITHMS[name] for name in difference["of"])
        rows.append([f"{a} minus {b}", points(difference)])
    return "The same policies against each other", ["", "difference"], rows


def _seeds(policies: dict[str, Any]) -> str:
    return "one seed" if policies["seeds"] == 1 else f"{policies['seeds']} seeds"


def _method(method: str) -> str:
    model, _, pick = method.partition(":")
    if not pick:
        return {"pass_at_n": "any right (pass@N)"}.get(method, method.replace("_", " "))
    return f"{NAMES[model]}, {pick}{' step' if pick in ('mean', 'min') else ''}"


def _all_rules(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    header = ["model", "format", "rule", "chosen_rule", "protocol", "tau", "f1", "low", "high"]
    header += ["accuracy_erroneous", "accuracy_correct"]
    rows = []
    for name, model in results["models"].items():
        for written, rules in model["formats"].items():
            for rule, protocols in rules.items():
                for protocol, e in protocols.items():
                    numbers = [
                        e["tau"],
                        e["f1"],
                        *e["f1_interval"],
                        e["accuracy_erroneous"],
                        e["accuracy_correct"],
                    ]
                    rows.append([name, written, rule, rule == model["rule"], protocol, *numbers])
    return header, rows


def _best_of_n_rows(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [r["method"], r["n"], r["accuracy"], *r["interval"], r["num_problems"]] for r in results["best_of_n"]
    ]
    return ["method", "n", "accuracy", "low", "high", "problems"], rows


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


# --------------------------------------------------------------------------------------------- conclusions


def conclusions(results: dict[str, Any]) -> Iterator[str]:
    """Sentences that the numbers of this run bear out, and no others."""
    models = results["models"]
    formats = list(next(iter(models.values()))["formats"])
    names = list(models)
    for written in formats:
        entries = [models[n]["formats"][written][models[n]["rule"]]["transfer"] for n in names]
        values = ", ".join(f"{NAMES[n]} {percent(e['f1'])}" for n, e in zip(names, entries, strict=True))
        difference = results["differences"].get(written)
        verdict = "" if difference is None else "; " + _compared(names, difference)
        yield f"Finding the first wrong step, {written}: {values}{verdict}."
    best = max(value["f1"] or 0.0 for value in results["baselines"].values())
    for name in names:
        above: list[str] = []
        rest: list[str] = []
        for written in formats:
            entry = models[name]["formats"][written][models[name]["rule"]]["transfer"]
            (above if entry["f1_interval"][0] > best else rest).append(written)
        text = (
            f"{NAMES[name]}: F1 above the best answer without a model ({percent(best)}) in {_listed(above)}"
        )
        yield text + (f"; not shown to be above it in {_listed(rest)}." if rest else ".")
    yield from _best_of_n_conclusions(results, names)
    yield from _policy_conclusions(results["policies"])
    yield (
        f"This is one small task and one base model (policies: {_seeds(results['policies'])}). The same seed "
        "trains another base model on another kind of processor (here "
        f"{results['manifest']['processor']}), where the differences may be others: nothing here says which "
        "method is better elsewhere."
    )


def _policy_conclusions(policies: dict[str, Any]) -> Iterator[str]:
    start = percent(policies["start"]["mean"])
    for name, found in policies["algorithms"].items():
        gain = found["gain"]
        errors = f"{gain['in_standard_errors']:.1f} standard errors"
        shown = gain["in_standard_errors"] > SHOWN_FROM
        verdict = (
            f"{errors}, more than three" if shown else f"{errors}: a gain of more than three is not shown"
        )
        end = percent(found["curve"][-1]["mean"])
        text = f"{ALGORITHMS[name]}: {start} to {end} right, {points(gain)} points on the same problems"
        yield f"{text}, {verdict}."
    for difference in policies["differences"]:
        a, b = (ALGORITHMS[name] for name in difference["of"])
        low, high = difference["interval"]
        ahead = f"so {a if low > 0 else b} is ahead here" + " with this seed" * (policies["seeds"] == 1)
        verdict = ahead if low > 0 or high < 0 else "the interval holds 0, a difference is not shown"
        yield f"{a} minus {b} on the same problems: {points(difference)} points, {verdict}."


def _compared(names: list[str], difference: dict[str, Any]) -> str:
    low, high = difference["interval"]
    gap = f"{100 * difference['f1']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    pair = f"{NAMES[names[0]]} minus {NAMES[names[1]]} on the same traces {gap}"
    if low > 0:
        return f"{pair}, so {NAMES[names[0]]} is ahead here"
    if high < 0:
        return f"{pair}, so {NAMES[names[1]]} is ahead here"
    return f"{pair}: the interval holds 0, no difference shown"


def _best_of_n_conclusions(results: dict[str, Any], names: list[str]) -> Iterator[str]:
    n = max(row["n"] for row in results["best_of_n"])
    rows = {row["method"]: row for row in results["best_of_n"] if row["n"] == n}
    vote = rows["majority_vote"]
    for name in names:
        pick = OWN_PICK[name]
        row = rows[f"{name}:{pick}"]
        text = (
            f"Best of {n} picked by {NAMES[name]} ({pick}): {percent(row['accuracy'])}, "
            f"majority vote {percent(vote['accuracy'])}"
        )
        if Interval(*row["interval"]).overlaps(Interval(*vote["interval"])):
            yield f"{text}; the intervals overlap, no difference shown."
        else:
            ahead = "the reward model" if row["accuracy"] > vote["accuracy"] else "the vote"
            yield f"{text}; the intervals do not overlap, {ahead} is ahead here."


def _listed(items: list[str]) -> str:
    return ", ".join(f"'{item}'" for item in items) or "none of the formats"


# -------------------------------------------------------------------------------------------------- output


def _facts(results: dict[str, Any]) -> list[str]:
    base, train = results["base"], results["rollouts"]["train"]
    facts = [
        f"base model: {base['parameters'] / 1e6:.2f} M parameters, {base['steps']} updates, "
        f"loss {base['loss']:.3f} nats per token",
        f"rollouts for training: {train['responses']}, {train['right_answer']} with the right answer, "
        f"{train['all_steps_right']} with every step right, {train['dropped_unfinished_or_empty']} dropped",
    ]
    for c in results["choices"]:
        margin = "" if c["margin"] is None else f", margin {c['margin']:g}"
        facts.append(
            f"{NAMES[c['objective']]}: beta {c['beta']:g}{margin}, learning rate {c['learning_rate']:g}, "
            f"{c['num_train_epochs']:g} epochs, step score '{c['rule']}'"
        )
    multiple = results["sizes"]["multiple_of"]
    if multiple != FULL.multiple_of:
        quick = f"a quick run: an easier task (multiples of {multiple}) and little data"
        facts.insert(0, f"{quick}; who is ahead in it says nothing")
    return facts


def _stage_line(results: dict[str, Any]) -> str:
    stages, budgets = results["stages"], results["budgets"]
    parts = [
        f"{name} {stage['seconds']:.0f} s" + (f" of {budgets[name]:g}" if name in budgets else "")
        for name, stage in stages.items()
    ]
    return "time: " + ", ".join(parts) + f"; {sum(s['seconds'] for s in stages.values()):.0f} s in all"


THRESHOLDS = (
    "Thresholds were chosen on {validation} validation traces in the training format and reused in every "
    "format; 'best threshold' shows what the best one for these very traces would reach. "
    "best constant: -1 or one fixed step at random, both chosen with the test labels."
)
POLICIES = (
    "Every policy trained on the same prompts and was measured with the same random numbers on the same "
    "problems, which no earlier stage has used. Intervals and standard errors redraw the "
    "problems{seeds}; the base model and the reward model are one each. The intervals of the three "
    "differences are 95 % each, not together."
)


def _footnotes(results: dict[str, Any]) -> list[str]:
    several = results["policies"]["seeds"] > 1
    return [
        THRESHOLDS.format(validation=results["test"]["validation_traces"]),
        POLICIES.format(
            seeds=" and the seeds of the runs"
            if several
            else " alone and hold nothing of how a run varies with its seed"
        ),
    ]


def _markdown(
    results: dict[str, Any], tables: list[Table], trace: dict[str, Any], pictures: list[Path]
) -> str:
    lines = ["# ipvrm demo", "", *(f"- {fact}" for fact in _facts(results)), f"- {_stage_line(results)}", ""]
    for title, header, rows in tables:
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
        lines.append("")
    lines += [*_footnotes(results), ""]
    lines += ["## What this run shows", "", *(f"- {text}" for text in results["conclusions"]), ""]
    lines += ["## One wrong trace", ""]
    shown = ";".join(trace["steps"])
    lines.append(
        f"`{trace['problem']}` answered `{shown}`; the first wrong step is number {trace['label'] + 1}."
    )
    for name, model in trace["models"].items():
        flagged = f"step {model['flagged'] + 1}" if model["flagged"] >= 0 else "no step"
        lines.append(f"{NAMES[name]} flags {flagged}.")
    if not pictures:
        return "\n".join([*lines, "", MISSING, ""])
    lines += ["", "![prefix value and TD per token](trace.png)", "", "## The policies, step by step", ""]
    return "\n".join([*lines, "![held-out accuracy of the policies](policies.png)", ""])


def _print(output: Path, results: dict[str, Any], tables: list[Table], pictures: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    for fact in _facts(results):
        console.print(fact, markup=False)
    for title, header, rows in tables:
        table = RichTable(
            title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
        )
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print()
    for footnote in _footnotes(results):
        console.print(footnote, markup=False, style="dim")
    console.print()
    for text in results["conclusions"]:
        console.print(f"- {text}", markup=False)
    console.print()
    console.print(_stage_line(results), markup=False)
    shown = f"pictures: {', '.join(map(str, pictures))}" if pictures else MISSING
    console.print(shown, markup=False, soft_wrap=True)
    console.print(f"everything is in {output}; read report.md there first", markup=False, soft_wrap=True)
