"""`ipvrm eval td` on the demo's task: IPVRM and Implicit PRM on the same prompts, prefixes and completions.

    ipvrm demo && python -m benchmarks.studies.td_study --demo runs/demo

The policy is the demo's base model, which is both reward models' reference; the problems are none of those
that the reward models were trained on. A rerun with the same --work_dir goes on where the last one stopped.
"""

import argparse
from pathlib import Path

from ipvrm.demo.base_model import MAX_NEW_TOKENS
from ipvrm.demo.settings import CHOICES, NAMES
from ipvrm.evaluate.td_study import TdConfig, study
from ipvrm.reproduce.fig6 import write_problems
from ipvrm.training.run_folder import write_json

RESULTS = Path(__file__).parent.parent / "results" / "td_study"
SEED = 700  # of the problems, and of answers and completions


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
        write_json(options.results / f"{choice.objective}.json", study(config))


if __name__ == "__main__":
    main()
