"""The GPU report's logic against a fake GPU: parts that sleep, die, ignore signals, hang; a probe that fails.

Everything called FAKE is invented for these tests and stands in no results folder.
"""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "run.py").is_file():
    pytest.skip("no checkout with benchmarks/ beside the tests", allow_module_level=True)

import ipvrm_kernels  # noqa: E402
from benchmarks import gpu_report, render, run  # noqa: E402
from benchmarks.gpu import evidence, gluon_study, headline, model_heads, probe, process, sweep, wheels  # noqa: E402
from benchmarks.gpu.process import Part, run_part  # noqa: E402
from benchmarks.suite import heads, machine, measure, roofline, session  # noqa: E402
from benchmarks.suite.measure import Case, DeadContext, Row  # noqa: E402
from ipvrm_kernels.backend import HAS_CPP  # noqa: E402

TILED = ("_head_stats_kernel", "_head_dz_kernel")
FAKE_MACHINE = dict(
    date="2000-01-01 00:00:00 +0000", command="FAKE", commit="fake", modified=False, device="FAKE GPU",
    cpu="FAKE", cores=1, threads=1, versions=dict(torch="0"), cuda=None,
)  # fmt: skip


def row(contender, ms, **more):
    return Row("op", "shape", contender, ms, ms, ms, ms, 1.0, None, None, 5, **more)


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Parts of a second instead of many."""
    monkeypatch.setattr(process, "LEAST", 0.2)
    monkeypatch.setattr(process, "DUMP", 0.7)
    monkeypatch.setattr(process, "GONE", 1.0)
    monkeypatch.setattr(gpu_report, "REST", 0.1)


# --------------------------------------------------------------------------------- one part, one process


def test_a_part_passes_fails_or_says_why_it_does_not_run(tmp_path):
    log = tmp_path / "log"
    done = run_part(Part("a", python("print('fine')"), 1), 20, log)
    assert done["status"] == "passed" and done["tail"] == ["fine"] and "reruns" not in done
    assert run_part(Part("a", python("import sys; sys.exit(3)"), 1), 20, log)["status"] == "failed (exit 3)"
    assert "budget is spent" in run_part(Part("a", [], 1), 0.1, log)["status"]
    assert run_part(Part("a", [""], 1, "no ncu"), 50, log)["status"] == "not run: no ncu"
    missing = run_part(Part("a", [str(tmp_path / "none")], 1), 20, log)
    assert missing["status"].startswith("failed (") and "none" in missing["status"]


@pytest.mark.slow
def test_a_part_that_sleeps_writes_its_stacks_before_its_limit(tmp_path):
    log = tmp_path / "log"
    inner = "import time\ndef deep_inside():\n    time.sleep(60)\ndeep_inside()"
    code = f"import subprocess; print('begun', flush=True); subprocess.run({python(inner)!r})"
    start = time.monotonic()
    stopped = run_part(Part("a", python(code), 1), 4.0, log)
    assert stopped["status"] == "stopped at its limit of 4 s" and time.monotonic() - start < 4.5
    text = log.read_text()
    # its child's too; both write at once
    assert text.startswith("begun") and text.count("Fatal Python error: ") == text.count("Aborted") == 2
    assert "in deep_inside" in text and "subprocess.py" in text


IGNORES = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
print('deaf', flush=True)
while True:
    time.sleep(1)
"""
BLOCKS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
print('deaf', flush=True)
while True:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [IGNORES, BLOCKS], ids=["ignores", "blocks"])
def test_a_part_that_is_deaf_to_signals_ends_at_its_limit(code, tmp_path):
    start = time.monotonic()
    result = run_part(Part("a", python(code), 1), 1.5, tmp_path / "log")
    assert result["status"] == "stopped at its limit of 2 s" and result["tail"] == ["deaf"]
    assert 1.4 < time.monotonic() - start < 2.2


@pytest.mark.slow
def test_a_process_that_cannot_be_killed_is_not_waited_for(monkeypatch, tmp_path):
    """As one that waits inside a driver."""
    plain = process._signal
    real = []
    monkeypatch.setattr(process, "_signal", lambda running, *_: real.append(running))
    start = time.monotonic()
    result = run_part(Part("a", python("import time; time.sleep(60)"), 1), 1.0, tmp_path / "log")
    assert result["status"] == "stopped at its limit of 1 s, and it could not be killed"
    assert time.monotonic() - start < 3.0
    plain(real[0], 9)
    real[0].wait(5)


@pytest.mark.slow
def test_a_part_that_dies_says_how_and_leaves_nobody_behind(tmp_path):
    log = tmp_path / "log"
    code = "import os, signal; print('about to', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    died = run_part(Part("a", python(code), 1), 20, log)
    assert died["status"] == "failed (exit -11)" and "Segmentation fault" in log.read_text()
    child = f"import time; time.sleep(0.8); open({str(tmp_path / 'lived')!r}, 'w')"
    code = f"import subprocess; subprocess.Popen({python(child)!r})"
    assert run_part(Part("a", python(code), 1), 20, log)["status"] == "passed"
    time.sleep(1.2)
    assert not (tmp_path / "lived").exists()


def dies_twice(folder):
    """A part whose context dies twice: it appends a line each time, and wants GO_ON from the second on."""
    code = (
        "import sys; from pathlib import Path; p = Path(sys.argv[1])\n"
        "n = len(p.read_text()) if p.exists() else 0\n"
        "assert ('--go-on' in sys.argv) == (n > 0)\n"
        "p.write_text('x' * (n + 1)); print('process', n, flush=True); sys.exit(70 if n < 2 else 0)"
    )
    return [*python(code), str(folder / "count")]


@pytest.mark.slow
def test_a_part_goes_on_in_a_fresh_process_after_a_cuda_error(monkeypatch, tmp_path):
    log = tmp_path / "log"
    result = run_part(Part("a", dies_twice(tmp_path), 1, goes_on=True), 20, log)
    assert result["status"] == "passed" and result["reruns"] == 2
    assert log.read_text().splitlines() == ["process 0", "process 1", "process 2"]
    (tmp_path / "count").unlink()
    assert run_part(Part("a", dies_twice(tmp_path), 1), 20, log)["status"] == "failed (exit 70)"
    always = Part("a", python("import sys; sys.exit(70)"), 1, goes_on=True)
    monkeypatch.setattr(process, "RERUNS", 2)
    assert run_part(always, 20, log) | dict(seconds=0) == dict(
        seconds=0, command=" ".join(always.command[1:]), tail=[], status="failed (exit 70)", reruns=2
    )
    slow = Part("a", python("import sys, time; time.sleep(0.6); sys.exit(70)"), 1, goes_on=True)
    assert run_part(slow, 1.5, log)["seconds"] < 2.5  # reruns share the part's limit


