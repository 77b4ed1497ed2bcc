"""The queue of requests that wait for a route: resumes first, then what is new, in fair order.

Resumes come before all that is new, in the order in which they were broken off: their clients have
tokens already. What is new waits in the fair queue of ``policy.fairness``. Two bounds keep every
wait finite, whoever else comes:

- Every ``AGED_TURN``-th turn belongs to the request that has waited longest, once it has waited for
  ``patience_s``. (Not every turn: a flood would soon be old altogether, and the queue would be
  first come first served, whatever the weights.)
- A request that finds no room may be overtaken by those of other flows that do, but only until
  ``patience_s`` after it first found none when it was its turn. From then on nobody overtakes it,
  and what becomes free is left for it. Within its own flow nobody ever does.
"""

from __future__ import annotations

from collections import OrderedDict

from pdserve.core.ids import RequestId
from pdserve.core.request import Request, ServiceClass
from pdserve.policy.fairness import FairQueue

AGED_TURN = 4
MAX_ASKED = 4
"""Flows whose heads are tried before it is said that there is no room."""


class WaitingRoom:
    """Requests by id. Times are the router's."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._resumes: OrderedDict[RequestId, None] = OrderedDict()
        self._fair: FairQueue[RequestId] = FairQueue()
        self._since_s: OrderedDict[RequestId, float] = OrderedDict()
        self._prompts: dict[RequestId, int] = {}
        self._prompt_tokens = 0
        self._stuck_since_s: OrderedDict[RequestId, float] = OrderedDict()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._resumes) + len(self._since_s)

    @property
    def by_arrival(self) -> list[RequestId]:
        """All that wait: resumes, then what is new, in the order in which they came to wait."""
        return [*self._resumes, *self._since_s]

    def prompt_tokens_ahead(self, service: ServiceClass) -> float:
        """Prompt tokens to be served before a new request of the class, about."""
        tokens = self._fair.tokens
        return self._fair.tokens_ahead(service) * self._prompt_tokens / tokens if tokens else 0.0

    def add(self, request: Request, output_tokens: float, now: float) -> None:
        """A new request, each of whose choices is expected to have so many output tokens."""
        prompt_tokens = len(request.prompt_token_ids)
        tokens = prompt_tokens + request.num_choices * output_tokens
        self._fair.add(request.request_id, request.service, request.tenant, tokens)
        self._since_s[request.request_id] = now
        self._prompts[request.request_id] = prompt_tokens
        self._prompt_tokens += prompt_tokens

    def add_resume(self, request_id: RequestId) -> None:
        """Choices of the request need another attempt; it may be waiting already."""
        self._drop_new(request_id)
        self._resumes[request_id] = None

    def candidates(self, now: float) -> list[RequestId]:
        """Whom to find room for, in this order: the first one for whom there is some leaves by
        `served`, and then this is to be asked again; the others by `found_no_room`."""
        if self._resumes:
            return [next(iter(self._resumes))]
        stuck = next(iter(self._stuck_since_s), None)
        if stuck is not None and now - self._stuck_since_s[stuck] >= self._patience_s:
            return [stuck]
        heads = self._fair.heads(MAX_ASKED)
        if heads and self._turn % AGED_TURN == AGED_TURN - 1:
            oldest = next(iter(self._since_s))
            if now - self._since_s[oldest] >= self._patience_s:
                heads = [oldest, *(head for head in heads if head != oldest)]
        return heads

    def served(self, request_id: RequestId) -> None:
        """All of the request is under way."""
        if request_id in self._resumes:
            del self._resumes[request_id]
            return
        self._fair.serve(request_id)
        self._turn += 1
        self._leave(request_id)

    def found_no_room(self, request_id: RequestId, now: float) -> None:
        """It was the request's turn, and nobody could take it."""
        if request_id not in self._resumes:
            self._stuck_since_s.setdefault(request_id, now)

    def drop(self, request_id: RequestId) -> None:
        """The request is over, whether it waits or not."""
        self._resumes.pop(request_id, None)
        self._drop_new(request_id)

    def _drop_new(self, request_id: RequestId) -> None:
        if request_id in self._fair:
            self._fair.drop(request_id)
            self._leave(request_id)

    def _leave(self, request_id: RequestId) -> None:
        del self._since_s[request_id]
        self._prompt_tokens -= self._prompts.pop(request_id)
        self._stuck_since_s.pop(request_id, None)
