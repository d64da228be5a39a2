"""`ipvrm make-tiny-model`: a byte-level BPE trained on given texts and a small random Qwen3, in one folder.

For trying a pipeline end to end without downloading anything. The same texts and flags give the same folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipvrm.data.files import kind_of, records
from ipvrm.errors import IpvrmError, reading
from ipvrm.output.locks import locked
from ipvrm.run_folder import remove_leftovers_of, save_folder, sha256_of

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_BYTES = 256
# Qwen's split: contractions, words with their leading space, single digits, punctuation, line breaks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TinyModelConfig:
    """A small random Qwen3 with a byte-level BPE tokenizer and a ChatML template."""

    output_dir: str
    """Folder to write; must not exist, or be empty, or hold the same model already."""
    texts: tuple[str, ...]
    """Files to train the tokenizer on: every string of a .parquet, .jsonl or .json; else the whole text."""
    vocab_size: int = 6144
    """Most entries of the vocabulary, special tokens included; fewer when the texts hold fewer pairs."""
    hidden_size: int = 96
    intermediate_size: int = 288
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    seed: int = 42


def texts_of(path: str | Path) -> Iterator[str]:
    """Every string of a .parquet, .jsonl or .json file, or the whole of a text file."""
    path = Path(path)
    if path.is_file() and kind_of(path) is None:
        with reading(path, "cannot be read", "texts must be UTF-8"):
            text = path.read_text(encoding="utf-8-sig")
        yield text
        return
    for file, row, _, value in records(path, None):
        if isinstance(value, ValueError):
            raise IpvrmError(f"{file}:{row}: {value}")
        yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """A fast tokenizer: byte-level BPE (any text round-trips) with ChatML special tokens and template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise IpvrmError(
            f"make-tiny-model: vocab_size must be at least {least} (bytes and special tokens); "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def random_qwen3(tokenizer: Any, config: TinyModelConfig) -> Any:
    """A Qwen3ForCausalLM over the tokenizer's vocabulary, with random fp32 weights from `config.seed`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if (
        config.hidden_size % config.num_attention_heads
        or config.num_attention_heads % config.num_key_value_heads
    ):
        raise IpvrmError(
            "make-tiny-model: hidden_size must be a multiple of num_attention_heads, "
            "and that of num_key_value_heads; "
            f"got {config.hidden_size}, {config.num_attention_heads}, {config.num_key_value_heads}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.hidden_size // config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                tie_word_embeddings=config.tie_word_embeddings,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )


def make_tiny_model(config: TinyModelConfig) -> Path:
    """Trains the tokenizer, draws the model, writes both to `config.output_dir` and returns it.

    Raises:
        IpvrmError: the folder is in use, a text file cannot be read, or sizes that do not fit together.
    """
    folder, place = Path(config.output_dir), Path(config.output_dir).absolute()
    with locked(place.with_name(f"{place.name}.model")):
        return _make_tiny_model(config, folder)


def _make_tiny_model(config: TinyModelConfig, folder: Path) -> Path:
    filled = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    other = IpvrmError(
        f"make-tiny-model: {folder} exists and is not the model of these flags; name another --output_dir"
    )
    if filled and not (folder / "config.json").is_file():
        raise other
    if not config.texts:
        raise IpvrmError("make-tiny-model: --texts needs at least one file")
    from ipvrm.models.causal_lm import save_model

    tokenizer = train_tokenizer((text for path in config.texts for text in texts_of(path)), config.vocab_size)
    model = random_qwen3(tokenizer, config)
    remove_leftovers_of(folder.absolute())  # of a run that was killed
    with save_folder(folder) as temporary:
        save_model(model, temporary)
        tokenizer.save_pretrained(temporary)
        if filled and _files(temporary) != _files(folder):
            raise other
    return folder


def _files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def main(config: TinyModelConfig) -> None:
    """Console entry: makes the model and says what it is."""
    folder = make_tiny_model(config)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = (folder / "model.safetensors").stat().st_size / 4 / 1e6
    print(f"{folder}: {stored['model_type']}, {size:.2f} M parameters, {stored['vocab_size']} tokens")
