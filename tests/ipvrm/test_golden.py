"""Every number of the golden vectors, what the released functions return, against the preset `release`.

A comparison is a function of a `Golden` file, which remembers what was compared; so one test can see to it
that no key is left out. Tolerances: 1e-5 relative to each value, 1e-4 where it is whitened. Near zero a value
is a difference of larger ones, and its error is judged against the largest value of its key (1e-6 of it) or,
for a scalar, against the mean of the absolute terms. Measured: at most 3e-7 of that scale for every key, and
1e-4 of an advantage near zero, 5e-5 of a GAE near zero, 4e-5 of a KL whose terms cancel.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import GOLDEN, PROCESSBENCH, RELEASES
from runs import released_scores

import ipvrm
from ipvrm.evaluate.thresholds import released_grid
from ipvrm_kernels import distrl_loss, pack, prefix_values, unpack

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed packages

from benchmarks.studies.release_differences import offline_gradient, released_offline_loss  # noqa: E402

INPUTS = {
    "mask", "log_ratio", "outcome", "group", "weight", "margin", "old_logp", "new_logp", "new_token_logp",
    "logits", "sampled",
}  # fmt: skip
# the released comparison behind it can never be true; README leaves the key out
LEFT_OUT = {"policy_pg_clipfrac_lower", "policy_topk_clipfrac_lower"}
ADVANTAGES = {"advantages_g1_l1": (1.0, 1.0), "advantages_g099_l095": (0.99, 0.95)}


class Golden:
    """One release_*.npz: inputs packed, results compared and remembered; the key `fault` is spoiled first."""

    def __init__(self, path, fault=None):
        self.fault = fault
        with np.load(path) as file:
            self.arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
        self.compared = set()
        self.mask = self.arrays["mask"]
        self.length = self.mask.shape[1]
        _, self.cu_seqlens = pack(self.mask, self.mask)
        self.outcome, self.group = self.arrays["outcome"], self.arrays["group"]
        self.num_groups = int(self.group.max()) + 1

    def __contains__(self, name):
        return name in self.arrays

    def packed(self, name):
        return pack(self.arrays[name], self.mask)[0]

    def compare(self, name, got, rtol=1e-5, scale=None, within=None):
        """`got` is packed (N, ...), or shaped as in the file. `scale`: of a scalar's terms. `within`: a mask,
        outside of which the released number means nothing and this package's is 0."""
        self.compared.add(name)
        expected = self.arrays[name]
        if within is not None:
            expected = torch.where(self.arrays[within], expected, 0.0)
        if name == self.fault:
            expected = spoiled(expected, rtol)
        if got.shape != expected.shape:
            got = unpack(got, self.cu_seqlens, self.length)
        largest = expected.to(torch.float64).abs().max().item() if scale is None else scale
        atol = 1e-6 * largest if expected.dim() or scale is not None else 0.0
        torch.testing.assert_close(
            got.detach().to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}"
        )


def compare_ipvrm_losses(golden):
    for kind, margin in (("scalar", 5.0), ("tensor", golden.arrays["margin"])):
        log_ratio = golden.packed("log_ratio").requires_grad_()
        loss, _ = ipvrm.ipvrm_loss(
            log_ratio, golden.cu_seqlens, golden.outcome, margin=margin, weight=golden.arrays["weight"]
        )
        golden.compare(f"ipvrm_{kind}_loss", loss)
        golden.compare(f"ipvrm_{kind}_grad", torch.autograd.grad(loss, log_ratio)[0])


def compare_offline_losses(golden):
    log_ratio = golden.packed("log_ratio")
    values = prefix_values(log_ratio, golden.cu_seqlens)
    golden.compare("offline_prefix_values", values.value, within="mask")  # padding: the sum goes on
    golden.compare("offline_mean_values", values.mean_value, within="mask")
    for margin in (5, 0):
        loss, _ = ipvrm.ipvrm_loss(
            log_ratio, golden.cu_seqlens, golden.outcome, margin=float(margin), reduction="token_mean"
        )
        golden.compare(f"offline_token_mean_loss_m{margin}", loss)


def compare_implicit_prm(golden):
    log_ratio = golden.packed("log_ratio").requires_grad_()
    loss, _ = ipvrm.implicit_prm_loss(log_ratio, golden.cu_seqlens, golden.outcome)
    golden.compare("implicit_prm_loss", loss)
    golden.compare("implicit_prm_grad", torch.autograd.grad(loss, log_ratio)[0])


