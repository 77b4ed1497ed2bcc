"""Is splitting worth it here? One prefill and one decode worker against two mixed workers.

Both have the same cores and the same load: streams that run all the time (short prompts, long
answers, evenly spaced) and long prompts that come as a Poisson process and disturb them. Every
figure is a median over rounds in which the servers take turns:

- ITL P99 of the streams and TTFT P99 of the long prompts;
- goodput and attainment under three SLOs, over both kinds of request;
- how much of a hand-off is visible: the time from the end of the prefill to the end of the hand-off
  as a share of the prefill, from the server's own timelines (Splitwise states under 7 %);
- how much later than the following ones the second token comes (Splitwise states 16.5 %).

    python benchmarks/split.py [--model DIR] [--rounds 3] [--duration 60] [--out split.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from server import serving

from pdserve.bench.options import TargetOptions
from pdserve.bench.plan import Load
from pdserve.bench.run import Result, run_load
from pdserve.bench.target import Target
from pdserve.workload.arrivals import constant, gamma
from pdserve.workload.lengths import length_distribution
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.request import TraceRequest, own_segment
from pdserve.workload.slo import parse_slo
from pdserve.workload.summary import judge, spread
from pdserve.workload.synthetic import synthetic

SYSTEMS = {
    "split": ["--prefill", "1", "--decode", "1", "--policy", "shortest_queue"],
    "mixed": ["--mixed", "2", "--policy", "aggregated"],
}
"""Every request is split in the one, none in the other: no prediction decides."""
SLOS = (["ttft:1000", "tpot:50"], ["ttft:2000", "tpot:100"], ["ttft:4000", "tpot:200"])
LONG = 1_000_000
"""Numbers of long prompts begin here."""


class Quiet:
    """Watches a run without a word."""

    def sent(self) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


def load_of(arguments: argparse.Namespace, number: int) -> Load:
    """Streams and long prompts, in order of arrival; new prompts in each round."""
    streams = synthetic(
        constant(arguments.stream_rate),
        length_distribution(arguments.stream_input),
        length_distribution(arguments.stream_output),
        number,
    )
    longs = synthetic(
        gamma(arguments.long_rate, 1.0, number),
        length_distribution(arguments.long_input),
        length_distribution(arguments.long_output),
        LONG + number,
    )
    requests = [*_until(streams, arguments.duration, 0), *_until(longs, arguments.duration, LONG)]
    requests.sort(key=lambda request: request.at_s)
    return Load(
        requests=requests,
        warmup=[
            replace(r, index=-1 - i, segments=(own_segment(-1 - i, r.prompt_tokens),))
            for i, r in enumerate(requests[:4])
        ],
        num_requests=len(requests),
        duration_s=arguments.duration,
        concurrency=None,
        is_paced=True,
        arrivals="streams and long prompts",
        reuse=None,
    )


def _until(requests: Iterator[TraceRequest], end_s: float, first: int) -> Iterator[TraceRequest]:
    for request in itertools.takewhile(lambda request: request.at_s < end_s, requests):
        segments = tuple(
            replace(segment, name=f"{first}/{segment.name}") for segment in request.segments
        )
        yield replace(request, index=first + request.index, segments=segments)


async def send(url: str, load: Load, seed: int) -> Result:
    target = Target(TargetOptions(url=url, seed=seed))
    try:
        await target.ask_for_model()
        return await run_load(load, target, Quiet())
    finally:
        target.close()


def figures_of(result: Result, url: str) -> dict[str, float]:
    streams = [o for o in result.outcomes if o.index < LONG]
    longs = [o for o in result.outcomes if o.index >= LONG]
    figures = {
        "stream ITL P50 ms": spread(_gaps_ms(streams)).median,
        "stream ITL P99 ms": spread(_gaps_ms(streams)).p99,
        "stream TTFT P99 ms": spread(_ttfts_ms(streams)).p99,
        "long TTFT P50 ms": spread(_ttfts_ms(longs)).median,
        "long TTFT P99 ms": spread(_ttfts_ms(longs)).p99,
        "failed": float(sum(o.ending is Ending.FAILED for o in result.outcomes)),
        "lag P99 ms": spread(o.lag_s * 1e3 for o in result.outcomes).p99,
    }
    for texts in SLOS:
        report = judge(result.outcomes, result.duration_s, parse_slo(texts))
        figures[f"goodput {report.slo}"] = report.goodput
        figures[f"attainment % {report.slo}"] = report.attainment * 100
    return figures | hand_offs(url, longs) | second_tokens(longs)


def _gaps_ms(outcomes: Sequence[Outcome]) -> list[float]:
    return [gap_s * 1e3 for outcome in outcomes for gap_s in outcome.gaps_s]


def _ttfts_ms(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.ttft_s * 1e3 for outcome in outcomes if outcome.ttft_s is not None]


def second_tokens(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The first gap of each long prompt's answer against the median of its other gaps."""
    delays = [o.gaps_s[0] / statistics.median(o.gaps_s[1:]) for o in outcomes if len(o.gaps_s) >= 4]
    return {"second token, times a later gap": statistics.median(delays)} if delays else {}


