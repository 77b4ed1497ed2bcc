"""Transports by name. A transport's module is imported when it is asked for, and not before.

One that is not here is named by where it is, as MODULE:CLASS, and made without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
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
    if name not in TRANSPORTS and not is_foreign(name):
        raise ConfigError(f"no transport {name!r}: choose one of {', '.join(sorted(TRANSPORTS))}")
    transport = _find(name)(**options)
    assert isinstance(transport, Transport)
    return transport


def is_foreign(name: str) -> bool:
    """Whether it reads as MODULE:CLASS: a transport of the user's own."""
    return ":" in name


def check_servable(name: str) -> None:
    """Raise `ConfigError` unless the processes of a server can move KV by it."""
    if not is_foreign(name):
        if name not in ("shm", "tcp"):
            raise ConfigError(
                f"--transport is {name!r}; it is one of shm, tcp, or MODULE:CLASS for your own"
            )
        return
    try:
        found = _find(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--transport is {name!r}, and that cannot be had: {error}. It is MODULE:CLASS; "
            "PYTHONPATH names the folder of a module that is not installed"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Transport)):
        raise ConfigError(f"--transport is {name!r}, and that is no class of a Transport")


def _find(name: str) -> Callable[..., Any]:
    module, _, attribute = TRANSPORTS.get(name, name).partition(":")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found
