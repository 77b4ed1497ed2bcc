"""Who holds which block of one worker's KV pool, and which prefixes can be found in it.

The life of a block: it starts *free*. `BlockPool.allocate` makes it *referenced*, with one
reference, for the sequence that will fill it. Once it is full (and, if it came over a link, once it
is verified), `BlockPool.publish` enters it in the prefix index under its chained hash; from then on
`BlockPool.match` finds it and further sequences take references with `BlockPool.acquire`. When the
last reference goes, an indexed block becomes *cached*: it keeps its content until the space is
wanted, least recently used first; a block that is not indexed becomes free at once.

A block that was promised to a writer on another worker and is no longer wanted goes into
*quarantine* instead: the writer may still write into it, so nobody else may have it until the
writer has said that it will not (`BlockPool.release_quarantine`).

The router is to know which prefixes are here: `BlockPool.take_changes` says what has entered and
left the index since it was last asked.

Every block is in exactly one of these four states. The pool holds numbers only, never memory, and
its answers are a pure function of the calls made so far, so that a replay makes the same ones. All
operations take constant time per block. Misuse (double free, acquiring a free block) is a bug of
the caller and fails an assertion.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from pdserve.core.errors import OutOfBlocksError
from pdserve.core.ids import BlockHash, BlockId


def out_of_blocks(num_blocks: int, pool: BlockPool) -> OutOfBlocksError:
    """So many cannot be had."""
    return OutOfBlocksError(
        f"{num_blocks} KV blocks are needed and {pool.num_free} of {pool.num_blocks} can "
        "be had: wait for running requests, or give the worker a larger KV pool"
    )


class BlockPool:
    """Reference counts, prefix index, LRU and quarantine over ``num_blocks`` blocks.

    ``block_size`` is in tokens. Without ``prefix_cache`` nothing is indexed: `publish` does nothing
    and `match` finds nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks >= 0, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        # A stack whose top is the end: the lowest block comes first, and what was freed last is
        # used first, so memory that was never touched stays untouched as long as possible.
        self._free = [BlockId(block) for block in range(num_blocks - 1, -1, -1)]
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # oldest first
        self._quarantined: dict[BlockId, None] = {}
        self._changes: dict[BlockHash, bool] | None = None  # True: entered the index, False: left
        self.num_free = num_blocks
        """Blocks that `allocate` can give: free ones, and cached ones that it may evict."""
        self.num_quarantined = 0
        """Blocks out of circulation because a writer may still write into them."""
        self.num_releases = 0
        """How often blocks may have come free: as long as it is the same, none has."""

    @property
    def num_cached(self) -> int:
        """Blocks without a reference that the prefix index still knows: evictable."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free - self.num_quarantined

    def ref_count(self, block: BlockId) -> int:
        """References to the block; 0 if it is free, cached or in quarantine."""
        self._assert_in_pool(block)
        return self._references[block]

    def is_indexed(self, block: BlockId) -> bool:
        """True if `match` can find the block."""
        self._assert_in_pool(block)
        return self._hash_of[block] is not None

    def num_shared(self, blocks: Sequence[BlockId]) -> int:
        """How many of these blocks somebody holds."""
        references = self._references
        return sum([references[block] > 0 for block in blocks])

    def num_sole(self, blocks: Sequence[BlockId]) -> int:
        """How many of these blocks have one reference only."""
        references = self._references
        return sum([references[block] == 1 for block in blocks])

    def match(self, hashes: Sequence[BlockHash], most: int | None = None) -> list[BlockId]:
        """Blocks of the longest prefix of (the first ``most``) ``hashes`` that is indexed. Changes
        nothing.

        `acquire` them before the next `allocate`, which may otherwise evict them.
        """
        found: list[BlockId] = []
        find = self._block_of.get
        for block_hash in hashes if most is None else islice(hashes, most):
            block = find(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        """One more reference on each of these blocks, all of them referenced or cached."""
        self._assert_all_in_pool(blocks)
        references, cached = self._references, self._cached
        for block in blocks:
            if references[block] == 0:
                assert block in cached, f"acquired block {block}, which nobody holds"
                del cached[block]
                self.num_free -= 1
            references[block] += 1

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Blocks with one reference each: free ones first, then the least recently used cached.

        Raises `OutOfBlocksError`, and changes nothing, if fewer than ``num_blocks`` can be had.
        """
        assert num_blocks >= 0, num_blocks
        if num_blocks > self.num_free:
            raise out_of_blocks(num_blocks, self)
        free, references = self._free, self._references
        first = max(0, len(free) - num_blocks)
        taken = free[first:]
        del free[first:]
        taken.reverse()  # from the top of the stack
        if len(taken) < num_blocks:
            taken += self._evict(num_blocks - len(taken))
        for block in taken:
            references[block] = 1
        self.num_free -= num_blocks
        return taken

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One reference less on each block of a sequence's table, given from its first to its last.

        A block without references is cached if it is indexed, and free otherwise. The last block
        of the table is the first to be evicted: a prefix is of no use without its head.
        """
        self._assert_all_in_pool(blocks)
        self.num_releases += 1
        references, hash_of, cached = self._references, self._hash_of, self._cached
        num_kept = 0
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"released block {block}, which nobody holds"
            references[block] = left
            if left:
                num_kept += 1
            elif hash_of[block] is None:
                self._free.append(block)
            else:
                cached[block] = None
        self.num_free += len(blocks) - num_kept

    def publish(self, block: BlockId, block_hash: BlockHash) -> None:
        """Let `match` find this referenced block, which is full and will not be written again.

        If another block has the hash already, that one stays and this one remains unindexed: it
        goes to the free list when its last reference does. Publishing twice changes nothing.
        """
        self.publish_all((block,), (block_hash,))

    def publish_all(self, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]) -> None:
        """`publish` each block under the hash in its place."""
        self._assert_all_in_pool(blocks)
        references, hash_of, block_of = self._references, self._hash_of, self._block_of
        if not self.prefix_cache:
            return
        entered = []
        for block, block_hash in zip(blocks, hashes, strict=True):
            assert references[block] > 0, f"published block {block}, which nobody holds"
            known = hash_of[block]
            if known is not None:
                assert known == block_hash, f"published block {block} under a second hash"
            elif block_hash not in block_of:
                block_of[block_hash] = block
                hash_of[block] = block_hash
                entered.append(block_hash)
        changes = self._changes
        if changes is not None:
            for block_hash in entered:
                if not changes.setdefault(block_hash, True):
                    del changes[block_hash]  # it had left since the last call of `take_changes`

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        """Take blocks out of circulation because a writer may still write into them.

        Each has exactly one reference, which ends here, and is not indexed.
        """
        for block in blocks:
            self._assert_in_pool(block)
            references = self._references[block]
            assert references == 1, f"quarantined block {block} with {references} references"
            assert self._hash_of[block] is None, f"quarantined block {block}, which is indexed"
            self._references[block] = 0
            self._quarantined[block] = None
        self.num_quarantined += len(blocks)

    def release_quarantine(self, blocks: Sequence[BlockId]) -> None:
        """The writer of these blocks has promised to stop, or is dead: they are free again."""
        self.num_releases += 1
        for block in reversed(blocks):
            assert block in self._quarantined, f"block {block} is not in quarantine"
            del self._quarantined[block]
            self._free.append(block)
        self.num_quarantined -= len(blocks)
        self.num_free += len(blocks)

    def clear_cache(self) -> None:
        """Forget every prefix. Cached blocks become free; referenced ones stay, unindexed."""
        self.num_releases += 1
        self._free += self._evict(len(self._cached))
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._note_left(self._block_of)
        self._block_of.clear()

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes that have entered the prefix index since the last call, and those that have left.

        None is in both: what came and went in between is in neither. So there are never more than
        the index held then and holds now, and whoever adds the former to what the last call left
        and takes the latter away has the index. The first call returns all of it; before that
        nothing is remembered.
        """
        changes, self._changes = self._changes, {}
        if changes is None:
            return tuple(self._block_of), ()
        if not changes:
            return (), ()
        stored = tuple([block_hash for block_hash, entered in changes.items() if entered])
        if len(stored) == len(changes):
            return stored, ()
        return stored, tuple([block_hash for block_hash, entered in changes.items() if not entered])

    def check(self) -> None:
        """Assert every invariant. Time is linear in the pool: for tests and debugging."""
        free = set(self._free)
        cached = set(self._cached)
        quarantined = set(self._quarantined)
        referenced = {block for block, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert all(count >= 0 for count in self._references), "a negative reference count"
        states = (free, cached, quarantined, referenced)
        assert sum(len(state) for state in states) == self.num_blocks, (
            "a block is in no state or in two"
        )
        assert set().union(*states) == set(range(self.num_blocks)), "a block is in no state"
        indexed = {block for block, name in enumerate(self._hash_of) if name is not None}
        assert indexed == set(self._block_of.values()), "index and blocks disagree"
        assert len(indexed) == len(self._block_of), "a block is indexed twice"
        for name, block in self._block_of.items():
            assert self._hash_of[block] == name, f"block {block} is indexed under another hash"
        assert cached <= indexed, "a cached block cannot be found"
        assert indexed <= cached | referenced, "a free or quarantined block can be found"
        assert self.prefix_cache or not indexed, "an index without a prefix cache"
        assert self.num_free == len(free) + len(cached), "the number of free blocks is wrong"
        assert self.num_quarantined == len(quarantined), "so is that of those in quarantine"
        assert self.num_referenced == len(referenced), "the number of referenced blocks is wrong"

    def _evict(self, num_blocks: int) -> list[BlockId]:
        """Drop the least recently used cached blocks from cache and index."""
        cached, hash_of, block_of = self._cached, self._hash_of, self._block_of
        evicted, left = [], []
        for _ in range(num_blocks):
            block, _ = cached.popitem(last=False)
            block_hash = hash_of[block]
            assert block_hash is not None
            del block_of[block_hash]
            hash_of[block] = None
            left.append(block_hash)
            evicted.append(block)
        self._note_left(left)
        return evicted

    def _note_left(self, hashes: Iterable[BlockHash]) -> None:
        """The index has lost them; what had entered since the last call leaves nothing to tell."""
        changes = self._changes
        if changes is not None:
            for block_hash in hashes:
                if changes.setdefault(block_hash, False):
                    del changes[block_hash]

    def _assert_all_in_pool(self, blocks: Sequence[BlockId]) -> None:
        assert not blocks or (min(blocks) >= 0 and max(blocks) < self.num_blocks), (
            f"blocks {min(blocks)} to {max(blocks)} of a pool of {self.num_blocks}"
        )

    def _assert_in_pool(self, block: BlockId) -> None:
        assert 0 <= block < self.num_blocks, f"block {block} of a pool of {self.num_blocks}"
