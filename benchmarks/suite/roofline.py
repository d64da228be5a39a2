"""What a kernel of the head, and what an op made of them, should take on a GPU: a model, not a measurement.
`python -m benchmarks.suite.roofline` writes its page, benchmarks/results/kernels/README.md.

A tile kernel multiplies, then works on its logits (an epilogue), and moves bytes:

    ms = max(flops / matmul rate + instructions a logit * N * V / instruction rate, bytes / bandwidth)

Where two programs share an SM the epilogue of one runs beside the matmul of the other, and the sum becomes a
maximum. A measured time far above says that the kernel is slow, one far below that the model is wrong; the
report prints both.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
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
SECTOR = 32  # bytes that a number written alone moves
BLOCK_BYTES = 1 << 30  # of logits that one block of the backward works on: the default workspace
SLOTS = 10 * 32  # columns of a row among which candidates are looked for
LANES = 128  # instructions that an SM may issue a clock, of threads
# of those, what a serial epilogue reaches: puts 17 instructions a logit at 0.28 of the matmul at D = 1024
ISSUED = 0.7
L2_ROWS = 16 << 20  # bytes of hidden that one sweep over the weight works on, as in triton_tiles.ROWS_IN_L2
BLOCK_V = 256  # columns whose partial statistics are stored


def counted(folder: Path, triton: str, columns: Sequence[str] = ("epilogue", "start")) -> dict[str, float]:
    """{kernel with tiles: thread instructions of a logit besides the matmul, in the machine code of sm_90 and
    half precision}, from the table of this Triton version or else the newest."""
    files = sorted(folder.glob("triton-*.csv"))
    if not files:
        return dict(MOST)
    own = folder / f"triton-{triton}.csv"
    with (own if own in files else files[-1]).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["sm"], row["operands"]) == ("90", "half")]
    return {
        row["kernel"]: sum(float(row[name] or 0) for name in columns)
        for row in rows
        if row["epilogue"] and VARIANTS.get(row["kernel"]) == row["variant"]
    }


HEAD = """# Kernels of the head

`triton-VERSION.csv`: what Triton makes of each for sm_90, sm_80, sm_100 and sm_120, made by
`tests/kernels/compile_ahead.py --table`: registers, bytes of shared memory and spills, programs that fit on a
multiprocessor, and of those with tiles instructions a logit behind the matmul (epilogue) and before it
(start; where the tile lies, its first loads). Empty: no tiles, no tensor cores, or no loop over D that stands
by itself in the machine code. A rise of instructions or registers by more than 5 %, of shared memory, or a
drop in programs fails tests/kernels/test_ahead_of_time.py.

On sm_80 and sm_120 a thread has 64 logits of a tile and not 128, 16 of a row and not 64: what it pays for a
row (reductions through lanes and shared memory) and for a tile (addresses, the first copies) is paid for
fewer logits. Tiles of 128x128x32 by four warps (8.2 groups, 8.0 dz, 10.2 saved on sm_80, no spills, two
programs) would be cheaper, but operands that no descriptor addresses take the same row on sm_90 and spill
there with them; the sweep tries them on an sm_80.

