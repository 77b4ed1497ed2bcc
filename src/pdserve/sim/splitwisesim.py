"""SplitwiseSim's rules on our machines: ``--profile splitwisesim``.

`imitate` turns the settings of a simulation into those under which the routers and workers do what
SplitwiseSim (Mutinifni/splitwise-sim, 8f99e7d) does; `SplitwiseSimFigures` measures what it
measures. Each of its simplifications can be taken back alone (`Departures`): docs/splitwisesim.md
shows what that does.

Its rules, where they differ from the paper's: decisions and messages take no time; the router's own
books are exact; routes (``policy.splitwisesim``) and batches (``policy.splitwisesim_batching``)
know how long an answer will be; a step of decodes costs what the table has for as many tokens of
context as there are sequences; KV has as many heads as queries; it leaves when the prefill is done,
each flow at the link's whole rate, and asks for room once a second; a worker that was drawn into
the mixed pool stays until it has run empty.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.step import StepShape
from pdserve.cost.machine import ClusterTimes
from pdserve.cost.table import PerfTable, SplitwiseSimTimer
from pdserve.cost.table_machine import DEVICES, HARDWARE, MODELS, machine_of_table
from pdserve.node.settings import ReturnRule
from pdserve.policy.splitwisesim import SplitwiseSim
from pdserve.policy.splitwisesim_batching import SplitwiseSimBatching
from pdserve.sim.machines import Machines
from pdserve.sim.observe import Ended, Observer, WorkerLoad
from pdserve.sim.settings import SimSettings
from pdserve.workload.summary import percentile

NAME = "splitwisesim"
STUCK_S = 1000.0
PERCENTS = (50, 90, 99)
SLOS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
"""Largest slowdowns at P50, P90 and P99 (Splitwise, table VI): all nine must stay below."""
_THEIR_NAMES = {"ttft": "TTFTx", "tbt": "TBTx", "e2e": "E2Ex"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Departures:
    """What is *not* done as SplitwiseSim does it. ``layer_wise``: KV is sent while it is computed,
    and blocks are asked for then. ``real_batches``: a step costs what the table has for its batch
    and its context. ``gqa``: KV has the model's own number of heads. ``declared_tokens``: routes
    and batches know no more of an answer than that it will be no longer. ``returns_early``: a
    worker goes home when it has no work of the other pool left (the paper's rule)."""

    layer_wise: bool = False
    real_batches: bool = False
    gqa: bool = False
    declared_tokens: int | None = None
    returns_early: bool = False


NONE = Departures()


def imitate(settings: SimSettings, table: PerfTable, but: Departures = NONE) -> SimSettings:
    """The settings with SplitwiseSim's rules, for the same cluster and model, which are of the
    table (`cost.table_machine`). Raises `ConfigError` if they are not."""
    model = settings.machines[0].model
    made = {
        hardware: machine_of_table(
            table,
            hardware,
            model,
            as_splitwisesim=not but.real_batches,
            gqa=but.gqa,
            block_size=1,
        )
        for hardware in dict.fromkeys(group.hardware for group in settings.cluster.groups)
    }
    machines = []
    for group, given in zip(settings.cluster.groups, settings.machines, strict=True):
        machine = made[group.hardware]
        if machine.link != given.link:
            machine = replace(machine, link=given.link)
        machines.append(machine)
    oracle = but.declared_tokens is None
    return replace(
        settings,
        machines=tuple(machines),
        times=ClusterTimes(message_s=0.0),
        policy=NAME,
        batching=NAME,
        make_policy=lambda: SplitwiseSim(oracle=int(oracle)),
        make_batching=lambda: SplitwiseSimBatching(whole=int(not oracle)),
        oracle=oracle,
        declared_tokens=but.declared_tokens,
        admission="none",
        max_running=SplitwiseSimBatching().max_tasks,
        max_step_tokens=SplitwiseSimBatching().max_tokens,
        one_shot_tokens=settings.one_shot_tokens if but.layer_wise else 1 << 40,
        prefix_cache=False,
        late_handoffs=not but.layer_wise,
        ask_again_s=0.0 if but.layer_wise else 1.0,
        ticket_timeout_s=inf,
        lease_s=inf,
        return_rule=ReturnRule.DONE if but.returns_early else ReturnRule.IDLE,
        moves=False,
        queue_timeout_s=inf,
        max_queued_requests=1 << 40,
        terse_reports=not but.returns_early,  # that rule looks at what workers hold
        report_interval_s=0.0,
    )


def figures_of(machines: Machines) -> list[SplitwiseSimFigures]:
    """The one that goes with ``--profile splitwisesim``; none with any other."""
    table = machines.imitated
    return [] if table is None else [SplitwiseSimFigures(table, machines.model)]


class SplitwiseSimFigures(Observer):
    """What SplitwiseSim and its notebooks report: TBT by output tokens (not by one less), and the
    slowdowns against an A100 machine that has nothing else to do.

    Under its rules prompts may fill a machine so that no answer ever fits: a run in which nobody's
    answer ends for `STUCK_S` ends with a `ConfigError`.
    """

    def __init__(self, table: PerfTable, model: str) -> None:
        rows = table.rows(MODELS[model].rows, HARDWARE["a100"].rows, DEVICES)
        self._alone = SplitwiseSimTimer(rows)
        self.tbt_s = array("d")
        self.slowdowns = {name: array("d") for name in SLOS}
        self._moved_s = 0.0

    def arrived(self, at_s: float, request_id: RequestId, prompt_tokens: int) -> None:
        self._moved_s = at_s

    def sampled(self, at_s: float, loads: dict[WorkerId, WorkerLoad], num_queued: int) -> None:
        if at_s - self._moved_s > STUCK_S:
            raise ConfigError(
                f"no answer has ended for {STUCK_S:g} s: prompts hold all KV of a machine, and no "
                "answer has room beside them, as can happen under SplitwiseSim's rules; "
                "lower the load, or add machines"
            )

    def ended(self, at_s: float, request: Ended) -> None:
        self._moved_s = at_s
        ttft_s, e2e_s = request.ttft_s, request.e2e_s
        if request.failure is not None or request.cancelled or ttft_s is None or e2e_s is None:
            return
        tokens = request.prompt_tokens
        tbt_s = (e2e_s - ttft_s) / request.output_tokens
        alone_ttft_s = self._alone.step_s(StepShape(prompt_tokens=tokens))
        # The reference for a token is looked up at the prompt's length, unlike in the simulation.
        alone_tbt_s = self._alone.step_s(StepShape(num_decoding=tokens))
        alone_e2e_s = alone_ttft_s + alone_tbt_s * (request.output_tokens - 1)
        self.tbt_s.append(tbt_s)
        self.slowdowns["ttft"].append(ttft_s / alone_ttft_s)
        self.slowdowns["tbt"].append(tbt_s / alone_tbt_s)
        self.slowdowns["e2e"].append(e2e_s / alone_e2e_s)

    def document(self) -> dict[str, Any]:
        """``slowdowns`` by ``ttft``, ``tbt`` and ``e2e``, then by percentile; ``violated_slos`` in
        SplitwiseSim's words, as ``TBTx_p90``."""
        slowdowns = {name: _percentiles(values) for name, values in self.slowdowns.items()}
        return {
            "tbt_s": _percentiles(self.tbt_s),
            "slowdowns": slowdowns,
            "violated_slos": [
                f"{_THEIR_NAMES[name]}_p{percent}"
                for name, limits in SLOS.items()
                for percent, limit in zip(PERCENTS, limits, strict=True)
                if not (slowdowns[name][f"p{percent}"] or inf) < limit
            ],
        }


def _percentiles(values: array[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {f"p{p}": percentile(ordered, p) if ordered else None for p in PERCENTS}
