"""What the benchmarks of the head ops share: the table of shapes and inputs, plain random and like a model's.

Plain random rows are nearly flat: no token reaches p = 0.1. What a trained policy does is far from that, and
emission, filtering and skipping all depend on it, so `calibrated` builds rows to a stated histogram: the
paper's mean of 1.33 candidates of p >= 0.1 that hold 96 % of the mass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.suite.headline import BY
from benchmarks.suite.measure import MATMUL, MATMUL_ONEDNN, Row, Target
from ipvrm_kernels.head import matmul
from ipvrm_kernels.torch_private import has_onednn, linear_onednn

K = 8  # ids per row where gradients are taken, unless a shape says otherwise
MIN_PROB = 0.1
SLOTS = 10  # floor(1 / MIN_PROB)
CANDIDATES_PER_ROW = 1.33  # mean number of tokens with p >= MIN_PROB (Table 11 of the paper)
MASS = 0.96  # mean of what they hold together
# share of rows with 1, 2, 3, 4 candidates: its mean is CANDIDATES_PER_ROW
HISTOGRAM = (0.75, 0.19, 0.04, 0.02)
BACKGROUND = 1.5  # standard deviation of the logits of all other tokens before candidates are added


PEAKED_LEVEL = 4.0  # standard deviation of a peaked row's other logits
PEAK = 6.0  # by which its peak exceeds their log-sum-exp, before it moves them a little


class Model(NamedTuple):
    """The head of a published model."""

    name: str
    D: int
    V: int


SPEC = Model("", 1024, 32_000)  # the CPU shape of the performance targets
MODELS = {
    "Qwen3-0.6B": Model("Qwen3-0.6B", 1024, 151_936),
    "Qwen3-0.6B unpadded": Model("Qwen3-0.6B unpadded", 1024, 151_669),  # the tokenizer's own, odd size
    "Qwen3-1.7B": Model("Qwen3-1.7B", 2048, 151_936),
    "Qwen3-8B": Model("Qwen3-8B", 4096, 151_936),
    "Llama-3.2-1B": Model("Llama-3.2-1B", 2048, 128_256),
}


class Shape(NamedTuple):
    N: int
    D: int
    V: int
    dtype: torch.dtype
    K: int = K
    model: str = ""

    def __str__(self) -> str:
        sizes = f"N={self.N} D={self.D} V={self.V} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.model} {sizes}".strip()

    @property
    def flops(self) -> float:
        return 2.0 * self.N * self.D * self.V

    @property
    def axes(self) -> dict[str, int]:
        return dict(N=self.N, D=self.D, V=self.V, K=self.K)


def _of(name: str, N: int, dtype: torch.dtype, ids: int = K) -> Shape:
    model = MODELS.get(name, SPEC)
    return Shape(N, model.D, model.V, dtype, ids, model.name)


# (model, N, K) of what each device can afford: the shapes with targets, and what a full run adds
CPU_DEFAULT = (("", 2048, K),)
CPU_FULL = (
    ("Qwen3-0.6B", 64, K), ("Qwen3-0.6B", 64, 1), ("Qwen3-0.6B", 64, 5), ("Qwen3-0.6B", 64, 10),
    ("Qwen3-0.6B unpadded", 129, K), ("Qwen3-1.7B", 64, K), ("Llama-3.2-1B", 64, K), ("Qwen3-8B", 64, K),
)  # fmt: skip
GPU_DEFAULT = (("Qwen3-0.6B", 8192, K), ("Qwen3-8B", 8192, K))
GPU_FULL = (
    ("Qwen3-0.6B", 64, K), ("Qwen3-0.6B", 8192, 1), ("Qwen3-0.6B", 8192, 5), ("Qwen3-0.6B", 8192, 10),
    ("Qwen3-0.6B unpadded", 8191, K), ("Qwen3-1.7B", 8192, K), ("Llama-3.2-1B", 8192, K),
    ("Qwen3-0.6B", 65_536, K), ("Qwen3-8B", 65_536, K),
)  # fmt: skip


def shapes(device: str, quick: bool) -> list[Shape]:
    """The shapes with targets; for a quick look a small one (CPU) or the first (GPU)."""
    if device == "cuda":
        return [_of(name, N, torch.bfloat16, ids) for name, N, ids in GPU_DEFAULT[: 1 if quick else None]]
    if quick:
        return [Shape(512, 512, 8192, torch.float32)]
    dtypes = [torch.float32]
    if matmul.library(torch.bfloat16) == matmul.BRGEMM:  # elsewhere one bf16 matmul takes seconds
        dtypes.append(torch.bfloat16)
    return [_of(name, N, dtype, ids) for dtype in dtypes for name, N, ids in CPU_DEFAULT]


def more_shapes(device: str) -> Iterator[Shape]:
    """What a full run adds: every model, K in {1, 5, 10}, odd N and V, on a GPU up to 65,536 rows."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, N, ids in GPU_FULL if device == "cuda" else CPU_FULL:
        yield _of(name, N, dtype, ids)


