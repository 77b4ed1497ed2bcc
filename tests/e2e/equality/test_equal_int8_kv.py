"""The same equality where the pools hold int8: split = local = any batch, chunking and cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bitwise import LENGTHS, Lab, Shape, ask_of, lab_of, prompt_of

from pdserve.core.events import LifeName
from pdserve.core.request import RoutePreference

SHAPE = Shape("split", prefill=1, decode=1, max_step_tokens=80, one_shot_tokens=33)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def int8_lab(request: pytest.FixtureRequest, tiny_model_path: Path) -> Iterator[Lab]:
    start = replace(SHAPE.start(tiny_model_path, request.param), kv_dtype="int8")
    with lab_of(SHAPE, start) as lab:
        yield lab


def test_split_and_local_at_once_and_again_from_the_cache(int8_lab: Lab) -> None:
    kinds = ("greedy", "three", "seeded")
    asks = [
        ask_of(kind, prompt_of(length), int8_lab.reference) for kind in kinds for length in LENGTHS
    ]
    random.Random(0).shuffle(asks)
    local = RoutePreference.LOCAL
    asks = [replace(ask, route=local) if i % 3 == 0 else ask for i, ask in enumerate(asks)]
    heard = int8_lab.answer_all(asks, waves=3)
    granted = [int8_lab.details(one, LifeName.HANDOFF_GRANTED) for one in heard]
    assert sum(map(bool, granted)) > len(asks) / 2
    again = int8_lab.answer_all(asks)
    started = [int8_lab.details(one, LifeName.PREFILL_STARTED) for one in again]
    assert any(int(detail["cached_tokens"]) for details in started for detail in details)
