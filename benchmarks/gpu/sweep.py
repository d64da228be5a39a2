"""Which tiles the Triton head should use on this GPU: `python -m benchmarks.gpu.sweep [--write] [--json F]`.

From the configuration in use, all neighbours (one field one step away) are compiled side by side, checked
against the first one's results and timed; the best becomes the next start, until none is better or the time
is over. --write puts a winner that gains at least GAIN into ipvrm_kernels/head/tuned.json, where the package
reads its defaults; --apply F does so from a report measured elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.run import write_json
from benchmarks.suite.heads import GPU_DEFAULT, MODELS, Shape, inputs
from benchmarks.suite.machine import ROOT, describe
from benchmarks.suite.measure import assert_close, once
from ipvrm_kernels import linear_candidates, linear_logprobs
from ipvrm_kernels.head.triton_tiles import CONFIGS, Config, tiles_of
from ipvrm_kernels.head.tuned import FILE

STEPS: dict[str, Sequence[int]] = dict(
    BLOCK_N=(64, 128, 256), BLOCK_V=(64, 128, 256), BLOCK_D=(32, 64, 128), num_warps=(4, 8),
    num_stages=(2, 3, 4, 5), programs_per_sm=(1, 2),
)  # fmt: skip
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes a block may use
OPERAND_BYTES = {"half": (2, 2), "master": (2, 4), "fp32": (4, 4)}  # of hidden and weight
ACCUMULATORS = 128  # fp32 registers of a tile a thread, beyond which the compiler spills
GAIN = 0.02  # a winner must be this much faster to become the default
ROUNDS = 7
COMPILE_ROWS = 256  # rows of the call that compiles: as divisible as the timed ones


def architecture() -> str:
    return tiles_of(torch.cuda.get_device_capability()[0])


def fits(config: Config, arch: str, kind: str) -> bool:
    """Whether tiles and pipeline stages can fit in shared memory and registers."""
    hidden, weight = OPERAND_BYTES[kind]
    stage = (config.BLOCK_N * hidden + config.BLOCK_V * weight) * config.BLOCK_D
    registers = config.BLOCK_N * config.BLOCK_V // (32 * config.num_warps)
    shared = stage * config.num_stages * config.programs_per_sm
    return shared <= SHARED_MEMORY[arch] and registers * config.programs_per_sm <= ACCUMULATORS


def neighbours(config: Config, arch: str, kind: str) -> list[Config]:
    """Configurations one step away in one field that can fit."""
    found = []
    for field, steps in STEPS.items():
        here = steps.index(getattr(config, field))
        for there in (here - 1, here + 1):
            if 0 <= there < len(steps):
                found.append(config._replace(**{field: steps[there]}))
    return [other for other in found if fits(other, arch, kind)]


def search(
    start: Config,
    near: Callable[[Config], list[Config]],
    prepare: Callable[[list[Config]], None],
    evaluate: Callable[[Config], float | None],
    time_left: Callable[[], float],
) -> dict[Config, float | None]:
    """Steepest descent from `start`: {configuration: milliseconds, or None if it cannot run}, in order tried.

    prepare compiles a round's configurations; a round is only begun while time_left() is positive, and cut
    short when it no longer is.
    """
    tried: dict[Config, float | None] = {start: evaluate(start)}
    best = start
    while time_left() > 0:
        fresh = [config for config in near(best) if config not in tried]
        if not fresh:
            break
        prepare(fresh)
        for config in fresh:
            if time_left() <= 0:
                break
            tried[config] = evaluate(config)
        leader = fastest(tried)
        if leader == best:
            break
        best = leader
    return tried


def fastest(tried: Mapping[Config, float | None]) -> Config:
    """The configuration with the least time; the first one tried if none could run."""
    timed = {config: ms for config, ms in tried.items() if ms is not None}
    return min(timed, key=lambda config: timed[config]) if timed else next(iter(tried))


class Trial:
    """Times one configuration on the ops that use it, after a check against the first one's results."""

    def __init__(self, key: tuple[str, str], shape: Shape) -> None:
        self.key = key
        self.hidden, self.weight, ids = inputs(shape, "cuda")
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.ids, self.upstream = ids, torch.randn(ids.shape, device="cuda")
        self.flush = torch.empty(64 * 2**20, device="cuda")
        self.expected: tuple[torch.Tensor, ...] | None = None

    def step(self) -> tuple[torch.Tensor, ...]:
        out = linear_logprobs(self.hidden, self.weight, self.ids, return_entropy=True, impl="triton")
        gradients = torch.autograd.grad(out.logprobs, (self.hidden, self.weight), self.upstream)
        return out.logprobs.detach(), *gradients

    def candidates(self) -> Any:
        return linear_candidates(self.hidden.detach(), self.weight.detach(), impl="triton")

    def __call__(self, config: Config) -> float | None:
        CONFIGS[self.key] = config
        try:
            self.candidates()
            results = self.step()
            if self.expected is None:
                self.expected = results
            for got, wanted in zip(results, self.expected, strict=True):
                assert_close(str(config), got.float(), wanted.float(), 2e-2)
            runs = (self.step, self.candidates)
            return sum(statistics.median(once(run, self.flush) for _ in range(ROUNDS)) for run in runs)
        except (RuntimeError, AssertionError, TritonError) as error:  # wrong, or more than the GPU has
            print(f"{config}: {type(error).__name__}: {error}", file=sys.stderr)
            return None


