"""Training: the run folder, the same result however a batch is split, the same bits after an interruption."""

import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from runs import (
    LINEAR_IPVRM,
    ROOT,
    assert_nothing_to_unpickle,
    flags,
    log_of,
    run_cli,
    same_bits,
    signalled_while_writing,
    train,
    weights,
    write_jsonl,
)
from safetensors.torch import load_file

import ipvrm.training.train_rm as train_rm
from ipvrm import IpvrmError
from ipvrm.losses import objectives
from ipvrm.output.progress import signals_noted
from ipvrm.run_folder import write_json
from ipvrm.training import checkpoint
from ipvrm.training.checkpoint import TrainingInterrupted, checkpoints
from ipvrm.training.optimizer import learning_rate_factor
from ipvrm.training.reward_config import RewardConfig, objective_of, resolve
from ipvrm.training.train_rm import train_reward_model
from ipvrm_kernels import describe_cpu_matmul


@pytest.fixture
def config(tiny_folder, rollouts, tmp_path):
    """44 rows in batches of 16: three updates an epoch, the last of 12 rows; six updates."""

    def make(name="run", **changes):
        settings = {
            "model": str(tiny_folder),
            "train_data": str(rollouts),
            "output_dir": str(tmp_path / name),
            "global_batch_size": 16,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
        }
        return RewardConfig(**(settings | changes))

    return make


def assert_same_log(a, b):
    """To rounding; while model and reference are equal the accuracies are the sign of rounding errors."""
    for got, want in zip(log_of(a), log_of(b), strict=True):
        names = [name for name in want if got["step"] > 1 or "accuracy" not in name]
        assert {n: got[n] for n in names} == pytest.approx({n: want[n] for n in names}, rel=2e-3, abs=1e-4)


# --------------------------------------------------------------------------------------------- one run


def test_run_folder(config, tiny_folder, rollouts):
    result = train(config(eval_data=str(rollouts), save_steps=4))
    folder = result.output_dir
    assert result.steps == 6
    expected = (
        "config.json model.safetensors tokenizer.json chat_template.jinja ipvrm_config.json metrics.jsonl "
    )
    expected += "results.json config.yaml manifest.json reference_logprobs.safetensors checkpoint-4"
    assert set(expected.split()) <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt")) + list(folder.rglob("*.pkl"))
    assert not list(folder.glob(".*"))  # nothing temporary is left

    info = json.loads((folder / "ipvrm_config.json").read_text())
    assert (info["objective"], info["beta"], info["margin"]) == ("ipvrm", 10.0, 5.0)
    assert info["reference_given"] == str(tiny_folder)
    assert (folder / info["reference"]).resolve() == Path(tiny_folder).resolve()
    checkpoint_info = json.loads((folder / "checkpoint-4" / "ipvrm_config.json").read_text())
    assert (folder / "checkpoint-4" / checkpoint_info["reference"]).resolve() == Path(tiny_folder).resolve()
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 1e-3
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == {"seed": 42}

    records = log_of(folder)
    assert [record["step"] for record in records] == list(range(7))
    assert records[1]["loss"] == pytest.approx(
        torch.nn.functional.softplus(torch.tensor(5.0)).item(), rel=1e-4
    )
    of_batch = [r["value_right_count"] + r["value_wrong_count"] for r in records[1:]]
    assert of_batch == [16, 16, 12] * 2
    # The schedule steps once per update: 6 updates, linear from 1 to 1/6.
    assert [r["learning_rate"] for r in records[1:]] == pytest.approx([1e-3 * (6 - i) / 6 for i in range(6)])
    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["used"] == 44 and results["eval"]["eval_loss"] == records[-1]["eval_loss"]
    assert weights(folder)["model.norm.weight"].dtype == torch.float32


def test_it_learns(config, tmp_path):
    """The second word tells right from wrong: validation goes from chance to every response told apart."""
    data = tmp_path / "words.jsonl"
    with open(data, "w") as file:
        for number in range(64):
            text = f"I {'carry' if number % 2 else 'Answer'} {number % 7} and {number % 5}"
            file.write(
                json.dumps({"prompt": f"What is {number}?", "response": text, "label": number % 2}) + "\n"
            )
    settings = {"train_data": str(data), "eval_data": str(data), "learning_rate": 1e-2, "num_train_epochs": 4}
    result = train(config(**settings, per_device_train_batch_size=16))
    before, after = log_of(result.output_dir)[0], result.metrics["eval"]
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_outcome_accuracy"] == 1.0
    assert after["eval_value_wrong"] < 0 < after["eval_value_right"]


