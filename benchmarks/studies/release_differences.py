r"""How large the differences are between the preset `release` and what of the released code no preset has.

    python -m benchmarks.studies.release_differences --tokenizer Qwen3 --model SmolLM2-135M --data FOLDER

FOLDER holds `rm/qwen3_0.6b_pointwise.parquet` and `processbench/*.json` of the release; --tokenizer is a
folder with a Qwen3 tokenizer, --model one with any small causal LM. What can be known without the release's
weights is computed here and written to benchmarks/results/release_differences.json, which the table of
ipvrm/README.md is compared with:

    offline_gradient   no difference: the gradient of the offline preset at the log-ratios of the golden files
                       against the released loss at the released micro-batch of 1; and of the mean pooled over
                       all tokens, which the preset is not
    value_heads        the first gradient at a value head of 0 by the states before the tokens of a pair's
                       responses, from which the released head learns, against the states after; and how far
                       the values of that head, read at the states after, are from those at the states before
    selected           why the filling of short batches is not measured: the prompts of the released rollouts
                       were selected, all of them are mixed
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
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.suite import machine
from ipvrm.data.batches import collate
from ipvrm.data.chat import Chat
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row, read_rows
from ipvrm.data.steps import render_steps, step_ends, step_of_token
from ipvrm.evaluate.processbench import read_items
from ipvrm.evaluate.thresholds import sweep
from ipvrm.losses.objectives import ipvrm_loss
from ipvrm.models.causal_lm import hidden_states, load_model
from ipvrm.rollouts.verify import load_verifier
from ipvrm.run_folder import write_json
from ipvrm.training.reward_config import RewardConfig, objective_of, resolve
from ipvrm_kernels import pack

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "release_differences.json"
GOLDEN = ROOT / "tests" / "golden"
WITHOUT_THINKING = {"enable_thinking": False}
MAX_LENGTH = 2560
MICRO, MINI, DRAWS = 8, 2048, 50
ACCUMULATION, WARMUP = 8, 0.03
PAIRS = 12
States = tuple[Tensor, Tensor]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile, mean."""
    low, median, high = np.percentile(np.asarray(values, float), (5, 50, 95))
    return {"median": float(median), "p5": float(low), "p95": float(high), "mean": float(np.mean(values))}


def released_offline_loss(
    log_ratio: Tensor, mask: Tensor, outcome: Tensor, beta: float = 10.0, margin: float = 0.0
) -> Tensor:
    """`compute_ipvrm_loss` of the released train_rm_with_accelerate.py on a padded micro-batch (b, T): BCE of
    V_t / t against the outcome, mean over the tokens of all its rows."""
    mask = mask.float()
    mean_value = beta * (log_ratio * mask).cumsum(-1) / mask.cumsum(-1).clamp_min(1.0)
    label = outcome.float()[:, None]
    right, wrong = (torch.nn.functional.logsigmoid(sign * mean_value - margin) for sign in (1, -1))
    return (-(label * right + (1 - label) * wrong) * mask).sum() / mask.sum()


def released_offline_gradient(log_ratio: Tensor, mask: Tensor, outcome: Tensor, rows: int) -> Tensor:
    """(b, T) of an update that accumulates over micro-batches of `rows` rows; accelerate divides by their
    number."""
    log_ratio = log_ratio.clone().requires_grad_()
    parts = range(0, len(log_ratio), rows)
    total = torch.zeros(())
    for first in parts:
        own = slice(first, first + rows)
        total = total + released_offline_loss(log_ratio[own], mask[own], outcome[own]) / len(parts)
    (gradient,) = torch.autograd.grad(total, log_ratio)
    return gradient


def preset_offline_gradient(log_ratio: Tensor, mask: Tensor, outcome: Tensor, rows: int) -> Tensor:
    """(N,) of an update of `--preset release`, packed, whose micro-batches hold `rows` responses."""
    packed, cu_seqlens = pack(log_ratio, mask)
    packed.requires_grad_()
    objective = objective_of(resolve(RewardConfig("m", "d", "o", preset="release")))
    lengths, total = cu_seqlens.diff().tolist(), torch.zeros(())
    for first in range(0, len(lengths), rows):
        edges = cu_seqlens[first : first + rows + 1]
        part, of_part = packed[edges[0] : edges[-1]], outcome[first : first + rows]
        total = total + objective(part, edges - edges[0], of_part, objective.denominator(lengths))[0]
    (gradient,) = torch.autograd.grad(total, packed)
    return gradient


def offline_gradient(files: Sequence[Path]) -> dict[str, Any]:
    """Largest relative distances over the golden files and several micro-batches of ours."""
    equal, pooled = [], []
    for path in files:
        with np.load(path) as file:
            log_ratio, mask, outcome = (
                torch.from_numpy(np.asarray(file[name])) for name in ("log_ratio", "mask", "outcome")
            )
        padded = (released_offline_gradient(log_ratio, mask, outcome, rows) for rows in (1, len(mask)))
        want, all_rows = (pack(gradient, mask)[0] for gradient in padded)
        for rows in (1, 3, len(mask)):
            got = preset_offline_gradient(log_ratio, mask, outcome, rows)
            equal.append(float((got - want).norm() / want.norm()))
        pooled.append(float((all_rows - want).norm() / want.norm()))
    return {"files": len(pooled), "distance": max(equal), "least_distance_of_pooled": min(pooled)}


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