# ------------------------------------------------------------------------------- the report from end to end


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Runs the report on FAKE parts and a probe that answers while the file `dead` is not there."""
    out, dead = tmp_path / "out", tmp_path / "dead"

    def probe_part(file):
        code = (
            f"import sys; from pathlib import Path\nif Path({str(dead)!r}).exists(): sys.exit('no answer')\n"
            f"Path({str(file)!r}).write_text({json.dumps(FAKE_MACHINE)!r})"
        )
        return Part("probe", python(code), 1)

    monkeypatch.setattr(gpu_report, "probe_part", probe_part)

    def report(make_parts, *flags):
        monkeypatch.setattr(gpu_report, "parts", make_parts)
        code = gpu_report.main(["--out", str(out), *flags])
        files = list(out.glob("*.json"))
        return code, json.loads(files[0].read_text()) if files else None

    return types.SimpleNamespace(run=report, out=out, dead=dead)


def wrote(file, *rows):
    content = json.dumps(dict(rows=[r.as_dict() for r in rows]))
    return f"from pathlib import Path; Path({str(file)!r}).write_text({content!r})"


@pytest.mark.slow
def test_the_dry_run_of_everything_that_goes_wrong(fake_gpu, capsys):
    def parts(folder):
        rows = wrote(folder / "bench_b.json", row("triton", 1.0, expected_ms=0.8))
        hang = f"{rows}; import time; time.sleep(60)"
        return [
            Part("build", python("print('built')"), 3, needed=True),
            Part("bench_b", python(hang), 1),
            Part("small", python(IGNORES), 1),
            Part("ncu", [""], 1, "ncu is not installed"),
            Part("c", dies_twice(folder), 3, goes_on=True),
            Part("bench_silent", python("print('nothing')"), 3),
            Part("d", python(f"open({str(fake_gpu.dead)!r}, 'w'); import os; os.abort()"), 3),
            Part("never", python("print('not reached')"), 3),
        ]

    start = time.monotonic()
    code, content = fake_gpu.run(parts, "--budget", "16")
    assert code == 1 and time.monotonic() - start < 16
    found = content["parts"]
    statuses = {name: part["status"] for name, part in found.items()}
    assert statuses.pop("bench_b").startswith("stopped at its limit of ")
    assert statuses.pop("small").startswith("stopped at its limit of ")
    assert statuses == dict(
        build="passed", ncu="not run: ncu is not installed", c="passed",
        bench_silent="failed: no row of ours was timed", d="failed (exit -6)",
        never="not started: the GPU does not answer after d",
    )  # fmt: skip
    probed = {name: part["probe"] for name, part in found.items() if "probe" in part}
    assert probed == dict(bench_b="passed", small="passed", bench_silent="passed", d="failed (exit 1)")
    assert found["bench_b"]["rows"][0]["contender"] == "triton" and found["c"]["reruns"] == 2
    logs = {path.name: path.read_text() for path in (fake_gpu.out / "logs").iterdir()}
    assert "built" in logs["build.log"] and "Fatal Python error: Aborted" in logs["bench_b.log"]
    assert "no answer" in logs["probe-1.log"] and "never.log" not in logs
    (page,) = fake_gpu.out.glob("*.md")
    page = page.read_text()
    assert "| median ms | expected ms |" in page and "| 1.00 | 0.800 |" in page
    assert "| c | passed, a fresh process after each of 2 CUDA errors |" in page
    assert "does not answer after d" in capsys.readouterr().err


def test_a_part_that_dies_at_once_is_probed_too(fake_gpu, monkeypatch):
    """Its seconds are written as 0.0."""
    run = gpu_report.run_and_read
    monkeypatch.setattr(gpu_report, "REST", 0.0)
    monkeypatch.setattr(gpu_report, "run_and_read", lambda *given: run(*given) | dict(seconds=0.0))
    dies = python(f"open({str(fake_gpu.dead)!r}, 'w'); import os; os.abort()")
    code, content = fake_gpu.run(lambda folder: [Part("d", dies, 3), Part("never", python("print()"), 3)])
    statuses = {name: part["status"] for name, part in content["parts"].items()}
    assert code == 1 and content["parts"]["d"]["probe"] == "failed (exit 1)"
    assert statuses == dict(d="failed (exit -6)", never="not started: the GPU does not answer after d")


@pytest.mark.slow
def test_report_resumes_where_it_stopped(fake_gpu, tmp_path):
    def parts(folder):
        once_bad = (
            f"import sys; from pathlib import Path; p = Path({str(tmp_path / 'c')!r}); seen = p.exists(); "
            "p.touch(); sys.exit(0 if seen else 1)"
        )
        count = f"open({str(tmp_path / 'a')!r}, 'a').write('x')"
        rows = wrote(folder / "bench_b.json", row("cpp", 1))
        return [
            Part("a", python(count), 30), Part("bench_b", python(rows), 30), Part("c", python(once_bad), 30),
        ]  # fmt: skip

    code, content = fake_gpu.run(parts)
    statuses = {name: part["status"] for name, part in content["parts"].items()}
    assert code == 1 and statuses == dict(a="passed", bench_b="passed", c="failed (exit 1)")
    assert fake_gpu.run(parts, "--resume")[0] == 0 and (tmp_path / "a").read_text() == "x"  # not run again
    code, content = fake_gpu.run(parts, "--only", "a")
    assert code == 0 and (tmp_path / "a").read_text() == "xx"
    assert list(content["parts"]) == ["a", "bench_b", "c"] and len(list(fake_gpu.out.glob("*.json"))) == 1
    assert content["machine"]["command"].startswith("python -m") and "torch" in content["machine"]["versions"]


def test_what_was_measured_before_is_not_taken_for_new(fake_gpu):
    def parts(folder):
        return [Part("bench_b", python(wrote(folder / "bench_b.json", row("cpp", 1))), 30)]

    assert fake_gpu.run(parts)[0] == 0
    code, content = fake_gpu.run(lambda folder: [Part("bench_b", python("pass"), 30)], "--only", "bench_b")
    assert code == 1 and content["parts"]["bench_b"]["status"] == "failed: no row of ours was timed"


def test_one_call_and_the_second_one_have_their_limits(fake_gpu, monkeypatch):
    given = []

    def run_and_read(part, seconds, folder):
        given.append(seconds)
        return dict(status="passed", seconds=1.0, tail=[])

    monkeypatch.setattr(gpu_report, "run_and_read", run_and_read)
    fake_gpu.run(lambda folder: [Part("a", [], 1e9)])
    fake_gpu.run(lambda folder: [Part("a", [], 1e9)], "--only", "a")
    fake_gpu.run(lambda folder: [Part("a", [], 1e9)], "--budget", "33")
    monkeypatch.undo()
    last = 3 * process.GONE  # its processes, and two probes that find no time
    assert 515 < given[0] <= gpu_report.BUDGET and gpu_report.BUDGET + last / 3 + 2 < 540
    assert 100 < given[1] <= gpu_report.ONLY_BUDGET and gpu_report.ONLY_BUDGET + last / 3 + 2 < 120
    assert given[2] <= 33
    assert 0 < gpu_report.age() < 24 * 3600


@pytest.mark.slow
def test_a_gpu_that_never_answers_ends_the_report_at_once(fake_gpu, monkeypatch, capsys):
    fake_gpu.dead.touch()
    assert fake_gpu.run(lambda folder: [Part("a", [], 1)])[0] == 2
    assert "no answer" in (fake_gpu.out / "probe.log").read_text()
    monkeypatch.setattr(gpu_report, "PROBE_LIMIT", 1.5)
    monkeypatch.setattr(gpu_report, "probe_part", lambda file: Part("probe", python(IGNORES), 1))
    start = time.monotonic()
    assert fake_gpu.run(lambda folder: [Part("a", [], 1)])[0] == 2 and time.monotonic() - start < 4
    assert "stopped at its limit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu_report.main(["--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and "no GPU that torch can see" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- its own parts


def test_parts_fit_the_budget_and_come_in_the_order_of_the_issue():
    listed = gpu_report.parts(Path("x"))
    assert sum(gpu_report.SLICES.values()) <= gpu_report.BUDGET
    names = [part.name for part in listed]
    assert names[:7] == ["build", "warm", "correct", "wrong_tile", "headline", "tests", "sweep"]
    assert names[-4:] == ["memcheck", "racecheck", "ncu_tensor", "ncu"]
    assert {*names, "wheels", "probe"} == set(gpu_report.SLICES) and len(set(names)) == len(names)
    ops = [word for part in listed if "--op" in part.command for word in part.command if word in run.MODULES]
    assert sorted(ops) == sorted(run.MODULES)
    for part in listed:  # a part stopped at its limit leaves the file it rewrites
        if part.name.startswith("bench_") or part.name in ("sweep", "model_heads", "headline"):
            assert part.command[part.command.index("--json") + 1] == str(Path("x") / f"{part.name}.json")
        if part.name.startswith("bench_") or part.name in ("model_heads", "headline"):
            assert part.goes_on
    assert min(part.slice for part in listed) >= 9  # seconds: a process that imports torch and sees a GPU
    for name in ("ncu", "ncu_tensor"):
        command = listed[names.index(name)].command
        assert command[command.index("--clock-control") + 1] == "none"
    tools = {n: listed[names.index(n)].command for n in ("memcheck", "racecheck")}
    assert all(command[command.index("--tool") + 1] == name for name, command in tools.items())
    assert tools["racecheck"][-1] == "--sequences" and tools["memcheck"][-1] == "benchmarks.gpu.small"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would run")
@pytest.mark.parametrize("name", [p.name for p in gpu_report.parts(Path("x")) if "--json" in p.command])
def test_the_flags_of_a_part_are_those_of_its_module(name, tmp_path, capsys):
    part = next(part for part in gpu_report.parts(tmp_path) if part.name == name)
    module = part.command[2] if part.command[2] != "ipvrm_kernels" else "ipvrm_kernels.__main__"
    flags = [*part.command[3:], *([session.GO_ON] if part.goes_on else [])]
    assert importlib.import_module(module).main(flags) == 2  # no GPU; a flag it does not know exits
    assert not list(tmp_path.iterdir())


def test_selection_and_time_slices():
    a, b, c = (Part(name, [], slice_) for name, slice_ in (("a", 10), ("b", 20), ("c", 30)))
    assert gpu_report.select([a, b, c], None, {"b"}) == [a, c]
    assert gpu_report.select([a, b, c], ["b"], {"b"}) == [b]  # asked for by name: again
    assert gpu_report.limit(a, [b, c], 60) == 10
    assert gpu_report.limit(b, [c], 55) == 22  # what a left is shared
    assert gpu_report.limit(c, [], 200) == 90  # a part that hangs gets three slices at most
    build = Part("build", [], 10, needed=True)  # the rest needs it: more than its share
    assert gpu_report.limit(build, [b, c], 60) == 30 and gpu_report.limit(build, [b, c], 25) == 25
    assert [part.name for part in gpu_report.parts(Path("x")) if part.needed] == ["build"]


@pytest.mark.slow
def test_wheels_are_installed_by_exact_names_and_nothing_they_need(fake_gpu, tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    assert wheels.wheels_part(folder, 5).missing.startswith("no wheel of liger-kernel")
    for name in ("liger_kernel-0.8.5", "torch-2.11.0", "triton-3.6.0", "nvidia_cublas_cu12-1", "torchao-1"):
        (folder / f"{name}-py3-none-any.whl").touch()
    command = wheels.wheels_part(folder, 5).command
    files = [word for word in command if word.endswith(".whl")]
    assert files == [str(folder / "liger_kernel-0.8.5-py3-none-any.whl")]
    assert {"--no-index", "--no-deps"} <= set(command) and "--upgrade" not in command
    assert not any(name.startswith(("torch", "triton", "nvidia", "cuda")) for name in wheels.NAMES)
    parts = lambda folder: [Part("a", python("print(1)"), 20)]  # noqa: E731
    code, content = fake_gpu.run(parts, "--wheels", str(folder))
    found = content["parts"]
    assert code == 1 and found["wheels"]["status"].startswith("failed")  # not a wheel; the rest runs
    assert found["a"]["status"] == "passed" and len(found["wheels"]["left_alone"]) == 4


def needed(names):
    """The distributions of these names and what they need, as far as they are installed here."""
    found, left = set(), set(map(normalised, names))
    while left:
        found.add(name := left.pop())
        try:
            asked = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
        here = [one.name for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]
        left |= set(map(normalised, here)) - found
    return found


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_anywhere(path):
    """Top-level names of what a file imports, in its functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow
