"""Everything that a run says of itself, as one document.

``Report.observers`` watch the run; then `Report.document` has all figures, in seconds, tokens,
bytes, joules and the price list's money, each named with its unit. For one seed the document is the
same byte by byte, except for ``wall_s`` and ``speedup``. docs/simulator.md lists the keys.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from math import inf
from typing import Any

from pdserve import __version__
from pdserve.core.effects import Refusal
from pdserve.cost.machine import MachineModel
from pdserve.policy.registry import default_batching
from pdserve.sim.observe import Observer
from pdserve.sim.request_figures import RequestFigures
from pdserve.sim.settings import SimSettings
from pdserve.sim.timelines import Activity, Pools
from pdserve.sim.worker_figures import WorkerFigures
from pdserve.workload.slo import Slo

CLOCK_KEYS = ("wall_s", "speedup")
"""Of the document: what is not the same in every run with this seed."""

MANY_OUTSIDE = 0.001
"""A larger share of steps outside of what was measured is warned of."""


class _End(Observer):
    """When the run was over."""

    at_s = 0.0

    def done(self, at_s: float) -> None:
        self.at_s = at_s


class Report:
    """The usual observers, and what they know when the run is done."""

    def __init__(self, settings: SimSettings, slo: Slo | None = None) -> None:
        self.settings = settings
        slots = settings.cluster.slots()
        self.requests = RequestFigures(slo)
        self.workers = WorkerFigures({w: settings.machine(group) for w, group in slots})
        self.pools = Pools()
        self.activity = Activity(worker for worker, _ in slots)
        self._end = _End()

    @property
    def observers(self) -> list[Observer]:
        return [self.requests, self.workers, self.pools, self.activity, self._end]

    @property
    def duration_s(self) -> float:
        """From the start until the last request ended."""
        return self._end.at_s

    def document(self, wall_s: float, load: dict[str, Any] | None = None) -> dict[str, Any]:
        """``load``: what the requests were made of, as plain data."""
        settings, duration_s = self.settings, self.duration_s
        requests = self.requests.document(duration_s)
        workers = self.workers.document(duration_s, requests["tokens"]["output"])
        power_w = self.activity.power_w(self.workers.work)
        return {
            "version": __version__,
            "cluster": str(settings.cluster),
            "model": settings.machines[0].model,
            "policy": settings.policy,
            "batching": settings.batching or default_batching(settings.policy),
            "seed": settings.seed,
            "duration_s": duration_s,
            "last_arrival_s": self.requests.last_arrival_s,
            "wall_s": wall_s,
            "speedup": duration_s / wall_s if wall_s else 0.0,
            **requests,
            **workers,
            "machines": [
                {"group": str(group), **_machine(machine)}
                for group, machine in zip(settings.cluster.groups, settings.machines, strict=True)
            ],
            "settings": _settings(settings),
            "load": load or {},
            "timeline": self.pools.document()
            | {
                "power_stretch_s": self.activity.stretch_s,
                "power_w": [round(watts, 3) for watts in power_w],
            },
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What a reader of the figures has to know."""
        found = []
        share = self.workers.outside_share()
        if share is None:
            found.append(
                "nothing was measured: step times are worked out from data sheets; calibrate on "
                "the hardware (pdserve calibrate) before money depends on them"
            )
        elif share > MANY_OUTSIDE:
            found.append(
                f"{share:.1%} of the steps were larger than any that was measured: their times "
                "are extrapolated"
            )
        found += self._errors()
        found += self._refusals()
        if self._falls_behind():
            found.append(
                "the cluster did not keep up: requests wait longer the later they came, so "
                "latencies depend on how long the load lasts"
            )
        return found

    def _errors(self) -> list[str]:
        """Groups that share a profile say it once."""
        said = [
            f"step times of {machine.name} are known to {machine.error:.1%} (mean relative error)"
            for machine in self.settings.machines
            if machine.error is not None
        ]
        return list(dict.fromkeys(said))

    def _refusals(self) -> list[str]:
        """What can be done about them."""
        settings, failures = self.settings, self.requests.overall().failures
        found = []
        if failures[Refusal.TOO_LONG]:
            longest = min(machine.max_model_tokens for machine in settings.machines)
            found.append(
                f"refused as too long: {failures[Refusal.TOO_LONG]}; the model and the KV pool of "
                f"a worker take {longest} tokens of prompt and answer: --max-input N leaves longer "
                "prompts out"
            )
        if failures[Refusal.OVERLOADED]:
            found.append(
                f"refused as overloaded: {failures[Refusal.OVERLOADED]}; nobody began them within "
                f"{settings.queue_timeout_s:g} s (--queue-timeout), more than "
                f"{settings.max_queued_requests} waited (--max-queued-requests), or admission "
                f"{settings.admission} turned them away"
            )
        return found

    def _falls_behind(self) -> bool:
        """Whether in the last quarter of the arrivals more requests waited than in the second
        one, and more than a few at each worker."""
        last_s = self.requests.last_arrival_s
        waiting = list(zip(self.pools.times_s, self.pools.waiting(), strict=True))
        second = [num for at_s, num in waiting if last_s / 4 <= at_s < last_s / 2]
        fourth = [num for at_s, num in waiting if last_s * 3 / 4 <= at_s < last_s]
        if not second or not fourth:
            return False
        later = sum(fourth) / len(fourth)
        few = FEW_WAITING * self.settings.cluster.num_workers
        return later > few and later > 1.5 * sum(second) / len(second)


FEW_WAITING = 2


def _machine(machine: MachineModel) -> dict[str, Any]:
    measured, power = machine.measured, machine.power
    return {
        "name": machine.name,
        "model": machine.model,
        "num_devices": machine.num_devices,
        "num_layers": machine.num_layers,
        "token_kv_bytes": machine.token_kv_bytes,
        "block_size": machine.block_size,
        "num_blocks": machine.num_blocks,
        "max_model_tokens": machine.max_model_tokens,
        "link_bytes_per_s": machine.link.bytes_per_s,
        "power_w": {
            "idle": power.idle_w,
            "prompt": power.prompt_w,
            "decode": power.decode_w,
        },
        "price_per_hour": machine.price_per_hour,
        "measured": None
        if measured is None
        else {
            "prompt_tokens": measured.prompt_tokens,
            "num_decoding": measured.num_decoding,
            "context_tokens": measured.context_tokens,
        },
        "error": machine.error,
        "source": machine.source,
    }


def _settings(settings: SimSettings) -> dict[str, Any]:
    """All that a text or a number says and the document does not say elsewhere, and the times."""
    said = {field.name: getattr(settings, field.name) for field in fields(settings)}
    plain: dict[str, Any] = {
        name: None if value == inf else value  # JSON has no infinity
        for name, value in said.items()
        if isinstance(value, str | int | float) and name not in ("policy", "batching", "seed")
    }
    plain["declared_tokens"] = settings.declared_tokens
    return plain | {"times": asdict(settings.times)}
