"""What OpenMP's threads should do while they wait for each other: spin, or sleep.

PyTorch's threads (GNU OpenMP's, on Linux) spin at the end of every parallel region, some milliseconds unless
told otherwise. Alone on a machine that saves waking them; where other processes want the cores, a thread
spins while the one it waits for is not running. A process for each setting, in turns and sleeping between
them, alone (as far as the machine is) and beside as many busy processes as it has cores: wall and CPU time of
a training step at the scale of `ipvrm demo`, whose regions are short, and of one with D=512, V=32,000.

    python -m benchmarks.studies.waiting_threads --out benchmarks/results/waiting_threads-KIND.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1000, 10_000)},
}
STEPS = {"demo": 4, "D=512 V=32000": 2}


def step(scale: str) -> Any:
    """A call that takes one reward-model step."""
    import torch

    from benchmarks.bench_policy_step import demo_scale
    from benchmarks.suite.models import qwen3, ragged_batch
    from ipvrm.losses.objectives import ipvrm_loss
    from ipvrm.models.causal_lm import response_logprobs

    torch.manual_seed(0)
    if scale == "demo":
        model, _, batch = demo_scale()
    else:
        model = qwen3("cpu", quick=False)
        batch = ragged_batch("cpu", model.config.vocab_size, quick=False)
    reference = response_logprobs(model, batch).detach()
    parameters = list(model.parameters())

    def run() -> None:
        ratio = response_logprobs(model, batch) - reference
        torch.autograd.grad(ipvrm_loss(ratio, batch.cu_seqlens, batch.outcome)[0], parameters)

    return run


def worker(scale: str) -> None:
    """For each line of stdin prints milliseconds a step: wall, CPU."""
    run = step(scale)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(STEPS[scale]):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([1e3 * wall / STEPS[scale], 1e3 * cpu / STEPS[scale]]), flush=True)


def started(scale: str, setting: dict[str, str]) -> subprocess.Popen[str]:
    """A worker of a thread for each core."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    unset = {k: v for k, v in os.environ.items() if k not in ours}
    command = [sys.executable, "-m", "benchmarks.studies.waiting_threads", "--worker", scale]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=unset | setting, stdin=pipe, stdout=pipe, text=True)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with status {process.wait()}")
    return line


def measured(process: subprocess.Popen[str]) -> tuple[float, float]:
    """(wall, CPU) of its steps."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    wall, cpu = json.loads(answer(process))
    return wall, cpu


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scales", nargs="+", choices=STEPS, default=[*STEPS])
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    if not options.out:
        parser.error("--out is needed")
    from benchmarks.suite.machine import describe
    from ipvrm.run_folder import write_json

    machine, rows = describe() | {"threads": os.cpu_count()}, []  # of the workers
    for scale in options.scales:
        workers = {name: started(scale, setting) for name, setting in SETTINGS.items()}
        try:
            for process in workers.values():
                answer(process)
            for beside in (0, os.cpu_count() or 1):
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
                try:
                    rounds = [[measured(p) for p in workers.values()] for _ in range(options.rounds)]
                finally:
                    stop(busy)
                for name, found in zip(workers, zip(*rounds, strict=True), strict=True):
                    wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
                    rows.append(dict(busy=beside, scale=scale, setting=name, wall_ms=wall, cpu_ms=cpu))
                    rows[-1]["rounds_ms"] = [wall for wall, _ in found]
                    said = f"{beside} busy  {scale:<14} {name:<24} {wall:9.1f} ms, {cpu:9.1f} of CPU"
                    print(said, flush=True)
                write_json(options.out, {"machine": machine, "times": rows})
        finally:
            stop(workers.values())


def stop(processes: Iterable[subprocess.Popen[Any]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
