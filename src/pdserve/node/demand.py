"""What the load of the last seconds wants from each phase: the role controller's eyes.

The router says when it sends a request somewhere, when a first token comes and when an answer ends;
from that and from what the workers hold now `Demand.load` makes the figures that a `RolePolicy`
decides by. Everything older than ``WINDOW_S`` is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from pdserve.core.request import ServiceClass
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import WorkerView
from pdserve.policy.roles import PhaseLoad

WINDOW_S = 5.0
BACKLOG_S = 2.0
"""A backlog is to be worked off within this time, or within the promised TTFT if that is less."""
PACE = 2.0
"""Without a promised TPOT a batch may grow until a step takes this many times one of a single
sequence: about what Splitwise saw at the batch of best throughput (sec. III)."""
TPOT_MARGIN = 0.9
"""Share of the promised TPOT that a full batch may take: prompts and jitter want the rest."""


class _Window:
    """The sum of what was added in the last ``WINDOW_S``."""

    def __init__(self) -> None:
        self._added: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, now: float, value: float) -> None:
        self._added.append((now, value))
        self._sum += value
        self._forget(now)

    def sum(self, now: float) -> float:
        self._forget(now)
        return self._sum

    def _forget(self, now: float) -> None:
        while self._added and self._added[0][0] <= now - WINDOW_S:
            self._sum -= self._added.popleft()[1]
        if not self._added:
            self._sum = 0.0  # what rounding has left


class Demand:
    """Owned by the router; times are its own. ``is_kept`` False: nobody will ask for the load, and
    nothing is remembered for it."""

    def __init__(self, *, is_kept: bool = True) -> None:
        self.is_kept = is_kept
        self._started_s: float | None = None
        self._prefill_s = _Window()
        self._ttft = (_Window(), _Window())
        self._tpot = (_Window(), _Window())
        self._bounds: deque[tuple[float, float, float]] = deque()

    def routed(self, now: float, prefill_s: float, service: ServiceClass) -> None:
        """A request was sent to be prefilled, which should take so long."""
        if not self.is_kept:
            return
        if self._started_s is None:
            self._started_s = now
        self._prefill_s.add(now, prefill_s)
        self._bounds.append((now, service.ttft_s, service.tpot_s))
        self._forget_bounds(now)

    def first_token(self, now: float, ttft_s: float, service: ServiceClass) -> None:
        if self.is_kept:
            self._judge(self._ttft, now, ttft_s <= service.ttft_s)

    def finished(self, now: float, tpot_s: float, service: ServiceClass) -> None:
        if self.is_kept:
            self._judge(self._tpot, now, tpot_s <= service.tpot_s)

    def load(self, now: float, workers: Sequence[WorkerView]) -> PhaseLoad:
        """Of these workers, together; their step models say what work is."""
        models = [worker.steps for worker in workers if worker.steps is not None]
        if not models or self._started_s is None:
            return PhaseLoad(prefill_workers=0.0, decode_workers=0.0)
        ttft_s, tpot_s = self._tightest(now)
        backlogs = [_backlog_s(worker) for worker in workers]
        window_s = min(WINDOW_S, max(1.0, now - self._started_s))
        arriving = self._prefill_s.sum(now) / window_s
        return PhaseLoad(
            prefill_workers=arriving + sum(backlogs) / min(BACKLOG_S, ttft_s),
            decode_workers=sum(_decode_share(worker, tpot_s) for worker in workers),
            queue_s=max(backlogs),
            ttft_attainment=_share(self._ttft, now),
            tpot_attainment=_share(self._tpot, now),
        )

    def _judge(self, windows: tuple[_Window, _Window], now: float, met: bool) -> None:
        windows[0].add(now, float(met))
        windows[1].add(now, 1.0)

    def _forget_bounds(self, now: float) -> None:
        while self._bounds and self._bounds[0][0] <= now - WINDOW_S:
            self._bounds.popleft()

    def _tightest(self, now: float) -> tuple[float, float]:
        """The tightest bounds that were promised in the window."""
        self._forget_bounds(now)
        ttft_s = min((ttft_s for _, ttft_s, _ in self._bounds), default=inf)
        return ttft_s, min((tpot_s for _, _, tpot_s in self._bounds), default=inf)


def _share(windows: tuple[_Window, _Window], now: float) -> float:
    met, judged = windows[0].sum(now), windows[1].sum(now)
    return met / judged if judged else 1.0


def _backlog_s(worker: WorkerView) -> float:
    """How long the worker needs for the prompts that wait for it."""
    if worker.steps is None or not worker.pending_tokens:
        return 0.0
    return worker.steps.per_prompt_token_s * worker.pending_tokens + worker.steps.prompt_base_s


def _decode_share(worker: WorkerView, tpot_s: float) -> float:
    """Which part of the worker its decoding sequences fill, at the pace and by their memory."""
    if worker.steps is None or not worker.num_decoding:
        return 0.0
    mean_context = worker.context_tokens / worker.num_decoding
    capacity = _sequences_at_pace(worker.steps, mean_context, tpot_s)
    by_memory = 0.0
    if worker.total_blocks and mean_context:
        by_memory = worker.context_tokens / (worker.total_blocks * worker.block_size)
    return max(worker.num_decoding / capacity, by_memory)


def _sequences_at_pace(steps: StepModel, mean_context: float, tpot_s: float) -> float:
    """Sequences that one worker can decode together within the pace; one at least."""
    each_s = steps.per_sequence_s + steps.per_context_token_s * mean_context
    allowed_s = PACE * (steps.decode_base_s + each_s) if tpot_s == inf else TPOT_MARGIN * tpot_s
    return max(1.0, (allowed_s - steps.decode_base_s) / each_s) if each_s > 0 else inf
