"""Routing policies and the role controller against each other, on live servers.

Real gateway, real worker processes, real sockets and hand-offs; only the engine is a modelled one,
which waits for as long as a model's steps would take (``--engine modelled``), so that a small
machine carries many workers. The servers take turns, round by round, on the same requests, and the
fair baseline has as many workers, all mixed, with chunked prefill.

A *system* is written ``policy/layout[/option=value]...``: ``predicted/4+4``,
``predicted/4+4/roles=auto``, ``aggregated/0+0+8/mixed-chunk-tokens=128`` (prefill + decode + mixed
workers). Loads:

- ``conversation``: prompts of some 300 tokens, answers of some 80;
- ``code``: prompts of some 1,200 tokens, answers of some 14;
- ``shift``: code-like, then conversation-like with long answers, then code-like again;
- ``sessions``: conversations of several turns, each turn with all before it as its prompt, behind
  one of a few long common prefixes;
- ``trace``: requests of a trace file (``--trace``), at ``--trace-scale`` times its rate.

All figures are of one round and their median is shown. Goodput is requests per second that meet
the SLO, attainment their share. What would make a figure the machine's instead of the scheduler's
stands beside it: the gateway's share of a core, and how late the client sent.

    python benchmarks/scheduling.py [--loads shift] [--rounds 3] [--out scheduling.json]
        [--plot scheduling.svg] [--systems predicted/4+4/roles=auto aggregated/0+0+8]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from scheduling_loads import LOADS, MAX_TOKENS, load_of
from server import Server, serving

from pdserve.bench.options import TargetOptions
from pdserve.bench.plan import Load
from pdserve.bench.run import Result, run_load
from pdserve.bench.target import Target
from pdserve.weights.random_model import write_random_model
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.slo import Slo, parse_slo
from pdserve.workload.summary import judge, spread, summarise

STEP_TIMES = "start=10ms,prompt=0.4ms,pair=10ns,decode=20ms,sequence=2ms,context=2us,transfer=20us"
"""Of a small and slow device: prompts at some 2,400 tokens/s, and 13 sequences of 500 tokens in a
step of 59 ms. Chosen so that eight workers are full at a rate of tokens that one gateway passes on
beside eight processes on two cores."""
SYSTEMS = (
    "random/4+4", "round_robin/4+4", "shortest_queue/4+4", "power_of_two/4+4", "prefix_aware/4+4",
    "splitwise/4+4", "predicted/4+4", "predicted/4+4/roles=auto",
    "predicted/0+0+8", "aggregated/0+0+8", "aggregated/0+0+8/mixed-chunk-tokens=128",
)  # fmt: skip
WARMUP_S = 4.0
"""Arrivals of the first seconds are sent and not judged: the fits learn from them, too."""


# --- systems -------------------------------------------------------------------------------------


def flags_of(system: str) -> list[str]:
    """Of ``pdserve serve``."""
    policy, layout, *options = system.split("/")
    counts = [int(number) for number in layout.split("+")]
    flags = ["--policy", policy]
    for option in options:
        name, _, value = option.partition("=")
        flags += [f"--{name}", value]
    for name, count in zip(("prefill", "decode", "mixed"), counts, strict=False):
        flags += [f"--{name}", str(count)]
    return flags


class Quiet:
    """Watches a run without a word."""

    def sent(self) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU seconds of the gateway's process and of all workers', the time, and role changes."""

    gateway_s: float
    workers_s: float
    at_s: float
    role_changes: int

    @classmethod
    def read(cls, server: Server) -> Machine:
        with urllib.request.urlopen(f"{server.url}/cluster", timeout=30) as response:
            workers = json.load(response)["workers"]
        workers_s = sum(cpu_s(worker["pid"]) for worker in workers if worker["pid"])
        changes = sum(worker["role_epoch"] for worker in workers)
        return cls(cpu_s(server.pid), workers_s, time.monotonic(), changes)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def metric(server: Server, name: str) -> dict[str, float]:
    """Samples of a metric, by what stands between its braces."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line.startswith(name + "{"))
    return {labels: float(value) for labels, value in samples}


async def send(url: str, load: Load, seed: int) -> Result:
    target = Target(TargetOptions(url=url, seed=seed, vocab_size=256))
    try:
        await target.ask_for_model()
        return await run_load(load, target, Quiet())
    finally:
        target.close()


def figures_of(result: Result, slo: Slo, duration_s: float) -> dict[str, float]:
    judged = [outcome for outcome in result.outcomes if outcome.due_s >= WARMUP_S]
    summary = summarise(judged, result.duration_s - WARMUP_S)
    report = judge(judged, duration_s - WARMUP_S, slo)
    return {
        "TTFT P50 ms": summary.ttft_ms.median,
        "TTFT P90 ms": summary.ttft_ms.p90,
        "TTFT P99 ms": summary.ttft_ms.p99,
        "TPOT P50 ms": summary.tpot_ms.median,
        "TPOT P90 ms": summary.tpot_ms.p90,
        "TPOT P99 ms": summary.tpot_ms.p99,
        "ITL P99 ms": summary.itl_ms.p99,
        "goodput /s": report.goodput,
        "attainment %": report.attainment * 100,
        "failed": float(sum(o.ending is Ending.FAILED for o in judged)),
        "sent late P99 ms": spread(o.lag_s * 1e3 for o in result.outcomes).p99,
    }


def measure(
    system: str, load: Load, seed: int, model: Path, arguments: argparse.Namespace, flags: list[str]
) -> tuple[dict[str, float], Result]:
    slo = parse_slo(arguments.slo)
    promised = ",".join(f"{name}={bound:g}" for name, bound in slo.bounds_ms)
    flags = [
        "--engine", "modelled", "--step-times", arguments.step_times, "--model", str(model),
        "--kv-blocks", str(arguments.kv_blocks), "--classes", f"default:{promised}",
        "--admission", arguments.admission, "--queue-timeout", "120", *flags_of(system), *flags,
    ]  # fmt: skip
    if arguments.speeds:
        flags += ["--speeds", arguments.speeds]
    with (
        tempfile.TemporaryDirectory() as cache,  # nothing is known of an earlier server's steps
        serving(flags, environment={"PDSERVE_CACHE": cache}) as server,
    ):
        before = Machine.read(server)
        result = asyncio.run(send(server.url, load, seed))
        after = Machine.read(server)
        figures = figures_of(result, slo, arguments.duration)
        took_s = after.at_s - before.at_s
        figures["gateway CPU %"] = 100 * (after.gateway_s - before.gateway_s) / took_s
        figures["workers CPU %"] = 100 * (after.workers_s - before.workers_s) / took_s
        routes = metric(server, "pdserve:routes_total")
        local = sum(number for labels, number in routes.items() if 'kind="local"' in labels)
        figures["local %"] = 100 * local / max(1.0, sum(routes.values()))
        figures["role changes"] = float(after.role_changes)
    return figures, result


# --- what comes out ------------------------------------------------------------------------------

COLUMNS = (
    "TTFT P50 ms", "TTFT P90 ms", "TTFT P99 ms", "TPOT P50 ms", "TPOT P90 ms", "TPOT P99 ms",
    "goodput /s", "attainment %", "local %", "role changes", "failed", "gateway CPU %",
    "sent late P99 ms",
)  # fmt: skip


def median_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def table(name: str, rounds: dict[str, list[dict[str, float]]]) -> str:
    """Markdown. Goodput with its lowest and highest round."""
    lines = [f"| {name} | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for system, of in rounds.items():
        median = median_of(of)
        cells = []
        for column in COLUMNS:
            cell = f"{median[column]:.{2 if column == 'goodput /s' else 0}f}"
            if column == "goodput /s" and len(of) > 1:
                values = [one[column] for one in of]
                cell += f" ({min(values):.2f}-{max(values):.2f})"
            cells.append(cell)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(rounds: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """An SVG: attainment of each system, a group for each load; the whisker spans the rounds."""
    rows = [
        (load, system, of) for load, systems in rounds.items() for system, of in systems.items()
    ]
    left, width, step, top = 250, 720, 20, 30
    scale = (width - left - 60) / 100
    height = top + step * (len(rows) + 2 * len(rounds)) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        "<style>text{font:12px sans-serif;fill:#333}.t{font-size:15px}.b{fill:#1667b7}"
        ".w{stroke:#222}.g{stroke:#ddd}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="t" x="{left}" y="18">requests that meet the SLO, %</text>',
    ]
    y = top
    for load, systems in rounds.items():
        y += step
        parts.append(f'<text class="t" x="8" y="{y + 12}">{escape(load)}</text>')
        for system, of in systems.items():
            y += step
            values = sorted(one["attainment %"] for one in of)
            middle = statistics.median(values)
            parts.append(
                f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(system)}</text>'
                f'<rect class="b" x="{left}" y="{y + 2}" width="{middle * scale:.1f}" height="13"/>'
                f'<line class="w" x1="{left + values[0] * scale:.1f}" '
                f'x2="{left + values[-1] * scale:.1f}" y1="{y + 8}" y2="{y + 8}"/>'
                f'<text x="{left + middle * scale + 6:.1f}" y="{y + 12}">{middle:.0f}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="Other flags go to pdserve serve."
    )
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=[*LOADS][:4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="its number is its seed")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals")
    parser.add_argument("--load", type=float, default=1.0, help="times the rate of arrivals")
    parser.add_argument("--slo", nargs="+", default=["ttft:2000", "tpot:60"])
    parser.add_argument("--step-times", default=STEP_TIMES)
    parser.add_argument("--speeds", default="", help="unlike workers, as for pdserve serve")
    parser.add_argument("--kv-blocks", type=int, default=1024)
    parser.add_argument("--admission", default="none")
    parser.add_argument("--trace", type=Path, help="a trace for the load trace")
    parser.add_argument("--trace-scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    parser.add_argument("--plot", type=Path, help="write attainment there as SVG")
    arguments, flags = parser.parse_known_args()
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Small keys and values: the link's time is modelled, too.
        write_random_model(
            folder, max_model_tokens=MAX_TOKENS, num_heads=1, num_kv_heads=1, head_dim=16,
            hidden_size=16, intermediate_size=16,
        )  # fmt: skip
        turns = itertools.product(range(arguments.rounds), arguments.loads, arguments.systems)
        for number, name, system in turns:
            seed = arguments.first_round + number
            load = load_of(name, arguments, seed)
            figures, result = measure(system, load, seed, Path(folder), arguments, flags)
            rounds.setdefault(name, {}).setdefault(system, []).append(figures)
            outcomes = [asdict(outcome) for outcome in result.outcomes]
            raw.append({"load": name, "system": system, "round": seed, "outcomes": outcomes})
            said = f"goodput {figures['goodput /s']:.2f}/s, {figures['attainment %']:.0f} %"
            said += f", gateway {figures['gateway CPU %']:.0f} %, load {os.getloadavg()[0]:.1f}"
            print(f"round {seed} {name} {system}: {said}", file=sys.stderr, flush=True)
    for name, systems in rounds.items():
        print(table(name, systems) + "\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"rounds": rounds, "outcomes": raw}))
    if arguments.plot is not None:
        arguments.plot.write_text(bars(rounds))


if __name__ == "__main__":
    main()
