"""What every long command says where there is no terminal; and which library multiplied, on a resume too."""

import io
import json
import re
import sys
import time

import pytest
from runs import write_jsonl

from ipvrm.cli import COMMANDS, main
from ipvrm.output import progress as progress_module
from ipvrm.output.progress import Progress, never_silent
from ipvrm.run_folder import other_matmul
from ipvrm.training import train_rm

SHORT = ("env", "make-tiny-model", "report")  # seconds
ELSEWHERE = ("train-policy", "inspect", "demo", "demo fig6")  # their own tests
BELOW = ("reproduce", "bench")
SLOW = ("eval policy", "eval td")


@pytest.fixture
def commands(tiny_folder, rollouts, tmp_path):
    """By command: its arguments, and what its lines begin with."""
    prompts = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    labelled = [p | {"response": f"Answer: {n}", "label": n % 2} for n in range(4) for p in prompts[n:] * 2]
    items = [{"problem": f"{n}?", "steps": ["a", "b"], "label": n % 3 - 1, "id": n} for n in range(12)]
    data = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", found))
        for name, found in (("prompts", prompts), ("labelled", labelled), ("gsm8k", items))
    }
    folder, output = str(tmp_path / "out"), str(tmp_path / "out.jsonl")
    model = ["--model", str(tiny_folder), "--use_cpu"]
    endo = [*model, "--objective", "endo_rm"]
    short, verifier = ["--max_new_tokens", "4"], ["--verifier", "string", "--verifier_workers", "1"]
    of_td = ["--num_responses", "2", "--completions", "2", "--min_prob", "0.01", "--bootstrap_resamples", "9"]
    return {
        "train-rm": (
            [*model, "--train_data", str(rollouts), "--output_dir", folder, "--max_steps", "3"],
            ["reference", "train-rm"],
        ),
        "rollout": ([*model, *short, "--input", data["prompts"], "--output", output], ["responses"]),
        "label": (
            ["--input", data["labelled"], "--output", output, "--verifier", "string", "--num_workers", "1"],
            ["verify"],
        ),
        "score": ([*endo, "--input", data["gsm8k"], "--output", output], ["score"]),
        "eval processbench": (
            [*endo[:2], *endo[3:], "--data", data["gsm8k"], "--output_dir", folder],
            ["scoring gsm8k"],
        ),
        "eval bon": ([*endo, "--data", data["labelled"], "--output_dir", folder, "--n", "2"], ["score"]),
        "eval policy": (
            [*model, *short, *verifier, "--num_generations", "2", "--k", "1", "--data", data["prompts"]]
            + ["--output_dir", folder],
            ["responses", "verify"],
        ),
        "eval td": (
            ["--policy", str(tiny_folder), "--reward_model", str(tiny_folder), *endo[2:], *short, *verifier]
            + [*of_td, "--data", data["prompts"], "--output_dir", folder],
            ["prompts"],
        ),
    }


def marked(names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


TESTED = [name for name in COMMANDS if name not in (*SHORT, *ELSEWHERE, *BELOW)]


@pytest.mark.parametrize("command", marked(TESTED))
def test_lines_with_rate_and_time_left(commands, tmp_path, capsys, monkeypatch, command):
    """Each loop says how far it is, to its end; and between loops a silence that is too long ends."""
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.05)
    load = train_rm.load_tokenizer

    def slowly(*given, **named):
        time.sleep(0.25)
        return load(*given, **named)

    monkeypatch.setattr(train_rm, "load_tokenizer", slowly)  # however fast the machine is
    arguments, loops = commands[command]
    assert main([*command.split(), *arguments]) == 0
    said = capsys.readouterr().err
    for loop in loops:
        lines = re.findall(rf"^{loop} ([\d,]+)/([\d,]+)  (.*)$", said, re.MULTILINE)
        assert lines and lines[-1][0] == lines[-1][1], said
        assert re.match(r"[\d.e+-]+/s", lines[-1][2]), said
        unfinished = [words for done, total, words in lines if 0 < int(done) < int(total) and "/s" in words]
        assert all(re.match(r"[\d.e+-]+/s, \d+ (s|min|h \d+ min) left", words) for words in unfinished), said
    if command == "train-rm":  # others may have nothing to do for so long before their loop
        assert re.search(rf"^ipvrm {command}: \d+ s so far$", said, re.MULTILINE), said


@pytest.mark.slow
def test_one_long_step_is_not_silent(monkeypatch, capsys):
    """Nor is what is before and behind a loop; the innermost speaks, and nothing speaks when all is over."""
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.1)
    with never_silent("ipvrm label"):
        time.sleep(0.25)
        assert set(capsys.readouterr().err.splitlines()) == {"ipvrm label: 0 s so far"}
        with Progress().bar("verify", 100, 20) as update:
            time.sleep(0.25)
            assert set(capsys.readouterr().err.splitlines()) == {"verify 20/100  0 s so far"}
            update(21, loss=0.5)
            time.sleep(0.25)
            lines = capsys.readouterr().err.splitlines()
            assert lines and all(re.fullmatch(r"verify 21/100  .*/s, .* left  loss 0.5000", x) for x in lines)
        time.sleep(0.25)
        assert "ipvrm label: 1 s so far" in capsys.readouterr().err.splitlines()
    time.sleep(0.25)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "eval bon", "eval processbench"])
