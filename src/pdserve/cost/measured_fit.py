"""From timed steps of one kind of worker to `MeasuredSteps`, and how far off they are.

Every kind of step is fitted by least squares of the relative error, no coefficient below zero,
steps that were held up counting for less (Huber). How many bends the line over tokens or sequences
has is what cross-validation decides: from none to one at each power of two that was measured, the
simplest one whose error on steps that it has not seen is nearly the least. That error is kept, as
median and 90th percentile: it is what the profile says about itself. Folds are blocks of time, so
that a fold's steps are not the neighbours of those that were fitted.

What made a step longer that is no part of its shape is fitted with it: neighbours on the host, the
tokens that they drew, and messages that its process had to work on meanwhile. A mixed step, of
which there are few, loses as much to these as a step of prompts, which it mostly is; it is fitted
without that.

The fit says what steps usually take; what makes some longer is kept as the spread of measured over
predicted times, with its own mean taken into the fit: means of many steps come out right. Spread
and mean are those of steps in operation, if the samples have such: a prompt after a pause, or one
of a batch that came at one moment, takes some percent longer than what clients see. Where steps
were measured in rounds, the mean is that of the median round: a machine that others share has slow
minutes, and one of them is no reason to expect it always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pdserve.core.step import StepShape
from pdserve.cost.machine import StepRange
from pdserve.cost.measured import Bends, Kind, MeasuredSteps
from pdserve.cost.nonnegative import Moments, nonnegative_fit
from pdserve.cost.pace import DECODE, KINDS, MIXED, PROMPT, Lost, Spread, kind_of
from pdserve.cost.step import StepModel
from pdserve.cost.strays import leveled, mean, quantile, spread_of

NUM_FOLDS = 5
LEAST_SAMPLES = 6
"""Of a kind; fewer say nothing that could be checked."""
LEAST_USUAL = 32
"""Of a kind; of fewer steps in operation no mean is taken."""
MOST_SAMPLES = 1500
"""Of a kind; of more, those of the most frequent sizes are thinned out."""
SAMPLES_A_PIECE = 4
NEARLY = 1.03
"""More bends must make the error smaller than by this factor."""
NOTHING = 1e-6
LARGEST_RATIO = 20.0
MOST_LOST = 0.8
"""Of a step's pace; more is noise."""
MOST_EVENT_S = 5e-3
"""That a message or a token takes from a step; more is noise."""
NUM_HINDRANCES = 4
LEAST_REST = 0.2
"""Of a step's time, when what hindered it is taken off."""


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step that a live worker ran. ``beside_prompt_s`` and ``beside_decode_s``: for how long of
    it neighbours on the same machine computed prompts, or only decoded. ``num_heard``: how many
    messages its process got while it ran; ``num_drawn``: how many tokens neighbours drew.
    ``is_usual``: it was one of a load as clients send it, not of one that shows a kind of step.
    ``round``: in which round of the measurement it ran."""

    shape: StepShape
    elapsed_s: float
    beside_prompt_s: float = 0.0
    beside_decode_s: float = 0.0
    num_heard: int = 0
    num_drawn: int = 0
    is_usual: bool = False
    round: int = 0

    @property
    def hindrances(self) -> list[float]:
        """What made it longer that is no part of its shape: the features of a fit."""
        counts = (float(self.num_heard), float(self.num_drawn))
        return [self.beside_prompt_s, self.beside_decode_s, *counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """``|predicted - measured| / measured`` of steps that were left out of the fit, in the median
    and for nine of ten. ``num_steps`` were measured."""

    num_steps: int
    median: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsFit:
    """All that timed steps say. ``errors``, ``spreads`` and ``lost`` by kind; a kind of which there
    were too few steps is in none of them."""

    steps: MeasuredSteps
    linear: StepModel
    measured: StepRange
    errors: dict[str, FitError]
    spreads: dict[str, Spread]
    lost: dict[str, Lost]


class TooFewStepsError(ValueError):
    """The kind of step of which there are too few to fit is the argument."""


def fit_steps(samples: Sequence[TimedStep]) -> StepsFit:
    """Samples in the order in which they were measured. Raises `TooFewStepsError` if not enough of
    them compute prompts alone, or only decode."""
    by_kind: dict[str, list[TimedStep]] = {kind: [] for kind in KINDS}
    for sample in samples:
        if sample.elapsed_s > 0 and (sample.shape.prompt_tokens or sample.shape.num_decoding):
            by_kind[kind_of(sample.shape)].append(sample)
    for kind in (PROMPT, DECODE):
        if len(by_kind[kind]) < LEAST_SAMPLES:
            raise TooFewStepsError(kind)
    prompt = _fit_kind(by_kind[PROMPT], _shape_features, _bends_of(by_kind[PROMPT]), _simple_kind)
    decode = _fit_kind(by_kind[DECODE], _shape_features, _bends_of(by_kind[DECODE]), _simple_kind)
    fits = {PROMPT: prompt, DECODE: decode}
    if len(by_kind[MIXED]) >= LEAST_SAMPLES:
        alone = MeasuredSteps(prompt.kind, decode.kind, None)

        def features(shape: StepShape, _: Bends) -> list[float]:
            prompts = StepShape(shape.prompt_tokens, shape.prompt_pairs)
            context = float(shape.context_tokens)
            return [1.0, alone.step_s(prompts), float(shape.num_decoding), context]

        unhindered = [_unhindered(sample, prompt.lost) for sample in by_kind[MIXED]]
        of_mixed = _fit_kind(unhindered, features, [Bends()], _mixed_kind)
        fits[MIXED] = replace(of_mixed, lost=prompt.lost)
    mixed = fits[MIXED].kind if MIXED in fits else None
    return StepsFit(
        steps=MeasuredSteps(prompt.kind, decode.kind, mixed),
        linear=_linear(by_kind),
        measured=_range(samples),
        errors={kind: fit.error for kind, fit in fits.items()},
        spreads={kind: fit.spread for kind, fit in fits.items()},
        lost={kind: fit.lost for kind, fit in fits.items()},
    )


@dataclass(frozen=True, slots=True)
class _KindFit:
    kind: Kind
    lost: Lost
    error: FitError
    spread: Spread


@dataclass(frozen=True, slots=True)
class _Row:
    """A sample as a fit sees it: features, seconds, weight, and the fold that leaves it out."""

    features: list[float]
    seconds: float
    weight: float
    fold: int


Features = Callable[[StepShape, Bends], list[float]]


def _fit_kind(
    samples: Sequence[TimedStep],
    features: Features,
    candidates: Sequence[Bends],
    made: Callable[[Sequence[float], Bends], Kind],
) -> _KindFit:
    kept = _thinned(samples)
    best: tuple[float, Bends, list[float], list[float]] | None = None
    for bends in candidates:
        rows = _rows(kept, features, bends)
        errors = _held_out_errors(rows)
        score = mean([min(error, 1.0) for error in errors])
        if best is None or score * NEARLY + NOTHING < best[0]:
            best = (score, bends, nonnegative_fit(_moments(rows)), errors)
    assert best is not None
    _, bends, found, errors = best
    usual = [sample for sample in samples if sample.is_usual]
    judged = usual if len(usual) >= LEAST_USUAL else samples
    ratios = [(sample.round, _ratio(sample, found, features, bends)) for sample in judged]
    level, strayed = leveled(ratios)
    size = len(found) - NUM_HINDRANCES
    found = [value * level for value in found[:size]] + found[size:]
    ordered = sorted(errors)
    error = FitError(
        num_steps=len(samples), median=quantile(ordered, 0.5), p90=quantile(ordered, 0.9)
    )
    beside_prompt, beside_decode, per_message_s, per_token_s = found[size:]
    lost = Lost(
        beside_prompt=min(beside_prompt, MOST_LOST),
        beside_decode=min(beside_decode, MOST_LOST),
        per_message_s=min(per_message_s, MOST_EVENT_S),
        per_token_s=min(per_token_s, MOST_EVENT_S),
    )
    return _KindFit(made(found[:size], bends), lost, error, spread_of(strayed))


def _unhindered(sample: TimedStep, lost: Lost) -> TimedStep:
    """The step as it would have been alone."""
    each = (lost.beside_prompt, lost.beside_decode, lost.per_message_s, lost.per_token_s)
    lost_s = _product(each, sample.hindrances)
    alone_s = max(sample.elapsed_s - lost_s, LEAST_REST * sample.elapsed_s)
    return TimedStep(sample.shape, alone_s, is_usual=sample.is_usual, round=sample.round)


def _shape_features(shape: StepShape, bends: Bends) -> list[float]:
    if shape.prompt_tokens:
        return [1.0, *bends.parts(float(shape.prompt_tokens)), float(shape.prompt_pairs)]
    return [1.0, *bends.parts(float(shape.num_decoding)), float(shape.context_tokens)]


def _simple_kind(found: Sequence[float], bends: Bends) -> Kind:
    base_s, *slopes, per_second_s = found
    return Kind(base_s=base_s, size=Bends(bends.knots, tuple(slopes)), per_second_s=per_second_s)


def _mixed_kind(found: Sequence[float], _: Bends) -> Kind:
    base_s, factor, per_sequence_s, per_context_s = found
    return Kind(
        base_s=base_s,
        size=Bends((), (factor,)),
        per_second_s=per_context_s,
        per_sequence_s=per_sequence_s,
    )


# --- candidates and samples --------------------------------------------------------------------


def _bends_of(samples: Sequence[TimedStep]) -> list[Bends]:
    """No bend; one at every fourth, every second and every power of two that was measured, each
    piece with samples of its own."""
    sizes = sorted(_size(sample) for sample in samples)
    candidates = [Bends((), (0.0,))]
    for stride in (3, 2, 1):
        knots: list[float] = []
        low = 0.0
        for power in range(stride, 20, stride):  # a piece up to 1 would be the base again
            knot = float(1 << power)
            inside = [size for size in sizes if low < size <= knot]
            beyond = sum(size > knot for size in sizes)
            enough = len(inside) >= SAMPLES_A_PIECE and len(set(inside)) > 1
            if enough and beyond >= SAMPLES_A_PIECE:
                knots.append(knot)
                low = knot
        bends = Bends(tuple(knots), (0.0,) * (len(knots) + 1))
        if bends not in candidates:
            candidates.append(bends)
    return candidates


def _size(sample: TimedStep) -> int:
    return sample.shape.prompt_tokens or sample.shape.num_decoding


def _thinned(samples: Sequence[TimedStep]) -> list[TimedStep]:
    """At most about `MOST_SAMPLES`: every so many of a size, rare sizes whole; order is kept."""
    if len(samples) <= MOST_SAMPLES:
        return list(samples)
    places: dict[int, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[_size(sample).bit_length()].append(place)
    share = MOST_SAMPLES // len(places)
    kept: list[int] = []
    for of_size in places.values():
        stride = max(1, -(-len(of_size) // share))
        kept.extend(of_size[::stride])
    return [samples[place] for place in sorted(kept)]


def _rows(samples: Sequence[TimedStep], features: Features, bends: Bends) -> list[_Row]:
    """Weighted by the relative error: what is far off a first fit pulls no more than what is at its
    border."""
    block = max(1, len(samples) // (NUM_FOLDS * 4))
    rows = [
        _Row(
            [*features(sample.shape, bends), *sample.hindrances],
            sample.elapsed_s,
            1.0 / sample.elapsed_s**2,
            place // block % NUM_FOLDS,
        )
        for place, sample in enumerate(samples)
    ]
    for _ in range(2):
        found = nonnegative_fit(_moments(rows))
        predicted = [max(_product(found, row.features), 1e-12) for row in rows]
        off = [abs(row.seconds / p - 1.0) for row, p in zip(rows, predicted, strict=True)]
        limit = max(0.03, 2.0 * quantile(sorted(off), 0.5))
        rows = [
            _Row(row.features, row.seconds, min(1.0, limit / max(o, 1e-12)) / p**2, row.fold)
            for row, p, o in zip(rows, predicted, off, strict=True)
        ]
    return rows


# --- fitting -----------------------------------------------------------------------------------


def _moments(rows: Sequence[_Row]) -> Moments:
    moments = Moments(len(rows[0].features))
    for row in rows:
        moments.add(row.features, row.seconds, row.weight)
    return moments


def _held_out_errors(rows: Sequence[_Row]) -> list[float]:
    folds: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        folds[row.fold].append(row)
    whole = _moments(rows)
    errors: list[float] = []
    for held_out in folds.values():
        found = nonnegative_fit(whole.plus(_moments(held_out), -1.0))
        errors.extend(
            abs(_product(found, row.features) - row.seconds) / row.seconds for row in held_out
        )
    return errors


def _ratio(sample: TimedStep, found: Sequence[float], features: Features, bends: Bends) -> float:
    """Measured by predicted, what hindered it taken off."""
    lost_s = _product(found[-NUM_HINDRANCES:], sample.hindrances)
    alone_s = _product(found[:-NUM_HINDRANCES], features(sample.shape, bends))
    if alone_s <= 0:
        return 1.0
    return min(max((sample.elapsed_s - lost_s) / alone_s, 0.05), LARGEST_RATIO)


def _linear(by_kind: dict[str, list[TimedStep]]) -> StepModel:
    """The nearest `StepModel`, of steps as they were, neighbours and all."""
    halves = []
    for kind in (PROMPT, DECODE):
        plain = [TimedStep(sample.shape, sample.elapsed_s) for sample in by_kind[kind]]
        found = nonnegative_fit(_moments(_rows(_thinned(plain), _shape_features, Bends())))
        halves.append(found[:3])
    (prompt_base, per_token, per_pair), (decode_base, per_sequence, per_context) = halves
    return StepModel(
        prompt_base_s=prompt_base,
        per_prompt_token_s=per_token,
        per_pair_s=per_pair,
        decode_base_s=decode_base,
        per_sequence_s=per_sequence,
        per_context_token_s=per_context,
    )


def _range(samples: Sequence[TimedStep]) -> StepRange:
    shapes = [sample.shape for sample in samples]
    return StepRange(
        prompt_tokens=max(shape.prompt_tokens for shape in shapes),
        num_decoding=max(shape.num_decoding for shape in shapes),
        context_tokens=max(shape.context_tokens for shape in shapes),
    )


def _product(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(coefficients, features, strict=True))
