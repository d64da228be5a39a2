"""What `train-policy --offline` trains on in the place of sampling: labelled rollouts with the log-probs and
candidates of the policy that sampled them, as `ipvrm rollout --min_prob` and `ipvrm label` write them, and
the log-probs of a reward model where `ipvrm rollout --reward_model` has added them.

A step takes the next prompts with mixed outcomes, in an order that is a pure function of the seed.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ipvrm.data.batches import epoch_order
from ipvrm.data.chat import tokenizer_hash
from ipvrm.data.files import file_hash, records
from ipvrm.data.responses import Response, check_sampled
from ipvrm.data.rows import (
    BEHAVIOUR,
    COLUMNS,
    SAMPLED,
    SCORED,
    TURNS,
    BadRow,
    Sampled,
    as_object,
    report_bad_rows,
    row_of,
)
from ipvrm.errors import IpvrmError
from ipvrm.losses.policy_loss import CandidateConfig
from ipvrm.models.causal_lm import local_folder, vocab_size, weights_hash
from ipvrm.models.reward_model import read_info
from ipvrm.training.flags import filled
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.policy_rollouts import Rollouts, Verified, rollouts_of


@dataclass(frozen=True)
class Stored:
    """A response of T tokens, and what was known of them when they were sampled."""

    response: Response
    logprobs: Tensor  # (T,)
    candidate_ids: Tensor  # (T, K_b), -1 where there are fewer
    candidate_logprobs: Tensor  # (T, K_b), -inf there
    rm_logprobs: Tensor | None  # (T,), of the run's reward model; None where they are not stored
    rm_candidate_logprobs: Tensor | None  # (T, K_b)


class StoredRollouts:
    """Collects as `Collector` does, from a file.

    `scored` says whether all that is learnt from comes with the log-probs of the run's reward model; if not,
    that is to score them.

    Args:
        candidates: those that the run asks for; None for none.
        context: most tokens of prompt and response; None for no limit.

    Raises:
        IpvrmError: a file without these columns; a row of another tokenizer, policy, temperature, `min_prob`
            or reward model; bad rows, among them such as lack the columns, under `on_bad_row="error"`; or not
            one prompt with both outcomes.
    """

    def __init__(
        self, config: PolicyConfig, tokenizer: Any, candidates: CandidateConfig | None, context: int | None
    ):
        self.config, self.candidates = config, candidates
        counts: Counter[str] = Counter()
        bad: list[BadRow] = []
        vocabulary = vocab_size(config.model)
        self.kind: dict[str, Any] = {
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "policy_hash": weights_hash(config.model),
            "temperature": config.temperature,
        }
        if candidates is not None:
            self.kind["min_prob"] = candidates.min_prob
        scores: tuple[str, ...] = ()
        if config.reward_model is not None:
            self.kind["rm_hash"] = read_info(local_folder(config.reward_model)).weights_hash
            scores = SCORED
        groups: dict[tuple[int, ...], list[Stored]] = {}
        for file, number, _, record in records(config.train_data, (*COLUMNS, *BEHAVIOUR, *scores), TURNS):
            try:
                counts["rows"] += 1
                given, where = as_object(record), f"{file}:{number}"
                if missing := [n for n in (*SAMPLED, *BEHAVIOUR) if given.get(n) is None]:
                    counts["incomplete"] += 1
                    raise ValueError(f"lacks {', '.join(missing)}, which --offline needs")
                found_scores = [n for n in scores if given.get(n) is not None]
                if found_scores and len(found_scores) < len(scores):
                    raise ValueError(
                        f"{', '.join(scores)} belong together; the row has {', '.join(found_scores)} alone"
                    )
                self._check_kind(where, given)
                row = row_of(where, given)
                if not row.ended:
                    counts["truncated"] += 1
                    continue
                found = _stored(given, row.label, row.source, vocabulary, context, bool(found_scores))
                check_sampled(row, cast(Sampled, row.sampled), tokenizer, vocabulary)
                counts["scored"] += found.rm_logprobs is not None
                groups.setdefault(found.response.input_ids[: found.response.prompt_length], []).append(found)
            except IpvrmError:
                raise
            except ValueError as error:
                bad.append(BadRow(file, number, str(error)))
        if counts["incomplete"] == counts["rows"] > 0:
            raise IpvrmError(
                f"{config.train_data}: none of its {counts['rows']} rows has what --offline needs; make it "
                f"with `ipvrm rollout --min_prob` and `ipvrm label`. The first: {bad[0]}"
            )
        report_bad_rows(bad, config.on_bad_row, total=counts["rows"])
        self.groups = [g for g in groups.values() if len({s.response.label for s in g}) == 2]
        self.scored = bool(scores) and all(s.rm_logprobs is not None for g in self.groups for s in g)
        self.counts = {
            "rows": counts["rows"],
            "bad": len(bad),
            "truncated": counts["truncated"],
            "prompts": len(groups),
            "prompts_mixed": len(self.groups),
        }
        if scores:
            self.counts["rm_scored"] = counts["scored"]
        if not self.groups:
            raise IpvrmError(
                f"{config.train_data}: no prompt has both a right and a wrong response ({self.counts}), so "
                "there is nothing to learn from"
            )

    def _check_kind(self, where: str, record: dict[str, Any]) -> None:
        """Raises IpvrmError for a row of another kind: then the file is not of this run."""
        for name, value in self.kind.items():
            if record.get(name) in (value, None):  # only `rm_hash` may be missing
                continue
            if name == "tokenizer_hash":
                raise IpvrmError(
                    f"{where}: its ids are of another tokenizer than that of {self.config.model}"
                )
            if name == "policy_hash":
                raise IpvrmError(
                    f"{where}: its log-probs are of another policy than {self.config.model}; --offline "
                    "starts from the one that sampled"
                )
            if name == "rm_hash":
                raise IpvrmError(
                    f"{where}: its rm_logprobs are of another reward model (sha256 {record[name]!s:.12}) "
                    f"than {self.config.reward_model} ({value[:12]}); give the one that scored, or take "
                    f"{', '.join(SCORED)} out of the file, and yours scores the tokens"
                )
            raise IpvrmError(f"{where}: stored at {name} {record[name]}, and --{name} is {value:g}")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return max(len(s.response.input_ids) for group in self.groups for s in group)

    def fingerprint(self) -> str:
        """What decides the data of the run."""
        return file_hash(Path(self.config.train_data))

    def collect(self, place: int, device: torch.device) -> tuple[Rollouts, int, dict[str, float]]:
        """The next prompts' rollouts with log-probs and candidates, the place of the next prompt, counts."""
        size = min(filled(self.config.train_prompts), len(self.groups))
        places = range(place, place + size)
        taken = [(p, i, stored) for p in places for i, stored in enumerate(self._group(p))]
        rollouts = rollouts_of([Verified(p, i, stored.response) for p, i, stored in taken], device)
        stored = [s for *_, s in taken]
        width = 0 if self.candidates is None else None  # all
        ids = _joined([s.candidate_ids[:, :width] for s in stored], -1)
        logprobs = _joined([s.candidate_logprobs[:, :width] for s in stored], -torch.inf)
        rollouts.old_logprobs = torch.cat([s.logprobs for s in stored]).to(device)
        rollouts.candidate_ids, rollouts.old_candidate_logprobs = ids.to(device), logprobs.to(device)
        rollouts.candidate_advantages = torch.zeros_like(rollouts.old_candidate_logprobs)
        if self.scored:
            of_ids = [cast(Tensor, s.rm_candidate_logprobs)[:, :width] for s in stored]
            rollouts.rm_candidate_logprobs = _joined(of_ids, -torch.inf).to(device)
            rollouts.rm_logprobs = torch.cat([cast(Tensor, s.rm_logprobs) for s in stored]).to(device)
        numbers = {
            "prompts": float(size),
            "prompts_mixed": float(size),
            "responses": float(len(taken)),
            "responses_trained": float(len(taken)),
            "response_tokens": float(sum(rollouts.lengths)),
            "tokens": float(sum(len(r.input_ids) for r in rollouts.responses)),
            "rollout_accuracy": float(rollouts.outcome.mean()),
        }
        return rollouts, places.stop, numbers

    def _group(self, place: int) -> list[Stored]:
        """The rollouts of the prompt at this place of the order of the run."""
        epoch, index = divmod(place, len(self.groups))
        return self.groups[epoch_order(len(self.groups), self.config.seed, epoch)[index]]


