"""Fused ops for prefix-value reward models and distribution-level RL; needs torch, and triton on GPUs.

Unlike the face of `ipvrm` this one loads its modules at once: importing it registers the ops of
`torch.ops.ipvrm`, by which saved graphs and other processes call them, and each op's module has the name of
its function, so that whatever imported the module would replace a function not asked for yet.
"""

import collections.abc
import sys
import types

from .backend import Backends, Impl, checks_values, set_checks
from .backend import table as _table
from .clipped_surrogate import ClippedSurrogate, clipped_surrogate
from .distrl_loss import DISTRL_METRICS, DistRLLoss, distrl_loss
from .fully_sharded import gathered_weight
from .head.matmul import describe_cpu_matmul
from .linear_candidates import Candidates, linear_candidates
from .linear_distrl_loss import linear_distrl_loss
from .linear_logprobs import LinearLogprobs, linear_logprobs
from .linear_logprobs_partial import Partial, linear_logprobs_partial, merge_partials
from .packing import check_cu_seqlens, check_cu_seqlens_shape, pack, unpack
from .prefix_value_loss import prefix_value_loss, prefix_weight_sums
from .prefix_values import PrefixValues, prefix_values
from .segment_scan import segment_scan
from .vocab_parallel import vocab_parallel_candidates, vocab_parallel_logprobs

__version__ = "0.1.0"  # pyproject.toml reads it here

# what is imported above and no module, private or of the standard library
__all__ = [
    name for name, x in list(globals().items()) if name[0] != "_" and not isinstance(x, types.ModuleType)
]

# {op: its implementations}; an op's module is called as it is
OPS: dict[str, collections.abc.Mapping[str, Impl]] = {
    name: module.IMPLS
    for name, x in list(globals().items())
    if (module := sys.modules.get(f"{__name__}.{name}")) and getattr(x, "__module__", "") == module.__name__
}


def backends() -> Backends:
    """Which implementation of each op runs on which device here, which is the default, and why others cannot.

    Returns a nested dict {device: {op: {impl: state}}} whose str() is a readable table.
    """
    return _table(OPS)


__all__ = sorted([*__all__, "backends", "__version__"])
