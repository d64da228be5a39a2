"""Settings of `ipvrm train-policy`, their defaults and what is refused."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ipvrm.data.rows import OnBadRow
from ipvrm.errors import IpvrmError
from ipvrm.losses.advantages import AdvantageConfig
from ipvrm.losses.objectives import BalanceConfig
from ipvrm.losses.policy_loss import CandidateConfig, PolicyLossConfig
from ipvrm.losses.presets import Preset, by_preset
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL, check_engine
from ipvrm.rollouts.verify import TIMEOUT_SECONDS
from ipvrm.run_folder import FREE
from ipvrm.training.adapters import ALL_LINEAR
from ipvrm.training.flags import (
    AT_LEAST_ONE,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Reader,
    check_ranges,
    default,
    defaults,
    defaults_of,
    fill,
    filled,
    must,
    options,
    read_by,
)

ALGORITHMS = ("distrl", "grpo", "grpo_prm", "prime", "spro", "reinforce_qrm")
OFFLINE = ("distrl", "grpo", "grpo_prm")
NO_REWARD_MODEL = {
    "grpo": "its advantage is the outcome alone",
    "spro": "its process reward comes from the policy itself",
}


def _algorithms(*names: str) -> Reader:
    return Reader(lambda c: c.algorithm in names, "algorithm {algorithm!r} has no --{flag}; leave it out")


def reads_reference(config: "PolicyConfig") -> bool:
    """Whether a resolved config needs the model that the reward model was trained against: to score and
    learn, or to write the frozen reward model with it."""
    return config.td_reference == "sft" or config.rm_update == "frozen"


REWARD = _algorithms("distrl", "grpo_prm", "prime")
RATIO = _algorithms(*(name for name in ALGORITHMS if name != "reinforce_qrm"))
REFERENCE = Reader(
    reads_reference,
    "--td_reference {td_reference}: nothing reads --{flag}; leave it out, or add --td_reference sft",
)
ONLINE = Reader(
    lambda c: c.rm_update != "frozen",
    "--rm_update frozen: the reward model is not trained; leave --{flag} out",
)
GAE = _algorithms("distrl", "grpo_prm")
GAE_NOT_0 = Reader(lambda c: c.gae_coef != 0, "--gae_coef 0: nothing reads --{flag}; leave it out")
CANDIDATES = _algorithms("distrl")
ALPHA_NOT_0 = Reader(lambda c: c.alpha != 0, "--alpha 0: nothing reads --{flag}; leave it out")
TOP_K = Reader(
    lambda c: c.candidate_mode == "top_k",
    "--{flag} belongs to --candidate_mode top_k; min_prob takes every candidate",
)
LORA = Reader(lambda c: c.lora_r != 0, "--{flag} belongs to --lora_r")
ADAPTERS = Reader(
    lambda c: c.lora_r != 0 or bool(c.rm_lora_r), "--{flag} belongs to --lora_r and --rm_lora_r"
)
SAMPLES = Reader(lambda c: not c.offline, "--offline: nothing is sampled to train on; leave --{flag} out")
ANSWERS = Reader(
    lambda c: not c.offline or c.eval_data is not None,
    "--offline without --eval_data: no answer is sampled or verified; leave --{flag} out",
)
EVAL = Reader(lambda c: c.eval_data is not None, "--{flag} belongs to --eval_data")


@dataclass(frozen=True)
class PolicyConfig:
    """A policy from verified rollouts: DistRL and what it is compared with.

    --preset paper (the default) is LoRA of rank 128 on policy and reward model at learning rates of 3e-5 and
    1e-4 (prime: all weights of the reward model at 1e-6); --preset release is full fine-tuning with the
    settings of the released code. Flags that are given win over both. What a run has used is in its
    config.yaml.
    """

    model: str = field(metadata=FREE)
    """Starting policy: a folder or a Hub name."""
    train_data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `prompt` and `answer` (or `reward_model.ground_truth`); of --offline what
    `ipvrm rollout --min_prob` and `ipvrm label` wrote."""
    output_dir: str = field(metadata=FREE)
    """Run folder: the policy, a Hugging Face model folder; in `reward_model` the reward model with the policy
    that it was trained against so that `ipvrm score` gives what trained (none where its log-probs come from
    train_data); metrics.jsonl, results.json."""
    algorithm: str = "distrl"
    """distrl (Eq. 11 to 14), grpo (outcome), grpo_prm (Eq. 13: distrl without candidates), prime, spro,
    reinforce_qrm (token scores of a Q-RM; no ratio, no clip, one mean over all tokens)."""
    reward_model: str | None = field(default=None, metadata=FREE)
    """A folder that train-rm wrote (ipvrm, implicit_prm or dpo), for distrl, grpo_prm and prime; q_rm for
    reinforce_qrm."""
    preset: Preset = "paper"
    """paper, or release: what the released code does. Flags whose default differs name both."""
    offline: bool = False
    """Learn from the stored rollouts in train_data, with the log-probs and candidates of the policy that
    sampled them, in place of sampling (distrl, grpo, grpo_prm). The reward model is frozen, and its weights
    are not read where every row holds its log-probs (`ipvrm rollout --reward_model`); a step takes
    train_prompts prompts with mixed outcomes."""

    td_reference: Literal["behaviour", "sft"] | None = field(
        default=None,
        # PRIME's reference is its starting model throughout (arXiv 2502.01456)
        metadata=read_by(REWARD) | default(lambda c: "sft" if c.algorithm == "prime" else "behaviour"),
    )
    """What the reward model's log-probs are compared with: the policy that sampled (default), or the
    reference it was trained against (Table 9; prime's default, which freezes its reference)."""
    rm_update: Literal["before", "after", "frozen"] | None = field(
        default=None, metadata=read_by(REWARD) | default(lambda c: "frozen" if c.offline else "before")
    )
    """The reward model learns from the rollouts before it scores them (default), after that, or not (always
    under --offline)."""
    reference: str | None = field(default=None, metadata=FREE | read_by(REWARD, REFERENCE))
    """Where the reward model's reference is, if it has moved; read under `td_reference` sft, or if frozen."""
    dlw: bool | None = field(default=None, metadata=read_by(REWARD, ONLINE))
    """Dynamic loss weighting of that update. Default: on for ipvrm."""
    adb: bool | None = field(default=None, metadata=read_by(REWARD, ONLINE))
    """Adaptive difficulty boundary of that update. Default: on for ipvrm."""
    rm_margin: float | None = field(default=None, metadata=FINITE | read_by(REWARD, ONLINE))
    """Margin of that update. Default: the one that the reward model was trained with; release: 5."""
    rm_learning_rate: float | None = field(
        default=None,
        metadata=POSITIVE
        | read_by(REWARD, ONLINE)
        # PRIME's and verl's code train their implicit PRM at 1e-6, all of its weights
        | default(
            lambda c: by_preset(c.preset, paper=1e-6 if c.algorithm == "prime" else 1e-4, release=2e-6)
        ),
    )
    """Default: 1e-4 (prime: 1e-6, as in PRIME's code); release: 2e-6."""
    rm_lora_r: int | None = field(
        default=None,
        metadata=NOT_NEGATIVE
        | read_by(REWARD, ONLINE)
        | default(lambda c: by_preset(c.preset, paper=0 if c.algorithm == "prime" else 128, release=0)),
    )
    """Rank of LoRA adapters (scale 1, on lora_target_modules) on the reward model, which then alone are
    trained; 0 trains it in full. Default: 128 (prime: 0); release: 0. Saved as merged weights, the adapter
    beside."""
    rm_minibatch_size: int | None = field(
        default=None, metadata=AT_LEAST_ONE | read_by(REWARD, ONLINE) | defaults(paper=128, release=128)
    )
    """Most responses per update of the reward model, over all devices; of dpo in pairs of a right and a wrong
    one to a prompt. Default: 128."""
    rm_max_grad_norm: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(REWARD, ONLINE) | defaults(paper=1.0, release=10.0)
    )
    """Its gradients are scaled down to this norm; 0 for no limit. Default: 1; release: 10."""
    rm_weight_decay: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(REWARD, ONLINE) | defaults(paper=0.0, release=0.0)
    )
    """Default: 0."""

    gae_coef: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(GAE) | defaults_of(AdvantageConfig)
    )
    """Weight of GAE beside the outcome (Eq. 13). Default: 1; release: 0.05."""
    discount: float | None = field(
        default=None, metadata=FRACTION | read_by(GAE, GAE_NOT_0) | defaults_of(AdvantageConfig)
    )
    """Of GAE; default 1."""
    lam: float | None = field(
        default=None, metadata=FRACTION | read_by(GAE, GAE_NOT_0) | defaults_of(AdvantageConfig)
    )
    """Decay of GAE. Default: 0.95; release: 1."""
    alpha: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(CANDIDATES) | defaults_of(PolicyLossConfig)
    )
    """Weight of the candidates (Eq. 14), default 0.1; at 0 there are none and distrl is grpo_prm."""
    candidate_mode: Literal["min_prob", "top_k"] | None = field(
        default=None, metadata=read_by(CANDIDATES, ALPHA_NOT_0) | defaults(paper="min_prob", release="top_k")
    )
    """min_prob: every token with p >= min_prob. top_k: the best top_k of those with p > min_prob, and the
    sampled token always. Default: min_prob; release: top_k."""
    min_prob: float | None = field(
        default=None,
        metadata=must("lie in [1/128, 1]", lambda x: 1 / 128 <= x <= 1)
        | read_by(CANDIDATES, ALPHA_NOT_0)
        | defaults_of(CandidateConfig),
    )
    """Default: 0.1."""
    top_k: int | None = field(
        default=None,
        metadata=AT_LEAST_ONE
        | read_by(CANDIDATES, ALPHA_NOT_0, TOP_K)
        | default(lambda c: CandidateConfig.preset("release").top_k),
    )
    """Of candidate_mode top_k; default 5."""
    clip_low: float | None = field(
        default=None, metadata=FRACTION | read_by(RATIO) | defaults_of(PolicyLossConfig)
    )
    """The ratio of a token counts down to 1 - clip_low; default 0.2."""
    clip_high: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(RATIO) | defaults_of(PolicyLossConfig)
    )
    """... and up to 1 + clip_high; default 0.28."""
    candidate_clip_low: float | None = field(
        default=None, metadata=FRACTION | read_by(CANDIDATES, ALPHA_NOT_0) | defaults_of(PolicyLossConfig)
    )
    """The same for candidates; default 0.2."""
    candidate_clip_high: float | None = field(
        default=None, metadata=NOT_NEGATIVE | read_by(CANDIDATES, ALPHA_NOT_0) | defaults_of(PolicyLossConfig)
    )
    """Default: 0.28; release: 0.2."""
    dual_clip: float | None = field(
        default=None,
        metadata=must("be above 1", lambda x: x > 1) | read_by(RATIO) | defaults_of(PolicyLossConfig),
    )
    """Bound on the loss where the advantage is negative. Default: none; release: 3."""
    spro_beta: float | None = field(
        default=None, metadata=POSITIVE | read_by(_algorithms("spro")) | default(lambda c: 0.05)
    )
    """Scale of SPRO's process reward, default 0.05 (ours, as PRIME's; SPRO's paper names none, so a fair
    comparison with it sweeps this)."""

    num_generations: int | None = field(
        default=None,
        metadata=must("be at least 2: one response has no group to compare with", lambda x: x >= 2)
        | read_by(SAMPLES)
        | defaults(paper=4, release=16),
    )
    """Responses per prompt. Default: 4; release: 16."""
    rollout_prompts: int | None = field(
        default=None, metadata=AT_LEAST_ONE | read_by(SAMPLES) | defaults(paper=512, release=1024)
    )
    """Prompts per round of rollouts. Default: 512; release: 1024."""
    max_rounds: int = field(default=1, metadata=AT_LEAST_ONE | read_by(SAMPLES))
    """Rounds until train_prompts are found; then the step takes what there is, be it one mixed prompt
    (`prompts_mixed` in the log)."""
    train_prompts: int | None = field(
        default=None,
        metadata=AT_LEAST_ONE
        | default(lambda c: min(by_preset(c.preset, paper=256, release=512), _drawn(c))),
    )
    """Most prompts with mixed outcomes that a step trains on; the others are left out. Default: 256;
    release: 512; less where fewer are drawn."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object. Default: none; release: '{"enable_thinking": false}'
    where the template reads it."""
    max_new_tokens: int = field(default=2048, metadata=AT_LEAST_ONE | read_by(ANSWERS))
    """Longest response; one that has not ended by then is truncated, counted and not trained on."""
    drop_truncated: Literal["response", "prompt"] | None = field(
        default=None, metadata=read_by(SAMPLES) | defaults(paper="response", release="prompt")
    )
    """What a truncated response takes with it: nothing but itself (response; the moments are over the
    prompt's others), or all responses to its prompt (prompt). Default: response; release: prompt."""
    temperature: float = field(default=1.0, metadata=POSITIVE)
    """Of the rollouts and of every log-prob."""
    verifier: str = field(default="math", metadata=read_by(ANSWERS))
    """math, string or module:function, as in `ipvrm label`."""
    verifier_timeout: float = field(default=TIMEOUT_SECONDS, metadata=FREE | POSITIVE)
    """Hard deadline of one answer, in seconds; what fails is counted and left out."""
    verifier_workers: int | None = field(default=None, metadata=FREE | AT_LEAST_ONE)
    """Processes per rank. Default: one per available core."""

    lora_r: int | None = field(default=None, metadata=NOT_NEGATIVE | defaults(paper=128, release=0))
    """Rank of LoRA adapters on the policy, which then alone are trained; 0 trains it in full. Default: 128;
    release: 0. Saved as merged weights, with the adapter beside."""
    lora_alpha: float | None = field(
        default=None, metadata=POSITIVE | read_by(LORA) | default(lambda c: float(c.lora_r))
    )
    """Scale of the policy's adapters, times 1 / lora_r. Default: lora_r."""
    lora_target_modules: tuple[str, ...] = field(default=ALL_LINEAR, metadata=read_by(ADAPTERS))
    """Which layers get an adapter; never the head."""

    max_steps: int = field(default=100, metadata=AT_LEAST_ONE)
    """Rollout batches."""
    minibatch_size: int | None = field(
        default=None, metadata=AT_LEAST_ONE | defaults(paper=128, release=2048)
    )
    """Most responses per update of the policy, over all devices; a batch is split evenly. Default: 128;
    release: 2048."""
    per_device_train_batch_size: int = field(default=8, metadata=FREE | AT_LEAST_ONE)
    """Most responses per forward on one device; changes memory and speed, not the result."""
    per_device_eval_batch_size: int = field(default=64, metadata=FREE | AT_LEAST_ONE)
    """Most responses generated at a time on one device."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """What samples: transformers (the policy in memory), or the address of a server of `model` that loads
    LoRA adapters, such as vLLM's http://localhost:8000/v1; it gets the policy's before it samples."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of its answers."""
    learning_rate: float | None = field(default=None, metadata=POSITIVE | defaults(paper=3e-5, release=2e-5))
    """Default: 3e-5; release: 2e-5."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """Over max_steps, for both models."""
    warmup_ratio: float = field(default=0.0, metadata=FRACTION)
    weight_decay: float | None = field(
        default=None, metadata=NOT_NEGATIVE | defaults(paper=0.0, release=0.01)
    )
    """Of the policy's matrices. Default: 0; release: 0.01."""
    max_grad_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """The policy's gradients are scaled down to this norm; 0 for no limit."""
    mixed_precision: Literal["no", "bf16"] | None = field(
        default=None, metadata=defaults(paper="no", release="bf16")
    )
    """bf16: autocast of every forward; the weights stay fp32. Default: no; release: bf16."""
    gradient_checkpointing: bool = field(default=False, metadata=FREE)

    eval_data: str | None = field(default=None, metadata=FREE)
    """Prompts to measure accuracy on, same columns."""
    eval_steps: int | None = field(default=None, metadata=FREE | AT_LEAST_ONE | read_by(EVAL))
    """Measure it every so many steps, besides at the start and the end."""
    eval_temperature: float | None = field(
        default=None, metadata=FREE | NOT_NEGATIVE | read_by(EVAL) | defaults(paper=0.6, release=0.7)
    )
    """Default: 0.6; release: 0.7."""
    eval_top_p: float | None = field(
        default=None,
        metadata=FREE
        | must("lie in (0, 1]", lambda x: 0 < x <= 1)
        | read_by(EVAL)
        | defaults(paper=0.95, release=0.8),
    )
    """Default: 0.95; release: 0.8."""
    eval_top_k: int | None = field(
        default=None, metadata=FREE | NOT_NEGATIVE | read_by(EVAL) | defaults(paper=0, release=20)
    )
    """Only so many of the likeliest tokens, 0 for no limit. Default: 0; release: 20."""
    eval_num_generations: int | None = field(
        default=None,
        metadata=FREE
        | AT_LEAST_ONE
        | read_by(EVAL)
        | default(lambda c: 1 if c.eval_temperature == 0 else by_preset(c.preset, paper=1, release=8)),
    )
    """Responses per prompt, of which the accuracy is the mean. Default: 1; release: 8."""

    seed: int = field(default=42, metadata=NOT_NEGATIVE)
    save_steps: int = field(default=20, metadata=FREE | NOT_NEGATIVE)
    """Write a checkpoint every so many steps; 0 for none but on interruption."""
    save_total_limit: int = field(default=2, metadata=FREE | AT_LEAST_ONE)
    """Newest checkpoints that are kept."""
    report_to: Literal["tensorboard", "wandb", "trackio"] | None = field(default=None, metadata=FREE)
    """Also send the log to this tracker, through accelerate; its package must be installed."""
    resume_from_checkpoint: str | None = field(default=None, metadata=FREE)
    """A checkpoint folder, or `auto`: go on from the newest in output_dir, start where there is none, and do
    nothing where the run is finished."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Prompts that cannot be used: stop and list them, or skip."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Train on the CPU although there is an accelerator."""
    dry_run: bool = field(default=False, metadata=FREE)
    """Print the resolved config, the data counts and a memory estimate, and stop."""