@pytest.mark.slow
def test_the_gradient_step_by_hand(config, tiny_folder, rollouts):
    """One update against plain PyTorch: full logits, the formula of Eq. 9, AdamW, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(config(max_steps=1, global_batch_size=44, max_grad_norm=0.0, weight_decay=0.1))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        weight_decay=0.1,
    )
    losses = []
    for line in Path(rollouts).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            row["conversation"][:-1], tokenize=False, add_generation_prompt=True
        )
        text = prompt + row["conversation"][-1]["content"] + "<|im_end|>"
        start, ids = len(tokenizer(prompt).input_ids), torch.tensor([tokenizer(text).input_ids])
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        value = 10.0 * (logprobs - logprobs.detach()).cumsum(0)  # the reference is the starting model
        mean_value = value / torch.arange(1, len(value) + 1)
        losses.append(torch.nn.functional.softplus(5.0 - (2 * row["label"] - 1) * mean_value).mean())
    torch.stack(losses).mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        got = weights(result.output_dir)[name]
        # Adam's first step has the size of lr wherever |gradient| >> eps: signs and decay are compared.
        close = (got - parameter).abs() < 2e-5
        assert close.float().mean() > 0.99, name


def test_the_released_command_takes_a_mean_per_sequence():
    """It runs at micro-batch 1, where its mean over tokens is one over a sequence."""
    assert objective_of(resolve(RewardConfig("m", "d", "o", preset="release"))).reduction == "sequence_mean"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ipvrm", "implicit_prm"])
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_the_split_does_not_matter(config, linear_adam, objective, preset):
    """16 = 1 x 16, 4 x 4 (by rows), 16 x 1; the third update of the epoch has 12 rows."""
    common = {
        "objective": objective,
        "preset": preset,
        "max_steps": 3,
        "learning_rate": 1.0,
        "mixed_precision": "no",  # bf16 rounds a batch of another shape otherwise
    }
    runs = [
        train(config("whole", per_device_train_batch_size=16, **common)),
        train(config("quarter", per_device_train_batch_size=4, **common)),
        train(config("single", per_device_train_batch_size=1, **common)),
    ]
    want = weights(runs[0].output_dir)
    start = weights(config().model)
    moved = max(float((want[n] - start[n]).abs().max()) for n in want)
    for run in runs[1:]:
        got = weights(run.output_dir)
        worst = max(float((got[n] - want[n]).abs().max()) for n in want)
        assert worst < 0.02 * moved, (worst, moved)
        assert_same_log(run.output_dir, runs[0].output_dir)


@pytest.mark.slow
def test_validation_does_not_depend_on_the_micro_batch(config, rollouts):
    runs = [
        train(config(f"eval{size}", max_steps=1, eval_data=str(rollouts), per_device_train_batch_size=size))
        for size in (7, 44)
    ]
    a, b = (run.metrics["eval"] for run in runs)
    assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    counts = {"eval_value_right_count", "eval_value_wrong_count"}
    assert set(a) == {f"eval_{name}" for name in objectives.METRICS} | counts


def test_gradient_accumulation_steps_set_the_global_batch(config):
    result = train(config(gradient_accumulation_steps=3, per_device_train_batch_size=4, num_train_epochs=1))
    assert result.steps == 4  # 44 rows in batches of 12


def test_bf16_autocast_keeps_fp32_masters(config):
    result = train(config(mixed_precision="bf16", max_steps=2))
    assert all(value.dtype == torch.float32 for value in weights(result.output_dir).values())
    assert log_of(result.output_dir)[1]["loss"] == pytest.approx(5.0067, abs=0.1)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_run(config):
    train(config("plain", max_steps=2))
    train(config("checkpointed", max_steps=2, gradient_checkpointing=True))
    assert same_bits(config("plain").output_dir, config("checkpointed").output_dir)


@pytest.mark.slow
def test_another_reference(config, tiny_folder, tmp_path):
    """The log-ratio starts away from 0 and the run folder names the reference that was used."""
    other = train(config("other", max_steps=2)).output_dir
    result = train(config(max_steps=1, reference=str(other)))
    assert log_of(result.output_dir)[0]["value_right"] != pytest.approx(0.0, abs=1e-3)
    info = json.loads((result.output_dir / "ipvrm_config.json").read_text())
    assert (result.output_dir / info["reference"]).resolve() == other.resolve()


@pytest.mark.slow
def test_reference_logprobs_are_computed_once(config, monkeypatch):
    first = config(max_steps=1)
    train(first)
    folder = Path(first.output_dir)
    (folder / "ipvrm_config.json").unlink()
    monkeypatch.setattr("ipvrm.models.reference._logprobs", lambda *a: pytest.fail("computed again"))
    train(first)
    monkeypatch.undo()
    other = train(config("other", max_steps=1)).output_dir
    stored = (folder / "reference_logprobs.safetensors").read_bytes()
    for changes in ({"max_length": 40}, {"reference": str(other)}, {"mixed_precision": "bf16"}):
        (folder / "ipvrm_config.json").unlink()
        (folder / "reference_logprobs.safetensors").write_bytes(stored)
        train(config(max_steps=1, **changes))
        assert (folder / "reference_logprobs.safetensors").read_bytes() != stored, changes


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "not of this kind"])
def test_damaged_reference_logprobs_are_made_again(config, capsys, damage):
    """They lie beside the checkpoints, whose checksums do not cover them."""
    with signals_noted(), pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(TrainingInterrupted):
            train(config(max_steps=3))
    path = Path(config().output_dir) / "reference_logprobs.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"a flipped bit": flipped, "half of it": whole[: len(whole) // 2]}.get(damage, b"{}"))
    result = train_reward_model(config(max_steps=3, resume_from_checkpoint="auto"))
    assert f"{path}" in capsys.readouterr().err
    assert path.read_bytes() == whole
    straight = train(config("straight", max_steps=3))
    assert same_bits(straight.output_dir, result.output_dir)


def test_dropout_of_the_starting_model_is_off(config, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "dropout")
    path = tmp_path / "dropout" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.5}))
    result = train(config(model=str(tmp_path / "dropout"), max_steps=1))
    first = log_of(result.output_dir)[0]
    assert (first["value_right"], first["value_wrong"]) == pytest.approx((0.0, 0.0), abs=1e-4)
    assert json.loads((result.output_dir / "config.json").read_text())["attention_dropout"] == 0.5


def test_dry_run_writes_nothing(config, capsys):
    result = train(config(dry_run=True, objective="implicit_prm"))
    assert result.steps == 0 and not result.output_dir.exists()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["config"]["beta"] == 0.05 and printed["config"]["margin"] is None
    assert printed["data"]["used"] == 44 and printed["steps"] == 6
    assert printed["memory_estimate"]["total_bytes"] > 0
    assert printed["fits"] == dict.fromkeys(("24 GB", "48 GB", "80 GB", "141 GB"), "yes")


@pytest.mark.parametrize("objective, words", [("ipvrm", "with --fsdp, on 3 or more"), ("q_rm", "no")])
def test_a_dry_run_says_on_how_many_devices_it_fits(config, tmp_path, capsys, monkeypatch, objective, words):
    pair = {"prompt": "What is 1 + 1?", "chosen": "Answer: 2", "rejected": "Answer: 3"}
    data = {} if objective == "ipvrm" else {"train_data": str(write_jsonl(tmp_path / "pairs.jsonl", [pair]))}

    def fewest_devices(one, two, size):
        assert one["gathered_bytes"] == 0 and two["gathered_bytes"] > 0
        return {24e9: None, 48e9: 3, 80e9: 1, 141e9: 1}[size]

    monkeypatch.setattr(train_rm, "fewest_devices", fewest_devices)
    train(config(dry_run=True, objective=objective, **data))
    assert list(yaml.safe_load(capsys.readouterr().out)["fits"].values()) == ["no", words, "yes", "yes"]


# -------------------------------------------------------------------------------------------- settings


def test_defaults_of_objective_and_preset(config):
    def resolved(**changes):
        done = resolve(config(**changes))
        return done.beta, done.margin

    assert resolved() == (10.0, 5.0)
    assert resolved(preset="release") == (10.0, 0.0)
    assert resolved(preset="release", margin=2.0) == (10.0, 2.0)
    assert resolved(objective="implicit_prm") == (0.05, None)
    defaults = RewardConfig("m", "d", "o")
    assert (defaults.learning_rate, defaults.global_batch_size) == (5e-7, 64)


def test_the_preset_release_is_the_released_command_and_flags_win_over_it():
    released = {
        "margin": 0.0,
        "num_train_epochs": 3.0,
        "max_length": 2560,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "seed": 1,
        "mixed_precision": "bf16",
        "beta": 10.0,
        "learning_rate": 5e-7,
        "weight_decay": 0.0,
        "global_batch_size": 64,
        "max_grad_norm": 1.0,
    }
    found = resolve(RewardConfig("m", "d", "o", preset="release"))
    assert {name: getattr(found, name) for name in released} == released
    assert found == resolve(found)
    given = {  # each is the default of the other preset
        "margin": 5.0,
        "num_train_epochs": 1.0,
        "max_length": 4096,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "seed": 42,
        "mixed_precision": "no",
    }
    paper = resolve(RewardConfig("m", "d", "o"))
    assert {name: getattr(paper, name) for name in given} == given
    found = resolve(RewardConfig("m", "d", "o", preset="release", **given))
    assert {name: getattr(found, name) for name in given} == given


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.slow
def test_lora(config, tiny_folder, rollouts, tmp_path):
    """Adapters alone move; `score` reads the merged weights; adapter on base is the same model; a resumed run
    is the same."""
    from peft import PeftModel

    from ipvrm import RewardModel
    from ipvrm.data.responses import Response
    from ipvrm.models.causal_lm import load_model, response_logprobs, weights_hash

    settings = config(lora_r=4, save_steps=2, save_total_limit=9)
    folder = train(settings).output_dir
    got, start = weights(folder), weights(tiny_folder)
    assert got.keys() == start.keys()
    moved = {n for n in got if not torch.equal(got[n], start[n])}
    assert moved and all("_proj" in name for name in moved)
    info = json.loads((folder / "ipvrm_config.json").read_text())
    assert info["adapter"] == {
        "folder": "adapter",
        "lora_r": 4,
        "lora_alpha": 4.0,
        "base": str(tiny_folder),
        "base_hash": weights_hash(tiny_folder),
    }
    assert info["adapter"]["base_hash"] == info["reference_hash"]

    scores = RewardModel.from_pretrained(folder, device="cpu")
    response = Response(tuple(range(5, 45)), 10, 1)
    (merged,) = scores.token_log_ratios([response])
    adapted = PeftModel.from_pretrained(load_model(tiny_folder), folder / info["adapter"]["folder"])
    from ipvrm.data.batches import collate

    with torch.no_grad():
        batch = collate([response])
        want = response_logprobs(adapted, batch) - response_logprobs(load_model(tiny_folder), batch)
    assert merged.abs().max() > 1e-3
    torch.testing.assert_close(merged, want, rtol=1e-4, atol=2e-6)
    scores.save_pretrained(tmp_path / "again")  # merged weights alone
    assert RewardModel.from_pretrained(tmp_path / "again", device="cpu").info.adapter is None

    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "results.json").unlink()
    train(copy_of(settings, resumed, resume_from_checkpoint="auto"))
    assert same_bits(resumed, folder) and log_of(resumed) == log_of(folder)


@pytest.mark.slow
def test_lora_scale_layers_and_checkpointing(config, tiny_folder):
    """Twice the scale is another model; gradients are the same with activation checkpointing."""
    common = {"lora_r": 2, "lora_target_modules": ("q_proj",), "max_steps": 2}
    plain, scaled, checked = (
        train(config(name, **common, **changes)).output_dir
        for name, changes in (
            ("plain", {}),
            ("scaled", {"lora_alpha": 8.0}),
            ("checked", {"gradient_checkpointing": True}),
        )
    )
    start = weights(tiny_folder)
    for folder in (plain, scaled, checked):
        moved = {name for name, x in weights(folder).items() if not torch.equal(x, start[name])}
        assert moved and all(".q_proj." in name for name in moved)
    assert not same_bits(plain, scaled)
    got, want = weights(checked), weights(plain)
    assert all(torch.allclose(got[n], want[n], rtol=1e-5, atol=1e-6) for n in want)


def test_what_lora_saves_is_said(config, tiny_folder, capsys):
    train_reward_model(config(lora_r=3, max_steps=1))
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"LoRA of rank 3 on {tiny_folder}: saved are the merged weights" in said
    assert "the adapter alone in adapter/" in said


def test_lora_settings_that_make_no_sense(config):
    for changes, reason in (
        ({"lora_alpha": 8.0}, "--lora_alpha belongs to --lora_r"),
        ({"lora_target_modules": ("q_proj",)}, "--lora_target_modules belongs to --lora_r"),
        ({"lora_r": -1}, "lora_r must not be negative"),
        ({"lora_r": 2, "lora_target_modules": ("lm_head",)}, "the head carries an adapter"),
        ({"lora_r": 2, "lora_target_modules": ("nothing",)}, "lora_target_modules nothing"),
    ):
        with pytest.raises(IpvrmError, match=reason):
            train(config(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": "endo_rm"}, "nothing to train"),
        ({"objective": "implicit_prm", "margin": 5.0}, "no margin"),
        ({"objective": "dpo", "margin": 5.0}, "no margin"),
        ({"objective": "implicit_prm", "prefix_weighting": "late"}, "no prefix weighting"),
        ({"objective": "q_rm", "reference": "base"}, "no reference"),
        ({"pairs": "all"}, "one by one, not in pairs"),
        ({"objective": "dpo"}, "no prompt has both a right and a wrong response"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"margin": float("nan")}, "margin must be finite"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio must lie in \[0, 1\]; got -0.1"),
        ({"warmup_ratio": 3.0}, r"warmup_ratio must lie in \[0, 1\]; got 3.0"),
        ({"seed": -1}, "seed must not be negative; got -1"),
        ({"preset": "other"}, "preset must be"),
    ],
)
def test_settings_that_make_no_sense(config, changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        train(config(**changes))


def test_learning_rate_schedule():
    def config(**changes):
        return resolve(RewardConfig("m", "d", "o", **changes))

    linear = [learning_rate_factor(i, 5, config(warmup_ratio=0.4)) for i in range(5)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3])
    cosine = [learning_rate_factor(i, 4, config(lr_scheduler_type="cosine")) for i in range(4)]
    assert cosine == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert learning_rate_factor(3, 4, config(lr_scheduler_type="constant")) == 1.0


def test_a_finished_run_is_not_overwritten(config):
    train(config(max_steps=1))
    with pytest.raises(IpvrmError, match="holds a run already"):
        train(config(max_steps=1))


# ---------------------------------------------------------------------------- interruption and resuming


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, rollouts, tmp_path_factory):
    """Six updates with a checkpoint every two, all kept."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = RewardConfig(
        model=str(tiny_folder),
        train_data=str(rollouts),
        eval_data=str(rollouts),
        output_dir=str(folder),
        global_batch_size=16,
        per_device_train_batch_size=5,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_ratio=0.3,
        weight_decay=0.01,
        save_steps=2,
        save_total_limit=9,
        logging_steps=3,
        use_cpu=True,
    )
    train(settings)
    return settings


