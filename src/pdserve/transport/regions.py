"""Bounds and copies of regions, for transports that map the receiver's memory.

A copy goes straight from one mapping to the other, without a temporary, and lets other threads run
meanwhile. Addresses are raw here, so nothing is copied before every region has been checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from pdserve.core.errors import TransferError
from pdserve.transport.base import Region


def check_regions(regions: Sequence[Region], source_bytes: int, target_bytes: int) -> None:
    """Raise `TransferError` if a region lies outside a source or target of these sizes."""
    for region in regions:
        length = region.length
        if (
            length < 0
            or region.source < 0
            or region.target < 0
            or region.source + length > source_bytes
            or region.target + length > target_bytes
        ):
            raise TransferError(
                f"{region} lies outside the pools ({source_bytes} bytes here, "
                f"{target_bytes} bytes at the peer)"
            )


def copy_regions(source: memoryview, target: memoryview, regions: Sequence[Region]) -> None:
    """Copy the regions from ``source`` to ``target``, both writable and contiguous, not empty.

    Raises `TransferError`, and copies nothing, if a region lies outside.
    """
    check_regions(regions, source.nbytes, target.nbytes)
    # These two hold the buffers while their addresses are in use.
    source_start = ctypes.c_char.from_buffer(source)
    target_start = ctypes.c_char.from_buffer(target)
    source_address = ctypes.addressof(source_start)
    target_address = ctypes.addressof(target_start)
    move = ctypes.memmove  # Releases the GIL; as fast as one large memcpy from 64 KiB on.
    for region in regions:
        move(target_address + region.target, source_address + region.source, region.length)
