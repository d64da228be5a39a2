"""Damaged files (flipped bits, halves, zeros) and hostile ones (pickles, code, bombs): read, or one line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.process import Wire, die, run
from benchmarks.faults.runs import Command, Found, World, contents, differ, smaller
from ipvrm.training import checkpoint

MEMORY = 4 << 30  # bytes a command may take here: the models are tiny, so that more is a bomb's
HASHED = ("model.safetensors", "config.json")  # of a reward model: what its own hash covers
LOG = "metrics.jsonl"
KEPT = (  # what a next run goes on with
    "checkpoint-", "reference_logprobs", ".partial/", "/part-", "/prompts/", "/scores.jsonl", f"/{LOG}"
)  # fmt: skip
SETTINGS = ("settings.json", "key.json")  # half of them is refused: what lies beside may be of other ones
READERS = ("score", "eval processbench", "eval bon", "eval td", "inspect", "train-policy")  # of the model
WITHOUT_FILES = ("demo",)  # it reads none
RUN = (LOG, "config.yaml", "results.json")  # what `report`, which has no data, reads of a run
DATA = {"label": "rollouts.jsonl", "rollout": "prompts.jsonl", "score": "solutions.jsonl",
        "eval processbench": "gsm8k.json", "eval td": "prompts.jsonl", "train-rm": "labelled.jsonl",
        "train-policy": "prompts.jsonl", "make-tiny-model": "labelled.jsonl", "eval bon": "candidates.jsonl",
        "eval policy": "prompts.jsonl", "inspect": "solutions.jsonl"}  # fmt: skip
MODELS = {"rollout": ("sft",), "score": ("ipvrm", "sft"), "eval processbench": ("ipvrm", "sft"),
          "eval td": ("sft", "ipvrm"), "train-rm": ("sft",), "train-policy": ("sft", "ipvrm"),
          "eval bon": ("ipvrm", "sft"), "eval policy": ("sft",), "inspect": ("ipvrm", "sft")}  # fmt: skip


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file in one of seven ways, and says how."""
    data, way = bytearray(path.read_bytes()), rng.randrange(7)
    size = len(data)
    if way == 0 or size == 0:
        path.unlink()
        return "gone"
    if way == 1:
        cut = rng.randrange(size)
        path.write_bytes(data[:cut])
        return f"cut to {cut} of {size} bytes"
    at = rng.randrange(min(size, 4096) if rng.random() < 0.5 else size)  # headers are small
    length = rng.randint(1, 64)
    if way == 2:
        data[at : at + length] = bytes(len(data[at : at + length]))
        said = f"{length} zeros at {at}"
    elif way == 3:
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        said = f"{length} random bytes at {at}"
    elif way == 4:
        data += rng.randbytes(length)
        said = f"{length} random bytes at its end"
    else:
        count = rng.choice((1, 1, 1, 8))
        places = [rng.randrange(8 * size) for _ in range(count)]
        for place in places:
            data[place // 8] ^= 1 << place % 8
        said = f"bits {', '.join(map(str, places))} flipped"
    path.write_bytes(data)
    return said


def _moved_in(world: World, command: Command, trial: Path) -> tuple[Command, Path]:
    """The command on a copy of everything that it reads."""
    inputs = trial / "in"
    shutil.copytree(world.toy, inputs)
    flags = [flag.replace(str(world.toy), str(inputs)) for flag in command.flags]
    return replace(command, flags=flags), inputs


def _in_bounds() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def damaged_input(world: World, command: Command, rng: random.Random) -> Found:
    """A damaged file of data or of a model: used, or one line; a reward model's own weights are refused."""
    trial = world.trial(command)
    command, inputs = _moved_in(world, command, trial)
    models = MODELS.get(command.name, ())
    if command.name not in DATA:
        path = inputs / "ipvrm" / rng.choice(RUN)
    elif models and rng.random() < 0.6:
        folder = inputs / rng.choice(models)
        path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    else:
        path = _in_another_form(inputs / DATA[command.name], command, rng)
    before = path.read_bytes()
    said = f"{path.relative_to(inputs)}: {damage(path, rng)}"
    ended = run(command.arguments(trial), trial, tune=smaller, before=_in_bounds)
    problem = ended.wrong((0, 2))
    hashed = path.parent.name == "ipvrm" and path.name in HASHED and command.name in READERS
    changed = not path.exists() or path.read_bytes() != before
    if problem is None and hashed and changed and ended.status == 0:
        problem = "a reward model that is not the one of its hash was used"
    return Found(said, problem)


def _in_another_form(path: Path, command: Command, rng: random.Random) -> Path:
    """The same records as JSON lines, a list, compressed, or parquet; the command is told of the new name."""
    import pyarrow
    import pyarrow.parquet

    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    form = rng.choice((path.suffix, ".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"))
    new = path.with_name(f"given{form}")
    if form == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), new)
    elif form == ".json":
        new.write_text(json.dumps(rows))
    elif form == ".jsonl.gz":
        new.write_bytes(gzip.compress(lines))
    elif form == ".jsonl.zst":
        with pyarrow.output_stream(str(new), compression="zstd") as stream:
            stream.write(lines)
    else:
        new.write_bytes(lines)
    command.flags[:] = [str(new) if flag == str(path) else flag for flag in command.flags]
    return new


