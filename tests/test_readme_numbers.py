"""Every number of the README's results is in a file of benchmarks/results: what is said is written here from
the files, and where all of that is taken out of the text no number is left but settings."""

import json
import re
import shutil
import subprocess
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


def of_the_demo():
    found = read("demo/results.json")
    assert set(found["manifest"]["commit"]) <= set("0123456789abcdef"), "not of a clean checkout"
    yield f"one run took {sum(stage['seconds'] for stage in found['stages'].values()):.0f} s"


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
    of = Cases("cpu-amd-zen-5.json")
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
    of = Cases("cpu-amd-zen-5.json")
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
    of, times = Cases("cpu-amd-zen-5.json"), []
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
    of = Cases("cpu_matmul-amd-zen-5.json")
    shapes = {row["shape"] for row in of.rows if row["op"] == "op"}
    times = [1 / of("op", "onednn", shape)["ratio"] for shape in shapes]
    yield f"take {min(times):.1f} to {max(times):.1f} times as long here"


def of_the_prefixes():
    of, op = Cases("cpu-amd-zen-5.json"), "prefix_value_loss"
    for shapes, label in (
        (("B=256 T=2048 ", "B=256 T=1..2048 "), "B=256 T=2048 / lengths 1..2048"),
        (("B=10000 T=25 ", "B=10000 T=1..50 "), "B=10,000 T=25 / 1..50"),
        (("B=4 T=32768 ", "B=1 T=32768 "), "B=4 T=32,768 / B=1"),
    ):
        times = " / ".join(f"{of(op, 'padded eager', shape)['median_ms']:.2f}" for shape in shapes)
        ours = " / ".join(f"**{of(op, 'cpp', shape)['ratio']:.2f}**" for shape in shapes)
        raw = " / ".join(f"{of(op, 'cpp, raw', shape)['ratio']:.2f}" for shape in shapes)
        yield f"| {label} | 1 ({times} ms) | {ours} | {raw} |"
    same = Cases("cpu-amd-zen-5.json"), Cases("cpu-prefix_value_loss.json")
    times = [1 / case(op, name, "B=256 T=2048 ")["ratio"] for case in same for name in ("cpp", "cpp, raw")]
    yield f"that is {times[0]:.1f} times as fast through autograd"
    yield f"The kernel alone is {times[1]:.1f} times as fast"
    yield f"it was {times[3]:.1f} times, through autograd {times[2]:.1f}"


CLAIMS = {
    "What `ipvrm demo` shows": (of_the_demo, of_the_reward_models, of_best_of_n, of_the_policies),
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


# Of checkouts with changes. Nobody knows which; in td_study and demo_policies the study's own first results
# were among them, which it wrote before it asked for the commit. No number above rests on these.
OF_CHANGED_CHECKOUTS = {
    "demo_policies.json", "demo_selection.json", "real_input/processbench.json",
    "rollout_and_label/engine.json", "td_study/comparison.json", "td_study/implicit_prm.json",
}  # fmt: skip


# Made on branches that were rebased afterwards: the code is in the history, under another commit.
OF_LOST_COMMITS = {
    "label_truths/label_truths.json", "rollout_and_label/label_agreement.json",
    "trl_updates/trl_updates.json",
}  # fmt: skip
# The first is what the runs beside it give, the second was written before commands wrote a manifest.
WITHOUT_A_COMMIT = {"demo_spread/summary.json", "real_input/train_rm.json"}


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
    assert unclean == OF_CHANGED_CHECKOUTS


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
        if name not in OF_CHANGED_CHECKOUTS | WITHOUT_A_COMMIT
        and git("merge-base", "--is-ancestor", made_by(path)["commit"], "HEAD").returncode
    }
    assert lost <= OF_LOST_COMMITS
    assert git("merge-base", "--is-ancestor", "0" * 40, "HEAD").returncode, "git takes any commit for one"
