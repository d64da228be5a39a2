"""Every number of the results that the READMEs tell of is in a file of benchmarks/results: what is said is
written here from the files, and where all of that is taken out of the text no number is left but those that
are listed here as no measurement, each with what it is. And the tree of the top-level README is true."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_defaults
import test_differences

from benchmarks.studies import objectives_learn
from benchmarks.suite import headline
from benchmarks.suite.measure import ACCURACY, LESS_WORK, Row, is_ours

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DEMO, GUIDE = "README.md", "benchmarks/results/demo/README.md", "ipvrm/README.md"


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def section(page, title):
    """The text below a heading, in one line."""
    written = (ROOT / page).read_text(encoding="utf-8")
    text = f"\n{written}".partition(f"# {title}\n")[2].partition("\n## ")[0]
    assert text, f"{page} has no section {title!r}"
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------- the demo


def percent(share):
    return f"{100 * share:.1f}"


def between(low, high, by="-"):
    return f"({percent(low)}{by}{percent(high)})"


def seconds_of_the_demo():
    """Of a run on an idle machine and of one on another, beside other work; both of clean commits."""
    seconds = []
    for name, processor in (("results", "AMD EPYC, AVX512"), ("results-amd-zen-3", None)):
        found = read(f"demo/{name}.json")
        assert set(found["manifest"]["commit"]) <= set("0123456789abcdef"), "not of a clean checkout"
        assert found["manifest"].get("processor") == processor  # the older one did not write it down
        seconds.append(sum(stage["seconds"] for stage in found["stages"].values()))
    return seconds


def of_the_demo():
    idle, busy = (f"{value:.0f} s on two" for value in seconds_of_the_demo())
    yield f"one run took {idle} idle cores of a Zen 4, and {busy} of a Zen 3 that had other work"
    for objective, found in read("demo_selection.json")["objectives"].items():
        lead, low, high = found["lead"]
        best = found["best"]
        assert {"ipvrm": (50, 5), "implicit_prm": (1, None)}[objective] == (best["beta"], best["margin"])
        yield f"by {100 * lead:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def of_the_time():
    idle, busy = ({4: "four", 11: "eleven"}[round(value / 60)] for value in seconds_of_the_demo())
    yield f"takes {idle} minutes on two idle cores of a Zen 4 ({busy} on a Zen 3's, beside other work)"


NAMES = {
    "ipvrm": "IPVRM",
    "ipvrm, the paper's": "IPVRM, the paper's",
    "implicit_prm": "Implicit PRM",
    "implicit_prm, the paper's": "Implicit PRM, the paper's",
}
PICKS = {  # the quantity that each objective trains, and the one that steps are judged by
    "ipvrm": {"final": "final value", "min": "least step"},
    "implicit_prm": {"sum": "sum", "min": "least step"},
}
POLICIES = {
    "base model": "base model",
    "grpo": "GRPO",
    "grpo_prm": "GRPO + IPVRM",
    "distrl": "DistRL + IPVRM",
    "grpo_prm, the paper's GAE": "GRPO + IPVRM, the paper's GAE",
    "distrl, the paper's GAE": "DistRL + IPVRM, the paper's GAE",
}


def base_models():
    """The results of every base model, all of the same clean commit."""
    runs = [read(path) for path in sorted((RESULTS / "demo_spread").glob("seed*.json"))]
    (commit,) = {run["manifest"]["commit"] for run in runs}
    assert set(commit) <= set("0123456789abcdef")
    return runs


def spread(estimate, sign=""):
    """Mean, interval and each base model's value in %; bold: a difference whose interval does not hold 0."""
    low, high = estimate["interval"]
    text = f"{100 * estimate['mean']:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
    text = f"**{text}**" if sign and (low > 0 or high < 0) else text
    return f"{text}: {' / '.join(f'{100 * value:{sign}.1f}' for value in estimate['by_model'])}"


def settings_of(runs, name):
    """beta, margin and step score of a reward model; the latter by base model where it is not the same."""
    choices = [run["reward_models"][name]["choice"] for run in runs]
    rules = [choice["rule"] for choice in choices]
    margin = "none" if choices[0]["margin"] is None else f"{choices[0]['margin']:g}"
    return f"{choices[0]['beta']:g}, {margin}, {' / '.join(rules if len(set(rules)) > 1 else rules[:1])}"


