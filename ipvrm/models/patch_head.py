"""One patched head for other people's trainers: a causal LM whose forward gives log-probabilities, never
logits.

`model(input_ids, labels=...)` runs the transformer body, and then the head on the rows that have a label
alone, in one pass over the vocabulary. Without labels the forward is the model's own, so that `generate` is
what it was.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ipvrm.errors import IpvrmError
from ipvrm.models.causal_lm import check_head, head, head_module, transformer_body
from ipvrm_kernels import gathered_weight, linear_candidates, linear_logprobs

IGNORED = -100  # of labels, as transformers has it
STATE = "_ipvrm_head"  # the attribute of a patched model
FIXED = {"shift_labels": None, "ignore_index": IGNORED, "logits_to_keep": 0, "return_dict": True}
OWN = {"return_entropy": False, "candidate_ids": None, "min_prob": None, "top_k": None, "temperature": 1.0}


@dataclass
class HeadOutput(ModelOutput):
    """Of B sequences of T tokens; position t is of token t + 1. fp32 (fp64 of an fp64 model), in nats."""

    loss: Tensor | None = None
    logprobs: Tensor | None = None  # (B, T-1) of the labels, 0 where there is none
    entropy: Tensor | None = None  # (B, T-1), 0 where there is no label
    candidate_ids: Tensor | None = None  # (B, T-1, K) int64, -1 at unused slots
    candidate_logprobs: Tensor | None = None  # (B, T-1, K), -inf there
    logits: Tensor | None = None  # always None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None
    aux_loss: Tensor | None = None  # load balancing of a mixture of experts, where it is asked for


@dataclass(frozen=True)
class _State:
    transform: dict[str, Any]  # logit_scale and softcap
    names: tuple[str, ...]  # of the parameters of the model's own forward
    balance: Callable[..., Tensor] | None  # load_balancing_loss_func of the model's own module
    earlier: Callable[..., Any] | None  # an instance's own forward, set before the patch


def patch_head(model: nn.Module) -> None:
    """Gives a Hugging Face causal LM the fused head: `model(..., labels=labels)` then returns a `HeadOutput`.

    `labels` (B, T) are aligned with `input_ids` and shifted inside, -100 is no label; give them by keyword.
    `.loss` is transformers': the mean of -log p over the labels, or their sum over `num_items_in_batch`,
    with the load-balancing loss of a mixture of experts where the config asks for it; it is 0 with a
    gradient where there is no label (transformers: NaN). `.logits` is None. Further keywords of the forward:

        return_entropy: gives `.entropy`.
        candidate_ids (B, T-1, K): gives `.candidate_logprobs` of these ids (negative: none) with gradients,
        from the
            same pass as the labels'.
        min_prob, top_k: give `.candidate_ids` and `.candidate_logprobs` as `linear_candidates` finds them;
            without gradients, so under `torch.no_grad()` alone.
        temperature: of all of these, the loss too.

    The logit transform (scale, softcap, bias) is read from the model and compared with its own logits of two
    tokens. `save_pretrained`, `state_dict` and `generate` are as before. A PEFT model's base is patched. A
    head that is an FSDP2 unit of its own is gathered (`gathered_weight`); patch before sharding. On a GPU
    the labels are counted, which waits for the device once a call.

    Raises:
        IpvrmError: a head that ipvrm does not know (an adapter or quantisation on it, an unknown transform),
            that is sharded already, another loss than transformers' for causal LMs, or a model that is
            patched already.
    """
    model = _base(model)
    name = type(model).__name__
    if STATE in vars(model):
        raise IpvrmError(f"patch_head: {name} is patched already")
    if _loss_function(model) != "ForCausalLMLoss":
        raise IpvrmError(
            f"patch_head: {name} has the loss {_loss_function(model)}; only transformers' "
            f"ForCausalLMLoss is known"
        )
    parts = head(model)
    training = {module: module.training for module in model.modules()}
    model.eval()  # two passes with dropout would differ
    try:
        check_head(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    parameters = inspect.signature(model.forward).parameters
    state = _State(
        transform={"logit_scale": parts.logit_scale, "softcap": parts.softcap},
        names=tuple(parameters),
        balance=getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None),
        earlier=cast(Callable[..., Any] | None, vars(model).get("forward")),
    )
    setattr(model, STATE, state)
    cast(Any, model).forward = MethodType(_with_signature(type(model).forward), model)


def unpatch_head(model: nn.Module) -> None:
    """The forward from before `patch_head`.

    Raises:
        IpvrmError: the model is not patched, or something else has wrapped its forward since.
    """
    model = _base(model)
    if STATE not in vars(model):
        raise IpvrmError(f"unpatch_head: {type(model).__name__} is not patched")
    if not hasattr(getattr(vars(model).get("forward"), "__func__", None), STATE):
        raise IpvrmError(
            f"unpatch_head: the forward of {type(model).__name__} has been wrapped since patch_head; "
            f"unwrap it "
            "first (accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    state = vars(model).pop(STATE)
    del vars(model)["forward"]
    if state.earlier is not None:
        cast(Any, model).forward = state.earlier


def _with_signature(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_forward` under the signature of the model's own: `generate` checks its arguments against it, and
    transformers' Trainer picks the columns of a data set by it."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    setattr(forward, STATE, True)
    return forward


def _base(model: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(Any, model).get_base_model()) if hasattr(model, "get_base_model") else model


def _loss_function(model: nn.Module) -> str:
    return str(getattr(getattr(model, "loss_function", None), "__name__", None))


def _forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    state: _State = vars(self)[STATE]
    if labels is None:
        asked = [name for name in OWN if name in kwargs]
        if asked:
            raise IpvrmError(f"patched head: {', '.join(asked)} need labels")
        inner = state.earlier or MethodType(type(self).forward, self)
        return inner(*args, **kwargs)
    for name, default in FIXED.items():
        value = kwargs.pop(name, None)
        if value is not None and (isinstance(value, Tensor) or value != default):
            raise IpvrmError(f"patched head: {name} is not supported beside labels; leave it out")
    options = OWN | {name: kwargs.pop(name) for name in OWN if name in kwargs}
    num_items_in_batch = kwargs.pop("num_items_in_batch", None)
    inputs = dict(zip(state.names, args, strict=False)) | kwargs
    inputs.setdefault("use_cache", False)
    balanced = _balanced(self, state, inputs)
    body = transformer_body(self)(**inputs)
    out = _head(self, state, body.last_hidden_state, labels, options)
    count = out.pop("count")
    divisor = max(count, 1) if num_items_in_batch is None else num_items_in_batch
    loss = -out["logprobs"].sum() / (
        divisor.to(out["logprobs"].device) if isinstance(divisor, Tensor) else divisor
    )
    aux_loss = None
    if balanced:
        assert state.balance is not None
        aux_loss = state.balance(
            body.router_logits, self.num_experts, self.num_experts_per_tok, inputs.get("attention_mask")
        )
        loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
    rest = {name: getattr(body, name, None) for name in ("hidden_states", "attentions", "router_logits")}
    return HeadOutput(loss=loss, **out, **rest, aux_loss=aux_loss)


def _balanced(model: Any, state: _State, inputs: dict[str, Any]) -> bool:
    """Whether the model's own forward would add a load-balancing loss; `inputs` then asks for what it
    needs."""
    if not hasattr(model, "router_aux_loss_coef"):
        return False
    asked = inputs.get("output_router_logits")
    wanted = bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)
    if wanted and state.balance is None:
        raise IpvrmError(f"patched head: the load-balancing loss of {type(model).__name__} is not known")
    inputs["output_router_logits"] = wanted
    return wanted


def _head(
    model: Any, state: _State, hidden: Tensor, labels: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The head's fields of `HeadOutput`, and `count`, the number of labels."""
    given, searched = options["candidate_ids"], (options["min_prob"], options["top_k"]) != (None, None)
    if searched and (given is not None or torch.is_grad_enabled()):
        raise IpvrmError(
            "patched head: min_prob and top_k find candidates without gradients; "
            + ("leave candidate_ids out" if given is not None else "call it under torch.no_grad()")
        )
    weight, bias = gathered_weight(head_module(model))
    hidden, targets = hidden.to(weight.device), labels[:, 1:].to(weight.device)  # (B, T, D), (B, T-1)
    if hidden.shape[:2] != labels.shape:
        raise IpvrmError(
            f"patched head: labels must be (B, T) like input_ids, got {tuple(labels.shape)} for states of "
            f"{tuple(hidden.shape[:2])}"
        )
    where = (targets != IGNORED).nonzero(as_tuple=True)  # (N,), (N,)
    rows, ids = hidden[where], targets[where]  # (N, D), (N,)
    common = {
        "bias": bias,
        "temperature": options["temperature"],
        "return_entropy": options["return_entropy"],
        **state.transform,
    }

    def padded(values: Tensor | None, fill: float) -> Tensor | None:  # (N, ...) -> (B, T-1, ...)
        if values is None:
            return None
        return values.new_full((*targets.shape, *values.shape[1:]), fill).index_put(where, values)

    if searched:
        best = linear_candidates(
            rows, weight, min_prob=options["min_prob"], top_k=options["top_k"], sampled=ids, **common
        )
        logprobs, entropy = best.sampled_logprobs, best.entropy
        candidates: tuple[Tensor | None, Tensor | None] = best.ids, best.logprobs
    else:
        if given is not None:
            ids = torch.cat([ids[:, None], given.to(ids)[where]], 1)  # (N, 1 + K): one pass for both
        found = linear_logprobs(rows, weight, ids, **common)
        logprobs, entropy = found.logprobs, found.entropy
        candidates = None, None
        if given is not None:
            logprobs, candidates = found.logprobs[:, 0], (ids[:, 1:], found.logprobs[:, 1:])
    return {
        "count": len(rows),
        "logprobs": padded(logprobs, 0.0),
        "entropy": padded(entropy, 0.0),
        "candidate_ids": padded(candidates[0], -1),
        "candidate_logprobs": padded(candidates[1], -torch.inf),
    }
