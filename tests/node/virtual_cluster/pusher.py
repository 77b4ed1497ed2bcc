"""The transfer thread of one worker process: writes one (layer, block) at a time.

Behaves as ``transport.push`` promises: calls of the node and engine threads queue up, writes happen
in between, and what it says of an attempt comes after the last write of that attempt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdserve.core.effects import (
    BindTransfer,
    Input,
    OpenTransfer,
    TransferFailed,
    TransferSent,
    TransferStopped,
    TransferVerified,
    VerifyTransfer,
)
from pdserve.core.ids import AttemptId, BlockId
from pdserve.core.messages import ChunkDigest
from pdserve.core.step import StepPlan, StepRow
from virtual_cluster.memory import GARBAGE, Memory

WriteBlock = Callable[[BindTransfer, int, BlockId, list[int]], None]
"""(bind, layer, block there, content): one one-sided write into the peer's memory."""


@dataclass(eq=False)
class Chunk:
    """Blocks that finish together; ``digests`` holds one per layer that is written."""

    first_block: int
    block_ids: tuple[BlockId, ...]
    finished: int
    digests: list[bytes] = field(default_factory=list)


@dataclass(eq=False)
class Transfer:
    """One attempt's push."""

    opened: OpenTransfer
    bound: BindTransfer | None = None
    chunks: list[Chunk] = field(default_factory=list)
    current: Chunk | None = None
    next_block: int = 0
    is_last: bool = False
    all_finished: bool = False


