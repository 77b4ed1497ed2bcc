"""A failure scenario in a simulation, scored as a live run of it is.

Before the run it is given to the simulation as an observer and told to `begin`. When the last
request is over nothing more happens, and what can be undone is undone, as at the end of a live run;
once all is quiet the pools are looked at.
"""

from __future__ import annotations

import math
from typing import Any

from pdserve.core.commands import Answer, ChangeRole, Command, DrainOne, UndrainOne
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.simulation import Simulation
from pdserve.workload.outcome import Outcome
from pdserve.workload.scenario import Event, Kind, Scenario
from pdserve.workload.scenario_cast import Cast, Hit, Member
from pdserve.workload.scenario_score import BlocksLeft, ScenarioScore
from pdserve.workload.slo import Slo


class ScenarioPlayer(Observer):
    """One run. ``document`` is there when it is over."""

    def __init__(self, scenario: Scenario, slo: Slo | None) -> None:
        self.document: dict[str, Any] = {}
        self._scenario = scenario
        self._hits: list[Hit] = []
        self._score = ScenarioScore(scenario, slo, self._hits)
        self._cast = Cast(scenario)
        self._simulation: Simulation
        self._undo: list[tuple[Hit, Any]] = []
        self._commands: dict[int, Hit] = {}

    def begin(self, simulation: Simulation) -> None:
        """Before it runs: have the events happen at their times."""
        self._simulation = simulation
        simulation.when_over.append(self._over)
        simulation.on_answer = self._answered
        for number, event in enumerate(self._scenario.events):
            simulation.at(event.at_s, self._happens, number, event)

    # --- what it hears ------------------------------------------------------------------------

    def worker_up(self, at_s: float, worker: WorkerId, role: Role, machine: str) -> None:
        for hit in self._hits:
            hit.worker_up(worker, at_s)

    def ended(self, at_s: float, request: Ended) -> None:
        self._score.add(_outcome(request, at_s))

    def done(self, at_s: float) -> None:
        simulation = self._simulation
        for client in simulation.clients.open.values():
            self._score.never_ended(client.asked.index, client.arrived_s)
        self.document = self._score.document(
            [self._left(worker) for worker in sorted(simulation.slots)],
            settled=simulation.is_settled,
        )

    # --- what it does -------------------------------------------------------------------------

    def _happens(self, number: int, event: Event) -> None:
        simulation = self._simulation
        if simulation.is_over:
            return
        hit = self._cast.hit(number, event, self._members(), simulation.now)
        self._hits.append(hit)
        if not hit.workers:
            return
        match event.kind:
            case Kind.KILL:
                self._kill(event, hit)
            case Kind.HANG:
                self._hang(event, hit)
            case Kind.PARTITION:
                for pair in hit.pairs:
                    simulation.links.cut_off(pair)
                self._ends_after(hit, event.for_s, self._heal)
            case Kind.SLOW_LINK:
                for pair in hit.pairs:
                    simulation.links.slow_down(pair, event.factor)
                self._ends_after(hit, event.for_s, self._speed_up)
            case _:
                self._operate(event, hit)

    def _members(self) -> list[Member]:
        simulation = self._simulation
        pools = simulation.router.pools.slots
        return [
            Member(
                worker,
                pools[worker].role if worker in pools else group.role,
                worker in simulation.workers,
            )
            for worker, group in simulation.slots.items()
        ]

    def _kill(self, event: Event, hit: Hit) -> None:
        simulation = self._simulation
        for worker in hit.workers:
            after_s = event.restart_after_s
            if after_s is not None:
                simulation.launcher.hold(worker, after_s if math.isfinite(after_s) else None)
            if worker in simulation.workers:
                hit.waits_for.add(worker)
                simulation.kill_worker(worker)
            else:
                hit.detail = f"{worker} has no process"
        if not hit.waits_for:
            hit.over_s = simulation.now

    def _hang(self, event: Event, hit: Hit) -> None:
        simulation = self._simulation
        for worker in hit.workers:
            process = simulation.workers.get(worker)
            if process is None:
                hit.detail = f"{worker} has no process"
                continue
            hit.waits_for.add(worker)
            process.fall_asleep()
        if not hit.waits_for:
            hit.over_s = simulation.now
        self._ends_after(hit, event.for_s, self._wake)

    def _operate(self, event: Event, hit: Hit) -> None:
        """What an operator does. It is over when the router has answered."""
        for worker in hit.workers:
            number = len(self._commands) + 1
            self._commands[number] = hit
            asked: Command
            if event.role is not None:
                asked = ChangeRole(command=number, worker=worker, role=event.role)
            elif event.kind is Kind.DRAIN:
                asked = DrainOne(command=number, worker=worker)
            else:
                asked = UndrainOne(command=number, worker=worker)
            self._simulation.gateway.hear(asked)

    def _answered(self, answer: Answer) -> None:
        hit = self._commands.get(answer.command)
        if hit is not None:
            hit.over_s = self._simulation.now
            if answer.refused is not None:
                hit.detail = answer.detail

    # --- what ends it -------------------------------------------------------------------------

    def _ends_after(self, hit: Hit, seconds: float, end: Any) -> None:
        undo = (hit, end)
        self._undo.append(undo)
        if math.isfinite(seconds):
            self._simulation.at(self._simulation.now + seconds, self._end, undo)

    def _end(self, undo: tuple[Hit, Any]) -> None:
        if undo in self._undo:
            self._undo.remove(undo)
            hit, end = undo
            end(hit)

    def _heal(self, hit: Hit) -> None:
        for pair in hit.pairs:
            self._simulation.links.heal(pair)
        hit.over_s = self._simulation.now

    def _speed_up(self, hit: Hit) -> None:
        for pair in hit.pairs:
            self._simulation.links.speed_up(pair, hit.event.factor)
        hit.over_s = self._simulation.now

    def _wake(self, hit: Hit) -> None:
        """Whoever has not been killed meanwhile goes on."""
        for worker in sorted(hit.waits_for):
            process = self._simulation.workers.get(worker)
            if process is not None and process.sleeps:
                process.wake()
                hit.worker_up(worker, self._simulation.now)

    def _over(self) -> None:
        """The load is over."""
        for undo in list(self._undo):
            self._end(undo)
        self._simulation.launcher.release()

    def _left(self, worker: WorkerId) -> BlocksLeft:
        process = self._simulation.workers.get(worker)
        if process is None:
            return BlocksLeft(worker, up=False)
        pool = process.node.batch.tables.pool
        return BlocksLeft(
            worker,
            up=True,
            total=process.settings.num_blocks,
            free=pool.num_free,
            quarantined=pool.num_quarantined,
        )


def _outcome(request: Ended, at_s: float) -> Outcome:
    """As a load client would have written it down."""
    return Outcome(
        index=request.index,
        response_id=request.request_id,
        due_s=request.arrived_s,
        sent_s=request.arrived_s,
        ending=request.ending,
        first_s=request.first_s,
        last_s=request.last_s,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=request.cached_tokens,
        output_tokens=request.output_tokens,
        ended_s=at_s,
        failure=request.failure,
    )
