"""Streams that never end a run: a closed pipe, a closed terminal, a full disk behind `>`."""

import contextlib
import os
import sys
from typing import Any, TextIO


class Unbreakable:
    """A text stream that loses what cannot be written any more, and everything after it.

    What the first failure leaves in buffers, and what others write to the same descriptor, goes to the null
    device.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._lost_on_failure():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a stream of ASCII, say: nothing of the text is written yet
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._lost_on_failure():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost_on_failure(self) -> Any:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream object is closed
            try:
                number = self._stream.fileno()
            except (OSError, ValueError):
                self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
                return
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """Makes this process's standard streams ones that cannot fail; for commands, once, before any output."""
    for number in range(3):  # a stream that is closed from the start would lend its number to the next file
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))
