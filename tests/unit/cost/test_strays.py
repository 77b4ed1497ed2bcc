"""How steps stray: the level of rounds, the spread within them."""

from __future__ import annotations

import random

import pytest

from pdserve.cost.strays import leveled, spread_of


def rounds(means: dict[int, float], count: int = 40) -> list[tuple[int, float]]:
    """Ratios of each round, a tenth around its mean."""
    source = random.Random(3)
    return [
        (number, mean * source.uniform(0.9, 1.1)) for number, mean in means.items()
        for _ in range(count)
    ]  # fmt: skip


def test_a_round_that_something_slowed_down_changes_neither_level_nor_spread() -> None:
    even = leveled(rounds({0: 1.0, 1: 1.0, 2: 1.0}))
    level, strayed = leveled(rounds({0: 1.0, 1: 1.4, 2: 1.0}))
    assert level == pytest.approx(even[0], rel=0.03)
    assert max(strayed) < 1.15
    assert sum(strayed) / len(strayed) == pytest.approx(1.0)


def test_one_round_has_the_mean_of_all() -> None:
    ratios = [(0, 0.5), (0, 1.5), (0, 4.0)]
    level, strayed = leveled(ratios)
    assert level == pytest.approx(2.0)
    assert strayed == pytest.approx([0.25, 0.75, 2.0])


def test_a_round_of_few_steps_does_not_count_as_one() -> None:
    ratios = rounds({0: 1.0, 1: 1.1, 2: 1.2}) + [(3, 9.0)] * 3
    level, strayed = leveled(ratios)
    assert level == pytest.approx(1.1, rel=0.02)
    assert strayed[-1] == pytest.approx(9.0 / level)


def test_a_spread_remembers_slow_spells_only_if_there_are_some() -> None:
    source = random.Random(1)
    mixed = [source.choice((0.9, 1.1)) for _ in range(960)]
    spells = [0.9 if place // 60 % 2 else 1.1 for place in range(960)]
    assert spread_of(mixed).memory < 0.25
    assert spread_of(spells).memory > 0.8
    assert spread_of(spells).at(0.0) == pytest.approx(0.9)
    assert spread_of(spells).at(1.0) == pytest.approx(1.1)