def copy_of(settings, folder, **changes):
    from dataclasses import replace

    return replace(settings, output_dir=str(folder), **changes)


@pytest.mark.slow
def test_resume_gives_the_same_bits(uninterrupted, tmp_path):
    """From each checkpoint, by name and as `auto`; logging every 3 updates spans those at 2 and 4."""
    whole = Path(uninterrupted.output_dir)
    assert [p.name for p in checkpoints(whole)] == ["checkpoint-2", "checkpoint-4"]
    assert_nothing_to_unpickle(whole)
    for step in (2, 4):
        folder = tmp_path / f"from{step}"
        shutil.copytree(whole, folder)
        for path in checkpoints(folder):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        (folder / "model.safetensors").unlink()
        (folder / "results.json").unlink()
        name = "auto" if step == 2 else str(folder / "checkpoint-4")
        if step == 4:  # computed again from the reference, not from the trained weights
            (folder / "reference_logprobs.safetensors").unlink()
        result = train(copy_of(uninterrupted, folder, resume_from_checkpoint=name))
        assert same_bits(whole, folder)
        assert log_of(folder) == log_of(whole)
        assert [record["step"] for record in log_of(folder)] == [0, 3, 6]
        drop = {"seconds", "tokens_per_second", "peak_memory_bytes"}
        want = json.loads((whole / "results.json").read_text())
        assert {k: v for k, v in result.metrics.items() if k not in drop} == {
            k: v for k, v in want.items() if k not in drop
        }


