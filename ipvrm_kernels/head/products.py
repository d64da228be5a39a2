"""The three products of a tile of the CPU head ops: its logits h.w, what its gradient adds to either side.

In fp32 by one of matmul.py's libraries, operands upcast block by block where they are not fp32. In bf16,
where the processor has instructions for it, by oneDNN's kernel for blocks of bf16 matrices, which PyTorch
exports: operands are read as they are or packed (csrc/bf16_cpu.h), sums are fp32, and a tile's gradient is
rounded to bf16 once. The order of a sum does not depend on the shapes, so that there a row's logits do not
depend on its neighbours.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..backend import native_call
from .blocks import Operand, even, padded_terms, reads_bf16
from .matmul import BRGEMM, brgemm, empty, library, multiply, panel_elements, transpose_buffer, transposed


class Products(Protocol):
    """A block of rows of hidden (R, D) and one of weight (C, D) at a time, and what is multiplied of them."""

    def take_rows(self, start: int, stop: int, index: Tensor | None = None) -> int:
        """Rows start .. stop of hidden, or of hidden[index], are the block; its height with padding.

        index: the same at every call, or none at any.
        """
        ...

    def select(self, index: Tensor, rows: int) -> None:
        """Of the block of rows those at `index` are the block now, and zeros up to `rows`."""
        ...

    def take_columns(self, start: int, stop: int) -> None:
        """Rows start .. stop of weight are the block."""
        ...

    def logits(self, z: Tensor) -> None:
        """z (R, C) = h w.T."""
        ...

    def add(
        self, a: Tensor, to_rows: Tensor | None, to_columns: Tensor | None,
        *, first_rows: bool = False, first_columns: bool = False,
    ) -> None:  # fmt: skip
        """to_rows (R, D) += a w and to_columns (C, D) += a.T h, those that are there, of a tile `a` (R, C).

        first_rows, first_columns: of a sum, whose target is overwritten: to_columns by the first rows.
        """
        ...


def make_products(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, rows: int, columns: int,
    *, padded: int = 0, tile: int = 0,
) -> Products:  # fmt: skip
    """The products of blocks of up to so many rows and columns, operands rounded to `dtype`.

    padded: every block of rows is that many, zeros below its last, where a result could depend on it. tile:
    elements of a tile whose gradient is added to columns, else 0.
    """
    if library(dtype) == BRGEMM:
        return Bf16Products(hidden, weight, rows)
    return Fp32Products(hidden, weight, dtype, rows, columns, padded, tile)


class Fp32Products:
    """`Products` of operands in fp32."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, rows: int, columns: int, padded: int,
        tile: int,
    ) -> None:  # fmt: skip
        self.padded, self.most = padded, rows
        self._rows = Operand(hidden, dtype, rows, padded)
        self._columns = Operand(weight, dtype, columns)
        self._transposed = transpose_buffer(tile)
        self._selected: Tensor | None = None

    def take_rows(self, start: int, stop: int, index: Tensor | None = None) -> int:
        self.h, self.real = self._rows.block(start, stop, index), stop - start
        return len(self.h)

    def select(self, index: Tensor, rows: int) -> None:
        if self._selected is None:
            self._selected = self.h.new_empty(self.most, self.h.shape[1])
        torch.index_select(self.h, 0, index, out=self._selected[: len(index)])
        self.h, self.real = self._selected[:rows], rows
        self.h[len(index) :] = 0

    def take_columns(self, start: int, stop: int) -> None:
        self.w = self._columns.block(start, stop)

    def logits(self, z: Tensor) -> None:
        multiply(z, self.h, self.w.T, rows=len(self.h))

    def add(
        self, a: Tensor, to_rows: Tensor | None, to_columns: Tensor | None,
        *, first_rows: bool = False, first_columns: bool = False,
    ) -> None:  # fmt: skip
        if to_rows is not None and self.padded:  # every product has the same shape
            product = a.new_empty(len(a), self.w.shape[1])
            multiply(product, a, self.w, rows=len(a))
            to_rows += product[: self.real]
        elif to_rows is not None:
            multiply(to_rows, a, self.w, rows=len(a), add=not first_columns)
        if to_columns is not None:
            a, h = a[: self.real], self.h[: self.real]
            multiply(to_columns, transposed(a, self._transposed), h, rows=len(h), add=not first_rows)


