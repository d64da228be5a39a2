"""The demo's comparisons over several base models: another seed is another base model, other rollouts and
other problems, and so is another processor.

    python -m benchmarks.studies.demo_spread --seeds 0 2 3 [--work_dir DIR]

Of every base model four reward models from the same rollouts: IPVRM and Implicit PRM as the demo sets them,
and each with the paper's beta and margin. The step score of each is the rule with the best F1 on its
validation traces in the training format, where its threshold comes from too; test traces choose nothing.
Best-of-N beside majority vote and pass@N. Five policies, one run each: the demo's three, and GRPO + IPVRM and
DistRL + IPVRM at the paper's GAE (coefficient 1; lambda 0.95). Seed 1, on which the
demo's settings were chosen, stays out.

Intervals are those of benchmarks/studies/spread.py. Each base model is a file of its own in
benchmarks/results/demo_spread; a rerun with the same --work_dir goes on where the last one stopped. Some
fifteen minutes a base model on two idle cores.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.spread import (
    difference,
    estimate,
    f1_statistic,
    mean_statistic,
    reward_model_results,
    table,
    traces,
)
from benchmarks.suite.machine import describe
from ipvrm.demo.evaluation import FORMATS, TRAINING_FORMAT, read_traces
from ipvrm.demo.policies import read_outcomes
from ipvrm.demo.run import Stages, prepare, prepare_policies, train_algorithm, train_choice
from ipvrm.demo.settings import CHOICES, FULL
from ipvrm.evaluate.best_of_n import PICKS
from ipvrm.evaluate.thresholds import trivial_baselines
from ipvrm.models.reward_model import RewardModel
from ipvrm.output.progress import Progress
from ipvrm.run_folder import manifest, read_json, write_json, write_text

RESULTS = Path(__file__).parent.parent / "results" / "demo_spread"
COMMAND = "python -m benchmarks.studies.demo_spread"
REWARD_MODELS = {
    "ipvrm": CHOICES[0],
    "ipvrm, the paper's": replace(CHOICES[0], beta=10.0, margin=5.0),
    "implicit_prm": CHOICES[1],
    "implicit_prm, the paper's": replace(CHOICES[1], beta=0.05),
}
PAPER_GAE = replace(FULL.policies, gae_coef=1.0)  # lambda is 0.95, train-policy's default
POLICIES = {
    "grpo": ("grpo", FULL.policies),
    "grpo_prm": ("grpo_prm", FULL.policies),
    "distrl": ("distrl", FULL.policies),
    "grpo_prm, the paper's GAE": ("grpo_prm", PAPER_GAE),
    "distrl, the paper's GAE": ("distrl", PAPER_GAE),
}


def folder_of(kind: str, name: str) -> str:
    return f"{kind}-" + name.replace(", the paper's", "-paper").replace(" GAE", "-gae")


def measure(work: Path, seed: int, commit: str | None) -> dict[str, Any]:
    """Everything of one base model."""
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    stages = Stages(work, Progress())
    prepare(stages, FULL, seed)
    for name, choice in REWARD_MODELS.items():
        train_choice(stages, folder_of("reward", name), choice, seed)
    models = {
        name: reward_model_results(
            RewardModel.from_pretrained(work / folder_of("reward", name), device="cpu"),
            work / "rollouts",
            choice,
            FORMATS,
            FULL.best_of_n,
        )
        for name, choice in REWARD_MODELS.items()
    }
    prepare_policies(stages, FULL, seed)
    outcomes = {"base model": read_outcomes(work / "policy-start")["0"]}
    for name, (algorithm, settings) in POLICIES.items():
        folder = folder_of("policy", name)
        train_algorithm(stages, folder, algorithm, replace(settings, points=1), seed)
        outcomes[name] = read_outcomes(work / folder)[str(settings.steps)]
    test, _ = read_traces(work / "rollouts" / "test.jsonl")
    labels = [trace.label for trace in test]
    baselines = trivial_baselines(labels, [len(trace.steps) for trace in test])
    return {
        "seed": seed,
        "base": read_json(work / "base" / "base.json"),
        "erroneous": [int(label >= 0) for label in labels],
        "baselines": {name: value.f1 for name, value in baselines.items()},
        "reward_models": models,
        "policies": {name: {"gae_coef": s.gae_coef, "algorithm": a} for name, (a, s) in POLICIES.items()},
        "outcomes": outcomes,
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.done.items()},
        "seconds_of_this_run": time.perf_counter() - started,
        "machine": describe(),
        "manifest": manifest(COMMAND, seeds={"demo": seed}) | {"commit": commit},
    }


# -------------------------------------------------------------------------------------------------- summary


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tables over all base models; differences are paired by trace or problem."""

    def held_out(run: dict[str, Any]) -> int:
        return len(run["outcomes"]["base model"])

    def problems(run: dict[str, Any]) -> int:
        return len(run["reward_models"]["ipvrm"]["best_of_n"]["4"]["final"])

    f1 = {
        written.name: {
            name: estimate(runs, traces, f1_statistic(name, written.name)) for name in REWARD_MODELS
        }
        for written in FORMATS
    }
    gaps = {
        written.name: {
            f"{a} less {b}": estimate(
                runs, traces, difference(f1_statistic(a, written.name), f1_statistic(b, written.name))
            )
            for a, b in (("ipvrm", "implicit_prm"), ("ipvrm, the paper's", "implicit_prm, the paper's"))
        }
        for written in FORMATS
    }
    best_of: dict[str, Any] = {}
    for n in map(str, FULL.best_of_n):
        best_of[n] = {
            f"{name}: {pick}": estimate(
                runs,
                problems,
                mean_statistic(lambda r, m=name, p=pick, n=n: r["reward_models"][m]["best_of_n"][n][p]),
            )
            for name in REWARD_MODELS
            for pick in PICKS
        } | {
            way: estimate(
                runs,
                problems,
                mean_statistic(lambda r, w=way, n=n: r["reward_models"]["ipvrm"]["without_a_model"][n][w]),
            )
            for way in ("one sample", "majority vote", "pass@N")
        }
    accuracy = {
        name: estimate(runs, held_out, mean_statistic(lambda r, m=name: r["outcomes"][m]))
        for name in ("base model", *POLICIES)
    }
    pairs = [(name, "base model") for name in POLICIES] + [
        ("grpo_prm", "grpo"), ("distrl", "grpo"), ("distrl", "grpo_prm"),
        ("distrl, the paper's GAE", "grpo_prm, the paper's GAE"), ("distrl, the paper's GAE", "grpo"),
    ]  # fmt: skip
    gains = {
        f"{a} less {b}": estimate(
            runs,
            held_out,
            mean_statistic(lambda r, a=a, b=b: np.subtract(r["outcomes"][a], r["outcomes"][b])),
        )
        for a, b in pairs
    }
    baselines = {name: statistics.fmean(r["baselines"][name] for r in runs) for name in runs[0]["baselines"]}
    return {
        "f1": f1,
        "f1_differences": gaps,
        "baselines": baselines,
        "best_of_n": best_of,
        "policies": accuracy,
        "policy_differences": gains,
    }


