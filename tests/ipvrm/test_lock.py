"""One run at a time per output, whoever dies and wherever the file lies."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.models.tiny_model import TinyModelConfig, make_tiny_model
from ipvrm.output.locks import check_writable, lock_path, locked
from ipvrm.run_folder import remove_leftovers, replacing

HOLD = """import sys, time
from ipvrm.output.locks import locked
with locked(sys.argv[1], folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def hold():
    """A function that starts a process which holds an output."""
    running = []

    def start(output, kind):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(output), kind], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_second_run_is_told_who_holds_it(tmp_path, hold, kind):
    output = tmp_path / "new" / "out"
    process = hold(output, kind)
    held = rf"another run writes there \(pid {process.pid} on \S+, started 20"
    with pytest.raises(IpvrmError, match=held), locked(output, folder=kind == "folder"):
        pass
    with locked(tmp_path / "new" / "other", folder=kind == "folder"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = lock_path(output, folder=kind == "folder")
    assert path.exists()  # left by the kill, and nobody's
    with locked(output, folder=kind == "folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_of_many_at_once_one_wins_at_a_time(tmp_path):
    """Eight processes add 1 to a number under the lock, retrying until they have it: none is lost."""
    script = """import sys, time
from pathlib import Path
from ipvrm.errors import IpvrmError
from ipvrm.output.locks import locked
number = Path(sys.argv[1])
for _ in range(10):
    while True:
        try:
            with locked(number):
                value = int(number.read_text())
                time.sleep(0.002)
                number.write_text(str(value + 1))
            break
        except IpvrmError as error:
            assert "another run writes there" in str(error), error
            time.sleep(0.001)
"""
    number = tmp_path / "number"
    number.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", script, str(number)]) for _ in range(8)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 8
    assert number.read_text() == "80"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_one_warning_and_on(tmp_path, monkeypatch, code):
    def refuses(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.warns(UserWarning, match="its file system has no locks") as caught, locked(tmp_path / "o"):
        done = True
    assert done and len(caught) == 1


def test_ranks_behind_the_first_take_no_lock(tmp_path, monkeypatch, hold):
    hold(tmp_path / "o", "file")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "o"):
        pass


def test_a_folder_s_run_leaves_what_another_command_is_writing_in_it(tmp_path):
    """`inspect --output FOLDER/page.html` beside a run that clears its folder."""
    (tmp_path / ".old.html.7.tmp").touch()
    with locked(tmp_path / "page.html"), replacing(tmp_path / "page.html") as temporary:
        temporary.write_text("half")
        remove_leftovers(tmp_path)
        assert temporary.read_text() == "half" and not (tmp_path / ".old.html.7.tmp").exists()
        temporary.write_text("whole")
    assert (tmp_path / "page.html").read_text() == "whole"


@pytest.mark.parametrize(
    "output, left",
    [
        ("o.jsonl", ".o.jsonl.summary.json.{pid}.tmp"),
        ("o.jsonl", "..o.jsonl.partial.{pid}.removed.tmp"),
        ("tiny.model", ".tiny.{pid}.tmp"),  # the folder `tiny` of make-tiny-model
        ("page.html", ".page.json.{pid}.tmp"),  # of `inspect --json`
    ],
)
def test_a_folder_s_run_leaves_what_belongs_to_another_output(tmp_path, output, left):
    temporary, killed = tmp_path / left.format(pid=7), tmp_path / ".other.json.7.tmp"
    with locked(tmp_path / output):
        for path in (temporary, killed):
            path.touch()
        remove_leftovers(tmp_path)
        assert temporary.exists() and not killed.exists()
    remove_leftovers(tmp_path)
    assert not temporary.exists()


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for output, folder, reason in (
        (tmp_path / "file", True, "is a file; name a folder"),
        (tmp_path, False, "is a folder; name a file"),
        (tmp_path / "file" / "x", False, "cannot be written: (Not a directory|File exists)"),
        (tmp_path / "file" / "x" / "y", True, "cannot be written: (Not a directory|File exists)"),
        (tmp_path / ("x" * 300), True, "cannot be written: File name too long"),
    ):
        with pytest.raises(IpvrmError, match=reason):
            check_writable(output, folder=folder)


HELD = {
    "label": "file", "score": "file", "rollout": "file", "inspect": "o.html", "report": "o.html",
    "eval processbench": "folder", "eval bon": "folder", "eval policy": "folder", "eval td": "folder",
    "demo": "folder", "demo fig6": "folder", "reproduce": "folder", "train-policy": "folder",
    "bench": "file",
}  # fmt: skip


@pytest.mark.parametrize("command", HELD)
def test_commands_refuse_an_output_that_is_held(tmp_path, tiny_folder, hold, capsys, command):
    source, output = tmp_path / "in.jsonl", tmp_path / "o.jsonl"
    row = {"prompt": "a", "response": "Answer: 1", "answer": "1", "problem": "a", "steps": ["b"], "label": 0}
    source.write_text(json.dumps(row) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')  # a run, for report
    held = HELD[command]
    if held in ("file", "folder"):
        hold(output, held)
    else:  # of several files that it writes
        hold(tmp_path / held, "file")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = ["--model", str(tiny_folder)]
    flags = {
        "label": ["--input", source, "--output", output, "--verifier", "string"],
        "score": [*model, "--input", source, "--output", output],
        "rollout": [*model, "--input", source, "--output", output, "--use_cpu"],
        "inspect": [*model, "--input", source, "--output", tmp_path / "o.html"],
        "report": [tmp_path, "--output", tmp_path / "o"],
        "eval processbench": [*model, "--data", source, "--output_dir", output],
        "eval bon": [*model, "--data", source, "--output_dir", output],
        "eval policy": [*model, "--data", source, "--output_dir", output],
        "eval td": ["--policy", tiny_folder, "--reward_model", tiny_folder, "--data", source]
        + ["--output_dir", output],
        "demo": ["--output_dir", output],
        "demo fig6": ["--demo", tmp_path / "demo", "--output_dir", output],
        "reproduce": ["table1", "--output_dir", output],
        "bench": ["--op", "segment_scan", "--quick", "--device", "cpu", "--json", output],
        "train-policy": [*model, "--train_data", source, "--algorithm", "grpo", "--output_dir", output]
        + ["--use_cpu", "--verifier", "string"],
    }[command]
    assert main([*command.split(), *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert "another run writes there (pid " in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_runs_at_once_end_as_one_whole_and_one_refused(tmp_path):
    """The same command twice at the same time: one succeeds with all rows, the other says why it does not."""
    source, output = tmp_path / "in.jsonl", tmp_path / "o.jsonl"
    rows = [{"prompt": "a", "response": f"Answer: {n}", "answer": str(n)} for n in range(2000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "ipvrm", "label", "--input", str(source), "--output", str(output)]
    command += ["--verifier", "waiting_verifier:judge", "--num_workers", "1", "--timeout_seconds", "300"]
    (tmp_path / "waiting_verifier.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def judge(response, answer):\n"
        f"    while not Path({str(tmp_path / 'go')!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return response.endswith(answer)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not lock_path(output).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    (tmp_path / "go").touch()  # the first is held up until the second has ended
    error = first.communicate(timeout=200)[1]
    assert (first.returncode, second.returncode) == (0, 2), error + second.stderr
    assert f"(pid {first.pid} on" in second.stderr
    assert len(output.read_text().splitlines()) == 2000


def test_a_model_is_made_by_one_run_and_nothing_is_left(tmp_path, rollouts, hold):
    left = tmp_path / ".tiny.7.tmp"
    left.mkdir()
    config = TinyModelConfig(str(tmp_path / "tiny"), (str(rollouts),), vocab_size=300, hidden_size=32)
    process = hold(tmp_path / "tiny.model", "file")
    with pytest.raises(IpvrmError, match=rf"another run writes there \(pid {process.pid} on "):
        make_tiny_model(config)
    process.kill()
    process.wait()
    make_tiny_model(config)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
