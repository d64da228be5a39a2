"""A head split over two processes (gloo): every rank's values and gradients equal the whole head's."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ipvrm_kernels import Partial, linear_logprobs, linear_logprobs_partial, merge_partials

N, D, V, CUT, WORLD = 37, 8, 101, 40, 2
OPTIONS = dict(logit_scale=1.3, softcap=6.0, temperature=0.7)


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, V, (N, 3), generator=g)
    ids[::2, 1] = ids[::2, 0]
    return (
        3 * torch.randn(N, D, generator=g),
        torch.randn(V, D, generator=g),
        torch.randn(V, generator=g),
        ids,
    )


def objective(out, ids):
    mark = torch.linspace(-1, 2, N)
    picked = torch.where(ids >= 0, out.logprobs, 0.0).sum(1)
    return (mark * picked).sum() + (mark * out.lse).sum() - (mark.flip(0) * out.entropy).sum()


def gathered(own, rank):
    """Every rank's Partial: the others' values, and one's own with its graph, as `merge_partials` says."""
    shards = [[torch.empty_like(x) for x in own] for _ in range(WORLD)]
    for field, x in enumerate(own):
        dist.all_gather([shard[field] for shard in shards], x.detach().contiguous())
    return [own if i == rank else Partial(*shard) for i, shard in enumerate(shards)]


def worker(rank, rendezvous, folder, cut):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
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
@pytest.mark.parametrize("cut", [CUT, 0, V], ids=["both", "rank 0 empty", "rank 1 empty"])
def test_two_processes_equal_the_whole_head(tmp_path, cut):
    mp.spawn(worker, (str(tmp_path / "rendezvous"), str(tmp_path), cut), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
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
