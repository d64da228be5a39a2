"""One row of 50 MB among others costs a message and not the machine; a template is rendered once a row."""

import json
import subprocess
import sys

import pytest

from ipvrm import IpvrmError
from ipvrm.data import chat as chat_module
from ipvrm.data.chat import Chat
from ipvrm.data.responses import tokenize
from ipvrm.data.rows import Row
from ipvrm.rollouts import verify

LONG = 50_000_000


def test_texts_beyond_the_limit_are_not_tokenised(tokenizer, monkeypatch):
    chat = Chat(tokenizer)
    most = chat.most_characters(64)
    monkeypatch.setattr(Chat, "encode", lambda self, texts: pytest.fail(f"{sum(map(len, texts))} characters"))
    for row in (Row("f:1", "p", "ab " * most, 1), Row("f:1", "ab " * most, "a", 1)):
        with pytest.raises(
            IpvrmError, match=r"f:1: its (response|prompt) of [\d,]+ characters is more than 64 tokens"
        ):
            tokenize([row], chat, max_length=None, max_positions=64)
        found = tokenize([row], chat, max_length=64, max_positions=128)
        assert found.counts["too_long_dropped"] == 1 and not found.bad


def test_where_the_model_names_no_limit_there_is_one_of_characters(tokenizer, monkeypatch):
    monkeypatch.setattr(Chat, "encode", lambda self, texts: pytest.fail(f"{sum(map(len, texts))} characters"))
    long = "a" * (chat_module.MOST_CHARACTERS + 1)
    for row, what in ((Row("f:1", "p", long, 1), "response"), (Row("f:1", long, "a", 1), "prompt")):
        reason = rf"f:1: its {what} of 4,194,305 characters is more than the 4,194,304 that are read where"
        with pytest.raises(IpvrmError, match=reason):
            tokenize([row], Chat(tokenizer), max_length=None, max_positions=None)


def test_a_cut_response_is_the_start_of_the_whole(tokenizer):
    chat = Chat(tokenizer)
    text = "12 + 7 is 19. " * chat.most_characters(64)
    cut = tokenize([Row("f:1", "p", text, 1)], chat, max_length=64, on_long="truncate").responses[0]
    whole = tokenize([Row("f:1", "p", text[:2000], 1)], chat, max_length=64, on_long="truncate").responses[0]
    assert cut.input_ids == whole.input_ids and len(cut.input_ids) == 64


def test_no_text_within_the_limit_is_refused(tokenizer):
    """The longest token over and over has the most characters a token."""
    chat = Chat(tokenizer)
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.convert_tokens_to_string([longest]) * 50
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(text) <= chat.most_characters(count)


def test_long_rows_are_tokenised_apart_from_others(tokenizer, monkeypatch):
    monkeypatch.setattr("ipvrm.data.responses.TOKENIZER_CHARACTERS", 100)
    rows = [Row(f"f:{n}", "p", "a" * length, 1) for n, length in enumerate((30, 60, 20, 300, 5, 5))]
    sizes, encode = [], Chat.encodings
    monkeypatch.setattr(
        Chat, "encodings", lambda self, texts: sizes.append([len(t) for t in texts]) or encode(self, texts)
    )
    found = tokenize(rows, tokenizer, max_length=None)
    assert sizes == [[30, 60], [20], [300], [5, 5]]
    assert [r.source for r in found.responses] == [r.source for r in rows]


@pytest.mark.parametrize("structured", [False, True])
def test_a_template_is_rendered_once_a_row(tokenizer, monkeypatch, structured):
    """Of a message with more than content also with its answer; the checks cost a render of each shape."""
    calls, real = [], type(tokenizer).apply_chat_template

    def counted(self, messages, **options):
        calls.append(options.get("add_generation_prompt", True))
        return real(self, messages, **options)

    chat = Chat(tokenizer)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    message = {"role": "assistant", "content": "It is 3."} if structured else None
    rows = [Row(f"f:{n}", f"What is {n}?", "It is 3.", 1, message) for n in range(40)]
    tokenize(rows, chat, max_length=None)
    assert calls.count(True) == 40 + 1 and calls.count(False) == (40 + 1 if structured else 0)


