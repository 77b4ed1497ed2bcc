"""Finds the compiled kernels, and names the instruction set that they are to use.

The library lies beside this file (``pdserve.compiled``). If it is missing or of another version,
`load` gives None, says why once, and everything runs on torch alone.

``PDSERVE_KERNELS`` forces a level of `LEVELS`, or ``torch`` for none; by default the best one that
the processor has is taken.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

from pdserve import compiled
from pdserve.core.errors import ConfigError
from pdserve.engine import native

LEVELS = ("plain", "neon", "avx2", "avx512", "avx512bf16")
"""Instruction sets by their index in the C interface; later ones are better."""

ABI = 4
"""Version of the C interface that this code calls (`PDSERVE_ABI` in abi.h)."""

KERNELS_VARIABLE = "PDSERVE_KERNELS"
NO_KERNELS = "torch"

_log = logging.getLogger(__name__)


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None if there is none that fits; that is logged, once per process."""
    library, why = compiled.find(native.__path__, "_kernels.so", "kernels", "pdserve_abi", ABI)
    if library is None:
        _log.warning("%s (computing with torch alone, which is slower)", why)
    return library


def levels() -> tuple[str, ...]:
    """The levels that this machine can run, best last; empty without the library."""
    library = load()
    if library is None:
        return ()
    return tuple(
        name for index, name in enumerate(LEVELS) if library.pdserve_level_supported(index)
    )


def choose_level() -> str | None:
    """The level to use: what ``PDSERVE_KERNELS`` says, or the best; None for torch alone.

    Raises `ConfigError` if the environment names a level that cannot be had here.
    """
    wanted = os.environ.get(KERNELS_VARIABLE)
    if wanted == NO_KERNELS:
        return None
    available = levels()
    if not wanted:
        return available[-1] if available else None
    if wanted not in available:
        known = ", ".join((NO_KERNELS, *available))
        raise ConfigError(
            f"{KERNELS_VARIABLE}={wanted!r} cannot be had here: choose one of {known}"
        )
    return wanted
