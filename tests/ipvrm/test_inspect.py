"""`ipvrm inspect`: the numbers of its page against the reward model, what is picked, what is refused."""

import json
import math
import os
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import contrast
from runs import sharp, write_jsonl

from ipvrm import IpvrmError, RewardModel
from ipvrm.cli import main
from ipvrm.data.steps import render_steps, token_pieces
from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model, template_hash
from ipvrm.models.reward_model import RewardModelInfo, read_info, reference_entries
from ipvrm.models.tiny_model import TinyModelConfig, make_tiny_model
from ipvrm.run_folder import versions
from ipvrm.view import traces
from ipvrm.view.inspect import InspectConfig, inspect
from ipvrm.view.page import block, rounded
from ipvrm.view.traces import Choice, Item, Judge, Reading, data_block, pick, piece_of, shrink

VIEW = Path(traces.__file__).parent
ODD = ["<b>bold</b> </script> <!-- x", "漢字 😀\u2028\t\r\nשלום", "", "plain, and an end."]
TRACES = [
    {"id": "sum", "problem": "What is 1 + 2?", "steps": ["carry 0.", "Answer: 4"], "label": 1},
    {
        "id": "odd <i>",
        "problem": "</script><script>alert(1)</script>\n& \u2028 lines",
        "steps": ODD,
        "label": -1,
    },
    {"id": "x", "problem": "One token", "steps": ["1"]},
]
FORMAT = {"step_format": "{step}", "step_separator": "\n"}