@pytest.mark.slow
def test_a_resume_by_another_matmul_library_says_so(uninterrupted, tmp_path, capsys, monkeypatch):
    """It stands in the manifest and in every checkpoint."""
    whole, folder = Path(uninterrupted.output_dir), tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    chosen = describe_cpu_matmul()
    for file in ("manifest.json", "checkpoint-4/trainer_state.json"):
        assert json.loads((folder / file).read_text())["cpu_matmul"] == chosen
    settings = copy_of(uninterrupted, folder, resume_from_checkpoint="auto")
    for now, told in ((chosen, False), ("another: FAKE", True)):
        (folder / "results.json").unlink(missing_ok=True)
        monkeypatch.setattr("ipvrm_kernels.describe_cpu_matmul", lambda now=now: now)
        train_reward_model(settings, progress=True)
        said = " ".join(capsys.readouterr().err.split())
        words = f"checkpoint-4 were by {chosen.partition(':')[0]}; from here on they are by another: FAKE"
        assert (words in said) == told
    assert json.loads((folder / "manifest.json").read_text())["cpu_matmul"] == "another: FAKE"


@pytest.mark.slow
def test_a_flipped_bit_costs_a_checkpoint_and_not_the_run(uninterrupted, tmp_path, capsys):
    whole, folder = Path(uninterrupted.output_dir), tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "checkpoint-4" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    (folder / "results.json").unlink()
    settings = copy_of(uninterrupted, folder, resume_from_checkpoint="auto")
    train_reward_model(settings, progress=True)
    said = "checkpoint-4 is passed over: optimizer.safetensors has changed since it was saved"
    assert said in "".join(capsys.readouterr().err.split("\n"))
    assert same_bits(whole, folder) and log_of(folder) == log_of(whole)
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(uninterrupted, tmp_path):
    from ipvrm.output.locks import locked

    folder = tmp_path / "run"
    with locked(folder, folder=True), pytest.raises(IpvrmError, match=r"another run writes there \(pid \d+"):
        train(copy_of(uninterrupted, folder))
    assert not folder.exists()
    (tmp_path / "file").touch()
    with pytest.raises(IpvrmError, match="is a file; name a folder"):
        train(copy_of(uninterrupted, tmp_path / "file"))


