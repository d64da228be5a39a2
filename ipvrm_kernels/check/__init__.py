"""Are the ops right on this machine: `python -m ipvrm_kernels [--model FOLDER | --shape D,V] [--json]`.

Every op and every implementation that runs here against fp64, on a few hundred rows and the vocabulary of
your model; the pipeline of the Triton head over many tiles; and the time of the head's ops in units of
`hidden @ weight.T`. About a minute at the default sizes. One verdict for each op, and for one that is wrong
how to switch it off. Exits 0 if every op is right, 1 if one is not, 2 if nothing could be checked.

Left out: `vocab_parallel_*`, which need a process group; a check of an installation starts none. They are
`linear_logprobs_partial` and `linear_candidates`, which are checked, and collectives of torch.distributed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import ipvrm_kernels

from .. import backend
from . import heads, sequences
from .heads import Exact, Head
from .judge import Judge, Result
from .wrong_tile import applies, wrong_tile

__all__ = ["Head", "Judge", "Result", "add_flags", "check", "head_of_config", "main", "run", "verdicts"]

# without --model or --shape; the first is Qwen3-0.6B's, whose check takes about 3 GB
DEFAULTS = dict(cuda=Head(1024, 151_936), cpu=Head(1024, 32_000))
INTERPRETED = Head(48, 700)  # Triton's interpreter is slow
ROWS = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the head's ops
TILES = ("linear_logprobs", "triton", "tiles")  # of `wrong_tile`
DEAD = "not checked: the CUDA context is dead"
CALLS, ENOUGH = 5, 1.0  # of which the median counts; fewer once they have taken so many seconds


def check(head: Head, devices: Sequence[str], say: Callable[[str], None] = lambda line: None) -> list[Result]:
    """Every op, implementation, device and dtype that runs here; `say` gets a line for each as it is done."""
    results: list[Result] = []
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # what the ops are compared with is fp32
    try:
        for device in devices:
            for result in chain(_sequences(device), _heads(head, device)):
                results.append(result)
                say(line(result))
                if device == "cuda" and result.failure and not _answers():
                    say("the CUDA context is dead; nothing after this is checked on the GPU")
                    results += _unreached(device, results)
                    break
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return results


def _planned(device: str) -> Iterator[tuple[str, str, str]]:
    """(op, impl, dtype) of every result on the device."""
    yield from ((op, impl, "fp32") for op in sequences.CHECKS for impl in runnable(op, device))
    for dtype in DTYPES:
        yield from ((op, impl, dtype) for op in heads.CHECKS for impl in runnable(op, device))
    if applies(device):
        yield TILES


def _unreached(device: str, results: Sequence[Result]) -> list[Result]:
    """Where the context has died: what was planned and is not among the results."""
    reached = {(r.op, r.impl, r.dtype) for r in results if r.device == device}
    return [
        Result(op, impl, device, dtype, [], DEAD)
        for op, impl, dtype in _planned(device)
        if (op, impl, dtype) not in reached
    ]


def _sequences(device: str) -> Iterator[Result]:
    given = sequences.draw(device)
    for op, function in sequences.CHECKS.items():
        for impl in runnable(op, device):
            yield _judged(op, impl, device, "fp32", partial(function, given=given, impl=impl))


def _heads(head: Head, device: str) -> Iterator[Result]:
    for name, dtype in DTYPES.items():
        pairs = [(op, impl) for op in heads.CHECKS for impl in runnable(op, device)]
        try:
            given = heads.draw(head, 48 if backend.INTERPRETED else ROWS, device, dtype)
            exact = Exact(given)
            matmul = _ms(partial(torch.matmul, given.hidden, given.weight.T), device)
        except RuntimeError as error:  # no memory for it, or a dead context
            yield from (Result(op, impl, device, name, [], _said(error)) for op, impl in pairs)
            continue
        for op, impl in pairs:
            result = _judged(
                op,
                impl,
                device,
                name,
                partial(heads.CHECKS[op], given=given, exact=exact.of(impl), impl=impl),
            )
            if result.right and not backend.is_reference(impl) and not backend.INTERPRETED:  # no contender
                calls = heads.timed(op, given, exact, impl)
                times = {what: round(_ms(call, device) / matmul, 2) for what, call in calls.items()}
                result = result._replace(times=times)
            yield result
    if applies(device):
        op, impl, name = TILES
        yield _judged(op, impl, device, name, partial(wrong_tile, device=device))


def _judged(op: str, impl: str, device: str, dtype: str, function: Callable[[Judge], None]) -> Result:
    judge = Judge()
    try:
        function(judge)
    except Exception as error:  # whatever a kernel or its compiler raises is the finding
        return Result(op, impl, device, dtype, judge.findings, _said(error))
    return Result(op, impl, device, dtype, judge.findings)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def runnable(op: str, device: str) -> list[str]:
    """The implementations of `op` that run on `device` here."""
    return [name for name in ipvrm_kernels.OPS[op] if backend.why_not(name, device) is None]


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _ms(call: Callable[[], object], device: str) -> float:
    """Median of CALLS after one that warms up, which counts itself if it takes as long as they may."""
    times: list[float] = []
    while len(times) <= CALLS and sum(times) < ENOUGH * 1e3:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:] or times)


def line(result: Result) -> str:
    """One result in words."""
    where = f"{result.op:<24}{result.impl:<8}{result.device:<6}{result.dtype:<6}"
    if not result.right:
        return f"{where}WRONG  {result.reason}"
    times = ", ".join(f"{name} {ratio:.2f} x matmul" for name, ratio in result.times.items())
    worst = max(result.findings, key=lambda finding: finding.share)
    return (
        f"{where}right  at most {worst.share:.2f} of the error allowed ({worst.what}){times and f'; {times}'}"
    )


def verdicts(results: Sequence[Result]) -> list[str]:
    """A line for each op: right, or what is wrong and how to do without it, or that it was not checked."""
    lines = []
    for op in dict.fromkeys(result.op for result in results):
        mine = [result for result in results if result.op == op]
        wrong = [result for result in mine if not result.right and result.failure != DEAD]
        impls, left = (
            ", ".join(dict.fromkeys(f"{r.impl} ({r.device})" for r in found))
            for found in ([r for r in mine if r.right], [r for r in mine if r.failure == DEAD])
        )
        if not wrong:
            said = [f"right with {impls}"] if impls else []
            said += [f"NOT CHECKED with {left}: the CUDA context was dead by then"] if left else []
            lines.append(f"{op}: {'; '.join(said)}")
            continue
        first = wrong[0]
        names = list(dict.fromkeys(r.impl for r in wrong))
        told = "; ".join(f"{r.impl} on {r.device} in {r.dtype}: {r.reason}" for r in wrong)
        lines.append(f"{op}: WRONG with {told}. {switch_off(op, first.device, names)}")
    return lines


def not_checked() -> str:
    """The public functions that no check covers, and what does."""
    names = [name for name in ipvrm_kernels.__all__ if name.startswith("vocab_parallel_")]
    return (
        f"not checked: {', '.join(names)}, which need a process group: a check starts none. "
        "tests/kernels/test_vocab_parallel.py of the sources tests them on two and three processes of a CPU"
    )


def switch_off(op: str, device: str, wrong: Sequence[str]) -> str:
    """How to do without the implementations of `op` that are wrong."""
    order = backend.DEFAULT_ORDER.get(device, ("torch",))
    left = [name for name in order if name in runnable(op, device) and name not in wrong]
    if not left:
        return "No other implementation runs here: do not use this op, and please report it"
    names = ",".join(f"{op}:{name}" for name in wrong)
    return f"Switch it off: impl={left[0]!r} in the call, or {backend.WITHOUT}={names} in the environment"


def head_of_config(folder: str) -> Head:
    """The head of a model from the config.json in its folder.

    Raises: ValueError if there is none, or none of its keys says the size.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model must be a folder with a config.json here, got {folder}")
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    missing = [key for key in ("hidden_size", "vocab_size") if key not in config]
    if missing:
        raise ValueError(f"--model: {path} must hold {', '.join(missing)}; pass --shape D,V")
    return Head(config["hidden_size"], config["vocab_size"], config.get("final_logit_softcapping"))


