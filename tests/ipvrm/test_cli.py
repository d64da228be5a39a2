"""The command line: cheap help, YAML below flags, clean errors; and the small commands."""

import errno
import filecmp
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvrm import IpvrmError, cli
from ipvrm.cli import COMMANDS, main, parse
from ipvrm.models.tiny_model import TinyModelConfig, make_tiny_model
from ipvrm.run_folder import JsonlLog, manifest, save_folder, write_json, write_text
from ipvrm.training.reward_config import RewardConfig
from ipvrm.view.environment import openmp_runtimes
from ipvrm.view.inspect import InspectConfig

REQUIRED = ["--model", "m", "--train_data", "d", "--output_dir", "o"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom ipvrm.cli import main\nassert main(['--help']) == 0\n"
    code += "print(sorted({'torch', 'transformers', 'tyro', 'numpy'} & set(sys.modules)))"
    done = run(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP comes with torch on Linux")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["ours", "spins", "policy"],
)
def test_a_command_sets_how_long_threads_spin(given, spins):
    """As OpenMP itself says in the command's process, where a user's value wins."""
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not runtimes:
        pytest.skip("this torch brings no GNU OpenMP")
    code = "import ctypes, sys\nfrom ipvrm.cli import main\nsys.argv = ['ipvrm', '--version']\nmain()\n"
    code += f"assert 'torch' not in sys.modules\nctypes.CDLL({str(runtimes[0])!r})"
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=unset | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr


@pytest.mark.slow
def test_import_ipvrm_is_cheap_and_lazy():
    done = run(
        "import sys, ipvrm\nprint('torch' in sys.modules)\nprint(ipvrm.RewardConfig.__name__)\nipvrm.nothing"
    )
    assert done.stdout.split() == ["False", "RewardConfig"]
    assert "module 'ipvrm' has no attribute 'nothing'" in done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_every_command_of_the_table_exists(name, capsys):
    command = COMMANDS[name]
    if command.config is None:
        assert main([*name.split(), "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as caught:
            main([*name.split(), "--help"])
        assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: ipvrm" in printed
    assert callable(getattr(importlib.import_module(command.module), command.run))


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["eval"], ["eval", "nothing"]])
def test_unknown_commands(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "eval processbench" in captured.out + captured.err


def test_errors_of_ours_are_one_clean_line(capsys):
    assert main(["train-rm", "--model", "/nowhere", "--train_data", "d", "--output_dir", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ipvrm train-rm: /nowhere") and len(error.splitlines()) == 1


def test_yaml_lies_between_defaults_and_flags(tmp_path):
    path = tmp_path / "config.yaml"
    # PyYAML reads 5e-4 as a text; as a flag it is a number.
    path.write_text("learning_rate: 5e-4\nbeta: 3\nmargin: null\nuse_cpu: true\nseed: 1\n")
    config = parse(RewardConfig, [*REQUIRED, "--seed", "2", "--config", str(path)], prog="p")
    assert (config.learning_rate, config.beta, config.margin, config.use_cpu, config.seed) == (
        5e-4,
        3.0,
        None,
        True,
        2,
    )
    assert config.global_batch_size == 64
    config = parse(RewardConfig, [f"--config={path}", *REQUIRED, "--no_use_cpu"], prog="p")
    assert config.use_cpu is False
    path.write_text("output_dir: o\ntexts: [a, b]\n")
    assert parse(TinyModelConfig, ["--config", str(path)], prog="p").texts == ("a", "b")


@pytest.mark.parametrize(
    ("command", "more", "flag"),
    [
        ("inspect", ["--model", "a", "--k", "3", "--model", "b"], "--model"),
        ("inspect", ["--model=a", "--model", "b"], "--model"),
        ("eval bon", ["--n", "4", "--n=16"], "--n"),
        ("score", ["--config", "a.yaml", "--config=b.yaml"], "--config"),
    ],
)
def test_a_flag_of_several_values_that_stands_twice_is_refused_in_one_line(capsys, command, more, flag):
    assert main([*command.split(), *more]) == 2
    said = capsys.readouterr().err
    assert said == f"ipvrm {command}: {flag} stands twice; give it once, with several values behind it\n"


def test_of_a_flag_of_one_value_the_last_counts():
    assert parse(RewardConfig, [*REQUIRED, "--seed", "1", "--seed=2"], prog="p").seed == 2


def test_a_flag_in_the_file_and_on_the_command_line_is_not_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("step_format: '{step}'\nmodel: [a, b]\n")
    given = ["--config", str(tmp_path / "c.yaml"), "--model", "c", "--input", "i", "--output", "o"]
    config = parse(InspectConfig, given, prog="p")
    assert config.model == ("c",) and config.step_format == "{step}"


def test_a_saved_config_is_a_config(tmp_path):
    """config.yaml of a run folder can be passed back."""
    import dataclasses

    import yaml

    saved = RewardConfig("m", "d", "o", max_steps=3, beta=1.5, dry_run=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(saved)))
    assert parse(RewardConfig, ["--config", str(tmp_path / "config.yaml")], prog="p") == saved


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lerning_rate: 1", "unknown lerning_rate; the flags are model, train_data"),
        ("- a", "must hold `flag: value` lines"),
        ("beta: {a: 1}", "beta must be a value or a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, reason):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(IpvrmError, match=reason):
        parse(RewardConfig, [*REQUIRED, "--config", str(path)], prog="p")
    with pytest.raises(IpvrmError, match="No such file"):
        parse(RewardConfig, [*REQUIRED, "--config", str(tmp_path / "absent.yaml")], prog="p")
    with pytest.raises(IpvrmError, match="needs the name"):
        parse(RewardConfig, ["--config"], prog="p")


def test_bench_needs_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p or ".") / "benchmarks").is_dir()])
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench"]) == 2
    assert "run this in a checkout" in capsys.readouterr().err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("def main(arguments):\n    print('ran', arguments)\n")
    importlib.invalidate_caches()
    assert cli.main(["bench", "--out", "x"]) == 0
    assert "ran ['--out', 'x']" in capsys.readouterr().out
    for name in ("benchmarks", "benchmarks.run"):
        sys.modules.pop(name, None)


