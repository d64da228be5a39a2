"""Every hyperparameter that the paper names (arXiv 2604.13197), as the command line that expresses it; and
what a run of it needs besides, where the paper is silent.

A value stands beside the command that has it: most of them are defaults, and the flags are what a reader has
to add. What a trainer's functions take is under their names: `loss.`, `advantages.`, `candidates.` and
`balance.` of `train-policy`, `objective.` of `train-rm`; none of them is a flag read back.
"""

import json
import math
from importlib import import_module, resources
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ipvrm import RewardModel
from ipvrm.cli import COMMANDS, main, parse
from ipvrm.evaluate.best_of_n import Samples, best_of_n, response_scores
from ipvrm.evaluate.policy import Judged, sampling_of, summarise
from ipvrm.losses.baselines import prime_advantages
from ipvrm.losses.objectives import online_balance
from ipvrm.reproduce.tables.experiments import experiments, full
from ipvrm.training import policy_config, reward_config, train_policy
from ipvrm_kernels import DISTRL_METRICS

RM = "train-rm --model sft --train_data d --output_dir o"
ALONE = "train-policy --model sft --train_data d --output_dir o"
RL = f"{ALONE} --reward_model rm"
ROLLOUT = "rollout --model sft --input d --output o.parquet"
LABEL = "label --input d --output o.parquet"
SCORE = "score --model rm --input d --output o.jsonl"
PB = "eval processbench --model rm --data d --output_dir o"
BON = "eval bon --model rm --data d --output_dir o"
POLICY = "eval policy --model p --data d --output_dir o"
TD = "eval td --policy p --reward_model rm --data d --output_dir o"
# The paper takes the five likeliest tokens of 500 prefixes whatever their probability, 2,500 branches. `eval
# td` takes at most as many: of the five those with p >= 1/128, the least that can be asked for. That is not
# P_min, by which the mean is 1.33 a prefix (Table 11).
BRANCHES = "Section 4.3.3: at most 2,500 branches"
SILENT = "the paper is silent: "

