"""When a worker tells the router what it holds, and what it says.

A report goes out when there is news, at most every ``report_interval_s``, and as a heartbeat every
``heartbeat_s``. News is what the router cannot know: that there is less to do, that blocks have
come free or have been taken. What it has caused or was told of by other messages is none: jobs and
sequences that have come, tickets that were granted, tokens by which sequences have grown; but a
hundredth of the blocks is. What has entered and left the prefix cache since the last report goes
with it, or before it if that is too much for one message. A worker that is idle says nothing else.
What it holds is asked of a `LoadSource`: `BatchLoad` for a native worker, an engine's tasks for a
foreign one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from pdserve.core.effects import CancelTimer
from pdserve.core.ids import BlockHash
from pdserve.core.messages import CacheChanged, LoadReport
from pdserve.core.request import Role
from pdserve.core.step import StepSample, StepShape, TransferSample
from pdserve.node.batch import BatchMachine
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing

HEARTBEAT_TIMER = "heartbeat"
REPORT_TIMER = "report"
EARLY_BEAT = 0.75
"""Of the time between two heartbeats: a report from then on is one."""
SMALL_STEP_TOKENS = 64
"""Steps up to this size are taken to cost the same; larger ones in proportion to their tokens."""
FORGETTING = 0.99
"""What is left of the slowest step's time after another step."""
MAX_SAMPLES = 32
"""Steps, and hand-offs, whose times a report holds at most."""
BLOCKS_TOLD = 0.01
"""Share of the pool by which blocks may differ from what was told last."""
MAX_HASHES = 4096
"""Blocks that one message names at most: 64 KiB, so that tokens need not wait long."""
Hashes = tuple[BlockHash, ...]


class LoadFigures(NamedTuple):
    """What a `LoadReport` says of the worker's load; the last five change with every step."""

    pending_prefill_tokens: int
    num_waiting: int
    num_running: int
    num_decoding: int
    num_left_out: int
    quarantined_blocks: int
    open_leases: int
    free_blocks: int
    cached_blocks: int
    num_preemptions: int
    num_steps: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    context_tokens: int


class Glance(NamedTuple):
    """The figures of which a change may be news. ``to_decode``: sequences that decode here, or have
    a place to. ``untold_blocks``: free ones, and all that tickets have ever taken, of which the
    router has heard. It is asked for at each input, the figures for a report."""

    pending_tokens: int
    to_decode: int
    quarantined_blocks: int
    untold_blocks: int

    def is_news_after(self, known: Glance, tolerance: int) -> bool:
        """Whether the router, which takes ``known`` to be so, cannot know this: that there is less
        to do, or that more than so many blocks have come free or been taken."""
        return (
            self.pending_tokens < known.pending_tokens
            or self.to_decode < known.to_decode
            or self.quarantined_blocks != known.quarantined_blocks
            or abs(self.untold_blocks - known.untold_blocks) > tolerance
        )

    def heard_of(self, known: Glance) -> Glance:
        """What the router takes to be so now: it knows of what has come."""
        return Glance(
            self.pending_tokens, self.to_decode, known.quarantined_blocks, known.untold_blocks
        )


class LoadSource(Protocol):
    """Whoever knows what a worker holds."""

    def glance(self) -> Glance: ...

    def figures(self) -> LoadFigures: ...

    def pressure(self) -> tuple[bool, bool]:
        """Whether somebody is left out of the steps, and whether anything runs or is left out."""
        ...

    def tell_cache(self, out: Outbox) -> tuple[Hashes, Hashes]:
        """For a report: blocks that have entered and left the prefix cache, if the router is to
        know. If there are too many for one message, others say most of it."""
        ...


