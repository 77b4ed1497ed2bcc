"""The codecs of messages and records: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import resource
import struct
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.core import effects, messages
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import Accepted, DrainWorker, LeaseRenew, OpaquePayload, Revoke, Ticket
from pdserve.core.step import StepId, StepResult
from pdserve.transport import wire
from pdserve.transport.handshake import PROTOCOL_VERSION, Challenge, Hello, Welcome
from pdserve.transport.link_faults import LinkFaults
from pdserve.transport.peers import Peers, Reachable
from pdserve.transport.progress import LayersWritten
from pdserve.transport.records import RECORD_KINDS, decode_record, encode_record
from pdserve.transport.wire import KINDS, Decoder, Joining, encode

MESSAGES = tuple(KINDS.values())
RECORDS = tuple(RECORD_KINDS.values())
ATTEMPT = AttemptId(RequestId("r"), Epoch(1))

LEAVES: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=20),
    type(None): st.none(),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may hold."""
    if hint in LEAVES:
        return LEAVES[hint]
    if isinstance(hint, typing.NewType):
        return values_of(hint.__supertype__)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    hints = typing.get_type_hints(hint)
    if issubclass(hint, tuple):
        return st.builds(hint, **{name: values_of(hints[name]) for name in hint._fields})
    names = [field.name for field in dataclasses.fields(hint)]
    return st.builds(hint, **{name: values_of(hints[name]) for name in names})


# --- messages ---------------------------------------------------------------------------------


def test_every_message_has_a_kind_and_every_kind_is_a_message() -> None:
    links = {Challenge, Hello, Welcome, effects.WorkerUp, Reachable, Peers, LayersWritten}
    links |= {LinkFaults, *typing.get_args(Joining)}
    assert set(KINDS.values()) == set(typing.get_args(messages.Message)) | links
    assert len(set(KINDS.values())) == len(KINDS)


def test_kinds_stay_what_they_are() -> None:
    names = {
        1: "Hello Welcome WorkerUp Peers LayersWritten LinkFaults Challenge Reachable",
        9: "Join Joined NotJoined ProcessEnded EndProcess Leave ProcessBegan",
        16: "StartJob AbortAttempt WorkerGone DrainWorker",
        20: "SetRole MoveAttempt SendPrefix UndrainWorker",
        32: "Tokens AttemptFailed TicketGranted Life LoadReport",
        37: "MoveFailed PrefixSent CacheChanged",
        48: "Header Ticket TicketRefused LeaseRenew Trailer OpaquePayload",
        54: "Accepted HandoffRejected HandoffAbort Revoke RevokeAck PayloadTaken",
    }
    assert {kind: cls.__name__ for kind, cls in KINDS.items()} == {
        first + i: name for first, row in names.items() for i, name in enumerate(row.split())
    }


def test_a_frame_looks_as_documented() -> None:
    body = msgspec.msgpack.encode({"attempt": ["r", 1]})
    assert encode(Revoke(ATTEMPT)) == struct.pack(">IBB", len(body) + 2, 5, 57) + body


