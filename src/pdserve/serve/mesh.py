"""A worker's links to all other workers: one for each pair, made anew while both are there.

The gateway says who is up (`Peers`). Of each pair the worker with the smaller id connects and, if
the link breaks while the gateway still counts both as up, connects again. A link counts from the
moment at which both have proved themselves and the peer's KV pool is attached; attaching maps a lot
of memory and is done beside the event loop.

What is sent to a peer that is up but not linked (yet) waits, within a bound, for the link; if the
link does not come the peer is reported lost, so that nobody waits for an answer to a message that
never left. A newer process of a peer replaces the older one and its link. The peer's pool stays
attached while its process is the current one, also over a broken link: transfers that were under
way may be written on until the machine stops them.

For those who want to see what follows, the gateway may have links fail (`LinkFaults`): one that is
cut is closed and not made again until it is healed, one that is slow is slow where KV is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.errors import ProtocolError, TransferError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.messages import Message
from pdserve.serve.greetings import (
    Identity,
    Peer,
    answer,
    greet,
    receive_hello,
)
from pdserve.serve.links import Link, close_fds, connect
from pdserve.transport.base import Pool, PoolExport, RemotePool, Transport, Writer
from pdserve.transport.link_faults import LinkFaults
from pdserve.transport.peers import LINK_TIMEOUT_S, Peers
from pdserve.transport.progress import LayersWritten
from pdserve.transport.tls import Tls
from pdserve.transport.wire import WireMessage

log = logging.getLogger(__name__)

MAX_WAITING_MESSAGES = 4096
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshEvents:
    """Who hears of the mesh, on the event loop's thread."""

    received: Callable[[WorkerId, Epoch, Message], None]
    written: Callable[[LayersWritten], None]
    up: Callable[[WorkerId, Epoch], None]
    lost: Callable[[WorkerId, Epoch], None]


@dataclass(slots=True, eq=False)
class _Entry:
    """One process of a peer. ``addresses`` are empty until the gateway has named it."""

    worker: WorkerId
    epoch: Epoch
    addresses: tuple[str, ...] = ()
    family: str = ""
    link: Link | None = None
    remote: RemotePool | None = None
    remote_bytes: int = 0
    waiting: list[Message] = field(default_factory=list)
    failures: int = 0
    dialling: bool = False
    timer: asyncio.TimerHandle | None = None
    deadline: asyncio.TimerHandle | None = None


