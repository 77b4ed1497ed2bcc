"""One worker machine with a foreign engine: what it says to whom, and what it lets fall."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.core.effects import (
    Effect,
    Input,
    PeerLost,
    Received,
    Send,
    Started,
    StepDone,
    TimerFired,
)
from pdserve.core.engine_work import (
    EngineAbort,
    EngineAborted,
    EngineAdopt,
    EngineAdopted,
    EngineExport,
    EngineExported,
    EngineFailed,
    EngineFailure,
    EngineLoad,
    EngineOutput,
    EnginePhase,
    EngineStart,
    EngineStepped,
    EngineSubmit,
)
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import (
    AbortAttempt,
    Accepted,
    AttemptFailed,
    ChunkDigest,
    DrainWorker,
    FailureKind,
    HandoffAbort,
    HandoffRejected,
    Header,
    LeaseRenew,
    LoadReport,
    Message,
    OpaquePayload,
    PayloadTaken,
    Revoke,
    RevokeAck,
    StartJob,
    Ticket,
    TicketGranted,
    TicketRefused,
    TokenDelta,
    Tokens,
    Trailer,
    WorkerGone,
)
from pdserve.core.request import FinishReason, Job, Role, SamplingParams
from pdserve.core.step import StepId, StepResult
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.settings import ForeignSettings, WorkerSettings

ME, PEER, OTHER = WorkerId("me"), WorkerId("peer"), WorkerId("other")
ID = AttemptId(RequestId("r"), Epoch(1))
PROMPT = tuple(range(8))
FREE = EngineLoad(free_tokens=40)
LAYOUT = KvLayout(
    num_layers=0,
    num_kv_heads=0,
    head_dim=0,
    block_size=4,
    dtype="opaque",
    numerics="n",
    weights_digest="w",
)


class Driven:
    """A machine, and what it has said since it was last asked."""

    def __init__(self, **foreign: int | bool) -> None:
        settings = WorkerSettings(
            worker=ME,
            epoch=Epoch(1),
            role=Role.MIXED,
            layout=LAYOUT,
            num_blocks=10,
            max_model_tokens=32,
            lease_s=2.0,
            ticket_timeout_s=3.0,
            foreign=ForeignSettings(payload_format="f", **foreign),  # type: ignore[arg-type]
        )
        self.node = ForeignWorkerNode(settings)
        self.now = 0.0
        self.said: list[Effect] = []
        self.hear(Started())
        self.said.clear()

    def hear(self, event: Input) -> None:
        self.now += 0.05
        self.said += self.node.handle(event, self.now)

    def peer(self, message: Message, sender: WorkerId = PEER) -> None:
        self.hear(Received(sender, Epoch(1), message))

    def router(self, message: Message) -> None:
        self.hear(Received(GATEWAY, Epoch(0), message))

    def steps(self, *deltas: TokenDelta, load: EngineLoad = FREE, **output: object) -> None:
        out = EngineOutput(deltas=deltas, **output)  # type: ignore[arg-type]
        self.hear(EngineStepped(out, load, 0.01))

    def take(self, *kinds: type) -> list[object]:
        """Messages and effects of these kinds that it has said, and then forgets."""
        said = [effect.message if isinstance(effect, Send) else effect for effect in self.said]
        self.said.clear()
        return [value for value in said if isinstance(value, kinds)]

    def to(self, worker: WorkerId, kind: type) -> list[Message]:
        sends = [effect for effect in self.said if isinstance(effect, Send)]
        return [s.message for s in sends if s.to == worker and isinstance(s.message, kind)]


def job(attempt: AttemptId = ID, *, decode: WorkerId = PEER, **changes: object) -> StartJob:
    made = Job(
        request_id=attempt.request_id,
        epoch=attempt.epoch,
        choices=(0,),
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        params=SamplingParams(max_tokens=4, seed=1),
        prefill_worker=ME,
        decode_worker=decode,
        route_seq=3,
    )
    return StartJob(replace(made, **changes))  # type: ignore[arg-type]


def header(attempt: AttemptId = ID, **changes: object) -> Header:
    made = Header(
        attempt=attempt,
        choices=(0,),
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        params=SamplingParams(max_tokens=4, seed=1),
        cache_salt="",
        trace_context="",
        block_hashes=(),
        layout=LAYOUT,
        digest_algorithm="xxh3_128",
        opaque=True,
        payload_format="f",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def delta(
    index: int, token_id: int = 7, choice: int = 0, finish: FinishReason | None = None
) -> TokenDelta:
    return TokenDelta(
        request_id=ID.request_id,
        epoch=ID.epoch,
        choice=choice,
        index=index,
        token_id=token_id,
        finish=finish,
    )


def slice_of(data: bytes, offset: int = 0, *, last: bool = False) -> OpaquePayload:
    return OpaquePayload(attempt=ID, offset=offset, data=data, last=last)


DIGESTS = (ChunkDigest(first_block=0, num_blocks=0, layers=(b"digest",)),)
TRAILER = Trailer(attempt=ID, tokens=(delta(0),), chunks=DIGESTS)


def receiving(**foreign: int | bool) -> Driven:
    """A machine that has granted its ticket for attempt r#1."""
    driven = Driven(**foreign)
    driven.peer(header())
    (ticket,) = driven.to(PEER, Ticket)
    assert ticket == Ticket(attempt=ID, first_block=0, block_ids=(), lease_s=2.0)
    driven.said.clear()
    return driven


