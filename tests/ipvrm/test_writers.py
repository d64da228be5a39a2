"""Every file of the package goes through the one writer in `ipvrm.run_folder`."""

import ast
from pathlib import Path

import pytest

import ipvrm
from ipvrm.run_folder import replacing

ROOT = Path(ipvrm.__file__).parent
WRITES = {"savefig", "save_file", "write_bytes", "rename", "to_parquet", "to_csv", "dump"}


def strays(text: str) -> list[int]:
    """Lines that write a file under its own name: not inside `with replacing(...)`."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.With) and any(_name(i.context_expr) == "replacing" for i in node.items):
            return
        if isinstance(node, ast.Call) and _writes(node):
            found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
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
        return any(isinstance(m, str) and set(m) <= set("wxbt+") and set(m) & set("wx") for m in mode)
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
        "path.open(mode='wb')",
        "path.write_text(x)",
        "pq.write_table(t, path)",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "figure.savefig(path)",
        "save_file(t, path)",
    ):
        assert strays(line) == [1], line
        assert strays(f"with replacing(path) as temporary:\n    {line}") == []
    for line in (
        "open(path)",
        "open(path, 'a')",
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
