"""Lines through noisy times: ``y = sum of coefficient * feature``, no coefficient below zero.

A `Regression` learns one sample at a time, in constant time and memory, by the normal equations of
weighted least squares. Five things make it fit for times measured on machines that serve:

- *Errors count in proportion*: a sample weighs by the inverse square of what was predicted for it,
  so short steps are fitted as well as long ones.
- *It forgets*: with every sample all earlier ones lose a share of one in ``window``, and up to
  `MOST_HASTE` times that while its predictions are off to one side, as after a change of the
  machine or of the load.
- *It starts from a prior*, given as (features, seconds) at typical shapes, which weighs like
  ``prior_weight`` samples and is never forgotten: what the load does not show (the cost of a large
  batch, while all are small) stays in the prior's proportions. Its level is not believed: the prior
  is scaled by the mean ratio of measured to stated times, so a machine that is ten times slower
  than stated is known as that after a few samples.
- *Outliers are bounded* (Huber's weights): a sample that is off by more than three times the usual
  error pulls no more than one that is off by just that.
- *Coefficients are never negative*: the best fit among all sets of features left out.

The same samples in the same order give the same coefficients, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, isfinite, log

Features = tuple[float, ...]

ERROR_SHARE = 0.05
"""Of a new sample in the running error."""
LARGEST_ERROR = 4.0
"""A single error counts as no more than this in the running error."""
LEAST_HUBER_LIMIT = 0.3
USUAL_DRIFT = 0.04
"""A mean signed error of this much, by predicted times, is noise; more of it means that what was
learned is out of date, and speeds up forgetting by its square."""
MOST_HASTE = 16.0
EAGER_SAMPLES = 16
"""So many samples are each followed by a solution; later on every eighth is."""
LEAST_MEASURED_S = 1e-12
"""A time below that is none: squares of such would vanish."""
LEAST_PIVOT = 1e-10
"""A feature that the others explain up to this share of its square is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionState:
    """All that a regression has learned. ``moments``: upper triangle of the normal matrix, by rows;
    ``targets``: its right side. ``weight``: of the samples not forgotten. ``log_level``: mean
    logarithm of measured by stated times. ``error``: running mean of ``|measured - predicted| /
    measured``; ``spread``: of ``|measured - predicted| / predicted``; ``drift``: of the same with
    its sign."""

    moments: tuple[float, ...]
    targets: tuple[float, ...]
    num_samples: int = 0
    weight: float = 0.0
    log_level: float = 0.0
    error: float = 0.0
    spread: float = 0.0
    drift: float = 0.0


