"""What a model folder can do to us: weights are safetensors in the folder, and none of its code is run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.files import ESCAPES
from ipvrm import IpvrmError, RewardModel
from ipvrm.data.chat import Chat
from ipvrm.models.causal_lm import (
    SAFE,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
)
from ipvrm.models.folder import INDEX, WEIGHTS, weight_files, weights_hash
from ipvrm.models.reward_model import RewardModelInfo, write_info
from ipvrm.models.tiny_model import TinyModelConfig, make_tiny_model


@pytest.fixture
def sharded(tiny_folder, tmp_path):
    """The tiny model in two shards with an index; (folder, its index as a dict)."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder, index


def rename_first(folder, index, name):
    first = min(index["weight_map"])
    index["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(index))


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


def test_shards_of_an_index_are_read(sharded, tiny_folder):
    folder, index = sharded
    assert [f.name for f in weight_files(folder)] == sorted(set(index["weight_map"].values()))
    assert same_weights(load_model(folder), load_model(tiny_folder))


class Evil:
    """Unpickling makes the file `ran`."""

    def __reduce__(self):
        return (os.mkdir, (str(Evil.mark),))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "../outside.safetensors", "sub/x.safetensors", "/etc/x.safetensors",
        "..\\outside.safetensors", ".hidden.safetensors", "C:x.safetensors", "x.safetensors\0.bin",
        "", 7, None, ["a"],
    ],
)  # fmt: skip
def test_an_index_cannot_name_anything_else(sharded, tmp_path, name):
    folder, index = sharded
    Evil.mark = tmp_path / "ran"
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    first = load_file(folder / index["weight_map"][min(index["weight_map"])])
    save_file(first, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    (folder / "sub").mkdir()
    save_file(first, folder / "sub" / "x.safetensors", metadata={"format": "pt"})
    save_file(first, folder / ".hidden.safetensors", metadata={"format": "pt"})
    rename_first(folder, index, name)
    for read in (weight_files, weights_hash, load_model):
        with pytest.raises(IpvrmError, match=r"index\.json: (names|not a readable index)") as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    assert not Evil.mark.exists()


def test_pickles_alone_are_refused_unopened(tiny_folder, tmp_path):
    folder = tmp_path / "pickle"
    shutil.copytree(tiny_folder, folder)
    (folder / WEIGHTS).unlink()
    Evil.mark = tmp_path / "ran"
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(IpvrmError, match="only pytorch_model.bin; pickled weights are not loaded"):
        load_model(folder)
    assert not Evil.mark.exists()


def test_the_hub_cache_is_all_symlinks(sharded, tiny_folder, tmp_path, monkeypatch):
    """blobs/<hash> holds the bytes, snapshots/<commit>/<name> links to them; loaded by its Hub name."""
    folder, _ = sharded
    home = tmp_path / "hub" / "models--org--tiny"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("c0ffee" + "0" * 34)
    snapshot = home / "snapshots" / ("c0ffee" + "0" * 34)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, home / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same_weights(load_model("org/tiny"), load_model(tiny_folder))
    assert load_tokenizer("org/tiny").get_vocab() == load_tokenizer(tiny_folder).get_vocab()
    assert weights_hash("org/tiny") == weights_hash(folder)


def test_the_hash_covers_what_is_loaded_and_nothing_else(sharded):
    folder, index = sharded
    found = weights_hash(folder)
    save_file({"a": torch.ones(1)}, folder / "optimizer.safetensors")
    save_file({"a": torch.ones(1)}, folder / "model.fp16.safetensors")
    assert weights_hash(folder) == found
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    assert weights_hash(folder) != found
    (folder / INDEX).write_text(json.dumps(index))
    assert weights_hash(folder) == found
    for file in weight_files(folder):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert weights_hash(folder) != found
        data[-1] ^= 1
        file.write_bytes(data)
    assert weights_hash(folder) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 15\n",
            r"65 bytes\).*Git LFS pointer.*git lfs pull",
        ),
        (b"", r"\(0 bytes\).*download or copy it again"),
        (b"\0" * 500, r"not a readable safetensors file \(500 bytes\)"),
        (None, r"not a readable safetensors file \([\d,]+ bytes\)"),
    ],
    ids=["lfs", "empty", "zeros", "half"],
)
def test_weights_that_cannot_be_read(tiny_folder, tmp_path, content, message):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2] if content is None else content)
    for read in (weights_hash, load_model):
        with pytest.raises(IpvrmError, match=message) as caught:
            read(folder)
        assert str(folder / WEIGHTS) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_that_is_not_there(sharded):
    folder, index = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        IpvrmError, match=r"00002.safetensors: no such file, although model.safetensors.index"
    ):
        load_model(folder)


