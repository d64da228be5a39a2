"""Verifiers and their processes: answers, hard deadlines, deaths; and what `ipvrm label` makes of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.cli import main, parse
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import read_rows
from ipvrm.rollouts import verify
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.verify import (
    Verdict,
    VerifierPool,
    final_answer,
    load_verifier,
    verify_math,
    verify_string,
)
from ipvrm.run_folder import summary_path

DEADLINE = 0.5
RUDE = '''
import ctypes, os, subprocess, sys, threading, time

def judge(response, answer):
    """Does what the response says."""
    word, _, rest = response.partition(" ")
    if word == "hang":
        time.sleep(1000)
    if word == "hang-in-c":  # holds the GIL: no Python signal handler and no thread of this process can run
        ctypes.PyDLL(None).sleep(1000)
    if word == "child":  # leaves a grandchild that holds the output pipe open and whose id it writes down
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], close_fds=False)
        open(rest, "w").write(f"{os.getpid()} {process.pid}")
        time.sleep(1000)
    if word == "exit":
        os._exit(3)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "raise":
        raise RuntimeError("no " + "x" * 1000)
    if word == "sys-exit":
        sys.exit(0)
    if word == "print":
        print("{}", flush=True)
        os.write(1, b"not a verdict\\n")
        print("noise", file=sys.stderr)
        word = "right" if sys.stdin.read() == "" else "wrong"
    if word == "half":
        return 0.5
    return {"right": True, "wrong": False, "one": 1, "none": None}[word]

def orphan(response, answer):
    open(response, "w").write(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)

NOT_A_FUNCTION = 3
'''


@pytest.fixture
def rude(tmp_path, monkeypatch):
    """Name of a verifier that misbehaves on request."""
    (tmp_path / "rude_verifier.py").write_text(RUDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "rude_verifier:judge"


def outcomes(pool, responses):
    return [verdict.outcome for verdict in pool.judge([(response, "1") for response in responses])]


def alive(process_id):
    try:
        return "Z" not in Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- verifiers


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{3}.", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a_{1}}", "a_{1}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{1}, no, \boxed{2}. Answer: 3", "2"),
        (r"The answer is $\boxed{4}$, so Answer: \boxed{5}.", "5"),
        ("x\n#### 1,000\nmore", "1,000"),
        ("**Answer: 127**.", "127"),
        ("The answer is 7, no, the answer is 8", "8"),
        ("Answer: 3\n### Final Answer:\n\nthat was it", "3"),
        ("**Answer: $5$.**", "5"),
        ("Answer: $ m = 2021 $", "m = 2021"),
        ("The answer is 7.\nAnswer: 8\n", "8"),
        ("Final answer is: 3.5", "3.5"),
        ("I answer nothing", None),
        ("Answer: 3\n\\boxed{}", "3"),
        (r"\boxed{}", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_string_verifier():
    assert verify_string(r"\boxed{ 12 }", "12") == Verdict("right", "12")
    assert verify_string("Answer: 0.5", "1/2") == Verdict("wrong", "0.5")
    assert verify_string("12", "12") == Verdict("no_answer")
    assert [Verdict(outcome).label for outcome in verify.OUTCOMES] == [1, 0, 0, None, None, None, None]


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        (r"Thus \boxed{0.5}.", r"\frac{1}{2}", "right"),
        (r"Answer: $m = 2021$", "2021", "right"),
        (r"It is $(x+1)^2$", "x^2+2x+1", "right"),
        (r"\boxed{[-2, 7]}", "[-2,7]", "right"),
        (r"\boxed{3}", "4", "wrong"),
        ("I do not know", "4", "no_answer"),
        (r"\boxed{-1.5}", "-3./2", "right"),  # in a box math-verify cannot read it; between dollars it is -3
        (r"\boxed{-3}", "-3./2", "wrong"),
        (r"\boxed{t(0,4]}", "$t(0,4]$", "unreadable_ground_truth"),
    ],
)
def test_math_verifier(response, answer, outcome):
    assert verify_math(response, answer).outcome == outcome


def test_the_leniencies_of_math_that_label_s_help_names(capsys):
    with pytest.raises(SystemExit):
        parse(LabelConfig, ["--help"], prog="label")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    named = re.search(r"as lenient as its library: (.*?) count as 9, a box of `(.*?)` as `(.*?)`\.", said)
    cases = [(f"Answer: {answer.strip('`')}", "9") for answer in re.split(", | and ", named[1])]
    cases.append((f"\\boxed{{{named[2]}}}", named[3]))
    assert len(cases) == 4
    for answer, truth in cases:
        assert verify_math(answer, truth).outcome == "right", answer
        assert verify_math(answer, "8").outcome == "wrong", answer


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sympy", "must be 'math', 'string' or 'module:function'; got 'sympy'"),
        ("module:", "must be 'math', 'string' or 'module:function'"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("rude_verifier:absent", "AttributeError: module 'rude_verifier' has no attribute 'absent'"),
        ("rude_verifier:NOT_A_FUNCTION", "is no function; it is a int"),
    ],
)
def test_verifiers_that_are_none(rude, name, reason):
    with pytest.raises(IpvrmError, match=reason):
        load_verifier(name)


def test_bad_pool_settings():
    with pytest.raises(IpvrmError, match="num_workers must be at least 1; got 0"):
        VerifierPool("string", 0)
    with pytest.raises(IpvrmError, match="timeout_seconds must lie between 0 and a million; got 0"):
        VerifierPool("string", 1, 0)


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_hangs_deaths_and_exceptions_are_verdicts_of_their_own(rude):
    """In order, beside good answers that are not lost, within the time that the deadlines allow."""
    responses = ["right", "hang", "exit", "wrong", "segfault", "raise", "none", "hang-in-c", "print", "one"]
    responses += ["sys-exit", "half", "right"]
    started = time.monotonic()
    with VerifierPool(rude, 2, DEADLINE) as pool:
        verdicts = pool.judge([(response, "1") for response in responses])
    assert time.monotonic() - started < 60  # in turn the hangs alone would take half an hour
    found = dict(zip(responses, verdicts, strict=True))
    assert {name: verdict.outcome for name, verdict in found.items()} == {
        "right": "right",
        "hang": "timeout",
        "exit": "crash",
        "wrong": "wrong",
        "segfault": "crash",
        "raise": "error",
        "none": "no_answer",
        "hang-in-c": "timeout",
        "print": "right",
        "one": "right",
        "sys-exit": "error",
        "half": "error",
    }
    assert verdicts[0] == verdicts[-1] == Verdict("right")
    assert found["hang"].detail == "no answer in 0.5 s"
    assert found["exit"].detail == "the verifier's process died: exit status 3"
    assert found["segfault"].detail == f"the verifier's process died: signal {signal.SIGSEGV.value}"
    assert found["raise"].detail.startswith("RuntimeError: no xxx") and len(found["raise"].detail) == 300
    assert found["half"].detail == (
        "ValueError: rude_verifier:judge must return True, False or None; it returned 0.5"
    )


@pytest.mark.slow
def test_a_verifier_that_always_hangs_costs_its_deadlines(rude):
    started = time.monotonic()
    with VerifierPool(rude, 2, 0.2) as pool:
        assert outcomes(pool, ["hang"] * 4) == ["timeout"] * 4
        assert outcomes(pool, ["right"]) == ["right"]  # it can be used again
        processes = [worker.process.pid for worker in pool._workers]
    assert time.monotonic() - started < 60
    assert not any(map(alive, processes))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_verifier_started_dies_with_it(rude, tmp_path):
    with VerifierPool(rude, 1, DEADLINE) as pool:
        assert outcomes(pool, [f"child {tmp_path / 'ids'}", "right"]) == ["timeout", "right"]
        time.sleep(0.05)
        assert not any(map(alive, (tmp_path / "ids").read_text().split()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_killed_parent(rude, tmp_path):
    """Even one that hangs in native code: its own watchdog ends it."""
    code = (
        "import sys; from ipvrm.rollouts import verify; verify.ORPHAN_SECONDS = 0.5\n"
        "verify.VerifierPool('rude_verifier:orphan', 1, 1.0).judge([(sys.argv[1], '')])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    note = tmp_path / "id"
    parent = subprocess.Popen([sys.executable, "-c", code, str(note)], env=environment)
    wait_until(lambda: note.exists() and note.read_text())
    parent.kill()
    parent.wait()
    worker = int(note.read_text())
    assert alive(worker)
    wait_until(lambda: not alive(worker))


def test_a_verifier_in_the_working_directory(tmp_path, monkeypatch):
    """It is found; what happens to be called like a library there is not taken for it."""
    (tmp_path / "my_verifier.py").write_text("def same(response, answer):\n    return response == answer\n")
    for name in ("faulthandler.py", "ipvrm.py", "re.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with VerifierPool("my_verifier:same", 1) as pool:
        assert outcomes(pool, ["1", "2"]) == ["right", "wrong"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os; os._exit(5)", r"its worker process did not start \(exit status 5\)"),
        ("f = 3", "is no function; it is a int"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch, module, reason):
    (tmp_path / "broken_verifier.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with VerifierPool("broken_verifier:f", 1) as pool, pytest.raises(IpvrmError, match=reason):
        pool.judge([("a", "b")])


def test_a_verifier_that_never_starts_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "slow_verifier.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(verify, "START_SECONDS", 0.5)
    with VerifierPool("slow_verifier:f", 1) as pool, pytest.raises(IpvrmError, match="not within 0.5 s"):
        pool.judge([("a", "b")])


def test_an_interrupted_round_leaves_no_worker_and_no_answer(rude):
    pool = VerifierPool(rude, 2, DEADLINE)

    def interrupt(done):
        if done:  # two workers may answer at once: then 1 is never seen
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.judge([("right", "1")] * 10, interrupt)
    assert not pool._workers
    assert outcomes(pool, ["wrong", "right"]) == ["wrong", "right"]
    pool.close()


@pytest.mark.slow
def test_many_answers_come_back_in_order():
    pairs = [(f"Answer: {k}", str(k if k % 3 else -k - 1)) for k in range(3000)]
    done = []
    with VerifierPool("string", 3) as pool:
        assert pool.judge([]) == [] and not pool._workers
        found = pool.judge(pairs, done.append)
        assert found == [Verdict("right" if k % 3 else "wrong", str(k)) for k in range(3000)]
        assert len(pool._workers) == 3
    assert done[-1] == 3000 and done == sorted(done)


def test_texts_of_any_kind_and_length_reach_the_verifier():
    texts = ["\u2028 \x00 \n \ud800 é", "x" * 300_000, ""]
    with VerifierPool("string", 1) as pool:
        found = pool.judge([(f"{text}\nAnswer: {k}", str(k)) for k, text in enumerate(texts)])
    assert [verdict.outcome for verdict in found] == ["right"] * 3


# --------------------------------------------------------------------------------------------------- command


def row(response, prompt="p", answer="1", **more):
    return {"prompt": prompt, "response": response, "answer": answer, **more}


def test_every_row_is_labelled_or_counted(rude, tmp_path, tokenizer):
    rows = [
        row("right", sample=0, data_source="s"),
        row("wrong", sample=1, data_source="s"),
        row("right", "q"),
        row("hang", "q"),
        row("exit", "q"),
        row("raise", "q"),
        row("none", [{"role": "user", "content": "r"}], truncated=False),
        row("right", truncated=True),
        row("right", answer=None),
        row("  "),
        {"conversation": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "one"}]}
        | {"reward_model": {"ground_truth": "1"}},
    ]
    settings = LabelConfig(
        str(write_jsonl(tmp_path / "in.jsonl", rows)),
        str(tmp_path / "out.parquet"),
        rude,
        DEADLINE,
        num_workers=2,
    )
    summary = label_file(settings, progress=False)
    expected = {"right": 3, "wrong": 1, "no_answer": 1, "timeout": 1, "crash": 1, "error": 1}
    expected |= {"missing_ground_truth": 1, "truncated": 1, "empty": 1}
    assert {name: count for name, count in summary["counts"].items() if count} == expected
    assert summary["rows"] == 11 and summary["labelled"] == 5 and summary["accuracy"] == 3 / 5
    assert summary["prompts"] == {"labelled": 4, "mixed": 1, "all_right": 2, "all_wrong": 1}
    assert summary["by_data_source"]["s"] == {"labelled": 2, "accuracy": 0.5}
    assert [failure["row"] for failure in summary["failures"]] == [4, 5, 6]
    assert json.loads(summary_path(settings.output).read_text()) == summary
    found = pq.read_table(settings.output).to_pylist()
    assert [(r["row"], r["label"]) for r in found] == [(1, 1), (2, 0), (3, 1), (7, 0), (11, 1)]
    assert found[0]["prompt"] == [{"role": "user", "content": "p"}] and found[0]["sample"] == 0
    usable, bad = read_rows(settings.output)
    assert [r.label for r in usable] == [1, 0, 1, 0, 1] and not bad
    assert tokenize(usable, tokenizer, max_length=None).counts["used"] == 5


def test_every_response_can_be_kept_and_texts_stay_texts(tmp_path):
    rows = [row("Answer: 1", truncated=True), row("Answer: 2"), row(""), row(" ", truncated=True)]
    path = str(write_jsonl(tmp_path / "in.jsonl", rows))
    settings = LabelConfig(path, str(tmp_path / "out.jsonl"), "string", keep_all=True)
    assert label_file(settings, progress=False)["prompts"]["mixed"] == 1
    found = [json.loads(line) for line in Path(settings.output).read_text().splitlines()]
    none = (0, "p", None)
    assert [(r["label"], r["prompt"], r["extracted"]) for r in found] == [
        (1, "p", "1"),
        (0, "p", "2"),
        none,
        none,
    ]
    first = Path(settings.output).read_bytes()
    label_file(settings, progress=False)
    assert Path(settings.output).read_bytes() == first


def test_a_response_without_text_is_no_answer_whatever_the_verifier(tmp_path, monkeypatch):
    """This one raises. Where the ground truth cannot be read nothing is known."""
    (tmp_path / "strict_verifier.py").write_text(
        "def judge(response, answer): return {'right': True}[response]"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = str(write_jsonl(tmp_path / "in.jsonl", [row(""), row("right"), row("\n")]))
    settings = LabelConfig(path, str(tmp_path / "out.jsonl"), "strict_verifier:judge", keep_all=True)
    summary = label_file(settings, progress=False)
    assert summary["counts"]["no_answer"] == 2 and summary["labelled"] == 3
    path = str(write_jsonl(tmp_path / "in.jsonl", [row("", answer="$t(0,4]$"), row("")]))
    again = label_file(replace(settings, input=path, verifier="math"), progress=False)["counts"]
    assert again["no_answer"] == again["unreadable_ground_truth"] == 1


def test_on_screen(tmp_path, capsys):
    path = str(
        write_jsonl(tmp_path / "in.jsonl", [row("Answer: 1"), row("Answer: 2"), row("x", answer=None)])
    )
    assert (
        main(["label", "--input", path, "--output", str(tmp_path / "o.jsonl"), "--verifier", "string"]) == 0
    )
    printed = capsys.readouterr().out
    assert "       1  missing ground truth    dropped: the row has none" in printed
    assert "2 of 3 rows labelled, 50.0% right; 1 prompts: 1 mixed, 0 all right, 0 all wrong" in printed


@pytest.mark.parametrize(
    ("rows", "changes", "reason"),
    [
        ([row("a")], {"output": "o.csv"}, "--output o.csv: must end in .parquet or .jsonl"),
        ([row("a")], {"input": "absent.parquet"}, "absent.parquet: no such file"),
        ([row("a")], {"verifier": "magic"}, "'module:function'; got 'magic'"),
        ([row("a")], {"timeout_seconds": -1.0}, "timeout_seconds must lie between"),
        ([row(1), row("a")], {}, r"1 of 2 rows are bad(.|\n)*in.jsonl:1: the response must be text; got int"),
        ([row("a", answer={})], {}, "the ground truth must be a text or a number"),
        ([row("a", truncated="no")], {}, "truncated must be true or false; got 'no'"),
        ([{"response": "a"}], {}, "needs `conversation`, or `prompt` and `response`"),
        ([row(1)], {"on_bad_row": "skip"}, r"no usable row \(1 bad\)"),
        ([], {}, r"no usable row \(0 bad\)"),
        ([row("a", answer=None), row("")], {}, r"no row gets a label \(1 missing_ground_truth, 1 empty\)"),
    ],
)
def test_bad_input(tmp_path, rows, changes, reason):
    settings = {"input": str(write_jsonl(tmp_path / "in.jsonl", rows)), "output": str(tmp_path / "out.jsonl")}
    settings["verifier"] = "string"
    with pytest.raises(IpvrmError, match=reason):
        label_file(LabelConfig(**(settings | changes)), progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_rows_can_be_skipped(tmp_path):
    path = str(write_jsonl(tmp_path / "in.jsonl", [row(1), row("Answer: 1")]))
    summary = label_file(
        LabelConfig(path, str(tmp_path / "out.jsonl"), "string", on_bad_row="skip"), progress=False
    )
    assert summary["counts"]["bad"] == 1 and summary["labelled"] == 1 and summary["rows"] == 2
