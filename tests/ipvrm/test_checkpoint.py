"""Checkpoints that a disk, a copy or a hand has damaged: passed over, said, and never half there."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from ipvrm import IpvrmError
from ipvrm.run_folder import save_folder
from ipvrm.training import checkpoint
from ipvrm.training.checkpoint import CHECKSUMS, STATE, damage, find_checkpoint, remove_old_checkpoints


def make(output, step):
    """A checkpoint as a trainer writes it, with small files of random bytes."""
    path = output / f"checkpoint-{step}"
    with save_folder(path) as folder:
        (folder / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
        (folder / "reward_model").mkdir()
        (folder / "reward_model" / "optimizer.safetensors").write_bytes(random.Random(-step).randbytes(3000))
        checkpoint.save_state(
            folder, {"step": step, "fingerprint": {}, "optimizer": {}}, [{"cpu.0": torch.ones(3)}]
        )
    return path


def files_of(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def found(output):
    said = []
    return find_checkpoint(output, "auto", said.append), said


def test_whole_ones_are_whole(tmp_path):
    paths = [make(tmp_path, step) for step in (1, 2)]
    assert [damage(path) for path in paths] == [None, None]
    assert found(tmp_path) == (paths[1], [])
    assert files_of(paths[0])[0] == CHECKSUMS


def flip(file, seed):
    data = bytearray(file.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
    file.write_bytes(data)


DAMAGES = {
    "flipped": (lambda file: flip(file, 3), "has changed since it was saved"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "has changed"),
    "empty": (lambda file: file.write_bytes(b""), "has changed"),
    "gone": (lambda file: file.unlink(), "is missing"),
    "zeros": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "has changed"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "reward_model/optimizer.safetensors", STATE, "rng.safetensors", CHECKSUMS]
)
def test_a_damaged_one_is_passed_over_and_said(tmp_path, kind, name):
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    act, reason = DAMAGES[kind]
    act(newer / name)
    path, said = found(tmp_path)
    assert path == older and len(said) == 1 and said[0].startswith(f"{newer} is passed over: ")
    if name != CHECKSUMS:
        assert name in said[0] and reason in said[0]
        with pytest.raises(IpvrmError, match=f"damaged: {name} {reason}"):
            find_checkpoint(tmp_path, str(newer), said.append)


@pytest.mark.slow
def test_every_single_flipped_bit_is_seen(tmp_path):
    path = make(tmp_path, 1)
    names = [name for name in files_of(path) if name != CHECKSUMS]
    generator = random.Random(0)
    for _ in range(200):
        file = path / generator.choice(names)
        data = file.read_bytes()
        flip(file, generator.randrange(1 << 30))
        assert damage(path) is not None
        file.write_bytes(data)
    assert damage(path) is None


def test_when_all_are_damaged_there_is_none(tmp_path):
    for step in (1, 2):
        flip(make(tmp_path, step) / "model.safetensors", step)
    said = []
    with pytest.raises(IpvrmError, match="no checkpoint in .* is whole; delete them"):
        find_checkpoint(tmp_path, "auto", said.append)
    assert len(said) == 2


KILLED_IN_A_DELETION = """
    import os, signal, sys
    from ipvrm.training.checkpoint import remove_old_checkpoints

    unlink, count = os.unlink, 0

    def dies_at(*arguments, **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return unlink(*arguments, **options)

    os.unlink = dies_at
    remove_old_checkpoints(sys.argv[1], 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3])
def test_killed_while_an_old_one_is_deleted(tmp_path, at):
    make(tmp_path, 1), make(tmp_path, 2)
    code = [sys.executable, "-c", textwrap.dedent(KILLED_IN_A_DELETION), str(tmp_path), str(at)]
    assert subprocess.run(code).returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert found(tmp_path)[1] == []
    from ipvrm.run_folder import remove_leftovers

    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_half_deleted_by_hand(tmp_path):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    (newer / CHECKSUMS).unlink()
    (newer / "model.safetensors").unlink()
    assert found(tmp_path) == (older, [f"{newer} is passed over: it is not complete"])
    checkpoint.remove_later(tmp_path, 1)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    remove_old_checkpoints(tmp_path, 1)
    shutil.rmtree(older)
