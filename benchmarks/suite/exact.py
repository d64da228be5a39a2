"""What the head ops must return, recomputed in fp64 on some of the rows: a check that costs little more than
one matmul, holds no (N, V) and needs no other contender."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.suite.measure import assert_close, assert_within, is_ours

ROWS = 128  # of the batch, of the first and the last one always two
VOCABULARY_ROWS = 64  # of dweight, where no eager gradient is there to compare it with
# the others' gradients may be off by so many times our tolerance: eager fp32 was 1.2e-4 and 1.8e-4 off in
# dhidden and dweight of linear_distrl_loss at V=151,936, and that is its accuracy, not a wrong result
OTHERS = 5
BLOCK = 8192  # rows of weight converted to fp64 at a time


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Of gradients, relative to the largest; in half precision they are rounded to it."""
    return 1e-4 if dtype == torch.float32 else 2e-2


class ExactStep(NamedTuple):
    """A training step of a model whose head is multiplied in fp32 and differentiated by PyTorch.

    gradients: one for each parameter. slope: by how much the loss moves, to first order, where every log-prob
    that it is made of is off by 1.
    """

    loss: Tensor
    gradients: Sequence[Tensor]
    slope: Tensor

    def compare(self, name: str, got: Sequence[Tensor], eager: Sequence[Tensor], allowed: float) -> None:
        """`got` is the loss and the gradients of one of ours.

        The loss may be off by what log-probs that are `allowed` off move it by; gradients by
        `gradient_tolerance`, or by twice what those of `eager`, full logits in the model's dtype, are off:
        what is rounded in the head's gradient goes through every layer, and small gradients are sums that
        cancel.
        """
        eps = 8 * torch.finfo(torch.float32).eps * self.loss.abs().item()
        assert_within(f"{name} loss", got[0], self.loss, self.slope.item() * allowed + eps)
        for mine, plain, right in zip(got[1:], eager[1:], self.gradients, strict=True):
            tolerance = gradient_tolerance(right.dtype) * right.abs().max().item()
            error = (plain.double() - right.double()).abs().max().item()
            assert_within(f"{name} gradient", mine, right, max(tolerance, 2 * error))


def exact_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """(N, K) log-probs of ids (N, K) from full fp32 logits."""
    logits = torch.nn.functional.linear(hidden.float(), weight.float()) / temperature
    return torch.log_softmax(logits, 1).gather(1, ids)


