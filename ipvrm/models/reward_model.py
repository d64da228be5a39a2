"""A reward model: the model, its reference where it has one, and what turns its tokens' rewards into scores.

l_t = log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t),   V_t = beta * sum_{i<=t} l_i   (Eq. 5)

A Q-RM has Z_t in the place of l_t, and EndoRM r_t, discounted from token to token; see `token_rewards`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipvrm.data.batches import Batch, collate, length_sorted_microbatches
from ipvrm.data.chat import Chat
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row
from ipvrm.data.steps import (
    STEP_FORMAT,
    STEP_SEPARATOR,
    first_error,
    render_steps,
    step_of_token,
    step_scores,
    token_pieces,
)
from ipvrm.data.steps import step_ends as last_token_of_steps
from ipvrm.errors import IpvrmError
from ipvrm.models.card import REWARD_TAGS, write_card
from ipvrm.models.causal_lm import (
    candidate_logprobs,
    least_positions,
    load_model,
    load_tokenizer,
    local_folder,
    relative_to,
    response_logprobs,
    save_model,
    template_hash,
    weights_hash,
)
from ipvrm.models.folder import VALUE_HEAD
from ipvrm.models.reference import not_finite
from ipvrm.models.server import ENGINE_TIMEOUT, Server
from ipvrm.models.token_rewards import TokenValues, endo_rewards, load_value_head, save_value_head
from ipvrm.run_folder import move_into, read_json, save_folder, versions, write_json

CONFIG_NAME = "ipvrm_config.json"
BATCH_TOKENS = 8192
ENDO_RM = "endo_rm"
ENDO_DISCOUNT = 0.95
OWN_LOGITS = (
    "; or score with the model's own logits: --objective endo_rm of `ipvrm score` and `ipvrm eval`, "
    "RewardModel.from_causal_lm in Python"
)
TYPES = dict.fromkeys(
    ("objective", "reference", "reference_given", "reference_hash", "template_hash", "weights_hash"), str
) | {"chat_template_kwargs": dict}


@dataclass(frozen=True)
class RewardModelInfo:
    """Contents of `ipvrm_config.json`: what a score depends on besides the weights.

    `reference` is a Hub name, or a path relative to the folder that holds the file; `reference_given` is
    what the user wrote. `temperature` is the one that the log-probs of model and reference were taken at.
    `adapter`, of a model trained with LoRA: the folder of the adapter alone beside the merged weights, its
    rank and scale, and the model it belongs on with that model's hash.
    `weights_hash` is of the model beside the file; `write_info` fills it in.
    A Q-RM has no reference: its three entries are empty. `discount` is EndoRM's, 1 for every other.
    """

    objective: str
    beta: float
    margin: float | None
    reference: str
    reference_given: str
    reference_hash: str
    template_hash: str
    versions: dict[str, str]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    adapter: dict[str, Any] | None = None
    weights_hash: str = ""
    discount: float = 1.0


@dataclass(frozen=True)
class TokenCandidates:
    """K tokens in the place of each of T response tokens; unused slots hold id -1, log-probs -inf."""

    ids: Tensor  # (T, K) int64
    logprobs: Tensor  # (T, K) fp32, under the model
    ref_logprobs: Tensor  # (T, K) fp32, under the reference

    def td(self, beta: float) -> Tensor:
        """(T, K) beta * (log pi_phi - log pi_ref); 0 at an unused slot."""
        return beta * (self.logprobs - self.ref_logprobs).masked_fill(self.ids < 0, 0.0)


@dataclass(frozen=True)
class TokenLogprobs:
    """Of the T tokens of a response, on the CPU."""

    logprobs: Tensor  # (T,) fp32, log pi_phi
    ref_logprobs: Tensor  # (T,) fp32, log pi_ref
    candidates: TokenCandidates | None = None


@dataclass(frozen=True)
class Solution:
    """One solution of T response tokens (end of turn included) and S steps, as tokens."""

    response: Response
    tokens: tuple[str, ...]  # T, `token_pieces`
    steps_of_token: Tensor  # (T,) int64, -1 outside every step
    num_steps: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Those of the response."""
        return self.response.input_ids[self.response.prompt_length :]


