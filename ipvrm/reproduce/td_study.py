"""`ipvrm eval td`: does the one-step TD of a token foretell what the token does to the outcome? (4.3.3)

    td(c) = V(s, c) - V(s) = beta * (log pi_phi(c|s) - log pi_ref(c|s))         V of the reward model, Eq. 5

The policy answers prompts. In each answer some prefixes s are drawn at which it had a choice: at least two
candidates c with pi(c|s) >= min_prob, the set that DistRL asks (the last token is left out there and here).
Every branch (s, c), and s itself, is continued `completions` times by the policy; a verifier judges the ends.
The share of right ones is the Monte-Carlo value of the branch, and td is compared with it in two ways:

    centred      both less their mean over the branches of the prefix: which branch is the better one?
    difference   td against the branch's value less the value of the prefix: does the token help or harm?

Beside it stands what the policy's own log pi(c|s) reaches, the difference of the two correlations on the same
branches, and what td says beyond log pi (partial correlation).
A Monte-Carlo value is noisy: `ceiling` is the linear correlation of the true values with the estimated ones,
sqrt(1 - noise / variance), with noise from p (1 - p) / (completions - 1); a TD that is linear in the true
value reaches that and not 1. Intervals are over prompts, drawn with replacement.

The second table has the paper's own two numbers, over all branches pooled, each with one completion:
Pearson's correlation of td with the outcome (published: 0.0226) and the AUC of |V| after the branch's token
(0.64). The paper took 2,500 branches, the five likeliest tokens of 500 prefixes; `--top_k 5 --min_prob
0.0078125` takes at most as many, those with p >= 1/128. The third line takes V with its sign.

The third table is the AUC of the value after 25, 50, 75 and 100 % of an answer against its own outcome.

What a verifier fails on and what is cut off before its end is counted and left out, never wrong; a prompt
that cannot be used is left out, counted and named. Prompts are kept as they are finished, a file each; the
same command goes on behind them.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ipvrm.data.chat import parse_template_kwargs
from ipvrm.data.files import file_hash
from ipvrm.data.rows import OnBadRow, listed, read_prompts
from ipvrm.errors import IpvrmError
from ipvrm.evaluate.thresholds import finite_or_none
from ipvrm.losses.metrics import auc
from ipvrm.models.behaviour import other_variables
from ipvrm.models.causal_lm import least_positions, load_model, load_tokenizer, weights_hash
from ipvrm.models.reward_model import BATCH_TOKENS, RewardModel
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL, Server, check_engine, kind_of
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.reproduce.correlation import bootstrap, centred, less, partial, pearson, spearman
from ipvrm.reproduce.td_branches import FRACTIONS, Brancher, BranchOptions
from ipvrm.rollouts.answers import as_questions
from ipvrm.rollouts.engine import Engine, Sampling, TransformersEngine, stop_ids
from ipvrm.rollouts.server_engine import ServerEngine
from ipvrm.rollouts.verify import TIMEOUT_SECONDS, VerifierPool
from ipvrm.run_folder import (
    FREE,
    begin_or_go_on,
    manifest,
    read_json,
    read_part,
    remove_leftovers,
    settings_of,
    write_json,
)

RECORD = {"row", "outcomes", "answers"}  # entries of a kept prompt
RECORDS = 2  # what is kept of a prompt: `first` and `value` of a branch came with 2
PUBLISHED = {"td_pearson": 0.0226, "abs_value_auc": 0.64}  # section 4.3.3
CHUNK_PROMPTS = 16  # sampled together: what an interruption can lose
WORDS = {
    "records": "what is kept of a prompt",
    "data_hash": "the data",
    "policy_hash": "the policy",
    "reward_model_hash": "the reward model",
    "reference_hash": "the reference",
}
AT_LEAST_ONE = (
    "num_prompts",
    "num_responses",
    "prefixes_per_response",
    "per_device_eval_batch_size",
    "batch_tokens",
    "bootstrap_resamples",
)


@dataclass(frozen=True)
class TdConfig:
    """Correlation of the one-step TD with the Monte-Carlo outcome of branches, and AUC of the value."""

    policy: str = field(metadata=FREE)
    """What answers and continues: a folder or a Hub name."""
    reward_model: str = field(metadata=FREE)
    """Run folder of the reward model."""
    data: str = field(metadata=FREE)
    """.parquet, .jsonl or .json of `prompt` and `answer` (or `reward_model.ground_truth`)."""
    output_dir: str = field(metadata=FREE)
    """Folder for results.json and prompts/, one file of branches per prompt."""
    reference: str | None = field(default=None, metadata=FREE)
    """Where the reward model's reference is, if it has moved."""
    objective: Literal["endo_rm"] | None = None
    """endo_rm: --reward_model is any causal LM, whose own logits are the reward. Default: what its folder
    says."""
    num_prompts: int = field(default=128, metadata=FREE)
    """The first so many rows. A later run with more goes on."""
    num_responses: int = 4
    """Answers per prompt."""
    prefixes_per_response: int = 4
    """Most prefixes of an answer that are branched, drawn from those with two candidates or more."""
    completions: int = 16
    """Of every branch and prefix."""
    min_prob: float = 0.1
    """Candidates are the tokens with at least this probability under the policy."""
    top_k: int | None = None
    """Only so many of the likeliest candidates. Default: all."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object, for example '{"enable_thinking": false}'."""
    max_new_tokens: int = 2048
    """Most tokens of an answer, and of a branch with its prefix and completion."""
    temperature: float = 1.0
    """Of what is sampled and of the candidates' probabilities. Values are those of `ipvrm score`."""
    verifier: str = "math"
    """math, string or module:function, as in `ipvrm label`."""
    verifier_timeout: float = field(default=TIMEOUT_SECONDS, metadata=FREE)
    """Hard deadline of one answer, in seconds."""
    verifier_workers: int | None = field(default=None, metadata=FREE)
    """Processes. Default: one per available core."""
    per_device_eval_batch_size: int = field(default=64, metadata=FREE)
    """Most responses generated at a time."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """transformers, or the address of a server of `policy`, such as vLLM's http://localhost:8000/v1."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of its answers."""
    batch_tokens: int = field(default=BATCH_TOKENS, metadata=FREE)
    """Most tokens of a padded forward."""
    bootstrap_resamples: int = field(default=2000, metadata=FREE)
    """Resamples of the prompts for the intervals."""
    seed: int = 42
    use_cpu: bool = field(default=False, metadata=FREE)
    """Work on the CPU although there is an accelerator."""

    @property
    def on_bad_row(self) -> OnBadRow:
        """A prompt that cannot be used is left out, named and counted: a correlation has no miss."""
        return "skip"


