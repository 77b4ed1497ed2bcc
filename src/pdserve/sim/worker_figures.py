"""What the workers did: steps, busy time, transfers, moves between pools, energy and cost.

A worker draws its idle power whenever it computes nothing (a dead one too: the machine stays on),
its prompt power in a step that computes prompts, its decode power in one that only decodes. The
price is that of all workers for the whole of the run, busy or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel, StepRange
from pdserve.sim.distribution import Distribution
from pdserve.sim.observe import Observer

MAX_LISTED = 1000
"""Of role changes and of losses, the first so many are listed; all are counted."""


class Kind(IntEnum):
    """What a step does."""

    PREFILL = 0
    MIXED = 1
    DECODE = 2

    @classmethod
    def of(cls, shape: StepShape) -> Kind:
        if not shape.prompt_tokens:
            return cls.DECODE
        return cls.MIXED if shape.num_decoding else cls.PREFILL


@dataclass(slots=True)
class Work:
    """Of one worker. Lists are by `Kind`; ``outside``: steps that are larger than any that was
    measured of its machine."""

    machine: MachineModel
    steps: list[int] = field(default_factory=lambda: [0, 0, 0])
    busy_s: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    outside: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    lost: int = 0

    def energy_j(self, duration_s: float) -> dict[str, float]:
        """Joules by what they were for; their sum is all."""
        power = self.machine.power
        prompt_s = self.busy_s[Kind.PREFILL] + self.busy_s[Kind.MIXED]
        decode_s = self.busy_s[Kind.DECODE]
        return {
            "idle": power.idle_w * max(0.0, duration_s - prompt_s - decode_s),
            "prompt": power.prompt_w * prompt_s,
            "decode": power.decode_w * decode_s,
        }

    def document(self, duration_s: float) -> dict[str, Any]:
        busy_s = sum(self.busy_s)
        return {
            "machine": self.machine.name,
            "steps": {kind.name.lower(): self.steps[kind] for kind in Kind},
            "busy_s": {kind.name.lower(): self.busy_s[kind] for kind in Kind},
            "utilisation": min(1.0, busy_s / duration_s) if duration_s else 0.0,
            "prompt_tokens": self.prompt_tokens,
            "decoded_tokens": self.decoded_tokens,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "energy_j": sum(self.energy_j(duration_s).values()),
            "lost": self.lost,
        }


class WorkerFigures(Observer):
    """``machines``: what each worker is."""

    def __init__(self, machines: Mapping[WorkerId, MachineModel]) -> None:
        self.work = {worker: Work(machine) for worker, machine in machines.items()}
        self.num_transfers = 0
        self.transfer_bytes = 0
        self.transfer_s = Distribution()
        self.num_role_changes = 0
        self.role_changes: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []

    # --- heard --------------------------------------------------------------------------------

    def steps(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        work = self.work[worker]
        kind = Kind.of(shape)
        work.steps[kind] += count
        work.busy_s[kind] += ended_s - begun_s
        work.prompt_tokens += shape.prompt_tokens
        work.decoded_tokens += shape.num_decoding * count
        measured = work.machine.measured
        if measured is not None and not measured.holds(shape):
            work.outside += num_outside(measured, shape, count)

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None:
        self.num_transfers += 1
        self.transfer_bytes += num_bytes
        self.transfer_s.add(ended_s - begun_s)
        self.work[sender].sent_bytes += num_bytes
        self.work[receiver].received_bytes += num_bytes

    def role_changed(self, at_s: float, worker: WorkerId, role: Role) -> None:
        self.num_role_changes += 1
        if len(self.role_changes) < MAX_LISTED:
            self.role_changes.append({"at_s": at_s, "worker": worker, "role": role.value})

    def worker_lost(self, at_s: float, worker: WorkerId) -> None:
        self.work[worker].lost += 1
        if len(self.losses) < MAX_LISTED:
            self.losses.append({"at_s": at_s, "worker": worker})

    # --- told ---------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return sum(sum(work.steps) for work in self.work.values())

    @property
    def price_per_hour(self) -> float:
        return sum(work.machine.price_per_hour for work in self.work.values())

    def energy_j(self, duration_s: float) -> dict[str, float]:
        """Of all workers, by what it was for."""
        parts = [work.energy_j(duration_s) for work in self.work.values()]
        return {name: sum(part[name] for part in parts) for name in ("idle", "prompt", "decode")}

    def outside_share(self) -> float | None:
        """Of all steps, those larger than what was measured; None if no machine was measured."""
        if all(work.machine.measured is None for work in self.work.values()):
            return None
        outside = sum(work.outside for work in self.work.values())
        return outside / self.num_steps if self.num_steps else 0.0

    def document(self, duration_s: float, output_tokens: int) -> dict[str, Any]:
        energy_j = self.energy_j(duration_s)
        total_j = sum(energy_j.values())
        cost = self.price_per_hour * duration_s / 3600
        works = self.work.values()
        busy_s = sum(sum(work.busy_s) for work in works)
        return {
            "steps": {
                "all": self.num_steps,
                **{k.name.lower(): sum(work.steps[k] for work in works) for k in Kind},
                "outside_measured_share": self.outside_share(),
            },
            "utilisation": min(1.0, busy_s / (duration_s * len(works))) if duration_s else 0.0,
            "transfers": {
                "num": self.num_transfers,
                "bytes": self.transfer_bytes,
                "time_s": self.transfer_s.figures(),
            },
            "energy": {
                "total_j": total_j,
                **{f"{name}_j": joules for name, joules in energy_j.items()},
                "mean_w": total_j / duration_s if duration_s else 0.0,
                "j_per_1k_output_tokens": _per_1k(total_j, output_tokens),
            },
            "cost": {
                "price_per_hour": self.price_per_hour,
                "total": cost,
                "per_1k_output_tokens": _per_1k(cost, output_tokens),
            },
            "role_changes": {"num": self.num_role_changes, "first": self.role_changes},
            "workers_lost": {"num": sum(work.lost for work in works), "first": self.losses},
            "workers": {
                worker: work.document(duration_s) for worker, work in sorted(self.work.items())
            },
        }


def num_outside(measured: StepRange, shape: StepShape, count: int) -> int:
    """Of so many steps, of which ``shape`` is the last and largest: each one before has one token
    of context less for each of its sequences."""
    if count == 1 or shape.num_decoding > measured.num_decoding:
        return count
    beyond = shape.context_tokens - measured.context_tokens
    return min(count, -(-beyond // shape.num_decoding))


def _per_1k(amount: float, tokens: int) -> float | None:
    """None: there is no such figure without tokens."""
    return amount / tokens * 1000 if tokens else None
