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

from server import Server, serving


def import_torch_s() -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started_s


def cpu_s(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_shares(server: Server, idle_s: float) -> dict[str, float]:
    """Share of a core that each process takes while nobody asks anything."""
    with urllib.request.urlopen(f"{server.url}/cluster") as response:
        workers = json.load(response)["workers"]
    pids = {"gateway": server.pid, **{worker["id"]: worker["pid"] for worker in workers}}
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(idle_s)
    return {name: (cpu_s(pid) - before[name]) / idle_s for name, pid in pids.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--idle-s", type=float, default=10.0)
    arguments, flags = parser.parse_known_args()
    ready_s, torch_s, idle = [], [], {}
    for repeat in range(arguments.repeats):
        torch_s.append(import_torch_s())
        started_s = time.perf_counter()
        with serving(flags) as server:
            ready_s.append(time.perf_counter() - started_s)
            if repeat == arguments.repeats - 1:
                idle = idle_shares(server, arguments.idle_s)
    floor, ready = statistics.median(torch_s), statistics.median(ready_s)
    print(f"import torch, one process   {floor:6.2f} s")
    print(f"server ready                {ready:6.2f} s   {ready / floor:.1f} x")
    for name, share in idle.items():
        print(f"idle {name:<22} {100 * share:6.2f} % of a core")


if __name__ == "__main__":
    main()
