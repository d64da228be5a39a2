"""What .ci/run and .ci/full are made of fits pyproject.toml, and the scripts parse."""

import re
import subprocess
from pathlib import Path

import pytest
from test_trl import PINNED

ROOT = Path(__file__).parents[1]
PURE = {"transformers", "accelerate", "rich", "tyro", "jinja2", "peft", "math-verify"}


def test_lowest_versions_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", text).groups() for text in needed)
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))

    def numbers(version):
        return [int(part) for part in version.split(".")] + [0] * (3 - version.count(".") - 1)

    wrong = {n: (pinned[n], allowed[n]) for n in PURE if numbers(pinned[n]) != numbers(allowed[n])}
    assert not wrong
    newest = (ROOT / ".ci" / "constraints.txt").read_text().lower()
    compiled = {"torch", "triton", "numpy", "pyarrow", "safetensors", "pyyaml"}
    assert all(f"{name}=={pinned[name]}\n" in newest for name in compiled)
    assert {*PURE, *compiled} == {name.lower() for name in allowed}


@pytest.mark.parametrize("name", ["constraints.txt", "lowest.txt"])
def test_what_a_build_needs_is_pinned(name):
    """pip freeze leaves setuptools out of its list before Python 3.12."""
    tomllib = pytest.importorskip("tomllib")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    assert {text.partition(">=")[0] for text in needed} <= {line.partition("==")[0] for line in lines}


def test_the_gates_have_trl():
    """Its tests skip without it: run and full install the extra, pinned with all it brings; full has the
    wheels of both versions that the contract is read from."""
    pinned = dict(
        line.lower().split("==")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert pinned["trl"] == PINNED[-1]
    assert {"datasets", "dill", "multiprocess", "pandas", "xxhash"} <= pinned.keys()  # TRL's, and datasets'
    (install,) = re.findall(r'part "install" .*', (ROOT / ".ci" / "parts.sh").read_text())
    assert "trl" in install.rpartition("[")[2].partition("]")[0].split(",")
    full = (ROOT / ".ci" / "full").read_text()
    (peers,) = re.findall(r"for peer in (.*); do", full)
    assert [f"trl=={version}" for version in PINNED] == [x for x in peers.split() if x.startswith("trl")]
    assert full.index("IPVRM_TRL_WHEELS=") < full.index("pytest -n 2")


@pytest.mark.parametrize("name", ["parts.sh", "run", "full"])
def test_scripts_parse(name):
    done = subprocess.run(
        ["bash", "-n", str(ROOT / ".ci" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
