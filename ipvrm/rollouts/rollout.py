"""`ipvrm rollout`: n responses per prompt, sampled in batches, resumable."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipvrm.data.batches import collate, length_sorted_microbatches
from ipvrm.data.chat import parse_template_kwargs, tokenizer_hash
from ipvrm.data.files import file_hash
from ipvrm.data.responses import Response
from ipvrm.data.rows import OnBadRow, Prompt, read_prompts
from ipvrm.errors import IpvrmError, reading
from ipvrm.losses.policy_loss import CandidateConfig
from ipvrm.models.behaviour import behaviour, check_log_ratios, check_same_tokens, other_variables
from ipvrm.models.causal_lm import (
    candidate_logprobs,
    least_positions,
    load_model,
    load_tokenizer,
    local_folder,
    max_positions,
    vocab_size,
    weights_hash,
)
from ipvrm.models.reference import not_finite
from ipvrm.models.reward_model import check_own_weights, read_info
from ipvrm.models.server import ENGINE_TIMEOUT, LOCAL, Server, check_engine, kind_of
from ipvrm.output.locks import locked
from ipvrm.output.progress import Progress
from ipvrm.rollouts.answers import Job, as_questions, response_text, sample
from ipvrm.rollouts.engine import Engine, Sampling, TransformersEngine, response_seed, stop_ids
from ipvrm.rollouts.server_engine import ServerEngine
from ipvrm.run_folder import (
    FREE,
    begin_or_go_on,
    manifest,
    partial_folder,
    read_part,
    remove_partial_folder,
    settings_of,
    summary_path,
    table_schema,
    write_json,
    write_table,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
WORDS = {
    "input_hash": "the prompts",
    "model_hash": "the model",
    "rm_hash": "the reward model",
    "tokenizer_files_hash": "the model's tokenizer files",
}
FORWARD_TOKENS = 8192  # most of a padded forward for the log-probs


@dataclass(frozen=True)
class RolloutConfig:
    """Samples responses to prompts.

    In: `prompt` (text or chat messages) per row; `answer` or `reward_model.ground_truth`, and `data_source`,
    are carried along. Out: one row per response with `prompt`, `response`, `sample`, `truncated`, `answer`,
    `data_source`, `row`, `prompt_tokens`, `response_tokens`, and the ids themselves (`prompt_ids`,
    `response_ids`, the token that ended it included; `tokenizer_hash` says whose they are), which
    `ipvrm train-rm` then learns from; OUTPUT.summary.json has the counts.
    Label them with `ipvrm label`.
    A killed run goes on at its last complete batch when the same command is given again, and ends with the
    file that it would have written without the interruption.
    """

    model: str = field(metadata=FREE)
    """Policy: a folder or a Hub name."""
    input: str = field(metadata=FREE)
    """.parquet, .jsonl or .json file of prompts."""
    output: str = field(metadata=FREE)
    """.parquet or .jsonl file to write; it appears when all responses are there."""
    num_generations: int = 4
    """Responses per prompt."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object, for example '{"enable_thinking": false}'."""
    max_new_tokens: int = 2048
    """Most tokens of a response; one that has not ended by then is marked truncated."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 for no limit."""
    min_prob: float | None = None
    """Also store what `ipvrm train-policy --offline` needs: the log-prob of every response token, and in its
    place the ids and log-probs of all tokens with p >= min_prob (the paper's is 0.1), at `temperature`:
    `old_logprobs`, `candidate_ids`, `old_candidate_logprobs`, `temperature`, `min_prob`, `policy_hash`.
    A server must allow 1 / min_prob `logprobs`, and under --temperature other than 1 be started with
    --logprobs-mode processed_logprobs. Default: none."""
    reward_model: str | None = field(default=None, metadata=FREE)
    """With min_prob: also store the log-probs of the same tokens under this reward model, in fp32, so that
    `ipvrm train-policy --offline` with it never loads it: `rm_logprobs`, `rm_candidate_logprobs`, `rm_hash`.
    A folder that train-rm wrote (ipvrm, implicit_prm or dpo). Default: none."""
    seed: int = 42
    limit: int | None = None
    """Only the first so many rows."""
    per_device_eval_batch_size: int = field(default=64, metadata=FREE)
    """Most responses generated at a time; changes memory and speed, the responses by rounding alone."""
    engine: str = field(default=LOCAL, metadata=FREE)
    """transformers, or the address of a server of `model`, such as vLLM's http://localhost:8000/v1, whose
    random numbers are its own. Of `model` the tokenizer is then read, and its weights are hashed."""
    engine_timeout: float = field(default=ENGINE_TIMEOUT, metadata=FREE)
    """Most seconds to wait for one of its answers."""
    bf16: bool = False
    """Weights and cache of the policy in bf16, in place of fp32."""
    on_bad_row: OnBadRow = field(default="error", metadata=FREE)
    """Rows that cannot be used: stop and list them, or skip."""
    use_cpu: bool = field(default=False, metadata=FREE)
    """Generate on the CPU although there is an accelerator."""


