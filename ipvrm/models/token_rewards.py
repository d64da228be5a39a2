"""Per-token rewards that are no log-ratio: the value head of a Q-RM, and EndoRM, which any causal LM has.

    Q-RM (Chen et al., ICML 2025)   Z_t = w . h_t, h_t the body's final state after token t
    EndoRM (arXiv 2506.23235)       r_t = a log pi(y_t | s_t) + V(s_t) - V(s_{t+1}),   V = a logsumexp(z / a)

pi is the softmax of z / a, and V after the last token of a response is 0.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipvrm.data.batches import Batch
from ipvrm.errors import IpvrmError, reading
from ipvrm.models.causal_lm import head, hidden_states
from ipvrm.models.folder import AGAIN, VALUE_HEAD
from ipvrm.run_folder import write_tensors


def has_value_head(folder: str | Path) -> bool:
    """Whether `folder` is that of a Q-RM."""
    return (Path(folder) / VALUE_HEAD).is_file()


def load_value_head(folder: str | Path, model: nn.Module) -> nn.Linear:
    """The value head in `folder`, which belongs on `model`; fp32, on its device.

    Raises:
        IpvrmError: none there, or one of another shape.
    """
    file = Path(folder) / VALUE_HEAD
    if not file.is_file():
        raise IpvrmError(f"{file}: no such file; a q_rm reward model has one beside its body. {AGAIN}")
    with reading(file, "not a readable safetensors file", AGAIN):
        stored = load_file(file)
    linear = new_value_head(model)
    if set(stored) != {"weight"} or stored["weight"].shape != linear.weight.shape:
        shapes = {name: tuple(x.shape) for name, x in stored.items()}
        raise IpvrmError(f"{file}: must hold `weight` of {tuple(linear.weight.shape)}; it holds {shapes}")
    linear.load_state_dict(stored)
    return linear


def new_value_head(model: nn.Module) -> nn.Linear:
    """A linear layer D -> 1 without bias, as torch initialises it, in fp32 on the device of `model`."""
    weight = head(model).weight
    return nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=torch.float32)


def save_value_head(linear: nn.Linear, folder: str | Path) -> None:
    """Writes it beside its body."""
    write_tensors(Path(folder) / VALUE_HEAD, {"weight": linear.weight.detach().cpu().contiguous()})


class TokenValues(nn.Module):
    """A Q-RM as a module: a distributed wrapper sees body and head in one forward."""

    def __init__(self, model: nn.Module, value_head: nn.Linear):
        super().__init__()
        self.model = model
        self.value_head = value_head

    def forward(self, batch: Batch) -> Tensor:
        """(N,) fp32: Z_t of every response token of `batch`."""
        states = hidden_states(self.model, batch, batch.positions + 1)  # (N, D), after the tokens themselves
        return (states.float() * self.value_head.weight).sum(-1)  # no matmul, which autocast would round


@torch.no_grad()
def endo_rewards(model: nn.Module, batch: Batch, scale: float = 1.0, ended: bool = True) -> Tensor:
    """(N,) fp32: r_t of every response token under a causal LM.

    Args:
        scale: a.
        ended: False where the responses go on behind their last token: its V(s_{t+1}) is then that of the
            state after it, and not 0.
    """
    from ipvrm_kernels import linear_logprobs

    parts, last = head(model), batch.cu_seqlens[1:].long() - 1
    positions = torch.cat([batch.positions, batch.positions[last] + 1])  # (N + B,)
    ids = torch.cat([batch.token_ids, torch.full_like(last, -1)])
    found = linear_logprobs(
        hidden_states(model, batch, positions), parts.weight, ids, temperature=scale, **parts.transform()
    )
    N = len(batch.token_ids)
    value, behind = (scale * found.lse).split([N, len(last)])  # (N,) V(s_t), (B,) V after the response
    after = value.roll(-1).index_copy(0, last, torch.zeros_like(behind) if ended else behind)
    return scale * found.logprobs[:N] + value - after
