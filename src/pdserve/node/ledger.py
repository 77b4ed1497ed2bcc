"""Why a request went where it went, and whether that was right.

What a route was expected to cost, beside the routes that it was preferred to, goes into the life
event `ROUTED`; what it has cost, into `FINISHED`. The *regret* of a decision is the time by which
the request would have ended earlier by the runner-up, as that was predicted: negative if the choice
was the better one even so. Nothing is judged of requests that needed a second attempt: their time
says nothing about the first decision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pdserve.core.events import Scalar
from pdserve.policy.cluster import Candidate, Route

PARTS = ("queue", "fetch", "prefill", "exposed", "decode_wait", "tpot", "harm", "score")
"""What a candidate's cost is made of, each in ms in the events."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen candidate and the best of the others."""

    chosen: Candidate
    runner_up: Candidate | None

    @classmethod
    def of(cls, route: Route) -> Decision | None:
        """None if the policy predicts nothing."""
        if not route.candidates:
            return None
        chosen, *others = route.candidates
        return cls(chosen, others[0] if others else None)

    def outcome(
        self, ttft_s: float, tpot_s: float | None, num_output_tokens: int
    ) -> dict[str, Scalar]:
        """Details of `FINISHED`: measured times, what was predicted, and the regret, in ms."""
        after_first = num_output_tokens - 1
        measured_s = ttft_s + (0.0 if tpot_s is None else tpot_s * after_first)
        found: dict[str, Scalar] = {
            "ttft_ms": _ms(ttft_s),
            "predicted_ttft_ms": _ms(self.chosen.ttft_s),
        }
        if tpot_s is not None:
            found["tpot_ms"] = _ms(tpot_s)
            found["predicted_tpot_ms"] = _ms(_tpot_s(self.chosen, after_first))
        if self.runner_up is not None:
            found["regret_ms"] = _ms(measured_s - _total_s(self.runner_up, after_first))
        return found


def reasons(route: Route) -> dict[str, Scalar]:
    """Details of `ROUTED`: the reason, and the candidates as JSON, best first."""
    found: dict[str, Scalar] = {"reason": route.reason}
    if route.fetch_from is not None:
        found["fetch_from"] = route.fetch_from
    if route.candidates:
        found["candidates"] = json.dumps([_described(each) for each in route.candidates])
    return found


def _described(candidate: Candidate) -> dict[str, str | float]:
    found: dict[str, str | float] = {"prefill": candidate.prefill, "decode": candidate.decode}
    if candidate.fetch_from is not None:
        found["fetch_from"] = candidate.fetch_from
    for part in PARTS:
        found[f"{part}_ms"] = _ms(getattr(candidate, f"{part}_s"))
    found["ttft_ms"] = _ms(candidate.ttft_s)
    return found


def _tpot_s(candidate: Candidate, after_first: int) -> float:
    """What a client would have measured: the pause before the second token is in it."""
    pause_s = candidate.exposed_s + candidate.decode_wait_s
    return candidate.tpot_s + pause_s / max(1, after_first)


def _total_s(candidate: Candidate, after_first: int) -> float:
    return candidate.ttft_s + (_tpot_s(candidate, after_first) * after_first if after_first else 0)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