def accuracy_shapes(device: str, quick: bool) -> list[Shape]:
    """One of each dtype, where log-probs are compared with fp64."""
    sizes = (1024, 1024, 151_936) if device == "cuda" else (64, 256, 4096) if quick else (256, 1024, 32_000)
    return [Shape(*sizes, dtype) for dtype in (torch.float32, torch.bfloat16)]


# x the bare matmul: on a CPU at SPEC's sizes, on a GPU in half precision at D = 1024 and at D = 4096
TARGETS = dict(
    forward=(1.0, 1.1, 1.03), candidates=(1.05, 1.25, 1.12), trainable=(3.7, 4.6, 4.3),
    frozen=(2.0, 3.2, 3.2), distrl_loss=(2.9, 3.6, 3.6),
)  # fmt: skip
# on a CPU that multiplies bf16 as it is, in bf16 at SPEC's sizes
BF16_TARGETS = dict(forward=1.3, candidates=1.4, trainable=4.2, frozen=2.2, distrl_loss=3.3)
# of a trainable head that saves its logits ("kept" in the rows of results), on a CPU
SAVED_TARGETS = {torch.float32: 3.0, torch.bfloat16: 3.3}
GROWTH_TARGET = 8.4  # x the time from N = 2048 to 16,384


SIZES = ((2048, 1024, 32_000), (8192, 1024, 151_936), (8192, 4096, 151_936))  # N, D, V of TARGETS' columns


def targets(kind: str, shape: Shape, names: list[str], device: str) -> dict[str, Target]:
    """{contender: its target} for one of TARGETS at a shape that has one, K = 8 where ids have gradients."""
    here = SIZES[1:] if device == "cuda" else SIZES[:1]
    if shape[:3] not in here or (kind not in ("forward", "candidates") and shape.K != K):
        return {}
    limit = TARGETS[kind][SIZES.index(shape[:3])]
    if device == "cpu" and shape.dtype == torch.bfloat16:
        limit = BF16_TARGETS[kind]
    return {name: Target(limit) for name in names}


def with_todays_target(row: Row) -> Row:
    """The row of a file, judged by the target of today where that is a multiple of the matmul's time; a file
    keeps those of its commit."""
    sizes = (row.axes.get("N", 0), row.axes.get("D", 0), row.axes.get("V", 0))
    if row.target_of != MATMUL or sizes not in SIZES:
        return row
    bf16 = sizes == SIZES[0] and "bfloat16" in row.shape
    if row.contender.endswith("logits kept"):
        return replace(row, target=SAVED_TARGETS[torch.bfloat16 if bf16 else torch.float32])
    kinds = dict(linear_candidates="candidates", linear_distrl_loss="distrl_loss")
    steps = [kind for kind in ("trainable", "frozen") if f"{kind} head" in row.shape]
    kind = kinds.get(row.op) or (steps or ["forward"])[0]
    return replace(row, target=BF16_TARGETS[kind] if bf16 else TARGETS[kind][SIZES.index(sizes)])


