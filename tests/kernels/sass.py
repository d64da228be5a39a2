"""What the machine code of a compiled Triton kernel says: instructions per logit, registers, spills, and
faults of the matmul's pipeline that no result on a CPU can show. Read with the disassembler that Triton has.

The cost of a tile is that of the shortest way around the tile loop, through one step of D and every exp2 of
the epilogue, less that step: branches for the last tile and waits that succeed at once cost nothing.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

RELEASE = "SYNCS.ARRIVE.TRANS64.A1T0"  # an arrival without bytes, at a barrier that a loading warp waits for
MATMUL = ("HGMMA", "HMMA", "UTCHMMA")  # of sm_90, sm_80, sm_100
REGISTERS = 65536  # of a multiprocessor; a warp takes them by 256
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}  # bytes of a multiprocessor
RESERVED = 1 << 10  # bytes of shared memory that each program takes besides its own
THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}


class Instruction(NamedTuple):
    address: int
    opcode: str  # HGMMA.64x256x16.F32.BF16
    text: str

    def is_a(self, *names: str) -> bool:
        return any(self.opcode == name or self.opcode.startswith(f"{name}.") for name in names)


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int]

    def count(self, *names: str) -> int:
        return sum(x.is_a(*names) for x in self.instructions)

    @property
    def cost(self) -> int:
        return len(self.instructions) - self.count("NOP")


class Cost(NamedTuple):
    """Instructions of a thread for each tile, per logit of its own."""

    epilogue: float  # from the last step of D to the end of the tile loop
    start: float  # the rest: where the tile lies, its first loads


def cuobjdump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def registers(cubin: bytes) -> int:
    """Registers of a thread."""
    found = re.search(r"REG:(\d+)", cuobjdump(cubin, "-res-usage"))
    assert found, "cuobjdump reports no registers"
    return int(found[1])


def programs_per_sm(registers: int, warps: int, shared: int, capability: int) -> int:
    """Programs that one multiprocessor holds at once."""
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS // of_a_warp // warps,
        SHARED[capability] // (shared + RESERVED),
        THREADS[capability] // (32 * warps),
    )


def disassembled(cubin: bytes) -> list[Instruction]:
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", cuobjdump(cubin, "-sass"), re.MULTILINE)
    assert found, "cuobjdump disassembles nothing"
    code = []
    for address, text in found:
        opcode = re.sub(r"^@!?U?P[T\d]\s+", "", text.strip()).split()[0]
        code.append(Instruction(int(address, 16), opcode, text.strip()))
    return code


def blocks(code: list[Instruction]) -> list[Block]:
    """The control-flow graph."""
    at = {x.address: i for i, x in enumerate(code)}
    targets, starts = {}, {0}
    for i, x in enumerate(code):
        if x.is_a("BRA", "EXIT", "RET"):
            starts.add(i + 1)
        if x.is_a("BRA"):
            targets[i] = at[int(re.findall(r"0x([0-9a-f]+)", x.text)[-1], 16)]
            starts.add(targets[i])
    first = sorted(i for i in starts if i < len(code))
    number = {i: n for n, i in enumerate(first)}
    graph = []
    for n, i in enumerate(first):
        end = first[n + 1] if n + 1 < len(first) else len(code)
        last = code[end - 1]
        followers = [number[targets[end - 1]]] if last.is_a("BRA") else []
        always = not last.text.startswith("@") and not re.search(r"BRA\S*\s+!?U?P\d,", last.text)
        if end < len(code) and not (last.is_a("BRA", "EXIT", "RET") and always):
            followers.append(n + 1)
        graph.append(Block(code[i:end], followers))
    return graph


def shortest(graph: list[Block], start: int, goal: int) -> list[int] | None:
    """The blocks after `start` up to and with `goal` that cost least together; `goal` may be `start`."""
    heap = [(graph[n].cost, n, (n,)) for n in graph[start].followers]
    heapq.heapify(heap)
    done = set()
    while heap:
        cost, n, path = heapq.heappop(heap)
        if n == goal:
            return list(path)
        if n not in done:
            done.add(n)
            for follower in graph[n].followers:
                heapq.heappush(heap, (cost + graph[follower].cost, follower, (*path, follower)))
    return None


def tile_cost(code: list[Instruction], logits: int) -> Cost | None:
    """Cost of a kernel with tiles of `logits` for each thread; None without tensor cores, or where no loop
    over D stands by itself (sm_100).

    Raises AssertionError where no way around the tile loop has an exp2 for each logit.
    """
    graph = blocks(code)
    steps = {n: shortest(graph, n, n) for n, block in enumerate(graph) if block.count(*MATMUL)}
    steps = {
        n: step for n, step in steps.items() if step and not any(graph[b].count("MUFU.EX2") for b in step)
    }
    if not steps:
        return None
    ways = []
    for n, step in steps.items():
        for middle, block in enumerate(graph):
            if block.count("MUFU.EX2") < logits / 8:
                continue
            there, back = shortest(graph, n, middle), shortest(graph, middle, n)
            if there is None or back is None:
                continue
            if sum(graph[b].count("MUFU.EX2") for b in there + back) >= logits:
                ways.append((sum(graph[b].cost for b in there + back), step, there, back))
    assert ways, "no way around the tile loop has an exp2 for each logit"
    _, step, there, back = min(ways)
    before = [there[-1], *back]
    ends = next(i for i, n in enumerate(back) if n in step or n <= before[i])
    epilogue, start = there + back[:ends], back[ends:]
    return Cost(*(sum(graph[b].cost for b in part if b not in step) / logits for part in (epilogue, start)))


def spills(code: list[Instruction]) -> int:
    """Loads and stores of local memory."""
    return sum(x.is_a("LDL", "STL") for x in code)


def pipeline_faults(code: list[Instruction]) -> list[str]:
    """What is wrong or slow about the wgmma and the loads of a kernel of sm_90, in words.

    A stage of wgmma is filled by TMA or, of operands that no descriptor addresses, by the threads' stores.
    What cp.async fills here is read by the threads, which store its copy for wgmma: of it is seen that a wait
    and a barrier stand before a read, not for how many groups is waited, nor when it fills a stage again.
    """
    found = []
    own = () if any(x.is_a("UTMALDG") for x in code) else ("STS", "STSM")
    waiting = last_wait = None  # wgmma in flight; the wait after which no barrier came yet
    landing = waited = False  # cp.async in flight; the wait for it after which no barrier came yet
    for x in code:
        if landing and x.is_a("HGMMA", "LDS", "LDSM") and "[RZ]" not in x.text:
            found.append(f"{x.address:#x}: what cp.async loads is read before a wait and a barrier: {x.text}")
        if x.is_a("LDGSTS"):
            landing, waited = True, False
        elif x.is_a("DEPBAR"):
            waited = True
        if x.is_a("HGMMA"):
            if not re.search(r"^\S*\s*R\d+, gdesc\[", x.text[x.text.index("HGMMA") :]):
                found.append(f"{x.address:#x}: an operand of wgmma comes from registers: {x.text}")
            if last_wait is not None and last_wait.text.endswith("0x0"):
                found.append(f"{x.address:#x}: wgmma waits for the one before it")
            waiting, last_wait = x, None
        elif x.is_a("WARPGROUP.DEPBAR") and waiting is not None:
            last_wait = x
        elif x.is_a("BAR"):
            waiting = last_wait = None
            landing = landing and not waited
        elif x.is_a("UTMALDG", *own) and waiting is not None:
            found.append(f"{x.address:#x}: a stage is refilled before every warp has left it")
        elif x.opcode == RELEASE and waiting is not None:
            found.append(f"{x.address:#x}: a stage is released before every warp has left it")
    return found
