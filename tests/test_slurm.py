"""train.sbatch: the script runs here against a stand-in for SLURM, and the real parsers read its flags."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ipvrm.cli import COMMANDS, parse
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.reward_config import RewardConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "ipvrm" / "integrations" / "launch" / "train.sbatch"
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$LOG"; echo first; echo second',
    "accelerate": 'printf "%s\\n" "$@" >"$LOG.flags"; trap "echo stopped >>$LOG; exit 143" TERM\n'
    'touch "$LOG.started"; [[ -z ${SLEEPS:-} ]] || while :; do sleep 0.05; done',
    "pkill": 'echo "pkill $*" >>"$LOG"; kill -TERM "$(cat "$LOG.pid")"',
}


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the script as sbatch would on the first of two nodes with four GPUs each."""
    for name, lines in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        record = 'echo $$ >"$LOG.pid"\n' if name == "accelerate" else ""
        path.write_text(f"#!/usr/bin/env bash\n{record}{lines}\n")
        path.chmod(0o755)
    here = {
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    env = {
        **os.environ,
        **here,
        "LOG": str(tmp_path / "log"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }

    def start(*arguments, **more):
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env={**env, "USER": "me", **more}, text=True)

    start.log = tmp_path / "log"
    return start


def flags_of(slurm, *arguments):
    assert slurm(*arguments).wait(30) == 0
    return Path(f"{slurm.log}.flags").read_text().splitlines()


@pytest.mark.parametrize(
    ("command", "flags", "config"),
    [
        ("train-rm", ["--model", "m", "--train_data", "d", "--output_dir", "o o"], RewardConfig),
        (
            "train-policy",
            ["--model", "m", "--train_data", "d", "--output_dir", "o", "--lora_r", "8"],
            PolicyConfig,
        ),
    ],
)
def test_the_flags_are_accelerate_s_and_ours(slurm, command, flags, config):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given = flags_of(slurm, command, *flags)
    assert given.pop(0) == "launch"
    launch = launch_command_parser().parse_args(given)
    assert launch.module and launch.training_script == "ipvrm"
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 8, 1)
    assert (launch.main_process_ip, launch.main_process_port) == ("first", 29500)
    stored = load_config_from_file(str(ROOT / launch.config_file))
    assert str(stored.distributed_type).endswith("MULTI_GPU") and stored.rdzv_backend == "static"
    assert launch.training_script_args[0] == command and command in COMMANDS
    parsed = parse(config, launch.training_script_args[1:], prog="ipvrm")
    assert parsed.resume_from_checkpoint == "auto" and parsed.output_dir == flags[5]


def test_before_the_time_limit_the_ranks_stop_and_the_job_is_queued_again(slurm):
    """The signal that sbatch sends ends in SIGTERM to the ranks alone, a wait for them, and a requeue."""
    job = slurm("train-rm", SLEEPS="1")
    started = Path(f"{slurm.log}.started")
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert slurm.log.read_text().splitlines() == [
        "scontrol show hostnames n[1-2]",
        "pkill -TERM -u me -f -- -u -m ipvrm",
        "stopped",
        "scontrol requeue 77",
    ]
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text


def test_what_pkill_looks_for_is_a_rank_and_not_its_launcher():
    """`pkill -f` matches anywhere in a command line; accelerate hands over to torch's launcher."""
    from torch.distributed.run import config_from_args, get_args_parser

    module = ["-m", "ipvrm", "train-rm", "--model", "m"]
    _, python, rank = config_from_args(get_args_parser().parse_args(module))
    assert "-u -m ipvrm" in " ".join([python, *rank])
    assert "-u -m ipvrm" not in " ".join(
        ["python", "bin/accelerate", "launch", "--num_machines", "2", *module]
    )


def test_a_failed_run_fails_the_job(slurm, tmp_path):
    (tmp_path / "bin" / "accelerate").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert slurm("train-rm").wait(30) == 3
