"""Measure this package against what you would otherwise use, on this machine.

    ipvrm bench [--op NAME ...] [--quick | --full] [--device cpu|cuda] [--json F] [--csv F] [--plot DIR]
              [--results DIR] [--go-on]

Tables appear as they are measured; files are rewritten after every case, so that a run that is killed keeps
what it has, and the same command with --go-on measures the rest. Exits 1 if a result was wrong, one of ours
failed or a benchmark could not be built; 2 without the device, or where another run writes the files.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at import: the profiler's own notices, two a contender

import torch

from benchmarks.suite import terminal
from benchmarks.suite.machine import describe, results_name
from benchmarks.suite.measure import Case
from benchmarks.suite.session import GO_ON, OtherRun, Session, run_main, write_json, write_text
from benchmarks.suite.tables import as_csv
from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked

__all__ = ["MODULES", "main", "suite", "write_json", "write_text"]

MODULES = (
    "accuracy", "linear_logprobs", "linear_logprobs_partial", "linear_candidates", "linear_distrl_loss",
    "segment_scan", "prefix_values", "prefix_value_loss", "clipped_surrogate", "distrl_loss",
    "reward_step", "distrl_step", "policy_step", "advantages", "scaling",
)  # fmt: skip
SECONDS = dict(quick=0.4, default=2.0, full=3.0)  # of rounds a case, beyond the least number of rounds
# of everything on two idle cores, printed before it starts; measured, the least of a Zen 5, the most of a Zen
# 3; default estimated from full
MINUTES = dict(quick="3 to 5", default="24 to 53", full="34 to 75")


def suite(name: str, device: str, mode: str) -> Iterator[Case]:
    """The cases of one benchmark: its module's `cases(device, quick)` and, in a full run, `full_cases`."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    yield from module.cases(device, mode == "quick")
    if mode == "full" and hasattr(module, "full_cases"):
        yield from module.full_cases(device)


def main(arguments: list[str] | None = None) -> int:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="ipvrm bench", description=description)
    parser.add_argument(
        "--op", nargs="+", choices=MODULES, default=MODULES, metavar="NAME",
        help=f"which benchmarks (default: all): {', '.join(MODULES)}",
    )  # fmt: skip
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", dest="mode", action="store_const", const="quick", help="small shapes")
    effort.add_argument(
        "--full",
        dest="mode",
        action="store_const",
        const="full",
        help="also every model's head and odd sizes",
    )
    parser.set_defaults(mode="default")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="rows with machine, versions, commit, command")
    parser.add_argument("--csv", type=Path, metavar="F", help="the same as a table")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="PNG plots (needs the extra `plot`)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="all three, by the kind of processor: DIR/cpu-KIND.json, .csv and DIR/plots/cpu-KIND/*.png",
    )  # fmt: skip
    parser.add_argument(GO_ON, action="store_true", help="measure what the same command has left undone")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("ipvrm bench: --device cuda needs a GPU that torch can see", file=sys.stderr)
        return 2
    machine, start = describe(), time.monotonic()
    if options.results:
        stem = results_name(machine, options.device)
        options.json = options.json or options.results / f"{stem}.json"
        options.csv = options.csv or options.results / f"{stem}.csv"
        options.plot = options.plot or options.results / "plots" / stem
    if options.plot:
        from benchmarks.suite import plots  # noqa: F401 (before anything is measured: it may be missing)
    with ExitStack() as held:
        try:
            for output in filter(None, (options.json, options.csv)):
                held.enter_context(locked(output))
        except IpvrmError as error:
            print(f"ipvrm bench: {error}", file=sys.stderr)
            return 2
        return measured(options, machine, start)


def measured(options: argparse.Namespace, machine: dict[str, Any], start: float) -> int:
    """Measures and writes; the exit code. The outputs are this process's alone."""
    torch.manual_seed(0)
    try:
        session = Session(machine, options.json, options.go_on)
    except OtherRun as error:
        print(f"ipvrm bench: {error}", file=sys.stderr)
        return 2
    if session.complete:
        print(f"ipvrm bench: {options.json} is complete: nothing is left to be done")
        return 0
    before = machine.setdefault("seconds", 0)
    screen = terminal.Screen(machine, options.op, options.mode)
    if tuple(options.op) == MODULES and options.device == "cpu":
        screen.note(f"everything, {options.mode}: about {MINUTES[options.mode]} minutes on two idle cores")
    with screen:
        for name in options.op:
            cases = suite(name, options.device, options.mode) if name not in session.broken else iter(())
            while True:
                try:
                    case = next(cases)
                except StopIteration:
                    break
                except Exception as error:  # other benchmarks are not its hostages
                    screen.problem(session.cannot_go_on(name, error, options.device))
                    break
                screen.measuring(name, case)
                machine["seconds"] = before + round(time.monotonic() - start)
                new = session.measure(case, options.device, SECONDS[options.mode], name)
                del case  # the next one is built while this name would still hold its tensors
                if new:
                    screen.measured(new)
                if options.csv:
                    write_text(options.csv, as_csv(session.rows, machine))
            screen.finished(name)
    rows, problems = session.rows, session.problems
    machine["seconds"] = before + round(time.monotonic() - start)
    session.close()
    screen.summary(rows)
    if options.plot:
        from benchmarks.suite import plots

        for path in plots.draw(rows, machine, options.plot):
            screen.note(f"plot: {path}")
    screen.note(f"{len(rows)} rows in {machine['seconds']} s")
    for problem in problems:
        print(f"ipvrm bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
