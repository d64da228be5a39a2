"""DistRLTrainer against TRL's own GRPOTrainer, and the parts of TRL that it relies on."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from runs import ruled_out

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PINNED = ("1.15.0", "1.16.0")  # the newest patch of each minor version of the extra `trl`


@pytest.fixture(scope="module")
def runs():
    """The module that needs TRL."""
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'ipvrm[trl]'")
    import trl_runs

    return trl_runs


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder):
    """`policy`, whose tokens differ in probability, and `rm`, a reward model near it."""
    from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model, template_hash
    from ipvrm.models.reward_model import RewardModelInfo, reference_entries, write_info

    home = tmp_path_factory.mktemp("trl")
    model, tokenizer = load_model(tiny_folder), load_tokenizer(tiny_folder)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.45, generator=g)
    for name in ("policy", "rm"):
        save_model(model, home / name)
        tokenizer.save_pretrained(home / name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    info = RewardModelInfo(
        objective="ipvrm", beta=2.0, margin=1.0, template_hash=template_hash(tokenizer), versions={},
        **reference_entries(home / "policy", home / "rm"),
    )  # fmt: skip
    write_info(home / "rm", info)
    return home


def farthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


SAME = {
    "dapo": {},
    "grpo, accumulation, temperature": {
        "loss_type": "grpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "temperature": 0.7
    },
    "bnpo, entropy": {"loss_type": "bnpo", "entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    "dr_grpo, several iterations": {"loss_type": "dr_grpo", "num_iterations": 2, "max_steps": 4},
    "dapo, reference model": {"beta": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("case", [*SAME, "lora"])
def test_without_its_weights_it_is_the_stock_trainer(runs, home, case):
    from peft import LoraConfig

    more = {}
    if case == "lora":
        more["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"
        )
    options = SAME.get(case, {})
    start = {
        n: p.detach().clone()
        for n, p in runs.trainer(
            home, runs.GRPOTrainer, runs.settings(runs.GRPOConfig, **options), **more
        ).model.named_parameters()
        if p.requires_grad
    }
    stock, _ = runs.trained(home, runs.GRPOTrainer, runs.settings(runs.GRPOConfig, **options), **more)
    config = runs.settings(runs.DistRLConfig, alpha=0.0, gae_coef=0.0, **options)
    ours, _ = runs.trained(home, runs.DistRLTrainer, config, **more)
    moved = farthest(start, stock)
    assert moved > 0 and farthest(stock, ours) <= 1e-4 * moved


def test_without_its_weights_it_is_the_stock_trainer_under_adamw(runs, home):
    """AdamW makes a step of lr from any gradient, near 0 too, so signs of rounding noise remain: 2 %."""
    options = dict(optim="adamw_torch", learning_rate=1e-3)
    stock, _ = runs.trained(home, runs.GRPOTrainer, runs.settings(runs.GRPOConfig, **options))
    config = runs.settings(runs.DistRLConfig, alpha=0.0, gae_coef=0.0, **options)
    ours, _ = runs.trained(home, runs.DistRLTrainer, config)
    start = dict(
        runs.trainer(home, runs.GRPOTrainer, runs.settings(runs.GRPOConfig)).model.named_parameters()
    )
    total = sum(float((stock[n] - start[n]).square().sum()) for n in stock) ** 0.5
    assert sum(float((stock[n] - ours[n]).square().sum()) for n in stock) ** 0.5 <= 0.02 * total


def observed(runs, home, **options):
    """(trainer, generation batch, inputs of one loss, that loss, the gradients before it moved) of one
    update."""
    config = runs.settings(runs.DistRLConfig, max_steps=1, **options)
    run, seen = runs.trainer(home, runs.DistRLTrainer, config), {}
    made, lost = run._generate_and_score_completions, run._compute_loss

    def generate(inputs):
        seen["batch"] = made(inputs)
        return seen["batch"]

    def compute(model, inputs):
        seen["inputs"], seen["loss"] = inputs, lost(model, inputs)
        seen["gradient"] = torch.autograd.grad(seen["loss"], list(model.parameters()), retain_graph=True)
        return seen["loss"]

    run._generate_and_score_completions, run._compute_loss = generate, compute
    run.train()
    return run, seen


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_from_full_logits(runs, home, loss_type):
    """The whole loss and its gradient against the definitions on the policy's own logits."""
    from ipvrm.models.causal_lm import load_model

    run, seen = observed(runs, home, loss_type=loss_type, alpha=0.7, epsilon=0.1, epsilon_high=0.15)
    x = seen["inputs"]
    mask, model = x["completion_mask"], load_model(home / "policy")
    B, T = mask.shape
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    attention = torch.cat([x["prompt_mask"], mask], 1)
    log_p = model(ids, attention_mask=attention).logits[:, -T - 1 : -1].log_softmax(-1)  # (B, T, V)
    logprobs = log_p.gather(2, x["completion_ids"][..., None])[..., 0]
    token = -(logprobs - logprobs.detach()).exp() * x["advantages"]
    slots, old = x["candidate_ids"], x["old_candidate_logps"]
    used = slots >= 0
    assert int(used.sum()) > B and not bool(used[:, -1].any())
    new = log_p.gather(2, slots.clamp(min=0))
    torch.testing.assert_close(torch.where(used, old, 0), torch.where(used, new, 0), rtol=1e-4, atol=1e-5)
    of_candidate = torch.where(
        used, -new.detach().exp() * (new - new.detach()).exp() * x["candidate_advantages"], 0
    )
    element = token + 0.7 * of_candidate.sum(-1)
    lengths = mask.sum(1)
    loss = {
        "grpo": ((element * mask).sum(1) / lengths).mean(),
        "bnpo": (element * mask).sum() / mask.sum(),
        "dr_grpo": (element * mask).sum() / (B * run.max_completion_length),
        "dapo": (element * mask).sum() / x["num_items_in_batch"],
    }[loss_type]
    torch.testing.assert_close(seen["loss"], loss, rtol=1e-4, atol=1e-6)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    scale = max(float(g.abs().max()) for g in gradient)
    for mine, theirs in zip(seen["gradient"], gradient, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_off_policy_from_full_logits(runs, home, loss_type):
    """One call of the loss where both branches clip, with vLLM's importance weights, tokens of a tool and two
    accumulation steps out of a generation batch of four."""
    from ipvrm.models.causal_lm import load_model

    config = runs.settings(
        runs.DistRLConfig, loss_type=loss_type, alpha=0.7, epsilon=0.1, epsilon_high=0.15, temperature=0.7,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4,
    )  # fmt: skip
    run = runs.trainer(home, runs.DistRLTrainer, config)
    run.model.train()
    run.use_vllm = run.vllm_importance_sampling_correction = True  # the loss itself asks no server
    run.current_gradient_accumulation_steps = 2  # what the training loop would say
    g, B, P, T, K = torch.Generator().manual_seed(7), 4, 3, 6, 3
    ids = torch.randint(10, 200, (B, P + T), generator=g)
    x = {
        "prompt_ids": ids[:, :P], "prompt_mask": torch.ones(B, P, dtype=torch.int64),
        "completion_ids": ids[:, P:],
        "completion_mask": (torch.arange(T) < torch.tensor([[6], [4], [5], [2]])).long(),
        "tool_mask": torch.ones(B, T, dtype=torch.int64), "num_items_in_batch": torch.tensor(53.0),
        "advantages": torch.randn(B, T, generator=g),
        "candidate_advantages": torch.randn(B, T, K, generator=g),
        "importance_sampling_ratio": 0.5 + torch.rand(B, T, generator=g),
    }  # fmt: skip
    x["tool_mask"][0, 2] = x["tool_mask"][2, 1:3] = 0
    model = load_model(home / "policy")
    attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    logits = model(ids, attention_mask=attention).logits[:, -T - 1 : -1]  # (B, T, V)
    log_p = (logits / 0.7).log_softmax(-1)
    used = torch.rand(B, T, K, generator=g) < 0.7
    slots = torch.where(used, torch.randint(10, 200, (B, T, K), generator=g), -1)
    logprobs = torch.cat([x["completion_ids"][..., None], slots.clamp(min=0)], 2)
    logprobs = log_p.gather(2, logprobs)  # (B, T, 1 + K)
    old = logprobs.detach() + 0.3 * torch.randn(B, T, 1 + K, generator=g)
    x["old_per_token_logps"], x["candidate_ids"] = old[..., 0], slots
    x["old_candidate_logps"] = old[..., 1:].masked_fill(~used, -torch.inf)

    of = torch.cat([x["advantages"][..., None], x["candidate_advantages"]], 2)
    ratio = (logprobs - old).exp()
    plain, clipped = ratio * of, ratio.clamp(0.9, 1.15) * of
    mask = x["completion_mask"] * x["tool_mask"]
    acts = (clipped < plain) & mask[..., None].bool()
    assert int(acts[..., 0].sum()) > 1 and int((acts[..., 1:] & used).sum()) > 5
    surrogate = -torch.min(plain, clipped)
    candidates = torch.where(used, old[..., 1:].exp() * surrogate[..., 1:], 0).sum(-1)
    element = (surrogate[..., 0] + 0.7 * candidates) * x["importance_sampling_ratio"] * mask
    want = {
        "grpo": (element.sum(1) / mask.sum(1)).mean() / 2,
        "bnpo": element.sum() / mask.sum() / 2,
        "dr_grpo": element.sum() / (B * run.max_completion_length) / 2,
        "dapo": element.sum() / (53.0 * 2 / 4),
    }[loss_type]
    loss = run._compute_loss(run.model, x)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
    gradient = torch.autograd.grad(want, list(model.parameters()))
    scale = max(float(d.abs().max()) for d in gradient)
    for mine, theirs in zip(torch.autograd.grad(loss, list(run.model.parameters())), gradient, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)


def test_dense_advantages_against_our_own_trainers_path(runs, home):
    """td, sigma_V and GAE of the rollouts again, from packed right-padded responses and the ops of
    train-policy."""
    from ipvrm import AdvantageConfig, distrl_advantages, temporal_difference
    from ipvrm.data.batches import collate
    from ipvrm.data.responses import Response
    from ipvrm.models.causal_lm import candidate_logprobs, load_model, response_logprobs
    from ipvrm_kernels import pack

    run, seen = observed(runs, home, gae_coef=1.0)
    out, order = seen["batch"], []
    responses = []
    for i, mask in enumerate(out["completion_mask"].bool()):
        prompt = out["prompt_ids"][i][out["prompt_mask"][i].bool()].tolist()
        responses.append(Response((*prompt, *out["completion_ids"][i][mask].tolist()), len(prompt)))
        order.append(i // 4)
    batch, mask = collate(responses), out["completion_mask"].bool()
    slots = pack(out["candidate_ids"], mask)[0]
    with torch.no_grad():
        old = response_logprobs(load_model(home / "policy"), batch)
        rm, _, rm_candidates = candidate_logprobs(load_model(home / "rm"), batch, slots, 1.0)
    td = temporal_difference(rm, old, batch.cu_seqlens, beta=2.0)
    candidate_td = temporal_difference(
        rm_candidates, pack(out["old_candidate_logps"], mask)[0], batch.cu_seqlens, beta=2.0
    )
    want = distrl_advantages(
        td, candidate_td, torch.zeros(8), batch.cu_seqlens, torch.tensor(order), 2, config=AdvantageConfig()
    )
    # TRL's own term is the same for all tokens of a response; the two of one response differ by GAE alone
    rewards = run._rewards.view(2, 4)
    outcome = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    found = pack(out["advantages"] - outcome[:, None], mask)[0]
    torch.testing.assert_close(found, want.gae, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        pack(out["candidate_advantages"], mask)[0].where(slots >= 0, 0.0),
        want.candidate_advantages.where(slots >= 0, 0.0), rtol=2e-3, atol=2e-3,
    )  # fmt: skip


def test_population_std(runs, home):
    run, seen = observed(runs, home, alpha=0.1, gae_coef=0.0, group_std="population")
    r = run._rewards.view(2, 4).double()
    want = (r - r.mean(1, keepdim=True)) / (r.var(1, correction=0, keepdim=True).sqrt() + 1e-6)
    torch.testing.assert_close(
        seen["batch"]["advantages"].double().mean(1), want.flatten(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_online_reward_model_learns_and_is_saved(runs, home, tmp_path, when):
    from ipvrm import RewardModel
    from ipvrm.models.causal_lm import load_model, load_tokenizer, template_hash
    from ipvrm.models.reward_model import read_info, write_info

    stock, home = home, tmp_path / "home"  # whose template reads a variable
    shutil.copytree(stock, home)
    tokenizer = load_tokenizer(stock / "policy")
    tokenizer.chat_template = "{% if not thinking %}{% endif %}" + tokenizer.chat_template
    for name in ("policy", "rm"):
        tokenizer.save_pretrained(home / name)
    info = replace(read_info(home / "rm"), template_hash=template_hash(tokenizer))
    write_info(home / "rm", info)
    config = runs.settings(
        runs.DistRLConfig,
        rm_update=when,
        rm_learning_rate=1e-3,
        max_steps=2,
        chat_template_kwargs={"thinking": False},
    )
    _, run = runs.trained(home, runs.DistRLTrainer, config)
    run.save_model(str(out := tmp_path / "out"))
    saved = RewardModel.from_pretrained(out / "reward_model", device="cpu")
    assert saved.info.chat_template_kwargs == {"thinking": False}  # of the prompts that it has learnt from
    start, behaviour = load_model(home / "rm"), run.prefix_rewards.behaviour
    assert any(
        not torch.equal(a, b) for a, b in zip(saved.model.parameters(), start.parameters(), strict=True)
    )
    for name, p in saved.reference.named_parameters():  # the policy of the last rollouts, not the final one
        torch.testing.assert_close(p, behaviour[name])
    policy = dict(run.model.named_parameters())
    assert any(not torch.equal(policy[name], value) for name, value in behaviour.items())
    last = next(line for line in reversed(run.state.log_history) if "loss" in line)
    cards = [(folder / "README.md").read_text() for folder in (out, out / "reward_model")]
    loss = last["distrl/reward_model_loss"]
    for card in cards:
        assert "| prompts | 16 |" in card and f"| distrl/reward_model_loss | {loss:.4g} |" in card
    assert "# Policy trained by distrl" in cards[0] and "trained against in `reward_model`" in cards[0]
    assert "| objective | ipvrm |" in cards[0] and f"| rm_update | {when} |" in cards[0]
    assert str(home) not in "".join(cards)


def by_two_ranks(home, tmp_path, what, **environment):
    """What `trl_runs.{what}` finds in the main one of two gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/ipvrm"), *sys.path])
    done = subprocess.run(
        [*command, str(ROOT / "tests/ipvrm/trl_runs.py"), str(home), str(tmp_path / "two.pt"), what],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(tmp_path / "two.pt", weights_only=True)


@pytest.mark.full
def test_two_ranks_equal_one_and_the_stock_trainer(runs, home, tmp_path):
    """Groups of 8 lie on both ranks; the reward model is updated online as well."""
    from ipvrm.models.causal_lm import load_model

    one, two = runs.on_all_ranks(home), by_two_ranks(home, tmp_path, "on_all_ranks")
    assert (one["world"], two["world"]) == (1, 2)
    for name, start in (("policy", "policy"), ("reward model", "rm"), ("stock", "policy")):
        begin = {n: p.detach() for n, p in load_model(home / start).named_parameters()}
        moved = farthest(begin, one[name])
        # AdamW of the reward model: see the 2 % above
        assert moved > 0 and farthest(one[name], two[name]) <= (2e-2 if start == "rm" else 1e-3) * moved
    assert farthest(two["stock"], two["without weights"]) <= 1e-4 * moved


@pytest.mark.full
def test_shards_of_two_ranks_learn_what_one_process_learns(runs, home, tmp_path):
    """FSDP2 as accelerate makes it of `ipvrm/integrations/launch/trl_fsdp2.yaml`, in fp32."""
    import yaml

    from ipvrm.models.causal_lm import load_model

    config = yaml.safe_load((ROOT / "ipvrm/integrations/launch/trl_fsdp2.yaml").read_text())
    given = {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    assert config["distributed_type"] == "FSDP" and given["FSDP_VERSION"] == "2"
    two = by_two_ranks(home, tmp_path, "in_shards", ACCELERATE_USE_FSDP="true", **given)
    one = runs.in_shards(home)
    assert two["sharded"] and {"", "lm_head", "model.layers.0", "model.norm"} <= set(two["units"])
    assert not one["sharded"] and one["units"] == []
    begin = {n: p.detach() for n, p in load_model(home / "policy").named_parameters()}
    moved = farthest(begin, one["policy"])
    assert moved > 0 and farthest(one["policy"], two["policy"]) <= 1e-4 * moved
    assert farthest(two["policy"], two["saved"]) == 0


def refusal(action):
    from ipvrm import IpvrmError

    with pytest.raises(IpvrmError) as caught:
        action()
    return str(caught.value)


REFUSED = {
    "cispo": ({"loss_type": "cispo"}, "loss_type 'cispo'"),
    "sapo": ({"loss_type": "sapo"}, "loss_type 'sapo'"),
    "vespo": ({"loss_type": "vespo"}, "loss_type 'vespo'"),
    "luspo": ({"loss_type": "luspo"}, "loss_type 'luspo'"),
    "sequence": ({"importance_sampling_level": "sequence"}, "a ratio of a sequence|no ratio of a sequence"),
    "fp32 head": ({"cast_lm_head_to_fp32": True}, "logits are never rounded here"),
    "off policy": ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    "population of the batch": (
        {"group_std": "population", "scale_rewards": "batch"},
        "group_std='population'",
    ),
    "nothing to weigh": ({"alpha": 0.0, "gae_coef": 0.0, "reward_model": "rm"}, "alpha and gae_coef weigh"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(runs, home, case):
    import re

    options, words = REFUSED[case]
    options = dict(options)
    more = {"reward_model": home / options.pop("reward_model")} if "reward_model" in options else {}
    config = runs.settings(runs.DistRLConfig, **options)
    assert re.search(words, refusal(lambda: runs.trainer(home, runs.DistRLTrainer, config, **more)))


def test_refuses_what_does_not_belong_together(runs, home, monkeypatch):
    config = runs.settings(runs.DistRLConfig)
    plain = runs.settings(runs.GRPOConfig)
    make = runs.trainer
    assert "must be a DistRLConfig" in refusal(
        lambda: make(home, runs.DistRLTrainer, plain, reward_model=home / "rm")
    )
    assert "give reward_model" in refusal(lambda: make(home, runs.DistRLTrainer, config, reward_model=None))

    from ipvrm.models.causal_lm import load_tokenizer

    other = load_tokenizer(home / "policy")
    other.chat_template = other.chat_template + " "
    assert "another chat template" in refusal(
        lambda: make(home, runs.DistRLTrainer, config, processing_class=other)
    )
    grown = load_tokenizer(home / "policy")
    grown.add_tokens(["<more>"])
    assert "its tokenizer is not the policy's" in refusal(
        lambda: make(home, runs.DistRLTrainer, config, processing_class=grown)
    )
    vlm = make(home, runs.DistRLTrainer, config)
    monkeypatch.setattr(vlm, "_is_vlm", True)
    assert "multimodal" in refusal(vlm._refuse_unknown)
    assert "multimodal" in refusal(
        lambda: vlm._get_per_token_logps_and_entropies(vlm.model, None, None, 1, pixel_values=torch.ones(1))
    )
    import ipvrm.integrations.trl as ours

    monkeypatch.setattr(vlm, "_is_vlm", False)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    assert "ZeRO-3" in refusal(vlm._refuse_unknown)
    monkeypatch.undo()
    monkeypatch.setattr(vlm, "is_fsdp_enabled", True)
    vlm._refuse_unknown()
    monkeypatch.setattr(vlm, "ref_model", vlm.model)
    assert "which TRL shards before its head can be patched" in refusal(vlm._refuse_unknown)
    monkeypatch.setattr(vlm, "ref_model", None)
    monkeypatch.setattr(vlm.args, "rm_update", "before")
    assert "which FSDP was not tested with" in refusal(vlm._refuse_unknown)
    monkeypatch.undo()

    graded = runs.settings(runs.DistRLConfig, rm_update="before")
    half = make(
        home, runs.DistRLTrainer, graded, reward_funcs=lambda completions, **_: [0.5] * len(completions)
    )
    assert "rewards of 0 and 1" in refusal(half.train)
    assert "is not resumed" in refusal(lambda: half.train(resume_from_checkpoint=True))


def beside_a_policy(home, folder, objective, update, **settings):
    """What DistRLTrainer makes of a reward model of `objective`, in `folder`; TRL is not needed for it."""
    from types import SimpleNamespace

    from ipvrm.integrations.trl_reward_model import PrefixRewardModel
    from ipvrm.models.causal_lm import load_tokenizer, vocab_size
    from ipvrm.models.reward_model import read_info, write_info

    shutil.copytree(home / "rm", folder)
    write_info(folder, replace(read_info(folder), objective=objective))
    return PrefixRewardModel(
        folder, load_tokenizer(home / "policy"), vocab_size(home / "policy"),
        SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext), torch.float32,
        template_kwargs=settings.pop("template_kwargs", {}), online=update != "frozen", learning_rate=1e-3,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "update", "words"),
    [
        ("q_rm", "frozen", "gives no log-ratio of a model and its reference"),
        ("q_rm", "before", "gives no log-ratio of a model and its reference"),
        ("endo_rm", "frozen", "gives no log-ratio of a model and its reference"),
        ("endo_rm", "before", "gives no log-ratio of a model and its reference"),
        ("dpo", "before", "learns from pairs of a right and a wrong response"),
    ],
)
def test_refuses_reward_models_whose_log_ratios_mean_nothing_here(home, tmp_path, objective, update, words):
    assert words in refusal(lambda: beside_a_policy(home, tmp_path / "rm", objective, update))


@pytest.mark.parametrize(
    ("objective", "update"),
    [
        ("ipvrm", "frozen"), ("ipvrm", "before"), ("implicit_prm", "frozen"), ("implicit_prm", "before"),
        ("dpo", "frozen"),
    ],
)  # fmt: skip
def test_takes_reward_models_of_log_ratios(home, tmp_path, objective, update):
    rm = beside_a_policy(home, tmp_path / "rm", objective, update)
    assert rm.objective.name == objective and (rm.optimizer is None) == (update == "frozen")


@pytest.mark.parametrize("setting", [{"dlw": False}, {"adb": False}, {"margin": 2.0}])
@pytest.mark.parametrize(("objective", "update"), [("implicit_prm", "before"), ("ipvrm", "frozen")])
def test_refuses_settings_that_the_reward_model_does_not_read(home, tmp_path, objective, update, setting):
    name = {"margin": "rm_margin"}.get(*setting, *setting)
    words = refusal(lambda: beside_a_policy(home, tmp_path / "rm", objective, update, **setting))
    assert f"{name}: of the online update of an ipvrm model alone" in words and repr(objective) in words
    rm = beside_a_policy(home, tmp_path / "other", "ipvrm", "before", **setting)  # there it is read
    assert (rm.balance.dlw, rm.balance.adb) == (setting.get("dlw", True), setting.get("adb", True))
    assert rm.objective.margin == setting.get("margin", 1.0)


def test_prompts_of_other_template_variables_are_warned_of_and_longer_ones_than_its_positions_refused(
    home, tmp_path, recwarn
):
    unread = {"thinking": False}
    rm = beside_a_policy(home, tmp_path / "same", "ipvrm", "frozen")
    words = refusal(
        lambda: beside_a_policy(home, tmp_path / "learns", "ipvrm", "before", template_kwargs=unread)
    )
    assert "the chat template does not read 'thinking'" in words  # what is saved could not be loaded
    assert not [w for w in recwarn if "template" in str(w.message)]
    with pytest.warns(
        UserWarning, match="trained with --chat_template_kwargs '{}', and these prompts are wri"
    ):
        beside_a_policy(home, tmp_path / "other", "ipvrm", "frozen", template_kwargs=unread)
    assert rm.max_positions == 8192  # as its config says
    rm.max_positions = limit = 16

    def inputs(length):
        ids = torch.full((1, length), 5)
        labels = ids.index_fill(1, torch.arange(length - 2), -100)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]

    def asked(length):
        return rm.logprobs(inputs(length), torch.full((1, 2, 1), 7), 1.0)[0]

    assert asked(limit).isfinite().all()
    learns = beside_a_policy(home, tmp_path / "online", "ipvrm", "before")
    learns.max_positions = limit

    def learnt():  # it is looked at before anything else is
        learns.update(
            inputs(limit + 1),
            None,
            None,
            None,
            None,
            1,
            None,
            temperature=1.0,
            max_grad_norm=1.0,
            policy=None,
        )

    for too_long in (lambda: asked(limit + 1), learnt):
        words = refusal(too_long)
        assert f"have {limit + 1} tokens together, more than the {limit} positions" in words


@pytest.mark.parametrize("setting", [{"dlw": False}, {"rm_margin": 2.0}])
def test_the_trainer_passes_these_settings_on(runs, home, setting):
    config = runs.settings(runs.DistRLConfig, rm_update="before", **setting)
    rm = runs.trainer(home, runs.DistRLTrainer, config).prefix_rewards
    assert (rm.balance.dlw, rm.objective.margin) == (setting.get("dlw", True), setting.get("rm_margin", 1.0))
    config = runs.settings(runs.DistRLConfig, **setting)
    assert f"{[*setting][0]}: of the online" in refusal(
        lambda: runs.trainer(home, runs.DistRLTrainer, config)
    )


def test_reward_functions_in_an_unmodified_trainer(runs, home):
    from ipvrm.integrations.trl import prefix_value_reward, verifier_reward

    rewards = [prefix_value_reward(home / "rm"), verifier_reward("string", num_workers=1)]
    config = runs.settings(runs.GRPOConfig, max_steps=1)
    _, run = runs.trained(home, runs.GRPOTrainer, config, reward_funcs=rewards)
    log = run.state.log_history[0]
    assert "rewards/prefix_value_final/mean" in log and log["rewards/verifier_string/mean"] == 0


def test_trl_grpo_takes_one_by_its_module(runs, home, tmp_path, monkeypatch):
    """`trl grpo --reward_funcs my_rewards.value`, by TRL's own parser and script."""
    import json

    from trl.scripts import grpo

    (tmp_path / "my_rewards.py").write_text(
        "from ipvrm.integrations.trl import prefix_value_reward\n\n"
        f"value = prefix_value_reward({str(home / 'rm')!r})\n"
    )
    rows = [json.dumps({"prompt": f"What is {i} + 1?"}) for i in range(4)]
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "train.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds the working directory
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = (
        f"--model_name_or_path {home / 'policy'} --dtype float32 --dataset_name {tmp_path / 'questions'} "
        f"--output_dir {tmp_path / 'out'} --reward_funcs my_rewards.value --use_cpu true --bf16 false "
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 8 --max_steps 1 "
        "--report_to none --logging_steps 1 --save_steps 1 --gradient_checkpointing false"
    )
    arguments = grpo.make_parser().parse_args_and_config(flags.split(), fail_with_unknown_args=False)
    try:
        grpo.main(*arguments)
    finally:
        sys.modules.pop("my_rewards", None)
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert "rewards/prefix_value_final/mean" in state["log_history"][0]


def test_prefix_value_reward_is_best_of_ns_score(home, monkeypatch):
    from ipvrm import IpvrmError, RewardModel
    from ipvrm.data.responses import Response
    from ipvrm.integrations.reward_functions import prefix_value_reward

    rm = RewardModel.from_pretrained(home / "rm", device="cpu")
    end = rm.chat.end_of_turn
    prompt = [{"role": "user", "content": "What is 1 + 2?"}]
    texts = ["carry 0.\n\nAnswer: 3", "Answer: 4", "carry 1"]
    ids = [rm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [[*ids[0], end], [*ids[1], end], ids[2]]  # the last one was cut off
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    before = rm.chat.prompt_ids(prompt)
    first, second = rm.token_log_ratios([Response((*before, *row), len(before)) for row in ids[:2]])
    step = len(rm.tokenizer("carry 0.\n\n", add_special_tokens=False)["input_ids"])
    steps = [2.0 * float(first[:step].sum()), 2.0 * float(first[step:-1].sum())]
    want = {
        "final": 2.0 * float(first.mean()), "sum": 2.0 * float(first.sum()), "mean": sum(steps) / 2,
        "min": min(steps)
    }  # fmt: skip
    for pick, value in want.items():
        found = prefix_value_reward(rm, pick)(
            prompts=[prompt] * 3, completions=completions, completion_ids=ids
        )
        assert found[0] == pytest.approx(value, rel=1e-4, abs=1e-5) and found[2] is None
        assert found[1] is not None
    with pytest.raises(IpvrmError, match="pick must be one of"):
        prefix_value_reward(rm, "best")
    with pytest.raises(IpvrmError, match="other text"):
        prefix_value_reward(rm)(prompts=["1"], completions=["another text"], completion_ids=[[20, end]])
    ruled_out(monkeypatch, ids[1][-2])
    with pytest.raises(
        IpvrmError,
        match="^prefix_value_reward: completion 2 of 3: the log-prob.* under the model of .* is -inf",
    ):
        prefix_value_reward(rm)(prompts=[prompt] * 3, completions=completions, completion_ids=ids)


def test_verifier_reward_knows_that_it_does_not_know(tmp_path, monkeypatch):
    from ipvrm import IpvrmError
    from ipvrm.integrations.reward_functions import verifier_reward

    (tmp_path / "slow_verifier.py").write_text(
        "import time\ndef verify(response, answer):\n    time.sleep(60 * (response == 'hang'))\n"
        "    return response == answer\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = verifier_reward("slow_verifier:verify", answer="truth", timeout_seconds=1.5, num_workers=1)
    assert reward(completions=["3", "4", "hang"], truth=["3", "3", "3"]) == [1.0, 0.0, None]
    chat = [[{"role": "assistant", "content": "3"}]]
    assert reward(completions=chat, truth=["3"]) == [1.0]
    with pytest.raises(IpvrmError, match="no column 'truth'"):
        reward(completions=["3"], answer=["3"])


@pytest.mark.parametrize("verifier", ["math", "string"])
def test_verifier_reward_reads_ground_truths_as_label_does(verifier):
    """NaN and None of a table were the words `nan` and `None`: every answer was wrong, by a score of 0."""
    from ipvrm import IpvrmError
    from ipvrm.integrations.reward_functions import verifier_reward

    reward = verifier_reward(verifier, answer="truth", num_workers=1)
    truths = [float("nan"), None, " ", "nan", 4.0, 4, 0.5, "4", 4.0]
    right = ["Answer: 4"] * 6 + ["Answer: 0.5", "Answer: 4", "Answer: 5"]
    assert reward(completions=right, truth=truths) == [None] * 4 + [1.0] * 4 + [0.0]
    assert reward(completions=right[:2], truth=truths[:2]) == [None, None]
    with pytest.raises(
        IpvrmError, match=r"column 'truth' of the data set: the ground truth must be a text or"
    ):
        reward(completions=["4", "4"], truth=["4", ["4"]])


# -------------------------------------------------------------------------------------------- the contract

METHODS = {  # of GRPOTrainer: the parameters that ours names or passes on
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss",
    ],
    "_compute_loss": ["self", "model", "inputs"],
}  # fmt: skip
ATTRIBUTES = (
    "loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation",
    "reward_weights",
    "num_generations", "num_generations_eval", "temperature", "epsilon_low", "epsilon_high",
    "max_completion_length",
    "use_vllm", "vllm_importance_sampling_correction", "current_gradient_accumulation_steps", "ref_model",
    "_is_vlm",
    "_metrics",
)  # fmt: skip
KEYS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "importance_sampling_ratio", "tool_mask",
)  # fmt: skip
LINES = (  # of `_compute_loss`: what `_row_weights` repeats
    "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()",
    "loss = (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)",
    "loss = (per_token_loss * mask).sum() / (per_token_loss.size(0) * self.max_completion_length)",
    'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
    "normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
    "if advantages.dim() == 1:",
)


def source(version, path):
    """Text of a file of TRL `version`, from a wheel in IPVRM_TRL_WHEELS or the installed one, else a skip."""
    folder = os.environ.get("IPVRM_TRL_WHEELS")
    for wheel in Path(folder).glob(f"trl-{version}-*.whl") if folder else ():
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(path).decode()
    try:
        installed = distribution("trl")
    except PackageNotFoundError:
        installed = None
    if installed is None or installed.version != version:
        pytest.skip(f"no trl-{version} wheel in IPVRM_TRL_WHEELS ({folder}), and it is not the installed TRL")
    return Path(str(installed.locate_file(path))).read_text(encoding="utf-8")


@pytest.mark.parametrize("version", PINNED)
def test_contract(version):
    text = source(version, "trl/trainer/grpo_trainer.py")
    trainer = next(
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == "GRPOTrainer"
    )
    methods = {n.name: n for n in trainer.body if isinstance(n, ast.FunctionDef)}
    for name, parameters in METHODS.items():
        found = [a.arg for a in methods[name].args.args]
        assert found[: len(parameters)] == parameters, f"TRL {version}: {name}({', '.join(found)})"
    further = [a.arg for a in methods["_get_per_token_logps_and_entropies"].args.args][8:]
    assert {"pixel_values", "image_grid_thw"} <= set(further)  # what is refused by name of a keyword
    init = {
        t.attr
        for n in ast.walk(trainer)
        if isinstance(n, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for t in ast.walk(n)
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }
    base = source(version, "trl/trainer/base_trainer.py")
    missing = [name for name in ATTRIBUTES if name not in init and f"self.{name}" not in text + base]
    assert not missing, f"TRL {version}: {missing}"
    generate, compute = (ast.get_source_segment(text, methods[name]) for name in list(METHODS)[::3])
    for key in KEYS:
        assert f'"{key}"' in generate + compute, f"TRL {version}: {key}"
    for line in LINES:
        assert line in compute, f"TRL {version}: {line}"
    order = [
        generate.index(f"self.{name}(")
        for name in ("_get_per_token_logps_and_entropies", "_calculate_rewards")
    ]
    assert order == sorted(order)
    # the first pass over self.model is that of the old log-probs, and it is kept where it was made
    assert 'output["old_per_token_logps"] = old_per_token_logps' in generate
    assert "shuffle_sequence_dict" in text and "split_tensor_dict" in text


def test_the_extra_names_the_pinned_range():
    assert "trl = [\"trl>=1.15,<1.17; python_version >= '3.11'\"]" in (ROOT / "pyproject.toml").read_text()
