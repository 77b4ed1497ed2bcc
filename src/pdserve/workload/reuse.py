"""How much of a workload's prompts a prefix cache could serve, before anything is run.

One cache for all, asked in order of arrival. It holds whole segments (a Mooncake segment is a block
of 512 tokens) and forgets the one that was used longest ago. A request hits its leading segments up
to the first that is missing; then it has touched all of its segments, and they are in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.workload.request import Segment, TraceRequest


@dataclass(frozen=True, slots=True)
class Reuse:
    """Counts over all requests; the shares are of prompts, 0 if there are none."""

    num_segments: int
    hit_segments: int
    num_tokens: int
    hit_tokens: int

    @property
    def segment_share(self) -> float:
        return self.hit_segments / self.num_segments if self.num_segments else 0.0

    @property
    def token_share(self) -> float:
        return self.hit_tokens / self.num_tokens if self.num_tokens else 0.0


def prefix_reuse(requests: Iterable[TraceRequest], capacity_tokens: float) -> Reuse:
    """Hits in a cache of ``capacity_tokens`` (``math.inf``: one that forgets nothing)."""
    cached: OrderedDict[Segment, None] = OrderedDict()
    used_tokens = num_segments = hit_segments = num_tokens = hit_tokens = 0
    for request in requests:
        num_segments += len(request.segments)
        num_tokens += request.prompt_tokens
        for segment in request.segments:
            if segment not in cached:
                break
            hit_segments += 1
            hit_tokens += segment.num_tokens
        for segment in request.segments:
            if segment not in cached:
                cached[segment] = None
                used_tokens += segment.num_tokens
            cached.move_to_end(segment)
        while used_tokens > capacity_tokens:
            used_tokens -= cached.popitem(last=False)[0].num_tokens
    return Reuse(num_segments, hit_segments, num_tokens, hit_tokens)
