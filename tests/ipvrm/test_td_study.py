"""The TD study: its mathematics on hand-made cases, planted TDs, what is left out, resuming."""

import functools
import json
import random
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import flags, interrupted_at, ruled_out, write_jsonl
from served import FakeServer

from ipvrm import IpvrmError
from ipvrm.cli import main
from ipvrm.demo.base_model import make_model, make_tokenizer
from ipvrm.losses.metrics import auc
from ipvrm.models.causal_lm import save_model, template_hash
from ipvrm.models.reward_model import RewardModel, RewardModelInfo, reference_entries, write_info
from ipvrm.reproduce import td_branches, td_study
from ipvrm.reproduce.correlation import bootstrap, centred, less, partial, pearson, ranks, spearman
from ipvrm.reproduce.td_study import TdConfig, analyse, study
from ipvrm.rollouts.answers import Question


def column(*values):
    return np.array(values, dtype=np.float64)


# ---------------------------------------------------------------------------------------------- mathematics


def test_correlations_by_hand():
    # deviations -1, 0, 1 and -4/3, -1/3, 5/3: 3 / sqrt(2 * 42 / 9)
    assert pearson(column(1, 2, 3), column(1, 2, 4)) == pytest.approx(3 / np.sqrt(84 / 9))
    assert pearson(column(1, 2, 3), column(3, 2, 1)) == pytest.approx(-1)
    assert ranks(column(10, 20, 20, 5)).tolist() == [2, 3.5, 3.5, 1]
    assert spearman(column(1, 2, 3, 4), column(1, 3, 2, 4)) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(column(1, 2, 3, 4), column(1, 8, 27, 64)) == pytest.approx(1)
    # ranks 1.5, 1.5, 3 and 1, 2, 3: 1.5 / sqrt(1.5 * 2)
    assert spearman(column(0, 0, 5), column(1, 2, 3)) == pytest.approx(1.5 / np.sqrt(3))


def test_a_paired_difference_shows_what_marginal_intervals_hide():
    """Two columns that share the noise of their groups: their intervals overlap, that of the difference does
    not hold 0."""
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(60), 5)
    y = rng.normal(size=300)
    shared = y + rng.normal(size=60)[group] * 2
    worse, better = shared + rng.normal(size=300) * 1.6, shared + rng.normal(size=300) * 0.2
    assert less(pearson, worse, y, better) == pearson(worse, y) - pearson(better, y)
    one, other = (bootstrap(pearson, (x, y), group, 500, 0) for x in (worse, better))
    assert one.high > other.low
    assert bootstrap(functools.partial(less, pearson), (worse, y, better), group, 500, 0).high < 0


