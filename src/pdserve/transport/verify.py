"""The receiver's side of a transfer: do the bytes that lie here match the writer's digests?

The life of a check: a ticket is granted, and its transfer *expected*; the writer announces what it
has *written*, and this is hashed at once, while the prompt's next layers are computed; the trailer
has the transfer *verified*: its digests are compared with those that were made here, and what was
not announced is hashed now.

Hashing early is safe because the blocks of a ticket are written once, by one writer, and by nobody
after it has announced them. Anything that still touches them would be a lost fence, which a check
after the trailer would miss just as well if it came a moment later. If an early digest does not
match, the bytes are hashed again, and the later digest decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.core.effects import VerifyTransfer
from pdserve.core.ids import AttemptId
from pdserve.core.messages import Ticket
from pdserve.kv.runs import coalesce
from pdserve.transport.progress import LayersWritten
from pdserve.transport.transfer import PoolView

MAX_EXPECTED = 1024
"""Transfers whose early digests are kept; of those that never come to their end, too."""

EarlyDigests = Mapping[tuple[int, int, int], bytes]
"""By (first block, number of blocks, layer), blocks counted in the sequence."""


@dataclass(slots=True)
class _Expected:
    ticket: Ticket
    digests: dict[tuple[int, int, int], bytes] = field(default_factory=dict)


class Arrivals:
    """What has arrived of transfers that are under way. For the arrivals thread of one worker."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool
        self._expected: OrderedDict[AttemptId, _Expected] = OrderedDict()

    def expect(self, ticket: Ticket) -> None:
        """Blocks are granted. What was known of an earlier attempt of that name is forgotten."""
        self._expected.pop(ticket.attempt, None)
        self._expected[ticket.attempt] = _Expected(ticket)
        if len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def written(self, news: LayersWritten) -> None:
        """Hash what has arrived. What the ticket does not grant, or was hashed before, is ignored:
        news come from a peer and are not trusted."""
        expected = self._expected.get(news.attempt)
        if expected is None:
            return
        start = news.first_block - expected.ticket.first_block
        end = start + news.num_blocks
        end_layer = news.first_layer + news.num_layers
        if not 0 <= start < end <= len(expected.ticket.block_ids):
            return
        if not 0 <= news.first_layer < end_layer <= self._pool.layout.num_layers:
            return
        blocks = expected.ticket.block_ids[start:end]
        runs = coalesce(blocks, blocks)
        for layer in range(news.first_layer, end_layer):
            key = (news.first_block, news.num_blocks, layer)
            if key not in expected.digests:
                expected.digests[key] = self._pool.digest(layer, runs)

    def verify(self, effect: VerifyTransfer) -> str | None:
        """As `verify`, with what was hashed early. The transfer is expected no more."""
        expected = self._expected.pop(effect.attempt, None)
        what = (effect.first_block, effect.block_ids)
        if expected is None or (expected.ticket.first_block, expected.ticket.block_ids) != what:
            return verify(self._pool, effect)
        return verify(self._pool, effect, expected.digests)


def verify(pool: PoolView, effect: VerifyTransfer, early: EarlyDigests | None = None) -> str | None:
    """None if every received block is covered by a digest that matches, else what is wrong.

    The chunks come from a peer and are not trusted: they must lie one behind the other, cover
    ``effect.block_ids`` from the first to the last, and have a digest for each layer. ``early``:
    digests of these very blocks, made here since they were granted.
    """
    num_layers = pool.layout.num_layers
    known = early or {}
    covered = 0
    for chunk in effect.chunks:
        end = covered + chunk.num_blocks
        where = f"blocks {chunk.first_block} to {chunk.first_block + chunk.num_blocks - 1}"
        if chunk.first_block != effect.first_block + covered or chunk.num_blocks <= 0:
            return f"digests of {where} where block {effect.first_block + covered} is next"
        if end > len(effect.block_ids):
            return f"digests of {where}, of which only {len(effect.block_ids)} were granted"
        if len(chunk.layers) != num_layers:
            return f"{len(chunk.layers)} digests of {where} for {num_layers} layers"
        blocks = effect.block_ids[covered:end]
        runs = coalesce(blocks, blocks)
        for layer, digest in enumerate(chunk.layers):
            if known.get((chunk.first_block, chunk.num_blocks, layer)) == digest:
                continue
            if pool.digest(layer, runs) != digest:
                return f"layer {layer} of {where} is not what was sent"
        covered = end
    if covered != len(effect.block_ids):
        return f"digests of {covered} blocks, of {len(effect.block_ids)} that were to come"
    return None
