"""Losses of stage A: by hand, independent of the split, their errors; released numbers in test_golden.py."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import edges

from ipvrm import IpvrmError
from ipvrm.losses.objectives import (
    METRICS,
    PAIR_METRICS,
    BalanceConfig,
    check_objective,
    dpo_loss,
    dpo_pairs,
    implicit_prm_loss,
    ipvrm_loss,
    loss_denominator,
    online_balance,
    q_rm_loss,
)
from ipvrm_kernels.prefix_value_loss import prefix_weight_sums

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


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
     torch.bfloat16, torch.float16, torch.float32, torch.float64],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loss", [ipvrm_loss, implicit_prm_loss])
def test_the_dtype_of_the_outcomes_does_not_matter(loss, dtype):
    """B = 301 is beyond bool, int8 and uint8, and no bf16 number."""
    B = 301
    cu_seqlens, outcome = torch.arange(0, 2 * B + 1, 2).int(), torch.arange(B) % 2
    log_ratio = torch.randn(2 * B, generator=torch.Generator().manual_seed(0))
    got, metrics = loss(log_ratio, cu_seqlens, outcome.to(dtype))
    expected, whole = loss(log_ratio, cu_seqlens, outcome.float())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.dtype == torch.float32 and metrics["loss"][1] == B
    for name, pair in metrics.items():
        for x, y in zip(pair, whole[name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


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
    cu_seqlens = edges(lengths)
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
    lengths = CU_SEQLENS.to("meta").diff().float()
    assert prefix_weight_sums(lengths, weighting).sum().shape == ()


@pytest.mark.parametrize(
    ("weighting", "expected"), [("uniform", 7.0), ("late", 3.5 + 1.0), ("early", 2.5 + 1.0)]
)
def test_denominator_by_hand(weighting, expected):
    """Lengths 6, 1 and 0: late (6 + 1)/2 and 1, early (6 - 1)/2 and 1, an empty response nothing."""
    assert loss_denominator([6, 1, 0], "token_mean", weighting) == expected
    assert loss_denominator([6, 1, 0], "sequence_mean", weighting) == 3


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ("endo_rm", "nothing to train.*--objective endo_rm"),
        ("ppo", "unknown"),
    ],
)
def test_objectives_that_make_no_sense_here(objective, reason):
    with pytest.raises(IpvrmError, match=f"{reason}.*ipvrm, implicit_prm, dpo, q_rm"):
        check_objective(objective)


# ----------------------------------------------------------------------------------------------------- dpo


def test_dpo_by_hand():
    loss, metrics = dpo_loss(LOG_RATIO, CU_SEQLENS, torch.tensor([[0, 1], [1, 0]]), beta=0.5)
    # V = 0.5 * 0.4 and 0.5 * -0.2; -log sigmoid(0.3) and -log sigmoid(-0.3)
    assert float(loss) == pytest.approx((softplus(-0.3) + softplus(0.3)) / 2, rel=1e-6)
    assert tuple(metrics) == PAIR_METRICS
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert means == pytest.approx(
        {"loss": float(loss), "pair_accuracy": 0.5, "value_chosen": 0.05, "value_rejected": 0.05}
    )


def test_dpo_gradient_by_hand():
    log_ratio = LOG_RATIO.clone().requires_grad_()
    loss, _ = dpo_loss(log_ratio, CU_SEQLENS, torch.tensor([[0, 1]]), beta=0.5)
    derivative = 0.5 / (1 + math.exp(0.3))  # beta * sigmoid(-(V_chosen - V_rejected))
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert gradient.tolist() == pytest.approx([-derivative, -derivative, derivative], rel=1e-6)


def test_dpo_micro_batches_add_up():
    torch.manual_seed(0)
    log_ratio, cu_seqlens = torch.randn(10), torch.tensor([0, 4, 4, 7, 10], dtype=torch.int32)
    pairs = torch.tensor([[0, 1], [2, 3], [3, 0]])
    whole, _ = dpo_loss(log_ratio, cu_seqlens, pairs)
    parts = sum(dpo_loss(log_ratio, cu_seqlens, part, denominator=3)[0] for part in (pairs[:1], pairs[1:]))
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)


def test_dpo_without_pairs_or_tokens():
    log_ratio = LOG_RATIO.clone().requires_grad_()
    none = torch.empty(0, 2, dtype=torch.int64)
    loss, metrics = dpo_loss(log_ratio, CU_SEQLENS, none)
    loss.backward()
    assert loss.item() == 0 and log_ratio.grad.tolist() == [0, 0, 0]
    assert all(float(total) == float(count) == 0 for total, count in metrics.values())
    empty = torch.zeros(3, dtype=torch.int32)
    loss, _ = dpo_loss(torch.empty(0), empty, torch.tensor([[0, 1]]))
    assert float(loss) == pytest.approx(math.log(2))  # two empty sequences: V = 0


def test_q_rm_by_hand():
    loss, metrics = q_rm_loss(LOG_RATIO, CU_SEQLENS, torch.tensor([[0, 1], [1, 0]]), beta=0.5, margin=2.0)
    # beta * mean Z = 0.5 * 0.2 and 0.5 * -0.2; -log sigmoid(0.2 - 2) and -log sigmoid(-0.2 - 2)
    assert float(loss) == pytest.approx((softplus(1.8) + softplus(2.2)) / 2, rel=1e-6)
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert means == pytest.approx(
        {"loss": float(loss), "pair_accuracy": 0.5, "value_chosen": 0.0, "value_rejected": 0.0}
    )


def test_q_rm_gradient_is_the_formulas_in_fp64():
    torch.manual_seed(0)
    values, cu_seqlens = (
        torch.randn(12, requires_grad=True),
        torch.tensor([0, 4, 5, 9, 12], dtype=torch.int32),
    )
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3]])
    loss, _ = q_rm_loss(values, cu_seqlens, pairs)
    (gradient,) = torch.autograd.grad(loss, values)
    z = values.detach().double().requires_grad_()
    means = torch.stack([part.mean() for part in z.split([4, 1, 4, 3])])
    exact = -torch.nn.functional.logsigmoid(0.2 * (means[pairs[:, 0]] - means[pairs[:, 1]]) - 2.0).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact, z)[0], rtol=1e-5, atol=1e-9)
    parts = sum(q_rm_loss(values, cu_seqlens, part, denominator=3)[0] for part in (pairs[:1], pairs[1:]))
    torch.testing.assert_close(parts, loss)


def test_pairs():
    #          prompt 7: right 1, 4, wrong 0, 3, 6   prompt 2: right 2   prompt 5: wrong 5
    outcome, group = [0, 1, 1, 0, 1, 0, 0], [7, 7, 2, 7, 7, 5, 7]
    assert dpo_pairs(outcome, group).tolist() == [[1, 0], [4, 3]]
    assert dpo_pairs([1, 1], [0, 0]).shape == (0, 2) and dpo_pairs([], []).shape == (0, 2)
    assert dpo_pairs([0, 1, 0, 1], [1, 1, 0, 0]).tolist() == [[3, 2], [1, 0]]  # prompts in order


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"pairs must be \(P, 2\) int64, got \(2,\) torch.int64"),
        (torch.zeros(1, 3, dtype=torch.int64), r"pairs must be \(P, 2\) int64, got \(1, 3\)"),
        (torch.zeros(1, 2), r"pairs must be \(P, 2\) int64, got \(1, 2\) torch.float32"),
        (torch.tensor([[0, 2]]), r"pairs must lie in \[0, B = 2\), got \[\[0, 2\]\]"),
        (torch.tensor([[-1, 0]]), r"pairs must lie in \[0, B = 2\), got \[\[-1, 0\]\]"),
    ],
)
def test_dpo_errors(pairs, message):
    with pytest.raises(ValueError, match="dpo_loss: " + message):
        dpo_loss(LOG_RATIO, CU_SEQLENS, pairs)


def test_pairs_errors():
    with pytest.raises(ValueError, match="dpo_pairs: one group per outcome, got 2 and 1"):
        dpo_pairs([0, 1], [0])
    with pytest.raises(ValueError, match="dpo_pairs: outcome must be 0 or 1, got 0.5 at 1"):
        dpo_pairs([0, 0.5], [0, 0])


# ---------------------------------------------------------------------------------------- online balancing

# prompt 1: one right of four; prompt 0: all three right; prompt 2: a single wrong one
BALANCE_OUTCOME = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 1])
BALANCE_GROUP = torch.tensor([1, 1, 0, 1, 0, 1, 2, 0])


def test_balance_by_hand_paper():
    weight, margin = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3)
    right, wrong = 0.75, 0.25  # prompt 1: mu = 1/4
    assert weight.tolist() == pytest.approx([right, wrong, 1e-6, wrong, 1e-6, wrong, 1e-6, 1e-6], rel=1e-6)
    hard = math.log(0.25 / 0.75)
    sure = math.log((1 - 1e-6) / 1e-6)
    assert margin.tolist() == pytest.approx(
        [5 - hard, 5 + hard, 5 - sure, 5 + hard, 5 - sure, 5 + hard, 5 - sure, 5 - sure], rel=1e-6
    )
    assert weight.dtype == margin.dtype == torch.float32


def test_balance_by_hand_release():
    weight, margin = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3, config=BalanceConfig.preset("release"))
    assert weight.tolist() == pytest.approx(
        [2, 2 / 3, 0, 2 / 3, 0, 2 / 3, 0, 0], rel=1e-6
    )  # sums to 4 in prompt 1; unanimous prompts have no say
    paper = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3).margin
    mixed = torch.tensor([0, 1, 3, 5])
    torch.testing.assert_close(margin[mixed], paper[mixed])
    assert margin[[2, 4, 6, 7]].tolist() == [5.0] * 4


def test_balance_rescaled_without_dropping():
    config = replace(BalanceConfig.preset("release"), drop_unanimous=False)
    weight, margin = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3, config=config)
    assert weight[[2, 4, 6, 7]].tolist() == [1.0] * 4
    paper = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3).margin
    unanimous_right = torch.tensor([2, 4, 7])
    assert float((margin - paper)[unanimous_right].abs().max()) == pytest.approx(0.0132, rel=0.01)  # fp32


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_balance_switches(preset):
    config = BalanceConfig.preset(preset)
    both = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3, margin=2.0, config=config)
    dlw = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3, margin=2.0, config=replace(config, adb=False))
    adb = online_balance(BALANCE_OUTCOME, BALANCE_GROUP, 3, margin=2.0, config=replace(config, dlw=False))
    torch.testing.assert_close(dlw.weight, both.weight)
    torch.testing.assert_close(adb.margin, both.margin)
    assert dlw.margin.tolist() == [2.0] * 8
    agree = [2, 4, 6, 7] if preset == "release" else []
    assert adb.weight.tolist() == [0.0 if i in agree else 1.0 for i in range(8)]


def test_balance_errors():
    with pytest.raises(IpvrmError, match="difficulty_dtype must be float64 or float32; got 'bf16'"):
        BalanceConfig(difficulty_dtype="bf16")
    with pytest.raises(IpvrmError, match="preset must be 'paper' or 'release'; got 'papers'"):
        BalanceConfig.preset("papers")
    with pytest.raises(ValueError, match=r"online_balance: outcome must be 0 or 1, got \[0.5\]"):
        online_balance(torch.tensor([0.5]), torch.zeros(1, dtype=torch.int64), 1)


@pytest.mark.parametrize("config", [BalanceConfig.preset("paper"), BalanceConfig.preset("release")])
def test_balance_needs_no_device_sync(config):
    meta = online_balance(BALANCE_OUTCOME.to("meta"), BALANCE_GROUP.to("meta"), 3, config=config)
    assert meta.weight.shape == meta.margin.shape == (8,)


def test_balance_feeds_the_loss():
    """Two rollouts of one prompt, one right: mu 1/2, so both weights are 1/2 and no margin moves."""
    weight, margin = online_balance(OUTCOME, torch.zeros(2, dtype=torch.int64), 1)
    loss, _ = ipvrm_loss(LOG_RATIO, CU_SEQLENS, OUTCOME, weight=weight, margin=margin)
    plain, _ = ipvrm_loss(LOG_RATIO, CU_SEQLENS, OUTCOME)
    assert float(loss) == pytest.approx(float(plain) / 2, rel=1e-6)


def test_an_empty_response_counts_as_value_zero():
    cu_seqlens = torch.tensor([0, 0, 2, 3, 3], dtype=torch.int32)
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss, metrics = implicit_prm_loss(LOG_RATIO, cu_seqlens, outcome, beta=0.5)
    expected = (2 * math.log(2) + softplus(-0.2) + softplus(-0.1)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["outcome_accuracy"][0]) == 3.0  # two right, two undecided


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ipvrm", "implicit_prm", "dpo", "q_rm"])
def test_an_infinite_log_ratio_is_never_a_loss_of_zero(name, outcome, infinite):
    """+inf for a right response, -inf for a wrong one: softplus of both is exactly 0; of Q-RM it
    is a token's value."""
    log_ratio = torch.tensor([0.1, infinite, 0.2])
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    labels = torch.tensor([outcome, 1 - outcome])
    if name in ("dpo", "q_rm"):
        order = [[0, 1]] if outcome else [[1, 0]]
        loss, metrics = {"dpo": dpo_loss, "q_rm": q_rm_loss}[name](log_ratio, cu_seqlens, torch.tensor(order))
    else:
        loss, metrics = {"ipvrm": ipvrm_loss, "implicit_prm": implicit_prm_loss}[name](
            log_ratio, cu_seqlens, labels
        )
    assert loss.isnan() and metrics["loss"][0].isnan()
