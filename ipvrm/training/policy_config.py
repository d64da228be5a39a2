"""Settings of `ipvrm train-policy`, their defaults and what is refused."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ipvrm.data.rows import OnBadRow
from ipvrm.errors import IpvrmError
from ipvrm.losses.advantages import AdvantageConfig
from ipvrm.losses.objectives import BalanceConfig
from ipvrm.losses.policy_loss import CandidateConfig, PolicyLossConfig
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.rollouts.verify import TIMEOUT_SECONDS
from ipvrm.run_folder import FREE

# Flags that only some algorithms have; given where nothing reads them they are refused, never ignored.
ONLINE_FLAGS = ("rm_learning_rate", "rm_margin", "dlw", "adb")
REWARD_FLAGS = (*ONLINE_FLAGS, "rm_update", "td_reference", "reference")
GAE_FLAGS = ("discount", "lam", "gae_coef")
CANDIDATE_FLAGS = (
    "alpha",
    "candidate_mode",
    "min_prob",
    "top_k",
    "candidate_clip_low",
    "candidate_clip_high",
)
EVAL_FLAGS = ("eval_steps", "eval_num_generations", "eval_temperature", "eval_top_p")
UNREAD_AT_ZERO = {
    "alpha": tuple(flag for flag in CANDIDATE_FLAGS if flag != "alpha"),
    "gae_coef": ("discount", "lam"),
}
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "distrl": (*REWARD_FLAGS, *GAE_FLAGS, *CANDIDATE_FLAGS),
    "grpo": (),
    "grpo_prm": (*REWARD_FLAGS, *GAE_FLAGS),
    "prime": REWARD_FLAGS,
    "spro": ("spro_beta",),
}
AT_LEAST_ONE = (
    "num_generations",
    "rollout_prompts",
    "train_prompts",
    "max_rounds",
    "max_new_tokens",
    "max_steps",
    "num_epochs",
    "minibatch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "verifier_workers",
    "eval_steps",
    "eval_num_generations",
    "save_total_limit",
    "top_k",
    "lora_r",
)
POSITIVE = (
    "learning_rate",
    "rm_learning_rate",
    "temperature",
    "verifier_timeout",
    "spro_beta",
    "lora_alpha",
)
NOT_NEGATIVE = (
    "save_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_epsilon",
    "seed",
    "alpha",
    "gae_coef",
    "clip_high",
    "candidate_clip_high",
    "eval_temperature",
)
NO_REWARD_MODEL = {
    "grpo": "its advantage is the outcome alone",
    "spro": "its process reward comes from the policy itself",
}
NOT_HERE = {"reinforce_qrm": "it needs the token scores of a Q-RM, and train-rm does not train one"}


@dataclass(frozen=True)
class PolicyConfig:
    """A policy from verified rollouts: DistRL and what it is compared with. Defaults are the paper's, with
    full fine-tuning; those that differ between presets are filled in: see config.yaml of a run."""

    model: str = field(metadata=FREE)
    """Starting policy: a folder or a Hub name."""
    train_data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `prompt` and `answer` (or `reward_model.ground_truth`)."""
    output_dir: str = field(metadata=FREE)
    """Run folder: the policy as a Hugging Face model folder, the reward model in `reward_model`,
    metrics.jsonl, results.json."""
    algorithm: str = "distrl"
    """distrl (Eq. 11 to 14), grpo (outcome), grpo_prm (Eq. 13: distrl without candidates), prime, spro."""
    reward_model: str | None = field(default=None, metadata=FREE)
    """A folder that train-rm wrote; for distrl, grpo_prm and prime."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reward model's reference is, if it has moved; read under `td_reference` sft, or if frozen."""
    preset: Preset = "paper"
    """paper, or release: what the released code does."""

    td_reference: Literal["behaviour", "sft"] | None = None
    """What the reward model's log-probs are compared with: the policy that sampled (default), or the
    reference it was trained against (Table 9; prime's default, which freezes its reference)."""
    rm_update: Literal["before", "after", "frozen"] | None = None
    """The reward model learns from the rollouts before it scores them (default), after that, or not."""
    dlw: bool | None = None
    """Dynamic loss weighting of that update. Default: on for ipvrm."""
    adb: bool | None = None
    """Adaptive difficulty boundary of that update. Default: on for ipvrm."""
    rm_margin: float | None = None
    """Margin of that update. Default: the one that the reward model was trained with; release: 5."""
    rm_learning_rate: float | None = None
    """Default: 1e-4; release: 2e-6."""

    discount: float | None = None
    lam: float | None = None
    """Decay of GAE. Default: 0.95; release: 1."""
    gae_coef: float | None = None
    """Weight of GAE beside the outcome (Eq. 13). Default: 1; release: 0.05."""
    alpha: float | None = None
    """Weight of the candidates (Eq. 14), default 0.1; at 0 there are none and distrl is grpo_prm."""
    candidate_mode: Literal["min_prob", "top_k"] | None = None
    """min_prob: every token with p >= min_prob (default). top_k: the best top_k of those with p > min_prob,
    and the sampled token always (release)."""
    min_prob: float | None = None
    """Default: 0.1."""
    top_k: int | None = None
    """Of candidate_mode top_k; default 5."""
    clip_low: float | None = None
    """The ratio of a token counts down to 1 - clip_low; default 0.2."""
    clip_high: float | None = None
    """... and up to 1 + clip_high; default 0.28."""
    candidate_clip_low: float | None = None
    """The same for candidates; default 0.2."""
    candidate_clip_high: float | None = None
    """Default: 0.28; release: 0.2."""
    dual_clip: float | None = None
    """Bound on the loss where the advantage is negative. Default: none; release: 3."""
    spro_beta: float | None = None
    """Scale of SPRO's process reward, default 0.05 (ours)."""

    num_generations: int | None = None
    """Responses per prompt. Default: 4; release: 16."""
    rollout_prompts: int = 512
    """Prompts per round of rollouts."""
    train_prompts: int = 256
    """Most prompts with mixed outcomes that a step trains on; the others are left out."""
    max_rounds: int = 1
    """Rounds until train_prompts are found; then the step takes what there is, be it one mixed prompt
    (`prompts_mixed` in the log)."""
    max_new_tokens: int = 2048
    """Longest response; one that has not ended by then is dropped and counted."""
    temperature: float = 1.0
    """Of the rollouts and of every log-prob."""
    verifier: str = "math"
    """math, string or module:function, as in `ipvrm label`."""
    verifier_timeout: float = field(default=TIMEOUT_SECONDS, metadata=FREE)
    """Hard deadline of one answer, in seconds; what fails is counted and left out."""
    verifier_workers: int | None = field(default=None, metadata=FREE)
    """Processes per rank. Default: one per available core."""

    lora_r: int | None = None
    """Rank of LoRA adapters on the policy, which then alone are trained; the paper has 128. Default: none.
    The reward model is trained in full."""
    lora_alpha: float | None = None
    """Scale of the adapters, times 1 / lora_r. Default: lora_r."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Which layers get one; never the head."""

    max_steps: int = 100
    """Rollout batches."""
    num_epochs: int = 1
    """Passes over a rollout batch."""
    minibatch_size: int = 128
    """Most responses per update of policy or reward model, over all devices; a batch is split evenly."""
    per_device_train_batch_size: int = field(default=8, metadata=FREE)
    """Most responses per forward on one device; changes memory and speed, not the result."""
    per_device_eval_batch_size: int = field(default=64, metadata=FREE)
    """Most responses generated at a time on one device."""
    learning_rate: float | None = None
    """Default: 3e-5; release: 2e-5."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """Over max_steps, for both models."""
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for no limit."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: autocast of every forward; the weights stay fp32."""
    gradient_checkpointing: bool = field(default=False, metadata=FREE)

    eval_data: str | None = field(default=None, metadata=FREE)
    """Prompts to measure accuracy on, same columns."""
    eval_steps: int | None = field(default=None, metadata=FREE)
    """Measure it every so many steps, besides at the start and the end."""
    eval_num_generations: int = field(default=1, metadata=FREE)
    eval_temperature: float = field(default=0.6, metadata=FREE)
    eval_top_p: float = field(default=0.95, metadata=FREE)

    seed: int = 42
    save_steps: int = field(default=20, metadata=FREE)
    """Write a checkpoint every so many steps; 0 for none but on interruption."""
    save_total_limit: int = field(default=2, metadata=FREE)
    """Newest checkpoints that are kept."""
    resume_from_checkpoint: str | None = field(default=None, metadata=FREE)
    """A checkpoint folder, or `latest` for the newest in output_dir."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Prompts that cannot be used: stop and list them, or skip."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Train on the CPU although there is an accelerator."""
    dry_run: bool = field(default=False, metadata=FREE)
    """Print the resolved config, the data counts and a memory estimate, and stop."""


