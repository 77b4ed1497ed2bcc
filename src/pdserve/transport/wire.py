"""How control messages travel: one frame for each, typed, versioned and of limited size.

::

    u32 length | u8 protocol version | u8 kind | body (msgpack)

All integers are big-endian; ``length`` counts what follows it. The kind says which dataclass the
body is, and the body is decoded strictly as that. Nothing in a frame is ever executed or pickled.
A frame that is not exactly what it should be raises `ProtocolError`, and the link is closed: there
is no way to find the next frame after a bad one.

A guarded `Decoder` gives out a link's first frame and holds back the rest until its owner has
checked the proof in it (see ``transport.handshake``) and calls `Decoder.admit`.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from pdserve.core import messages
from pdserve.core.effects import WorkerUp
from pdserve.core.errors import ProtocolError
from pdserve.core.messages import Message
from pdserve.transport.handshake import PROTOCOL_VERSION, Challenge, Hello, Welcome
from pdserve.transport.joining import (
    EndProcess,
    Join,
    Joined,
    Leave,
    NotJoined,
    ProcessBegan,
    ProcessEnded,
)
from pdserve.transport.link_faults import LinkFaults
from pdserve.transport.peers import Peers, Reachable
from pdserve.transport.progress import LayersWritten

Joining = Join | Joined | NotJoined | ProcessBegan | ProcessEnded | EndProcess | Leave
"""Between the gateway and a host that brings a worker."""

WireMessage = (
    Message
    | Challenge
    | Hello
    | Welcome
    | WorkerUp
    | Reachable
    | Peers
    | LayersWritten
    | LinkFaults
    | Joining
)
"""What a frame can hold. `WorkerUp` is how a worker process introduces itself to the gateway."""

KINDS: dict[int, type[Any]] = {
    # The link itself.
    1: Hello,
    2: Welcome,
    3: WorkerUp,
    4: Peers,
    5: LayersWritten,
    6: LinkFaults,
    7: Challenge,
    8: Reachable,
    # A host that brings a worker.
    9: Join,
    10: Joined,
    11: NotJoined,
    12: ProcessEnded,
    13: EndProcess,
    14: Leave,
    15: ProcessBegan,
    # Router to worker.
    16: messages.StartJob,
    17: messages.AbortAttempt,
    18: messages.WorkerGone,
    19: messages.DrainWorker,
    20: messages.SetRole,
    23: messages.UndrainWorker,
    21: messages.MoveAttempt,
    22: messages.SendPrefix,
    # Worker to router.
    32: messages.Tokens,
    33: messages.AttemptFailed,
    34: messages.TicketGranted,
    35: messages.Life,
    36: messages.LoadReport,
    37: messages.MoveFailed,
    38: messages.PrefixSent,
    39: messages.CacheChanged,
    # Worker to worker: the hand-off.
    48: messages.Header,
    49: messages.Ticket,
    50: messages.TicketRefused,
    51: messages.LeaseRenew,
    52: messages.Trailer,
    53: messages.OpaquePayload,
    54: messages.Accepted,
    55: messages.HandoffRejected,
    56: messages.HandoffAbort,
    57: messages.Revoke,
    58: messages.RevokeAck,
    59: messages.PayloadTaken,
}
"""Kind ids are part of the protocol: an id is never given to another message."""

MAX_FRAME_BYTES = 16 << 20
MAX_PAYLOAD_FRAME_BYTES = 64 << 20
"""For frames that carry a foreign engine's payload."""
MAX_FIRST_FRAME_BYTES = 64 << 10
"""For the frames that come before a peer has proved itself."""

KIND_OF = {cls: kind for kind, cls in KINDS.items()}
_MAX_BYTES = dict.fromkeys(KINDS, MAX_FRAME_BYTES) | {
    KIND_OF[messages.OpaquePayload]: MAX_PAYLOAD_FRAME_BYTES,
    KIND_OF[Challenge]: MAX_FIRST_FRAME_BYTES,
    KIND_OF[Hello]: MAX_FIRST_FRAME_BYTES,
    KIND_OF[Welcome]: MAX_FIRST_FRAME_BYTES,
}
_DECODERS = {kind: msgspec.msgpack.Decoder(cls, strict=True) for kind, cls in KINDS.items()}
_PREFIX = struct.Struct(">IBB")
_LENGTH_BYTES = 4