def test_resume_refuses_another_run(uninterrupted, tmp_path, rollouts):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.output_dir, folder)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(Path(rollouts).read_text().splitlines(keepends=True)[:-1]))
    for changes, reason in (
        ({"learning_rate": 2e-3}, r"learning_rate \(0.001 then, 0.002 now\)"),
        ({"seed": 1}, "seed"),
        ({"margin": 1.0}, "margin"),
        ({"train_data": str(shorter)}, "the training data"),
    ):
        with pytest.raises(IpvrmError, match=f"made otherwise; changed: .*{reason}"):
            train(copy_of(uninterrupted, folder, resume_from_checkpoint="auto", **changes))
    (folder / "checkpoint-99").mkdir()  # without its state it is none
    assert checkpoints(folder)[-1].name == "checkpoint-4"
    with pytest.raises(IpvrmError, match="not a checkpoint"):
        train(copy_of(uninterrupted, folder, resume_from_checkpoint=str(folder)))


@pytest.mark.slow
def test_the_same_command_starts_goes_on_and_is_finished(config, tmp_path, monkeypatch):
    """`auto`: no checkpoint, a checkpoint, a finished run, which is left alone; others are refused."""
    settings = config(max_steps=3, resume_from_checkpoint="auto")
    with monkeypatch.context() as patch, signals_noted():
        interrupt_after(patch, 1)
        with pytest.raises(TrainingInterrupted):
            train(settings)
    result = train(settings)
    folder = result.output_dir
    assert [record["step"] for record in log_of(folder)][-1] == 3
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert train(settings) == result
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(IpvrmError, match=r"max_steps \(3 then, 4 now\)"):
        train(copy_of(settings, folder, max_steps=4))


