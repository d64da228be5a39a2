"""Offline policy training: what `rollout --min_prob` stores, that `label` keeps it, and what is learnt of it.

The toy task is that of test_train_policy.py.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from runs import log_of, same_bits, train, weights, write_jsonl

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed packages

from benchmarks.faults.toy import make_toy
from ipvrm import IpvrmError
from ipvrm.models.causal_lm import CandidateLogprobs, load_model, load_tokenizer, weights_hash
from ipvrm.models.reward_model import read_info, reference_entries, write_info
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.training import optimizer
from ipvrm.training.policy_config import PolicyConfig, resolve
from ipvrm.training.policy_rollouts import Collector
from ipvrm.training.stored_rollouts import StoredRollouts

BEHAVIOUR = (
    "old_logprobs", "candidate_ids", "old_candidate_logprobs", "temperature", "min_prob", "policy_hash"
)  # fmt: skip
SCORED = ("rm_logprobs", "rm_candidate_logprobs", "rm_hash")
TEMPERATURE = 1.5  # responses of several lengths


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the policy `sft`, the reward model `ipvrm`, `rollouts.parquet` and, labelled,
    `scored.parquet` and, without the reward model's columns, `data.parquet`."""
    folder = make_toy(tmp_path_factory.mktemp("toy"), ("ipvrm",))
    sys.path.insert(0, str(folder))
    rollouts = RolloutConfig(
        str(folder / "sft"),
        str(folder / "prompts.jsonl"),
        str(folder / "rollouts.parquet"),
        limit=16,
        max_new_tokens=6,
        temperature=TEMPERATURE,
        min_prob=0.1,
        reward_model=str(folder / "ipvrm"),
        per_device_eval_batch_size=24,
        use_cpu=True,
    )
    roll_out(rollouts, progress=False)
    label = LabelConfig(rollouts.output, str(folder / "scored.parquet"), "toy_verifiers:first", num_workers=1)
    label_file(label, progress=False)
    labelled = pq.read_table(folder / "scored.parquet")
    pq.write_table(labelled.drop_columns(list(SCORED)), folder / "data.parquet")
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def config(toy, tmp_path):
    def make(name="run", **changes):
        settings = {
            "model": str(toy / "sft"),
            "train_data": str(toy / "data.parquet"),
            "output_dir": str(tmp_path / name),
            "reward_model": str(toy / "ipvrm"),
            "offline": True,
            "temperature": TEMPERATURE,
            "train_prompts": 8,
            "minibatch_size": 64,
            "per_device_train_batch_size": 16,
            "lora_r": 0,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
        }
        if changes.get("algorithm") == "grpo":
            del settings["reward_model"]
        return PolicyConfig(**(settings | changes))

    return make


def rows_of(path):
    return pq.read_table(path).to_pylist()


@pytest.mark.slow
def test_what_is_stored_is_what_the_policy_that_sampled_knows(toy):
    model, reward = load_model(toy / "sft", torch.float64), load_model(toy / "ipvrm", torch.float64)
    rows = rows_of(toy / "rollouts.parquet")
    assert len(rows) == 64 and len({row["response_tokens"] for row in rows}) > 1
    several = 0
    for row in rows:
        ids = row["prompt_ids"] + row["response_ids"]
        places = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            logits = [m(torch.tensor([ids])).logits[0, places] for m in (model, reward)]
        logprobs, of_reward = ((x / TEMPERATURE).log_softmax(-1) for x in logits)  # (T, V)
        for name, under in (("old_logprobs", logprobs), ("rm_logprobs", of_reward)):
            sampled = under.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(row[name]).double(), sampled, atol=1e-5, rtol=0)
        assert (row["temperature"], row["min_prob"]) == (TEMPERATURE, 0.1)
        assert row["policy_hash"] == weights_hash(toy / "sft")
        assert row["rm_hash"] == weights_hash(toy / "ipvrm")
        assert row["candidate_ids"][-1] == row["old_candidate_logprobs"][-1] == []  # it carries the outcome
        assert row["rm_candidate_logprobs"][-1] == []
        for t, of_ids in enumerate(row["candidate_ids"][:-1]):
            found = row["old_candidate_logprobs"][t]
            probable = {i for i, p in enumerate(logprobs[t].exp().tolist()) if p >= 0.1}
            assert {*of_ids} == probable and len(of_ids) == len(found)
            torch.testing.assert_close(torch.tensor(found).double(), logprobs[t][of_ids], atol=1e-5, rtol=0)
            found = torch.tensor(row["rm_candidate_logprobs"][t]).double()
            torch.testing.assert_close(found, of_reward[t][of_ids], atol=1e-5, rtol=0)
            several += len(of_ids) > 1
    assert several > 20


