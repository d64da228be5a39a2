"""Policy training: what a step trains on, one update against its definition, the run folder, interruption.

The toy task: the model writes a digit from 0 to 3, a semicolon and another digit; right is a first digit 3.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from runs import (
    LINEAR_IPVRM,
    assert_nothing_to_unpickle,
    fake_tensorboard,
    flags,
    log_of,
    run_cli,
    same_bits,
    signalled_while_writing,
    train,
    weights,
    write_jsonl,
)
from safetensors.torch import save_file
from served import FakeServer, scaled

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed packages

import ipvrm.training.online_reward as online_reward_module
import ipvrm.training.train_policy as train_policy_module
from benchmarks.faults.toy import make_toy
from ipvrm import IpvrmError, RewardConfig, RewardModel, train_reward_model
from ipvrm.data.rows import Prompt
from ipvrm.demo.base_model import make_tokenizer
from ipvrm.evaluate.score import ScoreConfig, score_file
from ipvrm.losses.advantages import AdvantageConfig
from ipvrm.losses.metrics import auc
from ipvrm.losses.objectives import BalanceConfig
from ipvrm.losses.policy_loss import CandidateConfig, PolicyLossConfig
from ipvrm.models.behaviour import behaviour
from ipvrm.models.causal_lm import (
    candidate_logprobs,
    load_model,
    load_tokenizer,
    response_logprobs,
    save_model,
    template_hash,
    weights_hash,
)
from ipvrm.models.reward_model import read_info, write_info
from ipvrm.output.progress import signals_noted
from ipvrm.rollouts.answers import Question
from ipvrm.rollouts.engine import Sampling
from ipvrm.rollouts.verify import Verdict
from ipvrm.training.checkpoint import TrainingInterrupted, checkpoints
from ipvrm.training.online_reward import OnlineReward, RewardInputs
from ipvrm.training.optimizer import NotFinite, data_parallel_accelerator
from ipvrm.training.policy_config import PolicyConfig, resolve
from ipvrm.training.policy_model import PolicyLoss
from ipvrm.training.policy_rollouts import Collector, Targets, Unanimous, Verified, rollouts_of
from ipvrm.training.train_policy import train_policy
from ipvrm_kernels import describe_cpu_matmul, prefix_values


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the policy `sft`, its reward model `rm`, `prompts.jsonl` and the verifiers."""
    folder = make_toy(tmp_path_factory.mktemp("toy"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def config(toy, tmp_path):
    def make(name="run", **changes):
        return toy_config(toy, tmp_path / name, **changes)

    return make


def toy_config(toy, output, **changes):
    settings = {
        "model": str(toy / "sft"),
        "train_data": str(toy / "prompts.jsonl"),
        "output_dir": str(output),
        "algorithm": "distrl",
        "max_new_tokens": 8,
        "rollout_prompts": 12,
        "train_prompts": 10,
        "minibatch_size": 20,
        "rm_minibatch_size": 20,
        "lora_r": 0,
        "rm_lora_r": 0,
        "weight_decay": 0.0,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "rm_learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "verifier": "toy_verifiers:first",
        "verifier_workers": 1,
        "use_cpu": True,
    }
    settings |= changes
    if settings["algorithm"] in ("distrl", "grpo_prm", "prime"):
        objective = "implicit_prm" if settings["algorithm"] == "prime" else "ipvrm"
        settings.setdefault("reward_model", str(toy / objective))
    settings.setdefault("rm_max_grad_norm", settings.get("max_grad_norm"))
    for name in ("rm_learning_rate", "rm_minibatch_size", "rm_lora_r", "rm_max_grad_norm"):
        frozen = settings.get("rm_update") == "frozen" or settings["algorithm"] == "reinforce_qrm"
        if "reward_model" not in settings or (frozen and name not in changes):
            settings.pop(name)
    return PolicyConfig(**settings)


def assert_close_weights(got, want, start, allowed=0.02):
    """Differences are small beside how far training has moved the weights."""
    got, want, start = weights(got), weights(want), weights(start)
    moved = max(float((want[n] - start[n]).abs().max()) for n in want)
    worst = max(float((got[n] - want[n]).abs().max()) for n in want)
    assert moved > 0 and worst < allowed * moved, (worst, moved)


# ------------------------------------------------------------------------------------------------ one run


@pytest.fixture(scope="module")
def uninterrupted(toy):
    """Four steps of distrl with a checkpoint after each, all kept."""
    settings = toy_config(
        toy,
        toy / "whole",
        max_steps=4,
        save_steps=1,
        save_total_limit=9,
        warmup_ratio=0.3,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        eval_data=str(toy / "prompts.jsonl"),
        eval_steps=3,
    )
    train(settings)
    return settings


@pytest.mark.slow
def test_it_says_how_far_it_is(config, capsys):
    train_policy(config(max_steps=3, algorithm="grpo"), progress=True)
    said = capsys.readouterr().err
    assert re.search(r"^train-policy 1/3  [\d.e-]+/s, .* left  loss ", said, re.MULTILINE), said
    assert re.search(r"^train-policy 3/3  [\d.e-]+/s  loss ", said, re.MULTILINE), said


def test_run_folder(uninterrupted, toy):
    folder = Path(uninterrupted.output_dir)
    names = (
        "config.json model.safetensors tokenizer.json metrics.jsonl results.json config.yaml manifest.json"
    )
    assert set(names.split()) | {"reward_model", "checkpoint-3"} <= {path.name for path in folder.iterdir()}
    assert_nothing_to_unpickle(folder)
    assert not list(folder.rglob(".*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["alpha"] == 0.1  # resolved
    records = log_of(folder)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert ["eval_accuracy" in r for r in records] == [True, False, False, True, True]
    first = records[1]
    named = "entropy token_kl token_clip_fraction candidate_clip_fraction candidates_per_row candidate_mass "
    named += (
        "value_std rm_auc rm_accuracy verifier_failures prompts_mixed prompts_all_wrong truncated rm_loss"
    )
    assert set(named.split()) <= set(first)
    assert first["prompts"] == 12 and first["responses"] == 48 and first["truncated"] >= 0
    kept = first["prompts_mixed"] + first["prompts_mixed_left_out"]
    kept += first["prompts_all_right"] + first["prompts_all_wrong"] + first["prompts_too_few_responses"]
    kept += first["prompts_truncated"]
    assert kept == 12 and first["prompts_mixed"] <= 10
    assert 0 < first["candidate_mass"] <= 1 and 0 < first["candidates_per_row"] <= 10
    assert json.loads((folder / "results.json").read_text())["last"]["step"] == 4
    assert json.loads((folder / "manifest.json").read_text())["cpu_matmul"] == describe_cpu_matmul()

    model = RewardModel.from_pretrained(folder / "reward_model")  # its reference is the policy of step 3
    assert same_bits(folder / "reward_model" / model.info.reference, folder / "checkpoint-3")
    assert (model.info.objective, model.info.margin) == ("ipvrm", 1.0)
    RewardModel.from_pretrained(folder / "checkpoint-2" / "reward_model")
    assert not same_bits(folder, toy / "sft") and not same_bits(folder / "reward_model", toy / "ipvrm")


@pytest.mark.full
def test_it_learns(config, toy):
    """Ten steps: the held-out accuracy rises by more than three standard errors."""
    held_out = toy / "held_out.jsonl"
    write_jsonl(held_out, ({"prompt": str(n), "answer": "3"} for n in range(60, 100)))
    common = {"max_steps": 10, "learning_rate": 2e-3, "eval_data": str(held_out), "eval_temperature": 1.0}
    common |= {"eval_top_p": 1.0, "eval_num_generations": 4, "rollout_prompts": 16, "train_prompts": 16}
    common |= {"num_generations": 8, "minibatch_size": 64}
    for algorithm in ("grpo", "distrl"):
        train(config(algorithm, algorithm=algorithm, **common))
        before, after = (log_of(config(algorithm).output_dir)[i]["eval_accuracy"] for i in (0, -1))
        error = (before * (1 - before) / 160 + after * (1 - after) / 160) ** 0.5
        assert after - before > 3 * error, (algorithm, before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "grpo_prm"},
        {"algorithm": "prime", "rm_update": "after"},
        {"algorithm": "spro"},
        {"preset": "release", "num_generations": 4},
        {"preset": "release", "num_generations": 4, "algorithm": "grpo"},
        {"td_reference": "sft", "rm_update": "frozen"},
        {"mixed_precision": "bf16"},
        {"temperature": 0.7, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_other_ways_run(config, toy, changes):
    folder = train(config(**changes)).output_dir
    record = log_of(folder)[-1]
    assert not same_bits(folder, toy / "sft")
    if changes.get("rm_update") == "frozen":
        assert same_bits(folder / "reward_model", toy / "ipvrm") and "rm_loss" not in record
        info = json.loads((folder / "reward_model" / "ipvrm_config.json").read_text())
        assert (folder / "reward_model" / info["reference"]).resolve() == (toy / "sft").resolve()
    if changes.get("algorithm") == "spro":
        assert not (folder / "reward_model").exists()


# ------------------------------------------------------------------------------- one update, by definition


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (5, 1)),
        # bf16 rounds by shape
        ({"preset": "release", "num_generations": 4, "mixed_precision": "no"}, (5, 1)),
        ({"algorithm": "grpo"}, (5,)),
        ({"algorithm": "grpo_prm", "rm_update": "after"}, (5,)),
        ({"algorithm": "prime"}, (5,)),
        ({"algorithm": "spro"}, (5,)),
    ],
    ids=str,
)
def test_the_split_does_not_matter(config, toy, linear_adam, changes, sizes):
    """Micro-batches of 1, 5 and all: the same policy and reward model."""
    common = {"learning_rate": 1.0, "rm_learning_rate": 1.0, "max_grad_norm": 0.0}
    settings = config(**changes, **common)
    runs = {
        size: train(
            replace(settings, output_dir=f"{settings.output_dir}-by{size}", per_device_train_batch_size=size)
        ).output_dir
        for size in (64, *sizes)
    }
    for size in sizes:
        assert_close_weights(runs[size], runs[64], toy / "sft")
        if settings.reward_model is not None:
            models = (runs[size] / "reward_model", runs[64] / "reward_model", settings.reward_model)
            assert_close_weights(*models)
        for name, value in log_of(runs[64])[0].items():
            assert log_of(runs[size])[0][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


@pytest.mark.slow
def test_without_alpha_distrl_is_grpo_prm(config):
    """The candidates are dropped before the op: the same bits in both models."""
    a = train(config("distrl", alpha=0.0, max_steps=2)).output_dir
    b = train(config("grpo_prm", algorithm="grpo_prm", max_steps=2)).output_dir
    assert same_bits(a, b) and same_bits(a / "reward_model", b / "reward_model")
    c = train(config("with", max_steps=2)).output_dir
    assert not same_bits(a, c)


@pytest.fixture(scope="module")
def sampled(toy):
    """The policy, and 12 responses of differing lengths that it did not write, 3 to a prompt."""
    from ipvrm.data.responses import Response
    from ipvrm.models.causal_lm import load_tokenizer

    tokenizer, rng, verified = load_tokenizer(toy / "sft"), random.Random(3), []
    for number in range(12):
        text = f"{rng.randint(0, 3)}" + ";7" * rng.randint(0, 3)
        prompt = tokenizer(f"<|user|>{number // 3}<|assistant|>", add_special_tokens=False).input_ids
        ids = tokenizer(text + "<|end|>", add_special_tokens=False).input_ids
        response = Response((*prompt, *ids), len(prompt), int(number % 3 == 0))
        verified.append(Verified(number // 3, number % 3, response))
    return load_model(toy / "sft"), rollouts_of(verified, torch.device("cpu"))


def assert_ratios_are_one(policy, rollouts, indices, temperature, allowed):
    """Those that the loss forms itself, each of them: none lies outside of a clip range of `allowed`."""
    narrow = PolicyLossConfig(
        clip_low=allowed, clip_high=allowed, candidate_clip_low=allowed, candidate_clip_high=allowed
    )
    batch, targets = rollouts.batch(indices), rollouts.targets(indices)
    for sign in (1.0, -1.0):  # the clipped branch is taken above the range, then below it
        advantages = [
            torch.full_like(x, sign) for x in (targets.old_logprobs, targets.old_candidate_logprobs)
        ]
        signed = targets._replace(advantages=advantages[0], candidate_advantages=advantages[1])
        metrics = PolicyLoss(policy, narrow, temperature)(batch, signed, 1.0, 1.0).metrics
        for branch in ("token", "candidate"):
            clipped, count = metrics[f"{branch}_clip_fraction"]
            assert float(clipped) == 0, (branch, sign, indices)
            assert abs(float(metrics[f"{branch}_kl"][0])) <= allowed * float(count)
    assert float(metrics["token_kl"][1]) == len(batch.token_ids)
    assert float(metrics["candidate_kl"][1]) == (targets.candidate_ids >= 0).sum()


@pytest.mark.parametrize(
    "candidates",
    [CandidateConfig(), CandidateConfig.preset("release"), None],
    ids=["paper", "release", "none"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ratios_are_one_in_the_first_epoch(sampled, temperature, candidates):
    """To 1e-5 between the passes at one shape, to 1e-4 where the micro-batch is another one."""
    policy, rollouts = sampled
    everything = list(range(12))
    batch = rollouts.batch(everything)
    old = behaviour(policy, batch, candidates, temperature)
    measured = replace(
        rollouts,
        old_logprobs=old.logprobs,
        candidate_ids=old.candidate_ids,
        old_candidate_logprobs=old.candidate_logprobs,
        advantages=torch.zeros_like(old.logprobs),
        candidate_advantages=torch.zeros_like(old.candidate_logprobs),
    )
    new = response_logprobs(policy, batch, temperature)
    assert (new - old.logprobs).exp().sub(1).abs().max() < 1e-5
    for split, allowed in (([everything], 1e-5), ([[i] for i in everything], 1e-4)):
        for indices in split:
            tokens = rollouts.tokens_of(indices)
            ids = old.candidate_ids[tokens]
            got, _, others = candidate_logprobs(policy, rollouts.batch(indices), ids, temperature)
            assert (got - old.logprobs[tokens]).exp().sub(1).abs().max() < allowed
            ratios = (others - old.candidate_logprobs[tokens])[ids >= 0].exp()
            assert torch.allclose(ratios, torch.ones_like(ratios), rtol=0, atol=allowed)
            assert_ratios_are_one(policy, measured, indices, temperature, allowed)


def test_one_candidate_that_is_the_sampled_token(sampled):
    """K = 1 and the sampled token against plain PyTorch on full logits: value and gradient of Eq. 14."""
    policy, rollouts = sampled
    batch = rollouts.batch(list(range(12)))
    generator = torch.Generator().manual_seed(0)
    N = len(batch.token_ids)
    with torch.no_grad():
        old = response_logprobs(policy, batch) + 0.2 * torch.randn(N, generator=generator)
    advantages, td = torch.randn(2, N, generator=generator)
    targets = Targets(batch.token_ids[:, None], old, old[:, None], advantages, td[:, None])
    config = PolicyLossConfig(alpha=0.3, clip_low=0.1, clip_high=0.1, candidate_clip_high=0.15)
    policy.zero_grad()
    got = PolicyLoss(policy, config, 1.0)(batch, targets, 12.0, 12.0)
    got.loss.backward()
    gradient = policy.model.embed_tokens.weight.grad.clone()

    policy.zero_grad()
    logits = policy(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    ratio = (logits.log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0] - old).exp()

    def clipped(advantage, low, high):
        return torch.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)

    lengths = batch.cu_seqlens.diff().repeat_interleave(batch.cu_seqlens.diff())
    token = -(clipped(advantages, 0.1, 0.1) / lengths).sum() / 12
    candidate = -(old.exp() * clipped(td, 0.2, 0.15) / lengths).sum() / 12
    (token + 0.3 * candidate).backward()
    assert float(got.token_loss) == pytest.approx(token.item(), rel=1e-4)
    assert float(got.candidate_loss) == pytest.approx(candidate.item(), rel=1e-4)
    torch.testing.assert_close(gradient, policy.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6)
    policy.zero_grad()


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_reinforce_is_one_mean_over_all_tokens(sampled, preset):
    """Q-RM's released loss, - mean of score * log pi over the tokens of all responses, whatever sampled them.

    A mean of means would do more than scale it: scores that are not centred would reward length.
    """
    policy, rollouts = sampled
    chosen = list(range(12))
    batch = rollouts.batch(chosen)
    assert len(set(batch.cu_seqlens.diff().tolist())) > 1, "equal lengths tell no mean from another"
    scores = torch.randn(len(batch.token_ids), generator=torch.Generator().manual_seed(0)) - 1
    none = torch.zeros(len(scores), 0)
    targets = Targets(none.long(), torch.zeros_like(scores), none, scores, none)
    base = PolicyConfig("m", "d", "o", reward_model="r", algorithm="reinforce_qrm", preset=preset)
    options = resolve(base)[1].loss
    divisors = [rollouts.denominator(chosen, r) for r in (options.reduction, "sequence_mean")]
    policy.zero_grad()
    PolicyLoss(policy, options, 1.0, ratio=False)(batch, targets, *divisors).loss.backward()
    gradient = policy.model.embed_tokens.weight.grad.clone()
    policy.zero_grad()
    logits = policy(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    logprobs = logits.log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
    (-(scores * logprobs).mean()).backward()
    torch.testing.assert_close(gradient, policy.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6)
    policy.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True], ids=["as is", "full logits"])
def test_no_logits_in_an_update(sampled, toy, peak_of, fault):
    """Behaviour pass, scoring and update under a head of 32,000 tokens stay far below one (N, V) tensor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    V, (_, rollouts) = 32_000, sampled
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(toy / "sft", vocab_size=V))
    batch = rollouts.batch(list(range(12)) * 64)
    N = len(batch.token_ids)

    def update():
        old = behaviour(model, batch, CandidateConfig(), 1.0)
        ids, logprobs = old.candidate_ids, old.candidate_logprobs
        candidate_logprobs(model, batch, ids, 1.0)
        targets = Targets(ids, old.logprobs, logprobs, torch.ones(N), torch.zeros_like(logprobs))
        PolicyLoss(model, PolicyLossConfig(), 1.0)(batch, targets, 768.0, 768.0).loss.backward()
        if fault:
            model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].log_softmax(-1)

    peak, _ = peak_of(update)
    assert (peak < 0.5 * 4 * N * V) == (not fault), f"{peak / 2**20:.0f} MiB, {4 * N * V / 2**20:.0f} MiB"


@pytest.mark.slow
def test_online_update_is_train_rm_on_the_same_rows(config, toy, sampled, linear_adam, tmp_path):
    """Without DLW and ADB, against the reference it was trained with: the update of `train-rm`."""
    _, rollouts = sampled
    from ipvrm.models.causal_lm import load_tokenizer

    tokenizer = load_tokenizer(toy / "sft")
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for r in rollouts.responses:
            prompt = tokenizer.decode(r.input_ids[1 : r.prompt_length - 1])
            response = tokenizer.decode(r.input_ids[r.prompt_length : -1])
            file.write(json.dumps({"prompt": prompt, "response": response, "label": r.label}) + "\n")
    common = {"max_grad_norm": 0.0, "per_device_train_batch_size": 5}
    offline = train_reward_model(
        RewardConfig(
            str(toy / "ipvrm"),
            str(rows),
            str(tmp_path / "offline"),
            reference=str(toy / "sft"),
            margin=1.0,
            global_batch_size=12,
            learning_rate=1.0,
            max_steps=1,
            use_cpu=True,
            **common,
        ),
        progress=False,
    )
    settings = config(dlw=False, adb=False, td_reference="sft", rm_learning_rate=1.0, **common)
    settings, method = resolve(settings)
    accelerator = data_parallel_accelerator("test", use_cpu=True, mixed_precision="no")
    reward = OnlineReward(RewardInputs(settings, method.balance, tokenizer), accelerator)
    rollouts.candidate_ids = torch.empty(rollouts.starts[-1], 0, dtype=torch.int64)
    reference, _ = reward.reference_logprobs(rollouts)
    sums, _, finals = reward.update(rollouts, reference, [list(range(12))], 1.0)
    reward.write_model(folder := tmp_path / "online", load_model(toy / "sft"), folder)
    assert_close_weights(folder, offline.output_dir, toy / "ipvrm", allowed=1e-3)
    want = json.loads((offline.output_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert sums["loss"][0] / sums["loss"][1] == pytest.approx(want["loss"], rel=1e-5)
    right = rollouts.outcome == 1
    assert float(finals[right].mean()) == pytest.approx(want["value_right"], rel=1e-4)

    settings, method = resolve(replace(settings, dlw=None, adb=None))
    balanced = OnlineReward(RewardInputs(settings, method.balance, tokenizer), accelerator)
    other, *_ = balanced.update(rollouts, reference, [list(range(12))], 1.0)
    assert other["loss"][0] != pytest.approx(sums["loss"][0], rel=1e-2)


@pytest.mark.slow
def test_the_flags_of_the_reward_model_are_its_own(config, monkeypatch):
    """Minibatch, norm of the gradient, weight decay and adapters of each model, as its update gets them."""
    seen = {"policy": [], "rm": []}

    def spied(name, update):
        def call(accelerator, module, optimizer, share, *arguments, **options):
            decay = max(group["weight_decay"] for group in optimizer.param_groups)
            adapters = sum("lora_A" in n for n, p in module.named_parameters() if p.requires_grad)
            rows = sum(map(len, share))
            seen[name].append((rows, options["max_grad_norm"], decay, adapters > 0))
            return update(accelerator, module, optimizer, share, *arguments, **options)

        return call

    for name, module in (("policy", train_policy_module), ("rm", online_reward_module)):
        monkeypatch.setattr(module, "update", spied(name, module.update))
    own = {"minibatch_size": 16, "max_grad_norm": 0.5, "weight_decay": 0.1, "lora_r": 0}
    of_rm = {"rm_minibatch_size": 6, "rm_max_grad_norm": 7.0, "rm_weight_decay": 0.3, "rm_lora_r": 2}
    for algorithm in ("distrl", "prime"):
        seen["policy"].clear(), seen["rm"].clear()
        train(config(algorithm, algorithm=algorithm, **own, **of_rm))
        assert {row[1:] for row in seen["policy"]} == {(0.5, 0.1, False)}
        assert {row[1:] for row in seen["rm"]} == {(7.0, 0.3, True)}
        total = sum(rows for rows, *_ in seen["rm"])
        assert total == sum(rows for rows, *_ in seen["policy"]) > 16
        for name, most in (("policy", 16), ("rm", 6)):
            assert len(seen[name]) == -(-total // most) and max(rows for rows, *_ in seen[name]) <= most


@pytest.fixture
def trained_values(monkeypatch):
    """Of each update of the reward model in a run: the rollouts, and V_t (N,) under the updated model."""
    seen = []
    update = OnlineReward.update

    def spied(self, rollouts, reference, *arguments):
        result = update(self, rollouts, reference, *arguments)
        logprobs, _ = self._logprobs(self.model, rollouts)
        values = prefix_values(logprobs - reference, rollouts.cu_seqlens, beta=self.info.beta)
        seen.append((rollouts, values.value))
        return result

    monkeypatch.setattr(OnlineReward, "update", spied)
    return seen


def score_lines(folder, model, rollouts, tokenizer):
    """What `ipvrm score` says of the rollouts, one step each: V_T."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    with open(source, "w") as file:
        for r in rollouts.responses:
            problem = tokenizer.decode(r.input_ids[1 : r.prompt_length - 1])
            steps = [tokenizer.decode(r.input_ids[r.prompt_length : -1])]
            file.write(json.dumps({"problem": problem, "steps": steps}) + "\n")
    score_file(ScoreConfig(str(model), str(source), str(output), step_format="{step}", use_cpu=True), False)
    lines = [json.loads(line)["value"] for line in output.read_text().splitlines()]
    output.unlink()
    return torch.tensor(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rm_update": "after", "temperature": 0.7},
        {"lora_r": 4, "rm_lora_r": 2, "learning_rate": 1e-2},
        {"td_reference": "sft"},
        {"preset": "release", "num_generations": 4, "mixed_precision": "no"},
    ],
    ids=str,
)
def test_what_is_saved_scores_what_was_trained(config, toy, tmp_path, trained_values, changes):
    """`ipvrm score` on the saved reward model gives the rewards of its last update, in the run's folder and
    in the checkpoint before; against the policy that is saved beside it they would be others."""
    settings = config(max_steps=2, save_steps=1, **changes)
    folder = train(settings).output_dir
    tokenizer = load_tokenizer(toy / "sft")
    assert len(trained_values) == 2
    for (rollouts, value), run in zip(trained_values, (folder / "checkpoint-1", folder), strict=True):
        model = RewardModel.from_pretrained(run / "reward_model", device="cpu")
        log_ratios = model.token_log_ratios(rollouts.responses)
        got = torch.cat([model.info.beta * x.cumsum(0) for x in log_ratios])
        torch.testing.assert_close(got, value, rtol=1e-4, atol=2e-4)
        final = value[rollouts.cu_seqlens[1:].long() - 1]
        torch.testing.assert_close(
            score_lines(tmp_path, run / "reward_model", rollouts, tokenizer), final, rtol=1e-4, atol=2e-4
        )
        assert model.info.temperature == settings.temperature
        if changes.get("td_reference") == "sft":
            assert (run / "reward_model" / model.info.reference).resolve() == (toy / "sft").resolve()
            continue
        assert model.info.reference == "reference"
        if run == folder:
            assert same_bits(run / "reward_model" / "reference", folder / "checkpoint-1")
        wrong = RewardModel(model.model, load_model(run), tokenizer, model.info)
        other = torch.cat([model.info.beta * x.cumsum(0) for x in wrong.token_log_ratios(rollouts.responses)])
        assert (other - value).abs().max() > 50 * (got - value).abs().max() + 1e-2
    logged = log_of(folder)[-1]
    if settings.rm_update != "after":  # it scores what has just been updated
        assert logged["value_mean"] == pytest.approx(float(got.mean()), rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_resumed_run_that_fails_at_once_keeps_what_the_reward_model_was_trained_against(
    config, toy, tmp_path, monkeypatch
):
    """Nothing has been updated since, so the policy in memory is not it; the checkpoint's copy is."""
    settings = config(max_steps=3, save_steps=2)
    folder = train(replace(settings, max_steps=2, save_steps=1)).output_dir
    first = folder / "checkpoint-1" / "reward_model"
    accelerator = data_parallel_accelerator("test", use_cpu=True, mixed_precision="no")
    resolved, method = resolve(settings)
    inputs = RewardInputs(resolved, method.balance, load_tokenizer(toy / "sft"))
    state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
    reward = OnlineReward(inputs, accelerator, folder / "checkpoint-1", state["reward_optimizer"])
    reward.write_model(again := tmp_path / "again", load_model(folder / "checkpoint-1"), again)
    assert same_bits(again, first) and same_bits(again / "reference", first / "reference")
    assert not same_bits(again / "reference", folder / "checkpoint-1")
    RewardModel.from_pretrained(again, device="cpu")


@pytest.mark.slow
def test_the_chat_settings_of_the_run_are_saved_with_its_reward_model(config, toy, tmp_path, capsys):
    """Those of the prompts that it has learnt from, not those that it came with; unless it is frozen. That
    they differ is said."""
    policy = tmp_path / "sft"
    shutil.copytree(toy / "sft", policy)
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = "{% if not thinking %}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(policy)
    reward = edited(toy, tmp_path, lambda folder: tokenizer.save_pretrained(folder))
    info = json.loads((Path(reward) / "ipvrm_config.json").read_text())
    info |= {"template_hash": template_hash(tokenizer), "chat_template_kwargs": {"thinking": True}}
    (Path(reward) / "ipvrm_config.json").write_text(json.dumps(info))
    settings = {"model": str(policy), "reward_model": reward, "chat_template_kwargs": '{"thinking": false}'}
    for name, update, want in (("online", "before", False), ("frozen", "frozen", True)):
        folder = train_policy(config(name, rm_update=update, **settings)).output_dir
        words = (
            "trained with --chat_template_kwargs '{\"thinking\": true}', and these prompts are written with"
        )
        assert words in " ".join(capsys.readouterr().err.split())
        saved = json.loads((folder / "reward_model" / "ipvrm_config.json").read_text())
        assert saved["chat_template_kwargs"] == {"thinking": want}
        log = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        card, metric = (folder / "reward_model" / "README.md").read_text(), "rm_scored_auc"
        assert "| train data | prompts.jsonl |" in card and f"| {metric} | {log[metric]:.4g} |" in card
        assert ("| rm_loss |" in card) == (update != "frozen") and "| learning_rate |" not in card


@pytest.mark.slow
def test_a_run_sends_its_log_to_a_tracker(config, monkeypatch):
    logged = fake_tensorboard(monkeypatch)
    folder = train(config(report_to="tensorboard", max_steps=2)).output_dir
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = {entry[0::2]: entry[1] for entry in logged if len(entry) == 3}
    for name in ("policy_loss", "rollout_accuracy", "rm_loss"):
        assert [sent[name, step] for step in (1, 2)] == [line[name] for line in log]
    assert logged[0] == ("folder", str(folder / "ipvrm")) and logged[-1] == "closed"
    assert dict(logged[1:2])["settings"]["algorithm"] == "distrl"


def test_auc():
    outcome = torch.tensor([1.0, 0, 1, 0, 0])
    assert auc(torch.tensor([3.0, 1, 2, 2, 0]), outcome) == pytest.approx((3 + 2.5) / 6)
    assert auc(torch.zeros(5), outcome) == 0.5
    assert auc(torch.ones(2), torch.ones(2)) is None


# ------------------------------------------------------------------------------------- what a step trains on


class FakeEngine:
    """Writes what it is told: (response, ended) by the place of the prompt."""

    def __init__(self, written):
        self.written = written

    def __call__(self, prompts, sampling, seeds):
        assert len(set(seeds)) == len(seeds) and sampling == Sampling(8, 1.0)
        counts: dict = {}
        found = []
        for (place,) in prompts:
            sample = counts.get(place, 0)
            counts[place] = sample + 1
            found.append(self.written[place][sample])
        return found


class FakePool:
    def judge(self, pairs):
        kinds = {"5": "right", "6": "wrong", "7": "timeout"}
        return [Verdict(kinds[response]) for response, _ in pairs]


class FakeTokenizer:
    def decode(self, ids, **options):
        return "".join(map(str, ids))


def collector(written, **changes):
    """Prompt i is the token i; token 9 ends; 5 is right, 6 wrong, 7 a time-out."""
    settings = PolicyConfig(
        "m", "d", "o", algorithm="grpo", max_new_tokens=8, num_generations=2, rollout_prompts=len(written)
    )
    accelerator = data_parallel_accelerator("test", use_cpu=True, mixed_precision="no")
    questions = [Question(Prompt(i + 1, "", "x"), (i,)) for i in range(len(written))]
    parts = (FakeEngine(written), {9}, FakeTokenizer(), FakePool(), accelerator)
    return Collector(questions, resolve(replace(settings, **changes))[0], *parts)


def test_only_mixed_prompts_are_kept():
    right, wrong, late, cut = [5, 9], [6, 9], [7, 9], [5, 5]
    written = [[right, wrong], [right, right], [wrong, wrong], [right, late], [wrong, cut], [wrong, right]]
    rollouts, place, counts = collector(written).collect(0)
    assert rollouts.num_groups == 2 and len(rollouts.responses) == 4 and place == 6
    assert sorted(r.input_ids[0] for r in rollouts.responses) == [0, 0, 5, 5]
    assert rollouts.outcome.sum() == 2
    want = {"mixed": 2, "all_right": 1, "all_wrong": 1, "too_few_responses": 2, "mixed_left_out": 0}
    assert {name: counts[f"prompts_{name}"] for name in want} == want
    assert (counts["truncated"], counts["timeout"], counts["verifier_failures"]) == (1, 1, 1)
    assert counts["rollout_accuracy"] == 5 / 10
    few, _, counts = collector(written, train_prompts=1).collect(0)
    assert few.num_groups == 1 and counts["prompts_mixed_left_out"] == 1


def test_what_a_truncated_response_takes_with_it():
    """Itself alone, or all responses to its prompt, whose others would have been mixed."""
    right, wrong, cut = [5, 9], [6, 9], [5, 5]
    written = [[right, wrong, cut], [right, wrong, wrong], [cut, cut, cut], [right, right, cut]]
    settings = {"num_generations": 3, "drop_truncated": "response"}
    rollouts, _, counts = collector(written, **settings).collect(0)
    assert (rollouts.num_groups, len(rollouts.responses)) == (2, 5)
    assert (counts["prompts_truncated"], counts["prompts_too_few_responses"]) == (0, 1)
    assert (counts["prompts_mixed"], counts["prompts_all_right"], counts["truncated"]) == (2, 1, 5)
    rollouts, _, counts = collector(written, **settings | {"drop_truncated": "prompt"}).collect(0)
    assert (rollouts.num_groups, len(rollouts.responses)) == (1, 3)
    assert {r.input_ids[0] for r in rollouts.responses} == {1}
    assert (counts["prompts_truncated"], counts["prompts_mixed"], counts["prompts_all_right"]) == (3, 1, 0)
    assert counts["prompts_too_few_responses"] == 0 and counts["truncated"] == 5
    with pytest.raises(Unanimous, match="2 left out for a response that was cut off"):
        collector([[right, cut], [cut, wrong]], drop_truncated="prompt").collect(0)
    evaluated = collector(
        written,
        **settings | {"drop_truncated": "prompt"},
        eval_data="e",
        eval_temperature=1.0,
        eval_top_p=1.0,
    ).accuracy()  # a truncated response is wrong there, under both
    assert evaluated["eval_responses"] == 4


def test_rounds_fill_the_batch():
    right, wrong = [5, 9], [6, 9]
    written = [[right, wrong], [right, right]]
    rollouts, place, counts = collector(written, train_prompts=3, max_rounds=5).collect(0)
    assert (rollouts.num_groups, place, counts["rounds"]) == (3, 6, 3)
    rollouts, place, counts = collector(written, train_prompts=3, max_rounds=2).collect(4)
    assert (rollouts.num_groups, place, counts["rounds"]) == (2, 8, 2)


def test_unanimous_prompts_are_a_clear_line():
    with pytest.raises(IpvrmError, match=r"none of the 2 prompts .* 1 all right, 1 all wrong"):
        collector([[[5, 9], [5, 9]], [[6, 9], [6, 9]]]).collect(0)


# --------------------------------------------------------------------------------------- settings, refusals


def test_defaults_of_the_presets(config):
    base = PolicyConfig("m", "d", "o", reward_model="r", eval_data="e")
    paper, of_paper = resolve(base)
    release, of_release = resolve(replace(base, preset="release"))
    settings = {  # of paper, of release
        "num_generations": (4, 16),
        "learning_rate": (3e-5, 2e-5),
        "weight_decay": (0.0, 0.01),
        "lora_r": (128, 0),
        "minibatch_size": (128, 2048),
        "max_grad_norm": (1.0, 1.0),
        "rm_learning_rate": (1e-4, 2e-6),
        "rm_weight_decay": (0.0, 0.0),
        "rm_lora_r": (128, 0),
        "rm_minibatch_size": (128, 128),
        "rm_max_grad_norm": (1.0, 10.0),
        "rollout_prompts": (512, 1024),
        "train_prompts": (256, 512),
        "drop_truncated": ("response", "prompt"),
        "lam": (0.95, 1.0),
        "gae_coef": (1.0, 0.05),
        "candidate_mode": ("min_prob", "top_k"),
        "eval_temperature": (0.6, 0.7),
        "eval_top_p": (0.95, 0.8),
        "eval_top_k": (0, 20),
        "eval_num_generations": (1, 8),
        "mixed_precision": ("no", "bf16"),
    }
    for name, both in settings.items():
        assert (getattr(paper, name), getattr(release, name)) == both, name
        for preset, other in (("paper", both[1]), ("release", both[0])):  # what is given wins
            alone = {"candidate_mode": {"top_k": None}, "rollout_prompts": {"train_prompts": None}}
            given = replace(base, preset=preset, **{name: other}, **alone.get(name, {}))
            assert getattr(resolve(given)[0], name) == other, (preset, name)
    for preset, method in (("paper", of_paper), ("release", of_release)):
        assert method.candidates == CandidateConfig.preset(preset)
        assert method.loss == PolicyLossConfig.preset(preset)
        assert method.advantages == AdvantageConfig.preset(preset)
        assert method.balance == BalanceConfig.preset(preset)
    assert resolve(replace(base, alpha=0.0))[1].candidates is None
    grpo, method = resolve(replace(base, algorithm="grpo", reward_model=None))
    assert grpo.alpha is None and grpo.lam is None and method.candidates is None and method.loss.alpha == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"preset": "release"}, {"algorithm": "spro"}, {"rm_update": "frozen"}, {"dlw": False, "adb": True}],
    ids=str,
)
def test_the_resolved_config_is_a_config_file(tmp_path, changes):
    """config.yaml of a run starts the same run."""
    from ipvrm.cli import parse

    model = None if changes.get("algorithm") == "spro" else "r"
    resolved, _ = resolve(PolicyConfig("m", "d", "o", reward_model=model, **changes))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(vars(resolved)))
    again = parse(PolicyConfig, ["--config", str(tmp_path / "config.yaml")], prog="ipvrm train-policy")
    assert resolve(again)[0] == resolved == again


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "reinforce_qrm"}, "needs --reward_model"),
        ({"algorithm": "reinforce_qrm", "reward_model": "x", "clip_low": 0.1}, "has no --clip_low"),
        ({"algorithm": "reinforce_qrm", "reward_model": "x", "dlw": True}, "has no --dlw"),
        ({"algorithm": "ppo"}, "it is unknown; train-policy offers distrl, grpo"),
        ({"algorithm": "grpo", "reward_model": "x"}, "takes no reward model: its advantage is the outcome"),
        ({"algorithm": "spro", "reward_model": "x"}, "takes no reward model"),
        ({"reward_model": None}, "needs --reward_model"),
        ({"algorithm": "grpo", "alpha": 0.1}, "has no --alpha"),
        ({"algorithm": "grpo_prm", "candidate_mode": "top_k"}, "has no --candidate_mode"),
        ({"algorithm": "prime", "gae_coef": 0.1}, "has no --gae_coef"),
        ({"rm_update": "frozen", "rm_learning_rate": 1e-3}, "is not trained; leave --rm_learning_rate out"),
        ({"top_k": 3}, "belongs to --candidate_mode top_k"),
        ({"num_generations": 1}, "at least 2"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": -1.0}, "alpha must not be negative"),
        ({"min_prob": 0.0}, "min_prob must lie in"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"preset": "other"}, "preset must be"),
        ({"verifier": "nothing"}, "verifier must be"),
        ({"verifier": "toy_verifiers:never"}, "none of the 12 prompts .* 12 all wrong"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(config, changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        train(config(**changes))


def edited(toy, tmp_path, edit):
    """A copy of the reward model with something changed."""
    folder = tmp_path / "other_rm"
    shutil.copytree(toy / "ipvrm", folder)
    edit(folder)
    return str(folder)


def change_json(name, **changes):
    def edit(folder):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | changes))

    return edit


