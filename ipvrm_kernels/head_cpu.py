"""The tile driver of the head ops on the CPU: BLAS for the matmuls, C++ while a tile is in cache.

A tile h.w (R, C) is made by one matmul into a reused fp32 buffer and finished by csrc/head_cpu.cpp. Rows are blocked as well as the vocabulary, so scratch memory does not grow with N: a plan picks
R and C so that tile, upcast operands and chunk of dweight fit into `max_workspace_bytes`, 64 MiB by default.
bf16 and fp16 operands are upcast block by block; logits are never rounded.

Forward: per block of rows one pass over the vocabulary. A frozen head's expectation E = sum_v p_v z'_v w_v is
carried along like a flash attention's output. Backward: per vocabulary chunk the tile again, dz in its place,
dhidden += dz w and dweight = dz.T h; rows without upstream gradient are left out of all three matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import native_call
from .head import Transform, transform_slope

WORKSPACE = 64 * 2**20
RESERVE = 2**20  # of it, for what a matmul's views and conversions allocate on the way
ROWS, COLUMNS = 1024, 1024  # of a tile where memory allows: 4 MiB of logits
LEAST = 16  # rows and columns of the smallest tile
FIXED_ROWS = 128  # of every matmul in deterministic mode


class Candidates(NamedTuple):
    """At most `slots` tokens of a row qualify; log_min_prob is -inf for a plain top-k."""

    slots: int
    log_min_prob: float

    @property
    def capacity(self) -> int:
        return 2 * self.slots + 16


class Forward(NamedTuple):
    """What one pass over the vocabulary yields; absent tensors have 0 elements."""

    logprobs: Tensor  # (N, K)
    lse: Tensor  # (N,)
    lse_low: Tensor  # (N,) what rounding lse to fp32 lost; a backward would feel it where |lse| is large
    entropy: Tensor  # (N,)
    expectation: Tensor  # (N, D)
    candidate_ids: Tensor  # (N, slots) int64
    candidate_logprobs: Tensor  # (N, slots)
    counts: Tensor  # (N,) int64


class Operand:
    """Blocks of a matrix's rows in fp32: slices where BLAS reads them as they are, else copies in one buffer.

    `padded_to` makes every block that many rows, zero below its last.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, most: int, padded_to: int = 0) -> None:
        self.x, self.dtype, self.padded = x, dtype, padded_to > 0
        self.direct = reads_directly(x, dtype) and not self.padded
        self.most = max(most, padded_to)
        self.buffer: Tensor | None = None
        self.held = (-1, -1)  # the block in the buffer

    def block(self, start: int, stop: int, rows: Tensor | None = None) -> Tensor:
        """Rows start .. stop of x, or of x[rows]; one operand is always asked with the same rows."""
        if self.direct and rows is None:
            return self.x[start:stop]
        if self.buffer is None:
            self.buffer = self.x.new_empty((self.most, self.x.shape[1]), dtype=torch.float32)
        out = self.buffer[: stop - start]
        if self.held != (start, stop):
            self.held = (start, stop)
            if rows is not None and self.direct:
                torch.index_select(self.x, 0, rows[start:stop], out=out)
            else:
                part = self.x[start:stop] if rows is None else self.x.index_select(0, rows[start:stop])
                out.copy_(part.to(self.dtype) if part.dtype != self.dtype else part)
            if self.padded:
                self.buffer[stop - start :] = 0
        return self.buffer if self.padded else out


