"""linear_candidates: every token with p >= min_prob, exactly, from hidden states, without logits.

C_n = {v : log p_v >= log min_prob} (P_min of Eq. 11), the best top_k of them if both are given, or the
plain top_k. At most floor(1 / min_prob) tokens can qualify, so K is static and the result exact. Sorted by
log-prob descending, ties to the lower id; unused slots hold id -1 and log-prob -inf.

Shapes: hidden (N, D), weight (V, D), result (N, K). Fast because a partial log-sum-exp already bounds the
threshold from below, so that few columns are ever looked at twice; only the reference below sorts an (N,
V) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .head import (
    TAKES_HEAD,
    Transform,
    check_ids,
    check_row_ids,
    checked_transform,
    cpu,
    flat_rows,
    in_rows,
    matmul_flops,
    out_dtype,
    prepare,
    select_ids,
    times_log,
    transformed_logits,
)
from .inputs import checked_number
from .registration import Number, register


class Candidates(NamedTuple):
    """ids (N, K) int64, logprobs (N, K), counts (N,) int64 used slots, lse (N,), entropy (N,) or None,
    sampled_logprobs (N,) or None; fp32 (fp64 for fp64 inputs), nats."""

    ids: Tensor
    logprobs: Tensor
    counts: Tensor
    lse: Tensor
    entropy: Tensor | None
    sampled_logprobs: Tensor | None


def linear_candidates_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids, logprobs, counts, lse, entropy, sampled_logprobs) in plain PyTorch: a stable sort of each row."""
    z = transformed_logits(hidden, weight, bias, transform)
    log_p = torch.log_softmax(z, 1)
    best, order = torch.sort(log_p, dim=1, descending=True, stable=True)  # stable: ties to the lower id
    best, order = best[:, :K], order[:, :K]
    kept = best > -math.inf if min_prob is None else best >= math.log(min_prob)
    missing = K - best.shape[1]  # top_k > V
    ids = torch.nn.functional.pad(torch.where(kept, order, -1), (0, missing), value=-1)
    logprobs = torch.nn.functional.pad(torch.where(kept, best, -math.inf), (0, missing), value=-math.inf)
    absent = z.new_empty(0)
    return (
        ids, logprobs, kept.sum(1), torch.logsumexp(z, 1),
        -times_log(log_p.exp(), log_p).sum(1) if return_entropy else absent,
        absent.clone() if sampled is None else select_ids(log_p, sampled[:, None])[:, 0],
    )  # fmt: skip


