r"""Inputs of the kinds that users of neighbouring projects have reported, through the commands themselves.

Per kind the reported case and siblings of it. What no part of a message may be lost is in test_chat.py.
"""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from ipvrm import IpvrmError
from ipvrm.data import Row, encode_prompt, read_rows, tokenize
from ipvrm.data.chat import Chat, tokenizer_hash
from ipvrm.evaluate import bon, policy, processbench
from ipvrm.evaluate.bon import BonConfig
from ipvrm.evaluate.policy import PolicyEvalConfig
from ipvrm.evaluate.processbench import EvalConfig
from ipvrm.evaluate.score import ScoreConfig, score_file
from ipvrm.models.causal_lm import load_model, load_tokenizer, save_model, template_hash
from ipvrm.models.reward_model import RewardModel, RewardModelInfo, reference_entries, write_info
from ipvrm.models.token_rewards import save_value_head
from ipvrm.reproduce.td_study import TdConfig, study
from ipvrm.rollouts.label import LabelConfig, label_file
from ipvrm.rollouts.rollout import RolloutConfig, roll_out
from ipvrm.run_folder import versions
from ipvrm.training.policy_config import PolicyConfig
from ipvrm.training.reward_config import RewardConfig
from ipvrm.training.train_policy import train_policy
from ipvrm.training.train_rm import train_reward_model
from ipvrm.view.inspect import InspectConfig, inspect

RIGHT, WRONG, LEFT_OUT = 1, 0, None
SOLUTION = "She bakes 24.\nAt noon 24/2 = <<24/2=12>>12.\nTogether 24+12 = <<24+12=36>>36.\n#### 36"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def labels_of(tmp_path, verifier, cases):
    """Labels of (response, ground truth, ...) cases in their order; None for a row that was left out."""
    rows = [{"prompt": f"Question {i}.", "response": r, "answer": a} for i, (r, a, _) in enumerate(cases)]
    output = tmp_path / "labelled.jsonl"
    config = LabelConfig(write(tmp_path / "in.jsonl", rows), str(output), verifier, num_workers=1)
    summary = label_file(config, progress=False)
    found = {row["row"]: row["label"] for row in map(json.loads, output.read_text().splitlines())}
    dropped = summary["counts"]["unreadable_ground_truth"]
    assert len(found) + dropped == len(cases), summary["counts"]
    return [found.get(number) for number in range(1, len(cases) + 1)]


