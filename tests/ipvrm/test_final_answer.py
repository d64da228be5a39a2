r"""Where a final answer stands, which number it is, and ground truths that are not written as LaTeX.

No ground truth is tried against itself: every right answer is spelled another way.
"""

import json
import math
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import write_jsonl

from ipvrm.data.rows import ground_truth
from ipvrm.rollouts.final_answer import (
    answer_region,
    as_number,
    boxes,
    final_answer,
    ground_truth_answer,
    part_count,
    same_number,
    undecorated,
    without_e_notation,
)
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.verify import verify_math, verify_string

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "studies").is_dir():
    pytest.skip("no checkout with benchmarks/ beside the tests", allow_module_level=True)
sys.path.append(str(ROOT))  # behind the installed packages, which stay the ones that are tested

from benchmarks.studies.label_truths import RIGHT_WAYS, spellings  # noqa: E402

GSM8K = "She bakes 24.\nAt noon 24/2 = <<24/2=12>>12.\nTogether 1,222+12 = <<1222+12=1234>>1234.\n#### 1,234"


@pytest.mark.parametrize(
    ("response", "region"),
    [
        ("no thinking", "no thinking"),
        ("<think>a</think>b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("a</think>b", "b"),  # the prompt has opened it
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>b<think>c", "b"),
        ("b<think>c", "b"),
        ("<think>a", ""),
        ("<think>a <think> b</think>c", "c"),
        ("</think>", ""),
    ],
)
def test_answer_region(response, region):
    assert answer_region(response) == region


@pytest.mark.parametrize(
    ("response", "parts", "answer"),
    [
        (r"<think>\boxed{7}</think> The answer is 9.", 1, "9"),
        (r"<think>Answer: 7", 1, None),
        (r"\boxed{7} or rather \boxed{}", 1, "7"),
        (r"> Put it into \boxed{Your answer}." + "\n\nThe answer is 9.", 1, "9"),
        (r"into \boxed{...}, so \boxed{9}", 1, "9"),
        (r"\boxed{9.}", 1, "9"),
        (r"\boxed{$9$}", 1, "9"),
        (r"\boxed{\text{Answer: } 9}", 1, "9"),
        (r"\boxed{\boxed{9}}", 1, "9"),
        (r"\fbox{9}", 1, "9"),
        (r"\boxed{\textbf{east}}", 1, "east"),
        (r"\boxed{\mathbf{x}+\mathbf{y}}", 1, r"\mathbf{x}+\mathbf{y}"),
        (r"$x=\boxed{3}$ and $y=\boxed{4}$.", 2, "3, 4"),
        (r"$x=\boxed{3}$ and $y=\boxed{4}$.", 1, "4"),
        (r"\[\boxed{3}\]" + "\n\n" + r"\[\boxed{4}\]", 2, "3, 4"),
        (r"First \boxed{3}. Then \boxed{4}", 2, "4"),
        (r"First \boxed{3}, so \boxed{4, 5}", 2, "4, 5"),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", 2, "2, 3"),
        ("**Answer:** 5", 1, "5"),
        ("\\boxed{7}\n\nAnswer: 8", 1, "7"),
        ("Answer: 8\n\\boxed{7}", 1, "7"),
        (r"\boxed{\text{Answer: 5}}", 1, "5"),
    ],
)
def test_where_the_answer_stands(response, parts, answer):
    assert final_answer(response, parts) == answer


def test_boxes_are_the_closed_ones_that_hold_something():
    text = r"\boxed{} \boxed {a_{1}} \boxed{\boxed{2}} \boxed{\ldots} \boxed{3"
    assert [content for _, _, content in boxes(text)] == ["a_{1}", r"\boxed{2}"]
    start, end, _ = boxes(text)[0]
    assert text[start:end] == r"\boxed {a_{1}}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.83e35", "3.83e35"),
        ("1e-5", "0.00001"),
        ("1E+16", "1e16"),
        (r"3.83 \times 10^{35}", "3.83e35"),
        (r"2.7778 \cdot 10^{-6}", "2.7778e-6"),
        ("2 × 10⁻⁵", "2e-5"),
        ("2*10**5", "2e5"),
        ("10^{-7}", "1e-7"),
        ("-10^3", "-1000"),
        (r"3\times10^8\,\mathrm{m/s}", "3e8"),
        (r"44\text{ cm}^2", "44"),
        (r"1\,000\,000", "1e6"),
        ("1{,}000", "1000"),
        (r"1,\!000", "1000"),
        ("1,234.5", "1234.5"),
        ("11,111,111,100", "11111111100"),
        ("1 000 000", "1000000"),
        (r"\$12.50", "12.5"),
        ("$-4$", "-4"),
        ("−4", "-4"),
        ("+2", "2"),
        (".35625", "0.35625"),
        ("142.0", "142"),
        ("1e5000", "1e5000"),
    ],
)
def test_numbers(text, value):
    assert as_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1 2", "1,2", "12,34", "3/4", r"\frac{1}{2}", "9%", "3e", "e5", "2e^{3}", "(3)", "1.2.3"],
)
def test_what_is_no_number(text):
    assert as_number(text) is None