def matmuls(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The yardsticks: the bare hidden @ weight.T as PyTorch multiplies, and in fp32 on a CPU by oneDNN too:
    it depends on the processor which of the two libraries is the faster."""
    h, w = hidden.detach(), weight.detach()
    found: dict[str, Callable[[], Tensor]] = {MATMUL: lambda: h @ w.T}
    if not h.is_cuda and h.dtype == torch.float32 and torch.backends.mkldnn.is_available() and has_onednn():
        found[MATMUL_ONEDNN] = lambda: linear_onednn(h, w)
    return found


def by(library: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with this library's matmuls in the ops, "blas" or "onednn"."""

    def with_library() -> Any:
        before = os.environ.get(matmul.VARIABLE)
        os.environ[matmul.VARIABLE] = library
        try:
            return run()
        finally:
            if before is None:
                del os.environ[matmul.VARIABLE]
            else:
                os.environ[matmul.VARIABLE] = before

    return with_library


def by_the_other(
    ours: Mapping[str, Callable[[], Any]], shape: Shape, device: str
) -> dict[str, Callable[[], Any]]:
    """The C++ contenders among `ours` once more, by the matmul library that is not the default on this
    processor, where the ops can run on both: variants of their own, in the same rounds. bf16 operands are
    upcast there for the library of fp32."""
    if device != "cpu" or shape.dtype not in (torch.float32, torch.bfloat16):
        return {}
    (library,) = {*matmul.NAMES} - {matmul.library()}
    if shape.dtype == torch.bfloat16:
        if matmul.library(torch.bfloat16) != matmul.BRGEMM:
            return {}
        library = matmul.library()
    if matmul.why_not(library):
        return {}
    return {f"{name}{BY}{library}": by(library, run) for name, run in ours.items() if name.startswith("cpp")}


def inputs(shape: Shape, device: str, level: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) whose logits have standard deviation `level`, ids (N, K); all random."""
    hidden = torch.randn(shape.N, shape.D, device=device).to(shape.dtype)
    weight = (torch.randn(shape.V, shape.D, device=device) * shape.D**-0.5 * level).to(shape.dtype)
    return hidden, weight, torch.randint(0, shape.V, (shape.N, shape.K), device=device)


class Calibrated(NamedTuple):
    """Rows like a trained model's, and what was measured on them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    sampled: Tensor  # (N,) one token a row, drawn among its candidates by their probability
    mean_candidates: float  # tokens of p >= MIN_PROB
    mean_mass: float  # what they hold together
    mean_entropy: float  # nats
    kind: str = "calibrated"

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.mean_candidates:.2f} candidates a row with {100 * self.mean_mass:.1f} % of "
            f"the mass, entropy {self.mean_entropy:.2f}"
        )


