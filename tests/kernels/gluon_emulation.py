"""Runs a Gluon kernel with specialised warps on the CPU, for tests: Gluon has no interpreter.

The functions of the kernel run as they are written, each partition until its next call of what can wait or is
asynchronous, in an order drawn from a seed. What sm_90 does asynchronously may finish whenever it may there:

- a TMA copy spoils its destination with NaN when it starts and has written it when its barrier is told;
- a wgmma reads its operands when it starts, or when it is waited for, whatever lies there by then;
- a barrier counts arrivals and bytes, and waits by the parity of its phase.

Emulated is what the study uses. Layouts, swizzles, registers and proxies are not: tensors are whole arrays.
"""

from __future__ import annotations

import ast
import random
from types import SimpleNamespace

import numpy as np

NAN = float("nan")


class Deadlock(Exception):
    """Every partition waits, and nothing asynchronous is under way."""


class Misuse(Exception):
    """What the hardware leaves undefined."""


class Yielding(ast.NodeTransformer):
    """Makes generators of the functions of partitions: each call of `mbarrier`, `_copy` or `warpgroup_mma` is
    yielded, and what is sent back is its value."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        if isinstance(name, ast.Name) and name.id in ("mbarrier", "_copy", "warpgroup_mma"):
            return ast.Yield(node)
        return node


class Barrier:
    def __init__(self):
        self.count = None

    def init(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0  # phase: how many are over

    def told(self, arrivals=0, num_bytes=0):
        if self.count is None:
            raise Misuse("a barrier is used before its init")
        self.pending -= arrivals
        self.bytes += num_bytes
        if self.pending < 0:
            raise Misuse("more arrivals at a barrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Wait:
    def __init__(self, barrier, parity):
        self.barrier, self.parity = barrier, parity

    def is_over(self):
        return self.barrier.phase & 1 != self.parity


class Shared:
    """Tiles, or barriers, in shared memory; index and permute give views."""

    def __init__(self, data):
        self.data = data

    def index(self, i):
        return self.data[i] if isinstance(self.data, list) else Shared(self.data[i])

    def permute(self, order):
        return Shared(self.data.transpose(order))


class Pointer:
    def __init__(self, array, at=0):
        self.array, self.at = array, at

    def __add__(self, offsets):
        return Pointer(self.array, self.at + offsets)


class Descriptor:
    """Tiles (rows, columns) of x (num_rows, num_columns), zero outside."""

    def __init__(self, x, rows, columns):
        self.x, self.shape, self.dtype, self.layout = x, (rows, columns), np.float32, None
        self.block_type = SimpleNamespace(nbytes=2 * rows * columns)

    def tile(self, row, column):
        out = np.zeros(self.shape, np.float32)
        part = self.x[row : row + self.shape[0], column : column + self.shape[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Products:
    """An accumulator whose matmuls may be under way."""

    def __init__(self, value):
        self.value, self.under_way = value, []

    def add(self, a, b):
        self.value = self.value + a.data @ b.data

    def start(self, a, b, early):
        self.under_way.append(None if early else (a, b))
        if early:
            self.add(a, b)

    def wait(self, left):
        while len(self.under_way) > left:
            operands = self.under_way.pop(0)
            if operands:
                self.add(*operands)
        return self if left else self.value


class Machine:
    """One program. `names` is what a kernel's module takes for Gluon."""

    def __init__(self, program, num_programs, seed):
        self.random = random.Random(seed)
        self.copies = []
        self.gl = SimpleNamespace(
            program_id=lambda axis: program, num_programs=lambda axis: num_programs, static_range=range,
            cdiv=lambda a, b: -(-a // b), float32=np.float32, int64=np.int64, constexpr=None,
            NVMMADistributedLayout=lambda *a, **k: None, SliceLayout=lambda *a: None,
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype), where=np.where,
            arange=lambda start, end, layout: np.arange(start, end), max=lambda x, axis: x.max(axis),
            maximum=np.maximum, abs=np.abs, exp2=np.exp2, cast=lambda x, dtype: x,
            convert_layout=lambda x, layout: x, store=self._store,
            allocate_shared_memory=self._allocate, warp_specialize=self._warp_specialize,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count),
            wait=Wait, expect=self._expect,
            arrive=lambda barrier, count=1, pred=True: barrier.told(count if pred else 0),
        )  # fmt: skip

    @staticmethod
    def _store(pointer, value, mask):
        at = np.asarray(pointer.at)[mask]
        if at.size and not (at.min() >= 0 and at.max() < pointer.array.size):
            raise Misuse("a store is out of bounds")
        pointer.array.reshape(-1)[at] = value[mask]

    @staticmethod
    def _allocate(dtype, shape, layout):
        if layout == "barriers":
            return Shared([Barrier() for _ in range(shape[0])])
        return Shared(np.full(shape, NAN, np.float32))

    def copy(self, descriptor, at, barrier, tile):
        tile.data[...] = NAN
        self.copies.append((descriptor, at, barrier, tile))

    def _land(self):
        descriptor, at, barrier, tile = self.copies.pop(self.random.randrange(len(self.copies)))
        tile.data[...] = descriptor.tile(*at)
        barrier.told(0, -descriptor.block_type.nbytes)

    @staticmethod
    def _expect(barrier, num_bytes):
        barrier.told(0, num_bytes)
        barrier.told(1)

    def warpgroup_mma(self, a, b, acc, is_async):
        products = acc if isinstance(acc, Products) else Products(acc)
        products.start(a, b, early=self.random.random() < 0.5)
        return products

    @staticmethod
    def warpgroup_mma_wait(num_outstanding, deps):
        (products,) = deps
        return products.wait(num_outstanding) if isinstance(products, Products) else products

    def _warp_specialize(self, functions_and_arguments, warps, registers):
        """Each partition is [generator, what its last call gave]; a Wait is over when it says so."""
        partitions = [[function(*arguments), None] for function, arguments in functions_and_arguments]
        while partitions:
            ready = [p for p in partitions if not isinstance(p[1], Wait) or p[1].is_over()]
            if not ready and not self.copies:
                raise Deadlock
            chosen = self.random.randrange(len(ready) + len(self.copies))
            if chosen >= len(ready):
                self._land()
                continue
            partition = ready[chosen]
            try:
                partition[1] = partition[0].send(None if isinstance(partition[1], Wait) else partition[1])
            except StopIteration:
                partitions.remove(partition)
        if self.copies:
            raise Misuse("the program ends before its copies")


