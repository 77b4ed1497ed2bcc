"""Whether a crowded decode worker should hand a running request to another one.

A decode worker whose blocks run out gives its youngest request back to the router, which has all of
it recomputed. Moving its KV before that costs a transfer, during which the request pauses. So a
worker is *crowded* when what its sequences will still write does not fit and the room that is left
lasts for fewer than ``horizon_tokens`` steps; and a request moves if there is a worker that stays
uncrowded with it, and if the pause and what the others there lose by it is less than the recompute
that it avoids (Llumnix, OSDI 2024, moves requests for the same reason, and also live).

The request to move is the one with the best bargain, the younger one of equals: it would be
preempted first.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.request import Role
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class Movable:
    """A sequence that decodes on the crowded worker: its length, and what it may still write."""

    attempt: AttemptId
    context_tokens: int
    tokens_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """``pause_s``: how long the request waits for the transfer. ``saves_s``: the recompute that it
    avoids, less what the sequences of both workers lose or gain by it."""

    attempt: AttemptId
    to: WorkerId
    pause_s: float
    saves_s: float
    reason: str


class Room(Protocol):
    """A worker's view, or whatever one is made of."""

    @property
    def free_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...


class RebalancePolicy(Protocol):
    def may_be_crowded(self, worker: Room, num_sequences: int) -> bool:
        """False if nothing would be proposed for this worker with so many sequences at most: then
        nobody looks at them. Asked after every report."""
        ...

    def propose(
        self, view: ClusterView, crowded: WorkerView, movable: tuple[Movable, ...]
    ) -> Move | None:
        """A move that pays, or None. ``movable`` is in order of age, oldest first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveWhenCheaper:
    """``max_targets``: so many of the workers with the most free blocks are thought about.
    ``margin``: by how much a move must be cheaper than the recompute, as a share of that."""

    horizon_tokens: int = 64
    max_targets: int = 4
    margin: float = 0.1

    def propose(
        self, view: ClusterView, crowded: WorkerView, movable: tuple[Movable, ...]
    ) -> Move | None:
        if crowded.steps is None or len(movable) < 2 or not self.is_crowded(crowded, movable):
            return None
        found: list[tuple[float, int, int, Move]] = []
        for place, target in enumerate(self._targets(view, crowded)):
            for age, each in enumerate(movable):
                move = self._weigh(view, crowded, target, each)
                if move is not None:
                    found.append((-move.saves_s, -age, place, move))
        return min(found)[-1] if found else None

    def may_be_crowded(self, worker: Room, num_sequences: int) -> bool:
        return worker.free_blocks * worker.block_size < self.horizon_tokens * num_sequences

    def is_crowded(self, worker: WorkerView, movable: tuple[Movable, ...]) -> bool:
        """Its sequences want more blocks than are left, and will soon."""
        wanted_blocks = sum(ceil(each.tokens_left / worker.block_size) for each in movable)
        is_soon = self.may_be_crowded(worker, len(movable))
        return wanted_blocks > worker.free_blocks and is_soon

    def _targets(self, view: ClusterView, crowded: WorkerView) -> list[WorkerView]:
        able = [
            worker
            for worker in view.workers
            if worker.worker != crowded.worker
            and worker.role in (Role.DECODE, Role.MIXED)
            and worker.numerics == crowded.numerics
            and worker.block_size == crowded.block_size
            and worker.steps is not None
        ]
        able.sort(key=lambda worker: (-worker.free_blocks, worker.worker))  # most room first
        return able[: self.max_targets]

    def _weigh(
        self, view: ClusterView, crowded: WorkerView, target: WorkerView, each: Movable
    ) -> Move | None:
        here, there = crowded.steps, target.steps
        assert here is not None
        assert there is not None
        needed = ceil((each.context_tokens + each.tokens_left) / target.block_size) + 1
        spare_blocks = target.free_blocks - needed
        if spare_blocks * target.block_size < self.horizon_tokens * (target.num_decoding + 1):
            return None
        link = view.links.get((crowded.worker, target.worker), view.link)
        pause_s = link.exposed_s(each.context_tokens * view.token_bytes)
        recompute_s = here.prefill_s(each.context_tokens)
        harm_s = _weight_of(there, each, target.num_decoding)
        relief_s = _weight_of(here, each, crowded.num_decoding - 1)
        saves_s = recompute_s - pause_s - harm_s + relief_s
        if saves_s < self.margin * recompute_s:
            return None
        reason = (
            f"{crowded.worker} has {crowded.free_blocks} free blocks for {crowded.num_decoding} "
            f"sequences; a transfer of {pause_s * 1e3:.0f} ms saves a recompute of "
            f"{recompute_s * 1e3:.0f} ms"
        )
        return Move(
            attempt=each.attempt, to=target.worker, pause_s=pause_s, saves_s=saves_s, reason=reason
        )


def _weight_of(steps: StepModel, each: Movable, num_others: int) -> float:
    """Seconds that the sequence costs the others in its batch, for as long as it goes on."""
    each_step_s = steps.per_sequence_s + steps.per_context_token_s * each.context_tokens
    return each_step_s * each.tokens_left * max(0, num_others)