def test_the_names_of_wheels_cover_what_the_parts_import():
    folders = ("benchmarks", "benchmarks/gpu", "benchmarks/suite", "tests/kernels")
    files = [path for name in folders for path in (ROOT / name).glob("*.py") if path.name != "plots.py"]
    modules = [f"benchmarks.bench_{name}" for name in run.MODULES] + ["benchmarks.gpu_report"]
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(ran.stdout.split()).union(*map(imported_anywhere, files))
    distributions = metadata.packages_distributions()
    direct = {found for name in names for found in distributions.get(name, ())} - {"ipvrm"}
    assert {"pytest", "transformers", "safetensors", "PyYAML"} <= direct
    missing = needed(direct | set(wheels.NAMES)) - needed(["torch", "triton", "numpy"]) - set(wheels.NAMES)
    assert not missing


def test_tests_run_side_by_side_where_xdist_is_installed(monkeypatch):
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: object())
    part = gpu_report.tests_part("tests", "tests/kernels", "cuda", workers=8)
    assert part.command[-2:] == ["-n", "8"] and int(part.env["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    part = gpu_report.tests_part("tests", "tests/kernels", "cuda", workers=8)
    assert "-n" not in part.command and part.missing == "pytest is not installed: pip install pytest"


def test_the_sanitizer_sees_every_allocation(tmp_path):
    parts = {part.name: part for part in gpu_report.parts(Path("x"))}
    assert parts["memcheck"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = python("import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], 'PATH' in os.environ)")
    part = Part("a", code, 1, env=parts["memcheck"].env)
    assert run_part(part, 60, tmp_path / "log")["tail"] == ["1 True"]


def test_the_commit_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("IPVRM_COMMIT", "fake1234")
    assert machine.describe()["commit"] == "fake1234"


def test_the_probe_says_that_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(probe.torch.cuda, "is_available", lambda: False)
    assert probe.main(["--json", str(tmp_path / "f")]) == 2 and not (tmp_path / "f").exists()


@pytest.mark.slow
def test_what_still_compiles_is_left(monkeypatch):
    running = [
        process.subprocess.Popen(python(code)) for code in ("pass", "import time; time.sleep(60)", "1 / 0")
    ]
    assert (running[0].wait(60), running[2].wait(60)) == (0, 1)
    start = time.monotonic()
    assert process.exit_codes(running, start + 1.5) == [0, None, 1]
    assert time.monotonic() - start < 4 and all(one.poll() is not None for one in running)


def test_what_compiles_and_cannot_be_killed_is_not_waited_for():
    """The sweep and the warm-up go on after some seconds."""
    waited, killed = [], []

    class Stuck:
        def wait(self, timeout=None):
            assert timeout is not None, "no wait without a limit"
            waited.append(timeout)
            raise process.subprocess.TimeoutExpired("stuck", timeout)

        def kill(self):
            killed.append(self)

    assert process.exit_codes([Stuck(), Stuck()], time.monotonic()) == [None, None]
    assert len(killed) == 2 and waited == [0.0, 0.0, process.GONE, process.GONE]


@pytest.mark.slow
def test_the_tests_part_leaves_out_what_needs_no_gpu(tmp_path):
    (part,) = (part for part in gpu_report.parts(tmp_path) if part.name == "tests")
    assert part.command[part.command.index("-k") + 1] == gpu_report.GPU_TESTS
    folder = machine.ROOT / "tests/kernels"
    names = ("test_cuda_emulation.py", "test_dead_context.py", "test_segment_scan.py")
    files = [str(folder / name) for name in names]
    command = [*part.command[:3], *files, "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = process.subprocess.run(
        [*command, "-k", gpu_report.GPU_TESTS], capture_output=True, text=True, cwd=machine.ROOT, check=True
    ).stdout
    assert "test_segment_scan.py::" in found
    assert not any(f"{name}::" in found for name in names[:2]), found


# --------------------------------------------------------------------------------------- what a part measured

FAKE_NCU = """==PROF== Connected
done
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","_head_stats_kernel","(132, 1, 1)","gpu__time_duration.sum","msecond","1.5"
"0","_head_stats_kernel","(132, 1, 1)","launch__registers_per_thread","register/thread","168"
"1","_head_dz_kernel","(132, 1, 1)","gpu__time_duration.sum","msecond","2.5"
==PROF== Disconnected
"""
FAKE_SECTIONS = """==PROF== Connected
"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","_head_stats_kernel","(132, 1, 1)","GPU Speed Of Light Throughput","Duration","ms","1.5",""
"0","_head_stats_kernel","(132, 1, 1)","GPU Speed Of Light Throughput","","","","advice
of two ""lines"", the second one"
"1","_head_dz_kernel","(132, 1, 1)","Launch Statistics","Registers Per Thread","register/thread","168",""
==PROF== Disconnected
"""
FAKE_TESTS = """tests/kernels/test_a.py::test_x[triton-cuda-False] PASSED        [  1%]
tests/kernels/test_a.py::test_x[triton-cuda-[0, 9, 50]] SKIPPED (why)   [  2%]
tests/kernels/test_a.py::test_x[torch-cuda] PASSED [  3%]
[gw3] [  4%] PASSED tests/kernels/test_b.py::test_y[cuda-cuda]
[gw0] [ 11%] FAILED tests/kernels/test_b.py::test_y[triton-cuda-[0, 9]]
tests/kernels/test_b.py::test_on_cuda PASSED [100%]
SKIPPED [1] tests/kernels/test_a.py:7: why
FAILED tests/kernels/test_b.py::test_y[triton-cuda-[0, 9]] - assert 0
"""


def told(name, log, **found):
    part = next(part for part in gpu_report.parts(Path("x")) if part.name == name)
    return evidence.nothing_measured(part, found, log)


def test_counters_from_the_profilers_csv():
    stats, dz = evidence.counters(FAKE_NCU)
    assert stats["kernel"] == "_head_stats_kernel" and stats["gpu__time_duration.sum"] == "1.5 msecond"
    assert stats["launch__registers_per_thread"] == "168 register/thread" and dz["grid"] == "(132, 1, 1)"
    assert evidence.counters("==ERROR== ERR_NVGPUCTRPERM") == []


def test_counters_of_sections_have_no_advice_and_name_no_metric():
    stats, dz = evidence.counters(FAKE_SECTIONS)
    assert stats == dict(kernel="_head_stats_kernel", grid="(132, 1, 1)", Duration="1.5 ms")
    assert dz["Registers Per Thread"] == "168 register/thread"
    parts = {part.name: part.command for part in gpu_report.parts(Path("x"))}
    assert "--metrics" not in parts["ncu"] and parts["ncu"].count("--section") == len(gpu_report.SECTIONS)
    tensor = parts["ncu_tensor"][parts["ncu_tensor"].index("--metrics") + 1]
    assert "tensor_cycles_active" in tensor and "inst_executed" not in tensor


@pytest.mark.parametrize("name", ["ncu", "ncu_tensor"])
def test_a_profile_without_both_kernels_has_failed(name):
    assert told(name, "", counters=evidence.counters(FAKE_SECTIONS)) == ""
    refused = "==PROF== x\n==ERROR== ERR_NVGPUCTRPERM - no permission"
    reason = told(name, refused, counters=[])
    assert "_head_stats_kernel" in reason and "_head_dz_kernel" in reason and "ERR_NVGPUCTRPERM" in reason
    first = evidence.counters(FAKE_SECTIONS)[:1]
    assert told(name, "", counters=first) == "no counters of _head_dz_kernel"
    bare = [dict(kernel=kernel, grid="") for kernel in evidence.KERNELS]  # launches without a metric
    assert told(name, "", counters=bare)


def test_outcomes_of_tests_are_counted_by_backend_and_survive_a_kill():
    found = evidence.outcomes(FAKE_TESTS)
    assert found["counts"] == {
        "triton-cuda": dict(PASSED=1, SKIPPED=1, FAILED=1), "torch-cuda": dict(PASSED=1),
        "cuda-cuda": dict(PASSED=1), "other": dict(PASSED=1),
    }  # fmt: skip
    assert found["failed"] == ["tests/kernels/test_b.py::test_y[triton-cuda-[0, 9]]"]
    assert evidence.outcomes(FAKE_TESTS[:100])["counts"] == {"triton-cuda": dict(PASSED=1)}
    assert told("tests", "", tests=found) == "" and told("wrong_tile", "", tests=found) == ""
    only_torch = evidence.outcomes(FAKE_TESTS.replace("cuda-cuda", "torch-cuda"))
    assert told("tests", "", tests=only_torch) == "no test passed for cuda-cuda"
    assert told("wrong_tile", "", tests=only_torch) == ""
    assert "triton-cuda, cuda-cuda" in told("tests", "", tests=evidence.outcomes("no tests ran"))


@pytest.mark.slow
def test_pytest_itself_prints_lines_that_are_counted(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('impl', ['triton-cuda', 'cuda-cuda'])\n"
        "def test_x(impl):\n    assert impl[0] == 't'\ndef test_y():\n    pytest.skip('why not')\n"
    )
    part = gpu_report.tests_part("tests", "tests/kernels", "cuda", workers=8)
    flags = part.command[part.command.index("tests/kernels") + 1 : part.command.index("-k")]
    command = [sys.executable, "-m", "pytest", str(tmp_path), *flags, "--rootdir", str(tmp_path)]
    log = tmp_path / "log"
    run_part(Part("tests", command, 1, env=part.env), 100, log)
    counts = evidence.outcomes(log.read_text())["counts"]
    assert counts == {
        "triton-cuda": dict(PASSED=1), "cuda-cuda": dict(FAILED=1), "other": dict(SKIPPED=1),
    }  # fmt: skip


def test_a_part_that_measured_nothing_has_failed():
    assert told("build", "building\nipvrm: CUDA sources were not compiled (x); impl='cuda' is off\n")
    assert told("build", "building\n") == ""
    assert told("warm", "linear_logprobs triton\n") and told("warm", "a\ndone\n") == ""
    clean = "========= COMPUTE-SANITIZER\ndone\n========= ERROR SUMMARY: 0 errors\n"
    assert told("memcheck", clean) == "" and told("memcheck", "done\n")
    assert told("memcheck", clean.replace("done", "")) == "the ops did not run to their end"
    races = "done\n========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)\n"
    assert told("racecheck", races.format(0)) == "" and told("racecheck", races.format(3))
    rows = [row("matmul", 1).as_dict(), row("cpp", math.nan, error="out of memory").as_dict()]
    for name in ("bench_scaling", "headline"):
        assert told(name, "", rows=rows)
    assert told("model_heads", "") and told("sweep", "")
    assert told("bench_policy_step", "", rows=[row("grpo", 1).as_dict()]) == ""  # no contender says ours
    assert told("bench_policy_step", "", rows=rows[1:])
    rows += [row("triton, one id", 1).as_dict()]
    assert told("bench_scaling", "", rows=rows) == "" and told("sweep", "", sweep=dict(winner_ms=1.0)) == ""


def test_a_check_of_the_ops_that_left_the_gpu_out_has_failed():
    said = json.dumps(dict(results=[dict(device="cuda")], verdicts=["FAKE"]))
    found = evidence.verdicts(f"warning: x\n{said}\nthe end\n")
    assert found["verdicts"] == ["FAKE"] and told("correct", "", check=found) == ""
    assert evidence.verdicts("nothing") is None and evidence.verdicts('{"cut off": ') is None
    assert told("correct", "", check=None) == "nothing was checked on the GPU"
    assert told("correct", "", check=dict(results=[dict(device="cpu")]))
    assert "- FAKE" in render.gpu_page(
        dict(machine=FAKE_MACHINE, parts=dict(correct=dict(status="passed", seconds=1, check=found)))
    )


# --------------------------------------------------------------------- CUDA errors inside a run of benchmarks


@pytest.fixture
def fragile(monkeypatch):
    """A context that a contender whose message says CUDA kills: what follows it fails, as on a GPU."""
    state = types.SimpleNamespace(dead=False)

    def raise_if_dead(device, contender, error):
        if state.dead:
            raise DeadContext(contender, str(error))

    monkeypatch.setattr(measure, "raise_if_dead", raise_if_dead)
    monkeypatch.setattr(session, "raise_if_dead", raise_if_dead)

    def alive():
        if state.dead:
            raise RuntimeError("CUDA error: context is dead")
        return torch.ones(1)

    def kills():
        state.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return types.SimpleNamespace(state=state, alive=alive, kills=kills)


def in_processes(main, state, flags):
    """Call main until it does not end with a dead context, as run_part does; (its exit code, processes)."""
    for count in range(1, 10):
        state.dead, state.process = False, count
        try:
            return main([*flags, *([session.GO_ON] if count > 1 else [])]), count
        except SystemExit as ended:
            assert ended.code == session.DEAD_CONTEXT
    raise AssertionError("it never ends")


def test_a_cuda_error_reruns_the_peers_in_a_fresh_process(fragile, monkeypatch, tmp_path, capsys):
    runs = []

    def fake_cases(device, quick):
        def first():
            runs.append(fragile.state.process)
            return fragile.alive()

        yield Case("FAKE", "a", {"matmul": first, "cpp": fragile.alive}, lambda results: None)
        peers = {"peer": fragile.kills, "other peer": fragile.kills, "cpp": fragile.alive}
        yield Case("FAKE", "b", {"matmul": fragile.alive, **peers}, lambda results: None)
        yield Case("FAKE", "c", {"matmul": fragile.alive, "cpp": fragile.alive}, lambda results: None)
        fragile.kills()

    def later_cases(device, quick):
        yield Case("FAKE", "d", {"matmul": fragile.alive, "cpp": fragile.alive}, lambda results: None)

    for name, cases in (("segment_scan", fake_cases), ("prefix_values", later_cases)):
        monkeypatch.setitem(sys.modules, f"benchmarks.bench_{name}", types.SimpleNamespace(cases=cases))
    monkeypatch.setattr(run, "describe", lambda: dict(FAKE_MACHINE))
    file = tmp_path / "f.json"
    flags = ["--op", "segment_scan", "prefix_values", "--quick", "--device", "cpu", "--json", str(file)]
    code, count = in_processes(run.main, fragile.state, flags)
    assert (code, count) == (1, 4)  # two peers and the building of a case end one process each
    content = json.loads(file.read_text())
    assert "progress" not in content
    rows = {(r["shape"], r["contender"]): r for r in content["rows"]}
    assert {shape for shape, _ in rows} == {"a", "b", "c", "d"} and len(rows) == len(content["rows"]) == 10
    for shape in "abcd":
        assert rows[shape, "cpp"]["median_ms"] is not None and not rows[shape, "cpp"]["error"]
    for peer in ("peer", "other peer"):
        assert "illegal memory access" in rows["b", peer]["error"]
    assert set(runs) == {1}  # what the first process finished is not measured again
    err = capsys.readouterr().err
    assert "b: peer: CUDA error" in err and "segment_scan: its cases end here: RuntimeError" in err


def test_a_contender_that_dies_while_it_is_timed_leaves_the_others_their_times(monkeypatch, fragile):
    calls = []

    def late():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return torch.ones(1)

    case = Case(
        "FAKE", "s", {"matmul": fragile.alive, "cpp": fragile.alive, "peer": late}, lambda results: None
    )
    rows = {r.contender: r for r in measure.measure(case, "cpu", seconds=0.01)}
    assert rows["peer"].error == "RuntimeError: out of memory" and not rows["cpp"].error
    calls.clear()

    def dies():
        calls.append(1)
        return fragile.kills() if len(calls) == 4 else torch.ones(1)

    case = Case("FAKE", "s", {"matmul": fragile.alive, "peer": dies}, lambda results: None)
    with pytest.raises(DeadContext) as error:
        measure.measure(case, "cpu", seconds=0.01)
    assert error.value.contender == "peer"


def test_a_check_that_kills_the_context_gives_up_its_case(fragile, tmp_path):
    def case():
        return Case(
            "FAKE", "s", {"matmul": fragile.alive, "cpp": fragile.alive}, lambda results: fragile.kills()
        )

    file = tmp_path / "f.json"
    with pytest.raises(SystemExit):
        session.Session({}, file).measure(case(), "cpu", 0.01)
    again = session.Session({}, file, go_on=True)
    assert [r.error[:10] for r in again.rows] == ["CUDA error"] * 2
    assert again.measure(case(), "cpu", 0.01) == [] and len(again.problems) == 1


def test_a_dead_context_is_one_that_no_longer_answers(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    measure.raise_if_dead("cpu", "peer", ValueError("x"))
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    measure.raise_if_dead("cuda", "peer", ValueError("x"))
    monkeypatch.setattr(measure.torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeadContext, match="ValueError: x"):
        measure.raise_if_dead("cuda", "peer", ValueError("x"))


@pytest.mark.slow
def test_a_dead_context_ends_the_process_at_once(tmp_path):
    code = (
        f"import sys; sys.path.append({str(ROOT)!r})\nfrom benchmarks.suite import session\n"
        "def main():\n    print('said')\n    raise SystemExit(session.DEAD_CONTEXT)\n"
        "import atexit; atexit.register(print, 'torn down')\nsession.run_main(main)"
    )
    log = tmp_path / "log"
    assert run_part(Part("a", python(code), 1), 60, log)["status"] == "failed (exit 70)"
    assert log.read_text() == "said\n"


# ------------------------------------------------------------------------------ the model, headline and heads


@pytest.mark.parametrize(
    ("instructions", "overlapped", "small", "large"),
    [(17.0, False, 1.28, 1.07), (6.5, False, 1.107, 1.027), (6.5, True, 1.0, 1.0)],
)
def test_the_model_gives_the_studys_figures(monkeypatch, instructions, overlapped, small, large):
    monkeypatch.setitem(roofline.INSTRUCTIONS, "forward", instructions)
    gpu = roofline.rates("NVIDIA H200")
    for shape, wanted in zip(heads.shapes("cuda", False), (small, large), strict=True):
        found = roofline.tile_ms("forward", shape, gpu, overlapped=overlapped) / roofline.matmul_ms(
            shape, gpu
        )
        assert found == pytest.approx(wanted, abs=0.01)
    shape = heads.shapes("cuda", False)[0]
    assert roofline.matmul_ms(shape, gpu) == pytest.approx(3.2, abs=0.05)  # of 8192 x 1024 x 151936
    traffic = roofline.tile_ms("forward", shape._replace(D=16), gpu, writes=4e9)
    assert traffic >= 4e9 / 4.3e9  # where bytes are the bound, they are
    assert roofline.rates("FAKE GPU") is None


def test_instructions_come_from_the_table_of_the_machine_code(tmp_path):
    assert roofline.counted(tmp_path, "3.6.0") == roofline.MOST
    head = "sm,kernel,operands,variant,tile,warps,stages,registers,shared,spills,programs,epilogue,start\n"
    rows = (
        "90,forward,half,entropy,t,8,3,168,1,0,1,{},0.50\n90,forward,half,,t,8,3,168,1,0,1,4.00,0.50\n"
        "90,forward,fp32,entropy,t,8,3,168,1,0,1,40.00,\n80,groups,half,entropy,t,8,3,168,1,0,1,9.00,\n"
        "90,dz,half,,t,8,3,168,1,0,1,11.00,\n90,saved,half,,t,8,3,168,1,0,1,,\n"
    )
    (tmp_path / "triton-3.6.0.csv").write_text(head + rows.format("6.00"))
    (tmp_path / "triton-3.7.1.csv").write_text(head + rows.format("7.00"))
    assert roofline.counted(tmp_path, "3.6.0") == dict(forward=6.5, dz=11.0)
    assert roofline.counted(tmp_path, "9.9.9") == dict(forward=7.5, dz=11.0)


def test_ops_are_modelled_by_their_kernels(monkeypatch):
    monkeypatch.setattr(roofline, "INSTRUCTIONS", dict(forward=17.0, groups=18.0))
    monkeypatch.setattr(roofline, "_device_name", lambda: "NVIDIA H200")
    shape = heads.shapes("cuda", False)[0]
    ms = {kind: roofline.expected(kind, shape, ["triton", "triton x", "cuda"], "cuda") for kind in
          ("forward", "candidates", "frozen", "distrl_loss", "trainable")}  # fmt: skip
    assert all(set(found) == {"matmul", "triton", "triton x"} for found in ms.values())
    gluon = roofline.expected("forward", shape, ["gluon"], "cuda")  # its reductions beside its matmuls
    assert 1.0 < gluon["gluon"] / gluon["matmul"] < 1.05
    totals = [found["triton"] / found["matmul"] for found in ms.values()]
    assert totals == sorted(totals) and 1.2 < totals[0] < 1.4 and 4 < totals[-1] < 5
    assert roofline.expected("forward", shape, ["triton"], "cpu") == {}
    assert roofline.expected_stream(4.3e9) == pytest.approx(1.003)
    monkeypatch.setattr(roofline, "_device_name", lambda: "FAKE GPU")
    assert (
        roofline.expected("forward", shape, ["triton"], "cuda") == {} and roofline.expected_stream(1) is None
    )


def test_every_kernel_of_the_head_has_an_expected_time():
    folder = ROOT / "ipvrm_kernels"
    files = [*(folder / "head").glob("triton_*.py"), folder / "linear_candidates.py"]
    written = {name for file in files for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())}
    shape, gpu = heads.shapes("cuda", False)[0], roofline.rates("NVIDIA H200")
    kinds = ("forward", "candidates", "trainable", "frozen", "distrl_loss")
    found = {kind: roofline.kernels(kind, shape, gpu) for kind in kinds}
    modelled = set().union(*found.values()) - {"matmul"}
    assert written - modelled == {"_column_sums_kernel"}  # of a bias, which none of these ops has
    assert modelled <= written and all(ms > 0 for kernels in found.values() for ms in kernels.values())
    for kind, kernels in found.items():  # what is no matmul is small beside one
        rest = sum(ms for name, ms in kernels.items() if name not in ("matmul", *TILED))
        assert rest < 0.1 * roofline.matmul_ms(shape, gpu), kind


def test_a_configuration_that_overlaps_is_modelled_so(monkeypatch):
    monkeypatch.setattr(roofline, "_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(headline.sweep, "architecture", lambda: "sm_90")
    monkeypatch.setattr(headline.sweep, "gpu_at_hand", lambda: "sm_90")
    shape, one = heads.Shape(40, 16, 301, torch.float32, 2), headline.configurations()[0]
    two = one._replace(BLOCK_V=128, num_warps=4, programs_per_sm=2)
    large, plain = heads.shapes("cuda", False)[0], roofline.expected
    monkeypatch.setattr(
        roofline, "expected", lambda kind, _, names, device, beside: plain(kind, large, names, "cuda", beside)
    )
    ms = headline.case(shape, "cpu", [one, two]).expected
    assert ms["matmul"] < ms[headline.label(two)] < ms[headline.label(one)]
    assert ms.get("gluon", ms[headline.label(two)]) == ms[headline.label(two)]


def test_other_gpus_are_modelled_by_their_data_sheets():
    shape = heads.shapes("cuda", False)[0]
    names = ("NVIDIA B200", "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    times = [sum(roofline.kernels("frozen", shape, roofline.rates(name)).values()) for name in names]
    assert times == sorted(times) and times[-1] > 2 * times[0]
    assert roofline.rates("NVIDIA H100 PCIe") is None  # another board, with other rates


def test_the_page_of_modelled_times_is_that_of_the_tables(monkeypatch):
    monkeypatch.setattr(roofline, "INSTRUCTIONS", roofline.counted(roofline.TABLES, ""))  # of the newest
    written = (roofline.TABLES / "README.md").read_text()
    assert written == roofline.page(), "python -m benchmarks.suite.roofline"


@pytest.mark.skipif(not HAS_CPP, reason="the C++ op stands for Triton's")
def test_the_headline_times_every_configuration_and_its_kernels(monkeypatch, tmp_path, capsys):
    """With the C++ op in the place of Triton's, whose tiles it does not have."""
    used = []

    def forward(hidden, weight, sampled, *, return_entropy, impl):
        used.append(headline.CONFIGS["sm_90", "half"])
        return ipvrm_kernels.linear_logprobs(
            hidden, weight, sampled, return_entropy=return_entropy, impl="cpp"
        )

    monkeypatch.setattr(headline.sweep, "architecture", lambda: "sm_90")
    monkeypatch.setattr(headline.sweep, "gpu_at_hand", lambda: "sm_90")
    monkeypatch.setattr(headline, "linear_logprobs", forward)
    monkeypatch.setattr(gluon_study, "forward", lambda hidden, weight, sampled: ipvrm_kernels.linear_logprobs(
        hidden, weight, sampled, return_entropy=True, impl="cpp"
    ))  # fmt: skip
    configs = headline.configurations()
    before = headline.CONFIGS["sm_90", "half"]
    assert configs[0] == before and len({headline.label(config) for config in configs}) == len(configs)
    shape = heads.Shape(40, 16, 301, torch.float32, 2)
    case = headline.case(shape, "cpu", configs)
    rows = {r.contender: r for r in measure.measure(case, "cpu", 0.01)}
    assert set(used) == set(configs) and headline.CONFIGS["sm_90", "half"] == before
    assert all(
        not rows[headline.label(config)].error and measure.is_ours(headline.label(config))
        for config in configs
    )
    assert list(rows)[0] == "matmul" and list(rows)[-1] == "gluon" and not rows["gluon"].error
    assert not measure.is_ours("gluon")  # one that is wrong fails alone
    assert headline.num_compiled() == len(configs) + 1
    given = []
    monkeypatch.setattr(gluon_study, "forward", lambda hidden, weight, sampled: given.append(sampled))
    monkeypatch.setattr(headline, "inputs", lambda shape, device: heads.inputs(shape._replace(V=9), "cpu"))
    monkeypatch.setattr(headline.torch.cuda, "synchronize", lambda: None)
    assert headline.compile_one(len(configs)) == 0 and given[0].shape == (sweep.COMPILE_ROWS,)
    monkeypatch.setattr(headline.sweep, "architecture", lambda: "sm_100")
    assert "9.0 alone" in headline.case(shape, "cpu", []).absent["gluon"]
    monkeypatch.setattr(headline.sweep, "architecture", lambda: "sm_90")
    monkeypatch.setattr(headline.sweep, "gpu_at_hand", lambda: "sm_90")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)  # an older Triton
    monkeypatch.delitem(sys.modules, "benchmarks.gpu.gluon_study")
    monkeypatch.delattr("benchmarks.gpu.gluon_study")
    assert "another Gluon" in headline.case(shape, "cpu", []).absent["gluon"]

    def event(key, us, count):
        return types.SimpleNamespace(key=key, self_device_time_total=us, count=count)

    times = [
        event("_head_stats_kernel", 12_900, 3), event("nvjet_hsh_128x256", 19_200, 6),
        event("aten::mm", 0, 6), event("sm90_xmma_gemm", 300, 3), event("elementwise", 30, 3),
    ]  # fmt: skip
    large = heads.shapes("cuda", False)[0]
    monkeypatch.setattr(roofline, "INSTRUCTIONS", dict(forward=17.0))
    found = headline.kernel_rows("trainable", large, times, roofline.rates("NVIDIA H200"))
    assert [(one["kernel"], one["calls"]) for one in found] == [
        ("matmul", 3),
        ("_head_stats_kernel", 1),
        ("other", 1),
    ]
    assert found[0]["ms"] == pytest.approx(6.5) and found[1]["ms"] == pytest.approx(4.3)
    assert found[1]["expected_ms"] == pytest.approx(4.13, abs=0.05) and found[2]["expected_ms"] is None
    page = render.gpu_page(
        dict(machine=FAKE_MACHINE, parts=dict(headline=dict(status="passed", seconds=1, kernels=found)))
    )
    assert f"| trainable | {large} | _head_stats_kernel | 1 | 4.30 | 4.13 | 1.04 |" in page
    assert render.UNMODELLED in page


def test_the_page_names_the_kernels_of_the_head_without_a_model():
    package = ROOT / "ipvrm_kernels"
    files = [*(package / "head").glob("*.py"), package / "linear_candidates.py"]
    written = {name for path in files for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())}
    kinds = ("forward", "candidates", "trainable", "frozen", "distrl_loss")
    shape = heads.shapes("cuda", True)[0]
    modelled = {name for kind in kinds for name in roofline.kernels(kind, shape, roofline.H200)}
    assert written - modelled == set(re.findall(r"`(_\w+_kernel)`", render.UNMODELLED))


def test_a_cuda_error_in_a_profile_leaves_the_other_kernels(fragile, monkeypatch, tmp_path, capsys):
    shape = heads.Shape(4, 4, 8, torch.float32, 2)
    runs = {"forward": fragile.alive, "candidates": fragile.kills, "frozen": fragile.alive}
    monkeypatch.setattr(headline.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(headline, "shapes", lambda device, quick: [shape])
    monkeypatch.setattr(headline, "configurations", lambda: [])
    case = Case("FAKE", "s", {"matmul": fragile.alive}, lambda results: None)
    monkeypatch.setattr(headline, "case", lambda shape, device, configs: case)
    monkeypatch.setattr(session, "measure", lambda case, device, seconds: measure.measure(case, "cpu", 0.01))
    monkeypatch.setattr(headline, "profiled", lambda shape, device: iter(runs.items()))
    event = types.SimpleNamespace(key="_fake_kernel", self_device_time_total=3000.0, count=3)
    monkeypatch.setattr(headline, "profile", lambda call: [event] if call() is not None else [])
    monkeypatch.setattr(headline, "describe", lambda: dict(FAKE_MACHINE))
    file = tmp_path / "f.json"
    assert in_processes(headline.main, fragile.state, ["--json", str(file)]) == (1, 2)
    content = json.loads(file.read_text())
    assert [one["op"] for one in content["kernels"]] == ["forward", "frozen"] and len(content["rows"]) == 1


def test_model_heads_are_those_that_no_other_part_measures(monkeypatch, tmp_path, capsys):
    chosen = model_heads.added("cuda")
    models = {"Qwen3-0.6B", "Qwen3-0.6B unpadded", "Qwen3-1.7B", "Qwen3-8B", "Llama-3.2-1B"}
    assert {shape.model for shape in chosen} == models and {64, 65_536} <= {shape.N for shape in chosen}
    assert sum(shape.flops for shape in chosen) < 1.5e14 and chosen[-1].N == 65_536
    made = []

    def fake_cases(device):
        for name in ("a", "b"):
            made.append(name)
            yield Case("FAKE", name, {"cpp": lambda: torch.ones(1)}, lambda results: None)
            assert json.loads((tmp_path / "f.json").read_text())["rows"][-1]["shape"] == name

    monkeypatch.setattr(model_heads, "cases", fake_cases)
    monkeypatch.setattr(session, "measure", lambda case, device, s: measure.measure(case, "cpu", 0.01))
    monkeypatch.setattr(model_heads, "describe", lambda: dict(FAKE_MACHINE))
    monkeypatch.setattr(model_heads.torch.cuda, "is_available", lambda: True)
    assert model_heads.main(["--json", str(tmp_path / "f.json")]) == 0 and made == ["a", "b"]


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
def test_model_heads_have_no_compiled_contender(monkeypatch):
    shape = heads.Shape(40, 16, 101, torch.float32, 2, "FAKE")
    monkeypatch.setattr(model_heads, "shapes", lambda device, quick: [shape])
    monkeypatch.setattr(model_heads, "more_shapes", lambda device: iter([shape._replace(K=heads.K)]))
    found = list(model_heads.cases("cpu"))
    assert len(found) == 8 and all("torch.compile of eager" not in case.contenders for case in found)
    results = {name: found[0].contenders[name]() for name in ("cpp", "eager log_softmax")}
    found[0].check(results)


def test_a_sweep_without_a_gpu_writes_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and it would run")
    assert sweep.main(["--write"]) == 2