def another_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"+"', '"*"'))


def poison(folder):
    tensors = weights(folder)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison_and_record(folder):
    """As a run leaves it that has diverged: the record is of the poisoned weights."""
    poison(folder)
    write_info(folder, read_info(folder))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (another_tokenizer, "its tokenizer is not the policy's"),
        (change_json("ipvrm_config.json", template_hash="0" * 64), "another chat template"),
        (change_json("config.json", vocab_size=99), "its head has 99 tokens, the policy's 20"),
        (change_json("ipvrm_config.json", objective="q_rm"), "'q_rm' gives no log-ratio"),
        (lambda folder: (folder / "ipvrm_config.json").unlink(), "no ipvrm_config.json"),
        (poison, "not those that ipvrm_config.json was written for"),
    ],
)
def test_reward_models_that_do_not_fit(config, toy, tmp_path, edit, reason):
    with pytest.raises(IpvrmError, match=reason):
        train(config(reward_model=edited(toy, tmp_path, edit)))


@pytest.mark.slow
def test_reinforce_with_a_q_rm(config, toy, tmp_path):
    """It learns what the Q-RM has learnt, which stays as it was; a model without token scores is refused."""
    with pytest.raises(IpvrmError, match="'ipvrm' gives no token scores.*needs a q_rm reward model"):
        train(config("refused", algorithm="reinforce_qrm", reward_model=str(toy / "ipvrm")))
    rows = [json.loads(line) for line in (toy / "labelled.jsonl").read_text().splitlines()]
    data = write_jsonl(tmp_path / "one_prompt.jsonl", [row | {"prompt": "10"} for row in rows])
    folder = str(tmp_path / "q_rm")
    reward = RewardConfig(
        str(toy / "sft"),
        str(data),
        folder,
        "q_rm",
        learning_rate=1e-2,
        pairs="all",
        max_steps=30,
        per_device_train_batch_size=128,
        use_cpu=True,
    )
    learnt = train_reward_model(reward, progress=False).metrics["train"]["pair_accuracy"]
    assert learnt > 0.95
    before = weights(folder)
    result = train(
        config(algorithm="reinforce_qrm", reward_model=folder, max_steps=6, learning_rate=3e-3, save_steps=3)
    )
    records = log_of(result.output_dir)
    assert records[0]["rm_auc"] > 0.9 and records[0]["q_std"] > 0
    assert records[-1]["rollout_accuracy"] > records[0]["rollout_accuracy"] + 0.1
    assert all(torch.equal(before[name], x) for name, x in weights(folder).items())
    (result.output_dir / "results.json").unlink()
    again = train(
        config(
            algorithm="reinforce_qrm",
            reward_model=folder,
            max_steps=6,
            learning_rate=3e-3,
            save_steps=3,
            resume_from_checkpoint="auto",
        )
    )
    assert log_of(again.output_dir)[-1] == records[-1]


