"""What the batch machine says to its worker node: the step to run, and what an ended one means."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.messages import TokenDelta
from pdserve.core.step import StepPlan
from pdserve.node.sequence import Sequence


@dataclass(slots=True)
class StepOutcome:
    """What a finished step means to the worker node. Lists are in row order.

    ``held``: prefills that are done and wait for their hand-off, with each choice's next token.
    ``decoding``: sequences that began to decode here. ``suspects``: sequences of a step that broke,
    which will be run again one by one. ``failed``: sequences that broke a step all alone,
    or could draw nothing in one that is good.
    """

    deltas: list[TokenDelta] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)
    held: list[tuple[Sequence, tuple[TokenDelta, ...]]] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)
    suspects: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Planned:
    """A step to run, the sequences that it starts, and the ones that had to give up blocks."""

    plan: StepPlan | None = None
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    handed_back: list[Sequence] = field(default_factory=list)
    started_decoding: list[Sequence] = field(default_factory=list)
