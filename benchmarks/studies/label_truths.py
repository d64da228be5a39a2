r"""What `ipvrm label` makes of real ground truths when the answer is right and spelled another way, or wrong.

    python -m benchmarks.studies.label_truths --data policy_eval.parquet \
        --rollouts rm/qwen3_0.6b_pointwise.parquet

Every ground truth is answered in five usual ways that keep its meaning and in two that are wrong, and all of
it goes through `ipvrm label`, once with the verifier `math` and once with math-verify alone on the whole
response. `--rollouts`: those of the released rollouts that have two boxes or more, with the number that the
right responses to their prompt agree on as ground truth. label_truths.json and README.md go to --out.
"""

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.suite import machine
from ipvrm.data.rows import read_prompts, read_rows
from ipvrm.rollouts.final_answer import (
    answer_region,
    as_number,
    boxes,
    final_answer,
    is_word,
    part_count,
    written_out,
)
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.run_folder import write_json

RESULTS = Path(__file__).parent.parent / "results" / "label_truths"
ALONE = f"{__name__ if __name__ != '__main__' else 'benchmarks.studies.label_truths'}:math_verify_alone"
VERIFIERS = {"math": "math", "math-verify alone": ALONE}
KINDS = ("right", "wrong", "no_answer", "unreadable_ground_truth", "error", "timeout", "crash")
RIGHT_WAYS = ("sentence", "power of ten", "decorated box", "other form", "after thinking")
WRONG_WAYS = ("wrong", "wrong by ten")


def math_verify_alone(response: str, answer: str) -> bool | None:
    """The library on the whole response and the boxed ground truth: what `ipvrm label` did before."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
    found = parse(response, parsing_timeout=None, raise_on_error=True)
    return verify(gold, found, timeout_seconds=None, raise_on_error=True) if found else None


def spellings(truth: str) -> dict[str, str]:
    """Responses to a question with this ground truth, by way."""
    number = as_number(truth)
    return _of_number(number) if number is not None else _of_expression(truth.replace("$", "").strip(" ."))


def _of_number(value: Decimal) -> dict[str, str]:
    digits = written_out(value)
    whole, point, rest = digits.lstrip("-").partition(".")
    sign = "-" * digits.startswith("-")
    exponent = value.adjusted() if value else 0
    power = rf"{written_out(value.scaleb(-exponent))} \times 10^{{{exponent}}}"
    exact = Fraction(value)
    other = rf"{sign}\frac{{{abs(exact.numerator)}}}{{{exact.denominator}}}" if point else f"x = {digits}"
    grouped = sign + f"{int(whole):,}" + point + rest
    return {
        "sentence": f"First we divide by 3. The answer is {grouped}.",
        "power of ten": rf"So it is $\boxed{{{power}}}$.",
        "decorated box": rf"We get \[\boxed{{\, {grouped.replace(',', chr(92) + ',')} \text{{ units}}.}}\]",
        "other form": rf"Hence \boxed{{{other}}}",
        "after thinking": f"<think>Is it \\boxed{{{value + 7:f}}}? No.</think>\n\nSo:\n#### {digits}",
        "wrong": rf"Hence \boxed{{{written_out(value + 1 if value in range(1000) else value * 2 or 1)}}}",
        "wrong by ten": rf"Hence \boxed{{{written_out((value or 3) * 10)}}}",
    }


def _of_expression(truth: str) -> dict[str, str]:
    styled = truth.replace(r"\frac", r"\dfrac")
    spaced = re.sub(r"(?<![\\{a-zA-Z])([-+=,])(?![a-zA-Z}])", r" \1 ", truth)
    sized = truth.replace("(", r"\left(").replace(")", r"\right)").replace(r"\frac", r"\tfrac")
    sized = (
        sized if truth.count("(") == truth.count(")") and not re.search(r"[a-z]\(|\\left", truth) else spaced
    )
    parts = _parts(truth)
    if is_word(truth):
        other = rf"Hence \boxed{{\text{{{truth.upper()}}}}}"
    elif len(parts) > 1:
        other = "The answers are " + " and ".join(rf"$\boxed{{{part}}}$" for part in parts) + "."
    else:
        other = rf"Hence \boxed{{{spaced}}}"
    return {
        "sentence": f"First we divide by 3. The answer is ${spaced}$.",
        "power of ten": rf"So it is $\boxed{{{sized}}}$.",
        "decorated box": rf"We get \[\boxed{{\, {sized}.}}\]",
        "other form": other,
        "after thinking": f"<think>Is it \\boxed{{7}}? No.</think>\n\nSo:\n\n$$\n\\boxed{{{styled}}}\n$$",
        "wrong": rf"Hence \boxed{{{'none' if is_word(truth) else truth + ' + 1'}}}",
        "wrong by ten": r"Hence \boxed{123457}",
    }


def _parts(truth: str) -> list[str]:
    """The answers that a ground truth lists one after another; [truth] where it is one or a set."""
    depth, pieces = 0, [""]
    for character in truth:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth == 0 and character == ",":
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces] if part_count(truth) == len(pieces) else [truth]


def labelled(rows: list[dict[str, Any]], verifier: str) -> tuple[list[int | None], dict[str, Any]]:
    """Label of every row, None where it was left out; and the summary."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        summary = label_file(LabelConfig(str(source), str(output), verifier))
        labels: list[int | None] = [None] * len(rows)
        for line in output.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            labels[row["row"] - 1] = row["label"]
    return labels, summary


