"""Which tiles the Triton head should use on this GPU: `python -m benchmarks.gpu.sweep [--write] [--json F]`.

From the configuration in use, all neighbours (one field one step away) are compiled side by side, checked
against the first one's results and timed; the best becomes the next start, until none is better or the time
is over. The files are written after every configuration, so that a sweep that is killed keeps what it has.
Exits 1 if nothing could be timed. --write puts a winner that gains at least GAIN into
ipvrm_kernels/head/tuned.json, where the package reads its defaults; --apply F does so from a report measured
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
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
from benchmarks.suite.sequences import edges
from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs
from ipvrm_kernels.head import Transform, triton_tiles
from ipvrm_kernels.head.triton_tiles import CONFIGS, Config, tiles_of
from ipvrm_kernels.head.tuned import FILE

STEPS: dict[str, Sequence[int]] = dict(
    BLOCK_N=(64, 128, 256), BLOCK_V=(64, 128, 256), BLOCK_D=(16, 32, 64, 128), num_warps=(4, 8),
    num_stages=(2, 3, 4, 5), programs_per_sm=(1, 2),
)  # fmt: skip
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes a block may use
OPERAND_BYTES = {"half": (2, 2), "master": (2, 4), "fp32": (4, 4)}  # of hidden and weight
ACCUMULATORS = 128  # fp32 registers of a tile a thread, beyond which the compiler spills
GAIN = 0.02  # a winner must be this much faster to become the default
ROUNDS = 7
SOFTCAP = 30.0
RESERVE = 8.0  # seconds that compiling leaves for timing what it compiled
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


def choices(kernel: str, arch: str, kind: str) -> list[Config]:
    """The configuration that `kernel` uses, then those that come next to it: all kernels share one."""
    return [CONFIGS[arch, kind], *neighbours(CONFIGS[arch, kind], arch, kind)]


def search(
    start: Config,
    near: Callable[[Config], list[Config]],
    prepare: Callable[[list[Config]], list[Config]],
    evaluate: Callable[[Config], float | None],
    time_left: Callable[[], float],
    keep: Callable[[Mapping[Config, float | None]], None],
) -> dict[Config, float | None]:
    """Steepest descent from `start`: {configuration: milliseconds, or None if it cannot run}, in order tried.

    prepare compiles a round's configurations and returns those that are ready in time; the first round has
    `start`, which is tried whatever happens, and its neighbours. A round is only begun while time_left() is
    positive, and cut short when it no longer is. keep is given all that was tried after each one.
    """
    tried: dict[Config, float | None] = {}
    best, fresh = None, [start, *near(start)]
    while fresh and (not tried or time_left() > 0):
        ready = prepare(fresh)
        for config in ready if tried else dict.fromkeys([start, *ready]):
            if tried and time_left() <= 0:
                break
            tried[config] = evaluate(config)
            keep(tried)
        if fastest(tried) == best:
            break
        best = fastest(tried)
        fresh = [config for config in near(best) if config not in tried]
    return tried


def fastest(tried: Mapping[Config, float | None]) -> Config:
    """The configuration with the least time; the first one tried if none could run."""
    timed = {config: ms for config, ms in tried.items() if ms is not None}
    return min(timed, key=lambda config: timed[config]) if timed else next(iter(tried))


def workspace(kind: str, shape: Shape) -> int | None:
    """max_workspace_bytes under which the head has operands of `kind`: a master weight must not be copied."""
    return (shape.V * shape.D * 2) * 7 // 4 if kind == "master" else None


class Trial:
    """Times one configuration on the ops that use it, after a check against the first one's results.

    The trained and the frozen head, the latter from saved probabilities, candidates, the fused loss; a
    softcap, which has tiles of its own, is checked and not timed.
    """

    def __init__(self, key: tuple[str, str], shape: Shape, device: str = "cuda") -> None:
        self.key = key
        self.limit = workspace(key[1], shape)
        self.hidden, weight, ids = inputs(shape, device)
        self.weight = weight.float() if key[1] == "master" else weight
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.ids, self.sampled = ids, ids[:, 0].contiguous()
        self.upstream, self.row = torch.randn(ids.shape, device=device), torch.randn(shape.N, device=device)
        self.old = 0.2 * torch.randn(ids.shape, device=device) - math.log(shape.V)
        self.cu_seqlens = edges([shape.N], device)
        self.flush = torch.empty(64 * 2**20, device=device) if device == "cuda" else None
        self.expected: tuple[torch.Tensor, ...] | None = None

    def used(self) -> Config:
        """The configuration that the ops look up."""
        transform = Transform(1.0, None, 1.0, self.hidden.dtype)
        limit = triton_tiles.DEFAULT_WORKSPACE if self.limit is None else self.limit
        hidden, weight = self.hidden.detach(), self.weight.detach()
        return triton_tiles.operands(hidden, weight, None, transform, limit).config

    def step(self, softcap: float | None = None) -> tuple[torch.Tensor, ...]:
        leaves = (self.hidden, self.weight)
        out = linear_logprobs(
            *leaves, self.ids, return_entropy=True, softcap=softcap, max_workspace_bytes=self.limit,
            impl="triton",
        )  # fmt: skip
        return out.logprobs.detach(), *torch.autograd.grad(out.logprobs, leaves, self.upstream)

    def frozen(self) -> tuple[torch.Tensor, ...]:
        out = linear_logprobs(
            self.hidden, self.weight.detach(), self.ids, max_workspace_bytes=self.limit, impl="triton"
        )
        return torch.autograd.grad(out.logprobs, self.hidden, self.upstream)

    def candidates(self) -> tuple[torch.Tensor, ...]:
        hidden, weight = self.hidden.detach(), self.weight.detach()
        found = linear_candidates(hidden, weight, sampled=self.sampled, impl="triton")
        return found.lse, found.sampled_logprobs

    def loss(self) -> tuple[torch.Tensor, ...]:
        out = linear_distrl_loss(
            self.hidden, self.weight, self.sampled, self.ids[:, 1:], self.old[:, 0], self.old[:, 1:],
            self.row, self.upstream[:, 1:], self.cu_seqlens, max_workspace_bytes=self.limit, impl="triton",
        )  # fmt: skip
        return torch.autograd.grad(out.loss, (self.hidden, self.weight))

    def __call__(self, config: Config) -> float | None:
        CONFIGS[self.key] = config
        if self.used() != config:
            raise RuntimeError(f"the ops do not use the tiles of {self.key} on these operands")
        try:
            runs = [self.step, self.frozen, self.loss]
            if self.limit is None:  # linear_candidates takes no limit and would copy a master weight
                runs.append(self.candidates)
            results = tuple(part for run in runs for part in run()) + self.step(SOFTCAP)
            if self.expected is None:
                self.expected = results
            for got, wanted in zip(results, self.expected, strict=True):
                assert_close(str(config), got.float(), wanted.float(), 2e-2)
            del results
            return sum(statistics.median(once(run, self.flush) for _ in range(ROUNDS)) for run in runs)
        except (RuntimeError, AssertionError, TritonError) as error:  # wrong, or more than the GPU has
            print(f"{config}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None


def compile_aside(configs: Sequence[Config], kind: str, seconds: float) -> list[Config]:
    """Fill Triton's cache, a process for each configuration: those that took no longer than `seconds`.

    What fails here is reported when it is timed.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.sweep", "--kind", kind, "--compile"]
    deadline = time.monotonic() + seconds
    processes = [
        subprocess.Popen([*command, json.dumps(config._asdict())], cwd=ROOT, stderr=subprocess.DEVNULL)
        for config in configs
    ]
    ready = []
    for config, process in zip(configs, processes, strict=True):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
            ready.append(config)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return ready


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

    def time_left() -> float:
        return deadline - time.monotonic()

    def keep(tried: Mapping[Config, float | None]) -> None:
        config, ms = next(reversed(tried.items()))
        print(f"{'cannot run' if ms is None else f'{ms:.3f} ms':>12}  {config}", flush=True)
        result = report(key, shape, tried)
        new = entry(result)
        if options.json:
            write_json(options.json, result)
        if options.write and new is not None:
            write_tuned(new)

    tried = search(
        CONFIGS[key], lambda c: neighbours(c, *key),
        lambda configs: compile_aside(configs, options.kind, time_left() - RESERVE), Trial(key, shape),
        time_left, keep,
    )  # fmt: skip
    result = report(key, shape, tried)
    print(f"winner: {result['winner']}, {result['start_ms']} -> {result['winner_ms']} ms")
    if options.write and entry(result) is not None:
        print(f"written: {FILE}")
    return 0 if result["winner_ms"] is not None else 1


if __name__ == "__main__":
    sys.exit(main())
