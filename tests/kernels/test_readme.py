"""The examples of ipvrm_kernels/README.md in their order; what each recipe claims, against plain PyTorch."""

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


def eager_surrogate(r, advantages, low=0.2, high=0.28):
    """(N,) in fp64 from the definition."""
    rho = (r["logprobs"] - r["old_logprobs"]).detach().double().exp()
    return -torch.min(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def rows(r, of_token):
    return of_token.split(r["lengths"].tolist())


def test_rollout_weights_fold_into_the_advantages(ran):
    weights, advantages = ran["w"].double(), ran["advantages"].double()
    want = torch.stack([row.mean() for row in rows(ran, weights * eager_surrogate(ran, advantages))]).mean()
    torch.testing.assert_close(ran["weighted"].double(), want, rtol=1e-5, atol=1e-6)


def test_loss_types(ran):
    of_token = eager_surrogate(ran, ran["advantages"].double())
    want = {
        "grpo": torch.stack([row.mean() for row in rows(ran, of_token)]).mean(),
        "bnpo": of_token.mean(),
        "dapo": of_token.sum() / 4096,
        "dr_grpo": of_token.sum() / (64 * 2048),
    }
    for name, value in want.items():
        torch.testing.assert_close(ran[name].double(), value, rtol=1e-5, atol=1e-7)


def test_masked_rows(ran):
    logprobs = (ran["hidden"] @ ran["weight"].T).log_softmax(-1).gather(1, ran["ids"][:, None])[:, 0]
    torch.testing.assert_close(ran["sums"], (logprobs * ran["mask"]).sum(), rtol=1e-5, atol=1e-5)
    of_token = eager_surrogate(ran, ran["advantages"].double()) * ran["mask"]
    old = ran["old"]  # the policy has not moved since: every ratio is 1
    of_candidates = -(old.logprobs.exp() * ran["candidate_advantages"]).sum(1).double() * ran["mask"]
    want = torch.stack([row.mean() for row in rows(ran, of_token + 0.1 * of_candidates)]).mean()
    torch.testing.assert_close(ran["masked"].double(), want, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(ran["masked"], ran["hidden"], retain_graph=True)[0]
    assert torch.equal(gradient.any(1), ran["mask"])


def test_kl_estimators_average_to_the_kl(ran):
    """Over all tokens, weighted with their probability, k1 and k3 are the KL divergence."""
    p, q = torch.randn(2, 50).double().log_softmax(-1)
    delta, exact = p - q, float((p.exp() * (p - q)).sum())
    for estimate in (delta, torch.expm1(-delta) + delta):
        assert float((p.exp() * estimate).sum()) == pytest.approx(exact, rel=1e-9)
    d = (ran["logprobs"] - ran["reference"]).detach()
    torch.testing.assert_close(ran["k3"].detach(), torch.exp(-d) - 1 + d, rtol=1e-4, atol=1e-6)


def test_gspo_has_one_ratio_for_a_sequence(ran):
    ratios = [
        row.mean().exp() for row in rows(ran, (ran["logprobs"] - ran["old_logprobs"]).detach().double())
    ]
    means = [row.mean() for row in rows(ran, ran["advantages"].double())]
    want = [-min(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a) for s, a in zip(ratios, means, strict=True)]
    assert float(ran["gspo"].detach()) == pytest.approx(float(sum(want)) / 2, rel=1e-5)


def test_every_recipe_has_a_gradient(ran):
    for name in (
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
    ):
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
    section = text.split("## The ops, by the PyTorch they equal\n")[1].split("**No kernel of this release")[0]
    lines = section.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 200
    table = [line for line in lines if line.startswith("| `")]
    assert all(any(f"`{op}" in line.split("|")[1] for line in table) for op in ipvrm_kernels.OPS)