@pytest.mark.slow
def test_an_adapter_is_called_one(tiny_folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    peft.get_peft_model(
        load_model(tiny_folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ).save_pretrained(adapter)
    beside = tmp_path / "beside"
    shutil.copytree(tiny_folder, beside)
    shutil.copy(adapter / "adapter_config.json", beside)
    for folder in (adapter, beside):
        for read in (load_model, load_tokenizer, weights_hash):
            with pytest.raises(IpvrmError, match=r"a PEFT adapter for .*, not a model; merge"):
                read(folder)


@pytest.mark.slow
def test_a_pickled_adapter_is_not_loaded(tiny_folder, tmp_path):
    from ipvrm.training.adapters import ADAPTER, add_adapters, save_trained

    saved = tmp_path / "saved"
    save_trained(add_adapters(load_model(tiny_folder), 2, alpha=2.0), saved)
    add_adapters(load_model(tiny_folder), 2, alpha=2.0, saved=saved)
    (saved / ADAPTER / "adapter_model.safetensors").unlink()
    Evil.mark = tmp_path / "ran"
    torch.save({"weight": Evil()}, saved / ADAPTER / "adapter_model.bin")
    with pytest.raises(IpvrmError, match="adapter_model.safetensors: no such file"):
        add_adapters(load_model(tiny_folder), 2, alpha=2.0, saved=saved)
    assert not Evil.mark.exists()


# ------------------------------------------------------------------------------------------ code and kernels

CODE = """from pathlib import Path
Path(__file__)  # a module of the folder
Path({mark!r}).mkdir(exist_ok=True)
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
class Own:
    pass
"""
LOADS = """import sys
from ipvrm.errors import IpvrmError
from ipvrm.models.causal_lm import *
for read in (load_config, load_model, load_tokenizer, max_positions,
             lambda f: memory_estimate(f, rows=1, length=1)):
    try:
        read(sys.argv[1])
        print("loaded")
    except IpvrmError as error:
        assert "\\n" not in str(error)
        print(error)
"""


@pytest.fixture
def with_code(tiny_folder, tmp_path):
    """(folder whose config and tokenizer name Python code beside them, the folder that the code makes)."""
    folder, mark = tmp_path / "code", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    for name, maps in (
        ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Own"]}),
    ):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | {"auto_map": maps}))
    return folder, mark


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_never_run(with_code, known):
    """`yes |` at the prompt must not run it either: nothing is read from stdin."""
    folder, mark = with_code
    if not known:
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(stored | {"model_type": "own", "architectures": ["Own"]})
        )
    answers = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder)],
        input="y\n" * 100, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert answers.returncode == 0, answers.stderr
    lines = answers.stdout.splitlines()
    assert len(lines) == 5 and not mark.exists()
    assert all(("loaded" if known else "does not run it") in line for line in lines), lines
    assert "[y/N]" not in answers.stdout + answers.stderr


