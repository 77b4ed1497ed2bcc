"""What every transport promises, and what shared memory promises across processes."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.core.errors import ConfigError, TransferError
from pdserve.transport.base import (
    KIN,
    Pool,
    PoolExport,
    Region,
    RemotePool,
    Transport,
    Writer,
)
from pdserve.transport.fake import FakeTransport, Faults
from pdserve.transport.hosts import HostsTransport
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.regions import Regions
from pdserve.transport.registry import TRANSPORTS, create_transport
from pdserve.transport.shm import ShmTransport
from pdserve.transport.tcp import SocketOptions, SocketTransport
from pdserve.transport.tls import Tls, load_tls, tls_files

SIZE = 3 * 4096 + 100
SECRET = b"s" * 32
BIG = 1 << 70


@dataclass
class Link:
    """Two workers, each with a transport of its own, and the pools that they have opened."""

    owner: Transport
    writer: Transport
    pools: list[Pool | RemotePool] = field(default_factory=list)
    exported_to: Writer = KIN

    def source(self, num_bytes: int = SIZE) -> memoryview:
        pool = self.writer.allocate(num_bytes)
        self.pools.append(pool)
        pool.memory[:] = random.Random(7).randbytes(num_bytes)
        return pool.memory

    def target(self, num_bytes: int = SIZE) -> tuple[Pool, RemotePool]:
        pool = self.owner.allocate(num_bytes)
        remote = self.writer.attach(pool.export(self.exported_to))
        self.pools += [remote, pool]
        return pool, remote


def inproc_link() -> Link:
    hub = InprocHub()
    return Link(InprocTransport(hub), InprocTransport(hub))


def shm_link() -> Link:
    return Link(ShmTransport(), ShmTransport())


def unix_link() -> Link:
    options = SocketOptions(secret=SECRET)
    return Link(SocketTransport(options), SocketTransport(options))


def tcp_link(num_streams: int = 1, tls: Tls | None = None) -> Link:
    """Over the loopback, by way of addresses that only another host would take."""
    options = SocketOptions(
        secret=SECRET, listen=("127.0.0.1", 0), num_streams=num_streams, tls=tls
    )
    return Link(SocketTransport(options), FromElsewhere(options))


def cluster_tls() -> Tls | None:
    pki = Path(__file__).parents[1] / "pki"
    return load_tls(
        tls_files(str(pki / "cluster.pem"), str(pki / "cluster.key"), str(pki / "cluster-ca.pem"))
    )


def tls_link() -> Link:
    return tcp_link(num_streams=2, tls=cluster_tls())


def tcp_streams_link() -> Link:
    return tcp_link(num_streams=3)


def hosts_link() -> Link:
    options = SocketOptions(secret=SECRET)
    return Link(HostsTransport(options), HostsTransport(options))


def joined_link() -> Link:
    """Shared memory for kin, and a writer that is none."""
    link = hosts_link()
    link.exported_to = Writer("decode-9/1", False)
    return link


def lazy_shm_link() -> Link:
    return Link(ShmTransport(prefault=False), ShmTransport(prefault=False))


def folder_link() -> Link:
    """The example that docs/hosts.md leads through."""
    path = Path(__file__).parents[2] / "examples" / "folder_transport.py"
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return Link(module.FolderTransport(), module.FolderTransport())


def fake_link() -> Link:
    return Link(FakeTransport(ShmTransport(), Faults()), FakeTransport(ShmTransport(), Faults()))


class FromElsewhere(SocketTransport):
    """A writer that cannot use abstract sockets of this host, as one on another host."""

    def attach(self, export: PoolExport) -> RemotePool:
        return super().attach(replace(export, token=export.token.replace(b"unix://", b"unix:/!")))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def leaked_descriptors(before: int) -> int:
    """More than ``before``; less is what an earlier test's caught error still held."""
    if open_descriptors() > before:
        gc.collect()  # A mapping has a descriptor of its own, and errors hold it in cycles.
    return max(0, open_descriptors() - before)


@pytest.fixture(
    params=[
        inproc_link,
        shm_link,
        lazy_shm_link,
        fake_link,
        unix_link,
        tcp_link,
        tcp_streams_link,
        tls_link,
        hosts_link,
        joined_link,
        folder_link,
    ]
)
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    make: Callable[[], Link] = request.param
    before = open_descriptors()
    link = make()
    yield link
    for pool in link.pools:
        pool.close()
    for thread in threading.enumerate():
        if thread.name == "kv-mend":  # a writer that was closed while it tried to connect
            thread.join()
    assert not leaked_descriptors(before)


# --- every transport --------------------------------------------------------------------------


def test_memory_is_zeroed_writable_and_of_the_size_asked(link: Link) -> None:
    pool, _ = link.target(SIZE)
    assert pool.memory.nbytes == SIZE
    assert not pool.memory.readonly
    assert bytes(pool.memory) == bytes(SIZE)


