"""The extension ipvrm_kernels._C, nothing else (metadata lives in pyproject.toml).

C++ needs only pybind11: no torch header is included, so the build works in pip's isolated environment and one
binary serves every torch version. CUDA sources are compiled when nvcc is found (IPVRM_CUDA=0 skips them,
IPVRM_CUDA=1 insists). Without a working compiler the package still installs; ipvrm_kernels.backends() then
says why `cpp` is missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPP_SOURCES = [
    f"csrc/{name}.cpp" for name in ("bindings", "bf16_cpu", "head_cpu", "policy_cpu", "sequence_cpu")
]
CUDA_SOURCES = ["csrc/policy_cuda.cu", "csrc/sequence_cuda.cu"]
CUDA_ARCHITECTURES = ("80", "90", "100")  # those that this nvcc knows, and PTX of the newest of them


def find_nvcc() -> str | None:
    """Path of nvcc from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; None if absent or switched off."""
    wanted = os.environ.get("IPVRM_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"setup.py: IPVRM_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(root) / "bin" / "nvcc") for root in roots if root]
    found = next((c for c in candidates if Path(c).is_file()), None) or shutil.which("nvcc")
    if found is None and wanted == "1":
        raise SystemExit("setup.py: IPVRM_CUDA=1 but no nvcc was found in CUDA_HOME, /usr/local/cuda or PATH")
    return found


class BuildExtension(build_ext):
    """OpenMP where the compiler has it, nvcc objects linked in, and no failure without a compiler."""

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        try:
            for extension in self.extensions:
                self._configure(extension, nvcc)
            super().build_extensions()
        except Exception as error:
            if os.environ.get("IPVRM_CUDA") == "1":
                raise
            print(
                f"ipvrm: the native extension was not built ({error}); impl='cpp' and 'cuda' are off",
                file=sys.stderr,
            )
            for extension in self.extensions:  # a half-written or outdated binary must not be picked up
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def _configure(self, extension: Extension, nvcc: str | None) -> None:
        if sys.platform == "win32":
            extension.extra_compile_args += ["/std:c++17", "/O2", "/openmp"]
            return
        extension.extra_compile_args += [
            "-std=c++17",
            "-O3",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-g0",
        ]
        if self._compiles_with("-fopenmp"):
            extension.extra_compile_args += ["-fopenmp"]
            extension.extra_link_args += ["-fopenmp"]
        if nvcc is not None:
            self._add_cuda(extension, nvcc)

    def _compiles_with(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=[flag])
            except Exception:
                return False
        return True

    def _add_cuda(self, extension: Extension, nvcc: str) -> None:
        objects = []
        known = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
        ).stdout.split()
        architectures = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
        if not architectures:
            message = f"ipvrm: {nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}; impl='cuda' is off"
            if os.environ.get("IPVRM_CUDA") == "1":
                raise SystemExit(message)
            print(message, file=sys.stderr)
            return
        gencode = []
        for arch in architectures:
            gencode += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        newest = architectures[-1]
        gencode += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
        runs = []
        for source in CUDA_SOURCES:  # at once, and each for all architectures at once
            target = Path(self.build_temp) / (Path(source).stem + ".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [
                nvcc,
                "-c",
                source,
                "-o",
                str(target),
                "-O3",
                "-std=c++17",
                "--threads",
                "0",
                "--cudart=static",
                "-Icsrc",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                *gencode,
            ]
            print(" ".join(command), flush=True)
            runs.append((command, subprocess.Popen(command, cwd=ROOT)))
            objects.append(str(target))
        codes = [run.wait() for _, run in runs]
        for (command, _), code in zip(runs, codes, strict=True):
            if code:
                error = subprocess.CalledProcessError(code, command)
                if os.environ.get("IPVRM_CUDA") == "1":
                    raise error
                print(f"ipvrm: CUDA sources were not compiled ({error}); impl='cuda' is off", file=sys.stderr)
                return
        extension.extra_objects += objects
        extension.define_macros += [("IPVRM_WITH_CUDA", "1")]
        cuda_root = Path(nvcc).resolve().parent.parent
        for folder in (
            cuda_root / "lib64",
            cuda_root / "targets" / "x86_64-linux" / "lib",
            cuda_root / "targets" / "sbsa-linux" / "lib",
        ):
            if (folder / "libcudart_static.a").is_file():
                extension.library_dirs.append(str(folder))
                break
        extension.libraries += ["cudart_static", "dl", "pthread", "rt"]


def extensions() -> list[Extension]:
    import pybind11

    return [
        Extension(
            "ipvrm_kernels._C",
            sources=CPP_SOURCES,
            include_dirs=[pybind11.get_include(), "csrc"],
            depends=[f"csrc/{path.name}" for path in sorted((ROOT / "csrc").glob("*"))],
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
