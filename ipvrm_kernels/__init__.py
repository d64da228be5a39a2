"""Fused ops for prefix-value reward models and distribution-level RL; needs torch, and triton on GPUs."""

from .backend import Backends, set_checks
from .backend import table as _table
from .linear_logprobs import IMPLS as _linear_logprobs_impls
from .linear_logprobs import LinearLogprobs, linear_logprobs
from .packing import pack, unpack
from .prefix_value_loss import IMPLS as _prefix_value_loss_impls
from .prefix_value_loss import prefix_value_loss
from .prefix_values import IMPLS as _prefix_values_impls
from .prefix_values import PrefixValues, prefix_values
from .segment_scan import IMPLS as _segment_scan_impls
from .segment_scan import segment_scan

__version__ = "0.1.0"

_OPS = {
    "linear_logprobs": _linear_logprobs_impls,
    "segment_scan": _segment_scan_impls,
    "prefix_values": _prefix_values_impls,
    "prefix_value_loss": _prefix_value_loss_impls,
}


def backends() -> Backends:
    """Which implementation of each op runs on which device here, which is the default, and why others cannot.

    Returns a nested dict {device: {op: {impl: state}}} whose str() is a readable table.
    """
    return _table(_OPS)


__all__ = [
    "Backends",
    "LinearLogprobs",
    "PrefixValues",
    "__version__",
    "backends",
    "linear_logprobs",
    "pack",
    "prefix_value_loss",
    "prefix_values",
    "segment_scan",
    "set_checks",
    "unpack",
]