def roll_out(config: RolloutConfig, progress: bool = True) -> dict[str, Any]:
    """Samples `config.num_generations` responses per prompt into `config.output`; returns the summary.

    Raises:
        IpvrmError: settings out of range, unreadable input, a model that cannot be loaded, or bad rows under
            `on_bad_row="error"`.
    """
    sampling, shown = _check(config), Progress(enabled=progress)
    with locked(config.output):
        return _roll_out(config, sampling, shown)


def _roll_out(config: RolloutConfig, sampling: Sampling, shown: Progress) -> dict[str, Any]:
    output = Path(config.output)
    prompts, bad = read_prompts(config.input, config.on_bad_row, limit=config.limit)
    made_from = _made_from(config)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    if output.is_file() and summary_path(output).is_file():
        stored = read_part(summary_path(output), {"key"}, shown.note)
        if stored is not None and stored["key"] == key:
            remove_partial_folder(output)  # its run may have been killed just before
            shown.note(f"{output} is already there, from the same prompts, model and settings")
            return stored
    tokenizer = load_tokenizer(config.model)
    chat = tokenizer.chat_template is not None
    if output.suffix == ".parquet":  # what the writer cannot take must show before the work
        table_schema([_carried(prompt, chat) for prompt in prompts])
    reward_folder = _reward_folder(config, tokenizer, shown)
    engine, stops, context, device = _engine(config, tokenizer)
    reward = None if reward_folder is None else load_model(reward_folder, torch.float32, device)
    prompts_in = len(prompts) + len(bad)
    context = least_positions(context, reward_folder)
    questions, bad = as_questions(prompts, bad, config.input, tokenizer, config, context, answers=False)
    for row in bad:
        shown.note(f"skipped {row}")
    jobs = [(q, q.prompt.row, number) for q in questions for number in range(config.num_generations)]

    folder = partial_folder(output)
    what = f"the unfinished work in {folder} (delete it to start afresh)"
    begin_or_go_on(folder / "settings.json", made_from, what, WORDS, shown.note if device == "cpu" else None)
    shards = _Shards(folder, shown.note)
    if shards.rows:
        shown.note(f"going on behind {len(shards.rows)} of {len(jobs)} responses")
    remaining = [job for job in jobs if job[1:] not in shards.rows]
    batches = length_sorted_microbatches(
        [len(question.ids) for question, *_ in remaining], max_rows=config.per_device_eval_batch_size
    )  # longest first: if memory does not suffice, that shows at once
    try:
        with shown.bar("responses", len(jobs), len(shards.rows)) as update:
            for batch in ([remaining[i] for i in indices] for indices in batches):
                started = time.monotonic()
                known: list[dict[str, Any]] = []
                if config.min_prob is not None and isinstance(engine, ServerEngine):
                    kind = _kind(config, made_from)
                    generated, known = _served(engine, batch, sampling, config.seed, kind)
                else:
                    generated = sample(engine, batch, sampling, config.seed)
                seconds = time.monotonic() - started
                pairs = zip(batch, generated, strict=True)
                rows = [_response(*pair, tokenizer, stops) for pair in pairs]
                if config.min_prob is not None:
                    if isinstance(engine, TransformersEngine):
                        known = _known(engine.model, reward, batch, generated, _kind(config, made_from))
                    rows = [row | found for row, found in zip(rows, known, strict=True)]
                shards.add(rows, seconds)
                tokens = sum(map(len, generated))
                update(len(shards.rows), tokens_per_second=tokens / seconds)
    except KeyboardInterrupt:
        shown.note(f"{len(shards.rows)} of {len(jobs)} responses are kept; the same command goes on")
        raise
    digest = tokenizer_hash(tokenizer)
    rows = [_row(job, shards.rows[job[1:]], chat, digest) for job in jobs]
    summary = {
        **_counts(rows, shards.seconds),
        "prompts_in": prompts_in,
        "bad": len(bad),
        "unusable": [str(row) for row in bad],
        "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stops)),
        "device": device,
        "key": key,
        "manifest": manifest(seeds={"seed": config.seed}, config=asdict(config)),
    }
    summary_path(output).unlink(missing_ok=True)  # it must never stand beside another run's rows
    write_table(output, rows)
    write_json(summary_path(output), summary)
    remove_partial_folder(output)
    return summary