def small(toy, tmp_path, **more):
    """Settings of eight responses."""
    return RolloutConfig(
        str(toy / "sft"), str(toy / "prompts.jsonl"), str(tmp_path / "o.parquet"), limit=2, max_new_tokens=3,
        use_cpu=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sampled", "candidate"])
def test_a_log_prob_that_is_infinite_under_the_reward_model_is_not_stored(toy, tmp_path, monkeypatch, kind):
    """It was a traceback of the writer, or a row that no later command reads."""
    import ipvrm.rollouts.rollout as rollout

    real = rollout.candidate_logprobs

    def patched(*arguments):
        own, ids, of_ids = real(*arguments)
        if kind == "sampled":
            return CandidateLogprobs(own - torch.inf, ids, of_ids)
        return CandidateLogprobs(own, ids, of_ids - torch.inf)

    monkeypatch.setattr(rollout, "candidate_logprobs", patched)
    with pytest.raises(
        IpvrmError, match=r"--reward_model: prompt \d: the log-probability.* is -inf; a value"
    ):
        roll_out(small(toy, tmp_path, min_prob=0.1, reward_model=str(toy / "ipvrm")), progress=False)


@pytest.mark.parametrize("which", ["reward model", "reference"])
def test_rows_beyond_the_reward_models_positions_are_refused(config, toy, tmp_path, which):
    """They fit the policy, which sampled them."""
    rows = rows_of(toy / "data.parquet")
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    short, rm = tmp_path / "short", tmp_path / "rm"
    shutil.copytree(toy / ("ipvrm" if which == "reward model" else "sft"), short)
    stored = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(stored | {"max_position_embeddings": longest - 1}))
    changes = {"reward_model": str(short)}
    if which == "reference":
        shutil.copytree(toy / "ipvrm", rm)
        changes = {"reward_model": str(rm), "td_reference": "sft"}
    reference = short if which == "reference" else toy / "sft"
    folder = Path(changes["reward_model"])
    write_info(folder, replace(read_info(folder), **reference_entries(reference, folder)))
    with pytest.raises(
        IpvrmError, match=rf"{longest} tokens.* more than the {longest - 1} positions of the models"
    ):
        train(config(**changes))


