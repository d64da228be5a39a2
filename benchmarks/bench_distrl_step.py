"""One DistRL step, end to end: behaviour pass with candidates, reward model on the same ids, advantages,
two-branch loss, backward; on 8 sequences of up to 2048 (GPU) or 256 (CPU) tokens, a quarter of that at least.

Eager: full logits of both models, log_softmax, top-k, a loop over time for GAE, padded or packed as suits;
the same with what follows the logits compiled. Released: with log_softmax over 64 rows at a time. Ours:
linear_candidates, linear_logprobs, segment_scan, linear_distrl_loss. All take the same advantages from the
same formulas (Eq. 8, 10-14, 25-29), written once below. The policy is the behaviour policy, as in
the first minibatch. MiB are above weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.exact import Exact, ExactStep, exact_logprobs
from benchmarks.suite.heads import MIN_PROB, SLOTS
from benchmarks.suite.measure import Case, assert_close, assert_within
from benchmarks.suite.models import SEQUENCES, qwen3, ragged_batch, sharpen, title
from benchmarks.suite.peers import compiled, sliced_log_softmax, sliced_logprobs
from ipvrm.data.batches import Batch
from ipvrm.models.causal_lm import head, hidden_states
from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs, segment_scan, unpack

OP = "distrl_step"
Best = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # see eager_best
Logprobs = Callable[[Tensor, Tensor], Tensor]  # see eager_logprobs
ROLLOUTS = 4  # of one prompt
BETA, LAM, EPS = 10.0, 0.95, 1e-6
ALPHA, LOW, HIGH = 0.1, 0.2, 0.28


def cases(device: str, quick: bool) -> Iterator[Case]:
    policy, reward = qwen3(device, quick), qwen3(device, quick).requires_grad_(False)
    batch = ragged_batch(device, policy.config.vocab_size, quick)
    mean, mass, entropy = sharpen(policy, batch)
    reward.load_state_dict(policy.state_dict())
    with torch.no_grad():  # a reward model some way from the policy it was trained from
        for parameter in reward.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    parameters = list(policy.parameters())
    half = parameters[0].dtype != torch.float32  # then logits of the eager paths are the less accurate
    compiled_best, compiled_logprobs = compiled(eager_best), compiled(eager_logprobs)

    def ours() -> tuple[Tensor, ...]:
        with torch.no_grad():
            parts = head(policy)
            old = linear_candidates(hidden_states(policy, batch), parts.weight, sampled=batch.token_ids)
            candidate_ids = without_last(old.ids, batch, -1)
            ids = torch.cat([batch.token_ids[:, None], candidate_ids], 1)
            rm = linear_logprobs(hidden_states(reward, batch), head(reward).weight, ids).logprobs
            old_logprobs = torch.cat([old.sampled_logprobs[:, None], old.logprobs], 1)
            td = torch.where(ids >= 0, BETA * (rm - old_logprobs), 0)
            token, candidate = advantages(td, batch, lambda x: segment_scan(x, batch.cu_seqlens, LAM, True))
        loss = linear_distrl_loss(
            hidden_states(policy, batch), head(policy).weight, batch.token_ids, candidate_ids,
            old_logprobs[:, 0], old_logprobs[:, 1:], token, candidate, batch.cu_seqlens,
            alpha=ALPHA, clip_low=LOW, clip_high=HIGH,
        ).loss  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def full_logits(best: Best, logprobs: Logprobs) -> tuple[Tensor, ...]:
        def logits(model: Any) -> Tensor:  # (N, V)
            return model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]

        with torch.no_grad():
            sampled, values, indices = best(logits(policy), batch.token_ids[:, None])
            kept = without_last(values >= torch.tensor(MIN_PROB).log(), batch, False)
            ids = torch.cat([batch.token_ids[:, None], indices], 1)
            used = torch.cat([torch.ones_like(kept[:, :1]), kept], 1)
            old_logprobs = torch.cat([sampled, values], 1)
            rm_logprobs = logprobs(logits(reward), ids)
        loss = loss_of(used, old_logprobs, rm_logprobs, logprobs(logits(policy), ids))
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def loss_of(used: Tensor, old: Tensor, rm: Tensor, new: Tensor) -> Tensor:
        """From log-probs (N, 1 + K) under the behaviour policy, the reward model and the policy."""
        td = torch.where(used, BETA * (rm - old), 0)
        token, candidate = advantages(td, batch, lambda x: looped_gae(x, batch))
        ratio = (new - old).exp()
        a = torch.cat([token[:, None], candidate], 1)
        each = torch.where(used, -torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a), 0)
        per_token = each[:, 0] + ALPHA * (old[:, 1:].exp() * each[:, 1:]).sum(1)
        return (per_token * sequence_weight(batch)).sum()

    def exact() -> ExactStep:
        hidden, weight = hidden_states(policy, batch), head(policy).weight
        with torch.no_grad():
            sampled, values, indices = eager_best(
                torch.nn.functional.linear(hidden.float(), weight.float()), batch.token_ids[:, None]
            )
            kept = without_last(values >= torch.tensor(MIN_PROB).log(), batch, False)
            ids = torch.cat([batch.token_ids[:, None], indices], 1)
            used = torch.cat([torch.ones_like(kept[:, :1]), kept], 1)
            rm = exact_logprobs(hidden_states(reward, batch), head(reward).weight, ids)
        new = exact_logprobs(hidden, weight, ids)
        leaves = [x.detach().requires_grad_() for x in (torch.cat([sampled, values], 1), rm, new)]
        loss = loss_of(used, *leaves)
        slopes = torch.autograd.grad(loss, leaves)
        gradients = torch.autograd.grad(new, parameters, slopes[-1])
        return ExactStep(loss.detach(), gradients, torch.stack([slope.abs().sum() for slope in slopes]).sum())

    def check(results: Mapping[str, Any]) -> None:
        expected, *others = eager = results["eager full logits"]
        for name, (loss, *gradients) in results.items():
            if name == "ipvrm":
                off = max(Exact(hidden_states(m, batch), head(m).weight).allowed for m in (policy, reward))
                exact().compare(name, results[name], eager, off)
                continue
            scale = max(1.0, abs(expected.item()))  # the loss cancels to near nothing at a ratio of one
            assert_within(f"{name} loss", loss, expected, (5e-2 if half else 1e-4) * scale)
            for mine, theirs in zip(gradients, others, strict=True) if not half else ():
                assert_close(f"{name} gradient", mine, theirs, 2e-3)

    contenders: dict[str, Callable[[], Any]] = {
        "eager full logits": lambda: full_logits(eager_best, eager_logprobs),
        "torch.compile of eager": lambda: full_logits(compiled_best, compiled_logprobs),
        "released 64-row slices": lambda: full_logits(released_best, sliced_logprobs),
        "ipvrm": ours,
    }
    held = f"{mean:.2f} candidates a row with {100 * mass:.0f} % of the mass, entropy {entropy:.2f}"
    shape = f"{title(policy, batch)}; {held}"
    yield Case(OP, shape, contenders, check, tokens=int(batch.attention_mask.sum()))


def eager_best(logits: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (N, 1) of sampled (N, 1), the largest (N, SLOTS) and their ids, from full logits."""
    return chosen(torch.log_softmax(logits.float(), 1), sampled)


