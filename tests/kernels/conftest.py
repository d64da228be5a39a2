"""A test that asks for `impl` and `device` runs for each implementation its module's OP has, or says why not.

A module sets OP = "segment_scan" (a row of `backends()`). test_interpreter.py runs the same tests again with
TRITON_INTERPRET=1, in a subprocess, so that one `pytest` covers Triton's kernels on a machine without a GPU.
"""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
    "1"  # a cached graph would call an op by an outdated signature
)

import pytest
import torch

import ipvrm_kernels
from ipvrm_kernels import backend


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
        params += [pytest.param(name, device, id=f"{name}-{device}") for device in runs]
        if not runs:
            reason = backend.why_not(name, devices[-1]) or "covered outside the interpreter"
            mark = pytest.mark.skip(reason=f"impl={name!r}: {reason}")
            params.append(pytest.param(name, devices[-1], id=f"{name}-{devices[-1]}", marks=mark))
    metafunc.parametrize(("impl", "device"), params)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised floating memory reads NaN, so that an output nobody wrote cannot pass."""
    plain_empty, plain_empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_empty_like(*a, **k)))
