"""One reward-model training step, end to end: model forward, IPVRM loss, backward, on 8 sequences of up to
2048 (GPU) or 256 (CPU) tokens, a quarter of that at least.

Before: the model's own full logits, `log_softmax`, padded Eq. 9 in eager PyTorch, as reward-model trainers
write it, and the same compiled. As released: with log_softmax over 64 rows at a time, which keeps every slice
for the backward. The rivals: with the log-prob of each package that has one and takes its gradient. After:
what `ipvrm train-rm` runs, which is timed against the fastest of them all. The yardstick is the first; MiB
are above weights. Ours is right by the same step with the head in fp32, loss and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite.exact import Exact, ExactStep, exact_logprobs
from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.models import qwen3, ragged_batch, title
from benchmarks.suite.peers import OneLogprob, compiled, sliced_logprobs
from benchmarks.suite.peers import logprobs as logprobs_of_peers
from ipvrm.losses.objectives import ipvrm_loss
from ipvrm.models.causal_lm import head, hidden_states, response_logprobs

OP = "reward_step"


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    """(N, 1) log-probs of ids (N, 1) from full logits."""
    return torch.log_softmax(logits, 1).gather(1, ids)


def cases(device: str, quick: bool) -> Iterator[Case]:
    model = qwen3(device, quick)
    vocabulary = model.config.vocab_size
    batch = ragged_batch(device, vocabulary, quick)
    B, N = len(batch.outcome), len(batch.token_ids)
    reference = response_logprobs(model, batch).detach() + 0.02 * torch.randn(N, device=device)
    parameters = list(model.parameters())
    half = parameters[0].dtype != torch.float32  # then logits of the eager paths are the less accurate
    peers, absent = logprobs_of_peers(device)
    compiled_eager = compiled(eager)
    width = batch.input_ids.shape[1]
    mask = torch.zeros(B, width, device=device)
    mask.view(-1)[batch.positions] = 1
    padded = torch.zeros(B, width, device=device)
    padded.view(-1)[batch.positions] = reference

    def before(logprobs: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
        targets = batch.input_ids[:, 1:].reshape(-1, 1)
        flat = logits.reshape(-1, vocabulary)
        return stepped(loss_of(logprobs(flat, targets).view(B, -1)))

    def rival(function: OneLogprob) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            packed = function(hidden_states(model, batch), head(model).weight, batch.token_ids)
            return stepped(loss_of(spread(packed)))

        return run

    def spread(packed: Tensor) -> Tensor:
        """(B, T - 1) from (N,), zero where there is no response."""
        rows = torch.zeros(B * width, device=device).index_put((batch.positions,), packed.float())
        return rows.view(B, width)[:, :-1]

    def loss_of(logprobs: Tensor) -> Tensor:
        """Eq. 9 of padded log-probs (B, T - 1)."""
        keep = mask[:, :-1]
        mean = 10.0 * ((logprobs - padded[:, :-1]) * keep).cumsum(1) / keep.cumsum(1).clamp(min=1)
        per_token = F.softplus(5.0 - (2 * batch.outcome - 1)[:, None] * mean) * keep
        return (per_token.sum(1) / keep.sum(1)).mean()

    def stepped(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def exact() -> ExactStep:
        weight, ids = head(model).weight, batch.token_ids[:, None]
        packed = exact_logprobs(hidden_states(model, batch), weight, ids)[:, 0]
        leaf = packed.detach().requires_grad_()
        loss = loss_of(spread(leaf))
        (slope,) = torch.autograd.grad(loss, leaf)
        gradients = torch.autograd.grad(packed, parameters, slope)
        return ExactStep(loss.detach(), gradients, slope.abs().sum())

    def after() -> tuple[Tensor, ...]:
        log_ratio = response_logprobs(model, batch) - reference
        return stepped(ipvrm_loss(log_ratio, batch.cu_seqlens, batch.outcome)[0])

    def check(results: Mapping[str, Any]) -> None:
        expected, *others = eager_results = results["eager full logits"]
        for name, (loss, *gradients) in results.items():
            if name == "ipvrm":
                allowed = Exact(hidden_states(model, batch), head(model).weight).allowed
                exact().compare(name, results[name], eager_results, allowed)
                continue
            assert_close(f"{name} loss", loss, expected, 1e-2 if half else 1e-5)
            for mine, theirs in zip(gradients, others, strict=True) if not half else ():
                assert_close(f"{name} gradient", mine, theirs, 1e-3)

    contenders = {
        "eager full logits": lambda: before(eager),
        "torch.compile of eager": lambda: before(compiled_eager),
        "released 64-row slices": lambda: before(sliced_logprobs),
        **{f"eager with {name}": rival(function) for name, function in peers.items()},
        "ipvrm": after,
    }
    late = {f"eager with {name}": reason for name, reason in absent.items()}
    tokens = int(batch.attention_mask.sum())
    yield Case(OP, title(model, batch), contenders, check, absent=late, tokens=tokens)
