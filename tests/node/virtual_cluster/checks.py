"""Invariants of one worker process, of the router's books, and of the cluster as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.request import DEFAULT_SERVICE
from pdserve.node.inbound_state import Inbound, InboundState
from pdserve.node.router import RouterNode
from pdserve.node.sequence import Sequence
from pdserve.node.worker import WorkerNode
from virtual_cluster.process import Process


def check_worker(process: Process) -> None:
    """Every block is accounted for, and what is written has one owner."""
    node = process.node
    pool = node.batch.tables.pool
    pool.check()
    sequences = _sequences(node)
    expected = Counter(block for sequence in sequences for block in sequence.block_ids)
    quarantined: Counter[BlockId] = Counter()
    for handoff in node.inbound.handoffs():
        expected.update(handoff.pinned)
        if handoff.state is InboundState.QUARANTINED:
            quarantined.update(handoff.fresh)
        else:
            expected.update(handoff.fresh)
    pins = Counter(source for _, source, _ in _copies(node))
    expected.update(pins)
    for block in map(BlockId, range(pool.num_blocks)):
        assert pool.ref_count(block) == expected[block], (
            f"{process}: block {block} has {pool.ref_count(block)} references, "
            f"{expected[block]} are accounted for"
        )
    assert pool.num_quarantined == quarantined.total()
    assert all(count == 1 for count in quarantined.values())
    _check_written(node, sequences, pins)
    _check_copies(node)
    _check_queues(node)


def _sequences(node: WorkerNode) -> list[Sequence]:
    """Everything that may hold blocks, once."""
    found = [*node.batch.sequences(), *node.riders, *node.outbound.sequences()]
    return list({id(sequence): sequence for sequence in found}.values())


def _copies(node: WorkerNode) -> list[tuple[Sequence, BlockId, BlockId]]:
    return [*node.batch.tables._copies, *node.batch.tables._copying]


def _check_written(node: WorkerNode, sequences: Iterable[Sequence], pins: Counter[BlockId]) -> None:
    """A block that will be written (by a step or by a peer) belongs to one sequence alone."""
    pool = node.batch.tables.pool
    for sequence in sequences:
        if sequence.detached or sequence.doomed:
            continue
        first = sequence.num_computed // pool.block_size
        for block in sequence.block_ids[first:]:
            assert pool.ref_count(block) - pins[block] == 1, f"{sequence.attempt} shares {block}"
            assert not pool.is_indexed(block), f"{sequence.attempt} will write indexed {block}"
    for handoff in node.inbound.handoffs():
        if handoff.state is InboundState.QUARANTINED:
            continue
        for block in handoff.fresh:
            assert pool.ref_count(block) == 1, f"{handoff.header.attempt} shares {block}"
            assert not pool.is_indexed(block)


def _check_copies(node: WorkerNode) -> None:
    """The target of a copy belongs to the sequence that wants it, as long as it lives."""
    for sequence, _, target in _copies(node):
        assert target in sequence.block_ids, f"a copy into {target}, which nobody owns"


def _check_queues(node: WorkerNode) -> None:
    """A sequence is in one queue, under its own key; nothing that runs is doomed."""
    batch = node.batch.queues
    batch.check()
    queues = (batch.waiting, batch.resuming, batch.admitted, batch.decoding, batch.held)
    seen: set[int] = set()
    for queue in queues:
        for key, sequence in queue.items():
            assert key == sequence.key
            assert id(sequence) not in seen, f"{key} is in two queues"
            assert not sequence.doomed
            assert not sequence.detached
            seen.add(id(sequence))
    assert not any(s.block_ids for q in (batch.waiting, batch.resuming) for s in q.values())
    waiting = {sequence.attempt for sequence in batch.waiting.values() if sequence.hands_off}
    assert set(node._jobs) == waiting, "a job is kept for nobody"


def check_write(target: Process, attempt: AttemptId, writer: Process, block: BlockId) -> None:
    """Fencing: a remote write lands where a ticket of this very attempt and writer says."""
    found: Inbound | None = next(
        (h for h in target.node.inbound.handoffs() if h.header.attempt == attempt), None
    )
    assert found is not None, f"{writer} writes for {attempt}, which {target} does not know"
    assert found.state in (InboundState.GRANTED, InboundState.QUARANTINED), found.state
    assert (found.peer, found.peer_epoch) == (writer.worker, writer.epoch)
    assert block in found.fresh, f"{writer} writes into {block} of {target}: not its own"


def check_one_owner(processes: Iterable[Process]) -> None:
    """No choice of an attempt runs on two live workers."""
    owners: dict[tuple[AttemptId, int], Process] = {}
    for process in processes:
        if not process.alive:
            continue
        batch = process.node.batch.queues
        for queue in (batch.waiting, batch.resuming, batch.admitted, batch.decoding):
            for sequence in queue.values():
                for choice in sequence.choices:
                    key = (sequence.attempt, choice)
                    other = owners.setdefault(key, process)
                    assert other is process, f"{key} runs on {other} and on {process}"


def check_router(router: RouterNode) -> None:
    """Every choice is finished, waits for a route, or belongs to an attempt under way."""
    dispatch = router.dispatch
    queue = set(dispatch.queue)
    assert queue <= set(dispatch.lives), "a request that is over waits"
    assert len(queue) == dispatch.num_queued, "a request waits twice"
    attempts: dict[AttemptId, tuple[WorkerId | None, ...]] = {}
    for request_id, life in dispatch.lives.items():
        assert not life.is_done
        for choice in life.choices:
            if choice.finish is None and choice.epoch is None:
                assert request_id in queue, f"nobody works on {request_id}, choice {choice.index}"
            elif choice.finish is None:
                assert choice.epoch in life.attempts, f"{request_id}: {choice.epoch} is over"
        for epoch, attempt in life.attempts.items():
            assert life.live_choices(epoch), f"{request_id}: nobody wants {epoch}"
            assert attempt.owner in router.books.workers, f"{attempt.owner} is gone"
            attempts[attempt.job.attempt] = (attempt.job.decode_worker, attempt.moving_to)
    flights = dispatch.flights.workers()
    followed = {attempt: worker for worker, there in flights.items() for attempt in there}
    decoding = {attempt: there[0] for attempt, there in attempts.items()}
    assert followed == decoding, "who decodes where is not what is under way"
    for worker, book in router.books.workers.items():
        for promised in book.promised:
            assert worker in attempts.get(promised, ()), f"a promise to {promised} is left"
    _check_fetches(router, set(attempts))


def _check_fetches(router: RouterNode, attempts: set[AttemptId]) -> None:
    """A job that is held back waits for one fetch that is under way, and its book knows."""
    fetches = router.dispatch.fetches
    waiting = {attempt: fetch for fetch in fetches._open.values() for attempt in fetch.waiting}
    assert waiting == fetches._held
    assert waiting.keys() <= attempts, "a job is held back of an attempt that is over"
    workers = router.books.workers
    held = {attempt: worker for worker, book in workers.items() for attempt in book.held}
    assert held == {attempt: fetch.to for attempt, fetch in waiting.items()}
    for fetch in fetches._open.values():
        assert {fetch.source, fetch.to} <= workers.keys(), f"{fetch.fetch_id} is of a dead worker"


def check_caches_known(router: RouterNode, processes: Iterable[Process]) -> None:
    """With everything said that is to be said, the router knows every worker's prefix cache."""
    index = router.dispatch.prefixes._index
    for process in processes:
        cached = set(process.node.batch.tables.pool._block_of)
        assert index._blocks.get(process.worker, set()) == cached, process


def check_books_restored(router: RouterNode) -> None:
    """With nothing under way the router counts every block of every worker as free."""
    assert router.num_requests == 0
    assert router.num_queued == 0
    assert len(router.dispatch.flights) == 0
    assert router.dispatch.waiting.prompt_tokens_ahead(DEFAULT_SERVICE) == 0
    assert len(router.dispatch.fetches) == 0
    for book in router.books.workers.values():
        assert book.held == {}
        assert book.promised == {}, f"promised on {book.up.worker}: {book.promised}"
        assert book.unreported == []
        assert (book.granted_blocks, book.num_granted) == (0, 0)
        assert book.free_blocks == book.up.num_blocks
        assert book.pending_tokens == 0
        assert book.num_decoding == 0
