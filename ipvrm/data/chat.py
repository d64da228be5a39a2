"""What a tokenizer's chat template writes: the prompt that a policy answers, and what ends an answer.

Messages reach the template whole. A template may drop without a word what it does not know (a role, a tool
call) or does not want (the thinking of earlier turns). So each text of a message is looked for in what the
template wrote, in order; and since a short one is found anywhere, the same conversation is written once with
other, unmistakable texts in place of its own. What is missing in either is an error.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ipvrm.data.rows import Message, Prompt
from ipvrm.errors import IpvrmError

MOST_KEPT = 1024  # prompts, or shapes of conversations, whose result is kept
# Of a prompt or a response where the model names no limit; a tokenizer takes 100 bytes for each.
MOST_CHARACTERS = 1 << 22
OF_THE_PROTOCOL = {"role", "tool_call_id", "id", "type", "index"}  # not for the model to read


def parse_template_kwargs(text: str | None) -> dict[str, Any]:
    """`--chat_template_kwargs` as a mapping; {} for None. Raises IpvrmError unless it is a JSON object."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise IpvrmError(f"--chat_template_kwargs {text}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise IpvrmError(
            f"--chat_template_kwargs must be a JSON object, for example '{{\"enable_thinking\": false}}'; "
            f"got {text}"
        )
    return found


def given_template_kwargs(text: str | None) -> dict[str, Any] | None:
    """`parse_template_kwargs` where a reward model may have its own: None is those."""
    return None if text is None else parse_template_kwargs(text)


def preset_template_kwargs(given: str | None, preset: str, tokenizer: Any) -> str | None:
    """`--chat_template_kwargs` where it is given, else what the preset has: `release` answers without
    thinking where the template can be told so."""
    if given is not None or preset != "release":
        return given
    name = "enable_thinking"
    return json.dumps({name: False}) if reads(tokenizer, name) else None


def reads(tokenizer: Any, name: str) -> bool:
    """Whether the chat template reads a variable of that name."""
    source = tokenizer.chat_template or ""
    source = source if isinstance(source, str) else json.dumps(source)  # several named templates
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


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


