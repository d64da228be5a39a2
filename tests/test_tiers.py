"""Which tests `pytest`, `pytest -m 'not slow'` and `pytest -m ''` run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.full
def test_full(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["quick", "slow"]),
        (["-m", "not slow"], ["quick"]),
        (["-m", ""], ["quick", "slow", "full"]),
    ],
    ids=["run", "not slow", "full"],
)
def test_tiers(tmp_path, arguments, expected):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, "--collect-only", "-q", "-p", "no:cacheprovider", *arguments, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = [line.split("::test_")[1] for line in result.stdout.splitlines() if "::test_" in line]
    assert found == expected, result.stdout