def damaged_state(world: World, command: Command, rng: random.Random) -> Found:
    """What an interrupted run has left is damaged: healed or passed over; settings and checkpoints may be
    refused in one line.

    Checkpoints carry checksums, so that anything may happen to them, and to a log, which decides nothing and
    may lose lines; of what other commands keep, a file is cut or gone, as a disk or a copy leaves it.
    """
    trial, at = world.trial(command), rng.randint(1, max(1, command.changes))
    ended = run(command.arguments(trial), trial, tune=smaller, wire=Wire(trial, at, die))
    if ended.status == 0:
        return Found("it had finished", world.judge(command, trial), False)
    kept = [
        path
        for path in sorted(trial.rglob("*"))
        if path.is_file()
        and not path.name.endswith((".tmp", ".lock", ".py", ".pyc"))
        and any(word in str(path.relative_to(trial)) for word in KEPT)
        and ".tmp" not in str(path)
    ]
    if not kept:
        return Found(f"killed at change {at}, nothing was kept", world.judge(command, trial), False)
    path = rng.choice(kept)
    if "checkpoint-" in str(path) or path.name == LOG:
        said = damage(path, rng)
    elif rng.random() < 0.3:
        path.unlink()
        said = "gone"
    else:
        size = path.stat().st_size
        cut = rng.randrange(size) if size else 0
        os.truncate(path, cut)
        said = f"cut to {cut} of {size} bytes"
    said = f"{path.relative_to(trial)}: {said}"
    ended = run(command.arguments(trial), trial, tune=smaller)
    if command.trains and ended.status == 0 and "finished already" in ended.said:
        return Found(f"it had finished, and reads nothing: {said}", ended.wrong((0,)), False)
    refusable = "checkpoint-" in str(path) or path.name in SETTINGS
    problem = ended.wrong((0, 2) if refusable else (0,))
    if problem is None and ended.status == 0:
        expected, found = command.expected, contents(trial)
        folder = next((p for p in path.parents if p.name.startswith("checkpoint-")), None)
        if (
            folder is not None
            and checkpoint.damage(folder)
            and folder != checkpoint.checkpoints(folder.parent)[-1]
        ):
            # the run went on from a newer one; this one is known to be damaged to whoever asks for it
            kept_so = f"{folder.relative_to(trial)}/"
            expected, found = (
                {name: x for name, x in files.items() if not name.startswith(kept_so)}
                for files in (expected, found)
            )
        if path.name == LOG:
            problem = _torn(path)
            expected, found = (
                {name: x for name, x in files.items() if not name.endswith(LOG)}
                for files in (expected, found)
            )
        problem = problem or differ(expected, found)
    return Found(said, problem)


def _torn(log: Path) -> str | None:
    """What is wrong with a training log that has lost lines, in words: each that is there is a record."""
    try:
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        return f"{log.name} holds what is no record: {error}"
    return None if steps else f"{log.name} is empty"


# ---------------------------------------------------------------------------------------------- hostile