def of_the_reward_models():
    runs, found = base_models(), read("demo_spread/summary.json")
    for name, label in NAMES.items():
        cells = [spread(formats[name]) for formats in found["f1"].values()]
        yield f"| {label} | {settings_of(runs, name)} | {' | '.join(cells)} |"
    for ours, other, label in (
        ("ipvrm", "implicit_prm", "IPVRM less Implicit PRM"),
        ("ipvrm, the paper's", "implicit_prm, the paper's", "the same, the paper's"),
    ):
        differences = (formats[f"{ours} less {other}"] for formats in found["f1_differences"].values())
        yield f"| {label} | | {' | '.join(spread(difference, '+') for difference in differences)} |"
    training, *shifted = found["f1"].items()
    by_model = {name: estimate["by_model"] for name, estimate in training[1].items()}
    for end in ("", ", the paper's"):  # "ahead of IPVRM on every base model"
        for ipvrm, implicit in zip(by_model["ipvrm" + end], by_model["implicit_prm" + end], strict=True):
            assert implicit > ipvrm
    for name in PICKS:  # "score lower"
        for ours, paper in zip(by_model[name], by_model[f"{name}, the paper's"], strict=True):
            assert ours > paper
    for written, models in shifted:  # "on average below the best constant answer"
        assert all(model["mean"] < found["baselines"]["best_constant"] for model in models.values()), written
    constant = " / ".join(percent(found["baselines"][name]) for name in ("random_step", "best_constant"))
    yield f"| random step / best constant answer | | {constant} | {constant} | {constant} |"
    traces = sorted({len(run["erroneous"]) for run in runs})
    yield f"({' to '.join(f'{number:,}' for number in dict.fromkeys((traces[0], traces[-1])))} traces each)"
    yield f"A Qwen3 of {runs[0]['base']['parameters'] / 1e6:.2f} M parameters"
    yield f"of {len(runs)} base models (seeds {', '.join(str(run['seed']) for run in runs)};"


def of_best_of_n():
    found = read("demo_spread/summary.json")["best_of_n"]
    ways = {way: way for way in ("one sample", "majority vote", "pass@N")}
    for name, label in NAMES.items():
        picks = PICKS[name.partition(",")[0]].items()
        ways |= {f"{name}: {pick}": f"{label}, by its {words}" for pick, words in picks}
    for way, label in ways.items():
        yield f"| {label} | {' | '.join(spread(rows[way]) for rows in found.values())} |"
    for number, vote in enumerate(found["16"]["majority vote"]["by_model"]):  # "ahead of every reward model"
        models = (rows["by_model"][number] for way, rows in found["16"].items() if ":" in way)
        assert vote > max(models)
    for name, picks in PICKS.items():  # "ahead of it on every one"
        for pick in picks:
            pairs = zip(
                found["4"][f"{name}: {pick}"]["by_model"],
                found["4"]["majority vote"]["by_model"],
                strict=True,
            )
            assert all(model > vote for model, vote in pairs)


def of_the_policies():
    from ipvrm.training.policy_config import PolicyConfig, resolve

    runs, found = base_models(), read("demo_spread/summary.json")
    for name, label in POLICIES.items():
        gain = found["policy_differences"].get(f"{name} less base model")
        cells = [spread(found["policies"][name]), spread(gain, "+") if gain else ""]
        yield " ".join(f"| {label} | {' | '.join(cells)} |".split())
    for name, difference in found["policy_differences"].items():
        first, _, other = name.partition(" less ")
        low, high = difference["interval"]
        assert low > 0 if other == "base model" else low < 0 < high  # "all gain, no difference is shown"
        if other != "base model":
            yield f"| {POLICIES[first]} less {POLICIES[other]} | | {spread(difference, '+')} |"
    lam = resolve(PolicyConfig("m", "d", "o", reward_model="r"))[0].lam  # the demo and the study set none
    ours, paper = (runs[0]["policies"][name]["gae_coef"] for name in ("distrl", "distrl, the paper's GAE"))
    yield f"GAE coefficient {ours:g}, the paper's {paper:g}, lambda {lam:g} in both"


def test_the_spread_is_that_of_the_base_models():
    """Each base model's values in the tables again from its own file."""
    from benchmarks.studies import demo_spread

    runs, found = base_models(), read("demo_spread/summary.json")
    for written, models in found["f1"].items():
        for name, estimate in models.items():
            again = [demo_spread.f1_statistic(name, written)(run, None) for run in runs]
            assert again == pytest.approx(estimate["by_model"], abs=1e-12)
    for name, estimate in found["policies"].items():
        again = [sum(run["outcomes"][name]) / len(run["outcomes"][name]) for run in runs]
        assert again == pytest.approx(estimate["by_model"], abs=1e-12)
        assert estimate["mean"] == pytest.approx(sum(again) / len(runs), abs=1e-12)


