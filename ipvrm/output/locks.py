"""Outputs that a run holds for itself: what two runs write together belongs to neither.

A lock is `flock`'s: the kernel drops it when the process ends, however it ends, so none is ever left over.
"""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ipvrm.errors import IpvrmError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def lock_path(output: str | Path, *, folder: bool = False) -> Path:
    """The lock's file: `.lock` in an output folder, `.NAME.lock` beside an output file."""
    path = Path(output).absolute()
    return path / ".lock" if folder else path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def locked(output: str | Path, *, folder: bool = False) -> Iterator[None]:
    """Holds the output, a file or a folder, for this process alone; on a rank but 0 nothing is done.

    Args:
        folder: the output is a folder, which is made, else a file.

    Raises:
        IpvrmError: it cannot be written, is of the other kind, or another run holds it (which one, is said).
    """
    made = folder and not os.path.lexists(output)
    check_writable(output, folder=folder)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = lock_path(output, folder=folder)
    descriptor = _acquire(path, output)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock goes: whoever waits for the old file sees that it is gone
            os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(output)  # where nothing was written: refused settings leave no empty folder


def check_writable(output: str | Path, *, folder: bool = False) -> None:
    """Raises IpvrmError where `output` could not be written, before any work; makes the folders needed."""
    path = Path(output)
    try:
        if folder and path.exists() and not path.is_dir():
            raise IpvrmError(f"{output}: is a file; name a folder to write into")
        if not folder and path.is_dir():
            raise IpvrmError(f"{output}: is a folder; name a file to write")
        held = path if folder else path.parent
        held.mkdir(parents=True, exist_ok=True)
        if not os.access(held, os.W_OK | os.X_OK):
            raise IpvrmError(f"{held}: no permission to write there; name another output")
    except OSError as error:
        raise IpvrmError(f"{output}: cannot be written: {error.strerror}; name another output") from error


def _acquire(path: Path, output: str | Path) -> int | None:
    """The open and locked file; None, and one warning, where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        warnings.warn(
            f"{output}: no file locks on this system; see that no other run writes there", stacklevel=4
        )
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise IpvrmError(f"{path}: cannot be written: {error.strerror}; name another output") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise IpvrmError(
                    f"{output}: another run writes there ({holder}); wait for it, or name another output"
                ) from error
            if error.errno not in NO_LOCKS:
                raise IpvrmError(
                    f"{path}: cannot be locked: {error.strerror}; name another output"
                ) from error
            warnings.warn(
                f"{output}: its file system has no locks ({error.strerror}); see that no other run writes "
                "there",
                stacklevel=4,
            )
            return None
        if _is_the_file(descriptor, path):
            break
        os.close(descriptor)  # the holder before us has removed the file that we opened: try the new one
    who = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode(), 0)
    return descriptor


def _is_the_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {who['pid']} on {who['host']}, started {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which one yet"