class _Pickled:
    """Unpickled, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


CODE = "import os\nos.system({0!r})\nclass Any:\n    def __init__(self, *a, **k): os.system({0!r})\n"
ESCAPES = (  # of a chat template
    "{{% for c in ''.__class__.__mro__[1].__subclasses__() %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}",
    "{{{{ cycler.__init__.__globals__.os.popen({0!r}).read() }}}}",
    "{{{{ messages.__class__.__base__.__subclasses__() }}}}",
    "{{{{ self.__init__.__globals__.__builtins__.__import__('os').system({0!r}) }}}}",
)
BOMBS = (
    "{{% set x = 'a' * 9999999999 %}}",
    "{{% for i in range(10**12) %}}{{% endfor %}}",
)


def _index(folder: Path, names: dict[str, str]) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": names})
    )


def _names_a_pickle(model: Path, payload: str, rng: random.Random) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Pickled(payload)))
    _index(model, {"model.embed_tokens.weight": "pytorch_model.bin"})


def _only_a_pickle(model: Path, payload: str, rng: random.Random) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Pickled(payload)))


def _pickle_called_safetensors(model: Path, payload: str, rng: random.Random) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(_Pickled(payload), rng.randrange(6)))


def _names_another_folder(model: Path, payload: str, rng: random.Random) -> None:
    name = rng.choice(("../sft/model.safetensors", "/etc/passwd", "..", "a/../../x.safetensors", "\0", "C:x"))
    _index(model, {"model.embed_tokens.weight": name})


def _own_code(model: Path, payload: str, rng: random.Random) -> None:
    (model / "modeling_own.py").write_text(CODE.format(payload))
    config = json.loads((model / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    config["auto_map"] = {name: "modeling_own.Any" for name in names}
    if rng.random() < 0.5:
        config["model_type"] = "own"
    (model / "config.json").write_text(json.dumps(config))


def _own_tokenizer_code(model: Path, payload: str, rng: random.Random) -> None:
    (model / "tokenization_own.py").write_text(CODE.format(payload))
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Any"]}
    config["tokenizer_class"] = "Any"
    path.write_text(json.dumps(config))


def _template(model: Path, payload: str, rng: random.Random) -> None:
    text = rng.choice((*ESCAPES, *BOMBS)).format(payload)
    (model / "chat_template.jinja").write_text(text + "{{ messages[0].content }}")


def _header(model: Path, payload: str, rng: random.Random) -> None:
    size = rng.choice((2**63 - 1, 2**64 - 1, 10**9, 100))
    entry = {"a": {"dtype": "F32", "shape": [rng.choice((-1, 2**62, 4))], "data_offsets": [0, 2**60]}}
    text = rng.choice((json.dumps(entry).encode(), b"[" * 100_000, b"{" * 100_000, rng.randbytes(500)))
    (model / "model.safetensors").write_bytes(struct.pack("<Q", size) + text)


def _config(model: Path, payload: str, rng: random.Random) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= rng.choice(
        (
            {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"},
            {"transformers_weights": "pytorch_model.bin"},
            {"num_hidden_layers": -1},
            {"hidden_size": 0},
            {"vocab_size": 10**9},
            {"max_position_embeddings": 10**12},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            {"torch_dtype": "os.system"},
            {"rope_parameters": [1]},
            {"architectures": [payload]},
            {"model_type": "../own"},
        )
    )
    (model / "config.json").write_text(json.dumps(config))


def _deep(model: Path, payload: str, rng: random.Random) -> None:
    name = rng.choice(("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    (model / name).write_text(rng.choice(("[" * 200_000, '{"a":' * 200_000, "9" * 100_000, '{"a": NaN}')))


HOSTILE_MODELS: dict[str, Callable[[Path, str, random.Random], None]] = {
    "an index that names a pickle": _names_a_pickle,
    "pickled weights": _only_a_pickle,
    "a pickle called safetensors": _pickle_called_safetensors,
    "an index that names another folder": _names_another_folder,
    "code beside the config": _own_code,
    "code beside the tokenizer": _own_tokenizer_code,
    "a chat template that breaks out": _template,
    "a header that lies": _header,
    "a config that asks for more": _config,
    "JSON without an end": _deep,
}


def _bomb(path: Path, rng: random.Random) -> tuple[Path, str]:
    """4 GB of one letter in a few MB: as one line, or as one text of a row."""
    block, quoted = b"a" * (1 << 26), rng.random() < 0.5
    start, end = (b'{"prompt": "', b'", "answer": "1"}\n') if quoted else (b"", b"\n")
    name = path.with_name(rng.choice(("given.jsonl.gz", "given.json.gz")))
    name.write_bytes(gzip.compress(start) + gzip.compress(block, 1) * 64 + gzip.compress(end))
    return name, "a gzip of 4 GB" + (" in one text" if quoted else "")


def _lines(path: Path, rng: random.Random) -> tuple[Path, str]:
    nulls = {"prompt": "\0", "answer": "\0", "problem": "\0", "steps": ["\0"]}
    controls = {"prompt": "\x1b[2J\u202e", "answer": "3", "problem": "\x1b[2J\u202e", "steps": ["1"]}
    odd = {
        "a number of 100,000 digits": '{"prompt": ' + "9" * 100_000 + "}",
        "nested 100,000 deep": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "half a surrogate pair": r'{"prompt": "\ud83d", "answer": "3", "problem": "\ud83d", "steps": ["1"]}',
        "infinite": '{"prompt": "1", "answer": "3", "id": Infinity, "problem": "1", "steps": ["1"]}',
        "null bytes": json.dumps(nulls),
        "keys of its own": '{"__class__": "x", "__reduce__": ["os.system"], "prompt": {"a": 1}}',
        "control characters": json.dumps(controls),
    }
    name = rng.choice(sorted(odd))
    target = path.with_name("given.jsonl")
    target.write_text((odd[name] + "\n") * rng.choice((1, 1, 50)))
    return target, name


def _no_file(path: Path, rng: random.Random) -> tuple[Path, str]:
    target, kind = path.with_name("given.jsonl"), rng.choice(("a pipe", "a circle of links", "a device"))
    if kind == "a pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(target if kind == "a circle of links" else "/dev/zero")
    return target, kind


def hostile(world: World, command: Command, rng: random.Random) -> Found:
    """A file made to harm: it runs nothing, takes no memory, and is refused or used."""
    trial = world.trial(command)
    command, inputs = _moved_in(world, command, trial)
    canary = trial / "canary"
    payload = f"touch {canary}"
    models = MODELS.get(command.name, ())
    extra: list[str] = []
    if models and rng.random() < 0.7:
        said = rng.choice(sorted(HOSTILE_MODELS))
        HOSTILE_MODELS[said](inputs / rng.choice(models), payload, rng)
    elif rng.random() < 0.2:
        said = "a config file with a tag"
        text = rng.choice(
            (
                f"seed: !!python/object/apply:os.system ['{payload}']\n",
                "a: &a [x,x,x,x,x,x,x,x,x]\n"
                + "".join(
                    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
                ),
                "seed: 1\nseed: 2\n",
                "- 1\n",
                "seed: " + "[" * 20_000,
                "\0",
            )
        )
        (inputs / "flags.yaml").write_text(text)
        extra = ["--config", str(inputs / "flags.yaml")]
    else:
        path = inputs / DATA.get(command.name, "of-a-run")
        given, said = rng.choice((_bomb, _lines, _lines, _no_file))(path, rng)
        command.flags[:] = [str(given) if flag == str(path) else flag for flag in command.flags]
        if command.name not in DATA:
            given.replace(inputs / "ipvrm" / rng.choice(RUN))
    arguments = [*command.arguments(trial), *extra]
    ended = run(arguments, trial, tune=smaller, before=_in_bounds, seconds=HOSTILE_SECONDS)
    problem = ended.wrong((0, 2))
    if canary.exists():
        problem = "code of the file was run"
    return Found(said, problem)


HOSTILE_SECONDS = 300.0
TRIALS: dict[str, Callable[[World, Command, random.Random], Found]] = {
    "damaged inputs": damaged_input,
    "damaged state": damaged_state,
    "hostile files": hostile,
}