# -------------------------------------------------------------------------------------------------- the ops


class Cases:
    """Rows of a file of `ipvrm bench`, by op, the start of the shape, and contender."""

    def __init__(self, name):
        self.rows = read(name)["rows"]

    def __call__(self, op, contender, *words, exact=False):
        def fits(shape):
            return shape == words[0] if exact else all(word in shape for word in words)

        rows = (row for row in self.rows if row["op"] == op and row["contender"] == contender)
        found = [row for row in rows if fits(row["shape"])]
        assert len(found) == 1, f"{op}, {contender}, {words}: {len(found)} rows"
        return found[0]


def named(kind):
    """The one file "KIND-PROCESSOR.json" of the results that the README's section on speed links."""
    links = re.findall(rf"\(benchmarks/results/({kind}-[\w-]+\.json)\)", section(README, "Speed"))
    assert len({*links}) == 1, f"the README links {links} for its speeds"
    return links[0]


def of_the_heads():
    """The results page's table of that file as far as it tells of the head, without the yardstick's time."""
    rows = [Row.from_dict(row) for row in read(named("cpu"))["rows"]]
    lines = headline.table(rows).splitlines()[2:]
    heads = [line for line, of in zip(lines, headline.LINES, strict=True) if of.op.startswith("linear_")]
    assert len(heads) == 7
    for line in heads:
        label, _, *cells = line[1:-1].split("|")
        yield " ".join(f"|{'|'.join([label, *cells])}|".split())


def of_the_steps():
    """Beside the fastest row of each that is not ours, whoever that is, where most of them were measured."""
    rows = read(ALL_RIVALS)["rows"]
    for op, lost, least in (("reward_step", True, 6), ("distrl_step", False, 4)):
        case = [row for row in rows if row["op"] == op and not row["error"]]
        (ours,) = (row for row in case if is_ours(row["contender"]))
        rival = min((row for row in case if row is not ours), key=lambda row: row["median_ms"])
        assert {row["shape"] for row in case} == {ours["shape"]} and len(case) >= least
        assert lost == (ours["median_ms"] > rival["median_ms"])
        said = "**a reward-model step loses**," if lost else "a policy update with DistRL takes"
        above = " above the weights" if lost else ""
        told = [f"{row['median_ms'] / 1e3:.2f} s and {row['peak_mib']:,.0f} MiB" for row in (ours, rival)]
        yield f"{said} {told[0]}{above} against {told[1]} of {rival['contender']}"
    kind = read(ALL_RIVALS)["machine"]["processor"].removeprefix("AMD ")
    yield f"A whole training step (4 layers, D=512, 8 sequences) on the {kind} in fp32"


def of_the_machine():
    """What the table of speeds and the whole steps were measured on."""
    found = read(named("cpu"))
    machine, shapes = found["machine"], {row["shape"] for row in found["rows"]}
    assert machine["cores"] == machine["threads"]
    assert any(shape.startswith("N=2048 D=1024 V=32000 float32") for shape in shapes)
    number = {2: "two"}.get(machine["threads"], machine["threads"])
    kind, simd = machine["processor"].removeprefix("AMD "), machine["simd"].replace("AVX512", "AVX-512")
    yield (
        f"on {number} CPU cores ({machine['cpu']}, {kind}, {simd}), 2,048 tokens, hidden 1,024, "
        "vocabulary 32,000, fp32"
    )


def of_the_matmul():
    """How much of the lead is the library of the matmuls, on the processor whose study is linked."""
    study = read(named("cpu_matmul"))
    times, tiles = (
        [row["ratio"] for row in study["times"] if row["op"] == op and row["contender"] == "onednn"]
        for op in ("op", "tile")
    )
    kind = study["machine"]["processor"].removeprefix("AMD ")
    assert all(1.8 < 1 / ratio < 2.3 for ratio in tiles)
    yield f"which on a {kind} is twice as fast as its MKL"
    yield f"the same ops take {1 / max(times):.1f} to {1 / min(times):.1f} times as long"


ALL_RIVALS = "cpu-amd-zen-4.json"
OTHER = "cpu-amd-zen-3.json"  # the kind of processor whose results the README sets beside its table


