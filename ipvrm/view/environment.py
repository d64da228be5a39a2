"""`ipvrm env`: what a bug report needs: versions, devices, backends, OpenMP runtimes; and whether the ops are
right here (`--check`)."""

import argparse
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipvrm.errors import IpvrmError
from ipvrm.integrations.verl import plugin_state
from ipvrm.run_folder import installed_version, versions

if TYPE_CHECKING:
    from ipvrm_kernels.check import Head

MORE_PACKAGES = ("triton", "pyarrow", "tyro", "rich", "peft", "trl", "verl", "math-verify", "matplotlib")
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
    if installed_version("verl") != "absent":  # which hides why it does not load a plugin
        lines.append(f"verl        {plugin_state()}")
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


def head_of(model: str) -> "Head":
    """Sizes and softcap of the head of a model, a folder or a Hub name, from its configuration alone.

    Raises:
        IpvrmError: neither a folder nor a model that the Hub gives, or sizes that no key of it names.
    """
    from transformers import AutoConfig

    from ipvrm.models.causal_lm import SAFE
    from ipvrm_kernels.check import Head

    try:
        config = AutoConfig.from_pretrained(model, **SAFE).get_text_config()
        return Head(config.hidden_size, config.vocab_size, getattr(config, "final_logit_softcapping", None))
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IpvrmError(f"--model {model}: no configuration with the head's sizes: {reason}") from error


def main(arguments: Sequence[str]) -> int:
    """Console entry. Returns 0, 1 if --check finds an op that is wrong, 2 for a flag it does not know."""
    from ipvrm_kernels import check

    parser = argparse.ArgumentParser(prog="ipvrm env", description=check.__doc__.partition("\n\n")[2])
    parser.add_argument("--check", action="store_true", help="run every op here against fp64: about a minute")
    check.add_flags(parser, "a model's folder or Hub name, for the size of its head")
    try:
        options = parser.parse_args(arguments)
        if not options.check and len(arguments):
            parser.error("the other flags are those of --check")
    except SystemExit as ended:
        return int(ended.code or 0)
    if not options.check:
        print(report())
        return 0
    head = head_of(options.model) if options.model else options.shape
    return check.run(head, options.device, options.json)
