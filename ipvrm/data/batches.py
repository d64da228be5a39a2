"""Token ids to packed batches: the only place that shifts, pads or masks.

In a `Batch` the B sequences lie right-padded in (B, T) for the transformer; what belongs to response tokens
is packed end to end, N = sum of the response lengths. The state that predicts the token at position i of a
sequence is the one at position i - 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ipvrm.data.responses import Response
from ipvrm.errors import IpvrmError


@dataclass(frozen=True)
class Batch:
    """B sequences, T tokens in the longest, N response tokens in all."""

    input_ids: Tensor  # (B, T) int64, right-padded
    attention_mask: Tensor  # (B, T) int64, 1 on real tokens
    positions: Tensor  # (N,) int64, into the flattened (B * T): the state that predicts each response token
    token_ids: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B + 1,) int32
    outcome: Tensor  # (B,) fp32, nan where there is no label

    def to(self, device: torch.device | str) -> "Batch":
        fields = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return replace(self, **fields)


def collate(responses: Sequence[Response], pad_id: int = 0) -> Batch:
    """B >= 1 responses to a `Batch` on the CPU. Every prompt has at least one token, every response too."""
    totals = np.array([len(r.input_ids) for r in responses])  # (B,)
    prompts = np.array([r.prompt_length for r in responses])  # (B,)
    if not len(totals) or prompts.min() < 1 or (totals <= prompts).any():
        raise IpvrmError(
            "collate: needs responses of at least one token behind prompts of at least one token"
        )
    column = np.arange(totals.max())  # (T,)
    mask = column < totals[:, None]  # (B, T)
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([np.asarray(r.input_ids, dtype=np.int64) for r in responses])
    in_response = mask & (column >= prompts[:, None])  # (B, T)
    outcome = np.array([np.nan if r.label is None else r.label for r in responses], dtype=np.float32)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        positions=torch.from_numpy(np.flatnonzero(in_response) - 1),
        token_ids=torch.from_numpy(input_ids[in_response]),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(totals - prompts)]).astype(np.int32)),
        outcome=torch.from_numpy(outcome),
    )


def length_sorted_microbatches(
    lengths: Sequence[int] | Iterable[int], *, max_rows: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in micro-batches of similar length, longest first.

    Args:
        max_rows: most rows of a micro-batch.
        max_tokens: most tokens of a padded micro-batch (rows times the longest); a longer row stands alone.
    """
    values = np.asarray(list(lengths))
    batches: list[list[int]] = []
    for index in np.argsort(-values, kind="stable").tolist():
        rows = len(batches[-1]) + 1 if batches else 1
        longest = values[batches[-1][0]] if batches else 0
        full = (max_rows is not None and rows > max_rows) or (
            max_tokens is not None and rows * longest > max_tokens
        )
        if not batches or full:
            batches.append([])
        batches[-1].append(index)
    return batches


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch, a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()


def microbatches_for_rank(
    indices: Sequence[int], lengths: Sequence[int], *, max_rows: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """This rank's share of an optimizer batch, in micro-batches of at most `max_rows` rows of similar length.

    Every rank gets the same number of them, since each forward may be a collective; where there are fewer
    rows than ranks some micro-batches are empty. The ranks' shares together are `indices`, each once.
    """
    ordered = sorted(indices, key=lambda i: -lengths[i])
    count = world_size * -(-len(ordered) // (max_rows * world_size))
    small, longer = divmod(len(ordered), count)
    starts = [i * small + min(i, longer) for i in range(count + 1)]
    return [ordered[starts[i] : starts[i + 1]] for i in range(rank, count, world_size)]