def test_nothing_is_stored_unless_asked_for(toy, tmp_path):
    roll_out(small(toy, tmp_path), progress=False)
    assert not {*rows_of(tmp_path / "o.parquet")[0]} & {*BEHAVIOUR, *SCORED}
    stored = rows_of(toy / "rollouts.parquet")
    for row in rows_of(toy / "scored.parquet"):
        before = stored[row["row"] - 1]  # counted from 1
        for name in (*BEHAVIOUR, *SCORED):
            assert row[name] == before[name]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_prob": 0.001}, "min_prob must lie in"),
        ({"min_prob": 0.1, "top_p": 0.9}, "--top_p 1"),
        ({"min_prob": 0.1, "top_k": 3}, "--top_k 0"),
        ({"min_prob": 0.1, "temperature": 0.0, "num_generations": 1}, "--temperature above 0"),
        ({"min_prob": 0.1, "engine": "http://localhost:1/v1", "reward_model": "rm"}, "--engine transformers"),
        ({"reward_model": "ipvrm"}, "of the tokens that --min_prob finds"),
    ],
)
def test_log_probs_that_are_not_those_of_the_draw_are_not_stored(toy, tmp_path, changes, reason):
    settings = RolloutConfig(str(toy / "sft"), str(toy / "prompts.jsonl"), str(tmp_path / "o.parquet"))
    with pytest.raises(IpvrmError, match=reason):
        roll_out(replace(settings, **changes), progress=False)


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("objective", "q_rm", "--reward_model needs one"),
        ("template_hash", "0" * 64, "trained with another chat template"),
        ("weights_hash", "0" * 64, "its weights or config are not those"),
    ],
)
def test_a_reward_model_that_cannot_speak_of_these_tokens_is_refused(toy, tmp_path, entry, value, reason):
    other = tmp_path / "other"
    shutil.copytree(toy / "ipvrm", other)
    stored = json.loads((other / "ipvrm_config.json").read_text())
    (other / "ipvrm_config.json").write_text(json.dumps(stored | {entry: value}))
    with pytest.raises(IpvrmError, match=reason):
        roll_out(small(toy, tmp_path, min_prob=0.1, reward_model=str(other)), progress=False)


def test_a_reward_model_that_read_prompts_of_other_template_variables_is_said(toy, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(toy / "ipvrm", other)
    stored = json.loads((other / "ipvrm_config.json").read_text())
    (other / "ipvrm_config.json").write_text(
        json.dumps(stored | {"chat_template_kwargs": {"thinking": True}})
    )
    words = (
        "trained with --chat_template_kwargs '{\"thinking\": true}', and these prompts are written with '{}'"
    )
    for folder, said in ((other, True), (toy / "ipvrm", False)):
        roll_out(small(toy, tmp_path, min_prob=0.1, reward_model=str(folder)))
        assert (words in " ".join(capsys.readouterr().err.split())) == said


def test_rollouts_are_made_again_for_a_reward_model(toy, tmp_path):
    for given in (None, str(toy / "ipvrm")):
        roll_out(small(toy, tmp_path, min_prob=0.1, reward_model=given), progress=False)
        row = rows_of(tmp_path / "o.parquet")[0]
        assert {*row} >= {*BEHAVIOUR} and ({*row} >= {*SCORED}) == (given is not None)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["distrl", "grpo_prm", "grpo"])
def test_an_offline_update_is_the_online_update_on_the_same_rollouts(
    config, toy, tmp_path, monkeypatch, algorithm
):
    """Online, the same responses are given to the trainer without what was stored of them."""
    # Adam's first step is lr * g / (|g| + epsilon): with a small epsilon a gradient of rounding errors alone
    # would move a weight as far as any other
    offline = config("offline", algorithm=algorithm, lr_scheduler_type="constant")
    monkeypatch.setattr(optimizer, "EPSILON", 1e-3)
    train(offline)
    stored = stored_of(offline)

    def collect(collector, place):
        rollouts, place, numbers = stored.collect(place, torch.device("cpu"))
        nothing = torch.empty(0)
        rollouts.old_logprobs = rollouts.candidate_ids = rollouts.old_candidate_logprobs = nothing
        return rollouts, place, numbers

    monkeypatch.setattr(Collector, "collect", collect)
    frozen = {} if algorithm == "grpo" else {"rm_update": "frozen"}
    prompts = str(toy / "prompts.jsonl")
    more = {"train_data": prompts, "max_new_tokens": 6, "verifier": "toy_verifiers:first"} | frozen
    online = replace(offline, offline=False, output_dir=str(tmp_path / "online"), **more)
    train(online)
    got, want, start = (weights(f) for f in (offline.output_dir, online.output_dir, toy / "sft"))
    assert max(float((want[name] - start[name]).abs().max()) for name in want) > 1e-4
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=0)
    if algorithm == "distrl":
        assert log_of(offline.output_dir)[0]["candidate_loss"] != 0