@dataclass(frozen=True)
class SolutionTokens:
    """One solution of T response tokens (end of turn included) and S steps, with log-probs."""

    log_ratio: Tensor  # (T,) fp32, l_t, or what stands in its place
    steps_of_token: Tensor  # (T,) int64, -1 outside every step
    num_steps: int
    num_tokens: int  # prompt and response
    solution: Solution
    of_tokens: TokenLogprobs | None  # of a reward model with a reference


@dataclass(frozen=True)
class Score:
    """One solution, T response tokens (end of turn included), S steps; tensors fp32 on the CPU.

    `step_ends` (S,) int64 is the position of each step's last token within the response, `steps_of_token`
    (T,) int64 the step in which each token ends, -1 outside every step; `tokens` are their `token_pieces`.
    `first_error` is the first step whose sigmoid(score) is below the threshold, -1 for none.
    Under EndoRM `td` is discount^t r_t, t from 0 at the response's first token, while the step scores (step,
    mean_diff) count t from 0 in each step, so the `td` of a later step do not sum to its score; a (`scale`)
    and `discount` are arguments of `RewardModel.from_causal_lm`, and the commands take 1 and 0.95.
    """

    prefix_values: Tensor  # (T,) V_t, after token t
    td: Tensor  # (T,) beta * l_t (EndoRM: discounted), V_t - V_{t-1}
    mean_values: Tensor  # (T,) V_t / t
    step_scores: Tensor  # (S,)
    step_ends: Tensor  # (S,)
    first_error: int
    token_ids: tuple[int, ...]  # T
    tokens: tuple[str, ...]  # T
    steps_of_token: Tensor  # (T,)
    logprobs: Tensor | None  # (T,) log pi_phi of each token; None without a reference
    ref_logprobs: Tensor | None  # (T,) log pi_ref
    candidates: TokenCandidates | None  # where they are asked for
    candidate_td: Tensor | None  # (T, K), 0 at an unused slot

    def by_token(self) -> dict[str, list[Any]]:
        """What is known of each token, as columns of T plain values; `candidates` only where asked for."""
        columns: dict[str, list[Any]] = {
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "steps": self.steps_of_token.tolist(),
            "td": self.td.tolist(),
        }
        if self.logprobs is not None and self.ref_logprobs is not None:
            columns |= {"logprobs": self.logprobs.tolist(), "ref_logprobs": self.ref_logprobs.tolist()}
        if self.candidates is not None and self.candidate_td is not None:
            found = (self.candidates.ids, self.candidates.ref_logprobs, self.candidate_td)
            names = ("id", "ref_logprob", "td")
            columns["candidates"] = [
                [dict(zip(names, slot, strict=True)) for slot in zip(*token, strict=True) if slot[0] >= 0]
                for token in zip(*(column.tolist() for column in found), strict=True)
            ]
        return columns


