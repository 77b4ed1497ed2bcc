"""The least squares without negative coefficients is the best of all choices of features."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from pdserve.cost.nonnegative import Moments, nonnegative_fit


def moments_of(features: np.ndarray, targets: np.ndarray) -> Moments:
    moments = Moments(features.shape[1])
    for row, target in zip(features, targets, strict=True):
        moments.add([float(value) for value in row], float(target), 1.0)
    return moments


def least_squares(features: np.ndarray, targets: np.ndarray) -> float:
    """By trying every set of features."""
    best = float((targets**2).sum())
    size = features.shape[1]
    for count in range(1, size + 1):
        for chosen in combinations(range(size), count):
            part = features[:, chosen]
            found, *_ = np.linalg.lstsq(part, targets, rcond=None)
            if (found >= -1e-12).all():
                best = min(best, float(((part @ found - targets) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_optimum_also_of_features_that_explain_each_other(seed: int) -> None:
    source = np.random.default_rng(seed)
    size = int(source.integers(2, 7))
    features = source.random((int(source.integers(size, 30)), size))
    features *= 10 ** source.uniform(-3, 3, size)  # of sizes that have nothing in common
    features[:, 0] = 1.0
    if seed % 3 == 0:
        features[:, -1] = 2 * features[:, 0] + features[:, 1]
    wanted = source.normal(size=size) / features.mean(0)
    targets = features @ wanted + 0.1 * source.normal(size=len(features))
    found = np.array(nonnegative_fit(moments_of(features, targets)))
    assert (found >= 0).all()
    left = float(((features @ found - targets) ** 2).sum())
    assert left <= least_squares(features, targets) * (1 + 1e-6) + 1e-9


def test_moments_of_parts_add_up_and_come_off_again() -> None:
    source = random.Random(1)
    samples = [([1.0, source.random(), source.random()], source.random()) for _ in range(20)]
    whole, first, second = Moments(3), Moments(3), Moments(3)
    for place, (features, target) in enumerate(samples):
        whole.add(features, target, 2.0)
        (first if place < 8 else second).add(features, target, 2.0)
    assert nonnegative_fit(first.plus(second)) == pytest.approx(nonnegative_fit(whole))
    rest = whole.plus(first, -1.0)
    assert rest.num_samples == 12
    assert nonnegative_fit(rest) == pytest.approx(nonnegative_fit(second))


def test_of_nothing_it_makes_nothing() -> None:
    assert nonnegative_fit(Moments(3)) == [0.0, 0.0, 0.0]