def _cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact {p >= min_prob}; a plain top-k picks by z, so tokens whose z differ by less than a log-prob's
    rounding come best first rather than by id."""
    if min_prob is None:
        rule = cpu.CandidateRule(min(K, weight.shape[0]), -math.inf)
    else:
        rule = cpu.CandidateRule(num_slots("linear_candidates", min_prob, None), math.log(min_prob))
    ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64) if sampled is None else sampled[:, None]
    result = cpu.forward(
        "linear_candidates", hidden, weight, bias, ids, transform, entropy=return_entropy, candidates=rule,
        slots=K, deterministic=deterministic,
    )  # fmt: skip
    sampled_logprobs = result.lse.new_empty(0) if sampled is None else result.logprobs.view(-1)
    return (
        result.candidate_ids, result.candidate_logprobs, result.counts, result.lse, result.entropy,
        sampled_logprobs,
    )  # fmt: skip


if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from .head import triton_forward

    MAX_COLUMNS = 16384  # of the groups that one row's best tokens are picked from; 32768 spill
    MAX_TOP_K = MAX_COLUMNS // triton_forward.GROUP

    @triton.jit(do_not_specialize=["N"])
    def _select_groups_kernel(
        group_max_ptr,  # (N, num_groups) maximum of z over every GROUP columns
        least_ptr,  # (N,) the z below which nothing is a candidate
        groups_ptr,  # (N, SLOTS) out: group numbers, -1 if unused
        N, num_groups,  # scalars
        SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        groups = tl.arange(0, BLOCK_GROUPS)  # (BLOCK_GROUPS,)
        inside = (rows < N)[:, None] & (groups < num_groups)[None, :]  # (BLOCK_N, BLOCK_GROUPS)
        where = rows[:, None] * num_groups + groups[None, :]  # (BLOCK_N, BLOCK_GROUPS)
        z = tl.load(group_max_ptr + where, mask=inside, other=-float("inf"))  # (BLOCK_N, BLOCK_GROUPS)
        least = tl.load(least_ptr + rows, mask=rows < N, other=float("inf"))  # (BLOCK_N,)
        slot = 0
        best = tl.max(z, 1)  # (BLOCK_N,)
        found = (best >= least) & (best > -float("inf"))  # (BLOCK_N,)
        while (slot < SLOTS) & (tl.max(found.to(tl.int32), 0) > 0):
            # equal maxima: the lower group first, so that ties go to the lower id
            equal = (z == best[:, None]) & inside  # (BLOCK_N, BLOCK_GROUPS)
            matches = tl.where(equal, groups[None, :], BLOCK_GROUPS)  # (BLOCK_N, BLOCK_GROUPS)
            group = tl.min(matches, 1)  # (BLOCK_N,)
            tl.store(groups_ptr + rows * SLOTS + slot, group, mask=found & (group < num_groups))
            z = tl.where(groups[None, :] == group[:, None], -float("inf"), z)  # (BLOCK_N, BLOCK_GROUPS)
            best = tl.max(z, 1)  # (BLOCK_N,)
            found = (best >= least) & (best > -float("inf"))  # (BLOCK_N,)
            slot += 1

    @triton.jit(do_not_specialize=["N"])
    def _best_candidates_kernel(
        ids_ptr,  # (N, M) columns of the selected groups, -1 if unused
        logprobs_ptr,  # (N, M)
        best_ids_ptr,  # (N, K) out, filled with -1
        best_logprobs_ptr,  # (N, K) out, filled with -inf
        counts_ptr,  # (N,) out
        N, M, V, K, low,  # scalars; low = log(min_prob) or -inf
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        columns = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        inside = (rows < N)[:, None] & (columns < M)[None, :]  # (BLOCK_N, BLOCK_M)
        where = rows[:, None] * M + columns[None, :]  # (BLOCK_N, BLOCK_M)
        ids = tl.load(ids_ptr + where, mask=inside, other=-1)  # (BLOCK_N, BLOCK_M)
        log_p = tl.load(logprobs_ptr + where, mask=ids >= 0, other=-float("inf"))  # (BLOCK_N, BLOCK_M)
        log_p = tl.where((log_p >= low) & (log_p > -float("inf")), log_p, -float("inf"))  # (BLOCK_N, BLOCK_M)
        count = tl.zeros((BLOCK_N,), tl.int32)  # (BLOCK_N,)
        slot = 0
        best = tl.max(log_p, 1)  # (BLOCK_N,)
        found = best > -float("inf")  # (BLOCK_N,)
        while (slot < K) & (tl.max(found.to(tl.int32), 0) > 0):
            matches = tl.where(log_p == best[:, None], ids, V)  # (BLOCK_N, BLOCK_M)
            id = tl.min(matches, 1)  # (BLOCK_N,) the lowest id among equals
            tl.store(best_ids_ptr + rows * K + slot, id.to(tl.int64), mask=found)
            tl.store(best_logprobs_ptr + rows * K + slot, best, mask=found)
            log_p = tl.where(ids == id[:, None], -float("inf"), log_p)  # (BLOCK_N, BLOCK_M)
            count += found.to(tl.int32)
            best = tl.max(log_p, 1)  # (BLOCK_N,)
            found = best > -float("inf")  # (BLOCK_N,)
            slot += 1
        tl.store(counts_ptr + rows, count.to(tl.int64), mask=rows < N)


def best_warps(BLOCK_M: int) -> int:
    """Warps of `_best_candidates_kernel`: at most 32 columns a thread, which do not spill."""
    return max(4, BLOCK_M // 1024)


def _triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A candidate's group has a maximum at least as large, so the K best groups hold the K best tokens."""
    N, V = hidden.shape[0], weight.shape[0]
    check_top_k("linear_candidates", "triton", V, min_prob, K)
    num_groups, slots = _groups(V, min_prob, K)
    row_bytes = 4 * num_groups + 16 * slots * triton_forward.GROUP
    block = max(1, triton_forward.DEFAULT_WORKSPACE // 2 // row_bytes)  # rows at a time
    parts = [
        _triton_rows(hidden[i : i + block], weight, bias, None if sampled is None else sampled[i : i + block],
                     transform, min_prob, K, return_entropy)
        for i in range(0, max(N, 1), block)
    ]  # fmt: skip
    ids, logprobs, counts, lse, entropy, sampled_logprobs = (
        column[0] if len(parts) == 1 else torch.cat(column) for column in zip(*parts, strict=True)
    )
    return ids, logprobs, counts, lse, entropy, sampled_logprobs


def check_top_k(op: str, impl: str, V: int, min_prob: float | None, K: int) -> None:
    """Raise ValueError where `impl` cannot find so many of V tokens."""
    if IMPLS[impl].forward is _triton and _groups(V, min_prob, K)[1] > MAX_TOP_K:
        raise ValueError(
            f"{op}: top_k must be at most {MAX_TOP_K} for impl='triton' and V > {MAX_COLUMNS}"
            f" without min_prob, got top_k={K} and V={V}; pass a smaller top_k or impl='torch'"
        )


def _groups(V: int, min_prob: float | None, K: int) -> tuple[int, int]:
    """(groups of a row, those that can hold its K best candidates)."""
    num_groups = -(-V // triton_forward.GROUP)
    most = K if min_prob is None else min(K, num_slots("linear_candidates", min_prob, None))
    return num_groups, min(most, num_groups)


def _triton_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None, transform: Transform,
    min_prob: float | None, K: int, return_entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (N, V), device, GROUP = (hidden.shape[0], weight.shape[0]), hidden.device, triton_forward.GROUP
    low = -math.inf if min_prob is None else math.log(min_prob)
    num_groups, slots = _groups(V, min_prob, K)
    M = slots * GROUP
    with torch.cuda.device_of(hidden):
        ops = triton_forward.operands(hidden, weight, bias, transform)
        group_max = torch.empty((N, num_groups), dtype=torch.float32, device=device)
        stats = triton_forward.stats(ops, return_entropy, group_max)
        lse = stats.lse()
        best_ids = torch.full((N, K), -1, dtype=torch.int64, device=device)
        best_logprobs = torch.full((N, K), -math.inf, dtype=torch.float32, device=device)
        counts = torch.zeros(N, dtype=torch.int64, device=device)
        if N:
            # tile and gather-dot may round apart: look a little below the threshold, decide on the log-prob
            slack = 1e-5 * (1 + lse.abs() + stats.top.abs())
            least = torch.full_like(lse, -math.inf) if min_prob is None else lse + low - slack
            groups = torch.full((N, slots), -1, dtype=torch.int32, device=device)
            BLOCK_GROUPS = triton.next_power_of_2(num_groups)
            rows = max(1, 65536 // BLOCK_GROUPS) if backend.INTERPRETED else 1
            _select_groups_kernel[(triton.cdiv(N, rows),)](
                group_max, least, groups, N, num_groups, SLOTS=slots, BLOCK_N=rows, BLOCK_GROUPS=BLOCK_GROUPS,
                num_warps=8 if BLOCK_GROUPS > 2048 else 4,
            )  # fmt: skip
            if device.type == "cpu":  # the interpreter pays for unused slots, and reading costs it nothing
                slots = max(1, int((groups >= 0).sum(1).max()))
                groups, M = groups[:, :slots], slots * GROUP
            columns = groups[:, :, None] * GROUP + torch.arange(GROUP, dtype=torch.int32, device=device)
            columns = torch.where((groups[:, :, None] >= 0) & (columns < V), columns, -1).view(N, M)
            log_p = stats.logprobs(triton_forward.id_logits(ops, columns))
            BLOCK_M = triton.next_power_of_2(M)
            rows = max(1, 65536 // BLOCK_M) if backend.INTERPRETED else 1
            _best_candidates_kernel[(triton.cdiv(N, rows),)](
                columns, log_p, best_ids, best_logprobs, counts, N, M, V, K, low,
                BLOCK_N=rows, BLOCK_M=BLOCK_M, num_warps=best_warps(BLOCK_M),
            )  # fmt: skip
        picked = lse.new_empty(0)
        if sampled is not None:
            picked = stats.logprobs(triton_forward.id_logits(ops, sampled[:, None].contiguous()))[:, 0]
    entropy = stats.entropy() if return_entropy else lse.new_empty(0)
    return best_ids, best_logprobs, counts, lse, entropy, picked


IMPLS = {
    "triton": backend.Impl(_triton),
    "cpp": backend.Impl(_cpp),
    "torch": backend.Impl(linear_candidates_reference),
}


def _fake(
    hidden: Tensor, sampled: Tensor | None, K: int, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N = hidden.shape[0]
    lse = hidden.new_empty(N, dtype=out_dtype(hidden))
    return (
        lse.new_empty((N, K), dtype=torch.int64), lse.new_empty(N, K), lse.new_empty(N, dtype=torch.int64),
        lse, lse.new_empty(N if return_entropy else 0), lse.new_empty(0 if sampled is None else N),
    )  # fmt: skip


def _flops(hidden: Sequence[int], weight: Sequence[int]) -> int:
    return matmul_flops(hidden, weight, 1)


TAKES = {**TAKES_HEAD, "sampled": "ids N"}


@register(fake=_fake, flops=_flops, takes=TAKES)
def _linear_candidates(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, sampled: Tensor | None,
    scale: Number, softcap: float | None, temperature: Number, dtype: torch.dtype,
    min_prob: Number | None, K: int, return_entropy: bool, deterministic: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if sampled is not None and backend.checks_values(sampled):
        check_ids("linear_candidates", "sampled", sampled, weight.shape[0])
    check_min_prob("linear_candidates", min_prob)
    num_slots("linear_candidates", None, K)
    transform = checked_transform("linear_candidates", scale, softcap, temperature, dtype)
    return IMPLS[impl].forward(
        hidden, weight, bias, sampled, transform, min_prob, K, return_entropy, deterministic
    )


def check_min_prob(op: str, min_prob: float | None) -> None:
    """Raise ValueError unless min_prob is None or lies in [1/128, 1]."""
    if min_prob is not None and not 1 / 128 <= min_prob <= 1:
        raise ValueError(
            f"{op}: min_prob must lie in [1/128, 1], got {min_prob}; for a fixed number of tokens pass "
            "min_prob=None and top_k"
        )


MOST_TOP_K = 2**20  # more than any vocabulary has; beyond, K slots a row are a slip of the keyboard


def num_slots(op: str, min_prob: float | Tensor | None, top_k: int | None) -> int:
    """K: top_k, else floor(1 / min_prob + 1e-4), which no row can exceed."""
    if min_prob is None and top_k is None:
        raise ValueError(f"{op}: give min_prob, top_k or both, got neither")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MOST_TOP_K:
            raise ValueError(f"{op}: top_k must be an integer in 1 .. {MOST_TOP_K}, got {top_k!r}")
        return top_k
    if isinstance(min_prob, Tensor):
        raise ValueError(
            f"{op}: min_prob must be a number where there is no top_k, since K = floor(1 / min_prob) is the "
            "shape of the result, got a tensor; pass top_k too"
        )
    assert min_prob is not None
    check_min_prob(op, min_prob)
    return math.floor(1 / min_prob + 1e-4)


def linear_candidates(
    hidden: Tensor,
    weight: Tensor,
    *,
    min_prob: float | Tensor | None = 0.1,
    top_k: int | None = None,
    sampled: Tensor | None = None,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    deterministic: bool = False,
    impl: str | None = None,
) -> Candidates:
    """The exact candidate set {p >= min_prob} of each row of softmax(z), z as in `linear_logprobs`; no
    gradient.

    Args:
        hidden, weight, bias, logit_scale, softcap, temperature, deterministic: as in `linear_logprobs`.
        min_prob: P_min in [1/128, 1]; None for plain top-k; with top_k it may be a 0-d CPU tensor.
        top_k: number of slots K; with min_prob the best top_k of the set. Default K: floor(1/min_prob +
            1e-4). On the GPU (impl "triton") at most 512 if min_prob is None and V > 16384.
        sampled: (N,) int64 or int32 below V, the sampled tokens, whose log-probs come out of the same
            pass. Negative ids and unchecked ones from V on as in `linear_logprobs`: -inf.
        return_entropy: whether to compute the entropy.
        impl: None | "torch" | "cpp" | "triton", see `backends()`.

    Returns: Candidates, detached; sorted by log-prob descending, ties to the lower id; unused slots -1 and
        -inf. Where a plain top-k ends among tokens whose log-probs round alike, the larger logit stays.
        A row whose hidden holds a NaN has no candidates: count 0, ids -1, log-probs -inf; its lse, entropy
        and sampled log-prob are NaN.
    Raises: ValueError as `linear_logprobs`, and on min_prob or top_k out of range, both None, or a top_k
        above the GPU's bound.
    """
    op = "linear_candidates"
    numbers = prepare(op, hidden, weight, bias, logit_scale, softcap, temperature)
    K = num_slots(op, min_prob, top_k)
    if sampled is not None:
        check_row_ids(op, "sampled", sampled, hidden, (1,))
    rows = hidden.shape[:-1]
    hidden = flat_rows(hidden, rows)
    ids, logprobs, counts, lse, entropy, sampled_logprobs = _linear_candidates(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        None if sampled is None else flat_rows(sampled, rows).long(), *numbers,
        None if min_prob is None else checked_number(op, "min_prob", min_prob), K, bool(return_entropy),
        bool(deterministic), backend.choose(op, IMPLS, impl, hidden),
    )  # fmt: skip
    return Candidates(
        in_rows(ids, rows), in_rows(logprobs, rows), in_rows(counts, rows), in_rows(lse, rows),
        in_rows(entropy, rows) if return_entropy else None,
        in_rows(sampled_logprobs, rows) if sampled is not None else None,
    )  # fmt: skip
