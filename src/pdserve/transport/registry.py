"""Transports by name. A transport's module is imported when it is asked for, and not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.transport.base import Transport

TRANSPORTS = {
    "hosts": "pdserve.transport.hosts:HostsTransport",
    "inproc": "pdserve.transport.inproc:InprocTransport",
    "shm": "pdserve.transport.shm:ShmTransport",
    "tcp": "pdserve.transport.tcp:SocketTransport",
}


def create_transport(name: str, **options: Any) -> Transport:
    """Make the transport ``name``; ``options`` are its constructor's (``hub`` for ``inproc``).

    Raises `ConfigError` for an unknown name.
    """
    if name not in TRANSPORTS:
        raise ConfigError(f"no transport {name!r}: choose one of {', '.join(sorted(TRANSPORTS))}")
    module, attribute = TRANSPORTS[name].split(":")
    transport = getattr(import_module(module), attribute)(**options)
    assert isinstance(transport, Transport)
    return transport