@pytest.mark.parametrize(
    "entry",
    [
        {"transformers_weights": "other.safetensors"},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"_attn_implementation": {"": "org/kernel"}},
        {"text_config": {"transformers_weights": "x.bin"}},
    ],
)
def test_a_config_cannot_name_other_weights_or_kernels(tiny_folder, tmp_path, entry):
    folder = tmp_path / "named"
    shutil.copytree(tiny_folder, folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | entry))
    for read in (load_config, load_model, load_tokenizer):
        with pytest.raises(IpvrmError, match=r"config.json: \w+ names .* Take the entry out"):
            read(folder)


NO_SWITCH = {  # loads that have none, because they run no code: what they read instead
    "GenerationConfig": "a JSON file",
    "PeftModel": "adapter_config.json and safetensors; PEFT takes trust_remote_code out of them",
    "RewardModel": "by the loads above",
}


def test_every_load_of_the_package_says_that_no_code_is_run():
    """A new `from_pretrained` or `from_config` must pass SAFE too, as written there."""
    import ast

    import ipvrm

    assert SAFE == {"trust_remote_code": False}
    calls = []
    for path in Path(ipvrm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("from_pretrained", "from_config"):
                owner = ast.unparse(called.value)
                calls.append((owner, f"{path.name}:{node.lineno}: {ast.unparse(node)}"))
    assert NO_SWITCH.keys() <= {owner for owner, _ in calls}
    assert len([owner for owner, _ in calls if owner not in NO_SWITCH]) >= 5
    for owner, call in calls:
        assert owner in NO_SWITCH or "**SAFE" in call, call


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_runs_in_a_sandbox(tiny_folder, tmp_path, escape):
    """What plain Jinja would run or show, transformers' sandbox does not."""
    from jinja2 import Environment

    canary = tmp_path / "ran"
    text = escape.format(f"touch {canary}") + "{{ messages[0].content }}"
    messages = [{"role": "user", "content": "hello"}]
    shown = Environment().from_string(text).render(messages=messages)
    assert canary.exists() or "built-in" in shown or "<class" in shown  # an escape it is
    canary.unlink(missing_ok=True)
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(text)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == text
    with pytest.raises(ValueError, match="the chat template refuses the conversation: .*unsafe"):
        Chat(tokenizer).prompt_ids("hello")
    assert not canary.exists()


# --------------------------------------------------------------------------------------- damaged small files


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 300, b"[1]", b'"a"', b"{", b"[" * 100_000, b"\xff\xfe\x00", b"{}", None,
     b"<html>404</html>"],
    ids=["empty", "zeros", "list", "text", "open", "deep", "not_utf8", "object", "half", "html"],
)  # fmt: skip
def test_a_damaged_file_of_a_model_folder_is_one_line(tiny_folder, tmp_path, name, content):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    for read in (load_config, load_tokenizer) if name == "config.json" else (load_tokenizer,):
        try:
            read(folder)
        except IpvrmError as error:
            assert "\n" not in str(error) and "damaged" in str(error) and len(str(error)) < 800
        else:  # what is in it is a file of its kind
            assert name == "chat_template.jinja" or content == b"{}", content


# ------------------------------------------------------------------------------ a reward model's own weights


def test_a_reward_model_is_told_by_its_weights(tiny_folder, tokenizer, tmp_path):
    from ipvrm.models.causal_lm import template_hash

    texts = tmp_path / "t.txt"
    texts.write_text("a b c")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1}
    folder = tmp_path / "rm"
    make_tiny_model(TinyModelConfig(str(tmp_path / "other"), (str(texts),), seed=1, **sizes))
    save_model(load_model(tiny_folder), folder)
    tokenizer.save_pretrained(folder)
    info = RewardModelInfo(
        "ipvrm", 10.0, 5.0, str(tiny_folder), str(tiny_folder), weights_hash(tiny_folder),
        template_hash(tokenizer), {},
    )  # fmt: skip
    write_info(folder, info)
    score = RewardModel.from_pretrained(folder, device="cpu").score("1+1", ["2", "3"])
    assert score.step_scores.shape == (2,)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 64
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(IpvrmError, match="not those that ipvrm_config.json was written for"):
        RewardModel.from_pretrained(folder, device="cpu")