PAPER = [  # where, command, {what it has: value}
    # reward models
    (
        "Eq. 9, Appendix C: beta and margin of IPVRM, uniform weights",
        RM,
        {"objective.name": "ipvrm", "objective.beta": 10.0, "objective.margin": 5.0}
        | {"objective.prefix_weighting": "uniform", "objective.reduction": "sequence_mean"},
    ),
    ("Eq. 17: late weighting", f"{RM} --prefix_weighting late", {"objective.prefix_weighting": "late"}),
    ("Eq. 18: early weighting", f"{RM} --prefix_weighting early", {"objective.prefix_weighting": "early"}),
    *[
        ("Table 10: margins 0 and 10", f"{RM} --margin {m:g}", {"objective.margin": m})
        for m in (0.0, 10.0)
    ],
    (
        "Appendix C: Implicit PRM",
        f"{RM} --objective implicit_prm",
        {"objective.name": "implicit_prm", "objective.beta": 0.05, "margin": None},
    ),
    (
        "Appendix C: DPO-RM",
        f"{RM} --objective dpo",
        {"objective.name": "dpo", "objective.beta": 0.05, "margin": None, "pairs": "one"},
    ),
    (
        "Appendix C: Q-RM",
        f"{RM} --objective q_rm",
        {"objective.name": "q_rm", "objective.beta": 0.2, "objective.margin": 2.0, "pairs": "one"},
    ),
    *[
        (
            "Appendix C: all reward models, from the SFT model, which is the reference",
            f"{RM} --objective {name}",
            {"learning_rate": 5e-7, "global_batch_size": 64, "reference": None, "lora_r": 0},
        )
        for name in ("ipvrm", "implicit_prm", "dpo", "q_rm")
    ],
    (SILENT + "one epoch, a linear schedule", RM, {"num_train_epochs": 1.0, "lr_scheduler_type": "linear"}),
    (SILENT + "gradient clip", RM, {"max_grad_norm": 1.0}),
    (SILENT + "fp32 weights and forwards", RM, {"mixed_precision": "no"}),
    ("Section 4.1: five responses a prompt", f"{ROLLOUT} --num_generations 5", {"num_generations": 5}),
    ("Section 4.1: temperature of reward-model data", ROLLOUT, {"temperature": 1.0}),
    ("Appendix C: rule-based outcome labels", LABEL, {"verifier": "math", "keep_all": False}),
    # policies
    (
        "Appendix C: LoRA of RL",
        RL,
        {"lora_r": 128, "lora_alpha": 128.0, "rm_lora_r": 128, "learning_rate": 3e-5},
    ),
    ("Appendix C: n, oversampling", RL, {"num_generations": 4, "rollout_prompts": 512, "train_prompts": 256}),
    ("Appendix C: oversampling in one round", RL, {"max_rounds": 1}),
    ("Appendix C: online reward models", RL, {"rm_learning_rate": 1e-4, "rm_update": "before"}),
    ("Appendix C: their margin, as trained", RL, {"rm_margin": None}),
    (
        "Appendix C, Section 3.2: candidates, all with p >= P_min",
        RL,
        {"candidates.min_prob": 0.1, "candidates.top_k": None, "candidates.strict": False}
        | {"candidates.keep_sampled": False, "loss.alpha": 0.1},
    ),
    *[
        ("Appendix C: alpha, tuned over", f"{RL} --alpha {alpha}", {"loss.alpha": alpha})
        for alpha in (0.05, 0.1, 0.2, 0.5)
    ],
    *[
        ("Table 11: P_min", f"{RL} --min_prob {p}", {"candidates.min_prob": p}) for p in (0.05, 0.1, 0.2)
    ],
    ("Appendix C: clipping", RL, {"loss.clip_low": 0.20, "loss.clip_high": 0.28}),
    (
        "Appendix C: clipping, of candidates",
        RL,
        {"loss.candidate_clip_low": 0.20, "loss.candidate_clip_high": 0.28},
    ),
    ("Eq. 11, 12: no dual clip", RL, {"loss.dual_clip": None}),
    (
        "Eq. 11, 12: means over tokens of a response, then over responses",
        RL,
        {"loss.reduction": "sequence_mean", "loss.candidate_reduction": "sequence_mean"},
    ),
    (
        "Eq. 13, 27, 28: outcome and GAE, of the prompt's own moments",
        RL,
        {"advantages.gae_coef": 1.0, "advantages.gae_moments": "group"}
        | {"advantages.whiten": False, "advantages.std_floor": "add"},
    ),
    (SILENT + "discount and lambda", RL, {"advantages.discount": 1.0, "advantages.lam": 0.95}),
    (SILENT + "minibatches", RL, {"minibatch_size": 128, "rm_minibatch_size": 128}),
    (SILENT + "gradient clip of both models", RL, {"max_grad_norm": 1.0, "rm_max_grad_norm": 1.0}),
    (SILENT + "truncated responses are dropped", RL, {"drop_truncated": "response"}),
    (SILENT + "temperature of the rollouts, of all log-probs", RL, {"temperature": 1.0}),
    ("Appendix C: seed", RL, {"seed": 42}),
    ("Appendix B: reference of the TD", RL, {"td_reference": "behaviour", "reads_reference": False}),
    ("Table 9: the other reference", f"{RL} --td_reference sft", {"reads_reference": True}),
    # the reward model's online update
    (
        "Section 3.3: both, with the weights 1 - mu and mu",
        RL,
        {"balance.dlw": True, "balance.adb": True, "balance.rescale": False}
        | {"balance.drop_unanimous": False, "balance.difficulty_dtype": "float64"},
    ),
    (
        "Table 8: frozen",
        f"{RL} --rm_update frozen",
        {"rm_update": "frozen", "rm_learning_rate": None, "rm_lora_r": None},
    ),
    ("Table 8: naive", f"{RL} --dlw False --adb False", {"balance.dlw": False, "balance.adb": False}),
    ("Table 8: DLW alone", f"{RL} --adb False", {"balance.dlw": True, "balance.adb": False}),
    ("Table 8: ADB alone", f"{RL} --dlw False", {"balance.dlw": False, "balance.adb": True}),
    # what Table 5 compares
    (
        "Table 5: DistRL",
        f"{RL} --algorithm distrl",
        {"loss.alpha": 0.1, "candidates.min_prob": 0.1, "gae_coef": 1.0, "td_reference": "behaviour"},
    ),
    (
        "Table 5: GRPO with a reward model (Eq. 13, alpha 0)",
        f"{RL} --algorithm grpo_prm",
        {"loss.alpha": 0.0, "candidates": None, "gae_coef": 1.0, "td_reference": "behaviour"},
    ),
    (
        "Table 5: GRPO, of the outcome alone",
        f"{ALONE} --algorithm grpo",
        {"loss.alpha": 0.0, "candidates": None, "gae_coef": None, "rm_update": None, "loss.clip_high": 0.28},
    ),
    (
        "Table 5: PRIME; its own code: the reward model's rate and its frozen reference",
        f"{RL} --algorithm prime",
        {"loss.alpha": 0.0, "candidates": None, "gae_coef": None, "rm_learning_rate": 1e-6, "rm_lora_r": 0}
        | {"rm_update": "before", "reads_reference": True},
    ),
    (
        "Table 5: SPRO; " + SILENT + "its beta",
        f"{ALONE} --algorithm spro",
        {"loss.alpha": 0.0, "candidates": None, "rm_update": None, "spro_beta": 0.05},
    ),
    (
        "Table 5: REINFORCE with Q-RM; its released code: no clip, one mean over all tokens",
        f"{RL} --algorithm reinforce_qrm",
        {"clip_low": None, "clip_high": None, "loss.reduction": "token_mean", "rm_update": None}
        | {"candidates": None, "loss.alpha": 0.0, "loss.dual_clip": None},
    ),
    # evaluations
    ("Eq. 31: a step's score", SCORE, {"rule": "step", "step_format": "Step {i}: {step}"}),
    (
        "ProcessBench's rendering and protocol",
        PB,
        {"step_format": "Step {i}: {step}", "step_separator": "\n\n", "transfer_from": "gsm8k"},
    ),
    (
        "Section 4.1: avg@8, pass@k",
        POLICY,
        {"num_generations": 8, "k": (1, 4, 8), "temperature": 0.6, "top_p": 0.95, "top_k": 0},
    ),
    ("Table 1: N of Best-of-N", BON, {"n": (4, 16, 64)}),
    (BRANCHES, f"{TD} --top_k 5 --min_prob {1 / 128}", {"top_k": 5, "min_prob": 1 / 128}),
]  # fmt: skip


