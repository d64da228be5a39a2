"""linear_logprobs: what it refuses, how often it differentiates, autocast, compilation."""

import math

import pytest
import torch

from ipvrm_kernels import linear_logprobs
from ipvrm_kernels.head.blocks import WORKSPACE
from ipvrm_kernels.linear_logprobs import FROZEN, IMPLS, TRAINED

OP = "linear_logprobs"
H, W, I = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)  # noqa: E741


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.zeros(2, 2, 3)), r"ids must be \(B, T\) or .* \(2, 2\), got \(4,\)"),
        (dict(weight=torch.zeros(5, 2)), r"and weight \(V, D\), got \(4, 3\) and \(5, 2\)"),
        (dict(hidden=H.long()), "hidden must be fp32, bf16, fp16 or fp64, got torch.int64"),
        (dict(weight=W.double()), "weight must be of hidden's dtype torch.float32 or an fp32 master"),
        (dict(hidden=H.double()), "weight must be of hidden's dtype torch.float64"),
        (dict(weight=W.half()), "got torch.float16; cast one of them"),
        (dict(weight=torch.zeros(0)), r"weight is empty, shape \(0,\); gather a sharded parameter"),
        (dict(bias=torch.zeros(4)), r"bias must be \(V,\) with V=5, got \(4,\)"),
        (dict(bias=torch.zeros(5).double()), "bias must be of weight's dtype torch.float32 or fp32, got"),
        (dict(weight=W.to("meta")), "weight is on meta, hidden on cpu"),
        (dict(ids=I.to("meta")), "ids is on meta, hidden on cpu"),
        (dict(ids=I.float()), "ids must be int64 or int32, got torch.float32"),
        (dict(ids=I[:3]), r"ids must be \(N,\) or \(N, K\) with N=4, got \(3,\)"),
        (dict(ids=I[:, None, None]), r"got \(4, 1, 1\)"),
        (dict(ids=I + 5), "ids must be below V=5, negative for no token, got values up to 5"),
        (dict(logit_scale=math.nan), "logit_scale must be finite, got nan"),
        (dict(softcap=0.0), "softcap must be finite and > 0, got 0.0"),
        (dict(temperature=-1.0), "temperature must be finite and > 0, got -1.0"),
        (dict(max_workspace_bytes=0), "max_workspace_bytes must be None or in 1 .. .*, got 0"),
        (dict(max_workspace_bytes=99, impl="torch"), "must be at least 320 for impl='torch'"),
        (dict(impl="blas"), "linear_logprobs: impl='blas' cannot run here: no such implementation"),
    ],
)  # fmt: skip
def test_errors(change, message):
    arguments = dict(hidden=H, weight=W, ids=I) | change
    with pytest.raises(ValueError, match=message) as caught:
        linear_logprobs(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("ids"), **arguments)
    assert str(caught.value).startswith("linear_logprobs: ")


def test_dtensor_is_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import init_device_mesh

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor

        sharded = distribute_tensor(W, init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ValueError, match="weight must be a plain tensor, got a DTensor; of a vocabulary-parallel"
        ):
            linear_logprobs(H, sharded, I)
    finally:
        destroy_process_group()


def test_backward_twice(impl, device):
    hidden = torch.randn(4, 3, device=device, requires_grad=True)
    weight = torch.randn(5, 3, device=device, requires_grad=True)
    lse = linear_logprobs(hidden, weight, I.to(device), impl=impl).lse.sum()
    first, second = (torch.autograd.grad(lse, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(lse, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: double backward is not supported"):
        gradient.sum().backward()


def test_autocast_rounds_operands_only(impl, device):
    hidden = (3 * torch.randn(40, 24)).to(device).requires_grad_()
    weight = torch.randn(131, 24).to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        lse = linear_logprobs(hidden, weight, torch.zeros(40, device=device).long(), impl=impl).lse
        gradients = torch.autograd.grad(lse.sum(), (hidden, weight))
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    torch.testing.assert_close(lse, (rounded[0].float() @ rounded[1].float().T).logsumexp(1))
    assert (lse - (rounded[0] @ rounded[1].T).float().logsumexp(1)).abs().max() > 1e-3
    assert {d.dtype for d in gradients} == {torch.float32}


@pytest.mark.slow
def test_opcheck(impl, device):
    hidden = torch.randn(6, 5, device=device, requires_grad=True)
    weight = torch.randn(11, 5, device=device, requires_grad=True)
    bias = torch.randn(11, device=device, requires_grad=True)
    ids = torch.randint(-1, 11, (6, 3), device=device)
    trained, frozen = (weight, bias), (weight.detach(), None)
    saving = WORKSPACE + 4 * 6 * 11  # z of all columns, where an implementation saves any
    for head, follows, limit in (
        (trained, TRAINED, None),
        (trained, TRAINED, saving),
        (frozen, FROZEN, None),
    ):
        numbers = (1.0, None, 4.0, 0.7, None, torch.float32, True, follows, limit, False, True)
        arguments = (hidden, *head, ids, *numbers, impl)
        torch.library.opcheck(torch.ops.ipvrm.linear_logprobs, arguments)
    assert IMPLS["cpp"].saved(hidden, weight, ids, torch.float32, TRAINED, saving, True)[1] == (66,)


@pytest.mark.slow
def test_compile(impl, device):
    variables = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 5), (11, 5), (11,))]
    ids = torch.randint(-1, 11, (6,), device=device)

    def loss(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl)
        return (torch.where(ids >= 0, out.logprobs, 0.0) + 2 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)
    mine, theirs = (torch.autograd.grad(f(*variables), variables) for f in (compiled, loss))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("fill_value", [-math.inf, 0.0])
def test_any_negative_id_is_no_token(impl, device, fill_value):
    """-1, HF's -100 and the least int64: the log-prob asked for, no gradient, the other rows as ever."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(33, 8, generator=g)
    ids = torch.tensor([[3, 5], [-1, 7], [-100, -1], [-(2**63), 32], [0, -2], [9, 9]])
    results = []
    for given in (ids, ids.clamp(min=-1)):
        leaves = [x.clone().to(device).requires_grad_() for x in (hidden, weight)]
        out = linear_logprobs(*leaves, given.to(device), fill_value=fill_value, impl=impl).logprobs
        kept = torch.where(ids.to(device) >= 0, out, 0.0)
        results.append((out.detach().cpu(), *torch.autograd.grad(kept.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool((results[0][0][ids < 0] == fill_value).all())
    assert bool((results[0][0][ids >= 0] < 0).all()) and not results[0][1][2].any()
    if fill_value == 0.0:
        leaves = [x.clone().to(device).requires_grad_() for x in (hidden, weight)]
        filled = linear_logprobs(*leaves, ids.to(device), fill_value=0.0, impl=impl).logprobs.sum()
        assert bool(filled.isfinite())
        for mine, theirs in zip(torch.autograd.grad(filled, leaves), results[0][1:], strict=True):
            torch.testing.assert_close(mine, theirs)
