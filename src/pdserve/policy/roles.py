"""How many workers of each role the load wants.

The controller looks at what each phase needs, in workers: prefill work that arrives per second of
time, and the decode workers that hold the running sequences at the pace that was promised. It
wants the split of the pool under which the busier phase is as little busy as can be, and moves one
worker at a time toward it, if that is worth it (hysteresis), if it has wanted so for a while
(confirmation), and if neither the pool nor the worker was changed just now (dwell). Splitwise
re-purposes machines the same way, by hand and rarely (sec. IV-A); a role change here costs nothing,
so that seconds are enough.

Mixed workers are the operator's wish and stay as they are; what they do is both phases' relief.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.policy.cluster import WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLoad:
    """What each phase needs, over the last seconds.

    ``prefill_workers``: seconds of prefill that arrive per second, backlog included.
    ``decode_workers``: workers that the decoding sequences fill at the promised pace.
    ``queue_s``: how long a prompt waits now. The attainments are shares (1.0: nobody was
    disappointed, also if nobody was served).
    """

    prefill_workers: float
    decode_workers: float
    queue_s: float = 0.0
    ttft_attainment: float = 1.0
    tpot_attainment: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesView:
    """``changed_s``: when each worker last changed its role, if ever; ``target_prefill``: what the
    controller wanted last time, and since when."""

    now: float
    workers: tuple[WorkerView, ...]
    load: PhaseLoad
    changed_s: Mapping[WorkerId, float]
    target_prefill: int | None = None
    target_since_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleProposal:
    """``move``: at most one change; ``reason`` says why, or why not. ``target_prefill``: how many
    prefill workers the load wants, or None if there is nothing to divide."""

    target_prefill: int | None
    reason: str
    move: tuple[WorkerId, Role] | None = None


class RolePolicy(Protocol):
    def propose(self, view: RolesView) -> RoleProposal:
        """One change, or the reason to hold."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancedRoles:
    """``min_gain``: by how much the busier phase must be relieved, as a share of its load.
    ``confirm_s``: how long the same wish must last. ``dwell_s``: time between two changes of a
    worker; ``pause_s``: between any two. Below ``idle_load`` of every pool nothing is moved."""

    min_gain: float = 0.15
    confirm_s: float = 1.0
    dwell_s: float = 5.0
    pause_s: float = 1.0
    idle_load: float = 0.5

    def propose(self, view: RolesView) -> RoleProposal:
        movable = [w for w in view.workers if w.role is not Role.MIXED and w.mixes]
        if len(movable) < 2:
            return RoleProposal(
                target_prefill=None, reason="hold: fewer than two workers to divide"
            )
        num_prefill = sum(w.role is Role.PREFILL for w in movable)
        now_load = busiest(view.load, num_prefill, len(movable))
        target = best_split(view.load, len(movable))
        target_load = busiest(view.load, target, len(movable))
        wish = (
            f"{target} of {len(movable)} to prefill (load {target_load:.2f}) against {num_prefill} "
            f"({now_load:.2f}): prefill wants {view.load.prefill_workers:.2f} workers, decode "
            f"{view.load.decode_workers:.2f}"
        )
        hold = self._why_hold(view, target, num_prefill, now_load, target_load)
        if hold is not None:
            return RoleProposal(target_prefill=target, reason=f"hold ({hold}): {wish}")
        role = Role.PREFILL if target > num_prefill else Role.DECODE
        rested = [
            w
            for w in movable
            if w.role is not role and view.now - view.changed_s.get(w.worker, -inf) >= self.dwell_s
        ]
        if not rested:
            return RoleProposal(
                target_prefill=target, reason=f"hold (all changed just now): {wish}"
            )
        mover = min(rested, key=lambda w: (w.home_role is not role, _work_left(w), w.worker))
        return RoleProposal(
            target_prefill=target,
            reason=f"{mover.worker} to {role}: {wish}",
            move=(mover.worker, role),
        )

    def _why_hold(
        self, view: RolesView, target: int, num_prefill: int, now_load: float, target_load: float
    ) -> str | None:
        if target == num_prefill:
            return "as it should be"
        if now_load < self.idle_load:
            return "nobody is busy"
        if now_load - target_load < self.min_gain * now_load:
            return "too little to gain"
        if target_sign(view.target_prefill, num_prefill) != target_sign(target, num_prefill):
            return "wanted for the first time"
        if view.now - view.target_since_s < self.confirm_s:
            return f"wanted for {view.now - view.target_since_s:.1f} s"
        last_s = max(view.changed_s.values(), default=-inf)
        if view.now - last_s < self.pause_s:
            return f"the last change was {view.now - last_s:.1f} s ago"
        return None


def busiest(load: PhaseLoad, num_prefill: int, num_workers: int) -> float:
    """Load of the busier pool: workers wanted for each that is there; infinite without any."""
    pools = (
        (load.prefill_workers, num_prefill),
        (load.decode_workers, num_workers - num_prefill),
    )
    return max(wanted / there if there else inf for wanted, there in pools)


def best_split(load: PhaseLoad, num_workers: int) -> int:
    """Prefill workers under which the busier pool is least busy; at least one of each role."""
    return min(range(1, num_workers), key=lambda n: (busiest(load, n, num_workers), n))


def target_sign(target: int | None, num_prefill: int) -> int:
    """-1, 0 or 1: fewer, as many or more prefill workers are wanted than there are."""
    return 0 if target is None else (target > num_prefill) - (target < num_prefill)


def _work_left(worker: WorkerView) -> int:
    """What it still has to do in the role that it leaves."""
    return worker.pending_tokens + worker.context_tokens
