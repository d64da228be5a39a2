"""Prompts and rollouts as text: what a row is, which files hold them, which rows cannot be used and why."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from ipvrm.data.files import records, without_none
from ipvrm.data.preference import PAIR_COLUMNS, split_preference
from ipvrm.errors import IpvrmError

Message = dict[str, Any]
OnBadRow = Literal["error", "skip"]
IN_THE_ANSWER = "it belongs in `reasoning_content` of the assistant's message of a `conversation`"
NOT_READ = {  # columns by which other trainers give a model something to read, and what to do with them
    "functions": "name the column `tools`",
    "system_prompt": "name the column `system`",
    "history": "its turns belong in the messages of `conversation` or `prompt`",
    "reasoning_content": IN_THE_ANSWER,
    "reasoning": IN_THE_ANSWER,
    "thinking": IN_THE_ANSWER,
    "tool_calls": "they belong in the assistant's message of a `conversation`",
    "chat_template_kwargs": "give them as --chat_template_kwargs, the same for all rows",
} | dict.fromkeys(("documents", "image", "images", "video", "videos", "audio", "audios"), "leave it out")
COLUMNS = (
    "conversation", "prompt", "response", "label", "system", "tools", "truncated",
    "prompt_ids", "response_ids", "tokenizer_hash", *NOT_READ,
)  # fmt: skip
PROMPT_COLUMNS = ("prompt", "system", "tools", "answer", "reward_model", "data_source", *NOT_READ)
SAMPLED = ("prompt_ids", "response_ids", "tokenizer_hash")
BEHAVIOUR = (
    "old_logprobs", "candidate_ids", "old_candidate_logprobs", "temperature", "min_prob", "policy_hash"
)  # fmt: skip
SCORED = ("rm_logprobs", "rm_candidate_logprobs", "rm_hash")  # beside them, of a reward model
TURNS = (("conversation",), ("prompt", "response"))  # one of these sets of columns holds a rollout
LABELLED = (*TURNS, PAIR_COLUMNS)  # ... or two of them
SHOWN_BAD_ROWS = 10


@dataclass(frozen=True)
class Sampled:
    """The ids that a policy was given and sampled, the token that ended the response included."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    tokenizer_hash: str  # `ipvrm.data.chat.tokenizer_hash`


@dataclass(frozen=True)
class Row:
    """One rollout as text. `source` is `file:row`; `label` is 1 (right), 0 (wrong) or None (unlabelled).

    `message` is the answer where it has more than content (reasoning, tool calls); `tools` what the template
    is given beside the messages; `ended` whether the response has reached its end of turn.
    """

    source: str
    prompt: str | tuple[Message, ...]
    response: str
    label: int | None = None
    message: Message | None = None
    tools: tuple[Any, ...] | None = None
    ended: bool = True
    sampled: Sampled | None = None


@dataclass(frozen=True)
class Turns:
    """The messages of a record: what was asked, and the answer; `message` where it has more than content."""

    prompt: str | tuple[Message, ...]
    response: str
    message: Message | None = None
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt. `row` counts from 1, over all shards; `answer` is the ground truth, None without one."""

    row: int
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    data_source: str | None = None
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `row` counts from 1: a line of JSONL, a record of JSON or parquet."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class BadRows:
    """Counts the bad rows of a file that is read as a stream, and keeps the first of them to show."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < SHOWN_BAD_ROWS:
            self.first.append(row)

    def report(self, on_bad_row: OnBadRow, *, total: int) -> None:
        """As `report_bad_rows`."""
        report_bad_rows(self.first, on_bad_row, total=total, count=self.count)


