"""How a machine's inputs and effects are written down, for ``--record`` and for replay.

A record is ``u8 version | u8 kind | body (msgpack)``. The same value always gives the same bytes,
so that a replay can be compared with the recording byte by byte: bodies are brought into one normal
form (a float that happens to hold an int is written as a float) by reading them back once, which
also proves that each record can be read.

msgpack cannot say which of several dataclasses a field holds, so the two values that hold a message
(`Received` and `Send`) carry its kind from the table of ``transport.wire``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.core import commands, effects, engine_work
from pdserve.core.effects import Effect, Input, Received, Send
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.messages import Message
from pdserve.transport.handshake import PROTOCOL_VERSION
from pdserve.transport.wire import decode_body, decode_message, encode_body, encode_message


class _ReceivedBody(msgspec.Struct, array_like=True, frozen=True):
    sender: WorkerId
    sender_epoch: Epoch
    kind: int
    body: msgspec.Raw


class _SendBody(msgspec.Struct, array_like=True, frozen=True):
    to: WorkerId
    kind: int
    body: msgspec.Raw


RECORD_KINDS: dict[int, type[Any]] = {
    # Inputs.
    64: effects.Started,
    65: effects.Received,
    66: effects.TimerFired,
    67: effects.StepDone,
    68: effects.TransferSent,
    69: effects.TransferFailed,
    70: effects.TransferStopped,
    71: effects.TransferVerified,
    72: effects.PeerLost,
    73: effects.Submit,
    74: effects.ClientGone,
    75: effects.WorkerUp,
    76: effects.WorkerLost,
    77: effects.BeginDrain,
    78: effects.PeerUp,
    79: engine_work.EngineStepped,
    80: engine_work.EngineFailed,
    81: engine_work.EngineExported,
    82: engine_work.EngineAdopted,
    83: engine_work.EngineAborted,
    84: commands.ChangeRole,
    85: commands.DrainOne,
    86: commands.UndrainOne,
    87: effects.StepsDone,
    # Effects.
    96: effects.Send,
    97: effects.SetTimer,
    98: effects.CancelTimer,
    99: effects.Log,
    100: effects.RunStep,
    101: effects.OpenTransfer,
    102: effects.BindTransfer,
    103: effects.StopTransfer,
    104: effects.VerifyTransfer,
    105: effects.Deliver,
    106: effects.Fail,
    107: effects.KillWorker,
    108: engine_work.EngineSubmit,
    109: engine_work.EngineAbort,
    110: engine_work.EngineExport,
    111: engine_work.EngineAdopt,
    112: commands.Answer,
    113: commands.RoleChanged,
    114: commands.RolesJudged,
}
"""Kind ids are part of the format: an id is never given to another type."""

_BODIES: dict[type[Any], type[Any]] = {Received: _ReceivedBody, Send: _SendBody}
_KIND_OF = {cls: kind for kind, cls in RECORD_KINDS.items()}
_DECODERS = {
    kind: msgspec.msgpack.Decoder(_BODIES.get(cls, cls), strict=True)
    for kind, cls in RECORD_KINDS.items()
}
_PREFIX_BYTES = 2


def encode_record(value: Input | Effect) -> bytes:
    """The value as a record. Raises `ProtocolError` if it could not be read back."""
    kind = _KIND_OF.get(type(value))
    if kind is None:
        raise ProtocolError(f"a {type(value).__name__} is neither input nor effect")
    body = encode_body(_to_body(_decode(kind, encode_body(_to_body(value)))))
    return bytes((PROTOCOL_VERSION, kind)) + body


def decode_record(record: bytes) -> Input | Effect:
    """The value of a record. Raises `ProtocolError` if it is not one of this version."""
    if len(record) < _PREFIX_BYTES:
        raise ProtocolError(f"a record of {len(record)} bytes is too short to be one")
    version, kind = record[:_PREFIX_BYTES]
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"a record of version {version}, this build reads {PROTOCOL_VERSION}")
    if kind not in RECORD_KINDS:
        raise ProtocolError(f"unknown record kind {kind}")
    return _decode(kind, record[_PREFIX_BYTES:])


def _to_body(value: Input | Effect) -> object:
    if isinstance(value, Received):
        kind, body = encode_message(value.message)
        return _ReceivedBody(value.sender, value.sender_epoch, kind, msgspec.Raw(body))
    if isinstance(value, Send):
        kind, body = encode_message(value.message)
        return _SendBody(value.to, kind, msgspec.Raw(body))
    return value


def _decode(kind: int, body: bytes) -> Input | Effect:
    value = decode_body(_DECODERS[kind], body, RECORD_KINDS[kind].__name__)
    if isinstance(value, _ReceivedBody):
        return Received(value.sender, value.sender_epoch, _message(value.kind, value.body))
    if isinstance(value, _SendBody):
        return Send(value.to, _message(value.kind, value.body))
    assert isinstance(value, RECORD_KINDS[kind])
    return value  # type: ignore[no-any-return]


def _message(kind: int, body: msgspec.Raw) -> Message:
    message = decode_message(kind, memoryview(body))
    if not isinstance(message, Message):
        raise ProtocolError(f"a record holds a {type(message).__name__} in place of a message")
    return message