def adopting(**foreign: int | bool) -> Driven:
    driven = receiving(**foreign)
    driven.peer(slice_of(b"abc", last=True))
    driven.peer(TRAILER)
    return driven


def held(**foreign: int | bool) -> Driven:
    """A machine that has prefilled attempt r#1, and has no ticket for it."""
    driven = Driven(**foreign)
    driven.router(job())
    driven.steps(delta(0), started=(EngineStart(ID),))
    return driven


def exporting(**foreign: int | bool) -> Driven:
    driven = held(**foreign)
    driven.peer(Ticket(attempt=ID, first_block=0, block_ids=(), lease_s=2.0))
    assert driven.take(EngineExport) == [EngineExport(ID)]
    return driven


def exported(data: bytes, **foreign: int | bool) -> Driven:
    driven = exporting(**foreign)
    driven.hear(EngineExported(ID, data, b"digest", FREE))
    return driven


# --- jobs ---------------------------------------------------------------------------------------


def test_a_local_job_is_the_engines_whole_work() -> None:
    driven = Driven()
    driven.router(job(decode=ME))
    (submit,) = driven.take(EngineSubmit)
    assert isinstance(submit, EngineSubmit)
    assert submit.phase is EnginePhase.WHOLE
    assert (submit.work.token_ids, submit.work.choices) == (PROMPT, (0,))
    driven.steps(delta(0))
    driven.steps(delta(1), delta(2, finish=FinishReason.STOP))
    assert driven.take(Tokens) == [
        Tokens((delta(0),)),
        Tokens((delta(1), delta(2, finish=FinishReason.STOP))),
    ]
    assert driven.node.is_empty


def test_a_job_with_one_token_left_is_not_handed_off() -> None:
    driven = Driven()
    driven.router(job(token_ids=(*PROMPT, 1, 2, 3)))
    (submit,) = driven.take(EngineSubmit, Header)
    assert isinstance(submit, EngineSubmit)
    assert submit.phase is EnginePhase.WHOLE
    assert submit.work.next_index == 3


def test_what_can_never_run_here_is_invalid() -> None:
    driven = Driven()
    driven.router(job(token_ids=tuple(range(32))))
    (failed,) = driven.take(AttemptFailed, EngineSubmit)
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.INVALID
    assert "33 tokens do not fit" in failed.detail


