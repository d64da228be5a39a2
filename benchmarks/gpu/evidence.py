"""What a part of the GPU report measured, from its JSON and its log, and whether that is what it is for."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import Part
from benchmarks.suite.measure import is_ours

OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
KERNELS = ("_head_stats_kernel", "_head_dz_kernel")
# implementation and device that some test must have passed on
TESTED = dict(tests=("triton-cuda", "cuda-cuda"), wrong_tile=("triton-cuda",))
CLEAN = dict(memcheck="ERROR SUMMARY: 0 errors", racecheck="RACECHECK SUMMARY: 0 hazards displayed")


def harvest(part: Part, folder: Path) -> dict[str, Any]:
    """What a part measured, also one that was stopped: rows, a sweep, counts of tests, counters, verdicts."""
    measured, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    if part.name in ("ncu", "ncu_tensor"):
        return dict(counters=counters(text))
    if part.name in TESTED:
        return dict(tests=outcomes(text))
    if part.name == "correct":
        return dict(check=verdicts(text))
    if not measured.is_file():
        return {}
    content = json.loads(measured.read_text())
    if part.name == "sweep":
        return dict(sweep=content)
    return {key: content[key] for key in ("rows", "kernels") if key in content}


def nothing_measured(part: Part, found: Mapping[str, Any], log: str) -> str:
    """Why a part whose process succeeded has not done what it is for, or ""."""
    if part.name == "build":
        return next((x for x in log.splitlines() if x.startswith("ipvrm:") and re.search(r"\boff\b", x)), "")
    if part.name in ("warm", *CLEAN) and "\ndone" not in f"\n{log}":
        return "the ops did not run to their end"
    if part.name in CLEAN:
        return "" if CLEAN[part.name] in log else "the tool gave no summary without errors"
    if part.name in TESTED:
        passed = {impl: counts.get("PASSED", 0) for impl, counts in found["tests"]["counts"].items()}
        lacking = [impl for impl in TESTED[part.name] if not passed.get(impl)]
        return f"no test passed for {', '.join(lacking)}" if lacking else ""
    if part.name in ("ncu", "ncu_tensor"):
        seen = " ".join(launch["kernel"] for launch in found["counters"] if len(launch) > 2)
        lacking = [kernel for kernel in KERNELS if kernel not in seen]
        told = next((line for line in log.splitlines() if line.startswith("==ERROR==")), "")
        return f"no counters of {', '.join(lacking)} {told}".strip() if lacking else ""
    if part.name == "correct":
        checked = (found["check"] or {}).get("results", [])
        return "" if any(one["device"] == "cuda" for one in checked) else "nothing was checked on the GPU"
    if part.name == "sweep":
        return "" if found.get("sweep", {}).get("winner_ms") else "no configuration was timed"
    if part.name.startswith("bench_") or part.name in ("model_heads", "headline"):
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


def verdicts(log: str) -> dict[str, Any] | None:
    """The JSON that `python -m ipvrm_kernels --json` prints on a line of its own, None without one."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:  # cut off
                return None
    return None


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
