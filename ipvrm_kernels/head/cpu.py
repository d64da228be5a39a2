"""The tile driver of the head ops on the CPU: a library's matmuls, C++ while a tile is in cache.

A tile h.w (R, C) is made by one matmul (matmul.py) into a reused fp32 buffer and finished by
csrc/head_cpu.cpp. Rows are blocked as well as the vocabulary, so scratch memory does not grow with N: a plan
picks R and C so that tile, upcast operands and chunk of dweight fit into `max_workspace_bytes`, 64 MiB by
default. Logits are never rounded; bf16 operands are multiplied as they are where the processor can, else, as
fp16's, upcast block by block (products.py).

Forward: per block of rows one pass over the vocabulary. A frozen head's expectation E = sum_v p_v z'_v w_v is
carried along like a flash attention's output. Backward: per vocabulary chunk the tile again, dz in its place,
dhidden += dz w and dweight = dz.T h; rows without upstream gradient are left out of all three matmuls. Where
the caller allows more memory, z of some or all columns is saved between the two, which saves the first one.
A scalar loss, whose gradient is known as soon as the log-probs are, saves z of a block of rows between the
two passes instead, which saves a matmul (`fused_gradients`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import native_call, native_struct
from . import Transform, transform_derivative
from .blocks import COLUMNS, blocks, make_plan, row_blocks, saved_block, saved_rows
from .matmul import empty, padded_rows, zeros
from .products import make_products

# rows whose z must fit for saving it to pay: frozen head, and trainable, where every block rewrites dweight
LEAST_SAVED = (64, 256)
GATHERED = 2**20  # bytes of gathered weight rows at a time


class CandidateRule(NamedTuple):
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
    saved_z: Tensor  # (N * num_saved,) z of the first `num_saved` columns, a block of COLUMNS after another
    entropy: Tensor  # (N,)
    expectation: Tensor  # (N, D)
    candidate_ids: Tensor  # (N, slots) int64
    candidate_logprobs: Tensor  # (N, slots)
    counts: Tensor  # (N,) int64


def native_transform(transform: Transform) -> Any:
    """csrc's LogitTransform: z = limit * tanh(x * scale), or x * scale without softcap."""
    scale, softcap, temperature = transform.scale, transform.softcap, transform.temperature
    if softcap is None:
        return native_struct("LogitTransform", scale=scale / temperature, limit=0.0)
    return native_struct("LogitTransform", scale=scale / softcap, limit=softcap / temperature)