def truths_table(data: str) -> dict[str, Any]:
    """Labels by verifier and way, and by data source; with what is labelled wrongly."""
    prompts = [p for p in read_prompts(data)[0] if p.answer is not None]
    rows, keys = [], []
    for prompt in prompts:
        for way, response in spellings(prompt.answer or "").items():
            rows.append({"prompt": "p", "response": response, "answer": prompt.answer})
            keys.append((prompt, way))
    found: dict[str, Any] = {"ground_truths": len(prompts), "answers": len(rows)}
    for name, verifier in VERIFIERS.items():
        labels, summary = labelled(rows, verifier)
        ways: dict[str, Counter[str]] = defaultdict(Counter)
        sources: dict[str, Counter[str]] = defaultdict(Counter)
        failures = []
        for (prompt, way), row, label in zip(keys, rows, labels, strict=True):
            outcome = {1: "label 1", 0: "label 0", None: "left out"}[label]
            ways[way][outcome] += 1
            right = way in RIGHT_WAYS
            sources[prompt.data_source or ""][f"{'right' if right else 'wrong'}: {outcome}"] += 1
            if label is not None and label != right:
                failures.append(
                    {"answer": prompt.answer, "way": way, "response": row["response"], "label": label}
                )
        found[name] = {
            "by_way": {way: dict(counts) for way, counts in ways.items()},
            "by_data_source": {source: dict(counts) for source, counts in sources.items()},
            "counts": {kind: n for kind, n in summary["counts"].items() if n},
            "unreadable": sorted({p.answer for (p, _), x in zip(keys, labels, strict=True) if x is None}),
            "mislabelled": failures if name == "math" else len(failures),
            "seconds": summary["seconds"],
        }
    return found


def lenient(truth: str) -> dict[str, str]:
    """Answers that say something else than this ground truth and that math-verify accepts, by leniency."""
    number, bare = as_number(truth), truth.replace("$", "").strip(" .")
    parts, found = _parts(bare), {}
    if number is not None:
        found["a percent sign"] = rf"\boxed{{{written_out(number)}\%}}"
        found["any unit"] = rf"\boxed{{{written_out(number)} \text{{ furlongs}}}}"
        found["any name for it"] = rf"\boxed{{q = {written_out(number)}}}"
    elif len(parts) > 1 and parts != parts[::-1]:
        found["a list in another order"] = rf"\boxed{{{', '.join(parts[::-1])}}}"
    elif is_word(bare) and len(bare) > 3:
        found["a word's letters in another order"] = rf"\boxed{{{bare[::-1]}}}"
    elif "=" in bare:
        found["an equation without its left side"] = rf"\boxed{{{bare.rpartition('=')[2]}}}"
    return found


def leniencies(data: str) -> dict[str, dict[str, int]]:
    """Of how many ground truths `ipvrm label` takes such an answer for right."""
    rows, keys = [], []
    for prompt in read_prompts(data)[0]:
        for name, response in lenient(prompt.answer or "").items():
            rows.append({"prompt": "p", "response": response, "answer": prompt.answer})
            keys.append(name)
    labels, _ = labelled(rows, "math")
    tried, taken = Counter(keys), Counter(k for k, label in zip(keys, labels, strict=True) if label)
    return {name: {"tried": count, "label 1": taken[name]} for name, count in tried.items()}


