"""`Engine` of a served model: one request per response, so that each is drawn with a seed of its own.

The common prompt of n responses is computed once where the server caches prefixes, as vLLM does by default.
The token ids are those that the server has sampled. What a request leaves out, vLLM takes from the model's
generation config (a repetition penalty, say), so every request says all of it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipvrm.data.batches import collate
from ipvrm.data.responses import Response
from ipvrm.errors import IpvrmError
from ipvrm.models.causal_lm import response_logprobs
from ipvrm.models.server import AGAIN, HALF, Server
from ipvrm.rollouts.engine import Sampling

NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
PREFIX = "token_id:"  # of a token in `logprobs` under `return_tokens_as_token_ids`
SAME = 0.01  # nats by which the two best tokens of the probe must move apart to say anything


class Sampled(NamedTuple):
    """A response of T tokens with its candidates, K slots as `linear_candidates` leaves them."""

    ids: list[int]  # T
    logprobs: Tensor  # (T,) fp32, of the sampled tokens
    candidate_ids: Tensor  # (T, K) int64, best first, -1 at unused slots
    candidate_logprobs: Tensor  # (T, K) fp32, -inf there


class ServerEngine:
    """What `TransformersEngine` is to a model in memory.

    Args:
        server: `Server.concurrency` is the most responses generated at a time.
        stop_ids: tokens that end a response.

    `adapter` is the name of the LoRA adapter that takes part, None for the model alone.
    """

    def __init__(self, server: Server, stop_ids: Iterable[int]):
        self.server = server
        self.stop_ids = frozenset(stop_ids)
        self.adapter: str | None = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Raises IpvrmError for a prompt without tokens and for an answer that is late, half or another's."""
        return [ids for ids, _ in self._sample(prompts, sampling, seeds)]

    def with_candidates(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        min_prob: float = 0.1,
    ) -> list[Sampled]:
        """Responses with every token that the distribution they were drawn from gives `min_prob` or more.

        No more than K = floor(1 / min_prob) tokens can have that, so the K best, which `logprobs` gives, hold
        them all: 10 at 0.1. vLLM gives 20 at most unless started with --max-logprobs.

        Raises:
            IpvrmError: as in a call; top_p or top_k, which cut the distribution behind the log-probs; a
                temperature of 0; another than 1 on a server whose log-probs are from before it; values that
                are no log-probs.
        """
        if not 1 / 128 <= min_prob <= 1:
            raise IpvrmError(f"candidates: min_prob must lie in [1/128, 1]; got {min_prob}")
        if sampling.top_p != 1 or sampling.top_k != 0:
            raise IpvrmError(
                f"candidates of a server need top_p 1 and top_k 0, so that its log-probs are those of the "
                f"sampling distribution; got {sampling.top_p} and {sampling.top_k}"
            )
        if sampling.temperature == 0:
            raise IpvrmError("candidates need a temperature above 0: at 0 nothing is drawn")
        if not prompts:
            return []
        if sampling.temperature != 1 and not self._processed(prompts[0]):
            raise IpvrmError(
                f"{self.server.url}: its log-probs are from before temperature {sampling.temperature:g}, "
                "so its best tokens are not the sampling distribution's; start it with --logprobs-mode "
                "processed_logprobs, or sample at temperature 1"
            )
        K = math.floor(1 / min_prob + 1e-4)
        found = self._sample(prompts, sampling, seeds, {"logprobs": K, "return_tokens_as_token_ids": True})
        return [self._candidates(ids, choice, K, min_prob) for ids, choice in found]

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        more: dict[str, Any] | None = None,
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """The ids of each response, with the server's answer."""
        if any(not prompt for prompt in prompts) or len(prompts) != len(seeds):
            raise IpvrmError("rollout: every prompt needs at least one token, and a seed")
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": sorted(self.stop_ids),
            **NEUTRAL,
            **(more or {}),
        }

        def one(job: tuple[Sequence[int], int]) -> tuple[list[int], dict[str, Any]]:
            prompt, seed = job
            choice = self.server.completion(prompt, name=self.adapter, seed=seed, **settings)
            return self._whole(choice, sampling.max_new_tokens), choice

        return self.server.each(one, zip(prompts, seeds, strict=True))

    def _whole(self, choice: dict[str, Any], most: int) -> list[int]:
        """The token ids of a response that has ended as it must."""
        ids, reason, url = list(choice["token_ids"]), choice.get("finish_reason"), self.server.url
        ended = bool(ids) and ids[-1] in self.stop_ids
        if reason not in ("stop", "length") or (reason == "length" and not ended and len(ids) != most):
            raise IpvrmError(f"{url}: half an answer, {len(ids)} of {most} tokens ({reason}); {AGAIN}")
        if reason == "stop" and not ended or any(token in self.stop_ids for token in ids[:-1]):
            stops = ", ".join(map(str, sorted(self.stop_ids)))
            raise IpvrmError(
                f"{url}: a response must end with the first of the stop tokens {stops} and have it among its "
                f"token_ids; it ends with {ids[-1:]}. Serve the model with its own generation config and no "
                "stop words"
            )
        return ids

    def _candidates(self, ids: list[int], choice: dict[str, Any], K: int, min_prob: float) -> Sampled:
        given = choice.get("logprobs")
        tops = given.get("top_logprobs") if isinstance(given, dict) else None
        if not isinstance(tops, list) or len(tops) != len(ids):
            raise IpvrmError(f"{self.server.url}: no top_logprobs of each of {len(ids)} tokens{HALF}")
        sampled = torch.empty(len(ids))
        found_ids = torch.full((len(ids), K), -1)
        found = torch.full((len(ids), K), -math.inf)
        for t, (token, top) in enumerate(zip(ids, tops, strict=True)):
            values = self._top(top)
            if token not in values or len(values) < K:
                raise IpvrmError(
                    f"{self.server.url}: {len(values)} log-probs of a token, asked for {K} and its own{HALF}"
                )
            sampled[t] = values[token]
            kept = sorted((-p, i) for i, p in values.items() if p >= math.log(min_prob))
            found_ids[t, : len(kept)] = torch.tensor([i for _, i in kept], dtype=torch.int64)
            found[t, : len(kept)] = torch.tensor([-p for p, _ in kept])
        return Sampled(ids, sampled, found_ids, found)

    def _top(self, top: Any) -> dict[int, float]:
        """{token id: log-prob} of one position; they must be log-probs."""
        try:
            values = {int(name.removeprefix(PREFIX)): float(value) for name, value in top.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise IpvrmError(f"{self.server.url}: its logprobs name no token ids{HALF}") from error
        if sum(math.exp(min(value, 1.0)) for value in values.values()) > 1.001:
            raise IpvrmError(
                f"{self.server.url}: its logprobs add up to more than 1; it must not be started with "
                "--logprobs-mode raw_logits or processed_logits"
            )
        return values

    def _processed(self, prompt: Sequence[int]) -> bool:
        """Whether the server's log-probs are of the distribution at the temperature asked for: at 2 the two
        best tokens are then half as far apart as at 1."""

        def apart(temperature: float) -> float:
            settings = {**NEUTRAL, "max_tokens": 1, "temperature": temperature, "top_p": 1.0, "top_k": 0}
            choice = self.server.completion(
                prompt, name=self.adapter, seed=0, logprobs=2, return_tokens_as_token_ids=True, **settings
            )
            tops = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
            best = sorted(self._top(tops[0]).values(), reverse=True)
            if len(best) < 2:
                raise IpvrmError(f"{self.server.url}: no logprobs of a token{HALF}")
            return best[0] - best[1]

        at_1, at_2 = apart(1.0), apart(2.0)
        return abs(at_1 - at_2) > SAME and abs(at_1 / 2 - at_2) < abs(at_1 - at_2)

    @torch.no_grad()
    def gap(self, responses: Sequence[Response], model: torch.nn.Module) -> float:
        """Mean distance in nats, at temperature 1, between the server's and `model`'s log-probs of tokens.

        A served policy of other weights shows here: bf16 on one side leaves a few hundredths.
        """
        device = next(model.parameters()).device
        served = self.server.logprobs(responses, self.adapter)
        own = [response_logprobs(model, collate([r]).to(device)).float().cpu() for r in responses]
        return float((torch.cat(served) - torch.cat(own)).abs().mean())
