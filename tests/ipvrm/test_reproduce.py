"""`ipvrm reproduce`: the plan goes on where it stopped, its commands are ours, and the tables are right."""

import json
import shlex
import statistics
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.cli import COMMANDS, main, parse
from ipvrm.data.files import records
from ipvrm.output.progress import Progress
from ipvrm.reproduce.tables import plan
from ipvrm.reproduce.tables.experiments import UPDATES, experiments, full, on_task, smoke
from ipvrm.reproduce.tables.inputs import PairsConfig, ProblemsConfig, keep_pairs, keep_problems
from ipvrm.reproduce.tables.paper import AVERAGE, COLUMNS, PAPER
from ipvrm.reproduce.tables.plan import Output, Step, Unit, command_line, config_of, needed, run_plan
from ipvrm.reproduce.tables.report import TABLES, cells, write_table_of
from ipvrm.reproduce.tables.run import ReproduceConfig, hours, reproduce
from ipvrm.run_folder import write_json, write_table
from ipvrm.training.checkpoint import TrainingInterrupted

FULL = full("sft", "prompts.parquet", "val.parquet", "pb")
SHOWN = Progress(enabled=False)

# ---------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Made:
    output_dir: str
    text: str
    source: str | None = None
    both: tuple[str, ...] = ()


@pytest.fixture
def ran(monkeypatch):
    """The names of the units that ran; one whose text is `bad` fails, `stop` is interrupted."""
    names = []

    def make(config, progress):
        names.append(Path(config.output_dir).name)
        if config.text == "bad":
            raise IpvrmError("no such thing")
        if config.text == "memory":
            raise MemoryError("of the device")
        if config.text == "stop":
            raise TrainingInterrupted("by its own flags", Path(config.output_dir), 143)
        Path(config.output_dir).mkdir()
        before = [Path(p, "out").read_text() for p in (config.source, *config.both) if p is not None]
        Path(config.output_dir, "out").write_text("".join([*before, config.text]))

    module = types.ModuleType("made_steps")
    module.Made, module.make = Made, make
    monkeypatch.setitem(sys.modules, "made_steps", module)
    monkeypatch.setattr(plan, "STEPS", {"make": Step("made_steps", "Made", "make")})
    return names


def units_of(**changed):
    texts = {"a": "1", "b": "2", "c": "3", "d": "4"} | changed
    return [
        Unit("a", "make", {"text": texts["a"]}),
        Unit("b", "make", {"text": texts["b"], "source": Output("a")}),
        Unit("c", "make", {"text": texts["c"], "both": (Output("a"), Output("b"))}),
        Unit("d", "make", {"text": texts["d"]}),
    ]


def test_a_plan_runs_each_unit_once(ran, tmp_path):
    assert run_plan(units_of(), tmp_path, SHOWN) == {}
    assert ran == ["a", "b", "c", "d"]
    assert (tmp_path / "c" / "out").read_text() == "1" + "12" + "3"
    assert run_plan(units_of(), tmp_path, SHOWN) == {} and len(ran) == 4
    assert run_plan([*units_of(), Unit("e", "make", {"text": "5"})], tmp_path, SHOWN) == {}
    assert ran[4:] == ["e"]


def test_a_failure_is_named_and_what_does_not_need_it_goes_on(ran, tmp_path):
    failed = run_plan(units_of(b="bad"), tmp_path, SHOWN)
    assert failed == {"b": "no such thing", "c": "left out: it needs b"}
    assert ran == ["a", "b", "d"]
    assert run_plan(units_of(b="bad"), tmp_path, SHOWN) == failed and ran[3:] == ["b"]  # again, alone


def test_a_failure_of_another_kind_is_no_end_of_the_plan(ran, tmp_path, capsys):
    failed = run_plan(units_of(b="memory"), tmp_path, SHOWN)
    assert failed == {"b": "MemoryError: of the device", "c": "left out: it needs b"}
    assert ran == ["a", "b", "d"] and "in make" in capsys.readouterr().err  # where it came from


