"""A head whose vocabulary lies on two and three processes (gloo): ids, values and gradients equal one
process's."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ipvrm_kernels import (
    Partial,
    distrl_loss,
    linear_candidates,
    linear_distrl_loss,
    linear_logprobs,
    linear_logprobs_partial,
    merge_partials,
    vocab_parallel_candidates,
    vocab_parallel_logprobs,
)

N, D, V = 29, 8, 101
OPTIONS = dict(logit_scale=1.3, softcap=6.0, temperature=0.7)
# {name: (edges of the shards of 2 ranks, of 3 ranks)}
SPLITS = {
    "even": ((0, 51, V), (0, 34, 68, V)),
    "uneven": ((0, 90, V), (0, 3, 95, V)),
    "an empty shard": ((0, 0, V), (0, 60, 60, V)),
    "padded": ((0, 56, 112), (0, 40, 80, 120)),  # the last rows do not exist: vocab_size
    "all behind the end": ((0, 101, 103), (0, 101, 104, 107)),
}


# (how the refusal begins, options): what a rank without rows hands to no kernel, and must refuse all the same
BAD_OPTIONS = (
    ("temperature must be", dict(temperature=0.0)),
    ("temperature must be", dict(temperature=torch.tensor(-1.0))),
    ("logit_scale must be", dict(logit_scale=math.nan)),
    ("softcap must be", dict(softcap=-1.0)),
    ("impl='cuda' does not exist", dict(impl="cuda")),
    ("impl='nonsense' cannot run", dict(impl="nonsense")),
    ("min_prob must lie in", dict(min_prob=2.0, top_k=3)),
    ("min_prob must lie in", dict(min_prob=torch.tensor(2.0), top_k=3)),
)
BOTH = (vocab_parallel_candidates, vocab_parallel_logprobs)


def takers(options):
    return BOTH[:1] if "min_prob" in options else BOTH


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(N, D, generator=g)
    weight, bias = torch.randn(V, D, generator=g), torch.randn(V, generator=g)
    ids = torch.randint(-1, V, (N, 3), generator=g)
    ids[::2, 1] = ids[::2, 0]
    return hidden, weight, bias, ids


def shard_of(rank, edges):
    """(start, weight, bias) of a rank, with rows of rubbish where the split has more rows than the
    vocabulary."""
    _, weight, bias, _ = inputs()
    pad = edges[-1] - V
    weight = torch.cat([weight, torch.full((pad, D), 50.0)])
    bias = torch.cat([bias, torch.full((pad,), 50.0)])
    rows = slice(edges[rank], edges[rank + 1])
    return edges[rank], weight[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()


def objective(out, ids):
    mark = torch.linspace(-1, 2, N)
    picked = torch.where(ids >= 0, out.logprobs, 0.0).sum(1)
    return (mark * picked).sum() + (mark * out.lse).sum() - (mark.flip(0) * out.entropy).sum()


def distrl_inputs():
    """(token ids, candidates, advantages, candidate advantages, cu_seqlens) of the rows, from another
    head."""
    hidden, weight, bias, ids = inputs()
    g = torch.Generator().manual_seed(3)
    old = linear_candidates(
        hidden, weight + 0.1 * torch.randn(V, D, generator=g), sampled=ids[:, 0].clamp(min=0)
    )
    advantages = torch.randn(N, generator=g), torch.randn(N, old.ids.shape[1], generator=g)
    return ids[:, 0].clamp(min=0), old, *advantages, torch.tensor([0, 11, 12, N], dtype=torch.int32)


class AllReduce(torch.autograd.Function):
    """A vocabulary-parallel embedding's sum over the ranks; the gradient is the same on all of them."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def tied(embed, head_logprobs):
    """Loss of a model whose head is its embedding: hidden = tanh(embedding of the tokens)."""
    _, _, _, ids = inputs()
    tokens = ids.clamp(min=0)
    return head_logprobs(torch.tanh(embed(tokens[:, 0])), tokens[:, 2]).logprobs.sum()


