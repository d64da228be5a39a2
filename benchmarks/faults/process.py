"""`ipvrm COMMAND` in a process forked from this one, which has imported everything already."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600.0  # seconds for a command that takes two alone: beyond, it hangs
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # os.replace and unlink as well
FULL = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: as the shell has it, negative for a signal, None where it hung."""

    status: int | None
    said: str
    changes: int  # of files below the trial's folder

    @property
    def last_line(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def wrong(self, allowed: Sequence[int]) -> str | None:
        """What no command may do: hang, die, print a traceback, end otherwise than allowed."""
        if self.status is None:
            return f"hung: {self.last_line}"
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {self.last_line}"
        if self.status not in allowed:
            return f"ended with {self.status}: {self.last_line}"
        if self.status == 2 and not any(
            line.startswith("ipvrm ") and ": " in line for line in self.said.splitlines()
        ):
            return f"2 without a line of its own: {self.last_line}"
        return None


class Wire:
    """An audit hook that counts changes of files below `root`, before they happen, and acts at one of them.

    What a native library writes is not seen, nor the bytes: kills by the clock and small disks are for those.

    Args:
        opened: where that change is the opening of a file, it acts right after, before the first byte.
    """

    def __init__(
        self, root: Path, at: int | None = None, act: Callable[[], None] = lambda: None, opened: bool = False
    ):
        self.root, self.at, self.act, self.opened = str(root), at, act, opened
        self.shared = mmap.mmap(-1, 8)  # the parent reads it too

    @property
    def count(self) -> int:
        return int(struct.unpack("q", self.shared[:8])[0])

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITES):
                return
        elif event in CHANGES:
            path = arguments[0]
            if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
                path = self.root  # of shutil.rmtree: a name in a folder that is open
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.root):
            return
        count = self.count + 1
        self.shared[:8] = struct.pack("q", count)
        if count == self.at:
            if event == "open" and self.opened:
                with contextlib.suppress(OSError):  # then the writer fails too, and has left nothing
                    os.close(os.open(path, arguments[2], 0o666))
            self.act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


class Running:
    """A command that has been started; `wait` for it, or `kill` it."""

    def __init__(self, pid: int, log: Path, wire: Wire):
        self.pid, self.log, self.wire = pid, log, wire
        self.started = time.monotonic()
        self._status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def send(self, number: int) -> bool:
        """Whether the command was still there to be sent a signal."""
        if self.poll():
            return False
        os.kill(self.pid, number)  # who has ended keeps its number until it is waited for
        return True

    def wait(self, seconds: float = PATIENCE) -> Ended:
        deadline, hung = time.monotonic() + seconds, False
        while not self.poll():
            if time.monotonic() > deadline:
                hung = True
                self.send(signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.005)
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(None if hung else self._status, said, self.wire.count)

    def seconds(self) -> float:
        return time.monotonic() - self.started


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    tune: Callable[[], None] = lambda: None,
    wire: Wire | None = None,
    before: Callable[[], None] = lambda: None,
    outputs: tuple[int | None, int | None] | None = None,
) -> Running:
    """Forks `ipvrm arguments` with the working directory `folder`.

    Args:
        tune: makes the program's portions small, so that a small run has many.
        before: what else the process does to itself first (limits, ignored signals).
        outputs: descriptors of its stdout and stderr, None for a closed one. Default: a log beside `folder`.
    """
    wire = wire or Wire(folder)
    log = folder.parent / f"{folder.name}.{time.monotonic_ns()}.log"
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        _child(arguments, folder, log, told, tune, wire, before, outputs)
    os.close(told)
    os.read(ready, 1)  # what happens from now on happens to the command
    os.close(ready)
    return Running(pid, log, wire)


def _child(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    told: int,
    tune: Callable[[], None],
    wire: Wire,
    before: Callable[[], None],
    outputs: tuple[int | None, int | None] | None,
) -> None:
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent ignores it
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        if outputs is None:
            both = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            outputs = (both, both)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, (name, given) in enumerate(zip(("stdout", "stderr"), outputs, strict=True), 1):
            if given is None:
                os.close(number)
                setattr(sys, name, None)  # as Python has it where a descriptor is closed from the start
            else:
                os.dup2(given, number)
                setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        from ipvrm.cli import main

        sys.argv = ["ipvrm", *arguments]
        sys.path.insert(0, str(folder))  # where the verifiers are
        tune()
        before()
        sys.addaudithook(wire)
        os.write(told, b"!")
        os.close(told)
        status = main()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
    finally:
        os._exit(status)


def run(arguments: Sequence[str], folder: Path, *, seconds: float = PATIENCE, **options: Any) -> Ended:
    """`start`, and waits for the end."""
    return start(arguments, folder, **options).wait(seconds)


def limited_files(most: int) -> Callable[[], None]:
    """No file may grow beyond `most` bytes: as a full disk for native writers too, with EFBIG."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None] | None]:
    """A tmpfs of `size` bytes at `folder`, and what remounts it; None where mounting is not allowed."""
    import subprocess

    def mount(*arguments: str) -> bool:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False)
        return done.returncode == 0

    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield None
        return
    try:
        yield lambda options: None if mount("-o", f"remount,{options}") else sys.exit("remount failed")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
