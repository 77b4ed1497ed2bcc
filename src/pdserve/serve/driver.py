"""One machine and its loop: inputs in, one at a time, effects out, in order.

A driver owns a machine from the first input to the last. Everything that happens to the machine
comes through `Driver.feed`, on the event loop's thread; threads and sockets post to that loop. Each
input is written to the recorder, handled with the clock's ``now``, and its effects are performed
before the next input is looked at. An effect may cause an input at once (a link that turns out to
be closed): that input waits in the inbox until the effects before it are done, so a machine is
never entered twice.

Timers live here because both kinds of node need them. `SetTimer` replaces the timer of that name;
a timer that was replaced or cancelled never fires, and none fires before its time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pdserve.core.effects import CancelTimer, Effect, Input, SetTimer, TimerFired


class Machine(Protocol):
    """What a driver drives: `WorkerNode`, `RouterNode`, or a small one made for a test."""

    def handle(self, event: Input, now: float) -> list[Effect]: ...


class Recorder(Protocol):
    """Where a driver writes what its machine heard and said."""

    def write_input(self, event: Input, now: float) -> None: ...

    def write_effects(self, effects: list[Effect]) -> None: ...

    def close(self) -> None: ...


class Driver:
    """Feeds one machine on one event loop.

    ``perform`` carries out every effect but the timers. An exception out of the machine or out of
    ``perform`` is a bug: it goes to ``crashed``, and the machine hears nothing more, because what
    it would say from then on could be wrong.
    """

    def __init__(
        self,
        machine: Machine,
        perform: Callable[[Effect], None],
        *,
        crashed: Callable[[BaseException], None],
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._perform = perform
        self._crashed = crashed
        self._recorder = recorder
        self._clock = clock
        self._inbox: deque[Input] = deque()
        self._timers = _Timers(self.feed, clock)
        self._entered = False
        self._closed = False

    def feed(self, event: Input) -> None:
        """Let the machine handle the input and perform its answer. Event loop's thread only."""
        if self._closed:
            return
        self._inbox.append(event)
        if self._entered:
            return
        self._entered = True
        try:
            while self._inbox and not self._closed:
                self._handle(self._inbox.popleft())
        except Exception as error:
            self.close()
            self._crashed(error)
        finally:
            self._entered = False

    def _handle(self, event: Input) -> None:
        now = self._clock()
        if self._recorder is not None:
            self._recorder.write_input(event, now)
        effects = self._machine.handle(event, now)
        if self._recorder is not None:
            self._recorder.write_effects(effects)
        for effect in effects:
            if self._closed:
                return
            if isinstance(effect, SetTimer):
                self._timers.set(effect.timer, effect.at_s)
            elif isinstance(effect, CancelTimer):
                self._timers.cancel(effect.timer)
            else:
                self._perform(effect)

    def close(self) -> None:
        """Drop every timer and everything unheard; later inputs are ignored."""
        self._closed = True
        self._inbox.clear()
        self._timers.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


class _Timers:
    """Named one-shot timers on the running event loop, in the time of ``clock``."""

    def __init__(self, feed: Callable[[Input], None], clock: Callable[[], float]) -> None:
        self._feed = feed
        self._clock = clock
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def set(self, name: str, at_s: float) -> None:
        self.cancel(name)
        delay_s = max(0.0, at_s - self._clock())
        loop = asyncio.get_running_loop()
        self._handles[name] = loop.call_later(delay_s, self._ring, name, at_s)

    def _ring(self, name: str, at_s: float) -> None:
        if self._clock() < at_s:  # the loop rounds to its clock's resolution
            self.set(name, at_s)
            return
        del self._handles[name]
        self._feed(TimerFired(name))

    def cancel(self, name: str) -> None:
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
