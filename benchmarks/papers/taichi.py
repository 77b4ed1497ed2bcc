"""TaiChi (arXiv 2508.01989): when splitting is worth it depends on the shape of the SLO.

Eight workers of 4 A100s that serve Llama-2-70B, as in the paper, under rising Poisson loads, and
three shapes of SLO: a loose bound on TTFT with a tight one on TPOT, the other way round, and both
of middling size. Which layout bears the highest rate with 90 % of the requests within both bounds?

``aggregated``  every worker does both, prompts in chunks beside the decodes
``split``       pools; of all divisions of the eight workers, the one that bears most
``predicted``   the server's default policy: pools, from the middle, that its role controller
                resizes; each request goes where it is predicted to be served best, in two
                places or in one; it knows the bounds

The paper's load is not known to us (its figures here are at second hand): sizes are drawn from the
Azure conversation trace, prompts up to 3,400 tokens, since the model ends at 4,096.

    python benchmarks/papers/taichi.py --data DIR
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paper_runs import Clients, Lab, Seen, figures, parser_of, patient, plain, promised, simulate
from paper_tables import Cell, table, write

from pdserve.cost.roofline import machine_of
from pdserve.node.settings import RoleControl
from pdserve.plot.axis import even_axis
from pdserve.plot.chart import Chart
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import parse_cluster
from pdserve.workload import shaping
from pdserve.workload.arrivals import arrivals
from pdserve.workload.request import TraceRequest
from pdserve.workload.synthetic import drawn
from pdserve.workload.traces import read_trace

TRACE = "azure_2023_conv.csv"
MODEL, HARDWARE = "llama-2-70b", "a100-tp4"
NUM_WORKERS = 8
MAX_INPUT, MAX_OUTPUT = 3400, 600
ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True)
class Shape:
    """``aggregated`` and ``split``: the paper's attainment in percent, of one load."""

    ttft_s: float
    tpot_s: float
    aggregated: int
    split: int

    @property
    def words(self) -> str:
        return f"{self.ttft_s:g} s, {self.tpot_s * 1e3:g} ms"


SHAPES = {
    "loose TTFT, tight TPOT": Shape(16.0, 0.06, 7, 98),
    "tight TTFT, loose TPOT": Shape(5.0, 0.25, 97, 42),
    "balanced": Shape(6.0, 0.1, 16, 50),
}
Curve = dict[float, float]
"""Attainment by rate."""


class Study:
    """``rates`` in requests per second, rising."""

    def __init__(
        self,
        lab: Lab,
        trace: Path,
        *,
        rates: Sequence[float],
        duration_s: float,
        num_workers: int = NUM_WORKERS,
        seed: int = 0,
    ) -> None:
        self.lab = lab
        self.rates, self.duration_s, self.seed = rates, duration_s, seed
        self.num_workers = num_workers
        self._trace = trace
        self._sizes: list[TraceRequest] = []

    def load(self, rate: float) -> list[TraceRequest]:
        if not self._sizes:
            whole = read_trace(self._trace)
            self._sizes = list(shaping.bounded(whole, MAX_INPUT, MAX_OUTPUT))
        times = arrivals("poisson", rate, 1.0, self.seed)
        requests = drawn(self._sizes, times, self.seed, pairs=True)
        return list(itertools.takewhile(lambda r: r.at_s < self.duration_s, requests))

    def settings(self, cluster: str, policy: str) -> SimSettings:
        spec = parse_cluster(cluster)
        return patient(
            SimSettings(
                cluster=spec,
                machines=tuple(machine_of(group.hardware, MODEL) for group in spec.groups),
                policy=policy,
                declared_tokens=MAX_OUTPUT,
                seed=self.seed,
            )
        )

    def pools(self, num_prefill: int) -> str:
        num_decode = self.num_workers - num_prefill
        return f"{num_prefill}x{HARDWARE}:prefill,{num_decode}x{HARDWARE}:decode"

    def divisions(self) -> list[int]:
        """How many of the workers prefill: all but the most lopsided divisions."""
        spare = 1 if self.num_workers > 4 else 0
        return list(range(1 + spare, self.num_workers - spare))

    def run(self, settings: SimSettings, rate: float) -> dict[str, Any]:
        """Attainment of each shape, and figures."""
        asked = plain(settings) | {
            "rate": rate, "duration_s": self.duration_s, "roles": str(settings.roles),
        }  # fmt: skip

        def work() -> dict[str, Any]:
            clients = Clients()
            simulate(settings, iter(self.load(rate)), [clients])
            return figures(clients.seen) | {
                "attainment": {name: share(clients.seen, s) for name, s in SHAPES.items()}
            }

        return self.lab.result(asked, work)

    def curve(self, settings: SimSettings, shape: str) -> Curve:
        """Attainment at all rates; beyond one with less than a tenth, none is taken to be left."""
        found: Curve = {}
        for rate in self.rates:
            lost = bool(found) and min(found.values()) < 0.1
            found[rate] = 0.0 if lost else self.run(settings, rate)["attainment"][shape]
        return found


def share(seen: Sequence[Seen], shape: Shape) -> float:
    met = sum(each.meets(shape.ttft_s, shape.tpot_s) for each in seen)
    return met / len(seen) if seen else 0.0


