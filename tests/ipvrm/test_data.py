"""Rows to packed batches: what is read, what is refused and why, where tokens, labels and offsets end up."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import write_jsonl

from ipvrm import IpvrmError
from ipvrm.data.batches import collate, epoch_order, length_sorted_microbatches, microbatches_for_rank
from ipvrm.data.chat import end_of_turn_id
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row, read_rows

CHAT = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "Answer: 3"}]
GOOD = {"conversation": CHAT, "label": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chat_rows_from_every_format(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    records = [GOOD, {"conversation": CHAT, "label": 0}]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
    rows, bad = read_rows(path)
    assert bad == []
    assert rows[0] == Row(f"{path}:1", (CHAT[0],), "Answer: 3", 1)
    assert rows[1] == Row(f"{path}:2", (CHAT[0],), "Answer: 3", 0)


def test_prompt_response_rows(tmp_path):
    records = [
        {"prompt": "1+2", "response": "=3", "label": 1.0},
        {"prompt": [CHAT[0]], "response": "=4", "label": False},
    ]
    rows, _ = read_rows(write_jsonl(tmp_path / "rows.jsonl", records))
    assert [(r.prompt, r.response, r.label) for r in rows] == [("1+2", "=3", 1), ((CHAT[0],), "=4", 0)]


BAD_ROWS = {
    "last message": {"conversation": CHAT[:1], "label": 1},
    "one message": {"conversation": CHAT[1:], "label": 1},
    "must be a list of messages": {"conversation": "text", "label": 1},
    r"conversation\[1\] must have text": {
        "conversation": [CHAT[0], {"role": "assistant", "content": 3}],
        "label": 1,
    },
    "label must be 0 or 1": {"conversation": CHAT, "label": 2},
    "label must be 0 or 1; got 'yes'": {"conversation": CHAT, "label": "yes"},
    "label is missing": {"conversation": CHAT},
    "response is empty": {"prompt": "a", "response": " \n", "label": 1},
    "response must be text": {"prompt": "a", "response": None, "label": 1},
    "prompt is empty": {"prompt": "", "response": "a", "label": 1},
    "needs `conversation`": {"question": "a", "label": 1},
    "must be an object": [1, 2],
    "not valid JSON": '{"prompt": "a", ',
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_row_is_reported_with_its_place(tmp_path, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, "", BAD_ROWS[reason], GOOD])  # line 2 is blank
    with pytest.raises(IpvrmError, match=rf"1 of 3 rows are bad(.|\n)*{path}:3: .*{reason}"):
        read_rows(path)
    rows, bad = read_rows(path, "skip")
    assert [r.source for r in rows] == [f"{path}:1", f"{path}:4"]
    assert [(b.file, b.row) for b in bad] == [(str(path), 3)]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(IpvrmError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(IpvrmError, match="must end in"):
        read_rows(write_jsonl(tmp_path / "rows.txt", [GOOD]))
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(IpvrmError, match="not a readable parquet"):
        read_rows(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(IpvrmError, match="its columns are question"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(IpvrmError, match="no usable row"):
        read_rows(write_jsonl(tmp_path / "bad.jsonl", [{"label": 1}]), "skip")


def test_unlabelled_rows_on_request(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"conversation": CHAT}])
    assert read_rows(path, require_label=False)[0][0].label is None


# -------------------------------------------------------------------------------------------------- tokens


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_chat_template_tokens(tokenizer):
    row = Row("f:1", "What is 1 + 2?", "Answer: 3", 1)
    response = tokenize([row], tokenizer, max_length=None).responses[0]
    prompt = response.input_ids[: response.prompt_length]
    assert decode(tokenizer, prompt) == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    # the newline that ChatML writes behind <|im_end|> is cut
    assert decode(tokenizer, response.input_ids[response.prompt_length :]) == "Answer: 3<|im_end|>"
    assert (
        response.input_ids[-1] == end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert (response.label, response.source, response.offsets) == (1, "f:1", None)


@pytest.mark.parametrize("text", ["Answer: 3", "  two  spaces \n\n", "naïve π≈3 \U0001f600 end", "x"])
def test_offsets_name_each_token_within_the_response(tokenizer, text):
    response = tokenize([Row("f:1", "p", text, 1)], tokenizer, max_length=None, with_offsets=True).responses[
        0
    ]
    assert len(response.offsets) == response.length
    assert response.offsets[-1] == (-1, -1)  # end of turn
    assert response.offsets[0][0] == 0
    assert response.offsets[-2][1] == len(text)
    ends = [end for _, end in response.offsets[:-1]]
    assert ends == sorted(ends)


def variant(tokenizer, template):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


THINK = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"


@pytest.mark.parametrize(
    "writes", [THINK + "{{ m.content | trim }}", "{{ m.content }} [done]", "{{ m.content | upper }}"]
)
def test_the_response_is_what_was_sampled_whatever_the_template_makes_of_it(tokenizer, writes):
    """Qwen3 writes an empty think block before the last answer, Llama strips text: the policy saw neither."""
    other = variant(
        tokenizer,
        BODY
        + "{% if m.role == 'user' %}{{ m.content }}{% else %}"
        + writes
        + "{% endif %}<|im_end|>\n"
        + TAIL,
    )
    text = "  ab cd "
    response = tokenize([Row("f:1", "p", text, 1)], other, max_length=None, with_offsets=True).responses[0]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert response.input_ids[response.prompt_length :] == (*own, end_of_turn_id(tokenizer))
    assert (response.offsets[0][0], response.offsets[-2][1], response.offsets[-1]) == (0, len(text), (-1, -1))


def test_end_of_turn_appended_where_the_template_writes_none(tokenizer):
    other = variant(tokenizer, BODY + "{{ m.content }}\n" + TAIL)
    response = tokenize([Row("f:1", "p", "ab", 1)], other, max_length=None).responses[0]
    assert decode(other, response.input_ids[response.prompt_length :]).endswith("ab<|im_end|>")


def test_end_of_turn_is_the_templates_not_the_tokenizers(tokenizer):
    """Base models carry eos_token=<|endoftext|> beside a ChatML template."""
    other = variant(tokenizer, tokenizer.chat_template)
    other.eos_token = "<|endoftext|>"
    assert end_of_turn_id(other) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    other.chat_template = None
    assert end_of_turn_id(other) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    other.eos_token = None
    with pytest.raises(IpvrmError, match="no token that ends a turn"):
        end_of_turn_id(other)


def test_end_of_turn_text_inside_the_response_does_not_end_it(tokenizer):
    response = tokenize([Row("f:1", "p", "a<|im_end|>b", 1)], tokenizer, max_length=None).responses[0]
    assert decode(tokenizer, response.input_ids[response.prompt_length :]) == "a<|im_end|>b<|im_end|>"


def test_a_base_model_is_trained_on_the_prompts_tokens_and_the_responses(tokenizer):
    """A token that would span the boundary was never sampled; a prompt may end in a space."""
    raw = variant(tokenizer, None)
    for prompt, text in (("What is 1 + 2? Answ", "er: 3"), ("Q: 1 + 2. A: ", "3")):
        response = tokenize([Row("f:1", prompt, text, 1)], raw, max_length=None).responses[0]
        parts = [raw(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
        assert response.input_ids == (*parts[0], *parts[1], end_of_turn_id(raw))
        assert response.prompt_length == len(parts[0])


def test_a_response_ends_only_where_it_ended(tokenizer):
    end = end_of_turn_id(tokenizer)
    rows = [
        Row("f:1", "p", "ab", 1),
        Row("f:2", "p", "ab", 1, ended=False),
        Row("f:3", "p", "ab<|im_end|>", 1),
    ]
    whole, cut, written = (r.input_ids for r in tokenize(rows, tokenizer, max_length=None).responses)
    assert whole == (*cut, end) == written and cut[-1] != end


def test_templates_that_refuse_are_bad_rows(tokenizer):
    picky = variant(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(IpvrmError, match="f:1: the chat template refuses .*roles must alternate"):
        tokenize([Row("f:1", "p", "ab", 1)], picky, max_length=None)
    raw = variant(tokenizer, None)
    with pytest.raises(IpvrmError, match="chat template, and this one has none"):
        tokenize([Row("f:1", (CHAT[0],), "ab", 1)], raw, max_length=None)
    upper = variant(tokenizer, BODY + "{{ m.content | upper }}<|im_end|>\n" + TAIL)
    with pytest.raises(IpvrmError, match=r"f:1: message 1 \(role 'user'\): .* does not write its content"):
        tokenize([Row("f:1", "p", "ab", 1)], upper, max_length=None)


def test_long_rows_are_dropped_or_truncated_on_the_right(tokenizer):
    rows = [Row("f:1", "p", "ab " * 30, 1), Row("f:2", "p", "ab", 0), Row("f:3", "ab " * 60, "ab", 0)]
    whole = tokenize(rows, tokenizer, max_length=None).responses
    limit = len(whole[1].input_ids) + 3
    dropped = tokenize(rows, tokenizer, max_length=limit)
    assert [r.source for r in dropped.responses] == ["f:2"]
    assert dropped.counts["too_long_dropped"] == 2 and dropped.counts["rows"] == 3
    cut = tokenize(rows, tokenizer, max_length=limit, on_long="truncate", with_offsets=True)
    assert [r.source for r in cut.responses] == ["f:1", "f:2"]
    assert cut.responses[0].input_ids == whole[0].input_ids[:limit]  # the prompt is whole
    assert len(cut.responses[0].offsets) == cut.responses[0].length
    assert (cut.counts["truncated"], cut.counts["too_long_dropped"], cut.counts["used"]) == (1, 1, 2)


def test_counts(tokenizer):
    rows = [Row("f:1", "p", "ab", 1), Row("f:2", "p", "ab", 0), Row("f:3", "p", "cd", 0)]
    result = tokenize(rows, tokenizer, max_length=None)
    assert result.counts["tokens"] == sum(len(r.input_ids) for r in result.responses)
    assert result.counts["response_tokens"] == sum(r.length for r in result.responses)
    assert (result.counts["right"], result.counts["wrong"]) == (1, 2)


# ------------------------------------------------------------------------------------------------- batches


def random_responses(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Response(tuple(rng.integers(1, 99, prompt + length).tolist()), prompt, (0, 1, None)[i % 3])
        for i, (prompt, length) in enumerate(lengths)
    ]


def test_collate_against_a_loop():
    responses = random_responses([(3, 4), (1, 1), (5, 2)])
    batch = collate(responses, pad_id=7)
    T = batch.input_ids.shape[1]
    assert T == 7
    positions, tokens = [], []
    for b, r in enumerate(responses):
        assert batch.input_ids[b].tolist() == list(r.input_ids) + [7] * (T - len(r.input_ids))
        assert batch.attention_mask[b].sum() == len(r.input_ids)
        for t in range(r.prompt_length, len(r.input_ids)):
            positions.append(b * T + t - 1)  # the state before the token predicts it
            tokens.append(r.input_ids[t])
    assert batch.positions.tolist() == positions
    assert batch.token_ids.tolist() == tokens
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7] and batch.cu_seqlens.dtype == torch.int32
    assert batch.outcome[:2].tolist() == [0, 1] and torch.isnan(batch.outcome[2])


@pytest.mark.parametrize("responses", [[], [Response((1, 2), 0)], [Response((1, 2), 2)]])
def test_collate_refuses_what_has_no_prediction(responses):
    with pytest.raises(IpvrmError, match="at least one token"):
        collate(responses)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    max_rows=st.integers(1, 9),
    world_size=st.integers(1, 5),
)
def test_ranks_share_a_batch_without_loss(lengths, max_rows, world_size):
    indices = list(range(100, 100 + len(lengths)))
    by_index = [0] * 100 + lengths
    shares = [
        microbatches_for_rank(indices, by_index, max_rows=max_rows, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1  # every forward may be a collective
    assert all(len(micro) <= max_rows for share in shares for micro in share)
    assert sorted(i for share in shares for micro in share for i in micro) == indices
    assert sum(not micro for share in shares for micro in share) < world_size


@pytest.mark.slow
@given(lengths=st.lists(st.integers(1, 50), max_size=40), max_tokens=st.integers(1, 120))
def test_token_budget_of_length_sorted_microbatches(lengths, max_tokens):
    batches = length_sorted_microbatches(lengths, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


def test_row_budget_of_length_sorted_microbatches():
    assert length_sorted_microbatches([1, 5, 3, 5, 2], max_rows=2) == [[1, 3], [2, 4], [0]]


def test_epoch_order_depends_on_seed_and_epoch_only():
    np.random.seed(1)
    order = epoch_order(50, 42, 3)
    np.random.seed(2)
    assert epoch_order(50, 42, 3) == order
    assert sorted(order) == list(range(50))
    assert epoch_order(50, 42, 4) != order != epoch_order(50, 43, 3)
