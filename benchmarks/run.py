"""Run benchmarks on this machine: `python -m benchmarks.run [--op NAME ...] [--quick] [--device cpu|cuda]
[--json FILE]`.

A table in the terminal; with --json the same rows with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at import: the profiler's own notices, two a contender

import torch

from benchmarks.machine import describe
from benchmarks.measure import Row, markdown, measure

MODULES = (
    "linear_logprobs", "linear_logprobs_partial", "linear_candidates", "linear_distrl_loss",
    "segment_scan", "prefix_values", "prefix_value_loss", "reward_step", "policy_step",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ipvrm bench", description=__doc__)
    parser.add_argument(
        "--op", nargs="+", choices=MODULES, default=MODULES, help="which benchmarks (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a second each")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("ipvrm bench: --device cuda needs a GPU that torch can see", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in options.op:
        for case in importlib.import_module(f"benchmarks.bench_{name}").cases(options.device, options.quick):
            print(f"{case.op}: {case.shape}", file=sys.stderr, flush=True)
            rows += measure(case, options.device, seconds=1.0 if options.quick else 4.0)
            if options.json:  # after every case, so that a killed run keeps what it measured
                write_json(options.json, dict(machine=describe(), rows=[row.as_dict() for row in rows]))
    print(markdown(rows))
    return 0


def write_json(path: Path, content: dict) -> None:
    """Write to a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