def test_partial_correlation_is_that_of_what_the_third_column_leaves_over():
    rng = np.random.default_rng(0)
    x, y, given = rng.normal(size=(3, 400))
    x, y = x + given, y + 2 * given + x
    design = np.stack([np.ones(400), given], 1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert partial(pearson, x, y, given) == pytest.approx(pearson(*left))
    assert np.isnan(partial(pearson, x, y, x)) and np.isnan(partial(pearson, x, y, np.ones(400)))


@pytest.mark.parametrize("x, y", [((1, 1, 1), (1, 2, 3)), ((1,), (1,)), ((), ()), ((0.1, 0.1), (1, 2))])
def test_undefined_correlations_are_nan(x, y):
    assert np.isnan(pearson(column(*x), column(*y))) and np.isnan(spearman(column(*x), column(*y)))


def test_auc_by_hand_and_against_all_pairs():
    # right 3, 1 against wrong 2, 1: 3 beats both, 1 ties once and loses once
    assert auc(column(3, 1, 2, 1), column(1, 1, 0, 0)) == (2 + 0.5) / 4
    assert auc(column(1, 2), column(1, 1)) is None
    rng = np.random.default_rng(0)
    scores, outcome = rng.integers(0, 6, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    gaps = scores[outcome == 1][:, None] - scores[outcome == 0]
    by_pairs = ((gaps > 0) + 0.5 * (gaps == 0)).mean()
    assert auc(scores, outcome) == auc(torch.tensor(scores), torch.tensor(outcome)) == pytest.approx(by_pairs)


def test_centred_takes_each_groups_mean_off():
    found = centred(column(1, 3, 10, 20, 30), np.array([0, 0, 1, 1, 1]))
    assert found == pytest.approx([-1, 1, -10, 0, 10])
    # thirds: the same differences around two means are equal, so that ranks tie
    found = centred(column(0.1, 0.2, 0.2, 7.1, 7.2, 7.2), np.array([0, 0, 0, 1, 1, 1]))
    assert len(set(found)) == 2 and centred(column(), np.array([], dtype=int)).size == 0


def test_bootstrap_draws_whole_groups():
    """Fifty copies of four values are worth four values, not two hundred."""
    values, group = column(0, 0, 1, 1), np.arange(4)
    alone = bootstrap(np.mean, [values], group, 2000, 0)
    copies = bootstrap(np.mean, [np.repeat(values, 50)], np.repeat(group, 50), 2000, 0)
    apart = bootstrap(np.mean, [np.repeat(values, 50)], np.arange(200), 2000, 0)
    assert alone == pytest.approx(copies) and copies.high - copies.low > 0.9
    assert apart.high - apart.low < 0.2
    assert np.isnan(bootstrap(np.mean, [column()], np.array([]), 10, 0).low)


def test_ceiling_is_the_correlation_of_true_and_estimated_values():
    rng = np.random.default_rng(0)
    true, m = rng.uniform(0, 1, 20_000), 8
    estimate = rng.binomial(m, true) / m
    noise = estimate * (1 - estimate) / (m - 1)
    assert td_study._ceiling(estimate, noise) == pytest.approx(pearson(true, estimate), abs=0.005)
    assert td_study._ceiling(np.full(10, 0.5), np.zeros(10)) is None


# -------------------------------------------------------------------------------------------------- records


def part(right, judged, **more):
    outcomes = {"right": right, "wrong": judged - right}
    return {"right": right, "judged": judged, "outcomes": outcomes, **more}


def first_of(right):
    """A branch is right at first if most of its completions are, and its value says so, whatever its sign."""
    return {"first": int(right > 8), "value": (1 if right % 2 else -1) * float(right)}


def planted(td_of, prompts=40, seed=0):
    """Records of prompts with one answer, three prefixes each and three branches each; td_of(rate, rng)."""
    rng = np.random.default_rng(seed)
    records = []
    for row in range(prompts):
        prefixes = []
        for position in range(3):
            base = rng.uniform(-1, 1)  # the branches of a prefix share a level that centring takes off
            rates = rng.integers(0, 17, 3)
            branches = [
                part(
                    int(r),
                    16,
                    token="1",
                    sampled=False,
                    logprob=-1.0,
                    td=base + td_of(r / 16, rng),
                    **first_of(r),
                )
                for r in rates
            ]
            prefixes.append({"position": position, "own": part(8, 16), "branches": branches})
        right = row % 2
        values = {str(f): right * f + rng.uniform(0, 60) for f in (25, 50, 75, 100)}
        answer = {"sample": 0, "right": right, "tokens": 9, "prefixes": prefixes}
        answer |= {name: values for name in ("mean_value", "value")}
        records.append({"row": row, "outcomes": {"right": 1}, "answers": [answer]})
    return records


@pytest.mark.slow
def test_a_planted_td_correlates_perfectly_and_a_shuffled_one_not():
    found = analyse(planted(lambda rate, rng: 5 * rate), resamples=300)["correlation"]["centred"]
    for kind in ("pearson", "spearman"):
        assert found["td"][kind]["value"] == pytest.approx(1) and found["td"][kind]["low"] > 0.999
    assert found["log_prob"]["pearson"]["value"] is None  # a constant
    found = analyse(planted(lambda rate, rng: rng.uniform(0, 5)), resamples=300)["correlation"]["centred"]
    for kind in ("pearson", "spearman"):
        entry = found["td"][kind]
        assert abs(entry["value"]) < 0.15 and entry["low"] < 0 < entry["high"]
    negated = analyse(planted(lambda rate, rng: -rate), resamples=50)["correlation"]["centred"]
    assert negated["td"]["pearson"]["value"] == pytest.approx(-1)


def test_without_centring_the_level_of_a_prefix_hides_the_td():
    """The seeded fault that centring is there for."""
    records = planted(lambda rate, rng: 0.5 * rate)
    tds = column(*(b["td"] for r in records for p in r["answers"][0]["prefixes"] for b in p["branches"]))
    rates = column(
        *(b["right"] / 16 for r in records for p in r["answers"][0]["prefixes"] for b in p["branches"])
    )
    assert pearson(tds, rates) < 0.5
    found = analyse(records, resamples=50)["correlation"]
    assert found["centred"]["td"]["pearson"]["value"] == pytest.approx(1)
    assert found["difference"]["td"]["pearson"]["value"] == pytest.approx(pearson(tds, rates - 0.5))


def test_auc_of_the_value_grows_with_the_planted_gap():
    found = analyse(planted(lambda rate, rng: rate), resamples=50)["auc"]["value"]
    values = [found[str(f)]["value"] for f in (25, 50, 75, 100)]
    assert values == sorted(values) and values[-1] == 1.0 and values[0] < 0.95


@pytest.mark.slow
def test_the_papers_two_numbers_are_over_all_branches_with_one_completion_each():
    found = analyse(planted(lambda rate, rng: 5 * rate), resamples=200)["paper"]
    branches = [
        b
        for r in planted(lambda rate, rng: 5 * rate)
        for p in r["answers"][0]["prefixes"]
        for b in p["branches"]
    ]
    tds, firsts = (column(*(b[name] for b in branches)) for name in ("td", "first"))
    assert found["branches"] == len(branches) == 360 and found["right"] == firsts.sum()
    assert found["td_pearson"]["value"] == pytest.approx(pearson(tds, firsts))
    assert found["td_pearson"]["low"] < found["td_pearson"]["value"] < found["td_pearson"]["high"]
    assert found["abs_value_auc"]["value"] == 1.0 and 0.3 < found["value_auc"]["value"] < 0.7
    assert [found[n]["published"] for n in ("td_pearson", "abs_value_auc", "value_auc")] == [
        0.0226,
        0.64,
        None,
    ]
    records = planted(lambda rate, rng: rate, prompts=2)
    records[0]["answers"][0]["prefixes"][0]["branches"][0]["first"] = None  # cut off: neither right nor wrong
    assert analyse(records, resamples=10)["paper"]["branches"] == 17


def test_parts_without_a_verdict_are_left_out_and_counted():
    records = planted(lambda rate, rng: rate, prompts=4)
    first, second, third = records[0]["answers"][0]["prefixes"]
    none = {"right": 0, "judged": 0, "outcomes": {"timeout": 10, "truncated": 6}}
    first["branches"][0].update(none)  # two branches remain
    second["branches"][0].update(none)
    second["branches"][1].update(none)  # one remains: the prefix is left out
    third["own"].update(none)  # no difference, but still centred
    found = analyse(records, resamples=20)
    counts = found["counts"]
    assert counts["prefixes"] == 11 and counts["prefixes_left_out"] == 1
    assert counts["branches_without_verdict"] == 3 and counts["branches"] == 2 + 0 + 3 + 27
    assert counts["completions_timeout"] == 40 and counts["completions_truncated"] == 24
    assert found["correlation"]["centred"]["branches"] == 32
    assert found["correlation"]["difference"]["branches"] == 29
    assert found["correlation"]["centred"]["td"]["pearson"]["value"] == pytest.approx(1)  # never scored 0


def test_no_prefix_at_all_gives_null_and_json():
    record = {"row": 1, "outcomes": {"truncated": 4}, "answers": []}
    found = json.loads(json.dumps(analyse([record], resamples=10), allow_nan=False))
    assert found["correlation"]["centred"]["td"]["pearson"]["value"] is None
    assert found["auc"]["value"]["100"]["value"] is None
    assert found["paper"]["branches"] == 0 and found["paper"]["td_pearson"]["value"] is None
    td_study._print(found)


# ------------------------------------------------------------------------------------------------- the study

VERIFIER = """
def holds(response, answer):
    if "8" in response:
        raise RuntimeError("no idea")
    return answer in response
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a random policy, a reward model, prompts and a verifier that raises at times."""
    folder = tmp_path_factory.mktemp("td")
    (folder / "td_verifier.py").write_text(VERIFIER)
    sys.path.insert(0, str(folder))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 32, 2, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # what it says then depends on what it has read
    save_model(model, folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(model, folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    info = {"objective": "ipvrm", "beta": 10.0, "margin": 1.0, "versions": {}}
    entries = reference_entries(folder / "policy", folder / "rm")
    write_info(folder / "rm", RewardModelInfo(**info, template_hash=template_hash(tokenizer), **entries))
    rng = random.Random(0)
    rows = ({"prompt": f"{rng.randint(10, 99)}+{rng.randint(10, 99)}", "answer": "1"} for _ in range(4))
    write_jsonl(folder / "prompts.jsonl", rows)
    yield folder
    sys.path.remove(str(folder))


def config(folder, output, **settings):
    return TdConfig(
        policy=str(folder / "policy"),
        reward_model=str(folder / "rm"),
        data=str(folder / "prompts.jsonl"),
        output_dir=str(output),
        num_responses=4,
        prefixes_per_response=2,
        completions=3,
        min_prob=0.05,
        max_new_tokens=16,
        verifier="td_verifier:holds",
        verifier_workers=1,
        bootstrap_resamples=50,
        use_cpu=True,
        **settings,
    )


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """(folder, results) of a study in one go."""
    output = tmp_path_factory.mktemp("study")
    return output, study(config(toy, output), progress=False)


def records(output):
    return [json.loads(path.read_text()) for path in sorted((output / "prompts").glob("*.json"))]


def test_td_is_the_step_of_the_value_and_the_counts_add_up(toy, finished):
    output, results = finished
    counts = results["counts"]
    assert counts["prompts"] == 4 and counts["prefixes"] > 3 and counts["branches"] >= 2 * counts["prefixes"]
    assert sum(n for name, n in counts.items() if name.startswith("answers_")) == 4 * 4
    for record in records(output):
        for answer in record["answers"]:
            assert len(answer["prefixes"]) <= 2
            for prefix in answer["prefixes"]:
                assert prefix["position"] < answer["tokens"] - 1  # the last token carries the outcome
                assert len(prefix["branches"]) >= 2
                for b in (prefix["own"], *prefix["branches"]):
                    assert sum(b["outcomes"].values()) == 3
                    assert b["judged"] == sum(
                        b["outcomes"].get(n, 0) for n in ("right", "wrong", "no_answer")
                    )
                assert all(np.exp(b["logprob"]) >= 0.05 for b in prefix["branches"])
                before = {round(b["value"] - b["td"], 4) for b in prefix["branches"]}
                assert len(before) == 1 and (prefix["position"] or before == {0.0})
                for b in prefix["branches"]:
                    assert b["first"] in ((None, 0, 1) if b["judged"] < 3 else (0, 1))
                    assert b["first"] != 1 or b["right"]
    assert counts["completions_error"] > 0 and counts["completions_truncated"] > 0


def test_td_and_values_against_the_reward_model_by_hand(toy):
    """One answer, re-scored token by token."""
    tokenizer = make_tokenizer()
    reward_model = RewardModel.from_pretrained(toy / "rm", device="cpu")
    ids = tuple(tokenizer("<|user|>47+25<|assistant|>47+25=72<|end|>", add_special_tokens=False)["input_ids"])
    response = td_branches.Response(ids, ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1)
    (whole,) = reward_model.token_log_ratios([response])
    value = reward_model.info.beta * whole.double().cumsum(0)
    options = td_branches.BranchOptions(1, 2, 2, 0.1, None, 16, 1.0, 8, 4096, 0)
    brancher = td_branches.Brancher(options, None, reward_model, tokenizer, None, set(), None)
    places = range(response.prompt_length, len(ids))
    branches = [td_branches.Branch(ids[: i + 1], (0, 0, i, 1), ids[i]) for i in places]
    brancher._td(branches)
    steps = torch.diff(value, prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(
        torch.tensor([b.td for b in branches], dtype=torch.float64), steps, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_killed_study_goes_on_and_batches_do_not_matter(toy, finished, tmp_path, monkeypatch):
    output, results = finished
    monkeypatch.setattr(td_study, "CHUNK_PROMPTS", 2)
    calls = interrupted_at(monkeypatch, td_branches.Brancher, "run", 2)
    ours = config(toy, tmp_path, per_device_eval_batch_size=7)
    with pytest.raises(KeyboardInterrupt):
        study(ours, progress=False)
    kept = sorted((tmp_path / "prompts").glob("*.json"))
    assert len(kept) == 2 and not (tmp_path / "results.json").exists()
    (tmp_path / "prompts" / ".00000003.json.77.tmp").write_text("half a fi")  # as a kill leaves it
    before = [path.stat().st_mtime_ns for path in kept]
    again = study(ours, progress=False)
    assert calls == [2, 2, 2] and [path.stat().st_mtime_ns for path in kept] == before
    assert not list((tmp_path / "prompts").glob(".*"))
    assert again["counts"] == results["counts"]
    for ours_, theirs in zip(records(tmp_path), records(output), strict=True):
        for a, b in zip(ours_["answers"], theirs["answers"], strict=True):
            assert [p["position"] for p in a["prefixes"]] == [p["position"] for p in b["prefixes"]]
            assert [
                x["outcomes"] for p in a["prefixes"] for x in (p["own"], *p["branches"])
            ] == [x["outcomes"] for p in b["prefixes"] for x in (p["own"], *p["branches"])]  # fmt: skip
    study(ours, progress=False)
    assert calls == [2, 2, 2]  # nothing was left to do


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_half_written_prompt_heals(toy, finished, tmp_path, monkeypatch, capsys, damage):
    output, results = finished
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "prompts" / "00000002.json"
    text = path.read_text()
    path.write_text({"half": text[: len(text) // 2], "empty": "", "other": "{}"}[damage])
    original, made = td_branches.Brancher.run, []

    def noting(self, questions):
        made.extend(q.prompt.row for q in questions)
        return original(self, questions)

    monkeypatch.setattr(td_branches.Brancher, "run", noting)
    again = study(config(toy, tmp_path))
    assert made == [2] and again["counts"] == results["counts"]
    assert json.loads(path.read_text()).keys() == json.loads(text).keys()
    notes = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert len(notes) == 1 and notes[0].startswith(str(path))


@pytest.mark.slow
def test_a_server_s_study_is_the_local_one(toy, tmp_path, monkeypatch, capsys):
    """By `eval td --engine`; the server dies behind a prompt, and goes on at another address."""
    monkeypatch.setattr(td_study, "CHUNK_PROMPTS", 1)
    small = {"num_prompts": 2, "num_responses": 2, "prefixes_per_response": 1, "completions": 2}
    local = study(replace(config(toy, tmp_path / "local"), **small), progress=False)
    assert local["counts"]["branches"] >= 2
    ours = replace(config(toy, tmp_path / "served"), **small)
    kept = tmp_path / "served" / "prompts"
    with FakeServer(toy / "policy", make_tokenizer()) as server:
        server.fault = lambda path, body: "die" if any(kept.glob("*.json")) else None
        assert main(["eval", "td", *flags(replace(ours, engine=server.url))]) == 2
    (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("ipvrm eval td: ")]
    assert said.startswith(f"ipvrm eval td: {server.url}/completions: ") and "same command" in said
    assert len(list(kept.glob("*.json"))) == 1
    with FakeServer(toy / "policy", make_tokenizer()) as server:
        served = study(replace(ours, engine=server.url), progress=False)
    assert served["counts"] == local["counts"]
    assert records(tmp_path / "served") == records(tmp_path / "local")
    with pytest.raises(IpvrmError, match="changed: engine"):
        study(ours, progress=False)
    with FakeServer(toy / "rm", make_tokenizer()) as server, pytest.raises(IpvrmError, match="not .*policy"):
        study(replace(ours, engine=server.url, output_dir=str(tmp_path / "other")), progress=False)


def test_a_branch_at_its_end_is_judged_and_not_continued(toy):
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    ids = tuple(tokenizer("<|user|>47<|assistant|>41", add_special_tokens=False)["input_ids"])
    question = Question(td_study.read_prompts(toy / "prompts.jsonl")[0][0], ids[:-2])
    row = question.prompt.row
    options = td_branches.BranchOptions(1, 1, 5, 0.1, None, 2, 1.0, 8, 4096, 0)
    with td_study.VerifierPool("td_verifier:holds", 1) as pool:
        brancher = td_branches.Brancher(options, None, None, tokenizer, None, {end}, pool)
        ended = td_branches.Branch((*ids, end), (row, 0, 2, 1), end)
        full = td_branches.Branch(ids, (row, 0, 1, 1), ids[-1])  # no budget for another token
        brancher._complete([ended, full], {row: question})
    assert ended.outcomes == {"right": 5} and full.outcomes == {"truncated": 5}
    assert (ended.first, full.first) == (1, None)


def test_refusals(toy, finished, tmp_path):
    ours = config(toy, finished[0])
    with pytest.raises(IpvrmError, match=r"study in .*; changed: completions \(.* now\), seed \("):
        study(replace(ours, completions=4, seed=1), progress=False)
    for wrong, message in (
        ({"completions": 1}, "completions must be at least 2"),
        ({"min_prob": 0.6}, "no two tokens"),
        ({"top_k": 1}, "nothing beside it"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 400}, "400 new ones"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(IpvrmError, match=message):
            study(replace(config(toy, tmp_path), **wrong), progress=False)
    (tmp_path / "no_answer.jsonl").write_text('{"prompt": "1+1"}\n')
    with pytest.raises(IpvrmError, match="no ground truth"):
        study(replace(config(toy, tmp_path), data=str(tmp_path / "no_answer.jsonl")), progress=False)


@pytest.mark.slow
def test_prompts_that_cannot_be_used_stop_nothing(toy, finished, tmp_path, capsys):
    """Four kinds behind the good ones, whose numbers stay; an interrupted study goes on with them there."""
    bad = ['{"prompt": 7, "answer": "1"}', '{"prompt": "1+1"}', '{"prompt": "\\ud83d", "answer": "1"}', "{"]
    good = (toy / "prompts.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text("\n".join([good.strip(), *bad]) + "\n")
    ours = replace(config(toy, tmp_path / "out"), data=str(tmp_path / "data.jsonl"))
    results = study(ours)
    assert [line.partition(".jsonl:")[2].partition(":")[0] for line in results["unusable"]] == list("5786")
    assert "4 prompts cannot be used; they are left out:" in capsys.readouterr().out
    assert results["counts"] == finished[1]["counts"]
    written = sorted((tmp_path / "out" / "prompts").iterdir())
    written[2].unlink()
    again = study(ours, progress=False)
    assert again["counts"] == results["counts"] and again["unusable"] == results["unusable"]


def test_an_infinite_log_ratio_ends_the_study_with_its_prompt(toy, tmp_path, monkeypatch, capsys):
    """It was a traceback of the writer, without a row."""
    tokenizer = make_tokenizer()
    ruled_out(monkeypatch, tokenizer.eos_token_id)  # of every answer that is judged
    assert main(["eval", "td", *flags(config(toy, tmp_path))]) == 2
    error = capsys.readouterr().err
    assert re.search(r"prompt \d+: the log-probability under the model of response token \d+ of ", error)
    assert "Traceback" not in error
    brancher = td_branches.Brancher(
        td_branches.BranchOptions(1, 2, 2, 0.1, None, 16, 1.0, 8, 4096, 0),
        None, RewardModel.from_pretrained(toy / "rm", device="cpu"), tokenizer, None, set(), None,
    )  # fmt: skip
    branch = td_branches.Branch((6, 7, tokenizer.eos_token_id), (3, 0, 1, 1), tokenizer.eos_token_id)
    with pytest.raises(IpvrmError, match="^prompt 3, a candidate: the log-probability under the model"):
        brancher._td([branch])


@pytest.mark.slow
def test_prompts_of_other_template_variables_than_the_reward_models_are_said(toy, tmp_path, capsys):
    template = make_tokenizer()
    template.chat_template = "{% if not thinking %}<{% endif %}" + template.chat_template
    for name in ("policy", "rm"):
        shutil.copytree(toy / name, tmp_path / name)
        template.save_pretrained(tmp_path / name)
    info = json.loads((tmp_path / "rm" / "ipvrm_config.json").read_text())
    info |= {"template_hash": template_hash(template), "chat_template_kwargs": {"thinking": True}}
    (tmp_path / "rm" / "ipvrm_config.json").write_text(json.dumps(info))
    small = replace(
        config(toy, ""), policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "rm"), num_prompts=1
    )
    for given, said in ((None, "{}"), ('{"thinking": true}', None)):
        study(replace(small, output_dir=str(tmp_path / str(said)), chat_template_kwargs=given))
        words = (
            "trained with --chat_template_kwargs '{\"thinking\": true}', and these prompts are written with"
        )
        error = " ".join(capsys.readouterr().err.split())
        assert (f"{words} '{said}'" in error) if said else (words not in error)
    of_itself = replace(
        small, reward_model=str(tmp_path / "policy"), objective="endo_rm", output_dir=str(tmp_path / "endo")
    )
    study(replace(of_itself, chat_template_kwargs='{"thinking": true}'))
    assert "chat_template_kwargs" not in capsys.readouterr().err


def test_screen_fits_eighty_columns(finished, capsys):
    td_study._print(finished[1])
    shown = capsys.readouterr().out
    assert "Section 4.3.3" in shown and "0.0226" in shown and "0.64" in shown
    assert "TD, centred" in shown and "AUC of the value" in shown and "…" not in shown