def reward_model_without_weights(toy, tmp_path):
    """A copy of the reward model's folder that nobody can load."""
    copy = tmp_path / "without_weights"
    shutil.copytree(toy / "ipvrm", copy, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    with pytest.raises(IpvrmError, match=r"no model\.safetensors"):
        load_model(copy)
    return str(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"algorithm": "distrl"}, {"algorithm": "grpo_prm"}, {"algorithm": "distrl", "td_reference": "sft"}],
    ids=["distrl", "grpo_prm", "distrl-sft"],
)
def test_an_update_from_stored_scores_is_that_of_the_reward_model_whose_weights_it_does_not_read(
    config, toy, tmp_path, monkeypatch, changes
):
    monkeypatch.setattr(optimizer, "EPSILON", 1e-3)  # as in the test above
    settings = {"lr_scheduler_type": "constant"} | changes
    scoring = config("scoring", **settings)
    stored = config(
        "stored",
        train_data=str(toy / "scored.parquet"),
        reward_model=reward_model_without_weights(toy, tmp_path),
        **settings,
    )
    train(scoring)
    train(stored)
    got, want, start = (weights(f) for f in (stored.output_dir, scoring.output_dir, toy / "sft"))
    assert max(float((want[name] - start[name]).abs().max()) for name in want) > 1e-4
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=0)
    records = [log_of(c.output_dir)[0] for c in (stored, scoring)]
    for name in ("rm_scored_auc", "value_right", "value_wrong", "value_std"):
        assert records[0][name] == pytest.approx(records[1][name], abs=1e-4)
    written = [(Path(c.output_dir) / "reward_model").is_dir() for c in (stored, scoring)]
    assert written == [False, True]


def test_some_rows_without_scores_are_scored_with_all_others(config, toy, tmp_path):
    rows = rows_of(toy / "scored.parquet")
    whole = stored_of(config(train_data=str(toy / "scored.parquet")))
    assert whole.scored and whole.counts["rm_scored"] == whole.counts["rows"] - whole.counts["truncated"]
    learnt = {s.response.source for group in whole.groups for s in group}
    source = min(learnt, key=lambda s: int(s.rpartition(":")[2]))
    place = int(source.rpartition(":")[2]) - 1
    rows[place] = without(*SCORED)(rows[place])
    write_jsonl(tmp_path / "data.jsonl", rows)
    found = stored_of(config(train_data=str(tmp_path / "data.jsonl")))
    assert not found.scored and found.counts["rm_scored"] == whole.counts["rm_scored"] - 1
    assert not len(found.collect(0, torch.device("cpu"))[0].rm_logprobs)
    assert not stored_of(config(algorithm="grpo", train_data=str(toy / "scored.parquet"))).scored


def test_scores_of_another_reward_model_end_the_run_though_bad_rows_are_skipped(config, toy, tmp_path):
    rows = rows_of(toy / "scored.parquet")
    rows[2]["rm_hash"] = "0" * 64
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(IpvrmError) as error:
        train(config(train_data=str(tmp_path / "data.jsonl"), on_bad_row="skip"))
    own = weights_hash(toy / "ipvrm")[:12]
    for words in ("data.jsonl:3: its rm_logprobs", f"sha256 {'0' * 12})", f"{toy / 'ipvrm'} ({own})"):
        assert words in str(error.value)


def test_a_reference_that_stored_scores_do_not_need_is_refused(config, toy):
    with pytest.raises(IpvrmError, match="nothing reads --reference"):
        train(config(train_data=str(toy / "scored.parquet"), reference=str(toy / "sft")))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["data", "scored"])
