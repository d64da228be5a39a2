"""linear_candidates against a Python scan of every row: exact sets, order, ties, thresholds, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_kernels import backend, linear_candidates, linear_logprobs
from ipvrm_kernels.linear_candidates import IMPLS, num_slots

OP = "linear_candidates"
OPTIONS = dict(bias=True, logit_scale=1.7, softcap=4.0, temperature=0.6)
PAIRS = [dict(pair) for pair in itertools.combinations(OPTIONS.items(), 2)]


def case(N=30, D=16, V=131, seed=0, level=6.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g) * level
    return (hidden.to(dtype), (torch.randn(V, D, generator=g) / D**0.5).to(dtype))


def naive_log_p(hidden, weight, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """log_softmax of materialised logits in fp64."""
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, dim=-1)


def check_sets(out, log_p, min_prob, K, tolerance=1e-5):
    """Every id clearly above the threshold is there, none clearly below it, best first; then padding."""
    low = -math.inf if min_prob is None else math.log(min_prob)
    assert out.ids.shape == out.logprobs.shape == (len(log_p), K)
    assert out.ids.dtype == out.counts.dtype == torch.int64
    for ids, values, count, truth in zip(
        out.ids.tolist(), out.logprobs, out.counts.tolist(), log_p, strict=True
    ):
        used, values = ids[:count], values[:count].double().cpu()
        assert ids[count:] == [-1] * (K - count) and len(set(used)) == count and -1 not in used
        torch.testing.assert_close(values, truth[used], rtol=0, atol=tolerance)
        assert (values.diff() <= 0).all() and (values <= 0).all()
        order = torch.sort(truth, descending=True, stable=True)
        must = [
            i
            for v, i in zip(order.values.tolist(), order.indices.tolist(), strict=True)
            if v > low + tolerance
        ]
        may = {i for i, v in enumerate(truth.tolist()) if v >= low - tolerance}
        assert set(used) <= may
        if count < K:
            assert set(must) <= set(used)
        else:  # full: nothing clearly better was left out
            assert all(v <= values[-1] + tolerance for i, v in enumerate(truth.tolist()) if i not in used)
    assert (out.logprobs[out.ids < 0] == -math.inf).all()


def check(impl, device, hidden, weight, *, min_prob=0.1, top_k=None, **options):
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = linear_candidates(
        hidden.to(device), weight.to(device), min_prob=min_prob, top_k=top_k, impl=impl, **on_device
    )
    truth = naive_log_p(hidden, weight, **options)
    scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
    tolerance = 8 * torch.finfo(torch.float32).eps * scale
    check_sets(out, truth, min_prob, num_slots(OP, min_prob, top_k), tolerance)
    return out


@pytest.mark.parametrize("N", [0, 1, 63, 1000])
@pytest.mark.parametrize("V", [1, 5, 257, 1030])
def test_shapes(impl, device, N, V, poisoned):
    N = min(N, 150) if backend.INTERPRETED else N  # slow; two blocks of rows show as much
    check(impl, device, *case(N=N, V=V))


@pytest.mark.parametrize(
    "rule",
    [(0.1, None), (1 / 128, None), (1.0, None), (0.5, None), (0.1, 3), (0.1, 1), (0.02, 200), (None, 1),
     (None, 7), (None, 200)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("level", [0.5, 6.0, 40.0])
def test_rules(impl, device, rule, level):
    check(impl, device, *case(level=level), min_prob=rule[0], top_k=rule[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_never_round_logits(impl, device, dtype):
    check(impl, device, *case(level=15.0, dtype=dtype), min_prob=0.02)


def test_transform(impl, device):
    hidden, weight = case()
    bias = torch.randn(131)
    check(impl, device, hidden, weight, bias=bias, logit_scale=1.5, softcap=5.0, temperature=0.8)


@pytest.mark.parametrize("options", PAIRS, ids=lambda o: "-".join(o))
def test_option_pairs(impl, device, options):
    hidden, weight = case(level=3.0)
    options = dict(options, bias=torch.randn(131)) if "bias" in options else options
    check(impl, device, hidden, weight, min_prob=0.02, **options)


@pytest.mark.parametrize("rule", [(0.02, None), (None, 12)], ids=str)
@pytest.mark.parametrize("level", [0.01, 6.0], ids=["flat", "peaked"])
def test_all_negative_logits(impl, device, rule, level):
    """A padded logit of 0, or a maximum that began at 0, would hold all the probability."""
    bias = torch.full((131,), -60.0)
    check(impl, device, *case(level=level), min_prob=rule[0], top_k=rule[1], bias=bias)


def test_non_contiguous_inputs(impl, device):
    """A strided hidden state and bias, a transposed weight, sampled ids with a stride."""
    hidden, weight = (x.to(device) for x in case())
    sampled, bias = torch.randint(-1, 131, (30,), device=device), torch.randn(131, device=device)
    spaced = [torch.stack([torch.zeros_like(x), x], -1)[..., 1] for x in (hidden, sampled, bias)]
    transposed = weight.T.contiguous().T
    assert not any(x.is_contiguous() for x in (*spaced, transposed))
    out = linear_candidates(spaced[0], transposed, sampled=spaced[1], bias=spaced[2], impl=impl)
    plain = linear_candidates(hidden, weight, sampled=sampled, bias=bias, impl=impl)
    for mine, theirs in ((out.lse, plain.lse), (out.sampled_logprobs, plain.sampled_logprobs)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # another layout, another matmul kernel
    check_sets(out, naive_log_p(hidden.cpu(), weight.cpu(), bias.cpu()), 0.1, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_operands_only(impl, device, dtype):
    """The sets, log-probs and lse are fp32's of rounded hidden and weight, not those of rounded logits."""
    hidden, weight = case(level=15.0)
    with torch.autocast(device, dtype=dtype):
        out = linear_candidates(hidden.to(device), weight.to(device), min_prob=0.02, impl=impl)
    assert out.logprobs.dtype == out.lse.dtype == torch.float32
    truth = naive_log_p(hidden.to(dtype), weight.to(dtype))
    tolerance = 8 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    check_sets(out, truth, 0.02, 50, tolerance)
    lse = (hidden.to(dtype).double() @ weight.to(dtype).double().T).logsumexp(1)
    torch.testing.assert_close(out.lse.double().cpu(), lse, rtol=0, atol=tolerance)
    z = hidden.to(dtype) @ weight.to(dtype).T
    assert (out.lse.cpu() - z.float().logsumexp(1)).abs().max() > 1e-3
    assert (out.lse.cpu() - (hidden @ weight.T).logsumexp(1)).abs().max() > 1e-3


