"""GPU evidence in one command: `python -m benchmarks.gpu_report [--out DIR] [--only PART ...] [--resume]`.

Builds the extension, sweeps the Triton head's tiles (the winner becomes the default that everything after it
uses), runs the tests and compute-sanitizer, times every benchmark, and reads the profiler's counters of the
two main kernels. Each part is a process of its own with its own slice of the budget, so that one that fails
or hangs loses nothing of the others; time that a part leaves is shared by those after it.

After every part DIR/<gpu>-<date>.json and .md are rewritten. --only runs some parts again and --resume those
that have not passed; both go on in the newest report of this GPU and commit. Exits 0 if every part passed, 1
if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import MODULES, write_json, write_text
from benchmarks.suite.machine import ROOT, describe

BUDGET = 520.0  # seconds of everything
LEAST = 5.0  # seconds a part is still started with
# seconds of each part out of the budget; a benchmark that is not named here takes OTHER
SLICES = dict(
    build=90, sweep=60, tests=85, sanitizer=25, bench_linear_logprobs=45, bench_linear_candidates=20,
    bench_linear_logprobs_partial=12, bench_linear_distrl_loss=30, bench_reward_step=20, bench_distrl_step=22,
    bench_scaling=28, ncu=28,
)  # fmt: skip
OTHER = 9
KERNELS = "regex:_head_(stats|dz)_kernel"
METRICS = (
    "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum",
    "lts__t_sector_hit_rate.pct", "launch__registers_per_thread", "launch__occupancy_limit_registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)  # fmt: skip
CUDA_TOOLS = (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    slice: float  # seconds, see SLICES
    missing: str = ""  # why it cannot run here


def parts(folder: Path) -> list[Part]:
    """Every part in its order; what it measures lands in folder/<name>.json."""
    python = sys.executable
    run = [python, "-m", "benchmarks.run", "--device", "cuda"]
    tests = [python, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    tests += ["-k", "cuda and not compile_without"]
    small = [python, "-m", "benchmarks.gpu.small"]
    sweep = [python, "-m", "benchmarks.gpu.sweep", "--write", "--json", str(folder / "sweep.json")]
    benches = [
        (f"bench_{name}", [*run, "--op", name, "--json", str(folder / f"bench_{name}.json")])
        for name in MODULES
    ]
    sanitizer, ncu = find_tool("compute-sanitizer"), find_tool("ncu")
    listed = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 0),
        Part("sweep", [*sweep, "--seconds", str(SLICES["sweep"] - 15)], 0),  # the rest is its start
        Part("tests", tests, 0),
        Part(
            "sanitizer", [sanitizer or "", "--error-exitcode", "1", *small], 0,
            _missing(sanitizer, "compute-sanitizer"),
        ),
        *(Part(name, command, 0) for name, command in benches),
        Part(
            "ncu",
            [ncu or "", "--csv", "--metrics", ",".join(METRICS), "-k", KERNELS, "-c", "8", *small]
            + ["--target"],
            0,
            _missing(ncu, "ncu"),
        ),
    ]  # fmt: skip
    return [Part(p.name, p.command, SLICES.get(p.name, OTHER), p.missing) for p in listed]


def find_tool(name: str) -> str | None:
    """Path of one of the CUDA toolkit's programs."""
    found = shutil.which(name)
    return found or next((str(folder / name) for folder in CUDA_TOOLS if (folder / name).is_file()), None)


def _missing(path: str | None, name: str) -> str:
    return "" if path else f"{name} is not installed (it comes with the CUDA toolkit)"


def select(all_parts: Sequence[Part], only: Sequence[str] | None, passed: set[str]) -> list[Part]:
    """The parts to run: those named, else those that have not passed."""
    if only:
        return [part for part in all_parts if part.name in only]
    return [part for part in all_parts if part.name not in passed]


def limit(part: Part, later: Sequence[Part], time_left: float) -> float:
    """Seconds for `part`: its share of what is left, by the slices of it and of those after it.

    So what a part leaves is shared by those after it, and what a build overruns is taken from them all. No
    part gets more than three times its slice: it has hung, and the rest should not pay for it.
    """
    share = time_left * part.slice / (part.slice + sum(other.slice for other in later))
    return min(share, 3 * part.slice)


def run_part(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run one part in its own process group, killed whole at its limit: status, seconds, the last lines."""
    result: dict[str, Any] = dict(seconds=0.0, command=" ".join(part.command[1:]), tail=[])
    if part.missing:
        return result | dict(status=f"not run: {part.missing}")
    if seconds < LEAST:
        return result | dict(status="not started: the budget is spent")
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            status = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").splitlines()
    result |= dict(status=status, seconds=round(time.monotonic() - start, 1))
    result["tail"] = lines[-40:] if status != "passed" else lines[-3:]
    return result


def harvest(part: Part, folder: Path) -> dict[str, Any]:
    """What a part measured: rows of a benchmark, a sweep's result, the profiler's counters."""
    measured, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    if part.name == "ncu":
        return dict(counters=counters(log.read_text(errors="replace"))) if log.is_file() else {}
    if not measured.is_file():  # a part stopped at its limit keeps the cases it finished
        return {}
    content = json.loads(measured.read_text())
    return dict(sweep=content) if part.name == "sweep" else dict(rows=content["rows"])


def counters(log: str) -> list[dict[str, Any]]:
    """Launches as {kernel, metric: "value unit"} from the profiler's CSV, whatever is printed around it."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        launch = launches.setdefault(
            row["ID"], dict(kernel=row["Kernel Name"], grid=row.get("Grid Size", ""))
        )
        launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def earlier(out: Path, slug: str, commit: str) -> Path | None:
    """The newest report of this GPU and commit."""
    found = []
    for path in sorted(out.glob(f"{slug}-*.json"), key=lambda path: path.stat().st_mtime):
        content = json.loads(path.read_text())
        if content.get("parts") and content["machine"]["commit"] == commit:
            found.append(path)
    return found[-1] if found else None


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.render import gpu_page

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="only what has not passed at this commit")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_report: no GPU that torch can see; nothing was run and nothing written", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.budget
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    old = earlier(options.out, slug, machine["commit"]) if options.only or options.resume else None
    target = old.with_suffix("") if old else options.out / f"{slug}-{time.strftime('%Y-%m-%d')}"
    results: dict[str, Any] = json.loads(old.read_text())["parts"] if old else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        passed = {name for name, result in results.items() if result["status"] == "passed"}
        chosen = select(parts(folder), options.only, passed)
        for place, part in enumerate(chosen):
            print(f"{part.name} ...", end=" ", flush=True)
            seconds = limit(part, chosen[place + 1 :], deadline - time.monotonic())
            result = run_part(part, seconds, folder / f"{part.name}.log")
            results[part.name] = result | harvest(part, folder)
            print(f"{result['status']}, {result['seconds']} s", flush=True)
            write_json(target.with_suffix(".json"), dict(machine=machine, parts=results))
            write_text(target.with_suffix(".md"), gpu_page(dict(machine=machine, parts=results)))
    print(f"written: {target}.json and .md; `python -m benchmarks.render` puts them into the results' README")
    return 0 if all(part["status"] == "passed" for part in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
