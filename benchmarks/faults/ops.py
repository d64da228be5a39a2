"""Calls of the ops with everything that callers get wrong: they return, or raise; they touch no memory that
is not theirs.

`python -m benchmarks.faults.ops --seed S --calls N` makes them in this process and prints what came of them;
under a sanitizer (`sanitized.py`) a read or write out of bounds ends it with a report.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ipvrm_kernels

OPS = torch.ops.ipvrm
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError, OverflowError)
SIZES = (0, 1, 2, 3, 5, 8, 17, 64, 130)


def raw_calls(
    N: int, K: int, V: int, D: int, edges: Sequence[int], fill: Callable[..., Tensor]
) -> dict[str, dict[str, Any]]:
    """Arguments of every torch.ops.ipvrm op by the schema's names, of these sizes; fill(*shape): fp32."""
    cu, B, f = torch.tensor(edges, dtype=torch.int32), len(edges) - 1, fill
    head = {"hidden": f(N, D), "weight": f(V, D), "bias": f(V)}
    logits = {"scale": 1.0, "softcap": None, "temperature": 1.0, "dtype": torch.float32}
    ids = torch.ones(N, K, dtype=torch.int64).clamp(max=V - 1)
    one = torch.tensor(1.0)
    objective = {
        "alpha": 1.0, "clip_low": 0.2, "clip_high": 0.28, "candidate_clip_low": 0.2,
        "candidate_clip_high": 0.28, "dual_clip": None, "reduction": "sequence_mean",
        "candidate_reduction": "sequence_mean",
    }  # fmt: skip
    batch = {
        "old_logprobs": f(N), "old_candidate_logprobs": f(N, K), "advantages": f(N),
        "candidate_advantages": f(N, K), "cu_seqlens": cu, "token_denominator": torch.tensor(6.0),
        "candidate_denominator": torch.tensor(12.0),
    }  # fmt: skip
    return {
        "segment_scan": {"x": f(N), "cu_seqlens": cu, "decay": 1.0, "reverse": False},
        "prefix_values": {"log_ratio": f(N), "cu_seqlens": cu, "beta": 10.0},
        "prefix_values_bwd": {
            "dvalue": f(N), "dmean_value": f(N), "dprob": f(N), "dtd": f(N), "prob": f(N) + 1,
            "cu_seqlens": cu, "beta": 10.0,
        },
        "prefix_value_loss": {
            "log_ratio": f(N), "cu_seqlens": cu, "outcome": torch.ones(B), "margin": f(B),
            "weight": f(B) + 2, "denominator": torch.tensor(2.0), "margin_value": 0.0, "divisor": 0.0,
            "beta": 10.0, "weighting": "uniform", "per_sequence": True, "needs_gradient": True,
        },
        "prefix_value_loss_bwd": {
            "dloss": one, "log_ratio": f(N), "cu_seqlens": cu, "beta": 10.0, "saved": [f(N)],
        },
        "clipped_surrogate": {
            "logprobs": f(N), "old_logprobs": f(N), "advantages": f(N), "clip_low": 0.2, "clip_high": 0.28,
            "dual_clip": None,
        },
        "clipped_surrogate_bwd": {"dloss": f(N), "logprobs": f(N), "saved": [f(N)]},
        "distrl_loss": {"logprobs": f(N, 1 + K), **batch, **objective},
        "distrl_loss_bwd": {"dloss": one, "logprobs": f(N, 1 + K), "saved": [f(N, 1 + K)]},
        "linear_candidates": {
            **head, "sampled": ids[:, 0] if K else torch.zeros(N, dtype=torch.int64), **logits,
            "min_prob": None, "K": K, "return_entropy": True, "deterministic": False,
        },
        "linear_logprobs": {
            **head, "ids": ids, **logits, "return_entropy": True, "follows": "nothing",
            "max_workspace_bytes": None, "deterministic": False, "may_save": False,
        },
        "linear_logprobs_bwd": {
            "dlogprobs": f(N, K), "dlse": f(N), "dentropy": f(N), **head, "ids": ids, "logprobs": f(N, K),
            "lse": f(N) + 4, "entropy": f(N) + 2, **logits, "follows": "trained",
            "needs": [True, True, True], "max_workspace_bytes": None, "deterministic": False,
            "saved": [f(N), f(0)],
        },
        "linear_logprobs_partial": {**head, "ids": ids, **logits},
        "linear_logprobs_partial_bwd": {
            "dsumexp": f(N), "dsum_z_exp": f(N), "did_logits": f(N, K), **head, "ids": ids, "top": f(N),
            **logits, "needs": [True, True, True],
        },
        "linear_distrl_loss": {
            **head, "token_ids": ids[:, 0] if K else torch.zeros(N, dtype=torch.int64),
            "candidate_ids": ids, **batch, **logits, **objective, "form": [True, True, True],
            "max_workspace_bytes": None, "deterministic": False,
        },
        "linear_distrl_loss_bwd": {
            "dloss": one, **head, "needs": [True, True, True], "saved": [f(N, D), f(V, D), f(V)],
        },
    }  # fmt: skip


