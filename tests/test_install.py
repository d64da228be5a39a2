"""What pip makes of the source tree: with no compiler, without nvcc, and what a wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "ipvrm" / "integrations" / "launch"
PROBE = (
    "import ipvrm_kernels as k, torch; print(k.__file__); print(k.backends());"
    "print(k.segment_scan(torch.ones(2), torch.tensor([0, 2]).int()).tolist())"
)


def run(command, cwd=None, **env):
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}, cwd=cwd, timeout=600
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
        f"ipvrm/view/{name}"
        for name in ("style.css", "dom.js", "trace.html", "trace.js", "report.html", "report.js")
    }
    launch = {f"ipvrm/integrations/launch/{path.name}" for path in LAUNCH.iterdir()}
    assert view | launch <= set(names) and len(launch) == 3
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


# ------------------------------------------------------------------------------------------- OpenMP's runtime

LOADED = (
    "import ipvrm_kernels as k, re, torch; from ipvrm_kernels.backend import HAS_CPP; assert HAS_CPP;"
    "k.segment_scan(torch.ones(9999), torch.tensor([0, 9999]).int());"
    "found = {line.split()[-1] for line in open('/proc/self/maps') if re.search('lib(g|i)?omp', line)};"
    "print(len(found), found)"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    """Torch's, whose name the extension asks for: two would have threads for every core each."""
    assert run([sys.executable, "-c", LOADED]).startswith("1 ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a shared object's list of libraries")
def test_without_an_openmp_runtime_the_import_says_so(tmp_path):
    """The package with its extension asking for a libgomp that no machine has."""
    site = tmp_path / "site"
    shutil.copytree(
        ROOT / "ipvrm_kernels", site / "ipvrm_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    (extension,) = site.glob("ipvrm_kernels/_C.*.so")
    extension.write_bytes(extension.read_bytes().replace(b"libgomp.so.1", b"libgomp.so.9"))
    out = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {BLOCK} {PROBE}"])
    assert str(site) in out and "[1.0, 2.0]" in out  # in PyTorch
    assert "libgomp.so.9: cannot open shared object file" in out and "apt-get install libgomp1" in out


@pytest.mark.full
@pytest.mark.skipif(shutil.which("auditwheel") is None, reason="auditwheel is not installed")
def test_a_manylinux_wheel_runs_the_demo_in_a_clean_environment(tmp_path):
    """`.ci/wheels`, then away from the sources: the dependencies of here, and nothing else of it."""
    import site

    run([str(ROOT / ".ci" / "wheels"), str(tmp_path / "wheels"), sys.executable], IPVRM_CUDA="0")
    (wheel,) = (tmp_path / "wheels").glob("ipvrm-*.whl")
    assert "manylinux" in wheel.name
    native = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
    assert len(native) == 1 and native[0].startswith("ipvrm_kernels/_C."), "a library was copied in"
    shown = " ".join(run(["auditwheel", "show", str(wheel)]).split())
    assert "libgomp.so.1" in shown
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # their .pth files are not read
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)])
    clean = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    where = "import ipvrm, ipvrm_kernels; print(ipvrm.__file__, ipvrm_kernels.__file__)"
    assert run([str(python), "-c", where], cwd=tmp_path, **clean).count(str(packages)) == 2
    assert run([str(python), "-c", LOADED], cwd=tmp_path, **clean).startswith("1 ")
    command = [
        str(tmp_path / "venv" / "bin" / "ipvrm"),
        "demo",
        "--quick",
        "--output_dir",
        str(tmp_path / "demo"),
    ]
    run(command, cwd=tmp_path, **clean)
    assert (tmp_path / "demo" / "report.md").is_file()
