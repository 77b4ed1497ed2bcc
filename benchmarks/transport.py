"""How fast KV moves: shared memory, AF_UNIX and TCP against memcpy and a bare socket.

    python benchmarks/transport.py

Each round moves 16 MiB by each way, one way after the other, so that what disturbs the machine
disturbs all of them; medians of the rounds are compared. The bare socket sends the same bytes in
one piece from one buffer into another, with Python's own ``sendall`` and ``recv_into``, and waits
for one byte in answer. Scattered blocks lie in a shuffled order on both sides; memcpy copies one
piece. What receives over sockets is another process. ``--json FILE`` writes every figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from pdserve.transport.base import PoolExport, Writer
from pdserve.transport.regions import Regions
from pdserve.transport.shm import ShmTransport
from pdserve.transport.tcp import SocketOptions, SocketTransport

TOTAL = 16 << 20
BLOCKS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
SECRET = b"a benchmark's secret"
WRITER = Writer("bench/1", False)
BARE = {"bare unix": socket.AF_UNIX, "bare tcp": socket.AF_INET}


def receive_bare(listening: socket.socket, buffer: memoryview) -> None:
    """Read 16 MiB, answer with a byte, again and again."""
    end, _ = listening.accept()
    while True:
        got = 0
        while got < TOTAL:
            count = end.recv_into(buffer[got:])
            if not count:
                return
            got += count
        end.send(b"x")


def receiver(link: Connection, num_streams: int) -> None:
    """The other process: a pool with its doors, and two bare sockets."""
    options = SocketOptions(secret=SECRET, listen=("127.0.0.1", 0), num_streams=num_streams)
    pool = SocketTransport(options).allocate(TOTAL)
    pool.memory[:] = bytes(TOTAL)
    places = {}
    for name, family in BARE.items():
        listening = socket.socket(family)
        listening.bind("" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listening.listen()
        places[name] = listening.getsockname()
        buffer = memoryview(bytearray(TOTAL))
        threading.Thread(target=receive_bare, args=(listening, buffer), daemon=True).start()
    link.send((pool.export(WRITER), places))
    link.recv()


def only(export: PoolExport, scheme: str) -> PoolExport:
    """The export with its addresses of one kind."""
    pool, addresses, writer = msgspec.msgpack.decode(export.token)
    kept = [address for address in addresses if address.startswith(scheme)]
    return replace(export, token=msgspec.msgpack.encode([pool, kept, writer]))


def bare(
    family: socket.AddressFamily, place: object, source: memoryview
) -> Callable[[object], None]:
    """Send all of the source, and wait for the answer."""
    end = socket.socket(family)
    end.connect(place)  # type: ignore[arg-type]

    def move(regions: object) -> None:
        end.sendall(source)
        end.recv(1)

    return move


def regions_of(block: int, scattered: bool) -> Regions:
    """16 MiB in blocks, each region one block, as a transfer tells many."""
    starts = list(range(0, TOTAL, block))
    targets = list(starts)
    if scattered:
        chance = random.Random(1)
        chance.shuffle(starts)
        chance.shuffle(targets)
    return Regions(np.array([starts, targets, [block] * len(starts)], np.int64).T.copy())


class Ways:
    """Everything that is compared, as something that moves regions of ``source``."""

    def __init__(self, num_streams: int, link: Connection) -> None:
        export, places = link.recv()
        shm = ShmTransport()
        # Both pools are held, and with them the memory behind the addresses.
        self._source, self._target = shm.allocate(TOTAL), shm.allocate(TOTAL)
        self._source.memory[:] = random.Random(2).randbytes(TOTAL)
        memory = self._source.memory
        here = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        there = ctypes.addressof(ctypes.c_char.from_buffer(self._target.memory))
        sockets = SocketTransport(SocketOptions(secret=SECRET, num_streams=num_streams))
        remotes = {
            "shm": shm.attach(self._target.export()),
            "unix": sockets.attach(only(export, "unix://")),
            "tcp": sockets.attach(only(export, "tcp://")),
        }
        self.moves: dict[str, Callable[[Regions], object]] = {
            "memcpy": lambda regions: ctypes.memmove(there, here, TOTAL)
        }
        for name, remote in remotes.items():
            self.moves[name] = partial(remote.write, memory)
        for name, family in BARE.items():
            self.moves[name] = bare(family, places[name], memory)


def measure(rounds: int, num_streams: int) -> dict[str, dict[str, float]]:
    """GB/s by way, by ``block size, scattered or not``."""
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=receiver, args=(theirs, num_streams), daemon=True)
    process.start()
    ways = Ways(num_streams, link)
    cases = {
        f"{block >> 10} KiB {'scattered' if scattered else 'contiguous'}": regions_of(
            block, scattered
        )
        for block in BLOCKS
        for scattered in (False, True)
    }
    times: dict[str, dict[str, list[float]]] = {case: {} for case in cases}
    for number in range(rounds + 1):
        for case, regions in cases.items():
            for name, move in ways.moves.items():
                begun_s = time.perf_counter()
                move(regions)
                if number:  # the first round warms up
                    took_s = time.perf_counter() - begun_s
                    times[case].setdefault(name, []).append(took_s)
    link.send(None)
    process.join()
    return {
        case: {name: TOTAL / statistics.median(took) / 1e9 for name, took in by.items()}
        for case, by in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=2, help="of TCP")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    figures = measure(parsed.rounds, parsed.streams)
    print(f"{'GB/s':22} memcpy   shm  ratio | bare unix  unix  ratio | bare tcp   tcp  ratio")
    for case, by in figures.items():
        print(
            f"{case:22} {by['memcpy']:6.1f} {by['shm']:5.1f}  {by['shm'] / by['memcpy']:5.2f} | "
            f"{by['bare unix']:9.2f} {by['unix']:5.2f}  {by['unix'] / by['bare unix']:5.2f} | "
            f"{by['bare tcp']:8.2f} {by['tcp']:5.2f}  {by['tcp'] / by['bare tcp']:5.2f}"
        )
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