Below: ms by the **model** of benchmarks/suite/roofline.py, and how many times the matmul that is. No GPU has
been timed. {device}: {tflops:.0f} TFLOP/s and {tb_per_s} TB/s sustained; N=8192, V=151936, bf16.
"""


TARGET = """
The forward's target, 1.10 / 1.03 x matmul with a lean epilogue that runs by itself, is missed by this model,
{whole}: it also counts the {start:.2f} instructions a logit before the matmul, which the target left out;
without them it says {lean}. Overlapped it says 1.00 where 1.02 to 1.05 was expected, since it lets
nothing of an epilogue show, neither a program's last one nor what the two take from each other.
"""


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
H200 = Rates(790, 4.3, 132, 1.98)


def of_data_sheet(tflops: float, tb_per_s: float, sms: int, ghz: float) -> Rates:
    """As much of NVIDIA's published peaks (dense) as is assumed of the H200's, 989.4 TFLOP/s and 4.8 TB/s."""
    return Rates(H200.tflops / 989.4 * tflops, H200.tb_per_s / 4.8 * tb_per_s, sms, ghz)


# By a part of the name that the driver gives. Peaks of NVIDIA's data sheets (H100 SXM5, A100 80GB SXM4, one
# GPU of an HGX B200), SMs and boost clock of its white papers; those of the B200 as others list them.
# Instructions are of sm_90's code for all of them: sm_80's takes up to 1.5 times as many, so that an A100 is
# modelled as faster than it is, and nobody has counted a B200's.
RATES = {
    "H200": H200,
    "H100 80GB HBM3": of_data_sheet(989.4, 3.35, 132, 1.98),
    "A100-SXM4-80GB": of_data_sheet(312.0, 2.039, 108, 1.41),
    "NVIDIA B200": of_data_sheet(2250.0, 8.0, 148, 1.965),
}


def rates(device: str) -> Rates | None:
    """Of a GPU by its name; None where nobody has given them."""
    return next((found for name, found in RATES.items() if name in device), None)


def matmul_ms(shape: Shape, gpu: Rates) -> float:
    """The bare hidden @ weight.T, its logits not counted."""
    return shape.flops / gpu.tflops / 1e9


def stream_ms(num_bytes: float, gpu: Rates, launches: int = 1) -> float:
    """A kernel that moves bytes, in all its launches, and does little else."""
    return LAUNCH * launches + num_bytes / gpu.tb_per_s / 1e9


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
    """{kernel: ms} of an op without a bias: "forward", "candidates", "trainable", "frozen" or "distrl_loss"
    (trainable); in all launches of one call.

    "matmul" are the vendor's, together. Of candidates' columns those that are read are left out, a few a row.
    """
    N, V, K, size = shape.N, shape.V, shape.K, shape.dtype.itemsize
    logits = float(size * N * V)
    blocks = -(-size * N * V // BLOCK_BYTES)  # of the vocabulary, or of rows where values are saved
    saves = kind in ("frozen", "distrl_loss")
    passes = blocks if saves else 1
    ids = 1 if kind in ("forward", "candidates") else K
    vendor = matmul_ms(shape, gpu)

    def tile(name: str, writes: float = 0.0) -> float:
        return tile_ms(name, shape, gpu, writes=writes, overlapped=overlapped)

    def small(num_bytes: float, launches: int = 1) -> float:
        return stream_ms(num_bytes, gpu, launches)

    # where values are saved the first tile's statistics come before each block's
    found = {
        "_merge_stats_kernel": small(12 * N * V / BLOCK_V, 2 * passes if saves else 1),
        "_id_logits_kernel": small(2 * size * N * ids * shape.D, 2 if kind == "candidates" else passes),
    }
    if kind == "forward":
        return found | {"_head_stats_kernel": tile("forward")}
    if kind == "candidates":
        return found | {
            "_head_stats_kernel": tile("groups", 4 * N * V / 32),
            "_select_groups_kernel": small(4 * N * V / 32),
            "_best_candidates_kernel": small(8 * N * SLOTS),
        }
    slots = N * K
    found["_id_gradients_kernel"] = small(20 * slots, passes if kind == "distrl_loss" else 1)
    patched = (8 + SECTOR + 4 * (kind != "frozen")) * slots + 8 * slots * (blocks - passes)
    found["_patch_kernel"] = small(patched, blocks)
    if kind == "trainable":  # no row is zeroed, of da and of hidden
        return found | {
            "_head_stats_kernel": tile("forward"), "_head_dz_kernel": tile("dz", logits),
            "_zero_rows_kernel": small(2 * N, 2), "matmul": 2 * vendor,
        }  # fmt: skip
    found |= {
        "_head_stats_kernel": tile("saved", logits) + LAUNCH * blocks,
        "_gather_rows_kernel": small(0, blocks), "_head_dz_kernel": small(0, blocks),  # no row is far
    }  # fmt: skip
    if kind == "frozen":
        rows = 8.0 * N * shape.D + size * slots * shape.D
        return found | {"_id_rows_kernel": small(rows), "matmul": vendor}
    return found | {"_zero_rows_kernel": small(N, blocks), "matmul": 2 * vendor}


def expected(
    kind: str, shape: Shape, names: Sequence[str], device: str, overlapped: Collection[str] = ("gluon",)
) -> dict[str, float]:
    """{contender: ms} of an op's contenders `names` that are Triton's or `overlapped` (those whose epilogues
    run beside matmuls), and of the bare matmul; {} without a model of the GPU at hand."""
    gpu = rates(_device_name()) if device == "cuda" else None
    if gpu is None:
        return {}
    total = {beside: sum(kernels(kind, shape, gpu, overlapped=beside).values()) for beside in (False, True)}
    return {"matmul": matmul_ms(shape, gpu)} | {
        name: total[name in overlapped] for name in names if name in overlapped or name.startswith("triton")
    }


def page(device: str = "H200") -> str:
    """What the model says of the kernels with tiles and of the ops, at the shapes that a GPU times first."""
    from benchmarks.suite.heads import shapes

    gpu, both = RATES[device], shapes("cuda", False)
    lines = [HEAD.format(device=device, tflops=gpu.tflops, tb_per_s=gpu.tb_per_s)]
    lines += [f"| | instructions a logit | {' | '.join(f'D={shape.D}, x matmul' for shape in both)} |"]
    lines += ["|---|--:|" + "--:|" * len(both)]

    def row(name: str, count: float | None, ms: list[float]) -> str:
        cells = [f"{one:.2f}, {one / matmul_ms(shape, gpu):.2f}" for one, shape in zip(ms, both, strict=True)]
        return f"| {name} | {'' if count is None else f'{count:.2f}'} | {' | '.join(cells)} |"

    lines += [row("`hidden @ weight.T`", None, [matmul_ms(shape, gpu) for shape in both])]
    for kind, writes in (("forward", 0), ("groups", 4 / 32), ("saved", 2), ("dz", 2)):
        for overlapped in (False, True):
            ms = [
                tile_ms(kind, one, gpu, writes=writes * one.N * one.V, overlapped=overlapped) for one in both
            ]
            lines += [row(kind + ", overlapped" * overlapped, INSTRUCTIONS[kind], ms)]
    for kind in ("forward", "candidates", "trainable", "frozen", "distrl_loss"):
        lines += [row(f"op: {kind}", None, [sum(kernels(kind, one, gpu).values()) for one in both])]
    return "\n".join([*lines, missed(gpu, both)])


def missed(gpu: Rates, both: Sequence[Shape]) -> str:
    """The target of the forward, and by what the model misses it."""
    start = counted(TABLES, "", ("start",))["forward"]

    def ratios(count: float) -> str:
        slower = [1 + count * one.N * one.V / gpu.instructions_per_ms / matmul_ms(one, gpu) for one in both]
        return " / ".join(f"{ratio:.2f}" for ratio in slower)

    whole = INSTRUCTIONS["forward"]
    return TARGET.format(whole=ratios(whole), lean=ratios(whole - start), start=start)


def expected_stream(num_bytes: float) -> float | None:
    """ms of a sequence op on the GPU at hand, None without a model of it."""
    gpu = rates(_device_name())
    return stream_ms(num_bytes, gpu) if gpu else None


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    (TABLES / "README.md").write_text(page(), encoding="utf-8")