def tokenizer_hash(tokenizer: Any) -> str:
    """First 16 hex digits of the sha256 of the vocabulary: under the same one, ids mean the same text."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


class Chat:
    """A tokenizer with the settings of its chat template: texts and messages to token ids.

    Args:
        kwargs: variables of the template (`enable_thinking`), the same for all rows.

    Raises:
        IpvrmError: a variable that the template does not read, or no token that ends a turn.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self.has_template = tokenizer.chat_template is not None
        for name in self.kwargs:
            if not reads(tokenizer, name):
                raise IpvrmError(
                    f"--chat_template_kwargs: the chat template does not read {name!r}; leave it out"
                    if self.has_template
                    else f"--chat_template_kwargs {name!r}: the tokenizer has no chat template"
                )
        self.end_of_turn = end_of_turn_id(tokenizer)
        # Templates write their own BOS. Plain text gets the one that the tokenizer would add.
        leading = [] if self.has_template else tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self._leading = tuple(leading) if leading == [tokenizer.bos_token_id] else ()
        self._longest = 0
        self._prompts: dict[str, tuple[int, ...]] = {}  # rollouts of one prompt share its tokens
        self._shapes: dict[str, str | None] = {}

    def most_characters(self, limit: int | None) -> int:
        """A text of more characters has more than `limit` tokens, whatever it says: it need not be tokenised.
        Without a limit, `MOST_CHARACTERS`.

        No token stands for more characters than the longest one has; four times as many, because a tokenizer
        may compose characters first (NFC).
        """
        if limit is None:
            return MOST_CHARACTERS
        if not self._longest:
            self._longest = max(map(len, self.tokenizer.get_vocab()))
        return 4 * limit * self._longest

    def too_long(self, what: str, size: int, limit: int | None) -> str | None:
        """Why `what` of `size` characters is not tokenised; None where it is."""
        if size <= (most := self.most_characters(limit)):
            return None
        if limit is None:
            return (
                f"its {what} of {size:,} characters is more than the {most:,} that are read where the model "
                "names no limit of tokens"
            )
        return f"its {what} of {size:,} characters is more than {limit} tokens can hold ({most:,})"

    def check_length(
        self, prompt: str | Sequence[Message], tools: Sequence[Any] | None, limit: int | None
    ) -> None:
        """Raises ValueError where the prompt's texts alone are `too_long`."""
        size = sum(map(len, _leaves([prompt, tools]))) if not isinstance(prompt, str) else len(prompt)
        if reason := self.too_long("prompt", size, limit):
            raise ValueError(reason)

    def encode(self, texts: Sequence[str]) -> Any:
        """The tokenizer's encodings of `texts`, special tokens written out in them included, none added."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """`encode` with character offsets, an encoding each."""
        return list(self.encode(texts).encodings) if texts else []

    def prompt_ids(
        self, prompt: str | Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[int, ...]:
        """Token ids up to where the response starts.

        A text is the user's message under a chat template, and stands as it is without one.

        Args:
            tools: what the template is given as `tools`.

        Raises:
            ValueError: the reason why there are none.
        """
        key = _key(prompt, tools)
        if key not in self._prompts:
            self._keep(key, self._plain(prompt, tools) or self.render(prompt, tools))
        return self._prompts[key]

    def _keep(self, key: str, text: str) -> None:
        """Keeps the ids of a prompt that is written as `text`."""
        ids = (*(self._leading if not self.has_template else ()), *self.encode([text])["input_ids"][0])
        if not ids:
            raise ValueError(
                "the prompt has no tokens; the first response token would have nothing that predicts it"
            )
        _bounded(self._prompts)[key] = ids

    def _plain(self, prompt: str | Sequence[Message], tools: Sequence[Any] | None) -> str | None:
        """The prompt of a base model; None where the template writes it."""
        if self.has_template:
            return None
        if not isinstance(prompt, str) or tools:
            raise ValueError("messages need a tokenizer with a chat template, and this one has none")
        return prompt

    def render(self, prompt: str | Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The template's text of the messages and of the start of the answer. Raises ValueError."""
        messages = _messages(prompt)
        text = self._apply(messages, tools, add_generation_prompt=True)
        if reason := missing_part(messages, tools, text) or self._dropped(messages, tools):
            raise ValueError(reason)
        return text

    def render_answer(
        self, prompt: str | Sequence[Message], answer: Message, tools: Sequence[Any] | None = None
    ) -> str:
        """What the template writes behind the prompt for a whole message. Raises ValueError."""
        start = self.render(prompt, tools)
        self._keep(_key(prompt, tools), start)  # `prompt_ids` need not render it again
        whole = self._apply([*_messages(prompt), answer], tools, add_generation_prompt=False)
        if not whole.startswith(start):
            raise ValueError(
                "the chat template writes the prompt differently when this answer follows, so what it writes "
                "is not what was sampled; give the answer's text alone in `content`, as it was sampled, or "
                "other --chat_template_kwargs (thinking must be on where the message holds reasoning)"
            )
        rest = whole[len(start) :]
        messages = _messages(prompt)
        reason = missing_part([answer], None, rest, first=len(messages) + 1)
        if reason := reason or self._dropped([*messages, answer], tools, answered=True):
            raise ValueError(reason)
        return rest

    def _dropped(self, messages: list[Message], tools: Any, answered: bool = False) -> str | None:
        """Which part the template drops of a conversation of this shape, whatever its texts are."""
        probes = [_probe(message, number) for number, message in enumerate(messages, 1)]
        key = json.dumps([probes, tools, answered], sort_keys=True, default=str)
        if key not in self._shapes:
            text = self._apply(probes, tools, add_generation_prompt=not answered)
            _bounded(self._shapes)[key] = missing_part(probes, None, text)
        return self._shapes[key]

    def _apply(self, messages: list[Message], tools: Any, add_generation_prompt: bool) -> str:
        options = dict(self.kwargs) if not tools else {**self.kwargs, "tools": list(tools)}
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:  # jinja raises what the template's author wrote
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return text