def test_hand_worked(impl, device):
    # h = 1, z = log(1, 5, 2, 2): p = .1, .5, .2, .2; {p >= .15} is 1, then the tied 2 and 3 by lower id
    weight = torch.tensor([[1.0], [5.0], [2.0], [2.0]], device=device).log()
    one = torch.ones(1, 1, device=device)
    out = linear_candidates(one, weight, min_prob=0.15, sampled=torch.tensor([0], device=device),
                            return_entropy=True, impl=impl)  # fmt: skip
    assert out.ids.tolist() == [[1, 2, 3, -1, -1, -1]]  # floor(1 / 0.15) = 6 slots
    assert out.counts.tolist() == [3]
    assert out.logprobs.exp()[0].tolist() == pytest.approx([0.5, 0.2, 0.2, 0, 0, 0])
    assert out.sampled_logprobs.tolist() == pytest.approx([math.log(0.1)])
    assert out.lse.tolist() == pytest.approx([math.log(10)])
    assert out.entropy.tolist() == pytest.approx(
        [-0.5 * math.log(0.5) - 0.4 * math.log(0.2) - 0.1 * math.log(0.1)]
    )
    top = linear_candidates(one, weight, min_prob=None, top_k=2, impl=impl)
    assert top.ids.tolist() == [[1, 2]] and top.entropy is None and top.sampled_logprobs is None