@pytest.mark.parametrize(
    ("truth", "found", "same"),
    [
        ("0.333333", "0.33333333333", True),
        ("1e-8", "1e-7", False),
        ("1e-8", "0", False),
        ("0", "0.0000001", True),
        ("1.39e-10", "1.3900000001e-10", True),
        ("2", "2.00001", False),
        ("3.83e35", "3.84e35", False),
        ("1e5000", "1e5001", False),
    ],
)
def test_same_number(truth, found, same):
    assert same_number(Decimal(truth), Decimal(found)) is same


def test_e_notation_is_written_out_within_a_text():
    assert without_e_notation("(1e-5, 2.5e3) W") == "(0.00001, 2500) W"
    for text in ("2e^{3}", "3e", "x2e3", "1e5000", "5e2t", "ae5"):
        assert without_e_notation(text) == text


@pytest.mark.parametrize(
    ("truth", "count"),
    [
        ("3, 4", 2),
        ("$69$,$84$", 2),
        ("(3, 4)", 1),
        ("(2,32), (8,18)", 2),
        (r"\{1\pm\sqrt{5},-2\}", 3),
        (r"3\pm2\sqrt{2}", 2),
        ("3 and 4", 2),
        ("9", 1),
        ("", 1),
    ],
)
def test_parts_of_a_ground_truth(truth, count):
    assert part_count(truth) == count


