"""How measured steps stray from what is predicted of them: their mean, their spread, slow spells.

Everything here is of ratios, measured over predicted. Where steps were measured in rounds, the mean
is that of the median round, and the spread is within rounds: a machine that others share has slow
minutes, and one of them is no reason to expect it always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import log
from statistics import median

from pdserve.cost.pace import LEVELS, Spread

LEAST_OF_ROUND = 8
"""A round with fewer steps has no mean of its own."""
MEMORY_STEPS = 32
MOST_MEMORY = 0.98


def leveled(ratios: Sequence[tuple[int, float]]) -> tuple[float, list[float]]:
    """Of (round, measured over predicted): the mean of the median round, and each one over the mean
    of its own round: a round that something else slowed down is neither level nor spread."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for number, ratio in ratios:
        by_round[number].append(ratio)
    means = {number: mean(of) for number, of in by_round.items() if len(of) >= LEAST_OF_ROUND}
    level = median(means.values()) if means else mean([ratio for _, ratio in ratios])
    return level, [ratio / means.get(number, level) for number, ratio in ratios]


def spread_of(ratios: Sequence[float]) -> Spread:
    """Of ratios of mean 1, in the order in which they were measured."""
    ordered = sorted(ratios)
    memory = _memory([log(ratio) for ratio in ratios])
    return Spread(quantiles=tuple(quantile(ordered, level) for level in LEVELS), memory=memory)


def _memory(logs: Sequence[float]) -> float:
    """The correlation of one step's deviation with the next one's that makes means over many steps
    vary as they did: a latency is such a mean, and slow spells are what makes it vary."""
    block = min(MEMORY_STEPS, len(logs) // 8)
    if block < 2:
        return 0.0
    usual = mean(logs)
    square = mean([(value - usual) ** 2 for value in logs])
    starts = range(0, len(logs) - block + 1, block)
    means = [mean(logs[start : start + block]) for start in starts]
    of_means = mean([(value - usual) ** 2 for value in means])
    if square <= 0:
        return 0.0
    longer = block * of_means / square  # (1 + memory) / (1 - memory), if it fades step by step
    return min(max((longer - 1.0) / (longer + 1.0), 0.0), MOST_MEMORY)


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


def quantile(ordered: Sequence[float], level: float) -> float:
    """Of sorted values, at a level from 0 to 1, with a straight line between two."""
    position = (len(ordered) - 1) * level
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
