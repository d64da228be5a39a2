"""What happens to running commands: kill -9, signals, two at once, closed pipes, full and read-only disks.

Every trial ends with the same command given again, undisturbed: it must end well, with the bytes that a run
without the disturbance has written, and with no temporary file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.process import (
    FULL,
    PATIENCE,
    Ended,
    Wire,
    die,
    failing,
    limited_files,
    run,
    small_disk,
    start,
)
from benchmarks.faults.toy import MINI, make_toy, noisy_engine, noisy_samples, write_jsonl

VARYING = ("seconds", "step_seconds", "tokens_per_second", "peak_memory", "commit")  # beginnings of names
TEXTS = (".json", ".jsonl", ".yaml", ".html", ".md", ".csv")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OTHER = "another run writes there"


def smaller() -> None:
    """Portions so small that a command of two seconds has several; the demo in miniature."""
    import ipvrm.demo.rollouts
    import ipvrm.demo.run
    import ipvrm.evaluate.bon
    import ipvrm.evaluate.processbench
    import ipvrm.evaluate.score
    import ipvrm.reproduce.td_study
    import ipvrm.rollouts.engine
    import ipvrm.rollouts.label

    ipvrm.rollouts.label.CHUNK = 8
    ipvrm.evaluate.bon.CHUNK = 4
    ipvrm.evaluate.score.CHUNK = 4
    ipvrm.evaluate.processbench.PART_ITEMS = 4
    ipvrm.reproduce.td_study.CHUNK_PROMPTS = 1
    if sys.argv[1] == "demo":
        ipvrm.demo.run.QUICK = MINI
        ipvrm.demo.rollouts.sample = noisy_samples
        ipvrm.rollouts.engine.TransformersEngine.__call__ = noisy_engine


@dataclass
class Command:
    """A command that writes `output`, a file or a folder of a trial. `expected` is filled by `World`."""

    name: str
    flags: list[str]
    output: str
    trains: bool = False
    expected: dict[str, str] = field(default_factory=dict)
    changes: int = 0
    seconds: float = 0.0

    def arguments(self, folder: Path) -> list[str]:
        return [*self.name.split(), *self.flags, self.target, str(folder / self.output)]

    @property
    def target(self) -> str:
        return "--output" if "." in self.output else "--output_dir"


def commands_of(toy: Path) -> list[Command]:
    """Every command that is tried, on what lies in `toy`."""
    sft, rm, form = str(toy / "sft"), str(toy / "ipvrm"), ["--step_format", "{step}"]
    form += ["--step_separator", ";"]
    verifier = ["--verifier", "toy_verifiers:first"]
    auto = ["--resume_from_checkpoint", "auto", "--save_steps", "1", "--use_cpu"]
    return [
        Command(
            "label",
            ["--input", str(toy / "rollouts.jsonl"), "--num_workers", "1", *verifier],
            "labelled.parquet",
        ),
        Command(
            "rollout",
            ["--model", sft, "--input", str(toy / "prompts.jsonl"), "--limit", "6", "--use_cpu"]
            + ["--num_generations", "2", "--max_new_tokens", "6", "--per_device_eval_batch_size", "4"]
            + ["--min_prob", "0.1"],
            "rollouts.jsonl",
        ),
        Command(
            "score",
            ["--model", rm, "--input", str(toy / "solutions.jsonl"), "--use_cpu", *form],
            "scores.jsonl",
        ),
        Command(
            "eval processbench",
            ["--model", rm, "--data", str(toy / "gsm8k.json"), "--bootstrap_resamples", "10", *form],
            "eval",
        ),
        Command(
            "eval bon",
            ["--model", rm, "--data", str(toy / "candidates.jsonl"), "--n", "2", "--use_cpu"]
            + ["--bootstrap_resamples", "10"],
            "bon",
        ),
        Command(
            "eval policy",
            ["--model", sft, "--data", str(toy / "prompts.jsonl"), "--limit", "4", "--use_cpu"]
            + ["--num_generations", "2", "--k", "2", "--max_new_tokens", "6", "--verifier_workers", "1"]
            + ["--per_device_eval_batch_size", "4", "--bootstrap_resamples", "10", *verifier],
            "accuracy",
        ),
        Command(
            "eval td",
            ["--policy", sft, "--reward_model", rm, "--data", str(toy / "prompts.jsonl"), "--use_cpu"]
            + ["--num_prompts", "3", "--num_responses", "2", "--prefixes_per_response", "1"]
            + ["--completions", "2", "--max_new_tokens", "6", "--bootstrap_resamples", "10"]
            + ["--verifier_workers", "1", *verifier],
            "td",
        ),
        Command(
            "train-rm",
            ["--model", sft, "--train_data", str(toy / "labelled.jsonl"), "--max_steps", "4"]
            + ["--learning_rate", "1e-3", "--global_batch_size", "16", *auto],
            "rm",
            trains=True,
        ),
        Command(
            "train-policy",
            ["--model", sft, "--reward_model", rm, "--train_data", str(toy / "prompts.jsonl")]
            + ["--max_steps", "3", "--max_new_tokens", "6", "--rollout_prompts", "8", "--lora_r", "0"]
            + ["--rm_lora_r", "0", "--train_prompts", "6", "--minibatch_size", "16"]
            + ["--rm_minibatch_size", "16", "--learning_rate", "1e-3", "--rm_learning_rate", "1e-3"]
            + ["--verifier_workers", "1", *verifier, *auto],
            "policy",
            trains=True,
        ),
        Command(
            "make-tiny-model",
            ["--texts", str(toy / "labelled.jsonl"), "--vocab_size", "300", "--hidden_size", "32"]
            + ["--intermediate_size", "64", "--num_hidden_layers", "1"],
            "tiny",
        ),
        Command(
            "inspect",
            ["--model", rm, "--input", str(toy / "solutions.jsonl"), "--use_cpu", "--json", *form]
            + ["--pick", "first", "--k", "3"],
            "traces.html",
        ),
        Command("report", [rm], "report.html"),
        Command("demo", ["--quick"], "demo"),
    ]


class World:
    """A toy in a folder, and the commands that are tried on it, each once run undisturbed, twice."""

    def __init__(self, folder: Path, only: tuple[str, ...] = ()):
        self.folder, self._number = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.toy = toy = _made(folder / "toy")
        if pid := os.fork():  # a process that has trained has threads, and is not to be forked
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError("the toy models cannot be trained")
        else:
            status = 1
            try:
                make_toy(toy, ("ipvrm",))
                status = 0
            finally:
                os._exit(status)
        answers = [f"{n % 4};{n % 10}" for n in range(30)]
        write_jsonl(
            toy / "rollouts.jsonl",
            [{"prompt": str(10 + n), "response": r, "answer": "3"} for n, r in enumerate(answers)],
        )
        write_jsonl(
            toy / "candidates.jsonl",
            [{"prompt": str(n // 3), "response": r, "label": int(r < "1")} for n, r in enumerate(answers)],
        )
        steps = [{"problem": str(10 + n), "steps": r.split(";"), "id": n} for n, r in enumerate(answers[:14])]
        write_jsonl(toy / "solutions.jsonl", steps)
        (toy / "gsm8k.json").write_text(json.dumps([r | {"label": n % 3 - 1} for n, r in enumerate(steps)]))
        self.commands = {c.name: c for c in commands_of(toy) if not only or c.name in only}
        for command in self.commands.values():
            results = []
            for _ in range(2):
                trial = self.trial(command)
                wire, began = Wire(trial), time.monotonic()
                ended = run(command.arguments(trial), trial, tune=smaller, wire=wire)
                command.seconds = time.monotonic() - began
                if ended.status != 0:
                    raise RuntimeError(f"{command.name} does not run undisturbed: {ended.said[-2000:]}")
                results.append(contents(trial))
                command.expected, command.changes = results[0], wire.count
            if differ(results[0], results[1]):
                raise RuntimeError(f"{command.name} differs run by run: {differ(*results)}")

    def trial(self, command: Command) -> Path:
        """A new folder with the verifiers beside the output."""
        self._number += 1
        folder = _made(self.folder / f"{self._number:06d}-{command.name.replace(' ', '-')}")
        shutil.copy(self.toy / "toy_verifiers.py", folder)
        return folder

    def clear(self) -> None:
        """Deletes the folders of the trials that are over, and their logs."""
        for path in self.folder.iterdir():
            if path != self.toy:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def judge(self, command: Command, trial: Path) -> str | None:
        """The same command again, undisturbed: what is lost then."""
        ended = run(command.arguments(trial), trial, tune=smaller)
        if problem := ended.wrong((0,)):
            return f"given again it {problem}"
        return differ(command.expected, contents(trial))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def contents(trial: Path) -> dict[str, str]:
    """Every file below a trial's folder as a hash, of text without what differs from run to run."""
    found = {}
    for path in sorted(trial.rglob("*")):
        name = path.relative_to(trial).as_posix()
        if path.is_dir() or name == "toy_verifiers.py" or "__pycache__" in name:
            continue
        data = path.read_bytes()
        if path.suffix in TEXTS:
            text = data.decode(errors="backslashreplace").replace(str(trial), "$TRIAL")
            text = re.sub(r'"date": ?"[-\d]+"|^- time: .*', "$TIME", text, flags=re.MULTILINE)
            try:
                lines = text.splitlines() if path.suffix == ".jsonl" else [text]
                data = json.dumps([_steady(json.loads(line)) for line in lines]).encode()
            except ValueError:
                data = text.encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _steady(v)
            for k, v in value.items()
            if not k.startswith(VARYING) and not re.fullmatch(r"checksums?|trainer_state.json", k)
        }
    return [_steady(item) for item in value] if isinstance(value, list) else value


