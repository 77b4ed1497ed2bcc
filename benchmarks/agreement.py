"""Do two load clients say the same of one server? `pdserve bench` beside `vllm bench serve`.

Both send the same load in turn - as many prompts of the same length, the same answers, the same
concurrency - to one server that stays up. Prompts differ (each client makes its own, new ones in
each round, so that no prefix cache answers), lengths do not. A figure's agreement is the ratio of
the two medians over the rounds; the spread of each client's own rounds stands beside it, because
no two clients agree better than one of them does with itself.

`--peers` holds the script `load DIR URL IN OUT N CONCURRENCY`, which runs vLLM's client from the
environment in DIR and prints its figures as one line of JSON; `--models` is that DIR.

    python benchmarks/agreement.py --peers DIR --models DIR [--rounds 5] [server flags]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from server import serving

Figures = dict[str, float]
THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")
LATENCIES = {
    f"{part} {theirs} ms": (f"{part}_{theirs}_ms", ours, {"p50": "median"}.get(part, part))
    for theirs, ours in (
        ("ttft", "ttft_ms"),
        ("tpot", "tpot_ms"),
        ("itl", "itl_ms"),
        ("e2el", "e2e_ms"),
    )
    for part in ("mean", "p50", "p99")
}


def ours(url: str, arguments: argparse.Namespace, seed: int) -> Figures:
    done = subprocess.run(
        [
            sys.executable, "-m", "pdserve", "bench", "--url", url, "--json", "-", "--no-progress",
            "--input", str(arguments.input), "--output", str(arguments.output),
            "-n", str(arguments.requests), "--concurrency", str(arguments.concurrency),
            "--prompt", "words", "--seed", str(seed), "--warmup", "1",
        ],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    summary = json.loads(done.stdout)["summary"]
    figures = {name: summary[name] for name in THROUGHPUTS}
    return figures | {name: summary[mine][part] for name, (_, mine, part) in LATENCIES.items()}


def theirs(url: str, arguments: argparse.Namespace, seed: int) -> Figures:
    numbers = (arguments.input, arguments.output, arguments.requests, arguments.concurrency)
    done = subprocess.run(
        [arguments.peers / "load", arguments.models, url, *map(str, numbers)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"SEED": str(seed)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    figures = {name: found[name] for name in THROUGHPUTS}
    return figures | {name: found[their] for name, (their, _, _) in LATENCIES.items()}


def spread_percent(values: list[float]) -> float:
    """Half of what lies between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return 50 * (high - low) / middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder with the script `load`")
    parser.add_argument("--models", type=Path, required=True, help="folder that it is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    arguments, flags = parser.parse_known_args()
    rounds: dict[str, list[Figures]] = {"pdserve bench": [], "vllm bench serve": []}
    clients = dict(zip(rounds, (ours, theirs), strict=True))
    model = ["--model", str(arguments.models / "hf"), "--served-model-name", "smollm2-135m"]
    with serving([*model, *flags]) as server:
        for number in range(arguments.rounds):
            order = list(clients)[:: 1 if number % 2 else -1]
            for name in order:
                rounds[name].append(clients[name](server.url, arguments, 100 + number))
                print(f"round {number}: {name}", file=sys.stderr)
    print("| median of rounds | " + " | ".join(rounds) + " | ratio | spread of each |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for figure in (*THROUGHPUTS, *LATENCIES):
        found = [[one[figure] for one in of] for of in rounds.values()]
        mine, their = map(statistics.median, found)
        spreads = ", ".join(f"{spread_percent(values):.1f} %" for values in found)
        print(f"| {figure} | {mine:.2f} | {their:.2f} | {mine / their:.3f} | {spreads} |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
