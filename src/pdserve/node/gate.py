"""Who may come in: the first thing that happens to a request in the router.

Refused is what no worker could ever hold, everybody while the server drains, whoever finds the
queue full, and what the admission policy (``policy.admission``) says would miss the bounds of its
class. A refusal for lack of room names the time after which it is worth trying again.
"""

from __future__ import annotations

from pdserve.core.effects import Refusal
from pdserve.core.values import value
from pdserve.node.books import ClusterBooks
from pdserve.node.dispatch import Dispatch
from pdserve.node.lives import Life
from pdserve.node.settings import RouterSettings
from pdserve.policy.admission import ADMISSION_POLICIES, Admission
from pdserve.policy.forecast import LoadView

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


@value()
class Verdict:
    """``refused`` is one of `Refusal`, or None: let in."""

    refused: str | None
    detail: str = ""
    retry_after_s: float | None = None


_LET_IN = Verdict(None)


class Gate:
    """Owned by the router; times are its own."""

    def __init__(self, settings: RouterSettings, books: ClusterBooks, dispatch: Dispatch) -> None:
        self.draining = False
        self._settings = settings
        self._books = books
        self._dispatch = dispatch
        self._policy = ADMISSION_POLICIES[settings.admission]()
        self._finished_at_s = 0.0
        self._finish_interval_s = 1.0

    def start(self, now: float) -> None:
        self._finished_at_s = now

    def finished(self, now: float) -> None:
        """A request has ended as it should: so much room comes in so much time."""
        interval_s = now - self._finished_at_s
        self._finish_interval_s += 0.2 * (interval_s - self._finish_interval_s)
        self._finished_at_s = now

    @property
    def retry_after_s(self) -> float:
        """When whoever waits now will have been served, at the pace of late."""
        return _bounded((self._dispatch.num_queued + 1) * self._finish_interval_s)

    def judge(self, life: Life, now: float) -> Verdict:
        """Of a request that has just come, and waits nowhere yet."""
        if self.draining:
            return Verdict(Refusal.DRAINING, "the server is shutting down")
        too_long = self._books.misfit(life.request)
        if too_long is not None:
            return Verdict(Refusal.TOO_LONG, too_long)
        num_queued = self._dispatch.num_queued
        if num_queued >= self._settings.max_queued_requests:
            detail = f"{num_queued} requests are waiting already"
            return Verdict(Refusal.OVERLOADED, detail, self.retry_after_s)
        if not life.request.service.is_bounded or self._settings.admission == "none":
            return _LET_IN
        admission = self._admission(life, now)
        if admission.accepted:
            return Verdict(None, admission.reason)
        retry_after_s = _bounded(admission.retry_after_s)
        return Verdict(Refusal.OVERLOADED, admission.reason, retry_after_s)

    def _admission(self, life: Life, now: float) -> Admission:
        request = life.request
        view = LoadView(
            cluster=self._books.view(now, request.max_tokens_total),
            flights=self._dispatch.flights.at(now),
            newcomers=self._dispatch.flights.newcomers_at(now),
            waiting_tokens=self._dispatch.waiting.prompt_tokens_ahead(request.service),
        )
        [choices] = life.unrouted()
        return self._policy.judge(view, self._dispatch.ask(life, choices, now))


def _bounded(wait_s: float) -> float:
    return min(max(MIN_RETRY_AFTER_S, wait_s), MAX_RETRY_AFTER_S)
