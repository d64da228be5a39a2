"""Chooses the hyperparameters of the demo's reward models, once.

    python -m benchmarks.studies.select_demo_hyperparameters

Base model, rollouts and reward models are those of `ipvrm demo` at full size, from another seed than the
demo's default. Every candidate is judged by its best first-error F1 on the **validation** traces in the
training format, over the four step scores; test traces and shifted formats are never made or looked at here.
First beta and margin at one learning rate, then the best of each objective again at the other rates; ties go
to the candidate listed first. The winners are the constants `CHOICES` of ipvrm/demo/settings.py.

Every candidate's numbers go to benchmarks/results/demo_selection.json. A rerun with the same --work_dir goes
on where the last one stopped. About fifteen minutes on two cores.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipvrm.data.steps import RULES
from ipvrm.demo.evaluation import read_traces, score_traces
from ipvrm.demo.run import Stages, prepare, train_choice
from ipvrm.demo.settings import CHOICES, FULL, Choice
from ipvrm.evaluate.thresholds import f1_report, sweep
from ipvrm.models.reward_model import RewardModel
from ipvrm.output.progress import Progress
from ipvrm.run_folder import manifest, write_json

RESULTS = Path(__file__).parent.parent / "results" / "demo_selection.json"
SEED = 1  # the demo's default is 0
EPOCHS = 3
FIRST_RATE, OTHER_RATES = 1e-3, (3e-4, 2e-3)
CANDIDATES = {
    "ipvrm": [(50.0, 1.0), (50.0, 5.0), (10.0, 1.0)],
    "implicit_prm": [(1.0, None), (0.3, None), (0.05, None)],
}


def judge(stages: Stages, name: str, choice: Choice) -> dict[str, Any]:
    """Trains a candidate and returns its F1 on the validation traces by rule, and its best rule."""
    train_choice(stages, name, choice, SEED)
    traces, _ = read_traces(stages.output / "rollouts" / "validation.jsonl")
    labels = [trace.label for trace in traces]
    scores = score_traces(RewardModel.from_pretrained(stages.output / name, device="cpu"), traces)
    rules = {}
    for rule in RULES:
        values = [s.by_rule[rule] for s in scores]
        rules[rule] = f1_report(values, labels, sweep(values, labels)[0])
    best = max(RULES, key=lambda rule: rules[rule]["f1"])
    result = {
        "choice": asdict(replace(choice, rule=best)),
        "validation_f1": rules[best]["f1"],
        "rules": rules,
    }
    return result | {"seconds": stages.done[name]["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default="runs/demo_selection", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="results file")
    arguments = parser.parse_args()
    output = Path(arguments.work_dir)
    output.mkdir(parents=True, exist_ok=True)
    stages = Stages(output, Progress())
    # The rollouts stage also draws what only the demo's evaluation reads: here as good as none of it.
    prepare(stages, replace(FULL, test_traces=1, best_of_problems=1, best_of_samples=1), SEED)
    tried: list[dict[str, Any]] = []
    chosen = {}
    for objective, candidates in CANDIDATES.items():
        found = []

        def attempt(
            beta: float, margin: float | None, rate: float, objective: str = objective
        ) -> dict[str, Any]:
            choice = Choice(objective, beta, margin, rate, EPOCHS, rule="step")
            result = judge(stages, f"{objective}-beta{beta:g}-margin{margin or 0:g}-lr{rate:g}", choice)
            print(f"{result['choice']}: validation F1 {result['validation_f1']:.4f}", flush=True)
            return result

        for beta, margin in candidates:
            found.append(attempt(beta, margin, FIRST_RATE))
        best = max(found, key=lambda result: result["validation_f1"])["choice"]
        for rate in OTHER_RATES:
            found.append(attempt(best["beta"], best["margin"], rate))
        chosen[objective] = max(found, key=lambda result: result["validation_f1"])["choice"]
        tried += found
    write_json(
        arguments.output,
        {
            "chosen": chosen,
            "tried": tried,
            "sizes": asdict(FULL),
            "manifest": manifest(
                "python -m benchmarks.studies.select_demo_hyperparameters", seeds={"selection": SEED}
            ),
        },
    )
    print(f"chosen: {chosen}\nwritten to {arguments.output}")
    if [asdict(choice) for choice in CHOICES] != list(chosen.values()):
        print("these are not the constants CHOICES of ipvrm/demo/settings.py: put them there")


if __name__ == "__main__":
    main()