def read_rows(
    path: str | Path, on_bad_row: OnBadRow = "error", *, require_label: bool = True
) -> tuple[list[Row], list[BadRow]]:
    """Reads a `.parquet`, `.jsonl` or `.json` file of rollouts, or a folder of such shards.

    Args:
        path: rows with `conversation` (messages, assistant last), or `prompt` (text or messages) and
            `response`; `label` (0 or 1); or pairs of `prompt`, `chosen`, `rejected`, each of which becomes
            two rows of one `source`; where known `system` (a system message's text), `tools`,
            `truncated`, and what `ipvrm rollout` stored (`prompt_ids`, `response_ids`, `tokenizer_hash`).
        on_bad_row: `error` raises with the first bad rows; `skip` leaves them out and returns them.
        require_label: False accepts rows without a label.

    Raises:
        IpvrmError: an unreadable file, bad rows under `error`, or no usable row at all.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for file, number, _, record in records(path, (*COLUMNS, *PAIR_COLUMNS), LABELLED):
        try:
            source = f"{file}:{number}"
            rows += [row_of(source, part, require_label) for part in split_preference(as_object(record))]
        except ValueError as error:
            bad.append(BadRow(file, number, str(error)))
    report_bad_rows(bad, on_bad_row, total=len(rows) + len(bad))
    if not rows:
        raise IpvrmError(
            f"{path}: no usable row ({len(bad)} bad); {listed(bad, len(bad)) or 'the file is empty'}"
        )
    return rows, bad


def row_of(source: str, record: dict[str, Any], require_label: bool = True) -> Row:
    """The row of one record (`read_rows`). Raises ValueError with the reason."""
    found = turns(record)
    if not found.response.strip() and found.message is None:
        raise ValueError("the response is empty")
    label, ended = _label(record, require_label), not truncated(record)
    return Row(
        source, found.prompt, found.response, label, found.message, found.tools, ended, sampled(record)
    )


def read_prompts(
    path: str | Path, on_bad_row: OnBadRow = "error", *, limit: int | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """Reads a `.parquet`, `.jsonl` or `.json` file of prompts, or a folder of such shards.

    Args:
        path: rows with `prompt` (text or messages, the last not the assistant's); where known, the ground
            truth in `answer` or `reward_model.ground_truth`, and `data_source`.
        on_bad_row: as in `read_rows`.
        limit: only the first so many rows.

    Raises:
        IpvrmError: an unreadable file, bad rows under `error`, or no usable row at all.
    """
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    for file, number, index, record in islice(records(path, PROMPT_COLUMNS, (("prompt",),)), limit):
        try:
            _refuse_not_read(as_object(record))
            prompt = prompt_of(record)
            if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
                raise ValueError("the prompt ends with an assistant's message; there is no turn to write")
            answer, source = ground_truth(record), data_source(record)
            prompts.append(Prompt(index, prompt, answer, source, tools_of(record)))
        except ValueError as error:
            bad.append(BadRow(file, number, str(error)))
    report_bad_rows(bad, on_bad_row, total=len(prompts) + len(bad))
    if not prompts:
        raise IpvrmError(
            f"{path}: no usable row ({len(bad)} bad); {listed(bad, len(bad)) or 'the file is empty'}"
        )
    return prompts, bad


def report_bad_rows(
    bad: Sequence[BadRow], on_bad_row: OnBadRow, *, total: int, count: int | None = None
) -> None:
    """Raises IpvrmError with file, row and reason of the first bad rows unless they are to be skipped.

    `count` is how many there are where `bad` holds only the first.
    """
    if on_bad_row not in ("error", "skip"):
        raise IpvrmError(f"on_bad_row must be 'error' or 'skip'; got {on_bad_row!r}")
    count = len(bad) if count is None else count
    if bad and on_bad_row == "error":
        raise IpvrmError(
            f"{count} of {total} rows are bad (--on_bad_row skip leaves them out):\n{listed(bad, count)}"
        )


def listed(bad: Sequence[BadRow | str], count: int) -> str:
    """The first of them, a line each, and how many more of `count` there are."""
    lines = [f"  {item}" for item in bad[:SHOWN_BAD_ROWS]]
    if count > len(lines):
        lines.append(f"  ... and {count - len(lines)} more")
    return "\n".join(lines)


def as_object(record: Any) -> dict[str, Any]:
    """The record. Raises ValueError when it is none, or the one that stands in its place."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with named columns; got {type(record).__name__}")
    return record


def prompt_of(record: dict[str, Any]) -> str | tuple[Message, ...]:
    """The `prompt` of a record, text or messages. Raises ValueError with the reason."""
    if (prompt := record.get("prompt")) is None:
        raise ValueError(f"needs `prompt`; the columns are {', '.join(map(str, record)) or 'none'}")
    if not isinstance(prompt, str):
        return _with_system(tuple(_messages(prompt, "prompt")), record)
    if not prompt:
        raise ValueError("prompt is empty; the first response token would have nothing that predicts it")
    if record.get("system") is None:
        return prompt
    return _with_system(({"role": "user", "content": prompt},), record)


def _with_system(messages: tuple[Message, ...], record: dict[str, Any]) -> tuple[Message, ...]:
    system = record.get("system")
    if system is None:
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system must be text; got {type(system).__name__}")
    if any(message["role"] == "system" for message in messages):
        raise ValueError("there is a `system` column and a system message; leave one of them out")
    return ({"role": "system", "content": system}, *messages)


