"""Compiled loops: one call copies many regions, or writes many pieces to a socket, where Python
would make a call for each, or come back after each part to wait for the next.

It is a library of its own, apart from the engine's kernels, because a transport knows no engine.
It may be missing, or be of another version after an update; `loops` then gives None and Python
does the same by itself, but slowly where regions are small.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from pdserve import compiled

ABI = 1
"""Version of the C interface that this code calls (`PDSERVE_REGIONS_ABI` in regions.cpp)."""

CopyAll = Callable[[int, int, int, int], None]
"""(address of the target, of the source, of the table, number of its rows)"""

WriteAll = Callable[[int, int, int, int, int], int]
"""(descriptor, address of the pieces, their number, how many at once, milliseconds without
progress): bytes, 0 for none in time, or an error number below 0"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loops:
    """What is compiled. Neither holds the GIL."""

    copy: CopyAll
    write: WriteAll


@cache
def loops() -> Loops | None:
    """The library, or None if there is none that fits; that is logged, once per process."""
    library, why = compiled.find(__path__, "_regions.so", "copies", "pdserve_regions_abi", ABI)
    if library is None:
        _log.info("%s (small regions move slowly)", why)
        return None
    copy, write = library.pdserve_copy_regions, library.pdserve_write_pieces
    copy.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64)
    copy.restype = None
    write.argtypes = (ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_int)
    write.restype = ctypes.c_int64
    return Loops(copy, write)
