"""Whose turn it is: start-time fair queueing between classes, and between tenants within a class.

Work is counted in tokens. Whoever waits (a *flow*: a class, or a tenant of one) has a start tag;
the lowest one is next, and being served moves it on by tokens / weight. So while two flows wait all
the time, the tokens of each, divided by its weight, differ by at most one request of either (Goyal,
Vin and Cheng, SIGCOMM 1996, theorem 1). A flow that comes back starts at the virtual time, which is
the start tag of what was served last: nobody saves up turns by being away, and nobody has to.

In one flow requests keep their order. Ties are broken by name. Each call costs the logarithm of the
number of flows, however many requests wait.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from pdserve.core.request import ServiceClass

ItemT = TypeVar("ItemT", bound=Hashable)
MOST_DEAD = 16
"""Entries of a heap that are dead, beside as many as there are flows, before it is made anew."""


class FairShare:
    """Turns of flows by name, on one level. Knows who waits, not for what."""

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._starts: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # of _starts; older entries are dead
        self._ends: dict[str, float] = {}  # of flows that do not wait, if after the virtual time
        self._idle: list[tuple[float, str]] = []  # of _ends, in the same way

    def __contains__(self, flow: str) -> bool:
        return flow in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def num_remembered(self) -> int:
        """Flows that wait, or were served ahead of others and have gone."""
        return len(self._starts) + len(self._ends)

    def join(self, flow: str) -> None:
        """It waits from now on; it did not before."""
        self._set(flow, max(self._virtual_time, self._ends.pop(flow, 0.0)))

    def leave(self, flow: str) -> None:
        """It waits no more, and was not served."""
        self._rest(flow, self._starts.pop(flow))

    def serve(self, flow: str, work: float, *, waits_on: bool) -> None:
        """It was given ``work`` (tokens / weight), be it its turn or not."""
        [first] = self._starts if len(self._starts) == 1 else self.order(1)
        self._virtual_time = max(self._virtual_time, self._starts[first])
        end = self._starts[flow] + work
        if waits_on:
            self._set(flow, end)
            self._forget()
        else:
            del self._starts[flow]
            self._rest(flow, end)

    def order(self, limit: int) -> list[str]:
        """Flows that wait, the next one first, at most so many."""
        if limit and len(self._starts) == 1:
            return list(self._starts)
        found: list[tuple[float, str]] = []
        while self._heap and len(found) < limit:
            entry = heapq.heappop(self._heap)
            if self._starts.get(entry[1]) == entry[0] and entry not in found[-1:]:
                found.append(entry)
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [flow for _, flow in found]

    def _set(self, flow: str, start: float) -> None:
        self._starts[flow] = start
        heapq.heappush(self._heap, (start, flow))
        if len(self._heap) > MOST_DEAD + 2 * len(self._starts):
            self._heap = [(each_start, each) for each, each_start in self._starts.items()]
            heapq.heapify(self._heap)

    def _rest(self, flow: str, end: float) -> None:
        if not self._starts:  # the busy time is over: all are equal again
            self._virtual_time = 0.0
            self._heap.clear()
            self._ends.clear()
            self._idle.clear()
            return
        self._ends[flow] = end
        heapq.heappush(self._idle, (end, flow))
        self._forget()

    def _forget(self) -> None:
        """Flows that are away, and whom the virtual time has caught up with."""
        while self._idle and self._idle[0][0] <= self._virtual_time:
            end, flow = heapq.heappop(self._idle)
            if self._ends.get(flow) == end:
                del self._ends[flow]


class _Class(Generic[ItemT]):
    """What waits of one class, by tenant; (tokens) of each in order of arrival."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.turns = FairShare()
        self.tenants: dict[str, OrderedDict[ItemT, float]] = {}
        self.tokens = 0.0


class FairQueue(Generic[ItemT]):
    """What waits, in the order in which it is to be served. Classes have weights, tenants of one
    class share alike. ``tokens``: of all that waits."""

    def __init__(self) -> None:
        self._turns = FairShare()
        self._classes: dict[str, _Class[ItemT]] = {}
        self._flows: dict[ItemT, tuple[str, str]] = {}
        self.tokens = 0.0

    def __contains__(self, item: ItemT) -> bool:
        return item in self._flows

    def __len__(self) -> int:
        return len(self._flows)

    def add(self, item: ItemT, service: ServiceClass, tenant: str, tokens: float) -> None:
        """``tokens``: what serving it takes, of its prompt and its answer."""
        name = service.name
        if name not in self._classes:
            self._classes[name] = _Class(service.weight)
            self._turns.join(name)
        waiting = self._classes[name]
        if tenant not in waiting.tenants:
            waiting.tenants[tenant] = OrderedDict()
            waiting.turns.join(tenant)
        waiting.tenants[tenant][item] = tokens
        waiting.tokens += tokens
        self.tokens += tokens
        self._flows[item] = (name, tenant)

    def heads(self, limit: int) -> list[ItemT]:
        """The first of each flow, the next one first, at most so many."""
        heads: list[ItemT] = []
        for name in self._turns.order(limit):
            waiting = self._classes[name]
            for tenant in waiting.turns.order(limit - len(heads)):
                heads.append(next(iter(waiting.tenants[tenant])))
            if len(heads) == limit:
                break
        return heads

    def serve(self, item: ItemT) -> None:
        """It is served now, be it its turn or not."""
        name, tenant, tokens, tenant_waits = self._remove(item)
        waiting = self._classes[name]
        waiting.turns.serve(tenant, tokens, waits_on=tenant_waits)
        class_waits = bool(waiting.tenants)
        self._turns.serve(name, tokens / waiting.weight, waits_on=class_waits)
        if not class_waits:
            del self._classes[name]

    def drop(self, item: ItemT) -> None:
        """It does not wait any more, and was not served."""
        name, tenant, _, tenant_waits = self._remove(item)
        waiting = self._classes[name]
        if not tenant_waits:
            waiting.turns.leave(tenant)
        if not waiting.tenants:
            self._turns.leave(name)
            del self._classes[name]

    def tokens_ahead(self, service: ServiceClass) -> float:
        """Tokens that are served before a request of the class that comes now, about: those of its
        own class, and meanwhile the others' share."""
        own = self._classes.get(service.name)
        if own is None:
            return 0.0
        weights = sum(self._classes[name].weight for name in self._classes)
        return min(self.tokens, own.tokens * weights / own.weight)

    def _remove(self, item: ItemT) -> tuple[str, str, float, bool]:
        """(class, tenant, tokens, whether more of the tenant waits)."""
        name, tenant = self._flows.pop(item)
        waiting = self._classes[name]
        queue = waiting.tenants[tenant]
        tokens = queue.pop(item)
        waiting.tokens -= tokens
        self.tokens = self.tokens - tokens if self._flows else 0.0
        if not queue:
            del waiting.tenants[tenant]
        return name, tenant, tokens, bool(queue)
