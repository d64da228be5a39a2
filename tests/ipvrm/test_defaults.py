"""Every default and where it comes from: the paper, the released code, or our choice and why.

A flag without an entry fails, and so does an entry whose value is not the default. `paper` is arXiv
2604.13197, `released` its released code with the file that holds the value; what both share stands once.
"""

import re
from dataclasses import MISSING, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ipvrm.cli import COMMANDS
from ipvrm.evaluate.policy import PolicyEvalConfig, sampling_of
from ipvrm.training import policy_config, reward_config
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.reward_config import RewardConfig


class Default(NamedTuple):
    """A value with its source; of the two presets where they differ. `when` are the flags under which it is
    read."""

    value: Any
    source: str
    release: Any = None
    release_source: str = ""
    when: dict[str, Any] = {}


def both(paper, source, release, release_source, **when):
    return Default(paper, source, release, release_source, when)


def one(value, source, **when):
    return Default(value, source, when=when)


REQUIRED = "the user's"
OURS = "our choice: "
A_PLACE = OURS + "a path, looked for where it was recorded"
DATA_BAD = OURS + "nothing is left out unasked"
RM = "released README.md, the train command of step 2"
RM_CODE = "released step2_rm_training/train_rm_with_accelerate.py, its default"
RL = "released step3_distrl/config/distrl_config.yaml"
VERL = "released code: verl's default, which distrl_config.yaml leaves"
EVAL = "released eval_policy/run_policy_eval.sh"
APP_C = "paper, Appendix C"
PRIME = "PRIME's code, in verl recipe/prime/config/prime_trainer.yaml"
SPEED = OURS + "memory and speed alone"
SERVED = OURS + "nothing else needs to run"
PATIENCE = OURS + "the longest responses take minutes on a busy server"
ENGINE = {"engine": one("transformers", SERVED), "engine_timeout": one(600.0, PATIENCE)}
SCORING_ENGINES = ENGINE | {"reference_engine": one("transformers", SERVED)}
LENGTH = RL + ", max_response_length; the paper names none"
KEEP = OURS + "two checkpoints are enough to go on from"

TRAIN_RM = {
    "model": one(REQUIRED, ""),
    "train_data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "objective": one("ipvrm", "paper, Eq. 9"),
    "preset": one("paper", OURS + "the paper is the method"),
    "beta": one(10.0, f"paper, Appendix C; {RM}"),
    "margin": both(5.0, APP_C, 0.0, f"{RM}: it never passes --gamma, whose default is 0"),
    "pairs": one(
        "one",
        "released step2_rm_training/build_preference_datasets.py, max-pairs-per-prompt",
        objective="dpo",
    ),
    "prefix_weighting": one("uniform", "paper, Eq. 9"),
    "reference": one(None, "paper, Appendix C: the model it starts from"),
    "eval_data": one(None, OURS + "validation is asked for"),
    "learning_rate": one(5e-7, f"paper, Appendix C; {RM}"),
    "lora_r": one(0, f"paper, Appendix C: it names LoRA for SFT and RL alone; {RM}"),
    "lora_alpha": one(8.0, "paper, Appendix C: 128 at rank 128", lora_r=8),
    "lora_target_modules": one(("all-linear",), RL + ", target_modules", lora_r=8),
    "lr_scheduler_type": both(
        "linear", OURS + "the paper names none; TrainingArguments' default", "cosine", RM_CODE
    ),
    "warmup_ratio": both(0.0, OURS + "the paper names none for reward models", 0.03, RM_CODE),
    "num_train_epochs": both(1.0, OURS + "the paper names none; one, as its SFT", 3.0, RM),
    "max_steps": one(None, OURS + "epochs decide"),
    "global_batch_size": one(64, f"paper, Appendix C; {RM}: 1 x 8 x 8 devices"),
    "per_device_train_batch_size": one(8, SPEED),
    "gradient_accumulation_steps": one(None, OURS + "global_batch_size decides"),
    "weight_decay": one(0.0, f"{RM_CODE}; the paper names none"),
    "max_grad_norm": one(1.0, f"{RM_CODE}; the paper names none"),
    "chat_template_kwargs": one(None, OURS + "as the model's template; release: test_chat.py"),
    "max_length": both(4096, OURS + "room for 2,048 + 2,048; the paper names none", 2560, RM),
    "on_long": one("drop", OURS + "a cut response has no outcome; the released code cuts the prompt"),
    "on_bad_row": one("error", DATA_BAD),
    "mixed_precision": both(
        "no", OURS + "the same numbers on every machine", "bf16", "released accelerate_config/fsdp.yaml"
    ),
    "gradient_checkpointing": one(False, SPEED),
    "fsdp": one(False, SPEED),
    "seed": both(42, "paper, Appendix C: of the dataloader in RL", 1, RM_CODE),
    "logging_steps": one(1, OURS + "every update is logged"),
    "eval_steps": one(None, OURS + "at the start and the end"),
    "save_steps": one(500, OURS + "TrainingArguments' default"),
    "save_total_limit": one(2, KEEP),
    "report_to": one(None, OURS + "metrics.jsonl holds the same numbers"),
    "resume_from_checkpoint": one(None, OURS + "a run starts afresh unless asked"),
    "use_cpu": one(False, SPEED),
    "dry_run": one(False, OURS + "a run runs"),
}

