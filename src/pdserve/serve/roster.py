"""The gateway's end of the control links: who has come, who is up, who can be told something.

A worker process says hello as soon as it runs, `Reachable` once it takes links of other workers,
and `WorkerUp` once it can serve. Only a process that was started and has not ended is let in
(``expects``). A host that brings a worker says hello with epoch 0, and is handed to ``joining``.
With each worker that comes or goes, all that are up are told anew who their peers are, and a worker
hears of its peers before it can be sent a job that names them. A worker whose link breaks is of no
use any more: ``unlinked`` hears of it, and has the process killed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from pdserve.core.effects import WorkerUp
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.messages import Message
from pdserve.serve.greetings import Identity, Peer, answer, receive_hello
from pdserve.serve.links import Link, Listener, close_fds
from pdserve.transport.link_faults import LinkFaults
from pdserve.transport.peers import PeerAddress, Peers, Reachable
from pdserve.transport.tls import Tls
from pdserve.transport.wire import WireMessage

log = logging.getLogger(__name__)

HOST_EPOCH = Epoch(0)
"""With which a host says hello that brings a worker; processes count from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterEvents:
    """Who hears of the workers, on the event loop's thread.

    ``expects``: should there be such a process?
    """

    expects: Callable[[WorkerId, Epoch], bool]
    up: Callable[[WorkerUp], None]
    received: Callable[[WorkerId, Epoch, Message], None]
    unlinked: Callable[[WorkerId, Epoch, str], None]


def _no_guests(link: Link, peer: Peer) -> None:
    link.close("this server takes no workers of other hosts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """How workers of other hosts come in: where they find the gateway, inside TLS if there is any,
    and who gets the link of a host that brings one, once it has proved itself."""

    listen: tuple[str, int] | None = None
    tls: Tls | None = None
    joining: Callable[[Link, Peer], None] = _no_guests


@dataclass(slots=True, eq=False)
class _Member:
    """One worker process with a link."""

    worker: WorkerId
    epoch: Epoch
    family: str
    link: Link
    addresses: tuple[str, ...] = ()
    is_up: bool = False


class Roster:
    """Links to all workers of one gateway. Used on the event loop's thread only."""

    def __init__(
        self, address: str, identity: Identity, events: RosterEvents, outside: Outside
    ) -> None:
        self._identity = identity
        self._events = events
        self._joining = outside.joining
        self._members: dict[WorkerId, _Member] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults = LinkFaults(())
        self._listener = Listener(
            address,
            lambda link: self._spawn(self._greet(link)),
            listen=outside.listen,
            tls=outside.tls,
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it is found."""
        return self._listener.addresses

    def send(self, worker: WorkerId, message: Message) -> None:
        """Send to a worker that is up; dropped if it is not."""
        member = self._members.get(worker)
        if member is not None and member.is_up:
            member.link.send(message)

    def set_faults(self, faults: LinkFaults) -> None:
        """What is wrong with links on purpose: all hear of it, also those that come later."""
        self._faults = faults
        for member in self._members.values():
            if member.is_up:
                member.link.send(faults)

    def remove(self, worker: WorkerId, epoch: Epoch) -> None:
        """The process has ended: close its link, tell the others."""
        member = self._members.get(worker)
        if member is not None and member.epoch == epoch:
            del self._members[worker]
            member.link.close("the process has ended")
            if member.is_up:
                self._tell_peers()

    def close(self) -> None:
        """Close every link, which tells each worker to end. Nobody hears of it."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        members, self._members = self._members, {}
        for member in members.values():
            member.link.close("the gateway stops")

    async def _greet(self, link: Link) -> None:
        try:
            hello, peer = await receive_hello(link, self._identity)
            if peer.pool is not None:
                close_fds(peer.pool.fds)
            if peer.epoch == HOST_EPOCH and peer.role is not None:
                answer(link, self._identity, hello, None)
                self._joining(link, peer)
                return
            if peer.worker in self._members or not self._events.expects(peer.worker, peer.epoch):
                raise ProtocolError(f"process {peer.epoch} of {peer.worker} is not expected")
            answer(link, self._identity, hello, None)
        except ProtocolError as error:
            link.close(str(error))
            log.warning("a link from %s was refused: %s", link.remote_host, error)
            return
        except asyncio.CancelledError:
            link.close("the gateway stops")
            raise
        member = _Member(peer.worker, peer.epoch, peer.family, link)
        self._members[peer.worker] = member
        link.open(
            lambda message: self._on_message(member, message),
            lambda reason: self._on_end(member, reason),
        )

    def _on_message(self, member: _Member, message: WireMessage) -> None:
        if self._members.get(member.worker) is not member:
            return
        if member.is_up and isinstance(message, Message):
            self._events.received(member.worker, member.epoch, message)
        elif not member.is_up and isinstance(message, Reachable):
            member.addresses = message.addresses
        elif not member.is_up and isinstance(message, WorkerUp) and _is_of(message, member):
            member.is_up = True
            self._tell_peers()
            self._events.up(message)
        else:
            member.link.close(f"it sent a {type(message).__name__} out of turn")

    def _on_end(self, member: _Member, reason: str) -> None:
        if self._members.get(member.worker) is not member:
            return
        del self._members[member.worker]
        if member.is_up:
            self._tell_peers()
        self._events.unlinked(member.worker, member.epoch, reason)

    def _tell_peers(self) -> None:
        members = [member for member in self._members.values() if member.is_up]
        peers = Peers(
            tuple(
                PeerAddress(
                    worker=member.worker,
                    epoch=member.epoch,
                    addresses=member.addresses,
                    family=member.family,
                )
                for member in sorted(members, key=lambda member: member.worker)
            )
        )
        for member in members:
            if self._faults.faults:
                member.link.send(self._faults)
            member.link.send(peers)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_of(up: WorkerUp, member: _Member) -> bool:
    return (up.worker, up.epoch) == (member.worker, member.epoch)
