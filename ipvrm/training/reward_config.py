"""Settings of `ipvrm train-rm`, their defaults and what is refused."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ipvrm.data.responses import OnLong
from ipvrm.data.rows import OnBadRow
from ipvrm.errors import IpvrmError
from ipvrm.losses.objectives import BETA, Objective, check_objective
from ipvrm.run_folder import FREE


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from rollouts with outcome labels. Defaults are the paper's."""

    model: str = field(metadata=FREE)
    """Starting model, which is also the reference: a folder or a Hub name."""
    train_data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `conversation`, `label`, or `prompt`, `response`, `label`."""
    output_dir: str = field(metadata=FREE)
    """Run folder: a Hugging Face model folder with ipvrm_config.json, metrics.jsonl, results.json."""
    objective: str = "ipvrm"
    """ipvrm (every prefix, Eq. 9) or implicit_prm (the whole response)."""
    preset: Literal["paper", "release"] = "paper"
    """release: ipvrm with margin 0, averaged over the tokens of the optimizer batch."""
    beta: float | None = None
    """Scale of the value. Default: 10 (ipvrm), 0.05 (implicit_prm)."""
    margin: float | None = None
    """Margin of ipvrm. Default: 5, or 0 under the preset `release`."""
    prefix_weighting: Literal["uniform", "late", "early"] = "uniform"
    """Weights of the prefixes in ipvrm (Eq. 9, 17, 18)."""
    reference: str | None = field(default=None, metadata=FREE)
    """Another reference than the starting model: a folder or a Hub name."""
    eval_data: str | None = field(default=None, metadata=FREE)
    """Rollouts to validate on, same columns."""
    learning_rate: float = 5e-7
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """One decay over the updates, stepped once per optimizer update."""
    warmup_ratio: float = 0.0
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    """Number of optimizer updates, in place of num_train_epochs."""
    global_batch_size: int = 64
    """Responses per optimizer update, over all devices and micro-batches."""
    per_device_train_batch_size: int = field(default=8, metadata=FREE)
    """Most responses per forward on one device; changes memory and speed, not the result."""
    gradient_accumulation_steps: int | None = field(default=None, metadata=FREE)
    """Micro-batches per update and device, in place of global_batch_size."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for no limit."""
    max_length: int = 4096
    """Most tokens of prompt and response."""
    on_long: OnLong = "drop"
    """Longer rows: drop (counted), or truncate the response on the right."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Rows that cannot be used: stop and list them, or skip."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: autocast of the forward; the weights stay fp32."""
    gradient_checkpointing: bool = field(default=False, metadata=FREE)
    seed: int = 42
    logging_steps: int = field(default=1, metadata=FREE)
    eval_steps: int | None = field(default=None, metadata=FREE)
    """Validate every so many updates, besides at the start and the end."""
    save_steps: int = field(default=500, metadata=FREE)
    """Write a checkpoint every so many updates; 0 for none but on interruption."""
    save_total_limit: int = field(default=2, metadata=FREE)
    """Newest checkpoints that are kept."""
    resume_from_checkpoint: str | None = field(default=None, metadata=FREE)
    """A checkpoint folder, or `latest` for the newest in output_dir."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Train on the CPU although there is an accelerator."""
    dry_run: bool = field(default=False, metadata=FREE)
    """Print the resolved config, the data counts and a memory estimate, and stop."""


def resolve(config: RewardConfig) -> RewardConfig:
    """`config` with the defaults of its objective and preset filled in.

    Raises:
        IpvrmError: an objective that makes no sense here, a flag that it does not have, or a value out of
            range.
    """
    check_objective(config.objective)
    if config.preset not in ("paper", "release"):
        raise IpvrmError(f"preset must be 'paper' or 'release'; got {config.preset!r}")
    beta = BETA[config.objective] if config.beta is None else config.beta
    margin = config.margin
    if config.objective == "ipvrm":
        margin = margin if margin is not None else (0.0 if config.preset == "release" else 5.0)
    elif margin is not None or config.prefix_weighting != "uniform":
        raise IpvrmError(
            f"objective {config.objective!r} judges the whole response: "
            "it has no margin and no prefix weighting"
        )
    positive = (
        "learning_rate",
        "global_batch_size",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_length",
    )
    for name in positive:
        if not (value := getattr(config, name)) > 0 or not math.isfinite(value):
            raise IpvrmError(f"{name} must be positive; got {value}")
    for name in (
        "logging_steps",
        "save_total_limit",
        "max_steps",
        "eval_steps",
        "gradient_accumulation_steps",
    ):
        if (number := getattr(config, name)) is not None and number < 1:
            raise IpvrmError(f"{name} must be at least 1; got {number}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise IpvrmError(f"{name} must lie in [0, 1); got {getattr(config, name)}")
    if not 0 <= config.warmup_ratio <= 1:
        raise IpvrmError(f"warmup_ratio must lie in [0, 1]; got {config.warmup_ratio}")
    for name in ("save_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "seed"):
        if not getattr(config, name) >= 0:
            raise IpvrmError(f"{name} must not be negative; got {getattr(config, name)}")
    if not (math.isfinite(beta) and beta > 0):
        raise IpvrmError(f"beta must be positive and finite; got {beta}")
    if margin is not None and not math.isfinite(margin):
        raise IpvrmError(f"margin must be finite; got {margin}")
    return replace(config, beta=beta, margin=margin)


def objective_of(config: RewardConfig) -> Objective:
    """The loss of a resolved config."""
    assert config.beta is not None
    return Objective(
        config.objective,
        config.beta,
        config.margin or 0.0,
        config.prefix_weighting,
        "token_mean" if config.preset == "release" and config.objective == "ipvrm" else "sequence_mean",
    )
