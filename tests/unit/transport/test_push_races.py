"""A push between real threads, in whatever order they meet.

Up to three attempts are computed in shared steps on one thread. At drawn moments of that a second
thread binds and stops them, either while the first waits or while it runs on. Whatever happens,
what has arrived is exact, or the writer has said that it stops and nothing arrived after that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.effects import Input, TransferSent, TransferStopped, VerifyTransfer
from pdserve.core.ids import BlockId
from pdserve.core.step import StepRow
from pdserve.transport.base import Transport
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.shm import ShmTransport
from pdserve.transport.verify import verify

BLOCK_TOKENS, NUM_LAYERS = 4, 3
HERE_BLOCKS, THERE_BLOCKS = 40, 56


@dataclass(frozen=True)
class Case:
    """One attempt. Moments count the calls of the engine thread; None: never."""

    name: str
    num_tokens: int
    here: tuple[int, ...]
    there: tuple[int, ...]
    cached: int
    reused: int
    one_shot: bool
    chunk_blocks: tuple[int, ...]
    bind_at: int | None
    stop_at: int | None
    waits: bool
    """The engine waits while this attempt is bound or stopped."""

    def rows(self, scene: Any) -> list[StepRow]:
        """The attempt's share of each step."""
        rows, start, sizes = [], self.cached * BLOCK_TOKENS, list(self.chunk_blocks)
        while start < self.num_tokens:
            size = sizes.pop() if sizes else len(self.here)
            end = min(start + size * BLOCK_TOKENS, self.num_tokens)
            is_last = end == self.num_tokens
            rows.append(scene.row(self.here, start, end, last=is_last, name=self.name))
            start = end
        return rows


