"""The ops in a CUDA graph: captured once, replayed on new numbers in the same memory, gradients too."""

import pytest
import torch

import ipvrm_kernels as ops

N, D, V, K = 96, 64, 1000, 3


def inputs(device):
    edges = torch.tensor([0, 40, 40, N], dtype=torch.int32, device=device)
    ids = torch.randint(0, V, (N, K), device=device)
    return edges, ids, torch.ones(3, device=device)


def distrl_loss(h, w, a, c, e, i, y):
    old, old_candidates = torch.full_like(a, -7.0), torch.full_like(c, -7.0)
    advantages = (a.detach(), c.detach())
    return ops.linear_distrl_loss(h, w, i[:, 0], i[:, 1:], old, old_candidates, *advantages, e).loss


def candidate_loss(x, c, a, b, e, i, y):
    """x (N,) and c (N, K - 1) log-probs, with advantages a and b of the same shapes."""
    old, others = torch.full_like(x, -1.0), torch.full_like(c, -1.0)
    return ops.distrl_loss(x, c, old, others, a.detach(), b.detach(), e).loss


def shard(h, w, e, i, y):
    part = ops.linear_logprobs_partial(h, w, i, vocab_start=0)
    return torch.cat([part.sumexp[:, None], part.sum_z_exp[:, None], part.id_logits], 1)


# name: (what varies from replay to replay, function of it, edges, ids and outcomes, whether it has gradients)
HALF, FULL = torch.bfloat16, torch.float32
CALLS = {
    "segment_scan": ([(N, FULL)], lambda x, e, i, y: ops.segment_scan(x, e, 0.9), True),
    "prefix_values": ([(N, FULL)], lambda x, e, i, y: ops.prefix_values(x, e).prob, True),
    "prefix_value_loss": ([(N, FULL)], lambda x, e, i, y: ops.prefix_value_loss(x, e, y), True),
    "clipped_surrogate": (
        [(N, FULL)],
        lambda x, e, i, y: ops.clipped_surrogate(x, torch.zeros_like(x), 1 - x.detach()).loss,
        True,
    ),
    "distrl_loss": (
        [(N, FULL), ((N, K - 1), FULL), (N, FULL), ((N, K - 1), FULL)],
        candidate_loss,
        True,
    ),
    "linear_logprobs_partial": ([((N, D), HALF), ((V, D), HALF)], shard, True),
    "linear_logprobs": (
        [((N, D), HALF), ((V, D), HALF)],
        lambda h, w, e, i, y: ops.linear_logprobs(h, w, i).logprobs,
        True,
    ),
    "linear_candidates": (
        [((N, D), HALF), ((V, D), HALF)],
        lambda h, w, e, i, y: ops.linear_candidates(h, w, top_k=K).logprobs,
        False,
    ),
    "linear_distrl_loss": (
        [((N, D), HALF), ((V, D), HALF), (N, FULL), ((N, K - 1), FULL)],
        distrl_loss,
        True,
    ),
}


def drawn(name, device):
    shapes, _, has_gradient = CALLS[name]
    new = [torch.randn(shape, device=device).to(dtype) for shape, dtype in shapes]
    return [x.requires_grad_(has_gradient) for x in new]


def called(name, leaves, fixed):
    """[the result, the gradients of the first two leaves]."""
    _, function, has_gradient = CALLS[name]
    out = function(*leaves, *fixed)
    return [out.detach(), *(torch.autograd.grad(out.sum(), leaves[:2]) if has_gradient else ())]


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_has_a_call_that_is_right_without_a_graph(name):
    results = called(name, drawn(name, "cpu"), inputs("cpu"))
    assert not any(x.isnan().any() for x in results)  # a slot without a candidate holds -inf
    assert all((x.isfinite() & (x != 0)).any() for x in results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU that torch can see")
@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph_replays(name):
    leaves, fixed = drawn(name, "cuda"), inputs("cuda")

    def run():
        return called(name, leaves, fixed)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and allocates what stays
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            for leaf, value in zip(leaves, drawn(name, "cuda"), strict=True):
                leaf.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        got = [x.clone() for x in captured]
        for mine, theirs in zip(got, run(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-5)