class Pusher:
    """`advance` does the next small thing, if there is any."""

    def __init__(
        self, memory: Memory, block_size: int, post: Callable[[Input], None], write: WriteBlock
    ) -> None:
        self.corrupt_next = False
        self.fail_next = False
        self._memory = memory
        self._block_size = block_size
        self._post = post
        self._write = write
        self._num_layers = len(memory.layers)
        self._queue: deque[Iterator[None]] = deque()
        self._stopping: set[AttemptId] = set()
        self._transfers: dict[AttemptId, Transfer] = {}
        self._step: list[Transfer] = []

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    @property
    def is_writing(self) -> bool:
        """True if a bound transfer may still write."""
        return any(transfer.bound for transfer in self._transfers.values())

    def advance(self) -> None:
        call = self._queue[0]
        if next(call, StopIteration) is StopIteration:
            self._queue.popleft()

    # --- the node thread ------------------------------------------------------------------------

    def open(self, effect: OpenTransfer) -> None:
        self._queue.append(self._open(effect))

    def bind(self, effect: BindTransfer) -> None:
        self._queue.append(self._bind(effect))

    def stop(self, attempt: AttemptId) -> None:
        self._stopping.add(attempt)
        self._queue.append(self._stop(attempt))

    def verify(self, effect: VerifyTransfer) -> None:
        self._queue.append(self._verify(effect))

    # --- the engine thread ----------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> None:
        self._queue.append(self._begin_step([row for row in plan.rows if row.pushes]))

    def layer_done(self, layer: int) -> None:
        self._queue.append(self._layer_done(layer))

    def end_step(self, ok: bool) -> None:
        self._queue.append(self._end_step(ok))

    # --- the transfer thread: every yield is a point where others may come in between -----------

    def _open(self, effect: OpenTransfer) -> Iterator[None]:
        transfer = self._transfers[effect.attempt] = Transfer(effect)
        self._add_chunk(transfer, effect.block_ids[: effect.cached_blocks], self._num_layers)
        transfer.all_finished = effect.is_finished
        return
        yield

    def _bind(self, effect: BindTransfer) -> Iterator[None]:
        transfer = self._transfers.get(effect.ticket.attempt)
        if transfer is not None and transfer.bound is None:
            transfer.bound = effect
            for chunk in transfer.chunks:
                self._skip(chunk, effect)
            yield from self._advance(transfer)

    def _stop(self, attempt: AttemptId) -> Iterator[None]:
        self._transfers.pop(attempt, None)
        self._stopping.discard(attempt)
        self._post(TransferStopped(attempt))
        return
        yield

    def _begin_step(self, rows: list[StepRow]) -> Iterator[None]:
        self._step = []
        for row in rows:
            transfer = self._transfers.get(row.attempt)
            if transfer is not None:
                self._begin_row(transfer, row)
                self._step.append(transfer)
        return
        yield

    def _begin_row(self, transfer: Transfer, row: StepRow) -> None:
        assert row.start // self._block_size * self._block_size == row.start, (
            "a pushed chunk starts within a block"
        )
        transfer.is_last = row.sample is not None
        end = row.end // self._block_size
        if transfer.is_last:
            end = -(-row.end // self._block_size)
        else:
            assert row.end % self._block_size == 0, "a pushed chunk ends within a block"
        transfer.current = self._add_chunk(transfer, row.block_ids[transfer.next_block : end], 0)

    def _layer_done(self, layer: int) -> Iterator[None]:
        for transfer in self._step:
            self._finish_layer(transfer, layer)
            yield from self._advance(transfer)

    def _finish_layer(self, transfer: Transfer, layer: int) -> None:
        if transfer.current is not None:
            transfer.current.finished = layer + 1
        if transfer.is_last and layer + 1 == self._num_layers:
            transfer.all_finished = True

    def _end_step(self, ok: bool) -> Iterator[None]:
        for transfer in self._step:
            if ok:
                self._finish_layer(transfer, self._num_layers - 1)
                transfer.current = None
                yield from self._advance(transfer)
            else:
                self._transfers.pop(transfer.opened.attempt, None)
        self._step = []

    def _advance(self, transfer: Transfer) -> Iterator[None]:
        attempt = transfer.opened.attempt
        bound = transfer.bound
        if bound is None or self._transfers.get(attempt) is not transfer:
            return
        while (chunk := self._next(transfer)) is not None:
            layer = len(chunk.digests)
            digest = self._memory.digest(layer, chunk.block_ids)
            first = chunk.first_block - bound.ticket.first_block
            targets = bound.ticket.block_ids[first : first + len(chunk.block_ids)]
            assert len(targets) == len(chunk.block_ids), "the ticket grants too few blocks"
            for here, there in zip(chunk.block_ids, targets, strict=True):
                yield
                if attempt in self._stopping:
                    return
                if self.fail_next:
                    self.fail_next = False
                    del self._transfers[attempt]
                    self._post(TransferFailed(attempt=attempt, detail="write failed"))
                    return
                content = list(self._memory.layers[layer][here])
                if self.corrupt_next:
                    self.corrupt_next = False
                    content[0] = GARBAGE if content[0] != GARBAGE else 1
                self._write(bound, layer, there, content)
            chunk.digests.append(digest)
        if transfer.all_finished and attempt not in self._stopping:
            del self._transfers[attempt]
            self._post(self._sent(transfer))

    def _next(self, transfer: Transfer) -> Chunk | None:
        if transfer.opened.attempt in self._stopping:
            return None
        if transfer.opened.one_shot and not transfer.all_finished:
            return None
        for chunk in transfer.chunks:
            if chunk.block_ids and len(chunk.digests) < chunk.finished:
                return chunk
        return None

    def _sent(self, transfer: Transfer) -> TransferSent:
        chunks = [chunk for chunk in transfer.chunks if chunk.block_ids]
        digests = tuple(
            ChunkDigest(
                first_block=chunk.first_block,
                num_blocks=len(chunk.block_ids),
                layers=tuple(chunk.digests),
            )
            for chunk in chunks
        )
        num_blocks = sum(len(chunk.block_ids) for chunk in chunks)
        attempt = transfer.opened.attempt
        return TransferSent(attempt=attempt, chunks=digests, num_bytes=num_blocks)

    def _add_chunk(
        self, transfer: Transfer, block_ids: tuple[BlockId, ...], finished: int
    ) -> Chunk | None:
        if not block_ids:
            return None
        chunk = Chunk(transfer.next_block, block_ids, finished)
        transfer.next_block += len(block_ids)
        if transfer.bound is not None:
            self._skip(chunk, transfer.bound)
        transfer.chunks.append(chunk)
        return chunk

    def _skip(self, chunk: Chunk, bound: BindTransfer) -> None:
        """The receiver has the blocks before its ticket's first one."""
        cut = max(0, bound.ticket.first_block - chunk.first_block)
        chunk.first_block += cut
        chunk.block_ids = chunk.block_ids[cut:]

    def _verify(self, effect: VerifyTransfer) -> Iterator[None]:
        yield
        covered, detail = 0, None
        for chunk in effect.chunks:
            blocks = effect.block_ids[covered : covered + chunk.num_blocks]
            assert chunk.first_block == effect.first_block + covered, "digests out of order"
            for layer, digest in enumerate(chunk.layers):
                if self._memory.digest(layer, blocks) != digest:
                    detail = "not what was sent"
            covered += chunk.num_blocks
        assert covered == len(effect.block_ids), "digests do not cover the blocks"
        self._post(TransferVerified(attempt=effect.attempt, detail=detail))