@pytest.mark.parametrize("cls", MESSAGES)
@settings(derandomize=True, max_examples=20)
@given(data=st.data())
def test_a_message_comes_out_as_it_went_in(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(values_of(cls))
    frame = encode(message)
    (found,) = Decoder().feed(frame)
    assert found == message
    assert type(found) is cls
    assert encode(found) == encode(Decoder().feed(encode(found))[0])


@settings(derandomize=True, max_examples=50)
@given(
    sent=st.lists(st.sampled_from(MESSAGES).flatmap(values_of), max_size=5),
    cuts=st.lists(st.integers(0, 2000), max_size=10),
)
def test_frames_may_be_cut_anywhere(sent: list[Any], cuts: list[int]) -> None:
    stream = b"".join(map(encode, sent))
    borders = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = Decoder()
    found: list[Any] = []
    for start, end in itertools.pairwise(borders):
        found += decoder.feed(stream[start:end])
    assert found == sent


def test_byte_by_byte() -> None:
    sent = [DrainWorker(), Accepted(ATTEMPT), LeaseRenew(ATTEMPT)]
    decoder = Decoder()
    found: list[Any] = []
    for byte in b"".join(map(encode, sent)):
        found += decoder.feed(bytes([byte]))
    assert found == sent


def frame(body: bytes, kind: int = 54, version: int = PROTOCOL_VERSION) -> bytes:
    return struct.pack(">IBB", len(body) + 2, version, kind) + body


GOOD_BODY = encode(Accepted(ATTEMPT))[6:]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (frame(GOOD_BODY, version=1), "version 1 is not 5"),
        (frame(GOOD_BODY, kind=99), "unknown message kind 99"),
        (struct.pack(">IBB", 0, PROTOCOL_VERSION, 54), "too short"),
        (
            struct.pack(">IBB", (16 << 20) + 1, PROTOCOL_VERSION, 54),
            "Accepted frame of 16777217 bytes",
        ),
        (
            struct.pack(">IBB", (64 << 20) + 1, PROTOCOL_VERSION, 53),
            "OpaquePayload frame of 67108865 bytes",
        ),
        (struct.pack(">IBB", (64 << 10) + 1, PROTOCOL_VERSION, 1), "Hello frame of 65537 bytes"),
        (struct.pack(">IBB", 2**32 - 1, PROTOCOL_VERSION, 53), "over the limit"),
        (frame(b""), "body of a Accepted"),
        (frame(b"\x80"), "missing required field `attempt`"),
        (frame(GOOD_BODY + b"\x00"), "trailing"),
        (frame(GOOD_BODY[:-1]), "truncated"),
        (frame(msgspec.msgpack.encode({"attempt": "r#1"})), r"\$.attempt"),
        (frame(msgspec.msgpack.encode({"attempt": ["r", "1"]})), r"attempt\[1\]"),
        (frame(msgspec.msgpack.encode({"attempt": [7, 1]})), r"attempt\[0\]"),
        (frame(msgspec.msgpack.encode({"attempt": ["r", 1.5]})), r"attempt\[1\]"),
        (frame(b"\x81\xa1x" + b"\x91" * 100_000), "recursion"),
        (frame(b"\x81\xa7attempt\x92\xa1\xff\x01"), "utf-8"),
    ],
)
def test_a_bad_frame_is_refused_with_the_reason_and_ends_the_stream(data: bytes, what: str) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError, match=what):
        decoder.feed(data)
    with pytest.raises(ProtocolError, match=what):
        decoder.feed(encode(DrainWorker()))


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_awaited(data: bytes) -> None:
    try:
        Decoder().feed(data)
    except ProtocolError:
        return


@settings(derandomize=True, max_examples=500)
@given(kind=st.sampled_from(sorted(KINDS)), body=st.binary(max_size=200))
@example(kind=48, body=b"\xdf\xff\xff\xff\xff")
@example(kind=32, body=b"\x81\xa6deltas\xdd\xff\xff\xff\xff")
@example(kind=53, body=b"\x81\xa4data\xc6\xff\xff\xff\xff")
def test_random_bodies_are_refused_and_cost_no_memory(kind: int, body: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ProtocolError):
        # The message without fields reads from any map.
        assert Decoder().feed(frame(body, kind)) == [DrainWorker()]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@settings(derandomize=True, max_examples=300)
@given(
    cls=st.sampled_from(MESSAGES),
    data=st.data(),
    at=st.integers(0, 10**6),
    byte=st.integers(0, 255),
)
def test_a_flipped_byte_never_breaks_out(
    cls: type[Any], data: st.DataObject, at: int, byte: int
) -> None:
    wrong = bytearray(encode(data.draw(values_of(cls))))
    wrong[at % len(wrong)] = byte
    try:
        found = Decoder().feed(wrong)
    except ProtocolError:
        return
    assert all(type(message) in MESSAGES for message in found)