def differ(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """What is missing, left over or other, in words. A checkpoint's checksums follow its files."""
    words = []
    for word, names in (
        ("missing", expected.keys() - found.keys()),
        ("left over", found.keys() - expected.keys()),
        ("other", {n for n in expected.keys() & found.keys() if expected[n] != found[n]}),
    ):
        names = {name for name in names if not name.endswith("/checksums.json")}
        if names:
            words.append(f"{word}: {', '.join(sorted(names)[:4])}")
    return "; ".join(words) or None


# ------------------------------------------------------------------------------------------------- trials
# Each takes the world, a command and a random.Random.


class Found(NamedTuple):
    """What a trial did and what was lost, None for nothing. It has not `tried` where there was nothing to do:
    the command had ended before, or the machine does not allow it. It is judged all the same."""

    said: str
    lost: str | None
    tried: bool = True


def killed(world: World, command: Command, rng: random.Random) -> Found:
    """kill -9 one to three times, at a change of a file or by the clock, and then the same command."""
    trial, done, landed = world.trial(command), [], False
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.7:
            at = rng.randint(1, max(1, command.changes))
            opened = rng.random() < 0.5
            ended = run(command.arguments(trial), trial, tune=smaller, wire=Wire(trial, at, die, opened))
            done.append(f"change {at}" + " (a file just opened)" * opened)
        else:
            running = start(command.arguments(trial), trial, tune=smaller)
            after = rng.uniform(0, 1.1 * command.seconds)
            _sleep_while(running, after)
            running.send(signal.SIGKILL)
            ended = running.wait()
            done.append(f"{after:.2f} s")
        if problem := ended.wrong((0, -signal.SIGKILL)):
            return Found(", ".join(done), problem)
        landed |= ended.status == -signal.SIGKILL
    return Found("kill -9 at " + ", ".join(done), world.judge(command, trial), landed)


def signalled(world: World, command: Command, rng: random.Random) -> Found:
    """One signal; a training run that has logged a step saves first, and loses no finished step. Sometimes a
    parent ignores it."""
    trial, number, ignored = world.trial(command), rng.choice(SIGNALS), rng.random() < 0.15
    before = (lambda: signal.signal(number, signal.SIG_IGN)) if ignored else (lambda: None)
    running = start(command.arguments(trial), trial, tune=smaller, before=before)
    folder, after = trial / command.output, rng.uniform(0, command.seconds)
    name = f"{signal.Signals(number).name} after {after:.2f} s"
    if command.trains and rng.random() < 0.5:  # most of a small run is before its first step
        after = rng.uniform(0, 0.1 * command.seconds)
        name = f"{signal.Signals(number).name} {after:.2f} s after the first step"
        waiting = time.monotonic() + PATIENCE
        while not _has_logged(folder) and not running.poll() and time.monotonic() < waiting:
            time.sleep(0.002)
    _sleep_while(running, after)
    had_logged = _has_logged(folder)
    sent = running.send(number)
    ended = running.wait()
    name += ", ignored" if ignored else ""
    allowed = (0,) if ignored else (0, -number, 128 + number)
    if problem := ended.wrong(allowed):
        return Found(name, problem)
    if command.trains and ended.status:
        stopped = re.findall(r"stopped after update (\d+)", ended.said)
        if had_logged and not stopped and not (folder / "results.json").exists():
            return Found(name, f"ended with {ended.status} and has not saved what it had done")
        if stopped:
            step = int(stopped[-1])
            last = max(int(json.loads(line)["step"]) for line in _log(folder).read_text().splitlines())
            if step < last or not (folder / f"checkpoint-{step}").is_dir():
                return Found(name, f"stopped after {step} with {last} steps done")
    return Found(name, world.judge(command, trial), sent)


def _log(folder: Path) -> Path:
    return folder / "metrics.jsonl"


def _has_logged(folder: Path) -> bool:
    """Whether a training run has written a whole record: a signal is noted from before the first step on."""
    return _log(folder).is_file() and b"\n" in _log(folder).read_bytes()


def two_at_once(world: World, command: Command, rng: random.Random) -> Found:
    """The same command twice: one does the work, the other says who does, or finds it done."""
    trial, after = world.trial(command), rng.uniform(0, command.seconds)
    first = start(command.arguments(trial), trial, tune=smaller)
    _sleep_while(first, after)
    both = not first.poll()
    second = run(command.arguments(trial), trial, tune=smaller)
    ended = first.wait()
    name = f"the second after {after:.2f} s"
    for one in (ended, second):
        if problem := one.wrong((0, 2)):
            return Found(name, problem)
        if one.status == 2 and OTHER not in one.said and not _refused_as_done(command, one):
            return Found(name, f"refused for another reason: {one.last_line}")
    if 0 not in (ended.status, second.status):
        return Found(name, "neither has done the work")
    return Found(name, differ(command.expected, contents(trial)), both)


def _refused_as_done(command: Command, ended: Ended) -> bool:
    return command.name == "make-tiny-model" and "exists" in ended.said


def unread(world: World, command: Command, rng: random.Random) -> Found:
    """Output that nobody reads, or that cannot be written: the run goes on to its end."""
    trial, kind = world.trial(command), rng.choice(("closed", "no reader", "reader leaves", "/dev/full"))
    opened, outputs, after = [], (None, None), 0.0
    before: Callable[[], None] = lambda: None  # noqa: E731
    if kind in ("no reader", "reader leaves"):
        read, write = os.pipe()
        opened, outputs = [write], (write, write)
        if kind == "no reader":
            os.close(read)
        else:
            after = rng.uniform(0, command.seconds)
            before = lambda: os.close(read)  # noqa: E731 (the command must not be its own reader)
            threading.Thread(target=lambda: (time.sleep(after), os.close(read)), daemon=True).start()
    elif kind == "/dev/full":
        opened = [os.open("/dev/full", os.O_WRONLY)]
        outputs = (opened[0], opened[0])
    running = start(command.arguments(trial), trial, tune=smaller, outputs=outputs, before=before)
    for descriptor in opened:
        os.close(descriptor)
    ended = running.wait()
    problem = ended.wrong((0,)) or differ(command.expected, contents(trial))
    return Found(f"output: {kind}", problem, running.seconds() > after)


def disk(world: World, command: Command, rng: random.Random) -> Found:
    """A disk that is full, read-only or failing: one line, and with room again the same command ends well."""
    trial = world.trial(command)
    way = rng.choice(("fails", "fails", "file size", "tmpfs", "read-only tmpfs"))
    if way == "fails":
        at, number = rng.randint(1, max(1, command.changes)), rng.choice(FULL)
        wire = Wire(trial, at, failing(number))
        ended = run(command.arguments(trial), trial, tune=smaller, wire=wire)
        problem = _one_line(ended) or world.judge(command, trial)
        return Found(f"{os.strerror(number)} at change {at}", problem, ended.changes >= at)
    if way == "file size":
        most = int(10 ** rng.uniform(4.3, 5.3))  # its own log has room
        ended = run(command.arguments(trial), trial, tune=smaller, before=limited_files(most))
        problem = _one_line(ended) or world.judge(command, trial)
        return Found(f"files of at most {most} bytes", problem, ended.status != 0)
    size = int(10 ** rng.uniform(4, 6)) if way == "tmpfs" else 1 << 26
    mounted = _made(trial / "disk")
    inside = Command(command.name, command.flags, f"disk/{command.output}")
    with small_disk(mounted, size) as remount:
        if remount is None:
            return Found("no mount allowed here", None, False)
        if way == "read-only tmpfs":
            remount("ro")
        ended = run(inside.arguments(trial), trial, tune=smaller)
        problem = _one_line(ended) if way == "tmpfs" else ended.wrong((2,))
        remount("rw,size=1g")
        if problem is None:
            again = run(inside.arguments(trial), trial, tune=smaller)
            problem = again.wrong((0,))
        if problem is None:
            moved = {name.removeprefix("disk/"): x for name, x in contents_of_disk(trial).items()}
            problem = differ(command.expected, moved)
    return Found(f"{way} of {size} bytes", problem, ended.status != 0)


def contents_of_disk(trial: Path) -> dict[str, str]:
    """`contents` with the paths of a trial that has no disk of its own."""
    for path in (trial / "disk").rglob("*"):
        if path.is_file() and path.suffix in TEXTS:
            text = path.read_bytes()
            text = text.replace(f"{trial}/disk/".encode(), f"{trial}/".encode())
            path.write_bytes(text.replace(b"../../../toy", b"../../toy"))  # one folder deeper
    return contents(trial)


def _one_line(ended: Ended) -> str | None:
    return ended.wrong((0, 2))


def _sleep_while(running: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not running.poll():
        time.sleep(0.002)


TRIALS: dict[str, Callable[[World, Command, random.Random], Found]] = {
    "kill -9": killed,
    "signals": signalled,
    "two at once": two_at_once,
    "unread output": unread,
    "disks": disk,
}
