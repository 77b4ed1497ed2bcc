"""The block pool: against a naive model in random order, and the promises worth naming."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.core.errors import OutOfBlocksError
from pdserve.core.ids import BlockHash, BlockId
from pdserve.kv.pool import BlockPool

NUM_BLOCKS = 7


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def blocks(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: a list of free blocks, a list of cached ones (oldest first), a dict of counts."""

    @initialize(prefix_cache=st.booleans())
    def start(self, prefix_cache: bool) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 16, prefix_cache=prefix_cache)
        self.free = set(range(NUM_BLOCKS))
        self.lru: list[BlockId] = []
        self.counts: dict[BlockId, int] = {}
        self.hashes: dict[BlockId, BlockHash] = {}
        self.parked: list[BlockId] = []
        self.tables: list[list[BlockId]] = []
        self.told: set[BlockHash] = set()

    def lookup(self, wanted: BlockHash) -> BlockId | None:
        return next((block for block, held in self.hashes.items() if held == wanted), None)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        if count > len(self.free) + len(self.lru):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return
        evicted = self.lru[: max(0, count - len(self.free))]
        table = self.pool.allocate(count)
        assert len(set(table)) == count
        if evicted:
            assert set(table) == self.free | set(evicted)
            assert table[-len(evicted) :] == evicted
        else:
            assert set(table) <= self.free
        for block in table:
            self.free.discard(block)
            self.counts[block] = 1
        for block in evicted:
            self.lru.remove(block)
            del self.hashes[block]
        self.tables.append(table)

    @rule(numbers=st.lists(st.integers(0, 9), max_size=4))
    def match_and_acquire(self, numbers: list[int]) -> None:
        expected: list[BlockId] = []
        for number in numbers:
            block = self.lookup(name(number))
            if block is None:
                break
            expected.append(block)
        found = self.pool.match([name(number) for number in numbers])
        assert found == expected
        self.pool.acquire(found)
        for block in found:
            if block in self.lru:
                self.lru.remove(block)
            self.counts[block] = self.counts.get(block, 0) + 1
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.acquire(table)
        for block in table:
            self.counts[block] += 1
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in table[::-1]:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                del self.counts[block]
                if block in self.hashes:
                    self.lru.append(block)
                else:
                    self.free.add(block)

    @precondition(lambda self: self.counts)
    @rule(data=st.data(), number=st.integers(0, 9))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.counts)))
        block_hash = self.hashes.get(block, name(number))
        self.pool.publish(block, block_hash)
        if self.pool.prefix_cache and self.lookup(block_hash) is None:
            self.hashes[block] = block_hash

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables[index]
        if any(self.counts[block] > 1 or block in self.hashes for block in table):
            return
        del self.tables[index]
        self.pool.quarantine(table)
        for block in table:
            del self.counts[block]
        self.parked += table

    @rule(data=st.data())
    def release_quarantine(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.parked), unique=True)) if self.parked else []
        self.pool.release_quarantine(some)
        for block in some:
            self.parked.remove(block)
            self.free.add(block)

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.free |= set(self.lru)
        self.lru.clear()
        self.hashes.clear()

    @rule()
    def take_changes(self) -> None:
        """What is told is what is new, and no more."""
        stored, evicted = self.pool.take_changes()
        now = set(self.hashes.values())
        assert len(stored) + len(evicted) == len({*stored, *evicted})
        assert set(stored) == now - self.told
        assert set(evicted) == self.told - now
        self.told = now

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.num_free == len(self.free) + len(self.lru)
        assert self.pool.num_cached == len(self.lru)
        assert self.pool.num_quarantined == len(self.parked)
        assert self.pool.num_referenced == len(self.counts)
        for block in map(BlockId, range(NUM_BLOCKS)):
            assert self.pool.ref_count(block) == self.counts.get(block, 0)
            assert self.pool.is_indexed(block) == (block in self.hashes)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=120, stateful_step_count=40, derandomize=True)


def cached_pool(num_blocks: int, num_cached: int) -> BlockPool:
    """A pool whose blocks 0, 1, ... hold the hashes 0, 1, ... of one released sequence."""
    pool = BlockPool(num_blocks, 16)
    table = pool.allocate(num_cached)
    for number, block in enumerate(table):
        pool.publish(block, name(number))
    pool.release(table)
    return pool


def test_first_blocks_are_consecutive() -> None:
    assert BlockPool(8, 16).allocate(5) == blocks(0, 1, 2, 3, 4)


def test_a_freed_table_is_given_out_in_its_order() -> None:
    pool = BlockPool(8, 16)
    pool.release(pool.allocate(3))
    assert pool.allocate(4) == blocks(0, 1, 2, 3)


