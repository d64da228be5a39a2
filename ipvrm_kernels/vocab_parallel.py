"""Heads whose vocabulary lies on the ranks of a group: what `linear_logprobs` and `linear_candidates` give
for the whole head, on every rank.

Rank r holds rows start_r .. start_r + V_r of the (V, D) head, and all ranks the same N rows of hidden. Each
makes one pass over its shard; what is exchanged is (N, 3 + K) numbers of log-probs, (N, 2 K + 3) of
candidates, and in the backward the (N, D) gradient of hidden. A candidate of the whole is one of its shard,
since p under a shard's softmax is at least p under the whole.

    lse = logsumexp_r lse_r,   w_r = exp(lse_r - lse),   entropy = sum_r w_r (entropy_r + lse - lse_r)

Tensor parallel alone: under FSDP2 the ranks hold other rows of the batch (`gathered_weight`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import checks_values, choose
from .head import check_row_ids, checked_transform, flat_rows, in_rows, out_dtype, prepare
from .inputs import checked_number
from .linear_candidates import IMPLS as CANDIDATES_IMPLS
from .linear_candidates import Candidates, check_min_prob, check_top_k, linear_candidates, num_slots
from .linear_logprobs import LinearLogprobs
from .linear_logprobs_partial import IMPLS as PARTIAL_IMPLS
from .linear_logprobs_partial import Partial, linear_logprobs_partial, merge_partials


class _ReduceGradient(torch.autograd.Function):
    """hidden as it is; its gradient summed over the group, each of whose ranks has that of its shard."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        if gradient is gradients[0]:
            gradient = gradient.clone()  # the collective writes where autograd may read again
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Shard(NamedTuple):
    """This rank's part: weight (V_r, D) and bias (V_r,) without padding, its first id; and the same on every
    rank: the size of the whole and of the largest part."""

    weight: Tensor
    bias: Tensor | None
    start: int
    V: int
    largest: int


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    vocab_start: int,
    group: Any,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    fill_value: float = -math.inf,
    return_entropy: bool = False,
    impl: str | None = None,
) -> LinearLogprobs:
    """`linear_logprobs` of a head whose rows lie on the ranks of `group`; the same result on each of them.

    Every rank must call it with the same hidden, ids and options, and go on to the same loss: the gradient
    of hidden is then summed over the group here, and each rank gets that of its own shard.

    Args:
        hidden: (N, D) or (B, T, D), the same on all ranks.
        weight: (V_r, D), rows vocab_start .. vocab_start + V_r; V_r may differ from rank to rank and be 0.
            An ordinary tensor: of a tensor-parallel DTensor pass `weight.to_local()`.
        ids: (N,) or (N, K) of the whole vocabulary, the same on all ranks; a negative one is no token.
        vocab_start: the id of weight's first row.
        group: the process group that the vocabulary is split over; the caller names it.
        vocab_size: V, where the shards are padded: rows from V on are left out. Default: all rows.
        bias: (V_r,). logit_scale, softcap, temperature, fill_value, return_entropy, impl: as in
            `linear_logprobs`.

    Raises:
        ValueError: as `linear_logprobs`, and on every rank alike where the ranks differ in N, K,
            requires_grad or (on the CPU, or under `set_checks(True)`) ids, or their shards do not cover the
            vocabulary once. A DTensor.
    """
    op = "vocab_parallel_logprobs"
    _refuse_dtensor(op, weight)
    numbers = prepare(op, hidden, weight, bias, logit_scale, softcap, temperature, may_be_empty=True)
    check_row_ids(op, "ids", ids, hidden, (1, 2))
    # here, and not only below: a rank without rows would wait for those that refuse
    choose(op, PARTIAL_IMPLS, impl, hidden)
    if not torch.compiler.is_compiling():
        checked_transform(op, *numbers)
    rows = hidden.shape[:-1]
    hidden, flat = flat_rows(hidden, rows), flat_rows(ids, rows)
    shard = _agreed(op, hidden, weight, bias, flat, vocab_start, vocab_size, group)
    if torch.is_grad_enabled() and hidden.requires_grad:
        hidden = _ReduceGradient.apply(hidden, group)
    own = linear_logprobs_partial(
        hidden, shard.weight, flat, vocab_start=shard.start, bias=shard.bias, logit_scale=logit_scale,
        softcap=softcap, temperature=temperature, impl=impl,
    )  # fmt: skip
    merged = merge_partials(_partials_of_all(own, group), return_entropy=return_entropy)
    logprobs = merged.logprobs
    if fill_value != -math.inf:
        logprobs = logprobs.masked_fill(flat < 0, fill_value)
    entropy = None if merged.entropy is None else in_rows(merged.entropy, rows)
    return LinearLogprobs(in_rows(logprobs, rows), in_rows(merged.lse, rows), entropy)


