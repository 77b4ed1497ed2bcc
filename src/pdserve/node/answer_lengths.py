"""How long answers are: what finished ones had, by class and tenant.

A request is expected to be like those of its own kind (class and tenant), or of the next wider one
(its class, all) while that has had too few. What a new one will have is an exponential average;
what one that has begun will have yet is read off the latest answers of its kind, of which only
those that became longer than it is now say anything. Answers that the client broke off teach
nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence

from pdserve.core.request import FinishReason, Request
from pdserve.node.lives import Choice, Life

PRIOR_TOKENS = 128.0
"""Before anything has finished: the median of Azure's conversations (129; Splitwise, fig. 3)."""
FORGETTING = 0.1
"""Weight of the latest answer in the average."""
NUM_LATEST = 128
"""Answers of a kind that are remembered, the latest ones."""
FEWEST = 8
"""From so many on they say how answers of the kind spread."""
MAX_KINDS = 4096
"""(class, tenant) pairs that are remembered, the latest ones."""

_Kind = tuple[str, ...]


class _Latest:
    """Lengths of the latest answers: in the order in which they came, and by length."""

    def __init__(self) -> None:
        self._came = array("l")
        self._oldest = 0
        self.ordered = array("l")

    def add(self, tokens: int) -> None:
        if len(self._came) < NUM_LATEST:
            self._came.append(tokens)
        else:
            del self.ordered[bisect_left(self.ordered, self._came[self._oldest])]
            self._came[self._oldest] = tokens
            self._oldest = (self._oldest + 1) % NUM_LATEST
        insort(self.ordered, tokens)


class AnswerLengths:
    def __init__(self) -> None:
        self._means: OrderedDict[_Kind, float] = OrderedDict()
        self._latest: dict[_Kind, _Latest] = {}

    def learn(self, life: Life) -> None:
        """The request is over."""
        for choice in life.choices:
            if choice.finish in (FinishReason.STOP, FinishReason.LENGTH) and choice.taken:
                for kind in _kinds(life.request):
                    self._add(kind, len(choice.taken))

    def expect(self, request: Request) -> float:
        """Output tokens that one choice of a request that begins will have."""
        means, name = self._means, request.service.name
        mean = means.get((name, request.tenant)) or means.get((name,)) or means.get(())
        return min(mean or PRIOR_TOKENS, float(request.params.max_tokens))

    def expect_more(self, request: Request, choice: Choice) -> float:
        """Output tokens that are still to come, on average; at least one."""
        num_taken = len(choice.taken)
        if not num_taken:
            return max(1.0, self.expect(request))
        lengths = self._of_kind(request)
        longer = lengths[bisect_right(lengths, num_taken) :]
        if not longer:
            return self._unseen_more(request, num_taken)
        left = sum(longer) / len(longer) - num_taken
        return max(1.0, min(left, float(request.params.max_tokens - num_taken)))

    def share_more(self, request: Request, num_taken: int, share: float) -> float:
        """Output tokens that are still to come in all but this share (below 1) of the answers that
        were that long and went on; at least one."""
        lengths = self._of_kind(request)
        place = bisect_right(lengths, num_taken)
        if place == len(lengths):
            return self._unseen_more(request, num_taken)
        left = lengths[place + int(share * (len(lengths) - place))] - num_taken
        return float(max(1, min(left, request.params.max_tokens - num_taken)))

    def _unseen_more(self, request: Request, num_taken: int) -> float:
        """Of an answer that none of those remembered says anything about: what is missing to the
        average, or, if it is about as long as that, half as much again. If all were of one length
        that would be nothing, if their end came by chance at any token as much again."""
        expected = self.expect(request)
        left = max(expected - num_taken, expected / 2 if num_taken else 0.0)
        return max(1.0, min(left, float(request.params.max_tokens - num_taken)))

    def _of_kind(self, request: Request) -> Sequence[int]:
        """Lengths of answers of the narrowest kind that has had enough of them, shortest first."""
        for kind in _kinds(request):
            latest = self._latest.get(kind)
            if latest is not None and len(latest.ordered) >= FEWEST:
                return latest.ordered
        return ()

    def _add(self, kind: _Kind, tokens: int) -> None:
        mean = self._means.pop(kind, float(tokens))
        self._means[kind] = mean + FORGETTING * (tokens - mean)
        self._latest.setdefault(kind, _Latest()).add(tokens)
        while len(self._means) > MAX_KINDS:
            oldest, _ = self._means.popitem(last=False)
            del self._latest[oldest]


def _kinds(request: Request) -> tuple[_Kind, ...]:
    """Narrowest first. The wider ones are touched last, so they are never the oldest."""
    name = request.service.name
    return ((name, request.tenant), (name,), ())
