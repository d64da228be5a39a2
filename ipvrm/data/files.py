"""Files of records: JSON lines, a JSON list or parquet; plain, gzip or zst; one file, or a folder of shards.

Whatever is wrong with a file becomes one line with its name. Whatever is wrong with one record comes in its
place, as the ValueError that says why.
"""

import glob
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ipvrm.errors import IpvrmError, cause, reading

T = TypeVar("T")
KINDS = (".parquet", ".jsonl", ".json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = "a .parquet, .jsonl or .json file (the two also with .gz or .zst behind), or a folder of them"
BOM = b"\xef\xbb\xbf"  # Notepad, PowerShell and Excel begin UTF-8 with it
WHITE = b" \t\r\n"
LONGEST = 1 << 28  # bytes of a line, and 4 times as many of a JSON list: a few MB can unpack to any size
DECODED = 1 << 28  # bytes of parquet rows at a time, if each row has every text of its batch
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
AROUND_SPLIT = "[-._ 0-9/]"  # what ends a split's name in a file's, as in the Hub's own library, `datasets`
DEEPEST = 64  # levels of a record: far more than chat and tools need, far less than Python's stack
AGAIN = "download or copy it again"


class Record(NamedTuple):
    """`file:row` is where it stands (a line of JSON lines, else a record, from 1); `number` counts over all
    shards and is `row` in the first; `value` is the parsed record, or the ValueError in its place."""

    file: str
    row: int
    number: int
    value: Any


def shards(path: str | Path) -> list[Path]:
    """The file at `path`, the files of records in the folder `path` in the order of their names, or those of
    a split of a data set of the Hub (`org/name`, which is its split train, or `org/name:split`).

    Raises:
        IpvrmError: nothing there, or nothing that ends like a file of records.
    """
    if found := _of_hub(str(path)):
        return found
    path = Path(path)
    with reading(path, "cannot be read", "check the name and the permissions"):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")) and p.is_file())
            found = [p for p in inside if kind_of(p)]
        else:
            found = [path] if path.is_file() else []
    if not found:
        what = "a folder without files of records" if path.is_dir() else "no such file"
        raise IpvrmError(f"{path}: {what}; needed is {ENDINGS}")
    if not kind_of(found[0]):
        raise IpvrmError(f"{path}: must end in .parquet, .jsonl or .json; needed is {ENDINGS}")
    return found


def hub_data_set(name: str) -> tuple[str, str | None] | None:
    """`org/name` and the split of `org/name:split`; None where `name` is no such name, or is a path."""
    repository, _, split = name.partition(":")
    if not HUB_NAME.fullmatch(repository) or kind_of(Path(repository)) or Path(name).exists():
        return None
    return repository, split or None


def _of_hub(name: str) -> list[Path]:
    """The files of `org/name[:split]`, downloaded unless HF_HUB_OFFLINE=1; none where `name` is no such name.

    A split's files have its name as a word of their own (`AROUND_SPLIT`, or an end) in theirs; without such
    files those in folders with it. `math` is that of math.json and math-2.json, not of omnimath.json. Other
    words for a split, and what a data set's card says of its files, are not looked at.
    """
    asked = hub_data_set(name)
    if asked is None:
        return []
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, split = asked[0], asked[1] or "train"
    named = glob.escape(split)
    patterns = [
        f"{before}{named}{after}{kind}{end}"
        for before in ("", f"*{AROUND_SPLIT}")
        for after in ("", f"{AROUND_SPLIT}*")
        for kind in KINDS
        for end in ("", *COMPRESSIONS)
    ]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IpvrmError(
            f"{name}: neither a file or folder nor a data set that the Hub gives: {reason}"
        ) from error
    word = re.compile(f"(^|{AROUND_SPLIT}){re.escape(split)}({AROUND_SPLIT}|$)")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and kind_of(p))
    found = [p for p in files if word.search(p.name)]
    found = found or [p for p in files if word.search(p.parent.relative_to(folder).as_posix())]
    folders = {p.parent for p in found}
    if not found or len(folders) > 1:
        listed = ", ".join(sorted(str(p.relative_to(folder)) for p in folders)) or "none"
        raise IpvrmError(
            f"{name}: its split {split} must be in one folder; with files of that name: {listed}. "
            "Name the split (org/name:split), or download the files and give their folder"
        )
    return found


def kind_of(path: Path) -> str | None:
    """`.parquet`, `.jsonl` or `.json`, compressed or not; None for a file of another kind."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if name.suffix == ".parquet" and name != path:
        return None  # parquet compresses by itself
    return name.suffix if name.suffix in KINDS else None


def file_hash(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of the shards in a folder."""
    digest, files = hashlib.sha256(), shards(path)
    for file in files:
        if files != [Path(path)]:
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with reading(file, "cannot be read", AGAIN), open(file, "rb") as opened:
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def records(
    path: str | Path,
    columns: Sequence[str] | None,
    needs: Sequence[tuple[str, ...]] = (),
    *,
    check: bool = True,
) -> Iterator[Record]:
    """Every record in `path`, one at a time (a JSON list is parsed whole).

    Args:
        columns: of a parquet file only those of them that it has are read; None for all.
        needs: one of these sets of columns must be in a parquet file.
        check: `check_values` of every record.

    Raises:
        IpvrmError: a file that cannot be read, with its name, also in the middle of it.
    """
    before = 0
    for file in shards(path):
        kind, last = kind_of(file), 0
        found = _parquet(file, columns, needs) if kind == ".parquet" else _json(file, kind == ".json")
        for last, value in found:
            yield Record(str(file), last, before + last, _checked(value) if check else value)
        before += last


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; one list is held at a time."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _checked(value: Any) -> Any:
    if isinstance(value, ValueError):
        return value
    try:
        check_values(value)
    except ValueError as error:
        return error
    return value


