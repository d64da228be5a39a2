"""Registered ops skip the dispatcher only where nobody but autograd listens to it."""

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ipvrm_kernels
from ipvrm_kernels import (
    clipped_surrogate,
    distrl_loss,
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    linear_logprobs_partial,
    prefix_value_loss,
    prefix_values,
    segment_scan,
)
from ipvrm_kernels.registration import register

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
    graph = make_fx(lambda x: CALLS[name](x))(X).graph  # of one input, whatever options the op has
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


IDS, OLD = torch.tensor([0, 3, 2, -1, 1, 0, 2]), torch.full((7,), -1.5)
HEAD = torch.linspace(-1, 1, 12).sin().view(4, 3)
DOUBLE = {  # every op from x (7,), twice differentiable only where it says so
    "linear_logprobs": lambda x: linear_logprobs(x[:, None] * HEAD[0], HEAD, IDS).lse,
    "linear_logprobs_partial": lambda x: (
        linear_logprobs_partial(x[:, None] * HEAD[0], HEAD, IDS, vocab_start=0).sumexp
    ),
    "linear_candidates": lambda x: linear_candidates(x[:, None] * HEAD[0], HEAD).lse,
    "clipped_surrogate": lambda x: clipped_surrogate(x, x.detach() + 0.1, OLD).loss,
    "distrl_loss": lambda x: distrl_loss(x, x[:, None], OLD, OLD[:, None], OLD, OLD[:, None], CU).loss,
    "linear_distrl_loss": lambda x: (
        linear_distrl_loss(
            x[:, None] * HEAD[0], HEAD, IDS, IDS[:, None], OLD, OLD[:, None], OLD, OLD[:, None], CU
        ).loss
    ),
    **CALLS,
}


@pytest.mark.parametrize("op", ipvrm_kernels.OPS)
def test_no_op_goes_by_the_dispatcher_where_only_autograd_listens(op, monkeypatch):
    """Head ops too, forward and backward; with a dispatch mode all of them do."""
    kind, names = type(torch.ops.ipvrm.segment_scan.default), []
    plain_call = kind.__call__

    def call(self, *inputs, **options):
        names.append(self.name())
        return plain_call(self, *inputs, **options)

    def forward_and_backward():
        DOUBLE[op](X)
        out = DOUBLE[op](X.clone().requires_grad_())
        if out.requires_grad:
            out.sum().backward()

    monkeypatch.setattr(kind, "__call__", call)
    forward_and_backward()
    assert not [x for x in names if x.startswith("ipvrm::")]
    with Seen() as seen:
        forward_and_backward()
    assert f"ipvrm::{op}" in seen.names and f"ipvrm::{op}" in names


@pytest.mark.parametrize("upstream", ["of the result", "a constant"])
@pytest.mark.parametrize("op", ipvrm_kernels.OPS)
def test_every_op_refuses_a_second_backward_in_the_same_words(op, upstream):
    """Silence would be a second derivative of 0, also where the upstream gradient depends on nothing."""
    x = X.clone().requires_grad_()
    out = DOUBLE[op](x)
    if op == "linear_candidates":
        assert not out.requires_grad
        return
    function = out * out if upstream == "of the result" else out
    (gradient,) = torch.autograd.grad(function.sum(), x, create_graph=True)
    if op == "segment_scan":  # linear: its gradient is an op like it
        if upstream == "of the result":
            assert torch.autograd.grad(gradient.sum(), x)[0].abs().max() > 0
        return
    words = (
        f"^{op}: double backward is not supported; its gradient cannot be differentiated. Where a second "
        r"derivative is needed, use \S.+"
    )
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(gradient.sum(), x)


FORWARD = (
    DOUBLE
    | {  # in the other operand of the head
        "linear_logprobs of the weight": lambda x: linear_logprobs(HEAD[IDS], x[:4, None] * HEAD, IDS).lse,
    }
)


@pytest.mark.parametrize("way", ["jvp", "dual tensor"])
@pytest.mark.parametrize("call", FORWARD)
def test_forward_mode_is_refused(call, way):
    """Autograd would take the missing formula for a derivative of 0."""
    with pytest.raises(RuntimeError, match="forward-mode differentiation .* is not supported"):
        if way == "jvp":
            torch.func.jvp(FORWARD[call], (X,), (torch.ones_like(X),))
        else:
            with torch.autograd.forward_ad.dual_level():
                FORWARD[call](torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))


def product(fake_shape=None):
    """An op registered anew: x * factor * weight, and what its backward was called with."""
    seen = []

    def fake(weight, x):  # in an order of its own
        return x.new_empty(fake_shape or x.shape), [weight.new_empty(weight.shape)]

    def backward(needs, saved, dy, factor, weight, y):
        seen.append(dict(needs=needs, saved=saved, dy=dy, factor=factor, weight=weight, y=y))
        return {"weight": dy * y / weight, "x": dy * factor * saved[0]}

    name = f"probe{len(REGISTERED)}"

    def op(x: torch.Tensor, factor: float, weight: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x * factor * weight, [weight.clone()]

    op.__name__ = f"_{name}"
    REGISTERED.append(name)
    return register(fake=fake, returns=("y", "saved"), backward=backward)(op), name, seen


REGISTERED = []


def test_rules_get_what_they_ask_for_by_name():
    call, name, seen = product()
    x, weight = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0])
    y, saved = call(x, 0.5, weight)
    assert y.requires_grad and not saved[0].requires_grad
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([1.0, 10.0]))
    assert gradient.tolist() == [1.5, 25.0]
    (got,) = seen
    assert got["needs"] == {"x": True, "factor": False, "weight": False}
    assert got["factor"] == 0.5 and got["weight"] is weight and got["y"].tolist() == [1.5, 5.0]
    assert got["dy"].tolist() == [1.0, 10.0] and [t.tolist() for t in got["saved"]] == [[3.0, 5.0]]
    torch.library.opcheck(getattr(torch.ops.ipvrm, name), (x, 0.5, weight.requires_grad_()))


def test_opcheck_catches_a_fake_of_the_wrong_shape():
    _, name, _ = product(fake_shape=(3,))
    with pytest.raises(Exception, match="(?i)shape"):
        torch.library.opcheck(getattr(torch.ops.ipvrm, name), (X.clone(), 0.5, X.clone()))


def test_a_name_that_does_not_exist_is_refused_at_once():
    def _misspelt(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(TypeError, match="misspelt: its fake asks for y; there is x"):
        register(fake=lambda y: y)(_misspelt)

    def _misspelt_too(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(TypeError, match="misspelt_too: its backward asks for dz; there is x, y, dy, needs"):
        register(fake=lambda x: x, returns=("y",), backward=lambda dz: {"x": dz})(_misspelt_too)


def test_a_list_of_inputs_keeps_the_fallback_for_batched_tensors():
    """A list in an op's schema would refuse is_grads_batched: `saved` goes in one by one."""
    x = X.clone().requires_grad_()
    loss, up = clipped_surrogate(x, OLD, OLD).loss, torch.randn(3, 7)
    (batched,) = torch.autograd.grad(loss, x, up, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(loss, x, g, True)[0] for g in up]))
