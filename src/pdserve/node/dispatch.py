"""Starting and ending attempts: the part of the router that talks to workers.

`begin` sends a job, or has a prefix fetched for it first (`node.fetches`), and debits the books;
`end` and `abort` undo that. An attempt that ends before its choices are finished leaves them
waiting for a route, at the head of the queue. Whose turn it is the waiting room says. Nobody who
found no room is asked about again until something has happened that may have made some.
"""

from __future__ import annotations

from pdserve.core.events import LifeName
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.messages import AbortAttempt, CacheChanged, Message, PrefixSent
from pdserve.core.request import Job
from pdserve.node.answer_lengths import AnswerLengths
from pdserve.node.assigned import Assignments
from pdserve.node.books import ClusterBooks, WorkerBook
from pdserve.node.fetches import Fetches
from pdserve.node.flights import Flights
from pdserve.node.ledger import Decision, reasons
from pdserve.node.lives import Attempt, Life
from pdserve.node.outbox import Outbox
from pdserve.node.pools import Pools
from pdserve.node.prefixes import Prefixes
from pdserve.node.waiting import WaitingRoom
from pdserve.policy.cluster import Route, RouteAsk, RoutePolicy
from pdserve.policy.forecast import backlog_s

HANDOFF_FAILURES_BEFORE_STAYING = 2


