"""The demo's base model: a character tokenizer, a small Qwen3 trained on noisy chains, and sampling from it.

Everything is made on the spot. A solution is the assistant's turn of the chat template, ended by `<|end|>`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from ipvrm.demo.arithmetic import MAX_STEPS, MIN_STEPS, Problem, make_problem, noisy_solution
from ipvrm.rollouts.answers import response_text
from ipvrm.rollouts.engine import cut

CHARACTERS = "0123456789+-=; "
SPECIAL = {
    "pad": "<|pad|>",
    "unk": "<|unk|>",
    "end": "<|end|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% else %}<|assistant|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NOISE = 0.08
MUON_RATE, ADAMW_RATE = 4e-3, 2e-3
LEARNT = 0.14  # nats per character; the noise alone is worth about 0.05
LEARNT_OVER = 25  # updates
MAX_NEW_TOKENS = 72  # a solution of six steps has 54


def make_tokenizer() -> Any:
    """A fast tokenizer with one token per character, offsets and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL["pad"],
        unk_token=SPECIAL["unk"],
        eos_token=SPECIAL["end"],
        additional_special_tokens=[SPECIAL["user"], SPECIAL["assistant"]],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any, hidden_size: int, num_layers: int, seed: int) -> Any:
    """A randomly initialised Qwen3 with tied embeddings, fp32."""
    from ipvrm.models.tiny_model import TinyModelConfig, random_qwen3

    config = TinyModelConfig(
        output_dir="",
        texts=(),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        seed=seed,
    )
    return random_qwen3(tokenizer, config)


def prompt_text(problem: Problem) -> str:
    """What the model reads before its own first token."""
    return f"{SPECIAL['user']}{problem.text}{SPECIAL['assistant']}"


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal, for (n, m) matrices (arXiv 2502.16982).

    `torch.optim.Muon` does the same in bf16, which processors without bf16 instructions are slow at: there it
    takes two thirds of this training. This one is in fp32. Three Newton-Schulz steps; the update has the root
    mean square of AdamW's, 0.2.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(3):
                    gram = x @ x.T
                    x = torch.addmm(
                        x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
                    )
                p.add_(x.T if tall else x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def train_base(
    model: Any,
    tokenizer: Any,
    *,
    max_steps: int,
    batch_size: int,
    multiple_of: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[int, float]:
    """Trains on batches of fresh noisy chains; cross-entropy on the solution's tokens only.

    Arithmetic is learnt suddenly, and when that happens depends on the seed. So the learning rate stays up
    until the loss has fallen below `LEARNT`, or until no more of `max_steps` is left than its decay takes;
    then it falls to 0 over a fifth of `max_steps`. Muon for the matrices, AdamW for the embedding and the
    norms: after 400 updates of 32 chains the loss was 0.27, with AdamW alone 0.35.

    Args:
        max_steps: most updates.
        multiple_of: of the numbers added and subtracted.
        on_step: called after each update with its number (from 1) and its loss (nats per token).

    Returns:
        (updates made, mean loss of the last tenth of them).
    """
    rng = Random(seed)
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    warmup, decay = max_steps // 20 + 1, max_steps // 5 + 1
    decay_from: int | None = None
    threshold = LEARNT / len(tokenizer("0", add_special_tokens=False)["input_ids"])  # nats per token
    pad = tokenizer.pad_token_id
    losses: list[float] = []
    model.train()
    for step in range(1, max_steps + 1):
        recent = losses[-LEARNT_OVER:]
        learnt = len(recent) == LEARNT_OVER and sum(recent) / len(recent) < threshold
        if decay_from is None and (learnt or step > max_steps - decay):
            decay_from = step
        factor = step / warmup if decay_from is None else 1 - (step - decay_from) / decay
        if factor <= 0:
            break
        prompts, texts = [], []
        num_steps = rng.randint(MIN_STEPS, MAX_STEPS)  # one length per batch, so next to no padding
        for _ in range(batch_size):
            problem = make_problem(rng, num_steps, num_steps, multiple_of)
            prompts.append(prompt_text(problem))
            texts.append(f"{prompts[-1]}{noisy_solution(problem, NOISE, rng)}{SPECIAL['end']}")
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompt_lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        longest = max(map(len, rows))
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in rows])  # (B, T)
        labels = torch.tensor(
            [
                [-100] * p + ids[p:] + [-100] * (longest - len(ids))
                for ids, p in zip(rows, prompt_lengths, strict=True)
            ]
        )
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss  # right padding: causal
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, factor)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return len(losses), sum(last) / len(last)


def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    per_problem: int,
    seed: int,
    batch_size: int = 512,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[list[str | None]]:
    """Responses at temperature 1, by problem; None for one that did not end within `MAX_NEW_TOKENS`.

    Problems with equally long prompts are sampled together, so that no batch needs padding on the left. The
    engine of `ipvrm.rollouts` would do it too, but draws other random numbers: every committed result of the
    demo would change.

    Args:
        on_batch: called with the number of responses each batch added.
    """
    torch.manual_seed(seed)
    responses: list[list[str | None]] = [[] for _ in problems]
    end = tokenizer.eos_token_id
    for indices in _equal_length_batches(problems, max(1, batch_size // per_problem)):
        encoded = tokenizer([prompt_text(problems[i]) for i in indices], add_special_tokens=False)
        prompts = torch.tensor(encoded["input_ids"])  # (P, T)
        with torch.no_grad():
            output = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=per_problem,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=end,
            )
        for row, ids in enumerate(output[:, prompts.shape[1] :].tolist()):  # (P * n, new)
            text, ended = response_text(cut(ids, {end}), {end}, tokenizer)
            responses[indices[row // per_problem]].append(text if ended else None)
        on_batch(len(output))
    return responses


def _equal_length_batches(problems: Sequence[Problem], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, problem in enumerate(problems):
        by_length.setdefault(len(problem.text), []).append(i)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
