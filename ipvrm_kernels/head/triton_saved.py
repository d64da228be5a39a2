"""Gradients and expectations of the head ops in Triton from saved probabilities: no logit is formed twice.

The pass over the vocabulary that yields the statistics also writes, for a block of R rows,

    e[n, v] = exp(z[n, v] - ref[n]) * f[n, v]        f = softcap's derivative (1 without softcap)

in the operands' dtype (bf16 or fp32, whose exponents reach from e**-87 to e**88). ref is any number near
the row's maximum that is known before the pass: the largest of its id logits and of the first tile's.
Saving e in bf16 rounds what would be rounded as da anyway, by 2**-9 relative; logits are never rounded.
With top, sumexp of the merged statistics, gain = logit_scale / temperature, G the row's upstream gradient,

    dense da[n, v] = -G gain f p = r[n] e[n, v],    r = -G gain exp(ref - top) / sumexp

so that with A = e, its entries at the ids replaced by v / r (v: the whole gradient there, dense and sparse
part rounded together, fp32)

    dhidden = diag(r) (A @ weight),  dweight += A.T @ (r * hidden),  dbias += A.T @ r

r is applied in fp32 to the first product and folded into a rounded copy of hidden for the second.
linear_distrl_loss takes three matmuls, two with a frozen head; linear_logprobs with a frozen head two, with
E' = gain exp(ref - top) / sumexp * (A @ weight), A = e with zeros at the ids.

Three kinds of rows need care, all found and treated on the device:
- |top - ref| > FAR: a second launch over those rows alone writes e again with ref = top. Until then a value
  is capped at e**MAX_LIFT, so that nothing overflows in rows that need no second launch. Where no row is far
  that moves nothing, but each block still pays for finding out: a sort of its rows, eight small launches, a
  grid whose programs return at once, and the second launch, of no tiles. Its time has not been measured.
- |r| < SPARSE * |v|: G cancels while single gradients do not, and v / r could overflow. A is v alone, r = 1;
  the dense part that is dropped is below e**FAR * SPARSE < 1e-8 of v.
- no gradient: r = 0 and v = 0, and e is finite: exact zeros. Where the row's logits are not, A is zeroed.

Rows per block: as many as fit the workspace. Every block reads the weight twice more and reads and writes
dweight once more, so below LEAST_ROWS (and for fp16, whose range is too small for e) logits are recomputed
instead (triton_backward.py). That is the whole rule: dtype and workspace.

Estimates, not measured: H200 (790 TFLOP/s bf16, 4.3 TB/s), N=8192, V=151936, D=1024, one matmul 3.2 ms:
- e is written once and read twice, 6 bytes per logit, 7.5 GB or 1.7 ms where nothing overlaps; with 1024
  operations per byte the reads of the two products should hide behind them.
- 1 GiB holds 3,400 rows: 3 blocks; each reads 2 x 0.31 GB of weight and moves 1.2 GB of dweight, 0.4 ms.
- three matmuls 9.7 ms + 1.3 (blocks) + 0 to 1.7: 3.4 to 4.0 matmuls for linear_distrl_loss; for a frozen head
  two, 6.4 ms + 0.4 + 0 to 1.2: 2.1 to 2.5. Recomputation: one matmul more.
- D=4096, one matmul 12.9 ms: the blocks cost 5.2 ms, e still 1.7: 3.4 to 3.5 and 2.1 to 2.2.
- not counted: the epilogue of the pass (one exp per logit, 0.35 ms at 16 per clock and multiprocessor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backend
from .triton_backward import (
    Rows,
    add_column_sums,
    add_product,
    chunk_columns,
    gather_rows,
    gradients,
    launch_dz,
    zero_rows,
)
from .triton_forward import MAX_LIFT, Saved, Stats, id_logits, partial_bytes, stats, stats_rows
from .triton_ids import OutputGradients, id_gradients, output_gradients, patch
from .triton_tiles import Operands, padded_columns, scalar_bytes

FAR = 20.0  # nats between ref and the row's maximum above which e is written again
SPARSE = 1e-17  # of the largest gradient at an id, below which a row's dense part is dropped
assert MAX_LIFT > FAR  # a capped value is always written again where it matters
# rows per block from which saving pays, frozen and trainable head: where the traffic of the blocks, 4 or 12
# bytes per weight, equals the matmul saved, at 184 operations per byte of an H200 (estimated)
LEAST_ROWS = (128, 128) if backend.INTERPRETED else (384, 1024)
CAST_BYTES = 32 << 20  # of an fp32 weight, rounded at a time


def saved_rows(ops: Operands, K: int, entropy: bool, trained: bool, limit: int) -> int:
    """Rows of one block, 0 where logits are recomputed instead: see `saved_bytes`."""
    N, block = ops.hidden.shape[0], ops.config.BLOCK_N
    if ops.hidden.dtype == torch.float16 or N == 0:
        return 0
    fixed, row = saved_bytes(ops, K, entropy)
    most = max(0, limit - fixed) // row
    if most < N:
        most = most // block * block
        if most < LEAST_ROWS[trained]:
            return 0
    num_blocks = -(-N // most)
    return min(N, -(-N // (num_blocks * block)) * block)


def saved_bytes(ops: Operands, K: int, entropy: bool) -> tuple[int, int]:
    """(bytes, bytes for each row of a block) of scratch memory."""
    N, D = ops.hidden.shape
    size = ops.hidden.element_size()
    cast = cast_rows(ops) * D * size if ops.weight.dtype != ops.hidden.dtype else 0
    row = padded_columns(ops) * size + partial_bytes(ops, entropy) + D * size + scalar_bytes(K)
    return ops.copied + N * scalar_bytes(K) + cast, row


def cast_rows(ops: Operands) -> int:
    """Rows of an fp32 weight that are rounded to the operands' dtype at a time."""
    return max(ops.config.BLOCK_V, CAST_BYTES // (ops.hidden.shape[1] * ops.hidden.element_size()))


def project(out: Tensor, a: Tensor, ops: Operands) -> None:
    """out (n, D) fp32 = a (n, V) @ weight."""
    V, step = ops.weight.shape[0], ops.weight.shape[0]
    if ops.weight.dtype != a.dtype:
        step = cast_rows(ops)
    for start in range(0, V, step):
        weight = ops.weight[start : start + step].to(a.dtype)
        add_product(out, a[:, start : start + step], weight, fresh=start == 0)


def saved_stats(ops: Operands, z: Tensor, entropy: bool, values: Tensor) -> tuple[Stats, Saved]:
    """Statistics of the rows, and e in values (n, C); z (n, K): their id logits."""
    tile = ops.config.BLOCK_V
    first = ops._replace(weight=ops.weight[:tile], bias=None if ops.bias is None else ops.bias[:tile])
    ref = stats(first, False).top
    if z.shape[1]:
        ref = torch.maximum(ref, z.amax(1))
    saved = Saved(torch.where(ref.isfinite(), ref, 0.0), values)
    return stats(ops, entropy, saved=saved), saved


def rewrite_far_rows(
    ops: Operands, saved: Saved, top: Tensor, wanted: Tensor | None, scratch: Tensor
) -> Tensor:
    """ref (n,) after e of those rows (if wanted (n,)) that lie FAR from theirs is written with ref = top."""
    far = ((top - saved.ref).abs() > FAR) & top.isfinite()
    if wanted is not None:
        far &= wanted
    ref = torch.where(far, top, saved.ref)
    order = torch.sort((~far).to(torch.int8), stable=True)[1]
    count = far.sum(dtype=torch.int32)
    gather_rows(ops.hidden, order, count, scratch)  # moves nothing where no row is far
    zero, sorted_ref = torch.zeros_like(ref), ref[order]
    rows = Rows(order, None, sorted_ref, zero, zero, zero - 1, None, count)
    launch_dz(ops.of_rows(scratch), rows, saved.values, 0, 1.0, order)
    return ref


def row_factors(
    gain: float, s: Stats, ref: Tensor, up: OutputGradients, active: Tensor, id_da: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(r (n,), v / r (n, K), rows of A to clear (n,)) as the module's docstring says."""
    r = torch.where(active, up.total * (torch.exp(ref - s.top) / s.sumexp) * -gain, 0.0)
    sparse = active & (r.abs() < id_da.abs().amax(1) * SPARSE)
    broken = ~active & ~(s.top.isfinite() & s.sumexp.isfinite())
    r = torch.where(sparse, 1.0, r)
    at_ids = torch.where(active[:, None], id_da / torch.where(r == 0, 1.0, r)[:, None], 0.0)
    return r, at_ids, sparse | broken


def fused_gradients(
    op: str, ops: Operands, ids: Tensor, dloss_dlogprobs: Callable[[int, int, Tensor], Tensor],
    needs: Sequence[bool], limit: int, explicit: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias) in fp32 of a scalar loss, for ids (N, K), K > 0; 0 elements if not needed.

    dloss_dlogprobs(r0, r1, logprobs (r1 - r0, K)) is called once for every row, in order.
    """
    (N, D), (V, K) = ops.hidden.shape, (ops.weight.shape[0], ids.shape[1])
    transform, device = ops.transform, ops.hidden.device
    R = saved_rows(ops, K, False, needs[1], limit) if any(needs) else 0
    if R == 0:
        if any(needs):  # refuses before anything is computed
            chunk_columns(op, ops, K, torch.float32, needs, True, limit, explicit)
        z = id_logits(ops, ids)
        s = stats(ops, False, rows_at_once=stats_rows(op, ops, K, False, limit, explicit))
        logprobs, lse = s.logprobs(z), s.lse()
        up = output_gradients(ids, V, dloss_dlogprobs(0, N, logprobs), None, None)
        if not any(needs):
            return lse.new_empty(0), lse.new_empty(0), lse.new_empty(0)
        remainder = s.lse_remainder(lse)
        return gradients(
            op, ops, torch.float32, ids, logprobs, lse, remainder, lse, up, needs, limit, explicit
        )

    def new(need: bool, *shape: int) -> Tensor:
        return torch.empty(shape if need else (0,), dtype=torch.float32, device=device)

    dhidden, dweight, dbias = new(needs[0], N, D), new(needs[1], V, D), new(needs[2], V).zero_()
    buffer = torch.empty((R, padded_columns(ops)), dtype=ops.hidden.dtype, device=device)
    hidden_buffer = torch.empty((R, D), dtype=ops.hidden.dtype, device=device)
    for r0 in range(0, N, R):
        r1 = min(r0 + R, N)
        rows, at, scratch = ops.of_rows(ops.hidden[r0:r1]), ids[r0:r1], hidden_buffer[: r1 - r0]
        z = id_logits(rows, at)
        s, saved = saved_stats(rows, z, False, buffer[: r1 - r0])
        logprobs, lse, A = s.logprobs(z), s.lse(), saved.values[:, :V]
        up = output_gradients(at, V, dloss_dlogprobs(r0, r1, logprobs), None, None)
        id_da = id_gradients(rows, at, logprobs, lse, lse, up, distinct=False)
        active = (up.dlogprobs != 0).any(1) | (up.total != 0)
        ref = rewrite_far_rows(rows, saved, s.top, active, scratch)
        r, at_ids, cleared = row_factors(transform.scale / transform.temperature, s, ref, up, active, id_da)
        zero_rows(saved.values, cleared)
        patch(at_ids, at, saved.values, 0, V)
        if needs[0]:
            project(dhidden[r0:r1], A, ops)
            dhidden[r0:r1] *= r[:, None]
        if needs[1]:
            torch.mul(rows.hidden, r[:, None], out=scratch)
            add_product(dweight, A.T, scratch.masked_fill_(~active[:, None], 0), fresh=r0 == 0)
        if needs[2]:
            add_column_sums(dbias, A, r)
    return dhidden, dweight, dbias


def saved_expectation(
    ops: Operands, ids: Tensor, entropy: bool, R: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs (N, K), lse (N,), entropy (N,) or empty, E' (N, D)) of a frozen head, R rows at a time."""
    (N, D), (V, K) = ops.hidden.shape, (ops.weight.shape[0], ids.shape[1])
    transform, device = ops.transform, ops.hidden.device

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    logprobs, lse, entropies, expectation = new(N, K), new(N), new(N if entropy else 0), new(N, D)
    buffer = torch.empty((R, padded_columns(ops)), dtype=ops.hidden.dtype, device=device)
    hidden_buffer = torch.empty((R, D), dtype=ops.hidden.dtype, device=device)
    for r0 in range(0, N, R):
        r1 = min(r0 + R, N)
        rows, at = ops.of_rows(ops.hidden[r0:r1]), ids[r0:r1]
        z = id_logits(rows, at)
        s, saved = saved_stats(rows, z, entropy, buffer[: r1 - r0])
        logprobs[r0:r1], lse[r0:r1] = s.logprobs(z), s.lse()
        if entropy:
            entropies[r0:r1] = s.entropy()
        ref = rewrite_far_rows(rows, saved, s.top, None, hidden_buffer[: r1 - r0])
        patch(None, at, saved.values, 0, V)
        project(expectation[r0:r1], saved.values[:, :V], ops)
        factor = torch.exp(ref - s.top) / s.sumexp * (transform.scale / transform.temperature)
        expectation[r0:r1] *= factor[:, None]
    return logprobs, lse, entropies, expectation