def goodput(curve: Curve) -> float:
    """The highest rate with `ATTAINMENT`, between two rates on the line through them; 0: none."""
    best = 0.0
    points = sorted(curve.items())
    if points and points[0][1] >= ATTAINMENT:
        best = points[0][0]
    for (rate, attained), (higher, then) in itertools.pairwise(points):
        if attained >= ATTAINMENT > then:
            return rate + (higher - rate) * (attained - ATTAINMENT) / (attained - then)
        if then >= ATTAINMENT:
            best = higher
    return best


def curves(study: Study, name: str) -> dict[str, tuple[str, Curve]]:
    """By layout: the cluster, and its attainment of the shape of this name."""
    shape = SHAPES[name]
    aggregated = f"{study.num_workers}x{HARDWARE}:mixed"
    found = {
        "aggregated": (
            aggregated,
            study.curve(study.settings(aggregated, "aggregated"), name),
        )
    }
    best = max(
        (
            (cluster, study.curve(study.settings(cluster, "shortest_queue"), name))
            for cluster in map(study.pools, study.divisions())
        ),
        key=lambda each: (goodput(each[1]), sum(each[1].values())),
    )
    found["split"] = best
    pools = study.pools(study.num_workers // 2)
    flexible = replace(
        promised(study.settings(pools, "predicted"), shape.ttft_s, shape.tpot_s),
        roles=RoleControl.AUTO,
    )
    found["predicted"] = (pools, study.curve(flexible, name))
    return found


def report(study: Study, found: dict[str, dict[str, tuple[str, Curve]]], said: str) -> str:
    rows: list[list[Cell]] = []
    for name, layouts in found.items():
        shape = SHAPES[name]
        rates = {layout: goodput(curve) for layout, (_, curve) in layouts.items()}
        paper = "split" if shape.split > shape.aggregated else "aggregated"
        ours = "split" if rates["split"] > rates["aggregated"] else "aggregated"
        rows.append(
            [
                name, shape.words, f"{shape.aggregated} / {shape.split} %", paper, ours,
                rates["aggregated"], rates["split"], layouts["split"][0], rates["predicted"],
            ]
        )  # fmt: skip
    head = ["SLO", "TTFT, TPOT", "paper: aggregated / split", "paper's winner", "ours",
            "aggregated, rps", "split, rps", "its pools", "predicted, rps"]  # fmt: skip
    parts = [f"{said}\n", f"### Goodput at {ATTAINMENT:.0%}\n\n{table(head, rows)}"]
    for name, layouts in found.items():
        rows = [
            [f"{layout} ({cluster})", *(f"{100 * curve[rate]:.0f} %" for rate in study.rates)]
            for layout, (cluster, curve) in layouts.items()
        ]
        head = ["layout", *(f"{rate:g} rps" for rate in study.rates)]
        title = f"### Attainment: {name} ({SHAPES[name].words})"
        parts.append(f"{title}\n\n{table(head, rows)}")
    return "\n".join(parts)


def picture(name: str, layouts: dict[str, tuple[str, Curve]]) -> str:
    rates = list(next(iter(layouts.values()))[1])
    chart = Chart(
        name, even_axis(0.0, max(rates)), even_axis(0.0, 1.0), x_unit="requests/s", percent=True
    )
    for layout, (_, curve) in layouts.items():
        chart.curve(sorted(curve.items()), layout)
    return chart.svg()


def answer(study: Study) -> list[Path]:
    """Asks everything, and writes it down."""
    found = {name: curves(study, name) for name in SHAPES}
    said = (
        f"{MODEL} on {study.num_workers} x {HARDWARE}, Poisson loads of {study.duration_s:g} s, "
        f"seed {study.seed}; made by revision {', '.join(sorted(study.lab.revisions))}."
    )
    markdown = report(study, found, said)
    pictures = {
        f"taichi-{number}": picture(f"{name}: {SHAPES[name].words}", layouts)
        for number, (name, layouts) in enumerate(found.items(), 1)
    }
    document = {
        "attainment": {
            name: {layout: {"cluster": c, "curve": v} for layout, (c, v) in layouts.items()}
            for name, layouts in found.items()
        },
        "revisions": sorted(study.lab.revisions),
    }
    print(markdown)
    return write(study.lab.folder, "taichi", markdown, document, pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("taichi", __doc__)
    parser.add_argument("--rates", type=float, nargs="+", metavar="R")
    parser.add_argument("--duration", type=float, help="of each load in s (default: 120)")
    chosen = parser.parse_args(arguments)
    study = Study(
        Lab(chosen.out, fresh=chosen.fresh),
        chosen.data / TRACE,
        rates=chosen.rates
        or ([8.0, 20.0] if chosen.quick else [16, 20, 24, 28, 32, 36, 40, 48, 56]),
        duration_s=chosen.duration or (10.0 if chosen.quick else 120.0),
        num_workers=4 if chosen.quick else NUM_WORKERS,
        seed=chosen.seed,
    )
    for path in answer(study):
        print(path)


if __name__ == "__main__":
    main()
