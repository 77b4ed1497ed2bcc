"""A transport that misbehaves on demand.

It wraps another transport and consults a `Faults` script at each write: the write can fail, arrive
with a flipped byte, or be held until the test lets it go, which is how a writer looks that was
stopped past its lease and then wakes up. What has failed can be kept from settling, as if bytes of
it were still on their way. Everything else is the wrapped transport's behaviour.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pdserve.core.errors import TransferError
from pdserve.transport.base import Pool, PoolExport, Region, RemotePool, Transport


class Faults:
    """What goes wrong, and when. Writes are counted from 0 over all peers. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._failing: dict[int, str] = {}
        self._corrupt: dict[int, int] = {}
        self._num_writes = 0
        self._num_held = 0
        self._holding = False
        self._unsettled: list[Callable[[], None]] | None = None

    def hold_settling(self) -> None:
        """From now on nothing settles before `release_settling`."""
        with self._changed:
            self._unsettled = []

    def release_settling(self) -> None:
        with self._changed:
            settled, self._unsettled = self._unsettled or [], None
        for done in settled:
            done()

    def settle(self, done: Callable[[], None]) -> bool:
        """False if it is not held."""
        with self._changed:
            if self._unsettled is None:
                return False
            self._unsettled.append(done)
            return True

    def fail_write(self, number: int, detail: str = "scripted fault") -> None:
        """Write ``number`` raises `TransferError` and copies nothing."""
        with self._changed:
            self._failing[number] = detail

    def corrupt_write(self, number: int, byte: int = 0) -> None:
        """Write ``number`` arrives with one byte wrong: the ``byte``-th of all that it copies."""
        with self._changed:
            self._corrupt[number] = byte

    def hold_writes(self) -> None:
        """From now on writes wait, before they copy anything, for `release_writes`."""
        with self._changed:
            self._holding = True

    def release_writes(self) -> None:
        with self._changed:
            self._holding = False
            self._changed.notify_all()

    def wait_until_held(self, timeout_s: float) -> bool:
        """Wait for a write to be held. False if none came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_held > 0, timeout_s)

    @property
    def num_writes(self) -> int:
        """Writes that have begun."""
        with self._changed:
            return self._num_writes

    def begin_write(self) -> int | None:
        """Called by each write: waits, raises, or gives the byte to corrupt (None: none)."""
        with self._changed:
            number = self._num_writes
            self._num_writes += 1
            if self._holding:
                self._num_held += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._holding)
                self._num_held -= 1
            if number in self._failing:
                raise TransferError(self._failing[number])
            return self._corrupt.get(number)


class FakeRemotePool(RemotePool):
    def __init__(self, inner: RemotePool, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        corrupt = self._faults.begin_write()
        self._inner.write(source, regions)
        for region in regions if corrupt is not None else ():
            assert corrupt is not None
            if corrupt < region.length:
                wrong = bytearray([source[region.source + corrupt] ^ 0xFF])
                self._inner.write(memoryview(wrong), [Region(0, region.target + corrupt, 1)])
                return
            corrupt -= region.length

    def settle(self, done: Callable[[], None]) -> None:
        if not self._faults.settle(done):
            self._inner.settle(done)

    def close(self) -> None:
        self._inner.close()


class FakeTransport(Transport):
    """``inner`` with the faults of a script. Pools and exports are those of ``inner``."""

    name = "fake"

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def allocate(self, num_bytes: int) -> Pool:
        return self._inner.allocate(num_bytes)

    def attach(self, export: PoolExport) -> RemotePool:
        return FakeRemotePool(self._inner.attach(export), self._faults)