def _padded(rows: list[list[Any]], width: int, fill: float, dtype: torch.dtype) -> Tensor:
    """(T, width), what is missing behind a row filled up."""
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)


def _joined(parts: list[Tensor], fill: float) -> Tensor:
    """(N, K) of (T, K_b), end to end."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def _stored(
    record: dict[str, Any],
    label: int | None,
    source: str,
    vocabulary: int,
    context: int | None,
    scored: bool,
) -> Stored:
    """What a row holds; `scored`: with the log-probs of a reward model. Raises ValueError with the reason."""
    prompt, answer = (record[name] for name in SAMPLED[:2])
    whose = ("old", "rm") if scored else ("old",)
    ids = record["candidate_ids"]
    of_tokens = {name: record[name] for name in (f"{w}_logprobs" for w in whose)}
    of_candidates = {name: record[name] for name in (f"{w}_candidate_logprobs" for w in whose)}
    if not prompt or not answer:
        raise ValueError("prompt_ids and response_ids must hold at least one id each")
    for name, column in {**of_tokens, "candidate_ids": ids, **of_candidates}.items():
        if not isinstance(column, list) or len(column) != len(answer):
            raise ValueError(f"{name} must be a list with one entry a token of response_ids: {len(answer)}")
    for name, column in of_candidates.items():
        pairs = list(zip(ids, column, strict=True))
        if not all(isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in pairs):
            raise ValueError(f"candidate_ids and {name} differ in how many a token has")
    if ids[-1]:
        raise ValueError("the last token has candidates; it carries the outcome and must have none")
    flat = {name: [x for row in column for x in row] for name, column in of_candidates.items()}
    for name, column in {**of_tokens, **flat}.items():
        if not all(isinstance(x, float) and -math.inf < x <= 0 for x in column):
            raise ValueError(f"{name} must hold finite numbers of at most 0")
    every = [*prompt, *answer, *(i for row in ids for i in row)]
    if not all(type(i) is int and 0 <= i < vocabulary for i in every):
        raise ValueError(f"ids must be whole numbers in [0, {vocabulary})")
    if context is not None and (length := len(prompt) + len(answer)) > context:
        raise ValueError(f"its {length} tokens are more than the {context} positions of the models in use")
    width = max(map(len, ids))
    logprobs = [torch.tensor(column) for column in of_tokens.values()]
    of_ids = [_padded(column, width, -torch.inf, torch.float32) for column in of_candidates.values()]
    return Stored(
        Response((*prompt, *answer), len(prompt), label, source),
        logprobs[0],
        _padded(ids, width, -1, torch.int64),
        of_ids[0],
        rm_logprobs=logprobs[1] if scored else None,
        rm_candidate_logprobs=of_ids[1] if scored else None,
    )
