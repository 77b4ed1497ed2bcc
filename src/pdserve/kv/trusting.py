"""A block pool for drivers that compute nothing, such as the simulator: it gives the same blocks in
the same order as a `BlockPool` without prefix cache, and trusts its callers.

It counts no references but those of blocks that have two holders, and notices no misuse: a call
takes the time of copying a list, and a pool that was never used takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pdserve.core.ids import BlockId
from pdserve.kv.pool import BlockPool, out_of_blocks


class TrustingPool(BlockPool):
    """Nothing is indexed. ``_freed`` is a stack; blocks from ``_untouched`` on were never given."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(0, block_size, prefix_cache=False)
        self.num_blocks = num_blocks
        self._freed: list[BlockId] = []
        self._untouched = 0
        self._others: dict[BlockId, int] = {}  # holders beside the first one

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._untouched + len(self._freed)

    def ref_count(self, block: BlockId) -> int:
        """Of a block that somebody holds."""
        return 1 + self._others.get(block, 0)

    def is_indexed(self, block: BlockId) -> bool:
        return False

    def num_shared(self, blocks: Sequence[BlockId]) -> int:
        return len(blocks)

    def num_sole(self, blocks: Sequence[BlockId]) -> int:
        others = self._others
        return len(blocks) - sum(block in others for block in blocks) if others else len(blocks)

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            self._others[block] = self._others.get(block, 0) + 1

    def allocate(self, num_blocks: int) -> list[BlockId]:
        freed = self._freed
        if num_blocks > self.num_free:
            raise out_of_blocks(num_blocks, self)
        first = max(0, len(freed) - num_blocks)
        taken = freed[first:]
        del freed[first:]
        taken.reverse()
        if len(taken) < num_blocks:
            start = self._untouched
            self._untouched += num_blocks - len(taken)
            taken += cast("list[BlockId]", range(start, self._untouched))
        return taken

    def release(self, blocks: Sequence[BlockId]) -> None:
        self.num_releases += 1
        if not self._others:
            self._freed.extend(blocks[::-1])
            return
        for block in reversed(blocks):
            left = self._others.pop(block, 0)
            if left > 1:
                self._others[block] = left - 1
            elif not left:
                self._freed.append(block)

    def publish_all(self, blocks: Sequence[BlockId], hashes: Sequence[bytes]) -> None:
        """Nothing is indexed."""

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        self._quarantined.update(dict.fromkeys(blocks))

    def release_quarantine(self, blocks: Sequence[BlockId]) -> None:
        self.num_releases += 1
        for block in blocks:
            del self._quarantined[block]
        self._freed.extend(blocks[::-1])

    def check(self) -> None:
        """Assert what can be known."""
        assert 0 <= self._untouched <= self.num_blocks
        assert len(set(self._freed)) == len(self._freed), "a block is twice in the free list"
        assert not set(self._freed) & set(self._quarantined), "a free block is in quarantine"
        assert not set(self._freed) & set(self._others), "a free block is held"
        assert all(0 <= block < self._untouched for block in self._freed)
