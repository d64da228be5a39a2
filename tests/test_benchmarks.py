"""The benchmark suite's own logic, without a GPU and without long runs.

Everything called FAKE is invented for these tests and stands in no results folder.
"""

import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "run.py").is_file():
    pytest.skip("no checkout with benchmarks/ beside the tests", allow_module_level=True)

import ipvrm_kernels  # noqa: E402
from benchmarks import (  # noqa: E402
    bench_distrl_step,
    bench_linear_candidates,
    bench_linear_distrl_loss,
    bench_linear_logprobs,
    bench_linear_logprobs_partial,
    bench_prefix_value_loss,
    bench_reward_step,
    bench_scaling,
    bench_segment_scan,
    gate,
    render,
    run,
)
from benchmarks.gpu import small, sweep  # noqa: E402
from benchmarks.suite import exact, headline, heads, machine, measure, models, peers, sequences, tables  # noqa: E402
from benchmarks.suite.measure import Case, Row, Target  # noqa: E402
from ipvrm_kernels.backend import HAS_CPP, HAS_TRITON  # noqa: E402
from ipvrm_kernels.head import tuned  # noqa: E402
from ipvrm_kernels.head.triton_tiles import CONFIGS  # noqa: E402
from ipvrm_kernels.linear_logprobs import LinearLogprobs  # noqa: E402
from ipvrm_kernels.torch_private import has_onednn  # noqa: E402


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


def test_a_peer_that_is_wrong_loses_its_own_row_only(spin):
    def check(results):
        for name, result in results.items():
            assert name in ("matmul", "cpp") or result, f"{name} gradient: off"

    contenders = {"matmul": spin(1), "cpp": spin(2), "peer": lambda: 0, "peer, one id": lambda: 0}
    rows = {r.contender: r for r in measure.measure(Case("op", "s", contenders, check), "cpu", seconds=0.01)}
    assert rows["cpp"].median_ms == pytest.approx(2) and not rows["cpp"].error
    assert rows["peer"].error == f"{measure.WRONG}: peer gradient: off"
    assert rows["peer, one id"].error == f"{measure.WRONG}: peer, one id gradient: off"
    contenders["cpp, one id"] = lambda: 0  # ours: then nothing of the case counts
    rows = measure.measure(Case("op", "s", contenders, check), "cpu")
    assert {r.error.startswith(measure.WRONG) for r in rows} == {True}


def test_the_yardstick_is_the_faster_of_the_bare_matmuls(spin):
    """MKL's and oneDNN's, in the same rounds; targets in multiples of the matmul are of that one too."""
    times = {"matmul": spin(4), "matmul by oneDNN": spin(2), "cpp": spin(5), "eager": spin(6)}
    case = Case("op", "s", times, lambda r: None, 1e9, 3e9, targets={"cpp": Target(2.4)})
    rows = {r.contender: r for r in measure.measure(case, "cpu", seconds=0.01)}
    assert {n: round(r.ratio, 6) for n, r in rows.items()} == {
        "matmul": 2, "matmul by oneDNN": 1, "cpp": 2.5, "eager": 3
    }  # fmt: skip
    assert rows["matmul"].tflops == pytest.approx(0.25)
    assert rows["matmul"].rounds == rows["matmul by oneDNN"].rounds
    assert str(tables.aims(list(rows.values()))[0]) == "MISSED: cpp 2.50, target <= 2.4 matmul"
    (verdict,) = tables.verdicts(list(rows.values()))
    assert str(verdict) == "won: cpp 1.20x faster than eager"
    page = render.page({"f.json": dict(machine=FAKE_MACHINE, rows=[r.as_dict() for r in rows.values()])}, {})
    assert "| matmul by oneDNN 2.00 ms; matmul 4.00 ms | **2.50** cpp" in page


def test_a_library_without_a_result_is_no_yardstick(spin):
    def broken():
        raise RuntimeError("not on this machine")

    case = Case("op", "s", {"matmul": spin(4), "matmul by oneDNN": broken, "cpp": spin(2)}, lambda r: None)
    rows = {r.contender: r for r in measure.measure(case, "cpu", seconds=0.01)}
    assert rows["cpp"].ratio == pytest.approx(0.5) and "not on this machine" in rows["matmul by oneDNN"].error


def test_both_libraries_multiply_alike():
    hidden, weight, _ = heads.inputs(heads.Shape(33, 64, 201, torch.float32), "cpu")
    found = heads.matmuls(hidden.requires_grad_(), weight)
    assert list(found) == ["matmul", "matmul by oneDNN"][: 1 + has_onednn()]
    for run_one in found.values():
        z = run_one()
        assert not z.requires_grad
        torch.testing.assert_close(z, (hidden @ weight.T).detach(), rtol=1e-4, atol=1e-4)
    assert list(heads.matmuls(hidden.bfloat16(), weight.bfloat16())) == ["matmul"]


def test_flops_are_of_the_yardstick_and_the_least_work_of_the_others(spin):
    case = Case("op", "s", {"matmul": spin(1), "cpp": spin(4)}, lambda r: None, 1e9, 3e9)
    matmul, cpp = measure.measure(case, "cpu", seconds=0.01)
    assert matmul.tflops == pytest.approx(1.0) and cpp.tflops == pytest.approx(0.75)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPP, reason="the benchmarks measure the C++ kernels here")
def test_checks_of_the_head_hold_in_half_precision_and_catch_a_fault():
    """As a GPU runs them: eager PyTorch rounds its logits there, and is no oracle."""
    torch.manual_seed(0)
    shape = heads.Shape(256, 128, 4096, torch.bfloat16)
    distrl = bench_linear_distrl_loss
    cases = [
        bench_linear_logprobs.forward_case(shape, "cpu"),
        *(bench_linear_logprobs.step_case(shape, "cpu", frozen, False, False) for frozen in (False, True)),
        bench_linear_candidates.candidates_case(shape, "cpu"),
        bench_linear_logprobs_partial.step_case(shape, "cpu"),
        *(
            distrl.loss_case(make(shape, "cpu", frozen), "cpu", with_grpo=False, with_compile=False)
            for make in (distrl.RolloutRows.calibrated, distrl.RolloutRows.random)
            for frozen in (False, True)
        ),
    ]
    for case in cases:
        names = [n for n in case.contenders if measure.is_ours(n) or n.startswith(("matmul", "eager"))]
        results = {name: case.contenders[name]() for name in names}
        case.check(results)
        if type(results["cpp"]) is tuple:  # gradients
            dhidden, *rest = results["cpp"]
            results["cpp"] = (dhidden * 1.1, *rest)
            with pytest.raises(AssertionError, match="^cpp "):
                case.check(results)


def test_a_check_that_cannot_run_leaves_times_and_says_so(spin):
    def out_of_memory():
        raise torch.OutOfMemoryError("out of memory")

    def check(results):
        assert results["cpp"] == results["eager"]

    contenders = {"matmul": spin(1), "cpp": spin(2), "F.x": spin(3), "eager": out_of_memory}
    rows = measure.measure(Case("op", "s", contenders, check), "cpu", seconds=0.01)
    times = {r.contender: r for r in rows if not r.error}
    assert times["cpp"].median_ms == pytest.approx(2) and "out of memory" in rows[-1].error
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


def test_targets_are_met_or_missed(spin):
    targets = {"cpp": Target(2.5), "cpp, one id": Target(1 / 3, "F.x, one id")}
    contenders = {"matmul": spin(2), "cpp": spin(4), "cpp, one id": spin(3), "F.x, one id": spin(6)}
    case = Case("op", "s", contenders, lambda r: None, targets=targets)
    rows = measure.measure(case, "cpu", seconds=0.01)
    assert {r.shape for r in rows} == {"s"}
    met, missed = tables.aims([Row.from_dict(r.as_dict()) for r in rows])
    assert str(met) == "met: cpp 2.00, target <= 2.5 matmul"
    assert str(missed) == "MISSED: cpp, one id 2.00x, target >= 3x F.x"
    assert tables.aims([r for r in rows if r.contender != "matmul"])[0].outcome == "unknown"
    memory = dict(target=1.15, target_of="grpo_prm", target_memory=1.05)
    rows = [row("grpo_prm", 10, mib=100.0), row("distrl", 11, mib=106.0, **memory)]
    assert [str(a) for a in tables.aims([Row.from_dict(r.as_dict()) for r in rows])] == [
        "met: distrl 1.10, target <= 1.15 grpo_prm",
        "MISSED: distrl 1.06 of the peak memory, target <= 1.05 grpo_prm",
    ]
    assert str(Target(1.15, "grpo_prm", memory=1.05)) == "<= 1.15 grpo_prm, memory <= 1.05"
    assert [a.outcome for a in tables.aims(rows[1:])] == ["unknown", "unknown"]
    curve = [
        row("cpp", ms, shape=f"N={n}", axes=dict(N=n), curve="N", series="s", scratch_mib=5.0, **more)
        for n, ms, more in ((1, 1, {}), (4, 4, {}), (8, 9, dict(target=8.4, target_of=measure.START)))
    ]
    (growing,) = tables.aims(curve)
    assert str(growing) == "MISSED: cpp 9.00, target <= 8.4 the curve's start"
    assert "5.0 to 5.0" in tables.markdown_growth(tables.growth(curve))


