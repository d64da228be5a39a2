"""What a result was measured on: device, versions, commit, command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ipvrm.run_folder import processor_name
from ipvrm_kernels.head import matmul

PACKAGES = (
    "ipvrm", "torch", "triton", "transformers", "numpy", "cut-cross-entropy", "liger-kernel", "trl",
    "quack-kernels",
)  # fmt: skip
COMMIT = "IPVRM_COMMIT"  # environment variable: of a tree that was copied without its history
ROOT = Path(__file__).resolve().parents[2]
# AMD's families: (last model, number of Zen), as the Linux kernel tells them apart
ZEN = {
    0x17: ((0x2F, "1"), (0xFF, "2")),
    0x19: ((0x0F, "3"), (0x1F, "4"), (0x5F, "3"), (0xFF, "4")),
    0x1A: ((0xFF, "5"),),
}


def describe() -> dict[str, Any]:
    """The header every results file starts with."""
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        command=command(),
        commit=os.environ.get(COMMIT) or _git("rev-parse", "--short=12", "HEAD"),
        modified=bool(_git("status", "--porcelain", "--untracked-files=no")),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        cpu=processor_name(),
        processor=processor(_cpuinfo()),
        simd=torch.backends.cpu.get_cpu_capability(),
        cpu_matmul=matmul.library(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 1),  # of the last minute, before anything was measured
        versions=versions(),
        cuda=torch.version.cuda,
    )


def command() -> str:
    """What this process was started with."""
    return "python " + " ".join(["-m", _module(), *sys.argv[1:]])


def versions() -> dict[str, str | None]:
    """Of PACKAGES, None where one is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def processor(info: Mapping[str, str]) -> str:
    """The kind of processor that /proc/cpuinfo describes: results of one kind stand in one file.

    A virtual machine may be called "AMD EPYC" whatever it is; the family and the model say which.
    """
    if not {"vendor_id", "cpu family", "model"} <= info.keys():
        return platform.machine()
    vendor = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(info["vendor_id"], info["vendor_id"])
    family, model = int(info["cpu family"]), int(info["model"])
    if vendor == "AMD" and family in ZEN:
        return f"AMD Zen {next(zen for last, zen in ZEN[family] if model <= last)}"
    return f"{vendor} family {family} model {model}"


def results_name(machine: Mapping[str, Any], device: str) -> str:
    """What the files of a run on "cpu" or "cuda" of this machine are called: device and kind of processor."""
    kind = machine["processor"] if device == "cpu" else machine["device"]
    return "-".join([device, *re.findall(r"[a-z0-9]+", kind.lower())])


def _cpuinfo() -> dict[str, str]:
    """Of the first core; {} where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