def test_slots():
    """K is a static rule: 1/min_prob rounded down, safe against 1/0.1 = 9.999..., or top_k."""
    assert [num_slots(OP, p, None) for p in (1.0, 0.5, 0.3, 0.1, 1 / 3, 1 / 49, 1 / 128)] == [
        1,
        2,
        3,
        10,
        3,
        49,
        128,
    ]
    assert num_slots(OP, 0.1, 4) == 4 and num_slots(OP, None, 300) == 300


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_exact_ties_at_the_threshold(impl, device, count):
    """`count` tokens of p = 1/count: with min_prob just below, all of them by rising id; just above, none."""
    weight = torch.full((64, 1), -50.0)
    ids = sorted(torch.randperm(64)[:count].tolist())
    weight[ids] = 3.0
    one, weight = torch.ones(1, 1, device=device), weight.to(device)
    below = linear_candidates(one, weight, min_prob=(1 - 1e-4) / count, impl=impl)
    assert below.ids[0, :count].tolist() == ids and below.counts.item() == count
    if count > 1:
        above = linear_candidates(one, weight, min_prob=(1 + 1e-4) / count, impl=impl)
        assert above.counts.item() == 0 and (above.ids == -1).all()
    assert linear_candidates(one, weight, min_prob=None, top_k=1, impl=impl).ids.item() == ids[0]


def test_extreme_logits(impl, device):
    hidden, weight = case(level=1e4)
    out = check(impl, device, hidden, weight)
    assert (out.logprobs[:, 0] <= 0).all() and out.lse.isfinite().all()


def test_agrees_with_linear_logprobs(impl, device):
    """The same value in every pass, so that the first PPO ratio is 1: bitwise in the reference, else 1e-5."""
    hidden, weight = (x.to(device) for x in case())
    sampled = torch.randint(-1, 131, (30,), device=device)
    out = linear_candidates(hidden, weight, sampled=sampled, return_entropy=True, impl=impl)
    ids = torch.cat([sampled[:, None], out.ids], 1)
    again = linear_logprobs(hidden, weight, ids, return_entropy=True, impl=impl)
    atol = 0 if impl == "torch" else 1e-5
    both = torch.cat([out.sampled_logprobs[:, None], out.logprobs], 1)
    torch.testing.assert_close(both, again.logprobs, rtol=0, atol=atol)
    torch.testing.assert_close(out.lse, again.lse, rtol=0, atol=atol)
    torch.testing.assert_close(out.entropy, again.entropy, rtol=0, atol=atol)


def test_masked_tokens_are_no_candidates(impl, device):
    bias = torch.zeros(5)
    bias[[0, 3]] = -math.inf
    out = linear_candidates(torch.zeros(2, 3, device=device), torch.zeros(5, 3, device=device), min_prob=None,
                            top_k=5, bias=bias.to(device), impl=impl)  # fmt: skip
    assert out.ids.tolist() == [[1, 2, 4, -1, -1]] * 2 and out.counts.tolist() == [3, 3]


def test_no_gradient(impl, device):
    hidden, weight = (x.to(device).requires_grad_() for x in case())
    out = linear_candidates(
        hidden, weight, sampled=torch.zeros(30, device=device).long(), return_entropy=True, impl=impl
    )
    assert not any(x.requires_grad for x in out)


def test_fp64():
    hidden, weight = case(dtype=torch.float64)
    out = linear_candidates(hidden, weight)
    assert out.logprobs.dtype == out.lse.dtype == torch.float64
    check_sets(out, naive_log_p(hidden, weight), 0.1, 10, 1e-13)


