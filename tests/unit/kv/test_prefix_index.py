"""The index of all workers' prefixes against one that does the same by comparing lists."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.core.ids import BlockHash, WorkerId
from pdserve.kv.prefix_index import PrefixIndex

HASHES = [BlockHash(bytes([number]) * 16) for number in range(12)]
WORKERS = [WorkerId(f"w{number}") for number in range(5)]

hashes = st.lists(st.sampled_from(HASHES), max_size=12, unique=True)
workers = st.sampled_from(WORKERS)


class Model(RuleBasedStateMachine):
    """What every worker has, in plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[WorkerId, set[BlockHash]] = {worker: set() for worker in WORKERS}

    @rule(worker=workers, hashes=hashes)
    def store(self, worker: WorkerId, hashes: list[BlockHash]) -> None:
        self.index.store(worker, hashes)
        self.held[worker] |= set(hashes)

    @rule(worker=workers, hashes=hashes)
    def evict(self, worker: WorkerId, hashes: list[BlockHash]) -> None:
        self.index.evict(worker, hashes)
        self.held[worker] -= set(hashes)

    @rule(worker=workers)
    def forget(self, worker: WorkerId) -> None:
        self.index.forget(worker)
        self.held[worker] = set()

    @rule(chain=hashes)
    def match(self, chain: list[BlockHash]) -> None:
        expected = {}
        for worker, held in self.held.items():
            num_held = next((i for i, each in enumerate(chain) if each not in held), len(chain))
            assert self.index.num_held(worker, chain) == num_held
            if num_held:
                expected[worker] = num_held
        found = self.index.matches(chain)
        assert found == expected
        assert list(found.values()) == sorted(found.values())

    @invariant()
    def counts(self) -> None:
        assert len(self.index) == len(set().union(*self.held.values()))
        for worker, held in self.held.items():
            assert (worker in self.index) == bool(held)
            assert self.index.num_blocks(worker) == len(held)


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestPrefixIndex = Model.TestCase


@given(st.integers(1, 300))
def test_hundreds_of_workers_are_told_apart(count: int) -> None:
    """Worker i has the first i + 1 blocks."""
    index = PrefixIndex()
    chain = [BlockHash(number.to_bytes(16)) for number in range(count)]
    names = [WorkerId(f"w{number:03}") for number in range(count)]
    for number, worker in enumerate(names):
        index.store(worker, chain[: number + 1])
    assert index.matches(chain) == {worker: number + 1 for number, worker in enumerate(names)}
    assert index.matches(chain[:1]) == dict.fromkeys(names, 1)


def test_the_order_of_matches_follows_from_the_calls() -> None:
    """Equal matches come in the order in which workers first had something, and who is new takes
    the place of one that is gone."""
    index = PrefixIndex()
    for worker in ("c", "a", "b"):
        index.store(WorkerId(worker), HASHES[:2])
    index.evict(WorkerId("a"), HASHES[1:2])
    assert list(index.matches(HASHES[:2]).items()) == [("a", 1), ("c", 2), ("b", 2)]
    index.forget(WorkerId("c"))
    index.store(WorkerId("d"), HASHES[:2])
    assert list(index.matches(HASHES[:2]).items()) == [("a", 1), ("d", 2), ("b", 2)]


def test_nobody_matches_nothing() -> None:
    index = PrefixIndex()
    assert index.matches(HASHES) == {}
    index.store(WorkerId("a"), HASHES[1:])
    assert index.matches(HASHES) == {}
    assert index.matches([]) == {}
