"""Worker processes: started, restarted with back-off, heard of at their end, never left over."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.core import restarts as restarts_module
from pdserve.core.ids import Epoch, WorkerId
from pdserve.serve.launcher import Launcher

A, B = WorkerId("a"), WorkerId("b")

# Each says what it was told and then does as the second word of it says.
CHILD = """
import json, os, signal, sys
told = json.load(sys.stdin)
print("told", json.dumps(told), flush=True)
match told["do"]:
    case "fail": print("out of luck", file=sys.stderr); sys.exit(3)
    case "refuse": print("no such device", file=sys.stderr); sys.exit(2)
    case "linger": signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()
    case "leave": pass
"""


class Office:
    """A launcher of small processes, with everything that it reports."""

    def __init__(self, behaviour: Callable[[WorkerId, Epoch], str], *workers: WorkerId) -> None:
        self.told: list[tuple[str, int]] = []
        self.exits: list[tuple[str, int, str]] = []
        self.refused: list[tuple[str, str]] = []
        self._news = asyncio.Event()
        self.launcher = Launcher(
            workers,
            lambda worker, epoch, address: json.dumps(
                {"id": worker, "epoch": epoch, "address": address, "do": behaviour(worker, epoch)}
            ).encode(),
            exited=lambda *report: self._note(self.exits, report),
            unusable=lambda *report: self._note(self.refused, report),
            said=self._said,
            command=(sys.executable, "-S", "-c", CHILD),
        )

    def _said(self, worker: WorkerId, line: str) -> None:
        if line.startswith("told "):
            told = json.loads(line.removeprefix("told "))
            assert told["id"] == worker
            self._note(self.told, (worker, told["epoch"]))

    def _note(self, log: list[object], entry: object) -> None:
        log.append(entry)
        self._news.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._news.clear()
            await self._news.wait()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts_module, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def skip_pauses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[float]]:
    """Called inside a running loop: nobody waits before a start any more. What the pauses would
    have been is in the list."""

    def skip() -> list[float]:
        pauses: list[float] = []
        loop = asyncio.get_running_loop()
        real = loop.call_later

        def call_later(
            delay: float, callback: Callable[..., object], *args: object
        ) -> asyncio.TimerHandle:
            if getattr(callback, "__name__", "") == "_start":
                pauses.append(delay)
                delay = 0
            return real(delay, callback, *args)

        monkeypatch.setattr(loop, "call_later", call_later)
        return pauses

    return skip


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 30)

    asyncio.run(bounded())


def is_running(pid: int) -> bool:
    """True unless it has ended; an ended one that nobody has waited for has not gone yet."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_process_that_fails_is_started_again_with_the_next_epoch() -> None:
    async def work() -> None:
        office = Office(lambda worker, epoch: "fail" if epoch < 3 else "linger", A)
        office.launcher.start()
        await office.until(lambda: office.told == [("a", 1), ("a", 2), ("a", 3)])
        assert office.exits == [
            ("a", 1, "exit status 3: out of luck"),
            ("a", 2, "exit status 3: out of luck"),
        ]
        assert not office.launcher.expects(A, Epoch(2))
        assert office.launcher.expects(A, Epoch(3))
        await office.launcher.stop(0)

    run(work)


def test_the_pause_doubles_and_starts_over_after_a_minute_of_health(
    monkeypatch: pytest.MonkeyPatch, skip_pauses: Callable[[], list[float]]
) -> None:
    async def work() -> None:
        pauses = skip_pauses()
        office = Office(lambda worker, epoch: "fail" if epoch < 9 else "linger", A)
        launcher = office.launcher
        launcher.start()
        await office.until(lambda: ("a", 9) in office.told)
        monkeypatch.setattr(restarts_module, "HEALTHY_AFTER_S", 0.0)
        launcher.ready(A, Epoch(9))
        launcher.kill(A, Epoch(9))
        await office.until(lambda: ("a", 10) in office.told)
        await launcher.stop(0)
        assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 0.5]

    monkeypatch.setattr(restarts_module, "FIRST_PAUSE_S", 0.5)
    run(work)


