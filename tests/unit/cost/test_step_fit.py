"""The fit of step times finds what is there, forgets what was, and bears with one bad step."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.step import StepSample, StepShape
from pdserve.cost.fit import StepFit
from pdserve.cost.step import StepModel

TRUTH = StepModel(
    prompt_base_s=0.02,
    per_prompt_token_s=2e-3,
    per_pair_s=4e-7,
    decode_base_s=0.03,
    per_sequence_s=4e-3,
    per_context_token_s=1e-6,
)
PRIOR = StepModel(
    prompt_base_s=0.01,
    per_prompt_token_s=1e-3,
    per_pair_s=5e-7,
    decode_base_s=0.05,
    per_sequence_s=1e-3,
    per_context_token_s=4e-6,
)


def scaled(model: StepModel, factor: float) -> StepModel:
    return StepModel(
        prompt_base_s=model.prompt_base_s * factor,
        per_prompt_token_s=model.per_prompt_token_s * factor,
        per_pair_s=model.per_pair_s * factor,
        decode_base_s=model.decode_base_s * factor,
        per_sequence_s=model.per_sequence_s * factor,
        per_context_token_s=model.per_context_token_s * factor,
    )


def prompt(tokens: int, before: int = 0, decoding: int = 0, context: int = 0) -> StepShape:
    return StepShape(tokens, (before + tokens) ** 2 - before**2, decoding, context)


def batch(size: int, length: int) -> StepShape:
    return StepShape(num_decoding=size, context_tokens=size * length)


def random_shape(draw: random.Random) -> StepShape:
    if draw.random() < 0.6:
        return batch(draw.randint(1, 32), draw.randint(50, 2000))
    decoding = draw.choice((0, draw.randint(1, 16)))
    return prompt(draw.randint(16, 2048), draw.choice((0, 512)), decoding, decoding * 400)


def learn(
    fit: StepFit, truth: StepModel, count: int, *, noise: float = 0.0, seed: int = 1
) -> StepFit:
    draw = random.Random(seed)
    for _ in range(count):
        shape = random_shape(draw)
        fit.add(StepSample(shape, truth.step_s(shape) * (1.0 + noise * draw.uniform(-1.0, 1.0))))
    return fit


TYPICAL = (prompt(64), prompt(512), prompt(2048), batch(1, 256), batch(16, 1024), batch(32, 2000))


def worst_error(model: StepModel, truth: StepModel) -> float:
    return max(abs(model.step_s(shape) / truth.step_s(shape) - 1.0) for shape in TYPICAL)


def test_before_any_step_the_stated_prior_holds() -> None:
    assert StepFit(PRIOR).model() == PRIOR


@pytest.mark.parametrize("level", [0.05, 1.0, 20.0])
def test_a_noisy_machine_is_known_after_some_hundred_steps(level: float) -> None:
    """Whatever the level of the prior: only its proportions are believed for long."""
    fit = learn(StepFit(scaled(PRIOR, level)), TRUTH, 800, noise=0.2)
    assert worst_error(fit.model(), TRUTH) < 0.06
    model = fit.model()
    assert model.per_prompt_token_s == pytest.approx(TRUTH.per_prompt_token_s, rel=0.1)
    assert model.per_sequence_s == pytest.approx(TRUTH.per_sequence_s, rel=0.1)
    assert model.decode_base_s == pytest.approx(TRUTH.decode_base_s, rel=0.1)
    assert 0.04 < fit.prompt_error < 0.2
    assert 0.04 < fit.decode_error < 0.2


@pytest.mark.parametrize("level", [0.05, 20.0])
def test_a_few_steps_correct_the_level_of_a_wrong_prior(level: float) -> None:
    fit = learn(StepFit(scaled(TRUTH, level)), TRUTH, 40)
    assert worst_error(fit.model(), TRUTH) < 0.35


def test_what_no_step_has_shown_keeps_the_proportions_of_the_prior() -> None:
    """Single sequences only, on a machine five times slower than stated: larger batches are
    five times slower too."""
    fit = StepFit(scaled(TRUTH, 0.2))
    for number in range(300):
        shape = batch(1, 200 + number)
        fit.add(StepSample(shape, TRUTH.step_s(shape)))
    large = batch(32, 1000)
    assert fit.model().step_s(large) == pytest.approx(TRUTH.step_s(large), rel=0.1)


def test_a_machine_that_has_changed_is_learned_anew() -> None:
    fit = learn(StepFit(PRIOR), TRUTH, 1000, noise=0.05)
    slow = scaled(TRUTH, 3.0)
    learn(fit, slow, 500, noise=0.05, seed=2)
    assert worst_error(fit.model(), slow) < 0.15
    learn(fit, TRUTH, 500, noise=0.05, seed=3)
    assert worst_error(fit.model(), TRUTH) < 0.15


def test_one_stalled_step_changes_little() -> None:
    fit = learn(StepFit(PRIOR), TRUTH, 400, noise=0.05)
    before = fit.model()
    for shape in (batch(4, 500), prompt(300)):
        fit.add(StepSample(shape, 200.0 * TRUTH.step_s(shape)))
    learn(fit, TRUTH, 8, seed=5)
    assert worst_error(fit.model(), before) < 0.06


def test_decoding_sequences_of_a_mixed_step_are_not_its_prompts_cost() -> None:
    fit = StepFit(PRIOR)
    draw = random.Random(3)
    for _ in range(400):
        alone = batch(draw.randint(1, 32), draw.randint(50, 2000))
        fit.add(StepSample(alone, TRUTH.step_s(alone)))
        mixed = prompt(draw.randint(16, 512), draw.choice((0, 512)), 16, 16 * 700)
        fit.add(StepSample(mixed, TRUTH.step_s(mixed)))
    whole = prompt(256)
    assert fit.model().step_s(whole) == pytest.approx(TRUTH.step_s(whole), rel=0.05)


def test_a_step_without_a_time_or_a_shape_says_nothing() -> None:
    fit = StepFit(PRIOR)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        fit.add(StepSample(batch(1, 10), seconds))
    fit.add(StepSample(StepShape(), 1.0))
    assert fit.model() == PRIOR
    assert (fit.num_prompt_samples, fit.num_decode_samples) == (0, 0)


def test_a_fit_goes_on_from_its_state() -> None:
    whole = learn(learn(StepFit(PRIOR), TRUTH, 100, noise=0.1), TRUTH, 99, noise=0.1, seed=2)
    first = learn(StepFit(PRIOR), TRUTH, 100, noise=0.1)
    second = learn(StepFit(PRIOR, state=first.state()), TRUTH, 99, noise=0.1, seed=2)
    assert astuple(second.model()) == pytest.approx(astuple(whole.model()), rel=1e-3)
    assert second.num_decode_samples == whole.num_decode_samples


shapes = st.builds(
    StepShape,
    prompt_tokens=st.integers(0, 4096),
    prompt_pairs=st.integers(1, 1 << 30),
    num_decoding=st.integers(0, 256),
    context_tokens=st.integers(0, 1 << 22),
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(shapes, st.floats(1e-7, 1e3)), max_size=80), st.sampled_from((1e-3, 1.0, 50))
)
def test_whatever_is_measured_coefficients_are_not_negative(
    measured: list[tuple[StepShape, float]], level: float
) -> None:
    """And the same samples give the same fit, bit by bit; nothing overflows."""
    fits = [StepFit(scaled(PRIOR, level)) for _ in range(2)]
    for shape, seconds in measured:
        for fit in fits:
            fit.add(StepSample(shape, seconds))
        assert all(0.0 <= value < 1e9 for value in astuple(fits[0].model()))
        assert fits[0].model().step_s(batch(1, 1)) >= 0.0
    assert fits[0].model() == fits[1].model()
    assert fits[0].state() == fits[1].state()


@settings(max_examples=40)
@given(st.floats(0.0, 0.1), st.floats(0.0, 1e-2), st.floats(0.0, 1e-5), st.integers(0, 1 << 30))
def test_any_machine_without_noise_is_found(
    base_s: float, per_sequence_s: float, per_context_token_s: float, seed: int
) -> None:
    truth = StepModel(
        prompt_base_s=0.02,
        per_prompt_token_s=1e-3,
        per_pair_s=0.0,
        decode_base_s=base_s + 1e-3,
        per_sequence_s=per_sequence_s,
        per_context_token_s=per_context_token_s,
    )
    draw = random.Random(seed)
    fit = StepFit(PRIOR)
    for _ in range(400):
        shape = batch(draw.randint(1, 32), draw.randint(50, 2000))
        fit.add(StepSample(shape, truth.step_s(shape)))
    for shape in (batch(2, 100), batch(16, 1000), batch(32, 1900)):
        assert fit.model().step_s(shape) == pytest.approx(truth.step_s(shape), rel=0.15)
