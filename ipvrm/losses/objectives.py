"""Reward-model losses of stage A: pure functions of the packed log-ratios, each `(loss, metrics)`.

    l_t = log pi_phi - log pi_ref,   V_t = beta * sum_{i<=t} l_i,   mean_value_t = V_t / t,   s = 2r - 1
    Eq. 9          mean_b w_b * sum_t omega_t * softplus(margin_b - s * mean_value_t) / sum_t omega_t
    implicit_prm   mean_b BCE(sigmoid(V_T), r)
    dpo            mean over pairs of -log sigmoid(V_T of the chosen - V_T of the rejected)
    q_rm           mean over pairs of -log sigmoid(V_T / T of the chosen - V_T / T of the rejected - margin),
                   with Z_t of a value head on the state after token t in the place of l_t
    online         weight and margin of Eq. 9 from the outcomes of a prompt's rollouts (DLW; ADB, Eq. 15)

Metrics are (sum, count) pairs of 0-d fp32 tensors under fixed keys, so that micro-batches and ranks add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ipvrm.errors import IpvrmError
from ipvrm.losses.metrics import Metrics
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.losses.prompt_groups import PromptGroups, Reduce, checked_outcome, one_rank
from ipvrm_kernels import checks_values, prefix_value_loss, prefix_values, prefix_weight_sums

PrefixWeighting = Literal["uniform", "late", "early"]
Reduction = Literal["sequence_mean", "token_mean"]
METRICS = ("loss", "prefix_accuracy", "outcome_accuracy", "value_right", "value_wrong")
PAIR_METRICS = ("loss", "pair_accuracy", "value_chosen", "value_rejected")

BETA = {"ipvrm": 10.0, "implicit_prm": 0.05, "dpo": 0.05, "q_rm": 0.2}
MARGIN = {"ipvrm": 5.0, "q_rm": 2.0}
PAIRWISE = ("dpo", "q_rm")  # they compare a right with a wrong response to one prompt
SHARE_FLOOR = 1e-6  # mu lies in [1e-6, 1 - 1e-6]
NOT_TRAINED = {
    "endo_rm": "it has nothing to train: its reward is read off the logits of a language model as it is. "
    "Give any causal LM to `ipvrm score` or `ipvrm eval` with --objective endo_rm",
}


def check_objective(objective: str) -> None:
    """Raises IpvrmError, with the reason, for an objective that nothing trains."""
    if objective in BETA:
        return
    reason = NOT_TRAINED.get(objective, "it is unknown")
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
    return float(prefix_weight_sums(torch.tensor(lengths, dtype=torch.float64), prefix_weighting).sum())


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
        log_ratio: (N,) fp32, nats; where one is infinite the loss is NaN, never 0.
        cu_seqlens: (B + 1,) int32. outcome: (B,) 0 or 1.
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
    loss = loss + _zero_if_finite(log_ratio)
    with torch.no_grad():
        if reduction == "sequence_mean":
            own = loss.new_full((), outcome.numel())  # outcomes may be bool or int8, which cannot hold B
        else:
            own = prefix_weight_sums(cu_seqlens.diff().float(), prefix_weighting).sum()
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

    Args as in `ipvrm_loss`; an empty sequence sums to 0.
    """
    values = prefix_values(log_ratio, cu_seqlens, beta=beta)
    final = _final(values.value, cu_seqlens)  # (B,)
    total = torch.nn.functional.binary_cross_entropy_with_logits(
        final, outcome.to(final.dtype), reduction="sum"
    )
    total = total + _zero_if_finite(log_ratio)
    own = total.new_full((), outcome.numel())  # outcomes may be bool or int8, which cannot hold B
    loss = total / (own if denominator is None else denominator)
    with torch.no_grad():
        return loss, _metrics(total, own, values.mean_value, cu_seqlens, outcome)


