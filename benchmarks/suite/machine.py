"""What a result was measured on: device, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
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


def describe() -> dict[str, Any]:
    """The header every results file starts with."""
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        command=command(),
        commit=os.environ.get(COMMIT) or _git("rev-parse", "--short=12", "HEAD"),
        modified=bool(_git("status", "--porcelain", "--untracked-files=no")),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        cpu=processor_name(),
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
