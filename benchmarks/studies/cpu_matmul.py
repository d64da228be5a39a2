"""Which library the CPU head ops' matmuls are faster by, and what oneDNN's costs in rounding.

On every processor the three products of a tile by either library, as the ops multiply, and the rounding error
of h.w against fp64 in units of eps max|z|, of which the ops may use 8 beside twice that of plain PyTorch.
Where the ops run on both libraries also whole ops on N=2048 D=1024 V=32,000, and what batch sizes cost that
were never seen before, since oneDNN makes and keeps a kernel for every shape. All in interleaved rounds.
`ipvrm_kernels.head.matmul.MEASURED` names the files:

    python -m benchmarks.studies.cpu_matmul --out benchmarks/results/cpu_matmul-KIND.json
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.heads import SPEC, K, by
from benchmarks.suite.machine import describe
from benchmarks.suite.measure import Case, measure
from ipvrm.run_folder import write_json
from ipvrm_kernels import backend, linear_candidates, linear_logprobs
from ipvrm_kernels.head import matmul
from ipvrm_kernels.torch_private import has_onednn, linear_onednn

N = 2048
TILES = ((1024, 1024), (384, 1024))  # rows and columns: of the recomputing backward, of a scalar loss
WIDTHS = (256, 1024, 4096, 8192)  # D whose rounding is measured
SIZES = ((128, 320), (1024, 8192))  # (D, V) of the steps at many batch sizes: a demo's, and larger
BATCHES = range(1000, 1100)


def both(
    out: Tensor, a: Tensor, b: Tensor, buffer: Tensor | None = None
) -> dict[str, Callable[[], tuple[Tensor]]]:
    """out = a @ b by each library as `matmul.multiply` does it; a is transposed into `buffer` for oneDNN."""

    def blas() -> tuple[Tensor]:
        return (torch.mm(a, b, out=out).clone(),)

    def onednn() -> tuple[Tensor]:
        dense = a if buffer is None else buffer.view(a.shape)
        if buffer is not None:
            backend.native_call("transpose_cpu", a.T, *a.T.shape, dense)
        return (out.copy_(linear_onednn(dense, b.T)).clone(),)

    return dict(zip(matmul.NAMES, (blas, onednn), strict=True))


def not_here() -> list[str]:
    """Why the ops themselves do not run on one of the libraries here."""
    return [f"{name}: {reason}" for name in matmul.NAMES if (reason := matmul.why_not(name))]


def agree(results: Mapping[str, Any]) -> None:
    """Both libraries' tensors are equal to rounding."""
    first, second = results.values()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def cases() -> Iterator[Case]:
    """(what, contender "blas" | "onednn")."""
    D, V = SPEC.D, SPEC.V
    for R, C in TILES:
        h, w, tile, buffer = torch.randn(R, D), torch.randn(C, D), torch.randn(R, C), torch.empty(R * C)
        z, dh, dw = torch.empty(R, C), torch.empty(R, D), torch.empty(C, D)

        products = {
            "z = h w.T": both(z, h, w.T),
            "dh = dz w": both(dh, tile, w),
            "dw = dz.T h": both(dw, tile.T, h, buffer),
        }
        for name, contenders in products.items():
            yield Case(
                "tile", f"{R} x {C} x {D} {name}", contenders, agree,
                flops=2.0 * R * C * D, work=2.0 * R * C * D,
            )  # fmt: skip
    if not_here():
        return
    hidden, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5
    ids, upstream = torch.randint(0, V, (N, K)), torch.randn(N, K)

    def step(trainable: bool) -> tuple[Tensor, ...]:
        leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable)][: 1 + trainable]
        out = linear_logprobs(hidden, weight, ids, impl="cpp").logprobs
        return torch.autograd.grad(out, leaves, upstream)

    ops: dict[str, Callable[[], Any]] = {
        "linear_candidates": torch.no_grad()(lambda: linear_candidates(hidden, weight, impl="cpp")[2:4]),
        f"linear_logprobs K={K} forward+backward, frozen head": lambda: step(False),
        f"linear_logprobs K={K} forward+backward, trainable head": lambda: step(True),
    }
    for name, run in ops.items():
        yield Case("op", f"N={N} D={D} V={V} {name}", {lib: by(lib, run) for lib in matmul.NAMES}, agree)


def rounding() -> list[dict[str, Any]]:
    """Largest and root-mean-square error of h.w in units of eps max|z|, by D and library."""
    rows = []
    for D in WIDTHS:
        h, w, z = torch.randn(512, D), torch.randn(2048, D) / D**0.5, torch.empty(512, 2048)
        exact = h.double() @ w.double().T
        unit = torch.finfo(torch.float32).eps * exact.abs().max()
        for library, multiply in both(z, h, w.T).items():
            multiply()
            error = (z.double() - exact).abs() / unit
            rows.append(
                dict(D=D, library=library, max=error.max().item(), rms=error.square().mean().sqrt().item())
            )
    return rows


def fresh_sizes() -> list[dict[str, Any]]:
    """Milliseconds of a step of linear_logprobs at batch sizes new to the process and again; MiB it grew."""
    rows = []
    for D, V in SIZES:
        weight = (torch.randn(V, D) / D**0.5).requires_grad_()
        hidden = torch.randn(max(BATCHES), D).requires_grad_()
        ids = torch.randint(0, V, (max(BATCHES), 1))

        def step(size: int, hidden: Tensor = hidden, weight: Tensor = weight, ids: Tensor = ids) -> float:
            started = time.perf_counter()
            out = linear_logprobs(hidden[:size], weight, ids[:size], impl="cpp").logprobs
            torch.autograd.grad(out.sum(), (hidden, weight))
            return (time.perf_counter() - started) * 1e3

        for library in matmul.NAMES:
            run = by(library, lambda step=step: [statistics.median(map(step, BATCHES)) for _ in range(3)])
            by(library, lambda step=step: step(1))()  # what every size needs
            before = resident_mib()
            first, _, again = run()
            grew = resident_mib() - before
            rows.append(dict(D=D, V=V, library=library, first_ms=first, again_ms=again, grew_mib=grew))
    return rows


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if not has_onednn():
        raise SystemExit("cpu_matmul: this build of PyTorch has no oneDNN for dense matrices")
    for reason in not_here():
        print(f"the ops themselves do not run on {reason}")
    rows = []
    for case in cases():
        new = measure(case, "cpu")
        rows += [row.as_dict() for row in new]
        blas, onednn = new
        print(f"{case.shape:<75} {blas.median_ms:9.2f} ms by blas, {onednn.median_ms:9.2f} ms by onednn")
    errors = rounding()
    for row in errors:
        print(f"D={row['D']:<5} {row['library']:<7} max {row['max']:.2f} rms {row['rms']:.3f} eps max|z|")
    fresh = [] if not_here() else fresh_sizes()
    for row in fresh:
        print(
            f"D={row['D']} V={row['V']} {row['library']:<7} a step at a new N {row['first_ms']:.2f} ms, "
            f"again {row['again_ms']:.2f} ms, {len(BATCHES)} sizes hold {row['grew_mib']:.0f} MiB"
        )
    write_json(
        arguments.out, {"times": rows, "rounding": errors, "fresh_sizes": fresh, "machine": describe()}
    )


if __name__ == "__main__":
    main()