def tools_of(record: dict[str, Any]) -> tuple[Any, ...] | None:
    """The `tools` of a record, a list or a JSON list in a text. Raises ValueError with the reason."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"tools is not valid JSON: {error}") from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools must be a list of objects; got {tools!r:.40}")
    return tuple(without_none(tools, "tools"))


def truncated(record: dict[str, Any]) -> bool:
    """Whether the response was cut off before its end of turn. Raises ValueError with the reason."""
    value = record.get("truncated")
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"truncated must be true or false; got {value!r:.40}")
    return bool(value)


def sampled(record: dict[str, Any]) -> Sampled | None:
    """The ids that `ipvrm rollout` stored. Raises ValueError with the reason."""
    given = [name for name in SAMPLED if record.get(name) is not None]
    if not given:
        return None
    if len(given) < len(SAMPLED):
        raise ValueError(f"{', '.join(SAMPLED)} belong together; the row has {', '.join(given)} alone")
    ids = [record[name] for name in SAMPLED[:2]]
    for name, value in zip(SAMPLED, ids, strict=False):
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise ValueError(f"{name} must be a list of token ids; got {value!r:.40}")
    return Sampled(tuple(ids[0]), tuple(ids[1]), str(record[SAMPLED[2]]))


def ground_truth(record: dict[str, Any]) -> str | None:
    """`answer`, else `reward_model.ground_truth`, as text; None where neither has a value.

    4.0 of a float column is `4`; NaN, `nan` and blanks are no value.
    """
    nested = record.get("reward_model")
    for value in (record.get("answer"), nested.get("ground_truth") if isinstance(nested, dict) else None):
        if (text := _truth_text(value)) is not None:
            return text
    return None


def _truth_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return None if (text := value.strip()).lower() in ("", "nan") else text
    if isinstance(value, bool | complex) or not isinstance(value, Real | Decimal):
        raise ValueError(f"the ground truth must be a text or a number; got {value!r:.40}")
    number = Decimal(str(value))
    if number.is_nan():
        return None
    if number.is_infinite():
        return "\\infty" if number > 0 else "-\\infty"
    if number == number.to_integral_value() and number.adjusted() < 16:  # all digits of a float are known
        return str(int(number))
    return str(value)


def data_source(record: dict[str, Any]) -> str | None:
    """The `data_source` of a record, None where there is none."""
    value = record.get("data_source")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"data_source must be a text; got {value!r:.40}")
    return value


def turns(record: Any) -> Turns:
    """What was asked and answered in a record. Raises ValueError with the reason."""
    record = as_object(record)
    _refuse_not_read(record)
    tools = tools_of(record)
    if record.get("conversation") is not None:
        messages = _messages(record["conversation"], "conversation")
        answer = messages[-1]
        if answer["role"] != "assistant":
            raise ValueError(f"the last message must be the assistant's; its role is {answer['role']!r}")
        if len(messages) < 2:
            raise ValueError(
                "conversation must hold a prompt before the assistant's message; it has one message"
            )
        _refuse_two_turns(record, messages)
        prompt = _with_system(tuple(messages[:-1]), record)
        structured = answer if set(answer) - {"role", "content"} else None
        return Turns(prompt, answer["content"], structured, tools)
    if record.get("prompt") is None or "response" not in record:
        names = ", ".join(map(str, record)) or "none"
        raise ValueError(
            f"needs `conversation`, or `prompt` and `response`; the columns with a value are {names}"
        )
    response = record["response"]
    if not isinstance(response, str):
        raise ValueError(f"the response must be text; got {type(response).__name__}")
    return Turns(prompt_of(record), response, None, tools)


def _refuse_not_read(record: dict[str, Any]) -> None:
    """Raises ValueError where a column of other trainers holds what the model should see."""
    for name, advice in NOT_READ.items():
        if _holds_something(record.get(name)):
            raise ValueError(f"`{name}` is not read, so the model would not see it; {advice}")


def _holds_something(value: Any) -> bool:
    """False for None and what is empty, within lists and objects too (parquet fills them in)."""
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    if isinstance(value, list):
        return any(map(_holds_something, value))
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _refuse_two_turns(record: dict[str, Any], messages: list[Message]) -> None:
    """Raises ValueError where `prompt` or `response` beside a conversation say something else."""
    prompt, response = record.get("prompt"), record.get("response")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is not None and _messages(prompt, "prompt") != messages[:-1]:
        raise ValueError("`prompt` and `conversation` differ; leave one of them out")
    if response is not None and response != messages[-1]["content"]:
        raise ValueError("`response` and `conversation` differ; leave one of them out")


def _messages(value: Any, column: str) -> list[Message]:
    """The messages whole, without keys that hold nothing (parquet fills them in)."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages; got {type(value).__name__} {value!r:.40}")
    messages: list[Message] = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{column}[{index}] must be a message; got {type(message).__name__}")
        message = without_none(message, f"{column}[{index}]")
        if message.get("tool_calls") == []:
            del message["tool_calls"]
        elif "tool_calls" in message:
            message.setdefault("content", "")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{column}[{index}] must have text `role` and `content`; "
                f"got {type(role).__name__} and {type(content).__name__}"
            )
        messages.append(message)
    return messages


def _label(record: dict[str, Any], required: bool) -> int | None:
    label = record.get("label")
    if label is None:
        if required:
            raise ValueError("label is missing; it must be 1 (right) or 0 (wrong)")
        return None
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ValueError(f"label must be 0 or 1; got {label!r:.40}")
    return int(label)