def _engine(config: RolloutConfig, tokenizer: Any) -> tuple[Engine, set[int], int | None, str]:
    """What generates, the tokens that end a response, how many positions there are, and where it runs."""
    if config.engine != LOCAL:
        server = Server(config.engine, config.model, config.engine_timeout, config.per_device_eval_batch_size)
        stops = stop_ids(config.model, tokenizer)
        context = least_positions(config.model, server.max_positions)
        return ServerEngine(server, stops), stops, context, f"{server.url} ({server.name})"
    accelerator = None if config.use_cpu else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    model = load_model(config.model, torch.bfloat16 if config.bf16 else torch.float32, device)
    stops = stop_ids(model, tokenizer)
    engine = TransformersEngine(model, stops, config.per_device_eval_batch_size)
    return engine, stops, max_positions(model), str(device)


def _reward_folder(config: RolloutConfig, tokenizer: Any, shown: Progress) -> Path | None:
    """The reward model's folder, checked to speak of the policy's tokens; None where none is asked for."""
    if config.reward_model is None:
        return None
    folder = local_folder(config.reward_model)
    info = read_info(folder)
    check_log_ratios(folder, info, "--reward_model")
    check_same_tokens(folder, info, load_tokenizer(folder), tokenizer, vocab_size(config.model))
    if said := other_variables(folder, info, parse_template_kwargs(config.chat_template_kwargs)):
        shown.note(said)
    return folder


