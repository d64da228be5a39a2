"""`benchmarks.studies.objectives_learn`: its tables from planted scores and labels."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.studies import objectives_learn as study
from ipvrm.reproduce.tables.plan import config_of
from ipvrm.run_folder import write_table

PROMPTS = [f"p{i}" for i in range(4)]


def message(text):
    """As `rollout` writes a prompt."""
    return [{"role": "user", "content": text}]


@pytest.fixture
def work(tmp_path):
    """Each problem has a right response (r1, long) and a wrong one (r0); Q-RM's scores are the wrong way."""
    rows = [
        {"prompt": message(p), "response": "longer" if label else "short", "label": label}
        for p in PROMPTS
        for label in (1, 0)
    ]
    write_table(tmp_path / "bon-labelled.parquet", rows)
    for model in study.OBJECTIVES.values():
        lines = []
        for number, row in enumerate(rows, 1):
            score = row["label"] * (-1.0 if model == "q_rm" else 1.0)
            own, other = ("sum", "final") if model in ("dpo", "implicit_prm", "endo_rm") else ("final", "sum")
            lines.append(json.dumps({"line": number, own: score, other: -score}) + "\n")
        (tmp_path / f"bon-{model}").mkdir()
        (tmp_path / f"bon-{model}" / "scores.jsonl").write_text("".join(reversed(lines)))
    write_table_of(tmp_path, "sft", 1)
    for policy in study.ALGORITHMS.values():
        write_table_of(tmp_path, policy, 0 if policy == "spro" else 1 if policy == "prime" else 2)
    (tmp_path / "task").mkdir()
    write_table(tmp_path / "task" / "held_out.jsonl", [{"prompt": p, "answer": "1"} for p in PROMPTS])
    return tmp_path


def write_table_of(folder, policy, right):
    """Of two responses to each problem `right` are right; the second to the first problem has no text."""
    rows = [
        {"prompt": message(p), "label": int(i < right)}
        for p in PROMPTS
        for i in range(2)
        if (p, i) != ("p0", 1)
    ]
    (folder / f"eval-{policy}").mkdir()
    write_table(folder / f"eval-{policy}" / "labelled.parquet", rows)


def test_objectives_by_hand(work):
    found = study.objectives(work)
    assert {row: entry["auc"] for row, entry in found.items()} == {
        "the shorter the better": 0.0, **dict.fromkeys(study.OBJECTIVES, 1.0), "Q-RM": 0.0
    }  # fmt: skip
    assert found["IPVRM"] == {"auc": 1.0, "low": 1.0, "high": 1.0}


def test_algorithms_by_hand(work):
    found = study.algorithms(work, samples=2)
    assert found["base model"] == {"accuracy": 0.5}
    assert found["GRPO"]["accuracy"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert found["GRPO"]["gain"] == pytest.approx(0.375)
    assert found["PRIME"]["gain"] == 0.0 and found["SPRO"]["gain"] == -0.5
    assert found["GRPO"]["low"] < 0.375 < found["GRPO"]["high"] <= 0.5


@pytest.mark.slow
def test_the_command_writes_both_tables_when_all_units_are_done(work, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_plan", lambda *_: [])
    monkeypatch.setattr(study, "scale", lambda: SimpleNamespace(eval_samples=2))
    monkeypatch.setattr(study, "units", lambda _: [])
    study.main(["--work_dir", str(work), "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["responses"], found["problems"]) == (8, 4)
    assert found["objectives"]["IPVRM"]["auc"] == 1.0 and found["algorithms"]["SPRO"]["gain"] == -0.5
    assert "| GRPO | 0.875 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_report_says_what_is_not_shown(work):
    results = {
        "responses": 8, "problems": 4, "policy_problems": 4, "manifest": {"processor": "a CPU"},
        "sizes": {"multiple_of": 10},
        "objectives": study.objectives(work), "algorithms": study.algorithms(work, samples=2),
    }  # fmt: skip
    text = study.report(results)
    assert "Its easy form, multiples of 10." in text
    assert (
        "| IPVRM | 1.000 | 1.000 to 1.000 | yes |" in text
        and "| Q-RM | 0.000 | 0.000 to 0.000 | not shown |" in text
    )
    assert (
        "| SPRO | 0.000 | -0.500 | -0.500 to -0.500 | not shown |" in text
        and "| base model | 0.500 |" in text
    )
    assert "| EndoRM (not trained) | 1.000 | 1.000 to 1.000 |  |" in text  # nothing has learnt
    results["objectives"][study.LENGTH]["high"] = 0.6  # an interval above one half is not enough
    results["objectives"]["Q-RM"] = {"auc": 0.6, "low": 0.55, "high": 0.65}
    assert "| Q-RM | 0.600 | 0.550 to 0.650 | not shown |" in study.report(results)


def test_the_units_are_of_every_objective_and_algorithm():
    from ipvrm.training.policy_config import ALGORITHMS

    units = study.units(study.scale())
    trained = {
        (u.settings["objective"], u.settings.get("prefix_weighting"))
        for u in units
        if u.command == "train-rm"
    }
    assert trained == {("ipvrm", None), ("ipvrm", "late"), ("ipvrm", "early")} | {
        (name, None) for name in ("implicit_prm", "dpo", "q_rm")
    }
    assert {u.settings["algorithm"] for u in units if u.command == "train-policy"} == set(ALGORITHMS)
    assert all(u.settings["temperature"] == 1.0 for u in units if u.command == "eval policy")


def test_the_offline_policy_learns_from_as_much_as_the_online_one():
    """What its commands would refuse is refused here; the reward model is stored with the rollouts."""
    from ipvrm.training.policy_config import resolve

    units = study.units(study.scale())
    configs = {u.name: config_of(u, units, Path("o")) for u in units}
    online, offline = (resolve(configs[f"policy-{name}"])[0] for name in ("distrl-ipvrm", "distrl-offline"))
    assert (
        offline.offline
        and offline.rm_update == "frozen"
        and offline.train_data == "o/offline-labelled.parquet"
    )
    same = ("model", "reward_model", "algorithm", "max_steps", "learning_rate", "minibatch_size", "gae_coef")
    same += ("alpha", "min_prob", "lora_r", "seed", "td_reference")
    assert [getattr(offline, name) for name in same] == [getattr(online, name) for name in same]
    stored = configs["offline-rollouts"]
    assert stored.min_prob == offline.min_prob and stored.reward_model == offline.reward_model
    drawn = online.max_steps * online.rollout_prompts
    assert (stored.limit, stored.num_generations) == (drawn, online.num_generations)
    assert offline.max_steps * offline.train_prompts == 448 < drawn == 512 <= study.SIZES["problems"]
    assert stored.seed != configs["rm-rollouts"].seed  # not what the reward model learnt from
    assert configs["offline-labelled"].input == stored.output
    assert replace(configs["eval-distrl-offline"], model="", output_dir="") == replace(
        configs["eval-distrl-ipvrm"], model="", output_dir=""
    )
