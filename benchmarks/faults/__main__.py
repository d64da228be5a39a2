"""`python -m benchmarks.faults --minutes M --seed S`: trials of every kind in turn, counted; exits with 1
where something was lost."""

from __future__ import annotations

import os

os.environ |= {  # before torch is imported
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import answers, files, runs, sanitized
from benchmarks.faults.process import small_disk
from benchmarks.suite import machine
from ipvrm.run_folder import write_json, write_text

CALLS = 300  # of ops in one trial
LISTED = 50  # losses that the file names
OPS = "op calls"
KINDS = (*runs.TRIALS, *files.TRIALS, *answers.TRIALS, OPS)


class Faults:
    """The kinds of trials, their world in a folder, and what they have come to."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str], commands: Sequence[str]):
        self.folder, self.seed, self.machine = folder, seed, machine.describe()
        self.machine["command"] = f"python -m benchmarks.faults {shlex.join(sys.argv[1:])}"
        self.counts: dict[str, dict[str, Any]] = {
            kind: {"trials": 0, "nothing_to_do": 0, "lost": 0, "seconds": 0.0, "of": {}} for kind in kinds
        }
        self.lost: list[dict[str, Any]] = []
        needs_world = set(kinds) & {*runs.TRIALS, *files.TRIALS}
        self.world = runs.World(folder / "world", tuple(commands)) if needs_world else None
        self.sanitized: Path | None = None
        if OPS in kinds and sanitized.why_not() is None:
            (folder / "sanitized").mkdir()
            self.sanitized = sanitized.build(folder / "sanitized")

    def trial(self, kind: str) -> None:
        """The next trial of this kind."""
        counts, began = self.counts[kind], time.monotonic()
        number = counts["trials"] + counts["nothing_to_do"]
        rng = random.Random(f"{self.seed} {kind} {number}")
        try:
            of, (said, lost, tried) = self._trial(kind, number, rng)
        except Exception as error:  # of the instrument: counted as a loss too, and never passed over
            of, said, lost, tried = "the trial itself", "", f"{type(error).__name__}: {error}", True
        counts["seconds"] += time.monotonic() - began
        if tried:
            counts["trials"] += 1
            counts["of"][of] = counts["of"].get(of, 0) + 1
        else:
            counts["nothing_to_do"] += 1
        if lost is not None:
            counts["lost"] += 1
            self.lost.append({"kind": kind, "number": number, "of": of, "done": said, "lost": lost[:2000]})
            print(f"LOST  {kind} {number}, {of}: {said}: {lost}", flush=True)

    def _trial(self, kind: str, number: int, rng: random.Random) -> tuple[str, runs.Found]:
        if kind in runs.TRIALS or kind in files.TRIALS:
            assert self.world is not None
            act: Any = runs.TRIALS.get(kind) or files.TRIALS[kind]
            names = list(self.world.commands)
            if kind in files.TRIALS:
                names = [n for n in names if n not in files.WITHOUT_FILES]
            if act is files.damaged_state:
                names = [n for n in names if n in RESUMED]
            command = self.world.commands[names[number % len(names)]]
            found: runs.Found = act(self.world, command, rng)
            self.world.clear()
            return command.name, found
        if kind in answers.TRIALS:
            folder = self.folder / f"answers-{kind.split()[1]}-{number}"
            folder.mkdir()
            found = runs.Found(*answers.TRIALS[kind](folder, rng))
            shutil.rmtree(folder)
            return "verifiers", found
        return self._calls(number)

    def _calls(self, number: int) -> tuple[str, runs.Found]:
        command = [
            "-m",
            "benchmarks.faults.ops",
            "--seed",
            f"{1000 * self.seed + number}",
            "--calls",
            str(CALLS),
        ]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 1800}
        if self.sanitized is None:
            done = subprocess.run([sys.executable, *command], text=True, check=False, cwd=ROOT, **options)
        else:
            done = sanitized.run(self.sanitized, command, **options)
        how = "sanitized" if self.sanitized else "not sanitized"
        if done.returncode:
            lines = done.stdout.splitlines()
            last = [line for line in lines if line.startswith("call ")][-1:]
            why = [line for line in lines if re.match(r"SUMMARY: |\w+Error: |.*runtime error: ", line)]
            said = [x[:900] for x in (*last, *why)] or lines[-12:]
            lost = f"ended with {done.returncode}: {' | '.join(said)}"
            return how, runs.Found(f"{CALLS} calls", lost)
        return how, runs.Found(done.stdout.splitlines()[-1], None)

    def report(self) -> dict[str, Any]:
        """What the results file holds."""
        return {
            "machine": self.machine,
            "seed": self.seed,
            "sanitizers": self.sanitized is not None,
            "calls_per_trial": CALLS,
            "trials": sum(c["trials"] for c in self.counts.values()),
            "nothing_to_do": sum(c["nothing_to_do"] for c in self.counts.values()),
            "lost": len(self.lost),
            "kinds": {k: c | {"seconds": round(c["seconds"], 1)} for k, c in self.counts.items()},
            "losses": self.lost[:LISTED],
        }


ROOT = Path(__file__).resolve().parents[2]
RESUMED = (
    "label", "rollout", "score", "eval processbench", "eval bon", "eval policy", "eval td", "train-rm",
    "train-policy",
)  # fmt: skip
LEFT_OUT = {
    "demo fig6": "a picture of what the demo has left; its own stages are not tried",
    "reproduce": "a plan of the others, each of which goes on by itself; its own stages are not tried: the "
    "smallest plan takes many minutes",
    "env": "writes no file",
    "bench": "writes what it has measured, and goes on with nothing",
}


def mounts(folder: Path) -> bool:
    """Whether a small disk can be mounted here."""
    place = folder / "mount"
    place.mkdir()
    with small_disk(place, 1 << 16) as remount:
        return remount is not None


def page(report: dict[str, Any]) -> str:
    """README.md of the results: the counts, and what they were made with."""
    header = report["machine"]
    lines = ["| tried | trials | lost | nothing to do |", "|---|--:|--:|--:|"]
    for kind, counts in report["kinds"].items():
        trials = counts["trials"]
        what = f"{trials:,}" + (f" of {report['calls_per_trial']} calls" if kind == OPS else "")
        lines.append(f"| {kind} | {what} | {counts['lost']} | {counts['nothing_to_do']} |")
    sanitized = "under AddressSanitizer and UBSan" if report["sanitizers"] else "without sanitizers"
    mounted = (
        "tmpfs mounts" if report["mounts"] else "no mounts were allowed: limits and injected errors alone"
    )
    changed = ", with uncommitted changes" if header["modified"] else ""
    tried = {name for counts in report["kinds"].values() for name in counts["of"]}
    others = LEFT_OUT | {
        command.name: "not in this run" for command in runs.commands_of(Path()) if command.name not in tried
    }
    minutes = sum(counts["seconds"] for counts in report["kinds"].values()) / 60
    return "\n".join(
        [
            "# What was tried on the commands, and what was lost",
            "",
            "Written by `benchmarks.faults`; do not edit. What the kinds are, "
            "`benchmarks/faults/__init__.py` says; counts by command are in [faults.json](faults.json).",
            "",
            *lines,
            "",
            "All commands but "
            + ", ".join(f"`{name}` ({why})" for name, why in others.items())
            + " are tried.",
            "",
            "Nothing to do: the command had ended before, nothing was kept that could be damaged, or the "
            "machine does not allow it (a mount). These are no trials; what they left is judged as well.",
            "",
            "Peak memory of `label` and `score` with a row of 50 MB, and with 10,000 and 100,000 rows: "
            "[memory.json](memory.json), by `python -m benchmarks.faults.memory`.",
            "",
            f"`{header['command']}`, commit {header['commit']}{changed}, {header['cpu']}, "
            f"{header['cores']} cores, {header['date']}, {minutes:.0f} minutes. Small disks: {mounted}; "
            f"op calls {sanitized}. Another seed makes other trials, as many as the minutes allow.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, help="try as long (at least one trial of each kind)")
    parser.add_argument("--trials", type=int, help="try so many of each kind, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="another seed: other trials")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of trials")
    parser.add_argument("--commands", nargs="+", default=[], help="of ipvrm; default: all that write")
    parser.add_argument(
        "--results", type=Path, help="folder for faults.json and README.md, after every round"
    )
    given = parser.parse_args(arguments)
    if (given.minutes is None) == (given.trials is None):
        parser.error("give --minutes or --trials")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name).resolve()
        can_mount = mounts(folder)
        faults = Faults(folder, given.seed, given.only, given.commands)
        deadline = time.monotonic() + 60 * (given.minutes or 0)
        rounds = 0
        while rounds < given.trials if given.minutes is None else time.monotonic() < deadline or not rounds:
            for kind in given.only:
                if given.minutes is not None and rounds and time.monotonic() > deadline:
                    break
                faults.trial(kind)
            rounds += 1
            report = faults.report() | {"mounts": can_mount}
            if given.results is not None:
                given.results.mkdir(parents=True, exist_ok=True)
                write_json(given.results / "faults.json", report)
                write_text(given.results / "README.md", page(report))
        print(page(report))
    return int(bool(faults.lost))


def preload() -> None:
    """Imports what the commands import, so that a forked process has it."""
    from importlib import import_module

    import transformers
    import tyro  # noqa: F401

    from ipvrm.cli import COMMANDS

    transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.Qwen3ForCausalLM  # noqa: B018
    for command in COMMANDS.values():
        if command.module.startswith("ipvrm."):
            import_module(command.module)


if __name__ == "__main__":
    preload()
    raise SystemExit(main())
