"""Nothing that happens to a command's output ends its run."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ipvrm.output.progress import STOPPING, Interrupt, _Lines, duration, say_at_once, signals_noted
from ipvrm.output.streams import Unbreakable

LATER = """
    import sys
    from ipvrm.output.streams import protect
    protect()
    for i in range(20_000):  # more than a pipe holds
        print("a line of output", i)
        print("a line of errors", i, file=sys.stderr)
    sys.stdout.flush()
    open({done!r}, "w").write("reached")
"""


def in_shell(line, folder):
    """Runs the line where modules of `folder` and of this checkout are found."""
    paths = os.pathsep.join([str(folder), os.getcwd()])
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        "{command} >&- 2>&-",
        "{command} 2>&- | head -1",
        "{command} 2>&1 | head -1",
        "{command} > /dev/full 2> /dev/full",
        "{command} 2>&1 | (exec <&-; sleep 0.1)",
    ],
)
def test_a_command_goes_on_without_its_output(tmp_path, shell):
    script, done = tmp_path / "later.py", tmp_path / "done"
    script.write_text(textwrap.dedent(LATER.format(done=str(done))))
    command = f"{{ {sys.executable} -m later; echo $? > {tmp_path / 'rc'}; }}"
    in_shell(shell.format(command=command), tmp_path)
    assert done.read_text() == "reached" and (tmp_path / "rc").read_text() == "0\n"


def test_without_it_the_same_command_ends(tmp_path):
    """The test above can fail."""
    script, done = tmp_path / "later.py", tmp_path / "done"
    script.write_text(textwrap.dedent(LATER.format(done=str(done))).replace("protect()\n", "\n"))
    in_shell(f"{sys.executable} -m later 2>&1 | head -1", tmp_path)
    assert not done.exists()


@pytest.mark.slow
def test_a_training_run_goes_on_without_its_output(tiny_folder, rollouts, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ipvrm", "train-rm", "--model", str(tiny_folder)]
    command += ["--train_data", str(rollouts), "--output_dir", str(folder), "--use_cpu", "--max_steps", "2"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=write, timeout=300)
    os.close(write)
    assert done.returncode == 0 and (folder / "results.json").exists()


def test_a_character_that_the_terminal_does_not_have_is_escaped(tmp_path):
    """And what comes after it is not lost."""
    code = "from ipvrm.output.streams import protect; protect(); print('é', '\\ud800'); print('after')"
    for encoding, said in (
        ("ascii", b"\\xe9 \\ud800\nafter\n"),
        ("utf-8", b"\xc3\xa9 \\ud800\nafter\n"),
        ("cp1251", b"\\xe9 \\ud800\nafter\n"),
    ):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_a_stream_that_is_closed_under_its_user(tmp_path):
    file = open(tmp_path / "log", "w")  # noqa: SIM115 (closed below)
    stream = Unbreakable(file)
    stream.write("before")
    file.close()
    assert stream.write("after") == 5
    stream.flush()
    assert (tmp_path / "log").read_text() == "before"


@pytest.mark.parametrize("number", STOPPING)
def test_each_signal_is_noted_once(number):
    before = signal.getsignal(number)
    with signals_noted(), Interrupt() as interrupt:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert interrupt.signal == number
        assert signal.getsignal(number) is before  # the second acts as usual
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted(), Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert interrupt.signal == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_handler_does_not_wait_for_a_reader():
    """A pipe that nobody reads is full; the text is lost."""
    code = """
        import os
        from ipvrm.output.progress import say_at_once
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b"x" * 65536)
        except BlockingIOError:
            os.set_blocking(2, True)
        say_at_once("stopping")
        print("came back")
    """
    read, write = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=write, timeout=60
    )
    os.close(read), os.close(write)
    assert done.stdout == b"came back\n"


def test_a_handler_says_so(capfd):
    say_at_once("stopping\n")
    assert capfd.readouterr().err == "stopping\n"


def test_lines_where_there_is_no_terminal(monkeypatch):
    """One every tenth, with rate and time left; and one after a minute without any."""
    clock, lines = [0.0], list[str]()
    monkeypatch.setattr("ipvrm.output.progress.time.monotonic", lambda: clock[0])
    shown = _Lines(lines.append, "label", 1000, 200)
    for done in range(201, 1001):
        clock[0] += 0.5
        shown.update(done, loss=0.5)
    assert len(lines) == 8 and lines[0] == "label 300/1,000  2/s, 6 min left  loss 0.5000"
    assert lines[-1] == "label 1,000/1,000  2/s  loss 0.5000"
    lines.clear()
    slow = _Lines(lines.append, "label", 1000, 0)
    for done in range(1, 9):
        clock[0] += 25.0
        slow.update(done)
    assert lines == ["label 3/1,000  0.04/s, 6 h 55 min left", "label 6/1,000  0.04/s, 6 h 54 min left"]


def test_durations():
    assert [duration(s) for s in (0, 99, 100, 3600, 3661, 86400)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 00 min",
        "1 h 01 min",
        "24 h 00 min",
    ]