def check_values(value: Any) -> None:
    """Raises ValueError where a record holds what nothing behind can use: text with half a surrogate pair
    (a JSON escape cut in the middle of an emoji), or more than `DEEPEST` levels."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(item[error.start]):04x}"
                    raise ValueError(f"text that is not Unicode: half a surrogate pair ({half})") from error
        elif isinstance(item, dict | list):
            if depth == DEEPEST:
                raise ValueError(f"nested deeper than {DEEPEST} levels")
            if isinstance(item, dict):
                waiting += [(inner, depth + 1) for pair in item.items() for inner in pair]
            elif not set(map(type, item)) <= {int, float, bool}:
                waiting += [(inner, depth + 1) for inner in item]


def finite(value: Any, name: str) -> Any:
    """`value` where it can be written as JSON; None for NaN, which is how pandas writes that there is none.

    Raises:
        ValueError: an infinity, or either of them within it.
    """
    if isinstance(value, float) and math.isnan(value):
        return None
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"`{name}` holds NaN or an infinity, which JSON does not have") from error
    except TypeError as error:  # a date or bytes of a parquet column
        raise ValueError(f"`{name}` holds what JSON does not have: {error}") from error
    return value


def without_none(value: Any, name: str) -> Any:
    """A JSON value without keys that hold nothing, as parquet (None) and pandas (NaN) fill them in.

    Raises:
        ValueError: what JSON does not have is in it.
    """
    if isinstance(value, dict):
        kept = {key: without_none(inner, name) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner, name) for inner in value]
    return value if isinstance(value, str) else finite(value, name)


# --------------------------------------------------------------------------------------------------- JSON


def _json(file: Path, may_be_list: bool) -> Iterator[tuple[int, Any]]:
    import pyarrow

    compression = COMPRESSIONS.get(file.suffix)
    with reading(file, "cannot be read", AGAIN):
        source = io.BufferedReader(pyarrow.input_stream(str(file), compression=compression))
        start = source.peek(4096)
    with source:
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise IpvrmError(f"{file}: UTF-16 text; save it as UTF-8")
        if may_be_list and start.removeprefix(BOM).lstrip(WHITE).startswith(b"["):
            with reading(file, "not valid JSON", "repair it, or write one record a line"):
                pieces, size = [], 0
                while piece := source.read(1 << 22):
                    pieces.append(piece)
                    size += len(piece)
                    if size > 4 * LONGEST:
                        raise ValueError(f"a JSON list of more than {4 * LONGEST:,} bytes")
                found = json.loads(b"".join(pieces).decode("utf-8-sig"))
            yield from enumerate(found, 1)
            return
        number = 0
        while True:
            with reading(file, "cannot be read to its end", AGAIN):
                line = source.readline(LONGEST)
                endless = len(line) == LONGEST and not line.endswith(b"\n")
                while endless and (rest := source.readline(1 << 22)) and not rest.endswith(b"\n"):
                    pass
            if not line:
                return
            number += 1
            if endless:
                yield number, ValueError(f"more than {LONGEST:,} bytes")
                continue
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {cause(error)}")


# ------------------------------------------------------------------------------------------------- parquet


def _parquet(
    file: Path, columns: Sequence[str] | None, needs: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    problem = "not a readable parquet file"
    with reading(file, problem, AGAIN):
        opened = pyarrow.parquet.ParquetFile(file)
        leaves = [opened.schema.column(i) for i in range(len(opened.schema))]
        texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        opened.close()
        # a text that many rows share is then held once: a file of a kilobyte can hold a thousand of 10 MB
        opened = pyarrow.parquet.ParquetFile(file, read_dictionary=texts)
        present = opened.schema_arrow.names
    if needs and not any(set(needed) <= set(present) for needed in needs):
        ways = ", or ".join(" and ".join(f"`{name}`" for name in needed) for needed in needs)
        raise IpvrmError(f"{file}: needs a column {ways}; its columns are {', '.join(present)}")
    chosen = None if columns is None else [name for name in columns if name in present]
    number = 0
    with opened:
        batches = opened.iter_batches(batch_size=1024, columns=chosen)
        while True:
            with reading(file, problem, AGAIN):
                batch = next(batches, None)
            if batch is None:
                return
            size = max(1, min(batch.num_rows, DECODED // max(1, batch.get_total_buffer_size())))
            for start in range(0, batch.num_rows, size):
                for value in _rows(batch.slice(start, size)):
                    number += 1
                    yield number, value


def _rows(batch: Any) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):  # a text that is no UTF-8, a date beyond Python's: find its row
        return [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return ValueError(f"a value that cannot be read: {cause(error)}")