def study(config: TdConfig, progress: bool = True) -> dict[str, Any]:
    """Branches what is not branched yet, prints the tables and writes results.json, which it returns.

    Raises:
        IpvrmError: settings out of range, unreadable data or models, another vocabulary, no usable prompt, or
            an output folder with a study of other settings.
    """
    _check(config)
    with locked(config.output_dir, folder=True):
        return _study(config, progress)


def _study(config: TdConfig, progress: bool) -> dict[str, Any]:
    shown, output = Progress(enabled=progress), Path(config.output_dir)
    tokenizer = load_tokenizer(config.policy)
    accelerator = None if config.use_cpu else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    template_kwargs = parse_template_kwargs(config.chat_template_kwargs)
    reward_model = RewardModel.from_pretrained(
        config.reward_model,
        config.reference,
        device,
        objective=config.objective,
        chat_template_kwargs=None if config.objective is None else template_kwargs,
    )
    if reward_model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise IpvrmError(
            f"{config.reward_model}: its tokenizer is not the policy's, so the policy's tokens have no value"
        )
    if said := other_variables(Path(config.reward_model), reward_model.info, template_kwargs):
        shown.note(said)
    policy = load_model(config.policy, torch.float32, device)
    prompts, bad = read_prompts(config.data, config.on_bad_row, limit=config.num_prompts)
    server = None
    if config.engine != LOCAL:
        size = config.per_device_eval_batch_size
        server = Server(config.engine, config.policy, config.engine_timeout, size)
    served = None if server is None else server.max_positions
    context = least_positions(policy, reward_model.max_positions, served)
    questions, bad = as_questions(prompts, bad, config.data, tokenizer, config, context)
    folder = output / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(output)
    settings, note = _settings(config, reward_model), shown.note if device.type == "cpu" else None
    begin_or_go_on(output / "settings.json", settings, f"the study in {output}", WORDS, note)
    paths = {q.prompt.row: folder / f"{q.prompt.row:08d}.json" for q in questions}
    remaining = [q for q in questions if read_part(paths[q.prompt.row], RECORD, shown.note) is None]
    done = len(questions) - len(remaining)
    if done:
        shown.note(f"going on behind {done} of {len(questions)} prompts")
    stops = stop_ids(policy, tokenizer)
    engine: Engine = TransformersEngine(policy, stops, config.per_device_eval_batch_size)
    if server is not None:
        engine = ServerEngine(server, stops)
    try:
        with (
            VerifierPool(config.verifier, config.verifier_workers, config.verifier_timeout) as pool,
            shown.bar("prompts", len(questions), done) as update,
        ):
            options = BranchOptions(**{f.name: getattr(config, f.name) for f in fields(BranchOptions)})
            brancher = Brancher(options, policy, reward_model, tokenizer, engine, stops, pool)
            for start in range(0, len(remaining), CHUNK_PROMPTS):
                for record in brancher.run(remaining[start : start + CHUNK_PROMPTS]):
                    write_json(paths[record["row"]], record)
                    done += 1
                update(done)
    except KeyboardInterrupt:
        shown.note(f"{done} of {len(questions)} prompts are kept; the same command goes on")
        raise
    records = [read_json(path) for path in paths.values()]
    results = {
        **analyse(records, config.bootstrap_resamples, config.seed),
        "unusable": [str(row) for row in bad],
        "reward_model": {"objective": reward_model.info.objective, "beta": reward_model.info.beta},
        "manifest": manifest(seeds={"seed": config.seed}, config=asdict(config), device=str(device)),
    }
    write_json(output / "results.json", results)
    if progress:
        if bad:
            print(f"{len(bad)} prompts cannot be used; they are left out:\n{listed(bad, len(bad))}")
        _print(results)
    return results


