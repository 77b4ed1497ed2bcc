"""Workers that other hosts bring: the gateway's side, and who asks what of which process.

A host makes a link, proves the cluster secret and asks to join (``transport.joining``). It must
have the weights that are served here, and an id that nobody else has now. Then its worker has a
slot like any other: it gets an epoch, newer than all before, and its process makes a link of its
own. If the host's link closes, its worker counts as gone: what a process says that nobody can be
sure of is not heard, and what it writes does not land. When the host comes back, with the same id,
it gets the next epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.core.errors import PdserveError
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.serve.gateway import Supervisor
from pdserve.serve.greetings import Peer
from pdserve.serve.links import Link
from pdserve.serve.start import WorkerStart
from pdserve.transport.joining import (
    EndProcess,
    Join,
    Joined,
    Leave,
    NotJoined,
    ProcessBegan,
    ProcessEnded,
)
from pdserve.transport.wire import WireMessage

log = logging.getLogger(__name__)

KILL_GRACE_S = 2.0
"""How long a host may take to kill a process before its link is closed for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestEvents:
    """Who hears of guests, and who knows what they must be.

    ``digest`` names the weights that are served here. ``start`` is what a new process is told.
    ``came``, ``ended`` and ``left`` follow a slot and its processes. ``drain`` returns when the
    worker holds nothing, or raises `PdserveError`.
    """

    digest: Callable[[], Awaitable[str]]
    start: Callable[[WorkerId, Epoch, Role], WorkerStart]
    came: Callable[[WorkerId, Role, str], None]
    ended: Callable[[WorkerId, Epoch, str], None]
    left: Callable[[WorkerId], None]
    drain: Callable[[WorkerId], Awaitable[object]]


@dataclass(slots=True, eq=False)
class _Guest:
    """A slot of a guest. ``link`` is its host's, ``runs`` says if it has a process now."""

    worker: WorkerId
    role: Role
    epoch: Epoch
    link: Link | None = None
    runs: bool = False
    pid: int = 0


