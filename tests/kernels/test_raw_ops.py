"""torch.ops.ipvrm.*, which anybody can call: what the native code cannot read is refused, never read."""

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed packages

import ipvrm_kernels  # noqa: E402
from benchmarks.faults.ops import raw_call, raw_calls  # noqa: E402
from ipvrm_kernels import backend  # noqa: E402
from ipvrm_kernels.linear_candidates import MOST_TOP_K  # noqa: E402
from ipvrm_kernels.registration import MOST_LISTED, _check_saved, register  # noqa: E402

N, K, V, D, B = 6, 2, 11, 4, 2
EDGES = torch.tensor([0, 4, 6], dtype=torch.int32)
pytestmark = pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built")


def f(*shape):
    return torch.full(shape, -0.5)


HEAD = ("hidden", "weight", "bias")
IDS = torch.ones(N, K, dtype=torch.int64)
CASES = raw_calls(N, K, V, D, EDGES.tolist(), f)


def test_the_cases_hold_every_op():
    assert ipvrm_kernels.OPS.keys() <= CASES.keys()


def call(op, impl="cpp", **changes):
    return raw_call(op, {**CASES[op], **changes}, impl)


def tensors(op):
    return [name for name, value in CASES[op].items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("op", CASES)
def test_what_it_takes_runs(op):
    found = call(op)
    assert all(bool(x.isfinite().any()) for x in (found if isinstance(found, tuple | list) else [found])[:1])


@pytest.mark.parametrize("op", CASES)
def test_other_dtypes_are_refused(op):
    for name in tensors(op):
        given = CASES[op][name]
        others = [torch.float64, torch.int8] if given.is_floating_point() else [torch.int16, torch.float32]
        head = name in HEAD and op.startswith("linear")
        others += [] if head or not given.is_floating_point() else [torch.float16, torch.bfloat16]
        for dtype in others:
            with pytest.raises(
                ValueError, match=rf"ipvrm.{op}: {name} must be .*, got {dtype} for impl='cpp'"
            ):
                call(op, **{name: given.to(dtype)})


def other_sizes(op, given):
    """Each tensor made one shorter, one longer and one dimension more: no address is read beyond its end."""
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    alone = len(names) == 1 and "saved" not in given  # no other has a size to disagree with
    for name in names:
        x, dim = given[name], given[name].dim()
        edges = name == "cu_seqlens" and op != "prefix_value_loss"  # any number of sequences: they are read
        wrong = [x[None]] if edges or dim == 0 else [x[:-1], torch.cat([x, x[:1]]), x[None]]
        for changed in wrong:
            now = {**given, name: changed}
            if alone:  # any N is right, of an elementwise op any shape: all of it is read, and no more
                try:
                    found = raw_call(op, now)
                except ValueError:
                    assert changed.dim() != dim
                else:
                    torch.testing.assert_close(found, raw_call(op, now, "torch"))
                continue
            words = rf"ipvrm.{op}: (\w+ must be \(|saved must).*, got"
            by_the_op = name in ("x", "log_ratio") and changed.dim() == 1  # it holds them to the edges
            with pytest.raises(ValueError, match=None if by_the_op else words):
                raw_call(op, now)


@pytest.mark.parametrize("op", CASES)
def test_other_sizes_are_refused(op):
    other_sizes(op, CASES[op])


def test_a_lone_tensor_has_no_wrong_length():
    """Only one that is not read whole fails, or an op that takes no other length."""

    def lone(takes, function):
        def op(x: torch.Tensor, impl: str) -> torch.Tensor:
            return function(x, impl)

        op.__name__ = f"_lone_probe{next(numbers)}"
        register(fake=lambda x: x, takes={"x": takes})(op)
        other_sizes(op.__name__[1:], {"x": torch.linspace(0, 1, N)})

    def of_six(x, impl):
        if len(x) != N:
            raise ValueError("six, got another")
        return x.exp()

    numbers = itertools.count()
    lone("float =", lambda x, impl: x.exp())
    lone("float N", lambda x, impl: x.exp())
    with pytest.raises(AssertionError):
        lone("float =", lambda x, impl: x[:N].exp() if impl == "cpp" else x.exp())
    with pytest.raises(AssertionError):
        lone("float N", of_six)


WITH_SAVED = [op for op in CASES if "saved" in CASES[op]]


def test_every_op_is_tried():
    texts = [path.read_text() for path in Path(ipvrm_kernels.__file__).parent.glob("*.py")]
    names = {name for text in texts for name in re.findall(r"^def _(\w+)\(", text, re.M)}
    assert {name for name in names if hasattr(torch.ops.ipvrm, name)} == set(CASES)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("op", WITH_SAVED)
def test_what_was_saved_is_what_the_forward_saves(op, impl):
    right = [f(*shape) for shape in SAVED_BY_TORCH[op]] if impl == "torch" else CASES[op]["saved"]
    call(op, impl=impl, saved=right)
    wrong = [[], [*right, f(N)][:MOST_LISTED], [x.double() for x in right], [x.half() for x in right]]
    wrong += [[x[None] for x in right]]
    for at, x in enumerate(right):
        if x.numel():
            other = (x[:-1], torch.cat([x, x[:1]]), x.flatten()[:1])
            wrong += [[*right[:at], y, *right[at + 1 :]] for y in other if y.shape != x.shape]
    for saved in wrong:
        if [x.shape for x in saved] == [x.shape for x in right] and all(
            x.dtype == torch.float32 for x in saved
        ):
            continue
        with pytest.raises(ValueError, match="saved must be what the forward has saved"):
            call(op, impl=impl, saved=saved)


def test_what_was_saved_is_on_the_device_of_the_rest():
    _check_saved("x_bwd", [f(N)], f(1), [[(N,)]])
    with pytest.raises(ValueError, match=r"ipvrm.x_bwd: saved must .* on cpu of .*'meta'"):
        _check_saved("x_bwd", [f(N).to("meta")], f(1), [[(N,)]])


SAVED_BY_TORCH = {
    "prefix_value_loss_bwd": [(N,)], "clipped_surrogate_bwd": [(N,)], "distrl_loss_bwd": [(N, 1 + K)],
    "linear_logprobs_bwd": [], "linear_distrl_loss_bwd": [(N, D), (V, D), (V,)],
}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_what_does_not_lie_in_a_row_is_read_as_what_it_is(op):
    """An address alone would read past the end of a tensor that repeats one number."""
    plain, strided = {}, {}
    for name in [*tensors(op), *(["saved"] if "saved" in CASES[op] else [])]:
        given = CASES[op][name]
        if name == "saved":
            plain[name] = [torch.full_like(x, -0.25) for x in given]
            strided[name] = [torch.full((), -0.25).expand(x.shape) for x in given]
        elif given.is_floating_point():
            value = given.flatten()[0]
            plain[name], strided[name] = torch.full_like(given, value), value.clone().expand(given.shape)
    found, want = call(op, **strided), call(op, **plain)
    single = isinstance(found, torch.Tensor)
    flat = [([a], [b]) if single else (a, b) for a, b in [(found, want)]][0]
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("op", ["prefix_values_bwd", "prefix_value_loss_bwd"])
@pytest.mark.parametrize("edges", [[0, 4, 7], [0, 5, 4, 6], [1, 6], [0, 4], [-1, 6], [0, 2**31 - 1, 6], []])
def test_edges_of_a_gradient_are_those_of_its_tokens(op, edges):
    with pytest.raises(ValueError, match=rf"ipvrm.{op}: cu_seqlens must (rise from 0 to N=6|be \()"):
        call(op, cu_seqlens=torch.tensor(edges, dtype=torch.int32))


def test_no_tensor_is_refused_where_one_is_needed():
    for impl in ("cpp", "torch"):
        with pytest.raises(ValueError, match="ipvrm.segment_scan: x must be a tensor, got None"):
            call("segment_scan", impl=impl, x=None)
        call("clipped_surrogate", impl=impl)
    call("linear_candidates", bias=None)


def test_an_entropy_that_was_not_computed_is_not_read():
    nothing = torch.empty(0)
    call("linear_logprobs_bwd", dentropy=None, entropy=nothing)
    with pytest.raises(ValueError, match="entropy must be"):
        call("linear_logprobs_bwd", entropy=nothing)


def test_the_reference_takes_fp64():
    doubles = {name: x.double() for name, x in CASES["prefix_values"].items() if name == "log_ratio"}
    assert call("prefix_values", impl="torch", **doubles)[0].dtype == torch.float64


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_numbers_out_of_bounds_are_refused(impl):
    """They would be an address beyond a buffer, or a division by zero."""
    for most in (0, -1, MOST_TOP_K + 1):
        with pytest.raises(ValueError, match=r"linear_candidates: top_k must be an integer in 1 \.\. "):
            call("linear_candidates", impl=impl, K=most)
    wrong = {"softcap": (0.0, -1.0, math.nan), "temperature": (0.0, math.inf), "scale": (math.nan,)}
    ops = [op for op in CASES if "softcap" in CASES[op]]
    assert len(ops) >= 6
    for op in ops:
        unsaved = {"saved": []} if impl == "torch" and "saved" in CASES[op] else {}
        for name, values in wrong.items():
            for value in values:
                with pytest.raises(ValueError, match=rf"(logit_)?{name} must be finite"):
                    call(op, impl=impl, **{name: value}, **unsaved)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("op", ["segment_scan", "prefix_values", "prefix_value_loss", "distrl_loss"])
def test_edges_of_no_sequence_are_not_read(op, impl):
    """(B+1,) holds one number at least; the first of none is at no address."""
    with pytest.raises(ValueError, match="(cu_seqlens|outcome) must be"):
        call(op, impl=impl, cu_seqlens=torch.zeros(0, dtype=torch.int32))


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("op", ["prefix_values_bwd", "prefix_value_loss_bwd"])
@pytest.mark.parametrize("edges", [[0, 9, 6], [0, -5, 6], [0, 2**31 - 1, 6], [1, 4, 6], [0, 4, 5]])
def test_gradients_refuse_edges_that_do_not_rise(op, impl, edges):
    """PyTorch's own repeat_interleave ends the process on some."""
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N=6, got"):
        call(op, impl=impl, cu_seqlens=torch.tensor(edges, dtype=torch.int32))


def test_a_declaration_of_unknown_inputs_is_refused():
    with pytest.raises(TypeError, match="takes names y; there is x, impl"):

        @register(fake=lambda x: x, takes={"y": "float N"})
        def _never_registered(x: torch.Tensor, impl: str) -> torch.Tensor:
            return x


@pytest.mark.parametrize("bytes_", [0, -1, 2**62 + 1, 10**30])
def test_workspace_has_bounds(bytes_):
    with pytest.raises(ValueError, match=r"max_workspace_bytes must be None or in 1 \.\. "):
        ipvrm_kernels.linear_logprobs(f(N, D), f(V, D), IDS, max_workspace_bytes=bytes_)


@pytest.mark.parametrize("top_k", [0, MOST_TOP_K + 1, 2**31, 10**30, True, 2.0])
def test_top_k_has_bounds(top_k):
    with pytest.raises(ValueError, match=r"top_k must be an integer in 1 \.\. 1048576, got"):
        ipvrm_kernels.linear_candidates(f(N, D), f(V, D), min_prob=None, top_k=top_k)
    assert math.isfinite(ipvrm_kernels.linear_candidates(f(N, D), f(V, D), min_prob=None, top_k=V).lse.sum())