def worker(rank, world, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    group, found = dist.group.WORLD, {}
    hidden, weight, bias, ids = inputs()
    for name, (of_two, of_three) in SPLITS.items():
        edges = of_two if world == 2 else of_three
        start, w, b = shard_of(rank, edges)
        place = dict(vocab_start=start, group=group, vocab_size=V if edges[-1] > V else None)
        h = hidden.clone().requires_grad_()
        out = vocab_parallel_logprobs(h, w, ids, bias=b, return_entropy=True, **place, **OPTIONS)
        gradients = torch.autograd.grad(objective(out, ids), (h, w, b))
        best = vocab_parallel_candidates(
            hidden, w, bias=b, sampled=ids[:, 2], min_prob=0.05, return_entropy=True, **place, **OPTIONS
        )
        plain = vocab_parallel_candidates(hidden, w, bias=b, min_prob=None, top_k=12, **place, **OPTIONS)
        rows = max(0, min(edges[rank + 1], V) - edges[rank])
        padding = [float(g[rows:].abs().sum()) for g in gradients[1:]]
        found[name] = (
            [x.detach() for x in (*out, gradients[0], *(g[:rows] for g in gradients[1:]))],
            [
                *best,
                plain.ids,
                plain.logprobs,
            ],
        )
        assert padding == [0.0, 0.0]

    start, w, _ = shard_of(rank, SPLITS["uneven"][world - 2])
    place = dict(vocab_start=start, group=group)
    tokens, old, advantages, candidate_advantages, cu = distrl_inputs()
    h = hidden.clone().requires_grad_()
    both = vocab_parallel_logprobs(h, w, torch.cat([tokens[:, None], old.ids], 1), **place).logprobs
    loss = distrl_loss(
        both[:, 0], both[:, 1:], old.sampled_logprobs, old.logprobs, advantages, candidate_advantages, cu
    ).loss
    found["distrl"] = [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    def embed(tokens):
        local = tokens - start
        mine = (local >= 0) & (local < len(w))
        return AllReduce.apply(w[torch.where(mine, local, 0)] * mine[:, None])

    def head(h, ids):
        return vocab_parallel_logprobs(h, w, ids, **place)

    found["tied"] = torch.autograd.grad(tied(embed, head), w)[0]

    in_batches = vocab_parallel_logprobs(
        hidden[:28].view(4, 7, D), w, ids[:28, 0].view(4, 7), fill_value=0.0, **place
    )
    found["batches"] = in_batches.logprobs.detach()
    empty = vocab_parallel_candidates(hidden[:0], w, **place)
    assert empty.ids.shape == (0, 10)

    found["refused"] = {}

    def refused(what, op, *args, **kwargs):
        try:
            op(*args, **kwargs)
        except ValueError as error:
            found["refused"][what, op.__name__] = str(error)

    sharded = distribute_tensor(weight, init_device_mesh("cpu", (world,)), [Shard(0)])
    for op, given in (
        (vocab_parallel_logprobs, lambda ids: {"ids": ids}),
        (vocab_parallel_candidates, lambda ids: {"sampled": ids[:, 0]}),
    ):
        refused("rows", op, hidden[: N - rank], w, **given(ids[: N - rank]), **place)
        refused("ids", op, hidden, w, **given(ids.roll(rank, 0)), **place)
        refused("cover", op, hidden, w, **given(ids), vocab_start=start + rank, group=group)
        refused("above", op, hidden, w, **given(ids + V), **place)
        refused("DTensor", op, hidden, sharded, **given(ids), **place)
    refused("K", vocab_parallel_candidates, hidden, w, top_k=5 + rank, **place)
    refused("K", vocab_parallel_logprobs, hidden, w, ids[:, : 1 + (rank > 0)], **place)
    trained = hidden.clone().requires_grad_(rank == 0)
    refused("gradient", vocab_parallel_logprobs, trained, w, ids, **place)
    start, w, _ = shard_of(rank, SPLITS["an empty shard"][world - 2])
    place = dict(vocab_start=start, group=group)
    for number, (_, options) in enumerate(BAD_OPTIONS):
        for op in takers(options):
            refused(number, op, hidden, w, *(() if op is BOTH[0] else (ids,)), **place, **options)

    if world == 3:  # ranks 0 and 2 share one head meanwhile, and rank 1 has another of its own
        groups = [dist.new_group([0, 2]), dist.new_group([1])]
        edges, place_in_group = ((0, V), 0) if rank == 1 else ((0, 90, V), rank // 2)
        start, w, b = shard_of(place_in_group, edges)
        place = dict(vocab_start=start, group=groups[rank % 2])
        h = (hidden * (1 + rank % 2)).requires_grad_()
        out = vocab_parallel_logprobs(h, w, ids, bias=b, return_entropy=True, **place)
        gradients = torch.autograd.grad(objective(out, ids), (h, w, b))
        best = vocab_parallel_candidates(h, w, bias=b, sampled=ids[:, 2], return_entropy=True, **place)
        found["groups"] = [x.detach() for x in (*out, *gradients)], [*best]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.full), 3])
