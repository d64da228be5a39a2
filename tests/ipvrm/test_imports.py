"""Imports inside `ipvrm` point one way: from the upper floors to the lower."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipvrm

ROOT = Path(ipvrm.__file__).parent
FLOORS = (  # from the bottom up; a name is a module of the package or one of its folders
    ("errors",),
    ("run_folder", "output"),
    ("data", "losses"),
    ("models",),
    ("rollouts",),
    ("training", "evaluate"),
    ("integrations",),
    ("view",),
    ("demo",),
    ("reproduce",),
    ("cli",),
    ("__main__", ""),  # "" is the package's face, ipvrm/__init__.py
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(root: Path) -> Iterator[tuple[Path, int, str, str, str]]:
    """(file, line, importing module, imported module, the line) of every import inside the package `root`,
    wherever it stands: in a function too."""
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            found = []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: relative import"
                name = node.module or ""
                inner = [f"{name}.{a.name}" for a in node.names if _is_module(root, f"{name}.{a.name}")]
                found = inner if len(inner) == len(node.names) else [name, *inner]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            for name in found:
                if name == "ipvrm" or name.startswith("ipvrm."):
                    line = text.splitlines()[node.lineno - 1].strip()
                    yield path, node.lineno, module, name.removeprefix("ipvrm").lstrip("."), line


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split(".")[1:])
    return name.startswith("ipvrm.") and (path.is_dir() or path.with_suffix(".py").is_file())


def violations(root: Path) -> list[str]:
    """A line for every import that points up, and for every circle of modules."""
    found, graph = [], dict[str, dict[str, str]]()
    for path, number, module, imported, line in imports(root):
        place = f"{path.relative_to(root.parent)}:{number}: {line}"
        here, there = (name.partition(".")[0] for name in (module, imported))
        if here != there and FLOOR[there] >= FLOOR[here]:
            side = "from beside it" if FLOOR[there] == FLOOR[here] else "from a floor above"
            found.append(f"{place}    ({here or 'ipvrm'} imports {there or 'ipvrm'} {side})")
        graph.setdefault(module, {}).setdefault(imported, place)
    return found + [" -> ".join(circle) for circle in _circles(graph)]


def _circles(graph: dict[str, dict[str, str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> Iterator[list[str]]:
        if module in trail:
            members = [*trail[trail.index(module) :], module]
            yield ["circle", *(graph[a][b] for a, b in zip(members, members[1:], strict=False))]
            return
        if module in done:
            return
        for imported in graph.get(module, {}):
            yield from visit(imported, [*trail, module])
        done.add(module)

    for module in graph:
        yield from visit(module, [])


def test_import_direction():
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_import_direction_knows_every_module():
    modules = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert modules - {"__init__"} == set(FLOOR) - {""}
    assert len({p.name for p in ROOT.iterdir()} - {"__pycache__"}) <= 18


def test_import_direction_prints_the_line_that_breaks_it(tmp_path):
    root = tmp_path / "ipvrm"
    (root / "data").mkdir(parents=True)
    for name in ("__init__", "errors", "data/__init__", "data/rows", "data/batches", "training"):
        (root / f"{name}.py").write_text("")
    (root / "data/rows.py").write_text("from ipvrm.data.batches import collate\n")
    (root / "data/batches.py").write_text("\n\ndef collate():\n    from ipvrm.data import rows\n")
    (root / "errors.py").write_text("import os\nimport ipvrm.training\n")
    up, circle = violations(root)
    assert up.startswith("ipvrm/errors.py:2: import ipvrm.training ")
    assert "ipvrm/data/batches.py:4: from ipvrm.data import rows" in circle and circle.startswith("circle")
    assert "ipvrm/data/rows.py:1: from ipvrm.data.batches import collate" in circle


def late_attributes(source: str) -> list[str]:
    """`Class.attribute` of every attribute that is first set outside `__init__`, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        known = {
            n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        known |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        stores = [
            (method.name, n.attr, n.lineno)
            for method in node.body
            if isinstance(method, ast.FunctionDef)
            for n in ast.walk(method)
            if isinstance(n, ast.Attribute)
            and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name)
            and n.value.id == "self"
        ]
        known |= {attribute for method, attribute, _ in stores if method in ("__init__", "__post_init__")}
        found += [f"{line}: {node.name}.{name}" for _, name, line in stores if name not in known]
    return found


@pytest.mark.slow
def test_no_attribute_is_first_set_outside_init():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        for line in late_attributes(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
    late = (
        "class A:\n    def __init__(self):\n        self.a = 1\n    def b(self):\n        self.a = self.c = 2"
    )
    assert late_attributes(late) == ["5: A.c"]
