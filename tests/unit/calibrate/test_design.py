"""What a calibration asks: every kind of step, within the server's limits and its own budget."""

from __future__ import annotations

import pytest

from pdserve.calibrate.design import Design, Limits, Pace, Stage

SLOW = Pace(prompt_token_s=8e-4, decode_s=0.012)
FAST = Pace(prompt_token_s=2e-5, decode_s=0.006)
ROOMY = Limits(longest_tokens=8192, pool_tokens=46_000, workers=2)


def stages(
    limits: Limits = ROOMY, pace: Pace = SLOW, seconds: float = 60.0, seed: int = 0
) -> list[Stage]:
    design = Design(limits, seed, splits=True)
    return [*design.probes(), *design.round(pace, seconds)]


def of(name: str, found: list[Stage]) -> list[Stage]:
    return [stage for stage in found if stage.name == name]


def test_a_round_shows_every_kind_of_step() -> None:
    found = stages()
    (prompts,) = of("prompts", found)
    lengths = [request.prompt_tokens for request in prompts.requests]
    assert prompts.in_turn
    assert len(lengths) >= 8
    assert max(lengths) > 16 * min(lengths)
    batches = [len(stage.requests) for stage in of("batches", found)]
    assert {1, 2, 4, 8, 16} <= set(batches)
    for stage in of("mixed", found):
        assert stage.route == "local"
        assert any(request.at_s > 0 for request in stage.requests)
    light, heavy = of("load", found)
    for load in (light, heavy):
        assert load.route == "auto"
        assert all(a.at_s < b.at_s for a, b in zip(load.requests, load.requests[1:], strict=False))


@pytest.mark.parametrize("pace", [SLOW, FAST])
def test_a_round_takes_about_its_budget(pace: Pace) -> None:
    found = stages(pace=pace)
    (prompts,) = of("prompts", found)
    spent_s = sum(pace.prompt_s(request.prompt_tokens) for request in prompts.requests)
    assert spent_s <= 0.15 * 60 + pace.prompt_s(2048)
    for load in of("load", found):
        assert load.requests[-1].at_s <= 0.25 * 60


def test_a_heavy_load_asks_for_most_of_what_the_server_can_do() -> None:
    """Of prompts, which are what takes its time: a prefill worker has 60 s in a minute."""

    def asked(load: Stage) -> float:
        prompts_s = sum(SLOW.prompt_s(request.prompt_tokens) for request in load.requests)
        return prompts_s / load.requests[-1].at_s

    light, heavy = of("load", stages(seconds=600.0))
    assert asked(light) == pytest.approx(0.4, rel=0.25)
    assert asked(heavy) == pytest.approx(0.8, rel=0.25)


def test_prompts_come_beside_few_sequences_and_beside_many() -> None:
    at_once = [sum(r.at_s == 0 for r in stage.requests) for stage in of("mixed", stages())]
    assert at_once == [2, 6, 12]
    for stage in of("mixed", stages()):
        assert len({r.at_s for r in stage.requests if r.at_s > 0}) >= 5


@pytest.mark.parametrize("limits", [
    Limits(longest_tokens=8192, pool_tokens=46_000),
    Limits(longest_tokens=256, pool_tokens=2_000),
    Limits(longest_tokens=130, pool_tokens=160),
])  # fmt: skip
def test_nothing_is_asked_that_the_server_does_not_hold(limits: Limits) -> None:
    for stage in stages(limits):
        assert stage.requests
        for request in stage.requests:
            assert request.prompt_tokens >= 1
            assert request.prompt_tokens + request.output_tokens <= limits.longest_tokens
        if stage.name == "batches":
            wanted = sum(r.prompt_tokens + r.output_tokens for r in stage.requests)
            assert wanted <= limits.pool_tokens


def test_no_prompt_is_asked_twice_and_the_same_seed_asks_the_same() -> None:
    found = stages()
    names = [s.name for stage in found for r in stage.requests for s in r.segments]
    assert len(set(names)) == len(names)
    assert stages() == found
    assert stages(seed=1) != found


def test_one_worker_is_asked_nothing_that_needs_two() -> None:
    design = Design(ROOMY, 0, splits=False)
    assert {stage.route for stage in design.round(SLOW, 30.0)} == {"auto"}


def test_with_less_time_less_is_asked_and_no_faster() -> None:
    long, short = stages(seconds=240.0), stages(seconds=60.0)
    assert sum(len(s.requests) for s in short) < sum(len(s.requests) for s in long)
    for whole, part in zip(of("load", long), of("load", short), strict=True):
        rates = [len(stage.requests) / stage.requests[-1].at_s for stage in (whole, part)]
        assert rates[1] == pytest.approx(rates[0], rel=0.4)