def of_the_other_kind():
    """The fastest of ours and of the others there, in two lines of the table."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"\n## [{OTHER}]({OTHER})\n" in page  # where the link leads
    assert read(OTHER)["machine"]["cpu_matmul"] == "blas"
    yield "On any other processor ours take MKL too, and the lead is memory"
    told = [fastest(OTHER, shape) for shape in (headline.FORWARD, headline.BACKWARD)]
    yield (
        "on a [Zen 3](benchmarks/results/README.md#cpu-amd-zen-3json) (AVX2) log-prob, log-sum-exp and "
        f"entropy take {told[0][0]} against {told[0][1]} of the fastest "
        f"other, with gradients of hidden and weight, logits kept, {told[1][0]} against {told[1][1]}"
    )


def fastest(file, shape):
    """The fastest of ours and of the others that do the same, as the README's table writes them."""
    rows = [
        row
        for row in read(file)["rows"]
        if (row["op"], row["shape"]) == ("linear_logprobs", shape) and not row["error"]
        if "," not in row["contender"] and row["contender"] not in LESS_WORK
    ]
    assert len(rows) >= 4
    best = [
        min((row for row in rows if is_ours(row["contender"]) == mine), key=lambda row: row["ratio"])
        for mine in (True, False)
    ]
    assert best[0]["scratch_mib"] < best[1]["scratch_mib"]
    return [f"{row['ratio']:.2f} ({row['scratch_mib']:,.0f})" for row in best]


BF16 = "cpu-amd-zen-4.json"  # of a processor that multiplies bf16 as it is


def of_bf16():
    """Where bf16 is multiplied as it is: beside the fastest other, and beside the same upcast."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"\n## [{BF16}]({BF16})\n" in page
    shapes = [shape.replace("float32", "bfloat16") for shape in (headline.FORWARD, headline.BACKWARD)]
    told = [fastest(BF16, shape) for shape in shapes]
    upcast = f", by {read(BF16)['machine']['cpu_matmul']}"
    ratios = {row["contender"]: row["ratio"] for row in read(BF16)["rows"] if row["shape"] in shapes[:1]}
    (whole,) = (
        f"{row['ratio']:.2f} ({row['scratch_mib']:,.0f})"
        for row in read(BF16)["rows"]
        if (row["shape"], row["contender"]) == (shapes[1], "cpp")
    )
    yield (
        "bf16 is multiplied as it is where the processor can (AVX512-BF16; AMX too, not run yet): on a "
        f"[Zen 4](benchmarks/results/README.md#cpu-amd-zen-4json) the same take {told[0][0]} against "
        f"{told[0][1]}, and {told[1][0]}, not kept {whole}, against {told[1][1]}; "
        f"upcast, as elsewhere, the first takes {ratios['cpp' + upcast]:.2f}"
    )


def of_the_accuracy():
    """The worst of ours and of each other contender, over calibrated and peaked rows of each dtype."""
    ours, others = {}, {}
    for row in read(BF16)["rows"]:
        if ACCURACY in row["shape"] and row["fp64_error"] is not None:
            (dtype,) = (dtype for dtype in ("bfloat16", "float32") if dtype in row["shape"].split())
            worst = (ours if is_ours(row["contender"]) else others).setdefault(dtype, {})
            worst[row["contender"]] = max(row["fp64_error"], worst.get(row["contender"], 0.0))
    told = []
    for dtype, name in (("bfloat16", "bf16"), ("float32", "fp32")):
        errors = sorted(others[dtype].values())
        assert len(errors) > 4 and max(ours[dtype].values()) < errors[0]
        nats = " nats" if not told else ""
        told.append(
            f"**{max(ours[dtype].values()):.1e}**{nats} of {name} inputs (others {errors[0]:.1e} to "
            f"{errors[-1]:.1e})"
        )
    yield f"A log-prob there is off by at most {told[0]} and {told[1]}, against fp64"


def of_the_results_page():
    """Its lines on the targets, from the rows: what single numbers of the users' interest are."""
    files = sorted(path.name for path in RESULTS.glob("cpu-*.json"))
    whole = [name for name in files if any(row["op"] == "linear_logprobs" for row in read(name)["rows"])]
    assert whole
    for name in whole:
        yield from of_the_targets(Cases(name))
    for name in files:
        case, shape = Cases(name), "B=256 T=2048 forward+backward"
        for contender, least in (("cpp", 4), ("cpp, raw", 8)):
            ratio = case("prefix_value_loss", contender, shape, exact=True)["ratio"]
            said = f"{contender} {1 / ratio:.2f}x, target >= {least}x padded eager"
            yield f"prefix_value_loss, {shape}: {met(ratio <= 1 / least)}: {said}"


