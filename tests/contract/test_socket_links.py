"""KV over sockets when the network misbehaves: nothing lands twice, late, or where it may not."""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from pdserve.core.errors import TransferError
from pdserve.transport import native
from pdserve.transport.addresses import split_host_port, tcp_address
from pdserve.transport.base import Pool, PoolExport, Region, RemotePool, Writer
from pdserve.transport.tcp import SocketOptions, SocketTransport
from pdserve.transport.tls import Tls, load_tls, tls_files

SIZE = 1 << 20
SECRET = b"s" * 32
PEER = Writer("prefill-0/1", False)


class Cable:
    """Forwards TCP connections, and can be cut, held and healed. Counts what went through."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._lock = threading.Condition()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._held = False
        self._down = False
        self._cut_after: int | None = None
        self.num_bytes = 0
        self.num_links = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Every connection breaks; new ones break too until `heal`."""
        with self._lock:
            self._down = True
            self._break_all()

    def cut_after(self, num_bytes: int) -> None:
        """Break the connections once so many bytes more went to the receiver. New ones are fine."""
        with self._lock:
            self._cut_after = self.num_bytes + num_bytes

    def hold(self) -> None:
        """Nothing arrives any more; what is sent waits in buffers."""
        with self._lock:
            self._held = True

    def heal(self) -> None:
        """New connections work, what was held arrives."""
        with self._lock:
            self._down = self._held = False
            self._lock.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._break_all()
            self._held = False
            self._lock.notify_all()
        self._listening.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _break_all(self) -> None:
        for pair in self._pairs:
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has ended by itself
        self._pairs = []

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                if self._down or self._closed:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self.num_links += 1
                self._pairs.append((near, far))
            thread = threading.Thread(target=self._carry, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        with near, far:
            while True:
                for end in select.select([near, far], [], [])[0]:
                    try:
                        data = end.recv(4096)
                        if not data or not self._let_through(data, to_far=end is near):
                            return
                        other[end].sendall(data)
                    except OSError:
                        return

    def _let_through(self, data: bytes, to_far: bool) -> bool:
        with self._lock:
            self._lock.wait_for(lambda: not self._held)
            if to_far:
                self.num_bytes += len(data)
                if self._cut_after is not None and self.num_bytes >= self._cut_after:
                    self._cut_after = None
                    self._break_all()
                    return False
        return True


@dataclass
class Scene:
    cable: Cable
    pool: Pool
    remote: RemotePool
    source: memoryview
    attach: Callable[[], RemotePool]


def through(export: PoolExport, cable: Cable) -> PoolExport:
    """The export, with the cable's end in place of the pool's own addresses."""
    pool, _, writer = msgspec.msgpack.decode(export.token)
    token = msgspec.msgpack.encode([pool, [tcp_address("127.0.0.1", cable.port)], writer])
    return replace(export, token=token)


def port_in(export: PoolExport) -> tuple[str, int]:
    _, addresses, _ = msgspec.msgpack.decode(export.token)
    return split_host_port(addresses[1].removeprefix("tcp://"), "address")


@pytest.fixture(params=[1, 3])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    options = SocketOptions(
        secret=SECRET, listen=("127.0.0.1", 0), num_streams=request.param, stall_s=0.2
    )
    owner, writer = SocketTransport(options), SocketTransport(options)
    pool, source = owner.allocate(4 * SIZE), writer.allocate(4 * SIZE)
    source.memory[:] = random.Random(3).randbytes(4 * SIZE)
    cable = Cable(port_in(pool.export(PEER)))

    def attach() -> RemotePool:
        return writer.attach(through(pool.export(PEER), cable))

    scene = Scene(cable, pool, attach(), source.memory, attach)
    yield scene
    scene.remote.close()
    pool.close()
    source.close()
    cable.close()


def settled(remote: RemotePool) -> threading.Event:
    event = threading.Event()
    remote.settle(event.set)
    return event


def test_a_link_that_breaks_in_mid_write_is_made_again_and_the_write_is_whole(scene: Scene) -> None:
    scene.cable.cut_after(SIZE)
    scene.remote.write(scene.source, [Region(0, 0, 4 * SIZE)])
    assert scene.pool.memory == scene.source
    assert settled(scene.remote).is_set()


def test_a_write_that_fails_settles_only_when_the_link_is_back(scene: Scene) -> None:
    scene.cable.cut()
    with pytest.raises(TransferError, match="broke"):
        scene.remote.write(scene.source, [Region(0, 0, SIZE)])
    waiting = settled(scene.remote)
    assert not waiting.is_set()
    with pytest.raises(TransferError, match="not made again yet"):
        scene.remote.write(scene.source, [Region(0, 0, 8)])
    scene.cable.heal()
    assert waiting.wait(30)
    scene.remote.write(scene.source, [Region(0, 0, SIZE)])
    assert scene.pool.memory[:SIZE] == scene.source[:SIZE]


def test_closing_settles_what_can_no_more_be_known(scene: Scene) -> None:
    scene.cable.cut()
    with pytest.raises(TransferError):
        scene.remote.write(scene.source, [Region(0, 0, SIZE)])
    waiting = settled(scene.remote)
    scene.remote.close()
    assert waiting.is_set()
    with pytest.raises(TransferError, match="closed"):
        scene.remote.write(scene.source, [Region(0, 0, 8)])


def test_what_was_on_its_way_does_not_land_after_a_later_stream(scene: Scene) -> None:
    """The network holds a write; the writer gives it up and comes in by another way; the owner
    gives the blocks to somebody else; then the network lets go."""
    scene.cable.hold()
    with pytest.raises(TransferError):
        scene.remote.write(scene.source, [Region(0, 0, 4096)])
    waiting = settled(scene.remote)
    scene.cable.heal()
    assert waiting.wait(30)
    scene.remote.write(scene.source, [Region(0, 8192, 16)])  # the new streams are in use
    before = bytes(scene.pool.memory[:4096])
    scene.pool.memory[:4096] = b"\x11" * 4096
    scene.remote.write(scene.source, [Region(0, 8192, 16)])
    assert before in (bytes(4096), bytes(scene.source[:4096]))
    assert bytes(scene.pool.memory[:4096]) == b"\x11" * 4096


def test_a_writer_that_counts_as_gone_writes_nothing_more_and_nobody_else_is_hurt(
    scene: Scene,
) -> None:
    other = scene.attach()
    scene.remote.write(scene.source, [Region(0, 0, 16)])
    scene.pool.revoke("decode-7/1")
    scene.remote.write(scene.source, [Region(16, 16, 16)])
    scene.pool.revoke(PEER.name)
    for remote in (scene.remote, other):
        with pytest.raises(TransferError, match="gone"):
            remote.write(scene.source, [Region(32, 32, 16)])
    with pytest.raises(TransferError, match="gone"):
        scene.attach()
    assert bytes(scene.pool.memory[:48]) == bytes(scene.source[:32]) + bytes(16)
    other.close()


def test_a_receiver_that_does_nothing_is_given_up_and_taken_up_again(scene: Scene) -> None:
    scene.cable.hold()
    with pytest.raises(TransferError, match=r"nothing moved|says nothing"):
        scene.remote.write(scene.source, [Region(0, 0, 4 * SIZE)])
    waiting = settled(scene.remote)
    scene.cable.heal()
    assert waiting.wait(30)
    scene.remote.write(scene.source, [Region(0, 0, 4 * SIZE)])
    assert scene.pool.memory == scene.source


@pytest.mark.parametrize("seed", range(4))
def test_random_cuts_never_lose_a_byte_or_move_one(scene: Scene, seed: int) -> None:
    """Scattered writes while the cable breaks now and then; each is tried until it is done."""
    chance = random.Random(seed)
    expected = bytearray(4 * SIZE)
    for _ in range(25):
        if chance.random() < 0.5:
            scene.cable.cut_after(chance.randrange(1, 600_000))
        regions = []
        places = chance.sample(range(256), chance.randrange(1, 60))
        for place in places:
            length = chance.randrange(1, 16385)
            source = chance.randrange(0, 4 * SIZE - length)
            regions.append(Region(source, place * 16384, length))
        while True:
            try:
                scene.remote.write(scene.source, regions)
                break
            except TransferError:
                assert settled(scene.remote).wait(30)
        for region in regions:
            piece = scene.source[region.source : region.source + region.length]
            expected[region.target : region.target + region.length] = piece
        assert scene.pool.memory == expected
    assert scene.cable.num_links > 1


def test_a_writer_with_another_secret_does_not_get_in(scene: Scene) -> None:
    stranger = SocketTransport(SocketOptions(secret=b"x" * 32, stall_s=0.2))
    with pytest.raises(TransferError, match="cannot be reached"):
        stranger.attach(through(scene.pool.export(PEER), scene.cable))
    raw = socket.create_connection(port_in(scene.pool.export(PEER)))
    raw.sendall(b"\0" * 4096)
    raw.close()
    scene.remote.write(scene.source, [Region(0, 0, 64)])
    assert scene.pool.memory[:64] == scene.source[:64]


def tls_of(name: str) -> Tls | None:
    pki = Path(__file__).parents[1] / "pki"
    files = tls_files(
        str(pki / f"{name}.pem"), str(pki / f"{name}.key"), str(pki / f"{name}-ca.pem")
    )
    return load_tls(files)


@pytest.mark.parametrize("theirs", ["stranger", None])
def test_tls_lets_in_nobody_of_another_authority(theirs: str | None) -> None:
    options = SocketOptions(
        secret=SECRET, listen=("127.0.0.1", 0), stall_s=0.5, tls=tls_of("cluster")
    )
    pool = SocketTransport(options).allocate(4096)
    export = pool.export(PEER)
    pool_id, addresses, writer = msgspec.msgpack.decode(export.token)
    from_elsewhere = msgspec.msgpack.encode([pool_id, addresses[1:], writer])
    export = replace(export, token=from_elsewhere)
    SocketTransport(options).attach(export).close()
    other = replace(options, tls=None if theirs is None else tls_of(theirs))
    with pytest.raises(TransferError, match="cannot be reached"):
        SocketTransport(other).attach(export).write(memoryview(bytearray(8)), [Region(0, 0, 8)])
    pool.close()


def test_a_link_that_breaks_is_made_again_where_nothing_is_compiled(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "loops", lambda: None)
    scene.cable.cut_after(SIZE)
    scene.remote.write(scene.source, [Region(0, 0, 4 * SIZE)])
    assert scene.pool.memory == scene.source
    scene.cable.hold()
    with pytest.raises(TransferError, match=r"nothing moved|says nothing"):
        scene.remote.write(scene.source, [Region(0, 0, 4 * SIZE)])
    waiting = settled(scene.remote)
    scene.cable.heal()
    assert waiting.wait(30)


def test_a_memory_of_many_pieces_moves_in_frames_of_a_bounded_number(scene: Scene) -> None:
    regions = [Region(3 * place, 3 * place, 2) for place in range(70_000)]
    scene.remote.write(scene.source, regions)
    expected = bytearray(4 * SIZE)
    for start in range(0, 210_000, 3):
        expected[start : start + 2] = scene.source[start : start + 2]
    assert scene.pool.memory == expected
