"""What is written to disk, so that an interruption leaves either the old file or the new one, never half."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Self

from ipvrm.errors import IpvrmError, cause, reading

ROWS_AT_A_TIME = 4096
ABOUT = "about"  # key of safetensors metadata
CPU_MATMUL = "cpu_matmul"
VERSIONED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the name of a temporary sibling to write, which in the end takes the place of `path`.

    It is flushed to disk first; on an error it is deleted, and what was at `path` stays. Every file of this
    package is written through here, but for those of a folder (`save_folder`) and logs (`JsonlFile`).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk that is full, gone or read-only makes of writing into one line. Raises IpvrmError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IpvrmError(
            f"{path}: cannot be written: {cause(error)}; make room, or name another output"
        ) from error


def publish(finished: Path, path: Path) -> None:
    """Renames a finished file over `path`; file and folder are flushed to disk."""
    _sync(finished)
    os.replace(finished, path)
    _sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON. Raises ValueError on NaN and infinities: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> None:
    """Replaces `path`, a `.parquet` or `.jsonl` file, by `rows`, of which a chunk is held at a time.

    Args:
        rows: without a schema a parquet file needs them twice, so an iterator will not do.
        schema: pyarrow's; None for `table_schema(rows)`.

    Raises:
        IpvrmError: as in `table_schema`.
        ValueError: NaN or an infinity in a JSON line.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        return
    import pyarrow
    import pyarrow.parquet

    schema = table_schema(rows) if schema is None else schema
    with replacing(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for chunk in _chunks(rows):
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))


def table_schema(rows: Iterable[Mapping[str, Any]]) -> Any:
    """The pyarrow schema of rows, columns in the order of their first appearance; keys may be missing.

    Raises:
        IpvrmError: a column whose values are of several types, which parquet does not have.
    """
    import pyarrow

    schema = pyarrow.schema([])
    try:
        for chunk in _chunks(rows):
            names = dict.fromkeys(name for row in chunk for name in row)
            columns = {name: pyarrow.array([row.get(name) for row in chunk]).type for name in names}
            schema = pyarrow.unify_schemas(
                [schema, pyarrow.schema(columns.items())], promote_options="permissive"
            )
    except (pyarrow.ArrowException, OverflowError) as error:
        raise IpvrmError(
            f"a column has values of several types, which parquet cannot hold: {cause(error)}; "
            "write .jsonl, or give the column one type"
        ) from error
    return schema


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rest = iter(rows)
    while chunk := [dict(row) for row in islice(rest, ROWS_AT_A_TIME)]:
        yield chunk


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> None:
    """Replaces `path` by `tensors` as safetensors, with what JSON can hold about them.

    Under one key, since safetensors writes several in any order: the same values are the same bytes.
    """
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=None if about is None else {ABOUT: json.dumps(about)})


def read_about(file: Any) -> dict[str, Any]:
    """What `write_tensors` was told about the tensors of an opened safetensors file; {} for nothing."""
    found = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    return found if isinstance(found, dict) else {}


def summary_path(output: str | Path) -> Path:
    """Where the counts of the rows in `output` are: `x.parquet` has `x.parquet.summary.json`."""
    return Path(f"{output}.summary.json")


def read_json(path: str | Path) -> Any:
    """The parsed file. Raises IpvrmError, with the file's name, when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise IpvrmError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IpvrmError(f"{path} is not valid JSON: {cause(error)}") from error


def read_json_lines(path: str | Path) -> list[Any]:
    """The parsed lines. Raises IpvrmError, with the file's name, when it is missing or a line is not JSON."""
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise IpvrmError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IpvrmError(f"{path} is not valid JSON lines: {cause(error)}") from error


def read_part(path: Path, entries: set[str], note: Callable[[str], None]) -> dict[str, Any] | None:
    """What an interrupted run has kept in `path`, a JSON object with `entries`; None where it is to be made.

    Of a half-written part, which is made again, `note` is told.
    """
    if not path.exists():
        return None
    try:
        part = read_json(path)
        if not isinstance(part, dict) or not entries <= part.keys():
            raise IpvrmError(f"{path} must hold {', '.join(sorted(entries))}")
    except IpvrmError as error:
        note(f"{error}; it is made again")
        return None
    return part