class Bf16Products:
    """`Products` of operands in bf16: a block of either is packed once for all of the other's."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int) -> None:
        self.hidden, self.weight, self.most = hidden, weight, rows
        self._kernel = brgemm()
        self._buffers: dict[str, Tensor] = {}
        self._of: dict[str, tuple[int, int]] = {}  # the block whose copy or panels a buffer holds

    def take_rows(self, start: int, stop: int, index: Tensor | None = None) -> int:
        x, rows, self._row_block = self.hidden, stop - start, (start, stop)
        if index is None and reads_bf16(x):
            self.h = x[start:stop]
            return rows
        D = x.shape[1]
        self.h = self._buffer("h", self.most * even(D))[: rows * even(D)].view(rows, even(D))
        if self._of.get("h") != self._row_block:
            if index is None:
                self.h[:, :D] = x[start:stop]
            elif x.dtype == self.h.dtype and even(D) == D:
                torch.index_select(x, 0, index[start:stop], out=self.h)
            else:
                self.h[:, :D] = x.index_select(0, index[start:stop])
            self.h[:, D:] = 0
            self._of["h"] = self._row_block
        return rows

    def select(self, index: Tensor, rows: int) -> None:
        D = self.h.shape[1]
        selected = self._buffer("selected", self.most * D)[: rows * D].view(rows, D)
        torch.index_select(self.h, 0, index, out=selected[: len(index)])
        selected[len(index) :] = 0
        self.h, self._row_block = selected, (-1, rows)
        self._of.pop("rows", None)

    def take_columns(self, start: int, stop: int) -> None:
        self.w, self._column_block = self.weight[start:stop], (start, stop)

    def logits(self, z: Tensor) -> None:
        terms = even(self.weight.shape[1])
        self._multiply(z, self.h, self._panels("columns, transposed", terms), terms, add=False)

    def add(
        self, a: Tensor, to_rows: Tensor | None, to_columns: Tensor | None,
        *, first_rows: bool = False, first_columns: bool = False,
    ) -> None:  # fmt: skip
        R, C = a.shape
        wide, high = even(C), padded_terms(R)
        a16 = None if to_rows is None else self._buffer("a", R * wide)[: R * wide].view(R, wide)
        a16_t = None
        if to_columns is not None:
            a16_t = self._buffer("a, transposed", C * high)[: C * high].view(C, high)
        native_call("round_tile_cpu", a, R, C, a16, a16_t, high)
        if to_rows is not None and a16 is not None:
            self._multiply(to_rows, a16, self._panels("columns", wide), wide, add=not first_columns)
        if to_columns is not None and a16_t is not None:
            self._multiply(to_columns, a16_t, self._panels("rows", high), high, add=not first_rows)

    def _multiply(self, out: Tensor, a: Tensor, panels: Tensor, terms: int, *, add: bool) -> None:
        stride = a.stride(0) if len(a) > 1 else terms
        native_call("multiply_panels_cpu", self._kernel, a, stride, panels, *out.shape, terms, out, add)

    def _panels(self, name: str, terms: int) -> Tensor:
        """The block of rows or of columns as the right operand of sums of `terms`, packed once."""
        x, block = (self.h, self._row_block) if name == "rows" else (self.w, self._column_block)
        x = x[:, : self.weight.shape[1]]
        transpose = name == "columns, transposed"
        out = self._buffer(name, panel_elements(terms, len(x) if transpose else x.shape[1]))
        if self._of.get(name) != block:
            if x.stride(1) != 1 or x.dtype not in (torch.bfloat16, torch.float32):
                x = self._buffer("w", x.numel())[: x.numel()].view(x.shape).copy_(x)
            wide = x.dtype == torch.float32
            native_call("pack_panels_cpu", x, wide, *x.shape, x.stride(0), transpose, terms, out)
            self._of[name] = block
        return out

    def _buffer(self, name: str, elements: int) -> Tensor:
        """A reused bf16 buffer of at least so many elements."""
        if name not in self._buffers or len(self._buffers[name]) < elements:
            self._buffers.pop(name, None)  # before the larger one is allocated
            self._of.pop(name, None)
            self._buffers[name] = empty(elements, dtype=torch.bfloat16)
        return self._buffers[name]
