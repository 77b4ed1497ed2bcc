"""``pdserve explain ID``: why a request went where it went, and whether that was right.

Shown from the request's timeline: for each attempt the router's reason and every candidate with
what it was expected to cost; for the whole, what was measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdserve.page import page

PARTS = ("queue", "fetch", "prefill", "ttft", "exposed", "decode_wait", "tpot", "harm", "score")


def explain(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one request, or each of a list of prompts."""
    printed = console or page()
    for each in document.get("requests", [document]):
        printed.print(render(each))


def render(document: Mapping[str, Any]) -> Group:
    """One request's timeline in words and tables."""
    head = Text.assemble(
        (str(document["request_id"]), "bold"),
        f"  {document['status']}",
        f"  {document['request'].get('prompt_tokens', '?')} prompt tokens",
        f"  {document['result'].get('output_tokens', '?')} answer tokens",
    )
    parts: list[RenderableType] = [head]
    for attempt in document["attempts"]:
        parts += _attempt(attempt)
    parts += [Text(line) for line in _outcome(document)]
    return Group(*parts)


def _attempt(attempt: Mapping[str, Any]) -> list[RenderableType]:
    route = f"{attempt['prefill_worker']} -> {attempt['decode_worker']}"
    lines: list[RenderableType] = [
        Text.assemble(
            (f"attempt {attempt['epoch']}: {attempt['route']}, {route}", "bold"),
            f"\n  because: {attempt['reason']}",
        )
    ]
    if attempt["resumed"]:
        lines.append(Text(f"  after: {attempt['resumed'].get('reason')}"))
    for move in attempt["moves"]:
        lines.append(Text(f"  moved to {move.get('to')}: {move.get('reason')}"))
    if attempt["candidates"]:
        lines.append(_candidates(attempt["candidates"]))
    phases = attempt["phases"]
    times = [
        f"{name} {phase['duration_ms']:.1f} ms"
        for name, phase in phases.items()
        if phase["duration_ms"] is not None
    ]
    lines.append(Text(f"  took: {', '.join(times)}"))
    return lines


def _candidates(candidates: list[Mapping[str, Any]]) -> Table:
    """A row for each part of the cost, a column for each candidate, the chosen one first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("  predicted ms", no_wrap=True)
    for number, each in enumerate(candidates):
        name = f"{each['prefill']} ->\n{each['decode']}"
        if "fetch_from" in each:
            name += f"\n(prefix from {each['fetch_from']})"
        table.add_column(name, justify="right", style="" if number else "bold")
    for part in PARTS:
        cells = [f"{each[f'{part}_ms']:.1f}" for each in candidates]
        table.add_row(f"  {part.replace('_', ' ')}", *cells)
    return table


def _outcome(document: Mapping[str, Any]) -> list[str]:
    """What was measured beside what was predicted."""
    result = document["result"]
    lines = []
    for name, words in (("ttft", "to the first token"), ("tpot", "a token after it")):
        measured, predicted = result.get(f"{name}_ms"), result.get(f"predicted_{name}_ms")
        if measured is not None and predicted is not None:
            lines.append(f"measured {measured:.1f} ms {words}; predicted {predicted:.1f} ms")
    regret_ms = result.get("regret_ms")
    if regret_ms is not None:
        verdict = "faster" if regret_ms > 0 else "slower"
        lines.append(
            f"the runner-up, as predicted, would have been {abs(regret_ms):.1f} ms {verdict}"
        )
    return lines
