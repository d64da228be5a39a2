"""The two-branch loss under its presets: from log-probs and from hidden states, by hand; candidate rules."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import edges

from ipvrm import (
    AdvantageConfig,
    CandidateConfig,
    IpvrmError,
    PolicyLossConfig,
    candidate_mask,
    distrl_advantages,
    force_sampled,
    select_candidates,
    temporal_difference,
)
from ipvrm_kernels import distrl_loss as distrl_loss_op
from ipvrm_kernels import linear_distrl_loss, linear_logprobs
from ipvrm_kernels.backend import why_not

PAPER, RELEASE = PolicyLossConfig.preset("paper"), PolicyLossConfig.preset("release")
CONFIGS = {
    "paper": PAPER,
    "release": RELEASE,
    "token_mean": replace(PAPER, reduction="token_mean", candidate_reduction="token_mean", alpha=2.0),
    "mixed": replace(RELEASE, reduction="sequence_mean", candidate_clip_low=0.05, dual_clip=1.2),
}


def distrl_loss(*arguments, config=PAPER, **named):
    """The op with the options of a config."""
    return distrl_loss_op(*arguments, **named, **config.options())


def inputs(seed=0, lengths=(5, 1, 0, 9, 2), K=4, V=30):
    """Logits, ids and the tensors of the loss; about half of the candidate slots unused, a sequence empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    N = sum(lengths)
    logits = 2 * randn(N, V)
    token_ids = torch.randint(V, (N,), generator=generator)
    candidate_ids = torch.randint(V, (N, K), generator=generator)
    candidate_ids[torch.rand(N, K, generator=generator) < 0.5] = -1
    candidate_ids[-1:] = -1
    old = torch.log_softmax(logits + 0.3 * randn(N, V), 1)
    old_candidates = old.gather(1, candidate_ids.clamp(min=0)).masked_fill(candidate_ids < 0, -math.inf)
    rest = dict(
        old_logprobs=old.gather(1, token_ids[:, None])[:, 0],
        old_candidate_logprobs=old_candidates,
        advantages=randn(N),
        candidate_advantages=randn(N, K),
        cu_seqlens=edges(lengths),
    )
    return logits, token_ids, candidate_ids, rest


def of_logits(logits, token_ids, candidate_ids):
    """(logprobs, candidate_logprobs), differentiable, -inf at unused slots."""
    log_p = torch.log_softmax(logits, 1)
    candidates = log_p.gather(1, candidate_ids.clamp(min=0))
    return log_p.gather(1, token_ids[:, None])[:, 0], candidates.masked_fill(candidate_ids < 0, -math.inf)


def fused(logits, token_ids, candidate_ids, rest, **options):
    """linear_distrl_loss with the identity for weights, so that the states are the logits."""
    cu_seqlens = rest["cu_seqlens"]
    floats = {name: x for name, x in rest.items() if name != "cu_seqlens"}
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return linear_distrl_loss(
        logits, eye, token_ids, candidate_ids, **floats, cu_seqlens=cu_seqlens, **options
    )