def parsed(line):
    """(the command's name, its config)."""
    words = line.split()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
    command = COMMANDS[name]
    config_class = getattr(import_module(command.module), command.config)
    return name, parse(config_class, words[len(name.split()) :], prog=name)


def expressed(line):
    """What the command does with its flags and defaults, by name."""
    name, config = parsed(line)
    parts = {}
    if name == "train-rm":
        config = reward_config.resolve(config)
        parts = {"objective": reward_config.objective_of(config)}
    elif name == "train-policy":
        config, method = policy_config.resolve(config)
        parts = vars(method) | {"reads_reference": policy_config.reads_reference(config)}
    found = vars(config) | (sampling_of(config) if name == "eval policy" else {})
    for part, options in parts.items():
        if part in ("loss", "advantages", "candidates", "balance", "objective") and options is not None:
            found |= {f"{part}.{option}": value for option, value in vars(options).items()}
    return found | {part: options for part, options in parts.items() if part != "objective"}


@pytest.mark.parametrize(("where", "line", "values"), PAPER, ids=lambda x: x if isinstance(x, str) else "")
def test_the_paper_is_expressed(where, line, values):
    found = expressed(line)
    assert {name: found[name] for name in values} == values


def test_no_row_reads_a_flag_back():
    """A flag of a row is judged by what it does, but the few whose value is all that they do."""
    read_back = [
        (where, flag)
        for where, line, values in PAPER
        for flag in parsed_flags(line)
        if flag in values and flag not in ("top_k", "min_prob", "num_generations", "rm_update")
    ]
    assert read_back == []