def eager_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The same from full logits in the operands' dtype, as a model's own head makes them."""
    logits = torch.nn.functional.linear(hidden, weight).float() / temperature
    return torch.log_softmax(logits, 1).gather(1, ids)


class Exact:
    """The distribution of ROWS rows in fp64, and lse of all rows.

    rows (R,) int64, lse (R,), log_p (R, V), entropy (R,). allowed: by how much a log-prob or lse may be off,
    2 x the error of PyTorch's own fp32 logits + 8 eps max |z|; at V = 151,936 and |z| <= 12 some 2e-5, where
    256 columns left out are 2e-3 and 128 zeros too many 1e-4. entropy_allowed: the same through dH/dz.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.rows = sample(hidden.shape[0], ROWS, hidden.device)
        h, off = self.hidden[self.rows], 0.0
        z = h.new_empty((len(h), len(weight)), dtype=torch.float64)
        for part, into in zip(self.weight.split(BLOCK), z.split(BLOCK, 1), strict=True):
            torch.mm(h.double(), part.double().T, out=into)
            off = max(off, (fp32_logits(h, part) - into).abs().max().item())
        self.lse = torch.logsumexp(z, 1)
        self.log_p = z - self.lse[:, None]
        p = self.log_p.exp()
        self.entropy = -(p * self.log_p).sum(1)
        self.allowed = 2 * off + 8 * torch.finfo(torch.float32).eps * z.abs().max().item()
        sensitivity = (p * (self.log_p + self.entropy[:, None]).abs()).sum(1).max().item()
        self.entropy_allowed = self.allowed * (1 + sensitivity)

    @functools.cached_property
    def lse_of_all(self) -> Tensor:
        """(N,) fp64 from fp32 logits, a part of the vocabulary at a time."""
        hidden = self.hidden.float()
        parts = [torch.logsumexp(hidden @ part.float().T, 1) for part in self.weight.split(BLOCK)]
        return torch.logsumexp(torch.stack(parts).double(), 0)

    def logprobs_of_all(self, ids: Tensor) -> Tensor:
        """(N, K) fp64 log-probs of ids (N, K) in every row."""
        blocks = zip(self.hidden.split(256), ids.split(256), strict=True)
        z = [(self.weight[i].double() @ h.double()[:, :, None])[:, :, 0] for h, i in blocks]
        return torch.cat(z) - self.lse_of_all[:, None]

    def compare(self, name: str, got: Tensor, expected: Tensor, allowed: float | None = None) -> None:
        """`got` (N, ...), of every row of the batch, with `expected` (R, ...) within `allowed`, absolute."""
        assert_within(name, got.detach()[self.rows], expected, self.allowed if allowed is None else allowed)

    def compare_gradients(
        self, name: str, gradients: Sequence[Tensor], ids: Tensor, upstream: Tensor,
        eager: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """(dhidden,) or (dhidden, dweight) of sum(upstream * log p(ids)), with ids and upstream (N, K).

        dhidden on `rows`; dweight against that of `eager`, without it on VOCABULARY_ROWS rows.
        """
        allowed = gradient_tolerance(self.hidden.dtype) * (1 if is_ours(name) else OTHERS)
        assert_close(f"{name} dhidden", gradients[0][self.rows], self.dhidden(ids, upstream), allowed)
        if len(gradients) == 1:
            return
        if eager is not None:
            assert_close(f"{name} dweight", gradients[1], eager[1], allowed)
            return
        tokens = sample(self.weight.shape[0], VOCABULARY_ROWS, ids.device)
        tokens[1 : 1 + VOCABULARY_ROWS // 2] = ids[: VOCABULARY_ROWS // 2, 0]  # random tokens have few ids
        dweight = self._dweight(tokens, ids, upstream)
        assert_close(f"{name} dweight", gradients[1][tokens], dweight, allowed)

    def dhidden(self, ids: Tensor, upstream: Tensor) -> Tensor:
        """(R, D) fp64 gradient of sum(upstream * log p(ids)), with ids and upstream (N, K)."""
        g, i = upstream[self.rows].double(), ids[self.rows]
        dz = (-g.sum(1, keepdim=True) * self.log_p.exp()).scatter_add(1, i, g)
        parts = zip(dz.split(BLOCK, 1), self.weight.split(BLOCK), strict=True)
        return torch.stack([d @ w.double() for d, w in parts]).sum(0)

    def error(self, got: Tensor, expected: Tensor) -> float:
        """The largest difference of `got` (N, ...), of every row of the batch, from `expected` (R, ...)."""
        return float((got.detach()[self.rows].double() - expected).abs().max())

    def relative_error(self, got: Tensor, expected: Tensor) -> float:
        """`error` over the largest number of `expected`."""
        return self.error(got, expected) / max(float(expected.abs().max()), 1e-30)

    def _dweight(self, tokens: Tensor, ids: Tensor, upstream: Tensor) -> Tensor:
        """(len(tokens), D) fp64, 256 rows at a time."""
        total = torch.zeros(len(tokens), self.hidden.shape[1], dtype=torch.float64, device=ids.device)
        rows = (self.hidden, ids, upstream.double(), self.lse_of_all)
        for h, i, g, lse in zip(*(x.split(256) for x in rows), strict=True):
            p = (h.double() @ self.weight[tokens].double().T - lse[:, None]).exp()
            hits = ((i[:, :, None] == tokens).double() * g[:, :, None]).sum(1)
            total += (hits - g.sum(1, keepdim=True) * p).T @ h.double()
        return total


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, V) of operands as they are, never rounded below fp32, as PyTorch multiplies them."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def sample(size: int, count: int, device: torch.device) -> Tensor:
    """(min(size, count),) int64, the same at each call: the first, the last, others at random."""
    inner = torch.randperm(max(size - 2, 0), generator=torch.Generator().manual_seed(0))[: count - 2] + 1
    return torch.cat([torch.tensor([0, size - 1])[:size], inner]).to(device)
