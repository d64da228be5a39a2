"""Reward functions with TRL's signature, for an unmodified GRPOTrainer: a reward model, a verifier.

`trl grpo --reward_funcs my_rewards.value` takes one from a module of yours:

    value = prefix_value_reward("runs/rm")
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipvrm.data.responses import Response, offsets_of
from ipvrm.data.rows import ground_truth
from ipvrm.data.steps import step_of_token
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.best_of_n import PICKS, response_scores
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel
from ipvrm.rollouts.verify import TIMEOUT_SECONDS, VerifierPool

RewardFunction = Callable[..., list[float | None]]
BETWEEN_STEPS = re.compile(r"\n\s*\n")  # a sampled response's steps are its paragraphs


def prefix_value_reward(
    reward_model: RewardModel | str | Path, pick: str = "final", batch_tokens: int = BATCH_TOKENS
) -> RewardFunction:
    """A reward model as one number for a response, for trainers that take nothing else.

    What makes it a process reward is lost: GRPO gives every token of a response the same advantage.
        `DistRLTrainer`
    keeps one for every token, and asks the model's other candidates too.

    Args:
        reward_model: a loaded one, or its folder. Its tokenizer must be the policy's.
        pick: final (V_T / T), sum (V_T), mean or min (over the response's paragraphs), as Best-of-N has them.
        batch_tokens: most tokens of a padded micro-batch.

    Returns:
        What TRL calls with prompts, completions and completion_ids; None for a response that was cut off (no
        end token) or is longer than the models' positions.

    Raises:
        IpvrmError: an unknown pick; when called, ids that are other text under the reward model's tokenizer,
            or a token whose log-ratio is infinite or not a number.
    """
    if pick not in PICKS:
        raise IpvrmError(f"prefix_value_reward: pick must be one of {', '.join(PICKS)}; got {pick!r}")
    rm = reward_model if isinstance(reward_model, RewardModel) else RewardModel.from_pretrained(reward_model)
    stops = {rm.chat.end_of_turn, rm.tokenizer.eos_token_id}

    def prefix_value(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        rewards: list[float | None] = [None] * len(prompts)
        responses, places = list[Response](), list[int]()
        for place, (prompt, completion, ids) in enumerate(
            zip(prompts, completions, completion_ids, strict=True)
        ):
            if not ids or ids[-1] not in stops:
                continue
            _check_text(rm.tokenizer, ids, completion)
            # TRL gives a text prompt to the policy as it stands; rm.chat would make a user message of it.
            before = (
                rm.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else rm.chat.prompt_ids(prompt)
            )
            if rm.max_positions is not None and len(before) + len(ids) > rm.max_positions:
                continue
            source = f"prefix_value_reward: completion {place + 1} of {len(prompts)}"
            responses.append(Response((*before, *ids), len(before), source=source))
            places.append(place)
        for place, log_ratio in zip(places, rm.token_log_ratios(responses, batch_tokens), strict=True):
            text_ids = completion_ids[place][:-1]
            text = rm.tokenizer.decode(text_ids, clean_up_tokenization_spaces=False)
            ends = [m.end() for m in BETWEEN_STEPS.finditer(text.rstrip())] + [len(text)]
            steps = step_of_token([*offsets_of(rm.tokenizer, text_ids), (-1, -1)], ends)
            rewards[place] = response_scores(log_ratio, steps, rm.info.beta, len(ends))[pick]
        return rewards

    prefix_value.__name__ = f"prefix_value_{pick}"
    return prefix_value


def verifier_reward(
    verifier: str = "math",
    answer: str = "answer",
    timeout_seconds: float = TIMEOUT_SECONDS,
    num_workers: int | None = None,
) -> RewardFunction:
    """ipvrm's verifier as a reward function: 1.0 right, 0.0 wrong or without an answer.

    None where nothing is known: a time-out, a crash, a ground truth that is missing (None, NaN, blank) or
    that the verifier cannot read. TRL leaves such a response out of its group's mean and gives it advantage
    0.

    Args:
        verifier: math, string or `module:function`, as `ipvrm label` has it.
        answer: the column of the data set that holds the ground truth, a text or a number, read as by
            `ipvrm label`: 4.0 is `4`.
        timeout_seconds, num_workers: of the worker processes, which live as long as the function.

    Raises:
        IpvrmError: an unknown verifier; when called, a data set without the column, or a ground truth that is
            neither text nor number.
    """
    pool = VerifierPool(verifier, num_workers, timeout_seconds)

    def verified(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if answer not in columns:
            raise IpvrmError(
                f"verifier_reward: the data set has no column {answer!r}; name it with answer=..."
            )
        try:
            truths = [ground_truth({"answer": value}) for value in columns[answer]]
        except ValueError as error:
            raise IpvrmError(f"verifier_reward: column {answer!r} of the data set: {error}") from error
        pairs = [(_text(c), t) for c, t in zip(completions, truths, strict=True) if t is not None]
        verdicts = iter(pool.judge(pairs))
        labels = [None if truth is None else next(verdicts).label for truth in truths]
        return [None if label is None else float(label) for label in labels]

    verified.__name__ = f"verifier_{verifier.rpartition(':')[2]}"
    return verified


def _text(completion: Any) -> str:
    return (
        completion
        if isinstance(completion, str)
        else "".join(str(m.get("content") or "") for m in completion)
    )


def _check_text(tokenizer: Any, ids: Sequence[int], completion: Any) -> None:
    """A trainer with another tokenizer would be scored on tokens that nobody sampled."""
    if isinstance(completion, str) and completion != tokenizer.decode(list(ids), skip_special_tokens=True):
        raise IpvrmError(
            "prefix_value_reward: the completion ids are other text under the reward model's tokenizer; "
            "train with the "
            "tokenizer of the reward model"
        )
