"""Who may serve a request: the rules that hold whatever the policy prefers.

The client's wish and the history of a request limit the workers between which a policy chooses. A
request must stay on one worker if the client wants that, if hand-offs have failed too often, or if
only one kind of worker is left; a resume goes back to the prefill worker whose cache knows it,
avoids the decode workers that failed it, and stays in the numerics class of its tokens where it
can; nobody decodes without room. Workers can do both phases unless they say otherwise, so an empty
pool is replaced by the workers that are left, those that mix first.

`choose_pair` puts a route together from a policy's picks among these workers. All lists keep the
order of the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView


class Picks(Protocol):
    """What a policy adds to the rules: one worker out of several, of which there is at least one.

    ``reason``: what its picks have in common, in words.
    """

    @property
    def reason(self) -> str: ...

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView: ...

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView: ...

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView: ...


def choose_pair(picks: Picks, view: ClusterView, ask: RouteAsk) -> Route | None:
    """One worker per side; a mixed worker that is picked to prefill keeps the request."""
    local_reason = why_local(view, ask)
    if local_reason is not None:
        return choose_local(picks, view, ask, local_reason)
    prefill = picks.pick_prefill(prefill_workers(view, ask), ask)
    if may_keep(prefill, ask):
        reason = f"{picks.reason}; a mixed worker keeps what it prefills"
        return Route(prefill.worker, prefill.worker, reason)
    decoders = decode_workers(view, ask, prefill)
    if not decoders:
        return None
    return Route(prefill.worker, picks.pick_decode(decoders, ask).worker, picks.reason)


def choose_local(picks: Picks, view: ClusterView, ask: RouteAsk, reason: str) -> Route | None:
    """One worker for both sides, or None if nobody has room."""
    workers = local_workers(view, ask)
    if not workers:
        return None
    chosen = picks.pick_local(workers, ask)
    return Route(chosen.worker, chosen.worker, reason)


def why_local(view: ClusterView, ask: RouteAsk) -> str | None:
    """Why one worker must do all of it, or None if two may."""
    if ask.in_place:
        return "decode in place after failed hand-offs"
    if ask.preference is RoutePreference.LOCAL:
        return "the client asked for a local route"
    if len(view.workers) <= 1:
        return "only one worker is left"
    if ask.preference is RoutePreference.AUTO and not (
        _has(view, Role.PREFILL) and _has(view, Role.DECODE)
    ):
        return "only one kind of worker is left"
    return None


def local_workers(view: ClusterView, ask: RouteAsk) -> list[WorkerView]:
    """Workers that may do all of it: with room, mixed ones before others."""
    roomy = [w for w in view.workers if w.free_blocks >= ask.num_blocks]
    if ask.in_place:
        home = [w for w in roomy if w.worker == ask.last_prefill]
        if home:
            return home
    return same_class([w for w in roomy if w.role is Role.MIXED] or _mixing(roomy), ask)


def prefill_workers(view: ClusterView, ask: RouteAsk) -> list[WorkerView]:
    """Prefill and mixed workers; of a resume, the one that knows its prefix if it is one."""
    return last_prefill(_pool(view.workers, Role.PREFILL), ask)


def last_prefill(workers: list[WorkerView], ask: RouteAsk) -> list[WorkerView]:
    """Of a resume, the worker that knows its prefix, if it is among them; else all of them."""
    if ask.last_prefill is None:
        return workers
    return [w for w in workers if w.worker == ask.last_prefill] or workers


def decode_workers(view: ClusterView, ask: RouteAsk, prefill: WorkerView) -> list[WorkerView]:
    """Decode and mixed workers with room, but for the one that prefills."""
    return with_room(_pool(decode_side(view, ask, prefill), Role.DECODE), ask)


def decode_side(view: ClusterView, ask: RouteAsk, prefill: WorkerView) -> list[WorkerView]:
    """All others, but for those that failed the request before, while there are any."""
    others = [w for w in view.workers if w is not prefill]
    if not ask.avoid_decode:
        return others
    return [w for w in others if w.worker not in ask.avoid_decode] or others


def with_room(workers: Sequence[WorkerView], ask: RouteAsk) -> list[WorkerView]:
    """Those that can decode it now; of these, those of its numerics class if there are any."""
    return same_class([w for w in workers if w.free_blocks >= ask.num_blocks], ask)


def may_keep(prefill: WorkerView, ask: RouteAsk) -> bool:
    """Whether the worker that prefills may decode too, without being asked for that."""
    return (
        prefill.role is Role.MIXED
        and ask.preference is RoutePreference.AUTO
        and prefill.free_blocks >= ask.num_blocks
    )


def same_class(workers: list[WorkerView], ask: RouteAsk) -> list[WorkerView]:
    """Those of the numerics class of the tokens so far; all of them if there are none."""
    if ask.numerics is None:
        return workers
    return [w for w in workers if w.numerics == ask.numerics] or workers


def is_other_class(worker: WorkerView, ask: RouteAsk) -> bool:
    """Whether going on there would mix numerics classes: for ties on the prefill side."""
    return ask.numerics is not None and worker.numerics != ask.numerics


def _has(view: ClusterView, role: Role) -> bool:
    return any(w.role is role or w.role is Role.MIXED for w in view.workers)


def _pool(workers: Sequence[WorkerView], role: Role) -> list[WorkerView]:
    """Workers of the role and mixed ones; if there are none, everybody that is left."""
    return [w for w in workers if w.role is role or w.role is Role.MIXED] or _mixing(workers)


def _mixing(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Those that can do both at once; if there are none, they are all that is left."""
    return [w for w in workers if w.mixes] or list(workers)
