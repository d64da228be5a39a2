"""The model card of a saved model: README.md with the Hub's metadata, and what the model was made from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ipvrm.run_folder import installed_version, write_text

CARD = "README.md"
PAPER = "2604.13197"
REWARD_TAGS = ("reward-model", "process-reward-model")
LEFT_OUT = ("peak_memory_bytes", "tokens_per_second", "learning_rate")  # of the machine and the schedule


def write_card(
    folder: Path,
    *,
    name: str,
    summary: str,
    usage: str,
    tags: tuple[str, ...],
    base: str | None,
    settings: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes the card into `folder`. No path of this machine stands in it; places go by their last part.

    Args:
        name: the heading. summary, usage: a paragraph, and Python code.
        base: what it was trained from, as the user gave it; metadata where that is a name of the Hub.
        settings, data, metrics: a table each; an empty one is left out, and so are numbers of the machine.
    """
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["ipvrm", *tags, f"arxiv:{PAPER}"]}
    if base is not None and _on_the_hub(base):
        about["base_model"] = base
    parts = ["---", yaml.safe_dump(about, sort_keys=False).strip(), "---", "", f"# {name}", "", summary, ""]
    parts += ["```python", usage, "```", ""]
    shown = {"Settings": {"base": base, **settings}, "Data": data or {}, "Metrics": metrics or {}}
    for title, values in shown.items():
        rows = [f"| {key} | {cell} |" for key, value in values.items() if (cell := _cell(key, value))]
        if rows:
            parts += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
    written_by = f"Written by ipvrm {installed_version('ipvrm')}"
    parts.append(f"{written_by} (method: [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})).")
    write_text(folder / CARD, "\n".join(parts) + "\n")


def write_policy_card(
    folder: Path, *, algorithm: str, with_reward_model: bool, settings: Mapping[str, Any], **about: Any
) -> None:
    """The card of a policy; `about` are `write_card`'s base, data and metrics.

    Args:
        with_reward_model: the one that it was trained against is saved in `reward_model` beside it.
    """
    beside = ", with the implicit reward model that it was trained against in `reward_model`"
    write_card(
        folder,
        name=f"Policy trained by {algorithm}",
        summary=f"A causal language model trained on its own verified answers{beside * with_reward_model}.",
        usage="from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        tags=("reinforcement-learning", algorithm),
        settings={"algorithm": algorithm, **settings},
        **about,
    )


def _on_the_hub(name: str) -> bool:
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _cell(key: str, value: Any) -> str:
    """The text of a value, empty for one that is not shown."""
    if (
        value is None
        or key in LEFT_OUT
        or key.startswith("seconds")
        or isinstance(value, dict | list | tuple)
    ):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if _on_the_hub(text) else Path(text).name
