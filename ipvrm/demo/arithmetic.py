"""The demo's task: chains of two-digit additions and subtractions, every step of which can be verified.

A problem is `47+25-13`; its solution takes one operation at a time, `47+25=72;72-13=59`. All numbers of a
right solution have two digits. In the chains the base model learns from, each result is replaced with
probability `noise` by a nearby wrong one and the chain goes on from there, so the model makes mistakes as
people do: one wrong step, then right work on a wrong number.

The outcome label looks at the last number only, as a verifier of answers would. The step label, which only
the evaluation sees, is the first step that is not the right operation on the number written before it.
"""

import re
from dataclasses import dataclass
from random import Random

LOWEST, HIGHEST = 10, 99
MIN_STEPS, MAX_STEPS = 3, 6
SLIPS = (-20, -10, -9, -2, -1, 1, 2, 9, 10, 20)
STEP_SEPARATOR = ";"
_STEP = re.compile(r"(-?\d{1,4})([+-])(\d{1,4})=(-?\d{1,4})")


@dataclass(frozen=True)
class Problem:
    """`start` and the operations on it, each a signed two-digit number."""

    start: int
    changes: tuple[int, ...]

    @property
    def text(self) -> str:
        return str(self.start) + "".join(f"{change:+d}" for change in self.changes)

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


@dataclass(frozen=True)
class Format:
    """How a solution is written: `name`, what stands before `=`, and what stands between two steps."""

    name: str
    before_equals: str = ""
    separator: str = STEP_SEPARATOR

    def write(self, steps: list[str]) -> list[str]:
        """The steps, written in the training format, in this one."""
        return [step.replace("=", self.before_equals + "=") for step in steps]


TRAINING_FORMAT = Format("training format")
SHIFTED_FORMATS = (Format("space before =", before_equals=" "), Format("space after ;", separator="; "))


def make_problem(
    rng: Random, min_steps: int = MIN_STEPS, max_steps: int = MAX_STEPS, multiple_of: int = 1
) -> Problem:
    """A random chain whose results all lie in [10, 99]; its changes are multiples of `multiple_of`."""
    start = value = rng.randint(LOWEST, HIGHEST)
    changes = []
    for _ in range(rng.randint(min_steps, max_steps)):
        possible = range(LOWEST - value, HIGHEST - value + 1)
        choices = [c for c in possible if abs(c) >= LOWEST and c % multiple_of == 0]
        changes.append(rng.choice(choices))
        value += changes[-1]
    return Problem(start, tuple(changes))


def make_problems(
    count: int, rng: Random, exclude: frozenset[Problem] = frozenset(), multiple_of: int = 1
) -> list[Problem]:
    """`count` different problems, none of them in `exclude`."""
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = make_problem(rng, multiple_of=multiple_of)
        if problem not in exclude:
            found[problem] = None
    return list(found)


def noisy_solution(problem: Problem, noise: float, rng: Random) -> str:
    """A solution whose steps each go wrong with probability `noise`.

    Only slips after which the rest of the chain still has two digits are made; where none is left the step is
    right.
    """
    steps, value = [], problem.start
    for i, change in enumerate(problem.changes):
        result = value + change
        if rng.random() < noise:
            rest, ahead = [0], 0
            for later in problem.changes[i + 1 :]:
                ahead += later
                rest.append(ahead)
            slips = [s for s in SLIPS if all(LOWEST <= result + s + offset <= HIGHEST for offset in rest)]
            if slips:
                result += rng.choice(slips)
        steps.append(f"{value}{change:+d}={result}")
        value = result
    return STEP_SEPARATOR.join(steps)


def answer_of(response: str) -> int | None:
    """The last number of the last step, None where the response does not end in a step."""
    match = _STEP.fullmatch(response.rsplit(STEP_SEPARATOR, 1)[-1])
    return int(match[4]) if match else None


def right_answer(response: str, answer: str) -> bool | None:
    """The task's verifier for `ipvrm label` and `train-policy`: None where the response ends in no number."""
    found = answer_of(response)
    return None if found is None else found == int(answer)


def first_wrong_step(problem: Problem, steps: list[str]) -> int:
    """Index of the first step that is not the next operation, done right, on the number written before it.

    -1 when all are. A solution that stops early without a mistake, or goes on too long, is wrong at its last
    step or at the first one too many.
    """
    value = problem.start
    for i, step in enumerate(steps):
        match = _STEP.fullmatch(step)
        if match is None or i >= len(problem.changes):
            return i
        change = int(match[2] + match[3])
        if int(match[1]) != value or change != problem.changes[i] or int(match[4]) != value + change:
            return i
        value = int(match[4])
    return -1 if len(steps) == len(problem.changes) else len(steps) - 1