def test_what_the_engine_does_not_take_is_invalid() -> None:
    driven = Driven()
    driven.router(job())
    driven.hear(EngineFailed(ID, "no room", FREE))
    (failed,) = driven.take(AttemptFailed)
    assert failed == AttemptFailed(attempt=ID, kind=FailureKind.INVALID, detail="no room")
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.take(HandoffAbort) != []
    assert driven.node.is_empty


def test_a_draining_worker_takes_no_job_and_no_handoff() -> None:
    driven = Driven()
    driven.router(DrainWorker())
    (report,) = driven.take(LoadReport)  # at once
    assert isinstance(report, LoadReport)
    assert report.draining
    driven.router(job())
    driven.peer(header())
    failed, refused = driven.take(AttemptFailed, TicketRefused)
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.DRAINING
    assert refused == TicketRefused(attempt=ID, detail="draining")


def test_headers_go_out_one_ahead_of_the_engine() -> None:
    driven = Driven()
    ids = [AttemptId(RequestId(name), Epoch(1)) for name in "abc"]
    for attempt in ids:
        driven.router(job(attempt))
    assert [h.attempt for h in driven.to(PEER, Header)] == ids[:1]  # type: ignore[union-attr]
    driven.steps(started=(EngineStart(ids[0]),))
    assert [h.attempt for h in driven.to(PEER, Header)] == ids[:2]  # type: ignore[union-attr]