def run(kernel, functions, arguments, constexprs, programs, seed, edits=()):
    """Fill what `arguments` point to, by `programs` programs one after another.

    kernel and functions: of triton or Gluon, those that it calls; edits: (text, instead) in their source.
    """
    for text, _ in edits:
        assert sum(text in function.src for function in (kernel, *functions)) == 1, f"not found once: {text}"
    for program in range(programs):
        machine = Machine(program, programs, seed + program)
        tl = SimpleNamespace(
            minimum=min, reshape=np.reshape, permute=np.transpose, split=lambda x: (x[..., 0], x[..., 1]),
            sum=lambda x, axis: x.sum(axis), fma=lambda a, b, c: a * b + c, constexpr=None,
        )  # fmt: skip
        names = dict(
            gl=machine.gl, tl=tl, mbarrier=machine.mbarrier, _copy=machine.copy,
            warpgroup_mma=machine.warpgroup_mma, warpgroup_mma_wait=machine.warpgroup_mma_wait,
        )  # fmt: skip
        for function in (*functions, kernel):
            source = function.src
            for text, instead in edits:
                source = source.replace(text, instead)
            tree = ast.parse(f"from __future__ import annotations\n{source}")
            if "mbarrier.wait" in source:
                tree = ast.fix_missing_locations(Yielding().visit(tree))
            exec(compile(tree, function.fn.__name__, "exec"), names)
        names[kernel.fn.__name__](*arguments, **constexprs)