def two_boxes(path: str) -> dict[str, Any]:
    """Rollouts with two boxes or more: the released label, and that of each verifier."""
    rows = read_rows(path)[0]
    numbers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.label == 1 and (answer := final_answer(row.response)):
            number = as_number(answer.rpartition("=")[2])
            if number is not None:
                numbers[json.dumps(row.prompt)][written_out(number)] += 1
    chosen, without = [], []
    for row in rows:
        if len(re.findall(r"\\boxed\s*\{", row.response)) > 1:
            known = numbers[json.dumps(row.prompt)].most_common(1)
            (chosen if known else without).append((row, known[0][0] if known else ""))
    asked = [{"prompt": "p", "response": r.response, "answer": truth} for r, truth in chosen]
    labels = {name: labelled(asked, verifier)[0] for name, verifier in VERIFIERS.items()}
    listed = []
    for index, (row, truth) in enumerate(chosen):
        given = {name: labels[name][index] for name in VERIFIERS}
        if set(given.values()) != {row.label}:
            shown = [content for _, _, content in boxes(answer_region(row.response))][-4:]
            listed.append({"row": row.source.rpartition(":")[2], "truth": truth, "released": row.label})
            listed[-1] |= {"labels": given, "last_boxes": shown, "end": row.response[-160:]}
    return {
        "rollouts": len(chosen) + len(without),
        "with_ground_truth": len(chosen),
        "agree_with_released": {
            name: sum(label == row.label for label, (row, _) in zip(found, chosen, strict=True))
            for name, found in labels.items()
        },
        "differing": listed,
    }


def markdown(found: dict[str, Any], command: str) -> str:
    """The tables for people."""
    truths = found["truths"]
    lines = ["# `ipvrm label` on real ground truths", "", f"`{command}`", ""]
    about = found["machine"]
    lines += [f"{about.get('cpu', about)}; commit {about.get('commit', '')}.", ""]
    lines += [
        f"{truths['ground_truths']} ground truths, {truths['answers']} answers: five right spellings and two "
        "wrong answers of each. Before: math-verify alone on the whole response. Expressions get spaces, "
        "`\\dfrac`, `\\tfrac`, `\\left(` or a box per part where they can (as a power of ten: a box).",
        "",
        "| answer | should be | label 1 | label 0 | left out | before: label 1 | label 0 | left out |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for way in (*RIGHT_WAYS, *WRONG_WAYS):
        cells = [
            str(truths[name]["by_way"][way].get(outcome, 0))
            for name in VERIFIERS
            for outcome in ("label 1", "label 0", "left out")
        ]
        lines.append(f"| {way} | {int(way in RIGHT_WAYS)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| data source | right: label 1 | label 0 | left out | wrong: label 1 | label 0 | left out |",
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for source, counts in truths["math"]["by_data_source"].items():
        cells = [
            str(counts.get(f"{kind}: {outcome}", 0))
            for kind in ("right", "wrong")
            for outcome in ("label 1", "label 0", "left out")
        ]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Left out with some answer, since the ground truth cannot be read or the answer took too long:",
        "",
    ]
    lines += [f"- `{answer}`" for answer in truths["math"]["unreadable"]]
    lines += ["", "Mislabelled:", ""]
    lines += [
        f"- {case['way']}, label {case['label']}: `{case['answer']}` answered `{case['response']}`".replace(
            "\n", " "
        )
        for case in truths["math"]["mislabelled"]
    ]
    lines += ["", "## What math-verify lets pass", ""]
    lines += ["Answers that differ from the ground truth in this way and are taken for right.", ""]
    lines += ["| answer with | tried | label 1 |", "|---|--:|--:|"]
    lines += [f"| {name} | {n['tried']} | {n['label 1']} |" for name, n in found["leniencies"].items()]
    if rollouts := found.get("two_boxes"):
        before, after = (rollouts["agree_with_released"][n] for n in ("math-verify alone", "math"))
        lines += [
            "",
            "## Released rollouts with two boxes or more",
            "",
            f"{rollouts['rollouts']} rollouts; {rollouts['with_ground_truth']} have a number as ground "
            "truth, on which right responses to the prompt agree. Labelled as released: "
            f"{before} before, {after} now.",
            "",
            "| row | ground truth | last boxes | released | before | now |",
            "|--:|--:|---|--:|--:|--:|",
        ]
        lines += [
            f"| {case['row']} | {case['truth']} | `{', '.join(case['last_boxes'])}` | {case['released']} | "
            f"{case['labels']['math-verify alone']} | {case['labels']['math']} |".replace("\n", " ")
            for case in rollouts["differing"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="prompts with ground truth")
    parser.add_argument("--rollouts", help="released rollouts with labels")
    parser.add_argument("--out", default=str(RESULTS), help="folder to write")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"truths": truths_table(arguments.data)}
    found["leniencies"] = leniencies(arguments.data)
    if arguments.rollouts:
        found["two_boxes"] = two_boxes(arguments.rollouts)
    found["machine"] = machine.describe()
    command = "python -m benchmarks.studies.label_truths --data $DATA/policy_eval.parquet"
    command += " --rollouts $DATA/rm/qwen3_0.6b_pointwise.parquet" if arguments.rollouts else ""
    found["command"] = command
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "label_truths.json", found)
    (out / "README.md").write_text(markdown(found, command), encoding="utf-8")
    print((out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