def dpo_pairs(outcome: Sequence[float], group: Sequence[int]) -> Tensor:
    """Pairs of rollouts of one prompt: its k-th right response with its k-th wrong one, while both last.

    Args:
        outcome: B outcomes, 0 or 1, on the host. group: the prompt of each, in any order.

    Returns:
        (P, 2) int64 (chosen, rejected), prompts in ascending order; P = 0 where no prompt has both outcomes.

    Raises:
        ValueError: differing lengths, or an outcome other than 0 and 1.
    """
    if len(outcome) != len(group):
        raise ValueError(f"dpo_pairs: one group per outcome, got {len(outcome)} and {len(group)}")
    prompts: dict[int, tuple[list[int], list[int]]] = {}
    for index, (r, prompt) in enumerate(zip(outcome, group, strict=True)):
        if r not in (0, 1):
            raise ValueError(f"dpo_pairs: outcome must be 0 or 1, got {r} at {index}")
        prompts.setdefault(int(prompt), ([], []))[int(r)].append(index)
    pairs = [
        pair for _, (wrong, right) in sorted(prompts.items()) for pair in zip(right, wrong, strict=False)
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def dpo_loss(
    log_ratio: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    *,
    beta: float = 0.05,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta * (sum of the chosen's log-ratios - sum of the rejected's)), mean over pairs.

    Args:
        log_ratio: (N,) fp32, nats. cu_seqlens: (B + 1,) int32; an empty sequence sums to 0.
        pairs: (P, 2) int64 (chosen, rejected), sequence numbers in [0, B), see `dpo_pairs`.
        denominator: of the whole optimizer batch; None takes P, 1 gives the sum over pairs.

    Returns:
        0-d loss, 0 with a gradient of 0 where P = 0, and metrics under the keys `PAIR_METRICS`.

    Raises:
        ValueError: pairs of another shape or dtype, or outside [0, B); or from `ipvrm_kernels.prefix_values`.
    """
    _check_pairs("dpo_loss", pairs, cu_seqlens)
    values = prefix_values(log_ratio, cu_seqlens, beta=beta).value
    return _pair_loss(_final(values, cu_seqlens), pairs, 0.0, _zero_if_finite(log_ratio), denominator)


def q_rm_loss(
    token_values: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    *,
    beta: float = 0.2,
    margin: float = 2.0,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta * (mean Z of the chosen - mean Z of the rejected) - margin), mean over pairs (Q-RM).

    Args:
        token_values: (N,) fp32, Z_t of the value head on the state after each token.
        cu_seqlens, pairs, denominator: as in `dpo_loss`; an empty sequence has the mean 0.

    Returns, raises: as `dpo_loss`; a value in the metrics is beta * mean Z.
    """
    _check_pairs("q_rm_loss", pairs, cu_seqlens)
    means = prefix_values(token_values, cu_seqlens, beta=beta).mean_value
    return _pair_loss(_final(means, cu_seqlens), pairs, margin, _zero_if_finite(token_values), denominator)


def _check_pairs(op: str, pairs: Tensor, cu_seqlens: Tensor) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"{op}: pairs must be (P, 2) int64, got {tuple(pairs.shape)} {pairs.dtype}")
    B = cu_seqlens.shape[0] - 1
    if checks_values(pairs) and bool(((pairs < 0) | (pairs >= B)).any()):
        raise ValueError(f"{op}: pairs must lie in [0, B = {B}), got {pairs.tolist()[:4]}")


def _pair_loss(
    of_sequence: Tensor, pairs: Tensor, margin: float, zero: Tensor, denominator: float | None
) -> tuple[Tensor, Metrics]:
    """`of_sequence` (B,) is what is compared; `zero` is added to the sum."""
    chosen, rejected = of_sequence[pairs].unbind(1)  # (P,) each
    total = torch.nn.functional.softplus(margin - (chosen - rejected)).sum() + zero
    count = total.new_full((), pairs.shape[0])
    loss = total / (max(pairs.shape[0], 1) if denominator is None else denominator)
    with torch.no_grad():
        found = (total, _agreement(chosen - rejected), chosen.sum(), rejected.sum())
        return loss, {name: (x.detach(), count) for name, x in zip(PAIR_METRICS, found, strict=True)}


def _zero_if_finite(log_ratio: Tensor) -> Tensor:
    """0, or NaN where a log-ratio is infinite, of which softplus can make a loss of 0."""
    return (log_ratio.detach() * 0).sum()


def _final(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) what (N,) holds at each sequence's last token, 0 for an empty sequence."""
    ahead = torch.nn.functional.pad(per_token, (1, 0))  # so that N = 0 has an element to take
    return torch.where(cu_seqlens.diff() > 0, ahead[cu_seqlens[1:].long()], 0.0)


def _metrics(
    loss_sum: Tensor, count: Tensor, mean_value: Tensor, cu_seqlens: Tensor, outcome: Tensor
) -> Metrics:
    """`mean_value` (N,). A value of exactly 0 (model = reference) counts as half right.

    Counts are filled on the device (`new_full`): `new_tensor` copies a number there and waits for it.
    """
    lengths = cu_seqlens.diff()
    sign = 2 * outcome.to(mean_value.dtype) - 1  # (B,)
    per_token = sign.repeat_interleave(lengths, output_size=mean_value.numel())  # (N,)
    final = _final(mean_value, cu_seqlens)  # (B,)
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
class BalanceConfig:
    """How an online reward-model update weighs right and wrong rollouts. The defaults are the preset `paper`;
    both switches off is the naive update (Figure 6)."""

    dlw: bool = True
    """Dynamic loss weighting: a right rollout weighs 1 - mu, a wrong one mu."""
    adb: bool = True
    """Adaptive difficulty boundary: the margin is shifted by the prompt's difficulty logit(mu) (Eq. 15)."""
    rescale: bool = False
    """Rescales the weights of DLW so that those of a prompt sum to n."""
    drop_unanimous: bool = False
    """Where a prompt's outcomes agree its rollouts weigh 0 and their margin is not shifted."""
    difficulty_dtype: Literal["float64", "float32"] = "float64"
    """What logit(mu) is computed in: it differs by 1e-3 where a prompt's outcomes agree."""

    def __post_init__(self) -> None:
        if self.difficulty_dtype not in ("float64", "float32"):
            raise IpvrmError(
                f"BalanceConfig: difficulty_dtype must be float64 or float32; got {self.difficulty_dtype!r}"
            )

    @classmethod
    def preset(cls, name: Preset) -> "BalanceConfig":
        """`paper`, or `release`: what the released code does."""
        return by_preset(
            name, paper=cls(), release=cls(rescale=True, drop_unanimous=True, difficulty_dtype="float32")
        )