def compile_aside(configs: Sequence[Config], kind: str) -> None:
    """Fill Triton's cache, a process for each configuration; what fails here is reported when it is timed."""
    command = [sys.executable, "-m", "benchmarks.gpu.sweep", "--kind", kind, "--compile"]
    processes = [
        subprocess.Popen([*command, json.dumps(config._asdict())], cwd=ROOT, stderr=subprocess.DEVNULL)
        for config in configs
    ]
    for process in processes:
        process.wait()


def entry(sweep: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a report's sweep says should stand in tuned.json, or None if it gained less than GAIN."""
    start, winner = sweep["start_ms"], sweep["winner_ms"]
    if start is None or winner is None or winner > (1 - GAIN) * start:
        return None
    names = ("architecture", "kind", "device", "date", "commit", "shape", "start_ms", "winner_ms")
    return {**{name: sweep[name] for name in names}, "config": sweep["winner"]}


def write_tuned(new: dict[str, Any], file: Path = FILE) -> None:
    """Put an entry into the package's file, in the place of one for the same architecture and kind."""
    entries = json.loads(file.read_text())["configs"]
    kept = [e for e in entries if (e["architecture"], e["kind"]) != (new["architecture"], new["kind"])]
    key = lambda e: (e["architecture"], e["kind"])  # noqa: E731
    write_json(file, dict(configs=sorted([*kept, new], key=key)))


def report(key: tuple[str, str], shape: Shape, tried: Mapping[Config, float | None]) -> dict[str, Any]:
    """The sweep as JSON: every configuration tried, the first and the best."""
    machine, start, winner = describe(), next(iter(tried)), fastest(tried)
    return dict(
        architecture=key[0], kind=key[1], device=machine["device"], date=machine["date"],
        commit=machine["commit"], shape=str(shape), start=start._asdict(), start_ms=tried[start],
        winner=winner._asdict(), winner_ms=tried[winner],
        tried=[dict(config=config._asdict(), ms=ms) for config, ms in tried.items()],
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=tuple(OPERAND_BYTES), default="half")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--json", type=Path, metavar="F", help="write what was tried here")
    parser.add_argument("--write", action="store_true", help="make the winner the package's default")
    parser.add_argument("--apply", type=Path, metavar="F", help="make the winner of a GPU report the default")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.apply:
        new = entry(json.loads(options.apply.read_text())["parts"]["sweep"]["sweep"])
        if new is None:
            print("sweep: no gain in that report; nothing written")
        else:
            write_tuned(new)
            print(f"written: {FILE}")
        return 0
    if not torch.cuda.is_available():
        print("sweep: no GPU that torch can see; nothing was run and nothing written", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    name, N, ids = GPU_DEFAULT[0]
    dtype = torch.float32 if options.kind == "fp32" else torch.bfloat16
    shape = Shape(N, MODELS[name].D, MODELS[name].V, dtype, ids, name)
    key = (architecture(), options.kind)
    if options.compile:
        Trial(key, shape._replace(N=COMPILE_ROWS))(Config(**json.loads(options.compile)))
        return 0
    tried = search(
        CONFIGS[key], lambda c: neighbours(c, *key), lambda cs: compile_aside(cs, options.kind),
        Trial(key, shape), lambda: deadline - time.monotonic(),
    )  # fmt: skip
    result = report(key, shape, tried)
    for one in result["tried"]:
        print(f"{one['ms'] or 'cannot run':>12}  {one['config']}")
    new = entry(result)
    print(f"winner: {result['winner']}, {result['start_ms']} -> {result['winner_ms']} ms")
    if options.json:
        write_json(options.json, result)
    if options.write and new is not None:
        write_tuned(new)
        print(f"written: {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
