"""Faults that a server takes from outside, for those who want to see it fail: ``--allow-faults``.

Links between workers are cut or slowed for a time, and the process of a slot that dies is kept from
being started again. Killing and stopping processes needs no hook: their ids are in ``/cluster``.
Each fault ends by itself after its time, so that a client that goes away leaves no damage behind;
`LiveFaults.heal` ends all of them at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from pdserve.core.errors import NotFoundError, RequestError
from pdserve.core.ids import WorkerId
from pdserve.transport.link_faults import LinkFault, LinkFaults

log = logging.getLogger(__name__)


class Restarter(Protocol):
    """Who starts processes anew: the launcher."""

    def hold(self, worker: WorkerId, for_s: float | None) -> None: ...

    def release(self) -> None: ...


class LiveFaults:
    """Implements ``api.gateway.FaultHooks``. Used on the event loop's thread only."""

    def __init__(
        self,
        workers: Collection[WorkerId],
        tell: Callable[[LinkFaults], None],
        restarter: Restarter,
    ) -> None:
        """``tell`` sends all workers what is wrong with their links."""
        self._workers = workers
        self._tell = tell
        self._restarter = restarter
        self._numbers = itertools.count()
        self._current: dict[int, tuple[LinkFault, ...]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def disturb(
        self,
        pairs: Sequence[tuple[WorkerId, WorkerId]],
        factor: float | None,
        for_s: float | None,
    ) -> None:
        for pair in pairs:
            for worker in pair:
                self._check(worker)
            if pair[0] == pair[1]:
                raise RequestError(f"{pair[0]} has no link to itself", "pairs")
        number = next(self._numbers)
        self._current[number] = tuple(
            LinkFault(one=one, other=other, factor=factor) for one, other in pairs
        )
        if for_s is not None:
            loop = asyncio.get_running_loop()
            self._timers[number] = loop.call_later(for_s, self._end, number)
        what = "cut" if factor is None else f"{factor:g} times slower"
        log.warning("fault: %s: %s", ", ".join(f"{a} | {b}" for a, b in pairs), what)
        self._tell_all()

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        self._check(worker)
        self._restarter.hold(worker, for_s)

    def heal(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._current:
            self._current.clear()
            self._tell_all()
        self._restarter.release()

    def shown(self) -> list[dict[str, Any]]:
        return [
            {"between": [fault.one, fault.other], "factor": fault.factor}
            for fault in self._now().faults
        ]

    # --- inside -------------------------------------------------------------------------------

    def _check(self, worker: WorkerId) -> None:
        if worker not in self._workers:
            raise NotFoundError(
                f"no worker is called {worker}: they are {', '.join(self._workers)}", "worker"
            )

    def _end(self, number: int) -> None:
        del self._timers[number]
        faults = self._current.pop(number)
        log.warning("fault over: %s", ", ".join(f"{fault.one} | {fault.other}" for fault in faults))
        self._tell_all()

    def _now(self) -> LinkFaults:
        return LinkFaults(tuple(itertools.chain.from_iterable(self._current.values())))

    def _tell_all(self) -> None:
        self._tell(self._now())
