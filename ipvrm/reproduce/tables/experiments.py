"""The runs behind the paper's tables, as one list of units; a table takes those it needs.

    SFT model -> five responses a prompt -> labels -> one pair a prompt -> reward models -> Best-of-N, F1, TD
                                                                        -> policies      -> avg@8

The list is the same at every scale: a `Scale` says what it starts from, how much of everything, and what of
a command's flags is not the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ipvrm.reproduce.fig6 import VARIANTS
from ipvrm.reproduce.tables.inputs import PARTS, STEP_PARTS
from ipvrm.reproduce.tables.paper import BENCHMARKS, COLUMNS
from ipvrm.reproduce.tables.plan import Output, Unit

OBJECTIVES = ("q_rm", "dpo", "implicit_prm", "ipvrm")
POLICIES: dict[str, tuple[str, str | None]] = {  # unit: algorithm, reward model
    "grpo": ("grpo", None),
    "spro": ("spro", None),
    "prime": ("prime", "implicit_prm"),
    "reinforce_qrm": ("reinforce_qrm", "q_rm"),
    "grpo_prm-dpo": ("grpo_prm", "dpo"),
    "grpo_prm-implicit_prm": ("grpo_prm", "implicit_prm"),
    "grpo_prm-ipvrm": ("grpo_prm", "ipvrm"),
    "distrl-dpo": ("distrl", "dpo"),
    "distrl-implicit_prm": ("distrl", "implicit_prm"),
    "distrl-ipvrm": ("distrl", "ipvrm"),
}
# Of the reward model's online update (Figure 6): unit and switches; with both on it is the method itself.
UPDATES = {
    name: ("distrl-ipvrm", {}) if name == "both" else (f"distrl-{name}", switches)
    for name, switches in VARIANTS.items()
}
MARGINS = ("m = 0", "m = 5", "m = 10")  # of the paper; at another scale none, that of its IPVRM, twice that
RESPONSES = 5  # a prompt, for the reward models (section 4.1)
# Section 4.3.3: the paper takes the five likeliest tokens at a prefix whatever their probability, 2,500 of
# 500 prefixes. Here they are at most 2,500: those of the five with p >= 1/128, the least that `eval td` asks
# for. That is not P_min, by which a prefix has 1.33 on average (Table 11).
TD_BRANCHES, TD_MIN_PROB = 5, 1 / 128


@dataclass(frozen=True)
class Scale:
    """What the units start from, and how much of everything."""

    model: str | Output
    """The SFT model: policy, reference, start of every reward model."""
    prompts: str | Output
    """Of reward models and policies."""
    problems: str | Output
    """Of the evaluations, with `data_source`."""
    processbench: str | Output
    benchmarks: dict[str, str]
    """`data_source` of each benchmark of the paper."""
    subsets: dict[str, str]
    """File of each subset of ProcessBench."""
    num_prompts: int
    num_problems: int
    """How many `problems` hold; for the estimate alone."""
    num_items: int
    """The same of `processbench`."""
    num_steps: int
    """Rollout batches of a policy."""
    bon_samples: int = 64
    eval_samples: int = 8
    td_prompts: int = 500
    task: dict[str, Any] | None = None
    """The demo's task, where the units start from that."""
    margin: float = 5.0
    """Of IPVRM."""
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a command, in every unit of it."""
    objective_flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of train-rm, by objective."""
    algorithm_flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of train-policy, by algorithm."""
    rollout_prompts: int = 512
    num_generations: int = 4
    reward_flags: dict[str, Any] = field(default_factory=dict)
    """Of train-policy where a reward model is updated."""
    gae_flags: dict[str, Any] = field(default_factory=dict)
    """Of train-policy where GAE is read."""


def full(model: str, prompts: str, problems: str, processbench: str) -> Scale:
    """The paper's settings, which are our commands' defaults; what it leaves open is in `OPEN`."""
    names = ("aimo-aime2024", "math-500", "minerva-math", "olympiad-bench", "aimo-amc")
    files = ("gsm8k", "math", "olympiadbench", "omnimath")
    return Scale(
        model=model,
        prompts=prompts,
        problems=problems,
        processbench=processbench,
        benchmarks=dict(zip(BENCHMARKS, names, strict=True)),
        subsets=dict(zip(COLUMNS["table2"], files, strict=False)),
        num_prompts=16_384,
        num_problems=1620,
        num_items=3400,
        num_steps=95,
        flags={"rollout": {"on_bad_row": "skip"}, "train-policy": {"on_bad_row": "skip"}},
    )


OPEN = (
    "Where the paper is silent: 16,384 prompts for the reward models; 95 steps of a policy, the points of "
    "its Figure 6 (Llama3.2-1B, one every 2,048 responses, which is 512 prompts of 4); Best-of-N picks by "
    "what the objective trains: the mean value (IPVRM, Q-RM) or the sum (DPO-RM, Implicit PRM, EndoRM)."
)


def smoke(seed: int = 0) -> Scale:
    """Every unit on the demo's task, in the easy form of `ipvrm demo --quick`, and small."""
    sizes = {"multiple_of": 10, "base_max_steps": 400, "problems": 256, "held_out": 60, "traces": 160}
    return on_task(sizes, seed, num_steps=2, rollout_prompts=16, num_generations=4, td_prompts=12)


