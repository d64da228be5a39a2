"""Registered ops skip the dispatcher only where nobody but autograd listens to it."""

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ipvrm_kernels import prefix_value_loss, prefix_values, segment_scan

X, CU, OUTCOME = (
    torch.linspace(-1, 1, 7),
    torch.tensor([0, 3, 7], dtype=torch.int32),
    torch.tensor([1.0, 0.0]),
)
CALLS = {
    "segment_scan": lambda x: segment_scan(x, CU),
    "prefix_values": lambda x: prefix_values(x, CU).prob,
    "prefix_value_loss": lambda x: prefix_value_loss(x, CU, OUTCOME),
}


@pytest.fixture(params=CALLS, ids=str)
def name(request):
    return request.param


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dispatch_mode_sees_the_op(name, requires_grad):
    x = X.clone().requires_grad_(requires_grad)
    with Seen() as seen:
        CALLS[name](x)
    assert f"ipvrm::{name}" in seen.names


def test_fake_tensors_stay_fake(name):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(X)
        out = CALLS[name](x)
    assert type(out).__name__ == "FakeTensor" and out.shape == CALLS[name](X).shape


def test_a_trace_holds_the_op(name):
    graph = make_fx(CALLS[name])(X).graph
    assert any(str(node.target) == f"ipvrm.{name}.default" for node in graph.nodes)


def test_the_shortcut_gives_the_op_s_results(name):
    """In bits, values and gradients; a subclass of Tensor goes by the dispatcher and agrees."""

    class Marked(torch.Tensor):
        pass

    def both(x):
        out = CALLS[name](x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    plain = both(X.clone().requires_grad_())
    with Seen():
        dispatched = both(X.clone().requires_grad_())
    marked = both(X.clone().as_subclass(Marked).requires_grad_())
    for mine, theirs, others in zip(plain, dispatched, marked, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, others)
        assert type(others) is Marked


def test_per_sample_gradients(name):
    """torch.func and is_grads_batched, whose tensors only the dispatcher knows how to take apart."""
    x = X.clone().requires_grad_()
    out = CALLS[name](x)
    upstream = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in upstream]
    torch.testing.assert_close(batched, torch.stack(each))


def test_a_lazily_negated_tensor_is_not_read_as_it_lies(name):
    complex_pairs = torch.stack([torch.zeros_like(X), X], 1)
    negated = torch.view_as_complex(complex_pairs).conj().imag  # -X, and only a bit says so
    assert negated.is_neg()
    torch.testing.assert_close(CALLS[name](negated), CALLS[name](-X))
    torch.testing.assert_close(CALLS[name](torch._neg_view(X)), CALLS[name](-X))


def test_checkpoints_and_saved_tensor_hooks_see_what_is_saved(name):
    def gradient(call):
        x = X.clone().requires_grad_()
        return torch.autograd.grad(call(x).sum(), x)[0]

    expected, packed = gradient(CALLS[name]), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = gradient(CALLS[name])
    again = gradient(lambda x: torch.utils.checkpoint.checkpoint(CALLS[name], x, use_reentrant=False))
    assert torch.equal(hooked, expected) and torch.equal(again, expected) and packed


def test_without_autograd_the_function_itself_runs(name, monkeypatch):
    op = getattr(torch.ops.ipvrm, name).default
    calls = []
    monkeypatch.setattr(type(op), "__call__", lambda self, *a, **k: calls.append(str(self)))
    CALLS[name](X)
    CALLS[name](X.clone().requires_grad_())
    assert not calls
