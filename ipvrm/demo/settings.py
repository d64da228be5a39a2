"""Settings of `ipvrm demo`: sizes, time budgets and the hyperparameters of reward models and policies."""

from dataclasses import dataclass

# Seconds on two idle cores.
BUDGETS: dict[str, float] = {
    "base": 60,
    "rollouts": 30,
    "reward-ipvrm": 37.5,
    "reward-implicit_prm": 37.5,
    "evaluation": 30,
    "policy-start": 6,
    "policy-grpo": 40,
    "policy-grpo_prm": 52,
    "policy-distrl": 52,
}


@dataclass(frozen=True)
class DemoConfig:
    """The whole method on a task small enough for two CPU cores: some minutes, or one with --quick; the
    report says what each part took."""

    output_dir: str = "runs/demo"
    """Folder for models, tables and the picture; finished stages in it are reused."""
    quick: bool = False
    """A one-minute smoke run: the same stages on an easier task (multiples of ten) and little data."""
    seed: int = 0
    """Of everything that is drawn: problems, weights, samples, orders, intervals."""
    policy_seeds: int = 1
    """Runs of each policy algorithm, seeds from `seed` upwards; one more takes about two minutes."""


@dataclass(frozen=True)
class PolicySettings:
    """The policy runs: the same for every algorithm."""

    steps: int = 16
    prompts: int = 32
    responses: int = 8
    """Per prompt."""
    minibatch_size: int = 64
    learning_rate: float = 2e-4
    gae_coef: float = 0.1
    """Of `grpo_prm` and `distrl`; the paper's is 1."""
    held_out: int = 1024
    """Problems on which the policies are measured, one response each."""
    points: int = 4
    """Of the curve of held-out accuracy, besides the start."""


@dataclass(frozen=True)
class Sizes:
    """How hard the task is, and how much of everything."""

    multiple_of: int = 1
    """Numbers added and subtracted are multiples of this; 10 makes the task easy to learn."""
    hidden_size: int = 96
    num_layers: int = 3
    base_max_steps: int = 1600
    base_batch: int = 16
    train_problems: int = 1024
    rollouts_per_problem: int = 4
    validation_traces: int = 512
    test_traces: int = 1024
    best_of_problems: int = 128
    best_of_samples: int = 16
    best_of_n: tuple[int, ...] = (4, 16)
    bootstrap_resamples: int = 2000
    policies: PolicySettings = PolicySettings()


FULL = Sizes()
QUICK = Sizes(
    multiple_of=10,
    base_max_steps=400,
    train_problems=128,
    validation_traces=64,
    test_traces=128,
    best_of_problems=32,
    best_of_samples=4,
    best_of_n=(2, 4),
    bootstrap_resamples=500,
    policies=PolicySettings(steps=2, prompts=16, responses=4, held_out=128, points=2),
)


@dataclass(frozen=True)
class Choice:
    """Hyperparameters of one reward model, and the rule that turns its values into step scores."""

    objective: str
    beta: float
    margin: float | None
    learning_rate: float
    num_train_epochs: float
    rule: str


# Chosen by benchmarks/studies/select_demo_hyperparameters.py: benchmarks/results/demo_selection.json.
CHOICES = (
    Choice("ipvrm", beta=50.0, margin=1.0, learning_rate=3e-4, num_train_epochs=3, rule="prefix"),
    Choice("implicit_prm", beta=1.0, margin=None, learning_rate=1e-3, num_train_epochs=3, rule="mean"),
)
NAMES = {"ipvrm": "IPVRM", "implicit_prm": "Implicit PRM"}
ALGORITHMS = {"grpo": "GRPO", "grpo_prm": "GRPO + IPVRM", "distrl": "DistRL + IPVRM"}
