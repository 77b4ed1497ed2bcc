"""pdserve beside other servers: same model, same cores, same client, same load.

The peers' start scripts lie in a folder of the user's (--peers), their model and environments in
another (--models): `vllm-serve DIR PORT CORES` and `llamacpp-serve DIR PORT THREADS SLOTS` are
called as they are, and the model is `DIR/hf`. A system whose script is missing, or that does not
get ready, stays in the table with the reason.

Every round starts one server after the other and sends each all cells, so what changes on the
machine between rounds meets all of them. A cell's load has a seed of its own in each round (no
prefix cache answers for an earlier one), equal for all systems, and is text of one token a word.
Figures are medians over the rounds; the table has every cell, those that are lost included.

    python benchmarks/peers.py --peers DIR --models DIR --out peers.json
    python benchmarks/peers.py --models DIR --systems pd,mixed-1 --cells 128/32 --concurrency 1,4
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CELLS = "512/64,1024/32,128/128,128/256"
READY_TIMEOUT_S = 300.0
FIGURES = ("total_token_throughput", "output_throughput", "request_throughput")
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


@dataclass(frozen=True)
class Setting:
    """Where things are and which cores are used."""

    models: Path
    peers: Path | None
    cores: str
    concurrencies: tuple[int, ...]
    per_stream: int
    least: int

    @property
    def num_cores(self) -> int:
        return len(self.cores.split(","))


Command = Callable[[Setting, int], list[str]]


def pdserve(*flags: str) -> Command:
    def command(setting: Setting, port: int) -> list[str]:
        model = ["--model", str(setting.models / "hf"), "--port", str(port)]
        return [sys.executable, "-m", "pdserve", "serve", *model, *flags]

    return command


def peer(script: str, *arguments: Callable[[Setting], object]) -> Command:
    def command(setting: Setting, port: int) -> list[str]:
        if setting.peers is None:
            raise FileNotFoundError("--peers is not given")
        path = setting.peers / script
        if not path.exists():
            raise FileNotFoundError(f"there is no {path.name} in --peers")
        extra = [str(argument(setting)) for argument in arguments]
        return [str(path), str(setting.models), str(port), *extra]

    return command


INT8 = ("--weight-dtype", "int8", "--kv-dtype", "int8")
SYSTEMS: dict[str, Command] = {
    "pd": pdserve("--prefill", "1", "--decode", "1"),
    "mixed-2": pdserve("--mixed", "2"),
    "mixed-1": pdserve("--mixed", "1"),
    "pd-int8": pdserve("--prefill", "1", "--decode", "1", *INT8),
    "mixed-2-int8": pdserve("--mixed", "2", *INT8),
    "mixed-1-int8": pdserve("--mixed", "1", *INT8),
    "vllm": peer("vllm-serve", lambda setting: f"0-{setting.num_cores - 1}"),
    "llamacpp-2": peer("llamacpp-serve", lambda _: 2, lambda s: max(s.concurrencies)),
    "llamacpp-1": peer("llamacpp-serve", lambda _: 1, lambda s: max(s.concurrencies)),
}


@contextlib.contextmanager
def running(command: list[str], url: str, cores: str) -> Iterator[None]:
    """A server that is ready, until the block ends. Raises `RuntimeError` with its last words."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["taskset", "-c", cores, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, url)
            yield
        except RuntimeError as error:
            log.seek(0)
            words = log.read()[-300:].decode(errors="replace").strip()
            raise RuntimeError(f"{error}: {words}") from error
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/health", timeout=2) as response,
        ):
            if response.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"it was not ready within {READY_TIMEOUT_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole session of the server, which its start script may have left children in."""
    for signal_number, wait_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