class Guests:
    """All of them. On the event loop's thread only. Implements `Supervisor` for their slots."""

    def __init__(self, own: Sequence[WorkerId], events: GuestEvents) -> None:
        """``own``: ids that no guest may have."""
        self._own = frozenset((GATEWAY, *own))
        self._events = events
        self._guests: dict[WorkerId, _Guest] = {}
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def joining(self, link: Link, peer: Peer) -> None:
        """A host has proved itself; what it wants, it says next."""
        self._links.add(link)
        link.open(
            lambda message: self._on_message(link, peer.worker, message),
            lambda reason: self._on_end(link, peer.worker, reason),
        )

    def close(self) -> None:
        """Close every link, which ends the workers. Nobody hears of it."""
        self._guests = {}
        for task in self._tasks:
            task.cancel()
        for link in list(self._links):
            link.close("the gateway stops")

    # --- Supervisor ---------------------------------------------------------------------------

    def expects(self, worker: WorkerId, epoch: Epoch) -> bool:
        guest = self._guests.get(worker)
        return guest is not None and guest.runs and guest.epoch == epoch

    def ready(self, worker: WorkerId, epoch: Epoch) -> None:
        """Nothing depends on it here: its host starts it again."""

    def kill(self, worker: WorkerId, epoch: Epoch) -> None:
        guest = self._guests.get(worker)
        if guest is None or not guest.runs or guest.epoch != epoch or guest.link is None:
            return
        guest.link.send(EndProcess(epoch=epoch))
        asyncio.get_running_loop().call_later(KILL_GRACE_S, self._give_up, guest, epoch)

    def slots(self) -> Sequence[tuple[WorkerId, Epoch, int | None]]:
        return tuple(
            (guest.worker, guest.epoch, guest.pid if guest.runs else None)
            for guest in self._guests.values()
        )

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        """Its host starts it again, by its own rule."""

    def release(self) -> None:
        """As `hold`."""

    # --- inside -------------------------------------------------------------------------------

    def _on_message(self, link: Link, worker: WorkerId, message: WireMessage) -> None:
        guest = self._guests.get(worker)
        is_its = guest is not None and guest.link is link
        match message:
            case Join() if message.worker == worker:
                self._spawn(self._join(link, message))
            case ProcessBegan(epoch=epoch, pid=pid) if guest and is_its and guest.epoch == epoch:
                guest.pid = pid
            case ProcessEnded(epoch=epoch, detail=detail) if guest and is_its:
                if guest.epoch == epoch:
                    self._ended(guest, detail)
            case Leave() if guest and is_its:
                log.info("%s wants to leave", guest.worker)
                if guest.runs:
                    self._spawn(self._see_off(guest, link))
                else:
                    self._let_go(guest, link)
            case _:
                link.close(f"it sent a {type(message).__name__} out of turn")

    async def _join(self, link: Link, asked: Join) -> None:
        try:
            digest = await self._events.digest()
        except PdserveError as error:
            link.send(NotJoined(detail=str(error), is_final=True))
            return
        guest = self._guests.get(asked.worker)
        refusal = None
        if asked.worker in self._own:
            refusal = NotJoined(
                detail=f"{asked.worker} is a worker of the server's own host; choose another --id",
                is_final=True,
            )
        elif asked.weights_digest != digest:
            refusal = NotJoined(
                detail=f"other weights: {asked.weights_digest} there, {digest} here; give the "
                "host the same model files",
                is_final=True,
            )
        elif guest is not None and guest.link not in (None, link):
            refusal = NotJoined(
                detail=f"another host takes part as {asked.worker} until its link closes; if both "
                "are to take part, give one of them another --id",
                is_final=False,
            )
        if refusal is not None:
            log.warning("%s may not join: %s", asked.worker, refusal.detail)
            link.send(refusal)
        elif not link.is_closed:
            self._let_in(link, asked)

    def _let_in(self, link: Link, asked: Join) -> None:
        guest = self._guests.setdefault(asked.worker, _Guest(asked.worker, asked.role, Epoch(0)))
        if guest.runs:
            self._ended(guest, "its host asked for the next one")
        guest.link, guest.role = link, asked.role
        guest.epoch = Epoch(guest.epoch + 1)
        guest.runs, guest.pid = True, 0
        log.info("%s joins from %s: process %d", asked.worker, link.remote_host, guest.epoch)
        self._events.came(asked.worker, asked.role, link.remote_host)
        start = self._events.start(asked.worker, guest.epoch, asked.role)
        link.send(Joined(epoch=guest.epoch, start=start.encode()))

    async def _see_off(self, guest: _Guest, link: Link) -> None:
        try:
            await self._events.drain(guest.worker)
        except PdserveError as error:
            log.warning("%s could not be drained: %s", guest.worker, error)
        if self._guests.get(guest.worker) is guest and guest.link is link:
            self._let_go(guest, link)

    def _let_go(self, guest: _Guest, link: Link) -> None:
        self._ended(guest, "it has left")
        link.send(EndProcess(epoch=guest.epoch))
        del self._guests[guest.worker]
        self._events.left(guest.worker)

    def _on_end(self, link: Link, worker: WorkerId, reason: str) -> None:
        self._links.discard(link)
        guest = self._guests.get(worker)
        if guest is None or guest.link is not link:
            return
        log.warning("the host of %s is gone: %s", worker, reason)
        guest.link = None
        self._ended(guest, f"link to its host: {reason}")

    def _give_up(self, guest: _Guest, epoch: Epoch) -> None:
        if guest.runs and guest.epoch == epoch and guest.link is not None:
            guest.link.close("it does not end its process")

    def _ended(self, guest: _Guest, detail: str) -> None:
        if guest.runs:
            guest.runs = False
            self._events.ended(guest.worker, guest.epoch, detail)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Supervisors:
    """Those of several kinds of slots, as one. Implements `Supervisor`."""

    def __init__(self, *parts: Supervisor) -> None:
        self._parts = parts

    def expects(self, worker: WorkerId, epoch: Epoch) -> bool:
        return self._of(worker).expects(worker, epoch)

    def ready(self, worker: WorkerId, epoch: Epoch) -> None:
        self._of(worker).ready(worker, epoch)

    def kill(self, worker: WorkerId, epoch: Epoch) -> None:
        self._of(worker).kill(worker, epoch)

    def slots(self) -> Sequence[tuple[WorkerId, Epoch, int | None]]:
        return tuple(slot for part in self._parts for slot in part.slots())

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        self._of(worker).hold(worker, for_s)

    def release(self) -> None:
        for part in self._parts:
            part.release()

    def _of(self, worker: WorkerId) -> Supervisor:
        """Whose slot it is; the last one's, if it is nobody's."""
        for part in self._parts:
            if any(slot[0] == worker for slot in part.slots()):
                return part
        return self._parts[-1]
