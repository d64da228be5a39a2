"""The branches of `ipvrm eval td`: answers of a policy, prefixes where it had a choice, and their endings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ipvrm.data.batches import collate, length_sorted_microbatches
from ipvrm.data.responses import Response
from ipvrm.losses.policy_loss import CandidateConfig
from ipvrm.models.behaviour import behaviour
from ipvrm.models.reward_model import RewardModel
from ipvrm.rollouts.answers import Question, judge, sample
from ipvrm.rollouts.engine import Engine, Sampling
from ipvrm.rollouts.verify import Verdict, VerifierPool

FRACTIONS = (25, 50, 75, 100)  # of an answer, in percent


@dataclass(frozen=True)
class BranchOptions:
    """What `TdConfig` says about the branches; the fields are explained there."""

    num_responses: int
    prefixes_per_response: int
    completions: int
    min_prob: float
    top_k: int | None
    max_new_tokens: int
    temperature: float
    per_device_eval_batch_size: int
    batch_tokens: int
    seed: int


@dataclass
class Branch:
    """A prefix of `ids` (prompt and response so far) and, but for the prefix's own, one token behind it.

    `value` is V before its token; `first` the outcome of its first completion, None without a verdict.
    """

    ids: tuple[int, ...]
    key: tuple[int, ...]
    token: int | None = None
    logprob: float = 0.0
    value: float = 0.0
    td: float = 0.0
    first: int | None = None
    outcomes: Counter[str] = field(default_factory=Counter)

    def record(self, tokenizer: Any, sampled: int) -> dict[str, Any]:
        right, wrong = self.outcomes["right"], self.outcomes["wrong"] + self.outcomes["no_answer"]
        counts = {"right": right, "judged": right + wrong, "outcomes": dict(self.outcomes)}
        if self.token is None:
            return counts
        text = tokenizer.convert_ids_to_tokens(self.token)
        named = {"token": text, "sampled": self.token == sampled, "logprob": self.logprob, "td": self.td}
        return named | {"value": self.value + self.td, "first": self.first} | counts


@dataclass
class Answer:
    """A sampled response that ended and was judged, with its value after every token and its branches."""

    question: Question
    sample: int
    response: Response
    verdict: Verdict
    value: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (T,) fp64
    prefixes: list[tuple[int, Branch, list[Branch]]] = field(default_factory=list)  # position from 0


class Brancher:
    """Answers prompts, branches the answers and judges the branches' completions."""

    def __init__(
        self,
        options: BranchOptions,
        policy: torch.nn.Module,
        reward_model: RewardModel,
        tokenizer: Any,
        engine: Engine,
        stops: set[int],
        pool: VerifierPool,
    ):
        self.options, self.policy, self.reward_model = options, policy, reward_model
        self.tokenizer, self.engine, self.stops, self.pool = tokenizer, engine, stops, pool

    def run(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """A record per prompt, JSON."""
        answers, outcomes = self._answers(questions)
        self._values(answers)
        self._choose(answers)
        branches = [b for a in answers for _, own, others in a.prefixes for b in (own, *others)]
        self._td([b for b in branches if b.token is not None])
        rows = {q.prompt.row: q for q in questions}
        self._complete(branches, rows)
        found: dict[int, list[Answer]] = {row: [] for row in rows}
        for answer in answers:
            found[answer.question.prompt.row].append(answer)
        return [
            {
                "row": row,
                "outcomes": dict(outcomes[row]),
                "answers": [self._record(answer) for answer in found[row]],
            }
            for row in rows
        ]

    def _answers(self, questions: Sequence[Question]) -> tuple[list[Answer], dict[int, Counter[str]]]:
        """The answers that ended and have a verdict; and by row what became of all."""
        options = self.options
        jobs = [(q, q.prompt.row, i) for q in questions for i in range(options.num_responses)]
        sampling = Sampling(options.max_new_tokens, options.temperature)
        generated = sample(self.engine, jobs, sampling, options.seed)
        responses = [(ids, q) for ids, (q, *_) in zip(generated, jobs, strict=True)]
        verdicts = judge(responses, self.stops, self.tokenizer, self.pool.judge)
        outcomes = {q.prompt.row: Counter(truncated=0) for q in questions}
        answers = []
        for (question, row, i), ids, verdict in zip(jobs, generated, verdicts, strict=True):
            outcomes[row][_became(verdict)] += 1
            if verdict is not None and verdict.label is not None:
                response = Response((*question.ids, *ids), len(question.ids), verdict.label, f"prompt {row}")
                answers.append(Answer(question, i, response, verdict))
        return answers, outcomes

    def _values(self, answers: list[Answer]) -> None:
        log_ratios = self.reward_model.token_log_ratios(
            [a.response for a in answers], self.options.batch_tokens
        )
        for answer, log_ratio in zip(answers, log_ratios, strict=True):
            info = self.reward_model.info
            weights = info.beta * info.discount ** torch.arange(len(log_ratio))  # (T,)
            answer.value = (weights * log_ratio.double()).cumsum(0)

    def _choose(self, answers: list[Answer]) -> None:
        """Draws the prefixes of every answer, and gives each its candidates as branches."""
        options = self.options
        candidates = CandidateConfig(options.min_prob, options.top_k)
        device = next(self.policy.parameters()).device
        lengths = [len(a.response.input_ids) for a in answers]
        for indices in length_sorted_microbatches(lengths, max_tokens=options.batch_tokens):
            chosen = [answers[i] for i in indices]
            batch = collate([a.response for a in chosen]).to(device)
            found = behaviour(self.policy, batch, candidates, options.temperature)
            ids = found.candidate_ids.cpu().split([a.response.length for a in chosen])
            logprobs = found.candidate_logprobs.cpu().split([a.response.length for a in chosen])
            for answer, own_ids, own_logprobs in zip(chosen, ids, logprobs, strict=True):
                self._branch(answer, own_ids, own_logprobs)

    def _branch(self, answer: Answer, ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Of candidates `ids` (T, K), -1 for none, and their `logprobs` (T, K)."""
        options, row = self.options, answer.question.prompt.row
        open_positions = ((ids >= 0).sum(1) > 1).nonzero()[:, 0].tolist()
        rng = np.random.default_rng([options.seed, row, answer.sample])
        drawn = rng.permutation(open_positions)[: options.prefixes_per_response].astype(int)
        for position in sorted(drawn.tolist()):
            prefix = answer.response.input_ids[: answer.response.prompt_length + position]
            key = (row, answer.sample, position)
            value = float(answer.value[position - 1]) if position else 0.0
            branches = [
                Branch((*prefix, token), (*key, number), token, logprob, value)
                for number, (token, logprob) in enumerate(
                    zip(ids[position].tolist(), logprobs[position].tolist(), strict=True), 1
                )
                if token >= 0
            ]
            answer.prefixes.append((position, Branch(prefix, (*key, 0)), branches))

    def _td(self, branches: list[Branch]) -> None:
        info = self.reward_model.info
        for ended in (False, True):
            of_kind = [b for b in branches if (b.token in self.stops) == ended]
            responses = [
                Response(b.ids, len(b.ids) - 1, source=f"prompt {b.key[0]}, a candidate") for b in of_kind
            ]
            found = self.reward_model.token_log_ratios(responses, self.options.batch_tokens, ended=ended)
            for branch, log_ratio in zip(of_kind, found, strict=True):
                position = branch.key[2]
                branch.td = info.beta * info.discount**position * float(log_ratio)

    def _complete(self, branches: list[Branch], questions: dict[int, Question]) -> None:
        """Fills `outcomes`: `completions` of each. A branch that is at its end has but one ending, counted
        as many times."""
        options = self.options
        ends: list[tuple[Branch, Sequence[int], int, bool]] = []  # response, how often it counts, the first?
        jobs: list[tuple[Branch, int]] = []
        prompt_length = {row: len(q.ids) for row, q in questions.items()}
        for branch in branches:
            if branch.token in self.stops:
                ends.append((branch, branch.ids[prompt_length[branch.key[0]] :], options.completions, True))
            else:
                jobs += [(branch, i) for i in range(options.completions)]
        for indices in length_sorted_microbatches(
            [len(b.ids) for b, _ in jobs], max_rows=options.per_device_eval_batch_size
        ):
            batch = [jobs[i] for i in indices]
            budgets = [options.max_new_tokens - len(b.ids) + prompt_length[b.key[0]] for b, _ in batch]
            generated: list[list[int]] = [[] for _ in batch]
            if max(budgets) > 0:
                seeds = [_completion_seed(options.seed, *b.key, i) for b, i in batch]
                sampling = Sampling(max(budgets), options.temperature)
                generated = self.engine([b.ids for b, _ in batch], sampling, seeds)
            for (branch, number), ids, budget in zip(batch, generated, budgets, strict=True):
                whole = (*branch.ids[prompt_length[branch.key[0]] :], *ids[: max(budget, 0)])
                ends.append((branch, whole, 1, number == 0))
        responses = [(ids, questions[branch.key[0]]) for branch, ids, *_ in ends]
        verdicts = judge(responses, self.stops, self.tokenizer, self.pool.judge)
        for (branch, _, times, first), verdict in zip(ends, verdicts, strict=True):
            branch.outcomes[_became(verdict)] += times
            if first and verdict is not None:
                branch.first = verdict.label

    def _record(self, answer: Answer) -> dict[str, Any]:
        length, response = answer.response.length, answer.response
        at = {fraction: max(1, -(-fraction * length // 100)) for fraction in FRACTIONS}
        return {
            "sample": answer.sample,
            "right": answer.verdict.label,
            "tokens": length,
            "value": {str(f): float(answer.value[t - 1]) for f, t in at.items()},
            "mean_value": {str(f): float(answer.value[t - 1]) / t for f, t in at.items()},
            "prefixes": [
                {
                    "position": position,
                    "own": own.record(self.tokenizer, -1),
                    "branches": [
                        b.record(self.tokenizer, response.input_ids[response.prompt_length + position])
                        for b in branches
                    ],
                }
                for position, own, branches in answer.prefixes
            ],
        }


def _became(verdict: Verdict | None) -> str:
    return "truncated" if verdict is None else verdict.outcome


def _completion_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