def test_a_write_is_visible_to_the_owner_and_touches_nothing_else(link: Link) -> None:
    source = link.source()
    pool, remote = link.target()
    regions = [Region(0, 4096, 100), Region(4000, 1, 97), Region(SIZE - 5, SIZE - 5, 5)]
    remote.write(source, regions)
    expected = bytearray(SIZE)
    for region in regions:
        piece = source[region.source : region.source + region.length]
        expected[region.target : region.target + region.length] = piece
    assert bytes(pool.memory) == bytes(expected)


def test_pools_may_differ_in_size(link: Link) -> None:
    source = link.source(100)
    pool, remote = link.target(SIZE)
    remote.write(source, [Region(0, SIZE - 100, 100)])
    assert bytes(pool.memory) == bytes(SIZE - 100) + bytes(source)


def test_nothing_to_write_is_no_error(link: Link) -> None:
    source = link.source()
    pool, remote = link.target()
    remote.write(source, [])
    remote.write(source, [Region(SIZE, SIZE, 0)])
    assert bytes(pool.memory) == bytes(SIZE)


@pytest.mark.parametrize(
    "bad",
    [
        Region(SIZE - 1, 0, 2),
        Region(0, SIZE - 1, 2),
        Region(-1, 0, 1),
        Region(0, -1, 1),
        Region(0, 0, -1),
        Region(8, 8, -4),
        Region(0, 0, SIZE + 1),
        Region(BIG, 0, 1),
        Region(0, BIG, 1),
        Region(0, 0, BIG),
    ],
)
def test_a_region_outside_either_pool_writes_nothing(link: Link, bad: Region) -> None:
    source = link.source()
    pool, remote = link.target()
    with pytest.raises(TransferError, match="outside"):
        remote.write(source, [Region(0, 0, 16), bad])
    assert bytes(pool.memory) == bytes(SIZE)
    remote.write(source, [Region(0, 0, 16)])
    assert pool.memory[:16] == source[:16]


@pytest.mark.parametrize("block", [64, 4096])
def test_many_regions_go_as_one_table(link: Link, block: int) -> None:
    count = 300
    source = link.source(count * block)
    pool, remote = link.target(2 * count * block)
    chance = random.Random(5)
    starts, targets = chance.sample(range(count), count), chance.sample(range(2 * count), count)
    starts[:20], targets[:20] = sorted(starts[:20]), sorted(targets[:20])
    table = np.array([starts, targets, [1] * count], np.int64).T * block
    remote.write(source, Regions(table))
    expected = bytearray(2 * count * block)
    for start, target, length in table.tolist():
        expected[target : target + length] = source[start : start + length]
    assert bytes(pool.memory) == expected
    table[-1, 1] = 2 * count * block - 1
    pool.memory[:] = bytes(2 * count * block)
    with pytest.raises(TransferError, match="outside"):
        remote.write(source, Regions(table))
    assert not any(pool.memory)


def test_several_peers_write_into_one_pool(link: Link) -> None:
    source = link.source()
    pool, first = link.target()
    second = link.writer.attach(pool.export())
    link.pools.append(second)
    first.write(source, [Region(0, 0, 10)])
    second.write(source, [Region(10, 10, 10)])
    first.close()
    second.write(source, [Region(20, 20, 10)])
    assert pool.memory[:30] == source[:30]


def test_a_closed_view_writes_no_more(link: Link) -> None:
    source = link.source()
    pool, remote = link.target()
    remote.close()
    remote.close()
    with pytest.raises(TransferError, match="closed"):
        remote.write(source, [Region(0, 0, 16)])
    assert bytes(pool.memory) == bytes(SIZE)


def test_a_closed_pool_harms_neither_writer_nor_reader(link: Link) -> None:
    source = link.source()
    pool, remote = link.target()
    view = pool.memory[:16]
    pool.close()
    pool.close()
    try:
        remote.write(source, [Region(0, 0, 16)])
    except TransferError:
        assert bytes(view) == bytes(16)
    else:
        assert view == source[:16]
    with pytest.raises(TransferError, match="closed"):
        pool.export()


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "carrier-pigeon"},
        {"token": b"stranger", "fds": ()},
        {"num_bytes": SIZE + 1},
        {"num_bytes": 0},
        {"num_bytes": BIG},
        {"num_bytes": -1},
        {"fds": (-1,)},
    ],
)
def test_garbage_is_not_attached_and_its_descriptors_are_closed(
    link: Link, change: dict[str, object]
) -> None:
    pool, _ = link.target()
    before = open_descriptors()
    export = pool.export()
    garbage = replace(export, **change)
    with pytest.raises(TransferError):
        link.writer.attach(garbage)
    for descriptor in set(export.fds) - set(garbage.fds):
        os.close(descriptor)
    assert not leaked_descriptors(before)


