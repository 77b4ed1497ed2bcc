"""When a worker tells the router what it holds, and what it says.

A report goes out when something has changed, at most every ``report_interval_s``, and as a
heartbeat every ``heartbeat_s``; what has entered and left the prefix cache since the last one goes
before it. A worker that is idle says nothing else. What it holds is asked of a `LoadSource`:
`BatchLoad` for a native worker, an engine's tasks for a foreign one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple, Protocol

from pdserve.core.effects import CancelTimer
from pdserve.core.messages import CacheChanged, LoadReport
from pdserve.core.step import StepSample, StepShape, TransferSample
from pdserve.node.batch import BatchMachine
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing

HEARTBEAT_TIMER = "heartbeat"
REPORT_TIMER = "report"
SMALL_STEP_TOKENS = 64
"""Steps up to this size are taken to cost the same; larger ones in proportion to their tokens."""
MAX_SAMPLES = 32
"""Steps, and hand-offs, whose times a report holds at most."""
MAX_HASHES = 4096
"""Blocks that one `CacheChanged` names at most: 64 KiB, so that tokens need not wait long."""


class LoadFigures(NamedTuple):
    """Figures of `LoadReport` that the router decides by: a change is worth a report."""

    pending_prefill_tokens: int
    num_waiting: int
    num_running: int
    num_decoding: int
    free_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    open_leases: int


class LoadCounters(NamedTuple):
    """Figures of `LoadReport` that change with every step; they go along with the others."""

    num_preemptions: int
    num_steps: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    context_tokens: int


class LoadSource(Protocol):
    """Whoever knows what a worker holds."""

    def figures(self) -> LoadFigures: ...

    def counters(self) -> LoadCounters: ...

    def tell_cache(self, out: Outbox) -> None:
        """Before a report: what has become of the prefix cache, if the router is to know."""


class BatchLoad:
    """What a native worker holds: its batch machine's queues and blocks, and its tickets."""

    def __init__(self, batch: BatchMachine, inbound: InboundHandoffs) -> None:
        self._batch = batch
        self._inbound = inbound

    def figures(self) -> LoadFigures:
        pool = self._batch.tables.pool
        waiting, admitted, decoding = self._batch.queues()
        pending = (
            len(s.token_ids) - max(s.num_computed, s.num_found) for s in chain(waiting, admitted)
        )
        return LoadFigures(
            pending_prefill_tokens=sum(pending),
            num_waiting=len(waiting) + self._inbound.num_queued,
            num_running=len(admitted) + len(decoding),
            num_decoding=sum(len(s.choices) for s in self._stays()),
            free_blocks=self._batch.growth_headroom,
            cached_blocks=pool.num_cached,
            quarantined_blocks=pool.num_quarantined,
            open_leases=self._inbound.num_leases,
        )

    def counters(self) -> LoadCounters:
        return LoadCounters(
            num_preemptions=self._batch.num_preemptions,
            num_steps=self._batch.num_steps,
            prefix_queries_tokens=self._batch.tables.queries_tokens,
            prefix_hits_tokens=self._batch.tables.hits_tokens,
            context_tokens=sum(len(s.choices) * len(s.token_ids) for s in self._stays()),
        )

    def tell_cache(self, out: Outbox) -> None:
        stored, evicted = self._batch.tables.pool.take_changes()
        for first in range(0, max(len(stored), len(evicted)), MAX_HASHES):
            end = first + MAX_HASHES
            out.tell_router(CacheChanged(stored=stored[first:end], evicted=evicted[first:end]))

    def _stays(self) -> Iterator[Sequence]:
        """Sequences that decode here, or will when their prompt is done."""
        _, admitted, decoding = self._batch.queues()
        return chain(decoding, (s for s in admitted if not s.hands_off))


