"""One hand-off that ends early, and peers that say what they should not."""

from __future__ import annotations

import pytest
from virtual_cluster import make_ask
from virtual_cluster.orders import PROMPT, Pair, any_of, of, pair, reach, submitted

from pdserve.core.effects import BindTransfer, OpenTransfer, Received, StopTransfer
from pdserve.core.events import LifeName
from pdserve.core.ids import GATEWAY, AttemptId, BlockId, Epoch, RequestId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import (
    Accepted,
    AttemptFailed,
    ChunkDigest,
    HandoffAbort,
    HandoffRejected,
    Header,
    Revoke,
    RevokeAck,
    StartJob,
    Ticket,
    TicketRefused,
    TokenDelta,
    Tokens,
    Trailer,
)
from pdserve.core.request import Job, RoutePreference
from pdserve.node.inbound_state import InboundState

R1 = AttemptId(RequestId("r"), Epoch(1))


# --- backward -----------------------------------------------------------------------------------


def test_a_lease_that_runs_out_quarantines_until_the_late_trailer() -> None:
    """The writer was stopped; what it says when it wakes up proves that it has finished."""
    together = submitted()
    cluster, pool = together.cluster, together.decode.node.batch.tables.pool
    reach("trailer under way", together)
    late = any_of(together.holds(Trailer, to_decode=True), of(together.prefill, "to_worker"))
    cluster.run_for(cluster.spec.lease_s + 0.1, hold=late)
    assert together.inbound_states() == [InboundState.QUARANTINED]
    assert pool.num_quarantined == 4
    word = any_of(together.holds(RevokeAck, to_decode=True), of(together.prefill, "to_worker"))
    cluster.run(hold=word)
    assert together.inbound_states() == []
    assert pool.num_quarantined == 0
    assert together.completes(2)


@pytest.mark.parametrize("stage", ["ticket held, prefill runs", "prefilled, writing"])
def test_a_writer_that_lives_keeps_its_lease(stage: str) -> None:
    together = submitted()
    reach(stage, together)
    held = of(together.prefill, "step", "transfer")
    together.cluster.run_for(5 * together.cluster.spec.lease_s, hold=held)
    assert together.inbound_states() == [InboundState.GRANTED]
    assert together.completes()
    assert LifeName.RESUMED not in together.names()


def test_a_revoke_that_crosses_the_trailer() -> None:
    """Each of the two has given up on something that the other one has just done."""
    together = submitted()
    cluster = together.cluster
    reach("prefilled, writing", together)
    together.prefill.stopped = True
    cluster.run_for(cluster.spec.lease_s + 0.1)
    together.prefill.stopped = False
    assert together.says(Revoke, to_decode=False)
    late = any_of(together.holds(Revoke, to_decode=False), of(together.prefill, "to_worker"))
    cluster.run(hold=late, until=lambda: together.says(Trailer, to_decode=True))
    assert together.completes(2)


def test_blocks_of_a_revoked_ticket_come_back_with_the_writers_word() -> None:
    together = submitted()
    cluster, pool = together.cluster, together.decode.node.batch.tables.pool
    reach("prefilled, writing", together)
    together.prefill.stopped = True
    cluster.run_for(cluster.spec.lease_s + 0.1)
    assert pool.num_quarantined == 4
    together.prefill.stopped = False
    late = of(together.prefill, "transfer")
    cluster.run_for(1.0, hold=late)  # it has heard of it, but a write may still be under way
    assert pool.num_quarantined == 4
    cluster.run(until=lambda: not pool.num_quarantined)
    assert together.said()[RevokeAck] >= 1
    assert together.completes(2)


def test_a_writer_that_wakes_up_late_writes_only_into_quarantine() -> None:
    """The write that was under way is the one thing that nobody could stop."""
    together = submitted(lease_s=0.5)
    cluster, prefill, decode = together.cluster, together.prefill, together.decode
    reach("prefilled, writing", together)
    (handoff,) = decode.node.inbound.handoffs()
    reserved = tuple(handoff.fresh)
    prefill.stopped = True
    cluster.run_for(2)
    cluster.submit(make_ask("s", (50, *PROMPT), max_tokens=8, route=RoutePreference.LOCAL))
    prefill.stopped = False
    before = [list(decode.memory.layers[0][block]) for block in reserved]
    while prefill.pusher.has_work:
        prefill.pusher.advance()  # checks where each write lands
    after = [list(decode.memory.layers[0][block]) for block in reserved]
    assert before != after
    assert together.completes(2)


