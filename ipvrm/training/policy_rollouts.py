"""What a policy step trains on: verified rollouts of prompts whose outcomes differ, and what is known.

Prompts come in an order that is a pure function of the seed; a response's seed is one of the prompt's place
in that order. So the state of the data is one number, the place of the next prompt.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipvrm.data.batches import Batch, collate, epoch_order, microbatches_for_rank
from ipvrm.data.responses import Response
from ipvrm.errors import FailedAlike, IpvrmError
from ipvrm.models.reference import not_finite
from ipvrm.rollouts.answers import Question, judge, sample
from ipvrm.rollouts.engine import Engine, Sampling
from ipvrm.rollouts.verify import VerifierPool
from ipvrm.training.flags import filled
from ipvrm.training.policy_config import PolicyConfig

FAILURES = ("timeout", "crash", "error", "unreadable_ground_truth")


class Unanimous(FailedAlike):
    """Not one prompt of a step has both outcomes; `place` is that of the next prompt."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Verified:
    """One response that ended and has a label. `place` is its prompt's place in the order of the run."""

    place: int
    sample: int
    response: Response


class Targets(NamedTuple):
    """What the loss of n response tokens takes besides the policy."""

    candidate_ids: Tensor  # (n, K)
    old_logprobs: Tensor  # (n,)
    old_candidate_logprobs: Tensor  # (n, K)
    advantages: Tensor  # (n,)
    candidate_advantages: Tensor  # (n, K)


