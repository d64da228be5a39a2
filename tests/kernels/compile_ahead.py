"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU; print one JSON object for each.

Run by test_ahead_of_time.py in its own process, since the interpreter and the compiler exclude each other, or
by hand: python tests/kernels/compile_ahead.py
"""

import importlib
import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# modules, not the functions of the same names that the package exports
segment_scan = importlib.import_module("ipvrm_kernels.segment_scan")
prefix_values = importlib.import_module("ipvrm_kernels.prefix_values")
prefix_value_loss = importlib.import_module("ipvrm_kernels.prefix_value_loss")

warnings.filterwarnings("ignore")
POINTERS = {"cu_seqlens_ptr": "*i32"}
# kernel, constexprs of its main configurations
CASES = [
    (segment_scan._segment_scan_kernel, {"REVERSE": True, "BLOCK_T": 1024}),
    (segment_scan._segment_scan_kernel, {"REVERSE": False, "BLOCK_T": 1024}),
    (prefix_values._prefix_values_fwd_kernel, {"BLOCK_T": prefix_values.BLOCK_T}),
    (
        prefix_values._prefix_values_bwd_kernel,
        dict(HAS_DVALUE=True, HAS_DMEAN=True, HAS_DPROB=True, HAS_DTD=True, BLOCK_T=prefix_values.BLOCK_T),
    ),
    *(
        (
            prefix_value_loss._prefix_value_loss_fwd_kernel,
            dict(WEIGHTING=weighting, PER_SEQUENCE=True, BLOCK_T=prefix_value_loss.BLOCK_T),
        )
        for weighting in prefix_value_loss.WEIGHTINGS
    ),
    (prefix_value_loss._prefix_value_loss_bwd_kernel, {"BLOCK_T": prefix_value_loss.BLOCK_T}),
]


def resources(ptx, capability):
    """{"registers", "spill_stores", "spill_loads"}, the last two in bytes, from Triton's own ptxas."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={arch}",
            source,
            "-o",
            Path(folder) / "kernel.o",
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", out.stderr)
    registers = re.search(r"Used (\d+) registers", out.stderr)
    return dict(registers=int(registers[1]), spill_stores=int(spills[1]), spill_loads=int(spills[2]))


def main():
    for kernel, constexprs in CASES:
        signature = {name: "constexpr" if name in constexprs else "fp32" for name in kernel.arg_names}
        for name in kernel.arg_names:
            if name.endswith("_ptr"):
                signature[name] = POINTERS.get(name, "*fp32")
        for capability in (80, 90, 100):
            built = triton.compile(
                ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", capability, 32)
            )
            record = dict(
                kernel=kernel.__name__, constexprs=constexprs, sm=capability, shared=built.metadata.shared
            )
            print(json.dumps({**record, **resources(built.asm["ptx"], capability)}), flush=True)


if __name__ == "__main__":
    main()
