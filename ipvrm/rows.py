"""Rollouts as text: what a row is, which files hold them, and which rows cannot be used and why."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ipvrm import IpvrmError

Message = dict[str, str]
OnBadRow = Literal["error", "skip"]
COLUMNS = ("conversation", "prompt", "response", "label")
SHOWN_BAD_ROWS = 10


@dataclass(frozen=True)
class Row:
    """One rollout as text. `source` is `file:row`; `label` is 1 (right), 0 (wrong) or None (unlabelled)."""

    source: str
    prompt: str | tuple[Message, ...]
    response: str
    label: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `row` counts from 1: a line of JSONL, a record of JSON or parquet."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


def read_rows(
    path: str | Path, on_bad_row: OnBadRow = "error", *, require_label: bool = True
) -> tuple[list[Row], list[BadRow]]:
    """Reads a `.parquet`, `.jsonl` or `.json` file of rollouts.

    Args:
        path: rows with `conversation` (messages, assistant last), or `prompt` (text or messages) and
            `response`; and `label` (0 or 1).
        on_bad_row: `error` raises with the first bad rows; `skip` leaves them out and returns them.
        require_label: False accepts rows without a label.

    Raises:
        IpvrmError: an unreadable file, bad rows under `error`, or no usable row at all.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, record in _records(Path(path)):
        try:
            prompt, response = _turns(record)
            rows.append(Row(f"{path}:{number}", prompt, response, _label(record, require_label)))
        except ValueError as error:
            bad.append(BadRow(str(path), number, str(error)))
    report_bad_rows(bad, on_bad_row, total=len(rows) + len(bad))
    if not rows:
        raise IpvrmError(f"{path}: no usable row ({len(bad)} bad); {_listing(bad) or 'the file is empty'}")
    return rows, bad


def report_bad_rows(bad: Sequence[BadRow], on_bad_row: OnBadRow, *, total: int) -> None:
    """Raises IpvrmError with file, row and reason of the first bad rows unless they are to be skipped."""
    if on_bad_row not in ("error", "skip"):
        raise IpvrmError(f"on_bad_row must be 'error' or 'skip'; got {on_bad_row!r}")
    if bad and on_bad_row == "error":
        raise IpvrmError(
            f"{len(bad)} of {total} rows are bad (--on_bad_row skip leaves them out):\n{_listing(bad)}"
        )


def _listing(bad: Sequence[BadRow]) -> str:
    lines = [f"  {item}" for item in bad[:SHOWN_BAD_ROWS]]
    if len(bad) > SHOWN_BAD_ROWS:
        lines.append(f"  ... and {len(bad) - SHOWN_BAD_ROWS} more")
    return "\n".join(lines)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(row counted from 1, record); a JSON line that does not parse comes as the ValueError it raised."""
    if not path.is_file():
        raise IpvrmError(f"{path}: no such file; a .parquet, .jsonl or .json file of rollouts is needed")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_records(path), 1)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise IpvrmError(f"{path}: must end in .parquet, .jsonl or .json")
    with open(path, encoding="utf-8") as file:
        try:
            if path.suffix == ".json" and file.read(1) == "[":
                file.seek(0)
                yield from enumerate(json.load(file), 1)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        yield number, ValueError(f"not valid JSON: {error}")
        except UnicodeDecodeError as error:
            raise IpvrmError(f"{path}: not UTF-8 text: {error}") from error
        except json.JSONDecodeError as error:
            raise IpvrmError(f"{path}: not valid JSON: {error}") from error


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise IpvrmError(f"{path}: not a readable parquet file: {error}") from error
    present = file.schema_arrow.names
    columns = [name for name in COLUMNS if name in present]
    if "conversation" not in columns and not {"prompt", "response"} <= set(columns):
        raise IpvrmError(
            f"{path}: needs a column `conversation`, or `prompt` and `response`; "
            f"its columns are {', '.join(present)}"
        )
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _turns(record: Any) -> tuple[str | tuple[Message, ...], str]:
    """(prompt, response) of a record. Raises ValueError with the reason."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with named columns; got {type(record).__name__}")
    prompt: str | tuple[Message, ...]
    if record.get("conversation") is not None:
        messages = _messages(record["conversation"], "conversation")
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"the last message must be the assistant's; its role is {messages[-1]['role']!r}"
            )
        if len(messages) < 2:
            raise ValueError(
                "conversation must hold a prompt before the assistant's message; it has one message"
            )
        prompt, response = tuple(messages[:-1]), messages[-1]["content"]
    elif record.get("prompt") is not None and "response" in record:
        prompt, response = record["prompt"], record["response"]
        if not isinstance(prompt, str):
            prompt = tuple(_messages(prompt, "prompt"))
        if not prompt:
            raise ValueError("prompt is empty; the first response token would have nothing that predicts it")
    else:
        names = ", ".join(map(str, record)) or "none"
        raise ValueError(
            f"needs `conversation`, or `prompt` and `response`; the columns with a value are {names}"
        )
    if not isinstance(response, str):
        raise ValueError(f"the response must be text; got {type(response).__name__}")
    if not response.strip():
        raise ValueError("the response is empty")
    return prompt, response


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages; got {type(value).__name__} {value!r:.40}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{column}[{index}] must be a message; got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{column}[{index}] must have text `role` and `content`; "
                f"got {type(role).__name__} and {type(content).__name__}"
            )
        messages.append({"role": role, "content": content})
    return messages


def _label(record: dict[str, Any], required: bool) -> int | None:
    label = record.get("label")
    if label is None:
        if required:
            raise ValueError("label is missing; it must be 1 (right) or 0 (wrong)")
        return None
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ValueError(f"label must be 0 or 1; got {label!r:.40}")
    return int(label)
