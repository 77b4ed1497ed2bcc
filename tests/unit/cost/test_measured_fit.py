"""Fits of step times with a known truth: found again, with the error that was put in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from pdserve.core.step import StepShape
from pdserve.cost.measured import Bends, Kind, MeasuredSteps
from pdserve.cost.measured_fit import TimedStep, TooFewStepsError, fit_steps
from pdserve.cost.pace import DECODE, MIXED, PROMPT
from pdserve.cost.step import StepModel

LINEAR = StepModel(
    prompt_base_s=2e-3,
    per_prompt_token_s=1e-4,
    per_pair_s=1e-8,
    decode_base_s=5e-3,
    per_sequence_s=2e-4,
    per_context_token_s=5e-7,
)
BENT = MeasuredSteps(
    Kind(base_s=1e-3, size=Bends((64.0, 256.0), (3e-5, 1e-4, 2e-4)), per_second_s=2e-8),
    Kind(base_s=8e-3, size=Bends((8.0,), (1e-4, 6e-4)), per_second_s=1e-6),
    Kind(base_s=3e-3, size=Bends((), (0.9,)), per_sequence_s=3e-4, per_second_s=5e-7),
)


def shapes(source: random.Random, number: int) -> StepShape:
    """Of all kinds in turn."""
    tokens = round(2 ** source.uniform(3, 11))
    before = source.choice((0, 0, 512))
    batch = source.choice((1, 2, 4, 8, 16))
    context = batch * source.randint(20, 1500)
    prompts = (tokens, (before + tokens) ** 2 - before**2)
    if number % 3 == 0:
        return StepShape(*prompts)
    return (
        StepShape(0, 0, batch, context) if number % 3 == 1 else StepShape(*prompts, batch, context)
    )


def timed(
    seconds: Callable[[StepShape], float], noise: float, count: int = 600, seed: int = 0
) -> list[TimedStep]:
    """``noise``: the standard deviation of a step's relative error."""
    source = random.Random(seed)
    steps = [shapes(source, number) for number in range(count)]
    return [TimedStep(s, seconds(s) * (1 + source.gauss(0.0, noise))) for s in steps]


def test_a_linear_truth_without_noise_is_found_exactly() -> None:
    fit = fit_steps(timed(LINEAR.step_s, 0.0))
    for shape in (
        StepShape(700, 490_000),
        StepShape(0, 0, 5, 4_000),
        StepShape(100, 10_000, 3, 900),
    ):
        assert fit.steps.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=1e-6)
    assert fit.linear.per_pair_s == pytest.approx(LINEAR.per_pair_s, rel=1e-4)
    assert fit.linear.per_context_token_s == pytest.approx(LINEAR.per_context_token_s, rel=1e-4)
    assert all(error.p90 < 1e-6 for error in fit.errors.values())
    assert set(fit.errors) == {PROMPT, DECODE, MIXED}


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_error_that_it_states_is_the_noise_that_nobody_can_predict(noise: float) -> None:
    fit = fit_steps(timed(BENT.step_s, noise))
    for error in fit.errors.values():
        assert error.median == pytest.approx(0.6745 * noise, rel=0.35)  # of a normal distribution
        assert error.p90 == pytest.approx(1.645 * noise, rel=0.35)
    source = random.Random(99)
    for number in range(60):
        shape = shapes(source, number)
        assert fit.steps.step_s(shape) == pytest.approx(BENT.step_s(shape), rel=0.15)


