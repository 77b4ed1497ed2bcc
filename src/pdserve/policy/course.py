"""How many decode on a worker, from now on, and how fast: the course of things.

Whoever decodes gets a token in each step, and a step takes as long as those who decode by then make
it. So the course is worked out from one start or end of a sequence to the next, and only as far as
somebody asks. It counts twice: in seconds, by which sequences come, and in steps from now, by which
they end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

from pdserve.core.values import value
from pdserve.cost.step import StepModel

LEAST_PACE_S = 1e-9
"""Of a step that is said to take no time."""
MAX_EVENTS = 1024
"""Starts and ends that are worked out where newcomers are expected, who never end: what is further
away is as it was then."""


@value(kw_only=True)
class Flight:
    """A sequence that decodes on a worker, or will: ``starts_in_s`` is 0 once it does.

    ``context_tokens``: its length so far. ``tokens_left``: output tokens that are expected yet.
    """

    context_tokens: int
    tokens_left: float
    starts_in_s: float = 0.0


@value()
class Newcomers:
    """Who is expected beyond those who are known: each of these, and again after each period."""

    flights: Sequence[Flight] = ()
    period_s: float = inf


NOBODY = Newcomers()


class Course:
    """Of one worker with these step times. What it has worked out it keeps: ``_states`` has
    (seconds, steps, sequences, tokens of context) from each start or end on, ``_since_s`` their
    seconds. ``_running`` is a heap of (step at which it ends, tokens by then), ``_coming`` one of
    (when, in which order, tokens so far, tokens left, when again)."""

    def __init__(
        self, steps: StepModel, flights: Sequence[Flight], newcomers: Newcomers = NOBODY
    ) -> None:
        self._steps = steps
        self._num_most = MAX_EVENTS if newcomers.flights else 2 * len(flights)
        self._running: list[tuple[float, float]] = []
        self._coming: list[tuple[float, int, int, float, float]] = []
        context = 0.0
        for flight in flights:
            tokens, left = flight.context_tokens, flight.tokens_left
            if flight.starts_in_s <= 0.0:
                context += tokens
                self._running.append((left, tokens + left))
            else:
                self._coming.append((flight.starts_in_s, len(self._coming), tokens, left, inf))
        for flight in newcomers.flights:
            tokens, left, at_s = flight.context_tokens, flight.tokens_left, flight.starts_in_s
            self._coming.append((at_s, len(self._coming), tokens, left, newcomers.period_s))
        heapify(self._running)
        heapify(self._coming)
        self._states = [(0.0, 0.0, len(self._running), context)]
        self._since_s = [0.0]
        self._ended: list[tuple[float, float]] = []

    def pace_s(self, at_s: float) -> float:
        """Seconds of a step at that time."""
        if at_s == inf:
            return self._pace_s(0, 0.0)
        self._go_on(at_s)
        since_s, _, number, context = self._states[bisect_right(self._since_s, at_s) - 1]
        pace_s = self._pace_s(number, context)
        if len(self._states) > self._num_most:
            return pace_s
        return self._pace_s(number, context + number * (at_s - since_s) / pace_s)

    def ends(self) -> list[tuple[float, float]]:
        """(when, tokens by then) of each sequence's end, soonest first; where no newcomers are
        expected."""
        self._go_on(inf)
        return self._ended

    def _pace_s(self, number: int, context: float) -> float:
        steps = self._steps
        pace_s = steps.decode_base_s + steps.per_sequence_s * number
        return max(LEAST_PACE_S, pace_s + steps.per_context_token_s * context)

    def _go_on(self, until_s: float) -> None:
        """From one start or end to the next, up to that time."""
        running, coming, states = self._running, self._coming, self._states
        now_s, step, number, context = states[-1]
        while len(states) <= self._num_most:
            pace_s = self._pace_s(number, context)
            end_s = now_s + (running[0][0] - step) * pace_s if number else inf
            start_s = coming[0][0] if coming else inf
            next_s = max(now_s, min(end_s, start_s))
            if next_s > until_s or next_s == inf:
                return
            more = (next_s - now_s) / pace_s
            now_s, step, context = next_s, step + more, context + number * more
            if start_s <= end_s:
                _, order, tokens, left, again_s = coming[0]
                if again_s < inf:
                    heapreplace(coming, (start_s + again_s, order, tokens, left, again_s))
                else:
                    heappop(coming)
                heappush(running, (step + left, tokens + left))
                context += tokens
            else:
                step, tokens_then = heappop(running)
                context -= tokens_then
                self._ended.append((now_s, tokens_then))
            number = len(running)
            states.append((now_s, step, number, context))
            self._since_s.append(now_s)
