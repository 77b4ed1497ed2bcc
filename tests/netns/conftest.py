"""Two hosts that are network namespaces of this one, and a network between them that can be bad.

Both ends of the network are ``tun`` devices; the test's own process carries packets from one to the
other, late, lossy or not at all, by a seeded rule. It needs root (CAP_NET_ADMIN), and nothing else:
a kernel without ``netem`` will do.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.weights.random_model import write_random_model

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1500
SECRET = "0123456789abcdef0123456789abcdef"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """Carries packets between the two hosts, on a thread of its own."""

    def __init__(self, seed: int) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.is_cut = False
        self.num_packets = self.num_lost = 0
        self._chance = random.Random(seed)
        self._ends: list[int] = []
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def add(self, name: str) -> None:
        """A tun device of this name, in the namespace of the calling process for now."""
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
        self._ends.append(end)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        os.write(self._woken, b"x")
        self._thread.join()
        for end in (*self._ends, self._wake, self._woken):
            os.close(end)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        poll = select.poll()
        for fd in (*self._ends, self._wake):
            poll.register(fd, select.POLLIN)
        other = {self._ends[0]: self._ends[1], self._ends[1]: self._ends[0]}
        while True:
            now_s = time.monotonic()
            while waiting and waiting[0][0] <= now_s:
                _, _, end, packet = heapq.heappop(waiting)
                self._deliver(end, packet)
            timeout_ms = None if not waiting else max(0.0, (waiting[0][0] - now_s) * 1000)
            for fd, _ in poll.poll(timeout_ms):
                if fd == self._wake:
                    return
                self._take(fd, other[fd], waiting)

    def _take(self, fd: int, to: int, waiting: list[tuple[float, int, int, bytes]]) -> None:
        while True:
            try:
                packet = os.read(fd, MTU + 64)
            except BlockingIOError:
                return
            except OSError:
                return  # the device is down
            self.num_packets += 1
            if self.is_cut or self._chance.random() < self.loss:
                self.num_lost += 1
            elif self.delay_s:
                entry = (time.monotonic() + self.delay_s, self.num_packets, to, packet)
                heapq.heappush(waiting, entry)
            else:
                self._deliver(to, packet)

    def _deliver(self, end: int, packet: bytes) -> None:
        try:
            os.write(end, packet)
        except OSError:
            self.num_lost += 1  # its buffer is full, or the device is down


class TwoHosts:
    """``here`` has the server, ``there`` joins. Names are of this test run alone."""

    def __init__(self, seed: int = 1) -> None:
        self.network = Network(seed)
        self.names = {side: f"pd{os.getpid()}{side}" for side in ("here", "there")}
        self.addresses = {"here": "10.77.0.1", "there": "10.77.0.2"}
        self._processes: list[subprocess.Popen[bytes]] = []
        for number, (side, name) in enumerate(self.names.items()):
            device = f"pd{os.getpid() % 100000}t{number}"
            ip("netns", "add", name)
            self.network.add(device)
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{self.addresses[side]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
            ip("-n", name, "link", "set", "lo", "up")
        self.network.start()

    def start(self, side: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        """``pdserve ...`` on one of the hosts."""
        command = ["ip", "netns", "exec", self.names[side], sys.executable, "-m", "pdserve"]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                stdout=subprocess.PIPE,
                stderr=file,
                env={
                    **os.environ,
                    "PDSERVE_CLUSTER_SECRET": SECRET,
                    "PDSERVE_LOG_FORMAT": "json",
                    "OMP_NUM_THREADS": "1",
                },
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in self.names.values():
            ip("netns", "delete", name)
        self.network.close()


class Cluster:
    """A server with one prefill worker here, and a decode worker that joins from there."""

    def __init__(self, hosts: TwoHosts, model: Path, folder: Path) -> None:
        self.hosts = hosts
        self.network = hosts.network
        self._model = model
        self._folder = folder
        self.log = folder / "server.log"
        flags = ["--dtype", "fp32", "--kv-blocks", "512", "--threads", "1"]
        self.server = hosts.start(
            "here",
            [
                *("serve", "--port", "0", "--host", hosts.addresses["here"]),
                *("--model", str(model), "--prefill", "1", "--decode", "0", *flags),
                *("--policy", "shortest_queue", "--listen-workers", "10.77.0.1:7000"),
            ],
            self.log,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, self.log.read_text()
        self.url: str = json.loads(line)["url"]
        self.host: subprocess.Popen[bytes] | None = None
        self.join()

    def join(self) -> None:
        self.host = self.hosts.start(
            "there",
            [
                *("worker", "--join", "10.77.0.1:7000", "--role", "decode", "--id", "far"),
                *("--model", str(self._model), "--kv-blocks", "512", "--threads", "1"),
                *("--listen", "10.77.0.2:7100"),
            ],
            self._folder / "host.log",
        )

    def fetch(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A client on the server's host: ``ip netns exec`` runs it, as sockets belong to one."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._in_namespace(urllib.request.Request(self.url + path, data, headers))

    def _in_namespace(self, request: urllib.request.Request) -> Any:
        found: list[Any] = []

        def work() -> None:
            enter(self.hosts.names["here"])
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    found.append(json.load(response))
            except OSError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], OSError):
            raise found[0]
        return found[0]

    def worker(self, name: str = "far") -> dict[str, Any]:
        workers = {worker["id"]: worker for worker in self.fetch("/cluster")["workers"]}
        found: dict[str, Any] = workers.get(name, {"state": "none", "epoch": 0})
        return found

    def until(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> None:
        """Look at the worker that joined now and then, until it holds."""
        pause = threading.Event()
        give_up_s = time.monotonic() + timeout_s
        while not holds(self.worker()):
            assert time.monotonic() < give_up_s, f"{self.worker()}\n{self.log.read_text()[-4000:]}"
            pause.wait(0.1)

    def ask(self, words: int = 100, max_tokens: int = 30, seed: int = 7) -> dict[str, Any]:
        answer: dict[str, Any] = self.fetch(
            "/v1/completions",
            {
                "model": self._model.name,
                "prompt": f"{seed} the cat sat on the mat " * (words // 6),
                "max_tokens": max_tokens,
                "temperature": 1.0,
                "seed": seed,
                "ignore_eos": True,
            },
        )
        return answer

    def attempts(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        timeline = self.fetch(f"/v1/requests/{answer['id']}/timeline")
        attempts: list[dict[str, Any]] = timeline["attempts"]
        return attempts


def enter(name: str) -> None:
    """Move the calling thread into a namespace (setns(2))."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(namespace, 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)


@pytest.fixture(scope="session")
def netns_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_model(path, seed=0)
    return path


@pytest.fixture
def cluster(netns_model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Ready, with the joined worker up."""
    hosts = TwoHosts()
    try:
        cluster = Cluster(hosts, netns_model, tmp_path)
        cluster.until(lambda worker: worker["state"] == "ready")
        yield cluster
    finally:
        hosts.close()
