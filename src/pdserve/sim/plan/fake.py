"""An evaluator without a simulator: a formula that is monotone as the search takes clusters to be.

Each kind of worker has a speed at each phase, and a cluster of a design serves a rate if some part
of its workers has the time for it (a split design's phases each by themselves, an aggregated one
with some interference). How far the rate is below what can be served decides how many requests
miss. For tests of the search, which then knows the true optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.sim.plan.trial import Candidate, Evaluation, Trial

INTERFERENCE = 0.7
"""What is left of an aggregated worker's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormulaEvaluate:
    """``prefill_rps`` and ``decode_rps``: what a worker serves of each phase, by hardware.
    ``loads`` of the windows: factors on the rate. ``shares`` of the promise's bounds."""

    prefill_rps: Mapping[str, float]
    decode_rps: Mapping[str, float]
    loads: Sequence[float] = (1.0,)
    num_requests: int = 100
    trials: list[Trial] = field(default_factory=list)

    def num_judged(self, window: int) -> int:
        return self.num_requests

    def __call__(self, trial: Trial, allowed: Sequence[int] | None) -> Evaluation:
        self.trials.append(trial)
        rate = trial.conditions.rate * self.loads[trial.window]
        used = (
            rate
            / self.capacity(trial.candidate)
            * max([factor for _, factor in trial.conditions.slower], default=1.0)
        )
        for _, factor in trial.conditions.looser:
            used /= factor
        missed = min(self.num_requests, max(0, round((used - 1) * self.num_requests)))
        if used > 1:
            missed = max(missed, 2)
        lost = allowed is not None and missed > allowed[0]
        return Evaluation(
            num_judged=self.num_requests,
            misses=(missed,),
            complete=not lost,
            good=self.num_requests - missed,
            span_s=self.num_requests / rate,
        )

    def capacity(self, candidate: Candidate) -> float:
        """Requests per second."""
        hardware, counts = candidate.design.hardware, candidate.counts
        if candidate.design.is_split:
            prefill = counts[0] * self.prefill_rps[hardware[0]]
            return min(prefill, counts[1] * self.decode_rps[hardware[1]])
        each = 1 / (1 / self.prefill_rps[hardware[0]] + 1 / self.decode_rps[hardware[0]])
        return counts[0] * each * INTERFERENCE