def resolve(config: PolicyConfig) -> PolicyConfig:
    """`config` with the defaults of its algorithm and preset filled in; flags of other algorithms stay None.

    Raises:
        IpvrmError: an algorithm that is not here, a flag that it does not have, a reward model too many or
            too few, or a value out of range.
    """
    name = config.algorithm
    if name not in ALGORITHMS:
        reason = NOT_HERE.get(name, "it is unknown")
        raise IpvrmError(f"algorithm {name!r}: {reason}; train-policy offers {', '.join(ALGORITHMS)}")
    if name in NO_REWARD_MODEL and config.reward_model is not None:
        raise IpvrmError(f"algorithm {name!r} takes no reward model: {NO_REWARD_MODEL[name]}")
    if name not in NO_REWARD_MODEL and config.reward_model is None:
        raise IpvrmError(
            f"algorithm {name!r} needs --reward_model, a folder that train-rm wrote (grpo and spro need none)"
        )
    of_some = {*REWARD_FLAGS, *GAE_FLAGS, *CANDIDATE_FLAGS, "spro_beta"}
    for flag in sorted(of_some - set(ALGORITHMS[name])):
        if getattr(config, flag) is not None:
            raise IpvrmError(f"algorithm {name!r} has no --{flag}; leave it out")
    if config.rm_update == "frozen":
        for flag in ONLINE_FLAGS:
            if getattr(config, flag) is not None:
                raise IpvrmError(f"--rm_update frozen: the reward model is not trained; leave --{flag} out")
    for switch, flags in UNREAD_AT_ZERO.items():
        for flag in flags:
            if getattr(config, switch) == 0 and getattr(config, flag) is not None:
                raise IpvrmError(f"--{switch} 0: nothing reads --{flag}; leave it out")
    empty = {flag: x for flag, x in _defaults(config).items() if getattr(config, flag) is None}
    config = replace(config, **empty)
    if config.candidate_mode == "min_prob" and config.top_k is not None:
        raise IpvrmError("--top_k belongs to --candidate_mode top_k; min_prob takes every candidate")
    for flag in ("lora_alpha", "lora_target_modules"):
        if config.lora_r is None and _given(config, flag):
            raise IpvrmError(f"--{flag} belongs to --lora_r")
    for flag in EVAL_FLAGS:
        if config.eval_data is None and _given(config, flag):
            raise IpvrmError(f"--{flag} belongs to --eval_data")
    if config.reference is not None and not reads_reference(config):
        raise IpvrmError(
            f"--td_reference {config.td_reference}: nothing reads --reference; leave it out, or add "
            "--td_reference sft"
        )
    if config.lora_r is not None and config.lora_alpha is None:
        config = replace(config, lora_alpha=float(config.lora_r))
    if config.candidate_mode == "top_k" and config.top_k is None:
        config = replace(config, top_k=5)
    _check(config)
    return config


