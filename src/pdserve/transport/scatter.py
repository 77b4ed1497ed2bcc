"""Many pieces of memory in one system call: scatter and gather for stream sockets.

A `Cursor` is a list of pieces of one memory, and how far they have been read or written. The kernel
takes up to `MAX_PIECES` of them at a time and moves what it can; the cursor remembers where it
stopped, also in the middle of a piece. Nothing is copied on the way: bytes go between the socket
and the pool.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.transport import native

MAX_PIECES = 1024
"""IOV_MAX of Linux."""
CALL_BYTES = 1 << 20
"""About so much is offered to a call: it looks at each piece before it moves the first."""

Numbers = npt.NDArray[np.int64]

_LIBC = ctypes.CDLL(None, use_errno=True)
for _name in ("readv", "writev"):
    getattr(_LIBC, _name).argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    getattr(_LIBC, _name).restype = ctypes.c_ssize_t


class Cursor:
    """``lengths[i]`` bytes at ``offsets[i]`` of ``memory``, which is writable and contiguous.

    The pieces lie inside the memory and none is empty: who made them has checked that. ``head``,
    not empty either, comes before them. The cursor holds both for as long as it lives, so the
    addresses in it stay good.
    """

    def __init__(
        self,
        memory: memoryview,
        offsets: Numbers,
        lengths: Numbers,
        head: bytearray | None = None,
    ) -> None:
        self._memory = memory
        self._head = memoryview(b"" if head is None else head)
        first = 0 if head is None else 1
        pieces = np.empty((len(offsets) + first, 2), dtype=np.int64)
        # These two hold the buffers while their addresses are in use.
        self._start = ctypes.c_char.from_buffer(memory)
        self._head_start = None if head is None else ctypes.c_char.from_buffer(head)
        if self._head_start is not None:
            pieces[0] = ctypes.addressof(self._head_start), len(self._head)
        self._base = ctypes.addressof(self._start)
        np.add(offsets, self._base, out=pieces[first:, 0])
        pieces[first:, 1] = lengths
        self._pieces = pieces
        self._address = pieces.ctypes.data
        self._ends = np.cumsum(pieces[:, 1])
        self._next = 0
        self._done = 0
        self.remaining = int(self._ends[-1]) if len(pieces) else 0
        usual = self.remaining // max(1, len(pieces))
        self._at_once = min(MAX_PIECES, 2 + CALL_BYTES // max(1, usual))

    def read_from(self, fd: int) -> int:
        """Bytes that were there, at most what is missing. Raises `BlockingIOError` if there were
        none, `ConnectionError` at the end of the stream, else `OSError`."""
        got = self._move(_LIBC.readv, fd)
        if got == 0:
            raise ConnectionError("closed by the peer")
        return got

    def write_to(self, fd: int) -> int:
        """Bytes that the socket took. Raises `BlockingIOError` if it took none, else `OSError`."""
        return self._move(_LIBC.writev, fd)

    def write_all_to(self, fd: int, timeout_s: float) -> None:
        """Write all, without Python in between. Does nothing where that is not compiled. Raises
        `TimeoutError` if the socket takes nothing for so long, else `OSError`."""
        loops = native.loops()
        while loops is not None and self.remaining:
            address, count = self._address + 16 * self._next, len(self._ends) - self._next
            moved = loops.write(fd, address, count, self._at_once, int(timeout_s * 1000))
            if moved == 0:
                raise TimeoutError(f"nothing moved for {timeout_s:g} s")
            if moved < 0:
                raise OSError(-moved, os.strerror(-moved))
            self.advance(moved)

    def piece(self) -> memoryview:
        """What is left of the piece that is next; for those who cannot take several."""
        address, length = self._pieces[self._next].tolist()
        if self._next == 0 and self._head_start is not None:
            return self._head[len(self._head) - length :]
        start = address - self._base
        return self._memory[start : start + length]

    def advance(self, num_bytes: int) -> None:
        """So many bytes were moved."""
        self._done += num_bytes
        self.remaining -= num_bytes
        if not self.remaining:
            return
        self._next = number = int(self._ends.searchsorted(self._done, "right"))
        left = int(self._ends[number]) - self._done
        moved = int(self._pieces[number, 1]) - left
        self._pieces[number, 0] += moved
        self._pieces[number, 1] = left

    def _move(self, call: Any, fd: int) -> int:
        count = min(len(self._ends) - self._next, self._at_once)
        moved: int = call(fd, self._address + 16 * self._next, count)
        if moved < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.advance(moved)
        return moved


def whole(buffer: bytearray) -> Cursor:
    """All of a buffer, which is not empty, as one piece."""
    return Cursor(memoryview(buffer), np.zeros(1, np.int64), np.array([len(buffer)], np.int64))