def test_a_short_file_has_a_line_every_tenth(commands, capsys, command):
    arguments, (loop,) = commands[command]
    assert main([*command.split(), *arguments]) == 0
    said = capsys.readouterr().err
    lines = re.findall(rf"^{loop} ([\d,]+)/([\d,]+)  ", said, re.MULTILINE)
    tenths = {int(done) * 10 // int(total) for done, total in lines}
    assert tenths == set(range(1, 11)), said


def test_the_units_of_reproduce_say_how_far_they_are(commands, tmp_path, capsys, monkeypatch):
    """Of a plan of one unit the unit's own lines are seen, not its name alone."""
    from ipvrm.reproduce.tables.plan import Unit

    unit = Unit("rows", "label", {"input": str(tmp_path / "labelled.jsonl"), "verifier": "string"})
    monkeypatch.setattr("ipvrm.reproduce.tables.run.needed", lambda *_: [unit])
    monkeypatch.setattr("ipvrm.reproduce.tables.run.write_table_of", lambda *_: {})
    assert main(["reproduce", "table1", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^1/1 rows: label \.\.\.$", said, re.MULTILINE), said
    assert re.search(r"^verify 20/20  [\d.e+-]+/s", said, re.MULTILINE), said


def test_a_disabled_bar_mutes_nobody(monkeypatch, capsys):
    """A quiet function inside a command: the command goes on saying that it runs."""
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.02)
    with never_silent("ipvrm x"), Progress(enabled=False).bar("y", 3) as update:
        time.sleep(0.2)
        update(3, loss=0.5)
        assert set(capsys.readouterr().err.splitlines()) == {"ipvrm x: 0 s so far"}


def test_an_exception_ends_the_thread(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.02)
    with pytest.raises(KeyboardInterrupt), never_silent("ipvrm x"), Progress().bar("y", 3):
        raise KeyboardInterrupt
    capsys.readouterr()
    time.sleep(0.1)
    assert not capsys.readouterr().err and not progress_module._Lines.entered


def test_a_quiet_run_and_a_terminal_say_nothing_of_it(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.02)
    with Progress(enabled=False).bar("x", 10) as update:
        time.sleep(0.1)
        update(10)
    assert not capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with never_silent("ipvrm x"):
        time.sleep(0.1)
    assert "so far" not in sys.stderr.getvalue()


def test_benchmarks_say_how_many_are_done(capsys):
    from benchmarks.suite.terminal import Screen

    machine = {"processor": "p", "torch": "2", "threads": 1, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.suite.terminal.conditions", lambda machine: "here")
        with Screen(machine, ["a", "b"], "quick") as screen:
            screen.finished("a")
            screen.finished("b")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["benchmarks 1/2", "benchmarks 2/2"]
    assert "/s, " in lines[0] and lines[0].endswith("left")


# ---------------------------------------------------------------------------------------- the CPU's matmuls


MANIFESTS = {
    "rollout": "out.jsonl.summary.json",
    "label": "out.jsonl.summary.json",
    "score": "out.jsonl.summary.json",
    "train-rm": "out/manifest.json",
}


@pytest.mark.parametrize("command", marked(TESTED))
def test_every_manifest_says_what_multiplied(commands, tmp_path, monkeypatch, command):
    monkeypatch.setattr("ipvrm_kernels.describe_cpu_matmul", lambda: "FAKE: it is there")
    assert main([*command.split(), *commands[command][0]]) == 0
    stored = json.loads((tmp_path / MANIFESTS.get(command, "out/results.json")).read_text())
    assert stored.get("manifest", stored)["cpu_matmul"] == "FAKE: it is there"


@pytest.mark.parametrize("command", marked(["rollout", "score", "eval processbench", "eval bon", "eval td"]))
def test_a_resume_by_another_matmul_library_says_so(commands, capsys, monkeypatch, command):
    """Interrupted when the results are written; without a change the same resume says nothing of it."""
    arguments = [*command.split(), *commands[command][0]]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    name = {
        "rollout": "ipvrm.rollouts.rollout.write_table",
        "score": "ipvrm.evaluate.score.publish",
        "eval processbench": "ipvrm.evaluate.processbench.summarise",
        "eval bon": "ipvrm.evaluate.bon.summarise",
        "eval td": "ipvrm.reproduce.td_study.analyse",
    }[command]
    for now, told in (("one: A", False), ("one: A", False), ("two: B", True)):
        with monkeypatch.context() as patch:
            patch.setattr("ipvrm_kernels.describe_cpu_matmul", lambda now=now: now)
            patch.setattr(name, interrupted)
            assert main(arguments) == 130
        said = " ".join(capsys.readouterr().err.split())
        assert ("were by one; from here on they are by two: B. The numbers go on with" in said) == told


def test_what_is_not_known_is_not_said(monkeypatch):
    monkeypatch.setattr("ipvrm_kernels.describe_cpu_matmul", lambda: "one: now")
    assert other_matmul(None, "x") is None and other_matmul("one: then", "x") is None
    assert (other_matmul("two: then", "x") or "").startswith("the CPU matmuls of x were by two; from here on")