@pytest.mark.parametrize("fault", ["dropped tail mask", "threshold halved", "last candidate lost"])
def test_seeded_faults_are_caught(impl, device, fault, monkeypatch):
    real = IMPLS[impl]

    def faulty(hidden, weight, bias, sampled, transform, min_prob, *rest):
        if fault == "dropped tail mask":
            weight = torch.nn.functional.pad(weight, (0, 0, 0, 13))
        out = list(
            real.forward(hidden, weight, bias, sampled, transform, min_prob / (1 + (fault[0] == "t")), *rest)
        )
        if fault == "last candidate lost":
            last = (out[2] - 1).clamp(min=0)[:, None]
            out[0], out[1] = out[0].scatter(1, last, -1), out[1].scatter(1, last, -math.inf)
            out[2] = (out[2] - 1).clamp(min=0)
        return tuple(out)

    hidden, weight = case(level=3.0)
    check(impl, device, hidden, weight)
    monkeypatch.setitem(IMPLS, impl, real._replace(forward=faulty))
    with pytest.raises(AssertionError):
        check(impl, device, hidden, weight)


@pytest.mark.slow
@settings(max_examples=5 if backend.INTERPRETED else 30, deadline=None)  # the interpreter is slow
@given(
    N=st.integers(0, 20), V=st.integers(1, 200), level=st.floats(0.01, 30), seed=st.integers(0, 2**31),
    min_prob=st.none() | st.floats(1 / 128, 1), top_k=st.none() | st.integers(1, 140),
)  # fmt: skip
def test_any_shape(impl, device, N, V, level, seed, min_prob, top_k):
    if min_prob is not None or top_k is not None:
        check(impl, device, *case(N, 8, V, seed, level), min_prob=min_prob, top_k=top_k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(min_prob=None), "give min_prob, top_k or both, got neither"),
        (dict(min_prob=0.007), r"min_prob must lie in \[1/128, 1\], got 0.007; for a fixed number of tokens"),
        (dict(min_prob=1.5), r"min_prob must lie in \[1/128, 1\], got 1.5"),
        (dict(min_prob=math.nan), r"min_prob must lie in \[1/128, 1\], got nan"),
        (dict(top_k=0), "top_k must be an integer in 1 .. 1048576, got 0"),
        (dict(top_k=2.5), "top_k must be an integer in 1 .. 1048576, got 2.5"),
        (dict(top_k=True), "top_k must be an integer in 1 .. 1048576, got True"),
        (dict(sampled=torch.zeros(4, 1).long()), r"sampled must be \(N,\) with N=4, got \(4, 1\)"),
        (dict(sampled=torch.zeros(4)), "sampled must be int64 or int32, got torch.float32"),
        (dict(sampled=torch.full((4,), 5)), "sampled must be below V=5"),
        (dict(weight=torch.zeros(0, 3)), r"weight is empty, shape \(0, 3\)"),
        (dict(temperature=0.0), "temperature must be finite and > 0, got 0.0"),
        (dict(impl="blas"), "impl='blas' cannot run here"),
    ],
)
def test_errors(change, message):
    arguments = dict(hidden=torch.zeros(4, 3), weight=torch.zeros(5, 3)) | change
    with pytest.raises(ValueError, match="linear_candidates: " + message):
        linear_candidates(arguments.pop("hidden"), arguments.pop("weight"), **arguments)


@pytest.mark.slow
def test_opcheck(impl, device):
    hidden, weight = (x.to(device) for x in case(N=6, V=20))
    sampled = torch.randint(-1, 20, (6,), device=device)
    for given_sampled, min_prob, K in ((sampled, 0.1, 10), (None, None, 30)):
        arguments = (hidden, weight, None, given_sampled, 1.0, None, 4.0, 0.7, None, torch.float32,
                     min_prob, None, K, given_sampled is not None, False, impl)  # fmt: skip
        torch.library.opcheck(torch.ops.ipvrm.linear_candidates, arguments)


def test_compile(impl, device):
    hidden, weight = (x.to(device) for x in case(N=6, V=20))
    sampled = torch.randint(-1, 20, (6,), device=device)

    def function(hidden, weight):
        return linear_candidates(hidden, weight, sampled=sampled, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight)[:4], function(hidden, weight)[:4])
