"""What is read from machine code, on programs of a few lines whose costs and faults are known."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
spec = importlib.util.spec_from_file_location("sass", Path(__file__).with_name("sass.py"))
sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sass)

WGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"
STEP = f"""
step: SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R13
{WGMMA}
WARPGROUP.DEPBAR.LE gsb0, 0x1
BAR.SYNC.DEFER_BLOCKING 0x0
@UP2 UTMALDG.2D [UR16], [UR36]
@!P1 BRA step
WARPGROUP.DEPBAR.LE gsb0, 0x0
"""
# a tile: 3 to start it, the step of D, then 1 wait, 1 branch over the mask, 5 of the epilogue and its end
KERNEL = f"""
S2R R0, SR_TID.X
tile: MOV R1, R2
UTMALDG.2D [UR16], [UR36]
BAR.SYNC.DEFER_BLOCKING 0x0
{STEP}
@!P0 BRA whole
FSEL R24, R24, -INF , P1
FSEL R25, R25, -INF , P1
whole: FADD R24, R24, -R0
MUFU.EX2 R24, R24
MUFU.EX2 R25, R25
NOP
STG.E desc[UR4][R2.64], R24
@P2 BRA tile
EXIT
"""


# as of hidden in bf16 that no descriptor addresses (the threads store it) and weight in fp32 (by cp.async)
POINTERS = f"""
LDGSTS.E [R84], desc[UR18][R22.64], P2
LDGDEPBAR
step: @!PT LDS RZ, [RZ]
DEPBAR.LE SB0, 0x0
BAR.SYNC.DEFER_BLOCKING 0x0
LDS R122, [R76+UR4]
STS.U16 [R60+UR8+0x6000], R122
BAR.SYNC.DEFER_BLOCKING 0x0
{WGMMA}
WARPGROUP.DEPBAR.LE gsb0, 0x0
BAR.SYNC.DEFER_BLOCKING 0x0
@P1 LDGSTS.E [R84], desc[UR18][R22.64], P6
LDGDEPBAR
@!P3 BRA step
EXIT
"""
BARRIER, STORE = "BAR.SYNC.DEFER_BLOCKING 0x0\n", "STS.U16 [R60], R122\n"
REFILL = f"{BARRIER}@P1 LDGSTS"


def assembled(text):
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    labels = {line.partition(":")[0]: 16 * i for i, line in enumerate(lines) if re.match(r"\w+:", line)}
    code = []
    for i, line in enumerate(lines):
        line = re.sub(r"^\w+:\s*", "", line)
        line = re.sub(r"BRA (\w+)$", lambda m: f"BRA {labels[m[1]]:#x}", line)
        opcode = re.sub(r"^@!?U?P[T\d]\s+", "", line).split()[0]
        code.append(sass.Instruction(16 * i, opcode, line))
    return code


def test_cost_of_a_tile_leaves_out_the_mask_and_the_step():
    cost = sass.tile_cost(assembled(KERNEL), 2)
    assert cost == (7 / 2, 3 / 2)
    masked = KERNEL.replace("@!P0 BRA whole\n", "")  # every tile pays
    assert sass.tile_cost(assembled(masked), 2).epilogue == 8 / 2


def test_cost_needs_an_exp2_for_each_logit():
    assert sass.tile_cost(assembled("MOV R1, R2\nEXIT"), 2) is None  # nothing is multiplied
    with pytest.raises(AssertionError, match="no way around the tile loop"):
        sass.tile_cost(assembled(KERNEL), 3)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("gdesc[UR12], R24, gsb0", "R88, gdesc[UR12], R24, gsb0", "comes from registers"),
        (WGMMA, f"{WGMMA}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n{WGMMA}", "waits for the one before it"),
        ("0x1\nBAR.SYNC.DEFER_BLOCKING 0x0\n", "0x1\n", "refilled before every warp has left it"),
    ],
)
def test_faults_of_the_pipeline(right, wrong, said):
    assert sass.pipeline_faults(assembled(KERNEL)) == []
    assert right in KERNEL
    found = sass.pipeline_faults(assembled(KERNEL.replace(right, wrong)))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            REFILL,
            "STS.U16 [R60], R122\nBAR.SYNC.DEFER_BLOCKING 0x0\n@P1 LDGSTS",
            "refilled before every warp",
        ),
        ("DEPBAR.LE SB0, 0x0\n", "", "read before a wait and a barrier: LDS R122"),
        (
            "SB0, 0x0\nBAR.SYNC.DEFER_BLOCKING 0x0\n",
            "SB0, 0x0\n",
            "read before a wait and a barrier: LDS R122",
        ),
    ],
    ids=["stores", "no wait", "no barrier"],
)
def test_faults_of_operands_that_no_descriptor_addresses(right, wrong, said):
    assert sass.pipeline_faults(assembled(POINTERS)) == []
    assert right in POINTERS
    assert any(said in found for found in sass.pipeline_faults(assembled(POINTERS.replace(right, wrong))))


def test_a_stage_released_too_early_is_a_fault():
    """By a warpgroup to a warp that loads: all four warps must have waited for their matmul."""
    release = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9+0x300a0], RZ"
    load = "@UP2 UTMALDG.2D [UR16], [UR36]"
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0\n"
    assert sass.pipeline_faults(assembled(KERNEL.replace(f"{barrier}{load}", f"{barrier}{release}"))) == []
    (found,) = sass.pipeline_faults(assembled(KERNEL.replace(f"{barrier}{load}", f"{release}\n{barrier}")))
    assert "released before every warp has left it" in found


def test_spills_and_programs():
    assert sass.spills(assembled("STL [R1], R5\nLDL.64 R6, [R1]\nLDG R2, [R4]\nEXIT")) == 2
    assert sass.programs_per_sm(255, 8, 100 << 10, 90) == 1  # by registers
    assert sass.programs_per_sm(239, 4, 98328, 90) == 2  # by both
    assert sass.programs_per_sm(128, 4, 200 << 10, 90) == 1  # by shared memory
