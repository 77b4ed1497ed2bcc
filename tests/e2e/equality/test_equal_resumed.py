"""An answer that is resumed half way is the same one, whoever died and at what moment.

Workers are killed without a word while they answer several requests. Moments that pass too quickly
are held: a runner waits before a step or before a push until its worker is known to be cut off.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from bitwise import Ask, Heard, Lab, Shape, ask_of, prompt_of

from pdserve.core.events import LifeName
from pdserve.core.step import StepPlan

PAIR = Shape("1P1D", prefill=1, decode=1, max_step_tokens=48, one_shot_tokens=33)
TWO_DECODE = Shape("1P2D", prefill=1, decode=2, max_step_tokens=48, one_shot_tokens=33)
TWO_PREFILL = Shape("2P1D", prefill=2, decode=1, max_step_tokens=32, one_shot_tokens=0)
TWO_MIXED = Shape("2M", mixed=2, max_step_tokens=64, mixed_chunk_tokens=16)
TIGHT = (
    Shape("tight-mixed", mixed=1, num_blocks=16, max_step_tokens=64, mixed_chunk_tokens=32),
    Shape("tight-split", prefill=1, decode=1, num_blocks=16, max_step_tokens=64),
)
NUM_TOKENS = 24
ASKED = (
    (17, "greedy"),
    (32, "seeded"),
    (49, "penalties"),
    (65, "two"),
    (16, "top_p"),
    (31, "three"),
    (64, "filters"),
    (33, "greedy-penalties"),
    (15, "pattern"),
    (48, "schema-two"),
)


def clusters(*shapes: Shape) -> pytest.MarkDecorator:
    found = [
        pytest.param((dtype, shape), id=f"{dtype}-{shape.name}")
        for dtype in ("fp32", "bf16")
        for shape in shapes
    ]
    return pytest.mark.parametrize("tiny_lab", found, indirect=True)


def asks(lab: Lab, salt: str) -> list[Ask]:
    """Answers of `NUM_TOKENS` tokens that nothing ends earlier."""
    made = [ask_of(kind, prompt_of(length), lab.reference) for length, kind in ASKED]
    return [
        replace(
            ask,
            params=replace(ask.params, max_tokens=NUM_TOKENS, ignore_eos=True),
            salt=f"{salt} {ask.name}",
        )
        for ask in made
    ]


def most_written(lab: Lab, heard: list[Heard], worker: str) -> int:
    """Tokens of the longest answer that is now being written by this worker."""

    def writer(one: Heard) -> object:
        routes = lab.details(one, LifeName.ROUTED)
        return routes[-1]["decode"] if routes else None

    return max((one.most for one in heard if writer(one) == worker), default=0)


async def begin(lab: Lab, asked: list[Ask]) -> tuple[list[Heard], list[asyncio.Task[None]]]:
    started = [lab.ask(ask) for ask in asked]
    return [heard for heard, _ in started], [task for _, task in started]


async def end(lab: Lab, tasks: list[asyncio.Task[None]], *killed: str) -> None:
    """All answers to their end, and the killed workers back."""
    await asyncio.gather(*tasks)
    await lab.restart(*killed)


def taken_at_resume(lab: Lab, heard: list[Heard]) -> list[int]:
    """Tokens that the client had, for each resume of each request."""
    return [
        int(detail["taken_tokens"])
        for one in heard
        for detail in lab.details(one, LifeName.RESUMED)
    ]


@clusters(PAIR, TWO_DECODE)
def test_decode_worker_dies_in_mid_answer(tiny_lab: Lab) -> None:
    lab = tiny_lab
    asked = asks(lab, "mid answer")

    async def scenario() -> list[Heard]:
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: most_written(lab, heard, "decode-0") >= 10)
        lab.kill("decode-0")
        await end(lab, tasks, "decode-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    taken = taken_at_resume(lab, heard)
    assert len(taken) >= len(asked) // lab.shape.decode
    assert max(taken) >= 10


@pytest.mark.parametrize("index", [1, 2, NUM_TOKENS - 1])
@clusters(PAIR)
def test_decode_worker_dies_in_the_step_of_a_token(tiny_lab: Lab, index: int) -> None:
    """Before the last token there is nothing left to hand over; before token 2 a stop token may
    not yet be drawn (`min_tokens`)."""
    lab = tiny_lab
    asked = asks(lab, f"step {index}")
    early = ask_of("stops-first-too-early", prompt_of(47), lab.reference, salt=f"early {index}")
    asked.append(early)
    gate = lab.gates["decode-0"].steps

    def draws(plan: StepPlan) -> bool:
        return any(row.sample is not None and row.sample.index == index for row in plan.rows)

    async def scenario() -> list[Heard]:
        gate.hold(draws)
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: gate.is_held)
        lab.kill("decode-0")
        await lab.until_lost("prefill-0", "decode-0")
        gate.release()
        await end(lab, tasks, "decode-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert max(taken_at_resume(lab, heard)) >= index


@clusters(PAIR)
def test_prefill_worker_dies_after_acceptance(tiny_lab: Lab) -> None:
    """Nobody needs it any more: nothing is resumed."""
    lab = tiny_lab
    asked = asks(lab, "accepted")

    async def scenario() -> list[Heard]:
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: all(one.fewest >= 2 for one in heard))
        lab.kill("prefill-0")
        await end(lab, tasks, "prefill-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert not taken_at_resume(lab, heard)


@clusters(TWO_DECODE)
def test_two_decode_workers_die_one_after_the_other(tiny_lab: Lab) -> None:
    """What is left of the answers is written by the worker that read the prompts."""
    lab = tiny_lab
    asked = asks(lab, "twice")

    async def scenario() -> list[Heard]:
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: most_written(lab, heard, "decode-0") >= 6)
        lab.kill("decode-0")
        await lab.until(lambda: most_written(lab, heard, "decode-1") >= 14)
        lab.kill("decode-1")
        await end(lab, tasks, "decode-0", "decode-1")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert len(taken_at_resume(lab, heard)) > len(asked)


@clusters(TWO_MIXED)
def test_mixed_worker_dies_in_mid_answer(tiny_lab: Lab) -> None:
    lab = tiny_lab
    asked = asks(lab, "mixed")

    async def scenario() -> list[Heard]:
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: most_written(lab, heard, "mixed-0") >= 10)
        lab.kill("mixed-0")
        await end(lab, tasks, "mixed-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert max(taken_at_resume(lab, heard)) >= 10


@clusters(PAIR, TWO_PREFILL)
def test_prefill_worker_dies_in_mid_prompt(tiny_lab: Lab) -> None:
    """Its second chunk of some prompt is never computed; the first has been sent or not."""
    lab = tiny_lab
    asked = asks(lab, "mid prompt")
    gate = lab.gates["prefill-0"].steps

    async def scenario() -> list[Heard]:
        gate.hold(lambda plan: any(row.start for row in plan.rows))
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: gate.is_held)
        lab.kill("prefill-0")
        await lab.until_lost("decode-0", "prefill-0")
        gate.release()
        await end(lab, tasks, "prefill-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert 0 in taken_at_resume(lab, heard)


@clusters(PAIR, TWO_PREFILL)
def test_prefill_worker_dies_between_token_0_and_acceptance(tiny_lab: Lab) -> None:
    """It even writes one more layer after the decode worker has given it up: into quarantine."""
    lab = tiny_lab
    asked = asks(lab, "token 0")
    gate = lab.gates["prefill-0"].pushes
    quarantined: list[int] = []

    async def scenario() -> list[Heard]:
        gate.hold(lambda layer: True)
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: gate.is_held and all(one.fewest for one in heard))
        if lab.shape.prefill == 1:
            assert all(one.most == 1 for one in heard)
        lab.kill("prefill-0")
        await lab.until_lost("decode-0", "prefill-0")
        quarantined.append(lab.machine("decode-0").batch.tables.pool.num_quarantined)
        gate.release()
        await end(lab, tasks, "prefill-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert quarantined[0] > 0
    assert any(taken_at_resume(lab, heard))


@clusters(PAIR, TWO_DECODE)
def test_decode_worker_dies_between_token_0_and_acceptance(tiny_lab: Lab) -> None:
    lab = tiny_lab
    asked = asks(lab, "no acceptance")
    gate = lab.gates["prefill-0"].pushes

    async def scenario() -> list[Heard]:
        gate.hold(lambda layer: True)
        heard, tasks = await begin(lab, asked)
        await lab.until(lambda: all(one.fewest for one in heard))
        assert all(one.most == 1 for one in heard)
        lab.kill("decode-0")
        await lab.until_lost("prefill-0", "decode-0")
        gate.release()
        await end(lab, tasks, "decode-0")
        return heard

    heard = lab.run(scenario())
    lab.compare(asked, heard)
    lab.assert_clean()
    assert len(taken_at_resume(lab, heard)) >= len(asked) // lab.shape.decode


@clusters(*TIGHT)
def test_preempted_for_want_of_blocks(tiny_lab: Lab) -> None:
    """Recomputed on the same worker, or handed back and resumed elsewhere."""
    lab = tiny_lab
    asked = asks(lab, "tight")
    heard = lab.answer_all(asked)
    lab.assert_clean()
    assert sum(len(lab.details(one, LifeName.PREEMPTED)) for one in heard) > 0
    resumed = taken_at_resume(lab, heard)
    assert bool(resumed) == lab.shape.splits
