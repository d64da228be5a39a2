"""Reward models that compare responses (dpo, q_rm), pairs and where they come from, and EndoRM."""

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import pytest
import torch
from runs import log_of, same_bits, train, weights, write_jsonl
from safetensors.torch import load_file, save_file

from ipvrm import IpvrmError, RewardModel
from ipvrm.data.files import records
from ipvrm.data.preference import pairs_of, split_preference
from ipvrm.data.responses import Response
from ipvrm.data.rows import read_rows
from ipvrm.evaluate.score import ScoreConfig, score_file
from ipvrm.models.causal_lm import load_model
from ipvrm.models.reward_model import Score, read_info
from ipvrm.reproduce.td_branches import Answer, Branch, Brancher, BranchOptions
from ipvrm.rollouts.answers import Question
from ipvrm.rollouts.verify import Verdict
from ipvrm.training.reward_config import RewardConfig

PROBLEM, STEPS = "What is 1 + 2?", ["carry 0.", "carry 1 and more.", "Answer: 3"]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """12 prompts of four responses; the first word says which are right; two prompts are all of one kind."""
    rng, rows = random.Random(0), []
    for number, sample in itertools.product(range(12), range(4)):
        label = int(number == 0 or (number > 1 and sample % 2))
        word = "carry" if label else "Answer"
        rows.append(
            {"prompt": f"What is {number}?", "response": f"I {word} {rng.randint(0, 99)}", "label": label}
        )
    return write_jsonl(tmp_path_factory.mktemp("groups") / "rows.jsonl", rows)


@pytest.fixture
def config(tiny_folder, groups, tmp_path):
    def make(name="run", **changes):
        settings = {
            "model": str(tiny_folder),
            "train_data": str(groups),
            "output_dir": str(tmp_path / name),
            "global_batch_size": 8,
            "learning_rate": 1e-2,
            "use_cpu": True,
        }
        return RewardConfig(**(settings | changes))

    return make


# ------------------------------------------------------------------------------------------------- pairs


def test_pairs_by_hand():
    groups, right = list("aaabbcaa"), [1, 0, 0, 1, 1, 0, 1, 0]
    pairs, counts = pairs_of(groups, right, "all", 0)
    assert sorted(pairs) == sorted(itertools.product((0, 6), (1, 2, 7)))
    assert counts == {"pairs": 6, "mixed_prompts": 1, "only_right_prompts": 1, "only_wrong_prompts": 1}
    drawn = [pairs_of(groups, right, "one", seed)[0] for seed in range(200)]
    assert all(len(found) == 1 for found in drawn) and pairs_of(groups, right, "one", 3)[0] == drawn[3]
    seen = Counter(found[0] for found in drawn)
    assert set(seen) == set(pairs) and min(seen.values()) > 15  # 200 / 6 each


CHAT = [{"role": "user", "content": "q"}]
RIGHT, WRONG = {"role": "assistant", "content": "r"}, {"role": "assistant", "content": "w"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "r", "rejected": "w"},
        {"prompt": CHAT, "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": "q", "chosen": [*CHAT, RIGHT], "rejected": [*CHAT, WRONG]},
        {"prompt": None, "chosen": [*CHAT, RIGHT], "rejected": [*CHAT, WRONG]},
        {"prompt": CHAT, "chosen": "r", "rejected": "w"},
    ],
)
def test_preference_formats(record, tmp_path):
    rows, _ = read_rows(write_jsonl(tmp_path / "pairs.jsonl", [record]))
    assert [(row.response, row.label) for row in rows] == [("r", 1), ("w", 0)]
    assert rows[0].source == rows[1].source and rows[0].prompt in ("q", tuple(CHAT))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "r", "rejected": "w"}, "chosen: a text needs a `prompt`"),
        ({"prompt": "q", "chosen": "r", "rejected": 3}, "rejected: must be text or messages; got 3"),
        ({"prompt": "p", "chosen": [*CHAT, RIGHT], "rejected": [*CHAT, WRONG]}, "not those of `prompt`"),
        (
            {"chosen": [*CHAT, RIGHT], "rejected": [{"role": "user", "content": "p"}, WRONG]},
            "answer different prompts",
        ),
        ({"prompt": "q", "chosen": "r", "rejected": "w", "label": 1}, "stand beside `label`"),
    ],
)
def test_preferences_that_cannot_be_used(record, reason):
    with pytest.raises(ValueError, match=reason):
        split_preference(record)


