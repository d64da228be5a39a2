"""What pip makes of the source tree: with no compiler, without nvcc, and what a wheel holds."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = (
    "import ipvrm_kernels as k, torch; print(k.__file__); print(k.backends());"
    "print(k.segment_scan(torch.ones(2), torch.tensor([0, 2]).int()).tolist())"
)


def run(command, **env):
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=240
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def build_wheel(folder, **env):
    """A wheel from a copy of the sources, so that build products of the checkout cannot help."""
    source = folder / "source"
    if not source.exists():
        listed = run(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"])
        for name in listed.split():
            if name.split("/")[0] in ("csrc", "ipvrm", "ipvrm_kernels") or "/" not in name:
                target = source / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*command, "-w", str(folder), str(source)], **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(autouse=True)
def _needs_a_checkout():
    if not (ROOT / "setup.py").is_file() or not (ROOT / ".git").exists():
        pytest.skip("no checkout beside the tests")


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(tmp_path):
    wheel = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false", IPVRM_CUDA="0")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    assert "ipvrm/cli.py" in names and "ipvrm_kernels/py.typed" in names
    view = {
        f"ipvrm/view/{name}" for name in ("style.css", "trace.html", "trace.js", "report.html", "report.js")
    }
    assert view <= set(names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    out = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {BLOCK} {PROBE}"])
    assert str(site) in out and "[1.0, 2.0]" in out
    assert "cpp: no, because the extension ipvrm_kernels._C cannot be imported" in out


# an editable install answers for ipvrm_kernels._C even when another copy of the package is first on the path
BLOCK = "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"


@pytest.mark.full
def test_wheel_without_nvcc_runs_cpp(tmp_path):
    wheel = build_wheel(tmp_path, IPVRM_CUDA="0")
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.endswith((".so", ".pyd"))]) == 1
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    out = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {BLOCK} {PROBE}"])
    assert str(site) in out and "cpp default" in out and "holds no CUDA kernels" in out


def test_a_wrong_cuda_switch_is_refused(tmp_path):
    command = [sys.executable, "setup.py"]
    result = subprocess.run(
        [*command, "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "IPVRM_CUDA": "yes"},
    )  # fmt: skip
    assert result.returncode != 0 and "IPVRM_CUDA must be 0 or 1, got 'yes'" in result.stderr
