"""Peak memory of `ipvrm label` and `ipvrm score` on files of many rows, and of one row of 50 MB.

    python -m benchmarks.faults.memory --rows 10000 100000 --json benchmarks/results/faults/memory.json

The peak is the resident memory of the command's process (VmHWM) and that of the largest process that it
started (a verifier's), which is an upper bound: Linux counts what the command held when it started that one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.toy import make_toy
from benchmarks.suite import machine
from ipvrm.run_folder import write_json

LONG = 50_000_000  # characters
MEASURED = """import json, resource, sys
from ipvrm.cli import main
code = main(json.loads(sys.argv[1]))
own = [1024 * int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line]
print(code, *own, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peaks(arguments: Sequence[str]) -> tuple[int, int]:
    """(peak of `ipvrm arguments`, of its largest child) in bytes; RuntimeError where it does not end well."""
    command = [sys.executable, "-c", MEASURED, json.dumps([*map(str, arguments)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.split()[-3] != "0":
        raise RuntimeError(f"{arguments}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    _, own, child = map(int, done.stdout.split()[-3:])
    return own, child


def write_rows(path: Path, command: str, count: int, long_one: int | None = None) -> Path:
    """`count` rows of about 1 kB for `label`, of two short steps for `score`; one has LONG characters."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            text = "word and é " * (LONG // 11) if n == long_one else ""
            if command == "label":
                prompt = f"q{n // 4} " + "x" * 1000
                row = {"prompt": prompt, "response": f"{text}Answer: {n}", "answer": str(n), "sample": n % 4}
            else:
                row = {"problem": str(n), "steps": [f"{n % 4}", f"{n % 10}{text}"], "id": f"item-{n}"}
            file.write(json.dumps(row) + "\n")
    return path


def command_of(command: str, model: Path, source: Path, output: Path, *more: str) -> list[str]:
    """The command's arguments."""
    flags = {
        "label": ["--verifier", "string", "--num_workers", "1"],
        "score": ["--model", str(model), "--use_cpu", "--step_format", "{step}", "--step_separator", ";"],
    }[command]
    return [command, "--input", str(source), "--output", str(output), *flags, *more]


def measure(
    folder: Path, model: Path, command: str, count: int, *more: str, long: bool = False
) -> dict[str, Any]:
    """The peak on a file of `count` rows, of which the middle one is long where asked."""
    source = write_rows(
        folder / f"{command}-{count}-{long}.jsonl", command, count, count // 2 if long else None
    )
    began = time.monotonic()
    own, child = peaks(command_of(command, model, source, folder / f"{source.name}.out.jsonl", *more))
    found = {
        "command": command, "rows": count, "row_of_50_mb": long, "flags": list(more),
        "file_mb": round(source.stat().st_size / 1e6), "peak_mb": round(own / 1e6),
        "child_peak_mb": round(child / 1e6), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    source.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.memory", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = []
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        model = make_toy(folder, ("ipvrm",)) / "ipvrm"
        for verifier in ("string", "math"):
            for long in (False, True):
                found.append(measure(folder, model, "label", 40, "--verifier", verifier, long=long))
        for long in (False, True):
            found.append(measure(folder, model, "score", 40, "--on_bad_row", "skip", long=long))
        for command in ("label", "score"):
            for count in given.rows:
                found.append(measure(folder, model, command, count))
                if given.json is not None:
                    write_json(given.json, {"machine": machine.describe(), "measured": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