@st.composite
def cases(draw: st.DrawFn) -> list[Case]:
    here = draw(st.permutations(range(HERE_BLOCKS)))
    there = draw(st.permutations(range(THERE_BLOCKS)))
    found = []
    moments = st.none() | st.integers(0, 30)
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        num_tokens = draw(st.integers(1, 8 * BLOCK_TOKENS))
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        reused = draw(st.integers(0, num_blocks))
        # Sorted halves give runs to coalesce; permutations alone hardly ever do.
        mine = [here.pop() for _ in range(num_blocks)]
        theirs = [there.pop() for _ in range(num_blocks)]
        if draw(st.booleans()):
            mine.sort()
            theirs.sort()
        found.append(
            Case(
                name=name,
                num_tokens=num_tokens,
                here=tuple(mine),
                there=tuple(theirs),
                cached=draw(st.integers(0, (num_tokens - 1) // BLOCK_TOKENS)),
                reused=reused,
                one_shot=draw(st.booleans()),
                chunk_blocks=tuple(draw(st.lists(st.integers(1, 3), max_size=4))),
                bind_at=draw(moments),
                stop_at=draw(moments),
                waits=draw(st.booleans()),
            )
        )
    return found


class Race:
    """Runs the cases: the engine on a thread of its own, the node on the test's."""

    def __init__(self, scene: Any, cases: list[Case], broken_step: int | None) -> None:
        self.scene = scene
        self.cases = {case.name: case for case in cases}
        self.broken_step = broken_step
        self.failed: set[str] = set()
        self.at_stop: dict[str, list[bytes]] = {}
        self.sent: dict[str, TransferSent] = {}
        self._moment = 0
        self._to_node: SimpleQueue[tuple[str, Case, threading.Event] | None] = SimpleQueue()
        scene.at_post = self._see

    def run(self) -> None:
        for case in self.cases.values():
            for layer in range(NUM_LAYERS):
                self.scene.fill(layer, case.here[: case.cached])
            self.scene.open(case.here, case.cached, one_shot=case.one_shot, name=case.name)
        engine = threading.Thread(target=self._compute)
        engine.start()
        while (order := self._to_node.get(timeout=self.scene.timeout_s)) is not None:
            self._perform(*order)
        engine.join()
        for case in self.cases.values():
            if case.name in self.failed:
                self.scene.pusher.stop(self.scene.attempt(case.name))
        self.scene.drain()

    def _see(self, event: Input) -> None:
        """On the transfer thread, at the very moment of the post."""
        assert isinstance(event, TransferSent | TransferStopped), event
        name = event.attempt.request_id
        if isinstance(event, TransferSent):
            assert name not in self.at_stop, "sent after it was stopped"
            self.sent[name] = event
        else:
            self.at_stop[name] = self.received(self.cases[name])

    def received(self, case: Case) -> list[bytes]:
        return [
            self.scene.block_there(layer, block)
            for layer in range(NUM_LAYERS)
            for block in case.there
        ]

    def _perform(self, what: str, case: Case, done: threading.Event) -> None:
        if what == "bind":
            self.scene.bind(case.reused, case.there[case.reused :], name=case.name)
        else:
            self.scene.pusher.stop(self.scene.attempt(case.name))
        done.set()

    def _tick(self) -> None:
        """A moment passes: the node may have something to do in it."""
        for case in self.cases.values():
            for what, at in (("bind", case.bind_at), ("stop", case.stop_at)):
                if at == self._moment:
                    done = threading.Event()
                    self._to_node.put((what, case, done))
                    if case.waits:
                        assert done.wait(self.scene.timeout_s)
        self._moment += 1

    def _compute(self) -> None:
        todo = {name: case.rows(self.scene) for name, case in self.cases.items()}
        step = 0
        while any(todo.values()):
            rows = [rows.pop(0) for rows in todo.values() if rows]
            plan = self.scene.plan(*rows)
            self._tick()
            self.scene.pusher.begin_step(plan)
            for layer in range(NUM_LAYERS):
                self._tick()
                self.scene.compute(plan, layer)
            self._tick()
            ok = step != self.broken_step
            if not ok:
                self.failed |= {row.attempt.request_id for row in rows}
                for name in self.failed:
                    todo[name] = []
            self.scene.pusher.end_step(plan.step_id, ok)
            step += 1
        while self._moment <= 30:
            self._tick()
        self._to_node.put(None)


def check(race: Race, case: Case) -> None:
    scene, name = race.scene, case.name
    arrived = race.received(case)
    per_layer = len(case.here)
    complete = [
        bytes([layer * 64 + block + 1]) * scene.layout.block_bytes if i >= case.reused else None
        for layer in range(NUM_LAYERS)
        for i, block in enumerate(case.here)
    ]
    untouched = bytes(scene.layout.block_bytes)
    for found, want in zip(arrived, complete, strict=True):
        assert found in (untouched, want), "a block came through wrong, or in part"
    if name in race.at_stop:
        assert arrived == race.at_stop[name], "written after it was stopped"
    if case.bind_at is None:
        assert name not in race.sent
        assert arrived == [untouched] * (NUM_LAYERS * per_layer)
    elif case.stop_at is None and name not in race.failed:
        assert name in race.sent
    if name in race.sent:
        event = race.sent[name]
        assert arrived == [untouched if want is None else want for want in complete]
        assert event.num_bytes == NUM_LAYERS * (per_layer - case.reused) * len(untouched)
        effect = VerifyTransfer(
            attempt=event.attempt,
            first_block=case.reused,
            block_ids=tuple(map(BlockId, case.there[case.reused :])),
            chunks=event.chunks,
        )
        assert verify(scene.there, effect) is None


def inproc_pair() -> tuple[Transport, Transport]:
    hub = InprocHub()
    return InprocTransport(hub), InprocTransport(hub)


def shm_pair() -> tuple[Transport, Transport]:
    return ShmTransport(), ShmTransport()


@pytest.mark.parametrize("make_pair", [inproc_pair, shm_pair])
@settings(derandomize=True, max_examples=150)
@given(cases=cases(), broken_step=st.none() | st.integers(0, 4))
def test_what_arrives_is_exact_or_the_writer_has_stopped(
    make_scene: Callable[..., Any],
    make_pair: Callable[[], tuple[Transport, Transport]],
    cases: list[Case],
    broken_step: int | None,
) -> None:
    scene = make_scene(*make_pair())
    try:
        race = Race(scene, cases, broken_step)
        race.run()
        for case in cases:
            check(race, case)
        written = [
            offset
            for regions in scene.writes()
            for region in regions
            for offset in range(region.target, region.target + region.length, 64)
        ]
        assert len(written) == len(set(written)), "a block of a layer was written twice"
        mine = {
            scene.there.offset(layer, block)
            for case in cases
            for layer in range(NUM_LAYERS)
            for block in case.there[case.reused :]
        }
        assert set(written) <= mine, "written where no ticket reaches"
    finally:
        scene.close()
