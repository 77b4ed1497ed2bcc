"""The first frames of a link: each side says who it is and proves that it knows the cluster secret.

The side that connects sends `Hello`, the other answers with `Welcome`, which repeats the hello's
nonce, so that a recorded welcome is worthless. The proof is an HMAC over every other field. Only
then do the two exchange messages; a link whose first frame does not prove itself is closed.

Over a network somebody may have recorded a hello too. There the side that takes links speaks first:
it sends a `Challenge`, and the hello repeats its nonce.

A frame also offers the sender's KV pool, if it has one that the receiver may write into; the
descriptors of the offer travel beside the frame (SCM_RIGHTS).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from pdserve.core.errors import ProofError, ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.transport.base import PoolExport

PROTOCOL_VERSION = 5
"""Raised with any change of a frame, a message or the meaning of either."""

NONCE_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOffer:
    """A `PoolExport` as a frame carries it: with the number of descriptors in place of them."""

    transport: str
    token: bytes
    num_bytes: int
    num_fds: int

    @classmethod
    def of(cls, export: PoolExport) -> PoolOffer:
        return cls(
            transport=export.transport,
            token=export.token,
            num_bytes=export.num_bytes,
            num_fds=len(export.fds),
        )

    def export(self, fds: tuple[int, ...]) -> PoolExport:
        """Join the offer with the descriptors that came beside it, all of which it takes.

        Raises `ProtocolError` if their number is not what was offered; the caller still owns them.
        """
        if len(fds) != self.num_fds:
            raise ProtocolError(f"{len(fds)} descriptors came with an offer of {self.num_fds}")
        return PoolExport(self.transport, self.token, self.num_bytes, fds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """What a hello that comes over a network must answer: random bytes, new for each link."""

    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of the side that connects. ``role`` is None for the gateway.

    ``nonce`` holds `NONCE_BYTES` random bytes, new for each link; ``answers`` is the nonce of the
    challenge, if there was one. ``family`` names who started the process: those of one family die
    with the same launcher.
    """

    version: int = PROTOCOL_VERSION
    worker: WorkerId
    epoch: Epoch
    role: Role | None
    family: str = ""
    pool: PoolOffer | None
    nonce: bytes
    answers: bytes = b""
    proof: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The answer to `Hello`; ``answers`` is the hello's nonce."""

    version: int = PROTOCOL_VERSION
    worker: WorkerId
    epoch: Epoch
    role: Role | None
    family: str = ""
    pool: PoolOffer | None
    nonce: bytes
    answers: bytes
    proof: bytes = b""


FirstFrame = TypeVar("FirstFrame", Hello, Welcome)


def _proof(frame: Hello | Welcome, secret: bytes) -> bytes:
    assert secret, "a link without a secret proves nothing"
    # The name keeps a hello from being sent back as a welcome.
    fields = (type(frame).__name__, replace(frame, proof=b""))
    return hmac.new(secret, msgspec.msgpack.encode(fields), hashlib.sha256).digest()


def prove(frame: FirstFrame, secret: bytes) -> FirstFrame:
    """The frame with its proof: HMAC-SHA256 (RFC 2104) over all other fields."""
    return replace(frame, proof=_proof(frame, secret))


def check_hello(frame: object, secret: bytes, asked: bytes = b"") -> Hello:
    """The frame, if it is a hello that knows the secret and answers what was ``asked``. Raises
    `ProofError` if not."""
    if not isinstance(frame, Hello):
        raise ProofError(f"the link begins with {type(frame).__name__}, not with a hello")
    _check(frame, secret)
    if not hmac.compare_digest(frame.answers, asked):
        raise ProofError(f"the hello of {frame.worker} answers another challenge")
    return frame


def check_welcome(frame: object, secret: bytes, hello: Hello) -> Welcome:
    """The frame, if it is the welcome to ``hello`` and knows the secret, else `ProofError`."""
    if not isinstance(frame, Welcome):
        raise ProofError(f"the answer to a hello is {type(frame).__name__}, not a welcome")
    _check(frame, secret)
    if not hmac.compare_digest(frame.answers, hello.nonce):
        raise ProofError(f"the welcome of {frame.worker} answers another hello")
    return frame


def _check(frame: Hello | Welcome, secret: bytes) -> None:
    if not hmac.compare_digest(frame.proof, _proof(frame, secret)):
        raise ProofError(
            f"{frame.worker} does not know the cluster secret: start both sides with the same one"
        )
    if frame.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"{frame.worker} speaks protocol version {frame.version}, this build speaks "
            f"{PROTOCOL_VERSION}: run the same build everywhere"
        )
    if len(frame.nonce) != NONCE_BYTES:
        raise ProofError(f"the nonce of {frame.worker} has {len(frame.nonce)} bytes")
