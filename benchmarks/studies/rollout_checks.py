"""What `ipvrm rollout` and `ipvrm label` promise, checked on real prompts, and what the verifiers read.

    python -m benchmarks.studies.rollout_checks --model tiny --data policy_eval.parquet --out checks.json

`resumed`: the command killed with SIGKILL once 128 responses are there and given again, against one that was
not, by the bytes of the file. `batch`: 7 rows at a time against 64. `string`: that verifier on the same
responses, cut off or not.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.suite import machine
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.run_folder import write_json

BATCH, OTHER_BATCH, KILLED_AT = 64, 7, 128
SIZES = {"limit": 64, "num_generations": 4, "max_new_tokens": 256}


def rollout(model: str, data: str, output: Path, batch: int) -> subprocess.Popen[bytes]:
    """The command, started."""
    flags = {"model": model, "input": data, "output": output, "per_device_eval_batch_size": batch} | SIZES
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "ipvrm", "rollout", *arguments])


def wait(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"ipvrm rollout ended with {process.returncode}")


def killed_and_resumed(model: str, data: str, output: Path) -> int:
    """Writes `output` in two parts; returns how many responses were there at the kill."""
    process = rollout(model, data, output, BATCH)
    while (there := BATCH * len(list(output.parent.glob(f".{output.name}.*.partial/*.json")))) < KILLED_AT:
        if process.poll() is not None:
            raise SystemExit("ipvrm rollout ended before it could be killed")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if output.exists():
        raise SystemExit("ipvrm rollout was done before it was killed")
    wait(rollout(model, data, output, BATCH))
    return there


def differing(one: Path, other: Path) -> int:
    """Responses of two files of the same rows that are not the same text."""
    texts = [pq.read_table(path, columns=["response"])["response"].to_pylist() for path in (one, other)]
    return sum(a != b for a, b in zip(*texts, strict=True))


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="prompts with ground truth")
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole, resumed, other = (Path(name) / f"{part}.parquet" for part in ("whole", "resumed", "other"))
        wait(rollout(arguments.model, arguments.data, whole, BATCH))
        killed_at = killed_and_resumed(arguments.model, arguments.data, resumed)
        wait(rollout(arguments.model, arguments.data, other, OTHER_BATCH))
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, resumed)]
        labelled = str(Path(name) / "labelled.jsonl")
        labels = label_file(LabelConfig(str(whole), labelled, "string", keep_all=True))
        found = {
            "responses": pq.read_metadata(whole).num_rows,
            "resumed": {"killed_at": killed_at, "same_bytes": hashes[0] == hashes[1], "sha256": hashes},
            "batch": {"rows": [BATCH, OTHER_BATCH], "differing_responses": differing(whole, other)},
            "string": {kind: count for kind, count in labels["counts"].items() if count},
            "machine": machine.describe(),
        }
    write_json(arguments.out, found)
    print(json.dumps({part: found[part] for part in found if part != "machine"}, indent=2))


if __name__ == "__main__":
    main()