def test_an_oversize_message_is_not_sent() -> None:
    blocks = tuple(range(2**20)) * 6
    ticket = Ticket(attempt=ATTEMPT, first_block=0, block_ids=blocks, lease_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(ticket)


def test_a_payload_may_be_larger_than_other_messages() -> None:
    data = bytes(20 << 20)
    payload = OpaquePayload(attempt=ATTEMPT, offset=0, data=data, last=True)
    assert Decoder().feed(encode(payload)) == [payload]


@pytest.mark.parametrize("epoch", [2**64, -(2**63) - 1, object(), "\ud800"])
def test_what_msgpack_cannot_hold_is_not_sent(epoch: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode(Accepted(AttemptId(RequestId("r"), epoch)))


def test_what_is_no_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="a StepResult is no message"):
        encode(StepResult(step_id=StepId(1), tokens=()))  # type: ignore[arg-type]


# --- records ----------------------------------------------------------------------------------


def test_every_input_and_effect_has_a_record_kind() -> None:
    every = typing.get_args(effects.Input) + typing.get_args(effects.Effect)
    assert set(RECORD_KINDS.values()) == set(every)
    assert len(RECORD_KINDS) == len(every)
    assert not RECORD_KINDS.keys() & KINDS.keys()


@pytest.mark.parametrize("cls", RECORDS)
@settings(derandomize=True, max_examples=20)
@given(data=st.data())
def test_a_record_gives_the_value_back_and_always_the_same_bytes(
    cls: type[Any], data: st.DataObject
) -> None:
    value = data.draw(values_of(cls))
    record = encode_record(value)
    found = decode_record(record)
    assert found == value
    assert type(found) is cls
    assert encode_record(found) == record


def test_equal_times_give_equal_bytes() -> None:
    assert encode_record(effects.SetTimer("t", 3)) == encode_record(effects.SetTimer("t", 3.0))
    ticket = Ticket(attempt=ATTEMPT, first_block=0, block_ids=(), lease_s=2)
    same = Ticket(attempt=ATTEMPT, first_block=0, block_ids=(), lease_s=2.0)
    one, other = (effects.Send(WorkerId("w"), message) for message in (ticket, same))
    assert encode_record(one) == encode_record(other)


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=100), st.sampled_from(sorted(RECORD_KINDS)))
def test_a_random_record_is_refused(body: bytes, kind: int) -> None:
    for record in (body, bytes((1, kind)) + body):
        try:
            assert type(decode_record(record)) in RECORDS
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (b"", "too short"),
        (b"\x01\x40\x80", "version 1"),
        (b"\x05\x01\x80", "unknown record kind 1"),
        (b"\x05\x60" + msgspec.msgpack.encode(["w", 99, {}]), "unknown message kind 99"),
        (b"\x05\x60" + msgspec.msgpack.encode(["w", 54, {}]), "body of a Accepted"),
        (b"\x05\x60" + msgspec.msgpack.encode(["w", 1, None]), "body of a Hello"),
    ],
)
def test_a_bad_record_is_refused_with_the_reason(record: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        decode_record(record)


def test_a_record_holds_no_link_frame() -> None:
    hello = Hello(worker=WorkerId("w"), epoch=Epoch(1), role=None, pool=None, nonce=bytes(16))
    with pytest.raises(ProtocolError, match="a Hello in place of a message"):
        encode_record(effects.Send(WorkerId("w"), hello))  # type: ignore[arg-type]


def test_what_could_not_be_read_back_is_not_recorded() -> None:
    with pytest.raises(ProtocolError, match="epoch"):
        encode_record(effects.PeerLost(WorkerId("w"), True))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="neither input nor effect"):
        encode_record(Accepted(ATTEMPT))  # type: ignore[arg-type]


def test_the_limits_are_those_that_the_documents_state() -> None:
    assert wire.MAX_FRAME_BYTES == 16 * 2**20
    assert wire.MAX_PAYLOAD_FRAME_BYTES == 64 * 2**20