def assert_equal_losses(mine, theirs, rtol=1e-5):
    for name in ("loss", "token_loss", "candidate_loss"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=rtol, atol=1e-7)
    assert list(mine.metrics) == list(theirs.metrics)
    for name, pair in mine.metrics.items():
        for got, expected in zip(pair, theirs.metrics[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "divisors", [{}, dict(token_denominator=7.0, candidate_denominator=torch.tensor(3.0))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_op_on_hidden_states(config, divisors, dtype):
    logits, token_ids, candidate_ids, rest = inputs()
    logits = logits.to(dtype)
    mine_leaf, their_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine = distrl_loss(*of_logits(mine_leaf, token_ids, candidate_ids), **rest, config=config, **divisors)
    theirs = fused(their_leaf, token_ids, candidate_ids, rest, **config.options(), **divisors)
    assert_equal_losses(mine, theirs)
    (gradient,) = torch.autograd.grad(3 * mine.loss, mine_leaf)
    (expected,) = torch.autograd.grad(3 * theirs.loss, their_leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    assert expected.abs().max() > 0 and mine.loss.dtype == dtype
    assert not mine.token_loss.requires_grad and not mine.candidate_loss.requires_grad


@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
@pytest.mark.parametrize("lengths", [(), (0, 0), (3,), (1, 1)], ids=str)
def test_small_batches(config, lengths):
    logits, token_ids, candidate_ids, rest = inputs(lengths=lengths)
    leaf = logits.clone().requires_grad_()
    mine = distrl_loss(*of_logits(leaf, token_ids, candidate_ids), **rest, config=config)
    assert_equal_losses(mine, fused(logits, token_ids, candidate_ids, rest, **config.options()))
    mine.loss.backward()
    assert mine.loss.isfinite() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_no_candidates_anywhere(config):
    logits, token_ids, candidate_ids, rest = inputs()
    candidate_ids, unused = torch.full_like(candidate_ids, -1), torch.full(candidate_ids.shape, -math.inf)
    rest["old_candidate_logprobs"] = unused
    for divisors in ({}, dict(candidate_denominator=0.0)):
        mine = distrl_loss(*of_logits(logits, token_ids, candidate_ids), **rest, config=config, **divisors)
        assert mine.candidate_loss == 0 and mine.loss == mine.token_loss
    no_slots = {name: x[:, :0] if x.dim() == 2 else x for name, x in rest.items()}
    mine = distrl_loss(*of_logits(logits, token_ids, candidate_ids[:, :0]), **no_slots, config=config)
    assert mine.candidate_loss == 0 and mine.loss == mine.token_loss


def by_hand():
    """Two sequences of two and one tokens. rho of the tokens 2, 1, 1/2; of the two candidates 2 and 1/2."""
    log2 = math.log(2)
    return dict(
        logprobs=torch.tensor([-1 + log2, -1.0, -1 - log2]),
        candidate_logprobs=torch.tensor([[-0.5, -math.inf], [-2 - log2, -math.inf], [-math.inf, -math.inf]]),
        old_logprobs=torch.full((3,), -1.0),
        old_candidate_logprobs=torch.tensor([[-0.5 - log2, -math.inf], [-2.0, -math.inf], [-math.inf] * 2]),
        advantages=torch.tensor([1.0, 3.0, -4.0]),
        candidate_advantages=torch.tensor([[-2.0, 5.0], [-1.0, 5.0], [5.0, 5.0]]),
        cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
    )


def test_paper_by_hand():
    out = distrl_loss(**by_hand())
    # clipped at 1.28: -1.28; -3; clipped at 0.8: 4 * 0.8
    assert out.token_loss.item() == pytest.approx(((-1.28 - 3) / 2 + 3.2) / 2, rel=1e-6)
    # A < 0 and rho 2: the unclipped 4; rho 1/2: clipped at 0.8
    p0, p1 = math.exp(-0.5) / 2, math.exp(-2)
    assert out.candidate_loss.item() == pytest.approx((p0 * 4 + p1 * 0.8) / 2 / 2, rel=1e-6)
    assert out.loss.item() == pytest.approx(out.token_loss.item() + 0.1 * out.candidate_loss.item(), rel=1e-6)
    pairs = {name: (total.item(), count.item()) for name, (total, count) in out.metrics.items()}
    log2 = math.log(2)
    assert pairs["token_clip_fraction"] == (2, 3) and pairs["candidate_clip_fraction"] == (1, 2)
    assert pairs["token_dual_clip_fraction"] == (0, 3) and pairs["candidate_dual_clip_fraction"] == (0, 2)
    assert pairs["token_kl"] == pytest.approx((0.0, 3), abs=1e-6)
    assert pairs["candidate_kl"] == pytest.approx(((p1 - p0) * log2, 2), rel=1e-5)
    assert pairs["candidates_per_row"] == (2, 3)
    assert pairs["candidate_mass"] == pytest.approx((p0 + p1, 3), rel=1e-6)


def test_release_by_hand():
    out = distrl_loss(**by_hand() | dict(candidate_logprobs=by_hand()["candidate_logprobs"] + math.log(2)),
                      config=RELEASE)  # fmt: skip
    assert out.token_loss.item() == pytest.approx((-1.28 - 3 + 3.2) / 3, rel=1e-6)  # pooled
    p0, p1 = math.exp(-0.5) / 2, math.exp(-2)
    # rho 4 and A -2: the dual clip 3 * 2; rho 1 and A -1: 1; over the sum of pi_old
    assert out.candidate_loss.item() == pytest.approx((p0 * 6 + p1) / (p0 + p1), rel=1e-6)
    assert out.metrics["candidate_dual_clip_fraction"][0] == 1


@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_candidate_clip_differs_between_presets(config):
    """rho = 1.25, A = 1: inside the paper's 1.28, beyond the release's 1.2."""
    out = distrl_loss(
        torch.zeros(1), torch.tensor([[math.log(1.25) - 1]]), torch.zeros(1), torch.tensor([[-1.0]]),
        torch.zeros(1), torch.ones(1, 1), torch.tensor([0, 1], dtype=torch.int32), config=config,
    )  # fmt: skip
    expected = -1.25 * math.exp(-1) if config == PAPER else -1.2
    assert out.candidate_loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_micro_batches_add_up(config):
    logits, token_ids, candidate_ids, rest = inputs()
    whole = distrl_loss(*of_logits(logits, token_ids, candidate_ids), **rest, config=config)
    cu = rest["cu_seqlens"]
    old_prob = rest["old_candidate_logprobs"].exp().sum().item()
    divisor = {"sequence_mean": 5, "token_mean": 17, "old_prob_mean": old_prob}
    divisors = dict(
        token_denominator=divisor[config.reduction], candidate_denominator=divisor[config.candidate_reduction]
    )
    parts = []
    for first, last in ((0, 2), (2, 5)):
        rows = slice(int(cu[first]), int(cu[last]))
        part = {name: x[rows] for name, x in rest.items() if name != "cu_seqlens"}
        part["cu_seqlens"] = cu[first : last + 1] - cu[first]
        log_probs = of_logits(logits[rows], token_ids[rows], candidate_ids[rows])
        parts.append(distrl_loss(*log_probs, **part, config=config, **divisors))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, pair in whole.metrics.items():
        for i in (0, 1):
            torch.testing.assert_close(sum(part.metrics[name][i] for part in parts), pair[i])


def test_unused_slots_stay_out():
    """Old log-prob -inf: whatever stands beside it, no loss, no gradient, no count."""
    logits, token_ids, candidate_ids, rest = inputs()
    new, new_candidates = (x.detach() for x in of_logits(logits, token_ids, candidate_ids))
    unused = candidate_ids < 0
    clean = distrl_loss(new, new_candidates, **rest)
    dirty = new_candidates.masked_fill(unused, math.nan).requires_grad_()
    rest["candidate_advantages"] = rest["candidate_advantages"].masked_fill(unused, math.nan)
    got = distrl_loss(new, dirty, **rest)
    assert_equal_losses(got, clean, rtol=0)
    (gradient,) = torch.autograd.grad(got.loss, dirty)
    assert (gradient[unused] == 0).all() and gradient.isfinite().all()


def test_a_vanishing_old_probability_meets_no_infinite_ratio():
    """pi_old = exp(-200) is 0 in fp32 and rho infinite: loss and gradient are 0, not 0 * inf."""
    new = torch.zeros(1, 1, requires_grad=True)
    out = distrl_loss(
        torch.zeros(1), new, torch.zeros(1), torch.tensor([[-200.0]]), torch.zeros(1), -torch.ones(1, 1),
        torch.tensor([0, 1], dtype=torch.int32),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert out.loss.item() == 0 and gradient.item() == 0


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("new", [0.0, -90.0, -math.inf])
@pytest.mark.parametrize("old", [-87.0, -90.0, -95.0, -103.0, -200.0, math.nan])
def test_a_tiny_old_probability(old, new, advantage, config, impl):
    """Loss, gradient, KL and clip counts at the edge of fp32 against fp64, and a NaN that is not hidden."""
    if reason := why_not(impl, "cpu"):
        pytest.skip(reason)
    logprobs = torch.tensor([[-0.9, new, -0.6], [-1.0, -1.1, -0.3]])
    rest = dict(
        old_logprobs=torch.tensor([-1.0, -0.9]),
        old_candidate_logprobs=torch.tensor([[old, -0.5], [-1.2, -math.inf]]),
        advantages=torch.tensor([1.0, -2.0]),
        candidate_advantages=torch.tensor([[advantage, -1.0], [0.5, math.nan]]),
        cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32),
    )
    leaf = logprobs.clone().requires_grad_()
    mine = distrl_loss(leaf[:, 0], leaf[:, 1:], **rest, config=config, impl=impl)
    (gradient,) = torch.autograd.grad(mine.loss, leaf)
    if math.isnan(old):
        assert mine.loss.isnan() and gradient[0, 1].isnan()
        return
    assert mine.loss.isfinite() and gradient.isfinite().all()
    # pi_old below the smallest normal fp32 number counts as 0: in fp64 such an element is left out by hand
    tiny = old < math.log(torch.finfo(torch.float32).tiny)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in rest.items()}
    if tiny:
        wide["old_candidate_logprobs"][0, 0] = -math.inf
    exact = logprobs.double().requires_grad_()
    theirs = distrl_loss(exact[:, 0], exact[:, 1:], **wide, config=config, impl="torch")
    close = partial(torch.testing.assert_close, rtol=5e-5, atol=1e-6)
    for x, y in zip(mine[:3], theirs[:3], strict=True):
        close(x.double(), y)
    close(gradient.double(), torch.autograd.grad(theirs.loss, exact)[0])
    for name in ("token_kl", "token_clip_fraction", "candidate_mass"):
        close(torch.stack(mine.metrics[name]).double(), torch.stack(theirs.metrics[name]))
    used = float(mine.metrics["candidates_per_row"][0])
    assert (
        used == float(theirs.metrics["candidates_per_row"][0]) + tiny
    )  # it counts, though it weighs nothing


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (dict(token_denominator=0.0), "token_denominator must be finite and > 0, got 0.0"),
        (dict(token_denominator=torch.tensor(0.0)), "token_denominator must be finite and > 0, got 0.0"),
        (dict(token_denominator=torch.tensor(math.nan)), "token_denominator must be finite and > 0, got nan"),
        (dict(candidate_denominator=torch.tensor(-1.0)), "candidate_denominator must be finite and >= 0"),
        (dict(candidate_denominator=0.0), "candidate_denominator must be > 0 where there are candidates"),
        (dict(candidate_denominator=torch.tensor(0.0)), "candidate_denominator must be > 0 where there are"),
    ],
)
@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_refuses_the_denominators_that_the_op_refuses(config, divisors, message):
    logits, token_ids, candidate_ids, rest = inputs()
    with pytest.raises(ValueError, match="^distrl_loss: " + message) as mine:
        distrl_loss(*of_logits(logits, token_ids, candidate_ids), **rest, config=config, **divisors)
    with pytest.raises(ValueError, match="linear_distrl_loss: " + message) as theirs:
        fused(logits, token_ids, candidate_ids, rest, **config.options(), **divisors)
    assert str(theirs.value) == "linear_" + str(mine.value)


def test_nan_is_not_hidden():
    logits, token_ids, candidate_ids, rest = inputs()
    new, new_candidates = of_logits(logits, token_ids, candidate_ids)
    for spoiled in (new.clone(), new_candidates.clone()):
        spoiled.view(-1)[(spoiled.view(-1) > -math.inf).nonzero()[0]] = math.nan
        arguments = (spoiled, new_candidates) if spoiled.dim() == 1 else (new, spoiled)
        assert distrl_loss(*arguments, **rest).loss.isnan()


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_a_step_is_the_same_code_under_both_presets(preset):
    """From hidden states of three models to the gradient; at the first update every ratio is 1."""
    torch.manual_seed(0)
    V, cu = 40, torch.tensor([0, 6, 7, 15, 20], dtype=torch.int32)
    hidden, rm_hidden, weight = torch.randn(20, 16), torch.randn(20, 16), torch.randn(V, 16)
    token_ids, outcome = torch.randint(V, (20,)), torch.tensor([1.0, 0, 0, 1])

    old = select_candidates(hidden, weight, token_ids, cu, config=CandidateConfig.preset(preset))
    rm = linear_logprobs(rm_hidden, weight, torch.cat([token_ids[:, None], old.ids], 1)).logprobs
    got = distrl_advantages(
        temporal_difference(rm[:, 0], old.sampled_logprobs, cu),
        temporal_difference(rm[:, 1:], old.logprobs, cu),
        outcome, cu, torch.tensor([0, 0, 1, 1]), 2, config=AdvantageConfig.preset(preset),
    )  # fmt: skip
    leaf = hidden.clone().requires_grad_()
    out = linear_distrl_loss(
        leaf, weight, token_ids, old.ids, old.sampled_logprobs, old.logprobs, got.advantages,
        got.candidate_advantages, cu, **PolicyLossConfig.preset(preset).options(),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    assert out.metrics["token_clip_fraction"][0] == 0 and out.metrics["candidate_clip_fraction"][0] == 0
    assert abs(out.metrics["token_kl"][0]) < 1e-4
    assert out.metrics["candidates_per_row"][0] == old.counts.sum() > 0
    assert (got.candidate_advantages[old.ids < 0] == 0).all()
    last = (cu[1:] - 1).long()
    assert (old.counts[last] == 0).all() and (got.candidate_advantages[last] == 0).all()


# ---------------------------------------------------------------------------------------------- candidates


def oracle_candidates(log_p, sampled, last, config):
    """One row in plain Python: ids in order."""
    order = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))
    low = math.log(config.min_prob)
    kept = [v for v in order if log_p[v] >= low] if config.top_k is None else order[: config.top_k]
    if config.keep_sampled:
        if sampled in kept:
            i = kept.index(sampled)
            kept[0], kept[i] = kept[i], kept[0]
        else:
            kept = [sampled, *kept][: config.top_k]
    inside = [log_p[v] > low if config.strict else log_p[v] >= low for v in kept]
    if config.keep_sampled:
        inside[0] = True
    return [] if last else [v for v, keep in zip(kept, inside, strict=True) if keep]


