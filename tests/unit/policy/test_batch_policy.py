"""First come, first served: which prompts get how many tokens of the next step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import AttemptId, Epoch, RequestId
from pdserve.policy.batch import BatchView, FcfsBatching, PromptView, chunk_tokens

EMPTY = BatchView(
    num_decoding=0,
    prompts=(),
    num_admitted=0,
    free_blocks=1000,
    block_size=16,
    max_step_tokens=64,
    mixed_chunk_tokens=32,
    max_running=8,
)


def prompt(name: str, num_tokens: int, *, computed: int = 0, missing: int = 0) -> PromptView:
    return PromptView(
        key=(AttemptId(RequestId(name), Epoch(1)), 0),
        num_computed=computed,
        num_tokens=num_tokens,
        blocks_missing=missing,
    )


def grants(view: BatchView, *prompts: PromptView) -> list[tuple[str, int]]:
    plan = FcfsBatching().plan(replace(view, prompts=prompts))
    return [(grant.key[0].request_id, grant.num_tokens) for grant in plan.grants]


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    shared = grants(EMPTY, prompt("a", 20), prompt("b", 30), prompt("c", 50))
    assert shared == [("a", 20), ("b", 30)]


def test_a_prompt_that_does_not_fit_is_cut_at_a_block_border() -> None:
    assert grants(EMPTY, prompt("a", 20), prompt("b", 90)) == [("a", 20), ("b", 32)]


def test_a_chunk_goes_on_where_the_last_one_ended() -> None:
    assert grants(EMPTY, prompt("a", 100, computed=64)) == [("a", 36)]
    assert grants(EMPTY, prompt("a", 200, computed=10)) == [("a", 54)]


def test_beside_decodes_a_step_takes_only_a_short_chunk() -> None:
    assert grants(replace(EMPTY, num_decoding=3), prompt("a", 100)) == [("a", 32)]


def test_decodes_count_against_the_step() -> None:
    assert grants(replace(EMPTY, num_decoding=40, max_running=99), prompt("a", 100)) == [("a", 16)]


@pytest.mark.parametrize("num_decoding", [49, 64, 500])
def test_decodes_that_fill_the_step_leave_one_block_to_a_prompt(num_decoding: int) -> None:
    """Else a prompt on a worker whose decodes never stop would never be read."""
    view = replace(EMPTY, num_decoding=num_decoding, max_running=1000)
    assert grants(view, prompt("a", 100)) == [("a", 16)]
    assert grants(replace(view, mixed_chunk_tokens=4), prompt("a", 100)) == [("a", 16)]


def test_a_step_smaller_than_a_block_still_reads_one() -> None:
    assert grants(replace(EMPTY, max_step_tokens=8), prompt("a", 100)) == [("a", 16)]


def test_nobody_overtakes_a_prompt_that_waits_for_blocks() -> None:
    view = replace(EMPTY, free_blocks=3)
    assert grants(view, prompt("a", 10, missing=4), prompt("b", 10, missing=1)) == []


def test_blocks_are_given_once() -> None:
    view = replace(EMPTY, free_blocks=3)
    waiting = (prompt("a", 10, missing=2), prompt("b", 10, missing=2))
    assert grants(view, *waiting) == [("a", 10)]


def test_admitted_prompts_need_neither_blocks_nor_a_place() -> None:
    view = replace(EMPTY, free_blocks=0, num_admitted=8)
    assert grants(view, prompt("a", 10), prompt("b", 10, missing=1)) == [("a", 10)]


def test_no_more_sequences_run_than_may() -> None:
    view = replace(EMPTY, num_decoding=5, num_admitted=1)
    waiting = [prompt(name, 4, missing=1) for name in "abcd"]
    assert grants(view, *waiting) == [("a", 4), ("b", 4)]


def test_prompts_are_looked_at_only_as_far_as_the_step_goes() -> None:
    """The view makes them one by one: a long queue costs nothing."""
    looked_at = []

    def queue() -> object:
        for number in range(1000):
            looked_at.append(number)
            yield prompt(f"r{number}", 30)

    FcfsBatching().plan(replace(EMPTY, prompts=queue()))  # type: ignore[arg-type]
    assert len(looked_at) <= 4


@given(
    computed=st.integers(0, 200),
    remaining=st.integers(1, 200),
    budget=st.integers(0, 100),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_a_chunk_ends_with_the_prompt_or_on_a_border(
    computed: int, remaining: int, budget: int, block_size: int
) -> None:
    num_tokens = computed + remaining
    chunk = chunk_tokens(computed, num_tokens, budget, block_size)
    assert 0 <= chunk <= min(remaining, budget)
    end = computed + chunk
    assert chunk == 0 or end == num_tokens or end % block_size == 0
    if budget >= block_size:
        assert chunk > 0