@dataclass
class Rollouts:
    """B labelled responses of G prompts, N response tokens packed in their order, K candidates.

    Filled in this order: tokens and labels, the behaviour policy's log-probs, a reward model's where they are
    stored, advantages. Tensors are on the device of the run.
    """

    responses: list[Response]
    outcome: Tensor  # (B,) fp32
    group: Tensor  # (B,) int64, the prompt
    num_groups: int
    cu_seqlens: Tensor  # (B + 1,) int32
    old_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)
    candidate_ids: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, K) int64, -1 for none
    old_candidate_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, K)
    rm_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)
    rm_candidate_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, K)
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)
    candidate_advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, K)

    def __post_init__(self) -> None:
        self.lengths = [r.length for r in self.responses]  # response tokens
        self.starts = self.cu_seqlens.tolist()

    def tokens_of(self, indices: Sequence[int]) -> Tensor:
        """(n,) int64: where the response tokens of these responses lie in the packed tensors."""
        parts = [torch.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        return torch.cat(parts).to(self.outcome.device)

    def targets(self, indices: Sequence[int]) -> Targets:
        """What the loss takes for these responses."""
        at = self.tokens_of(indices)
        return Targets(*(getattr(self, name)[at] for name in Targets._fields))

    def denominator(self, indices: Sequence[int], reduction: str) -> float | Tensor:
        """What `linear_distrl_loss` divides by where `indices` are the whole optimizer batch."""
        if reduction == "sequence_mean":
            return float(len(indices))
        if reduction == "token_mean":
            return float(sum(self.lengths[i] for i in indices))
        return self.old_candidate_logprobs[self.tokens_of(indices)].exp().sum()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The model's input for these responses."""
        return collate([self.responses[i] for i in indices]).to(self.outcome.device)

    def microbatches(self, indices: Sequence[int], max_rows: int, accelerator: Any) -> list[list[int]]:
        """This rank's share of `indices`; see `microbatches_for_rank`."""
        return microbatches_for_rank(
            indices,
            [len(r.input_ids) for r in self.responses],
            max_rows=max_rows,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    @torch.no_grad()
    def forward(
        self, function: Callable[[Batch, Tensor], tuple[Tensor, ...]], max_rows: int, accelerator: Any
    ) -> list[Tensor]:
        """What `function(batch, tokens_of)` returns, (n, ...) each, for all N tokens; ranks share them."""
        whole: list[Tensor] = []
        for micro in self.microbatches(range(len(self.responses)), max_rows, accelerator):
            tokens = self.tokens_of(micro or [0])  # a rank without rows computes one to know the shapes
            with accelerator.autocast():
                found = function(self.batch(micro or [0]), tokens)
            if not whole:
                whole = [x.new_zeros((self.starts[-1], *x.shape[1:])) for x in found]
            for x, part in zip(whole, found if micro else (), strict=False):
                x[tokens] = part
        return [accelerator.reduce(x, "sum") for x in whole]

    def not_finite(self, sampled: Tensor, candidates: Tensor | None = None) -> str | None:
        """The first response with a log-prob (N,), or of a used candidate (N, K), that is not finite, in
        words; None where all are."""
        if candidates is not None:
            faults = candidates.where((self.candidate_ids >= 0) & ~candidates.isfinite(), 0).sum(-1)
            sampled = sampled.where(~sampled.isfinite(), faults)
        return not_finite(sampled.cpu(), self.responses)


def rollouts_of(verified: Sequence[Verified], device: torch.device) -> Rollouts:
    """`verified`, grouped by their prompts."""
    places = sorted({v.place for v in verified})
    number = {place: i for i, place in enumerate(places)}
    batch = collate([v.response for v in verified])
    group = torch.tensor([number[v.place] for v in verified], device=device)
    responses = [v.response for v in verified]
    return Rollouts(responses, batch.outcome.to(device), group, len(places), batch.cu_seqlens.to(device))


# ------------------------------------------------------------------------------------------------ collecting


def questions_hash(questions: Sequence[Question]) -> str:
    """sha256 of the token ids and ground truths, in order."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.ids, question.answer)).encode())
    return digest.hexdigest()


@dataclass
class Collector:
    """Samples, verifies and filters. Each rank does whole prompts; all of them end with the same rollouts."""

    questions: list[Question]
    config: PolicyConfig
    engine: Engine
    stop_ids: Collection[int]
    tokenizer: Any
    pool: VerifierPool
    accelerator: Any
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def question(self, place: int) -> Question:
        """The prompt at this place of the order of the run."""
        epoch, index = divmod(place, len(self.questions))
        if epoch != self._order[0]:
            self._order = epoch, epoch_order(len(self.questions), self.config.seed, epoch)
        return self.questions[self._order[1][index]]

    def collect(self, place: int) -> tuple[Rollouts, int, dict[str, float]]:
        """Rollouts of prompts with mixed outcomes, the place of the next prompt, and counts and seconds.

        Raises:
            Unanimous: not one prompt has both outcomes.
        """
        config = self.config
        assert config.num_generations is not None and config.temperature is not None
        sampling = Sampling(config.max_new_tokens, config.temperature)
        counts: Counter[str] = Counter()
        seconds: dict[str, float] = {}
        mixed: list[Verified] = []
        found = 0
        for _ in range(config.max_rounds):
            places = range(place, place + filled(config.rollout_prompts))
            asked = [(p, self.question(p)) for p in places]
            verified, cut = self.sample(asked, sampling, config.num_generations, config.seed, counts, seconds)
            left_out = cut if config.drop_truncated == "prompt" else set()
            counts["prompts_truncated"] += len(left_out)
            place = places.stop
            for group in _by_place(verified, [p for p in places if p not in left_out]):
                labels = {v.response.label for v in group}
                kind = "mixed" if len(labels) == 2 else "all_right" if labels == {1} else "all_wrong"
                kind = kind if len(group) > 1 else "too_few_responses"
                if kind == "mixed" and found == config.train_prompts:
                    kind = "mixed_left_out"
                counts[f"prompts_{kind}"] += 1
                if kind == "mixed":
                    mixed, found = mixed + group, found + 1
            counts["prompts"] += len(places)
            counts["rounds"] += 1
            if found == config.train_prompts:
                break
        numbers = {name: float(counts[name]) for name in (*PROMPT_COUNTS, *RESPONSE_COUNTS, *TOKEN_COUNTS)}
        numbers["rollout_accuracy"] = counts["right"] / max(counts["right"] + counts["wrong"], 1)
        if not mixed:
            raise Unanimous(_unanimous(counts), place)
        numbers["responses_trained"] = len(mixed)
        return rollouts_of(mixed, self.accelerator.device), place, numbers | seconds

    def sample(
        self,
        asked: Sequence[tuple[int, Question]],
        sampling: Sampling,
        num_generations: int,
        seed: int,
        counts: Counter[str],
        seconds: dict[str, float],
    ) -> tuple[list[Verified], set[int]]:
        """Verified responses to (place, question) pairs, sorted by place, and the places with a response that
        was cut off before its end; of all ranks.

        What was cut off, and what the verifier failed on, is counted and left out.
        """
        from accelerate.utils import gather_object

        own = asked[self.accelerator.process_index :: self.accelerator.num_processes]
        jobs = [(q, p, i) for p, q in own for i in range(num_generations)]
        started = time.perf_counter()
        failed: str | None = None
        try:
            with self.accelerator.autocast():
                generated = sample(self.engine, jobs, sampling, seed)
        except IpvrmError as error:
            failed, jobs, generated = str(error), [], []
        sampled = time.perf_counter()
        responses = [(ids, q) for ids, (q, *_) in zip(generated, jobs, strict=True)]
        verdicts = judge(responses, self.stop_ids, self.tokenizer, self.pool.judge)
        verified = []
        mine: Counter[str] = Counter(verdict.outcome for verdict in verdicts if verdict is not None)
        mine.update(
            responses=len(jobs),
            truncated=verdicts.count(None),
            response_tokens=sum(map(len, generated)),
            tokens=sum(map(len, generated)) + sum(len(q.ids) for q, *_ in jobs),
            verifier_failures=sum(mine[name] for name in FAILURES),
        )
        mine["wrong"] += mine["no_answer"]
        for (q, p, i), ids, verdict in zip(jobs, generated, verdicts, strict=True):
            if verdict is not None and verdict.label is not None:
                response = Response(
                    (*q.ids, *ids), len(q.ids), verdict.label, f"prompt {q.prompt.row}, sample {i}"
                )
                verified.append(Verified(p, i, response))
        cut = {p for (_, p, _), verdict in zip(jobs, verdicts, strict=True) if verdict is None}
        everyone = [(verified, mine, cut, failed)]
        if self.accelerator.num_processes > 1:
            everyone = gather_object(everyone)
        if failures := [words for *_, words in everyone if words is not None]:
            raise FailedAlike(failures[0])  # a server that fails does so on the rank that asks it
        for _, numbers, *_ in everyone:
            counts.update(numbers)
        for name, spent in (("rollout", sampled - started), ("verify", time.perf_counter() - sampled)):
            seconds[f"seconds_{name}"] = seconds.get(f"seconds_{name}", 0.0) + spent
        found = sorted((v for found, *_ in everyone for v in found), key=lambda v: (v.place, v.sample))
        return found, set().union(*(places for *_, places, _ in everyone))

    def accuracy(self) -> dict[str, float]:
        """Share of right responses to all questions, avg@n, under the evaluation's sampling settings.

        A response that was cut off is wrong; one that the verifier failed on is left out and counted.
        """
        config, counts = self.config, Counter[str]()
        sampling = Sampling(
            config.max_new_tokens,
            filled(config.eval_temperature),
            filled(config.eval_top_p),
            filled(config.eval_top_k),
        )
        asked = list(enumerate(self.questions))
        self.sample(asked, sampling, filled(config.eval_num_generations), EVAL_SEED, counts, {})
        judged = counts["responses"] - counts["verifier_failures"]
        return {
            "eval_accuracy": counts["right"] / max(judged, 1),
            "eval_responses": float(judged),
            "eval_truncated": float(counts["truncated"]),
            "eval_verifier_failures": float(counts["verifier_failures"]),
            "eval_response_tokens": counts["response_tokens"] / max(counts["responses"], 1),
        }


KINDS = ("mixed", "mixed_left_out", "all_right", "all_wrong", "too_few_responses", "truncated")
PROMPT_COUNTS = ("rounds", "prompts", *(f"prompts_{kind}" for kind in KINDS))
RESPONSE_COUNTS = ("responses", "truncated", "no_answer", "verifier_failures", *FAILURES)
TOKEN_COUNTS = ("response_tokens", "tokens")
EVAL_SEED = 0  # the same random numbers at every evaluation and in every run: differences are paired


def _by_place(verified: Sequence[Verified], places: Sequence[int]) -> list[list[Verified]]:
    groups: dict[int, list[Verified]] = {place: [] for place in places}
    for v in verified:
        if v.place in groups:
            groups[v.place].append(v)
    return list(groups.values())


def _unanimous(counts: Counter[str]) -> str:
    return (
        f"none of the {counts['prompts']} prompts of this step has both a right and a wrong response, so "
        f"there is nothing to learn from: {counts['prompts_all_right']} all right, "
        f"{counts['prompts_all_wrong']} all wrong, {counts['prompts_too_few_responses']} with fewer than two "
        f"responses left, {counts['prompts_truncated']} left out for a response that was cut off "
        f"({counts['truncated']} of {counts['responses']} responses cut off, "
        f"{counts['verifier_failures']} verifier failures). Take more --num_generations, --rollout_prompts "
        "or --max_rounds, longer --max_new_tokens, or prompts of another difficulty"
    )
