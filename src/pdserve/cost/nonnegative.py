"""The best non-negative combination of features: least squares over a fixed set of samples.

`Moments` collects what least squares needs of weighted samples; moments of parts add up, so the
folds of a cross-validation are each summed once. `nonnegative_fit` solves them by the active-set
method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), which ends at the
one optimum after finitely many steps. (``cost.regression`` learns online, one sample at a time.)
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_GAIN = 1e-10
"""A feature whose inclusion would gain less than this share of the targets' squares stays out."""
LEAST_PIVOT = 1e-11


class Moments:
    """Sums of products of ``size`` features, and of features and targets, of weighted samples."""

    __slots__ = ("num_samples", "products", "size", "square", "targets")

    def __init__(self, size: int) -> None:
        self.size = size
        self.products = [[0.0] * size for _ in range(size)]
        self.targets = [0.0] * size
        self.square = 0.0
        self.num_samples = 0

    def add(self, features: Sequence[float], target: float, weight: float) -> None:
        """One sample; features of 0 cost nothing."""
        present = [(i, value) for i, value in enumerate(features) if value]
        for i, value in present:
            weighted = weight * value
            row = self.products[i]
            for j, other in present:
                row[j] += weighted * other
            self.targets[i] += weighted * target
        self.square += weight * target * target
        self.num_samples += 1

    def plus(self, other: Moments, factor: float = 1.0) -> Moments:
        """The sum of both; with ``factor`` -1 what is left of this one without the other."""
        total = Moments(self.size)
        for i in range(self.size):
            mine, theirs = self.products[i], other.products[i]
            total.products[i] = [a + factor * b for a, b in zip(mine, theirs, strict=True)]
        total.targets = [a + factor * b for a, b in zip(self.targets, other.targets, strict=True)]
        total.square = self.square + factor * other.square
        total.num_samples = self.num_samples + round(factor) * other.num_samples
        return total


def nonnegative_fit(moments: Moments) -> list[float]:
    """The coefficients, none below 0, with the least squares."""
    size = moments.size
    scales = [moments.products[i][i] ** 0.5 for i in range(size)]
    matrix = [
        [
            moments.products[i][j] / (scales[i] * scales[j]) if scales[i] and scales[j] else 0.0
            for j in range(size)
        ]
        for i in range(size)
    ]
    targets = [
        value / scale if scale else 0.0
        for value, scale in zip(moments.targets, scales, strict=True)
    ]
    found = _active_set(matrix, targets, LEAST_GAIN * max(moments.square, 1e-300) ** 0.5)
    return [value / scale if scale else 0.0 for value, scale in zip(found, scales, strict=True)]


def _active_set(
    matrix: Sequence[Sequence[float]], targets: Sequence[float], least: float
) -> list[float]:
    """Of features scaled to a square of 1 each."""
    size = len(targets)
    found = [0.0] * size
    chosen: list[int] = []
    barred: set[int] = set()
    while True:
        gains = {
            i: targets[i] - sum(matrix[i][j] * found[j] for j in chosen)
            for i in range(size)
            if i not in chosen and i not in barred
        }
        best = max(gains, key=lambda i: (gains[i], -i), default=-1)
        if best < 0 or gains[best] <= least:
            return found
        trial = [*chosen, best]
        solved = _solved(matrix, targets, trial)
        if solved is None or solved[-1] <= 0.0:
            barred.add(best)  # the others explain it: it has nothing to add
            continue
        barred.clear()
        chosen = trial
        while solved is not None and min(solved) <= 0.0:
            chosen = _step_back(found, chosen, solved)
            solved = _solved(matrix, targets, chosen)
        assert solved is not None
        found = [0.0] * size
        for i, value in zip(chosen, solved, strict=True):
            found[i] = value


def _step_back(found: list[float], chosen: list[int], solved: Sequence[float]) -> list[int]:
    """Go from ``found`` toward ``solved`` until a coefficient is 0; those that remain."""
    share = min(
        found[i] / (found[i] - value)
        for i, value in zip(chosen, solved, strict=True)
        if value <= 0.0
    )
    for i, value in zip(chosen, solved, strict=True):
        found[i] += share * (value - found[i])
    left = [i for i, value in zip(chosen, solved, strict=True) if value > 0.0 or found[i] > 1e-14]
    for i in chosen:
        if i not in left:
            found[i] = 0.0
    return left if len(left) < len(chosen) else chosen[:-1]


def _solved(
    matrix: Sequence[Sequence[float]], targets: Sequence[float], chosen: Sequence[int]
) -> list[float] | None:
    """The equations of the chosen features, by elimination; None if they do not determine them."""
    rows = [[*(matrix[i][j] for j in chosen), targets[i]] for i in chosen]
    size = len(rows)
    for k in range(size):
        pivot = rows[k][k]
        if pivot <= LEAST_PIVOT:
            return None
        for below in rows[k + 1 :]:
            factor = below[k] / pivot
            if factor:
                for column in range(k + 1, size + 1):
                    below[column] -= factor * rows[k][column]
    solved = [0.0] * size
    for k in reversed(range(size)):
        rest = sum(rows[k][j] * solved[j] for j in range(k + 1, size))
        solved[k] = (rows[k][size] - rest) / rows[k][k]
    return solved
