"""From prompts to judged answers, the one way of all commands: ask, sample, ended?, judge.

    questions, bad = as_questions(*read_prompts(path), path, tokenizer, settings, context)
    generated = sample(engine, [(question, question.prompt.row, i) ...], sampling, seed)
    verdicts = judge([(ids, question) ...], stops, tokenizer, pool.judge)

A response that was cut off before its end has no verdict: None, which is neither right nor wrong. What the
verifier fails on has one without a label.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ipvrm.data.chat import Chat, parse_template_kwargs
from ipvrm.data.rows import BadRow, OnBadRow, Prompt, report_bad_rows
from ipvrm.errors import IpvrmError
from ipvrm.rollouts.engine import Engine, Sampling, response_seed
from ipvrm.rollouts.verify import Verdict

Job = tuple["Question", int, int]  # a response to sample: its seed is made of the two numbers and the run's
Judge = Callable[[Sequence[tuple[str, str]]], Sequence[Verdict]]  # of (response, ground truth)


class QuestionSettings(Protocol):
    """The flags of a command that its questions depend on."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def on_bad_row(self) -> OnBadRow: ...
    @property
    def chat_template_kwargs(self) -> str | None: ...


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, with its row and its ground truth."""

    prompt: Prompt
    ids: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The ground truth, empty where there is none."""
        return self.prompt.answer or ""


def as_questions(
    prompts: Iterable[Prompt],
    bad: Sequence[BadRow],
    path: str,
    tokenizer: Any,
    settings: QuestionSettings,
    context: int | None,
    *,
    answers: bool = True,
) -> tuple[list[Question], list[BadRow]]:
    """What `read_prompts(path)` returned, as tokens; and all rows that cannot be used.

    Args:
        context: the fewest positions of the models that read or write the answers; a prompt that leaves fewer
            than `max_new_tokens` cannot be used.
        answers: whether a prompt without ground truth cannot be used either.

    Raises:
        IpvrmError: bad rows under `on_bad_row="error"`, or no usable row.
    """
    questions, bad = [], list(bad)
    chat = Chat(tokenizer, parse_template_kwargs(settings.chat_template_kwargs))
    for prompt in prompts:
        try:
            if answers and prompt.answer is None:
                raise ValueError("no ground truth; `answer` or `reward_model.ground_truth` is needed")
            chat.check_length(prompt.prompt, prompt.tools, context)
            ids = chat.prompt_ids(prompt.prompt, prompt.tools)
            if context is not None and len(ids) + settings.max_new_tokens > context:
                raise ValueError(
                    f"its {len(ids)} tokens and {settings.max_new_tokens} new ones (--max_new_tokens) are "
                    f"more than the {context} positions of the models in use"
                )
            questions.append(Question(prompt, ids))
        except ValueError as error:
            bad.append(BadRow(path, prompt.row, str(error)))
    report_bad_rows(bad, settings.on_bad_row, total=len(questions) + len(bad))
    if not questions:
        raise IpvrmError(f"{path}: no usable row; the first: {bad[0]}")
    return questions, bad


def sample(engine: Engine, jobs: Sequence[Job], sampling: Sampling, seed: int) -> list[list[int]]:
    """One response per job, as token ids; the last is a stop token unless it was cut off."""
    seeds = [response_seed(seed, number, i) for _, number, i in jobs]
    return engine([question.ids for question, _, _ in jobs], sampling, seeds)


def response_text(ids: Sequence[int], stops: Container[int], tokenizer: Any) -> tuple[str, bool]:
    """The text of a response, without the token that ended it, and whether one did."""
    ended = bool(ids) and ids[-1] in stops
    text = tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False)
    return str(text), ended


def judge(
    responses: Sequence[tuple[Sequence[int], Question]],
    stops: Container[int],
    tokenizer: Any,
    verdicts: Judge,
) -> list[Verdict | None]:
    """The verdict on each response, as token ids, to its question; None for one that was cut off.

    Args:
        verdicts: `VerifierPool.judge`, or what does the same.
    """
    ended = [i for i, (ids, _) in enumerate(responses) if ids and ids[-1] in stops]
    pairs = [(response_text(responses[i][0], stops, tokenizer)[0], responses[i][1].answer) for i in ended]
    found: list[Verdict | None] = [None] * len(responses)
    for i, verdict in zip(ended, verdicts(pairs), strict=True):
        found[i] = verdict
    return found