def test_switches_of_another_objective_are_refused(config, toy):
    for flag, value in (("dlw", True), ("adb", True), ("rm_margin", 1.0)):
        with pytest.raises(IpvrmError, match="neither margin nor weights"):
            train(config(reward_model=str(toy / "implicit_prm"), **{flag: value}))


def test_nan_in_the_reward_model_stops_the_run(config, toy, tmp_path, monkeypatch):
    with pytest.raises(IpvrmError, match="logits are not numbers; the weights are damaged"):
        train(config(reward_model=edited(toy, tmp_path, poison_and_record)))

    def poisoned(*arguments):
        found = candidate_logprobs(*arguments)
        return found._replace(logprobs=found.logprobs * float("nan"))

    monkeypatch.setattr(online_reward_module, "candidate_logprobs", poisoned)
    with pytest.raises(IpvrmError, match="reward model's log-probs are not numbers"):
        train(config("frozen", rm_update="frozen"))


def test_class_means_have_their_counts_and_their_mean_over_beta_is_the_score_of_table_7(config):
    """Eq. 19: the mean over responses of V_T / (beta T); a step has few responses of a class at times."""
    record = log_of(train(config(rm_update="frozen")).output_dir)[-1]
    right, wrong = record["value_right_count"], record["value_wrong_count"]
    assert right + wrong == record["responses_trained"] and right > 0 < wrong
    pooled = (right * record["value_right"] + wrong * record["value_wrong"]) / (right + wrong)
    assert record["rm_score"] == pytest.approx(pooled / 10.0, rel=1e-4)  # beta 10


