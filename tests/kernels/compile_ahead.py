"""Compile every Triton kernel for sm_80, sm_90 and sm_100, and the tiles that sm_120 borrows, without a GPU;
print one JSON object for each.

Run by test_ahead_of_time.py in its own process, since the interpreter and the compiler exclude each other, or
by hand: python tests/kernels/compile_ahead.py [80] [90] [100] [120] [--heads] [--table F]

--heads: the kernels with tiles alone. --few: on other architectures than sm_90 only what needs most of each
kind. --gluon: the study of benchmarks/gpu alone. --sweep: some of what benchmarks/gpu/sweep.py tries, alone.
--table F: the head's kernels and the study as the table that the tests compare with, which is in
benchmarks/results/kernels, named by the version of Triton that stands before this torch on PYTHONPATH.
--ones: no machine code, but every kernel with integers that are 1.
"""

import argparse
import csv
import importlib
import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import sass
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource

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
    "unit",
)
INTEGERS = ("count", "N", "B", "K", "num_halvings", "row0", "num_rows", "num_blocks")
ALIGNED = ("C", "D", "hidden_stride", "weight_stride")  # multiples of 16, as in every model; C always
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


def operand(kind, rows, columns, tma):
    return f"tensordesc<{kind}[{rows}, {columns}]>" if tma else f"*{kind}"


def tile_types(config, own, wide, tma):
    """Types of the arguments that depend on the tiles and on the dtypes of hidden and weight."""
    result = operand(own, config.BLOCK_N, config.BLOCK_V, tma)
    return dict(
        hidden=operand(own, config.BLOCK_N, config.BLOCK_D, tma),
        weight=operand(wide, config.BLOCK_V, config.BLOCK_D, tma), da=result, saved=result,
        bias_ptr=f"*{wide}", hidden_ptr=f"*{own}", weight_ptr=f"*{wide}", da_ptr=f"*{own}",
        x_ptr=f"*{own}", ids_ptr="*i64",
    )  # fmt: skip


def tile_case(kernel, config, kind, tma, softcap=False, aligned=True, **constexprs):
    """(kernel, constexprs, types, options) of one with tiles: forward, groups, saved or dz.

    aligned: D and the strides are multiples of 16; a D that is no multiple of 8 comes through pointers.
    """
    config = config.of(30.0 if softcap else None)
    own = "fp32" if kind == "fp32" else "bf16"
    types = tile_types(config, own, "bf16" if kind == "half" else "fp32", tma)
    constexprs = dict(
        HAS_BIAS=softcap, HAS_SOFTCAP=softcap, ROW_GROUP=64, TMA=tma, UPCAST=False,
        FLATTEN=config.flatten and tma, BLOCK_N=config.BLOCK_N, BLOCK_V=config.BLOCK_V,
        BLOCK_D=config.BLOCK_D, **constexprs,
    )  # fmt: skip
    if kernel == "dz":
        constexprs = {"ENTROPY": False, "SCATTER": False, **constexprs}
        if constexprs["SCATTER"]:
            types["da"] = f"*{own}"
    else:
        constexprs = {
            "RAW": not softcap, "ENTROPY": False, "GROUPS": kernel == "groups", "SAVE": kernel == "saved",
            "GROUP": triton_forward.GROUP, "MAX_LIFT": triton_forward.MAX_LIFT, **constexprs,
        }  # fmt: skip
    function = triton_backward._head_dz_kernel if kernel == "dz" else triton_forward._head_stats_kernel
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    return function, constexprs, types | dict(kind=kind, label=kernel, aligned=aligned), options


def most_alone(capability, few):
    """Whether of an architecture only the kernel of each kind that needs most registers and shared memory is
    compiled: sm_120 borrows sm_80's tiles, and `few` spares what .ci/full compiles."""
    return capability == 120 or (few and capability != 90)


