"""GPU evidence in one command: `python -m benchmarks.gpu_report [--out DIR] [--only PART ...] [--resume]`.

Within 540 seconds, in the order of what a first run must bring home: everything compiled; the ops right, and
a wrong tile seen (`python -m ipvrm_kernels`, tests/kernels/test_wrong_tile.py); the forward pass against
cuBLAS with each configuration and every kernel beside its modelled time (benchmarks/gpu/headline.py); the
tests; the sweep, whose winner is the default of what comes after it; every benchmark and the heads of the
models; compute-sanitizer; the profiler's counters. --only runs some parts alone, in 120 seconds.

Each part is a process of its own with its own slice of the budget (benchmarks/gpu/process.py), so that one
that fails or hangs loses nothing of the others; time that a part leaves is shared by those after it. A part
keeps what it measured until it was stopped, and one that measured nothing has failed. After a part that
failed a probe asks whether the GPU still answers; if it does not, the report ends there. This process never
touches the GPU itself.

--wheels DIR first installs the peers (benchmarks/gpu/wheels.py) from wheels in DIR, without a network.
IPVRM_COMMIT names the commit of a tree that was copied without its history.

After every part DIR/<gpu>-<date>.json and .md are rewritten; DIR/logs has the full log of every part and what
it measured. --only and --resume (those that have not passed) go on in the newest report of this GPU and
commit. Exits 0 if every part passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.evidence import KERNELS, harvest, nothing_measured
from benchmarks.gpu.process import TAIL, Part, run_part
from benchmarks.gpu.wheels import chosen as chosen_wheels
from benchmarks.gpu.wheels import wheels_part
from benchmarks.run import MODULES
from benchmarks.suite.machine import ROOT, command, versions
from benchmarks.suite.session import write_json, write_text

BUDGET = 530.0  # seconds of everything; what is written and killed at its end takes less than ten more
ONLY_BUDGET = 112.0  # the same of --only, within 120
START = 8  # seconds until a process has imported torch and Triton and sees the GPU, estimated
# seconds of each part out of the budget; estimated, no GPU has run them yet
SLICES = dict(
    probe=12, wheels=8, build=32, warm=26, correct=22, wrong_tile=18, headline=46, tests=66, sweep=38,
    bench_linear_logprobs=26, model_heads=36, bench_linear_candidates=16, bench_linear_logprobs_partial=10,
    bench_linear_distrl_loss=20, bench_sequences=24, bench_reward_step=14, bench_distrl_step=15,
    bench_policy_step=17, bench_scaling=16, memcheck=20, racecheck=14, ncu_tensor=11, ncu=17,
)  # fmt: skip
PROBE_LIMIT = 25.0  # seconds
PROBES, REST = 2, 3.0  # after a part that failed: probes, and seconds of rest after each that failed
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
# those that call a kernel on the GPU; the emulation's build with sanitizers, of which a GPU shows nothing
GPU_TESTS = "cuda and not compile_without and not emulation and not dead_context"
CHECKED = (1024, 151_936)  # D, V of the check
# Sections, which every version of the profiler has: one unknown name among metrics fails the whole run. So
# the metric that no section's summary has, cycles of the tensor cores (instructions say little of wgmma),
# is a part of its own.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
LAUNCHES = 6  # that are profiled: one _head_stats_kernel, then the backward's _head_dz_kernel
CUDA_TOOLS = (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))


def parts(folder: Path) -> list[Part]:
    """Every part in its order; what it measures lands in folder/<name>.json."""
    python = sys.executable
    small = [python, "-m", "benchmarks.gpu.small"]
    sweep = [python, "-m", "benchmarks.gpu.sweep", "--write", "--json", str(folder / "sweep.json")]
    warm = [python, "-m", "benchmarks.gpu.warm", "--seconds", str(SLICES["warm"] - START)]
    shape = ",".join(map(str, CHECKED))
    sanitizer, ncu = find_tool("compute-sanitizer"), find_tool("ncu")
    sanitized = [sanitizer or "", "--error-exitcode", "1"]
    # clocks that the profiler does not lock: they are the ones that were timed
    profile = [ncu or "", "--clock-control", "none", "--csv", "-k", f"regex:{'|'.join(KERNELS)}"]
    profile += ["-c", str(LAUNCHES)]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    no_sanitizer, no_ncu = _missing(sanitizer, "compute-sanitizer"), _missing(ncu, "ncu")
    # an allocation of its own for each tensor: an overrun within a cached block is none to the sanitizer
    uncached = dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def measured(name: str, module: str, *flags: str) -> Part:
        command = [python, "-m", f"benchmarks.{module}", *flags, "--json", str(folder / f"{name}.json")]
        return Part(name, command, 0, goes_on=True)

    def bench(name: str, *ops: str, quick: bool) -> Part:
        flags = ["--device", "cuda", "--op", *ops, *(["--quick"] if quick else [])]
        return measured(name, "run", *flags)

    head = [name for name in MODULES if name.startswith("linear_")]
    steps = [name for name in MODULES if name.endswith("_step")]
    listed = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 0, needed=True),
        Part("warm", warm, 0),
        Part("correct", [python, "-m", "ipvrm_kernels", "--device", "cuda", "--shape", shape, "--json"], 0),
        tests_part("wrong_tile", "tests/kernels/test_wrong_tile.py", "triton-cuda", workers=0),
        measured("headline", "gpu.headline"),
        tests_part("tests", "tests/kernels", GPU_TESTS, workers=WORKERS),
        Part("sweep", [*sweep, "--seconds", str(SLICES["sweep"] - START)], 0),
        bench("bench_linear_logprobs", "linear_logprobs", "accuracy", quick=True),  # quick: D = 1024
        measured("model_heads", "gpu.model_heads"),
        *(bench(f"bench_{name}", name, quick=True) for name in head if name != "linear_logprobs"),
        bench("bench_sequences", *SEQUENCE_OPS, quick=False),
        *(bench(f"bench_{name}", name, quick=False) for name in steps),
        bench("bench_scaling", "scaling", quick=True),  # all its points, less time on each
        Part("memcheck", [*sanitized, "--tool", "memcheck", *small], 0, no_sanitizer, env=uncached),
        Part("racecheck", [*sanitized, "--tool", "racecheck", *small, "--sequences"], 0, no_sanitizer),
        Part("ncu_tensor", [*profile, "--metrics", f"{TENSOR},gpu__time_duration.sum", *small, "--target"], 0,
             no_ncu),
        Part("ncu", [*profile, *sections, *small, "--target"], 0, no_ncu),
    ]  # fmt: skip
    return [replace(part, slice=SLICES[part.name]) for part in listed]


def tests_part(name: str, path: str, expression: str, workers: int) -> Part:
    """Tests on the GPU, side by side where that is asked and pytest-xdist is installed.

    A line for each test, so that counts are there whenever it is stopped.
    """
    command = [sys.executable, "-m", "pytest", path, "-v", "-p", "no:cacheprovider", "-k", expression]
    env = dict(COLUMNS="400")
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
        threads = max(1, (os.cpu_count() or workers) // workers)
        env |= dict(OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_COMPILE_THREADS="1")
    missing = "" if importlib.util.find_spec("pytest") else "pytest is not installed: pip install pytest"
    return Part(name, command, 0, missing, env=env)


def probe_part(json_file: Path) -> Part:
    """Whether the GPU answers, and what machine this is."""
    command = [sys.executable, "-m", "benchmarks.gpu.probe", "--json", str(json_file)]
    return Part("probe", command, SLICES["probe"])


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


def run_and_read(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """`run_part` with what was measured; a process that succeeds without measuring has failed."""
    log = folder / f"{part.name}.log"
    (folder / f"{part.name}.json").unlink(missing_ok=True)  # of an earlier run
    result = run_part(part, seconds, log)
    found = harvest(part, folder) if log.is_file() else {}
    if result["status"] == "passed":
        text = log.read_text(errors="replace")
        reason = nothing_measured(part, found, text)
        if reason:
            result |= dict(status=f"failed: {reason}", tail=text.splitlines()[-TAIL:])
    return result | found


def earlier(out: Path, slug: str, commit: str) -> Path | None:
    """The newest report of this GPU and commit."""
    found = []
    for path in sorted(out.glob(f"{slug}-*.json"), key=lambda path: path.stat().st_mtime):
        content = json.loads(path.read_text())
        if content.get("parts") and content["machine"]["commit"] == commit:
            found.append(path)
    return found[-1] if found else None


def first_probe(seconds: float, out: Path) -> dict[str, Any] | None:
    """The machine, as the probe's process saw it; None, with the reason printed, if no GPU answers."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "machine.json", Path(folder) / "probe.log"
        result = run_part(probe_part(file), seconds, log)
        if result["status"] == "passed" and file.is_file():
            return json.loads(file.read_text())
        if result["status"] != "failed (exit 2)":  # a GPU that does not answer: keep what it said
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, out / "probe.log")
    said = "; ".join(result["tail"][-3:])
    print(f"gpu_report: no GPU to run on ({result['status']}: {said}); nothing was measured", file=sys.stderr)
    return None