def parsed_flags(line):
    return [word.removeprefix("--") for word in line.split() if word.startswith("--")]


def test_the_branches_of_the_plan_are_those_of_the_paper():
    """`reproduce sec433` runs what stands above, on one prefix of each of 500 prompts."""
    (td,) = (u for u in experiments(full("sft", "prompts", "problems", "pb")) if u.command == "eval td")
    (values,) = (values for where, _, values in PAPER if where == BRANCHES)
    assert {name: td.settings[name] for name in values} == values
    prefixes = [td.settings[n] for n in ("num_prompts", "num_responses", "prefixes_per_response")]
    assert (
        math.prod(prefixes) * td.settings["top_k"] == 2500
    )  # the most: those with p < 1/128 are no branches


class Stop(Exception):
    """Raised where a test has seen enough."""


def a_step(monkeypatch):
    """(updates of the policy, minibatches of the reward model) in a step with the paper's 1,024 responses;
    an update is its responses, its learning rate and its clip."""
    updates, of_reward = [], []
    config, method = policy_config.resolve(parsed(RL)[1])

    def recorded(accelerator, module, optimizer, microbatches, closure, **settings):
        updates.append((microbatches, settings["learning_rate"], settings["max_grad_norm"]))
        return torch.ones(len(train_policy.LOSSES) + 2 * len(DISTRL_METRICS)), 1.0

    def learns(rollouts, reference, batches, factor):
        of_reward.extend(batches)
        raise Stop

    monkeypatch.setattr(train_policy, "update", recorded)
    trainer = object.__new__(train_policy._Trainer)
    vars(trainer).update(config=config, method=method, accelerator=None, module=None, optimizer=None)
    rollouts = SimpleNamespace(
        responses=[None] * (config.train_prompts * config.num_generations),
        denominator=lambda indices, reduction: 1.0,
        microbatches=lambda indices, rows, accelerator: list(indices),
    )
    trainer._update(rollouts, 0, 1.0)
    reward = SimpleNamespace(
        reference_logprobs=lambda _: (None, None), objective=SimpleNamespace(pairwise=False), update=learns
    )
    with pytest.raises(Stop):
        trainer._reward(reward, rollouts, 0, 1.0)
    return updates, of_reward


def test_a_step_is_one_epoch_in_minibatches_of_128(monkeypatch):
    """Of the policy and of the reward model; method and paper: 256 prompts of 4, once each."""
    updates, of_reward = a_step(monkeypatch)
    for minibatches in ([responses for responses, *_ in updates], of_reward):
        assert [len(m) for m in minibatches] == [128] * 8
        assert sorted(i for m in minibatches for i in m) == list(range(1024))
    assert {(rate, clip) for _, rate, clip in updates} == {(3e-5, 1.0)}