class BatchLoad:
    """What a native worker holds: its batch machine's queues and blocks, and its tickets."""

    def __init__(self, batch: BatchMachine, inbound: InboundHandoffs) -> None:
        self._batch = batch
        self._inbound = inbound
        self._queues = batch.queues
        self._pool = batch.tables.pool

    def glance(self) -> Glance:
        queues, inbound, pool = self._queues, self._inbound, self._pool
        return Glance(
            queues.pending_tokens,
            queues.num_staying + inbound.num_leases,
            pool.num_quarantined,
            self._batch.growth_headroom + inbound.num_blocks_granted,
        )

    def figures(self) -> LoadFigures:
        batch, queues, pool, inbound = self._batch, self._queues, self._pool, self._inbound
        return LoadFigures(
            queues.pending_tokens,
            batch.num_waiting + inbound.num_queued,
            batch.num_running,
            queues.num_staying,
            batch.num_left_out,
            pool.num_quarantined,
            inbound.num_leases,
            batch.growth_headroom,
            pool.num_cached,
            batch.num_preemptions,
            batch.num_steps,
            batch.tables.queries_tokens,
            batch.tables.hits_tokens,
            queues.context_tokens,
        )

    def pressure(self) -> tuple[bool, bool]:
        presses = self._batch.num_left_out > 0
        return presses, presses or self._batch.num_running > 0

    def tell_cache(self, out: Outbox) -> tuple[Hashes, Hashes]:
        stored, evicted = self._batch.tables.pool.take_changes()
        while len(stored) > MAX_HASHES or len(evicted) > MAX_HASHES:
            first = CacheChanged(stored=stored[:MAX_HASHES], evicted=evicted[:MAX_HASHES])
            out.tell_router(first)
            stored, evicted = stored[MAX_HASHES:], evicted[MAX_HASHES:]
        return stored, evicted


