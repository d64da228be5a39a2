"""A test that sees a wrong tile of the Triton head: many tiles a program and many steps of D, every number of
every tile compared, not what a row's statistics make of them.

The grid of the package (each program works through several tiles, pipelined) against one program for each
tile: one that was read too early, left out or written twice differs in its bits. And against an fp32 matmul,
for what both grids would do wrong. On a GPU at N=1000, D=1032, V=40011 in bf16, 20 times; small in the
interpreter.
"""

import importlib
from typing import NamedTuple

import pytest
import torch

from ipvrm_kernels import backend
from ipvrm_kernels.head import Transform

OP = "linear_logprobs"  # the tests below ask for impl="triton" and skip every other
pytestmark = pytest.mark.usefixtures("only_triton")

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    backward = importlib.import_module("ipvrm_kernels.head.triton_backward")
    tiles = importlib.import_module("ipvrm_kernels.head.triton_tiles")

# of an fp32 sum of products, x the sum of their sizes: the sums are added in different orders
MATMUL = 2.0**-20
# of a bf16 number; the interpreter truncates where a GPU rounds
BF16 = 2.0**-7 if backend.INTERPRETED else 2.0**-8


@pytest.fixture(autouse=True)
def _exact_matmul():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Given(NamedTuple):
    ops: "tiles.Operands"
    z: torch.Tensor  # (N, V) fp32
    ref: torch.Tensor  # (N,) of the saved values
    total: torch.Tensor  # (N,) G
    off: float  # by which a logit may differ from z
    repeats: int


def given(device):
    gpu = device == "cuda"
    N, D, V = (1000, 1032, 40_011) if gpu else (160, 40, 896)
    hidden = torch.randn(N, D, device=device).bfloat16()
    weight = (torch.randn(V, D, device=device) * 2 * D**-0.5).bfloat16()
    ops = forward.operands(hidden, weight, None, Transform(1.0, None, 1.0, torch.bfloat16))
    if not gpu:  # a last tile of which half is padding
        ops = ops._replace(config=ops.config._replace(BLOCK_V=256))
    h, w = hidden.float(), weight.float()
    z = h @ w.T
    off = MATMUL * (h.abs() @ w.abs().T).max().item()
    return Given(
        ops, z, z[:, : ops.config.BLOCK_V].amax(1), torch.randn(N, device=device), off, 20 if gpu else 1
    )


