"""The loop around a machine: one input at a time, effects in order, timers that keep their word."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pdserve.core.effects import (
    CancelTimer,
    ClientGone,
    Effect,
    Input,
    KillWorker,
    SetTimer,
    Started,
    TimerFired,
)
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.serve.driver import Driver

Answers = dict[str, list[Effect]]


def mark(name: str) -> KillWorker:
    """An effect that says where it came from."""
    return KillWorker(WorkerId(name), Epoch(0), "")


def ask(name: str) -> ClientGone:
    """An input with a name."""
    return ClientGone(RequestId(name))


def name_of(event: Input) -> str:
    match event:
        case ClientGone(request_id=name):
            return name
        case TimerFired(timer):
            return timer
    return type(event).__name__


class Scripted:
    """A machine that answers by a script and remembers when it heard what."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.heard: list[tuple[str, float]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    def handle(self, event: Input, now: float) -> list[Effect]:
        self.heard.append((name_of(event), now))
        return self.answers.get(name_of(event), [])


class Notebook:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.is_closed = False

    def write_input(self, event: Input, now: float) -> None:
        self.written.append(f"in {name_of(event)}")

    def write_effects(self, effects: list[Effect]) -> None:
        self.written.append(f"out {len(effects)}")

    def close(self) -> None:
        self.is_closed = True


def run(work: Callable[[], Awaitable[None]], timeout_s: float = 10) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), timeout_s)

    asyncio.run(bounded())


def test_effects_are_performed_in_order_and_before_the_next_input() -> None:
    async def work() -> None:
        machine = Scripted({"a": [mark("1"), mark("2")], "b": [mark("3")]})
        performed: list[str] = []

        def perform(effect: Effect) -> None:
            assert isinstance(effect, KillWorker)
            performed.append(effect.worker)
            if effect.worker == "1":
                driver.feed(ask("b"))

        driver = Driver(machine, perform, crashed=lambda error: None)
        driver.feed(ask("a"))
        assert performed == ["1", "2", "3"]
        assert machine.names == ["a", "b"]

    run(work)


def test_a_timer_never_fires_before_its_time_nor_after_it_was_replaced_or_cancelled() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        begun = loop.time()
        script: Answers = {
            "Started": [
                SetTimer("replaced", begun + 0.01),
                SetTimer("cancelled", begun + 0.01),
                SetTimer("kept", begun + 0.02),
                SetTimer("replaced", begun + 0.04),
                SetTimer("last", begun + 0.05),
                CancelTimer("cancelled"),
                CancelTimer("never set"),
            ],
            "last": [mark("over")],
        }
        machine = Scripted(script)
        driver = Driver(machine, lambda effect: over.set(), crashed=lambda error: None)
        driver.feed(Started())
        await over.wait()
        assert machine.names == ["Started", "kept", "replaced", "last"]
        times = dict(machine.heard)
        assert times["kept"] >= begun + 0.02
        assert times["replaced"] >= begun + 0.04
        assert times["last"] >= begun + 0.05

    run(work)


def test_a_timer_that_the_loop_rings_early_waits_for_the_machines_clock() -> None:
    async def work() -> None:
        over = asyncio.Event()
        looks = iter([0.0, 0.0, 0.005])  # set, then too early once
        machine = Scripted({"Started": [SetTimer("t", 0.01)], "t": [mark("over")]})
        driver = Driver(
            machine,
            lambda effect: over.set(),
            crashed=lambda error: None,
            clock=lambda: next(looks, 0.01),
        )
        driver.feed(Started())
        await over.wait()
        assert machine.heard[-1] == ("t", 0.01)

    run(work)


def test_a_broken_machine_hears_nothing_more() -> None:
    async def work() -> None:
        class Broken(Scripted):
            def handle(self, event: Input, now: float) -> list[Effect]:
                super().handle(event, now)
                raise ValueError("a bug")

        machine, notebook = Broken({}), Notebook()
        crashes: list[BaseException] = []
        driver = Driver(machine, lambda effect: None, crashed=crashes.append, recorder=notebook)
        driver.feed(ask("a"))
        driver.feed(ask("b"))
        assert [str(error) for error in crashes] == ["a bug"]
        assert machine.names == ["a"]
        assert notebook.written == ["in a"]
        assert notebook.is_closed

    run(work)


def test_closing_in_the_middle_drops_what_is_left() -> None:
    async def work() -> None:
        machine = Scripted({"a": [mark("close"), mark("dropped")]})
        performed: list[Effect] = []

        def perform(effect: Effect) -> None:
            performed.append(effect)
            driver.feed(ask("unheard"))
            driver.close()

        driver = Driver(machine, perform, crashed=lambda error: None)
        driver.feed(ask("a"))
        assert performed == [mark("close")]
        assert machine.names == ["a"]

    run(work)


def test_the_recorder_hears_each_input_before_the_machine_and_then_its_answer() -> None:
    async def work() -> None:
        notebook = Notebook()

        class Watched(Scripted):
            def handle(self, event: Input, now: float) -> list[Effect]:
                assert notebook.written[-1] == f"in {name_of(event)}"
                return super().handle(event, now)

        machine = Watched({"a": [mark("1"), CancelTimer("t")]})
        driver = Driver(machine, lambda effect: None, crashed=lambda error: None, recorder=notebook)
        driver.feed(ask("a"))
        driver.feed(ask("b"))
        driver.close()
        assert notebook.written == ["in a", "out 2", "in b", "out 0"]
        assert notebook.is_closed

    run(work)