def met(reached):
    return "met" if reached else "MISSED"


def of_the_targets(of):
    """Those of a whole file: against the matmul, another package, the curve's start, GRPO with a PRM."""
    op, size = "linear_logprobs", "N=2048 D=1024 V=32000 float32"
    trainable = f"{size} K=8 forward+backward trainable head"
    for contender, shape, limit in (
        ("cpp", f"{size} lse + sampled + entropy", 1.0),
        ("cpp", trainable, 3.7),
        ("cpp", f"{size} K=8 forward+backward frozen head", 2.0),
    ):
        ratio = of(op, contender, shape, exact=True)["ratio"]
        yield f"{op}, {shape}: {met(ratio <= limit)}: {contender} {ratio:.2f}, target <= {limit} matmul"
    for loss, words, limit in (
        ("linear_candidates", ("calibrated",), 1.05),
        ("linear_distrl_loss", ("K=8, random", "trainable"), 2.9),
    ):
        row = of(loss, "cpp", size, *words)
        said = f"cpp {row['ratio']:.2f}, target <= {limit} matmul"
        yield f"{loss}, {row['shape']}: {met(row['ratio'] <= limit)}: {said}"
    rival = of(op, "F.linear_cross_entropy, one id", trainable)["median_ms"]
    for name in ("cpp", "cpp logits kept", "cpp linear_distrl_loss", "cpp linear_distrl_loss logits kept"):
        ratio = of(op, f"{name}, one id", trainable)["median_ms"] / rival
        said = f"{name}, one id {1 / ratio:.2f}x, target >= 2x F.linear_cross_entropy"
        yield f"{op}, {trainable}: {met(ratio <= 1 / 2)}: {said}"
    for op, what in (
        ("linear_logprobs", "forward"),
        ("linear_candidates", "forward + candidates"),
        ("linear_logprobs", "forward+backward, trainable head"),
        ("linear_logprobs", "forward+backward, frozen head"),
    ):
        many, few = (f"N={rows} D=1024 V=32000 float32 K=8, {what}" for rows in (16384, 2048))
        times = [of(f"{op} over N", "cpp", shape, exact=True)["median_ms"] for shape in (many, few)]
        ratio = times[0] / times[1]
        yield f"{op} over N, {many}: {met(ratio <= 8.4)}: cpp {ratio:.2f}, target <= 8.4 the curve's start"
    for words in ("8 sequences", "64 sequences"):
        distrl, prm = (of("policy_step", name, words) for name in ("distrl", "grpo_prm"))
        time, memory = (distrl[what] / prm[what] for what in ("median_ms", "peak_mib"))
        start = f"policy_step, {distrl['shape']}"
        yield f"{start}: {met(time <= 1.15)}: distrl {time:.2f}, target <= 1.15 grpo_prm"
        yield (
            f"{start}: {met(memory <= 1.05)}: distrl {memory:.2f} of the peak memory, target <= 1.05 grpo_prm"
        )


def of_the_outcome():
    """The README's summary of the demo."""
    found = read("demo_spread/summary.json")
    ipvrm, implicit = (found["f1"]["training format"][name] for name in ("ipvrm", "implicit_prm"))
    assert all(a < b for a, b in zip(ipvrm["by_model"], implicit["by_model"], strict=True))
    papers = [found["f1"]["training format"][f"{name}, the paper's"] for name in ("ipvrm", "implicit_prm")]
    assert all(a < b for a, b in zip(*(paper["by_model"] for paper in papers), strict=True))
    differences = found["f1_differences"]["training format"]
    of = {name: settings_of(base_models(), name).split(", ") for name in NAMES}
    for start, end, models in (("", "", (ipvrm, implicit)), ("the paper's: ", ", the paper's", papers)):
        (beta, margin, rule), (other, _, other_rule) = (of[name + end] for name in ("ipvrm", "implicit_prm"))
        less = differences[f"ipvrm{end} less implicit_prm{end}"]
        cells = [f"{percent(model['mean'])} % {between(*model['interval'], by=' to ')}" for model in models]
        cells.append(spread(less, "+").partition(": ")[0])
        settings = f"beta {beta} and margin {margin} ({rule}), beta {other} ({other_rule})"
        yield f"| {start}{settings} | {' | '.join(cells)} |"
    yield "in brackets 95 % over base models and traces"
    sixteen = found["best_of_n"]["16"]
    without = ("one sample", "majority vote", "pass@N")
    picked = max((of for way, of in sixteen.items() if way not in without), key=lambda of: of["mean"])
    vote, most = (
        f"{percent(of['mean'])} % {between(*of['interval'], by=' to ')}"
        for of in (sixteen["majority vote"], picked)
    )
    yield (
        f"Of 16 answers majority vote finds the right one in {vote}, the better of the two models, by "
        f"whatever score, in at most {most}"
    )
    yield "Implicit PRM is ahead on every base model in both lines"
    constant, space = found["baselines"]["best_constant"], found["f1"]["space before ="]
    assert max(max(space[name]["by_model"]) for name in ("ipvrm", "implicit_prm")) < constant
    yield f"both fall below the best constant answer's {percent(constant)} %"
    gains = [
        gain["mean"] for name, gain in found["policy_differences"].items() if name.endswith("less base model")
    ]
    yield f"Policies gain {percent(min(gains))} to {percent(max(gains))} points"
    assert len(base_models()) == 3
    yield f"three base models of {base_models()[0]['base']['parameters'] / 1e6:.2f} M parameters"
    assert list(of_best_of_n())  # majority vote against every reward model, on every base model