def test_reports_count_what_the_engine_and_the_queues_hold() -> None:
    driven = Driven()
    driven.router(job(decode=ME))
    driven.now += 1.0
    driven.hear(TimerFired("heartbeat"))
    report = driven.take(LoadReport)[-1]
    assert isinstance(report, LoadReport)
    assert (report.pending_prefill_tokens, report.num_waiting, report.num_running) == (8, 1, 0)
    assert (report.free_blocks, report.total_blocks, report.last_route_seq) == (10, 10, 3)
    assert report.step_age_s == pytest.approx(1.05)
    load = EngineLoad(free_tokens=30, cached_tokens=9, num_preemptions=2, num_steps=5)
    driven.steps(delta(0), load=load)
    driven.now += 1.0
    driven.hear(TimerFired("heartbeat"))
    report = driven.take(LoadReport)[-1]
    assert isinstance(report, LoadReport)
    assert (report.pending_prefill_tokens, report.num_waiting, report.num_running) == (0, 0, 1)
    assert (report.free_blocks, report.cached_blocks) == (30 // 4 - 1, 2)
    assert (report.num_preemptions, report.num_steps) == (2, 5)
    assert report.step_expected_s == pytest.approx(0.01)


def test_what_waits_for_a_ticket_is_no_step() -> None:
    driven = held()
    driven.now += 1.0
    driven.hear(TimerFired("heartbeat"))
    report = driven.take(LoadReport)[-1]
    assert isinstance(report, LoadReport)
    assert report.step_age_s == 0


# --- what the engine says is checked ------------------------------------------------------------


def test_a_token_out_of_order_is_not_passed_on() -> None:
    driven = Driven()
    driven.router(job(decode=ME))
    driven.steps(delta(0))
    driven.steps(delta(2))
    said = driven.take(Tokens, AttemptFailed, EngineAbort)
    assert said[0] == Tokens((delta(0),))
    assert EngineAbort(ID) in said
    (failed,) = (value for value in said if isinstance(value, AttemptFailed))
    assert failed.kind is FailureKind.ENGINE
    assert "token 2 where 1 was due" in failed.detail
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


def test_a_second_token_before_the_handoff_is_not_passed_on() -> None:
    driven = held()
    driven.steps(delta(1))
    (failed,) = driven.take(AttemptFailed, Tokens)
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.ENGINE


def test_a_choice_that_the_engine_loses_does_not_take_the_others_along() -> None:
    driven = Driven()
    driven.router(job(decode=ME, choices=(0, 1)))
    driven.steps(delta(0), delta(0, choice=1))
    failure = EngineFailure(attempt=ID, detail="oh", choices=(1,))
    driven.steps(delta(1), failed=(failure,))
    said = driven.take(AttemptFailed, EngineAbort)
    assert said == [
        EngineAbort(ID, (1,)),
        AttemptFailed(
            attempt=ID, kind=FailureKind.ENGINE, detail="the engine failed: oh", choices=(1,)
        ),
    ]
    driven.hear(EngineAborted(ID, (1,), FREE))
    driven.steps(delta(1, choice=1), delta(2))
    assert driven.take(Tokens) == [Tokens((delta(2),))]


def test_an_attempt_that_the_engine_loses_before_its_handoff() -> None:
    driven = Driven()
    driven.router(job())
    driven.steps(failed=(EngineFailure(attempt=ID, detail="oh"),))
    driven.hear(EngineAborted(ID, None, FREE))
    kinds = [type(v) for v in driven.take(AttemptFailed, HandoffAbort, EngineAbort)]
    assert sorted(kind.__name__ for kind in kinds) == [
        "AttemptFailed",
        "EngineAbort",
        "HandoffAbort",
    ]
    assert driven.node.is_empty


def test_tokens_of_an_attempt_that_is_aborted_are_let_fall() -> None:
    driven = Driven()
    driven.router(job(decode=ME))
    driven.steps(delta(0))
    driven.router(AbortAttempt(ID))
    assert not driven.node.is_empty
    driven.take(Tokens)
    driven.steps(delta(1), failed=(EngineFailure(attempt=ID, detail="oh"),))
    assert driven.take(Tokens, AttemptFailed) == []
    driven.router(AbortAttempt(ID))
    assert driven.take(EngineAbort) == []
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


def test_what_is_not_for_a_worker_is_a_bug() -> None:
    done = StepDone(StepResult(step_id=StepId(1), tokens=()), 0.1)
    with pytest.raises(TypeError, match="does not take StepDone"):
        Driven().hear(done)


# --- sending ------------------------------------------------------------------------------------


def test_token_0_and_the_payload_wait_for_the_ticket() -> None:
    driven = held()
    assert driven.take(Tokens, EngineExport) == []
    driven.peer(Ticket(attempt=ID, first_block=0, block_ids=(), lease_s=2.0))
    assert driven.take(Tokens, EngineExport) == [Tokens((delta(0),)), EngineExport(ID)]


def test_a_payload_leaves_in_slices_and_the_trailer_follows() -> None:
    driven = exported(b"abcdefg", payload_slice_bytes=3, payload_window_bytes=6)
    assert driven.take(OpaquePayload, Trailer) == [slice_of(b"abc"), slice_of(b"def", 3)]
    driven.peer(PayloadTaken(ID, 3))
    said = driven.take(OpaquePayload, Trailer)
    assert said == [slice_of(b"g", 6, last=True), TRAILER]
    driven.peer(Accepted(ID))
    assert driven.take(EngineAbort) == [EngineAbort(ID)]
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


def test_an_empty_payload_has_one_slice() -> None:
    assert exported(b"").take(OpaquePayload, Trailer) == [slice_of(b"", last=True), TRAILER]


def test_a_slice_larger_than_the_window_leaves_alone() -> None:
    driven = exported(b"abcdef", payload_slice_bytes=4, payload_window_bytes=2)
    assert driven.take(OpaquePayload) == [slice_of(b"abcd")]
    driven.peer(PayloadTaken(ID, 4))
    assert driven.take(OpaquePayload) == [slice_of(b"ef", 4, last=True)]


def test_only_so_many_payloads_are_in_memory() -> None:
    driven = Driven(max_exports=1, payload_slice_bytes=4, payload_window_bytes=4)
    ids = [AttemptId(RequestId(name), Epoch(1)) for name in "ab"]
    for attempt in ids:
        driven.router(job(attempt))
        first = TokenDelta(
            request_id=attempt.request_id, epoch=attempt.epoch, choice=0, index=0, token_id=1
        )
        driven.steps(first)
        driven.peer(Ticket(attempt=attempt, first_block=0, block_ids=(), lease_s=2.0))
    assert driven.take(EngineExport) == [EngineExport(ids[0])]
    driven.hear(EngineExported(ids[0], b"x" * 8, b"d", FREE))
    assert driven.take(EngineExport) == []
    driven.peer(PayloadTaken(ids[0], 4))
    assert driven.take(EngineExport) == [EngineExport(ids[1])]


def test_a_payload_over_the_limit_is_not_sent() -> None:
    driven = exported(b"abc", max_payload_bytes=2)
    said = driven.take(AttemptFailed, OpaquePayload, EngineAbort)
    (failed, abort) = said
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.HANDOFF
    assert "3 bytes is over the limit of 2" in failed.detail
    assert abort == EngineAbort(ID)
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.to(PEER, HandoffAbort)
    assert driven.node.is_empty


def test_an_export_that_fails_is_a_failed_handoff() -> None:
    driven = exporting()
    driven.hear(EngineFailed(ID, "cannot", FREE))
    (failed,) = driven.take(AttemptFailed)
    assert failed == AttemptFailed(attempt=ID, kind=FailureKind.HANDOFF, detail="cannot")


def test_an_export_that_comes_too_late_is_let_fall() -> None:
    driven = exporting()
    driven.router(AbortAttempt(ID))
    driven.hear(EngineExported(ID, b"abc", b"digest", FREE))
    assert driven.take(OpaquePayload) == []
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


@pytest.mark.parametrize(
    "message",
    [TicketRefused(attempt=ID, detail="no"), HandoffRejected(attempt=ID, detail="no")],
)
def test_only_the_right_peer_ends_a_handoff(message: Message) -> None:
    driven = held()
    driven.peer(message, OTHER)
    assert driven.take(AttemptFailed) == []
    driven.peer(message)
    assert len(driven.take(AttemptFailed)) == 1


def test_a_revoked_writer_stops_and_says_so() -> None:
    driven = exported(b"abcdef", payload_slice_bytes=2, payload_window_bytes=2)
    driven.peer(Revoke(ID))
    driven.take(OpaquePayload)
    driven.peer(PayloadTaken(ID, 2))
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.take(OpaquePayload, RevokeAck, HandoffAbort) == [RevokeAck(ID)]
    driven.peer(Revoke(ID))
    assert driven.take(RevokeAck) == [RevokeAck(ID)]


def test_a_lost_link_opens_the_window_again() -> None:
    driven = exported(b"abcd", payload_slice_bytes=2, payload_window_bytes=2)
    driven.hear(PeerLost(PEER, Epoch(1)))
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty
    second = AttemptId(ID.request_id, Epoch(2))
    driven.router(job(second))
    driven.steps(replace(delta(0), epoch=second.epoch))
    driven.peer(Ticket(attempt=second, first_block=0, block_ids=(), lease_s=2.0))
    driven.take(OpaquePayload)
    driven.hear(EngineExported(second, b"abcd", b"digest", FREE))
    assert len(driven.take(OpaquePayload)) == 1


# --- receiving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"opaque": False}, "takes no KV blocks"),
        ({"payload_format": "g"}, "payload format is g there and f here"),
        ({"layout": replace(LAYOUT, weights_digest="v")}, "other weights"),
        ({"digest_algorithm": "crc"}, "digest crc is unknown"),
        ({"token_ids": tuple(range(32))}, "32 tokens leave no room"),
        ({"token_ids": tuple(range(30)), "choices": (0, 1, 2, 3)}, "needs 11 blocks"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_reason(
    changes: dict[str, object], reason: str
) -> None:
    driven = Driven()
    driven.peer(header(**changes))
    (refused,) = driven.take(TicketRefused, Ticket, TicketGranted)
    assert isinstance(refused, TicketRefused)
    assert reason in refused.detail
    assert driven.node.is_empty


def test_tickets_wait_for_room_in_the_order_of_their_headers() -> None:
    driven = Driven()
    driven.steps(load=EngineLoad(free_tokens=12))
    ids = [AttemptId(RequestId(name), Epoch(1)) for name in "abc"]
    for attempt, num_tokens in zip(ids, (8, 8, 4), strict=True):
        driven.peer(header(attempt, token_ids=PROMPT[:num_tokens], num_prompt_tokens=num_tokens))
    assert [t.attempt for t in driven.to(PEER, Ticket)] == ids[:1]  # type: ignore[union-attr]
    driven.steps(load=EngineLoad(free_tokens=16))
    assert [t.attempt for t in driven.to(PEER, Ticket)] == ids[:2]  # type: ignore[union-attr]
    driven.peer(HandoffAbort(attempt=ids[0], detail="no"))
    assert [t.attempt for t in driven.to(PEER, Ticket)] == ids  # type: ignore[union-attr]
    assert driven.to(GATEWAY, TicketGranted)[0] == TicketGranted(attempt=ids[0], num_blocks=2)


def test_a_payload_that_has_all_come_is_given_to_the_engine() -> None:
    driven = receiving()
    driven.peer(slice_of(b"abc"))
    driven.peer(slice_of(b"de", 3, last=True))
    assert driven.take(PayloadTaken) == [PayloadTaken(ID, 3), PayloadTaken(ID, 2)]
    driven.peer(TRAILER)
    (adopt,) = driven.take(EngineAdopt, Accepted)
    assert isinstance(adopt, EngineAdopt)
    assert (adopt.payload, adopt.digest, adopt.first_tokens) == (b"abcde", b"digest", (delta(0),))
    driven.hear(EngineAdopted(ID, None, FREE))
    assert driven.to(PEER, Accepted) == [Accepted(ID)]
    messages = [e.message for e in driven.said if isinstance(e, Send) and e.to == GATEWAY]
    assert messages[0] == Accepted(ID, (delta(0),))
    driven.said.clear()
    driven.steps(delta(1))
    assert driven.take(Tokens) == [Tokens((delta(1),))]


def test_choices_that_ended_with_their_first_token_are_not_adopted() -> None:
    driven = Driven()
    driven.peer(header(choices=(0, 1)))
    driven.peer(slice_of(b"a", last=True))
    ended = delta(0, choice=0, finish=FinishReason.STOP)
    driven.peer(Trailer(attempt=ID, tokens=(ended, delta(0, choice=1)), chunks=DIGESTS))
    (adopt,) = driven.take(EngineAdopt)
    assert isinstance(adopt, EngineAdopt)
    assert adopt.work.choices == (1,)
    driven.hear(EngineAdopted(ID, None, FREE))
    assert driven.to(GATEWAY, Accepted) == [Accepted(ID, (ended, delta(0, choice=1)))]


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        ([slice_of(b"abc", 1)], "at byte 1 came where 0 was due"),
        ([slice_of(b"abc"), slice_of(b"abc")], "at byte 0 came where 3 was due"),
        ([slice_of(b"abc"), slice_of(b"e", 4)], "at byte 4 came where 3 was due"),
        ([slice_of(b"abc", last=True), slice_of(b"d", 3)], "at byte 3 came"),
        ([slice_of(b"abc"), slice_of(b"defgh", 3)], "over the limit of 7"),
    ],
)
def test_slices_that_do_not_follow_each_other_are_rejected(
    slices: list[OpaquePayload], reason: str
) -> None:
    driven = receiving(max_payload_bytes=7)
    for each in slices:
        driven.peer(each)
    (rejected,) = driven.take(HandoffRejected)
    assert isinstance(rejected, HandoffRejected)
    assert reason in rejected.detail
    driven.peer(TRAILER)
    assert driven.take(EngineAdopt) == []
    assert driven.node.is_empty


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": (delta(0, choice=1),)}, "choices that the header does not have"),
        ({"tokens": (delta(0), delta(0))}, "choices that the header does not have"),
        ({"tokens": (delta(1),)}, "not those of index 0"),
        ({"tokens": (delta(0, finish=FinishReason.STOP),)}, "nothing to decode"),
        ({"tokens": ()}, "nothing to decode"),
        ({"chunks": ()}, "not one digest"),
        ({"chunks": DIGESTS * 2}, "not one digest"),
    ],
)
def test_a_trailer_that_does_not_fit_is_rejected(changes: dict[str, object], reason: str) -> None:
    driven = receiving()
    driven.peer(slice_of(b"abc", last=True))
    driven.peer(replace(TRAILER, **changes))  # type: ignore[arg-type]
    (rejected,) = driven.take(HandoffRejected, EngineAdopt)
    assert isinstance(rejected, HandoffRejected)
    assert reason in rejected.detail
    assert driven.node.is_empty