def bias_block(bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    """bias[start:stop] in fp32, as the native kernels read it."""
    return None if bias is None else bias[start:stop].float().contiguous()


def pair_bytes(weight: Tensor, dtype: torch.dtype) -> int:
    """Scratch memory of one gathered row of weight: as it is, rounded to `dtype`, in fp32."""
    converts = weight.dtype != dtype or dtype != torch.float32
    return weight.shape[1] * (weight.element_size() + converts * (dtype.itemsize + 4))


class Sums(NamedTuple):
    """What a block of rows knows after the last column; views of reused buffers."""

    top: Tensor  # (R,) max z
    sumexp: Tensor  # (R,) fp64 sum exp(z - max)
    sum_z_exp: Tensor | None  # (R,) fp64 sum (z - max) exp(z - max)
    id_z: Tensor  # (R, K) z of the ids that exist, else unwritten
    native: Any  # csrc's RowBlock of these


def sweep(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    *, entropy: bool, expectation: Tensor | None = None, candidates: CandidateRule | None = None,
    saved_z: Tensor | None = None, limit: int | None = None, deterministic: bool = False,
    backward_follows: bool = False,
) -> Iterator[tuple[int, int, Sums]]:  # fmt: skip
    """One pass over the vocabulary for every block of rows r0 .. r1; ids (N, K) contiguous, K may be 0.

    expectation: (N, D) zeros; a block's rows hold sum_v exp(z - max) z'/z'(max) w_v when it is handed out.
    saved_z: (N * num_saved,) takes z of the first `num_saved` columns, by the plan of `saved_columns`.
    backward_follows: under the same `limit`, which then has to hold it too.
    """
    (N, D), V, K = hidden.shape, weight.shape[0], ids.shape[1]
    rule = candidates or CandidateRule(0, -math.inf)
    per_row = 4 * K + (8 * rule.capacity if candidates else 0)
    # a backward cannot refuse any more: a frozen head's gathers, any other one forms products
    gathered = 0 if expectation is None else K * pair_bytes(weight, transform.dtype) + 4 * D
    narrow = backward_follows and weight.dtype != torch.float32
    gradients = backward_follows or expectation is not None
    plan = make_plan(
        op, hidden, weight, transform.dtype, limit, deterministic, N=N, at_least=gathered,
        per_row=per_row + 4 * D * (gradients and deterministic), per_column=4 * D * narrow,
        gathers=backward_follows, gradients=gradients,
    )  # fmt: skip
    new = empty
    R, C, padded = plan
    tile = new(max(R, padded) * C)
    num_saved = 0 if saved_z is None else len(saved_z) // max(N, 1)
    top, sums = new(R), new((2, R), dtype=torch.float64)
    id_z = new(R, K)
    count = new(R if candidates else 0, dtype=torch.int32)
    found = new((R, rule.capacity) if candidates else 0, dtype=torch.int32)
    found_z, threshold = new(found.shape), new(count.shape)
    buffers = native_struct(
        "CandidateBuffers", count=count if candidates else None, ids=found, z=found_z, threshold=threshold,
        slots=rule.slots, capacity=rule.capacity, log_min_prob=rule.log_min_prob,
    )  # fmt: skip
    sum_z_exp = sums[1] if entropy else None
    state = native_struct("RowState", top=top, sumexp=sums[0], sum_z_exp=sum_z_exp)
    native = native_transform(transform)
    of_tile = make_products(hidden, weight, transform.dtype, R, C, padded=padded)
    for r0, r1 in blocks(N, R) if padded else row_blocks(N, R, transform.dtype):
        rows = of_tile.take_rows(r0, r1)
        top.fill_(-math.inf)
        sums.zero_()
        count.zero_()
        threshold.fill_(-math.inf)
        E = None if expectation is None else expectation[r0:r1]
        block = native_struct(
            "RowBlock", rows=r1 - r0, K=K, D=D, ids=ids[r0:r1], id_z=id_z, expectation=E, state=state,
            candidates=buffers,
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            for c0, c1 in blocks(V, C):
                of_tile.take_columns(c0, c1)
                if saved_z is not None and c0 < num_saved:
                    z = saved_block(saved_z, N, c0, c1)[r0:r1]
                else:
                    z = tile[: rows * (c1 - c0)].view(rows, -1)
                of_tile.logits(z)
                native_call("head_forward_tile_cpu", z, c1 - c0, c0, bias_block(bias, c0, c1), native, block)
                if E is not None:
                    of_tile.add(z, E, None)
        yield r0, r1, Sums(top, sums[0], sum_z_exp, id_z, block)


def forward(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    *, entropy: bool = False, expectation: bool = False, candidates: CandidateRule | None = None,
    slots: int = 0, num_saved: int = 0, limit: int | None = None, deterministic: bool = False,
    backward_follows: bool = False,
) -> Forward:  # fmt: skip
    """One pass over the vocabulary for every block of rows; ids (N, K) int64, K may be 0.

    num_saved: `saved_columns` at this limit, for a backward that will be given `saved_z`.
    backward_follows: refuses a `limit` that is too small for it.
    """
    (N, D), V, K = hidden.shape, weight.shape[0], ids.shape[1]
    new, ids = empty, ids.contiguous()
    result = Forward(
        new(N, K), new(N), new(N), new(N * num_saved), new(N if entropy else 0),
        zeros((N, D) if expectation else 0), new((N, slots), dtype=torch.int64), new(N, slots),
        new(N if candidates else 0, dtype=torch.int64),
    )  # fmt: skip
    blocks_done = sweep(
        op, hidden, weight, bias, ids, transform, entropy=entropy, candidates=candidates,
        saved_z=result.saved_z if num_saved else None, limit=None if num_saved else limit,
        expectation=result.expectation if expectation else None, deterministic=deterministic,
        backward_follows=backward_follows and limit is not None and not num_saved,
    )  # fmt: skip
    for r0, r1, sums in blocks_done:
        native_call(
            "head_finish_cpu", sums.native, V, native_transform(transform), result.lse[r0:r1],
            result.lse_low[r0:r1], result.entropy[r0:r1] if entropy else None, result.logprobs[r0:r1],
        )  # fmt: skip
        if candidates:
            native_call(
                "head_candidates_cpu", sums.native, slots, result.candidate_ids[r0:r1],
                result.candidate_logprobs[r0:r1], result.counts[r0:r1],
            )  # fmt: skip
    return result


def partial_sums(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max, sumexp, sum_z_exp) (N,) and z at ids (N, K), -inf where an id is -1; all fp32."""
    N, K = ids.shape
    ids = ids.contiguous()
    sums, id_logits = empty(3, N), empty(N, K)
    for r0, r1, state in sweep(op, hidden, weight, bias, ids, transform, entropy=True):
        assert state.sum_z_exp is not None
        for out, part in zip(sums, (state.top, state.sumexp, state.sum_z_exp), strict=True):
            out[r0:r1] = part[: r1 - r0]
        id_logits[r0:r1] = state.id_z[: r1 - r0].masked_fill(ids[r0:r1] < 0, -math.inf)
    top, sumexp, sum_z_exp = (x.clone() for x in sums)  # outputs of an op may not share memory
    return top, sumexp, sum_z_exp, id_logits


class RowGradients(NamedTuple):
    """Upstream gradients of a block of rows, contiguous fp32, and what follows from them."""

    dlogprobs: Tensor | None  # (N, K)
    ids: Tensor  # (N, K)
    total: Tensor  # (N,) fp64, sum of dlogprobs - dlse
    lse: Tensor
    lse_low: Tensor | None
    dentropy: Tensor | None
    entropy: Tensor
    active: Tensor | None  # (n,) int64 rows with a gradient; None: all
    native: Any  # csrc's RowGradients of these

    @property
    def num_rows(self) -> int:
        return len(self.total) if self.active is None else len(self.active)

    def write_da(
        self, tile: Tensor, out: Tensor, rows: tuple[int, int], col0: int, bias: Tensor | None,
        transform: Any, *, saved: bool,
    ) -> None:  # fmt: skip
        """out (rows, C) = dL/d(h.w + b) of rows r0 .. r1 of `active`; transform: from `native_transform`.

        The tile holds h.w of these rows, or, if `saved`, z of all rows.
        """
        native_call(
            "head_backward_tile_cpu", tile, out, rows[1] - rows[0], tile.shape[1], col0, rows[0], saved,
            bias_block(bias, col0, col0 + tile.shape[1]), transform, self.native,
        )  # fmt: skip


def row_gradients(
    dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, ids: Tensor, V: int,
    lse: Tensor, lse_low: Tensor | None, entropy: Tensor,
) -> RowGradients:  # fmt: skip
    """Sums each row's gradients and finds the rows that have any."""
    dlogprobs, dlse, dentropy = (
        None if x is None else x.float().contiguous() for x in (dlogprobs, dlse, dentropy)
    )
    ids = ids.contiguous()
    N, K = ids.shape
    total, active = empty(N, dtype=torch.float64), empty(N, dtype=torch.uint8)
    native_call("head_row_gradients_cpu", dlogprobs, dlse, dentropy, ids, N, K, V, total, active)
    nonzero = active.nonzero()[:, 0]
    index = None if len(nonzero) == N else nonzero
    native = native_struct(
        "RowGradients", dlogprobs=dlogprobs, ids=ids, K=K, total=total, lse=lse, lse_low=lse_low,
        dentropy=dentropy, entropy=entropy, active=index,
    )  # fmt: skip
    return RowGradients(dlogprobs, ids, total, lse, lse_low, dentropy, entropy, index, native)


def backward(
    op: str, up: RowGradients, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform,
    needs: Sequence[bool], *, saved_z: Tensor | None = None, limit: int | None = None,
    deterministic: bool = False, wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias), empty where not needed; fp32, but dweight in its own dtype unless `wide`.

    saved_z: (N * num_saved,) z that `forward` has saved; it is read, never written.
    """
    (N, D), V, n = hidden.shape, weight.shape[0], up.num_rows
    narrow = needs[1] and not wide and weight.dtype != torch.float32
    plan = make_plan(
        op, hidden, weight, transform.dtype, limit, deterministic, N=n, gathers=up.active is not None,
        per_row=4 * D * deterministic, per_column=4 * D * narrow, gradients=True,
    )  # fmt: skip
    R, C, padded = plan
    dhidden = zeros((n, D) if needs[0] else 0)
    new_dweight = empty if n else zeros  # the first rows' product is written, not added
    dweight = new_dweight((V, D) if needs[1] else 0, dtype=weight.dtype if narrow else torch.float32)
    dbias = zeros(V if needs[2] else 0)
    num_saved = 0 if saved_z is None else len(saved_z) // max(N, 1)
    width = min(COLUMNS, V) if num_saved else C  # of the first blocks
    tile = empty(max(max(R, padded) * C, width))
    chunk = empty((max(C, width), D) if narrow else 0)
    of_tile = make_products(
        hidden, weight, transform.dtype, R, max(C, width), padded=padded, tile=len(tile) if needs[1] else 0
    )
    native = native_transform(transform)
    with torch.autocast("cpu", enabled=False):
        columns = itertools.chain(
            blocks(num_saved, width), ((num_saved + a, num_saved + b) for a, b in blocks(V - num_saved, C))
        )
        for c0, c1 in columns if n else ():
            of_tile.take_columns(c0, c1)
            dw = (chunk[: c1 - c0] if narrow else dweight[c0:c1]) if needs[1] else None
            size = min(R, max(len(tile) // (c1 - c0), 1)) if c0 < num_saved else R
            for r0, r1 in blocks(n, size) if padded else row_blocks(n, size, transform.dtype):
                rows = of_tile.take_rows(r0, r1, up.active)
                a = tile[: rows * (c1 - c0)].view(rows, -1)
                if saved_z is not None and c0 < num_saved:
                    z = saved_block(saved_z, N, c0, c1)
                    up.write_da(z, a, (r0, r1), c0, bias, native, saved=True)
                else:
                    of_tile.logits(a)
                    up.write_da(a, a, (r0, r1), c0, bias, native, saved=False)
                of_tile.add(a, dhidden[r0:r1] if needs[0] else None, dw, first_rows=r0 == 0)
                if needs[2]:
                    dbias[c0:c1] += a[: r1 - r0].sum(0)
            if narrow:
                dweight[c0:c1] = chunk[: c1 - c0]
    return scatter_rows(dhidden, up.active, N), dweight, dbias


def scatter_rows(rows: Tensor, index: Tensor | None, N: int) -> Tensor:
    """(N, D) with `rows` at `index` and 0 elsewhere."""
    if index is None or not rows.numel():
        return rows if index is None or rows.dim() == 1 else rows.new_zeros(N, rows.shape[1])
    return rows.new_zeros(N, rows.shape[1]).index_copy_(0, index, rows)


def fused_gradients(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform,
    dloss_dlogprobs: Callable[[int, int, Tensor], Tensor], needs: Sequence[bool], *,
    limit: int | None = None, deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias) in fp32 of a scalar loss; 0 elements where not needed.

    dloss_dlogprobs(r0, r1, logprobs (r1 - r0, K)) is called once for every row, in order.
    """
    (N, D), (V, K) = hidden.shape, (weight.shape[0], ids.shape[1])
    ids = ids.contiguous()
    R = saved_rows(N, hidden, weight, transform.dtype, limit)
    if not any(needs) or deterministic or R == 0 or min(N, LEAST_SAVED[bool(needs[1])]) > R:
        result = forward(
            op, hidden, weight, bias, ids, transform, limit=limit, deterministic=deterministic,
            backward_follows=any(needs),
        )  # fmt: skip
        dlogprobs = dloss_dlogprobs(0, N, result.logprobs)
        if not any(needs):
            return empty(0), empty(0), empty(0)
        up = row_gradients(dlogprobs, None, None, ids, V, result.lse, result.lse_low, result.entropy)
        return backward(
            op, up, hidden, weight, bias, transform, needs, limit=limit, deterministic=deterministic,
            wide=True,
        )  # fmt: skip

    new = empty
    dhidden = zeros((N, D) if needs[0] else 0)
    dweight, written = new((V, D) if needs[1] else 0), False
    dbias = zeros(V if needs[2] else 0)
    saved_z = [new(R * (c1 - c0)) for c0, c1 in blocks(V, COLUMNS)]  # z of a block of rows, tile by tile
    da_buffer = new(R * min(COLUMNS, V))
    lse, lse_low, top = new(R), new(R), new(R)
    sumexp = new(R, dtype=torch.float64)
    id_z, logprobs = new(R, K), new(R, K)
    native, state = native_transform(transform), native_struct("RowState", top=top, sumexp=sumexp)
    of_tile = make_products(
        hidden, weight, transform.dtype, R, COLUMNS, tile=len(da_buffer) if needs[1] else 0
    )
    with torch.autocast("cpu", enabled=False):
        for r0, r1 in row_blocks(N, R, transform.dtype):
            rows = of_tile.take_rows(r0, r1)
            top.fill_(-math.inf)
            sumexp.zero_()
            block = native_struct("RowBlock", rows=rows, K=K, D=D, ids=ids[r0:r1], id_z=id_z, state=state)
            for (c0, c1), z_of_rows in zip(blocks(V, COLUMNS), saved_z, strict=True):
                z = z_of_rows[: rows * (c1 - c0)].view(rows, -1)
                of_tile.take_columns(c0, c1)
                of_tile.logits(z)
                native_call("head_forward_tile_cpu", z, c1 - c0, c0, bias_block(bias, c0, c1), native, block)
            native_call("head_finish_cpu", block, V, native, lse, lse_low, None, logprobs)
            dlogprobs = dloss_dlogprobs(r0, r1, logprobs[:rows])
            up = row_gradients(dlogprobs, None, None, ids[r0:r1], V, lse, lse_low, lse)
            n = m = up.num_rows
            if n == 0:
                continue
            if up.active is not None:  # the others' place is taken by zeros, up to a size the matmuls like
                m = padded_rows(n, rows, transform.dtype)
                of_tile.select(up.active, m)
            dh = new((m, D)) if up.active is not None and needs[0] else dhidden[r0:r1]
            for (c0, c1), z_of_rows in zip(blocks(V, COLUMNS), saved_z, strict=True):
                z = z_of_rows[: rows * (c1 - c0)].view(rows, -1)
                a = z if up.active is None else da_buffer[: m * (c1 - c0)].view(m, -1)
                a[n:] = 0
                up.write_da(z, a, (0, n), c0, bias, native, saved=True)
                of_tile.take_columns(c0, c1)
                of_tile.add(
                    a, dh if needs[0] else None, dweight[c0:c1] if needs[1] else None,
                    first_rows=not written, first_columns=c0 == 0,
                )  # fmt: skip
                if needs[2]:
                    dbias[c0:c1] += a.sum(0)
            written = True
            if needs[0] and up.active is not None:
                dhidden[r0:r1].index_copy_(0, up.active, dh[:n])
    return dhidden, dweight if written else dweight.zero_(), dbias


def frozen_backward(
    up: RowGradients, weight: Tensor, logprobs: Tensor, expectation: Tensor, transform: Transform,
    limit: int | None = None,
) -> Tensor:  # fmt: skip
    """dhidden = sum_k g_k z'(id_k) w_{id_k} - G E, without the vocabulary; (N, D) fp32."""
    total = up.total[:, None].float()
    dhidden = expectation * -total
    dhidden.masked_fill_(total == 0, 0.0)  # a row without gradient stays 0 whatever its states are
    if up.dlogprobs is None:
        return dhidden
    owned = (up.ids >= 0) & (up.ids < weight.shape[0])
    used_first = torch.sort(owned.to(torch.uint8), dim=1, descending=True, stable=True)[1]
    used = int(owned.sum(1).max()) if owned.numel() else 0  # unused slots cost nothing
    order = used_first[:, :used]
    row_bytes = used * pair_bytes(weight, transform.dtype) + 4 * weight.shape[1]
    size = max(1, min(GATHERED, limit or GATHERED) // row_bytes)
    for r0, r1 in blocks(len(dhidden) if used else 0, size):
        at = order[r0:r1]
        ids, g, log_p, real = (x[r0:r1].gather(1, at) for x in (up.ids, up.dlogprobs, logprobs, owned))
        real &= g != 0
        dz_da = transform_derivative(torch.where(real, log_p + up.lse[r0:r1, None], 0.0), transform)
        rows = weight[torch.where(real, ids, 0).view(-1)].to(transform.dtype).float().view(*ids.shape, -1)
        dhidden[r0:r1] += torch.bmm((torch.where(real, g, 0.0) * dz_da)[:, None, :], rows)[:, 0]
        del rows  # before the next are gathered
    return dhidden