ONLINE_RM = "paper, Section 3.3: the online reward model learns with both"
TRAIN_POLICY = {
    **ENGINE,
    "model": one(REQUIRED, ""),
    "train_data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "algorithm": one("distrl", "paper, Eq. 11 to 14"),
    "reward_model": one(None, OURS + "grpo and spro have none; the others ask for it"),
    "preset": one("paper", OURS + "the paper is the method"),
    "offline": one(False, "paper, Section 3: rollouts of the policy in training"),
    "td_reference": one("behaviour", "paper, Appendix B and Table 9; " + RL + ", ref_model_type old"),
    "rm_update": one("before", RL + ", update; the paper does not say"),
    "reference": one(None, A_PLACE),
    "dlw": one(None, ONLINE_RM + "; None: on for ipvrm"),
    "adb": one(None, ONLINE_RM + "; None: on for ipvrm"),
    "rm_margin": one(None, OURS + "as it was trained; release: 5, " + RL),
    "rm_learning_rate": both(1e-4, APP_C, 2e-6, RL),
    "rm_lora_r": both(128, f"{APP_C}; at its rate of 1e-4 only adapters are meant", 0, RL + ", lora_rank"),
    "rm_minibatch_size": one(128, RL + ", reward_model.mini_batch_size; the paper names none"),
    "rm_max_grad_norm": both(1.0, OURS + "the paper names none", 10.0, RL + ", grad_clip"),
    "rm_weight_decay": one(0.0, RL + ", weight_decay; the paper names none"),
    "gae_coef": both(1.0, "paper, Eq. 13 has none", 0.05, RL + ", reward_gae_coef"),
    "discount": one(1.0, RL + ", gamma; the paper names none"),
    "lam": both(
        0.95, OURS + "the paper names none; at 1 the sum of unit-variance terms dwarfs the outcome", 1.0, RL
    ),
    "alpha": one(0.1, f"{APP_C}; {RL}, distrl_loss_coef"),
    "candidate_mode": both(
        "min_prob", "paper, Section 3.2: all with p >= P_min", "top_k", RL + ", candidate_top_k"
    ),
    "min_prob": one(0.1, f"{APP_C}; {RL}, candidate_min_p"),
    "top_k": one(5, RL + ", candidate_top_k", candidate_mode="top_k"),
    "clip_low": one(0.2, f"{APP_C}; {RL}"),
    "clip_high": one(0.28, f"{APP_C}; {RL}"),
    "candidate_clip_low": one(0.2, f"{APP_C}; released step3_distrl/dl_core_algos.py"),
    "candidate_clip_high": both(0.28, APP_C, 0.2, "released step3_distrl/dl_core_algos.py"),
    "dual_clip": both(
        None, "paper, Eq. 11 and 12 have none", 3.0, "released step3_distrl/dl_dp_actor.py, clip_ratio_c"
    ),
    "spro_beta": one(0.05, OURS + "as PRIME's; SPRO names none", algorithm="spro", reward_model=None),
    "num_generations": both(4, APP_C, 16, RL + ", rollout.n"),
    "rollout_prompts": both(512, APP_C, 1024, RL + ", train_batch_size x oversample_factor"),
    "max_rounds": one(1, f"{APP_C}: one round of twice the prompts; {RL}, oversample_factor"),
    "train_prompts": both(256, APP_C, 512, RL + ", train_batch_size"),
    "chat_template_kwargs": one(None, OURS + "as the model's template; release: test_chat.py"),
    "max_new_tokens": one(2048, LENGTH),
    "drop_truncated": both(
        "response", OURS + "the paper is silent; the others have outcomes", "prompt", RL + ", filter_truncate"
    ),
    "temperature": one(1.0, f"{RL}; paper, Section 4.1 for reward-model data"),
    "verifier": one("math", "paper, Appendix C: rule-based outcome labels"),
    "verifier_timeout": one(
        10.0, OURS + "a time-out is counted, and 1 s (released) is short on a busy machine"
    ),
    "verifier_workers": one(None, SPEED),
    "lora_r": both(128, APP_C, 0, RL + ", lora_rank"),
    "lora_alpha": one(128.0, "paper, Appendix C: 128 at rank 128 (of its SFT)"),
    "lora_target_modules": one(("all-linear",), RL + ", target_modules"),
    "max_steps": one(100, OURS + "a run is as long as it is asked to be"),
    "minibatch_size": both(
        128, OURS + "the paper names none", 2048, RL + ", ppo_mini_batch_size of prompts x 16"
    ),
    "per_device_train_batch_size": one(8, SPEED),
    "per_device_eval_batch_size": one(64, SPEED),
    "learning_rate": both(3e-5, APP_C, 2e-5, RL),
    "lr_scheduler_type": one("constant", f"{VERL}; the paper names none"),
    "warmup_ratio": one(0.0, f"{VERL}; the paper names none"),
    "weight_decay": both(0.0, OURS + "the paper names none", 0.01, VERL),
    "max_grad_norm": one(1.0, f"{VERL}; the paper names none"),
    "mixed_precision": both(
        "no",
        OURS + "the same numbers on every machine",
        "bf16",
        "released step3_distrl/dl_dp_actor.py and dl_dp_rm.py: autocast of their forwards",
    ),
    "gradient_checkpointing": one(False, SPEED),
    "eval_data": one(None, OURS + "evaluation is asked for"),
    "eval_steps": one(None, OURS + "at the start and the end", eval_data="e"),
    "eval_temperature": both(0.6, "paper, Section 4.1", 0.7, EVAL, eval_data="e"),
    "eval_top_p": both(0.95, "paper, Section 4.1", 0.8, EVAL, eval_data="e"),
    "eval_top_k": both(0, "paper, Section 4.1 names none", 20, EVAL, eval_data="e"),
    "eval_num_generations": both(
        1, OURS + "a curve over the run; the paper's avg@8 takes eight times as long", 8, EVAL, eval_data="e"
    ),
    "seed": one(42, APP_C),
    "save_steps": one(20, OURS + "every 20 steps of minutes"),
    "save_total_limit": one(2, KEEP),
    "report_to": one(None, OURS + "metrics.jsonl holds the same numbers"),
    "resume_from_checkpoint": one(None, OURS + "a run starts afresh unless asked"),
    "on_bad_row": one("error", DATA_BAD),
    "use_cpu": one(False, SPEED),
    "dry_run": one(False, OURS + "a run runs"),
}

