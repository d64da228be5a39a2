"""Does `ipvrm label` agree with the labels of released rollouts whose ground truth is not in the file?

Responses to one prompt that were labelled right must hold equivalent answers, and those labelled wrong
others. So each right response's final answer serves as ground truth for every other response to its prompt,
and the label that `ipvrm label` gives is compared with the released one: over all such pairs, and over those
whose ground truth is a plain number, as curated ones are (`50 + 10 + 0 = 60` or `6 games` are not).

    python -m benchmarks.studies.label_agreement --data rm/qwen3_0.6b_pointwise.parquet --out results.json
"""

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.suite import machine
from ipvrm.data.rows import read_rows
from ipvrm.rollouts.final_answer import final_answer
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.run_folder import write_json

LISTED = 30
NUMBER = re.compile(r"-?\d+(\.\d+)?(/\d+)?")


def pairs_of(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows to label, each with the given label as `given`; what was there to compare)."""
    rows, _ = read_rows(path)
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[json.dumps(row.prompt)].append(row)
    extracted = Counter((row.label, final_answer(row.response) is not None) for row in rows)
    pairs = []
    for group in groups.values():
        for gold in (row for row in group if row.label == 1 and final_answer(row.response)):
            pairs += [
                {
                    "prompt": list(row.prompt) if not isinstance(row.prompt, str) else row.prompt,
                    "response": row.response,
                    "answer": final_answer(gold.response),
                    "given": row.label,
                    "source": row.source,
                }
                for row in group
                if row is not gold
            ]
    there = {
        "prompts": len(groups),
        "responses": len(rows),
        "with_extracted_answer": {
            name: {"right": extracted[1, has], "wrong": extracted[0, has]}
            for name, has in (("yes", True), ("no", False))
        },
        "pairs_right_right": sum(pair["given"] == 1 for pair in pairs),
        "pairs_right_wrong": sum(pair["given"] == 0 for pair in pairs),
    }
    return pairs, there


def agreement(pairs: list[dict[str, Any]], verifier: str) -> dict[str, Any]:
    """Labels of `verifier` against the given ones."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "pairs.jsonl", Path(folder) / "labels.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        summary = label_file(LabelConfig(str(source), str(output), verifier))
        with open(output, encoding="utf-8") as file:
            labelled = [json.loads(line) for line in file]
    table: Counter[tuple[str, int, bool]] = Counter()
    by_prompt: dict[tuple[str, str], bool] = {}
    disagreements = []
    for row in labelled:
        pair = pairs[row["row"] - 1]
        agrees = row["label"] == pair["given"]
        for ground_truths in ("all", "numbers") if NUMBER.fullmatch(pair["answer"]) else ("all",):
            table[ground_truths, pair["given"], agrees] += 1
            key = ground_truths, json.dumps(pair["prompt"])
            by_prompt[key] = by_prompt.get(key, True) and agrees
        if not agrees:
            shown = {name: pair[name] for name in ("answer", "given", "source")}
            disagreements.append(shown | {"extracted": row["extracted"], "label": row["label"]})
    rates: dict[str, Any] = {}
    for ground_truths in ("all", "numbers"):
        prompts = [agrees for (kind, _), agrees in by_prompt.items() if kind == ground_truths]
        rates[ground_truths] = {"prompts": {"agree": sum(prompts), "of": len(prompts)}}
        for name, given in (("right_right", 1), ("right_wrong", 0)):
            agree, differ = (table[ground_truths, given, same] for same in (True, False))
            rates[ground_truths][name] = {"agree": agree, "of": agree + differ}
    numbers = [found for found in disagreements if NUMBER.fullmatch(found["answer"])]
    return {
        "counts": {name: count for name, count in summary["counts"].items() if count},
        "agreement": rates,
        "seconds": summary["seconds"],
        "num_workers": summary["num_workers"],
        "disagreements_with_numbers": numbers[:LISTED],
        "disagreements": len(disagreements),
    }


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="rollouts with labels")
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    pairs, there = pairs_of(Path(arguments.data))
    results = {verifier: agreement(pairs, verifier) for verifier in ("math", "string")}
    write_json(arguments.out, {"data": there, "verifiers": results, "machine": machine.describe()})
    for name, found in results.items():
        for ground_truths, rates in found["agreement"].items():
            for kind, rate in rates.items():
                agree, of = rate["agree"], rate["of"]
                print(f"{name:<8}{ground_truths:<9}{kind:<13}{agree} of {of} = {agree / of:.1%}")


if __name__ == "__main__":
    main()