def test_killing_concerns_one_process_of_a_slot_and_says_how_it_ended() -> None:
    async def work() -> None:
        office = Office(lambda worker, epoch: "linger", A, B)
        office.launcher.start()
        await office.until(lambda: len(office.told) == 2)
        office.launcher.kill(A, Epoch(7))
        office.launcher.kill(A, Epoch(1))
        await office.until(lambda: ("a", 2) in office.told)
        assert office.exits == [("a", 1, "killed by SIGKILL")]
        assert [(worker, epoch) for worker, epoch, _ in office.launcher.slots()] == [
            ("a", 2),
            ("b", 1),
        ]
        await office.launcher.stop(0)

    run(work)


def test_a_process_that_refuses_is_not_started_again() -> None:
    async def work() -> None:
        office = Office(lambda worker, epoch: "refuse" if worker == A else "linger", A, B)
        office.launcher.start()
        await office.until(lambda: bool(office.refused) and ("b", 1) in office.told)
        assert office.refused == [("a", "no such device")]
        assert office.exits == []
        await office.launcher.stop(0)

    run(work)


def test_stopping_waits_for_those_that_leave_and_kills_those_that_do_not() -> None:
    async def work() -> None:
        office = Office(lambda worker, epoch: "linger", A, B)
        office.launcher.start()
        await office.until(lambda: len(office.told) == 2)
        pids = [pid for _, _, pid in office.launcher.slots() if pid is not None]
        assert len(pids) == 2
        await office.launcher.stop(0.01)
        assert not any(is_running(pid) for pid in pids)
        assert office.exits == []
        assert [pid for _, _, pid in office.launcher.slots()] == [None, None]

    run(work)


def test_stopping_in_a_pause_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts_module, "FIRST_PAUSE_S", 30.0)

    async def work() -> None:
        office = Office(lambda worker, epoch: "leave", A)
        office.launcher.start()
        await office.until(lambda: bool(office.exits))
        assert office.exits == [("a", 1, "exit status 0")]
        await office.launcher.stop(0)
        assert office.told == [("a", 1)]

    run(work)


def test_a_worker_dies_with_its_launcher() -> None:
    """The launcher is killed without a word; the kernel ends the worker."""
    worker = (
        "import signal, sys\n"
        "from pdserve.serve.worker_main import die_with_launcher\n"
        "die_with_launcher()\n"
        "print('bound', flush=True)\n"
        "signal.pause()\n"
    )
    launcher = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "bound\n"
        descriptor = os.pidfd_open(pid)
        process.send_signal(signal.SIGKILL)
        assert select.select([descriptor], [], [], 10)[0], "the worker outlives its launcher"
        os.close(descriptor)


def test_a_slot_that_is_held_is_started_when_it_is_released(
    skip_pauses: Callable[[], list[float]],
) -> None:
    async def work() -> None:
        pauses = skip_pauses()
        office = Office(lambda worker, epoch: "linger", A)
        launcher = office.launcher
        launcher.start()
        await office.until(lambda: ("a", 1) in office.told)
        launcher.hold(A, 7.0)
        launcher.kill(A, Epoch(1))
        await office.until(lambda: ("a", 2) in office.told)
        launcher.hold(A, None)
        launcher.kill(A, Epoch(2))
        await office.until(lambda: len(office.exits) == 2)
        assert pauses == [7.0]  # the second time nobody starts it
        assert [pid for _, _, pid in launcher.slots()] == [None]
        launcher.release()
        await office.until(lambda: ("a", 3) in office.told)
        launcher.kill(A, Epoch(3))  # held for one end each
        await office.until(lambda: ("a", 4) in office.told)
        assert pauses == [7.0, 0.001]
        await launcher.stop(0)

    run(work)