def head_of_shape(text: str) -> Head:
    try:
        D, V = (int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two integers D,V; got {text!r}") from None
    if D < 1 or V < 16:
        raise argparse.ArgumentTypeError(f"must be at least 1,16; got {text!r}")
    return Head(D, V)


def add_flags(parser: argparse.ArgumentParser, model_help: str) -> None:
    """--model, --shape, --device, --json, as `run` reads them."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="NAME", help=model_help)
    which.add_argument("--shape", type=head_of_shape, metavar="D,V", help="hidden size and vocabulary")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="one of them alone (default: all at hand)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, on one line")


def run(head: Head | None, device: str | None, as_json: bool) -> int:
    """Check and print; the exit code."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        print("check: --device cuda needs a GPU that torch can see", file=sys.stderr)
        return 2
    devices = [device] if device else ["cuda", "cpu"] if gpu else ["cpu"]
    head = head or (INTERPRETED if backend.INTERPRETED else DEFAULTS[devices[0]])
    start = time.monotonic()
    names = ", ".join([*([torch.cuda.get_device_name()] if gpu else []), "CPU"])
    out = sys.stderr if as_json else sys.stdout
    print(f"ipvrm_kernels {ipvrm_kernels.__version__}, torch {torch.__version__}, {head}, {names}", file=out)
    results = check(head, devices, lambda said: print(said, file=out, flush=True))
    lines, seconds = verdicts(results), time.monotonic() - start
    right = all(result.right for result in results)
    if as_json:
        print(json.dumps(dict(
            version=ipvrm_kernels.__version__, torch=torch.__version__, head=head._asdict(), devices=devices,
            seconds=round(seconds, 1), right=right, verdicts=lines,
            results=[result.as_dict() for result in results],
        )))  # fmt: skip
    else:
        print("\n" + "\n".join(lines))
        print(not_checked())
        print(f"{'all right' if right else 'NOT all right'}, {seconds:.0f} s")
    return 0 if right else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ipvrm_kernels", description=(__doc__ or "").partition("\n\n")[2]
    )
    add_flags(parser, "a folder with the model's config.json, for the size of its head")
    options = parser.parse_args(arguments)
    try:
        head = options.shape or (head_of_config(options.model) if options.model else None)
    except ValueError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    return run(head, options.device, options.json)
