"""The examples of ipvrm/integrations/README.md in their order, in a process group of one."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from served import FakeServer

README = Path(__file__).resolve().parents[2] / "ipvrm" / "integrations" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def run(names, numbers):
    for number in numbers:
        exec(compile(BLOCKS[number], f"{README.name}, example {number + 1}", "exec"), names)
    return names


@pytest.mark.slow
def test_head_and_shards():
    try:
        ran = run({}, (0, 1, 2))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert ran["out"].logits is None and ran["out"].candidate_logprobs.shape[:2] == ran[
        "out"
    ].logprobs.shape == (2, 11)
    assert bool(ran["hidden"].grad.any()) and bool(ran["shard"].grad.any())
    assert ran["weight"].shape == (320, 32) and ran["bias"] is None


@pytest.mark.slow
def test_trl(tiny_folder, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'ipvrm[trl]'")
    from datasets import Dataset

    from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model, template_hash
    from ipvrm.models.reward_model import RewardModelInfo, reference_entries, write_info

    rm, tokenizer = tmp_path / "rm", load_tokenizer(tiny_folder)
    save_model(load_model(tiny_folder), rm)
    tokenizer.save_pretrained(rm)
    entries = reference_entries(tiny_folder, rm)
    write_info(
        rm, RewardModelInfo("ipvrm", 1.0, 1.0, **entries, template_hash=template_hash(tokenizer), versions={})
    )
    steps = {"prompt": "What is 1 + 1?", "completions": ["1 and 1", "Answer: 2"], "labels": [True, True]}
    names = {
        "policy": str(tiny_folder), "rm": rm, "output_dir": str(tmp_path / "out"),
        "dataset": Dataset.from_list([{"prompt": f"What is {i} + 1?",
        "answer": str(i + 1)} for i in range(4)]),
        "stepwise": [steps, steps | {"completions": ["1 and 1", "Answer: 3"], "labels": [True, False]}],
    }  # fmt: skip
    assert run(names, (3,))["trainer"].state.global_step == 1
    scores = run(names, (4,))["scores"]
    assert scores.step_scores.shape == (2,)
    ran = run(names, (5,))
    assert (
        ran["trainer"].state.global_step == 1
        and ran["trainer"].prefix_rewards.info.objective == "implicit_prm"
    )
    assert ran["trainer"].prefix_rewards.behaviour  # it has learnt


def test_servers_and_verl(tiny_folder):
    from ipvrm.models.causal_lm import load_tokenizer

    tokenizer = load_tokenizer(tiny_folder)
    with FakeServer(tiny_folder, tokenizer) as server:
        ran = run({"address": server.url, "policy": str(tiny_folder), "tokenizer": tokenizer}, (6,))
    assert 1 <= len(ran["sampled"]) <= 8
    found = run({"torch": torch}, (7,))["found"]
    assert len(BLOCKS) == 8 and found.shape == (2, 6) and not found[1, 4:].any()
    assert found[0].unique().numel() > 3