def compare_dpo(golden):
    pairs = ipvrm.dpo_pairs(golden.outcome.tolist(), golden.group.tolist())
    if "dpo_pairs" not in golden:
        assert not len(pairs)
        return
    golden.compare("dpo_pairs", pairs)
    log_ratio = golden.packed("log_ratio").requires_grad_()
    loss, _ = ipvrm.dpo_loss(log_ratio, golden.cu_seqlens, pairs, denominator=1)
    golden.compare("dpo_sum_loss", loss)
    golden.compare("dpo_grad", torch.autograd.grad(loss, log_ratio)[0])


def compare_balance(golden):
    """Where outcomes agree the files pin a function that nothing calls; the preset follows the trainer."""
    of_prompt = [golden.outcome[golden.group == g] for g in range(golden.num_groups)]
    mixed = torch.tensor([bool(of_prompt[g].unique().numel() == 2) for g in golden.group.tolist()])
    for dlw in (0, 1):
        for adb in (0, 1):
            config = replace(ipvrm.BalanceConfig.preset("release"), dlw=bool(dlw), adb=bool(adb))
            balance = ipvrm.online_balance(
                golden.outcome, golden.group, golden.num_groups, margin=5.0, config=config
            )
            pinned = ipvrm.online_balance(
                golden.outcome,
                golden.group,
                golden.num_groups,
                margin=5.0,
                config=replace(config, drop_unanimous=False),
            )
            golden.compare(f"balance_dlw{dlw}_adb{adb}_weight", pinned.weight)
            golden.compare(f"balance_dlw{dlw}_adb{adb}_margin", pinned.margin)
            assert all(torch.equal(a[mixed], b[mixed]) for a, b in zip(balance, pinned, strict=True))
            assert not balance.weight[~mixed].any() and bool((balance.margin[~mixed] == 5).all())


def compare_candidates(golden):
    mask = ipvrm.candidate_mask(
        golden.packed("old_logp"), golden.cu_seqlens, ipvrm.CandidateConfig.preset("release")
    )
    golden.compare("candidate_mask", mask)
    # the file holds td alone: a reward model that has it, in fp64 so that the difference gives it back
    td, old = golden.packed("candidate_td").double(), golden.packed("old_logp").double()
    used_old = old.masked_fill(~mask, -math.inf)
    got = ipvrm.temporal_difference(old + td / 10.0, used_old, golden.cu_seqlens, beta=10.0)
    golden.compare("candidate_td", got, within="candidate_mask")


def release_advantages(golden, discount, lam):
    config = replace(ipvrm.AdvantageConfig.preset("release"), discount=discount, lam=lam)
    candidate_td = golden.packed("candidate_td")
    return ipvrm.distrl_advantages(
        candidate_td[:, 0], candidate_td, golden.outcome, golden.cu_seqlens, golden.group, golden.num_groups,
        config=config,
    )  # fmt: skip


def compare_advantages(golden):
    for name, (discount, lam) in ADVANTAGES.items():
        got = release_advantages(golden, discount, lam)
        golden.compare(name, got.advantages, rtol=1e-4)
        golden.compare("scaled_candidate_td", got.candidate_advantages)
        lengths = golden.cu_seqlens.diff()
        golden.compare("grpo_outcome_advantages", got.outcome_advantages.repeat_interleave(lengths))
    alone = ipvrm.outcome_advantages(golden.outcome, golden.group, golden.num_groups, std_floor="clamp")
    torch.testing.assert_close(alone, got.outcome_advantages)
    td = golden.packed("candidate_td")[:, 0]
    golden.compare("gae_raw_g099_l095", ipvrm.gae(td, golden.cu_seqlens, discount=0.99, lam=0.95))


def compare_policy_loss(golden):
    config = ipvrm.PolicyLossConfig.preset("release")
    kept = golden.packed("candidate_mask")
    old = golden.packed("old_logp")
    new = golden.packed("new_token_logp").requires_grad_()
    new_candidates = golden.packed("new_logp").requires_grad_()
    token_advantages = golden.packed("advantages_g1_l1")
    candidate_advantages = golden.packed("scaled_candidate_td")
    out = distrl_loss(
        new, new_candidates, old[:, 0], old.masked_fill(~kept, -math.inf), token_advantages,
        candidate_advantages, golden.cu_seqlens, **config.options(),
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, (new, new_candidates))
    golden.compare("policy_grad_token", gradients[0])
    golden.compare("policy_grad_candidates", gradients[1])
    mean = {name: total / count for name, (total, count) in out.metrics.items()}
    weight = old.exp() * kept
    kl = (old[:, 0] - new).abs().mean().item()
    candidate_kl = (weight * (old - new_candidates)).abs().sum().item() / kept.sum().item()
    size = token_advantages.abs().mean().item()
    candidate_size = ((weight * candidate_advantages).abs().sum() / weight.sum()).item()
    golden.compare("policy_pg_loss", out.token_loss, scale=size)
    golden.compare("policy_topk_pg_loss", out.candidate_loss, scale=candidate_size)
    golden.compare("policy_pg_clipfrac", mean["token_clip_fraction"])
    golden.compare("policy_topk_clipfrac", mean["candidate_clip_fraction"])
    golden.compare("policy_ppo_kl", mean["token_kl"], scale=kl)
    golden.compare("policy_topk_kl", mean["candidate_kl"], scale=candidate_kl)


