"""A part of the GPU report: a process of its own with a limit, which ends whatever the process does.

Shortly before its limit every process of the part is told to abort, and Python then writes the stacks of all
its threads into the log (PYTHONFAULTHANDLER); what still lives at the limit is killed. Nothing is waited for
without a limit, also a process that cannot be killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite.machine import ROOT
from benchmarks.suite.session import DEAD_CONTEXT, GO_ON

LEAST = 5.0  # seconds a part is still started with
DUMP = 3.0  # seconds before its limit when a part is told to write its stacks, at most half of its time
GONE = 5.0  # seconds that a killed process may take to be gone
RERUNS = 6  # of a part whose CUDA context died, each in a fresh process
# every line at once, and the stacks of all threads when it is told to abort
PYTHON = dict(PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1")
TAIL = 40  # lines of the log that the report quotes of a part that failed


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    slice: float  # seconds
    missing: str = ""  # why it cannot run here
    env: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
    needed: bool = False  # by the parts after it: not held to its share of the time
    goes_on: bool = False  # exits DEAD_CONTEXT after a CUDA error, and with GO_ON does what is left


def exit_codes(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Of each process once it ends; None for one that has not by then (time.monotonic), which is killed."""
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    killed = [process for process, code in zip(processes, codes, strict=True) if code is None]
    for process in killed:
        process.kill()
    for process in killed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GONE)
    return codes


def run_part(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run one part for at most `seconds` and GONE: status, seconds, the last lines of `log`."""
    result: dict[str, Any] = dict(seconds=0.0, command=" ".join(part.command[1:]), tail=[])
    if part.missing:
        return result | dict(status=f"not run: {part.missing}")
    if seconds < LEAST:
        return result | dict(status="not started: the budget is spent")
    start = time.monotonic()
    status, reruns = _run(part.command, part.env, seconds, log, "wb"), 0
    while part.goes_on and status == _failed(DEAD_CONTEXT) and reruns < RERUNS:
        left = seconds - (time.monotonic() - start)
        if left < LEAST:
            break
        reruns += 1
        status = _run([*part.command, GO_ON], part.env, left, log, "ab")
    result |= dict(status=status, seconds=round(time.monotonic() - start, 1))
    if reruns:
        result["reruns"] = reruns  # in a fresh process, each after a CUDA error
    lines = log.read_text(errors="replace").splitlines()
    result["tail"] = lines[-TAIL:] if status != "passed" else lines[-3:]
    return result


def _run(command: list[str], env: Mapping[str, str], seconds: float, log: Path, mode: str) -> str:
    """The status of one process and its children, which all write to `log`."""
    with log.open(mode) as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, **PYTHON, **env},
            )  # fmt: skip
        except OSError as error:
            return f"failed ({error})"
        _no_core_files(process.pid)
        try:
            return _wait(process, seconds)
        finally:
            _signal(process, signal.SIGKILL)  # what the part left behind, or all of it


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    dump = min(DUMP, seconds / 2)
    if _gone(process, seconds - dump):
        return "passed" if process.returncode == 0 else _failed(process.returncode)
    end = time.monotonic() + dump
    _write_stacks(process, dump)
    _gone(process, max(0.0, end - time.monotonic()))
    while _alive(process) and time.monotonic() < end:  # its children may still write theirs
        time.sleep(0.01)
    _signal(process, signal.SIGKILL)
    stopped = f"stopped at its limit of {seconds:.0f} s"
    return stopped if _gone(process, GONE) else f"{stopped}, and it could not be killed"


def _failed(code: int) -> str:
    return f"failed (exit {code})"


def _gone(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the part's group is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal(process: subprocess.Popen[bytes], number: int, member: int | None = None) -> None:
    """To all of the part's group, or to one of its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number) if member is None else os.kill(member, number)


def _write_stacks(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGABRT to each process of the group, the part's own first, and to the next once that one has ended or
    had its share of the time: stacks that two write at once are mixed letter by letter."""
    members = _members(process.pid)
    for pid in members:
        _signal(process, signal.SIGABRT, pid)
        end = time.monotonic() + seconds / (2 * len(members))
        while pid in _members(process.pid) and time.monotonic() < end:
            time.sleep(0.01)
    _signal(process, signal.SIGABRT)  # whoever was started meanwhile


def _members(group: int) -> list[int]:
    """The processes of a group that have not ended, oldest first."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, of_group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(int(place.name))
    return sorted(found)


def _no_core_files(pid: int) -> None:
    """An aborted process that has a GPU's memory mapped would write for minutes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
