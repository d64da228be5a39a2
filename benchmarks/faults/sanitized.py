"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m benchmarks.faults.sanitized FOLDER -m pytest -q tests/kernels -k cpp

builds it into FOLDER, beside a copy of ipvrm_kernels, unless it is there already, and runs `python` with the
rest of the line so that this copy is imported. A read or write out of bounds, an overflow of a signed integer
or a conversion that C++ does not define ends that process with a report.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
UNSANITIZED = ("bindings.cpp",)  # it holds no loop over data, and takes a compiler minutes under sanitizers
PLAIN = "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"


def why_not(compiler: str = COMPILER) -> str | None:
    """None where the compiler has the sanitizers, else what it says."""
    if sys.platform != "linux" or shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} on Linux"
    command = [compiler, *SANITIZERS, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()[-200:]


def build(folder: Path, processes: int = 2) -> Path:
    """The folder to import from; built anew where a source is another."""
    import pybind11

    sources = sorted([*(ROOT / "csrc").iterdir(), *(ROOT / "ipvrm_kernels").rglob("*.py"), Path(__file__)])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.is_file())).hexdigest()
    mark, package = folder / "built", folder / "ipvrm_kernels"
    if mark.exists() and mark.read_text() == digest:
        return folder
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "ipvrm_kernels", package, ignore=ignored)
    include = [f"-I{x}" for x in (pybind11.get_include(), sysconfig.get_paths()["include"], ROOT / "csrc")]
    names = [path.name for path in sorted((ROOT / "csrc").glob("*.cpp"))]
    waiting = [(name, () if name in UNSANITIZED else SANITIZERS) for name in names]
    running: list[subprocess.Popen[bytes]] = []
    objects: list[str] = []
    while waiting or running:
        if waiting and len(running) < processes:
            name, flags = waiting.pop()
            objects.append(str(folder / f"{name}.o"))
            command = [COMPILER, *PLAIN, *flags, *include, "-fopenmp", "-c", str(ROOT / "csrc" / name)]
            running.append(subprocess.Popen([*command, "-o", objects[-1]]))
            continue
        if running.pop(0).wait():
            raise SystemExit("the sanitized extension does not compile")
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, "-shared", "-fopenmp", *SANITIZERS, *objects, "-o", str(library)], check=True)
    mark.write_text(digest)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Variables under which Python loads the sanitizers before anything else, and this copy."""
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python keeps much until its end; what cannot be had is Python's MemoryError, not an abort
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "OMP_NUM_THREADS": "2",
    }


def run(folder: Path, arguments: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """`python arguments` under the sanitizers, from `folder`, so that its copy of the package comes first."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(folder), text=True, check=False, **options
    )  # type: ignore[call-overload]


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    if (reason := why_not()) is not None:
        print(f"not tested under sanitizers: {reason}", file=sys.stderr)
        return 1
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    probe = "import ipvrm_kernels._C as c; print(c.__file__)"
    found = run(folder, ["-c", probe], stdout=subprocess.PIPE)
    if not found.stdout.strip().startswith(str(folder)):
        print(f"another extension is imported: {found.stdout}", file=sys.stderr)
        return 1
    given = [str(ROOT / a) if a.startswith("tests/") else a for a in sys.argv[2:]]
    return run(folder, given).returncode


if __name__ == "__main__":
    raise SystemExit(main())
