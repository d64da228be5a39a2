"""Seconds of each part of the suite against its budget, printed after the run (2 idle cores)."""

import os
import signal
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

# For `benchmarks`; behind the installed packages, which stay the ones that are tested.
sys.path.append(str(Path(__file__).parents[1]))

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other's cores spin

for number, usual in {  # ignored in a background job or under nohup, and commands leave it at that
    signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL,
}.items():  # fmt: skip
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run of a gate
settings.load_profile("repeatable")

BUDGETS = {
    "interpreter": 180,
    "ahead of time": 120,
    "emulation": 60,
    "install": 120,
    "end to end and faults": 240,
    "kernels": 240,
    "integrations": 300,
}
PARTS = (
    ("test_interpreter", "interpreter"), ("test_ahead_of_time", "ahead of time"),
    ("test_cuda_emulation", "emulation"), ("test_trl", "integrations"), ("test_patch_head", "integrations"),
    ("test_fully_sharded", "integrations"), ("test_vocab_parallel", "integrations"),
    ("test_verl", "integrations"), ("test_server_engine", "integrations"),
    ("test_integrations_readme", "integrations"),
)  # fmt: skip
LONGEST_FIRST = ("test_ahead_of_time", "test_interpreter", "test_benchmarks", "test_install")
_seconds = defaultdict(float)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would start the files of few tests last
        config.option.loadscopereorder = False


def _part(nodeid):
    for word, part in PARTS:
        if word in nodeid:
            return part
    if "test_install" in nodeid:
        return "install"
    return "kernels" if "tests/kernels" in nodeid else "end to end and faults"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("full"):  # `-m 'not slow'` replaces the `-m 'not full'` of pyproject.toml
            item.add_marker(pytest.mark.slow)
    place = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_runtest_logreport(report):
    _seconds[_part(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter):
    for part, seconds in sorted(_seconds.items()):
        over = ", OVER" if seconds > BUDGETS[part] else ""
        terminalreporter.write_line(f"{part}: {seconds:.0f} s of a budget of {BUDGETS[part]} s{over}")


@pytest.fixture(scope="session")
def peak_of():
    """A function that runs another: (highest sum of live CPU tensors meanwhile in bytes, its result)."""
    import torch

    def peak_of(run):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
            result = run()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        return peak, result

    return peak_of