def reads_reference(config: PolicyConfig) -> bool:
    """Whether a resolved config needs the model that the reward model was trained against: to score and
    learn, or to write the frozen reward model with it."""
    return config.td_reference == "sft" or config.rm_update == "frozen"


def _given(config: PolicyConfig, flag: str) -> bool:
    """Whether the value differs from the default, which cannot be told from a flag left out."""
    return bool(getattr(config, flag) != _FIELD_DEFAULTS[flag])


_FIELD_DEFAULTS = {field.name: field.default for field in fields(PolicyConfig)}


def _defaults(config: PolicyConfig) -> dict[str, Any]:
    """What an empty flag of this algorithm and preset stands for."""
    loss, advantages = PolicyLossConfig.preset(config.preset), AdvantageConfig.preset(config.preset)
    candidates = CandidateConfig.preset(config.preset)
    paper: dict[str, Any] = {"num_generations": 4, "learning_rate": 3e-5, "rm_learning_rate": 1e-4}
    release: dict[str, Any] = {"num_generations": 16, "learning_rate": 2e-5, "rm_learning_rate": 2e-6}
    values = by_preset(config.preset, paper=paper, release=release) | {
        **{flag: getattr(loss, flag) for flag in ("clip_low", "clip_high", "dual_clip")},
        **{flag: getattr(loss, flag) for flag in ("alpha", "candidate_clip_low", "candidate_clip_high")},
        **{flag: getattr(advantages, flag) for flag in GAE_FLAGS},
        "candidate_mode": "min_prob" if candidates.top_k is None else "top_k",
        "min_prob": candidates.min_prob,
        # PRIME's reference is its starting model throughout (arXiv 2502.01456)
        "td_reference": "sft" if config.algorithm == "prime" else "behaviour",
        "rm_update": "before",
        "spro_beta": 0.05,
    }
    if config.rm_update == "frozen":
        del values["rm_learning_rate"]
    for switch, flags in UNREAD_AT_ZERO.items():
        if getattr(config, switch) == 0:
            values = {flag: x for flag, x in values.items() if flag not in flags}
    every = {"num_generations", "learning_rate", "clip_low", "clip_high", "dual_clip"}
    return {flag: x for flag, x in values.items() if flag in every or flag in ALGORITHMS[config.algorithm]}


