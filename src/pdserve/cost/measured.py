"""Step times as they were measured of one kind of worker: a `StepTimer` that a calibration fits.

Three kinds of steps have times of their own. One that computes prompts alone takes a base, a rising
line with bends over its tokens (kernels change with the size of a product) and a part per pair
(`StepShape.prompt_pairs`); one that only decodes takes the same over its sequences, and a part per
token of context. One that does both takes what was measured of such steps: a multiple of what its
prompts alone would take, and parts per sequence and token of context. Nobody assumes a sum.

All of it is without neighbours on the same host; what those cost is told by `cost.pace`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pdserve.core.step import StepShape
from pdserve.cost.pace import DECODE, MIXED, PROMPT


@dataclass(frozen=True, slots=True)
class Bends:
    """A line through 0 that never falls: ``slopes[i]`` holds up to ``knots[i]``, the last slope
    beyond the last knot. Knots rise and are above 0; there is one slope more."""

    knots: tuple[float, ...] = ()
    slopes: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise((0.0, *self.knots)))
        if len(self.slopes) != len(self.knots) + 1 or not rising or min(self.slopes) < 0:
            raise ValueError("a line with bends has rising knots and one slope more, none below 0")

    def parts(self, x: float) -> list[float]:
        """How much of ``x`` lies in each piece: the features of a fit."""
        borders = (0.0, *self.knots)
        uppers = (*self.knots, x)
        return [max(0.0, min(x, upper) - low) for low, upper in zip(borders, uppers, strict=True)]

    def starts(self) -> list[float]:
        """The height at 0 and at each knot."""
        widths = [upper - low for low, upper in pairwise((0.0, *self.knots))]
        rises = [w * s for w, s in zip(widths, self.slopes, strict=False)]
        return [0.0, *accumulate(rises)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Times of the steps of one kind, in seconds.

    ``size`` is over prompt tokens, or over sequences if the kind only decodes; ``per_second_s`` is
    per pair, or per token of context. In a mixed step ``size`` has one slope: the multiple of what
    the prompts alone take; ``per_sequence_s`` and ``per_second_s`` come on top.
    """

    base_s: float
    size: Bends
    per_second_s: float = 0.0
    per_sequence_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.base_s, self.per_second_s, self.per_sequence_s) < 0:
            raise ValueError("no part of a step takes less than no time")


class MeasuredSteps:
    """A `StepTimer` of the three kinds; what none of them was measured of takes the time of the
    next best: a mixed step the sum of its halves."""

    def __init__(self, prompt: Kind, decode: Kind, mixed: Kind | None) -> None:
        self.kinds: dict[str, Kind] = {PROMPT: prompt, DECODE: decode}
        if mixed is not None:
            self.kinds[MIXED] = mixed
        self._prompt, self._decode, self._mixed = prompt, decode, mixed
        self._prompt_starts = prompt.size.starts()
        self._decode_starts = decode.size.starts()

    def step_s(self, shape: StepShape) -> float:
        """Seconds without neighbours; 0 for an empty step."""
        if not shape.prompt_tokens:
            if not shape.num_decoding:
                return 0.0
            decode = self._decode
            height = _height(decode.size, self._decode_starts, shape.num_decoding)
            return decode.base_s + height + decode.per_second_s * shape.context_tokens
        prompt = self._prompt
        height = _height(prompt.size, self._prompt_starts, shape.prompt_tokens)
        prompt_s = prompt.base_s + height + prompt.per_second_s * shape.prompt_pairs
        if not shape.num_decoding:
            return prompt_s
        mixed = self._mixed
        if mixed is None:
            decode = self._decode
            height = _height(decode.size, self._decode_starts, shape.num_decoding)
            return prompt_s + height + decode.per_second_s * shape.context_tokens
        return (
            mixed.base_s
            + mixed.size.slopes[0] * prompt_s
            + mixed.per_sequence_s * shape.num_decoding
            + mixed.per_second_s * shape.context_tokens
        )


def _height(bends: Bends, starts: list[float], x: float) -> float:
    knots = bends.knots
    piece = bisect_right(knots, x) if knots else 0
    low = knots[piece - 1] if piece else 0.0
    return starts[piece] + bends.slopes[piece] * (x - low)