def tile_cases(capability, few=False):
    """The kernels with tiles, in bf16, bf16 with an fp32 weight, and fp32."""
    architecture, tma = triton_tiles.tiles_of(capability // 10), capability >= 90
    for kind in ("half", "master", "fp32"):
        forward, groups, saved, dz = (
            triton_tiles.config_of(architecture, kind, kernel) for kernel in triton_tiles.KERNELS
        )
        yield tile_case("saved", saved, kind, tma)
        if most_alone(capability, few):
            continue
        every = capability == 90  # of the variants, which take seconds each
        if kind != "master" or every:
            yield tile_case("dz", dz, kind, tma)
        if kind == "master":  # the rest is as half's
            if every:
                yield from unaligned_cases(kind, ("saved", "dz"))
            continue
        yield tile_case("groups", groups, kind, tma)
        if every:
            yield tile_case("forward", forward, kind, tma)
            yield tile_case("forward", forward, kind, tma, ENTROPY=True)
            yield tile_case("groups", groups, kind, tma, ENTROPY=True)
            yield tile_case("dz", dz, kind, tma, ENTROPY=True)
        if every:
            yield from unaligned_cases(kind, triton_tiles.KERNELS if kind == "half" else ("saved", "dz"))
        yield tile_case("dz", triton_backward.scatter_config(dz), kind, tma, SCATTER=True)
        if forward.softcap_V is not None:
            yield tile_case("saved", saved, kind, tma, softcap=True, ENTROPY=True)
            if every:
                yield tile_case("dz", dz, kind, tma, softcap=True, ENTROPY=True)


def unaligned_cases(kind, kernels):
    """Operands that no descriptor addresses, as D is no multiple of 8: pointers, and sm_80's tiles."""
    for kernel in kernels:
        config = triton_tiles.config_of("sm_80", kind, kernel)
        yield tile_case(kernel, config, kind, False, aligned=False, ENTROPY=kernel != "dz")


def sweep_cases():
    """What the sweep tries on an sm_90 besides the tiles in use, of the two kernels whose programs need most:
    groups with the entropy most registers, dz most shared memory."""
    sweep = importlib.import_module("benchmarks.gpu.sweep")
    for kernel in ("groups", "dz"):
        for config in sweep.choices(kernel, "sm_90", "half")[1:]:
            flags = {"ENTROPY": True} if kernel == "groups" else {}
            function, constexprs, types, options = tile_case(kernel, config, "half", True, **flags)
            yield function, constexprs, types | dict(asked=config.programs_per_sm), options


def head_cases(capability, few=False):
    """(kernel, constexprs, types, options) of the head."""
    yield from tile_cases(capability, few)
    if most_alone(capability, few):
        return
    for kind in ("half", "fp32"):
        config = triton_tiles.CONFIGS[triton_tiles.tiles_of(capability // 10), kind]
        own = "fp32" if kind == "fp32" else "bf16"
        types = tile_types(config, own, own, False) | dict(kind=kind)
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
        copied = {**types, "order_ptr": "*i64", "out_ptr": f"*{own}"}
        yield triton_backward._gather_rows_kernel, dict(BLOCK=1024), copied, {}
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


def gluon_case():
    """(kernel, constexprs, types, options) of benchmarks/gpu/gluon_study.py; eight warps share its logits."""
    study = importlib.import_module("benchmarks.gpu.gluon_study")
    constexprs = study.constexprs(64)

    def descriptor(rows):
        return f"tensordesc<bf16[{rows}, {constexprs['BLOCK_D']}],{study.shared_layout(rows)!r}>"

    types = dict(
        hidden=descriptor(constexprs["BLOCK_N"] // 2), weight=descriptor(constexprs["BLOCK_V"]), kind="half",
        label="gluon", multiplying=8,
    )  # fmt: skip
    return study._gluon_stats_kernel, constexprs, types, study.options()


def spilled_bytes(ptx, capability):
    """Bytes of spills by the ptxas of Triton; local memory is also the stack of a slow path."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "kernel.ptx", Path(folder) / "kernel.o"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", source, "-o", built]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr)
    return sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", out.stderr).groups()))


def signature_of(kernel, constexprs, types, scalar):
    """The types of a kernel's arguments."""
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
    return signature


def compiled(kernel, constexprs, capability, types, options, scalar):
    """One JSON record: resources, and which of the architecture's instructions the code uses."""
    signature = signature_of(kernel, constexprs, types, scalar)
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
        if scalar == "i32" and (
            name in ALIGNED[: None if types.get("aligned", True) else 1] or signature[name].startswith("*")
        )
    }  # fmt: skip
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, code = built.asm["ptx"], sass.disassembled(built.asm["cubin"])
    warps, registers = built.metadata.num_warps, sass.registers(built.asm["cubin"])
    spills = sass.spills(code)
    if spills and not spilled_bytes(ptx, capability):
        spills = 0
    cost = None
    if "label" in types:
        threads = 32 * types.get("multiplying", warps)
        logits = constexprs["BLOCK_N"] * constexprs["BLOCK_V"] // threads
        cost = sass.tile_cost(code, logits)
    record = dict(
        kernel=kernel.__name__, constexprs={k: str(v) for k, v in constexprs.items()}, sm=capability,
        operands=types.get("kind"), label=types.get("label"), warps=warps,
        stages=options.get("num_stages") or constexprs.get("STAGES"),
        shared=built.metadata.shared, wgmma=ptx.count("wgmma.mma_async"),
        tma=ptx.count("cp.async.bulk.tensor"), registers=registers, spills=spills,
        programs=sass.programs_per_sm(registers, warps, built.metadata.shared, capability),
        epilogue=cost and cost.epilogue, start=cost and cost.start,
        faults=sass.pipeline_faults(code) if capability == 90 else [],
    )  # fmt: skip
    if "asked" in types:
        record["asked"] = types["asked"]
    elif "kind" in types:
        record["row"] = table_row(record)
    return record


FIELDS = (
    "sm", "kernel", "operands", "variant", "tile", "warps", "stages", "registers", "shared", "spills",
    "programs", "epilogue", "start",
)  # fmt: skip
FLAGS = ("ENTROPY", "SCATTER", "HAS_SOFTCAP", "HAS_BIAS", "FLATTEN")


def table_row(record):
    """The record of a kernel of the head as a row of FIELDS, all text; one without tiles has no label."""
    constexprs = record["constexprs"]
    row = {name: record[name] for name in FIELDS if name in record}
    if record["label"]:
        flags = [f.lower() for f in FLAGS if constexprs.get(f) == "True"]
        variant = " ".join(flags + ["pointers"] * (not record["tma"]))
        tile = "x".join(constexprs[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D"))
        row |= dict(kernel=record["label"], variant=variant, tile=tile)
    else:
        row |= dict(variant=" ".join(f"{k}={v}" for k, v in constexprs.items()), tile="")
    for name in ("stages", "epilogue", "start"):
        row[name] = "" if record[name] is None else record[name]
    for name in ("epilogue", "start"):
        row[name] = row[name] and f"{row[name]:.2f}"
    return {name: str(row[name]) for name in FIELDS}


def lowered_with_ones(kernel, constexprs, capability, types, options, scalar):
    """One JSON record: the integers that Triton makes constants where they are 1, each of them alone and all
    together such, lowered by the front end, where a constant that has no `.to` fails."""
    signature = signature_of(kernel, constexprs, types, scalar)
    fixed = {param.name for param in kernel.params if param.do_not_specialize}
    ones = [name for name, kind in signature.items() if kind == "i32" and name not in fixed]
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    backend_options = backend.parse_options(dict(options))
    for chosen in dict.fromkeys([*((name,) for name in ones), tuple(ones)]):
        given = {name: "constexpr" if name in chosen else kind for name, kind in signature.items()}
        source = ASTSource(kernel, given, {**constexprs, **dict.fromkeys(chosen, 1)}, {})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        generators = backend.get_codegen_implementation(backend_options)
        source.make_ir(target, backend_options, generators, backend.get_module_map(), context)
    return dict(kernel=kernel.__name__, ones=ones)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--ones", action="store_true")
    parser.add_argument("--gluon", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    rows = []
    for capability in options.capability:
        cases = []
        if not options.heads and not options.table:
            cases = [
                (kernel, constexprs, {}, {}, "fp32")
                for kernel, constexprs in CASES
                if not most_alone(capability, options.few)
            ]
        found = tile_cases if options.heads else head_cases
        cases += [(*case, "i32") for case in found(capability, options.few)]
        if options.gluon or options.sweep:
            cases = [(*case, "i32") for case in sweep_cases()] if options.sweep else []
        if capability == 90 and (options.gluon or options.table):
            cases += [(*gluon_case(), "i32")]
        if options.ones:
            once = {(case[0].__name__, case[2].get("label"), case[2].get("kind")): case for case in cases}
            for kernel, constexprs, types, compiler_options, scalar in once.values():
                record = lowered_with_ones(kernel, constexprs, capability, types, compiler_options, scalar)
                print(json.dumps(record), flush=True)
            continue
        for kernel, constexprs, types, compiler_options, scalar in cases:
            record = compiled(kernel, constexprs, capability, types, compiler_options, scalar)
            print(json.dumps(record), flush=True)
            rows += [record["row"]] if "row" in record else []
    if options.table:
        with options.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
