"""What drawing each response from its own seed costs: the engine against `generate` sampling by itself.

Same model, prompts and number of tokens, no stop token, interleaved rounds, CPU seconds of the process.

    python -m benchmarks.studies.rollout_engine --model tiny --data policy_eval.parquet --out results.json
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.suite import machine
from ipvrm.data.chat import encode_prompt
from ipvrm.data.rows import read_prompts
from ipvrm.models.causal_lm import load_model, load_tokenizer
from ipvrm.rollouts.engine import Sampling, TransformersEngine, _Draw
from ipvrm.run_folder import write_json

PROMPTS, SAMPLES, NEW_TOKENS, VOCABULARY = 16, 4, 64, 151_936


def cpu_seconds(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Least and median CPU seconds of each, over interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.process_time()
            run()
            found[name].append(time.process_time() - started)
    return {name: {"min": min(v), "median": sorted(v)[len(v) // 2]} for name, v in found.items()}


@torch.no_grad()
def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="prompts")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    prompts, _ = read_prompts(arguments.data, limit=PROMPTS)
    ids = [encode_prompt(p.prompt, tokenizer) for p in prompts for _ in range(SAMPLES)]
    B, width = len(ids), max(map(len, ids))
    unused = len(tokenizer) - 1  # as a stop token: all but never drawn
    engine = TransformersEngine(model, [unused], B)
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])  # (B, T)
    mask = torch.arange(width) >= width - torch.tensor([len(row) for row in ids])[:, None]  # (B, T)

    def library(**sampling: Any) -> Any:
        settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": unused} | sampling
        return model.generate(padded, attention_mask=mask.long(), **settings)  # type: ignore[operator]

    generated = cpu_seconds(
        {
            "engine, temperature 1": lambda: engine(ids, Sampling(NEW_TOKENS), list(range(B))),
            "generate, do_sample": lambda: library(do_sample=True, top_k=0, top_p=1.0, temperature=1.0),
            "generate, greedy": lambda: library(do_sample=False),
        },
        arguments.rounds,
    )
    scores, before = torch.randn(B, VOCABULARY), torch.zeros(B, 1, dtype=torch.long)
    draw = _Draw(list(range(B)), 1, 1, torch.device("cpu"))
    drawn = cpu_seconds(
        {
            "engine's draw and argmax": lambda: draw(before, scores).argmax(-1),
            "softmax and multinomial": lambda: torch.multinomial(scores.softmax(-1), 1),
        },
        arguments.rounds,
    )
    sizes = {"responses": B, "longest_prompt": width, "new_tokens": NEW_TOKENS, "vocabulary": len(tokenizer)}
    write_json(
        arguments.out,
        {
            "generate": {**sizes, "cpu_seconds": generated},
            "one_token": {"responses": B, "vocabulary": VOCABULARY, "cpu_seconds": drawn},
            "machine": machine.describe(),
        },
    )
    for name, seconds in (generated | drawn).items():
        print(f"{name:<26}min {seconds['min']:.3f} s   median {seconds['median']:.3f} s")


if __name__ == "__main__":
    main()