def test_the_ground_truth_of_a_worked_solution():
    assert ground_truth_answer(GSM8K) == "1,234"
    assert ground_truth_answer("#### $36$.") == "36"
    assert ground_truth_answer(r"We add, so $x=\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert ground_truth_answer("$5$") == "5"
    assert undecorated(r"\(\displaystyle 5\)") == "5"


# ------------------------------------------------------------------------------------------------- verifiers


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{3.83 \times 10^{35}}", "3.83e35", True),
        (r"\boxed{3.84 \times 10^{35}}", "3.83e35", False),
        (r"\boxed{383\times 10^{33}\text{ kg}}", "3.83e35", True),
        (r"\boxed{0.00001}", "1e-5", True),
        (r"\boxed{\frac{1}{100000}}", "1e-05", True),
        (r"x = 10^{-5}, so \boxed{x = 10^{-5}}", "1e-5", True),
        (r"\boxed{10^{-7}}", "1e-8", False),
        (r"\boxed{0}", "7.4e-12", False),
        ("The answer is 3.83e35.", "3.83e+35", True),
        ("It is 3.83e35 W", "3.83e35", True),
        ("The answer is 2 × 10⁻⁵.", "2e-5", True),
        (r"\boxed{2(e-1)}", "2e-2", True),  # Euler's e: both readings are right
        (r"\boxed{0.02}", "2e-2", True),
        (r"\boxed{0.03}", "2e-2", False),
        (r"\boxed{(0.00001, 2000)}", "(1e-5, 2e3)", True),
        (r"\boxed{4}", "4.0", True),
        (r"\boxed{\frac{1}{3}}", "0.333333", True),
        (r"\boxed{0.3333}", "0.333333", False),
        (r"\boxed{\frac{2\pi\sqrt{3}}{3}}", "2*pi*sqrt(3)/3", True),
        (r"\boxed{\arcsin(\frac{10}{13})}", "np.arcsin(10/13)", True),
        (r"\boxed{e^{-2t}}", "exp(-2*t)", True),
        (r"\boxed{e^{2}}", "E**2", True),
        (r"\boxed{e^{2t}}", "exp(-2*t)", False),
        (r"\boxed{x^2+2x+1}", "(x + 1)**2", True),
        (r"\boxed{2*pi}", r"2\pi", True),
        (r"\boxed{9.}", "9", True),
        (r"\boxed{1\,000\,000}", "1000000", True),
        (r"\boxed{\$12}", "12", True),
        (r"\boxed{25 + 84 = 109}", "109", True),
        (r"\boxed{9 \text{ apples}}", "9", True),
        (r"$\boxed{3}$ and $\boxed{4}$", "3, 4", True),
        (r"$\boxed{4}$ or $\boxed{3}$.", "$3$,$4$", True),
        (r"$\boxed{3}$ and $\boxed{5}$", "3, 4", False),
        (r"\boxed{100} and \boxed{200}", "100,200", True),
        (r"\boxed{100200}", "100,200", True),
        (r"\boxed{\frac{3}{2}}, so k + m = \boxed{5}", "5", True),
        (r"\boxed{EVEN}", "even", True),
        (r"\boxed{\text{odd}}", "even", False),
        (r"\boxed{B}", "(B)", True),
        (r"\boxed{C}", "(B)", False),
        ("<think>Try \\boxed{7}.</think>\n\nThe answer is 9.", "9", True),
        ("<think>Try \\boxed{7}.</think>\n\nThe answer is 9.", "7", False),
        ("Try \\boxed{7}, no.</think>\n\n**9**", "9", True),
        ("\\boxed{7 \\text{ and } 13}, whose product is\n\n**Answer:** $91$", "91", True),
        ("\\boxed{\\4}\n\nAnswer: $4$", "4", True),
        ("\\boxed{9}\n\nAnswer: $6$", "6", False),  # the box is a number: it is the answer
        ("\\boxed{\\frac{1}{2}}\n\nAnswer: as above", "0.5", True),
        ("The answer is $ - 3./2$.", "-1.5", True),
        (
            r"The answer is $\frac{1}{3} E_{1} + \frac{2}{3} E_{2}$.",
            r"\frac{1}{3}E_{1}+\frac{2}{3}E_{2}",
            True,
        ),
        (r"The answer is $\frac{1}{3} E_{1}$ or $7$, I think", "9", False),
        ("1234", GSM8K, True),
        (r"\boxed{1222}", GSM8K, False),
    ],
)
def test_math_verifier_on_other_spellings(response, answer, right):
    assert verify_math(response, answer).outcome == ("right" if right else "wrong")


@pytest.mark.parametrize("response", ["<think>Is it \\boxed{9}", "<think>Answer: 9"])
def test_thinking_that_never_ends_is_no_answer(response):
    assert verify_math(response, "9").outcome == verify_string(response, "9").outcome == "no_answer"


@pytest.mark.parametrize(
    "answer",
    ["She has 24 apples and buys 12.\nThen she has more.", "$t(0,4]$", "The sum is what we wanted here"],
)
def test_a_ground_truth_that_math_cannot_read(answer):
    verdict = verify_math(r"\boxed{36}", answer)
    assert verdict.outcome == "unreadable_ground_truth" and verdict.label is None
    assert answer[:10] in verdict.detail


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        (r"\boxed{1234}", GSM8K, "right"),
        ("#### 1,234", GSM8K, "right"),
        (r"\boxed{48}", GSM8K, "wrong"),
        (r"\boxed{5}", "$5$", "right"),
        (r"\boxed{4}", "4.0", "right"),
        (r"\boxed{3.83 \times 10^{35}}", "3.83e35", "right"),
        (r"\boxed{\frac12}", r"\frac{1}{2}", "wrong"),  # character by character
        (r"\boxed{36}", "24 and 12\nmake 36", "unreadable_ground_truth"),
        (r"\boxed{36}", "####", "unreadable_ground_truth"),
    ],
)
def test_string_verifier_on_other_spellings(response, answer, outcome):
    assert verify_string(response, answer).outcome == outcome


