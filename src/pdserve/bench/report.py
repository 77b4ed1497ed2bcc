"""What a run has shown, as one document and as tables for people."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pdserve import __version__
from pdserve.bench.options import LoadOptions, OutputOptions, TargetOptions
from pdserve.bench.plan import Load
from pdserve.bench.run import Result
from pdserve.workload.outcome import CountedBy, Ending
from pdserve.workload.summary import SloReport, Spread, Summary, summarise

LATE_MS = 10.0
"""Requests that leave later than this say that the client, or its bound, was in the way."""

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


def summary_of(result: Result, output: OutputOptions) -> Summary:
    return summarise(result.outcomes, result.duration_s, output.slo)


def document(
    target: TargetOptions, model: str, wanted: LoadOptions, load: Load, result: Result,
    output: OutputOptions,
) -> dict[str, Any]:  # fmt: skip
    """Plain data: everything that the tables show, the settings, and each request if wanted."""
    summary = summary_of(result, output)
    reuse = load.reuse
    asked = asdict(wanted)
    asked["trace"] = None if wanted.trace is None else str(wanted.trace)
    whole: dict[str, Any] = {
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "target": {
            "url": target.url,
            "model": model,
            "endpoint": target.endpoint,
            "prompt": "words" if target.endpoint == "chat" else target.prompt,
            "temperature": target.temperature,
            "ignore_eos": target.ignore_eos,
            "extra_body": target.extra_body,
        },
        "load": {key: _plain(value) for key, value in asked.items()}
        | {
            "arrivals": load.arrivals,
            "reusable_prompt_share": None if reuse is None else reuse.token_share,
        },
        "warmup": {
            "sent": len(result.warmup),
            "failed": sum(outcome.ending is Ending.FAILED for outcome in result.warmup),
        },
        "summary": asdict(summary),
        "client": {
            "cpu_s": result.cpu_s,
            "cpu_us_per_token": result.cpu_us_per_token,
            "cpu_share": result.cpu_s / result.duration_s,
            "max_in_flight": result.max_in_flight,
        },
    }
    if output.with_requests:
        whole["requests"] = [
            asdict(outcome) | {"ttft_s": outcome.ttft_s, "tpot_s": outcome.tpot_s}
            for outcome in result.outcomes
        ]
    return whole


def _plain(value: object) -> object:
    """JSON has no infinity."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def print_report(console: Console, load: Load, result: Result, summary: Summary) -> None:
    console.print(Group(_counts(summary), _latencies(summary)))
    if summary.slo is not None:
        console.print(_slo(summary.slo))
    for failure, count in summary.failures.items():
        console.print(Text(f"{count} x {failure}: {summary.messages[failure]}", style="red"))
    for line in _remarks(load, result, summary):
        console.print(Text(line, style="yellow"))
    console.print(
        Text(
            f"client: {result.cpu_us_per_token:.1f} us of CPU a token, "
            f"{result.cpu_s / result.duration_s:.1%} of a core, "
            f"at most {result.max_in_flight} requests in flight",
            style="dim",
        )
    )


def _counts(summary: Summary) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    parts = [f"{summary.completed} completed"]
    if summary.failed:
        parts.append(f"[red]{summary.failed} failed[/red]")
    if summary.cancelled:
        parts.append(f"{summary.cancelled} cancelled")
    table.add_row("requests", f"{summary.sent} sent: {', '.join(parts)}")
    table.add_row("duration", f"{summary.duration_s:.2f} s")
    cached = f" ({summary.cached_tokens} cached)" if summary.cached_tokens else ""
    table.add_row("tokens", f"{summary.prompt_tokens} in{cached}, {summary.output_tokens} out")
    table.add_row(
        "throughput",
        f"{summary.request_throughput:.2f} requests/s, {summary.output_throughput:.1f} output "
        f"tokens/s, {summary.total_token_throughput:.1f} tokens/s in all",
    )
    return table


def _latencies(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("ms")
    for column in ("mean", "median", "P90", "P99", "max", "std"):
        table.add_column(column, justify="right")
    for name, title in _NAMES.items():
        values: Spread = getattr(summary, f"{name}_ms")
        row = (values.mean, values.median, values.p90, values.p99, values.max, values.std)
        table.add_row(title, *(f"{value:.2f}" if values.num else "-" for value in row))
    return table


def _slo(report: SloReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("objectives", report.slo)
    table.add_row("goodput", f"{report.goodput:.3f} requests/s")
    each = ", ".join(f"{_NAMES[name]} {share:.1%}" for name, share in report.by_metric.items())
    table.add_row(
        "attainment", f"{report.attainment:.1%} ({report.good} of {report.judged}); {each}"
    )
    return table


def _remarks(load: Load, result: Result, summary: Summary) -> list[str]:
    """What a reader of the figures has to know."""
    remarks = []
    failed_warmup = sum(outcome.ending is Ending.FAILED for outcome in result.warmup)
    if failed_warmup:
        remarks.append(f"{failed_warmup} of {len(result.warmup)} warm-up requests failed")
    if load.is_paced and summary.lag_ms.p99 > LATE_MS:
        remarks.append(
            f"requests left late (P99 {summary.lag_ms.p99:.0f} ms): --concurrency held them back, "
            "or the client's machine is too busy"
        )
    chunked = summary.counted_by.get(CountedBy.CHUNKS, 0)
    if chunked:
        remarks.append(f"{chunked} answers came without usage: a chunk is counted as a token")
    if summary.tokens_per_chunk > 1.05:
        remarks.append(
            f"{summary.tokens_per_chunk:.2f} tokens a chunk: ITL is the time between chunks"
        )
    others = {name: n for name, n in summary.finish_reasons.items() if name != "length"}
    if others:
        listed = ", ".join(f"{n} {name}" for name, n in others.items())
        remarks.append(f"not every answer has the length asked for: {listed}")
    return remarks