def released_best(logits: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with log_softmax over 64 rows at a time."""
    return chosen(sliced_log_softmax(logits), sampled)


def chosen(log_p: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = log_p.topk(SLOTS, 1)
    return log_p.gather(1, sampled), best.values, best.indices


def eager_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(N, K) log-probs of ids (N, K) from full logits."""
    return torch.log_softmax(logits.float(), 1).gather(1, ids)


def without_last(x: Tensor, batch: Batch, fill: Any) -> Tensor:
    """x (N, K) with the rows of the last response tokens filled: they carry the outcome, no candidates."""
    return x.index_fill(0, batch.cu_seqlens[1:].long() - 1, fill)


def sequence_weight(batch: Batch) -> Tensor:
    """(N,) 1 / (B T_b)."""
    lengths = batch.cu_seqlens.diff().long()
    return (1 / (lengths * len(lengths))).repeat_interleave(lengths, output_size=len(batch.token_ids))


def advantages(td: Tensor, batch: Batch, gae: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(N,) of the sampled tokens and (N, K) of the candidates from td (N, 1 + K), zero at unused slots."""
    cu, N = batch.cu_seqlens.long(), len(batch.token_ids)
    lengths = cu.diff()
    sampled = td[:, 0].index_fill(0, cu[1:] - 1, 0)  # the last token carries the outcome
    running = sampled.double().cumsum(0)
    start = torch.cat([running.new_zeros(1), running])[cu[:-1]]
    value = running - start.repeat_interleave(lengths, output_size=N)
    scale = (value.std(correction=0) + EPS).float()  # Eq. 25
    sampled, candidate = sampled / scale, td[:, 1:] / scale
    group = torch.arange(len(lengths), device=td.device) // ROLLOUTS
    token_group = group.repeat_interleave(lengths, output_size=N)
    normalised = (sampled - moments(sampled, token_group)[0]) / (moments(sampled, token_group)[1] + EPS)
    mean, std = moments(batch.outcome, group)
    outcome = ((batch.outcome - mean) / (std + EPS)).repeat_interleave(lengths, output_size=N)
    return outcome + gae(normalised), candidate


def moments(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Population mean and standard deviation over each element's group, like x."""
    none = x.new_zeros(SEQUENCES // ROLLOUTS)
    count = none.index_add(0, group, torch.ones_like(x))
    mean = none.index_add(0, group, x) / count
    square = none.index_add(0, group, (x - mean[group]) ** 2) / count
    return mean[group], square.sqrt()[group]


def looped_gae(x: Tensor, batch: Batch) -> Tensor:
    """(N,) the reverse scan with decay LAM as trainers write it: a Python loop over padded columns."""
    T = batch.input_ids.shape[1]
    padded = unpack(x, batch.cu_seqlens, T)
    carry, columns = torch.zeros_like(padded[:, 0]), []
    for t in reversed(range(T)):
        carry = padded[:, t] + LAM * carry
        columns.append(carry)
    mask = torch.arange(T, device=x.device) < batch.cu_seqlens.diff()[:, None]
    return torch.stack(columns[::-1], 1)[mask]
