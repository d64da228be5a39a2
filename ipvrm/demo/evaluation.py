"""What the demo's reward models find: first-error F1 in three formats, and Best-of-N."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ipvrm.data.steps import RULES
from ipvrm.demo.arithmetic import (
    SHIFTED_FORMATS,
    STEP_SEPARATOR,
    TRAINING_FORMAT,
    Format,
    answer_of,
    first_wrong_step,
)
from ipvrm.demo.rollouts import read_rollouts
from ipvrm.demo.settings import Choice, Sizes
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.best_of_n import PICKS, Samples, best_of_n, response_scores
from ipvrm.evaluate.scoring import SolutionScores, score_solutions
from ipvrm.evaluate.thresholds import (
    bootstrap_difference,
    f1_report,
    finite_or_none,
    hits,
    score_threshold,
    sweep,
    trivial_baselines,
)
from ipvrm.models.reward_model import RewardModel
from ipvrm.output.progress import Progress
from ipvrm.run_folder import write_json, write_text

FORMATS = (TRAINING_FORMAT, *SHIFTED_FORMATS)


@dataclass(frozen=True)
class Trace:
    """A response, cut into steps in the training format; `label` is its first wrong step, -1 for none."""

    problem: str
    steps: tuple[str, ...]
    label: int


def read_traces(path: Path) -> tuple[list[Trace], int]:
    """(traces, how many responses never ended and are left out)."""
    traces, lost = [], 0
    for problem, responses in read_rollouts(path):
        for response in responses:
            if not response:
                lost += 1
                continue
            steps = response.split(STEP_SEPARATOR)
            traces.append(Trace(problem.text, tuple(steps), first_wrong_step(problem, steps)))
    return traces, lost


def score_traces(
    reward_model: RewardModel, traces: Sequence[Trace], written: Format = TRAINING_FORMAT
) -> list[SolutionScores]:
    """Scores of traces, written in a format."""
    items = [(trace.problem, written.write(list(trace.steps))) for trace in traces]
    scores = score_solutions(reward_model, items, step_format="{step}", step_separator=written.separator)
    return [s for s in scores if s is not None]  # no length limit: all of them


def evaluate_models(
    folder: Path, output: Path, choices: Sequence[Choice], sizes: Sizes, seed: int, progress: Progress
) -> None:
    """Writes evaluation.json, test_scores.jsonl and trace.json (for the picture) into `folder`."""
    rollouts = output / "rollouts"
    validation, _ = read_traces(rollouts / "validation.jsonl")
    test, lost = read_traces(rollouts / "test.jsonl")
    labels = [trace.label for trace in test]
    for name, traces in (("validation", validation), ("test", test)):
        wrong = sum(trace.label >= 0 for trace in traces)
        if wrong in (0, len(traces)):
            raise IpvrmError(
                f"demo: {wrong} of the {len(traces)} {name} traces hold a mistake, so first-error F1 is "
                "undefined; the base model learnt too little, or the sizes are too small"
            )
    models: dict[str, Any] = {}
    hit: dict[tuple[str, str], Any] = {}
    picks: dict[str, list[dict[str, list[float]]]] = {}
    scored: dict[str, dict[str, list[SolutionScores]]] = {}
    with progress.bar("evaluation", len(choices) * (len(FORMATS) + 2)) as update:
        done = 0
        for choice in choices:
            reward_model = RewardModel.from_pretrained(output / f"reward-{choice.objective}", device="cpu")
            found = score_traces(reward_model, validation)
            thresholds = {
                rule: sweep([s.by_rule[rule] for s in found], [trace.label for trace in validation])
                for rule in RULES
            }
            update(done := done + 1)
            formats: dict[str, Any] = {}
            scored[choice.objective] = {}
            for written in FORMATS:
                scores = score_traces(reward_model, test, written)
                scored[choice.objective][written.name] = scores
                formats[written.name] = {}
                for rule in RULES:
                    by_rule = [s.by_rule[rule] for s in scores]
                    best, _ = sweep(by_rule, labels)
                    formats[written.name][rule] = {
                        "transfer": f1_report(
                            by_rule, labels, thresholds[rule][0], sizes.bootstrap_resamples, seed
                        ),
                        "oracle": f1_report(by_rule, labels, best, sizes.bootstrap_resamples, seed),
                    }
                chosen = [s.by_rule[choice.rule] for s in scores]
                hit[choice.objective, written.name] = hits(chosen, labels, thresholds[choice.rule][0].score)
                update(done := done + 1)
            models[choice.objective] = {
                "rule": choice.rule,
                "validation": {
                    rule: finite_or_none(threshold._asdict()) | f1._asdict()
                    for rule, (threshold, f1) in thresholds.items()
                },
                "formats": formats,
            }
            picks[choice.objective] = pick_scores(reward_model, rollouts / "best_of_n.jsonl")
            update(done := done + 1)
    write_json(
        folder / "evaluation.json",
        {
            "test": {
                "traces": len(test),
                "erroneous": sum(k >= 0 for k in labels),
                "correct": sum(k < 0 for k in labels),
                "dropped_unfinished": lost,
                "validation_traces": len(validation),
            },
            "models": models,
            "differences": _differences(hit, models, labels, sizes, seed),
            "baselines": {
                name: finite_or_none(value._asdict())
                for name, value in trivial_baselines(labels, [len(t.steps) for t in test]).items()
            },
            "best_of_n": _best_of_n(rollouts / "best_of_n.jsonl", picks, sizes, seed),
        },
    )
    _write_scores(folder, test, scored)
    _write_trace(folder, test, scored, models)


def _differences(
    hit: dict[tuple[str, str], Any], models: dict[str, Any], labels: list[int], sizes: Sizes, seed: int
) -> dict[str, Any]:
    """F1 of the first model minus that of the second on the same traces, by format."""
    if len(models) != 2:
        return {}
    first, second = models
    result = {}
    for written in FORMATS:
        f1 = [
            models[name]["formats"][written.name][models[name]["rule"]]["transfer"]["f1"]
            for name in (first, second)
        ]
        interval = bootstrap_difference(
            hit[first, written.name], hit[second, written.name], labels, sizes.bootstrap_resamples, seed
        )
        result[written.name] = {"f1": f1[0] - f1[1], "interval": list(interval)}
    return result


def pick_scores(reward_model: RewardModel, path: Path) -> list[dict[str, list[float]]]:
    """Per problem, the four scores of each response; -inf for one that never ended, so it is picked last."""
    problems = read_rollouts(path)
    items = [(p.text, r.split(STEP_SEPARATOR)) for p, responses in problems for r in responses if r]
    scores = iter(score_solutions(reward_model, items, step_format="{step}", step_separator=STEP_SEPARATOR))
    result = []
    for _, responses in problems:
        by_pick: dict[str, list[float]] = {pick: [] for pick in PICKS}
        for response in responses:
            scored = next(scores) if response else None
            values = (
                dict.fromkeys(PICKS, -math.inf)
                if scored is None
                else response_scores(
                    scored.log_ratio,
                    scored.steps_of_token,
                    reward_model.info.beta,
                    scored.num_steps,
                    reward_model.info.discount,
                )
            )
            for pick in PICKS:
                by_pick[pick].append(values[pick])
        result.append(by_pick)
    return result


def _best_of_n(
    path: Path, picks: dict[str, list[dict[str, list[float]]]], sizes: Sizes, seed: int
) -> list[dict[str, Any]]:
    problems = []
    for number, (problem, responses) in enumerate(read_rollouts(path)):
        answers = [answer_of(r) if r else None for r in responses]
        scores = {f"{name}:{pick}": found[number][pick] for name, found in picks.items() for pick in PICKS}
        problems.append(Samples(answers, [a == problem.answer for a in answers], scores))
    rows = best_of_n(problems, sizes.best_of_n, sizes.bootstrap_resamples, seed)
    return [asdict(row) | {"interval": list(row.interval)} for row in rows]


def _write_scores(
    folder: Path, test: list[Trace], scored: dict[str, dict[str, list[SolutionScores]]]
) -> None:
    """One line per test trace: its steps, label and step scores by model, format and rule."""
    lines = []
    for i, trace in enumerate(test):
        scores = {
            name: {written: found[i].by_rule for written, found in by_format.items()}
            for name, by_format in scored.items()
        }
        lines.append(json.dumps(asdict(trace) | {"scores": scores}) + "\n")
    write_text(folder / "test_scores.jsonl", "".join(lines))


def _write_trace(
    folder: Path,
    test: list[Trace],
    scored: dict[str, dict[str, list[SolutionScores]]],
    models: dict[str, Any],
) -> None:
    """The first test trace whose first mistake has a right step on both sides' place: not first, not last.

    It is taken by position alone, before anyone has looked at its scores.
    """
    fitting = [i for i, t in enumerate(test) if len(t.steps) >= 4 and 1 <= t.label <= len(t.steps) - 2]
    wrong = [i for i, t in enumerate(test) if t.label >= 0]
    index = (fitting or wrong or [0])[0]
    trace = test[index]
    shown = {}
    for name, by_format in scored.items():
        found = by_format[TRAINING_FORMAT.name][index]
        rule = models[name]["rule"]
        threshold = models[name]["formats"][TRAINING_FORMAT.name][rule]["transfer"]
        flagged = np.asarray(found.by_rule[rule]) < score_threshold(threshold)
        shown[name] = {
            "log_ratio": found.log_ratio.tolist(),
            "step_scores": found.by_rule[rule],
            "flagged": int(flagged.argmax()) if flagged.any() else -1,
        }
    write_json(folder / "trace.json", {"index": index, **asdict(trace), "models": shown})
