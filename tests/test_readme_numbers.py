"""Every number of the README's results is in a file of benchmarks/results: what is said is written here from
the files, and where all of that is taken out of the text no number is left but settings."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def section(title):
    text = README.partition(f"## {title}\n")[2].partition("\n## ")[0]
    assert text, f"the README has no section {title!r}"
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------- the demo


def percent(share):
    return f"{100 * share:.1f}"


def between(low, high, by="-"):
    return f"({percent(low)}{by}{percent(high)})"


def difference_of(found):
    """In points, with its interval; bold where that does not hold 0."""
    low, high = (100 * x for x in found["interval"])
    text = f"{100 * found['f1']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def of_the_demo():
    found = read("demo/results.json")
    assert set(found["manifest"]["commit"]) <= set("0123456789abcdef"), "not of a clean checkout"
    for choice in found["choices"]:
        name, cells = choice["objective"], []
        label = {"ipvrm": "IPVRM", "implicit_prm": "Implicit PRM"}[name]
        assert choice["rule"] == found["models"][name]["rule"]
        margin = "none" if choice["margin"] is None else f"{choice['margin']:g}"
        for formats in found["models"][name]["formats"].values():
            scores = formats[choice["rule"]]["transfer"]
            cells.append(f"{percent(scores['f1'])} {between(*scores['f1_interval'])}")
        yield f"| {label} | {choice['beta']:g}, {margin}, {choice['rule']} | {' | '.join(cells)} |"
    differences = " | ".join(map(difference_of, found["differences"].values()))
    yield f"| IPVRM less Implicit PRM | | {differences} |"
    constant = " / ".join(
        percent(found["baselines"][name]["f1"]) for name in ("random_step", "best_constant")
    )
    yield f"| random step / best constant answer | | {constant} | {constant} | {constant} |"
    yield f"{found['test']['traces']:,} traces, {found['test']['erroneous']} wrong"
    yield f"A Qwen3 of {found['base']['parameters'] / 1e6:.2f} M parameters"
    of_16 = {row["method"]: row for row in found["best_of_n"] if row["n"] == 16}
    vote, *models = (of_16[name] for name in ("majority_vote", "ipvrm:final", "implicit_prm:sum"))
    assert all(vote["interval"][0] > model["interval"][1] for model in models)  # "is ahead of both"
    ipvrm, implicit = (percent(model["accuracy"]) for model in models)
    yield (
        f"{percent(vote['accuracy'])} right against {ipvrm} (IPVRM, by its final value) and {implicit} "
        "(Implicit PRM, by its sum)"
    )
    yield f"This run took {sum(stage['seconds'] for stage in found['stages'].values()):.0f} s"


def of_the_policies():
    from ipvrm.demo.report import points, policies_table
    from ipvrm.training.policy_config import PolicyConfig, resolve

    lam = resolve(PolicyConfig("m", "d", "o", reward_model="r"))[0].lam  # the demo sets none
    found = read("demo/results.json")["policies"]
    assert found["seeds"] == 1  # "one run each"
    for row in policies_table(found)[2]:
        yield " ".join(f"| {' | '.join(row)} |".split())
    yield f"GAE coefficient {found['settings']['gae_coef']:g}, lambda {lam:g}"
    differences = {tuple(d["of"]): d for d in found["differences"]}
    assert all(d["interval"][0] < 0 < d["interval"][1] for d in differences.values())  # "none is shown"
    for of, said in (
        (("grpo_prm", "grpo"), "GRPO + IPVRM minus GRPO is"),
        (("distrl", "grpo"), "DistRL + IPVRM minus GRPO"),
        (("distrl", "grpo_prm"), "DistRL + IPVRM minus GRPO + IPVRM"),
    ):
        yield f"{said} {points(differences[of])}"


# -------------------------------------------------------------------------------------------------- the ops


class Cases:
    """Rows of a file of `ipvrm bench`, by op, the start of the shape, and contender."""

    def __init__(self, name):
        found = read(name)
        self.rows = found["rows"] if "rows" in found else found["times"]

    def __call__(self, op, contender, *words, exact=False):
        def fits(shape):
            return shape == words[0] if exact else all(word in shape for word in words)

        rows = (row for row in self.rows if row["op"] == op and row["contender"] == contender)
        found = [row for row in rows if fits(row["shape"])]
        assert len(found) == 1, f"{op}, {contender}, {words}: {len(found)} rows"
        return found[0]

    def cell(self, op, contender, *words, bold=False):
        row = self(op, contender, *words)
        ratio = f"{row['ratio']:.2f}"
        return f"{f'**{ratio}**' if bold else ratio} ({row['scratch_mib']:,.0f})"


def of_the_heads():
    of = Cases("cpu-full.json")
    eager, sliced, compiled = "eager log_softmax", "released 64-row slices", "torch.compile of eager"

    def cells(op, *words, of_slices="", variant=""):
        return {
            "cpp": of.cell(op, f"cpp{variant}", *words, bold=True),
            "sliced": of.cell(op, sliced + of_slices, *words),
            "compiled": of.cell(op, compiled, *words),
        }

    op, size = "linear_logprobs", "N=2048 D=1024 V=32000 float32"
    lse, trainable, frozen = (
        f"{size} lse + sampled + entropy",
        f"{size} K=8 forward+backward trainable head",
        f"{size} K=8 forward+backward frozen head",
    )

    def one(contender, shape=lse, bold=False):
        return of.cell(op, contender, shape, bold=bold)

    yield (
        f"| log-sum-exp + sampled log-prob + entropy | {one('cpp', bold=True)} | {one(eager)} | "
        f"{one(compiled)} | TRL {one('TRL chunked log-prob + entropy')} |"
    )
    alone = ", log-prob alone"
    yield (
        f"| log-prob alone | {one('cpp' + alone, bold=True)} | s {one(sliced + alone)} | | "
        f"F.lce {one('F.linear_cross_entropy' + alone)}, "
        f"CCE {one('cut-cross-entropy torch_compile' + alone)}, "
        f"TRL {one('TRL chunked log-prob' + alone)} |"
    )
    calibrated = (size, "calibrated")
    candidates = [
        of.cell("linear_candidates", name, *calibrated, bold=name == "cpp")
        for name in ("cpp", "eager log_softmax + topk", compiled)
    ]
    yield f"| the first + exact candidates, 1.32 a row | {' | '.join(candidates)} | |"
    found = cells(op, frozen)
    yield (
        f"| K=8 log-probs, forward + backward, frozen head | {found['cpp']} | s {found['sliced']} | "
        f"{found['compiled']} | |"
    )
    yield (
        f"| the same, trainable head | {one('cpp', trainable)}, logits kept "
        f"{one('cpp logits kept', trainable, bold=True)} | s {one(sliced, trainable)} | "
        f"{one(compiled, trainable)} | |"
    )
    single = ", one id"
    yield (
        f"| the same, one token a row | {one('cpp' + single, trainable)}, kept "
        f"{one('cpp logits kept' + single, trainable)}; as a scalar loss "
        f"{one('cpp linear_distrl_loss' + single, trainable)}, kept "
        f"{one('cpp linear_distrl_loss logits kept' + single, trainable, bold=True)} | | | "
        f"F.lce {one('F.linear_cross_entropy' + single, trainable)}, "
        f"CCE {one('cut-cross-entropy torch_compile' + single, trainable)}, "
        f"TRL {one('TRL chunked log-prob' + single, trainable)} |"
    )
    loss = "linear_distrl_loss"
    for label, words in (
        ("`linear_distrl_loss`, K=8, random rows", (size, "K=8, random: all used")),
        ("the same, K=10, rows with 1.34 candidates", (size, "K=10, calibrated: 1.34", "trainable")),
        ("the same, frozen head", (size, "K=10, calibrated: 1.34", "frozen")),
    ):
        found = cells(loss, *words)
        yield f"| {label} | {found['cpp']} | s {found['sliced']} | {found['compiled']} | |"
    rival = of(op, "F.linear_cross_entropy" + single, trainable)["ratio"]
    names = ("cpp" + single, "cpp logits kept" + single, "cpp linear_distrl_loss" + single)
    times = [f"{rival / of(op, name, trainable)['ratio']:.1f}" for name in names]
    yield f"is {times[0]} (log-probs), {times[1]} (logits kept) or {times[2]} (as a scalar loss)"
    alone_times = (of(op, name + alone, lse)["ratio"] for name in ("F.linear_cross_entropy", "cpp"))
    forward = next(alone_times) / next(alone_times)
    yield f"the forward {forward:.1f} times (target 3)"


def of_the_steps():
    of = Cases("cpu-full.json")
    for op, said, above in (
        ("reward_step", "a reward-model step takes", " above the weights"),
        ("distrl_step", "a policy update with DistRL", ""),
    ):
        ours, full, slices = (
            f"{row['median_ms'] / 1e3:.2f} s and {row['peak_mib']:,.0f} MiB"
            for row in (of(op, name) for name in ("ipvrm", "eager full logits", "released 64-row slices"))
        )
        yield f"{said} {ours}{above} against {full} / {slices}"
    ratios = []
    for shape in ("8 sequences", "64 sequences"):
        distrl, prm = (of("policy_step", name, shape) for name in ("distrl", "grpo_prm"))
        ratios += [distrl["median_ms"] / prm["median_ms"], distrl["peak_mib"] / prm["peak_mib"]]
    yield "{:.2f} of the time and {:.2f} of the memory there, {:.2f} and {:.2f} at the".format(*ratios)


def of_the_growth():
    """From N=2048 to 16,384."""
    of, times = Cases("cpu-full.json"), []
    for op, what in (
        ("linear_logprobs", "forward"),
        ("linear_candidates", "forward + candidates"),
        ("linear_logprobs", "forward+backward, trainable head"),
        ("linear_logprobs", "forward+backward, frozen head"),
    ):
        many, few = (
            of(f"{op} over N", "cpp", f"N={rows} D=1024 V=32000 float32 K=8, {what}", exact=True)["median_ms"]
            for rows in (16384, 2048)
        )
        times.append(many / few)
    said = "the forward takes {:.1f} times as long, with candidates {:.1f}, forward + backward {:.1f} "
    yield (said + "(trainable) and {:.1f} (frozen)").format(*times)


def of_the_matmul():
    of = Cases("cpu_matmul.json")
    shapes = {row["shape"] for row in of.rows if row["op"] == "op"}
    times = [1 / of("op", "onednn", shape)["ratio"] for shape in shapes]
    yield f"take {min(times):.1f} to {max(times):.1f} times as long here"


def of_the_prefixes():
    of, op = Cases("cpu-full.json"), "prefix_value_loss"
    for shapes, label in (
        (("B=256 T=2048 ", "B=256 T=1..2048 "), "B=256 T=2048 / lengths 1..2048"),
        (("B=10000 T=25 ", "B=10000 T=1..50 "), "B=10,000 T=25 / 1..50"),
        (("B=4 T=32768 ", "B=1 T=32768 "), "B=4 T=32,768 / B=1"),
    ):
        times = " / ".join(f"{of(op, 'padded eager', shape)['median_ms']:.2f}" for shape in shapes)
        ours = " / ".join(f"**{of(op, 'cpp', shape)['ratio']:.2f}**" for shape in shapes)
        raw = " / ".join(f"{of(op, 'cpp, raw', shape)['ratio']:.2f}" for shape in shapes)
        yield f"| {label} | 1 ({times} ms) | {ours} | {raw} |"
    same = Cases("cpu-full.json"), Cases("cpu-prefix_value_loss.json")
    times = [1 / case(op, name, "B=256 T=2048 ")["ratio"] for case in same for name in ("cpp", "cpp, raw")]
    yield f"that is {times[0]:.1f} times as fast through autograd"
    yield f"The kernel alone is {times[1]:.1f} times as fast"
    yield f"it was {times[3]:.1f} times, through autograd {times[2]:.1f}"


CLAIMS = {
    "What `ipvrm demo` shows": (of_the_demo, of_the_policies),
    "Speed": (of_the_heads, of_the_growth, of_the_matmul, of_the_prefixes, of_the_steps),
}


# Numbers that are no measurement: settings, versions, and what a target is.
SETTINGS = r"torch 2\.13\.0|a row \| |1\.32 a row|1\.34 candidates|target \d"


@pytest.mark.parametrize("title", CLAIMS)
def test_the_readme_has_no_number_that_no_file_has(title):
    text = section(title)
    for said in (said for claims in CLAIMS[title] for said in claims()):
        text = text.replace(said, "")
    left = re.findall(r".{0,40}?\d+\.\d+.{0,20}", re.sub(SETTINGS, "", text))
    assert not left


@pytest.mark.parametrize(
    ("title", "claims"),
    [(title, claims) for title, functions in CLAIMS.items() for claims in functions],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_readme_says_is_what_the_files_say(title, claims):
    text = section(title)
    missing = [said for said in claims() if said not in text]
    assert not missing
