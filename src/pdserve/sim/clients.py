"""The clients of a simulated run: when each request is sent, what has come of it, who gives up.

Requests are read one at a time, so a trace of any length needs no more memory than the requests
that are not over. What a client sees of a token is later than its drawing by a message and the edge
of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdserve.core.effects import Deliver, Fail
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Job, Request, SamplingParams, ServiceClass
from pdserve.sim.observe import Ended
from pdserve.sim.prompts import prompt_of
from pdserve.workload.request import TraceRequest

ENDING = 1
"""The token id that ends an answer; all others are 0."""


@dataclass(slots=True)
class Client:
    """One request that is not over. ``last_index``: of its answer's last token;
    ``notable_index``: at which something happens, the end or the client's leaving. ``rides``: in
    which engine's which crew its sequence was last."""

    request: Request
    asked: TraceRequest
    arrived_s: float
    last_index: int
    notable_index: int
    num_taken: int = 0
    num_drawn: int = 0
    first_s: float | None = None
    second_s: float | None = None
    last_s: float | None = None
    cached_tokens: int = 0
    prefill: WorkerId | None = None
    decode: WorkerId | None = None
    attempts: int = 0
    rides: tuple[WorkerId, int] | None = None

    def starts(self, job: Job) -> None:
        """The router sends an attempt."""
        self.attempts += 1
        self.prefill, self.decode = job.prefill_worker, job.decode_worker

    def drawn(self, index: int, at_s: float) -> float | None:
        """It has token ``index`` at this time: seconds since the one before, None if it had it
        already or it is the first."""
        if index < self.num_drawn:
            return None
        self.num_drawn = index + 1
        gap_s = None if self.last_s is None or not index else at_s - self.last_s
        if index == 1:
            self.second_s = at_s
        if index:
            self.last_s = at_s
        return gap_s

    def takes(self, deliver: Deliver, at_s: float) -> bool:
        """The router delivers tokens; True if the answer is complete."""
        if self.first_s is None:
            self.first_s = at_s
        self.last_s = at_s
        last = deliver.deltas[-1]
        self.num_taken = last.index + 1
        return last.finish is not None

    def ended(self, fail: Fail | None = None, *, cancelled: bool = False) -> Ended:
        return Ended(
            index=self.asked.index,
            request_id=self.request.request_id,
            arrived_s=self.arrived_s,
            first_s=self.first_s,
            second_s=self.second_s,
            last_s=self.last_s,
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=self.cached_tokens,
            output_tokens=self.num_taken,
            service=self.request.service,
            tenant=self.request.tenant,
            prefill=self.prefill,
            decode=self.decode,
            attempts=self.attempts,
            failure=None if fail is None else fail.kind,
            cancelled=cancelled,
        )


class Clients:
    """All requests that are not over, and the ones to come. ``num_sent`` so far."""

    def __init__(
        self,
        requests: Iterator[TraceRequest],
        *,
        declared_tokens: int | None,
        oracle: bool = False,
        longest_tokens: int,
        service_of: Callable[[TraceRequest], ServiceClass],
        request_of: Callable[[TraceRequest], Request] | None = None,
    ) -> None:
        """``request_of``: the request that is sent, where it is not made of the trace's lengths."""
        self.open: dict[RequestId, Client] = {}
        self.num_sent = 0
        self._requests = requests
        self._declared_tokens = declared_tokens
        self._oracle = oracle
        self._longest_tokens = longest_tokens
        self._service_of = service_of
        self._request_of = request_of or self._made

    def next_asked(self) -> TraceRequest | None:
        """The next one to come."""
        return next(self._requests, None)

    def send(self, asked: TraceRequest, now: float) -> Request:
        """A client sends its request."""
        request = self._request_of(asked)
        last_index = min(asked.output_tokens, request.params.max_tokens) - 1
        notable = last_index
        if asked.cancel_after_tokens:
            notable = min(last_index, asked.cancel_after_tokens - 1)
        self.open[request.request_id] = Client(request, asked, now, last_index, notable)
        self.num_sent += 1
        return request

    def _made(self, asked: TraceRequest) -> Request:
        prompt = prompt_of(asked)
        params = SamplingParams(
            max_tokens=self._max_tokens(len(prompt), asked.output_tokens),
            seed=0,
            eos_token_ids=(ENDING,),
        )
        return Request(
            request_id=RequestId(f"r{self.num_sent}"),
            prompt_token_ids=prompt,
            params=params,
            service=self._service_of(asked),
            oracle_output_tokens=asked.output_tokens if self._oracle else None,
        )

    def _max_tokens(self, prompt_tokens: int, output_tokens: int) -> int:
        """What the client declares: at least what it will get, and no more than any worker holds,
        if that can be."""
        if self._declared_tokens is None:
            return output_tokens
        room = max(1, self._longest_tokens - prompt_tokens)
        return max(output_tokens, min(self._declared_tokens, room))
