"""Does every objective and every algorithm learn on the demo's task?

    python -m benchmarks.studies.objectives_learn [--work_dir DIR]

The units of `ipvrm reproduce` on the demo's task in its easy form (multiples of ten, `ipvrm demo --quick`):
one base model, five responses to each of 4,096 problems, of every mixed problem one right and one wrong one,
from which all reward models learn. The easy form because of Q-RM, whose head has to learn from outcomes what
the others have in the policy's own probabilities: with all numbers from 10 to 99 it still told fewer than six
in ten pairs apart after 45,000 of them. At the paper's beta (0.2) it learns neither task at this size: the
loss is as good as linear, and no pair is ever done with.

    objectives   AUC of a response's score against its outcome, on responses of the base model to other
                 problems. The score is what the objective trains: the mean value or the sum. A reward model
                 learns if its interval lies above that of "the shorter the better", which needs no model
                 (longer chains have more chances of a slip). EndoRM does not learn, and stands beside them.
    algorithms   accuracy on other problems, eight responses each at temperature 1, as in training, less that
                 of the base model on the same problems. A policy learns if the interval lies above zero. The
                 one offline learns from stored rollouts of the base model, as many as the others sample,
                 with the IPVRM as it is.

Intervals are of 95 %, over problems drawn with replacement. One seed: that of another run is not in them.
The results go to benchmarks/results/objectives_learn; a rerun with the same --work_dir goes on where the last
one stopped, and nothing is written before all units are done.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipvrm.data.files import records
from ipvrm.errors import IpvrmError
from ipvrm.losses.metrics import auc
from ipvrm.output.progress import Progress
from ipvrm.reproduce.correlation import bootstrap
from ipvrm.reproduce.tables.experiments import Scale, experiments, on_task
from ipvrm.reproduce.tables.plan import Output, Unit, needed, run_plan
from ipvrm.reproduce.tables.report import SUM_SCORES
from ipvrm.run_folder import manifest, write_json, write_text

RESULTS = Path(__file__).parent.parent / "results" / "objectives_learn"
COMMAND = "python -m benchmarks.studies.objectives_learn"
OBJECTIVES = {
    "IPVRM": "ipvrm",
    "IPVRM, late": "ipvrm-late",
    "IPVRM, early": "ipvrm-early",
    "Implicit PRM": "implicit_prm",
    "DPO-RM": "dpo",
    "Q-RM": "q_rm",
    (ENDO := "EndoRM (not trained)"): "endo_rm",
}
LENGTH = "the shorter the better"
ALGORITHMS = {
    "GRPO": "grpo",
    "GRPO + IPVRM": "grpo_prm-ipvrm",
    "DistRL + IPVRM": "distrl-ipvrm",
    "DistRL + IPVRM, offline": "distrl-offline",
    "GRPO + DPO-RM, online": "grpo_prm-dpo",
    "PRIME": "prime",
    "SPRO": "spro",
    "REINFORCE + Q-RM": "reinforce_qrm",
}
SIZES = {"multiple_of": 10, "base_max_steps": 400, "problems": 4096, "held_out": 510, "traces": 8}
SEED, RESAMPLES = 0, 2000
STORED_SEED = (
    43  # of stored rollouts: with the default, 42, they are those that the reward models learnt from
)
STORED = 0.1  # candidates with at least this probability, train-policy's default
# Of train-policy: what only sampling, or a reward model that learns, reads.
ONLINE = (
    "num_generations",
    "rollout_prompts",
    "max_new_tokens",
    "verifier",
    "rm_lora_r",
    "rm_minibatch_size",
)


def scale() -> Scale:
    """The demo's sizes; policies are measured at the temperature that they are trained at."""
    made = on_task(
        SIZES, SEED, num_steps=16, rollout_prompts=32, num_generations=8, td_prompts=1, bon_samples=16
    )
    flags = made.flags | {"eval bon": made.flags["eval bon"] | {"n": (4, 16)}}
    flags["eval policy"] = flags["eval policy"] | {"temperature": 1.0, "top_p": 1.0}
    return replace(made, flags=flags)


def units(of: Scale) -> list[Unit]:
    """Those of the two tables."""
    names = [f"bon-{model}" for model in OBJECTIVES.values()]
    names += [f"eval-{policy}" for policy in ("sft", *ALGORITHMS.values())]
    online = experiments(of, weightings=("late", "early"))
    return needed([*online, *offline(of, online)], names)


def offline(of: Scale, online: Sequence[Unit]) -> list[Unit]:
    """DistRL from stored rollouts: those of its steps are sampled at once, and the rest is as online.

    An online step draws `rollout_prompts` problems and learns from the mixed ones; here it takes seven in
    eight as many mixed ones, so that there are enough for all steps.
    """
    by_name = {unit.name: unit for unit in online}
    sampled, labelled = by_name["rm-rollouts"], by_name["rm-labelled"]
    policy, measured = by_name["policy-distrl-ipvrm"], by_name["eval-distrl-ipvrm"]
    stored = {
        "num_generations": of.num_generations,
        "limit": of.num_steps * of.rollout_prompts,
        "min_prob": STORED,
        "seed": STORED_SEED,
        "reward_model": policy.settings["reward_model"],
    }
    kept = {name: value for name, value in policy.settings.items() if name not in ONLINE}
    learnt = {
        "train_data": Output("offline-labelled"),
        "offline": True,
        "train_prompts": of.rollout_prompts * 7 // 8,
    }
    return [
        replace(sampled, name="offline-rollouts", settings=sampled.settings | stored),
        replace(
            labelled,
            name="offline-labelled",
            settings=labelled.settings | {"input": Output("offline-rollouts")},
        ),
        replace(policy, name="policy-distrl-offline", settings=kept | learnt),
        replace(
            measured,
            name="eval-distrl-offline",
            settings=measured.settings | {"model": Output("policy-distrl-offline")},
        ),
    ]