def target_probabilities(N: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, len(HISTOGRAM)) fp32: probabilities of each row's candidates, 0 at unused places.

    Counts follow HISTOGRAM as closely as N allows, in random order; the rest of the mass is exponential with
    mean 1 - MASS, cut where the candidates would not fit; what lies above MIN_PROB is split uniformly.
    """
    places = len(HISTOGRAM)
    quantiles = (torch.arange(N) + 0.5) / N
    counts = torch.searchsorted(torch.tensor(HISTOGRAM).cumsum(0)[:-1].contiguous(), quantiles) + 1
    counts = counts[torch.randperm(N, generator=generator)]  # (N,)
    rest = -torch.rand(N, generator=generator).clamp(min=1e-6).log() * (1 - MASS)
    floor = 1.02 * MIN_PROB  # away from the threshold, which rounding would decide
    mass = 1 - rest.clamp(max=0.5)
    used = torch.arange(places) < counts[:, None]
    split = -torch.rand(N, places, generator=generator).clamp(min=1e-6).log() * used
    split = split / split.sum(1, keepdim=True)
    return (floor + (mass - counts * floor)[:, None] * split) * used


@functools.lru_cache(maxsize=1)  # cases of one shape come one after the other, and this costs three matmuls
def calibrated(shape: Shape, device: str) -> Calibrated:
    """Rows of random candidates at `target_probabilities`, over a background of random logits.

    hidden = background + sum_j a_j w_(c_j), with a from the Gram matrix of the candidates' weight rows, so
    that their logits stand above the log-sum-exp of all others as the targets ask. Adding them moves the
    others a little, so the step is repeated.
    """
    N, D, V = shape.N, shape.D, shape.V
    target = target_probabilities(N).to(device)
    used = target > 0
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(shape.dtype)
    ids = torch.randint(0, V, target.shape, device=device)
    rows = weight[ids].float()  # (N, places, D)
    background = torch.randn(N, D, device=device) * BACKGROUND
    gram = rows @ rows.mT + 1e-4 * torch.eye(target.shape[1], device=device)
    wanted_odds = (target.log() - (1 - target.sum(1, keepdim=True)).log()).masked_fill(~used, 0)
    hidden = background
    for _ in range(3):
        lse = _background_lse(hidden, weight, ids)  # (N, 1)
        now = (rows @ hidden[:, :, None])[..., 0]  # (N, places) logits
        missing = (wanted_odds + lse - now).masked_fill(~used, 0)
        inverse = torch.where(used[:, :, None] & used[:, None], gram, torch.eye(gram.shape[1], device=device))
        step = torch.linalg.solve(inverse, missing[..., None])  # (N, places, 1)
        hidden = hidden + (rows * step).sum(1)
    hidden = hidden.to(shape.dtype)
    sampled = ids.gather(1, torch.multinomial(target, 1))[:, 0]
    return Calibrated(hidden, weight, sampled.contiguous(), *measured(hidden, weight))


def peaked(shape: Shape, device: str) -> Calibrated:
    """Rows of a policy that is sure: logits to about 30, one token near p = 1, drawn in every other row; the
    others have drawn one at random. Half precision cannot tell logits of that size 0.06 apart."""
    hidden, weight, ids = inputs(shape, device, level=PEAKED_LEVEL)
    sampled, peak = ids[:, 0].clone(), torch.randint(0, shape.V, (shape.N,), device=device)
    sampled[::2] = peak[::2]
    rows = weight[peak].float()
    wanted = _background_lse(hidden, weight, peak[:, None])[:, 0] + PEAK
    missing = wanted - (hidden.float() * rows).sum(1)
    hidden = (hidden.float() + rows * (missing / rows.square().sum(1))[:, None]).to(shape.dtype)
    return Calibrated(hidden, weight, sampled.contiguous(), *measured(hidden, weight), kind="peaked")


def _background_lse(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """(N, 1) log-sum-exp over all tokens but ids (N, places), a block of rows at a time."""
    parts = []
    for h, i in zip(hidden.to(weight.dtype).split(256), ids.split(256), strict=True):
        z = (h @ weight.T).float()
        parts.append(z.scatter(1, i, -torch.inf).logsumexp(1, keepdim=True))
    return torch.cat(parts)


def measured(hidden: Tensor, weight: Tensor, rows: int = 1024) -> tuple[float, float, float]:
    """Means over the first `rows`: tokens of p >= MIN_PROB, the mass they hold, entropy in nats."""
    counts, mass, entropy = [], [], []
    for h in hidden[:rows].detach().split(256):
        log_p = torch.log_softmax((h @ weight.detach().T).float(), 1)
        p = log_p.exp()
        candidates = p >= MIN_PROB
        counts.append(candidates.sum(1).float())
        mass.append((p * candidates).sum(1))
        entropy.append(-(p * log_p).sum(1))
    return tuple(torch.cat(column).mean().item() for column in (counts, mass, entropy))  # type: ignore[return-value]