def test_a_changed_unit_is_refused_and_nothing_is_lost(ran, tmp_path):
    run_plan(units_of(), tmp_path, SHOWN)
    with pytest.raises(IpvrmError, match=r"b in .* was made otherwise; changed: text \('2' then, '9' now\)"):
        run_plan(units_of(b="9"), tmp_path, SHOWN)
    assert len(ran) == 4 and (tmp_path / "b" / "out").read_text() == "12"


def test_an_interruption_stops_the_plan_and_the_unit_is_not_done(ran, tmp_path):
    with pytest.raises(TrainingInterrupted, match="b: stopped; the same command goes on") as caught:
        run_plan(units_of(b="stop"), tmp_path, SHOWN)
    assert caught.value.exit_code == 143 and ran == ["a", "b"]
    assert json.loads((tmp_path / "units" / "b.json").read_text())["seconds"] is None


def test_needed_takes_what_the_named_need_in_order(ran):
    assert [u.name for u in needed(units_of(), ["c"])] == ["a", "b", "c"]
    assert [u.name for u in needed(units_of(), ["d", "a"])] == ["a", "d"]


# ----------------------------------------------------------------------------------------------- the plans


def units_of_tables(scale, names=tuple(TABLES)):
    return needed(experiments(scale), [u for n in names for used in TABLES[n].rows.values() for u in used])


@pytest.mark.parametrize("scale", [FULL, smoke()], ids=["full", "smoke"])
def test_every_unit_stands_behind_what_it_needs(scale):
    units = experiments(scale)
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names)
    for number, unit in enumerate(units):
        assert set(unit.after) <= set(names[:number]), unit.name


def test_what_tables_share_is_run_once():
    together = {unit.name for unit in units_of_tables(FULL)}
    alone = [{unit.name for unit in units_of_tables(FULL, (name,))} for name in TABLES]
    assert set.union(*alone) == together and sum(map(len, alone)) > 1.5 * len(together)
    assert together == {unit.name for unit in experiments(FULL)}  # and there is none that no table has
    trained = {u.settings["objective"] for u in units_of_tables(FULL, ("table1",)) if u.command == "train-rm"}
    assert trained == {"q_rm", "dpo", "implicit_prm", "ipvrm"}


@pytest.mark.slow
@pytest.mark.parametrize("scale", [FULL, smoke()], ids=["full", "smoke"])
def test_every_printed_command_is_the_unit(scale, tmp_path):
    """As our command line reads it."""
    units, commands = units_of_tables(scale), 0
    for unit in units:
        line = command_line(unit, units, tmp_path)
        step, config = plan.STEPS[unit.command], config_of(unit, units, tmp_path)
        if step.module == plan.INPUTS:
            assert line.startswith(f"({unit.command} ")
            continue
        words = shlex.split(line)[1 + len(unit.command.split()) :]
        assert COMMANDS[unit.command].module == step.module and COMMANDS[unit.command].config == step.config
        assert line.startswith(f"ipvrm {unit.command} ") and parse(type(config), words, prog="p") == config
        commands += 1
    assert commands > 40


def test_full_is_the_papers_settings():
    from ipvrm.training.policy_config import resolve

    units = {u.name: config_of(u, experiments(FULL), Path("o")) for u in experiments(FULL)}
    assert [units[f"rm-ipvrm{name}"].margin for name in ("-m0", "", "-m10")] == [0, 5, 10]
    assert units["rm-rollouts"].num_generations == 5 and units["bon-rollouts"].num_generations == 64
    assert units["bon-ipvrm"].n == (4, 16, 64) and units["eval-sft"].num_generations == 8
    assert units["bon-endo_rm"].model == units["eval-sft"].model == "sft"
    td = units["td"]
    most = td.num_prompts * td.num_responses * td.prefixes_per_response * td.top_k
    assert most == 2500 and td.min_prob == 1 / 128 and units["td-problems"].sources == ("math-500",)
    policies = {n.removeprefix("policy-"): resolve(c)[0] for n, c in units.items() if n.startswith("policy-")}
    assert {(p.lora_r, p.learning_rate, p.num_generations, p.rollout_prompts) for p in policies.values()} == {
        (128, 3e-5, 4, 512)
    }
    online = {
        n: p.rm_learning_rate for n, p in policies.items() if p.algorithm in ("distrl", "grpo_prm", "prime")
    }
    assert online.pop("distrl-frozen") is None and online.pop("prime") == 1e-6
    assert len(online) == 9 and set(online.values()) == {1e-4}
    assert policies["reinforce_qrm"].reward_model == "o/rm-q_rm"


