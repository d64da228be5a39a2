"""Log-probabilities of the responses under the reference, computed once and kept in the run folder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ipvrm.data.batches import collate, microbatches_for_rank
from ipvrm.data.responses import Response
from ipvrm.errors import IpvrmError, reading
from ipvrm.models.causal_lm import ResponseLogprobs, load_model
from ipvrm.output.progress import Progress
from ipvrm.run_folder import read_about, reusable, write_tensors

REFERENCE_FILE = "reference_logprobs.safetensors"
DIGEST = "sha256"
WORDS = {"data": "the data", "reference": "the reference"}


def reference_logprobs(
    sets: Sequence[Sequence[Response]],
    path: Path,
    accelerator: Any,
    *,
    reference_name: str,
    reference_hash: str,
    module: nn.Module | None,
    max_rows: int,
    progress: Progress,
) -> list[Tensor]:
    """(N,) fp32 on the CPU for each set of responses, packed in their order.

    Read from `path` where it holds them under the same settings (data, reference weights, precision); else
    computed on all ranks and stored there, so that a resumed run sees the same numbers and no second model
    sits in memory.

    Args:
        module: the prepared reference, or None to load `reference_name` for as long as it takes.

    Raises:
        IpvrmError: a log-probability is infinite or not a number, with the row and the token.
    """
    settings = {
        "data": [data_hash(responses) for responses in sets],
        "reference": reference_hash,
        "mixed_precision": accelerator.mixed_precision,
    }
    stored = _read(path, settings, len(sets), progress)
    accelerator.wait_for_everyone()  # no rank may see the file that another one has just written
    if stored is not None:
        return stored
    if module is None:
        model = ResponseLogprobs(load_model(reference_name, torch.float32))
        module = cast(nn.Module, accelerator.prepare_model(model, evaluation_mode=True))
    packed = [_logprobs(module, responses, accelerator, max_rows, progress) for responses in sets]
    for values, responses in zip(packed, sets, strict=True):
        if (place := not_finite(values, responses)) is not None:
            raise IpvrmError(
                f"reference {reference_name}: {place}; every response token needs a finite one. Leave "
                "the row out, or look at the model's weights and its head"
            )
    if accelerator.is_main_process:
        tensors = {f"set.{i}": values for i, values in enumerate(packed)}
        write_tensors(path, tensors, settings | {DIGEST: values_hash(packed)})
    return packed


@torch.no_grad()
def _logprobs(
    module: nn.Module, responses: Sequence[Response], accelerator: Any, max_rows: int, progress: Progress
) -> Tensor:
    packed = torch.zeros(sum(r.length for r in responses), device=accelerator.device)
    parts = split_packed(packed, responses)
    share = microbatches_for_rank(
        range(len(responses)),
        [len(r.input_ids) for r in responses],
        max_rows=max_rows,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    for indices in progress.track(share, "reference"):
        chosen = [responses[i] for i in indices or [0]]  # every rank takes part in every forward
        logprobs = module(collate(chosen).to(accelerator.device))
        for index, values in zip(indices, split_packed(logprobs, chosen), strict=False):
            parts[index].copy_(values)
    return cast(Tensor, accelerator.reduce(packed, "sum")).cpu()


def _read(path: Path, settings: dict[str, Any], num_sets: int, progress: Progress) -> list[Tensor] | None:
    """What is stored; None where there is nothing or it was made otherwise, which is said."""
    if not path.is_file():
        return None
    try:
        with reading(path, "cannot be read", "it is made again"), safe_open(path, framework="pt") as file:
            made_from = read_about(file)
            names = [f"set.{i}" for i in range(num_sets) if f"set.{i}" in file.keys()]  # noqa: SIM118
            tensors = [file.get_tensor(name) for name in names]
    except IpvrmError as error:
        progress.note(str(error))
        return None
    digest = made_from.pop(DIGEST, None)
    if not reusable(made_from, settings, str(path), progress.note, WORDS):
        return None
    if len(tensors) < num_sets or values_hash(tensors) != digest:
        progress.note(f"{path} is not what was written: damaged; it is made again")
        return None
    return tensors


def split_packed(packed: Tensor, responses: Sequence[Response]) -> list[Tensor]:
    """Views (T_b,) of a packed (N,), one for each response."""
    return list(packed.split([r.length for r in responses]))


def not_finite(packed: Tensor, responses: Sequence[Response], what: str = "log-probability") -> str | None:
    """The first response token whose value in `packed` (N,) is not finite, in words; None where all are."""
    for response, values in zip(responses, split_packed(packed, responses), strict=True):
        if bool((bad := ~values.isfinite()).any()):
            token = int(bad.int().argmax())
            token_id = response.input_ids[response.prompt_length + token]
            return (
                f"{response.source or 'a response'}: the {what} of response token {token + 1} of "
                f"{response.length} (id {token_id}) is {values[token]:g}"
            )
    return None


def values_hash(packed: Sequence[Tensor]) -> str:
    """sha256 of fp32 values on the CPU, in order: what lies beside a checkpoint has no other checksum."""
    digest = hashlib.sha256()
    for values in packed:
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def data_hash(responses: Sequence[Response]) -> str:
    """sha256 of the token ids, prompt lengths and labels, in order."""
    digest = hashlib.sha256()
    for r in responses:
        digest.update(repr((r.input_ids, r.prompt_length, r.label)).encode())
    return digest.hexdigest()
