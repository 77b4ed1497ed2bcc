"""P/D = one mixed worker = any batch = any chunking, for every kind of sampling.

Prompts have salts of their own, so nothing comes out of a prefix cache.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from bitwise import FIRST_TOKEN_KINDS, KINDS, LENGTHS, Heard, Lab, Shape, ask_of, prompt_of

from pdserve.core.events import LifeName
from pdserve.core.request import RoutePreference

SHAPES = (
    Shape("split-one-shot", prefill=1, decode=1),
    Shape("split-by-layer", prefill=1, decode=1, one_shot_tokens=0),
    Shape("split-chunks-16", prefill=1, decode=1, max_step_tokens=16, one_shot_tokens=32),
    Shape("split-chunks-48", prefill=1, decode=1, max_step_tokens=48, one_shot_tokens=64),
    Shape("mixed", mixed=1),
    Shape("mixed-chunks-16", mixed=1, max_step_tokens=200, mixed_chunk_tokens=16),
    Shape("mixed-chunks-32", mixed=1, max_step_tokens=48, mixed_chunk_tokens=32),
    Shape(
        "mixed-both-ways",
        mixed=2,
        route=RoutePreference.SPLIT,
        max_step_tokens=256,
        mixed_chunk_tokens=48,
        one_shot_tokens=48,
    ),
)
CLUSTERS = [
    pytest.param((dtype, shape), id=f"{dtype}-{shape.name}")
    for dtype in ("fp32", "bf16")
    for shape in SHAPES
]
pytestmark = pytest.mark.parametrize("tiny_lab", CLUSTERS, indirect=True)


def test_alone(tiny_lab: Lab) -> None:
    """A diagonal of the matrix below, one request after the other."""
    kinds = list(KINDS)
    asks = [
        ask_of(kinds[i % len(kinds)], prompt_of(length), tiny_lab.reference)
        for i, length in enumerate((*LENGTHS, 40, 41, 42))
    ]
    assert {ask.name.split("-", 1)[1] for ask in asks} == set(KINDS)
    for ask, heard in zip(asks, tiny_lab.answer_each(asks), strict=True):
        opened = tiny_lab.details(heard, LifeName.HANDOFF_OPENED)
        granted = tiny_lab.details(heard, LifeName.HANDOFF_GRANTED)
        assert len(opened) == (tiny_lab.shape.splits and ask.may_hand_off)
        first_only = ask.name.split("-", 1)[1] in FIRST_TOKEN_KINDS
        assert first_only or len(granted) == len(opened)
        (start,) = tiny_lab.details(heard, LifeName.PREFILL_STARTED)
        assert start["cached_tokens"] == 0


def test_together(tiny_lab: Lab) -> None:
    """Every length with every kind, all at the same time, in an order that means nothing. Some ask
    for a local route, so that a worker that decodes for others also reads prompts."""
    reference = tiny_lab.reference
    asks = [ask_of(kind, prompt_of(length), reference) for kind in KINDS for length in LENGTHS]
    asks = [replace(ask, salt=f"together {ask.salt}") for ask in asks]
    random.Random(tiny_lab.shape.name).shuffle(asks)
    local = RoutePreference.LOCAL
    asks = [replace(ask, route=local) if i % 6 == 0 else ask for i, ask in enumerate(asks)]
    tiny_lab.answer_all(asks, waves=4)
    if tiny_lab.shape.splits and tiny_lab.shape.prefill:
        machine = tiny_lab.machine("prefill-0")
        prompt_tokens = sum(len(ask.prompt) for ask in asks if ask.route is not local)
        assert machine.batch.num_steps >= prompt_tokens / tiny_lab.shape.max_step_tokens


def test_the_same_prompt_many_times_at_once(tiny_lab: Lab) -> None:
    """Their blocks become shared while they are being computed, and while they arrive."""
    asks = [
        ask_of(kind, prompt_of(length), tiny_lab.reference, salt="twins")
        for length in (33, 65, 129)
        for kind in ("greedy", "seeded", "two", "penalties", "greedy", "three")
    ]
    random.Random(0).shuffle(asks)
    tiny_lab.answer_all(asks, waves=3)


def test_beside_readers_that_leave(tiny_lab: Lab) -> None:
    """Every other request is given up by its client, some before and some after token 0."""
    reference = tiny_lab.reference
    asks = [
        replace(ask_of(kind, prompt_of(length), reference), salt=f"beside {kind} {length}")
        for kind in ("greedy", "top_p", "three")
        for length in (17, 33, 48, 129)
    ]
    tiny_lab.prepare(asks)

    async def scenario() -> list[Heard]:
        stay, leave = [], []
        for number, ask in enumerate(asks):
            stay.append(tiny_lab.ask(ask))
            leave.append(tiny_lab.ask(replace(ask, salt=f"leaves {number}")))
        for number, (heard, task) in enumerate(leave):
            wanted = number % 3
            await tiny_lab.until(lambda heard=heard, wanted=wanted: heard.most >= wanted)
            task.cancel()
        await asyncio.gather(*(task for _, task in stay))
        return [heard for heard, _ in stay]

    tiny_lab.compare(asks, tiny_lab.run(scenario()))
    tiny_lab.assert_clean()


def test_after_a_broken_step(tiny_lab: Lab) -> None:
    """A step of several rows fails, and its rows are computed again one by one."""
    asks = [
        replace(ask_of(kind, prompt_of(length), tiny_lab.reference), salt=f"broken {kind} {length}")
        for kind, length in (("greedy", 17), ("three", 33), ("penalties", 65), ("top_p", 48))
    ]
    workers = [name for name, _ in tiny_lab.shape.workers]
    for worker in workers:
        tiny_lab.gates[worker].steps.break_once(lambda plan: len(plan.rows) > 1)
    tiny_lab.answer_all(asks)
    tiny_lab.assert_clean()
    assert any(tiny_lab.gates[worker].steps.has_broken for worker in workers)
    for worker in workers:
        tiny_lab.gates[worker].steps.break_once(lambda plan: False)