@pytest.mark.parametrize(
    "config",
    [
        CandidateConfig.preset("paper"),
        CandidateConfig.preset("release"),
        CandidateConfig(top_k=2),
        CandidateConfig(min_prob=0.25, keep_sampled=True),
    ],
    ids=["paper", "release", "top 2", "sampled first"],
)
def test_selection(config):
    torch.manual_seed(0)
    lengths, V = (12, 1, 0, 30), 20
    N = sum(lengths)
    hidden, weight = torch.randn(N, 8), torch.randn(V, 8)
    token_ids = torch.randint(V, (N,))
    cu = torch.tensor([0, 12, 13, 13, 43], dtype=torch.int32)
    found = select_candidates(hidden, weight, token_ids, cu, config=config, temperature=1.5)
    log_p = torch.log_softmax(hidden @ weight.T / 1.5, 1)
    for n in range(N):
        expected = oracle_candidates(log_p[n].tolist(), token_ids[n].item(), n in (11, 12, 42), config)
        ids = found.ids[n][found.ids[n] >= 0].tolist()
        assert ids == expected and found.counts[n] == len(ids)
    used = found.ids >= 0
    torch.testing.assert_close(found.logprobs[used], log_p.gather(1, found.ids.clamp(min=0))[used])
    assert (found.logprobs[~used] == -math.inf).all()
    torch.testing.assert_close(found.sampled_logprobs, log_p.gather(1, token_ids[:, None])[:, 0])
    if config == CandidateConfig.preset("paper"):
        assert found.ids.shape[1] == 10 and (found.counts > 1).any()


