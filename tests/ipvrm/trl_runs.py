"""Tiny runs of TRL's GRPOTrainer and of ours, for test_trl.py and its processes."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer

from ipvrm.integrations.trl import DistRLConfig, DistRLTrainer
from ipvrm.models.causal_lm import load_model, load_tokenizer

T = 8


def digits_reward(completions, answer, **_):
    """1 where the characters of the text add up to the answer modulo 3: random models hit it a third of the
    time."""
    return [float(sum(map(ord, text)) % 3 == a % 3) for text, a in zip(completions, answer, strict=True)]


def questions():
    return Dataset.from_list([{"prompt": f"What is {i} + {i % 5}?", "answer": i} for i in range(16)])


def settings(kind, **more):
    base = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=T, max_steps=3, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    return kind(**base | more)


def trainer(home, kind, config, policy="policy", **more):
    """A trainer on the policy in `home`; ours on its reward model, unless both of its weights are 0."""
    tokenizer = load_tokenizer(home / policy)
    tokenizer.padding_side = "left"
    if isinstance(config, DistRLConfig) and (config.alpha or config.gae_coef):
        more.setdefault("reward_model", home / "rm")
    torch.manual_seed(0)
    named = dict(
        model=load_model(home / policy), reward_funcs=digits_reward, args=config, train_dataset=questions(),
        processing_class=tokenizer,
    )  # fmt: skip
    return kind(**named | more)


def trained(home, kind, config, **more):
    """(trainable weights after the run, the trainer)."""
    run = trainer(home, kind, config, **more)
    run.train()
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}, run


def rollout(prompts, run):
    """The same completions whatever the number of ranks."""
    first, completions = run.accelerator.process_index * len(prompts), []
    for number in range(first, first + len(prompts)):
        g = torch.Generator().manual_seed(1000 * run.state.global_step + number)
        size = 3 + int(torch.randint(0, T - 3, (), generator=g))
        completions.append(torch.randint(10, 200, (size,), generator=g).tolist())
    ids = [run.processing_class(p)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def on_all_ranks(home):
    """Trained weights of runs whose groups of 8 lie on all ranks: our policy and online reward model; the
    stock trainer's policy, and ours with alpha and GAE's coefficient 0."""
    world = int(os.environ.get("WORLD_SIZE", "1"))

    def run(kind, config, **more):
        backend = "gloo" if world > 1 else None
        config = settings(
            config, per_device_train_batch_size=8 // world, num_generations=8, max_steps=2,
            ddp_backend=backend, **more,
        )  # fmt: skip
        weights, run = trained(home, kind, config, rollout_func=rollout)
        return {name.removeprefix("module."): w for name, w in weights.items()}, run

    policy, online = run(DistRLTrainer, DistRLConfig, rm_update="before", rm_learning_rate=1e-3)
    return {
        "world": online.accelerator.num_processes,
        "policy": policy,
        "reward model": {name: p.detach() for name, p in online.prefix_rewards.model.named_parameters()},
        "stock": run(GRPOTrainer, GRPOConfig)[0],
        "without weights": run(DistRLTrainer, DistRLConfig, alpha=0.0, gae_coef=0.0)[0],
    }


def take_fsdp_on_a_cpu():
    """accelerate asks for a GPU before it takes FSDP, and runs DDP on a CPU without a word. Past that one
    check its code is the same; its `fsdp2_prepare_model` shards here too."""
    init = AcceleratorState.__init__

    def told(self, *positional, fsdp_plugin=None, **named):
        init(self, *positional, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = told


def in_shards(home):
    """Whole trained weights of our policy, the weights that were saved, and what of it is sharded."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = settings(
        DistRLConfig, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
        num_generations=8, max_steps=2, ddp_backend="gloo" if world > 1 else None,
    )  # fmt: skip
    weights, run = trained(home, DistRLTrainer, config, rollout_func=rollout)
    run.save_model(config.output_dir)
    if sharded := all(isinstance(p, DTensor) for p in weights.values()):
        weights = {name: w.full_tensor() for name, w in weights.items()}
    found = {
        "sharded": sharded,
        "units": [name for name, module in run.model.named_modules() if isinstance(module, FSDPModule)],
        "policy": weights,
    }
    if run.accelerator.is_main_process:
        found["saved"] = {n: p.detach() for n, p in load_model(config.output_dir).named_parameters()}
    return found


def main(home, out, what):
    """One rank; the main one writes what it finds to `out`."""
    torch.set_num_threads(1)
    if what == "in_shards":
        take_fsdp_on_a_cpu()
    found = {"on_all_ranks": on_all_ranks, "in_shards": in_shards}[what](Path(home))
    if os.environ["RANK"] == "0":
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

__all__ = ["GRPOConfig", "GRPOTrainer"]
