"""torch.ops.ipvrm.*, which anybody can call: what the native code cannot read is refused, never read."""

import math

import pytest
import torch

import ipvrm_kernels
from ipvrm_kernels import backend
from ipvrm_kernels.linear_candidates import MOST_TOP_K
from ipvrm_kernels.registration import register

N, K, V, D, B = 6, 2, 11, 4, 2
OPS = torch.ops.ipvrm
EDGES = torch.tensor([0, 4, 6], dtype=torch.int32)
pytestmark = pytest.mark.skipif(not backend.HAS_CPP, reason="the extension is not built")


def f(*shape):
    return torch.full(shape, -0.5)


HEAD = {"hidden": f(N, D), "weight": f(V, D), "bias": f(V)}
LOGITS = {"scale": 1.0, "softcap": None, "temperature": 1.0, "dtype": torch.float32}
IDS = torch.ones(N, K, dtype=torch.int64)
OBJECTIVE = {
    "alpha": 1.0, "clip_low": 0.2, "clip_high": 0.28, "candidate_clip_low": 0.2, "candidate_clip_high": 0.28,
    "dual_clip": None, "reduction": "sequence_mean",
    "candidate_reduction": "sequence_mean",
}  # fmt: skip
BATCH = {
    "old_logprobs": f(N), "old_candidate_logprobs": f(N, K), "advantages": f(N),
    "candidate_advantages": f(N, K), "cu_seqlens": EDGES, "token_denominator": torch.tensor(6.0),
    "candidate_denominator": torch.tensor(12.0),
}  # fmt: skip
CASES = {
    "segment_scan": {"x": f(N), "cu_seqlens": EDGES, "decay": 1.0, "reverse": False},
    "prefix_values": {"log_ratio": f(N), "cu_seqlens": EDGES, "beta": 10.0},
    "prefix_values_bwd": {
        "dvalue": f(N), "dmean_value": f(N), "dprob": f(N), "dtd": f(N), "prob": f(N) + 1,
        "cu_seqlens": EDGES, "beta": 10.0,
    },
    "prefix_value_loss": {
        "log_ratio": f(N), "cu_seqlens": EDGES, "outcome": torch.ones(B), "margin": f(B), "weight": f(B) + 2,
        "denominator": torch.tensor(2.0), "margin_value": 0.0, "divisor": 0.0, "beta": 10.0,
        "weighting": "uniform", "per_sequence": True, "needs_gradient": True,
    },
    "clipped_surrogate": {
        "logprobs": f(N), "old_logprobs": f(N), "advantages": f(N), "clip_low": 0.2, "clip_high": 0.28,
        "dual_clip": None,
    },
    "distrl_loss": {"logprobs": f(N, 1 + K), **BATCH, **OBJECTIVE},
    "linear_candidates": {
        **HEAD, "sampled": IDS[:, 0], **LOGITS, "min_prob": None, "K": K, "return_entropy": True,
        "deterministic": False,
    },
    "linear_logprobs": {
        **HEAD, "ids": IDS, **LOGITS, "return_entropy": True, "follows": "nothing",
        "max_workspace_bytes": None, "deterministic": False, "may_save": False,
    },
    "linear_logprobs_partial": {**HEAD, "ids": IDS, **LOGITS},
    "linear_logprobs_partial_bwd": {
        "dsumexp": f(N), "dsum_z_exp": f(N), "did_logits": f(N, K), **HEAD, "ids": IDS, "top": f(N), **LOGITS,
        "needs": [True, True, True],
    },
    "linear_distrl_loss": {
        **HEAD, "token_ids": IDS[:, 0], "candidate_ids": IDS, **BATCH, **LOGITS, **OBJECTIVE,
        "form": [True, True, True], "max_workspace_bytes": None, "deterministic": False,
    },
}  # fmt: skip


def test_the_cases_hold_every_op():
    assert ipvrm_kernels.OPS.keys() <= CASES.keys()


def call(op, impl="cpp", **changes):
    """By the schema's names; what the case does not name (a number's tensor, what was saved) is None."""
    function, given = getattr(OPS, op).default, {**CASES[op], **changes, "impl": impl}
    return function(*(given.get(argument.name) for argument in function._schema.arguments))


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


@pytest.mark.parametrize("op", CASES)
def test_other_sizes_are_refused(op):
    """Each tensor made one shorter, one longer and one dimension more: no address is read beyond its end."""
    for name in tensors(op):
        given = CASES[op][name]
        edges = name == "cu_seqlens" and op != "prefix_value_loss"  # any number of sequences: they are read
        if edges or given.dim() == 0:
            wrong = [given[None]]
        else:
            wrong = [given[:-1], torch.cat([given, given[:1]]), given[None]]
        for x in wrong:
            if len(tensors(op)) == 1 or (name in ("x", "log_ratio") and x.dim() == 1):
                with pytest.raises(ValueError):
                    call(op, **{name: x})
                continue
            with pytest.raises(ValueError, match=rf"ipvrm.{op}: \w+ must be \(.*, got"):
                call(op, **{name: x})


def test_the_reference_takes_fp64():
    doubles = {name: x.double() for name, x in CASES["prefix_values"].items() if name == "log_ratio"}
    assert call("prefix_values", impl="torch", **doubles)[0].dtype == torch.float64


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
