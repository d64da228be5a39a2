"""Definitions that several tests judge the ops by, and the golden vectors; nothing is shared with the ops."""

import math
import os
from pathlib import Path

import torch

GOLDEN = Path(os.environ.get("IPVRM_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
RELEASES = sorted(GOLDEN.glob("release_*.npz"))
PROCESSBENCH = sorted(GOLDEN.glob("processbench_*.json"))


def edges(lengths, device="cpu"):
    """(B+1,) int32 cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def naive_head(hidden, weight, bias, ids, logit_scale=1.0, softcap=None, temperature=1.0):
    """The textbook formulation: (logprobs (N,K), lse, entropy, z), in the dtype of hidden."""
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    picked = torch.where(ids >= 0, log_p.gather(1, ids.clamp(min=0)), -math.inf)
    return picked, torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(-1), z


def surrogate(new, old, advantage, low, high, dual):
    """One element in Python floats: (loss, d loss / d new, clipped, dual clipped)."""
    if old == -math.inf or advantage == 0:
        return 0.0, 0.0, False, False
    rho = math.exp(new - old) if new - old < 700 else math.inf
    unclipped, bounded = -advantage * rho, -advantage * min(max(rho, 1 - low), 1 + high)
    loss, clipped = max(unclipped, bounded), bounded > unclipped
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        return -dual * advantage, 0.0, clipped, True
    return loss, 0.0 if clipped else unclipped, clipped, False
