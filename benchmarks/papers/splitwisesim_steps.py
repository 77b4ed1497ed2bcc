"""SplitwiseSim's simplifications, taken back one at a time: what did each do to its results?

For clusters of Splitwise's evaluation (equal power, conversation), each a fifth of its size so that
minutes are enough (``--scale 1``: whole ones), the highest rate on a grid that keeps all nine
objectives, under SplitwiseSim's rules, with each of its simplifications taken back alone, and with
all of them. Below it the slowdowns at one rate. Llama-2-70B shows what its KV without grouped
heads costs, which BLOOM-176B does not have.

    python benchmarks/papers/splitwisesim_steps.py --data DIR --out steps.json

Runs that are in the file already are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_runs import add_data
from paper_tables import Cell, table
from splitwisesim import METRICS, PERCENTS, poisson, read_csv, simulate

from pdserve.cost.table import PerfTable
from pdserve.sim.splitwisesim import NONE, Departures

BLOOM, LLAMA = "bloom-176b", "llama-2-70b"
LONGEST_ANSWER = 1000
"""Of the trace: what a client would have to declare who wants none cut off."""
STEPS: dict[str, Departures] = {
    "as SplitwiseSim": NONE,
    "layer-wise transfers": Departures(layer_wise=True),
    "measured batches": Departures(real_batches=True),
    "grouped heads": Departures(gqa=True),
    "declared lengths": Departures(declared_tokens=LONGEST_ANSWER),
    "return when done": Departures(returns_early=True),
    "all of them": Departures(
        layer_wise=True,
        real_batches=True,
        gqa=True,
        declared_tokens=LONGEST_ANSWER,
        returns_early=True,
    ),
}
CLUSTERS = {
    "Baseline-A100": (70,),
    "Baseline-H100": (40,),
    "AA": (45, 25),
    "HH": (25, 15),
    "HA": (25, 26),
    "HHcap": (25, 21),
}
NO_GROUPS = ("grouped heads",)
"""Steps that change nothing for a model whose heads all have KV."""
LLAMA_STEPS = ("as SplitwiseSim", "grouped heads", "all of them")
LLAMA_CLUSTERS = ("AA", "HH")
START = {"Baseline-A100": 0.71}
"""Rate of a machine from which the search begins, where it is not `USUAL_START`."""
USUAL_START = 2.0


class Runs:
    """What has been simulated, kept in a file."""

    def __init__(self, data: Path, place: Path, scale: int) -> None:
        self._table = PerfTable.read((data / "splitwise_perf_model.csv").read_text())
        self._sizes = read_csv(data / "azure_2023_conv.csv")
        self._place = place
        self._scale = scale
        self._made: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}

    def machines(self, design: str) -> str:
        """``HH 5P3T``"""
        counts = [round(count / self._scale) for count in CLUSTERS[design]]
        kinds = "PT" if len(counts) == 2 else " "
        return f"{design} " + "".join(map("{}{}".format, counts, kinds)).strip()

    def at(self, model: str, machines: str, step: str, rate: int) -> dict[str, Any]:
        """What came of a run."""
        name = f"{model}|{machines}|{step}|{rate}"
        found: dict[str, Any] | None = self._made.get(name)
        if found is None:
            rows = poisson(float(rate), self._sizes)
            made = simulate(self._table, machines, rows, model, STEPS[step])
            found = {"broken": made.broken, "cpu_s": round(made.cpu_s, 1), **made.figures}
            self._made[name] = found
            self._place.write_text(json.dumps(self._made, indent=1) + "\n")
            print(f"{name}: {made.broken or 'met'} ({made.cpu_s:.1f} s)", file=sys.stderr)
        return found

    def highest(self, model: str, machines: str, step: str, grid: int, start: int) -> int:
        """The highest rate of the grid that keeps all objectives, by steps from ``start``."""
        rate = start
        while rate > 0 and self.at(model, machines, step, rate)["broken"]:
            rate -= grid
        if rate < start:
            return rate
        while not self.at(model, machines, step, rate + grid)["broken"]:
            rate += grid
        return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="where runs are kept (JSON)")
    parser.add_argument("--scale", type=int, default=5, help="what clusters are divided by (5)")
    parser.add_argument("--grid", type=int, default=1, help="of rates, requests/s (1)")
    parser.add_argument("--rate", type=int, default=14, help="at which slowdowns are shown (14)")
    asked = parser.parse_args()
    runs = Runs(asked.data, asked.out, asked.scale)
    for model, designs, steps in (
        (BLOOM, tuple(CLUSTERS), [step for step in STEPS if step not in NO_GROUPS]),
        (LLAMA, LLAMA_CLUSTERS, list(LLAMA_STEPS)),
    ):
        print(f"\n{model}: highest rate that keeps all nine objectives, requests/s\n")
        print(_highest(runs, model, designs, steps, asked.grid))
        print(f"{model}: slowdowns at {asked.rate} requests/s, P50 / P90 / P99\n")
        print(_slowdowns(runs, model, designs, steps, asked.rate))
    return 0


def _highest(
    runs: Runs, model: str, designs: Sequence[str], steps: Sequence[str], grid: int
) -> str:
    rows: list[list[Cell]] = []
    before: dict[str, int] = {}
    for step in steps:
        row: list[Cell] = [step]
        for design in designs:
            machines = runs.machines(design)
            most = sum(int(n) for n in re.findall(r"\d+", machines.split(" ")[1]))
            start = before.get(design, int(most * START.get(design, USUAL_START)))
            found = runs.highest(model, machines, step, grid, max(grid, start))
            before.setdefault(design, found)
            row.append(found)
        rows.append(row)
    return table(["", *map(runs.machines, designs)], rows)


def _slowdowns(
    runs: Runs, model: str, designs: Sequence[str], steps: Sequence[str], rate: int
) -> str:
    rows: list[list[Cell]] = []
    for machines in map(runs.machines, designs):
        for step in steps:
            made = runs.at(model, machines, step, rate)
            cells = [
                " / ".join(f"{made[f'{metric}_slowdown_p{p}']:.2f}" for p in PERCENTS)
                for metric in METRICS
            ]
            pause = f"{1e3 * made['mean_second_token_gap_s']:.0f} ms"
            rows.append([machines, step, *cells, pause, made["broken"] or "none"])
    head = ["cluster", "", "TTFT", "TBT", "E2E", "mean pause before token 2", "broken"]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