STEPS = "ProcessBench's rendering in the released process_bench/process_eval.py"
ROLLOUT = {
    **ENGINE,
    "model": one(REQUIRED, ""),
    "input": one(REQUIRED, ""),
    "output": one(REQUIRED, ""),
    "num_generations": one(4, f"{APP_C}: n of RL (reward-model data: 5 in the paper, 16 released)"),
    "chat_template_kwargs": one(None, OURS + "as the model's template; released: enable_thinking false"),
    "max_new_tokens": one(2048, LENGTH + " (reward-model data: 3,072 released)"),
    "temperature": one(1.0, "paper, Section 4.1; released README.md, the rollout command"),
    "top_p": one(1.0, "released step2_rm_training/generate_rollouts_vllm.py; the paper names none"),
    "top_k": one(0, "released step2_rm_training/generate_rollouts_vllm.py; the paper names none"),
    "min_prob": one(None, OURS + "what reward-model data does not need is not stored"),
    "reward_model": one(None, OURS + "a reward model is there when rollouts are to be learnt from with it"),
    "seed": one(42, APP_C),
    "limit": one(None, OURS + "all rows"),
    "per_device_eval_batch_size": one(64, SPEED),
    "bf16": one(False, OURS + "the same responses on every machine"),
    "on_bad_row": one("error", DATA_BAD),
    "use_cpu": one(False, SPEED),
}
LABEL = {
    "input": one(REQUIRED, ""),
    "output": one(REQUIRED, ""),
    "verifier": one("math", "paper, Appendix C: rule-based outcome labels"),
    "timeout_seconds": one(
        10.0, OURS + "a time-out is counted, and 1 s (released) is short on a busy machine"
    ),
    "memory_gb": one(8.0, OURS + "a runaway verifier must not take the machine's memory; it is counted"),
    "num_workers": one(None, SPEED),
    "keep_all": one(False, OURS + "a response without an end has no outcome"),
    "on_bad_row": one("error", DATA_BAD),
}
SCORE = {
    **SCORING_ENGINES,
    "model": one(REQUIRED, ""),
    "objective": one(None, OURS + "the reward model's own"),
    "chat_template_kwargs": one(None, OURS + "the reward model's own"),
    "input": one(REQUIRED, ""),
    "output": one(REQUIRED, ""),
    "reference": one(None, A_PLACE),
    "rule": one("step", "paper, Eq. 31 (its main tables)"),
    "threshold": one(
        0.5, OURS + "the value at which an outcome is as likely as not; tune it on labelled steps"
    ),
    "step_format": one("Step {i}: {step}", STEPS),
    "step_separator": one("\n\n", STEPS),
    "per_token": one(False, OURS + "asked for: ten times the output"),
    "min_prob": one(None, OURS + "candidates are asked for"),
    "batch_tokens": one(8192, SPEED),
    "on_bad_row": one("error", DATA_BAD),
    "use_cpu": one(False, SPEED),
}
INSPECT = {
    "input": one(REQUIRED, ""),
    "output": one(REQUIRED, ""),
    "model": one((), OURS + "a logging board has its numbers, and no model"),
    "reference": one(None, A_PLACE),
    "chat_template_kwargs": one(None, OURS + "the reward model's own"),
    "policy": one(None, "paper, Appendix B: the candidates of the policy that the TD is taken against"),
    "pick": one("mistakes", OURS + "what a reader learns most from"),
    "k": one(20, OURS + "a page that is read through"),
    "limit": one(None, OURS + "all rows"),
    "rule": one(None, OURS + "the evaluation's, else step (Eq. 31)"),
    "threshold_from": one((), OURS + "the run's own evaluation is looked for"),
    "step_format": one("Step {i}: {step}", STEPS),
    "step_separator": one("\n\n", STEPS),
    "max_size": one(5.0, OURS + "a page that opens at once"),
    "json": one(False, OURS + "asked for"),
    "batch_tokens": one(8192, SPEED),
    "on_bad_row": one("error", DATA_BAD),
    "use_cpu": one(False, SPEED),
}
REPORT = {
    "dirs": one(REQUIRED, ""),
    "output": one("report", OURS + "files of the working folder"),
}
PROCESSBENCH = {
    **SCORING_ENGINES,
    "model": one(REQUIRED, ""),
    "objective": one(None, OURS + "the reward model's own"),
    "chat_template_kwargs": one(None, OURS + "the reward model's own"),
    "data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "reference": one(None, A_PLACE),
    "transfer_from": one("gsm8k", "ProcessBench's own protocol (arXiv 2412.06559)"),
    "step_format": one("Step {i}: {step}", STEPS),
    "step_separator": one("\n\n", STEPS),
    "max_length": one(8192, OURS + "longer than every item; a longer one counts as missed, never cut"),
    "batch_tokens": one(8192, SPEED),
    "limit": one(None, OURS + "all rows"),
    "bootstrap_resamples": one(2000, OURS + "intervals steady to a tenth of a point"),
    "seed": one(0, OURS + "of the bootstrap"),
    "use_cpu": one(False, SPEED),
}
BON = {
    "model": one(REQUIRED, ""),
    "data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "objective": one(None, OURS + "the reward model's own"),
    "chat_template_kwargs": one(None, OURS + "the reward model's own"),
    "reference": one(None, A_PLACE),
    "n": one((4, 16, 64), "paper, Table 1"),
    "step_separator": one("\n\n", STEPS),
    "max_length": one(8192, OURS + "as eval processbench; a longer response is picked last, never cut"),
    "batch_tokens": one(8192, SPEED),
    "bootstrap_resamples": one(2000, OURS + "intervals steady to a tenth of a point"),
    "seed": one(0, OURS + "of the bootstrap"),
    "use_cpu": one(False, SPEED),
}
POLICY = {
    **ENGINE,
    "model": one(REQUIRED, ""),
    "data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "preset": one("paper", OURS + "the paper is the method"),
    "num_generations": one(8, "paper, Section 4.1: avg@8"),
    "k": one((1, 4, 8), OURS + "up to the eight that avg@8 samples"),
    "temperature": both(0.6, "paper, Section 4.1", 0.7, EVAL),
    "top_p": both(0.95, "paper, Section 4.1", 0.8, EVAL),
    "top_k": both(0, "paper, Section 4.1 names none", 20, EVAL),
    "chat_template_kwargs": one(None, OURS + "as the model's template; release: test_chat.py"),
    "max_new_tokens": one(2048, LENGTH),
    "seed": one(42, APP_C),
    "limit": one(None, OURS + "all rows"),
    "verifier": one("math", "paper, Appendix C: rule-based outcome labels"),
    "verifier_timeout": one(
        10.0, OURS + "a time-out is counted, and 1 s (released) is short on a busy machine"
    ),
    "verifier_workers": one(None, SPEED),
    "per_device_eval_batch_size": one(64, SPEED),
    "bf16": one(False, OURS + "the same responses on every machine"),
    "bootstrap_resamples": one(2000, OURS + "intervals steady to a tenth of a point"),
    "use_cpu": one(False, SPEED),
}
TD = {
    **ENGINE,
    "policy": one(REQUIRED, ""),
    "reward_model": one(REQUIRED, ""),
    "objective": one(None, OURS + "the reward model's own"),
    "data": one(REQUIRED, ""),
    "output_dir": one(REQUIRED, ""),
    "reference": one(None, A_PLACE),
    "num_prompts": one(128, OURS + "about the paper's 2,500 branches"),
    "num_responses": one(4, f"{APP_C}: n of RL"),
    "prefixes_per_response": one(4, OURS + "about the paper's 2,500 branches"),
    "completions": one(16, OURS + "the paper's single one is an outcome with the noise of one coin"),
    "min_prob": one(0.1, APP_C),
    "top_k": one(None, OURS + "all candidates; the paper's 5 is --top_k 5"),
    "chat_template_kwargs": one(None, OURS + "as the model's template"),
    "max_new_tokens": one(2048, LENGTH),
    "temperature": one(1.0, "paper, Section 4.1"),
    "verifier": one("math", "paper, Appendix C: rule-based outcome labels"),
    "verifier_timeout": one(
        10.0, OURS + "a time-out is counted, and 1 s (released) is short on a busy machine"
    ),
    "verifier_workers": one(None, SPEED),
    "per_device_eval_batch_size": one(64, SPEED),
    "batch_tokens": one(8192, SPEED),
    "bootstrap_resamples": one(2000, OURS + "intervals steady to a tenth of a point"),
    "seed": one(42, APP_C),
    "use_cpu": one(False, SPEED),
}
FOLDER = OURS + "files of the working folder"
DEMO = {
    "output_dir": one("runs/demo", FOLDER),
    "quick": one(False, OURS + "the whole of it, in minutes"),
    "seed": one(0, OURS + "of everything that is drawn; the first of the committed results"),
    "policy_seeds": one(1, OURS + "one run takes minutes, and another two more each"),
}
FIG6 = {
    "demo": one("runs/demo", OURS + "where `ipvrm demo` writes"),
    "output_dir": one("runs/fig6", FOLDER),
    "seeds": one((0,), OURS + "one run of each variant takes minutes"),
}
GIVEN = OURS + "yours to name under --scale full; smoke makes its own"
REPRODUCE = {
    "names": one(REQUIRED, ""),
    "scale": one("smoke", OURS + "what a CPU does in minutes; full prints its plan first"),
    "base_model": one("qwen3-0.6b", OURS + "the paper's smallest, whose data the release holds"),
    "model": one(None, GIVEN),
    "prompts": one("PRIME-RL/Eurus-2-RL-Data", "paper, Datasets: Eurus-2-RL-Data for RL"),
    "problems": one(None, GIVEN),
    "processbench": one(None, GIVEN),
    "output_dir": one("runs/reproduce", FOLDER),
    "dry_run": one(False, OURS + "off"),
}
SMALL = OURS + "a model that a CPU trains in a minute"
TINY_MODEL = {
    "output_dir": one(REQUIRED, ""),
    "texts": one(REQUIRED, ""),
    "vocab_size": one(6144, OURS + "words of a few megabytes of text, in a head that stays small"),
    "hidden_size": one(96, SMALL),
    "intermediate_size": one(288, SMALL + "; three times the hidden size, as Qwen3's"),
    "num_hidden_layers": one(3, SMALL),
    "num_attention_heads": one(4, SMALL),
    "num_key_value_heads": one(2, OURS + "grouped queries, two a key, as Qwen3-0.6B"),
    "max_position_embeddings": one(8192, OURS + "what eval processbench reads at most"),
    "tie_word_embeddings": one(True, OURS + "as Qwen3-0.6B"),
    "seed": one(42, OURS + "as the trainers"),
}
TABLES = {
    "demo": DEMO,
    "demo fig6": FIG6,
    "reproduce": REPRODUCE,
    "make-tiny-model": TINY_MODEL,
    "train-rm": TRAIN_RM,
    "train-policy": TRAIN_POLICY,
    "rollout": ROLLOUT,
    "label": LABEL,
    "score": SCORE,
    "inspect": INSPECT,
    "report": REPORT,
    "eval processbench": PROCESSBENCH,
    "eval bon": BON,
    "eval policy": POLICY,
    "eval td": TD,
}
# Where the default of a flag is another one under another objective or algorithm.
OF_ITS_OWN = [
    *(
        ("train-rm", "beta", one(0.05, "paper, Appendix C: Implicit PRM and DPO-RM", objective=objective))
        for objective in ("implicit_prm", "dpo")
    ),
    ("train-rm", "beta", one(0.2, "paper, Appendix C: Q-RM", objective="q_rm")),
    (
        "train-rm",
        "margin",
        one(2.0, f"{APP_C}: Q-RM; the released margin of 0 is of ipvrm alone", objective="q_rm"),
    ),
    ("train-policy", "td_reference", one("sft", f"{PRIME}, ref_type freeze", algorithm="prime")),
    (
        "train-policy",
        "rm_learning_rate",
        both(1e-6, f"{PRIME}, reward_model.model.optim.lr", 2e-6, RL, algorithm="prime"),
    ),
    ("train-policy", "rm_lora_r", one(0, f"{PRIME}, which has no adapters", algorithm="prime")),
]


