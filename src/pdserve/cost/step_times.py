"""Step times as one writes them on a command line, for engines that only wait for theirs.

A profile's name, coefficients, or a profile with some of its coefficients changed::

    opt-13b-a100
    start=5ms,prompt=0.2ms,pair=10ns,decode=10ms,sequence=0.5ms,context=2us,transfer=10us
    opt-13b-a100,transfer=0s

=============  =======================================================================
``start``      of a step with prompts, before its first token
``prompt``     of a prompt token
``pair``       of each of the n² pairs of a prompt of n tokens (`StepShape.prompt_pairs`)
``decode``     of a step that only decodes, before its first sequence
``sequence``   of a sequence that decodes
``context``    of a token before one that is decoded
``transfer``   of one token's KV on the link between two workers
=============  =======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.step import StepModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A step model, ``speed`` times as fast as it says; ``transfer_s``: seconds for the KV of a
    token on the link, which is no faster for it."""

    steps: StepModel
    transfer_s: float = 0.0
    speed: float = 1.0

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        return self.steps.step_s(shape) / self.speed

    def at_speed(self, speed: float) -> StepTimes:
        return replace(self, speed=speed)

    def __str__(self) -> str:
        values = {name: getattr(self.steps, field) for name, field in _COEFFICIENTS.items()}
        values["transfer"] = self.transfer_s
        return ",".join(f"{name}={value:g}s" for name, value in values.items() if value)


_COEFFICIENTS = {
    "start": "prompt_base_s",
    "prompt": "per_prompt_token_s",
    "pair": "per_pair_s",
    "decode": "decode_base_s",
    "sequence": "per_sequence_s",
    "context": "per_context_token_s",
}
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TIME = re.compile(r"(\d+(?:\.\d*)?(?:e-?\d+)?)\s*(s|ms|us|ns)")

INSTANT = StepTimes(
    steps=StepModel(
        prompt_base_s=0.0,
        per_prompt_token_s=0.0,
        per_pair_s=0.0,
        decode_base_s=0.0,
        per_sequence_s=0.0,
        per_context_token_s=0.0,
    )
)

PROFILES: Mapping[str, StepTimes] = {
    "instant": INSTANT,
    "opt-13b-a100": StepTimes(
        steps=StepModel(
            prompt_base_s=18.10e-3,
            per_prompt_token_s=0.10191e-3,
            per_pair_s=7.12e-9,
            decode_base_s=19.93e-3,
            per_sequence_s=0.0385e-3,
            per_context_token_s=0.627e-6,
        ),
        transfer_s=33e-6,
    ),
    "opt-66b-4xa100": StepTimes(
        steps=StepModel(
            prompt_base_s=29.44e-3,
            per_prompt_token_s=0.15135e-3,
            per_pair_s=8.32e-9,
            decode_base_s=30.76e-3,
            per_sequence_s=0.0633e-3,
            per_context_token_s=0.452e-6,
        ),
        transfer_s=24e-6,
    ),
}
"""The two of OPT are DistServe's fits (OSDI 2024, its simulator's step-time tables; batches below
95). Their transfer times: 819,200 and 2,359,296 bytes of KV a token over 25 GB/s of InfiniBand for
each GPU."""

DEFAULT_PROFILE = "opt-13b-a100"


def parse_step_times(value: object) -> StepTimes:
    """Of a text as above; coefficients of no profile that are left out are 0. Raises `ValueError`
    with what it should be."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(_expected())
    first, *rest = (part.strip() for part in value.split(","))
    times, pairs = INSTANT, [first, *rest]
    if "=" not in first:
        if first not in PROFILES:
            raise ValueError(_expected())
        times, pairs = PROFILES[first], rest
    for pair in pairs:
        name, _, written = pair.partition("=")
        match = _TIME.fullmatch(written.strip())
        if match is None:
            raise ValueError(_expected())
        seconds = float(match[1]) * _UNITS[match[2]]
        if name == "transfer":
            times = replace(times, transfer_s=seconds)
        elif name in _COEFFICIENTS:
            times = replace(times, steps=replace(times.steps, **{_COEFFICIENTS[name]: seconds}))
        else:
            raise ValueError(_expected())
    return times


def _expected() -> str:
    return (
        f"a profile ({', '.join(PROFILES)}), or coefficients such as prompt=0.2ms,decode=10ms out "
        f"of {', '.join([*_COEFFICIENTS, 'transfer'])}"
    )


def parse_speeds(value: object) -> dict[str, float]:
    """How fast workers are, by role or id: ``prefill=2,decode-1=0.5``. Raises `ValueError`."""
    speeds: dict[str, float] = {}
    for pair in value.split(",") if isinstance(value, str) else [""]:
        name, _, number = pair.partition("=")
        try:
            speed = float(number)
        except ValueError:
            speed = 0.0
        if not name.strip() or not 0 < speed < float("inf"):
            raise ValueError("speeds by role or worker, such as prefill=2,decode-1=0.5")
        speeds[name.strip()] = speed
    return speeds


def speed_of(speeds: Mapping[str, float], worker: str, role: str) -> float:
    """Of a worker: its own, or that of its home role, or 1."""
    return speeds.get(worker, speeds.get(role, 1.0))


def check_speeds(speeds: Mapping[str, float], known: Mapping[str, str]) -> None:
    """``known``: role by worker id. Raises `ConfigError` for a speed that is nobody's."""
    names = {*known, *known.values()}
    for name in speeds:
        if name not in names:
            raise ConfigError(
                f"--speeds names {name!r}, and there is no such worker; there are "
                f"{', '.join(known)}"
            )