def test_a_trailer_before_the_last_slice_is_rejected() -> None:
    driven = receiving()
    driven.peer(slice_of(b"abc"))
    driven.peer(TRAILER)
    (rejected,) = driven.take(HandoffRejected)
    assert isinstance(rejected, HandoffRejected)
    assert "broke off after 3 bytes" in rejected.detail


def test_a_payload_that_the_engine_does_not_take_is_rejected() -> None:
    driven = adopting()
    driven.hear(EngineAdopted(ID, "damaged", FREE))
    said = driven.take(HandoffRejected, Accepted)
    assert said == [HandoffRejected(attempt=ID, detail="damaged")]
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


def test_a_slice_of_an_attempt_that_is_not_known_still_moves_the_window() -> None:
    driven = Driven()
    driven.peer(slice_of(b"abc", 6))
    assert driven.take(PayloadTaken, HandoffRejected) == [PayloadTaken(ID, 3)]


def test_a_lease_that_runs_out_frees_everything_at_once() -> None:
    driven = receiving()
    driven.peer(slice_of(b"abc"))
    driven.hear(TimerFired(f"lease {ID}"))
    assert driven.node.is_empty
    failed, revoke = driven.take(AttemptFailed, Revoke)
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.HANDOFF
    assert revoke == Revoke(ID)
    driven.peer(slice_of(b"def", 3, last=True))
    driven.peer(TRAILER)
    driven.peer(RevokeAck(ID))
    assert driven.take(EngineAdopt, Accepted, HandoffRejected) == []