def on_task(
    sizes: dict[str, int],
    seed: int,
    *,
    num_steps: int,
    rollout_prompts: int,
    num_generations: int,
    td_prompts: int,
    bon_samples: int = 64,
    eval_samples: int = 8,
    epochs: float = 3,
) -> Scale:
    """The demo's task in `sizes` (of `TaskConfig`), with the hyperparameters of the demo's models.

    Those of IPVRM and Implicit PRM, of the policies and of what they share were chosen for the demo; DPO-RM
    has the Implicit PRM's. Q-RM has a beta at which its loss saturates here, which at the paper's 0.2 it does
    not, and the policy that learns from it a tenth of the others' rate: its scores are not centred, and what
    it has wrong about tokens that the policy hardly ever takes, the policy comes to take.
    """
    verifier = {"verifier": "ipvrm.demo.arithmetic:right_answer"}
    sampling = {"max_new_tokens": 72, "per_device_eval_batch_size": 512}
    one = {**verifier, "verifier_workers": 1}
    implicit = {"beta": 1.0, "learning_rate": 1e-3}
    return Scale(
        model=Output("task", "base"),
        prompts=Output("task", "train.jsonl"),
        problems=Output("task", "held_out.jsonl"),
        processbench=Output("task", "processbench"),
        benchmarks=dict(zip(BENCHMARKS, PARTS, strict=True)),
        subsets=dict(zip(COLUMNS["table2"], STEP_PARTS, strict=False)),
        num_prompts=sizes["problems"],
        num_problems=sizes["held_out"],
        num_items=sizes["traces"],
        num_steps=num_steps,
        bon_samples=bon_samples,
        eval_samples=eval_samples,
        td_prompts=td_prompts,
        task=sizes | {"seed": seed},
        margin=1.0,
        rollout_prompts=rollout_prompts,
        num_generations=num_generations,
        flags={
            "rollout": {**sampling, "use_cpu": True},
            "label": {**verifier, "num_workers": 1},
            "train-rm": {
                "num_train_epochs": epochs,
                "warmup_ratio": 0.05,
                "per_device_train_batch_size": 32,
                "max_length": 256,
                "save_steps": 0,
                "use_cpu": True,
            },
            "train-policy": {
                **sampling,
                **one,
                "rollout_prompts": rollout_prompts,
                "train_prompts": rollout_prompts,
                "num_generations": num_generations,
                "minibatch_size": 64,
                "learning_rate": 2e-4,
                "lora_r": 0,
                "per_device_train_batch_size": 64,
                "save_steps": 0,
                "use_cpu": True,
            },
            "eval processbench": {
                "step_format": "{step}",
                "step_separator": ";",
                "transfer_from": STEP_PARTS[0],
                "use_cpu": True,
            },
            "eval bon": {"step_separator": ";", "use_cpu": True},
            "eval policy": {**sampling, **one, "use_cpu": True},
            "eval td": {**sampling, **one, "use_cpu": True},
        },
        objective_flags={
            "ipvrm": {"beta": 50.0, "learning_rate": 3e-4},
            "implicit_prm": implicit,
            "dpo": implicit,
            "q_rm": {"beta": 5.0, "margin": 0.0, "learning_rate": 1e-3},
        },
        algorithm_flags={
            "prime": {"rm_learning_rate": 1e-4},  # as the others' reward models; its default is 1e-6
            "reinforce_qrm": {"learning_rate": 2e-5},
        },
        reward_flags={"rm_lora_r": 0, "rm_minibatch_size": 64},
        gae_flags={"gae_coef": 0.1},
    )


def margin_unit(row: str) -> str:
    """The reward model behind a row of Table 10."""
    return "rm-ipvrm" if row == "m = 5" else f"rm-ipvrm-{row.replace(' = ', '')}"