def test_the_tail_of_a_table_is_evicted_before_its_head() -> None:
    pool = cached_pool(4, 4)
    assert pool.allocate(2) == blocks(3, 2)
    assert pool.match([name(0), name(1), name(2)]) == blocks(0, 1)
    pool.check()


def test_use_makes_a_prefix_recent() -> None:
    pool = BlockPool(2, 16)
    old, new = pool.allocate(2)
    pool.publish(old, name(0))
    pool.publish(new, name(1))
    pool.release([old])
    pool.release([new])
    pool.acquire(pool.match([name(0)]))
    pool.release([old])
    assert pool.allocate(1) == [new]
    assert pool.match([name(0)]) == [old]


def test_a_refused_allocation_changes_nothing() -> None:
    pool = cached_pool(4, 3)
    with pytest.raises(OutOfBlocksError, match="5 KV blocks are needed and 4 of 4"):
        pool.allocate(5)
    assert (pool.num_free, pool.num_cached) == (4, 3)
    assert pool.match([name(0), name(1), name(2)]) == blocks(0, 1, 2)
    pool.check()


def test_match_stops_at_the_first_gap() -> None:
    pool = cached_pool(4, 3)
    assert pool.match([name(0), name(9), name(2)]) == blocks(0)
    assert pool.match([name(9)]) == []
    assert pool.num_cached == 3


def test_a_block_published_second_keeps_the_first_and_is_freed_at_once() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    assert (pool.is_indexed(first), pool.is_indexed(second)) == (True, False)
    pool.release([first, second])
    assert (pool.num_cached, pool.num_free) == (1, 4)
    assert pool.match([name(1)]) == [first]


def test_quarantined_blocks_are_not_given_out() -> None:
    pool = BlockPool(3, 16)
    held = pool.allocate(2)
    pool.quarantine(held)
    assert pool.allocate(1) == blocks(2)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    pool.release_quarantine(held)
    assert pool.allocate(2) == held


def test_clear_cache_forgets_blocks_in_use_too() -> None:
    pool = BlockPool(4, 16)
    used, idle = pool.allocate(2)
    pool.publish(used, name(0))
    pool.publish(idle, name(1))
    pool.release([idle])
    pool.clear_cache()
    assert pool.match([name(0)]) == pool.match([name(1)]) == []
    assert (pool.ref_count(used), pool.num_cached, pool.num_free) == (1, 0, 3)
    pool.publish(used, name(2))
    assert pool.match([name(2)]) == [used]
    pool.check()


def test_what_came_and_went_is_not_told() -> None:
    pool = BlockPool(1, 16)
    (block,) = pool.allocate(1)
    pool.publish(block, name(0))
    assert pool.take_changes() == ((name(0),), ())
    pool.release([block])
    for number in (1, 2, 0):
        pool.publish(pool.allocate(1)[0], name(number))
        pool.release([block])
    assert pool.take_changes() == ((), ())


def test_nothing_is_remembered_before_anybody_asks() -> None:
    pool = cached_pool(4, 3)
    pool.clear_cache()
    assert pool.take_changes() == ((), ())


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = BlockPool(2, 16, prefix_cache=False)
    table = pool.allocate(2)
    pool.publish(table[0], name(0))
    assert pool.match([name(0)]) == []
    pool.release(table)
    assert (pool.num_cached, pool.num_free) == (0, 2)


def test_misuse_is_an_assertion() -> None:
    pool = cached_pool(6, 1)
    taken, shared, named = pool.allocate(3)
    pool.acquire([shared])
    pool.publish(named, name(7))
    free = BlockId(5)
    for misuse in (
        lambda: pool.release([free]),
        lambda: pool.release(blocks(0)),  # cached, so its one reference is gone already
        lambda: pool.acquire([free]),
        lambda: pool.publish(free, name(8)),
        lambda: pool.publish(named, name(8)),
        lambda: pool.quarantine([free]),
        lambda: pool.quarantine([shared]),
        lambda: pool.quarantine([named]),
        lambda: pool.release_quarantine([taken]),
        lambda: pool.acquire([BlockId(-1)]),
        lambda: pool.release([BlockId(6)]),
    ):
        with pytest.raises(AssertionError):
            misuse()
        pool.check()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(BlockId(0)),
        lambda pool: pool._free.pop(),
        lambda pool: pool._references.__setitem__(0, 1),
        lambda pool: pool._references.__setitem__(0, -1),
        lambda pool: pool._hash_of.__setitem__(0, None),
        lambda pool: pool._block_of.clear(),
        lambda pool: pool._block_of.__setitem__(name(0), BlockId(1)),
        lambda pool: pool._quarantined.__setitem__(BlockId(0), None),
    ],
)
def test_check_sees_damage(damage) -> None:
    pool = cached_pool(4, 2)
    pool.check()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check()
