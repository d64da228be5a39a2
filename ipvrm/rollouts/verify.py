"""Verifiers: is the final answer of a response the right one? Each question has a hard deadline.

A verifier is a function `(response, answer) -> True | False | None`; None says that the response holds no
answer. It runs in worker processes of its own, one JSON line in and one out, and may hang, raise, crash or
print: a worker that has not answered by the deadline is killed, with whatever it started, and replaced.
A time-out, a crash or an exception is a `Verdict` of its own and never a wrong answer, and so is a pair of
more than `MOST_CHARACTERS`, which no worker is given.

Numbers are compared here, by value; all else by math-verify, with its leniencies: it drops units, percent
signs and the name before `=`, compares lists without their order, and reads a word as a product of letters
(`benchmarks/results/label_truths` counts them).

math-verify's own time-outs are switched off. They come as signals that native code holds up, and what they
interrupt counts there as a wrong answer.
"""

import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from importlib import import_module
from typing import Any, Literal, get_args

from ipvrm.errors import IpvrmError
from ipvrm.rollouts.final_answer import (
    DIGITS,
    MAX_EXPONENT,
    answer_region,
    as_number,
    boxed_answer,
    final_answer,
    ground_truth_answer,
    is_not_latex,
    is_prose,
    is_statement,
    is_word,
    number_behind_boxes,
    part_count,
    same_number,
    same_word,
    stated_answer,
    stated_formula,
    without_e_notation,
    without_unit_words,
    written_out,
)