def test_real_ground_truths_in_other_spellings(data_dir):
    """Every fortieth in five ways; the few that math-verify cannot read are left out, never wrong."""
    table = pq.read_table(data_dir / "policy_eval.parquet", columns=["reward_model"]).to_pylist()
    answers = [row["reward_model"]["ground_truth"] for row in table][::40]
    found = {
        (answer, way): verify_math(response, answer).outcome
        for answer in answers
        for way, response in spellings(answer).items()
    }
    right = [outcome for (_, way), outcome in found.items() if way in RIGHT_WAYS]
    wrong = [outcome for (_, way), outcome in found.items() if way not in RIGHT_WAYS]
    assert set(right) <= {"right", "unreadable_ground_truth"} and right.count("right") >= 0.98 * len(right)
    assert set(wrong) <= {"wrong", "unreadable_ground_truth"} and wrong.count("wrong") >= 0.98 * len(wrong)


def test_minerva_numbers_are_read(data_dir):
    """All ground truths in e-notation: today's libraries read them as products with Euler's e."""
    table = pq.read_table(data_dir / "policy_eval.parquet", columns=["reward_model"]).to_pylist()
    answers = [row["reward_model"]["ground_truth"] for row in table]
    answers = [answer for answer in answers if "e" in answer and as_number(answer) is not None]
    assert len(answers) == 58
    for answer in answers:
        for way, response in spellings(answer).items():
            assert verify_math(response, answer).outcome == ("right" if way in RIGHT_WAYS else "wrong"), (
                response
            )


# ------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (4.0, "4"),
        (-4.0, "-4"),
        (4, "4"),
        (0.0, "0"),
        (0.5, "0.5"),
        (1e-5, "1e-05"),
        (3.83e35, "3.83e+35"),
        (Decimal("4.00"), "4"),
        (Decimal("4.50"), "4.50"),
        (np.float64(4.0), "4"),
        (np.int64(7), "7"),
        (np.float32(0.5), "0.5"),
        (math.inf, r"\infty"),
        (-math.inf, r"-\infty"),
        (math.nan, None),
        (np.float32("nan"), None),
        (Decimal("nan"), None),
        ("nan", None),
        (" NaN ", None),
        ("  ", None),
        (None, None),
        (" 4.0 ", "4.0"),
    ],
)
def test_ground_truths_of_a_column(value, truth):
    assert ground_truth({"answer": value}) == truth
    assert ground_truth({"answer": math.nan, "reward_model": {"ground_truth": value}}) == truth


@pytest.mark.parametrize("value", [True, np.True_, [4], {"a": 4}, 4j])
def test_a_ground_truth_must_be_a_text_or_a_number(value):
    with pytest.raises(ValueError, match="the ground truth must be a text or a number"):
        ground_truth({"answer": value})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(10, 2)])
@pytest.mark.parametrize("verifier", ["math", "string"])
def test_a_column_of_numbers(tmp_path, kind, verifier):
    """As pandas writes one: integers as floats, and what is missing as NaN."""
    answers = pa.array([Decimal("4.00"), Decimal("0.10"), None], pa.decimal128(10, 2)).cast(kind)
    responses = [r"\boxed{4}", r"\boxed{.1}", r"\boxed{1}"]
    table = pa.table({"prompt": ["a", "b", "c"], "response": responses, "answer": answers})
    pq.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out.jsonl"
    summary = label_file(
        LabelConfig(str(tmp_path / "in.parquet"), str(output), verifier, 100.0, num_workers=1), False
    )
    assert {kind: n for kind, n in summary["counts"].items() if n} == {"right": 2, "missing_ground_truth": 1}


def test_an_unreadable_ground_truth_is_left_out_counted_and_named(tmp_path):
    rows = [
        {"prompt": "a", "response": r"\boxed{36}", "answer": "24 and 12\nmake 36"},
        {"prompt": "b", "response": r"\boxed{36}", "answer": GSM8K},
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    config = LabelConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "string", num_workers=1)
    summary = label_file(config, progress=False)
    assert summary["counts"]["unreadable_ground_truth"] == 1 and summary["counts"]["wrong"] == 1
    assert summary["failures"][0]["row"] == 1 and "24 and 12" in summary["failures"][0]["detail"]
    assert [json.loads(line)["row"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [2]
