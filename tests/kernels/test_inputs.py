"""What every public op refuses in the same words, and numbers that vary without another compilation."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ipvrm_kernels
from ipvrm_kernels import (
    backend,
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

OP = "segment_scan"  # it has every implementation
N, K, D, V = 7, 2, 3, 5
G = torch.Generator().manual_seed(0)
CU, OUTCOME = torch.tensor([0, 3, N], dtype=torch.int32), torch.tensor([1.0, 0.0])
WEIGHT, IDS = torch.randn(V, D, generator=G), torch.randint(0, V, (N,), generator=G)
CANDIDATES, OLD = torch.randint(0, V, (N, K), generator=G), torch.full((N,), -1.5)
OLD_CANDIDATES, A = torch.full((N, K), -1.5), torch.randn(N, generator=G)
AC, X = torch.randn(N, K, generator=G), torch.linspace(-1, 1, N)
NEW_CANDIDATES = torch.linspace(-2, -1.2, N * K).view(N, K)
HIDDEN = torch.randn(N, D, generator=G)
LOSS = (OLD, OLD_CANDIDATES, A, AC, CU)


def beside(x, *inputs):
    """The other inputs of an op whose first one is x: on its device, those that float of its dtype."""
    if not isinstance(x, torch.Tensor):
        return inputs
    return [y.to(x.device, x.dtype if y.is_floating_point() else y.dtype) for y in inputs]


# every op: {name: (its first input, a function of that input, of a head's weight, of options, to a tensor)}
OPS = {
    "linear_logprobs": (
        HIDDEN, lambda h, w=WEIGHT, **o: linear_logprobs(h, *beside(h, w, IDS), **o).logprobs
    ),
    "linear_logprobs_partial": (
        HIDDEN,
        lambda h, w=WEIGHT, **o: linear_logprobs_partial(h, *beside(h, w, IDS), vocab_start=0, **o).sumexp,
    ),
    "linear_candidates": (
        HIDDEN, lambda h, w=WEIGHT, **o: linear_candidates(h, *beside(h, w), top_k=2, **o).logprobs
    ),
    "linear_distrl_loss": (
        HIDDEN,
        lambda h, w=WEIGHT, **o: linear_distrl_loss(h, *beside(h, w, IDS, CANDIDATES, *LOSS), **o).loss,
    ),
    "distrl_loss": (X, lambda x, **o: distrl_loss(x, *beside(x, NEW_CANDIDATES, *LOSS), **o).loss),
    "clipped_surrogate": (X, lambda x, **o: clipped_surrogate(x, *beside(x, OLD, A), **o).loss),
    "segment_scan": (X, lambda x, **o: segment_scan(x, *beside(x, CU), **o)),
    "prefix_values": (X, lambda x, **o: prefix_values(x, *beside(x, CU), **o).prob),
    "prefix_value_loss": (X, lambda x, **o: prefix_value_loss(x, *beside(x, CU, OUTCOME), **o)),
}  # fmt: skip
NUMBERS = {  # those that may vary: {op: {option: a value of v in 0.25 .. 0.95}}
    "linear_logprobs": {"temperature": lambda v: v, "logit_scale": lambda v: 1 + v},
    "linear_logprobs_partial": {"temperature": lambda v: v, "logit_scale": lambda v: 1 + v},
    "linear_candidates": {
        "temperature": lambda v: v, "logit_scale": lambda v: 1 + v, "min_prob": lambda v: v / 2,
    },
    "linear_distrl_loss": {
        "temperature": lambda v: v, "logit_scale": lambda v: 1 + v, "alpha": lambda v: v,
        "clip_low": lambda v: v, "clip_high": lambda v: v, "candidate_clip_low": lambda v: v / 2,
        "candidate_clip_high": lambda v: 2 * v, "dual_clip": lambda v: 1 + v,
        "token_denominator": lambda v: v,
    },
    "distrl_loss": {
        "alpha": lambda v: v, "clip_low": lambda v: v, "clip_high": lambda v: v,
        "candidate_clip_low": lambda v: v / 2, "candidate_clip_high": lambda v: 2 * v,
        "dual_clip": lambda v: 1 + v, "candidate_denominator": lambda v: v,
    },
    "clipped_surrogate": {
        "clip_low": lambda v: v, "clip_high": lambda v: v, "dual_clip": lambda v: 1 + v,
    },
    "segment_scan": {"decay": lambda v: v},
    "prefix_values": {"beta": lambda v: v},
    "prefix_value_loss": {"beta": lambda v: v, "margin": lambda v: v, "denominator": lambda v: v},
}  # fmt: skip


@pytest.fixture(params=OPS, ids=str)
def op(request):
    return request.param


def test_the_tables_above_hold_every_op():
    assert set(OPS) == set(NUMBERS) == set(ipvrm_kernels.OPS)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap(grad)": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "grad(vmap)": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(torch.stack([y, y])).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_refused(op, transform):
    x, function = OPS[op]
    with pytest.raises(
        RuntimeError, match=f"^{op}: torch.func transforms that differentiate .* use torch.auto"
    ):
        TRANSFORMS[transform](lambda x: function(x).sum(), x)


@pytest.mark.slow
def test_torch_func_is_refused_when_compiled(op):
    """In the same words, among Dynamo's; an op that has no gradient says nothing and gives none."""
    x, function = OPS[op]
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(lambda x: function(x).sum()), backend="eager")
    if op == "linear_candidates":
        assert not compiled(x).any()
        return
    with pytest.raises(
        RuntimeError, match=f"{op}: torch.func transforms that differentiate .* use torch.auto"
    ):
        compiled(x)


