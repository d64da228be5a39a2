"""linear_distrl_loss against its composition from the other ops, in value and every gradient, and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import edges

from ipvrm_kernels import backend, clipped_surrogate, linear_distrl_loss, linear_logprobs
from ipvrm_kernels.distrl_loss import DISTRL_METRICS
from ipvrm_kernels.linear_distrl_loss import IMPLS

OP = "linear_distrl_loss"
REDUCTIONS = [
    (a, b)
    for a in ("sequence_mean", "token_mean")
    for b in (None, "sequence_mean", "token_mean", "old_prob_mean")
]
TENSORS = ("hidden", "weight", "token_ids", "candidate_ids", "old_logprobs", "old_candidate_logprobs",
           "advantages", "candidate_advantages", "cu_seqlens")  # fmt: skip


def case(lengths=(5, 0, 1, 9), K=4, D=12, V=37, seed=0, dtype=torch.float32, drift=0.4):
    """Old log-probs near the policy's; half the slots unused, some tokens without an old log-prob."""
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    hidden = 2 * torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
    token_ids = torch.randint(0, V, (N,), generator=g)
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    candidate_ids = log_p.topk(min(K, V), 1).indices if K else torch.zeros(N, 0, dtype=torch.long)
    candidate_ids = torch.where(torch.rand(candidate_ids.shape, generator=g) < 0.5, candidate_ids, -1)

    def old(ids):
        near = log_p.gather(1, ids.clamp(min=0)) + drift * torch.randn(
            ids.shape, generator=g, dtype=torch.float64
        )
        return torch.where(ids >= 0, near.clamp(max=0), -math.inf)

    old_logprobs = old(token_ids[:, None])[:, 0]
    old_logprobs[3::7] = -math.inf
    floats = dict(
        hidden=hidden, weight=weight, bias=0.1 * torch.randn(V, generator=g), old_logprobs=old_logprobs,
        old_candidate_logprobs=old(candidate_ids), advantages=torch.randn(N, generator=g),
        candidate_advantages=torch.randn(candidate_ids.shape, generator=g),
    )  # fmt: skip
    floats = {k: v.to(dtype) for k, v in floats.items()}
    cu_seqlens = edges(lengths)
    return dict(token_ids=token_ids, candidate_ids=candidate_ids, cu_seqlens=cu_seqlens, **floats)


def composed(
    inputs, *, alpha=0.1, clip_low=0.2, clip_high=0.28, candidate_clip_low=None, candidate_clip_high=None,
    dual_clip=None, reduction="sequence_mean", candidate_reduction=None, token_denominator=None,
    candidate_denominator=None, **head,
):  # fmt: skip
    """Eq. 11, 12, 14 from linear_logprobs and clipped_surrogate, one sequence at a time."""
    ids = torch.cat([inputs["token_ids"][:, None], inputs["candidate_ids"]], 1)
    logprobs = linear_logprobs(inputs["hidden"], inputs["weight"], ids, **head).logprobs
    token = clipped_surrogate(
        logprobs[:, 0], inputs["old_logprobs"], inputs["advantages"],
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    candidate = clipped_surrogate(
        logprobs[:, 1:], inputs["old_candidate_logprobs"], inputs["candidate_advantages"],
        clip_low=clip_low if candidate_clip_low is None else candidate_clip_low,
        clip_high=clip_high if candidate_clip_high is None else candidate_clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    old_prob = inputs["old_candidate_logprobs"].exp()
    lengths = inputs["cu_seqlens"].diff().tolist()

    def reduce(per_row, kind, denominator):
        if kind == "sequence_mean":
            total = sum((part.mean() for part in per_row.split(lengths) if len(part)), per_row.sum() * 0)
            computed = len(lengths)
        else:
            total, computed = per_row.sum(), len(per_row) if kind == "token_mean" else old_prob.sum()
        divisor = computed if denominator is None else denominator
        return total / divisor if divisor > 0 else total * 0

    token_loss = reduce(token.loss, reduction, token_denominator)
    per_row = (old_prob * candidate.loss).sum(1)
    candidate_loss = reduce(per_row, candidate_reduction or reduction, candidate_denominator)
    return token_loss + alpha * candidate_loss, token_loss, candidate_loss


def fused(inputs, **options):
    head = {k: options.pop(k) for k in ("bias",) if k in options}
    return linear_distrl_loss(*(inputs[name] for name in TENSORS), **head, **options)


def gradients(function, inputs, device="cpu", trained=("hidden", "weight", "bias"), **options):
    """[loss, token_loss, candidate_loss, gradients...] for an upstream gradient of -1.7."""
    moved = {k: v.to(device, copy=True) for k, v in inputs.items()}
    required = [moved[name].requires_grad_() for name in trained]
    loss, token_loss, candidate_loss = function(moved, bias=moved["bias"], **options)[:3]
    found = torch.autograd.grad(-1.7 * loss, required)
    return [x.detach().cpu() for x in (loss, token_loss, candidate_loss, *found)]


def check(inputs, impl, device, tolerance=1e-5, **options):
    """Fused equals composed to rounding: error relative to the largest entry of each result."""
    got = gradients(fused, inputs, device, impl=impl, **options)
    for mine, theirs in zip(got, gradients(composed, inputs, **options), strict=True):
        atol = tolerance * max(theirs.abs().max().item(), 1e-2) if theirs.numel() else 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("reductions", REDUCTIONS, ids=str)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_composition(impl, device, reductions, dual_clip, poisoned):
    check(case(drift=1.0), impl, device, reduction=reductions[0], candidate_reduction=reductions[1],
          dual_clip=dual_clip, alpha=0.7)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        dict(trained=("hidden",)),
        dict(trained=("weight",)),
        dict(candidate_clip_low=0.05, candidate_clip_high=0.01, alpha=3.0),
        dict(logit_scale=1.5, softcap=4.0, temperature=0.7),
        dict(alpha=0.0),
        dict(clip_low=0.0, clip_high=0.0),
    ],
    ids=lambda o: "-".join(o),
)
def test_composition_options(impl, device, options):
    check(case(), impl, device, **options)


