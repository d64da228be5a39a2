"""Which implementation runs, what importing costs, and what an unbuilt tree says."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

import ipvrm_kernels
from ipvrm_kernels import backend


def python(code, **env):
    """stdout of `python -c code`, run outside the checkout, so that the installed package is imported."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **env}, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_import_needs_neither_transformers_nor_ipvrm():
    loaded = json.loads(python("import sys, json, ipvrm_kernels; print(json.dumps(list(sys.modules)))"))
    assert "torch" in loaded and "ipvrm_kernels.segment_scan" in loaded
    assert not {"transformers", "ipvrm", "accelerate", "numba"} & set(loaded)


@pytest.mark.slow
def test_import_is_quick():
    """In CPU time, which other processes lengthen less, and with bytecode, as an installed package has it."""
    code = (
        "import time, torch, triton, triton.language; start = time.process_time(); import ipvrm_kernels;"
        "print(time.process_time() - start)"
    )
    seconds = min(float(python(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(3))
    assert seconds < 0.3, f"import ipvrm_kernels took {seconds:.2f} s beyond torch and triton"


def test_table_names_every_op_and_reason():
    table = ipvrm_kernels.backends()
    assert set(table["cpu"]) == set(ipvrm_kernels.OPS)
    for op, impls in table["cpu"].items():
        assert set(impls) == set(backend.IMPL_NAMES)
        assert list(impls.values()).count("default") == 1, op
    if not backend.INTERPRETED:
        assert "TRITON_INTERPRET=1" in table["cpu"]["segment_scan"]["triton"]
    text = str(table)
    assert "segment_scan" in text and "triton: no, because" in text


@pytest.mark.slow
def test_unbuilt_tree_says_what_is_missing():
    """Everything runs in torch, and cpp says why not."""
    out = python(
        "import sys; sys.modules['ipvrm_kernels._C'] = None; import torch, ipvrm_kernels as k;"
        "print(k.backends());"
        "print(k.segment_scan(torch.ones(2), torch.tensor([0, 2]).int()).tolist())\n"
        "try: k.segment_scan(torch.ones(2), torch.tensor([0, 2]).int(), impl='cpp')\n"
        "except ValueError as error: print(error)"
    )
    assert "torch default" in out and "[1.0, 2.0]" in out
    assert "impl='cpp' cannot run here: the extension ipvrm_kernels._C cannot be imported" in out
    assert "pip install -e ." in out


@pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built")
def test_cpp_is_the_default_on_the_cpu():
    x = torch.zeros(1)
    assert backend.choose("segment_scan", ipvrm_kernels.OPS["segment_scan"], None, x) == "cpp"
    assert backend.choose("segment_scan", ipvrm_kernels.OPS["segment_scan"], None, x.double()) == "torch"


@pytest.mark.slow
def test_none_never_picks_triton_on_the_cpu():
    code = (
        "import torch, ipvrm_kernels as k; from ipvrm_kernels import backend;"
        "impls = {'triton': 1, 'torch': 1}; print(backend.choose('op', impls, None, torch.zeros(1)))"
    )
    assert python(code, TRITON_INTERPRET="1").strip() == "torch"


def test_unknown_device_falls_to_the_reference():
    assert (
        backend.choose("segment_scan", ipvrm_kernels.OPS["segment_scan"], None, torch.zeros(1, device="meta"))
        == "torch"
    )


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("fast", "the names are torch, cpp, triton, cuda"),
        ("cuda", "op: impl='cuda' does not exist for this op; it has cpp, torch"),
    ],
)
def test_named_impl_never_falls_back(impl, message):
    with pytest.raises(ValueError, match=message):
        backend.choose("op", {"cpp": 1, "torch": 1}, impl, torch.zeros(1))


def test_set_checks_returns_the_previous_setting():
    assert ipvrm_kernels.set_checks(True) is False
    assert ipvrm_kernels.set_checks(False) is True
    assert backend.checks_values(torch.zeros(1)) and not backend.checks_values(torch.zeros(1, device="meta"))


