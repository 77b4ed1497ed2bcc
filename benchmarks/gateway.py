"""What the gateway's process costs: CPU time per streamed token and per request.

The workers are fake ones that keep a pace (``paced.py``), so the engine is no part of the figure:
each step gives every stream its next token, and the gateway takes them apart, detokenizes, writes
and sends them, each as an event of its own. Prompts are text or token ids, or a chat of one
message; the tokenizer is the model's. The client is `pdserve bench`, in a process of its own; it
and the workers share one core, and the gateway has another to itself.

Each round sends two loads, of short and of long answers, and solves
CPU = requests x a + tokens x b for a and b; the table has the medians over the rounds. Beside it
stands the same for a bare ASGI application that does nothing but send as many events of the same
size at the same pace, on the same core, in turn with the gateway: what uvicorn and the sockets cost
by themselves. "busy" is the share of its core that the gateway took under the long load: near
100 % tokens would queue up and be sent together, which is cheaper.

    python benchmarks/gateway.py [--rounds 5] [--streams 64] [--http h11] [serve flags]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import Server, serving

HERE = Path(__file__).resolve().parent
LOADS = {
    "text": ("--endpoint", "completions", "--prompt", "words"),
    "token ids": ("--endpoint", "completions", "--prompt", "ids"),
    "chat": ("--endpoint", "chat", "--prompt", "words"),
}
BARE = "bare"


# --- the bare application ------------------------------------------------------------------------


class BareApp:
    """Answers any POST with ``max_tokens`` events of ``event_bytes`` bytes, one at each beat."""

    def __init__(self, event_bytes: int, step_s: float) -> None:
        head = b'data: {"id":"bare","choices":[{"index":0,"text":"'
        tail = b'","finish_reason":null}]}\n\n'
        self._event = head + b"x" * max(0, event_bytes - len(head) - len(tail)) + tail
        self._last = self._event.replace(b"null", b'"length"')
        self._step_s = step_s
        self._beat = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, StreamingResponse

        if scope["method"] != "POST":
            await PlainTextResponse("{}")(scope, receive, send)
            return
        self._beating = self._beating or asyncio.create_task(self._go_on_beating())
        body = await Request(scope, receive).json()
        events = self._events(body["max_tokens"])
        await StreamingResponse(events, media_type="text/event-stream")(scope, receive, send)

    async def _events(self, number: int) -> AsyncIterator[bytes]:
        for left in reversed(range(number)):
            await self._beat.wait()
            yield self._event if left else self._last
        yield b"data: [DONE]\n\n"

    async def _go_on_beating(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            self._beat.set()
            self._beat = asyncio.Event()


def run_bare(arguments: argparse.Namespace) -> None:
    import uvicorn

    from pdserve.serve.server import bind

    bound = bind("127.0.0.1", 0)
    host, port = bound.getsockname()
    print(json.dumps({"url": f"http://{host}:{port}"}), flush=True)
    app = BareApp(arguments.bare, arguments.step_ms / 1e3)
    options: dict[str, Any] = {"access_log": False, "log_level": "error", "lifespan": "off"}
    # The event loop is the gateway's: asyncio's own.
    config = uvicorn.Config(app, http=arguments.http, loop="asyncio", **options)
    asyncio.run(uvicorn.Server(config).serve(sockets=[bound]))


@contextlib.contextmanager
def bare_serving(event_bytes: int, arguments: argparse.Namespace) -> Iterator[Server]:
    command = [sys.executable, __file__, "--bare", str(event_bytes), "--http", arguments.http]
    command += ["--step-ms", str(arguments.step_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield Server(json.loads(process.stdout.readline())["url"], process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """What one load took of the server's process. Times in s."""

    requests: int
    tokens: int
    cpu_s: float
    wall_s: float


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def move(pid: int, core: int) -> None:
    """All threads of a process onto one core; what it starts later inherits that."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def place(server: Server, arguments: argparse.Namespace) -> None:
    """The gateway onto its core, its workers onto the other."""
    move(server.pid, arguments.core)
    with urllib.request.urlopen(f"{server.url}/cluster") as response:
        for worker in json.load(response)["workers"]:
            move(worker["pid"], arguments.other_core)


def send(
    server: Server, name: str, answer_tokens: int, seed: int, arguments: argparse.Namespace
) -> Reading:
    """One load in a closed loop. Raises `SystemExit` if a request failed."""
    command = [
        sys.executable, "-m", "pdserve", "bench", "--url", server.url, "--json", "-",
        "--model", arguments.model, *LOADS[name],
        "--input", str(arguments.input), "--output", str(answer_tokens), "--seed", str(seed),
        "-n", str(arguments.requests), "--concurrency", str(arguments.streams), "--no-progress",
    ]  # fmt: skip
    before_s = cpu_s(server.pid)
    done = subprocess.run(
        ["taskset", "-c", str(arguments.other_core), *command], capture_output=True, check=True
    )
    took_s = cpu_s(server.pid) - before_s
    summary = json.loads(done.stdout)["summary"]
    if summary["completed"] != arguments.requests:
        raise SystemExit(f"{summary['failed']} requests failed: {summary['messages']}")
    num_tokens = summary["output_tokens"]
    return Reading(summary["completed"], num_tokens, took_s, summary["duration_s"])


def event_bytes(server: Server, arguments: argparse.Namespace) -> int:
    """Mean size of the events of one streamed answer."""
    question = {"model": arguments.model, "prompt": "a", "max_tokens": 64, "stream": True}
    question |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        events = [event for event in response.read().split(b"\n\n") if b"choices" in event]
    return round(statistics.mean(map(len, events))) + 2


# --- the figures ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round. ``busy``: CPU time over duration of the long load."""

    request_ms: float
    token_ms: float
    busy: float

    @classmethod
    def of(cls, short: Reading, long: Reading) -> Cost:
        """Solve cpu = requests x a + tokens x b, times 1,000."""
        of_short, of_long = short.cpu_s / short.requests, long.cpu_s / long.requests
        length_of_short, length_of_long = (r.tokens / r.requests for r in (short, long))
        token_s = (of_long - of_short) / (length_of_long - length_of_short)
        request_s = of_short - token_s * length_of_short
        return cls(1e3 * request_s, 1e3 * token_s, long.cpu_s / long.wall_s)