def test_a_sign_of_the_writer_renews_the_lease() -> None:
    driven = receiving()
    driven.peer(LeaseRenew(ID), OTHER)
    assert driven.said == []
    driven.peer(LeaseRenew(ID))
    (renewed,) = driven.said
    assert renewed.timer == f"lease {ID}"  # type: ignore[union-attr]
    assert renewed.at_s == pytest.approx(driven.now + 2.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("event", ["abort", "writer", "gone"])
def test_an_end_while_the_engine_adopts(event: str) -> None:
    driven = adopting()
    driven.said.clear()
    if event == "abort":
        driven.router(AbortAttempt(ID))
    elif event == "writer":
        driven.peer(HandoffAbort(attempt=ID, detail="no"))
    else:
        driven.router(WorkerGone(PEER, Epoch(1)))
    assert driven.take(EngineAbort) == [EngineAbort(ID)]
    driven.hear(EngineAdopted(ID, None, FREE))
    assert driven.take(Accepted, Tokens) == []
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty


def test_an_abort_before_the_trailer_frees_everything_and_stops_the_writer() -> None:
    driven = receiving()
    driven.peer(slice_of(b"abc"))
    driven.router(AbortAttempt(ID))
    assert driven.take(Revoke, AttemptFailed) == [Revoke(ID)]
    assert driven.node.is_empty


@pytest.mark.parametrize("granted", [False, True])
def test_a_lost_link_ends_what_has_not_all_arrived(granted: bool) -> None:
    driven = Driven()
    driven.steps(load=EngineLoad(free_tokens=40 if granted else 0))
    driven.peer(header())
    assert len(driven.take(Ticket)) == granted
    driven.hear(PeerLost(PEER, Epoch(2)))
    assert not driven.node.is_empty, "another process of the peer"
    driven.hear(PeerLost(PEER, Epoch(1)))
    (failed,) = driven.take(AttemptFailed, Revoke)
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.HANDOFF
    assert driven.node.is_empty


def test_a_lost_link_does_not_end_what_has_all_arrived() -> None:
    driven = adopting()
    driven.hear(PeerLost(PEER, Epoch(1)))
    driven.hear(EngineAdopted(ID, None, FREE))
    assert driven.to(GATEWAY, Accepted) == [Accepted(ID, (delta(0),))]


def test_a_writer_that_has_not_heard_of_the_adoption_takes_it_back() -> None:
    driven = adopting()
    driven.hear(EngineAdopted(ID, None, FREE))
    driven.peer(HandoffAbort(attempt=ID, detail="no"))
    assert driven.take(EngineAbort) == [EngineAbort(ID)]


def test_the_late_end_of_an_old_link_does_not_touch_the_new_process() -> None:
    driven = exporting()
    driven.router(WorkerGone(PEER, Epoch(0)))
    driven.hear(PeerLost(PEER, Epoch(0)))
    assert driven.node.is_empty is False
    second = AttemptId(ID.request_id, Epoch(2))
    driven.hear(EngineAborted(ID, None, FREE))
    driven.router(job(second))
    driven.take(AttemptFailed)
    driven.hear(PeerLost(PEER, Epoch(0)))
    assert driven.take(AttemptFailed) == []


def test_slices_of_another_process_of_the_peer_are_let_fall() -> None:
    driven = receiving()
    driven.hear(Received(PEER, Epoch(2), slice_of(b"x", last=True)))
    driven.peer(slice_of(b"abc", last=True))
    driven.peer(TRAILER)
    (adopt,) = driven.take(EngineAdopt)
    assert isinstance(adopt, EngineAdopt)
    assert adopt.payload == b"abc"


def test_a_dead_process_is_not_heard() -> None:
    driven = Driven()
    driven.router(WorkerGone(PEER, Epoch(1)))
    driven.peer(header())
    assert driven.take(Ticket, TicketRefused) == []
    driven.hear(Received(PEER, Epoch(2), header()))
    assert len(driven.take(Ticket)) == 1


def test_a_first_token_that_is_drawn_again_is_not_passed_on() -> None:
    driven = adopting(recomputes_first_token=True)
    driven.hear(EngineAdopted(ID, None, FREE))
    driven.take(Tokens)
    driven.steps(delta(0))
    assert driven.take(Tokens, AttemptFailed) == []
    driven.steps(delta(1))
    assert driven.take(Tokens) == [Tokens((delta(1),))]


@pytest.mark.parametrize("again", [delta(0, token_id=8), delta(0, finish=FinishReason.LENGTH)])
def test_another_first_token_ends_the_choice_before_it_is_believed(again: TokenDelta) -> None:
    driven = adopting(recomputes_first_token=True)
    driven.hear(EngineAdopted(ID, None, FREE))
    driven.take(Tokens)
    driven.steps(again, delta(1, token_id=9))
    said = driven.take(Tokens, AttemptFailed, EngineAbort)
    failed = said[-1]
    assert isinstance(failed, AttemptFailed)
    assert failed.kind is FailureKind.HANDOFF
    assert said[:-1] == [EngineAbort(ID)]
    driven.hear(EngineAborted(ID, None, FREE))
    assert driven.node.is_empty