@pytest.mark.parametrize(
    ("settings", "whose", "reason"),
    [
        ({"rm_update": "frozen"}, "reward model", "the reward model's log-probs are"),
        ({}, "reward model", "summed loss nan"),
        ({"td_reference": "sft"}, "reference", "summed loss nan"),
        ({"algorithm": "grpo"}, "policy that sampled", "the policy's log-probs are"),
    ],
    ids=["scored", "learnt from", "reference", "behaviour"],
)
def test_an_infinite_log_ratio_names_its_row(config, toy, monkeypatch, settings, whose, reason):
    """The fourth response of the step has no probability; the run says of which prompt of the file it is."""
    found = []
    collect = Collector.collect
    monkeypatch.setattr(
        Collector, "collect", lambda self, place: found.append(collect(self, place)) or found[-1]
    )

    def ruled_out(logprobs, batch, model):
        asked = "reference" if getattr(model, "is_reference", False) else "reward model"
        if asked != whose and whose != "policy that sampled":
            return logprobs
        bad = list(found[0][0].responses[3].input_ids)
        logprobs = logprobs.clone()
        for row, start in zip(batch.input_ids.tolist(), batch.cu_seqlens.tolist(), strict=False):
            if row[: len(bad)] == bad:
                logprobs[start] = -torch.inf
        return logprobs

    def scored(model, batch, *rest):
        found = candidate_logprobs(model, batch, *rest)
        return found._replace(logprobs=ruled_out(found.logprobs, batch, model))

    def learnt_from(self, batch, temperature=1.0):
        return ruled_out(forward(self, batch, temperature), batch, self.model)

    def behaviour(model, batch, *rest):
        sampled, *others = behaviour_of(model, batch, *rest)
        return ruled_out(sampled, batch, model), *others

    forward, behaviour_of, made = (
        online_reward_module.ResponseLogprobs.forward,
        train_policy_module.behaviour,
        OnlineReward.__init__,
    )

    def marked(self, *arguments, **more):
        made(self, *arguments, **more)
        if self.reference is not None:
            self.reference.is_reference = True

    monkeypatch.setattr(online_reward_module, "candidate_logprobs", scored)
    if whose == "policy that sampled":
        monkeypatch.setattr(train_policy_module, "behaviour", behaviour)
    elif whose == "reward model":
        monkeypatch.setattr(online_reward_module.ResponseLogprobs, "forward", learnt_from)
    monkeypatch.setattr(OnlineReward, "__init__", marked)
    with pytest.raises(IpvrmError, match=rf"step 1: {reason}.* \(under the {whose}, ") as error:
        train(config(**settings))
    prompt, sample, token = re.search(
        r"prompt (\d+), sample (\d+): the log-probability of response token (\d+) of", str(error.value)
    ).groups()
    response = found[0][0].responses[3]
    asked = json.loads((toy / "prompts.jsonl").read_text().splitlines()[int(prompt) - 1])["prompt"]
    assert asked in make_tokenizer().decode(response.input_ids[: response.prompt_length]) and token == "1"
    same = [r.source for r in found[0][0].responses if r.input_ids == response.input_ids]
    assert f"prompt {prompt}, sample {sample}" == same[0]


