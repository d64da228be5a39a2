"""Reward-model losses of stage A: pure functions of the packed log-ratios, each `(loss, metrics)`.

    l_t = log pi_phi - log pi_ref,   V_t = beta * sum_{i<=t} l_i,   mean_value_t = V_t / t,   s = 2r - 1
    Eq. 9          mean_b w_b * sum_t omega_t * softplus(margin_b - s * mean_value_t) / sum_t omega_t
    implicit_prm   mean_b BCE(sigmoid(V_T), r)

Metrics are (sum, count) pairs of 0-d fp32 tensors under fixed keys, so that micro-batches and ranks add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ipvrm import IpvrmError
from ipvrm_kernels import prefix_value_loss, prefix_values

PrefixWeighting = Literal["uniform", "late", "early"]
Reduction = Literal["sequence_mean", "token_mean"]
Metrics = dict[str, tuple[Tensor, Tensor]]
METRICS = ("loss", "prefix_accuracy", "outcome_accuracy", "value_right", "value_wrong")

BETA = {"ipvrm": 10.0, "implicit_prm": 0.05}
NOT_TRAINED_HERE = {
    "dpo": "it compares a right with a wrong response of one prompt, and these rows are single responses",
    "q_rm": "it needs a scalar head on the hidden state; the model here is read through its vocabulary head",
    "endo_rm": "it has nothing to train: its reward is read off the starting model",
}


def check_objective(objective: str) -> None:
    """Raises IpvrmError, with the reason, for an objective that single labelled responses cannot train."""
    if objective in BETA:
        return
    reason = NOT_TRAINED_HERE.get(objective, "it is unknown")
    raise IpvrmError(f"objective {objective!r}: {reason}; train-rm offers {', '.join(BETA)}")


def loss_denominator(
    lengths: Sequence[int],
    reduction: Reduction = "sequence_mean",
    prefix_weighting: PrefixWeighting = "uniform",
) -> float:
    """What the summed loss of B responses of `lengths` tokens is divided by.

    B under `sequence_mean`, sum_b sum_t omega_t under `token_mean`.
    """
    if reduction == "sequence_mean":
        return float(len(lengths))
    if prefix_weighting == "uniform":
        return float(sum(lengths))
    if prefix_weighting == "late":
        return sum((T + 1) / 2 for T in lengths)
    return sum((T - 1) / 2 if T > 1 else 1.0 for T in lengths)


def ipvrm_loss(
    log_ratio: Tensor,
    cu_seqlens: Tensor,
    outcome: Tensor,
    *,
    beta: float = 10.0,
    margin: float | Tensor = 5.0,
    weight: Tensor | None = None,
    prefix_weighting: PrefixWeighting = "uniform",
    reduction: Reduction = "sequence_mean",
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Prefix-value margin loss at every prefix (Eq. 9; Eq. 17, 18 for the weightings).

    Args:
        log_ratio: (N,) fp32, nats. cu_seqlens: (B + 1,) int32. outcome: (B,) 0 or 1.
        margin: one for all or (B,). weight: (B,) or None for 1.
        denominator: of the whole optimizer batch (`loss_denominator`); None takes this call's.

    Raises:
        ValueError: from `ipvrm_kernels.prefix_value_loss`.
    """
    loss = prefix_value_loss(
        log_ratio,
        cu_seqlens,
        outcome,
        beta=beta,
        margin=margin,
        weight=weight,
        prefix_weighting=prefix_weighting,
        reduction=reduction,
        denominator=denominator,
    )
    with torch.no_grad():
        if reduction == "sequence_mean":
            own = outcome.new_full((), outcome.numel())
        else:
            own = _omega_sum(cu_seqlens, prefix_weighting)
        values = prefix_values(log_ratio, cu_seqlens, beta=beta)
        total = loss * (own if denominator is None else denominator)
        return loss, _metrics(total, own, values.mean_value, cu_seqlens, outcome)


