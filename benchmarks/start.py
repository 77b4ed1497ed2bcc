"""How long a server takes to get ready, and what it costs to leave it idle.

Ready means that `/health` answers 200: both workers have loaded the model. It is set against the
floor of this machine in the same run: the time that one Python process needs to import torch, which
each worker must do. The idle cost is the CPU time of each process over a quiet interval.

    python benchmarks/start.py [--repeats 3] [--idle-s 10] [serve flags]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request


def import_torch_s() -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started_s


def cpu_s(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(flags: list[str]) -> tuple[subprocess.Popen[bytes], str, float]:
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pdserve", "serve", "--port", "0", "--log-format", "json", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    return process, url, time.perf_counter() - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--idle-s", type=float, default=10.0)
    arguments, flags = parser.parse_known_args()
    ready_s, torch_s, idle = [], [], {}
    for repeat in range(arguments.repeats):
        torch_s.append(import_torch_s())
        process, url, took_s = start(flags)
        ready_s.append(took_s)
        try:
            if repeat == arguments.repeats - 1:
                with urllib.request.urlopen(f"{url}/cluster") as response:
                    workers = json.load(response)["workers"]
                pids = {"gateway": process.pid, **{w["id"]: w["pid"] for w in workers}}
                before = {name: cpu_s(pid) for name, pid in pids.items()}
                time.sleep(arguments.idle_s)
                idle = {
                    name: (cpu_s(pid) - before[name]) / arguments.idle_s
                    for name, pid in pids.items()
                }
        finally:
            process.terminate()
            process.wait()
    floor, ready = statistics.median(torch_s), statistics.median(ready_s)
    print(f"import torch, one process   {floor:6.2f} s")
    print(f"server ready                {ready:6.2f} s   {ready / floor:.1f} x")
    for name, share in idle.items():
        print(f"idle {name:<22} {100 * share:6.2f} % of a core")


if __name__ == "__main__":
    main()
