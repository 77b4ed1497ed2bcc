"""SplitwiseSim's own runs, repeated with our machines: every cell of its results beside ours.

``replay``: 2,000 requests of the Azure conversation trace on small clusters, at its own speed and
at twice that; ``poisson``: 120 s of Poisson load on the clusters of Splitwise's evaluation, as
slowdowns against an idle A100 machine, and which of the nine objectives break. The results to be
met are in DIR/reference (see docs/splitwisesim.md), with the traces of the replays; Poisson loads
are drawn from DIR's conversation trace as SplitwiseSim's generator draws them.

    python benchmarks/papers/splitwisesim.py --data DIR [--part replay] [--only "HH 25P15T"]

With a copy of SplitwiseSim (``--splitwisesim DIR --python PYTHON``: an interpreter that has what it
needs) both are timed instead, on the same core in turn, with 70 requests/s on Splitwise's clusters
and two of the replays: `splitwisesim_speed`.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paper_runs import add_data
from splitwisesim_speed import PERCENTS, Load, Row, Simulators

from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import RequestId
from pdserve.cost.table import PerfTable
from pdserve.cost.table_machine import machine_of_table
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.sim.splitwisesim import NONE, Departures, SplitwiseSimFigures, imitate
from pdserve.workload.request import TraceRequest, own_segment
from pdserve.workload.summary import percentile

TABLE, SIZES = "splitwise_perf_model.csv", "azure_2023_conv.csv"
DESIGNS = {
    "Baseline-A100": ("{}xa100:mixed",),
    "Baseline-H100": ("{}xh100:mixed",),
    "AA": ("{}xa100:prefill", "{}xa100:decode"),
    "HH": ("{}xh100:prefill", "{}xh100:decode"),
    "HA": ("{}xh100:prefill", "{}xa100:decode"),
    "HHcap": ("{}xh100:prefill", "{}xh100cap:decode"),
}
METRICS = ("ttft", "tbt", "e2e")
DURATION_S = 120.0
TIMED_RPS = 70.0
TIMED = ("Baseline-A100 70", "Baseline-H100 40", "AA 45P25T", "HH 25P15T", "HA 25P26T",
         "HHcap 25P21T")  # fmt: skip
"""Splitwise's clusters of equal power, which are timed at 70 requests/s."""
TIMED_REPLAYS = ("conv2000 HH 3P1T", "conv2000 x2 AA 2P2T")


@dataclass(frozen=True, slots=True)
class Made:
    """One run: figures by name, the objectives that broke, and CPU seconds."""

    figures: dict[str, float]
    broken: str
    cpu_s: float


