"""Compile every Triton kernel for sm_80, sm_90 and sm_100, and the tiles that sm_120 borrows, without a GPU;
print one JSON object for each.

Run by test_ahead_of_time.py in its own process, since the interpreter and the compiler exclude each other, or
by hand: python tests/kernels/compile_ahead.py [80] [90] [100] [120]
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# modules, not the functions of the same names that the package exports
segment_scan = importlib.import_module("ipvrm_kernels.segment_scan")
prefix_values = importlib.import_module("ipvrm_kernels.prefix_values")
clipped_surrogate = importlib.import_module("ipvrm_kernels.clipped_surrogate")
distrl_loss = importlib.import_module("ipvrm_kernels.distrl_loss")
prefix_value_loss = importlib.import_module("ipvrm_kernels.prefix_value_loss")

triton_forward = importlib.import_module("ipvrm_kernels.head.triton_forward")
triton_backward = importlib.import_module("ipvrm_kernels.head.triton_backward")
triton_ids = importlib.import_module("ipvrm_kernels.head.triton_ids")
triton_tiles = importlib.import_module("ipvrm_kernels.head.triton_tiles")
linear_candidates = importlib.import_module("ipvrm_kernels.linear_candidates")

warnings.filterwarnings("ignore")
POINTERS = {
    "cu_seqlens_ptr": "*i32", "groups_ptr": "*i32", "counts_ptr": "*i64", "best_ids_ptr": "*i64",
    "token_ids_ptr": "*i64", "candidate_ids_ptr": "*i64", "clipped_ptr": "*i1", "dual_clipped_ptr": "*i1",
    "count_ptr": "*i32", "target_ptr": "*i64", "flags_ptr": "*i1",
}  # fmt: skip
FLOATS = (
    "decay_high",
    "decay_low",
    "beta",
    "margin",
    "scale",
    "cap",
    "factor",
    "gain",
    "low",
    "margin_value",
    "inverse_divisor",
)
INTEGERS = ("count", "N", "B", "K", "num_halvings", "row0", "num_rows", "num_blocks")
ALIGNED = ("D", "C", "hidden_stride", "weight_stride")  # multiples of 16, as in every model
# kernel, constexprs of its main configurations
CASES = [
    (segment_scan._segment_scan_kernel, {"DECAYED": True, "REVERSE": True, "BLOCK_T": 1024}),
    (segment_scan._segment_scan_kernel, {"DECAYED": False, "REVERSE": False, "BLOCK_T": 1024}),
    (prefix_values._prefix_values_fwd_kernel, {"BLOCK_T": prefix_values.BLOCK_T}),
    (
        prefix_values._prefix_values_bwd_kernel,
        dict(HAS_DVALUE=True, HAS_DMEAN=True, HAS_DPROB=True, HAS_DTD=True, BLOCK_T=prefix_values.BLOCK_T),
    ),
    *(
        (
            prefix_value_loss._prefix_value_loss_fwd_kernel,
            dict(
                WEIGHTING=weighting,
                PER_SEQUENCE=not count,
                COUNT=count,
                HAS_MARGIN=not count,
                HAS_WEIGHT=not count,
                HAS_DENOMINATOR=not count,
                NEEDS_GRADIENT=True,
                BLOCK_T=prefix_value_loss.BLOCK_T,
            ),
        )
        for weighting, count in (("uniform", False), ("late", False), ("early", True))
    ),
    (prefix_value_loss._prefix_value_loss_bwd_kernel, {"BLOCK_T": prefix_value_loss.BLOCK_T}),
    (clipped_surrogate._clipped_surrogate_fwd_kernel, {"BLOCK": clipped_surrogate.BLOCK}),
    (clipped_surrogate._clipped_surrogate_bwd_kernel, {"BLOCK": clipped_surrogate.BLOCK}),
    *(
        (
            distrl_loss._distrl_objective_kernel,
            dict(
                TOKEN_REDUCTION=token,
                CANDIDATE_REDUCTION=candidates,
                TOKEN_POINTER=given,
                CANDIDATE_POINTER=given,
                BLOCK=distrl_loss.BLOCK,
            ),
        )
        for token, candidates, given in (
            ("sequence_mean", "sequence_mean", False),  # paper
            ("token_mean", "old_prob_mean", True),  # release
        )
    ),
    (distrl_loss._finish_objective_kernel, {"BLOCK": 128}),
]


def head_cases(capability):
    """(kernel, constexprs, types, options) of the head in bf16, bf16 with an fp32 weight, and fp32."""
    for (architecture, kind), config in triton_tiles.CONFIGS.items():
        if architecture != triton_tiles.tiles_of(capability // 10):
            continue
        own, tma = "fp32" if kind == "fp32" else "bf16", capability >= 90
        wide = "bf16" if kind == "half" else "fp32"  # the weight's dtype

        def operand(rows, columns, dtype=own, tma=tma):
            return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"

        types = dict(
            kind=kind, hidden=operand(config.BLOCK_N, config.BLOCK_D),
            weight=operand(config.BLOCK_V, config.BLOCK_D, wide),
            da=operand(config.BLOCK_N, config.BLOCK_V), saved=operand(config.BLOCK_N, config.BLOCK_V),
            bias_ptr=f"*{wide}", hidden_ptr=f"*{own}", weight_ptr=f"*{wide}", da_ptr=f"*{own}",
            x_ptr=f"*{own}", ids_ptr="*i64",
        )  # fmt: skip
        tiles = dict(HAS_BIAS=False, HAS_SOFTCAP=False, ENTROPY=True, ROW_GROUP=64, TMA=tma, UPCAST=False,
                     FLATTEN=tma, BLOCK_N=config.BLOCK_N, BLOCK_V=config.BLOCK_V, BLOCK_D=config.BLOCK_D,
                     )  # fmt: skip
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        split = dict(GROUP=triton_forward.GROUP, MAX_LIFT=triton_forward.MAX_LIFT)
        plain, saving = ({**tiles, **split, "GROUPS": False, "SAVE": save} for save in (False, True))
        dense = {**tiles, "ENTROPY": False, "SCATTER": False}
        yield triton_forward._head_stats_kernel, saving, types, options
        if capability == 120:  # what needs most shared memory
            continue
        every = capability == 90  # of the variants, which take seconds each
        if kind != "master" or every:
            yield triton_backward._head_dz_kernel, dense, types, options
        if kind == "master":  # the rest is as half's
            continue
        yield triton_forward._head_stats_kernel, {**plain, "GROUPS": True}, types, options
        if every:
            yield triton_forward._head_stats_kernel, plain, types, options
            yield triton_backward._head_dz_kernel, {**dense, "ENTROPY": True}, types, options
        narrow = triton_backward.scatter_config(config).BLOCK_V
        scattered = {**types, "da": f"*{own}", "weight": operand(narrow, config.BLOCK_D)}
        dense |= dict(SCATTER=True, BLOCK_V=narrow)
        yield triton_backward._head_dz_kernel, dense, scattered, options
        if config.softcap_V is not None:
            softcap = dict(HAS_BIAS=True, HAS_SOFTCAP=True, BLOCK_V=config.softcap_V)
            shape = operand(config.BLOCK_N, config.softcap_V)
            capped = dict(weight=operand(config.softcap_V, config.BLOCK_D), saved=shape, da=shape)
            yield triton_forward._head_stats_kernel, {**saving, **softcap}, {**types, **capped}, options
            entropy = {**dense, **softcap, "ENTROPY": True, "SCATTER": False}
            if every:
                yield triton_backward._head_dz_kernel, entropy, {**types, **capped}, options
        gather = dict(BLOCK_IDS=64, BLOCK_D=config.BLOCK_D, HAS_BIAS=False, HAS_SOFTCAP=False, UPCAST=False)
        warps = triton_forward.id_warps(torch.float32 if kind == "fp32" else torch.bfloat16)
        gather_options = dict(num_warps=warps, num_stages=3)
        yield triton_forward._id_logits_kernel, gather, types, gather_options
        if kind == "fp32":
            continue
        yield triton_forward._merge_stats_kernel, dict(ENTROPY=True, BLOCK_S=256, BLOCK_N=8), types, {}
        sparse = dict(HAS_SOFTCAP=False, ENTROPY=False, DISTINCT=False, BLOCK_N=64, BLOCK_K=16)
        yield triton_ids._id_gradients_kernel, sparse, types, {}
        yield triton_ids._patch_kernel, dict(ZERO=False, BLOCK=256), types, {}
        yield triton_backward._zero_rows_kernel, dict(BLOCK=4096), types, {}
        sums = dict(HAS_FACTOR=True, BLOCK_N=32, BLOCK_C=128)
        yield triton_backward._column_sums_kernel, sums, types, {}
        rows = dict(ROUND=tl.bfloat16, BLOCK_N=8, BLOCK_D=256)
        yield triton_ids._id_rows_kernel, rows, types, {}
        select = dict(SLOTS=10, BLOCK_N=1, BLOCK_GROUPS=8192)
        yield linear_candidates._select_groups_kernel, select, types, dict(num_warps=8)
        for columns in (512, 4096, linear_candidates.MAX_COLUMNS):
            best, warps = dict(BLOCK_N=1, BLOCK_M=columns), linear_candidates.best_warps(columns)
            kernel, ids = linear_candidates._best_candidates_kernel, {**types, "ids_ptr": "*i32"}
            yield kernel, best, ids, dict(num_warps=warps)


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


def compiled(kernel, constexprs, capability, types, options, scalar):
    """One JSON record: resources, and which of the architecture's instructions the code uses."""
    signature = {name: "constexpr" if name in constexprs else scalar for name in kernel.arg_names}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr") or name in types:
            signature[name] = types.get(name, POINTERS.get(name, "*fp32"))
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in INTEGERS:
            signature[name] = "i32"
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
        if scalar == "i32" and (name in ALIGNED or signature[name].startswith("*"))
    }  # fmt: skip
    source = ASTSource(kernel, signature, constexprs, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    return dict(
        kernel=kernel.__name__, constexprs={k: str(v) for k, v in constexprs.items()}, sm=capability,
        operands=types.get("kind"), shared=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"), tma=ptx.count("cp.async.bulk.tensor"),
        **resources(ptx, capability),
    )  # fmt: skip


def main():
    for capability in [int(argument) for argument in sys.argv[1:]] or (80, 90, 100):
        for kernel, constexprs in CASES if capability != 120 else ():
            print(json.dumps(compiled(kernel, constexprs, capability, {}, {}, "fp32")), flush=True)
        for kernel, constexprs, types, options in head_cases(capability):
            print(json.dumps(compiled(kernel, constexprs, capability, types, options, "i32")), flush=True)


if __name__ == "__main__":
    main()
