"""The engine of a simulated worker: steps that take time, and the tokens that they draw.

A step draws what the clients' answers need: an ordinary token, or the one that ends an answer where
the trace says so. While the same sequences decode and nobody else comes, steps are alike but for
the length of the context: such a *stretch* passes in one go. The machine is told of it when an
answer ends, or before it is told anything else; in between only the clock knows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from operator import sub
from typing import Protocol

from pdserve.core.effects import Input, RunStep, StepsDone
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.step import StepPlan, StepShape
from pdserve.cost.machine import MachineModel, decode_times
from pdserve.node.sequence import Sequence as Rider
from pdserve.node.worker import WorkerNode
from pdserve.sim.clients import ENDING, Client
from pdserve.sim.clock import Clock
from pdserve.sim.conditions import Pacer

FIRST_LOOK_STEPS = 32
"""Steps of a stretch whose times are worked out at first; then twice as many, and so on."""
NEVER = 1 << 60


class Audience(Protocol):
    """Who is told what engines do, and knows whose answers they write."""

    @property
    def open_clients(self) -> dict[RequestId, Client]: ...

    def drawn(self, client: Client, index: int, at_s: float) -> None:
        """A token whose predecessor was not drawn in this engine's last step."""

    def drawn_on(self, gaps_s: Sequence[float], count: int) -> None:
        """Tokens that so many clients get at a time, each so long after the one before it."""

    def left_at(self, client: Client, at_s: float) -> None:
        """The token with which the client leaves."""

    def stepped(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None: ...


class VirtualEngine:
    """Runs a step, or a stretch of them, at a time. ``feed(input, at_s)`` is how the machine hears;
    ``at_s`` may be past: the end of a step of which nobody had to know till now."""

    def __init__(
        self,
        clock: Clock,
        audience: Audience,
        machine: MachineModel,
        node: WorkerNode,
        feed: Callable[[Input, float], None],
        step_gap_s: float,
        *,
        stretches: bool = True,
        pacer: Pacer | None = None,
        moved: Callable[[float], None] = lambda end_s: None,
    ) -> None:
        """Without ``stretches`` the machine is told of each step when it ends; so it is of steps
        that have a ``pacer``, which take what that says. ``moved`` is told when that gives the
        running step another end."""
        self._clock = clock
        self._audience = audience
        self._worker = node.settings.worker
        self._step_s = machine.steps.step_s
        self._decodes_s = decode_times(machine.steps)
        self._gap_s = step_gap_s
        self._stretches = stretches and pacer is None
        self._pacer = pacer
        if pacer is not None:
            pacer.moved = self._moved
        self._tell_moved = moved
        self._node = node
        self._feed = feed
        self._plan: StepPlan | None = None
        self._shape = StepShape()
        self._begun_s = 0.0
        self._ends: list[float] = []  # of the steps of the stretch, as far as they are worked out
        self._limit = 1  # steps that the stretch can have
        self._look = 1  # of which so many are looked at
        self._version = 0
        self._hears = False
        self._is_new = False  # the step has begun while the machine was hearing something
        self._riders: Sequence[Rider] | None = None
        self._boarding = 0
        self._newcomers: list[tuple[Client, int]] = []
        self._num_drawing = 0
        self._left = NEVER  # steps after the running one until something notable is drawn
        self._last_end_s = 0.0
        self._paused = False

    @property
    def span(self) -> tuple[float, float]:
        """When the step that runs has begun, and when it ends."""
        return self._begun_s, self._ends[0]

    def run(self, effect: RunStep, at_s: float) -> None:
        """The machine's next step begins."""
        self._plan = effect.plan
        self._shape = effect.plan.shape
        if self._pacer is None:
            self._begun_s = at_s + self._gap_s
            self._ends = [self._begun_s + self._step_s(self._shape)]
        else:
            self._begun_s, ended_s = self._pacer.begin(self._shape, at_s)
            self._ends = [ended_s]
        riders = self._node.riders
        if riders is not self._riders:
            self._riders = riders
            self._board(riders)
        if self._hears:
            self._limit, self._is_new = 1, True
        else:
            self._limit = self._far()
            self._expect(FIRST_LOOK_STEPS)

    def begin_to_hear(self, now: float) -> None:
        """The machine is to hear something: tell it of the steps that have ended by now. How far
        the one that runs then may go is not asked before it has heard (`look_again`)."""
        self._hears = True
        self.catch_up(now)

    def catch_up(self, now: float) -> None:
        """Tell the machine of the steps that have ended by now."""
        while self._plan is not None and self._ends[0] <= now:
            self._tell(min(bisect_right(self._ends, now), self._limit))

    def look_again(self) -> None:
        """The machine has heard something: the stretch may be shorter or longer for it. One that
        ends with the running step is left at that: the next one starts with it."""
        self._hears = False
        if self._plan is None:
            return
        if self._is_new:
            self._is_new = False
            self._limit = self._far()
            self._expect(FIRST_LOOK_STEPS)
        elif self._limit > 1:
            self._limit = self._far()
            if self._limit < self._look:
                self._expect(self._limit)

    def pause(self) -> None:
        """The process does nothing from now on; what had ended before is told."""
        self.catch_up(self._clock.now)
        self._paused = True
        self._version += 1

    def resume(self, slept_s: float) -> None:
        """It goes on: what runs ends so much later."""
        self._paused = False
        if self._plan is not None:
            self._ends = [end_s + slept_s for end_s in self._ends]
            self._expect(self._look)

    def stop(self) -> None:
        """The process is dead."""
        self._plan = None
        self._version += 1
        if self._pacer is not None:
            self._pacer.end()
            self._pacer.rest()

    # --- inside -------------------------------------------------------------------------------

    def _moved(self, end_s: float) -> None:
        """The running step ends at another time: a neighbour has begun or stopped computing."""
        if self._plan is not None:
            self._ends = [end_s]
            if not self._paused:
                self._expect(1)
            self._tell_moved(end_s)

    def _far(self) -> int:
        """Steps until something other than time may pass."""
        if not self._stretches or self._shape.prompt_tokens or not self._left:
            return 1
        steps = self._node.steady_steps()
        return 1 if steps < 1 else min(steps, self._left + 1)

    def _expect(self, look: int) -> None:
        """Be called when the next so many steps are over, or all of the stretch."""
        self._version += 1
        if look > self._limit:
            look = self._limit
        self._look = look
        ends = self._ends
        if len(ends) < look:
            self._work_out(look)
        self._clock.at(ends[look - 1], self._due, self._version)

    def _work_out(self, num_steps: int) -> None:
        ends, gap_s = self._ends, self._gap_s
        first = len(ends)
        batch, context = self._shape.num_decoding, self._shape.context_tokens
        lengths = range(context + first * batch, context + num_steps * batch, batch)
        end_s, steps_s = ends[-1], self._decodes_s(batch, lengths)
        if not gap_s:
            ends += islice(accumulate(steps_s, initial=end_s), 1, None)
            return
        for step_s in steps_s:
            end_s = end_s + gap_s + step_s
            ends.append(end_s)

    def _due(self, version: int) -> None:
        if version != self._version or self._plan is None:
            return
        if self._look < self._limit:
            self._expect(2 * self._look)
        else:
            self._tell(self._limit)

    def _tell(self, count: int) -> None:
        """So many steps of the stretch are over."""
        ends, shape, begun_s = self._ends, self._shape, self._begun_s
        self._plan = None
        self._count_gaps(count)
        ended: tuple[tuple[int, int], ...] = ()
        if count > self._left:
            ended = self._ended(count)
        self._left -= count
        self._last_end_s = ended_s = ends[count - 1]
        if count > 1:
            shape = StepShape(
                0, 0, shape.num_decoding, shape.context_tokens + (count - 1) * shape.num_decoding
            )
        self._audience.stepped(self._worker, begun_s, ended_s, shape, count)
        elapsed_s = ended_s - begun_s - (count - 1) * self._gap_s
        if self._pacer is None:
            self._feed(StepsDone(count, elapsed_s, ended), ended_s)
            return
        self._pacer.end()
        self._feed(StepsDone(count, elapsed_s, ended), ended_s)
        self._pacer.rest()

    # --- who draws ----------------------------------------------------------------------------

    def _drawing(self, riders: Sequence[Rider]) -> list[tuple[int, Rider, Client]]:
        """Rows whose tokens a client waits for."""
        clients, draws = self._audience.open_clients, self._node.draws
        decodes_only = not self._shape.prompt_tokens
        return [
            (row, rider, client)
            for row, rider in enumerate(riders)
            if (client := clients.get(rider.attempt.request_id)) is not None
            and (decodes_only or draws(rider))
        ]

    def _board(self, riders: Sequence[Rider]) -> None:
        """Other sequences ride than in the step before: who is new, and who draws something notable
        first?"""
        before, self._boarding = self._boarding, self._boarding + 1
        here, now = (self._worker, before), (self._worker, self._boarding)
        newcomers = []
        least = NEVER
        drawing = self._drawing(riders)
        for _, rider, client in drawing:
            index = rider.num_tokens - rider.num_prompt_tokens
            left = client.notable_index - index
            if left < least:
                least = left
            if client.rides != here or index == 1:  # the second token is of interest
                newcomers.append((client, index))
            client.rides = now
        self._newcomers = newcomers
        self._num_drawing = len(drawing)
        self._left = max(0, least)

    def _count_gaps(self, count: int) -> None:
        """What the clients see of these steps: time between tokens."""
        ends, audience = self._ends, self._audience
        for client, index in self._newcomers:
            audience.drawn(client, index, ends[0])
        num_others = self._num_drawing - len(self._newcomers)
        if self._newcomers:
            self._newcomers = []
        if num_others:
            audience.drawn_on((ends[0] - self._last_end_s,), num_others)
        if count > 1 and self._num_drawing:
            audience.drawn_on(list(map(sub, ends[1:count], ends)), self._num_drawing)

    def _ended(self, count: int) -> tuple[tuple[int, int], ...]:
        """Rows that draw the end of an answer in the last of these steps."""
        assert self._riders is not None
        ended = []
        for row, rider, client in self._drawing(self._riders):
            index = rider.next_index + count - 1
            if index >= client.last_index:
                ended.append((row, ENDING))
            elif index == client.notable_index:
                client.notable_index = client.last_index
                self._audience.left_at(client, self._ends[count - 1])
        self._riders = None  # others ride from now on, or for other reasons
        return tuple(ended)
