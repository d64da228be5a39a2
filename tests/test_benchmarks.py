"""The benchmark suite's own logic, without a GPU and without long runs.

Everything called FAKE is invented for these tests and stands in no results folder.
"""

import itertools
import json
import math
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "run.py").is_file():
    pytest.skip("no checkout with benchmarks/ beside the tests", allow_module_level=True)
sys.path.append(str(ROOT))  # behind the installed packages, which stay the ones that are tested

from benchmarks import (  # noqa: E402
    bench_linear_candidates,
    bench_linear_logprobs,
    bench_scaling,
    gate,
    gpu_report,
    render,
    run,
)
from benchmarks.gpu import small, sweep  # noqa: E402
from benchmarks.suite import heads, machine, measure, peers, tables  # noqa: E402
from benchmarks.suite.measure import Case, Row, Target  # noqa: E402
from ipvrm_kernels.backend import HAS_CPP  # noqa: E402
from ipvrm_kernels.head import tuned  # noqa: E402


@pytest.fixture
def spin(monkeypatch):
    """Makes calls that take so many milliseconds, by a clock that only they advance."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def make(milliseconds):
        def call():
            now[0] += milliseconds / 1e3
            return milliseconds

        return call

    return make


def row(contender, ms, *, op="op", shape="shape", base=1.0, mib=1.0, **more):
    return Row(op, shape, contender, ms, ms, ms, ms / base, mib, None, None, 5, **more)


# ------------------------------------------------------------------------------------------------- measure


def test_rows_of_a_case(spin):
    case = Case(
        "op", "shape", {"matmul": spin(2), "cpp": spin(4), "broken": lambda: torch.ones(2) @ torch.ones(3)},
        check=lambda results: None, absent={"liger": "not installed"}, axes=dict(N=2), tokens=10,
    )  # fmt: skip
    rows = {r.contender: r for r in measure.measure(case, "cpu", seconds=0.05)}
    assert list(rows) == ["matmul", "cpp", "liger", "broken"]
    assert rows["matmul"].ratio == 1 and rows["cpp"].ratio == pytest.approx(2)
    assert (
        rows["cpp"].rounds >= 3
        and rows["cpp"].axes == {"N": 2}
        and rows["cpp"].tokens_per_s == pytest.approx(2500)
    )
    assert rows["liger"].error == "not installed" and "RuntimeError" in rows["broken"].error
    for r in rows.values():  # through JSON, which knows no NaN
        again = Row.from_dict(json.loads(json.dumps(r.as_dict(), allow_nan=False)))
        assert again == r or (math.isnan(again.median_ms) and again.error == r.error)


def test_a_contender_that_used_its_time_leaves_after_the_least_rounds(spin):
    case = Case(
        "op", "shape", {"matmul": spin(1), "slow": spin(15), "fast": spin(2)}, check=lambda results: None
    )
    rows = {r.contender: r for r in measure.measure(case, "cpu", seconds=0.05, max_rounds=10)}
    assert rows["slow"].rounds == 3 and rows["fast"].rounds == 9  # 2 x 15 > 17, 9 x 2 > 17
    assert rows["matmul"].rounds == 10  # with every round of the others
    assert rows["slow"].ratio == pytest.approx(15)


def test_a_wrong_result_is_not_timed(spin):
    def check(results):
        assert results["cpp"] == results["matmul"], "they differ"

    rows = measure.measure(Case("op", "s", {"matmul": spin(1), "cpp": spin(2)}, check), "cpu")
    assert [r.error for r in rows] == [f"{measure.WRONG}: they differ"] * 2
    assert all(math.isnan(r.median_ms) for r in rows)


def test_a_check_that_cannot_run_leaves_times_and_says_so(spin):
    def out_of_memory():
        raise torch.OutOfMemoryError("no room")

    def check(results):
        assert results["cpp"] == results["eager"]

    contenders = {"matmul": spin(1), "cpp": spin(2), "F.x": spin(3), "eager": out_of_memory}
    rows = measure.measure(Case("op", "s", contenders, check), "cpu", seconds=0.01)
    times = {r.contender: r for r in rows if not r.error}
    assert times["cpp"].median_ms == pytest.approx(2) and "no room" in rows[-1].error
    assert {r.note for r in times.values()} == {"unchecked: KeyError: 'eager'"}
    assert str(tables.verdicts(rows)[0]).endswith("(unchecked)")
    assert "**cpp** (unchecked" in tables.markdown(rows)


def test_peak_memory_counts_what_lives_at_once_and_scratch_not_what_is_returned():
    def two():
        kept = torch.ones(2**18)
        kept.add(1)  # one MiB each, both alive
        return dict(a=(kept, [kept[1:]]), b=None)  # one storage

    rows = measure.measure(Case("op", "s", {"matmul": two}, lambda r: None), "cpu", seconds=0.01)
    assert rows[0].peak_mib == pytest.approx(2, abs=0.1) and rows[0].scratch_mib == pytest.approx(1, abs=0.1)
    old = {k: v for k, v in rows[0].as_dict().items() if k != "scratch_mib"}
    assert "scratch" not in tables.markdown([Row.from_dict(old)]) and "scratch MiB" in tables.markdown(rows)
    assert "scratch_mib" in tables.as_csv(rows, {})


def test_targets_stand_in_the_title_and_are_met_or_missed(spin):
    targets = {"cpp": Target(2.5), "cpp, one id": Target(1 / 3, "F.x, one id")}
    contenders = {"matmul": spin(2), "cpp": spin(4), "cpp, one id": spin(3), "F.x, one id": spin(6)}
    case = Case("op", "s", contenders, lambda r: None, targets=targets)
    rows = measure.measure(case, "cpu", seconds=0.01)
    assert {r.shape for r in rows} == {"s, target <= 2.5 matmul; one id >= 3x F.x"}
    met, missed = tables.aims([Row.from_dict(r.as_dict()) for r in rows])
    assert str(met) == "met: cpp 2.00, target <= 2.5 matmul"
    assert str(missed) == "MISSED: cpp, one id 2.00x, target >= 3x F.x"
    assert tables.aims([r for r in rows if r.contender != "matmul"])[0].outcome == "unknown"
    curve = [
        row("cpp", ms, shape=f"N={n}", axes=dict(N=n), curve="N", series="s", scratch_mib=5.0, **more)
        for n, ms, more in ((1, 1, {}), (4, 4, {}), (8, 9, dict(target=8.4, target_of=measure.START)))
    ]
    (growing,) = tables.aims(curve)
    assert str(growing) == "MISSED: cpp 9.00, target <= 8.4 the curve's start"
    assert "5.0 to 5.0" in tables.markdown_growth(tables.growth(curve))


def test_targets_are_those_of_their_shape():
    (cpu,) = heads.shapes("cpu", False)
    assert heads.targets("trainable", cpu, ["cpp"], "cpu") == {"cpp": Target(4.4)}
    assert heads.targets("trainable", cpu._replace(K=5), ["cpp"], "cpu") == {}
    assert heads.targets("forward", cpu, ["cuda"], "cuda") == {}
    small, large = (heads.targets("forward", s, ["cuda"], "cuda") for s in heads.shapes("cuda", False))
    assert small["cuda"].limit == 1.25 and large["cuda"].limit == 1.15


# --------------------------------------------------------------------------------- checks of the head ops

HEAD = heads.Shape(150, 32, 301, torch.float32, 4)


def head_case(kind):
    torch.manual_seed(0)
    if kind == "forward":
        return bench_linear_logprobs.forward_case(HEAD, "cpu")
    if kind == "candidates":
        return bench_linear_candidates.candidates_case(HEAD, "cpu", with_compile=False)
    if kind.startswith("step"):
        return bench_linear_logprobs.step_case(
            HEAD, "cpu", frozen=False, with_peers=False, with_compile=False
        )
    return bench_scaling.target_case(HEAD, "cpu", kind.removeprefix("growth "), with_target=True)


HEAD_FIELDS = {
    "forward": ("logprobs", "lse", "entropy"),
    "candidates": ("ids", "logprobs", "counts", "lse", "entropy", "sampled_logprobs"),
    "step": (0, 1),
    "step without eager": (0, 1),
    "growth forward": ("logprobs", "lse", "entropy"),
    "growth forward + candidates": ("ids", "logprobs", "counts", "lse", "entropy", "sampled_logprobs"),
    "growth forward+backward, trainable head": (0, 1),
    "growth forward+backward, frozen head": (0,),
}


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
@pytest.mark.parametrize("kind", HEAD_FIELDS)
def test_a_wrong_field_of_ours_fails_the_check(kind):
    case = head_case(kind)
    results = {
        name: case.contenders[name]() for name in ("cpp", "eager log_softmax") if name in case.contenders
    }
    if kind == "step without eager":
        del results["eager log_softmax"]
    case.check(results)
    right = results["cpp"]
    for field in HEAD_FIELDS[kind]:
        value = getattr(right, field) if isinstance(field, str) else right[field]
        if value.is_floating_point():
            slip = 1e-3 if isinstance(field, int) else 1e-4
            wrong = torch.where(value.isfinite(), value * (1 + slip), value)
        else:
            wrong = value + 1
        if isinstance(field, str):
            results["cpp"] = right._replace(**{field: wrong})
        else:
            results["cpp"] = tuple(wrong if i == field else part for i, part in enumerate(right))
        with pytest.raises(AssertionError):
            case.check(results)


# -------------------------------------------------------------------------------------------------- tables


def test_verdicts_compare_the_same_work_only():
    rows = [
        row("matmul", 1), row("cpp", 4), row("eager", 2), row("cpp, one id", 3), row("TRL, one id", 6),
        row("F.x, one id", math.nan, error="absent"),
    ]  # fmt: skip
    many, one = tables.verdicts(rows)
    assert many.outcome == "lost" and many.other == "eager" and many.factor == 0.5
    assert str(many) == "LOST: cpp 2.00x slower than eager"
    assert one.outcome == "won" and str(one) == "won: cpp, one id 2.00x faster than TRL, one id"
    assert tables.verdicts([row("cpp", 1.0), row("eager", 1.02)])[0].outcome == "level"
    assert tables.verdicts([row("matmul", 1), row("cpp", 2)]) == []


def test_growth_is_the_fitted_exponent():
    rows = [
        row(name, ms(n), mib=mib(n), shape=f"N={n}", axes=dict(N=n), curve="N", series="s")
        for n in (64, 256, 1024)
        for name, ms, mib in (
            ("cpp", lambda n: 3 * n**1.1, lambda n: 4.0),
            ("eager", lambda n: n * n, lambda n: n),
        )
    ]
    ours, eager = tables.growth(rows)
    assert ours.exponent == pytest.approx(1.1) and ours.memory_exponent == pytest.approx(0)
    assert eager.exponent == pytest.approx(2) and eager.memory_exponent == pytest.approx(1)
    assert "N^1.10" in tables.markdown_growth([ours]) and "N 64 to 1,024" in tables.markdown_growth([ours])
    assert tables.growth(rows[:4]) == []  # two points fit anything


def test_csv_has_the_machine_and_a_column_for_each_size():
    text = tables.as_csv(
        [row("cpp", 2, axes=dict(N=3, V=7)), row("eager", 1)], dict(commit="abc", command="x")
    )
    lines = text.splitlines()
    assert lines[:2] == ["# commit: abc", "# command: x"] and lines[2].endswith(",N,V")
    assert lines[3].endswith(",3,7") and lines[4].endswith(",,")


# --------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "shape", [heads.Shape(300, 128, 2003, torch.float32), heads.Shape(64, 256, 5000, torch.bfloat16)]
)
def test_calibrated_rows_have_the_stated_histogram(shape):
    torch.manual_seed(0)
    rows = heads.calibrated.__wrapped__(shape, "cpu")
    assert rows.mean_candidates == pytest.approx(heads.CANDIDATES_PER_ROW, abs=0.05)
    assert rows.mean_mass == pytest.approx(heads.MASS, abs=0.015) and 0.3 < rows.mean_entropy < 1
    p = torch.softmax(rows.hidden.float() @ rows.weight.float().T, 1)
    counts = (p >= heads.MIN_PROB).sum(1)
    assert counts.min() == 1 and counts.max() == len(heads.HISTOGRAM)
    assert (p.gather(1, rows.sampled[:, None]) >= heads.MIN_PROB * 0.95).all()
    assert heads.measured(*heads.inputs(shape, "cpu")[:2])[0] < 0.3  # plain random rows have next to none


def test_shapes_are_those_of_real_models_and_affordable():
    for device, seconds_a_matmul, rate in (("cpu", 1.0, 0.15e12), ("cuda", 0.3, 300e12)):
        chosen = [*heads.shapes(device, False), *heads.more_shapes(device)]
        assert all(shape.flops / rate < seconds_a_matmul for shape in chosen)
        assert {"Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B", "Llama-3.2-1B"} <= {shape.model for shape in chosen}
        assert {1, 5, 10} <= {shape.K for shape in chosen}
        assert any(shape.N % 2 and shape.V % 2 for shape in chosen)
    assert (2048, 1024, 32_000) in [shape[:3] for shape in heads.shapes("cpu", False)]


# ------------------------------------------------------------------------------------------ run and plots


@pytest.fixture
def fake_benchmark(monkeypatch, spin):
    """A module bench_segment_scan, whose `cases` a test may set."""

    def fake_cases(device, quick):
        for n in (1, 2, 4):
            contenders = {"matmul": spin(n), "cpp": spin(2 * n), "eager": spin(n)}
            yield Case(
                "FAKE", f"N={n}", contenders, lambda results: None, axes=dict(N=n), curve="N", series="s"
            )
        alone = {"matmul": spin(1), "cpp": spin(2), "eager": spin(1)}
        yield Case("FAKE", "alone", alone, lambda results: None)

    module = types.SimpleNamespace(cases=fake_cases)
    monkeypatch.setitem(sys.modules, "benchmarks.bench_segment_scan", module)
    return module


def test_run_writes_json_csv_and_plots_and_shows_what_it_loses(fake_benchmark, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--op", "segment_scan", "--quick", "--device", "cpu", "--plot", str(tmp_path / "plots")]
    assert run.main([*flags, "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]) == 0
    out = capsys.readouterr().out
    assert "LOST: cpp" in out and "4 lost" in out and "growth" not in out.split("LOST")[0] and "N^1" in out
    content = json.loads((tmp_path / "a.json").read_text())
    assert {"commit", "command", "versions", "cpu", "seconds", "load"} <= content["machine"].keys()
    assert len(content["rows"]) == 12 and len((tmp_path / "a.csv").read_text().splitlines()) > 12
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"ratio-FAKE.png", "growth-N.png"}


def test_run_fails_on_a_wrong_result(fake_benchmark, spin, capsys):
    def check(results):
        raise AssertionError("off by one")

    fake_benchmark.cases = lambda device, quick: iter([Case("FAKE", "s", {"cpp": spin(1)}, check)])
    assert run.main(["--op", "segment_scan", "--quick", "--device", "cpu"]) == 1
    assert "off by one" in capsys.readouterr().out


def test_every_benchmark_is_a_module_with_cases():
    for name in run.MODULES:
        assert (ROOT / "benchmarks" / f"bench_{name}.py").is_file()
        assert callable(__import__(f"benchmarks.bench_{name}", fromlist=["cases"]).cases)
    listed = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert listed == set(run.MODULES)


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found, absent = peers.one_token("cpu")
    assert absent["quack linear CE"] == "not installed: pip install quack-kernels"
    assert absent["TRL chunked log-prob"] == "not installed: pip install trl"
    assert set(found) <= {"F.linear_cross_entropy"}
    assert peers.grpo_loss("cpu") == (None, "not installed: pip install liger-kernel")


# ---------------------------------------------------------------------------------------------------- gate


def test_gate_ratio_is_the_median_of_blocks_of_least_times():
    now = [0.0]
    noise = itertools.cycle([0, 5, 0])

    def costs(seconds):
        def call():
            now[0] += seconds + next(noise)

        return call

    found = gate.ratios({"matmul": costs(2.0), "cpp": costs(3.0)}, "cpp", lambda: now[0])
    assert found == {"matmul": pytest.approx(1.5)}


def test_gate_measures_again_before_it_fails():
    committed = {"a": {"matmul": 1.0, "eager": 0.5}, "b": {"matmul": 2.0}}
    asked = []

    def measurement(*answers):
        remaining = iter(answers)

        def measure_all(only):
            asked.append(only)
            return next(remaining)

        return measure_all

    fine = {"a": {"matmul": 1.2, "eager": 0.6}, "b": {"matmul": 2.4}}
    assert gate.judge(measurement(fine), committed)[1] == [] and asked == [None]
    slow = {"a": {"matmul": 1.3, "eager": 0.6}, "b": {"matmul": 2.4}}
    assert gate.judge(measurement(slow, {"a": fine["a"]}), committed)[1] == [] and asked[-1] == {"a"}
    lines = gate.judge(measurement(slow, {"a": {"matmul": 1.28, "eager": 0.7}}), committed)[1]
    assert lines == ["a / matmul: 1.28, committed 1.00"]
    assert "no committed figure" in gate.worse({"new": {"matmul": 1.0}}, committed)[0]


@pytest.mark.skipif(not HAS_CPP, reason="the gate compares the C++ kernels")
def test_a_seeded_slowdown_fails_the_gate(monkeypatch, tmp_path, capsys):
    name, case, others = next(gate.cases())
    threads = torch.get_num_threads()
    monkeypatch.setattr(gate, "COMMITTED", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "cases", lambda: iter([(name, case, others)]))
    try:
        assert gate.main(["--write"]) == 0 and gate.main([]) == 0
        kernel = case.contenders["cpp"]
        case.contenders["cpp"] = lambda: (kernel(), kernel())
        assert gate.main([]) == 1
    finally:
        torch.set_num_threads(threads)
    assert f"SLOWER: {name} / matmul" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_CPP, reason="the gate compares the C++ kernels")
def test_the_gate_does_not_judge_another_cpu(monkeypatch, tmp_path, capsys):
    committed = dict(machine=dict(cpu="FAKE other CPU"), ratios={"a": {"matmul": 1.0}})
    (tmp_path / "gate.json").write_text(json.dumps(committed))
    monkeypatch.setattr(gate, "COMMITTED", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "measure_all", lambda only=None: {"a": {"matmul": 9.0}})
    threads = torch.get_num_threads()
    try:
        assert gate.main([]) == 0
        out = capsys.readouterr().out
        assert "NOT JUDGED" in out and "FAKE other CPU" in out and "9.000" in out
        committed["machine"]["cpu"] = machine.describe()["cpu"]
        (tmp_path / "gate.json").write_text(json.dumps(committed))
        assert gate.main([]) == 1
    finally:
        torch.set_num_threads(threads)


def test_the_committed_gate_covers_every_case():
    committed = json.loads(gate.COMMITTED.read_text())["ratios"]
    if HAS_CPP:
        assert {name: set(others) for name, _, others in gate.cases()} == {
            n: set(r) for n, r in committed.items()
        }


# --------------------------------------------------------------------------------------------- GPU report

FAKE_MACHINE = dict(
    date="2000-01-01 00:00:00 +0000", command="FAKE", commit="fake", modified=False, device="FAKE GPU",
    cpu="FAKE", cores=1, threads=1, versions=dict(torch="0"), cuda=None,
)  # fmt: skip
FAKE_NCU = """==PROF== Connected
done
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","_head_stats_kernel","(132, 1, 1)","gpu__time_duration.sum","msecond","1.5"
"0","_head_stats_kernel","(132, 1, 1)","launch__registers_per_thread","register/thread","168"
"1","_head_dz_kernel","(132, 1, 1)","gpu__time_duration.sum","msecond","2.5"
==PROF== Disconnected
"""


def test_parts_fit_the_budget_and_name_every_benchmark():
    listed = gpu_report.parts(Path("x"))
    assert sum(part.slice for part in listed) <= gpu_report.BUDGET <= 540
    names = [part.name for part in listed]
    assert names[:4] == ["build", "sweep", "tests", "sanitizer"] and names[-1] == "ncu"
    assert {f"bench_{name}" for name in run.MODULES} <= set(names) and set(gpu_report.SLICES) <= set(names)


def test_selection_and_time_slices():
    a, b, c = (gpu_report.Part(name, [], slice_) for name, slice_ in (("a", 10), ("b", 20), ("c", 30)))
    assert gpu_report.select([a, b, c], None, {"b"}) == [a, c]
    assert gpu_report.select([a, b, c], ["b"], {"b"}) == [b]  # asked for by name: again
    assert gpu_report.limit(a, [b, c], 60) == 10
    assert gpu_report.limit(b, [c], 55) == 22  # what a left is shared
    assert gpu_report.limit(c, [], 200) == 90  # a part that hangs gets three slices at most


def python(code):
    return [sys.executable, "-c", code]


def test_a_part_runs_stops_at_its_limit_or_says_why_not(tmp_path):
    log = tmp_path / "log"
    done = gpu_report.run_part(gpu_report.Part("a", python("print('fine')"), 1), 20, log)
    assert done["status"] == "passed" and done["tail"] == ["fine"]
    failed = gpu_report.run_part(gpu_report.Part("a", python("import sys; sys.exit(3)"), 1), 20, log)
    assert failed["status"] == "failed (exit 3)"
    start = time.monotonic()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    code = f"import subprocess; print('begun', flush=True); subprocess.run({sleep!r})"
    stopped = gpu_report.run_part(gpu_report.Part("a", python(code), 1), 5, log)
    assert stopped["status"] == "stopped at its limit of 5 s" and time.monotonic() - start < 20
    assert stopped["tail"] == ["begun"]
    assert "budget is spent" in gpu_report.run_part(gpu_report.Part("a", [], 1), 2, log)["status"]
    missing = gpu_report.Part("a", [""], 1, "ncu is not installed")
    assert gpu_report.run_part(missing, 50, log)["status"] == "not run: ncu is not installed"


def test_report_resumes_where_it_stopped(monkeypatch, tmp_path, capsys):
    ran = tmp_path / "ran"
    ran.mkdir()

    def fake_parts(folder):
        fake = json.dumps(dict(rows=[row("cpp", 1).as_dict()]))
        wrote = f"from pathlib import Path; Path({str(folder / 'bench_b.json')!r}).write_text({fake!r})"
        once_bad = (
            f"import sys; from pathlib import Path; p = Path({str(ran)!r}) / 'c'; seen = p.exists(); "
            "p.touch(); sys.exit(0 if seen else 1)"
        )
        count = f"from pathlib import Path; p = Path({str(ran)!r}) / 'a'; p.open('a').write('x')"
        return [
            gpu_report.Part("a", python(count), 30), gpu_report.Part("bench_b", python(wrote), 30),
            gpu_report.Part("c", python(once_bad), 30),
        ]  # fmt: skip

    monkeypatch.setattr(gpu_report, "parts", fake_parts)
    monkeypatch.setattr(gpu_report, "describe", lambda: dict(FAKE_MACHINE))
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: True)
    out = tmp_path / "out"
    assert gpu_report.main(["--out", str(out)]) == 1
    (report,) = out.glob("*.json")
    content = json.loads(report.read_text())
    assert {n: p["status"] for n, p in content["parts"].items()} == dict(
        a="passed", bench_b="passed", c="failed (exit 1)"
    )
    assert content["parts"]["bench_b"]["rows"][0]["contender"] == "cpp"
    assert gpu_report.main(["--out", str(out), "--resume"]) == 0
    assert (ran / "a").read_text() == "x"  # not run again
    assert gpu_report.main(["--out", str(out), "--only", "a"]) == 0
    assert (ran / "a").read_text() == "xx"
    (report,) = out.glob("*.json")
    assert list(json.loads(report.read_text())["parts"]) == ["a", "bench_b", "c"]
    page = report.with_suffix(".md").read_text()
    assert "FAKE GPU" in page and "| bench_b | passed |" in page and "**cpp**" in page


def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_report.main(["--out", str(tmp_path / "out")]) == 2 and sweep.main(["--write"]) == 2
    assert not (tmp_path / "out").exists()


def test_counters_from_the_profilers_csv():
    stats, dz = gpu_report.counters(FAKE_NCU)
    assert stats["kernel"] == "_head_stats_kernel" and stats["gpu__time_duration.sum"] == "1.5 msecond"
    assert stats["launch__registers_per_thread"] == "168 register/thread" and dz["grid"] == "(132, 1, 1)"
    assert gpu_report.counters("==ERROR== ERR_NVGPUCTRPERM") == []


def test_every_op_runs_once_for_the_sanitizer(capsys):
    assert small.main(["--device", "cpu"]) == 0 and capsys.readouterr().out == "done\n"


# --------------------------------------------------------------------------------------------------- sweep

HALF = sweep.CONFIGS["sm_90", "half"]


def test_neighbours_differ_in_one_field_and_fit():
    near = sweep.neighbours(HALF, "sm_90", "half")
    assert near and all(sum(a != b for a, b in zip(HALF, other, strict=True)) == 1 for other in near)
    assert all(sweep.fits(other, "sm_90", "half") for other in near)
    assert not sweep.fits(HALF._replace(num_warps=4), "sm_90", "half")  # 256 accumulators a thread
    assert not sweep.fits(HALF._replace(num_stages=5), "sm_90", "half")  # 240 KiB of shared memory
    for (architecture, kind), config in sweep.CONFIGS.items():
        assert architecture == "interpreter" or sweep.fits(config, architecture, kind), (architecture, kind)


def test_search_descends_within_its_time():
    def cost(config):
        return None if config.BLOCK_V == 64 else abs(config.BLOCK_D - 128) + 10 * config.num_stages

    prepared = []

    def tried(rounds):
        left = iter([1.0] * rounds)
        return sweep.search(
            HALF,
            lambda c: sweep.neighbours(c, "sm_90", "half"),
            prepared.append,
            cost,
            lambda: next(left, 0.0),
        )

    found = tried(1000)
    assert cost(sweep.fastest(found)) == min(ms for ms in found.values() if ms is not None) < cost(HALF)
    assert next(iter(found)) == HALF and prepared
    assert list(tried(0)) == [HALF]
    assert 1 < len(tried(3)) <= 4
    assert sweep.fastest({HALF: None}) == HALF


def test_the_winner_becomes_the_default_if_it_gains(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "describe", lambda: dict(FAKE_MACHINE))
    better = HALF._replace(num_stages=2)
    shape = heads.shapes("cuda", True)[0]
    new = sweep.entry(sweep.report(("sm_90", "half"), shape, {HALF: 10.0, better: 9.0}))
    assert new["config"] == better._asdict() and new["device"] == "FAKE GPU"
    assert sweep.entry(sweep.report(("sm_90", "half"), shape, {HALF: 10.0, better: 9.9})) is None
    assert sweep.entry(sweep.report(("sm_90", "half"), shape, {HALF: None})) is None
    file = tmp_path / "tuned.json"
    file.write_text('{"configs": []}')
    for entry in (new | dict(config=HALF._asdict()), new):  # a later sweep takes the place of an earlier one
        sweep.write_tuned(entry, file)
    table = {("sm_90", "half"): HALF, ("sm_80", "half"): HALF}
    tuned.overlay(table, file)
    assert table == {("sm_90", "half"): better, ("sm_80", "half"): HALF}
    file.write_text('{"configs": [{"architecture": "sm_90", "kind": "half", "config": {"BLOCK_Q": 1}}]}')
    with pytest.raises(ValueError, match="BLOCK_Q"):
        tuned.overlay(table, file)


def test_the_committed_tuning_names_known_entries_and_is_packaged():
    tuned.overlay(dict(sweep.CONFIGS))  # raises otherwise
    _, _, package_data = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")
    assert '"head/tuned.json"' in package_data


# -------------------------------------------------------------------------------------------------- render


def test_the_results_page_quotes_the_files_and_their_losses():
    curve = [
        row("cpp", n, shape=f"N={n}", axes=dict(N=n), curve="N", series="s", op="FAKE over N")
        for n in (1, 2, 4)
    ]
    rows = [row("matmul", 2, base=2), row("cpp", 4, base=2), row("eager", 2.5, base=2), *curve]
    sweep_result = dict(
        architecture="sm_90", kind="half", shape="FAKE", start=HALF._asdict(), winner=HALF._asdict(),
        tried=[dict(config=HALF._asdict(), ms=1.5), dict(config={"BLOCK_N": 1}, ms=None)],
    )  # fmt: skip
    parts = dict(
        sweep=dict(status="passed", seconds=3.0, sweep=sweep_result),
        bench_a=dict(status="stopped at its limit of 5 s", seconds=5.0, rows=[r.as_dict() for r in rows]),
        ncu=dict(status="passed", seconds=1.0, counters=gpu_report.counters(FAKE_NCU)),
    )
    files = {
        "fake-cpu.json": dict(machine=FAKE_MACHINE, rows=[r.as_dict() for r in rows]),
        "fake-gpu.json": dict(machine=FAKE_MACHINE, parts=parts),
    }
    page = render.page(files, ["plots/fake.png"])
    assert "## [fake-cpu.json](fake-cpu.json)" in page and "![fake](plots/fake.png)" in page
    assert page.count("- op, shape: cpp 1.60x slower than eager") == 2
    assert "| op | shape | matmul 2.00 ms | **2.00** cpp (1 MiB) | 1.25 eager (1 MiB) |" in page
    assert "N^1.00" in page and "2 configurations, 1 ran" in page and "(start, winner)" in page
    assert "1.5 msecond" in page and "stopped at its limit of 5 s" in page


def test_render_reads_results_and_leaves_other_files_alone(tmp_path, capsys):
    (tmp_path / "fake.json").write_text(
        json.dumps(dict(machine=FAKE_MACHINE, rows=[row("cpp", 1).as_dict()]))
    )
    (tmp_path / "other.json").write_text("[1, 2]")
    assert render.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "fake.json" in page and "other.json" not in page


def test_the_committed_results_page_is_up_to_date():
    folder = render.RESULTS
    plots = [f"plots/{path.name}" for path in sorted((folder / "plots").glob("*.png"))]
    assert (folder / "README.md").read_text() == render.page(render.load(folder), plots), (
        "run python -m benchmarks.render"
    )
    assert "FAKE" not in (folder / "README.md").read_text()


def test_the_machine_says_what_ran():
    header = machine.describe()
    assert header["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header["commit"] and header["load"] >= 0
