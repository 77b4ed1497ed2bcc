"""What a failure scenario cost: the same figures for a live server and for a simulation.

A request is *lost* if it ended without its whole answer, or not at all, and was not refused cleanly
either: a clean refusal is a status 429, 503 or 400 before the first token, after which the client
may come again. It is *good* as `slo` has it (without objectives: if it completed).

An event lasts from when it was done until the cluster is whole again: the link healed, the worker
awake, or a new process up in its place. A request is of *during* if any event lasted in any part of
its life, else of *before* if it ended before the first event, else of *after*. The time to recover
is from an event to the begin of the first `WINDOW_S` seconds of arrivals of which as many are good
as of those before the first event, less `MARGIN`.

Blocks leak if they are neither free nor in quarantine once nothing runs any more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdserve.core.effects import Refusal
from pdserve.core.ids import WorkerId
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.scenario import Scenario
from pdserve.workload.scenario_cast import Hit
from pdserve.workload.slo import Slo

WINDOW_S = 5
MARGIN = 0.05
MAX_SHOWN = 20
"""So many of the lost requests are listed."""

_REFUSALS = frozenset(
    ("400", "429", "503", Refusal.OVERLOADED, Refusal.UNAVAILABLE, Refusal.DRAINING,
     Refusal.TOO_LONG)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlocksLeft:
    """A worker's pool when nothing runs any more. ``up`` False: it has no process that serves."""

    worker: WorkerId
    up: bool
    total: int = 0
    free: int = 0
    quarantined: int = 0

    @property
    def leaked(self) -> int:
        return self.total - self.free - self.quarantined


@dataclass(slots=True)
class Share:
    """``good`` of ``judged``; cancelled requests are not judged."""

    judged: int = 0
    good: int = 0

    def add(self, good: bool) -> None:
        self.judged += 1
        self.good += good

    @property
    def attainment(self) -> float | None:
        return self.good / self.judged if self.judged else None


