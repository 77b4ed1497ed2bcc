"""Who decodes where, or will: what the router knows of each decode worker's sequences.

An attempt is noted when it begins and forgotten when it ends. How far it is, and how long it will
go on, is read off the request's life when somebody asks. Nobody knows that of any single answer; so
of the sequences of a worker each is taken to lie elsewhere among the answers that went on like it,
evenly spread, and as many end early or late as should.

Who is not here yet is expected to be like those who came of late: the newcomers of a worker are the
attempts that have begun there in the last seconds, each of them once more after as long a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.request import Job
from pdserve.node.answer_lengths import AnswerLengths
from pdserve.node.lives import Attempt, Life
from pdserve.policy.course import NOBODY, Flight, Newcomers

LATE_S = 30.0
"""Newcomers are like those who came within this time."""
MAX_LATE = 128
"""Sequences of a worker that are remembered for that, the latest ones."""
GOLDEN = 0.6180339887498949
"""Its multiples, without their whole part, are evenly spread, however many there are."""

T = TypeVar("T")


class Flights:
    """By decode worker. ``ready`` times are when the prefill was expected to have ended. ``_late``
    has (when it began, how it was expected to fly) of what came of late, while anything is there.
    """

    def __init__(self, lives: Mapping[RequestId, Life], answers: AnswerLengths) -> None:
        self._lives = lives
        self._answers = answers
        self._ready_s: dict[WorkerId, dict[AttemptId, float]] = {}
        self._late: dict[WorkerId, deque[tuple[float, Flight]]] = {}

    def __len__(self) -> int:
        """Attempts under way."""
        return sum(map(len, self._ready_s.values()))

    def begin(self, job: Job, ready_s: float, now: float) -> None:
        """An attempt that its decode worker is to get has begun."""
        self._ready_s.setdefault(job.decode_worker, {})[job.attempt] = ready_s
        late = self._late.setdefault(job.decode_worker, deque(maxlen=MAX_LATE))
        request, num_tokens = self._lives[job.request_id].request, len(job.token_ids)
        for index in job.choices:
            left = self._answers.share_more(request, job.next_index, _spread(job.number + index))
            flight = Flight(
                context_tokens=num_tokens, tokens_left=left, starts_in_s=max(0.0, ready_s - now)
            )
            late.append((now, flight))

    def move(self, worker: WorkerId, job: Job) -> None:
        """A running attempt goes on at another worker."""
        self.end(job.decode_worker, job.attempt)
        self._ready_s.setdefault(worker, {})[job.attempt] = 0.0

    def end(self, worker: WorkerId, attempt: AttemptId) -> None:
        """It is over, or goes on elsewhere."""
        there = self._ready_s[worker]
        del there[attempt]
        if not there:
            del self._ready_s[worker]
            self._late.pop(worker, None)

    def at(self, now: float) -> Mapping[WorkerId, tuple[Flight, ...]]:
        """As things are now. Good until the router hears something."""
        return _Now(self._ready_s, self.of, now)

    def newcomers_at(self, now: float) -> Mapping[WorkerId, Newcomers]:
        """Whom each worker that has any attempts is to expect. Good for as long."""
        return _Now(self._late, self.newcomers, now)

    def workers(self) -> Mapping[WorkerId, Mapping[AttemptId, float]]:
        """Ready times of the attempts of each worker that has any."""
        return self._ready_s

    def of(self, worker: WorkerId, now: float) -> tuple[Flight, ...]:
        """The worker's sequences."""
        flights: list[Flight] = []
        more = self._answers.share_more
        for attempt_id, ready_s in self._ready_s.get(worker, {}).items():
            life = self._lives[attempt_id.request_id]
            attempt = life.attempts[attempt_id.epoch]
            num_prompt_tokens = len(life.request.prompt_token_ids)
            for choice in life.choices:
                if choice.epoch != attempt_id.epoch or choice.finish is not None:
                    continue
                num_taken = len(choice.taken)
                decodes = attempt.accepted or _decodes_in_place(attempt, num_taken)
                flights.append(
                    Flight(
                        context_tokens=num_prompt_tokens + num_taken,
                        tokens_left=more(life.request, num_taken, _spread(len(flights))),
                        starts_in_s=0.0 if decodes else max(0.0, ready_s - now),
                    )
                )
        return tuple(flights)

    def newcomers(self, worker: WorkerId, now: float) -> Newcomers:
        """Who is expected there beyond its sequences."""
        late = self._late.get(worker)
        if not late:
            return NOBODY
        while late and late[0][0] <= now - LATE_S:
            late.popleft()
        period_s = now - late[0][0] if len(late) == MAX_LATE else LATE_S
        if not late or period_s <= 0.0:
            return NOBODY
        flights = tuple(
            Flight(
                context_tokens=flight.context_tokens,
                tokens_left=flight.tokens_left,
                starts_in_s=flight.starts_in_s + period_s - (now - begun_s),
            )
            for begun_s, flight in late
        )
        return Newcomers(flights, period_s)


class _Now(Mapping[WorkerId, T]):
    """Looks up only what a policy asks for: it asks for a few workers of many."""

    def __init__(
        self, known: Mapping[WorkerId, object], of: Callable[[WorkerId, float], T], now: float
    ) -> None:
        self._known = known
        self._of = of
        self._now = now

    def __getitem__(self, worker: WorkerId) -> T:
        if worker not in self._known:
            raise KeyError(worker)
        return self._of(worker, self._now)

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _spread(number: int) -> float:
    """From 0 to below 1."""
    return (0.5 + number * GOLDEN) % 1.0


def _decodes_in_place(attempt: Attempt, num_taken: int) -> bool:
    return attempt.job.is_local and num_taken > attempt.job.next_index