def test_torch_func_elsewhere_is_none_of_its_business(op):
    """An op inside of a transform that differentiates something else, or with vmap alone."""
    x, function = OPS[op]
    got = torch.func.grad(lambda s: (s * function(x).sum()).sum())(torch.tensor(1.0))
    torch.testing.assert_close(got, function(x).sum())


def test_meta_tensors(op):
    """Shapes and dtypes of a call that computes nothing, and of its gradient."""
    x, function = OPS[op]
    real, meta = x.clone().requires_grad_(), x.to("meta").requires_grad_()
    want, got = function(real), function(meta)
    pairs = [(want, got)]
    if want.requires_grad:
        pairs.append([torch.autograd.grad(out.sum(), y)[0] for out, y in ((want, real), (got, meta))])
    assert got.requires_grad == want.requires_grad
    for right, mine in pairs:
        assert mine.is_meta and (mine.shape, mine.dtype) == (right.shape, right.dtype)


WRONG = {"ndarray": lambda x: x.numpy(), "list": lambda x: x.tolist(), "None": lambda x: None}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_tensor_is_refused(op, kind):
    x, function = OPS[op]
    words = f"^{op}: \\w+ must be a torch.Tensor, got {kind}; torch.as_tensor converts"
    with pytest.raises(ValueError, match=words):
        function(WRONG[kind](x))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("ids", lambda: linear_logprobs(HIDDEN, WEIGHT, IDS.tolist())),
        ("weight", lambda: linear_logprobs(HIDDEN, WEIGHT.numpy(), IDS)),
        ("bias", lambda: linear_logprobs(HIDDEN, WEIGHT, IDS, bias=[0.0] * V)),
        ("sampled", lambda: linear_candidates(HIDDEN, WEIGHT, sampled=IDS.numpy())),
        ("cu_seqlens", lambda: segment_scan(X, [0, 3, N])),
        ("outcome", lambda: prefix_value_loss(X, CU, [1.0, 0.0])),
        ("weight", lambda: prefix_value_loss(X, CU, OUTCOME, weight=[1.0, 1.0])),
        ("advantages", lambda: clipped_surrogate(X, OLD, A.numpy())),
        ("old_logprobs", lambda: distrl_loss(X, OLD_CANDIDATES, None, *LOSS[1:])),
        ("cu_seqlens", lambda: linear_distrl_loss(HIDDEN, WEIGHT, IDS, CANDIDATES, *LOSS[:4], [0, N])),
        ("candidate_advantages", lambda: linear_distrl_loss(
            HIDDEN, WEIGHT, IDS, CANDIDATES, *LOSS[:3], AC.numpy(), CU
        )),
        ("padded", lambda: ipvrm_kernels.pack([[1.0]], torch.ones(1, 1))),
        ("cu_seqlens", lambda: ipvrm_kernels.unpack(X, [0, N], N)),
    ],
)  # fmt: skip
def test_every_input_is_looked_at(name, call):
    with pytest.raises(ValueError, match=rf"^\w+: {name} must be a torch.Tensor, got \w+; torch.as_tensor"):
        call()