class LoadReporter:
    """Keeps the figures of `LoadReport` that no other machine keeps."""

    def __init__(
        self,
        settings: WorkerSettings,
        source: LoadSource,
        standing: Standing,
        is_empty: Callable[[], bool],
        tell_silent: Callable[[Outbox], None],
    ) -> None:
        """``tell_silent``: with a heartbeat the router hears of all tokens that it has not been
        told of yet."""
        self.changed = False
        self.last_route_seq = 0
        self.transfer_bytes = 0
        self._settings = settings
        self._source = source
        self._standing = standing
        self._is_empty = is_empty
        self._tell_silent = tell_silent
        self._beat_at_s = 0.0
        self._seq = 0
        self._reported_at_s = 0.0
        self._known: Glance | None = None
        self._seen: Glance | None = None
        self._told_drained = False
        self._told: tuple[bool, bool, int] | None = None
        self._waits = False
        self._step_started_at_s: float | None = None
        self._step = StepShape()
        self._steps: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._transfers: deque[TransferSample] = deque(maxlen=MAX_SAMPLES)
        self._small_step_s = 0.0
        self._tolerance = int(BLOCKS_TOLD * settings.num_blocks)
        self._token_s = 0.0

    def step_started(self, shape: StepShape, now: float) -> None:
        """An engine that batches for itself does not say the shape before the step: it is empty."""
        self._step_started_at_s = now
        self._step = shape

    def step_done(self, elapsed_s: float) -> None:
        """Remember the slowest step of its kind, with slow forgetting."""
        self.steps_done(1, elapsed_s)

    def steps_done(self, num_steps: int, elapsed_s: float) -> None:
        """So many steps of one kind, taken to be equally long; to learn from, the middle one."""
        self._step_started_at_s = None
        step, step_s, kept = self._step, elapsed_s / num_steps, FORGETTING**num_steps
        num_tokens = _num_tokens(step)
        if num_tokens <= SMALL_STEP_TOKENS:
            self._small_step_s = max(step_s, kept * self._small_step_s)
        else:
            self._token_s = max(step_s / num_tokens, kept * self._token_s)
        if num_tokens and self._settings.report_samples:
            grown = step.num_decoding * (num_steps - 1) // 2
            if grown:
                step = replace(step, context_tokens=step.context_tokens + grown)
            self.step_measured(StepSample(step, step_s))

    def step_failed(self) -> None:
        """How long it took says nothing."""
        self._step_started_at_s = None

    def step_measured(self, sample: StepSample) -> None:
        """For the next report; of too many the latest count."""
        self._steps.append(sample)

    def transfer_measured(self, sample: TransferSample) -> None:
        """For the next report; of too many the latest count."""
        if self._settings.report_samples:
            self._transfers.append(sample)

    def beat(self, out: Outbox) -> None:
        """The heartbeat: report whatever happened, and set the next one."""
        self._beat_at_s = out.now
        out.set_timer(HEARTBEAT_TIMER, self._settings.heartbeat_s)
        self._tell_silent(out)
        self._report(out)

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was the reporter's."""
        if timer == HEARTBEAT_TIMER:
            self.beat(out)
        elif timer == REPORT_TIMER:
            self._waits = False
            self._tell_news(out)
        else:
            return False
        return True

    def report_if_changed(self, out: Outbox) -> None:
        """After each input: report now, later, or not at all."""
        if self._settings.terse_reports:
            if self._told != self._terse():
                self._tell_news(out)
            return
        if self._waits:
            return
        if not self.changed and not self._has_news():
            return
        wait_s = self._reported_at_s + self._settings.report_interval_s - out.now
        if wait_s <= 0:
            self._tell_news(out)
        else:
            self._waits = True
            out.set_timer(REPORT_TIMER, wait_s)

    def quiet_blocks(self) -> int | None:
        """How many blocks may be taken before that alone is news; None: any number, or a report
        is due already."""
        known = self._known
        if self._waits or known is None or self._settings.terse_reports:
            return None
        now = self._seen  # after every input
        assert now is not None, "what is known was seen"
        return max(0, self._tolerance - (known.untold_blocks - now.untold_blocks))

    def _has_news(self) -> bool:
        known, draining = self._known, self._standing.draining
        if known is None or (draining and not self._told_drained and self._is_empty()):
            return True
        now = self._source.glance()
        if now == self._seen:
            return False
        if now.is_news_after(known, self._tolerance):
            return True
        self._seen, self._known = now, now.heard_of(known)
        return False

    def _terse(self) -> tuple[bool, bool, int]:
        """What must be told at once where reports are terse."""
        standing = self._standing
        is_away = standing.role is not self._settings.role
        presses, runs = self._source.pressure()
        prefills = standing.role is not Role.DECODE
        return prefills and presses, is_away and runs, standing.role_epoch

    def _tell_news(self, out: Outbox) -> None:
        """A report takes the place of a heartbeat that would soon follow it."""
        if out.now - self._beat_at_s >= EARLY_BEAT * self._settings.heartbeat_s:
            self.beat(out)
        else:
            self._report(out)

    def _report(self, out: Outbox) -> None:
        if self._waits:
            self._waits = False
            out.add(CancelTimer(REPORT_TIMER))
        self.changed = False
        self._reported_at_s = out.now
        self._told = self._terse() if self._settings.terse_reports else None
        figures = self._source.figures()
        self._known = self._seen = self._source.glance()
        is_empty = self._is_empty()
        self._told_drained = self._standing.draining and is_empty
        self._seq += 1
        stored, evicted = self._source.tell_cache(out)
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
                num_preemptions=figures.num_preemptions,
                num_steps=figures.num_steps,
                prefix_queries_tokens=figures.prefix_queries_tokens,
                prefix_hits_tokens=figures.prefix_hits_tokens,
                transfer_bytes=self.transfer_bytes,
                step_age_s=0.0 if started_at_s is None else out.now - started_at_s,
                step_expected_s=self._expected_s(),
                draining=self._standing.draining,
                role=self._standing.role,
                role_epoch=self._standing.role_epoch,
                num_decoding=figures.num_decoding,
                context_tokens=figures.context_tokens,
                is_empty=is_empty,
                num_left_out=figures.num_left_out,
                steps=tuple(self._steps),
                transfers=tuple(self._transfers),
                stored=stored,
                evicted=evicted,
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