def of_the_studies():
    """The guide's sentences on fig6 and `eval td`: one base model each, and what was found on it."""
    fig6 = read("fig6_smoke/results.json")
    assert len(fig6["config"]["seeds"]) == 3 and isinstance(fig6["demo"]["seed"], int)
    yield "run with three seeds of one base model, too few to set one update above another"
    for name in ("ipvrm", "implicit_prm"):
        found = read(f"td_study/{name}.json")["correlation"].values()
        for kind in ("pearson", "spearman"):
            for what in ("td", "log_prob"):
                assert all(view[what][kind]["low"] > 0 for view in found)
        assert all(view["td_less_log_prob"]["pearson"]["high"] < 0 for view in found)
    yield "On one base model of the demo and one seed the TD of both reward models was correlated with the"
    yield "so was the policy's own probability, by linear correlation more"


def of_what_learns():
    found = read("objectives_learn/results.json")
    length = found["objectives"].pop(objectives_learn.LENGTH)
    assert all(entry["low"] > length["high"] for entry in found["objectives"].values())
    assert found["objectives"].keys() == objectives_learn.OBJECTIVES.keys()
    del found["algorithms"]["base model"]
    assert found["algorithms"].keys() == objectives_learn.ALGORITHMS.keys()
    assert all(entry["low"] > 0 for entry in found["algorithms"].values())
    q_rm = objectives_learn.scale().objective_flags["q_rm"]
    assert found["sizes"]["multiple_of"] == 10
    yield "Every objective and every algorithm learns on the demo's task in its easy form, multiples of ten"
    yield f"Q-RM at beta {q_rm['beta']:g} and margin {q_rm['margin']:g}"


def of_the_lengths():
    """The guide's sentences on `when_prefix_values_help`."""
    found = read("when_prefix_values_help/summary.json")
    assert not found["missing"] and not found["not_learnt"]
    cells = found["cells"]
    assert {len(of_cell["seeds"]) for of_cell in cells.values()} == {3}

    def leads(ours, rival, length):
        entries = [cells[f"{length}-{wrong}"]["f1_lead"][f"{ours} less {rival}"] for wrong in (0, 10)]
        return " and ".join(spread(entry, "+").replace("**", "").partition(":")[0] for entry in entries)

    best = "ipvrm (best of 3)", "implicit_prm (best of 3)"
    paper = "ipvrm (10, 5)", "implicit_prm (0.05)"
    yield (
        "IPVRM less Implicit PRM in first-error F1, each the best of three settings, is "
        f"{leads(*best, '1x')} points with one token a character (right labels, a tenth of them wrong) and "
        f"{leads(*best, '8x')} with eight; at the paper's settings {leads(*paper, '1x')}, and "
        f"{leads(*paper, '8x')}"
    )
    for of_cell in cells.values():
        picked = {name: entry["mean"] for name, entry in of_cell["best_of_n"].items()}
        vote = picked["majority vote"]
        trained = [n for n in picked if n not in ("endo_rm", "one sample", "majority vote", "pass@N")]
        assert (
            len(trained) == 12 and all(picked[name] < vote for name in trained) and picked["endo_rm"] > vote
        )
    yield "no trained reward model picks a right one of sixteen answers as often as majority vote does"
    chosen = {name: of_cell["chosen"]["ipvrm (best of 3)"] for name, of_cell in cells.items()}
    assert {*chosen["8x-0"], *chosen["8x-10"]} == {"ipvrm (400, 1)"} and "ipvrm (50, 1)" in chosen["1x-0"]
    yield "With eight tokens the largest beta that was tried is the best on each base model"
    for of_cell in cells.values():
        of_f1 = of_cell["f1_over"]
        assert all(
            of_f1[f"{q} less best_constant"]["interval"][0] <= 0
            for q in ("q_rm (best of 3)", "q_rm (0.2, 2)")
        )
    yield "Q-RM is nowhere above the best constant answer"
    for of_cell in cells.values():
        low, high = of_cell["f1_lead"][f"{best[0]} less {best[1]}"]["interval"]
        assert low < 0 < high
    yield "none told apart from nothing"
    yield "in brackets 95 %"