def raw_call(op: str, given: dict[str, Any], impl: str = "cpp") -> Any:
    """torch.ops.ipvrm.<op> by the schema's names; what is not given (a number's tensor) is None."""
    function, given = getattr(OPS, op).default, {**given, "impl": impl}
    given |= {f"saved_{i}": x for i, x in enumerate(given.get("saved", ()))}
    return function(*(given.get(argument.name) for argument in function._schema.arguments))


# --------------------------------------------------------------------------------------------- random calls


def spoilt(x: Tensor, rng: random.Random) -> Tensor:
    """x with another size, dtype, layout or values."""
    way = rng.randrange(9)
    if way == 0 and x.dim():
        return x[: rng.randrange(len(x) + 1)]
    if way == 1 and x.dim():
        return torch.cat([x, x[: rng.randint(1, 3)]])
    if way == 2:
        return x[None] if rng.random() < 0.5 else x.flatten()
    if way == 3:
        return x.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)))
    if way == 4:
        return (x.flatten()[:1].sum() if x.numel() else x.new_zeros(())).expand(x.shape)
    if way == 5 and x.dim():
        return torch.stack([x, x], -1)[..., 0]
    if way == 6:
        return torch.empty(0, dtype=x.dtype)
    if x.is_floating_point():
        odd = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 0.0, -0.0)
        y = x.clone().contiguous()
        flat = y.view(-1)
        for _ in range(rng.randint(1, 4) if len(flat) else 0):
            flat[rng.randrange(len(flat))] = rng.choice(odd)
        return y
    y = x.clone().contiguous()
    flat = y.view(-1)
    limits = torch.iinfo(x.dtype) if x.dtype != torch.bool else None
    for _ in range(rng.randint(1, 3) if len(flat) and limits else 0):
        assert limits is not None
        flat[rng.randrange(len(flat))] = rng.choice((-1, -100, limits.min, limits.max, 10**6, 10**9, 7))
    return y


def spoilt_plain(value: Any, rng: random.Random) -> Any:
    """Another number or option in the place of `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float) or value is None:
        return rng.choice((0.0, -1.0, math.nan, math.inf, 1e300, 1e-300, 0.5, 2.0))
    if isinstance(value, int):
        return rng.choice((0, -1, 1, 3, 2**40, 2**62))  # none that a machine would grant
    if isinstance(value, str):
        return rng.choice(("", "nothing", "frozen", "trained", "token_mean", "late", "early", "x"))
    if isinstance(value, list):
        return value[: rng.randrange(len(value) + 1)] if rng.random() < 0.5 else value * 2
    return value


def random_call(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    """(op, arguments, impl): of fitting sizes, and then up to three of them spoilt."""
    N, K, V, D = (rng.choice(SIZES) for _ in range(4))
    inner = sorted(rng.randint(0, N) for _ in range(rng.randrange(4)))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    scale = rng.choice((0.1, 1.0, 30.0))

    def fill(*shape: int) -> Tensor:
        return -torch.rand(shape, generator=generator) * scale

    calls = raw_calls(N, K, max(V, 1), D, [0, *inner, N], fill)
    op = rng.choice(sorted(calls))
    given = calls[op]
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dtype == torch.int64:
            given[name] = torch.randint(-2, max(V, 1), value.shape, generator=generator)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        name = rng.choice(sorted(given))
        if name == "saved":
            given[name] = [spoilt(x, rng) if rng.random() < 0.5 else x for x in given[name]]
        elif isinstance(given[name], Tensor):
            given[name] = None if rng.random() < 0.05 else spoilt(given[name], rng)
        elif name != "dtype":
            given[name] = spoilt_plain(given[name], rng)
    return op, given, rng.choice(("cpp", "cpp", "cpp", "torch"))


def describe(given: dict[str, Any]) -> str:
    words = {
        name: f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else str(x)[:200]
        for name, x in given.items()
    }
    return json.dumps(words)


def main() -> int:
    """Prints each call before it is made (the last one is what a sanitizer ended), then the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    counts: Counter[str] = Counter()
    print(ipvrm_kernels.__file__, flush=True)
    for number in range(arguments.calls):
        rng = random.Random(f"{arguments.seed} {number}")
        op, given, impl = random_call(rng)
        print(f"call {number}: {op} {impl} {describe(given)}", flush=True)
        try:
            raw_call(op, given, impl)
            counts["returned"] += 1
        except REFUSALS:
            counts["refused"] += 1
    print(json.dumps(dict(counts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