def config_class(command):
    return getattr(import_module(COMMANDS[command].module), COMMANDS[command].config)


def missing_and_stale(command, names):
    """Flags without an entry, entries without a flag."""
    return sorted(set(names) - set(TABLES[command])), sorted(set(TABLES[command]) - set(names))


def resolved(command, preset, when):
    """The config of a command when no flag is given but `when`, with what its preset fills in."""
    if command == "train-rm":
        return reward_config.resolve(RewardConfig("m", "d", "o", preset=preset, **when))
    if command == "train-policy":
        given = {"reward_model": "r", "preset": preset} | when
        return policy_config.resolve(PolicyConfig("m", "d", "o", **given))[0]
    if command == "eval policy":
        config = PolicyEvalConfig("m", "d", "o", preset=preset)
        return replace(config, **sampling_of(config))
    return None


def test_every_command_has_a_table():
    own = {name for name, command in COMMANDS.items() if command.config is not None}
    assert own == set(TABLES), "a command without a table of its defaults, or a table without a command"


@pytest.mark.parametrize("command", TABLES)
def test_every_flag_has_an_entry(command):
    names = [field.name for field in fields(config_class(command))]
    assert missing_and_stale(command, names) == ([], [])
    assert missing_and_stale(command, [*names, "new"]) == (["new"], [])  # what this test is for


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, table in TABLES.items() for flag in table]
)
def test_the_default_is_what_the_table_says(command, flag):
    entry = TABLES[command][flag]
    (field,) = [field for field in fields(config_class(command)) if field.name == flag]
    if entry.value == REQUIRED:
        assert field.default is MISSING
        return
    found = resolved(command, "paper", entry.when)
    given = flag in ("reward_model", "preset")  # `resolved` gives them
    assert (field.default if found is None or given else getattr(found, flag)) == entry.value
    if entry.release_source:
        release = getattr(resolved(command, "release", entry.when), flag)
        assert release == entry.release != entry.value
    elif found is not None and not given and flag != "lora_alpha":  # at rank 0 nothing reads it
        assert getattr(resolved(command, "release", entry.when), flag) == entry.value


