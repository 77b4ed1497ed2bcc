"""Splitwise (ISCA 2024, sec. VI): the load that clusters of equal power, or equal cost, bear.

A cluster bears a rate if a Poisson load of it keeps all nine of the paper's objectives: slowdowns
against an idle machine of A100s, of TTFT under 2, 3 and 6 at P50, P90 and P99, of TBT and E2E under
1.25, 1.5 and 5. The highest such rate is searched on a grid. Sizes are drawn from the Azure traces
of 2023, prompt and answer each by itself, as the authors' generator does. Clusters and machine
counts are those of their artifact. Two ways of looking at it:

``splitwisesim``  the rules of the authors' simulator, to which the published figures belong
``pdserve``       the policies of the server, which know no answer's length, on the same table of
                  measurements, read as it was measured; KV in its real size, links of 200 and 400
                  Gbit/s a GPU that transfers share

    python benchmarks/papers/splitwise.py --data DIR [--ways pdserve] [--loads conversation]
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper_runs import Lab, highest, lowest, parser_of, patient, plain, simulate
from paper_tables import Cell, bars_svg, write
from splitwise_clusters import (
    BUDGETS,
    COST,
    COUNTS,
    DESIGNS,
    POWER,
    SHARE_STEP,
    Design,
    division,
)
from splitwise_slowdowns import Measure, Slowdowns, measured, measured_as_there
from splitwise_tables import BASELINES, ROBUST, report

from pdserve.cost.links import LINKS
from pdserve.cost.machine import MachineModel
from pdserve.cost.table import PerfTable
from pdserve.cost.table_machine import machine_of_table
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import parse_cluster
from pdserve.sim.splitwisesim import imitate
from pdserve.workload.arrivals import arrivals
from pdserve.workload.request import TraceRequest
from pdserve.workload.synthetic import drawn
from pdserve.workload.traces import read_trace

MODEL = "bloom-176b"
LOADS = {"conversation": "azure_2023_conv.csv", "code": "azure_2023_code.csv"}
NETWORK = {"a100": "ib-200", "h100": "ib-400", "h100cap": "ib-400"}


WAYS = ("splitwisesim", "pdserve")
GUESSES = {
    ("splitwisesim", "equal power", "conversation"): (55, 115, 120, 125, 140, 145),
    ("splitwisesim", "equal cost", "conversation"): (70, 115, 135, 125, 140, 130),
    ("splitwisesim", "equal power", "code"): (40, 50, 65, 85, 85, 85),
    ("pdserve", "equal power", "conversation"): (35, 90, 30, 60, 30, 90),
    ("pdserve", "equal cost", "conversation"): (45, 90, 40, 60, 25, 40),
    ("pdserve", "equal power", "code"): (35, 50, 60, 80, 65, 80),
}
"""Where searches start, by way, setting and load, in the order of `DESIGNS`: no result depends on
it. What is missing starts from the rate at equal power, by the number of machines."""


# --- what is asked of a run -------------------------------------------------------------------


class Study:
    """``table``: the measurements. ``grid``: of the rates, in requests per second."""

    def __init__(
        self, lab: Lab, data: Path, *, duration_s: float, grid: int, seed: int, model: str = MODEL
    ) -> None:
        self.lab = lab
        self.duration_s, self.grid, self.seed, self.model = duration_s, grid, seed, model
        path = data / "splitwise_perf_model.csv"
        self._table = PerfTable.read(path.read_text(), path.name)
        self._traces = {name: data / file for name, file in LOADS.items()}
        self._sizes: dict[str, list[TraceRequest]] = {}

    def load(self, name: str, rate: float) -> list[TraceRequest]:
        """A Poisson load with sizes of the trace; the same for every cluster."""
        if name not in self._sizes:
            self._sizes[name] = read_trace(self._traces[name])
        times = arrivals("poisson", rate, 1.0, self.seed)
        requests: Iterator[TraceRequest] = drawn(self._sizes[name], times, self.seed, pairs=False)
        return list(itertools.takewhile(lambda r: r.at_s < self.duration_s, requests))

    def settings(self, design: Design, counts: Sequence[int]) -> SimSettings:
        """Of the way ``pdserve``: the policies of the server."""
        cluster = parse_cluster(design.cluster(counts))
        return patient(
            SimSettings(
                cluster=cluster,
                machines=tuple(self.machine(group.hardware) for group in cluster.groups),
                policy="aggregated" if design.mixed else "splitwise",
                batching="splitwise",
                max_running=512,
                prefix_cache=False,
                seed=self.seed,
            )
        )

    def machine(self, hardware: str) -> MachineModel:
        machine = machine_of_table(self._table, hardware, self.model)
        return replace(machine, link=LINKS[NETWORK[hardware]].of_worker(machine.num_devices))

    def measure(self, way: str) -> Measure:
        if way == "splitwisesim":
            return measured_as_there(self._table, self.model)
        return measured(self.machine("a100"))

    def as_there(self, settings: SimSettings) -> SimSettings:
        """Of the way ``splitwisesim``."""
        return imitate(settings, self._table)

    def bears(self, way: str, load: str, name: str, counts: Sequence[int], rate: int) -> bool:
        """Whether the cluster keeps all nine objectives."""
        return bool(self.run(way, load, DESIGNS[name], counts, rate)["kept"])

    def most(self, way: str, load: str, name: str, counts: Sequence[int], guess: float) -> int:
        """The highest rate of the grid that it bears, 0 if there is none."""
        grid = self.grid

        def passes(number: int) -> bool:
            return self.bears(way, load, name, counts, number * grid)

        return grid * highest(passes, max(1, round(guess / grid)))

    def run(
        self, way: str, load: str, design: Design, counts: Sequence[int], rate: int
    ) -> dict[str, Any]:
        """Which of the nine a cluster breaks, and the slowdowns if it ran to its end."""
        settings = self.settings(design, counts)
        if way == "splitwisesim":
            settings = self.as_there(settings)
        asked = plain(settings) | {
            "way": way, "load": load, "rate": rate, "duration_s": self.duration_s,
        }  # fmt: skip

        def work() -> dict[str, Any]:
            requests = self.load(load, rate)
            slowdowns = Slowdowns(self.measure(way), len(requests), count_all=False)
            whole = simulate(settings, iter(requests), [slowdowns])
            violated = slowdowns.violated() if whole else ["stopped: one cannot be kept"]
            answer: dict[str, Any] = {"kept": not violated, "violated": violated}
            if whole:
                answer["slowdowns"] = slowdowns.percentiles()
            return answer

        return self.lab.result(asked, work)


# --- the paper's questions --------------------------------------------------------------------


MOST_TIMES = 5
"""How often the machines of equal power are tried at most, for a throughput."""


def throughputs(
    study: Study, way: str, loads: Sequence[str], names: Sequence[str]
) -> dict[tuple[str, str, str], int]:
    """Highest rates by (setting, load, design)."""
    found: dict[tuple[str, str, str], int] = {}
    known: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for (setting, load), counts_of in COUNTS.items():
        for name in names if load in loads else ():
            counts = counts_of[name]
            if (load, name, counts) not in known:
                near = found.get(("equal power", load, name), study.grid)
                guess = near * sum(counts) / sum(COUNTS["equal power", load][name])
                if (way, setting, load) in GUESSES:
                    guess = GUESSES[way, setting, load][list(DESIGNS).index(name)]
                known[load, name, counts] = study.most(way, load, name, counts, guess)
            found[setting, load, name] = known[load, name, counts]
    return found


def robustness(
    study: Study, way: str, names: Sequence[str], own: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Conversation on clusters that are sized for it, and for code, by design."""
    sized = COUNTS["equal power", "code"]
    return {
        name: (own[name], study.most(way, "conversation", name, sized[name], own[name]))
        for name in names
    }