def compare_forced_topk(golden):
    """From hidden states: with the identity for weights the logits are the states."""
    logits, sampled = golden.arrays["logits"].flatten(0, 1), golden.arrays["sampled"].flatten()
    K = golden.arrays["forced_topk_ids"].shape[-1]
    everything = ipvrm.CandidateConfig(min_prob=1e-30, top_k=K, keep_sampled=True)
    ending = torch.cat([logits, logits[:1]]), torch.cat([sampled, sampled[:1]])  # the last token has none
    found = ipvrm.select_candidates(
        ending[0], torch.eye(logits.shape[1]), ending[1],
        torch.tensor([0, len(ending[1])], dtype=torch.int32), config=everything,
    )  # fmt: skip
    golden.compare("forced_topk_ids", found.ids[:-1].view_as(golden.arrays["forced_topk_ids"]))
    golden.compare("forced_topk_logp", found.logprobs[:-1].view_as(golden.arrays["forced_topk_logp"]))


COMPARISONS = (
    compare_ipvrm_losses, compare_offline_losses, compare_implicit_prm, compare_dpo, compare_balance,
    compare_candidates, compare_advantages, compare_policy_loss, compare_forced_topk,
)  # fmt: skip


def test_golden_files_exist():
    assert RELEASES and PROCESSBENCH, f"no golden vectors in {GOLDEN}; set IPVRM_GOLDEN_DIR"


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda f: f.__name__.removeprefix("compare_"))
def test_golden_release(compare, path):
    golden = Golden(path)
    compare(golden)
    assert golden.compared or "dpo_pairs" not in golden


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_the_offline_gradient_of_the_preset_release_is_the_released_commands(path):
    """The command runs at micro-batch 1 with 8 accumulated; at equal tokens its gradient is the preset's,
    however that splits a batch. The pooled mean over tokens, one micro-batch of all rows, is another."""
    golden = Golden(path)
    log_ratio, mask, outcome = golden.arrays["log_ratio"], golden.mask, golden.outcome
    for margin in (5, 0):  # the transcription is the released function's
        loss = released_offline_loss(log_ratio, mask, outcome, margin=float(margin))
        golden.compare(f"offline_token_mean_loss_m{margin}", loss)
    found = offline_gradient([path])
    assert found["distance"] < 1e-6 and found["least_distance_of_pooled"] > 0.05


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_golden_every_key_is_compared(path):
    golden = Golden(path)
    for compare in COMPARISONS:
        compare(golden)
    assert golden.compared == set(golden.arrays) - INPUTS - LEFT_OUT


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda f: f.__name__.removeprefix("compare_"))
def test_golden_faults_are_seen(compare):
    """An expectation off by three tolerances in its largest value, or by one index or bit, fails."""
    golden = Golden(RELEASES[-1])
    compare(golden)
    for name in golden.compared:
        with pytest.raises(AssertionError, match=name):
            compare(Golden(RELEASES[-1], fault=name))


def spoiled(expected, rtol):
    values = expected.clone().flatten()
    at = values.to(torch.float64).abs().argmax()
    if values.is_floating_point():
        values[at] += max(3 * rtol * values[at].abs().item(), 1e-6)
    else:
        values[at] = ~values[at] if values.dtype == torch.bool else values[at] + 1
    return values.view_as(expected)


@pytest.mark.parametrize("path", PROCESSBENCH, ids=lambda path: path.stem)
def test_golden_processbench_grid(path):
    """The released grid is 1000 thresholds from -1 to 1, half of which no probability reaches. On it the best
    F1, and the first threshold that has it, are the file's."""
    data = json.loads(path.read_text())
    labels = [item["label"] for item in data["items"]]
    assert set(data) == {"items", "expected"} and len(data["expected"]) == 4
    for rule, expected in data["expected"].items():
        assert set(expected) == {"threshold", "f1"}
        scores = [released_scores(item)[rule] for item in data["items"]]
        tau, f1 = released_grid(scores, labels)
        assert tau == pytest.approx(expected["threshold"], rel=1e-5), rule
        assert f1.f1 == pytest.approx(expected["f1"], rel=1e-5), rule
