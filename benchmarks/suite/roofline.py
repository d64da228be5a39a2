"""What a kernel of the head, and what an op made of them, should take on a GPU: a model, not a measurement.

A tile kernel multiplies, then works on its logits (an epilogue), and moves bytes:

    ms = max(flops / matmul rate + instructions a logit * N * V / instruction rate, bytes / bandwidth)

Where two programs share an SM the epilogue of one runs beside the matmul of the other, and the sum becomes a
maximum. A measured time far above says that the kernel is slow, one far below that the model is wrong; the
report prints both.
"""

from __future__ import annotations

import csv
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite.heads import Shape
from benchmarks.suite.machine import ROOT

TABLES = ROOT / "benchmarks/results/kernels"  # triton-VERSION.csv, of tests/kernels/compile_ahead.py --table
VARIANTS = dict(forward="entropy", groups="entropy", saved="", dz="")  # the rows of the table that are meant
# without a table: the most that tests/kernels/test_ahead_of_time.py allows; other kernels are modelled
# without
MOST = dict(forward=7.0, groups=8.0)
LAUNCH = 0.003  # ms of one small kernel
LANES = 128  # instructions that an SM may issue a clock, of threads
# of those, what a serial epilogue reaches: puts 17 instructions a logit at 0.28 of the matmul at D = 1024
ISSUED = 0.7
L2_ROWS = 16 << 20  # bytes of hidden that one sweep over the weight works on, as in triton_tiles.ROWS_IN_L2
BLOCK_V = 256  # columns whose partial statistics are stored


def counted(folder: Path, triton: str) -> dict[str, float]:
    """{kernel with tiles: thread instructions of a logit behind the matmul, in the machine code of sm_90 and
    half precision}, from the table of this Triton version or else the newest."""
    files = sorted(folder.glob("triton-*.csv"))
    if not files:
        return dict(MOST)
    own = folder / f"triton-{triton}.csv"
    with (own if own in files else files[-1]).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["sm"], row["operands"]) == ("90", "half")]
    return {
        row["kernel"]: sum(float(row[name] or 0) for name in ("epilogue", "start"))
        for row in rows
        if row["epilogue"] and VARIANTS.get(row["kernel"]) == row["variant"]
    }


class Rates(NamedTuple):
    """What a GPU sustains."""

    tflops: float  # of half-precision matmuls
    tb_per_s: float
    sms: int
    ghz: float

    @property
    def instructions_per_ms(self) -> float:
        return self.sms * LANES * ISSUED * self.ghz * 1e6


INSTRUCTIONS = counted(TABLES, metadata.version("triton") if find_spec("triton") else "")
RATES = {"H200": Rates(790, 4.3, 132, 1.98)}


def rates(device: str) -> Rates | None:
    """Of a GPU by its name; None where nobody has given them."""
    return next((found for name, found in RATES.items() if name in device), None)


def matmul_ms(shape: Shape, gpu: Rates) -> float:
    """The bare hidden @ weight.T, its logits not counted."""
    return shape.flops / gpu.tflops / 1e9


def stream_ms(num_bytes: float, gpu: Rates) -> float:
    """A kernel that moves bytes and does little else."""
    return LAUNCH + num_bytes / gpu.tb_per_s / 1e9


def tile_ms(kind: str, shape: Shape, gpu: Rates, *, writes: float = 0.0, overlapped: bool = False) -> float:
    """One of the kernels with tiles; writes: bytes besides the partial statistics."""
    size = shape.dtype.itemsize
    sweeps = max(1.0, shape.N * shape.D * size / L2_ROWS)
    traffic = size * shape.D * (shape.N + sweeps * shape.V) + 12 * shape.N * shape.V / BLOCK_V + writes
    epilogue = INSTRUCTIONS.get(kind, 0.0) * shape.N * shape.V / gpu.instructions_per_ms
    matmul = matmul_ms(shape, gpu)
    work = max(matmul, epilogue) if overlapped else matmul + epilogue
    return max(work, traffic / gpu.tb_per_s / 1e9)


def kernels(kind: str, shape: Shape, gpu: Rates, overlapped: bool = False) -> dict[str, float]:
    """{kernel: ms} of an op: "forward", "candidates", "trainable", "frozen" or "distrl_loss" (trainable).

    "matmul" are the vendor's, together. The work on candidates' groups, a few a row, is left out.
    """
    N, V, size = shape.N, shape.V, shape.dtype.itemsize
    logits = float(size * N * V)
    merge = stream_ms(12 * N * V / BLOCK_V, gpu)
    ids = 1 if kind in ("forward", "candidates") else shape.K
    gather = stream_ms(2 * size * N * ids * shape.D, gpu)
    vendor = matmul_ms(shape, gpu)
    common = {"_merge_stats_kernel": merge, "_id_logits_kernel": gather}

    def tile(name: str, writes: float = 0.0) -> float:
        return tile_ms(name, shape, gpu, writes=writes, overlapped=overlapped)

    if kind == "forward":
        return {"_head_stats_kernel": tile("forward"), **common}
    if kind == "candidates":
        return {"_head_stats_kernel": tile("groups", 4 * N * V / 32), **common}
    if kind == "trainable":
        dz = tile("dz", logits)
        return {"_head_stats_kernel": tile("forward"), "_head_dz_kernel": dz, "matmul": 2 * vendor, **common}
    saved = tile("saved", logits)
    count = {"frozen": 1, "distrl_loss": 2}[kind]
    return {"_head_stats_kernel": saved, "matmul": count * vendor, **common}


def expected(kind: str, shape: Shape, names: list[str], device: str) -> dict[str, float]:
    """{contender: ms} of an op's contenders `names` that are Triton's, of "gluon" (the forward of
    benchmarks/gpu/gluon_study.py), and of the bare matmul; {} without a model of the GPU at hand."""
    gpu = rates(_device_name()) if device == "cuda" else None
    if gpu is None:
        return {}
    total = sum(kernels(kind, shape, gpu).values())
    overlapped = sum(kernels(kind, shape, gpu, overlapped=True).values())
    modelled = {name: total for name in names if name.startswith("triton")}
    return {"matmul": matmul_ms(shape, gpu), **modelled} | {
        name: overlapped for name in names if name == "gluon"
    }


def expected_stream(num_bytes: float) -> float | None:
    """ms of a sequence op on the GPU at hand, None without a model of it."""
    gpu = rates(_device_name())
    return stream_ms(num_bytes, gpu) if gpu else None


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()
