"""What the ops over shards of the vocabulary take and refuse, as those on the whole head do, in a group of
one process; `test_vocab_parallel.py` has the results of several."""

import math

import pytest
import torch
import torch.distributed as dist

from ipvrm_kernels import (
    linear_candidates,
    linear_logprobs,
    vocab_parallel_candidates,
    vocab_parallel_logprobs,
)

OP = "linear_logprobs"  # every head op has its implementations
N, D, V, BAD = 6, 4, 70, 2


@pytest.fixture
def place(device):
    """Where the only shard lies."""
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    yield dict(vocab_start=0, group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def case(device):
    """(hidden, weight, ids (N,))"""
    g = torch.Generator().manual_seed(0)
    hidden, weight = 2 * torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return hidden.to(device), weight.to(device), torch.randint(V, (N,), generator=g).to(device)


def found(out):
    return [x for x in out if x is not None]


def test_numbers_may_be_tensors(impl, device, case, place):
    """In the bits of floats; those out of range are refused as floats are."""
    hidden, weight, ids = case
    for make in (float, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)):
        transform = dict(temperature=make(0.75), logit_scale=make(1.25), impl=impl)
        one = found(vocab_parallel_logprobs(hidden, weight, ids, **place, **transform))
        two = found(
            vocab_parallel_candidates(hidden, weight, min_prob=make(0.125), top_k=3, **place, **transform)
        )
        if make is float:
            floats = one, two
        assert all(map(torch.equal, floats[0], one)) and all(map(torch.equal, floats[1], two))
    with pytest.raises(
        ValueError, match=r"^vocab_parallel_candidates: min_prob must be a number where there is"
    ):
        vocab_parallel_candidates(hidden, weight, min_prob=torch.tensor(0.125), impl=impl, **place)
    with pytest.raises(ValueError, match=r"^vocab_parallel_logprobs: temperature must be a number, or a 0-d"):
        vocab_parallel_logprobs(hidden, weight, ids, temperature=torch.ones(2), impl=impl, **place)


def test_torch_func_is_refused(impl, device, case, place):
    hidden, weight, ids = case
    calls = {
        "vocab_parallel_logprobs": lambda h: vocab_parallel_logprobs(h, weight, ids, impl=impl, **place).lse,
        "vocab_parallel_candidates": lambda h: vocab_parallel_candidates(h, weight, impl=impl, **place).lse,
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{op}: torch.func transforms that differentiate"):
            torch.func.grad(lambda h, call=call: call(h).sum())(hidden)


def test_nan_rows(impl, device, case, place):
    """Of all numbers of that row, which has no candidates, and of no other row's."""
    hidden, weight, ids = case
    hidden[BAD, 1] = math.nan
    bad = torch.arange(N, device=device) == BAD
    logprobs = vocab_parallel_logprobs(hidden, weight, ids, return_entropy=True, impl=impl, **place)
    options = dict(min_prob=0.05, sampled=ids, return_entropy=True, impl=impl)
    best = vocab_parallel_candidates(hidden, weight, **options, **place)
    for x in (*logprobs, best.lse, best.entropy, best.sampled_logprobs):
        assert torch.equal(x.isnan(), bad)
    assert int(best.counts[BAD]) == 0 and bool((best.ids[BAD] == -1).all())
    assert bool((best.logprobs[BAD] == -math.inf).all()) and not bool(best.logprobs.isnan().any())
    clean = linear_candidates(hidden[~bad], weight, **{**options, "sampled": ids[~bad]})
    assert torch.equal(best.ids[~bad], clean.ids) and int(clean.counts.sum()) > N


def test_compiled_around_them(impl, device, case, place):
    """Their exchanges break the graph; what is left of it gives the same."""
    hidden, weight, ids = case

    def both(hidden):
        options = dict(temperature=0.75, impl=impl, **place)
        best = vocab_parallel_candidates(hidden + 1, weight, min_prob=0.05, **options)
        return *found(best), *found(vocab_parallel_logprobs(hidden + 1, weight, ids, **options))

    torch._dynamo.reset()
    for mine, theirs in zip(torch.compile(both, backend="eager")(hidden), both(hidden), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [(2, 3), (3, 0)], ids=str)
def test_leading_dimensions(impl, device, case, place, rows):
    hidden, weight, ids = case
    used = math.prod(rows)
    batches, tokens = hidden[:used].view(*rows, D), ids[:used].view(rows)
    options = dict(return_entropy=True, impl=impl)
    got = vocab_parallel_candidates(batches, weight, min_prob=0.05, sampled=tokens, **options, **place)
    want = linear_candidates(batches, weight, min_prob=0.05, sampled=tokens, **options)
    assert got.ids.shape == (*rows, 20) and got.sampled_logprobs.shape == got.counts.shape == rows
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    whole = linear_logprobs(batches, weight, tokens, **options)
    for mine, theirs in zip(
        vocab_parallel_logprobs(batches, weight, tokens, **options, **place), whole, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_more_slots_than_the_largest_shard_can_fill(impl, device, place, only_triton):
    """Known before anything is computed, by the largest shard: ranks with smaller ones would wait."""
    hidden, weight = torch.randn(2, 4, device=device), torch.randn(16385, 4, device=device)
    with pytest.raises(ValueError, match=r"^vocab_parallel_candidates: top_k must be at most 512 .* V=16385"):
        vocab_parallel_candidates(hidden, weight, min_prob=None, top_k=513, impl=impl, **place)