def test_on_the_task_every_reward_model_is_updated_at_one_rate():
    """PRIME's too, whose default is another: at this one the committed results were made."""
    from ipvrm.training.policy_config import resolve

    units = [u for u in experiments(smoke()) if u.command == "train-policy"]
    policies = [resolve(config_of(u, experiments(smoke()), Path("o")))[0] for u in units]
    rates = {(p.algorithm, p.rm_learning_rate) for p in policies if p.rm_update == "before"}
    assert rates == {(algorithm, 1e-4) for algorithm in ("distrl", "grpo_prm", "prime")}


@pytest.mark.parametrize("scale", [FULL, smoke()], ids=["full", "smoke"])
def test_the_five_updates_differ_in_their_switches_alone(scale):
    """Figure 6: four policies of its own, and the fifth is DistRL itself."""
    from ipvrm.training.policy_config import resolve

    units = {u.name: u for u in units_of_tables(scale, ("fig6",))}
    resolved = {
        row: resolve(config_of(units[f"policy-{unit}"], experiments(scale), Path("o")))
        for row, (unit, _) in UPDATES.items()
    }
    assert {
        row: (c.rm_update, *([] if c.rm_update == "frozen" else [m.balance.dlw, m.balance.adb]))
        for row, (c, m) in resolved.items()
    } == {
        "frozen": ("frozen",),
        "naive": ("before", False, False),
        "DLW": ("before", True, False),
        "ADB": ("before", False, True),
        "both": ("before", True, True),
    }
    own = {"output_dir", "rm_update", "dlw", "adb"}
    own |= {name for name in vars(resolved["both"][0]) if name.startswith("rm_")}  # frozen has none
    first, *others = ({n: v for n, v in vars(c).items() if n not in own} for c, _ in resolved.values())
    assert all(other == first for other in others) and first["reward_model"].endswith("rm-ipvrm")
    online = [units[f"policy-{unit}"] for row, (unit, _) in UPDATES.items() if row != "frozen"]
    assert {unit.passes for unit in online} == {units["policy-distrl-frozen"].passes * 8 / 5}
    assert all(f"eval-{unit}" in units for unit, _ in UPDATES.values())