def _check(config: PolicyConfig) -> None:
    for name in AT_LEAST_ONE:
        if (number := getattr(config, name)) is not None and number < 1:
            raise IpvrmError(f"{name} must be at least 1; got {number}")
    if config.num_generations is not None and config.num_generations < 2:
        raise IpvrmError("num_generations must be at least 2: one response has no group to compare with")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise IpvrmError(f"{name} must be positive; got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise IpvrmError(f"{name} must lie in [0, 1); got {getattr(config, name)}")
    for name in ("warmup_ratio", "clip_low", "candidate_clip_low", "discount", "lam"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise IpvrmError(f"{name} must lie in [0, 1]; got {value}")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise IpvrmError(f"{name} must not be negative; got {value}")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise IpvrmError(f"dual_clip must be above 1; got {config.dual_clip}")
    if config.min_prob is not None and not 1 / 128 <= config.min_prob <= 1:
        raise IpvrmError(f"min_prob must lie in [1/128, 1]; got {config.min_prob}")
    if config.rm_margin is not None and not math.isfinite(config.rm_margin):
        raise IpvrmError(f"rm_margin must be finite; got {config.rm_margin}")
    if not 0 < config.eval_top_p <= 1:
        raise IpvrmError(f"eval_top_p must lie in (0, 1]; got {config.eval_top_p}")
    if config.eval_temperature == 0 and config.eval_num_generations > 1:
        raise IpvrmError(
            "eval_temperature 0 writes the same response every time; leave --eval_num_generations out"
        )
    drawn = config.rollout_prompts * config.max_rounds
    if _given(config, "train_prompts") and config.train_prompts > drawn:
        raise IpvrmError(
            f"train_prompts {config.train_prompts}: a step draws {drawn} at most, rollout_prompts "
            f"{config.rollout_prompts} x max_rounds {config.max_rounds}"
        )


# ------------------------------------------------------------------- what the functions of the method take


def loss_config(config: PolicyConfig) -> PolicyLossConfig:
    """Options of the policy loss of a resolved config; without candidates alpha is 0."""
    flags = ("clip_low", "clip_high", "candidate_clip_low", "candidate_clip_high", "dual_clip", "alpha")
    given = {flag: getattr(config, flag) for flag in flags if getattr(config, flag) is not None}
    return replace(PolicyLossConfig.preset(config.preset), **({"alpha": 0.0} | given))


def advantage_config(config: PolicyConfig) -> AdvantageConfig:
    """Options of `distrl_advantages` of a resolved config."""
    given = {flag: getattr(config, flag) for flag in GAE_FLAGS if getattr(config, flag) is not None}
    return replace(AdvantageConfig.preset(config.preset), **given)


def candidate_config(config: PolicyConfig) -> CandidateConfig | None:
    """Which candidates a resolved config asks for, None for none: they are dropped before the op."""
    if not config.alpha:
        return None
    assert config.min_prob is not None
    top_k = config.candidate_mode == "top_k"
    return CandidateConfig(config.min_prob, config.top_k, strict=top_k, keep_sampled=top_k)


def balance_config(config: PolicyConfig) -> BalanceConfig:
    """The switches of the online update of an ipvrm reward model."""
    given = {flag: getattr(config, flag) for flag in ("dlw", "adb") if getattr(config, flag) is not None}
    return replace(BalanceConfig.preset(config.preset), **given)
