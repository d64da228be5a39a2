"""The tables of `ipvrm eval processbench`, from what its results.json holds."""

from typing import Any

from ipvrm.data.steps import RULES

PROTOCOLS = ("transfer", "oracle")


def _table(title: str, columns: tuple[str, ...], caption: str = "") -> Any:
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), caption=caption or None)
    made.caption_justify = "left"
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def release_table(results: dict[str, Any]) -> Any:
    """F1 of the released script's thresholds, by subset and rule."""
    made = _table(
        "release: the best of the released script's 1,000 thresholds, by subset",
        ("subset", *RULES),
        "F1 in % (tau); half of the grid, from -1 to 0, no probability reaches.",
    )
    for name, subset in results["subsets"].items():
        found = [subset["rules"][rule]["release"] for rule in RULES]
        made.add_row(name, *("-" if e is None else f"{_percent(e['f1'])} ({e['tau']:.3f})" for e in found))
    return made


def calibration_table(results: dict[str, Any]) -> Any:
    """How well sigmoid(mean_value) at the end foretells the outcome, by subset; None where it is no
    probability of that."""
    if all(subset["calibration"] is None for subset in results["subsets"].values()):
        return None
    made = _table(
        "Calibration of sigmoid(mean_value) at the end",
        ("subset", "solutions", "right", "mean probability", "ECE", "Brier"),
    )
    for name, subset in results["subsets"].items():
        found = subset["calibration"]
        numbers = ("-" if found[k] is None else f"{found[k]:.3f}" for k in ("ece", "brier"))
        made.add_row(
            name, str(found["count"]), _percent(found["outcome"]), _percent(found["probability"]), *numbers
        )
    return made


def generator_table(results: dict[str, Any]) -> Any:
    """First-error F1 of the `step` score by what wrote the solutions; None where no item says that."""
    rows = [
        (name, generator, entry)
        for name, subset in results["subsets"].items()
        for generator, entry in subset["generators"].items()
    ]
    if not rows:
        return None
    made = _table(
        "By generator: first-error F1 of `step`, at its subset's thresholds",
        ("subset", "generator", "wrong", "right", *(f"F1 {protocol}" for protocol in PROTOCOLS)),
    )
    made.columns[1].justify = "left"
    made.columns[1].no_wrap = False
    for name, generator, entry in rows:
        f1 = (_percent(entry["step"][protocol]) for protocol in PROTOCOLS)
        made.add_row(name, generator, str(entry["erroneous"]), str(entry["correct"]), *f1)
    return made


def f1_tables(results: dict[str, Any]) -> list[Any]:
    """First-error F1 with intervals: a table per subset and their mean; F1 in percent."""
    chooser = results["transfer_from"]

    def table(title: str) -> Any:
        columns = [column for p in PROTOCOLS for column in (f"F1 {p}", "wrong/right")]
        return _table(title, ("score", *columns))

    def cells(entry: dict[str, Any] | None) -> list[str]:
        if entry is None:
            return ["-", "-"]
        low, high = (_percent(end) for end in entry["f1_interval"])
        return [f"{_percent(entry['f1'])} ({low}-{high})", halves(entry)]

    def halves(entry: dict[str, Any]) -> str:
        return f"{_percent(entry['accuracy_erroneous'])}/{_percent(entry['accuracy_correct'])}"

    tables = []
    for name, subset in results["subsets"].items():
        counts = f"{subset['items']} solutions, {subset['erroneous']} wrong, {subset['correct']} right"
        counts += f", {subset['unlabelled']} without a label" if subset["unlabelled"] else ""
        tables.append(table(f"{name}: {counts}"))
        for rule, entries in subset["rules"].items():
            tables[-1].add_row(rule, *cells(entries["transfer"]), *cells(entries["oracle"]))
        for baseline, value in subset["baselines"].items():
            tables[-1].add_row(baseline, _percent(value["f1"]), halves(value), "", "", style="dim")
    if results["mean_f1"]:
        tables.append(table("mean of the subsets"))
        for rule, means in results["mean_f1"].items():
            tables[-1].add_row(rule, _percent(means["transfer"]), "", _percent(means["oracle"]), "")
    tables[-1].caption = (
        "First-error F1 in %, 95 % interval over solutions; wrong/right: share of each found.\n"
        f"transfer: threshold chosen on {chooser or '-'}; oracle: best threshold of each subset."
    )
    tables[-1].caption_justify = "left"
    return tables