def implicit_prm_loss(
    log_ratio: Tensor,
    cu_seqlens: Tensor,
    outcome: Tensor,
    *,
    beta: float = 0.05,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Binary cross-entropy of sigmoid(beta * sum of the log-ratios) against the outcome (Implicit PRM).

    Args as in `ipvrm_loss`; no sequence may be empty.
    """
    values = prefix_values(log_ratio, cu_seqlens, beta=beta)
    final = values.value[cu_seqlens[1:].long() - 1]  # (B,)
    total = torch.nn.functional.binary_cross_entropy_with_logits(
        final, outcome.to(final.dtype), reduction="sum"
    )
    own = outcome.new_full((), outcome.numel())
    loss = total / (own if denominator is None else denominator)
    with torch.no_grad():
        return loss, _metrics(total, own, values.mean_value, cu_seqlens, outcome)


def _omega_sum(cu_seqlens: Tensor, prefix_weighting: PrefixWeighting) -> Tensor:
    lengths = cu_seqlens.diff().float()  # (B,)
    if prefix_weighting == "uniform":
        return lengths.sum()
    if prefix_weighting == "late":
        return torch.where(lengths > 0, (lengths + 1) / 2, 0.0).sum()
    return torch.where(lengths > 1, (lengths - 1) / 2, lengths).sum()


def _metrics(
    loss_sum: Tensor, count: Tensor, mean_value: Tensor, cu_seqlens: Tensor, outcome: Tensor
) -> Metrics:
    """`mean_value` (N,). A value of exactly 0 (model = reference) counts as half right.

    Counts are filled on the device (`new_full`): `new_tensor` copies a number there and waits for it.
    """
    lengths = cu_seqlens.diff()
    sign = 2 * outcome.to(mean_value.dtype) - 1  # (B,)
    per_token = sign.repeat_interleave(lengths, output_size=mean_value.numel())  # (N,)
    final = mean_value[cu_seqlens[1:].long() - 1]  # (B,)
    right = outcome.to(mean_value.dtype)
    return {
        "loss": (loss_sum.detach(), count),
        "prefix_accuracy": (
            _agreement(per_token * mean_value),
            mean_value.new_full((), mean_value.numel()),
        ),
        "outcome_accuracy": (_agreement(sign * final), right.new_full((), right.numel())),
        "value_right": ((final * right).sum(), right.sum()),
        "value_wrong": ((final * (1 - right)).sum(), (1 - right).sum()),
    }


def _agreement(signed: Tensor) -> Tensor:
    return (signed.sign().sum() + signed.numel()) / 2


@dataclass(frozen=True)
class Objective:
    """A loss with its settings; `margin` and what follows belong to `ipvrm` alone."""

    name: str
    beta: float
    margin: float = 0.0
    prefix_weighting: PrefixWeighting = "uniform"
    reduction: Reduction = "sequence_mean"

    def denominator(self, lengths: Sequence[int]) -> float:
        """`loss_denominator` of an optimizer batch whose responses have these lengths."""
        return loss_denominator(lengths, self.reduction, self.prefix_weighting)

    def __call__(
        self, log_ratio: Tensor, cu_seqlens: Tensor, outcome: Tensor, denominator: float
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the loss of its optimizer batch, and its metrics."""
        if self.name == "implicit_prm":
            return implicit_prm_loss(log_ratio, cu_seqlens, outcome, beta=self.beta, denominator=denominator)
        return ipvrm_loss(
            log_ratio,
            cu_seqlens,
            outcome,
            beta=self.beta,
            margin=self.margin,
            prefix_weighting=self.prefix_weighting,
            reduction=self.reduction,
            denominator=denominator,
        )


class MetricSums:
    """Sums and counts of several updates, as plain numbers."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, pairs: Mapping[str, Sequence[float]]) -> None:
        """Adds (sum, count) pairs."""
        for name, (total, count) in pairs.items():
            old = self.values.get(name, [0.0, 0.0])
            self.values[name] = [old[0] + total, old[1] + count]

    def means(self, prefix: str = "") -> dict[str, float]:
        """sum / count of each metric; 0 where nothing was counted."""
        return {prefix + name: total / max(count, 1.0) for name, (total, count) in self.values.items()}