@pytest.mark.parametrize(
    ("command", "flag", "entry"), OF_ITS_OWN, ids=[f"{e.when}-{flag}" for _, flag, e in OF_ITS_OWN]
)
def test_the_default_of_an_objective_or_algorithm_is_what_the_list_says(command, flag, entry):
    found = {preset: getattr(resolved(command, preset, entry.when), flag) for preset in ("paper", "release")}
    release = entry.release if entry.release_source else entry.value
    assert found == {"paper": entry.value, "release": release}
    assert entry.value != TABLES[command][flag].value, "the default of all: it needs no entry"


@pytest.mark.parametrize("command", TABLES)
def test_every_value_names_its_source(command):
    """Our own choices say why; a value of the paper or of the released code says where it stands."""
    own = [(flag, entry) for of, flag, entry in OF_ITS_OWN if of == command]
    for flag, entry in [*TABLES[command].items(), *own]:
        if entry.value == REQUIRED:
            continue
        for source in filter(None, (entry.source, entry.release_source)):
            known = ("paper, ", "released ", OURS, "ProcessBench's ", "PRIME's ")
            assert source.startswith(known) and source.strip() != OURS.strip(), (flag, source)


def in_words(value):
    """A default as a help text has it: 0.0001 is 1e-4."""
    if not isinstance(value, int | float):
        return "none" if value is None else value
    return re.sub(r"\.?0*e-0*", "e-", f"{value:e}") if 0 < value < 1e-3 else f"{value:g}"


