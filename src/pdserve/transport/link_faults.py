"""Links that fail on purpose: what the gateway tells workers so that one can see what follows.

A server takes faults only if it was started for that (``--allow-faults``). A link that is cut does
not come up again until it is healed; its machines hear `PeerLost` as with any broken link. Over a
link that is slow everything arrives, but KV is written so many times slower, by a pause after each
write. Neither touches the links to the gateway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFault:
    """The link between two workers. ``factor`` None: it is cut; else so many times slower, above
    1."""

    one: WorkerId
    other: WorkerId
    factor: float | None


@dataclass(frozen=True, slots=True)
class LinkFaults:
    """All that are wrong now. Replaces what was said before; a frame of the link, as `Peers`."""

    faults: tuple[LinkFault, ...]

    def of(self, worker: WorkerId) -> dict[WorkerId, float | None]:
        """Factor, or None for a cut, by peer of this worker. A cut hides what else is wrong; of
        two factors the larger counts."""
        found: dict[WorkerId, float | None] = {}
        for fault in self.faults:
            if worker not in (fault.one, fault.other):
                continue
            peer = fault.other if worker == fault.one else fault.one
            known = found.get(peer, 1.0)
            cut = known is None or fault.factor is None
            found[peer] = None if cut else max(known or 1.0, fault.factor or 1.0)
        return found


class Throttle:
    """Makes the writes to a peer take longer. Used on transfer threads; `close` from any.

    ``slowness`` gives the factor of a peer now, 1 if its link is well.
    """

    def __init__(
        self,
        slowness: Callable[[WorkerId], float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._slowness = slowness
        self._clock = clock
        self._closed = threading.Event()

    def begin(self) -> float:
        """When a write began."""
        return self._clock()

    def end(self, peer: WorkerId, begun_s: float) -> None:
        """It is done: wait for as long as it would still take over this link."""
        factor = self._slowness(peer)
        if factor > 1.0:
            self.wait((factor - 1.0) * (self._clock() - begun_s))

    def wait(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def close(self) -> None:
        """Wait no more, now and later."""
        self._closed.set()