def hand_offs(url: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Visible part of the hand-offs; nothing for requests that stayed on one worker."""
    visible_ms, shares = [], []
    for outcome in outcomes:
        if outcome.ending is not Ending.COMPLETED:
            continue
        with contextlib.suppress(urllib.error.HTTPError):  # forgotten: only the latest are known
            place = f"{url}/v1/requests/{outcome.response_id}/timeline"
            with urllib.request.urlopen(place, timeout=5) as response:
                at_ms = {event["name"]: event["at_ms"] for event in json.load(response)["events"]}
            if {"prefill_started", "prefill_ended", "handoff_closed"} <= at_ms.keys():
                visible_ms.append(max(0.0, at_ms["handoff_closed"] - at_ms["prefill_ended"]))
                took_ms = at_ms["prefill_ended"] - at_ms["prefill_started"]
                shares.append(visible_ms[-1] / took_ms if took_ms else 0.0)
    if not shares:
        return {}
    return {
        "visible hand-off ms": statistics.median(visible_ms),
        "visible hand-off, % of prefill": statistics.median(shares) * 100,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    parser.add_argument("--stream-rate", type=float, default=0.5, help="streams per second")
    parser.add_argument("--stream-input", default="32")
    parser.add_argument("--stream-output", default="128")
    parser.add_argument("--long-rate", type=float, default=0.3, help="long prompts per second")
    parser.add_argument("--long-input", default="1024:2048")
    parser.add_argument("--long-output", default="16")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    arguments, flags = parser.parse_known_args()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    raw: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for name, roles in SYSTEMS.items():
            with serving([*roles, *flags]) as server:
                result = asyncio.run(send(server.url, load_of(arguments, number), number))
                rounds[name].append(figures_of(result, server.url))
            raw.append({"system": name, "round": number, "figures": rounds[name][-1]})
            raw[-1]["outcomes"] = [asdict(outcome) for outcome in result.outcomes]
            print(f"round {number} {name}: {result.duration_s:.0f} s", file=sys.stderr)
    medians = {
        name: {
            figure: statistics.median(one[figure] for one in of if figure in one)
            for figure in {figure: None for one in of for figure in one}
        }
        for name, of in rounds.items()
    }
    print("| median of rounds | " + " | ".join(SYSTEMS) + " |")
    print("| --- |" + " ---: |" * len(SYSTEMS))
    for figure in {figure: None for one in medians.values() for figure in one}:
        shown = [f"{one[figure]:.2f}" if figure in one else "-" for one in medians.values()]
        print(f"| {figure} | " + " | ".join(shown) + " |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"medians": medians, "rounds": raw}))


if __name__ == "__main__":
    main()