def test_bends_are_found_where_there_are_some_and_only_there() -> None:
    bent = fit_steps(timed(BENT.step_s, 0.01))
    straight = fit_steps(timed(LINEAR.step_s, 0.01))
    assert bent.steps.kinds[PROMPT].size.knots
    assert not straight.steps.kinds[PROMPT].size.knots
    assert not straight.steps.kinds[DECODE].size.knots
    by_one_line = [
        abs(bent.linear.step_s(s.shape) / s.elapsed_s - 1) for s in timed(BENT.step_s, 0)
    ]
    assert sorted(by_one_line)[len(by_one_line) // 2] > 2 * bent.errors[PROMPT].median


def test_a_mixed_step_is_what_was_measured_of_such_steps_and_no_sum() -> None:
    fit = fit_steps(timed(BENT.step_s, 0.02))
    shape = StepShape(512, 512 * 512, 8, 6_000)
    halves = BENT.step_s(StepShape(512, 512 * 512)) + BENT.step_s(StepShape(0, 0, 8, 6_000))
    assert fit.steps.step_s(shape) == pytest.approx(BENT.step_s(shape), rel=0.04)
    assert fit.steps.step_s(shape) < 0.97 * halves


def test_what_neighbours_cost_is_told_apart_from_the_step() -> None:
    source = random.Random(3)
    steps = []
    for step in timed(LINEAR.step_s, 0.01):
        prompt_share, decode_share = source.choice(((0, 0), (1, 0), (0.5, 0.5), (0, 1)))
        lost = (0.3, 0.1) if step.shape.prompt_tokens else (0.2, 0.05)
        elapsed_s = step.elapsed_s / (1 - lost[0] * prompt_share - lost[1] * decode_share)
        beside = (elapsed_s * prompt_share, elapsed_s * decode_share)
        steps.append(TimedStep(step.shape, elapsed_s, *beside))
    fit = fit_steps(steps)
    assert fit.lost[PROMPT].beside_prompt == pytest.approx(0.3, abs=0.02)
    assert fit.lost[PROMPT].beside_decode == pytest.approx(0.1, abs=0.02)
    assert fit.lost[DECODE].beside_prompt == pytest.approx(0.2, abs=0.02)
    shape = StepShape(0, 0, 4, 2_000)
    assert fit.steps.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=0.02)


def test_what_messages_and_neighbours_tokens_cost_is_told_apart_from_the_step() -> None:
    source = random.Random(4)
    steps = []
    for step in timed(LINEAR.step_s, 0.01):
        heard, drawn = source.choice((0, 0, 0, 1, 4)), source.choice((0, 0, 1, 8))
        each_s = (8e-4, 3e-4) if step.shape.prompt_tokens else (3e-4, 1e-4)
        elapsed_s = step.elapsed_s + heard * each_s[0] + drawn * each_s[1]
        steps.append(TimedStep(step.shape, elapsed_s, num_heard=heard, num_drawn=drawn))
    fit = fit_steps(steps)
    assert fit.lost[PROMPT].per_message_s == pytest.approx(8e-4, abs=1e-4)
    assert fit.lost[PROMPT].per_token_s == pytest.approx(3e-4, abs=5e-5)
    assert fit.lost[DECODE].per_message_s == pytest.approx(3e-4, abs=5e-5)
    assert fit.lost[DECODE].per_token_s == pytest.approx(1e-4, abs=2e-5)
    shape = StepShape(0, 0, 4, 2_000)
    assert fit.steps.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=0.02)


def test_few_mixed_steps_are_not_mistaken_for_their_neighbours() -> None:
    """Nearly all of them ran beside a neighbour: what it cost is known from the prompts."""
    source = random.Random(6)
    steps, num_mixed = [], 0
    for step in timed(LINEAR.step_s, 0.01):
        mixed = bool(step.shape.prompt_tokens and step.shape.num_decoding)
        num_mixed += mixed
        if mixed and num_mixed > 24:
            continue
        share = source.choice((1, 1, 1, 0.9)) if mixed else source.choice((0, 1))
        lost = 0.25 if step.shape.prompt_tokens else 0.1
        elapsed_s = step.elapsed_s / (1 - lost * share)
        steps.append(TimedStep(step.shape, elapsed_s, 0.0, elapsed_s * share))
    fit = fit_steps(steps)
    assert fit.lost[MIXED] == fit.lost[PROMPT]
    shape = StepShape(200, 40_000, 4, 2_000)
    assert fit.steps.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=0.03)


