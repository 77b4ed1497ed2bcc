"""A failure scenario against a live server, while the load runs.

Processes are killed and stopped with signals, so these scenarios run on the server's own host;
links are cut and slowed, and restarts put off, by the server itself, which takes that only if it
was started with ``--allow-faults``. What cannot be done is refused before the load begins.

`FaultRunner.prepare`, then `begin` with the load, `end` after it: whatever is stopped then goes on,
whatever is cut is healed. `settle` waits until the cluster is whole and idle, and looks at what is
left in its pools.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from pdserve.bench.processes import check_worker_process, send_signal
from pdserve.bench.target import Target
from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.workload.scenario import Event, Kind, Scenario
from pdserve.workload.scenario_cast import Cast, Hit, Member
from pdserve.workload.scenario_score import BlocksLeft

LOOK_EVERY_S = 0.1
SETTLE_S = 60.0
COMMAND_TIMEOUT_S = 600.0
_UP = ("ready", "draining")


class FaultRunner:
    """One run. ``hits`` grows as events happen; their times count from ``start_s``."""

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scenario = scenario
        self.hits: list[Hit] = []
        self._target = target
        self._cast = Cast(scenario)
        self._clock = clock
        self._start_s = 0.0
        self._stopped: dict[WorkerId, int] = {}
        self._awaited: list[tuple[Hit, WorkerId, int]] = []
        self._processes: dict[WorkerId, tuple[int, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._uses_hooks = False

    async def prepare(self) -> None:
        """Raises `ConfigError` for what this server, or this host, cannot have done to it."""
        cluster = await self._cluster()
        events = self.scenario.events
        self._uses_hooks = any(
            event.kind.is_of_links or event.restart_after_s is not None for event in events
        )
        if self._uses_hooks and cluster.get("faults") is None:
            raise ConfigError(
                f"{self.scenario.name} disturbs links or restarts, and the server at "
                f"{self._target.base_url} takes no faults: start it with --allow-faults"
            )
        if any(event.kind in (Kind.KILL, Kind.HANG) for event in events):
            for worker in cluster["workers"]:
                if worker["pid"] is not None:
                    check_worker_process(WorkerId(worker["id"]), worker["pid"])

    def begin(self, start_s: float) -> None:
        """The load begins: so does the scenario. ``start_s`` is read from the clock."""
        self._start_s = start_s
        self._spawn(self._play())
        self._spawn(self._look())

    async def end(self) -> None:
        """The load is over: nothing more happens, and what can be undone is undone."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for hit, worker, _ in self._awaited:
            if worker in self._stopped and send_signal(
                worker, self._stopped[worker], signal.SIGCONT
            ):
                hit.worker_up(worker, self._now())
        self._stopped.clear()
        if self._uses_hooks:
            await self._target.ask("DELETE", "/cluster/faults")
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def settle(self, timeout_s: float = SETTLE_S) -> tuple[list[BlocksLeft], bool]:
        """Each worker's pool, and whether all was idle and up when it was looked at."""
        deadline_s = self._clock() + timeout_s
        while True:
            cluster = await self._cluster()
            self._note_new(cluster)
            left = [_left(worker) for worker in cluster["workers"]]
            is_idle = cluster["open_requests"] == 0 and all(
                worker.up and worker.leaked == 0 and worker.quarantined == 0 for worker in left
            )
            if is_idle or self._clock() > deadline_s:
                return left, is_idle
            await asyncio.sleep(LOOK_EVERY_S)

    # --- the play -----------------------------------------------------------------------------

    async def _play(self) -> None:
        for number, event in enumerate(self.scenario.events):
            await asyncio.sleep(max(0.0, event.at_s - self._now()))
            cluster = await self._cluster()
            members = [
                Member(WorkerId(worker["id"]), Role(worker["role"]), worker["state"] in _UP)
                for worker in cluster["workers"]
            ]
            self._processes = {
                WorkerId(worker["id"]): (worker["epoch"], worker["pid"] or 0)
                for worker in cluster["workers"]
            }
            hit = self._cast.hit(number, event, members, self._now())
            self.hits.append(hit)
            if hit.workers:
                await self._do(event, hit)
            hit.at_s = self._now()

    async def _do(self, event: Event, hit: Hit) -> None:
        match event.kind:
            case Kind.KILL:
                await self._kill(event, hit)
            case Kind.HANG:
                self._hang(event, hit)
            case Kind.SLOW_LINK | Kind.PARTITION:
                await self._disturb(event, hit)
            case _:
                for worker in hit.workers:
                    self._spawn(self._operate(event, worker, hit))

    async def _kill(self, event: Event, hit: Hit) -> None:
        for worker in hit.workers:
            epoch, pid = self._processes[worker]
            if event.restart_after_s is not None:
                held_s = event.restart_after_s
                await self._order(
                    "/cluster/faults/holds",
                    {"worker": worker, "for_s": held_s if math.isfinite(held_s) else None},
                )
            if pid and send_signal(worker, pid, signal.SIGKILL):
                self._await_next_process(hit, worker, epoch)
            else:
                hit.detail = f"{worker} has no process"
        if not hit.waits_for:
            hit.over_s = self._now()

    def _hang(self, event: Event, hit: Hit) -> None:
        for worker in hit.workers:
            epoch, pid = self._processes[worker]
            if pid and send_signal(worker, pid, signal.SIGSTOP):
                self._stopped[worker] = pid
                self._await_next_process(hit, worker, epoch)
                if math.isfinite(event.for_s):
                    self._spawn(self._wake(hit, worker, pid, event.for_s))
            else:
                hit.detail = f"{worker} has no process"
        if not hit.waits_for:
            hit.over_s = self._now()

    async def _wake(self, hit: Hit, worker: WorkerId, pid: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if self._stopped.get(worker) == pid:
            del self._stopped[worker]
            if send_signal(worker, pid, signal.SIGCONT):
                hit.worker_up(worker, self._now())

    async def _disturb(self, event: Event, hit: Hit) -> None:
        body: dict[str, object] = {"pairs": [list(pair) for pair in hit.pairs]}
        if event.kind is Kind.SLOW_LINK:
            body["factor"] = event.factor
        if math.isfinite(event.for_s):
            body["for_s"] = event.for_s
            hit.over_s = self._now() + event.for_s
        await self._order("/cluster/faults/links", body)

    async def _operate(self, event: Event, worker: WorkerId, hit: Hit) -> None:
        """As an operator would; a drain takes as long as it takes."""
        body = {"role": event.role} if event.kind is Kind.ROLE else {}
        path = f"/cluster/workers/{worker}/{event.kind}"
        status, answer = await self._target.ask("POST", path, body, COMMAND_TIMEOUT_S)
        hit.over_s = self._now()
        if status != 200:
            hit.detail = str(answer.get("error", status))

    # --- who is back --------------------------------------------------------------------------

    def _await_next_process(self, hit: Hit, worker: WorkerId, epoch: int) -> None:
        hit.waits_for.add(worker)
        self._awaited.append((hit, worker, epoch))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._awaited:
                with suppress(UnavailableError):  # busy; it is asked again
                    self._note_new(await self._cluster())

    def _note_new(self, cluster: Mapping[str, Any]) -> None:
        """Whoever is up in place of a process that was hit."""
        up = {shown["id"]: shown["epoch"] for shown in cluster["workers"] if shown["state"] in _UP}
        for hit, worker, epoch in self._awaited:
            if up.get(worker, 0) > epoch:
                self._stopped.pop(worker, None)
                hit.worker_up(worker, self._now())
        self._awaited = [found for found in self._awaited if found[1] in found[0].waits_for]

    # --- the server ---------------------------------------------------------------------------

    async def _cluster(self) -> Mapping[str, Any]:
        status, document = await self._target.ask("GET", "/cluster")
        if status != 200 or "workers" not in document:
            raise ConfigError(
                f"{self._target.base_url} has no /cluster (status {status}): a failure scenario "
                "needs a pdserve server, and its --api-key if it has one"
            )
        return document

    async def _order(self, path: str, body: Mapping[str, object]) -> None:
        status, answer = await self._target.ask("POST", path, body)
        if status != 200:
            raise UnavailableError(f"{path}: {answer.get('error', f'status {status}')}")

    def _now(self) -> float:
        return self._clock() - self._start_s

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work))


def _left(worker: Mapping[str, Any]) -> BlocksLeft:
    blocks = worker["blocks"]
    if worker["state"] not in _UP or blocks is None:
        return BlocksLeft(WorkerId(worker["id"]), up=False)
    return BlocksLeft(
        WorkerId(worker["id"]),
        up=True,
        total=blocks["total"],
        free=blocks["free"],
        quarantined=blocks["quarantined"],
    )