def test_targets_are_those_of_their_shape():
    cpu = heads.shapes("cpu", False)[0]
    assert heads.targets("trainable", cpu, ["cpp"], "cpu") == {"cpp": Target(3.7)}
    assert heads.targets("trainable", cpu._replace(K=5), ["cpp"], "cpu") == {}
    assert heads.targets("forward", cpu, ["cuda"], "cuda") == {}
    small, large = (heads.targets("forward", s, ["cuda"], "cuda") for s in heads.shapes("cuda", False))
    assert small["cuda"].limit == 1.1 and large["cuda"].limit == 1.03


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
    if kind == "one shard":
        return bench_linear_logprobs_partial.step_case(HEAD, "cpu")
    return bench_scaling.target_case(HEAD, "cpu", kind.removeprefix("growth "), with_target=True)


HEAD_FIELDS = {
    "forward": ("logprobs", "lse", "entropy"),
    "candidates": ("ids", "logprobs", "counts", "lse", "entropy", "sampled_logprobs"),
    "step": (0, 1),
    "step without eager": (0, 1),
    "one shard": (0, 1, 2, 3, 4, 5),  # the gradients, then the fields of Partial
    "growth forward": ("logprobs", "lse", "entropy"),
    "growth forward + candidates": ("ids", "logprobs", "counts", "lse", "entropy", "sampled_logprobs"),
    "growth forward+backward, trainable head": (0, 1),
    "growth forward+backward, frozen head": (0,),
}


@pytest.mark.slow
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


def test_growth_is_modelled_as_what_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_scaling, "expected", lambda kind, *rest: asked.append(kind) or {})
    for kind in bench_scaling.GROWING:
        head_case(f"growth {kind}")
    assert asked == ["forward", "candidates", "trainable", "frozen"]


def without(z, columns):
    return z.index_fill(1, torch.arange(z.shape[1])[columns], -math.inf)


# what a head op would return whose tiles of 256 columns went wrong
TILE = slice(256 * 300, 256 * 301)
WRONG_TILES = {
    "one left out": lambda z: without(z, TILE),
    "one of zeros": lambda z: z.index_fill(1, torch.arange(z.shape[1])[TILE], 0.0),
    "one that holds another's": lambda z: torch.cat([z[:, : TILE.start], z[:, :256], z[:, TILE.stop :]], 1),
    "128 phantom zeros": lambda z: torch.nn.functional.pad(z, (0, 128)),
}


@pytest.fixture(scope="module")
def many_tiles():
    """(exact, fp32 logits (N, V), sampled (N,)) of a real vocabulary, bf16."""
    torch.manual_seed(0)
    hidden, weight, ids = heads.inputs(heads.Shape(16, 64, 151_936, torch.bfloat16), "cpu")
    return exact.Exact(hidden, weight), hidden.float() @ weight.float().T, ids[:, 0]


def results_of(z, right, sampled):
    """linear_logprobs from logits z (N, >= V); the sampled token's own logit from those that are right."""
    lse = torch.logsumexp(z, 1)
    log_p = z - lse[:, None]
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(1)
    return LinearLogprobs(right.gather(1, sampled[:, None])[:, 0] - lse, lse, entropy)


@pytest.mark.parametrize("field", LinearLogprobs._fields)
@pytest.mark.parametrize("fault", WRONG_TILES)
def test_a_wrong_tile_fails_the_forward_check(many_tiles, fault, field):
    """Of 594 tiles, in any of the three results alone; what is right passes."""
    judge, z, sampled = many_tiles
    log_p = judge.log_p.gather(1, sampled[judge.rows, None])[:, 0]
    right, wrong = results_of(z, z, sampled), results_of(WRONG_TILES[fault](z), z, sampled)
    bench_linear_logprobs.check_forward(judge, "triton", right, log_p)
    with pytest.raises(AssertionError, match="triton"):
        broken = right._replace(**{field: getattr(wrong, field)})
        bench_linear_logprobs.check_forward(judge, "triton", broken, log_p)


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