def measure(server: Server, name: str, number: int, arguments: argparse.Namespace) -> Cost:
    lengths = (arguments.short, arguments.long)
    readings = [send(server, name, length, 1000 * number + length, arguments) for length in lengths]
    return Cost.of(*readings)


def show(costs: dict[str, list[Cost]]) -> None:
    print(f"{'':<14}{'ms a token':>20}{'ms a request':>20}{'busy':>8}")
    for name, rounds in costs.items():
        shown = ""
        for part in ("token_ms", "request_ms"):
            values = [getattr(cost, part) for cost in rounds]
            spread = f"{min(values):.3f}-{max(values):.3f}"
            shown += f"{statistics.median(values):>8.4f} {spread:>11}"
        print(f"{name:<14}{shown}{statistics.median(c.busy for c in rounds):>8.0%}")
    bare = costs[BARE]
    for name, rounds in costs.items():
        if name != BARE:
            token, request = (
                statistics.median(getattr(cost, part) for cost in rounds)
                / statistics.median(getattr(cost, part) for cost in bare)
                for part in ("token_ms", "request_ms")
            )
            print(f"{name} / bare: {token:.2f} a token, {request:.2f} a request")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=192, help="of each load")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--short", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--long", type=int, default=132)
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of an engine's step")
    parser.add_argument("--core", type=int, default=0, help="of the gateway")
    parser.add_argument("--other-core", type=int, default=1, help="of everything else")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--http", default="auto", help="h11, httptools, or what is installed")
    parser.add_argument("--loads", default=",".join(LOADS), help="of %(default)s")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.bare is not None:
        run_bare(arguments)
        return
    names = arguments.loads.split(",")
    environment = {"PACED_STEP_S": str(arguments.step_ms / 1e3), "PACED_HTTP": arguments.http}
    flags = ["--engine", "fake-foreign", "--model", arguments.model, *flags]
    program = (str(HERE / "paced.py"),)
    costs: dict[str, list[Cost]] = {}
    with serving(flags, program=program, environment=environment) as server:
        place(server, arguments)
        size = event_bytes(server, arguments)
        with bare_serving(size, arguments) as bare:
            move(bare.pid, arguments.core)
            turns = [(name, server, name) for name in names] + [(BARE, bare, "text")]
            for _, system, load in turns:  # what happens once happens here
                send(system, load, arguments.short, 1, arguments)
            for number in range(1, arguments.rounds + 1):
                for name, system, load in turns:
                    cost = measure(system, load, number, arguments)
                    costs.setdefault(name, []).append(cost)
    print(f"{arguments.streams} streams, prompts of {arguments.input} tokens, answers of", end=" ")
    print(f"{arguments.short} and {arguments.long}, events of {size} bytes")
    show(costs)


if __name__ == "__main__":
    main()
