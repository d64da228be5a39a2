"""The instrument that tries faults: it does what it says, and it notices what is lost."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

from benchmarks.faults import files, ops, runs, sanitized  # noqa: E402
from benchmarks.faults.__main__ import KINDS, LEFT_OUT, RESUMED, Faults, page  # noqa: E402
from benchmarks.faults.process import Ended  # noqa: E402
from ipvrm.cli import COMMANDS  # noqa: E402

WIRED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.append({root!r})
from benchmarks.faults.process import Wire, die, failing

folder = Path(sys.argv[1])
wire = Wire(folder, int(sys.argv[2]), {{"die": die, "fail": failing(28)}}[sys.argv[3]])
sys.addaudithook(wire)
(folder / "a").write_text("1")
os.replace(folder / "a", folder / "b")
(folder / "b").read_text()
open(os.devnull, "w").close()
(folder / "c").mkdir()
(folder / "c" / "d").touch()
shutil.rmtree(folder / "c")
print(wire.count)
"""


def wired(folder, at, act):
    code = WIRED.format(root=str(ROOT))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(at), act], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_wire_counts_changes_and_acts_before_one(tmp_path):
    found = {}
    for at in (1, 2, 3, 99):
        (tmp_path / str(at)).mkdir()
        done = wired(tmp_path / str(at), at, "die")
        found[at] = (done.returncode, sorted(path.name for path in (tmp_path / str(at)).iterdir()))
    assert found[1] == (-signal.SIGKILL, []) and found[2] == (-signal.SIGKILL, ["a"])
    assert found[3] == (-signal.SIGKILL, ["b"]) and found[99] == (0, ["b"])
    assert done.stdout == "6\n"  # written, renamed, a folder, a file, both removed
    (tmp_path / "full").mkdir()
    done = wired(tmp_path / "full", 2, "fail")
    assert done.returncode == 1 and "No space left on device" in done.stderr


def test_ends_that_no_command_may_have():
    line = "ipvrm label: x: cannot be read; download it again"
    assert Ended(0, "", 0).wrong((0, 2)) is None and Ended(2, line, 0).wrong((0, 2)) is None
    for ended, words in (
        (Ended(None, line, 0), "hung"),
        (Ended(2, f"Traceback (most recent call last):\n{line}", 0), "a traceback"),
        (Ended(-signal.SIGSEGV, "", 0), "ended with -11"),
        (Ended(1, line, 0), "ended with 1"),
        (Ended(2, "no such thing", 0), "2 without a line of its own"),
    ):
        assert ended.wrong((0, 2)).startswith(words)