@pytest.mark.slow
def test_run_writes_json_csv_and_plots_and_shows_what_it_loses(fake_benchmark, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--op", "segment_scan", "--quick", "--device", "cpu", "--plot", str(tmp_path / "plots")]
    assert run.main([*flags, "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]) == 0
    out = capsys.readouterr().out
    assert "LOST: cpp" in out and "4 lost" in out and "growth" not in out.split("LOST")[0] and "N^1" in out
    content = json.loads((tmp_path / "a.json").read_text())
    assert {"commit", "command", "versions", "cpu", "seconds", "load"} <= content["machine"].keys()
    assert len(content["rows"]) == 12 and len((tmp_path / "a.csv").read_text().splitlines()) > 12
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"dots-FAKE.png", "growth-N.png"}


@pytest.fixture
def one_kind(monkeypatch):
    """Says which kind of processor the run is on, in /proc/cpuinfo's words."""

    def on(family, model):
        info = {"vendor_id": "AuthenticAMD", "cpu family": family, "model": model, "model name": "AMD EPYC"}
        monkeypatch.setattr(machine, "_cpuinfo", lambda: info)

    return on


@pytest.mark.slow
def test_kinds_of_processors_keep_their_rows_beside_each_other(fake_benchmark, one_kind, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--op", "segment_scan", "--quick", "--device", "cpu", "--results", str(tmp_path)]
    one_kind("25", "1")
    assert run.main(flags) == 0
    before = (tmp_path / "cpu-amd-zen-3.json").read_text()
    one_kind("26", "2")
    assert run.main(flags) == 0 and (tmp_path / "cpu-amd-zen-3.json").read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {
        f"cpu-amd-zen-{zen}.{kind}" for zen in (3, 5) for kind in ("json", "csv")
    } | {"plots"}
    assert render.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    first, second = page.split("## [cpu-amd-zen-5.json]")
    assert "AMD EPYC, AMD Zen 3, " in first and "AMD EPYC, AMD Zen 5, " in second
    assert "![growth-N](plots/cpu-amd-zen-3/growth-N.png)" in first and "zen-3/" not in second


def test_processors_by_name():
    def kind(vendor, family, model):
        return machine.processor({"vendor_id": vendor, "cpu family": family, "model": model})

    assert [kind("AuthenticAMD", *of) for of in (("23", "49"), ("25", "1"), ("25", "17"), ("26", "2"))] == [
        "AMD Zen 2", "AMD Zen 3", "AMD Zen 4", "AMD Zen 5"
    ]  # fmt: skip
    assert kind("GenuineIntel", "6", "143") == "Intel family 6 model 143"
    assert kind("AuthenticAMD", "99", "1") == "AMD family 99 model 1"
    assert machine.processor({}) == machine.platform.machine()
    known = dict(processor="Intel family 6 model 143", device="NVIDIA H200")
    assert machine.results_name(known, "cpu") == "cpu-intel-family-6-model-143"
    assert machine.results_name(known, "cuda") == "cuda-nvidia-h200"


def test_a_killed_run_goes_on_and_another_run_is_not_gone_on_with(
    fake_benchmark, one_kind, monkeypatch, tmp_path, capsys
):
    one_kind("25", "1")
    monkeypatch.setenv(machine.COMMIT, "fake")  # else a commit made beside this test ends the run
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", "--json", "F"])
    file = tmp_path / "f.json"
    flags = ["--op", "segment_scan", "--quick", "--device", "cpu", "--json", str(file)]
    all_cases, built = fake_benchmark.cases, []

    def killed(device, quick):
        for number, case in enumerate(all_cases(device, quick)):
            built.append(case.shape)
            if number == 2:
                raise KeyboardInterrupt
            yield case

    fake_benchmark.cases = killed
    with pytest.raises(KeyboardInterrupt):
        run.main(flags)
    half = json.loads(file.read_text())
    assert {r["shape"] for r in half["rows"]} == {"N=1", "N=2"} and "progress" in half
    fake_benchmark.cases, measured = all_cases, []
    plain = measure.measure
    monkeypatch.setattr(
        "benchmarks.suite.session.measure", lambda case, *a: measured.append(case.shape) or plain(case, *a)
    )
    one_kind("26", "2")
    assert run.main([*flags, "--go-on"]) == 2 and not measured
    assert "another run" in (said := capsys.readouterr().err) and "AMD Zen 3, now AMD Zen 5" in said
    one_kind("25", "1")
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", "--json", "F", "--go-on"])
    assert run.main([*flags, "--go-on"]) == 0 and measured == ["N=4", "alone"]
    whole = json.loads(file.read_text())
    assert len(whole["rows"]) == 12 and whole["rows"][:6] == half["rows"] and "progress" not in whole
    assert whole["machine"]["date"] == half["machine"]["date"]
    assert run.main([*flags, "--go-on"]) == 0 and measured == ["N=4", "alone"]
    assert "complete" in capsys.readouterr().out and json.loads(file.read_text()) == whole


def test_run_fails_on_a_wrong_result(fake_benchmark, spin, capsys):
    def check(results):
        raise AssertionError("off by one")

    fake_benchmark.cases = lambda device, quick: iter([Case("FAKE", "s", {"cpp": spin(1)}, check)])
    assert run.main(["--op", "segment_scan", "--quick", "--device", "cpu"]) == 1
    assert "off by one" in capsys.readouterr().out


def test_run_fails_when_ours_fails_and_goes_on_where_a_case_cannot_be_built(fake_benchmark, spin, capsys):
    def broken():
        raise RuntimeError("no kernel image")

    def fake_cases(device, quick):
        contenders = {"matmul": spin(1), "cpp": broken}
        yield Case("FAKE", "s", contenders, lambda results: None, absent={"triton": "not here", "peer": "no"})
        raise IndexError("no shapes")

    fake_benchmark.cases = fake_cases
    assert run.main(["--op", "segment_scan", "--quick", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "cpp: RuntimeError: no kernel image" in err and "its cases end here: IndexError: no shapes" in err
    assert "not here" not in err  # what cannot run here is no failure
    contenders = {"matmul": spin(1), "peer": broken}
    fake_benchmark.cases = lambda device, quick: iter([Case("FAKE", "s", contenders, lambda results: None)])
    assert run.main(["--op", "segment_scan", "--quick", "--device", "cpu"]) == 0


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


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPP, reason="the gate compares the C++ kernels")
def test_a_seeded_slowdown_fails_the_gate(monkeypatch, tmp_path, capsys):
    name, case, others = next(gate.cases())
    threads = torch.get_num_threads()
    monkeypatch.setattr(gate, "COMMITTED", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "cases", lambda: iter([(name, case, others)]))
    try:
        assert gate.main(["--write"]) == 0 and gate.main([]) == 0
        kernel = case.contenders["cpp"]
        case.contenders["cpp"] = lambda: (kernel(), kernel())[1]
        assert gate.main([]) == 1
    finally:
        torch.set_num_threads(threads)
    assert f"SLOWER: {name} / matmul" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_CPP, reason="the gate compares the C++ kernels")
def test_the_gate_judges_another_cpu_loosely(monkeypatch, tmp_path, capsys):
    committed = dict(machine=dict(cpu="FAKE other CPU", simd="NONE"), ratios={"a": {"matmul": 1.0}})
    measured = {"a": {"matmul": 2.0}}
    (tmp_path / "gate.json").write_text(json.dumps(committed))
    monkeypatch.setattr(gate, "COMMITTED", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "measure_all", lambda only=None: measured)
    threads = torch.get_num_threads()
    try:
        assert gate.main([]) == 0
        out = capsys.readouterr().out
        assert "FAKE other CPU" in out and "judged at 2.5 x" in out and "2.000" in out
        measured["a"]["matmul"] = 9.0
        assert gate.main([]) == 1
        measured["a"]["matmul"] = 2.0
        committed["machine"] |= {key: machine.describe()[key] for key in gate.SAME}
        (tmp_path / "gate.json").write_text(json.dumps(committed))
        assert gate.main([]) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPP, reason="the gate compares the C++ kernels")
def test_the_committed_gate_covers_every_case_and_pytest_benchmark_runs_them():
    committed = json.loads(gate.COMMITTED.read_text())["ratios"]
    assert {name: set(others) for name, _, others in gate.cases()} == {
        n: set(r) for n, r in committed.items()
    }
    from benchmarks import test_cases

    calls = test_cases.built()  # checks every case
    assert {name for name, _ in calls} == committed.keys()
    for call in calls.values():
        call()


FAKE_MACHINE = dict(
    date="2000-01-01 00:00:00 +0000", command="FAKE", commit="fake", modified=False, device="FAKE GPU",
    cpu="FAKE", cores=1, threads=1, versions=dict(torch="0"), cuda=None,
)  # fmt: skip


# --------------------------------------------------------------------------- what benchmarks ask of a GPU


def test_a_step_of_a_gpu_has_a_model_made_on_it(monkeypatch):
    transformers = pytest.importorskip("transformers")
    seen = []

    class Fake(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1))

    def from_config(config, dtype):
        seen.append((torch.empty(1).device.type, dtype, config.num_hidden_layers))
        return Fake()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
    models.qwen3("meta", quick=True)
    assert seen == [("meta", torch.float32, 4)]
    monkeypatch.undo()
    model = models.qwen3("cpu", quick=True)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_no_loop_over_long_sequences_on_a_gpu(monkeypatch):
    """What is built for "cuda", on the CPU."""
    monkeypatch.setattr(bench_scaling, "edges", lambda lengths, device: sequences.edges(lengths, "cpu"))
    monkeypatch.setattr(bench_scaling, "_packed", lambda T, device: (
        sequences.edges([T] * bench_scaling.SEQUENCES, "cpu"), torch.randn(bench_scaling.SEQUENCES * T)
    ))  # fmt: skip
    for T, first in ((2048, "padded loop"), (32_768, "torch")):
        case = bench_scaling.scan_case(T, "cuda")
        assert next(iter(case.contenders)) == first and ("padded loop" in case.contenders) == (T == 2048)
    assert "padded loop" in bench_scaling.scan_case(32_768, "cpu").contenders
    monkeypatch.setattr(
        bench_segment_scan, "batches", lambda device, quick, level: sequences.batches("cpu", quick, level)
    )
    for of in (sequences.runnable, sequences.kernels):
        monkeypatch.setattr(bench_segment_scan, of.__name__, lambda op, device, of=of: of(op, "cpu"))
    monkeypatch.setattr(sequences, "FULL", ((2, 300, True), (1, 6000, True)))
    short, long = bench_segment_scan.cases("cuda", False)
    assert next(iter(short.contenders)) == "padded loop" and next(iter(long.contenders)) == "torch"
    assert list(long.contenders).count("torch") == 1 and "padded loop" not in long.contenders
    results = {name: run() for name, run in long.contenders.items()}
    long.check(results)
    if HAS_CPP:
        with pytest.raises(AssertionError):
            long.check(results | dict(cpp=results["cpp"] * 1.01))


@pytest.mark.slow
def test_targets_against_peers_on_a_gpu(monkeypatch):
    """Cases as of a GPU (any device but "cpu"), on the CPU at a tiny shape that is said to have targets."""
    shape = heads.Shape(16, 8, 33, torch.float32)
    on_cpu = lambda make: lambda *given: make(*given[:-1], "cpu")  # noqa: E731
    for name in ("inputs", "kernels", "one_token", "edges"):
        monkeypatch.setattr(bench_linear_logprobs, name, on_cpu(getattr(bench_linear_logprobs, name)))
    has_targets = lambda kind, shape, names, device: dict.fromkeys(names, Target(4.0))  # noqa: E731
    monkeypatch.setattr(bench_linear_logprobs, "targets", has_targets)
    names = sequences.kernels("linear_logprobs", "cpu")
    third = {"TRL": Target(1 / 3, "TRL chunked log-prob, one id"),
             "liger": Target(1 / 3, "liger fused linear CE, one id")}  # fmt: skip
    forward = bench_linear_logprobs.forward_case(shape, "meta").targets
    for frozen in (False, True):
        step = bench_linear_logprobs.step_case(shape, "meta", frozen, with_compile=False).targets
        for name in names:
            assert forward[f"{name}, log-prob alone"] == Target(1 / 3, "TRL chunked log-prob, log-prob alone")
            assert step[f"{name}, one id"] == third["TRL"] and step[name] == Target(4.0)
            assert step[f"{name} linear_distrl_loss, one id"] == third["liger"]
    alone = bench_linear_logprobs.step_case(shape, "meta", False, with_peers=False, with_compile=False)
    assert set(alone.targets) == set(names)
    offered = {*peers.one_token("cuda")[0], *peers.one_token("cuda")[1]}
    assert {"TRL chunked log-prob", "liger fused linear CE"} <= offered  # what the targets name


def test_the_value_loss_states_its_target_in_microseconds(monkeypatch):
    on_cpu = lambda device, quick, level: sequences.batches("cpu", quick, level)  # noqa: E731
    monkeypatch.setattr(bench_prefix_value_loss, "batches", on_cpu)
    monkeypatch.setattr(sequences, "FULL", ((256, 2048, False), (2, 30, True)))
    stated, other = bench_prefix_value_loss.cases("cuda", False)
    assert stated.shape == "B=256 T=2048 forward+backward, target raw <= 30 us of device time"
    assert "us" not in other.shape


def test_installed_peers_give_the_log_prob():
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, 16), torch.randn(50, 16)
    target = torch.randint(0, 50, (24,))
    expected = torch.log_softmax(hidden @ weight.T, 1)
    found, absent = peers.one_token("cpu")
    quick = [name for name in found if "torch_compile" not in name]  # which takes half a minute to compile
    if not quick:
        pytest.skip(f"no peer: {absent}")
    for name in quick:
        leaf = hidden.clone().requires_grad_()
        total = found[name](leaf, weight, target)
        measure.assert_close(name, total, -expected.gather(1, target[:, None]).sum(), 1e-5)
        (gradient,) = torch.autograd.grad(total, leaf)
        wanted = (expected.exp() - torch.nn.functional.one_hot(target, 50)) @ weight
        measure.assert_close(name, gradient, wanted, 1e-4)
    run_trl, reason = peers.with_entropy()
    if run_trl is None:
        pytest.skip(reason)
    log_p, entropy = run_trl(hidden, weight, target)
    measure.assert_close("log-prob", log_p, expected.gather(1, target[:, None])[:, 0], 1e-5)
    measure.assert_close("entropy", entropy, -(expected.exp() * expected).sum(1), 1e-5)