def test_selection_of_the_presets_by_hand():
    """p = 0.5 0.3 0.1 0.06 0.04, token 4 sampled: all from 0.1, or the best five above it."""
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).expand(2, 5)
    arguments = (p.log(), torch.eye(5), torch.tensor([4, 4]), torch.tensor([0, 2], dtype=torch.int32))
    slack = replace(CandidateConfig.preset("paper"), min_prob=0.0999)
    assert select_candidates(*arguments, config=slack).ids[0, :4].tolist() == [0, 1, 2, -1]
    release = replace(CandidateConfig.preset("release"), min_prob=0.1001)
    found = select_candidates(*arguments, config=release)
    assert found.ids.tolist() == [[4, 1, -1, -1, 0], [-1] * 5]  # 4 and 0 changed places
    assert found.counts.tolist() == [3, 0]
    three = replace(release, top_k=3)
    assert select_candidates(*arguments, config=three).ids[0].tolist() == [4, 0, 1]  # 2 dropped out


def test_candidate_mask_by_hand():
    logprobs = torch.tensor([[0.05, 0.25, 0.2, 0.0], [0.3, 0.25, 0.2, 0.1]]).log()
    cu = torch.tensor([0, 2, 2], dtype=torch.int32)
    p = CandidateConfig(min_prob=0.25)
    assert candidate_mask(logprobs, cu, p).tolist() == [[False, True, False, False], [False] * 4]
    assert not candidate_mask(logprobs, cu, replace(p, strict=True)).any()
    assert candidate_mask(logprobs, cu, replace(p, strict=True, keep_sampled=True))[0].tolist() == [
        True, False, False, False,
    ]  # fmt: skip
    unused = torch.full((2, 4), -math.inf)
    assert not candidate_mask(unused, cu, replace(p, keep_sampled=True)).any()
    assert candidate_mask(logprobs[:, :0], cu, replace(p, keep_sampled=True)).shape == (2, 0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), K=st.integers(1, 6), N=st.integers(0, 5))
