"""`ipvrm eval td` on the demo's task: IPVRM and Implicit PRM on the same prompts, prefixes and completions.

    ipvrm demo && python -m benchmarks.studies.td_study --demo runs/demo

The policy is the demo's base model, which is both reward models' reference; the problems are none of those
that the reward models were trained on. A rerun with the same --work_dir goes on where the last one stopped.
comparison.json holds the differences of the two, with intervals over prompts that are drawn for both at once.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ipvrm.demo.base_model import MAX_NEW_TOKENS
from ipvrm.demo.settings import CHOICES, NAMES
from ipvrm.evaluate.thresholds import percentile_interval
from ipvrm.reproduce.fig6 import write_problems
from ipvrm.reproduce.td_study import TdConfig, analyse, study
from ipvrm.run_folder import manifest, read_json, write_json

RESULTS = Path(__file__).parent.parent / "results" / "td_study"
SEED = 700  # of the problems, and of answers and completions
RESAMPLES = 500


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Statistics of the study in `first` less those of the same prompts in `second`."""
    names = sorted(path.name for path in (first / "prompts").glob("*.json"))
    records = [[read_json(folder / "prompts" / name) for name in names] for folder in (first, second)]

    def differences(prompts: Any) -> dict[str, float]:
        one, other = (numbers(analyse([part[i] for i in prompts], resamples=1)) for part in records)
        return {name: value - other[name] for name, value in one.items()}

    found = differences(range(len(names)))
    rng = np.random.default_rng(SEED)
    drawn = [differences(rng.integers(0, len(names), len(names))) for _ in range(RESAMPLES)]
    return {
        name: [value, *percentile_interval(np.array([other[name] for other in drawn]))]
        for name, value in found.items()
    }


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """The statistics of the TD and the mean value by name."""
    correlations = {
        f"{view}, {kind}": found["td"][kind]["value"]
        for view, found in results["correlation"].items()
        for kind in ("pearson", "spearman")
    }
    return correlations | {f"AUC, {f} %": entry["value"] for f, entry in results["auc"]["mean_value"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default="runs/demo", help="a finished output folder of ipvrm demo")
    parser.add_argument(
        "--work_dir", default="runs/td_study", help="problems and one folder per reward model"
    )
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--completions", type=int, default=16, help="of every branch and prefix")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    record = manifest()  # before the first result: a written one is a change of the checkout
    work, demo = Path(options.work_dir), Path(options.demo)
    work.mkdir(parents=True, exist_ok=True)
    write_problems(work, demo, options.prompts, SEED)
    options.results.mkdir(parents=True, exist_ok=True)
    for choice in CHOICES:
        print(NAMES[choice.objective], flush=True)
        config = TdConfig(
            policy=str(demo / "base"),
            reward_model=str(demo / f"reward-{choice.objective}"),
            data=str(work / "held_out.jsonl"),
            output_dir=str(work / choice.objective),
            num_prompts=options.prompts,
            num_responses=2,
            completions=options.completions,
            max_new_tokens=MAX_NEW_TOKENS,
            verifier="ipvrm.demo.arithmetic:right_answer",
            verifier_workers=1,
            per_device_eval_batch_size=512,
            seed=SEED,
            use_cpu=True,
        )
        found = study(config)
        found["manifest"]["commit"] = record["commit"]
        write_json(options.results / f"{choice.objective}.json", found)
    first, second = (choice.objective for choice in CHOICES)
    differences = compare(work / first, work / second)
    print(f"{NAMES[first]} less {NAMES[second]} (95 % interval over prompts)")
    for name, (value, low, high) in differences.items():
        print(f"  {name:<24}{value:+.3f} ({low:+.3f} to {high:+.3f})")
    comparison = {"first": first, "second": second, "differences": differences, "manifest": record}
    write_json(options.results / "comparison.json", comparison)


if __name__ == "__main__":
    main()