@torch.no_grad()
def vocab_parallel_candidates(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocab_start: int,
    group: Any,
    vocab_size: int | None = None,
    min_prob: float | Tensor | None = 0.1,
    top_k: int | None = None,
    sampled: Tensor | None = None,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    impl: str | None = None,
) -> Candidates:
    """`linear_candidates` of a head whose rows lie on the ranks of `group`; the same result on each; no
    gradient.

    Args:
        hidden, weight, vocab_start, group, vocab_size: as in `vocab_parallel_logprobs`.
        min_prob, top_k, sampled, return_entropy, bias, logit_scale, softcap, temperature, impl: as in
            `linear_candidates`; the same on all ranks.

    Raises:
        ValueError: as `linear_candidates` and `vocab_parallel_logprobs`.
    """
    op = "vocab_parallel_candidates"
    _refuse_dtensor(op, weight)
    numbers = prepare(op, hidden, weight, bias, logit_scale, softcap, temperature, may_be_empty=True)
    K = num_slots(op, min_prob, top_k)
    if sampled is not None:
        check_row_ids(op, "sampled", sampled, hidden, (1,))
    # as in `vocab_parallel_logprobs`: a rank without rows would wait for those that refuse
    implementation = choose(op, CANDIDATES_IMPLS, impl, hidden)
    least: Any = min_prob
    if not torch.compiler.is_compiling():
        checked_transform(op, *numbers)
        least = None if min_prob is None else checked_number(op, "min_prob", min_prob)
        check_min_prob(op, least)
    rows = hidden.shape[:-1]
    hidden = flat_rows(hidden, rows)
    flat = None if sampled is None else flat_rows(sampled, rows)
    shard = _agreed(op, hidden, weight, bias, flat, vocab_start, vocab_size, group, K, name="sampled")
    check_top_k(op, implementation, shard.largest, least, K)
    ids, z, lse, entropy, picked = _local_candidates(
        hidden, shard, flat, K, min_prob=least, top_k=top_k, return_entropy=return_entropy,
        logit_scale=logit_scale, softcap=softcap, temperature=temperature, impl=impl,
    )  # fmt: skip
    # ids of all ranks in one exchange, numbers in another
    all_ids = _gather(ids, group)  # (ranks, N, K)
    values = _gather(torch.cat([z, torch.stack([lse, entropy, picked], 1)], 1), group)  # (ranks, N, K + 3)
    of_shard = values[..., K]  # (ranks, N) lse
    lse = of_shard.logsumexp(0)  # (N,)
    logprobs = (values[..., :K] - lse[:, None]).transpose(0, 1).flatten(1)  # (N, ranks * K)
    ids = all_ids.transpose(0, 1).flatten(1)
    if least is not None:
        logprobs = torch.where(logprobs >= math.log(least), logprobs, -math.inf)
    logprobs = torch.where(logprobs > -math.inf, logprobs.clamp(max=0), -math.inf)  # NaN: no candidate
    ids = torch.where(logprobs > -math.inf, ids, -1)
    by_id = torch.argsort(torch.where(ids >= 0, ids, torch.iinfo(ids.dtype).max), dim=1)
    logprobs, ids = logprobs.gather(1, by_id), ids.gather(1, by_id)
    best = torch.argsort(logprobs, dim=1, descending=True, stable=True)[:, :K]  # ties to the lower id
    logprobs, ids = logprobs.gather(1, best), ids.gather(1, best)
    whole_entropy = None
    if return_entropy:
        share = (of_shard - lse).exp()  # (ranks, N)
        term = values[..., K + 1] + torch.where(of_shard == -math.inf, 0.0, lse - of_shard)
        whole_entropy = in_rows((share * term).sum(0), rows)
    sampled_logprobs = None
    if sampled is not None:
        sampled_logprobs = in_rows((values[..., K + 2].amax(0) - lse).clamp(max=0), rows)
    return Candidates(
        in_rows(ids, rows), in_rows(logprobs, rows), in_rows((ids >= 0).sum(1), rows), in_rows(lse, rows),
        whole_entropy, sampled_logprobs,
    )  # fmt: skip