def test_full_needs_its_inputs_and_estimates(tmp_path, capsys):
    config = ReproduceConfig(("table1",), scale="full", output_dir=str(tmp_path / "o"))
    with pytest.raises(
        IpvrmError, match="--model: trained by `trl sft.*Qwen3-0.6B-Base.*--problems: .*--proc"
    ):
        reproduce(config)
    given = ["--model", "sft", "--problems", "val.parquet", "--processbench", "pb", "--scale", "full"]
    assert main(["reproduce", "sec433", *given, "--dry_run", "--output_dir", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "ipvrm eval td --policy sft" in shown and "nothing of it was measured" in shown
    assert not (tmp_path / "o").exists()
    # 1e12 FLOP a response of 500 tokens at 1 B: 1000 sampled at 4e12 and 2000 passed at 2e14
    assert hours(Unit("u", "rollout", {}, 1000, 2000), 1.0) == pytest.approx((250 + 10) / 3600)


# -------------------------------------------------------------------------------------------------- inputs


def test_one_pair_of_every_mixed_prompt(tmp_path):
    outcomes = {"p": (1, 1, 0), "q": (0, 0), "r": (0, 1), "s": (1,)}
    rows = [
        {"prompt": p, "response": f"{p}{i}", "label": label, "row": i}
        for p, labels in outcomes.items()
        for i, label in enumerate(labels)
    ]
    write_table(tmp_path / "in.parquet", rows)
    keep_pairs(PairsConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")), progress=False)
    found = [record.value for record in records(tmp_path / "out.parquet", None)]
    assert [(r["prompt"], r["label"]) for r in found] == [("p", 1), ("p", 0), ("r", 1), ("r", 0)]
    assert all(row in rows for row in found)
    write_table(tmp_path / "in.parquet", [row for row in rows if row["prompt"] in "qs"])
    with pytest.raises(IpvrmError, match="no prompt with a right and a wrong response"):
        keep_pairs(PairsConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")), progress=False)


def test_problems_of_sources(tmp_path):
    rows = [{"prompt": f"{i}", "answer": "1", "data_source": "abc"[i % 3]} for i in range(7)]
    write_table(tmp_path / "in.parquet", rows)
    config = ProblemsConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), ("c", "a"))
    keep_problems(config, progress=False)
    kept = [record.value for record in records(tmp_path / "out.parquet", None)]
    assert kept == [row for row in rows if row["data_source"] != "b"]
    with pytest.raises(IpvrmError, match="no row whose data_source is d"):
        keep_problems(ProblemsConfig(config.input, config.output, ("a", "d")), progress=False)


# -------------------------------------------------------------------------------------------------- tables


def test_the_papers_averages_are_those_of_its_cells():
    """The tables hold what was printed: a slip of a digit shows in the mean of its row."""
    rows = [
        (table, model, row, values)
        for table, models in PAPER.items()
        for model, found in models.items()
        for row, values in found.items()
    ]
    assert len(rows) == 20 + 20 + 32 + 12 + 3 + 8 + 1
    for table, model, row, values in rows:
        assert len(values) == len(COLUMNS[table]), (table, model, row)
        assert row in TABLES[table].rows
        at = COLUMNS[table].index(AVERAGE) if AVERAGE in COLUMNS[table] else None
        if at is not None and values[at] is not None:
            assert statistics.fmean(values[:at]) == pytest.approx(values[at], abs=0.051), (table, model, row)
    for row in ("GRPO w/ DPO-RM", "GRPO w/ IPVRM", "DistRL w/ IPVRM"):
        assert PAPER["table5"]["qwen3-0.6b"][row] == PAPER["table6"]["qwen3-0.6b"][row]
    implicit = PAPER["fig6"]["qwen3-0.6b"]["Implicit PRM, naive"]
    assert implicit[:6] == PAPER["table6"]["qwen3-0.6b"]["DistRL w/ Implicit PRM"]
    assert PAPER["table10"]["qwen3-0.6b"]["m = 5"] == (
        PAPER["table1"]["qwen3-0.6b"]["IPVRM"][-1],
        PAPER["table2"]["qwen3-0.6b"]["IPVRM"][-1],
    )


def plant(output, unit, results, seconds=1.0):
    write_json(output / "units" / f"{unit}.json", {"asked": {}, "seconds": seconds})
    write_json(output / unit / "results.json", results)


@pytest.fixture
def output(tmp_path):
    (tmp_path / "units").mkdir()
    for unit in ("bon-ipvrm", "bon-dpo", "bon-q_rm", "pb-ipvrm", "eval-sft", "td"):
        (tmp_path / unit).mkdir()
    return tmp_path


def bon_results(accuracy, methods=("final", "sum"), problems=500):
    rows = [
        {
            "method": method, "n": n, "accuracy": accuracy + 0.1 * i, "interval": [0.25, 0.75],
            "num_problems": problems,
        }
        for i, method in enumerate(("one_sample", *methods), -1)
        for n in (4, 16, 64)
    ]  # fmt: skip
    of = {"problems": 500, "rows": rows}
    return {"sources": {"math-500": of, "minerva-math": of, "other": {"problems": 0, "rows": []}}}


def test_best_of_n_takes_the_score_that_was_trained(output):
    plant(output, "bon-ipvrm", bon_results(0.40))
    plant(output, "bon-dpo", bon_results(0.40))
    plant(output, "bon-q_rm", bon_results(0.40), seconds=None)  # begun, not done
    found = cells("table1", output, FULL, "qwen3-0.6b")
    ours = {row: columns["MATH-500 @4"] for row, columns in found.items()}
    assert ours["IPVRM"]["value"] == pytest.approx(40.0) and ours["DPO-RM"]["value"] == pytest.approx(50.0)
    assert (ours["IPVRM"]["low"], ours["IPVRM"]["high"]) == (25.0, 75.0)
    assert ours["IPVRM"]["difference"] == pytest.approx(40.0 - 42.0) and ours["IPVRM"]["paper"] == 42.0
    assert ours["Q-RM"] == {"value": None, "low": None, "high": None, "paper": 41.4, "difference": None}
    assert found["IPVRM"][AVERAGE]["value"] == pytest.approx(40.0)


def test_an_average_needs_all_of_its_columns(output):
    results = bon_results(0.40)
    del results["sources"]["minerva-math"]
    plant(output, "bon-ipvrm", results)
    found = cells("table1", output, FULL, "qwen3-0.6b")["IPVRM"]
    assert found["MATH-500 @64"]["value"] is not None
    assert found["Minerva @64"]["value"] is None and found[AVERAGE]["value"] is None


def test_f1_and_the_margin_table(output):
    f1 = {"gsm8k": 0.5, "math": 0.4, "olympiadbench": 0.3, "omnimath": 0.4}
    subsets = {
        name: {"rules": {"step": {"oracle": {"f1": f, "f1_interval": [f - 0.1, f + 0.1]}}}}
        for name, f in f1.items()
    }
    plant(output, "pb-ipvrm", {"subsets": subsets})
    found = cells("table2", output, FULL, "qwen3-8b")["IPVRM"]
    assert [c["value"] for c in found.values()] == pytest.approx([50, 40, 30, 40, 40])
    assert found["GSM8K"]["low"] == pytest.approx(40) and found["GSM8K"]["paper"] == 57.2
    margin = cells("table10", output, FULL, "qwen3-0.6b")["m = 5"]
    assert margin["ProcessBench"]["value"] == pytest.approx(40) and margin["Best-of-N"]["value"] is None
    subsets["math"]["rules"]["step"]["oracle"] = None  # of one kind alone
    plant(output, "pb-ipvrm", {"subsets": subsets})
    found = cells("table2", output, FULL, "qwen3-8b")["IPVRM"]
    assert found["MATH"]["value"] is None and found[AVERAGE]["value"] is None


def test_policies_and_td(output):
    metrics = {"avg@8": {"value": 0.1, "low": 0.05, "high": 0.15}}
    names = FULL.benchmarks.values()
    plant(output, "eval-sft", {"sources": {name: {"metrics": metrics} for name in names}})
    found = cells("table5", output, FULL, "qwen3-0.6b")["SFT"]
    assert found["MATH-500"]["difference"] == pytest.approx(10.0 - 33.2)
    assert found[AVERAGE]["value"] == pytest.approx(10.0) and found[AVERAGE]["paper"] == 11.6
    entry = {"value": 0.01, "low": -0.1, "high": 0.2}
    plant(output, "td", {"paper": {"td_pearson": entry, "abs_value_auc": entry | {"value": None}}})
    found = cells("sec433", output, FULL, "qwen3-0.6b")["one-step TD"]
    assert found["Pearson of TD"]["difference"] == pytest.approx(0.01 - 0.0226)
    assert found["AUC of |V|"]["value"] is None and found["AUC of |V|"]["paper"] == 0.64


def test_figure_6_has_the_ends_of_its_curves_and_a_picture(output):
    """Means over the last ten steps; the start of a run, step 0, has no rollouts."""
    metrics = {"avg@8": {"value": 0.1, "low": 0.05, "high": 0.15}}
    plant(output, "eval-sft", {})
    (output / "eval-distrl-naive").mkdir()
    sources = {name: {"metrics": metrics} for name in FULL.benchmarks.values()}
    plant(output, "eval-distrl-naive", {"sources": sources})
    for name, seconds in (("distrl-naive", 1.0), ("distrl-DLW", None)):
        (output / f"policy-{name}").mkdir()
        plant(output, f"policy-{name}", {}, seconds)
        steps = [{"step": i, "rollout_accuracy": i / 100, "rm_accuracy": 0.5} for i in range(1, 13)]
        write_jsonl(output / f"policy-{name}" / "metrics.jsonl", [{"step": 0, "eval_accuracy": 0.5}, *steps])
    found = cells("fig6", output, FULL, "llama3.2-1b")
    naive = found["naive"]
    assert naive["rollouts"]["value"] == pytest.approx(statistics.fmean(range(3, 13)))
    assert naive["rollouts"]["difference"] == pytest.approx(7.5 - 3.2)
    assert naive["RM acc."]["value"] == pytest.approx(50) and naive["RM acc."]["paper"] == 50.3
    assert naive[AVERAGE]["value"] == pytest.approx(10) and naive[AVERAGE]["paper"] is None
    assert found["DLW"]["RM acc."]["value"] is None  # not done
    assert cells("fig6", output, FULL, "qwen3-0.6b")["naive"][AVERAGE]["difference"] == pytest.approx(-5.4)
    results = write_table_of("fig6", output, FULL, "llama3.2-1b", "", {}, show=False)
    assert results["picture"] == "fig6.png" and "(fig6.png)" in (output / "fig6.md").read_text()
    assert (output / "fig6.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_where_we_are_lower_and_what_is_missing(output, capsys):
    plant(output, "bon-ipvrm", bon_results(0.43))  # above 42.0, below 46.0 and 47.6, far above Minerva's
    failed = {"bon-dpo": "out of memory", "policy-grpo": "of another table"}
    results = write_table_of("table1", output, FULL, "qwen3-0.6b", "A WARNING.", failed)
    assert [(c["row"], c["column"]) for c in results["lower_than_the_paper"]] == [
        ("IPVRM", "MATH-500 @16"),
        ("IPVRM", "MATH-500 @64"),
    ]
    assert results["compared"] == 7 and results["left_out"] == ["bon-dpo: out of memory"]
    assert json.loads((output / "table1.json").read_text())["rows"] == results["rows"]
    text = (output / "table1.md").read_text()
    assert "**A WARNING.**" in text and "bon-dpo: out of memory" in text
    assert "| IPVRM | here | 43.0 | 43.0 ↓ | 43.0 ↓ | 43.0 | 43.0 | 43.0 | 43.0 |" in text
    assert "|  | paper | 42.0 | 46.0 | 47.6 | 10.3 | 11.0 | 11.4 | 28.1 |" in text
    assert "| DPO-RM | here | - | - | - | - | - | - | - |" in text
    assert (
        "(↓) in 2 of 7 cells: IPVRM, MATH-500 @64: 43.0 for 47.6; IPVRM, MATH-500 @16: 43.0 for 46.0." in text
    )
    shown = capsys.readouterr().out
    assert "A WARNING." in shown and "2 of 7 cells" in shown
    other = write_table_of("table10", output, FULL, "qwen3-8b", "", {}, show=False)
    assert other["left_out"] == ["the paper has no such table for qwen3-8b"] and other["compared"] == 0


def test_the_report_says_where_best_of_n_is_of_fewer_problems(output):
    plant(output, "bon-ipvrm", bon_results(0.43, problems=497))
    plant(output, "bon-dpo", bon_results(0.43))
    left_out = write_table_of("table1", output, FULL, "qwen3-0.6b", "", {}, show=False)["left_out"]
    assert len(left_out) == 6 and left_out[2] == (
        "bon-ipvrm, math-500 @64: 497 of 500 problems; the others have fewer responses with a verdict"
    )


def test_smoke_says_what_it_is_and_failures_come_behind_the_tables(tmp_path, monkeypatch, capsys):
    asked = []

    def nothing_works(units, output, shown):
        asked.extend(unit.name for unit in units)
        return {"td": "broken"}

    monkeypatch.setattr("ipvrm.reproduce.tables.run.run_plan", nothing_works)
    assert main(["reproduce", "sec433", "--output_dir", str(tmp_path / "o")]) == 2
    assert asked == ["task", "rm-rollouts", "rm-labelled", "rm-pairs", "rm-ipvrm", "td-problems", "td"]
    shown = capsys.readouterr()
    assert "1 of 7 units are not done, their cells are empty: td (broken)" in shown.err
    assert "no reproduction" in shown.out and "no reproduction" in shown.err
    text = (tmp_path / "o" / "sec433.md").read_text()
    assert "no reproduction" in text and "- td: broken" in text
    assert "| one-step TD | here | - | - |" in text and "|  | paper | 0.0226 | 0.6400 |" in text


def test_full_prints_plan_and_estimate_and_then_runs_it(tmp_path, monkeypatch, capsys):
    ran = []

    def records_the_plan(units, output, shown):
        print("THE RUNS")
        ran.extend(unit.name for unit in units)
        return {}

    monkeypatch.setattr("ipvrm.reproduce.tables.run.run_plan", records_the_plan)
    given = ["--model", "sft", "--problems", "val.parquet", "--processbench", "pb", "--scale", "full"]
    assert main(["reproduce", "sec433", *given, "--output_dir", str(tmp_path / "o")]) == 0
    names = [unit.name for unit in units_of_tables(FULL, ("sec433",))]
    assert ran == names
    shown = capsys.readouterr().out
    order = (
        f"plan: {len(names)} units",
        "h  ipvrm eval td ",
        "h  in all on one GPU",
        "THE RUNS",
        "Section 4.3.3",
    )
    places = [shown.index(text) for text in order]
    assert places == sorted(places) and shown.count("THE RUNS") == 1
    assert "Our run of the paper's settings" in (tmp_path / "o" / "sec433.md").read_text()


def test_what_a_killed_run_left_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("ipvrm.reproduce.tables.run.run_plan", lambda *_: {})
    monkeypatch.setattr("ipvrm.reproduce.tables.run.write_table_of", lambda *_: {})
    (tmp_path / "units").mkdir()
    for left in (".table1.md.7.tmp", "units/.rows.json.7.tmp"):
        (tmp_path / left).touch()
    reproduce(ReproduceConfig(("table1",), output_dir=str(tmp_path)), progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["units"]


def test_nothing_named_is_refused(tmp_path):
    with pytest.raises(IpvrmError, match="name a table: table1, table2, "):
        reproduce(ReproduceConfig((), output_dir=str(tmp_path / "o")), progress=False)


# ---------------------------------------------------------------------------------------------- end to end


@pytest.mark.full
def test_a_tiny_form_of_every_table(tmp_path, capsys):
    """Every unit of every table, from the demo's base model to the Markdown; then nothing is run again."""
    sizes = {"multiple_of": 10, "base_max_steps": 400, "problems": 64, "held_out": 25, "traces": 64}
    scale = on_task(
        sizes,
        seed=0,
        num_steps=1,
        rollout_prompts=16,
        num_generations=4,
        td_prompts=5,
        eval_samples=2,
        epochs=1,
    )
    config = ReproduceConfig(("all",), output_dir=str(tmp_path / "o"))
    written = reproduce(config, scale=scale)
    assert list(written) == list(TABLES)
    for name, results in written.items():
        numbers = [cell["value"] for columns in results["rows"].values() for cell in columns.values()]
        assert numbers and None not in numbers, name
        assert (tmp_path / "o" / f"{name}.md").read_text().count("no reproduction") == 1
    td = json.loads((tmp_path / "o" / "td" / "results.json").read_text())["paper"]
    found = [cell["value"] for cell in written["sec433"]["rows"]["one-step TD"].values()]
    assert found == [td["td_pearson"]["value"], td["abs_value_auc"]["value"]]
    shown = capsys.readouterr()
    assert shown.out.count("no reproduction") == len(TABLES) and "no reproduction" in shown.err
    again = reproduce(config, scale=scale)
    assert {n: r["rows"] for n, r in again.items()} == {n: r["rows"] for n, r in written.items()}
    assert capsys.readouterr().err.count("done before") == len(units_of_tables(scale))
