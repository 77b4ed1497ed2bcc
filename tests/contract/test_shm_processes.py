"""Shared memory between real processes, which may die at any time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from pdserve.transport.base import Pool, PoolExport, Region
from pdserve.transport.shm import ShmTransport

SIZE = 3 * 4096 + 100

CHILD = """
    import os, socket, sys
    from pdserve.transport.base import PoolExport, Region
    from pdserve.transport.shm import ShmTransport

    link = socket.socket(fileno=int(sys.argv[1]))
    transport = ShmTransport()

    def receive():
        data, fds, _, _ = socket.recv_fds(link, 64, 1)
        return PoolExport("shm", b"", int(data), tuple(fds))

    def send(pool):
        export = pool.export()
        socket.send_fds(link, [b"%d" % export.num_bytes], export.fds)
        os.close(export.fds[0])
"""


class Child:
    """A process with `CHILD` and then ``script``, at the other end of ``link``."""

    def __init__(self, script: str) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.settimeout(30)
        code = textwrap.dedent(CHILD) + textwrap.dedent(script)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )

    def send(self, pool: Pool) -> None:
        export = pool.export()
        socket.send_fds(self.link, [b"%d" % export.num_bytes], export.fds)
        os.close(export.fds[0])

    def receive(self) -> PoolExport:
        data, fds, _, _ = socket.recv_fds(self.link, 64, 1)
        return PoolExport("shm", b"", int(data), tuple(fds))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL

    def close(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def start() -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def start(script: str) -> Child:
        children.append(Child(script))
        return children[-1]

    yield start
    for child in children:
        child.close()


def test_shm_a_peer_process_writes_and_its_death_changes_nothing(
    start: Callable[[str], Child],
) -> None:
    pool = ShmTransport().allocate(SIZE)
    child = start("""
        remote = transport.attach(receive())
        source = transport.allocate(4096)
        source.memory[:] = bytes(range(256)) * 16
        remote.write(source.memory, [Region(0, 5000, 4096)])
        link.send(b"written")
        link.recv(1)
    """)
    child.send(pool)
    assert child.link.recv(16) == b"written"
    expected = bytes(5000) + bytes(range(256)) * 16 + bytes(SIZE - 5000 - 4096)
    assert bytes(pool.memory) == expected
    child.kill()
    assert bytes(pool.memory) == expected
    pool.close()


def test_shm_a_dead_owner_does_not_harm_its_writer(start: Callable[[str], Child]) -> None:
    child = start(f"""
        pool = transport.allocate({SIZE})
        send(pool)
        link.recv(1)
    """)
    transport = ShmTransport()
    source = transport.allocate(SIZE)
    remote = transport.attach(child.receive())
    child.kill()
    remote.write(source.memory, [Region(0, 0, SIZE)])
    remote.close()
    source.close()
