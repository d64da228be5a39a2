"""Tile configurations that a sweep on a GPU has measured, laid over the table in the source.

`tuned.json` beside this file holds one entry for each (architecture, kind of operands) that was swept, with
the device, commit and times it was chosen by; `python -m benchmarks.gpu.sweep --write` makes it. What it does
not mention stays as the source has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")


def overlay(table: dict[tuple[str, str], Any], file: Path = FILE) -> None:
    """Replace the named fields of `table`'s configurations (NamedTuples) by those of `file`.

    Raises: KeyError for an (architecture, kind) that the table lacks; ValueError for a field that it lacks.
    """
    for entry in json.loads(file.read_text(encoding="utf-8"))["configs"]:
        key = entry["architecture"], entry["kind"]
        table[key] = table[key]._replace(**entry["config"])
