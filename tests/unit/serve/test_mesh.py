"""The mesh: one link per pair, remade while both are up, and no message waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pdserve.core.errors import ProtocolError
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import LeaseRenew, Message
from pdserve.core.request import Role
from pdserve.serve import mesh as mesh_module
from pdserve.serve.greetings import Identity, greet
from pdserve.serve.links import Link, Listener, connect, new_address
from pdserve.serve.mesh import Mesh, MeshEvents
from pdserve.transport.base import Region
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.link_faults import LinkFault, LinkFaults
from pdserve.transport.peers import PeerAddress, Peers
from pdserve.transport.progress import LayersWritten

SECRET = b"s" * 32
POOL_BYTES = 4096


def renew(number: int) -> LeaseRenew:
    return LeaseRenew(AttemptId(RequestId("r"), Epoch(number)))


class Node:
    """One worker's mesh, with what it heard in ``log``."""

    def __init__(self, hub: InprocHub, name: str, epoch: int = 1) -> None:
        self.name, self.epoch = WorkerId(name), Epoch(epoch)
        self.log: list[tuple[str, str, object]] = []
        self._news = asyncio.Event()
        transport = InprocTransport(hub)
        self.pool = transport.allocate(POOL_BYTES)
        identity = Identity(worker=self.name, epoch=self.epoch, role=Role.MIXED, secret=SECRET)
        events = MeshEvents(
            received=self._received, written=self._written, up=self._up, lost=self._lost
        )
        self.mesh = Mesh(identity, transport, self.pool, events)
        self.links: list[Link] = []
        self.listener = Listener(new_address(), self._accepted)

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(worker=self.name, epoch=self.epoch, addresses=self.listener.addresses)

    def _accepted(self, link: Link) -> None:
        self.links.append(link)
        self.mesh.accepted(link)

    def _received(self, worker: WorkerId, epoch: Epoch, message: Message) -> None:
        assert isinstance(message, LeaseRenew)
        self._note(("got", worker, message.attempt.epoch))

    def _written(self, news: LayersWritten) -> None:
        self._note(("written", WorkerId(""), news))

    def _up(self, worker: WorkerId, epoch: Epoch) -> None:
        self._note(("up", worker, epoch))

    def _lost(self, worker: WorkerId, epoch: Epoch) -> None:
        self._note(("lost", worker, epoch))

    def _note(self, entry: tuple[str, str, object]) -> None:
        self.log.append(entry)
        self._news.set()

    async def until(self, *entries: tuple[str, str, object]) -> None:
        """Wait until all entries are there, in this order among others."""
        while not self._has(list(entries)):
            self._news.clear()
            await self._news.wait()

    def _has(self, entries: list[tuple[str, str, object]]) -> bool:
        for entry in self.log:
            if entries and entry == entries[0]:
                entries.pop(0)
        return not entries

    def close(self) -> None:
        self.listener.close()
        self.mesh.close()
        self.pool.close()


def tell(*nodes: Node) -> None:
    peers = Peers(tuple(node.address for node in nodes))
    for node in nodes:
        node.mesh.set_peers(peers)


