"""`ipvrm demo fig6`: what the five variants are, what is reused, and the table from planted runs."""

import json
import math
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.demo.arithmetic import Problem, make_problems
from ipvrm.losses.objectives import BalanceConfig
from ipvrm.output.locks import locked
from ipvrm.reproduce import fig6
from ipvrm.reproduce.fig6 import VARIANTS, Fig6Config, Scale, reproduce, summary
from ipvrm.reproduce.fig6_report import COLOURS, NORMAL_95, accuracy_points, conclusions, draw
from ipvrm.training.checkpoint import TrainingInterrupted
from ipvrm.training.policy_config import resolve

SCALE = Scale(
    steps=4, minibatch_size=4, prompts=2, num_generations=2, held_out=100, eval_steps=2, learning_rate=1e-4,
    gae_coef=0.1,
)  # fmt: skip
AUC = {"frozen": 0.70, "naive": 0.72, "DLW": 0.74, "ADB": 0.76, "both": 0.78}


def fake_run(config, progress=True):
    """What `train_policy` leaves behind, with numbers that follow from the variant, the step and the seed."""
    folder = Path(config.output_dir)
    folder.mkdir()
    name = folder.name.partition("-")[0]
    records = [{"step": 0, "eval_accuracy": 0.5, "eval_responses": 100.0}]
    for step in range(1, config.max_steps + 1):
        record = {name: 0.0 for name in (*fig6.OF_POLICY, *fig6.OF_REWARD_MODEL)} | {
            "step": step,
            "rm_auc": 0.7 if step == 1 else AUC[name] + 0.01 * (step % 2),
            "rm_accuracy": 0.6,
            "rm_auc_responses": 4 if name == "frozen" else 2,
            "value_right": 2.0,
            "value_wrong": 0.5,
        }
        if name == "frozen":
            del record["rm_loss"], record["rm_grad_norm"]
        if step % config.eval_steps == 0:
            record |= {"eval_accuracy": 0.5 + 0.1 * step + 0.02 * config.seed, "eval_responses": 100.0}
        records.append(record)
    write_jsonl(folder / "metrics.jsonl", records)


