"""Chooses the settings of the demo's policies, once.

    python -m benchmarks.studies.demo_policies

Base model, rollouts, reward model and problems of `ipvrm demo` at full size, but of another seed. Every
candidate is judged by the smaller of the gains of GRPO and DistRL + IPVRM, in standard errors, one seed each;
ties go to the candidate listed first. The winner, a corner of the two by two grid, is `FULL.policies` of
ipvrm/demo/settings.py. How the policies do with it on other base models is measured by
benchmarks/studies/demo_spread.py.

Everything that was tried goes to benchmarks/results/demo_policies.json. A rerun with the same --work_dir goes
on where the last one stopped.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipvrm.demo.policies import compare, read_outcomes
from ipvrm.demo.run import Stages, prepare, prepare_policies, train_algorithm, train_choice
from ipvrm.demo.settings import CHOICES, FULL, PolicySettings
from ipvrm.output.progress import Progress
from ipvrm.run_folder import manifest, write_json

RESULTS = Path(__file__).parent.parent / "results" / "demo_policies.json"
SEED = 1  # the demo's default is 0
JUDGED = ("grpo", "distrl")
TRIED = [
    replace(FULL.policies, learning_rate=rate, minibatch_size=size, steps=16, points=1)
    for rate, size in ((1e-4, 128), (2e-4, 128), (1e-4, 64), (2e-4, 64))
]


def judge(stages: Stages, settings: PolicySettings) -> dict[str, Any]:
    """Gains of the judged algorithms on the problems of the selection."""
    before = read_outcomes(stages.output / "policy-start")["0"]
    gains = {}
    for algorithm in JUDGED:
        rate, size, steps = settings.learning_rate, settings.minibatch_size, settings.steps
        name = f"policy-{algorithm}-lr{rate:g}-mb{size}-steps{steps}"
        train_algorithm(stages, name, algorithm, settings, SEED)
        run = read_outcomes(stages.output / name)
        found = compare(before, {algorithm: [run]}, FULL.bootstrap_resamples, SEED)
        gains[algorithm] = found["algorithms"][algorithm]["gain"]
    return {"settings": asdict(settings), "gains": gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default="runs/demo_policies", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="results file")
    arguments = parser.parse_args()
    work = Path(arguments.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    stages = Stages(work, Progress())
    prepare(stages, FULL, SEED)
    train_choice(stages, "reward-ipvrm", CHOICES[0], SEED)
    prepare_policies(stages, FULL, SEED)
    tried = [judge(stages, settings) for settings in TRIED]
    worse = [min(gain["in_standard_errors"] for gain in found["gains"].values()) for found in tried]
    chosen = replace(TRIED[worse.index(max(worse))], points=FULL.policies.points)
    record = manifest("python -m benchmarks.studies.demo_policies", seeds={"selection": SEED})
    write_json(arguments.output, {"tried": tried, "chosen": asdict(chosen), "manifest": record})
    print(f"chosen: {chosen}\nwritten to {arguments.output}")
    if chosen != FULL.policies:
        print("these are not FULL.policies of ipvrm/demo/settings.py: put them there")


if __name__ == "__main__":
    main()
