"""What a worker will have to do in a while: how long its prompts take, and who decodes there then.

That is the system-level prediction of Mooncake (technical report, sec. 7.4), with an expected
length for each answer in the place of one time for all, and with those who come after the request
and are ready before it. How things go on from now is worked out in `policy.course`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from math import ceil, inf

from pdserve.core.ids import WorkerId
from pdserve.core.values import value
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, WorkerView
from pdserve.policy.course import NOBODY, Course, Flight, Newcomers

ALONE_CHUNK_TOKENS = 2048
"""Prompt tokens in a step that decodes nothing (Splitwise, sec. IV-B)."""


@value(kw_only=True)
class LoadView:
    """The cluster, and what the router knows beyond it. ``flights`` and ``newcomers`` by decode
    worker; ``waiting_tokens``: of prompts that wait in the router and are served before a new
    one."""

    cluster: ClusterView
    flights: Mapping[WorkerId, Sequence[Flight]]
    newcomers: Mapping[WorkerId, Newcomers] = field(default_factory=dict)
    waiting_tokens: float = 0.0


def prefill_s(worker: WorkerView, steps: StepModel, num_tokens: int, num_cached: int = 0) -> float:
    """Seconds of one prompt beside what the worker decodes now."""
    tokens, pairs = _uncached(num_tokens, num_cached)
    return _beside_decodes_s(worker, steps, tokens, pairs)


def idle_prefill_s(steps: StepModel, num_tokens: int, num_cached: int = 0) -> float:
    """Seconds of one prompt on a worker with these step times that has nothing else to do."""
    return _alone_s(steps, *_uncached(num_tokens, num_cached))


def backlog_s(
    worker: WorkerView, steps: StepModel, like_tokens: int, more_tokens: float = 0.0
) -> float:
    """Seconds of the prompts that wait there, were they of about this length each, and of so many
    tokens more."""
    tokens = worker.pending_tokens + round(more_tokens)
    return _beside_decodes_s(worker, steps, tokens, tokens * like_tokens)


def _uncached(num_tokens: int, num_cached: int) -> tuple[int, int]:
    """(tokens, pairs) of what is to be computed: one token at least, for its logits."""
    num_cached = min(num_cached, num_tokens - 1)
    return num_tokens - num_cached, num_tokens * num_tokens - num_cached * num_cached


def _beside_decodes_s(worker: WorkerView, steps: StepModel, tokens: int, pairs: int) -> float:
    if not worker.num_decoding:
        return _alone_s(steps, tokens, pairs)
    beside_s = (
        steps.per_sequence_s * worker.num_decoding
        + steps.per_context_token_s * worker.context_tokens
    )
    num_steps = ceil(tokens / worker.mixed_chunk_tokens)
    return num_steps * beside_s + _in_steps_s(steps, tokens, pairs, num_steps)


def _alone_s(steps: StepModel, tokens: int, pairs: int) -> float:
    return _in_steps_s(steps, tokens, pairs, ceil(tokens / ALONE_CHUNK_TOKENS))


def _in_steps_s(steps: StepModel, tokens: int, pairs: int, num_steps: int) -> float:
    return (
        num_steps * steps.prompt_base_s
        + steps.per_prompt_token_s * tokens
        + steps.per_pair_s * pairs
    )


class DecodeForecast:
    """One worker's decoding, from now on. ``steps`` has its step times; ``newcomers``: who is
    expected there beyond the ``flights``."""

    def __init__(
        self,
        worker: WorkerView,
        steps: StepModel,
        flights: Sequence[Flight],
        newcomers: Newcomers = NOBODY,
    ) -> None:
        self.worker = worker
        self._steps = steps
        self._flights = flights
        self._known = self._all = Course(steps, flights)
        if newcomers.flights:
            self._all = Course(steps, flights, newcomers)

    def tpot_s(self, at_s: float, num_tokens: int, num_choices: int = 1) -> float:
        """Seconds of a step at that time with so many more sequences of this length in it."""
        steps = self._steps
        each_s = steps.per_sequence_s + steps.per_context_token_s * num_tokens
        return self._all.pace_s(at_s) + num_choices * each_s

    def prompts_s(self, at_s: float, like_tokens: int, output_tokens: float) -> float:
        """What the prompts that wait there yet at that time add to each of so many steps."""
        if not self.worker.pending_tokens:
            return 0.0
        left_s = backlog_s(self.worker, self._steps, like_tokens) - at_s
        chunk = self.worker.mixed_chunk_tokens
        chunk_s = self._steps.prompt_s(chunk, chunk * like_tokens)
        return min(chunk_s, max(0.0, left_s) / max(1.0, output_tokens))

    def room_in_s(self, num_blocks: float) -> float:
        """When so many blocks are free: at once, or when enough sequences have ended."""
        free = float(self.worker.free_blocks)
        if free >= num_blocks:
            return 0.0
        for end_s, context_tokens in self._known.ends():
            free += context_tokens / self.worker.block_size
            if free >= num_blocks:
                return end_s
        return inf

    def calm_in_s(self, tpot_s: float, num_tokens: int, num_choices: int, after_s: float) -> float:
        """From when on a step with so many more sequences takes no longer than that, if nobody
        else comes."""
        number = len(self._flights) + num_choices
        context = float(num_choices * num_tokens)
        context += sum([flight.context_tokens + flight.tokens_left for flight in self._flights])
        end_s = after_s
        for end_s, context_tokens in self._known.ends():
            number -= 1
            context -= context_tokens
            if end_s > after_s and self._steps.decode_s(number, round(context)) <= tpot_s:
                return end_s
        return max(end_s, after_s)
