"""Solutions to step scores with a reward model: one forward of each model, all four rules."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ipvrm.data.steps import RULES, step_scores
from ipvrm.errors import IpvrmError
from ipvrm.models.reward_model import RewardModel
from ipvrm.models.server import ServerError

T = TypeVar("T")
R = TypeVar("R")
OF_ITEM = re.compile(r"\A.*?\bitem:\d+: ", re.DOTALL)  # what a reward model puts before an item's reason


@dataclass(frozen=True)
class SolutionScores:
    """One solution of T response tokens (end of turn included) and S steps."""

    log_ratio: Tensor  # (T,) fp32
    steps_of_token: Tensor  # (T,) int64, -1 outside every step
    num_steps: int
    num_tokens: int  # prompt and response
    by_rule: dict[str, list[float]]  # rule -> S scores


def one_by_one(score: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | str]:
    """`score(items)`; where it raises IpvrmError, item by item, and for what it refuses the reason.

    Raises:
        ServerError: a server failed, which is no item's fault.
    """
    try:
        return [*score(items)]
    except ServerError:
        raise
    except IpvrmError:
        found: list[R | str] = []
        for item in items:
            try:
                found += score([item])
            except ServerError:
                raise
            except IpvrmError as error:
                found.append(" ".join(OF_ITEM.sub("", str(error), count=1).split()))
        return found


def score_solutions(
    reward_model: RewardModel, items: Sequence[tuple[str, Sequence[str]]], **options: Any
) -> list[SolutionScores | None]:
    """Scores of many solutions, in the order given; None for one of more than `max_length` tokens.

    Args:
        items: (problem, steps) pairs.
        options: those of `RewardModel.solution_log_ratios`.

    Raises:
        IpvrmError: from `RewardModel.solution_log_ratios`.
    """
    beta, discount = reward_model.info.beta, reward_model.info.discount
    result: list[SolutionScores | None] = []
    for found in reward_model.solution_log_ratios(items, **options):
        if found is None:
            result.append(None)
            continue
        log_ratio = found.log_ratio.double()
        by_rule = {
            rule: step_scores(log_ratio, found.steps_of_token, beta, rule, found.num_steps, discount).tolist()
            for rule in RULES
        }
        result.append(
            SolutionScores(found.log_ratio, found.steps_of_token, found.num_steps, found.num_tokens, by_rule)
        )
    return result
