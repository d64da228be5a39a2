"""Every file of the package goes through the one writer in `ipvrm.run_folder`."""

import ast
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import ipvrm
from ipvrm import IpvrmError, run_folder
from ipvrm.cli import main
from ipvrm.demo import policies
from ipvrm.demo.run import Stages
from ipvrm.output.progress import Progress
from ipvrm.run_folder import JsonlLog, remove_leftovers_of, replacing, reusable, save_folder

ROOT = Path(ipvrm.__file__).parent
WRITES = {"savefig", "save_file", "write_bytes", "rename", "to_parquet", "to_csv", "dump"}
# Functions that are handed a folder, to be filled.
HANDED = {"write_model", "save_trained", "save_merged", "save_model", "fit_base", "_train_base"}
FILLS = HANDED | {"save_pretrained", "copytree"}
ATOMIC = {"replacing", "save_folder"}


def strays(text: str) -> list[int]:
    """Lines that write a file or a folder under its own name: not inside `with replacing(...)` or `with
    save_folder(...)`. A folder may be filled by a function that was handed it, whose callers are judged, and
    by what makes a stage of the demo (`Stages.folder`)."""
    found = []

    def visit(node: ast.AST, handed: bool) -> None:
        if isinstance(node, ast.With) and ATOMIC & {_name(i.context_expr) for i in node.items}:
            return
        handed |= isinstance(node, ast.FunctionDef) and node.name in HANDED
        if isinstance(node, ast.Call):
            handed |= _name(node) == "folder"
            if _writes(node) or (_name(node) in FILLS and not handed):
                found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, handed)

    visit(ast.parse(text), False)
    return found


def _name(node: ast.AST) -> str:
    """Last name of what is called."""
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _writes(call: ast.Call) -> bool:
    name, method = _name(call), isinstance(call.func, ast.Attribute)
    owner = _name(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name == "open":
        if call.args and ast.unparse(call.args[0]) == "os.devnull":
            return False
        mode = [
            a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)
        ]
        return any(isinstance(m, str) and set(m) <= set("wxabt+") and set(m) & set("wxa") for m in mode)
    if name == "replace" and method:  # of str two arguments, of dataclasses keywords
        return owner == "os" or (len(call.args) == 1 and not call.keywords)
    return name in WRITES or (method and name in ("write_text", "write_table"))


def test_nothing_else_writes_files():
    files = [path for path in ROOT.rglob("*.py") if path.name != "run_folder.py"]
    assert len(files) > 40
    found = [f"{path}:{line}" for path in files for line in strays(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_strays_are_seen():
    for line in (
        "open(path, 'w')",
        "open(path, 'a', encoding='utf-8')",
        "path.open(mode='wb')",
        "path.write_text(x)",
        "pq.write_table(t, path)",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "figure.savefig(path)",
        "save_file(t, path)",
    ):
        assert strays(line) == [1], line
        assert strays(f"def write_model(path):\n    {line}") == [2]
        assert strays(f"with replacing(path) as temporary:\n    {line}") == []
    for line in (
        "model.save_pretrained(path)",
        "save_model(model, path)",
        "shutil.copytree(a, path)",
        "self.reward.write_model(path, policy, path)",
    ):
        assert strays(line) == strays(f"def save(path): {line}") == [1], line
        assert strays(f"with save_folder(path) as temporary:\n    {line}") == []
        assert strays(f"def write_model(path):\n    {line}") == []
    for line in (
        "open(path)",
        "text.replace('w', '')",
        "replace(config, a=1)",
        "write_text(p, x)",
    ):
        assert strays(line) == [], line


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_by_the_file_that_it_takes(tmp_path, capsys):
    """Of a write or a flush the system's own error has no name."""
    full = os.open("/dev/full", os.O_WRONLY)
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    os.dup2(full, log._file.fileno())
    os.close(full)
    for act in (lambda: log.write({"step": 2}), log.close):
        with pytest.raises(IpvrmError, match=r"metrics.jsonl: cannot be written: No space left on device"):
            act()
    source, partial = tmp_path / "in.jsonl", tmp_path / ".o.jsonl.partial"
    source.write_text(json.dumps({"prompt": "1", "response": "Answer: 1", "answer": "1"}) + "\n")
    partial.mkdir()
    (partial / "verdicts.jsonl").symlink_to("/dev/full")
    command = ["label", "--input", str(source), "--output", str(tmp_path / "o.jsonl")]
    assert main([*command, "--verifier", "string", "--num_workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"ipvrm label: {partial / 'verdicts.jsonl'}: cannot be written: No space left")


def test_what_a_killed_run_left_of_an_output_goes(tmp_path):
    kept = [".page.html.lock", ".page.html.x.tmp", ".other.html.7.tmp", "page.html.7.tmp"]
    for name in (*kept, ".page.html.7.tmp", ".page.json.12.tmp"):
        (tmp_path / name).touch()
    remove_leftovers_of(tmp_path / "page.html", tmp_path / "page.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def _reward_folder(folder):
    (folder / "new").mkdir()
    (folder / "new" / "x").mkdir()
    run_folder.move_into(folder / "new", folder, last="x")


def _stage(folder):
    Stages(folder, Progress(enabled=False)).in_place("x", {}, lambda: None)


def _checkpoint(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "train_policy", lambda *_, **__: SimpleNamespace(output_dir=folder))
        patch.setattr(policies, "checkpoints", lambda _: [folder / "x"])
        patch.setattr(policies, "outcomes", lambda *_: [])
        policies.train(SimpleNamespace(max_steps=1), [], False)


@pytest.mark.parametrize("replaces", [_reward_folder, _stage, _checkpoint])
def test_deleting_renames_first(tmp_path, monkeypatch, replaces):
    """Killed while it deletes: no half of a folder is left under its name."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "half").touch()

    def killed(path, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        replaces(tmp_path)
    assert not (tmp_path / "x").exists()
    (left,) = tmp_path.glob(".x.*.removed.tmp")
    assert (left / "half").exists()


def test_a_folder_s_own_entries_reach_the_disk(tmp_path, monkeypatch):
    """Files, folders in it, and the folder itself before it is renamed: else its names may be lost."""
    synced = []
    monkeypatch.setattr(run_folder, "_sync", synced.append)
    with save_folder(tmp_path / "x") as temporary:
        (temporary / "in").mkdir()
        (temporary / "in" / "file").touch()
    inside = [temporary / "in", temporary / "in" / "file"]
    assert sorted(synced[:2]) == inside and synced[2:] == [temporary, tmp_path]


@pytest.mark.slow
def test_what_changed_is_asked_in_one_place():
    """Whether to go on with what lies there: `same_run` refuses, `reusable` has it made again."""
    found = [
        path
        for path in ROOT.rglob("*.py")
        if path.name != "run_folder.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module == "ipvrm.run_folder"
        and "changes" in {alias.name for alias in node.names}
    ]
    assert not found, found
    notes = []
    stored = {"data": "a", "seed": 0}
    assert reusable(stored, {"data": "a", "seed": 0}, "x", notes.append) and not notes
    assert not reusable(stored, {"data": "b", "seed": 1}, "x", notes.append, {"data": "the data"})
    assert notes == ["x: made again; changed: the data, seed (0 then, 1 now)"]
