"""Advantages of a rollout batch under both presets: 256 prompts x 4 rollouts of 1 to 1024 tokens, K = 10
candidates, about 525,000 tokens (--quick: a quarter of the prompts and of the length).

Yardstick: the same on padded (B, T) rows in eager PyTorch, with a loop over time for GAE, as the released
code has it. "candidates / sigma alone" is the least that any implementation, fused or not, has to do: one
pass over the (N, K) temporal differences.

Would a fused op pay? No, so it stays composed. The last row is what the same batch costs in the policy loss:
the bare `hidden @ weight.T` of the head, of which `linear_distrl_loss` runs at least three, on one block of
the batch's tokens; its name says how many such blocks the batch has. "composed" is a tiny part of their sum
(benchmarks/results/README.md, advantages), so that even a free op would save nothing that shows. The rows
named "part" are pieces of "composed", to be read beside it: scaling by sigma_V (Eq. 25), moments of the
prompts (Eq. 27, paper alone), GAE (Eq. 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.suite.heads import shapes
from benchmarks.suite.measure import Case, assert_close
from benchmarks.suite.sequences import edges
from ipvrm.losses.advantages import AdvantageConfig, distrl_advantages, gae
from ipvrm.losses.prompt_groups import Moments, PromptGroups, batch_moments, moments, one_rank, segment_sums
from ipvrm_kernels import segment_scan, unpack

OP = "advantages"
ROLLOUTS, K = 4, 10
USED = 0.133  # of the candidate slots


def cases(device: str, quick: bool) -> Iterator[Case]:
    prompts, longest = (64, 256) if quick else (256, 1024)
    B = prompts * ROLLOUTS
    lengths = torch.randint(1, longest + 1, (B,)).tolist()
    cu = edges(lengths, device)
    N = int(cu[-1])
    last = cu[1:].long() - 1
    td = torch.randn(N, device=device).index_fill_(0, last, 0.0)
    candidate_td = torch.where(torch.rand(N, K, device=device) < USED, torch.randn(N, K, device=device), 0.0)
    candidate_td.index_fill_(0, last, 0.0)
    outcome = (torch.rand(B, device=device) < 0.5).float()
    group = torch.arange(B, device=device) // ROLLOUTS  # neighbours, which the padded code takes for granted
    T = max(lengths)
    padded, padded_candidates = unpack(td, cu, T), unpack(candidate_td, cu, T)
    mask = unpack(torch.ones(N, device=device), cu, T)
    head = shapes(device, quick)[0]
    hidden = torch.randn(head.N, head.D, device=device).to(head.dtype)
    weight = torch.randn(head.V, head.D, device=device).to(head.dtype)

    groups, token_counts = PromptGroups(OP, group, prompts), cu.diff()

    def scaling() -> tuple[Tensor, Tensor]:
        sigma = batch_moments(segment_scan(td, cu), one_rank).std + 1e-6
        return td / sigma, candidate_td / sigma

    def group_moments() -> Moments:
        return moments(
            td,
            groups.sums(token_counts.to(td.dtype)),
            lambda x: groups.sums(segment_sums(x, cu)),
            lambda x: groups.spread(x).repeat_interleave(token_counts, output_size=N),
            one_rank,
        )

    for preset in ("paper", "release"):
        config = AdvantageConfig.preset(preset)

        def packed(config: AdvantageConfig = config) -> tuple[Tensor, Tensor]:
            out = distrl_advantages(td, candidate_td, outcome, cu, group, prompts, config=config)
            return out.advantages, out.candidate_advantages

        def loop(config: AdvantageConfig = config) -> tuple[Tensor, Tensor]:
            return padded_advantages(padded, padded_candidates, mask, outcome, prompts, config)

        head_name = f"hidden @ weight.T D={head.D} V={head.V} on {head.N} tokens (x {N / head.N:.0f} for all)"

        def check(results: Mapping[str, tuple[Tensor, Tensor]], cu: Tensor = cu, T: int = T) -> None:
            for mine, theirs in zip(results["composed"], results["padded loop"], strict=True):
                assert_close("advantages", unpack(mine, cu, T), theirs, 1e-4)

        contenders = {
            "padded loop": loop,
            "composed": packed,
            "part: sigma_V, td and candidates / sigma_V": scaling,
            "part: GAE": lambda config=config: gae(td, cu, discount=config.discount, lam=config.lam),
            "candidates / sigma alone": lambda: candidate_td / candidate_td.new_ones(()),
            head_name: lambda: hidden @ weight.T,
        }
        if config.gae_moments == "group":
            contenders["part: moments of the prompts' tokens"] = group_moments
        shape = f"{preset}: {prompts} prompts x {ROLLOUTS}, N={N} K={K}"
        least = 8 * N * (K + 1)  # td read and written once
        yield Case(OP, shape, contenders, check, num_bytes=least)


def padded_advantages(
    td: Tensor, candidate_td: Tensor, mask: Tensor, outcome: Tensor, prompts: int, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """td, mask (B, T), candidate_td (B, T, K), the rollouts of a prompt in neighbouring rows."""

    def floored(std: Tensor) -> Tensor:
        return std + 1e-6 if config.std_floor == "add" else std.clamp(min=1e-6)

    def moments(x: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:  # over the last axis
        size = within.sum(-1, keepdim=True)
        mean = (x * within).sum(-1, keepdim=True) / size
        return mean, (((x - mean) * within).square().sum(-1, keepdim=True) / size).sqrt()

    B, T = td.shape
    _, sigma = moments((td.cumsum(1) * mask).view(-1), mask.view(-1))
    scaled = td / floored(sigma)
    if config.gae_moments == "group":
        mean, std = moments(scaled.view(prompts, -1), mask.view(prompts, -1))
        x = ((scaled.view(prompts, -1) - mean) / floored(std)).view(B, T) * mask
    else:
        x = (scaled - moments(scaled.view(-1), mask.view(-1))[0]) * mask
    carry, columns = torch.zeros_like(td[:, 0]), []
    for t in reversed(range(T)):
        carry = x[:, t] + config.discount * config.lam * carry
        columns.append(carry)
    gae = torch.stack(columns[::-1], 1) * mask
    if config.whiten:
        mean, std = moments(gae.view(-1), mask.view(-1))
        size = mask.sum()
        gae = (gae - mean) / (std.square() * size / (size - 1) + 1e-8).sqrt()
    grouped = outcome.view(prompts, -1)
    mean, std = moments(grouped, torch.ones_like(grouped))
    first = ((grouped - mean) / floored(std)).view(B, 1)
    return (first + config.gae_coef * gae) * mask, candidate_td / floored(sigma)
