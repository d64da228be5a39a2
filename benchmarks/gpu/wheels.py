"""The peers from wheels in a folder, without a network, by exact names and nothing that they depend on.

What the machine has of torch, triton and NVIDIA's packages is what the run is about: no wheel replaces it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.process import Part

# distributions that are installed if a wheel of theirs is there; make the folder with
# `pip download --no-deps -d DIR NAME==VERSION ...`. With what they need themselves, but for what torch brings
NAMES = (
    "liger-kernel", "cut-cross-entropy", "trl", "quack-kernels", "transformers", "accelerate", "tokenizers",
    "safetensors", "huggingface-hub", "datasets", "pytest", "pluggy", "iniconfig", "pytest-xdist", "execnet",
    "pytest-benchmark", "py-cpuinfo2", "hypothesis", "sortedcontainers", "rich", "pygments", "markdown-it-py",
    "mdurl", "pybind11", "tyro", "typeguard", "docstring-parser", "pyyaml", "packaging", "psutil", "regex",
    "tqdm", "hf-xet", "click", "typer", "shellingham", "annotated-doc", "pydantic", "pydantic-core",
    "annotated-types", "typing-inspection", "httpx2", "httpcore2", "h11", "anyio", "idna", "truststore",
    "dill", "multiprocess", "pandas", "pyarrow", "python-dateutil", "tzdata", "xxhash",
)  # fmt: skip


def distribution(wheel: Path) -> str:
    """The normalised name of the distribution in a wheel's file name."""
    return wheel.name.partition("-")[0].replace("_", "-").replace(".", "-").lower()


def chosen(folder: Path) -> tuple[list[Path], list[Path]]:
    """(wheels to install, wheels to leave alone) of `folder`."""
    wheels = sorted(folder.glob("*.whl"))
    return [w for w in wheels if distribution(w) in NAMES], [
        w for w in wheels if distribution(w) not in NAMES
    ]


def wheels_part(folder: Path, seconds: float) -> Part:
    """Install the wheels of NAMES in `folder`, each by its file."""
    taken, _ = chosen(folder)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *map(str, taken)]
    return Part("wheels", command, seconds, "" if taken else f"no wheel of {', '.join(NAMES)} in {folder}")
