"""conftest.py leaves a process whose CUDA context is dead: seen here with a torch.cuda that says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAKE = """
import torch

torch.cuda.is_initialized = lambda: True

def synchronize():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")

torch.cuda.synchronize = synchronize
"""


@pytest.mark.slow
@pytest.mark.parametrize("worker", [False, True], ids=["pytest alone", "a worker"])
def test_leaves_a_dead_cuda_context(tmp_path, worker):
    (tmp_path / "dead_gpu.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path), str(HERE.parents[1])])
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | (
        {"PYTEST_XDIST_WORKER": "gw0"} if worker else {}
    )
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "-p", "dead_gpu"]
    tests = [str(HERE / "test_packing.py")]
    result = subprocess.run(
        [*command, *tests],
        env=env,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 70, output[-3000:]
    assert "the CUDA context is dead after tests/kernels/test_packing.py::" in output
    assert "CUDA error: an illegal memory access was encountered" in output
    assert output.count("test_packing.py::") <= 3, "tests ran after the first"
