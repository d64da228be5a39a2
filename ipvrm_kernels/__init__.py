"""Fused ops for prefix-value reward models and distribution-level RL; needs torch, and triton on GPUs."""

from collections.abc import Mapping

from .backend import Backends, Impl, set_checks
from .backend import table as _table
from .clipped_surrogate import IMPLS as _clipped_surrogate_impls
from .clipped_surrogate import ClippedSurrogate, clipped_surrogate
from .linear_candidates import IMPLS as _linear_candidates_impls
from .linear_candidates import Candidates, linear_candidates
from .linear_distrl_loss import IMPLS as _linear_distrl_loss_impls
from .linear_distrl_loss import DistRLLoss, linear_distrl_loss
from .linear_logprobs import IMPLS as _linear_logprobs_impls
from .linear_logprobs import LinearLogprobs, linear_logprobs
from .linear_logprobs_partial import IMPLS as _linear_logprobs_partial_impls
from .linear_logprobs_partial import Partial, linear_logprobs_partial, merge_partials
from .packing import pack, unpack
from .prefix_value_loss import IMPLS as _prefix_value_loss_impls
from .prefix_value_loss import prefix_value_loss
from .prefix_values import IMPLS as _prefix_values_impls
from .prefix_values import PrefixValues, prefix_values
from .segment_scan import IMPLS as _segment_scan_impls
from .segment_scan import segment_scan

__version__ = "0.1.0"

OPS: dict[str, Mapping[str, Impl]] = {
    "linear_logprobs": _linear_logprobs_impls,
    "linear_logprobs_partial": _linear_logprobs_partial_impls,
    "linear_candidates": _linear_candidates_impls,
    "clipped_surrogate": _clipped_surrogate_impls,
    "linear_distrl_loss": _linear_distrl_loss_impls,
    "segment_scan": _segment_scan_impls,
    "prefix_values": _prefix_values_impls,
    "prefix_value_loss": _prefix_value_loss_impls,
}


def backends() -> Backends:
    """Which implementation of each op runs on which device here, which is the default, and why others cannot.

    Returns a nested dict {device: {op: {impl: state}}} whose str() is a readable table.
    """
    return _table(OPS)


__all__ = [
    "Backends",
    "Candidates",
    "ClippedSurrogate",
    "DistRLLoss",
    "LinearLogprobs",
    "Partial",
    "PrefixValues",
    "__version__",
    "backends",
    "clipped_surrogate",
    "linear_candidates",
    "linear_distrl_loss",
    "linear_logprobs",
    "linear_logprobs_partial",
    "merge_partials",
    "pack",
    "prefix_value_loss",
    "prefix_values",
    "segment_scan",
    "set_checks",
    "unpack",
]
