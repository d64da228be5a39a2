"""What models answer and verifiers do: every answer gets the verdict that is known for it, or none at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from ipvrm.rollouts.verify import Verdict, VerifierPool

VERIFIER = '''
import ctypes, os, sys, time

def judge(response, answer):
    """Does what the response says."""
    kind, _, rest = response.partition(":")
    if kind == "hang":
        time.sleep(1000)
    if kind == "spin":
        while True:
            pass
    if kind == "exit":
        os._exit(int(rest))
    if kind == "leave":
        raise SystemExit(0)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    if kind == "raise":
        raise RuntimeError("\\ud800 no idea")
    if kind == "memory":
        held = bytearray(8 << 30)
        return bool(held)
    if kind == "print":
        print("{}" * 100000); print('{"outcome": "right"}', flush=True)
        os.write(1, b'{"outcome": "right"}\\n'); sys.stderr.write("x" * 100000)
        return rest == answer
    if kind == "junk":
        return {"nan": float("nan"), "text": "True", "two": 2, "list": [True]}[rest]
    if kind == "recurse":
        return judge(response, answer)
    if kind == "fork":
        if os.fork() == 0:
            time.sleep(1000)
        time.sleep(1000)
    return rest == answer
'''
FAULTS = {
    "hang": ("hang:", "timeout"), "spin": ("spin:", "timeout"), "fork": ("fork:", "timeout"),
    "exit": ("exit:0", "crash"), "exit 3": ("exit:3", "crash"), "segfault": ("segfault:", "crash"),
    "abort": ("abort:", "crash"), "leave": ("leave:", "error"), "raise": ("raise:", "error"),
    "memory": ("memory:", "error"), "nan": ("junk:nan", "error"), "text": ("junk:text", "error"),
    "two": ("junk:two", "error"), "list": ("junk:list", "error"), "recurse": ("recurse:", "error"),
}  # fmt: skip
DEADLINE = 3.0  # seconds of an answer


def faulty(folder: Path, rng: random.Random, count: int = 40) -> tuple[str, str | None]:
    """Answers among which some make the verifier hang, die, take memory or lie: each has its own verdict."""
    (folder / "fault_verifier.py").write_text(VERIFIER)
    pairs, wanted, injected = [], [], 0
    for _ in range(count):
        if rng.random() < 0.2:
            response, outcome = FAULTS[rng.choice(sorted(FAULTS))]
            injected += 1
        else:
            n, right = rng.randrange(100), rng.random() < 0.5
            kind = rng.choice(("plain", "plain", "plain", "print"))
            response, outcome = f"{kind}:{n if right else n + 1}", "right" if right else "wrong"
            pairs.append((response, str(n)))
            wanted.append(outcome)
            continue
        pairs.append((response, ""))
        wanted.append(outcome)
    found = _judged(folder, "fault_verifier:judge", pairs, rng)
    wrong = [
        f"{pair[0][:40]!r} gave {verdict.outcome}, not {outcome}"
        for pair, verdict, outcome in zip(pairs, found, wanted, strict=True)
        if verdict.outcome != outcome and not (outcome == "error" and verdict.outcome == "crash")
    ]
    return f"{count} answers, {injected} with a fault", "; ".join(wrong[:3]) or None


def _judged(
    folder: Path, verifier: str, pairs: list[tuple[str, str]], rng: random.Random, seconds: float = DEADLINE
) -> list[Verdict]:
    import sys

    sys.path.insert(0, str(folder))
    try:
        with VerifierPool(verifier, rng.choice((1, 2)), seconds, memory_gb=2.0) as pool:
            return pool.judge(pairs)
    finally:
        sys.path.remove(str(folder))


def _number(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A ground truth, ways to write it, and ways to miss it."""
    n = rng.randint(-10_000, 10_000)
    m = n + rng.choice((-1, 1, 10, 1000))
    return str(n), _ways(n, m), _ways(m, n)


def _ways(n: int, m: int) -> list[str]:
    """Ways to answer n, some of which name m before."""
    return [
        f"\\boxed{{{n}}}", f"The answer is {n}.", f"so it is \\boxed{{{n}.0}}",
        f"<think>{m}</think>\\boxed{{{n}}}",
        f"First \\boxed{{{m}}}, no: \\boxed{{{n}}}",
    ]  # fmt: skip


NASTY = (
    "\\boxed{", "\\boxed{" * 2000, "\\boxed{" + "{" * 2000 + "}" * 2000 + "}", "\\boxed{10^{10^{10}}}",
    "\\boxed{9**9**9**9}", "\\boxed{\\frac{1}{0}}", "\\boxed{\\sqrt{-1}}", "\\boxed{\\int_0^\\infty e^x dx}",
    "\\boxed{" + "9" * 100_000 + "}", "\\boxed{1e999999999}", "\\boxed{\\text{\x00}}", "\x00" * 100,
    "\\boxed{__import__('os').system('true')}", "\\boxed{factorial(99999999)}", "", " ", "\\", "$" * 5000,
    "\\boxed{(" + "1+" * 5000 + "1)}", "\u202e\\boxed{\u0665}", "\\boxed{\U0001f600}", "NaN", "\\boxed{NaN}",
    "\\boxed{\\infty}", "\\boxed{x_{x_{x_{x}}}}", "\\begin{pmatrix}" * 300, "%" * 3000, "{" * 3000,
)  # fmt: skip
SECRET = "271828.5"  # a ground truth that nothing above is


def written(folder: Path, rng: random.Random, count: int = 30) -> tuple[str, str | None]:
    """Numbers written rightly, wrongly and never, for the verifiers `math` and `string`: no right answer is
    called wrong, no wrong one right, and nothing nasty either."""
    verifier, pairs, wanted = rng.choice(("math", "string")), [], []
    for _ in range(count):
        if rng.random() < 0.3:
            text = rng.choice(NASTY)
            pairs.append((text + rng.choice(("", "\n", " so it is.")), SECRET))
            wanted.append(None)
            continue
        truth, right, wrong = _number(rng)
        good = rng.random() < 0.5
        pairs.append((rng.choice(right if good else wrong), truth))
        wanted.append(int(good))
    problems = []
    for pair, verdict, label in zip(pairs, _judged(folder, verifier, pairs, rng, 20.0), wanted, strict=True):
        missed = verdict.label == 1 if label is None else verdict.label is not None and verdict.label != label
        if missed:
            problems.append(f"{pair[0][:60]!r} for {pair[1]} gave {verdict.outcome}")
    return f"{count} answers for {verifier!r}", "; ".join(problems[:3]) or None


TRIALS: dict[str, Callable[[Path, random.Random], tuple[str, str | None]]] = {
    "answers that break a verifier": faulty,
    "answers as they are written": written,
}
