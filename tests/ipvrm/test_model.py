"""Causal LMs: our log-probs against log_softmax of the model's own full logits, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PhiConfig,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from ipvrm import IpvrmError
from ipvrm.data.batches import collate
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row
from ipvrm.models.causal_lm import (
    check_head,
    disable_dropout,
    head,
    hidden_states,
    load_model,
    load_tokenizer,
    local_folder,
    max_positions,
    memory_estimate,
    response_logprobs,
    save_model,
    template_hash,
    weights_hash,
)
from ipvrm.training.adapters import add_adapters

SIZES = {
    "vocab_size": 151,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "qwen3_tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_untied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "gemma2_softcap": Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=3.0, query_pre_attn_scalar=16
    ),
    "granite_divides": GraniteConfig(**SIZES, logits_scaling=0.2),
    "cohere_multiplies": CohereConfig(**SIZES, logit_scale=4.0),
    "phi_bias": PhiConfig(**SIZES),
    "gpt2_position_embeddings": GPT2Config(
        vocab_size=151, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    with torch.no_grad():  # logits of a size that softcap and scale visibly change
        model.get_output_embeddings().weight.normal_(std=0.5)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    lengths = [(4, 9), (1, 1), (7, 3), (2, 20)]
    return collate(
        [
            Response(tuple(torch.randint(3, 151, (p + n,), generator=generator).tolist()), p, 1)
            for p, n in lengths
        ]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logprobs_equal_full_logits(name, temperature, batch):
    model = make(name)
    check_head(model)
    got = response_logprobs(model, batch, temperature)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
    full = logits.log_softmax(-1).flatten(0, 1)  # (B * T, V)
    want = full[batch.positions, batch.token_ids]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    got.sum().backward()
    gradient = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    want.sum().backward()
    torch.testing.assert_close(gradient, model.get_output_embeddings().weight.grad, rtol=1e-4, atol=1e-4)


def test_the_head_module_is_never_called(batch):
    """No (B, T, V) or (N, V) logits from the model: only the packed states reach the head, in the op."""
    model = make("qwen3_untied")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was called on the sequence"))
    states = hidden_states(model, batch)
    assert states.shape == (len(batch.token_ids), 32)
    response_logprobs(model, batch).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_padding_does_not_change_a_response(batch):
    model = make("qwen3_tied")
    together = response_logprobs(model, batch)
    start, stop = batch.cu_seqlens[2:4].tolist()
    row = batch.input_ids[2][batch.attention_mask[2].bool()]
    alone = response_logprobs(model, collate([Response(tuple(row.tolist()), 7, 1)]))
    torch.testing.assert_close(together[start:stop], alone, rtol=1e-5, atol=1e-5)


def test_an_unknown_logit_transform_is_refused():
    class Shifted(type(make("qwen3_tied"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.1 * torch.arange(output.logits.shape[-1])
            return output

    model = make("qwen3_tied")
    model.__class__ = Shifted
    with pytest.raises(IpvrmError, match="transforms them in a way that ipvrm does not know"):
        check_head(model)


@pytest.mark.slow
def test_adapters_on_the_head_are_refused(batch):
    peft = pytest.importorskip("peft")
    on_head = peft.get_peft_model(make("qwen3_untied"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(IpvrmError, match="carries an adapter"):
        head(on_head)
    saved = peft.get_peft_model(
        make("qwen3_untied"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    )
    with pytest.raises(IpvrmError, match="carries an adapter"):
        head(saved)
    elsewhere = peft.get_peft_model(make("qwen3_untied"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    base = make("qwen3_untied")
    torch.testing.assert_close(response_logprobs(elsewhere, batch), response_logprobs(base, batch))


def test_empty_and_sharded_heads_are_refused():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(ARCHITECTURES["qwen3_untied"])
    with pytest.raises(IpvrmError, match=r"weight is empty here \(\(151, 32\) on meta\)"):
        head(empty)
    gone = make("qwen3_untied")
    gone.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves
    with pytest.raises(IpvrmError, match="weight is empty here"):
        head(gone)

    class DTensor(
        torch.Tensor
    ):  # stands in for torch.distributed.tensor.DTensor, which needs a process group
        pass

    sharded = make("qwen3_untied")
    sharded.lm_head._parameters["weight"] = torch.randn(151, 32).as_subclass(DTensor)
    with pytest.raises(IpvrmError, match="sharded"):
        head(sharded)


def test_value_heads_and_pickles_are_refused(tmp_path, tiny_folder):
    Qwen3ForSequenceClassification(ARCHITECTURES["qwen3_tied"]).save_pretrained(tmp_path / "value")
    with pytest.raises(IpvrmError, match="value head"):
        load_model(tmp_path / "value")
    shutil.copytree(tiny_folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(IpvrmError, match="pickled weights are not loaded"):
        load_model(tmp_path / "pickle")


def test_missing_weights_are_refused(tmp_path, tiny_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IpvrmError, match=r"1 weights are missing.*layers.1.mlp.up_proj"):
        load_model(tmp_path / "part")


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(IpvrmError, match="not a model folder"):
        local_folder(tmp_path)
    with pytest.raises(IpvrmError, match="neither a model folder nor"):
        local_folder("nobody/nothing")  # offline


def test_load_and_save_round_trip(tmp_path, tiny_folder):
    model = load_model(tiny_folder)
    assert not model.training
    save_model(model, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_weights_hash_tells_models_apart(tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "same")
    assert weights_hash(tmp_path / "same") == weights_hash(tiny_folder)
    weights = tmp_path / "same" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_hash(tmp_path / "same") != weights_hash(tiny_folder)
    shutil.copytree(tiny_folder, tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    assert weights_hash(tmp_path / "config") != weights_hash(tiny_folder)


def test_template_hash(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    assert template_hash(other) == template_hash(tokenizer)
    other.chat_template += " "
    assert template_hash(other) != template_hash(tokenizer)


def test_disable_dropout_makes_training_mode_deterministic(batch):
    config = GPT2Config(vocab_size=151, n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    qwen = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, head_dim=16, attention_dropout=0.5)).train()
    for module in (model, qwen):
        assert not torch.equal(response_logprobs(module, batch), response_logprobs(module, batch))
        disable_dropout(module)
        assert torch.equal(response_logprobs(module, batch), response_logprobs(module, batch))


def test_memory_estimate_counts_parameters(tiny_folder):
    estimate = memory_estimate(tiny_folder, rows=2, length=10)
    model = load_model(tiny_folder)
    assert estimate["parameters"] == sum(p.numel() for p in model.parameters())
    assert estimate["weights_gradients_adam_bytes"] == 16 * estimate["parameters"]
    assert estimate["activation_bytes"] == 2 * 10 * 2 * 32 * 4 * 16


def test_memory_estimate_of_adapters(tiny_folder):
    """Gradients and moments of the adapters alone, as many as PEFT makes."""
    estimate = memory_estimate(tiny_folder, rows=2, length=10, lora_r=4)
    model = add_adapters(load_model(tiny_folder), 4, alpha=4.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert (estimate["trained_parameters"], estimate["parameters"]) == (trained, total)
    assert estimate["weights_gradients_adam_bytes"] == 4 * total + 12 * trained


# ------------------------------------------------------------------------ ids and positions beyond the model


@pytest.fixture
def larger_tokenizer(tiny_folder, tmp_path):
    """The tiny model beside a tokenizer with one token more than the model has rows."""
    folder = tmp_path / "larger"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load_tokenizer(tiny_folder)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    extra = [f"<extra{i}>" for i in range(vocab - len(tokenizer) + 1)]
    tokenizer.add_tokens(extra)
    tokenizer.save_pretrained(folder)
    return folder, vocab


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_work(larger_tokenizer):
    folder, vocab = larger_tokenizer
    with pytest.raises(IpvrmError, match=rf"ids up to {vocab} \('<extra\d+>'\), the model {vocab} rows"):
        load_tokenizer(folder)


def test_positions_of_a_model(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    assert (
        max_positions(tiny_folder)
        == max_positions(load_model(tiny_folder))
        == config["max_position_embeddings"]
    )
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    for stated, expected in ((64, 256), (512, 512)):
        folder = tmp_path / str(stated)
        shutil.copytree(tiny_folder, folder)
        (folder / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": stated, "rope_parameters": yarn})
        )
        assert max_positions(folder) == expected


def test_a_row_longer_than_the_model_is_a_bad_row(tokenizer):
    rows = [Row("f:1", "p", "ab", 1), Row("f:2", "p", "ab " * 60, 0)]
    with pytest.raises(
        IpvrmError, match=r"f:2: its \d+ tokens are more than the 40 positions of the models in use"
    ):
        tokenize(rows, tokenizer, max_length=None, max_positions=40)
    found = tokenize(rows, tokenizer, max_length=None, max_positions=40, on_bad_row="skip")
    assert [r.source for r in found.responses] == ["f:1"] and found.counts["bad"] == 1
    cut = tokenize(rows, tokenizer, max_length=40, on_long="truncate", max_positions=40)
    assert [len(r.input_ids) for r in cut.responses][1] == 40
