"""What one transfer has to write, what of it is finished, and what is written.

A transfer is cut into chunks: the blocks that were finished before its first step (prefix hits),
then those that each step completes. Chunks end on block borders except at the prompt's end, so each
(layer, block) belongs to one chunk and is written once. Within a chunk the layers finish, and are
written, in ascending order.

Used by the thread of its peer's ``transport.lane`` only; nothing in here is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pdserve.core.effects import OpenTransfer
from pdserve.core.errors import TransferError
from pdserve.core.ids import BlockId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import ChunkDigest, Ticket
from pdserve.core.step import StepRow
from pdserve.kv.runs import coalesce
from pdserve.transport.base import Region, RemotePool
from pdserve.transport.digest import DIGEST_ALGORITHM, DIGESTS
from pdserve.transport.progress import LayersWritten
from pdserve.transport.regions import FEW, Regions, Table

ANNOUNCED_BYTES = 256 << 10
"""A chunk's layers are announced when so much is new, or none is left to write: a message costs
both node threads about as long as the receiver takes to hash this."""

ReadKv = Callable[[int, Sequence[BlockId]], None]
"""`ModelRunner.read_kv`: make blocks of a finished layer current in the pool memory."""

Runs = Sequence[tuple[BlockId, BlockId, int]]
"""As `coalesce` gives them: first source, first target, number of blocks."""


def regions_of(runs: Runs | Table, source: int, target: int, size: int) -> Sequence[Region]:
    """Where runs of blocks of ``size`` bytes lie in layers that begin at these offsets."""
    if isinstance(runs, np.ndarray):
        return Regions(runs * size + (source, target, 0))
    return [
        Region(source + here * size, target + there * size, count * size)
        for here, there, count in runs
    ]


@dataclass(frozen=True, slots=True)
class PoolView:
    """A worker's own pool memory, with its shape."""

    memory: memoryview
    layout: KvLayout
    num_blocks: int

    def offset(self, layer: int, block: int) -> int:
        """Where block ``block`` of ``layer`` starts, in bytes."""
        return (layer * self.num_blocks + block) * self.layout.block_bytes

    def digest(self, layer: int, runs: Runs) -> bytes:
        """Digest of the bytes of these runs' sources, in the order given."""
        digest = DIGESTS[DIGEST_ALGORITHM]()
        memory, size = self.memory, self.layout.block_bytes
        base = self.offset(layer, 0)
        for here, _, count in runs:
            start = base + here * size
            digest.update(memory[start : start + count * size])
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Destination:
    """The receiver's pool and the place that its ticket grants in it."""

    remote: RemotePool
    num_blocks: int
    ticket: Ticket

    def blocks(self, first_block: int, count: int) -> Sequence[BlockId]:
        """Blocks there for ``count`` blocks of the sequence. Raises `TransferError`."""
        start = first_block - self.ticket.first_block
        blocks = self.ticket.block_ids[start : start + count]
        if len(blocks) != count:
            raise TransferError(
                f"the ticket grants {len(self.ticket.block_ids)} blocks from block "
                f"{self.ticket.first_block} on, too few for block {first_block + count - 1}"
            )
        # A block number out of range would hit another layer of the peer's pool.
        if not all(0 <= block < self.num_blocks for block in blocks):
            raise TransferError(f"the ticket grants blocks outside a pool of {self.num_blocks}")
        return blocks


@dataclass(slots=True)
class Chunk:
    """Blocks of a sequence that finish together. ``finished`` and ``announced`` count layers from
    the first on."""

    first_block: int
    block_ids: tuple[BlockId, ...]
    finished: int
    announced: int = 0
    digests: list[bytes] = field(default_factory=list)
    runs: Runs | None = None
    table: Table | None = None

    def skip_to(self, first_block: int) -> None:
        """The receiver has all blocks before ``first_block``: leave them out."""
        cut = max(0, first_block - self.first_block)
        self.first_block += cut
        self.block_ids = self.block_ids[cut:]


