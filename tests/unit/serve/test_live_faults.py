"""Faults that a server takes: each for its time, all healed at once."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.core.errors import NotFoundError, RequestError
from pdserve.core.ids import WorkerId
from pdserve.serve.faults import LiveFaults
from pdserve.transport.link_faults import LinkFaults

A, B, C = map(WorkerId, "abc")


class Office:
    """What is told to workers and to the launcher."""

    def __init__(self) -> None:
        self.told: list[LinkFaults] = []
        self.asked: list[object] = []
        self.faults = LiveFaults([A, B, C], self._tell, self)
        self._news = asyncio.Event()

    def _tell(self, faults: LinkFaults) -> None:
        self.told.append(faults)
        self._news.set()

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        self.asked.append((worker, for_s))

    def release(self) -> None:
        self.asked.append("release")

    async def until_told(self, times: int) -> None:
        while len(self.told) < times:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 20)


def test_each_fault_ends_by_itself_and_the_others_stay() -> None:
    async def work() -> None:
        office = Office()
        office.faults.disturb([(A, B)], 3.0, None)
        office.faults.disturb([(A, B), (B, C)], None, 0.01)
        assert office.told[-1].of(A) == {B: None}
        assert office.told[-1].of(C) == {B: None}
        await office.until_told(3)
        assert office.told[-1].of(A) == {B: 3.0}
        assert office.told[-1].of(C) == {}
        assert office.faults.shown() == [{"between": [A, B], "factor": 3.0}]
        office.faults.heal()
        assert office.told[-1] == LinkFaults(())
        assert office.asked == ["release"]

    asyncio.run(work())


def test_healing_ends_what_would_have_lasted_and_its_timer() -> None:
    async def work() -> None:
        office = Office()
        office.faults.disturb([(A, B)], None, 60.0)
        office.faults.hold(C, 2.0)
        office.faults.heal()
        office.faults.heal()
        assert len(office.told) == 2
        assert office.asked == [(C, 2.0), "release", "release"]

    asyncio.run(work())


def test_workers_that_are_not_there_are_refused() -> None:
    office = Office()
    with pytest.raises(NotFoundError, match="no worker is called d: they are a, b, c"):
        office.faults.disturb([(A, WorkerId("d"))], None, None)
    with pytest.raises(NotFoundError):
        office.faults.hold(WorkerId("d"), None)
    with pytest.raises(RequestError, match="no link to itself"):
        office.faults.disturb([(A, A)], None, None)
    assert office.told == []
