"""Prometheus metrics of one gateway, derived from life events, deliveries and load reports.

The life of a request in here: SUBMITTED opens its record. Each event adds to the counters and
observes an interval as soon as both ends of it are known; deliveries give time to first token and
inter-token latency as the client sees them. FINISHED or FAILED closes the record. The last few
hundred closed records stay readable, because a worker's events travel apart from its tokens and the
last ones may come after the end; then they are gone. Events of a request that has no record count
where they stand for themselves and are otherwise ignored, so lost and reordered events cost
precision, never memory and never an error.

The life of a worker: `Metrics.on_worker` says that it serves, each load report sets its gauges and
adds what its counters have grown by, and when it is lost its gauges go.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.messages import LoadReport
from pdserve.core.request import Role
from pdserve.obs.families import RequestFamilies, WorkerFamilies

MAX_CLOSED_RECORDS = 512
DEFAULT_MAX_MODEL_TOKENS = 131_072


@dataclass(slots=True)
class _Record:
    """What has been seen of one request; times in s, None if not (yet) seen."""

    submitted_s: float | None = None
    ended_s: float | None = None
    prompt_tokens: float | None = None
    choices: float | None = None
    prefill_started_s: float | None = None
    prefill_ended_s: float | None = None
    first_token_s: float | None = None
    first_delivery_s: float | None = None
    last_delivery_s: float | None = None
    delivered_tokens: int = 0
    handoffs_opened_s: dict[Epoch, float] = field(default_factory=dict)
    handoffs_closed: set[Epoch] = field(default_factory=set)


@dataclass(slots=True)
class _Worker:
    role: Role
    up: bool = True
    counted: dict[str, float] = field(default_factory=dict)


class Metrics:
    """All metrics of one gateway, for one thread. ``max_model_tokens`` sets the longest bucket."""

    def __init__(self, model_name: str, max_model_tokens: int = DEFAULT_MAX_MODEL_TOKENS) -> None:
        self._registry = CollectorRegistry()
        self._requests = RequestFamilies(self._registry, model_name, max_model_tokens)
        self._workers = WorkerFamilies(self._registry, model_name)
        self._open: dict[RequestId, _Record] = {}
        self._closed: OrderedDict[RequestId, _Record] = OrderedDict()  # oldest first
        self._known_workers: dict[WorkerId, _Worker] = {}

    @property
    def num_open_requests(self) -> int:
        """Requests with a record that is not closed."""
        return len(self._open)

    def exposition(self) -> bytes:
        """Text in Prometheus' exposition format 0.0.4."""
        return generate_latest(self._registry)

    def on_event(self, event: LifeEvent) -> None:
        """Take in one life event, of any request and in any order."""
        match event.name:
            case LifeName.SUBMITTED:
                self._submitted(event)
            case LifeName.ROUTED:
                self._routed(event)
            case LifeName.RESUMED:
                self._requests.resumes(_text(event, "reason")).inc()
            case LifeName.PREFIX_FETCHED:
                self._requests.fetches(_text(event, "outcome")).inc()
            case LifeName.HANDOFF_GRANTED:
                self._requests.handoff_reused_blocks.inc(_number(event, "reused_blocks") or 0.0)
            case LifeName.FINISHED | LifeName.FAILED:
                self._ended(event)
            case _:
                record = self._record(event.request_id)
                if record is not None:
                    self._progressed(record, event)

    def on_tokens(self, request_id: RequestId, num_tokens: int, at_s: float) -> None:
        """Tokens of the request (of any of its choices) were given to its client at ``at_s``.

        ``at_s`` is on the clock of the SUBMITTED event.
        """
        self._requests.generation_tokens.inc(max(0, num_tokens))
        record = self._record(request_id)
        if record is None or num_tokens <= 0:
            return
        if record.last_delivery_s is not None:
            self._requests.inter_token_s.observe(max(0.0, at_s - record.last_delivery_s))
        record.last_delivery_s = at_s
        record.delivered_tokens += num_tokens
        if record.first_delivery_s is None:
            self._first_delivered(record, at_s)

    def on_report(self, worker: WorkerId, role: Role, report: LoadReport) -> None:
        """Take in a worker's load report. One of a worker known to be lost is ignored."""
        known = self._known_workers.get(worker)
        if known is not None and not known.up:
            return
        if known is None or known.role is not role:
            self.on_worker(worker, role, up=True)
            known = self._known_workers[worker]
        total = report.total_blocks
        gauges = {
            "num_running": float(report.num_running),
            "num_waiting": float(report.num_waiting),
            "kv_usage": (total - report.free_blocks) / total if total else 0.0,
            "quarantined_blocks": float(report.quarantined_blocks),
            "open_leases": float(report.open_leases),
        }
        self._workers.set_gauges(worker, gauges)
        for counter in self._workers.counted:
            value = float(getattr(report, counter))
            before = known.counted.get(counter, 0.0)
            # A smaller value than before comes from a restarted process, which counts from 0.
            self._workers.add(worker, counter, value - before if value >= before else value)
            known.counted[counter] = value

    def on_worker(self, worker: WorkerId, role: Role, up: bool) -> None:
        """A worker serves in this role from now on, or is lost."""
        known = self._known_workers.get(worker)
        if known is None:
            known = self._known_workers[worker] = _Worker(role)
        if known.role is not role:
            self._workers.forget_role(worker, known.role)
            known.role = role
        if not up:
            self._workers.forget_gauges(worker)
            known.counted.clear()  # whoever comes next under this name counts from 0
        known.up = up
        self._workers.set_up(worker, role, up)

    def on_role(self, worker: WorkerId, role: Role, up: bool) -> None:
        """The worker is in another pool from now on."""
        self._requests.role_changes(role.value).inc()
        self.on_worker(worker, role, up)

    def _record(self, request_id: RequestId) -> _Record | None:
        return self._open.get(request_id) or self._closed.get(request_id)

    def _submitted(self, event: LifeEvent) -> None:
        if event.request_id in self._open:
            return
        closed = self._closed.get(event.request_id)
        if closed is not None:
            if closed.ended_s is None or event.at_s <= closed.ended_s:
                return  # it overtook its own end
            del self._closed[event.request_id]
        self._open[event.request_id] = _Record(
            submitted_s=event.at_s,
            prompt_tokens=_number(event, "prompt_tokens"),
            choices=_number(event, "choices"),
        )

    def _routed(self, event: LifeEvent) -> None:
        values = dict(event.detail)
        if not {"local", "prefill", "decode"} & values.keys():
            return
        local = values.get("local", values.get("prefill") == values.get("decode"))
        self._requests.routes("local" if local else "split").inc()
        self._requests.route_cached_tokens.inc(_number(event, "cached_tokens") or 0.0)

    def _progressed(self, record: _Record, event: LifeEvent) -> None:
        """Events of the workers. Phases are those of the first attempt that reaches them."""
        match event.name:
            case LifeName.PREFILL_STARTED if record.prefill_started_s is None:
                record.prefill_started_s = event.at_s
                _observe(self._requests.queue_s, record.submitted_s, event.at_s)
                _observe(self._requests.prefill_s, event.at_s, record.prefill_ended_s)
            case LifeName.PREFILL_ENDED if record.prefill_ended_s is None:
                record.prefill_ended_s = event.at_s
                _observe(self._requests.prefill_s, record.prefill_started_s, event.at_s)
            case LifeName.FIRST_TOKEN if record.first_token_s is None:
                record.first_token_s = event.at_s
            case LifeName.HANDOFF_OPENED:
                record.handoffs_opened_s.setdefault(event.epoch, event.at_s)
            case LifeName.HANDOFF_CLOSED if event.epoch not in record.handoffs_closed:
                record.handoffs_closed.add(event.epoch)
                outcome = "accepted" if dict(event.detail).get("ok") else "failed"
                self._requests.handoffs(outcome).inc()
                self._requests.handoff_bytes.inc(_number(event, "bytes") or 0.0)
                opened_s = record.handoffs_opened_s.get(event.epoch)
                _observe(self._requests.handoff_s, opened_s, event.at_s)

    def _first_delivered(self, record: _Record, at_s: float) -> None:
        record.first_delivery_s = at_s
        self._requests.prompt_tokens.inc(record.prompt_tokens or 0.0)
        _observe(self._requests.first_token_s, record.submitted_s, at_s)

    def _ended(self, event: LifeEvent) -> None:
        if event.request_id in self._closed:
            return
        record = self._open.pop(event.request_id, None) or _Record()
        record.ended_s = event.at_s
        self._closed[event.request_id] = record
        if len(self._closed) > MAX_CLOSED_RECORDS:
            self._closed.popitem(last=False)
        if event.name is LifeName.FINISHED:
            self._finished(record, event)
        elif record.delivered_tokens:
            self._requests.success("error").inc()
        else:
            self._requests.rejected(_text(event, "kind")).inc()

    def _finished(self, record: _Record, event: LifeEvent) -> None:
        families = self._requests
        families.success(_text(event, "reason")).inc()
        self._judged(event)
        if record.submitted_s is None:
            return
        output_tokens = _number(event, "output_tokens")
        if output_tokens is None:
            output_tokens = float(record.delivered_tokens)
        if record.first_delivery_s is None and record.first_token_s is not None:
            # The end was logged before the only delivery, or nobody reports deliveries.
            self._first_delivered(record, record.first_token_s)
        _observe(families.request_s, record.submitted_s, event.at_s)
        if record.prompt_tokens is not None:
            families.request_prompt_tokens.observe(record.prompt_tokens)
        families.request_generation_tokens.observe(output_tokens)
        if record.first_delivery_s is None:
            return
        _observe(families.decode_s, record.first_delivery_s, event.at_s)
        choices = record.choices or _number(event, "choices") or 1.0
        gaps = output_tokens / choices - 1.0  # per choice, on average
        if gaps > 0.0:
            decode_s = max(0.0, event.at_s - record.first_delivery_s)
            families.output_token_s.observe(decode_s / gaps)

    def _judged(self, event: LifeEvent) -> None:
        """How good the router's prediction was, if it made one."""
        families = self._requests
        for name, histogram in (("ttft", families.ttft_ratio), ("tpot", families.tpot_ratio)):
            measured, predicted = (
                _number(event, f"{name}_ms"),
                _number(event, f"predicted_{name}_ms"),
            )
            if measured is not None and predicted:
                histogram.observe(measured / predicted)
        regret_ms = dict(event.detail).get("regret_ms")
        if isinstance(regret_ms, int | float):
            families.regret_s.observe(max(0.0, regret_ms / 1e3))


def _number(event: LifeEvent, key: str) -> float | None:
    """A count from the event's detail; None if it is missing or none."""
    value = dict(event.detail).get(key)
    if isinstance(value, str | bool) or value is None or not math.isfinite(value) or value < 0:
        return None
    return float(value)


def _text(event: LifeEvent, key: str) -> str:
    """A label value from the event's detail."""
    return str(dict(event.detail).get(key, "unknown"))


def _observe(histogram: Histogram, start_s: float | None, end_s: float | None) -> None:
    """Observe an interval if both ends are known; clocks that disagree make it 0, not negative."""
    if start_s is not None and end_s is not None:
        histogram.observe(max(0.0, end_s - start_s))