def said_defaults(help_of):
    """(the paper's, the release's) default of a flag as its help says them, None where it does not."""
    found = re.search(r"Default: ([^\s;]+)[^;]*; release: ([^\s;]+?)[.;]?(?:\s|$)", help_of)
    return found and found.groups()


@pytest.mark.parametrize("command", ["train-rm", "train-policy", "eval policy"])
def test_the_help_of_a_flag_names_both_presets(command, capsys):
    """Where the defaults differ; as --help prints them, read to the next flag."""
    from ipvrm.cli import parse

    with pytest.raises(SystemExit):
        parse(config_class(command), ["--help"], prog=command)
    text = " ".join(capsys.readouterr().out.translate(dict.fromkeys(map(ord, "│╭╰─╮╯"), " ")).split())

    def help_of(flag):
        start = text.index(f"--{flag} ")
        return text[start : text.find(" --", start + len(flag) + 4)]

    found = {f: said_defaults(help_of(f)) for f, entry in TABLES[command].items() if entry.release_source}
    assert found == {
        flag: (in_words(entry.value), in_words(entry.release))
        for flag, entry in TABLES[command].items()
        if entry.release_source
    }
    assert len(found) >= 3
    for of, flag, entry in OF_ITS_OWN:
        if of == command and isinstance(entry.value, float):
            assert in_words(entry.value) in help_of(flag).partition("efault")[2], (flag, entry.when)