def experiments(scale: Scale, weightings: Sequence[str] = ()) -> list[Unit]:
    """All units, each behind what it needs.

    Args:
        weightings: of prefixes, besides the uniform one, to train an IPVRM with; no table has them.
    """
    units: list[Unit] = []

    def add(name: str, command: str, sampled: float = 0, passes: float = 0, **settings: Any) -> Output:
        settings = {**scale.flags.get(command, {}), **settings}
        units.append(Unit(name, command, settings, sampled, passes))
        return Output(name)

    if scale.task is not None:
        add("task", "demo task", **scale.task)
    n = scale.num_prompts * RESPONSES
    rollouts = add(
        "rm-rollouts", "rollout", n, model=scale.model, input=scale.prompts, num_generations=RESPONSES,
        limit=scale.num_prompts,
    )  # fmt: skip
    labelled = add("rm-labelled", "label", input=rollouts)
    pairs = add("rm-pairs", "one pair a prompt", input=labelled)
    models: dict[str, tuple[Output | str, dict[str, Any]]] = {
        "endo_rm": (scale.model, {"objective": "endo_rm"})
    }
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        *((f"rm-{objective}", objective, {}) for objective in OBJECTIVES),
        *(
            (margin_unit(row), "ipvrm", {"margin": factor * scale.margin})
            for row, factor in zip(MARGINS, (0, 1, 2), strict=True)
            if factor != 1
        ),
        *((f"rm-ipvrm-{w}", "ipvrm", {"prefix_weighting": w}) for w in weightings),
    ]
    for name, objective, own in wanted:
        flags = scale.objective_flags.get(objective, {})
        if objective == "ipvrm":
            flags = flags | {"margin": scale.margin}
        # half of the prompts are taken to be mixed: a pair each; the reference once, forward and backward
        made = add(
            name, "train-rm", 0, scale.num_prompts * 4, model=scale.model, train_data=pairs,
            objective=objective, **(flags | own),
        )  # fmt: skip
        models[name.removeprefix("rm-")] = (made, {})
    sources = tuple(scale.benchmarks[name] for name in ("MATH-500", "Minerva"))
    problems = add("bon-problems", "problems of", input=scale.problems, sources=sources)
    share = scale.num_problems / 2 * scale.bon_samples
    sampled = add(
        "bon-rollouts", "rollout", share, model=scale.model, input=problems, num_generations=scale.bon_samples
    )
    candidates = add("bon-labelled", "label", input=sampled, keep_all=True)
    for name, (model, own) in models.items():
        add(f"bon-{name}", "eval bon", 0, 2 * share, model=model, data=candidates, **own)
        add(
            f"pb-{name}", "eval processbench", 0, 2 * scale.num_items, model=model,
            data=(scale.processbench,), **own,
        )  # fmt: skip
    td_problems = add("td-problems", "problems of", input=scale.problems, sources=sources[:1])
    add(
        "td", "eval td", scale.td_prompts * (1 + 2 * (1 + TD_BRANCHES)), policy=scale.model,
        reward_model=Output("rm-ipvrm"), data=td_problems, num_prompts=scale.td_prompts, num_responses=1,
        prefixes_per_response=1, completions=2, top_k=TD_BRANCHES, min_prob=TD_MIN_PROB,
    )  # fmt: skip
    policies: dict[str, Output | str] = {"sft": scale.model}
    responses = scale.num_steps * scale.rollout_prompts * scale.num_generations
    trained: list[tuple[str, str, str | None, dict[str, Any]]] = [
        *((name, algorithm, reward, {}) for name, (algorithm, reward) in POLICIES.items()),
        *((name, "distrl", "ipvrm", own) for name, own in UPDATES.values() if name not in POLICIES),
    ]
    for name, algorithm, reward, switches in trained:
        own = switches | scale.algorithm_flags.get(algorithm, {})
        if reward is not None:
            own |= {"reward_model": Output(f"rm-{reward}")}
        if algorithm in ("distrl", "grpo_prm"):
            own |= scale.gae_flags
        online = algorithm in ("distrl", "grpo_prm", "prime") and switches.get("rm_update") != "frozen"
        if online:
            own |= scale.reward_flags
        # behaviour, forward, backward; the reward model's forward, and where it learns both besides
        passes = 4 + (4 if online else reward is not None)
        policies[name] = add(
            f"policy-{name}", "train-policy", responses, responses * passes,
            model=scale.model, train_data=scale.prompts, algorithm=algorithm, max_steps=scale.num_steps,
            **own,
        )  # fmt: skip
    for name, policy in policies.items():
        add(
            f"eval-{name}", "eval policy", scale.num_problems * scale.eval_samples, model=policy,
            data=scale.problems, num_generations=scale.eval_samples,
            k=tuple(k for k in (1, 4, 8) if k <= scale.eval_samples),
        )  # fmt: skip
    return units
