"""Fused ops for prefix-value reward models and distribution-level RL; needs torch, and triton on GPUs."""

from .backend import Backends, set_checks
from .backend import table as _table
from .packing import pack, unpack
from .segment_scan import IMPLS as _segment_scan_impls
from .segment_scan import segment_scan

__version__ = "0.1.0"

_OPS = {"segment_scan": _segment_scan_impls}


def backends() -> Backends:
    """Which implementation of each op runs on which device here, which is the default, and why others cannot.

    Returns a nested dict {device: {op: {impl: state}}} whose str() is a readable table.
    """
    return _table(_OPS)


__all__ = ["Backends", "__version__", "backends", "pack", "segment_scan", "set_checks", "unpack"]
