"""The demo's tokenizer, base model and sampling."""

from random import Random

import pytest
import torch

from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row
from ipvrm.demo import base_model
from ipvrm.demo.arithmetic import Problem, make_problems
from ipvrm.demo.base_model import (
    MAX_NEW_TOKENS,
    Muon,
    make_model,
    make_tokenizer,
    prompt_text,
    sample,
    train_base,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer, 32, 2, seed=0).eval()


def test_one_token_a_character_and_back(tokenizer):
    text = "12+34 =46; -7"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == text


def test_prompt_of_sampling_is_the_prompt_of_training_data(tokenizer):
    """What the base model continues must be what the reward models are trained on, token by token."""
    problem = Problem(47, (25, -13))
    response = tokenize([Row("a:1", problem.text, "47+25=72")], tokenizer, max_length=None).responses[0]
    prompt = tokenizer(prompt_text(problem), add_special_tokens=False)["input_ids"]
    assert list(response.input_ids[: response.prompt_length]) == prompt
    assert response.input_ids[-1] == tokenizer.eos_token_id and response.length == 9


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_solution_only(tokenizer, model):
    losses = []
    train_base(
        model,
        tokenizer,
        max_steps=40,
        batch_size=8,
        multiple_of=10,
        seed=0,
        on_step=lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses[0][1] == pytest.approx(torch.log(torch.tensor(20.0)).item(), abs=0.2)  # 20 tokens, random
    assert losses[-1][1] < 0.8 * losses[0][1]


@pytest.mark.parametrize(("learnt", "updates"), [(0.0, 40), (99.0, 25 + 9)])
def test_the_decay_starts_when_arithmetic_is_learnt_or_time_is_up(tokenizer, monkeypatch, learnt, updates):
    """With 40 updates the decay takes 9: after the first 25 at the earliest, after 31 at the latest."""
    monkeypatch.setattr(base_model, "LEARNT", learnt)
    model = make_model(tokenizer, 16, 1, seed=0)
    seen = []
    made, _ = train_base(
        model,
        tokenizer,
        max_steps=40,
        batch_size=2,
        multiple_of=1,
        seed=0,
        on_step=lambda step, loss: seen.append(step),
    )
    assert made == updates and seen == list(range(1, updates + 1))


def test_training_is_deterministic(tokenizer):
    def weights():
        model = make_model(tokenizer, 16, 1, seed=3)
        train_base(model, tokenizer, max_steps=3, batch_size=4, multiple_of=1, seed=5)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights())


class Scripted(torch.nn.Module):
    """Stands for a model: `generate` answers with the given texts, ended or cut."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.tokenizer, self.answer, self.options = tokenizer, answer, []

    def generate(self, input_ids, num_return_sequences, **options):
        self.options.append(options)
        rows = []
        for prompt in input_ids.repeat_interleave(num_return_sequences, 0).tolist():
            problem = self.tokenizer.decode(prompt).split("|>")[1].split("<|")[0]
            ids = self.tokenizer(self.answer(problem))["input_ids"]
            rows.append(prompt + ids + [self.tokenizer.pad_token_id] * (80 - len(ids)))
        return torch.tensor(rows)


def test_responses_come_back_in_the_order_of_the_problems(tokenizer):
    problems = make_problems(20, Random(0))
    counted = []
    model = Scripted(tokenizer, lambda problem: problem + "=<|end|>")
    found = sample(model, tokenizer, problems, per_problem=3, seed=0, batch_size=6, on_batch=counted.append)
    assert found == [[problem.text + "="] * 3 for problem in problems]
    assert sum(counted) == 60 and max(counted) <= 6
    assert all(o["temperature"] == 1.0 and o["top_k"] == 0 and o["top_p"] == 1.0 for o in model.options)


def test_a_response_that_never_ends_is_none(tokenizer):
    model = Scripted(tokenizer, lambda problem: "1" * 10)
    assert sample(model, tokenizer, [Problem(10, (10,))], per_problem=2, seed=0) == [[None, None]]


@pytest.mark.slow
def test_sampling_from_a_real_model_follows_its_distribution(tokenizer, model):
    """First tokens of the samples against the model's own probabilities; a second call repeats the first."""
    problem = Problem(47, (25, -13, 20))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # away from uniform
        ids = torch.tensor([tokenizer(prompt_text(problem), add_special_tokens=False)["input_ids"]])
        expected = model(ids).logits[0, -1].softmax(-1)
    assert sample(model, tokenizer, [problem], per_problem=8, seed=7) == sample(
        model, tokenizer, [problem], per_problem=8, seed=7
    )
    found = sample(model, tokenizer, [problem], per_problem=1024, seed=7)
    ended = [text for text in found[0] if text is not None]
    assert len(ended) > 500 and all(len(text) <= 20 * MAX_NEW_TOKENS for text in ended)
    characters = "0123456789+-=; "
    counts = torch.tensor([sum(text.startswith(c) for text in ended) for c in characters])
    wanted = expected[tokenizer.convert_tokens_to_ids(list(characters))]
    share = counts / counts.sum()
    assert (share - wanted / wanted.sum()).abs().max() < 0.05


def test_muon_is_the_librarys_but_for_its_rounding():
    """torch.optim.Muon rounds its matmuls to bf16: the updates agree as far as that allows."""
    torch.manual_seed(0)
    shapes, weights = [(48, 32), (32, 48)], []
    for ours in (True, False):
        torch.manual_seed(1)
        matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        library = {"weight_decay": 0.0, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
        optimizer = Muon(matrices, lr=0.1) if ours else torch.optim.Muon(matrices, lr=0.1, **library)
        for _ in range(2):
            for p in matrices:
                p.grad = torch.randn_like(p)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in matrices]))
    assert float((weights[0] - weights[1]).norm() / weights[1].norm()) < 0.02
