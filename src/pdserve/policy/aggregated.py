"""Every worker does both: the baseline without prefill and decode pools.

Roles are not looked at: the least loaded worker serves the request alone, and its batch policy cuts
long prompts into chunks beside what it decodes. Only a client that asks for two workers gets two.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.request import RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk
from pdserve.policy.constraints import decode_side, last_prefill, same_class, why_local, with_room
from pdserve.policy.load import all_timed, soonest_answer


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The least loaded worker, for both phases."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        wants_two = ask.preference is RoutePreference.SPLIT and not ask.in_place
        if wants_two and len(view.workers) > 1:
            return self._split(view, ask)
        roomy = [w for w in view.workers if w.free_blocks >= ask.num_blocks]
        home = last_prefill(roomy, ask)
        workers = home if len(home) == 1 else same_class(roomy, ask)
        if not workers:
            return None
        chosen = soonest_answer(workers, ask, timed=all_timed(workers))
        reason = why_local(view, ask) or "least loaded; every worker does both phases"
        return Route(chosen.worker, chosen.worker, reason)

    def _split(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        workers = last_prefill(list(view.workers), ask)
        prefill = soonest_answer(workers, ask, timed=all_timed(workers))
        others = with_room(decode_side(view, ask, prefill), ask)
        if not others:
            return None
        decode = soonest_answer(others, ask, timed=all_timed(others))
        return Route(prefill.worker, decode.worker, "the client asked for two workers")