class Times(Observer):
    """TTFT, TBT and E2E of each request, and the pause before its second token."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {name: [] for name in (*METRICS, "pause")}
        self._decodes_s: dict[RequestId, float] = {}

    def life(self, event: LifeEvent) -> None:
        if event.name is LifeName.DECODE_STARTED:
            self._decodes_s.setdefault(event.request_id, event.at_s)

    def ended(self, at_s: float, request: Ended) -> None:
        ttft_s, e2e_s = request.ttft_s, request.e2e_s
        assert ttft_s is not None
        assert e2e_s is not None
        self.of["ttft"].append(ttft_s)
        self.of["tbt"].append((e2e_s - ttft_s) / request.output_tokens)
        self.of["e2e"].append(e2e_s)
        decodes_s = self._decodes_s.pop(request.request_id)
        self.of["pause"].append(decodes_s - request.arrived_s - ttft_s)


def main() -> int:
    asked = _parser().parse_args()
    if asked.splitwisesim:
        return _time_both(asked)
    table = PerfTable.read((asked.data / TABLE).read_text())
    worst = 0.0
    for name, known, rows in _runs(asked):
        if not _is_asked(asked, name):
            continue
        model = "llama-2-70b" if "Llama" in name else "bloom-176b"
        made = simulate(table, known["machines"], rows, model)
        off, text = _compare(known, made)
        worst = max(worst, off)
        print(f"{name:38s} {text}  {made.cpu_s:6.1f} s", flush=True)
    print(f"largest difference {worst:.2%}")
    return 0 if worst < asked.bound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_data(parser)
    parser.add_argument("--part", choices=("replay", "poisson"), help="only this part")
    parser.add_argument("--only", nargs="+", help="only runs whose name has one of these")
    parser.add_argument("--bound", type=float, default=0.01, help="largest difference (0.01)")
    parser.add_argument("--splitwisesim", type=Path, help="a copy of it: time both")
    parser.add_argument("--python", default=sys.executable, help="what it runs with")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is timed (3)")
    return parser


def _is_asked(asked: argparse.Namespace, name: str) -> bool:
    return not asked.only or any(part in name for part in asked.only)


def _time_both(asked: argparse.Namespace) -> int:
    python = shutil.which(asked.python)
    if python is None:
        sys.exit(f"--python: there is no {asked.python}")
    simulators = Simulators(asked.splitwisesim, Path(python).absolute(), asked.data / TABLE)
    loads = [load for load in _timed(asked) if _is_asked(asked, load.name)]
    return simulators.take_turns(loads, asked.repeat)


def _timed(asked: argparse.Namespace) -> Iterator[Load]:
    """What both are timed with."""
    if asked.part in (None, "poisson"):
        rows = poisson(TIMED_RPS, read_csv(asked.data / SIZES))
        for machines in TIMED:
            yield _load(f"{machines}, {TIMED_RPS:g} rps", machines, rows)
    if asked.part in (None, "replay"):
        for name, known, rows in _replays(asked.data):
            if name in TIMED_REPLAYS:
                yield _load(name, known["machines"], rows)


def _load(name: str, machines: str, rows: Sequence[Row]) -> Load:
    design = machines.split(" ", 1)[0]
    return Load(name, design, tuple(_counts(machines)), cluster_of(machines), "bloom-176b", rows)


def _runs(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    """Name, row of the reference, and requests of each run."""
    if asked.part in (None, "replay"):
        yield from _replays(asked.data)
    if asked.part in (None, "poisson"):
        sizes = read_csv(asked.data / SIZES)
        for known in read_csv(asked.data / "reference/splitwisesim_conv_poisson_120s.csv"):
            known["machines"] = known["design"].removeprefix("x")
            rows = poisson(float(known["rps"]), sizes)
            assert len(rows) == int(known["requests"]), "other requests than SplitwiseSim had"
            yield f"{known['design']} {known['rps']} rps", known, rows


def _replays(data: Path) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    folder = data / "reference"
    for known in read_csv(folder / "splitwisesim_conv_replay.csv"):
        file = "conv2000x2" if "x2" in known["trace"] else "conv2000"
        rows = read_rows(folder / f"splitwisesim_{file}.csv")
        yield f"{known['trace']} {known['machines']}", known, rows


def poisson(rate: float, sizes: Sequence[dict[str, str]]) -> list[Row]:
    """The requests that SplitwiseSim's generator makes with numpy's seed 0: first all gaps, then
    all prompts, then all answers, each drawn from the trace's by itself."""
    number = int(rate * DURATION_S * 1.5) + 1000
    drawn = np.random.RandomState(0)
    at_s = np.cumsum(drawn.standard_exponential(number) * (1.0 / rate))
    prompts, outputs = (
        np.array([int(size[column]) for size in sizes])[drawn.choice(len(sizes), number)]
        for column in ("ContextTokens", "GeneratedTokens")
    )
    rows = zip(at_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [row for row in rows if row[0] < DURATION_S]


def simulate(
    table: PerfTable,
    machines: str,
    rows: Sequence[Row],
    model: str = "bloom-176b",
    but: Departures = NONE,
) -> Made:
    spec = parse_cluster(cluster_of(machines))
    given = tuple(machine_of_table(table, group.hardware, model) for group in spec.groups)
    settings = imitate(SimSettings(cluster=spec, machines=given), table, but)
    requests = (
        TraceRequest(index=i, at_s=at_s, segments=(own_segment(i, prompt),), output_tokens=output)
        for i, (at_s, prompt, output) in enumerate(rows)
    )
    times, slowdowns = Times(), SplitwiseSimFigures(table, model)
    simulation = Simulation(settings, requests, [times, slowdowns])
    begun_s = time.process_time()
    simulation.run()
    cpu_s = time.process_time() - begun_s
    document = slowdowns.document()
    figures = {"mean_second_token_gap_s": sum(times.of["pause"]) / len(rows)}
    for metric in METRICS:
        ordered = sorted(times.of[metric])
        for percent in PERCENTS:
            figures[f"{metric}_p{percent}_s"] = percentile(ordered, percent)
            slowdown = document["slowdowns"][metric][f"p{percent}"]
            figures[f"{metric}_slowdown_p{percent}"] = slowdown
    return Made(figures, " ".join(document["violated_slos"]), cpu_s)


def cluster_of(machines: str) -> str:
    """``HH 25P15T`` as we write it."""
    name, _ = machines.split(" ", 1)
    counts = _counts(machines)
    parts = DESIGNS[name]
    return ",".join(part.format(count) for part, count in zip(parts, counts, strict=True))


def _counts(machines: str) -> list[int]:
    _, numbers = machines.split(" ", 1)
    return [int(n) for n in "".join(c if c.isdigit() else " " for c in numbers).split()]


def _compare(known: dict[str, str], made: Made) -> tuple[float, str]:
    """The largest relative difference of a percentile; and all cells, ours under theirs."""
    kind = "slowdown_p{}" if "design" in known else "p{}_s"
    cells, worst = [], 0.0
    for metric in METRICS:
        names = [f"{metric}_{kind.format(percent)}" for percent in PERCENTS]
        ours, theirs = [made.figures[n] for n in names], [float(known[n]) for n in names]
        worst = max([worst, *(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))])
        pairs = (f"{a:.4g}|{b:.4g}" for a, b in zip(ours, theirs, strict=True))
        cells.append(f"{metric} " + " ".join(pairs))
    broken = known.get("violated_slos", known.get("nine_slos", "")).removeprefix("fail: ")
    same = made.broken == ("" if broken in ("-", "met") else broken)
    if not same:
        worst = math.inf
    return worst, "  ".join(cells) + f"  SLOs {'as theirs' if same else made.broken or 'met'}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


def read_rows(path: Path) -> list[Row]:
    """A trace in SplitwiseSim's form."""
    with path.open() as lines:
        return [
            (float(row["arrival_timestamp"]), int(row["prompt_size"]), int(row["token_size"]))
            for row in csv.DictReader(lines)
        ]


if __name__ == "__main__":
    sys.exit(main())
