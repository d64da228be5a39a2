"""Rows of text with an outcome label to token ids: the only place that renders chat.

A row is a conversation whose last message is the assistant's, or a prompt and a response. It becomes the
token ids of prompt + response, the response ending at the end-of-turn token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ipvrm.data.rows import BadRow, OnBadRow, Row, report_bad_rows
from ipvrm.errors import IpvrmError

OnLong = Literal["drop", "truncate"]
TOKENIZER_CHUNK = 4096


@dataclass(frozen=True)
class Response:
    """One rollout as tokens.

    `input_ids` is prompt + response, `prompt_length` >= 1 of them are the prompt. `offsets` (only on
    request) gives each response token's character range within the response text; (-1, -1) for a token
    outside of it (end of turn).
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    label: int | None = None
    source: str = ""
    offsets: tuple[tuple[int, int], ...] | None = None

    @property
    def length(self) -> int:
        """Number of response tokens."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class Tokenized:
    """Usable responses, how many rows went where, and the rows that were left out (`on_bad_row="skip"`)."""

    responses: list[Response]
    counts: dict[str, int]
    bad: list[BadRow]


def end_of_turn_id(tokenizer: Any) -> int:
    """Id of the token that ends the assistant's turn: the first special token that the chat template writes
    behind the assistant's text, else the tokenizer's `eos_token`.

    Raises:
        IpvrmError: there is neither.
    """
    if tokenizer.chat_template is not None:
        probe = "ipvrm-probe"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # jinja raises what the template's author wrote; each row will report it
            text = ""
        tail = text[text.rindex(probe) + len(probe) :] if probe in text else ""
        special = set(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        for token_id in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token_id in special:
                return int(token_id)
    if tokenizer.eos_token_id is None:
        raise IpvrmError(
            "the tokenizer has no token that ends a turn; set its eos_token or its chat template"
        )
    return int(tokenizer.eos_token_id)


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None,
    on_long: OnLong = "drop",
    on_bad_row: OnBadRow = "error",
    with_offsets: bool = False,
) -> Tokenized:
    """Rows to token ids, in order.

    With a chat template a text prompt becomes one user message; without, prompt and response are joined as
    they are. The prompt's tokens must be a prefix of the whole's. The response ends at the first end-of-turn
    token behind its text, which is appended where the template writes none.

    Args:
        max_length: most tokens of prompt and response together; None for no limit.
        on_long: `drop` leaves longer rows out and counts them; `truncate` cuts the response on the right (it
            then has no end-of-turn token) and drops only rows whose prompt leaves no room.
        with_offsets: fill `Response.offsets`.

    Raises:
        IpvrmError: bad rows under `on_bad_row="error"`, or a tokenizer without character offsets.
    """
    if on_long not in ("drop", "truncate"):
        raise IpvrmError(f"on_long must be 'drop' or 'truncate'; got {on_long!r}")
    if not tokenizer.is_fast:
        raise IpvrmError(
            f"{type(tokenizer).__name__} gives no character offsets; "
            "a tokenizer.json (fast tokenizer) is needed"
        )
    encoder = _Encoder(tokenizer, with_offsets)
    responses: list[Response] = []
    bad: list[BadRow] = []
    counts = {"rows": len(rows), "used": 0, "bad": 0, "too_long_dropped": 0, "truncated": 0}
    for start in range(0, len(rows), TOKENIZER_CHUNK):
        for row, response in encoder(rows[start : start + TOKENIZER_CHUNK]):
            if isinstance(response, str):
                file, _, number = row.source.rpartition(":")
                bad.append(BadRow(file, int(number) if number.isdigit() else 0, response))
                continue
            if max_length is not None and len(response.input_ids) > max_length:
                if on_long == "drop" or response.prompt_length >= max_length:
                    counts["too_long_dropped"] += 1
                    continue
                counts["truncated"] += 1
                offsets = response.offsets and response.offsets[: max_length - response.prompt_length]
                response = replace(response, input_ids=response.input_ids[:max_length], offsets=offsets)
            responses.append(response)
    report_bad_rows(bad, on_bad_row, total=len(rows))
    counts |= {
        "used": len(responses),
        "bad": len(bad),
        "tokens": sum(len(r.input_ids) for r in responses),
        "response_tokens": sum(r.length for r in responses),
        "right": sum(r.label == 1 for r in responses),
        "wrong": sum(r.label == 0 for r in responses),
    }
    return Tokenized(responses, counts, bad)


class _Encoder:
    """Renders and encodes a chunk of rows; yields a Response, or the reason why there is none, for each."""

    def __init__(self, tokenizer: Any, with_offsets: bool):
        self.tokenizer = tokenizer
        self.with_offsets = with_offsets
        self.end_of_turn = end_of_turn_id(tokenizer)
        self.chat = tokenizer.chat_template is not None
        # Templates write their own BOS. Plain text gets the one the tokenizer would add.
        leading = [] if self.chat else tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self.leading = tuple(leading) if leading == [tokenizer.bos_token_id] else ()
        self.prompts: dict[str, tuple[int, ...]] = {}  # rollouts of one prompt share its tokens

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Response | str]]:
        rendered: list[tuple[str, str] | str] = [self._render(row) for row in rows]
        texts = [item for item in rendered if isinstance(item, tuple)]
        new = list({prompt: None for prompt, _ in texts if prompt not in self.prompts})
        for prompt, ids in zip(new, self._encode(new)["input_ids"] if new else [], strict=True):
            self.prompts[prompt] = tuple(ids)
        encodings = self._encode([text for _, text in texts]).encodings if texts else []
        index = 0
        for row, item in zip(rows, rendered, strict=True):
            if isinstance(item, str):
                yield row, item
                continue
            yield row, self._response(row, *item, encodings[index])
            index += 1

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)

    def _render(self, row: Row) -> tuple[str, str] | str:
        """(prompt text, whole text), or the reason why there is none."""
        if not self.chat:
            if not isinstance(row.prompt, str):
                return "messages need a tokenizer with a chat template, and this one has none"
            return row.prompt, row.prompt + row.response
        prompt = (
            [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        )
        try:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            answer = {"role": "assistant", "content": row.response}
            whole = self.tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
        except Exception as error:  # jinja raises what the template's author wrote
            return f"the chat template refuses the conversation: {error}"
        if not whole.startswith(text):
            return (
                "the chat template writes the prompt differently when an answer follows; "
                "it must be a prefix of the whole"
            )
        return text, whole

    def _response(self, row: Row, prompt: str, text: str, encoding: Any) -> Response | str:
        prompt_ids = self.prompts[prompt]
        ids = encoding.ids
        P = len(prompt_ids)
        if not P + len(self.leading):
            return "the prompt has no tokens; the first response token would have nothing that predicts it"
        if tuple(ids[:P]) != prompt_ids:
            return (
                "the prompt's tokens are not a prefix of the whole's (a token spans their boundary); "
                "end the prompt with a space or newline"
            )
        content = row.response.strip()  # templates may strip it
        begin = text.find(content, len(prompt))
        if begin < 0:
            return "the chat template rewrites the response's text"
        end = begin + len(content)
        # where the response starts, or would without the stripping
        origin = begin - row.response.index(content)
        if text.startswith(row.response, origin):
            begin, end = origin, origin + len(row.response)
        offsets = encoding.offsets
        stop = len(ids)  # first token that starts behind the text
        while stop > P and offsets[stop - 1][0] >= end:
            stop -= 1
        ending = next((i for i in range(stop, len(ids)) if ids[i] == self.end_of_turn), None)
        body = ids[: ending if ending is not None else stop]
        if len(body) <= P:
            return "the response has no tokens"
        relative = None
        if self.with_offsets:
            relative = tuple(
                (max(first, begin) - origin, last - origin) if last > begin and first < end else (-1, -1)
                for first, last in offsets[P : len(body)]
            )
            relative += ((-1, -1),)
        return Response(
            (*self.leading, *body, self.end_of_turn), len(self.leading) + P, row.label, row.source, relative
        )
