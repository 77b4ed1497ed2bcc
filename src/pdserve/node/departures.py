"""Hand-offs of KV that is finished: choices that move, and prefixes that are shared.

A choice that is to move stays in its queue until the step that it rides in is done; then it is held
while its KV travels, and comes back if that fails. Where hand-offs are late, that of a job is one
of these, too: it begins when the prefill is done. A prefix is what the pool has cached of it: its
blocks are referenced for as long as they are read, by a sequence that never runs.
"""

from __future__ import annotations

from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import (
    MoveAttempt,
    MoveFailed,
    PrefixSent,
    SendPrefix,
    TokenDelta,
    Tokens,
)
from pdserve.core.request import Job, SamplingParams
from pdserve.kv.hashing import root_hash
from pdserve.node.batch import BatchMachine
from pdserve.node.cargo import BlockCargo
from pdserve.node.errands import Errand, LateErrand, MoveErrand, PrefixErrand
from pdserve.node.outbound import OutboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence, untold

_NO_PARAMS = SamplingParams(max_tokens=0, seed=0)


class Departures:
    """Owned by the native worker's machine."""

    def __init__(self, batch: BatchMachine, outbound: OutboundHandoffs) -> None:
        self._batch = batch
        self._outbound = outbound
        self._asked: dict[AttemptId, MoveAttempt] = {}

    @property
    def are_none(self) -> bool:
        """True if nobody waits for the end of the step to leave."""
        return not self._asked

    def move(self, asked: MoveAttempt, out: Outbox) -> None:
        """Now, or when the running step is done."""
        sequence = self._batch.decoding_alone(asked.attempt)
        why_not = _why_not(sequence)
        if sequence is None or why_not is not None:
            out.tell_router(MoveFailed(attempt=asked.attempt, detail=why_not or "it is not here"))
        elif sequence.in_flight:
            self._asked[asked.attempt] = asked
        else:
            self._leave(sequence, asked, out)

    def step_done(self, out: Outbox) -> None:
        """Those who waited for it can leave, if they are still there."""
        asked, self._asked = self._asked, {}
        for each in asked.values():
            self.move(each, out)

    def share(self, asked: SendPrefix, out: Outbox) -> None:
        """Send what is cached of the prefix."""
        settings = self._batch.settings
        sequence = Sequence(
            attempt=asked.attempt,
            choices=(),
            params=_NO_PARAMS,
            given=asked.token_ids,
            num_prompt_tokens=len(asked.token_ids),
            root=root_hash(settings.layout, asked.cache_salt),
            arrival=0,
        )
        if asked.attempt in self._outbound or not self._batch.tables.pin_cached(sequence):
            out.tell_router(PrefixSent(attempt=asked.attempt, num_blocks=0))
            return
        job = _job(sequence, settings.worker, asked, asked.cache_salt, "")
        self._open(job, sequence, PrefixErrand(asked.attempt, len(sequence.hashes)), (), out)

    def hand_off_late(
        self, job: Job, sequence: Sequence, deltas: tuple[TokenDelta, ...], out: Outbox
    ) -> None:
        """The prefill of a job is done, and nothing of its hand-off: the client has the first
        tokens at once, and their KV leaves for the decode worker from now on."""
        out.tell_router(Tokens(deltas))
        if all(delta.finish is not None for delta in deltas):
            self._batch.detach(sequence)
            self._batch.let_go(sequence)
        else:
            self._open(job, sequence, LateErrand(job.attempt), deltas, out)

    def _leave(self, sequence: Sequence, asked: MoveAttempt, out: Outbox) -> None:
        self._batch.hold(sequence)
        silent = untold(sequence)
        if silent is not None:
            out.tell_router(Tokens((silent,)))
        (last,) = sequence.tokens(sequence.num_tokens - 1, sequence.num_tokens)
        job = _job(
            sequence, self._batch.settings.worker, asked, asked.cache_salt, asked.trace_context
        )
        delta = TokenDelta(
            request_id=sequence.attempt.request_id,
            epoch=sequence.attempt.epoch,
            choice=sequence.choices[0],
            index=sequence.next_index - 1,
            token_id=last,
        )
        assert sequence.num_tokens - 1 == sequence.num_computed, sequence
        errand = MoveErrand(asked.attempt, self._batch, sequence)
        self._open(job, sequence, errand, (delta,), out)

    def _open(
        self,
        job: Job,
        sequence: Sequence,
        errand: Errand,
        deltas: tuple[TokenDelta, ...],
        out: Outbox,
    ) -> None:
        cargo = BlockCargo(self._batch.settings, self._batch, job, sequence, finished=True)
        self._outbound.open(job, cargo, out, errand)
        self._outbound.prefilled(job.attempt, deltas, out)


def _why_not(sequence: Sequence | None) -> str | None:
    if sequence is None:
        return "it does not decode here, or not alone"
    if not sequence.extends_hashes:
        return "its KV is of two numerics classes"
    if sequence.reserved_tokens:
        return "its place here is reserved"
    return None


def _job(
    sequence: Sequence,
    worker: WorkerId,
    asked: MoveAttempt | SendPrefix,
    cache_salt: str,
    trace_context: str,
) -> Job:
    """The hand-off as a job: its tokens are those whose KV is there."""
    return Job(
        request_id=sequence.attempt.request_id,
        epoch=sequence.attempt.epoch,
        choices=sequence.choices,
        token_ids=sequence.tokens(0, sequence.num_computed),
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.params,
        prefill_worker=worker,
        decode_worker=asked.to,
        cache_salt=cache_salt,
        trace_context=trace_context,
    )