class Transfer:
    """State of one attempt's push, from `OpenTransfer` until it is sent, failed or stopped."""

    def __init__(self, effect: OpenTransfer, pool: PoolView) -> None:
        self.attempt = effect.attempt
        self.peer = effect.peer
        self.num_bytes = 0
        self._pool = pool
        self._one_shot = effect.one_shot
        self._destination: Destination | None = None
        self._chunks: list[Chunk] = []
        self._current: Chunk | None = None
        self._next_block = 0
        self._is_last = False
        self._all_finished = effect.is_finished
        self._add_chunk(effect.block_ids[: effect.cached_blocks], pool.layout.num_layers)

    def bind(self, destination: Destination) -> None:
        self._destination = destination
        for chunk in self._chunks:
            chunk.skip_to(destination.ticket.first_block)

    def begin_row(self, row: StepRow) -> None:
        """A step begins that computes this row. Its blocks up to the last border form a chunk."""
        layout = self._pool.layout
        self._is_last = row.sample is not None
        end = layout.num_blocks_for(row.end) if self._is_last else row.end // layout.block_size
        self._current = self._add_chunk(row.block_ids[self._next_block : end], 0)

    def layer_done(self, layer: int) -> None:
        """The running step has finished ``layer`` of its row."""
        if self._current is not None:
            self._current.finished = layer + 1
        if self._is_last and layer + 1 == self._pool.layout.num_layers:
            self._all_finished = True

    def end_row(self) -> None:
        """The running step has ended well, so each of its layers is finished."""
        self.layer_done(self._pool.layout.num_layers - 1)
        self._current = None

    @property
    def remote(self) -> RemotePool | None:
        """Where it is written to, once that is known."""
        return None if self._destination is None else self._destination.remote

    @property
    def is_bound(self) -> bool:
        return self._destination is not None

    @property
    def is_written(self) -> bool:
        """Every layer of every row is finished and has been written: nothing more will come. The
        step of the last row may still be drawing its tokens."""
        return self.is_bound and self._all_finished and self._find_next() is None

    def write_next(self, read_kv: ReadKv) -> Chunk | None:
        """Write one layer of one chunk, the oldest that may go. None if there is none.

        Raises `TransferError`, or what ``read_kv`` raises.
        """
        destination = self._destination
        if destination is None or (self._one_shot and not self._all_finished):
            return None
        chunk = self._find_next()
        if chunk is not None:
            self._write(chunk, destination, read_kv)
        return chunk

    def news_of(self, chunk: Chunk) -> LayersWritten | None:
        """What to tell the receiver of a chunk that was just written on, if it is enough."""
        layout, written = self._pool.layout, len(chunk.digests)
        new_bytes = (written - chunk.announced) * len(chunk.block_ids) * layout.block_bytes
        if new_bytes < ANNOUNCED_BYTES and written < layout.num_layers:
            return None
        first_layer, chunk.announced = chunk.announced, written
        return LayersWritten(
            attempt=self.attempt,
            first_block=chunk.first_block,
            num_blocks=len(chunk.block_ids),
            first_layer=first_layer,
            num_layers=written - first_layer,
        )

    def digests(self) -> tuple[ChunkDigest, ...]:
        """Of everything that was sent, in block order."""
        return tuple(
            ChunkDigest(
                first_block=chunk.first_block,
                num_blocks=len(chunk.block_ids),
                layers=tuple(chunk.digests),
            )
            for chunk in self._chunks
            if chunk.block_ids
        )

    def _find_next(self) -> Chunk | None:
        """The first chunk of which a finished layer is not written."""
        for chunk in self._chunks:
            if chunk.block_ids and len(chunk.digests) < chunk.finished:
                return chunk
        return None

    def _add_chunk(self, block_ids: tuple[BlockId, ...], finished: int) -> Chunk | None:
        if not block_ids:
            return None
        chunk = Chunk(self._next_block, block_ids, finished)
        self._next_block += len(block_ids)
        if self._destination is not None:
            chunk.skip_to(self._destination.ticket.first_block)
        self._chunks.append(chunk)
        return chunk

    def _write(self, chunk: Chunk, destination: Destination, read_kv: ReadKv) -> None:
        if chunk.runs is None:
            target = destination.blocks(chunk.first_block, len(chunk.block_ids))
            chunk.runs = coalesce(chunk.block_ids, target)
            if len(chunk.runs) > FEW:
                chunk.table = np.array(chunk.runs, np.int64)
        layer = len(chunk.digests)
        size = self._pool.layout.block_bytes
        regions = regions_of(
            chunk.runs if chunk.table is None else chunk.table,
            self._pool.offset(layer, 0),
            layer * destination.num_blocks * size,
            size,
        )
        read_kv(layer, chunk.block_ids)
        # The digest first: if the bytes change under the copy, the receiver finds out.
        digest = self._pool.digest(layer, chunk.runs)
        destination.remote.write(self._pool.memory, regions)
        chunk.digests.append(digest)
        self.num_bytes += len(chunk.block_ids) * size