KILLED_IN_A_SAVE = """
    import os, signal, sys
    from ipvrm.training import checkpoint
    from ipvrm.cli import main

    save_optimizer = checkpoint.save_optimizer
    calls = []

    def dies_the_second_time(folder, *rest):
        calls.append(folder)
        if len(calls) == 2:
            (folder / "optimizer.safetensors").write_bytes(b"half a fi")
            os.kill(os.getpid(), signal.SIGKILL)
        return save_optimizer(folder, *rest)

    checkpoint.save_optimizer = dies_the_second_time
    main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(uninterrupted, tmp_path):
    """kill -9 while checkpoint 4 is half written: `auto` is checkpoint 2, and the end is the same bits."""
    folder = tmp_path / "run"
    settings = copy_of(uninterrupted, folder)
    done = run_cli("-c", textwrap.dedent(KILLED_IN_A_SAVE), "train-rm", *flags(settings))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-2"]
    assert list(folder.glob(".checkpoint-4.*"))  # the half-written one is there, under another name
    train(copy_of(uninterrupted, folder, resume_from_checkpoint="auto"))
    assert same_bits(uninterrupted.output_dir, folder)
    assert log_of(folder) == log_of(uninterrupted.output_dir)
    assert not list(folder.glob(".*"))


def interrupt_after(monkeypatch, step, signal_number=signal.SIGINT):
    """Sends the signal while update `step` (from 0) is computed."""
    update = train_rm._Trainer._update

    def interrupted(self, number):
        if number == step:
            os.kill(os.getpid(), signal_number)
        return update(self, number)

    monkeypatch.setattr(train_rm._Trainer, "_update", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resumes_to_the_same_bits(uninterrupted, tmp_path, monkeypatch, signal_number):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, signals_noted():
        interrupt_after(patch, 2, signal_number)
        with pytest.raises(TrainingInterrupted, match="resume_from_checkpoint auto") as caught:
            train(copy_of(uninterrupted, folder))
    assert caught.value.exit_code == 128 + signal_number
    assert signal.getsignal(signal.SIGINT) is handler
    assert caught.value.checkpoint == checkpoints(folder)[-1]
    train(copy_of(uninterrupted, folder, resume_from_checkpoint="auto"))
    assert same_bits(uninterrupted.output_dir, folder)
    assert log_of(folder) == log_of(uninterrupted.output_dir)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_save_loses_nothing(config, monkeypatch, signal_number):
    """The run has no checkpoint, so the model is written to the end; the handlers are put back."""
    with signalled_while_writing(train_rm._Trainer, signal_number, monkeypatch):
        folder = train(config(max_steps=1)).output_dir
    assert {"model.safetensors", "results.json"} <= {path.name for path in folder.iterdir()}


def test_a_signal_in_a_library_call_is_its_caller_s(config, monkeypatch):
    """A notebook's or a cluster's own handlers stay in place, and the run goes on behind them."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1, signal.SIGTERM)
            result = train(config(max_steps=3))
        assert seen == [signal.SIGTERM] and [record["step"] for record in log_of(result.output_dir)][-1] == 3
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, 1, signal.SIGINT)
            train(config("other", max_steps=3))
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_interrupt_on_the_command_line(uninterrupted, tmp_path):
    code = """
        import os, signal, sys
        import ipvrm.training.train_rm as train_rm
        from ipvrm.cli import main

        update = train_rm._Trainer._update
        def interrupted(self, number):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return update(self, number)
        train_rm._Trainer._update = interrupted
        sys.exit(main(sys.argv[1:]))
    """
    done = run_cli("-c", textwrap.dedent(code), "train-rm", *flags(copy_of(uninterrupted, tmp_path / "run")))
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "the same command with --output_dir" in done.stderr.splitlines()[-1]


