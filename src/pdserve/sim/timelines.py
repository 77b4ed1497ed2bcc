"""What happened when, in memory that does not grow: the pools over time, and each worker's work.

Time is cut into stretches of equal length. When there are more than `MAX_STRETCHES`, neighbours are
put together and each is twice as long; so a run of any length is shown in 256 to 512 of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from operator import add
from typing import Any

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.sim.observe import Observer, WorkerLoad
from pdserve.sim.worker_figures import Kind, Work

MAX_STRETCHES = 512
FIRST_STRETCH_S = 1 / 1024

POOL_FIGURES = ("workers", "waiting", "decoding", "pending_prefill_tokens", "used_blocks", "blocks")


class Pools(Observer):
    """Averages over each stretch of what the samples in it showed, by pool (`POOL_FIGURES`)."""

    def __init__(self) -> None:
        self.sums: dict[Role, list[array[float]]] = {}
        self.num_samples: array[int] = array("q")
        self.queued_sums: array[float] = array("d")
        self.times_s: array[float] = array("d")
        self.most_waiting = 0
        self.most_used_share = 0.0
        self._together = 1

    def sampled(self, at_s: float, loads: dict[WorkerId, WorkerLoad], num_queued: int) -> None:
        if not self.num_samples or self.num_samples[-1] >= self._together:
            if len(self.num_samples) == MAX_STRETCHES:
                self._halve()
            self._begin(at_s)
        self.num_samples[-1] += 1
        waiting = num_queued
        self.queued_sums[-1] += num_queued
        most_used = self.most_used_share
        figures: dict[Role, tuple[int, ...]] = {}
        for load in loads.values():
            waiting += load.num_waiting
            if load.num_blocks and load.used_blocks > most_used * load.num_blocks:
                most_used = load.used_blocks / load.num_blocks
            mine, role = _figures(load), load.role
            figures[role] = tuple(map(add, figures[role], mine)) if role in figures else mine
        self.most_used_share = most_used
        for role, totals in figures.items():
            for sums, figure in zip(self._pool(role), totals, strict=True):
                sums[-1] += figure
        self.most_waiting = max(self.most_waiting, waiting)

    def series(self, role: Role, name: str) -> list[float]:
        """The average of the figure in each stretch."""
        sums = self._pool(role)[POOL_FIGURES.index(name)]
        return [total / num for total, num in zip(sums, self.num_samples, strict=True)]

    def queued(self) -> list[float]:
        """Requests that wait in the router."""
        pairs = zip(self.queued_sums, self.num_samples, strict=True)
        return [total / num for total, num in pairs]

    def waiting(self) -> list[float]:
        """Requests that wait, in the router or at any worker."""
        each = [self.queued(), *(self.series(role, "waiting") for role in self.sums)]
        return [sum(values) for values in zip(*each, strict=True)]

    def used_share(self, role: Role) -> list[float]:
        """Of a pool's blocks, the share in use."""
        used, blocks = self.series(role, "used_blocks"), self.series(role, "blocks")
        return [part / whole if whole else 0.0 for part, whole in zip(used, blocks, strict=True)]

    def document(self) -> dict[str, Any]:
        """Rounded: these are to be looked at."""
        pools: dict[str, Any] = {}
        for role in sorted(self.sums):
            pools[role.value] = {
                name: _rounded(self.series(role, name))
                for name in POOL_FIGURES
                if name not in ("used_blocks", "blocks")
            } | {"used_block_share": _rounded(self.used_share(role))}
        return {
            "most_waiting": self.most_waiting,
            "most_used_block_share": self.most_used_share,
            "at_s": _rounded(self.times_s),
            "queued_in_router": _rounded(self.queued()),
            "pools": pools,
        }

    def _begin(self, at_s: float) -> None:
        self.times_s.append(at_s)
        self.num_samples.append(0)
        self.queued_sums.append(0.0)
        for pool in self.sums.values():
            for sums in pool:
                sums.append(0.0)

    def _pool(self, role: Role) -> list[array[float]]:
        if role not in self.sums:
            zeros = [0.0] * len(self.num_samples)
            self.sums[role] = [array("d", zeros) for _ in POOL_FIGURES]
        return self.sums[role]

    def _halve(self) -> None:
        self._together *= 2
        self.times_s = self.times_s[::2]
        self.num_samples = array("q", _paired(self.num_samples))
        self.queued_sums = array("d", _paired(self.queued_sums))
        for pool in self.sums.values():
            pool[:] = [array("d", _paired(sums)) for sums in pool]


class Activity(Observer):
    """Of each worker the seconds of each stretch that it spent with each `Kind` of step."""

    def __init__(self, workers: Iterable[WorkerId]) -> None:
        self.stretch_s = FIRST_STRETCH_S
        self.num_stretches = 0
        self.busy_s = {
            worker: [array("d", bytes(8 * MAX_STRETCHES)) for _ in Kind] for worker in workers
        }

    def steps(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        while ended_s >= MAX_STRETCHES * self.stretch_s:
            self._halve()
        busy_s = self.busy_s[worker][Kind.of(shape)]
        stretch_s = self.stretch_s
        first, last = int(begun_s / stretch_s), int(ended_s / stretch_s)
        self.num_stretches = max(self.num_stretches, last + 1)
        if first == last:
            busy_s[first] += ended_s - begun_s
            return
        busy_s[first] += (first + 1) * stretch_s - begun_s
        for index in range(first + 1, last):
            busy_s[index] += stretch_s
        busy_s[last] += ended_s - last * stretch_s

    def shares(self, worker: WorkerId) -> list[list[float]]:
        """By kind, of each stretch the share that was spent with it."""
        num, stretch_s = self.num_stretches, self.stretch_s
        return [[seconds / stretch_s for seconds in of[:num]] for of in self.busy_s[worker]]

    def power_w(self, work: Mapping[WorkerId, Work]) -> list[float]:
        """Mean power of all workers in each stretch, as `Work.energy_j` counts."""
        num = self.num_stretches
        total = [0.0] * num
        for worker, of in work.items():
            power = of.machine.power
            prefill, mixed, decode = self.shares(worker)
            for index in range(num):
                prompt, only = prefill[index] + mixed[index], decode[index]
                idle = max(0.0, 1.0 - prompt - only)
                total[index] += (
                    power.idle_w * idle + power.prompt_w * prompt + power.decode_w * only
                )
        return total

    def _halve(self) -> None:
        self.stretch_s *= 2
        self.num_stretches = -(-self.num_stretches // 2)
        rest = bytes(8 * (MAX_STRETCHES // 2))
        for kinds in self.busy_s.values():
            for kind in Kind:
                kinds[kind] = array("d", _paired(kinds[kind]))
                kinds[kind].frombytes(rest)


def _figures(load: WorkerLoad) -> tuple[int, ...]:
    return (
        1,
        load.num_waiting,
        load.num_decoding,
        load.pending_prefill_tokens,
        load.used_blocks,
        load.num_blocks,
    )


def _paired(values: array[float] | array[int]) -> Iterable[Any]:
    """Sums of neighbours; there is an even number of them."""
    return (one + other for one, other in zip(values[::2], values[1::2], strict=True))


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 6) for value in values]
