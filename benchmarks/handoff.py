"""What does a hand-off cost one request? Layer-wise push, one-shot push, and none at all.

Three servers with the same threads a worker run side by side: one prefill and one decode worker
that push each layer when it is finished, the same two that push everything after the last layer,
and one mixed worker that keeps the request. Single requests take turns between them, so that each
has the machine for itself, and every figure is a median:

- prefill: from its start to its end, on the worker's clock;
- visible hand-off: from the end of the prefill to the moment at which the decode worker holds
  verified KV, and its share of the prefill (Splitwise, ISCA 2024, states under 7 %);
- the second token: the client's first gap against the median of the later ones, and against the
  first gap of the mixed worker (Splitwise states +16.5 % with layer-wise push);
- time to first token and to the last one, against the mixed worker.

Prompts are random tokens, so that no prefix is cached.

    python benchmarks/handoff.py [--prompts 512,1024,2048] [--repeats 9] [--out F] [serve flags]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from server import Server, serving

from pdserve.bench.options import TargetOptions
from pdserve.bench.target import Target
from pdserve.workload.outcome import Ending
from pdserve.workload.request import TraceRequest, own_segment

SPLIT = ["--prefill", "1", "--decode", "1", "--policy", "shortest_queue"]
SYSTEMS = {
    "layer-wise": [*SPLIT, "--one-shot-tokens", "0"],
    "one-shot": [*SPLIT, "--one-shot-tokens", "1000000"],
    "local": ["--mixed", "1"],
}
WARMUP = 2
Figures = dict[str, float]


async def ask(target: Target, server: Server, prompt_tokens: int, number: int) -> Figures:
    """Send one request of its own and read what it cost."""
    request = TraceRequest(
        index=number,
        at_s=0.0,
        segments=(own_segment(number, prompt_tokens),),
        output_tokens=target.options.extra_body["max_tokens"],  # type: ignore[arg-type]
    )
    outcome = await target.send(request, target.prepare(request), time.perf_counter())
    if outcome.ending is not Ending.COMPLETED or len(outcome.gaps_s) < 4:
        raise SystemExit(f"a request failed: {outcome.failure} {outcome.message}")
    gaps_ms = [gap_s * 1e3 for gap_s in outcome.gaps_s]
    assert outcome.ttft_s is not None
    assert outcome.e2e_s is not None
    return {
        "TTFT ms": outcome.ttft_s * 1e3,
        "E2E ms": outcome.e2e_s * 1e3,
        "first gap ms": gaps_ms[0],
        "later gap ms": statistics.median(gaps_ms[1:]),
    } | timeline_figures(server, outcome.response_id)


def timeline_figures(server: Server, response_id: str) -> Figures:
    """Of the server's own timeline; a request that stayed where it was has no hand-off."""
    with urllib.request.urlopen(f"{server.url}/v1/requests/{response_id}/timeline") as response:
        at_ms = {event["name"]: event["at_ms"] for event in json.load(response)["events"]}
    prefill_ms = at_ms["prefill_ended"] - at_ms["prefill_started"]
    figures = {"prefill ms": prefill_ms}
    if "handoff_closed" in at_ms:
        visible_ms = at_ms["decode_queued"] - at_ms["prefill_ended"]
        figures["visible hand-off ms"] = visible_ms
        figures["visible, % of prefill"] = visible_ms / prefill_ms * 100
    return figures


async def measure(
    servers: dict[str, Server], prompts: Sequence[int], repeats: int, output_tokens: int
) -> dict[int, dict[str, list[Figures]]]:
    """Figures of every request: by prompt length and system, in the order of sending."""
    options = {"max_tokens": output_tokens}
    targets = {
        name: Target(TargetOptions(url=one.url, return_token_ids=True, extra_body=dict(options)))
        for name, one in servers.items()
    }
    for target in targets.values():
        await target.ask_for_model()
    taken: dict[int, dict[str, list[Figures]]] = {}
    for prompt_tokens in prompts:
        mine = taken[prompt_tokens] = {name: [] for name in servers}
        for turn in range(-WARMUP, repeats):
            for name, server in servers.items():
                number = prompt_tokens * 1000 + turn
                figures = await ask(targets[name], server, prompt_tokens, number)
                if turn >= 0:
                    mine[name].append(figures)
        print(f"{prompt_tokens} tokens: {repeats} turns done", file=sys.stderr)
    for target in targets.values():
        target.close()
    return taken


def medians(taken: dict[str, list[Figures]]) -> dict[str, Figures]:
    """Of each system; what is over something else compares medians."""
    systems = {
        name: {figure: statistics.median(one[figure] for one in of) for figure in of[0]}
        for name, of in taken.items()
    }
    local = dict(systems["local"])
    for name, mine in systems.items():
        mine["first gap, % over a later one"] = _over(mine["first gap ms"], mine["later gap ms"])
        if name != "local":
            for figure in ("first gap", "TTFT", "E2E"):
                mine[f"{figure}, % over local"] = _over(mine[f"{figure} ms"], local[f"{figure} ms"])
    return systems


def _over(value: float, base: float) -> float:
    return (value / base - 1) * 100


def show(prompt_tokens: int, systems: dict[str, Figures]) -> None:
    print(f"\n| {prompt_tokens} prompt tokens | " + " | ".join(systems) + " |")
    print("| --- |" + " ---: |" * len(systems))
    for figure in {figure: None for one in systems.values() for figure in one}:
        shown = [f"{one[figure]:.1f}" if figure in one else "" for one in systems.values()]
        print(f"| {figure} | " + " | ".join(shown) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prompts", default="512,1024,2048", help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--threads", default="1", help="CPU threads of each worker")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    arguments, flags = parser.parse_known_args()
    prompts = [int(text) for text in arguments.prompts.split(",")]
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving([*own, "--threads", arguments.threads, *flags]))
            for name, own in SYSTEMS.items()
        }
        taken = asyncio.run(measure(servers, prompts, arguments.repeats, arguments.output))
    result = {prompt_tokens: medians(of) for prompt_tokens, of in taken.items()}
    for prompt_tokens, systems in result.items():
        show(prompt_tokens, systems)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"medians": result, "requests": taken}))


if __name__ == "__main__":
    main()