def test_nan_stops_before_the_weights_take_it(config, monkeypatch):
    ipvrm_loss = objectives.ipvrm_loss
    calls = []

    def poisoned(log_ratio, *rest, **options):
        calls.append(None)
        scale = float("nan") if len(calls) > 6 else 1.0  # in the fourth update of two micro-batches
        return ipvrm_loss(log_ratio * scale, *rest, **options)

    monkeypatch.setattr(objectives, "ipvrm_loss", poisoned)
    with pytest.raises(IpvrmError, match=r"update 4: .*nan.*The run so far: .*checkpoint-3"):
        train(config(save_steps=3))
    folder = checkpoints(config().output_dir)[-1]
    assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.slow
def test_old_checkpoints_are_removed(config):
    result = train(config(save_steps=1, save_total_limit=2, max_steps=5))
    assert [p.name for p in checkpoints(result.output_dir)] == ["checkpoint-3", "checkpoint-4"]


def test_random_generators_are_restored(tmp_path):
    torch.manual_seed(5)
    checkpoint.save_state(tmp_path, {}, [checkpoint.rng_state(0), checkpoint.rng_state(1)])
    want = torch.rand(3)
    checkpoint.restore_rng_state(tmp_path, 1)
    assert torch.equal(torch.rand(3), want)
    checkpoint.restore_rng_state(tmp_path, 7)  # a rank that the saved run did not have


def test_the_starting_model_is_not_overwritten(config, tiny_folder):
    with pytest.raises(IpvrmError, match="it would be overwritten"):
        train(config(output_dir=str(tiny_folder)))


# ------------------------------------------------------------------------------------------- two ranks


@pytest.mark.full
def test_two_gloo_processes_give_the_update_of_one(config, linear_adam, tmp_path):
    """The last update of the epoch has one row: one of the ranks has none."""
    rows = Path(config().train_data).read_text().splitlines(keepends=True)[:17]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    common = {"train_data": str(data), "eval_data": str(data), "num_train_epochs": 2, "save_steps": 2}
    common |= {"learning_rate": 1.0}
    one = train(config("one", **common))
    two = config("two", per_device_train_batch_size=3, **common)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "linear_ipvrm.py").write_text(LINEAR_IPVRM)
    done = run_cli(*launch, "-m", "linear_ipvrm", "train-rm", *flags(two), path=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((Path(two.output_dir) / "manifest.json").read_text())["ranks"] == 2
    want, got, start = weights(one.output_dir), weights(two.output_dir), weights(config().model)
    moved = max(float((want[n] - start[n]).abs().max()) for n in want)
    worst = max(float((got[n] - want[n]).abs().max()) for n in want)
    assert worst < 0.02 * moved, (worst, moved)
    assert_same_log(two.output_dir, one.output_dir)
    assert {
        name.split(".")[1] for name in load_file(Path(two.output_dir) / "checkpoint-2" / "rng.safetensors")
    } == {
        "0",
        "1",
    }


RUNS = """
import json, sys
from linear_ipvrm import main
for given in json.load(open(sys.argv[1])):
    assert main(["train-rm", *given]) == 0, given
"""


@pytest.mark.full
def test_two_sharded_processes_give_the_run_of_one(config, linear_adam, tmp_path):
    """FSDP2 by torch itself, on gloo, of the whole model and of adapters. A checkpoint of one process is gone
    on from by two sharded ranks, and one of theirs by one process, which shards nothing."""
    rows = Path(config().train_data).read_text().splitlines(keepends=True)[:17]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    common = {"train_data": str(data), "num_train_epochs": 2, "save_steps": 2}
    common |= {"learning_rate": 1.0}

    def behind_step_2_of(name):
        """The settings of a run that goes on in a folder with the log so far and this checkpoint alone."""
        source, copy = tmp_path / name, tmp_path / f"from_{name}"
        shutil.copytree(source / "checkpoint-2", copy / "checkpoint-2")
        shutil.copy(source / "metrics.jsonl", copy)
        return {"name": copy.name, "resume_from_checkpoint": "auto"}

    ones, sharded = {}, []
    for r in (0, 2):
        ones[r] = train(config(f"one_{r}", lora_r=r, **common))
        for more in ({"name": f"two_{r}"}, behind_step_2_of(f"one_{r}")):
            sharded.append(config(lora_r=r, fsdp=True, per_device_train_batch_size=3, **common, **more))
    (tmp_path / "linear_ipvrm.py").write_text(LINEAR_IPVRM)
    (tmp_path / "runs.py").write_text(RUNS)
    write_json(tmp_path / "runs.json", [flags(one) for one in sharded])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_cli(*launch, tmp_path / "runs.py", tmp_path / "runs.json", path=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]

    start = weights(config().model)
    for r, one in ones.items():
        want = weights(one.output_dir)
        assert max(float((want[n] - start[n]).abs().max()) for n in want) > 1e-3  # it has moved
        again = train(config(lora_r=r, **common, **behind_step_2_of(f"two_{r}")))
        assert again.steps == one.steps == 4
        for name in (f"two_{r}", f"from_one_{r}", f"from_two_{r}"):
            got = weights(tmp_path / name)
            assert got.keys() == want.keys()
            assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5, name
            assert_same_log(tmp_path / name, one.output_dir)
        for name in (f"two_{r}", f"from_one_{r}"):
            assert json.loads((tmp_path / name / "manifest.json").read_text())["ranks"] == 2


def test_sharding_needs_several_processes(config):
    with pytest.raises(IpvrmError, match="over several processes"):
        train(config(fsdp=True))


WIDE = 32_000  # a vocabulary beside which everything else in the run below is small


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model's tokenizer under a head of 32,000 tokens (its unused ids never occur)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide"
    config = AutoConfig.from_pretrained(tiny_folder, vocab_size=WIDE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True], ids=["as is", "full logits"])
