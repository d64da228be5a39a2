"""The online reward model: what its AUC is measured on, and when it needs its own reference."""

import json
import random
import shutil

import pytest
import torch

import ipvrm.training.train_policy as train_policy_module
from ipvrm import IpvrmError, RewardConfig, RewardModel, train_reward_model
from ipvrm.data.batches import epoch_order
from ipvrm.data.responses import Response
from ipvrm.models.causal_lm import load_model
from ipvrm.run_folder import JsonlLog
from ipvrm.training.online_reward import OnlineReward, RewardInputs
from ipvrm.training.optimizer import data_parallel_accelerator
from ipvrm.training.policy_config import PolicyConfig, resolve
from ipvrm.training.policy_rollouts import Verified, rollouts_of
from ipvrm.training.run import RESULTS, Run


@pytest.fixture(scope="module")
def reward_folder(tiny_folder, rollouts, tmp_path_factory):
    """A reward model that has moved from its reference a little."""
    folder = tmp_path_factory.mktemp("online") / "rm"
    settings = {"margin": 1.0, "learning_rate": 1e-3, "per_device_train_batch_size": 44, "use_cpu": True}
    train_reward_model(RewardConfig(str(tiny_folder), str(rollouts), str(folder), **settings), progress=False)
    return folder


@pytest.fixture
def measured(tiny_folder, reward_folder, tokenizer, tmp_path, monkeypatch):
    """A function that gives the record of step 1 under an order of scoring and update, and what `auc` got:
    24 responses, 4 to a prompt."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    auc = train_policy_module.auc
    monkeypatch.setattr(train_policy_module, "auc", lambda *pair: seen.append(pair) or auc(*pair))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    rng, verified = random.Random(5), []
    for number in range(24):
        prompt = tokenizer(f"What is {number // 4} + 1?", add_special_tokens=False).input_ids
        text = f"Step {rng.randint(0, 9)}: carry." * rng.randint(0, 2) + f" Answer: {rng.randint(0, 99)}"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        response = Response((*prompt, *ids), len(prompt), int(number % 4 < 2))
        verified.append(Verified(number // 4, number % 4, response))

    def measure(rm_update, minibatch_size, reward_model=reward_folder, rows=8):
        seen.clear()
        config = PolicyConfig(
            model=str(tiny_folder),
            reward_model=str(reward_model),
            per_device_train_batch_size=rows,
            train_data=str(prompts),
            output_dir=str(tmp_path / "run"),
            rm_update=rm_update,
            rm_learning_rate=None if rm_update == "frozen" else 3e-3,
            rm_minibatch_size=None if rm_update == "frozen" else minibatch_size,
            rm_lora_r=None if rm_update == "frozen" else 0,
            use_cpu=True,
        )
        config, method = resolve(config)
        accelerator = data_parallel_accelerator("test", use_cpu=True, mixed_precision="no")
        run = Run("test", config, accelerator, starts_from=[], mark=RESULTS, progress=False)
        trainer = train_policy_module._Trainer(train_policy_module._Inputs(config, method, run), None)
        batch = rollouts_of(verified, torch.device("cpu"))
        trainer._behaviour(batch)
        frozen, reference = trainer.reward.score(batch)[0], batch.old_logprobs
        measure.before = (frozen - reference, batch.cu_seqlens)
        record = trainer._reward(trainer.reward, batch, 0, 1.0)
        measure.after = trainer.reward.score(batch)[0] - reference
        return record, list(seen)

    return measure


@pytest.mark.slow
def test_with_one_minibatch_the_auc_is_that_of_the_frozen_model(measured):
    records = [measured(order, 24)[0] for order in ("frozen", "before", "after")]
    for name in ("rm_auc", "rm_accuracy", "rm_auc_responses"):
        assert len({record[name] for record in records}) == 1, name
    assert records[0]["rm_auc_responses"] == 24 and records[0]["rm_auc"] not in (0.0, 0.5, 1.0)


@pytest.mark.slow
def test_a_one_sided_minibatch_has_no_auc_and_the_log_says_null(measured, tmp_path):
    record, _ = measured("before", 1)
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(record)
    assert '"rm_auc": null, ' in log.path.read_text()


@pytest.mark.slow
def test_with_several_minibatches_it_is_that_of_the_first_before_any_update(measured):
    _, ((frozen, outcome), _) = measured("frozen", 8)
    record, ((first, labels), (scored, _)) = measured("before", 8)
    rows = epoch_order(24, 42, 0)[:8]
    assert record["rm_auc_responses"] == 8 and torch.equal(labels, outcome[rows])
    torch.testing.assert_close(first, frozen[rows], rtol=1e-4, atol=1e-6)
    assert record["rm_auc"] == train_policy_module.auc(frozen[rows], labels)
    right = (frozen[rows] > 0) == (labels == 1)
    assert record["rm_accuracy"] == pytest.approx(float(right.float().mean()))
    moved = (scored - frozen).abs().min()
    assert moved > 100 * (first - frozen[rows]).abs().max()  # the updates that it must not hold
    after, ((pooled, _), _) = measured("after", 8)
    assert after["rm_auc_responses"] == 24
    torch.testing.assert_close(pooled, frozen, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_dpo_model_learns_from_pairs_of_the_rollouts(measured, reward_folder, tmp_path):
    """One update from all 12 pairs, whatever the micro-batches: loss and accuracy by hand; it has learnt."""
    folder = tmp_path / "dpo"
    shutil.copytree(reward_folder, folder)
    stored = json.loads((folder / "ipvrm_config.json").read_text())
    (folder / "ipvrm_config.json").write_text(
        json.dumps(stored | {"objective": "dpo", "margin": None, "beta": 2.0})
    )
    records = [measured("before", 24, folder, rows)[0] for rows in (1, 3, 64)]
    log_ratio, edges = measured.before
    sums = torch.stack([part.sum() for part in log_ratio.double().split(edges.diff().tolist())])
    chosen = torch.tensor([4 * prompt + k for prompt in range(6) for k in (0, 1)])
    difference = 2.0 * (sums[chosen] - sums[chosen + 2])
    loss = float(-torch.nn.functional.logsigmoid(difference).mean())
    for record in records:
        assert record["rm_loss"] == pytest.approx(loss, rel=1e-4)
        assert record["rm_pair_accuracy"] == pytest.approx(float((difference > 0).float().mean()))
        assert record["rm_grad_norm"] == pytest.approx(records[0]["rm_grad_norm"], rel=1e-3)
    after = torch.stack([part.sum() for part in measured.after.double().split(edges.diff().tolist())])
    assert (2.0 * (after[chosen] - after[chosen + 2])).mean() > difference.mean()


@pytest.mark.slow
def test_a_lost_reference_matters_only_where_it_is_read(tiny_folder, reward_folder, tokenizer, tmp_path):
    moved = tmp_path / "rm"
    shutil.copytree(reward_folder, moved)
    stored = json.loads((moved / "ipvrm_config.json").read_text())
    gone = {"reference": "../gone", "reference_given": "gone"}
    (moved / "ipvrm_config.json").write_text(json.dumps(stored | gone))
    accelerator = data_parallel_accelerator("test", use_cpu=True, mixed_precision="no")

    def online(**changes):
        given = {"model": str(tiny_folder), "reward_model": str(moved), "train_data": "", "output_dir": "o"}
        config, method = resolve(PolicyConfig(**given | changes))
        return RewardInputs(config, method.balance, tokenizer)

    for changes in ({"td_reference": "sft"}, {"rm_update": "frozen"}, {"algorithm": "prime"}):
        with pytest.raises(IpvrmError, match="reference model .* was not found"):
            online(**changes)
        assert online(**changes, reference=str(tiny_folder)).reference_folder == tiny_folder
    reward = OnlineReward(online(), accelerator)
    policy = load_model(tiny_folder)
    reward.learnt_from(policy)
    reward.write_model(tmp_path / "saved", policy, tmp_path / "saved")
    RewardModel.from_pretrained(tmp_path / "saved")  # its reference is the policy, saved in it