def test_every_op_runs_once_for_the_sanitizer(capsys):
    assert small.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "done"
    if HAS_CPP:
        assert {line.split()[0] for line in lines[:-1]} == set(ipvrm_kernels.OPS)


def test_no_implementation_to_watch_is_an_error(monkeypatch):
    monkeypatch.setattr(small, "kernels", lambda op, device: [])
    with pytest.raises(RuntimeError, match="no implementation runs"):
        small.main(["--device", "cpu"])


# --------------------------------------------------------------------------------------------------- sweep

SM_90 = ("sm_90", "half")
HALF = sweep.config_of(*SM_90, "forward")


def test_two_programs_of_an_sm_fit_where_registers_and_shared_memory_allow():
    two = sweep.Config(128, 128, 64, 4, 3, 2)  # the compiler's report: 239 registers, 98 KB
    assert sweep.fits(two, *SM_90, "forward")
    assert not sweep.fits(two._replace(num_stages=4), *SM_90, "forward")  # 2 x 128 KB
    assert not sweep.fits(two, *SM_90, "dz")  # 2 x 128 KB with the result
    assert sweep.fits(two._replace(num_stages=2), *SM_90, "dz")
    assert not sweep.fits(two._replace(num_warps=8), *SM_90, "forward")  # 16 warps of more than 128 registers
    assert not sweep.fits(two._replace(BLOCK_V=256, num_stages=2), *SM_90, "forward")  # 256 accumulators
    assert not sweep.fits(HALF._replace(num_stages=5), *SM_90, "forward")  # 240 KiB


@pytest.mark.parametrize(("architecture", "kind"), [key for key in CONFIGS if key[0] != "interpreter"])
def test_each_kernel_has_a_fixed_list_of_configurations(architecture, kind):
    for kernel in sweep.KERNELS:
        start, *others = sweep.choices(kernel, architecture, kind)
        assert start == sweep.config_of(architecture, kind, kernel)
        assert all(sweep.fits(config, architecture, kind, kernel) for config in (start, *others))
        assert 4 <= len(others) < sweep.LENGTH and start not in others
        # another BLOCK_V can win only if every kernel has it
    shared = set.intersection(
        *({c.BLOCK_V for c in sweep.choices(kernel, architecture, kind)} for kernel in sweep.KERNELS)
    )
    assert len(shared) >= 2


def test_a_gpu_that_borrows_tiles_gets_what_fits_its_own_shared_memory(monkeypatch):
    """sm_120: sm_80's tiles, 99 KB of shared memory, through which the descriptors' results pass."""
    for kernel in sweep.KERNELS:
        start, *others = sweep.choices(kernel, "sm_80", "half", "sm_120")
        assert start == sweep.config_of("sm_80", "half", kernel) and len(others) >= 4
        assert all(sweep.fits(config, "sm_120", "half", kernel) for config in (start, *others))
    two = sweep.Config(128, 64, 32, 4, 4, 2, softcap_V=64)
    assert two in sweep.choices("dz", "sm_80", "half")
    assert two not in sweep.choices("dz", "sm_80", "half", "sm_120")  # 2 x 64 KB with the result
    for major, gpu in ((8, "sm_80"), (9, "sm_90"), (12, "sm_120")):
        monkeypatch.setattr(sweep.torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        assert sweep.gpu_at_hand() == gpu


def test_the_list_has_two_programs_and_one_pipeline_across_tiles():
    forward = sweep.choices("forward", *SM_90)
    assert any(c.programs_per_sm == 2 and c.BLOCK_V == 128 for c in forward)
    assert any(c.flatten for c in forward)


def test_winners_share_the_columns_of_a_tile():
    wide, narrow = HALF, HALF._replace(BLOCK_V=128)
    tried = {kernel: {wide: 10.0, narrow: 9.0} for kernel in sweep.KERNELS}
    tried["dz"] = {wide: 10.0, narrow: 14.0, wide._replace(num_stages=2): 9.5}
    assert sweep.winners(tried) == dict.fromkeys(sweep.KERNELS, wide) | {"dz": wide._replace(num_stages=2)}
    tried["dz"][narrow] = 11.0
    assert sweep.winners(tried) == dict.fromkeys(sweep.KERNELS, narrow)
    tried["saved"][narrow] = None  # wrong there: none of it wins
    assert sweep.winners(tried)["forward"] == wide
    assert sweep.winners({"forward": {wide: None}}) == {"forward": wide}


@pytest.mark.slow
def test_compiling_aside_ends_at_its_deadline(monkeypatch):
    code = "import json, sys, time; time.sleep(60 if json.loads(sys.argv[1])['num_stages'] == 2 else 0)"
    plain = sweep.subprocess.Popen
    processes = []

    def popen(command, **options):
        assert command[-2] == "groups"
        processes.append(plain([sys.executable, "-c", code, command[-1]], **options))
        return processes[-1]

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    start = time.monotonic()
    slow, quick = HALF._replace(num_stages=2), HALF._replace(num_stages=4)
    assert sweep.compile_aside("groups", [slow, quick], "half", 8.0) == [quick]
    assert time.monotonic() - start < 30 and all(process.poll() is not None for process in processes)


TRIAL = """
import torch
from benchmarks.gpu import sweep
from benchmarks.suite.heads import Shape
from ipvrm_kernels.head import triton_backward, triton_forward, triton_tiles

key = ("interpreter", "half")
trial = sweep.Trial(key, Shape(160, 40, 896, torch.bfloat16, 3), "cpu")
config = sweep.config_of(*key, "forward")
for kernel in sweep.KERNELS:
    for tried in (config, config._replace(BLOCK_N=64, BLOCK_V=64), config._replace(flatten=True)):
        assert trial(kernel, tried) > 0, kernel
partial_stats, launch_dz = triton_forward._partial_stats, triton_backward.launch_dz

def left_out(run):  # the last program's tiles, unless each has one
    def launch(ops, *rest):
        run(ops, *rest)
        if ops.programs < 4:
            rest[1 if run is launch_dz else 2 if rest[2] is not None else 1].view(-1)[-1] = float("nan")
    return launch

triton_forward._partial_stats, triton_backward.launch_dz = left_out(partial_stats), left_out(launch_dz)
assert [trial(kernel, config) for kernel in sweep.KERNELS] == [None] * 4
triton_forward._partial_stats, triton_backward.launch_dz = partial_stats, launch_dz
for kernel in sweep.KERNELS:  # as wrong in both grids
    trial.expected[kernel] = [x * 1.1 for x in trial.expected[kernel]]
assert [trial(kernel, config) for kernel in sweep.KERNELS] == [None] * 4
try:
    sweep.Trial(("sm_90", "half"), Shape(160, 40, 896, torch.bfloat16, 3), "cpu")
except RuntimeError as error:
    assert "the ops use the tiles of" in str(error)
else:
    raise AssertionError("tiles that the ops do not use")
"""


@pytest.mark.full
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_a_trial_checks_bits_before_it_times():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TRIAL], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_master_weight_is_not_copied_in_its_sweep():
    shape = heads.shapes("cuda", True)[0]
    copy = shape.V * shape.D * shape.dtype.itemsize
    limit = sweep.workspace("master", shape)
    assert limit // 2 < copy < limit and sweep.workspace("half", shape) // 2 >= copy


