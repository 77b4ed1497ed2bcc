"""Block tables: which blocks of the pool each sequence holds, and why.

The regions of a sequence's table, from its front: blocks shared through the prefix index (held by
reference, never written), full blocks of its own (published, so that others can share them), and at
most one partly filled block, which is its own alone. A fork shares all full blocks and gets a copy
of the partial one; the source of a copy stays pinned until the step that makes it is done.
"""

from __future__ import annotations

from pdserve.core.errors import OutOfBlocksError
from pdserve.core.ids import BlockId
from pdserve.kv.nameless import NamelessPool
from pdserve.kv.pool import BlockPool
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings


class BlockTables:
    """All block accounting of a native worker's sequences."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.pool = _pool(settings)
        self.queries_tokens = 0
        self.hits_tokens = 0
        self._layout = settings.layout
        self.block_size = self._block_size = settings.layout.block_size
        self._copies: list[tuple[Sequence, BlockId, BlockId]] = []
        self._copying: list[tuple[Sequence, BlockId, BlockId]] = []

    def missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that admitting a waiting sequence would take from the free ones."""
        shared = self.pool.num_shared(self._cached_prefix(sequence))
        return self._num_blocks(sequence) - shared

    def cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that need not be computed, as things are now."""
        return len(self._cached_prefix(sequence)) * self._block_size

    def freed_by(self, sequence: Sequence) -> int:
        """Blocks that nobody would hold any more if the sequence let go of its own."""
        return self.pool.num_sole(sequence.block_ids)

    def admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all of its tokens, and for those that are reserved for
        it, cached ones first."""
        num_tokens = sequence.num_tokens
        cached = self._cached_prefix(sequence)
        self.pool.acquire(cached)
        try:
            fresh = self.pool.allocate(self._num_blocks(sequence) - len(cached))
        except OutOfBlocksError:
            self.pool.release(cached)
            return False
        sequence.block_ids = cached + fresh
        sequence.num_cached_blocks = sequence.num_published = len(cached)
        sequence.num_computed = len(cached) * self._block_size
        sequence.scores.clear()
        self.queries_tokens += num_tokens
        self.hits_tokens += sequence.num_computed
        return True

    def reserve_answer(self, sequence: Sequence) -> None:
        """Give a running sequence slots for its whole answer. Raises `OutOfBlocksError`."""
        num_tokens = sequence.num_prompt_tokens + sequence.answer_tokens
        sequence.reserved_tokens = num_tokens
        missing = self._layout.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if missing > 0:
            sequence.block_ids += self.pool.allocate(missing)

    def pin_cached(self, sequence: Sequence) -> bool:
        """Give a sequence that will not run what is cached of its full blocks; False if nothing
        is. Its tokens are cut down to those."""
        sequence.extend_hashes_to(sequence.num_tokens // self._block_size, self._block_size)
        sequence.block_ids = self.pool.match(sequence.hashes)
        self.pool.acquire(sequence.block_ids)
        num_blocks = len(sequence.block_ids)
        del sequence.hashes[num_blocks:]
        sequence.num_computed = num_blocks * self._block_size
        sequence.num_cached_blocks = sequence.num_published = num_blocks
        return num_blocks > 0

    def grow(self, sequence: Sequence) -> bool:
        """Have a slot for the sequence's last token; False if no block can be had."""
        if not self.lacks_slot(sequence):
            return True
        try:
            sequence.block_ids += self.pool.allocate(1)
        except OutOfBlocksError:
            return False
        return True

    def lacks_slot(self, sequence: Sequence) -> bool:
        """True if its last token has no slot yet."""
        return sequence.num_tokens > len(sequence.block_ids) * self._block_size

    def publish(self, sequence: Sequence, num_full: int | None = None) -> None:
        """Let others find the blocks that are full now, or the first ``num_full`` of these."""
        if num_full is None:
            num_full = sequence.num_computed // self._block_size
        first = sequence.num_published
        if num_full <= first:
            return
        if self.pool.prefix_cache:
            if sequence.extends_hashes:
                sequence.extend_hashes_to(num_full, self._block_size)
            num_full = min(num_full, len(sequence.hashes))
            blocks, hashes = sequence.block_ids[first:num_full], sequence.hashes[first:num_full]
            self.pool.publish_all(blocks, hashes)
        sequence.num_published = max(first, num_full)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Give ``child`` the KV of ``parent``; False, and nothing done, if no block can be had."""
        num_full = parent.num_computed // self._block_size
        head, tail = parent.block_ids[:num_full], parent.block_ids[num_full:]
        try:
            own_tail = self.pool.allocate(len(tail))
        except OutOfBlocksError:
            return False
        self.pool.acquire(head)
        self.pool.acquire(tail)
        self._copies += [(child, s, d) for s, d in zip(tail, own_tail, strict=True)]
        child.block_ids = head + own_tail
        child.num_computed = parent.num_computed
        child.num_published = min(parent.num_published, num_full)
        return True

    def release(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence that no step or transfer touches."""
        unused = [source for owner, source, _ in self._copies if owner is sequence]
        if unused:
            self._copies = [copy for copy in self._copies if copy[0] is not sequence]
            self.pool.release(unused)
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []

    def take_copies(self, riding: list[Sequence]) -> tuple[tuple[BlockId, BlockId], ...]:
        """Copies that the next step must make for its own rows: (source, target).

        Those of others wait: were such a sequence dropped in mid-step, its blocks would be free.
        """
        if not self._copies:
            return ()
        riders = {id(sequence) for sequence in riding}
        self._copying = [copy for copy in self._copies if id(copy[0]) in riders]
        self._copies = [copy for copy in self._copies if id(copy[0]) not in riders]
        return tuple((source, target) for _, source, target in self._copying)

    def copies_done(self) -> None:
        """The step is over: unpin the sources."""
        if self._copying:
            copying, self._copying = self._copying, []
            self.pool.release([source for _, source, _ in copying])

    def copies_failed(self) -> None:
        """The step broke: make the copies in the next one, for those that still live."""
        copying, self._copying = self._copying, []
        kept = [copy for copy in copying if not copy[0].doomed]
        self.pool.release([copy[1] for copy in copying if copy[0].doomed])
        self._copies = kept + self._copies

    def _num_blocks(self, sequence: Sequence) -> int:
        return self._layout.num_blocks_for(max(sequence.num_tokens, sequence.reserved_tokens))

    def _cached_prefix(self, sequence: Sequence) -> list[BlockId]:
        """Blocks that need not be computed again; the last token always is, for its logits, and
        so are all of a prompt whose log-probabilities are wanted."""
        if not self.pool.prefix_cache:
            return []
        num_tokens = sequence.num_tokens
        sequence.extend_hashes_to(num_tokens // self._block_size, self._block_size)
        if sequence.is_scored:
            return []
        return self.pool.match(sequence.hashes, (num_tokens - 1) // self._block_size)


def _pool(settings: WorkerSettings) -> BlockPool:
    """Where nothing is computed and nothing cached, blocks need no names."""
    num_blocks, block_size = settings.num_blocks, settings.layout.block_size
    if settings.bare_plans and not settings.prefix_cache:
        return NamelessPool(num_blocks, block_size)
    return BlockPool(num_blocks, block_size, prefix_cache=settings.prefix_cache)