def _check(config: RolloutConfig) -> Sampling:
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    for name in ("num_generations", "per_device_eval_batch_size", "limit"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise IpvrmError(f"{name} must be at least 1; got {value}")
    if config.seed < 0:
        raise IpvrmError(f"seed must not be negative; got {config.seed}")
    if config.temperature == 0 and config.num_generations > 1:
        raise IpvrmError(
            f"temperature 0 gives the same response every time; num_generations must be 1, "
            f"got {config.num_generations}"
        )
    check_engine(config.engine, config.engine_timeout, bf16=config.bf16, use_cpu=config.use_cpu)
    if config.reward_model is not None and config.min_prob is None:
        raise IpvrmError(
            "--reward_model stores log-probs of the tokens that --min_prob finds; add that, or leave it out"
        )
    if config.reward_model is not None and config.engine != LOCAL:
        raise IpvrmError(
            "--reward_model scores beside a policy in memory (--engine transformers); leave it out, and "
            "`train-policy --offline` asks its own"
        )
    if config.min_prob is not None:
        if not 1 / 128 <= config.min_prob <= 1:
            raise IpvrmError(f"min_prob must lie in [1/128, 1]; got {config.min_prob}")
        if config.temperature == 0 or config.top_p < 1 or config.top_k:
            raise IpvrmError(
                "--min_prob stores the log-probs that tokens were drawn with: it needs --temperature above "
                "0, --top_p 1 and --top_k 0"
            )
    if Path(config.output).suffix not in (".parquet", ".jsonl"):
        raise IpvrmError(f"--output {config.output}: must end in .parquet or .jsonl")
    return sampling


def _response(job: Job, ids: list[int], tokenizer: Any, stops: set[int]) -> dict[str, Any]:
    text, ended = response_text(ids, stops, tokenizer)
    _, row, number = job
    return {
        "row": row,
        "sample": number,
        "response": text,
        "truncated": not ended,
        "response_tokens": len(ids),
        "response_ids": ids,
    }


def _kind(config: RolloutConfig, made_from: dict[str, Any]) -> dict[str, Any]:
    """Of what `_known` stores, that which is the same in every row."""
    kind = {name: getattr(config, name) for name in ("temperature", "min_prob")}
    kind["policy_hash"] = made_from["model_hash"]
    return kind if config.reward_model is None else kind | {"rm_hash": made_from["rm_hash"]}


@torch.no_grad()
def _known(
    policy: nn.Module,
    reward: nn.Module | None,
    jobs: Sequence[Job],
    generated: Sequence[list[int]],
    kind: dict[str, Any],
) -> list[dict[str, Any]]:
    """The columns `BEHAVIOUR` of the responses generated for these jobs, with a reward model `SCORED` too."""
    device, temperature = next(policy.parameters()).device, kind["temperature"]
    candidates = CandidateConfig(kind["min_prob"])
    responses = [
        Response((*q.ids, *ids), len(q.ids), source=f"prompt {row}")
        for (q, row, _), ids in zip(jobs, generated, strict=True)
    ]
    found: list[dict[str, Any]] = [{} for _ in responses]
    lengths = [len(r.input_ids) for r in responses]
    for indices in length_sorted_microbatches(lengths, max_tokens=FORWARD_TOKENS):
        batch = collate([responses[i] for i in indices]).to(device)
        known = behaviour(policy, batch, candidates, temperature)
        ids, of_ids = known.candidate_ids, known.candidate_logprobs
        used = (ids >= 0).sum(1).tolist()
        columns = {
            "old_logprobs": known.logprobs.tolist(),
            "candidate_ids": _cut(ids, used),
            "old_candidate_logprobs": _cut(of_ids, used),
        }
        if reward is not None:
            scored = candidate_logprobs(reward, batch, ids, temperature)
            columns["rm_logprobs"] = scored.logprobs.tolist()
            columns["rm_candidate_logprobs"] = _cut(scored.candidate_logprobs, used)
            others = scored.candidate_logprobs.masked_fill(ids < 0, 0.0).sum(-1)  # (n,)
            values, what = (scored.logprobs + others).cpu(), "log-probability, with its candidates',"
            if (place := not_finite(values, [responses[i] for i in indices], what)) is not None:
                raise IpvrmError(f"--reward_model: {place}; a value of it means nothing")
        start = 0
        for i in indices:
            end = start + responses[i].length
            found[i] = {name: column[start:end] for name, column in columns.items()} | kind
            start = end
    return found


def _served(
    engine: ServerEngine, jobs: Sequence[Job], sampling: Sampling, seed: int, kind: dict[str, Any]
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Responses of a server, and the columns `BEHAVIOUR` by what it says they were drawn with."""
    seeds = [response_seed(seed, number, i) for _, number, i in jobs]
    found = engine.with_candidates([q.ids for q, *_ in jobs], sampling, seeds, min_prob=kind["min_prob"])
    columns = []
    for response in found:
        used = (response.candidate_ids >= 0).sum(1).tolist()
        used[-1] = 0  # the last token carries the outcome and has no candidates
        own = {
            "old_logprobs": response.logprobs.tolist(),
            "candidate_ids": _cut(response.candidate_ids, used),
            "old_candidate_logprobs": _cut(response.candidate_logprobs, used),
        }
        columns.append(own | kind)
    return [response.ids for response in found], columns


def _cut(slots: Tensor, used: Sequence[int]) -> list[list[Any]]:
    """Of (n, K) the first so many of each row."""
    return [row[:count] for row, count in zip(slots.tolist(), used, strict=True)]


class _Shards:
    """Finished responses in a folder, one file per batch, each renamed into place when it is complete.

    A half-written one is deleted, which `note` is told: its responses are made again, in other batches.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]):
        self.folder = folder
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}
        self.seconds = 0.0
        paths = sorted(folder.glob("[0-9]*.json"))
        for path in paths:
            if (shard := read_part(path, {"seconds", "rows"}, note)) is None:
                path.unlink()
            else:
                self._keep(shard)
        self._next = int(paths[-1].stem) + 1 if paths else 0

    def _keep(self, shard: dict[str, Any]) -> None:
        self.rows.update({(row["row"], row["sample"]): row for row in shard["rows"]})
        self.seconds += shard["seconds"]

    def add(self, rows: list[dict[str, Any]], seconds: float) -> None:
        shard = {"seconds": seconds, "rows": rows}
        write_json(self.folder / f"{self._next:08d}.json", shard)
        self._next += 1
        self._keep(shard)


