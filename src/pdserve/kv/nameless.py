"""A block pool for drivers that compute nothing, such as the simulator: it counts.

Where nothing is written, no block differs from another, so all of them have one name, and a table
of a thousand blocks is a thousand times the same number: made at once, and no memory is touched for
it. What can be had, and when, is as in a `BlockPool` without prefix cache. Nothing is shared: a
request has one choice. Misuse is not noticed, but where a count would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.ids import BlockId
from pdserve.kv.pool import BlockPool, out_of_blocks

NAMELESS = BlockId(0)


class NamelessPool(BlockPool):
    """Nothing is indexed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(0, block_size, prefix_cache=False)
        self.num_blocks = self.num_free = num_blocks

    def ref_count(self, block: BlockId) -> int:
        """Of a block that somebody holds."""
        return 1

    def is_indexed(self, block: BlockId) -> bool:
        return False

    def num_shared(self, blocks: Sequence[BlockId]) -> int:
        return len(blocks)

    def num_sole(self, blocks: Sequence[BlockId]) -> int:
        return len(blocks)

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        assert not blocks, "nothing is shared here"

    def allocate(self, num_blocks: int) -> list[BlockId]:
        if num_blocks > self.num_free:
            raise out_of_blocks(num_blocks, self)
        self.num_free -= num_blocks
        return [NAMELESS] * num_blocks

    def release(self, blocks: Sequence[BlockId]) -> None:
        self.num_releases += 1
        self.num_free += len(blocks)

    def publish_all(self, blocks: Sequence[BlockId], hashes: Sequence[bytes]) -> None:
        """Nothing is indexed."""

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        self.num_quarantined += len(blocks)

    def release_quarantine(self, blocks: Sequence[BlockId]) -> None:
        self.num_releases += 1
        self.num_quarantined -= len(blocks)
        self.num_free += len(blocks)

    def check(self) -> None:
        """Assert what can be known."""
        held = self.num_blocks - self.num_free
        assert 0 <= self.num_quarantined <= held <= self.num_blocks