def test_a_sweep_writes_as_it_goes_and_fails_without_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "describe", lambda: dict(FAKE_MACHINE))
    monkeypatch.setattr(sweep, "architecture", lambda: "sm_90")
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "compile_aside", lambda kernel, configs, kind, seconds: configs[:-1])
    written, found, seen = tmp_path / "sweep.json", [], []
    monkeypatch.setattr(sweep, "write_tuned", found.append)

    def trial(key, shape):
        def evaluate(kernel, config):
            seen.append(len(json.loads(written.read_text())["tried"]) if written.is_file() else 0)
            return 8.0 if config.num_stages == 2 else 10.0 if config.BLOCK_V == 256 else 11.0

        return evaluate

    monkeypatch.setattr(sweep, "Trial", trial)
    monkeypatch.setattr(sweep, "gpu_at_hand", lambda: "sm_90")
    flags = ["--json", str(written), "--seconds", "60", "--write"]
    assert sweep.main(flags) == 0 and seen == list(range(len(seen)))
    content = json.loads(written.read_text())
    expected = {kernel: sweep.choices(kernel, *SM_90)[:-1] for kernel in sweep.KERNELS}  # compiled in time
    assert [(one["kernel"], one["config"]) for one in content["tried"]] == [
        (kernel, config._asdict()) for kernel, configs in expected.items() for config in configs
    ]
    assert content["start_ms"] == 40.0 and content["winner_ms"] < 40.0
    assert len({config["BLOCK_V"] for config in content["winner"].values()}) == 1
    assert {entry["kernel"] for entry in found[0]} == set(sweep.KERNELS)
    monkeypatch.setattr(sweep, "Trial", lambda key, shape: lambda kernel, config: None)
    assert sweep.main(flags) == 1


def swept(ms):
    tried = {kernel: {HALF: 10.0, HALF._replace(num_stages=2): ms} for kernel in sweep.KERNELS}
    return sweep.report(SM_90, heads.shapes("cuda", True)[0], tried)


def test_the_winners_become_the_defaults_if_they_gain(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "describe", lambda: dict(FAKE_MACHINE))
    better = HALF._replace(num_stages=2)
    new = sweep.entries(swept(9.0))
    assert [entry["kernel"] for entry in new] == list(sweep.KERNELS)
    assert new[0]["config"] == better._asdict() and new[0]["device"] == "FAKE GPU"
    assert sweep.entries(swept(9.9)) == [] == sweep.entries(swept(None))
    file = tmp_path / "tuned.json"
    file.write_text('{"configs": []}')
    earlier = [entry | dict(config=HALF._asdict()) for entry in new]
    for entries in (earlier, new):  # a later sweep takes the place of an earlier one
        sweep.write_tuned(entries, file)
    table, departures = {SM_90: HALF, ("sm_80", "half"): HALF}, {(*SM_90, "dz"): dict(num_stages=3)}
    tuned.overlay(table, departures, file)
    assert table == {SM_90: better, ("sm_80", "half"): HALF} and departures[(*SM_90, "dz")] == {}
    dz = dict(architecture="sm_90", kind="half", kernel="dz")
    file.write_text(json.dumps(dict(configs=[dict(dz, config=dict(num_warps=4))])))
    tuned.overlay(table, departures, file)
    assert table[SM_90] == better and departures[(*SM_90, "dz")] == dict(num_warps=4)
    for config, said in ((dict(BLOCK_Q=1), "BLOCK_Q"), (dict(BLOCK_V=64), "the forward's BLOCK_V")):
        file.write_text(json.dumps(dict(configs=[dict(dz, config=config)])))
        with pytest.raises(ValueError, match=said):
            tuned.overlay(table, departures, file)


def test_the_committed_tuning_names_known_entries_and_is_packaged():
    tuned.overlay(dict(CONFIGS), {})  # raises otherwise
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
        architecture="sm_90", kind="half", shape="FAKE", start=dict(dz=HALF._asdict()),
        winner=dict(dz=HALF._asdict()),
        tried=[
            dict(kernel="dz", config=HALF._asdict(), ms=1.5),
            dict(kernel="dz", config={"BLOCK_N": 1}, ms=None),
        ],
    )  # fmt: skip
    parts = dict(
        sweep=dict(status="passed", seconds=3.0, sweep=sweep_result),
        tests=dict(
            status="failed",
            seconds=4.0,
            tests=dict(counts=dict(triton=dict(PASSED=8, FAILED=1)), failed=["test_fake[triton-cuda]"]),
        ),
        bench_a=dict(status="stopped at its limit of 5 s", seconds=5.0, rows=[r.as_dict() for r in rows]),
        ncu=dict(status="passed", seconds=1.0, counters=[dict(kernel="k", grid="", Duration="1.5 msecond")]),
    )
    files = {
        "fake-cpu.json": dict(machine=FAKE_MACHINE, rows=[r.as_dict() for r in rows]),
        "fake-gpu.json": dict(machine=FAKE_MACHINE, parts=parts),
    }
    page = render.page(files, {"fake-cpu.json": ["plots/fake-cpu/fake.png"]})
    assert "## [fake-cpu.json](fake-cpu.json)" in page
    assert "![fake](plots/fake-cpu/fake.png)" in page.partition("## [fake-gpu.json]")[0]
    assert page.count("- op, shape: cpp 1.60x slower than eager") == 2
    assert "| op | shape | matmul 2.00 ms | 2.00 cpp (1 MiB) | **1.25** eager (1 MiB) |" in page
    assert "N^1.00" in page and "2 configurations, 1 ran" in page and "(start, winner)" in page
    assert "triton: 1 failed, 8 passed." in page and "- test_fake[triton-cuda]" in page
    assert "1.5 msecond" in page and "stopped at its limit of 5 s" in page


def test_render_reads_results_and_leaves_other_files_alone(tmp_path, capsys):
    (tmp_path / "fake.json").write_text(
        json.dumps(dict(machine=FAKE_MACHINE, rows=[row("cpp", 1).as_dict()]))
    )
    (tmp_path / "other.json").write_text("[1, 2]")
    assert render.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "fake.json" in page and "other.json" not in page


def test_a_file_is_judged_by_the_targets_of_today():
    """Whatever those of its commit were; other contenders' and those of a curve stay."""
    start = "N=2048 D=1024 V=32000 float32"
    axes = dict(N=2048, D=1024, V=32_000, K=8)
    shapes = {
        "trainable": ("linear_logprobs", f"{start} K=8 forward+backward trainable head"),
        "frozen": ("linear_logprobs", f"{start} K=8 forward+backward frozen head"),
        "forward": ("linear_logprobs", f"{start} lse + sampled + entropy"),
        "candidates": ("linear_candidates", f"{start}, calibrated: 1.3"),
        "distrl_loss": ("linear_distrl_loss", f"{start} K=8, random, forward+backward trainable head"),
    }

    def limits(sizes, **more):
        old = (row("cpp", 2, op=op, shape=s, axes=sizes, target=9.0, **more) for op, s in shapes.values())
        content = dict(rows=[r.as_dict() for r in old])
        return dict(zip(shapes, (r.target for r in render._rows(content)), strict=True))

    assert limits(axes, target_of="matmul") == {kind: of[0] for kind, of in heads.TARGETS.items()}
    on_gpu = dict(axes, N=8192, D=4096, V=151_936)
    assert limits(on_gpu, target_of="matmul") == {kind: of[2] for kind, of in heads.TARGETS.items()}
    assert {*limits(dict(axes, N=64), target_of="matmul").values()} == {9.0}
    assert {*limits(axes, target_of=measure.START).values()} == {9.0}
    kept = row("cpp logits kept", 2, shape=shapes["trainable"][1], axes=axes, target=9.0, target_of="matmul")
    assert heads.with_todays_target(kept).target == heads.SAVED_TARGETS[torch.float32]
    shapes = {kind: (op, shape.replace("float32", "bfloat16")) for kind, (op, shape) in shapes.items()}
    assert limits(axes, target_of="matmul") == heads.BF16_TARGETS
    assert limits(on_gpu, target_of="matmul") == {kind: of[2] for kind, of in heads.TARGETS.items()}
    kept = replace(kept, shape=shapes["trainable"][1])
    assert heads.with_todays_target(kept).target == heads.SAVED_TARGETS[torch.bfloat16]


