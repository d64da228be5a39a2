"""The regression gate's cases under pytest-benchmark, which keeps histories and compares them:

python -m pytest benchmarks/test_cases.py --benchmark-enable --benchmark-only --benchmark-autosave
"""

import functools

import pytest
import torch

from benchmarks import gate


@functools.cache
def built():
    """{(case, contender): the call}, every case checked once."""
    torch.manual_seed(0)
    return {
        (name, key): run
        for name, case, others in gate.cases()
        for key, run in gate.checked(case, (*others, gate.OURS)).items()
    }


def pytest_generate_tests(metafunc):
    metafunc.parametrize("key", [pytest.param(key, id=" / ".join(key)) for key in built()])


def test_case(benchmark, key):
    name, contender = key
    benchmark.group = name
    benchmark.name = contender
    benchmark.pedantic(built()[key], rounds=20, warmup_rounds=2)