def of_the_presets():
    yield from test_defaults.said_of_the_presets()


def of_the_release():
    yield from test_differences.said(json.loads(test_differences.study.RESULTS.read_text(encoding="utf-8")))


CLAIMS = {
    (DEMO, "What `ipvrm demo` shows"): (of_the_demo, of_the_reward_models, of_best_of_n, of_the_policies),
    (README, "ipvrm"): (of_the_time,),
    (README, "Speed"): (
        of_the_machine,
        of_the_heads,
        of_the_matmul,
        of_the_steps,
        of_the_other_kind,
        of_bf16,
        of_the_accuracy,
    ),
    (README, "What the reward models can do so far"): (of_the_outcome,),
    (GUIDE, "Policies"): (of_the_studies, of_what_learns, of_the_lengths),
    (GUIDE, "Presets, and what none of them reproduces"): (of_the_presets, of_the_release),
}


# Numbers that are no measurement, by what they are.
NO_MEASUREMENT = {
    "a name of others": [
        r"arXiv 2604\.13197", "Table 8", "Figure 6", r"section 4\.3\.3", r"Apache-2\.0", r"verl 0\.9\.1",
        r"sm_\d+", r"Eq\. \d+(, \d+)*", "SmolLM2-135M",
    ],
    "a version that is needed": [r"Python 3\.11", r"torch 2\.9 to 2\.13"],
    "a size or a value by definition": [
        r"\(B\+1,\)", "1 or 0 for right", r"label\*\* 1 if it ended correct, else 0", "; 1 if the response",
        "from 0, -1 for none",
    ],
    "a setting of what is measured": [
        r"p >= 0\.1", "of 64 rows at a time", "of 8 tokens a row", "8 candidates a row",
        "at temperature 1", r"--min_prob 0\.1",
    ],
    "a setting of the released code or of ours, from the code": [
        "on a grid of 1,000 from -1 to 1", "stopped after 1 s", "a deadline of 10 s",
    ],
}  # fmt: skip
LISTED = [regex for regexes in NO_MEASUREMENT.values() for regex in regexes]


def not_listed(text):
    for regex in LISTED:
        text = re.sub(regex, "", text)
    return text


@pytest.mark.parametrize("place", CLAIMS)
def test_the_readmes_have_no_number_that_no_file_has(place):
    text = section(*place)
    for said in (said for claims in CLAIMS[place] for said in claims()):
        text = text.replace(said, "")
    text = re.sub(r"\]\([^)]*\)", "]", re.sub("```.*?```", "", text))  # code and targets of links are none
    left = re.findall(r".{0,40}?\d+\.\d+.{0,20}", not_listed(text))
    assert not left


def numbers_left(page, text):
    """Numbers of a page that no claim of its sections and no entry of NO_MEASUREMENT accounts for; code,
    names in `` and targets of links are left out."""
    text = " ".join(re.sub(r"```.*?```", "", text, flags=re.S).split())
    for said in (said for place in CLAIMS if place[0] == page for of in CLAIMS[place] for said in of()):
        text = text.replace(said, "")
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", text))
    text = not_listed(text)
    return re.findall(r".{0,40}?(?<![A-Za-z\d])\d[\d.,]*.{0,20}", text)


@pytest.mark.parametrize("page", [README, GUIDE])
def test_every_number_of_a_readme_is_compared_or_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert numbers_left(page, text) == []
    for added in ("IPVRM is 7 points ahead.", "F1 was 83.1 %.", "in 12 minutes"):
        assert len(numbers_left(page, f"{text}\n{added}")) == 1, f"{added} is not noticed"


def test_nothing_is_listed_that_no_readme_holds():
    text = " ".join("".join((ROOT / page).read_text(encoding="utf-8") for page in (README, GUIDE)).split())
    assert not [regex for regex in LISTED if not re.search(regex, text)]


