"""The rows of a run, in their file after every case, and what a CUDA error leaves to be done.

No CUDA context survives an error, so the contender that caused it gets its row, the process ends with
DEAD_CONTEXT, and a fresh one with GO_ON measures the case's other contenders and what comes after it
(benchmarks.gpu_report starts it).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.suite import roofline
from benchmarks.suite.measure import WRONG, Case, DeadContext, Row, failed, is_ours, measure, raise_if_dead
from ipvrm import run_folder

DEAD_CONTEXT = 70  # exit status
GO_ON = "--go-on"


SAME = ("commit", "device", "cpu", "processor", "cpu_matmul", "threads", "versions")  # of one run


class OtherRun(Exception):
    """What --go-on was to go on with is another run."""


class Session:
    """rows: of all cases so far. problems: in words, what makes the run a failure."""

    def __init__(self, machine: dict[str, Any], path: Path | None, go_on: bool = False) -> None:
        self.machine, self.path = machine, path
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.seen: dict[str, int] = {}  # cases of each benchmark that this process has come to
        self.done: dict[str, int] = {}  # and that it or an earlier one has measured
        self.dead: dict[str, str] = {}  # contenders of the case after those that ended its processes
        self.broken: list[str] = []  # benchmarks whose building of a case ended a process
        self.complete = False  # whether nothing is left of the run to go on with
        self.kernels: list[dict[str, Any]] = []  # device times of single kernels (benchmarks.gpu.headline)
        if go_on and path and path.is_file():
            content = json.loads(path.read_text())
            refuse_another_run(path, content["machine"], machine)
            machine |= content["machine"]  # date, load and seconds of its start
            progress = content.get("progress")
            self.complete = progress is None
            progress = progress or dict(rows=None, done={}, dead={}, broken=[], problems=[])
            self.rows = [Row.from_dict(row) for row in content["rows"][: progress["rows"]]]
            self.done, self.dead, self.broken = progress["done"], progress["dead"], progress["broken"]
            self.problems, self.kernels = progress["problems"], content.get("kernels", [])

    def measure(self, case: Case, device: str, seconds: float, benchmark: str = "") -> list[Row]:
        """`measure` the next case of `benchmark`; of one that an earlier process measured no rows."""
        self.seen[benchmark] = self.seen.get(benchmark, 0) + 1
        if self.seen[benchmark] <= self.done.get(benchmark, 0):
            return []
        alive = {name: run for name, run in case.contenders.items() if name not in self.dead}
        case = replace(case, contenders=alive, absent={**case.absent, **self.dead})
        stream = roofline.expected_stream(case.num_bytes) if device == "cuda" and case.num_bytes else None
        if stream is not None and not case.expected:
            case = replace(case, expected={name: stream for name in alive if is_ours(name)})
        try:
            new = measure(case, device, seconds)
        except DeadContext as error:
            reason = str(error)
            self.problems.append(f"{case.op}, {case.shape}: {error.contender}: {reason}")
            if not error.contender:  # nobody to blame: the case is given up
                self._finish([failed(case, name, reason) for name in alive], benchmark)
            else:
                self.dead[error.contender] = reason
                self.write([failed(case, name, reason) for name, reason in self.dead.items()])
            raise SystemExit(DEAD_CONTEXT) from error
        self.problems += [
            f"{row.op}, {row.shape}: {row.contender}: {row.error}"
            for row in new
            if row.error.startswith(WRONG)
            or (row.error and is_ours(row.contender) and row.contender not in case.absent)
        ]
        self._finish(new, benchmark)
        return new

    def cannot_go_on(self, name: str, error: Exception, device: str) -> str:
        """A problem of the benchmark `name`, whose next case raised `error`, in words.

        After a CUDA error this process ends, and a fresh one leaves that benchmark out.
        """
        self.problems.append(f"{name}: its cases end here: {type(error).__name__}: {error}")
        try:
            raise_if_dead(device, "", error)
        except DeadContext as dead:
            self.broken.append(name)
            self.write()
            raise SystemExit(DEAD_CONTEXT) from dead
        return self.problems[-1]

    def close(self) -> None:
        """The file as it stays: nothing is left to be done."""
        if self.path is not None:
            write_json(self.path, self._content(self.rows))

    def _finish(self, new: list[Row], benchmark: str) -> None:
        self.rows += new
        self.done[benchmark], self.dead = self.seen[benchmark], {}
        self.write()

    def write(self, unfinished: list[Row] | None = None) -> None:
        """Replace the file; with rows of the case at hand, which `rows` does not get."""
        if self.path is None:
            return
        progress = dict(
            rows=len(self.rows), done=self.done, dead=self.dead, broken=self.broken, problems=self.problems
        )
        content = self._content([*self.rows, *(unfinished or ())])
        write_json(self.path, content | dict(progress=progress))

    def _content(self, rows: list[Row]) -> dict[str, Any]:
        kernels = dict(kernels=self.kernels) if self.kernels else {}
        return dict(machine=self.machine, rows=[row.as_dict() for row in rows]) | kernels


def refuse_another_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OtherRun if `path`, measured on the machine `before`, is no part of a run on `now`."""

    def identity(machine: Mapping[str, Any]) -> dict[str, Any]:
        command = machine.get("command", "").replace(f" {GO_ON}", "")
        return {key: machine.get(key) for key in SAME} | dict(command=command)

    there, here = identity(before), identity(now)
    other = "; ".join(f"{key}: {there[key]}, now {here[key]}" for key in here if there[key] != here[key])
    if other:
        raise OtherRun(f"{path} is of another run, which {GO_ON} would mix with this one: {other}")


def run_main(main: Callable[[], int]) -> NoReturn:
    """`sys.exit(main())`; after a CUDA error at once, since tearing its context down may abort or hang."""
    try:
        code = main()
    except SystemExit as ended:
        if ended.code != DEAD_CONTEXT:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DEAD_CONTEXT)
    sys.exit(code)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces `path`, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(path, text)