def test_grpo_and_spro_have_the_same_defaults_as_distrl():
    """Every flag that an algorithm reads has one default, but those of `OF_ITS_OWN`."""
    base = resolved("train-policy", "paper", {})
    for algorithm in policy_config.ALGORITHMS:
        model = None if algorithm in policy_config.NO_REWARD_MODEL else "r"
        found = policy_config.resolve(PolicyConfig("m", "d", "o", algorithm=algorithm, reward_model=model))[0]
        for name, value in vars(replace(found, algorithm="distrl", reward_model="r")).items():
            own = {"spro_beta", *(flag for _, flag, e in OF_ITS_OWN if e.when == {"algorithm": algorithm})}
            assert value is None or value == getattr(base, name) or name in own, (algorithm, name)


README = Path(__file__).parents[2] / "ipvrm" / "README.md"


def readme_on_presets(readme):
    """What the guide says of the presets' defaults, in one line: all before the table of differences."""
    return " ".join(readme.partition("\n## Presets")[2].partition("\n|")[0].split())


def said_of_the_presets():
    """The same from the defaults themselves."""
    rm, policy = (
        {preset: resolved(command, preset, {}) for preset in ("paper", "release")}
        for command in ("train-rm", "train-policy")
    )
    paper, release = policy["paper"], policy["release"]
    prime = resolved("train-policy", "paper", {"algorithm": "prime"})
    assert paper.lora_r == paper.rm_lora_r and release.lora_r == release.rm_lora_r == 0
    assert rm["release"].mixed_precision == release.mixed_precision
    assert rm["paper"].mixed_precision == paper.mixed_precision == "no"
    assert prime.rm_lora_r == 0
    assert release.candidate_mode == "top_k" and config_class("train-rm").preset == paper.preset
    rates = [
        f"{rate:.0e}".replace("e-0", "e-")
        for rate in (paper.learning_rate, paper.rm_learning_rate, prime.rm_learning_rate)
    ]
    yield f"`--preset {config_class('train-policy').preset}`, the default of both trainers"
    yield (
        f"margin {rm['paper'].margin:g} offline; LoRA of rank {paper.lora_r} on policy and reward model at "
        f"{' and '.join(rates[:2])} online, all weights of PRIME's reward model at {rates[2]} (`--lora_r 0 "
        "--rm_lora_r 0` for full fine-tuning)"
    )
    yield (
        f"margin {rm['release'].margin:g} offline, full fine-tuning, n {release.num_generations}, "
        f"GAE at {release.gae_coef:g}, top-{release.top_k} candidates, forwards of both trainers in "
        f"{release.mixed_precision}"
    )