def _local_candidates(
    hidden: Tensor, shard: _Shard, sampled: Tensor | None, K: int, *, return_entropy: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids (N, K) of the whole, their z, lse (N,), entropy, z of the sampled token) of this rank's shard."""
    N, dtype = hidden.shape[0], out_dtype(hidden)
    nothing = hidden.new_full((N,), -math.inf, dtype=dtype)
    if not shard.weight.shape[0]:
        ids = torch.full((N, K), -1, dtype=torch.int64, device=hidden.device)
        return ids, nothing[:, None].expand(N, K), nothing, torch.zeros_like(nothing), nothing
    owned = None
    if sampled is not None:
        local = sampled.long() - shard.start
        owned = torch.where((local >= 0) & (local < shard.weight.shape[0]), local, -1)
    found = linear_candidates(
        hidden, shard.weight, sampled=owned, return_entropy=return_entropy, bias=shard.bias, **options
    )
    return (
        torch.where(found.ids >= 0, found.ids + shard.start, -1),
        found.logprobs + found.lse[:, None],
        found.lse,
        torch.zeros_like(nothing) if found.entropy is None else found.entropy,
        nothing if found.sampled_logprobs is None else found.sampled_logprobs + found.lse,
    )


def _refuse_dtensor(op: str, weight: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        raise ValueError(
            f"{op}: weight must be this rank's shard as an ordinary tensor, got a DTensor with placements "
            f"{weight.placements}; Shard(0) looks alike under tensor parallelism and FSDP2, whose ranks "
            f"hold other rows "
            "of the batch. Tensor parallel: pass weight.to_local() with its vocab_start and group. "
            "FSDP2: take "
            "gathered_weight(head) and linear_logprobs"
        )


def _agreed(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, vocab_start: int,
    vocab_size: int | None, group: Any, K: int = 0, name: str = "ids",
) -> _Shard:  # fmt: skip
    """This rank's shard without padding, after one small exchange in which all ranks find the same faults."""
    end = vocab_start + weight.shape[0]
    end = end if vocab_size is None else max(vocab_start, min(end, vocab_size))
    mark = 0
    if ids is not None and ids.numel() and checks_values(ids):
        places = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)
        mark = int((ids.long() * places).sum())
    trains = torch.is_grad_enabled() and hidden.requires_grad
    own = (hidden.shape[0], K or (1 if ids is None or ids.dim() == 1 else ids.shape[1]), int(trains), mark)
    said = torch.tensor(
        [*own, vocab_start, end, -1 if vocab_size is None else vocab_size], device=hidden.device
    )
    ranks = _gather(said, group).tolist()  # the host waits: what follows must not hang where ranks differ
    for place, what in enumerate(("N", "the number of ids or slots", "hidden.requires_grad", name)):
        values = [rank[place] for rank in ranks]
        if len(set(values)) > 1:
            raise ValueError(
                f"{op}: all ranks of the group must hold the same {what}, got "
                f"{'other ids' if what == name else values}; they take the same rows of the batch "
                "(tensor parallel), which FSDP2's ranks do not"
            )
    edges = sorted((rank[4], rank[5]) for rank in ranks if rank[5] > rank[4])
    V, last = max((stop for _, stop in edges), default=0), 0
    for start, stop in edges:
        if start != last:
            break
        last = stop
    if not V or last != V or {rank[6] for rank in ranks} - {-1, V}:
        raise ValueError(
            f"{op}: the shards must cover the vocabulary of {vocab_size or V} once, got rows {edges}; "
            "check vocab_start and vocab_size"
        )
    if ids is not None and checks_values(ids) and ids.numel() and int(ids.max()) >= V:
        raise ValueError(
            f"{op}: {name} must be below V={V}, negative for no token, got up to {int(ids.max())}"
        )
    rows = end - vocab_start
    largest = max(stop - start for start, stop in edges)
    return _Shard(weight[:rows], None if bias is None else bias[:rows], vocab_start, V, largest)


def _gather(x: Tensor, group: Any) -> Tensor:
    """(ranks, ...) of x, which has the same shape on all ranks of the group."""
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def _partials_of_all(own: Partial, group: Any) -> list[Partial]:
    """Every rank's Partial in one exchange: the others' values, and one's own with its graph."""
    single = own.id_logits.dim() == 1
    z = own.id_logits[:, None] if single else own.id_logits
    packed = torch.cat([torch.stack([own.max, own.sumexp, own.sum_z_exp], 1), z], 1).detach()  # (N, 3 + K)
    parts, mine = list[Partial](), dist.get_rank(group)
    for rank, values in enumerate(_gather(packed, group)):
        z = values[:, 3] if single else values[:, 3:]
        theirs = Partial(values[:, 0], values[:, 1], values[:, 2], z)
        parts.append(own if rank == mine else theirs)
    return parts
