"""Checkpoints of a training run: all that an update depends on, as safetensors and JSON; no pickles.

A checkpoint is a Hugging Face model folder (fp32 master weights) plus `optimizer.safetensors`,
`rng.safetensors`, `trainer_state.json` and `checksums.json`. It is written to a temporary folder and renamed,
so a killed process leaves no half checkpoint; it is renamed before it is deleted.

The checksums (sha256 of every file) tell what a disk, a copy or a hand has done to it since. They are taken
from the page cache while the checkpoint is still in the temporary folder, which costs 0.7 s of one core a GiB
(SHA-NI; fp32 weights and Adam's moments of 0.6 B parameters: 5 s), and once more when a run goes on from it.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ipvrm.errors import IpvrmError, cause
from ipvrm.run_folder import JsonlLog, read_json, remove_folder, sha256_of, write_json, write_tensors

WORDS = {  # of a fingerprint's hashes
    "start_hash": "the starting model",
    "reference_hash": "the reference",
    "reward_model_hash": "the reward model",
    "data_hash": "the training data",
}
PREFIX = "checkpoint-"
AUTO = "auto"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
CHECKSUMS = "checksums.json"
_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
_LOAD = StateDictOptions(flatten_optimizer_state_dict=True)  # every rank reads the whole file


class TrainingInterrupted(IpvrmError):
    """A signal asked the run to stop; its state is in `checkpoint`."""

    def __init__(self, message: str, checkpoint_folder: Path, exit_code: int):
        super().__init__(message)
        self.checkpoint = checkpoint_folder
        self.exit_code = exit_code


def interrupted(folder: Path, step: int, total: int, signal_number: int) -> TrainingInterrupted:
    """What a run raises that has stopped after `step` of `total` and saved `folder`.

    Args:
        signal_number: 0 on a rank that has not seen the signal itself.
    """
    again = f"--output_dir {folder.parent} --resume_from_checkpoint auto"
    message = (
        f"stopped after update {step} of {total}, saved {folder}; "
        f"the same command with {again} goes on from there"
    )
    return TrainingInterrupted(message, folder, 128 + (signal_number or signal.SIGINT))


def resumed_from(folder: Path, given: str | None, mark: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, None where the run starts.

    Args:
        note: is told of each damaged checkpoint that is passed over.

    Raises:
        IpvrmError: it does not exist, or it is not asked for and the folder holds checkpoints or `mark`.
    """
    if given is not None:
        return find_checkpoint(folder, given, note)
    if _all(folder) or (folder / mark).exists():
        raise IpvrmError(
            f"{folder} holds a run already; add --resume_from_checkpoint auto, or name another --output_dir"
        )
    return None


def open_log(folder: Path, start: int, resumed: bool, note: Callable[[str], None]) -> JsonlLog:
    """The run's log after `start` steps; a resumed run first loses what came later (`remove_later`).

    Args:
        note: is told of damaged lines.
    """
    if resumed:
        remove_later(folder, start)
    return JsonlLog(folder / "metrics.jsonl", after_step=start or None, note=note)


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first; whether they are whole, `damage` says."""
    return [path for path in _all(folder) if (path / CHECKSUMS).is_file()]


def _all(folder: str | Path) -> list[Path]:
    found = [path for path in Path(folder).glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file is as it was saved."""
    try:
        stored = read_json(folder / CHECKSUMS)
        expected = {str(name): str(digest) for name, digest in stored.items()}
    except (IpvrmError, AttributeError) as error:
        return f"its {CHECKSUMS} cannot be read ({error})"
    if STATE not in expected:
        return f"its {CHECKSUMS} does not name {STATE}"
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if sha256_of(file) != digest:
                return f"{name} has changed since it was saved"
        except OSError as error:
            return f"{name} cannot be read ({cause(error)})"
    return None