def encode_body(value: object) -> bytes:
    """The value as msgpack. Raises `ProtocolError` for what msgpack cannot hold."""
    try:
        return msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"a {type(value).__name__} cannot be encoded: {error}") from error


def decode_body(decoder: msgspec.msgpack.Decoder[Any], body: bytes | memoryview, what: str) -> Any:
    """Decode strictly. Raises `ProtocolError`, which names ``what`` was being read."""
    try:
        return decoder.decode(body)
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"the body of a {what} is not one: {error}") from error


def encode_message(message: WireMessage) -> tuple[int, bytes]:
    """Kind and body of a message."""
    kind = KIND_OF.get(type(message))
    if kind is None:
        raise ProtocolError(f"a {type(message).__name__} is no message")
    return kind, encode_body(message)


def decode_message(kind: int, body: bytes | memoryview) -> WireMessage:
    """The message of this kind and body. Raises `ProtocolError`."""
    if kind not in _DECODERS:
        raise ProtocolError(f"unknown message kind {kind}")
    message: WireMessage = decode_body(_DECODERS[kind], body, KINDS[kind].__name__)
    return message


def encode(message: WireMessage) -> bytes:
    """The message as a frame. Raises `ProtocolError` if it is too large or cannot be encoded."""
    kind, body = encode_message(message)
    length = _PREFIX.size - _LENGTH_BYTES + len(body)
    _check_length(kind, length, _MAX_BYTES[kind])
    return _PREFIX.pack(length, PROTOCOL_VERSION, kind) + body


def _check_length(kind: int, length: int, limit: int) -> None:
    if length > limit:
        raise ProtocolError(
            f"a {KINDS[kind].__name__} frame of {length} bytes is over the limit of {limit}"
        )


class Decoder:
    """Turns a stream of bytes, cut anywhere, into messages. One per link and direction.

    A decoder that has raised `ProtocolError` is done: each later call raises it again. Messages
    before the bad frame that came in the same piece are lost, as those are that a closing link
    still held.
    """

    def __init__(self, *, guarded: bool = False) -> None:
        self._buffer = bytearray()
        self._guarded = guarded
        self._error: str | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[WireMessage]:
        """The messages that ``data`` completes, in order.

        While guarded: the first one, which is a `Challenge`, `Hello` or `Welcome`, and no other.
        Its receiver checks it and then calls `admit`, or closes the link, before it feeds more;
        after a challenge, it feeds again, if only nothing, to have the next one.
        """
        self._buffer += data
        return self._decode_all()

    def admit(self) -> list[WireMessage]:
        """The peer has proved itself: end the guard. Gives what was held back until now."""
        self._guarded = False
        return self._decode_all()

    def _decode_all(self) -> list[WireMessage]:
        if self._error is not None:
            raise ProtocolError(self._error)
        found: list[WireMessage] = []
        start = 0
        try:
            while (end := self._frame_end(start)) is not None:
                kind = self._buffer[start + _PREFIX.size - 1]
                with memoryview(self._buffer)[start + _PREFIX.size : end] as body:
                    found.append(decode_message(kind, body))
                start = end
                if self._guarded:
                    break
        except ProtocolError as error:
            self._error = str(error)
            self._buffer = bytearray()
            raise
        del self._buffer[:start]
        return found

    def _frame_end(self, start: int) -> int | None:
        """Where the frame at ``start`` ends, or None if it is not complete yet.

        Judges the prefix as soon as it is there, so that no more than a legal frame is collected.
        """
        if len(self._buffer) - start < _PREFIX.size:
            return None
        length, version, kind = _PREFIX.unpack_from(self._buffer, start)
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol version {version} is not {PROTOCOL_VERSION}: "
                "run the same build everywhere"
            )
        if kind not in KINDS:
            raise ProtocolError(f"unknown message kind {kind}")
        if length < _PREFIX.size - _LENGTH_BYTES:
            raise ProtocolError(f"a frame of {length} bytes is too short to be one")
        if self._guarded and KINDS[kind] not in (Challenge, Hello, Welcome):
            raise ProtocolError(f"a {KINDS[kind].__name__} before any proof of the cluster secret")
        _check_length(kind, length, _MAX_BYTES[kind])
        end: int = start + _LENGTH_BYTES + length
        return end if end <= len(self._buffer) else None
