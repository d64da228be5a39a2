"""Twenty updates of `DistRLTrainer` on the CPU, and the peak memory of one update beside TRL's own trainer.

A random Qwen3 of 0.1 M parameters answers sums; the reward is whether the characters of its answer add up to
the truth modulo 3, and the reward model, at first a neighbour of the policy, learns online. Nothing of it
says how well DistRL learns: it says that the trainer runs, and leaves a log to look at. Memory is of one
process each: what `_compute_loss` and its backward add to the resident memory, of 8 completions at a
vocabulary of 32,000.

    python -m benchmarks.studies.trl_updates --out results/trl_updates.json
    python -m benchmarks.studies.trl_updates --memory all --out results/memory.json
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import machine
from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model, template_hash
from ipvrm.models.reward_model import RewardModelInfo, reference_entries, write_info
from ipvrm.models.tiny_model import TinyModelConfig, random_qwen3, train_tokenizer
from ipvrm.run_folder import write_json

UPDATES, WIDE, LENGTH, ROWS = 20, 32_000, 128, 8
KINDS = ("full logits", "stock", "ours")
KEPT = ("loss", "reward", "grad_norm", "entropy", "kl", "completions/mean_length", "clip_ratio/region_mean")


def models(folder: Path, vocab_size: int | None = None) -> None:
    """`policy`, whose tokens differ in probability, and the reward model `rm` near it."""
    tokenizer = train_tokenizer((f"{a}+{b}={a + b};" for a in range(30) for b in range(30)), 400)
    shape = TinyModelConfig("", (), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = random_qwen3(tokenizer, shape)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    g = torch.Generator().manual_seed(5)
    for name, noise in (("policy", 0.3), ("rm", 0.05)):
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.add_(noise * torch.randn(p.shape, generator=g))
        save_model(model, folder / name)
        tokenizer.save_pretrained(folder / name)
    entries = reference_entries(folder / "policy", folder / "rm")
    info = RewardModelInfo("ipvrm", 2.0, 1.0, **entries, template_hash=template_hash(tokenizer), versions={})
    write_info(folder / "rm", info)


def modulo_reward(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """1 where the characters of the text add up to the answer modulo 3."""
    return [float(sum(map(ord, text)) % 3 == a % 3) for text, a in zip(completions, answer, strict=True)]


def trainer(kind: str, folder: Path, mixin: type | None = None, **more: Any) -> Any:
    """TRL's trainer (`stock`), or ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from ipvrm.integrations.trl import DistRLConfig, DistRLTrainer

    base, config = (GRPOTrainer, GRPOConfig) if kind == "stock" else (DistRLTrainer, DistRLConfig)
    settings = dict(
        output_dir=str(folder / "run"), per_device_train_batch_size=ROWS, num_generations=4,
        learning_rate=1e-3,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    named = {} if kind == "stock" else {"reward_model": folder / "rm"}
    tokenizer = load_tokenizer(folder / "policy")
    tokenizer.padding_side = "left"
    rollout = more.pop("rollout_func", None)
    sums = ((a % 7, a % 5) for a in range(32))
    data = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in sums])
    torch.manual_seed(0)
    made = base if mixin is None else type("Metered", (mixin, base), {})
    return made(
        model=load_model(folder / "policy"), reward_funcs=modulo_reward, args=config(**settings | more),
        train_dataset=data, processing_class=tokenizer, rollout_func=rollout, **named,
    )  # fmt: skip


def status(field: str) -> int:
    """Bytes of this process, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Meter:
    """Peak resident bytes that the loss and its backward add."""

    before, added = 0, 0

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        Meter.before = status("VmRSS")
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    def training_step(self, *arguments: Any) -> Any:
        result = super().training_step(*arguments)  # type: ignore[misc]
        Meter.added = status("VmHWM") - Meter.before
        return result


def memory(kind: str) -> int:
    """Of the second update of `stock`, `ours` or `full logits` (the same rows by the model's own forward)."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder, WIDE)
        if kind == "full logits":
            model, ids = load_model(folder / "policy"), torch.randint(300, (ROWS, LENGTH + 4))
            for _ in range(2):
                Path("/proc/self/clear_refs").write_text("5")
                before = status("VmRSS")
                log_p = model(ids).logits[:, :-1].log_softmax(-1)
                log_p.gather(2, ids[:, 1:, None]).sum().backward()
                Meter.added = status("VmHWM") - before
                del log_p
            return Meter.added

        def rollout(prompts: list[str], run: Any) -> dict[str, Any]:
            g = torch.Generator().manual_seed(run.state.global_step)
            ids = torch.randint(3, 300, (len(prompts), LENGTH), generator=g).tolist()
            tokens = [run.processing_class(p)["input_ids"] for p in prompts]
            return {"prompt_ids": tokens, "completion_ids": ids, "logprobs": None}

        trainer(kind, folder, Meter, max_steps=2, max_completion_length=LENGTH, rollout_func=rollout).train()
    return Meter.added


def updates() -> list[dict[str, Any]]:
    """The log of twenty updates with the reward model learning before it scores."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder)
        run = trainer("ours", folder, max_steps=UPDATES, max_completion_length=16, rm_update="before",
                      rm_learning_rate=1e-3, temperature=1.0)  # fmt: skip
        run.train()
        logs = [line for line in run.state.log_history if "loss" in line]
    return [
        {"step": i, **{k: v for k, v in line.items() if k in KEPT or k.startswith("distrl/")}}
        for i, line in enumerate(logs, 1)
    ]


def memory_of_each() -> dict[str, int]:
    """`memory` of all kinds, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.studies.trl_updates", "--memory"]
    return {
        kind: int(subprocess.run([*command, kind], check=True, stdout=subprocess.PIPE).stdout.split()[-1])
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--memory", choices=(*KINDS, "all"), help="peak of one update; one kind is printed")
    arguments = parser.parse_args()
    if arguments.memory not in (None, "all"):
        print(memory(arguments.memory))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    import transformers
    import trl

    asked = "--memory all " if arguments.memory else ""
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.studies.trl_updates {asked}--out $OUT",
        "machine": machine.describe(), "trl": trl.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    if arguments.memory:
        found |= {"rows": ROWS, "new_tokens": LENGTH, "vocab_size": WIDE, "peak_bytes": memory_of_each()}
    else:
        found["log"] = updates()
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
