"""Damaged and unusual input files: read, or one line with the file's name; one bad row costs one row."""

import gzip
import json
import math
import os
import random
import subprocess
import sys
from datetime import datetime

import pyarrow
import pyarrow.parquet
import pytest

from ipvrm import IpvrmError
from ipvrm.cli import main, parse
from ipvrm.data import files
from ipvrm.data.files import DEEPEST, chunked, file_hash, records
from ipvrm.data.rows import read_prompts, read_rows
from ipvrm.evaluate.processbench import read_items
from ipvrm.models.tiny_model import texts_of
from ipvrm.training.reward_config import RewardConfig

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, é.", "label": n % 2} for n in range(8)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
BOM = b"\xef\xbb\xbf"


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def zst_frames(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.output_stream(sink, compression="zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


UNUSUAL = {
    "bom.jsonl": BOM + LINES,
    "bom.json": BOM + LIST,
    "space.json": b" \n\t" + LIST,
    "bom_space.json": BOM + b"\r\n" + LIST,
    "lines.json": LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "no_end.jsonl": LINES[:-1],
    "x.jsonl.gz": gzip.compress(LINES),
    "two_members.jsonl.gz": gzip.compress(LINES[: LINES.index(b"\n") + 1])
    + gzip.compress(LINES[LINES.index(b"\n") + 1 :]),
    "x.json.gz": gzip.compress(BOM + LIST),
    "x.jsonl.zst": zst_frames(LINES),
    "x.json.zst": zst_frames(LIST),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_read_like_plain_ones(tmp_path, name):
    (tmp_path / name).write_bytes(UNUSUAL[name])
    rows, bad = read_rows(tmp_path / name)
    assert not bad and [(r.prompt, r.response, r.label) for r in rows] == [tuple(r.values()) for r in ROWS]
    assert read_prompts(tmp_path / name)[0][3].prompt == "What is 3?"


@pytest.mark.parametrize("endings", [("jsonl", "jsonl.gz", "jsonl.zst"), ("parquet", "parquet", "json")])
def test_a_folder_of_shards_is_one_file(tmp_path, endings):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, (ending, part) in enumerate(zip(endings, (ROWS[:3], ROWS[3:4], ROWS[4:]), strict=True)):
        path = folder / f"part-{number}.{ending}"
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
            continue
        text = json.dumps(part) if ending == "json" else "".join(json.dumps(r) + "\n" for r in part)
        packed = {"gz": gzip.compress, "zst": zst_frames}.get(
            ending[-2:] if ending[-2:] == "gz" else ending[-3:]
        )
        path.write_bytes(packed(text.encode()) if packed else text.encode())
    (folder / "_SUCCESS").touch()
    (folder / ".hidden.jsonl").write_text("{")
    (folder / "README.md").write_text("shards")
    rows, _ = read_rows(folder)
    assert [r.label for r in rows] == [r["label"] for r in ROWS]
    assert [r.source.rpartition("/")[2].partition(".")[0] for r in rows] == ["part-0"] * 3 + ["part-1"] + [
        "part-2"
    ] * 4
    assert [p.row for p in read_prompts(folder)[0]] == list(range(1, 9))
    before = file_hash(folder)
    os.rename(folder / f"part-0.{endings[0]}", folder / f"part-9.{endings[0]}")
    assert file_hash(folder) != before


def parquet_bytes(rows, **options):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def damaged():
    """name -> bytes of files that no reader can take, seeded."""
    table = parquet_bytes(ROWS * 50, compression="none")
    page = bytearray(table)
    page[4:200] = random.Random(0).randbytes(196)
    found = {
        "empty.parquet": b"",
        "half.parquet": table[: len(table) // 2],
        "no_footer.parquet": table[:-8],
        "page.parquet": bytes(page),
        "text.parquet": LINES,
        "lfs.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "half.json": LIST[: len(LIST) // 2],
        "extra.json": LIST + b"}",
        "deep.json": b"[" * 200_000,
        "utf16.jsonl": LINES.decode().encode("utf-16"),
        "utf16.json": LIST.decode().encode("utf-16"),
        "latin.json": LIST.decode().replace("\\u00e9", "é").encode("latin-1"),
        "plain.jsonl.gz": LINES,
        "half.jsonl.gz": gzip.compress(LINES * 50)[:-20],
        "plain.jsonl.zst": LINES,
        "half.jsonl.zst": zst_frames(LINES * 50)[:-4],
        "no_rows.jsonl": b"\n \n",
        "empty.json": b"",
        "binary.jsonl": random.Random(1).randbytes(4000),
        "columns.parquet": parquet_bytes([{"question": "a"}]),
        "ending.csv": LINES,
        "compressed.parquet.gz": gzip.compress(table),
    }
    for seed in range(12):  # a run of bytes anywhere
        generator, data = random.Random(seed), bytearray(table)
        at = generator.randrange(4, len(data))
        data[at : at + 40] = generator.randbytes(40)
        found[f"seed{seed}.parquet"] = bytes(data[: len(table)])
    return found


DAMAGED = damaged()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    for read in (
        lambda: read_rows(path, "skip"),
        lambda: read_prompts(path, "skip"),
        lambda: list(texts_of(path)),
        lambda: read_items(path),
    ):
        try:
            read()
        except IpvrmError as error:
            assert str(path) in str(error), error
            assert len(str(error).splitlines()) == 1 or "no usable row" in str(error)
        else:  # flipped bytes can be text: what was read, is rows
            assert name.startswith("seed") or read.__code__.co_names[0] == "list"


BOMB = """import sys
from ipvrm.data.files import records
count = total = 0
for record in records(sys.argv[1], None):
    (text,) = record.value.values()
    total += len(text if isinstance(text, str) else text[0]["content"])
    count += 1
print(count, total, *[int(line.split()[1]) // 1000 for line in open("/proc/self/status") if "VmHWM" in line])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_text_that_all_rows_of_a_parquet_file_share_is_held_once(tmp_path, kind):
    """A kilobyte on disk, 2 GB as texts of their own."""
    count, size = 200, 10_000_000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, "int32"), ["x" * size])
    if kind == "messages":
        roles = pyarrow.array(["user"] * count)
        messages = pyarrow.StructArray.from_arrays([roles, column], names=["role", "content"])
        column = pyarrow.ListArray.from_arrays(pyarrow.array(range(count + 1), "int32"), messages)
    path = tmp_path / "bomb.parquet"
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    pyarrow.parquet.write_table(pyarrow.table({"c": column}), path, **options)
    assert path.stat().st_size < 2000
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-500:]
    found, total, peak = map(int, done.stdout.split())
    assert (found, total) == (count, count * size) and peak < 800


@pytest.mark.parametrize("command", ["train-rm", "rollout", "label", "score", "eval processbench"])
@pytest.mark.parametrize("kind", ["absent", "unreadable", "folder"])
def test_every_command_says_which_file(tmp_path, tiny_folder, capsys, command, kind):
    path = tmp_path / "in.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_bytes(b"\xff\xfe\x00\x00")
    flags = {
        "train-rm": ["--model", tiny_folder, "--train_data", path, "--output_dir", tmp_path / "o"],
        "rollout": ["--model", tiny_folder, "--input", path, "--output", tmp_path / "o.jsonl"],
        "label": ["--input", path, "--output", tmp_path / "o.jsonl", "--verifier", "string"],
        "score": ["--model", tiny_folder, "--input", path, "--output", tmp_path / "o.jsonl"],
        "eval processbench": ["--model", tiny_folder, "--data", path, "--output_dir", tmp_path / "o"],
    }
    assert main([*command.split(), *map(str, flags[command])]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.splitlines()) == 1, error


# ----------------------------------------------------------------------------------------------- single rows

BAD_LINES = {
    "half a surrogate pair": r'{"prompt": "a", "response": "cut \ud83d", "label": 1}',
    "half a surrogate pair (\\udc00)": r'{"prompt": "a", "response": "b", "label": 1, "\udc00": 1}',
    "not UTF-8": b'{"prompt": "\xff", "response": "b", "label": 1}',
    "not valid JSON: nested too deeply": '{"prompt": ' + "[" * 100_000,
    f"nested deeper than {DEEPEST} levels": '{"prompt": ' + "[" * 300 + "]" * 300 + ', "response": "b"}',
    "not valid JSON: Exceeds": '{"prompt": "a", "response": "b", "label": ' + "9" * 5000 + "}",
    "not valid JSON: Invalid control": '{"prompt": "a\0", "response": "b", "label": 1}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_costs_one_row(tmp_path, reason):
    line = BAD_LINES[reason]
    path = tmp_path / "in.jsonl"
    lines = LINES.splitlines()
    lines.insert(3, line if isinstance(line, bytes) else line.encode())
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(IpvrmError) as caught:
        read_rows(path)
    assert f"{path}:4: " in str(caught.value) and reason in str(caught.value)
    assert "\ud83d" not in str(caught.value)
    rows, bad = read_rows(path, "skip")
    assert len(rows) == 8 and [row.row for row in bad] == [4]


def test_a_parquet_text_that_is_no_utf8_costs_one_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xed\xa0\xbd", b"c"]).cast(pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    table = pyarrow.table({"prompt": ["p"] * 3, "response": texts, "label": [1, 0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    rows, bad = read_rows(tmp_path / "in.parquet", "skip")
    assert [row.response for row in rows] == ["a", "c"] and [row.row for row in bad] == [2]


def test_a_surrogate_trains_and_labels_without_its_row(tmp_path, tiny_folder, capsys):
    path = tmp_path / "in.jsonl"
    rows = [{**row, "answer": "3"} for row in ROWS]
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
        + r'{"prompt": "a\ud83d", "response": "b", "label": 1, "answer": "1"}'
    )
    train = ["--model", tiny_folder, "--train_data", path, "--output_dir", tmp_path / "rm", "--max_steps", 1]
    assert main(["train-rm", *map(str, [*train, "--use_cpu"])]) == 2
    assert f"{path}:9: text that is not Unicode" in capsys.readouterr().err
    assert main(["train-rm", *map(str, [*train, "--use_cpu", "--on_bad_row", "skip"])]) == 0
    label = [
        "--input",
        path,
        "--output",
        tmp_path / "l.parquet",
        "--verifier",
        "string",
        "--on_bad_row",
        "skip",
    ]
    assert main(["label", *map(str, label)]) == 0
    assert f"skipped {path}:9" in capsys.readouterr().err


def test_ids_that_json_does_not_have(tmp_path):
    from ipvrm.data.files import finite

    assert finite(float("nan"), "id") is None
    assert finite({"a": [1, "b"]}, "id") == {"a": [1, "b"]}
    for value in (float("inf"), [float("nan")]):
        with pytest.raises(ValueError, match="`id` holds NaN or an infinity"):
            finite(value, "id")
    with pytest.raises(ValueError, match="`id` holds what JSON does not have: .*datetime"):
        finite(datetime.now(), "id")


@pytest.mark.parametrize("command", ["label", "rollout"])
def test_messages_with_numbers_that_json_does_not_have(tmp_path, tiny_folder, capsys, command):
    """NaN is pandas' way to say that there is none; an infinity is a bad row before the work."""

    def row(number):
        message = {"role": "user", "content": "q", "id": number}
        return {"prompt": [message], "response": "Answer: 1", "answer": "1"}

    source, output = tmp_path / "in.jsonl", tmp_path / "o.jsonl"
    source.write_text("".join(json.dumps(row(number)) + "\n" for number in (1.5, math.nan, math.inf)))
    arguments = [command, "--input", source, "--output", output, "--on_bad_row"]
    more = ["--model", tiny_folder, "--max_new_tokens", 2, "--num_generations", 1, "--use_cpu"]
    arguments[1:1] = more if command == "rollout" else ["--verifier", "string"]
    assert main([*map(str, arguments), "error"]) == 2
    assert f"{source}:3: `prompt[0]` holds NaN or an infinity" in capsys.readouterr().err
    assert main([*map(str, arguments), "skip"]) == 0
    written = [json.loads(line)["prompt"][0] for line in output.read_text().splitlines()]
    assert written == [{"role": "user", "content": "q", "id": 1.5}, {"role": "user", "content": "q"}]


@pytest.mark.slow
def test_a_duplicate_key_of_yaml_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: a\ntrain_data: b\noutput_dir: c\nmodel: d\n")
    with pytest.raises(IpvrmError, match=r"c.yaml: model stands twice, the second time in line 4"):
        parse(RewardConfig, ["--config", str(path)], prog="p")
    path.write_bytes(BOM + b"model: a\ntrain_data: b\noutput_dir: c\n")
    assert parse(RewardConfig, ["--config", str(path)], prog="p").model == "a"
    for content in (b"\xff\xfe", b"[" * 50_000, b"a: b: c", b"a: \x00"):
        path.write_bytes(content)
        with pytest.raises(IpvrmError, match="c.yaml") as caught:
            parse(RewardConfig, ["--config", str(path)], prog="p")
        assert len(str(caught.value).splitlines()) == 1


def test_a_stream_holds_one_record_at_a_time(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINES)
    found = records(path, None)
    assert next(found).value == ROWS[0]
    assert [len(chunk) for chunk in chunked(found, 3)] == [3, 3, 1]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_a_line_without_an_end_is_one_bad_row_and_never_in_memory(tmp_path, monkeypatch, name):
    """What a few MB of gzip unpack to."""
    monkeypatch.setattr(files, "LONGEST", 2000)
    good = [json.dumps(row) + "\n" for row in ROWS]
    long = [json.dumps(ROWS[0] | {"response": "a" * size}) + "\n" for size in (1800, 2200, 50_000)]
    data = "".join([good[0], *long, *good[1:], "b" * 9000]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    usable, bad = read_rows(tmp_path / name, "skip")
    assert [row.row for row in bad] == [3, 4, 12] and all("more than 2,000 bytes" in str(row) for row in bad)
    assert len(usable) == 9 and usable[1].response == "a" * 1800 and usable[-1].prompt == ROWS[-1]["prompt"]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_a_list_without_an_end_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "LONGEST", 100)
    data = json.dumps(ROWS * 20).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(IpvrmError, match=rf"{name}: not valid JSON: a JSON list of more than 400 bytes; "):
        read_rows(tmp_path / name)