def _row(job: Job, response: dict[str, Any], chat: bool, digest: str) -> dict[str, Any]:
    """A row of the output."""
    question, *_ = job
    ids = {"prompt_tokens": len(question.ids), "prompt_ids": list(question.ids), "tokenizer_hash": digest}
    return _carried(question.prompt, chat) | response | ids


def _carried(given: Prompt, chat: bool) -> dict[str, Any]:
    """What a row has from the input. A text prompt is the user's message where there is a chat template."""
    prompt: Any = given.prompt
    if not isinstance(prompt, str):
        prompt = list(prompt)
    elif chat:
        prompt = [{"role": "user", "content": prompt}]
    carried = {"prompt": prompt, "answer": given.answer, "data_source": given.data_source}
    if given.tools is not None:
        carried["tools"] = json.dumps(given.tools)
    return carried


def _counts(rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    tokens = sum(row["response_tokens"] for row in rows)
    return {
        "prompts": len({row["row"] for row in rows}),
        "responses": len(rows),
        "truncated": sum(row["truncated"] for row in rows),
        "empty": sum(not row["response"].strip() for row in rows),
        "without_ground_truth": sum(row["answer"] is None for row in rows),
        "response_tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / max(seconds, 1e-3), 1),
    }


def _made_from(config: RolloutConfig) -> dict[str, Any]:
    """What decides the responses: an interrupted run goes on only with the same."""
    of_reward = {}
    if config.reward_model is not None:
        reward_folder = local_folder(config.reward_model)
        info = read_info(reward_folder)
        check_own_weights(reward_folder, info)
        of_reward["rm_hash"] = info.weights_hash
    digest, folder = hashlib.sha256(), local_folder(config.model)
    for name in TOKENIZER_FILES:
        if (path := folder / name).is_file():
            with reading(path, "cannot be read", "look at the model's folder"):
                digest.update(path.read_bytes())
    return (
        settings_of(config)
        | kind_of(config.engine)
        | {
            "input_hash": file_hash(config.input),
            "model_hash": weights_hash(config.model),
            "tokenizer_files_hash": digest.hexdigest(),
        }
        | of_reward
    )


def main(config: RolloutConfig) -> None:
    """Console entry: samples and says what came out."""
    summary = roll_out(config)
    print(
        f"{config.output}: {summary['responses']} responses to {summary['prompts']} prompts, "
        f"{summary['truncated']} truncated, {summary['response_tokens']} tokens "
        f"({summary['tokens_per_second']:,.0f} a second)"
    )