def test_a_file_whose_yardstick_is_the_slower_library_says_so():
    rows = [row("matmul", 2), row("cpp", 1)]
    study = [
        dict(op="tile", shape=f"{size} z = h w.T", contender=name, median_ms=ms)
        for size, slow in (("1024 x 8 x 8", 4.0), ("384 x 8 x 8", 9.0))
        for name, ms in (("blas", slow), ("onednn", 2.0))
    ]

    def said(rows, library="onednn", study=study):
        content = dict(machine={**FAKE_MACHINE, "cpu_matmul": library}, rows=[r.as_dict() for r in rows])
        return re.findall(
            r"\*\*Of an older commit\*\*: .*", render.page({"f.json": {**content, "study": study}}, {})
        )

    (text,) = said(rows)
    assert "MKL alone, ours run by oneDNN, which took 0.50 of its time for 1024 x 8 x 8 here" in text
    assert text.endswith("ratios would be about 2.0 times as large.")
    (text,) = said(rows, study=[])
    assert text.endswith("ratios would be larger.")
    assert (
        not said(rows, "blas") and not said([*rows, row("matmul by oneDNN", 2)]) and not said([row("cpp", 1)])
    )


def test_the_committed_results_page_is_up_to_date():
    folder = render.RESULTS
    files = render.load(folder)
    assert (folder / "README.md").read_text() == render.page_of(folder, files), (
        "run python -m benchmarks.render"
    )
    assert "FAKE" not in (folder / "README.md").read_text()


def committed():
    """(rows, machine, study) of the results that the page opens with."""
    files = render.load(render.RESULTS)
    content = files[render.opened_with(files)]
    return [Row.from_dict(one) for one in content["rows"]], content["machine"], content["study"]


def test_the_pages_opening_says_what_the_file_says():
    """The ten lines and the picture's dots, from the rows themselves; what is lost is named."""
    rows, header, study = committed()
    of = {(r.op, r.shape, r.contender): r for r in rows}
    text = (render.RESULTS / "README.md").read_text(encoding="utf-8")
    opening = text.partition("\n## ")[0]
    assert headline.where(header) in opening
    lines = [line for line in opening.splitlines() if line.startswith("| ") and "yardstick" not in line]
    assert len(lines) == 10
    assert text.index("headline.png") < 300

    def variant(contender):
        """Ours by the other matmul library is in the same cell."""
        return re.sub(", by [a-z]+$", "", contender).partition(", ")[2]

    def written(op, shape, contender):
        """A cell as it stands in the table, bold where nobody of that case and variant is faster."""
        row = of[op, shape, contender]
        rivals = (
            r for (o, s, name), r in of.items() if (o, s, variant(name)) == (op, shape, variant(contender))
        )
        best = min(r.ratio for r in rivals if r.contender not in measure.LESS_WORK and not r.error)
        ratio = f"**{row.ratio:.2f}**" if row.ratio == best else f"{row.ratio:.2f}"
        return f"{ratio} ({row.scratch_mib:,.0f})"

    names = [name for op, s, name in of if s == headline.FORWARD and re.fullmatch("cpp(, by [a-z]+)?", name)]
    forward = [written("linear_logprobs", headline.FORWARD, name) for name in (*names, "eager log_softmax")]
    if len(names) == 2:
        forward[1] = f"by {headline.LIBRARIES[names[1].rpartition(' ')[2]]} {forward[1]}"
    assert f"| {', '.join(forward[:-1])} | {forward[-1]} |" in lines[0]
    step = next(s for op, s, _ in of if op == "distrl_step")
    assert f"| {written('distrl_step', step, 'ipvrm')} |" in lines[9]
    panels = headline.panels(rows, study)
    for panel, shape in zip(panels, (headline.FORWARD, headline.BACKWARD), strict=True):
        measured = {(r.ratio, r.scratch_mib) for (_, s, _), r in of.items() if s == shape}
        plain = [point for point in panel.points if not point.elsewhere]
        assert {(point.ratio, point.scratch_mib) for point in plain} <= measured and len(plain) > 6
    both = any(one["op"] == "op" for one in study) or any(", by " in r.contender for r in rows)
    assert all(sum(point.elsewhere for point in panel.points) == both for panel in panels)  # libraries
    said = opening.partition("**Lost**: ")[2].partition("\n")[0]
    for place, panel in zip(("left", "right"), panels, strict=True):
        for other in panel.others:
            name = other.label.rstrip(" ¹²³")
            assert (f"memory to {name} ({place}: " in said) == (other.scratch_mib < panel.ours.scratch_mib)
            assert (f"time to {name} ({place})" in said) == (other.ratio < panel.ours.ratio)
        slow = [p for p in panel.points if p.elsewhere and p.ratio > min(o.ratio for o in panel.others)]
        assert all(f"{point.ratio:.2f}x" in said for point in slow)
    judged = tables.verdicts(rows)
    lost = sorted((v for v in judged if v.outcome == "lost"), key=lambda v: v.factor)
    assert (f"time in {len(lost)} of {len(judged)} cases (" in said) == bool(lost)
    assert all(f"{v.op}, {v.shape}: {1 / v.factor:.2f}x" in said for v in lost[: headline.MOST_NAMED])
    assert all(f"- {v.op}, {v.shape}: {v.ours} " in text for v in lost)


def measured_head(**ratios):
    """Rows of the two cases that the opening shows; {contender: (ratio, scratch)} beside the matmul."""
    return [
        row(name, ratio, op="linear_logprobs", shape=shape, scratch_mib=scratch)
        for shape in (headline.FORWARD, headline.BACKWARD)
        for name, (ratio, scratch) in {"matmul": (1.0, 0.0), **ratios}.items()
    ]


def test_the_page_opens_with_a_file_that_has_both_matmul_libraries():
    """Where one has; else with the first that has the picture."""
    plain = {"cpp": (2.0, 8.0), "cpp, log-prob alone": (2.0, 8.0), "eager log_softmax": (1.6, 700.0)}
    more = {"cpp, by onednn": (1.0, 8.0), "cpp, log-prob alone, by onednn": (1.0, 8.0)}
    first, both, none = (
        dict(machine=FAKE_MACHINE, rows=[r.as_dict() for r in rows])
        for rows in (measured_head(**plain), measured_head(**plain, **more), [row("cpp", 1)])
    )
    assert render.opened_with({"a": none, "b": first, "c": both, "d": both}) == "c"
    assert render.opened_with({"a": none, "b": first}) == "b"
    assert render.opened_with({"a": none}) is None


def test_what_is_lost_is_named():
    """An alternative that is faster or smaller, ours by the other library, and cases that lost."""
    rows = measured_head(
        **{"cpp": (2.0, 8.0), "cpp, log-prob alone": (2.0, 8.0), "eager log_softmax": (1.6, 700.0)},
        **{"TRL chunked log-prob, log-prob alone": (3.0, 4.0), "cpp, log-prob alone, by blas": (5.0, 4.0)},
    )
    found = headline.panels(rows)
    assert headline.title(found).startswith("0.8 times the speed of the fastest alternative, in 8 MiB")
    said = "; ".join(headline.lost(found, rows))
    assert "memory to TRL, chunked (left: 4 against 8 MiB)" in said
    assert "time to eager log_softmax (left)" in said and "time to eager log_softmax (right)" in said
    assert "by MKL also time, 5.00x, to TRL, chunked, eager log_softmax (left)" in said
    assert "time in 2 of 4 cases (linear_logprobs, " in said
    curve = [
        row(name, 1 + (name == "cpp") * n, shape=f"N={n}") for n in (1, 2, 3, 4) for name in ("cpp", "eager")
    ]
    assert headline.lost([], curve) == [
        "time in 4 of 4 cases (the worst: op, N=4: 5.00x; op, N=3: 4.00x; op, N=2: 3.00x)"
    ]
    assert headline.panels(measured_head(**{"cpp": (2.0, 8.0)})) == []  # us alone: no picture


def test_a_whole_step_by_a_package_stands_among_the_packages():
    """Not as plain PyTorch, whose "eager" it is called by; the fastest of the line is bold."""
    times = {"eager full logits": 4, "eager with cut-cross-entropy cce": 1, "ipvrm": 2}
    rows = [
        row(n, ms, op="reward_step", shape="8 sequences", base=4, scratch_mib=3) for n, ms in times.items()
    ]
    (line,) = headline.table(rows).splitlines()[2:]
    assert line.endswith("| 0.50 (3) | 1.00 (3) |  | cut-cross-entropy cce **0.25** (3) |")


