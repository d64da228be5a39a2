"""The Gluon study of the head's forward: its functions on the CPU against fp64, its machine code, and its
numbers on a GPU of compute capability 9.0 against the package's."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvrm_kernels import backend, linear_logprobs

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks/gpu/gluon_study.py").is_file():
    pytest.skip("no checkout with benchmarks/ beside the tests", allow_module_level=True)
if not backend.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
sys.path.append(str(ROOT))  # behind the installed packages, which stay the ones that are tested

import gluon_emulation as emulation  # noqa: E402
import test_ahead_of_time as ahead  # noqa: E402

SEEDS = 12
SMALL = dict(
    ROW_GROUP=2, BLOCK_N=8, BLOCK_V=8, BLOCK_D=4, STAGES=3, REGISTERS_OF_SECOND=0, REGISTERS_OF_LOADER=0
)
N, D, V, PROGRAMS = 21, 18, 37, 2  # 3 x 5 tiles of 5 steps each, the last of each padded; 2 programs


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("benchmarks.gpu.gluon_study")


def functions_of(study):
    halves = importlib.import_module("ipvrm_kernels.head.triton_forward")._halves
    return study._tile_position, halves, study._row_sums, study._load, study._multiply


def emulated(study, hidden, weight, unit, seed, constexprs, programs=PROGRAMS, edits=()):
    """The partial statistics (3, S, N)."""
    S = -(-len(weight) // constexprs["BLOCK_V"])
    partial = np.full((3, S, len(hidden)), np.nan, np.float32)
    block = constexprs["BLOCK_D"]
    arguments = (
        emulation.Descriptor(hidden, constexprs["BLOCK_N"] // 2, block),
        emulation.Descriptor(weight, constexprs["BLOCK_V"], block),
        *(emulation.Pointer(one) for one in partial),
        len(hidden), hidden.shape[1], len(weight), unit,
    )  # fmt: skip
    functions = functions_of(study)
    emulation.run(study._gluon_stats_kernel, functions, arguments, constexprs, programs, 1000 * seed, edits)
    return partial


def expected(hidden, weight, unit, BLOCK_V):
    """The same in fp64."""
    z = unit * hidden.astype(np.float64) @ weight.astype(np.float64).T
    tiles = [z[:, at : at + BLOCK_V] for at in range(0, z.shape[1], BLOCK_V)]
    below = [tile - tile.max(1, keepdims=True) for tile in tiles]
    sums = [(np.exp(x).sum(1), (x * np.exp(x)).sum(1)) for x in below]
    return np.stack([[tile.max(1) for tile in tiles], *zip(*sums, strict=True)])


def inputs():
    random = np.random.default_rng(0)
    return (random.standard_normal(shape).astype(np.float32) for shape in ((N, D), (V, D)))


def is_right(partial, hidden, weight, unit, BLOCK_V):
    """Whether they differ from fp64 by no more than logits of fp32, summed in another order, may."""
    off = unit * 2.0**-20 * float((np.abs(hidden) @ np.abs(weight).T).max())
    exact = expected(hidden, weight, unit, BLOCK_V)
    sumexp, sum_z_exp = exact[1:]
    allowed = off * np.stack([np.ones_like(sumexp), 2 * sumexp, 2 * (sumexp + np.abs(sum_z_exp))])
    return bool((np.abs(partial - exact) <= allowed).all())  # NaN is not


def test_gluon_partitions_are_right_in_every_order(study):
    hidden, weight = inputs()
    results = [emulated(study, hidden, weight, 0.7, seed, SMALL) for seed in range(SEEDS)]
    assert all(is_right(result, hidden, weight, 0.7, SMALL["BLOCK_V"]) for result in results)


@pytest.mark.parametrize("stages", [1, 2])
def test_gluon_partitions_with_fewer_stages(study, stages):
    hidden, weight = inputs()
    constexprs = {**SMALL, "STAGES": stages}
    if stages == 1:  # a stage is released one step after it is read
        with pytest.raises(emulation.Deadlock):
            emulated(study, hidden, weight, 1.0, 0, constexprs)
        return
    result = emulated(study, hidden, weight, 1.0, 0, constexprs)
    assert is_right(result, hidden, weight, 1.0, SMALL["BLOCK_V"])


def test_gluon_with_its_own_tiles(study):
    random = np.random.default_rng(1)
    hidden, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((150, 72), (300, 72)))
    hidden[3], weight[280:] = 0.0, -8.0  # ties, and a last tile that is mostly padding
    result = emulated(study, hidden, weight, 1.0, 0, study.constexprs(64), programs=3)
    assert is_right(result, hidden, weight, 1.0, study.CONFIG.BLOCK_V)


FAULTS = {
    "a stage is released by one of its two readers": [
        ("init(empty.index(stage), count=2", "init(empty.index(stage), count=1"),
    ],
    "the loader waits for the other phase": [("step // STAGES & 1 ^ 1", "step // STAGES & 1")],
    "readers wait for the other phase": [
        ("ready.index(stage), step // STAGES & 1", "ready.index(stage), step // STAGES & 1 ^ 1")
    ],
    "a stage is released while its matmul is under way": [
        ("empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0", "empty.index(stage), count=1"),
        ("mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)", "pass"),
    ],
    "matmuls are not waited for before their stage is released": [("num_outstanding=1", "num_outstanding=2")],
    "the last stage of a tile is not released": [("% STAGES), count=1)", "% STAGES), count=1, pred=False)")],
    "the stage before a tile's first is released": [("pred=k > 0", "pred=True")],
    "too few bytes are expected": [("2 * hidden.block_type.nbytes", "hidden.block_type.nbytes")],
    "both halves are the first rows": [("[row + ROWS, k]", "[row, k]")],
    "both halves have one place": [("h_tiles.index(2 * stage + 1)", "h_tiles.index(2 * stage)")],
    "the reduction does not wait": [("num_outstanding=0", "num_outstanding=1")],
    "the vocabulary's tail is not masked": [("if column + BLOCK_V > V:", "if False:")],
    "a padded row is stored": [("sumexp, of_rows), mask=rows < N", "sumexp, of_rows), mask=rows < N + 1")],
    "a stage is skipped": [("            step += 1\n        a =", "            step += 2\n        a =")],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda text: text.replace(" ", "_"))
def test_gluon_emulation_catches(study, fault):
    """In some order at least; without a fault every order is right."""
    hidden, weight = inputs()
    for seed in range(SEEDS):
        try:
            found = emulated(study, hidden, weight, 1.0, seed, SMALL, edits=FAULTS[fault])
            if not is_right(found, hidden, weight, 1.0, SMALL["BLOCK_V"]):
                return
        except (emulation.Deadlock, emulation.Misuse):
            return
        except AttributeError as error:  # a number is asked of matmuls that nobody has waited for
            assert "Products" in str(error)
            return
    pytest.fail("every order gives the right numbers")


def check_machine_code(records, version):
    """Each warpgroup multiplies a step of D by four wgmma whose operands lie in shared memory, the loader
    brings three tiles, a stage is released behind a barrier, nothing spills, and the epilogue is lean."""
    (record,) = records
    assert record["spills"] == 0 and not record["faults"], record
    assert record["wgmma"] == 2 * 4 and record["tma"] == 3, record
    assert record["programs"] == 1 and record["shared"] <= ahead.SHARED_LIMIT[90], record
    rows = {ahead.row_key(record["row"]): record["row"]}
    assert record["epilogue"] <= ahead.MOST["forward", "entropy"], record
    ahead.compare_with_table(rows, ahead.committed(version, study=True), version)


@pytest.mark.slow
def test_gluon_compiles(tmp_path):
    records = ahead.compile_all(tmp_path, (90,), flags=["--gluon"])
    if metadata.version("triton") == ahead.PINNED:
        check_machine_code(records, ahead.PINNED)


@pytest.mark.full
@pytest.mark.parametrize("version", ahead.OTHERS)
def test_gluon_compiles_by_other_versions(version, other_triton, tmp_path):
    check_machine_code(ahead.compile_all(tmp_path, (90,), other_triton(version), flags=["--gluon"]), version)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9.0",
)
def test_gluon_on_cuda(study):
    """Many tiles a program, 20 times the same bits, and the log-probs of the package."""
    N, D, V = 1000, 1032, 40_011
    hidden = torch.randn(N, D, device="cuda").bfloat16()
    weight = (torch.randn(V, D, device="cuda") * 2 * D**-0.5).bfloat16()
    sampled = torch.randint(V, (N,), device="cuda")
    results = [study.forward(hidden, weight, sampled) for _ in range(20)]
    for name, *found in zip(results[0]._fields, *results, strict=True):
        assert all(torch.equal(one, found[0]) for one in found), f"{name}: other bits in another run"
    ours = linear_logprobs(hidden, weight, sampled, return_entropy=True, impl="triton")
    off = 2.0**-20 * float((hidden.float().abs() @ weight.float().abs().T).max())
    for name, got, right in zip(ours._fields, results[0], ours, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=8 * off, msg=lambda text, n=name: f"{n}: {text}")


def test_gluon_refuses_what_it_is_not_written_for(study):
    with pytest.raises(ValueError, match="must be bf16 on a GPU of compute capability 9.0"):
        study.forward(torch.randn(4, 8), torch.randn(5, 8), torch.zeros(4, dtype=torch.int64))
