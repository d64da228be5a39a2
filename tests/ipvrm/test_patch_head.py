"""The patched head of every family against the model's own full logits, in fp32 and fp64."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ipvrm import IpvrmError, patch_head, unpatch_head
from ipvrm.models.patch_head import STATE

V, B, T = 97, 3, 9
SMALL = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
GEMMA4 = dict(
    hidden_size_per_layer_input=4, vocab_size_per_layer_input=V, num_kv_shared_layers=0, global_head_dim=8
)
GPT2 = dict(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
FAMILIES = {  # name: (class without "Config" and "ForCausalLM", further config)
    "qwen3": ("Qwen3", {}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "qwen3_moe, balanced": (
        "Qwen3Moe",
        {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.3},
    ),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"final_logit_softcapping": 2.0}),
    "gemma4": ("Gemma4", {**GEMMA4, "final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "gpt2": ("GPT2", {}),
    "phi": ("Phi", {"num_key_value_heads": 2}),  # its head has a bias
}


def make(family, dtype=torch.float32):
    """A random model whose tokens differ in probability, and which has dropout where its family has it."""
    base, extra = FAMILIES[family]
    if not hasattr(transformers, f"{base}ForCausalLM") and base != "GPT2":
        pytest.skip(f"transformers {transformers.__version__} has no {base}")
    if base == "GPT2":
        config, kind = transformers.GPT2Config(**GPT2), transformers.GPT2LMHeadModel
    else:
        name = f"{base}TextConfig" if base in ("Gemma3", "Gemma4") else f"{base}Config"
        config = getattr(transformers, name)(**{**SMALL, **extra})
        kind = getattr(transformers, f"{base}ForCausalLM")
    torch.manual_seed(0)
    model = kind(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matmul knows no fp64
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.6)
        if model.lm_head.bias is not None:
            model.lm_head.bias.normal_()
    return model.to(dtype).eval()


def inputs():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, T), generator=g)
    labels = ids.clone()
    labels[0, :4], labels[1, 7:], labels[2, 3] = -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask, labels


def log_softmax_of(model, ids, mask, temperature=1.0):
    """(B, T-1, V) in the model's dtype from its own logits."""
    return (model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature).log_softmax(-1)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_logits(family, dtype):
    model, (ids, mask, labels) = make(family, dtype), inputs()
    rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (1e-9, 1e-10)
    close = dict(rtol=rtol, atol=atol)
    kept, slots = labels[:, 1:] != -100, torch.full((B, T - 1, 3), -1)
    slots[..., :2] = torch.randint(V, (B, T - 1, 2), generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(-1, 1, B * (T - 1), dtype=dtype).view(B, T - 1)

    whole = log_softmax_of(model, ids, mask, 0.7)
    own = whole.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * kept
    entropy = -(whole.exp() * whole).sum(-1) * kept
    picked = whole.gather(2, slots.clamp(min=0)) * kept[..., None] * (slots >= 0)
    ((own + 0.3 * entropy + picked.sum(-1)) * weights).sum().backward()
    want = gradients(model)
    model.zero_grad()

    patch_head(model)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        return_entropy=True,
        candidate_ids=slots,
        temperature=0.7,
    )
    assert out.logits is None and out.logprobs.dtype == dtype
    torch.testing.assert_close(out.logprobs, own, **close)
    torch.testing.assert_close(out.entropy, entropy, **close)
    used = kept[..., None] & (slots >= 0)
    assert bool((out.candidate_logprobs[~used] == -torch.inf).all())
    torch.testing.assert_close(out.candidate_logprobs.where(used, 0.0), picked, **close)
    of_candidates = out.candidate_logprobs.where(used, 0.0).sum(-1)
    ((out.logprobs + 0.3 * out.entropy + of_candidates) * weights).sum().backward()
    found = gradients(model)
    assert found.keys() == want.keys()
    scale = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol * max(1, scale), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_transformers(family):
    model, (ids, mask, labels) = make(family, torch.float64), inputs()
    given = dict(input_ids=ids, attention_mask=mask, labels=labels)
    for items in ({}, {"num_items_in_batch": 31}, {"num_items_in_batch": torch.tensor(7)}):
        theirs = model(**given, **items)
        theirs.loss.backward()
        want = gradients(model)
        model.zero_grad()
        patch_head(model)
        ours = model(**given, **items)
        ours.loss.backward()
        # transformers takes the loss from fp32 logits
        torch.testing.assert_close(ours.loss.double(), theirs.loss.double(), rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=name)
        model.zero_grad()
        unpatch_head(model)


def test_load_balancing_loss_is_there_when_asked_for():
    model, (ids, _, labels) = make("qwen3_moe"), inputs()
    plain = model(input_ids=ids, labels=labels, output_router_logits=True)
    patch_head(model)
    out = model(input_ids=ids, labels=labels, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    torch.testing.assert_close(out.loss, plain.loss)
    assert model(input_ids=ids, labels=labels).aux_loss is None


def test_finds_candidates():
    model, (ids, mask, labels) = make("gemma2", torch.float64), inputs()
    whole = log_softmax_of(model, ids, mask)
    patch_head(model)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels, min_prob=0.05, return_entropy=True)
    kept = labels[:, 1:] != -100
    count = 0
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(T - 1)).tolist():
        want = torch.nonzero(whole[b, t].exp() >= 0.05)[:, 0].tolist() if kept[b, t] else []
        found = out.candidate_ids[b, t]
        assert sorted(found[found >= 0].tolist()) == want
        torch.testing.assert_close(out.candidate_logprobs[b, t][found >= 0], whole[b, t][found[found >= 0]])
        count += len(want)
    assert count > kept.sum() // 2  # the case is not an empty one
    torch.testing.assert_close(out.logprobs, whole.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * kept)


