"""Rows of text with an outcome label to token ids: the one way that every command takes.

A row is a conversation whose last message is the assistant's, or a prompt and a response. It becomes the
tokens of the prompt and those that the policy sampled, the end-of-turn token included where it ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ipvrm.data.chat import Chat, missing_part, tokenizer_hash
from ipvrm.data.rows import BadRow, OnBadRow, Row, Sampled, report_bad_rows
from ipvrm.errors import IpvrmError

OnLong = Literal["drop", "truncate"]
TOKENIZER_CHUNK = 4096  # rows
TOKENIZER_CHARACTERS = 1 << 22
NOTED = {  # counts of rows whose stored ids are worth a word, and what it says of them
    "other_tokens_than_sampled": "were sampled as other tokens than their text encodes to; those are taken",
    "ids_of_another_tokenizer": "have ids of another tokenizer; their text is encoded with this one",
    "other_prompts_than_rendered": "were sampled behind another prompt than the chat template writes here, "
    "which is what `score` reads; the sampled one is taken (other --chat_template_kwargs at `rollout`, or a "
    "template that writes the date)",
}


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
    """Usable responses, how many rows went where, the rows that were left out (`on_bad_row="skip"`), and the
    sources of the rows behind each of the counts `NOTED`."""

    responses: list[Response]
    counts: dict[str, int]
    bad: list[BadRow]
    noted: dict[str, list[str]]


def tokenize(
    rows: Sequence[Row],
    chat: Chat | Any,
    *,
    max_length: int | None,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    on_long: OnLong = "drop",
    on_bad_row: OnBadRow = "error",
    with_offsets: bool = False,
) -> Tokenized:
    """Rows to token ids, in order: prompt + what the policy sampled.

    A row's response is, in this order: (1) the ids that `ipvrm rollout` stored, the prompt's too, if they are
    of this tokenizer; they must decode to the row's text; (2) the text's own tokens behind the prompt's, and
    behind them the token that ends a turn under this template (else `eos_token`) where the response ended;
    (3) where the answer is a message with more than content (reasoning, tool calls), what the template writes
    for it.
    With a chat template a text prompt becomes one user message; without, prompt and response stand as they
    are.

    Args:
        chat: tokenizer and the variables of its template.
        max_length: most tokens of prompt and response together; None for no limit.
        max_positions: the fewest of the models in use; a row that is longer after all is a bad one. Without
            either limit a prompt or a response of more than `chat.MOST_CHARACTERS` characters is one.
        vocab_size: of the model; a row with a stored id beyond it is a bad one.
        on_long: `drop` leaves longer rows out and counts them; `truncate` cuts the response on the right (it
            then has no end-of-turn token) and drops only rows whose prompt alone is too long.
        with_offsets: fill `Response.offsets`.

    Returns: besides the usual counts, `other_tokens_than_sampled`: rows whose stored ids are not what their
        text encodes to; `ids_of_another_tokenizer`: rows whose stored ids cannot be used here.

    Raises:
        IpvrmError: bad rows under `on_bad_row="error"`, or a tokenizer without character offsets.
    """
    if on_long not in ("drop", "truncate"):
        raise IpvrmError(f"on_long must be 'drop' or 'truncate'; got {on_long!r}")
    chat = chat if isinstance(chat, Chat) else Chat(chat)
    if not chat.tokenizer.is_fast:
        raise IpvrmError(
            f"{type(chat.tokenizer).__name__} gives no character offsets; "
            "a tokenizer.json (fast tokenizer) is needed"
        )
    limit = min((n for n in (max_length, max_positions) if n is not None), default=None)
    encoder = _Encoder(
        chat, with_offsets, limit, vocab_size, cut=on_long == "truncate" and max_length is not None
    )
    responses: list[Response] = []
    bad: list[BadRow] = []
    counts = {"rows": len(rows), "used": 0, "bad": 0, "too_long_dropped": 0, "truncated": 0}

    def refused(row: Row, reason: str) -> None:
        file, _, number = row.source.rpartition(":")
        bad.append(BadRow(file, int(number) if number.isdigit() else 0, reason))

    for chunk in _chunks(rows):
        for row, response in encoder(chunk):
            if isinstance(response, TooLong) and max_length is not None and limit == max_length:
                counts["too_long_dropped"] += 1
                continue
            if isinstance(response, str | TooLong):
                refused(row, str(response))
                continue
            if max_length is not None and len(response.input_ids) > max_length:
                if on_long == "drop" or response.prompt_length >= max_length:
                    counts["too_long_dropped"] += 1
                    continue
                counts["truncated"] += 1
                offsets = response.offsets and response.offsets[: max_length - response.prompt_length]
                response = replace(response, input_ids=response.input_ids[:max_length], offsets=offsets)
            if max_positions is not None and len(response.input_ids) > max_positions:
                length, limit = len(response.input_ids), max_positions
                excess = f"its {length} tokens are more than the {limit} positions of the models in use"
                refused(row, f"{excess}; shorten it, or where the command has --max_length, give {limit}")
                continue
            responses.append(response)
    report_bad_rows(bad, on_bad_row, total=len(rows))
    counts |= {
        "used": len(responses),
        "bad": len(bad),
        "tokens": sum(len(r.input_ids) for r in responses),
        "response_tokens": sum(r.length for r in responses),
        "right": sum(r.label == 1 for r in responses),
        "wrong": sum(r.label == 0 for r in responses),
        **{name: len(sources) for name, sources in encoder.noted.items()},
    }
    return Tokenized(responses, counts, bad, encoder.noted)


class TooLong(ValueError):
    """A row whose texts have more tokens than are allowed for certain, so that none are made of them."""


def _chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows to be tokenised together: the tokenizer's own form of a text takes 100 times its size."""
    start = size = 0
    for index, row in enumerate(rows):
        size += len(row.response)
        if size > TOKENIZER_CHARACTERS or index - start >= TOKENIZER_CHUNK:
            if index > start:
                yield rows[start:index]
            start, size = index, len(row.response)
    if start < len(rows):
        yield rows[start:]


