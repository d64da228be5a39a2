"""Starting runs as a user does, and reading what they wrote."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ipvrm.output.progress import signals_noted

ROOT = Path(__file__).resolve().parents[2]
VARYING = ("seconds", "tokens_per_second", "peak_memory", "algorithm")  # beginnings of names


# a module: the command line with the Adam of the fixture `linear_adam`
LINEAR_IPVRM = """
import sys

from ipvrm.cli import main
from ipvrm.training import optimizer

optimizer.EPSILON = 1.0
if __name__ == "__main__":
    sys.exit(main())
"""


def write_jsonl(path, records):
    """A record that is a string is written as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def flags(config):
    """The config as command-line flags."""
    result = []
    for name, value in vars(config).items():
        if isinstance(value, bool):
            result += [f"--{name}"] if value else []
        elif isinstance(value, tuple):
            result += [f"--{name}", *value]
        elif value is not None:
            result += [f"--{name}", str(value)]
    return result


def run_cli(*arguments, path=None):
    """The finished process of `python arguments`; path: a folder to import from."""
    paths = os.pathsep.join(filter(None, [path and str(path), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
    )


def train(config):
    """The model of a RewardConfig or a PolicyConfig, without the progress bar."""
    from ipvrm.training.policy_config import PolicyConfig
    from ipvrm.training.train_policy import train_policy
    from ipvrm.training.train_rm import train_reward_model

    run = train_policy if isinstance(config, PolicyConfig) else train_reward_model
    return run(config, progress=False)


@contextmanager
def signalled_while_writing(trainer, number, monkeypatch):
    """A command in which the process gets signal `number` whenever a run of this trainer writes its models;
    in the end the handlers are those of before."""
    write, handler = trainer.write_model, signal.getsignal(number)

    def signalled(self, *places):
        assert signal.getsignal(number) is not handler, "the signal would end the process here"
        os.kill(os.getpid(), number)
        return write(self, *places)

    with monkeypatch.context() as patch, signals_noted():
        patch.setattr(trainer, "write_model", signalled)
        yield
    assert signal.getsignal(number) is handler


def sharp(model, factor=40.0):
    """The model with logits so many times as large: a random one is nearly uniform, and has no candidates."""
    with torch.no_grad():
        model.model.norm.weight *= factor
    return model


def ruled_out(monkeypatch, token, by=("model",)):
    """Wherever `token` stands in a response, it has log-prob -inf under a reward model's model, its
    reference, or both (their difference is then not a number)."""
    from ipvrm.models import reward_model

    real, turn = reward_model.response_logprobs, itertools.cycle(("model", "reference"))

    def patched(model, batch, temperature=1.0):
        found = real(model, batch, temperature)
        return found.masked_fill(batch.token_ids == token, -math.inf) if next(turn) in by else found

    monkeypatch.setattr(reward_model, "response_logprobs", patched)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_bits(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(folder):
    """metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(VARYING)} for line in lines]


def released_scores(item):
    """Scores under the released script's names; it divides the two length-normalised ones by sqrt(0.001)."""
    value, mean = np.array(item["reward"]), np.array(item["avg_reward"])
    length = np.diff(np.round(value / mean), prepend=0)
    step = np.diff(value, prepend=0)
    return {
        "sigmoid": value,
        "rewardsum_minus_sigmoid": step,
        "mean_sigmoid": mean / math.sqrt(1e-3),
        "meandiff_sigmoid": step / length / math.sqrt(1e-3),
    }


def fake_tensorboard(monkeypatch):
    """A writer in the place of tensorboardX's, which need not be there; the list gets what it is sent."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    logged = []

    class Writer:
        def __init__(self, folder):
            logged.append(("folder", str(folder)))

        def add_hparams(self, values, metric_dict):
            logged.append(("settings", values))

        def add_scalar(self, name, value, global_step, **_):
            logged.append((name, value, global_step))

        def flush(self): ...

        def close(self):
            logged.append("closed")

    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    return logged


def interrupted_at(monkeypatch, owner, name, number):
    """Makes call `number` of `owner.name` a Ctrl-C; the list that it returns gets the length of the second
    argument of every call."""
    original, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def assert_nothing_to_unpickle(folder):
    """Of a run with its checkpoints: safetensors, JSON and texts, by their names and by what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix in (".jinja", ".jsonl", ".md", ".yaml"), path
            path.read_text(encoding="utf-8")