@pytest.fixture
def demo(tmp_path):
    """As much of a finished demo's folder as is looked at."""
    folder = tmp_path / "demo"
    problems = [{"prompt": text} for text in ("47+25-13", "47+25-13", "10+10+10")]
    settings = {"base": {"seed": 3, "multiple_of": 10}, "rollouts": {}}
    settings["reward-ipvrm"] = {"objective": "ipvrm", "beta": 50.0, "margin": 1.0}
    for name, entry in settings.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "stage.json").write_text(json.dumps({"key": name, "seconds": 1, "settings": entry}))
    pq.write_table(pa.Table.from_pylist(problems), folder / "rollouts" / "train.parquet")
    (folder / "results.json").write_text("{}")
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The configs that `train_policy` is called with."""
    import ipvrm.training.train_policy as module

    configs = []

    def train(config, progress=True):
        configs.append(config)
        fake_run(config)

    monkeypatch.setattr(module, "train_policy", train)
    return configs


@pytest.mark.slow
def test_the_variants_differ_in_their_switches_alone(demo, trained, tmp_path):
    output = tmp_path / "fig6"
    results = reproduce(Fig6Config(demo=str(demo), output_dir=str(output)), progress=False, scale=SCALE)
    resolved, methods = {}, {}
    for config in trained:
        name = Path(config.output_dir).name
        resolved[name], methods[name] = resolve(config)
    assert list(resolved) == [f"{name}-0" for name in VARIANTS]
    assert resolved["frozen-0"].rm_update == "frozen"
    switches = {
        name: (c.rm_update, methods[name].balance.dlw, methods[name].balance.adb)
        for name, c in resolved.items()
        if name != "frozen-0"
    }
    assert switches == {
        "naive-0": ("before", False, False),
        "DLW-0": ("before", True, False),
        "ADB-0": ("before", False, True),
        "both-0": ("before", True, True),
    }
    assert BalanceConfig().dlw and BalanceConfig().adb  # both is what train-policy does by default
    own = {"output_dir", "rm_update", "dlw", "adb"}
    own |= {name for name in vars(resolved["both-0"]) if name.startswith("rm_")}  # `frozen` has none
    first, *others = ({n: v for n, v in vars(c).items() if n not in own} for c in resolved.values())
    assert resolved["both-0"].lora_r == resolved["both-0"].rm_lora_r == 0  # full, as in the demo
    assert resolved["both-0"].rm_minibatch_size == SCALE.minibatch_size
    assert all(other == first for other in others)
    names = {path.name for path in output.iterdir()}
    assert names >= {"results.json", "report.md", "fig6.png", "problems"} and results["picture"] == "fig6.png"
    assert (output / "fig6.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((output / "results.json").read_text())
    for name in VARIANTS:
        run = stored["variants"][name]["seeds"]["0"]
        assert [point["step"] for point in run["held_out"]] == [0, 2, 4]
        assert run["step"] == [1, 2, 3, 4] and len(run["reward_model"]["value_std"]) == 4
    report = (output / "report.md").read_text()
    assert all(sentence in report for sentence in results["conclusions"])
    assert "first minibatch, 2 responses on average; frozen, all 4." in report
    assert "One seed of a small arithmetic task" in report and "not tested" in report


@pytest.mark.slow
def test_finished_variants_are_reused_and_an_interrupted_one_starts_afresh(
    demo, trained, tmp_path, monkeypatch
):
    config = Fig6Config(demo=str(demo), output_dir=str(tmp_path / "fig6"))
    first = reproduce(config, progress=False, scale=SCALE)
    trained.clear()
    (tmp_path / "fig6" / "DLW-0" / "stage.json").unlink()  # as after a kill
    (tmp_path / "fig6" / ".problems.7.tmp").mkdir()
    again = reproduce(config, progress=False, scale=SCALE)
    assert [Path(c.output_dir).name for c in trained] == ["DLW-0"]
    assert not list((tmp_path / "fig6").glob(".*"))
    assert again["summary"] == first["summary"]
    trained.clear()
    other = json.loads((demo / "reward-ipvrm" / "stage.json").read_text()) | {"key": "another"}
    (demo / "reward-ipvrm" / "stage.json").write_text(json.dumps(other))
    reproduce(config, progress=False, scale=SCALE)
    assert len(trained) == 5  # another reward model: nothing can be reused
    trained.clear()
    monkeypatch.setattr(fig6, "MEASURED", "otherwise")
    reproduce(config, progress=False, scale=SCALE)
    assert len(trained) == 5  # another definition of what is logged


@pytest.mark.parametrize("shown", [False, True])
def test_its_runs_say_how_far_they_are_where_it_does(demo, tmp_path, monkeypatch, shown):
    import ipvrm.training.train_policy as module

    def stops(config, progress=True):
        assert progress is shown
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_policy", stops)
    with pytest.raises(KeyboardInterrupt):
        reproduce(Fig6Config(demo=str(demo), output_dir=str(tmp_path / "f")), progress=shown, scale=SCALE)


def test_an_interruption_says_what_the_same_command_will_do(demo, trained, tmp_path, monkeypatch):
    import ipvrm.training.train_policy as module

    def stops(config, progress=True):
        raise TrainingInterrupted("resume with flags that are not there", Path(config.output_dir), 143)

    monkeypatch.setattr(module, "train_policy", stops)
    config = Fig6Config(demo=str(demo), output_dir=str(tmp_path / "fig6"))
    with pytest.raises(TrainingInterrupted, match="frozen-0: stopped; the same command reuses") as caught:
        reproduce(config, progress=False, scale=SCALE)
    assert caught.value.exit_code == 143


def test_a_damaged_demo_is_said_in_one_line(demo, tmp_path):
    from ipvrm.demo.policies import run_log

    (demo / "rollouts" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(IpvrmError, match="train.parquet: cannot be read: .*; delete its folder"):
        fig6.write_problems(tmp_path, demo, 50, seed=1)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    for read in (run_log, fig6._curves):
        with pytest.raises(IpvrmError, match="metrics.jsonl is not valid JSON lines"):
            read(tmp_path)


def test_problems_are_the_demos_and_held_out_ones_are_others(demo, tmp_path):
    fig6.write_problems(tmp_path, demo, 50, seed=1)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    assert rows["train"] == [{"prompt": "47+25-13", "answer": "59"}, {"prompt": "10+10+10", "answer": "30"}]
    texts = {row["prompt"] for row in rows["held_out"]}
    assert len(texts) == 50 and not texts & {"47+25-13", "10+10+10"}
    assert all(eval(row["prompt"]) == int(row["answer"]) for row in rows["held_out"])
    changes = [change for row in rows["held_out"] for change in fig6._problem(row["prompt"]).changes]
    assert all(change % 10 == 0 for change in changes)  # the demo's multiple_of
    drawn = make_problems(20, Random(0))
    assert [fig6._problem(p.text) for p in drawn] == drawn and fig6._problem("10") == Problem(10, ())


def test_a_missing_demo_is_made_by_its_own_stages(trained, tmp_path, monkeypatch, demo):
    made = []
    monkeypatch.setattr(fig6, "prepare", lambda stages, sizes, seed: made.append(("prepare", sizes, seed)))
    monkeypatch.setattr(
        fig6, "train_choice", lambda stages, name, choice, seed: made.append((name, choice.objective, seed))
    )
    (demo / "results.json").unlink()
    write_base(demo, multiple_of=fig6.FULL.multiple_of, seed=0)
    reproduce(Fig6Config(demo=str(demo), output_dir=str(tmp_path / "f")), progress=False, scale=SCALE)
    assert made == [("prepare", fig6.FULL, 0), ("reward-ipvrm", "ipvrm", 0)]


def test_a_demo_at_work_is_left_alone(trained, demo, tmp_path):
    (demo / "results.json").unlink()
    write_base(demo, multiple_of=fig6.FULL.multiple_of, seed=0)
    with locked(demo, folder=True), pytest.raises(IpvrmError, match=f"{demo}.*another run"):
        reproduce(Fig6Config(demo=str(demo), output_dir=str(tmp_path / "f")), progress=False, scale=SCALE)
    assert not trained


def write_base(demo, **settings):
    stage = json.loads((demo / "base" / "stage.json").read_text()) | {"settings": settings}
    (demo / "base" / "stage.json").write_text(json.dumps(stage))


@pytest.mark.parametrize("changed", [{"multiple_of": 10}, {"seed": 3}], ids=str)
def test_an_unfinished_demo_of_other_settings_is_left_as_it_is(trained, demo, tmp_path, changed):
    (demo / "results.json").unlink()
    write_base(demo, **{"multiple_of": 1, "seed": 0, **changed})
    before = sorted((p.name, p.stat().st_mtime_ns) for p in demo.rglob("*"))
    with pytest.raises(IpvrmError, match=f"unfinished demo.*changed: {next(iter(changed))}"):
        reproduce(Fig6Config(demo=str(demo), output_dir=str(tmp_path / "f")), progress=False, scale=SCALE)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in demo.rglob("*")) == before and not trained


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seeds": (1, 1)}, "--seeds must be different"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (-1,)}, "--seeds"),
    ],
)
def test_refusals(settings, message, tmp_path):
    with pytest.raises(IpvrmError, match=message):
        reproduce(Fig6Config(demo=str(tmp_path / "none"), **settings), progress=False)
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------- summary


def runs(demo, trained, tmp_path, seeds):
    config = Fig6Config(demo=str(demo), output_dir=str(tmp_path / "fig6"), seeds=seeds)
    return reproduce(config, progress=False, scale=SCALE)


@pytest.mark.slow
def test_summary_of_one_seed_by_hand(demo, trained, tmp_path):
    results = runs(demo, trained, tmp_path, (0,))
    found = results["summary"]
    start, end = math.sqrt(0.5 * 0.5 / 100), math.sqrt(0.9 * 0.1 / 100)
    assert found["both"]["start"] == pytest.approx((0.5, start))
    assert found["both"]["end"] == pytest.approx((0.9, end))
    assert found["both"]["gain"] == pytest.approx((0.4, math.hypot(start, end)))
    # 0.70, 0.78, 0.79, 0.78: deviations -0.0625, 0.0175, 0.0275, 0.0175
    squares = 0.0625**2 + 2 * 0.0175**2 + 0.0275**2
    assert found["both"]["auc"] == pytest.approx((0.7625, math.sqrt(squares / 3 / 4)))
    assert found["both"]["auc_gain"] == pytest.approx((0.08, 0.0), abs=1e-12)  # steps 2 to 4
    assert found["frozen"]["auc_gain"] == (0.0, 0.0)
    assert found["both"]["value_gap"] == (1.5, 0.0)
    text = " ".join(results["conclusions"])
    assert "rose by more than 3 standard errors with: frozen, naive, DLW, ADB, both." in text
    assert "0.000 ± 0.042 apart: no difference is shown" in text
    assert "both less frozen: +0.080 ± 0.000, both is ahead here" in text


def test_summary_of_two_seeds_by_hand(demo, trained, tmp_path):
    results = runs(demo, trained, tmp_path, (0, 1))
    found = summary({n: v["seeds"] for n, v in results["variants"].items()})["ADB"]
    assert found["start"] == pytest.approx((0.5, 0.05))  # one and the same policy
    problems = math.sqrt(0.91 * 0.09 / 100)
    assert found["end"] == pytest.approx((0.91, math.hypot(problems, 0.01)))  # 0.90 and 0.92
    assert found["gain"] == pytest.approx((0.41, math.hypot(0.05, problems, 0.01)))
    assert found["auc_gain"] == pytest.approx((0.06, 0.0), abs=1e-12)
    assert len(trained) == 10 and "2 seeds of a small arithmetic task" in results["conclusions"][-1]


def test_a_difference_is_claimed_beyond_three_errors_only(demo, trained, tmp_path):
    results = runs(demo, trained, tmp_path, (0,))
    results["summary"]["DLW"]["auc_gain"] = (-0.02, 0.01)
    results["summary"]["ADB"]["auc_gain"] = (-0.04, 0.01)
    results["summary"]["naive"]["end"] = (0.6, 0.05)
    text = " ".join(conclusions(results))
    assert "DLW less frozen: -0.020 ± 0.010, no difference shown" in text
    assert "ADB less frozen: -0.040 ± 0.010, ADB is behind here" in text
    assert "naive lowest (0.600), 0.300 ± 0.058 apart: a difference is shown" in text


@pytest.mark.slow
def test_screen_fits_eighty_columns(demo, trained, tmp_path, capsys):
    config = Fig6Config(demo=str(demo), output_dir=str(tmp_path / "fig6"))
    reproduce(config, progress=True, scale=SCALE)
    shown = capsys.readouterr().out
    assert "AUC - frozen" in shown and "both" in shown and "…" not in shown


def test_the_picture_shows_the_intervals_of_the_table(tmp_path, monkeypatch):
    """Of the problems and of the seeds together, at every step; the last are the table's `end`."""
    runs = [
        {
            "held_out": [
                {"step": 0, "accuracy": 0.5, "responses": 100},
                {"step": 4, "accuracy": 0.6 + seed / 10, "responses": 100},
            ],
            "step": [1, 2],
            "reward_model": {
                "rm_auc": [0.7, None],
                "rm_accuracy": [1.0],
                "value_right": [1],
                "value_wrong": [0],
            },
        }
        for seed in (0, 1)
    ]
    (step, start, half), (last, end, wider) = accuracy_points(runs)
    assert (step, start, last) == (0, 0.5, 4) and end == pytest.approx(0.65)
    assert half == pytest.approx(NORMAL_95 * 0.05)
    assert wider == pytest.approx(NORMAL_95 * math.hypot(math.sqrt(0.65 * 0.35 / 100), 0.05))
    variants = {name: dict(enumerate(runs)) for name in COLOURS}
    table = fig6.summary(variants)
    assert (end, wider / NORMAL_95) == pytest.approx(table["frozen"]["end"])
    matplotlib = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = matplotlib.Axes.errorbar
    monkeypatch.setattr(
        matplotlib.Axes, "errorbar", lambda *a, **k: drawn.append(a[2:4]) or original(*a, **k)
    )
    assert draw(tmp_path / "fig6.png", {name: {"seeds": seeds} for name, seeds in variants.items()}).exists()
    assert drawn == [((0.5, end), (half, wider))] * 5