class ScenarioScore:
    """Adds up one run. Holds as much as there are seconds in it, not requests.

    ``hits`` is the list to which who runs the scenario appends; an outcome is added when it is
    known which events had happened until its end.
    """

    def __init__(self, scenario: Scenario, slo: Slo | None, hits: Sequence[Hit]) -> None:
        self._scenario = scenario
        self._slo = slo
        self._hits = hits
        self._counts: Counter[str] = Counter()
        self._shares = {"before": Share(), "during": Share(), "after": Share()}
        self._seconds: dict[int, Share] = {}
        self._shown: list[dict[str, Any]] = []
        self._wrong: int | None = None

    def add(self, outcome: Outcome, *, wrong: bool | None = None) -> None:
        """``wrong``: whether the answer differs from the right one, None if nobody knows."""
        kind = _kind_of(outcome)
        self._counts[kind] += 1
        if wrong is not None:
            self._wrong = (self._wrong or 0) + wrong
        if kind == "lost" and len(self._shown) < MAX_SHOWN:
            tokens = f"{outcome.output_tokens} of {outcome.asked_tokens} tokens"
            failure = outcome.failure or tokens
            shown = {"index": outcome.index, "failure": failure, "message": outcome.message}
            self._shown.append(shown)
        if kind == "cancelled":
            return
        good = kind == "completed" and (self._slo is None or self._slo.met_by(outcome))
        self._shares[self._phase(outcome)].add(good)
        self._seconds.setdefault(int(outcome.sent_s), Share()).add(good)

    def never_ended(self, index: int, sent_s: float) -> None:
        """The run is over, and nothing came of this request."""
        lost = Outcome(
            index=index, due_s=sent_s, sent_s=sent_s, ending=Ending.FAILED, failure="no end"
        )
        self.add(lost)

    def document(self, left: Sequence[BlocksLeft], *, settled: bool) -> dict[str, Any]:
        """Plain data. ``left``: every worker; ``settled``: nothing was under way any more when it
        was looked at."""
        counts = self._counts
        pools = [worker for worker in left if worker.up]
        return {
            "name": self._scenario.name,
            "seed": self._scenario.seed,
            "events": [self._event(hit) for hit in self._hits],
            "sent": counts.total(),
            "completed": counts["completed"],
            "cancelled": counts["cancelled"],
            "refused": counts["refused"],
            "lost": counts["lost"],
            "wrong": self._wrong,
            "lost_requests": self._shown,
            "slo": None if self._slo is None else str(self._slo),
            "attainment": {
                phase: asdict(share) | {"share": share.attainment}
                for phase, share in self._shares.items()
            },
            "settled": settled,
            "workers_down": [worker.worker for worker in left if not worker.up],
            "leaked_blocks": sum(pool.leaked for pool in pools),
            "quarantined_blocks": sum(pool.quarantined for pool in pools),
        }

    # --- inside -------------------------------------------------------------------------------

    def _phase(self, outcome: Outcome) -> str:
        sent_s = outcome.sent_s
        ended_s = math.inf if outcome.ended_s is None else outcome.ended_s
        happened = [hit for hit in self._hits if hit.at_s <= ended_s and hit.workers]
        if not happened:
            return "before"
        lasts = any(hit.over_s is None or hit.over_s >= sent_s for hit in happened)
        return "during" if lasts else "after"

    def _event(self, hit: Hit) -> dict[str, Any]:
        return {
            "at_s": hit.event.at_s,
            "kind": hit.event.kind.value,
            "what": str(hit.event),
            "workers": list(hit.workers),
            "done_s": hit.at_s,
            "over_s": hit.over_s,
            "recovery_s": self._recovery_s(hit) if hit.workers else None,
            "detail": hit.detail,
        }

    def _recovery_s(self, hit: Hit) -> float | None:
        before = self._shares["before"].attainment
        target = (1.0 if before is None else before) - MARGIN
        last = max(self._seconds, default=-1)
        for second in range(int(hit.at_s), last + 1):
            window = [self._seconds.get(second + number) for number in range(WINDOW_S)]
            judged = sum(share.judged for share in window if share is not None)
            good = sum(share.good for share in window if share is not None)
            if judged and good / judged >= target:
                return max(0.0, second - hit.at_s)
        return None


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """The document for people to read, a line for each thing."""
    lines = [
        f"scenario {document['name']}: {document['lost']} lost, {document['refused']} refused, "
        f"{document['completed']} of {document['sent']} completed"
        + ("" if document["wrong"] is None else f", {document['wrong']} wrong")
    ]
    for event in document["events"]:
        over, recovery = event["over_s"], event["recovery_s"]
        workers = ", ".join(event["workers"]) or "nobody"
        lines.append(
            f"  {event['done_s']:8.2f} s  {event['what']} ({workers})"
            + ("" if over is None else f": over at {over:.2f} s")
            + ("" if recovery is None else f", recovered after {recovery:.1f} s")
            + (f"; {event['detail']}" if event["detail"] else "")
        )
    shares = [
        f"{share['share']:.1%} {phase} ({share['good']} of {share['judged']})"
        for phase, share in document["attainment"].items()
        if share["judged"]
    ]
    lines.append(f"  objectives {document['slo'] or '(completed)'}: {', '.join(shares)}")
    down = ", ".join(document["workers_down"])
    lines.append(
        f"  in the end: {document['leaked_blocks']} blocks leaked, "
        f"{document['quarantined_blocks']} in quarantine" + (f"; down: {down}" if down else "")
    )
    return lines


def _kind_of(outcome: Outcome) -> str:
    if outcome.ending is Ending.CANCELLED:
        return "cancelled"
    if outcome.ending is Ending.COMPLETED:
        is_short = outcome.output_tokens < (outcome.asked_tokens or 0)
        return "lost" if is_short and outcome.finish_reason != "stop" else "completed"
    is_clean = outcome.failure in _REFUSALS and outcome.first_s is None
    return "refused" if is_clean else "lost"