def _check(config: TdConfig) -> None:
    for name in AT_LEAST_ONE:
        if (value := getattr(config, name)) < 1:
            raise IpvrmError(f"--{name} must be at least 1; got {value}")
    if config.top_k is not None and config.top_k < 2:
        raise IpvrmError(f"--top_k must be at least 2: one branch has nothing beside it; got {config.top_k}")
    if config.completions < 2:
        raise IpvrmError(
            f"--completions must be at least 2, since their spread gives the noise; got {config.completions}"
        )
    if not 1 / 128 <= config.min_prob <= 0.5:
        raise IpvrmError(
            f"--min_prob must lie in [1/128, 0.5]: above, no two tokens have it; got {config.min_prob}"
        )
    if not 0 < config.temperature < math.inf:
        raise IpvrmError(f"--temperature must be positive; got {config.temperature}")
    if config.seed < 0:
        raise IpvrmError(f"--seed must not be negative; got {config.seed}")
    check_engine(config.engine, config.engine_timeout)
    Sampling(config.max_new_tokens)


def _settings(config: TdConfig, reward_model: RewardModel) -> dict[str, Any]:
    """What decides the numbers of a prompt."""
    return (
        settings_of(config)
        | kind_of(config.engine)
        | {
            "records": RECORDS,
            "data_hash": file_hash(config.data),
            "policy_hash": weights_hash(config.policy),
            "reward_model_hash": reward_model.info.weights_hash,
            "reference_hash": reward_model.info.reference_hash,
        }
    )


# ------------------------------------------------------------------------------------------------ analysis


