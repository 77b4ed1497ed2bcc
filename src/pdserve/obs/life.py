"""The log of life events at the gateway: everything that can be said about a request starts here.

The router's events come straight from its driver, the workers' arrive in `Life` messages, so events
of different nodes may come out of order. `LifeLog.append` keeps each event with its request and
passes it on to every listener: metrics and log lines are such listeners, a timeline is read from
the log on demand.

Memory is bounded. When more than ``max_requests`` are known, the one that ended first is forgotten,
then one that was never submitted (late events of a forgotten request make such a rest), and only if
there is no such request the oldest running one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import RequestId

Listener = Callable[[LifeEvent], None]

ENDS = frozenset({LifeName.FINISHED, LifeName.FAILED})
"""Events after which nothing more happens to a request. Late events of workers may still arrive."""

MAX_EVENTS_PER_REQUEST = 1000
"""A request that is resumed or preempted without end keeps its first events and its end."""


@dataclass(slots=True)
class _Life:
    events: list[LifeEvent] = field(default_factory=list)
    submitted: bool = False
    ended_s: float | None = None

    @property
    def forgettable(self) -> bool:
        return self.ended_s is not None or not self.submitted


class LifeLog:
    """Events of the last ``max_requests`` requests, for one thread."""

    def __init__(self, max_requests: int = 4096) -> None:
        assert max_requests >= 1, max_requests
        self.max_requests = max_requests
        self._lives: OrderedDict[RequestId, _Life] = OrderedDict()
        self._forgettable: OrderedDict[RequestId, None] = OrderedDict()  # first to go first
        self._listeners: list[Listener] = []

    def __len__(self) -> int:
        """Requests that the log remembers."""
        return len(self._lives)

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` with every event from now on, on the appending thread."""
        self._listeners.append(listener)

    def append(self, event: LifeEvent) -> None:
        """Keep the event and tell the listeners, in the order in which they subscribed."""
        self._keep(event)
        for listener in self._listeners:
            listener(event)

    def timeline(self, request_id: RequestId) -> tuple[LifeEvent, ...] | None:
        """Events of the request by time (of equal times: as they arrived); None if unknown."""
        life = self._lives.get(request_id)
        if life is None:
            return None
        return tuple(sorted(life.events, key=lambda event: event.at_s))

    def timelines(self) -> Iterator[tuple[LifeEvent, ...]]:
        """Of all requests that it remembers, the events of each as they arrived."""
        return (tuple(life.events) for life in self._lives.values())

    def _keep(self, event: LifeEvent) -> None:
        request_id = event.request_id
        life = self._lives.get(request_id)
        if life is None or _starts_again(life, event):
            self._forget(request_id)
            life = self._lives[request_id] = _Life()
        if event.name is LifeName.SUBMITTED:
            life.submitted = True
        if event.name in ENDS and life.ended_s is None:
            life.ended_s = event.at_s
            self._forgettable.pop(request_id, None)  # its turn counts from its end
        if len(life.events) < MAX_EVENTS_PER_REQUEST or event.name in ENDS:
            life.events.append(event)
        if not life.forgettable:
            self._forgettable.pop(request_id, None)
        elif request_id not in self._forgettable:
            self._forgettable[request_id] = None
        while len(self._lives) > self.max_requests:
            self._forget(next(iter(self._forgettable or self._lives)))

    def _forget(self, request_id: RequestId) -> None:
        self._lives.pop(request_id, None)
        self._forgettable.pop(request_id, None)


def _starts_again(life: _Life, event: LifeEvent) -> bool:
    """True if a client used the id of an ended request for a new one."""
    return (
        event.name is LifeName.SUBMITTED and life.ended_s is not None and event.at_s > life.ended_s
    )
