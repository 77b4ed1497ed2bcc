"""The pace of live workers, simulated: steps that stray from their model, neighbours in the way.

Only machines with a `cost.pace.Pace` (calibrated ones) have it. Workers of such machines are dealt
out to hosts as those were that were measured, and a step loses a share of its pace while a
neighbour on its host computes: when one begins, changes its kind of step or rests, what is left of
the others' steps is worked out again. A message that comes meanwhile makes the running step longer,
and so does each token that a neighbour draws, which the gateway works on. What nobody knows the
cause of is drawn, seeded by the worker's name; a slow spell lasts for as many steps as it did when
it was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt
from random import Random

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel
from pdserve.cost.pace import Lost, Pace, kind_of
from pdserve.sim.clock import Clock

LEAST_PACE = 0.05
"""Of a step, however many neighbours there are."""
_NOTHING = Lost()


class Hosts:
    """Which workers share one: ``per_host`` of each role, in the order of their numbers."""

    def __init__(self, seed: int, gap_s: float) -> None:
        """``gap_s``: between two steps, where the machine knows no better."""
        self._seed = seed
        self._gap_s = gap_s
        self._hosts: dict[tuple[str, int], list[Tempo]] = {}

    def tempo(self, clock: Clock, worker: WorkerId, machine: MachineModel) -> Tempo | None:
        """Of a new process of the worker, named after its home role; None if its machine's steps
        take just what they do."""
        if machine.pace is None:
            return None
        role, _, place = worker.rpartition("-")
        per_host = max(1, machine.pace.per_host.get(Role(role), 1))
        number = int(place) // per_host
        host = self._hosts.setdefault((machine.name, number), [])
        host[:] = [tempo for tempo in host if tempo.worker != worker]
        tempo = Tempo(clock, host, worker, machine, machine.pace, self._seed, self._gap_s)
        host.append(tempo)
        return tempo


class Tempo:
    """Of one worker. ``moved`` is told when the end of the running step is another."""

    def __init__(
        self,
        clock: Clock,
        host: list[Tempo],
        worker: WorkerId,
        machine: MachineModel,
        pace: Pace,
        seed: int,
        gap_s: float,
    ) -> None:
        self.worker = worker
        self.moved: Callable[[float], None] = lambda end_s: None
        self._clock = clock
        self._host = host
        self._step_s = machine.steps.step_s
        self._pace = pace
        self._gap_s = gap_s
        self._random = Random(f"{seed}/{worker}/pace")
        self._moods: dict[str, float] = {}
        self._draws = 0
        self._kind = ""  # of the step that runs, or ran a moment ago; empty: it rests
        self._runs = False
        self._rate = 1.0
        self._left_s = 0.0  # of the step, alone, from `_since_s` on
        self._since_s = 0.0

    def begin(self, shape: StepShape, asked_s: float) -> tuple[float, float]:
        """A step is asked for: when it begins and ends, as far as is known."""
        kind = kind_of(shape)
        begun_s = asked_s + self._gap_before(kind)
        self._left_s = self._step_s(shape) * self._strays(kind)
        self._since_s = begun_s
        self._runs = True
        self._draws = shape.num_decoding
        changed, self._kind = kind != self._kind, kind
        self._rate = self._rate_beside_others()
        if changed:
            self._tell_others()
        return begun_s, begun_s + self._left_s / self._rate

    def heard(self) -> None:
        """The process has a message to work on."""
        if self._runs:
            self._lengthen(self._pace.lost.get(self._kind, _NOTHING).per_message_s)

    def end(self) -> None:
        """The step is over, and the next one may follow at once."""
        self._runs = False
        for other in self._host:
            if other is not self and other._runs:
                lost = other._pace.lost.get(other._kind, _NOTHING)
                other._lengthen(self._draws * lost.per_token_s)

    def rest(self) -> None:
        """No step followed."""
        if self._kind and not self._runs:
            self._kind = ""
            self._tell_others()

    # --- inside -------------------------------------------------------------------------------

    def _tell_others(self) -> None:
        for other in self._host:
            if other is not self and other._runs:
                other._neighbours_changed()

    def _neighbours_changed(self) -> None:
        rate = self._rate_beside_others()
        if rate == self._rate:
            return
        self._work_off()
        self._rate = rate
        self.moved(self._since_s + self._left_s / rate)

    def _lengthen(self, more_s: float) -> None:
        if more_s:
            self._work_off()
            self._left_s += more_s
            self.moved(self._since_s + self._left_s / self._rate)

    def _work_off(self) -> None:
        """What has been computed by now is not left any more."""
        now = max(self._clock.now, self._since_s)
        self._left_s = max(0.0, self._left_s - (now - self._since_s) * self._rate)
        self._since_s = now

    def _gap_before(self, kind: str) -> float:
        gap = self._pace.gaps.get(kind)
        if gap is None:
            return self._gap_s
        computes = any(other._kind for other in self._host if other is not self)
        return gap.beside_s if computes else gap.alone_s

    def _rate_beside_others(self) -> float:
        lost = self._pace.lost.get(self._kind, _NOTHING)
        taken = sum(lost.beside(o._kind) for o in self._host if o is not self and o._kind)
        return max(LEAST_PACE, 1.0 - taken)

    def _strays(self, kind: str) -> float:
        """Measured over predicted, drawn: a normal variable that remembers, at its own level."""
        spread = self._pace.spreads.get(kind)
        if spread is None:
            return 1.0
        fresh = self._random.gauss(0.0, 1.0)
        before = self._moods.get(kind)
        memory = spread.memory
        mood = fresh if before is None else memory * before + sqrt(1.0 - memory**2) * fresh
        self._moods[kind] = mood
        return spread.at(0.5 * (1.0 + erf(mood / sqrt(2.0))))