def test_nan_in_the_online_update_stops_the_run(config, monkeypatch):
    from ipvrm.losses import objectives

    ipvrm_loss = objectives.ipvrm_loss
    monkeypatch.setattr(objectives, "ipvrm_loss", lambda x, *rest, **kw: ipvrm_loss(x / 0.0, *rest, **kw))
    with pytest.raises(IpvrmError, match="step 1: summed loss .*; stopped before any weight took it"):
        train(config())


def test_verifier_failures_are_counted_and_left_out(config):
    record = log_of(train(config(algorithm="grpo", verifier="toy_verifiers:breaks")).output_dir)[-1]
    assert record["verifier_failures"] == record["error"] > 0
    assert record["responses_trained"] <= 48 - record["error"]


@pytest.mark.slow
def test_a_verifier_that_hangs_or_dies_is_counted_and_left_out(config, monkeypatch):
    """What it did not answer is neither right nor wrong: the step trains on the others alone."""
    trained, behaviour_of = [], train_policy_module._Trainer._behaviour

    def kept(self, rollouts):
        for response in rollouts.responses:
            text = self.inputs.tokenizer.decode(response.input_ids[response.prompt_length :])
            trained.append((text, response.label))
        return behaviour_of(self, rollouts)

    monkeypatch.setattr(train_policy_module._Trainer, "_behaviour", kept)
    settings = config(
        algorithm="grpo",
        verifier="toy_verifiers:hangs_or_dies",
        verifier_timeout=0.5,
        verifier_workers=2,
        rollout_prompts=6,
        train_prompts=6,
    )
    record = log_of(train(settings).output_dir)[-1]
    assert record["timeout"] > 0 and record["crash"] > 0 and record["error"] == 0
    assert record["verifier_failures"] == record["timeout"] + record["crash"]
    assert {(text[0], label) for text, label in trained} == {("3", 1), ("0", 0)}
    judged = record["responses"] - record["truncated"] - record["verifier_failures"]
    assert record["responses_trained"] == len(trained) <= judged


