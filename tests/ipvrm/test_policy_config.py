"""Flags of `train-policy` that nothing would read are refused, and only those."""

import pytest

from ipvrm import IpvrmError
from ipvrm.training.policy_config import PolicyConfig, reads_reference, resolve


def settings(**changes):
    given = {"reward_model": "r"} | changes
    if given.get("algorithm") in ("grpo", "spro"):
        del given["reward_model"]
    return PolicyConfig("m", "d", "o", **given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "grpo", "lora_r": 0, "lora_target_modules": ("q_proj",)}, "belongs to --lora_r and"),
        (
            {"lora_r": 0, "rm_lora_r": 0, "lora_target_modules": ("q_proj",)},
            "--lora_target_modules belongs to --lora_r and --rm_lora_r",
        ),
        ({"preset": "release", "lora_alpha": 8.0}, "--lora_alpha belongs to --lora_r"),
        ({"lora_r": 0, "lora_alpha": 8.0}, "--lora_alpha belongs to --lora_r"),
        ({"lora_r": -1}, "lora_r must not be negative"),
        ({"algorithm": "grpo", "rm_lora_r": 8}, "algorithm 'grpo' has no --rm_lora_r"),
        ({"algorithm": "spro", "rm_max_grad_norm": 8.0}, "algorithm 'spro' has no --rm_max_grad_norm"),
        ({"algorithm": "reinforce_qrm", "rm_lora_r": 8}, "algorithm 'reinforce_qrm' has no --rm_lora_r"),
        ({"algorithm": "reinforce_qrm", "clip_high": 0.1}, "algorithm 'reinforce_qrm' has no --clip_high"),
        ({"algorithm": "reinforce_qrm", "alpha": 0.1}, "algorithm 'reinforce_qrm' has no --alpha"),
        ({"algorithm": "reinforce_qrm", "dual_clip": 3.0}, "algorithm 'reinforce_qrm' has no --dual_clip"),
        ({"rm_update": "frozen", "rm_minibatch_size": 8}, "leave --rm_minibatch_size out"),
        ({"rm_update": "frozen", "rm_lora_r": 8}, "leave --rm_lora_r out"),
        ({"rm_update": "frozen", "rm_weight_decay": 0.1}, "leave --rm_weight_decay out"),
        ({"rm_minibatch_size": 0}, "rm_minibatch_size must be at least 1"),
        ({"eval_steps": 5}, "--eval_steps belongs to --eval_data"),
        ({"eval_num_generations": 4}, "--eval_num_generations belongs to --eval_data"),
        ({"eval_temperature": 1.0}, "--eval_temperature belongs to --eval_data"),
        ({"eval_top_p": 1.0}, "--eval_top_p belongs to --eval_data"),
        ({"eval_top_k": 5}, "--eval_top_k belongs to --eval_data"),
        ({"reference": "x"}, "--td_reference behaviour: nothing reads --reference"),
        ({"reference": "x", "rm_update": "after"}, "nothing reads --reference"),
        ({"alpha": 0.0, "candidate_clip_low": 0.2}, "--alpha 0: nothing reads --candidate_clip_low"),
        ({"alpha": 0.0, "candidate_clip_high": 0.2}, "--alpha 0: nothing reads --candidate_clip_high"),
        ({"alpha": 0.0, "candidate_mode": "top_k"}, "--alpha 0: nothing reads --candidate_mode"),
        ({"alpha": 0.0, "top_k": 3}, "--alpha 0: nothing reads --top_k"),
        ({"alpha": 0.0, "min_prob": 0.2}, "--alpha 0: nothing reads --min_prob"),
        ({"gae_coef": 0.0, "lam": 0.9}, "--gae_coef 0: nothing reads --lam"),
        ({"gae_coef": 0.0, "discount": 0.9}, "--gae_coef 0: nothing reads --discount"),
        ({"train_prompts": 65, "rollout_prompts": 32, "max_rounds": 2}, "train_prompts 65: a step draws 64"),
        (
            {"eval_data": "e", "eval_temperature": 0.0, "eval_num_generations": 2},
            "leave --eval_num_generations",
        ),
        ({"eval_data": "e", "eval_temperature": -1.0}, "eval_temperature must not be negative"),
        ({"eval_data": "e", "eval_top_p": 2.0}, r"eval_top_p must lie in \(0, 1\]"),
    ],
    ids=str,
)
def test_what_nothing_reads_is_refused(changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        resolve(settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_r": 4, "lora_target_modules": ("q_proj",)},
        {"lora_r": 0, "lora_target_modules": ("q_proj",)},  # of the reward model
        {"lora_r": 0, "rm_lora_r": 0},
        {"preset": "release"},
        {"preset": "release", "eval_data": "e", "eval_temperature": 0.0},
        {"preset": "release", "rollout_prompts": 32},
        {"eval_data": "e", "eval_steps": 5, "eval_temperature": 0.0},
        {"eval_data": "e", "eval_num_generations": 4, "eval_top_p": 1.0},
        {"reference": "x", "td_reference": "sft"},
        {"reference": "x", "rm_update": "frozen"},
        {"reference": "x", "algorithm": "prime"},
        {"algorithm": "reinforce_qrm"},
        {"algorithm": "reinforce_qrm", "preset": "release"},
        {"alpha": 0.0, "gae_coef": 0.0},
        {"alpha": 0.0, "preset": "release"},
        {"rollout_prompts": 32},  # the default of train_prompts is above it
        {"train_prompts": 64, "rollout_prompts": 32, "max_rounds": 2},
    ],
    ids=str,
)
def test_what_is_read_is_not_and_resolving_again_changes_nothing(changes):
    resolved, method = resolve(settings(**changes))
    assert resolve(resolved) == (resolved, method)


def test_the_reference_is_the_behaviour_policy_except_in_prime():
    assert resolve(settings(algorithm="prime"))[0].td_reference == "sft"
    assert resolve(settings(algorithm="prime", td_reference="behaviour"))[0].td_reference == "behaviour"
    for algorithm in ("distrl", "grpo_prm"):
        resolved, _ = resolve(settings(algorithm=algorithm))
        assert resolved.td_reference == "behaviour" and not reads_reference(resolved)
    assert reads_reference(resolve(settings(rm_update="frozen"))[0])