def equal_throughput(
    study: Study, way: str, name: str, rate: int, of: dict[str, float]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Clusters that bear this rate of conversation: the smallest of the proportions that the design
    has at equal power, and the one that takes least (``of``: cost or power) on the way from there.
    """
    full = COUNTS["equal power", "conversation"][name]
    total = sum(full)

    def counts_of(machines: int) -> tuple[int, ...]:
        prompt = max(1, min(machines - 1, round(machines * full[0] / total)))
        return prompt, machines - prompt

    def bears(counts: tuple[int, ...]) -> bool:
        return study.bears(way, "conversation", name, counts, rate)

    found = lowest(lambda n: n > 1 and bears(counts_of(n)), round(total * 0.8), MOST_TIMES * total)
    if found is None:
        return None, None
    same = counts_of(found)
    return same, slimmer(bears, same, DESIGNS[name], of)


def slimmer(
    bears: Callable[[tuple[int, ...]], bool],
    counts: tuple[int, ...],
    design: Design,
    of: dict[str, float],
) -> tuple[int, ...]:
    """From a division that bears the load to one that does so with less: prompt machines by ever
    smaller steps up or down, as many token machines as it then takes, as long as that saves."""
    step = max(1, counts[0] // 4)
    while step:
        for prompt in (counts[0], counts[0] - step, counts[0] + step):
            left = design.total(counts, of) - prompt * of[design.prompt]
            token = math.ceil(left / of[design.token] - 1e-9) - 1
            if prompt < 1 or token < 1 or not bears((prompt, token)):
                continue
            fewest = lowest(lambda n, p=prompt: bears((p, n)), token, token)  # type: ignore[misc]
            counts = prompt, fewest or token
            break
        else:
            step //= 2
    return counts


def redivided(
    study: Study, way: str, name: str, rate: int, setting: str = "equal power"
) -> tuple[tuple[int, ...], int]:
    """The division of the budget that bears most, from the paper's on as long as a step makes it
    better, and what it bears."""
    load = "conversation"
    counts: tuple[int, ...] = COUNTS[setting, load][name]
    of, hardware, number = BUDGETS[setting]
    share = counts[0] * of[DESIGNS[name].prompt] / (of[hardware] * number)
    for step in (-SHARE_STEP, SHARE_STEP):
        while 0.05 < share + step < 0.95:
            other = division(setting, name, share + step)
            if not study.bears(way, load, name, other, rate + study.grid):
                break
            rate = study.most(way, load, name, other, rate + study.grid)
            counts, share = other, share + step
    return counts, rate


# --- by the script ----------------------------------------------------------------------------


SAVERS = (
    ("HHcap", "Baseline-H100", 1.0, POWER, "equal cost, 25 % less power"),
    ("AA", "Baseline-H100", 1.0, COST, "25 % less cost"),
    ("AA", "Baseline-H100", 1.4, COST, "20 % less cost (abstract, no design named)"),
)
"""(design, against, how often its throughput, what is to be saved, the paper's saving)."""


def savings(study: Study, way: str, rates: dict[tuple[str, str, str], int]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for name, against, times, of, paper in SAVERS:
        rate = times * rates.get(("equal power", "conversation", against), 0)
        rate = study.grid * round(rate / study.grid)
        if not rate or ("equal power", "conversation", name) not in rates:
            continue
        base = COUNTS["equal power", "conversation"][against]
        one, other = DESIGNS[name], DESIGNS[against]
        row: list[Cell] = [way, name, f"{times:g} x {against}", rate, paper]
        for counts in equal_throughput(study, way, name, rate, of):
            if counts is None:
                row += [f"more than {MOST_TIMES} times as many", None, None]
                continue
            changes = [
                f"{100 * (one.total(counts, each) / other.total(base, each) - 1):+.0f} %"
                for each in (COST, POWER)
            ]
            row += [" + ".join(map(str, counts)), *changes]
        rows.append(row)
    return rows


def divisions(
    study: Study, way: str, rates: dict[tuple[str, str, str], int], names: Sequence[str]
) -> list[list[Cell]]:
    setting, load = "equal power", "conversation"
    rows: list[list[Cell]] = []
    for name in (name for name in ROBUST if name in names):
        paper = rates[setting, load, name]
        counts, rate = redivided(study, way, name, paper)
        before = " + ".join(map(str, COUNTS[setting, load][name]))
        after = " + ".join(map(str, counts))
        bases = [rates.get((setting, load, against)) for against in BASELINES]
        shares = [rate / base if base else None for base in bases]
        rows.append([name, before, paper, after, rate, *shares])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("splitwise", __doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--loads", nargs="+", choices=tuple(LOADS), default=list(LOADS))
    parser.add_argument("--designs", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--duration", type=float, help="of each load in s (default: 120)")
    parser.add_argument("--grid", type=int, help="of the rates in requests/s (default: 5)")
    parser.add_argument(
        "--only-rates", action="store_true", help="no robustness, no savings, no new divisions"
    )
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.loads, chosen.only_rates = ["conversation"], True
        chosen.designs = ["Baseline-A100", "AA"]
    study = Study(
        Lab(chosen.out, fresh=chosen.fresh),
        chosen.data,
        duration_s=chosen.duration or (10.0 if chosen.quick else 120.0),
        grid=chosen.grid or (20 if chosen.quick else 5),
        seed=chosen.seed,
    )
    for path in answer(study, chosen):
        print(path)


def answer(study: Study, chosen: argparse.Namespace) -> list[Path]:
    """Asks everything that was chosen, and writes it down."""
    ways = {way: throughputs(study, way, chosen.loads, chosen.designs) for way in chosen.ways}
    robust: dict[str, dict[str, tuple[int, int]]] = {}
    equal: dict[str, list[list[Cell]]] = {}
    divided: list[list[Cell]] = []
    if not chosen.only_rates and "conversation" in chosen.loads:
        for way, rates in ways.items():
            own = {
                n: rates["equal power", "conversation", n] for n in ROBUST if n in chosen.designs
            }
            robust[way] = robustness(study, way, list(own), own)
            equal[way] = savings(study, way, rates)
        if "pdserve" in ways:
            divided = divisions(study, "pdserve", ways["pdserve"], chosen.designs)
    said = (
        f"{MODEL}, Poisson loads of {study.duration_s:g} s, grid {study.grid} requests/s, seed "
        f"{study.seed}; made by revision {', '.join(sorted(study.lab.revisions))}."
    )
    markdown = report(ways, robust, equal, divided, said)
    pictures = {}
    for setting, load in COUNTS:
        groups = {
            name: {way: rates.get((setting, load, name)) for way, rates in ways.items()}
            for name in chosen.designs
        }
        if any(value for bars in groups.values() for value in bars.values()):
            slug = f"splitwise-{setting}-{load}".replace(" ", "-")
            pictures[slug] = bars_svg(f"{load}, {setting}", groups, "requests/s")
    document = {
        "rates": {w: {" | ".join(k): v for k, v in r.items()} for w, r in ways.items()},
        "robustness": robust,
        "equal_throughput": equal,
        "divided_anew": divided,
        "revisions": sorted(study.lab.revisions),
    }
    print(markdown)
    return write(study.lab.folder, "splitwise", markdown, document, pictures)


if __name__ == "__main__":
    main()