Outcome = Literal["right", "wrong", "no_answer", "timeout", "crash", "error", "unreadable_ground_truth"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
LABELS = {"right": 1, "wrong": 0, "no_answer": 0}
TIMEOUT_SECONDS = 10.0
MEMORY_GB = 8.0  # of one worker: two to ten times what math-verify takes, less than what stops a machine
MOST_CHARACTERS = 4_000_000  # about a million tokens: copies and parses of more would fill a machine
START_SECONDS = 120.0  # a cold disk under many workers: importing sympy alone takes seconds
ORPHAN_SECONDS = 30.0  # after its deadline a worker ends itself if its parent, itself killed, has not
ARITHMETIC = re.compile(r"[-+*/^().,\d\s]+")
EULER = re.compile(r"(?:[2-9]|\d\d)e[-+]\d+(?![\d.])")  # `2e-3` may be 2e less 3: both readings are tried
PYTHON_CHARACTERS = re.compile(r"[\w\s().,*/+^-]+")
SYMPY = "sqrt exp log sin cos tan cot sec csc asin acos atan sinh cosh tanh pi oo Rational Abs factorial"
PYTHON_NAMES = {name: name for name in SYMPY.split()}
PYTHON_NAMES |= {"cbrt": "cbrt", "root": "root", "binomial": "binomial", "Fraction": "Rational"}
PYTHON_NAMES |= {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs"}


@dataclass(frozen=True)
class Verdict:
    """What became of one question. `extracted` is the answer found, `detail` the reason of a failure."""

    outcome: Outcome
    extracted: str | None = None
    detail: str | None = None

    @property
    def label(self) -> int | None:
        """1 (right), 0 (wrong, or no answer to be found), None where nothing is known."""
        return LABELS.get(self.outcome)


Verifier = Callable[[str, str], Verdict]


def verify_string(response: str, answer: str) -> Verdict:
    """`final_answer` equals the ground truth: plain numbers by value, all else character by character.

    Of `36 apples`, `[36]` and `x = 36` the number alone is right too. A ground truth that states its answer
    in words, which no answer equals, is unreadable.
    """
    truth = ground_truth_answer(answer)
    if not truth or is_statement(truth):
        return Verdict("unreadable_ground_truth", detail=f"no final answer in {answer!r:.80}")
    extracted = final_answer(response, part_count(truth))
    if extracted is None:
        return Verdict("no_answer")
    found = as_number(extracted)
    named = re.fullmatch(r"\[([^\[\],]+)\]|[A-Za-z]\w* *= *([^=]+)", truth)
    readings = [truth, without_unit_words(truth), *filter(None, named.groups() if named else ())]
    numbers = [number for number in map(as_number, readings) if number is not None]
    same = extracted == truth or (found is not None and any(same_number(n, found) for n in numbers))
    return Verdict("right" if same else "wrong", extracted)


@dataclass(frozen=True)
class _GroundTruth:
    """One reading of a ground truth: the number that it is, if it is one, and what math-verify compares."""

    text: str
    number: Decimal | None
    parsed: list[Any]
    parts: int

    @property
    def digits(self) -> int:
        """To how many decimals math-verify must round: it counts them from the point."""
        return DIGITS - min(0, self.number.adjusted() + 1) if self.number else DIGITS


@functools.lru_cache(maxsize=1024)
def _ground_truths(answer: str) -> tuple[_GroundTruth, ...]:
    """The readings of a ground truth, () where there is none. `100,200` has two: a number and a list."""
    truth = ground_truth_answer(answer)
    if not truth or is_prose(truth):
        return ()
    truth = without_unit_words(truth)
    number = as_number(truth)
    if number is None and not is_word(truth) and is_not_latex(truth) and not _latex_of_python(truth):
        return ()
    readings = []
    if number is not None:
        plain = written_out(number) if abs(number.adjusted()) <= MAX_EXPONENT else ""
        parsed = _parsed(plain) if plain else []
        parsed += _parsed(truth) if EULER.search(truth) else []
        readings.append(_GroundTruth(truth, number, parsed, 1))
    if number is None or "," in truth:
        parsed = _parsed(truth if number is None else truth.replace(",", ", "))
        if is_word(truth) or _equals_itself(parsed):
            readings.append(_GroundTruth(truth, None, parsed, part_count(truth)))
    return tuple(readings)


def _parsed(text: str) -> list[Any]:
    """What math-verify makes of an answer: sympy's objects, or text alone where it cannot read it.

    Without delimiters math-verify overlooks LaTeX, and of `-3./2` it reads only the -3 between dollars: a box
    serves all but decimal fractions, which it reads as they are. To it e is Euler's number in `3e8` as well.
    """
    from math_verify import parse

    forms = _latex_of_python(text) or [without_e_notation(text), *([text] if EULER.search(text) else [])]
    parsed: list[Any] = []
    for form in forms:
        if ARITHMETIC.fullmatch(form):
            form = re.sub(r"\s*([-+*/^()])\s*", r"\1", form)
        for given in (f"\\boxed{{{form}}}", *([form] if ARITHMETIC.fullmatch(form) else [])):
            found = _symbols_alike(parse(given, parsing_timeout=None, raise_on_error=True))
            parsed += found
            if any(not isinstance(item, str) for item in found):
                break
    return parsed


def _symbols_alike(items: list[Any]) -> list[Any]:
    """With real symbols alone: to math-verify that of `2 i` is another than that of `2i`."""
    import sympy

    return [
        item
        if isinstance(item, str)
        else item.xreplace({s: sympy.Symbol(s.name, real=True) for s in item.free_symbols if not s.is_real})
        for item in items
    ]


def _latex_of_python(text: str) -> list[str]:
    """LaTeX of Python or sympy source like `2*pi*sqrt(3)/3`; [] where it is none.

    Only known functions and single letters are evaluated. E and I may be variables too: both are given.
    """
    if not PYTHON_CHARACTERS.fullmatch(text):
        return []
    text = re.sub(r"\b(?:np|numpy|math|sympy|sp)\.(?=[a-zA-Z])", "", text).replace("^", "**")
    text = re.sub(r"(?<=\d)j\b", "*I", text)
    names = set(re.findall(r"[A-Za-z_]\w*", without_e_notation(text)))
    if any(len(name) > 1 and name not in PYTHON_NAMES for name in names):
        return []
    if (
        "**" not in text
        and all(len(name) == 1 for name in names)
        and not ("*" in text and names & {"E", "I"})
    ):
        return []
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    known = {name: getattr(sympy, name) for name in ("Integer", "Float", "Rational", "Symbol")}
    forms: list[str] = []
    for constants in ({"E": sympy.E, "I": sympy.I}, {}):
        given = {name: getattr(sympy, PYTHON_NAMES.get(name, ""), sympy.Symbol(name)) for name in names}
        try:
            expression = parse_expr(text, local_dict=given | constants, global_dict=dict(known))
            latex = sympy.latex(expression, ln_notation=True, inv_trig_style="full", mul_symbol="times")
        except (SyntaxError, TypeError, ValueError, AttributeError):
            return []
        forms += [latex] if latex not in forms else []
    return forms


def _equals_itself(parsed: list[Any]) -> bool:
    from math_verify import verify

    known = [item for item in parsed if not isinstance(item, str)]
    return bool(known) and verify(known, known, timeout_seconds=None, raise_on_error=True)


def verify_math(response: str, answer: str) -> Verdict:
    """math-verify's equivalence of the ground truth and the final answer; plain numbers by their value."""
    verdict = Verdict("unreadable_ground_truth", detail=f"math-verify cannot read {answer!r:.80}")
    for truth in _ground_truths(answer):
        verdict = _compare(answer_region(response), truth)
        if verdict.outcome == "right":
            break
    return verdict


def _compare(text: str, truth: _GroundTruth) -> Verdict:
    from math_verify import parse, verify

    extracted = boxed_answer(text, truth.parts)
    if truth.number is not None and extracted and as_number(extracted.rpartition("=")[2]) is None:
        extracted = number_behind_boxes(text) or extracted  # `\boxed{7 \text{ and } 13}` ... `Answer: 91`
    if extracted is None and (stated := stated_answer(text)) is not None:
        plain = as_number(stated) is not None or is_word(truth.text) or stated_formula(text) is not None
        readable = plain or _latex_of_python(stated)
        extracted = stated if readable else None
    if extracted is None:
        found = _symbols_alike(parse(without_e_notation(text), parsing_timeout=None, raise_on_error=True))
        if not found:
            return Verdict("no_answer")
        extracted = next((item for item in found if isinstance(item, str)), None)
    elif is_word(truth.text) and same_word(extracted, truth.text):
        return Verdict("right", extracted)
    else:
        number = as_number(extracted.rpartition("=")[2] if truth.number is not None else "")
        if truth.number is not None and number is not None:
            return Verdict("right" if same_number(truth.number, number) else "wrong", extracted)
        found = _parsed(extracted)
    if truth.number is not None:
        values = [value for item in found if (value := _decimal_value(item, truth.number)) is not None]
        if any(same_number(truth.number, value) for value in values):
            return Verdict("right", extracted)
        if values and not EULER.search(truth.text):
            return Verdict("wrong", extracted)
    right = verify(
        truth.parsed, found, float_rounding=truth.digits, timeout_seconds=None, raise_on_error=True
    )
    return Verdict("right" if right else "wrong", extracted)


def _decimal_value(item: Any, truth: Decimal) -> Decimal | None:
    """Value of a real expression where a decimal fraction is on either side; else None, for math-verify."""
    import sympy

    if not isinstance(item, sympy.Expr) or item.has(sympy.UnevaluatedExpr) or item.is_number is not True:
        return None
    if truth == truth.to_integral_value() and not item.has(sympy.Float):
        return None
    value = item.evalf(DIGITS + 24)
    return Decimal(str(value)) if isinstance(value, sympy.Float | sympy.Integer) and value.is_finite else None


def load_verifier(name: str) -> Verifier:
    """The verifier `math`, `string`, or a Python function `module:function`.

    Raises:
        IpvrmError: there is no such thing.
    """
    if name == "string":
        return verify_string
    if name == "math":
        return verify_math
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise IpvrmError(f"verifier must be 'math', 'string' or 'module:function'; got {name!r}")
    try:
        function = getattr(import_module(module_name), function_name)
    except Exception as error:  # whatever the module does when it is imported
        raise IpvrmError(f"verifier {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise IpvrmError(f"verifier {name!r} is no function; it is a {type(function).__name__}")

    def verify(response: str, answer: str) -> Verdict:
        result = function(response, answer)
        if result is None:
            return Verdict("no_answer")
        if not isinstance(result, bool | int | float) or result not in (0, 1):
            raise ValueError(f"{name} must return True, False or None; it returned {result!r:.40}")
        return Verdict("right" if result else "wrong")

    return verify


# -------------------------------------------------------------------------------------------------- workers


def serve(name: str, watchdog_seconds: float, memory_gb: float) -> None:
    """A worker: says whether it is ready, then answers each [response, answer] line with a verdict's line.

    What the verifier reads or prints does not reach the two pipes. Its memory is capped: an allocation beyond
    raises MemoryError, in native code mostly a crash; both are counted, and the machine lives on.
    """
    import faulthandler

    _cap_memory(memory_gb)

    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)
    try:
        verifier = load_verifier(name)
    except IpvrmError as error:
        print(json.dumps({"failed": str(error)}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in requests:
        # A thread in C: it ends a worker that hangs, be it in native code, when nobody is left to kill it.
        faulthandler.dump_traceback_later(watchdog_seconds, exit=True)
        try:
            verdict = verifier(*json.loads(line))
        except BaseException as error:  # SystemExit too: only the death of the process is a crash
            verdict = Verdict("error", detail=f"{type(error).__name__}: {error}"[:300])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(asdict(verdict)), file=replies)


def _cap_memory(gigabytes: float) -> None:
    """RLIMIT_DATA counts what is written privately, not libraries or reserved addresses. Linux heeds it."""
    if sys.platform == "linux":
        import resource

        limit = int(gigabytes * 1e9)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


# The working directory comes last on the path: a file in it must not stand in for a library.
WORKER = """import sys
sys.path = [path for path in sys.path if path]
from ipvrm.rollouts.verify import serve
sys.path.append("")
serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
"""


class _Worker:
    """A process that runs `serve`; a thread puts (self, line) on `events`, and (self, None) at its end."""

    def __init__(
        self,
        name: str,
        timeout_seconds: float,
        memory_gb: float,
        events: "queue.Queue[tuple[_Worker, str | None]]",
    ):
        watchdog = str(timeout_seconds + ORPHAN_SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, name, watchdog, str(memory_gb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is for the parent, and killing reaches what the verifier started
        )
        self.ready = False
        self.question: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: "queue.Queue[tuple[_Worker, str | None]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, line))
        events.put((self, None))

    def ask(self, question: int, pair: tuple[str, str], timeout_seconds: float) -> None:
        assert self.process.stdin is not None
        self.question = question
        self.deadline = time.monotonic() + timeout_seconds
        try:
            self.process.stdin.write(json.dumps(pair) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has died: the end of its output says so

    def kill(self) -> int:
        """Ends the process and what it started; returns its exit status."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        except ProcessLookupError:
            pass
        return self.process.wait()


class VerifierPool:
    """Worker processes of one verifier; a context manager, to be used by one thread.

    Args:
        verifier: `math`, `string` or `module:function` (found on sys.path or in the working directory).
        num_workers: processes; None for one per available core.
        timeout_seconds: hard deadline of each question, measured from the moment a worker is given it.
        memory_gb: most memory of each worker, in 1e9 bytes; heeded on Linux.
    """

    def __init__(
        self,
        verifier: str = "math",
        num_workers: int | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        memory_gb: float = MEMORY_GB,
    ):
        if num_workers is not None and num_workers < 1:
            raise IpvrmError(f"num_workers must be at least 1; got {num_workers}")
        if not 0 < timeout_seconds < 1e6:
            raise IpvrmError(f"timeout_seconds must lie between 0 and a million; got {timeout_seconds}")
        if not 0 < memory_gb < 1e6:
            raise IpvrmError(f"memory_gb must lie between 0 and a million; got {memory_gb}")
        if verifier in ("math", "string") or ":" not in verifier:
            load_verifier(verifier)  # what is missing shows here; users' modules load in workers alone
        self.verifier, self.timeout_seconds, self.memory_gb = verifier, timeout_seconds, memory_gb
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.num_workers = num_workers or cores or 1
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers."""
        while self._workers:
            self._workers.pop().kill()

    def judge(
        self, pairs: Sequence[tuple[str, str]], on_done: Callable[[int], None] = lambda done: None
    ) -> list[Verdict]:
        """Verdicts of (response, answer) pairs, in their order.

        Args:
            on_done: called with how many are done, after one or several more.

        Raises:
            IpvrmError: the verifier cannot be loaded, or its workers do not start.
        """
        try:
            return self._judge(pairs, on_done)
        except BaseException:
            self.close()  # a half-finished round must not answer into the next one
            raise

    def _judge(self, pairs: Sequence[tuple[str, str]], on_done: Callable[[int], None]) -> list[Verdict]:
        verdicts = {
            i: Verdict("error", detail=f"{length:,} characters, more than {MOST_CHARACTERS:,}")
            for i, (response, answer) in enumerate(pairs)
            if (length := len(response) + len(answer)) > MOST_CHARACTERS
        }
        waiting = deque(i for i in range(len(pairs)) if i not in verdicts)
        while len(verdicts) < len(pairs):
            open_questions = len(pairs) - len(verdicts)
            while len(self._workers) < min(self.num_workers, open_questions):
                self._workers.append(
                    _Worker(self.verifier, self.timeout_seconds, self.memory_gb, self._events)
                )
            for worker in self._workers:
                if waiting and worker.ready and worker.question is None:
                    question = waiting.popleft()
                    worker.ask(question, pairs[question], self.timeout_seconds)
            busy = [w for w in self._workers if not w.ready or w.question is not None]
            wait = max(0.0, min(w.deadline for w in busy) - time.monotonic())
            for worker, line in self._heard(wait):
                if worker in self._workers:  # else it has been killed, and what it still said is void
                    self._hear(worker, line, verdicts)
            for worker in [w for w in busy if w in self._workers and w.deadline <= time.monotonic()]:
                if not worker.ready or worker.question is not None:
                    self._replace(worker, verdicts, f"no answer in {self.timeout_seconds:g} s", "timeout")
            on_done(len(verdicts))
        return [verdicts[index] for index in range(len(pairs))]

    def _heard(self, wait: float) -> Iterator[tuple[_Worker, str | None]]:
        """What workers say: waits for the first, then yields all that is there."""
        try:
            yield self._events.get(timeout=wait)
            while True:
                yield self._events.get_nowait()
        except queue.Empty:
            return

    def _hear(self, worker: _Worker, line: str | None, verdicts: dict[int, Verdict]) -> None:
        if line is None:
            self._replace(worker, verdicts, "", "crash")
        elif worker.ready:
            assert worker.question is not None
            verdicts[worker.question] = Verdict(**json.loads(line))
            worker.question = None
        elif "failed" in (greeting := json.loads(line)):
            raise IpvrmError(greeting["failed"])
        else:
            worker.ready = True

    def _replace(
        self, worker: _Worker, verdicts: dict[int, Verdict], detail: str, outcome: Literal["timeout", "crash"]
    ) -> None:
        self._workers.remove(worker)
        status = worker.kill()
        if not worker.ready:
            reason = f"exit status {status}" if outcome == "crash" else f"not within {START_SECONDS:g} s"
            raise IpvrmError(f"verifier {self.verifier!r}: its worker process did not start ({reason})")
        if worker.question is not None:
            died = f"signal {-status}" if status < 0 else f"exit status {status}"
            verdicts[worker.question] = Verdict(
                outcome, detail=detail or f"the verifier's process died: {died}"
            )
