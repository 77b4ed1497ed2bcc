"""Who decodes where, or will: what the router knows of each decode worker's sequences.

An attempt is noted when it begins and forgotten when it ends. How far it is, and how long it will
go on, is read off the request's life when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.node.answer_lengths import AnswerLengths
from pdserve.node.lives import Attempt, Life
from pdserve.policy.forecast import Flight


class Flights:
    """By decode worker. ``ready`` times are when the prefill was expected to have ended."""

    def __init__(self, lives: Mapping[RequestId, Life], answers: AnswerLengths) -> None:
        self._lives = lives
        self._answers = answers
        self._ready_s: dict[WorkerId, dict[AttemptId, float]] = {}

    def __len__(self) -> int:
        """Attempts under way."""
        return sum(map(len, self._ready_s.values()))

    def begin(self, worker: WorkerId, attempt: AttemptId, ready_s: float) -> None:
        """An attempt that this worker will decode has begun."""
        self._ready_s.setdefault(worker, {})[attempt] = ready_s

    def end(self, worker: WorkerId, attempt: AttemptId) -> None:
        """It is over, or goes on elsewhere."""
        there = self._ready_s[worker]
        del there[attempt]
        if not there:
            del self._ready_s[worker]

    def at(self, now: float) -> Mapping[WorkerId, tuple[Flight, ...]]:
        """As things are now. Good until the router hears something."""
        return _FlightsNow(self, now)

    def workers(self) -> Mapping[WorkerId, Mapping[AttemptId, float]]:
        """Ready times of the attempts of each worker that has any."""
        return self._ready_s

    def of(self, worker: WorkerId, now: float) -> tuple[Flight, ...]:
        """The worker's sequences."""
        flights: list[Flight] = []
        for attempt_id, ready_s in self._ready_s.get(worker, {}).items():
            life = self._lives[attempt_id.request_id]
            attempt = life.attempts[attempt_id.epoch]
            num_prompt_tokens = len(life.request.prompt_token_ids)
            for choice in life.choices:
                if choice.epoch != attempt_id.epoch or choice.finish is not None:
                    continue
                decodes = attempt.accepted or _decodes_in_place(attempt, len(choice.taken))
                flights.append(
                    Flight(
                        context_tokens=num_prompt_tokens + len(choice.taken),
                        tokens_left=self._answers.expect_more(life.request, choice),
                        starts_in_s=0.0 if decodes else max(0.0, ready_s - now),
                    )
                )
        return tuple(flights)


class _FlightsNow(Mapping[WorkerId, tuple[Flight, ...]]):
    """Looks up only what a policy asks for: it asks for a few workers of many."""

    def __init__(self, flights: Flights, now: float) -> None:
        self._flights = flights
        self._now = now

    def __getitem__(self, worker: WorkerId) -> tuple[Flight, ...]:
        if worker not in self._flights.workers():
            raise KeyError(worker)
        return self._flights.of(worker, self._now)

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(self._flights.workers())

    def __len__(self) -> int:
        return len(self._flights.workers())


def _decodes_in_place(attempt: Attempt, num_taken: int) -> bool:
    return attempt.job.is_local and num_taken > attempt.job.next_index