def test_the_online_weights_and_margins():
    """DLW and ADB of a prompt with one right rollout of four; mu is kept 1e-6 from 0 and 1."""
    _, method = policy_config.resolve(parsed(RL)[1])
    outcome, group = torch.tensor([1.0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    weight, margin = online_balance(outcome, group, 2, margin=5.0, config=method.balance)
    assert weight.tolist() == pytest.approx([0.75, 0.25, 0.25, 0.25, 1e-6, 1e-6])
    difficulty, most = math.log(0.25 / 0.75), math.log((1 - 1e-6) / 1e-6)
    easy, hard = 5 - difficulty, 5 + difficulty
    assert margin.tolist() == pytest.approx([easy, hard, hard, hard, 5 - most, 5 - most])


def test_prime_divides_by_the_largest_return():
    """`batch_norm`, on in PRIME's and verl's code: of the advantages that `train-policy` takes."""
    config, method = policy_config.resolve(parsed(f"{RL} --algorithm prime")[1])
    trainer = object.__new__(train_policy._Trainer)
    vars(trainer).update(config=config, method=method, policy=None)
    edges = torch.tensor([0, 3, 5, 9, 11], dtype=torch.int32)
    outcome, group = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    log_ratio = torch.linspace(-2, 3, 11).sin()
    rollouts = SimpleNamespace(
        responses=[None] * 4, outcome=outcome, cu_seqlens=edges, group=group, num_groups=2
    )
    reward = SimpleNamespace(
        info=SimpleNamespace(beta=0.05),
        objective=SimpleNamespace(pairwise=False),
        reference_logprobs=lambda _: (torch.zeros(11), None),
        update=lambda *_: ({}, 1.0, torch.zeros(4)),
        learnt_from=lambda _: None,
        score=lambda _: (log_ratio, None),
    )
    trainer._reward(reward, rollouts, 0, 1.0)
    on, off = (
        prime_advantages(0.05 * log_ratio, outcome, edges, group, 2, batch_norm=norm)
        for norm in (True, False)
    )
    torch.testing.assert_close(rollouts.advantages, on)
    assert (on - off).abs().max() > 0.1, "the two are alike here"


@pytest.mark.slow
def test_endo_rm_and_the_protocols_of_processbench(tiny_folder, tmp_path):
    """`eval processbench` from its command line: a = 1 and the discount 0.95 are of what it has scored with,
    as are the rendering and the score of a step; thresholds by both protocols."""
    item = {"problem": "What is 2 + 3?", "steps": ["2 + 3 is 5.", "Answer: 5"]}
    for name in ("gsm8k", "math"):
        items = [{"id": f"{label}", **item, "label": label} for label in (-1, 0, 1)]
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
    files = [str(tmp_path / f"{name}.json") for name in ("gsm8k", "math")]
    line = ["eval", "processbench", "--objective", "endo_rm", "--model", str(tiny_folder)]
    line += ["--bootstrap_resamples", "9"]
    assert main([*line, "--data", *files, "--output_dir", str(tmp_path / "o")]) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    of_model = results["reward_model"]
    assert (of_model["objective"], of_model["temperature"], of_model["discount"]) == ("endo_rm", 1.0, 0.95)
    assert of_model["beta"] == 1.0
    for subset in results["subsets"].values():
        assert {"transfer", "oracle"} <= set(subset["rules"]["step"])
    model = RewardModel.from_causal_lm(tiny_folder, scale=1.0, discount=0.95, device="cpu")
    rendering = {"step_format": "Step {i}: {step}", "step_separator": "\n\n"}
    want = model.score(item["problem"], item["steps"], rule="step", **rendering).step_scores.tolist()
    for stored in pq.read_table(tmp_path / "o" / "items-math.parquet").to_pylist():
        assert stored["step"] == pytest.approx(want, rel=1e-3)


def test_pass_at_k_is_the_unbiased_one():
    """1 - C(n - c, k) / C(n, k) of 8 responses, 2 of them right; by source, and avg@8 beside it."""
    config = parsed(POLICY)[1]
    found = summarise(config, {"a": {0: Judged(8, 2)}, "b": {0: Judged(8, 0)}}, {"a": {}, "b": {}})
    of_a = {name: metric["value"] for name, metric in found["sources"]["a"]["metrics"].items()}
    assert of_a == pytest.approx({"avg@8": 0.25, "pass@1": 0.25, "pass@4": 1 - 15 / 70, "pass@8": 1.0})
    assert found["mean"]["avg@8"] == pytest.approx(0.125)


def test_best_of_n_picks_by_four_scores():
    """The value behind the last token (mean), and sum, mean and least of the steps, beside majority vote and
    pass@N. Four tokens, three steps."""
    scores = response_scores(torch.tensor([1.0, 3, -2, 0]), torch.tensor([0, 1, 1, 2]), 1.0, 3)
    assert scores == pytest.approx({"final": 2 / 4, "sum": 2.0, "mean": 2 / 3, "min": 0.0})
    right = [True] + [False] * 63
    problem = Samples([None] * 64, right, {name: [1.0] + [0.0] * 63 for name in scores})
    rows = best_of_n([problem], parsed(BON)[1].n)
    assert [row.method for row in rows] == ["one_sample", *scores, "majority_vote", "pass_at_n"] * 3
    assert [row.accuracy for row in rows if row.method == "min"] == pytest.approx([4 / 64, 16 / 64, 1.0])


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