class Dispatch:
    """The queue of requests that wait for a route, and all attempts under way."""

    def __init__(
        self, books: ClusterBooks, pools: Pools, policy: RoutePolicy, patience_s: float
    ) -> None:
        self.lives: dict[RequestId, Life] = {}
        self.waiting = WaitingRoom(patience_s)
        self.answers = AnswerLengths()
        self.flights = Flights(self.lives, self.answers)
        self.assigned = Assignments()
        self.prefixes = Prefixes(books)
        self.fetches = Fetches(books, self.prefixes)
        self._books = books
        self._pools = pools
        self._num_asked = self._num_requests = 0
        self._policy = policy
        self._stirred = False

    @property
    def queue(self) -> list[RequestId]:
        """Requests that wait for a route: resumes before those that are new, each kind in the order
        in which they came to wait."""
        return self.waiting.by_arrival

    @property
    def num_queued(self) -> int:
        return len(self.waiting)

    def wait(self, life: Life, now: float) -> None:
        """A new request."""
        self._num_requests += 1
        life.number = self._num_requests
        self.waiting.add(life.request, self.answers.expect(life.request), now)
        self.stir()

    def wait_again(self, life: Life) -> None:
        """Choices of the request need another attempt."""
        self.waiting.add_resume(life.request.request_id)
        self.stir()

    def stir(self) -> None:
        """There may be room where there was none."""
        self._stirred = True

    def route_waiting(self, out: Outbox) -> None:
        """Send what the policy finds room for, in the order of the waiting room."""
        while self._stirred and len(self.waiting):
            self._stirred = self._send_one(out)

    def _send_one(self, out: Outbox) -> bool:
        """False if there is room for none of those whose turn it is."""
        for request_id in self.waiting.candidates(out.now):
            if self._send(self.lives[request_id], out):
                self.waiting.served(request_id)
                return True
            self.waiting.found_no_room(request_id, out.now)
        return False

    def _send(self, life: Life, out: Outbox) -> bool:
        """Start attempts for all of its choices that have none; False if some still wait."""
        for group in life.unrouted():
            ask = self.ask(life, group, out.now)
            view = self._books.view(out.now, life.request.max_tokens_total)
            route = self._policy.choose(view, ask)
            if route is None:
                return False
            self._begin(life, group, route, ask, out)
        return True

    def heard(self, message: Message, book: WorkerBook, out: Outbox) -> None:
        """A worker speaks of its prefix cache. What one of a newer version says is not for us."""
        if isinstance(message, CacheChanged):
            self.prefixes.changed(book.up.worker, message.stored, message.evicted)
        elif isinstance(message, PrefixSent):
            self.fetches.sent(book.up.worker, message, out)

    def worker_lost(self, worker: WorkerId, out: Outbox) -> None:
        """The books have forgotten it, and the attempts that it owned have ended."""
        self.prefixes.worker_lost(worker)
        self.fetches.worker_lost(worker, out)

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer belongs to an attempt's beginning."""
        return self.fetches.timer_fired(timer, out)

    def abort(
        self, life: Life, epoch: Epoch, out: Outbox, choices: tuple[int, ...] | None = None
    ) -> None:
        """The owner forgets the attempt, or only these choices of it."""
        owner = life.attempts[epoch].owner
        out.send(owner, AbortAttempt(life.attempt_id(epoch), choices))
        if choices is None:
            self.end(life, epoch)

    def end(self, life: Life, epoch: Epoch) -> None:
        """The attempt works on nothing any more."""
        attempt = life.attempts.pop(epoch)
        attempt_id, decode_worker = life.attempt_id(epoch), attempt.job.decode_worker
        self._books.forget(attempt_id, decode_worker)
        if attempt.moving_to is not None:
            self._books.forget(attempt_id, attempt.moving_to)
        self.flights.end(decode_worker, attempt_id)
        self.assigned.end(attempt_id)
        self.fetches.forget(attempt)
        self.stir()

    def forget(self, life: Life) -> None:
        """The request is over."""
        for epoch in list(life.attempts):
            self.end(life, epoch)
        self.waiting.drop(life.request.request_id)
        del self.lives[life.request.request_id]

    def ask(self, life: Life, group: tuple[int, ...], now: float) -> RouteAsk:
        """What is to be known for routing these choices, which share their tokens."""
        request, first = life.request, life.choices[group[0]]
        self._num_asked += 1
        num_taken = len(first.taken)
        num_tokens = len(request.prompt_token_ids) + num_taken
        failed_handoffs = max([life.choices[index].failed_handoffs for index in group])
        return RouteAsk(
            num_tokens=num_tokens,
            num_blocks=self._books.blocks_for(num_tokens, len(group)),
            num_choices=len(group),
            preference=request.route,
            last_prefill=life.last_prefill,
            numerics=life.numerics,
            avoid_decode=tuple(life.avoid),
            in_place=failed_handoffs >= HANDOFF_FAILURES_BEFORE_STAYING,
            cached_tokens=self.prefixes.cached_tokens(life, group[0], now),
            max_output_tokens=request.params.max_tokens - num_taken,
            output_tokens=self.answers.expect_more(request, first),
            service=request.service,
            number=self._num_asked,
            waited_s=now - life.submitted_at_s,
            oracle_output_tokens=request.oracle_output_tokens,
        )

    def _begin(
        self, life: Life, group: tuple[int, ...], route: Route, ask: RouteAsk, out: Outbox
    ) -> None:
        request = life.request
        prefill, decode = self._books.workers[route.prefill], self._books.workers[route.decode]
        job = _job(life, group, route)
        epoch, attempt_id = job.epoch, job.attempt
        for worker in route.draws:
            self._pools.draw(worker, out)
        num_new = ask.num_tokens - ask.cached_tokens.get(route.prefill, 0)
        view = prefill.view()
        steps, ready_s = view.steps, out.now
        if steps is not None:
            ready_s += backlog_s(view, steps, ask.num_tokens, num_new)
            if self._pools.demand.is_kept:
                prefill_s = steps.prefill_s(ask.num_tokens, ask.num_tokens - num_new)
                self._pools.demand.routed(out.now, prefill_s, request.service)
        decode.promise(attempt_id, ask.num_blocks)
        attempt = life.attempts[epoch] = Attempt(job, owner=route.prefill)
        life.decision = Decision.of(route) if epoch == 1 and out.logs else None
        self.flights.begin(job, ready_s, out.now)
        self.assigned.begin(job, prefill, decode)
        life.last_prefill = route.prefill
        life.numerics = view.numerics
        for index in group:
            life.choices[index].epoch = epoch
        if out.logs:
            out.log(
                LifeName.ROUTED,
                attempt_id,
                prefill=route.prefill,
                decode=route.decode,
                local=job.is_local,
                taken_tokens=job.next_index,
                cached_tokens=ask.num_tokens - num_new,
                **reasons(route),
            )
        self.fetches.start(life, attempt, num_new, route.fetch_from, out)
        self.prefixes.expect(life, group[0], route.prefill, out.now)


def _job(life: Life, group: tuple[int, ...], route: Route) -> Job:
    """The next attempt, with what the client already has."""
    request = life.request
    epoch = Epoch(life.next_epoch)
    life.next_epoch += 1
    return Job(
        request_id=request.request_id,
        epoch=epoch,
        choices=group,
        token_ids=request.prompt_token_ids + tuple(life.choices[group[0]].taken),
        num_prompt_tokens=len(request.prompt_token_ids),
        params=request.params,
        prefill_worker=route.prefill,
        decode_worker=route.decode,
        cache_salt=request.cache_salt,
        trace_context=request.trace_context,
        number=life.number,
        answer_tokens=route.answer_tokens,
    )