def test_wrong_bytes_are_never_used() -> None:
    together = submitted(lease_s=5.0)
    reach("prefilled, writing", together)
    together.prefill.pusher.corrupt_next = True
    assert together.completes()
    assert together.said()[HandoffRejected] == 1
    assert together.names().count(LifeName.RESUMED) == 1


def test_a_failed_write_costs_a_resume() -> None:
    together = submitted()
    reach("prefilled, writing", together)
    together.prefill.pusher.fail_next = True
    assert together.completes()
    assert together.said()[HandoffAbort] == 1


def test_accepted_is_lost_with_the_decode_worker_that_said_it() -> None:
    """The prefill worker has forgotten the attempt, the router never heard who owns it."""
    together = submitted()
    cluster = together.cluster
    reach("accepted, only the prefill worker knows", together)
    cluster.below = lambda number: 0
    cluster.kill(together.decode)
    cluster.run_for(2)
    assert cluster.client.answers["r"].is_complete


def test_accepted_by_a_worker_of_which_the_router_has_given_up() -> None:
    """The link breaks behind the trailer: the prefill worker asks for a resume, and while that is
    under way the decode worker accepts. One of the two must not go on."""
    together = submitted(max_tokens=8)
    cluster = together.cluster
    reach("accepted, nobody knows", together)
    cluster.cut(together.prefill.links["decode-0", 1])
    cluster.run(hold=of(together.decode, "to_gateway", "step"))
    assert together.names().count(LifeName.RESUMED) == 1
    assert R1 in [sequence.attempt for sequence in together.decode.node.batch.sequences()]
    cluster.run(hold=of(together.decode, "step"))
    left = [sequence.attempt for sequence in together.decode.node.batch.sequences()]
    assert R1 not in left
    assert together.completes(2)


@pytest.mark.parametrize("stage", ["ticket held, prefill runs", "prefilled, writing"])
def test_a_decode_worker_that_gives_up_has_the_writer_stopped_by_the_router(stage: str) -> None:
    """Its own word to the writer is late: the link between the two is slow."""
    together = submitted()
    cluster, prefill = together.cluster, together.prefill
    reach(stage, together)
    lease_renewals = of(together.decode, "deliver")
    held = any_of(lease_renewals, of(prefill, "deliver"))
    cluster.run_for(cluster.spec.lease_s + 0.1, hold=any_of(held, of(prefill, "step")))
    assert together.inbound_states()[0] is InboundState.QUARANTINED
    cluster.run_for(0.1, hold=held)
    assert R1 not in prefill.node.outbound
    assert together.completes(2)


def test_a_decode_worker_that_loses_its_writer_does_not_wait_for_the_lease() -> None:
    together = submitted(lease_s=100.0)
    cluster, prefill = together.cluster, together.prefill
    reach("prefilled, writing", together)
    cluster.cut(prefill.links["decode-0", 1], for_good=True)
    prefill.stopped = True
    cluster.run()
    assert together.inbound_states() == [InboundState.QUARANTINED]
    assert together.names()[-1] == LifeName.ROUTED
    prefill.stopped = False
    prefill.links["decode-0", 1].cut = False
    assert together.completes(2)


# --- what a peer says is not trusted -----------------------------------------------------------


def granted_handoff() -> tuple[Pair, Trailer]:
    """A ticket is held; a trailer that fits it."""
    together = submitted()
    reach("ticket held, prefill runs", together)
    (handoff,) = together.decode.node.inbound.handoffs()
    delta = TokenDelta(request_id=R1.request_id, epoch=R1.epoch, choice=0, index=0, token_id=1)
    chunk = ChunkDigest(first_block=0, num_blocks=len(handoff.fresh), layers=(b"a", b"b"))
    return together, Trailer(attempt=R1, tokens=(delta,), chunks=(chunk,))


def chunks(*ranges: tuple[int, int]) -> tuple[ChunkDigest, ...]:
    return tuple(
        ChunkDigest(first_block=first, num_blocks=count, layers=(b"a", b"b"))
        for first, count in ranges
    )


@pytest.mark.parametrize(
    "wrong",
    [
        chunks(),
        chunks((0, 3)),
        chunks((0, 5)),
        chunks((1, 3)),
        chunks((0, 2), (3, 1)),
        (ChunkDigest(first_block=0, num_blocks=4, layers=(b"a",)),),
    ],
)
def test_digests_must_cover_what_was_to_come(wrong: tuple[ChunkDigest, ...]) -> None:
    together, trailer = granted_handoff()
    decode = together.decode
    lying = Trailer(attempt=R1, tokens=trailer.tokens, chunks=wrong)
    decode.handle(Received(together.prefill.worker, Epoch(1), lying), together.cluster.now)
    assert together.inbound_states() == []
    assert together.says(HandoffRejected, to_decode=False)


