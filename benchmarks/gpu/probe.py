"""Does the GPU answer: `python -m benchmarks.gpu.probe [--json F]`. Exits 0 if it computes, 2 without one.

The report asks before its first part and after each one that failed, in a process of its own: a driver that
hangs takes this process and not the report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.suite.machine import describe
from benchmarks.suite.session import write_json

SIDE = 512
NO_GPU = 2  # exit status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="the machine, for the report")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can see")
        return NO_GPU
    x = torch.arange(SIDE * SIDE, device="cuda").view(SIDE, SIDE) % 7 - 3.0
    wrong = int((x @ x.T).cpu().ne(x.cpu() @ x.cpu().T).sum())  # sums of small integers: exact everywhere
    free, total = torch.cuda.mem_get_info()
    print(
        f"{torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {wrong} wrong"
    )
    if options.json and not wrong:
        write_json(options.json, describe())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
