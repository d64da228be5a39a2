r"""How large the differences are between the preset `release` and what of the released code no preset has.

    python -m benchmarks.studies.release_differences --tokenizer Qwen3 --data FOLDER

FOLDER holds `rm/qwen3_0.6b_pointwise.parquet` and `processbench/*.json` of the release; --tokenizer is a
folder with a Qwen3 tokenizer. What can be known without weights is computed here and written to
benchmarks/results/release_differences.json, which the table of ipvrm/README.md is compared with:

    think_tokens       response tokens of a row as the released code counts them and as the policy samples
                       them; by how much the gradient at the log-ratios of the shared tokens differs where the
                       model is still the reference, and which part of it falls on the other tokens
    schedule           the learning rate of the released loop, whose scheduler steps once per micro-batch
    over_long          rows that the released code cuts at 2,560 tokens, from the left
    micro_batches      gradient of token means over micro-batches of 8, averaged, against that of the pooled
                       mean, at the log-probs of 2,048 responses
    step_boundaries    tokens by which the released step ends lie behind the ends of the steps
    thresholds         best F1 on the released grid against the exact best, on the golden files
    time_outs          how many of the released rollouts take the verifier longer than the released second
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.suite import machine
from ipvrm.data.chat import Chat
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row, read_rows
from ipvrm.data.steps import render_steps, step_ends, step_of_token
from ipvrm.evaluate.processbench import read_items
from ipvrm.evaluate.thresholds import sweep
from ipvrm.losses.objectives import ipvrm_loss
from ipvrm.rollouts.verify import load_verifier
from ipvrm.run_folder import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "release_differences.json"
GOLDEN = ROOT / "tests" / "golden"
WITHOUT_THINKING = {"enable_thinking": False}
MAX_LENGTH = 2560
MICRO, MINI, DRAWS = 8, 2048, 50
ACCUMULATION, WARMUP = 8, 0.03


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile, mean."""
    low, median, high = np.percentile(np.asarray(values, float), (5, 50, 95))
    return {"median": float(median), "p5": float(low), "p95": float(high), "mean": float(np.mean(values))}


def released_response(chat: Chat, row: Row) -> tuple[list[int], int]:
    """Ids of the whole conversation as the template writes it, and where the released response starts in it:
    behind the prompt with the generation prompt, which it renders without the variables of the template."""
    tokenizer = chat.tokenizer
    prompt = [dict(m) for m in row.prompt] if not isinstance(row.prompt, str) else row.prompt
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [*prompt, {"role": "assistant", "content": row.response}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    start = tokenizer.apply_chat_template(
        prompt, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return list(whole), len(start)


def start_gradient(length: int, label: int) -> Tensor:
    """(length,) gradient of the offline loss of one response at its log-ratios where all of them are 0."""
    log_ratio = torch.zeros(length, requires_grad=True)
    edges, outcome = torch.tensor([0, length], dtype=torch.int32), torch.tensor([float(label)])
    loss, _ = ipvrm_loss(log_ratio, edges, outcome, beta=10.0, margin=0.0)
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    return gradient


def think_tokens(pairs: Sequence[tuple[Response, list[int], int]]) -> dict[str, Any]:
    """Of (ours, released ids, start of the released response)."""
    front, back, shares, distances, norms = Counter[int](), Counter[int](), [], [], []
    for ours, whole, start in pairs:
        own = list(ours.input_ids[ours.prompt_length :])
        theirs = whole[start:]
        ahead = next(i for i in range(len(theirs)) if theirs[i : i + len(own)] == own)
        behind = len(theirs) - ahead - len(own)
        front[ahead] += 1
        back[behind] += 1
        shares.append((ahead + behind) / len(theirs))
        want, got = start_gradient(len(own), ours.label), start_gradient(len(theirs), ours.label)
        shared = got[ahead : ahead + len(own)]
        distances.append(float((shared - want).norm() / want.norm()))
        norms.append(float(1 - shared.square().sum() / got.square().sum()))
    return {
        "rows": len(pairs),
        "tokens_in_front": dict(front),
        "tokens_behind": dict(back),
        "share_of_tokens": quantiles(shares),
        "gradient_distance_on_shared_tokens": quantiles(distances),
        "share_of_squared_gradient_on_the_others": quantiles(norms),
    }


def schedule(updates: int = 1000) -> dict[str, Any]:
    """Learning rates over the run, of a peak of 1: once per update, and once per micro-batch of 8."""

    def cosine(step: float) -> float:
        warmup = WARMUP * updates
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))

    once = np.array([cosine(u) for u in range(updates)])
    often = np.array([cosine(ACCUMULATION * u) for u in range(updates)])
    return {
        "mean_distance": float(np.abs(often - once).mean() / once.mean()),
        "last": {"once_per_update": float(once[-1]), "once_per_micro_batch": float(often[-1])},
        "peaks": int((np.diff(np.sign(np.diff(often))) < 0).sum() + (often[-1] > often[-2])),
        "summed": float(often.sum() / once.sum()),
    }


