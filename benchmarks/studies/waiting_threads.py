"""What OpenMP's threads should do while they wait for each other: spin, or sleep.

PyTorch's threads (GNU OpenMP's, on Linux) spin at the end of every parallel region, some milliseconds unless
told otherwise. Alone on a machine that saves waking them; where other processes want the cores, a thread
spins while the one it waits for is not running. Each setting in processes of its own, in turns, alone (as far
as the machine is) and beside as many busy processes as it has cores: wall and CPU time of a training step at
the scale of `ipvrm demo`, whose regions are short, and of one with D=512, V=32,000.

    python -m benchmarks.studies.waiting_threads --out benchmarks/results/waiting_threads-KIND.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1000, 10_000)},
}
STEPS = {"demo": 12, "D=512 V=32000": 2}


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
    """Prints milliseconds a step: wall, CPU."""
    run = step(scale)
    run()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS[scale]):
        run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([1e3 * wall / STEPS[scale], 1e3 * cpu / STEPS[scale]]))


def measured(scale: str, setting: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) of a fresh process."""
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "benchmarks.studies.waiting_threads", "--worker", scale]
    done = subprocess.run(command, env=unset | setting, capture_output=True, text=True, check=True)
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    if not options.out:
        parser.error("--out is needed")
    from benchmarks.suite.machine import describe
    from ipvrm.run_folder import write_json

    machine, rows = describe(), []
    for beside in (0, os.cpu_count() or 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            for scale in STEPS:
                times: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
                for _ in range(options.rounds):
                    for name, setting in SETTINGS.items():
                        times[name].append(measured(scale, setting))
                for name, found in times.items():
                    wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
                    rows.append(dict(busy=beside, scale=scale, setting=name, wall_ms=wall, cpu_ms=cpu))
                    rows[-1]["rounds_ms"] = [wall for wall, _ in found]
                    print(
                        f"{beside} busy  {scale:<14} {name:<24} {wall:9.1f} ms, {cpu:9.1f} of CPU", flush=True
                    )
                write_json(options.out, {"machine": machine, "times": rows})
        finally:
            for process in busy:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
