"""The compiled loop over regions: one call copies many, where Python would make a call for each.

It is a library of its own, apart from the engine's kernels, because a transport knows no engine.
It may be missing, or be of another version after an update; `copies` then gives None and
``transport.regions`` copies by Python alone: the same bytes, but slowly where regions are small.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache

from pdserve import compiled

ABI = 1
"""Version of the C interface that this code calls (`PDSERVE_REGIONS_ABI` in regions.cpp)."""

CopyAll = Callable[[int, int, int, int], None]
"""(address of the target, of the source, of the table, number of its rows). The GIL is released."""

_log = logging.getLogger(__name__)


@cache
def copies() -> CopyAll | None:
    """The compiled loop, or None if there is none that fits; that is logged, once per process."""
    library, why = compiled.find(__path__, "_regions.so", "copies", "pdserve_regions_abi", ABI)
    if library is None:
        _log.info("%s (small regions are copied slowly)", why)
        return None
    found: CopyAll = library.pdserve_copy_regions
    found.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64)  # type: ignore[attr-defined]
    found.restype = None  # type: ignore[attr-defined]
    return found