@pytest.mark.parametrize("num_bytes", [1 << 60, BIG])
def test_a_pool_that_cannot_be_had_says_what_to_change(link: Link, num_bytes: int) -> None:
    with pytest.raises(ConfigError, match="fewer blocks"):
        link.owner.allocate(num_bytes)


def test_writes_from_a_thread_are_seen_by_the_owner(link: Link) -> None:
    source = link.source()
    pool, remote = link.target()
    thread = threading.Thread(target=remote.write, args=(source, [Region(0, 0, SIZE)]))
    thread.start()
    thread.join()
    assert pool.memory == source


# --- inproc -----------------------------------------------------------------------------------


def test_inproc_hubs_do_not_meet() -> None:
    pool = InprocTransport(InprocHub()).allocate(64)
    with pytest.raises(TransferError, match="no pool of this process"):
        InprocTransport(InprocHub()).attach(pool.export())


def test_inproc_write_after_the_owner_closed_raises() -> None:
    link = inproc_link()
    source = link.source()
    pool, remote = link.target()
    pool.close()
    with pytest.raises(TransferError, match="peer has closed"):
        remote.write(source, [Region(0, 0, 16)])


# --- shared memory ----------------------------------------------------------------------------


def test_shm_owner_cannot_resize_under_a_writer() -> None:
    pool = ShmTransport().allocate(SIZE)
    (descriptor,) = pool.export().fds
    for size in (0, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(descriptor)
    pool.close()


def plain_file(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def unsealed_memory(path: str) -> int:
    return os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)


def half_sealed_memory(path: str) -> int:
    descriptor = os.memfd_create("half", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return descriptor


def one_end_of_a_pipe(path: str) -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize(
    "make", [plain_file, unsealed_memory, half_sealed_memory, one_end_of_a_pipe]
)
def test_shm_trusts_sealed_memory_only(
    make: Callable[[str], int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = open_descriptors()
    descriptor = make(str(tmp_path_factory.mktemp("memory") / "file"))
    if make is not one_end_of_a_pipe and make is not half_sealed_memory:
        os.ftruncate(descriptor, SIZE)
    with pytest.raises(TransferError):
        ShmTransport().attach(PoolExport("shm", b"", SIZE, (descriptor,)))
    assert not leaked_descriptors(before)


# --- the fake's faults ------------------------------------------------------------------------


def faulty_link() -> tuple[Faults, memoryview, Pool, RemotePool]:
    faults = Faults()
    hub = InprocHub()
    link = Link(InprocTransport(hub), FakeTransport(InprocTransport(hub), faults))
    return faults, link.source(), *link.target()


def test_fake_fails_the_write_that_it_was_told_to() -> None:
    faults, source, pool, remote = faulty_link()
    faults.fail_write(1, "the cable is cut")
    remote.write(source, [Region(0, 0, 8)])
    with pytest.raises(TransferError, match="the cable is cut"):
        remote.write(source, [Region(8, 8, 8)])
    remote.write(source, [Region(16, 16, 8)])
    assert bytes(pool.memory[:24]) == bytes(source[:8]) + bytes(8) + bytes(source[16:24])
    assert faults.num_writes == 3


@pytest.mark.parametrize("byte", [0, 7, 8, 15])
def test_fake_corrupts_one_byte(byte: int) -> None:
    faults, source, pool, remote = faulty_link()
    faults.corrupt_write(0, byte)
    remote.write(source, [Region(0, 100, 8), Region(50, 200, 8)])
    arrived = bytes(pool.memory[100:108]) + bytes(pool.memory[200:208])
    sent = bytes(source[:8]) + bytes(source[50:58])
    assert [i for i in range(16) if arrived[i] != sent[i]] == [byte]


def test_fake_holds_a_write_until_it_is_released() -> None:
    faults, source, pool, remote = faulty_link()
    faults.hold_writes()
    thread = threading.Thread(target=remote.write, args=(source, [Region(0, 0, 8)]))
    thread.start()
    assert faults.wait_until_held(30)
    assert bytes(pool.memory[:8]) == bytes(8)
    faults.release_writes()
    thread.join()
    assert pool.memory[:8] == source[:8]


# --- the registry -----------------------------------------------------------------------------


def test_the_registry_makes_each_transport() -> None:
    options: dict[str, dict[str, Any]] = {
        "hosts": {"options": SocketOptions(secret=SECRET), "prefault": False},
        "inproc": {"hub": InprocHub()},
        "shm": {"prefault": False},
        "tcp": {"options": SocketOptions(secret=SECRET)},
    }
    assert {create_transport(name, **options[name]).name for name in TRANSPORTS} == set(TRANSPORTS)


def test_an_unknown_transport_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'telepathy': choose one of hosts, inproc, shm, tcp"):
        create_transport("telepathy")
