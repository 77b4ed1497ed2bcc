"""The router's memory of one request: what the client has, and which attempts are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.events import Scalar
from pdserve.core.ids import AttemptId, BlockHash, Epoch, WorkerId
from pdserve.core.messages import FailureKind, TokenDelta
from pdserve.core.request import FinishReason, Job, Request
from pdserve.core.step import SILENT_TOKEN
from pdserve.node.ledger import Decision


@dataclass(slots=True)
class Choice:
    """``taken``: output tokens that the client has or will have: the truth. ``epoch``: the attempt
    whose tokens are taken next, or None while the choice waits for a route. ``early``: tokens of it
    that came before the ones before them, by index: after a move these come over another link.
    ``failures`` counts its failed attempts, preemptions apart; ``failed_handoffs`` and
    ``engine_failures`` those in which that went wrong."""

    index: int
    taken: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    epoch: Epoch | None = None
    early: dict[int, TokenDelta] = field(default_factory=dict)
    failures: int = 0
    failed_handoffs: int = 0
    engine_failures: int = 0


@dataclass(slots=True)
class Attempt:
    """``owner`` is the one worker that answers for it: the prefill worker until the decode worker
    has said `Accepted`. ``moving_to``: the decode worker that is to take it over from its owner."""

    job: Job
    owner: WorkerId
    started: bool = False
    accepted: bool = False
    moving_to: WorkerId | None = None

    def is_undecided_without(self, worker: WorkerId) -> bool:
        """True if the worker, now dead, was to get the attempt and has not accepted as far as is
        known here: it may have said so to its owner only, who then owes nothing any more."""
        has_job = self.job.decode_worker == worker and not self.accepted
        return has_job or self.moving_to == worker

    def is_not_for(self, worker: WorkerId) -> bool:
        """True if what the worker says of it changes nothing: another one has it, or may keep it
        if a move to this one fails."""
        return self.moving_to == worker or (self.accepted and self.owner != worker)

    def decodes_on(self, worker: WorkerId) -> bool:
        """True if the worker writes its tokens, and nobody else is to."""
        has_it = self.accepted or (self.job.is_local and self.started)
        return has_it and self.owner == worker and self.moving_to is None


@dataclass(slots=True)
class Life:
    """One request. ``avoid`` holds the decode workers to which a hand-off failed. ``decision``: of
    the one attempt that it needed. ``hashes``: of its blocks, by kind of worker, of the prompt
    (None) and of what choices have beyond it (`node.prefixes`). ``number``: in order of arrival."""

    request: Request
    submitted_at_s: float
    choices: list[Choice]
    attempts: dict[Epoch, Attempt] = field(default_factory=dict)
    next_epoch: int = 1
    avoid: list[WorkerId] = field(default_factory=list)
    last_prefill: WorkerId | None = None
    numerics: str | None = None
    first_token_at_s: float | None = None
    decision: Decision | None = None
    hashes: dict[tuple[BlockHash, int | None], Sequence[BlockHash]] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def of(cls, request: Request, now: float) -> Life:
        choices = [Choice(index) for index in range(request.num_choices)]
        return cls(request=request, submitted_at_s=now, choices=choices)

    @property
    def is_done(self) -> bool:
        return None not in [choice.finish for choice in self.choices]

    @property
    def has_tokens(self) -> bool:
        return any(choice.taken for choice in self.choices)

    @property
    def has_started(self) -> bool:
        """True once a worker computes, or has computed, anything for the client."""
        return self.has_tokens or any(attempt.started for attempt in self.attempts.values())

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.taken) for choice in self.choices)

    def tpot_s(self, now: float) -> float | None:
        """Seconds for each token after the first, of the longest choice, if it ends now."""
        num_after_first = max(len(choice.taken) for choice in self.choices) - 1
        if self.first_token_at_s is None or num_after_first < 1:
            return None
        return (now - self.first_token_at_s) / num_after_first

    def submission(self, admission: str) -> dict[str, Scalar]:
        """What came: details of `SUBMITTED`. ``admission``: what was said of it, if anything."""
        request = self.request
        found: dict[str, Scalar] = {
            "prompt_tokens": len(request.prompt_token_ids),
            "choices": request.num_choices,
            "max_tokens": request.params.max_tokens,
            "route": str(request.route),
            "service": request.service.name,
        }
        if admission:
            found["admission"] = admission
        if request.tenant:
            found["tenant"] = request.tenant
        return found

    def outcome(self, now: float) -> dict[str, Scalar]:
        """What the decision has come to, if the request ends now."""
        if self.decision is None or self.first_token_at_s is None:
            return {}
        longest = max(len(choice.taken) for choice in self.choices)
        ttft_s = self.first_token_at_s - self.submitted_at_s
        return self.decision.outcome(ttft_s, self.tpot_s(now), longest)

    def unrouted(self) -> list[tuple[int, ...]]:
        """Groups of choices that wait for a route: those without tokens together, others alone."""
        waiting = [c for c in self.choices if c.finish is None and c.epoch is None]
        fresh = tuple(c.index for c in waiting if not c.taken)
        groups = [fresh] if fresh else []
        return groups + [(c.index,) for c in waiting if c.taken]

    def take(self, delta: TokenDelta) -> tuple[TokenDelta, ...]:
        """Tokens that can be taken now: this one, if it is the next one of its choice's current
        attempt, and those after it that came early."""
        if not 0 <= delta.choice < len(self.choices):
            return ()
        choice = self.choices[delta.choice]
        if choice.finish is not None or delta.epoch != choice.epoch:
            return ()
        taken = choice.taken
        first = delta.index - delta.skipped
        if delta.index >= len(taken) >= first and not choice.early:  # the usual case
            _append(choice, delta)
            return (delta,)
        if delta.index >= len(taken):
            choice.early[max(first, len(taken))] = delta
        found = []
        while choice.finish is None and len(taken) in choice.early:
            found.append(choice.early.pop(len(taken)))
            _append(choice, found[-1])
        return tuple(found)

    def wait_again(self, index: int) -> None:
        """The choice needs another attempt."""
        self.choices[index].epoch = None
        self.choices[index].early.clear()

    def has_gap(self, epoch: Epoch) -> bool:
        """True if tokens of the attempt came early: some that another worker drew are to come."""
        return any(choice.early for choice in self.choices if choice.epoch == epoch)

    def live_choices(self, epoch: Epoch) -> tuple[int, ...]:
        """Choices that the attempt still works on."""
        choices = self.choices  # a list is made in half the time of a generator
        return tuple([c.index for c in choices if c.epoch == epoch and c.finish is None])

    def count_failure(
        self, epoch: Epoch, choices: tuple[int, ...] | None, kind: FailureKind | None
    ) -> None:
        """Remember on each choice that the attempt has failed it; None: its worker is gone."""
        for index in self.live_choices(epoch):
            if choices is None or index in choices:
                choice = self.choices[index]
                choice.failures += kind not in (FailureKind.OUT_OF_BLOCKS, FailureKind.DRAINING)
                choice.failed_handoffs += kind in (FailureKind.REFUSED, FailureKind.HANDOFF)
                choice.engine_failures += kind is FailureKind.ENGINE

    @property
    def most_failures(self) -> int:
        """Failures of the choice that has the most."""
        return max(choice.failures for choice in self.choices)

    @property
    def most_engine_failures(self) -> int:
        return max(choice.engine_failures for choice in self.choices)

    def attempt_id(self, epoch: Epoch) -> AttemptId:
        return AttemptId(self.request.request_id, epoch)


def _append(choice: Choice, delta: TokenDelta) -> None:
    """Take a token, and those before it that were skipped and are not known yet."""
    num_new = delta.index - len(choice.taken)
    if num_new:
        choice.taken += [SILENT_TOKEN] * num_new
    choice.taken.append(delta.token_id)
    choice.finish = delta.finish