def test_tied_head(impl, device):
    """The weight is also the embedding behind the hidden states: both paths add up in its gradient."""
    inputs = case(drift=1.0)
    moved = {k: v.to(device) for k, v in inputs.items()}
    table = moved["weight"].clone().requires_grad_()

    def step(function, **options):
        hidden = moved["hidden"] + torch.tanh(table[moved["token_ids"].clamp(min=0)])
        loss = function({**moved, "hidden": hidden, "weight": table}, dual_clip=1.5, alpha=0.7, **options)[0]
        return loss.detach(), torch.autograd.grad(loss, table)[0]

    for mine, theirs in zip(step(fused, impl=impl), step(composed), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("retain", [False, True], ids=["last backward", "retained graph"])
def test_backward_reads_no_weight(impl, device, retain):
    """A gathered copy may be freed behind the forward, as FSDP2 and ZeRO-3 free theirs."""
    inputs = {name: x.to(device) for name, x in case().items()}
    bias = inputs.pop("bias")
    leaves = [inputs.pop(name).requires_grad_() for name in ("hidden", "weight")]

    def loss(weight):
        return linear_distrl_loss(leaves[0], weight, **inputs, bias=bias, impl=impl).loss

    want = torch.autograd.grad(loss(leaves[1]), leaves)
    gathered = leaves[1].clone()
    out = loss(gathered)
    gathered.untyped_storage().resize_(0)
    for found, gradient in zip(torch.autograd.grad(out, leaves, retain_graph=retain), want, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trainable", "frozen"])
def test_composition_over_several_tiles_of_the_vocabulary(impl, device, trained):
    """Ids in each tile and in the masked tail, both branches clipping, a block of rows after another."""
    V = 300 if backend.INTERPRETED else 2300
    inputs = case((40, 0, 3, 57), V=V, drift=1.0)
    inputs["token_ids"][:4] = torch.tensor([0, V - 1, V // 2, V - 2])
    check(inputs, impl, device, 2e-5, trained=trained, dual_clip=1.5, alpha=0.7)


def test_both_branches_clip_somewhere(impl, device):
    """The composition tests would prove little if nothing were clipped: here every kind of element occurs."""
    moved = {name: x.to(device) for name, x in case(drift=1.0).items()}
    metrics = fused(moved, dual_clip=1.5, impl=impl).metrics
    for branch in ("token", "candidate"):
        clipped, count = (x.item() for x in metrics[f"{branch}_clip_fraction"])
        dual = metrics[f"{branch}_dual_clip_fraction"][0].item()
        assert 0 < clipped < count and 0 < dual < count


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (63,), (1000, 24)], ids=str)
@pytest.mark.parametrize("K", [0, 1, 10])
def test_shapes(impl, device, lengths, K):
    check(case(lengths, K), impl, device, tolerance=2e-5)


@pytest.mark.slow
@settings(max_examples=5 if backend.INTERPRETED else 25, deadline=None)  # the interpreter is slow
@given(
    lengths=st.lists(st.integers(0, 12), max_size=5), K=st.integers(0, 5), V=st.integers(6, 80),
    seed=st.integers(0, 2**31), reductions=st.sampled_from(REDUCTIONS),
)  # fmt: skip
def test_any_shape(impl, device, lengths, K, V, seed, reductions):
    dtype, tolerance = (torch.float64, 1e-11) if impl == "torch" else (torch.float32, 2e-5)
    check(case(tuple(lengths), K, V=V, seed=seed, dtype=dtype), impl, device, tolerance,
          reduction=reductions[0], candidate_reduction=reductions[1], dual_clip=2.0)  # fmt: skip


@pytest.mark.parametrize("reductions", REDUCTIONS, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_micro_batches_add_up(impl, device, reductions, as_tensor):
    inputs = case((4, 0, 6, 3))
    reduction, candidate_reduction = reductions[0], reductions[1] or reductions[0]
    divisors = dict(
        sequence_mean=4, token_mean=13, old_prob_mean=inputs["old_candidate_logprobs"].exp().sum().item()
    )
    options = dict(reduction=reduction, candidate_reduction=candidate_reduction, impl=impl)
    whole = gradients(fused, inputs, device, **options)
    convert = torch.tensor if as_tensor else float
    options |= dict(token_denominator=convert(float(divisors[reduction])),
                    candidate_denominator=convert(float(divisors[candidate_reduction])))  # fmt: skip
    parts = []
    for first, last in ((0, 1), (1, 3), (3, 4)):
        cu = inputs["cu_seqlens"]
        rows = slice(int(cu[first]), int(cu[last]))
        part = {k: v if k in ("weight", "bias") else v[rows] for k, v in inputs.items() if k != "cu_seqlens"}
        parts.append(
            gradients(fused, {**part, "cu_seqlens": cu[first : last + 1] - cu[first]}, device, **options)
        )
    for i, theirs in enumerate(whole):
        mine = torch.cat([p[i] for p in parts]) if i == 3 else sum(p[i] for p in parts)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_hand_worked(impl, device):
    # One row, h = 1, z = log(1, 1, 2): p = 1/4, 1/4, 1/2. Token 2, old 1/4: rho = 2, A = 1 is clipped: loss
    # -1.28, no gradient. Candidates 0 (old 1/4, rho 1, A 2: -2) and 1 (old 1/2, rho 1/2, A -1: 0.8, clipped).
    # L_candidates = 1/4 * -2 + 1/2 * 0.8 = -0.1; d loss / d log p_0 = alpha * 1/4 * -2 = -0.25 at alpha 0.5;
    # d log p_0 / dz = (3/4, -1/4, -1/2), and dweight = dz * h.
    def f(*values):
        return torch.tensor(values, device=device)

    weight = f(1.0, 1.0, 2.0).log()[:, None].requires_grad_()
    out = linear_distrl_loss(
        f(1.0)[:, None], weight, f(2), f(0, 1, -1)[None], f(0.25).log(), f(0.25, 0.5, 0.0).log()[None],
        f(1.0), f(2.0, -1.0, math.nan)[None], f(0, 1).int(), alpha=0.5, impl=impl,
    )  # fmt: skip
    assert [x.item() for x in out[:3]] == pytest.approx([-1.28 + 0.5 * -0.1, -1.28, -0.1])
    out.loss.backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.25 * 3 / 4, 0.25 / 4, 0.25 / 2])
    expected = {
        "token_clip_fraction": (1, 1), "token_dual_clip_fraction": (0, 1), "token_kl": (-math.log(2), 1),
        "candidate_clip_fraction": (1, 2), "candidate_dual_clip_fraction": (0, 2),
        "candidate_kl": (0.5 * math.log(2), 2), "candidates_per_row": (2, 1), "candidate_mass": (0.75, 1),
    }  # fmt: skip
    assert tuple(out.metrics) == DISTRL_METRICS and set(DISTRL_METRICS) == set(expected)
    for name, pair in expected.items():
        assert [x.item() for x in out.metrics[name]] == pytest.approx(pair), name


@pytest.mark.parametrize("reductions", REDUCTIONS, ids=str)
def test_nothing_to_learn_from(impl, device, reductions):
    """No used element anywhere: zeros with gradients attached, never NaN."""
    inputs = case()
    inputs["candidate_ids"] = torch.full_like(inputs["candidate_ids"], -1)
    inputs["old_logprobs"] = torch.full_like(inputs["old_logprobs"], -math.inf)
    for name in ("advantages", "candidate_advantages", "old_candidate_logprobs"):
        inputs[name] = torch.full_like(inputs[name], math.nan if "adv" in name else -math.inf)
    got = gradients(
        fused, inputs, device, reduction=reductions[0], candidate_reduction=reductions[1], impl=impl
    )
    assert all((x == 0).all() for x in got)


def test_an_id_of_minus_one_is_unused_whatever_its_old_logprob(impl, device):
    inputs = case()
    inputs["token_ids"][0] = -1
    plain = dict(inputs, old_logprobs=inputs["old_logprobs"].index_fill(0, torch.tensor([0]), -math.inf))
    stray = inputs["old_candidate_logprobs"].masked_fill(inputs["candidate_ids"] < 0, -0.5)
    got = gradients(fused, dict(inputs, old_candidate_logprobs=stray), device, impl=impl)
    for mine, theirs in zip(got, gradients(fused, plain, device, impl=impl), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_underflowing_old_probability(impl, device):
    """pi_old = exp(-200) = 0 in fp32 meets rho = exp(200) = inf: no NaN."""
    inputs = case()
    inputs["old_candidate_logprobs"] = inputs["old_candidate_logprobs"].masked_fill(
        inputs["candidate_ids"] >= 0, -200
    )
    inputs["candidate_advantages"] = -torch.ones_like(inputs["candidate_advantages"])
    assert all(x.isfinite().all() for x in gradients(fused, inputs, device, impl=impl))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs(impl, device, dtype):
    """Loss in fp32; gradients in the inputs' dtype, tiny fp16 ones not lost before a loss scale of 2^16."""
    inputs = case()
    for name in ("hidden", "weight", "bias"):
        inputs[name] = inputs[name].to(dtype)
    moved = {k: v.to(device, copy=True) for k, v in inputs.items()}
    required = [moved[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    out = fused(moved, bias=moved["bias"], impl=impl, alpha=1e-3, token_denominator=1e6)
    found = torch.autograd.grad(2.0**16 * out.loss, required)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = gradients(composed, wide, alpha=1e-3, token_denominator=1e6)
    assert out.loss.dtype == torch.float32
    for mine, theirs in zip(found, exact[3:], strict=True):
        theirs = theirs * 2.0**16 / -1.7
        assert mine.dtype == dtype
        bound = torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(mine.float().cpu(), theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("reductions", REDUCTIONS, ids=str)
def test_gradcheck(reductions):
    inputs = case((2, 0, 3), K=2, D=3, V=6, dtype=torch.float64, drift=0.8)
    variables = [inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        changed = {**inputs, "hidden": hidden, "weight": weight}
        return fused(changed, bias=bias, softcap=5.0, temperature=0.8, dual_clip=1.7, alpha=0.6,
                     reduction=reductions[0], candidate_reduction=reductions[1]).loss  # fmt: skip

    torch.autograd.gradcheck(loss, variables)


@pytest.mark.parametrize("fault", ["candidates without pi_old", "row 0 for every row", "alpha twice"])
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    real = IMPLS[impl]

    def faulty(hidden, weight, bias, ids, batch, transform, objective, *rest):
        if fault == "candidates without pi_old":
            flat = torch.where(batch.old_candidate_logprobs > -math.inf, 0.0, -math.inf).to(hidden.dtype)
            batch = batch._replace(old_candidate_logprobs=flat)
        if fault == "row 0 for every row":
            batch = batch._replace(advantages=batch.advantages[:1].repeat(len(batch.advantages)))
        if fault == "alpha twice":
            objective = objective._replace(alpha=objective.alpha**2)
        return real.forward(hidden, weight, bias, ids, batch, transform, objective, *rest)

    check(case(), impl, device)
    monkeypatch.setitem(IMPLS, impl, real._replace(forward=faulty))
    with pytest.raises(AssertionError):
        check(case(), impl, device)
