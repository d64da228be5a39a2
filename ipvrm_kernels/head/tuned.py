"""Tile configurations that a sweep on a GPU has measured, laid over the table in the source.

`tuned.json` beside this file holds one entry for each (architecture, kind of operands, kernel) that was
swept, with the device, commit and times it was chosen by; `python -m benchmarks.gpu.sweep --write` makes it.
What it does not mention stays as the source has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")


def overlay(
    table: dict[tuple[str, str], Any],
    departures: dict[tuple[str, str, str], dict[str, Any]],
    file: Path = FILE,
) -> None:
    """Replace fields by those of `file`: of `table`'s configurations (NamedTuples) where the kernel is
    "forward", else of `departures` from them.

    Raises: KeyError for an (architecture, kind) that the table lacks; ValueError for a field that it lacks,
    or for another BLOCK_V than the forward's.
    """
    entries = json.loads(file.read_text(encoding="utf-8"))["configs"]
    for entry in sorted(entries, key=lambda entry: entry["kernel"] != "forward"):
        key, config = (entry["architecture"], entry["kind"]), entry["config"]
        if entry["kernel"] == "forward":
            table[key] = table[key]._replace(**config)
            continue
        tiles = table[key]._replace(**config)
        if tiles.BLOCK_V != table[key].BLOCK_V:
            raise ValueError(f"{file.name}: {key} {entry['kernel']} must have the forward's BLOCK_V")
        departures[(*key, entry["kernel"])] = {k: v for k, v in config.items() if v != getattr(table[key], k)}
