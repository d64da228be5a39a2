"""Solutions to step scores with a reward model: one forward of each model, all four rules."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ipvrm.data import Row, tokenize
from ipvrm.evaluate.steps import RULES, STEP_FORMAT, STEP_SEPARATOR, render_steps, step_of_token, step_scores
from ipvrm.reward_model import BATCH_TOKENS, RewardModel


@dataclass(frozen=True)
class SolutionScores:
    """One solution of T response tokens (end of turn included) and S steps."""

    log_ratio: Tensor  # (T,) fp32
    steps_of_token: Tensor  # (T,) int64, -1 outside every step
    num_tokens: int  # prompt and response
    by_rule: dict[str, list[float]]  # rule -> S scores

    @property
    def num_steps(self) -> int:
        return len(self.by_rule["step"])


def score_solutions(
    reward_model: RewardModel,
    items: Sequence[tuple[str, Sequence[str]]],
    *,
    step_format: str = STEP_FORMAT,
    step_separator: str = STEP_SEPARATOR,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[SolutionScores | None]:
    """Scores of many solutions, in the order given; None for one of more than `max_length` tokens.

    Args:
        items: (problem, steps) pairs.
        step_format, step_separator: how the steps are written as the assistant's turn (`render_steps`).
        max_length: most tokens of prompt and response; a longer solution is left out whole, never cut.
        batch_tokens: most tokens of a padded micro-batch.

    Raises:
        IpvrmError: a solution without steps or that the chat template refuses, or a bad `step_format`.
    """
    rendered = [render_steps(steps, step_format, step_separator) for _, steps in items]
    rows = [
        Row(f"item:{i}", problem, text)
        for i, ((problem, _), (text, _)) in enumerate(zip(items, rendered, strict=True))
    ]
    tokenized = tokenize(rows, reward_model.tokenizer, max_length=max_length, with_offsets=True)
    log_ratios = reward_model.token_log_ratios(tokenized.responses, batch_tokens)
    result: list[SolutionScores | None] = [None] * len(items)
    for response, log_ratio in zip(tokenized.responses, log_ratios, strict=True):
        index = int(response.source.rpartition(":")[2])
        ends = rendered[index][1]
        of_token = step_of_token(response.offsets or (), ends)
        by_rule = {
            rule: step_scores(log_ratio.double(), of_token, reward_model.info.beta, rule, len(ends)).tolist()
            for rule in RULES
        }
        result[index] = SolutionScores(log_ratio, of_token, len(response.input_ids), by_rule)
    return result
