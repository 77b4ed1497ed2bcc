"""Coalescing copies: the same copies in the same order, in as few runs as there can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.ids import BlockId
from pdserve.kv.runs import coalesce

# Pieces of consecutive blocks, so that runs of every length occur on either side.
pieces = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5)), max_size=8
).map(lambda runs: [(s + i, t + i) for s, t, count in runs for i in range(count)])
pairs = pieces | st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12)


@settings(derandomize=True)
@given(pairs)
def test_runs_copy_the_same_and_cannot_be_joined(copies: list[tuple[int, int]]) -> None:
    runs = coalesce([BlockId(s) for s, _ in copies], [BlockId(t) for _, t in copies])
    assert [(s + i, t + i) for s, t, count in runs for i in range(count)] == copies
    for (s, t, count), (next_s, next_t, _) in itertools.pairwise(runs):
        assert (s + count, t + count) != (next_s, next_t)


def test_a_gap_on_either_side_ends_a_run() -> None:
    source = [BlockId(block) for block in (4, 5, 6, 9, 10)]
    target = [BlockId(block) for block in (0, 1, 7, 8, 9)]
    assert coalesce(source, target) == [(4, 0, 2), (6, 7, 1), (9, 8, 2)]
    assert coalesce([], []) == []


def test_sides_of_different_length_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        coalesce([BlockId(1)], [])
