"""One request of a workload: when it arrives, how long it is, and what of its prompt repeats.

A prompt is a row of *segments*. A segment's name stands for its content: two segments of the same
name begin with the same tokens, and segments of different names have nothing in common. So requests
whose first segments are equal share a prefix, which a simulator can count by name and a load client
turns into real tokens (``prompts``).
"""

from __future__ import annotations

from pdserve.core.values import value


@value()
class Segment:
    """``num_tokens`` (at least 1) tokens whose content is a function of ``name``."""

    name: str
    num_tokens: int


@value(kw_only=True)
class TraceRequest:
    """A request that arrives ``at_s`` seconds after the start and asks for ``output_tokens``.

    A client that gives up leaves after ``cancel_after_tokens`` tokens (0: as soon as the request is
    sent) or ``cancel_after_s`` seconds after sending; None: it stays.
    """

    index: int
    at_s: float
    segments: tuple[Segment, ...]
    output_tokens: int
    cancel_after_tokens: int | None = None
    cancel_after_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


def arriving(request: TraceRequest, at_s: float) -> TraceRequest:
    """The same request at another time: `replace`, in a fifth of the time."""
    return TraceRequest(
        index=request.index,
        at_s=at_s,
        segments=request.segments,
        output_tokens=request.output_tokens,
        cancel_after_tokens=request.cancel_after_tokens,
        cancel_after_s=request.cancel_after_s,
    )


def own_segment(index: int, num_tokens: int) -> Segment:
    """A segment that no other request has."""
    return Segment(f"own:{index}", num_tokens)
