"""What the batch machine says to its worker node: the step to run, and what an ended one means."""

from __future__ import annotations

from pdserve.core.messages import TokenDelta
from pdserve.core.step import StepPlan
from pdserve.node.sequence import Sequence


class StepOutcome:
    """What a finished step means to the worker node. Lists are in row order.

    ``held``: prefills that are done and wait for their hand-off, with each choice's next token.
    ``decoding``: sequences that began to decode here. ``suspects``: sequences of a step that broke,
    which will be run again one by one. ``failed``: sequences that broke a step all alone,
    or could draw nothing in one that is good.
    """

    __slots__ = ("decoding", "deltas", "failed", "held", "prefilled", "suspects")

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.prefilled: list[Sequence] = []
        self.held: list[tuple[Sequence, tuple[TokenDelta, ...]]] = []
        self.decoding: list[Sequence] = []
        self.suspects: list[Sequence] = []
        self.failed: list[Sequence] = []


class Planned:
    """A step to run, the sequences that it starts, and the ones that had to give up blocks."""

    __slots__ = ("admitted", "handed_back", "plan", "preempted", "started_decoding")

    def __init__(self) -> None:
        self.plan: StepPlan | None = None
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.handed_back: list[Sequence] = []
        self.started_decoding: list[Sequence] = []
