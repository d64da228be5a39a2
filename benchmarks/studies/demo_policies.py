"""The demo's policies: settings chosen on one draw of the task, then measured on another with three seeds.

    python -m benchmarks.studies.demo_policies

Selection: base model, rollouts, reward model and problems of `ipvrm demo` at full size, but of another seed.
Every candidate is judged by the smaller of the gains of GRPO and DistRL + IPVRM, in standard errors, one seed
each; ties go to the candidate listed first. The winner, a corner of the two by two grid, is `FULL.policies`
of ipvrm/demo/settings.py.
Measurement: the demo's own seed, whose problems the selection has not seen, and three seeds of every
algorithm. No candidate is measured there but the winner.

Everything that was tried goes to benchmarks/results/demo_policies.json, the curve to demo_policies.png beside
it. A rerun with the same --work_dir goes on where the last one stopped. Some fifteen minutes on two idle
cores.
"""

import argparse
import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipvrm.demo.figures import draw_policies
from ipvrm.demo.policies import compare, read_outcomes
from ipvrm.demo.run import Stages, prepare, prepare_policies, train_algorithm, train_choice, train_policies
from ipvrm.demo.settings import CHOICES, FULL, PolicySettings, Sizes
from ipvrm.progress import Progress
from ipvrm.run_folder import manifest, write_json

RESULTS = Path(__file__).parent.parent / "results" / "demo_policies.json"
SELECTION_SEED, SEED, NUM_SEEDS = 1, 0, 3
JUDGED = ("grpo", "distrl")
TRIED = [
    replace(FULL.policies, learning_rate=rate, minibatch_size=size, steps=16, points=1)
    for rate, size in ((1e-4, 128), (2e-4, 128), (1e-4, 64), (2e-4, 64))
]


def start(output: Path, sizes: Sizes, seed: int) -> Stages:
    """What the policies begin with: base model, rollouts, IPVRM and the base model's outcomes."""
    output.mkdir(parents=True, exist_ok=True)
    stages = Stages(output, Progress())
    prepare(stages, sizes, seed)
    train_choice(stages, "reward-ipvrm", CHOICES[0], seed)
    prepare_policies(stages, sizes, seed)
    return stages


def judge(stages: Stages, settings: PolicySettings) -> dict[str, Any]:
    """Gains of the judged algorithms on the problems of the selection."""
    before = read_outcomes(stages.output / "policy-start")["0"]
    gains = {}
    for algorithm in JUDGED:
        rate, size, steps = settings.learning_rate, settings.minibatch_size, settings.steps
        name = f"policy-{algorithm}-lr{rate:g}-mb{size}-steps{steps}"
        train_algorithm(stages, name, algorithm, settings, SELECTION_SEED)
        run = read_outcomes(stages.output / name)
        found = compare(before, {algorithm: [run]}, FULL.bootstrap_resamples, SELECTION_SEED)
        gains[algorithm] = found["algorithms"][algorithm]["gain"]
    return {"settings": asdict(settings), "gains": gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default="runs/demo_policies", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="results file; the picture goes beside it")
    arguments = parser.parse_args()
    work, output = Path(arguments.work_dir), Path(arguments.output)
    seeds = {"selection": SELECTION_SEED, "demo": SEED}
    record = manifest("python -m benchmarks.studies.demo_policies", seeds=seeds)  # before the first result

    stages = start(work / f"seed{SELECTION_SEED}", FULL, SELECTION_SEED)
    tried = [judge(stages, settings) for settings in TRIED]
    worse = [min(gain["in_standard_errors"] for gain in found["gains"].values()) for found in tried]
    chosen = replace(TRIED[worse.index(max(worse))], points=FULL.policies.points)
    print(f"chosen: {chosen}")
    if chosen != FULL.policies:
        print("these are not FULL.policies of ipvrm/demo/settings.py: put them there")

    sizes = replace(FULL, policies=chosen)
    stages = start(work / f"seed{SEED}", sizes, SEED)
    for num_seeds in range(1, NUM_SEEDS + 1):  # written after each seed
        measured = train_policies(stages, sizes, SEED, num_seeds)
        for log in itertools.chain(*measured["logs"].values()):
            del log["seconds"], log["step_seconds"]  # of runs at different times, under whatever load
        found = {"tried": tried, "chosen": asdict(chosen), "measured": measured, "manifest": record}
        write_json(output, found)
        draw_policies(output.with_suffix(".png"), measured)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
