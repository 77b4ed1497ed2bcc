"""Splitwise's nine objectives: how much slower a request may be than on an idle A100 machine."""

from __future__ import annotations

from collections.abc import Callable

from paper_runs import EnoughError

from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel
from pdserve.cost.table import PerfTable
from pdserve.cost.table_machine import machine_of_table
from pdserve.sim.observe import Ended, Observer
from pdserve.workload.summary import percentile

SLOWDOWNS = {
    "ttft": ((50, 2.0), (90, 3.0), (99, 6.0)),
    "tbt": ((50, 1.25), (90, 1.5), (99, 5.0)),
    "e2e": ((50, 1.25), (90, 1.5), (99, 5.0)),
}

Measure = Callable[[Ended], dict[str, tuple[float | None, float]]]
"""Of a request: TTFT, TBT and E2E as they were, and as an idle A100 machine would have had them."""


def measured(idle: MachineModel) -> Measure:
    """TBT as this project defines TPOT; a machine that decodes alone reads the answer's context."""

    def measure(request: Ended) -> dict[str, tuple[float | None, float]]:
        tokens, answer = request.prompt_tokens, request.output_tokens
        ttft_s = idle.steps.step_s(StepShape(tokens, tokens * tokens))
        alone = StepShape(num_decoding=1, context_tokens=tokens + answer // 2)
        tbt_s = idle.steps.step_s(alone)
        found = {
            "ttft": (request.ttft_s, ttft_s),
            "e2e": (request.e2e_s, ttft_s + (answer - 1) * tbt_s),
        }
        if answer > 1:
            found["tbt"] = (request.tpot_s, tbt_s)
        return found

    return measure


def measured_as_there(table: PerfTable, model: str) -> Measure:
    """TBT by all tokens of the answer, and looked up at the prompt's length for the idle machine,
    as SplitwiseSim's notebooks do."""
    timer = machine_of_table(table, "a100", model, as_splitwisesim=True).steps

    def measure(request: Ended) -> dict[str, tuple[float | None, float]]:
        tokens, answer = request.prompt_tokens, request.output_tokens
        ttft_s = timer.step_s(StepShape(prompt_tokens=tokens))
        tbt_s = timer.step_s(StepShape(num_decoding=tokens))
        seen_s = None
        if request.e2e_s is not None and request.ttft_s is not None:
            seen_s = (request.e2e_s - request.ttft_s) / answer
        return {
            "ttft": (request.ttft_s, ttft_s),
            "tbt": (seen_s, tbt_s),
            "e2e": (request.e2e_s, ttft_s + (answer - 1) * tbt_s),
        }

    return measure


class Slowdowns(Observer):
    """Of each request, TTFT, TBT and E2E over those of an idle A100 machine. Stops the run as soon
    as one of the nine objectives cannot be kept any more, unless it is to ``count_all``."""

    def __init__(self, measure: Measure, num_requests: int, *, count_all: bool) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in SLOWDOWNS}
        self._measure = measure
        self._num = num_requests
        self._count_all = count_all
        self._over = {
            (name, percent): 0 for name, bounds in SLOWDOWNS.items() for percent, _ in bounds
        }

    def ended(self, at_s: float, request: Ended) -> None:
        for name, (seen_s, idle_s) in self._measure(request).items():
            lost = seen_s is None or request.failure is not None
            slowdown = float("inf") if lost or seen_s is None else seen_s / idle_s
            self.values[name].append(slowdown)
            for percent, bound in SLOWDOWNS[name]:
                if slowdown >= bound:
                    self._over[name, percent] += 1
        if not self._count_all:
            for (_, percent), over in self._over.items():
                if over > self._num * (1 - percent / 100) + 1:
                    raise EnoughError

    def violated(self) -> list[str]:
        """The objectives that are not kept, as ``ttft_p90``."""
        found = []
        for name, bounds in SLOWDOWNS.items():
            values = sorted(self.values[name])
            found += [
                f"{name}_p{percent}"
                for percent, bound in bounds
                if values and percentile(values, percent) >= bound
            ]
        return found

    def percentiles(self) -> dict[str, list[float]]:
        return {
            name: [percentile(sorted(self.values[name]), percent) for percent, _ in bounds]
            for name, bounds in SLOWDOWNS.items()
            if self.values[name]
        }
