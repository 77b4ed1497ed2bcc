"""First frames of a link, from either side: who it is, what pool it offers, and the proof.

`greet` is for the side that connected, `receive_hello` and then `answer` for the other one.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from pdserve.core.errors import ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.serve.links import Link, close_fds
from pdserve.transport.base import PoolExport
from pdserve.transport.handshake import (
    NONCE_BYTES,
    Challenge,
    Hello,
    PoolOffer,
    Welcome,
    check_hello,
    check_welcome,
    prove,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this side of a link is. ``role`` is None for the gateway; the secret is never shown;
    ``family`` as in `Hello`."""

    worker: WorkerId
    epoch: Epoch
    role: Role | None
    secret: bytes = field(repr=False)
    family: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who proved to be on the other side, and the pool that it offers."""

    worker: WorkerId
    epoch: Epoch
    role: Role | None
    pool: PoolExport | None
    family: str = ""


async def greet(link: Link, identity: Identity, pool: PoolExport | None) -> Peer:
    """First frames, from the side that connected. Takes the descriptors of ``pool``.

    Raises `ProtocolError` if the other side does not prove itself; the link is closed then.
    """
    asked = await _challenge(link) if link.is_remote else b""
    hello = prove(
        Hello(
            worker=identity.worker,
            epoch=identity.epoch,
            role=identity.role,
            family=identity.family,
            pool=None if pool is None else PoolOffer.of(pool),
            nonce=secrets.token_bytes(NONCE_BYTES),
            answers=asked,
        ),
        identity.secret,
    )
    _send_with_pool(link, hello, pool)
    frame, fds = await link.first_frame()
    try:
        return _peer(check_welcome(frame, identity.secret, hello), fds)
    except ProtocolError as error:
        close_fds(fds)
        link.close(str(error))
        raise


async def _challenge(link: Link) -> bytes:
    frame, fds = await link.first_frame()
    close_fds(fds)
    if not isinstance(frame, Challenge) or fds:
        link.close("no challenge")
        raise ProtocolError("what listens there sends no challenge")
    link.read_on()
    return frame.nonce


async def receive_hello(link: Link, identity: Identity) -> tuple[Hello, Peer]:
    """The other side's hello, checked. Raises `ProtocolError`; the link is closed then."""
    asked = secrets.token_bytes(NONCE_BYTES) if link.is_remote else b""
    if asked:
        link.send(Challenge(nonce=asked))
    frame, fds = await link.first_frame()
    try:
        hello = check_hello(frame, identity.secret, asked)
        return hello, _peer(hello, fds)
    except ProtocolError as error:
        close_fds(fds)
        link.close(str(error))
        raise


def answer(link: Link, identity: Identity, hello: Hello, pool: PoolExport | None) -> None:
    """Send the welcome to a hello that was accepted. Takes the descriptors of ``pool``."""
    welcome = prove(
        Welcome(
            worker=identity.worker,
            epoch=identity.epoch,
            role=identity.role,
            family=identity.family,
            pool=None if pool is None else PoolOffer.of(pool),
            nonce=secrets.token_bytes(NONCE_BYTES),
            answers=hello.nonce,
        ),
        identity.secret,
    )
    _send_with_pool(link, welcome, pool)


def _send_with_pool(link: Link, frame: Hello | Welcome, pool: PoolExport | None) -> None:
    fds = () if pool is None else pool.fds
    try:
        link.send(frame, fds)
    finally:
        close_fds(fds)


def _peer(frame: Hello | Welcome, fds: tuple[int, ...]) -> Peer:
    if frame.pool is None and fds:
        raise ProtocolError(f"{frame.worker} sent descriptors and offers no pool")
    pool = None if frame.pool is None else frame.pool.export(fds)
    return Peer(
        worker=frame.worker, epoch=frame.epoch, role=frame.role, pool=pool, family=frame.family
    )
