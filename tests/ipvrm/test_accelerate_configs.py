"""integrations/launch: what accelerate makes of each config, and our commands started with it on a CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from runs import ROOT, flags

from ipvrm import IpvrmError, RewardConfig
from ipvrm.training.optimizer import data_parallel_accelerator

FOLDER = ROOT / "ipvrm" / "integrations" / "launch"
MODULE = ["-m", "ipvrm", "train-rm", "--model", "m"]


def environment(name):
    """The variables that `accelerate launch` gives the ranks under a config: by its own code."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = ["--config_file", str(FOLDER / name), "--num_processes", "8", "--main_process_port", "0", *MODULE]
    arguments, stored, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    assert arguments.num_machines == 1 and not stored.use_cpu
    made = prepare_multi_gpu_env(arguments)
    return {
        k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_")) and os.environ.get(k) != v
    }


def test_data_parallel_shards_nothing():
    made = environment("data_parallel.yaml")
    assert made["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_FSDP" not in made
    with mock.patch.dict(os.environ, made):
        assert data_parallel_accelerator("x", use_cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_fsdp2_of_trl():
    """What accelerate's plugin reads there, and that our own commands refuse to be sharded by it."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    made = environment("trl_fsdp2.yaml")
    assert made["ACCELERATE_USE_FSDP"] == "true" and made["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with mock.patch.dict(os.environ, made):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and type(plugin.cpu_offload).__name__ == "OffloadPolicy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    plugin.set_mixed_precision("bf16")
    assert isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy)
    sharded = mock.PropertyMock(return_value=DistributedType.FSDP)
    with (
        mock.patch("accelerate.Accelerator.distributed_type", sharded),
        pytest.raises(
            IpvrmError, match="train-rm shards nothing through accelerate; .*MULTI_GPU, and --fsdp"
        ),
    ):
        data_parallel_accelerator("train-rm", use_cpu=True, mixed_precision="no")


@pytest.mark.full
def test_two_machines_train_one_reward_model(tiny_folder, rollouts, tmp_path):
    """Two launchers as two machines would start them, of one process each; --fsdp over both."""
    config = RewardConfig(
        str(tiny_folder), str(rollouts), str(tmp_path / "run"), fsdp=True, use_cpu=True, max_steps=1,
        global_batch_size=8,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        FOLDER / "data_parallel.yaml",
    ]
    launch += ["--num_machines", "2", "--num_processes", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    jobs = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "-m", "ipvrm", "train-rm", *flags(config)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [job.communicate(timeout=170)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)[-3000:]
    run = Path(config.output_dir)
    assert json.loads((run / "manifest.json").read_text())["ranks"] == 2
    assert json.loads((run / "results.json").read_text())["steps"] == 1