TRAIN_FILES = (
    "train.jsonl", "data/train-00000.jsonl.gz", "data/train/0.parquet", "v2_train.json", "train2.json",
    "data/pretrain-0.jsonl", "training.jsonl", "test.jsonl", "train.txt",
)  # fmt: skip


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """`org/name` is its split train; offline it ends in one line."""
    record = [{"prompt": "q", "response": "r", "label": 1}]
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl"):
        (tmp_path / "snapshot" / "data").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "snapshot" / "data" / name, record)
    asked = []

    def snapshot_download(name, **options):
        fetched = [f for f in TRAIN_FILES if any(fnmatch(f, p) for p in options["allow_patterns"])]
        asked.append((name, options["repo_type"], fetched))
        return str(tmp_path / "snapshot")

    with pytest.raises(
        IpvrmError, match=r"^someone/data: neither a file or folder nor a data set .*"
    ) as error:
        read_rows("someone/data")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(list(records("someone/data", None))) == 2
    assert asked == [("someone/data", "dataset", list(TRAIN_FILES[:5]))]
    assert [Path(r.file).name for r in records("someone/data:test", None)] == ["test.jsonl"]
    with pytest.raises(IpvrmError, match="its split validation must be in one folder.*none"):
        read_rows("someone/data:validation")
    write_jsonl(tmp_path / "snapshot" / "train.jsonl", record)
    with pytest.raises(IpvrmError, match="must be in one folder; .*Name the split"):
        read_rows("someone/data")
    with pytest.raises(IpvrmError, match="no such file"):
        read_rows("some/where/else.jsonl")


@pytest.mark.parametrize(
    ("split", "files", "found"),
    [
        ("math", ["math.json", "omnimath.json", "mathematics.json"], ["math.json"]),
        ("train", ["pretrain-00000.jsonl", "train-00000.jsonl", "trainer.jsonl"], ["train-00000.jsonl"]),
        ("train", ["my_train.v2.jsonl", "train2.jsonl"], ["my_train.v2.jsonl", "train2.jsonl"]),
        ("train", ["pretrain/a.jsonl", "train/a.jsonl", "train/b.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
    ],
)
def test_a_split_is_a_word_of_its_own(tmp_path, monkeypatch, split, files, found):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"prompt": "q", "response": "r", "label": 1}])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path))
    taken = [Path(r.file).relative_to(tmp_path).as_posix() for r in records(f"someone/data:{split}", None)]
    assert taken == found


def test_a_pair_is_dropped_whole(config, tmp_path):
    """One of its responses is too long; the counts say so, and the other pair is trained on."""
    rows = [
        {"prompt": "q", "chosen": "carry " * 200, "rejected": "Answer"},
        {"prompt": "q", "chosen": "carry", "rejected": "Answer"},
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    result = train(config(train_data=str(data), objective="dpo", max_length=64))
    counts = result.metrics["data"]
    assert (counts["pairs"], counts["only_wrong_prompts"], counts["too_long_dropped"]) == (1, 1, 1)
    assert (counts["right"], counts["wrong"]) == (1, 2)
    with pytest.raises(IpvrmError, match="nothing that dpo can compare"):
        train(config("none", train_data=str(write_jsonl(data, rows[:1])), objective="dpo", max_length=64))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "pairs"), [("dpo", "one"), ("q_rm", "all")])
