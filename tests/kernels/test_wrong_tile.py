"""A test that sees a wrong tile of the Triton head: that of `ipvrm_kernels.check` (many tiles a program and
many steps of D, every number of every tile compared), and that it catches the faults seeded here.

On a GPU at N=1000, D=1032, V=40011 in bf16, 20 times; small in the interpreter.
"""

import importlib

import pytest
import torch

from ipvrm_kernels import backend
from ipvrm_kernels.check.judge import Judge

OP = "linear_logprobs"  # the tests below ask for impl="triton" and skip every other
pytestmark = pytest.mark.usefixtures("only_triton")
check = importlib.import_module("ipvrm_kernels.check.wrong_tile")

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
    backward = importlib.import_module("ipvrm_kernels.head.triton_backward")
    tiles = importlib.import_module("ipvrm_kernels.head.triton_tiles")

COMPARED = ("maxima of groups", "partial sums", "partial sums beside saved values", "saved values", "dz")


@pytest.fixture(autouse=True)
def _exact_matmul():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def findings(device):
    judge = Judge()
    check.wrong_tile(judge, device)
    return {finding.what: finding for finding in judge.findings}


def test_every_tile_is_right(impl, device, same_dot_for_every_row):
    found = findings(device)
    assert all(finding.share <= 1 for finding in found.values()), found
    for name in COMPARED:  # between grids, and with the matmul
        assert f"bits of {name}" in found
        assert any(what.startswith(name) for what in found)


def test_a_kernel_with_smaller_tiles_has_a_program_for_each_too(impl, device, monkeypatch):
    """As a tuned.json may have it: of dz and saved values with half the rows, alone in the larger grid."""
    ops, launched = check.draw(device).ops, []
    for kernel in ("saved", "dz"):
        smaller = tiles.DEPARTURES.get((*ops.row, kernel), {}) | dict(BLOCK_N=ops.config.BLOCK_N // 2)
        monkeypatch.setitem(tiles.DEPARTURES, (*ops.row, kernel), smaller)
    monkeypatch.setattr(check, "computed", lambda given, programs: launched.append(programs) or {})
    monkeypatch.setattr(check, "_against_a_matmul", lambda *_: None)
    check.wrong_tile(Judge(), device)
    count = check.counts(ops)
    assert count["dz"] == count["saved"] > count["forward"]
    configs = {kernel: ops.of_kernel(kernel) for kernel in count}
    each = ops._replace(programs=launched[0])
    assert {k: tiles.num_programs(each, configs[k], count[k]) for k in count} == count


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
        ("a column tile is missing", "maxima of groups"),
        ("128 phantom zero logits", "partial sums, of exp"),
        ("a program's later tile is wrong", "bits of partial sums"),
        ("a step of D is read too early", "maxima of groups"),
        ("dz: a column tile is missing", "dz"),
    ],
    ids=lambda text: text.replace(" ", "_"),
)
def test_seeded_faults_are_caught(impl, device, fault, said, same_dot_for_every_row, monkeypatch):
    if device != "cpu":
        pytest.skip("faults are seeded into the interpreter's kernels")
    if fault == "a column tile is missing":  # right without a fault: the test above
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
    wrong = {what for what, finding in findings(device).items() if finding.share > 1}
    assert said in wrong
    if fault.startswith("dz"):
        assert wrong == {"dz"}  # NaN is left in both grids, bit by bit