def page(runs: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The tables as Markdown."""

    lines = [
        f"# The demo over {len(runs)} base models",
        "",
        (__doc__ or "").split("\n\n")[0].replace("\n", " ") + " All numbers in %; what is compared, and how "
        f"intervals are made, is said in `benchmarks/studies/demo_spread.py`. Command: `{COMMAND}`.",
        "",
    ]
    for name in REWARD_MODELS:
        choice = runs[0]["reward_models"][name]["choice"]
        rules = ", ".join(run["reward_models"][name]["choice"]["rule"] for run in runs)
        lines.append(f"- {name}: beta {choice['beta']:g}, margin {choice['margin']}, step score {rules}")
    for written in FORMATS:
        lines += ["", f"## First wrong step, F1, {written.name}", ""]
        lines += table("reward model", summary["f1"][written.name])
        lines += ["", *table("difference", summary["f1_differences"][written.name], "+")]
    constant = ", ".join(f"{name} {100 * value:.1f}" for name, value in summary["baselines"].items())
    lines += ["", f"Without a model (mean over base models): {constant}."]
    for n, rows in summary["best_of_n"].items():
        lines += ["", f"## Best of {n}, share of right answers", "", *table("chosen by", rows)]
    lines += [
        "",
        "## Policies, right answers on held-out problems",
        "",
        *table("policy", summary["policies"]),
    ]
    lines += ["", *table("difference", summary["policy_differences"], "+"), "", "## Time and machine", ""]
    for run in runs:
        seconds = sum(run["stage_seconds"].values())
        lines.append(f"- seed {run['seed']}: {seconds:.0f} s of stages on {run['machine']['cpu']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--work_dir", default="runs/demo_spread", help="models and rollouts")
    parser.add_argument("--output", default=str(RESULTS), help="folder of the results")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    commit = manifest()["commit"]  # before the first result: a written one is a change of the checkout
    for seed in arguments.seeds:
        if not (path := output / f"seed{seed}.json").exists():
            write_json(path, measure(Path(arguments.work_dir) / path.stem, seed, commit))
        runs = [read_json(path) for path in sorted(output.glob("seed*.json"))]
        summary = summarise(runs)
        write_json(output / "summary.json", summary)
        write_text(output / "README.md", page(runs, summary))
    print(f"written to {output}; training format: {summary['f1'][TRAINING_FORMAT.name]}")


if __name__ == "__main__":
    main()
