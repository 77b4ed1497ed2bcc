"""A load with a failure scenario: sent as any other, and scored on what the failures did.

With ``check_answers`` every request that was answered is sent once more when the cluster is whole
again, and the two answers are compared: greedy or seeded answers are the same whatever happened.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from pdserve.bench.faults import FaultRunner
from pdserve.bench.plan import Load
from pdserve.bench.run import Result, Watcher, run_load
from pdserve.bench.target import Target
from pdserve.core.errors import ConfigError
from pdserve.workload.outcome import Ending
from pdserve.workload.scenario import Scenario
from pdserve.workload.scenario_score import ScenarioScore
from pdserve.workload.slo import Slo

CHECK_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOptions:
    scenario: Scenario
    check_answers: bool = False
    slo: Slo | None = None


async def run_scenario(
    options: FaultOptions, load: Load, target: Target, watcher: Watcher
) -> tuple[Result, dict[str, Any]]:
    """What the load came to, and the score as plain data. Raises `ConfigError` before anything is
    sent for what cannot be done here."""
    if options.check_answers and load.num_requests is None:
        raise ConfigError("--check-answers needs a load that is known beforehand: --num-requests N")
    faults = FaultRunner(options.scenario, target)
    await faults.prepare()
    try:
        result = await run_load(load, target, watcher, faults.begin)
    finally:
        await faults.end()
    left, settled = await faults.settle()
    wrong = await _wrong_answers(load, target, result) if options.check_answers else {}
    score = ScenarioScore(options.scenario, options.slo, faults.hits)
    for outcome in result.outcomes:
        score.add(outcome, wrong=wrong.get(outcome.index))
    return result, score.document(left, settled=settled)


async def _wrong_answers(load: Load, target: Target, result: Result) -> dict[int, bool]:
    """For each request that was answered in full, whether the answer is another one now."""
    digests = {
        outcome.index: outcome.digest
        for outcome in result.outcomes
        if outcome.ending is Ending.COMPLETED
    }
    places = asyncio.Semaphore(CHECK_CONCURRENCY)
    start_s = time.perf_counter()
    wrong: dict[int, bool] = {}
    async with asyncio.TaskGroup() as group:
        for request in load.requests:
            if request.index not in digests:
                continue

            async def ask_again(request: Any = request) -> None:
                async with places:
                    again = await target.send(request, target.prepare(request), start_s)
                if again.ending is Ending.COMPLETED:
                    wrong[request.index] = again.digest != digests[request.index]

            group.create_task(ask_again())
    return wrong