def test_steps_that_are_held_up_do_not_bend_the_fit_but_count_in_its_mean() -> None:
    source = random.Random(5)
    steps = [
        TimedStep(s.shape, s.elapsed_s * (3.0 if source.random() < 0.05 else 1.0))
        for s in timed(LINEAR.step_s, 0.01)
    ]
    fit = fit_steps(steps)
    shape = StepShape(0, 0, 4, 2_000)
    assert fit.steps.step_s(shape) == pytest.approx(1.1 * LINEAR.step_s(shape), rel=0.04)
    spread = fit.spreads[DECODE]
    assert spread.at(0.5) == pytest.approx(1 / 1.1, rel=0.05)
    assert spread.at(0.99) == pytest.approx(3 / 1.1, rel=0.08)
    draws = [spread.at((number + 0.5) / 20_000) for number in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(1.0, abs=0.03)


def test_how_long_steps_take_in_operation_is_what_counts_if_it_was_measured() -> None:
    """Those that show a kind of step on their own give the shape; they take a tenth longer here."""
    steps = timed(LINEAR.step_s, 0.01)
    alone = [replace(step, elapsed_s=1.1 * step.elapsed_s) for step in steps]
    usual = [replace(step, is_usual=True) for step in steps]
    often = fit_steps([*usual[:150], *alone[150:]])
    seldom = fit_steps([*usual[:30], *alone[30:]])
    for shape in (
        StepShape(700, 490_000),
        StepShape(0, 0, 5, 4_000),
        StepShape(100, 10_000, 3, 900),
    ):
        truth_s = LINEAR.step_s(shape)
        assert often.steps.step_s(shape) == pytest.approx(truth_s, rel=0.03)
        assert seldom.steps.step_s(shape) == pytest.approx(1.1 * truth_s, rel=0.03)
    spread = often.spreads[PROMPT]
    draws = [spread.at((number + 0.5) / 2_000) for number in range(2_000)]
    assert sum(draws) / len(draws) == pytest.approx(1.0, abs=0.01)


def test_slow_spells_are_remembered() -> None:
    source = random.Random(7)
    factor, steps = 1.0, []
    for step in timed(LINEAR.step_s, 0.0, count=3000):
        factor = 1.0 + 0.9 * (factor - 1.0) + source.gauss(0, 0.02)
        steps.append(TimedStep(step.shape, step.elapsed_s * factor))
    assert fit_steps(steps).spreads[DECODE].memory > 0.4
    assert fit_steps(timed(LINEAR.step_s, 0.05)).spreads[DECODE].memory < 0.25


def test_it_says_how_far_it_was_measured() -> None:
    fit = fit_steps(timed(LINEAR.step_s, 0.0))
    assert fit.measured.holds(StepShape(1000, 1_000_000, 16, 10_000))
    assert not fit.measured.holds(StepShape(5000, 25_000_000))
    assert not fit.measured.holds(StepShape(0, 0, 17, 100))


def test_too_few_steps_of_a_kind_are_no_fit() -> None:
    steps = [step for step in timed(LINEAR.step_s, 0.0) if not step.shape.prompt_tokens]
    with pytest.raises(TooFewStepsError, match=PROMPT):
        fit_steps(steps)


def test_the_same_steps_give_the_same_fit() -> None:
    assert fit_steps(timed(BENT.step_s, 0.1)).linear == fit_steps(timed(BENT.step_s, 0.1)).linear


def test_without_mixed_steps_a_mixed_one_takes_the_sum_of_its_parts() -> None:
    alone = [
        s for s in timed(LINEAR.step_s, 0) if not (s.shape.prompt_tokens and s.shape.num_decoding)
    ]
    fit = fit_steps(alone)
    shape = StepShape(100, 10_000, 3, 900)
    assert MIXED not in fit.errors
    assert fit.steps.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=1e-6)


def test_lines_with_bends_are_what_they_say() -> None:
    bends = Bends((4.0, 10.0), (1.0, 0.5, 2.0))
    steps = MeasuredSteps(Kind(base_s=1.0, size=bends), Kind(base_s=0.0, size=bends), None)
    heights = [steps.step_s(StepShape(0, 0, n, 0)) for n in (1, 4, 6, 10, 12)]
    assert heights == pytest.approx([1.0, 4.0, 5.0, 7.0, 11.0])
    assert bends.parts(6.0) == [4.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="rising knots"):
        Bends((4.0, 2.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="rising knots"):
        Bends((4.0,), (1.0, -1.0))
