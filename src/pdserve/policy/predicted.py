"""The route of least predicted cost: for the request, and for those that are already there.

Every way to serve the request is priced in seconds (`policy.score`): time to the first token =
queue + fetch of a prefix + prefill of what is not cached; then what the prefill did not hide of the
transfer, the wait for a place in the decode batch, and the tokens at the pace of that batch. To
this comes what the others lose by it. Routes that meet the SLO go first, the cheapest of them wins.
So long prompts leave busy decode workers alone, short ones save the hand-off, follow-up turns go
where their KV lies, and in a cluster of mixed workers this is a load balancer with predictions.

Who may do what (the rules of `policy.constraints` come first):
- prefill and mixed workers prefill for a hand-off, decode and mixed workers with room decode;
- decode and mixed workers with room may do all of it, prefill workers if one token is wanted;
- if nobody has room among these, any worker with room may do all of it: no request waits while a
  worker has room. A client that asked for two workers gets two.

The policy has no memory. Its hysteresis leans on the roles: a route against the roles of its
workers (local on a decode worker, a hand-off from or to a mixed one) must be better by a margin.

A cluster of hundreds costs little more than one of ten: both sides are shortlisted alone, and
only the shortlists are joined (`policy.shortlist`: exact up to 128 workers a side, sampled beyond).
Besides, the holder of the longest prefix and the last prefill worker are always looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import local_workers, same_class, why_local
from pdserve.policy.score import DecodeSide, Estimate, PrefillSide, Scorer, Weights
from pdserve.policy.shortlist import Shortlist, find, longest_holder

MAX_CANDIDATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted(Weights):
    """The cheapest route by step and link models; the weights are its settings."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        scorer = Scorer(view, ask, self)
        search = _Search(scorer)
        forced = None
        if ask.in_place or ask.preference is RoutePreference.LOCAL or len(view.workers) <= 1:
            forced = why_local(view, ask)
        if forced is not None:
            search.add_local(local_workers(view, ask))
        else:
            search.look_by_role()
        if not search.estimates:
            return None
        ranked = sorted(search.estimates, key=lambda estimate: estimate.rank)
        best = ranked[0]
        other = next((e for e in ranked if e.is_local is not best.is_local), None)
        shown = ranked[:MAX_CANDIDATES]
        if other is not None and all(estimate is not other for estimate in shown):
            shown[-1] = other
        return Route(
            best.prefill.view.worker,
            best.decode.view.worker,
            _reason(best, other, forced),
            fetch_from=best.prefill.fetch_from,
            candidates=tuple(estimate.candidate() for estimate in shown),
        )


class _Search:
    """Prices the routes of one question. Every worker is estimated once a side."""

    def __init__(self, scorer: Scorer) -> None:
        self.estimates: list[Estimate] = []
        self._scorer = scorer
        self._shortlist = Shortlist(scorer)
        self._holder = longest_holder(scorer)
        self._prefill: dict[int, PrefillSide] = {}
        self._decode: dict[int, DecodeSide] = {}

    def look_by_role(self) -> None:
        """Routes within the roles; if there is no room within them, routes beyond them."""
        view, ask = self._scorer.view, self._scorer.ask
        prefill_role, decode_role, mixed_role = Role.PREFILL, Role.DECODE, Role.MIXED
        num_blocks = ask.num_blocks
        roomy = [w for w in view.workers if w.free_blocks >= num_blocks]
        prefill = same_class([w for w in view.workers if w.role is not decode_role], ask)
        decode = same_class([w for w in roomy if w.role is not prefill_role], ask)
        if ask.preference is RoutePreference.AUTO:
            kept = same_class(roomy, ask) if ask.max_output_tokens <= 1 else decode
            self.add_local([w for w in kept if w.mixes or w.role is mixed_role])
        fresh = decode
        if ask.avoid_decode:
            fresh = [w for w in decode if w.worker not in ask.avoid_decode]
        self._add_pairs(prefill, fresh)
        if not self.estimates:
            self._add_pairs(prefill, decode)
        if not self.estimates and ask.preference is RoutePreference.AUTO:
            self.add_local(local_workers(view, ask))
        for anyone in (prefill, view.workers):
            if not self.estimates:
                self._add_pairs(anyone, same_class(roomy, ask))

    def add_local(self, workers: Sequence[WorkerView]) -> None:
        """Every one of these, doing all of it."""
        scorer = self._scorer
        for worker in self._with_known(self._shortlist.local(workers), workers):
            self.estimates.append(scorer.local(self._prefills(worker), self._decodes(worker)))

    def _add_pairs(self, prefill: Sequence[WorkerView], decode: Sequence[WorkerView]) -> None:
        """Every pair of different workers out of these."""
        if not prefill or not decode:
            return
        scorer = self._scorer
        chosen = self._with_known(self._shortlist.prefill(prefill), prefill)
        sources = [self._prefills(worker) for worker in chosen]
        targets = [self._decodes(worker) for worker in self._shortlist.decode(decode)]
        for source in sources:
            for target in targets:
                if source.view is not target.view:
                    self.estimates.append(scorer.pair(source, target))

    def _with_known(
        self, best: list[WorkerView], workers: Sequence[WorkerView]
    ) -> list[WorkerView]:
        """The best ones, and those whose cache knows the prompt if they are among the workers."""
        last, holder = self._scorer.ask.last_prefill, self._holder
        for worker_id in (last, None if holder is None else holder.worker):
            known = None if worker_id is None else find(workers, worker_id)
            if known is not None and all(w is not known for w in best):
                best.append(known)
        return best

    def _prefills(self, worker: WorkerView) -> PrefillSide:
        side = self._prefill.get(id(worker))
        if side is None:
            side = self._scorer.prefill_side(worker, self._holder)
            self._prefill[id(worker)] = side
        return side

    def _decodes(self, worker: WorkerView) -> DecodeSide:
        side = self._decode.get(id(worker))
        if side is None:
            side = self._decode[id(worker)] = self._scorer.decode_side(worker)
        return side


def _reason(best: Estimate, other: Estimate | None, forced: str | None) -> str:
    """In words: "split: 312 ms to the first token, then 21 ms a token, against 540 and 24 ms
    locally (harm 95 ms to 7 streams)"."""
    lead = forced or ("local" if best.is_local else "split")
    words = f"{lead}: {_ms(best.prefill.ttft_s)} ms to the first token"
    words += f", then {_ms(best.tpot_s)} ms a token"
    if best.is_local:
        words += _harm(best)
    if other is not None:
        kind = "locally" if other.is_local else "split"
        words += f", against {_ms(other.prefill.ttft_s)} and {_ms(other.tpot_s)} ms {kind}"
        if other.is_local:
            words += _harm(other)
    if best.prefill.fetch_from is not None:
        words += f"; fetches {best.prefill.fetch_tokens} tokens from {best.prefill.fetch_from}"
    if best.misses:
        words += "; no route meets its bounds"
    return words


def _harm(estimate: Estimate) -> str:
    streams = estimate.decode.view.num_decoding
    if not streams:
        return ""
    return f" (harm {_ms(estimate.harm_s)} ms to {streams} stream{'s' if streams > 1 else ''})"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"