@pytest.mark.slow
def test_pictures_stay_below_their_height(tmp_path):
    """Of the largest op committed, and of one three times as large; nobody is shown alone."""
    plots = pytest.importorskip("benchmarks.suite.plots")
    rows, header, study = committed()
    largest = [r for r in rows if r.op == "linear_logprobs"]
    many = [replace(r, shape=f"{r.shape} {n}") for n in range(3) for r in largest]
    colours = plots._colours(rows)
    for some in (largest, many):
        figure = plots.dots(some, "linear_logprobs", header, colours)
        assert figure.get_figheight() * figure.dpi <= plots.TALLEST
    panels = headline.panels(rows, study)
    figure = plots.headline(panels, rows, header)
    words = " ".join(text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text")))
    assert headline.title(panels) in words
    assert "; ".join(headline.lost(panels, rows)) in words.replace("\n", " ")
    assert all(f"{point.label}  {point.ratio:.2f}x" in words for panel in panels for point in panel.points)
    alone = [
        row("cpp", n, shape=f"N={n}", axes=dict(N=n), curve="N", series="s", op="FAKE over N")
        for n in (1, 2, 4)
    ]
    assert plots.draw(alone, FAKE_MACHINE, tmp_path) == []


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
def test_ours_by_the_other_library_in_the_same_rounds(monkeypatch):
    """Where the ops run on both matmul libraries; each call is under its own, and checked like ours."""
    monkeypatch.setattr(heads.matmul, "why_not", lambda name: None)
    seen = []
    monkeypatch.setattr(heads, "by", lambda library, run: lambda: (seen.append(library), run())[1])
    (other,) = {"blas", "onednn"} - {heads.matmul.library()}
    for kind in ("forward", "candidates", "step"):
        case = head_case(kind)
        names = [name for name in case.contenders if name.endswith(f", by {other}")]
        assert f"cpp, by {other}" in names and len(names) == (2 if kind == "forward" else 1)
        results = {name: run() for name, run in case.contenders.items() if "compile" not in name}
        case.check(results)
        assert case.errors(results)[names[0]] < 1e-3
        broken = {name: None for name in names}
        with pytest.raises((AttributeError, TypeError)):
            case.check({**results, **broken})
    assert set(seen) == {other}
    monkeypatch.setattr(heads.matmul, "why_not", lambda name: "not here")
    assert heads.by_the_other({"cpp": print}, HEAD, "cpu") == {}


def test_a_peer_whose_sum_is_wrong_is_to_blame_alone():
    """The others keep their times; a sum of rounded logits may be further off than one of fp32."""
    case = head_case("forward")
    name = "F.linear_cross_entropy, log-prob alone"
    results = {n: run() for n, run in case.contenders.items() if "compile" not in n}
    case.check(results)
    with pytest.raises(AssertionError, match=name):
        case.check({**results, name: 1.02 * results[name]})
    torch.manual_seed(0)
    half = bench_linear_logprobs.forward_case(HEAD._replace(dtype=torch.bfloat16), "cpu")
    results = {n: run() for n, run in half.contenders.items() if "compile" not in n}
    half.check({**results, name: 1.015 * results[name]})
    with pytest.raises(AssertionError, match=name):
        half.check({**results, name: 1.05 * results[name]})


@pytest.mark.parametrize("library", ["brgemm", "blas"])
def test_bf16_is_measured_where_the_processor_multiplies_it(library, monkeypatch):
    """Beside operands that are upcast for the library of fp32; elsewhere not at all."""
    asked = []
    monkeypatch.setattr(
        heads.matmul, "library", lambda dtype=torch.float32: library if dtype == torch.bfloat16 else "blas"
    )
    monkeypatch.setattr(heads, "by", lambda name, run: asked.append(name) or run)
    dtypes = [shape.dtype for shape in heads.shapes("cpu", quick=False)]
    bf16 = HEAD._replace(dtype=torch.bfloat16)
    if library == "blas":
        assert dtypes == [torch.float32] and heads.by_the_other({"cpp": print}, bf16, "cpu") == {}
        return
    assert dtypes == [torch.float32, torch.bfloat16]
    assert heads.by_the_other({"cpp": print, "eager": print}, bf16, "cpu") == {"cpp, by blas": print}
    assert asked == ["blas"]
    spec = heads.shapes("cpu", quick=False)[1]
    for kind, limit in heads.BF16_TARGETS.items():
        assert heads.targets(kind, spec, ["cpp"], "cpu") == {"cpp": measure.Target(limit)}


def test_the_machine_says_what_ran():
    header = machine.describe()
    assert header["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header["commit"] and header["load"] >= 0


# ---------------------------------------------------------------------------------------------- accuracy


def test_peaked_rows_are_sure_of_one_token():
    shape = heads.Shape(64, 128, 8192, torch.float32)
    rows = heads.peaked(shape, "cpu")
    log_p = torch.log_softmax(rows.hidden.double() @ rows.weight.double().T, 1)
    assert (
        rows.mean_candidates == pytest.approx(1, abs=0.05)
        and rows.mean_mass > 0.95
        and str(rows).startswith("peaked: ")
    )
    picked = log_p.gather(1, rows.sampled[:, None])[:, 0]
    assert (picked[::2] > -0.3).all() and (picked[1::2] < -2).all()
    z = rows.hidden @ rows.weight.T
    assert 16 < z.max(1).values.median() < 32  # where bf16 has steps of 0.125


def errors_of(case):
    rows = measure.measure(case, "cpu", seconds=0.0)
    assert not any(r.error for r in rows if r.contender not in case.absent), [r.error for r in rows]
    assert all(r.note == "" for r in rows)
    return {r.contender: r.fp64_error for r in rows}


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [heads.calibrated, heads.peaked])
def test_accuracy_is_a_column_for_every_contender(make, dtype):
    torch.manual_seed(0)
    shape = heads.Shape(48, 64, 2048, dtype)
    case = bench_linear_logprobs.accuracy_case(shape, make(shape, "cpu"), "cpu")
    assert measure.ACCURACY in case.shape
    found = errors_of(case)
    named = set(found) - set(measure.LESS_WORK) - set(case.absent)
    assert {"cpp", "eager log_softmax", "released 64-row slices", "F.linear_cross_entropy"} <= named
    assert all(found[name] is not None for name in named) and found["matmul"] is None
    assert found["cpp"] < 1e-5
    if dtype == torch.bfloat16:  # logits rounded to half precision
        assert found["eager log_softmax"] > 1e-3 and found["F.linear_cross_entropy"] > 1e-3
    else:
        assert found["eager log_softmax"] < 1e-4


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
def test_the_error_of_a_contender_is_what_it_is_off(monkeypatch):
    torch.manual_seed(0)
    rows = heads.peaked(HEAD, "cpu")
    plain = bench_linear_logprobs.sliced_logprobs
    monkeypatch.setattr(
        bench_linear_logprobs, "sliced_logprobs", lambda *given: plain(*given).index_add(
            0, torch.tensor([0]), torch.tensor([[-0.25]])
        ),
    )  # fmt: skip
    found = errors_of(bench_linear_logprobs.accuracy_case(HEAD, rows, "cpu"))
    assert found["released 64-row slices"] == pytest.approx(0.25, abs=1e-4) and found["cpp"] < 1e-5


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
def test_the_error_of_liger_is_of_one_id_in_every_row(monkeypatch):
    """Its log-probs of the first row's token, each row's own; without it the row says why."""
    off = lambda hidden, weight, ids: torch.log_softmax(hidden @ weight.T, 1)[:, ids] + 0.25  # noqa: E731
    monkeypatch.setattr(bench_linear_logprobs, "logprobs", lambda device: ({}, {}))
    torch.manual_seed(0)
    rows = heads.peaked(HEAD, "cpu")
    for found, expected in (((off, ""), 0.25), ((None, "not installed"), None)):
        monkeypatch.setattr(bench_linear_logprobs, "shared_ids", lambda found=found: found)
        case = bench_linear_logprobs.accuracy_case(HEAD, rows, "cpu")
        errors = errors_of(case)
        assert errors["liger selected_token_ids"] == (expected and pytest.approx(expected, abs=1e-4))
        assert case.absent == ({} if expected else {"liger selected_token_ids": "not installed"})


@pytest.mark.skipif(not HAS_CPP, reason="the contender is the C++ op")
@pytest.mark.parametrize("kind", ["forward", "candidates", "step", "distrl_loss"])
def test_every_head_benchmark_has_errors_against_fp64(kind, monkeypatch):
    shared = lambda hidden, weight, ids: torch.log_softmax(hidden @ weight.T, 1)[:, ids]  # noqa: E731
    monkeypatch.setattr(bench_linear_logprobs, "shared_ids", lambda: (shared, ""))
    monkeypatch.setattr(bench_linear_logprobs, "compiled", lambda function: function)
    monkeypatch.setattr(peers, "_cut_cross_entropy", None)  # whose compiler takes half a minute
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    torch.manual_seed(0)
    if kind == "step":
        case = bench_linear_logprobs.step_case(HEAD, "cpu", frozen=False, with_compile=False)
        assert {"cpp, shared ids", "liger selected_token_ids, shared ids"} <= set(case.contenders)
    elif kind == "distrl_loss":
        batch = bench_linear_distrl_loss.RolloutRows.random(HEAD, "cpu", frozen=False)
        case = bench_linear_distrl_loss.loss_case(batch, "cpu", with_grpo=False, with_compile=False)
    else:
        case = head_case(kind)
    found = errors_of(case)
    scalar = {n for n in found if n.startswith("F.") and n.endswith("log-prob alone")}  # a sum over rows
    named = set(found) - set(measure.LESS_WORK) - set(case.absent) - scalar
    assert named and all(0 <= found[name] < 1e-3 for name in named)
    assert all(found[name] is None for name in scalar)


def test_an_error_that_cannot_be_computed_leaves_the_times(spin):
    def no_room(results):
        raise torch.OutOfMemoryError("no room")

    case = Case("op", "s", {"matmul": spin(1), "cpp": spin(2)}, lambda r: None, errors=no_room)
    rows = measure.measure(case, "cpu", seconds=0.01)
    assert {r.note for r in rows} == {"its error is not known: OutOfMemoryError: no room"}
    assert [r.fp64_error for r in rows] == [None, None] and not any(r.error for r in rows)


@pytest.mark.slow
def test_tables_and_the_chart_show_errors(tmp_path):
    shape = f"N=1 {measure.ACCURACY}, peaked"
    rows = [
        row("matmul", 1, shape=shape), row("cpp", 2, shape=shape, fp64_error=4.9e-7),
        row("eager", 2, shape=shape, fp64_error=3.5e-3),
    ]  # fmt: skip
    text = tables.markdown(rows)
    assert "| error against fp64 |" in text and "| 4.9e-07 |" in text and "| 3.5e-03 |" in text
    assert "error against" not in tables.markdown([row("cpp", 1)])
    again = [Row.from_dict(r.as_dict()) for r in rows]
    assert again == rows and "fp64_error" in tables.as_csv(rows, {})
    plots = pytest.importorskip("benchmarks.suite.plots")
    written = plots.draw(rows, FAKE_MACHINE, tmp_path)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000 and tmp_path / "accuracy.png" in written


def test_the_page_has_a_table_of_errors():
    """A line a contender, a column for each dtype and kind of rows."""
    case = measure.ACCURACY
    rows = [
        row(name, 1, shape=f"N=8 D=4 {dtype} {case}, {kind}: 1.0 candidates", fp64_error=error)
        for dtype, error in (("float32", 1e-6), ("bfloat16", 2e-3))
        for kind in ("calibrated", "peaked")
        for name in ("matmul", "cpp", "eager log_softmax")
    ]
    page = render.page({"f.json": dict(machine=FAKE_MACHINE, rows=[r.as_dict() for r in rows])}, {})
    assert "| error of a log-prob, nats | N=8 D=4 float32 calibrated | N=8 D=4 float32 peaked | " in page
    assert "| **cpp** | 1.0e-06 | 1.0e-06 | 2.0e-03 | 2.0e-03 |" in page
    assert "\n| eager log_softmax | 1.0e-06 |" in page
    opening = page.partition("\n## ")[0]
    assert headline.accuracy(rows, FAKE_MACHINE) in opening.splitlines()


def test_the_line_on_accuracy_takes_the_worst_of_each():
    """Of ours over implementations and cases; contenders by their error; no matmul, no missing one."""
    errors = {
        "bfloat16": {"cpp": (4e-7, 5e-7), "triton": (6e-7, 1e-7), "TRL": (3.5e-3, 1e-3), "CCE": (1e-3, None)},
        "float32": {"cpp": (2e-7, 3e-7), "TRL": (1e-7, 9e-8)},
    }
    rows = [
        row(name, 1, shape=f"N=8 D=4 {dtype} {measure.ACCURACY}, {kind}: 1", fp64_error=error)
        for dtype, found in errors.items()
        for name, both in {"matmul": (1.0, 1.0), **found}.items()
        for kind, error in zip(("calibrated", "peaked"), both, strict=True)
    ]
    said = headline.accuracy(rows, FAKE_MACHINE)
    assert said.startswith(
        "A log-prob is off by at most **6.0e-07** of bf16 inputs (CCE 1.0e-03, TRL 3.5e-03) and **3.0e-07** "
        "of fp32 inputs (TRL 1.0e-07), in nats against fp64,"
    )
    assert headline.where(FAKE_MACHINE) in said
    assert not headline.accuracy([r for r in rows if measure.is_ours(r.contender)], FAKE_MACHINE)
    assert not headline.accuracy([row("cpp", 1), row("eager", 1)], FAKE_MACHINE)


def test_a_peer_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "_trl", lambda: importlib.import_module("no_such_module"))
    monkeypatch.setattr(peers, "_cut_cross_entropy", lambda impl: importlib.import_module("no_such_module"))
    found, absent = peers.logprobs("cpu")
    assert absent["TRL chunked log-prob"] == "cannot be imported: No module named 'no_such_module'"
    assert "TRL chunked log-prob" not in found and "TRL chunked log-prob" not in peers.one_token("cpu")[0]


