"""Every hyperparameter that the paper names (arXiv 2604.13197), as the command line that expresses it.

A value stands beside the command whose resolved config has it: most of them are defaults, and the flags are
what a reader has to add.
"""

from importlib import import_module, resources

import pytest
import yaml

from ipvrm.cli import COMMANDS, parse
from ipvrm.evaluate.policy import sampling_of
from ipvrm.models.reward_model import ENDO_DISCOUNT
from ipvrm.reproduce.tables.experiments import experiments, full
from ipvrm.training import policy_config, reward_config

RM = "train-rm --model sft --train_data d --output_dir o"
RL = "train-policy --model sft --train_data d --output_dir o --reward_model rm"
ROLLOUT = "rollout --model sft --input d --output o.parquet"
BON = "eval bon --model rm --data d --output_dir o"
POLICY = "eval policy --model p --data d --output_dir o"
TD = "eval td --policy p --reward_model rm --data d --output_dir o"
# The paper takes the five likeliest tokens whatever their probability: 2,500 branches of 500 prefixes. That
# is not P_min, by which the mean is 1.33 a prefix (Table 11); 1/128 is the least that can be asked for.
BRANCHES = "Section 4.3.3: branches"

PAPER = [  # where, command, {field: value}
    ("Eq. 9, Appendix C: beta and margin of IPVRM", RM, {"objective": "ipvrm", "beta": 10.0, "margin": 5.0}),
    ("Eq. 17: late weighting", f"{RM} --prefix_weighting late", {"prefix_weighting": "late"}),
    ("Eq. 18: early weighting", f"{RM} --prefix_weighting early", {"prefix_weighting": "early"}),
    ("Table 10: margins 0 and 10", f"{RM} --margin 0", {"margin": 0.0}),
    ("Table 10: margins 0 and 10", f"{RM} --margin 10", {"margin": 10.0}),
    ("Appendix C: all reward models", RM, {"learning_rate": 5e-7, "global_batch_size": 64}),
    ("Appendix C: Implicit PRM", f"{RM} --objective implicit_prm", {"beta": 0.05, "margin": None}),
    ("Appendix C: DPO-RM", f"{RM} --objective dpo", {"beta": 0.05, "margin": None, "pairs": "one"}),
    ("Appendix C: Q-RM", f"{RM} --objective q_rm", {"beta": 0.2, "margin": 2.0, "pairs": "one"}),
    ("Section 4.1: five responses a prompt", f"{ROLLOUT} --num_generations 5", {"num_generations": 5}),
    ("Section 4.1: temperature of reward-model data", ROLLOUT, {"temperature": 1.0}),
    ("Appendix C: LoRA of RL", RL, {"lora_r": 128, "rm_lora_r": 128, "learning_rate": 3e-5}),
    ("Appendix C: n, oversampling", RL, {"num_generations": 4, "rollout_prompts": 512, "train_prompts": 256}),
    ("Appendix C: online reward models", RL, {"rm_learning_rate": 1e-4, "algorithm": "distrl"}),
    ("Appendix C: candidates", RL, {"min_prob": 0.1, "alpha": 0.1, "candidate_mode": "min_prob"}),
    *[
        ("Appendix C: alpha, tuned over", f"{RL} --alpha {alpha}", {"alpha": alpha})
        for alpha in (0.05, 0.1, 0.2, 0.5)
    ],
    *[
        ("Table 11: P_min", f"{RL} --min_prob {p}", {"min_prob": p}) for p in (0.05, 0.1, 0.2)
    ],
    ("Appendix C: clipping", RL, {"clip_low": 0.20, "clip_high": 0.28}),
    ("Appendix C: clipping, of candidates", RL, {"candidate_clip_low": 0.20, "candidate_clip_high": 0.28}),
    ("Appendix C: seed", RL, {"seed": 42}),
    ("Appendix B: reference of the TD", RL, {"td_reference": "behaviour"}),
    ("Table 9: the other reference", f"{RL} --td_reference sft", {"td_reference": "sft"}),
    ("Table 8: frozen", f"{RL} --rm_update frozen", {"rm_update": "frozen"}),
    ("Table 8: naive", f"{RL} --dlw False --adb False", {"dlw": False, "adb": False}),
    ("Table 8: DLW alone", f"{RL} --adb False", {"adb": False}),
    ("Table 8: ADB alone", f"{RL} --dlw False", {"dlw": False}),
    *[
        ("Table 5: policies", f"{RL} --algorithm {name}", {"algorithm": name})
        for name in ("distrl", "grpo_prm", "prime", "reinforce_qrm")
    ],
    *[
        ("Table 5: policies", f"{RL[: RL.index(' --reward')]} --algorithm {name}", {"algorithm": name})
        for name in ("grpo", "spro")
    ],
    ("Section 4.1: avg@8", POLICY, {"num_generations": 8, "temperature": 0.6, "top_p": 0.95}),
    ("Table 1: N of Best-of-N", BON, {"n": (4, 16, 64)}),
    (BRANCHES, f"{TD} --top_k 5 --min_prob {1 / 128}", {"top_k": 5, "min_prob": 1 / 128}),
]  # fmt: skip


@pytest.mark.parametrize(("where", "line", "values"), PAPER, ids=lambda x: x if isinstance(x, str) else "")
def test_the_paper_is_expressed(where, line, values):
    words = line.split()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
    command = COMMANDS[name]
    config = parse(
        getattr(import_module(command.module), command.config), words[len(name.split()) :], prog=name
    )
    if name == "train-rm":
        config = reward_config.resolve(config)
    elif name == "train-policy":
        config, _ = policy_config.resolve(config)
    found = vars(config) | (sampling_of(config) if name == "eval policy" else {})
    assert {flag: found[flag] for flag in values} == values


def test_the_branches_of_the_plan_are_those_of_the_paper():
    """`reproduce sec433` runs what stands above."""
    (td,) = (u for u in experiments(full("sft", "prompts", "problems", "pb")) if u.command == "eval td")
    (values,) = (values for where, _, values in PAPER if where == BRANCHES)
    assert {name: td.settings[name] for name in values} == values


def test_endo_rm_decays_as_in_the_paper():
    assert ENDO_DISCOUNT == 0.95  # Appendix C


def test_sft_is_a_config_of_trl():
    """Appendix C, first paragraph; `trl sft` reads it where TRL is there."""
    file = resources.files("ipvrm.reproduce") / "sft.yaml"
    config = yaml.safe_load(file.read_text())
    assert config["dataset_name"] == "PRIME-RL/Eurus-2-SFT-Data"
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * 8 == 64
    paper = {"num_train_epochs": 1, "warmup_steps": 0.01, "max_length": 3072, "learning_rate": 5e-5}
    assert {name: config[name] for name in paper} == paper
    text = file.read_text()
    assert all(f"# {line}" in text for line in ("lora_r: 128", "lora_alpha: 128", "learning_rate: 1.0e-4"))
    trl = pytest.importorskip("trl")
    known = set(trl.SFTConfig.__dataclass_fields__) | set(trl.ModelConfig.__dataclass_fields__)
    assert set(config) <= known | set(trl.ScriptArguments.__dataclass_fields__)