def test_generation_and_plain_forward_are_unchanged():
    model, (ids, mask, labels) = make("qwen3"), inputs()
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    before = model.generate(ids[:, :4], **options)
    logits = model(ids, mask).logits
    patch_head(model)
    model(input_ids=ids, labels=labels)
    after = model.generate(ids[:, :4], **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(model(ids, mask).logits, logits)
    torch.manual_seed(0)
    sampled = model.generate(ids[:, :4], max_new_tokens=3, do_sample=True, temperature=0.5)
    unpatch_head(model)
    torch.manual_seed(0)
    assert torch.equal(sampled, model.generate(ids[:, :4], max_new_tokens=3, do_sample=True, temperature=0.5))
    assert STATE not in vars(model) and "forward" not in vars(model)


def test_save_pretrained_and_copies(tmp_path):
    model, (ids, _, labels) = make("qwen3, tied"), inputs()
    model.save_pretrained(tmp_path / "before")
    patch_head(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()
    twin = copy.deepcopy(model)  # its forward is its own, not the first model's
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(0.5)
    assert float(twin(input_ids=ids, labels=labels).loss) != float(model(input_ids=ids, labels=labels).loss)
    assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_no_labels_give_zero_with_a_gradient():
    model, (ids, _, _) = make("llama"), inputs()
    patch_head(model)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert float(loss) == 0 and model.lm_head.weight.grad is not None
    assert not any(bool(g.any()) for g in gradients(model).values())


def test_dropout_is_as_it_was_and_no_hindrance():
    model = make("gpt2").train()
    assert model.config.resid_pdrop > 0
    patch_head(model)
    assert model.training and all(m.training for m in model.modules())


def test_lora_below_the_head():
    from peft import LoraConfig, get_peft_model

    ids, mask, labels = inputs()
    adapted = get_peft_model(
        make("qwen3"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    want = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
    patch_head(adapted)
    out = adapted(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert all("lora" in name for name in gradients(adapted)) and gradients(adapted)
    unpatch_head(adapted)
    assert adapted(input_ids=ids, labels=labels).logits is not None


def refusal(action):
    with pytest.raises(IpvrmError) as caught:
        action()
    return str(caught.value)


def test_refuses():
    from peft import LoraConfig, get_peft_model

    ids, _, labels = inputs()
    on_head = get_peft_model(make("qwen3"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert "carries an adapter" in refusal(lambda: patch_head(on_head))
    saved = get_peft_model(
        make("qwen3"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert "carries an adapter" in refusal(lambda: patch_head(saved))

    late = make("qwen3")
    patch_head(late)
    get_peft_model(late, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert "carries an adapter" in refusal(lambda: late(input_ids=ids, labels=labels))

    quantised = make("qwen3")
    quantised.lm_head.weight = torch.nn.Parameter(
        quantised.lm_head.weight.detach().to(torch.int8), requires_grad=False
    )
    assert "quantised head" in refusal(lambda: patch_head(quantised))

    odd = make("llama")
    odd.lm_head.register_forward_hook(lambda module, args, out: 1.5 * out)
    assert "transforms them in a way" in refusal(lambda: patch_head(odd))

    other_loss = make("llama")
    other_loss.loss_function = lambda *args, **kwargs: None
    assert "ForCausalLMLoss" in refusal(lambda: patch_head(other_loss))


def test_refuses_calls_that_it_would_answer_wrongly():
    model, (ids, _, labels) = make("llama"), inputs()
    assert "is not patched" in refusal(lambda: unpatch_head(model))
    patch_head(model)
    assert "patched already" in refusal(lambda: patch_head(model))
    given = dict(input_ids=ids, labels=labels)
    assert "without gradients" in refusal(lambda: model(**given, min_prob=0.1))
    assert "need labels" in refusal(lambda: model(input_ids=ids, return_entropy=True))
    for name, value in (
        ("shift_labels", labels), ("ignore_index", 0), ("logits_to_keep", 2), ("return_dict", False)
    ):  # fmt: skip
        assert f"{name} is not supported" in refusal(lambda n=name, v=value: model(**given, **{n: v}))
    model(**given, shift_labels=None, ignore_index=-100, logits_to_keep=0, return_dict=True)
    assert "labels must be (B, T)" in refusal(lambda: model(input_ids=ids, labels=labels[:, 1:]))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert "has been wrapped since" in refusal(lambda: unpatch_head(model))


@pytest.mark.slow
def test_trainer_of_transformers_takes_it(tmp_path):
    """Two updates by `transformers.Trainer` end in the same weights with the head and without."""
    ids, _, labels = inputs()
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]

    def trained(patched):
        model = make("qwen3", torch.float32)
        if patched:
            patch_head(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3,
            optim="sgd",
            learning_rate=0.05, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        return dict(model.named_parameters())

    start, theirs, ours = dict(make("qwen3").named_parameters()), trained(False), trained(True)
    moved = max(float((theirs[name] - p).detach().abs().max()) for name, p in start.items())
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-4 * moved, msg=name)