def test_an_offline_run_resumes_to_the_same_bits(config, toy, tmp_path, data):
    more = {"train_data": str(toy / f"{data}.parquet")}
    if data == "scored":
        more["reward_model"] = reward_model_without_weights(toy, tmp_path)
    whole = config("whole", max_steps=3, save_steps=1, save_total_limit=9, train_prompts=5, **more)
    train(whole)
    first = config("first", max_steps=3, save_steps=1, train_prompts=5, **more)
    (tmp_path / "first").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "first" / "checkpoint-1")
    train(replace(first, resume_from_checkpoint="auto"))
    assert same_bits(whole.output_dir, first.output_dir)
    log = log_of(whole.output_dir)
    assert [line["prompts_seen"] for line in log] == [5, 10, 15]  # into the next epoch: a step goes on
    assert {line["prompts"] for line in log} == {5} and all(0 < line["rollout_accuracy"] < 1 for line in log)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "prime"}, "--offline is for distrl, grpo, grpo_prm; algorithm 'prime' has to sample"),
        ({"rm_update": "before"}, "--rm_update before: a reward model that learns is saved with the policy"),
        ({"candidate_mode": "top_k"}, "candidates are those of --candidate_mode min_prob"),
        ({"num_generations": 4}, "nothing is sampled to train on; leave --num_generations out"),
        ({"rollout_prompts": 4}, "leave --rollout_prompts out"),
        ({"max_rounds": 2}, "leave --max_rounds out"),
        ({"verifier": "string"}, "no answer is sampled or verified; leave --verifier out"),
        ({"max_new_tokens": 8}, "--offline without --eval_data: no answer is sampled or verified"),
        ({"drop_truncated": "prompt"}, "leave --drop_truncated out"),
        ({"engine": "http://localhost:1/v1", "lora_r": 4}, "leave --engine out"),
        ({"temperature": 1.0}, "stored at temperature 1.5, and --temperature is 1"),
        ({"min_prob": 0.2}, "stored at min_prob 0.1, and --min_prob is 0.2"),
    ],
)
def test_settings_that_stored_rollouts_do_not_have(config, changes, reason):
    with pytest.raises(IpvrmError) as error:
        train(config(**changes))
    assert reason in str(error.value) and "\n" not in str(error.value)


def without(*names):
    return lambda row: {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (without(*BEHAVIOUR), "rows has what --offline needs; make it with `ipvrm rollout --min_prob`"),
        (
            without("prompt_ids", "response_ids", "tokenizer_hash"),
            "data.jsonl:1: lacks prompt_ids, resp",
        ),
        (lambda row: row | {"tokenizer_hash": "0" * 64}, "its ids are of another tokenizer than that of"),
        (lambda row: row | {"policy_hash": "0" * 64}, "its log-probs are of another policy than"),
        (lambda row: row | {"label": 1}, "no prompt has both a right and a wrong response"),
    ],
)
def test_files_that_cannot_be_learnt_from_end_in_one_line(config, toy, tmp_path, edit, reason):
    rows = [edit(row) for row in rows_of(toy / "data.parquet")]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(IpvrmError) as error:
        train(config(train_data=str(tmp_path / "data.jsonl")))
    assert reason in str(error.value) and "\n" not in str(error.value)


def broken(row, name, at, value):
    row[name][at] = value


