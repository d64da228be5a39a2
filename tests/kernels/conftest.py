"""A test that asks for `impl` and `device` runs for each implementation its module's OP has, or says why not.

A module sets OP = "segment_scan" (a row of `backends()`). The CPU's head ops run once for each library that
can do their matmuls. test_interpreter.py runs the same tests again with
TRITON_INTERPRET=1, in a subprocess, so that one `pytest` covers Triton's kernels on a machine without a GPU.
"""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
    "1"  # a cached graph would call an op by an outdated signature
)

import numpy as np
import pytest
import torch

import ipvrm_kernels
from ipvrm_kernels import backend
from ipvrm_kernels.head import matmul

DEAD_CONTEXT = 70  # exit status
LONG_IN_THE_INTERPRETER = (  # most of its time: `full`
    "test_a_decay_near_one_keeps_its_digits",
    "test_a_reference_far_below_the_maximum",
    "test_a_row_is_the_same_whatever_surrounds_it",
    "test_a_tiny_old_probability",
    "test_an_empty_shard_adds_nothing",
    "test_an_upstream_gradient_that_is_not_finite_stays_in_its_row",
    "test_any_shape",
    "test_candidates_crowded_in_a_group_and_tied_across_groups",
    "test_composition",
    "test_fp32_master_of_which_no_copy_fits",
    "test_frozen_head_in_row_blocks",
    "test_frozen_inputs",
    "test_gradients_repeat_bitwise",
    "test_gradients_that_cancel_in_sum",
    "test_matches_loop",
    "test_micro_batches_add_up",
    "test_more_slots_than_a_row_can_be_picked_from",
    "test_opcheck",
    "test_option_pairs",
    "test_row_blocks_and_recomputation_agree",
    "test_rules",
    "test_shapes",
    "test_the_accounting_is_close_to_what_is_allocated",
    "test_workspace_is_honoured_or_refused_with_the_least_that_works",
)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items):
    for item in items if backend.INTERPRETED else ():
        if getattr(item, "originalname", item.name) in LONG_IN_THE_INTERPRETER:
            item.add_marker(pytest.mark.full)


def pytest_generate_tests(metafunc):
    if not {"impl", "device"} <= set(metafunc.fixturenames):
        return
    impls = ipvrm_kernels.OPS[metafunc.module.OP]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    params = []
    for name in backend.IMPL_NAMES:
        if name not in impls:
            continue
        runs = [d for d in devices if backend.why_not(name, d) is None]
        if name == "torch" and backend.INTERPRETED:
            runs = []  # the parent process runs it
        params += [pytest.param(name, device, None, id=f"{name}-{device}") for device in runs]
        if name == "cpp" and runs and metafunc.module.OP.startswith("linear_") and not backend.INTERPRETED:
            params += other_matmuls()
        if not runs:
            reason = backend.why_not(name, devices[-1]) or "covered outside the interpreter"
            mark = pytest.mark.skip(reason=f"impl={name!r}: {reason}")
            params.append(pytest.param(name, devices[-1], None, id=f"{name}-{devices[-1]}", marks=mark))
    metafunc.parametrize(("impl", "device", "cpu_matmul"), params, indirect=["cpu_matmul"])


def other_matmuls():
    """The C++ head ops with each matmul library that is not this machine's choice."""
    params = []
    for name in set(matmul.NAMES) - {matmul.library()}:
        reason = matmul.why_not(name)
        skip = () if reason is None else pytest.mark.skip(reason=f"matmuls by {name}: {reason}")
        params.append(pytest.param("cpp", "cpu", name, id=f"cpp-cpu-{name}", marks=skip))
    return params


@pytest.fixture(autouse=True)
def cpu_matmul(request, monkeypatch):
    """The library of the CPU's matmuls: the parameter, or this machine's choice."""
    name = getattr(request, "param", None)
    if name is not None:
        monkeypatch.setenv(matmul.VARIABLE, name)