def test_an_older_liger_has_no_selected_token_ids(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.shared_ids() == (None, "not installed: pip install liger-kernel")
    module = types.ModuleType("liger_kernel.ops.fused_linear_scaled_cross_entropy")

    class Older:
        @staticmethod
        def apply(_input, weight, target, temperature=1.0):
            raise AssertionError

    module.LigerFusedLinearScaledCrossEntropyFunction = Older
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    run_shared, reason = peers.shared_ids()
    assert run_shared is None and "liger-kernel>=0.8.5" in reason


def test_ligers_shared_ids_are_those_of_every_row():
    run_shared, reason = peers.shared_ids()
    if run_shared is None:
        pytest.skip(reason)
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, 16, requires_grad=True), torch.randn(50, 16)
    ids = torch.tensor([3, 40, 7])
    got, expected = run_shared(hidden, weight, ids), torch.log_softmax(hidden @ weight.T, 1)[:, ids]
    measure.assert_close("log-probs", got.detach(), expected.detach(), 1e-5)
    upstream = torch.randn(24, 3)
    mine, right = (torch.autograd.grad(y, hidden, upstream)[0] for y in (got, expected))
    measure.assert_close("gradient", mine, right, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("module", [bench_reward_step, bench_distrl_step])
def test_a_wrong_step_of_ours_is_seen(module, dtype, monkeypatch):
    """In the dtype of a GPU's benchmark too: its loss and gradients, by the same step with an fp32 head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def small(device, quick):
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=999, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, use_cache=False,
        )).to(dtype).train()  # fmt: skip

    monkeypatch.setattr(module, "qwen3", small)
    torch.manual_seed(0)
    (case,) = module.cases("cpu", True)
    results = {name: case.contenders[name]() for name in ("eager full logits", "ipvrm")}
    case.check(results)
    loss, *gradients = results["ipvrm"]
    wrong = 0.2 if dtype == torch.bfloat16 else 0.01
    for changed in (
        (loss + 0.05, *gradients),
        (loss, gradients[0] * (1 + wrong), *gradients[1:]),
        (loss, *gradients[:-1], gradients[-1] * float("nan")),
    ):
        with pytest.raises(AssertionError, match=r"^ipvrm (loss|gradient): "):
            case.check(results | {"ipvrm": changed})


@pytest.mark.full
def test_a_whole_step_is_compared_with_its_fastest_rival(monkeypatch):
    plain = bench_reward_step.logprobs_of_peers

    def without_compilers(device):
        found, absent = plain(device)
        return {n: f for n, f in found.items() if "torch_compile" not in n}, absent

    monkeypatch.setattr(bench_reward_step, "logprobs_of_peers", without_compilers)
    torch.manual_seed(0)
    (case,) = bench_reward_step.cases("cpu", True)
    assert "eager with F.linear_cross_entropy" in case.contenders
    results = {name: run() for name, run in case.contenders.items()}
    case.check(results)  # loss and every gradient
    times = {name: 5.0 for name in case.contenders} | {"eager with F.linear_cross_entropy": 2.0, "ipvrm": 1.0}
    (verdict,) = tables.verdicts([row(name, ms) for name, ms in times.items()])
    assert str(verdict) == "won: ipvrm 2.00x faster than eager with F.linear_cross_entropy"