def one_candidate(row, at, value):
    broken(row, "candidate_ids", at, [value])
    for name in ("old_candidate_logprobs", "rm_candidate_logprobs"):
        broken(row, name, at, [-0.1])


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        ("old_logprobs must be a list with one entry a token", lambda r: r["old_logprobs"].pop()),
        ("candidate_ids must be a list with one entry a token", lambda r: r.update(candidate_ids=3)),
        ("lacks old_candidate_logprobs, which --off", lambda r: r.update(old_candidate_logprobs=None)),
        ("lacks policy_hash, which --offline needs", lambda r: r.pop("policy_hash")),
        ("differ in how many a token has", lambda r: r["candidate_ids"][0].append(1)),
        ("differ in how many a token has", lambda r: broken(r, "candidate_ids", 0, None)),
        ("ids must be whole numbers in [0, ", lambda r: broken(r, "response_ids", 0, 10**6)),
        ("finite numbers of at most 0", lambda r: broken(r, "old_logprobs", 0, 0.1)),
        ("finite numbers of at most 0", lambda r: broken(r, "old_logprobs", 0, None)),
        ("rm_logprobs must be a list with one entry a token", lambda r: r["rm_logprobs"].append(-0.5)),
        ("rm_logprobs must hold finite numbers of at most 0", lambda r: broken(r, "rm_logprobs", 0, 1e-3)),
        ("the row has rm_candidate_logprobs, rm_hash alone", lambda r: r.pop("rm_logprobs")),
        ("the row has rm_logprobs, rm_candidate_logprobs alone", lambda r: r.update(rm_hash=None)),
        (
            "candidate_ids and rm_candidate_logprobs differ",
            lambda r: r["rm_candidate_logprobs"][0].append(-0.5),
        ),
        (
            "rm_candidate_logprobs must hold finite numbers of at most 0",
            lambda r: broken(r, "rm_candidate_logprobs", 0, [float("-inf")] * len(r["candidate_ids"][0])),
        ),
        ("the last token has candidates", lambda r: one_candidate(r, -1, 1)),
        ("ids must be whole numbers in [0, ", lambda r: one_candidate(r, 0, None)),
        ("response_ids decode to another text", lambda r: r.update(response=r["response"] + "9")),
        ("prompt_ids decode to another text", lambda r: r["prompt"][-1].update(content="another one")),
    ],
)
def test_a_row_that_does_not_fit_is_named_or_skipped(config, toy, tmp_path, reason, edit):
    rows = rows_of(toy / "scored.parquet")
    edit(rows[1])
    write_jsonl(tmp_path / "data.jsonl", rows)
    settings = config(train_data=str(tmp_path / "data.jsonl"))
    with pytest.raises(IpvrmError, match=f"1 of {len(rows)} rows are bad") as error:
        train(settings)
    assert "data.jsonl:2: " in str(error.value) and reason in str(error.value)
    found = stored_of(replace(settings, on_bad_row="skip"))
    assert (found.counts["bad"], found.counts["rows"]) == (1, len(rows))


def test_one_row_of_another_policy_ends_the_run_though_bad_rows_are_skipped(config, toy, tmp_path):
    rows = rows_of(toy / "data.parquet")
    rows[2]["policy_hash"] = "0" * 64
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(IpvrmError, match="data.jsonl:3: its log-probs are of another policy"):
        train(config(train_data=str(tmp_path / "data.jsonl"), on_bad_row="skip"))


def test_what_was_cut_off_is_left_out_and_counted(config, toy, tmp_path):
    rows = rows_of(toy / "data.parquet")
    cut = [row["truncated"] for row in rows]
    changed = cut.index(False)
    rows[changed]["truncated"] = True
    write_jsonl(tmp_path / "data.jsonl", rows)
    found = stored_of(config(train_data=str(tmp_path / "data.jsonl")))
    assert found.counts["truncated"] == sum(cut) + 1
    assert sum(map(len, found.groups)) <= len(rows) - found.counts["truncated"]


def stored_of(config):
    resolved, method = resolve(config)
    return StoredRollouts(resolved, load_tokenizer(config.model), method.candidates, None)


def test_dry_run_counts_the_rollouts(config, toy, capsys):
    train(config(dry_run=True))
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    rows = rows_of(toy / "data.parquet")
    labels = {}
    for row in rows:
        if not row["truncated"]:
            labels.setdefault(tuple(row["prompt_ids"]), set()).add(row["label"])
    mixed = [found for found in labels.values() if len(found) == 2]
    assert len(mixed) >= 8  # or the tests above do not train on what they say
    assert data == {
        "rows": len(rows),
        "bad": 0,
        "truncated": sum(row["truncated"] for row in rows),
        "prompts": len(labels),
        "prompts_mixed": len(mixed),
        "rm_scored": 0,
    }
