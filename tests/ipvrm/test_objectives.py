"""Losses of stage A: worked by hand, against the released functions, and independent of the split."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvrm import IpvrmError
from ipvrm.objectives import (
    METRICS,
    _omega_sum,
    check_objective,
    implicit_prm_loss,
    ipvrm_loss,
    loss_denominator,
)
from ipvrm_kernels import pack

GOLDEN = Path(os.environ.get("IPVRM_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
LOG_RATIO = torch.tensor([0.1, 0.3, -0.2])  # a right response of two tokens, a wrong one of one
CU_SEQLENS = torch.tensor([0, 2, 3], dtype=torch.int32)
OUTCOME = torch.tensor([1.0, 0.0])


def softplus(x):
    return math.log1p(math.exp(x))


def test_ipvrm_by_hand():
    # beta 10: mean values 1 and (1 + 3) / 2 = 2 for the right one, -2 for the wrong one; margin 5
    loss, metrics = ipvrm_loss(LOG_RATIO, CU_SEQLENS, OUTCOME, beta=10.0, margin=5.0)
    right, wrong = (softplus(5 - 1) + softplus(5 - 2)) / 2, softplus(5 - 2)
    assert float(loss) == pytest.approx((right + wrong) / 2, rel=1e-6)
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert tuple(metrics) == METRICS
    assert means == pytest.approx(
        {
            "loss": (right + wrong) / 2,
            "prefix_accuracy": 1.0,
            "outcome_accuracy": 1.0,
            "value_right": 2.0,
            "value_wrong": -2.0,
        }
    )


def test_ipvrm_token_mean_by_hand():
    loss, metrics = ipvrm_loss(LOG_RATIO, CU_SEQLENS, OUTCOME, beta=10.0, margin=0.0, reduction="token_mean")
    assert float(loss) == pytest.approx((softplus(-1) + softplus(-2) + softplus(-2)) / 3, rel=1e-6)
    assert float(metrics["loss"][1]) == 3


def test_implicit_prm_by_hand():
    loss, metrics = implicit_prm_loss(LOG_RATIO, CU_SEQLENS, OUTCOME, beta=0.5)
    # V_T = 0.5 * 0.4 and 0.5 * -0.2; BCE of a right one is softplus(-V), of a wrong one softplus(V)
    assert float(loss) == pytest.approx((softplus(-0.2) + softplus(-0.1)) / 2, rel=1e-6)
    assert float(metrics["prefix_accuracy"][0]) == 3


def test_untrained_model_is_half_right():
    _, metrics = ipvrm_loss(torch.zeros(3), CU_SEQLENS, OUTCOME)
    assert float(metrics["prefix_accuracy"][0]) == 1.5
    assert float(metrics["outcome_accuracy"][0]) == 1.0


@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_sum_over_a_split_with_the_whole_denominator(reduction, weighting):
    torch.manual_seed(0)
    lengths = [5, 1, 3, 8, 2]
    log_ratio = torch.randn(sum(lengths), dtype=torch.float64).float().requires_grad_()
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    outcome = torch.tensor([1.0, 0, 1, 0, 0])
    options = {"reduction": reduction, "prefix_weighting": weighting}
    whole, metrics = ipvrm_loss(log_ratio, cu_seqlens, outcome, **options)
    denominator = loss_denominator(lengths, reduction, weighting)
    assert float(metrics["loss"][1]) == pytest.approx(denominator)
    gradient = torch.autograd.grad(whole, log_ratio)[0]
    parts, loss_sum, count = 0.0, 0.0, 0.0
    for first, last in ((0, 2), (2, 5)):
        start, stop = int(cu_seqlens[first]), int(cu_seqlens[last])
        loss, metrics = ipvrm_loss(
            log_ratio[start:stop],
            cu_seqlens[first : last + 1] - start,
            outcome[first:last],
            denominator=denominator,
            **options,
        )
        parts = parts + loss
        loss_sum, count = loss_sum + float(metrics["loss"][0]), count + float(metrics["loss"][1])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert loss_sum / count == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(parts, log_ratio)[0], gradient)


@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
def test_the_denominator_needs_no_device_sync(weighting):
    """On the meta device nothing has a value, so whatever would wait for one raises."""
    assert _omega_sum(CU_SEQLENS.to("meta"), weighting).shape == ()


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ("dpo", "compares a right with a wrong"),
        ("q_rm", "scalar head"),
        ("endo_rm", "nothing to train"),
        ("ppo", "unknown"),
    ],
)
def test_objectives_that_make_no_sense_here(objective, reason):
    with pytest.raises(IpvrmError, match=f"{reason}.*ipvrm, implicit_prm"):
        check_objective(objective)


def golden_files():
    return sorted(GOLDEN.glob("release_*.npz"))


@pytest.mark.skipif(not golden_files(), reason=f"no golden vectors in {GOLDEN}")
@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_offline_objectives(path):
    with np.load(path) as file:
        data = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    mask = data["mask"].bool()
    outcome = data["outcome"].float()
    log_ratio, cu_seqlens = pack(data["log_ratio"].float(), mask)
    log_ratio.requires_grad_()
    for margin in (5.0, 0.0):
        loss, _ = ipvrm_loss(log_ratio, cu_seqlens, outcome, beta=10.0, margin=margin, reduction="token_mean")
        want = data[f"offline_token_mean_loss_m{margin:.0f}"]
        torch.testing.assert_close(loss.detach(), want.float().reshape(()), rtol=2e-5, atol=2e-6)
    loss, _ = ipvrm_loss(log_ratio, cu_seqlens, outcome, beta=10.0, margin=5.0, weight=data["weight"].float())
    torch.testing.assert_close(
        loss.detach(), data["ipvrm_scalar_loss"].float().reshape(()), rtol=2e-5, atol=2e-6
    )
    loss, _ = implicit_prm_loss(log_ratio, cu_seqlens, outcome, beta=0.05)
    torch.testing.assert_close(
        loss.detach(), data["implicit_prm_loss"].float().reshape(()), rtol=2e-5, atol=2e-6
    )
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    want, _ = pack(data["implicit_prm_grad"].float(), mask)
    torch.testing.assert_close(gradient, want, rtol=2e-5, atol=1e-7)