def test_caches_do_not_grow_with_the_data(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_module, "MOST_KEPT", 8)
    chat = Chat(tokenizer)
    ids = [chat.prompt_ids(f"question {n} " + "x" * n) for n in range(50)]
    assert len(chat._prompts) == 8 and all(len(key) <= 256 for key in chat._prompts)
    assert [chat.prompt_ids(f"question {n} " + "x" * n) for n in range(50)] == ids


MEASURE = """import json, sys
from ipvrm.cli import main
from ipvrm.rollouts import verify

def peak(process):
    return [1024 * int(line.split()[1]) for line in open(f"/proc/{process}/status") if "VmHWM" in line][0]

workers, kill = [0], verify._Worker.kill
verify._Worker.kill = lambda self: workers.append(peak(self.process.pid)) or kill(self)
code = main(json.loads(sys.argv[1]))
print(code, peak("self") + max(workers))
"""


def peak(arguments):
    """(exit code, peak memory of the process and of its largest verifier, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([*map(str, arguments)])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code, memory = done.stdout.split()[-2:]
    return int(code), int(memory), done.stderr


def test_an_answer_beyond_every_model_is_given_to_no_worker(monkeypatch):
    """Neither a right nor a wrong one; the others are asked as ever."""
    monkeypatch.setattr(verify, "MOST_CHARACTERS", 100)
    asked = []
    real = verify._Worker.ask
    monkeypatch.setattr(
        verify._Worker, "ask", lambda self, number, *rest: asked.append(number) or real(self, number, *rest)
    )
    pairs = [("Answer: 1", "1"), ("Answer: 1" + " " * 100, "1"), ("Answer: 2", "1"), ("1", "1" * 100)]
    with verify.VerifierPool("string", 1) as pool:
        found = pool.judge(pairs)
        assert pool.judge(pairs[1:2]) == found[1:2]
    assert [v.outcome for v in found] == ["right", "error", "wrong", "error"] and asked == [0, 2]
    assert found[1].detail == "110 characters, more than 100" and found[1].label is None


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: ru_maxrss is inherited from the parent")
@pytest.mark.parametrize("command", ["train-rm", "train-rm prompt", "rollout", "label", "score", "eval bon"])
def test_a_row_of_50_mb_costs_less_than_1_gb(tmp_path, tiny_folder, command):
    rows = [
        {"prompt": f"q{n}", "response": f"Answer: {n}", "label": n % 2, "answer": str(n)} for n in range(20)
    ]
    if command == "eval bon":
        rows = [row | {"prompt": f"q{n // 2}"} for n, row in enumerate(rows)]
    if command == "score":
        rows = [{"problem": row["prompt"], "steps": [row["response"]]} for row in rows]
    peaks = []
    for name in ("short", "long"):
        if name == "long":
            column = "prompt" if command in ("rollout", "train-rm prompt") else "response"
            text = "word and é " * (LONG // 11)
            rows.insert(7, {**rows[7]} | ({"steps": [text]} if command == "score" else {column: text}))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = ["--model", tiny_folder, "--use_cpu", "--on_bad_row", "skip"]
        output, endo = tmp_path / f"{name}-out", ["--objective", "endo_rm"]
        flags = {
            "train-rm": ["train-rm", *model, "--train_data", path, "--output_dir", output, "--max_steps", 1],
            "rollout": [
                "rollout",
                *model,
                "--input",
                path,
                "--output",
                f"{output}.jsonl",
                "--max_new_tokens",
                4,
            ],
            "score": ["score", *model, *endo, "--input", path, "--output", f"{output}.jsonl"],
            "eval": ["eval", "bon", *model[:-2], *endo, "--data", path, "--output_dir", output, "--n", 2],
            "label": ["label", "--input", path, "--output", f"{output}.jsonl", "--num_workers", 1],
        }[command.split()[0]]
        code, memory, said = peak(flags)
        assert code == 0, said
        peaks.append(memory)
    print(f"{command}: {peaks[0] / 1e6:.0f} MB, with a row of 50 MB {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] - peaks[0] < 1e9
