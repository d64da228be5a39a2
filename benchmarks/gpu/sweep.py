"""Which tiles the Triton head should use on this GPU: `python -m benchmarks.gpu.sweep [--write] [--json F]`.

A fixed list of about eight configurations for each of the kernels that multiply (forward, groups, saved, dz).
Those of a kernel are compiled side by side; each is checked, bit by bit, against one program for each of its
tiles, and against the first one's results, and then timed. All kernels must share BLOCK_V, so the winners are
the fastest of the BLOCK_V at which they take least together. --json is written after every configuration, so
that a sweep that is killed keeps what it has. Exits 1 if nothing could be timed. --write puts winners that
gain at least GAIN into ipvrm_kernels/head/tuned.json, where the package reads its defaults; --apply F does so
from a report measured elsewhere.
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

from benchmarks.gpu.process import exit_codes
from benchmarks.run import write_json
from benchmarks.suite.heads import GPU_DEFAULT, MODELS, Shape, inputs
from benchmarks.suite.machine import ROOT, describe
from benchmarks.suite.measure import assert_close, once
from ipvrm_kernels.head import Transform, triton_backward, triton_forward, triton_tiles
from ipvrm_kernels.head.triton_tiles import KERNELS, Config, config_of, tiles_of
from ipvrm_kernels.head.tuned import FILE

# after the configuration in use, those that fit; two programs on a multiprocessor overlap the epilogue of one
# with the matmul of the other
LISTS = {
    "sm_90": (
        Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4), Config(128, 256, 64, 8, 3, flatten=True),
        Config(256, 128, 64, 8, 3), Config(128, 128, 64, 4, 3, 2), Config(64, 256, 64, 4, 2, 2),
        Config(128, 128, 64, 4, 2, 2), Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 3),
        Config(128, 128, 32, 4, 3, 2), Config(128, 64, 64, 4, 3, 3), Config(64, 64, 32, 8, 2),
        Config(64, 64, 32, 4, 3, 2), Config(64, 128, 32, 8, 3), Config(64, 64, 64, 8, 2),
    ),
    "sm_80": (
        Config(128, 128, 32, 8, 4), Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 2),
        Config(128, 256, 32, 8, 3), Config(128, 128, 32, 4, 3), Config(128, 64, 32, 4, 4, 2),
        Config(64, 128, 32, 4, 4, 2), Config(128, 128, 32, 4, 2, 2), Config(128, 64, 32, 8, 3),
        Config(64, 64, 16, 8, 2), Config(64, 64, 32, 8, 2), Config(64, 64, 16, 4, 3, 2),
    ),
}  # fmt: skip
LISTS["sm_100"] = LISTS["sm_90"]
LENGTH = 8
# bytes a block may use; sm_120 borrows sm_80's tiles
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
RESERVED = 1 << 10  # bytes of shared memory that each program takes besides
OPERAND_BYTES = {"half": (2, 2), "master": (2, 4), "fp32": (4, 4)}  # of hidden and weight
ACCUMULATORS = 128  # fp32 registers of a tile a thread, beyond which the compiler spills
OTHER_REGISTERS = 120  # of a thread, besides its accumulators, at most
REGISTERS = 65536  # of a multiprocessor
GAIN = 0.02  # winners must be this much faster to become the default
ROUNDS = 7
RESERVE = 8.0  # seconds that compiling leaves for timing what it compiled
COMPILE_ROWS = 256  # rows of the call that compiles: as divisible as the timed ones


def architecture() -> str:
    return tiles_of(torch.cuda.get_device_capability()[0])


def gpu_at_hand() -> str:
    """One of SHARED_MEMORY."""
    return "sm_120" if torch.cuda.get_device_capability()[0] == 12 else architecture()


def fits(config: Config, gpu: str, kind: str, kernel: str) -> bool:
    """Whether tiles, stages, and a result that passes through shared memory fit, and the registers."""
    hidden, weight = OPERAND_BYTES[kind]
    shared = (config.BLOCK_N * hidden + config.BLOCK_V * weight) * config.BLOCK_D * config.num_stages
    if kernel in ("saved", "dz") and gpu != "sm_80":
        shared += config.BLOCK_N * config.BLOCK_V * hidden
    accumulators = config.BLOCK_N * config.BLOCK_V // (32 * config.num_warps)
    threads = 32 * config.num_warps * config.programs_per_sm
    return (
        (shared + RESERVED) * config.programs_per_sm <= SHARED_MEMORY[gpu] + RESERVED
        and accumulators <= ACCUMULATORS
        and min(255, accumulators + OTHER_REGISTERS) * threads <= REGISTERS
    )


def choices(kernel: str, arch: str, kind: str, gpu: str | None = None) -> list[Config]:
    """The configuration in use, then those of the list that fit the GPU, by default `arch`: LENGTH in all."""
    start = config_of(arch, kind, kernel)
    listed = [
        c._replace(softcap_V=start.softcap_V) for c in LISTS[arch] if fits(c, gpu or arch, kind, kernel)
    ]
    return list(dict.fromkeys([start, *listed]))[:LENGTH]


def workspace(kind: str, shape: Shape) -> int:
    """The limit under which the head has operands of `kind`: a master weight must not be copied."""
    copy = shape.V * shape.D * 2
    return copy * 7 // 4 if kind == "master" else 4 * copy


class Trial:
    """Checks and times one kernel at a time, on all of a shape's tiles."""

    def __init__(self, key: tuple[str, str], shape: Shape, device: str = "cuda") -> None:
        hidden, weight, _ = inputs(shape, device)
        weight = weight.float() if key[1] == "master" else weight
        transform = Transform(1.0, None, 1.0, hidden.dtype)
        ops = triton_tiles.operands(hidden, weight, None, transform, workspace(key[1], shape))
        if ops.row != key:
            raise RuntimeError(f"the ops use the tiles of {ops.row} on these operands, not those of {key}")
        self.ops = ops._replace(row=("", ""))  # from which no kernel departs
        N = shape.N
        self.ref, self.upstream = torch.zeros(N, device=device), torch.randn(N, device=device)
        self.count = torch.full((), N, dtype=torch.int32, device=device)
        self.ids = torch.empty(N, 0, dtype=torch.int64, device=device)
        self.flush = torch.empty(64 * 2**20, device=device) if device == "cuda" else None
        merged = triton_forward.stats(self.ops, True)
        self.lse = merged.lse()
        self.expected: dict[str, list[torch.Tensor]] = {}

    def prepared(self, kernel: str, config: Config) -> tuple[list[torch.Tensor], Callable[[int], None]]:
        """(what the kernel fills; a launch of it by so many programs)."""
        ops = self.ops._replace(config=config)
        N, V, device = len(ops.hidden), len(ops.weight), ops.hidden.device
        columns = triton_tiles.padded_columns(ops)
        if kernel == "dz":
            da = torch.empty(N, columns, dtype=ops.hidden.dtype, device=device)
            zero = torch.zeros_like(self.lse)
            rows = triton_backward.Rows(self.ids, None, self.lse, zero, zero, self.upstream, None, self.count)
            return [da[:, :V]], lambda programs: triton_backward.launch_dz(
                ops._replace(programs=programs), rows, da, 0, 1.0
            )
        partial = torch.empty(3, triton_forward.num_splits(ops), N, device=device)
        merged = torch.empty(3, N, device=device)
        groups = saved = None
        filled = [merged]
        if kernel == "groups":
            groups = torch.empty(N, -(-V // triton_forward.GROUP), device=device)
            filled.append(groups)
        if kernel == "saved":
            values = torch.empty(N, columns, dtype=ops.hidden.dtype, device=device)
            saved = triton_forward.Saved(self.ref, values)
            filled.append(values[:, :V])
        return filled, lambda programs: triton_forward._partial_stats(
            ops._replace(programs=programs), partial, merged, groups, saved
        )

    def __call__(self, kernel: str, config: Config) -> float | None:
        """Milliseconds, or None where it is wrong or cannot run."""
        try:
            filled, launch = self.prepared(kernel, config)
            N, V = self.ops.hidden.shape[0], self.ops.weight.shape[0]
            tiles = -(-N // config.BLOCK_N) * -(-V // config.BLOCK_V)
            for x in filled:
                x.fill_(float("nan"))
            launch(tiles)
            each = [x.clone() for x in filled]
            for x in filled:
                x.fill_(float("nan"))
            launch(self.ops.programs)
            for got, expected in zip(filled, each, strict=True):
                same = torch.equal(got, expected)  # not where NaN is left
                assert same, f"{kernel} {config}: bits differ from those of one program for each tile"
            first = self.expected.setdefault(kernel, each)
            for got, wanted in zip(filled, first, strict=True):
                assert_close(f"{kernel} {config}", got.float(), wanted.float(), 2e-2)
            del each
            run = lambda: launch(self.ops.programs)  # noqa: E731
            return statistics.median(once(run, self.flush) for _ in range(ROUNDS))
        except (RuntimeError, AssertionError, TritonError) as error:  # wrong, or more than the GPU has
            print(f"{kernel} {config}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None


Tried = dict[str, dict[Config, "float | None"]]  # of each kernel, in order; milliseconds


def winners(tried: Tried) -> dict[str, Config]:
    """The fastest configuration of each kernel, all of the BLOCK_V at which they take least together; the
    first ones where a kernel has none that ran."""
    first = {kernel: next(iter(configs)) for kernel, configs in tried.items()}
    best: tuple[float, dict[str, Config]] | None = None
    for BLOCK_V in dict.fromkeys(c.BLOCK_V for configs in tried.values() for c in configs):
        found = {}
        for kernel, configs in tried.items():
            timed = {c: ms for c, ms in configs.items() if ms is not None and c.BLOCK_V == BLOCK_V}
            if timed:
                found[kernel] = min(timed, key=lambda config: timed[config])
        total = sum(tried[kernel][config] or 0.0 for kernel, config in found.items())
        if len(found) == len(tried) and (best is None or total < best[0]):
            best = total, found
    return best[1] if best else first


def compile_aside(kernel: str, configs: Sequence[Config], kind: str, seconds: float) -> list[Config]:
    """Fill Triton's cache, a process for each configuration: those that took no longer than `seconds`.

    What fails here is reported when it is timed.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.sweep", "--kind", kind, "--compile", kernel]
    deadline = time.monotonic() + seconds
    processes = [
        subprocess.Popen([*command, json.dumps(config._asdict())], cwd=ROOT, stderr=subprocess.DEVNULL)
        for config in configs
    ]
    codes = exit_codes(processes, deadline)
    return [config for config, code in zip(configs, codes, strict=True) if code is not None]


def entries(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a report's sweep says should stand in tuned.json; nothing if it gained less than GAIN."""
    start, winner = sweep["start_ms"], sweep["winner_ms"]
    if start is None or winner is None or winner > (1 - GAIN) * start:
        return []
    names = ("architecture", "kind", "device", "date", "commit", "shape", "start_ms", "winner_ms")
    shared = {name: sweep[name] for name in names}
    return [{**shared, "kernel": kernel, "config": config} for kernel, config in sweep["winner"].items()]


def write_tuned(new: Sequence[dict[str, Any]], file: Path = FILE) -> None:
    """Put entries into the package's file, in the place of those for the same kernels."""
    key = lambda e: (e["architecture"], e["kind"], e["kernel"])  # noqa: E731
    fresh = {key(entry) for entry in new}
    kept = [e for e in json.loads(file.read_text())["configs"] if key(e) not in fresh]
    write_json(file, dict(configs=sorted([*kept, *new], key=key)))


def report(key: tuple[str, str], shape: Shape, tried: Tried) -> dict[str, Any]:
    """The sweep as JSON: every configuration tried, those in use and the best of each kernel, their sums."""
    machine, best = describe(), winners(tried)
    start = {kernel: next(iter(configs)) for kernel, configs in tried.items()}

    def total(of: Mapping[str, Config]) -> float | None:
        times = [tried[kernel][config] for kernel, config in of.items()]
        return None if None in times else sum(ms for ms in times if ms is not None)

    return dict(
        architecture=key[0], kind=key[1], device=machine["device"], date=machine["date"],
        commit=machine["commit"], shape=str(shape),
        start={kernel: config._asdict() for kernel, config in start.items()}, start_ms=total(start),
        winner={kernel: config._asdict() for kernel, config in best.items()}, winner_ms=total(best),
        tried=[
            dict(kernel=kernel, config=config._asdict(), ms=ms)
            for kernel, configs in tried.items() for config, ms in configs.items()
        ],
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=tuple(OPERAND_BYTES), default="half")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--json", type=Path, metavar="F", help="write what was tried here")
    parser.add_argument("--write", action="store_true", help="make the winners the package's defaults")
    parser.add_argument(
        "--apply", type=Path, metavar="F", help="make the winners of a GPU report the defaults"
    )
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.apply:
        new = entries(json.loads(options.apply.read_text())["parts"]["sweep"]["sweep"])
        if new:
            write_tuned(new)
        print(f"written: {FILE}" if new else "sweep: no gain in that report; nothing written")
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
        kernel, config = options.compile
        Trial(key, shape._replace(N=COMPILE_ROWS)).prepared(kernel, Config(**json.loads(config)))[1](1)
        return 0
    trial = Trial(key, shape)
    tried: Tried = {}
    for number, kernel in enumerate(KERNELS):
        seconds = (deadline - time.monotonic()) / (len(KERNELS) - number)  # for this kernel
        until = time.monotonic() + seconds
        configs = choices(kernel, *key, gpu_at_hand())
        ready = compile_aside(kernel, configs, options.kind, seconds - RESERVE / len(KERNELS))
        tried[kernel] = {}
        for config in dict.fromkeys([configs[0], *ready]):  # the one in use whatever happens
            if tried[kernel] and time.monotonic() > until:
                break
            ms = tried[kernel][config] = trial(kernel, config)
            print(f"{'cannot run' if ms is None else f'{ms:.3f} ms':>12}  {kernel}  {config}", flush=True)
            if options.json:
                write_json(options.json, report(key, shape, tried))
    result = report(key, shape, tried)
    print(f"winners: {result['winner']}, {result['start_ms']} -> {result['winner_ms']} ms")
    if options.write and entries(result):
        write_tuned(entries(result))
        print(f"written: {FILE}")
    return 0 if result["winner_ms"] is not None else 1


if __name__ == "__main__":
    sys.exit(main())