def test_a_dtensor_is_refused_with_both_cures(op):
    from torch.distributed import HashStore, destroy_process_group, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        x, function = OPS[op]
        words = (
            rf"^{op}: (\w+) must be a plain tensor, got a DTensor; of a vocabulary-parallel head pass "
            r"\1.to_local\(\) to vocab_parallel_logprobs or vocab_parallel_candidates; else unshard it: "
            r"gathered_weight\(head\) of a head under FSDP2, \1.full_tensor\(\) of anything else"
        )
        with pytest.raises(ValueError, match=words):
            function(distribute_tensor(x, init_device_mesh("cpu", (1,))))
    finally:
        destroy_process_group()


CASES = [(op, option) for op, options in NUMBERS.items() for option in options]
NOT_TENSORS_BEFORE = [x for x in CASES if "denominator" not in x[1] and x[1] != "margin"]  # those took any


@pytest.mark.parametrize(("op", "option"), NOT_TENSORS_BEFORE)
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (torch.tensor([0.5, 0.5]), r"0-d fp32 or fp64 tensor on the CPU without gradient, got shape \(2,\)"),
        (torch.tensor(1), r"got shape \(\), torch.int64"),
        (torch.tensor(0.5, requires_grad=True), "requires_grad=True"),
        (torch.tensor(0.5, device="meta"), "torch.float32, meta"),
        ("0.5", "a number, got str"),
        (np.array([0.5]), "a number, got ndarray"),
    ],
    ids=["shape", "dtype", "gradient", "device", "str", "array"],
)
def test_numbers_of_the_wrong_kind(op, option, number, words):
    x, function = OPS[op]
    with pytest.raises(ValueError, match=f"^{op}: {option} must be .*{words}"):
        function(x, **{option: number})


