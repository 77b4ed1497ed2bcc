"""How the steps of a live worker stray from what a step model says of them.

Three things make a step of the same shape take longer at one time than at another. What the machine
does beside it: workers on one host share its memory and on a small one its cores, so a step loses a
share of its pace while a neighbour computes, and some time to the gateway and the clients on this
host for each token that the neighbour draws. What its own process does beside it: messages that
come while it runs (jobs, hand-offs) are worked on by the same process and cores. And what nobody
knows the cause of, which is kept as a distribution. Between two steps lies a gap, which depends on
the same things.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.core.request import Role
from pdserve.core.step import StepShape

PROMPT, DECODE, MIXED = "prompt", "decode", "mixed"
KINDS = (PROMPT, DECODE, MIXED)

LEVELS = (
    *(0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65),
    *(0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
)
"""Of the quantiles of a `Spread`."""


def kind_of(shape: StepShape) -> str:
    """Of which kind a step is; an empty one counts as decoding."""
    if not shape.prompt_tokens:
        return DECODE
    return MIXED if shape.num_decoding else PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Measured over predicted times: their quantiles at `LEVELS`, of mean 1, and how much of one
    step's deviation the next one shares (``memory``, a correlation)."""

    quantiles: tuple[float, ...]
    memory: float = 0.0

    def __post_init__(self) -> None:
        if len(self.quantiles) != len(LEVELS) or min(self.quantiles) <= 0:
            raise ValueError(f"a spread has {len(LEVELS)} quantiles, all above 0")
        if not 0 <= self.memory < 1:
            raise ValueError("the memory of a spread is from 0 to under 1")

    def at(self, level: float) -> float:
        """The quantile at this level, from 0 to 1."""
        place = min(max(bisect_left(LEVELS, level), 1), len(LEVELS) - 1)
        low, high = LEVELS[place - 1], LEVELS[place]
        share = (level - low) / (high - low)
        below = self.quantiles[place - 1]
        return below + share * (self.quantiles[place] - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The share of its pace that a step loses while a neighbour computes a prompt, and while one
    only decodes; and the seconds by which it gets longer while it runs: for each message that its
    process gets, and for each token that a neighbour draws, since who delivers that needs the same
    cores."""

    beside_prompt: float = 0.0
    beside_decode: float = 0.0
    per_message_s: float = 0.0
    per_token_s: float = 0.0

    def beside(self, kind: str) -> float:
        """Beside a step of this kind."""
        return self.beside_decode if kind == DECODE else self.beside_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Seconds from when a step is asked for to its begin and from its end to when its machine hears
    of it, together: where no neighbour computes, and where one does."""

    alone_s: float
    beside_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pace:
    """``spreads``, ``lost`` and ``gaps`` by kind of step; a kind that is not there has none, and
    the cluster's gap. ``per_host``: how many workers of each home role share a host. No two are
    equal."""

    spreads: Mapping[str, Spread] = field(default_factory=dict)
    lost: Mapping[str, Lost] = field(default_factory=dict)
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    per_host: Mapping[Role, int] = field(default_factory=dict)
