"""How the CPU head ops cut rows and vocabulary into blocks, so that scratch memory is flat in N."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .matmul import BRGEMM, library, panel_elements, transient_bytes, whole_rows

WORKSPACE = 64 * 2**20
RESERVE = 2**20  # of it, for what a matmul's views and conversions allocate on the way
ROWS, COLUMNS = 1024, 1024  # of a tile where memory allows: 4 MiB of logits
LEAST = 16  # rows and columns of the smallest tile
FIXED_ROWS = 128  # of every matmul in deterministic mode


class Operand:
    """Blocks of a matrix's rows in fp32: slices where a matmul reads them as they are, else copies.

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
    """Whether slices of x are fp32 operands as they are: no rounding to `dtype` or upcast, BLAS's strides."""
    return x.dtype == dtype == torch.float32 and 1 in x.stride()


def even(n: int) -> int:
    return n + n % 2


def padded_terms(n: int) -> int:
    """So many terms has a sum over n rows, zeros behind: multiples of 64, and powers of two below, since
    oneDNN makes a kernel for every number and keeps it, and n is another at every step of a training."""
    return -(-n // 64) * 64 if n > 32 else 1 << max(n - 1, 1).bit_length()


def reads_bf16(hidden: Tensor) -> bool:
    """Whether the bf16 kernel reads rows of hidden as they are."""
    D = hidden.shape[1]
    return hidden.dtype == torch.bfloat16 and D % 2 == 0 and hidden.stride(1) == 1 and hidden.stride(0) >= D


def bf16_bytes(R: int, C: int, hidden: Tensor, weight: Tensor, *, gathers: bool, gradients: bool) -> int:
    """What `Bf16Products` take for blocks of R rows and C columns, at most."""
    D = weight.shape[1]
    elements = panel_elements(even(D), C)
    if gathers or not reads_bf16(hidden):
        elements += R * even(D)
        if gathers and (hidden.dtype != torch.bfloat16 or D % 2):  # on the way
            elements += R * D * hidden.element_size() // 2
    if weight.stride(1) != 1 or weight.dtype == torch.float16:
        elements += C * D
    if gradients:
        terms = padded_terms(R)
        elements += panel_elements(even(C), D) + R * even(C) + (panel_elements(terms, D) + C * terms)
    return 2 * elements


class Plan(NamedTuple):
    """Tile sizes; `padded` is the fixed number of rows of every matmul in deterministic mode, else 0."""

    rows: int
    columns: int
    padded: int


def make_plan(
    op: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype, limit: int | None, deterministic: bool,
    *, N: int, per_row: int = 0, per_column: int = 0, at_least: int = 0, gathers: bool = False,
    gradients: bool = False,
) -> Plan:  # fmt: skip
    """The largest tiles up to ROWS x COLUMNS whose scratch memory fits; refuses with the least that works.

    N: rows of the batch; per_row, per_column: bytes that the caller needs besides tile and operands;
    at_least: bytes that a later step needs by itself; gathers: rows of hidden are copied even where a
    matmul could read them; gradients: of hidden or weight are formed, or the expectation, by further matmuls.
    """
    V, D = weight.shape
    in_bf16 = library(dtype) == BRGEMM
    copied = []  # bytes per row of hidden and of weight
    for x, forced in ((hidden, gathers or deterministic), (weight, False)):
        converts = x.dtype != dtype or dtype != torch.float32
        direct = reads_directly(x, dtype) and not forced
        copied.append(0 if direct else D * (4 + 2 * converts))

    def scratch(R: int, C: int) -> int:
        if in_bf16:
            matrices = 4 * R * C + bf16_bytes(R, C, hidden, weight, gathers=gathers, gradients=gradients)
        else:
            matrices = 4 * R * C + R * copied[0] + C * copied[1] + transient_bytes(R, C, D, gradients)
        return max(matrices + R * (per_row + 64) + C * (per_column + 4) + RESERVE * (limit is None), at_least)

    most = WORKSPACE if limit is None else limit
    R, C = min(ROWS, max(N, 1)), min(COLUMNS, V)
    least_rows, least_columns = min(R, LEAST), min(C, LEAST)
    if deterministic:
        R = least_rows = FIXED_ROWS
    least = scratch(least_rows, least_columns)
    if least > most:
        if limit is not None:
            raise ValueError(
                f"{op}: max_workspace_bytes must be at least {least} for impl='cpp', what its smallest tiles "
                f"need, got {limit}"
            )
        return Plan(least_rows, least_columns, FIXED_ROWS if deterministic else 0)
    while scratch(R, C) > most:
        if least_rows == R or max(R, least_columns) < C:
            C = max(C // 2, least_columns)
        else:
            R = max(R // 2, least_rows)
    return Plan(R, C, FIXED_ROWS if deterministic else 0)


def saved_columns(
    op: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype, limit: int | None, per_row: int
) -> int:
    """Columns whose z of all rows fits into what `limit` allows beyond WORKSPACE: all, or whole blocks."""
    (N, V), block = (hidden.shape[0], weight.shape[0]), min(COLUMNS, weight.shape[0])
    free = 0 if limit is None else limit - WORKSPACE
    if free < 4 * N * block or N == 0:
        return 0
    narrow = 4 * weight.shape[1] * (weight.dtype != torch.float32)  # as the backward's plan has it
    passes = (
        make_plan(op, hidden, weight, dtype, None, False, N=N, per_row=per_row),
        make_plan(
            op, hidden, weight, dtype, None, False, N=N, per_column=narrow, gathers=True, gradients=True
        ),
    )
    if min(plan.columns for plan in passes) < block:  # D so large that a pass takes narrower tiles
        return 0
    return min(V, free // (4 * N) // COLUMNS * COLUMNS) if free < 4 * N * V else V


def saved_block(saved_z: Tensor, N: int, start: int, stop: int) -> Tensor:
    """z (N, stop - start) of columns that are one block of COLUMNS, or the last, narrower one."""
    return saved_z[N * start : N * stop].view(N, stop - start)


def saved_rows(N: int, hidden: Tensor, weight: Tensor, dtype: torch.dtype, limit: int | None) -> int:
    """Rows whose z fits into the workspace beside everything else, at most N; for `row_blocks`."""
    V, D = weight.shape
    C = min(COLUMNS, V)
    free = WORKSPACE - RESERVE if limit is None else limit
    in_bf16 = library(dtype) == BRGEMM
    if not in_bf16 and not reads_directly(weight, dtype):
        free -= 6 * D * C

    def scratch(R: int) -> int:
        if in_bf16:  # rows are gathered from the block, and their gradient stands apart
            own = R * (4 * (V + C) + 4 * D + 2 * even(D) + 64)
            return own + bf16_bytes(R, C, hidden, weight, gathers=False, gradients=True)
        return R * (4 * (V + C) + 14 * D + 64) + transient_bytes(R, C, D, True)

    most = bisect.bisect_right(range(N + 1), free, key=scratch) - 1
    if most <= 0 or most >= N:
        return max(min(most, N), 0)
    # as few blocks, or fast ones
    return -(-N // -(-N // most)) if library(dtype) != "onednn" else whole_rows(most, dtype)


def row_blocks(total: int, size: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """`blocks` in sizes that the matmuls are fast at; what is left is a block of its own."""
    whole = whole_rows(total, dtype)
    yield from blocks(whole, whole_rows(size, dtype))
    yield from ((whole + start, whole + stop) for start, stop in blocks(total - whole, size))


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
