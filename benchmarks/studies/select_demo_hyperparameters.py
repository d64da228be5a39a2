"""Chooses the hyperparameters of the demo's reward models, or finds no reason to leave those in use.

    python -m benchmarks.studies.select_demo_hyperparameters

Base model, rollouts and reward models are those of `ipvrm demo` at full size, from another seed than the
demo's default. Every candidate is judged by its best first-error F1 on the **validation** traces in the
training format, over the four step scores; test traces and shifted formats are never made or looked at here.
First beta and margin at one learning rate, then the best of each objective again at the other rates, and the
settings in use, `CHOICES` of ipvrm/demo/settings.py, where they are not among these.

On another processor the same seed makes another base model, and another candidate is ahead by a point or
two. So the settings in use are kept unless the best one's lead over them is told apart from nothing (95 %
interval over traces, drawn for both at once). That interval does not allow for the best being one of many.

Every candidate's numbers go to benchmarks/results/demo_selection.json. A rerun with the same --work_dir goes
on where the last one stopped. About fifteen minutes on two cores.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipvrm.data.steps import RULES
from ipvrm.demo.evaluation import read_traces, score_traces
from ipvrm.demo.run import Stages, prepare, train_choice
from ipvrm.demo.settings import CHOICES, FULL, Choice
from ipvrm.evaluate.thresholds import bootstrap_difference, f1_report, hits, score_threshold, sweep
from ipvrm.models.reward_model import RewardModel
from ipvrm.output.progress import Progress
from ipvrm.run_folder import manifest, write_json

Judged = tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]
RESULTS = Path(__file__).parent.parent / "results" / "demo_selection.json"
SEED = 1  # the demo's default is 0
EPOCHS = 3
FIRST_RATE, OTHER_RATES = 1e-3, (3e-4, 2e-3)
CANDIDATES: dict[str, list[tuple[float, float | None]]] = {
    "ipvrm": [(50.0, 1.0), (50.0, 5.0), (10.0, 1.0)],
    "implicit_prm": [(1.0, None), (0.3, None), (0.05, None)],
}


def judge(stages: Stages, choice: Choice) -> Judged:
    """Trains a candidate; its F1 on the validation traces by rule, the best of these, and hits by rule."""
    margin = choice.margin or 0
    name = f"{choice.objective}-beta{choice.beta:g}-margin{margin:g}-lr{choice.learning_rate:g}"
    train_choice(stages, name, choice, SEED)
    traces, _ = read_traces(stages.output / "rollouts" / "validation.jsonl")
    labels = [trace.label for trace in traces]
    scores = score_traces(RewardModel.from_pretrained(stages.output / name, device="cpu"), traces)
    rules: dict[str, Any] = {}
    hit: dict[str, NDArray[np.bool_]] = {}
    for rule in RULES:
        values = [s.by_rule[rule] for s in scores]
        rules[rule] = f1_report(values, labels, sweep(values, labels)[0])
        hit[rule] = hits(values, labels, score_threshold(rules[rule]))
    best = max(RULES, key=lambda rule: rules[rule]["f1"])
    result = {
        "choice": asdict(replace(choice, rule=best)),
        "validation_f1": rules[best]["f1"],
        "rules": rules,
        "seconds": stages.done[name]["seconds"],
    }
    print(f"{result['choice']}: validation F1 {result['validation_f1']:.4f}", flush=True)
    return result, hit


def select(stages: Stages, in_use: Choice) -> dict[str, Any]:
    """All candidates of an objective; the best one, its lead over the settings in use, and what is chosen."""
    tried: dict[Choice, Judged] = {}

    def attempt(choice: Choice) -> None:
        plain = replace(choice, rule="")
        if plain not in tried:
            tried[plain] = judge(stages, plain)

    def best() -> Choice:
        return max(tried, key=lambda choice: tried[choice][0]["validation_f1"])

    for beta, margin in CANDIDATES[in_use.objective]:
        attempt(Choice(in_use.objective, beta, margin, FIRST_RATE, EPOCHS, rule=""))
    first = best()
    for rate in OTHER_RATES:
        attempt(replace(first, learning_rate=rate))
    attempt(in_use)
    ahead, hit = tried[best()]
    kept, kept_hit = tried[replace(in_use, rule="")]
    labels = [trace.label for trace in read_traces(stages.output / "rollouts" / "validation.jsonl")[0]]
    interval = bootstrap_difference(
        hit[ahead["choice"]["rule"]], kept_hit[in_use.rule], labels, FULL.bootstrap_resamples, SEED
    )
    return {
        "in_use": asdict(in_use),
        "best": ahead["choice"],
        "lead": [ahead["validation_f1"] - kept["rules"][in_use.rule]["f1"], interval.low, interval.high],
        "chosen": ahead["choice"] if interval.low > 0 else asdict(in_use),
        "tried": [result for result, _ in tried.values()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default="runs/demo_selection", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="results file")
    arguments = parser.parse_args()
    output = Path(arguments.work_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = manifest("python -m benchmarks.studies.select_demo_hyperparameters", seeds={"selection": SEED})
    stages = Stages(output, Progress())
    # The rollouts stage also draws what only the demo's evaluation reads: here as good as none of it.
    prepare(stages, replace(FULL, test_traces=1, best_of_problems=1, best_of_samples=1), SEED)
    found = {choice.objective: select(stages, choice) for choice in CHOICES}
    write_json(arguments.output, {"objectives": found, "sizes": asdict(FULL), "manifest": record})
    for objective, result in found.items():
        lead, low, high = result["lead"]
        print(
            f"{objective}: best {result['best']}, {lead:+.4f} ({low:+.4f} to {high:+.4f}) over those in use"
        )
        if result["chosen"] != result["in_use"]:
            print("that is told apart from nothing: put it into CHOICES of ipvrm/demo/settings.py")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