def encode_prompt(
    prompt: Prompt | str | Sequence[Message], tokenizer: Any, kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """`Chat.prompt_ids` of one prompt. Raises ValueError: the reason why there are none."""
    chat = Chat(tokenizer, kwargs)
    if isinstance(prompt, Prompt):
        return list(chat.prompt_ids(prompt.prompt, prompt.tools))
    return list(chat.prompt_ids(prompt))


def _key(prompt: str | Sequence[Message], tools: Sequence[Any] | None) -> str:
    text = json.dumps([prompt, tools], sort_keys=True, default=str)
    return text if len(text) < 256 else hashlib.sha256(text.encode()).hexdigest()


def _bounded(cache: dict[str, Any]) -> dict[str, Any]:
    """The cache with room for one more: the oldest entry goes, so that it does not grow with the data."""
    if len(cache) >= MOST_KEPT:
        del cache[next(iter(cache))]
    return cache


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


# ----------------------------------------------------------------------------------- nothing lost on the way


def missing_part(
    messages: Sequence[Message], tools: Sequence[Any] | None, text: str, first: int = 1
) -> str | None:
    """Which part of the messages is not in `text`, in words with what to do; None where all of them are.

    The messages' contents are looked for one behind the other, so that one cannot stand in for another.
    `first` is the number of the first message in the conversation.
    """
    at = 0
    for number, message in enumerate(messages, first):
        start = at
        for name in ("reasoning_content", "content"):
            piece = message.get(name)
            if not isinstance(piece, str) or not piece.strip():
                continue
            end = _end_of(piece.strip(), text, start)
            if end is None:
                return _not_written(number, message, name)
            at = max(at, end)
            start = end if name == "reasoning_content" else start
        for name, piece in _further_pieces(message):
            where = text if name == "name" else text[start:]
            if _end_of(piece, where, 0) is None:
                return _not_written(number, message, name)
    for tool in tools or ():
        called = tool.get("function", tool).get("name")
        if isinstance(called, str) and called not in text:
            return f"the chat template does not write the tool {called!r}; leave `tools` out"
    return None


def _probe(value: Any, number: int, place: str = "") -> Any:
    """`value` with every text but the protocol's replaced by one that stands nowhere else."""
    if isinstance(value, Mapping):
        return {
            k: v if k in OF_THE_PROTOCOL else _probe(v, number, f"{place}{i}n")
            for i, (k, v) in enumerate(value.items())
        }
    if isinstance(value, list | tuple):
        return [_probe(v, number, f"{place}{i}n") for i, v in enumerate(value)]
    return f"zq{number}n{place}qz" if isinstance(value, str) and value.strip() else value


def _not_written(number: int, message: Message, name: str) -> str:
    return (
        f"message {number} (role {message['role']!r}): the chat template does not write its {name}, so the "
        "model would not see it; take a role that the template knows, or leave that part out"
    )


def _end_of(piece: str, text: str, at: int) -> int | None:
    """Where `piece`, or its form within JSON, ends in `text` from `at` on."""
    for form in dict.fromkeys((piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1])):
        if (found := text.find(form, at)) >= 0:
            return found + len(form)
    return None


def _further_pieces(message: Message) -> Iterator[tuple[str, str]]:
    """(key, text) of what a message holds besides its content and reasoning: calls, name, unknown keys."""
    for key, value in message.items():
        if key not in OF_THE_PROTOCOL and key not in ("content", "reasoning_content"):
            yield from ((key, piece) for piece in _leaves(value) if piece.strip())


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in OF_THE_PROTOCOL:
                yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        try:  # a call's arguments may be JSON in a text
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict | list):
            yield from _leaves(parsed)
        else:
            yield value
    elif value is not None:
        yield json.dumps(value)
