"""`ipvrm <command>`: one table of commands, each a dataclass of flags and a function, imported on use."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ipvrm.errors import IpvrmError, cause, reading
from ipvrm.output.streams import protect
from ipvrm.run_folder import installed_version


@dataclass(frozen=True)
class Command:
    """`module` holds the dataclass `config` and the function `run` that takes it (else the arguments)."""

    help: str
    module: str
    config: str | None
    run: str


COMMANDS = {
    "demo": Command(
        "the whole method on a small task, offline, on the CPU", "ipvrm.demo.run", "DemoConfig", "run_demo"
    ),
    "env": Command(
        "versions, device, backends and why one is missing; --check: are the ops right here",
        "ipvrm.view.environment",
        None,
        "main",
    ),
    "make-tiny-model": Command(
        "a small random Qwen3 and a tokenizer trained on your texts",
        "ipvrm.models.tiny_model",
        "TinyModelConfig",
        "main",
    ),
    "rollout": Command("n responses per prompt", "ipvrm.rollouts.rollout", "RolloutConfig", "main"),
    "label": Command(
        "verify the answers of rollouts: reward-model data", "ipvrm.rollouts.label", "LabelConfig", "main"
    ),
    "train-rm": Command(
        "a reward model from outcome labels", "ipvrm.training.train_rm", "RewardConfig", "main"
    ),
    "train-policy": Command(
        "DistRL and its baselines: a policy from verified rollouts",
        "ipvrm.training.train_policy",
        "PolicyConfig",
        "main",
    ),
    "score": Command(
        "JSONL of problem and steps in, step scores out", "ipvrm.evaluate.score", "ScoreConfig", "main"
    ),
    "inspect": Command(
        "scored solutions as one HTML page, token by token", "ipvrm.view.inspect", "InspectConfig", "main"
    ),
    "report": Command(
        "runs as one page with their curves and tables", "ipvrm.view.report", "ReportConfig", "main"
    ),
    "eval processbench": Command(
        "first-error F1 on ProcessBench", "ipvrm.evaluate.processbench", "EvalConfig", "evaluate"
    ),
    "eval bon": Command(
        "Best-of-N of labelled rollouts, beside majority vote and pass@N",
        "ipvrm.evaluate.bon",
        "BonConfig",
        "main",
    ),
    "eval policy": Command(
        "avg@k and pass@k of a policy by source", "ipvrm.evaluate.policy", "PolicyEvalConfig", "main"
    ),
    "eval td": Command(
        "one-step TD against Monte-Carlo outcomes of branches, AUC of the value",
        "ipvrm.reproduce.td_study",
        "TdConfig",
        "main",
    ),
    "demo fig6": Command(
        "its policy under five updates of the reward model (Figure 6)",
        "ipvrm.reproduce.fig6",
        "Fig6Config",
        "main",
    ),
    "reproduce": Command(
        "the paper's tables, our numbers beside its: table1 table2 table5 table6 table10 fig6 sec433, or all",
        "ipvrm.reproduce.tables.run",
        "ReproduceConfig",
        "main",
    ),
    "bench": Command(
        "the benchmark suite on this machine (needs the checkout)", "benchmarks.run", None, "main"
    ),
}
# Of a waiting thread before it sleeps: GNU OpenMP's 300,000 hold a core that others want. A step took half
# the time on a crowded machine, and the same alone: benchmarks/results/waiting_threads-amd-zen-3.json.
SPINS = "1000"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def usage() -> str:
    """What `ipvrm --help` prints."""
    width, version = max(map(len, COMMANDS)), installed_version("ipvrm")
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return (
        f"usage: ipvrm <command> [--config FILE.yaml] [--flag value ...]      (ipvrm {version})\n\n"
        "Implicit prefix-value reward models: train them from outcome labels, score steps with them.\n\n"
        + "\n".join(lines)
        + "\n\n`ipvrm <command> --help` lists its flags; they win over --config, and that over defaults.\n"
        "On several devices: accelerate launch -m ipvrm train-rm ..."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 2 for an error of the user's (one line on stderr), 130 when interrupted."""
    if argv is None:  # as a command
        protect()
        if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:  # read when torch loads OpenMP
            os.environ["GOMP_SPINCOUNT"] = SPINS
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_ERROR
    if arguments[0] == "--version":
        print(installed_version("ipvrm"))
        return 0
    name = next((n for n in (" ".join(arguments[:2]), arguments[0]) if n in COMMANDS), None)
    if name is None:
        inner = [n for n in COMMANDS if n.startswith(f"{arguments[0]} ")]
        if inner and set(arguments[1:]) & {"-h", "--help"}:
            print("usage: ipvrm " + "\n       ipvrm ".join(f"{n} ...   {COMMANDS[n].help}" for n in inner))
            return 0
        given = " ".join(arguments[: 2 if inner else 1])
        print(f"ipvrm: no command {given!r}; commands: {', '.join(inner or COMMANDS)}", file=sys.stderr)
        return EXIT_ERROR
    try:
        return _run(name, arguments[len(name.split()) :])
    except IpvrmError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"ipvrm {name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_ERROR)
    except OSError as error:  # reading has a message of its own: this is a disk that is full, or read-only
        place = error.filename or "a file"
        again = "make room or name another output, and give the same command again"
        print(f"ipvrm {name}: {place} cannot be written: {cause(error)}; {again}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"ipvrm {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    if name == "bench":
        sys.path.append(os.getcwd())
    try:
        module = import_module(command.module)
    except ModuleNotFoundError as error:
        if name == "bench" and error.name in ("benchmarks", "benchmarks.run"):
            raise IpvrmError(
                "the benchmarks are not part of the installed package: "
                "run this in a checkout of the repository, where benchmarks/run.py is"
            ) from error
        raise
    from ipvrm.output.progress import (  # behind the command's own imports: it needs torch
        never_silent,
        signals_noted,
    )

    run, config = getattr(module, command.run), None
    if command.config is not None:
        config = parse(getattr(module, command.config), arguments, prog=f"ipvrm {name}")
    with never_silent(f"ipvrm {name}"), signals_noted():
        if config is None:
            return int(run(arguments) or 0)
        run(config)
    return 0


def parse(config_class: type, arguments: Sequence[str], *, prog: str) -> Any:
    """`config_class` from flags, over `--config FILE.yaml`, over its defaults. Exits with 2 on a bad flag.

    Raises:
        IpvrmError: a flag of several values given twice, a YAML file that cannot be read, or one with a key
            which is no flag.
    """
    import tyro

    _check_given_once(config_class, arguments)
    explicit, yaml_path = _take_config(list(arguments))
    if yaml_path is not None:
        explicit = [*_yaml_flags(config_class, yaml_path), *explicit]  # to tyro the last counts
    description = (
        config_class.__doc__ or ""
    ).strip() + "\n\n--config FILE.yaml holds flags too; those given here win."
    return tyro.cli(config_class, args=explicit, prog=prog, description=description, use_underscores=True)


def _check_given_once(config_class: type, arguments: Sequence[str]) -> None:
    """Refuses a flag of several values that stands twice: those of the first would be lost without a word. Of
    a flag of one value the last counts, as scripts that append to a command expect."""
    several = {
        name
        for name, hint in get_type_hints(config_class).items()
        if any(get_origin(part) is tuple for part in (hint, *get_args(hint)))
    }
    given = [text[2:].partition("=")[0].replace("-", "_") for text in arguments if text.startswith("--")]
    for name in given:
        if name in {*several, "config"} and given.count(name) > 1:
            raise IpvrmError(f"--{name} stands twice; give it once, with several values behind it")


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], Path(argument.partition("=")[2])
        if argument == "--config":
            if index + 1 == len(arguments):
                raise IpvrmError("--config needs the name of a YAML file")
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
    return arguments, None


def _yaml_flags(config_class: type, path: Path) -> list[str]:
    """The file's entries as flags, so that both parse alike (`5e-7` is a text in YAML)."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would keep the last without a word."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise IpvrmError(f"--config {path}: {key} stands twice, the second time in line {line}")
        return dict(loader.construct_mapping(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    with reading(f"--config {path}", "cannot be read", "it must be a YAML file"):
        text = path.read_text(encoding="utf-8-sig")
    with reading(f"--config {path}", "not valid YAML", "it must hold `flag: value` lines"):
        values = yaml.load(text, Loader)
    if not isinstance(values, dict):
        raise IpvrmError(
            f"--config {path}: must hold `flag: value` lines; it holds a {type(values).__name__}"
        )
    known = {field.name: field.type for field in dataclasses.fields(config_class)}
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise IpvrmError(f"--config {path}: unknown {', '.join(unknown)}; the flags are {', '.join(known)}")
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, bool) and known[key] is bool:  # `bool | None` takes True, False or None
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            raise IpvrmError(f"--config {path}: {key} must be a value or a list; got a mapping")
        else:
            flags += [f"--{key}", str(value)]
    return flags