def save_reward_model(folder, base, *, seed, beta=2.0):
    """The base with noise on its weights, and the base as its reference."""
    model, reference, tokenizer = load_model(base), load_model(base), load_tokenizer(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    entries = reference_entries(base, folder)
    info = RewardModelInfo(
        "ipvrm", beta, 1.0, template_hash=template_hash(tokenizer), versions=versions(), **entries
    )
    RewardModel(model, reference, tokenizer, info).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    """Two reward models over one base, whose distributions have peaks."""
    home = tmp_path_factory.mktemp("pair")
    base = sharp(load_model(tiny_folder))
    save_model(base, home / "base")
    load_tokenizer(tiny_folder).save_pretrained(home / "base")
    return [
        str(save_reward_model(home / name, home / "base", seed=n))
        for n, name in enumerate(("first", "second"))
    ]


@pytest.fixture(scope="module")
def shown(pair, tmp_path_factory):
    """(folder, data) of a page of both models, candidates from p >= 0.01 so that there are some."""
    folder = tmp_path_factory.mktemp("page")
    source = write_jsonl(folder / "in.jsonl", TRACES)
    config = InspectConfig(
        str(source), str(folder / "x.html"), tuple(pair), pick="first", json=True, use_cpu=True, **FORMAT
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "MIN_PROB", 0.01)
        data = inspect(config, progress=False)
    return folder, data


def data_in(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


# ------------------------------------------------------------------------------------------ the numbers


def test_the_numbers_are_what_score_says(shown, pair):
    folder, data = shown
    assert data_in((folder / "x.html").read_text(encoding="utf-8")) == data
    assert json.loads((folder / "x.json").read_text()) == data
    assert data["schema"] == "ipvrm-inspect/1" and [m["name"] for m in data["models"]] == ["first", "second"]
    close = {"rel": 6e-3, "abs": 1e-6}  # three significant digits
    for number, path in enumerate(pair):
        model = RewardModel.from_pretrained(path, device="cpu")
        for source, trace in zip(TRACES, data["traces"], strict=True):
            want = model.score(source["problem"], source["steps"], **FORMAT)
            found, (text,) = trace["models"][number], trace["texts"]
            assert [trace["id"], trace["label"]] == [source["id"], source.get("label")]
            assert found["td"] == pytest.approx(want.td.tolist(), **close)
            assert found["scores"] == pytest.approx(want.step_scores.tolist(), **close)
            assert found["first_error"] == want.first_error
            assert text["prob"] == pytest.approx(want.ref_logprobs.exp().tolist(), **close)
            assert text["ends"] == want.step_ends.tolist()
            pieces = [data["vocabulary"][i] for i in text["ids"]]
            rendered, _ = render_steps(source["steps"], **FORMAT)
            assert "".join(pieces[: text["ends"][-1] + 1]) == rendered
    ends = data["traces"][1]["texts"][0]["ends"]
    assert ends[2] > ends[1]  # its separator; a step of nothing at all is in test_steps


def test_the_candidates_against_dense_logits(shown, pair):
    _, data = shown
    entries = 0
    for number, path in enumerate(pair):
        model = RewardModel.from_pretrained(path, device="cpu")
        for source, trace in zip(TRACES, data["traces"], strict=True):
            (solution,) = model.solutions([(source["problem"], source["steps"])], **FORMAT)
            ids, start = torch.tensor([solution.response.input_ids]), solution.response.prompt_length
            with torch.no_grad():
                own, reference = (
                    m(ids).logits[0, start - 1 : -1].log_softmax(-1) for m in (model.model, model.reference)
                )
            for t, (pieces, prob, *td) in trace["candidates"].items():
                taken, row = int(ids[0, start + int(t)]), reference[int(t)]
                wanted = (row.exp() >= 0.01).nonzero()[:, 0].tolist()
                wanted += [] if taken in wanted else [taken]
                texts = [piece_of(model.tokenizer, token) for token in wanted]
                texts[wanted.index(taken)] = solution.tokens[int(t)]
                want_td = 2.0 * (own[int(t)] - row)[wanted]
                want = sorted(zip(texts, row[wanted].exp().tolist(), want_td.tolist(), strict=True))
                shown_pieces = [data["vocabulary"][piece] for piece in pieces]
                got = sorted(zip(shown_pieces, prob, td[number], strict=True))
                assert [piece for piece, *_ in got] == [piece for piece, *_ in want]
                for (_, p, own_td), (_, want_p, of_it) in zip(got, want, strict=True):
                    assert p == pytest.approx(want_p, rel=6e-3)  # three significant digits
                    assert own_td == pytest.approx(of_it, rel=6e-3, abs=2e-5)
                assert trace["texts"][0]["ids"][int(t)] in pieces
                entries += 1
    assert entries > 20


def test_the_scale_is_of_all_traces_not_of_those_shown(shown, pair, tmp_path):
    folder, data = shown
    config = InspectConfig(
        str(folder / "in.jsonl"),
        str(tmp_path / "y.html"),
        (pair[0],),
        pick="first",
        k=1,
        use_cpu=True,
        **FORMAT,
    )
    one = inspect(config, progress=False)
    assert len(one["traces"]) == 1 and one["models"][0]["scale"] == data["models"][0]["scale"]
    model = RewardModel.from_pretrained(pair[0], device="cpu")
    td = torch.cat([model.score(t["problem"], t["steps"], **FORMAT).td for t in TRACES]).abs().double()
    assert one["models"][0]["scale"] == pytest.approx(float(td.quantile(0.98)), rel=6e-3)


def test_one_pair_of_models_is_in_memory_at_a_time(pair, tmp_path, monkeypatch):
    """When the second pair is loaded, nothing holds the first one's model or reference any more."""
    load, loaded, alive = RewardModel.from_pretrained, [], []

    def counting(*args, **kwargs):
        alive.append([ref() for ref in loaded if ref() is not None])
        model = load(*args, **kwargs)
        loaded.extend(weakref.ref(x) for x in (model, model.model, model.reference))
        return model

    monkeypatch.setattr(RewardModel, "from_pretrained", counting)
    source = write_jsonl(tmp_path / "in.jsonl", TRACES)
    config = InspectConfig(
        str(source), str(tmp_path / "x.html"), tuple(pair), pick="first", use_cpu=True, **FORMAT
    )
    inspect(config, progress=False)
    assert len(loaded) == 6 and alive == [[], []]


def test_another_policy_gives_the_candidates(pair, tiny_folder, tmp_path):
    """The policy is the second reward model's: its p, and the first one's TD at its candidates."""
    source = write_jsonl(tmp_path / "in.jsonl", TRACES[:1])
    config = InspectConfig(
        str(source), str(tmp_path / "x.html"), (pair[0],), policy=pair[1], pick="first", use_cpu=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "MIN_PROB", 0.01)
        data = inspect(config, progress=False)
    model = RewardModel.from_pretrained(pair[1], device="cpu")
    want = model.score(TRACES[0]["problem"], TRACES[0]["steps"]).logprobs.exp()
    assert data["traces"][0]["texts"][0]["prob"] == pytest.approx(want.tolist(), rel=6e-3)


@pytest.mark.slow
def test_two_models_of_different_vocabularies(pair, tmp_path):
    """Each has its own tokens, TD and p; of the candidates, the first one's, the second says nothing."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "carry Answer: carry the Answer: one token"}] * 9)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = make_tiny_model(
        TinyModelConfig(str(tmp_path / "base"), (str(texts),), vocab_size=290, num_key_value_heads=1, **sizes)
    )
    other = save_reward_model(tmp_path / "other", base, seed=3)
    source = write_jsonl(tmp_path / "in.jsonl", TRACES)
    config = InspectConfig(
        str(source), str(tmp_path / "x.html"), (pair[0], str(other)), pick="first", use_cpu=True, **FORMAT
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "MIN_PROB", 0.01)
        data = inspect(config, progress=False)
    assert [model["tokens"] for model in data["models"]] == [0, 1]
    differ = candidates = 0
    for number, path in enumerate((pair[0], other)):
        model = RewardModel.from_pretrained(path, device="cpu")
        for trace, picked in zip(TRACES, data["traces"], strict=True):
            want = model.score(trace["problem"], trace["steps"], **FORMAT)
            text, found = picked["texts"][number], picked["models"][number]
            pieces = [data["vocabulary"][i] for i in text["ids"]]
            assert "".join(pieces[: text["ends"][-1] + 1]) == render_steps(trace["steps"], **FORMAT)[0]
            assert pieces == list(want.tokens) and text["ends"] == want.step_ends.tolist()
            assert found["td"] == pytest.approx(want.td.tolist(), rel=6e-3, abs=1e-6)
            assert text["prob"] == pytest.approx(want.ref_logprobs.exp().tolist(), rel=6e-3, abs=1e-6)
            differ += len(picked["texts"][0]["ids"]) != len(picked["texts"][1]["ids"])
            for _, prob, *td in picked["candidates"].values():
                assert None not in td[0] and td[1] == [None] * len(prob)
                candidates += 1
    assert differ and candidates > 20


# ------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.slow
def test_where_the_threshold_comes_from(pair, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(pair[0], home / "rm")
    source = write_jsonl(tmp_path / "in.jsonl", TRACES[:1])
    reference = str((Path(pair[0]) / read_info(pair[0]).reference).resolve())
    config = InspectConfig(
        str(source), str(tmp_path / "x.html"), (str(home / "rm"),), reference, pick="first", use_cpu=True
    )

    def judge(**changes):
        model = inspect(replace(config, **changes), progress=False)["models"][0]
        return model["threshold"], model["rule"], model["threshold_from"]

    assert judge()[0] == 0 and "no evaluation" in judge()[2]
    entry = {"tau": 0.3, "score_threshold": -0.847}
    stored = {
        "reward_model": {"weights_hash": read_info(home / "rm").weights_hash},
        "subsets": {"gsm8k": {"rules": {"step": {"transfer": entry}, "mean": {"transfer": None}}}},
    }
    (home / "rm" / "processbench").mkdir()
    file = home / "rm" / "processbench" / "results.json"
    file.write_text(json.dumps(stored))
    assert judge() == (-0.847, "step", "rm/processbench/results.json")
    file.write_text(json.dumps(stored | {"reward_model": {"weights_hash": "another"}}))
    assert judge()[0] == 0
    with pytest.raises(IpvrmError, match="none holds a threshold"):
        judge(threshold_from=(str(file),))
    (home / "evaluation").mkdir()
    validation = {"prefix": {"tau": 0.0, "score": None}, "mean": {"tau": 0.5, "score": 0.25}}
    demo = {"models": {"ipvrm": {"rule": "mean", "validation": validation}}}
    (home / "evaluation" / "evaluation.json").write_text(json.dumps(demo))
    assert judge() == (0.25, "mean", "evaluation/evaluation.json")
    assert judge(rule="prefix")[0] is None  # -inf: it flags nothing
    none = inspect(replace(config, rule="prefix"), progress=False)
    assert none["models"][0]["flags"] == "none" and none["traces"][0]["models"][0]["first_error"] == -1
    assert inspect(replace(config, rule="mean"), progress=False)["models"][0]["flags"] is None


# ------------------------------------------------------------------------------------------------ picking


def reading(scores, threshold=0.0, td=(0.0,)):
    below = [i for i, s in enumerate(scores) if s < threshold]
    td = np.array(td, dtype=float)
    return Reading(
        ("a",) * len(td),
        [0] * len(scores),
        np.ones(len(td)),
        td,
        np.array(scores, dtype=float),
        (below or [-1])[0],
    )


def items(*labels):
    return [Item(str(n), "p", ("a", "b"), label) for n, label in enumerate(labels)]


def judge(threshold=0.0):
    return Judge("m", "ipvrm", 1.0, "step", threshold, "")


def test_pick_mistakes_by_how_wrong_they_are():
    readings = [reading([-1, 2]), reading([3, 9]), reading([-8, 1]), reading([1, -5]), reading([-9, -9])]
    labels = items(-1, 1, 1, 1, None)
    found = pick("mistakes", 9, labels, [readings], [judge()])
    assert found == [(1, "missed"), (2, "early"), (0, "false alarm")]
    assert pick("mistakes", 1, labels, [readings], [judge()]) == [(1, "missed")]
    with pytest.raises(IpvrmError, match="--pick mistakes: none of the 1 traces"):
        pick("mistakes", 9, items(0), [[reading([-1, 1])]], [judge()])


def test_pick_drops_and_disagreements():
    readings = [reading([0, 0], td=[1, -2, math.nan]), reading([0, 0], td=[-7]), reading([0, 0], td=[3])]
    assert [i for i, _ in pick("drop", 9, items(*[None] * 3), [readings], [judge()])] == [1, 0]
    first = [reading([-1, 1]), reading([-5, 1]), reading([1, 1])]
    second = [reading([100, 1]), reading([100, 100]), reading([100, 100])]
    found = pick("disagreement", 9, items(*[None] * 3), [first, second], [judge(), judge()])
    assert [i for i, _ in found] == [1, 0]
    with pytest.raises(IpvrmError, match="needs two models"):
        pick("disagreement", 9, items(None), [first[:1]], [judge()])
    assert [i for i, _ in pick("first", 2, items(*[None] * 3), [first], [judge()])] == [0, 1]


# -------------------------------------------------------------------------------------- what the block holds


def test_the_block_ends_no_script_and_has_no_nan():
    item = Item("</script>", "<!-- <script>", ("a",), None)
    found = Reading(
        ("</script>", "\u2028"),
        [1],
        np.array([1.0, math.nan]),
        np.array([0.0, -math.inf]),
        np.array([5000.4]),
        -1,
    )
    data = data_block([(0, "")], [item], [[found]], [judge(math.inf)])
    assert "<" not in block(data) and json.loads(block(data)) == data
    (trace,) = data["traces"]
    assert trace["models"][0] == {"td": [0, None], "scores": [5000], "first_error": -1}
    assert trace["texts"][0]["prob"] == [1, None] and data["models"][0]["threshold"] is None
    assert data["models"][0]["flags"] == "all"
    assert data["models"][0]["scale"] == 0  # of the one that is finite
    assert [rounded(x) for x in (1.23456, -0.00123456, 1234.5, 0.0)] == [1.23, -0.00123, 1230, 0]


def test_what_is_too_large_loses_the_candidates_that_say_least():
    choice = Choice([0, 1], ["a", "b"], [0.5, 0.4])
    found = reading([0.0], td=[0.0] * 4)
    found.choices = dict.fromkeys(range(4), choice)
    found.choices_td = {0: [0.0, 5.0], 1: [0.0, 0.1], 2: [0.0, 9.0], 3: [1.0, 1.0]}
    data = data_block([(0, "")], items(None), [[found]], [judge()])
    size = len(block(data).encode())
    assert shrink(data, size) == 0 and len(data["traces"][0]["candidates"]) == 4
    assert data["traces"][0]["dropped"] == []
    assert shrink(data, size - 40) == 2 and list(data["traces"][0]["candidates"]) == ["0", "2"]
    assert data["traces"][0]["dropped"] == [3, 1]  # which the page says of them
    assert len(block(data).encode()) <= size - 40


def qwen3_or_trained(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if folder := os.environ.get("IPVRM_TOKENIZERS"):
        return Tokenizer.from_file(str(Path(folder) / "qwen3" / "tokenizer.json"))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    return made


@pytest.mark.slow
def test_bytes_per_token_on_real_text(data_dir):
    """At most 60 a token for two models and 45 for one, all tokens of 40 real solutions: of Qwen3's where it
    is at hand, else of a BPE trained on these solutions."""
    records = json.loads((data_dir / "processbench" / "math.json").read_text())[:40]
    tokenizer = qwen3_or_trained([render_steps(record["steps"])[0] for record in records])
    rng, readings, solutions = np.random.default_rng(0), [[], []], []
    for record in records:
        text, ends = render_steps(record["steps"])
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        pieces = token_pieces(text, offsets, [""] * len(offsets))
        assert "".join(pieces) == text
        solutions.append(Item(record["id"], record["problem"], tuple(record["steps"]), record["label"]))
        for of_model in readings:
            td = rng.standard_t(2, len(pieces))
            found = Reading(
                pieces, [len(pieces) - 1] * len(ends), rng.random(len(pieces)), td, td[: len(ends)], -1
            )
            open_ = rng.permutation(len(pieces))[
                : len(pieces) // 6
            ]  # about as often as a policy has a choice
            found.choices = {int(t): Choice([0, 1], [" the", " a"], [0.6, 0.3]) for t in open_}
            found.choices_td = {t: [0.123, -0.456] for t in found.choices}
            of_model.append(found)
    tokens = sum(len(r.pieces) for r in readings[0])
    for models, most in ((1, 45), (2, 60)):
        data = data_block([(i, "") for i in range(40)], solutions, readings[:models], [judge()] * models)
        assert len(block(data).encode()) / tokens <= most


# --------------------------------------------------------------------------------------- files and commands


BOARD = {
    "prompt": "<user>1+2",
    "response": "one\n\ntwo",
    "response_tokens": ["one", "\n\n", "two", "<end>"],
    "logprobs": [-0.1, -0.2, -2.0, -0.1],
    "ref_logprobs": [-0.2, -0.2, -1.0, -0.1],
    "values": [0.5, 0.25, -3.0, 0.0],
    "reward": 0.0,
    "step": 7,
    "top0_tokens": ["one", "\n\n", "three", "<end>"],
    "top0_policy_logp": [-0.1, -0.2, -0.2, -0.1],
    "top0_advs": [0.5, 0.25, 2.0, 0.0],
    "top1_tokens": ["a", "b", "c", "d"],
    "top1_policy_logp": [-9.0, -9.0, -2.2, -9.0],
    "top1_advs": [1.0, 1.0, 1.0, 1.0],
}


def test_the_logging_board_of_the_released_code_is_read(tmp_path, capsys):
    nan = BOARD | {"values": [0.5, math.nan, -3.0, 0.0]}
    source = write_jsonl(tmp_path / "board.jsonl", [BOARD, nan])
    assert (
        main(["inspect", "--input", str(source), "--output", str(tmp_path / "x.html"), "--pick", "drop"]) == 0
    )
    data = data_in((tmp_path / "x.html").read_text(encoding="utf-8"))
    first, second = data["traces"]
    assert first["id"] == "7-1" and first["label"] is None and first["problem"] == "<user>1+2"
    assert first["texts"][0]["ends"] == [1, 3] and first["models"][0]["td"] == [0.5, 0.25, -3, 0]
    assert first["models"][0]["scores"] == [0.75, -3] and first["models"][0]["first_error"] == 1
    pieces, prob, td = first["candidates"]["2"]
    assert [data["vocabulary"][i] for i in pieces] == ["three", "c", "two"]
    assert prob == [0.819, 0.111, 0.135] and td == [2, 1, -3]
    assert list(first["candidates"]) == ["2"] and second["models"][0]["td"][1] is None
    assert "2 traces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "flags", "reason"),
    [
        ([BOARD], ["--model", "somewhere"], "leave --model out"),
        ([TRACES[0], BOARD], [], "split them"),
        ([TRACES[0]], [], "--model takes one or two run folders; got 0"),
        ([TRACES[0] | {"label": 2}], [], "`label` must be -1, one of the 2 steps"),
        ([BOARD | {"values": [1.0]}], [], "`values` must hold a number for each of the 4 tokens"),
        (
            [BOARD | {"values": [1.0, None, 1.0, 1.0]}],
            [],
            "`values` must hold a number for each of the 4 tokens",
        ),
        (
            [BOARD | {"top1_tokens": ["a", "b"]}],
            [],
            "`top1_tokens` must hold a text for each of the 4 tokens",
        ),
        (
            [BOARD | {"top0_advs": [1.0, 1.0, None, 0]}],
            [],
            "`top0_advs` must hold a number for each of the 4",
        ),
        ([BOARD | {"top0_policy_logp": None}], [], "`top0_policy_logp` must hold a number for each of the 4"),
        ([TRACES[0]], ["--k", "0"], "--k, --limit and --max_size must be positive"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path, capsys, lines, flags, reason):
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    assert main(["inspect", "--input", str(source), "--output", str(tmp_path / "x.html"), *flags]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_a_solution_that_cannot_be_scored_is_named_or_skipped(pair, tmp_path, capsys):
    from ipvrm.models.causal_lm import max_positions

    long = {"problem": "p", "steps": ["1 " * max_positions(pair[0])], "label": -1, "id": "long"}
    source = write_jsonl(tmp_path / "in.jsonl", [TRACES[0], long])
    command = ["inspect", "--input", str(source), "--output", str(tmp_path / "x.html"), "--pick", "first"]
    command += ["--model", pair[0], "--use_cpu"]
    assert main(command) == 2
    assert "long: " in capsys.readouterr().err
    assert main([*command, "--on_bad_row", "skip"]) == 0
    assert re.search(r" 2/2  [\d.]+/s$", capsys.readouterr().err, re.MULTILINE)  # how far it is
    assert [t["id"] for t in data_in((tmp_path / "x.html").read_text(encoding="utf-8"))["traces"]] == ["sum"]


def test_a_solution_with_an_infinite_log_ratio_is_named_or_skipped(pair, tmp_path, capsys, monkeypatch):
    """In the page it was a line with a gap, and a step that no threshold flags."""
    from ipvrm.models import reward_model

    real, token = reward_model._with_candidates, load_tokenizer(pair[0])("9")["input_ids"][0]

    def patched(model, reference, batch, *rest):
        own, *others = real(model, reference, batch, *rest)
        return own.masked_fill(batch.token_ids == token, -math.inf), *others

    monkeypatch.setattr(reward_model, "_with_candidates", patched)
    infinite = {"problem": "p", "steps": ["9"], "label": -1, "id": "infinite"}
    source = write_jsonl(tmp_path / "in.jsonl", [infinite, TRACES[0]])
    command = ["inspect", "--input", str(source), "--output", str(tmp_path / "x.html"), "--pick", "first"]
    command += ["--use_cpu", "--model", *pair]
    assert main(command) == 2
    assert "infinite: the log-probability under the model of response token" in capsys.readouterr().err
    assert main([*command, "--on_bad_row", "skip"]) == 0
    assert [t["id"] for t in data_in((tmp_path / "x.html").read_text(encoding="utf-8"))["traces"]] == ["sum"]


# --------------------------------------------------------------------------------------------------- palette


def palette():
    """{scheme: {name: colour}} of style.css."""
    light, dark = (VIEW / "style.css").read_text().split("@media (prefers-color-scheme: dark)")
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    return {"light": found[0], "dark": found[0] | found[1]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(scheme):
    colours = palette()[scheme]
    of_ink = re.findall(
        r"\.([np]\d) small", (VIEW / "trace.html").read_text()
    )  # signs in the token's own ink
    pairs = [(text, behind) for text in ("ink", "second", "label", "flag") for behind in ("page", "panel")]
    pairs += [("ink", f"{sign}{n}") for sign in "np" for n in (1, 2)]
    pairs += [("strong", f"{sign}{n}") for sign in "np" for n in (3, 4)]
    pairs += [("second", f"{sign}{n}") for sign in "np" for n in (1, 2, 3, 4) if f"{sign}{n}" not in of_ink]
    pairs += [("page", "ink")]  # a pressed button
    pairs += [(text, "label-band") for text in ("ink", "second", "label", "flag")]
    low = {pair: round(c, 2) for pair in pairs if (c := contrast(*(colours[name] for name in pair))) < 4.5}
    assert not low
    assert contrast("#777777", "#888888") < 4.5  # what this test is for


def test_a_problem_of_many_lines_is_one_line_until_opened():
    """Prompts of a logging board begin with a line of the chat template alone."""
    css = (VIEW / "trace.html").read_text()
    closed, opened = (re.search(rf"#problem{state} {{([^}}]*)}}", css)[1] for state in ("", r"\.open"))
    assert "white-space" not in closed and "white-space: pre-wrap" in opened


def test_the_template_stays_small():
    assert (
        sum((VIEW / name).stat().st_size for name in ("style.css", "trace.html", "dom.js", "trace.js"))
        <= 30_000
    )


SPEED = Path(__file__).parents[2] / "benchmarks" / "results" / "inspect_speed-amd-zen-3.json"


@pytest.mark.skipif(not SPEED.exists(), reason="no checkout with benchmarks/results beside the tests")
def test_the_readme_states_the_speed_that_was_measured():
    found = json.loads(SPEED.read_text())
    best = {name: min(one[name] for one in found["tries"]) for name in ("opened", "move", "frame")}
    text = " ".join((VIEW / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"is there in {best['opened'] / 1000:.2f} s, the cursor moves in {best['move']:.1f} ms, "
        f"and at 400 px each 95 of 100 frames take at most {best['frame']:.0f} ms "
        f"(the best of {len(found['tries'])} tries, "
        f"{found['machine']['browser']} without a GPU, {found['machine']['processor']}, idle: "
        f"a load of {found['machine']['load']:.1f} on {found['machine']['cores']} cores)"
    ) in text
    assert found["machine"]["load"] < 1
    assert f"opening in a fresh browser takes longer ({found['tries'][0]['opened'] / 1000:.2f} s)" in text


# ------------------------------------------------------------------------------------------ the walk-through


@pytest.mark.slow
def test_the_walk_through_of_the_readme_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (VIEW / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {n} + 1?", "response": f"Answer: {n + 1 + n % 2}", "label": 1 - n % 2}
        for n in range(12)
    ]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    exec(code.replace("Qwen/Qwen3-0.6B-Base", str(tiny_folder)), {})
    out = capsys.readouterr().out
    assert "step 2" in out and "first step below the threshold:" in out
    (trace,) = data_in((tmp_path / "trace.html").read_text(encoding="utf-8"))["traces"]
    assert trace["label"] == 1 and len(trace["models"][0]["scores"]) == 3
