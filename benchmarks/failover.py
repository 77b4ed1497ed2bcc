"""What a client sees when the worker that decodes its answer is killed with `kill -9`.

One prefill and one decode worker; the prefill worker is left alone and takes over. The longest gap
between two chunks of the stream is set against the median gap of the same stream.

    python benchmarks/failover.py [--repeats 3] [serve flags]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import time
import urllib.request
from typing import Any

from server import serving

MAX_TOKENS = 200
KILL_AT = 60


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as response:
        return json.load(response)


def gaps_s(url: str, model: str) -> list[float]:
    """Gaps between the chunks of a stream whose decode worker is killed half way."""
    body = {
        "model": model,
        "prompt": "Once upon a time " * 40,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "X-Pdserve-Route": "split"},
    )
    pid = {w["id"]: w["pid"] for w in get(f"{url}/cluster")["workers"]}["decode-0"]
    times: list[float] = []
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                if len(times) == KILL_AT:
                    os.kill(pid, signal.SIGKILL)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments, flags = parser.parse_known_args()
    longest, median = [], []
    for _ in range(arguments.repeats):
        with serving(["--prefill", "1", "--decode", "1", *flags]) as server:
            model = get(f"{server.url}/v1/models")["data"][0]["id"]
            gaps = gaps_s(server.url, model)
            longest.append(max(gaps))
            median.append(statistics.median(gaps))
    pause, usual = statistics.median(longest), statistics.median(median)
    print(f"median gap    {1000 * usual:8.1f} ms")
    print(f"longest gap   {1000 * pause:8.1f} ms   {pause / usual:.0f} x")


if __name__ == "__main__":
    main()
