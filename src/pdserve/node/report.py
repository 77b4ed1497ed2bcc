"""When a worker tells the router what it holds, and what it says.

A report goes out when something has changed, at most every ``report_interval_s``, and as a
heartbeat every ``heartbeat_s``. A worker that is idle says nothing else.
"""

from __future__ import annotations

from pdserve.core.effects import CancelTimer
from pdserve.core.messages import LoadReport
from pdserve.core.step import StepPlan
from pdserve.node.batch import BatchMachine
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings

HEARTBEAT_TIMER = "heartbeat"
REPORT_TIMER = "report"
SMALL_STEP_TOKENS = 64
"""Steps up to this size are taken to cost the same; larger ones in proportion to their tokens."""


class LoadReporter:
    """Keeps the figures of `LoadReport` that no other machine keeps."""

    def __init__(
        self, settings: WorkerSettings, batch: BatchMachine, inbound: InboundHandoffs
    ) -> None:
        self.changed = False
        self.draining = False
        self.last_route_seq = 0
        self.transfer_bytes = 0
        self._settings = settings
        self._batch = batch
        self._inbound = inbound
        self._seq = 0
        self._reported_at_s = 0.0
        self._last_figures: tuple[int, ...] = ()
        self._waits = False
        self._step_started_at_s: float | None = None
        self._step_tokens = 0
        self._small_step_s = 0.0
        self._token_s = 0.0

    def step_started(self, plan: StepPlan, now: float) -> None:
        self._step_started_at_s = now
        self._step_tokens = plan.num_tokens

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
        if self._waits or (self._figures() == self._last_figures and not self.changed):
            return
        wait_s = self._reported_at_s + self._settings.report_interval_s - out.now
        if wait_s <= 0:
            self._report(out)
        else:
            self._waits = True
            out.set_timer(REPORT_TIMER, wait_s)

    def _figures(self) -> tuple[int, ...]:
        pool = self._batch.tables.pool
        return (
            self._batch.pending_prefill_tokens,
            self._batch.num_waiting + self._inbound.num_queued,
            self._batch.num_running,
            self._batch.growth_headroom,
            pool.num_cached,
            pool.num_quarantined,
            self._inbound.num_leases,
        )

    def _report(self, out: Outbox) -> None:
        if self._waits:
            self._waits = False
            out.add(CancelTimer(REPORT_TIMER))
        self.changed = False
        self._reported_at_s = out.now
        self._last_figures = figures = self._figures()
        pending, waiting, running, free, cached, quarantined, leases = figures
        self._seq += 1
        started_at_s = self._step_started_at_s
        out.tell_router(
            LoadReport(
                seq=self._seq,
                last_route_seq=self.last_route_seq,
                pending_prefill_tokens=pending,
                num_waiting=waiting,
                num_running=running,
                free_blocks=free,
                total_blocks=self._settings.num_blocks,
                cached_blocks=cached,
                quarantined_blocks=quarantined,
                open_leases=leases,
                num_preemptions=self._batch.num_preemptions,
                num_steps=self._batch.num_steps,
                prefix_queries_tokens=self._batch.tables.queries_tokens,
                prefix_hits_tokens=self._batch.tables.hits_tokens,
                transfer_bytes=self.transfer_bytes,
                step_age_s=0.0 if started_at_s is None else out.now - started_at_s,
                step_expected_s=self._expected_s(),
                draining=self.draining,
            )
        )

    def _expected_s(self) -> float:
        if self._step_started_at_s is None:
            return 0.0
        return max(self._small_step_s, self._token_s * self._step_tokens)