class _Encoder:
    """Encodes a chunk of rows; yields a Response, or the reason why there is none, for each.

    `limit` is the most tokens of a row; `cut`: a longer response is not dropped but cut there. Stored ids are
    below `vocab_size`.
    """

    def __init__(self, chat: Chat, with_offsets: bool, limit: int | None, vocab_size: int | None, cut: bool):
        self.chat, self.limit, self.vocab_size, self.cut = chat, limit, vocab_size, cut
        self.with_offsets = with_offsets
        self.hash: str | None = None
        self.noted: dict[str, list[str]] = {name: [] for name in NOTED}

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Response | str | TooLong]]:
        texts = [self._answer(row) for row in rows]
        encodings = iter(self.chat.encodings([t for t in texts if not isinstance(t, ValueError)]))
        for row, text in zip(rows, texts, strict=True):
            try:
                if isinstance(text, ValueError):
                    raise text
                yield row, self._response(row, text, next(encodings))
            except TooLong as error:
                yield row, error
            except ValueError as error:
                yield row, str(error)

    def _answer(self, row: Row) -> str | ValueError:
        """The text that becomes the response's tokens."""
        try:
            try:
                self.chat.check_length(row.prompt, row.tools, self.limit)
            except ValueError as error:
                raise TooLong(str(error)) from error
            if reason := self.chat.too_long("response", len(row.response), self.limit):
                if not self.cut or row.message is not None:
                    raise TooLong(reason)
                return row.response[: self.chat.most_characters(self.limit)]
            if row.message is None:
                return row.response
            if not self.chat.has_template:
                raise ValueError("messages need a tokenizer with a chat template, and this one has none")
            return self.chat.render_answer(row.prompt, row.message, row.tools)
        except ValueError as error:
            return error

    def _response(self, row: Row, text: str, encoding: Any) -> Response:
        ids, offsets = list(encoding.ids), list(encoding.offsets) if self.with_offsets else []
        end = self.chat.end_of_turn
        if row.message is not None and end in ids:  # what templates write behind the end is nobody's
            ids = ids[: ids.index(end) + 1]
        if row.ended and ids[-1:] != [end]:
            ids.append(end)
        elif not row.ended and row.message is not None and ids[-1:] == [end]:
            ids.pop()
        prompt = self.chat.prompt_ids(row.prompt, row.tools)
        if (sampled := row.sampled) is not None and self._is_ours(row.source, sampled):
            check_sampled(row, sampled, self.chat.tokenizer, self.vocab_size)
            if sampled.prompt_ids != prompt:
                self.noted["other_prompts_than_rendered"].append(row.source)
                prompt = sampled.prompt_ids
            if list(sampled.response_ids) != ids:
                self.noted["other_tokens_than_sampled"].append(row.source)
                ids = list(sampled.response_ids)
                offsets = offsets_of(self.chat.tokenizer, ids) if self.with_offsets else []
        if not ids or (row.ended and len(ids) == 1 and not text):
            raise ValueError("the response has no tokens")
        relative = None
        if self.with_offsets:
            of_text = [(a, b) if b <= len(text) else (-1, -1) for a, b in offsets[: len(ids)]]
            relative = (*of_text, *[(-1, -1)] * (len(ids) - len(of_text)))
            if row.ended:
                relative = (*relative[:-1], (-1, -1))
        return Response((*prompt, *ids), len(prompt), row.label, row.source, relative)

    def _is_ours(self, source: str, sampled: Sampled) -> bool:
        if self.hash is None:
            self.hash = tokenizer_hash(self.chat.tokenizer)
        if sampled.tokenizer_hash != self.hash:
            self.noted["ids_of_another_tokenizer"].append(source)
        return sampled.tokenizer_hash == self.hash


def check_sampled(row: Row, sampled: Sampled, tokenizer: Any, vocab_size: int | None) -> None:
    """Raises ValueError unless the stored ids are below `vocab_size` and decode to the row's text."""
    body = sampled.response_ids[:-1] if row.ended else sampled.response_ids
    if not sampled.prompt_ids or not sampled.response_ids:
        raise ValueError("prompt_ids and response_ids must hold at least one id each")
    # A tokenizer may decode an id that nobody has to no text at all, so the texts below do not show it.
    for name, ids in (("prompt_ids", sampled.prompt_ids), ("response_ids", sampled.response_ids)):
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ValueError(
                f"{name} hold {max(ids)}, and the model has the ids below {vocab_size} alone; roll "
                "out again with this model, or leave out prompt_ids, response_ids and tokenizer_hash"
            )
    if (found := _decode(tokenizer, body)) != row.response:
        raise ValueError(f"response_ids decode to another text than the response: {found!r:.60}")
    text = _decode(tokenizer, sampled.prompt_ids)
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    if missing_part(messages, row.tools, text):
        raise ValueError(f"prompt_ids decode to another text than the prompt: {text!r:.60}")


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    try:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    except (OverflowError, IndexError, TypeError) as error:
        raise ValueError(f"ids that the tokenizer does not have: {error}") from error


def offsets_of(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Character range of each token within the text of all of them; one that only starts or continues a
    character lies in that character's range."""
    ends = [
        len(tokenizer.decode(list(ids[: i + 1]), clean_up_tokenization_spaces=False).rstrip("\ufffd"))
        for i in range(len(ids))
    ]
    return [(min(start, end), max(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
