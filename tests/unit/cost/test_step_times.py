"""Step times from a text, and who is how fast."""

from __future__ import annotations

import pytest

from pdserve.config import ServeConfig, resolve
from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.step_times import PROFILES, parse_speeds, parse_step_times, speed_of


def test_coefficients_are_those_of_the_step_model() -> None:
    text = "start=5ms,prompt=0.2ms,pair=10ns,decode=10ms,sequence=0.5ms,context=2us,transfer=3us"
    times = parse_step_times(text)
    prompt = StepShape(prompt_tokens=100, prompt_pairs=10_000)
    assert times.step_s(prompt) == pytest.approx(0.005 + 0.020 + 0.0001)
    decode = StepShape(num_decoding=4, context_tokens=1_000)
    assert times.step_s(decode) == pytest.approx(0.010 + 0.002 + 0.002)
    assert times.at_speed(2.0).step_s(decode) == pytest.approx(0.007)
    assert times.transfer_s == pytest.approx(3e-6)
    assert parse_step_times(str(times)) == times


def test_a_profile_can_be_changed_in_part() -> None:
    known = PROFILES["opt-13b-a100"]
    assert parse_step_times("opt-13b-a100") == known
    changed = parse_step_times("opt-13b-a100, transfer=0s, decode=1s")
    assert changed.transfer_s == 0.0
    assert changed.steps.decode_base_s == 1.0
    assert changed.steps.per_pair_s == known.steps.per_pair_s


@pytest.mark.parametrize(
    "text", ["", "nobody", "prompt", "prompt=2", "prompt=ms", "promt=2ms", "prompt=-1ms", 7]
)
def test_other_texts_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a profile"):
        parse_step_times(text)


def test_a_worker_has_its_own_speed_or_that_of_its_role() -> None:
    speeds = parse_speeds("prefill=2, decode-1=0.5")
    found = [
        speed_of(speeds, worker, worker[:-2]) for worker in ("prefill-0", "decode-0", "decode-1")
    ]
    assert found == [2.0, 1.0, 0.5]
    for text in ("", "prefill", "prefill=0", "prefill=x", "=2", "prefill=inf", 3):
        with pytest.raises(ValueError, match="speeds by role"):
            parse_speeds(text)


def test_options_of_engines_that_wait_belong_to_them() -> None:
    flags = {"engine": "modelled", "step_times": "decode=10ms", "speeds": "decode-0=2"}
    config = resolve(flags, {}).config
    assert config.step_times == parse_step_times("decode=10ms")
    with pytest.raises(ConfigError, match="for --engine modelled"):
        ServeConfig(step_times=parse_step_times("decode=10ms"))
    with pytest.raises(ConfigError, match="'mixed', and there is no such worker"):
        resolve({**flags, "speeds": "mixed=2"}, {})
    with pytest.raises(ConfigError, match="--step-times is 'x'; it must be a profile"):
        resolve({**flags, "step_times": "x"}, {})
    with pytest.raises(ConfigError, match="--roles is 'some'; it is one of fixed, auto, advise"):
        ServeConfig(roles="some")