def measure(url: str, cell: str, concurrency: int, seed: int, setting: Setting) -> dict[str, Any]:
    """One cell: the `summary` and `client` of pdserve bench."""
    inputs, outputs = cell.split("/")
    num_requests = max(setting.least, setting.per_stream * concurrency)
    result = subprocess.run(
        [
            "taskset", "-c", setting.cores, sys.executable, "-m", "pdserve", "bench", "--url", url,
            "--input", inputs, "--output", outputs, "--prompt", "words", "--json", "-",
            "--concurrency", str(concurrency), "-n", str(num_requests),
            "--warmup", str(min(concurrency, 4)), "--seed", str(seed), "--no-progress",
        ],
        capture_output=True,
        check=False,
        text=True,
    )  # fmt: skip
    if result.returncode:
        return {"error": (result.stderr or result.stdout)[-300:]}
    document = json.loads(result.stdout)
    return {**document["summary"], "client": document["client"]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_round(
    setting: Setting, names: list[str], cells: list[str], number: int
) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(system, cell, concurrency, figures) of every system, one after the other."""
    grid = [(cell, concurrency) for cell in cells for concurrency in setting.concurrencies]
    for name in names:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        try:
            with running(SYSTEMS[name](setting, port), url, setting.cores):
                for place, (cell, concurrency) in enumerate(grid):
                    seed = 1000 * number + place
                    figures = measure(url, cell, concurrency, seed, setting)
                    yield name, cell, concurrency, figures
        except (FileNotFoundError, RuntimeError) as error:
            for cell, concurrency in grid:
                yield name, cell, concurrency, {"error": str(error)}


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds that went well; how many did not, and why."""
    good = [figures for figures in rounds if "error" not in figures]
    cell: dict[str, Any] = {"rounds": len(rounds), "good_rounds": len(good)}
    if not good:
        return cell | {"error": rounds[-1]["error"]}
    for name in FIGURES:
        cell[name] = statistics.median(figures[name] for figures in good)
    for name in LATENCIES:
        for part in ("mean", "median", "p90", "p99"):
            cell[f"{name}.{part}"] = statistics.median(figures[name][part] for figures in good)
    cell["failed_requests"] = sum(figures["failed"] for figures in good)
    cell["client_cpu_share"] = statistics.median(f["client"]["cpu_share"] for f in good)
    return cell


def table(results: dict[str, dict[str, Any]], names: list[str], figure: str) -> list[str]:
    lines = [f"| {figure} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for cell, by_system in results.items():
        values = [by_system[name].get(figure) for name in names]
        shown = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {cell} | " + " | ".join(shown) + " |")
    return lines


def ratios(results: dict[str, dict[str, Any]], ours: list[str], other: str) -> list[float]:
    """The best of ours over the other in each cell where both have a figure."""
    found = []
    for by_system in results.values():
        best = max((by_system[name].get(FIGURES[0], 0.0) for name in ours), default=0.0)
        theirs = by_system[other].get(FIGURES[0], 0.0)
        if best and theirs:
            found.append(best / theirs)
    return found


def show(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    for figure in (FIGURES[0], "ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean", "itl_ms.p99"):
        print("\n".join(table(results, names, figure)), end="\n\n")
    for other in [name for name in names if name.startswith(("vllm", "llamacpp"))]:
        for title, int8 in (("bf16", False), ("int8", True)):
            ours = [n for n in names if n.startswith(("pd", "mixed")) and ("int8" in n) == int8]
            found = ratios(results, ours, other)
            if found:
                mean = math.exp(statistics.fmean(map(math.log, found)))
                print(
                    f"best of {title} / {other}: geometric mean {mean:.2f}, least {min(found):.2f}"
                )
    for name in names:
        reasons = {by_system[name].get("error") for by_system in results.values()} - {None}
        for reason in reasons:
            print(f"{name}: no figure: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", type=Path, required=True, help="folder that holds hf/")
    parser.add_argument("--peers", type=Path, help="folder with the peers' start scripts")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--cells", default=CELLS, help="prompt/answer tokens")
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--cores", default="0,1", help="of server and client together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-stream", type=int, default=4, help="requests of each stream")
    parser.add_argument("--least", type=int, default=8, help="requests of a cell at least")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    arguments = parser.parse_args()
    names = arguments.systems.split(",")
    unknown = set(names) - set(SYSTEMS)
    if unknown:
        parser.error(f"unknown systems {', '.join(sorted(unknown))}: use {', '.join(SYSTEMS)}")
    concurrencies = tuple(int(number) for number in arguments.concurrency.split(","))
    setting = Setting(
        arguments.models.resolve(),
        arguments.peers,
        arguments.cores,
        concurrencies,
        arguments.per_stream,
        arguments.least,
    )
    raw: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for name, cell, concurrency, figures in run_round(
            setting, names, arguments.cells.split(","), number
        ):
            raw.setdefault((f"{cell} c{concurrency}", name), []).append(figures)
            shown = figures.get("error", "")
            rate = figures.get(FIGURES[0], 0.0)
            print(f"{number} {name} {cell} c{concurrency}: {rate:.1f} {shown}", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {}
    for (cell, name), rounds in raw.items():
        results.setdefault(cell, {})[name] = medians(rounds)
    show(results, names)
    if arguments.out is not None:
        machine = {"platform": platform.platform(), "cores": arguments.cores}
        flags = {key: str(value) for key, value in vars(arguments).items()}
        document = {"machine": machine, "settings": flags, "medians": results}
        document["rounds"] = [{"cell": c, "system": s, "rounds": r} for (c, s), r in raw.items()]
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
