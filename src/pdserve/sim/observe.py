"""What a simulation says of itself while it runs.

Reports, plots and logs are made by observers, each of which takes what it needs and keeps what it
must: a run of any length holds no more than they do. Calls come in the order of events; the times
in them are virtual seconds. An observer changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.core.events import LifeEvent
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import DEFAULT_SERVICE, Role, ServiceClass
from pdserve.core.step import StepShape
from pdserve.core.values import value
from pdserve.workload.outcome import Ending, time_per_token_s


@value(kw_only=True)
class Ended:
    """One request that is over, as its client saw it. ``arrived_s``: when it sent the request.
    ``first_s``, ``second_s`` and ``last_s``: when it had its first, second and last token, None if
    there was none. ``failure``: the kind of refusal or failure, if that is how it ended.
    ``cancelled``: the client left. ``prefill`` and ``decode``: of the last attempt, None if there
    was none. ``attempts``: how many there were."""

    index: int
    request_id: RequestId
    arrived_s: float
    first_s: float | None
    second_s: float | None
    last_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    service: ServiceClass = DEFAULT_SERVICE
    tenant: str = ""
    prefill: WorkerId | None = None
    decode: WorkerId | None = None
    attempts: int = 1
    failure: str | None = None
    cancelled: bool = False

    @property
    def ending(self) -> Ending:
        if self.cancelled:
            return Ending.CANCELLED
        return Ending.COMPLETED if self.failure is None else Ending.FAILED

    @property
    def ttft_s(self) -> float | None:
        """As `Outcome.ttft_s`; so are the others as theirs."""
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        return time_per_token_s(self.first_s, self.last_s, self.output_tokens)

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_s is None else self.last_s - self.arrived_s

    @property
    def second_gap_s(self) -> float | None:
        """From the first token to the second: what of the hand-off the client sees."""
        if self.first_s is None or self.second_s is None:
            return None
        return self.second_s - self.first_s


class Observer:
    """Does nothing with anything: a base to override what is needed of."""

    def arrived(self, at_s: float, request_id: RequestId, prompt_tokens: int) -> None:
        """A client has sent a request."""

    def ended(self, at_s: float, request: Ended) -> None:
        """A request is over."""

    def gaps(self, gaps_s: Sequence[float], count: int) -> None:
        """For each of these: ``count`` times, a client's token came so long after the one before
        it."""

    def steps(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        """A worker has computed ``count`` steps from ``begun_s`` to ``ended_s``, without a pause
        between them; ``shape`` is that of the last one. More than one: all only decoded."""

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None:
        """A transfer is over."""

    def worker_up(self, at_s: float, worker: WorkerId, role: Role, machine: str) -> None:
        """A worker process is ready."""

    def worker_lost(self, at_s: float, worker: WorkerId) -> None:
        """A worker process has died."""

    def role_changed(self, at_s: float, worker: WorkerId, role: Role) -> None:
        """The router has moved a worker to another pool."""

    def life(self, event: LifeEvent) -> None:
        """A life event, as the live server logs them."""

    def sampled(self, at_s: float, loads: dict[WorkerId, WorkerLoad], num_queued: int) -> None:
        """Every so often: what each worker holds, and how many requests wait in the router."""

    def done(self, at_s: float) -> None:
        """The run is over."""


@value()
class WorkerLoad:
    """What a worker holds at a moment."""

    role: Role
    num_waiting: int
    num_decoding: int
    pending_prefill_tokens: int
    used_blocks: int
    num_blocks: int


class Told:
    """Which observers want to hear what: those that override a hook."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        def wanting(hook: str) -> tuple[Callable[..., None], ...]:
            base = getattr(Observer, hook)
            return tuple(getattr(o, hook) for o in observers if getattr(type(o), hook) is not base)

        self.arrived = wanting("arrived")
        self.ended = wanting("ended")
        self.gaps = wanting("gaps")
        self.steps = wanting("steps")
        self.sent = wanting("sent")
        self.worker_up = wanting("worker_up")
        self.worker_lost = wanting("worker_lost")
        self.role_changed = wanting("role_changed")
        self.life = wanting("life")
        self.sampled = wanting("sampled")
        self.done = wanting("done")
