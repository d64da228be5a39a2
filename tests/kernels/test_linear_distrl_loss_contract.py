"""linear_distrl_loss: what it refuses, what is differentiable and how often, compilation."""

import math

import pytest
import torch

from ipvrm_kernels import distrl_loss, linear_distrl_loss

OP = "linear_distrl_loss"
NAMES = ("hidden", "weight", "token_ids", "candidate_ids", "old_logprobs", "old_candidate_logprobs",
         "advantages", "candidate_advantages", "cu_seqlens")  # fmt: skip


def arguments(device="cpu"):
    """Four rows of two sequences, two candidates each, five tokens."""
    g = torch.Generator().manual_seed(0)
    values = (
        torch.randn(4, 3, generator=g), torch.randn(5, 3, generator=g),
        torch.tensor([0, 1, 2, 3]), torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 4]]),
        -torch.rand(4, generator=g), -torch.rand(4, 2, generator=g),
        torch.randn(4, generator=g), torch.randn(4, 2, generator=g), torch.tensor([0, 1, 4]).int(),
    )  # fmt: skip
    return {name: value.to(device) for name, value in zip(NAMES, values, strict=True)}


def call(changed, **options):
    return linear_distrl_loss(*(changed[name] for name in NAMES), **options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(token_ids=torch.zeros(4, 1).long()), {}, r"token_ids must be \(N,\) with N=4, got \(4, 1\)"),
        (dict(token_ids=torch.zeros(4)), {}, "token_ids must be int64 or int32, got torch.float32"),
        (dict(token_ids=torch.full((4,), 5)), {}, "token_ids must be below V=5"),
        (dict(candidate_ids=torch.zeros(4).long()), {}, r"candidate_ids must be \(N, K\) with N=4"),
        (dict(candidate_ids=torch.full((4, 2), 7)), {}, "candidate_ids must be below V=5.* up to 7"),
        (dict(old_logprobs=torch.zeros(3)), {}, r"old_logprobs must be .* of shape \(4,\), got \(3,\)"),
        (dict(advantages=torch.zeros(4).long()), {}, r"advantages must be floating .*\(4,\) torch.int64"),
        (dict(old_candidate_logprobs=torch.zeros(4, 3)), {}, r"old_candidate_logprobs .* got \(4, 3\)"),
        (dict(candidate_advantages=torch.zeros(4)), {}, r"candidate_advantages must be .* shape \(4, 2\)"),
        (dict(advantages=torch.zeros(4, device="meta")), {}, "advantages is on meta, the others on cpu"),
        (dict(cu_seqlens=torch.tensor([0, 1, 4])), {}, r"cu_seqlens must be \(B\+1,\) int32"),
        (dict(cu_seqlens=torch.tensor([0, 3]).int()), {}, "cu_seqlens must rise from 0 to N=4"),
        (dict(weight=torch.zeros(0, 3)), {}, r"weight is empty, shape \(0, 3\)"),
        ({}, dict(alpha=math.inf), "alpha must be finite, got inf"),
        ({}, dict(reduction="mean"), "reduction must be one of sequence_mean, token_mean, got 'mean'"),
        ({}, dict(reduction="old_prob_mean"), "reduction must be one of sequence_mean, token_mean, got"),
        ({}, dict(candidate_reduction="sum"), "candidate_reduction must be None or one of .*, got 'sum'"),
        ({}, dict(clip_low=-0.1), r"clip_low must lie in \[0, 1\], got -0.1"),
        ({}, dict(candidate_clip_low=1.5), r"candidate_clip_low must lie in \[0, 1\], got 1.5"),
        ({}, dict(candidate_clip_high=-1.0), "candidate_clip_high must be finite and >= 0, got -1.0"),
        ({}, dict(dual_clip=0.5), "dual_clip must be None or finite and > 1, got 0.5"),
        ({}, dict(token_denominator=0.0), "token_denominator must be finite and > 0, got 0.0"),
        ({}, dict(token_denominator=torch.tensor(0.0)), "token_denominator must be finite and > 0, got 0.0"),
        ({}, dict(token_denominator=torch.ones(1)), r"token_denominator must be a number or 0-d.*\(1,\)"),
        ({}, dict(candidate_denominator=-1.0), "candidate_denominator must be finite and >= 0, got -1.0"),
        ({}, dict(candidate_denominator=math.nan), "candidate_denominator must be finite and >= 0, got nan"),
        ({}, dict(candidate_denominator=0.0), "candidate_denominator must be > 0 where there are candidates"),
        ({}, dict(softcap=-1.0), "softcap must be finite and > 0, got -1.0"),
        ({}, dict(max_workspace_bytes=1, impl="torch"), "max_workspace_bytes must be at least 320"),
        ({}, dict(impl="blas"), "impl='blas' cannot run here"),
    ],
)  # fmt: skip
def test_errors(change, options, message):
    with pytest.raises(ValueError, match="linear_distrl_loss: " + message):
        call(arguments() | change, **options)


