"""The short report: what a person wants to know of a run, and what to beware of."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LATENCIES = {
    "ttft_s": "TTFT",
    "second_token_gap_s": "second token",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "e2e_s": "E2E",
}


def print_report(console: Console, document: dict[str, Any]) -> None:
    """Of `Report.document`."""
    console.print(_head(document))
    console.print(latencies(document))
    for name, part in document.get("classes", {}).items():
        console.print(
            f"class {name}: {part['ended']} requests, attainment {part['attainment']:.1%}, "
            f"goodput {part['goodput_rps']:.3g}/s, TTFT P99 {seconds(part['ttft_s']['p99'])}, "
            f"TPOT P99 {seconds(part['tpot_s']['p99'])}"
        )
    for failure, count in document["failures"].items():
        console.print(Text(f"{count} x {failure}", style="red"))
    for warning in document["warnings"]:
        console.print(Text(warning, style="yellow"))
    console.print(
        Text(
            f"{_number(document['duration_s'])} s in {_number(document['wall_s'])} s "
            f"({_number(document['speedup'])} x real time), seed {document['seed']}",
            style="dim",
        )
    )


def _head(document: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    tokens, throughput = document["tokens"], document["throughput"]
    steps = document["steps"]
    parts = [f"{document['completed']} completed"]
    parts += [
        f"{document[name]} {name}" for name in ("failed", "cancelled", "unfinished")
        if document[name]
    ]  # fmt: skip
    resumed = document["attempts"]["resumed_requests"]
    parts += [f"{resumed} resumed"] if resumed else []
    table.add_row("cluster", f"{document['cluster']}, {document['model']}")
    for machine in document["machines"]:
        table.add_row("", _worker(machine))
    table.add_row("policy", f"{document['policy']}, batching {document['batching']}")
    table.add_row("requests", f"{document['requests']} sent: {', '.join(parts)}")
    table.add_row(
        "tokens",
        f"{tokens['prompt']} in ({document['cache_hit_rate']:.1%} of them cached), "
        f"{tokens['output']} out",
    )
    table.add_row(
        "throughput",
        f"{_number(throughput['requests_per_s'])} requests/s, "
        f"{_number(throughput['output_tokens_per_s'])} output tokens/s",
    )
    objective = document["slo"] or "no objective"
    table.add_row(
        "goodput",
        f"{_number(document['goodput_rps'])} requests/s, attainment {document['attainment']:.1%} "
        f"({objective})",
    )
    table.add_row(
        "workers",
        f"busy {document['utilisation']:.0%} of the time, {steps['all']} steps, at most "
        f"{document['timeline']['most_waiting']} requests waiting",
    )
    _add_resources(table, document)
    return table


def _worker(machine: dict[str, Any]) -> str:
    """What a worker of a group is (``-tp4``: four devices) and what fits into it."""
    blocks, size = machine["num_blocks"], machine["block_size"]
    return f"{machine['group']}: {machine['name']}, {blocks} x {size} tokens of KV each"


def _add_resources(table: Table, document: dict[str, Any]) -> None:
    """What was sent and moved, drawn and paid; nothing of which there was none."""
    energy, cost = document["energy"], document["cost"]
    if document["transfers"]["num"]:
        transfers = document["transfers"]
        table.add_row(
            "transfers",
            f"{transfers['num']}, {_number(transfers['bytes'] / 1e9)} GB in all; open for "
            f"{seconds(transfers['time_s']['p50'])} (P50), {seconds(transfers['time_s']['p99'])} "
            "(P99)",
        )
    for name, title in (("role_changes", "role changes"), ("workers_lost", "workers lost")):
        if document[name]["num"]:
            table.add_row(title, str(document[name]["num"]))
    if energy["total_j"]:
        table.add_row(
            "energy",
            f"{_number(energy['mean_w'] / 1e3)} kW, "
            f"{_number((energy['j_per_1k_output_tokens'] or 0) / 1e3)} kJ per 1k output tokens",
        )
    if cost["price_per_hour"]:
        table.add_row(
            "cost",
            f"{_number(cost['price_per_hour'])} per hour, "
            f"{_number(cost['per_1k_output_tokens'] or 0)} per 1k output tokens",
        )


def latencies(document: dict[str, Any]) -> Table:
    """A row for each latency that has values, in milliseconds."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("ms")
    for column in ("mean", "P50", "P90", "P99", "max"):
        table.add_column(column, justify="right")
    for key, title in _LATENCIES.items():
        figures = document[key]
        if figures["num"]:
            row = (figures[name] for name in ("mean", "p50", "p90", "p99", "max"))
            table.add_row(title, *(_number(value * 1e3) for value in row))
    return table


def seconds(value: float) -> str:
    """In the unit that suits it."""
    return f"{_number(value * 1e3)} ms" if value < 10 else f"{_number(value)} s"


def _number(value: float) -> str:
    """Three or four digits, never an exponent."""
    if value and abs(value) < 0.01:
        return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.6f}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
