"""The head ops against the bare `hidden @ weight.T` of the same shape, dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, assert_close
from benchmarks.sequences import edges, runnable
from ipvrm_kernels import linear_candidates, linear_distrl_loss, linear_logprobs

OP = "head"
K = 8


def shapes(device: str, quick: bool) -> list[tuple[int, int, int, torch.dtype]]:
    """(N, D, V, dtype) of spec section 5, and a small one for a quick look."""
    if device == "cuda":
        wide = [(8192, D, 151_936, torch.bfloat16) for D in (1024, 4096)]
        return wide[:1] if quick else wide
    return [(512, 512, 8192, torch.float32)] if quick else [(2048, 1024, 32_000, torch.float32)]


def cases(device: str, quick: bool) -> Iterator[Case]:
    for N, D, V, dtype in shapes(device, quick):
        hidden = torch.randn(N, D, device=device).to(dtype)
        weight = (torch.randn(V, D, device=device) * D**-0.5 * 2).to(dtype)
        sampled = torch.randint(0, V, (N,), device=device)
        ids = torch.randint(0, V, (N, K), device=device)
        label = f"N={N} D={D} V={V} {str(dtype).removeprefix('torch.')}"
        flops = 2.0 * N * D * V

        def matmul(hidden: Tensor = hidden, weight: Tensor = weight) -> Tensor:
            return hidden @ weight.T

        def against_rows(
            run: Callable[[], Any], hidden=hidden, weight=weight, sampled=sampled
        ) -> Callable[[], None]:
            def check() -> None:
                rows = slice(0, 64)
                logp = torch.log_softmax(hidden[rows].float() @ weight.float().T, dim=1)
                expected = logp.gather(1, sampled[rows, None])[:, 0]
                assert_close("log-probs", run()[rows], expected, 1e-3)

            return check

        for impl in runnable("linear_logprobs", device):

            def forward(impl=impl, hidden=hidden, weight=weight, sampled=sampled) -> Any:
                with torch.no_grad():
                    return linear_logprobs(hidden, weight, sampled, return_entropy=True, impl=impl)

            checked = against_rows(lambda forward=forward: forward().logprobs)
            contenders = {"matmul": matmul, impl: forward}
            yield Case("linear_logprobs", f"{label} lse + sampled + entropy", contenders, checked, flops)
            yield from _backward(label, impl, hidden, weight, ids, matmul, flops)
        for impl in runnable("linear_candidates", device):

            def candidates(impl=impl, hidden=hidden, weight=weight, sampled=sampled) -> Any:
                return linear_candidates(hidden, weight, sampled=sampled, return_entropy=True, impl=impl)

            checked = against_rows(lambda candidates=candidates: candidates().sampled_logprobs)
            yield Case("linear_candidates", label, {"matmul": matmul, impl: candidates}, checked, flops)
        for impl in runnable("linear_distrl_loss", device):
            yield _distrl(label, impl, hidden, weight, sampled, ids, matmul, flops)


def _backward(label, impl, hidden, weight, ids, matmul, flops) -> Iterator[Case]:
    upstream = torch.randn(ids.shape, device=hidden.device)
    for frozen in (False, True):
        leaves = [hidden.detach().requires_grad_()]
        head = weight.detach().requires_grad_(not frozen)
        if not frozen:
            leaves.append(head)

        def step(leaves=tuple(leaves), head=head) -> tuple[Tensor, ...]:
            out = linear_logprobs(leaves[0], head, ids, impl=impl)
            return torch.autograd.grad((out.logprobs * upstream).sum(), leaves)

        def check(step=step) -> None:
            gradient = step()[0][:16].float()
            leaf = hidden[:16].detach().float().requires_grad_()
            logp = torch.log_softmax(leaf @ weight.float().T, dim=1).gather(1, ids[:16])
            (expected,) = torch.autograd.grad((logp * upstream[:16]).sum(), leaf)
            assert_close("d hidden", gradient, expected, 2e-2 if hidden.dtype == torch.bfloat16 else 1e-4)

        name = "frozen head" if frozen else "trainable head"
        shape = f"{label} K={ids.shape[1]} forward+backward {name}"
        yield Case("linear_logprobs", shape, {"matmul": matmul, impl: step}, check, flops)


def _distrl(label, impl, hidden, weight, sampled, ids, matmul, flops) -> Case:
    N, device = hidden.shape[0], hidden.device
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, sampled, impl=impl).logprobs
        old_candidates = linear_logprobs(hidden, weight, ids, impl=impl).logprobs
    cu = edges([N // 8] * 8, str(device))
    rows = N // 8 * 8
    advantages, candidate_advantages = torch.randn(N, device=device), torch.randn(ids.shape, device=device)

    def step() -> tuple[Tensor, ...]:
        out = linear_distrl_loss(
            leaves[0][:rows], leaves[1], sampled[:rows], ids[:rows], old[:rows], old_candidates[:rows],
            advantages[:rows], candidate_advantages[:rows], cu, impl=impl,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, leaves)

    def check() -> None:
        # at ratio 1 nothing clips and the loss is -mean(A rho): its gradient by the log-probs is -A / N
        leaf = hidden.detach().requires_grad_()
        logp = linear_logprobs(
            leaf[:rows], weight, torch.cat([sampled[:, None], ids], 1)[:rows], impl=impl
        ).logprobs
        scale = 1 / rows
        upstream = torch.cat([advantages[:, None], 0.1 * old_candidates.exp() * candidate_advantages], 1)[
            :rows
        ]
        (expected,) = torch.autograd.grad((-scale * logp * upstream).sum(), leaf)
        assert_close("d hidden", step()[0].float(), expected.float(), 2e-2)

    shape = f"{label} K={ids.shape[1]} forward+backward"
    return Case("linear_distrl_loss", shape, {"matmul": matmul, impl: step}, check, flops)