def computed(case, programs):
    """{name: tensor} of every tile of the forward, with group maxima, with saved values, and of dz."""
    ops = case.ops._replace(programs=programs)
    (N, V), S, C, device = case.z.shape, forward.num_splits(ops), tiles.padded_columns(ops), case.z.device

    def nan(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    group_max, merged = nan(N, -(-V // forward.GROUP)), nan(3, N)
    partial, partial_saved = nan(3, S, N), nan(3, S, N)
    values, da = nan(N, C, dtype=torch.bfloat16), nan(N, C, dtype=torch.bfloat16)
    forward._partial_stats(ops, partial, merged, group_max, None)
    forward._partial_stats(ops, partial_saved, merged, None, forward.Saved(case.ref, values))
    lse, zero = torch.logsumexp(case.z, 1), torch.zeros(N, device=device)
    count = torch.full((), N, dtype=torch.int32, device=device)
    ids = torch.empty(N, 0, dtype=torch.int64, device=device)
    rows = backward.Rows(ids, None, lse, zero, zero, case.total, None, count)
    middle = S // 2 * ops.config.BLOCK_V
    first, second = nan(N, middle, dtype=torch.bfloat16), nan(N, C - middle, dtype=torch.bfloat16)
    backward.launch_dz(ops, rows, first, 0, 1.0)
    backward.launch_dz(ops, rows, second, middle, 1.0)
    da[:, :middle], da[:, middle:] = first, second
    return dict(group_max=group_max, partial=partial, partial_saved=partial_saved, values=values, da=da)


def assert_same_bits(got, expected):
    for name, x in got.items():
        bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
        differs = x.view(bits) != expected[name].view(bits)
        assert not differs.any(), f"{name}: {int(differs.sum())} bits differ between grids"


def assert_within(name, got, expected, bound):
    error = (got.double() - expected).abs()
    assert bool((error <= bound).all()), (
        f"{name}: {error.max():.3e} off, at most {bound} expected"
    )  # NaN fails


def assert_right(case, got):
    """Every number against the fp32 matmul's logits z."""
    ops, off, (N, V) = case.ops, case.off, case.z.shape
    C, S = tiles.padded_columns(ops), forward.num_splits(ops)
    z = case.z.double()
    padded = torch.nn.functional.pad(z, (0, C - V), value=-torch.inf)
    groups = padded.view(N, -1, forward.GROUP).amax(2)[:, : got["group_max"].shape[1]]
    assert_within("group_max", got["group_max"], groups, off)
    tile = padded.view(N, S, -1).transpose(0, 1)  # (S, N, BLOCK_V)
    top = tile.amax(2)
    below = tile - top[..., None]
    e = below.exp()
    lse = top + e.sum(2).log()
    mean = torch.where(e > 0, below * e, 0.0).sum(2) / e.sum(2)
    for name in ("partial", "partial_saved"):
        tops, sumexp, sum_z_exp = got[name].double()
        assert_within(f"{name} maxima", tops, top, off)
        assert_within(f"{name} sums of exp", tops + sumexp.log(), lse, off)
        assert_within(f"{name} sums of z exp", sum_z_exp / sumexp, mean, 8 * off)  # 8 > its derivative in z
    relative = BF16 + 4 * off
    values = (z - case.ref[:, None].double()).exp()
    assert_within("values", got["values"][:, :V] / values, torch.ones_like(values), relative)
    dz = -case.total[:, None].double() * (z - torch.logsumexp(z, 1, keepdim=True)).exp()
    assert_within("da", got["da"][:, :V] / dz, torch.ones_like(dz), relative)


def compare(case):
    ops = case.ops
    row_blocks = -(-case.z.shape[0] // ops.config.BLOCK_N)
    num_tiles = row_blocks * forward.num_splits(ops)
    assert ops.programs < num_tiles, "some program has to work through several tiles"
    each = computed(case, num_tiles)
    for _ in range(case.repeats):
        assert_same_bits(computed(case, ops.programs), each)
    assert_right(case, each)


def test_every_tile_is_right(impl, device, same_dot_for_every_row):
    compare(given(device))


if backend.INTERPRETED:
    position, load_tile = tiles._tile_position, tiles._load_tile

    @triton.jit
    def _column_left_out(item, row_blocks, num_columns, ROW_GROUP: tl.constexpr):
        row, column = position(item, row_blocks, num_columns, ROW_GROUP)
        return row, tl.where(column == 1, 0, column)

    @triton.jit
    def _later_tile_of_a_program_is_the_first_again(item, row_blocks, num_columns, ROW_GROUP: tl.constexpr):
        row, column = position(item, row_blocks, num_columns, ROW_GROUP)
        return row, tl.where((item >= tl.num_programs(0)) & (column == 1), 0, column)

    @triton.jit
    def _second_step_of_the_first(x, row, column, num_rows, num_columns, stride, ROWS: tl.constexpr,
                                  COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
        early = tl.where((row == 256) & (column == COLUMNS), 0, column)
        return load_tile(x, row, early, num_rows, num_columns, stride, ROWS, COLUMNS, TMA)


class PhantomColumns:
    """A kernel that takes the vocabulary for `more` columns larger: descriptors pad with zeros."""

    def __init__(self, kernel, at, more):
        self.kernel, self.at, self.more = kernel, at, more

    def __getitem__(self, grid):
        def launch(*arguments, **constexprs):
            arguments = [*arguments]
            arguments[self.at] += self.more
            return self.kernel[grid](*arguments, **constexprs)

        return launch


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a column tile is missing", "group_max: nan off"),
        ("128 phantom zero logits", "partial sums of exp"),
        ("a program's later tile is wrong", "bits differ between grids"),
        ("a step of D is read too early", "group_max"),
        ("dz: a column tile is missing", "da: nan off"),
    ],
    ids=lambda text: text.replace(" ", "_"),
)
def test_seeded_faults_are_caught(impl, device, fault, said, same_dot_for_every_row, monkeypatch):
    if device != "cpu":
        pytest.skip("faults are seeded into the interpreter's kernels")
    case = given(device)  # right without a fault: the test above
    if fault == "a column tile is missing":
        monkeypatch.setattr(forward, "_tile_position", _column_left_out)
    if fault == "128 phantom zero logits":
        kernel = forward._head_stats_kernel
        monkeypatch.setattr(
            forward, "_head_stats_kernel", PhantomColumns(kernel, kernel.arg_names.index("V"), 128)
        )
    if fault == "a program's later tile is wrong":
        monkeypatch.setattr(forward, "_tile_position", _later_tile_of_a_program_is_the_first_again)
    if fault == "a step of D is read too early":
        monkeypatch.setattr(forward, "_load_tile", _second_step_of_the_first)
    if fault == "dz: a column tile is missing":
        monkeypatch.setattr(backward, "_tile_position", _column_left_out)
    with pytest.raises(AssertionError, match=said):
        compare(case)