def test_what_is_lost_is_seen(tmp_path):
    (tmp_path / "out.jsonl").write_text(json.dumps({"path": str(tmp_path), "seconds": 1.0, "n": 1}) + "\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = runs.contents(tmp_path)
    (tmp_path / "out.jsonl").write_text(json.dumps({"path": str(tmp_path), "seconds": 9.0, "n": 1}) + "\n")
    assert runs.differ(before, runs.contents(tmp_path)) is None
    for name, text, words in (
        ("out.jsonl", json.dumps({"path": str(tmp_path), "n": 2}), "other: out.jsonl"),
        ("model.safetensors", "Weights", "other: model.safetensors"),
        (".out.jsonl.7.tmp", "", "left over: .out.jsonl.7.tmp"),
    ):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(text)
        assert runs.differ(before, runs.contents(tmp_path)) == words
        (tmp_path / name).write_bytes(kept) if kept is not None else (tmp_path / name).unlink()
    (tmp_path / "out.jsonl").unlink()
    assert runs.differ(before, runs.contents(tmp_path)) == "missing: out.jsonl"


@pytest.mark.slow
def test_damage_is_damage_and_repeats(tmp_path):
    path, data = tmp_path / "x", bytes(range(1, 256)) * 20
    said, same = [], 0
    for _ in (0, 1):
        for seed in range(60):
            path.write_bytes(data)
            said.append(
                (files.damage(path, random.Random(seed)), path.read_bytes() if path.exists() else b"")
            )
            same += said[-1][1] == data
    assert said[:60] == said[60:] and same == 0


def test_every_command_is_tried_or_said_to_be_left_out():
    tried = {command.name for command in runs.commands_of(Path("toy"))}
    assert tried | set(LEFT_OUT) == set(COMMANDS) and not tried & set(LEFT_OUT)
    readers = tried - set(files.WITHOUT_FILES)
    assert set(files.DATA) == readers - {"report"}  # it reads runs and no data
    assert set(files.MODELS) | {"label", "make-tiny-model", "report"} == readers
    assert set(RESUMED) | {"make-tiny-model", "inspect", "report"} == readers


class OneCommand:
    """A world whose command ends as `status` says, and of which nothing is lost."""

    def __init__(self, status):
        self.command = runs.Command("report", [], "page.html", changes=1)
        self.commands, self.ended = {"report": self.command}, Ended(status, "", 0)

    def trial(self, command):
        return Path()

    def judge(self, command, trial):
        return None

    def clear(self):
        pass


@pytest.mark.parametrize(
    "resumed, lost",
    [
        ('{"step": 2}\n', None),
        (None, "metrics.jsonl holds what is no record"),
        ("", "metrics.jsonl is empty"),
        ("Traceback (most recent call last)", "a traceback"),
    ],
)
def test_a_damaged_log_is_tried(monkeypatch, tmp_path, resumed, lost):
    """It is among what is damaged; the run that goes on drops the bad lines, and does not end by them."""
    world, log, ends = OneCommand(0), tmp_path / "run" / "metrics.jsonl", []
    world.command.expected = {"run/metrics.jsonl": "of a run that nothing has happened to"}

    def run(*_, **__):
        if not ends:  # killed
            log.parent.mkdir()
            log.write_text('{"step": 1}\n')
        elif resumed is not None and resumed[:1] != "T":
            log.write_text(resumed)
        said = resumed if ends and resumed is not None else ""
        ends.append(Ended(1 if said[:1] == "T" else 0 if ends else -signal.SIGKILL, said, 1))
        return ends[-1]

    monkeypatch.setattr(world, "trial", lambda command: tmp_path)
    monkeypatch.setattr(files, "run", run)
    monkeypatch.setattr(
        files, "damage", lambda path, rng: path.write_bytes(b'{"step": 1, "\xff"}\n') and "bad"
    )
    found = files.damaged_state(world, world.command, random.Random(0))
    assert (found.lost or "").startswith(lost or "") and (found.lost is None) == (lost is None)
    assert found.said == "run/metrics.jsonl: bad" and len(ends) == 2


@pytest.mark.parametrize("status, tried", [(0, False), (-signal.SIGKILL, True)])
def test_what_had_nothing_to_do_is_no_trial(monkeypatch, tmp_path, status, tried):
    """A command that had ended before it could be killed, and one that was killed."""
    world = OneCommand(status)
    monkeypatch.setattr(runs, "World", lambda *_: world)
    monkeypatch.setattr(runs, "run", lambda *_, **__: world.ended)
    faults = Faults(tmp_path, 0, ["kill -9"], [])
    monkeypatch.setattr(random.Random, "random", lambda self: 0.0)  # at a change, and not by the clock
    faults.trial("kill -9")
    report = faults.report() | {"mounts": False}
    assert (report["trials"], report["nothing_to_do"], report["lost"]) == ((1, 0, 0) if tried else (0, 1, 0))
    assert report["kinds"]["kill -9"]["of"] == ({"report": 1} if tried else {})
    assert f"| kill -9 | {int(tried)} | 0 | {int(not tried)} |" in page(report)


@pytest.mark.parametrize(
    "logged, status, said, results, lost",
    [
        (True, -signal.SIGTERM, "", False, "ended with -15 and has not saved what it had done"),
        (True, 143, "", False, "ended with 143 and has not saved what it had done"),
        (
            True,
            128 + signal.SIGTERM,
            "stopped after update 1 of 4",
            False,
            "stopped after 1 with 2 steps done",
        ),
        (True, 128 + signal.SIGTERM, "stopped after update 2 of 4", False, None),
        (True, -signal.SIGTERM, "", True, None),  # its work was done
        (True, 0, "", False, None),
        (False, -signal.SIGTERM, "", False, None),
    ],
)
def test_a_trainer_that_a_signal_kills_is_noticed(monkeypatch, tmp_path, logged, status, said, results, lost):
    world, folder = OneCommand(0), tmp_path / "rm"
    world.command = runs.Command("train-rm", [], "rm", trains=True)
    (folder / "checkpoint-2").mkdir(parents=True)
    if results:
        (folder / "results.json").touch()

    class Running:
        def poll(self):
            return False

        def send(self, number):
            return True

        def wait(self):
            return Ended(status, said, 3)

    def start(*_, **__):
        if logged:
            (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        return Running()

    class Chosen(random.Random):
        def choice(self, values):
            return signal.SIGTERM

        def random(self):
            return 0.2 if logged else 0.9  # not ignored; after the first step, or by the clock

    monkeypatch.setattr(world, "trial", lambda command: tmp_path)
    monkeypatch.setattr(runs, "start", start)
    assert runs.signalled(world, world.command, Chosen(0)).lost == lost


def test_a_disk_that_cannot_be_mounted_is_not_tried(monkeypatch, tmp_path):
    @contextmanager
    def none(*_):
        yield None

    class Tmpfs(random.Random):
        def choice(self, values):
            return "tmpfs"

    world = OneCommand(0)
    monkeypatch.setattr(world, "trial", lambda command: tmp_path)
    monkeypatch.setattr(runs, "small_disk", none)
    assert runs.disk(world, world.command, Tmpfs(0)) == ("no mount allowed here", None, False)


@pytest.mark.slow
def test_random_calls_return_or_raise():
    """The same ones that the sanitizers see."""
    done = {"returned": 0, "refused": 0}
    for number in range(150):
        op, given, impl = ops.random_call(random.Random(f"0 {number}"))
        try:
            ops.raw_call(op, given, impl)
            done["returned"] += 1
        except ops.REFUSALS:
            done["refused"] += 1
    assert done["returned"] > 30 and done["refused"] > 30


def test_the_committed_page_is_that_of_its_counts():
    folder = ROOT / "benchmarks" / "results" / "faults"
    if not folder.is_dir():
        pytest.skip("no report is committed yet")
    report = json.loads((folder / "faults.json").read_text())
    assert (folder / "README.md").read_text() == page(report)
    assert report["lost"] == 0 == sum(counts["lost"] for counts in report["kinds"].values())
    assert set(report["kinds"]) == set(KINDS) and not report["machine"]["modified"]


PLANTED = """
import os, sys
sys.path.insert(0, {root!r})
import runpy
from contextlib import contextmanager
from pathlib import Path
import ipvrm.run_folder as run_folder

@contextmanager
def in_place(path):
    yield Path(path)

def trusting(path, entries, note):
    return run_folder.read_json(path) if path.exists() else None

planted = sys.argv.pop(1)
if planted == "in place":  # files are written under their own names, and no half of one is made again
    run_folder.replacing, run_folder.read_part = in_place, trusting
if planted == "no handler":  # a signal ends a trainer at once
    import ipvrm.output.progress
    ipvrm.output.progress.STOPPING.clear()
runpy.run_module("benchmarks.faults", run_name="__main__", alter_sys=True)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "fault, kinds, command",
    [("in place", ("kill -9", "disks"), "rollout"), ("no handler", ("signals",), "train-rm")],
)
@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_fault_is_noticed(tmp_path, planted, fault, kinds, command):
    arguments = ["--trials", "12", "--seed", "5", "--only", *kinds, "--commands", command]
    code = [sys.executable, "-c", PLANTED.format(root=str(ROOT)), fault if planted else "as it is"]
    done = subprocess.run(
        [*code, *arguments, "--results", str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    report = json.loads((tmp_path / "faults.json").read_text())
    assert report["trials"] + report["nothing_to_do"] == 12 * len(kinds)
    assert (done.returncode, report["lost"] > 0) == ((1, True) if planted else (0, False)), done.stdout


@pytest.mark.full
@pytest.mark.skipif(sanitized.why_not() is not None, reason="no sanitizers")
def test_the_sanitizers_see_a_read_out_of_bounds(tmp_path):
    sanitized.build(tmp_path)
    code = (
        "import torch, ipvrm_kernels\nfrom ipvrm_kernels import backend\n"
        "x, y = torch.ones(6), torch.empty(6)\ncu = torch.tensor([0, 6000], dtype=torch.int32)\n"
        "backend.native_call('segment_scan_cpu', x, cu, y, 1, 6000, 1.0, False)\n"
    )
    done = sanitized.run(tmp_path, ["-c", code], capture_output=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
