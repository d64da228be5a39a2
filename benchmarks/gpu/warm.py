"""Compile before anything is timed: `python -m benchmarks.gpu.warm [--seconds S]`.

The headline's configurations and the Gluon study, a process for each, beside every op once at a small shape
in this one. What is not compiled in time is compiled where it is used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.gpu import headline, small
from benchmarks.gpu.process import exit_codes
from benchmarks.suite.machine import ROOT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="until what still compiles is left")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    count = headline.num_compiled()
    command = [sys.executable, "-m", "benchmarks.gpu.headline", "--compile"]
    compiling = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(count)]
    code = 1
    try:
        code = small.main([])
    finally:
        ready = exit_codes(compiling, deadline).count(0)
    print(f"{ready} of {count} configurations compiled")
    print("done")
    return code


if __name__ == "__main__":
    sys.exit(main())