@dataclass(frozen=True)
class Method:
    """What the functions of the method take, of a resolved config."""

    loss: PolicyLossConfig
    """Without candidates alpha is 0."""
    advantages: AdvantageConfig
    candidates: CandidateConfig | None
    """None: there are none, and the op is not asked for any."""
    balance: BalanceConfig
    """Of the online update of an ipvrm reward model."""


def _drawn(config: PolicyConfig) -> float:
    """Most prompts that a step draws; of stored ones there is no limit."""
    return math.inf if config.offline else filled(config.rollout_prompts) * config.max_rounds


def resolve(config: PolicyConfig) -> tuple[PolicyConfig, Method]:
    """`config` with the defaults of its algorithm and preset filled in, and what that means for the method;
    flags that nothing reads stay None.

    Raises:
        IpvrmError: an algorithm that is not here, a flag that nothing reads, a reward model too many or too
            few, or a value out of range.
    """
    name = config.algorithm
    if name not in ALGORITHMS:
        raise IpvrmError(f"algorithm {name!r}: it is unknown; train-policy offers {', '.join(ALGORITHMS)}")
    if name in NO_REWARD_MODEL and config.reward_model is not None:
        raise IpvrmError(f"algorithm {name!r} takes no reward model: {NO_REWARD_MODEL[name]}")
    if name not in NO_REWARD_MODEL and config.reward_model is None:
        raise IpvrmError(
            f"algorithm {name!r} needs --reward_model, a folder that train-rm wrote (grpo and spro need none)"
        )
    config = fill(config)
    check_ranges(config)
    if config.offline:
        _check_offline(config)
    if config.eval_temperature == 0 and filled(config.eval_num_generations) > 1:
        raise IpvrmError(
            "eval_temperature 0 writes the same response every time; leave --eval_num_generations out"
        )
    check_engine(config.engine, config.engine_timeout)
    if config.engine != LOCAL and not config.lora_r:
        raise IpvrmError(
            "--engine of a server needs --lora_r: adapters are what its protocol takes of a policy in "
            "training, and without them it would go on sampling from the first one"
        )
    if filled(config.train_prompts) > _drawn(config):
        raise IpvrmError(
            f"train_prompts {config.train_prompts}: a step draws {_drawn(config)} at most, rollout_prompts "
            f"{config.rollout_prompts} x max_rounds {config.max_rounds}"
        )
    return config, _method(config)


