"""What `train-policy --offline` trains on in the place of sampling: labelled rollouts with the log-probs and
candidates of the policy that sampled them, as `ipvrm rollout --min_prob` and `ipvrm label` write them.

A step takes the next prompts with mixed outcomes, in an order that is a pure function of the seed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ipvrm.data.batches import epoch_order
from ipvrm.data.chat import tokenizer_hash
from ipvrm.data.files import file_hash, records
from ipvrm.data.responses import Response
from ipvrm.data.rows import BEHAVIOUR, COLUMNS, SAMPLED, TURNS, BadRow, as_object, report_bad_rows, row_of
from ipvrm.errors import IpvrmError
from ipvrm.losses.policy_loss import CandidateConfig
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


class StoredRollouts:
    """Collects as `Collector` does, from a file.

    Args:
        candidates: those that the run asks for; None for none.
        context: most tokens of prompt and response; None for no limit.

    Raises:
        IpvrmError: a file without these columns or of another tokenizer, temperature or `min_prob`, bad rows
            under `on_bad_row="error"`, or not one prompt with both outcomes.
    """

    def __init__(
        self, config: PolicyConfig, tokenizer: Any, candidates: CandidateConfig | None, context: int | None
    ):
        self.config, self.candidates = config, candidates
        counts: Counter[str] = Counter()
        bad: list[BadRow] = []
        digest, vocabulary = tokenizer_hash(tokenizer), len(tokenizer)
        groups: dict[tuple[int, ...], list[Stored]] = {}
        for file, number, _, record in records(config.train_data, (*COLUMNS, *BEHAVIOUR), TURNS):
            try:
                counts["rows"] += 1
                given = as_object(record)
                self._check_kind(given, digest)
                row = row_of(f"{file}:{number}", given)
                if not row.ended:
                    counts["truncated"] += 1
                    continue
                found = _stored(given, row.label, row.source, vocabulary, context)
                groups.setdefault(found.response.input_ids[: found.response.prompt_length], []).append(found)
            except IpvrmError:
                raise
            except ValueError as error:
                bad.append(BadRow(file, number, str(error)))
        report_bad_rows(bad, config.on_bad_row, total=counts["rows"])
        self.groups = [g for g in groups.values() if len({s.response.label for s in g}) == 2]
        self.counts = {
            "rows": counts["rows"],
            "bad": len(bad),
            "truncated": counts["truncated"],
            "prompts": len(groups),
            "prompts_mixed": len(self.groups),
        }
        if not self.groups:
            raise IpvrmError(
                f"{config.train_data}: no prompt has both a right and a wrong response ({self.counts}), so "
                "there is nothing to learn from"
            )

    def _check_kind(self, record: dict[str, Any], digest: str) -> None:
        """Raises IpvrmError for a row that shows what the whole file is."""
        path = self.config.train_data
        missing = [name for name in (*SAMPLED, *BEHAVIOUR) if record.get(name) is None]
        if missing:
            raise IpvrmError(
                f"{path}: --offline needs the columns of `ipvrm rollout --min_prob`; missing: "
                f"{', '.join(missing)}"
            )
        if record["tokenizer_hash"] != digest:
            raise IpvrmError(f"{path}: its ids are of another tokenizer than that of {self.config.model}")
        wanted = {"temperature": self.config.temperature}
        if self.candidates is not None:
            wanted["min_prob"] = self.candidates.min_prob
        for name, value in wanted.items():
            if record[name] != value:
                raise IpvrmError(f"{path}: stored at {name} {record[name]}, and --{name} is {value:g}")

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
    record: dict[str, Any], label: int | None, source: str, vocabulary: int, context: int | None
) -> Stored:
    """What a row holds. Raises ValueError with the reason."""
    prompt, answer = (record[name] for name in SAMPLED[:2])
    logprobs, ids, of_ids = (record[name] for name in BEHAVIOUR[:3])
    if not prompt or not answer:
        raise ValueError("prompt_ids and response_ids must hold at least one id each")
    if not len(answer) == len(logprobs) == len(ids) == len(of_ids):
        raise ValueError(
            f"response_ids, {', '.join(BEHAVIOUR[:3])} must have one entry a token; they have "
            f"{len(answer)}, {len(logprobs)}, {len(ids)}, {len(of_ids)}"
        )
    if any(len(a) != len(b) for a, b in zip(ids, of_ids, strict=True)):
        raise ValueError("candidate_ids and old_candidate_logprobs differ in how many a token has")
    if not all(isinstance(x, float) and x <= 0 for row in (logprobs, *of_ids) for x in row):
        raise ValueError("log-probs must be numbers of at most 0")
    every = [*prompt, *answer, *(i for row in ids for i in row)]
    if not all(0 <= i < vocabulary for i in every):
        raise ValueError(f"ids must lie in [0, {vocabulary}); they go from {min(every)} to {max(every)}")
    if context is not None and (length := len(prompt) + len(answer)) > context:
        raise ValueError(f"its {length} tokens are more than the model's {context} positions")
    width = max(map(len, ids))
    return Stored(
        Response((*prompt, *answer), len(prompt), label, source),
        torch.tensor(logprobs),
        _padded(ids, width, -1, torch.int64),
        _padded(of_ids, width, -torch.inf, torch.float32),
    )