class Regression:
    """Learns the coefficients of ``scales``-many features.

    ``prior``: (features, seconds above 0) at typical shapes. ``scales``: typical sizes of the
    features, for the sake of the numbers only. ``window``: samples that count.
    """

    def __init__(
        self,
        prior: Sequence[tuple[Features, float]],
        scales: Features,
        *,
        prior_weight: float = 4.0,
        window: float = 512.0,
        state: RegressionState | None = None,
    ) -> None:
        assert prior
        assert all(seconds > 0 for _, seconds in prior)
        self._scales = scales
        self._pairs = [(i, j) for i in range(len(scales)) for j in range(i, len(scales))]
        self._window = window
        share = prior_weight / len(prior)
        self._prior_moments = [0.0] * len(self._pairs)
        self._prior_targets = [0.0] * len(scales)
        for features, seconds in prior:
            scaled = [value / scale for value, scale in zip(features, scales, strict=True)]
            for place, (i, j) in enumerate(self._pairs):
                self._prior_moments[place] += share * scaled[i] * scaled[j] / (seconds * seconds)
            for i, value in enumerate(scaled):
                self._prior_targets[i] += share * value / seconds
        self._prior_coefficients = self._solution(self._prior_moments, self._prior_targets)
        self._moments = [0.0] * len(self._pairs)
        self._targets = [0.0] * len(scales)
        self.num_samples = 0
        self.error = 0.0
        self._weight = self._log_level = self._spread = self._drift = 0.0
        if state is not None:
            self._take(state)
        self.coefficients: Features = ()
        self._solve()

    def predict(self, features: Features) -> float:
        """Seconds, by the coefficients of now."""
        return sum(map(_times, self.coefficients, features))

    def add(self, features: Features, measured_s: float) -> None:
        """Learn from one sample; one without a time above 0 says nothing."""
        if not (measured_s >= LEAST_MEASURED_S and isfinite(measured_s)):
            return
        predicted_s = self.predict(features)
        stated_s = sum(map(_times, self._prior_coefficients, features))
        if predicted_s <= 0.0 or stated_s <= 0.0:
            return
        off = abs(measured_s - predicted_s)
        relative = off / predicted_s
        limit = max(LEAST_HUBER_LIMIT, 3.0 * self._spread)
        trust = 1.0 if relative <= limit else limit / relative
        haste = min(1.0 + (self._drift / USUAL_DRIFT) ** 2, MOST_HASTE)
        keep = max(0.0, 1.0 - haste / self._window)
        self._weight = self._weight * keep + 1.0
        self._log_level += (log(measured_s / stated_s) - self._log_level) / (self._weight + 1.0)
        share = max(ERROR_SHARE, 1.0 / (self.num_samples + 1))
        self.error += share * (min(off / measured_s, LARGEST_ERROR) - self.error)
        self._spread += share * (min(relative, LARGEST_ERROR) - self._spread)
        signed = min((measured_s - predicted_s) / predicted_s, 1.0)
        self._drift += ERROR_SHARE * (signed - self._drift)
        self._accumulate(features, measured_s, trust / (predicted_s * predicted_s), keep)
        self.num_samples += 1
        if self.num_samples <= EAGER_SAMPLES or self.num_samples % 8 == 0:
            self._solve()

    def state(self) -> RegressionState:
        """What was learned, to go on from in another process."""
        return RegressionState(
            moments=tuple(self._moments),
            targets=tuple(self._targets),
            num_samples=self.num_samples,
            weight=self._weight,
            log_level=self._log_level,
            error=self.error,
            spread=self._spread,
            drift=self._drift,
        )

    # --- inside -------------------------------------------------------------------------------

    def _take(self, state: RegressionState) -> None:
        if (len(state.moments), len(state.targets)) != (len(self._moments), len(self._targets)):
            raise ValueError("the state is that of another regression")
        self._moments, self._targets = list(state.moments), list(state.targets)
        self.num_samples, self.error = state.num_samples, state.error
        self._weight, self._log_level = state.weight, state.log_level
        self._spread, self._drift = state.spread, state.drift

    def _accumulate(
        self, features: Features, measured_s: float, weight: float, keep: float
    ) -> None:
        moments, targets = self._moments, self._targets
        scaled = [value / scale for value, scale in zip(features, self._scales, strict=True)]
        weighted = [weight * value for value in scaled]
        self._moments = [
            keep * old + weighted[i] * scaled[j]
            for old, (i, j) in zip(moments, self._pairs, strict=True)
        ]
        self._targets = [
            keep * old + value * measured_s for old, value in zip(targets, weighted, strict=True)
        ]

    def _solve(self) -> None:
        """Samples, and the prior at the level of the samples."""
        level = exp(self._log_level)
        moments = [
            mine + prior / (level * level)
            for mine, prior in zip(self._moments, self._prior_moments, strict=True)
        ]
        targets = [
            mine + prior / level
            for mine, prior in zip(self._targets, self._prior_targets, strict=True)
        ]
        self.coefficients = self._solution(moments, targets)

    def _solution(self, moments: Sequence[float], targets: Sequence[float]) -> Features:
        """Least squares with no negative coefficient.

        The best such fit leaves some features out and is the free optimum of the others; what is
        left of the squares is smallest where ``targets * coefficients`` is largest.
        """
        size = len(targets)
        free = _free_optimum(moments, targets) if size == 3 else None
        if free is not None and min(free) >= 0.0:
            return tuple(value / scale for value, scale in zip(free, self._scales, strict=True))
        matrix = [[0.0] * size for _ in range(size)]
        for (i, j), value in zip(self._pairs, moments, strict=True):
            matrix[i][j] = matrix[j][i] = value
        best, best_gain = [0.0] * size, 0.0
        for count in range(size, 0, -1):
            for chosen in combinations(range(size), count):
                solved = _solved(matrix, targets, chosen)
                if solved is None or min(solved) < 0.0:
                    continue
                gain = sum(targets[i] * value for i, value in zip(chosen, solved, strict=True))
                if gain > best_gain:
                    best, best_gain = [0.0] * size, gain
                    for i, value in zip(chosen, solved, strict=True):
                        best[i] = value
            if count == size and best_gain > 0.0:
                break  # the free optimum is allowed, and nothing is better
        return tuple(value / scale for value, scale in zip(best, self._scales, strict=True))


def _times(a: float, b: float) -> float:
    return a * b


def _free_optimum(
    moments: Sequence[float], targets: Sequence[float]
) -> tuple[float, float, float] | None:
    """As `_solved` for all of three features, which is nearly always the answer, and in haste."""
    a, b, c, d, e, f = moments
    if a <= 0.0:
        return None
    below_b, below_c = b / a, c / a
    pivot_d, rest_e = d - below_b * b, e - below_b * c
    if pivot_d <= LEAST_PIVOT * d:
        return None
    below_e = rest_e / pivot_d
    pivot_f = f - below_c * c - below_e * rest_e
    if pivot_f <= LEAST_PIVOT * f:
        return None
    y = targets[1] - below_b * targets[0]
    z = (targets[2] - below_c * targets[0] - below_e * y) / pivot_f
    y = (y - rest_e * z) / pivot_d
    return (targets[0] - b * y - c * z) / a, y, z


def _solved(
    matrix: Sequence[Sequence[float]], targets: Sequence[float], chosen: Sequence[int]
) -> list[float] | None:
    """The equations of the chosen features, by elimination; None if they do not determine them."""
    rows = [[*(matrix[i][j] for j in chosen), targets[i]] for i in chosen]
    size = len(rows)
    for k in range(size):
        pivot = rows[k][k]
        if pivot <= LEAST_PIVOT * matrix[chosen[k]][chosen[k]]:
            return None
        for below in rows[k + 1 :]:
            factor = below[k] / pivot
            for column in range(k + 1, size + 1):
                below[column] -= factor * rows[k][column]
    solved = [0.0] * size
    for k in reversed(range(size)):
        rest = sum(rows[k][j] * solved[j] for j in range(k + 1, size))
        solved[k] = (rows[k][size] - rest) / rows[k][k]
    return solved