class RewardModel:
    """A reward model with its reference; both are causal LMs over the same vocabulary, both in memory or both
    served.

    Args:
        reference: None for a Q-RM, which has `value_head`, and for EndoRM.
    """

    def __init__(
        self,
        model: nn.Module | Server,
        reference: nn.Module | Server | None,
        tokenizer: Any,
        info: RewardModelInfo,
        value_head: nn.Linear | None = None,
    ):
        self.model = model
        self.reference = reference
        self.tokenizer = tokenizer
        self.info = info
        self.value_head = value_head
        self.chat = Chat(tokenizer, info.chat_template_kwargs)
        self.max_positions: int | None = None
        self.vocab_size: int | None = None  # a server refuses ids that it does not have
        if isinstance(model, Server) or isinstance(reference, Server):
            self._check_served(model, reference)
            return
        models = [m for m in (model, reference) if m is not None]
        self.max_positions = least_positions(*models)
        sizes = [cast(Any, m).get_input_embeddings().weight.shape[0] for m in models]
        if len({*sizes}) > 1:
            raise IpvrmError(
                f"model and reference must share one vocabulary; they have {sizes[0]} and {sizes[1]} tokens"
            )
        self.vocab_size = sizes[0]

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on this machine's CPU."""
        return not isinstance(self.model, Server) and next(self.model.parameters()).device.type == "cpu"

    def _check_served(self, model: nn.Module | Server, reference: nn.Module | Server | None) -> None:
        if not isinstance(model, Server) or not isinstance(reference, Server):
            raise IpvrmError("a reward model and its reference must both be served, or neither")
        if self.info.temperature != 1:
            raise IpvrmError(
                f"{model.url}: the log-probs of a server's prompts are at temperature 1, and this reward "
                f"model was trained at {self.info.temperature:g}; score it in memory (--engine transformers)"
            )
        limits = [m.max_positions - 1 for m in (model, reference) if m.max_positions]  # a token is generated
        self.max_positions = min(limits, default=None)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        reference: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        servers: Sequence[str] = (),
        timeout: float = ENGINE_TIMEOUT,
        objective: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> "RewardModel":
        """Loads a run folder and the reference that its `ipvrm_config.json` names.

        Args:
            objective: endo_rm takes any causal LM as it is, `from_causal_lm`; None is what the folder says.
            reference: where the reference is if it has moved (folder or Hub name); its weights must be the
                recorded ones.
            device: default is the first accelerator, else the CPU.
            servers: addresses of two servers that give `prompt_logprobs` (vLLM), of the model and of its
                reference, which are then not loaded; `device` and `dtype` are theirs.
            timeout: most seconds to wait for one of their answers.
            chat_template_kwargs: variables of the chat template, of endo_rm; a reward model has those that it
                was trained with, and takes no others.

        Raises:
            IpvrmError: no `ipvrm_config.json`, other weights than it records for model or reference, another
                template, other variables of it, or servers of other models.
        """
        if objective is not None:
            if objective != ENDO_RM or reference is not None or servers:
                raise IpvrmError(
                    f"objective {objective!r}: a reward model's own is in its folder; here it can be endo_rm "
                    "alone, which has no reference and is in memory"
                )
            return cls.from_causal_lm(
                folder, device=device, dtype=dtype, chat_template_kwargs=chat_template_kwargs
            )
        given, folder = folder, local_folder(folder)
        info = read_info(folder, "" if servers else OWN_LOGITS)
        check_own_weights(folder, info)
        if chat_template_kwargs is not None and dict(chat_template_kwargs) != info.chat_template_kwargs:
            raise IpvrmError(
                f"{folder}: this reward model was trained with --chat_template_kwargs "
                f"'{json.dumps(info.chat_template_kwargs)}', and reads no other prompts; "
                f"got '{json.dumps(dict(chat_template_kwargs))}'. Leave them out: they are stored with it"
            )
        has_reference = info.objective != "q_rm"
        if reference is not None and not has_reference:
            raise IpvrmError(f"{folder}: a q_rm reward model has no reference; leave it out")
        reference_folder = find_reference(folder, info, reference) if has_reference else None
        tokenizer = load_tokenizer(folder)
        found = template_hash(tokenizer)
        if found != info.template_hash:
            raise IpvrmError(
                f"{folder}: the chat template is not the one this reward model was trained with "
                f"(sha256 {found[:12]}, recorded {info.template_hash[:12]}); restore the tokenizer files"
            )
        if servers:
            if reference_folder is None:
                raise IpvrmError(f"{folder}: a server has no value head; score a q_rm reward model in memory")
            of_model, of_reference = servers
            names = [str(place) for place in (reference, info.reference, info.reference_given) if place]
            return cls(
                Server(of_model, folder, timeout, also=[str(given)]),
                Server(of_reference, reference_folder, timeout, also=names),
                tokenizer,
                info,
            )
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        model = load_model(folder, dtype, device)
        if reference_folder is None:
            return cls(model, None, tokenizer, info, load_value_head(folder, model))
        return cls(model, load_model(reference_folder, dtype, device), tokenizer, info)

    @classmethod
    def from_causal_lm(
        cls,
        name: str | Path,
        *,
        scale: float = 1.0,
        discount: float = ENDO_DISCOUNT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> "RewardModel":
        """EndoRM: the reward that any causal LM has without training (`endo_rewards`).

        Args:
            name: a folder or Hub name. scale: a > 0 of its formula. discount: in [0, 1], of a token for each
                one before it. chat_template_kwargs: variables of the chat template.

        Raises:
            IpvrmError: a number out of range, no causal LM, or a variable that its template does not read.
        """
        if not 0 < scale < math.inf or not 0 <= discount <= 1:
            raise IpvrmError(
                f"endo_rm: scale must be positive and discount in [0, 1]; got {scale} and {discount}"
            )
        folder = local_folder(name)
        tokenizer = load_tokenizer(folder)
        info = RewardModelInfo(
            objective=ENDO_RM,
            beta=1.0,
            margin=None,
            reference="",
            reference_given="",
            reference_hash="",
            template_hash=template_hash(tokenizer),
            versions=versions(),
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            temperature=scale,
            weights_hash=weights_hash(folder),
            discount=discount,
        )
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        return cls(load_model(folder, dtype, device), None, tokenizer, info)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model, tokenizer and `ipvrm_config.json`; the reference is named, not copied."""
        if isinstance(self.model, Server):
            raise IpvrmError(f"{self.model.url}: a served reward model cannot be saved; copy its folder")
        if self.info.objective == ENDO_RM:
            raise IpvrmError("endo_rm is a causal LM as it is: there is nothing of its own to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        info = replace(self.info, versions=versions(), adapter=None)  # the adapter alone is not loaded
        # The two entries are the same for a Hub name, which stays; a path is seen from the new folder.
        known = self.reference is not None
        if known and (info.reference != info.reference_given or Path(info.reference).is_dir()):
            loaded_from = getattr(getattr(self.reference, "config", None), "_name_or_path", "")
            entries: dict[str, Any] = {**reference_entries(loaded_from or info.reference_given, folder)}
            info = replace(info, **entries)
        whole = folder / ".saving"
        with save_folder(whole) as temporary:
            save_model(self.model, temporary)
            if self.value_head is not None:
                save_value_head(self.value_head, temporary)
            self.tokenizer.save_pretrained(temporary)
            write_info(temporary, info)
        move_into(whole, folder, last=CONFIG_NAME)

    def token_log_ratios(
        self, responses: Sequence[Response], batch_tokens: int = BATCH_TOKENS, *, ended: bool = True
    ) -> list[Tensor]:
        """l_t of every response, of a Q-RM Z_t and of EndoRM r_t without its discount: a list of (T_b,) fp32
        tensors on the CPU, in the order given.

        Args:
            batch_tokens: most tokens of a padded micro-batch (a longer response stands alone).
            ended: as in `endo_rewards`.

        Raises:
            IpvrmError: one is infinite or not a number, with the response's `source` and the token; or a
                response has more tokens, with its prompt, than the models have positions.
        """
        self._refuse_too_long(responses)
        if self.reference is not None:
            return [p.logprobs - p.ref_logprobs for p in self.token_logprobs(responses, batch_tokens)]
        model = cast(nn.Module, self.model)
        device, result = next(model.parameters()).device, [torch.empty(0)] * len(responses)
        lengths = [len(r.input_ids) for r in responses]
        for indices in length_sorted_microbatches(lengths, max_tokens=batch_tokens):
            batch = collate([responses[i] for i in indices]).to(device)
            with torch.no_grad():
                if self.value_head is not None:
                    rewards = TokenValues(model, self.value_head)(batch)
                else:
                    rewards = endo_rewards(model, batch, self.info.temperature, ended)
            for index, part in zip(
                indices, rewards.cpu().split([responses[i].length for i in indices]), strict=True
            ):
                result[index] = part.clone()
        _refuse_not_finite(responses, result, "reward")
        return result

    def _refuse_too_long(self, responses: Sequence[Response]) -> None:
        for response in responses:
            length, limit = len(response.input_ids), self.max_positions
            if limit is not None and length > limit:
                raise IpvrmError(
                    f"{response.source or 'a response'}: its {length} tokens are more than the {limit} "
                    "positions of the models in use"
                )

    @torch.no_grad()
    def token_logprobs(
        self,
        responses: Sequence[Response],
        batch_tokens: int = BATCH_TOKENS,
        candidates: float | Sequence[Tensor] | None = None,
    ) -> list[TokenLogprobs]:
        """Log-probs of every response's tokens under model and reference, one forward of each, in the order
        given.

        Args:
            batch_tokens: as in `token_log_ratios`.
            candidates: also those of other tokens in the place of each, from the same two forwards: all with
                p >= this under the reference, best first; or their ids, a (T_b, K_b) int64 for each response.

        Raises:
            IpvrmError: a reward model without a reference, candidates of a served one, and what
                `token_log_ratios` refuses.
        """
        if self.reference is None:
            raise IpvrmError(
                f"objective {self.info.objective!r} has token rewards, and no log-probs of a model and its "
                "reference"
            )
        self._refuse_too_long(responses)
        if isinstance(self.model, Server) or isinstance(self.reference, Server):
            if candidates is not None:
                raise IpvrmError(
                    "candidates need the reward model in memory: a server gives those of its own choice"
                )
            of_both = [cast(Server, m).logprobs(responses) for m in (self.model, self.reference)]
            return _checked(responses, [TokenLogprobs(a, b, None) for a, b in zip(*of_both, strict=True)])
        models, temperature = (self.model, self.reference), self.info.temperature
        device = next(self.model.parameters()).device
        found: dict[int, TokenLogprobs] = {}
        lengths = [len(r.input_ids) for r in responses]
        for indices in length_sorted_microbatches(lengths, max_tokens=batch_tokens):
            batch = collate([responses[i] for i in indices]).to(device)
            if candidates is None:
                columns = tuple(response_logprobs(m, batch, temperature) for m in models)
            elif isinstance(candidates, float | int):
                columns = _with_candidates(*models, batch, candidates, temperature)
            else:
                widest = max(candidates[i].shape[1] for i in indices)
                wanted = [
                    nn.functional.pad(ids, (0, widest - ids.shape[1]), value=-1)
                    for ids in (candidates[i] for i in indices)
                ]
                columns = _with_candidates(*models, batch, torch.cat(wanted).to(device), temperature)
            sizes = [responses[i].length for i in indices]
            parts = (column.cpu().split(sizes) for column in columns)
            for index, own, ref, *others in zip(indices, *parts, strict=True):
                of_others = TokenCandidates(*(part.clone() for part in others)) if others else None
                found[index] = TokenLogprobs(own.clone(), ref.clone(), of_others)
        return _checked(responses, [found[i] for i in range(len(responses))])

    def solutions(
        self,
        items: Sequence[tuple[str, Sequence[str]]],
        *,
        step_format: str = STEP_FORMAT,
        step_separator: str = STEP_SEPARATOR,
        max_length: int | None = None,
    ) -> list[Solution | None]:
        """Solutions as tokens, in the order given.

        Args:
            items: (problem, steps) pairs.
            step_format, step_separator: how the steps are written as the assistant's turn (`render_steps`).
            max_length: most tokens of prompt and response; None stands for a longer solution, never cut.

        Raises:
            IpvrmError: a bad `step_format`, or a solution without steps, that the chat template refuses or
                that has more tokens than the models have positions; the message holds its position, counted
                from 1.
        """
        rendered = [render_steps(steps, step_format, step_separator) for _, steps in items]
        rows = [
            Row(f"item:{number}", problem, text)
            for number, ((problem, _), (text, _)) in enumerate(zip(items, rendered, strict=True), 1)
        ]
        responses = tokenize(
            rows, self.chat, max_length=max_length, max_positions=self.max_positions, with_offsets=True
        ).responses
        found: list[Solution | None] = [None] * len(items)
        for response in responses:
            index = int(response.source.rpartition(":")[2]) - 1
            text, ends = rendered[index]
            offsets, ids = response.offsets or (), response.input_ids[response.prompt_length :]
            pieces = token_pieces(text, offsets, self.tokenizer.convert_ids_to_tokens(ids))
            found[index] = Solution(response, pieces, step_of_token(offsets, ends), len(ends))
        return found

    def solution_log_ratios(
        self,
        items: Sequence[tuple[str, Sequence[str]]],
        *,
        batch_tokens: int = BATCH_TOKENS,
        min_prob: float | None = None,
        **options: Any,
    ) -> list[SolutionTokens | None]:
        """l_t and step of every token of many solutions, in the order given; one forward of each model.

        Args:
            items, options: as in `solutions`.
            batch_tokens: most tokens of a padded micro-batch.
            min_prob: with the candidates of each token, all with p >= this under the reference.

        Raises:
            IpvrmError: from `solutions`; a token whose l_t is infinite or not a number, with the position of
                its solution.
        """
        solutions = self.solutions(items, **options)
        responses = [s.response for s in solutions if s is not None]
        rewards: Iterator[Tensor]
        logprobs: Iterator[TokenLogprobs | None] = repeat(None)
        if self.reference is None and min_prob is None:
            rewards = iter(self.token_log_ratios(responses, batch_tokens))
        else:
            of_both = self.token_logprobs(responses, batch_tokens, min_prob)
            rewards, logprobs = iter([p.logprobs - p.ref_logprobs for p in of_both]), iter(of_both)
        found: list[SolutionTokens | None] = []
        for solution in solutions:
            if solution is None:
                found.append(None)
                continue
            found.append(
                SolutionTokens(
                    log_ratio=next(rewards),
                    steps_of_token=solution.steps_of_token,
                    num_steps=solution.num_steps,
                    num_tokens=len(solution.response.input_ids),
                    solution=solution,
                    of_tokens=next(logprobs),
                )
            )
        return found

    def score(self, problem: str, steps: Sequence[str], **options: Any) -> Score:
        """Scores the steps of one solution; `options` are those of `score_many`."""
        return self.score_many([(problem, steps)], **options)[0]

    def score_many(
        self,
        items: Sequence[tuple[str, Sequence[str]]],
        *,
        step_format: str = STEP_FORMAT,
        step_separator: str = STEP_SEPARATOR,
        rule: str = "step",
        threshold: float = 0.5,
        batch_tokens: int = BATCH_TOKENS,
        min_prob: float | None = None,
    ) -> list[Score]:
        """Scores the steps of many solutions, one forward of each model per micro-batch.

        Args:
            items, step_format, step_separator, batch_tokens, min_prob: as in `solution_log_ratios`.
            rule: step | prefix | mean | mean_diff (`step_scores`).
            threshold: on sigmoid(score), for `first_error`.

        Raises:
            IpvrmError: from `solution_log_ratios`.
            ValueError: an unknown rule, or a threshold outside [0, 1].
        """
        solutions = self.solution_log_ratios(
            items,
            step_format=step_format,
            step_separator=step_separator,
            batch_tokens=batch_tokens,
            min_prob=min_prob,
        )
        return [self._score(s, rule, threshold) for s in solutions if s is not None]  # no length limit: all

    def _score(self, solution: SolutionTokens, rule: str, threshold: float) -> Score:
        from ipvrm_kernels import prefix_values

        log_ratio, known = solution.log_ratio, solution.of_tokens
        beta, discount = self.info.beta, self.info.discount
        scores = step_scores(log_ratio, solution.steps_of_token, beta, rule, solution.num_steps, discount)
        log_ratio = log_ratio * discount ** torch.arange(len(log_ratio))
        values = prefix_values(log_ratio, torch.tensor([0, len(log_ratio)], dtype=torch.int32), beta=beta)
        return Score(
            prefix_values=values.value,
            td=values.td,
            mean_values=values.mean_value,
            step_scores=scores,
            step_ends=last_token_of_steps(solution.steps_of_token, solution.num_steps),
            first_error=first_error(scores, threshold),
            token_ids=solution.solution.token_ids,
            tokens=solution.solution.tokens,
            steps_of_token=solution.steps_of_token,
            logprobs=None if known is None else known.logprobs,
            ref_logprobs=None if known is None else known.ref_logprobs,
            candidates=(candidates := None if known is None else known.candidates),
            candidate_td=None if candidates is None else candidates.td(beta),
        )


def _refuse_not_finite(responses: Sequence[Response], values: Sequence[Tensor], what: str) -> None:
    """Raises IpvrmError, with the response and the token, unless all `values`, a (T_b,) each, are finite."""
    if responses and (place := not_finite(torch.cat([*values]), responses, what)) is not None:
        raise IpvrmError(f"{place}; a score of it means nothing")


def _checked(responses: Sequence[Response], found: list[TokenLogprobs]) -> list[TokenLogprobs]:
    """`found`. Raises IpvrmError unless all of its log-probs are finite, those of used candidates too."""
    _refuse_not_finite(responses, [f.logprobs for f in found], "log-probability under the model")
    _refuse_not_finite(responses, [f.ref_logprobs for f in found], "log-probability under the reference")
    others = [f.candidates for f in found if f.candidates is not None]
    if others:
        own = [c.logprobs.masked_fill(c.ids < 0, 0.0).sum(-1) for c in others]  # (T_b,)
        ref = [c.ref_logprobs.masked_fill(c.ids < 0, 0.0).sum(-1) for c in others]
        of_one = "of a candidate in the place"
        _refuse_not_finite(responses, own, f"log-probability under the model {of_one}")
        _refuse_not_finite(responses, ref, f"log-probability under the reference {of_one}")
    return found


def _with_candidates(
    model: nn.Module, reference: nn.Module, batch: Batch, wanted: float | Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """(N,) of the response tokens under model and reference; (N, K) of the candidates: ids, and log-probs
    under both."""
    ref = candidate_logprobs(reference, batch, wanted, temperature)
    own = candidate_logprobs(model, batch, ref.ids, temperature)
    return own.logprobs, ref.logprobs, ref.ids, own.candidate_logprobs, ref.candidate_logprobs


# -------------------------------------------------------------------------------------- ipvrm_config.json


def reference_entries(
    reference: str | Path, folder: str | Path, known_hash: str | None = None
) -> dict[str, Any]:
    """The entries of `RewardModelInfo` that name `reference` as seen from run folder `folder`."""
    local = local_folder(reference)
    return {
        "reference": relative_to(local, folder) if Path(reference).is_dir() else str(reference),
        "reference_given": str(reference),
        "reference_hash": known_hash or weights_hash(local),
    }


def write_info(
    folder: str | Path,
    info: RewardModelInfo,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes `ipvrm_config.json` into `folder`, whose weights it is for and which are there by now, and the
    model card; `data` and `metrics` of the training stand in that."""
    write_json(Path(folder) / CONFIG_NAME, asdict(replace(info, weights_hash=weights_hash(folder))))
    of_head = info.objective == "q_rm"
    implicit = (
        "A reward model that judges every prefix of a response by its log-ratio to a reference: "
        "V_t = beta * sum of (log pi - log pi_ref) over the tokens up to t. It needs that reference."
    )
    explicit = (
        "A reward model that judges every prefix of a response by a value head on the body's states: "
        f"V_t = beta * sum of Z over the tokens up to t. The head is in {VALUE_HEAD}."
    )
    write_card(
        Path(folder),
        name="Q-RM" if of_head else "Implicit reward model",
        summary=explicit if of_head else implicit,
        usage='from ipvrm import RewardModel\n\nrm = RewardModel.from_pretrained("this folder")\n'
        "score = rm.score(problem, steps)  # .step_scores, .td, .prefix_values, .first_error",
        tags=REWARD_TAGS,
        base=info.reference_given or None,
        settings={
            "objective": info.objective,
            "beta": info.beta,
            "margin": info.margin,
            "temperature": info.temperature,
            "LoRA rank": (info.adapter or {}).get("lora_r"),
            "reference, sha256": info.reference_hash[:16],
            "chat template, sha256": info.template_hash[:16],
            **{f"version of {name}": version for name, version in info.versions.items()},
        },
        data=data,
        metrics=metrics,
    )


def read_info(folder: str | Path, or_else: str = "") -> RewardModelInfo:
    """Reads `ipvrm_config.json` of `folder`. Raises IpvrmError when it is missing or incomplete.

    Args:
        or_else: what else a user without the file can do, behind the advice to train a reward model.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise IpvrmError(
            f"{folder}: no {CONFIG_NAME}; this is not a folder that `ipvrm train-rm` or save_pretrained "
            f"wrote. Train a reward model with `ipvrm train-rm`{or_else}"
        )
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise IpvrmError(f"{path}: must hold an object; got {type(stored).__name__}")
    needed = [
        f.name for f in fields(RewardModelInfo) if f.default is MISSING and f.default_factory is MISSING
    ]
    needed.append("weights_hash")
    names = [f.name for f in fields(RewardModelInfo) if f.name in stored or f.name in needed]
    missing = [name for name in names if name not in stored]
    if missing:
        raise IpvrmError(
            f"{path}: entries are missing: {', '.join(missing)}; another version of ipvrm wrote it, or it is "
            "damaged"
        )
    for name, kind in TYPES.items():
        if not isinstance(stored.get(name, kind()), kind):
            raise IpvrmError(f"{path}: {name} must be {kind.__name__}; got {stored[name]!r:.40}")
    info = RewardModelInfo(**{name: stored[name] for name in names})
    if not isinstance(info.beta, int | float) or not math.isfinite(info.beta) or info.beta <= 0:
        raise IpvrmError(f"{path}: beta must be a positive number; got {info.beta!r}")
    if not isinstance(info.temperature, int | float) or not 0 < info.temperature < math.inf:
        raise IpvrmError(f"{path}: temperature must be a positive number; got {info.temperature!r}")
    return info


def check_own_weights(folder: str | Path, info: RewardModelInfo) -> None:
    """Raises IpvrmError unless the model in `folder` is the one that `info` was written for."""
    if (own := weights_hash(folder)) != info.weights_hash:
        raise IpvrmError(
            f"{folder}: its weights or config are not those that {CONFIG_NAME} was written for (sha256 "
            f"{own[:12]}, recorded {info.weights_hash[:12]}); copy the folder again from where it was made"
        )


def find_reference(folder: Path, info: RewardModelInfo, given: str | Path | None = None) -> Path:
    """Folder of the reference of the reward model in `folder`, its weights compared with the recorded hash.

    Raises:
        IpvrmError: it is not where it was, or its weights are others; the message says what to pass.
    """
    beside = (folder / info.reference).absolute()  # an absolute path is never taken for a Hub name
    places = [given] if given is not None else [beside, info.reference, info.reference_given]
    tried = []
    for place in dict.fromkeys(map(str, places)):
        try:
            local = local_folder(place)
        except IpvrmError:
            tried.append(f"{place} (not there)")
            continue
        if (found := weights_hash(local)) == info.reference_hash:
            return local
        tried.append(f"{place} (other weights or config, sha256 {found[:12]})")
    raise IpvrmError(
        f"{folder}: its reference model (sha256 {info.reference_hash[:12]}) was not found; "
        f"tried {', '.join(tried)}. Log-ratios against another reference are meaningless: "
        "pass the right one with reference=... (--reference)"
    )
