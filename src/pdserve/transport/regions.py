"""Regions as a table, their bounds, and their copies for transports that map the peer's memory.

Few regions are told as a list of `Region`. Many are told as one table (`Regions`, which is such a
sequence, too), so that nothing is done for each of them in Python: numpy compares them with the
pools' sizes and joins neighbours, and one compiled call copies them, if it can be had.

A copy goes straight from one mapping to the other, without a temporary, and lets other threads run
meanwhile. Addresses are raw here, so nothing is copied before every region has been checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from pdserve.core.errors import TransferError
from pdserve.transport import native
from pdserve.transport.base import Region

Table = npt.NDArray[np.int64]
"""Shape (regions, 3): source, target and length of each, in bytes."""

Numbers = npt.NDArray[np.int64]

FEW = 48
"""So many are copied by Python in the time that a table takes to be checked."""


class Regions(Sequence[Region]):
    """Regions that are told as a table."""

    def __init__(self, table: Table) -> None:
        """The table is kept, not copied: it does not change any more."""
        self.table = table

    @overload
    def __getitem__(self, index: int) -> Region: ...

    @overload
    def __getitem__(self, index: slice) -> Regions: ...

    def __getitem__(self, index: int | slice) -> Region | Regions:
        if isinstance(index, slice):
            return Regions(self.table[index])
        return Region(*self.table[index].tolist())

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Region]:
        return (Region(*row) for row in self.table.tolist())


def checked_table(regions: Sequence[Region], source_bytes: int, target_bytes: int) -> Table:
    """The regions without empty ones, neighbours of which are joined, contiguous.

    Raises `TransferError` if one lies outside a source or target of these sizes.
    """
    table = _table_of(regions, source_bytes, target_bytes)
    if not len(table):
        return table
    if table.min() < 0 or table.max() > max(source_bytes, target_bytes):
        _check_each(regions, source_bytes, target_bytes)
    # No number is so large that a sum could overflow.
    ends = table[:, 2] + table[:, 0], table[:, 2] + table[:, 1]
    if ends[0].max() > source_bytes or ends[1].max() > target_bytes:
        _check_each(regions, source_bytes, target_bytes)
    table = _joined(table, *ends)
    if not table[:, 2].min():
        table = table[table[:, 2] > 0]
    return np.ascontiguousarray(table)


def copy_regions(source: memoryview, target: memoryview, regions: Sequence[Region]) -> None:
    """Copy the regions from ``source`` to ``target``, both writable and contiguous, not empty.

    Raises `TransferError`, and copies nothing, if a region lies outside.
    """
    # These two hold the buffers while their addresses are in use.
    source_start = ctypes.c_char.from_buffer(source)
    target_start = ctypes.c_char.from_buffer(target)
    source_address = ctypes.addressof(source_start)
    target_address = ctypes.addressof(target_start)
    loops = native.loops() if len(regions) > FEW else None
    if loops is not None:
        table = checked_table(regions, source.nbytes, target.nbytes)
        loops.copy(target_address, source_address, table.ctypes.data, len(table))
        return
    _check_each(regions, source.nbytes, target.nbytes)
    move = ctypes.memmove  # Releases the GIL; as fast as one large memcpy from 64 KiB on.
    for region in regions:
        move(target_address + region.target, source_address + region.source, region.length)


def _table_of(regions: Sequence[Region], source_bytes: int, target_bytes: int) -> Table:
    if isinstance(regions, Regions):
        return regions.table
    try:
        rows = [(region.source, region.target, region.length) for region in regions]
        return np.array(rows, np.int64).reshape(-1, 3)
    except OverflowError:
        _check_each(regions, source_bytes, target_bytes)
        raise


def _check_each(regions: Sequence[Region], source_bytes: int, target_bytes: int) -> None:
    """Raise `TransferError` that names the first region which lies outside."""
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


def _joined(table: Table, source_ends: Numbers, target_ends: Numbers) -> Table:
    """A region that begins on both sides where the one before it ends is part of that one."""
    follows = table[1:, 0] == source_ends[:-1]
    follows &= table[1:, 1] == target_ends[:-1]
    if not follows.any():
        return table
    firsts = np.flatnonzero(np.concatenate(([True], ~follows)))
    joined = table[firsts]
    joined[:, 2] = np.add.reduceat(table[:, 2], firsts)
    return joined
