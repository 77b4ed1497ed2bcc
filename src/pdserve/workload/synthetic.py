"""Generated workloads: drawn lengths, groups of requests that share a prefix, lengths of a trace.

Each property is drawn from a random source of its own, so that changing the arrivals, say, leaves
the lengths as they were.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdserve.workload.lengths import Draw
from pdserve.workload.request import Segment, TraceRequest, own_segment


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixGroups:
    """Every request belongs to one of ``num_groups``, drawn evenly, and begins with its prefix."""

    num_groups: int
    prefix_tokens: int


def synthetic(
    arrivals: Iterator[float],
    input_tokens: Draw,
    output_tokens: Draw,
    seed: int,
    groups: PrefixGroups | None = None,
) -> Iterator[TraceRequest]:
    """Endless requests. ``input_tokens`` is a prompt's own part; a group's prefix comes before."""
    of_inputs = random.Random(f"{seed}/inputs")
    of_outputs = random.Random(f"{seed}/outputs")
    of_groups = random.Random(f"{seed}/groups")
    for index in itertools.count():
        segments: tuple[Segment, ...] = (own_segment(index, input_tokens(of_inputs)),)
        if groups is not None:
            group = of_groups.randrange(groups.num_groups)
            segments = (Segment(f"group:{group}", groups.prefix_tokens), *segments)
        yield TraceRequest(
            index=index,
            at_s=next(arrivals),
            segments=segments,
            output_tokens=output_tokens(of_outputs),
        )


def drawn(
    trace: Iterable[TraceRequest], arrivals: Iterator[float], seed: int, *, pairs: bool
) -> Iterator[TraceRequest]:
    """Endless requests with lengths drawn from those of ``trace``, each as likely as the others.

    ``pairs``: a prompt keeps its answer. If not, both are drawn by themselves, as Splitwise's
    generator does. Prompts share nothing, whatever those of the trace did.
    """
    inputs, outputs = array("Q"), array("Q")
    for request in trace:
        inputs.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
    rng = random.Random(f"{seed}/draw")
    for index in itertools.count():
        of_input = rng.randrange(len(inputs))
        of_output = of_input if pairs else rng.randrange(len(outputs))
        yield TraceRequest(
            index=index,
            at_s=next(arrivals),
            segments=(own_segment(index, inputs[of_input]),),
            output_tokens=outputs[of_output],
        )
