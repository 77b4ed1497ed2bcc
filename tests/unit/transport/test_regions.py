"""Copies of regions: compiled or by Python, told one by one or as a table, the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import TransferError
from pdserve.transport import native
from pdserve.transport.base import Region
from pdserve.transport.regions import FEW, Regions, checked_table, copy_regions

SIZE = 1 << 16
Tell = Callable[[list[Region]], Any]


def as_table(regions: list[Region]) -> Regions:
    rows = [(region.source, region.target, region.length) for region in regions]
    return Regions(np.array(rows, np.int64).reshape(-1, 3))


@pytest.fixture(params=["compiled", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        monkeypatch.setattr(native, "__path__", [])
    native.loops.cache_clear()
    assert (native.loops() is None) == (request.param == "python")
    yield request.param
    native.loops.cache_clear()


@pytest.fixture(params=[list, as_table])
def tell(request: pytest.FixtureRequest) -> Tell:
    found: Tell = request.param
    return found


def drawn_regions(chance: random.Random, count: int) -> list[Region]:
    """Of any length from nothing on; targets do not overlap, and some are neighbours."""
    places = chance.sample(range(256), count)
    found = []
    for place in places:
        length = chance.choice((0, 1, 63, 64, 200, 256))
        source = chance.randrange(SIZE - length + 1)
        found.append(Region(source, place * 256, length))
        if chance.random() < 0.3 and length < 256 and source + length < SIZE:
            found.append(Region(source + length, place * 256 + length, 1))
    return found


@pytest.mark.parametrize("count", [0, 1, FEW, FEW + 1, 256])
def test_every_way_copies_the_same_bytes(way: str, tell: Tell, count: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        source, target = bytearray(chance.randbytes(SIZE)), bytearray(SIZE)
        expected = bytearray(SIZE)
        regions = drawn_regions(chance, count)
        for region in regions:
            piece = source[region.source : region.source + region.length]
            expected[region.target : region.target + region.length] = piece
        copy_regions(memoryview(source), memoryview(target), tell(regions))
        assert target == expected


@pytest.mark.parametrize(
    "bad",
    [
        Region(SIZE - 1, 0, 2),
        Region(0, SIZE - 1, 2),
        Region(-1, 0, 1),
        Region(0, -1, 1),
        Region(0, 0, -1),
        Region(8, 8, -4),
        Region(0, 0, SIZE + 1),
        Region((1 << 63) - 1, 0, 1),
        Region(0, (1 << 63) - 1, 1),
        Region(0, 0, (1 << 63) - 1),
        Region((1 << 63) - 1, (1 << 63) - 1, (1 << 63) - 1),
        Region(-(1 << 63), 0, 1),
    ],
)
@pytest.mark.parametrize("others", [1, 100])
def test_one_that_lies_outside_is_named_and_nothing_is_copied(
    way: str, tell: Tell, bad: Region, others: int
) -> None:
    target = bytearray(SIZE)
    regions = [Region(0, 2 * place, 1) for place in range(others)]
    with pytest.raises(TransferError, match="outside") as caught:
        copy_regions(memoryview(bytearray(b"x" * SIZE)), memoryview(target), tell([*regions, bad]))
    assert str(bad) in str(caught.value)
    assert target == bytes(SIZE)


def test_a_number_that_no_table_holds_lies_outside(way: str) -> None:
    regions = [Region(0, 0, 1)] * 100 + [Region(1 << 70, 0, 1)]
    with pytest.raises(TransferError, match="outside"):
        copy_regions(memoryview(bytearray(8)), memoryview(bytearray(8)), regions)


@settings(derandomize=True, max_examples=200)
@given(lengths=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_neighbours_are_joined_and_no_byte_is_lost(lengths: list[tuple[int, bool]]) -> None:
    source, target, regions = 0, 0, []
    for length, gap in lengths:
        source += gap
        regions.append(Region(source, target, length))
        source, target = source + length, target + length
    table = checked_table(regions, 1000, 1000)
    told = [(r.source + i, r.target + i) for r in regions for i in range(r.length)]
    found = [(s + i, t + i) for s, t, length in table.tolist() for i in range(length)]
    assert found == told
    for one, next_one in zip(table.tolist(), table.tolist()[1:], strict=False):
        assert (one[0] + one[2], one[1] + one[2]) != tuple(next_one[:2]), "could be joined"
    assert table.flags.c_contiguous


def test_a_table_is_a_sequence_of_regions() -> None:
    regions = [Region(1, 2, 3), Region(4, 5, 6), Region(7, 8, 9)]
    table = as_table(regions)
    assert list(table) == regions
    assert (table[1], list(table[1:]), len(table)) == (regions[1], regions[1:], 3)
    assert isinstance(table[0].source, int)


def test_a_library_that_is_none_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_regions.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    native.loops.cache_clear()
    assert native.loops() is None
    native.loops.cache_clear()
