"""What a routing policy sees, and what it says.

A view holds everything that a decision may depend on, so the same view and the same question give
the same answer, live, in a replay, and in the simulator. Views are shared and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Protocol

from pdserve.core.ids import WorkerId
from pdserve.core.request import DEFAULT_SERVICE, Role, RoutePreference, ServiceClass
from pdserve.core.values import value
from pdserve.cost.link import FREE_LINK, LinkModel
from pdserve.cost.step import StepModel


@value(kw_only=True)
class WorkerView:
    """A worker that accepts work, with the router's own debits applied to its last report.

    ``pending_tokens``: prompt tokens queued or running there, but for cached ones.
    ``num_decoding``: sequences that it decodes or is promised; ``context_tokens``: their length,
    all together. ``free_blocks``: blocks not used and not promised. ``steps``: how long its steps
    take. ``mixes``: it can prefill and decode at once, as every native worker can.
    ``role_since_s``: when it came into its pool; 0: it was born there. ``num_left_out``: sequences
    that are there and had no part in its last step.

    What the router has given it and it has not finished (`node.assigned`): ``given_prompt_tokens``,
    of prompts whose first token has not come; ``num_given``, attempts that it decodes or will;
    ``num_given_local``, attempts that it prefills and will then decode; ``given_kv_tokens``, tokens
    of KV that it holds or will hold for attempts, with what their routes reserve for answers.
    """

    worker: WorkerId
    role: Role
    pending_tokens: int
    num_decoding: int
    free_blocks: int
    numerics: str
    home_role: Role = Role.MIXED
    total_blocks: int = 0
    block_size: int = 16
    context_tokens: int = 0
    steps: StepModel | None = None
    mixes: bool = True
    mixed_chunk_tokens: int = 512
    role_since_s: float = 0.0
    num_left_out: int = 0
    given_prompt_tokens: int = 0
    num_given: int = 0
    num_given_local: int = 0
    given_kv_tokens: int = 0


@value()
class ClusterView:
    """``workers`` in the order of their ids. ``links`` has (from, to) pairs that were measured;
    all others are like ``link``. ``token_bytes``: KV of one token."""

    now: float
    workers: tuple[WorkerView, ...]
    link: LinkModel = FREE_LINK
    links: Mapping[tuple[WorkerId, WorkerId], LinkModel] = field(default_factory=dict)
    token_bytes: int = 0


@value(kw_only=True)
class RouteAsk:
    """What is to be routed: ``num_choices`` sequences that share ``num_tokens`` tokens;
    ``num_blocks`` is what the decode worker must have free.

    A resume names the worker that prefilled it last (its prefix cache helps), the numerics class of
    the tokens so far, the decode workers that failed it, and whether it must stay in place.
    ``cached_tokens``: how many of the first tokens each worker has, if any. ``max_output_tokens``
    is what the client allows, ``output_tokens`` what answers of its kind have had. ``number``
    counts the decisions: what is random takes its seed from it. ``waited_s``: time since arrival.
    ``oracle_output_tokens`` is the request's: None but in simulations, and to be read by nobody but
    ``policy.splitwisesim``.
    """

    num_tokens: int
    num_blocks: int
    num_choices: int = 1
    preference: RoutePreference = RoutePreference.AUTO
    last_prefill: WorkerId | None = None
    numerics: str | None = None
    avoid_decode: tuple[WorkerId, ...] = ()
    in_place: bool = False
    cached_tokens: Mapping[WorkerId, int] = field(default_factory=dict)
    max_output_tokens: int = 1
    output_tokens: float = 1.0
    service: ServiceClass = DEFAULT_SERVICE
    number: int = 0
    waited_s: float = 0.0
    oracle_output_tokens: int | None = None


@value(kw_only=True)
class Candidate:
    """A route that was thought about, and what it would cost the request, in seconds.

    TTFT is the sum of its parts from ``queue_s`` to ``fetch_s``; ``exposed_s`` and
    ``decode_wait_s`` come after the first token, before the second. ``harm_s``: what the requests
    already there lose by it. ``score_s``: what was compared.
    """

    prefill: WorkerId
    decode: WorkerId
    fetch_from: WorkerId | None = None
    queue_s: float = 0.0
    fetch_s: float = 0.0
    prefill_s: float = 0.0
    exposed_s: float = 0.0
    decode_wait_s: float = 0.0
    tpot_s: float = 0.0
    harm_s: float = 0.0
    score_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s


@value()
class Route:
    """The same worker twice: local, no hand-off.

    ``fetch_from``: the worker whose cached prefix is to be sent to the prefill worker first.
    ``draws``: workers to be taken into the mixed pool for this (Splitwise, sec. IV-A).
    ``candidates``: what was compared, best first; ``candidates[0]`` is this route, the next one the
    runner-up. Policies that do not predict leave it empty.
    ``answer_tokens``: the decode worker is to keep room for so many output tokens of each choice,
    if its batch policy reserves answers.
    """

    prefill: WorkerId
    decode: WorkerId
    reason: str
    fetch_from: WorkerId | None = None
    draws: tuple[WorkerId, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    answer_tokens: int = 0


class RoutePolicy(Protocol):
    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        """A route, or None if nobody has room now."""
        ...