@pytest.mark.parametrize(
    ("place", "claims"),
    [(place, claims) for place, functions in CLAIMS.items() for claims in functions],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_readmes_say_is_what_the_files_say(place, claims):
    text = section(*place)
    missing = [said for said in claims() if said not in text]
    assert not missing


def test_the_results_page_says_what_the_files_say():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    missing = [said for said in of_the_results_page() if said not in text]
    assert not missing


# ------------------------------------------------------------------------------------------ the README itself


def test_the_readme_is_short():
    assert len((ROOT / README).read_text(encoding="utf-8").splitlines()) <= 150


def test_the_example_runs():
    import torch

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / README).read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, README, "exec"), names := {})
    hidden, weight, out = (names[name] for name in ("hidden", "weight", "out"))
    logits = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    torch.testing.assert_close(out.entropy.detach().double(), entropy, rtol=1e-4, atol=1e-4)
    assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0


def in_the_tree(text):
    """Paths of the README's tree: folders end with /, two spaces a floor, files beside each other."""
    above, found = [], set()
    for line in text.partition("## Tree\n\n```\n")[2].partition("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*(\S+(?:  ?\S+\.py)*)", line)[1].split()
        above = [*above[:depth], names[0]]
        found |= {"".join([*above[:depth], name]) for name in names}
    return found


def test_the_tree_is_true():
    """What it names is there, and no folder or module of the packages or folder of the rest is missing."""
    text = (ROOT / README).read_text(encoding="utf-8")
    named = in_the_tree(text)
    assert len(named) > 20
    assert not [
        name for name in named if not (ROOT / name).exists() or name.endswith("/") != (ROOT / name).is_dir()
    ]
    hidden = {"__init__.py", "__main__.py"}
    there = {
        path.relative_to(ROOT).as_posix() + "/" * path.is_dir()
        for package in ("ipvrm", "ipvrm_kernels")
        for path in (ROOT / package).iterdir()
        if (path / "__init__.py").exists()
        or (package == "ipvrm" and path.suffix == ".py" and path.name not in hidden)
    }
    assert there <= named, there - named
    for top in ("benchmarks", "tests"):  # theirs stand in the words of one line
        line = re.search(rf"^{top}/ (.*)$", text, re.MULTILINE)[1]
        folders = {path.name for path in (ROOT / top).iterdir() if path.is_dir() and path.name[0] not in "._"}
        assert folders and set(re.findall(r"(\w+)/", line)) == folders, top


def test_links_of_the_readmes_lead_somewhere():
    pages = [
        ROOT / README,
        RESULTS / "README.md",
        ROOT / DEMO,
        *ROOT.glob("ipvrm*/README.md"),
        *ROOT.glob("ipvrm/*/README.md"),
    ]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 30
    assert not [(str(page), link) for page, link in links if not (page.parent / link).exists()]


# What the runs beside them give, each with its commit.
WITHOUT_A_COMMIT = {"demo_spread/summary.json", "when_prefix_values_help/summary.json"}


def made_by(path):
    """What a results file says of its making: commit, modified, command."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("manifest") or found.get("machine") or {}


def results_files():
    return {path.relative_to(RESULTS).as_posix(): path for path in sorted(RESULTS.rglob("*.json"))}


def test_results_come_from_clean_commits():
    """Every file names its commit, without changes; those known to be others are named."""
    made = {name: made_by(path) for name, path in results_files().items()}
    assert {name for name, of_file in made.items() if "commit" not in of_file} == WITHOUT_A_COMMIT
    unclean = {
        name
        for name, of_file in made.items()
        if not re.fullmatch("[0-9a-f]{12,40}", str(of_file.get("commit", "0" * 12)))
        or of_file.get("modified")
    }
    assert not unclean


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def test_results_come_from_commits_of_this_history():
    """A commit that is nowhere cannot be looked at; the few that are known to be so are named."""
    asked = git("rev-parse", "--show-toplevel", "--is-shallow-repository") if shutil.which("git") else None
    if asked is None or asked.stdout.split() != [str(ROOT.resolve()), "false"]:
        pytest.skip("no checkout with the whole git history")
    lost = {
        name
        for name, path in results_files().items()
        if name not in WITHOUT_A_COMMIT
        and git("merge-base", "--is-ancestor", made_by(path)["commit"], "HEAD").returncode
    }
    assert not lost
    assert git("merge-base", "--is-ancestor", "0" * 40, "HEAD").returncode, "git takes any commit for one"