def test_it_learns(config, groups, objective, pairs):
    result = train(config(objective=objective, pairs=pairs, eval_data=str(groups), num_train_epochs=6))
    assert result.metrics["data"]["pairs"] == {"one": 10, "all": 40}[pairs]
    assert result.metrics["eval"]["eval_pair_accuracy"] == 1.0
    assert result.metrics["eval"]["eval_loss"] < 0.6 * log_of(result.output_dir)[0]["eval_loss"]
    model = RewardModel.from_pretrained(result.output_dir, device="cpu")
    right, wrong = (
        model.score("What is 5?", [f"I {word} 7"], step_format="{step}") for word in ("carry", "Answer")
    )
    assert right.mean_values[-1] > wrong.mean_values[-1]


@pytest.mark.slow
def test_the_step_of_a_q_rm_by_hand(config, tiny_folder, groups):
    """One update against plain PyTorch: the state after each token, its mean, one pair at a time."""
    start = train(config("start", objective="q_rm", max_steps=1, learning_rate=1e-9)).output_dir
    settings = {"pairs": "all", "global_batch_size": 40, "max_steps": 1, "max_grad_norm": 0.0}
    result = train(config(model=str(start), objective="q_rm", learning_rate=1e-3, **settings))

    model = RewardModel.from_pretrained(start, device="cpu")
    body, head = model.model, model.value_head
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.0)
    means = []
    for line in groups.read_text().splitlines():
        row = json.loads(line)
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = model.tokenizer(prompt + row["response"] + "<|im_end|>").input_ids
        states = body(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        means.append((states[len(model.tokenizer(prompt).input_ids) :] @ head.weight[0]).mean())
    losses = [
        torch.nn.functional.softplus(2.0 - 0.2 * (means[4 * prompt + right] - means[4 * prompt + wrong]))
        for prompt in range(2, 12)
        for right, wrong in itertools.product((1, 3), (0, 2))
    ]
    torch.stack(losses).mean().backward()
    optimizer.step()
    got = RewardModel.from_pretrained(result.output_dir, device="cpu")
    torch.testing.assert_close(got.value_head.weight, head.weight, rtol=1e-4, atol=1e-5)
    for name, parameter in body.named_parameters():
        if name != "lm_head.weight":
            torch.testing.assert_close(got.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_pair_file_gives_what_its_rows_give(config, groups, tmp_path):
    """`--pairs all` of two responses a prompt, and the same as a file of pairs: the same weights."""
    rows = [json.loads(line) for line in groups.read_text().splitlines()]
    two = [rows[4 * k + i] for k in range(2, 12) for i in (1, 0)]
    pairs = [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
        for a, b in zip(two[::2], two[1::2], strict=True)
    ]
    one = train(config("rows", train_data=str(write_jsonl(tmp_path / "two.jsonl", two)), objective="dpo"))
    data = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    other = train(config("pairs", train_data=data, objective="dpo", per_device_train_batch_size=64))
    for name, value in weights(one.output_dir).items():
        torch.testing.assert_close(value, weights(other.output_dir)[name], rtol=1e-4, atol=1e-5)
    assert train(config("single", train_data=data)).metrics["data"]["used"] == 20  # each a row of its own


@pytest.mark.slow
def test_a_q_rm_resumes_to_the_same_bits(config):
    whole = train(config("whole", objective="q_rm", max_steps=4))
    stopped = config("stopped", objective="q_rm", max_steps=4, save_steps=2)
    first = train(stopped).output_dir
    (first / "ipvrm_config.json").unlink()
    resumed = train(config("stopped", objective="q_rm", max_steps=4, resume_from_checkpoint="auto"))
    assert same_bits(whole.output_dir, resumed.output_dir)
    heads = [load_file(r.output_dir / "value_head.safetensors")["weight"] for r in (whole, resumed)]
    assert torch.equal(*heads)


def test_the_folder_of_a_q_rm(config, tmp_path):
    folder = train(config(objective="q_rm", max_steps=1)).output_dir
    info = json.loads((folder / "ipvrm_config.json").read_text())
    assert (info["objective"], info["beta"], info["margin"], info["reference"]) == ("q_rm", 0.2, 2.0, "")
    card = (folder / "README.md").read_text()
    assert "# Q-RM" in card and "value head" in card and "log-ratio" not in card
    model = RewardModel.from_pretrained(folder, device="cpu")
    with pytest.raises(IpvrmError, match="'q_rm' has token rewards, and no log-probs"):
        model.score(PROBLEM, STEPS, min_prob=0.1)
    assert "logprobs" not in model.score(PROBLEM, STEPS).by_token()
    model.save_pretrained(tmp_path / "copy")
    again = RewardModel.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(model.score(PROBLEM, STEPS).td, again.score(PROBLEM, STEPS).td)
    with pytest.raises(IpvrmError, match="a q_rm reward model has no reference"):
        RewardModel.from_pretrained(folder, reference=folder)
    for objective in ("ipvrm", "implicit_prm", "dpo"):
        with pytest.raises(IpvrmError, match=rf"it has a value head, and {objective} has no place.*Eq. 5"):
            train(config("refused", model=str(folder), objective=objective))
    head = folder / "value_head.safetensors"
    save_file({"weight": 2 * load_file(head)["weight"]}, head)
    with pytest.raises(IpvrmError, match="weights or config are not those"):
        RewardModel.from_pretrained(folder)
    head.unlink()
    with pytest.raises(IpvrmError, match="weights or config are not those"):
        RewardModel.from_pretrained(folder)


def test_lora_of_a_q_rm(config):
    folder = train(config(objective="q_rm", max_steps=2, lora_r=2)).output_dir
    assert (folder / "adapter").is_dir()
    assert RewardModel.from_pretrained(folder, device="cpu").score(PROBLEM, STEPS).td.abs().max() > 0


# ------------------------------------------------------------------------------------------------- endo_rm


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_endo_rm_by_hand(tiny_folder, scale):
    model = RewardModel.from_causal_lm(tiny_folder, scale=scale, device="cpu")
    responses = [Response(tuple(range(5, 5 + n)), 3) for n in (4, 30, 11)]
    lm = load_model(tiny_folder).double()
    for ended in (True, False):
        found = model.token_log_ratios(responses, batch_tokens=40, ended=ended)
        for response, got in zip(responses, found, strict=True):
            ids = torch.tensor([response.input_ids])
            with torch.no_grad():
                z = lm(ids).logits[0]  # (T, V)
            value = (
                scale * torch.logsumexp(z / scale, -1)[2:]
            )  # before each response token, and after the last
            if ended:
                value[-1] = 0.0
            logp = (z / scale).log_softmax(-1)[2:-1].gather(1, ids[0, 3:, None])[:, 0]
            want = scale * logp + value[:-1] - value[1:]
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_endo_rm_is_discounted(tiny_folder):
    model = RewardModel.from_pretrained(tiny_folder, device="cpu", objective="endo_rm")
    (solution,) = model.solution_log_ratios([(PROBLEM, STEPS)])
    r, steps = solution.log_ratio, solution.steps_of_token
    decayed = [0.95**t * float(x) for t, x in enumerate(r)]
    score, prefix = (model.score(PROBLEM, STEPS, rule=rule) for rule in ("step", "prefix"))
    assert score.td.tolist() == pytest.approx(decayed, rel=1e-4)
    assert float(score.prefix_values[-1]) == pytest.approx(sum(decayed), rel=1e-4)
    assert float(prefix.step_scores[0]) == pytest.approx(
        sum(decayed[: int(prefix.step_ends[0]) + 1]), rel=1e-4
    )
    second = r[steps == 1]  # of a step on its own the discount begins with the step
    want = sum(0.95**t * float(x) for t, x in enumerate(second))
    assert float(score.step_scores[1]) == pytest.approx(want, rel=1e-4)
    before = int((steps == 1).int().argmax())  # and TD with the response
    assert float(score.td[steps == 1].sum()) == pytest.approx(0.95**before * want, rel=1e-4)


def test_where_the_discount_of_endo_rm_begins_is_said(capsys):
    from ipvrm.cli import parse

    with pytest.raises(SystemExit):
        parse(ScoreConfig, ["--help"], prog="score")
    shown = " ".join(capsys.readouterr().out.translate(dict.fromkeys(map(ord, "│╭╰─╮╯"), " ")).split())
    guide = (Path(__file__).parents[2] / "ipvrm" / "README.md").read_text(encoding="utf-8")
    for text in (" ".join(words.split()) for words in (shown, Score.__doc__ or "", guide)):
        assert "response's first token" in text and "later step" in text and "from_causal_lm" in text


def test_endo_rm_has_nothing_to_save_or_to_refer_to(tiny_folder, tmp_path):
    with pytest.raises(IpvrmError, match="nothing of its own to save"):
        RewardModel.from_causal_lm(tiny_folder, device="cpu").save_pretrained(tmp_path / "x")
    with pytest.raises(IpvrmError, match="no reference"):
        RewardModel.from_pretrained(tiny_folder, tiny_folder, objective="endo_rm")
    with pytest.raises(IpvrmError, match="scale must be positive"):
        RewardModel.from_causal_lm(tiny_folder, scale=0.0)


def test_score_takes_endo_rm_and_gives_td_per_token(tiny_folder, tmp_path):
    data = write_jsonl(tmp_path / "in.jsonl", [{"problem": PROBLEM, "steps": STEPS}])
    config = ScoreConfig(
        str(tiny_folder), str(data), str(tmp_path / "out.jsonl"), objective="endo_rm", use_cpu=True
    )
    assert score_file(config, progress=False) == 1
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert "td" not in record
    config = replace(config, output=str(tmp_path / "tokens.jsonl"), per_token=True)
    assert score_file(config, progress=False) == 1
    tokens = json.loads((tmp_path / "tokens.jsonl").read_text())
    assert sum(tokens["td"]) == pytest.approx(record["value"], rel=1e-4)
    assert tokens == tokens | record and "logprobs" not in tokens  # of a model and its reference
    with pytest.raises(IpvrmError, match=NO_REWARD_MODEL + OWN_LOGITS):
        score_file(replace(config, objective=None, output=str(tmp_path / "x.jsonl")), progress=False)


NO_REWARD_MODEL = "no ipvrm_config.json; .* Train a reward model with `ipvrm train-rm`"
OWN_LOGITS = (
    "; or .* own logits: --objective endo_rm of `ipvrm score` and `ipvrm eval`, RewardModel.from_causal_lm"
)


def test_own_logits_are_named_only_where_they_can_be_had(tiny_folder):
    """A server does not give them, and nothing is trained against them."""
    served = ["http://127.0.0.1:9/v1"] * 2
    with pytest.raises(IpvrmError, match=NO_REWARD_MODEL + "$"):
        RewardModel.from_pretrained(tiny_folder, servers=served)
    with pytest.raises(IpvrmError, match=NO_REWARD_MODEL + "$"):
        read_info(tiny_folder)


def test_the_branches_of_eval_td_agree_with_the_values(tiny_folder):
    """The td of the sampled token is the step from the value before it to that behind it, also under EndoRM,
    whose reward looks one state ahead; at the end of the turn that state has the value 0."""
    model = RewardModel.from_causal_lm(tiny_folder, device="cpu")
    ids = tuple(range(5, 14))
    answer = Answer(cast(Question, None), 0, Response(ids, 3, 1), cast(Verdict, None))
    options = BranchOptions(1, 1, 1, 0.1, None, 8, 1.0, 8, 8192, 0)
    brancher = Brancher(options, model.model, model, None, None, {ids[-1]}, None)
    brancher._values([answer])
    before = [0.0, *answer.value.tolist()]
    branches = [Branch(ids[: 4 + t], (0, 0, t, 1), ids[3 + t], 0.0, before[t]) for t in range(6)]
    brancher._td(branches)
    assert [b.value + b.td for b in branches] == pytest.approx(answer.value.tolist(), rel=1e-4, abs=1e-5)