@pytest.fixture(params=matmul.NAMES)
def library(request, monkeypatch):
    """Each library that can do the CPU's matmuls here."""
    reason = matmul.why_not(request.param)
    if reason is not None:
        pytest.skip(f"matmuls by {request.param}: {reason}")
    monkeypatch.setenv(matmul.VARIABLE, request.param)
    return request.param


@pytest.fixture(scope="session")
def other_triton(tmp_path_factory):
    """A function that installs a version of Triton in a folder of its own, once: the folder."""

    @functools.cache
    def installed(version):
        target = tmp_path_factory.mktemp("triton") / version
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        result = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return target

    return installed


@pytest.fixture
def only_triton(request):
    """For a module that tests what the other implementations do not have."""
    if request.getfixturevalue("impl") != "triton":
        pytest.skip("the driver of impl='triton' alone")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cuda_context(request):
    """Waits for the GPU after each test, so that a fault is that test's own. No CUDA context recovers from
    one, so nothing more runs in this process: pytest-xdist starts another worker, pytest alone ends.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        message = f"the CUDA context is dead after {request.node.nodeid}: {said}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            os.write(2, f"{message}\n".encode())  # os._exit flushes nothing
            os._exit(DEAD_CONTEXT)
        pytest.exit(message, DEAD_CONTEXT)


@pytest.fixture
def same_dot_for_every_row(monkeypatch):
    """For tests of equal bits: the interpreter's tl.dot is NumPy's matmul, whose BLAS on some processors sums
    the last rows of a tile in another order than the first."""
    if not backend.INTERPRETED:
        return

    def dot(a, b, dtype=None):
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype)

    monkeypatch.setattr(np, "matmul", dot)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised floating memory reads NaN, so that an output nobody wrote cannot pass."""
    plain_empty, plain_empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_empty_like(*a, **k)))


@pytest.fixture
def peak_of(request, peak_of):
    """tests/conftest.py's, of CPU tensors; in a test of a GPU, of its allocator, in blocks of 512 bytes."""
    if "device" not in request.fixturenames or request.getfixturevalue("device") != "cuda":
        return peak_of

    def peak_on_gpu(run):
        run()  # a vendor library's own workspace stays allocated
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result

    return peak_on_gpu


class Unchecked(NamedTuple):
    """A batch of N = 12 tokens whose edges are wrong, with guards around every buffer."""

    buffers: list[torch.Tensor]  # (guard + n + guard,) of 7.0 behind every `empty_like`, in their order
    tokens: torch.Tensor  # (N,) ones, NaN around them
    cu_seqlens: torch.Tensor  # (3,)
    touched: torch.Tensor  # (N,) bool: the tokens that the edges, held to 0 .. N, enclose
    guard: int


@pytest.fixture(params=[[0, 9, 50], [-40, 7, 50], [5, 3, 60], [2**31 - 1, -(2**31), 12]], ids=str)
def unchecked(request, monkeypatch):
    """`Unchecked` for the GPU's kernels, with value checks off; the CPU's see checked edges only."""
    impl, device = request.getfixturevalue("impl"), request.getfixturevalue("device")
    if impl not in ("triton", "cuda"):
        pytest.skip("the CPU's implementations see checked edges only")
    monkeypatch.setattr(backend, "checks_values", lambda tensor: False)
    N, guard, bad = 12, 64, request.param
    buffers = []

    def guarded(like, **_):
        buffer = torch.full((guard + like.numel() + guard,), 7.0, device=device)
        buffers.append(buffer)
        return buffer[guard:-guard].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", guarded)
    around = torch.full((guard + N + guard,), float("nan"), device=device)  # what an input must not read
    around[guard:-guard] = 1.0
    clamped = [min(max(edge, 0), N) for edge in bad]
    touched = torch.zeros(N, dtype=torch.bool)
    for start, end in zip(clamped, clamped[1:], strict=False):
        touched[start:end] = True
    cu_seqlens = torch.tensor(bad, dtype=torch.int32, device=device)
    return Unchecked(buffers, around[guard:-guard], cu_seqlens, touched, guard)