def analyse(records: Sequence[dict[str, Any]], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Counts, correlations and AUC of prompts' records; null where undefined.

    A branch without one judged completion is left out, and a prefix with fewer than two branches left.
    """
    counts: Counter[str] = Counter(prompts=len(records))
    outcomes: Counter[str] = Counter()
    rows: list[tuple[float, ...]] = []  # prompt, prefix, td, logprob, rate, noise, prefix rate, prefix noise
    for record in records:
        counts.update({f"answers_{name}": n for name, n in record["outcomes"].items()})
        for answer in record["answers"]:
            for prefix in answer["prefixes"]:
                own, branches = prefix["own"], prefix["branches"]
                for part in (own, *branches):
                    outcomes.update(part["outcomes"])
                judged = [b for b in branches if b["judged"]]
                counts["branches_without_verdict"] += len(branches) - len(judged)
                if len(judged) < 2:
                    counts["prefixes_left_out"] += 1
                    continue
                for b in judged:
                    measured = (b["td"], b["logprob"], *_rate(b), *_rate(own))
                    rows.append((record["row"], counts["prefixes"], *measured))
                counts["prefixes"] += 1
                counts["branches"] += len(judged)
    counts["prompts_with_prefixes"] = len({row[0] for row in rows})
    counts.update({f"completions_{name}": n for name, n in outcomes.items()})
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    return {
        "counts": {name: counts[name] for name in sorted(counts)},
        "correlation": _correlations(table, resamples, seed),
        "paper": _as_in_the_paper(records, resamples, seed),
        "auc": _value_auc(records, resamples, seed),
    }


def _rate(part: dict[str, Any]) -> tuple[float, float]:
    """(share of right completions, the variance of its error), nan without a verdict."""
    if not part["judged"]:
        return math.nan, math.nan
    rate = part["right"] / part["judged"]
    spread = rate * (1 - rate) / (part["judged"] - 1) if part["judged"] > 1 else 0.25  # the most it can be
    return rate, spread


def _correlations(table: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    prompt, prefix = table[:, 0], table[:, 1].astype(np.int64)
    td, logprob, rate, noise, own_rate, own_noise = table[:, 2:].T
    known = ~np.isnan(own_rate)
    # the error of a value less the mean of m is m - 1 m-ths of the branches' own, summed over the prefix
    shrink = 1 - 1 / np.maximum(np.bincount(prefix), 1)[prefix] if len(prefix) else noise
    views = {
        "centred": (
            {"td": centred(td, prefix), "log_prob": centred(logprob, prefix)},
            centred(rate, prefix),
            noise * shrink,
            np.ones(len(rate), dtype=bool),
        ),
        "difference": ({"td": td, "log_prob": logprob}, rate - own_rate, noise + own_noise, known),
    }
    found: dict[str, Any] = {}
    for name, (predictors, target, error, used) in views.items():
        y = target[used]
        view: dict[str, Any] = {"branches": int(used.sum()), "ceiling": _ceiling(y, error[used])}
        for predictor, x in predictors.items():
            view[predictor] = {
                kind: _with_interval(function, (x[used], y), prompt[used], resamples, seed)
                for kind, function in (("pearson", pearson), ("spearman", spearman))
            }
        both = (predictors["td"][used], y, predictors["log_prob"][used])
        for name_of, of_both in (("td_less_log_prob", less), ("td_beyond_log_prob", partial)):
            view[name_of] = {
                kind: _with_interval(
                    functools.partial(of_both, function), both, prompt[used], resamples, seed
                )
                for kind, function in (("pearson", pearson), ("spearman", spearman))
            }
        found[name] = view
    return found


def _ceiling(y: np.ndarray, noise: np.ndarray) -> float | None:
    """Linear correlation of the estimated values y (n,), with error variances `noise` (n,), with the true."""
    if len(y) < 2 or not (variance := float(y.var())):
        return None
    return math.sqrt(max(0.0, 1 - float(noise.mean()) / variance))


def _as_in_the_paper(records: Sequence[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    """Section 4.3.3 with one completion a branch, and what the paper published."""
    rows = [
        (record["row"], b["td"], b["value"], b["first"])
        for record in records
        for answer in record["answers"]
        for prefix in answer["prefixes"]
        for b in prefix["branches"]
        if b["first"] is not None
    ]
    prompt, td, value, outcome = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    statistics: dict[str, tuple[Callable[..., float | None], np.ndarray]] = {
        "td_pearson": (pearson, td),
        "abs_value_auc": (auc, np.abs(value)),
        "value_auc": (auc, value),
    }
    found = {
        name: _with_interval(statistic, (x, outcome), prompt, resamples, seed)
        | {"published": PUBLISHED.get(name)}
        for name, (statistic, x) in statistics.items()
    }
    return {"branches": len(rows), "right": int(outcome.sum()), **found}


def _value_auc(records: Sequence[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    answers = [(record["row"], answer) for record in records for answer in record["answers"]]
    prompt = np.array([row for row, _ in answers])
    outcome = np.array([answer["right"] for _, answer in answers], dtype=np.float64)
    return {
        name: {
            str(fraction): _with_interval(
                auc,
                (np.array([a[name][str(fraction)] for _, a in answers], dtype=np.float64), outcome),
                prompt,
                resamples,
                seed,
            )
            for fraction in FRACTIONS
        }
        for name in ("mean_value", "value")
    }


def _with_interval(
    statistic: Callable[..., float | None],
    columns: Sequence[np.ndarray],
    prompt: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    low, high = bootstrap(statistic, columns, prompt, resamples, seed)
    return finite_or_none({"value": statistic(*columns), "low": low, "high": high})


# -------------------------------------------------------------------------------------------------- output

LABELS = {
    "td": "TD",
    "log_prob": "log pi",
    "td_less_log_prob": "TD - log pi",
    "td_beyond_log_prob": "TD | log pi",
}


OF_THE_PAPER = {
    "td_pearson": "Pearson of TD and outcome",
    "abs_value_auc": "AUC of |V| after the token",
    "value_auc": "AUC of V after the token",
}


def _cell(entry: dict[str, Any], digits: int) -> str:
    if entry["value"] is None or entry["low"] is None:
        return "-"
    return f"{entry['value']:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, counts = Console(highlight=False), results["counts"]
    completions = sum(n for name, n in counts.items() if name.startswith("completions_"))
    console.print(
        f"{counts['prompts']} prompts, {counts['prompts_with_prefixes']} with a prefix to branch: "
        f"{counts.get('prefixes', 0)} prefixes, {counts.get('branches', 0)} branches, "
        f"{completions} completions, {counts.get('completions_truncated', 0)} of them cut off",
        markup=False,
    )
    options: dict[str, Any] = {
        "title_justify": "left",
        "title_style": "bold",
        "box": None,
        "padding": (0, 1, 0, 0),
    }
    table = Table(title="Correlation with the Monte-Carlo value (95 % interval over prompts)", **options)
    for i, name in enumerate(("", "Pearson", "Spearman", "ceiling")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for view, found in results["correlation"].items():
        ceiling = "-" if found["ceiling"] is None else f"{found['ceiling']:.2f}"
        for predictor, label in LABELS.items():
            cells = [_cell(found[predictor][kind], 2) for kind in ("pearson", "spearman")]
            table.add_row(f"{label}, {view}", *cells, ceiling if predictor == "td" else "")
    console.print(table)
    found = results["paper"]
    title = f"Section 4.3.3: {found['branches']} branches, one completion each, {found['right']} right"
    table = Table(title=title, **options)
    for i, name in enumerate(("", "here", "paper")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for name, label in OF_THE_PAPER.items():
        published = found[name]["published"]
        table.add_row(label, _cell(found[name], 3), "-" if published is None else f"{published:g}")
    console.print(table)
    table = Table(title="AUC of the value against the answer's own outcome", **options)
    table.add_column("after", justify="left")
    for name in ("mean value V_t / t", "value V_t"):
        table.add_column(name, justify="right", no_wrap=True)
    for fraction in FRACTIONS:
        cells = [_cell(results["auc"][n][str(fraction)], 3) for n in ("mean_value", "value")]
        table.add_row(f"{fraction} %", *cells)
    console.print(table)


def main(config: TdConfig) -> None:
    """Console entry."""
    study(config)
    print(f"everything is in {config.output_dir}")