def test_prompts_that_cannot_be_used(config, tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": str(n), "answer": "3"} for n in range(20)] + [{"prompt": "7"}]
    write_jsonl(data, rows)
    with pytest.raises(IpvrmError, match=r"1 of 21 rows are bad .*\n.*prompts.jsonl:21: no ground truth"):
        train(config(train_data=str(data), algorithm="grpo"))
    result = train(config("skip", train_data=str(data), algorithm="grpo", on_bad_row="skip"))
    assert result.metrics["data"] == {"prompts": 20, "bad": 1}
    with pytest.raises(IpvrmError, match="more than the 256 positions of the models in use"):
        train(config("long", algorithm="grpo", max_new_tokens=253))


def test_dry_run_writes_nothing(config, capsys):
    result = train(config(dry_run=True))
    assert result.steps == 0 and not result.output_dir.exists()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["config"]["candidate_clip_high"] == 0.28 and printed["data"]["prompts"] == 48
    assert set(printed["memory_estimate"]) == {"policy", "reward_model"}


def test_the_starting_models_are_not_overwritten(config, toy, uninterrupted):
    for name in ("sft", "ipvrm"):
        with pytest.raises(IpvrmError, match="it would be overwritten"):
            train(replace(config(), output_dir=str(toy / name)))
    with pytest.raises(IpvrmError, match="holds a run already"):
        train(uninterrupted)


# ------------------------------------------------------------------------------ interruption and resuming


def assert_same_run(a, b):
    a, b = Path(a), Path(b)
    assert same_bits(a, b) and log_of(a) == log_of(b)
    assert (a / "reward_model").exists() == (b / "reward_model").exists()
    assert not (a / "reward_model").exists() or same_bits(a / "reward_model", b / "reward_model")
    reference = Path("reward_model", "reference")
    assert (a / reference).exists() == (b / reference).exists()
    assert not (a / reference).exists() or same_bits(a / reference, b / reference)


@pytest.mark.slow
def test_resume_gives_the_same_bits(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.output_dir, folder)
    for path in checkpoints(folder)[2:]:
        shutil.rmtree(path)
    (folder / "model.safetensors").unlink()
    (folder / "results.json").unlink()
    train(replace(uninterrupted, output_dir=str(folder), resume_from_checkpoint="auto"))
    assert_same_run(folder, uninterrupted.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "prime"},
        {"preset": "release", "num_generations": 4},
        *(
            pytest.param(changes, marks=pytest.mark.full)
            for changes in (
                {"algorithm": "grpo"},
                {"algorithm": "grpo_prm", "rm_update": "after"},
                {"algorithm": "spro"},
                {"td_reference": "sft"},
                {"rm_update": "frozen"},
                {"mixed_precision": "bf16"},
            )
        ),
    ],
    ids=str,
)
def test_every_way_resumes_to_the_same_bits(config, tmp_path, changes):
    settings = config(max_steps=3, save_steps=1, save_total_limit=9, **changes)
    whole = train(settings).output_dir
    folder = Path(shutil.copytree(whole, tmp_path / "again"))
    (folder / "model.safetensors").unlink()
    name = str(folder / "checkpoint-1")
    train(replace(settings, output_dir=str(folder), resume_from_checkpoint=name))
    assert_same_run(folder, whole)