def test_no_logits_in_a_training_run(config, wide_folder, rollouts, tokenizer, peak_of, monkeypatch, fault):
    """Reference pass, update and saving stay far below one (N_response, V) tensor; full logits do not."""
    answers = [
        json.loads(line)["conversation"][-1]["content"] for line in Path(rollouts).read_text().splitlines()
    ]
    logits = 4 * WIDE * sum(len(ids) for ids in tokenizer(answers).input_ids)  # bytes of (N_response, V)
    if fault:
        monkeypatch.setattr("ipvrm.models.causal_lm.response_logprobs", full_logits)
    one_batch = dict(max_steps=1, global_batch_size=44, per_device_train_batch_size=44)
    peak, _ = peak_of(lambda: train(config(model=str(wide_folder), **one_batch)))
    assert (peak < 0.5 * logits) == (not fault), f"{peak / 2**20:.0f} MiB, logits {logits / 2**20:.0f} MiB"


def full_logits(model, batch, temperature=1.0):
    """What the op replaces."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
    flat = logits.flatten(0, 1).index_select(0, batch.positions).log_softmax(-1)
    return flat.gather(1, batch.token_ids[:, None])[:, 0]


def impossible(monkeypatch, only):
    """The first response token of each row that `only` (module) holds for has no probability."""
    forward = train_rm.ResponseLogprobs.forward

    def patched(self, batch, temperature=1.0):
        logprobs = forward(self, batch, temperature).clone()
        if only(self):
            logprobs[batch.cu_seqlens[:-1][batch.outcome == 1].long()] = -torch.inf
        return logprobs

    monkeypatch.setattr(train_rm.ResponseLogprobs, "forward", patched)


def first_right_row(rollouts):
    rows = [json.loads(line) for line in Path(rollouts).read_text().splitlines()]
    return next(number for number, row in enumerate(rows, 1) if row["label"] == 1)


def test_a_token_that_the_reference_rules_out_is_an_error_with_its_row(config, rollouts, monkeypatch):
    """Its log-ratio is +inf, of which a right response makes a loss of 0."""
    impossible(monkeypatch, lambda module: True)
    row = first_right_row(rollouts)
    with pytest.raises(
        IpvrmError, match=rf"reference .*:{row}: .* response token 1 of \d+ \(id \d+\) is -inf"
    ):
        train(config())
    assert not (Path(config().output_dir) / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("validation", [False, True])
def test_a_token_that_the_model_rules_out_is_an_error_with_its_row(config, rollouts, monkeypatch, validation):
    """With labels the other way round the log-ratio of -inf would be a loss of 0."""
    calls = []

    def trained(module):  # the reference comes first: 44 rows one at a time
        calls.append(module)
        return len(calls) > (88 if validation else 44)

    impossible(monkeypatch, trained)
    changes = {"eval_data": str(rollouts)} if validation else {}
    reason = "validation loss nan: " if validation else r"update 1: summed loss nan, .* \("
    with pytest.raises(
        IpvrmError, match=rf"{reason}.*rollouts.*:\d+: the log-probability of response token 1"
    ):
        train(config(per_device_train_batch_size=1, **changes))