KINDS = {
    "a ground truth whose notation is not LaTeX": ("math", [
        (r"Hence \boxed{3.83 \times 10^{35}}", "3.83e35", RIGHT),
        (r"Hence \boxed{0.00001}", "1e-5", RIGHT),
        (r"Hence \boxed{44000000}", "4.4e7", RIGHT),
        (r"Hence \boxed{2.7778 \cdot 10^{-6}}", "2.7778e-6", RIGHT),
        (r"Hence \boxed{10^{-7}}", "1e-8", WRONG),
        (r"\boxed{-1.6\times 10^{-19}\ \text{C}}", "-1.6E-19", RIGHT),
        (r"\boxed{1.6\times 10^{-19}}", "-1.6E-19", WRONG),
        (r"\boxed{9.4 \times 10^{-3}}", "$9.4e-3$ Hz", RIGHT),
        (r"\boxed{36}", "36 m^2", RIGHT),
        (r"\boxed{1+2i}", "(1+2j)", RIGHT),  # Python's complex
        (r"\boxed{1-2i}", "(1+2j)", WRONG),
        (r"\boxed{1+2i}", "1 + 2*I", RIGHT),  # sympy's
        (r"\boxed{3-2i}", "3 - 2 i", RIGHT),
        (r"\boxed{\frac{3e}{2}}", "3*E/2", RIGHT),
        (r"\boxed{\frac{1}{2}}", "Fraction(1, 2)", RIGHT),
        (r"\boxed{\sqrt[3]{2}}", "cbrt(2)", RIGHT),
        (r"\boxed{\binom{5}{2}}", "binomial(5, 2)", RIGHT),
        (r"\boxed{\sqrt 3/2}", "sqrt(3)/2", RIGHT),
        (r"\boxed{\text{No solution}}", "no solution", RIGHT),
        (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", "Matrix([[1, 2], [3, 4]])", LEFT_OUT),
        (r"\boxed{[0,1)}", "Interval.Ropen(0, 1)", LEFT_OUT),
        (r"\boxed{[0,\infty)}", "[0, oo)", LEFT_OUT),
        (r"\boxed{2\sin x}", "2 sin(x)", LEFT_OUT),
        (r"\boxed{3\pi}", "3pi", LEFT_OUT),
        (r"\boxed{3}", "x equals 3", LEFT_OUT),
    ]),
    "an answer that is not the whole text": ("math", [
        ("<think>Try \\boxed{7}. No, recount: nine.</think>\n\nThe answer is 9.", "9", RIGHT),
        ("<think>Try \\boxed{7}. No, recount: nine.</think>\n\nThe answer is 9.", "7", WRONG),
        ("<think>My first answer is 7. Recount.</think>\n\n**9**", "9", RIGHT),
        ("<reasoning>\\boxed{7}</reasoning><answer>9</answer>", "9", RIGHT),
        ("<reasoning>\\boxed{7}</reasoning><answer>9</answer>", "7", WRONG),
        ("<THINK>\\boxed{7}</THINK>The answer is 9", "9", RIGHT),
        ("[THINK]\\boxed{7}[/THINK]The answer is 9", "9", RIGHT),
        ("◁think▷\\boxed{7}◁/think▷The answer is 9", "9", RIGHT),
        ("<seed:think>\\boxed{7}</seed:think>The answer is 9", "9", RIGHT),
        ("<unused94>thought\\boxed{7}<unused95>The answer is 9", "9", RIGHT),
        ("<|begin_of_thought|>\\boxed{7}<|end_of_thought|>The answer is 9<|end_of_solution|>", "9", RIGHT),
        ("<|channel|>analysis<|message|>\\boxed{7}<|end|><|channel|>final<|message|>\\boxed{9}", "9", RIGHT),
        ("First \\boxed{7}. Wrong. So \\boxed{9}, put in \\boxed{answer} as asked.", "9", RIGHT),
        ("First \\boxed{7}. Wrong. So \\boxed{9}, put in \\boxed{answer} as asked.", "7", WRONG),
        ("<answer>7</answer> No. <answer> 9 </answer>", "9", RIGHT),
        ("I shall write <answer>your answer</answer>: \\boxed{9}", "9", RIGHT),
    ]),
    "a ground truth that a comparison of texts can never match": ("string", [
        ("24 + 12 = 36, so \\boxed{36}", SOLUTION, RIGHT),
        ("#### 36", SOLUTION, RIGHT),
        ("\\boxed{48}", SOLUTION, WRONG),
        ("\\boxed{36}", SOLUTION.replace("#### 36", "So \\boxed{36}."), RIGHT),
        ("\\boxed{36}", '["36"]', RIGHT),  # as OlympiadBench's final_answer is often stored
        ("\\boxed{12}", "['36']", WRONG),
        ("\\boxed{3, 4}", '["3", "4"]', RIGHT),
        (r"\boxed{\frac{1}{2}}", r'["\\frac{1}{2}"]', RIGHT),
        ("\\boxed{36}", "<think>12 or 36</think>36", RIGHT),
        ("<think>Is it 12?</think>\n\n36", "36", RIGHT),
        ("\\boxed{36}", SOLUTION.partition("####")[0], LEFT_OUT),
        ("\\boxed{36}", "She has 24 and buys half as many, so that makes 24+12 = 36", LEFT_OUT),
        ("\\boxed{36}", "The total is 36", LEFT_OUT),
        ("\\boxed{36}", "so 24+12 = <<24+12=36>>36", LEFT_OUT),
        ("\\boxed{36}", "Natalia sold half as many clips in May, so altogether she sold 36 clips.", LEFT_OUT),
        ("\\boxed{36}", "36 apples", RIGHT),
        ("\\boxed{36 apples}", "36 apples", RIGHT),
        ("\\boxed{36 pears}", "36 apples", WRONG),
        ("\\boxed{36}", "[36]", RIGHT),
        ("\\boxed{36}", "x = 36", RIGHT),
        ("\\boxed{x = 36}", "x = 36", RIGHT),
        ("\\boxed{35}", "x = 36", WRONG),
        ("\\boxed{all real numbers}", "all real numbers", RIGHT),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labels(tmp_path, kind):
    verifier, cases = KINDS[kind]
    found = labels_of(tmp_path, verifier, cases)
    wrong = [(case, label) for case, label in zip(cases, found, strict=True) if case[2] != label]
    assert not wrong


# --------------------------------------------------------------------- prompt tokens, then the response's own

CHAT_TEMPLATES = {
    "thinking of its own": "<think>\n\n</think>\n\n{{ m.content }}",
    "thinking dropped": "{{ m.content.split('</think>')[-1] }}",
    "spaces stripped": "{{ m.content | trim }}",
    "other newlines": "\n{{ m.content }}\n",
    "other letters": "{{ m.content | upper }}",
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("text", ["17 + 25 = 42. So \\boxed{42}", "<think>add</think> 42", "  42 \n"])
def test_a_template_that_rewrites_answers_does_not_reach_the_response(tokenizer, tmp_path, template, text):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + CHAT_TEMPLATES[template]
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [{"role": "user", "content": "Add 17 and 25."}, {"role": "assistant", "content": text}]
    plain = {"prompt": "Add 17 and 25.", "response": text, "label": 1}
    rows, _ = read_rows(write(tmp_path / "in.jsonl", [plain, {"conversation": messages, "label": 1}]))
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampled = (*encode_prompt("Add 17 and 25.", chat), *own, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    found = tokenize(rows, chat, max_length=None)
    assert [response.input_ids for response in found.responses] == [sampled, sampled]


@pytest.mark.parametrize("prompt", ["Q: Add 17 and 25. A: ", "Q:\nA:\n", "Q: \t", "Q: x\u00a0", "A:", " "])
@pytest.mark.parametrize("text", ["forty-two", " 42", "\n42", "  "])
def test_a_base_models_prompt_may_end_in_anything(tokenizer, prompt, text):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    parts = [base(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
    response = tokenize([Row("f:1", prompt, text, 1)], base, max_length=None).responses[0]
    assert response.input_ids[:-1] == (*parts[0], *parts[1]) and response.prompt_length == len(parts[0])


def test_a_base_model_learns_from_prompts_that_end_in_a_space(tiny_folder, tokenizer, tmp_path):
    base, folder = copy.deepcopy(tokenizer), tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    base.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    base.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template is None
    rows = [{"prompt": f"Q: Add 17 and {n}. A: ", "response": "forty-two", "label": n % 2} for n in (25, 26)]
    config = RewardConfig(
        str(folder), write(tmp_path / "in.jsonl", rows), str(tmp_path / "rm"), max_steps=1, use_cpu=True
    )
    assert train_reward_model(config, progress=False).metrics["data"]["used"] == 2


# --------------------------------------------------------------- ids and positions that a model does not have


@pytest.fixture
def short_of_ids(tiny_folder, tmp_path):
    """The tiny model with a tokenizer that has one token more than it has rows."""
    folder, tokenizer = tmp_path / "short_of_ids", load_tokenizer(tiny_folder)
    shutil.copytree(tiny_folder, folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<step{i}>" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def short_of_positions(tiny_folder, tmp_path):
    """The tiny model with 30 positions."""
    folder = tmp_path / "short_of_positions"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 30}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def commands(model, folder):
    """What runs with `model` in every command that loads one, by name."""
    prompts = write(folder / "prompts.jsonl", [{"prompt": "Add 2 and 3.", "answer": "5"}])
    long = {"prompt": "Add 2 and 3.", "response": "5, " * 20, "label": 1}
    rows = write(folder / "rows.jsonl", [long, long | {"label": 0}])
    solution = {"problem": "Add 2 and 3.", "steps": ["5, " * 20], "label": -1}
    solutions = write(folder / "solutions.jsonl", [solution])
    out = str(folder / "out")
    return {
        "rollout": lambda: roll_out(
            RolloutConfig(model, prompts, out + ".jsonl", max_new_tokens=40, use_cpu=True), progress=False
        ),
        "train-rm": lambda: train_reward_model(
            RewardConfig(model, rows, out, max_steps=1, use_cpu=True), progress=False
        ),
        "train-policy": lambda: train_policy(
            PolicyConfig(model, prompts, out, algorithm="grpo", max_new_tokens=40, max_steps=1, use_cpu=True),
            progress=False,
        ),
        "eval td": lambda: study(
            TdConfig(model, model, prompts, out, max_new_tokens=40, use_cpu=True), progress=False
        ),
        "score": lambda: score_file(ScoreConfig(model, solutions, out + ".jsonl", use_cpu=True), False),
        "inspect": lambda: inspect(InspectConfig(solutions, out + ".html", (model,), use_cpu=True), False),
        "eval processbench": lambda: processbench.evaluate(EvalConfig(model, (solutions,), out), False),
        "eval bon": lambda: bon.evaluate(BonConfig(model, rows, out, n=(2,), use_cpu=True), False),
        "eval policy": lambda: policy.evaluate(
            PolicyEvalConfig(
                model,
                prompts,
                out,
                num_generations=1,
                k=(1,),
                max_new_tokens=40,
                verifier="string",
                use_cpu=True,
            ),
            progress=False,
        ),
    }


IDS = r"the tokenizer has ids up to \d+ \('<step\d+>'\), the model \d+ rows; resize"
POSITIONS = r"its \d+ tokens .*are more than the 30 positions of the models in use"
COMMANDS = (
    "rollout", "train-rm", "train-policy", "score", "inspect", "eval processbench", "eval bon",
    "eval policy",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason", "command"),
    [("short_of_ids", IDS, command) for command in (*COMMANDS, "eval td")]
    + [("short_of_positions", POSITIONS, command) for command in COMMANDS],
)
def test_ids_and_positions_beyond_the_model_are_refused_before_any_work(
    request, tmp_path, model, reason, command
):
    folder = request.getfixturevalue(model)
    if command in ("score", "inspect", "eval processbench", "eval bon"):  # a reward model, its own reference
        info = RewardModelInfo(
            "ipvrm", 10.0, 5.0, template_hash=template_hash(AutoTokenizer.from_pretrained(folder)),
            versions=versions(), **reference_entries(folder, folder),
        )  # fmt: skip
        write_info(folder, info)
    with pytest.raises(IpvrmError, match=reason):
        commands(folder, tmp_path)[command]()
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.html").exists()
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/results.json"))


def reward_folder(folder, model, reference):
    """A reward model of these two."""
    shutil.copytree(model, folder)
    info = RewardModelInfo(
        "ipvrm", 10.0, 5.0, template_hash=template_hash(AutoTokenizer.from_pretrained(model)),
        versions=versions(), **reference_entries(reference, folder),
    )  # fmt: skip
    write_info(folder, info)
    return str(folder)


def test_score_refuses_the_last_row_before_the_first_is_scored(short_of_positions, tmp_path, monkeypatch):
    """The file is read in portions, and the row that does not fit is in the last one."""
    short, long = ({"problem": "Add", "steps": ["5" * n]} for n in (1, 60))
    rows = write(tmp_path / "rows.jsonl", [short] * 150 + [long])
    model = reward_folder(tmp_path / "model", short_of_positions, short_of_positions)
    config = ScoreConfig(model, rows, str(tmp_path / "out.jsonl"), use_cpu=True)
    scored = []
    forward = RewardModel.score_many
    monkeypatch.setattr(
        RewardModel, "score_many", lambda *a, **k: scored.append(len(a[1])) or forward(*a, **k)
    )
    with pytest.raises(IpvrmError, match=POSITIONS):
        score_file(config, False)
    assert not scored
    assert score_file(replace(config, on_bad_row="skip"), False) == 150
    assert sum(scored) > 150, "what was replaced is what scores"


SECOND = (
    "train-rm --reference", "train-policy --reward_model", "train-policy --td_reference", "train-policy q_rm",
    "eval td", "rollout", "inspect --policy",
)  # fmt: skip


@pytest.mark.parametrize("role", SECOND)
def test_positions_are_the_fewest_of_all_models_in_use(tiny_folder, short_of_positions, tmp_path, role):
    """A second model that is shorter read positions that it does not have, after the first one's work."""
    long, short, out = str(tiny_folder), short_of_positions, str(tmp_path / "out")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Add 2 and 3.", "answer": "5"}])
    row = {"prompt": "Add 2 and 3.", "response": "5, " * 20, "label": 1}
    rows = write(tmp_path / "rows.jsonl", [row, row | {"label": 0}])
    short_rm = reward_folder(tmp_path / "short_rm", short, long)
    short_reference = reward_folder(tmp_path / "short_reference", long, short)
    of_policy = {"max_new_tokens": 40, "max_steps": 1, "use_cpu": True}

    def policy_run(**settings):
        train_policy(PolicyConfig(long, prompts, out, **of_policy, **settings), progress=False)

    def q_rm():
        head = torch.nn.Linear(load_model(short).config.hidden_size, 1, bias=False)
        save_value_head(head, short)
        info = RewardModelInfo(
            "q_rm", 0.2, 2.0, "", "", "", template_hash(AutoTokenizer.from_pretrained(short)), versions()
        )
        write_info(short, info)
        policy_run(algorithm="reinforce_qrm", reward_model=short)

    def of_policy_of_inspect():
        solution = {"problem": "Add 2 and 3.", "steps": ["5, " * 20], "label": -1}
        solutions = write(tmp_path / "solutions.jsonl", [solution])
        model = reward_folder(tmp_path / "rm", long, long)
        inspect(InspectConfig(solutions, out + ".html", (model,), policy=short, use_cpu=True), False)

    work = {
        "train-rm --reference": lambda: train_reward_model(
            RewardConfig(long, rows, out, reference=short, max_steps=1, use_cpu=True), progress=False
        ),
        "train-policy --reward_model": lambda: policy_run(reward_model=short_rm),
        "train-policy --td_reference": lambda: policy_run(reward_model=short_reference, td_reference="sft"),
        "train-policy q_rm": q_rm,
        "eval td": lambda: study(
            TdConfig(long, short_rm, prompts, out, max_new_tokens=40, use_cpu=True), progress=False
        ),
        "rollout": lambda: roll_out(
            RolloutConfig(
                long,
                prompts,
                out + ".jsonl",
                reward_model=short_rm,
                min_prob=0.1,
                max_new_tokens=40,
                use_cpu=True,
            ),
            progress=False,
        ),
        "inspect --policy": of_policy_of_inspect,
    }
    with pytest.raises(IpvrmError, match=POSITIONS):
        work[role]()
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.html").exists()
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/results.json"))


def test_a_reference_of_another_vocabulary_is_refused_before_any_work(tiny_folder, tmp_path):
    """The run's reward model could not be loaded."""
    model = load_model(tiny_folder)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 8)
    save_model(model, tmp_path / "wide")
    load_tokenizer(tiny_folder).save_pretrained(tmp_path / "wide")
    row = {"prompt": "Add 2 and 3.", "response": "5", "label": 1}
    data = write(tmp_path / "rows.jsonl", [row, row | {"label": 0}])
    config = RewardConfig(
        str(tiny_folder),
        data,
        str(tmp_path / "out"),
        reference=str(tmp_path / "wide"),
        max_steps=1,
        use_cpu=True,
    )
    with pytest.raises(IpvrmError, match=rf"share one vocabulary; they have {rows} and {rows + 8} tokens"):
        train_reward_model(config, progress=False)


def test_a_stored_id_beyond_the_model_stops_every_command_that_reads_them(tiny_folder, tokenizer, tmp_path):
    """It decodes to no text, so that the row's text is right (the IndexError of case 15)."""
    ids = tokenizer("5", add_special_tokens=False)["input_ids"] + [10**6, Chat(tokenizer).end_of_turn]
    prompt = list(Chat(tokenizer).prompt_ids("Add 2 and 3."))
    stored = {"prompt_ids": prompt, "response_ids": ids, "tokenizer_hash": tokenizer_hash(tokenizer)}
    row = {"prompt": "Add 2 and 3.", "response": "5", "label": 1}
    sound, broken = [row, row | {"label": 0}], row | stored
    both = write(tmp_path / "both.jsonl", [*sound, broken])
    config = RewardConfig(str(tiny_folder), both, str(tmp_path / "rm"), max_steps=1, use_cpu=True)
    with pytest.raises(IpvrmError, match="both.jsonl:3: response_ids hold 1000000"):
        train_reward_model(config, progress=False)
    found = bon.evaluate(
        BonConfig(str(tiny_folder), both, str(tmp_path / "bon"), objective="endo_rm", n=(2,), use_cpu=True),
        progress=False,
    )
    ((place, reason),) = found["unusable"].items()
    assert place.endswith("both.jsonl:3") and "response_ids hold 1000000" in reason
