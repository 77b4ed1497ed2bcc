"""``pdserve top``: a running server as a table, renewed in place.

Everything shown comes from ``/cluster``. Rates are differences between two looks; a number that has
gone down belongs to a process that was started anew, and counts from zero.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdserve.core.errors import ConfigError
from pdserve.page import page
from pdserve.serve.client import Client

_STATE_STYLES = {"ready": "green", "draining": "yellow", "starting": "yellow", "down": "red"}


@dataclass(frozen=True, slots=True)
class Look:
    """The server at one moment; ``at_s`` is this process's monotonic clock."""

    at_s: float
    document: Mapping[str, Any]

    def counters(self) -> dict[str, float]:
        """Everything whose rate is shown, by name."""
        found: dict[str, float] = {
            "tokens": self.document["output_tokens"],
            "requests": self.document["requests"],
        }
        for worker in self.document["workers"]:
            load = worker["load"] or {}
            for name in ("num_steps", "transfer_bytes"):
                found[f"{worker['id']} {name}"] = load.get(name, 0)
        return found


def rates(before: Look | None, after: Look) -> dict[str, float]:
    """Per second, by the names of `Look.counters`; nothing for the first look."""
    if before is None or after.at_s <= before.at_s:
        return {}
    elapsed_s = after.at_s - before.at_s
    was = before.counters()
    return {
        name: (value - was[name] if value >= was.get(name, 0) else value) / elapsed_s
        for name, value in after.counters().items()
        if name in was
    }


def render(before: Look | None, after: Look) -> Group:
    """One look, with rates since the one before."""
    document, per_s = after.document, rates(before, after)
    head = Text.assemble(
        (str(document["model"]), "bold"),
        f"  up {document['uptime_s']:.0f} s  open {document['open_requests']}",
        f"  requests/s {_rate(per_s.get('requests'))}  tokens/s {_rate(per_s.get('tokens'))}",
        ("  draining", "yellow") if document["draining"] else "",
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    hosts = any(worker.get("host") for worker in document["workers"])
    for column in ("worker", *(["host"] if hosts else []), "role", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("pid", "queued", "wait", "run", "blocks", "cached", "steps/s", "MB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in document["workers"]:
        name, *rest = _row(worker, per_s)
        table.add_row(name, *([worker.get("host") or "here"] if hosts else []), *rest)
    return Group(head, table)


def _row(worker: Mapping[str, Any], per_s: Mapping[str, float]) -> list[Text | str]:
    load, blocks = worker["load"] or {}, worker["blocks"] or {}
    sent = per_s.get(f"{worker['id']} transfer_bytes")
    role = worker["role"]
    if role != worker["home_role"]:
        role = f"{role} ({worker['home_role']})"
    used = f"{blocks['total'] - blocks['free']}/{blocks['total']}" if blocks else "-"
    return [
        worker["id"],
        role,
        Text(worker["state"], style=_STATE_STYLES.get(worker["state"], "")),
        str(worker["pid"] or "-"),
        str(load.get("pending_prefill_tokens", "-")),
        str(load.get("num_waiting", "-")),
        str(load.get("num_running", "-")),
        used,
        str(blocks.get("cached", "-")),
        _rate(per_s.get(f"{worker['id']} num_steps")),
        _rate(None if sent is None else sent / 1e6),
    ]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def look(client: Client) -> Look:
    """Ask now."""
    return Look(time.monotonic(), client.cluster())


def once(client: Client, console: Console | None = None) -> None:
    """Print one look."""
    (console or page()).print(render(None, look(client)))


def watch(client: Client, interval_s: float) -> None:
    """Show the server until Ctrl-C, or until it is gone."""
    if not interval_s > 0:
        raise ConfigError(f"--interval is {interval_s:g}; it must be more than 0 seconds")
    before: Look | None = None
    after = look(client)
    with Live(render(before, after), auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            before, after = after, look(client)
            live.update(render(before, after), refresh=True)
