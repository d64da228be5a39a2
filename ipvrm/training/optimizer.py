"""One optimizer update of a distributed run, the same for reward model and policy.

Gradients of micro-batches add up, since each loss has been divided by the denominator of the whole optimizer
batch; what is not a number stops the run before the weights take it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ipvrm.errors import FailedAlike, IpvrmError
from ipvrm.training.flags import filled

Item = TypeVar("Item")
EPSILON = 1e-8  # of Adam's denominator: torch's default, as in the released code


class AdamSettings(Protocol):
    """The flags of a training script that AdamW depends on."""

    @property
    def weight_decay(self) -> float | None: ...


class ScheduleSettings(Protocol):
    """The flags of a training script that the schedule depends on."""

    @property
    def lr_scheduler_type(self) -> str | None: ...
    @property
    def warmup_ratio(self) -> float | None: ...


class NotFinite(FailedAlike):
    """Loss or gradient of an update are not numbers; the weights are those from before it."""


def data_parallel_accelerator(
    command: str,
    *,
    use_cpu: bool,
    mixed_precision: str,
    report_to: str | None = None,
    output_dir: str | None = None,
) -> Any:
    """The Accelerator of a training script.

    Args:
        report_to: a tracker of accelerate's. output_dir: where one that writes files does so.

    Raises:
        IpvrmError: it would shard the model, or the tracker's package is not installed.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run of this process may have used another precision
    accelerator = Accelerator(
        cpu=use_cpu, mixed_precision=mixed_precision, log_with=report_to, project_dir=output_dir
    )
    if report_to is not None and not accelerator.log_with:
        raise IpvrmError(
            f"--report_to {report_to}: the package {report_to} is not installed here; "
            f"pip install {report_to}, or leave the flag out (metrics.jsonl holds the same numbers)"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise IpvrmError(
            f"{command} shards nothing through accelerate; {accelerator.distributed_type} is not supported. "
            "Take a config of distributed_type MULTI_GPU, and --fsdp where the command has it"
        )
    return accelerator


def adamw(
    module: nn.Module, learning_rate: float, settings: AdamSettings, device: torch.device
) -> torch.optim.AdamW:
    """AdamW on the trainable parameters of `module`; weight decay on matrices alone."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        eps=EPSILON,
        weight_decay=filled(settings.weight_decay),
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate_factor(step: int, total: int, settings: ScheduleSettings) -> float:
    """Factor on the learning rate in update `step` (from 0) of `total`: linear warm-up, one decay to 0."""
    warmup = math.ceil(total * filled(settings.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 if settings.lr_scheduler_type == "constant" else 1 - progress


def update(
    accelerator: Any,
    module: nn.Module,
    optimizer: Any,
    share: Sequence[Item],
    loss_and_sums: Callable[[Item], tuple[Tensor, Tensor]],
    *,
    learning_rate: float,
    max_grad_norm: float,
) -> tuple[list[float], float]:
    """One optimizer update; returns the sums over all micro-batches and ranks, and the gradient norm.

    Args:
        module, optimizer: as `accelerator.prepare` returned them.
        share: this rank's micro-batches, as many as every rank has. An empty one takes part in the forward,
            with any rows in it, and counts nothing.
        loss_and_sums: of a micro-batch, its share of the loss of the whole optimizer batch, and what is to be
            added up, 1-d, first the loss.
        max_grad_norm: 0 for no limit.

    Raises:
        NotFinite: the first sum or the gradient norm is not a number; no weight has moved.
    """
    ranks, total = accelerator.num_processes, None
    for number, micro in enumerate(share, 1):
        with nullcontext() if number == len(share) else accelerator.no_sync(module):
            loss, sums = loss_and_sums(micro)
            # Ranks average their gradients; a rank without rows takes part with weight 0.
            accelerator.backward(loss * (ranks if micro else 0))
        counted = sums.detach() if micro else torch.zeros_like(sums)
        total = counted if total is None else total + counted
    values = accelerator.reduce(total, "sum").tolist()
    norm = accelerator.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of shards: a DTensor
    if not (math.isfinite(values[0]) and math.isfinite(grad_norm)):
        raise NotFinite(f"summed loss {values[0]}, gradient norm {grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return values, grad_norm
