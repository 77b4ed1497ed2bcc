"""The modelled runner: its tokens prove the KV, and its steps take what the model says."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.cost.step_times import INSTANT, StepTimes, parse_step_times
from pdserve.engine.modelled import ModelledRunner

GREEDY = SamplingParams(max_tokens=9, seed=5, temperature=0.0)
PROMPT = tuple(random.Random(3).sample(range(250), 40))
TABLE = (3, 1, 5)
NUM_BLOCKS = 8


def row(
    token_ids: Sequence[int],
    start: int,
    table: Sequence[int] = TABLE,
    params: SamplingParams | None = GREEDY,
    pushes: bool = False,
) -> StepRow:
    return StepRow(
        attempt=AttemptId(RequestId("r"), Epoch(1)),
        token_ids=tuple(token_ids),
        start=start,
        block_ids=tuple(BlockId(block) for block in table),
        sample=None if params is None else SampleSpec(params=params, choices=(0,), index=0),
        pushes=pushes,
    )


def attached(times: StepTimes = INSTANT) -> tuple[ModelledRunner, bytearray]:
    runner = ModelledRunner(vocab_size=2**60, times=times)
    memory = bytearray(runner.info.layout.pool_bytes(NUM_BLOCKS))
    runner.attach_pool(memoryview(memory), NUM_BLOCKS)
    return runner, memory


def plan(*rows: StepRow) -> StepPlan:
    return StepPlan(step_id=StepId(1), rows=rows)


def token(runner: ModelledRunner, *rows: StepRow) -> int:
    return runner.execute(plan(*rows)).tokens[-1][0].token_id


def test_a_lost_or_wrong_block_of_any_layer_changes_the_token() -> None:
    runner, memory = attached()
    runner.execute(plan(row(PROMPT[:39], 0, params=None)))
    expected = token(runner, row(PROMPT[39:], 39))
    size = runner.info.layout.block_bytes
    for layer in range(2):
        for block in TABLE:
            place = slice(
                (layer * NUM_BLOCKS + block) * size, (layer * NUM_BLOCKS + block + 1) * size
            )
            kept = bytes(memory[place])
            memory[place] = bytes(size)  # as if it had never arrived
            assert token(runner, row(PROMPT[39:], 39)) != expected
            memory[place] = kept
    assert token(runner, row(PROMPT[39:], 39, (3, 0, 5))) != expected
    assert token(runner, row(PROMPT[39:], 39, (1, 3, 5))) != expected
    assert token(runner, row(PROMPT[39:], 39)) == expected


@pytest.mark.parametrize("place", [1, 15, 16, 31, 38, 39])
def test_every_token_and_its_place_count(place: int) -> None:
    runner, _ = attached()
    expected = token(runner, row(PROMPT, 0))
    changed = list(PROMPT)
    changed[place] += 1
    assert token(runner, row(changed, 0)) != expected
    swapped = list(PROMPT)
    swapped[place], swapped[place - 1] = swapped[place - 1], swapped[place]
    assert token(runner, row(swapped, 0)) != expected
    runner.execute(plan(row(PROMPT[:place], 0, (0, 2, 4), params=None)))
    assert token(runner, row(PROMPT[place:], place, (0, 2, 4))) == expected


def test_what_went_wrong_once_is_seen_in_every_later_token() -> None:
    """A wrong token in the middle of an answer, and then again the right ones."""
    runner, _ = attached()
    right, wrong = (token(runner, row(PROMPT[:30], 0, table)) for table in (TABLE, (0, 2, 4)))
    assert right == wrong
    token(runner, row([7], 30)), token(runner, row([8], 30, (0, 2, 4)))
    for position in range(31, 45):
        right, wrong = (token(runner, row([9], position, t)) for t in (TABLE, (0, 2, 4)))
        assert right != wrong


def test_a_step_takes_what_the_model_says_of_its_shape() -> None:
    times = parse_step_times("start=20ms,prompt=1ms,decode=30ms,sequence=5ms,transfer=1ms")
    runner, _ = attached(times)

    def took_s(*rows: StepRow) -> float:
        begun_s = time.monotonic()
        runner.execute(plan(*rows))
        return time.monotonic() - begun_s

    assert took_s(row(PROMPT, 0)) >= 0.060
    assert took_s(row([1], 40)) >= 0.035
    assert took_s(row([1], 40), row([1], 41)) >= 0.040
    begun_s = time.monotonic()
    runner.read_kv(0, [BlockId(1), BlockId(2)])  # two blocks of 16 tokens, one of two layers
    assert time.monotonic() - begun_s >= 0.016
    faster, _ = attached(times.at_speed(4.0))
    assert faster.info.layout.mismatch(runner.info.layout) is None
    assert times.at_speed(4.0).step_s(plan(row(PROMPT, 0)).shape) == pytest.approx(0.015)


class Clocked:
    """A layer sink that keeps when it heard of each layer."""

    def __init__(self) -> None:
        self.heard_s: list[float] = []

    def layer_done(self, step_id: StepId, layer: int) -> None:
        self.heard_s.append(time.monotonic())


def test_layers_are_spread_over_a_step_that_is_pushed() -> None:
    runner, _ = attached(parse_step_times("prompt=2ms"))
    sink = Clocked()
    begun_s = time.monotonic()
    runner.execute(plan(row(PROMPT, 0, pushes=True)), sink)
    first, second = (heard_s - begun_s for heard_s in sink.heard_s)
    assert first >= 0.040
    assert second >= 0.080


def test_keys_must_hold_a_hash() -> None:
    with pytest.raises(ConfigError, match="longer heads"):
        ModelledRunner(head_dim=2)