class LoadReporter:
    """Keeps the figures of `LoadReport` that no other machine keeps."""

    def __init__(
        self,
        settings: WorkerSettings,
        source: LoadSource,
        standing: Standing,
        is_empty: Callable[[], bool],
    ) -> None:
        self.changed = False
        self.last_route_seq = 0
        self.transfer_bytes = 0
        self._settings = settings
        self._source = source
        self._standing = standing
        self._is_empty = is_empty
        self._seq = 0
        self._reported_at_s = 0.0
        self._last_figures: LoadFigures | None = None
        self._waits = False
        self._step_started_at_s: float | None = None
        self._last_empty = False
        self._step = StepShape()
        self._steps: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._transfers: deque[TransferSample] = deque(maxlen=MAX_SAMPLES)
        self._small_step_s = 0.0
        self._token_s = 0.0

    def step_started(self, shape: StepShape, now: float) -> None:
        """An engine that batches for itself does not say the shape before the step: it is empty."""
        self._step_started_at_s = now
        self._step = shape

    def step_done(self, elapsed_s: float) -> None:
        """Remember the slowest step of its kind, with slow forgetting."""
        self._step_started_at_s = None
        num_tokens = _num_tokens(self._step)
        if num_tokens <= SMALL_STEP_TOKENS:
            self._small_step_s = max(elapsed_s, 0.99 * self._small_step_s)
        else:
            self._token_s = max(elapsed_s / num_tokens, 0.99 * self._token_s)
        if num_tokens:
            self.step_measured(StepSample(self._step, elapsed_s))

    def step_failed(self) -> None:
        """How long it took says nothing."""
        self._step_started_at_s = None

    def step_measured(self, sample: StepSample) -> None:
        """For the next report; of too many the latest count."""
        self._steps.append(sample)

    def transfer_measured(self, sample: TransferSample) -> None:
        """For the next report; of too many the latest count."""
        self._transfers.append(sample)

    def beat(self, out: Outbox) -> None:
        """The heartbeat: report whatever happened, and set the next one."""
        out.set_timer(HEARTBEAT_TIMER, self._settings.heartbeat_s)
        self._report(out)

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was the reporter's."""
        if timer == HEARTBEAT_TIMER:
            self.beat(out)
        elif timer == REPORT_TIMER:
            self._waits = False
            self._report(out)
        else:
            return False
        return True

    def report_if_changed(self, out: Outbox) -> None:
        """After each input: report now, later, or not at all."""
        if self._waits:
            return
        known = (self._last_figures, self._last_empty)
        if not self.changed and (self._source.figures(), self._is_empty()) == known:
            return
        wait_s = self._reported_at_s + self._settings.report_interval_s - out.now
        if wait_s <= 0:
            self._report(out)
        else:
            self._waits = True
            out.set_timer(REPORT_TIMER, wait_s)

    def _report(self, out: Outbox) -> None:
        if self._waits:
            self._waits = False
            out.add(CancelTimer(REPORT_TIMER))
        self.changed = False
        self._reported_at_s = out.now
        self._last_figures = figures = self._source.figures()
        self._last_empty = self._is_empty()
        counters = self._source.counters()
        self._seq += 1
        self._source.tell_cache(out)
        started_at_s = self._step_started_at_s
        out.tell_router(
            LoadReport(
                seq=self._seq,
                last_route_seq=self.last_route_seq,
                pending_prefill_tokens=figures.pending_prefill_tokens,
                num_waiting=figures.num_waiting,
                num_running=figures.num_running,
                free_blocks=figures.free_blocks,
                total_blocks=self._settings.num_blocks,
                cached_blocks=figures.cached_blocks,
                quarantined_blocks=figures.quarantined_blocks,
                open_leases=figures.open_leases,
                num_preemptions=counters.num_preemptions,
                num_steps=counters.num_steps,
                prefix_queries_tokens=counters.prefix_queries_tokens,
                prefix_hits_tokens=counters.prefix_hits_tokens,
                transfer_bytes=self.transfer_bytes,
                step_age_s=0.0 if started_at_s is None else out.now - started_at_s,
                step_expected_s=self._expected_s(),
                draining=self._standing.draining,
                role=self._standing.role,
                role_epoch=self._standing.role_epoch,
                num_decoding=figures.num_decoding,
                context_tokens=counters.context_tokens,
                is_empty=self._last_empty,
                steps=tuple(self._steps),
                transfers=tuple(self._transfers),
            )
        )
        self._steps.clear()
        self._transfers.clear()

    def _expected_s(self) -> float:
        if self._step_started_at_s is None:
            return 0.0
        return max(self._small_step_s, self._token_s * _num_tokens(self._step))


def _num_tokens(shape: StepShape) -> int:
    return shape.prompt_tokens + shape.num_decoding
