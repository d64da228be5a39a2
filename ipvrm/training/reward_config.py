"""Settings of `ipvrm train-rm`, their defaults and what is refused."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from ipvrm.data.preference import Pairs
from ipvrm.data.responses import OnLong
from ipvrm.data.rows import OnBadRow
from ipvrm.losses.objectives import BETA, MARGIN, PAIRWISE, Objective, check_objective
from ipvrm.losses.presets import Preset
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
    fill,
    must,
    read_by,
)

PREFIXES = Reader(
    lambda c: c.objective == "ipvrm",
    "objective {objective!r} judges the whole response: it has no prefix weighting",
)
WITH_MARGIN = Reader(lambda c: c.objective in MARGIN, "objective {objective!r} has no margin")
COMPARES = Reader(
    lambda c: c.objective in PAIRWISE, "objective {objective!r} takes responses one by one, not in pairs"
)
WITH_REFERENCE = Reader(
    lambda c: c.objective != "q_rm",
    "objective 'q_rm' has no reference: it has a value head",
)
LORA = Reader(lambda c: c.lora_r != 0, "--{flag} belongs to --lora_r")


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from rollouts with outcome labels.

    --preset paper (the default) is the paper's margin, learning rate and batch; --preset release is the
    released command: margin 0 of ipvrm, 3 epochs, 2,560 tokens, cosine, warm-up 0.03, seed 1, bf16. Flags
    that are given win over both. What a run has used is in its config.yaml.
    """

    model: str = field(metadata=FREE)
    """Starting model, which is also the reference: a folder or a Hub name."""
    train_data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `conversation`, `label`, or `prompt`, `response`, `label`, or pairs of
    `prompt`, `chosen`, `rejected`; or the name of a data set of the Hub, org/name or org/name:split."""
    output_dir: str = field(metadata=FREE)
    """Run folder: a Hugging Face model folder with ipvrm_config.json, metrics.jsonl, results.json."""
    objective: str = "ipvrm"
    """ipvrm (every prefix, Eq. 9), implicit_prm (the whole response), dpo (pairs of responses), q_rm (pairs,
    by a value head of its own)."""
    preset: Preset = field(
        default="paper", metadata=must("be 'paper' or 'release'", lambda x: x in get_args(Preset))
    )
    """paper, or release: the released command. Flags whose default differs name both."""
    beta: float | None = field(default=None, metadata=POSITIVE | default(lambda c: BETA[c.objective]))
    """Scale of the value. Default: 10 (ipvrm), 0.05 (implicit_prm, dpo), 0.2 (q_rm)."""
    margin: float | None = field(
        default=None,
        metadata=FINITE
        | read_by(WITH_MARGIN)
        # 0 is the released command's, which is of ipvrm
        | default(lambda c: 0.0 if (c.preset, c.objective) == ("release", "ipvrm") else MARGIN[c.objective]),
    )
    """Margin of ipvrm and q_rm. Default: 5 (ipvrm), 2 (q_rm); release: 0 (ipvrm)."""
    pairs: Pairs | None = field(default=None, metadata=read_by(COMPARES) | default(lambda c: "one"))
    """Pairs of dpo and q_rm from labelled responses: one of every prompt with both outcomes (default), drawn
    with the seed, or all, each right response with each wrong one. A file of pairs keeps its own."""
    prefix_weighting: Literal["uniform", "late", "early"] = field(
        default="uniform", metadata=read_by(PREFIXES)
    )
    """Weights of the prefixes in ipvrm (Eq. 9, 17, 18)."""
    reference: str | None = field(default=None, metadata=FREE | read_by(WITH_REFERENCE))
    """Another reference than the starting model: a folder or a Hub name."""
    eval_data: str | None = field(default=None, metadata=FREE)
    """Rollouts to validate on, same columns."""
    learning_rate: float = field(default=5e-7, metadata=POSITIVE)
    lora_r: int = field(default=0, metadata=NOT_NEGATIVE)
    """Rank of LoRA adapters, which then alone are trained; 0 trains the whole model. The run folder holds the
    merged weights, which `ipvrm score` reads, and the adapter in `adapter/`; ipvrm_config.json has the base
    and its hash."""
    lora_alpha: float | None = field(
        default=None, metadata=POSITIVE | read_by(LORA) | default(lambda c: float(c.lora_r))
    )
    """Scale of the adapters, times 1 / lora_r. Default: lora_r."""
    lora_target_modules: tuple[str, ...] = field(default=ALL_LINEAR, metadata=read_by(LORA))
    """Which layers get an adapter; never the head."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = field(
        default=None, metadata=defaults(paper="linear", release="cosine")
    )
    """One decay over the updates, stepped once per optimizer update. Default: linear; release: cosine."""
    warmup_ratio: float | None = field(default=None, metadata=FRACTION | defaults(paper=0.0, release=0.03))
    """Share of the updates in which the learning rate rises. Default: 0; release: 0.03."""
    num_train_epochs: float | None = field(default=None, metadata=POSITIVE | defaults(paper=1.0, release=3.0))
    """Default: 1; release: 3."""
    max_steps: int | None = field(default=None, metadata=AT_LEAST_ONE)
    """Number of optimizer updates, in place of num_train_epochs."""
    global_batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    """Responses per optimizer update, or pairs of them, over all devices and micro-batches."""
    per_device_train_batch_size: int = field(default=8, metadata=FREE | AT_LEAST_ONE)
    """Most responses per forward on one device, of pairs at least two; changes memory and speed, not the
    result."""
    gradient_accumulation_steps: int | None = field(default=None, metadata=FREE | AT_LEAST_ONE)
    """Micro-batches per update and device, in place of global_batch_size."""
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    max_grad_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Gradients are scaled down to this norm; 0 for no limit."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object, stored with the model and used by `ipvrm score`.
    Default: none; release: '{"enable_thinking": false}' where the template reads it."""
    max_length: int | None = field(default=None, metadata=AT_LEAST_ONE | defaults(paper=4096, release=2560))
    """Most tokens of prompt and response. Default: 4096; release: 2560."""
    on_long: OnLong = "drop"
    """Longer rows: drop (counted), or truncate the response on the right."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Rows that cannot be used: stop and list them, or skip."""
    mixed_precision: Literal["no", "bf16"] | None = field(
        default=None, metadata=defaults(paper="no", release="bf16")
    )
    """bf16: autocast of the forward; the weights stay fp32. Default: no; release: bf16."""
    gradient_checkpointing: bool = field(default=False, metadata=FREE)
    fsdp: bool = field(default=False, metadata=FREE)
    """Shards weights, gradients and optimizer over all processes (FSDP2); else each holds all of them."""
    seed: int | None = field(default=None, metadata=NOT_NEGATIVE | defaults(paper=42, release=1))
    """Default: 42; release: 1."""
    logging_steps: int = field(default=1, metadata=FREE | AT_LEAST_ONE)
    eval_steps: int | None = field(default=None, metadata=FREE | AT_LEAST_ONE)
    """Validate every so many updates, besides at the start and the end."""
    save_steps: int = field(default=500, metadata=FREE | NOT_NEGATIVE)
    """Write a checkpoint every so many updates; 0 for none but on interruption."""
    save_total_limit: int = field(default=2, metadata=FREE | AT_LEAST_ONE)
    """Newest checkpoints that are kept."""
    report_to: Literal["tensorboard", "wandb", "trackio"] | None = field(default=None, metadata=FREE)
    """Also send the log to this tracker, through accelerate; its package must be installed."""
    resume_from_checkpoint: str | None = field(default=None, metadata=FREE)
    """A checkpoint folder, or `auto`: go on from the newest in output_dir, start where there is none, and do
    nothing where the run is finished."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Train on the CPU although there is an accelerator."""
    dry_run: bool = field(default=False, metadata=FREE)
    """Print the resolved config, the data counts, a memory estimate and what it fits on, and stop."""


def resolve(config: RewardConfig) -> RewardConfig:
    """`config` with the defaults of its objective and preset filled in.

    Raises:
        IpvrmError: an objective that makes no sense here, a flag that it does not have, or a value out of
            range.
    """
    check_objective(config.objective)
    config = fill(config)
    check_ranges(config)
    return config


def objective_of(config: RewardConfig) -> Objective:
    """The loss of a resolved config."""
    assert config.beta is not None
    return Objective(
        config.objective,
        config.beta,
        config.margin or 0.0,
        config.prefix_weighting,
        "sequence_mean",  # of the released command too: it takes one row at a time
    )