def wrong_or_unknown(text):
    """Defaults that the text does not hold, and numbers in it that are none of them."""
    missing = [said for said in said_of_the_presets() if said not in text]
    for said in said_of_the_presets():
        text = text.replace(said, "")
    return missing, re.findall(r"\d[\d.e-]*", text.partition("These differences")[0])


@pytest.mark.skipif(not README.exists(), reason="no checkout with a README beside the tests")
def test_the_guide_names_the_defaults():
    text = readme_on_presets(README.read_text(encoding="utf-8"))
    assert wrong_or_unknown(text) == ([], [])
    for right, wrong in (
        ("margin 5", "margin 4"),
        ("1e-4 online", "1e-5 online"),
        ("model at 1e-6", "model at 1e-4"),
        ("n 16", "n 8"),
        ("in bf16", "in fp16"),
    ):
        assert right in text
        missing, numbers = wrong_or_unknown(text.replace(right, wrong))
        assert missing and numbers, f"{wrong} is not noticed"


def unknown_flags(readme):
    """Flags that the users' guide gives to a command that has none of that name."""
    commands = sorted(TABLES, key=len, reverse=True)
    shown = re.findall(rf"ipvrm ({'|'.join(commands)})\b((?: [^\n`#]*)?)", readme)
    unseen = set(TABLES) - {command for command, _ in shown} - {"make-tiny-model"}  # of tests and examples
    assert not unseen, "a command that the guide does not show"
    used = [(command, flag) for command, rest in shown for flag in re.findall(r"--(\w+)", rest)]
    assert len(used) > 20
    return [(command, flag) for command, flag in used if flag not in TABLES[command]]


@pytest.mark.skipif(not README.exists(), reason="no checkout with a README beside the tests")
def test_the_guide_gives_commands_the_flags_that_they_have():
    pages = README, README.parents[1] / "README.md"
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert unknown_flags(text) == []
    assert unknown_flags(text.replace("label --input", "label --in_put")) == [("label", "in_put")]
