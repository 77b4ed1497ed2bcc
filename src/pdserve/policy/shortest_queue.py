"""Which worker prefills a request, and which one decodes it.

`ShortestQueue` is join-the-shortest-queue on pending tokens for both sides, chosen together
(Splitwise, sec. IV-A). A mixed worker that wins the prefill keeps the request. Every native worker
can do both phases, so a pool that is empty is replaced by the workers that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView


class ShortestQueue:
    """Join the shortest queue, on both sides at once."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        if not view.workers:
            return None
        wants_local = ask.in_place or ask.preference is RoutePreference.LOCAL
        one_sided = not (_has(view, Role.PREFILL) and _has(view, Role.DECODE))
        if (
            wants_local
            or len(view.workers) == 1
            or (one_sided and ask.preference is RoutePreference.AUTO)
        ):
            return self._local(view, ask)
        prefill = self._prefill(view, ask)
        if prefill.role is Role.MIXED and ask.preference is RoutePreference.AUTO:
            local = self._keep(prefill, ask)
            if local is not None:
                return local
        decode = self._decode(view, ask, prefill)
        if decode is None:
            return None
        return Route(prefill.worker, decode.worker, "fewest pending tokens on both sides")

    def _local(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        roomy = [w for w in view.workers if w.free_blocks >= ask.num_blocks]
        if not roomy:
            return None
        home = [w for w in roomy if w.worker == ask.last_prefill] if ask.in_place else []
        pool = home or [w for w in roomy if w.role is Role.MIXED] or roomy
        chosen = min(pool, key=_by_load(ask))
        if ask.in_place:
            reason = "decode in place after failed hand-offs"
        elif ask.preference is RoutePreference.LOCAL:
            reason = "the client asked for a local route"
        else:
            reason = "only one kind of worker is left"
        return Route(chosen.worker, chosen.worker, reason)

    def _prefill(self, view: ClusterView, ask: RouteAsk) -> WorkerView:
        pool = _pool(view.workers, Role.PREFILL)
        again = [w for w in pool if w.worker == ask.last_prefill]
        return again[0] if again else min(pool, key=_by_pending(ask))

    def _keep(self, prefill: WorkerView, ask: RouteAsk) -> Route | None:
        if prefill.free_blocks < ask.num_blocks:
            return None
        return Route(prefill.worker, prefill.worker, "a mixed worker has the fewest pending tokens")

    def _decode(self, view: ClusterView, ask: RouteAsk, prefill: WorkerView) -> WorkerView | None:
        others = [w for w in view.workers if w.worker != prefill.worker]
        fresh = [w for w in others if w.worker not in ask.avoid_decode] or others
        pool = [w for w in _pool(fresh, Role.DECODE) if w.free_blocks >= ask.num_blocks]
        return min(pool, key=_by_load(ask)) if pool else None


def _has(view: ClusterView, role: Role) -> bool:
    return any(w.role in (role, Role.MIXED) for w in view.workers)


def _pool(workers: Sequence[WorkerView], role: Role) -> list[WorkerView]:
    """Workers of the role and mixed ones; if there are none, everybody that is left."""
    return [w for w in workers if w.role in (role, Role.MIXED)] or list(workers)


def _by_pending(ask: RouteAsk) -> Callable[[WorkerView], tuple[int, bool, bool, WorkerId]]:
    return lambda w: (w.pending_tokens, w.role is Role.MIXED, _other_class(w, ask), w.worker)


def _by_load(ask: RouteAsk) -> Callable[[WorkerView], tuple[bool, int, bool, int, WorkerId]]:
    return lambda w: (
        _other_class(w, ask),
        w.num_decoding,
        w.role is Role.MIXED,
        w.pending_tokens,
        w.worker,
    )


def _other_class(worker: WorkerView, ask: RouteAsk) -> bool:
    return ask.numerics is not None and worker.numerics != ask.numerics
