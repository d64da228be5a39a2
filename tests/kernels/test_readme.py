"""The examples of ipvrm_kernels/README.md in their order; what each recipe claims, against plain PyTorch."""

import math
import re
from pathlib import Path

import pytest
import torch

import ipvrm_kernels

README = Path(__file__).resolve().parents[2] / "ipvrm_kernels" / "README.md"


@pytest.fixture(scope="module")
def ran():
    """What the examples leave behind."""
    names = {}
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    ):
        exec(compile(block, f"{README.name}, example {number + 1}", "exec"), names)
    return names


def logprobs_of(hidden, weight):
    """(N, V) in fp64."""
    return (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)


def new_and_old(ran):
    """Log-probs of the sampled tokens (N,) under the heads of now and of then, by plain PyTorch."""
    return [
        logprobs_of(ran["hidden"], ran[name]).gather(1, ran["ids"][:, None])[:, 0]
        for name in ("weight", "old_weight")
    ]


def ratios(ran):
    new, old = new_and_old(ran)
    torch.testing.assert_close(ran["logprobs"].detach().double(), new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ran["old_logprobs"].double(), old, rtol=1e-5, atol=1e-5)
    return (new - old).exp()


def surrogate(rho, advantages, low=0.2, high=0.28):
    """-min(rho A, clip(rho) A), of which some must be clipped: else a wrong clip would not show."""
    free, clipped = rho * advantages, rho.clamp(1 - low, 1 + high) * advantages
    assert bool((clipped < free).any()) and bool((clipped >= free).any())
    return -torch.min(free, clipped)


def rows(r, of_token):
    return of_token.split(r["lengths"].tolist())


def sequence_mean(r, of_token):
    return torch.stack([row.mean() for row in rows(r, of_token)]).mean()


def close(got, want):
    torch.testing.assert_close(got.detach().double(), want, rtol=2e-5, atol=1e-6)


def test_rollout_weights_fold_into_the_advantages(ran):
    of_token = surrogate(ratios(ran), ran["advantages"].double())
    close(ran["weighted"], sequence_mean(ran, ran["w"].double() * of_token))


def test_loss_types(ran):
    of_token = surrogate(ratios(ran), ran["advantages"].double())
    want = {
        "grpo": sequence_mean(ran, of_token),
        "bnpo": of_token.mean(),
        "dapo": of_token.mean(),
        "dr_grpo": of_token.mean(),
    }
    denominators = {"dapo": 4096, "dr_grpo": 64 * 2048}  # in place of the N of this call
    for name, value in want.items():
        close(ran[name] * (denominators[name] / ran["N"] if name in denominators else 1), value)
    part_of_a_batch = ran["token_loss"](ran["logprobs"], ran["advantages"], token_denominator=64.0)
    close(part_of_a_batch, want["grpo"] * len(ran["lengths"]) / 64)


def test_masked_rows(ran):
    mask, old = ran["mask"], ran["old"]
    close(ran["sums"], (new_and_old(ran)[0] * mask).sum())
    of_token = surrogate(ratios(ran), ran["advantages"].double()) * mask
    real = old.ids >= 0  # (N, K)
    new = logprobs_of(ran["hidden"], ran["weight"]).gather(1, old.ids.clamp(min=0).long())
    pi_old = logprobs_of(ran["hidden"], ran["old_weight"]).gather(1, old.ids.clamp(min=0).long()).exp()
    rho, advantages = new.exp() / pi_old, ran["candidate_advantages"].double()
    of_candidates = torch.zeros_like(rho)
    of_candidates[real] = surrogate(rho[real], advantages[real])
    of_candidates = (pi_old * of_candidates).sum(1) * mask
    both = of_token + 0.1 * of_candidates
    close(ran["masked"], sequence_mean(ran, both))
    unmasked = [row.sum() / kept.sum() for row, kept in zip(rows(ran, both), rows(ran, mask), strict=True)]
    close(ran["by_unmasked"], torch.stack(unmasked).mean())
    assert not mask.all() and (ran["by_unmasked"] - ran["masked"]).detach().abs() > 1e-3
    gradient = torch.autograd.grad(ran["masked"], ran["hidden"], retain_graph=True)[0]
    assert not gradient[~mask].any() and gradient[mask].any()


