"""The fake runner notices everything that a test around it could get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.fake import FakeRunner
from pdserve.engine.registry import create_runner

PARAMS = SamplingParams(max_tokens=9, seed=5)
PROMPT = tuple(range(20, 60))
TABLE = (3, 1, 5)


def plan(
    token_ids: Sequence[int],
    start: int,
    table: Sequence[int] = TABLE,
    sample: SampleSpec | None = SampleSpec(params=PARAMS, choices=(0,), index=0),  # noqa: B008
) -> StepPlan:
    step_row = StepRow(
        attempt=AttemptId(RequestId("r"), Epoch(1)),
        token_ids=tuple(token_ids),
        start=start,
        block_ids=tuple(BlockId(b) for b in table),
        sample=sample,
    )
    return StepPlan(step_id=StepId(1), rows=(step_row,))


def attached(**options: Any) -> tuple[FakeRunner, bytearray]:
    runner = FakeRunner(**options)
    memory = bytearray(runner.info.layout.pool_bytes(8))
    runner.attach_pool(memoryview(memory), 8)
    return runner, memory


def token(runner: FakeRunner, what: StepPlan) -> int:
    return runner.execute(what).tokens[0][0].token_id


def test_every_byte_of_the_sequence_counts() -> None:
    """Flip any byte of a slot in use: the next token is another. Of a slot not in use: the same."""
    runner, memory = attached(vocab_size=2**60)
    runner.execute(plan(PROMPT[:39], 0, sample=None))
    expected = token(runner, plan(PROMPT[39:], 39))
    size = runner.info.layout.block_bytes
    slot = size // 32  # keys and values of 16 positions
    for layer in range(2):
        for index, block in enumerate(TABLE):
            start = (layer * 8 + block) * size
            for byte in (0, slot - 1, size // 2, size // 2 + slot):
                memory[start + byte] ^= 1
                assert token(runner, plan(PROMPT[39:], 39)) != expected, (layer, index, byte)
                memory[start + byte] ^= 1
        memory[(layer * 8 + 2) * size] ^= 1  # a block of nobody
        memory[(layer * 8 + TABLE[2]) * size + 12 * slot] ^= 1  # position 44
    assert token(runner, plan(PROMPT[39:], 39)) == expected


def test_tokens_positions_and_order_count() -> None:
    runner, _ = attached(vocab_size=2**60)
    swapped = (PROMPT[1], PROMPT[0], *PROMPT[2:])
    answers = {
        token(runner, plan(PROMPT, 0)),
        token(runner, plan(swapped, 0)),
        token(runner, plan(PROMPT[:-1], 0)),
        token(runner, plan((*PROMPT, 0), 0)),
    }
    assert len(answers) == 4
    assert token(runner, plan(PROMPT, 0, table=(7, 0, 2))) in answers


def test_seed_choice_and_index_count_unless_greedy() -> None:
    runner, _ = attached(vocab_size=2**60)
    spec = SampleSpec(params=PARAMS, choices=(0, 1), index=0)
    variants = [spec, replace(spec, index=1), replace(spec, params=replace(PARAMS, seed=6))]
    drawn = {
        sampled.token_id
        for variant in variants
        for sampled in runner.execute(plan(PROMPT, 0, sample=variant)).tokens[0]
    }
    assert len(drawn) == 6
    greedy = [
        replace(variant, params=replace(variant.params, temperature=0.0)) for variant in variants
    ]
    same = {
        sampled.token_id
        for variant in greedy
        for sampled in runner.execute(plan(PROMPT, 0, sample=variant)).tokens[0]
    }
    assert len(same) == 1


def test_no_ending_token_before_min_tokens_and_logprobs_on_request() -> None:
    runner, _ = attached(vocab_size=4)
    params = replace(PARAMS, min_tokens=8, eos_token_ids=(0, 1), stop_token_ids=(3,), logprobs=3)
    for index in range(8):
        spec = SampleSpec(params=params, choices=(0,), index=index)
        (sampled,) = runner.execute(plan(PROMPT, 0, sample=spec)).tokens[0]
        assert sampled.token_id == 2
        assert sampled.logprobs is not None
        assert sampled.logprobs.top == ((2, -0.5), (3, -1.5), (0, -2.5))


def test_a_hook_may_fail_the_step_and_a_step_may_last() -> None:
    def fail(step: StepPlan) -> None:
        if step.step_id == 1:
            raise RuntimeError("device lost")

    runner, memory = attached(before_step=fail, step_s=0.001)
    with pytest.raises(RuntimeError, match="device lost"):
        runner.execute(plan(PROMPT, 0))
    assert not any(memory)
    runner.execute(replace(plan(PROMPT, 0), step_id=StepId(2)))
    assert any(memory)


def test_runners_are_made_by_name() -> None:
    runner = create_runner("fake", vocab_size=17)
    assert isinstance(runner, FakeRunner)
    assert runner.info.vocab_size == 17
    words = "engine 'fast' is unknown: choose one of fake, modelled, torch"
    with pytest.raises(ConfigError, match=words):
        create_runner("fast")