KILLED_IN_A_SAVE = """
    import os, signal, sys
    from ipvrm.training import checkpoint
    from ipvrm.cli import main

    save_optimizer, calls = checkpoint.save_optimizer, []

    def dies_in_the_reward_model_of_step_2(folder, *rest):
        calls.append(folder)
        if len(calls) == 4:
            (folder / "optimizer.safetensors").write_bytes(b"half a fi")
            os.kill(os.getpid(), signal.SIGKILL)
        return save_optimizer(folder, *rest)

    checkpoint.save_optimizer = dies_in_the_reward_model_of_step_2
    main(sys.argv[1:])
"""


@pytest.mark.full
def test_killed_in_the_middle_of_a_save(uninterrupted, toy, tmp_path):
    """kill -9 while the reward model of checkpoint 2 is half written: the end is the same bits."""
    folder = tmp_path / "run"
    settings = replace(uninterrupted, output_dir=str(folder))
    done = run_cli("-c", textwrap.dedent(KILLED_IN_A_SAVE), "train-policy", *flags(settings), path=toy)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1"]
    assert list(folder.glob(".checkpoint-2.*"))
    train(replace(settings, resume_from_checkpoint="auto"))
    assert_same_run(folder, uninterrupted.output_dir)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_signal_saves_and_resumes_to_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    settings = replace(uninterrupted, output_dir=str(tmp_path / "run"), save_steps=0)
    step = train_policy_module._Trainer._step

    def signalled(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch, signals_noted():
        patch.setattr(train_policy_module._Trainer, "_step", signalled)
        with pytest.raises(TrainingInterrupted, match="stopped after update 2 of 4") as caught:
            train(settings)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    train(replace(settings, resume_from_checkpoint="auto"))
    assert_same_run(settings.output_dir, uninterrupted.output_dir)


@pytest.mark.slow
def test_resuming_an_older_checkpoint_keeps_what_it_saves(uninterrupted, tmp_path, monkeypatch):
    """The later checkpoints of the finished run do not push out the one that is announced."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.output_dir, folder)
    outside = shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    settings = replace(uninterrupted, output_dir=str(folder), save_steps=0, save_total_limit=1)
    step = train_policy_module._Trainer._step

    def signalled(self, number):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch, signals_noted():
        patch.setattr(train_policy_module._Trainer, "_step", signalled)
        with pytest.raises(TrainingInterrupted, match="after update 2 of 4") as caught:
            train(replace(settings, resume_from_checkpoint=str(outside)))
    assert checkpoints(folder) == [caught.value.checkpoint] and not (folder / "results.json").exists()
    train(replace(settings, resume_from_checkpoint="auto"))
    assert_same_run(folder, uninterrupted.output_dir)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_save_loses_nothing(config, monkeypatch, signal_number):
    """The run has no checkpoint, so the models are written to the end; the handlers are put back."""
    with signalled_while_writing(train_policy_module._Trainer, signal_number, monkeypatch):
        folder = train(config()).output_dir
    assert {"model.safetensors", "reward_model", "results.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_unanimous_prompts_late_in_a_run_lose_nothing(config, monkeypatch):
    """What has been learnt is saved, and the resumed run goes on behind those prompts."""
    settings = config(algorithm="grpo", max_steps=3, save_steps=0)
    collect, calls = Collector.collect, []

    def unanimous_once(self, place):
        calls.append(place)
        if len(calls) == 2:
            raise Unanimous("none of the prompts", place + 12)
        return collect(self, place)

    monkeypatch.setattr(Collector, "collect", unanimous_once)
    with pytest.raises(IpvrmError, match="none of the prompts. The run so far: .*checkpoint-1"):
        train(settings)
    result = train(replace(settings, resume_from_checkpoint="auto"))
    assert calls == [0, 12, 24, 36] and result.metrics["prompts_seen"] == 48
    assert [record["step"] for record in log_of(result.output_dir)] == [1, 2, 3]


def break_the_verifier(patch, toy):
    """Its worker dies, and the next one does not start."""
    (toy / "broken").touch()


def run_out_of_memory(patch, toy):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no more of it")

    patch.setattr("ipvrm.rollouts.engine.TransformersEngine.__call__", fails)


def poison_an_advantage(patch, toy):
    advantages = train_policy_module.outcome_advantages
    patch.setattr(train_policy_module, "outcome_advantages", lambda *a, **k: advantages(*a, **k) / 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected", "reason"),
    [
        (break_the_verifier, IpvrmError, "no longer to be imported"),
        (run_out_of_memory, torch.OutOfMemoryError, "no more of it"),
        (poison_an_advantage, IpvrmError, "step 3: an advantage is not a number"),
    ],
)
def test_a_step_that_fails_before_it_learns_loses_nothing(
    config, toy, monkeypatch, capsys, fault, expected, reason
):
    """The steps before it are saved, although no checkpoint was due, and the resumed run is the same run."""
    settings = config(algorithm="grpo", max_steps=4, save_steps=0)
    step = train_policy_module._Trainer._step
    with monkeypatch.context() as patch:

        def third_fails(self, number):
            if number == 2:
                fault(patch, toy)
            return step(self, number)

        patch.setattr(train_policy_module._Trainer, "_step", third_fails)
        try:
            with pytest.raises(expected, match=reason) as caught:
                train(settings)
        finally:
            (toy / "broken").unlink(missing_ok=True)
    assert "The run so far: " in str(caught.value) + capsys.readouterr().err
    (saved,) = checkpoints(settings.output_dir)
    assert saved.name == "checkpoint-2"
    folder = train(replace(settings, resume_from_checkpoint="auto")).output_dir
    whole = train(config("whole", algorithm="grpo", max_steps=4, save_steps=0)).output_dir
    assert_same_run(folder, whole)


def disk_is_full(folder):
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("ipvrm.training.run.save_folder", disk_is_full, r"saving failed too \(no space left\)"),
        ("accelerate.Accelerator.num_processes", property(lambda self: 2), "not known that all ranks"),
    ],
)
def test_a_failure_that_cannot_be_saved_is_not_hidden(config, monkeypatch, target, value, reason):
    """Nor is a save begun that other ranks, which may not have failed, would not take part in."""
    settings, step = config(algorithm="grpo", max_steps=3, save_steps=1), train_policy_module._Trainer._step

    def third_fails(self, number):
        if number == 2:
            monkeypatch.setattr(target, value)
            raise IpvrmError("no verifier")
        return step(self, number)

    monkeypatch.setattr(train_policy_module._Trainer, "_step", third_fails)
    with pytest.raises(
        IpvrmError, match=f"no verifier. Not saved: .*{reason}.*checkpoint-2, is intact, .*: 0"
    ):
        train(settings)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3])
def test_an_evaluation_that_fails_loses_nothing(config, toy, monkeypatch, steps):
    """The step before it is in the log and saved; of the last step, the resumed run evaluates again."""
    settings = config(
        algorithm="grpo", max_steps=steps, save_steps=0, eval_data=str(toy / "prompts.jsonl"), eval_steps=2
    )
    accuracy, calls = Collector.accuracy, []

    def second_fails(self):
        calls.append(None)
        if len(calls) == 2:
            raise IpvrmError("no verifier")
        return accuracy(self)

    monkeypatch.setattr(Collector, "accuracy", second_fails)
    with pytest.raises(IpvrmError, match="no verifier. The run so far: .*checkpoint-2"):
        train(settings)
    assert [record["step"] for record in log_of(settings.output_dir)] == [0, 1, 2]
    result = train(replace(settings, resume_from_checkpoint="auto"))
    whole = train(replace(settings, output_dir=str(Path(settings.output_dir).with_name("whole"))))
    assert same_bits(result.output_dir, whole.output_dir)
    assert result.metrics["eval"] == whole.metrics["eval"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poisoned", "moved", "saves"),
    [
        (("ipvrm.training.online_reward.update", 2), "the reward model", 0),  # its second minibatch
        (("ipvrm.training.train_policy.update", 1), "the reward model", 1),
        (("ipvrm.training.train_policy.update", 2), "the policy and the reward model", 0),
    ],
)
def test_a_step_that_fails_while_it_learns_says_what_is_lost(config, monkeypatch, poisoned, moved, saves):
    """Weights that have learnt from half a step are not those of a checkpoint."""
    (name, minibatch), step = poisoned, train_policy_module._Trainer._step
    module, update = name.removesuffix(".update"), sys.modules[name.removesuffix(".update")].update
    number, calls = [0], []

    def counted(self, at):
        number[0] = at
        calls.clear()
        return step(self, at)

    def fails(*arguments, **options):
        calls.append(None)
        if number[0] == 1 and len(calls) == minibatch:
            raise NotFinite("summed loss nan")
        return update(*arguments, **options)

    monkeypatch.setattr(train_policy_module._Trainer, "_step", counted)
    monkeypatch.setattr(f"{module}.update", fails)
    settings = config(max_steps=3, save_steps=saves, minibatch_size=10, rm_minibatch_size=10)
    where = "checkpoint-1, is intact, .*: 0" if saves else "no checkpoint was written yet, .*: 1"
    with pytest.raises(IpvrmError, match=f"Not saved: {moved} had learnt from step 2 already; .*{where}"):
        train(settings)
    assert [path.name for path in checkpoints(settings.output_dir)] == ["checkpoint-1"] * bool(saves)


def test_resume_refuses_another_run(uninterrupted, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.output_dir, folder)
    data = tmp_path / "prompts.jsonl"
    data.write_text((toy / "prompts.jsonl").read_text().replace('"3"', '"2"', 1))
    for changes, reason in (
        ({"alpha": 0.2}, r"alpha \(0.1 then, 0.2 now\)"),
        ({"train_data": str(data)}, "the training data"),
        ({"reward_model": edited(toy, tmp_path, lambda folder: None)}, None),
    ):
        settings = replace(uninterrupted, output_dir=str(folder), resume_from_checkpoint="auto", **changes)
        if reason is None:  # the same reward model in another folder
            train(settings)
            continue
        with pytest.raises(IpvrmError, match=f"made otherwise; changed: .*{reason}"):
            train(settings)


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.slow
def test_lora(config, toy, tmp_path):
    """Adapters alone move, of policy and reward model; the run folder holds the merged models too; a resumed
    run is the same."""
    settings = config(lora_r=4, rm_lora_r=2, max_steps=3, save_steps=1, save_total_limit=9)
    folder = train(settings).output_dir
    for model, first in ((folder, toy / "sft"), (folder / "reward_model", toy / "ipvrm")):
        assert (model / "adapter" / "adapter_model.safetensors").is_file()
        got, start = weights(model), weights(first)
        assert got.keys() == start.keys()
        moved = {n for n in got if not torch.equal(got[n], start[n])}
        assert moved and all("_proj" in name for name in moved)
    info = json.loads((folder / "reward_model" / "ipvrm_config.json").read_text())
    assert info["adapter"]["lora_r"] == 2 and info["adapter"]["base_hash"] == weights_hash(toy / "ipvrm")
    RewardModel.from_pretrained(folder / "reward_model")

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoint-2")
    (again / "results.json").unlink()
    train(replace(settings, output_dir=str(again), resume_from_checkpoint="auto"))
    assert_same_run(again, folder)
    with pytest.raises(IpvrmError, match="the head carries an adapter"):
        train(config("head", lora_r=4, lora_target_modules=("lm_head",)))
    with pytest.raises(IpvrmError, match="lora_target_modules nothing"):
        train(config("none", lora_r=4, lora_target_modules=("nothing",)))
    with pytest.raises(IpvrmError, match="belongs to --lora_r"):
        train(config("alpha", lora_alpha=4.0))


@pytest.mark.slow
def test_lora_of_the_policy_alone_or_of_the_reward_model_alone(config, toy):
    for policy, reward in ((4, 0), (0, 4)):
        settings = config(f"{policy}-{reward}", lora_r=policy, rm_lora_r=reward, gradient_checkpointing=True)
        folder = train(settings).output_dir
        for model, first, r in (
            (folder, toy / "sft", policy),
            (folder / "reward_model", toy / "ipvrm", reward),
        ):
            got, start = weights(model), weights(first)
            moved = {n for n in got if not torch.equal(got[n], start[n])}
            assert (model / "adapter").exists() == bool(r)
            assert moved and all("_proj" in name for name in moved) == bool(r)


# ------------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_gloo_processes_give_the_update_of_one(config, toy, linear_adam, tmp_path):
    """Prompts and micro-batches are shared out; both runs end with the same two models."""
    common = {"learning_rate": 1.0, "rm_learning_rate": 1.0, "max_grad_norm": 0.0}
    one = train(config("one", **common)).output_dir
    two = config("two", per_device_train_batch_size=7, eval_data=str(toy / "prompts.jsonl"), **common)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "linear_ipvrm.py").write_text(LINEAR_IPVRM)
    command = [*launch, "-m", "linear_ipvrm", "train-policy", *flags(two)]
    done = run_cli(*command, path=f"{toy}{os.pathsep}{tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((Path(two.output_dir) / "manifest.json").read_text())["ranks"] == 2
    assert_close_weights(two.output_dir, one, toy / "sft")
    assert_close_weights(Path(two.output_dir) / "reward_model", one / "reward_model", toy / "ipvrm")
    got, want = log_of(two.output_dir)[-1], log_of(one)[-1]
    assert {name: got[name] for name in want} == pytest.approx(want, rel=2e-3, abs=2e-4)


# ------------------------------------------------------------------------------------------------- a server


def served_config(config, name, server=None, **changes):
    settings = {
        "algorithm": "grpo",
        "lora_r": 4,
        "max_steps": 3,
        "save_steps": 0,
        "rollout_prompts": 6,
        "train_prompts": 6,
    }
    if server is not None:
        settings["engine"] = server.url
    return config(name, **(settings | {"learning_rate": 1e-2} | changes))


def without_gap(log):
    return [{k: v for k, v in record.items() if k != "engine_gap"} for record in log]


@pytest.mark.slow
def test_a_server_samples_from_the_policy_of_now(config, toy):
    """Base and adapters behind a server: the run of the policy in memory, evaluation included."""
    evaluation = {"eval_data": str(toy / "prompts.jsonl"), "eval_steps": 2}
    local = served_config(config, "local", **evaluation)
    train(local)
    with FakeServer(toy / "sft", load_tokenizer(toy / "sft")) as server:
        over = served_config(config, "served", server, **evaluation)
        train(over)
        assert server.adapters == {} and not (Path(over.output_dir) / "engine").exists()
    want, got = log_of(local.output_dir), log_of(over.output_dir)
    assert without_gap(got) == [pytest.approx(record, rel=1e-4, abs=1e-6) for record in want]
    gaps = [record["engine_gap"] for record in got if "engine_gap" in record]
    assert len(gaps) == 3 and max(gaps) < 1e-5
    loaded = [body["lora_name"] for path, body in server.asked if path.endswith("/load_lora_adapter")]
    asked = {body["model"] for path, body in server.asked if path.endswith("/completions")}
    assert len(loaded) == 4 and asked == set(loaded)  # at the start, step 2, and evaluations behind 2 and 3


@pytest.mark.full
def test_a_server_that_dies_costs_no_step(config, toy):
    tokenizer = load_tokenizer(toy / "sft")
    with FakeServer(toy / "sft", tokenizer) as server:
        whole = served_config(config, "whole", server)
        train(whole)
    with FakeServer(toy / "sft", tokenizer) as server:
        broken = served_config(config, "broken", server)
        server.fault = lambda path, body: "die" if len(server.adapters) and len(loads(server)) > 2 else None
        with pytest.raises(IpvrmError, match=r"same command again.*The run so far: .*checkpoint-2") as caught:
            train(broken)
        assert "\n" not in str(caught.value)
    with FakeServer(toy / "sft", tokenizer) as server:  # on another port
        train(replace(broken, engine=server.url, resume_from_checkpoint="auto"))
        assert len(loads(server)) == 1
    assert log_of(broken.output_dir) == [
        pytest.approx(record, rel=1e-4, abs=1e-6) for record in log_of(whole.output_dir)
    ]
    assert_close_weights(broken.output_dir, whole.output_dir, toy / "sft")


def loads(server):
    return [path for path, _ in server.asked if path.endswith("/load_lora_adapter")]


@pytest.mark.slow
def test_a_server_of_other_weights_is_found_out(config, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("ipvrm.training.policy_engine.MOST_APART", 1e-3)  # a right one is 1e-5 apart here
    save_model(scaled(toy / "sft", 1.3), tmp_path / "sft")
    with FakeServer(tmp_path / "sft", load_tokenizer(toy / "sft")) as server:
        with pytest.raises(IpvrmError, match=r"nats a token from the policy's, of which at most 0.001"):
            train(served_config(config, "run", server, max_steps=1, rollout_prompts=12))
        server.fault = lambda path, body: 404 if path.endswith("adapter") else None
        with pytest.raises(IpvrmError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora"):
            train(served_config(config, "run2", server, max_steps=1))
    with pytest.raises(IpvrmError, match="--engine of a server needs --lora_r"):
        train(served_config(config, "run3", server, lora_r=0))