def over_long(lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of (tokens, of which response) as the released code counts them."""
    return {
        "rows": len(lengths),
        "prompt_cut": sum(whole > MAX_LENGTH > response for whole, response in lengths),
        "prompt_lost": sum(response >= MAX_LENGTH for _, response in lengths),
        "longest": max(whole for whole, _ in lengths),
    }


def micro_batches(lengths: Sequence[int], labels: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Gradients at the log-probs are advantage / tokens; the distance depends on the lengths alone."""
    rng, of_length, sign = np.random.default_rng(seed), np.asarray(lengths), 2 * np.asarray(labels) - 1
    distances = []
    for _ in range(DRAWS):
        drawn = rng.choice(len(of_length), MINI)
        tokens = of_length[drawn].reshape(-1, MICRO)
        pooled = sign[drawn].reshape(-1, MICRO) / tokens.sum()
        averaged = sign[drawn].reshape(-1, MICRO) / tokens.sum(1, keepdims=True) / len(tokens)
        squared = (tokens * (averaged - pooled) ** 2).sum() / (tokens * pooled**2).sum()
        distances.append(float(np.sqrt(squared)))
    return {"minibatch": MINI, "micro_batch": MICRO, "gradient_distance": quantiles(distances)}


def step_boundaries(chat: Chat, files: Sequence[Path]) -> dict[str, Any]:
    """Of every step but the last of a solution, and of the last: the released end behind ours, in tokens."""
    inner, last = Counter[int](), Counter[int]()
    tokenizer = chat.tokenizer

    def encoded(problem: str, text: str, behind: str) -> int:
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": text}]
        written = tokenizer.apply_chat_template(messages, tokenize=False).strip() + behind
        return len(tokenizer(written, add_special_tokens=False)["input_ids"])

    for file in files:
        for item in read_items(file):
            text, ends = render_steps(item.steps)
            row = Row("x:1", item.problem, text)
            (ours,) = tokenize([row], chat, max_length=None, with_offsets=True).responses
            own = step_ends(step_of_token(ours.offsets or (), ends), len(ends)) + ours.prompt_length
            for number, end in enumerate(own.tolist(), 1):
                final = number == len(ends)
                so_far = render_steps(item.steps[:number])[0]
                released = encoded(item.problem, so_far, "" if final else "\n\n") - 1
                (last if final else inner)[released - end] += 1
    return {
        "solutions": sum(last.values()),
        "inner_steps": sum(inner.values()),
        "tokens_behind_inner": dict(sorted(inner.items())),
        "tokens_behind_last": dict(sorted(last.items())),
    }


def thresholds(files: Sequence[Path]) -> dict[str, Any]:
    """The released grid of 1,000 from -1 to 1 against every distinct score, on the golden files; of the two
    rules whose scores are plain sums: V at a step's end, and its difference across the step."""
    lost = []
    for path in files:
        stored = json.loads(path.read_text(encoding="utf-8"))
        labels = [item["label"] for item in stored["items"]]
        of_rule = {
            "sigmoid": [np.asarray(item["reward"]) for item in stored["items"]],
            "rewardsum_minus_sigmoid": [np.diff(item["reward"], prepend=0.0) for item in stored["items"]],
        }
        for rule, scores in of_rule.items():
            lost.append(100 * (sweep(scores, labels)[1].f1 - stored["expected"][rule]["f1"]))
    return {
        "item_sets": len(lost),
        "unreachable": float((np.linspace(-1, 1, 1000) <= 0).mean()),
        "f1_points_lost": {"mean": float(np.mean(lost)), "max": float(max(lost)), "min": float(min(lost))},
    }


def time_outs(rows: Sequence[Row]) -> dict[str, Any]:
    """CPU seconds that the verifier takes for each response with a box, against that box as ground truth."""
    verify, seconds = load_verifier("math"), []
    verify("\\boxed{1}", "1")  # imports
    for row in rows:
        at = row.response.rfind("\\boxed{")
        if at < 0:
            continue
        truth = row.response[at + 7 : row.response.find("}", at)]
        before = time.process_time()
        verify(row.response, truth)
        seconds.append(time.process_time() - before)
    return {
        "responses": len(seconds),
        "above_one_second": sum(s > 1 for s in seconds),
        "longest_seconds": max(seconds),
        "seconds": quantiles(seconds),
    }


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of the released data")
    parser.add_argument("--tokenizer", required=True, help="folder of a Qwen3 tokenizer")
    parser.add_argument("--out", default=RESULTS, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = machine.describe()
    chat = Chat(AutoTokenizer.from_pretrained(arguments.tokenizer), WITHOUT_THINKING)
    rows, _ = read_rows(str(arguments.data / "rm" / "qwen3_0.6b_pointwise.parquet"))
    ours = tokenize(rows, chat, max_length=None).responses
    by_source = {row.source: row for row in rows}
    pairs = [(r, *released_response(chat, by_source[r.source])) for r in ours]
    found = {
        "think_tokens": think_tokens(pairs),
        "schedule": schedule(),
        "over_long": over_long([(len(whole), len(whole) - start) for _, whole, start in pairs]),
        "micro_batches": micro_batches([r.length for r in ours], [r.label for r in ours]),
        "step_boundaries": step_boundaries(chat, sorted((arguments.data / "processbench").glob("*.json"))),
        "thresholds": thresholds(sorted(GOLDEN.glob("processbench_*.json"))),
        "time_outs": time_outs(rows),
    }
    write_json(arguments.out, {"machine": header, **found})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
