"""Where a model is, which files hold its weights, and the hash that says which model it is.

Weights are safetensors in the model's own folder and nothing else: `model.safetensors`, or the shards that
`model.safetensors.index.json` names. An index is a text that anybody may have written, and transformers opens
whatever it names, pickles included; so the names are read and judged here first.
"""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from ipvrm.errors import IpvrmError, reading

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # of a Q-RM, beside its body
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download or copy it again"


def local_folder(name: str | Path) -> Path:
    """The folder of model `name`: itself, or a Hub name's snapshot (downloaded unless HF_HUB_OFFLINE=1).

    Raises:
        IpvrmError: neither a folder with a config.json nor a Hub model that can be reached.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    refuse_adapter(path)
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise IpvrmError(f"{name}: not a model folder (no config.json in it)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IpvrmError(
            f"{name}: neither a model folder nor a model that the Hub gives: {reason}"
        ) from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that hold the model in `folder`, their headers read.

    A name is judged as it stands, not by where a symlink leads: the Hub's cache is all symlinks.

    Raises:
        IpvrmError: no such file, an index that names anything but `*.safetensors` files beside it, a damaged
            file, or an adapter in place of a model.
    """
    folder = Path(folder)
    refuse_adapter(folder)
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() else _named_by_index(folder)
    files = [folder / name for name in names]
    for file in files:
        _check(file)
    return files


def refuse_adapter(folder: Path) -> None:
    """Raises IpvrmError where `folder` holds a PEFT adapter, which transformers would take for its base."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "a base model"
    raise IpvrmError(
        f"{folder}: a PEFT adapter for {base}, not a model; merge the two (PeftModel.merge_and_unload(), "
        "then save_pretrained) and give that folder"
    )


def _named_by_index(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        raise IpvrmError(
            f"{folder}: no {WEIGHTS} and no {INDEX}"
            + (f" (only {pickled[0]}; pickled weights are not loaded, convert them first)" if pickled else "")
            + ("" if pickled else "; is this the folder of a model?")
        )
    with reading(index, "not a readable index of weights", AGAIN):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        ordered = sorted(map(str, names))
    for name in ordered:
        plain = name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\:\0")
        if not plain:
            raise IpvrmError(
                f"{index}: names {name!r}; weights are read from *.safetensors files of that folder alone. "
                "Take the model from a source that you trust, or convert it"
            )
    if not ordered:
        raise IpvrmError(f"{index}: names no file; {AGAIN}")
    return ordered


def _check(file: Path) -> None:
    """Reads the header, which holds the file's size too."""
    if not file.is_file():
        raise IpvrmError(f"{file}: no such file, although {INDEX} names it; {AGAIN}")
    with reading(file, "cannot be read", AGAIN), open(file, "rb") as opened:
        start = opened.read(len(LFS_POINTER))
    size = file.stat().st_size
    advice = AGAIN
    if start == LFS_POINTER:
        advice = "it is a Git LFS pointer: fetch what it points to (git lfs pull), or download the file"
    problem = f"not a readable safetensors file ({size:,} bytes)"
    with reading(file, problem, advice), safe_open(file, framework="pt") as tensors:
        tensors.keys()


def weights_hash(folder: str | Path) -> str:
    """sha256 over config.json, the index where there is one, and exactly the weight files (names, sizes,
    contents), a value head among them: which model this is.

    Raises:
        IpvrmError: as in `local_folder` and `weight_files`.
    """
    folder = local_folder(folder)
    weights = weight_files(folder)
    index = [] if weights == [folder / WEIGHTS] else [folder / INDEX]
    digest = hashlib.sha256()
    value_head = [path for path in [folder / VALUE_HEAD] if path.is_file()]
    for path in [folder / "config.json", *index, *weights, *value_head]:
        with reading(path, "cannot be read", AGAIN):
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