def run(work: Callable[[InprocHub], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(InprocHub()), 20)

    asyncio.run(bounded())


def test_three_workers_link_up_pair_by_pair_and_reach_each_others_pools() -> None:
    async def work(hub: InprocHub) -> None:
        nodes = [Node(hub, name) for name in ("a", "b", "c")]
        tell(*nodes)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    await node.until(("up", other.name, 1))
        assert [len(node.links) for node in nodes] == [0, 1, 2]  # the smaller id connects
        a, _, c = nodes
        found = a.mesh.remote(c.name, c.epoch)
        assert found is not None
        remote, num_bytes = found
        assert num_bytes == POOL_BYTES
        a.pool.memory[:3] = b"abc"
        remote.write(a.pool.memory, [Region(0, 100, 3)])
        assert bytes(c.pool.memory[100:103]) == b"abc"
        assert a.mesh.remote(c.name, Epoch(2)) is None
        for node in nodes:
            node.close()

    run(work)


def test_what_is_sent_before_the_link_is_there_arrives_first_and_in_order() -> None:
    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a"), Node(hub, "b")
        tell(a, b)
        for number in range(1, 4):
            a.mesh.send(b.name, renew(number))
            b.mesh.send(a.name, renew(number))
        await a.until(("up", "b", 1), ("got", "b", 1), ("got", "b", 2), ("got", "b", 3))
        await b.until(("up", "a", 1), ("got", "a", 1), ("got", "a", 2), ("got", "a", 3))
        a.close()
        b.close()

    run(work)


def test_a_hint_goes_over_the_link_and_is_dropped_without_one() -> None:
    news = LayersWritten(
        attempt=renew(1).attempt, first_block=0, num_blocks=1, first_layer=0, num_layers=2
    )

    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a"), Node(hub, "b")
        a.mesh.tell(b.name, news)
        tell(a, b)
        a.mesh.tell(b.name, news)
        await a.until(("up", "b", 1))
        await b.until(("up", "a", 1))
        a.mesh.tell(b.name, news)
        a.mesh.send(b.name, renew(1))
        await b.until(("written", "", news), ("got", "a", 1))
        assert b.log.count(("written", "", news)) == 1
        a.close()
        b.close()

    run(work)


def test_a_broken_link_is_told_to_both_and_made_again() -> None:
    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a"), Node(hub, "b")
        tell(a, b)
        await a.until(("up", "b", 1))
        await b.until(("up", "a", 1))
        kept = a.mesh.remote(b.name, b.epoch)
        b.links[0].close("cut by the test")
        await a.until(("up", "b", 1), ("lost", "b", 1), ("up", "b", 1))
        await b.until(("up", "a", 1), ("lost", "a", 1), ("up", "a", 1))
        assert a.mesh.remote(b.name, b.epoch) == kept  # the same process: still the same pool
        b.mesh.send(a.name, renew(9))
        await a.until(("got", "b", 9))
        a.close()
        b.close()

    run(work)


def test_a_newer_process_replaces_the_older_one() -> None:
    async def work(hub: InprocHub) -> None:
        a, old = Node(hub, "a"), Node(hub, "b")
        tell(a, old)
        await a.until(("up", "b", 1))
        new = Node(hub, "b", epoch=2)
        tell(a, new)
        await a.until(("up", "b", 1), ("lost", "b", 1), ("up", "b", 2))
        assert a.mesh.remote(WorkerId("b"), Epoch(1)) is None
        a.mesh.send(new.name, renew(5))
        await new.until(("got", "a", 5))
        assert ("got", "a", 5) not in old.log
        for node in (a, old, new):
            node.close()

    run(work)


def test_a_peer_that_connects_before_the_gateways_word_is_kept_and_an_older_one_refused() -> None:
    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a", epoch=2), Node(hub, "b")
        a.mesh.set_peers(Peers((a.address, b.address)))  # b has not heard yet
        await b.until(("up", "a", 2))
        b.mesh.set_peers(Peers((b.address,)))  # older word, on its way while a came up
        b.mesh.set_peers(Peers((a.address, b.address)))
        zombie = await connect(b.listener.address)
        identity = Identity(worker=a.name, epoch=Epoch(1), role=Role.MIXED, secret=SECRET)
        with pytest.raises(Exception, match="closed by the peer"):
            await greet(zombie, identity, None)
        a.mesh.send(b.name, renew(1))
        await b.until(("got", "a", 1))
        assert ("lost", "a", 2) not in b.log
        a.close()
        b.close()

    run(work)


@pytest.mark.parametrize(("name", "role"), [("z", Role.MIXED), ("a", None)])
def test_who_should_not_connect_is_refused(name: str, role: Role | None) -> None:
    async def work(hub: InprocHub) -> None:
        b = Node(hub, "b")
        link = await connect(b.listener.address)
        identity = Identity(worker=WorkerId(name), epoch=Epoch(1), role=role, secret=SECRET)
        with pytest.raises(Exception, match="closed by the peer"):
            await greet(link, identity, None)
        assert b.log == []
        b.close()

    run(work)


def test_a_peer_that_the_gateway_counts_as_gone_is_let_go_and_sent_nothing() -> None:
    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a"), Node(hub, "b")
        tell(a, b)
        await a.until(("up", "b", 1))
        await b.until(("up", "a", 1))
        a.mesh.set_peers(Peers((a.address,)))
        await a.until(("lost", "b", 1))
        assert a.mesh.remote(b.name, b.epoch) is None
        a.mesh.send(b.name, renew(1))
        await b.until(("lost", "a", 1))
        assert ("got", "a", 1) not in b.log
        a.close()
        b.close()

    run(work)


def test_nobody_waits_for_a_link_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "LINK_TIMEOUT_S", 0.01)

    async def work(hub: InprocHub) -> None:
        a, b = Node(hub, "a"), Node(hub, "b")
        b.listener.close()
        a.mesh.set_peers(Peers((a.address, b.address)))
        a.mesh.send(b.name, renew(1))
        await a.until(("lost", "b", 1))
        a.mesh.send(b.name, renew(2))
        await a.until(("lost", "b", 1), ("lost", "b", 1))
        a.close()
        b.close()

    run(work)


def test_a_link_that_is_cut_stays_down_until_it_is_healed_and_no_other_is_touched() -> None:
    cut = LinkFaults((LinkFault(one=WorkerId("b"), other=WorkerId("a"), factor=None),))

    async def work(hub: InprocHub) -> None:
        a, b, c = nodes = [Node(hub, name) for name in ("a", "b", "c")]
        tell(*nodes)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    await node.until(("up", other.name, 1))
        for node in nodes:
            node.mesh.set_faults(cut)
        await a.until(("lost", "b", 1))
        await b.until(("lost", "a", 1))
        a.mesh.send(b.name, renew(1))  # waits for the link
        a.mesh.send(c.name, renew(2))
        await c.until(("got", "a", 2))
        assert ("lost", "a", 1) not in c.log
        stranger = await connect(b.listener.address)  # who does not know of it is turned away
        identity = Identity(worker=a.name, epoch=a.epoch, role=Role.MIXED, secret=SECRET)
        with pytest.raises(ProtocolError):
            await greet(stranger, identity, None)
        for node in nodes:
            node.mesh.set_faults(LinkFaults(()))
        await a.until(("lost", "b", 1), ("up", "b", 1))
        await b.until(("lost", "a", 1), ("up", "a", 1), ("got", "a", 1))
        for node in nodes:
            node.close()

    run(work)


def test_a_link_that_is_slow_says_so_to_its_ends_alone() -> None:
    slow = LinkFaults((LinkFault(one=WorkerId("a"), other=WorkerId("b"), factor=3.0),))

    async def work(hub: InprocHub) -> None:
        a, b, c = nodes = [Node(hub, name) for name in ("a", "b", "c")]
        for node in nodes:
            node.mesh.set_faults(slow)
        assert (a.mesh.slowness(b.name), b.mesh.slowness(a.name)) == (3.0, 3.0)
        assert (a.mesh.slowness(c.name), c.mesh.slowness(b.name)) == (1.0, 1.0)
        tell(*nodes)
        await a.until(("up", "b", 1))
        for node in nodes:
            node.close()

    run(work)