def test_unchecked_edges_stay_in_bounds(impl, device, unchecked):
    """On a GPU nobody checks the edges: the loss is distrl_loss's, whose rows weigh what they say."""
    buffers, tokens, cu, _, guard = unchecked
    N, K, V = len(tokens), 2, 20
    hidden, weight = (torch.randn(rows, 8, device=device, requires_grad=True) for rows in (N, V))
    ids = torch.randint(0, V, (N, 1 + K), device=device)
    old = torch.full((N, K), -2.0, device=device)
    rest = (-2 * tokens, old, tokens, tokens[:, None].expand(N, K).contiguous(), cu)
    out = linear_distrl_loss(hidden, weight, ids[:, 0], ids[:, 1:], *rest, impl=impl)
    got = torch.autograd.grad(out.loss, (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight.T, 1).gather(1, ids)
    loss = distrl_loss(logprobs[:, 0], logprobs[:, 1:], *rest, impl=impl).loss
    expected = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for mine, theirs in zip((out.loss, *got), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))
    assert buffers
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()


def test_zero_denominator_without_candidates(impl, device):
    """A micro-batch of a batch in which no candidate exists: pi_old sums to 0, the branch is 0."""
    inputs = arguments(device)
    inputs["candidate_ids"] = torch.full_like(inputs["candidate_ids"], -1)
    for zero in (0.0, torch.tensor(0.0)):
        out = call(inputs, candidate_reduction="old_prob_mean", candidate_denominator=zero, impl=impl)
        assert out.candidate_loss.item() == 0.0 and out.loss.isfinite()


def test_only_the_loss_is_differentiable(impl, device):
    inputs = arguments(device)
    for name in (
        "hidden",
        "weight",
        "old_logprobs",
        "old_candidate_logprobs",
        "advantages",
        "candidate_advantages",
    ):
        inputs[name].requires_grad_()
    out = call(inputs, impl=impl)
    assert (
        out.loss.requires_grad and not out.token_loss.requires_grad and not out.candidate_loss.requires_grad
    )
    assert not any(x.requires_grad for pair in out.metrics.values() for x in pair)
    out.loss.backward()
    assert inputs["hidden"].grad is not None and inputs["weight"].grad is not None
    assert all(inputs[name].grad is None for name in NAMES[4:8])


def test_without_gradients(impl, device):
    inputs = arguments(device)
    plain = call(inputs, impl=impl)
    inputs["hidden"].requires_grad_()
    with torch.no_grad():
        quiet = call(inputs, impl=impl)
    assert not plain.loss.requires_grad and not quiet.loss.requires_grad
    assert plain.loss == quiet.loss == call(inputs, impl=impl).loss


def trained(device):
    inputs = arguments(device)
    return inputs, [inputs[name].requires_grad_() for name in ("hidden", "weight")]


def test_a_retained_graph_scales_copies_and_the_last_backward_in_place(impl, device):
    """Any number of backwards, each scaled once, and none reaches into a .grad that autograd took over."""
    inputs, variables = trained(device)
    expected = torch.autograd.grad(call(inputs, impl=impl).loss, variables)
    loss = call(inputs, impl=impl).loss
    for number, factor in enumerate((3.0, -2.0, 0.5)):
        (factor * loss).backward(retain_graph=number < 2)
        total = (3.0, 1.0, 1.5)[number]
        for x, gradient in zip(variables, expected, strict=True):
            torch.testing.assert_close(x.grad, total * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_backward_reads_no_weight_and_the_graph_holds_it(impl, device):
    """What integrations/README.md says of a weight that was gathered for the op."""
    inputs, variables = trained(device)
    expected = torch.autograd.grad(call(inputs, impl=impl).loss, variables)
    gathered, kept = inputs["weight"] * 1, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x)
    with hooks:
        loss = call({**inputs, "weight": gathered}, impl=impl).loss
    assert gathered.data_ptr() in kept
    gathered.data.fill_(math.nan)  # behind autograd's back
    for found, gradient in zip(torch.autograd.grad(loss, variables), expected, strict=True):
        assert torch.equal(found, gradient)