def test_version_matches_the_metadata():
    from importlib.metadata import version

    assert ipvrm_kernels.__version__ == version("ipvrm")


@pytest.mark.parametrize("op", ipvrm_kernels.OPS)
def test_the_docstring_of_an_op_names_its_implementations(op):
    line = re.search(r"^ +impl: None (.*), see `backends\(\)`", getattr(ipvrm_kernels, op).__doc__, re.M)
    assert set(re.findall(r'"(\w+)"', line[1])) == set(ipvrm_kernels.OPS[op])


def test_every_public_name_stands_once():
    text = Path(ipvrm_kernels.__file__).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    imported = [alias.asname or alias.name for node in nodes for alias in node.names]
    public = [name for name in imported if name[0] != "_"]
    assert sorted([*public, "backends", "__version__"]) == ipvrm_kernels.__all__
    assert {name: len(re.findall(rf"\b{name}\b", text)) for name in public if name.isupper()} == {
        "DISTRL_METRICS": 1
    }


def test_no_native_function_takes_more_than_ten_bare_numbers():
    """What belongs together goes down as a struct with named fields: swapped addresses are silent."""
    extension = pytest.importorskip("ipvrm_kernels._C")
    kernels = [name for name in dir(extension) if name.endswith(("_cpu", "_cuda")) and name != "has_cuda"]
    functions = {name: getattr(extension, name).__doc__ for name in kernels}
    assert len(functions) >= 12
    for name, signature in functions.items():
        arguments = re.findall(r"arg\d+: (\S+)", signature.splitlines()[0])
        assert len(arguments) >= 4, signature
        bare = [x for x in arguments if "ipvrm" not in x]
        assert len(bare) <= 10, f"{name} takes {len(bare)}: {signature}"


def test_a_native_struct_keeps_its_tensors_and_refuses_other_names():
    pytest.importorskip("ipvrm_kernels._C")
    top = torch.zeros(3)
    address, gone = top.data_ptr(), weakref.ref(top)
    state = backend.native_struct("RowState", top=top, sumexp=None)
    block = backend.native_struct("RowBlock", rows=3, state=state)
    assert (state.top, state.sumexp, state.sum_z_exp, block.rows) == (address, 0, 0, 3)
    del top, state
    assert gone() is not None
    del block
    assert gone() is None
    with pytest.raises(AttributeError, match="tops"):
        backend.native_struct("RowState", tops=torch.zeros(3))


def compared_names(text):
    """Lines that compare with the name of an implementation; `cuda` names a device too: with `impl` alone."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.MatchValue) and ast.unparse(node.value).strip("'") in backend.IMPL_NAMES:
            found.append(node.lineno)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            flat = [x for side in sides for x in getattr(side, "elts", [side])]
            names = {x.value for x in flat if isinstance(x, ast.Constant)} & {*backend.IMPL_NAMES}
            if names - {"cuda"} or (names and "impl" in ast.unparse(node)):
                found.append(node.lineno)
    return found


@pytest.mark.slow
def test_nothing_outside_backend_asks_which_implementation_it_is():
    root = Path(ipvrm_kernels.__file__).parent
    places = [*root.rglob("*.py"), *(Path(__file__).parents[2] / "benchmarks").rglob("*.py")]
    places += (root.parent / "ipvrm").rglob("*.py")
    assert len(places) > 100
    found = [
        f"{path}:{line}"
        for path in places
        if path != root / "backend.py"
        for line in compared_names(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
    for line in (
        "impl == 'cpp'",
        "name != 'torch'",
        "impl in ('cuda', 'x')",
        "'triton' == x[0]",
        "a.impl == 'cuda'",
    ):
        assert compared_names(line) == [1], line
    assert compared_names("match x:\n    case 'cpp':\n        pass") == [2]
    for line in ("device == 'cuda'", "impl is None", "x = 'cpp'", "kind == 'edges'"):
        assert compared_names(line) == [], line
