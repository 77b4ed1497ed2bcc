"""``pdserve role``, ``drain``, ``undrain`` and ``restart``: commands to a running server."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from pdserve.core.errors import UnavailableError
from pdserve.serve.client import Client

READY_TIMEOUT_S = 300.0
LOOK_EVERY_S = 0.2


def operate(
    client: Client, parsed: argparse.Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Do what the command line says; ``say`` hears of each step. Gives what came of it."""
    match parsed.operation:
        case "role":
            done = [client.set_role(parsed.worker, parsed.role)]
        case "drain":
            done = [client.drain(parsed.worker, restart=False)]
        case "undrain":
            done = [client.undrain(parsed.worker)]
        case _:
            return restart(client, parsed.worker, say)
    for answer in done:
        say(f"{answer['worker']}: {answer['detail']}")
    return done


def restart(client: Client, names: list[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One worker after the other: the next one only when the last one takes work again."""
    before = {worker["id"]: worker["epoch"] for worker in client.cluster()["workers"]}
    strangers = [name for name in names if name not in before]
    if strangers:
        raise UnavailableError(
            f"{client.url} has no worker {', '.join(strangers)}; it has {', '.join(before)}"
        )
    done = []
    for name in names or list(before):
        client.drain(name, restart=True)
        say(f"{name}: holds nothing, is being replaced")
        _wait_until_ready(client, name, before[name])
        say(f"{name}: takes work again")
        done.append({"worker": name, "detail": "replaced"})
    return done


def _wait_until_ready(client: Client, name: str, epoch: int) -> None:
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up_s:
        workers = {worker["id"]: worker for worker in client.cluster()["workers"]}
        if workers[name]["epoch"] > epoch and workers[name]["state"] == "ready":
            return
        time.sleep(LOOK_EVERY_S)
    raise UnavailableError(f"{name} is not ready {READY_TIMEOUT_S:.0f} s after its restart")
