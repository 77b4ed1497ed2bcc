"""Prompts at once: whole beside decodes, and at the cost of the youngest of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import AttemptId, Epoch, RequestId
from pdserve.policy.batch import BatchView, DecodeView, PromptView
from pdserve.policy.splitwise_batching import SplitwiseBatching

VIEW = BatchView(
    num_decoding=4,
    prompts=(),
    num_admitted=0,
    free_blocks=1000,
    block_size=16,
    max_step_tokens=128,
    mixed_chunk_tokens=16,
    max_running=8,
)


def key(name: str) -> tuple[AttemptId, int]:
    return (AttemptId(RequestId(name), Epoch(1)), 0)


def prompt(name: str, num_tokens: int, *, missing: int = 0, is_new: bool = True) -> PromptView:
    return PromptView(
        key=key(name), num_computed=0, num_tokens=num_tokens, blocks_missing=missing, is_new=is_new
    )


def decodes(*freed: int) -> tuple[DecodeView, ...]:
    """``d0``, the youngest, frees the first number of blocks, and so on."""
    return tuple(DecodeView(key=key(f"d{n}"), blocks_freed=f) for n, f in enumerate(freed))


def planned(view: BatchView, *prompts: PromptView) -> tuple[list[tuple[str, int]], list[str]]:
    plan = SplitwiseBatching().plan(replace(view, prompts=prompts))
    grants = [(grant.key[0].request_id, grant.num_tokens) for grant in plan.grants]
    return grants, [name.request_id for name, _ in plan.preempts]


def test_a_prompt_runs_whole_beside_decodes() -> None:
    assert planned(VIEW, prompt("a", 124)) == ([("a", 124)], [])


def test_decodes_count_against_the_step() -> None:
    assert planned(VIEW, prompt("a", 125)) == ([("a", 112)], [])
    assert planned(replace(VIEW, num_decoding=500), prompt("a", 125)) == ([("a", 16)], [])


def test_prompts_share_the_step_in_turn() -> None:
    shared = planned(VIEW, prompt("a", 60), prompt("b", 50), prompt("c", 50))
    assert shared == ([("a", 60), ("b", 50)], [])


def test_a_new_prompt_without_room_preempts_the_youngest() -> None:
    """Each gives its own blocks, and the one that it would have grown into."""
    view = replace(VIEW, free_blocks=1, preemptible=decodes(2, 2, 2))
    assert planned(view, prompt("a", 50, missing=4)) == ([("a", 50)], ["d0"])
    assert planned(view, prompt("a", 50, missing=5)) == ([("a", 50)], ["d0", "d1"])


def test_nobody_is_preempted_in_vain() -> None:
    view = replace(VIEW, free_blocks=1, preemptible=decodes(2, 2))
    assert planned(view, prompt("a", 50, missing=8)) == ([], [])


def test_nobody_is_preempted_for_a_prompt_that_the_step_has_no_tokens_for() -> None:
    view = replace(VIEW, free_blocks=0, preemptible=decodes(9))
    assert planned(view, prompt("a", 124), prompt("b", 20, missing=2)) == ([("a", 124)], [])


def test_what_is_left_of_a_preemption_goes_to_the_next_prompt() -> None:
    view = replace(VIEW, free_blocks=0, preemptible=decodes(9, 9))
    both = (prompt("a", 20, missing=2), prompt("b", 20, missing=8))
    assert planned(view, *both) == ([("a", 20), ("b", 20)], ["d0"])


def test_a_place_is_preempted_too() -> None:
    view = replace(VIEW, num_decoding=8, preemptible=decodes(0, 0))
    assert planned(view, prompt("a", 20, missing=2)) == ([("a", 20)], ["d0"])


def test_a_preempted_sequence_preempts_nobody() -> None:
    view = replace(VIEW, free_blocks=1, preemptible=decodes(9))
    assert planned(view, prompt("a", 50, missing=4, is_new=False)) == ([], [])


def test_nobody_passes_a_sequence_whose_turn_it_is() -> None:
    view = replace(VIEW, free_blocks=1, preemptible=decodes(9))
    old = prompt("old", 50, missing=4, is_new=False)
    assert planned(view, old, prompt("a", 10, missing=1)) == ([], [])


@given(
    view=st.builds(
        replace,
        st.just(VIEW),
        num_decoding=st.integers(0, 8),
        free_blocks=st.integers(0, 10),
        preemptible=st.lists(st.integers(0, 4), max_size=8).map(lambda freed: decodes(*freed)),
    ),
    missing=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6),
)
def test_blocks_and_places_are_given_once(view: BatchView, missing: list[tuple[int, bool]]) -> None:
    prompts = [
        prompt(f"p{n}", 20, missing=blocks, is_new=is_new)
        for n, (blocks, is_new) in enumerate(missing)
    ]
    plan = SplitwiseBatching().plan(replace(view, prompts=prompts))
    freed = {decode.key: decode.blocks_freed + 1 for decode in view.preemptible}
    assert len(set(plan.preempts)) == len(plan.preempts)
    granted = {grant.key for grant in plan.grants}
    taken = [p for p in prompts if p.key in granted and p.blocks_missing]
    free_blocks = view.free_blocks + sum(freed[name] for name in plan.preempts)
    assert sum(p.blocks_missing for p in taken) <= free_blocks
    running = view.num_decoding - len(plan.preempts) + len(taken)
    assert running <= max(view.max_running, view.num_decoding)
    assert not plan.preempts or any(p.is_new for p in taken), "a preemption in vain"