def reads_directly(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether slices of x are fp32 operands as they are: no rounding to `dtype`, no upcast, BLAS strides."""
    return x.dtype == dtype == torch.float32 and 1 in x.stride()


class Plan(NamedTuple):
    """Tile sizes; `padded` is the fixed number of rows of every matmul in deterministic mode, else 0."""

    rows: int
    columns: int
    padded: int


def make_plan(
    op: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype, limit: int | None, deterministic: bool,
    *, N: int, per_row: int = 0, per_column: int = 0, gathers: bool = False,
) -> Plan:  # fmt: skip
    """The largest tiles up to ROWS x COLUMNS whose scratch memory fits; refuses with the least that works.

    N: rows of the batch; per_row, per_column: bytes that the caller needs besides tile and operands;
    gathers: rows of hidden are copied even where BLAS could read them.
    """
    V, D = weight.shape
    copied = []  # bytes per row of hidden and of weight
    for x, forced in ((hidden, gathers or deterministic), (weight, False)):
        converts = x.dtype != dtype or dtype != torch.float32
        direct = reads_directly(x, dtype) and not forced
        copied.append(0 if direct else D * (4 + 2 * converts))

    def scratch(R: int, C: int) -> int:
        matrices = 4 * R * C + R * copied[0] + C * copied[1]
        return matrices + R * (per_row + 64) + C * per_column + RESERVE * (limit is None)

    most = WORKSPACE if limit is None else limit
    R, C = min(ROWS, max(N, 1)), min(COLUMNS, V)
    least_rows, least_columns = min(R, LEAST), min(C, LEAST)
    if deterministic:
        R = least_rows = FIXED_ROWS
    least = scratch(least_rows, least_columns)
    if least > most:
        if limit is not None:
            raise ValueError(
                f"{op}: max_workspace_bytes must be at least {least} for impl='cpp', whose smallest tiles need "
                f"that much, got {limit}"
            )
        return Plan(least_rows, least_columns, FIXED_ROWS if deterministic else 0)
    while scratch(R, C) > most:
        if least_rows == R or C > max(R, least_columns):
            C = max(C // 2, least_columns)
        else:
            R = max(R // 2, least_rows)
    return Plan(R, C, FIXED_ROWS if deterministic else 0)


def native_transform(transform: Transform) -> tuple[float, float]:
    """(scale, limit) of csrc's LogitTransform: z = limit * tanh(x * scale), or x * scale without softcap."""
    if transform.softcap is None:
        return transform.scale / transform.temperature, 0.0
    return transform.scale / transform.softcap, transform.softcap / transform.temperature


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def wide_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def add_product(out: Tensor, a: Tensor, b: Tensor, padded: int) -> None:
    """out += a @ b; with `padded` rows in a, of which out has the first, in a matmul of that fixed shape."""
    if padded:
        out += torch.mm(a, b)[: len(out)]
    else:
        out.addmm_(a, b)


def forward(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    *, entropy: bool = False, expectation: bool = False, candidates: Candidates | None = None, slots: int = 0,
    limit: int | None = None, deterministic: bool = False,
) -> Forward:  # fmt: skip
    """One pass over the vocabulary for every block of rows; ids (N, K) int64, K may be 0."""
    (N, D), V, K = hidden.shape, weight.shape[0], ids.shape[1]
    kept = candidates or Candidates(0, -math.inf)
    per_row = 4 * K + (8 * kept.capacity if candidates else 0) + 4 * D * (expectation and deterministic)
    plan = make_plan(op, hidden, weight, transform.dtype, limit, deterministic, N=N, per_row=per_row)
    new = torch.empty
    ids, bias = ids.contiguous(), wide_bias(bias)
    result = Forward(
        new(N, K), new(N), new(N), new(N if entropy else 0), torch.zeros((N, D) if expectation else 0),
        new((N, slots), dtype=torch.int64), new(N, slots), new(N if candidates else 0, dtype=torch.int64),
    )  # fmt: skip
    R, C, padded = plan
    tile = new(max(R, padded) * C)
    top, sums = new(R), new((2, R), dtype=torch.float64)
    id_z = new(R, K)
    count = new(R if candidates else 0, dtype=torch.int32)
    found = new((R, kept.capacity) if candidates else 0, dtype=torch.int32)
    found_z, threshold = new(found.shape), new(count.shape)
    buffers = (
        count if candidates else None, found, found_z, threshold,
        kept.slots, kept.capacity, kept.log_min_prob,
    )  # fmt: skip
    h_blocks = Operand(hidden, transform.dtype, R, padded)
    w_blocks = Operand(weight, transform.dtype, C)
    sum_z_exp = sums[1] if entropy else None
    with torch.autocast("cpu", enabled=False):
        for r0, r1 in blocks(N, R):
            h = h_blocks.block(r0, r1)
            top.fill_(-math.inf)
            sums.zero_()
            count.zero_()
            threshold.fill_(-math.inf)
            block_ids = ids[r0:r1]
            E = result.expectation[r0:r1] if expectation else None
            for c0, c1 in blocks(V, C):
                w = w_blocks.block(c0, c1)
                z = tile[: len(h) * len(w)].view(len(h), len(w))
                torch.mm(h, w.T, out=z)
                native_call(
                    "head_forward_tile_cpu", z, r1 - r0, c1 - c0, c0, None if bias is None else bias[c0:],
                    *native_transform(transform), top, sums[0], sum_z_exp, block_ids, id_z, K, *buffers, E, D,
                )  # fmt: skip
                if E is not None:
                    add_product(E, z, w, padded)
            native_call(
                "head_finish_cpu", top, sums[0], sum_z_exp, block_ids, id_z, r1 - r0, K, V,
                result.lse[r0:r1], result.lse_low[r0:r1], result.entropy[r0:r1] if entropy else None,
                result.logprobs[r0:r1], E, D,
            )  # fmt: skip
            if candidates:
                native_call(
                    "head_candidates_cpu", top, sums[0], *buffers, r1 - r0, slots,
                    result.candidate_ids[r0:r1], result.candidate_logprobs[r0:r1], result.counts[r0:r1],
                )  # fmt: skip
    return result


class Upstream(NamedTuple):
    """Upstream gradients of a block of rows, contiguous fp32, and what follows from them."""

    dlogprobs: Tensor | None  # (N, K)
    ids: Tensor  # (N, K)
    total: Tensor  # (N,) fp64, sum of dlogprobs - dlse
    lse: Tensor
    lse_low: Tensor | None
    dentropy: Tensor | None
    entropy: Tensor
    active: Tensor | None  # (n,) int64 rows with a gradient; None: all

    @property
    def num_rows(self) -> int:
        return len(self.total) if self.active is None else len(self.active)

    def write_slopes(
        self, tile: Tensor, out: Tensor, rows: tuple[int, int], col0: int, bias: Tensor | None,
        transform: Transform, *, kept: bool,
    ) -> None:  # fmt: skip
        """out (rows, C) = dL/d(h.w + b) of rows r0 .. r1 of `active`. The tile holds h.w of these rows, or, if
        `kept`, z of all rows."""
        index = None if self.active is None else self.active[rows[0] :]
        native_call(
            "head_backward_tile_cpu", tile, out, rows[1] - rows[0], tile.shape[1], col0, index,
            0 if index is not None else rows[0], kept and index is not None, kept,
            None if bias is None else bias[col0:], *native_transform(transform), self.dlogprobs, self.ids,
            self.ids.shape[1], self.total, self.lse, self.lse_low, self.dentropy, self.entropy,
        )  # fmt: skip


def make_upstream(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, ids: Tensor, V: int,
    lse: Tensor, lse_low: Tensor | None, entropy: Tensor,
) -> Upstream:  # fmt: skip
    """Sums each row's gradients and finds the rows that have any."""
    dlogprobs, dlse, dentropy = (
        None if x is None else x.float().contiguous() for x in (dlogprobs, dlse, dentropy)
    )
    ids = ids.contiguous()
    N, K = ids.shape
    total, active = torch.empty(N, dtype=torch.float64), torch.empty(N, dtype=torch.uint8)
    native_call("head_upstream_cpu", dlogprobs, dlse, dentropy, ids, N, K, V, total, active)
    index = active.nonzero()[:, 0]
    return Upstream(
        dlogprobs, ids, total, lse, lse_low, dentropy, entropy, None if len(index) == N else index
    )


def backward(
    op: str, up: Upstream, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform,
    needs: Sequence[bool], *, limit: int | None = None, deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden fp32, dweight in weight's dtype, dbias fp32), 0 elements where not needed."""
    (N, D), V, n = hidden.shape, weight.shape[0], up.num_rows
    narrow = needs[1] and weight.dtype != torch.float32
    plan = make_plan(
        op, hidden, weight, transform.dtype, limit, deterministic, N=n, gathers=up.active is not None,
        per_row=4 * D * deterministic, per_column=4 * D * narrow,
    )  # fmt: skip
    R, C, padded = plan
    bias = wide_bias(bias)
    dhidden = torch.zeros((n, D) if needs[0] else 0)
    dweight = torch.zeros((V, D) if needs[1] else 0, dtype=weight.dtype)
    dbias = torch.zeros(V if needs[2] else 0)
    tile = torch.empty(max(R, padded) * C)
    chunk = torch.empty((C, D) if narrow else 0)
    h_blocks = Operand(hidden, transform.dtype, R, padded)
    w_blocks = Operand(weight, transform.dtype, C)
    with torch.autocast("cpu", enabled=False):
        for c0, c1 in blocks(V, C if n else V + 1):
            w = w_blocks.block(c0, c1)
            dw = chunk[: c1 - c0] if narrow else dweight[c0:c1]
            for r0, r1 in blocks(n, R):
                h = h_blocks.block(r0, r1, up.active)
                a = tile[: len(h) * len(w)].view(len(h), len(w))
                torch.mm(h, w.T, out=a)
                up.write_slopes(a, a, (r0, r1), c0, bias, transform, kept=False)
                if needs[0]:
                    add_product(dhidden[r0:r1], a, w, padded)
                a, h = a[: r1 - r0], h[: r1 - r0]
                if needs[1]:
                    dw.addmm_(a.T, h, beta=0 if r0 == 0 else 1)
                if needs[2]:
                    dbias[c0:c1] += a.sum(0)
            if narrow and n:
                dweight[c0:c1] = dw
    return scatter_rows(dhidden, up.active, N), dweight, dbias


def scatter_rows(rows: Tensor, index: Tensor | None, N: int) -> Tensor:
    """(N, D) with `rows` at `index` and 0 elsewhere."""
    if index is None or not rows.numel():
        return rows if index is None or rows.dim() == 1 else rows.new_zeros(N, rows.shape[1])
    return rows.new_zeros(N, rows.shape[1]).index_copy_(0, index, rows)


def frozen_backward(
    up: Upstream, weight: Tensor, logprobs: Tensor, expectation: Tensor, transform: Transform
) -> Tensor:
    """dhidden = sum_k g_k z'(id_k) w_{id_k} - G E, without the vocabulary; (N, D) fp32."""
    dhidden = expectation * -up.total[:, None].float()
    if up.dlogprobs is None:
        return dhidden
    owned = (up.ids >= 0) & (up.ids < weight.shape[0])
    used_first = torch.sort(owned.to(torch.uint8), dim=1, descending=True, stable=True)[1]
    used = int(owned.sum(1).max()) if owned.numel() else 0  # unused slots cost nothing
    order = used_first[:, :used]
    size = max(1, WORKSPACE // 4 // max(1, used * weight.shape[1] * 4))
    for r0, r1 in blocks(len(dhidden) if used else 0, size):
        at = order[r0:r1]
        ids, g, log_p, real = (x[r0:r1].gather(1, at) for x in (up.ids, up.dlogprobs, logprobs, owned))
        slope = transform_slope(torch.where(real, log_p + up.lse[r0:r1, None], 0.0), transform)
        rows = weight[torch.where(real, ids, 0).view(-1)].to(transform.dtype).float().view(*ids.shape, -1)
        dhidden[r0:r1] += torch.bmm((torch.where(real, g, 0.0) * slope)[:, None, :], rows)[:, 0]
    return dhidden
