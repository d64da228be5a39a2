"""`ipvrm label` and `ipvrm score` on long files and in bad times: resumed, bounded memory, nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed packages

from benchmarks.faults import memory
from benchmarks.faults.toy import make_toy
from ipvrm import IpvrmError
from ipvrm.rollouts import label
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.verify import VerifierPool
from ipvrm.run_folder import summary_path, table_schema, write_table


def rows(count, wrong_every=3):
    answers = [n if n % wrong_every else -1 for n in range(count)]
    return [
        {"prompt": f"q{n // 4}", "response": f"Answer: {found}", "answer": str(n), "sample": n % 4}
        for n, found in enumerate(answers)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_interrupted_run_asks_nothing_twice(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(label, "CHUNK", 10)
    source = write(tmp_path / "in.jsonl", rows(43))
    whole = LabelConfig(source, str(tmp_path / f"whole.{ending}"), "string", num_workers=1)
    expected = label_file(whole, progress=False)
    config = LabelConfig(source, str(tmp_path / f"out.{ending}"), "string", num_workers=1)
    asked, real = [], VerifierPool.judge

    def dies_in_the_third_chunk(self, pairs, on_done):
        if len(asked) == 2:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(pairs))
        return real(self, pairs, on_done)

    monkeypatch.setattr(VerifierPool, "judge", dies_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        label_file(config, progress=False)
    verdicts = tmp_path / f".out.{ending}.partial" / "verdicts.jsonl"
    with open(verdicts, "ab") as file:
        file.write(b'{"line": 21, "outc')
    assert not Path(config.output).exists()
    summary = label_file(config, progress=False)
    assert asked == [10, 10, 0, 10, 10, 3]
    assert Path(config.output).read_bytes() == Path(whole.output).read_bytes()
    for name in ("counts", "prompts", "accuracy", "labelled"):
        assert summary[name] == expected[name]
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_an_interrupted_run_is_not_mixed_with_another(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", rows(5))
    config = LabelConfig(source, str(tmp_path / "o.jsonl"), "string")

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VerifierPool, "judge", dies)
        with pytest.raises(KeyboardInterrupt):
            label_file(config, progress=False)
    write(tmp_path / "in.jsonl", rows(6))
    with pytest.raises(IpvrmError, match="changed: the input"):
        label_file(config, progress=False)
    write(tmp_path / "in.jsonl", rows(5))
    assert label_file(config, progress=False)["rows"] == 5


def test_what_the_writer_cannot_take_shows_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(VerifierPool, "judge", lambda *a: pytest.fail("answers were verified"))
    mixed = [*rows(3), {**rows(1)[0], "sample": "two"}]
    config = LabelConfig(write(tmp_path / "a.jsonl", mixed), str(tmp_path / "o.parquet"), "string")
    with pytest.raises(IpvrmError, match=r"a.jsonl:4: sample must be a whole number; got 'two'"):
        label_file(config, progress=False)
    odd = [{"role": "user", "content": "q", "extra": extra} for extra in ({"a": 1}, "text")]
    records = [{"prompt": [message], "response": "Answer: 1", "answer": "1"} for message in odd]
    config = LabelConfig(write(tmp_path / "b.jsonl", records), str(tmp_path / "o.parquet"), "string")
    with pytest.raises(IpvrmError, match=r"a column has values of several types.*write .jsonl"):
        label_file(config, progress=False)
    assert not (tmp_path / "o.parquet").exists()


def test_a_full_disk_keeps_the_verdicts(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", rows(20))
    config = LabelConfig(source, str(tmp_path / "o.jsonl"), "string", num_workers=1)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ipvrm.run_folder._sync", full)
        (tmp_path / ".o.jsonl.partial").mkdir()
        settings = label.settings_of(config) | {"input_hash": label.file_hash(source)}
        (tmp_path / ".o.jsonl.partial" / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(IpvrmError, match=r"o.jsonl: cannot be written: No space left on device"):
            label_file(config, progress=False)
    assert not (tmp_path / "o.jsonl").exists() and not list(tmp_path.glob(".*.tmp"))
    monkeypatch.setattr(VerifierPool, "judge", lambda *a: pytest.fail("answers were verified twice"))
    assert label_file(config, progress=False)["rows"] == 20


def test_half_deleted_work_is_not_taken_for_that_of_the_next_run(tmp_path, monkeypatch):
    """A kill while the verdicts are deleted; then another input for the same output."""
    source = write(tmp_path / "in.jsonl", rows(9))
    config = LabelConfig(source, str(tmp_path / "o.jsonl"), "string", num_workers=1)

    def dies(folder, **options):
        (Path(folder) / "settings.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            label_file(config, progress=False)
    write(tmp_path / "in.jsonl", rows(9, wrong_every=1))
    assert label_file(config, progress=False)["accuracy"] == 0.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "o.jsonl", "o.jsonl.summary.json"]


def test_what_a_killed_run_has_left_is_deleted_and_what_another_one_writes_is_not(tmp_path):
    left = (".o.jsonl.12.tmp", ".o.jsonl.summary.json.7.tmp", "..o.jsonl.partial.9.removed.tmp")
    others = (".o.jsonl2.12.tmp", ".p.o.jsonl.1.tmp", ".o.jsonl.x.12.tmp", ".o.jsonl.tmp", "o.jsonl.12.tmp")
    for name in (*left[:2], *others):
        (tmp_path / name).touch()
    (tmp_path / left[2]).mkdir()
    (tmp_path / left[2] / "verdicts.jsonl").touch()
    config = LabelConfig(write(tmp_path / "in.jsonl", rows(4)), str(tmp_path / "o.jsonl"), "string")
    label_file(config, progress=False)
    found = {p.name for p in tmp_path.iterdir()} - {"in.jsonl", "o.jsonl", "o.jsonl.summary.json"}
    assert found == set(others)


# ------------------------------------------------------------------------------------------- the table writer


def test_columns_that_appear_late_are_there(tmp_path):
    early = [{"a": None, "m": [{"role": "u"}]}] * 5000
    late = [{"a": 1.5, "m": [{"role": "u", "calls": [{"n": 1}]}], "b": "x"}]
    write_table(tmp_path / "t.parquet", early + late)
    found = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(found) == 5001 and found[-1] == late[0]
    assert found[0] == {"a": None, "m": [{"role": "u", "calls": None}], "b": None}
    with pytest.raises(IpvrmError, match="several types"):
        table_schema([{"a": 1}] * 5000 + [{"a": "x"}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_table(tmp_path / "t.jsonl", [{"a": float("nan")}])
    assert {p.name for p in tmp_path.iterdir()} == {"t.parquet"}


# ------------------------------------------------------------------------------------- memory of a verifier


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux heeds RLIMIT_DATA")
def test_a_verifier_that_takes_the_machine_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "greedy_verifier.py").write_text(
        "def judge(response, answer):\n    held = bytearray(int(response))\n    return bool(len(held))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with VerifierPool("greedy_verifier:judge", 1, 60.0, memory_gb=1.0) as pool:
        small, large, again = pool.judge([("1000", ""), (str(4 * 10**9), ""), ("1000", "")])
    assert small.outcome == again.outcome == "right"
    assert (large.outcome, large.detail) == ("error", "MemoryError: ")
    with pytest.raises(IpvrmError, match="memory_gb must lie"):
        VerifierPool("string", memory_gb=0.0)


MEASURE = """import sys
from ipvrm.rollouts.label import LabelConfig, label_file
config = LabelConfig(sys.argv[1], sys.argv[2], "string", num_workers=1)
print(label_file(config, progress=False)["rows"])
print(*[1024 * int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line])
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: ru_maxrss is inherited from the parent")
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    """1,000 and 100,000 rows of 1 kB: what is kept of each prompt is a hash."""
    peaks = []
    for count in (1000, 100_000):
        long = (r | {"prompt": r["prompt"] + "x" * 1000} for r in rows(count))
        source = write(tmp_path / f"{count}.jsonl", long)
        output = str(tmp_path / f"o{count}.{ending}")
        command = [sys.executable, "-c", MEASURE, source, output]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found, peak = map(int, done.stdout.split())
        assert found == count and json.loads(summary_path(output).read_text())["labelled"] == count
        peaks.append(peak)
    print(
        f"{ending}: {peaks[0] / 1e6:.0f} MB of 1,000 rows, {peaks[1] / 1e6:.0f} MB of 100,000 (the file: "
        f"{os.path.getsize(source) / 1e6:.0f} MB)"
    )
    assert peaks[1] - peaks[0] < 60e6


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: ru_maxrss is inherited from the parent")
def test_memory_of_score_does_not_grow_with_the_file(tmp_path):
    """1,000 and 20,000 solutions; benchmarks/results/faults has 10,000 and 100,000."""
    model = make_toy(tmp_path, ("ipvrm",)) / "ipvrm"
    small, large = (memory.measure(tmp_path, model, "score", count)["peak_mb"] for count in (1000, 20_000))
    assert large - small < 60


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: ru_maxrss is inherited from the parent")
@pytest.mark.parametrize("verifier", ["string", "math"])
def test_a_row_of_50_mb_costs_less_than_1_gb_in_the_verifier_too(tmp_path, verifier):
    given = ("label", 8, "--verifier", verifier)
    short, long = (memory.measure(tmp_path, tmp_path, *given, long=x) for x in (False, True))
    for name in ("peak_mb", "child_peak_mb"):
        assert long[name] - short[name] < 1000, name
