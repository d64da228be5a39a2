"""The one way from prompts to judged answers: what cannot be asked, what ended, what has a verdict."""

import copy
from types import SimpleNamespace

import pytest

from ipvrm import IpvrmError
from ipvrm.data.rows import BadRow, Prompt
from ipvrm.rollouts.answers import Question, as_questions, judge, response_text, sample
from ipvrm.rollouts.engine import Sampling, cut, response_seed
from ipvrm.rollouts.verify import Verdict

GOOD = Prompt(1, "What is 1 + 2?", "3")
TOOLS = ({"type": "function", "function": {"name": "gauge", "parameters": {}}},)


class Letters:
    """Token 1 is `b`, and so on."""

    def decode(self, ids, **options):
        return "".join(chr(97 + i) for i in ids)


def settings(on_bad_row="error", max_new_tokens=8):
    return SimpleNamespace(on_bad_row=on_bad_row, max_new_tokens=max_new_tokens, chat_template_kwargs=None)


def test_a_prompt_may_fill_the_models_positions_and_no_more(tokenizer):
    (question,), _ = as_questions([GOOD], [], "p.jsonl", tokenizer, settings(), None)
    enough = len(question.ids) + 8
    assert as_questions([GOOD], [], "p.jsonl", tokenizer, settings(), enough) == ([question], [])
    with pytest.raises(IpvrmError, match=rf"p.jsonl:1: its {len(question.ids)} tokens and 8 new ones"):
        as_questions([GOOD], [], "p.jsonl", tokenizer, settings(), enough - 1)


def test_rows_without_ground_truth_are_bad_only_where_it_is_needed(tokenizer):
    prompts, earlier = [Prompt(2, "x"), GOOD], [BadRow("p.jsonl", 3, "not JSON")]
    questions, bad = as_questions(prompts, earlier, "p.jsonl", tokenizer, settings("skip"), None)
    assert [q.prompt.row for q in questions] == [1] and [b.row for b in bad] == [3, 2]
    assert "no ground truth" in bad[1].reason and len(earlier) == 1
    questions, bad = as_questions(prompts, [], "p.jsonl", tokenizer, settings(), None, answers=False)
    assert [q.prompt.row for q in questions] == [2, 1] and not bad and questions[0].answer == ""
    with pytest.raises(IpvrmError, match="p.jsonl: no usable row; the first: p.jsonl:2: no ground truth"):
        as_questions(prompts[:1], [], "p.jsonl", tokenizer, settings("skip"), None)


def test_the_tools_of_a_prompt_reach_the_template(tokenizer):
    """They did in `rollout` alone: train-policy and eval td asked without them."""
    calling = copy.deepcopy(tokenizer)
    calling.chat_template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    prompt = Prompt(1, ({"role": "user", "content": "How high is Koro?"},), "3", tools=TOOLS)
    (question,), _ = as_questions([prompt], [], "p.jsonl", calling, settings(), None)
    assert "gauge" in calling.decode(question.ids)


def test_what_was_cut_off_is_not_judged():
    asked, stops = [], {9}

    def verdicts(pairs):
        asked.extend(pairs)
        return [Verdict("right" if text == answer else "timeout") for text, answer in pairs]

    question = Question(Prompt(1, "x", "bc"), (0,))
    responses = [
        ([1, 2, 9], question),
        ([1, 2], question),
        ([2, 9], question),
        ([], question),
        ([9], question),
    ]
    found = judge(responses, stops, Letters(), verdicts)
    assert [verdict and verdict.outcome for verdict in found] == ["right", None, "timeout", None, "timeout"]
    assert asked == [("bc", "bc"), ("c", "bc"), ("", "bc")]
    assert judge([([1], question)], stops, Letters(), verdicts) == [None]


@pytest.mark.parametrize(
    ("ids", "kept", "text"),
    [([1, 2, 9, 0, 0], [1, 2, 9], ("bc", True)), ([1, 2], [1, 2], ("bc", False)), ([9, 9], [9], ("", True))],
)
def test_a_response_ends_with_its_first_stop_token(ids, kept, text):
    assert cut(ids, {8, 9}) == kept and response_text(kept, {8, 9}, Letters()) == text


def test_the_seed_is_made_of_the_run_the_number_and_the_sample():
    calls = []

    def engine(prompts, sampling, seeds):
        calls.append((prompts, sampling, seeds))
        return [[9] for _ in prompts]

    question = Question(GOOD, (4, 5))
    assert sample(engine, [(question, 7, 0), (question, 7, 1)], Sampling(3), 42) == [[9], [9]]
    seeds = [response_seed(42, 7, 0), response_seed(42, 7, 1)]
    assert calls == [([(4, 5), (4, 5)], Sampling(3), seeds)] and seeds[0] != seeds[1]
