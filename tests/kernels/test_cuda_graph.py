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


# name: (what varies from replay to replay, function of it, edges, ids and outcomes, whether it has gradients)
HALF, FULL = torch.bfloat16, torch.float32
CALLS = {
    "segment_scan": ([(N, FULL)], lambda x, e, i, y: ops.segment_scan(x, e, 0.9), True),
    "prefix_values": ([(N, FULL)], lambda x, e, i, y: ops.prefix_values(x, e).prob, True),
    "prefix_value_loss": ([(N, FULL)], lambda x, e, i, y: ops.prefix_value_loss(x, e, y), True),
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU that torch can see")
@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph_replays(name):
    shapes, function, has_gradient = CALLS[name]
    fixed = inputs("cuda")

    def new():
        return [torch.randn(shape, device="cuda").to(dtype) for shape, dtype in shapes]

    leaves = [x.requires_grad_(has_gradient) for x in new()]

    def run():
        out = function(*leaves, *fixed)
        wanted = leaves[:2] if has_gradient else []
        return [out.detach(), *(torch.autograd.grad(out.sum(), wanted) if has_gradient else ())]

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
            for leaf, value in zip(leaves, new(), strict=True):
                leaf.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        got = [x.clone() for x in captured]
        for mine, theirs in zip(got, run(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-5)
