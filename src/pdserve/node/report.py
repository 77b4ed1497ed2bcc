"""When a worker tells the router what it holds, and what it says.

A report goes out when something has changed, at most every ``report_interval_s``, and as a
heartbeat every ``heartbeat_s``. A worker that is idle says nothing else. What it holds is asked of
a `LoadSource`: `BatchLoad` for a native worker, an engine's tasks for a foreign one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pdserve.core.effects import CancelTimer
from pdserve.core.messages import LoadReport
from pdserve.node.batch import BatchMachine
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing

HEARTBEAT_TIMER = "heartbeat"
REPORT_TIMER = "report"
SMALL_STEP_TOKENS = 64
"""Steps up to this size are taken to cost the same; larger ones in proportion to their tokens."""


class LoadFigures(NamedTuple):
    """Figures of `LoadReport` that the router decides by: a change is worth a report."""

    pending_prefill_tokens: int
    num_waiting: int
    num_running: int
    free_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    open_leases: int


class LoadCounters(NamedTuple):
    """Figures of `LoadReport` that only grow; they go along with the others."""

    num_preemptions: int
    num_steps: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int


class LoadSource(Protocol):
    """Whoever knows what a worker holds."""

    def figures(self) -> LoadFigures: ...

    def counters(self) -> LoadCounters: ...


class BatchLoad:
    """What a native worker holds: its batch machine's queues and blocks, and its tickets."""

    def __init__(self, batch: BatchMachine, inbound: InboundHandoffs) -> None:
        self._batch = batch
        self._inbound = inbound

    def figures(self) -> LoadFigures:
        pool = self._batch.tables.pool
        return LoadFigures(
            pending_prefill_tokens=self._batch.pending_prefill_tokens,
            num_waiting=self._batch.num_waiting + self._inbound.num_queued,
            num_running=self._batch.num_running,
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
        )


class LoadReporter:
    """Keeps the figures of `LoadReport` that no other machine keeps."""

    def __init__(self, settings: WorkerSettings, source: LoadSource, standing: Standing) -> None:
        self.changed = False
        self.last_route_seq = 0
        self.transfer_bytes = 0
        self._settings = settings
        self._source = source
        self._standing = standing
        self._seq = 0
        self._reported_at_s = 0.0
        self._last_figures: LoadFigures | None = None
        self._waits = False
        self._step_started_at_s: float | None = None
        self._step_tokens = 0
        self._small_step_s = 0.0
        self._token_s = 0.0

    def step_started(self, num_tokens: int, now: float) -> None:
        self._step_started_at_s = now
        self._step_tokens = num_tokens

    def step_done(self, elapsed_s: float) -> None:
        """Remember the slowest step of its kind, with slow forgetting."""
        self._step_started_at_s = None
        if self._step_tokens <= SMALL_STEP_TOKENS:
            self._small_step_s = max(elapsed_s, 0.99 * self._small_step_s)
        else:
            self._token_s = max(elapsed_s / self._step_tokens, 0.99 * self._token_s)

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
        if self._waits or (self._source.figures() == self._last_figures and not self.changed):
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
        counters = self._source.counters()
        self._seq += 1
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
            )
        )

    def _expected_s(self) -> float:
        if self._step_started_at_s is None:
            return 0.0
        return max(self._small_step_s, self._token_s * self._step_tokens)
