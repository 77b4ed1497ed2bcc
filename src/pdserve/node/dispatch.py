"""Starting and ending attempts: the part of the router that talks to workers.

`begin` sends a job and debits the books; `end` and `abort` undo that. An attempt that ends before
its choices are finished leaves them waiting for a route, at the head of the queue.
"""

from __future__ import annotations

from pdserve.core.events import LifeName
from pdserve.core.ids import Epoch, RequestId
from pdserve.core.messages import AbortAttempt, StartJob
from pdserve.core.request import Job
from pdserve.node.books import ClusterBooks
from pdserve.node.lives import Attempt, Life
from pdserve.node.outbox import Outbox
from pdserve.node.pools import Pools
from pdserve.policy.cluster import Route, RouteAsk, RoutePolicy

HANDOFF_FAILURES_BEFORE_STAYING = 2


class Dispatch:
    """The queue of requests that wait for a route, and all attempts under way."""

    def __init__(self, books: ClusterBooks, pools: Pools, policy: RoutePolicy) -> None:
        self.lives: dict[RequestId, Life] = {}
        self._new: dict[RequestId, None] = {}
        self._resumes: dict[RequestId, None] = {}
        self._books = books
        self._pools = pools
        self._num_asked = 0
        self._policy = policy

    @property
    def queue(self) -> list[RequestId]:
        """Requests that wait for a route, next one first: resumes before those that are new, each
        kind in the order in which they came to wait."""
        return [*self._resumes, *self._new]

    @property
    def num_queued(self) -> int:
        return len(self._resumes) + len(self._new)

    def wait(self, life: Life) -> None:
        """A new request."""
        self._new[life.request.request_id] = None

    def wait_again(self, life: Life) -> None:
        """Choices of the request need another attempt."""
        self._new.pop(life.request.request_id, None)
        self._resumes[life.request.request_id] = None

    def route_waiting(self, out: Outbox) -> None:
        """Send what the policy finds room for, first come first served."""
        for request_id in self.queue if self.num_queued else ():
            life = self.lives[request_id]
            for group in life.unrouted():
                ask = self._ask(life, group, out.now)
                view = self._books.view(out.now, life.request.max_tokens_total)
                route = self._policy.choose(view, ask)
                if route is None:
                    return
                self._begin(life, group, route, ask, out)
            self._leave_queue(request_id)

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
        self._books.forget(attempt.job.attempt, attempt.job.decode_worker)

    def forget(self, life: Life) -> None:
        """The request is over."""
        for epoch in list(life.attempts):
            self.end(life, epoch)
        self._leave_queue(life.request.request_id)
        del self.lives[life.request.request_id]

    def _leave_queue(self, request_id: RequestId) -> None:
        self._new.pop(request_id, None)
        self._resumes.pop(request_id, None)

    def _ask(self, life: Life, group: tuple[int, ...], now: float) -> RouteAsk:
        request = life.request
        self._num_asked += 1
        num_tokens = len(request.prompt_token_ids) + len(life.choices[group[0]].taken)
        failed_handoffs = max(life.choices[index].failed_handoffs for index in group)
        return RouteAsk(
            num_tokens=num_tokens,
            num_blocks=self._books.blocks_for(num_tokens, len(group)),
            preference=request.route,
            last_prefill=life.last_prefill,
            numerics=life.numerics,
            avoid_decode=tuple(life.avoid),
            in_place=failed_handoffs >= HANDOFF_FAILURES_BEFORE_STAYING,
            max_output_tokens=request.params.max_tokens - len(life.choices[group[0]].taken),
            service=request.service,
            number=self._num_asked,
            waited_s=now - life.submitted_at_s,
        )

    def _begin(
        self, life: Life, group: tuple[int, ...], route: Route, ask: RouteAsk, out: Outbox
    ) -> None:
        request = life.request
        epoch = Epoch(life.next_epoch)
        life.next_epoch += 1
        prefill, decode = self._books.workers[route.prefill], self._books.workers[route.decode]
        taken = life.choices[group[0]].taken
        job = Job(
            request_id=request.request_id,
            epoch=epoch,
            choices=group,
            token_ids=request.prompt_token_ids + tuple(taken),
            num_prompt_tokens=len(request.prompt_token_ids),
            params=request.params,
            prefill_worker=route.prefill,
            decode_worker=route.decode,
            cache_salt=request.cache_salt,
            trace_context=request.trace_context,
            route_seq=prefill.debit_job(ask.num_tokens),
        )
        for worker in route.draws:
            self._pools.draw(worker, out)
        steps = prefill.view().steps
        if steps is not None:
            prefill_s = steps.prefill_s(ask.num_tokens, ask.cached_tokens.get(route.prefill, 0))
            self._pools.demand.routed(out.now, prefill_s, request.service)
        decode.promise(job.attempt, ask.num_blocks)
        life.attempts[epoch] = Attempt(job, owner=route.prefill)
        life.last_prefill = route.prefill
        life.numerics = prefill.view().numerics
        for index in group:
            life.choices[index].epoch = epoch
        out.log(
            LifeName.ROUTED,
            job.attempt,
            prefill=route.prefill,
            decode=route.decode,
            local=job.is_local,
            reason=route.reason,
            taken_tokens=len(taken),
        )
        out.send(route.prefill, StartJob(job))
