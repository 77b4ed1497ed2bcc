"""What the router knows of its workers' prefix caches.

Workers say in their reports which blocks entered and left their prefix index; the router keeps that
in a `PrefixIndex` and tells policies how much of a prompt each worker has. The block hashes of a
request are made once, when it is first to be routed, and kept on its `Life`; a resume appends those
of its answer. Workers of different kinds (numerics class, block size) hash differently: there is a
chain for each kind, usually one. As long as no worker has anything, nothing is hashed.

A prompt that has just been routed counts as cached where it went, although nothing is computed yet:
whatever comes with the same prefix meanwhile would wait behind it there and find it. That ends when
the worker says that it has its last block, or after `COMING_S`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.ids import BlockHash, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.token_ids import NamedTokens, TokenIds
from pdserve.kv.hashing import block_hashes, extend_hash, root_hash
from pdserve.kv.prefix_index import PrefixIndex
from pdserve.node.books import ClusterBooks
from pdserve.node.lives import Life

COMING_S = 2.0
"""How long a prompt under way counts as cached: a queue that is longer is better not joined."""
MAX_COMING = 128
"""Prompts that do at a time; of more the latest count. Each is compared in under a microsecond."""


@dataclass(slots=True)
class _Kind:
    """Workers whose blocks have the same hashes, and that have said what they have."""

    layout: KvLayout
    workers: set[WorkerId] = field(default_factory=set)


@dataclass(slots=True)
class _Coming:
    """A prompt on its way into a cache."""

    worker: WorkerId
    hashes: Sequence[BlockHash]
    num_blocks: int
    until_s: float


class Prefixes:
    """Owned by the router's dispatch."""

    def __init__(self, books: ClusterBooks) -> None:
        self._books = books
        self._index = PrefixIndex()
        self._kinds: dict[BlockHash, _Kind] = {}
        self._kind_of: dict[WorkerId, BlockHash] = {}
        self._coming: OrderedDict[tuple[WorkerId, BlockHash], _Coming] = OrderedDict()

    def changed(
        self, worker: WorkerId, stored: tuple[BlockHash, ...], evicted: tuple[BlockHash, ...]
    ) -> None:
        """A worker says what it has and what it has no more."""
        if not stored and not evicted:
            return
        self._index.store(worker, stored)
        self._index.evict(worker, evicted)
        kind = self._kind(worker)
        if kind is None:
            return
        if kind not in self._kinds:
            layout = self._books.workers[worker].up.layout
            assert layout is not None
            self._kinds[kind] = _Kind(layout)
        self._kinds[kind].workers.add(worker)
        if self._coming:
            coming = [key for key in self._coming if key[0] == worker]
            there = set(stored) if coming else ()
            for key in coming:
                if key[1] in there:
                    del self._coming[key]

    def worker_lost(self, worker: WorkerId) -> None:
        """Its memory is gone. Its next process starts with nothing."""
        self._index.forget(worker)
        kind_id = self._kind_of.pop(worker, None)
        kind = None if kind_id is None else self._kinds.get(kind_id)
        if kind_id is not None and kind is not None:
            kind.workers.discard(worker)
            if not kind.workers:
                del self._kinds[kind_id]
        for key in [key for key in self._coming if key[0] == worker]:
            del self._coming[key]

    def cached_tokens(self, life: Life, choice: int, now: float) -> dict[WorkerId, int]:
        """Tokens from the front of the choice's known ones that each worker has, or will have; the
        last token never counts, for it is computed in any case."""
        found: dict[WorkerId, int] = {}
        if not self._index:
            return found
        num_tokens = len(life.request.prompt_token_ids) + len(life.choices[choice].taken)
        self._end_coming(now)
        for kind_id, kind in self._kinds.items():
            block_size = kind.layout.block_size
            hashes = self._hashes(life, choice, kind_id)[: (num_tokens - 1) // block_size]
            matches = self._index.matches(hashes)
            if len(self._kinds) > 1:  # blocks of one kind can lie with another, by hand-off
                matches = {w: depth for w, depth in matches.items() if w in kind.workers}
            for coming in self._coming.values():
                at_least = matches.get(coming.worker, 0)
                depth = _num_common(coming, hashes, at_least)
                if depth > at_least:
                    matches[coming.worker] = depth
            for worker, depth in matches.items():
                found[worker] = depth * block_size
        return found

    def expect(self, life: Life, choice: int, worker: WorkerId, now: float) -> None:
        """The choice's known tokens are to be computed by the worker."""
        kind_id = self._kind(worker)
        if kind_id not in self._kinds or not self._index:
            return
        hashes = self._hashes(life, choice, kind_id)
        if hashes and self._index.num_held(worker, hashes) < len(hashes):
            key = (worker, hashes[-1])
            self._coming.pop(key, None)
            self._coming[key] = _Coming(worker, hashes, len(hashes), now + COMING_S)
            if len(self._coming) > MAX_COMING:
                self._coming.popitem(last=False)

    def fetchable(
        self, life: Life, choice: int, source: WorkerId, to: WorkerId
    ) -> Sequence[BlockHash]:
        """The blocks of the choice's known tokens that ``source`` could send, from the first one
        on; none if ``to`` has as many, or could not use them."""
        kind_id = self._kind(to)
        if kind_id not in self._kinds or self._kind(source) != kind_id:
            return ()
        num_tokens = len(life.request.prompt_token_ids) + len(life.choices[choice].taken)
        useful = (num_tokens - 1) // self._kinds[kind_id].layout.block_size
        hashes = self._hashes(life, choice, kind_id)[:useful]
        there = self._index.num_held(source, hashes)
        return hashes[:there] if there > self._index.num_held(to, hashes) else ()

    # --- inside -------------------------------------------------------------------------------

    def _kind(self, worker: WorkerId) -> BlockHash | None:
        """None if its cache is not known by hashes, or it is dead."""
        kind = self._kind_of.get(worker)
        if kind is None:
            book = self._books.workers.get(worker)
            if book is not None and book.up.layout is not None:
                kind = self._kind_of[worker] = root_hash(book.up.layout, "")
        return kind

    def _hashes(self, life: Life, choice: int, kind_id: BlockHash) -> Sequence[BlockHash]:
        """Of all full blocks of the choice's known tokens. Only ever appended to."""
        layout = self._kinds[kind_id].layout
        request, taken = life.request, life.choices[choice].taken
        prompt = life.hashes.get((kind_id, None))
        if prompt is None:
            root = root_hash(layout, request.cache_salt)
            prompt = block_hashes(root, request.prompt_token_ids, layout.block_size)
            life.hashes[kind_id, None] = prompt
        if not taken:
            return prompt
        hashes = life.hashes.get((kind_id, choice))
        num_tokens = len(request.prompt_token_ids) + len(taken)
        if hashes is None or len(hashes) < num_tokens // layout.block_size:
            hashes = life.hashes[kind_id, choice] = list(hashes or prompt)
            tokens = request.prompt_token_ids + tuple(taken)
            _extend(hashes, tokens, layout, request.cache_salt)
        return hashes

    def _end_coming(self, now: float) -> None:
        while self._coming:
            key = next(iter(self._coming))
            if self._coming[key].until_s > now:
                return
            del self._coming[key]


def _extend(
    hashes: list[BlockHash], token_ids: TokenIds, layout: KvLayout, cache_salt: str
) -> None:
    """Append the hashes of the full blocks that have none yet."""
    size = layout.block_size
    if isinstance(token_ids, NamedTokens):
        hashes += block_hashes(root_hash(layout, cache_salt), token_ids, size)[len(hashes) :]
        return
    parent = hashes[-1] if hashes else root_hash(layout, cache_salt)
    for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
        parent = extend_hash(parent, token_ids[start : start + size])
        hashes.append(parent)


def _num_common(coming: _Coming, hashes: Sequence[BlockHash], at_least: int) -> int:
    """Blocks from the front that both chains have; 0 unless they are more than ``at_least``. Where
    chained hashes are equal, all before them are."""
    theirs, most = coming.hashes, min(coming.num_blocks, len(hashes))
    if most <= at_least or theirs[at_least] != hashes[at_least]:
        return 0
    return bisect_left(range(most), True, at_least, key=lambda i: theirs[i] != hashes[i])