class Mesh:
    """Links of one worker. Used on the event loop's thread only."""

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        pool: Pool | None,
        events: MeshEvents,
        tls: Tls | None = None,
    ) -> None:
        """``pool`` is what peers may write into; None for a worker that hands over messages.
        ``tls`` is for links to other hosts."""
        self._identity = identity
        self._transport = transport
        self._pool = pool
        self._events = events
        self._tls = tls
        self._entries: dict[WorkerId, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults: dict[WorkerId, float | None] = {}
        self._closed = False

    # --- what the driver asks -----------------------------------------------------------------

    def set_peers(self, peers: Peers) -> None:
        """The gateway's word on who is up: let go of others, connect to new ones."""
        named = {peer.worker: peer for peer in peers.workers}
        named.pop(self._identity.worker, None)
        for entry in list(self._entries.values()):
            peer = named.get(entry.worker)
            # An entry without address is a peer of which the gateway's word is still on its way.
            if (peer is None and entry.addresses) or (peer and peer.epoch > entry.epoch):
                self._drop(entry, "the gateway counts it as gone")
        for peer in named.values():
            entry = self._entries.setdefault(peer.worker, _Entry(peer.worker, peer.epoch))
            if entry.epoch == peer.epoch and not entry.addresses:
                entry.addresses, entry.family = peer.addresses, peer.family
                self._dial(entry)

    def set_faults(self, faults: LinkFaults) -> None:
        """What is wrong with links on purpose, from now on."""
        before, self._faults = self._faults, faults.of(self._identity.worker)
        for entry in list(self._entries.values()):
            if self._is_cut(entry.worker):
                if entry.link is not None:
                    log.warning("link to %s cut on purpose", entry.worker)
                self._unlink(entry, "cut on purpose")
            elif before.get(entry.worker, 1.0) is None and entry.addresses:
                self._dial(entry)

    def slowness(self, worker: WorkerId) -> float:
        """How many times slower than it is the link to a peer is to be. From any thread."""
        return self._faults.get(worker, 1.0) or 1.0

    def send(self, worker: WorkerId, message: Message) -> None:
        """Send, or keep for the link that is to come. Dropped if there is no such peer."""
        entry = self._entries.get(worker)
        if entry is None:
            return
        if entry.link is not None:
            entry.link.send(message)
            return
        entry.waiting.append(message)
        if entry.deadline is None:
            loop = asyncio.get_running_loop()
            entry.deadline = loop.call_later(LINK_TIMEOUT_S, self._give_up, entry)
        if len(entry.waiting) > MAX_WAITING_MESSAGES:
            self._give_up(entry)

    def tell(self, worker: WorkerId, news: LayersWritten) -> None:
        """Send a hint over the link; without one it is dropped."""
        entry = self._entries.get(worker)
        if entry is not None and entry.link is not None:
            entry.link.send(news)

    def remote(self, worker: WorkerId, epoch: Epoch) -> tuple[RemotePool, int] | None:
        """The attached pool of this process of the peer and its size in bytes, if there is one."""
        entry = self._entries.get(worker)
        if entry is None or entry.epoch != epoch or entry.remote is None:
            return None
        return entry.remote, entry.remote_bytes

    def accepted(self, link: Link) -> None:
        """A link came in on the listener; it has proved nothing yet."""
        self._spawn(self._answer(link))

    def close(self) -> None:
        """Close every link, without a word to the machine."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for entry in list(self._entries.values()):
            self._drop(entry, "closing")

    # --- making links -------------------------------------------------------------------------

    def _dial(self, entry: _Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        is_ours = self._identity.worker < entry.worker and not self._is_cut(entry.worker)
        if is_ours and not entry.dialling and self._is_current(entry):
            entry.dialling = True
            self._spawn(self._connect(entry))

    async def _connect(self, entry: _Entry) -> None:
        try:
            link = await connect(entry.addresses, self._tls)
            try:
                export = self._export(entry.worker, entry.epoch, entry.family)
                peer = await greet(link, self._identity, export)
                await self._establish(link, peer)
            except BaseException:
                link.close("the greeting was broken off")
                raise
        except (OSError, ProtocolError, TransferError) as error:
            log.warning("no link to %s: %s", entry.worker, error)
        finally:
            entry.dialling = False
        if entry.link is None:
            self._retry(entry)

    async def _answer(self, link: Link) -> None:
        try:
            hello, peer = await receive_hello(link, self._identity)
            try:
                self._check(peer)
                export = self._export(peer.worker, peer.epoch, peer.family)
                answer(link, self._identity, hello, export)
            except (ProtocolError, TransferError):
                close_fds(() if peer.pool is None else peer.pool.fds)
                raise
            await self._establish(link, peer)
        except (ProtocolError, TransferError) as error:
            link.close(str(error))
            log.warning("a link from %s was refused: %s", link.remote_host, error)
        except asyncio.CancelledError:
            link.close("closing")
            raise

    def _check(self, peer: Peer) -> None:
        if peer.role is None or not peer.worker < self._identity.worker:
            raise ProtocolError(f"{peer.worker} is not one to connect here")
        self._refuse_if_cut(peer)
        entry = self._entries.get(peer.worker)
        if entry is not None and entry.epoch > peer.epoch:
            raise ProtocolError(f"process {peer.epoch} of {peer.worker} has been replaced")

    async def _establish(self, link: Link, peer: Peer) -> None:
        """Attach the peer's pool, then let the link count."""
        entry = self._entries.get(peer.worker)
        remote = entry.remote if entry is not None and entry.epoch == peer.epoch else None
        num_bytes = 0 if peer.pool is None else peer.pool.num_bytes
        if peer.pool is not None and remote is None:
            remote = await asyncio.to_thread(self._attach, peer.pool)
        elif peer.pool is not None:
            close_fds(peer.pool.fds)
        self._refuse_if_cut(peer)
        entry = self._entries.get(peer.worker)
        if entry is not None and entry.epoch > peer.epoch:
            raise ProtocolError(f"process {peer.epoch} of {peer.worker} has been replaced")
        if entry is not None and entry.epoch < peer.epoch:
            self._drop(entry, "replaced by a newer process")
            entry = None
        if entry is None:
            entry = self._entries[peer.worker] = _Entry(peer.worker, peer.epoch)
        if entry.link is not None:
            self._unlink(entry, "replaced by a newer link")
        entry.link, entry.remote, entry.remote_bytes = link, remote, num_bytes
        self._opened(entry, link)

    def _is_cut(self, worker: WorkerId) -> bool:
        return self._faults.get(worker, 1.0) is None

    def _refuse_if_cut(self, peer: Peer) -> None:
        if self._is_cut(peer.worker):
            raise ProtocolError(f"the link to {peer.worker} is cut on purpose")

    def _export(self, worker: WorkerId, epoch: Epoch, family: str) -> PoolExport | None:
        if self._pool is None:
            return None
        is_kin = family == self._identity.family
        return self._pool.export(Writer(_writer_name(worker, epoch), is_kin))

    def _attach(self, export: PoolExport) -> RemotePool:
        return self._transport.attach(export)

    def _opened(self, entry: _Entry, link: Link) -> None:
        entry.failures = 0
        waiting, entry.waiting = entry.waiting, []
        self._cancel_timers(entry)
        for message in waiting:
            link.send(message)
        self._events.up(entry.worker, entry.epoch)
        link.open(
            lambda message: self._on_message(entry, link, message),
            lambda reason: self._on_end(entry, link, reason),
        )

    # --- hearing and losing -------------------------------------------------------------------

    def _on_message(self, entry: _Entry, link: Link, message: WireMessage) -> None:
        if entry.link is not link:
            return
        if isinstance(message, LayersWritten):
            self._events.written(message)
            return
        if not isinstance(message, Message):
            link.close(f"a {type(message).__name__} between workers")
            return
        self._events.received(entry.worker, entry.epoch, message)

    def _on_end(self, entry: _Entry, link: Link, reason: str) -> None:
        if entry.link is not link:
            return
        log.warning("link to %s (process %d) closed: %s", entry.worker, entry.epoch, reason)
        entry.link = None
        self._events.lost(entry.worker, entry.epoch)
        self._retry(entry)

    def _retry(self, entry: _Entry) -> None:
        if not self._is_current(entry) or entry.timer is not None or not entry.addresses:
            return
        pause_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**entry.failures)
        entry.failures += 1
        entry.timer = asyncio.get_running_loop().call_later(pause_s, self._dial, entry)

    def _give_up(self, entry: _Entry) -> None:
        """The link that messages wait for has not come."""
        if entry.deadline is not None:
            entry.deadline.cancel()
            entry.deadline = None
        if entry.waiting and self._is_current(entry):
            entry.waiting = []
            self._events.lost(entry.worker, entry.epoch)

    def _unlink(self, entry: _Entry, reason: str) -> None:
        """Close the entry's link, and report the peer as lost if there was one."""
        link, entry.link = entry.link, None
        if link is not None:
            link.close(reason)
            if not self._closed:
                self._events.lost(entry.worker, entry.epoch)

    def _drop(self, entry: _Entry, reason: str) -> None:
        """Forget this process of the peer. Nothing that it writes lands any more."""
        del self._entries[entry.worker]
        if self._pool is not None:
            self._pool.revoke(_writer_name(entry.worker, entry.epoch))
        self._cancel_timers(entry)
        self._unlink(entry, reason)
        if entry.remote is not None:
            entry.remote.close()

    def _is_current(self, entry: _Entry) -> bool:
        return self._entries.get(entry.worker) is entry

    def _cancel_timers(self, entry: _Entry) -> None:
        for timer in (entry.timer, entry.deadline):
            if timer is not None:
                timer.cancel()
        entry.timer = entry.deadline = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _writer_name(worker: WorkerId, epoch: Epoch) -> str:
    return f"{worker}/{epoch}"