def finished_lines(partial: Path) -> tuple[int, int]:
    """How many lines an interrupted run has written to `partial`, and the `line` of the last one.

    What is torn, or was never written by a machine that died, is cut off.
    """
    count = last = whole = 0
    if not partial.is_file():
        return 0, 0
    with open(partial, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                last = int(json.loads(line)["line"])
            except (ValueError, KeyError, TypeError):
                break  # blocks of zeros; what is behind them is made again
            count, whole = count + 1, whole + len(line)
    os.truncate(partial, whole)
    return count, last


class JsonlFile:
    """Appends to `path`, one JSON object a line, flushed as it is written.

    Raises:
        IpvrmError: from its methods, with the file's name, where it cannot be written.
        ValueError: NaN or an infinity in a record.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, *records: Mapping[str, Any]) -> None:
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        with writing(self.path):
            self._file.writelines(lines)
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class JsonlLog(JsonlFile):
    """The log of a training run.

    Args:
        after_step: of a resumed run: records of later steps and lines that are no record are dropped first.
            None starts afresh.
        note: is told how many lines were damaged; a torn last one, which a kill leaves, is not.

    Raises:
        IpvrmError: as in `JsonlFile`, and where the log that is there cannot be read.
    """

    def __init__(
        self, path: str | Path, *, after_step: int | None = None, note: Callable[[str], None] | None = None
    ):
        path = Path(path)
        kept, damaged = [], 0
        if after_step is not None and path.exists():
            with reading(path, "cannot be read", "move it away, and the run goes on with a new log"):
                *lines, torn = path.read_bytes().split(b"\n")
            for line in (*lines, torn):
                try:
                    step = json.loads(line.decode())["step"]
                    if type(step) is not int:
                        raise ValueError(step)
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged += line is not torn
                    continue
                if step <= after_step:
                    kept.append(line.decode() + "\n")
        if damaged and note is not None:
            note(f"{path}: dropped damaged lines: {damaged}; the numbers of those steps are lost")
        write_text(path, "".join(kept))
        super().__init__(path)


FREE = {"free_on_resume": True}  # a field's metadata, see `settings_of`


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that decide its results: all fields but those marked `FREE` on resume.

    A field is free that does not decide what comes out (an interval of the log), or only by rounding (a batch
    size of one device), or whose contents are compared by hash (a path).
    """
    names = [field.name for field in fields(config) if not field.metadata.get("free_on_resume")]
    return {name: getattr(config, name) for name in names}


def changes(stored: Mapping[str, Any], now: Mapping[str, Any], words: Mapping[str, str] | None = None) -> str:
    """Every setting in which `now` differs from `stored`, with both values; empty where they agree.

    Args:
        stored: as it was read from JSON.
        words: what an entry is called whose values say nothing to a reader (a hash).
    """
    now, words = json.loads(json.dumps(now, default=str)), words or {}  # JSON has no tuples
    return ", ".join(
        words[name] if name in words else f"{name} ({stored.get(name)!r} then, {now.get(name)!r} now)"
        for name in sorted({*stored, *now})
        if stored.get(name) != now.get(name)
    )


def reusable(
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    note: Callable[[str], None],
    words: Mapping[str, str] | None = None,
) -> bool:
    """Whether what lies there was made under the settings of `now`.

    What was not is made again, and `note` is told every changed setting; where a user's work would be lost,
    `same_run` refuses instead.

    Args:
        stored, now, words: as in `changes`.
        what: begins the message: what lies there.
    """
    if changed := changes(stored, now, words):
        note(f"{what}: made again; changed: {changed}")
    return not changed


def same_run(
    stored: Mapping[str, Any], now: Mapping[str, Any], what: str, words: Mapping[str, str] | None = None
) -> None:
    """Refuses a run that would go on with what another one has left.

    Args:
        stored, now, words: as in `changes`.
        what: begins the message: what lies there.

    Raises:
        IpvrmError: it names every changed setting, with both values.
    """
    if changed := changes(stored, now, words):
        raise IpvrmError(
            f"{what} was made otherwise; changed: {changed}. Put them back, or choose another output"
        )


def begin_or_go_on(
    file: Path,
    now: Mapping[str, Any],
    what: str,
    words: Mapping[str, str],
    note: Callable[[str], None] | None = None,
) -> None:
    """`same_run` with the settings in `file`, which holds those of `now` from the first run on.

    Args:
        note: told where the first run's CPU matmuls were by another library; None where none are done.
    """
    if not file.exists():
        write_json(file, {**now, CPU_MATMUL: cpu_matmul()})
        return
    stored = dict(read_json(file))
    before = stored.pop(CPU_MATMUL, None)
    same_run(stored, now, what, words)
    if note is not None and (changed := other_matmul(before, what)):
        note(changed)


def cpu_matmul() -> str:
    """The library that multiplies matrices on the CPU in this process, and why."""
    from ipvrm_kernels import describe_cpu_matmul

    return describe_cpu_matmul()


def other_matmul(before: str | None, what: str) -> str | None:
    """That `what` was made by another library than runs now (`before` is its `cpu_matmul`), in words; None
    where it was not, or where that is not known."""
    now = cpu_matmul()
    library = None if before is None else before.partition(":")[0]
    if library is None or library == now.partition(":")[0]:
        return None
    return (
        f"the CPU matmuls of {what} were by {library}; from here on they are by {now}. The numbers go on "
        "with another rounding"
    )


def _sync(path: Path) -> None:
    if os.name != "posix":  # a folder cannot be flushed there, nor a file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def save_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary sibling folder, in the end renamed to `path`, or deleted on an error.

    It is flushed to disk first. A folder that is already at `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(path):
            temporary.mkdir()
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced.tmp")
        os.rename(path, replaced)
        os.rename(temporary, path)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Deletes a folder, which is renamed first: a killed process leaves no half of it under its name."""
    removed = path.with_name(f".{path.name}.{os.getpid()}.removed.tmp")
    os.rename(path, removed)
    shutil.rmtree(removed)


def sha256_of(path: Path) -> str:
    """sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_into(source: Path, folder: Path, *, last: str) -> None:
    """Renames what is in `source` into `folder`, the file `last` as the last one, and removes `source`.

    A folder of the same name is replaced whole.
    """
    for file in sorted(source.iterdir(), key=lambda path: path.name == last):
        if file.is_dir() and (folder / file.name).exists():
            remove_folder(folder / file.name)
        os.replace(file, folder / file.name)
    _sync(folder)
    source.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files and folders that a killed process left in `folder`, whose lock is held.

    Those of an output there that has a lock of its own stay: its name, without its suffix, begins theirs (a
    page and its data, a file and its summary, the folder of its unfinished work).
    """
    others = tuple(
        Path(path.name.removesuffix(".lock").lstrip(".")).stem + "." for path in folder.glob(".*.lock")
    )
    for path in folder.glob(".*.tmp"):
        if not path.name.lstrip(".").startswith(others):
            _delete(path)


def remove_leftovers_of(*files: Path) -> None:
    """Deletes the temporary files that killed runs left of these outputs; who calls this holds their lock."""
    for file in files:
        left = re.compile(rf"\.{re.escape(file.name)}\.\d+\.tmp")
        with writing(file):
            for path in file.parent.iterdir():
                if left.fullmatch(path.name):
                    _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def partial_folder(output: Path) -> Path:
    """The folder beside an output file that holds its unfinished work, made where it is missing.

    What killed runs have left of the same output is deleted; who calls this holds its lock.
    """
    folder = output.with_name(f".{output.name}.partial")
    name = re.escape(output.name)
    left = re.compile(rf"\.{name}(\.summary\.json)?\.\d+\.tmp|\.\.{name}\.partial\.\d+\.removed\.tmp")
    with writing(output):
        for path in output.parent.iterdir():
            if left.fullmatch(path.name):
                _delete(path)
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
    return folder


def remove_partial_folder(output: Path) -> None:
    """Deletes the folder of a finished output, whole or not at all: half of it would be taken for the
    unfinished work of the next run."""
    remove_folder(partial_folder(output))


def installed_version(package: str) -> str:
    """Version of an installed package, `absent` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def versions() -> dict[str, str]:
    """Versions of Python, ipvrm and the packages that decide the numbers."""
    own = {"ipvrm": installed_version("ipvrm"), "python": platform.python_version()}
    return own | {name: installed_version(name) for name in VERSIONED_PACKAGES}


def processor_name() -> str:
    """Name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def processor() -> str:
    """The CPU and the widest instructions that torch uses on it: of another one sums round otherwise, and a
    model trained from scratch comes out another."""
    import torch

    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, `+changes` when it has any; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe"]
        command += ["--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def manifest(
    command: str | None = None, *, seeds: dict[str, int] | None = None, **extra: Any
) -> dict[str, Any]:
    """What is needed to repeat a run; `command` is this process's unless given."""
    if command is None:
        program = Path(sys.argv[0])
        module = program.name == "__main__.py"
        name = ["python", "-m", program.parent.name] if module else [program.name]
        command = shlex.join([*name, *sys.argv[1:]])
    return {
        "command": command,
        "commit": _git_commit(),
        "seeds": seeds or {},
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        CPU_MATMUL: cpu_matmul(),
        **extra,
    }
