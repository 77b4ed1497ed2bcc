"""The routes of SplitwiseSim (Mutinifni/splitwise-sim, 8f99e7d), which differ from the paper's.

It is here to repeat that simulator's results with our machines. Not for live use: it takes the
length of an answer to be known before it is written (`RouteAsk.oracle_output_tokens`, or, with
``oracle=0``, what the client declares).

*Prefill*: of the prefill pool the worker with the fewest pending tokens, else of the mixed one;
refused if anything waits there and its pending tokens and the prompt are above the threshold.
*Decode*: of the decode pool the worker with the least reserved memory, else of the mixed one;
refused if the KV of prompt and answer would not fit. Without a prefill worker the decode worker
with the fewest pending tokens is drawn into the mixed pool, and without a decode worker the prefill
worker with the least memory; neither is asked whether it has room. If one is still missing, both
phases run on the worker with the fewest pending tokens of all.

Pending tokens of a worker: the prompts that are to be prefilled there, each whole until it is done,
and one for each request that is to be decoded there. Equals go in the order in which they came into
their pool. A cluster of mixed workers alone is SplitwiseSim's baseline: fewest pending tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.request import Role
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitwiseSim:
    """``queue_threshold_tokens``: as in ``prompt_max_pending_batch_tokens``. ``oracle`` 0: answers
    are taken to be as long as the client allows."""

    queue_threshold_tokens: int = 8192
    oracle: int = 1

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        if not view.workers:
            return None
        answer = ask.oracle_output_tokens if self.oracle else None
        if answer is None:
            answer = ask.max_output_tokens
        pools: dict[Role, list[WorkerView]] = {role: [] for role in Role}
        for worker in view.workers:
            pools[worker.role].append(worker)
        if len(pools[Role.MIXED]) == len(view.workers) and not _is_split(view):
            best = min(view.workers, key=_pending)
            reason = "fewest pending tokens"
            return Route(best.worker, best.worker, reason, answer_tokens=answer)
        prefill = self._prefill(pools, ask)
        decode = self._decode(pools, ask.num_tokens + answer)
        draws = []
        if prefill is None and pools[Role.DECODE]:
            prefill = min(pools[Role.DECODE], key=_pending)
            draws.append(prefill)
        if decode is None and pools[Role.PREFILL]:
            decode = min(pools[Role.PREFILL], key=_memory)
            draws.append(decode)
        reason = "fewest pending tokens; least reserved memory"
        if prefill is None or decode is None:
            prefill = decode = _fewest_of_all(pools, draws)
            reason = "no pair has room; fewest pending tokens of all"
        drawn = tuple(worker.worker for worker in draws)
        return Route(prefill.worker, decode.worker, reason, draws=drawn, answer_tokens=answer)

    def _prefill(self, pools: dict[Role, list[WorkerView]], ask: RouteAsk) -> WorkerView | None:
        for role in (Role.PREFILL, Role.MIXED):
            if pools[role]:
                best = min(pools[role], key=_pending)
                waits = best.num_left_out > 0 or best.num_given_local > 0
                tokens = best.given_prompt_tokens + best.num_given + ask.num_tokens
                if not (waits and tokens > self.queue_threshold_tokens):
                    return best
        return None

    def _decode(self, pools: dict[Role, list[WorkerView]], kv_tokens: int) -> WorkerView | None:
        for role in (Role.DECODE, Role.MIXED):
            if pools[role]:
                best = min(pools[role], key=_memory)
                if best.given_kv_tokens + kv_tokens <= best.total_blocks * best.block_size:
                    return best
        return None


def _is_split(view: ClusterView) -> bool:
    """Some worker is not of the mixed pool by birth."""
    return any(worker.home_role is not Role.MIXED for worker in view.workers)


# Of equals `min` takes the first one; views come in the order of their ids.


def _pending(worker: WorkerView) -> tuple[int, float]:
    return worker.given_prompt_tokens + worker.num_given, worker.role_since_s


def _memory(worker: WorkerView) -> tuple[int, float]:
    return worker.given_kv_tokens, worker.role_since_s


def _fewest_of_all(pools: dict[Role, list[WorkerView]], draws: list[WorkerView]) -> WorkerView:
    """Of equals the prefill pool goes first, then the mixed one, with whoever is drawn into it for
    this very route at its end, then the decode pool."""
    ranks = {Role.PREFILL: 0, Role.MIXED: 1, Role.DECODE: 3}

    def key(worker: WorkerView) -> tuple[int, int, float]:
        tokens, since_s = _pending(worker)
        return tokens, 2 if worker in draws else ranks[worker.role], since_s

    return min((worker for pool in pools.values() for worker in pool), key=key)
