"""GPU evidence in one command: `python -m benchmarks.gpu_report --out DIR [--only PART ...]`.

Builds the extension, runs the tests with the GPU on and times every op against the bare matmul, each part
in a process of its own with its own time limit, so that a part that fails or hangs loses nothing of the
others. After every part it rewrites DIR/<gpu>-<date>.json and DIR/<gpu>-<date>.md. Exits 0 if every part
passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe
from benchmarks.measure import Row, markdown
from benchmarks.run import MODULES, write_json


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    limit: float  # seconds


def parts(folder: Path) -> list[Part]:
    python = sys.executable
    run = [python, "-m", "benchmarks.run", "--device", "cuda"]
    bench = [
        Part(f"bench_{name}", [*run, "--op", name, "--json", str(folder / f"{name}.json")], limit)
        for name, limit in zip(MODULES, (80, 30, 30, 40, 20, 20, 20, 20, 40, 15), strict=True)
    ]  # fmt: skip
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    tests += ["-k", "cuda and not compile_without"]
    return [Part("build", build, 120), Part("tests", tests, 150), *bench]


def run_part(part: Part, limit: float, log: Path) -> dict[str, Any]:
    """Run one part in its own process group, killed whole at its limit: status, seconds, the last lines."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped at its limit of {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    result = dict(
        status=status, seconds=round(time.monotonic() - start, 1), command=" ".join(part.command[1:])
    )
    result["tail"] = lines[-40:] if status != "passed" else lines[-3:]
    return result


def report(machine: dict[str, Any], results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    modified = " (modified)" if machine["modified"] else ""
    lines = [
        f"# {machine['device']}, {machine['date']}",
        "",
        f"`{machine['command']}` at commit {machine['commit']}{modified}; {versions}.",
        "",
        "| part | status | seconds |",
        "|---|---|--:|",
        *(f"| {name} | {part['status']} | {part['seconds']} |" for name, part in results.items()),
        "",
        markdown(Row(**row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    names = ["build", "tests", *(f"bench_{name}" for name in MODULES)]
    parser.add_argument("--only", nargs="+", choices=names, help="parts to run (default: all)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_report: no GPU that torch can see; nothing was run and nothing written", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.budget
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    target = options.out / f"{slug}-{time.strftime('%Y-%m-%d')}"
    results: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in parts(folder):
            if options.only and part.name not in options.only:
                continue
            limit = min(part.limit, deadline - time.monotonic())
            if limit < 5:
                results[part.name] = dict(
                    status="not started: the budget is spent", seconds=0.0, command="", tail=[]
                )
                continue
            print(f"{part.name} ...", end=" ", flush=True)
            results[part.name] = run_part(part, limit, folder / f"{part.name}.log")
            print(f"{results[part.name]['status']}, {results[part.name]['seconds']} s", flush=True)
            measured = folder / f"{part.name.removeprefix('bench_')}.json"
            if measured.is_file():  # a part stopped at its limit keeps the cases it finished
                rows += json.loads(measured.read_text())["rows"]
            write_json(target.with_suffix(".json"), dict(machine=machine, parts=results, rows=rows))
            target.with_suffix(".md").write_text(report(machine, results, rows))
    print(report(machine, results, rows))
    print(f"written: {target}.json and .md")
    return 0 if all(part["status"] == "passed" for part in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