def test_env(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "linear_logprobs" in printed and "transformers" in printed and "OpenMP" in printed
    assert main(["env", "--what"]) == 2 and main(["env", "--json"]) == 2  # a flag of --check
    assert main(["env", "--help"]) == 0


def test_env_check_says_whether_the_ops_are_right(monkeypatch, tmp_path, capsys):
    """What it checks, and that it sees faults, is in tests/kernels/test_check.py."""
    from ipvrm_kernels import check, linear_logprobs

    monkeypatch.setattr(check, "ROWS", 32)
    sizes = dict(model_type="gemma2", hidden_size=32, vocab_size=199, final_logit_softcapping=25.0)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert main(["env", "--check", "--device", "cpu", "--json", "--model", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["head"] == dict(D=32, V=199, softcap=25.0) and found["right"]

    def faulty(*arguments, **options):
        out = linear_logprobs(*arguments, **options)
        return out._replace(lse=out.lse + 1e-3)

    monkeypatch.setattr("ipvrm_kernels.linear_logprobs", faulty)
    assert main(["env", "--check", "--device", "cpu", "--shape", "16,99"]) == 1
    assert "linear_logprobs: WRONG with" in capsys.readouterr().out
    assert main(["env", "--check", "--model", str(tmp_path / "none")]) == 2
    assert "no configuration with the head's sizes" in capsys.readouterr().err


def test_a_second_openmp_runtime_is_seen():
    line = "7f0000-7f1000 r-xp 00000000 fe:01 1234    /opt/{}\n"
    maps = "".join(
        line.format(name)
        for name in ("a/libgomp-1a2b.so.1", "b/libiomp5.so", "c/libc.so.6", "a/libgomp-1a2b.so.1")
    )
    assert openmp_runtimes(maps) == ["/opt/a/libgomp-1a2b.so.1", "/opt/b/libiomp5.so"]


# ------------------------------------------------------------------------------------------ run folder


def test_save_folder_is_all_or_nothing(tmp_path):
    with save_folder(tmp_path / "a") as folder:
        write_text(folder / "x", "1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(RuntimeError), save_folder(tmp_path / "a") as folder:
        write_text(folder / "x", "2")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "1"
    with save_folder(tmp_path / "a") as folder:
        write_text(folder / "y", "3")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_jsonl_log_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = JsonlLog(path, after_step=2)
    log.write({"step": 3, "new": True})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'
    JsonlLog(path).close()
    assert path.read_text() == ""


def test_damaged_lines_of_a_log_are_dropped_and_said(tmp_path):
    path, said = tmp_path / "log.jsonl", []
    bad = [b'{"step": 2, "x": "\xff"}', b"\0" * 40, b'{"step": "2"}', b"3", b"[" * 100_000, b""]
    path.write_bytes(b"\n".join([b'{"step": 1}', *bad, b'{"step": 3}', b'{"step": 9}', b'{"st']))
    JsonlLog(path, after_step=3, note=said.append).close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert said == [f"{path}: dropped damaged lines: 6; the numbers of those steps are lost"]
    JsonlLog(path, after_step=3, note=said.append).close()
    assert len(said) == 1


def test_a_log_that_cannot_be_read_is_called_that(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n')

    def fails(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(IpvrmError, match="log.jsonl: cannot be read: Input/output error; move it away"):
        JsonlLog(path, after_step=1)
    assert path.read_text() == '{"step": 1}\n'


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_manifest_names_versions_and_command():
    found = manifest("ipvrm demo", seeds={"seed": 3}, ranks=2)
    assert found["command"] == "ipvrm demo" and found["seeds"] == {"seed": 3} and found["ranks"] == 2
    assert found["versions"]["torch"] and json.dumps(found)
    name, instructions = found["processor"].rsplit(", ", 1)
    assert name and instructions.startswith(("AVX", "DEFAULT", "NO AVX", "SVE", "Z", "VSX"))


@pytest.mark.parametrize(
    ("program", "command"), [("/a/bin/ipvrm", "ipvrm env"), ("/a/ipvrm/__main__.py", "python -m ipvrm env")]
)
def test_the_command_of_a_manifest_can_be_given_again(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program, "env"])
    assert manifest()["command"] == command


# ------------------------------------------------------------------------------------------ tiny model


def test_tiny_model_is_a_pure_function_of_its_config(tmp_path, rollouts):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    folders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = TinyModelConfig(str(tmp_path / name), (str(rollouts),), seed=seed, **sizes)
        folders.append(make_tiny_model(config))
    names = sorted(p.name for p in folders[0].iterdir())
    assert filecmp.cmpfiles(folders[0], folders[1], names, shallow=False) == (names, [], [])
    assert filecmp.cmpfiles(folders[0], folders[2], names, shallow=False)[1] == ["model.safetensors"]


def test_tiny_tokenizer_round_trips_any_text(tokenizer):
    for text in ("What is 12 + 3?", "naïve π≈3 \U0001f600\t\r\n  x", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_model_reads_every_kind_of_text(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("plain words plain words")
    (tmp_path / "b.json").write_text(json.dumps([{"problem": "nested", "steps": ["words", "words"]}]))
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "lines\u2028"}, ensure_ascii=False) + "\n\n")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["columns columns"], "n": [1]}), tmp_path / "d.parquet"
    )
    files = [str(tmp_path / name) for name in ("a.txt", "b.json", "c.jsonl", "d.parquet")]
    small = ["--vocab_size", "280", "--hidden_size", "16", "--num_hidden_layers", "1"]
    assert main(["make-tiny-model", "--output_dir", str(tmp_path / "m"), "--texts", *files, *small]) == 0
    assert "qwen3" in capsys.readouterr().out
    vocabulary = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("words" in token for token in vocabulary) and any("columns" in token for token in vocabulary)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 200}, "vocab_size must be at least 259"),
        ({"texts": ()}, "at least one file"),
        ({"texts": ("absent.txt",)}, "absent.txt: no such file"),
        ({"hidden_size": 30}, "must be a multiple"),
    ],
)
def test_tiny_model_settings_that_do_not_fit(tmp_path, rollouts, changes, reason):
    with pytest.raises(IpvrmError, match=reason):
        make_tiny_model(
            TinyModelConfig(**({"output_dir": str(tmp_path / "m"), "texts": (str(rollouts),)} | changes))
        )
    assert not (tmp_path / "m").exists()


def test_tiny_model_does_not_overwrite(tmp_path, rollouts):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = TinyModelConfig(str(tmp_path / "m"), (str(rollouts),), **sizes)
    weights = make_tiny_model(config) / "model.safetensors"
    before = weights.read_bytes()
    make_tiny_model(config)  # the same command again ends well
    for other in (replace(config, seed=1), replace(config, output_dir=str(rollouts.parent))):
        with pytest.raises(IpvrmError, match="is not the model of these flags"):
            make_tiny_model(other)
    assert weights.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["m"]
