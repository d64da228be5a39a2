"""Pairs of a right and a wrong response to one prompt: read as they are, or made from labelled responses.

A record of TRL's preference format is read as two rows with labels, `chosen` 1 and `rejected` 0, of one
`source`; so every objective takes it, and `pairs_of` finds the two again.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

Pairs = Literal["one", "all"]
PAIR_COLUMNS = ("chosen", "rejected")


def is_preference(record: dict[str, Any]) -> bool:
    """Whether a record holds a pair."""
    return all(record.get(name) is not None for name in PAIR_COLUMNS)


def split_preference(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The two labelled rows of a record of `prompt` (text or messages, or none where both responses are whole
    conversations), `chosen` and `rejected` (text; messages to be put behind the prompt; or a conversation
    that begins with it).

    Raises:
        ValueError: with the reason: a label of its own, a response of another kind, or two prompts.
    """
    if not is_preference(record):
        return [record]
    extra = [n for n in ("label", "response", "conversation") if record.get(n) is not None]
    if extra:
        raise ValueError(f"`chosen` and `rejected` stand beside `{extra[0]}`; leave one of them out")
    rest = {name: value for name, value in record.items() if name not in (*PAIR_COLUMNS, "prompt")}
    found = []
    for name, label in (("chosen", 1), ("rejected", 0)):
        try:
            found.append(rest | _turns(record.get("prompt"), record[name]) | {"label": label})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    asked = [row["conversation"][:-1] if "conversation" in row else row["prompt"] for row in found]
    if asked[0] != asked[1]:
        raise ValueError("chosen and rejected answer different prompts")
    return found


def _turns(prompt: Any, answer: Any) -> dict[str, Any]:
    if isinstance(answer, str):
        if prompt is None:
            raise ValueError("a text needs a `prompt`")
        return {"prompt": prompt, "response": answer}
    if not isinstance(answer, list) or not answer or not all(isinstance(m, dict) for m in answer):
        raise ValueError(f"must be text or messages; got {answer!r:.40}")
    if prompt is None:
        return {"conversation": answer}
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if len(answer) == 1:
        return {"conversation": [*asked, *answer]}
    if answer[:-1] != asked:
        raise ValueError("its messages before the last are not those of `prompt`")
    return {"conversation": answer}


def pairs_of(
    groups: Sequence[Hashable], right: Sequence[bool], how: Pairs, seed: int
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(chosen, rejected) as places in `right`, and what became of the groups.

    Args:
        groups: which responses may be compared: those to one prompt, or the two of a record.
        how: `one` right and one wrong response of every group with both, drawn with `seed`; `all`: each
            right with each wrong one.
    """
    members: dict[Hashable, tuple[list[int], list[int]]] = {}
    for index, (group, ok) in enumerate(zip(groups, right, strict=True)):
        members.setdefault(group, ([], []))[bool(ok)].append(index)
    rng = np.random.default_rng([seed, 1])
    pairs: list[tuple[int, int]] = []
    counts = Counter(dict.fromkeys(("mixed_prompts", "only_right_prompts", "only_wrong_prompts"), 0))
    for losers, winners in members.values():
        name = "mixed" if losers and winners else "only_right" if winners else "only_wrong"
        counts[f"{name}_prompts"] += 1
        every = [(chosen, rejected) for chosen in winners for rejected in losers]
        if every and how == "one":
            every = [every[int(rng.integers(len(every)))]]
        pairs += every
    return pairs, {"pairs": len(pairs), **counts}