def test_kl_estimators_average_to_the_kl(ran):
    """Over all tokens, weighted with their probability, k1 and k3 are the KL divergence."""
    p, q = torch.randn(2, 50).double().log_softmax(-1)
    delta, exact = p - q, float((p.exp() * (p - q)).sum())
    for estimate in (delta, torch.expm1(-delta) + delta):
        assert float((p.exp() * estimate).sum()) == pytest.approx(exact, rel=1e-9)
    of_reference = logprobs_of(ran["hidden"], ran["reference_weight"]).gather(1, ran["ids"][:, None])[:, 0]
    d = new_and_old(ran)[0] - of_reference
    assert bool((d > 0.1).any()) and bool((d < -0.1).any())  # a wrong sign would show
    k3 = torch.exp(-d) - 1 + d
    for name, want in {"k1": d, "k2": d**2 / 2, "k3": k3}.items():
        torch.testing.assert_close(ran[name].detach().double(), want, rtol=1e-4, atol=1e-5)
    of_token = surrogate(ratios(ran), ran["advantages"].double())
    close(ran["with_kl"], sequence_mean(ran, of_token + 0.01 * k3))


def test_gspo_has_one_ratio_for_a_sequence(ran):
    s = torch.stack([row.mean() for row in rows(ran, ratios(ran).log())]).exp()
    means = torch.stack([row.mean() for row in rows(ran, ran["advantages"].double())])
    free, clipped = s * means, s.clamp(1 - 3e-4, 1 + 4e-4) * means
    assert bool((clipped < free).any()) and bool((free < clipped).any())
    close(ran["gspo"], -torch.min(free, clipped).mean())


def test_cispo_clips_the_weight_and_not_the_gradient(ran):
    """-mean min(rho, 1.28) A log pi, its weight a constant; 1.28 binds somewhere."""
    rho = ratios(ran)
    assert bool((rho > 1.28).any()) and bool((rho < 1.28).any())
    weight = rho.clamp(max=1.28) * ran["advantages"].double()
    close(ran["cispo"], -sequence_mean(ran, weight * new_and_old(ran)[0]))
    gradient = torch.autograd.grad(ran["cispo"], ran["logprobs"], retain_graph=True)[0]
    of_row = torch.repeat_interleave(1 / ran["lengths"], ran["lengths"]) / len(ran["lengths"])
    close(gradient, -weight * of_row)


def test_sapo_gates_softly(ran):
    """-mean (4 / tau) sigmoid(tau (rho - 1)) A, tau 1 for A > 0 and 1.05 else."""
    rho, advantages = ratios(ran), ran["advantages"].double()
    assert bool((advantages > 0).any()) and bool((advantages < 0).any())
    gated = [
        4 / tau / (1 + math.exp(-tau * (float(r) - 1))) * float(a)
        for r, a in zip(rho, advantages, strict=True)
        for tau in [1.0 if a > 0 else 1.05]
    ]
    close(ran["sapo"], -sequence_mean(ran, torch.tensor(gated, dtype=torch.float64)))


def test_every_recipe_has_a_gradient(ran):
    names = (
        "weighted",
        "grpo",
        "bnpo",
        "dapo",
        "dr_grpo",
        "with_kl",
        "gspo",
        "cispo",
        "sapo",
        "sums",
        "masked",
    )
    for name in names:
        gradient = torch.autograd.grad(ran[name], ran["hidden"], retain_graph=True)[0]
        assert bool(gradient.isfinite().all()) and bool(gradient.any()), name


def test_temperature_per_row(ran):
    logits = ran["hidden"] @ ran["weight"].T / ran["T"][:, None]
    want = logits.log_softmax(-1).gather(1, ran["ids"][:, None])[:, 0]
    torch.testing.assert_close(ran["at_their_temperatures"], want, rtol=1e-4, atol=1e-5)


def test_leading_dimensions(ran):
    want = ran["logprobs"].view(2, 6)
    torch.testing.assert_close(ran["in_batches"].logprobs, want)
    assert ran["in_batches"].lse.shape == want.shape


def test_the_table_of_ops_fits_one_screen():
    """Every public op in the top-level README, in at most 30 lines of at most 200 characters."""
    text = (README.parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("## The ops, by the PyTorch they equal\n")[1].split("\nProven without a GPU")[0]
    lines = section.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 200
    table = [line for line in lines if line.startswith("| `")]
    assert all(any(f"`{op}" in line.split("|")[1] for line in table) for op in ipvrm_kernels.OPS)
