"""Addresses that one process can give another, and the sockets behind them.

``unix://HOST/NAME`` is an abstract Unix socket; HOST names the machine (and network namespace) on
which the name means anything, so whoever gets the address knows whether it is of use to him.
``tcp://NAME:PORT`` is reached over the network. A listener that can be reached both ways gives both
addresses, and `connect` takes the first that it can use.

A peer that vanishes without a word (power, cable, firewall) must be missed: sockets over TCP probe
an idle peer, and give up on one that acknowledges nothing.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from pdserve.core.errors import ConfigError

UNIX = "unix://"
TCP = "tcp://"

PROBE_AFTER_S = 2
PROBE_EVERY_S = 1
NUM_PROBES = 3
GIVE_UP_MS = 5000
"""After so long without an acknowledgement of what was sent, a TCP link counts as broken."""

BACKLOG = 128


def host_id() -> str:
    """Of this machine since it was started, and this network namespace: abstract names mean the
    same exactly where this is the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}.{Path('/proc/self/ns/net').stat().st_ino}"


def new_name() -> str:
    """A name for a listener that nobody can guess: of an abstract socket, without its NUL."""
    return f"pdserve-{secrets.token_hex(16)}"


def unix_address(name: str) -> str:
    """Address of an abstract socket of this host."""
    return f"{UNIX}{host_id()}/{name}"


def tcp_address(host: str, port: int) -> str:
    return f"{TCP}[{host}]:{port}" if ":" in host else f"{TCP}{host}:{port}"


def split_host_port(text: str, what: str) -> tuple[str, int]:
    """(host, port) of ``HOST:PORT`` or ``[V6]:PORT``. Raises `ConfigError` naming ``what``."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{what} is {text!r}; it must be HOST:PORT, such as 10.0.0.1:7000")
    return host, int(port)


def check_reachable(listen: tuple[str, int] | None, flag: str) -> None:
    """Raises `ConfigError` for an address that means another host to each one that hears it."""
    if listen is not None and listen[0] in ("0.0.0.0", "::", "*"):
        raise ConfigError(
            f"{flag} {listen[0]} does not say where other hosts find this one: give the address or "
            "name by which they reach it"
        )


def is_usable(address: str) -> bool:
    """Can somebody on this host connect to it?"""
    return address.startswith((TCP, f"{UNIX}{host_id()}/"))


def usable(addresses: Sequence[str]) -> str:
    """The best one for this host: Unix before TCP. Raises `OSError` if there is none."""
    found = sorted(filter(is_usable, addresses), key=lambda address: not address.startswith(UNIX))
    if not found:
        raise OSError(f"no address of {list(addresses)} can be reached from this host")
    return found[0]


def resolve(address: str) -> tuple[int, tuple[str, int] | str]:
    """(family, what `socket.connect` takes). Names are looked up, which may block. Raises
    `OSError`."""
    if address.startswith(UNIX):
        return socket.AF_UNIX, "\0" + address.rpartition("/")[2]
    if not address.startswith(TCP):
        raise OSError(f"{address!r} is no address")
    host, port = split_host_port(address.removeprefix(TCP), "a peer's address")
    family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(found[0]), int(found[1]))


def tune(connected: socket.socket) -> None:
    """Have a TCP socket send at once, and notice a peer that is gone."""
    if connected.family == socket.AF_UNIX:
        return
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GIVE_UP_MS)


def listen_unix(name: str) -> socket.socket:
    """A listening socket of this abstract name, not blocking."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.setblocking(False)
    try:
        listening.bind("\0" + name)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket, not blocking; port 0 takes a free one. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot take links on {host}:{port}: {error.strerror or error}; choose an address of "
            "this host and a port that is free"
        ) from error
    return listening


def port_of(listening: socket.socket) -> int:
    """The port that a TCP listener has."""
    return int(listening.getsockname()[1])
