"""GPU evidence in one command: `python -m benchmarks.gpu_report [--out DIR] [--only PART ...] [--resume]`.

Builds the extension, runs every op once, sweeps the Triton head's tiles (the winner becomes the default that
everything after it uses), runs the tests and compute-sanitizer, times every benchmark and the heads of the
models (benchmarks/gpu/model_heads.py: of a full run's shapes each model and size once), and reads the
profiler's counters of the two main kernels. Each part is a process of its own with its own slice of the
budget, so that one that fails or hangs loses nothing of the others; time that a part leaves is shared by
those after it. A part keeps what it measured until it was stopped, and one that measured nothing has failed.

--wheels DIR first installs the peers (the extra `bench`) from wheels in DIR, without a network: make them
with `pip download -d DIR '.[bench]'` elsewhere.

After every part DIR/<gpu>-<date>.json and .md are rewritten. --only runs some parts again and --resume those
that have not passed; both go on in the newest report of this GPU and commit. Exits 0 if every part passed, 1
if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import MODULES, write_json, write_text
from benchmarks.suite.machine import ROOT, describe
from benchmarks.suite.tables import is_ours

BUDGET = 535.0  # seconds of everything
LEAST = 5.0  # seconds a part is still started with
START = 8  # seconds until a process has imported torch and Triton and sees the GPU, estimated
# seconds of each part out of the budget; estimated, no GPU has run them yet
SLICES = dict(
    wheels=10, build=36, small=20, sweep=54, tests=80, sanitizer=26, bench_linear_logprobs=32, model_heads=60,
    bench_linear_candidates=18, bench_linear_logprobs_partial=10, bench_linear_distrl_loss=24,
    bench_sequences=28, bench_reward_step=18, bench_distrl_step=22, bench_policy_step=28, bench_scaling=28,
    ncu_tensor=14, ncu=24,
)  # fmt: skip
# one process for the ops that take no longer than its start; the one with a target first
SEQUENCE_OPS = (
    "prefix_value_loss",
    "segment_scan",
    "prefix_values",
    "clipped_surrogate",
    "distrl_loss",
    "advantages",
)
WORKERS = 8  # of the tests
TESTED = ("triton-cuda", "cuda-cuda")  # implementation and device that some test must have passed on
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
KERNELS = ("_head_stats_kernel", "_head_dz_kernel")
# Sections, which every version of the profiler has: one unknown name among metrics fails the whole run. So
# the metric that no section's summary has, cycles of the tensor cores (instructions say little of wgmma),
# is a part of its own.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
LAUNCHES = 6  # that are profiled: one _head_stats_kernel, then the backward's _head_dz_kernel
CUDA_TOOLS = (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    slice: float  # seconds, see SLICES
    missing: str = ""  # why it cannot run here
    env: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
    needed: bool = False  # by the parts after it: not held to its share of the time


def parts(folder: Path) -> list[Part]:
    """Every part in its order; what it measures lands in folder/<name>.json."""
    python = sys.executable
    small = [python, "-m", "benchmarks.gpu.small"]
    sweep = [python, "-m", "benchmarks.gpu.sweep", "--write", "--json", str(folder / "sweep.json")]
    sanitizer, ncu = find_tool("compute-sanitizer"), find_tool("ncu")
    profile = [ncu or "", "--csv", "-k", f"regex:{'|'.join(KERNELS)}", "-c", str(LAUNCHES)]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    no_sanitizer, no_ncu = _missing(sanitizer, "compute-sanitizer"), _missing(ncu, "ncu")

    def bench(name: str, *ops: str, quick: bool) -> Part:
        command = [python, "-m", "benchmarks.run", "--device", "cuda", "--op", *ops]
        return Part(name, [*command, *(["--quick"] if quick else []), *_to(folder, name)], 0)

    head = [name for name in MODULES if name.startswith("linear_")]
    steps = [name for name in MODULES if name.endswith("_step")]
    listed = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 0, needed=True),
        Part("small", small, 0),  # compiles what the sanitizer would slow down
        Part("sweep", [*sweep, "--seconds", str(SLICES["sweep"] - START)], 0),
        tests_part(),
        # an allocation of its own for each tensor: an overrun within a cached block is none to the sanitizer
        Part(
            "sanitizer", [sanitizer or "", "--error-exitcode", "1", *small], 0, no_sanitizer,
            env=dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        ),
        bench("bench_linear_logprobs", "linear_logprobs", quick=True),  # quick: D = 1024
        Part("model_heads", [python, "-m", "benchmarks.gpu.model_heads", *_to(folder, "model_heads")], 0),
        *(bench(f"bench_{name}", name, quick=True) for name in head if name != "linear_logprobs"),
        bench("bench_sequences", *SEQUENCE_OPS, quick=False),
        *(bench(f"bench_{name}", name, quick=False) for name in steps),
        bench("bench_scaling", "scaling", quick=True),  # all its points, less time on each
        Part("ncu_tensor", [*profile, "--metrics", f"{TENSOR},gpu__time_duration.sum", *small, "--target"], 0,
             no_ncu),
        Part("ncu", [*profile, *sections, *small, "--target"], 0, no_ncu),
    ]  # fmt: skip
    return [replace(part, slice=SLICES[part.name]) for part in listed]


def _to(folder: Path, name: str) -> list[str]:
    return ["--json", str(folder / f"{name}.json")]


def tests_part() -> Part:
    """The kernels' tests on the GPU, side by side where pytest-xdist is installed.

    A line for each test, so that counts are there whenever it is stopped.
    """
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-v", "-p", "no:cacheprovider"]
    command += ["-k", "cuda and not compile_without"]
    env = dict(COLUMNS="400")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
        threads = max(1, (os.cpu_count() or WORKERS) // WORKERS)
        env |= dict(OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_COMPILE_THREADS="1")
    return Part("tests", command, 0, env=env)


def wheels_part(folder: Path) -> Part:
    """Install every wheel in `folder` with what it needs from there."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(folder), *wheels]
    missing = "" if wheels else f"no wheels in {folder}"
    return Part("wheels", command, SLICES["wheels"], missing)


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

    So what a part leaves is shared by those after it. No part gets more than three times its slice: it has
    hung, and the rest should not pay for it. One that the rest needs gets that much at once: what it overruns
    is taken from them all.
    """
    share = time_left * part.slice / (part.slice + sum(other.slice for other in later))
    return min(time_left if part.needed else share, 3 * part.slice)


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
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.env},
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
    """What a part measured, also one that was stopped: rows, a sweep, counts of tests, counters."""
    measured, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    if part.name in ("ncu", "ncu_tensor"):
        return dict(counters=counters(log.read_text(errors="replace"))) if log.is_file() else {}
    if part.name == "tests":
        return dict(tests=outcomes(log.read_text(errors="replace"))) if log.is_file() else {}
    if not measured.is_file():
        return {}
    content = json.loads(measured.read_text())
    return dict(sweep=content) if part.name == "sweep" else dict(rows=content["rows"])


def nothing_measured(part: Part, found: Mapping[str, Any], log: str) -> str:
    """Why a part whose process succeeded has not done what it is for, or ""."""
    if part.name == "build":
        return next((x for x in log.splitlines() if x.startswith("ipvrm:") and re.search(r"\boff\b", x)), "")
    if part.name in ("small", "sanitizer") and "\ndone" not in f"\n{log}":
        return "the ops did not run to their end"
    if part.name == "sanitizer":
        return "" if "ERROR SUMMARY: 0 errors" in log else "the tool gave no summary without errors"
    if part.name == "tests":
        passed = {impl: counts.get("PASSED", 0) for impl, counts in found["tests"]["counts"].items()}
        lacking = [impl for impl in TESTED if not passed.get(impl)]
        return f"no test passed for {', '.join(lacking)}" if lacking else ""
    if part.name in ("ncu", "ncu_tensor"):
        seen = " ".join(launch["kernel"] for launch in found["counters"] if len(launch) > 2)
        lacking = [kernel for kernel in KERNELS if kernel not in seen]
        told = next((line for line in log.splitlines() if line.startswith("==ERROR==")), "")
        return f"no counters of {', '.join(lacking)} {told}".strip() if lacking else ""
    if part.name == "sweep":
        return "" if found.get("sweep", {}).get("winner_ms") else "no configuration was timed"
    if part.name.startswith("bench_") or part.name == "model_heads":
        all_ours = part.name == "bench_policy_step"  # this package with and without what it adds
        rows = [row for row in found.get("rows", ()) if all_ours or is_ours(row["contender"])]
        timed = [row for row in rows if not row["error"]]
        return "" if timed else "no row of ours was timed"
    return ""


def outcomes(log: str) -> dict[str, Any]:
    """Counts of `pytest -v` by implementation and device, and the tests that failed."""
    plain = re.compile(rf"^(\S+::.*?) ({OUTCOMES})(?: \(.*\))?\s+\[ *\d+%\]$")
    distributed = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+::.*)$")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failed = []
    for line in log.splitlines():
        if match := plain.match(line.rstrip()):
            test, outcome = match[1], match[2]
        elif match := distributed.match(line.rstrip()):
            test, outcome = match[2], match[1]
        else:
            continue
        backend = re.search(r"\b(triton|cuda|cpp|torch)-cuda\b", test)
        counts[backend[0] if backend else "other"][outcome] += 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(test)
    return dict(counts={impl: dict(of) for impl, of in counts.items()}, failed=failed)


def run_and_read(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """`run_part` with what was measured; a process that succeeds without measuring has failed."""
    log = folder / f"{part.name}.log"
    result = run_part(part, seconds, log)
    found = harvest(part, folder)
    if result["status"] == "passed":
        text = log.read_text(errors="replace")
        reason = nothing_measured(part, found, text)
        if reason:
            result |= dict(status=f"failed: {reason}", tail=text.splitlines()[-40:])
    return result | found


def counters(log: str) -> list[dict[str, Any]]:
    """Launches as {kernel, metric: "value unit"} from the profiler's CSV, whatever is printed around it.

    Rows of a section's advice have no metric.
    """
    lines = log.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        if None in row.values():  # a line of something else
            continue
        launch = launches.setdefault(
            row["ID"], dict(kernel=row["Kernel Name"], grid=row.get("Grid Size", ""))
        )
        if row["Metric Name"]:
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
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install the peers from wheels in DIR")
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="only what has not passed at this commit")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_report: no GPU that torch can see; nothing was run and nothing written", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.budget
    installed = {}
    if options.wheels:  # before anything that asks what is installed
        with tempfile.TemporaryDirectory() as temporary:
            part = wheels_part(options.wheels.resolve())
            installed = {part.name: run_and_read(part, 3 * part.slice, Path(temporary))}
        print(f"{part.name}: {installed[part.name]['status']}", flush=True)
        importlib.invalidate_caches()
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    old = earlier(options.out, slug, machine["commit"]) if options.only or options.resume else None
    target = old.with_suffix("") if old else options.out / f"{slug}-{time.strftime('%Y-%m-%d')}"
    results: dict[str, Any] = (json.loads(old.read_text())["parts"] if old else {}) | installed
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        passed = {name for name, result in results.items() if result["status"] == "passed"}
        chosen = select(parts(folder), options.only, passed)
        for place, part in enumerate(chosen):
            print(f"{part.name} ...", end=" ", flush=True)
            seconds = limit(part, chosen[place + 1 :], deadline - time.monotonic())
            result = run_and_read(part, seconds, folder)
            results[part.name] = result
            print(f"{result['status']}, {result['seconds']} s", flush=True)
            write_json(target.with_suffix(".json"), dict(machine=machine, parts=results))
            write_text(target.with_suffix(".md"), gpu_page(dict(machine=machine, parts=results)))
    print(f"written: {target}.json and .md; `python -m benchmarks.render` puts them into the results' README")
    return 0 if all(part["status"] == "passed" for part in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