def test_force_sampled(data, K, N):
    rows = [data.draw(st.permutations(range(9)))[:K] for _ in range(N)]
    sampled = [data.draw(st.integers(0, 8)) for _ in range(N)]
    ids = torch.tensor(rows, dtype=torch.int64).reshape(N, K)
    token = torch.tensor(sampled, dtype=torch.int64)
    got, logprobs = force_sampled(ids, -ids.float(), token, -token.float())
    for row, own, result in zip(rows, sampled, got.tolist(), strict=True):
        expected = list(row)
        if own in expected:
            i = expected.index(own)
            expected[0], expected[i] = expected[i], expected[0]
        else:
            expected = [own, *expected[:-1]]
        assert result == expected
    assert torch.equal(logprobs, -got.float())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_the_loss_compiles_whole(config, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(distrl_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((5, 1, 0, 9, 2), (3, 8)):
        logits, token_ids, candidate_ids, rest = inputs(lengths=lengths)
        got = []
        for function in (compiled, distrl_loss):
            leaf = logits.clone().requires_grad_()
            out = function(*of_logits(leaf, token_ids, candidate_ids), **rest, config=config)
            got.append((out, *torch.autograd.grad(out.loss, leaf)))
        assert_equal_losses(got[0][0], got[1][0])
        torch.testing.assert_close(got[0][1], got[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("preset", ["paper", pytest.param("release", marks=pytest.mark.full)])
def test_selection_compiles_whole(preset, dynamic):
    torch.compiler.reset()
    config, cu = CandidateConfig.preset(preset), torch.tensor([0, 6, 9], dtype=torch.int32)
    hidden, weight = torch.randn(9, 8), torch.randn(20, 8)
    token_ids = torch.randint(20, (9,))
    compiled = torch.compile(select_candidates, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = compiled(hidden, weight, token_ids, cu, config=config)
    for mine, theirs in zip(
        found, select_candidates(hidden, weight, token_ids, cu, config=config), strict=True
    ):
        assert mine is theirs is None or torch.equal(mine, theirs)
    compiled = torch.compile(candidate_mask, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(found.logprobs, cu, config), found.ids >= 0)


def test_no_device_sync():
    """On the meta device nothing has a value, so whatever would wait for one raises."""
    logits, token_ids, candidate_ids, rest = inputs()
    meta = {name: x.to("meta") for name, x in rest.items()}
    new, new_candidates = (x.to("meta") for x in of_logits(logits, token_ids, candidate_ids))
    for config in (PAPER, RELEASE):
        assert distrl_loss(new, new_candidates, **meta, config=config).loss.shape == ()
    for preset in ("paper", "release"):
        found = select_candidates(
            logits.to("meta"), torch.empty(7, logits.shape[1], device="meta"), token_ids.to("meta"),
            meta["cu_seqlens"], config=CandidateConfig.preset(preset),
        )  # fmt: skip
        assert found.ids.shape == found.logprobs.shape


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logprobs=torch.zeros(3, 1)), r"logprobs must be \(N,\) and candidate_logprobs \(N, K\), got"),
        (dict(candidate_logprobs=torch.zeros(3)), r"logprobs must be \(N,\) and candidate_logprobs \(N, K\)"),
        (
            dict(logprobs=torch.zeros(3).long()),
            "logprobs must be floating point on one device, got torch.int64",
        ),
        (
            dict(old_logprobs=torch.zeros(2)),
            r"old_logprobs must be floating point of shape \(3,\), got \(2,\)",
        ),
        (
            dict(candidate_advantages=torch.zeros(3, 1)),
            r"candidate_advantages must be .* \(3, 2\), got \(3, 1",
        ),
        (dict(advantages=torch.zeros(3, device="meta")), "advantages is on meta, the others on cpu"),
        (dict(cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), "cu_seqlens must rise from 0 to N=3"),
        (dict(cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens must be \(B\+1,\) int32"),
        (dict(token_denominator=0.0), "token_denominator must be finite and > 0, got 0.0"),
        (dict(candidate_denominator=-1.0), "candidate_denominator must be finite and >= 0, got -1.0"),
        (dict(candidate_denominator=math.nan), "candidate_denominator must be finite and >= 0, got nan"),
        (
            dict(token_denominator=torch.ones(1)),
            r"token_denominator must be a number or 0-d, got shape \(1,\)",
        ),
        (dict(config=PolicyLossConfig(reduction="mean")), "reduction must be one of .*, got 'mean'"),
        (
            dict(config=PolicyLossConfig(candidate_reduction="mean")),
            "candidate_reduction must be None or one of sequence_mean, token_mean, old_prob_mean, got 'mean'",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match="distrl_loss: " + message):
        distrl_loss(**(by_hand() | change))


def test_clips_out_of_range():
    with pytest.raises(ValueError, match="clip_low must lie in"):
        distrl_loss(**by_hand(), config=PolicyLossConfig(clip_low=2.0))


CU = torch.tensor([0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: candidate_mask(torch.zeros(2), CU),
            r"candidate_mask: logprobs must be \(N, K\) floating point",
        ),
        (
            lambda: candidate_mask(torch.zeros(2, 1).long(), CU),
            "candidate_mask: logprobs must be .* torch.int64",
        ),
        (
            lambda: candidate_mask(torch.zeros(2, 1), CU, CandidateConfig(min_prob=0.0)),
            r"candidate_mask: min_prob must lie in \(0, 1\], got 0.0",
        ),
        (
            lambda: candidate_mask(torch.zeros(3, 1), CU),
            "candidate_mask: cu_seqlens must rise from 0 to N=3",
        ),
        (
            lambda: force_sampled(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2), torch.zeros(2)),
            r"force_sampled: ids and logprobs must be \(N, K\), K >= 1, got \(2, 0\) and \(2, 0\)",
        ),
        (
            lambda: force_sampled(torch.zeros(2, 1), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)),
            r"force_sampled: ids and logprobs must be \(N, K\), K >= 1, got \(2, 1\) and \(2, 2\)",
        ),
        (
            lambda: force_sampled(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(3), torch.zeros(2)),
            r"force_sampled: sampled must be \(2,\), got \(3,\)",
        ),
        (
            lambda: force_sampled(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1)),
            r"force_sampled: sampled_logprobs must be \(2,\), got \(2, 1\)",
        ),
    ],
)
def test_candidate_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("config", [PolicyLossConfig, CandidateConfig])
def test_presets(config):
    assert config() == config.preset("paper") != config.preset("release")
    with pytest.raises(IpvrmError, match="preset must be 'paper' or 'release'; got 'trl'"):
        config.preset("trl")
