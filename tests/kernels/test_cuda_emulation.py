"""The CUDA kernels (csrc/*.cu) on the CPU: cuda_emulation/ runs a block's threads as fibers, in five orders.

Every case is a process of its own that compares with the definitions in fp64 and wants the same bits whatever
the order of threads; a kernel that reads or writes far out of bounds ends it, not this one. What is left to a
GPU: memory order between blocks, registers, time. The package does not know of the emulation: for users
impl="cuda" on CPU tensors raises as ever.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ipvrm_kernels import backend

HERE = Path(__file__).parent / "cuda_emulation"
CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}"]
SANITIZED = ["-fsanitize=address,signed-integer-overflow,bounds", "-fno-sanitize-recover=all"]
KERNELS = ("sequence_cuda.cu", "policy_cuda.cu", "faulty.cu")
TIMEOUT = 60  # seconds of one case, the longest of which takes 2; all but `full`: 60 of one idle core

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(backend.INTERPRETED, reason="the parent process runs it"),
    pytest.mark.skipif(sys.platform != "linux", reason="fibers and linker sections as on Linux"),
]

SEQUENCES = ("segment_scan", "prefix_values", "prefix_value_loss")
# around the 4 tokens of a thread, the 128 of a warp, the 1024 of a tile; empty ones; several tiles
LENGTHS = (
    "1",
    "0",
    "0,0,1,0",
    "3,0,5",
    "4,31,32,33",
    "127,128,129",
    "1023,1024,1025",
    "2047,1,2049",
    "5000,3",
)
EDGES = ("0,9,50", "-40,7,50", "5,3,60", "2147483647,-2147483648,12", "0,-2147483648,12", "0,2147483647,12")
COUNTS = ("1", "255", "256", "257", "3000")
# of which one must notice each fault of the scan: short ones first
WITNESSES = [(op, lengths) for lengths in ("3,0,5", "127,128,129", "2047,1,2049") for op in SEQUENCES]


def barriers_and_shuffles():
    """(what, line) of each in csrc/sequence_cuda.cu: {id: arguments of the case}."""
    found = {}
    for number, line in enumerate((CSRC / "sequence_cuda.cu").read_text().splitlines(), 1):
        if "__syncthreads()" in line:
            found[f"barrier {1 + sum(x.startswith('barrier') for x in found)} dropped"] = (
                "drop",
                str(number),
            )
        if "__shfl_" in line:
            number_of = 1 + sum(x.startswith("shuffle") for x in found)
            found[f"shuffle {number_of} off by one lane"] = ("shift", str(number))
    return found


LINE_FAULTS = barriers_and_shuffles()
SOURCE_FAULTS = {
    "carry lost": (
        "sequence_cuda.cu", "carry = block_total + tile_power * carry;", "carry = block_total;", WITNESSES[6:]
    ),
    "warps to the left lost": (
        "sequence_cuda.cu", "lane_power * left_warps + thread_power", "thread_power", WITNESSES[3:]
    ),
    "32-bit edges": (
        "sequence_cuda.cu",
        "max(min(int64_t{cu_seqlens[blockIdx.x + 1]}, num_rows) - start, int64_t{0})",
        "static_cast<int>(unsigned(min(cu_seqlens[blockIdx.x + 1], int(num_rows))) - unsigned(start))",
        [("unchecked", EDGES[3])],
    ),
    "one element too many": (
        "policy_cuda.cu", "if (i >= count) return;\n  const Surrogate",  # others leave by the same line
        "if (i > count) return;\n  const Surrogate", [("clipped_surrogate", "257")],
    ),
}  # fmt: skip


def compiled(folder, source, fault=None, flags=()):
    """A process that compiles cases.cpp, or a translated .cu, to folder/<stem>.o."""
    path, stem = source, source.stem
    if source.suffix == ".cu":
        path = folder / f"{stem}.cpp"
        translate = [sys.executable, str(HERE / "translate.py"), str(source), str(path), *(fault or ())]
        subprocess.run(translate, check=True, timeout=TIMEOUT)
    level = "-O0" if stem == "cases" else "-O1"  # the comparisons run as fast, and compile in half the time
    command = [COMPILER, *FLAGS, level, *flags, "-c", str(path), "-o", str(folder / f"{stem}.o")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def built(folder, sources, others=(), fault=None, flags=()):
    """The executable of `sources`, compiled side by side, and other objects."""
    folder.mkdir()
    runs = [compiled(folder, source, fault, flags) for source in sources]
    for run in runs:
        errors = run.communicate(timeout=4 * TIMEOUT)[1]
        assert run.returncode == 0, errors[-4000:]
    objects = [*(folder / f"{source.stem}.o" for source in sources), *others]
    subprocess.run(
        [COMPILER, *flags, *map(str, objects), "-o", str(folder / "cases")], check=True, timeout=TIMEOUT
    )
    return folder / "cases"


def source(name):
    return HERE / name if (HERE / name).is_file() else CSRC / name


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulation") / "right"
    return built(folder, [HERE / "cases.cpp", *map(source, KERNELS)])


def run(executable, *arguments):
    """(exit status, output) of one case, without the note that AddressSanitizer makes of any fibers."""
    result = subprocess.run(
        [str(executable), *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    errors = [
        line for line in result.stderr.splitlines(True) if "doesn't fully support makecontext" not in line
    ]
    return result.returncode, result.stdout + "".join(errors)


def assert_right(executable, *arguments):
    status, output = run(executable, *arguments)
    assert status == 0 and output == "right\n", f"{arguments}: {status}\n{output[-4000:]}"


def assert_caught(executable, witnesses, *fault):
    """Some witness says what is wrong, or its process is ended for a read or write far out of bounds."""
    for op, sizes in witnesses:
        status, output = run(executable, op, sizes, *fault)
        if status != 0:
            assert status < 0 or output.startswith("FAIL "), f"{op} {sizes}: {status}\n{output}"
            return
    pytest.fail("no witness noticed")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("op", SEQUENCES)
def test_emulation_of_sequences(cases, op, lengths):
    assert_right(cases, op, lengths)


@pytest.mark.parametrize("count", COUNTS)
def test_emulation_of_clipped_surrogate(cases, count):
    assert_right(cases, "clipped_surrogate", count)


@pytest.mark.parametrize("edges", EDGES)
def test_emulation_of_unchecked_edges(cases, edges):
    """Read and written within 0 .. N, whatever cu_seqlens holds."""
    assert_right(cases, "unchecked", edges)


def test_emulation_refuses_grids_that_32_bits_would_cut(cases):
    assert_right(cases, "refused_grids", "0")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    probe = subprocess.run(
        [COMPILER, *SANITIZED, "-x", "c++", "-", "-o", str(folder / "probe")],
        input="int main() {}", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip("this compiler has no sanitizers")
    return built(folder / "built", [HERE / "cases.cpp", *map(source, KERNELS)], flags=SANITIZED)


@pytest.mark.full  # its build takes a quarter of the time of this file
def test_emulation_under_sanitizers(sanitized):
    """AddressSanitizer sees every read and write of the fibers, UndefinedBehaviorSanitizer every overflow."""
    few = [("segment_scan", "5,1025"), ("prefix_values", "5"), ("prefix_value_loss", "5")]
    few += [("unchecked", EDGES[3]), ("unchecked", EDGES[0]), ("clipped_surrogate", "257")]
    for case in few:
        assert_right(sanitized, *case)
    status, output = run(sanitized, "faulty", "reads_far_away")
    assert status != 0 and "AddressSanitizer" in output, output[-4000:]


@pytest.mark.full
@pytest.mark.parametrize("op", [*SEQUENCES, "clipped_surrogate", "unchecked"])
def test_every_emulated_case_under_sanitizers(sanitized, op):
    for sizes in {"clipped_surrogate": COUNTS, "unchecked": EDGES}.get(op, LENGTHS):
        assert_right(sanitized, op, sizes)


@pytest.mark.parametrize("fault", LINE_FAULTS)
def test_emulation_catches(cases, fault):
    assert_caught(cases, WITNESSES, *LINE_FAULTS[fault])


def test_emulation_finds_the_barriers_and_shuffles():
    assert set(LINE_FAULTS) == {f"barrier {i} dropped" for i in (1, 2, 3)} | {
        f"shuffle {i} off by one lane" for i in (1, 2, 3)
    }


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_emulation_catches_in_the_source(cases, tmp_path, fault):
    name, old, new, witnesses = SOURCE_FAULTS[fault]
    others = [cases.parent / f"{Path(other).stem}.o" for other in ("cases", *KERNELS) if other != name]
    assert_caught(built(tmp_path / "broken", [CSRC / name], others, (old, new)), witnesses)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("no_barrier", r"out\[0\] = nan, not 40"),
        ("written_again_too_early", r"out\[1\] = 7, not 1"),
        ("seen_in_another_order_only", r"out\[\d+\] = 7, not 1 .*\[descending\]"),
        ("different_barriers", "threads of a block wait at different barriers"),
        ("lane_has_left", "a warp waits for a lane that has left"),
        ("lane_at_a_barrier", "a warp waits for a lane that waits at a barrier"),
        ("different_shuffles", "lanes of a warp wait at different intrinsics"),
        ("lane_outside_the_mask", "a shuffle reads a lane that is not in its mask"),
        ("not_in_its_own_mask", "a lane is not in its own mask"),
        ("writes_behind_the_end", "out is written outside its 64 numbers"),
        ("empty_grid", "a grid of 0 blocks"),
    ],
)
def test_emulation_reports(cases, kernel, said):
    """The instrument itself: what CUDA leaves undefined is said by name."""
    assert_right(cases, "faulty", "right")
    status, output = run(cases, "faulty", kernel)
    assert status == 1 and re.search(said, output), f"{status}\n{output}"