def test_create_graph_scales_copies(impl, device):
    """Its own derivative is refused."""
    inputs, variables = trained(device)
    loss, three = call(inputs, impl=impl).loss, torch.tensor(3.0, device=device)
    once, again = (torch.autograd.grad(loss, variables, three, create_graph=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="linear_distrl_loss: double backward is not supported"):
        once[0].sum().backward(retain_graph=True)
    (freed, *_) = torch.autograd.grad(
        call(inputs, impl=impl).loss, variables, create_graph=True, retain_graph=False
    )
    with pytest.raises(RuntimeError, match="linear_distrl_loss: double backward is not supported"):
        freed.sum().backward()
    for a, b, c in zip(once, again, torch.autograd.grad(loss, variables), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.detach(), 3 * c)


@pytest.mark.parametrize("form", ["is_grads_batched", "vmap"])
def test_batched_upstream_gradients(impl, device, form):
    """Each scales its own copy; with create_graph they are refused in words."""
    inputs, variables = trained(device)
    expected = torch.autograd.grad(call(inputs, impl=impl).loss, variables)
    factors = torch.tensor([3.0, -2.0], device=device)

    def batched(loss, **options):
        if form == "is_grads_batched":
            return torch.autograd.grad(loss, variables, factors, is_grads_batched=True, **options)
        return torch.func.vmap(lambda x: torch.autograd.grad(loss, variables, x, **options))(factors)

    for mine, once in zip(batched(call(inputs, impl=impl).loss), expected, strict=True):
        torch.testing.assert_close(mine, factors.view(2, 1, 1) * once)
    with pytest.raises(RuntimeError, match="linear_distrl_loss: batched gradients .* not supported"):
        batched(call(inputs, impl=impl).loss, create_graph=True)


def test_autocast(impl, device):
    """Operands are rounded to bf16; the loss and the gradients of fp32 inputs are fp32."""
    inputs = arguments(device)
    inputs["hidden"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = call(inputs, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"])
    rounded = {
        **inputs,
        "hidden": inputs["hidden"].detach().bfloat16(),
        "weight": inputs["weight"].bfloat16(),
    }
    torch.testing.assert_close(loss, call(rounded, impl=impl).loss)
    assert loss.dtype == gradient.dtype == torch.float32


@pytest.mark.slow
def test_opcheck(impl, device):
    inputs, variables = trained(device)
    bias = torch.randn(5, device=device, requires_grad=True)
    numbers = [x for number in (0.1, 0.2, 0.28, 0.2, 0.28, 3.0) for x in (number, None)]
    tail = (1.0, None, 4.0, 0.0, torch.tensor(0.7), torch.float32, *numbers, "sequence_mean", "old_prob_mean")
    divisor = torch.tensor(2.0, device=device)
    for given_bias, divisors in ((bias, (None, None)), (None, (divisor, divisor))):
        needs = [True, True, given_bias is not None]
        fixed = [inputs[name] for name in NAMES[2:]]
        flat = (*variables, given_bias, *fixed, *divisors, *tail, needs, None, False, impl)
        torch.library.opcheck(torch.ops.ipvrm.linear_distrl_loss, flat)


@pytest.mark.slow
def test_compile(impl, device):
    inputs, variables = trained(device)
    bias = torch.randn(5, device=device, requires_grad=True)

    def total(hidden, weight, bias):
        out = call(
            {**inputs, "hidden": hidden, "weight": weight}, bias=bias, token_denominator=2.0, impl=impl
        )
        kl, count = out.metrics["token_kl"]
        return out.loss * 2, kl / count

    compiled = torch.compile(total, fullgraph=True)
    mine, theirs = (f(*variables, bias) for f in (compiled, total))
    torch.testing.assert_close(mine, theirs)
    once, again = (torch.autograd.grad(mine[0], (*variables, bias), retain_graph=r) for r in (True, False))
    torch.testing.assert_close(once, again)  # compiled, the gradients are scaled into copies
    torch.testing.assert_close(once, torch.autograd.grad(theirs[0], (*variables, bias)))
