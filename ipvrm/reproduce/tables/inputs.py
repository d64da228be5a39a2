"""What no command of ours writes: the demo's task as files, one pair a prompt, the problems of a source."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipvrm.data.files import records
from ipvrm.data.preference import pairs_of
from ipvrm.data.rows import data_source
from ipvrm.demo.arithmetic import STEP_SEPARATOR, answer_of, first_wrong_step
from ipvrm.demo.rollouts import problems_of_parts, read_rollouts
from ipvrm.demo.run import Stages, prepare
from ipvrm.demo.settings import Sizes
from ipvrm.errors import IpvrmError
from ipvrm.output.progress import Progress
from ipvrm.run_folder import remove_leftovers, write_json, write_table

PARTS = tuple(
    f"part-{i}" for i in range(1, 6)
)  # of the task's problems, equal in kind: one for each benchmark
STEP_PARTS = PARTS[:4]  # one for each subset of ProcessBench


@dataclass(frozen=True)
class TaskConfig:
    """The demo's base model, its problems and its traces with step labels, in the formats of our commands."""

    output_dir: str
    multiple_of: int
    base_max_steps: int
    problems: int
    """Of the reward models and policies."""
    held_out: int
    """For Best-of-N and the policies, in `PARTS`."""
    traces: int
    """With step labels, in `STEP_PARTS`."""
    seed: int


def make_task(config: TaskConfig, progress: bool = True) -> None:
    """Writes base/, train.jsonl, held_out.jsonl (`data_source` is its part) and processbench/part-*.json."""
    sizes = replace(
        Sizes(),
        multiple_of=config.multiple_of,
        base_max_steps=config.base_max_steps,
        train_problems=config.problems,
        rollouts_per_problem=1,
        validation_traces=1,
        test_traces=config.traces,
        best_of_problems=config.held_out,
        best_of_samples=1,
    )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for held in (folder, folder / "processbench"):
        remove_leftovers(held)  # the lock is that of the plan's folder
    prepare(Stages(folder, Progress(enabled=progress)), sizes, config.seed)
    parts = problems_of_parts(sizes, config.seed)
    rows = [{"prompt": p.text, "answer": str(p.answer)} for p in parts["train"]]
    write_table(folder / "train.jsonl", rows)
    rows = [
        {"prompt": p.text, "answer": str(p.answer), "data_source": PARTS[i % len(PARTS)]}
        for i, p in enumerate(parts["best_of_n"])
    ]
    write_table(folder / "held_out.jsonl", rows)
    items: list[dict[str, Any]] = []
    for problem, responses in read_rollouts(folder / "rollouts" / "test.jsonl"):
        for response in filter(None, responses):
            steps = response.split(STEP_SEPARATOR)
            right = answer_of(response) == problem.answer
            label = first_wrong_step(problem, steps)
            items.append(
                {"problem": problem.text, "steps": steps, "label": label, "final_answer_correct": right}
            )
    (folder / "processbench").mkdir(exist_ok=True)
    for i, part in enumerate(STEP_PARTS):
        write_json(folder / "processbench" / f"{part}.json", items[i :: len(STEP_PARTS)])


@dataclass(frozen=True)
class PairsConfig:
    """Of every prompt with mixed outcomes one right and one wrong response (section 4.1 of the paper)."""

    input: str
    """Labelled rollouts."""
    output: str
    seed: int = 42


def keep_pairs(config: PairsConfig, progress: bool = True) -> None:
    """Writes both rows of every pair as they are: what takes responses one by one learns from the same."""
    rows = [record.value for record in records(config.input, None)]
    pairs, counts = pairs_of(
        [str(r["prompt"]) for r in rows], [r["label"] == 1 for r in rows], "one", config.seed
    )
    if not pairs:
        raise IpvrmError(f"{config.input}: no prompt with a right and a wrong response")
    write_table(config.output, [rows[i] for pair in pairs for i in pair])
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    Progress(enabled=progress).note(told)


@dataclass(frozen=True)
class ProblemsConfig:
    """The problems of some sources."""

    input: str
    output: str
    sources: tuple[str, ...]


def keep_problems(config: ProblemsConfig, progress: bool = True) -> None:
    """Writes the rows whose `data_source` is in `sources`.

    Raises:
        IpvrmError: a source without a row.
    """
    rows = list(_of_sources(config))
    found = {row["data_source"] for row in rows}
    if missing := [source for source in config.sources if source not in found]:
        raise IpvrmError(f"{config.input}: no row whose data_source is {', '.join(missing)}")
    write_table(config.output, rows)
    Progress(enabled=progress).note(f"{len(rows)} problems of {', '.join(config.sources)}")


def _of_sources(config: ProblemsConfig) -> Iterator[dict[str, Any]]:
    for record in records(config.input, None):
        if isinstance(record.value, ValueError):
            raise IpvrmError(f"{record.file}: row {record.row}: {record.value}")
        if data_source(record.value) in config.sources:
            yield record.value