def shortest_pairs(responses: Sequence[Response]) -> list[tuple[Response, Response]]:
    """The shortest right and the shortest wrong response to a prompt, of the PAIRS prompts with the least
    tokens."""
    best: dict[tuple[int, ...], dict[int, Response]] = {}
    for response in responses:
        of_prompt = best.setdefault(tuple(response.input_ids[: response.prompt_length]), {})
        assert response.label is not None
        if response.label not in of_prompt or response.length < of_prompt[response.label].length:
            of_prompt[response.label] = response
    pairs = [(found[1], found[0]) for found in best.values() if len(found) == 2]
    return sorted(pairs, key=lambda pair: sum(len(r.input_ids) for r in pair))[:PAIRS]


@torch.no_grad()
def states(model: torch.nn.Module, response: Response) -> States:
    """(T, D) each: before every token of a response, and after it."""
    batch = collate([response])
    positions = torch.cat([batch.positions, batch.positions[-1:] + 1])  # (T + 1,)
    found = hidden_states(model, batch, positions).double()
    return found[:-1], found[1:]


def value_heads(pairs: Sequence[tuple[States, States]]) -> dict[str, Any]:
    """Of the states before and after the tokens of right and wrong. Q-RM's loss on the mean values of a pair
    has at a head of 0 a gradient along the difference of the mean states."""
    gradients = [[right[i].mean(0) - wrong[i].mean(0) for i in (0, 1)] for right, wrong in pairs]
    learnt = torch.stack([before for before, _ in gradients]).sum(0)  # (D,) by one step from 0
    before, after = (torch.cat([response[i] for pair in pairs for response in pair]) @ learnt for i in (0, 1))
    return {
        "pairs": len(pairs),
        "tokens": len(before),
        "gradient_distance": quantiles([float((b - a).norm() / a.norm()) for b, a in gradients]),
        "value_distance": float((after - before).std() / before.std()),
        "value_correlation": float(torch.corrcoef(torch.stack([before, after]))[0, 1]),
    }


def selected(rows: Sequence[Row]) -> dict[str, int]:
    """Prompts of the released rollouts, and those with right and wrong responses in equal number."""
    labels: dict[str, list[int]] = {}
    for row in rows:
        assert row.label is not None
        labels.setdefault(json.dumps(row.prompt, default=dict), []).append(row.label)
    balanced = sum(2 * sum(of_prompt) == len(of_prompt) for of_prompt in labels.values())
    return {"prompts": len(labels), "half_right": balanced}


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
    parser.add_argument("--model", required=True, help="folder of a small causal LM, for value_heads")
    parser.add_argument("--out", default=RESULTS, type=Path, help="JSON file to write")
    parser.add_argument(
        "--parts", nargs="+", help="these alone, into the file of an earlier run, each with its own machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = machine.describe()
    chat = Chat(AutoTokenizer.from_pretrained(arguments.tokenizer), WITHOUT_THINKING)
    rows, _ = read_rows(str(arguments.data / "rm" / "qwen3_0.6b_pointwise.parquet"))

    @cache
    def ours() -> list[Response]:
        return tokenize(rows, chat, max_length=None).responses

    @cache
    def pairs() -> list[tuple[Response, list[int], int]]:
        by_source = {row.source: row for row in rows}
        return [(r, *released_response(chat, by_source[r.source])) for r in ours()]

    def states_of_pairs() -> list[tuple[States, States]]:
        model = load_model(arguments.model, torch.float32, "cpu")
        own = tokenize(rows, Chat(AutoTokenizer.from_pretrained(arguments.model)), max_length=None).responses
        return [(states(model, right), states(model, wrong)) for right, wrong in shortest_pairs(own)]

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "think_tokens": lambda: think_tokens(pairs()),
        "schedule": schedule,
        "over_long": lambda: over_long([(len(whole), len(whole) - start) for _, whole, start in pairs()]),
        "micro_batches": lambda: micro_batches([r.length for r in ours()], [r.label for r in ours()]),
        "step_boundaries": lambda: step_boundaries(
            chat, sorted((arguments.data / "processbench").glob("*.json"))
        ),
        "thresholds": lambda: thresholds(sorted(GOLDEN.glob("processbench_*.json"))),
        "time_outs": lambda: time_outs(rows),
        "offline_gradient": lambda: offline_gradient(sorted(GOLDEN.glob("release_*.npz"))),
        "value_heads": lambda: value_heads(states_of_pairs()),
        "selected": lambda: selected(rows),
    }
    if arguments.parts:
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        found = earlier | {name: {"machine": header} | parts[name]() for name in arguments.parts}
    else:
        found = {"machine": header} | {name: part() for name, part in parts.items()}
    write_json(arguments.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
