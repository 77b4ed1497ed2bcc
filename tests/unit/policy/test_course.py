"""How decoding goes on: who comes, who ends, and how fast all of that is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from pdserve.cost.step import StepModel
from pdserve.policy.course import MAX_EVENTS, Course, Flight, Newcomers

MS = 0.001
STEPS = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=0.0,
    per_pair_s=0.0,
    decode_base_s=10 * MS,
    per_sequence_s=1 * MS,
    per_context_token_s=0.01 * MS,
)
"""A step of n sequences takes 10 + n ms, and 1 ms for every 100 tokens of context."""


def flight(left: float, *, context: int = 0, starts_in_s: float = 0.0) -> Flight:
    return Flight(context_tokens=context, tokens_left=left, starts_in_s=starts_in_s)


def test_nobody_is_the_base_of_a_step() -> None:
    course = Course(STEPS, ())
    assert course.pace_s(0.0) == course.pace_s(5.0) == course.pace_s(math.inf) == 10 * MS
    assert course.ends() == []


def test_those_who_are_on_their_way_do_not_slow_those_who_decode_before_them() -> None:
    """10 steps of 11 ms and some, not of 20: nine come when all is over."""
    coming = [flight(100, starts_in_s=1.0)] * 9
    course = Course(STEPS, [flight(10), *coming])
    [(end_s, tokens), *_] = course.ends()
    assert end_s == pytest.approx(10 * 11 * MS, rel=0.01)
    assert tokens == 10
    assert course.pace_s(0.5) == pytest.approx(10 * MS)
    assert course.pace_s(1.0) == pytest.approx(19 * MS)


def by_the_millisecond(flights: Sequence[Flight], at_s: float) -> float:
    """Seconds of a step then, by going through every fifth of a millisecond."""
    tick_s, now, left = 0.2 * MS, 0.0, [one.tokens_left for one in flights]

    def pace_s() -> float:
        decodes = [i for i, one in enumerate(flights) if one.starts_in_s <= now and left[i] > 0]
        done = [flights[i].tokens_left - left[i] for i in decodes]
        context = sum(flights[i].context_tokens for i in decodes) + sum(done)
        return STEPS.decode_s(len(decodes), round(context))

    while now < at_s:
        step = tick_s / pace_s()
        left = [n - step * (one.starts_in_s <= now) for n, one in zip(left, flights, strict=True)]
        now += tick_s
    return pace_s()


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_as_small_steps_would_go(seed: int) -> None:
    draw = random.Random(seed)
    flights = [
        flight(
            draw.uniform(5, 60),
            context=draw.randrange(50),
            starts_in_s=max(0.0, draw.uniform(-1.0, 1.0)),
        )
        for _ in range(20)
    ]
    course = Course(STEPS, flights)
    for at_s in (0.0, 0.2, 0.5, 1.1):
        assert course.pace_s(at_s) == pytest.approx(by_the_millisecond(flights, at_s), rel=0.06)
    ends = course.ends()
    assert len(ends) == 20
    assert [end_s for end_s, _ in ends] == sorted(end_s for end_s, _ in ends)
    whole = sorted(one.context_tokens + one.tokens_left for one in flights)
    assert sorted(tokens for _, tokens in ends) == pytest.approx(whole)


def test_it_is_asked_in_any_order() -> None:
    flights = [flight(5.0 * n, context=n, starts_in_s=0.02 * (n % 7)) for n in range(1, 30)]
    moments = [0.3, 0.0, 0.1, 0.9, 0.2]
    one, other = Course(STEPS, flights), Course(STEPS, flights)
    found = {at_s: one.pace_s(at_s) for at_s in moments}
    other.ends()
    assert found == {at_s: other.pace_s(at_s) for at_s in sorted(moments)}


def test_newcomers_keep_a_load_where_it_is() -> None:
    """Twenty decode; as one ends another comes, over and over. Without them nobody would be left
    after a while."""
    pace_s = STEPS.decode_s(20, 0)
    here = [flight(10.0 * n) for n in range(1, 21)]
    late = [flight(200, starts_in_s=pace_s * (10 * n + 0.1)) for n in range(1, 21)]
    newcomers = Newcomers(late, 200 * pace_s)
    steps = StepModel(
        prompt_base_s=0.0,
        per_prompt_token_s=0.0,
        per_pair_s=0.0,
        decode_base_s=STEPS.decode_base_s,
        per_sequence_s=STEPS.per_sequence_s,
        per_context_token_s=0.0,
    )
    steady, alone = Course(steps, here, newcomers), Course(steps, here)
    for num_steps in (55, 155, 355, 755):
        found = steady.pace_s(num_steps * pace_s)
        assert found == pytest.approx(pace_s, abs=3 * MS)
    assert alone.pace_s(755 * pace_s) == 10 * MS


def test_far_away_is_as_it_was_before_that() -> None:
    """However many come, so much is worked out and no more."""
    crowd = Newcomers([flight(3, starts_in_s=MS * n) for n in range(1, 101)], 0.1)
    course = Course(STEPS, [flight(1000)], crowd)
    far_s = course.pace_s(1e6)
    assert 10 * MS < far_s < 1.0
    assert course.pace_s(1e7) == far_s
    assert len(course._states) == MAX_EVENTS + 1


def test_steps_that_take_no_time_end_at_once() -> None:
    free = StepModel(
        prompt_base_s=0.0,
        per_prompt_token_s=0.0,
        per_pair_s=0.0,
        decode_base_s=0.0,
        per_sequence_s=0.0,
        per_context_token_s=0.0,
    )
    course = Course(free, [flight(10), flight(20, starts_in_s=1.0)])
    assert [end_s for end_s, _ in course.ends()] == pytest.approx([0.0, 1.0], abs=1e-6)
    assert course.pace_s(2.0) < 1e-6