def test_equals_one_process(tmp_path, world):
    mp.spawn(worker, (world, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    hidden, weight, bias, ids = inputs()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    whole = linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], return_entropy=True, **OPTIONS)
    dhidden, dweight, dbias = torch.autograd.grad(objective(whole, ids), leaves)
    best = linear_candidates(
        hidden, weight, bias=bias, sampled=ids[:, 2], min_prob=0.05, return_entropy=True, **OPTIONS
    )
    plain = linear_candidates(hidden, weight, bias=bias, min_prob=None, top_k=12, **OPTIONS)
    assert float(best.counts.double().mean()) > 2  # the threshold is one that matters
    close = dict(rtol=1e-5, atol=2e-5)
    for name in SPLITS:
        for values, candidates in (rank[name] for rank in ranks):
            for mine, theirs in zip(values[:4], (*whole, dhidden), strict=True):
                torch.testing.assert_close(mine, theirs.detach(), **close, msg=name)
            for mine, theirs in zip(candidates, (*best, plain.ids, plain.logprobs), strict=True):
                torch.testing.assert_close(mine, theirs, **close, msg=name)
        for place, theirs in ((4, dweight), (5, dbias)):
            torch.testing.assert_close(torch.cat([rank[name][0][place] for rank in ranks]), theirs, **close)

    tokens, old, advantages, candidate_advantages, cu = distrl_inputs()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = linear_distrl_loss(
        *leaves, tokens, old.ids, old.sampled_logprobs, old.logprobs, advantages, candidate_advantages, cu
    ).loss
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    for rank in ranks:
        torch.testing.assert_close(rank["distrl"][0], loss.detach(), **close)
        torch.testing.assert_close(rank["distrl"][1], dhidden, **close)
    torch.testing.assert_close(torch.cat([rank["distrl"][2] for rank in ranks]), dweight, **close)

    w = weight.clone().requires_grad_()
    loss = tied(lambda tokens: w[tokens], lambda h, ids: linear_logprobs(h, w, ids))
    torch.testing.assert_close(
        torch.cat([rank["tied"] for rank in ranks]), torch.autograd.grad(loss, w)[0], **close
    )
    want = linear_logprobs(hidden[:28], weight, ids[:28, 0], fill_value=0.0).logprobs.view(4, 7)
    for rank in ranks:
        torch.testing.assert_close(rank["batches"], want, **close)

    for rank in ranks:  # on every rank alike, so that none waits for another
        for op in ("vocab_parallel_logprobs", "vocab_parallel_candidates"):
            said = {what: words for (what, of), words in rank["refused"].items() if of == op}
            assert all(words.startswith(op) for words in said.values())
            name = "ids" if op == "vocab_parallel_logprobs" else "sampled"
            assert f"{name} must be below V={V}" in said["above"]
            assert "the same N" in said["rows"] and "FSDP2" in said["rows"]
            assert f"the same {name}" in said["ids"] and "number of ids or slots" in said["K"]
            assert "cover the vocabulary" in said["cover"]
            assert "got a DTensor" in said["DTensor"] and "gathered_weight" in said["DTensor"]
        assert "hidden.requires_grad" in rank["refused"]["gradient", "vocab_parallel_logprobs"]
        for number, (words, options) in enumerate(BAD_OPTIONS):
            for op in takers(options):
                assert rank["refused"][number, op.__name__].startswith(f"{op.__name__}: {words}")

    if world == 3:
        for members, scale in (([0, 2], 1), ([1], 2)):
            leaves = [x.requires_grad_() for x in (scale * hidden, weight.clone(), bias.clone())]
            whole = linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], return_entropy=True)
            dhidden, *dhead = torch.autograd.grad(objective(whole, ids), leaves)
            best = linear_candidates(
                scale * hidden, weight, bias=bias, sampled=ids[:, 2], return_entropy=True
            )
            found = [ranks[member]["groups"] for member in members]
            for values, candidates in found:
                torch.testing.assert_close(values[:4], [x.detach() for x in (*whole, dhidden)], **close)
                torch.testing.assert_close(candidates, [*best], **close)
            for place, theirs in zip((4, 5), dhead, strict=True):
                torch.testing.assert_close(torch.cat([values[place] for values, _ in found]), theirs, **close)


def gathered(own, rank):
    """Every rank's Partial: the others' values, and one's own with its graph, as `merge_partials` says."""
    shards = [[torch.empty_like(x) for x in own] for _ in range(2)]
    for field, x in enumerate(own):
        dist.all_gather([shard[field] for shard in shards], x.detach().contiguous())
    return [own if i == rank else Partial(*shard) for i, shard in enumerate(shards)]


def partial_worker(rank, rendezvous, folder, cut):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    hidden, weight, bias, ids = inputs()
    rows = slice(0, cut) if rank == 0 else slice(cut, V)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[rows], bias[rows])]
    own = linear_logprobs_partial(
        leaves[0], leaves[1], ids, vocab_start=rows.start, bias=leaves[2], **OPTIONS
    )
    out = merge_partials(gathered(own, rank), return_entropy=True)
    gradients = torch.autograd.grad(objective(out, ids), leaves)
    dist.all_reduce(gradients[0])  # every shard saw the whole hidden state
    torch.save([x.detach() for x in (*out, *gradients)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [40, 0, V], ids=["both", "rank 0 empty", "rank 1 empty"])
def test_partials_of_two_processes_equal_the_whole_head(tmp_path, cut):
    mp.spawn(partial_worker, (str(tmp_path / "rendezvous"), str(tmp_path), cut), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    hidden, weight, bias, ids = inputs()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    whole = linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], return_entropy=True, **OPTIONS)
    dhidden, dweight, dbias = torch.autograd.grad(objective(whole, ids), leaves)
    for found in ranks:
        for mine, theirs in zip(found[:3], whole, strict=True):
            torch.testing.assert_close(mine, theirs.detach())
        torch.testing.assert_close(found[3], dhidden)
    torch.testing.assert_close(torch.cat([found[4] for found in ranks]), dweight)
    torch.testing.assert_close(torch.cat([found[5] for found in ranks]), dbias)
