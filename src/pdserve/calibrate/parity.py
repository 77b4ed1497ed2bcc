"""Does the simulator decide as the live server did, given the times that the live run had?

A recording holds when each request came, how long each step took and each message travelled. A
simulation is given these (`RecordedConditions`), and the settings, links and costs that the live
machines were born with, and makes its own decisions: every route is compared with the live one.
Where they differ, both machines are right about what they saw, and the *cause* says what they saw
differently: by the live router's own scores, how far apart the two routes were, and which figure of
them was another in the simulation.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdserve.calibrate.recorded_conditions import RecordedConditions
from pdserve.core.events import LifeEvent
from pdserve.core.ids import RequestId, WorkerId
from pdserve.policy.cluster import ClusterView, RouteAsk
from pdserve.policy.cluster import Route as Chosen
from pdserve.policy.registry import make_policy
from pdserve.serve.recorded import RanRequest, RecordedRun
from pdserve.sim.simulation import Simulation

NEAR = 0.05
"""Two routes whose scores differ by less are nearly the same to the router."""
FIGURES = ("queue", "fetch", "prefill", "exposed", "decode_wait", "tpot", "harm")
"""Of a candidate; what its score is made of."""

Route = tuple[WorkerId, WorkerId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A request that went elsewhere, and why. ``simulated`` None: the simulated router was never
    asked about it."""

    request_id: RequestId
    live: Route
    simulated: Route | None
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Of all requests that the live router routed. ``same_steps``: the share of the simulated
    steps that have the shape of the live one at that time. ``anew``: workers that the live run
    started again, and the simulation, which has no failures, did not."""

    num_routes: int
    differences: tuple[Difference, ...]
    same_steps: float
    anew: tuple[WorkerId, ...] = ()

    @property
    def same(self) -> float:
        """The share of the routes that are the same."""
        return 1.0 - len(self.differences) / max(1, self.num_routes)


def compare(run: RecordedRun, *, goes_on_as_live: bool = True) -> Parity:
    """Simulate the recorded run with its own times.

    ``goes_on_as_live``: a request that the simulated router would have sent elsewhere is counted,
    and then sent where the live one went: so every decision is compared in the situation of the
    live run, and one difference is not counted again in all that follows from it. If not, the
    simulation goes its own way, and after a difference both are right about different clusters.
    """
    conditions = RecordedConditions(run)
    choices = _Choices(run, follows=goes_on_as_live)
    settings, requests = conditions.settings()
    settings = replace(settings, make_policy=lambda: choices)
    Simulation(settings, requests, [], conditions).run()
    return Parity(
        num_routes=choices.num_routes,
        differences=tuple(choices.differences()),
        same_steps=conditions.same_steps,
        anew=tuple(sorted(worker for worker, births in run.births.items() if len(births) > 1)),
    )


def described(parity: Parity) -> str:
    """For people: how many are the same, and each that is not, with its cause."""
    num_same = parity.num_routes - len(parity.differences)
    lines = [f"{num_same} of {parity.num_routes} routes are the same in the simulator"]
    if parity.anew:
        lines.append(
            f"started anew in the run, but up all the time in the simulation: "
            f"{', '.join(parity.anew)}; routes may differ from then on"
        )
    for each in parity.differences:
        simulated = "nowhere" if each.simulated is None else "+".join(each.simulated)
        lines.append(
            f"{each.request_id}: {'+'.join(each.live)} live, {simulated} simulated; {each.cause}"
        )
    return "\n".join(lines)


class _Choices:
    """The simulated router's policy, and what it said about each request that the live one routed.

    A policy is not told whose route it chooses; a request is known by its lengths, and of those
    that are alike the one that came first is meant. Implements ``policy.cluster.RoutePolicy``."""

    def __init__(self, run: RecordedRun, *, follows: bool) -> None:
        self._policy = make_policy(run.policy)
        self._follows = follows
        self._routed = [request for request in run.requests.values() if request.jobs]
        self._said: dict[RequestId, Chosen] = {}
        self._to_come: dict[tuple[int, int], deque[RanRequest]] = defaultdict(deque)
        for request in sorted(self._routed, key=lambda request: request.submitted_s):
            asked = request.request
            key = (len(asked.prompt_token_ids), asked.params.max_tokens)
            self._to_come[key].append(request)

    @property
    def num_routes(self) -> int:
        return len(self._routed)

    def choose(self, view: ClusterView, ask: RouteAsk) -> Chosen | None:
        chosen = self._policy.choose(view, ask)
        to_come = self._to_come.get((ask.num_tokens, ask.max_output_tokens))
        if chosen is None or not to_come:
            return chosen
        live = to_come.popleft()
        self._said[live.request.request_id] = chosen
        here = {worker.worker for worker in view.workers}
        route = _live_route(live)
        if not self._follows or _route(chosen) == route or not here.issuperset(route):
            return chosen
        same = [c for c in chosen.candidates if (c.prefill, c.decode) == route]
        others = [c for c in chosen.candidates if (c.prefill, c.decode) != route]
        return Chosen(*route, reason="as live", candidates=(*same, *others) if same else ())

    def differences(self) -> Iterator[Difference]:
        for request in self._routed:
            request_id = request.request.request_id
            live, said = _live_route(request), self._said.get(request_id)
            if said is None or _route(said) != live:
                yield Difference(
                    request_id=request_id,
                    live=live,
                    simulated=None if said is None else _route(said),
                    cause=_cause(request.routed[0] if request.routed else None, said, live),
                )


# --- causes ------------------------------------------------------------------------------------


def _live_route(request: RanRequest) -> Route:
    _, job = request.jobs[0]
    return job.prefill_worker, job.decode_worker


def _route(chosen: Chosen) -> Route:
    return chosen.prefill, chosen.decode


def _cause(live_event: LifeEvent | None, said: Chosen | None, live: Route) -> str:
    if said is None:
        return "the simulated router was never asked about it, or had no room"
    reason = "" if live_event is None else dict(live_event.detail).get("reason", "")
    live_scores = _candidates(live_event)
    mine, other = live_scores.get(live), live_scores.get(_route(said))
    if not said.candidates or mine is None:
        return f"live: {reason}; simulated: {said.reason}"
    if other is None:
        return "the live router did not come to consider the simulated route"
    apart_ms = other["score_ms"] - mine["score_ms"]
    text = f"live scores were {apart_ms:.1f} ms apart of {mine['score_ms']:.1f}"
    if abs(apart_ms) <= NEAR * abs(mine["score_ms"]):
        text = "nearly a tie: " + text
    changes = []
    for candidate in said.candidates:
        route = (candidate.prefill, candidate.decode)
        for name in FIGURES:
            value = live_scores.get(route, {}).get(f"{name}_ms")
            seen = 1e3 * getattr(candidate, f"{name}_s")
            if value is not None:
                changes.append((abs(seen - value), f"{name} of {'+'.join(route)}", value, seen))
    if changes:
        _, name, value, seen = max(changes)
        text += f"; {name} was {value:.1f} ms live and {seen:.1f} simulated"
    return text


def _candidates(event: LifeEvent | None) -> dict[Route, dict[str, float]]:
    """Scores by route, of policies that say them."""
    written = dict(event.detail).get("candidates") if event is not None else None
    if not isinstance(written, str):
        return {}
    found = {}
    for candidate in json.loads(written):
        route = (WorkerId(candidate["prefill"]), WorkerId(candidate["decode"]))
        found[route] = {k: v for k, v in candidate.items() if isinstance(v, int | float)}
    return found
