"""GRPO, GRPO + IPVRM and DistRL + IPVRM from the demo's base model, at equal rollouts.

    ipvrm demo && python -m benchmarks.studies.demo_policies --demo runs/demo

Every algorithm trains on the problems of the demo's rollouts with the same prompts, the same number of
responses and the same random numbers, and is measured on other problems at temperature 1, one response each.
Accuracy comes with the standard error of a proportion; the gain over the start is called shown where it is
more than three standard errors. Also what a step costs: seconds by part, and the ratio to `grpo_prm`.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ipvrm.demo.arithmetic import Problem, make_problems
from ipvrm.demo.base_model import MAX_NEW_TOKENS
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.run_folder import manifest, read_json, write_json
from ipvrm.training.train_policy import train_policy

RESULTS = Path(__file__).parent.parent / "results" / "demo_policies.json"
ALGORITHMS = {"grpo": "GRPO", "grpo_prm": "GRPO + IPVRM", "distrl": "DistRL + IPVRM"}
PARTS = ("rollout", "verify", "behaviour", "reward", "update")
GAE_COEF = 0.1  # from an earlier trial; the paper's 1 was not compared with it here


def write_problems(folder: Path, demo: Path, held_out: int, seed: int) -> None:
    """train.jsonl, the problems that the reward model's data answered, and held_out.jsonl, other ones."""
    import pyarrow.parquet as pq

    table = pq.read_table(demo / "rollouts" / "train.parquet", columns=["prompt"])
    train = [problem_of(text) for text in dict.fromkeys(table["prompt"].to_pylist())]
    multiple_of = read_json(demo / "base" / "stage.json")["settings"]["multiple_of"]
    others = make_problems(held_out, Random(seed + 100), frozenset(train), multiple_of=multiple_of)
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("held_out", others)):
        rows = ({"prompt": p.text, "answer": str(p.answer)} for p in problems)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem_of(text: str) -> Problem:
    """`47+25-13` as a problem."""
    start, *changes = text.replace("-", "+-").split("+")
    return Problem(int(start), tuple(map(int, changes)))


def run(algorithm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: its curve of held-out accuracy and the median seconds of a step's parts."""
    work, demo = Path(options.work_dir), Path(options.demo)
    scored = algorithm != "grpo"
    config = PolicyConfig(
        model=str(demo / "base"),
        train_data=str(work / "problems" / "train.jsonl"),
        output_dir=str(work / f"{algorithm}-{seed}"),
        algorithm=algorithm,
        reward_model=str(demo / "reward-ipvrm") if scored else None,
        gae_coef=GAE_COEF if scored else None,
        num_generations=8,
        rollout_prompts=options.prompts,
        train_prompts=options.prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        max_steps=options.steps,
        minibatch_size=128,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        verifier="ipvrm.demo.arithmetic:right_answer",
        verifier_workers=1,
        eval_data=str(work / "problems" / "held_out.jsonl"),
        eval_steps=max(1, options.steps // 2),
        eval_temperature=1.0,
        eval_top_p=1.0,
        save_steps=0,
        seed=seed,
        use_cpu=True,
    )
    if not (Path(config.output_dir) / "results.json").exists():
        train_policy(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = records[1:]
    return {
        "curve": [
            (r["step"], r["eval_accuracy"], r["eval_responses"]) for r in records if "eval_accuracy" in r
        ],
        "responses": sum(r["responses"] for r in steps),
        "seconds": {p: statistics.median(r.get(f"seconds_{p}", 0.0) for r in steps) for p in PARTS},
        "step_seconds": statistics.median(r["seconds"] for r in steps),
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
        "rm_auc": [r["rm_auc"] for r in steps if "rm_auc" in r],
        "entropy": [r["entropy"] for r in steps],
    }


def report(results: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    """Lines of the table."""
    yield f"{'':<16}{'start':>14}{'end':>14}{'gain / error':>14}{'s / step':>10}   median seconds by part"
    for algorithm, by_seed in results.items():
        for seed, found in by_seed.items():
            (_, before, n), (_, after, m) = found["curve"][0], found["curve"][-1]
            errors = [(p * (1 - p) / k) ** 0.5 for p, k in ((before, n), (after, m))]
            ratio = (after - before) / max(1e-9, sum(e**2 for e in errors) ** 0.5)
            cells = [f"{p:.3f} +- {e:.3f}" for p, e in zip((before, after), errors, strict=True)]
            name = f"{ALGORITHMS[algorithm]} ({seed})"
            parts = "  ".join(f"{p} {s:.2f}" for p, s in found["seconds"].items())
            yield f"{name:<20}{cells[0]}  {cells[1]}{ratio:>10.1f}{found['step_seconds']:>10.2f}   {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default="runs/demo", help="a finished output folder of ipvrm demo")
    parser.add_argument("--work_dir", default="runs/demo_policies", help="runs; finished ones are reused")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32, help="per step, eight responses each")
    parser.add_argument("--held_out", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", default=str(RESULTS), help="where to write the numbers")
    options = parser.parse_args()
    write_problems(
        Path(options.work_dir) / "problems", Path(options.demo), options.held_out, options.seeds[0]
    )
    results = {name: {seed: run(name, seed, options) for seed in options.seeds} for name in ALGORITHMS}
    print("\n".join(report(results)))
    settings = {name: getattr(options, name) for name in ("steps", "prompts", "held_out", "learning_rate")}
    write_json(
        options.json, {"settings": settings, "gae_coef": GAE_COEF, "results": results, "manifest": manifest()}
    )


if __name__ == "__main__":
    main()
