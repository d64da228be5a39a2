"""The one error that the command line turns into a line of its own, and what turns others into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_CAUSE = 300  # characters of a library's message


class IpvrmError(ValueError):
    """Something the user can act on. The command line prints its message on its own and exits with 2."""


class FailedAlike(IpvrmError):
    """A failure that every rank of a run meets at the same place, so that all can still act together."""


def cause(error: BaseException) -> str:
    """What an exception says, in one line; its type where the message is not a sentence on its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    if len(text) > LONGEST_CAUSE:
        text = text[:LONGEST_CAUSE] + " ..."
    if isinstance(error, KeyError | AttributeError | TypeError | IndexError | RuntimeError) or not text:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


@contextmanager
def reading(path: str | Path, what: str, advice: str) -> Iterator[None]:
    """The boundary to libraries that read files: whatever they raise becomes one line.

    Damaged bytes take a parser anywhere, so no list of exceptions is complete (OSError, SafetensorError,
    ArrowException, UnicodeError, RecursionError, the tokenizers' bare Exception ...). Inside stands the
    library's call and nothing of ours.

    Args:
        path: of the file or folder. what: what it is not ("not a readable parquet file").
        advice: what to do.

    Raises:
        IpvrmError: `path: what: cause; advice`.
    """
    try:
        yield
    except IpvrmError:
        raise
    except Exception as error:
        raise IpvrmError(f"{path}: {what}: {cause(error)}; {advice}") from error
