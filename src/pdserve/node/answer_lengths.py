"""How long answers are: what finished ones had, by class and tenant.

An exponential average for each (class, tenant), for each class, and for all: a request is expected
to be like those of its own kind, or of the next wider one while that has had none. Answers that the
client broke off teach nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from pdserve.core.request import FinishReason, Request
from pdserve.node.lives import Choice, Life

PRIOR_TOKENS = 128.0
"""Before anything has finished: the median of Azure's conversations (129; Splitwise, fig. 3)."""
FORGETTING = 0.1
"""Weight of the latest answer."""
MAX_KINDS = 4096
"""(class, tenant) pairs that are remembered, the latest ones."""

_Kind = tuple[str, ...]


class AnswerLengths:
    def __init__(self) -> None:
        self._means: OrderedDict[_Kind, float] = OrderedDict()

    def learn(self, life: Life) -> None:
        """The request is over."""
        for choice in life.choices:
            if choice.finish in (FinishReason.STOP, FinishReason.LENGTH) and choice.taken:
                for kind in _kinds(life.request):
                    self._add(kind, float(len(choice.taken)))

    def expect(self, request: Request) -> float:
        """Output tokens that one choice of a request that begins will have."""
        means, name = self._means, request.service.name
        mean = means.get((name, request.tenant)) or means.get((name,)) or means.get(())
        return min(mean or PRIOR_TOKENS, float(request.params.max_tokens))

    def expect_more(self, request: Request, choice: Choice) -> float:
        """Output tokens that are still to come; at least one, while it has not ended.

        Of an answer that is about as long as expected already, or longer, half as much again is
        expected: if all were of one length it would be nothing, if their end came by chance at any
        token it would be as much again.
        """
        expected, num_taken = self.expect(request), len(choice.taken)
        left = max(expected - num_taken, expected / 2 if num_taken else 0.0)
        return max(1.0, min(left, float(request.params.max_tokens - num_taken)))

    def _add(self, kind: _Kind, tokens: float) -> None:
        mean = self._means.pop(kind, tokens)
        self._means[kind] = mean + FORGETTING * (tokens - mean)
        while len(self._means) > MAX_KINDS:
            self._means.popitem(last=False)


def _kinds(request: Request) -> tuple[_Kind, ...]:
    """Narrowest first. The wider ones are touched last, so they are never the oldest."""
    name = request.service.name
    return ((name, request.tenant), (name,), ())