def _check_offline(config: PolicyConfig) -> None:
    """Raises IpvrmError for what stored rollouts cannot do."""
    if config.algorithm not in OFFLINE:
        raise IpvrmError(
            f"--offline is for {', '.join(OFFLINE)}; algorithm {config.algorithm!r} has to sample"
        )
    if config.rm_update not in (None, "frozen"):
        raise IpvrmError(
            f"--offline --rm_update {config.rm_update}: a reward model that learns is saved with the policy "
            "that it learnt against, which stored rollouts do not hold; leave it frozen"
        )
    if config.candidate_mode == "top_k":
        raise IpvrmError("--offline: the stored candidates are those of --candidate_mode min_prob")
    if config.engine != LOCAL:
        raise IpvrmError("--offline: nothing is sampled to train on; leave --engine out")


def _method(config: PolicyConfig) -> Method:
    candidates = None
    if config.alpha:
        assert config.min_prob is not None
        top_k = config.candidate_mode == "top_k"
        candidates = CandidateConfig(config.min_prob, config.top_k, strict=top_k, keep_sampled=top_k)
    loss = replace(options(PolicyLossConfig, config), alpha=config.alpha or 0.0)
    if config.algorithm == "reinforce_qrm":
        # Scores that are not centred make a mean of means reward length: a negative constant long responses.
        loss = replace(loss, reduction="token_mean")
    return Method(
        loss,
        options(AdvantageConfig, config),
        candidates,
        options(BalanceConfig, config),
    )