def age() -> float:
    """Seconds since this process was started: importing torch may take several."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str] | None = None, spent: float = 0.0) -> int:
    """spent: seconds of the budget that are gone already."""
    from benchmarks.render import gpu_page

    start = time.monotonic() - spent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument(
        "--budget", type=float, metavar="S",
        help=f"seconds for everything (default: {BUDGET:.0f}, with --only {ONLY_BUDGET:.0f})",
    )  # fmt: skip
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install the peers from wheels in DIR")
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="only what has not passed at this commit")
    options = parser.parse_args(arguments)
    deadline = start + (options.budget or (ONLY_BUDGET if options.only else BUDGET))
    out, logs = options.out.resolve(), options.out.resolve() / "logs"

    def time_left() -> float:
        return deadline - time.monotonic()

    machine = first_probe(min(PROBE_LIMIT, time_left()), out)
    if machine is None:
        return 2
    results: dict[str, Any] = {}
    if options.wheels:  # before anything that asks what is installed
        part = wheels_part(options.wheels.resolve(), SLICES["wheels"])
        logs.mkdir(parents=True, exist_ok=True)
        results[part.name] = run_and_read(part, min(3 * part.slice, time_left()), logs)
        results[part.name]["left_alone"] = [path.name for path in chosen_wheels(options.wheels)[1]]
        print(f"{part.name}: {results[part.name]['status']}", flush=True)
        importlib.invalidate_caches()
    machine |= dict(command=command(), versions=versions())
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    old = earlier(out, slug, machine["commit"]) if options.only or options.resume else None
    target = old.with_suffix("") if old else out / f"{slug}-{time.strftime('%Y-%m-%d')}"
    results = (json.loads(old.read_text())["parts"] if old else {}) | results
    logs.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        write_json(target.with_suffix(".json"), dict(machine=machine, parts=results))
        write_text(target.with_suffix(".md"), gpu_page(dict(machine=machine, parts=results)))

    passed = {name for name, result in results.items() if result["status"] == "passed"}
    chosen = select(parts(logs), options.only, passed)
    for place, part in enumerate(chosen):
        print(f"{part.name} ...", end=" ", flush=True)
        result = run_and_read(part, limit(part, chosen[place + 1 :], time_left()), logs)
        results[part.name] = result
        print(f"{result['status']}, {result['seconds']} s", flush=True)
        keep()
        if not result["status"].startswith(("passed", "not ")):  # it ran; perhaps for less than 0.05 s
            result["probe"] = answers(logs, deadline)
            if not result["probe"].startswith(("passed", "not started")):
                reason = f"the GPU does not answer after {part.name}"
                print(f"gpu_report: {reason}: {result['probe']}", file=sys.stderr)
                gone = dict(status=f"not started: {reason}", seconds=0.0)
                results |= {other.name: dict(gone, tail=[]) for other in chosen[place + 1 :]}
                keep()
                break
            keep()
    print(f"written: {target}.json and .md; `python -m benchmarks.render` puts them into the results' README")
    return 0 if all(part["status"] == "passed" for part in results.values()) else 1


def answers(logs: Path, deadline: float) -> str:
    """The status of the probe; of a second one, after some rest, if the GPU first has to recover."""
    status = "not started: the budget is spent"
    for attempt in range(PROBES):
        seconds = min(PROBE_LIMIT, deadline - time.monotonic())
        found = run_part(probe_part(logs / "probe.json"), seconds, logs / f"probe-{attempt}.log")["status"]
        if found.startswith("not started"):
            break
        status = found
        if status == "passed":
            break
        time.sleep(REST)
    return status


if __name__ == "__main__":
    sys.exit(main(spent=age()))
