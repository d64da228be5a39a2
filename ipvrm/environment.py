"""`ipvrm env`: what a bug report needs: versions, devices, backends, OpenMP runtimes."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from ipvrm.run_folder import installed_version, versions

MORE_PACKAGES = ("triton", "pyarrow", "tyro", "rich", "peft", "trl", "math-verify", "matplotlib")
OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/ ]*)$")


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process (Linux; elsewhere none are found).

    Args:
        maps: contents of /proc/self/maps, read when None.
    """
    if maps is None:
        path = Path("/proc/self/maps")
        maps = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = (line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6)
    return sorted({path for path in found if OPENMP.search(path)})


def report() -> str:
    """The text of `ipvrm env`."""
    import torch

    import ipvrm_kernels

    lines = [
        f"platform    {platform.platform()}, {os.cpu_count()} CPUs, "
        f"torch uses {torch.get_num_threads()} threads"
    ]
    lines.append("device      " + _devices())
    found = versions() | {name: installed_version(name) for name in MORE_PACKAGES}
    lines.append("versions    " + ", ".join(f"{name} {version}" for name, version in found.items()))
    lines += ["", str(ipvrm_kernels.backends()), ""]
    lines.append(f"CPU matmuls {ipvrm_kernels.describe_cpu_matmul()}")
    runtimes = openmp_runtimes()
    lines.append("OpenMP      " + (", ".join(runtimes) or "no runtime found"))
    if len(runtimes) > 1:
        lines.append(
            "            WARNING: two runtimes in one process compete for the cores; reinstall ipvrm "
            "with the compiler whose runtime torch brings, or without (CXX=false pip install .)"
        )
    return "\n".join(lines)


def _devices() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return "CPU only" + (
            "" if torch.version.cuda is None else f" (torch for CUDA {torch.version.cuda}, no GPU found)"
        )
    count = torch.accelerator.device_count()
    if accelerator.type != "cuda":
        return f"{count} x {accelerator.type}"
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    return f"{count} x CUDA {torch.version.cuda}: " + ", ".join(names)


def main(arguments: Sequence[str]) -> int:
    """Console entry; takes no flags."""
    if arguments:
        known = set(arguments) <= {"-h", "--help"}
        print("usage: ipvrm env      (no flags)")
        return 0 if known else 2
    print(report())
    return 0