def test_a_trailer_speaks_only_of_the_choices_of_its_header() -> None:
    together, trailer = granted_handoff()
    decode = together.decode
    stranger = TokenDelta(request_id=R1.request_id, epoch=R1.epoch, choice=7, index=0, token_id=1)
    lying = Trailer(attempt=R1, tokens=(stranger,), chunks=trailer.chunks)
    decode.handle(Received(together.prefill.worker, Epoch(1), lying), together.cluster.now)
    assert together.says(HandoffRejected, to_decode=False)


def header(**changes: object) -> Header:
    layout = pair().prefill.settings.layout
    fields: dict[str, object] = {
        "attempt": R1,
        "choices": (0,),
        "token_ids": PROMPT,
        "num_prompt_tokens": len(PROMPT),
        "params": make_ask("r", PROMPT).request.params,
        "cache_salt": "",
        "trace_context": "",
        "block_hashes": (),
        "layout": layout,
        "digest_algorithm": "xxh3_128",
    }
    return Header(**{**fields, **changes})  # type: ignore[arg-type]


def other_layout(**changes: object) -> KvLayout:
    layout = pair().prefill.settings.layout
    names_of = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype")
    fields = {name: getattr(layout, name) for name in (*names_of, "numerics", "weights_digest")}
    return KvLayout(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": other_layout(num_layers=3)}, "num_layers"),
        ({"layout": other_layout(weights_digest="other")}, "weights_digest"),
        ({"digest_algorithm": "md5"}, "md5"),
        ({"opaque": True}, "another kind of engine"),
        ({"token_ids": tuple(range(90))}, "more than there are"),
    ],
)
def test_a_header_that_cannot_be_served_is_refused(changes: dict[str, object], why: str) -> None:
    together = pair()
    decode = together.decode
    decode.handle(Received(together.prefill.worker, Epoch(1), header(**changes)), 1.0)
    message = together.cluster.messages(decode, together.prefill)[0]
    assert isinstance(message, TicketRefused)
    assert why in message.detail


def test_another_numerics_class_is_no_obstacle() -> None:
    together = submitted(numerics=("class a", "class b"))
    assert together.completes()
    assert together.said()[Accepted] == 2


def test_a_hand_off_that_is_not_known_is_answered_all_the_same() -> None:
    """Whoever asks for a stop gets its answer, also for what was settled long ago."""
    together = pair()
    prefill, decode = together.prefill, together.decode
    prefill.handle(Received(decode.worker, Epoch(1), Revoke(R1)), 1.0)
    assert together.says(RevokeAck, to_decode=True)
    ticket = Ticket(attempt=R1, first_block=0, block_ids=(BlockId(0),), lease_s=1.0)
    for message in (ticket, Accepted(R1), TicketRefused(attempt=R1, detail="")):
        prefill.handle(Received(decode.worker, Epoch(1), message), 1.0)
    for late in (RevokeAck(R1), HandoffAbort(attempt=R1, detail=""), granted_handoff()[1]):
        decode.handle(Received(prefill.worker, Epoch(1), late), 1.0)
    assert prefill.node.is_empty
    assert decode.node.is_empty


def test_the_machine_says_what_it_wants_in_the_order_in_which_it_is_to_be_done() -> None:
    """A transfer is open before the step that it is for, and stopped before anybody is told."""
    together = pair()
    node = together.prefill.node
    job = Job(
        request_id=R1.request_id,
        epoch=R1.epoch,
        choices=(0,),
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        params=make_ask("r", PROMPT).request.params,
        prefill_worker=together.prefill.worker,
        decode_worker=together.decode.worker,
    )

    effects = [type(e).__name__ for e in node.handle(Received(GATEWAY, Epoch(0), StartJob(job)), 1)]
    assert effects.index(OpenTransfer.__name__) < effects.index("RunStep")
    ticket = Ticket(attempt=R1, first_block=0, block_ids=(BlockId(0),) * 4, lease_s=1.0)
    granted = node.handle(Received(together.decode.worker, Epoch(1), ticket), 1)
    assert [e for e in granted if isinstance(e, BindTransfer)]
    revoked = node.handle(Received(together.decode.worker, Epoch(1), Revoke(R1)), 1)
    assert StopTransfer(R1) in revoked
    told = [e.message for e in revoked if hasattr(e, "message")]
    assert any(isinstance(message, AttemptFailed) for message in told)
    assert not any(isinstance(message, RevokeAck | Tokens) for message in told)