def objectives(work: Path) -> dict[str, dict[str, Any]]:
    """{row: AUC and its interval}."""
    rows = [
        record.value for record in records(work / "bon-labelled.parquet", ("prompt", "response", "label"))
    ]
    outcome = np.array([row["label"] for row in rows], np.float64)
    problem = np.array([asked(row["prompt"]) for row in rows])
    scores = {LENGTH: [-float(len(row["response"])) for row in rows]}
    for row, model in OBJECTIVES.items():
        lines = map(json.loads, (work / f"bon-{model}" / "scores.jsonl").read_text().splitlines())
        by_line = {line["line"]: line["sum" if model in SUM_SCORES else "final"] for line in lines}
        scores[row] = [by_line[number] for number in range(1, len(rows) + 1)]
    found = {}
    for row, values in scores.items():
        columns = (np.array(values, np.float64), outcome)
        interval = bootstrap(auc, columns, problem, RESAMPLES, SEED)
        found[row] = {"auc": auc(*columns)} | interval._asdict()
    return found


def algorithms(work: Path, samples: int) -> dict[str, dict[str, Any]]:
    """{row: accuracy, its gain over the base model, the gain's interval}."""
    problems = [record.value["prompt"] for record in records(work / "task" / "held_out.jsonl", None)]
    before = accuracies(work / "eval-sft" / "labelled.parquet", problems, samples)
    found: dict[str, dict[str, Any]] = {"base model": {"accuracy": float(before.mean())}}
    for row, policy in ALGORITHMS.items():
        after = accuracies(work / f"eval-{policy}" / "labelled.parquet", problems, samples)
        interval = bootstrap(np.mean, (after - before,), np.arange(len(problems)), RESAMPLES, SEED)
        found[row] = {"accuracy": float(after.mean())}
        found[row] |= {"gain": float((after - before).mean())} | interval._asdict()
    return found


def accuracies(labelled: Path, problems: Sequence[str], samples: int) -> NDArray[np.float64]:
    """(P,) share of right ones among the `samples` responses to each problem; one without text is wrong."""
    right = dict.fromkeys(problems, 0)
    for record in records(labelled, ("prompt", "label")):
        right[asked(record.value["prompt"])] += record.value["label"]
    return np.array([right[problem] for problem in problems]) / samples


def asked(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """The problem of a row: its prompt, or what the one message of that says, as `rollout` writes it."""
    if isinstance(prompt, str):
        return prompt
    (message,) = prompt
    return message["content"]


def report(results: Mapping[str, Any]) -> str:
    """README.md of the results."""
    objective, algorithm = results["objectives"], results["algorithms"]
    lines = [
        "# Every objective and every algorithm on the demo's task",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        f"Its easy form, multiples of {results['sizes']['multiple_of']}. "
        f"{results['responses']} responses to {results['problems']} other problems for the objectives, "
        f"{results['policy_problems']} problems for the algorithms. 95 % intervals over problems; one seed.",
        "",
        "| objective | AUC | interval | learns |",
        "|---|--:|--:|---|",
    ]
    chance = objective[LENGTH]["high"]
    for row, entry in objective.items():
        verdict = "" if row in (LENGTH, ENDO) else _verdict(entry, chance)
        lines.append(
            f"| {row} | {entry['auc']:.3f} | {entry['low']:.3f} to {entry['high']:.3f} | {verdict} |"
        )
    lines += ["", "| algorithm | accuracy | gain | interval | learns |", "|---|--:|--:|--:|---|"]
    for row, entry in algorithm.items():
        cells = ["", "", ""]
        if "gain" in entry:
            cells = [f"{entry['gain']:+.3f}", f"{entry['low']:+.3f} to {entry['high']:+.3f}"]
            cells.append(_verdict(entry, 0.0))
        lines.append(f"| {row} | {entry['accuracy']:.3f} | {' | '.join(cells)} |")
    lines += [
        "",
        f'learns: the interval lies above that of "{LENGTH}" (AUC), above zero (gain).',
        "",
        f"{results['manifest']['processor']}; everything else in results.json.",
        "",
    ]
    return "\n".join(lines)


def _verdict(entry: Mapping[str, Any], chance: float) -> str:
    return "yes" if entry["low"] > chance else "not shown"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default="runs/objectives_learn", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="folder of the results")
    given = parser.parse_args(arguments)
    work, output, of = Path(given.work_dir), Path(given.output), scale()
    work.mkdir(parents=True, exist_ok=True)
    if failed := run_plan(units(of), work, Progress()):
        raise IpvrmError(f"not done: {failed}")
    labelled = [asked(row.value["prompt"]) for row in records(work / "bon-labelled.parquet", ("prompt",))]
    results = {
        "sizes": SIZES,
        "responses": len(labelled),
        "problems": len(set(labelled)),
        "policy_problems": SIZES["held_out"],
        "objectives": objectives(work),
        "algorithms": algorithms(work, of.eval_samples),
        "manifest": manifest(COMMAND, seeds={"task": SEED}),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    write_text(output / "README.md", report(results))
    print(report(results))


if __name__ == "__main__":
    main()