@pytest.mark.parametrize(("op", "option"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_means_its_number(op, option, dtype):
    """In bits; np.float32 and int are numbers too. An out-of-range tensor is refused as a float is."""
    x, function = OPS[op]
    for v in (0.3, 0.9):
        value = NUMBERS[op][option](torch.tensor(v, dtype=dtype))
        want = function(x, **{option: value.item()})
        assert torch.equal(function(x, **{option: value}), want)
        assert torch.equal(function(x, **{option: value.numpy()[()]}), want)
    words = []
    for bad in (torch.tensor(math.nan, dtype=dtype), math.nan):
        with pytest.raises(ValueError, match=f"^{op}: {option} must ") as caught:
            function(x, **{option: bad})
        words.append(str(caught.value).replace("[nan, nan]", "nan"))
    assert words[0] == words[1] or option == "margin"


def values_and_gradients(op, dtype, device, trained, impl, numbers):
    """The result and its gradients by the first input and, if `trained`, the weight, at an upstream of no
    symmetry; a result without gradient alone."""
    x, function = OPS[op]
    inputs = [y.to(device, dtype).requires_grad_() for y in ((x, WEIGHT) if trained else (x,))]
    out = function(*inputs, impl=impl, **numbers)
    if not out.requires_grad:
        return [out]
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def test_tensors_in_every_implementation(op, impl, device):
    """All numbers of an op at once, as tensors of either dtype: in the bits of floats, and near fp64."""
    if impl not in ipvrm_kernels.OPS[op]:
        pytest.skip(f"{op} has no impl={impl!r}")
    heads = (True,) if backend.INTERPRETED else (False, True)  # trained or frozen; seconds each in Triton's
    for trained in heads if op.startswith("linear_") else (False,):
        found = []
        for v in (torch.tensor(0.3), torch.tensor(0.9, dtype=torch.float64)):
            numbers = {option: number(v) for option, number in NUMBERS[op].items()}
            floats = {option: number.item() for option, number in numbers.items()}
            found.append(values_and_gradients(op, torch.float32, device, trained, impl, numbers))
            exact = values_and_gradients(op, torch.float64, device, trained, "torch", floats)
            torch.testing.assert_close(found[-1], [x.float() for x in exact])
        same = values_and_gradients(op, torch.float32, device, trained, impl, floats)
        assert all(map(torch.equal, found[-1], same))
        if NUMBERS[op]:  # none is deaf to them
            assert all(not torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_min_prob_decides_the_shape_without_top_k():
    with pytest.raises(
        ValueError, match="linear_candidates: min_prob must be a number where there is no top_k"
    ):
        linear_candidates(HIDDEN, WEIGHT, min_prob=torch.tensor(0.3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "float"])
@pytest.mark.parametrize("implementation", ["cpp", pytest.param("torch", marks=pytest.mark.full)])
def test_twelve_values_compile_once_or_twice(op, kind, implementation):
    """Values, gradients. Of tensors no value after the first compiles anew; a Python float is a constant of
    the first graph and symbolic from the second on."""
    if (why := backend.why_not(implementation, "cpu")) is not None:
        pytest.skip(why)
    x, function = OPS[op]
    x = x.clone().requires_grad_()

    def call(x, v=None):
        numbers = {option: number(v) for option, number in NUMBERS[op].items()}
        return function(x, impl=implementation, **numbers)

    torch._dynamo.reset()  # other cases count for the same function
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for i in range(12):
        v = 0.25 + i / 16
        given = [torch.tensor(v) if kind == "tensor" else v] if NUMBERS[op] else []
        results = []
        for f in (compiled, call):
            out = f(x, *given)
            gradient = torch.autograd.grad(out.sum(), x)[0] if out.requires_grad else None
            results.append((out.detach(), gradient))
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert 1 <= counts[0] <= counts[-1] <= 2
    assert counts[-1] == (2 if kind == "float" and NUMBERS[op] else counts[0])


@pytest.mark.slow
def test_an_fp64_tensor_compiles_for_its_first_value_alone():
    """For which PyTorch calls the backend twice, of `x * v` too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, v: segment_scan(x, CU, decay=v), fullgraph=True, backend=counter)
    counts = []
    for v in torch.linspace(0.25, 0.95, 5, dtype=torch.float64):
        torch.testing.assert_close(compiled(X, v), segment_scan(X, CU, decay=v))
        counts.append(counter.frame_count)
    assert len({*counts}) == 1 and counts[0] in (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_inductor_too_and_a_bad_value_is_refused(kind):
    def call(x, v):
        return prefix_value_loss(x, CU, OUTCOME, beta=10 * v, margin=v)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled, x = torch.compile(call, fullgraph=True, backend=counter), X.clone().requires_grad_()
    for i in range(12):
        v = torch.tensor(i / 16) if kind == "tensor" else i / 16
        mine, theirs = ([y.detach(), *torch.autograd.grad(y, x)] for y in (compiled(x, v), call(x, v)))
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == {"tensor": 1, "float": 2}[kind]
    with pytest.raises(ValueError, match="prefix_value_loss: (beta|margin) must be finite"):
        compiled(x, torch.tensor(math.inf) if kind == "tensor" else math.inf)