class Balance(NamedTuple):
    """Per-sequence arguments of `ipvrm_loss`, each (B,) fp32."""

    weight: Tensor
    margin: Tensor


@torch.no_grad()
def online_balance(
    outcome: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    margin: float = 5.0,
    config: BalanceConfig = BalanceConfig(),
    reduce: Reduce | None = None,
) -> Balance:
    """Weight and margin of every rollout, from its prompt's share mu of right ones in [1e-6, 1 - 1e-6].

        weight = 1 - mu if r = 1 else mu (DLW);  rescaled: 1 / (2 mu) if r = 1 else 1 / (2 (1 - mu)),
            and 1 where a prompt's outcomes agree (0 with drop_unanimous, as the released trainer does it)
        margin - (2r - 1) * logit(mu) (ADB, Eq. 15)

    Args:
        outcome: (B,) 0 or 1. group: (B,) int, the prompt of each rollout. num_groups: G.
        margin: before the shift.
        config: `BalanceConfig.preset("paper" | "release")`, or one's own.
        reduce: sums over ranks, see `ipvrm.losses.prompt_groups`.

    Raises:
        ValueError: shapes, dtypes, an outcome other than 0 and 1, or a group outside [0, G).
    """
    op = "online_balance"
    outcome = checked_outcome(op, outcome, group)
    groups = PromptGroups(op, group, num_groups)
    right, count = (reduce or one_rank)(
        torch.stack([groups.sums(outcome), groups.sums(torch.ones_like(outcome))])
    )
    share = groups.spread(right.double() / count.clamp(min=1))  # (B,), exact sums of 0 and 1
    mean = share.clamp(SHARE_FLOOR, 1 - SHARE_FLOOR)
    unanimous = (share == 0) | (share == 1)
    own = torch.where(outcome == 1, mean, 1 - mean)  # the share of rollouts with this one's outcome
    weight = torch.ones_like(mean)
    if config.dlw and config.rescale:
        # a prompt's 1 - mu and mu sum to 2 n mu (1 - mu)
        weight = torch.where(unanimous, weight, 1 / (2 * own))
    elif config.dlw:
        weight = 1 - own
    margins = torch.full_like(mean, margin)
    if config.adb:
        exact = config.difficulty_dtype == "float64"
        difficulty = torch.logit(share if exact else share.float(), eps=SHARE_FLOOR)
        shift = (2 * outcome - 1) * difficulty
        margins = margins - (torch.where(unanimous, 0.0, shift) if config.drop_unanimous else shift)
    if config.drop_unanimous:
        weight = torch.where(unanimous, 0.0, weight)
    return Balance(weight.float(), margins.float())


@dataclass(frozen=True)
class Objective:
    """A loss with its settings; `prefix_weighting` and what follows belong to `ipvrm` alone."""

    name: str
    beta: float
    margin: float = 0.0
    prefix_weighting: PrefixWeighting = "uniform"
    reduction: Reduction = "sequence_mean"

    @property
    def pairwise(self) -> bool:
        """Whether it compares responses; then every second one is the rejected of the one before it."""
        return self.name in PAIRWISE

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys of its metrics, the loss first."""
        return PAIR_METRICS if self.pairwise else METRICS

    def denominator(self, lengths: Sequence[int]) -> float:
        """`loss_denominator` of an optimizer batch whose responses have these lengths; of pairs, how many."""
        if self.pairwise:
            return len(lengths) / 2
        return loss_denominator(lengths, self.reduction, self.prefix_weighting)

    def __call__(
        self,
        log_ratio: Tensor,
        cu_seqlens: Tensor,
        outcome: Tensor,
        denominator: float,
        balance: Balance | None = None,
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the loss of its optimizer batch, and its metrics.

        Args:
            log_ratio: (N,) of B responses; for q_rm the values of its head. See `pairwise`.
            balance: weight and margin (B,) of an online update of ipvrm, in place of 1 and `margin`.
        """
        if self.pairwise:
            pairs = torch.arange(len(outcome), device=outcome.device).reshape(-1, 2)
            if self.name == "dpo":
                return dpo_loss(log_ratio, cu_seqlens, pairs, beta=self.beta, denominator=denominator)
            return q_rm_loss(
                log_ratio, cu_seqlens, pairs, beta=self.beta, margin=self.margin, denominator=denominator
            )
        if self.name == "implicit_prm":
            return implicit_prm_loss(log_ratio, cu_seqlens, outcome, beta=self.beta, denominator=denominator)
        return ipvrm_loss(
            log_ratio,
            cu_seqlens,
            outcome,
            beta=self.beta,
            margin=self.margin if balance is None else balance.margin,
            weight=None if balance is None else balance.weight,
            prefix_weighting=self.prefix_weighting,
            reduction=self.reduction,
            denominator=denominator,
        )