def write_checksums(folder: Path) -> None:
    """Writes sha256 of every file in and below `folder`: the last file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): sha256_of(path) for path in files})


def newest_step(folder: str | Path) -> int:
    """The step of the newest complete checkpoint in `folder`, 0 where there is none."""
    return max(map(_step_of, checkpoints(folder)), default=0)


def newest_in_words(folder: str | Path) -> str:
    """For the message of a run that stops: what it can be resumed from."""
    saved = checkpoints(folder)
    return f"the last checkpoint, {saved[-1]}, is intact" if saved else "no checkpoint was written yet"


def find_checkpoint(output_dir: str | Path, resume_from: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names: a folder, or under `auto` the newest if any.

    Args:
        note: is told of each damaged checkpoint that `auto` passes over.

    Raises:
        IpvrmError: there is none of this name, or none that is whole; the message lists those that exist.
    """
    if resume_from == AUTO:
        found = newest_whole(output_dir, note)
        if found is None and _all(output_dir):
            raise IpvrmError(
                f"--resume_from_checkpoint auto: no checkpoint in {output_dir} is whole; delete them to "
                "start afresh, or name another --output_dir"
            )
        return found
    path = Path(resume_from)
    names = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
    if not (path / CHECKSUMS).is_file():
        raise IpvrmError(
            f"--resume_from_checkpoint {resume_from}: not a checkpoint ({CHECKSUMS} is missing); "
            f"in {output_dir}: {names}"
        )
    if (wrong := damage(path)) is not None:
        raise IpvrmError(
            f"--resume_from_checkpoint {resume_from}: damaged: {wrong}; "
            f"name another; in {output_dir}: {names}"
        )
    return path


def newest_whole(folder: str | Path, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were saved; damaged ones are passed over, and said."""
    for path in reversed(_all(folder)):
        wrong = damage(path) if (path / CHECKSUMS).is_file() else "it is not complete"
        if wrong is None:
            return path
        note(f"{path} is passed over: {wrong}")
    return None


def remove_old_checkpoints(folder: str | Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of `folder`."""
    for path in checkpoints(folder)[:-keep]:
        remove_folder(path)


def remove_later(folder: str | Path, step: int) -> None:
    """Deletes what a run that goes on from `step` makes again: later checkpoints, and the results.

    Left there, they would count as newer than the checkpoints that are written from now on.
    """
    for path in _all(folder):
        if _step_of(path) > step:
            remove_folder(path)
    (Path(folder) / "results.json").unlink(missing_ok=True)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by names of parameters, on the CPU. Of a sharded model it is whole on the main
    rank, and all ranks take part."""
    return get_optimizer_state_dict(model, optimizer, options=_SAVE)


def save_optimizer(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Writes the tensors of `optimizer_state` to `folder` and returns its scalars, for
    `trainer_state.json`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous()
        else:
            scalars[name] = value
    write_tensors(folder / OPTIMIZER, tensors)
    return scalars


def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
) -> None:
    """Restores what `save_optimizer` wrote, on any number of ranks and sharded (FSDP2) or not; `optimizer`
    must be fresh and `model` without gradients."""
    state: dict[str, Any] = {**load_file(folder / OPTIMIZER)}
    for name, value in scalars.items():
        state[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples (betas)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            mesh, placements = parameter.device_mesh, parameter.placements
            for key in (f"state.{name}.exp_avg", f"state.{name}.exp_avg_sq"):
                # the whole lies on each rank, which keeps its share; nothing is sent
                state[key] = distribute_tensor(state[key], mesh, placements, src_data_rank=None)
    set_optimizer_state_dict(model, optimizer, state, options=_LOAD)


def rng_state(rank: int) -> dict[str, Tensor]:
    """State of torch's generators on this rank, under names that hold the rank."""
    state = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(folder: Path, rank: int) -> None:
    """Restores this rank's generators; a rank that the saved run did not have keeps its own."""
    state = load_file(folder / RNG)
    if f"cpu.{rank}" in state:
        torch.set_rng_state(state[f"cpu.{rank}"])
    if f"cuda.{rank}" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[f"cuda.{rank}"])


def save_state(folder: Path, state: dict[str, Any], rng: list[dict[str, Tensor]]) -> None:
    """Writes generators and scalars; `checksums.json` comes last and marks the checkpoint as complete."""
    write_tensors(folder / RNG, {name: value for part in rng for name, value in part.items()})
    write_json(folder / STATE, state)
    write_checksums(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """The scalars of a checkpoint. Raises IpvrmError when they cannot be read."""
    state = read_json(folder / STATE)
    if not isinstance(state, dict) or not {"step", "fingerprint", "optimizer"} <= set(state):
        raise IpvrmError(f"{folder / STATE}: not the state of a training run")
    return state
